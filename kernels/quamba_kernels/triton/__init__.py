"""Kernels in Triton. ``backends/triton.py`` registers them; here ``import triton`` is the compiler, not this folder."""

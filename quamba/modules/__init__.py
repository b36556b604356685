"""Quantised building blocks: the only callers of quamba_kernels' ops."""

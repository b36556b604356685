"""CUDA kernels as shared objects, one per architecture: found or compiled (``objects``), loaded (``library``)."""

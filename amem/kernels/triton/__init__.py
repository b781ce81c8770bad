"""Triton kernels, one per file. None is written yet: on CUDA every op says so instead of running something slower."""

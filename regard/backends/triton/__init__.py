"""Triton kernels: every score and every summary fused on the GPU."""

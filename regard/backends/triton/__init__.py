"""Triton kernels for GPUs: all dot-product scores, the additive score and every summary, in memory linear in length."""

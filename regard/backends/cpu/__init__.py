"""The native CPU backend: C++ kernels in csrc/, with memory linear in sequence length."""

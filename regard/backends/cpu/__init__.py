"""The native CPU kernels: C++ in csrc/, in memory linear in length."""

"""Benchmarks of regard against other implementations, in one process."""

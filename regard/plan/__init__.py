"""Checked calls, split into a frozen plan and tensors."""

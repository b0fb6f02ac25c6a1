"""Layers of attention, to be used as those of `torch.nn`."""

"""Plain PyTorch, some rows of the score matrix at a time: every problem, on any device, in memory linear in length."""

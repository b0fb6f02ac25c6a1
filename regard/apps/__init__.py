"""Applications behind the command line."""

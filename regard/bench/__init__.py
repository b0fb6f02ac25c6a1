"""The peers side by side, in one process."""

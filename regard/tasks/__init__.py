"""Tasks from files to predictions: sequence to sequence, one label per word, one label per text."""

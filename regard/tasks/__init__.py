"""What attention is for, from files to predictions: sequence to sequence, a label a word, a label a text."""

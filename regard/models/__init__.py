"""Small whole models: sequence to sequence, a label a word, a label a text."""

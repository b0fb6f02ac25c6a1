"""Small complete models: sequence-to-sequence models, a tagger and a text classifier."""

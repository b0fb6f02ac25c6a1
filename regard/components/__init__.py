"""The configurable parts of a call: scores, normalizers, masks, position biases and summaries."""

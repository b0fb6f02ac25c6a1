"""Interception of attention calls in a running model."""

"""Implementations of a problem. `registry` picks one; no backend knows a layer, no component knows a backend."""

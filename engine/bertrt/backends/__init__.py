"""Backends: the things that compute. One contract (`base`), one module each."""

"""Tiles of the Triton kernels, one module for each of theirs: frozen rows by problem, each with its reason."""

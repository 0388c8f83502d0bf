"""The version of cnnops."""

__version__ = "0.1.0"

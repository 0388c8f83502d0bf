"""Convolutional-network ops with hand-written kernels: CUDA C++, Triton, and C++ SIMD for the CPU."""

from . import functional, nn, settings
from .dispatch import UnsupportedError, use_backend
from .explain import explain, info

__version__ = "0.1.0"
__all__ = ["UnsupportedError", "explain", "functional", "info", "nn", "settings", "use_backend"]

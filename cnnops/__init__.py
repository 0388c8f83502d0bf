"""Convolutional-network ops with hand-written kernels: CUDA C++, Triton, and C++ SIMD for the CPU."""

from . import functional, models, nn, settings, teaching
from .dispatch import UnsupportedError, use_backend
from .explain import explain, info
from .version import __version__

__all__ = [
    "UnsupportedError",
    "__version__",
    "explain",
    "functional",
    "info",
    "models",
    "nn",
    "settings",
    "teaching",
    "use_backend",
]

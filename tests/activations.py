"""The fused activations, and gradients that stay away from where they have none."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
}

# torch's own hardsigmoid multiplies float64 gradients by 1/6 rounded to float32.
GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hardsigmoid": lambda z: F.relu6(z + 3) / 6}

KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}


def away_from_kinks(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """dy with zeros where rounding may carry z, given in float64, over a kink of the activation.

    There the derivative jumps, so an honest result may be either side's. Rounding to dy's dtype moves z by half a unit
    in the last place; the margin is 16 units of a number as large as the kink, or as 1.
    """
    eps = torch.finfo(dy.dtype).eps
    near = torch.zeros(z.shape, dtype=torch.bool)
    for kink in KINKS.get(activation, ()):
        near |= (z - kink).abs() < 16 * eps * max(abs(kink), 1.0)
    return dy.masked_fill(near.to(dy.device), 0.0)


def of_activated(magnitude: Tensor, y: Tensor) -> Tensor:
    """The magnitude behind y = activation(z) from that behind z. A sum's terms are no less than the sum, but sigmoid(0)
    is 1/2: it rounds as a number of its own size, in the float64 reference too."""
    return torch.maximum(magnitude, y.abs())

"""conv2d against torch: values, gradients, layouts, dtypes, on every backend that claims it."""

from __future__ import annotations

import helpers
import torch
from cases import CONV2D, Conv2dCase, of_suite
from helpers import Backend, over

import cnnops.functional as CF

NAMES = ("x", "weight", "bias")
CORNERS = of_suite(CONV2D, "corner")


def ours(case: Conv2dCase):
    return lambda x, weight, bias: CF.conv2d(x, weight, bias, **case.arguments())


@over("conv2d_forward", CORNERS)
def test_forward_and_gradients(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    inputs = helpers.conv2d_inputs(case, dtype, layout, backend.device)
    helpers.check_multilinear(ours(case), helpers.torch_conv2d(case), inputs, NAMES)

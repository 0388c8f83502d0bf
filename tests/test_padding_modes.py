"""conv2d and conv2d_act in nn.Conv2d's padding modes against a padded copy, on every backend that claims them."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import test_conv2d
import test_conv2d_act
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS
from cases import CONV2D, LAYOUTS, PADDED, VIEWS, Conv2dCase, find, pairwise
from helpers import Backend, over, torch_conv2d
from test_conv2d import NAMES, our_conv2d
from tolerance import assert_exact
from torch.utils._python_dispatch import TorchDispatchMode

import cnnops
import cnnops.functional as CF
from cnnops.geometry import PADDING_MODES

MODES = PADDING_MODES[1:]
NONEMPTY = tuple(case for case in PADDED if case.N)
KINDS = tuple(
    find(PADDED, f"{mode}/{id}")
    for mode in MODES
    for id in ("3x3-pad-bias", "7x7-s2-stem", "5x2-uneven-everything", "grouped-wide", "depthwise-3x3-ragged")
)


@over("conv2d_forward", PADDED)
def test_forward_and_gradients(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    test_conv2d.check(case, helpers.conv2d_inputs(case, dtype, layout, backend.device))


@over("conv2d_forward", KINDS, VIEWS, [torch.float32])
def test_views(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    test_conv2d.check(case, helpers.conv2d_inputs(case, dtype, layout, backend.device))


@over("conv2d_forward", NONEMPTY, LAYOUTS, [torch.float32])
def test_integers_are_exact(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    inputs = helpers.conv2d_inputs(case, dtype, layout, backend.device, helpers.integers)
    dy = helpers.integers(case.output_shape, dtype, backend.device, helpers.generator(case.id))
    helpers.check_exact(our_conv2d(case), torch_conv2d(case), NAMES, inputs, dy)


@over("conv2d_forward", KINDS, LAYOUTS)
def test_non_finite_values_are_repeated(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    """A NaN on the border is a NaN beside it too, and nowhere else."""
    x, weight, bias = helpers.conv2d_inputs(case, dtype, layout, backend.device)
    x[0, 0, 0, 0], x[-1, -1, -1, -1], x[0, -1, 1, 0], x[-1, 0, -2, 2] = torch.inf, torch.nan, -torch.inf, torch.inf
    dy = helpers.gradient_for(torch_conv2d(case), (x, weight, bias))
    dy[0, 0, 0, 0], dy[-1, -1, -1, -1] = torch.nan, torch.inf
    helpers.check_non_finite(our_conv2d(case), torch_conv2d(case), (x, weight, bias), dy, ("y", "dx", "dweight"))


ACT = pairwise([case for case in NONEMPTY if case.flops <= 100_000], lambda case: case.features())


@over("conv2d_act_forward", ACT, dtypes=[torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_fused(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str, activation: str) -> None:
    assert activation in ACTIVATIONS
    inputs = test_conv2d_act.inputs_of(case, dtype, layout, backend.device, residual=True)
    test_conv2d_act.check(case, inputs, activation)


SMALL = pairwise([case for case in NONEMPTY if case.flops <= 30_000], lambda case: case.features())


@over("conv2d_backward", SMALL, ["channels_last"], [torch.float64])
def test_gradcheck(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    inputs = [t for t in helpers.conv2d_inputs(case, dtype, layout, backend.device) if t is not None]
    leaves = [t.detach().requires_grad_() for t in inputs]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return our_conv2d(case)(*tensors, *[None] * (3 - len(tensors)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@over("conv2d_backward", SMALL[::2], ["channels_last"], [torch.float32])
def test_double_backward(backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str) -> None:
    test_conv2d.check_twice(case, helpers.conv2d_inputs(case, dtype, layout, backend.device))


@pytest.mark.parametrize("mode", MODES)
def test_unbatched(mode: str) -> None:
    case = find(PADDED, f"{mode}/3x3-pad-bias").with_batch(1)
    x, weight, bias = helpers.conv2d_inputs(case, torch.float32, "nchw", "cpu")
    with cnnops.use_backend("cpu"):
        test_conv2d.check(case, (x[0], weight, bias))


class Names(TorchDispatchMode):
    """Notes the name of every op below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padding", [1, (2, 1), "same"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_padded(mode: str, padding: Any) -> None:
    """No padded copy of the input, forward or backward; and explain() says that the kernels are ours."""
    x, weight = torch.randn(2, 8, 6, 7, requires_grad=True), torch.randn(8, 8, 3, 3, requires_grad=True)
    with cnnops.use_backend("cpu"), Names() as seen:
        CF.conv2d(x, weight, padding=padding, padding_mode=mode).sum().backward()
    assert {name for name in seen.names if "pad" in name or "conv" in name} == {
        "cnnops::conv2d",
        "cnnops::conv2d_backward",
    }
    explained = cnnops.explain(CF.conv2d, x, weight, padding=padding, padding_mode=mode)
    assert explained.backends == {"conv2d_forward": "cpu", "conv2d_backward": "cpu"}


def test_without_padding_every_mode_is_zeros() -> None:
    """So that a backend that knows zeros alone can do it."""
    x, weight = torch.randn(2, 8, 6, 7), torch.randn(8, 8, 3, 3)
    for mode in MODES:
        for function in (CF.conv2d, CF.conv2d_act):
            (decision,) = cnnops.explain(function, x, weight, padding_mode=mode).decisions[:1]
            assert decision.problem.pad_mode == "zeros"


def test_other_backends_say_that_they_pad_with_zeros_alone() -> None:
    x, weight = torch.randn(2, 8, 6, 7), torch.randn(8, 8, 3, 3)
    for name in ("simt", "triton"):
        with cnnops.use_backend(name), pytest.raises(cnnops.dispatch.UnsupportedError, match=r"zeros alone.*reflect"):
            CF.conv2d(x, weight, padding=1, padding_mode="reflect")


@pytest.mark.parametrize("function", [CF.conv2d, CF.conv2d_act])
def test_unknown_mode(function: Any) -> None:
    expected = r"padding_mode must be one of zeros, reflect, replicate, circular, but got padding_mode='wrap'"
    with pytest.raises(ValueError, match=expected):
        function(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1), padding_mode="wrap")


DETERMINISM = ("resnet18_cifar/3x3-64@32", "resnet18_cifar/stem-3to64@32", "mbconv/dw5x5-240@28")


@pytest.mark.parametrize("id", DETERMINISM)
@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_threads_gives_the_same_bits(id: str, mode: str) -> None:
    from test_determinism import same_for_any_thread_count

    case = find(CONV2D, id).with_batch(2)
    before = torch.get_num_threads()
    try:
        with cnnops.use_backend("cpu"):
            same_for_any_thread_count(
                lambda x, w, b: CF.conv2d(x, w, b, **case.arguments(), padding_mode=mode),
                helpers.conv2d_inputs(case, torch.float32, "channels_last", "cpu"),
            )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", (*LAYOUTS, *VIEWS))
def test_single_values_are_laid_out_as_torch_pads_them(layout: str) -> None:
    x = helpers.laid_out(torch.randn(2, 1, 1, 1), layout)
    weight = torch.randn(3, 1, 1, 1)
    with cnnops.use_backend("cpu"):
        y = CF.conv2d(x, weight, padding=(1, 2), padding_mode="replicate")
    expected = F.conv2d(F.pad(x, (2, 2, 1, 1), "replicate"), weight)
    assert y.stride() == expected.stride()
    assert_exact(y, expected.double(), "y")

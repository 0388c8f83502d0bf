"""The same inputs give the same bits, in every run and for any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import helpers
import pytest
import torch
from cases import CONV2D, NORM, POOL2D, SQUEEZE_EXCITE, find
from helpers import DTYPES, Backend, on
from tolerance import assert_same_bits

import cnnops
import cnnops.functional as CF
from cnnops.geometry import ACTIVATIONS

# Large enough that the work is shared among threads, ragged enough that it does not divide evenly.
CONVS = (
    find(CONV2D, "resnet18_cifar/3x3-64@32").with_batch(3),
    find(CONV2D, "resnet18_cifar/3x3-512@4").with_batch(2),
    find(CONV2D, "resnet18_cifar/1x1-128to256@16-s2").with_batch(3),
    find(CONV2D, "resnet18_cifar/stem-3to64@32").with_batch(5),
    find(CONV2D, "mbconv/dw3x3-192@28").with_batch(3),
    find(CONV2D, "mbconv/dw5x5-144@56-s2").with_batch(1),
    find(CONV2D, "grouped-wide"),
)
POOLS = (
    find(POOL2D, "resnet/max3x3-64@112-s2").with_batch(3),
    find(POOL2D, "pools/avg3x3-192@28-s1").with_batch(3),
    find(POOL2D, "resnet/global-512@7").with_batch(5),
    find(POOL2D, "adaptive_max/ragged-channels").with_batch(40),
)
NORMS = (
    find(NORM, "resnet18_cifar/64@32").with_batch(7),
    find(NORM, "resnet50/2048@7").with_batch(3),
    find(NORM, "train-long"),
)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same_for_any_thread_count(function: helpers.Function, inputs: helpers.Tensors) -> None:
    torch.set_num_threads(1)
    dy = helpers.gradient_for(function, inputs)
    expected = helpers.evaluate(function, inputs, dy)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        got = helpers.evaluate(function, inputs, dy)
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_same_bits(a, b, f"result {i} with {count} threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.id)
def test_conv2d(case: Any, dtype: torch.dtype) -> None:
    with cnnops.use_backend("cpu"):
        inputs = helpers.conv2d_inputs(case, dtype, "channels_last", "cpu")
        same_for_any_thread_count(lambda x, w, b: CF.conv2d(x, w, b, **case.arguments()), inputs)


@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.id)
def test_conv2d_bn_act(case: Any) -> None:
    x, weight, bias = helpers.conv2d_inputs(case, torch.float32, "channels_last", "cpu")
    random = helpers.generator(case.id)
    vectors = [helpers.randn((case.K,), torch.float32, "cpu", random) for _ in range(4)]
    vectors[1] = vectors[1].square() + 0.1
    found = []
    with cnnops.use_backend("cpu"):
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(CF.conv2d_bn_act(x, weight, bias, *vectors, **case.arguments()))
    for y in found[1:]:
        assert_same_bits(y, found[0])


@pytest.mark.parametrize("case", POOLS, ids=lambda case: case.id)
def test_pool2d(case: Any) -> None:
    x = helpers.randn(case.x_shape, torch.float32, "cpu", helpers.generator(case.id))
    with cnnops.use_backend("cpu"):
        for layout in ("nchw", "channels_last"):
            inputs = [helpers.laid_out(x, layout)]
            same_for_any_thread_count(lambda x: getattr(CF, case.op)(x, **case.arguments()), inputs)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_max_unpool2d(layout: str) -> None:
    """Positions are taken many times over: which value stays is a matter of order."""
    random = helpers.generator("unpool")
    x = helpers.laid_out(helpers.randn((3, 130, 24, 24), torch.float32, "cpu", random), layout)
    indices = helpers.laid_out(torch.randint(0, 100, x.shape, generator=random), layout)
    with cnnops.use_backend("cpu"):
        same_for_any_thread_count(lambda x: CF.max_unpool2d(x, indices, 2), [x])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", NORMS, ids=lambda case: case.id)
def test_batch_norm(case: Any, layout: str) -> None:
    random = helpers.generator(case.id)
    x, residual = (helpers.randn(case.x_shape, torch.float32, "cpu", random) for _ in range(2))
    vectors = [helpers.randn((case.C,), torch.float32, "cpu", random) for _ in range(2)]

    def function(x: Any, weight: Any, bias: Any, residual: Any) -> torch.Tensor:
        return CF.batch_norm_act(x, None, None, weight, bias, True, 0.1, 1e-5, residual)

    with cnnops.use_backend("cpu"):
        inputs = [helpers.laid_out(x, layout), *vectors, helpers.laid_out(residual, layout)]
        same_for_any_thread_count(function, inputs)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_bn_act_max_pool2d(layout: str) -> None:
    case = POOLS[0]
    random = helpers.generator(case.id)
    x, *vectors = (helpers.randn(shape, torch.float32, "cpu", random) for shape in (case.x_shape, *[(case.C,)] * 2))

    def function(x: Any, weight: Any, bias: Any) -> torch.Tensor:
        return CF.bn_act_max_pool2d(x, None, None, weight, bias, True, 0.1, 1e-5)

    with cnnops.use_backend("cpu"):
        same_for_any_thread_count(function, [helpers.laid_out(x, layout), *vectors])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("id", "N"), [("256@56", 3), ("512@28", 17), ("2048@7", 17)])
def test_squeeze_excite(id: str, N: int, layout: str) -> None:
    """Few images, whose slices are shared among threads, and many, with light weights and with heavy ones."""
    case = find(SQUEEZE_EXCITE, f"se_resnet/{id}").with_batch(N)
    random = helpers.generator(case.id)
    shapes = ((case.M, case.C), (case.M,), (case.C, case.M), (case.C,))
    layers = [helpers.randn(shape, torch.float32, "cpu", random, shape[-1] ** -0.5) for shape in shapes]
    x = helpers.laid_out(helpers.randn(case.x_shape, torch.float32, "cpu", random), layout)
    with cnnops.use_backend("cpu"):
        same_for_any_thread_count(CF.squeeze_excite, [x, *layers])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_mode_does_not_change_the_output(activation: str) -> None:
    """What is kept for backward is no part of what is computed."""
    case = find(CONV2D, "3x3-beyond-tile")
    x, weight, _ = helpers.conv2d_inputs(case, torch.float32, "channels_last", "cpu")
    vectors = [helpers.randn((case.C,), torch.float32, "cpu", helpers.generator("vectors")) for _ in range(2)]
    with cnnops.use_backend("cpu"):
        for function in (
            lambda x: CF.conv2d_act(x, weight, padding=1, activation=activation),
            lambda x: CF.batch_norm_act(x, None, None, *vectors, True, 0.1, 1e-5, None, activation),
            lambda x: CF.bn_act_max_pool2d(x, None, None, *vectors, True, 0.1, 1e-5, activation=activation),
        ):
            assert_same_bits(function(x), function(x.detach().requires_grad_()).detach())


@on("conv2d_forward", "conv2d_backward")
def test_conv2d_repeats_itself(backend: Backend) -> None:
    case = find(CONV2D, "3x3-pad-bias")
    inputs = helpers.conv2d_inputs(case, torch.float32, "channels_last", backend.device)

    def function(x: Any, weight: Any, bias: Any) -> torch.Tensor:
        return CF.conv2d(x, weight, bias, **case.arguments())

    dy = helpers.gradient_for(function, inputs)
    first, second = (helpers.evaluate(function, inputs, dy) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)

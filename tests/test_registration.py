"""The ops as torch sees them: schemas, fakes, tracing, autocast, checkpointing, in-place neighbours, torch.func."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from cases import CONV2D, CONV_TRANSPOSE2D, LAYOUTS, NORM, PADDED, POOL2D, of_suite
from helpers import Backend, on
from test_dispatch import python
from tolerance import assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cnnops
import cnnops.functional as CF
from cnnops import torch_private
from cnnops.geometry import ACTIVATIONS

GEOMETRY = (2, 1, 1, 0, 1, 2, 2, 0)  # stride, padding, dilation, groups, zeros
WINDOW = (3, 2, 2, 1, 1, 0)  # kernel, stride, padding
X, WEIGHT, Y = (2, 6, 7, 9), (4, 3, 3, 2), (2, 4, 4, 7)
GEOMETRY_T = (2, 1, 1, 0, 1, 1, 1, 2, 2)  # stride, padding, output padding, dilation, groups
WEIGHT_T, Y_T = (6, 2, 3, 2), (2, 4, 14, 12)


def tensor(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "channels_last") -> torch.Tensor:
    return helpers.laid_out(helpers.randn(shape, dtype, "cpu", helpers.generator(str(shape))), layout)


def _positions(x: torch.Tensor, count: int) -> torch.Tensor:
    """Indices below `count`, like x; a position may occur twice."""
    return torch.arange(x.numel()).view(x.shape) * 7 % count


def op_arguments(name: str, layout: str = "channels_last") -> Any:
    """(op, its arguments) for each registered op; floating tensors want gradients where the op has them."""

    def t(*shape: int) -> torch.Tensor:
        return tensor(*shape, layout=layout).requires_grad_()

    ops = torch.ops.cnnops
    pooled = (2, 6, 4, 8)  # X through WINDOW
    last = layout == "channels_last"
    if name == "conv2d":
        return ops.conv2d.default, (t(*X), t(*WEIGHT), t(4), *GEOMETRY, "")
    if name == "conv2d_backward":
        return ops.conv2d_backward.default, (t(*Y), t(*X), t(*WEIGHT), *GEOMETRY, True, True, True, "")
    if name == "conv_transpose2d":
        return ops.conv_transpose2d.default, (t(*X), t(*WEIGHT_T), t(4), *GEOMETRY_T, "")
    if name == "conv_transpose2d_backward":
        return ops.conv_transpose2d_backward.default, (t(*Y_T), t(*X), t(*WEIGHT_T), *GEOMETRY_T, True, True, True, "")
    if name == "conv2d_act":
        return ops.conv2d_act.default, (t(*X), t(*WEIGHT), t(4), t(*Y), *GEOMETRY, "relu", False, "")
    if name == "conv2d_bn_act":
        vectors = [t(4) for _ in range(4)]
        vectors[1] = torch.rand(4) + 0.1
        return ops.conv2d_bn_act.default, (t(*X), t(*WEIGHT), t(4), t(*Y), *vectors, *GEOMETRY, 1e-5, "silu", "")
    if name == "activation_backward":
        return ops.activation_backward.default, (t(*Y), t(*Y), "silu", "")
    if name.startswith("max_pool2d"):
        x = t(*X)
        forward = (x, *WINDOW, 1, 1, False, True, "")
        if name == "max_pool2d":
            return ops.max_pool2d.default, forward
        offsets = ops.max_pool2d(*forward)[1]
        if name == "max_pool2d_indices":
            return ops.max_pool2d_indices.default, (offsets, *X[2:], *WINDOW, 1, 1, "")
        return ops.max_pool2d_backward.default, (t(*pooled), offsets, *X[2:], last, *WINDOW, 1, 1, "")
    if name.startswith("adaptive_max_pool2d"):
        forward = (t(*X), 3, 4, True, "")
        if name == "adaptive_max_pool2d":
            return ops.adaptive_max_pool2d.default, forward
        offsets = ops.adaptive_max_pool2d(*forward)[1]
        if name == "adaptive_max_pool2d_indices":
            return ops.adaptive_max_pool2d_indices.default, (offsets, *X[2:], "")
        return ops.adaptive_max_pool2d_backward.default, (t(2, 6, 3, 4), offsets, *X[2:], last, "")
    if name.startswith("max_unpool2d"):
        indices = _positions(t(*X), 8 * 10)
        if name == "max_unpool2d":
            return ops.max_unpool2d.default, (t(*X), indices, 8, 10, "")
        return ops.max_unpool2d_backward.default, (t(2, 6, 8, 10), indices, last, "")
    if name == "avg_pool2d":
        return ops.avg_pool2d.default, (t(*X), *WINDOW, False, False, 0, "")
    if name == "avg_pool2d_backward":
        return ops.avg_pool2d_backward.default, (t(*pooled), *X[2:], last, *WINDOW, False, False, 0, "")
    if name == "adaptive_avg_pool2d":
        return ops.adaptive_avg_pool2d.default, (t(*X), 3, 4, "")
    if name == "adaptive_avg_pool2d_backward":
        return ops.adaptive_avg_pool2d_backward.default, (t(2, 6, 3, 4), *X[2:], last, "")
    layers = [t(3, 6, 1, 1), t(3), t(6, 3, 1, 1), t(6)]
    if name == "squeeze_excite":
        return ops.squeeze_excite.default, (t(*X), *layers, "silu", "sigmoid", "")
    if name == "squeeze_excite_backward":
        x, dy = t(*X), (tensor(*X, layout=layout) / 8).requires_grad_()
        with torch.no_grad():
            _, *small = ops.squeeze_excite(x, *layers, "silu", "sigmoid", "")
        return ops.squeeze_excite_backward.default, (
            dy, x, *layers, *small, "silu", "sigmoid", True, True, True, True, True, ""
        )  # fmt: skip
    vectors = [t(6), t(6)]
    if name.startswith("bn_act_max_pool2d"):
        x, state = t(*X), [torch.zeros(6), torch.ones(6)]
        forward = (x, *vectors, *state, True, 0.1, 1e-5, "silu", *WINDOW, 1, 1, False, True, "")
        if name == "bn_act_max_pool2d":
            return ops.bn_act_max_pool2d.default, forward
        with torch.no_grad():
            _, mean, rstd, offsets = ops.bn_act_max_pool2d(*forward)
        return ops.bn_act_max_pool2d_backward.default, (
            t(*pooled), offsets, x, *vectors, mean, rstd, True, 1e-5, "silu", *WINDOW, 1, 1, True, True, True, ""
        )  # fmt: skip
    if name == "batch_norm_act":
        state = [torch.zeros(6), torch.ones(6)]
        return ops.batch_norm_act.default, (t(*X), *vectors, t(*X), *state, True, 0.1, 1e-5, "relu", "")
    assert name == "batch_norm_act_backward", name
    x = t(*X)
    mean, var = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), unbiased=False)
    statistics = (mean, (var + 1e-5).rsqrt())
    needs = (True, True, True, False)
    return ops.batch_norm_act_backward.default, (
        t(*X), x, *vectors, None, None, *statistics, True, 1e-5, "silu", *needs, ""
    )  # fmt: skip


OPS = (
    "conv2d",
    "conv2d_backward",
    "conv2d_act",
    "conv_transpose2d",
    "conv_transpose2d_backward",
    "conv2d_bn_act",
    "activation_backward",
    "max_pool2d",
    "max_pool2d_backward",
    "max_pool2d_indices",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_backward",
    "adaptive_max_pool2d_indices",
    "max_unpool2d",
    "max_unpool2d_backward",
    "avg_pool2d",
    "avg_pool2d_backward",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool2d_backward",
    "batch_norm_act",
    "batch_norm_act_backward",
    "bn_act_max_pool2d",
    "bn_act_max_pool2d_backward",
    "squeeze_excite",
    "squeeze_excite_backward",
)


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("cnnops::").split(".")[0] for name in names if name.startswith("cnnops::")}


def test_every_registered_op_is_checked_here() -> None:
    assert registered() == set(OPS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, layout: str) -> None:
    with cnnops.use_backend("cpu"):
        op, args = op_arguments(name, layout)
        torch.library.opcheck(op, args)


@dataclass(frozen=True)
class Call:
    """A function of ours on tensors, and its arguments."""

    id: str
    function: Callable[..., torch.Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def tensors(self, layout: str = "channels_last") -> list[torch.Tensor]:
        return [tensor(*shape, layout=layout).requires_grad_() for shape in self.shapes]


def _batch_norm(x: Any, weight: Any, bias: Any) -> torch.Tensor:
    return CF.batch_norm(x, None, None, weight, bias, True)


def _conv2d_act(activation: str) -> Callable[..., torch.Tensor]:
    def function(x: Any, weight: Any, bias: Any, residual: Any) -> torch.Tensor:
        return CF.conv2d_act(x, weight, bias, (2, 1), (1, 0), (1, 2), 2, residual, activation)

    return function


def _conv2d_bn_act(x: Any, weight: Any, bias: Any, bn_weight: Any, bn_bias: Any, residual: Any) -> torch.Tensor:
    mean, var = torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 4)
    geometry: Any = ((2, 1), (1, 0), (1, 2), 2)
    return CF.conv2d_bn_act(
        x, weight, bias, mean, var, bn_weight, bn_bias, False, 0.1, 1e-5, *geometry, residual, "silu"
    )  # fmt: skip


def _batch_norm_act(activation: str) -> Callable[..., torch.Tensor]:
    def function(x: Any, weight: Any, bias: Any, residual: Any) -> torch.Tensor:
        return CF.batch_norm_act(x, None, None, weight, bias, True, 0.1, 1e-5, residual, activation)

    return function


def _bn_act_max_pool2d(x: Any, weight: Any, bias: Any) -> torch.Tensor:
    return CF.bn_act_max_pool2d(x, None, None, weight, bias, True, 0.1, 1e-5)


CALLS = (
    Call("conv2d", lambda x, w, b: CF.conv2d(x, w, b, (2, 1), (1, 0), (1, 2), 2), (X, WEIGHT, (4,))),
    Call("conv2d-same-even", lambda x, w: CF.conv2d(x, w, padding="same"), (X, (4, 6, 2, 4))),
    Call("conv2d-reflect", lambda x, w: CF.conv2d(x, w, padding=(2, 1), padding_mode="reflect"), (X, (4, 6, 3, 3))),
    Call(
        "conv2d-reflect-even", lambda x, w: CF.conv2d(x, w, padding="same", padding_mode="reflect"), (X, (4, 6, 2, 3))
    ),
    Call(
        "conv_transpose2d",
        lambda x, w, b: CF.conv_transpose2d(x, w, b, (2, 1), (1, 0), 1, 2, (1, 2)),
        (X, WEIGHT_T, (4,)),
    ),
    Call("max_pool2d", lambda x: CF.max_pool2d(x, (3, 2), (2, 1), (1, 0)), (X,)),
    Call("max_pool2d-indices", lambda x: CF.max_pool2d(x, (3, 2), (2, 1), return_indices=True)[0], (X,)),
    Call("avg_pool2d", lambda x: CF.avg_pool2d(x, (3, 2), (2, 1), (1, 0), True, False), (X,)),
    Call("adaptive_max_pool2d", lambda x: CF.adaptive_max_pool2d(x, (3, None)), (X,)),
    Call("adaptive_max_pool2d-indices", lambda x: CF.adaptive_max_pool2d(x, 4, return_indices=True)[0], (X,)),
    Call("max_unpool2d", lambda x: CF.max_unpool2d(x, _positions(x, 35), (2, 3), 1, 1), (X,)),
    Call("adaptive_avg_pool2d", lambda x: CF.adaptive_avg_pool2d(x, (3, None)), (X,)),
    Call("batch_norm", _batch_norm, (X, (6,), (6,))),
    Call("bn_act_max_pool2d", _bn_act_max_pool2d, (X, (6,), (6,))),
    Call("squeeze_excite", CF.squeeze_excite, (X, (3, 6, 1, 1), (3,), (6, 3, 1, 1), (6,))),
    *(Call(f"conv2d_act-{name}", _conv2d_act(name), (X, WEIGHT, (4,), Y)) for name in ACTIVATIONS),
    Call("conv2d_bn_act", _conv2d_bn_act, (X, WEIGHT, *[(4,)] * 3, Y)),
    *(Call(f"batch_norm_act-{name}", _batch_norm_act(name), (X, (6,), (6,), X)) for name in ACTIVATIONS),
)
each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.id)


def results(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    y = function(*tensors)
    return [y, *torch.autograd.grad(y, tensors, helpers.like(y.detach(), helpers.generator("dy")))]


def assert_all_same_bits(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(a, b, f"result {i}")


@each_call
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_breaks(call: Call, layout: str, dynamic: bool) -> None:
    """Compiled or not, the same kernels run, so the same bits come out."""
    torch._dynamo.reset()
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with cnnops.use_backend("cpu"):
        assert_all_same_bits(results(compiled, call.tensors(layout)), results(call.function, call.tensors(layout)))


def test_compiled_use_backend_in_a_fresh_thread() -> None:
    """The first use of the scope in a thread is inside a compiled function."""

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with cnnops.use_backend("cpu"):
            return CF.conv2d(x, weight)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, weight = tensor(2, 3, 5, 5), tensor(4, 3, 3, 3)
    with ThreadPoolExecutor(1) as fresh:
        got = fresh.submit(compiled, x, weight).result()
    assert_same_bits(got, function(x, weight))


def test_dynamic_shapes_do_not_recompile() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def block(x: Any, weight: Any) -> torch.Tensor:
        y = CF.conv2d_act(x, weight, padding=1)
        return CF.adaptive_avg_pool2d(CF.max_pool2d(y, 2), 1)

    compiled = torch.compile(block, fullgraph=True, backend=count, dynamic=True)
    weight = tensor(5, 6, 3, 3)
    with cnnops.use_backend("cpu"):
        for N, H, W in ((2, 8, 9), (3, 11, 7), (5, 6, 14)):
            x = tensor(N, 6, H, W)
            assert_same_bits(compiled(x, weight), block(x, weight))
    assert len(graphs) == 1


def test_running_statistics_are_updated_by_a_compiled_call() -> None:
    torch._dynamo.reset()

    def function(x: Any, mean: Any, var: Any) -> torch.Tensor:
        return CF.batch_norm(x, mean, var, training=True)

    x, states = tensor(*X), [[torch.zeros(6), torch.ones(6)] for _ in range(2)]
    with cnnops.use_backend("cpu"):
        y = function(x, *states[0])
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(x, *states[1])
    assert_all_same_bits([y, *states[0]], [compiled, *states[1]])
    assert not torch.equal(states[0][0], torch.zeros(6))


def test_export() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(tensor(5, 6, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return CF.max_pool2d(CF.conv2d_act(x, self.weight, padding=1), 2)

    block, x = Block(), tensor(*X)
    exported = torch.export.export(block, (x,)).module()
    assert_same_bits(exported(x), block(x))


@each_call
def test_backward_outside_use_backend(call: Call) -> None:
    """The forward's backend runs the backward, wherever that is called."""
    tensors = call.tensors()
    with cnnops.use_backend("cpu"):
        expected = results(call.function, tensors)
        y = call.function(*tensors)
    with cnnops.use_backend("aten"):
        got = torch.autograd.grad(y, tensors, helpers.like(y.detach(), helpers.generator("dy")))
    assert_all_same_bits(list(got), expected[1:])


@each_call
def test_functional_and_torch_ops_agree(call: Call) -> None:
    """`functional` skips torch's dispatcher where nobody looks on; under a dispatch mode it cannot."""
    with cnnops.use_backend("cpu"):
        expected = results(call.function, call.tensors())
        with Recorder() as seen:
            got = results(call.function, call.tensors())
    assert_all_same_bits(got, expected)
    assert any(name.startswith("cnnops::") for name, _ in seen.calls)


class Recorder(TorchDispatchMode):
    """Notes every op below autograd: (name, arguments by name)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        self.calls.append((func._schema.name, dict(zip(names, args, strict=False)) | (kwargs or {})))
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arguments for called, arguments in self.calls if called == name]


class NativeCalls:
    """Notes what dispatch asks of a backend's module: (function, arguments). Only calls of new shapes are seen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        module = helpers.row(backend)
        original = module.function

        def function(name: str) -> Callable[..., Any]:
            found = original(name)

            def run(*args: Any) -> Any:
                self.calls.append((name, args))
                return found(*args)

            return run

        monkeypatch.setattr(module, "function", function)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_only_wanted_gradients_are_computed(wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen weight costs no weight gradient, a first layer no input gradient, and so on."""
    native = NativeCalls(monkeypatch, "cpu")
    shapes = ((2, 3, 29 + wanted.count(True), 31 + sum(2**i * w for i, w in enumerate(wanted))), (5, 3, 3, 3), (5,))
    leaves = [tensor(*shape).requires_grad_(need) for shape, need in zip(shapes, wanted, strict=True)]
    with cnnops.use_backend("cpu"):
        CF.conv2d(*leaves).sum().backward()
    backward = [args for name, args in native.calls if name == "conv2d_backward"]
    assert [args[11:14] for args in backward] == [wanted]
    for leaf, need in zip(leaves, wanted, strict=True):
        assert (leaf.grad is not None) == need


def test_no_gradient_wanted_none_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    native = NativeCalls(monkeypatch, "cpu")
    x, weight = tensor(2, 3, 23, 37).requires_grad_(), tensor(5, 3, 3, 3)
    with cnnops.use_backend("cpu"), torch.no_grad():
        y = CF.max_pool2d(CF.conv2d(x, weight), 2)
    assert not y.requires_grad
    assert [name for name, _ in native.calls] == ["conv2d_forward", "max_pool2d_forward"]
    assert native.calls[1][1][-1] is False, "window offsets are for the gradient and for indices alone"


def test_batch_norm_computes_only_wanted_gradients() -> None:
    x, weight, bias = tensor(*X).requires_grad_(), tensor(6), tensor(6)
    with cnnops.use_backend("cpu"), Recorder() as seen:
        CF.batch_norm(x, None, None, weight, bias, True).sum().backward()
    (arguments,) = seen.of("cnnops::batch_norm_act_backward")
    needs = {name: value for name, value in arguments.items() if name.startswith("need_")}
    assert needs == {"need_dx": True, "need_dweight": False, "need_dbias": False, "need_dresidual": False}


@each_call
def test_no_aten_kernel_computes(call: Call) -> None:
    """Under a named backend, torch's own convolutions, pools and norms never run."""
    theirs = ("conv", "pool", "norm", "thnn", "mkldnn")
    with cnnops.use_backend("cpu"), Recorder() as seen:
        results(call.function, call.tensors())
    assert not [name for name, _ in seen.calls if name.startswith("aten::") and any(word in name for word in theirs)]


def test_autocast_lowers_convolutions() -> None:
    x, weight, bias = tensor(*X), tensor(*WEIGHT), tensor(4)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    with cnnops.use_backend("cpu"):
        for function in (
            lambda x, w, b: CF.conv2d(x, w, b, groups=2),
            lambda x, w, b: CF.conv2d_act(x, w, b, groups=2),
            lambda x, w, b: CF.conv_transpose2d(x, w.flatten()[:48].view(6, 2, 2, 2), b, groups=2),
        ):
            expected = function(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
            with torch.autocast("cpu", torch.bfloat16):
                y = function(*leaves)
            assert_same_bits(y, expected)
            for gradient in torch.autograd.grad(y.float().sum(), leaves):
                assert gradient.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_follows_its_dtype(dtype: torch.dtype) -> None:
    with cnnops.use_backend("cpu"), torch.autocast("cpu", dtype):
        assert CF.conv2d(tensor(*X), tensor(*WEIGHT), groups=2).dtype == dtype
        assert CF.conv2d(tensor(*X).double(), tensor(*WEIGHT).double(), groups=2).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_norms_and_pools(dtype: torch.dtype) -> None:
    x, weight, bias = tensor(*X).to(dtype), tensor(6), tensor(6)
    with cnnops.use_backend("cpu"), torch.autocast("cpu", torch.bfloat16):
        assert CF.batch_norm(x, None, None, weight, bias, True).dtype == dtype
        assert CF.batch_norm_act(x, None, None, weight, bias, True, 0.1, 1e-5).dtype == dtype
        assert CF.bn_act_max_pool2d(x, None, None, weight, bias, True, 0.1, 1e-5).dtype == dtype
        assert CF.max_pool2d(x, 2).dtype == dtype
        assert CF.avg_pool2d(x, 2).dtype == dtype
        assert CF.adaptive_avg_pool2d(x, 2).dtype == dtype
        assert CF.adaptive_max_pool2d(x, 2).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_autocast_unpools_in_float32(dtype: torch.dtype) -> None:
    x, dx = tensor(2, 3, 6, 8).to(dtype).requires_grad_(), []
    y, indices = F.max_pool2d(x, 2, return_indices=True)
    for library in (CF, F):
        with torch.autocast("cpu", torch.bfloat16):
            z = library.max_unpool2d(y, indices, 2)
        assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        dx += torch.autograd.grad(z.square().sum(), x, retain_graph=True)
    assert_same_bits(*dx)


def _all_calls() -> list[Any]:
    def conv(case: Any) -> Any:
        return lambda x, weight: CF.conv2d(x, weight, **case.arguments())

    def transposed(case: Any) -> Any:
        return lambda x, weight: CF.conv_transpose2d(x, weight, **case.arguments())

    convs = [*of_suite(CONV2D, "corner"), *PADDED[::7]]
    calls = [(case.id, conv(case), case.x_shape, case.weight_shape) for case in convs if case.C]
    calls += [
        (case.id + "-T", transposed(case), case.x_shape, case.weight_shape)
        for case in of_suite(CONV_TRANSPOSE2D, "corner")
    ]
    for case in of_suite(POOL2D, "corner"):
        calls.append((case.id, lambda x, case=case: getattr(CF, case.op)(x, **case.arguments()), case.x_shape, None))
    for case in of_suite(NORM, "corner"):
        if case.training:
            calls.append((case.id, lambda x: CF.batch_norm(x, None, None, training=True), case.x_shape, None))
    return [pytest.param(*call[1:], id=call[0]) for call in calls]


@pytest.mark.parametrize(("function", "x_shape", "weight_shape"), _all_calls())
def test_fake_outputs_have_the_real_strides(function: Any, x_shape: Any, weight_shape: Any) -> None:
    with cnnops.use_backend("cpu"):
        for x_layout, weight_layout in itertools.product((*LAYOUTS, "transposed"), LAYOUTS if weight_shape else [""]):
            tensors = [helpers.laid_out(torch.zeros(x_shape), x_layout)]
            if weight_shape:
                tensors.append(helpers.laid_out(torch.zeros(weight_shape), weight_layout))
            real = function(*tensors)
            with FakeTensorMode() as mode:
                fake = function(*[mode.from_tensor(t) for t in tensors])
            meta = function(*[t.to("meta") for t in tensors])
            for found in (fake, meta):
                assert (found.shape, found.dtype, found.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize(
    "call",
    # an uneven "same" takes torch's own F.pad, whose fake gradient forgets channels_last
    [call for call in CALLS if call.id != "conv2d-reflect-even"],
    ids=lambda call: call.id,
)
@pytest.mark.parametrize("layout", [*LAYOUTS, "transposed"])
def test_fake_calls_have_the_real_strides(call: Call, layout: str) -> None:
    """As above, for every op and its gradients."""
    tensors = [helpers.laid_out(t, layout).requires_grad_() for t in call.tensors()]
    with cnnops.use_backend("cpu"):
        real = [call.function(*tensors)]
        real += torch.autograd.grad(real[0].sum(), tensors)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in tensors]
            fake = [call.function(*fakes)]
            fake += torch.autograd.grad(fake[0].sum(), fakes)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@each_call
def test_inference_mode(call: Call) -> None:
    with cnnops.use_backend("cpu"), torch.no_grad():
        expected = call.function(*call.tensors())
        with torch.inference_mode():
            y = call.function(*[t.clone() for t in call.tensors()])
    assert y.is_inference()
    assert_same_bits(y, expected)


@each_call
def test_torchs_deterministic_mode_refuses_nothing(call: Call) -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with cnnops.use_backend("cpu"):
        expected = results(call.function, call.tensors())
        torch.use_deterministic_algorithms(True)
        try:
            assert_all_same_bits(results(call.function, call.tensors()), expected)
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@on("conv2d_forward")
def test_in_place_after_ours(backend: Backend) -> None:
    """`out += shortcut; F.relu_(out)`, as residual networks have it."""
    x, weight, shortcut = (t.to(backend.device) for t in (tensor(2, 8, 5, 6), tensor(8, 8, 3, 3), tensor(2, 8, 5, 6)))
    gradients = []
    for in_place in (True, False):
        leaves = [t.detach().requires_grad_() for t in (x, weight, shortcut)]
        out = CF.conv2d(leaves[0], leaves[1], padding=1)
        if in_place:
            out += leaves[2]
            F.relu_(out)
        else:
            out = F.relu(out + leaves[2])
        gradients.append(torch.autograd.grad(out.sum(), leaves))
    assert_all_same_bits(list(gradients[0]), list(gradients[1]))


def test_in_place_after_batch_norm() -> None:
    with cnnops.use_backend("cpu"):
        found = []
        for in_place in (True, False):
            x, weight, bias = (tensor(*shape).requires_grad_() for shape in (X, (6,), (6,)))
            out = CF.batch_norm(x, None, None, weight, bias, True)
            out = F.relu_(out) if in_place else F.relu(out)
            found.append(torch.autograd.grad(out.square().sum(), (x, weight, bias)))
    assert_all_same_bits(list(found[0]), list(found[1]))


def test_in_place_on_a_saved_output_is_refused() -> None:
    """relu's derivative is read off y, so changing y must raise and not give a wrong gradient."""
    with cnnops.use_backend("cpu"):
        y = CF.conv2d_act(tensor(2, 8, 5, 6), tensor(8, 8, 3, 3).requires_grad_())
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_running_statistics_count_as_written() -> None:
    """Batch norm writes them in place, and autograd must know."""
    mean, var = torch.zeros(6), torch.ones(6)
    before = mean._version, var._version
    with cnnops.use_backend("cpu"):
        CF.batch_norm(tensor(*X), mean, var, training=True)
        assert mean._version > before[0]
        assert var._version > before[1]
        before = mean._version, var._version
        CF.batch_norm(tensor(*X), mean, var, training=False)
        assert (mean._version, var._version) == before


@each_call
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(call: Call, reentrant: bool) -> None:
    with cnnops.use_backend("cpu"):
        expected = results(call.function, call.tensors())
        if reentrant:  # its forward wants no gradients, and so may be one pass where ours is two ops
            with torch.no_grad():
                expected[0] = call.function(*call.tensors())
        got = results_of_backward(lambda *t: checkpoint(call.function, *t, use_reentrant=reentrant), call.tensors())
    assert_all_same_bits(got, expected)


def results_of_backward(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """As `results`, by .backward(): reentrant checkpoints know no other way."""
    y = function(*tensors)
    y.backward(helpers.like(y.detach(), helpers.generator("dy")))
    return [y, *[t.grad for t in tensors]]


@each_call
def test_parameters_and_subclasses(call: Call) -> None:
    class Subclass(torch.Tensor):
        pass

    with cnnops.use_backend("cpu"):
        expected = call.function(*call.tensors()).detach()
        assert_same_bits(call.function(*map(torch.nn.Parameter, call.tensors())).detach(), expected)
        y = call.function(*[t.detach().as_subclass(Subclass).requires_grad_() for t in call.tensors()])
        assert isinstance(y, Subclass)
        assert_same_bits(y.detach().as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize(
    "call", [call for call in CALLS if call.id in ("conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")],
    ids=lambda call: call.id,
)  # fmt: skip
def test_func_grad(call: Call) -> None:
    """torch.func.grad goes through `functional`; its result is .backward()'s."""
    with cnnops.use_backend("cpu"):
        tensors = call.tensors()
        expected = torch.autograd.grad(call.function(*tensors).sum(), tensors[0])[0]
        got = torch.func.grad(lambda *t: call.function(*t).sum())(*[t.detach() for t in tensors])
    assert_same_bits(got.contiguous(), expected.contiguous())


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.id)
def test_vmap(call: Call) -> None:
    """Samples by vmap, and their gradients by vmap over grad, are those of a loop."""
    with cnnops.use_backend("cpu"):
        x, *rest = [t.detach() for t in call.tensors()]
        samples = torch.stack([x, 2 * x - 1])
        gradient = torch.func.grad(lambda x: call.function(x, *rest).square().sum())
        for function in (lambda x: call.function(x, *rest), gradient):
            got = torch.func.vmap(function)(samples)
            # Wanting gradients, as a transform does, makes one pass the two ops that it stands for.
            loop = [function(x.detach().requires_grad_()).detach() for x in samples]
            assert_same_bits(got.contiguous(), torch.stack(loop).contiguous())


def test_vmap_writes_to_no_shared_statistics() -> None:
    x, mean, var = tensor(2, *X), torch.zeros(6), torch.ones(6)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: CF.batch_norm(x, mean, var, training=True))(x)
    means, variances = mean.expand(2, 6).clone(), var.expand(2, 6).clone()
    torch.func.vmap(lambda x, mean, var: CF.batch_norm(x, mean, var, training=True))(x, means, variances)
    for sample, got in zip(x, means, strict=True):
        CF.batch_norm(sample, alone := torch.zeros(6), torch.ones(6), training=True)
        assert torch.equal(got, alone)


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, weight = tensor(2, 6, 8, 9).requires_grad_(), tensor(4, 6, 3, 3).requires_grad_()
    totals = []
    for library in (CF, F):
        with FlopCounterMode(display=False) as counter:
            library.conv2d(x, weight, padding=1).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_private_names_of_torch() -> None:
    """Each does what the registration relies on."""
    assert not torch_private.dispatch_modes()
    with Recorder():
        assert torch_private.dispatch_modes()
    assert not torch_private.function_modes()
    with torch.overrides.TorchFunctionMode():
        assert torch_private.function_modes()
    transforming = []
    torch.func.grad(lambda x: (transforming.append(torch_private.transforming()), x.sum())[1])(torch.ones(2))
    assert [bool(t) for t in transforming] == [True]
    assert not torch_private.transforming()
    x = torch.ones(2, requires_grad=True)
    with torch_private.below_autograd():
        assert not (x * 2).requires_grad
    with torch.autocast("cpu", torch.bfloat16), torch_private.exclude_keys(torch_private.autocast_keys("CPU")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_the_tf32_switch() -> None:
    """Either of torch's switches, the one that raises where the other is set included; TF32 is torch's default."""
    program = (
        "import torch\n"
        "from cnnops.torch_private import tf32_allowed\n"
        "cudnn, found = torch.backends.cudnn, [tf32_allowed()]\n"
        "for allowed in (False, True):\n"
        "    cudnn.allow_tf32 = allowed\n"
        "    found.append(tf32_allowed())\n"
        "for precision in ('ieee', 'tf32'):\n"
        "    cudnn.conv.fp32_precision = precision\n"
        "    found.append(tf32_allowed())\n"
        "    assert (cudnn.conv.fp32_precision == 'tf32') == found[-1]\n"
        "print(found)"
    )
    done = python(program)
    assert done.stdout.strip() == "[True, False, True, False, True]", done.stderr


def test_watched_modules() -> None:
    """Every way to attach something to a module's call, and none once it is gone."""
    from torch.nn.modules import module as registry

    module = torch.nn.Conv2d(1, 1, 1)
    assert not torch_private.watched(module)
    for attach in (
        module.register_forward_hook,
        module.register_forward_pre_hook,
        module.register_full_backward_hook,
        module.register_full_backward_pre_hook,
        registry.register_module_forward_hook,
        registry.register_module_forward_pre_hook,
        registry.register_module_full_backward_hook,
        registry.register_module_full_backward_pre_hook,
    ):
        handle = attach(lambda *_: None)
        assert torch_private.watched(module), attach
        handle.remove()
        assert not torch_private.watched(module), attach
    module.forward = lambda x: x
    assert torch_private.watched(module)

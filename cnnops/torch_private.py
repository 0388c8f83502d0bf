"""Every private name of torch that cnnops uses. tests/test_registration.py holds that they exist and do what we think."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import _C, nn
from torch._functorch.utils import enable_single_level_autograd_function as inside_a_transform
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "FakeTensorMode",
    "autocast_keys",
    "autocasting",
    "below_autograd",
    "differentiating_forwards",
    "dispatch_modes",
    "exclude_keys",
    "forward_ad",
    "function_modes",
    "inside_a_transform",
    "tf32_allowed",
    "transforming",
    "tree_leaves",
    "tree_map",
    "unwrapped",
    "watched",
]

below_autograd = _C._AutoDispatchBelowAutograd
"""Context: dispatch to the kernels below the autograd keys."""

exclude_keys = _C._ExcludeDispatchKeyGuard
"""Context: dispatch as if these keys were not set."""

dispatch_modes = _C._len_torch_dispatch_stack
"""How many __torch_dispatch__ modes (fake tensors, tracing, FLOP counting, ...) are active."""

function_modes = _C._len_torch_function_stack
"""How many __torch_function__ modes are active."""

transforming = _C._are_functorch_transforms_active
"""Whether a torch.func transform (vmap, grad, jvp, ...) is active."""

autocasting = _C._is_any_autocast_enabled
"""Whether autocast is on for any device."""

# forward_ad._current_level is -1 outside of every dual level, torch.func.jvp's included; reading it is the cheapest way
# to know. A Function's ctx.to_save is what it saved for backward.
differentiating_forwards = forward_ad._set_fwd_grad_enabled
"""Context: whether ops on dual tensors compute tangents; off while a jvp runs."""

# inside_a_transform: context in which an op's Autograd kernel may enter an autograd Function under a torch.func
# transform: it differentiates that one layer.


_fp32_precision = _C._get_fp32_precision_getter  # a fourth of what torch.backends.cudnn.conv.fp32_precision costs


def tf32_allowed() -> bool:
    """Whether torch's convolutions on CUDA may multiply float32 as TF32 at this moment.

    What ``torch.backends.cudnn.conv.fp32_precision`` says. It knows of ``torch.backends.cudnn.allow_tf32`` too, which
    raises where the former has been set.
    """
    return bool(_fp32_precision("cuda", "conv") == "tf32")


def unwrapped(op: OpOverload) -> Callable[..., Any]:
    """What calling `op` calls, without the Python frame in between."""
    return op._op


def watched(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward: hooks of its own or of all modules, or a forward
    that was set on it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
        or "forward" in module.__dict__
    )


def autocast_keys(device: str) -> _C.DispatchKeySet:
    """The dispatch keys of autocast on "CPU" or "CUDA"."""
    return _C.DispatchKeySet(getattr(_C.DispatchKey, "Autocast" + device))

"""Launches of Triton kernels that no interpreter runs: what reaches the driver, under a driver that is not there.

Triton finds the compiled kernel for a launch by looking at every argument; `launch` remembers it. Both ways must hand the
driver the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from cnnops.backends.triton.launch import Launch

pytest.importorskip("triton")

# Runs where nothing is interpreted: kernels are compiled for sm_90, their arguments are noted and nothing is launched.
PROGRAM = """
import json
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor
from cnnops.backends.triton import conv2d, launch

noted = []

class Launcher:
    def __init__(self, source, metadata):
        self.signature = list(source.signature.values())

    def __call__(self, x, y, z, stream, function, cooperative_or_packed, *rest):
        arguments = rest[-len(self.signature):]
        noted.append([[x, y, z], self.signature, [told_of(a) for a in arguments]])

def told_of(a):
    if isinstance(a, torch.Tensor):
        return [str(a.dtype), a.data_ptr()]
    if isinstance(a, TensorDescriptor):
        return [f"{a.base.dtype} {a.shape} {a.strides} {a.block_shape}", a.base.data_ptr()]
    return a

class Utils:
    def load_binary(self, name, kernel, shared, device):
        return 1, 2, 32, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 18}

class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

triton.runtime.driver.set_active(Driver())
memory = torch.rand(2 * 64 * 36 + 1)
x, odd = memory[:-1].view(2, 36, 64).permute(0, 2, 1).view(2, 64, 6, 6), memory[1:].view(2, 36, 64).permute(0, 2, 1).view(2, 64, 6, 6)
weight, bias = torch.rand(8, 64, 3, 3).to(memory_format=torch.channels_last), torch.rand(8)
results = []

def run(call):
    noted.clear()
    results.append(call())  # kept, so that no later one lies in its memory
    return json.loads(json.dumps(noted))

told = {}
for name, tensors in {"x": (x, weight, bias), "without bias": (x, weight, None), "odd": (odd, weight, bias)}.items():
    forward = lambda: conv2d.conv2d_forward(*tensors, 1, 1, 1, 1, 1, 1, 1, 0)
    told[f"boxes {name}"] = [run(forward) for _ in range(3)]
    with launch.as_device(launch.Device(80, 3)):
        told[name] = [run(forward) for _ in range(3)]
told["other weights"] = [run(lambda: conv2d.conv2d_forward(x, weight[:4], None, 1, 1, 1, 1, 1, 1, 1, 0)) for _ in range(2)]
dy = torch.rand(2, 8, 6, 6).to(memory_format=torch.channels_last)
told["backward"] = [run(lambda: conv2d.conv2d_backward(dy, x, weight, 1, 1, 1, 1, 1, 1, 1, 0, True, True, True)) for _ in range(3)]
told["pointers"] = [x.data_ptr(), odd.data_ptr(), weight.data_ptr(), bias.data_ptr()]
print(json.dumps(told))
"""


@cache
def told() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def given(launches: list[Any]) -> list[Any]:
    """What tells launches apart: pointers of results are new each time."""
    return [
        [grid, signature, [a[0] if isinstance(a, list) else a for a in arguments]]
        for grid, signature, arguments in launches
    ]


@pytest.mark.parametrize(
    "name", ["x", "boxes x", "without bias", "boxes without bias", "odd", "boxes odd", "other weights", "backward"]
)
def test_a_remembered_launch_hands_over_what_the_first_did(name: str) -> None:
    first, *again = told()[name]
    assert first
    for launches in again:
        assert given(launches) == given(first)


def test_the_tensors_of_this_call_are_handed_over() -> None:
    x, odd, weight, bias = told()["pointers"]
    for name, pointers in {"x": [x, weight, bias], "odd": [odd, weight, bias], "without bias": [x, weight]}.items():
        for (launch,) in told()[name]:
            found = [a[1] for a in launch[2] if isinstance(a, list)]
            assert found[:-1] == pointers
    results = {[a[1] for a in launch[2] if isinstance(a, list)][-1] for (launch,) in told()["x"]}
    assert len(results) == 3


def test_registers_are_bounded_where_the_compiler_can() -> None:
    how = Launch(1, {}, {}, max_registers=128)
    assert how.options(amd=False) == {**how.options(amd=True), "maxnreg": 128}


def test_every_argument_has_its_type_in_its_place() -> None:
    """Pointers where the compiled kernel has pointers, numbers where it has numbers; constants are not handed on."""
    for launches in (launch for runs in list(told().values())[:-1] for launch in runs):
        for _, signature, arguments in launches:
            assert len(signature) == len(arguments)
            for kind, argument in zip(signature, arguments, strict=True):
                if kind.startswith(("*", "tensordesc")):
                    assert isinstance(argument, list)
                elif kind != "constexpr":
                    assert isinstance(argument, int)

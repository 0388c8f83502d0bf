"""Each thing that kernels synchronise with is needed: with any one of them doing nothing, results go wrong.

Or the emulator stops the kernel. What no convolution uses, the sound twins of the emulator's faults do.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import ModuleType

import helpers
import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_exact

from cnnops.backends import cuda, simt
from cnnops.backends.native import Library
from cnnops.bench.kernels import REACH, Reach

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
WRAPPERS = ("ptx.cuh", "ptx_sm90.cuh")
SCHEDULES = (("forward", 0), ("reversed", 0), *(("random", seed) for seed in range(1, 5)))
CASES = [pytest.param(case, dtype, id=f"{i}-{str(dtype)[6:]}") for i, case in enumerate(REACH) for dtype in case.dtypes]


def check(library: Library, device: str, case: Reach, dtype: torch.dtype) -> None:
    """All results of a convolution of small integers, of which every sum is exact."""
    random = helpers.generator(str(case))
    x, weight, bias = (
        helpers.integers(shape, dtype, device, random, most=1) for shape in (case.x, case.weight, case.weight[:1])
    )
    x = case.laid_out(x)
    y = case.function("conv2d_forward", library)(x, weight, bias, *case.geometry)
    dy = helpers.integers(y.shape, dtype, device, random, most=1)
    got = (y, *case.function("conv2d_backward", library)(dy, x, weight, *case.geometry, True, True, True))
    leaves = [t.cpu().double().requires_grad_() for t in (x, weight, bias)]
    expected = F.conv2d(*leaves, case.stride, case.pad, case.dilation, case.groups)
    gradients = torch.autograd.grad(expected, leaves, dy.cpu().double())
    names = ("y", "dx", "dweight", "dbias")
    for name, ours, theirs in zip(names, got, (expected.detach(), *gradients), strict=True):
        assert_exact(ours.cpu(), theirs.to(dtype).double(), name)


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_simt_is_right_where_all_synchronise(
    emulator: ModuleType, case: Reach, dtype: torch.dtype, order: str, seed: int
) -> None:
    emulator.set_schedule(order, seed)
    emulator.set_device(case.architecture)
    check(simt.library, "cpu", case, dtype)


@pytest.mark.parametrize(("case", "dtype"), CASES if "cuda" in helpers.BACKENDS else [])
def test_cuda_is_right_with_the_kernels_of_each_architecture(case: Reach, dtype: torch.dtype) -> None:
    assert cuda.usable().ok, cuda.usable().reason
    use_architecture = cuda.library.function("use_architecture")
    use_architecture(case.architecture)
    try:
        check(cuda.library, "cuda", case, dtype)
    finally:
        use_architecture(0)


def used_by_convolutions(name: str) -> bool:
    sources = [path for path in CUDA.iterdir() if path.suffix in (".cu", ".cuh", ".h") and path.name not in WRAPPERS]
    convolutions = [path for path in sources if not path.name.startswith("batch_norm")]
    return any(re.search(rf"\b{name}\s*[(<]", path.read_text()) for path in convolutions)


def goes_wrong(emulator: ModuleType, case: Reach, dtype: torch.dtype) -> bool:
    emulator.set_device(case.architecture)
    try:
        check(simt.library, "cpu", case, dtype)
    except (AssertionError, RuntimeError):
        return True
    return False


def twin_goes_wrong(emulator: ModuleType, fault: str) -> bool:
    try:
        return not emulator.run_fault(fault, faulty=False)
    except RuntimeError:
        return True


@pytest.mark.parametrize("name", simt.module().sync_wrappers() if simt.usable().ok else [])
def test_without_it_something_goes_wrong(emulator: ModuleType, name: str) -> None:
    emulator.disable_sync(name)
    for order, seed in SCHEDULES:
        emulator.set_schedule(order, seed)
        if used_by_convolutions(name):
            if any(goes_wrong(emulator, case, dtype) for case in REACH for dtype in case.dtypes):
                return
        elif any(twin_goes_wrong(emulator, fault) for fault in emulator.fault_names()):
            return
    pytest.fail(f"nothing needs {name}")


# PTX that orders threads, copies or memory; of a copy, "mbarrier::complete_tx" is not one.
SYNCHRONISES = re.compile(
    r"\b(bar|barrier|mbarrier|fence|membar|griddepcontrol)\.\w|\bcp\.async(\.bulk)?\.(commit|wait|mbarrier)|"
    r"\bwgmma\.(fence|commit|wait)|\b(ld|st|red|atom)\.(acquire|release|acq_rel)\b"
)
DEFINITION = re.compile(r"__device__ __forceinline__ (?:\w+ )+?(\w+)\(")


def synchronising(source: str) -> set[str]:
    """The functions whose PTX synchronises."""
    found, name = set(), ""
    for line in source.splitlines():
        if defined := DEFINITION.search(line):
            name = defined[1]
        code = line.split("//")[0]
        if any(SYNCHRONISES.search(text) for text in re.findall(r'"([^"]*)"', code)):
            found.add(name)
    return found


def test_a_new_wrapper_is_noticed() -> None:
    source = """
// Waits with mbarrier.try_wait.
__device__ __forceinline__ void copy(int* to) {
  asm volatile("cp.async.bulk.tensor.1d.mbarrier::complete_tx::bytes [%0];" ::"r"(to));
}
template <int kLeft>
__device__ __forceinline__ uint32_t wait_bulk(int* barrier) {
  asm volatile(
      "{\\n"
      "cp.async.bulk.wait_group.read %0;\\n"
      "}" ::"n"(kLeft));
}
__device__ __forceinline__ void publish(int* p) { asm volatile("st.release.gpu.b32 [%0], 1;" ::"l"(p) : "memory"); }
__device__ __forceinline__ void after_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
"""
    assert synchronising(source) == {"wait_bulk", "publish", "after_grid"}


def test_every_wrapper_is_in_the_list(emulator: ModuleType) -> None:
    """Those whose PTX synchronises, and CUDA's own functions that kernels call."""
    wrappers = set().union(*(synchronising((CUDA / name).read_text()) for name in WRAPPERS))
    sources = " ".join(path.read_text() for path in CUDA.iterdir())
    own = set(re.findall(r"\b(__sync\w+|__threadfence\w*)\(", sources))
    listed = set(emulator.sync_wrappers())
    assert wrappers == {name for name in listed if not name.startswith("__")}
    assert own <= listed
    assert all(itertools.chain(wrappers, own))

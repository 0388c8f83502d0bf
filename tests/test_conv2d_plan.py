"""Which CUDA kernels would compute a convolution, asked of the library about devices that are not there."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

import helpers
import pytest
import torch
import torch.nn.functional as F
from cases import CONV2D, CONV_TRANSPOSE2D, Conv2dCase, find, networks, of_suite
from test_dispatch import python
from test_sync_proof import check as check_reach

import cnnops
import cnnops.functional as CF
from cnnops.backends import cuda, simt
from cnnops.bench.kernels import REACH, Reach

pytestmark = pytest.mark.quick

# (architecture, multiprocessors, shared bytes a block may have): A100, A10, L40S, H100, B200, RTX PRO 6000. Source:
# CUDA's programming guide, "Technical Specifications per Compute Capability".
DEVICES = (
    (80, 108, 163 << 10),
    (86, 72, 99 << 10),
    (89, 142, 99 << 10),
    (90, 132, 227 << 10),
    (100, 148, 227 << 10),
    (120, 188, 99 << 10),
)
HOPPER = DEVICES[3]
LINE = re.compile(
    r"(\w+) in (\w+): (portable|packed|depthwise|nchw|stem|wgmma|halo|toeplitz) (\d+)x(\d+) (\d+) stages.*: (\w.+)"
)
SM90_ALONE = ("wgmma", "halo")
GEOMETRY = (1, 1, 1, 1, 1, 1, 1, 0)


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    assert simt.usable().ok, simt.usable().reason
    yield
    simt.module().set_device()
    simt.library.function("use_architecture")(0)


def plans(
    function: str, case: object, dtype: torch.dtype, device: tuple[int, int, int], layout: str = "channels_last"
) -> list[tuple[str, ...]]:
    """(pass, precision, family, tile's rows, its columns, stages, reason) of each pass."""
    problem = helpers.problem_of(function, case, dtype, layout, "cuda")
    found = [LINE.fullmatch(line) for line in cuda.planned(simt.library, function, problem, device)]
    assert None not in found, cuda.planned(simt.library, function, problem, device)
    return [match.groups() for match in found]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"sm_{device[0]}")
def test_every_pass_of_every_convolution_has_a_kernel(device: tuple[int, int, int]) -> None:
    cases = [*of_suite(CONV2D, "corner"), *networks(CONV2D)]
    asked = [(case, ("conv2d_forward", "conv2d_backward")) for case in cases if case.C and case.N]
    asked += [
        (case, ("conv_transpose2d_forward", "conv_transpose2d_backward"))
        for case in of_suite(CONV_TRANSPOSE2D, "corner")
        if case.N
    ]
    for (case, functions), dtype in itertools.product(asked, cuda.DTYPES):
        for function in functions:
            found = plans(function, case, dtype, device)
            assert tuple(each[0] for each in found) == cuda.CONVOLUTIONS[function]
            for _, precision, family, rows, columns, stages, _ in found:
                assert precision == str(dtype).removeprefix("torch.")
                assert device[0] == 90 or family not in SM90_ALONE, (case, family)
                assert int(rows) % 16 == int(columns) % 8 == 0 < int(rows) * int(columns)
                assert int(stages) >= 1


CHOICES = {
    "of many channels": (Conv2dCase("", 32, 256, 56, 56, 256, 3, 3, padding=(1, 1)), "portable", (128, 128)),
    "of few filters": (Conv2dCase("", 32, 64, 56, 56, 64, 3, 3, padding=(1, 1)), "portable", (128, 64)),
    "of a small map": (Conv2dCase("", 1, 512, 7, 7, 512, 3, 3, padding=(1, 1)), "portable", (64, 64)),
    "of odd channels": (Conv2dCase("", 32, 63, 56, 56, 61, 3, 3, padding=(1, 1)), "portable", (64, 64)),
    "depthwise": (Conv2dCase("", 32, 64, 56, 56, 64, 3, 3, padding=(1, 1), groups=64), "depthwise", (64, 32)),
    "depthwise of any size": (
        Conv2dCase("", 32, 64, 56, 56, 128, 9, 9, padding=(4, 4), groups=64),
        "depthwise",
        (32, 32),
    ),
    "depthwise beyond the largest": (Conv2dCase("", 8, 64, 56, 56, 64, 33, 33, groups=64), "packed", (128, 32)),
    "of groups of two": (Conv2dCase("", 32, 64, 56, 56, 64, 3, 3, padding=(1, 1), groups=32), "packed", (128, 32)),
    "of large depthwise filters": (
        Conv2dCase("", 32, 96, 56, 56, 96, 7, 7, padding=(3, 3), groups=96),
        *("toeplitz", (32, 32)),
    ),
    "of large depthwise filters and a small map": (
        Conv2dCase("", 32, 384, 14, 14, 384, 7, 7, padding=(3, 3), groups=384),
        *("toeplitz", (16, 16)),
    ),
    "of an image": (Conv2dCase("", 32, 3, 224, 224, 64, 7, 7, stride=(2, 2), padding=(3, 3)), "stem", (64, 64)),
}


@pytest.mark.parametrize(
    "device", [device for device in DEVICES if device[0] != 90], ids=lambda device: f"sm_{device[0]}"
)
@pytest.mark.parametrize("layer", CHOICES)
def test_choice_for_a_layer(layer: str, device: tuple[int, int, int]) -> None:
    case, family, tile = CHOICES[layer]
    [(_, _, chosen, rows, columns, _, _)] = plans("conv2d_forward", case, torch.bfloat16, device)
    assert (chosen, int(rows), int(columns)) == (family, *tile)


@pytest.mark.parametrize("layer", CHOICES)
def test_choice_for_a_layer_on_hopper(layer: str) -> None:
    """Its own kernels where they apply, to as large a tile as its multiprocessors leave room for."""
    case, family, tile = CHOICES[layer]
    taken = {"of many channels": ("wgmma", (128, 256)), "of few filters": ("halo", (256, 64))}
    taken["of a small map"] = ("wgmma", (128, 64))
    [(_, _, chosen, rows, columns, _, _)] = plans("conv2d_forward", case, torch.bfloat16, HOPPER)
    assert (chosen, (int(rows), int(columns))) == taken.get(layer, (family, tile))


LARGE_DEPTHWISE = Conv2dCase("", 8, 64, 28, 40, 64, 13, 9, padding=(6, 4), groups=64)


def families(
    case: Conv2dCase,
    dtype: torch.dtype,
    device: tuple[int, int, int] = DEVICES[0],
    layout: str = "channels_last",
) -> list[str]:
    """Of the forward pass and both gradients."""
    functions = "conv2d_forward", "conv2d_backward"
    return [found[2] for name in functions for found in plans(name, case, dtype, device, layout)]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"sm_{device[0]}")
def test_bands_are_for_large_depthwise_filters_of_16_bits(device: tuple[int, int, int]) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        taken = families(LARGE_DEPTHWISE, dtype, device)
        assert taken == ["toeplitz"] * 3
    assert "toeplitz" not in families(LARGE_DEPTHWISE, torch.float32, device)
    others = (
        {"stride": (2, 1)},
        {"dilation": (1, 2)},
        {"K": 128},
        {"groups": 32},
        {"R": 6, "padding": (3, 4)},
        {"S": 33, "padding": (6, 16)},
    )
    for other in others:
        assert "toeplitz" not in families(replace(LARGE_DEPTHWISE, **other), torch.bfloat16, device), other


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"sm_{device[0]}")
def test_planes_are_for_depthwise_filters_of_nchw(device: tuple[int, int, int]) -> None:
    """Of at most 7 x 7 taps, where the rows of a strip fit in shared memory."""
    case = Conv2dCase("", 8, 64, 56, 56, 64, 3, 3, padding=(1, 1), groups=64)
    for dtype in cuda.DTYPES:
        for taken in (case, replace(case, K=128), replace(case, S=13, padding=(1, 6)), replace(case, W=300)):
            assert families(taken, dtype, device, "nchw") == ["nchw"] * 3, taken
            assert "nchw" not in families(taken, dtype, device), taken
        others = {"groups": 32}, {"R": 8, "S": 8}, {"R": 2, "S": 32, "padding": (1, 16)}, {"W": 1 << 14}, {"K": 64 * 17}
        for other in others:
            assert "nchw" not in families(replace(case, **other), dtype, device, "nchw"), other


def test_bands_are_for_filters_whose_taps_fit_in_shared_memory() -> None:
    """Large tiles of 31 x 31 taps fit on Hopper, small ones on sm_80, none where a block has 99 KB. Beside dx's filters
    dweight wants x: of 25 x 25 taps there is room for one of them."""
    case = Conv2dCase("", 32, 128, 56, 56, 128, 31, 31, padding=(15, 15), groups=128)
    tiles = {}
    for device in DEVICES:
        for name in ("conv2d_forward", "conv2d_backward"):
            _, _, family, rows, columns, *_ = plans(name, case, torch.bfloat16, device)[0]
            tiles[device[0], name] = (family == "toeplitz", (int(rows), int(columns)))
    expected = {80: (True, (16, 16)), 90: (True, (32, 32)), 100: (True, (32, 32))}
    assert all(tile == expected[arch] if arch in expected else not tile[0] for (arch, _), tile in tiles.items())
    for device in DEVICES:
        family = "toeplitz" if device[0] in expected else "depthwise"
        assert families(case, torch.bfloat16, device)[2] == family
        fewer = families(replace(case, R=25, S=25, padding=(12, 12)), torch.bfloat16, device)
        assert fewer == ["toeplitz", "toeplitz", family]


@pytest.mark.parametrize("case", [case for case in REACH if case.architecture < 90])
def test_every_family_fits_the_least_device(case: Reach) -> None:
    """The emulator refuses a block more than an sm_86 gives it: 99 KB. A stem of 7x7 in TF32 takes more elsewhere."""
    simt.module().set_device(86)
    for dtype in case.dtypes:
        check_reach(simt.library, "cpu", case, dtype)


def test_precision_follows_torchs_switch() -> None:
    case = find(CONV2D, "3x3-pad-bias")
    for dtype, names in ((torch.float32, ("tf32", "float32")), (torch.bfloat16, ("bfloat16", "bfloat16"))):
        with helpers.tf32():
            assert plans("conv2d_forward", case, dtype, DEVICES[0])[0][1] == names[0]
        assert plans("conv2d_forward", case, dtype, DEVICES[0])[0][1] == names[1]


def test_nothing_is_planned_where_nothing_runs() -> None:
    empty = find(CONV2D, "3x3-pad-bias").with_batch(0)
    assert plans("conv2d_forward", empty, torch.float32, DEVICES[0]) == []
    norm = helpers.problem_of("activation_backward", helpers.PLAINEST["activation"], torch.float32, "nchw", "cpu")
    assert simt.plan("activation_backward", norm) == ()


def test_an_unknown_pass_is_refused() -> None:
    plan = simt.library.function("conv2d_plan")
    with pytest.raises(RuntimeError, match=r"direction must be .*, but got 'sideways'"):
        plan("sideways", 1, 8, 4, 4, 8, 3, 3, *GEOMETRY, torch.float32, True, False, 0, 0, 0)


@pytest.mark.parametrize("architecture", [80, 86, 90])
def test_shared_memory_suffices(architecture: int) -> None:
    """The emulator refuses a launch that asks for more than a block of the architecture may have."""
    simt.module().set_device(architecture, 1)  # so few multiprocessors are filled by the largest tiles
    random = torch.Generator().manual_seed(0)
    for dtype, tf32 in (*((dtype, False) for dtype in cuda.DTYPES), (torch.float32, True)):
        x, weight = (
            torch.randint(-1, 2, shape, generator=random).to(dtype).contiguous(memory_format=torch.channels_last)
            for shape in ((1, 16, 12, 24), (136, 16, 3, 3))
        )
        y = F.conv2d(x.float(), weight.float(), padding=1).to(dtype)
        dx, dweight = torch.ops.aten.convolution_backward(
            y.float(), x.float(), weight.float(), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
        )[:2]
        with helpers.tf32() if tf32 else contextlib.nullcontext():
            assert torch.equal(simt.function("conv2d_forward")(x, weight, None, *GEOMETRY), y)
            got = simt.function("conv2d_backward")(y, x, weight, *GEOMETRY, True, True, False)
        if dtype == torch.float32:
            assert torch.equal(got[0], dx) and torch.equal(got[1], dweight)


PLAIN = helpers.problem_of(
    "conv2d_forward",
    Conv2dCase("plain", 4, 64, 32, 32, 64, 3, 3, padding=(1, 1)),
    torch.bfloat16,
    "channels_last",
    "cpu",
)


def current() -> tuple[str, ...]:
    return simt.plan("conv2d_forward", PLAIN)


def planned_for(architecture: int, multiprocessors: int, shared_bytes: int) -> tuple[str, ...]:
    return cuda.planned(simt.library, "conv2d_forward", PLAIN, (architecture, multiprocessors, shared_bytes))


def test_the_current_device_is_asked() -> None:
    emulator = simt.module()
    for architecture, multiprocessors, shared_bytes in ((90, 3, 227 << 10), (90, 200, 227 << 10), (86, 3, 99 << 10)):
        emulator.set_device(architecture, multiprocessors)
        assert current() == planned_for(architecture, multiprocessors, shared_bytes)
    assert planned_for(90, 3, 227 << 10) != planned_for(90, 200, 227 << 10)


def test_a_lower_architecture_can_be_asked_for() -> None:
    use_architecture = simt.library.function("use_architecture")
    use_architecture(80)
    assert current() == planned_for(80, 3, 227 << 10)
    use_architecture(100)  # no more than the device has
    assert current() == planned_for(90, 3, 227 << 10)
    use_architecture(0)
    assert current() == planned_for(90, 3, 227 << 10)


PROGRAM = """
import torch
from cnnops.backends import simt
simt.usable()
ask = simt.library.function("conv2d_plan")
print(ask("forward", 4, 64, 32, 32, 64, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0, torch.bfloat16, True, False, 0, 0, 0))
"""


def test_the_architecture_in_the_environment() -> None:
    done = python(PROGRAM, CNNOPS_CUDA_ARCH="80")
    assert done.stdout.strip() == planned_for(80, 3, 227 << 10)[0].split(": ", 1)[1], done.stderr
    for bad in ("sm_80", "", "-80"):
        done = python(PROGRAM, CNNOPS_CUDA_ARCH=bad)
        assert f"CNNOPS_CUDA_ARCH must be an architecture like 80, but is '{bad}'" in done.stderr


def test_explain_says_which_kernel() -> None:
    x, weight = torch.ones(1, 8, 6, 5), torch.ones(4, 8, 3, 3)
    with cnnops.use_backend("simt"):
        text = str(cnnops.explain(CF.conv2d, x, weight))
    assert len(LINE.findall(text)) == 3, text
    assert cnnops.explain(CF.conv2d, x, weight).decisions[0].plan == ()

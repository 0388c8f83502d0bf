"""The one list of shapes: the tests check every case, the benchmark times those of a named suite.

A case is a problem without dtype, memory layout or device: those are axes of their own, which `pairwise` combines.
Cases of the suite "corner" are small and awkward; the other suites hold the layers of real networks, at a batch that
suits a CPU (`with_batch` changes it).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

Pair = tuple[int, int]
T = TypeVar("T")

LAYOUTS = ("nchw", "channels_last")
"""Memory layouts that every case is run in."""

VIEWS = ("sliced", "expanded", "offset", "transposed", "channels_last_sliced")
"""Memory layouts that no kernel reads directly; `helpers.laid_out` makes them."""


def window_positions(size: int, kernel: int, stride: int, pad: int, dilation: int, ceil: bool = False) -> int:
    """How many windows fit, counted one by one from the definition; the code under test has the closed form."""
    reach = dilation * (kernel - 1) + 1
    count, start = 0, -pad
    while start + reach <= size + pad:
        count, start = count + 1, start + stride
    # ceil_mode adds one window that overhangs the right padding, if it starts within the input or its left padding.
    overhangs = start - stride + reach < size + pad if count else True
    return count + 1 if ceil and overhangs and start < size else count


@dataclass(frozen=True)
class Conv2dCase:
    """x [N, C, H, W] * weight [K, C / groups, R, S], with a bias [K] or none."""

    id: str
    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: Pair = (1, 1)
    padding: Pair | str = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = False
    suite: str = "corner"
    padding_mode: str = "zeros"

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.K, self.C // self.groups, self.R, self.S

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        filters = self.K if self.C else 0  # torch's answer to an input without channels
        if self.padding == "same":
            return self.N, filters, self.H, self.W
        pad_h, pad_w = (0, 0) if isinstance(self.padding, str) else self.padding
        return (
            self.N,
            filters,
            window_positions(self.H, self.R, self.stride[0], pad_h, self.dilation[0]),
            window_positions(self.W, self.S, self.stride[1], pad_w, self.dilation[1]),
        )

    @property
    def flops(self) -> int:
        """Multiplications and additions of one pass, padding counted."""
        N, K, P, Q = self.output_shape
        return 2 * N * K * P * Q * self.R * self.S * (self.C // self.groups)

    @property
    def depthwise(self) -> bool:
        return self.groups == self.C and self.groups > 1

    def with_batch(self, N: int) -> Conv2dCase:
        return replace(self, N=N)

    def arguments(self) -> dict[str, object]:
        """Keywords that F.conv2d takes beside the tensors, and the padding mode where it is nn.Conv2d's."""
        mode = {} if self.padding_mode == "zeros" else {"padding_mode": self.padding_mode}
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups} | mode

    def features(self) -> dict[str, Hashable]:
        """What makes cases differ for a kernel; `pairwise` covers each pair of these."""
        kernel = "1x1" if self.R == self.S == 1 else "square" if self.R == self.S else "oblong"
        padding = self.padding if isinstance(self.padding, str) else _pair_feature(self.padding, 0)
        groups = "dense" if self.groups == 1 else "depthwise" if self.depthwise else "grouped"
        empty = "batch" if not self.N else "channels" if not self.C else ""
        return {
            "kernel": kernel,
            "stride": _pair_feature(self.stride, 1),
            "padding": padding,
            "dilation": _pair_feature(self.dilation, 1),
            "groups": groups,
            "bias": self.bias,
            "channels": "few" if self.C < 8 else "full" if self.C % 8 == 0 else "ragged",
            "filters": "few" if self.K < 8 else "full" if self.K % 8 == 0 else "ragged",
            "empty": empty,
            "padding_mode": self.padding_mode,
        }


@dataclass(frozen=True)
class ConvTranspose2dCase:
    """x [N, C, H, W] * weight [C, K / groups, R, S], with a bias [K] or none, giving [N, K, P, Q]."""

    id: str
    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    output_padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = False
    suite: str = "corner"

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.C, self.K // self.groups, self.R, self.S

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """From the first tap of the first input to the last of the last, less what padding takes."""

        def side(i: int) -> int:
            last = ((self.H, self.W)[i] - 1) * self.stride[i] + ((self.R, self.S)[i] - 1) * self.dilation[i]
            return last + 1 - 2 * self.padding[i] + self.output_padding[i]

        return self.N, self.K, side(0), side(1)

    @property
    def flops(self) -> int:
        """Multiplications and additions of one pass, what padding takes counted."""
        return 2 * self.N * self.H * self.W * self.C * (self.K // self.groups) * self.R * self.S

    @property
    def depthwise(self) -> bool:
        return self.groups == self.C == self.K and self.groups > 1

    def with_batch(self, N: int) -> ConvTranspose2dCase:
        return replace(self, N=N)

    def arguments(self) -> dict[str, object]:
        """Keywords that F.conv_transpose2d takes beside the tensors."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "output_padding": self.output_padding,
            "groups": self.groups,
            "dilation": self.dilation,
        }

    def features(self) -> dict[str, Hashable]:
        """What makes cases differ for a kernel; `pairwise` covers each pair of these."""
        return {
            "kernel": "1x1" if self.R == self.S == 1 else "square" if self.R == self.S else "oblong",
            "stride": _pair_feature(self.stride, 1),
            "padding": _pair_feature(self.padding, 0),
            "output_padding": _pair_feature(self.output_padding, 0),
            "dilation": _pair_feature(self.dilation, 1),
            "groups": "dense" if self.groups == 1 else "depthwise" if self.depthwise else "grouped",
            "bias": self.bias,
            "channels": "few" if self.C < 8 else "full" if self.C % 8 == 0 else "ragged",
            "filters": "few" if self.K < 8 else "full" if self.K % 8 == 0 else "ragged",
            "empty": not self.N,
        }


@dataclass(frozen=True)
class Pool2dCase:
    """Windows over x [N, C, H, W]; op is max_pool2d, avg_pool2d, adaptive_avg_pool2d or adaptive_max_pool2d."""

    id: str
    op: str
    N: int
    C: int
    H: int
    W: int
    kernel: Pair = (0, 0)
    stride: Pair | None = None
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None
    output_size: tuple[int | None, int | None] | int | None = None
    suite: str = "corner"

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    @property
    def window(self) -> int:
        """Taps in the largest window."""
        if not self.adaptive:
            return self.kernel[0] * self.kernel[1]
        P, Q = self.output_size if isinstance(self.output_size, tuple) else (self.output_size, self.output_size)
        return (self.H // max(P or self.H, 1) + 2) * (self.W // max(Q or self.W, 1) + 2)

    def with_batch(self, N: int) -> Pool2dCase:
        return replace(self, N=N)

    @property
    def adaptive(self) -> bool:
        return self.op.startswith("adaptive")

    def arguments(self) -> dict[str, object]:
        """Keywords that the torch function of the same name takes beside the input."""
        if self.adaptive:
            return {"output_size": self.output_size}
        window: dict[str, object] = {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "ceil_mode": self.ceil_mode,
        }
        if self.op == "max_pool2d":
            return window | {"dilation": self.dilation}
        return window | {"count_include_pad": self.count_include_pad, "divisor_override": self.divisor_override}

    def features(self) -> dict[str, Hashable]:
        return {
            "op": self.op,
            "kernel": "square" if self.kernel[0] == self.kernel[1] else "oblong",
            "stride": _pair_feature(self.stride or self.kernel, 1),
            "padding": _pair_feature(self.padding, 0),
            "dilation": _pair_feature(self.dilation, 1),
            "ceil": self.ceil_mode,
            "channels": "few" if self.C < 8 else "full" if self.C % 8 == 0 else "ragged",
            "adaptive": self._adaptive_feature() if self.adaptive else "no",
        }

    def _adaptive_feature(self) -> str:
        """How the windows of an adaptive pool lie."""
        outputs = self.output_size if isinstance(self.output_size, tuple) else (self.output_size, self.output_size)
        sides = [(extent, extent if P is None else P) for extent, P in zip((self.H, self.W), outputs, strict=True)]
        if any(extent < P for extent, P in sides):
            return "overlapping"
        return "even" if all(P and extent % P == 0 for extent, P in sides) else "uneven"


@dataclass(frozen=True)
class Unpool2dCase:
    """x [N, C, H, W] and indices like it, to planes of the size that a window of `kernel` makes, or of `output_size`."""

    id: str
    N: int
    C: int
    H: int
    W: int
    kernel: Pair = (2, 2)
    stride: Pair | None = None
    padding: Pair = (0, 0)
    output_size: tuple[int, ...] | None = None
    suite: str = "corner"

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        if self.output_size is not None:
            P, Q = self.output_size[-2:]
        else:
            sides = zip((self.H, self.W), self.kernel, self.stride or self.kernel, self.padding, strict=True)
            P, Q = ((extent - 1) * step + size - 2 * pad for extent, size, step, pad in sides)
        return self.N, self.C, P, Q

    def with_batch(self, N: int) -> Unpool2dCase:
        return replace(self, N=N)

    def features(self) -> dict[str, Hashable]:
        return {
            "stride": _pair_feature(self.stride or self.kernel, 1),
            "padding": _pair_feature(self.padding, 0),
            "output_size": self.output_size and len(self.output_size),
            "channels": "few" if self.C < 8 else "full" if self.C % 8 == 0 else "ragged",
        }

    def arguments(self) -> dict[str, object]:
        """Keywords that F.max_unpool2d takes beside the tensors."""
        return {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "output_size": self.output_size,
        }


@dataclass(frozen=True)
class NormCase:
    """Batch norm of x [N, C, *spatial]."""

    id: str
    N: int
    C: int
    spatial: tuple[int, ...] = (1, 1)
    training: bool = True
    affine: bool = True
    tracked: bool = True
    """Whether running statistics are given."""
    momentum: float = 0.1
    eps: float = 1e-5
    mean: float = 0.0
    """Mean of the input in units of its standard deviation: large ones make naive variances cancel."""
    suite: str = "corner"

    @property
    def x_shape(self) -> tuple[int, ...]:
        return self.N, self.C, *self.spatial

    @property
    def count(self) -> int:
        """Values that share a channel's statistics."""
        count = self.N
        for extent in self.spatial:
            count *= extent
        return count

    def with_batch(self, N: int) -> NormCase:
        return replace(self, N=N)

    def features(self) -> dict[str, Hashable]:
        return {
            "training": self.training,
            "affine": self.affine,
            "tracked": self.tracked,
            "dimensions": len(self.spatial),
            "channels": "few" if self.C < 8 else "full" if self.C % 8 == 0 else "ragged",
            "offset": self.mean != 0,
        }


@dataclass(frozen=True)
class SqueezeExciteCase:
    """x [N, C, H, W] scaled by what M hidden channels make of its means."""

    id: str
    N: int
    C: int
    H: int
    W: int
    M: int
    suite: str = "corner"

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    def with_batch(self, N: int) -> SqueezeExciteCase:
        return replace(self, N=N)

    def features(self) -> dict[str, Hashable]:
        return {
            "channels": "few" if self.C < 8 else "full" if self.C % 8 == 0 else "ragged",
            "hidden": "few" if self.M < 8 else "full" if self.M % 8 == 0 else "ragged",
            "positions": "one" if self.H * self.W == 1 else "many",
        }


def _pair_feature(pair: Pair, neutral: int) -> str:
    if pair == (neutral, neutral):
        return "none"
    return "even" if pair[0] == pair[1] else "uneven"


def _conv(
    id: str,
    x: tuple[int, int, int, int],
    weight: tuple[int, int, int],
    stride: Pair = (1, 1),
    padding: Pair | str = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    bias: bool = False,
    suite: str = "corner",
) -> Conv2dCase:
    return Conv2dCase(id, *x, *weight, stride, padding, dilation, groups, bias, suite)


# x is (N, C, H, W); the filters are (K, R, S).
_CONV2D_CORNERS = (
    _conv("3x3", (2, 3, 7, 5), (4, 3, 3)),
    _conv("3x3-pad-bias", (2, 5, 7, 9), (6, 3, 3), padding=(1, 1), bias=True),
    _conv("3x3-full-tile", (1, 16, 8, 8), (32, 3, 3), padding=(1, 1), bias=True),
    _conv("3x3-beyond-tile", (1, 17, 9, 7), (33, 3, 3), padding=(1, 1)),
    _conv("3x3-below-tile", (3, 15, 5, 6), (31, 3, 3), padding=(1, 1), bias=True),
    _conv("3x3-s2", (2, 6, 9, 7), (10, 3, 3), stride=(2, 2), padding=(1, 1)),
    _conv("3x3-s2-even", (2, 8, 8, 8), (16, 3, 3), stride=(2, 2), padding=(1, 1), bias=True),
    _conv("3x3-s2-channels", (2, 16, 8, 8), (20, 3, 3), stride=(2, 2), padding=(1, 1), bias=True),
    _conv("3x3-s3-no-overlap", (1, 4, 10, 11), (5, 3, 3), stride=(3, 3)),
    _conv("3x3-wide-row", (1, 4, 3, 70), (9, 3, 3), padding=(1, 1)),
    _conv("3x3-tall-column", (1, 4, 70, 3), (9, 3, 3), padding=(1, 1), bias=True),
    _conv("3x3-one-row", (2, 8, 1, 13), (8, 3, 3), padding=(1, 1)),
    _conv("3x3-one-pixel", (2, 8, 1, 1), (8, 3, 3), padding=(1, 1), bias=True),
    _conv("3x3-many-channels", (1, 130, 3, 3), (7, 3, 3), padding=(1, 1)),
    _conv("3x3-many-filters", (1, 7, 4, 4), (130, 3, 3), padding=(1, 1)),
    _conv("1x1", (2, 7, 5, 6), (9, 1, 1)),
    _conv("1x1-full-tile", (2, 32, 8, 8), (64, 1, 1), bias=True),
    _conv("1x1-s2", (2, 8, 7, 9), (12, 1, 1), stride=(2, 2)),
    _conv("1x1-s2-uneven", (2, 12, 8, 7), (8, 1, 1), stride=(3, 2), bias=True),
    _conv("1x1-s2-channels", (1, 32, 6, 8), (16, 1, 1), stride=(2, 2)),
    _conv("1x1-padded", (1, 5, 4, 3), (6, 1, 1), padding=(1, 2), bias=True),
    _conv("1x1-one-pixel", (4, 10, 1, 1), (6, 1, 1), bias=True),
    _conv("1x1-one-channel", (3, 1, 4, 5), (1, 1, 1)),
    _conv("1x1-grouped", (2, 12, 5, 5), (18, 1, 1), groups=3, bias=True),
    _conv("5x5-pad2", (1, 3, 11, 9), (6, 5, 5), padding=(2, 2), bias=True),
    _conv("7x7-s2-stem", (1, 3, 19, 17), (16, 7, 7), stride=(2, 2), padding=(3, 3)),
    _conv("2x2-even-kernel", (2, 6, 6, 7), (8, 2, 2)),
    _conv("4x2-even-oblong", (1, 5, 9, 8), (7, 4, 2), stride=(2, 1), padding=(2, 0), bias=True),
    _conv("1x7", (2, 6, 5, 12), (8, 1, 7), padding=(0, 3)),
    _conv("7x1", (2, 6, 12, 5), (8, 7, 1), padding=(3, 0), bias=True),
    _conv("5x2-uneven-everything", (2, 6, 17, 13), (9, 5, 2), (3, 2), (4, 1), (2, 3), 3, True),
    _conv("3x4-uneven-everything", (3, 4, 13, 21), (6, 3, 4), (1, 4), (0, 2), (3, 1), 2),
    _conv("stride-exceeds-kernel", (2, 5, 14, 13), (6, 2, 3), stride=(4, 5), padding=(1, 0)),
    _conv("1x1-stride-exceeds-input", (2, 5, 3, 4), (6, 1, 1), stride=(5, 7)),
    _conv("3x3-d2", (1, 8, 11, 10), (8, 3, 3), padding=(2, 2), dilation=(2, 2), bias=True),
    _conv("3x3-d3-uneven", (2, 3, 13, 9), (5, 3, 3), padding=(1, 4), dilation=(3, 2)),
    _conv("3x3-s2-d2", (2, 4, 11, 12), (6, 3, 3), stride=(2, 2), padding=(2, 2), dilation=(2, 2)),
    _conv("3x3-s2-d3", (1, 4, 12, 11), (6, 3, 3), stride=(2, 2), padding=(3, 3), dilation=(3, 3), bias=True),
    _conv("3x3-s4-d2-shared-factor", (1, 3, 15, 14), (4, 3, 3), stride=(4, 4), padding=(1, 1), dilation=(2, 2)),
    _conv("kernel-fills-padded-input", (2, 3, 2, 1), (4, 4, 5), padding=(1, 2), bias=True),
    _conv("kernel-exceeds-input", (2, 3, 2, 3), (5, 5, 6), padding=(2, 3), bias=True),
    _conv("padding-exceeds-kernel", (1, 4, 3, 2), (6, 2, 2), padding=(3, 4)),
    _conv("padding-exceeds-kernel-s3", (1, 3, 4, 5), (5, 3, 2), (3, 2), (5, 3), bias=True),
    _conv("output-one-pixel", (3, 6, 5, 4), (8, 5, 4), bias=True),
    _conv("rows-unread", (1, 3, 8, 9), (4, 2, 2), stride=(3, 4)),
    _conv("one-channel", (2, 1, 6, 7), (3, 3, 3), padding=(1, 1)),
    _conv("one-filter", (2, 6, 6, 7), (1, 3, 3), padding=(1, 1), bias=True),
    _conv("grouped-2", (2, 8, 7, 6), (12, 3, 3), padding=(1, 1), groups=2),
    _conv("grouped-4-ragged", (1, 20, 6, 5), (12, 3, 3), padding=(1, 1), groups=4, bias=True),
    _conv("grouped-s2", (2, 6, 9, 8), (9, 3, 3), (2, 2), (1, 1), groups=3, bias=True),
    _conv("grouped-wide", (1, 48, 4, 5), (32, 3, 3), padding=(1, 1), groups=2),
    _conv("grouped-one-filter-each", (2, 12, 6, 5), (4, 3, 3), padding=(1, 1), groups=4, bias=True),
    _conv("depthwise-3x3", (2, 8, 9, 7), (8, 3, 3), padding=(1, 1), groups=8),
    _conv("depthwise-3x3-ragged", (1, 19, 6, 7), (19, 3, 3), padding=(1, 1), groups=19, bias=True),
    _conv("depthwise-3x3-wide", (1, 70, 5, 4), (70, 3, 3), padding=(1, 1), groups=70),
    _conv("depthwise-3x3-s2", (2, 16, 11, 10), (16, 3, 3), (2, 2), (1, 1), groups=16),
    _conv("depthwise-5x5-s2", (1, 9, 13, 12), (9, 5, 5), (2, 2), (2, 2), groups=9, bias=True),
    _conv("depthwise-7x7", (1, 6, 9, 8), (6, 7, 7), padding=(3, 3), groups=6),
    _conv("depthwise-3x3-d2", (1, 12, 9, 10), (12, 3, 3), padding=(2, 2), dilation=(2, 2), groups=12, bias=True),
    _conv("depthwise-3x5-uneven", (2, 5, 12, 11), (5, 3, 5), (1, 3), (2, 0), (2, 1), 5, True),
    _conv("depthwise-multiplier-2", (2, 6, 7, 8), (12, 3, 3), padding=(1, 1), groups=6),
    _conv("depthwise-multiplier-3-s2", (1, 5, 9, 7), (15, 3, 3), (2, 2), (1, 1), groups=5, bias=True),
    _conv("depthwise-1x1", (2, 10, 4, 5), (10, 1, 1), groups=10, bias=True),
    _conv("depthwise-3x3-beyond-tile", (2, 40, 5, 17), (40, 3, 3), padding=(1, 1), groups=40),
    _conv("depthwise-4x4-beyond-tile", (1, 18, 6, 30), (18, 4, 4), padding=(2, 1), groups=18, bias=True),
    _conv("depthwise-5x5-s2-beyond-tile", (2, 37, 7, 31), (37, 5, 5), (2, 2), (2, 2), groups=37),
    _conv("depthwise-7x7-s2-beyond-tile", (1, 18, 9, 33), (18, 7, 7), (2, 2), (3, 3), groups=18, bias=True),
    _conv("depthwise-3x9-more-taps-than-registers", (1, 17, 4, 12), (17, 3, 9), padding=(1, 4), groups=17),
    _conv("depthwise-3x3-d2-beyond-tile", (1, 33, 6, 20), (33, 3, 3), padding=(2, 2), dilation=(2, 2), groups=33),
    _conv("depthwise-5x5-map-below-filter", (3, 20, 2, 3), (20, 5, 5), padding=(2, 2), groups=20),
    _conv("depthwise-padding-exceeds-filter", (1, 18, 2, 3), (18, 3, 3), padding=(5, 6), groups=18, bias=True),
    _conv("depthwise-s5-exceeds-input", (2, 17, 3, 4), (17, 2, 2), (5, 5), (1, 1), groups=17),
    _conv("depthwise-multiplier-2-beyond-tile", (1, 21, 4, 16), (42, 3, 3), padding=(1, 1), groups=21, bias=True),
    _conv("depthwise-multiplier-3-s2-beyond-tile", (1, 19, 5, 30), (57, 5, 5), (2, 2), (2, 2), groups=19),
    _conv("depthwise-multiplier-4", (2, 16, 6, 7), (64, 3, 3), padding=(1, 1), groups=16),
    _conv("depthwise-multiplier-5-ragged", (2, 18, 5, 4), (90, 3, 3), padding=(1, 1), groups=18, bias=True),
    _conv("depthwise-7x7-large-tile", (2, 40, 19, 30), (40, 7, 7), padding=(3, 3), groups=40, bias=True),
    _conv("depthwise-9x9-ragged", (1, 18, 17, 20), (18, 9, 9), padding=(4, 4), groups=18, bias=True),
    _conv("depthwise-13x13", (1, 8, 18, 15), (8, 13, 13), padding=(6, 6), groups=8),
    _conv("depthwise-7x31", (1, 24, 8, 33), (24, 7, 31), padding=(3, 15), groups=24, bias=True),
    _conv("depthwise-31x25", (1, 5, 17, 14), (5, 31, 25), padding=(15, 12), groups=5),
    _conv("depthwise-8x10-padding-exceeds-filter", (2, 9, 4, 3), (9, 8, 10), padding=(9, 12), groups=9),
    _conv("depthwise-multiplier-9-few", (2, 3, 6, 5), (27, 2, 3), (2, 1), (1, 1), groups=3),
    _conv("depthwise-3x3-many-steps", (1, 40, 21, 35), (40, 3, 3), padding=(1, 1), groups=40, bias=True),
    _conv("depthwise-5x5-s2-uneven-padding", (1, 34, 22, 37), (34, 5, 5), (2, 2), (3, 0), groups=34),
    _conv("depthwise-7x7-many-steps", (1, 33, 19, 36), (33, 7, 7), padding=(3, 2), groups=33),
    _conv("depthwise-13x11-s2-d2", (1, 17, 27, 25), (17, 13, 11), (2, 1), (12, 10), (2, 2), 17, True),
    _conv("depthwise-31x31", (1, 5, 17, 20), (5, 31, 31), padding=(15, 15), groups=5),
    _conv("depthwise-9x9-multiplier-2", (1, 9, 12, 13), (18, 9, 9), padding=(4, 4), groups=9),
    _conv("same-3x3", (2, 4, 6, 7), (6, 3, 3), padding="same", bias=True),
    _conv("same-even-kernel", (2, 3, 6, 5), (4, 2, 4), padding="same"),
    _conv("same-even-kernel-dilated", (1, 3, 7, 8), (4, 4, 2), padding="same", dilation=(3, 2), bias=True),
    _conv("same-even-depthwise", (1, 6, 5, 6), (6, 2, 2), padding="same", groups=6),
    _conv("valid", (2, 4, 6, 7), (6, 3, 2), padding="valid", bias=True),
    _conv("empty-batch", (0, 3, 6, 5), (4, 3, 3), padding=(1, 1), bias=True),
    _conv("empty-batch-depthwise", (0, 6, 6, 5), (6, 3, 3), (2, 2), (1, 1), groups=6),
    _conv("empty-channels", (2, 0, 5, 4), (3, 3, 3), padding=(1, 1)),
)


def with_padding_mode(case: Conv2dCase, mode: str) -> Conv2dCase | None:
    """The case with padding of that mode, as much of it as the mode can do; None where none is left, or it fits no more."""
    most = {"reflect": -1, "replicate": 99, "circular": 0}[mode]
    reach = [d * (k - 1) for d, k in zip(case.dilation, (case.R, case.S), strict=True)]
    sizes = (case.H, case.W)
    if case.padding == "same":
        fits = all(-(-r // 2) <= size + most for r, size in zip(reach, sizes, strict=True))
        return replace(case, id=f"{mode}/{case.id}", padding_mode=mode) if fits else None
    wanted = (0, 0) if isinstance(case.padding, str) else case.padding
    pads = tuple(min(max(pad, 1), size + most) for pad, size in zip(wanted, sizes, strict=True))
    fits = all(size + 2 * pad > r for size, pad, r in zip(sizes, pads, reach, strict=True))
    if not fits or pads == (0, 0):
        return None
    return replace(case, id=f"{mode}/{case.id}", padding=(pads[0], pads[1]), padding_mode=mode)


PADDED: tuple[Conv2dCase, ...] = tuple(
    padded
    for mode in ("reflect", "replicate", "circular")
    for case in (
        *(case for case in _CONV2D_CORNERS if case.C),
        _conv("padded-as-far-as-it-goes", (2, 3, 4, 5), (4, 3, 2), padding=(3, 4), bias=True),
        _conv("padded-twice-over", (1, 9, 3, 4), (5, 3, 3), (1, 2), padding=(3, 4)),
        _conv("padded-depthwise-as-far-as-it-goes", (1, 9, 3, 4), (9, 3, 2), padding=(3, 4), groups=9),
    )
    if (padded := with_padding_mode(case, mode)) is not None
)
"""The corners of `CONV2D` in nn.Conv2d's other padding modes."""


def _suite(name: str, cases: Iterable[T]) -> tuple[T, ...]:
    return tuple(replace(case, id=f"{name}/{case.id}", suite=name) for case in cases)  # type: ignore[type-var,attr-defined]


def _transposed(
    id: str, x: tuple[int, int, int, int], filters: tuple[int, int, int], **rest: object
) -> ConvTranspose2dCase:
    return ConvTranspose2dCase(id, *x, *filters, **rest)  # type: ignore[arg-type]


# x is (N, C, H, W); the filters are (K, R, S).
CONV_TRANSPOSE2D: tuple[ConvTranspose2dCase, ...] = (
    _transposed("3x3", (2, 3, 7, 5), (4, 3, 3)),
    _transposed("3x3-pad-bias", (2, 5, 7, 9), (6, 3, 3), padding=(1, 1), bias=True),
    _transposed("3x3-full-tile", (1, 32, 6, 6), (16, 3, 3), padding=(1, 1), bias=True),
    _transposed("3x3-beyond-tile", (1, 33, 5, 7), (17, 3, 3), padding=(1, 1)),
    _transposed("3x3-many-filters", (1, 7, 4, 4), (130, 3, 3), padding=(1, 1), bias=True),
    _transposed("4x4-s2-pad", (2, 8, 5, 6), (16, 4, 4), stride=(2, 2), padding=(1, 1), bias=True),
    _transposed("2x2-s2", (2, 9, 5, 4), (6, 2, 2), stride=(2, 2), bias=True),
    _transposed("3x3-s2-more", (2, 6, 5, 4), (8, 3, 3), stride=(2, 2), padding=(1, 1), output_padding=(1, 1)),
    _transposed("3x3-s3-more", (1, 4, 4, 3), (5, 3, 3), stride=(3, 3), output_padding=(2, 1), bias=True),
    _transposed("3x3-to-3-channels", (1, 16, 9, 8), (3, 3, 3), padding=(1, 1), bias=True),
    _transposed("1x1", (2, 7, 5, 6), (9, 1, 1)),
    _transposed("1x1-s2-unreached", (2, 12, 4, 5), (8, 1, 1), stride=(3, 2), output_padding=(2, 0), bias=True),
    _transposed("stride-exceeds-kernel", (2, 5, 4, 3), (6, 2, 3), stride=(4, 5), padding=(1, 0), bias=True),
    _transposed("stride-exceeds-kernel-plain", (2, 5, 4, 3), (6, 2, 3), stride=(4, 5), output_padding=(3, 2)),
    _transposed(
        "5x2-uneven-everything",
        (2, 6, 5, 7),
        (9, 5, 2),
        stride=(3, 2),
        padding=(4, 1),
        output_padding=(1, 2),
        dilation=(2, 3),
        groups=3,
        bias=True,
    ),
    _transposed("3x3-d2", (1, 8, 7, 6), (8, 3, 3), padding=(2, 2), dilation=(2, 2), bias=True),
    _transposed("3x3-d3-more", (2, 3, 5, 4), (5, 3, 3), output_padding=(2, 1), dilation=(3, 2), bias=True),
    _transposed("3x3-s2-d3-more", (1, 4, 5, 4), (6, 3, 3), stride=(2, 2), output_padding=(2, 1), dilation=(3, 3)),
    _transposed("3x3-s4-d2", (1, 3, 4, 5), (4, 3, 3), stride=(4, 4), padding=(1, 1), dilation=(2, 2), bias=True),
    _transposed("one-row", (2, 8, 1, 13), (8, 3, 3), padding=(1, 1)),
    _transposed("one-pixel", (2, 8, 1, 1), (8, 3, 3), padding=(1, 1), bias=True),
    _transposed("one-pixel-grown", (3, 10, 1, 1), (6, 4, 5), bias=True),
    _transposed("one-channel", (2, 1, 6, 7), (3, 3, 3), padding=(1, 1)),
    _transposed("one-filter", (2, 6, 6, 7), (1, 3, 3), padding=(1, 1), bias=True),
    _transposed("padding-takes-inputs", (2, 3, 6, 5), (4, 2, 2), padding=(2, 1), bias=True),
    _transposed("grouped-2", (2, 8, 5, 6), (12, 3, 3), stride=(2, 2), padding=(1, 1), groups=2, bias=True),
    _transposed("grouped-4-ragged", (1, 12, 6, 5), (20, 3, 3), padding=(1, 1), groups=4),
    _transposed("grouped-one-filter-each", (2, 12, 6, 5), (4, 3, 3), padding=(1, 1), groups=4, bias=True),
    _transposed("grouped-one-channel-each", (2, 4, 6, 5), (12, 3, 3), padding=(1, 1), groups=4, bias=True),
    _transposed("depthwise-3x3", (2, 8, 5, 7), (8, 3, 3), padding=(1, 1), groups=8),
    _transposed("depthwise-3x3-ragged", (1, 19, 6, 5), (19, 3, 3), padding=(1, 1), groups=19, bias=True),
    _transposed(
        "depthwise-4x4-s2-more",
        (2, 9, 5, 4),
        (9, 4, 4),
        stride=(2, 2),
        padding=(1, 1),
        output_padding=(1, 0),
        groups=9,
        bias=True,
    ),
    _transposed("depthwise-7x9", (1, 18, 9, 8), (18, 7, 9), padding=(3, 4), groups=18, bias=True),
    _transposed("depthwise-2x2-s3-unreached", (2, 6, 3, 4), (6, 2, 2), stride=(3, 3), groups=6, bias=True),
    _transposed("depthwise-2-to-1-beyond-tile", (1, 42, 4, 16), (21, 3, 3), padding=(1, 1), groups=21, bias=True),
    _transposed("empty-batch", (0, 3, 6, 5), (4, 3, 3), stride=(2, 2), padding=(1, 1), bias=True),
    _transposed("empty-batch-depthwise", (0, 6, 6, 5), (6, 3, 3), groups=6),
    *_suite(
        "decoders",
        (
            _transposed("unet2x2-128to64@28-s2", (16, 128, 28, 28), (64, 2, 2), stride=(2, 2), bias=True),
            _transposed("dcgan4x4-256to128@8-s2", (64, 256, 8, 8), (128, 4, 4), stride=(2, 2), padding=(1, 1)),
            _transposed("dcgan4x4-64to3@32-s2", (64, 64, 32, 32), (3, 4, 4), stride=(2, 2), padding=(1, 1)),
            _transposed("3x3-64@32", (64, 64, 32, 32), (64, 3, 3), padding=(1, 1)),
        ),
    ),
)

# Every distinct convolution of the networks, named by their place in them.
_RESNET18_CIFAR = (
    _conv("stem-3to64@32", (64, 3, 32, 32), (64, 3, 3), padding=(1, 1)),
    _conv("3x3-64@32", (64, 64, 32, 32), (64, 3, 3), padding=(1, 1)),
    _conv("3x3-64to128@32-s2", (64, 64, 32, 32), (128, 3, 3), (2, 2), (1, 1)),
    _conv("1x1-64to128@32-s2", (64, 64, 32, 32), (128, 1, 1), (2, 2)),
    _conv("3x3-128@16", (64, 128, 16, 16), (128, 3, 3), padding=(1, 1)),
    _conv("3x3-128to256@16-s2", (64, 128, 16, 16), (256, 3, 3), (2, 2), (1, 1)),
    _conv("1x1-128to256@16-s2", (64, 128, 16, 16), (256, 1, 1), (2, 2)),
    _conv("3x3-256@8", (64, 256, 8, 8), (256, 3, 3), padding=(1, 1)),
    _conv("3x3-256to512@8-s2", (64, 256, 8, 8), (512, 3, 3), (2, 2), (1, 1)),
    _conv("1x1-256to512@8-s2", (64, 256, 8, 8), (512, 1, 1), (2, 2)),
    _conv("3x3-512@4", (64, 512, 4, 4), (512, 3, 3), padding=(1, 1)),
)
_RESNET18 = (
    _conv("stem-7x7-3to64@224-s2", (32, 3, 224, 224), (64, 7, 7), (2, 2), (3, 3)),
    _conv("3x3-64@56", (32, 64, 56, 56), (64, 3, 3), padding=(1, 1)),
    _conv("3x3-64to128@56-s2", (32, 64, 56, 56), (128, 3, 3), (2, 2), (1, 1)),
    _conv("1x1-64to128@56-s2", (32, 64, 56, 56), (128, 1, 1), (2, 2)),
    _conv("3x3-128@28", (32, 128, 28, 28), (128, 3, 3), padding=(1, 1)),
    _conv("3x3-128to256@28-s2", (32, 128, 28, 28), (256, 3, 3), (2, 2), (1, 1)),
    _conv("1x1-128to256@28-s2", (32, 128, 28, 28), (256, 1, 1), (2, 2)),
    _conv("3x3-256@14", (32, 256, 14, 14), (256, 3, 3), padding=(1, 1)),
    _conv("3x3-256to512@14-s2", (32, 256, 14, 14), (512, 3, 3), (2, 2), (1, 1)),
    _conv("1x1-256to512@14-s2", (32, 256, 14, 14), (512, 1, 1), (2, 2)),
    _conv("3x3-512@7", (32, 512, 7, 7), (512, 3, 3), padding=(1, 1)),
)
_RESNET50 = (
    _conv("1x1-64to256@56", (32, 64, 56, 56), (256, 1, 1)),
    _conv("1x1-256to64@56", (32, 256, 56, 56), (64, 1, 1)),
    _conv("1x1-256to512@56-s2", (32, 256, 56, 56), (512, 1, 1), (2, 2)),
    _conv("1x1-128to512@28", (32, 128, 28, 28), (512, 1, 1)),
    _conv("1x1-512to128@28", (32, 512, 28, 28), (128, 1, 1)),
    _conv("1x1-256to1024@14", (32, 256, 14, 14), (1024, 1, 1)),
    _conv("1x1-1024to256@14", (32, 1024, 14, 14), (256, 1, 1)),
    _conv("1x1-512to2048@7", (32, 512, 7, 7), (2048, 1, 1)),
    _conv("1x1-2048to512@7", (32, 2048, 7, 7), (512, 1, 1)),
)
_MBCONV = (
    _conv("dw3x3-32@112", (32, 32, 112, 112), (32, 3, 3), padding=(1, 1), groups=32),
    _conv("dw3x3-96@112-s2", (32, 96, 112, 112), (96, 3, 3), (2, 2), (1, 1), groups=96),
    _conv("dw3x3-144@56", (32, 144, 56, 56), (144, 3, 3), padding=(1, 1), groups=144),
    _conv("dw5x5-144@56-s2", (32, 144, 56, 56), (144, 5, 5), (2, 2), (2, 2), groups=144),
    _conv("dw3x3-192@28", (32, 192, 28, 28), (192, 3, 3), padding=(1, 1), groups=192),
    _conv("dw5x5-240@28", (32, 240, 28, 28), (240, 5, 5), padding=(2, 2), groups=240),
    _conv("dw3x3-384@14", (32, 384, 14, 14), (384, 3, 3), padding=(1, 1), groups=384),
    _conv("dw5x5-672@14", (32, 672, 14, 14), (672, 5, 5), padding=(2, 2), groups=672),
    _conv("dw3x3-960@7", (32, 960, 7, 7), (960, 3, 3), padding=(1, 1), groups=960),
    _conv("dw5x5-1152@7", (32, 1152, 7, 7), (1152, 5, 5), padding=(2, 2), groups=1152),
)


CONV2D: tuple[Conv2dCase, ...] = (
    *_CONV2D_CORNERS,
    *_suite("resnet18_cifar", _RESNET18_CIFAR),
    *_suite("resnet18", _RESNET18),
    *_suite("resnet50", _RESNET50),
    *_suite("mbconv", _MBCONV),
)


def _max(id: str, x: tuple[int, int, int, int], kernel: Pair, stride: Pair | None = None, **rest: object) -> Pool2dCase:
    return Pool2dCase(id, "max_pool2d", *x, kernel, stride, **rest)  # type: ignore[arg-type]


def _avg(id: str, x: tuple[int, int, int, int], kernel: Pair, stride: Pair | None = None, **rest: object) -> Pool2dCase:
    return Pool2dCase(id, "avg_pool2d", *x, kernel, stride, **rest)  # type: ignore[arg-type]


def _adaptive(
    id: str, x: tuple[int, int, int, int], output: tuple[int | None, int | None] | int, **rest: object
) -> Pool2dCase:
    return Pool2dCase(id, "adaptive_avg_pool2d", *x, output_size=output, **rest)  # type: ignore[arg-type]


# No case has a window without a tap inside the input (ceil_mode with dilation): torch writes out of bounds there.
_MAX_CORNERS = (
    _max("2x2", (2, 3, 6, 8), (2, 2)),
    _max("2x2-odd", (2, 5, 7, 5), (2, 2)),
    _max("2x2-odd-ceil", (2, 5, 7, 5), (2, 2), ceil_mode=True),
    _max("3x3-s2-pad", (2, 16, 9, 11), (3, 3), (2, 2), padding=(1, 1)),
    _max("3x3-s1-overlap", (1, 17, 6, 5), (3, 3), (1, 1), padding=(1, 1)),
    _max("3x3-s2-ceil-pad", (2, 6, 6, 7), (3, 3), (2, 2), padding=(1, 1), ceil_mode=True),
    _max("stride-exceeds-kernel", (2, 4, 11, 9), (2, 3), (4, 5)),
    _max("3x2-uneven", (2, 7, 10, 9), (3, 2), (1, 3), padding=(1, 0)),
    _max("2x5-uneven-ceil", (1, 33, 7, 12), (2, 5), (3, 2), padding=(1, 2), ceil_mode=True),
    _max("3x3-d2", (1, 4, 9, 10), (3, 3), (1, 1), padding=(1, 1), dilation=(2, 2)),
    _max("2x3-d3-uneven", (2, 5, 11, 12), (2, 3), (2, 1), padding=(1, 1), dilation=(3, 2)),
    _max("3x3-d2-ceil", (1, 3, 10, 9), (3, 3), (2, 2), dilation=(2, 2), ceil_mode=True),
    _max("ceil-last-window-in-padding", (1, 1, 5, 5), (2, 2), (3, 3), padding=(1, 1), ceil_mode=True),
    _max("ceil-kernel-exceeds-input", (2, 3, 2, 2), (3, 3), ceil_mode=True),
    _max("kernel-is-input", (2, 9, 5, 4), (5, 4)),
    _max("one-pixel", (3, 8, 1, 1), (1, 1)),
    _max("one-channel", (2, 1, 6, 5), (3, 3), (2, 2), padding=(1, 1)),
    _max("window-beyond-256-taps", (1, 3, 20, 19), (17, 16), (2, 3), padding=(4, 8)),
    _max("many-channels", (1, 67, 5, 5), (2, 2), (1, 2)),
    _max("empty-batch", (0, 3, 6, 5), (2, 2)),
)
_AVG_CORNERS = (
    _avg("2x2", (2, 3, 6, 8), (2, 2)),
    _avg("2x2-odd", (2, 5, 7, 5), (2, 2)),
    _avg("2x2-odd-ceil", (2, 5, 7, 5), (2, 2), ceil_mode=True),
    _avg("3x3-s2-pad", (2, 16, 9, 11), (3, 3), (2, 2), padding=(1, 1)),
    _avg("3x3-s2-pad-excluded", (2, 17, 9, 11), (3, 3), (2, 2), padding=(1, 1), count_include_pad=False),
    _avg("3x3-ceil-pad", (1, 6, 6, 7), (3, 3), (2, 2), padding=(1, 1), ceil_mode=True),
    _avg(
        "3x3-ceil-pad-excluded", (1, 6, 6, 7), (3, 3), (2, 2), padding=(1, 1), ceil_mode=True, count_include_pad=False
    ),
    _avg("3x2-uneven", (2, 7, 10, 9), (3, 2), (1, 3), padding=(1, 0)),
    _avg(
        "2x5-uneven-ceil-excluded",
        (1, 33, 7, 12),
        (2, 5),
        (3, 2),
        padding=(1, 2),
        ceil_mode=True,
        count_include_pad=False,
    ),
    _avg("stride-exceeds-kernel", (2, 4, 11, 9), (2, 3), (4, 5)),
    _avg("divisor", (2, 4, 6, 7), (3, 2), (2, 2), padding=(1, 1), divisor_override=5),
    _avg("divisor-ceil", (2, 4, 7, 7), (2, 2), ceil_mode=True, divisor_override=3),
    _avg("divisor-negative", (2, 3, 5, 5), (2, 2), divisor_override=-2),
    _avg("ceil-last-window-in-padding", (1, 1, 5, 5), (2, 2), (3, 3), padding=(1, 1), ceil_mode=True),
    _avg("kernel-is-input", (2, 9, 5, 4), (5, 4)),
    _avg("one-pixel", (3, 8, 1, 1), (1, 1)),
    _avg("many-channels", (1, 67, 5, 5), (2, 2), (1, 2)),
    _avg("empty-batch", (0, 3, 6, 5), (2, 2)),
)
_ADAPTIVE_CORNERS = (
    _adaptive("global", (2, 10, 7, 5), 1),
    _adaptive("even", (2, 16, 8, 6), (4, 3)),
    _adaptive("uneven-windows", (2, 5, 7, 10), (3, 4)),
    _adaptive("output-exceeds-input", (2, 3, 3, 2), (5, 7)),
    _adaptive("output-is-input", (1, 4, 5, 6), (5, 6)),
    _adaptive("one-extent-kept", (1, 6, 7, 9), (None, 2)),
    _adaptive("ragged-channels", (1, 35, 11, 13), (4, 6)),
    _adaptive("one-pixel", (3, 8, 1, 1), (1, 1)),
    _adaptive("empty-output", (2, 3, 4, 5), (0, 0)),
    _adaptive("empty-batch", (0, 3, 6, 5), (2, 2)),
    _adaptive("empty-channels", (2, 0, 6, 5), (2, 2)),
)
# torch takes no image without channels to its maxima.
_ADAPTIVE_MAX_CORNERS = tuple(
    replace(case, op="adaptive_max_pool2d") for case in _ADAPTIVE_CORNERS if case.id != "empty-channels"
)
_RESNET_POOLS = (
    _max("max3x3-64@112-s2", (32, 64, 112, 112), (3, 3), (2, 2), padding=(1, 1)),
    _adaptive("global-512@7", (32, 512, 7, 7), 1),
    _adaptive("global-2048@7", (32, 2048, 7, 7), 1),
)
_CNN_POOLS = (
    Pool2dCase("adaptive-max-512@7", "adaptive_max_pool2d", 32, 512, 7, 7, output_size=1),
    _max("max2x2-32@32", (64, 32, 32, 32), (2, 2)),
    _max("max2x2-64@16", (64, 64, 16, 16), (2, 2)),
    _avg("avg4x4-512@4", (64, 512, 4, 4), (4, 4)),
    _avg("avg2x2-128@28", (32, 128, 28, 28), (2, 2)),
    _avg("avg3x3-192@28-s1", (32, 192, 28, 28), (3, 3), (1, 1), padding=(1, 1)),
)

POOL2D: tuple[Pool2dCase, ...] = (
    *tuple(
        replace(case, id=f"{case.op.removesuffix('_pool2d')}/{case.id}")
        for case in (*_MAX_CORNERS, *_AVG_CORNERS, *_ADAPTIVE_CORNERS, *_ADAPTIVE_MAX_CORNERS)
    ),
    *_suite("resnet", _RESNET_POOLS),
    *_suite("pools", _CNN_POOLS),
)

UNPOOL2D: tuple[Unpool2dCase, ...] = (
    Unpool2dCase("2x2", 2, 3, 3, 4),
    Unpool2dCase("2x2-full-tile", 2, 64, 4, 4),
    Unpool2dCase("2x2-beyond-tile", 1, 67, 3, 2),
    Unpool2dCase("3x2-uneven", 2, 5, 4, 3, (3, 2), (2, 1), (1, 0)),
    Unpool2dCase("planes-smaller-than-input", 2, 4, 5, 6, (1, 1), (1, 1), (1, 2)),
    Unpool2dCase("output-size", 2, 6, 3, 4, output_size=(7, 7)),
    Unpool2dCase("output-size-whole", 1, 9, 3, 4, (3, 3), (2, 2), (1, 1), (1, 9, 6, 8)),
    Unpool2dCase("stride-exceeds-kernel", 2, 3, 3, 2, (2, 3), (4, 5)),
    Unpool2dCase("one-pixel", 3, 8, 1, 1),
    Unpool2dCase("one-channel", 2, 1, 4, 3),
    Unpool2dCase("empty-batch", 0, 3, 3, 2),
    Unpool2dCase("empty-output", 2, 3, 1, 1, padding=(1, 1)),
    *_suite("segnet", (Unpool2dCase("2x2-64@56", 16, 64, 56, 56), Unpool2dCase("2x2-256@14", 16, 256, 14, 14))),
)

NORM: tuple[NormCase, ...] = (
    NormCase("train", 4, 6, (5, 7)),
    NormCase("train-full-tile", 2, 32, (8, 8)),
    NormCase("train-ragged", 3, 37, (5, 3)),
    NormCase("train-one-channel", 3, 1, (6, 5)),
    NormCase("train-two-values", 2, 5, (1, 1)),
    NormCase("train-one-image", 1, 9, (3, 4)),
    NormCase("train-2-d", 6, 11, ()),
    NormCase("train-3-d", 4, 7, (9,)),
    NormCase("train-5-d", 2, 3, (2, 3, 4)),
    NormCase("train-far-mean", 4, 8, (9, 9), mean=100.0),
    NormCase("train-no-affine", 3, 6, (4, 5), affine=False),
    NormCase("train-untracked", 3, 6, (4, 5), tracked=False),
    NormCase("train-bare", 3, 10, (4, 5), affine=False, tracked=False),
    NormCase("train-momentum-1", 3, 4, (4, 4), momentum=1.0),
    NormCase("train-momentum-0", 3, 4, (4, 4), momentum=0.0),
    NormCase("train-large-eps", 3, 4, (4, 4), eps=0.5),
    NormCase("train-long", 2, 3, (61, 67)),
    NormCase("train-empty-batch", 0, 3, (2, 2)),
    NormCase("train-empty-channels", 2, 0, (2, 2), affine=False, tracked=False),
    NormCase("eval", 4, 6, (5, 7), training=False),
    NormCase("eval-ragged", 3, 37, (5, 3), training=False),
    NormCase("eval-one-value", 1, 5, (1, 1), training=False),
    NormCase("eval-2-d", 6, 11, (), training=False),
    NormCase("eval-no-affine", 3, 6, (4, 5), training=False, affine=False),
    NormCase("eval-eps-0", 3, 6, (4, 5), training=False, eps=0.0),
    NormCase("eval-far-mean", 4, 8, (9, 9), training=False, mean=100.0),
    NormCase("eval-empty-batch", 0, 3, (2, 2), training=False),
    *_suite(
        "resnet18_cifar",
        (
            NormCase("64@32", 64, 64, (32, 32)),
            NormCase("128@16", 64, 128, (16, 16)),
            NormCase("256@8", 64, 256, (8, 8)),
            NormCase("512@4", 64, 512, (4, 4)),
        ),
    ),
    *_suite(
        "resnet50",
        (
            NormCase("64@112", 32, 64, (112, 112)),
            NormCase("256@56", 32, 256, (56, 56)),
            NormCase("512@28", 32, 512, (28, 28)),
            NormCase("1024@14", 32, 1024, (14, 14)),
            NormCase("2048@7", 32, 2048, (7, 7)),
        ),
    ),
)

SQUEEZE_EXCITE: tuple[SqueezeExciteCase, ...] = (
    SqueezeExciteCase("ragged", 2, 6, 5, 7, 3),
    SqueezeExciteCase("full-tile", 3, 32, 8, 8, 16),
    SqueezeExciteCase("one-position", 3, 17, 1, 1, 5),
    SqueezeExciteCase("one-channel", 2, 1, 6, 5, 4),
    SqueezeExciteCase("one-hidden", 2, 9, 4, 3, 1),
    SqueezeExciteCase("many-images", 19, 37, 6, 5, 9),
    SqueezeExciteCase("many-images-large-weights", 18, 21, 2, 3, 40),
    SqueezeExciteCase("beyond-tile", 2, 530, 3, 4, 11),
    SqueezeExciteCase("long", 1, 5, 131, 127, 3),
    SqueezeExciteCase("empty-batch", 0, 6, 5, 4, 3),
    *_suite(
        "se_resnet",
        (
            SqueezeExciteCase("256@56", 16, 256, 56, 56, 16),
            SqueezeExciteCase("512@28", 16, 512, 28, 28, 32),
            SqueezeExciteCase("1024@14", 16, 1024, 14, 14, 64),
            SqueezeExciteCase("2048@7", 16, 2048, 7, 7, 128),
        ),
    ),
)

Case = TypeVar("Case", Conv2dCase, Pool2dCase, NormCase, SqueezeExciteCase)


def of_suite(cases: Iterable[Case], *suites: str) -> tuple[Case, ...]:
    """The cases of the named suites, in their order."""
    return tuple(case for case in cases if case.suite in suites)


def networks(cases: Iterable[Case]) -> tuple[Case, ...]:
    """The layers of real networks: everything but the corners."""
    return tuple(case for case in cases if case.suite != "corner")


def find(cases: Iterable[Case], id: str) -> Case:
    """The case of that id. Raises KeyError."""
    for case in cases:
        if case.id == id:
            return case
    raise KeyError(id)


def pairwise(items: Sequence[T], features: Callable[[T], Mapping[str, Hashable]]) -> list[T]:
    """A small subset in which every pair of feature values that occurs among `items` occurs again.

    Greedy: the item that adds the most new pairs comes next, the earliest among equals; so the subset is the same in
    every run. Returned in the order of `items`.
    """
    pairs = [set(itertools.combinations(sorted(features(item).items(), key=lambda f: f[0]), 2)) for item in items]
    missing: set[object] = set().union(*pairs)
    chosen: list[int] = []
    while missing:
        best = max(range(len(items)), key=lambda i: (len(pairs[i] & missing), -i))
        chosen.append(best)
        missing -= pairs[best]
    return [items[i] for i in sorted(chosen)]

"""A whole network beside its twin on torch.nn: one training step and one inference."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnnops.bench.report import duration, plain
from cnnops.bench.timing import Comparison, compare
from cnnops.bench.verify import Mismatch, tensors

OURS, PEER = "cnnops", "torch"

# Both networks sum in different orders, and Winograd's rms error is at most 3 times a direct convolution's (DESIGN.md),
# so ours may be this many times as far from float64 as the peer, in the 2-norm of each tensor.
_FACTOR = 3.0


@dataclass(frozen=True)
class ModelComparison:
    """One training step and one inference of two networks with the same weights, on `images` images."""

    train: Comparison
    inference: Comparison
    images: int

    def table(self) -> str:
        """Time, images/s and the ratio, a loss marked."""
        rows = []
        for name, comparison in (("training step", self.train), ("inference", self.inference)):
            ours, peer = comparison.time(OURS), comparison.time(PEER)
            ratio = comparison.ratio(OURS, PEER)
            rows.append((
                name,
                duration(ours.median * 1e6),
                duration(peer.median * 1e6),
                f"{self.images / ours.median:.0f}",
                f"{self.images / peer.median:.0f}",
                f"{ratio.median:.2f}x ({ratio.q1:.2f}..{ratio.q3:.2f}){' LOSS' if ratio.median < 1 else ''}",
            ))  # fmt: skip
        text = plain((f"{self.images} images", OURS, PEER, f"{OURS} img/s", f"{PEER} img/s", "ratio"), rows)
        rounds = len(self.train.seconds[OURS])
        return f"{text}\n{self.train.threads} threads, {rounds} rounds, both verified, channels_last"


def _step(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], list[Tensor]]:
    """A training step that leaves the weights where they are (lr 0), so that every step of either side is the same."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=5e-4)

    def step() -> list[Tensor]:
        torch.manual_seed(0)  # dropout must drop the same units on both sides
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return [loss.detach(), *(p.grad for p in parameters if p.grad is not None)]

    return step


def _inference(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        model.eval()
        with torch.inference_mode():
            return model(x)

    return run


def _nearly(reference: list[Tensor]) -> Callable[[Mapping[str, object]], None]:
    """A `verify`: ours is about as close to the float64 `reference` as the peer is, tensor by tensor."""

    def verify(results: Mapping[str, object]) -> None:
        ours, peer = tensors(results[OURS]), tensors(results[PEER])
        if [t.shape for t in ours] != [t.shape for t in reference]:
            raise Mismatch(
                f"{OURS}: expected {len(reference)} tensors of the peer's shapes, but got {len(ours)} others"
            )
        errors = [
            [float((t.double() - e).norm()) for t, e in zip(side, reference, strict=True)] for side in (ours, peer)
        ]
        norms = [float(e.norm()) for e in reference]
        # A tensor on which the peer is right by luck, or whose true value is zero, is held to the peer's overall error.
        overall = math.hypot(*errors[1]) / math.hypot(*norms)
        eps = torch.finfo(peer[0].dtype).eps
        for i, (error, theirs, norm) in enumerate(zip(*errors, norms, strict=True)):
            allowed = _FACTOR * max(theirs, overall * norm) + eps * math.hypot(*norms)
            if not error <= allowed:
                raise Mismatch(
                    f"{OURS}: tensor {i} of {list(reference[i].shape)} is {error:.3g} from float64 in the 2-norm, "
                    f"expected at most {allowed:.3g}"
                )

    return verify


def compare_models(
    ours: nn.Module,
    peer: nn.Module,
    batch: tuple[Tensor, Tensor],
    *,
    rounds: int | None = None,
    budget_s: float = 10.0,
    threads: int | None = None,
) -> ModelComparison:
    """Time one training step (SGD with momentum on the cross entropy) and one inference of two equal networks.

    ours, peer: classifiers with the same state_dict keys and shapes; both are copied, get `ours`' weights and run
        channels_last, so the caller's stay as they are.
    batch: images [N, C, H, W] and class numbers [N], on the networks' device.
    rounds, budget_s, threads: as for `timing.compare`, for each of the two comparisons.
    The losses and gradients, then the class scores, are verified against the peer in float64 before anything is timed.
    Raises Mismatch if they disagree, RuntimeError if the state dicts differ.
    """
    x, target = batch
    x = x.contiguous(memory_format=torch.channels_last)
    twins = {OURS: copy.deepcopy(ours), PEER: copy.deepcopy(peer)}
    twins[PEER].load_state_dict(ours.state_dict())
    for model in twins.values():
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    exact = copy.deepcopy(twins[PEER]).double()

    def timed(calls: dict[str, Callable[[], object]], reference: list[Tensor]) -> Comparison:
        return compare(
            calls,
            verify=_nearly(reference),
            rounds=rounds,
            budget_s=budget_s,
            threads=threads,
            device=x.device,
            warmup=0,  # the verified call has warmed up
        )

    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        # Inference first: a training step moves the running statistics.
        scores = tensors(_inference(exact, x.double())())
        inference = timed({name: _inference(model, x) for name, model in twins.items()}, scores)
        gradients = _step(exact, x.double(), target)()
        train = timed({name: _step(model, x, target) for name, model in twins.items()}, gradients)
    return ModelComparison(train, inference, len(x))

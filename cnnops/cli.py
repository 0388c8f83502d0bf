"""The command line. Each sub-command is one function: it takes the parsed options and returns the exit status.

Exit status 0: done; 1: the demo's networks disagree; 2: a bad argument, a missing data set or package, a checkpoint or a
folder that cannot be used; 128 + n: ended by signal n. Errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args, get_type_hints

if TYPE_CHECKING:
    from torch import Tensor

    from cnnops.train import Trainer

Command = Callable[[argparse.Namespace], int]
Built = TypeVar("Built")

USAGE_ERROR = 2


class UsageError(Exception):
    """The command cannot be carried out as given; the message is one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"cnnops: error: {message} (see {self.prog} --help)\n")


def _add_command(commands: Any, name: str, command: Command, summary: str, details: str = "") -> _Parser:
    """Make a sub-command: `summary` for the list of commands, `details` for its own --help."""
    description = f"{summary[0].upper()}{summary[1:]}. {details}".strip()
    parser: _Parser = commands.add_parser(name, help=summary, description=description)
    parser.set_defaults(command=command)
    return parser


def _add_config_options(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """One option for each field of a config dataclass. What is not given is absent from the namespace."""
    types = get_type_hints(config)
    for f in fields(config):
        kind = next(iter(get_args(types[f.name])), types[f.name])  # of X | None, X
        value: dict[str, Any] = {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument(
            "--" + f.name.replace("_", "-"),
            **({"action": argparse.BooleanOptionalAction} if kind is bool else value),
            default=argparse.SUPPRESS,
            help=f"{f.metadata['help']} (default: {f.metadata['shown']})",
        )


def _given(options: argparse.Namespace, config: type[Any]) -> dict[str, Any]:
    """The options of the config dataclass that were given."""
    return {f.name: getattr(options, f.name) for f in fields(config) if hasattr(options, f.name)}


def _new_folder(out: Path | None, name: str) -> Path:
    """The run folder: `out`, which must be new or empty, or one in runs/ with the time in its name."""
    folder = out or Path("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder; choose another --out, or --resume a run")
    return folder


def _need_packages() -> None:
    """The packages of the extra `train`, before work is done that would be lost without them."""
    for package in ("rich", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"the package {package} is missing; run: pip install {package}")


def _checked(build: Callable[..., Built], *arguments: Any, **options: Any) -> Built:
    """`build(...)`; the ValueError of a bad option becomes a UsageError."""
    try:
        return build(*arguments, **options)
    except ValueError as error:
        raise UsageError(str(error)) from error


def train(options: argparse.Namespace) -> int:
    _need_packages()
    from cnnops.train import TrainConfig, Trainer
    from cnnops.train.console import ConsoleReporter

    given = _given(options, TrainConfig)
    if options.resume is None:
        config = _checked(TrainConfig, **given)
        folder = _new_folder(options.out, f"{config.model}-{config.data}")
        trainer = _checked(Trainer, config, folder, ConsoleReporter())
    else:
        changes = {name: given.pop(name) for name in ("device", "data_dir") if name in given}
        others = [f"--{name.replace('_', '-')}" for name in given] + ["--out"] * bool(options.out)
        if others:
            raise UsageError(
                f"--resume takes every option but --device and --data-dir from the checkpoint; leave out {others[0]}"
            )
        trainer = _checked(Trainer.resume, options.resume, ConsoleReporter(), **changes)
    trainer.fit()
    _print_result(trainer)
    return 0


def demo(options: argparse.Namespace) -> int:
    _need_packages()
    from cnnops.bench.verify import Mismatch
    from cnnops.train import TrainConfig, Trainer
    from cnnops.train.console import ConsoleReporter

    config = _checked(TrainConfig, epochs=options.epochs, device=options.device)
    if config.torch_device().type == "cpu":
        config = replace(config, width=0.5)
    trainer = Trainer(config, _new_folder(options.out, "demo"), ConsoleReporter())
    trainer.fit()
    print(f"\nthe same network beside torch.nn, one batch of {config.batch_size}:")
    try:
        print(_beside_torch(trainer))
    except Mismatch as mismatch:
        _print_result(trainer)
        return _failed(f"not timed, because the networks disagree: {mismatch}", 1)
    _print_result(trainer)
    return 0


def _beside_torch(trainer: Trainer) -> str:
    """A table: one training step and one inference of the trained network, and of its twin on torch.nn."""
    from cnnops import models
    from cnnops.bench.models import compare_models

    config, dataset = trainer.config, trainer.dataset
    peer = models.create_model(
        config.model, len(dataset.classes), dataset.channels, config.stem, config.width, layers=models.torch_layers
    ).to(trainer.device)
    batch = next(trainer.batches.train(epoch=0))
    return compare_models(trainer.model, peer, batch, rounds=7).table()


def _print_result(trainer: Trainer) -> None:
    print(f"\ncurves.png, filters.png, samples.png, metrics.jsonl, best.pt and last.pt are in {trainer.folder}")
    print(f"test accuracy {100 * trainer.history[-1].test_accuracy:.2f} %")


def info(options: argparse.Namespace) -> int:
    import cnnops

    found = cnnops.info()
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    device = found["cuda_device"] or "no CUDA device"
    print(f"cnnops {found['cnnops']}, torch {found['torch']}, Python {found['python']}")
    print(f"{found['cpu_threads']} CPU threads, {device}\n")
    for name, backend in found["backends"].items():
        state = "usable" if backend["usable"] else "not usable"
        note = f" ({backend['note']})" if "note" in backend else ""
        print(f"{name:8s}{state:12s}{' and '.join(backend['devices'])} tensors{note}")
        if "why_not" in backend:
            print(f"{'':8s}{backend['why_not']}")
        if "library" in backend:
            print(f"{'':8s}library: {backend['library']}")
        for key, value in backend.get("built", {}).items():
            if key == "kernels":
                value = f"{len(value)} (--json lists them)"
            if value and key not in ("backend", "flags", "sources"):
                print(f"{'':8s}{key}: {', '.join(value) if isinstance(value, list) else value}")
    _print_table(found["backends"]["cuda"])
    return 0


def _print_table(cuda: dict[str, Any]) -> None:
    """What each CUDA kernel takes of a multiprocessor, where that library is built."""
    from cnnops import resources
    from cnnops.bench.report import plain

    if "table" in cuda:
        rows = [resources.cells(resources.Row(**row)) for row in cuda["table"]]
        print("\nCUDA kernels; on a device of this compute capability, blocks on a multiprocessor (occupancy):")
        print(plain(resources.HEADINGS, rows))
    elif "why_no_table" in cuda:
        print(f"\nno table of the CUDA kernels: {cuda['why_no_table']}")


def explain(options: argparse.Namespace) -> int:
    import torch

    import cnnops
    from cnnops import functional as CF

    arguments = {name: value for name, value in vars(options).items() if name in _ARGUMENTS and value is not None}
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    try:
        x = torch.empty(options.input, dtype=getattr(torch, options.dtype), device=options.device)
        x = x.contiguous(memory_format=layout) if len(options.input) == 4 else x
        arguments |= _operands(options.op, x, options.weight, options.training)
        with cnnops.use_backend(options.backend) if options.backend else contextlib.nullcontext():
            print(cnnops.explain(getattr(CF, options.op), x, **arguments))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # the last: a torch without CUDA
        raise UsageError(str(error).splitlines()[0]) from error
    return 0


def tune(options: argparse.Namespace) -> int:
    import torch

    from cnnops import models
    from cnnops.bench import tune as tuner
    from cnnops.tuning import measured

    if not torch.cuda.is_available():
        raise UsageError("tune measures on a CUDA device, and torch sees none")
    device = torch.device("cuda", torch.cuda.current_device())
    dtype, layout = getattr(torch, options.dtype), torch.channels_last
    stem = "imagenet" if options.image > 64 else "cifar"
    model = _checked(models.create_model, options.model, stem=stem).to(device)
    model.to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.rand(options.batch, 3, options.image, options.image, device=device).contiguous(memory_format=layout)

    def step() -> None:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            model(x).float().sum().backward()

    name = torch.cuda.get_device_name(device)
    measurements = 0
    for outcome in tuner.tune(tuner.captured(step), device):
        row = {measured.filed_under(outcome.table, outcome.problem): tuner.row_of(outcome)}
        path = measured.save(name, row)  # after each, so that an interrupted run keeps what it found
        measurements += 1
        print(tuner.line_of(outcome))
    if not measurements:
        print("the network calls no kernel that has a choice")
        return 0
    print(f"{measurements} problems measured, in {path}")
    return 0


def _operands(op: str, x: Tensor, shape: tuple[int, ...] | None, training: bool) -> dict[str, Any]:
    """What function `op` takes besides x and `_ARGUMENTS`, with weights of this shape, by its own names for them."""
    import torch

    weight = x.new_empty(shape or ())
    first, channels = (tuple(t.shape[axis : axis + 1]) for t, axis in ((weight, 0), (x, 1)))
    if op in ("conv2d", "conv2d_act", "conv_transpose2d"):
        return {"weight": weight}
    if op == "squeeze_excite":
        return {"weight1": weight, "bias1": None, "weight2": x.new_empty(channels + first), "bias2": None}
    if op == "max_unpool2d":
        return {"indices": torch.empty_like(x, dtype=torch.int64)}
    if "pool2d" in op and op != "bn_act_max_pool2d":
        return {}
    # A batch norm, of x or of what a convolution makes of it.
    of_conv = op == "conv2d_bn_act"
    mean, var, scale, shift = (x.new_empty(first if of_conv else channels) for _ in range(4))
    affine = {"bn_weight": scale, "bn_bias": shift} if of_conv else {"weight": scale, "bias": shift}
    statistics = {"running_mean": mean, "running_var": var, "training": training, "momentum": 0.1, "eps": 1e-5}
    return {**statistics, **affine, **({"weight": weight, "bias": None} if of_conv else {})}


_ARGUMENTS = (
    "stride",
    "padding",
    "output_padding",
    "dilation",
    "groups",
    "kernel_size",
    "output_size",
    "padding_mode",
    "activation",
    "gate",
)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers like 64,3,32,32, but got {text!r}") from None


def _numbers(text: str) -> int | tuple[int, ...]:
    sizes = _sizes(text)
    return sizes[0] if len(sizes) == 1 else sizes


def _padding(text: str) -> str | int | tuple[int, ...]:
    return text if text in ("same", "valid") else _numbers(text)


def parser() -> argparse.ArgumentParser:
    from cnnops import functional
    from cnnops.train.config import TrainConfig

    top = _Parser(
        prog="cnnops",
        description="Convolutional networks on hand-written kernels.",
        epilog="cnnops COMMAND --help says more about a command.",
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    sub = _add_command(
        commands,
        "demo",
        demo,
        "train ResNet-18 on 5,000 real digits and time it beside torch.nn",
        "Takes a few minutes on two CPU cores (at half width; full width on CUDA). Ends with the test accuracy.",
    )
    sub.add_argument("--epochs", type=int, default=6, metavar="INT", help="passes over the training set (default: 6)")
    sub.add_argument("--device", default="auto", metavar="STR", help="cpu, cuda, cuda:N or auto (default: auto)")
    sub.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/demo-TIME)")

    sub = _add_command(
        commands,
        "train",
        train,
        "train a network and keep the run in a folder",
        "Ctrl-C ends it after the step that runs, with a checkpoint that --resume goes on from. Beside --resume, "
        "--device and --data-dir may be given, where they have changed.",
    )
    _add_config_options(sub, TrainConfig)
    sub.add_argument("--out", type=Path, metavar="DIR", help="run folder, new or empty (default: runs/MODEL-DATA-TIME)")
    sub.add_argument("--resume", type=Path, metavar="PATH", help="go on with a run folder, or from a checkpoint file")

    sub = _add_command(
        commands, "info", info, "say what is built, what is usable here, and what is missing and how to get it"
    )
    sub.add_argument("--json", action="store_true", help="everything, as JSON")

    sub = _add_command(
        commands,
        "tune",
        tune,
        "measure which configuration of each Triton kernel is fastest for a network on this GPU, and keep it",
        "Takes the kernels that a training step calls. What it finds is read by every later process on this device with "
        "the same torch, triton and cnnops; files lie in $CNNOPS_TUNING, or ~/.cache/cnnops/tuning.",
    )
    sub.add_argument("--model", default="resnet18", metavar="STR", help="network (default: resnet18)")
    sub.add_argument("--batch", type=int, default=256, metavar="INT", help="images of a step (default: 256)")
    sub.add_argument("--image", type=int, default=224, metavar="INT", help="their side in pixels (default: 224)")
    sub.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))

    sub = _add_command(
        commands,
        "explain",
        explain,
        "say which backend would run a call and its gradients, and why each other one would not",
        "Example: cnnops explain conv2d --input 64,64,32,32 --weight 64,64,3,3 --padding 1",
    )
    sub.add_argument("op", choices=functional.__all__, metavar="OP", help=f"one of {', '.join(functional.__all__)}")
    sub.add_argument("--input", type=_sizes, required=True, metavar="N,C,H,W", help="the input's shape")
    sub.add_argument(
        "--weight", type=_sizes, metavar="K,C,R,S", help="a convolution's weight's shape, or squeeze_excite's weight1's"
    )
    sub.add_argument("--training", action="store_true", help="a batch norm uses its batch's statistics")
    words = ("padding_mode", "activation", "gate")
    kinds: dict[str, Callable[[str], Any]] = {"groups": int, "padding": _padding, **dict.fromkeys(words, str)}
    for name in _ARGUMENTS:
        sub.add_argument(
            f"--{name.replace('_', '-')}",
            type=kinds.get(name, _numbers),
            metavar="STR" if name in words else "INT",
            help="as the function's argument",
        )
    sub.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    sub.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    sub.add_argument("--channels-last", action="store_true", help="the input is channels_last")
    sub.add_argument("--backend", metavar="NAME", help="ask this backend alone")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command line (None: this process') and return its exit status."""
    try:
        options = parser().parse_args(arguments)
        command: Command = options.command
        return _guarded(command, options)
    except SystemExit as done:  # argparse, after --help or an error of its own
        return int(done.code or 0)
    except KeyboardInterrupt:
        return _failed("interrupted", 128 + signal.SIGINT)


def _guarded(command: Command, options: argparse.Namespace) -> int:
    """Run a command; what a user can mend becomes one line, and a bug keeps its traceback."""
    from cnnops import UnsupportedError, dispatch
    from cnnops.data import DataError
    from cnnops.train import CheckpointError, Stopped, TrainingError

    try:
        if dispatch.scope.backend not in ("", *dispatch.NAMES):
            raise UsageError(
                f"CNNOPS_BACKEND must be one of {', '.join(dispatch.NAMES)}, but is {dispatch.scope.backend!r}"
            )
        status = command(options)
        sys.stdout.flush()  # while it can still fail with an exit status
        return status
    except Stopped as stopped:
        return _failed(f"{stopped}; go on with: cnnops train --resume {stopped.folder}", 128 + stopped.signum)
    except (UsageError, DataError, CheckpointError, TrainingError, UnsupportedError) as error:
        return _failed(str(error), USAGE_ERROR)
    except BrokenPipeError:  # who reads has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush would complain
        return 128 + signal.SIGPIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{error.strerror or error}", USAGE_ERROR)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _failed("out of memory; a smaller batch, network, image or border needs less", USAGE_ERROR)


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    # torch's CPU allocator has no type of its own for it.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _failed(message: str, status: int) -> int:
    kind = "error: " if status == USAGE_ERROR else ""
    print(f"cnnops: {kind}{message}", file=sys.stderr)
    return status

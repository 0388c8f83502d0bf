"""What every test runs under: poisoned memory, one thread, and a backend that is named and strict.

Markers: `quick` is the subset for `make check`, `slow` the whole cross product for `make test-slow`.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
os.environ["CNNOPS_POISON"] = "1"  # before the native libraries load: their fresh memory holds NaN
torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = False  # the tests of TF32 say so
# Fresh tensors hold NaN, so an element that a kernel forgets to write shows. warn_only: torch itself has ops without a
# deterministic form.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

import helpers  # noqa: E402  (imports cnnops, which must find the environment above)

import cnnops  # noqa: E402
from cnnops.backends import simt  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: the subset that `make check` runs")
    config.addinivalue_line("markers", "slow: left to `make test-slow`")
    config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic implementation.*")
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel lengths")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `backend`, and does not say which, on every row of the table."""
    marks = metafunc.definition.iter_markers("parametrize")
    if "backend" in metafunc.fixturenames and not any("backend" in str(mark.args[0]) for mark in marks):
        metafunc.parametrize("backend", helpers.BACKENDS, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[helpers.Backend]:
    """The backend that the test runs on, strictly: no call of ours can fall through to ATen."""
    row, variant = helpers.row(request.param), helpers.variant(request.param)
    usable = row.usable()
    if not usable.ok:
        pytest.fail(f"backend {row.NAME} is expected on this machine, but is not usable: {usable.reason}")
    with cnnops.use_backend(row.NAME), variant, guarded(row.NAME, request.node.nodeid):
        yield helpers.Backend(row.NAME, helpers.device_of(row))


@pytest.fixture
def emulator() -> Iterator[ModuleType]:
    """The emulator's module, which afterwards is set as every test expects it."""
    module = simt.module()
    yield module
    module.set_schedule("forward")
    module.set_device()
    module.run_blocks()
    module.disable_sync()


@contextlib.contextmanager
def guarded(name: str, test: str) -> Iterator[None]:
    """The emulator's tensors flush against a page that faults: at their end in half of the tests, else at their start."""
    if name != "simt":
        yield
        return
    emulator = helpers.row(name).module()
    emulator.guard_tensors(("end", "start")[zlib.crc32(test.encode()) % 2])
    try:
        yield
    finally:
        emulator.guard_tensors("")

"""That CNNOPS_POISON, which every test relies on, fills outputs and workspaces: seen through kernels that write nothing.

They are compiled with the real bind.cpp, which is where memory is allocated.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]

KERNELS = """
#include <cstring>

#include "kernels.h"

namespace cnnops {

// A launcher of any signature that does nothing.
struct Nothing {
  template <class... A>
  using Launcher = void (*)(A...);
  template <class... A>
  operator Launcher<A...>() const {
    return [](A...) {};
  }
};

// The convolution shows its workspace as y, and leaves it clean for the next call. For one image it wants one that is
// too large to be kept for that.
const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels k{};
    k.conv2d_forward_workspace = [](const Conv2dProblem& p, const Epilogue&) -> int64_t {
      return p.N == 1 ? (int64_t{256} << 20) + 1 : int64_t{4} * p.N * p.K * p.P * p.Q;
    };
    k.conv2d_forward = [](const Conv2dProblem& p, const Epilogue&, const void*, const void*, void* y, void* workspace,
                          Stream) {
      const size_t bytes = size_t{4} * p.N * p.K * p.P * p.Q;
      std::memcpy(y, workspace, bytes);
      std::memset(workspace, 0, bytes);
    };
    k.max_pool2d_forward = Nothing();
    k.batch_norm_act_forward = Nothing();
    return k;
  }();
  return table;
}

const char* build_info() { return "{}"; }

}  // namespace cnnops
"""

CALLS = """
import sys, torch
torch.ops.load_library(sys.argv[1])
ops = torch.ops.cnnops_empty

def show(name, *tensors):
    print(name, all(bool(t.isnan().all() if t.is_floating_point() else (t == 255).all()) for t in tensors))

x = torch.ones(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
weight = torch.ones(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)
for turn in ("new", "kept"):
    show(f"{turn} workspace", ops.conv2d_forward(x, weight, None, 1, 1, 0, 0, 1, 1, 1, 0))
show("large workspace", ops.conv2d_forward(x[:1], weight, None, 1, 1, 0, 0, 1, 1, 1, 0))
show("outputs", *ops.max_pool2d_forward(x, 2, 2, 2, 2, 0, 0, 1, 1, False, True))
show("statistics", *ops.batch_norm_act_forward(x, None, None, None, None, None, True, 0.1, 1e-5, "none"))
"""

SEEN = ("new workspace", "kept workspace", "large workspace", "outputs", "statistics")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        script = runpy.run_path(str(ROOT / "setup.py"))
    folder = tmp_path_factory.mktemp("poison")
    (folder / "kernels.cpp").write_text(KERNELS)
    flags = f"-std=c++20 -O0 -fPIC -shared -I{ROOT / 'csrc'} {script['bind_flags']('empty', 'CPU')}".split()
    command = ["g++", *flags, str(ROOT / "csrc/bind.cpp"), str(folder / "kernels.cpp"), *script["link_torch"]().split()]
    subprocess.run([*command, "-o", str(folder / "empty.so")], check=True)
    return folder / "empty.so"


def seen(library: Path, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", CALLS, str(library)]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_what_no_kernel_writes_is_nan_in_every_test(library: Path) -> None:
    """With the environment of this process, which tests/conftest.py has set."""
    assert seen(library, dict(os.environ)) == "".join(f"{name} True\n" for name in SEEN)


def test_without_the_variable_it_is_not(library: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CNNOPS_POISON"}
    assert seen(library, environment) == "".join(f"{name} False\n" for name in SEEN)

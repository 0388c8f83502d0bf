"""Harm done to checkpoints and to runs: what is damaged is noticed, and what was interrupted goes on bit for bit."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harm import TRAIN, Cuts, small
from test_train import At, assert_equal, resum

from cnnops import data
from cnnops.files import locked
from cnnops.train import (
    CheckpointError,
    Reporter,
    Stopped,
    TrainConfig,
    Trainer,
    load_checkpoint,
    save_checkpoint,
)

CONFIG = TrainConfig(
    model="simple_cnn", data="synthetic", width=1 / 8, epochs=2, batch_size=8, lr=0.02, checkpoint_every=2, device="cpu"
)


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.DATASETS, "synthetic", small)
    monkeypatch.setattr(Trainer, "_draw", lambda trainer: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `CONFIG` that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DATASETS, "synthetic", small)
        patch.setattr(Trainer, "_draw", lambda trainer: None)
        Trainer(CONFIG, folder).fit()
    return folder


def timeless(path: Path) -> dict[str, Any]:
    state = load_checkpoint(path)
    for record in state["history"]:
        record["seconds"] = record["images_per_s"] = 0
    return state


def assert_same_run(folder: Path, whole: Path) -> None:
    """Everything but times is equal, bit for bit, and nothing else is there."""
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    for name in ("last.pt", "best.pt"):
        assert_equal(timeless(folder / name), timeless(whole / name))
        assert (folder / f"{name}.sha256").read_text().count("\n") == 1
    assert (folder / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    ours, theirs = (
        [
            {**json.loads(line), "seconds": 0, "images_per_s": 0}
            for line in (f / "metrics.jsonl").read_text().splitlines()
        ]
        for f in (folder, whole)
    )
    assert ours == theirs


def assert_refused(path: Path, message: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


# Damage to the files of a checkpoint.


@pytest.fixture
def saved(tmp_path: Path, whole: Path) -> Path:
    for name in ("last.pt", "last.pt.sha256"):
        shutil.copy(whole / name, tmp_path / name)
    return tmp_path / "last.pt"


def test_a_flipped_bit_anywhere_is_noticed(saved: Path) -> None:
    content = saved.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [info.header_offset for info in archive.infolist()]
        directory = archive.start_dir
    places = {0, 1, len(content) - 1, len(content) - 22, directory, *members, *(m + 40 for m in members)}
    draw = random.Random(0)
    places |= {draw.randrange(len(content)) for _ in range(200)}
    for place in sorted(places):
        harmed = bytearray(content)
        harmed[place] ^= 1 << draw.randrange(8)
        saved.write_bytes(harmed)
        assert_refused(saved, "is damaged: its SHA-256 is not the one in last.pt.sha256")
    saved.write_bytes(content)
    load_checkpoint(saved)


def test_torch_alone_would_load_a_flipped_bit(saved: Path) -> None:
    """Why there is a sum: without it, a changed weight goes unseen."""
    content = bytearray(saved.read_bytes())
    weight = load_checkpoint(saved)["model"]["classifier.4.bias"].numpy().tobytes()
    content[content.index(weight)] ^= 1
    saved.write_bytes(content)
    assert torch.load(saved, weights_only=True)["format"] == 1
    assert_refused(saved, "is damaged")


def test_a_truncated_checkpoint_is_noticed(saved: Path) -> None:
    content = saved.read_bytes()
    for size in (0, 1, 4, 30, len(content) // 2, len(content) - 22, len(content) - 1):
        saved.write_bytes(content[:size])
        assert_refused(saved, "is damaged")
    saved.write_bytes(content + b"\0")
    assert_refused(saved, "is damaged")


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        (b"", "cannot be verified"),
        (b"\n \n", "cannot be verified"),
        (b"\xff\x00\xfe garbage", "is damaged"),
        (b"0" * 64 + b"  last.pt\n", "is damaged"),
        (hashlib.sha256(b"another file").hexdigest().encode() + b"  other.pt\n", "is damaged"),
    ],
)
def test_a_sum_file_that_does_not_fit(saved: Path, sums: bytes, message: str) -> None:
    saved.with_name("last.pt.sha256").write_bytes(sums)
    assert_refused(saved, message)
    save_checkpoint({"x": 1}, saved)
    assert load_checkpoint(saved)["x"] == 1


def test_a_flipped_bit_in_the_sum_is_noticed(saved: Path) -> None:
    sums = saved.with_name("last.pt.sha256")
    content = sums.read_bytes()
    for place in range(64):
        harmed = bytearray(content)
        harmed[place] ^= 1
        sums.write_bytes(harmed)
        assert_refused(saved, "is damaged")


def test_the_sum_of_the_other_checkpoint_does_not_count(saved: Path, whole: Path) -> None:
    save_checkpoint({"x": 1}, saved.with_name("best.pt"))
    shutil.copy(saved.with_name("best.pt.sha256"), saved.with_name("last.pt.sha256"))
    assert_refused(saved, "is damaged")


@pytest.mark.parametrize("name", ["last.pt", "last.pt.sha256"])
@pytest.mark.parametrize(
    "put", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path)], ids=["folder", "pipe", "loop"]
)
def test_something_else_in_a_files_place(saved: Path, name: str, put: Callable[[Path], None]) -> None:
    """A pipe would be waited for without end."""
    path = saved.with_name(name)
    path.unlink()
    put(path)
    assert_refused(saved.parent)


def test_a_link_to_a_checkpoint_is_followed_with_its_sum(saved: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.pt"
    link.symlink_to(saved)
    assert_refused(link, "link.pt.sha256 is not beside it")
    link.with_name("link.pt.sha256").symlink_to(saved.with_name("last.pt.sha256"))
    assert load_checkpoint(link)["epoch"] == 2
    saved.unlink()
    assert_refused(link, "does not exist")


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read and write everything, so be nobody for a while; anybody else stays who he is."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)


@pytest.fixture
def public(whole: Path) -> Iterator[Path]:
    """A copy of the run where nobody can reach it, which pytest's folders are not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        shutil.copytree(whole, folder)
        os.chmod(name, 0o755)
        os.chmod(folder, 0o755)
        yield folder
        os.chmod(folder, 0o755)


def test_a_checkpoint_that_may_not_be_read(public: Path) -> None:
    (public / "last.pt").chmod(0)
    with without_privileges():
        assert_refused(public, "Permission denied")
    public.chmod(0)
    with without_privileges():
        assert_refused(public, "Permission denied")


def test_resume_in_a_folder_that_may_not_be_written(public: Path) -> None:
    before = {path: path.read_bytes() for path in public.iterdir()}
    public.chmod(0o555)
    trainer = Trainer.resume(public)
    with pytest.raises(PermissionError) as error, without_privileges():
        trainer.fit()
    assert error.value.filename == str(public / "config.json")
    assert {path: path.read_bytes() for path in public.iterdir()} == before


# Checkpoints made to do harm: their sum is right.


def archive_of(path: Path, change: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write `path` again with some members changed or added."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {**members, **change}.items():
            archive.writestr(name, content)
    resum(path)


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("form", ["torch", "zip", "plain"])
@pytest.mark.parametrize(
    "hostile",
    [
        lambda mark: Calls(os.system, f"touch {mark}"),
        lambda mark: Calls(os.mkdir, mark),
        lambda mark: Calls(exec, f"open({mark!r}, 'w')"),
        lambda mark: Calls(eval, f"__import__('os').mkdir({mark!r})"),
        lambda mark: Calls(getattr, "text", "join"),
        lambda mark: Calls(torch.save, 1, mark),
        lambda mark: Calls(torch.hub.download_url_to_file, "file:///etc/hostname", mark),
    ],
    ids=["system", "mkdir", "exec", "eval", "getattr", "torch.save", "download"],
)
def test_a_hostile_pickle_does_nothing(tmp_path: Path, form: str, hostile: Callable[[str], Calls]) -> None:
    mark, path = tmp_path / "harm", tmp_path / "last.pt"
    state = {"format": 1, "x": hostile(str(mark))}
    save_checkpoint({"x": 1}, path)
    if form == "torch":
        torch.save(state, path)
    elif form == "zip":
        archive_of(path, {"archive/data.pkl": pickle.dumps(state, protocol=2)})
    else:
        path.write_bytes(pickle.dumps(state, protocol=2))
    resum(path)
    assert_refused(path, "is not a checkpoint that can be read")
    assert not mark.exists()


def test_the_hostile_pickles_do_harm_where_they_are_trusted(tmp_path: Path) -> None:
    """Or the test above would show nothing."""
    mark, path = tmp_path / "harm", tmp_path / "last.pt"
    torch.save({"format": 1, "x": Calls(os.mkdir, str(mark))}, path)
    torch.load(path, weights_only=False)
    assert mark.is_dir()


@pytest.mark.parametrize("outside", ["../outside", "/outside", "archive/../../outside"])
def test_a_member_with_a_path_outside_is_not_written(tmp_path: Path, outside: str) -> None:
    path = tmp_path / "run" / "last.pt"
    path.parent.mkdir()
    save_checkpoint({"x": torch.ones(3)}, path)
    archive_of(path, {outside: b"harm"})
    with contextlib.suppress(CheckpointError):
        assert_equal(load_checkpoint(path)["x"], torch.ones(3))
    assert {p.name for p in tmp_path.iterdir()} == {"run"}
    assert {p.name for p in path.parent.iterdir()} == {"last.pt", "last.pt.sha256"}
    assert not Path("/outside").exists()


@pytest.mark.parametrize("size", [0, 8, 4 * 1000 - 4, 4 * 1000 + 4])
def test_a_storage_of_another_size_than_its_tensor(tmp_path: Path, size: int) -> None:
    """Reading on behind it would show memory of this process."""
    path = tmp_path / "last.pt"
    save_checkpoint({"x": torch.ones(1000)}, path)
    archive_of(path, {"archive/data/0": b"\0" * size})
    assert_refused(path, "is not a checkpoint that can be read")


def test_a_tensor_larger_than_its_storage(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint({"x": torch.ones(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("archive/data.pkl")
    # BININT2 1000 is there twice: elements of the storage, then the tensor's extent.
    assert pickled.count(b"M\xe8\x03") == 2
    place = pickled.rindex(b"M\xe8\x03")
    archive_of(path, {"archive/data.pkl": pickled[:place] + b"M\xff\xff" + pickled[place + 3 :]})
    assert_refused(path, "is not a checkpoint that can be read")


def test_members_that_unpack_to_more_than_the_file_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint({"x": torch.zeros(4_000_000)}, path)
    archive_of(path, {}, zipfile.ZIP_DEFLATED)
    assert torch.load(path, weights_only=True)["x"].numel() == 4_000_000
    assert path.stat().st_size < 100_000
    assert_refused(path, "its members unpack to more than the file")


@pytest.mark.parametrize("missing", ["data.pkl", "data/0", "version"])
def test_a_missing_member(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint({"x": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist() if i.filename != f"archive/{missing}"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    resum(path)
    assert_refused(path, "is not a checkpoint that can be read")


@pytest.mark.parametrize("state", [None, 1, "x", [], {}, {"format": 0}, {"format": 2}, {"format": "1"}, {"model": {}}])
def test_a_file_of_another_program(tmp_path: Path, state: Any) -> None:
    path = tmp_path / "last.pt"
    torch.save(state, path)
    assert_refused(path, "is not beside it")
    resum(path)
    assert_refused(path, "is not a checkpoint of this version: expected format 1, but got ")


JUNK = (None, -1, 1 << 70, float("nan"), "text", [], {}, (), {"x": 1}, torch.zeros(3), [torch.zeros(3)])


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_no_state_makes_resume_raise_anything_else(tmp_path: Path, whole: Path) -> None:
    """Every part of a checkpoint, missing or of another type, is refused in one line, or does not matter."""
    path, good = tmp_path / "last.pt", load_checkpoint(whole)
    refused = []
    for key in good.keys() - {"format"}:
        assert_refused_resume({k: v for k, v in good.items() if k != key}, path, f"it lacks '{key}'")
        for junk in JUNK:
            save_checkpoint({**good, key: junk}, path)
            try:
                Trainer.resume(path)
            except CheckpointError as error:
                refused.append(str(error))
    assert len(refused) > 80
    assert not any("\n" in message for message in refused)


def assert_refused_resume(state: dict[str, Any], path: Path, message: str) -> None:
    save_checkpoint(state, path)
    with pytest.raises(CheckpointError, match=f"cannot go on from checkpoint {path}: .*{message}") as error:
        Trainer.resume(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"flux": 1}}, "unexpected keyword argument 'flux'"),
        ({"config": {"model": "gone"}}, "model must be one of"),
        ({"config": {"data": "gone"}}, "data must be one of"),
        ({"config": {"width": "wide"}}, "'<' not supported"),
        ({"config": {"width": 0.25}}, "Error\\(s\\) in loading state_dict"),
        ({"config": {"epochs": 1}}, "no run of these options is in epoch 2, step 0 with 2 records"),
        ({"epoch": 1}, "in epoch 1, step 0 with 2 records"),
        ({"epoch": -1}, "in epoch -1"),
        ({"step": 5}, "in epoch 2, step 5"),
        ({"history": [{"epoch": 1}, {}]}, "missing 7 required positional arguments"),
    ],
)
def test_a_state_that_does_not_fit(tmp_path: Path, whole: Path, change: dict[str, Any], message: str) -> None:
    state = load_checkpoint(whole)
    if "config" in change:
        change = {"config": {**state["config"], **change["config"]}}
    assert_refused_resume({**state, **change}, tmp_path / "last.pt", message)


# Writes that fail.

CUTS = 8
"""Cuts of one `write_atomically`: open, within the write, and around its fsync, its rename and the folder's fsync."""


def test_a_write_is_on_the_disk_before_it_is_renamed_and_the_rename_after(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with Cuts().installed() as cuts:
        save_checkpoint({"x": 1}, folder / "last.pt")

    def write(name: str) -> list[str]:
        return [f"write .{name}.part", f"fsync .{name}.part", f"replace {name}", "fsync run"]

    assert cuts.calls == [*write("last.pt.sha256"), *write("last.pt"), *write("last.pt.sha256")]
    assert cuts.count == 3 * CUTS


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("action", "error"), [(full_disk, OSError), (interrupt, KeyboardInterrupt)])
def test_whatever_fails_while_saving_a_checkpoint_loads_and_nothing_is_left(
    tmp_path: Path, action: Callable[[], None], error: type[BaseException]
) -> None:
    path = tmp_path / "last.pt"
    names = {"last.pt", "last.pt.sha256"}
    draw = random.Random(0)
    cuts = range(1, 3 * CUTS + 1)
    for cut in cuts:
        save_checkpoint({"x": 1}, path)
        # The first failure may leave two sums; the second must not lose the one that is right.
        for x, second in [(2, cut), *((3, again) for again in draw.sample(cuts, 3))]:
            with pytest.raises(error), Cuts(second, action).installed():
                save_checkpoint({"x": x}, path)
            assert load_checkpoint(path)["x"] in (1, 2, 3)
            assert {p.name for p in tmp_path.iterdir()} == names
        save_checkpoint({"x": 4}, path)
        assert load_checkpoint(path)["x"] == 4
        assert path.with_name("last.pt.sha256").read_text().count("\n") == 1


def disk_is_full_at(tmp_path: Path, whole: Path, cut_of: Callable[[int], int]) -> None:
    """At every file that a run writes: it goes on in the same process, and by resume in another."""
    total = Cuts()
    with total.installed():
        Trainer(CONFIG, tmp_path / "count").fit()
    files, rest = divmod(total.count, CUTS)
    assert rest == 0
    for file in range(files):
        same, other = tmp_path / f"same{file}", tmp_path / f"other{file}"
        trainer = Trainer(CONFIG, same)
        with (
            pytest.raises(OSError, match="No space left on device"),
            Cuts(file * CUTS + cut_of(file), full_disk).installed(),
        ):
            trainer.fit()
        assert not list(same.glob(".*"))
        if (same / "last.pt").exists():
            shutil.copytree(same, other)
            Trainer.resume(other).fit()
            assert_same_run(other, whole)
            trainer.fit()
            assert_same_run(same, whole)


def test_a_run_whose_disk_was_full_goes_on(tmp_path: Path, whole: Path) -> None:
    disk_is_full_at(tmp_path, whole, lambda file: 1 + 3 * file % CUTS)


@pytest.mark.slow
@pytest.mark.parametrize("cut", range(1, CUTS + 1))
def test_a_run_whose_disk_was_full_anywhere_goes_on(tmp_path: Path, whole: Path, cut: int) -> None:
    disk_is_full_at(tmp_path, whole, lambda file: cut)


@pytest.mark.parametrize(("limit", "name"), [(250, "config.json"), (5_000, "last.pt")])
def test_a_real_limit_on_file_size_stops_a_run_in_one_line(runs: Runs, limit: int, name: str) -> None:
    """config.json takes some 300 bytes, a checkpoint 100,000."""
    answer = runs.train(file_size=limit)
    assert answer["status"] == 2
    assert runs.log.read_text().endswith(f"cnnops: error: {runs.folder / name}: File too large\n")
    assert not list(runs.folder.glob(".*"))
    assert not (runs.folder / "last.pt").exists()


def test_a_real_full_disk(tmp_path: Path, runs: Runs, whole: Path) -> None:
    """A small tmpfs, filled while the run goes on; then space is made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this process may not mount: {mounted.stderr.strip()}")
    try:
        folder, ballast = disk / "run", disk / "ballast"

        def fill() -> None:
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while file.write(b"\0" * 4096):
                    pass

        trainer = Trainer(CONFIG, folder, At(1, 3, fill))
        with pytest.raises(OSError, match="No space left on device"):
            trainer.fit()
        assert not list(folder.glob(".*"))
        assert load_checkpoint(folder)["epoch"] == 1
        ballast.unlink()
        shutil.copytree(folder, runs.folder)
        assert runs.resume()["status"] == 0
        assert_same_run(runs.folder, whole)
        trainer.fit()
        assert_same_run(folder, whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Runs that are killed.


class Runs:
    """Runs of `CONFIG` in children of `harm.py`, each in a folder of its own."""

    def __init__(self, tmp_path: Path, server: subprocess.Popen[str]) -> None:
        self._server = server
        self.folder, self.log = tmp_path / "run", tmp_path / "log"

    def train(self, **harm: Any) -> dict[str, Any]:
        return self._do([*TRAIN, "--out", str(self.folder)], harm)

    def resume(self, **harm: Any) -> dict[str, Any]:
        return self._do(["train", "--resume", str(self.folder)], harm)

    def _do(self, arguments: list[str], harm: dict[str, Any]) -> dict[str, Any]:
        assert self._server.stdin and self._server.stdout
        job = {"arguments": arguments, "log": str(self.log), **harm}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def finish(self) -> None:
        """Go on as a user would: by resume, or from the start where nothing was trained yet."""
        if not (self.folder / "last.pt").exists():
            assert {p.name for p in self.folder.glob("[!.]*")} <= {"config.json", "metrics.jsonl", "last.pt.sha256"}
            shutil.rmtree(self.folder, ignore_errors=True)
            assert self.train()["status"] == 0, self.log.read_text()
        else:
            assert self.resume()["status"] == 0, self.log.read_text()


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{here}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here / "harm.py")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server
        assert server.stdin
        server.stdin.close()


@pytest.fixture
def runs(tmp_path: Path, server: subprocess.Popen[str]) -> Runs:
    return Runs(tmp_path, server)


def killed(runs: Runs, whole: Path, cuts: list[int]) -> None:
    """SIGKILL at each of these cuts, one after another in the same run, and go on each time."""
    shutil.rmtree(runs.folder, ignore_errors=True)
    for cut in cuts:
        begin = runs.resume if (runs.folder / "last.pt").exists() else runs.train
        if begin == runs.train:
            shutil.rmtree(runs.folder, ignore_errors=True)
        if begin(cut=cut)["status"] == 0:
            break  # there was less left to do
        if (runs.folder / "last.pt").exists():
            load_checkpoint(runs.folder)
    runs.finish()
    assert_same_run(runs.folder, whole)


def test_what_is_drawn_before_a_run_does_not_matter(tmp_path: Path, whole: Path) -> None:
    """Not even to the checkpoint that is written before the first step."""

    class Die(Exception):
        pass

    def die() -> None:
        raise Die

    trainer = Trainer(CONFIG, tmp_path, At(0, 1, die))
    torch.randn(3), random.random()
    with pytest.raises(Die):
        trainer.fit()
    torch.randn(3), random.random()
    resumed = Trainer.resume(tmp_path)
    assert resumed.step == 0
    resumed.fit()
    assert_same_run(tmp_path, whole)


def test_a_child_and_this_process_train_alike(runs: Runs, whole: Path) -> None:
    assert runs.train()["status"] == 0
    assert_same_run(runs.folder, whole)


def test_killed_while_it_writes(runs: Runs, whole: Path) -> None:
    """Anywhere in the first run, in the end of its first epoch, and again and again in one run."""
    count = runs.train()["cuts"]
    draw = random.Random(1)
    for cut in draw.sample(range(1, count + 1), 12):
        killed(runs, whole, [cut])
    for _ in range(3):
        killed(runs, whole, [draw.randint(1, 80) for _ in range(3)])


@pytest.mark.slow
def test_killed_at_every_cut(runs: Runs, whole: Path) -> None:
    count = runs.train()["cuts"]
    for cut in range(1, count + 1):
        killed(runs, whole, [cut])
        killed(runs, whole, [cut, cut // 2 + 1])


def killed_at_any_time(runs: Runs, whole: Path, times: int) -> None:
    """Until it was hit so often; a run that was done before is no hit, and the next ones are killed earlier."""
    seconds = runs.train()["seconds"]
    draw = random.Random(2)
    hits = 0
    for _ in range(5 * times):
        shutil.rmtree(runs.folder)
        after = draw.uniform(0, seconds)
        if runs.train(after=after)["status"] == -signal.SIGKILL:
            hits += 1
        else:
            seconds = after
        runs.finish()
        assert_same_run(runs.folder, whole)
        if hits == times:
            return
    raise AssertionError(f"only {hits} of {5 * times} runs were hit")


def test_killed_at_any_time(runs: Runs, whole: Path) -> None:
    killed_at_any_time(runs, whole, 8)


@pytest.mark.slow
def test_killed_at_any_time_often(runs: Runs, whole: Path) -> None:
    killed_at_any_time(runs, whole, 200)


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGTERM] * 2, [signal.SIGINT], [signal.SIGINT] * 2])
@pytest.mark.parametrize("cut", [3, 30, 60, 90, 110, 199])
def test_signals_while_it_writes(runs: Runs, whole: Path, signals: list[int], cut: int) -> None:
    """Once, or SIGTERM at any time: the step that runs is finished. A second SIGINT interrupts the write at once."""
    twice = signals == [signal.SIGINT] * 2
    answer = runs.train(cut=cut, signals=signals)
    interrupted = 128 + signals[0]
    assert answer["status"] == interrupted, runs.log.read_text()
    last = runs.log.read_text().splitlines()[-1]
    if twice:
        assert last == "cnnops: interrupted"
    else:
        assert last.startswith("cnnops: stopped ")
        assert last.endswith(f"; go on with: cnnops train --resume {runs.folder}")
    assert not list(runs.folder.glob(".*"))
    runs.finish()
    assert_same_run(runs.folder, whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_in_the_test_of_an_epoch(
    tmp_path: Path, whole: Path, signum: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = Trainer.evaluate

    def interrupted(trainer: Trainer) -> tuple[float, float]:
        signal.raise_signal(signum)
        return evaluate(trainer)

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    with pytest.raises(Stopped, match="after epoch 1 of 2"):
        Trainer(CONFIG, tmp_path).fit()
    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    Trainer.resume(tmp_path).fit()
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signal_while_the_pictures_are_drawn(runs: Runs, signum: signal.Signals) -> None:
    runs.train(draw_signal=signum)
    before = (runs.folder / "last.pt").read_bytes()
    assert not (runs.folder / "samples.png").exists()
    assert runs.resume(draw_signal=signal.SIGCHLD)["status"] == 0  # which is ignored
    assert (runs.folder / "last.pt").read_bytes() == before
    for name in ("curves.png", "filters.png", "samples.png"):
        assert (runs.folder / name).read_bytes().endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_at_any_step(tmp_path: Path, whole: Path, signum: signal.Signals) -> None:
    for epoch in range(2):
        for step in range(1, 5):
            folder = tmp_path / f"{epoch}{step}"
            with pytest.raises(Stopped) as stopped:
                Trainer(CONFIG, folder, At(epoch, step, lambda: signal.raise_signal(signum))).fit()
            assert stopped.value.signum == signum
            resumed = Trainer.resume(folder)
            assert (resumed.epoch, resumed.step) == (epoch, step)
            resumed.fit()
            assert_same_run(folder, whole)
            assert all(record.images_per_s > 0 for record in resumed.history)


# What else a run promises about its folder.


def test_checkpoints_within_an_epoch(tmp_path: Path) -> None:
    class Watch(Reporter):
        places: list[tuple[int, int]] = []

        def stepped(self, trainer: Trainer, loss: float | None) -> None:
            state = load_checkpoint(tmp_path)
            self.places.append((state["epoch"], state["step"]))

    Trainer(CONFIG, tmp_path, Watch()).fit()
    assert Watch.places == [(0, 0), (0, 0), (0, 2), (0, 2), (1, 0), (1, 0), (1, 2), (1, 2)]


def test_two_processes_do_not_train_into_one_folder(runs: Runs, whole: Path) -> None:
    shutil.copytree(whole, runs.folder)
    with locked(runs.folder):
        answer = runs.resume()
        assert answer["status"] == 2
        message = f"cnnops: error: {runs.folder}: another process trains into this folder\n"
        assert runs.log.read_text().endswith(message)
        with pytest.raises(BlockingIOError, match="another process"):
            Trainer.resume(runs.folder).fit()
    assert runs.resume()["status"] == 0
    assert_same_run(runs.folder, whole)


def test_one_folder_is_held_through_the_whole_run(tmp_path: Path) -> None:
    seen = []

    def second() -> None:
        with pytest.raises(BlockingIOError) as error:
            Trainer(CONFIG, tmp_path).fit()
        seen.append(error.value.filename)

    Trainer(CONFIG, tmp_path, At(1, 4, second)).fit()
    assert seen == [str(tmp_path)]


@pytest.mark.parametrize("harm", [b"", b"{", b"\xff\xfe\x00", None])
def test_damaged_records_beside_a_good_checkpoint_are_mended(tmp_path: Path, whole: Path, harm: bytes | None) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for name in ("config.json", "metrics.jsonl"):
        (folder / name).unlink()
        if harm is not None:
            (folder / name).write_bytes(harm)
    (folder / ".best.pt.part").write_bytes(b"left by a process that was killed")
    Trainer.resume(folder).fit()
    assert_same_run(folder, whole)

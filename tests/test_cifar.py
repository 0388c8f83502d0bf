"""CIFAR in both forms, on small sets of the published make, harmed in every way that a file or a server can be."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cnnops import cli, data
from cnnops.data import DataError, Dataset, cifar, published
from cnnops.data.cifar import Cifar, Form
from cnnops.data.published import Published

PER_FILE = 20


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def short(text: str) -> bytes:
    """A string as Python 2 pickles it."""
    return pickle.SHORT_BINSTRING + bytes([len(text)]) + text.encode()


def whole(value: int) -> bytes:
    return pickle.BININT + struct.pack("<i", value)


def python2_pickle(pixels: np.ndarray, labels: dict[str, list[int]]) -> bytes:
    """A batch opcode by opcode as Python 2 and the numpy of 2009 wrote the published ones."""
    state = b"".join((whole(3), short("|"), pickle.NONE * 3, whole(-1), whole(-1), whole(0)))
    u1 = short("u1") + whole(0) + whole(1) + pickle.TUPLE3 + pickle.REDUCE
    dtype = b"cnumpy\ndtype\n" + u1 + pickle.MARK + state + pickle.TUPLE + pickle.BUILD
    shape = whole(pixels.shape[0]) + whole(pixels.shape[1]) + pickle.TUPLE2
    raw = pickle.BINSTRING + struct.pack("<i", pixels.size) + pixels.tobytes()
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + whole(0) + pickle.TUPLE1 + short("b")
    content = pickle.MARK + whole(1) + shape + dtype + pickle.NEWFALSE + raw + pickle.TUPLE + pickle.BUILD
    array = empty + pickle.TUPLE3 + pickle.REDUCE + content
    items = short("data") + array + short("batch_label") + short("training batch 1 of 5")
    for key, values in labels.items():
        numbers = b"".join(map(whole, values))
        items += short(key) + pickle.EMPTY_LIST + pickle.MARK + numbers + pickle.APPENDS
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def tar_gz(members: Iterable[tuple[tarfile.TarInfo | str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = info.size or len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Fake:
    """A small set of the published make, under the checksums of its own files, in the place of the real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, real: Cifar, folder: Path) -> None:
        self.monkeypatch, self.folder, self.spec = monkeypatch, folder, real
        generator = np.random.default_rng(1)
        self.files: dict[bool, dict[str, bytes]] = {False: {}, True: {}}
        pixels, labels = [], []
        binary, python = real.forms
        for part in ("train", "test"):
            for plain, pickled in zip(getattr(binary, part), getattr(python, part), strict=True):
                x = generator.integers(0, 256, (PER_FILE, 3072), np.uint8)
                fine = generator.permutation(np.arange(PER_FILE) * len(real.classes) // PER_FILE).astype(np.uint8)
                coarse = fine // 5
                columns = [coarse, fine] if real.labels == 2 else [fine]
                self.files[False][plain.name] = np.column_stack([*columns, x]).tobytes()
                keys = {"coarse_labels": coarse.tolist(), real.label_key: fine.tolist()}
                self.files[True][pickled.name] = python2_pickle(x, keys)
                pixels.append(x)
                labels.append(fine)
        self.images = torch.from_numpy(np.concatenate(pixels)).view(-1, 3, 32, 32)
        self.labels = torch.from_numpy(np.concatenate(labels)).long()
        self.patch(False), self.patch(True)

    def form(self, pickled: bool) -> Form:
        return self.spec.forms[int(pickled)]

    def archive(self, pickled: bool) -> bytes:
        inside = self.form(pickled).folder
        return tar_gz([(f"{inside}/readme.html", b"<html>"), *self.members(pickled)])

    def members(self, pickled: bool) -> list[tuple[tarfile.TarInfo | str, bytes]]:
        inside = self.form(pickled).folder
        return [(f"{inside}/{name}", content) for name, content in self.files[pickled].items()]

    def patch(self, pickled: bool, archive: bytes | None = None) -> bytes:
        """Make the files as they are now, and the archive, the published ones. Returns the archive."""
        archive = self.archive(pickled) if archive is None else archive
        old = self.form(pickled)

        def published(file: Published) -> Published:
            content = self.files[pickled][file.name]
            return replace(file, checksum=sha256(content), size=len(content))

        form = replace(
            old,
            archive=replace(old.archive, checksum=sha256(archive), size=len(archive)),
            train=tuple(map(published, old.train)),
            test=tuple(map(published, old.test)),
        )
        forms = (self.spec.forms[0], form) if pickled else (form, self.spec.forms[1])
        self.spec = replace(self.spec, forms=forms)
        self.monkeypatch.setattr(cifar, self.spec.name.upper(), self.spec)
        return archive

    def unpack(self, pickled: bool, folder: Path | None = None) -> Path:
        folder = folder or self.folder / self.form(pickled).folder
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files[pickled].items():
            (folder / name).write_bytes(content)
        return folder

    def pack(self, pickled: bool, archive: bytes | None = None) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / self.form(pickled).archive.name
        path.write_bytes(self.patch(pickled, archive))
        return path

    def read(self) -> Dataset:
        return (data.cifar10 if self.spec.name == "cifar10" else data.cifar100)(self.folder)

    def assert_read(self) -> None:
        found = self.read()
        assert torch.equal(torch.cat([found.train_images, found.test_images]), self.images)
        assert torch.equal(torch.cat([found.train_labels, found.test_labels]), self.labels)
        assert len(found.test_labels) == PER_FILE

    def assert_refused(self, message: str) -> None:
        with pytest.raises(DataError, match=message) as error:
            self.read()
        assert "\n" not in str(error.value)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Port 9 of this machine answers nobody, and no proxy stands between."""
    monkeypatch.setattr(cifar, "SOURCE", "http://127.0.0.1:9/")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    return Fake(monkeypatch, cifar.CIFAR10, tmp_path / "data")


def test_the_tables_are_the_published_ones() -> None:
    for real, classes in ((cifar.CIFAR10, 10), (cifar.CIFAR100, 100)):
        assert len(set(real.classes)) == classes
        assert list(real.classes) == sorted(real.classes)
        for form in real.forms:
            records = [file.size / (real.labels + 3072) for file in (*form.train, *form.test) if file.size]
            assert sum(records) == (0 if form.pickled else 60_000)
            assert form.archive.size
            for file in (form.archive, *form.train, *form.test):
                algorithm, digest = file.checksum.split(":")
                assert len(digest) == 2 * hashlib.new(algorithm).digest_size
    assert len(set(cifar.COARSE_CLASSES)) == 20
    assert cifar.CIFAR10.mean == (0.4914, 0.4822, 0.4465)
    assert cifar.CIFAR10.std == (0.2470, 0.2435, 0.2616)


@pytest.mark.parametrize("real", [cifar.CIFAR10, cifar.CIFAR100], ids=lambda c: c.name)
@pytest.mark.parametrize("pickled", [False, True])
def test_every_form_and_place(real: Cifar, pickled: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = Fake(monkeypatch, real, tmp_path / "data")
    fake.unpack(pickled)
    fake.assert_read()
    fake.folder = tmp_path / "data" / fake.form(pickled).folder
    fake.assert_read()
    fake.folder = tmp_path / "packed"
    fake.pack(pickled)
    fake.assert_read()
    assert [path.name for path in fake.folder.iterdir()] == [fake.form(pickled).archive.name]
    found = fake.read()
    assert (found.name, found.classes, found.mean, found.std) == (real.name, real.classes, real.mean, real.std)
    assert (found.train_images.dtype, found.train_labels.dtype) == (torch.uint8, torch.int64)
    if real is cifar.CIFAR100:
        groups = data.cifar100(fake.folder, coarse=True)
        assert torch.equal(groups.test_labels, found.test_labels // 5)
        assert groups.classes == cifar.COARSE_CLASSES


def test_a_pickle_of_today(fake: Fake) -> None:
    """Python 3 puts bytes into an old pickle through _codecs.encode, numpy 2 under another name."""
    for name, content in fake.files[False].items():
        records = np.frombuffer(content, np.uint8).reshape(PER_FILE, -1)
        batch = {"data": records[:, 1:].copy(), "labels": records[:, 0].tolist()}
        fake.files[True][name.removesuffix(".bin")] = pickle.dumps(batch, protocol=2)
    fake.pack(True)
    fake.assert_read()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip, r"is damaged \(its SHA256 is wrong\)"),
        (truncate, r"has \d+ bytes, expected \d+"),
        (lengthen, r"has \d+ bytes, expected \d+"),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_damaged_files(fake: Fake, pickled: bool, harm: Callable[[Path], None], message: str) -> None:
    packed = fake.pack(pickled)
    harm(packed)
    fake.assert_refused(f"{packed.name} {message}; delete it, and it will be downloaded again$")
    packed.unlink()
    inside = fake.unpack(pickled)
    harm(inside / fake.form(pickled).test[0].name)
    fake.assert_refused(f"{fake.form(pickled).test[0].name} {message}; unpack http.*{packed.name} again$")


@pytest.mark.parametrize("pickled", [False, True])
def test_missing_file(fake: Fake, pickled: bool) -> None:
    (fake.unpack(pickled) / fake.form(pickled).train[2].name).unlink()
    fake.assert_refused(rf"cannot read .*{fake.form(pickled).train[2].name}: No such file or directory; unpack")


@pytest.mark.parametrize("at", [0.001, 0.3, 0.9])
def test_truncated_archive_under_its_own_checksum(fake: Fake, at: float) -> None:
    whole_archive = fake.archive(False)
    fake.pack(False, whole_archive[: int(at * len(whole_archive))])
    fake.assert_refused("cifar-10-binary.tar.gz(: .*| has no member .*); delete it, and it will be downloaded again$")


def test_what_is_no_archive(fake: Fake) -> None:
    for content in (b"", b"<html>", b"\x1f\x8b\x08" + bytes(100), tar_gz([])[:40]):
        fake.pack(False, content)
        fake.assert_refused("cifar-10-binary.tar.gz(: .*| has no member .*); delete it")
    fake.pack(False, tar_gz([]))
    fake.assert_refused("has no member cifar-10-batches-bin/data_batch_1.bin; delete it")


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (member("/tmp/evil"), "'/tmp/evil' points outside"),
        (member("../evil"), "'../evil' points outside"),
        (member("cifar-10-batches-bin/../../evil"), "points outside"),
        (member("cifar-10-batches-bin/link", tarfile.SYMTYPE, "/etc/passwd"), "bin/link' is no plain file"),
        (member("cifar-10-batches-bin/test_batch.bin", tarfile.SYMTYPE, "/etc/passwd"), "is no plain file"),
        (member("cifar-10-batches-bin/test_batch.bin", tarfile.LNKTYPE, "data_batch_1.bin"), "is no plain file"),
        (member("cifar-10-batches-bin/device", tarfile.CHRTYPE), "is no plain file"),
        (member("cifar-10-batches-bin/pipe", tarfile.FIFOTYPE), "is no plain file"),
        (member("cifar-10-batches-bin/sparse", tarfile.GNUTYPE_SPARSE), "is no plain file"),
        (member("cifar-10-batches-bin/a\nb", tarfile.SYMTYPE, "x"), r"a\\nb' is no plain file"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_hostile_members(fake: Fake, hostile: tarfile.TarInfo, message: str, first: bool, tmp_path: Path) -> None:
    others = fake.members(False)
    fake.pack(False, tar_gz([(hostile, b""), *others] if first else [*others, (hostile, b"")]))
    before = sorted(tmp_path.rglob("*"))
    fake.assert_refused(f"cifar-10-binary.tar.gz is not to be trusted: its member .*{message}$")
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize("size", ["99999999999999999999", "1000000000000", "-1", "1e9", "x", ""])
@pytest.mark.parametrize("name", ["cifar-10-batches-bin/test_batch.bin", "cifar-10-batches-bin/other"])
def test_a_member_that_claims_another_size(fake: Fake, size: str, name: str) -> None:
    """tarfile takes it from a PAX header, and would walk through a file that it believes to be so long."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as tar:
        claiming = member(name)
        claiming.pax_headers = {"size": size}
        tar.addfile(claiming)
    fake.pack(False, buffer.getvalue())
    fake.assert_refused(r"cifar-10-binary.tar.gz( is not to be trusted: its member .* claims|: | has no member )")


@pytest.mark.parametrize(
    "rest",
    [b"garbage" * 100, bytes(1 << 20), gzip.compress(b"another stream", mtime=0)],
    ids=["bytes", "zeros", "gzip"],
)
def test_what_follows_an_archive_is_not_read(fake: Fake, rest: bytes) -> None:
    fake.pack(False, fake.archive(False) + rest)
    fake.assert_read()


def test_member_twice(fake: Fake) -> None:
    fake.pack(False, tar_gz([*fake.members(False), *fake.members(False)[:1]]))
    fake.assert_refused("its member 'cifar-10-batches-bin/data_batch_1.bin' is there twice")


def test_an_archive_cannot_fill_the_memory(fake: Fake) -> None:
    """A child that may take 256 MiB more reads 1 GiB of zeros: as a member, and as a member's PAX header."""
    script = """
import resource, sys
from pathlib import Path
from cnnops.data import DataError, published
published.MOST_UNPACKED = 1 << 25
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), used + (1 << 28)))
try:
    published.read_archive(Path(sys.argv[1]), published.Published("x", sys.argv[2]), ["test"])
except DataError as error:
    print(error)
"""
    zeros = gzip.compress(bytes(1 << 20), 9) * 1024
    for kind, size in ((tarfile.REGTYPE, 1 << 25), (tarfile.XHDTYPE, 1 << 30)):
        content = gzip.compress(member("test", kind, size=size).tobuf(tarfile.GNU_FORMAT)) + zeros
        path = fake.folder / "bomb.tar.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        done = subprocess.run([sys.executable, "-c", script, path, sha256(content)], capture_output=True, text=True)
        assert done.stdout.endswith("is not to be trusted: it unpacks to more than 33554432 bytes\n"), done.stderr


class Evil:
    """Unpickled by anyone else, this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def hostile_pickles(path: Path) -> dict[str, tuple[bytes, str]]:
    batch = {"data": np.zeros((1, 3072), np.uint8), "labels": [0]}
    call = f"cposix\nsystem\n(S'touch {path}'\ntR.".encode()
    return {
        "reduce": (pickle.dumps({**batch, "labels": Evil(path)}, 2), "posix.system"),
        "newest protocol": (pickle.dumps({**batch, "labels": Evil(path)}, 5), "_frombuffer|posix.system"),
        "bare call": (call, "posix.system"),
        "instance": (f"(S'touch {path}'\nios\nsystem\n.".encode(), "os.system"),
        "eval": (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        "python 2 name": (b"c__builtin__\neval\n(S'1'\ntR.", "__builtin__.eval"),
        "numpy's own loader": (b"cnumpy\nload\n(S'x'\ntR.", "numpy.load"),
        "dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x09dtype.mro\x93.", "numpy.dtype.mro"),
        "attribute": (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
        "another encoding": (b"c_codecs\nencode\n(Vx\nVutf-16\ntR.", "UnpicklingError: text in 'utf-16'"),
        # A fresh unpickler's memo is an array: the first of these would fill the memory with 32 GiB of zeros.
        "far place": (b"N" + pickle.LONG_BINPUT + struct.pack("<I", 0x7FFFFFFF) + b".", "it remembers 2147483647 thin"),
        "far place in text": (b"Np999999999\n.", "it remembers 999999999 things in 13 bytes"),
        # 2**60 times the same string, which is small until it is shown.
        "billion laughs": (b"cnumpy\ndtype\n" + b"Vx\n" + b"2\x86" * 60 + pickle.TUPLE1 + b"R.", "an array of"),
        "deep": (b"(" * 100_000 + b"N" + b"t" * 100_000 + b".", "TypeError|KeyError"),
        "object array": (pickle.dumps({**batch, "data": np.array([Evil(path)])}, 2), "u1|posix.system|O8"),
    }


@pytest.mark.parametrize("name", hostile_pickles(Path("x")))
def test_hostile_pickles(fake: Fake, name: str, tmp_path: Path) -> None:
    content, asked = hostile_pickles(tmp_path / "evil")[name]
    fake.files[True]["test_batch"] = content
    fake.pack(True)
    fake.assert_refused(f"test_batch is not .*({asked})")
    assert not (tmp_path / "evil").exists()


def test_the_pickles_are_hostile(tmp_path: Path) -> None:
    """What the test above relies on."""
    pickle.loads(hostile_pickles(tmp_path / "evil")["reduce"][0])
    assert (tmp_path / "evil").exists()


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    "batch",
    [
        *({}, [], 7, {"data": PIXELS}, {"data": "text", "labels": [0, 1]}, {"data": PIXELS, "labels": [0]}),
        *({"data": PIXELS, "labels": "01"}, {"data": PIXELS, "labels": [0, "1"]}, {"data": PIXELS, "labels": [0, 10]}),
        *({"data": PIXELS, "labels": [0, -1]}, {"data": PIXELS, "labels": [0, 2**70]}, {"data": PIXELS, "labels": 2}),
        *({"data": PIXELS.T, "labels": [0, 1]}, {"data": PIXELS.astype(np.float32), "labels": [0, 1]}),
        {"data": PIXELS[:, :10], "labels": [0, 1]},
        {"data": PIXELS.astype(np.int8), "labels": [0, 1]},
        {"data": np.asfortranarray(PIXELS), "labels": [0, 1]},
    ],
    ids=repr,
)
def test_pickles_that_are_no_batch(fake: Fake, batch: object) -> None:
    fake.files[True]["data_batch_3"] = pickle.dumps(batch, protocol=2)
    fake.pack(True)
    fake.assert_refused("cifar-10-batches-py/data_batch_3 is not a batch of CIFAR's: ")


@pytest.mark.parametrize("content", [b"", b"\x80", b"garbage", b"\x80\x02}q\x01."])
def test_bytes_that_are_no_pickle(fake: Fake, content: bytes) -> None:
    fake.files[True]["data_batch_3"] = content
    fake.pack(True)
    fake.assert_refused("data_batch_3 is not a batch of CIFAR's: ")


def test_wrong_labels_and_sizes_in_the_binary_form(fake: Fake) -> None:
    good = fake.files[False]["test_batch.bin"]
    for content, message in (
        (b"\x0a" + good[1:], r"its labels must be from 0 to 9, but they are from \d to 10"),
        (good[:-1], f"{len(good) - 1} bytes are no multiple of 3073"),
        (b"", "its labels must be from 0 to 9, but they are none"),
    ):
        fake.files[False]["test_batch.bin"] = content
        fake.pack(False)
        fake.assert_refused(f"cifar-10-batches-bin/test_batch.bin is not a batch of CIFAR's: {message}")


REDIRECTS = {
    "to a file": "file:///etc/passwd",
    "to nonsense": "http://[::1",
    "to no host": "http://" + "a" * 70 + ".invalid/",
    "in a circle": "/cifar-10-binary.tar.gz",
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends `content`, spoiled in the way that `mood` says; hangs until `over`."""

    def __init__(self, content: bytes, mood: str, asked: list[str], over: threading.Event, *rest: Any) -> None:
        self.content, self.mood, self.asked, self.over = content, mood, asked, over
        super().__init__(*rest)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        content = self.content
        if self.mood in REDIRECTS:
            self.send_response(302)
            self.send_header("Location", REDIRECTS[self.mood])
            self.end_headers()
            return
        if self.mood == "silent":
            self.over.wait()
            return
        if self.mood == "absent":
            self.send_error(404, "Not Found")
            return
        if self.mood == "flipped":
            content = content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]
        if self.mood == "page":
            content = b"<html>please log in</html>"
        if self.mood == "endless":
            content = content + bytes(10_000_000)
        self.send_response(200)
        if self.mood != "no length":
            self.send_header("Content-Length", {"odd length": "-7"}.get(self.mood, str(len(content))))
        self.end_headers()
        try:
            if self.mood in ("stops", "hangs"):
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                if self.mood == "hangs":
                    self.over.wait()
            else:
                self.wfile.write(content)
        except OSError:  # the other side had enough
            pass

    def log_message(self, *_: object) -> None:
        """Nothing."""


class Server:
    """Gives one set's archive away on this machine."""

    def __init__(self, content: bytes) -> None:
        self.asked: list[str] = []
        self.content = content
        self.over = threading.Event()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
        self.mood("kind")
        threading.Thread(target=functools.partial(self.server.serve_forever, 0.01), daemon=True).start()

    def mood(self, mood: str) -> None:
        self.server.RequestHandlerClass = functools.partial(  # type: ignore
            Handler, self.content, mood, self.asked, self.over
        )


@pytest.fixture
def server(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(fake.patch(False))
    monkeypatch.setattr(cifar, "SOURCE", f"http://127.0.0.1:{server.server.server_port}/")
    yield server
    server.over.set()
    server.server.shutdown()
    server.server.server_close()


@pytest.mark.parametrize("mood", ["kind", "no length", "odd length"])
def test_download(fake: Fake, server: Server, mood: str, caplog: pytest.LogCaptureFixture) -> None:
    server.mood(mood)
    fake.assert_read()
    assert [path.name for path in fake.folder.iterdir()] == ["cifar-10-binary.tar.gz"]
    fake.assert_read()
    assert server.asked == ["/cifar-10-binary.tar.gz"]
    assert [record.getMessage().split()[0] for record in caplog.records] == ["downloading"]


@pytest.mark.parametrize(
    ("mood", "message"),
    [
        ("absent", "cannot download .*/cifar-10-binary.tar.gz: the server says 404 Not Found"),
        ("flipped", r"what came from http://127.*/cifar-10-binary.tar.gz is damaged \(its SHA256 is wrong\)"),
        ("page", r"what came from http.* has 26 bytes, expected \d+"),
        ("stops", r"what came from http.* has \d+ bytes, expected \d+|IncompleteRead"),
        ("hangs", "cannot download .*timed out"),
        ("silent", "cannot download .*timed out"),
        ("to a file", "cannot download .*[Rr]edirection to url 'file:///etc/passwd' is not allowed"),
        ("to nonsense", "cannot download .*Invalid IPv6 URL"),
        ("to no host", "cannot download "),
        ("in a circle", "cannot download .*infinite loop"),
        ("endless", r"what came from http.* has \d+ bytes, expected \d+"),
    ],
)
def test_bad_servers_leave_nothing(
    fake: Fake, server: Server, mood: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.mood(mood)
    with monkeypatch.context() as patch:
        if mood in ("hangs", "silent"):  # else a slow machine would be taken for one of these
            patch.setattr(published, "_TIMEOUT_S", 0.3)
        fake.assert_refused(f"({message}).*; get http.* by other means, put it into .*data, and run this again$")
    assert not fake.folder.exists() or not list(fake.folder.iterdir())
    server.mood("kind")
    fake.assert_read()


def test_no_network(fake: Fake) -> None:
    fake.assert_refused(
        "cannot download .*: Connection refused; get http://127.0.0.1:9/cifar-10-binary.tar.gz by other"
    )
    assert not fake.folder.exists()


def test_a_part_left_by_a_kill_is_no_data_and_is_replaced(fake: Fake, server: Server) -> None:
    fake.folder.mkdir()
    (fake.folder / "cifar-10-binary.tar.gz.part").write_bytes(server.content[:-1])
    fake.assert_read()
    assert [path.name for path in fake.folder.iterdir()] == ["cifar-10-binary.tar.gz"]


def test_interrupted_download_leaves_nothing(fake: Fake, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fake.read()
    assert not list(fake.folder.iterdir())


def test_a_disk_that_fills_up(fake: Fake, server: Server) -> None:
    """A limit on the size of files stands for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        fake.assert_refused("cannot download .*: File too large; get ")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(fake.folder.iterdir())
    fake.assert_read()


def test_download_to_a_place_that_cannot_be_written(fake: Fake, server: Server) -> None:
    fake.folder.write_text("a file")
    fake.assert_refused("cannot download .*: File exists; get ")
    fake.folder.unlink()
    fake.folder.mkdir()
    (fake.folder / "cifar-10-binary.tar.gz.part").mkdir()
    fake.assert_refused("cannot download .*: Is a directory; get ")


def test_train_on_cifar_end_to_end(
    fake: Fake, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloads, trains two epochs, and goes on from a checkpoint in another working folder."""
    monkeypatch.chdir(tmp_path)
    options = ["--model", "simple_cnn", "--width", "0.125", "--lr", "0.01", "--batch-size", "32"]
    run = ["train", "--data", "cifar10", "--data-dir", "data", *options, "--epochs", "2", "--device", "cpu"]
    assert cli.main([*run, "--out", "run"]) == 0
    printed = capsys.readouterr().out
    assert "cifar10: 100 training and 20 test images, 3 x 32 x 32" in printed
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data_dir"] == str(tmp_path / "data")
    assert (config["flip"], config["label_smoothing"], config["epochs"]) == (True, 0.1, 2)
    monkeypatch.chdir(tmp_path / "run")
    assert cli.main(["train", "--resume", "."]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == printed.splitlines()[-1]
    (tmp_path / "data" / "cifar-10-binary.tar.gz").write_bytes(b"damaged")
    assert cli.main(["train", "--resume", "."]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cnnops: error: ") and error.count("\n") == 1 and "has 7 bytes" in error

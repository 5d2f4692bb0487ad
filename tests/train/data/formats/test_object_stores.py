"""hf://, s3:// and gs://: a folder is found and read, what fails for a moment is asked again, the rest is said."""

import json
import pickle
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from train.data.formats.storage import Storage
from train.data.formats.storage_errors import MissingFile, StorageError
from train.data.index import open_images
from train.data.readers import ImageDataset

from ..picture_files import grey_tar, plain, sentence, write_parquet
from .mds_files import write_mds

ROOT = Path(__file__).resolve().parents[4]


class Bucket(MemoryFileSystem):  # type: ignore[misc]
    """A bucket in memory that fails as often as it is told."""

    protocol = "s3"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    faults: list[Exception] = []  # noqa: RUF012
    asked: list[tuple[str, int, int]] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).partition("://")[2].strip("/") if "://" in str(path) else "/" + str(path).strip("/")

    def cat_file(self, path: str, start: Any = None, end: Any = None, **more: Any) -> Any:
        if self.faults:
            raise self.faults.pop(0)
        self.asked.append((path, start, end))
        return super().cat_file(path, start, end)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> type[Bucket]:
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Bucket)
    monkeypatch.setattr("time.sleep", lambda _: None)
    for held in (Bucket.store, Bucket.faults, Bucket.asked):
        held.clear()
    return Bucket


def put(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            Bucket().pipe_file(f"s3://data/set/{file.relative_to(folder).as_posix()}", file.read_bytes())


def pixels(path: str | Path, **options: Any) -> list[Any]:
    dataset = ImageDataset(open_images(path, **options), height=8, width=8, seed=0, shuffle=False)
    return [(example.caption, example.image.tolist()) for example in (dataset[n] for n in range(len(dataset)))]


@pytest.mark.parametrize("kind", ["parquet", "tar", "mds"])
def test_a_folder_in_a_bucket_is_what_it_is_on_a_disk(tmp_path: Path, bucket: type[Bucket], kind: str) -> None:
    if kind == "parquet":
        for n in range(2):
            write_parquet(tmp_path / f"data/train-{n}.parquet", 6, first=6 * n)
    elif kind == "tar":
        grey_tar(tmp_path / "train-0.tar", 6)
    else:
        samples = [{"image": plain(40 * n), "caption": f"grey {n}".encode()} for n in range(6)]
        write_mds(tmp_path, {"image": "png", "caption": "str"}, [samples[:3], samples[3:]])
    (tmp_path / ".hidden.parquet").write_bytes(b"no parquet")
    put(tmp_path)
    options = {"caption_columns": ("txt",)} if kind == "tar" else {}
    assert pixels("s3://data/set", **options) == pixels(tmp_path, **options)
    assert all(end is not None and start is not None for _, start, end in bucket.asked), "whole files were read"


def test_a_pattern_and_a_file_in_a_bucket(tmp_path: Path, bucket: type[Bucket]) -> None:
    for n in range(2):
        write_parquet(tmp_path / f"train-{n}.parquet", 6, first=6 * n)
    put(tmp_path)
    assert pixels("s3://data/set/train-{0..1}.parquet") == pixels(tmp_path)
    assert pixels("s3://data/set/train-1.parquet") == pixels(tmp_path / "train-1.parquet")


def test_what_fails_for_a_moment_is_asked_again(tmp_path: Path, bucket: type[Bucket]) -> None:
    write_parquet(tmp_path / "train.parquet", 6)
    put(tmp_path)
    expected = pixels(tmp_path)
    bucket.faults.extend([OSError("connection reset"), TimeoutError("read"), OSError("slow down")])
    assert pixels("s3://data/set") == expected
    bucket.faults.extend(OSError("connection reset by user:secret@host") for _ in range(9))
    message = sentence(lambda: Storage(tries=3).read("s3://data/set/train.parquet", 0, 4))
    assert "could not be read in 3 tries (last: connection reset" in message


def test_what_will_not_pass_is_said_at_once(tmp_path: Path, bucket: type[Bucket]) -> None:
    write_parquet(tmp_path / "train.parquet", 6)
    put(tmp_path)
    storage = Storage()
    assert "nothing at s3://data/other" in sentence(lambda: open_images("s3://data/other"))
    with pytest.raises(MissingFile, match=r"no s3://data/set/absent\.parquet"):
        storage.size("s3://data/set/absent.parquet")
    bucket.faults.append(PermissionError("Forbidden"))
    with pytest.raises(StorageError, match=r"may not be read \(Forbidden\); set up ~/\.aws"):
        storage.read("s3://data/set/train.parquet", 0, 4)
    bucket.faults.append(ValueError("a fault of the library"))
    with pytest.raises(StorageError, match="cannot be read"):
        storage.read("s3://data/set/train.parquet", 0, 4)
    assert storage.read("s3://data/set/train.parquet", 0, 4) == b"PAR1"
    bucket().pipe_file("s3://data/pictures/1.png", b"x")
    assert "make shards of single pictures first" in sentence(lambda: open_images("s3://data/pictures"))


def test_a_storage_goes_to_another_process_without_its_connections(tmp_path: Path, bucket: type[Bucket]) -> None:
    write_parquet(tmp_path / "train.parquet", 6)
    put(tmp_path)
    storage = Storage()
    assert storage.size("s3://data/set/train.parquet") > 0
    assert pickle.loads(pickle.dumps(storage))._state is None


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_library_that_is_not_installed_is_named_with_its_extra(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    extra = {"s3": "s3, or pip install s3fs", "gs": "gcs, or pip install gcsfs"}[scheme]
    message = sentence(lambda: open_images(f"{scheme}://data/set"))
    assert message.endswith(f"is not installed; uv sync --extra {extra}")


# --- the hub ------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of huggingface.co as reading a data set asks for."""

    folder: Path
    ranges: list[str] = []  # noqa: RUF012
    refuse = 0

    def do_GET(self) -> None:
        place = self.path.partition("?")[0]
        if "/someone/gated" in place:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "accept the terms"})
        if "/someone/pictures" not in place:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "/resolve/" in place:
            return self._file(place.rpartition("/main/")[2])
        if "/tree/" in place:
            return self._send(200, json.dumps(self._listed()).encode())
        return self._send(200, json.dumps({"id": "someone/pictures", "sha": "0" * 40, "siblings": []}).encode())

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self._send(200, json.dumps([told for told in self._listed() if told["path"].split("/")[-1] in asked]).encode())

    def _listed(self) -> list[dict[str, Any]]:
        files = sorted(file for file in self.folder.rglob("*") if file.is_file())
        return [
            {"type": "file", "path": f.relative_to(self.folder).as_posix(), "size": f.stat().st_size, "oid": "0" * 40}
            for f in files
        ]

    def _file(self, name: str) -> None:
        if Hub.refuse:
            Hub.refuse -= 1
            return self._send(503, b"")
        content, asked = (self.folder / name).read_bytes(), self.headers.get("Range", "")
        Hub.ranges.append(asked)
        if not asked:
            return self._send(200, content)
        first, last = (int(word) for word in asked.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        return self._send(206, part, {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(content)}"})

    def _send(self, status: int, body: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "ETag": '"0"',
            "X-Repo-Commit": "0" * 40,
            **(more or {}),
        }.items():  # noqa: E501
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


PROGRAM = """
import json, sys
from train.data.index import open_images
from train.data.readers import ImageDataset
from train.errors import UserError
try:
    dataset = ImageDataset(open_images(sys.argv[1]), height=8, width=8, seed=0, shuffle=False)
    print(json.dumps([(dataset[n].caption, dataset[n].image.tolist()) for n in range(len(dataset))]))
except UserError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.timeout(180)
def test_a_data_set_of_the_hub_is_read_by_ranges_and_prepared(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("prepared")
    write_parquet(tmp_path / "data/train-0.parquet", 6)
    Hub.folder, Hub.refuse = tmp_path, 1
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "PATH": "", "HF_HOME": str(tmp_path)}

    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def told(path: str) -> Any:
        return json.loads(run("-c", PROGRAM, path).splitlines()[-1])

    try:
        expected = json.loads(json.dumps(pixels(tmp_path / "data")))
        assert told("hf://datasets/someone/pictures") == expected
        assert np.array([bool(asked) for asked in Hub.ranges]).all(), "a whole file was read"
        options = ["--sizes", "32", "--enlarge", "4", "--rows", "3", "--workers", "2"]
        run("train/prepare.py", "hf://datasets/someone/pictures", "--out", str(out), *options)
        prepared = open_images(out / "32")
        assert [prepared.row(n).columns["source"] for n in range(len(prepared))] == ["pictures"] * 6
        gated = told("hf://datasets/someone/gated")
        assert "hf://datasets/someone/gated" in gated
        assert "run `hf auth login` or set HF_TOKEN, and accept the terms" in gated
        absent = told("hf://datasets/someone/absent")
        assert "no hf://datasets/someone/absent that may be read" in absent
    finally:
        server.shutdown()

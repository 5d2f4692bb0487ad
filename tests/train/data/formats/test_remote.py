"""Data behind http: the same bytes as on the disk from a server that drops, stalls and refuses; a clear stop after."""

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from train.data.formats.storage import Storage
from train.data.index import open_images
from train.data.loader import Batch, batches, open_dataset
from train.ranks.parallel import World
from train.recipes import Recipe, prx_512

from ..picture_files import grey_tar, sentence, write_parquet

FAST = Storage(timeout=1.0, tries=4)


class Server(ThreadingHTTPServer):
    """Serves a folder by ranges; `faults` says what goes wrong with the n-th request, if anything."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.requests, self.ranges = folder, 0, True
        self.faults: dict[int, str] = {}
        self.always = ""
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        with self.server.lock:
            number, self.server.requests = self.server.requests, self.server.requests + 1
        fault = self.server.always or self.server.faults.get(number, "")
        file = self.server.folder / self.path.partition("?")[0].lstrip("/")
        if fault == "503":
            return self.send_error(503)
        if fault == "drop":
            self.connection.close()
            self.close_connection = True
            return None
        if not file.is_file():
            return self.send_error(404)
        content = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or not self.server.ranges:
            self.send_response(200)
            body = content
        elif int(asked[1]) >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            body = b""
        else:
            body = content[int(asked[1]) : int(asked[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(body) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = body[: len(body) // 2]
        if fault == "half":
            self.wfile.write(half)
            self.connection.close()
            self.close_connection = True
        elif fault == "stall":
            self.wfile.write(half)
            time.sleep(3.0)
            self.close_connection = True
        elif fault == "drip":
            for byte in body[:60]:
                time.sleep(0.05)
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
            self.close_connection = True
        else:
            self.wfile.write(body)
        return None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries are the library's; here they only must not cost the test time."""
    monkeypatch.setattr("urllib3.util.Retry.sleep", lambda *_: time.sleep(0.01))


FAULTS = ["drop", "503", "half", "stall", "drip"]


@pytest.mark.parametrize("fault", FAULTS)
def test_slow_or_failing_request_is_tried_again_and_gives_the_same_bytes(server: Server, fault: str) -> None:
    content = bytes(range(256)) * 400
    (server.folder / "a.bin").write_bytes(content)
    server.faults = {0: fault, 1: fault}
    assert FAST.read(f"{server.url}/a.bin", 1000, 50_000) == content[1000:51_000]
    assert server.requests == 3
    assert FAST.size(f"{server.url}/a.bin") == len(content)


@pytest.mark.parametrize("fault", FAULTS)
def test_server_that_stays_down_is_a_clear_stop_with_url_tries_and_reason(server: Server, fault: str) -> None:
    (server.folder / "a.bin").write_bytes(bytes(10_000))
    server.always = fault
    message = sentence(lambda: FAST.read(f"{server.url}/a.bin", 0, 9000))
    assert message.startswith(f"{server.url}/a.bin could not be read in 4 tries (last: ")
    assert ("503" in message) == (fault == "503")
    assert server.requests == 4


def test_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("urllib3.util.Retry.sleep", lambda self, *_: pauses.append(self.get_backoff_time()))
    server.always = "503"
    sentence(lambda: Storage(timeout=0.3, tries=6).read(f"{server.url}/a", 0, 1))
    for pause, least in zip(pauses[1:], (0.5, 1, 2, 4), strict=True):
        assert least <= pause <= least + 0.5
    assert len({pause % 0.5 for pause in pauses[1:]}) > 1


def test_no_server_at_all_is_a_clear_stop() -> None:
    message = sentence(lambda: Storage(timeout=0.2, tries=2).size("http://127.0.0.1:9/a.tar"))
    assert "http://127.0.0.1:9/a.tar could not be read in 2 tries" in message
    assert "refused" in message


def test_server_without_ranges_serves_small_files(server: Server) -> None:
    server.ranges = False
    grey_tar(server.folder / "a.tar", 3)
    index = open_images(f"{server.url}/a.tar", storage=FAST)
    assert index.row(2).columns["caption"] == "grey 2"
    assert server.requests == 1


def test_missing_remote_shard_is_left_out_and_all_missing_stop(server: Server) -> None:
    grey_tar(server.folder / "shard-1.tar", 3)
    (server.folder / "shard-2.tar").write_bytes(b"")
    index = open_images(f"{server.url}/shard-{{0..2}}.tar", storage=FAST)
    assert len(index) == 3
    assert "shard-0.tar cannot be read (HTTP 404 Not Found)" in index.problems[0]
    assert "shard-2.tar is empty (0 bytes)" in index.problems[1]
    for kind in ("tar", "parquet"):
        message = sentence(lambda kind=kind: open_images(f"{server.url}/x-{{0..2}}.{kind}", storage=FAST))  # type: ignore[misc]
        assert "x-0" in message
        assert "HTTP 404" in message


def test_signatures_of_addresses_are_in_no_message_key_or_fingerprint(server: Server) -> None:
    for number in range(2):
        grey_tar(server.folder / f"{number}.tar", 3)
        write_parquet(server.folder / f"{number}.parquet", 3)
    for kind in ("tar", "parquet"):
        signed, plain = (open_images(f"{server.url}/{{0..2}}.{kind}{q}", storage=FAST) for q in ("?sig=SECRET", ""))
        assert signed.row(4) == plain.row(4)
        assert signed.fingerprint == plain.fingerprint
        assert "SECRET" not in f"{signed.path} {signed.problems} {signed.row(4).key}"
    server.always = "503"
    assert "SECRET" not in sentence(lambda: FAST.size(f"{server.url}/new.tar?sig=SECRET"))


def recipe(path: str, **data: Any) -> Recipe:
    made = prx_512()
    settings = {"path": path, "height": 32, "width": 32, "workers": 0, "timeout": 0.3, "tries": 4, **data}
    return replace(made, data=replace(made.data, **settings), train=replace(made.train, steps=6, batch=4))


def read(made: Recipe) -> list[Batch]:
    return list(batches(open_dataset(made.data, 0, 8), made, World(0, 1, torch.device("cpu")), 0))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_training_data_equal_the_local_ones_bit_for_bit_through_faults(server: Server, kind: str) -> None:
    for number in range(3):
        name = server.folder / f"train-{number:03d}.{kind}"
        if kind == "tar":
            grey_tar(name, 6, first=6 * number, size=(30, 60) if number else (50, 50))
        else:
            write_parquet(name, 6, first=6 * number)
    pattern = f"train-{{000..002}}.{kind}"
    local = read(recipe(f"{server.folder}/{pattern}"))
    server.faults = {number: FAULTS[number % 4] for number in range(2, 60, 5)}
    remote = read(recipe(f"{server.url}/{pattern}"))
    assert server.requests > 10
    assert len(local) == len(remote) == 6
    for a, b in zip(local, remote, strict=True):
        assert torch.equal(a.image, b.image)
        assert a.captions == b.captions
        assert not b.substituted


def test_workers_read_a_remote_set_and_hand_on_the_sentence_of_a_stop(server: Server) -> None:
    grey_tar(server.folder / "a.tar", 8)
    made = recipe(f"{server.url}/a.tar", workers=2)
    local = read(recipe(f"{server.folder}/a.tar"))
    assert all(torch.equal(a.image, b.image) for a, b in zip(local, read(made), strict=True))
    dataset = open_dataset(made.data, 0, 8)
    server.always = "503"
    message = sentence(lambda: list(batches(dataset, made, World(0, 1, torch.device("cpu")), 0)))
    assert message.startswith(f"{server.url}/a.tar could not be read in 4 tries (last: HTTP 503")


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_server_that_goes_down_stops_a_run_and_substitutes_nothing(server: Server, kind: str) -> None:
    name = server.folder / f"train.{kind}"
    grey_tar(name, 8) if kind == "tar" else write_parquet(name, 8)
    made = recipe(f"{server.url}/train.{kind}")
    dataset = open_dataset(made.data, 0, 8)
    server.always = "drop"
    message = sentence(lambda: list(batches(dataset, made, World(0, 1, torch.device("cpu")), 0)))
    assert f"train.{kind} could not be read in 4 tries" in message

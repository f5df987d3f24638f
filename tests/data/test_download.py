import gc
import hashlib
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from densely.data import download as module
from densely.data.download import download, has_digest
from densely.errors import DataError

CONTENT = bytes(range(256)) * 4000  # 1 MB: several chunks
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()
HALF = len(CONTENT) // 2


class Handler(BaseHTTPRequestHandler):
    """Answers by path; `server.asked` notes each path with its Range."""

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append((self.path, asked))
        begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if self.path == "/missing":
            self.send_error(404)
        elif self.path == "/wrong":
            self.answer(200, CONTENT[::-1])
        elif self.path == "/no-range":
            self.answer(200, CONTENT)
        elif begin >= len(CONTENT):
            self.send_error(416)
        elif self.path == "/cut":
            self.answer(206 if asked else 200, CONTENT[begin:], send=HALF)
        elif self.path == "/stalls":
            self.answer(206 if asked else 200, CONTENT[begin:], send=HALF)
            self.server.released.wait(timeout=10)
        else:
            self.answer(206 if asked else 200, CONTENT[begin:])

    def answer(self, status: int, body: bytes, send: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:send])

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str | None]] = []
        self.released = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def silent_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a server that takes connections and never says a word."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/file"


@pytest.fixture
def unresolved_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a server whose name is looked up without end."""
    released = threading.Event()

    def never(*args: object, **kwargs: object) -> list[tuple[object, ...]]:
        released.wait(timeout=10)
        raise socket.gaierror("no name server")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", never)
    yield "http://nowhere.invalid/file"
    released.set()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "made" / "on the way" / "file.gz"


def part_of(target: Path, content: bytes) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.write_bytes(content)
    return part


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_digests_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    path = tmp_path / "file"
    for right in ("md5:900150983cd24fb0d6963f7d28e17f72", "sha256:ba7816bf8f01cfea", "sha256:b"):
        assert has_digest(path, right)  # RFC 1321, FIPS 180-2
    for wrong in ("md5:900150983cd24fb0d6963f7d28e17f73", "sha256:ba7816bf8f01cfeb", "sha256:"):
        assert not has_digest(path, wrong)


def test_file_arrives_and_nothing_else(server: Server, target: Path) -> None:
    download([server.url("/good")], target, MD5)
    assert target.read_bytes() == CONTENT
    assert names(target.parent) == ["file.gz"]
    assert server.asked == [("/good", None)]


def test_mirrors_are_tried_in_turn_until_one_is_good(server: Server, target: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        refused = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    paths = ["/missing", "/wrong", "/good", "/never-needed"]
    download([refused, *map(server.url, paths)], target, MD5)
    assert target.read_bytes() == CONTENT
    assert server.asked == [("/missing", None), ("/wrong", None), ("/good", None)]


def test_each_mirrors_reason_is_named(server: Server, target: Path) -> None:
    with pytest.raises(DataError, match=r"file\.gz .*Not Found.*MD5"):
        download([server.url("/missing"), server.url("/wrong")], target, MD5)


def test_wrong_content_leaves_nothing(server: Server, target: Path) -> None:
    with pytest.raises(DataError, match="MD5"):
        download([server.url("/wrong")], target, MD5)
    assert names(target.parent) == []


def test_cut_download_goes_on_in_the_next_call(server: Server, target: Path) -> None:
    with pytest.raises(DataError, match="cut"):
        download([server.url("/cut")], target, MD5)
    assert names(target.parent) == ["file.gz.part"]
    download([server.url("/good")], target, MD5)
    assert target.read_bytes() == CONTENT
    assert names(target.parent) == ["file.gz"]
    assert server.asked == [("/cut", None), ("/good", f"bytes={HALF}-")]


def test_cut_download_goes_on_with_the_next_mirror(server: Server, target: Path) -> None:
    download([server.url("/cut"), server.url("/good")], target, MD5)
    assert target.read_bytes() == CONTENT
    assert server.asked == [("/cut", None), ("/good", f"bytes={HALF}-")]


def test_pause_ends_an_attempt_and_keeps_what_came(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALL_SECONDS", 0.3)
    start = time.monotonic()
    download([server.url("/stalls"), server.url("/good")], target, MD5)
    assert time.monotonic() - start < 5  # the server itself would pause for 10
    assert target.read_bytes() == CONTENT
    _, (path, asked) = server.asked
    assert path == "/good"
    assert asked is not None
    assert 0 < int(asked.removeprefix("bytes=").removesuffix("-")) <= HALF


@pytest.mark.parametrize(
    ("path", "have"), [("/missing", b""), ("/missing", b"start"), ("/good", CONTENT)]
)
def test_refusals_leave_no_connection_open(
    server: Server, target: Path, path: str, have: bytes
) -> None:
    part_of(target, have)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with suppress(DataError):
            download([server.url(path)], target, MD5)
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


def test_server_that_knows_no_range_sends_all_again(server: Server, target: Path) -> None:
    part_of(target, CONTENT[:1000])
    download([server.url("/no-range")], target, MD5)
    assert target.read_bytes() == CONTENT
    assert server.asked == [("/no-range", "bytes=1000-")]


def test_part_that_is_already_whole_becomes_the_target(server: Server, target: Path) -> None:
    part_of(target, CONTENT)
    download([server.url("/good")], target, MD5)
    assert target.read_bytes() == CONTENT
    assert names(target.parent) == ["file.gz"]


@pytest.mark.parametrize("stale", [b"<html>" * 100, CONTENT + b"more"])
def test_part_of_another_file_does_not_stay_in_the_way(
    server: Server, target: Path, stale: bytes
) -> None:
    part_of(target, stale)
    with suppress(DataError):
        download([server.url("/good")], target, MD5)
    download([server.url("/good")], target, MD5)
    assert target.read_bytes() == CONTENT


def test_replaced_file_is_kept_as_damaged(server: Server, target: Path) -> None:
    part_of(target, b"").unlink()
    target.write_bytes(b"broken")
    download([server.url("/good")], target, MD5)
    assert target.read_bytes() == CONTENT
    assert target.with_name("file.gz.damaged").read_bytes() == b"broken"


def test_failed_download_leaves_the_old_file(server: Server, target: Path) -> None:
    part_of(target, b"").unlink()
    target.write_bytes(b"broken")
    with pytest.raises(DataError):
        download([server.url("/wrong"), server.url("/missing")], target, MD5)
    assert target.read_bytes() == b"broken"
    assert names(target.parent) == ["file.gz"]


@pytest.mark.parametrize("kind", ["silent_url", "unresolved_url"])
def test_mirrors_that_never_answer_are_given_up_within_the_limit_for_all(
    request: pytest.FixtureRequest, target: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    url = request.getfixturevalue(kind)
    monkeypatch.setattr(module, "CONNECT_SECONDS", 1.2)
    start = time.monotonic()
    with pytest.raises(DataError, match="no answer"):
        download([url, url], target, MD5)
    assert 1.0 < time.monotonic() - start < 2.2  # each having the whole limit would take 2.4


def test_silent_mirror_leaves_time_for_the_next(
    server: Server, silent_url: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECT_SECONDS", 1.2)
    start = time.monotonic()
    download([silent_url, server.url("/good")], target, MD5)
    assert time.monotonic() - start < 1.2
    assert target.read_bytes() == CONTENT

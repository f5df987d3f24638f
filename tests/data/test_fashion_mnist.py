import gzip
import hashlib
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from densely.data import download, fashion_mnist
from densely.data.dataset import Splits
from densely.data.fashion_mnist import load_fashion_mnist
from densely.errors import DataError

OFFICIAL_MD5 = {  # from the README of github.com/zalandoresearch/fashion-mnist
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
NAMES = list(OFFICIAL_MD5)
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES
COUNT = {"train": 12, "t10k": 10}


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@cache
def made_up() -> dict[str, bytes]:
    """Unpacked contents of a data set like the real one, only smaller."""
    rng = np.random.default_rng(0)
    contents = {}
    for part, count in COUNT.items():
        contents[f"{part}-images-idx3-ubyte.gz"] = idx(rng.integers(0, 256, (count, 28, 28)))
        contents[f"{part}-labels-idx1-ubyte.gz"] = idx(np.arange(count) % 10)
    return contents


def write(folder: Path, *, packed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in made_up().items():
        if packed:
            (folder / name).write_bytes(gzip.compress(content, mtime=0))
        else:
            (folder / name.removesuffix(".gz")).write_bytes(content)
    return folder


def assert_is_made_up(splits: Splits) -> None:
    for part, name in ((splits.train, "train"), (splits.test, "t10k")):
        assert part.images.shape == (COUNT[name], 1, 28, 28)
        assert part.images.numpy().tobytes() == made_up()[f"{name}-images-idx3-ubyte.gz"][16:]
        assert part.labels.tolist() == [i % 10 for i in range(COUNT[name])]


def assert_refused(data_dir: Path | None, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        load_fashion_mnist(data_dir)
    for word in words:
        assert word in str(caught.value)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def made_up_is_official(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expect the made-up files; their only mirror refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    digests = {
        name: hashlib.md5(gzip.compress(content, mtime=0)).hexdigest()
        for name, content in made_up().items()
    }
    monkeypatch.setattr(fashion_mnist, "COUNT", COUNT)
    monkeypatch.setattr(fashion_mnist, "MD5", digests)
    monkeypatch.setattr(fashion_mnist, "MIRRORS", (nobody,))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def mirror(
    made_up_is_official: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Folder that a second mirror serves, the first one refusing connections."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    folder = write(tmp_path / "mirror")
    handler = partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(fashion_mnist, "MIRRORS", (*fashion_mnist.MIRRORS, address))
        yield folder
        server.shutdown()
        thread.join()


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """Folder in the cache that downloads go to."""
    return tmp_path / "cache" / "densely" / "fashion-mnist"


def test_the_real_files(fashion_mnist_dir: Path) -> None:
    splits = load_fashion_mnist(fashion_mnist_dir)
    assert splits.name == "fashion-mnist"
    assert splits.validation is None
    for part, each in ((splits.train, 6000), (splits.test, 1000)):
        assert part.images.shape == (10 * each, 1, 28, 28)
        assert part.images.dtype == torch.uint8
        assert part.labels.dtype == torch.int64
        assert part.labels.bincount().tolist() == [each] * 10
        assert (int(part.images.min()), int(part.images.max())) == (0, 255)
    # The well-known mean of the training pixels, 0.2860 of 255.
    assert abs(splits.train.images.sum().item() / (60_000 * 28 * 28 * 255) - 0.2860) < 5e-5
    assert splits.train.labels[:3].tolist() == [9, 0, 0]


def test_digests_are_those_of_the_real_files(fashion_mnist_dir: Path) -> None:
    for name, md5 in OFFICIAL_MD5.items():
        assert hashlib.md5((fashion_mnist_dir / name).read_bytes()).hexdigest() == md5


def test_digests_counts_and_class_names_are_the_published_ones() -> None:
    assert fashion_mnist.MD5 == OFFICIAL_MD5
    assert fashion_mnist.COUNT == {"train": 60_000, "t10k": 10_000}
    assert fashion_mnist.CLASSES == (
        "t-shirt", "trouser", "pullover", "dress", "coat",
        "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", [".", "fashion-mnist"])
@pytest.mark.parametrize("place", ["data_dir", "variable", "cache"])
@pytest.mark.usefixtures("made_up_is_official")
def test_found_in_each_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, below: str, packed: bool
) -> None:
    top = tmp_path / "cache" / "densely" if place == "cache" else tmp_path / "data"
    write(top / below, packed=packed)
    if place == "variable":
        monkeypatch.setenv("DENSELY_DATA", str(top))
    assert_is_made_up(load_fashion_mnist(top if place == "data_dir" else None))


@pytest.mark.parametrize("places", [("flag", "variable"), ("flag", "cache"), ("variable", "cache")])
@pytest.mark.usefixtures("made_up_is_official")
def test_the_first_place_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: Path, places: tuple[str, str]
) -> None:
    write(tmp_path / "flag", packed=False)
    write(tmp_path / "variable", packed=False)
    write(cached, packed=False)
    where = {"flag": tmp_path / "flag", "variable": tmp_path / "variable", "cache": cached}
    # The second place is readable too, and differs.
    labels = where[places[1]] / TEST_LABELS.removesuffix(".gz")
    labels.write_bytes(labels.read_bytes()[:-1] + b"\0")
    if "variable" in places:
        monkeypatch.setenv("DENSELY_DATA", str(tmp_path / "variable"))
    assert_is_made_up(load_fashion_mnist(tmp_path / "flag" if "flag" in places else None))


@pytest.mark.usefixtures("made_up_is_official")
def test_empty_data_dir_is_passed_over(tmp_path: Path, cached: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(cached)
    assert_is_made_up(load_fashion_mnist(tmp_path / "empty"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("mirror")
def test_incomplete_folder_is_refused_even_where_the_rest_could_be_had(
    tmp_path: Path, cached: Path, name: str
) -> None:
    (write(tmp_path / "data") / name).unlink()
    write(cached)
    assert_refused(tmp_path / "data", str(tmp_path / "data"), name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.usefixtures("mirror")
def test_truncated_file_is_named(tmp_path: Path, name: str, packed: bool) -> None:
    path = write(tmp_path / "data", packed=packed) / (name if packed else name.removesuffix(".gz"))
    path.write_bytes(path.read_bytes()[:-3])
    assert_refused(tmp_path / "data", str(path), "truncated")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.usefixtures("made_up_is_official")
def test_swapped_files_are_named(tmp_path: Path, packed: bool) -> None:
    folder = write(tmp_path / "data", packed=packed)
    images, labels = (
        folder / (name if packed else name.removesuffix(".gz"))
        for name in (TEST_IMAGES, TEST_LABELS)
    )
    images.rename(folder / "other")
    labels.rename(images)
    (folder / "other").rename(labels)
    assert_refused(folder, str(images), "swapped")


@pytest.mark.usefixtures("made_up_is_official")
def test_train_and_test_files_swapped_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    shutil.copy(folder / TEST_IMAGES, folder / TRAIN_IMAGES)
    assert_refused(folder, str(folder / TRAIN_IMAGES), "10x28x28", "12x28x28")


@pytest.mark.usefixtures("made_up_is_official")
def test_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "data") / TEST_LABELS
    path.write_bytes(gzip.compress(b"<!DOCTYPE html>"))
    assert_refused(tmp_path / "data", str(path), "magic")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("altered", [True, False])
@pytest.mark.usefixtures("made_up_is_official")
def test_unofficial_file_is_named(tmp_path: Path, name: str, altered: bool) -> None:
    path, content = write(tmp_path / "data") / name, made_up()[name]
    if altered:
        content = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes(gzip.compress(content, compresslevel=1, mtime=1))
    assert_refused(tmp_path / "data", str(path), "official")


@pytest.mark.usefixtures("made_up_is_official")
def test_unpacked_file_with_a_label_beyond_the_classes_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "data", packed=False) / TEST_LABELS.removesuffix(".gz")
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    assert_refused(tmp_path / "data", str(path), "10")


@pytest.mark.usefixtures("mirror")
def test_downloaded_to_the_cache_where_it_is_nowhere(cached: Path) -> None:
    assert_is_made_up(load_fashion_mnist())
    assert sorted(snapshot(cached)) == sorted(NAMES)


def test_downloaded_once(mirror: Path) -> None:
    load_fashion_mnist()
    shutil.rmtree(mirror)
    assert_is_made_up(load_fashion_mnist())


@pytest.mark.usefixtures("mirror")
def test_only_what_the_cache_lacks_is_downloaded(cached: Path, mirror: Path) -> None:
    (write(cached) / TEST_IMAGES).unlink()
    for name in set(NAMES) - {TEST_IMAGES}:
        (mirror / name).unlink()
    assert_is_made_up(load_fashion_mnist())


def test_download_with_another_digest_is_refused(mirror: Path, cached: Path) -> None:
    (mirror / TEST_LABELS).write_bytes(gzip.compress(made_up()[TEST_LABELS], mtime=1))
    assert_refused(None, TEST_LABELS, "MD5")
    assert TEST_LABELS not in snapshot(cached)


@pytest.mark.parametrize("length", [0, 20, -9])
@pytest.mark.usefixtures("mirror")
def test_broken_file_in_the_cache_is_replaced_and_kept(cached: Path, length: int) -> None:
    path = write(cached) / TEST_IMAGES
    broken = path.read_bytes()[:length]
    path.write_bytes(broken)
    assert_is_made_up(load_fashion_mnist())
    assert snapshot(cached)[f"{TEST_IMAGES}.damaged"] == broken


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.usefixtures("made_up_is_official")
def test_broken_file_in_the_cache_stays_where_no_download_is_possible(
    cached: Path, packed: bool
) -> None:
    path = write(cached, packed=packed) / (
        TEST_IMAGES if packed else TEST_IMAGES.removesuffix(".gz")
    )
    path.write_bytes(path.read_bytes()[:-5])
    before = snapshot(cached)
    assert_refused(None, str(path))
    assert snapshot(cached) == before


@pytest.mark.usefixtures("mirror")
def test_cache_that_cannot_be_written_is_named(cached: Path) -> None:
    cached.parent.parent.mkdir(parents=True)
    cached.parent.write_text("a file in the place of the folder")
    assert_refused(None, str(cached))


@pytest.mark.usefixtures("made_up_is_official")
def test_without_a_network_the_files_and_the_folder_are_named(cached: Path) -> None:
    assert_refused(None, *NAMES, str(cached), "--data-dir", "DENSELY_DATA")


def test_without_answers_it_ends_within_the_limit(
    monkeypatch: pytest.MonkeyPatch, cached: Path
) -> None:
    assert download.CONNECT_SECONDS <= 9  # 10 s are promised: a second for all else
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: released.wait(10) and [])
    monkeypatch.setattr(download, "CONNECT_SECONDS", 1.2)
    start = time.monotonic()
    assert_refused(None, *NAMES, str(cached))
    seconds = time.monotonic() - start
    released.set()
    assert seconds < 1.2 + 1

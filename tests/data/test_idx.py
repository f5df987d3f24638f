import gzip
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from densely.data.idx import read_idx
from densely.errors import DataError

SIZES = (3, 2, 4)
VALUES = bytes(range(24))


def idx(sizes: tuple[int, ...], values: bytes) -> bytes:
    return bytes((0, 0, 8, len(sizes))) + struct.pack(f">{len(sizes)}I", *sizes) + values


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def assert_refused(path: Path, *words: str, sizes: tuple[int, ...] = SIZES) -> None:
    with pytest.raises(DataError) as caught:
        read_idx(path, sizes)
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.fixture(params=["images", "images.gz"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


def test_last_dimension_runs_fastest(path: Path) -> None:
    values = read_idx(write(path, idx((2, 3), bytes((1, 2, 3, 4, 5, 255)))), (2, 3))
    assert values.dtype == np.uint8
    assert values.tolist() == [[1, 2, 3], [4, 5, 255]]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(["round-trip", "round-trip.gz"]),
)
def test_random_arrays_come_back(
    tmp_path_factory: pytest.TempPathFactory, sizes: tuple[int, ...], seed: int, name: str
) -> None:
    array = np.random.default_rng(seed).integers(0, 256, sizes, dtype=np.uint8)
    path = write(tmp_path_factory.getbasetemp() / name, idx(sizes, array.tobytes()))
    np.testing.assert_array_equal(read_idx(path, sizes), array)


def test_values_may_be_written_to(path: Path) -> None:
    values = read_idx(write(path, idx(SIZES, VALUES)), SIZES)
    values[0, 0, 0] = 9
    assert values[0, 0, 0] == 9


def test_every_truncation_of_the_content_is_refused(path: Path) -> None:
    whole = idx(SIZES, VALUES)
    for length in range(len(whole)):
        assert_refused(write(path, whole[:length]), "truncated")


def test_every_truncation_of_the_gzip_file_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "images.gz", gzip.compress(idx(SIZES, VALUES))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert_refused(path)


def test_gzip_of_other_content_than_its_checksum_says_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "images.gz", bytearray(gzip.compress(idx(SIZES, VALUES)))
    whole[-8] ^= 1  # first byte of the CRC
    path.write_bytes(whole)
    assert_refused(path, "damaged")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"\x1f\x8b" + b"\xff" * 30])
def test_garbage_instead_of_gzip_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    assert_refused(path)


@pytest.mark.parametrize("magic", [b"\0\0\x0d\x03", b"\0\1\x08\x03", b"\0\0\x08\x02", b"<htm"])
def test_wrong_magic_number_is_refused(path: Path, magic: bytes) -> None:
    assert_refused(write(path, magic + idx(SIZES, VALUES)[4:]), "magic", magic.hex())


def test_labels_in_place_of_images_are_called_swapped(path: Path) -> None:
    assert_refused(write(path, idx((24,), VALUES)), "swapped", "labels")


def test_images_in_place_of_labels_are_called_swapped(path: Path) -> None:
    assert_refused(write(path, idx(SIZES, VALUES)), "swapped", "images", sizes=(24,))


@pytest.mark.parametrize("sizes", [(2, 2, 4), (3, 4, 2), (2**32 - 1,) * 3])
def test_other_counts_than_expected_are_refused(path: Path, sizes: tuple[int, ...]) -> None:
    assert_refused(write(path, idx(sizes, VALUES)), "x".join(map(str, sizes)), "3x2x4")


def test_bytes_after_the_values_are_refused(path: Path) -> None:
    assert_refused(write(path, idx(SIZES, VALUES + b"\0")), "more bytes")


def test_missing_file_is_refused(path: Path) -> None:
    assert_refused(path)


def test_folder_in_place_of_the_file_is_refused(path: Path) -> None:
    path.mkdir()
    assert_refused(path)


@pytest.mark.parametrize("claimed", [SIZES, (200_000, 10, 100)])
def test_a_bomb_is_never_unpacked(tmp_path: Path, claimed: tuple[int, ...]) -> None:
    path, packer = tmp_path / "bomb.gz", zlib.compressobj(level=1, wbits=31)
    packed = packer.compress(idx(claimed, b""))
    packed += b"".join(packer.compress(bytes(10**7)) for _ in range(20)) + packer.flush()
    path.write_bytes(packed)
    tracemalloc.start()
    try:
        assert_refused(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_000_000


@settings(max_examples=150, deadline=None)
@given(
    content=st.binary(max_size=80)
    | st.binary(max_size=40).map(lambda tail: idx(SIZES, b"")[: len(tail)] + tail),
    name=st.sampled_from(["random", "random.gz"]),
    packed=st.booleans(),
)
def test_random_bytes_raise_nothing_but_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str, packed: bool
) -> None:
    assume(not content.startswith(idx(SIZES, b"")) or len(content) != len(idx(SIZES, VALUES)))
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(gzip.compress(content) if packed else content)
    assert_refused(path)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_one_changed_byte_of_a_gzip_file_never_changes_the_values(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    content = bytearray(gzip.compress(idx(SIZES, VALUES)))
    content[position % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "changed.gz"
    path.write_bytes(content)
    try:
        values = read_idx(path, SIZES)
    except DataError:
        return
    assert values.tobytes() == VALUES

"""Reader of IDX, the file format of MNIST and its relatives, plain or gzipped.

    bytes 0-1   zero
    byte  2     type of the values; 8 is uint8
    byte  3     number of dimensions, d
    then        d sizes, big-endian uint32; then the values, last dimension fastest

Source: LeCun, Cortes, Burges, "The MNIST database", section "file formats".
"""

import gzip
import math
import struct
import zlib
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from densely.errors import DataError

UINT8 = 8


def read_idx(path: Path, sizes: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read a uint8 IDX file whose sizes are known beforehand.

    No more than the expected number of bytes is ever unpacked, whatever the file claims.

    Args:
        path: the file; gzipped where its name ends in `.gz`.
        sizes: what the file must hold: (60000, 28, 28) for images, (60000,) for labels.

    Raises:
        DataError: the file is truncated, no IDX file, or holds something else; it is named.
    """
    try:
        with path.open("rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            return _read(file, path, sizes)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated or damaged ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read(
    file: gzip.GzipFile | BufferedReader, path: Path, sizes: tuple[int, ...]
) -> NDArray[np.uint8]:
    dimensions = len(sizes)
    magic = file.read(4)
    expected = bytes((0, 0, UINT8, dimensions))
    if len(magic) < 4:
        raise DataError(f"{path}: truncated: it ends within its header; fetch it again")
    if magic != expected:
        kinds = {1: "labels", 3: "images"}
        hint = "is this an IDX file?"
        if magic[:3] == expected[:3] and magic[3] in kinds:
            hint = f"it holds {kinds[magic[3]]}: were two files swapped?"
        raise DataError(
            f"{path}: wrong magic number {magic.hex()}, expected {expected.hex()} "
            f"({kinds.get(dimensions, 'values')}); {hint}"
        )
    header = file.read(4 * dimensions)
    if len(header) < 4 * dimensions:
        raise DataError(f"{path}: truncated: it ends within its header; fetch it again")
    found = struct.unpack(f">{dimensions}I", header)
    if found != sizes:
        raise DataError(
            f"{path}: holds {_by(found)} values, expected {_by(sizes)}; is it the right file?"
        )
    count = math.prod(sizes)
    values = file.read(count + 1)
    if len(values) < count:
        raise DataError(
            f"{path}: truncated: {len(values)} of {count} values are there; fetch it again"
        )
    if len(values) > count:
        raise DataError(f"{path}: more bytes follow the {count} values; fetch it again")
    return np.frombuffer(bytearray(values), dtype=np.uint8).reshape(sizes)


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in sizes)

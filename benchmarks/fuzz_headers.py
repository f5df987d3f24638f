"""Headers of safetensors and archives of PyTorch's that say something else than the truth."""

import io
import json
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from fuzz_mutations import mutation
from fuzz_seeds import Seed


def _is_safetensors(seed: Seed) -> bool:
    return seed.kind == "safetensors"


def _is_zip(seed: Seed) -> bool:
    return seed.kind == "zip"


# --- safetensors: length of the header (8 bytes), header (JSON), data ---


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@mutation("safetensors: length of the header", "error", _is_safetensors)
def _length(random: Random, seed: Seed, path: Path) -> None:
    (true,) = struct.unpack("<Q", seed.data[:8])
    lengths = [0, 1, 7, true - 1, true + 1, true + 9, 2**31, 2**63, 2**64 - 1, 10**8, 10**8 + 1]
    path.write_bytes(struct.pack("<Q", random.choice(lengths)) + seed.data[8:])


@mutation("safetensors: huge header", "either", _is_safetensors)
def _huge(random: Random, seed: Seed, path: Path) -> None:
    header, data = split(seed.data)
    text = json.dumps(header).encode()
    spaces = b" " * random.choice([10**6, 10**7, 99_000_000, 100_000_001])
    what = random.choice(["spaces", "metadata", "entries", "long text"])
    if what == "metadata":
        header["__metadata__"] = {f"key{i}": "x" * 10 for i in range(200_000)}
    elif what == "entries":
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header = {f"e{i}": empty for i in range(random.choice([30_000, 150_000]))}
    elif what == "long text":
        header["__metadata__"] = {"densely.norm_eps": "1" * 10**7}
    path.write_bytes(joined(text + spaces if what == "spaces" else header, data))


@mutation("safetensors: nested without an end", "error", _is_safetensors)
def _nested(random: Random, seed: Seed, path: Path) -> None:
    depth = random.choice([120, 1000, 1_000_000])
    begin, end = random.choice([(b"[", b"]"), (b'{"a":', b"}")])
    value = begin * depth + b"1" + end * depth
    path.write_bytes(joined(b'{"a":' + value + b"}", split(seed.data)[1]))


@mutation("safetensors: entry of the header", "error", _is_safetensors)
def _entry(random: Random, seed: Seed, path: Path) -> None:
    header, data = split(seed.data)
    keys = [k for k in header if k != "__metadata__" and header[k]["shape"]]
    entry = header[random.choice(keys)]
    begin, end = entry["data_offsets"]
    faults: list[tuple[str, Any]] = [
        ("data_offsets", random.choice(
            [[end, begin], [begin, 2**62], [-1, end], [begin + 4, end + 4], [begin, end - 4],
             [0, 4], [0, 0], [begin], [begin, end, end], "x", [float("nan"), end], None,
             [2**64, 2**64 + end - begin], [begin + 0.5, end]])),
        ("dtype", random.choice(
            ["F64", "F16", "I8", "Q4", "f32", "", None, 4, "F4", "F6_E2M3", "C64", "F8_E8M0"])),
        ("shape", random.choice(
            [[-1], [float("nan")], [2**32, 2**32], [2**63], [2**64], [1.5], "3", None, {},
             [0], [1] * 300, [2**31, 2, 2**31, 2], [True], ["1"], 7])),
    ]  # fmt: skip
    field, value = random.choice(faults)
    if entry[field] == value:
        value = None
    entry[field] = value
    path.write_bytes(joined(header, data))


@mutation("safetensors: header that is none", "error", _is_safetensors)
def _no_header(random: Random, seed: Seed, path: Path) -> None:
    header, data = split(seed.data)
    key = next(k for k in header if k != "__metadata__")
    texts: list[object] = [
        b"{}",
        b"{",
        b"{\xff\xfe}",
        b"{" * 100,
        b'{"a":1}',
        b'{"a":null}',
        b"{}{}",
    ]
    texts += [{"__metadata__": {}}, {**header, "__metadata__": [1]}, {key: header[key]}]
    texts += [{**header, "__metadata__": {"a": 1}}, b'{"\\ud800":{}}', {**header, key: []}]
    path.write_bytes(joined(random.choice(texts), data))


@mutation("safetensors: a key twice", "either", _is_safetensors)
def _twice(random: Random, seed: Seed, path: Path) -> None:
    header, data = split(seed.data)
    key = random.choice([k for k in header if k != "__metadata__"])
    text = json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}}}"
    path.write_bytes(joined(text.encode(), data))


@mutation(
    "safetensors: epsilon of the norms", "error", lambda s: _is_safetensors(s) and s.target != "fc"
)
def _epsilon(random: Random, seed: Seed, path: Path) -> None:
    header, data = split(seed.data)
    texts = ["nan", "inf", "-1", "0", "1e400", "", "x" * 10**5, "\x1b[31m", "1_0", "0x1", "1e-400"]
    header["__metadata__"] = {"format": "pt", "densely.norm_eps": random.choice(texts)}
    path.write_bytes(joined(header, data))


@mutation("safetensors: more or less data", "error", _is_safetensors)
def _data(random: Random, seed: Seed, path: Path) -> None:
    header, data = split(seed.data)
    path.write_bytes(joined(header, random.choice([data[:-4], data + bytes(4), b"", data[4:]])))


# --- zip archives, written here by hand so that they can lie ---


@dataclass(frozen=True)
class Entry:
    """A file in an archive; what is None is said as it is."""

    name: str
    data: bytes
    method: int = 0  # 8: deflated, and `data` is so already
    unpacked: int | None = None
    packed: int | None = None
    crc: int | None = None
    offset: int | None = None
    flags: int = 0


def archive(entries: list[Entry], count: int | None = None) -> bytes:
    files, table = b"", b""
    for entry in entries:
        packed = len(entry.data) if entry.packed is None else entry.packed
        unpacked = len(entry.data) if entry.unpacked is None else entry.unpacked
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        name = entry.name.encode()
        common = struct.pack(
            "<HHHHHIIIHH", 20, entry.flags, entry.method, 0, 33, crc, packed, unpacked, len(name), 0
        )
        offset = len(files) if entry.offset is None else entry.offset
        table += b"PK\x01\x02" + struct.pack("<H", 20) + common
        table += struct.pack("<HHHII", 0, 0, 0, 0, offset) + name
        files += b"PK\x03\x04" + common + name + entry.data
    number = (len(entries) if count is None else count) & 0xFFFF
    end = struct.pack("<HHHHIIH", 0, 0, number, number, len(table), len(files), 0)
    return files + table + b"PK\x05\x06" + end


def entries_of(data: bytes) -> list[Entry]:
    """The files of an archive, read with the standard library."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return [Entry(info.filename, file.read(info)) for info in file.infolist()]


@cache
def _zeros(megabytes: int) -> tuple[bytes, int]:
    """Zeros, deflated, and the checksum of all of them."""
    block, crc, packer = bytes(1 << 20), 0, zlib.compressobj(9, wbits=-15)
    packed = b""
    for _ in range(megabytes):
        packed += packer.compress(block)
        crc = zlib.crc32(block, crc)
    return packed + packer.flush(), crc


def _pick(random: Random, entries: list[Entry]) -> int:
    return random.randrange(len(entries))


@mutation("archive: written by hand", "loads", _is_zip)
def _by_hand(random: Random, seed: Seed, path: Path) -> None:
    entries = entries_of(seed.data)
    if random.random() < 0.5:
        entries = [_deflated(entry) for entry in entries]
    path.write_bytes(archive(entries))


def _deflated(entry: Entry) -> Entry:
    packer = zlib.compressobj(9, wbits=-15)
    packed = packer.compress(entry.data) + packer.flush()
    return replace(
        entry, data=packed, method=8, unpacked=len(entry.data), crc=zlib.crc32(entry.data)
    )


@mutation("archive: a bomb", "error", _is_zip)
def _bomb(random: Random, seed: Seed, path: Path) -> None:
    entries, megabytes = entries_of(seed.data), random.choice([4, 100, 1000])
    packed, crc = _zeros(megabytes)
    said = random.choice([megabytes << 20, 100, 0, 2**32 - 1])
    at = _pick(random, entries)
    entries[at] = Entry(entries[at].name, packed, 8, said, crc=crc)
    path.write_bytes(archive(entries))


@mutation("archive: wrong numbers", "either", _is_zip)
def _lies(random: Random, seed: Seed, path: Path) -> None:
    entries = entries_of(seed.data)
    for _ in range(random.choice([1, 3])):
        at = _pick(random, entries)
        field = random.choice(["unpacked", "packed", "crc", "offset", "flags", "method"])
        number = random.choice([0, 1, 3, 8, 12, 99, 0xFFFF, 2**31, 2**32 - 1, len(seed.data)])
        if field in ("flags", "method"):
            number &= 0xFFFF
        entries[at] = replace(entries[at], **{field: number})  # type: ignore[arg-type]
    count = random.choice([None, None, 0, 1, 0xFFFF])
    path.write_bytes(archive(entries, count))


@mutation("archive: storage cut short", "error", _is_zip)
def _cut(random: Random, seed: Seed, path: Path) -> None:
    entries = entries_of(seed.data)
    storages = [i for i, entry in enumerate(entries) if "/data/" in entry.name and entry.data]
    at = random.choice(storages)
    kept = random.choice([0, 1, 4, len(entries[at].data) - 1])
    entries[at] = replace(
        entries[at], data=entries[at].data[: min(kept, len(entries[at].data) - 1)]
    )
    path.write_bytes(archive(entries))


@mutation("archive: entry missing", "error", _is_zip)
def _missing(random: Random, seed: Seed, path: Path) -> None:
    entries = entries_of(seed.data)
    gone = [e for e in entries if e.name.endswith("data.pkl") or "/data/" in e.name]
    entries.remove(random.choice([gone[0], random.choice(gone)]))
    path.write_bytes(archive(entries))


@mutation("archive: names that lead elsewhere", "either", _is_zip)
def _names(random: Random, seed: Seed, path: Path) -> None:
    entries = entries_of(seed.data)
    top = entries[0].name.partition("/")[0]
    new = random.choice(["../../../tmp", "/etc", "..", "", "C:\\x", "a" * 5000, "\x1b[31m", "a\0b"])
    if random.random() < 0.5:
        entries = [replace(e, name=e.name.replace(top, new, 1)) for e in entries]
    else:
        entries.append(Entry(f"{new}/canary", b"x"))
    path.write_bytes(archive(entries))


@mutation("archive: entry twice, or many", "either", _is_zip)
def _repeated(random: Random, seed: Seed, path: Path) -> None:
    entries = entries_of(seed.data)
    if random.random() < 0.3:
        top = entries[0].name.partition("/")[0]
        entries += [Entry(f"{top}/more/{i}", b"") for i in range(5000)]
    else:
        entries.insert(random.randrange(len(entries)), random.choice(entries))
    path.write_bytes(archive(entries))


@mutation("archive: of something else", "error", _is_zip)
def _something_else(random: Random, seed: Seed, path: Path) -> None:
    entries = entries_of(seed.data)
    top = entries[0].name.partition("/")[0]
    pickle = next(e for e in entries if e.name.endswith("data.pkl"))
    choices = [
        [Entry("[Content_Types].xml", b"<x/>"), Entry("word/document.xml", b"<x/>")],
        [],
        [*entries, Entry(f"{top}/constants.pkl", b"\x80\x02].")],
        [replace(e, data=seed.data) if e is pickle else e for e in entries],
        [replace(e, data=b"") if e is pickle else e for e in entries],
        [replace(e, data=b"9999999999\n") if e.name.endswith("/version") else e for e in entries],
    ]
    path.write_bytes(archive(random.choice(choices)))


@mutation("archive: odd records", "either", _is_zip)
def _odd(random: Random, seed: Seed, path: Path) -> None:
    ending = random.choice(["/byteorder", "/version", ".format_version", ".storage_alignment"])
    content = random.choice([b"big", b"middle", b"", b"-1\n", b"0", b"\xff" * 50, b"1" * 10**5])
    entries = entries_of(seed.data)
    path.write_bytes(
        archive([replace(e, data=content) if e.name.endswith(ending) else e for e in entries])
    )

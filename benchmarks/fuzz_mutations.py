"""Ways to damage a file of weights: its bytes, its tensors, or what the path leads to.

A mutation writes the file and is told apart by its name. What has to come of it: "error", a clear
one; "loads", since nothing is wrong with it; or "either", since a changed byte of data cannot be
noticed. Headers and archives are in `fuzz_headers.py`, pickles in `fuzz_pickles.py`, HDF5 in
`fuzz_hdf5.py`.
"""

import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import safetensors.torch
import torch
from fuzz_seeds import Seed, torch_bytes
from torch import Tensor

Expected = Literal["error", "loads", "either"]
Make = Callable[[Random, Seed, Path], None]
PICKLED = ("zip", "legacy")


@dataclass(frozen=True)
class Mutation:
    """A way to damage a file, for seeds that `takes` accepts."""

    name: str
    expected: Expected
    takes: Callable[[Seed], bool]
    make: Make


MUTATIONS: list[Mutation] = []


def mutation(
    name: str, expected: Expected, takes: Callable[[Seed], bool] = lambda seed: True
) -> Callable[[Make], Make]:
    """Enter a function into the table."""

    def enter(make: Make) -> Make:
        MUTATIONS.append(Mutation(name, expected, takes, make))
        return make

    return enter


def has_tensors(seed: Seed) -> bool:
    return bool(seed.tensors)


# --- bytes ---


@mutation("unchanged", "loads")
def _unchanged(random: Random, seed: Seed, path: Path) -> None:
    path.write_bytes(seed.data)


@mutation("truncated", "error")
def _truncated(random: Random, seed: Seed, path: Path) -> None:
    path.write_bytes(seed.data[: random.randrange(len(seed.data))])


def _flipped(random: Random, data: bytes, begin: int, end: int, count: int) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        changed[random.randrange(begin, end)] ^= random.choice([1 << random.randrange(8), 255])
    return bytes(changed)


@mutation("bytes flipped anywhere", "either")
def _flipped_anywhere(random: Random, seed: Seed, path: Path) -> None:
    count = random.choice([1, 2, 10, 100, 1000])
    path.write_bytes(_flipped(random, seed.data, 0, len(seed.data), count))


@mutation("bytes flipped in the header", "either")
def _flipped_header(random: Random, seed: Seed, path: Path) -> None:
    end = min(len(seed.data), random.choice([16, 128, 2048]))
    path.write_bytes(_flipped(random, seed.data, 0, end, random.choice([1, 2, 5, 20])))


@mutation("bytes flipped in the pickle", "either", lambda seed: seed.kind in PICKLED)
def _flipped_pickle(random: Random, seed: Seed, path: Path) -> None:
    begin = max(0, seed.data.find(b"\x80\x02"))
    end = seed.data.rfind(b".", begin, len(seed.data) * 2 // 3)
    path.write_bytes(_flipped(random, seed.data, begin, end, random.choice([1, 1, 2, 5, 20])))


@mutation("bytes inserted", "either")
def _inserted(random: Random, seed: Seed, path: Path) -> None:
    at, more = random.randrange(len(seed.data)), random.randbytes(random.choice([1, 2, 8, 999]))
    path.write_bytes(seed.data[:at] + more + seed.data[at:])


@mutation("bytes removed", "either")
def _removed(random: Random, seed: Seed, path: Path) -> None:
    at, count = random.randrange(len(seed.data)), random.choice([1, 2, 8, 999])
    path.write_bytes(seed.data[:at] + seed.data[at + count :])


@mutation("bytes zeroed", "either")
def _zeroed(random: Random, seed: Seed, path: Path) -> None:
    at, count = random.randrange(len(seed.data)), random.choice([8, 64, 4096])
    path.write_bytes((seed.data[:at] + bytes(count) + seed.data[at + count :])[: len(seed.data)])


@mutation("bytes moved within the file", "either")
def _moved(random: Random, seed: Seed, path: Path) -> None:
    size = len(seed.data)
    source, to, count = random.randrange(size), random.randrange(size), random.choice([8, 64, 512])
    piece = seed.data[source : source + count]
    path.write_bytes((seed.data[:to] + piece + seed.data[to + len(piece) :])[:size])


@mutation("magic of another format", "error")
def _other_magic(random: Random, seed: Seed, path: Path) -> None:
    magics = [b"\x89HDF\r\n\x1a\n", b"PK\x03\x04\x00\x00\x08\x08", b"\x80\x02\x8a\nl\xfc\x9cF"]
    magics += [b"\x10\0\0\0\0\0\0\0{", b"\x1f\x8b\x08\0", b"GGUF\x03\0\0\0", b"\x93NUMPY\x01\0"]
    others = [magic for magic in magics if magic[:2] != seed.data[:2]]
    magic = random.choice(others)
    path.write_bytes(magic + seed.data[len(magic) :] if random.random() < 0.7 else magic)


@mutation("another format's suffix", "loads", lambda seed: seed.suffix != ".weights.h5")
def _other_suffix(random: Random, seed: Seed, path: Path) -> None:
    _linked(path, path.with_suffix(random.choice([".h5", ".pth", ".safetensors", ".txt", ""])))
    path.write_bytes(seed.data)


def _linked(path: Path, target: Path) -> None:
    if path != target:
        path.symlink_to(target)


# --- what the path leads to ---


@mutation("no plain file", "error")
def _no_file(random: Random, seed: Seed, path: Path) -> None:
    what = random.choice(
        ["missing", "empty", "folder", "fifo", "loop", "dangling", "endless", "socket", "below"]
    )
    other = path.with_name("other")
    if what == "empty":
        path.touch()
    elif what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(other)
        other.symlink_to(path)
    elif what == "dangling":
        path.symlink_to(other)
    elif what == "endless":
        path.symlink_to(random.choice(["/dev/zero", "/dev/urandom", "/dev/null"]))
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
    elif what == "below":
        other.touch()
        path.symlink_to(other / "file")


@mutation("unreadable", "either")
def _unreadable(random: Random, seed: Seed, path: Path) -> None:
    path.write_bytes(seed.data)
    path.chmod(0)  # root reads it all the same


@mutation("huge, and empty behind its first bytes", "either")
def _sparse(random: Random, seed: Seed, path: Path) -> None:
    path.write_bytes(seed.data[: random.choice([16, 1000, len(seed.data) - 30])])
    os.truncate(path, random.choice([1 << 31, 1 << 36, 1 << 40]))


# --- tensors ---


def write(seed: Seed, path: Path, tensors: dict[str, Tensor]) -> None:
    if seed.kind == "safetensors":
        alone = {key: value.contiguous().clone() for key, value in tensors.items()}
        path.write_bytes(safetensors.torch.save(alone, {"format": "pt"}))
    else:
        path.write_bytes(torch_bytes(tensors, seed.kind))


def _some_key(random: Random, seed: Seed, counted: bool = False) -> str:
    """A key of a weight; with `counted`, of a number of batches as well."""
    keys = [key for key in seed.tensors if counted or seed.tensors[key].is_floating_point()]
    return random.choice(keys)


@mutation("key renamed", "error", has_tensors)
def _renamed(random: Random, seed: Seed, path: Path) -> None:
    key = _some_key(random, seed, counted=True)
    first, _, rest = key.partition(".")
    new = random.choice([key + "_x", key.upper(), f"other.{key}", f"{first}s.{rest}", key[:-1]])
    write(seed, path, {new if k == key else k: v for k, v in seed.tensors.items()})


@mutation("key dropped", "error", has_tensors)
def _dropped(random: Random, seed: Seed, path: Path) -> None:
    gone = {_some_key(random, seed) for _ in range(random.choice([1, 3, 100]))}
    write(seed, path, {k: v for k, v in seed.tensors.items() if k not in gone})


@mutation("keys added", "error", has_tensors)
def _added(random: Random, seed: Seed, path: Path) -> None:
    key, count = _some_key(random, seed), random.choice([1, 2, 20, 5000])
    more = {f"{key}.{i}": torch.zeros(1) for i in range(count)}
    write(seed, path, {**seed.tensors, **more})


@mutation("keys of hostile text", "error", has_tensors)
def _hostile_keys(random: Random, seed: Seed, path: Path) -> None:
    hostile = random.choice(
        ["\x1b[2J\x1b[31m", "a" * 1_000_000, "\n" * 50, "", "\0", "\u202egpj.", "../../../x",
         "{0.__class__}", "%s%n", "__class__", "é" * 3000,
         "." * 2000]
    )  # fmt: skip
    key = random.choice([hostile, f"{hostile}.{_some_key(random, seed)}"])
    place = random.choice(["added", "instead", "all"])
    tensors = dict(seed.tensors)
    if place == "all":
        tensors = {f"{hostile}{i}": value for i, value in enumerate(tensors.values())}
    elif place == "instead":
        tensors.pop(_some_key(random, seed))
    write(seed, path, {**tensors, key: torch.zeros(2)})


@mutation("keys by the thousand", "error", has_tensors)
def _thousands(random: Random, seed: Seed, path: Path) -> None:
    name = random.choice(
        ["{}.features.conv0.weight", "features.denseblock{}.denselayer1.norm1.weight",
         "features.denseblock1.denselayer{}.conv1.weight", "a.{}.conv1.weight",
         "{}/conv1_conv/kernel"]
    )  # fmt: skip
    tensors = {name.format(i): torch.zeros(1) for i in range(1, 5000)}
    write(seed, path, {"features.conv0.weight": torch.zeros(1), **tensors})


@mutation("wrapper's prefix on all keys", "loads", lambda s: has_tensors(s) and s.target != "fc")
def _prefixed(random: Random, seed: Seed, path: Path) -> None:
    prefix = random.choice(["module.", "model.", "module.model.backbone.", "a." * 50])
    write(seed, path, {prefix + k: v for k, v in seed.tensors.items()})


@mutation("two networks, or half a wrapper", "error", has_tensors)
def _two(random: Random, seed: Seed, path: Path) -> None:
    changed = {f"ema.{key}": value for key, value in seed.tensors.items()}
    if random.random() < 0.5:
        write(seed, path, {**seed.tensors, **changed})
    else:
        kept = list(seed.tensors)[:: random.choice([2, 3])]
        renamed = {k: v for k, v in changed.items() if k.removeprefix("ema.") not in kept}
        write(seed, path, {**{k: seed.tensors[k] for k in kept}, **renamed})


def _reshaped(random: Random, value: Tensor) -> Tensor:
    n = random.randrange(value.dim()) if value.dim() else 0
    shape = list(value.shape) or [1]
    off = [size + (i == n) * random.choice([-1, 1, 100]) for i, size in enumerate(shape)]
    shapes: list[Callable[[], Tensor]] = [
        lambda: value.movedim(0, -1) if value.dim() else value[None],
        lambda: value.flatten()[None],
        lambda: torch.zeros([max(0, size) for size in off], dtype=value.dtype),
        lambda: torch.zeros((), dtype=value.dtype),
        lambda: torch.zeros([0] * random.randrange(1, 9), dtype=value.dtype),
        lambda: value[(..., *[None] * random.choice([1, 2, 20]))],
    ]
    return random.choice(shapes)()


@mutation("shape changed", "error", has_tensors)
def _shape(random: Random, seed: Seed, path: Path) -> None:
    tensors, changed = dict(seed.tensors), False
    while not changed:
        key = _some_key(random, seed, counted=True)
        tensors[key] = _reshaped(random, seed.tensors[key])
        changed = tensors[key].shape != seed.tensors[key].shape
    write(seed, path, tensors)


@mutation("all of another size", "error", has_tensors)
def _all_shapes(random: Random, seed: Seed, path: Path) -> None:
    repeat = random.choice([2, 3])
    write(seed, path, {k: torch.cat([v[None].flatten()] * repeat) for k, v in seed.tensors.items()})


@mutation(
    "shape of 10^15 from one element", "error", lambda s: has_tensors(s) and s.kind in PICKLED
)
def _expanded(random: Random, seed: Seed, path: Path) -> None:
    huge = torch.zeros(1).expand(random.choice([(10**15,), (10**5, 10**5, 10**5), (1, 10**12, 3)]))
    if random.random() < 0.5:
        write(seed, path, {**seed.tensors, _some_key(random, seed): huge})
    else:  # whose kernels are turned round, and so copied
        write(seed, path, {"conv1_conv/kernel": torch.zeros(1).expand(10**4, 10**4, 10**4)})


@mutation("many views of one storage", "error", lambda s: has_tensors(s) and s.kind in PICKLED)
def _views(random: Random, seed: Seed, path: Path) -> None:
    whole = torch.zeros(1000, 1000)
    keys = [f"conv2_block{i}_1_conv/kernel" for i in range(1, 2000)]
    write(seed, path, {"conv1_conv/kernel": whole, **dict.fromkeys(keys, whole)})


@mutation("type that does not fit", "error", has_tensors)
def _wrong_type(random: Random, seed: Seed, path: Path) -> None:
    types = [torch.int8, torch.bool, torch.complex64, torch.int64, torch.uint8, torch.int16]
    key, kind = _some_key(random, seed, counted=True), random.choice(types)
    if not seed.tensors[key].is_floating_point():
        kind = random.choice([torch.float32, torch.bool, torch.complex64])
    write(seed, path, {**seed.tensors, key: seed.tensors[key].to(kind)})


@mutation("type that is cast", "loads", has_tensors)
def _other_type(random: Random, seed: Seed, path: Path) -> None:
    kind = random.choice([torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
    if seed.kind == "legacy" and kind == torch.float8_e4m3fn:
        kind = torch.float16  # PyTorch does not read the former from its legacy files
    some = {_some_key(random, seed) for _ in range(random.choice([1, 3, 1000]))}
    write(seed, path, {k: v.to(kind) if k in some else v for k, v in seed.tensors.items()})


@mutation("not a number, or infinite", "loads", has_tensors)
def _not_finite(random: Random, seed: Seed, path: Path) -> None:
    key, value = _some_key(random, seed), random.choice([float("nan"), float("inf"), 1e-45, -0.0])
    write(seed, path, {**seed.tensors, key: torch.full_like(seed.tensors[key], value)})


@mutation("tensor of another kind", "error", lambda s: has_tensors(s) and s.kind in PICKLED)
def _other_kind(random: Random, seed: Seed, path: Path) -> None:
    key = _some_key(random, seed)
    value = seed.tensors[key].float()
    rows = value.reshape(len(value), -1)
    kinds: list[Callable[[], Tensor]] = [
        value.to_sparse,
        rows.to_sparse_csr,
        lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        lambda: torch.empty(value.shape, device="meta"),
        lambda: torch.empty(10**6, 10**6, device="meta"),
        lambda: torch.nested.nested_tensor([value, value]),
        lambda: torch.sparse_coo_tensor(torch.zeros(2, 0), [], (10**9, 10**9)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinds that are new, or going
        write(seed, path, {**seed.tensors, key: random.choice(kinds)()})

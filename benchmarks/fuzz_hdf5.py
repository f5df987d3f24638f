"""Files of Keras's with whatever HDF5 can do and Keras never asks for."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np
from fuzz_mutations import mutation
from fuzz_seeds import Seed


def _is_hdf5(seed: Seed) -> bool:
    return seed.kind.endswith("h5")


def _datasets(file: Any) -> list[str]:
    found: list[str] = []
    file.visititems(lambda name, it: found.append(name) if isinstance(it, h5py.Dataset) else None)
    return found


def _editing(random: Random, seed: Seed, path: Path, edit: Callable[[Any, str, str], None]) -> None:
    """Call `edit` with the file, a dataset and its parent, both by name."""
    path.write_bytes(seed.data)
    with h5py.File(path, "r+") as file:
        name = random.choice(_datasets(file))
        edit(file, name, name.rpartition("/")[0])


@mutation("HDF5: bytes flipped in the structure", "either", _is_hdf5)
def _structure(random: Random, seed: Seed, path: Path) -> None:
    marks = [b"SNOD", b"TREE", b"HEAP", b"OHDR", b"OCHK", b"GCOL", b"\x89HDF", b"FRHP", b"BTHD"]
    places = [at for mark in marks for at in _all(seed.data, mark)]
    changed = bytearray(seed.data)
    for _ in range(random.choice([1, 1, 2, 5])):
        at = random.choice(places) + random.randrange(random.choice([12, 64, 512]))
        at = min(at, len(changed) - 1)
        changed[at] = random.choice([0, 1, 127, 255, changed[at] ^ (1 << random.randrange(8))])
    path.write_bytes(changed)


def _all(data: bytes, mark: bytes) -> list[int]:
    found, at = [], data.find(mark)
    while at >= 0:
        found.append(at)
        at = data.find(mark, at + 1)
    return found


@mutation("HDF5: link to elsewhere", "error", _is_hdf5)
def _links(random: Random, seed: Seed, path: Path) -> None:
    def edit(file: Any, name: str, parent: str) -> None:
        del file[name]
        kind = random.randrange(6)
        if kind == 0:
            file[name] = h5py.ExternalLink("/etc/passwd", "/x")
        elif kind == 1:
            file[name] = h5py.ExternalLink(str(path), f"/{name}")  # itself
        elif kind == 2:
            file[name] = h5py.SoftLink(f"/{name}")
        elif kind == 3:
            file[name] = file["/"]
        elif kind == 4:
            file[name] = file[parent]
        else:
            file[name] = file[next(n for n in _datasets(file) if n != name)]

    _editing(random, seed, path, edit)


@mutation("HDF5: data stored in another way", "error", _is_hdf5)
def _stored(random: Random, seed: Seed, path: Path) -> None:
    def edit(file: Any, name: str, parent: str) -> None:
        value = file[name][...]
        shape = value.shape
        del file[name]
        kind = random.randrange(7)
        if kind == 0:
            file.create_dataset(name, data=value, chunks=True, compression="gzip")
        elif kind == 1:
            file.create_dataset(name, (10**6, 10**6), "f4", chunks=(1000, 1000), compression="gzip")
        elif kind == 2:
            file.create_dataset(name, (10**6, 10**9), "f4")  # never written
        elif kind == 3:
            layout = h5py.VirtualLayout(shape, "f4")
            layout[...] = h5py.VirtualSource(str(path), name, shape)
            file.create_virtual_dataset(name, layout)
        elif kind == 4:
            outside = [("/etc/passwd", 0, 4 * value.size)]
            file.create_dataset(name, shape, "f4", external=outside)
        elif kind == 5:
            file.create_dataset(name, data=value, maxshape=(None,) * value.ndim)
        else:
            file.create_dataset(name, shape, "f4", chunks=shape, shuffle=True, fletcher32=True)

    _editing(random, seed, path, edit)


@mutation("HDF5: values of another type", "error", _is_hdf5)
def _types(random: Random, seed: Seed, path: Path) -> None:
    def edit(file: Any, name: str, parent: str) -> None:
        shape = file[name].shape
        del file[name]
        kinds: list[Any] = ["i4", "u1", "c8", "S5", "?", h5py.string_dtype(), h5py.ref_dtype]
        kinds += [h5py.vlen_dtype("f4"), np.dtype([("a", "f4"), ("b", "f4")]), "V4"]
        kinds += [h5py.enum_dtype({"a": 1}), np.dtype(("f4", (2,)))]
        kind = random.randrange(len(kinds) + 2)
        if kind < len(kinds):
            file.create_dataset(name, shape, kinds[kind])
        elif kind == len(kinds):
            file[name] = h5py.Empty("f4")
        else:
            file[name] = np.dtype("f4")  # a type, with no values

    _editing(random, seed, path, edit)


@mutation("HDF5: values in another float type", "loads", _is_hdf5)
def _floats(random: Random, seed: Seed, path: Path) -> None:
    def edit(file: Any, name: str, parent: str) -> None:
        value = file[name][...]
        del file[name]
        file[name] = value.astype(random.choice(["f2", "f8", ">f4", ">f8"]))

    _editing(random, seed, path, edit)


@mutation("HDF5: shape changed", "error", _is_hdf5)
def _shape(random: Random, seed: Seed, path: Path) -> None:
    def edit(file: Any, name: str, parent: str) -> None:
        value = file[name][...]
        n = random.randrange(value.ndim)
        off = [size + (i == n) * random.choice([-1, 1, 5]) for i, size in enumerate(value.shape)]
        shapes = [off, [], [0] * value.ndim, [*value.shape, 1], [1] * 20, [value.size + 1]]
        del file[name]
        file[name] = np.ones(random.choice(shapes), "f4")

    _editing(random, seed, path, edit)


@mutation("HDF5: names", "error", _is_hdf5)
def _names(random: Random, seed: Seed, path: Path) -> None:
    def edit(file: Any, name: str, parent: str) -> None:
        kind = random.randrange(6)
        hostile = random.choice(["x" * 60_000, "\x1b[31m", "é" * 201, "\n"])
        if kind == 0:
            file.move(name, f"{parent}/other")
        elif kind == 1:
            del file[name]
        elif kind == 2:
            file[f"{parent}/{hostile}"] = np.ones(3, "f4")
        elif kind == 3:
            file.move(name, f"{parent}/{hostile}")
        elif kind == 4:
            file.move(name, name + "x")
        else:
            del file[random.choice(list(file))]

    _editing(random, seed, path, edit)


@mutation("HDF5: attributes", "either", _is_hdf5)
def _attributes(random: Random, seed: Seed, path: Path) -> None:
    def edit(file: Any, name: str, parent: str) -> None:
        values: list[Any] = ["x" * 60_000, np.ones(8000), h5py.Empty("f4"), b"\xff\xfe", 1.5, ""]
        values += [np.array([["a", "b"]], "S5"), "\x1b[31m", ["a"] * 2000, file.ref]
        place = random.choice([file, file[parent], file[name]])
        place.attrs[random.choice(["name", "layer_names", "other", "weight_names"])] = (
            random.choice(values)
        )

    _editing(random, seed, path, edit)


@mutation("HDF5: many or deep groups", "error", _is_hdf5)
def _groups(random: Random, seed: Seed, path: Path) -> None:
    def edit(file: Any, name: str, parent: str) -> None:
        if random.random() < 0.5:
            file.create_group("/".join(["g"] * random.choice([17, 300, 2000])))
        else:
            for i in range(20_001):
                file.create_group(f"many/{i}")

    _editing(random, seed, path, edit)

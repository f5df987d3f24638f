"""Pickles put together from opcodes, as an attacker would: nothing is pickled that could run here.

Each function gives the bytes that push one value, and `enclosed` makes a file of it.
"""

import pickle
import struct
from random import Random

from fuzz_headers import Entry, archive, entries_of
from fuzz_seeds import Seed

LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)


def name(path: str) -> bytes:
    module, _, attribute = path.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if abs(value) < 2**31:
        return b"J" + struct.pack("<i", value)
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def listed(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def mapping(items: dict[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in items.items()) + b"u"


def call(function: str | bytes, *arguments: bytes) -> bytes:
    called = name(function) if isinstance(function, str) else function
    return called + group(*arguments) + b"R"


def build(value: bytes, state: bytes) -> bytes:
    return value + state + b"b"


def storage(
    key: str = "0", count: int = 1, kind: str = "torch.FloatStorage", more: bytes = b""
) -> bytes:
    where = text("cpu")
    return group(text("storage"), name(kind), text(key), where, number(count), more) + b"Q"


def tensor(shape: tuple[int, ...] = (1,), stride: tuple[int, ...] | None = None, offset: int = 0,
           of: bytes | None = None) -> bytes:  # fmt: skip
    strides = stride if stride is not None else (1,) * len(shape)
    return call(
        "torch._utils._rebuild_tensor_v2",
        storage() if of is None else of,
        number(offset),
        group(*map(number, shape)),
        group(*map(number, strides)),
        b"\x89",
        call("collections.OrderedDict"),
    )


def module(kind: str, **state: bytes) -> bytes:
    held = mapping({text(key): value for key, value in state.items()})
    return build(name(kind) + b")\x81", held)


# --- into a file ---


def enclosed(random: Random, seed: Seed, value: bytes, beside: bool = True) -> bytes:
    """A file whose pickle is `value`, or holds it; with `beside`, beside all true weights too."""
    where = random.choice(["root", "wrapped", "key", "value", *["beside"] * beside])
    key = random.choice(list(seed.tensors) or ["features.conv0.weight"])
    data = {
        "root": value,
        "wrapped": mapping({text("state_dict"): value, text("epoch"): number(3)}),
        "value": mapping({text(key): value}),
        "key": mapping({value: tensor()}),
        "beside": mapping({text("features.conv0.weight"): tensor(), text("more"): value}),
    }[where]
    if seed.kind == "zip":
        entries = entries_of(seed.data)
        at = next(i for i, entry in enumerate(entries) if entry.name.endswith("data.pkl"))
        true = entries[at].data
        if where == "beside":  # the weights, and one thing more in their dictionary
            data = true[:-1] + text("more") + value + b"s."
        else:
            data = b"\x80\x02" + data + b"."
        entries[at] = Entry(entries[at].name, data)
        return archive(entries)
    facts = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    end = pickle.dumps(["0"], 2) + struct.pack("<qf", 1, 0.5)
    return LEGACY_MAGIC + facts + b"\x80\x02" + data + b"." + end

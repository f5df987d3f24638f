"""Pickles that run code, eat memory, or are built of what `weights_only` allows, but maliciously.

`fuzz_opcodes.py` has the words.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

from fuzz_headers import Entry, archive, entries_of
from fuzz_mutations import PICKLED, mutation
from fuzz_opcodes import (
    build,
    call,
    enclosed,
    group,
    listed,
    mapping,
    module,
    name,
    number,
    storage,
    tensor,
    text,
)
from fuzz_seeds import Seed


def _is_pickled(seed: Seed) -> bool:
    return seed.kind in PICKLED


@mutation("pickle: runs code", "error", _is_pickled)
def _code(random: Random, seed: Seed, path: Path) -> None:
    canary = path.with_name("canary")
    touch, python = text(f"touch {canary}"), text(f"open({str(canary)!r}, 'w')")
    words = listed(text("touch"), text(str(canary)))
    getting = call("builtins.getattr", call("builtins.__import__", text("os")), text("system"))
    value = random.choice(
        [
            call("os.system", touch),
            call("posix.system", touch),
            call("nt.system", touch),
            call("subprocess.Popen", words),
            call("subprocess.check_output", words),
            call("subprocess.getoutput", touch),
            call("builtins.eval", python),
            call("builtins.exec", python),
            call("__builtin__.eval", python),
            call("builtins.open", text(str(canary)), text("w")),
            call(getting, touch),
            call("os.mkdir", text(str(canary))),
            call("pty.spawn", words),
            call("runpy.run_path", text(str(canary))),
            call("torch.hub.load", text(str(canary)), text("x")),
            call("torch.load", text(str(canary))),
            call("torch.jit.load", text(str(canary))),
            call("torch.ops.load_library", text(str(canary))),
            call("torch.serialization.load", text(str(canary))),
            call("torch.package.PackageImporter", text(str(canary))),
            call("torch._utils._import_dotted_name", text("os.system")),
            call("torch.utils.collect_env.run", touch),
            call("torch._inductor.codecache.compile_file", words),
            call("numpy.load", text(str(canary))),
            call("numpy.testing._private.utils.runstring", python, mapping({})),
            call("numpy.fromfile", text(str(canary))),
            call("pickle.loads", text("x")),
            call("ctypes.CDLL", text(str(canary))),
            call("socket.create_connection", group(text("127.0.0.1"), number(9))),
            call("importlib.import_module", text("this")),
            call("operator.methodcaller", text("system"), touch),
            call("functools.partial", name("os.system"), touch),
            call("densely.weights.files.write_weights", text(str(canary)), mapping({})),
            call("torch.nn.modules.linear.Linear", number(10**6), number(10**6)),
            build(call("torch.nn.Module"), mapping({text("forward"): name("os.system")})),
            text("os") + text("system") + b"\x93" + group(touch) + b"R",  # STACK_GLOBAL
            b"(" + touch + b"ios\nsystem\n",  # INST
            b"(" + name("os.system") + touch + b"o",  # OBJ
            b"\x82\x01" + group(touch) + b"R",  # EXT1
            call("collections.OrderedDict.__class__.mro"),
            build(name("torch.nn.modules.linear.Linear"), mapping({text("x"): name("os.system")})),
        ]
    )  # fmt: skip
    if random.random() < 0.15:  # an ordinary pickle with no container of PyTorch's
        path.write_bytes(b"\x80" + bytes([random.randrange(6)]) + value + b".")
    else:
        path.write_bytes(enclosed(random, seed, value))


@mutation("pickle: small, and unfolds", "either", _is_pickled)
def _unfolds(random: Random, seed: Seed, path: Path) -> None:
    huge = call("builtins.bytearray", number(random.choice([10**9, 10**12, 2**62])))
    twice = b"q\x01h\x01\x86" * random.choice([30, 60, 200])  # (x, x), and so on
    shared = tensor((10**9,), (0,))  # goes over all of it, where something does
    hexed = text("a" * 100)
    for codec in ["utf-8", *["hex"] * 40]:
        hexed = name("_codecs.encode") + hexed + text(codec) + b"\x86R"
    value = random.choice(
        [
            huge,
            call("torch.Size", huge),
            call("builtins.set", huge),
            call("collections.Counter", huge),
            call("torch.FloatTensor", huge),
            call("torch.Tensor", number(10**6), number(10**6)),
            call("torch.FloatTensor", number(2**40)),
            call("torch.Tensor", *[number(2**31 - 1)] * 3),
            call("builtins.set", listed(b")" + twice)),
            mapping({b")" + twice: number(1)}),
            hexed,
            call("builtins.set", shared),
            call("builtins.set", listed(shared)),
            call("torch.Size", shared),
            call("collections.Counter", shared),
            call("collections.OrderedDict", listed(shared)),
            call("collections.OrderedDict", shared),
            mapping({group(shared): number(1)}),
            call("_codecs.encode", text("\u00e9" * 200_000), text("punycode")),
            call("_codecs.encode", text("a." * 300_000), text("idna")),
            call("builtins.complex", text("1" * 10**6)),
            tensor((10**12,), (0,)),
            tensor((1,), of=storage(count=10**12)),
            tensor((2**31, 2**31, 2**31, 2**31), (0, 0, 0, 0)),
            call("torch._utils._rebuild_meta_tensor_no_storage", name("torch.float32"),
                 group(number(2**62)), group(number(1)), b"\x89"),
        ]
    )  # fmt: skip
    path.write_bytes(enclosed(random, seed, value))


@mutation("pickle: deep, long or circular", "either", _is_pickled)
def _deep(random: Random, seed: Seed, path: Path) -> None:
    depth = random.choice([900, 5000, 200_000])
    value = random.choice(
        [
            b")" + b"\x85" * depth,
            b"](" * depth + b"e" * depth if depth < 10**5 else b"]" * depth,
            b"}X\x01\0\0\0a" * depth + b"}" + b"s" * depth,
            b"}X\x0a\0\0\0state_dict" * depth + tensor() + b"s" * depth,
            b"](" + b"K\x01" * depth + b"e",
            b"".join(b"K\x01r" + struct.pack("<I", i) for i in range(depth)),
            b"]q\x01h\x01a",  # a list in itself
            b"}q\x01X\x0a\0\0\0state_dicth\x01s",  # a dictionary in itself
            b"}q\x01X\x05\0\0\0modelh\x01s",
            b"(" * depth,
            b"0" * depth,
            b"h\x07",  # of which nothing is known
            b"r\xff\xff\xff\xff",
            b"X\xff\xff\xff\xffabc",
            b"\x8a\xff" + b"\x7f" * 255,
        ]
    )
    path.write_bytes(enclosed(random, seed, value))


_SEQUENTIAL = "torch.nn.modules.container.Sequential"


@mutation("pickle: model of hostile parts", "error", _is_pickled)
def _model(random: Random, seed: Seed, path: Path) -> None:
    empty, depth = call("collections.OrderedDict"), random.choice([40, 500, 20_000])
    deep = module(_SEQUENTIAL, _parameters=mapping({text("w"): tensor()}))
    for _ in range(depth if depth < 1000 else 1):
        deep = module(_SEQUENTIAL, _modules=mapping({text("a"): deep}))
    # A module that holds itself: state {"_modules": {"a": it}}, with the module as memo 1.
    own = (
        name(_SEQUENTIAL)
        + b")\x81q\x01"
        + mapping({text("_modules"): mapping({text("a"): b"h\x01"})})
        + b"b"
    )
    # Each of 40 levels holds the one below twice: 2^40 modules.
    wide = module(_SEQUENTIAL, _parameters=mapping({text("w"): tensor()}))
    for _ in range(30):
        wide += b"q\x01" + name(_SEQUENTIAL) + b")\x81"
        wide += (
            mapping({text("_modules"): mapping({text("a"): b"h\x01", text("b"): b"h\x01"})}) + b"b"
        )
    shadow = build(empty, mapping({text("items"): name("torch.Tensor"), text("values"): number(1)}))
    shadowing = mapping({text("tensors"): name("torch.Size")})
    weight = mapping({text("x"): tensor()})
    value = random.choice(
        [
            deep,
            own,
            wide,
            module(_SEQUENTIAL, _parameters=listed(tensor()), _modules=number(3)),
            module(_SEQUENTIAL, _parameters=mapping({number(3): tensor(), b"N": tensor()})),
            module(_SEQUENTIAL, _parameters=mapping({b")" + b"\x85" * 2000: tensor()})),
            module(_SEQUENTIAL, _parameters=shadow, _buffers=shadow, _modules=shadow),
            module(_SEQUENTIAL, _modules=mapping({text("a"): text("b")}), state=number(1)),
            module(_SEQUENTIAL, _non_persistent_buffers_set=number(1), _buffers=weight),
            build(name(_SEQUENTIAL) + b")\x81", number(3)),
            build(name(_SEQUENTIAL) + b")\x81", group(mapping({}), shadowing)),
            build(name(_SEQUENTIAL) + b")\x81", shadowing),
            name(_SEQUENTIAL),
            name(_SEQUENTIAL) + group(number(1)) + b"\x81",
            call(_SEQUENTIAL, tensor()),
            call("densely.weights.stand_in", number(1), number(2), number(3), number(4)),
            call("densely.weights.stand_in", number(1), name(_SEQUENTIAL), text("a"), text("b")),
            call("densely.weights.stand_in"),
            call("densely.fused.swap._rebuild", name(_SEQUENTIAL)),
            call("densely.fused.swap._rebuild", call("densely.fused.swap._rebuild", shadow)),
            call("densely.fused.swap._rebuild", name("os.system")),
            name("densely.weights.stand_in"),
            group(text("module"), name("os.system"), text("a.py"), text("import os")) + b"Q",
            group(text("module"), name(_SEQUENTIAL), text("a.py"), text("x" * 10**6)) + b"Q",
            build(name("torch.nn.modules.linear.Linear"), mapping({text("state"): number(1)})),
            mapping({text("state_dict"): shadow}),
            shadow,
        ]
    )  # fmt: skip
    path.write_bytes(enclosed(random, seed, value, beside=False))


def _hostile_tensors(random: Random) -> list[Callable[[], bytes]]:
    shadowing = mapping(
        {text(key): random.choice([number(1), name("torch.Tensor"), name("collections.Counter")])
         for key in ("dim", "is_complex", "is_floating_point", "detach", "shape", "dtype", "layout",
                     "__class__", "data", "is_quantized", "grad", "requires_grad", "copy_")
         if random.random() < 0.6}
    )  # fmt: skip
    flat, empty = number(0), call("collections.OrderedDict")
    return [
        lambda: tensor((1000,)),
        lambda: tensor((1,), offset=10**9),
        lambda: tensor((1,), offset=-1),
        lambda: tensor((2,), (-1,)),
        lambda: tensor((-1,)),
        lambda: tensor((1,), of=storage(count=1000)),
        lambda: tensor((1,), of=storage(count=-1)),
        lambda: tensor((1,), of=storage(key="../../../etc/passwd")),
        lambda: tensor((1,), of=storage(key="7")),
        lambda: tensor((1,), of=storage(kind="torch.QInt8Storage")),
        lambda: tensor((1,), of=storage(kind="torch.storage.UntypedStorage")),
        lambda: tensor((1,), of=storage(kind="torch.float32")),
        lambda: tensor((1,), of=storage(more=group(text("0"), number(0), number(10**6)))),
        lambda: tensor((1,), of=number(5) + b"Q"),
        lambda: tensor((1,), of=b")Q"),
        lambda: tensor((1,), of=group(text("other"), number(1)) + b"Q"),
        lambda: tensor((1,), of=number(5)),
        lambda: storage(),
        lambda: build(tensor(), group(storage(), flat, group(number(10**6)), group(number(1)))),
        lambda: build(name("torch.Tensor") + b")\x81", group(storage(), flat, group(), group())),
        lambda: name("torch.Tensor") + b")\x81",
        lambda: name("torch.nn.parameter.Parameter") + b")\x81",
        lambda: call("torch._utils._rebuild_parameter", tensor(), b"\x88", empty),
        lambda: call(
            "torch._utils._rebuild_parameter_with_state", tensor(), b"\x88", empty, shadowing
        ),
        lambda: call(
            "torch._tensor._rebuild_from_type_v2", name("torch._utils._rebuild_parameter"),
            name("torch.nn.parameter.Parameter"), group(tensor(), b"\x88", empty), shadowing,
        ),
        lambda: call(
            "torch._tensor._rebuild_from_type_v2", name("collections.OrderedDict"),
            name("collections.OrderedDict"), b")", shadowing,
        ),
        lambda: call(
            "torch._tensor._rebuild_from_type_v2", name("torch.Tensor"),
            name("torch.FloatTensor"), b")", shadowing,
        ),
        lambda: call(
            "torch._utils._rebuild_wrapper_subclass", name("torch.nn.parameter.Parameter"),
            name("torch.float32"), group(number(3)), group(number(1)), flat,
            call("torch.serialization._get_layout", text("torch.strided")), text("cpu"), b"\x89",
        ),
        lambda: call(
            "torch._utils._rebuild_sparse_tensor",
            call("torch.serialization._get_layout", text("torch.sparse_coo")),
            group(tensor((1, 1), (1, 1)), tensor(), group(number(2**40))),
        ),
        lambda: call(
            "torch._utils._rebuild_nested_tensor",
            tensor(), tensor((1, 1)), tensor((1, 1)), tensor(),
        ),
        lambda: call(
            "torch._utils._rebuild_qtensor", storage(kind="torch.QInt8Storage"), flat,
            group(number(1)), group(number(1)),
            group(name("torch.per_tensor_affine"), b"G?\xb9\x99\x99\x99\x99\x99\x9a", flat),
            b"\x89", empty,
        ),
        lambda: call(
            "torch._utils._rebuild_device_tensor_from_numpy", tensor(), flat, text("cpu"), b"\x89"
        ),
        lambda: call(
            "torch._utils._rebuild_device_tensor_from_cpu_tensor", tensor(), name("torch.int8"),
            text(random.choice(["meta", "cuda:7", "mps", "xla:0", "privateuseone"])), b"\x89",
        ),
        lambda: call("torch.sparse.FloatTensor", tensor(), tensor()),
        lambda: call(
            "torch._utils._rebuild_tensor", storage(), flat, group(number(9)), group(number(1))
        ),
        lambda: call(
            "torch._utils._rebuild_tensor_v3", storage(), flat, group(number(9)), group(number(1)),
            b"\x89", empty, name("torch.float64"),
        ),
    ]  # fmt: skip


@mutation("pickle: forged tensor", "either", _is_pickled)
def _forged(random: Random, seed: Seed, path: Path) -> None:
    value = random.choice(_hostile_tensors(random))()
    path.write_bytes(_instead(random, seed, value))


def _instead(random: Random, seed: Seed, value: bytes) -> bytes:
    """In place of one of the weights, so that the rest of the file is in order."""
    if seed.kind == "zip" and seed.tensors:
        entries = entries_of(seed.data)
        at = next(i for i, entry in enumerate(entries) if entry.name.endswith("data.pkl"))
        key = random.choice([k for k, v in seed.tensors.items() if v.dim() > 0 and v.numel() != 1])
        data = entries[at].data[:-1] + text(key) + value + b"s."
        entries[at] = Entry(entries[at].name, data)
        return archive(entries)
    return enclosed(random, seed, value)


#: What densely lets pass, and what PyTorch does beyond that.
_OURS = """
collections.OrderedDict collections.Counter torch.Size torch.device _codecs.encode builtins.set
torch.float32 torch.int8 torch.qint8 torch.FloatStorage torch.LongStorage
torch.storage.UntypedStorage torch._utils._rebuild_tensor_v2 torch._utils._rebuild_parameter
torch._utils._rebuild_tensor torch._utils._rebuild_tensor_v3 densely.weights.stand_in
densely.fused.swap._rebuild torch.nn.modules.container.Sequential
torchvision.models.densenet.DenseNet
argparse.Namespace pathlib.PosixPath numpy.ndarray numpy._core.multiarray.scalar
"""
_TORCHS = """
torch.nn.parameter.Parameter torch.Tensor torch.serialization._get_layout builtins.complex
torch.FloatTensor torch.LongTensor torch.sparse.FloatTensor torch.storage.TypedStorage
torch.per_tensor_affine torch._utils._rebuild_parameter_with_state torch._utils._rebuild_qtensor
torch._utils._rebuild_sparse_tensor torch._utils._rebuild_meta_tensor_no_storage
torch._utils._rebuild_nested_tensor torch._utils._rebuild_wrapper_subclass
torch._utils._rebuild_device_tensor_from_numpy torch._tensor._rebuild_from_type_v2
torch._utils._rebuild_device_tensor_from_cpu_tensor
"""


def _anything(random: Random, names: list[str], depth: int = 0) -> bytes:
    """A value made of `names`, in any combination."""
    count = random.randrange(4) if depth < 4 else 0
    some = [_anything(random, names, depth + 1) for _ in range(count)]
    words = ["", "a", "cpu", "meta", "latin1", "state_dict", "storage", "1", "_modules"]
    numbers = [0, 1, -1, 2, 7, 255, 2**31, 2**40, 2**63]
    simple = [
        number(random.choice(numbers)),
        text(random.choice(words)),
        random.choice([b"N", b"\x88", b"\x89", b")", b"}", b"]", b"G" + random.randbytes(8)]),
        name(random.choice(names)),
        tensor(
            tuple(random.choices(numbers, k=random.randrange(3))), offset=random.choice(numbers)
        ),
        random.choice(_hostile_tensors(random)[:17])(),
    ]
    named = mapping({text(random.choice(words)): value for value in some})
    rebuild = random.choice(["tensor", "tensor_v2", "tensor_v3", "parameter"])
    made = [
        call(random.choice(names), *some),
        call(f"torch._utils._rebuild_{rebuild}", *some, *random.choices(simple, k=3)),
        call("builtins.set", listed(*some)),
        call("torch.Size", group(*some)),
        call("collections.Counter", named),
        call("collections.OrderedDict", listed(*[group(value, b"N") for value in some])),
        build(call("collections.OrderedDict"), named),
        module(_SEQUENTIAL, _parameters=named, _buffers=some[0], _modules=some[-1])
        if some
        else b"N",
        name(random.choice(names)) + group(*some) + b"\x81",
        build(random.choice(simple), random.choice(simple)),
        group(*some),
        listed(*some),
        named,
        group(*some) + b"Q",
    ]
    return random.choice(made if some and depth < 3 else simple)


@mutation("pickle: all that is allowed, at random", "either", _is_pickled)
def _allowed(random: Random, seed: Seed, path: Path) -> None:
    names = (_OURS if random.random() < 0.8 else _OURS + _TORCHS).split()
    place = _instead if random.random() < 0.5 else enclosed
    path.write_bytes(place(random, seed, _anything(random, names)))


@mutation("pickle: opcodes at random", "either", _is_pickled)
def _opcodes(random: Random, seed: Seed, path: Path) -> None:
    known = b"cRb(t}]uesaKJMXhqrQ\x81\x85\x86\x87N\x88\x89).\x8a\x80"
    data = bytes(random.choice(known) for _ in range(random.choice([5, 50, 2000])))
    path.write_bytes(enclosed(random, seed, data))


@mutation("pickle: wrappers in wrappers", "error", _is_pickled)
def _wrappers(random: Random, seed: Seed, path: Path) -> None:
    depth = random.choice([7, 50, 5000])
    words = [b"}" + text(random.choice(["state_dict", "model", "other"])) for _ in range(depth)]
    inner = mapping({text("features.conv0.weight"): tensor()})
    value = b"".join(words) + inner + b"s" * depth
    path.write_bytes(enclosed(random, seed, value, beside=False))

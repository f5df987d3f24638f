"""What a pickle would do, read from its opcodes before any of them is carried out.

`torch.load(weights_only=True)` runs no code of a file. It does make whatever the file asks for out
of what it allows, and a hundred bytes can ask for a lot: `bytearray(10**12)`, a text encoded 40
times over, a tuple that holds another one twice, which holds another one twice, ...; or for kinds
of tensors that crash what reads them. Weights need few names and few ways to use them. Here they
are listed, and a file with any other is refused.
"""

import pickletools
from collections.abc import Collection
from dataclasses import dataclass
from typing import IO

import torch

from densely.errors import WeightsError
from densely.weights.old_pickles import STAND_IN

_STORAGES = """
DoubleStorage FloatStorage HalfStorage BFloat16Storage LongStorage IntStorage ShortStorage
CharStorage ByteStorage BoolStorage ComplexFloatStorage ComplexDoubleStorage storage.UntypedStorage
"""
_DTYPES = [name for name, value in vars(torch).items() if isinstance(value, torch.dtype)]
#: What is named, and handed to others.
_NAMES = {f"torch.{name}" for name in (*_STORAGES.split(), *_DTYPES)}
#: What is called, and how the arguments may look; None for any.
_CALLS: dict[str, Collection[tuple[str, ...]] | None] = {
    "torch._utils._rebuild_tensor": None,
    "torch._utils._rebuild_tensor_v2": None,
    "torch._utils._rebuild_tensor_v3": None,
    "torch._utils._rebuild_parameter": None,
    "collections.OrderedDict": [(), ("pairs",)],  # the latter from Python 2
    "collections.Counter": [(), ("dict",)],
    "builtins.set": [("list",), ("pairs",)],
    "__builtin__.set": [("list",), ("pairs",)],
    "torch.Size": [("tuple",)],
    "torch.device": [("text",), ("text", "other")],
    "_codecs.encode": [("text", "latin1")],  # bytes
}
#: Values in a tuple, each counted as often as it is reached.
_MAX_UNFOLDED = 10_000
_CONSTANTS = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"),
    *("LONG1", "BINFLOAT", "SHORT_BINSTRING", "EMPTY_SET"),
}


@dataclass(frozen=True, slots=True)
class _Value:
    """What would be on the stack.

    Args:
        kind: "text", "tuple", "list", "dict", "global", "made", or "other".
        name: of a global, or of what made it; the text "latin1".
        items: of a tuple.
        size: of a tuple, with all tuples in it.
        held: kinds of a list's items; it grows as the list does.
    """

    kind: str
    name: str = ""
    items: tuple["_Value", ...] = ()
    size: int = 1
    held: set[str] | None = None

    def __str__(self) -> str:
        if self.held is not None and self.held <= {"list", "tuple"}:
            return "pairs"
        return self.name or self.kind


@dataclass(frozen=True, slots=True)
class _Allowed:
    """Names beyond weights: modules, and what may stand beside them; see `check_pickle`."""

    classes: frozenset[str]
    beside: frozenset[str]

    def __contains__(self, name: str) -> bool:
        return name in self.classes or name in self.beside


#: Makes an accelerated module again, of the class that it is called with.
REBUILD = "densely.fused.swap._rebuild"
_ORDERED = "collections.OrderedDict"
_OTHER, _TEXT, _DICT = _Value("other"), _Value("text"), _Value("dict")


def check_pickle(stream: IO[bytes], classes: Collection[str], beside: Collection[str] = ()) -> None:
    """Read one pickle, and leave the stream behind it.

    Args:
        stream: where a pickle begins.
        classes: full names of modules that may be in it, and are replaced when it is loaded.
        beside: full names of what may stand beside the weights, replaced likewise; these may be
            called with anything.

    Raises:
        WeightsError: it is more than weights.
    """
    allowed = _Allowed(frozenset(classes), frozenset(beside))
    stack: list[_Value] = []
    marked: list[list[_Value]] = []
    memo: dict[object, _Value] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name == "MARK":
            marked.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, marked.pop()
            if name == "TUPLE":
                stack.append(_tuple(items))
            elif name == "APPENDS":
                _held(stack).update(item.kind for item in items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"):
            count = int(name[-1]) if name[-1].isdigit() else 0
            items = [stack.pop() for _ in range(count)]
            stack.append(_tuple(items[::-1]))
        elif name == "GLOBAL":
            stack.append(_Value("global", _known(str(argument).replace(" ", "."), allowed)))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(_called(function, arguments, allowed))
        elif name == "BUILD":
            stack.pop()
            made = stack[-1]
            if made.kind != "made" or not (made.name in allowed or made.name == _ORDERED):
                raise WeightsError(f"sets the state of '{made}', which no weights need")
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "SETITEM":
            del stack[-2:]
        elif name == "APPEND":
            item = stack.pop()
            _held(stack).add(item.kind)
        elif name == "BINPERSID":
            stack[-1] = _OTHER
        elif name == "BINUNICODE":
            stack.append(_Value("text", "latin1") if argument == "latin1" else _TEXT)
        elif name == "EMPTY_LIST":
            stack.append(_Value("list", held=set()))
        elif name == "EMPTY_DICT":
            stack.append(_DICT)
        elif name in _CONSTANTS:
            stack.append(_OTHER)
        elif name not in ("PROTO", "STOP"):
            raise WeightsError(f"damaged, or no PyTorch file: the opcode {name} in its pickle")


def _held(stack: list[_Value]) -> set[str]:
    held = stack[-1].held
    if held is None:
        raise WeightsError("adds to what is no list, which no weights need")
    return held


def _tuple(items: list[_Value]) -> _Value:
    size = 1 + sum(item.size for item in items)
    if size > _MAX_UNFOLDED:
        raise WeightsError(f"a tuple in it unfolds to more than {_MAX_UNFOLDED:,} values")
    return _Value("tuple", items=tuple(items), size=size)


def _known(name: str, allowed: _Allowed) -> str:
    if name in _NAMES or name in _CALLS or name in allowed or name in (STAND_IN, REBUILD):
        return name
    shown = "".join(c if c.isprintable() else "?" for c in name[:100])
    raise WeightsError(
        f"holds more than tensors ({shown}), which densely does not load since it could run code; "
        "ask for its state_dict, as safetensors at best"
    )


def _called(function: _Value, arguments: _Value, allowed: _Allowed) -> _Value:
    if function.kind == "global" and arguments.kind == "tuple":
        items = arguments.items
        if function.name == STAND_IN and [item.kind for item in items[1:2]] == ["global"]:
            return items[1]
        if function.name == REBUILD and len(items) == 1 and items[0].name in allowed.classes:
            return _called(items[0], _tuple([]), allowed)
        if function.name in allowed.beside or (function.name in allowed.classes and not items):
            return _Value("made", function.name)
        if function.name in _CALLS:
            shapes = _CALLS[function.name]
            if shapes is None or tuple(map(str, items)) in shapes:
                return _Value("made", function.name)
    raise WeightsError(f"calls '{function}' in a way that no weights need")

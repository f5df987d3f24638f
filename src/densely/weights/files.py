"""Files of weights, read without running anything that is in them, and written whole or not at all.

    .safetensors              preferred: no code, nothing to execute
    .pt .pth .tar .ckpt .bin  PyTorch's, read with `weights_only=True`
    .h5                       Keras's (`densely.weights.keras_h5`)

What a file is shows in its first bytes, whatever its name says. Older checkpoints hold a whole
pickled model in place of its weights; such a file is read with inert stand-ins for the classes
named below, whose tensors are then collected. No code of the file or of those packages runs.
"""

import contextlib
import struct
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from densely.errors import WeightsError, first_line
from densely.weights.keras_h5 import read_keras
from densely.weights.old_pickles import STAND_IN, without_module_ids
from densely.weights.pickles import REBUILD, check_pickle
from densely.whole_file import whole_file

#: Where a checkpoint keeps the weights among other things, the likeliest first.
_INNER = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params")
#: Wrappers in wrappers are followed so deep.
_DEPTH = 4
#: PyTorch's zip archives hold their tensors uncompressed: a larger sum is no honest file.
_SLACK_BYTES = 1 << 20
#: Letters of a key. MONAI's longest has 70, wrappers' prefixes come on top.
_MAX_NAME = 500
_MAX_MODULES = 20_000
_MAX_NESTED = 32
_ARCHIVE = b"PK\3\4"
#: Held while a file is read: what torch.load takes for safe is the whole process's.
_reading = threading.RLock()
#: In a legacy file: magic number, version, facts about the machine, the object, its storages.
_LEGACY_PICKLES = 5

_LAYERS = """
container.Sequential container.ModuleDict container.ModuleList
conv.Conv1d conv.Conv2d conv.Conv3d linear.Linear linear.Identity flatten.Flatten
batchnorm.BatchNorm1d batchnorm.BatchNorm2d batchnorm.BatchNorm3d
activation.ReLU activation.Sigmoid
pooling.MaxPool1d pooling.MaxPool2d pooling.MaxPool3d
pooling.AvgPool1d pooling.AvgPool2d pooling.AvgPool3d
pooling.AdaptiveAvgPool1d pooling.AdaptiveAvgPool2d pooling.AdaptiveAvgPool3d
dropout.Dropout dropout.Dropout1d dropout.Dropout2d dropout.Dropout3d
"""
_CLASSES = [f"torch.nn.modules.{name}" for name in _LAYERS.split()]
_CLASSES += [
    f"{package}.{name}"
    for package, names in {
        "torchvision.models.densenet": "DenseNet _DenseBlock _DenseLayer _Transition",
        "torchxrayvision.models": "DenseNet _DenseBlock _DenseLayer _Transition",
        "timm.models.densenet": "DenseNet DenseBlock DenseLayer DenseTransition",
        "monai.networks.nets.densenet": "DenseNet DenseNet121 DenseNet169 DenseNet201 DenseNet264 "
        "_DenseBlock _DenseLayer _Transition",
        "densely.models.densenet": "DenseNet DenseBlock DenseLayer Transition",
        "timm.layers.norm_act": "BatchNormAct2d",
        "timm.layers.adaptive_avgmax_pool": "SelectAdaptivePool2d FastAdaptiveAvgPool",
        "torch.nn.parallel.data_parallel": "DataParallel",
    }.items()
    for name in names.split()
]

#: What training scripts keep beside weights: the best score, the arguments, a path; and what an
#: accelerated module does.
_BESIDE = [
    "densely.fused.calls.Calls",
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in (
        "scalar", "_reconstruct",
    )),
]  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Args:
        tensors: the weights by the file's own keys.
        ignored: other entries of the file, by key, and what they are.
        metadata: a safetensors file's.
    """

    tensors: dict[str, Tensor]
    ignored: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def read_weights(path: Path) -> Contents:
    """Read a file of weights of any known format.

    Raises:
        WeightsError: missing, damaged, of an unknown format, or holding code.
    """
    contents = _read(path)
    for key in (*contents.tensors, *contents.ignored):  # which messages show
        if len(key) > _MAX_NAME or not key.isprintable():
            raise WeightsError(
                f"{path}: a name in it is {len(key):,} characters long, or not printable: no file "
                "of a DenseNet"
            )
    # A view of one number may claim to be of any size, and would be so once it is copied.
    claimed = sum(value.numel() * value.element_size() for value in contents.tensors.values())
    size = path.stat().st_size
    if claimed > 2 * size + _SLACK_BYTES:
        raise WeightsError(f"{path}: its {size:,} bytes claim to be {claimed:,} of weights")
    return contents


def _read(path: Path) -> Contents:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise WeightsError(f"{path}: is no plain file")  # of a pipe the reading would not end
        with path.open("rb") as file:
            begin = file.read(16)
    except IsADirectoryError:
        raise WeightsError(f"{path}: is a folder, expected a file of weights") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise WeightsError(f"{str(path)!r}: cannot be read: {first_line(error)}") from error
    if begin.startswith(b"\x89HDF\r\n\x1a\n"):
        return Contents(read_keras(path))
    if begin[8:9] == b"{":  # after the header's length, whose bytes may look like anything
        return _read_safetensors(path)
    if begin.startswith((b"PK", b"\x80")):
        return _read_torch(path, is_archive=begin.startswith(_ARCHIVE))  # as torch.load decides
    if not begin:
        raise WeightsError(f"{path}: is empty")
    raise WeightsError(
        f"{path}: no file of weights, or a damaged one: expected safetensors, PyTorch's .pt or "
        ".pth, or Keras's .h5"
    )


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # which one, differs with what is wrong
        raise WeightsError(f"{path}: damaged safetensors file: {first_line(error)}") from error
    return Contents(tensors, metadata=metadata)


def _read_torch(path: Path, is_archive: bool) -> Contents:
    try:
        with warnings.catch_warnings(), _stand_ins_alone():
            warnings.simplefilter("ignore")  # of classes that changed, and of storages to come
            # Opened here, since torch.load goes by the name of a file where it is given one.
            with _checked_archive(path) if is_archive else _checked_legacy(path) as file:
                loaded = torch.load(file, map_location="cpu", weights_only=True)
        tensors, ignored = unwrapped(loaded)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise WeightsError(f"{path}: damaged, or no PyTorch file: {first_line(error)}") from error
    if not tensors:
        raise WeightsError(f"{path}: no weights in it: {_listed(ignored)}")
    return Contents(tensors, ignored)


def _checked_legacy(path: Path) -> BinaryIO:
    stream = BytesIO(without_module_ids(path.read_bytes()))
    for _ in range(_LEGACY_PICKLES):
        check_pickle(stream, _CLASSES, _BESIDE)
    stream.seek(0)
    return stream


@contextlib.contextmanager
def _stand_ins_alone() -> Iterator[None]:
    """Within it torch.load makes stand-ins, and nothing that a program has called safe besides.

    One at a time, as what is safe is the whole process's.
    """
    with _reading:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            torch.serialization.add_safe_globals(_STAND_INS)
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def _require_one_directory(path: Path, size: int) -> None:
    """Refuse an archive whose list of files another reader than Python's might look for elsewhere.

    It must end where the archive's last record begins, and that record where the archive ends.
    """
    with path.open("rb") as file:
        file.seek(max(0, size - 98))
        tail = file.read().rjust(98, b"\0")  # what a large archive has (64 bits), and what each has
    large, locator, last = tail[:56], tail[56:76], tail[76:]
    ends = last[:4] == b"PK\5\6" and last[20:] == b"\0\0"
    length, start = struct.unpack("<II", last[12:20])
    at = size - 22
    if locator[:4] == b"PK\6\7":  # PyTorch writes these always
        at = size - 98
        wide = struct.unpack("<QQ", large[40:])
        ends &= large[:4] == b"PK\6\6" and struct.unpack("<Q", locator[8:16])[0] == at
        ends &= all(n in (w, 0xFFFFFFFF) for n, w in zip((length, start), wide, strict=True))
        length, start = wide
    if not ends or start + length != at:
        raise WeightsError("damaged, or no PyTorch file: it does not end as an archive does")


def _checked_archive(path: Path) -> BinaryIO:
    """A zip archive, opened; refuses one whose files would grow when they are unpacked."""
    size = path.stat().st_size
    _require_one_directory(path, size)
    with zipfile.ZipFile(path) as archive:
        if "model.weights.h5" in archive.namelist():
            raise WeightsError(
                "a .keras archive of a whole model: save its weights with Keras's "
                "model.save_weights('NAME.weights.h5')"
            )
        unpacked = sum(max(0, entry.file_size) for entry in archive.infolist())
        if unpacked > size + _SLACK_BYTES:
            raise WeightsError(
                f"its {size:,} bytes would unpack to {unpacked:,}: no file of PyTorch's"
            )
        for entry in archive.infolist():
            if entry.filename.lower().endswith("data.pkl"):  # PyTorch looks without regard to case
                with archive.open(entry) as pickle:
                    check_pickle(pickle, _CLASSES, _BESIDE)
    return path.open("rb")


class _StandIn:
    """In place of a module in a pickled model: keeps what the module held, and can do nothing."""

    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, dict) else {}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers, by the keys that `state_dict` gives them."""
        waiting, count = [("", self, 0)], 0
        while waiting:
            prefix, module, depth = waiting.pop()
            count += 1
            if depth > _MAX_NESTED or count > _MAX_MODULES:
                raise WeightsError("modules in modules without an end")
            state = module.__dict__.get("state", {})
            passing = state.get("_non_persistent_buffers_set")
            passing = passing if isinstance(passing, set) else set()
            for kind in ("_parameters", "_buffers"):
                for name, value in _items(state.get(kind)):
                    if isinstance(value, Tensor) and name not in passing:
                        yield prefix + name, value
            inner = [
                (f"{prefix}{name}.", value, depth + 1)
                for name, value in _items(state.get("_modules"))
                if isinstance(value, _StandIn)
            ]
            waiting += reversed(inner)


class _Beside(_StandIn):
    """In place of what is none of the weights, made from whatever it is made from."""

    def __init__(self, *arguments: object) -> None: ...


def _stand_in(kind: object, cls: object, file: object, source: object) -> type[_StandIn]:
    """In place of a class that an old pickle names with its source code."""
    if cls is not _StandIn:
        raise WeightsError("a module of an unknown class")
    return _StandIn


def _rebuild(cls: object) -> _StandIn:
    """In place of what makes an accelerated module again."""
    if cls is not _StandIn:
        raise WeightsError("an accelerated module of an unknown class")
    return _StandIn()


_STAND_INS: list[Any] = [
    (_stand_in, STAND_IN),
    (_rebuild, REBUILD),
    *((_StandIn, name) for name in _CLASSES),
    *((_Beside, name) for name in _BESIDE),
]


def _items(values: object) -> Iterator[tuple[str, object]]:
    if isinstance(values, Mapping):
        yield from ((str(name), value) for name, value in values.items())


def unwrapped(loaded: object, depth: int = 0) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights in a checkpoint, and what else is in it."""
    if isinstance(loaded, _StandIn) and not isinstance(loaded, _Beside):
        return dict(loaded.tensors()), {}
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"expected weights by name, found {type(loaded).__name__}")
    entries = {str(key): value for key, value in loaded.items()}
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    inner = [key for key, value in entries.items() if _holds_tensors(value)]
    known = [key for key in _INNER if key in inner]
    chosen = known[0] if known else inner[0] if len(inner) == 1 and not tensors else None
    if chosen is None or depth > _DEPTH:
        others = {k: type(v).__name__ for k, v in entries.items() if k not in tensors}
        return tensors, others
    found, below = unwrapped(entries[chosen], depth + 1)
    ignored = {f"{chosen}.{key}": what for key, what in below.items()}
    return found, ignored | {k: type(v).__name__ for k, v in entries.items() if k != chosen}


def _holds_tensors(value: object, depth: int = 0) -> bool:
    """Whether a dictionary, or a module in a pickle, has weights in it, or what has some."""
    if isinstance(value, _StandIn):
        return not isinstance(value, _Beside)
    if not isinstance(value, Mapping) or depth > _DEPTH:
        return False
    return any(isinstance(v, Tensor) or _holds_tensors(v, depth + 1) for v in value.values())


def write_weights(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write safetensors or, by the file's ending, PyTorch's format; whole or not at all.

    Raises:
        WeightsError: an ending that stands for neither.
    """
    if path.suffix not in (".safetensors", ".pt", ".pth", ".tar", ".ckpt", ".bin"):
        raise WeightsError(
            f"{path}: what to write does not show in '{path.suffix}': expected .safetensors, .pth, "
            ".pt, .tar, .ckpt or .bin"
        )
    try:
        kept = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        with whole_file(path) as part:
            if path.suffix == ".safetensors":
                save_file(kept, part, metadata={"format": "pt", **(metadata or {})})
            else:
                with part.open("wb") as file:
                    torch.save(kept, file)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise WeightsError(f"{path}: cannot be written: {reason}") from error
    except (SafetensorError, RuntimeError, ValueError) as error:  # as of tensors without numbers
        raise WeightsError(f"{path}: cannot be written: {first_line(error)}") from error


def _listed(names: Mapping[str, str]) -> str:
    shown = [f"{key} ({what})" for key, what in list(names.items())[:5]]
    return ", ".join(shown) + (" ..." if len(names) > 5 else "") if shown else "it is empty"

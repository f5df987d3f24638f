"""Saved networks and saved progress: safetensors and JSON, nothing that runs code when read.

    FOLDER/model.safetensors      weights, keys as torchvision's
    FOLDER/model.json             what they are the weights of, and how to use them
    FOLDER/optimizer.safetensors  momentum buffers
    FOLDER/state.json             where the run stands

There is no state of random numbers to keep: each derives from (seed, epoch, step), and `state.json`
holds all three.

A checkpoint is written beside the old one as FOLDER.new and then takes its place, by way of
FOLDER.old: whenever the process ends, one of the three is whole, and `find_checkpoint` knows which.
"""

import json
import os
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from densely.data import Preprocessing
from densely.errors import RunError, first_line
from densely.models import build_model


@dataclass(frozen=True)
class ModelInfo:
    """What a file of weights holds: the network's name, its classes, and its preprocessing.

    `options` are further arguments of the network: those that a run was given, and those that
    weights want which it was started from.
    """

    model: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Make the network, with fresh weights."""
        return build_model(
            self.model,
            num_classes=len(self.classes),
            in_channels=self.preprocessing.channels,
            image_size=self.preprocessing.image_size,
            **self.options,
        )


@dataclass
class Progress:
    """Where a run stands: `step` steps of epoch `epoch` (both from 0) are done.

    `seen`, `loss_sum` and `correct` sum over the images of those steps; `seconds` is the time
    they took. The best epoch so far is by accuracy on the validation split, if there is one, and
    by loss between equals.
    `total_s` is the time that the run took until it was saved, everything included.
    `settings` are the fields of the config that may not change when the run goes on, the seed
    among them, and `data_digest` tells whether the training images are still the same, as
    `held_out_digest` does of those for validation and test; empty in runs from before it was kept.
    """

    settings: dict[str, Any]
    data_digest: str
    held_out_digest: str = ""
    epoch: int = 0
    step: int = 0
    seen: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    total_s: float = 0.0
    best_epoch: int | None = None
    best_accuracy: float = 0.0
    best_loss: float = 1e9


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    info: ModelInfo,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write a checkpoint; at any time the old one or the new one is there, whole.

    Raises:
        OSError: it cannot be written, most often since the disk is full.
    """
    new, old = _beside(folder)
    if not folder.exists() and (left := find_checkpoint(folder)):
        os.replace(left, folder)  # what an earlier end of the process left undone
    shutil.rmtree(new, ignore_errors=True)
    try:
        _write(new, model, info, optimizer, progress)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)  # its room is wanted
        if isinstance(error, OSError):
            raise
        raise OSError(first_line(error)) from error
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _write(
    folder: Path,
    model: nn.Module,
    info: ModelInfo,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    folder.mkdir(parents=True)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    described = asdict(info) | {"format": 1}
    _write_json(folder / "model.json", described)
    save_file(_optimizer_tensors(optimizer), folder / "optimizer.safetensors")
    _write_json(folder / "state.json", asdict(progress))
    for path in (*folder.iterdir(), folder):
        _sync(path)


def find_checkpoint(folder: Path) -> Path | None:
    """`folder`, or where it was left when a process ended in the midst of saving; else None."""
    new, old = _beside(folder)
    for path in (folder, new, old):
        if (path / "state.json").exists():
            return path
    return None


def load_info(folder: Path) -> ModelInfo:
    """Read what a checkpoint holds the weights of.

    Raises:
        RunError: it is missing or damaged.
    """
    path = _found(folder) / "model.json"
    values = _read_json(path)
    try:
        return ModelInfo(
            str(values["model"]),
            tuple(str(name) for name in values["classes"]),
            Preprocessing.from_dict(values["preprocessing"]),
            dict(values.get("options", {})),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path}: damaged or of another version: {error}") from error


def load_model(folder: Path) -> tuple[nn.Module, ModelInfo]:
    """Read a saved network, in eval mode on the CPU.

    Raises:
        RunError: something is missing, damaged or does not fit; it is named.
    """
    folder = _found(folder)
    info = load_info(folder)
    try:
        model = info.build()
    except (TypeError, ValueError) as error:
        raise RunError(
            f"{folder / 'model.json'}: damaged or of another version: {error}"
        ) from error
    _load_weights(model, folder / "model.safetensors")
    return model.eval(), info


def load_progress(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Read weights, optimizer and progress back into a run's own objects.

    Raises:
        RunError: something is missing, damaged or does not fit; it is named.
    """
    folder = _found(folder)
    _load_weights(model, folder / "model.safetensors")
    parameters = _optimizer_parameters(optimizer)
    for key, value in _read_tensors(folder / "optimizer.safetensors").items():
        name, _, index = key.rpartition(".")
        if not index.isdigit() or int(index) >= len(parameters):
            raise RunError(f"{folder / 'optimizer.safetensors'}: unexpected key '{key}'")
        parameter = parameters[int(index)]
        if value.shape != parameter.shape:
            raise RunError(
                f"{folder / 'optimizer.safetensors'}: {key} is {list(value.shape)}, expected "
                f"{list(parameter.shape)}"
            )
        # In the parameter's own layout, which a file does not tell: fused steps of PyTorch go
        # through the memory of both in one order, or refuse.
        optimizer.state[parameter][name] = torch.empty_like(parameter.detach()).copy_(value)
    return load_state(folder)


def load_state(folder: Path) -> Progress:
    """Read where a run stands.

    Raises:
        RunError: `state.json` is missing or damaged.
    """
    folder = _found(folder)
    values = _read_json(folder / "state.json")
    hints = get_type_hints(Progress)
    try:
        progress = Progress(**values)
        for name, hint in hints.items():
            allowed = get_args(hint) if get_origin(hint) is not dict else (dict,)
            if not isinstance(getattr(progress, name), allowed or hint):
                raise TypeError(f"{name} is {getattr(progress, name)!r}")
    except TypeError as error:
        raise RunError(
            f"{folder / 'state.json'}: damaged or of another version: {error}"
        ) from error
    return progress


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")


def _found(folder: Path) -> Path:
    found = find_checkpoint(folder)
    if found is not None:
        return found
    config = folder.parent.parent / "config.yaml"
    if config.is_file():  # of a run that was stopped in its first moments
        raise RunError(
            f"{folder}: there is no checkpoint; the same run from the beginning: "
            f"densely train --config {shlex.quote(str(config))}"
        )
    raise RunError(f"{folder}: there is no checkpoint")


def _sync(path: Path) -> None:
    """Put a file, or the list of names in a folder, on disk."""
    if sys.platform == "win32":  # which has no such call for folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{i}": value.contiguous()
        for i, parameter in enumerate(_optimizer_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _load_weights(model: nn.Module, path: Path) -> None:
    tensors = _read_tensors(path)
    expected = model.state_dict()
    faults = [f"{key} is missing" for key in expected if key not in tensors]
    faults += [f"{key} is unexpected" for key in tensors if key not in expected]
    faults += [
        f"{key} is {list(tensors[key].shape)}, expected {list(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise RunError(f"{path}: does not fit the model: {'; '.join(faults[:3])}{more}")
    model.load_state_dict(tensors)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: missing or damaged: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: missing or damaged: {error}") from error
    if not isinstance(values, dict):
        raise RunError(f"{path}: damaged: expected a JSON object")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

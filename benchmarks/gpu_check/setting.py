"""What is checked, how much time there is, and the file that each finding goes to at once."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from densely.environment import environment
from densely.fused import kernels
from densely.models.registry import build_model
from densely.runtime import Runtime
from densely.whole_file import write_whole
from gpu_check.turns import Turns

#: Why something is not there; a stage with such a gap does not end with 0.
OUT_OF_TIME = "out of time"


@dataclass(frozen=True)
class CheckedNet:
    """A network by literal numbers, so that its steps can be made one by one.

    Args:
        name: in tables.
        model: as `build_model` takes it.
        in_channels: of the images.
        image_size: side in pixels.
        num_classes: outputs.
        stem_channels: what the first block reads.
        first_size: side of the first block's maps.
        blocks: layers of each.
        growth_rate: channels that a layer adds.
        bn_size: of bottlenecks; None for plain layers.
        bias: whether convolutions have one.
        pooled_stem: whether norm, ReLU and max pooling come before the first block.
    """

    name: str
    model: str
    in_channels: int
    image_size: int
    num_classes: int
    stem_channels: int
    first_size: int
    blocks: tuple[int, ...]
    growth_rate: int
    bn_size: int | None
    bias: bool
    pooled_stem: bool

    def shrunk(self) -> "CheckedNet":
        """The same kinds of steps, for a dry run."""
        small = {"image_size": 16, "first_size": 16}
        if self.pooled_stem:
            small = {"image_size": 64, "first_size": 16}
        blocks = tuple(min(layers, 2) for layers in self.blocks)
        return CheckedNet(**(vars(self) | small | {"blocks": blocks}))

    def build(self, fused: bool = True) -> nn.Module:
        """Densely's network with fresh weights, always the same."""
        torch.manual_seed(0)
        return build_model(
            self.model,
            block_config=self.blocks,
            num_classes=self.num_classes,
            in_channels=self.in_channels,
            fused=fused,
        )


NETS = {
    net.name: net
    for net in (
        CheckedNet("d2l", "d2l", 1, 96, 10, 64, 24, (4, 4, 4, 4), 32, None, True, True),
        CheckedNet(
            "bc", "densenet_bc_100_12", 3, 32, 10, 24, 32, (16, 16, 16), 12, 4, False, False
        ),
        CheckedNet("121", "densenet121", 3, 224, 1000, 64, 56, (6, 12, 24, 16), 32, 4, False, True),
    )
}


@dataclass
class Setting:
    """Options of a stage."""

    out: Path
    nets: tuple[CheckedNet, ...]
    dtypes: tuple[torch.dtype, ...]
    kernels: str
    compile_modes: tuple[str, ...]
    modes: tuple[str, ...]
    variants: tuple[str, ...]
    kinds: tuple[str, ...]
    budget_s: float
    smoke: bool
    train: tuple[str, ...] = ()
    turns: Turns = field(default_factory=Turns)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.smoke:
            self.nets = tuple(net.shrunk() for net in self.nets)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.smoke or not torch.cuda.is_available() else "cuda")

    @property
    def runtime(self) -> Runtime:
        """How densely trains on a GPU; a CPU without bfloat16 would take minutes."""
        return Runtime(self.device, "float32" if self.smoke else "bfloat16", "channels_last")

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget_s - (time.monotonic() - self.began)

    @contextmanager
    def forced_kernels(self) -> Iterator[str]:
        """Force the kernels asked for, if they are here; gives the name of what will run."""
        if self.kernels in kernels.available():
            with kernels.use(self.kernels):
                yield self.kernels
        else:
            yield f"not forced: {self.kernels} is not among {', '.join(kernels.available())}"


class Findings:
    """A JSON file that is whole after every finding: a run that is cut off still counts."""

    def __init__(self, setting: Setting, stage: str, **facts: Any) -> None:
        self._path = setting.out / f"{stage}.json"
        self._began = setting.began
        self.facts: dict[str, Any] = {
            "stage": stage,
            "smoke": setting.smoke,
            "environment": environment(setting.runtime) | {"command": None} | _commit(),
            "triton": _triton_version(),
            "launches_measured_here": _known_launches(setting.device),
            **facts,
        }
        self.rows: list[dict[str, Any]] = []
        self.flush()

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows.append(row)
        self.flush()

    def flush(self) -> None:
        """Write what there is, rows that changed since included."""
        seconds = round(time.monotonic() - self._began, 1)
        text = json.dumps(self.facts | {"seconds": seconds, "rows": self.rows}, indent=1)
        write_whole(self._path, text + "\n")


def _commit() -> dict[str, str]:
    """What the caller says that it is, since a checkout may travel without its history."""
    return {"commit": os.environ["COMMIT"]} if "COMMIT" in os.environ else {}


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


def _known_launches(device: torch.device) -> int:
    """Those that `densely bench --tune` has left for this GPU, in place of the rule's."""
    if device.type != "cuda" or kernels.missing(device):
        return 0
    from densely.fused.kernels.triton_launches import table_of

    return len(table_of(device))


def in_a_line(error: BaseException) -> str:
    """An exception in one line that still tells where to look."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]} [{place}]"

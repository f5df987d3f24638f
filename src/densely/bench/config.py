"""What `densely bench` measures: one frozen dataclass, from which its flags and help are made.

Importing this module does not import torch, so that `--help` answers at once.
"""

import dataclasses
import os
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

from densely.bench.nets import MODES, NETS, Net
from densely.errors import ConfigError

T = TypeVar("T")

_WHAT, _HOW, _WHERE = "what to measure", "how to measure", "where it runs and goes"


def _option(default: T, group: str, help: str) -> T:
    return dataclasses.field(default=default, metadata={"group": group, "help": help})


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Everything that decides a benchmark; checked when made, all faults at once.

    Raises:
        ConfigError: fields out of range.
    """

    net: Literal["all", "densenet121", "d2l", "bc_100_12"] = _option("all", _WHAT, "network")
    mode: Literal["all", "train", "inference"] = _option(
        "all", _WHAT, "training step (forward, loss, backward, SGD with momentum) or inference"
    )
    compile: bool = _option(False, _WHAT, "also the best peer under torch.compile: takes minutes")
    depth: bool = _option(
        True, _WHAT, "with training also bytes kept for backward by DenseNet-BC of growing depth"
    )
    peak_memory: bool = _option(
        True, _WHAT, "also peak memory: on a CPU in a fresh process for each variant"
    )
    tune: bool = _option(
        False,
        _WHAT,
        "measure no peers: find the fastest launches of the Triton kernels on this GPU, in some "
        "minutes, and keep them in the cache for all that densely runs on it",
    )
    batch: int | None = _option(
        None,
        _HOW,
        "images of a step; null takes "
        + ", ".join(f"{net.cpu_batch} for {net.name}" for net in NETS.values())
        + " on a CPU, and 256 on a GPU",
    )
    rounds: int = _option(5, _HOW, "turns of each variant; all have one before any has the next")
    steps: int = _option(2, _HOW, "steps of a turn")
    quick: bool = _option(
        False, _HOW, "a look: one round of one step, small batches, no peak memory, two depths"
    )
    device: str = _option("auto", _WHERE, "cpu, cuda, cuda:1, ...; auto takes a GPU if there is")
    threads: int | None = _option(None, _WHERE, "CPU threads; null leaves them to PyTorch")
    allocator: Literal["system", "keep"] = _option(
        "system",
        _WHERE,
        "for all variants alike: memory as the system gives it, or freed memory kept in the "
        "process, as densely's own commands do",
    )
    output: str = _option(
        "bench-results", _WHERE, "folder for the JSON and the pictures; those there are replaced"
    )

    def __post_init__(self) -> None:
        faults = [
            f"{name}={getattr(self, name)!r}: must be one of {', '.join(get_args(hint))}"
            for name, hint in get_type_hints(type(self)).items()
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint)
        ]
        for name in ("batch", "rounds", "steps", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                faults.append(f"{name}={value}: must be at least 1")
        here = os.cpu_count() or 1
        if self.threads is not None and self.threads > here:
            faults.append(f"threads={self.threads}: must be at most {here}, the processors here")
        if not self.output or "\0" in self.output:
            faults.append("output=: must be text that is not empty and can be part of a path")
        if faults:
            raise ConfigError("; ".join(faults))

    @classmethod
    def starting_from(cls, quick: bool) -> "BenchConfig":
        """The defaults, those of a measurement or those of a quick look."""
        if quick:
            return cls(quick=True, rounds=1, steps=1, batch=2, peak_memory=False)
        return cls()

    @property
    def nets(self) -> list[Net]:
        """The networks chosen."""
        return list(NETS.values()) if self.net == "all" else [NETS[self.net]]

    @property
    def modes(self) -> list[str]:
        """The modes chosen."""
        return list(MODES) if self.mode == "all" else [self.mode]

    def command(self) -> str:
        """The command that measures this again; where it goes is left out."""
        base = self.starting_from(self.quick)
        words = ["densely", "bench", *(["--quick"] if self.quick else [])]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("quick", "output") or value == getattr(base, field.name):
                continue
            flag = field.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", str(value)]
        return " ".join(words)

    def file_stem(self, device_type: str) -> str:
        """Name of the files written, without suffix; a quick look never replaces a measurement."""
        return os.path.join(self.output, f"bench-{device_type}{'-quick' if self.quick else ''}")

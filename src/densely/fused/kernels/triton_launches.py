"""Which launch a step runs by: the usual one, or what was measured to be faster on this GPU.

Each kernel file has a rule for its launches (tiles, warps, loads in flight), made from sweeps on an
H100, which serves any GPU. `densely bench --tune` measures others in their place, on the steps of a
real network, and keeps the fastest in a table, a JSON file for each GPU in the cache. A table is
read once a process, and what it does not know goes by the rule.
"""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
import triton
from torch import Tensor

from densely.cache import cache_folder
from densely.errors import first_line
from densely.fused.kernels.triton_tiles import precision
from densely.whole_file import write_whole

_log = logging.getLogger(__name__)

L = TypeVar("L", bound=tuple[Any, ...])
R = TypeVar("R")

#: Values of a launch as JSON has them.
Launches = dict[str, list[int | None]]


class Step(NamedTuple):
    """A launch that may be chosen.

    Args:
        kind: the kernel, such as "pointwise forward".
        x: what it reads, [rows, C].
        outputs: of the convolution.
        more: whatever else tells such launches apart.
    """

    kind: str
    x: Tensor
    outputs: int
    more: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Names it in tables. Rows go by powers of two: batches differ a little."""
        rows, columns = self.x.shape
        more = "".join(f" {int(number)}" for number in self.more)
        even = "even" if self.x.stride(0) % 8 == 0 else "odd"
        dtype = str(self.x.dtype).removeprefix("torch.")
        dtype += " tf32" if precision(self.x) == "tf32" else ""
        rows_up_to = 1 << max(0, rows - 1).bit_length()
        return f"{self.kind} {dtype} {rows_up_to} {columns} {even} {self.outputs}{more}"


class Choice(NamedTuple, Generic[L, R]):
    """Launches that a step may run by.

    Args:
        step: what is to be launched.
        usual: as the rule has it.
        others: to be tried in its place by a tuner.
        run: launches the step, for a tuner; sums that it leaves in parts, as many as a launch
            likes, are added up, which takes its time too.
        made: all that the step has made, from what `run` gives.
        added_to: what each run adds to.
    """

    step: Step
    usual: L
    others: Iterable[L]
    run: Callable[[L], R]
    made: Callable[[R], Sequence[Tensor]]
    added_to: Tensor | None = None


class Tuner(Protocol):
    """Measures launches while steps run."""

    def choose(self, choice: Choice[L, Any]) -> L:
        """The launch to go by: see `fastest`."""


_tuners: list[Tuner] = []


@contextmanager
def tuning(tuner: Tuner) -> Iterator[None]:
    """Let a tuner choose the launches of all steps within."""
    _tuners.append(tuner)
    try:
        yield
    finally:
        _tuners.pop()


def fastest(x: Tensor, usual: L, choice: Callable[[], Choice[L, Any]]) -> L:
    """The launch that is known to be the fastest for a step on x, or the usual one.

    `choice` is asked for where there is one, which takes longer than this does otherwise.
    """
    if _tuners:
        return _tuners[-1].choose(choice())
    table = table_of(x.device) if x.is_cuda else None
    known = table.get(choice().step.key) if table else None
    if known is None or len(known) != len(usual):
        return usual
    launch: Any = type(usual)
    return launch(*known)  # type: ignore[no-any-return]


def moments_of(taken: tuple[Tensor, int] | None, rows: int) -> list[Tensor]:
    """Mean and variance of each column from those of tiles of rows, as a forward gives them."""
    if taken is None:
        return []
    parts, tile_rows = taken
    firsts = torch.arange(len(parts), device=parts.device)[:, None] * tile_rows
    counts = (rows - firsts).clamp_max(tile_rows)
    means, seconds = parts.unbind(1)
    mean = (counts * means).sum(0) / rows
    return [mean, (seconds + counts * (means - mean).square()).sum(0) / rows]


def table_path(gpu: str) -> Path:
    """Where the table of a GPU of this name is."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return cache_folder() / "launches" / f"{name}.json"


def read_table(path: Path) -> Launches:
    """The launches in a file; none if it is not there, or of no use, which is logged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _log.warning("%s is left out, launches go by rule: %s", path, first_line(error))
        return {}
    launches = found.get("launches") if isinstance(found, dict) else None
    if launches is not None and found.get("kernels") != fingerprint():
        _log.info("%s is left out, launches go by rule: it is of other kernels", path)
        return {}
    if not (isinstance(launches, dict) and all(map(_is_launch, launches.values()))):
        _log.warning("%s is left out, launches go by rule: it holds no launches", path)
        return {}
    return launches


def write_table(path: Path, launches: Launches) -> None:
    """Keep launches for the kernels as they are now, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"kernels": fingerprint(), "launches": launches}
    write_whole(path, json.dumps(document, indent=1) + "\n")
    table_of.cache_clear()


@functools.cache
def fingerprint() -> str:
    """Names the Triton kernels by their contents: launches measured on others say nothing."""
    sources = b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("triton_*.py")))
    return hashlib.sha256(sources + triton.__version__.encode()).hexdigest()[:12]


def _is_launch(values: object) -> bool:
    """Counts, and perhaps a cap of registers: nothing that could ask for a huge tile."""
    return isinstance(values, list) and all(
        value is None or (type(value) is int and 0 <= value <= 256) for value in values
    )


@functools.cache
def table_of(device: torch.device) -> Launches:
    """The launches measured on a GPU, as they are when they are first asked for."""
    return read_table(table_path(torch.cuda.get_device_name(device)))

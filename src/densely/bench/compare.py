"""One comparison: all variants of a network in one mode, in turns."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from densely.bench.config import BenchConfig
from densely.bench.kept import kept_bytes
from densely.bench.nets import Net
from densely.bench.peak import ChildTask, added_to_gpu, peak_in_fresh_process
from densely.bench.progress import Progress
from densely.bench.results import Comparison, Measured
from densely.bench.trial import Trial, make_trial
from densely.bench.variants import Variant, variants


@dataclass
class _Entrant:
    variant: Variant
    row: Measured
    trial: Trial | None = None


def compare(
    config: BenchConfig,
    net: Net,
    mode: str,
    progress: Progress,
    timed: Callable[[Comparison], object] = lambda _: None,
) -> Comparison:
    """Measure all variants of a network in one mode.

    `timed` is called with all but peak memory, which takes minutes more on a CPU.

    Each has `config.rounds` turns, and all have one before any has the next: A B C, A B C. A peer
    that is not installed or fails becomes a gap with its reason, and so does whatever a GPU has
    no room for; any other failure of densely is raised.
    """
    entrants = [
        _Entrant(variant, Measured.begin(variant))
        for variant in variants(net, config.device, config.compile)
    ]
    device = entrants[0].variant.runtime.device
    batch = config.batch or net.batch(device.type)
    title = f"{net.name} {mode}"

    open_ones = [entrant for entrant in entrants if entrant.row.gap is None]
    progress.stage(f"{title}: making ready", len(open_ones))
    for entrant in open_ones:
        progress.turn(entrant.row.name)
        _make_ready(entrant, net, mode, batch, config.peak_memory)

    for i in range(config.rounds):
        ready = [entrant for entrant in entrants if entrant.trial is not None]
        progress.stage(f"{title}: round {i + 1} of {config.rounds}", len(ready))
        for entrant in ready:
            progress.turn(entrant.row.name)
            _take_turn(entrant, config.steps)

    for entrant in entrants:
        entrant.trial = None
    free()
    shape = (net.in_channels, net.image_size, net.image_size)
    rows = [entrant.row for entrant in entrants]
    found = Comparison(net.name, mode, batch, shape, config.steps, net.reference, rows)
    timed(found)
    if config.peak_memory and device.type == "cpu":
        measured = [entrant.row for entrant in entrants if entrant.row.gap is None]
        progress.stage(f"{title}: peak memory, each in a process of its own", len(measured))
        for row in measured:
            progress.turn(row.name)
            _take_peak(row, config, net, mode, batch)
    return found


def _make_ready(entrant: _Entrant, net: Net, mode: str, batch: int, peak: bool) -> None:
    """Make the trial, warm it up, and take what needs no clock."""
    row = entrant.row
    try:
        trial = make_trial(entrant.variant, net, mode, batch)
        if peak and trial.runtime.device.type == "cuda":
            row.peak_bytes = added_to_gpu(trial)
        trial.warm_up()
        row.parameters = sum(p.numel() for p in trial.model.parameters())
        if mode == "train":
            row.kept_bytes_per_image = kept_bytes(trial) // batch
        trial.model.zero_grad(set_to_none=True)
    except Exception as error:  # whatever somebody else's code may raise
        _leave_out(row, error)
        return
    entrant.trial = trial


def _take_turn(entrant: _Entrant, steps: int) -> None:
    """Time some steps; who fails, as for want of memory, makes room for the others."""
    assert entrant.trial is not None
    try:
        entrant.row.images_per_s.append(entrant.trial.images_per_s(steps))
    except Exception as error:
        _leave_out(entrant.row, error)
    if entrant.row.gap is not None:
        entrant.trial = None
        _collect()


def _leave_out(row: Measured, error: Exception) -> None:
    """Make a gap of a row, or raise what densely should not have raised."""
    if row.kind != "peer" and not isinstance(error, ImportError | torch.OutOfMemoryError):
        raise error
    row.gap = reason(error)
    row.images_per_s.clear()
    row.peak_bytes = row.parameters = row.kept_bytes_per_image = None


def _take_peak(row: Measured, config: BenchConfig, net: Net, mode: str, batch: int) -> None:
    task = ChildTask(
        net=net.name,
        variant=row.name,
        mode=mode,
        batch=batch,
        device=config.device,
        threads=torch.get_num_threads(),
        allocator=config.allocator,
    )
    try:
        row.peak_bytes = peak_in_fresh_process(task)
    except Exception as error:
        row.notes.append(f"peak memory: {reason(error)}")


def reason(error: Exception) -> str:
    """An exception in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def free() -> None:
    """Give back what the networks held, and forget what was compiled for them."""
    torch.compiler.reset()
    _collect()


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

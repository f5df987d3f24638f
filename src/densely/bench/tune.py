"""`densely bench --tune`: the fastest launches of the Triton kernels on this very GPU.

A training step and an inference run once each, and each launch that may be chosen is measured in
its place, on its own operands, beside others. One that makes something else than the usual one is
out. Before that all runs without launching anything, while what will be tried is compiled, many at
once.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from densely.bench.config import BenchConfig
from densely.bench.nets import Net
from densely.bench.progress import Progress
from densely.bench.trial import Trial, make_trial
from densely.bench.variants import variants
from densely.errors import ConfigError
from densely.fused.kernels import compiling_ahead, missing
from densely.runtime import choose_runtime

if TYPE_CHECKING:  # which imports Triton
    from densely.fused.kernels.triton_launches import Choice, Launches

L = TypeVar("L", bound=tuple[Any, ...])

#: Times of a launch within this share of the usual one's are noise, and the usual one stays.
NOISE = 0.03
#: Of the length of what the usual launch makes: sums in another order, rounded to 16 bits.
APART = 0.01


class Gain(NamedTuple):
    """Times of a step by its usual launch and by the one that is gone by, in milliseconds."""

    usual: float
    chosen: float


class Tuner:
    """Measures each kind of step once and goes by the fastest launch from then on.

    Args:
        measure: takes work, and gives the time of it in milliseconds.
        begin: is told the name of each step that is to be measured.

    Attributes:
        launches: the fastest, where it is another one than the usual.
        gains: times of all steps.
    """

    def __init__(
        self, measure: Callable[[Callable[[], object]], float], begin: Callable[[str], None]
    ) -> None:
        self.launches: Launches = {}
        self.gains: dict[str, Gain] = {}
        self._measure, self._begin = measure, begin

    def choose(self, choice: "Choice[L, Any]") -> L:
        """As `triton_launches.Tuner` has it."""
        key, added_to = choice.step.key, choice.added_to
        if key not in self.gains:
            self._begin(key)
            before = None if added_to is None else added_to.clone()

            def put_back() -> None:
                if added_to is not None and before is not None:
                    added_to.copy_(before)

            def results(launch: L) -> list[Tensor]:
                put_back()
                return [found.float() for found in choice.made(choice.run(launch))]

            self._find(choice, results)
            put_back()
        launch: Any = type(choice.usual)
        return launch(*self.launches.get(key, choice.usual))  # type: ignore[no-any-return]

    def added_to(self, known: "Launches") -> "Launches":
        """Launches that were known, and what is known of the steps measured now in their place."""
        others = {key: launch for key, launch in known.items() if key not in self.gains}
        return others | self.launches

    def _find(self, choice: "Choice[L, Any]", results: Callable[[L], list[Tensor]]) -> None:
        key, usual, run = choice.step.key, choice.usual, choice.run
        expected = [found.clone() for found in results(usual)]
        times: dict[L, float] = {usual: self._measure(partial(run, usual))}
        for other in choice.others:
            if other in times:
                continue
            try:
                if max(map(_apart, results(other), expected)) <= APART:
                    times[other] = self._measure(partial(run, other))
            except Exception:  # more registers or memory than this GPU has
                continue
        # Again: what disturbed the first measurement of a step must not make others look fast.
        times[usual] = min(times[usual], self._measure(partial(run, usual)))
        fastest = min(times, key=lambda launch: times[launch])
        if times[fastest] < (1 - NOISE) * times[usual]:
            self.launches[key] = list(fastest)
        else:
            fastest = usual
        self.gains[key] = Gain(times[usual], times[fastest])


class _All:
    """Counts steps, and runs each by all of its launches if these are compiled so; no tuner.

    Attributes:
        keys: of all steps.
    """

    def __init__(self, compiles: bool) -> None:
        self.keys: set[str] = set()
        self._compiles = compiles

    def choose(self, choice: "Choice[L, Any]") -> L:
        """As `triton_launches.Tuner` has it."""
        if choice.step.key not in self.keys:
            self.keys.add(choice.step.key)
            for other in choice.others if self._compiles else ():
                with suppress(Exception):  # it fails again when it is to be measured
                    choice.run(other)
        return choice.usual


def run_tune(config: BenchConfig) -> Path:
    """Measure launches on the nets that a config asks for, and add them to this GPU's table.

    Raises:
        ConfigError: there is no GPU that the Triton kernels run on.
    """
    runtime = choose_runtime(config.device)
    if runtime.device.type != "cuda":
        raise ConfigError(f"--tune: it is for GPUs, and this would run on {runtime.device.type}")
    if why := missing(runtime.device):
        raise ConfigError(f"--tune: the Triton kernels do not run here: {why}")

    from triton.testing import do_bench

    from densely.fused.kernels.triton_launches import read_table, table_path, write_table

    def measure(work: Callable[[], object]) -> float:
        return float(do_bench(work, warmup=5, rep=20, return_mode="median"))

    gpu = torch.cuda.get_device_name(runtime.device)
    path, console = table_path(gpu), Console(highlight=False)
    table = Table(
        "net", "mode", "steps", "faster ones", "time of all, ms", "all as one graph, ms", title=gpu
    )
    with Progress() as progress:
        for net, mode in product(config.nets, config.modes):
            batch = config.batch or net.batch("cuda")
            before = _whole_ms(net, mode, config.device, batch, measure)
            tuner = tune_net(net, mode, config.device, batch, measure, progress)
            write_table(path, tuner.added_to(read_table(path)))
            after = _whole_ms(net, mode, config.device, batch, measure)
            usual, chosen = (sum(times) for times in zip(*tuner.gains.values(), strict=True))
            table.add_row(
                f"{net.name}, batch {batch}",
                mode,
                str(len(tuner.gains)),
                str(len(tuner.launches)),
                f"{usual:.2f} -> {chosen:.2f}",
                f"{before:.2f} -> {after:.2f}",
            )
    console.print(table)
    console.print(f"written: {path}; all that densely runs on this GPU goes by it", soft_wrap=True)
    return path


def tune_net(
    net: Net,
    mode: str,
    device: str,
    batch: int,
    measure: Callable[[Callable[[], object]], float],
    progress: Progress,
) -> Tuner:
    """Measure the launches of a training step, or of inference.

    Args:
        net: whose step it is.
        mode: "train" or "inference".
        device: as `densely.runtime.choose_runtime` takes it.
        batch: images of the step.
        measure: see `Tuner`.
        progress: is told about each step.
    """
    from densely.fused.kernels.triton_launches import tuning

    trial = _trial(net, mode, device, batch)
    ahead = compiling_ahead()

    def once() -> None:
        """Without learning: from what nobody has computed yet the weights would get NaN."""
        if mode == "train":
            trial.loss().backward()  # type: ignore[no-untyped-call]
        else:
            trial.step()

    every = _All(compiles=ahead is not None)
    progress.stage(f"{net.name}, {mode}: compiling what will be tried", 1)
    progress.turn("kernels")
    with ahead or nullcontext(), tuning(every):
        once()
    progress.stage(f"{net.name}, {mode}: launches", len(every.keys))
    tuner = Tuner(measure, progress.turn)
    with tuning(tuner):
        once()
    return tuner


def _trial(net: Net, mode: str, device: str, batch: int) -> Trial:
    """Densely's own way to run the net, kernel after kernel."""
    return make_trial(variants(net, device)[0], net, mode, batch)


def _whole_ms(
    net: Net,
    mode: str,
    device: str,
    batch: int,
    measure: Callable[[Callable[[], object]], float],
) -> float:
    """Of a whole step or inference as densely runs it."""
    trial = _trial(net, mode, device, batch)
    trial.captured = True
    trial.warm_up()
    return measure(trial.step)


def _apart(found: Tensor, expected: Tensor) -> float:
    """Distance by the length of what is expected; infinite where that is no number."""
    distance = torch.linalg.vector_norm(found - expected)
    share = float(distance / torch.linalg.vector_norm(expected).clamp_min(1e-30))
    return math.inf if math.isnan(share) else share

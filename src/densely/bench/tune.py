"""`densely bench --tune`: the fastest launches of the Triton kernels on this very GPU.

A training step runs once, and each launch that may be chosen is measured in its place, on its own
operands, beside others. One that makes something else than the usual one is out. Before that,
processes for themselves compile what will be tried, as many at once as there are processors: it is
Triton's cache that they leave.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

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
from densely.fused.kernels import missing
from densely.runtime import choose_runtime

L = TypeVar("L", bound=tuple[Any, ...])

#: Times of a launch within this share of the usual one's are noise, and the usual one stays.
NOISE = 0.03
#: Of the length of what the usual launch makes: sums in another order, rounded to 16 bits.
APART = 0.01
#: Launches that are tried for a step, at most; as many processes compile.
MOST = 9


class Named(Protocol):
    """What tuners ask of a step: see `densely.fused.kernels.triton_launches`."""

    @property
    def key(self) -> str:
        """Names it in tables."""


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
        self.launches: dict[str, list[int | None]] = {}
        self.gains: dict[str, Gain] = {}
        self._measure, self._begin = measure, begin

    def choose(
        self,
        step: Named,
        usual: L,
        others: Iterable[L],
        run: Callable[[L], Tensor],
        added_to: Tensor | None,
    ) -> L:
        """As `triton_launches.Tuner` has it."""
        if step.key not in self.gains:
            self._begin(step.key)
            self._find(step.key, usual, others, run, added_to)
        launch: Any = type(usual)
        return launch(*self.launches.get(step.key, usual))  # type: ignore[no-any-return]

    def _find(
        self,
        key: str,
        usual: L,
        others: Iterable[L],
        run: Callable[[L], Tensor],
        added_to: Tensor | None,
    ) -> None:
        before = None if added_to is None else added_to.clone()

        def made(launch: L) -> Tensor:
            if added_to is not None and before is not None:
                added_to.copy_(before)
            return run(launch).float()

        expected = made(usual).clone()
        times: dict[L, float] = {usual: self._measure(lambda: run(usual))}
        for other in others:
            if other in times:
                continue
            try:
                if _apart(made(other), expected) > APART:
                    continue
                times[other] = self._measure(lambda other=other: run(other))  # type: ignore[misc]
            except Exception:  # more registers or memory than this GPU has
                continue
        if added_to is not None and before is not None:
            added_to.copy_(before)
        fastest = min(times, key=lambda launch: times[launch])
        if times[fastest] < (1 - NOISE) * times[usual]:
            self.launches[key] = list(fastest)
        else:
            fastest = usual
        self.gains[key] = Gain(times[usual], times[fastest])


class _Each:
    """Tries the launch of one number in each step, so that it is compiled, and goes by the usual.

    Attributes:
        keys: of all steps.
    """

    def __init__(self, number: int | None = None) -> None:
        self.keys: set[str] = set()
        self._number = number

    def choose(
        self,
        step: Named,
        usual: L,
        others: Iterable[L],
        run: Callable[[L], Tensor],
        _added_to: Tensor | None,
    ) -> L:
        """As `triton_launches.Tuner` has it."""
        if step.key not in self.keys and self._number is not None:
            for other in list(others)[self._number : self._number + 1]:
                try:
                    run(other)
                except Exception:  # it fails again when it is to be measured
                    break
        self.keys.add(step.key)
        return usual


def run_tune(config: BenchConfig) -> Path:
    """Measure launches on the nets that a config asks for, and add them to this GPU's table.

    Raises:
        ConfigError: there is no GPU that the Triton kernels run on.
    """
    runtime = choose_runtime(config.device)
    if runtime.device.type != "cuda":
        raise ConfigError(f"--tune: it is for GPUs, and this would run on {runtime.device.type}")
    if why := missing("cuda"):
        raise ConfigError(f"--tune: the Triton kernels do not run here: {why}")

    from triton.testing import do_bench

    from densely.fused.kernels.triton_launches import read_table, table_path, write_table

    def measure(work: Callable[[], object]) -> float:
        return float(do_bench(work, warmup=5, rep=20, return_mode="median"))

    gpu = torch.cuda.get_device_name(runtime.device)
    path, console = table_path(gpu), Console(highlight=False)
    table = Table("net", "steps", "faster ones", "time of all, ms", "training step, ms", title=gpu)
    with Progress() as progress:
        for net in config.nets:
            batch = config.batch or net.batch("cuda")
            before = _step_ms(net, config.device, batch, measure)
            tuner = tune_net(net, config.device, batch, measure, progress)
            write_table(path, read_table(path) | tuner.launches)
            after = _step_ms(net, config.device, batch, measure)
            usual, chosen = (sum(times) for times in zip(*tuner.gains.values(), strict=True))
            table.add_row(
                f"{net.name}, batch {batch}",
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
    device: str,
    batch: int,
    measure: Callable[[Callable[[], object]], float],
    progress: Progress,
    processes: int | None = None,
) -> Tuner:
    """Measure the launches of a training step.

    Args:
        net: whose step it is.
        device: as `densely.runtime.choose_runtime` takes it.
        batch: images of the step.
        measure: see `Tuner`.
        progress: is told about each step.
        processes: that compile; None for one a processor, 0 for none.
    """
    from densely.fused.kernels.triton_launches import tuning

    trial = _trial(net, device, batch)
    counting = _Each()
    with tuning(counting):
        trial.loss().backward()  # type: ignore[no-untyped-call]
    wanted = min(MOST, os.cpu_count() or 1) if processes is None else processes
    if wanted:
        progress.stage(f"{net.name}: compiling what will be tried", 1)
        progress.turn("kernels")
        with ProcessPoolExecutor(wanted, mp_context=get_context("spawn")) as pool:
            compiling = [pool.submit(_compile, net, device, batch, i) for i in range(MOST)]
            for one in compiling:
                one.exception()  # as of memory: what is missing is compiled when it is measured
    progress.stage(f"{net.name}: launches", len(counting.keys))
    tuner = Tuner(measure, progress.turn)
    with tuning(tuner):
        trial.loss().backward()  # type: ignore[no-untyped-call]
    return tuner


def _trial(net: Net, device: str, batch: int) -> Trial:
    """Densely's own way to train the net, kernel after kernel."""
    return make_trial(variants(net, device)[0], net, "train", batch)


def _compile(net: Net, device: str, batch: int, number: int) -> None:
    from densely.fused.kernels.triton_launches import tuning

    with tuning(_Each(number)):
        _trial(net, device, batch).loss().backward()  # type: ignore[no-untyped-call]


def _step_ms(
    net: Net, device: str, batch: int, measure: Callable[[Callable[[], object]], float]
) -> float:
    """Of the whole step as it trains."""
    trial = _trial(net, device, batch)
    trial.captured = True
    trial.warm_up()
    return measure(trial.step)


def _apart(found: Tensor, expected: Tensor) -> float:
    """Distance by the length of what is expected; infinite if there is a NaN in one alone."""
    distance = torch.linalg.vector_norm(found - expected)
    length = torch.linalg.vector_norm(expected)
    share = float(distance / length.clamp_min(1e-30))
    return share if share == share else float("inf")

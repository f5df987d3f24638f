"""Runs side by side on the same images: accuracy over seeds, paired tests, cost, curves.

Two networks that are right on as many images need not be right on the same ones. McNemar's test
looks only at the images on which the two differ: if neither is better, each is as likely as the
other to be the one that is right there, so their numbers follow a binomial of 1/2.

Sources: McNemar, "Note on the sampling error of the difference between correlated proportions"
(1947), in its exact form; Dietterich, "Approximate statistical tests for comparing supervised
classification learning algorithms" (1998).
"""

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from densely.comparison.same_images import Identity, identity, same_images
from densely.data.sources import is_here
from densely.environment import environment
from densely.errors import ConfigError, DenselyError, RunError
from densely.evaluation.classifier import Classifier
from densely.evaluation.cost import costs
from densely.evaluation.findings import Cost, Interval
from densely.evaluation.judged import Judged, judge, own_splits
from densely.evaluation.scores import wilson_share
from densely.runtime import MemoryFormat, Precision
from densely.training.config import Split, TrainConfig
from densely.training.run import EpochMetrics, RunDirectory

#: Digests of training images, by what they were read from and how they were parted.
_Known = dict[tuple[Any, ...], set[bytes]]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Args:
        name: of the variant, or of the run.
        runs: directories, in the order of their seeds.
        seeds: of each run, all different.
        accuracies: of each run.
        accuracy: mean over the runs with Student's 95% interval; Wilson's for a single run.
        cost: of one of the runs, measured in turns with the other groups'.
        curves: rows of `metrics.csv`, a list for each run.
    """

    name: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    accuracy: Interval
    cost: Cost
    curves: tuple[tuple[EpochMetrics, ...], ...]


@dataclass(frozen=True)
class Pair:
    """Two groups against each other: those of their runs that have the same seed.

    Args:
        first: name of a group.
        second: name of the other.
        seeds: that both have, one for each pair of runs; two single runs are a pair of any seeds.
        left_out: runs without a counterpart.
        difference: mean accuracy of the first less that of the second, with the paired Student's
            95% interval over the pairs; None for fewer than two, or equal ones.
        only_first: images that only the first got right, of each pair of runs.
        only_second: images that only the second got right.
        p_values: McNemar's, of each pair of runs.
    """

    first: str
    second: str
    seeds: tuple[int, ...]
    left_out: tuple[str, ...]
    difference: Interval | None
    only_first: tuple[int, ...]
    only_second: tuple[int, ...]
    p_values: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, judged on the same images; `title` says of what.

    `schedule` are the fields of training that all runs share and that say how long they learned.
    `split` is the part of the data that runs were trained on; None for other data, of which
    `learned` images are, to the last pixel, ones that a network learned from.
    """

    title: str
    data: str
    images: int
    split: Split | None
    learned: int
    date: str
    schedule: dict[str, Any]
    groups: tuple[Group, ...]
    pairs: tuple[Pair, ...]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def compare(
    runs: Sequence[str | os.PathLike[str]] | Mapping[str, Sequence[str | os.PathLike[str]]],
    data: str | None = None,
    *,
    split: Split = "test",
    data_dir: str | None = None,
    title: str = "comparison",
    device: str = "auto",
    precision: Precision = "auto",
    memory_format: MemoryFormat = "auto",
) -> Comparison:
    """Compare trained runs on the same images.

    Args:
        runs: run directories; those that differ in their seed alone form a group. Or groups of
            them by name, in which no seed may come twice.
        data: as for `evaluate`; None for what the runs learned from.
        split: part of the data.
        data_dir: where the files of a named data set are looked for first.
        title: for tables and pictures.
        device: "auto", "cpu", "cuda", ...
        precision: "auto", "float32" or "bfloat16".
        memory_format: "auto", "contiguous" or "channels_last".

    Raises:
        DenselyError: fewer than two groups; a run or a group's seed that comes twice; runs that
            are missing or know other classes; or runs whose splits are not the same images.
    """
    groups = (
        {name: _by_seed(name, members) for name, members in runs.items()}
        if isinstance(runs, Mapping)
        else grouped([Path(run) for run in runs])
    )
    if len(groups) < 2:
        raise ConfigError(
            f"{sum(map(len, groups.values()))} run(s) of one configuration: name runs of at least "
            "2, which differ in more than their seed"
        )
    named = [run for members in groups.values() for run in members]
    _refuse_twice(named)
    for run in named:
        if not RunDirectory.open(run).rows():
            raise RunError(f"{run}: has no finished epoch to compare")
    known: _Known = {}
    judged = {
        name: [
            _judged(
                run,
                data,
                known,
                split=split,
                data_dir=data_dir,
                device=device,
                precision=precision,
                memory_format=memory_format,
            )
            for run in members
        ]
        for name, members in groups.items()
    }
    everything = [run for members in judged.values() for run in members]
    first = everything[0]
    for other in everything[1:]:
        if not same_images(first.images, other.images):
            raise ConfigError(
                f"{first.run.path} and {other.run.path} are judged on different images or classes: "
                "name the same ones for both with --data"
            )
    leaders = [members[0].classifier for members in judged.values()]
    weighed = costs([(leader.model, leader.info) for leader in leaders], first.classifier.runtime)
    return Comparison(
        title=title,
        data=first.images.source,
        images=len(first.right),
        split=split if any(run.is_own for run in everything) else None,
        learned=max(run.learned for run in everything),
        date=datetime.date.today().isoformat(),
        schedule=_shared_schedule([run.run for run in everything]),
        groups=tuple(
            _group(name, members, cost)
            for (name, members), cost in zip(judged.items(), weighed, strict=True)
        ),
        pairs=tuple(
            _pair(a, judged[a], b, judged[b])
            for i, a in enumerate(judged)
            for b in list(judged)[i + 1 :]
        ),
        environment=environment(first.classifier.runtime),
    )


def grouped(runs: Sequence[Path]) -> dict[str, list[Path]]:
    """Runs by configuration: those that differ in seed, name and place alone stand together.

    Raises:
        ConfigError: a run is named twice, or two runs of a group have the same seed.
    """
    _refuse_twice(runs)
    free = {"seed", "name", "output", "device", "data_dir"}
    members: dict[str, list[Path]] = {}
    for run in runs:
        config = dataclasses.asdict(RunDirectory.open(run).config())
        key = json.dumps({k: v for k, v in config.items() if k not in free}, sort_keys=True)
        members.setdefault(key, []).append(run)
    named: dict[str, list[Path]] = {}
    for found in members.values():
        group = _by_seed(None, found)
        name = group[0].name
        named[name if name not in named else str(group[0])] = group
    return named


def _refuse_twice(runs: Sequence[Path]) -> None:
    """Refuse a folder that is named twice, in whatever words."""
    known: dict[Path, Path] = {}
    for run in runs:
        place = run.resolve()
        if place in known:
            raise ConfigError(f"{run}: named twice, as {known[place]} before; leave one out")
        known[place] = run


def _by_seed(name: str | None, runs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Runs of a group in the order of their seeds: equal ones would count one training twice."""
    found: dict[int, Path] = {}
    for run in map(Path, runs):
        seed = RunDirectory.open(run).config().seed
        if seed in found:
            where = "" if name is None else f"'{name}': "
            raise ConfigError(
                f"{where}{found[seed]} and {run} both have seed {seed}, and runs of a group must "
                "differ in it; leave one of them out"
            )
        found[seed] = run
    if not found:
        raise ConfigError(f"'{name}': no runs; name at least one, or leave the group out")
    return [found[seed] for seed in sorted(found)]


@dataclass(frozen=True)
class _Judged:
    """A run, what it was judged on, and which of that it is right on.

    The images are of its own data, or others, of which it has `learned` some all the same.
    """

    run: RunDirectory
    config: TrainConfig
    classifier: Classifier
    images: Identity
    is_own: bool
    learned: int
    right: NDArray[np.bool_]


def _judged(
    run: str | os.PathLike[str], data: str | None, known: _Known, **options: Any
) -> _Judged:
    found = judge(run, data, **options)
    right: NDArray[np.bool_] = (found.logits.argmax(dim=1) == found.labels).numpy()
    config = found.run.config()
    images = identity(found.images, found.data, config.split_seed)
    is_own, learned = found.own is not None, 0
    if not is_own:
        digests = _learned_from(found, config, known, options["data_dir"])
        learned = found.images.count_among(digests)
    return _Judged(found.run, config, found.classifier, images, is_own, learned, right)


def _learned_from(
    found: Judged, config: TrainConfig, known: _Known, data_dir: str | None
) -> set[bytes]:
    """Digests of the images that a run learned from; runs of the same ones read them once.

    None where its data are gone, or would have to be fetched: nobody can tell then.
    """
    prep = found.classifier.preprocessing
    parted = (config.data, config.split_seed, config.validation, config.limit)
    key = (*parted, prep.image_size, prep.channels)
    if key not in known:
        known[key] = set()
        with suppress(DenselyError, OSError):
            if is_here(config.data):
                own = own_splits(found.run, found.classifier, data_dir)
                known[key] = {*own.train.digests()}
    return known[key]


def _group(name: str, members: Sequence[_Judged], cost: Cost) -> Group:
    accuracies = [float(member.right.mean()) for member in members]
    curves = tuple(tuple(member.run.rows()) for member in members)
    return Group(
        name=name,
        runs=tuple(str(member.run.path) for member in members),
        seeds=tuple(member.config.seed for member in members),
        accuracies=tuple(accuracies),
        accuracy=_accuracy(members),
        cost=cost,
        curves=curves,
    )


def _accuracy(members: Sequence[_Judged]) -> Interval:
    mean = _student([float(member.right.mean()) for member in members])
    if mean is None:
        return wilson_share(int(members[0].right.sum()), len(members[0].right))
    return Interval(mean.value, max(0.0, mean.low), min(1.0, mean.high))


def _pair(a: str, ones: Sequence[_Judged], b: str, others: Sequence[_Judged]) -> Pair:
    first, second = ({run.config.seed: run for run in group} for group in (ones, others))
    seeds = [seed for seed in first if seed in second]
    matched = [(first[seed], second[seed]) for seed in seeds]
    if len(ones) == len(others) == 1:  # two networks, whatever their seeds
        matched = [(ones[0], others[0])]
    only_a = [int((one.right & ~other.right).sum()) for one, other in matched]
    only_b = [int((~one.right & other.right).sum()) for one, other in matched]
    images = len(ones[0].right)
    differences = [(x - y) / images for x, y in zip(only_a, only_b, strict=True)]
    paired = [id(run) for pair in matched for run in pair]
    alone = [run for run in (*ones, *others) if id(run) not in paired]
    return Pair(
        first=a,
        second=b,
        seeds=tuple(seeds),
        left_out=tuple(str(run.run.path) for run in alone),
        difference=_student(differences),
        only_first=tuple(only_a),
        only_second=tuple(only_b),
        p_values=tuple(mcnemar(x, y) for x, y in zip(only_a, only_b, strict=True)),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value: how likely so uneven a split is if neither is better."""
    differing = only_first + only_second
    return float(stats.binomtest(only_first, differing).pvalue) if differing else 1.0


def _student(values: Sequence[float]) -> Interval | None:
    """Mean and 95% interval of a mean of few values; None where they tell nothing of their spread.

    That is of fewer than two, and of equal ones, as runs that are all right have.
    """
    if len({*values}) < 2:
        return None
    mean, error = float(np.mean(values)), float(stats.sem(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return Interval(mean, mean - reach, mean + reach)


def _shared_schedule(runs: Sequence[RunDirectory]) -> dict[str, Any]:
    """What says how long and on what all runs learned, where they agree."""
    wanted = ("data", "image_size", "limit", "epochs", "batch_size", "lr", "schedule")
    configs = [dataclasses.asdict(run.config()) for run in runs]
    return {
        key: configs[0][key]
        for key in wanted
        if configs[0][key] is not None and all(config[key] == configs[0][key] for config in configs)
    }

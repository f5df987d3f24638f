"""Training the runs of a comparison, one after another, and going on where they were stopped.

COMPARISON/config.yaml                      what is compared
           runs/VARIANT-seedN-001/          a run directory each
           comparison.json, .png, README.md what came out
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from densely.comparison.config import CompareConfig, slug
from densely.comparison.same_images import Identity, identity, same_images
from densely.errors import ConfigError, DataError, Diverged
from densely.evaluation.judged import part_of
from densely.runtime import Runtime, choose_runtime
from densely.training.checkpoint import find_checkpoint, load_state
from densely.training.config import TrainConfig
from densely.training.loop import from_anywhere, train
from densely.training.reporting import Reporter
from densely.training.run import RunDirectory, numbered_folder
from densely.training.splits import held_out_digest, splits_of
from densely.training.start import begin, check_start
from densely.whole_file import write_whole


def create_folder(config: CompareConfig, output: Path) -> Path:
    """Make the next free `OUTPUT/compare-NAME-NNN` with the configuration in it.

    Raises:
        DenselyError: a variant cannot be trained, or would be judged on other images than the
            others; or the folder cannot be made.
    """
    _check_hardware(config)
    judged: dict[str, Identity] = {}
    for variant in config.variants:  # before anything is written: hours may follow
        last = from_anywhere(config.config(variant, config.seeds - 1))
        check_start(last)
        splits = splits_of(last)
        begin(last, splits.train)
        judged[variant] = identity(part_of(splits, config.split), last.data, last.split_seed)
    one, *others = judged
    for other in others:
        if not same_images(judged[one], judged[other]):
            raise ConfigError(
                f"variants '{one}' and '{other}' would be judged on different images or classes: "
                f"the {config.split} split of their data must be the same"
            )
    folder = new_folder(output, config.name)
    _write_config(folder, config)
    return folder


def change_folder(folder: Path, config: CompareConfig) -> None:
    """Let a comparison go on with its data in another place, or on other hardware.

    Raises:
        DenselyError: the data are not there, or are not those that its runs learned from; or its
            runs were trained in another precision.
    """
    _check_hardware(config)
    before = CompareConfig.read(folder / "config.yaml").train
    if config.train.precision != before.precision:
        _check_precision(folder, config)
    if (config.train.data, config.train.data_dir) != (before.data, before.data_dir):
        for variant in config.variants:
            _check_data(folder, config, variant)
    _write_config(folder, config)


def _check_data(folder: Path, config: CompareConfig, variant: str) -> None:
    splits = splits_of(config.config(variant, 0))
    learned, held_out = splits.train.digest(), held_out_digest(splits)
    for number in range(config.seeds):
        wanted = config.config(variant, number)
        run = _latest(folder / "runs", wanted.run_name)
        if run is None or not find_checkpoint(run.last):
            continue
        state = load_state(run.last)
        if state.data_digest != learned:
            raise DataError(
                f"{run.path} learned from other training images than {wanted.data} gives"
            )
        if state.held_out_digest not in ("", held_out):
            raise DataError(
                f"{run.path} began with other validation or test images than {wanted.data} gives"
            )


def _check_hardware(config: CompareConfig) -> None:
    """Refuse devices that are not here, whichever variant asks for them."""
    for variant in config.variants:
        _runtime_of(config.config(variant, 0))


def _check_precision(folder: Path, config: CompareConfig) -> None:
    """Refuse to go on in another precision: a difference could be its, and not the variants'."""
    for _, wanted, run in _so_far(folder, config):
        if run is None or not find_checkpoint(run.last):
            continue
        before, now = run.precision(), _runtime_of(wanted).precision
        if before != now:
            raise ConfigError(
                f"{run.path} was trained in {before}, and this comparison would go on in {now}: "
                f"go on with --precision {before}, or begin a new one"
            )


def _runtime_of(config: TrainConfig) -> Runtime:
    return choose_runtime(config.device, config.precision, config.memory_format)


def _write_config(folder: Path, config: CompareConfig) -> None:
    """Keep what is compared, by full paths, so that it goes on from wherever it is called."""
    places = ("data", "data_dir", "weights")
    config = dataclasses.replace(
        config,
        train=from_anywhere(config.train),
        variants={
            name: changes
            | {
                place: getattr(from_anywhere(config.config(name, 0)), place)
                for place in places
                if place in changes
            }
            for name, changes in config.variants.items()
        },
    )
    write_whole(folder / "config.yaml", config.to_yaml())


def new_folder(output: Path, name: str) -> Path:
    """Make the next free `OUTPUT/compare-NAME-NNN`.

    Raises:
        RunError: it cannot be made.
    """
    return numbered_folder(output, f"compare-{slug(name)}")


def train_all(
    folder: Path, config: CompareConfig, reporter_for: Callable[[str], Reporter]
) -> dict[str, list[Path]]:
    """Train what is not yet trained, seed after seed, so that each seed compares all variants.

    Args:
        folder: of the comparison.
        config: what is compared.
        reporter_for: makes the voice of a run from a line that says which it is.

    Returns:
        The runs of each variant, in the order of their seeds.

    Raises:
        DenselyError: training failed; what is trained already was in another precision; or
            (`Stopped`) a signal ended it after saving.
    """
    if any(run is None or not finished(run) for *_, run in _so_far(folder, config)):
        _check_precision(folder, config)
    total = len(config.variants) * config.seeds
    runs: dict[str, list[Path]] = {variant: [] for variant in config.variants}
    for number, (variant, wanted, begun) in enumerate(_so_far(folder, config), start=1):
        if begun is not None and finished(begun):
            _follow_data(begun, from_anywhere(wanted))
            path = begun.path
        else:
            title = f"[{number}/{total}] {variant}, seed {wanted.seed}"
            resume = begun.path if begun is not None and find_checkpoint(begun.last) else None
            try:
                path = train(wanted, resume=resume, reporter=reporter_for(title)).run
            except Diverged as error:
                raise Diverged(f"variant '{variant}', seed {wanted.seed}: {error}") from error
        runs[variant].append(path)
    return runs


def _follow_data(run: RunDirectory, now: TrainConfig) -> None:
    """Let a finished run find its data where they are now, as a run does that goes on."""
    before = run.config()
    moved = dataclasses.replace(before, data=now.data, data_dir=now.data_dir)
    if moved != before:
        run.write_config(moved)


def finished(run: RunDirectory) -> bool:
    """Whether a run came to its end: the model card is the last thing it writes."""
    return run.card_file.is_file()


def _so_far(
    folder: Path, config: CompareConfig
) -> Iterator[tuple[str, TrainConfig, RunDirectory | None]]:
    """Each run's variant, what it is to be, and the run where it has begun: seed after seed."""
    output = folder / "runs"
    for number in range(config.seeds):
        for variant in config.variants:
            wanted = dataclasses.replace(config.config(variant, number), output=str(output))
            yield variant, wanted, _latest(output, wanted.run_name)


def _latest(folder: Path, name: str) -> RunDirectory | None:
    paths = sorted(folder.glob(f"{name}-[0-9][0-9][0-9]"))
    return RunDirectory.open(paths[-1]) if paths else None

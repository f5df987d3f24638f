"""`densely bench`: all comparisons that a config asks for, and the files that keep them."""

import dataclasses
import json
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from rich.console import Console

from densely.bench.compare import compare
from densely.bench.config import BenchConfig
from densely.bench.depth import DEPTHS, NOTE, DepthSeries, depth_series
from densely.bench.pictures import draw_bars, draw_depth
from densely.bench.progress import Progress
from densely.bench.results import Comparison
from densely.bench.tables import WIDTH, comparison_table, depth_table
from densely.environment import environment
from densely.errors import ConfigError
from densely.runtime import Runtime, choose_runtime, keep_freed_memory
from densely.whole_file import write_whole
from densely.words import counted

PEERS = ("torchvision", "timm", "monai")
ALLOCATORS = {"system": "memory as the system gives it", "keep": "freed memory kept for all"}


def run_bench(config: BenchConfig) -> Path:
    """Measure, print the tables as they come, and write JSON and pictures.

    Returns:
        The JSON file; the pictures lie beside it, with the same name and `.png`, `-depth.png`.

    Raises:
        ConfigError: the device does not exist, or the allocator cannot be set here.
    """
    runtime = choose_runtime(config.device)
    stem = Path(config.file_stem(runtime.device.type))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.allocator == "keep" and not keep_freed_memory():
        raise ConfigError("--allocator keep: works on Linux with glibc alone; leave it out")
    _check_folder(stem.parent)

    facts = environment(runtime) | {"command": None}  # which holds paths
    conditions = (
        f"{facts['device_name']}, "
        + (_threads(facts["threads"]) if runtime.device.type == "cpu" else "")
        + ALLOCATORS[config.allocator]
    )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(WIDTH, console.width)
    comparisons: list[Comparison] = []
    series: list[DepthSeries] = []
    path = stem.with_name(stem.name + ".json")
    console.print(conditions)

    def keep(so_far: list[Comparison]) -> None:
        """Write it at once: what was measured outlives an interruption."""
        write_whole(path, _document(config, runtime, facts, so_far, series))

    with Progress() as progress:
        for net in config.nets:
            for mode in config.modes:
                comparisons.append(
                    compare(config, net, mode, progress, lambda timed: keep([*comparisons, timed]))
                )
                console.print(comparison_table(comparisons[-1]))
                keep(comparisons)
        if config.depth and "train" in config.modes:  # inference keeps nothing for backward
            depths = DEPTHS[:2] if config.quick else DEPTHS
            series = depth_series(config.device, progress, depths)
            console.print(depth_table(series, NOTE))

    keep(comparisons)
    pictures = [stem.with_name(stem.name + ".png")]
    draw_bars(comparisons, pictures[0], conditions)
    if series:
        pictures.append(stem.with_name(stem.name + "-depth.png"))
        draw_depth(series, pictures[1])
    console.print(f"written: {', '.join(map(str, [path, *pictures]))}", soft_wrap=True)
    return path


def _check_folder(folder: Path) -> None:
    """Make the folder of the results, and see that it takes files: before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot be written: {error.strerror}") from error


def _document(
    config: BenchConfig,
    runtime: Runtime,
    facts: dict[str, Any],
    comparisons: list[Comparison],
    series: list[DepthSeries],
) -> str:
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "output"}
    document = {
        "command": config.command(),
        "date": datetime.now(UTC).date().isoformat(),
        "environment": facts,
        "peers": {name: _version(name) for name in PEERS},
        "allocator": config.allocator,
        "peak_memory": _how_peak(runtime) if config.peak_memory else None,
        "settings": settings,
        "comparisons": [comparison.to_dict() for comparison in comparisons],
    }
    if series:
        document["depth"] = {
            "note": NOTE,
            "precision": "float32",
            "depths": list(series[0].depths),
            "series": {line.name: line.to_dict() for line in series},
        }
    return json.dumps(document, indent=2) + "\n"


def _threads(count: int) -> str:
    return f"{counted(count, 'thread')}, "


def _how_peak(runtime: Runtime) -> str:
    if runtime.device.type == "cuda":
        return "the allocator's, beyond what it had given out before the first step"
    return "resident size of a fresh process, beyond that before the first step"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"

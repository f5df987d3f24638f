"""Make docs/results.md from the files in benchmarks/results; nothing in it is typed by hand.

python benchmarks/results_page.py
"""

import csv
import json
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "results.md"


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def machine(env: dict[str, Any]) -> str:
    versions = env["versions"]
    return (
        f"{env['device_name']}, {env['threads']} threads, {env['precision']}, "
        f"{env['memory_format']}; torch {versions['torch']}, Python {env['python']}, "
        f"densely {versions['densely']}"
    )


def run_facts(name: str) -> str:
    env = read(f"{name}/env.json")
    config = yaml.safe_load((RESULTS / name / "config.yaml").read_text(encoding="utf-8"))
    return (
        f"Command: `{' '.join(env['command'])}`. Seed {config['seed']}, commit {env['commit']}. "
        f"Machine: {machine(env)}."
    )


def epoch_table(every: list[dict[str, str]], running: list[dict[str, str]]) -> str:
    table = [
        "| epoch | train loss | train acc | test acc | test acc, running statistics | examples/s |",
        "|---|---|---|---|---|---|",
    ]
    for row, other in zip(every, running, strict=True):
        numbers = [
            float(row["train_loss"]),
            float(row["train_accuracy"]),
            float(row["test_accuracy"]),
            float(other["test_accuracy"]),
        ]
        cells = " | ".join(f"{number:.4f}" for number in numbers)
        table.append(f"| {row['epoch']} | {cells} | {float(row['examples_per_s']):.0f} |")
    return "\n".join(table)


def chapter() -> str:
    every, running = rows("chapter-run"), rows("chapter-run-running-statistics")
    same = all(
        a["train_loss"] == b["train_loss"] and a["train_accuracy"] == b["train_accuracy"]
        for a, b in zip(every, running, strict=True)
    )
    last, other = every[-1], running[-1]
    minutes = sum(float(row["epoch_s"]) for row in every) / 60
    return f"""## The chapter, on the real Fashion-MNIST

{run_facts("chapter-run")}

| | loss | train acc | test acc |
|---|---|---|---|
| the chapter, as published | 0.144 | 0.947 | 0.881 |
| densely | {float(last["train_loss"]):.4f} | {float(last["train_accuracy"]):.4f} | \
{float(last["test_accuracy"]):.4f} |
| densely, `--norm-batches 0` | {float(other["train_loss"]):.4f} | \
{float(other["train_accuracy"]):.4f} | {float(other["test_accuracy"]):.4f} |

{len(every)} epochs took {minutes:.1f} minutes, evaluation included.

{epoch_table(every, running)}

![curves](../benchmarks/results/chapter-run/curves.png)

Training is the chapter's; what the weights are judged with is not. At a constant learning rate of
0.1 the weights move faster than the running statistics of batch normalisation follow, and the test
accuracy jumps about, as in the chapter's own picture: the last column but one, from a run that
kept them (commit {read("chapter-run-running-statistics/env.json")["commit"]}, where the recipe did
so; `--norm-batches 0` does it now). With the statistics averaged over 20 training batches before
each evaluation the same weights are judged fairly. Training does not notice: the losses and
accuracies of the two runs are {"the same to the last digit" if same else "NOT the same"}."""


def quick_start() -> str:
    result = read("quickstart.json")
    table = ["| seed | test accuracy | seconds |", "|---|---|---|"]
    table += [
        f"| {run['seed']} | {run['test_accuracy']:.4f} | {run['wall_s']:.1f} |"
        for run in result["runs"]
    ]
    table_text = "\n".join(table)
    return f"""## The quick start

Command: `{result["command"]}`, which runs `densely train --seed SEED` and takes the wall time of
the whole command, start of Python included. Commit {result["environment"]["commit"]}. Machine:
{machine(result["environment"])}.

{table_text}"""


def speed() -> str:
    result = read("chapter-cpu.json")
    table = [
        "| | examples/s (median) | of the fastest peer | round by round |",
        "|---|---|---|---|",
    ]
    for name, values in result["variants"].items():
        by_round = ", ".join(f"{ratio:.2f}" for ratio in values["ratio_by_round"])
        ratio = f"{values['ratio_to_best_peer']:.2f}x"
        table.append(f"| {name} | {values['median']:.0f} | {ratio} | {by_round} |")
    table_text = "\n".join(table)
    return f"""## Examples/s against a learner's plain loop

Command: `{result["command"]}`. Commit {result["environment"]["commit"]}. Machine:
{machine(result["environment"])}. The peer is `benchmarks/plain_chapter.py`: the same net in plain
PyTorch, float32, with a DataLoader that resizes each image. All run in turns, each in a process of
its own; loading counts for all of them.

{table_text}

The data pipeline (picking, resizing from 28 to 96 pixels, scaling, layout) takes
{result["pipeline_ms"]:.1f} ms of a step of {result["step_ms"]:.0f} ms:
{100 * result["pipeline_share_of_step"]:.1f}%."""


def memory_reuse() -> str:
    result = read("memory-reuse-cpu.json")
    table = [
        "| | step, given back (ms) | step, kept (ms) | faster | peak memory (MB) |",
        "|---|---|---|---|---|",
    ]
    for precision in ("bfloat16", "float32"):
        plain, kept = (result["cases"][name] for name in (precision, f"{precision} keep"))
        table.append(
            f"| {precision} | {plain['step_ms']:.0f} | {kept['step_ms']:.0f} "
            f"| {plain['step_ms'] / kept['step_ms']:.2f}x "
            f"| {plain['peak_mb']:.0f} -> {kept['peak_mb']:.0f} |"
        )
    table_text = "\n".join(table)
    return f"""## Keeping freed memory (CPU)

Command: `{result["command"]}`. Commit {result["environment"]["commit"]}. Machine:
{machine(result["environment"])}. The chapter's training step, batch 256, channels-last; memory
that tensors free given back to the system, as glibc does by itself, or kept in the process
(`densely.runtime.keep_freed_memory`, which the commands call).

{table_text}"""


def page() -> str:
    parts = [
        "# Results",
        "Made by `python benchmarks/results_page.py` from the files in `benchmarks/results/`. "
        "Absolute speeds are one machine's on one day; ratios carry over. No figure on this page "
        "was measured on a GPU: those wait for one.",
        chapter(),
        speed(),
        memory_reuse(),
        quick_start(),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}")

"""Make docs/results.md from the files in benchmarks/results; nothing in it is typed by hand.

python benchmarks/results_page.py
"""

import statistics
from pathlib import Path
from typing import Any

import results_gpu
import yaml
from result_files import RESULTS, machine, read, rows

PAGE = Path(__file__).parents[1] / "docs" / "results.md"


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


def report() -> str:
    result = read("report-cpu.json")
    env = result["environment"]
    table = ["| calibration | NLL | Brier | ECE | adaptive ECE |", "|---|---|---|---|---|"]
    for score in result["calibration"]:
        numbers = (score[key] for key in ("nll", "brier", "ece", "adaptive_ece"))
        table.append(f"| {score['method']} | {' | '.join(f'{number:.4f}' for number in numbers)} |")
    choices = ["| wanted error | from this confidence on | answered | wrong among these |"]
    choices.append("|---|---|---|---|")
    for choice in result["choices"]:
        if choice["threshold"] is None:
            choices.append(f"| {choice['wanted_error']:.0%} | not reachable | | |")
            continue
        choices.append(
            f"| {choice['wanted_error']:.0%} | {choice['threshold']:.4f} "
            f"| {choice['coverage']:.1%} | {choice['error']:.2%} |"
        )
    accuracy = result["accuracy"]
    return f"""## The report, and whether probabilities can be believed

Command: `python benchmarks/bench_report.py RUN`, which times `{result["command"]}` in a process of
its own. The run: {result["model"]} at {result["image_size"]} pixels on Fashion-MNIST, \
{result["epochs"]} epochs of the chapter's recipe with 6,000 training images set aside
(`densely train --recipe d2l --validation 0.1 --epochs {result["epochs"]}`). \
Commit {env["commit"]}. Machine: {machine(env)}.

{result["images"]:,} test images with the whole page, the 6,000 for calibration included:
**{result["seconds"]:.0f} s**; the page has {result["page_bytes"] / 1e6:.1f} MB. \
Test accuracy {accuracy["value"]:.4f} (95% interval {accuracy["low"]:.4f} to \
{accuracy["high"]:.4f}).
Fitted on: {result["calibrated_on"]}; measured on the test split:

{chr(10).join(table)}

Thresholds from the validation split, and what they give on the test split:

{chr(10).join(choices)}"""


def claims() -> str:
    lines = [
        "## The chapter's two claims",
        "",
        "Tables, pictures and what they show: [the chapter](chapter.md#the-two-claims-measured). "
        "Difference: mean accuracy of the first less that of the second over the same seeds, with "
        "the paired 95% interval.",
        "",
        "| comparison | first | second | difference, points | 95% interval |",
        "|---|---|---|---|---|",
    ]
    for name in ("add-or-concatenate", "average-or-max"):
        if not (RESULTS / "claims" / name / "comparison.json").is_file():
            lines.append(f"| {name} | not measured yet | | | |")
            continue
        found = read(f"claims/{name}/comparison.json")
        for pair in found["pairs"]:
            value, low, high = (100 * pair["difference"][key] for key in ("value", "low", "high"))
            lines.append(
                f"| {name} | {pair['first']} | {pair['second']} | {value:+.2f} "
                f"| {low:+.2f} to {high:+.2f} |"
            )
    return "\n".join(lines)


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


def bench() -> str:
    result = read("bench-cpu.json")
    tables = [bench_table(comparison) for comparison in result["comparisons"]]
    compiled = read("compiled/bench-cpu.json")
    every_table = "\n\n".join(tables)
    peers = ", ".join(f"{name} {found}" for name, found in result["peers"].items())
    return f"""## Speed and memory on a CPU, beside the peers

Command: `{result["command"]}`. Commit {result["environment"]["commit"]}. Machine:
{machine(result["environment"])}; {peers}.
Medians of {result["settings"]["rounds"]} rounds in turns; ratios are taken round by round. "Kept"
is what autograd saves for the backward pass, "peak" what a fresh process adds in resident memory to
network and images. Freed memory is kept in the process for all variants alike. When this was
measured a turn did not begin with a step that is not timed, as it does now: a variant whose turn
follows that of one which holds much memory is shown slower than it is, by up to a third. And "plain
net checkpointed" kept the concatenated input of each layer, which is within the checkpoint now, as
in torchvision's.

{every_table}

With the compiled peer, in a run of its own (`{compiled["command"]}`, commit
{compiled["environment"]["commit"]}):

{bench_table(compiled["comparisons"][0])}

![bars](../benchmarks/results/bench-cpu.png)"""


def bench_bfloat16() -> str:
    result = read("bench-cpu-bfloat16.json")
    tables = "\n\n".join(bench_table(comparison) for comparison in result["comparisons"])
    depth = result["depth"]
    return f"""## The same on a CPU with bfloat16

Command: `{result["command"]}`. Commit {result["environment"]["commit"]}. Machine:
{machine(result["environment"])}. bfloat16 is what densely takes by itself here, and what all peers
are given that end in "bf16". Medians of {result["settings"]["rounds"]} rounds in turns, each of
which begins with a step that is not timed.

{tables}

![bars](../benchmarks/results/bench-cpu-bfloat16.png)

### Kept for the backward pass against depth

{depth["note"]}

{depth_table(depth)}

![memory against depth](../benchmarks/results/bench-cpu-depth.png)"""


def depth_table(depth: dict[str, Any]) -> str:
    lines = [
        "| variant | "
        + " | ".join(f"L = {n}, MB/image" for n in depth["depths"])
        + " | grows as |",
        "|---|" + "---|" * (len(depth["depths"]) + 1),
    ]
    for name, line in depth["series"].items():
        if line["gap"] is None:
            kept = " | ".join(f"{value / 1e6:.2f}" for value in line["kept_bytes_per_image"])
            lines.append(f"| {name} | {kept} | L^{line['exponent']:.3f} |")
    return "\n".join(lines)


def bench_table(comparison: dict[str, Any]) -> str:
    rows = comparison["variants"]
    train = comparison["mode"] == "train"
    side = comparison["image_shape"][-1]
    title = f"**{comparison['net']} at {side}x{side}, {comparison['mode']}, batch"
    lines = [
        f"{title} {comparison['batch']}**",
        "",
        f"| variant | images/s | of {comparison['reference']} | of the fastest peer "
        + ("| kept MB/image " if train else "")
        + "| peak MB |",
        "|---|---|---|---|" + ("---|" if train else "") + "---|",
    ]
    fastest = max(
        (row for row in rows.values() if row["kind"] == "peer" and not row["gap"]),
        key=lambda row: row["median_images_per_s"],
    )
    for name, row in rows.items():
        if row["gap"]:
            lines.append(f"| {name} | not measured: {row['gap']} |" + " |" * (4 if train else 3))
            continue
        speed = row["median_images_per_s"]
        pairs = zip(row["images_per_s"], fastest["images_per_s"], strict=True)
        beside = statistics.median(own / other for own, other in pairs)
        spread = f"{min(row['ratio_by_round']):.2f} to {max(row['ratio_by_round']):.2f}"
        cells = [f"{speed:.1f}", f"{row['ratio']:.2f}x ({spread})", f"{beside:.2f}x"]
        cells += [f"{row['kept_bytes_per_image'] / 1e6:.2f}"] if train else []
        cells += [f"{row['peak_bytes'] / 1e6:.0f}" if row["peak_bytes"] is not None else ""]
        lines.append(
            f"| {name if row['kind'] == 'peer' else f'**{name}**'} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def page() -> str:
    parts = [
        "# Results",
        "Made by `python benchmarks/results_page.py` from the files in `benchmarks/results/`. "
        "Absolute speeds are one machine's on one day; ratios hold for machines of its kind.",
        bench(),
        bench_bfloat16(),
        results_gpu.gpu_speed_now(),
        results_gpu.gpu_speed(),
        results_gpu.gpu_traffic(),
        results_gpu.gpu_kernels(),
        results_gpu.gpu_chapter(),
        results_gpu.gpu_cifar(),
        results_gpu.gpu_correct(),
        results_gpu.gpu_waiting(),
        chapter(),
        claims(),
        report(),
        speed(),
        memory_reuse(),
        quick_start(),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    results_gpu.draw()
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}")

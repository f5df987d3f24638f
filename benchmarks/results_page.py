"""Make docs/results.md from the files in benchmarks/results; nothing in it is typed by hand.

python benchmarks/results_page.py
"""

import csv
import json
import statistics
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


def gpu_speed_now() -> str:
    now, peers, before = (
        read(f"gpu-h100/{name}.json") for name in ("speed-now", "speed-peers", "speed-d2l")
    )
    wanted = {
        "eager NHWC": peers,
        "captured NHWC": peers,
        "compiled default captured": before,
    }
    lines = [
        "| net | densely, ms | images/s | " + " | ".join(f"of {name}" for name in wanted) + " "
        "| peak GB | of eager's peak |",
        "|---|---|---|" + "---|" * (len(wanted) + 2),
    ]
    for row in now["rows"]:
        ratios, peak = [], 0.0
        for name, result in wanted.items():
            found = [r for r in result["rows"] if (r["net"], r["variant"]) == (row["net"], name)]
            ratio = f"{found[0]['step_ms'] / row['step_ms']:.2f}x" if found else "not measured"
            ratios.append(ratio)
            if name == "eager NHWC":
                peak = found[0]["peak_gb"]
        lines.append(
            f"| {row['net']} | {row['step_ms']:.2f} | {row['images_per_s']:.0f} "
            f"| {' | '.join(ratios)} | {row['peak_gb']} | 1/{peak / row['peak_gb']:.1f} |"
        )
    table = "\n".join(lines)
    ceilings, env = now["ceilings"], now["environment"]
    return f"""## On a GPU: {env["device_name"]}

A training step as one CUDA graph. Command: `bash benchmarks/gpu_check.sh OUTDIR speed --modes train
--compile '' --variants "densely captured"`, of commit cb55a5a, launches one by one; the peers by
the same command on such a card 35 minutes before, and the compiled one a day before: so ratios are
of medians, not turn by turn. Captured plain PyTorch takes the same time within 1% in all of these
calls. torch {env["versions"]["torch"]}, Triton {now["triton"]}, Python {env["python"]}; batch
{now["batch"]}, bfloat16 under autocast, SGD with momentum. This card copies
{ceilings["copy_tb_per_s"]} TB/s and multiplies {ceilings["bf16_tflop_per_s"]:.0f} bfloat16 TFLOP/s.

{table}

The peak is that of the memory which PyTorch has given out, network and images left out; two work
spaces of cuBLAS, 67 MB, are in all of them. Launch after launch, before the last changes:
[launches-d2l.txt](../benchmarks/results/gpu-h100/launches-d2l.txt)."""


def gpu_speed() -> str:
    names = ("speed-d2l", "speed-121-bc", "speed-inference")
    results = [read(f"gpu-h100/{name}.json") for name in names]
    env = results[0]["environment"]
    lines = [
        "| net | step | variant | ms | images/s | of the best eager peer "
        "| of the best captured peer | peak GB | kept MB/image |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for row in result["rows"]:
            if "images_per_s" not in row:
                why = row.get("error") or row.get("gap")
                lines.append(
                    f"| {row['net']} | {row['mode']} | {row['variant']} | {why} |" + " |" * 5
                )
                continue
            beside = [
                other
                for other in result["rows"]
                if (other["net"], other["mode"]) == (row["net"], row["mode"])
                and not other["ours"]
                and "images_per_s" in other
            ]
            ratios = []
            for captured in (False, True):
                peers = [o["images_per_s"] for o in beside if o["captured"] == captured]
                ratios.append(f"{row['images_per_s'] / max(peers):.2f}x" if peers else "")
            name = f"**{row['variant']}**" if row["ours"] else row["variant"]
            lines.append(
                f"| {row['net']} | {row['mode']} | {name} | {row['step_ms']:.2f} "
                f"| {row['images_per_s']:.0f} | {' | '.join(ratios)} "
                f"| {row.get('peak_gb', '')} | {row.get('kept_mb_per_image', '')} |"
            )
    table = "\n".join(lines)
    ceilings = results[0]["ceilings"]
    return f"""### All variants, of earlier kernels

Command: `bash benchmarks/gpu_check.sh OUTDIR speed`. Commit {env["commit"]}; torch
{env["versions"]["torch"]}, Triton {results[0]["triton"]}, Python {env["python"]}. Batch
{results[0]["batch"]}, bfloat16 under autocast but where it says float32, SGD with momentum; medians
of rounds in turns. "Captured" is the whole step as one CUDA graph. 121 is DenseNet-121 at 224
pixels (peers: torchvision), bc DenseNet-BC-100-12 at 32, d2l the chapter's net at 96 (peers: plain
PyTorch). This card copies {ceilings["copy_tb_per_s"]} TB/s and multiplies
{ceilings["bf16_tflop_per_s"]:.0f} bfloat16 TFLOP/s. "Out of time" waits for another hour on it.

{table}"""


def gpu_traffic() -> str:
    result = read("traffic-account.json")
    names = {"d2l": "d2l, 96 pixels", "bc": "DenseNet-BC-100-12, 32", "121": "DenseNet-121, 224"}
    lines = ["| net | densely, MB/image | the design's table | of it | most of it by |"]
    lines.append("|---|---|---|---|---|")
    for row in result["rows"]:
        design, found = result["design"][row["net"]], row["mb_per_image"]
        most = ", ".join(f"{name} {mb:.1f}" for name, mb in list(row["by_kernel"].items())[:4])
        lines.append(
            f"| {names[row['net']]} | {found:.1f} | {design} | {found / design:.2f} | {most} |"
        )
    table = "\n".join(lines)
    return f"""## Bytes that a training step moves on a GPU, by account

Command: `bash benchmarks/gpu_check.sh OUTDIR traffic` on a machine without a GPU. Commit
{result["environment"]["commit"]}, batch {result["batch"]}, bfloat16. Not measured: what kernels are
given is added up, each operand once, what is added to twice, so a cache is assumed that holds what
a kernel reads more than once. On a GPU the same command counts by ncu, which waits for one.

{table}"""


def gpu_chapter() -> str:
    result = read("gpu-h100/chapter.json")
    row, env = result["rows"][0], result["environment"]
    return f"""## The chapter on a GPU

Command: `bash benchmarks/gpu_check.sh OUTDIR chapter`, which runs `{" ".join(result["command"])}`
on the real Fashion-MNIST. {env["device_name"]}, torch {env["versions"]["torch"]}, commit
{env["commit"]}, whose step took 1.4 times as long as the present one.

| | published | densely |
|---|---|---|
| train loss | 0.144 | {row["train_loss"]:.4f} |
| train accuracy | 0.947 | {row["train_accuracy"]:.4f} |
| test accuracy | 0.881 | {row["test_accuracy"]:.4f} |
| examples/s while training (median of the epochs) | 5505 | \
{row["examples_per_s_training"]:.0f} |

Its {row["epochs"]} epochs took {row["epochs_s"]:.1f} s with evaluation, the whole command
{row["wall_s"]:.1f} s, with the kernels in Triton's cache from an earlier run on that machine;
where they are not, the first epoch compiles them, which takes some seconds more.

![curves](../benchmarks/results/gpu-h100/chapter/curves.png)"""


def gpu_correct() -> str:
    lines = ["| precision | checks | within 1.5x | failed | left out |", "|---|---|---|---|---|"]
    for name in ("bfloat16", "float32", "float16"):
        result = read(f"gpu-h100/correct-{name}.json")
        fine = sum(row["ok"] for row in result["rows"])
        count = len(result["rows"])
        lines.append(
            f"| {name} | {count} | {fine} | {count - fine} | {result.get('left_out', 0)} |"
        )
    result = read("gpu-h100/correct-bfloat16.json")
    table = "\n".join(lines)
    return f"""## The GPU kernels beside float64

Command: `bash benchmarks/gpu_check.sh OUTDIR correct`. {result["environment"]["device_name"]};
bfloat16 of commit 2e437c0, the others of earlier kernels. Every step of the three nets in train and
eval mode, the nets as a whole, and captured against launched steps and forward passes (the same
bits); a result may be 1.5 times as far from float64 as plain PyTorch's in the same precision.

{table}

What was left out in bfloat16, whole nets and captured steps, was within bounds an hour before, but
for the ten gradients of d2l's last biases, 1.7 times as far off by 0.0025 of their length: they are
judged with their weights since, ten numbers being noise.

What failed in float32 are gradients of single norms, most by 2e-4 to 3e-3 of their length, where
plain PyTorch is off by as much in one of them and by rounding in the next. It has the look of ReLUs
that open elsewhere, a few of millions, since a x + b rounds otherwise than (x - mean) / std; it is
not shown that this is all. The whole nets are within 1.3 times. An exact 1 / sqrt(var + eps), tried
since the first run, did not change it."""


def bench() -> str:
    result = read("bench-cpu.json")
    tables = [bench_table(comparison) for comparison in result["comparisons"]]
    compiled = read("compiled/bench-cpu.json")
    depth = result["depth"]
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
    depth_table = "\n".join(lines)
    every_table = "\n\n".join(tables)
    peers = ", ".join(f"{name} {found}" for name, found in result["peers"].items())
    return f"""## Speed and memory on a CPU, beside the peers

Command: `{result["command"]}`. Commit {result["environment"]["commit"]}. Machine:
{machine(result["environment"])}; {peers}.
Medians of {result["settings"]["rounds"]} rounds in turns; ratios are taken round by round. "Kept"
is what autograd saves for the backward pass, "peak" what a fresh process adds in resident memory to
network and images. Freed memory is kept in the process for all variants alike.

{every_table}

With the compiled peer, in a run of its own (`{compiled["command"]}`, commit
{compiled["environment"]["commit"]}):

{bench_table(compiled["comparisons"][0])}

![bars](../benchmarks/results/bench-cpu.png)

### Kept for the backward pass against depth

DenseNet-BC with growth rate 12 at 32 pixels, float32. {depth["note"]}

{depth_table}

![memory against depth](../benchmarks/results/bench-cpu-depth.png)"""


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
        "Absolute speeds are one machine's on one day; ratios carry over.",
        bench(),
        gpu_speed_now(),
        gpu_speed(),
        gpu_traffic(),
        gpu_chapter(),
        gpu_correct(),
        chapter(),
        claims(),
        report(),
        speed(),
        memory_reuse(),
        quick_start(),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}")

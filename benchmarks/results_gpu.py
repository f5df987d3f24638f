"""The sections of docs/results.md that a GPU made."""

import statistics
from typing import Any

from gpu_check import pictures
from gpu_check.at_once import COMPILED, VARIANTS
from gpu_check.correct import DRAWS, LEAST_ROWS_FLOAT32
from result_files import RESULTS, read, rows

#: As people know them.
NETS = {"d2l": "d2l, 96 pixels", "bc": "DenseNet-BC-100-12, 32", "121": "DenseNet-121, 224"}
PRECISIONS = ("bfloat16", "float32", "float16")
#: Of Fashion-MNIST, and what the chapter publishes.
IMAGES, PUBLISHED_RATE = 60_000, 5505
KERNELS_SHOWN = 6


def gpu_speed_now() -> str:
    results = in_turns()
    lines = [
        "| net | densely, ms | images/s | of eager NHWC | of captured NHWC "
        "| of compiled default captured | peak GB | of eager's peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for net, result in results.items():
        own, eager, captured, compiled = (timed(result, net, name) for name in VARIANTS)
        ratios = [other["step_ms"] / own["step_ms"] for other in (eager, captured, compiled)]
        lines.append(
            f"| {net} | {own['step_ms']:.2f} | {own['images_per_s']:.0f} | "
            + " | ".join(f"{ratio:.2f}x" for ratio in ratios)
            + f" | {own['peak_gb']} | 1/{eager['peak_gb'] / own['peak_gb']:.1f} |"
        )
    table = "\n".join(lines)
    first = results["d2l"]
    ceilings, env = first["ceilings"], first["environment"]
    ready = [
        " to ".join(f"{seconds:.0f}" for seconds in (min(found), max(found)))
        for found in (
            [timed(result, net, name)["ready_s"] for net, result in results.items()]
            for name in ("densely captured", COMPILED)
        )
    ]
    return f"""## On a GPU: {env["device_name"]}

A training step as one CUDA graph. Commit {env["commit"]}, torch {env["versions"]["torch"]}, Triton
{first["triton"]}, Python {env["python"]}; batch {first["batch"]}, bfloat16 under autocast, SGD with
momentum. 121 is DenseNet-121 at 224 pixels (peers: torchvision), bc DenseNet-BC-100-12 at 32, d2l
the chapter's net at 96 (peers: plain PyTorch). Made by a script of the hour; now
`bash benchmarks/gpu_check.sh OUTDIR all` measures the same, in two groups: what is compiled comes
after the others. Here all variants of a net took turns. Medians of 5 rounds,
but of bc a single round: of its two, the other was disturbed, so that all took 15 to 38% longer.
Eager PyTorch of the small nets waits for Python, and varies by as much. This card copies
{ceilings["copy_tb_per_s"]} TB/s and multiplies {ceilings["bf16_tflop_per_s"]:.0f} bfloat16 TFLOP/s.

{table}

![bars](../benchmarks/results/gpu-h100/speed.png)

The peak is that of the memory which PyTorch has given out, network and images left out; two work
spaces of cuBLAS, 67 MB, are in all of them. The compiled peers were ready after {ready[1]} s,
densely after {ready[0]}, beside other processes that compiled."""


def draw() -> None:
    """The pictures of these sections."""
    folder = RESULTS / "gpu-h100"
    results = in_turns()
    speeds = [timed(results[net], net, name) for net in NETS for name in VARIANTS]
    card = results["d2l"]["environment"]["device_name"]
    title = f"A training step, batch {results['d2l']['batch']}, bfloat16; {card}"
    pictures.draw_speed(speeds, folder / "speed.png", title)
    checks = [row for name in PRECISIONS for row in checked(name)["rows"]]
    card = checked(PRECISIONS[0])["environment"]["device_name"]
    pictures.draw_distances(checks, folder / "correct.png", f"{card}: distance from float64")


def in_turns() -> dict[str, Any]:
    """Results of each net, with the times of undisturbed rounds alone."""
    results = {net: read(f"gpu-h100/turns-{net}.json") for net in NETS}
    for row in results["bc"]["rows"]:
        row["step_ms"] = row["step_ms_by_round"][-1]
        row["images_per_s"] = 1000 * results["bc"]["batch"] / row["step_ms"]
    return results


def timed(result: dict[str, Any], net: str, variant: str) -> dict[str, Any]:
    """The row of a net's variant that has a time."""
    return next(
        row
        for row in result["rows"]
        if (row["net"], row["variant"]) == (net, variant) and "step_ms" in row
    )


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
                why = row.get("error") or row.get("gap") or "out of time"
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
{ceilings["bf16_tflop_per_s"]:.0f} bfloat16 TFLOP/s. d2l was measured twice, the second time beside
the compiled peers; of 121 and bc these, and their ratios, are missing ("out of time").

{table}"""


def gpu_traffic() -> str:
    account = read("traffic-account.json")
    counted = [read(f"{card}/traffic-ncu.json") for card in ("gpu-h100", "gpu-h200")]
    by_ncu = {r["net"]: r for found in counted for r in found["rows"] if "mb_per_image" in r}
    lines = ["| net | expected by hand count, MB/image | by ncu | by account | most of it by |"]
    lines.append("|---|---|---|---|---|")
    for row in account["rows"]:
        net, design = row["net"], account["design"][row["net"]]
        best = by_ncu.get(net, row)
        most = ", ".join(f"{name} {mb:.1f}" for name, mb in list(best["by_kernel"].items())[:4])
        cells = [
            f"{found['mb_per_image']:.1f} ({found['mb_per_image'] / design:.2f}x)" if found else ""
            for found in (by_ncu.get(net), row)
        ]
        lines.append(f"| {NETS[net]} | {design} | {' | '.join(cells)} | {most} |")
    table = "\n".join(lines)
    small, large = (found["environment"] for found in counted)
    return f"""## Bytes that a training step moves on a GPU

Command: `bash benchmarks/gpu_check.sh OUTDIR traffic`. Batch {account["batch"]}, bfloat16. By ncu:
what went to the memory of the card and came from it in a step, of d2l and bc on an
{small["device_name"]}, commit {small["commit"]}, of DenseNet-121 on an
{large["device_name"]}, commit {large["commit"]}. By account, without a GPU, commit
{account["environment"]["commit"]}: what kernels are given is added up, each operand once, what is
added to twice, so a cache is assumed that holds what a kernel reads more than once. Of d2l the card
moves less: its second-level cache still has some of what the kernel before has written.

{table}"""


def gpu_kernels() -> str:
    result = read("gpu-h100/kernels.json")
    copy, env = result["copy_tb_per_s"], result["environment"]
    lines = [
        "| net | kernel | rows | launches | us, all of them | MB | of copying |",
        "|---|---|---|---|---|---|---|",
    ]
    totals = []
    for net in NETS:
        found = [row for row in result["rows"] if row["net"] == net]
        for row in found[:KERNELS_SHOWN]:
            share = row["mb"] / row["us"] / copy
            lines.append(
                f"| {net} | {row['kernel']} | {row['rows']} | {row['calls']} | {row['us']:.0f} "
                f"| {row['mb']:.0f} | {share:.2f} |"
            )
        calls, us = (sum(row[name] for row in found) for name in ("calls", "us"))
        totals.append(f"{net} {calls} launches, {us / 1000:.1f} ms")
    table = "\n".join(lines)
    return f"""## Each kernel of a training step by itself

Command: `bash benchmarks/gpu_check.sh OUTDIR kernels`. {env["device_name"]}, commit
{env["commit"]}, batch {result["batch"]}. Each launch is repeated in its place until its time is
known, with nothing of it in the cache, so that on small maps all together take longer than the step
that they make: {"; ".join(totals)}.
Those that take most, with the share of the {copy} TB/s that the card copies which they reach; all
are in [kernels.json](../benchmarks/results/gpu-h100/kernels.json).

{table}"""


def gpu_chapter() -> str:
    result = read("gpu-h100/chapter.json")
    row, env = result["rows"][0], result["environment"]
    first, *rest = (float(epoch["epoch_s"]) for epoch in rows("gpu-h100/chapter"))
    others = statistics.median(rest)
    rate = IMAGES * row["epochs"] / row["epochs_s"]
    return f"""## The chapter on a GPU

Command: `bash benchmarks/gpu_check.sh OUTDIR chapter`, which runs `{" ".join(result["command"])}`
on the real Fashion-MNIST. {env["device_name"]}, torch {env["versions"]["torch"]}, commit
{env["commit"]}.

| | published | densely |
|---|---|---|
| train loss | 0.144 | {row["train_loss"]:.4f} |
| train accuracy | 0.947 | {row["train_accuracy"]:.4f} |
| test accuracy | 0.881 | {row["test_accuracy"]:.4f} |
| examples/s while training (median of the epochs) | {PUBLISHED_RATE} | \
{row["examples_per_s_training"]:.0f} |

Its {row["epochs"]} epochs took {row["epochs_s"]:.2f} s with evaluation: {rate:.0f} examples/s,
{rate / PUBLISHED_RATE:.1f} times the published ones; the first took {first:.1f} s, the others
{others:.2f} s (median). Before the first one data are read, kernels compiled where the machine is
new, and graphs recorded: from the start of Python to the model card the command took
{row["wall_s"]:.1f} s, {row["examples_per_s_all_included"]:.0f} examples/s.

![curves](../benchmarks/results/gpu-h100/chapter/curves.png)"""


def checked(precision: str) -> dict[str, Any]:
    found: dict[str, Any] = read(f"gpu-h100/correct-{precision}.json")
    return found


def gpu_correct() -> str:
    results = {name: checked(name) for name in PRECISIONS}
    lines = ["| precision | checks | within 1.5x | left out | drawn more than once |"]
    lines.append("|---|---|---|---|---|")
    for name, result in results.items():
        found = result["rows"]
        again = [f"{row['case']} ({row['mode']})" for row in found if row.get("draws", 1) > 1]
        lines.append(
            f"| {name} | {len(found)} | {sum(row['ok'] for row in found)} "
            f"| {result.get('left_out', 0)} | {', '.join(again) or 'none'} |"
        )
    table, env = "\n".join(lines), results[PRECISIONS[0]]["environment"]
    return f"""## The GPU kernels beside float64

Command: `bash benchmarks/gpu_check.sh OUTDIR correct`. {env["device_name"]}, torch
{env["versions"]["torch"]}, commit {env["commit"]}. Every step of the three nets in train and eval
mode, and the nets as a whole; a result may be 1.5 times as far from float64 as plain PyTorch's in
the same precision, of numbers that are drawn anew up to {DRAWS} times. In each precision also:
captured steps and forward passes of bfloat16 beside launched ones, all the same to the bit.

{table}

![distances](../benchmarks/results/gpu-h100/correct.png)

In float32 the maps have at least {LEAST_ROWS_FLOAT32} rows. On an H200 one step of
fewer had failed (DenseNet-121's third block in eval mode, a bias's gradient, 5.6e-7 of its length
off and plain PyTorch's 3.0e-7), by rounding within long sums, which libraries divide where rows are
few ([the log](log.md)). On the H100, at this commit, 26 of 27 tests of `pytest -m gpu` passed; one
failed for a warning of PyTorch's, which it lets through since."""


def gpu_cifar() -> str:
    epochs, result = rows("gpu-h200/cifar"), read("gpu-h200/cifar.json")
    env, words = result["environment"], " ".join(result["command"][6:])
    judged = [epoch for epoch in epochs if epoch["test_accuracy"]]
    seconds = sum(float(epoch["epoch_s"]) for epoch in epochs)
    rate = statistics.median(float(epoch["examples_per_s"]) for epoch in epochs)
    last = judged[-1]
    short = {batch: rows(f"gpu-h100/cifar-60-{batch}") for batch in (64, 512)}
    commands = {batch: read(f"gpu-h100/cifar-60-{batch}.json") for batch in short}
    env_short, shared = commands[64]["environment"], " ".join(commands[64]["command"][6:])
    table = "\n".join(
        f"| {batch} | {float(found[0]['lr']):.1f} | {float(found[-1]['train_accuracy']):.4f} "
        f"| {100 - 100 * float(found[-1]['test_accuracy']):.2f}% "
        f"| {commands[batch]['rows'][0]['examples_per_s_training']:.0f} |"
        for batch, found in short.items()
    )
    epoch_s = statistics.median(float(epoch["epoch_s"]) for epoch in short[64])
    small, large = (
        1000 * batch / result["rows"][0]["examples_per_s_training"]
        for batch, result in commands.items()
    )
    fixed = (small * 512 - large * 64) / (512 - 64)
    return f"""## DenseNet-BC-100-12 on CIFAR-10, on a GPU

Command: `bash benchmarks/gpu_check.sh OUTDIR cifar --train "{words}"`:
the paper's recipe, but for a batch and a rate 8 times as large. {env["device_name"]}, torch
{env["versions"]["torch"]}, commit {env["commit"]}.

All {len(epochs)} epochs took {seconds:.0f} s, {rate:.0f} images/s (median), and the whole command,
which reads 60,000 files, compiles and records, {result["rows"][0]["wall_s"]:.0f} s: one command of
ten minutes.

| | the paper, batch 64 | densely, batch 512, epoch {last["epoch"]} |
|---|---|---|
| test error | 4.51% | {100 - 100 * float(last["test_accuracy"]):.2f}% |
| train loss | | {float(last["train_loss"]):.4f} |

![curves](../benchmarks/results/gpu-h200/cifar/curves.png)

That is twice the paper's error, and most of it comes from the images, CIFAR-10 encoded again as
JPEG, of quality 75 and half the resolution in colour. A published recipe for another network that
is right on 94.0% of the originals' test images is so on 90.5% of these, and so wrong 1.6 times as
often; by that the paper's 4.51% would be 7.1%, and by the difference 8.0%. The batch costs the
rest, or much of it, in runs of {len(short[64])} epochs that differ in batch and rate alone
(`{shared}`, {env_short["device_name"]}, commit {env_short["commit"]}):

| batch | rate | train accuracy | test error | images/s |
|---|---|---|---|---|
{table}

The paper's batch of 64 has 782 steps an epoch, of which each takes {fixed:.1f} ms that do not
depend on the batch, so that its 300 epochs take {300 * epoch_s / 60:.0f} minutes there. What else
was looked at is in [the log](log.md)."""


#: What no file has yet, and the stage of gpu_check.sh that would make one.
WAITING = {
    "peers compiled by max-autotune, a net at a time": (
        'speed --nets d2l --compile max-autotune-no-cudagraphs --variants "densely captured,'
        'captured NHWC,compiled max-autotune-no-cudagraphs captured"'
    ),
    "loops of one's own: launched by the code of now, by torch's graphed callables, compiled": (
        'speed --compile reduce-overhead --variants "eager NHWC,densely eager,densely graphed '
        'callable,densely compiled reduce-overhead,compiled reduce-overhead"'
    ),
}


def gpu_waiting() -> str:
    lines = [f"| {what} | `{stage}` |" for what, stage in WAITING.items()]
    table = "\n".join(["| what | stage |", "|---|---|", *lines])
    search = read("gpu-h100/max-autotune-search.json")
    shapes = {row["net"]: row["shapes"] for row in search["rows"]}
    kernels, seconds = (sum(row[name] for row in search["rows"]) for name in ("kernels", "seconds"))
    alone = search["alone_on_the_gpu"]
    return f"""## What waits for a GPU

No table above has these. Each has its stage of `benchmarks/gpu_check.sh OUTDIR`.

{table}

max-autotune was tried on an {search["device_name"]}, commit {search["commit"]}, for the three nets
at once (`{search["command"]}`): after {search["cut_off_after_s"]} s none had taken a step. It tries
up to {max(row["most_kernels"] for row in search["rows"])} kernels for each shape of a convolution,
and had done so for {shapes["121"]} shapes of DenseNet-121's 66, {shapes["bc"]} of
DenseNet-BC-100-12's and {shapes["d2l"]} of d2l's; a kernel took {seconds / kernels:.2f} s, and
{alone["seconds"] / alone["kernels"]:.2f} s before the other nets were on the GPU too."""

"""Make docs/equality.md and its pictures from `results/equality-*.json`; nothing is typed by hand.

python benchmarks/equality_page.py
"""

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "equality.md"
PICTURES = PAGE.parent / "pictures"
COLORS = {"fused": "#1f6fb4", "plain": "#d9822b", "plain, other order": "#8c8c8c"}

INTRODUCTION = """# The fused code is the same function

Made by `python benchmarks/equality_page.py` from files that
`python benchmarks/bench_equality.py` has written.

densely's dense block keeps one buffer, takes each channel's statistics once and forms its gradient
once ([`block.py`](../src/densely/fused/block.py) has the algebra). In exact arithmetic that is the
function that everybody else computes with copies; in floating point its sums run in another order.
This page shows how far that goes. The tests hold the same code to 1e-10 in float64, for
blocks of any shape, against a NumPy DenseNet written from the paper, and through `gradcheck`.
"""


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def origin(result: dict[str, Any]) -> str:
    env = result["environment"]
    return (
        f"Command: `{result['command']}`. Commit {env['commit']}. Machine: {env['device_name']}, "
        f"{env['threads']} threads; torch {env['versions']['torch']}; kernels: {result['kernels']}."
    )


def distances(result: dict[str, Any]) -> str:
    parts = list(result["rows"][0]["distance"])
    lines = [
        "| network | precision | " + " | ".join(parts) + " |",
        "|---|---|" + "---|" * len(parts),
    ]
    for row in result["rows"]:
        cells = [
            f"{row['distance'][part]['fused']:.1e} / {row['distance'][part]['plain']:.1e} "
            f"({row['ratio'][part]:.2g}x)"
            for part in parts
        ]
        lines.append(f"| {row['net']} | {row['dtype']} | " + " | ".join(cells) + " |")
    draws = result["rows"][0]["draws"]
    return f"""## One step, beside float64

{origin(result)}

Relative distance from plain PyTorch in float64 after one training step of the whole network
(||got - exact|| / ||exact||): fused / plain, and the ratio of the two. Medians of {draws} draws of
weights, images and labels; bfloat16 is autocast. Below 1.5x is the promise. In float32 the biases
of the norms were moved a little, so that no value behind one is near zero
([`clearance.py`](../benchmarks/gpu_check/clearance.py)). Biases before a norm are left out: their
gradient is zero but for rounding.

{chr(10).join(lines)}

In bfloat16, and in float32 without these biases, gradients of deep networks are far from exact in
any code, since a ReLU whose input is near zero opens or closes with the last bit of it. What counts
is that the fused code is no further away.
"""


def rms(a: list[float], b: list[float]) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))


def cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def training(result: dict[str, Any]) -> str:
    settings, rows = result["settings"], result["rows"]
    net = settings["net"]
    losses = {(row["seed"], row["run"]): row["losses"] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    picture = f"equality-{net}.png"
    draw(net, losses, seeds, PICTURES / picture)
    lines = [
        "| seed | fused to plain | plain to itself in another order | "
        "test accuracy: fused | plain | plain, other order |",
        "|---|---|---|---|---|---|",
    ]
    for seed in seeds:
        apart = [
            rms(losses[seed, run], losses[seed, "plain"]) if (seed, run) in losses else None
            for run in ("fused", "plain, other order")
        ]
        found = {row["run"]: row["test_accuracy"] for row in rows if row["seed"] == seed}
        cells = [cell(value) for value in (*apart, *(found.get(run) for run in COLORS))]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    return f"""## {settings["steps"]} steps of {net} on real images

{origin(result)}

{settings["batch"]} images a step of {settings["data"]}, SGD with Nesterov momentum 0.9, rate 0.1,
weight decay 1e-4, float32; the same start and the same batches for the three runs of a seed.
Accuracy after the last step on {settings["test_images"]} test images.

{chr(10).join(lines)}

The second and third column are root mean square differences of the losses over all steps.

![losses](pictures/{picture})
"""


def draw(
    net: str, losses: dict[tuple[int, str], list[float]], seeds: list[int], path: Path
) -> None:
    figure = Figure(figsize=(4 * len(seeds), 5.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(2, len(seeds), squeeze=False, sharex=True, sharey="row")
    for seed, above, below in zip(seeds, *rows, strict=True):
        for run, color in COLORS.items():
            if (seed, run) not in losses:
                continue
            above.plot(losses[seed, run], color=color, linewidth=1, label=run)
        plain = losses[seed, "plain"]
        for run in ("fused", "plain, other order"):
            if (seed, run) not in losses:
                continue
            pairs = zip(losses[seed, run], plain, strict=True)
            apart = [max(abs(a - b), 1e-6) for a, b in pairs]  # losses are kept to six places
            below.semilogy(apart, color=COLORS[run], linewidth=1, label=f"{run} to plain")
        above.set_title(f"{net}, seed {seed}", fontsize=10)
        below.set_xlabel("step")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    rows[0][0].set_ylabel("loss")
    rows[1][0].set_ylabel("difference of losses")
    for row in rows:
        row[0].legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    parts = [INTRODUCTION]
    parts += [distances(read(path)) for path in sorted(RESULTS.glob("equality-distance-*.json"))]
    parts += [training(read(path)) for path in sorted(RESULTS.glob("equality-train-*.json"))]
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()

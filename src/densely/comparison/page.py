"""A comparison as text: the table on the terminal, and the README.md of its folder."""

import dataclasses
import json
from pathlib import Path

from densely.comparison.compare import Comparison, Pair
from densely.comparison.pictures import draw_comparison
from densely.whole_file import write_whole
from densely.words import on_one_line


def table(comparison: Comparison) -> str:
    """A Markdown table, a line a group."""
    batches = sorted(comparison.groups[0].cost.images_per_s)
    head = [
        *("network", "accuracy (95%)", "runs", "parameters", "MACs", "training images/s"),
        *(f"images/s, batch {batch}" for batch in batches),
        "kept MB/image",
    ]
    rows = [
        [
            on_one_line(group.name).replace("|", "\\|"),
            f"{group.accuracy.value:.4f} ({group.accuracy.low:.4f} to {group.accuracy.high:.4f})",
            str(len(group.runs)),
            f"{group.cost.parameters:,}",
            f"{group.cost.macs / 1e6:,.1f} M",
            f"{group.cost.train_images_per_s:,.0f}",
            *(f"{group.cost.images_per_s[batch]:,.0f}" for batch in batches),
            f"{group.cost.kept_bytes / 1e6:.2f}",
        ]
        for group in comparison.groups
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def sentence(pair: Pair) -> str:
    """What is known of the difference between two groups, in words."""
    text = f"{on_one_line(pair.first)} against {on_one_line(pair.second)}: "
    if pair.difference is not None:
        points = dataclasses.astuple(pair.difference)
        value, low, high = (f"{100 * point:+.2f}" for point in points)
        text += f"{value} points of accuracy (95% interval {low} to {high}, paired). "
    elif len(pair.only_first) > 1:
        text += "the same difference in each pair of runs, so that its spread is not known. "
    if not pair.only_first:
        return text + "no seed is common to both, so that no runs can be paired."
    runs = "; ".join(
        f"only the first right {a}, only the second {b}, p = {_p(p)}"
        for a, b, p in zip(pair.only_first, pair.only_second, pair.p_values, strict=True)
    )
    text += f"McNemar, run by run: {runs}."
    if pair.left_out:
        text += f" Left out, as the other has no run of their seed: {', '.join(pair.left_out)}."
    return text


def _seen_before(comparison: Comparison) -> str:
    """What the accuracies are worth where networks have had to do with the images before."""
    if comparison.split == "train":
        return " The networks learned from these images, and do worse on new ones."
    if comparison.split == "validation":
        return " These images chose the epoch of each network, which does worse on new ones."
    if comparison.learned:
        which = "is an image" if comparison.learned == 1 else "are images"
        return (
            f" {comparison.learned:,} of them {which} that a network learned from: there it is "
            "better than on new ones."
        )
    return ""


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}" if value > 0 else "0"


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write comparison.json, comparison.png and README.md; gives the path of the last."""
    draw_comparison(comparison, folder / "comparison.png")
    write_whole(folder / "comparison.json", json.dumps(comparison.to_dict(), indent=2) + "\n")
    schedule = ", ".join(f"{key} {value}" for key, value in comparison.schedule.items())
    pairs = "\n".join(f"- {sentence(pair)}" for pair in comparison.pairs)
    text = f"""# {comparison.title}

Judged on {comparison.data}: {comparison.images:,} images.{_seen_before(comparison)}

Trained alike: {schedule or "nothing"}.

![curves and accuracies](comparison.png)

{table(comparison)}

In the picture lines are means over the runs and shades reach from the lowest to the highest.
Accuracy is the mean over the runs, with Student's 95% interval over them (a single run, or runs
that are equally right: Wilson's, over the images). Speeds were measured in turns, medians;
training in batches of {comparison.groups[0].cost.train_batch}. "Kept" is what a training step keeps
for its backward pass.

{pairs}

McNemar's p is how likely so uneven a split of the images on which two networks differ would be if
neither were better; it knows the spread over images and not over seeds.
"""
    write_whole(folder / "README.md", text)
    return folder / "README.md"

"""Fills docs/chapter.md and docs/chapter.zh.md: `python benchmarks/chapter_pages.py`.

The pages are written by hand, but for what stands between `<!-- begin: NAME -->` and
`<!-- end -->`: tables and sentences made here from the files in `benchmarks/results`. A test holds
the pages against it.
"""

import re
import statistics
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from result_files import read, rows

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MARKED = re.compile(r"(<!-- begin: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Words:
    """What the generated parts say in a language; braces are filled with figures.

    Args:
        width: at which paragraphs are wrapped; 0 for a line each, since a line's end becomes a
            space, which has no place between Chinese characters.
        names: of variants, where the language has another one than the comparison.
    """

    width: int
    names: dict[str, str]
    cost: str
    run_head: str
    run_rows: tuple[str, str, str]
    run: str
    memory: str
    trained: str
    all_images: str
    head: str
    better: str
    worse: str
    undecided: str
    evidence: str
    single: str
    beside: str
    picture: str


ENGLISH = Words(
    width=100,
    names={"average": "average pooling", "maximum": "maximum pooling"},
    cost="On {device} ({threads} threads, {precision}) it trains {ratio:.2f} times as fast as the "
    "same network in plain PyTorch (float32) and {fastest:.2f} times as fast as the fastest "
    "variant of that, and keeps {kept:.2f} MB an image for the backward pass in place of "
    "{plain:.2f}. On {gpu}, "
    "both captured as CUDA graphs, it trains {gpu_ratio:.2f} times as fast as the fastest. "
    "[Results](results.md) has all variants, and other networks.",
    run_head="| | train loss | train accuracy | test accuracy |",
    run_rows=("the chapter, as published", "densely", "densely, `--norm-batches 0`"),
    run="The {epochs} epochs took {minutes:.1f} minutes on {device} ({threads} threads, "
    "{precision}). On {gpu} they took {gpu_seconds:.0f} seconds and ended at a test accuracy of "
    "{gpu_accuracy:.4f}.",
    memory="Measured in float32: DenseNet-121 at 224 pixels keeps {kept:.1f} MB an image here, "
    "{plain:.1f} in torchvision, and {checkpointed:.1f} in torchvision with checkpoints, which "
    "recompute more. Against the depth L of a DenseNet-BC it grows as L^{exponent:.2f} "
    "here and as L^{plain_exponent:.2f} in plain PyTorch ([results](results.md)).",
    trained="Trained on {limit} images at {size} pixels for {epochs} epochs, batch {batch}, "
    "{seeds} seeds; judged on {images:,} test images. {device}, {threads} threads, {precision}, "
    "commit {commit}, {date}.",
    all_images="all",
    head="| network | test accuracy (95%) | each seed | parameters | multiplications "
    "| kept MB/image | training images/s |",
    better="{first} is better than {second}",
    worse="{first} is worse than {second}",
    undecided="No difference shown between {first} and {second}",
    evidence="**{verdict}**: {value} points of accuracy (95% interval {low} to {high}); {first} is "
    "ahead with {won} of {seeds} seeds.",
    single="{first} against {second}: single runs or unequal numbers of them, so nothing can be "
    "said over seeds.",
    beside="Beside {other}, {first} has {parameters} times the parameters, {macs} times the "
    "multiplications, keeps {kept} times the memory and trains at {speed} times the speed.",
    picture="Curves and accuracies",
)

CHINESE = Words(
    width=0,
    names={
        "narrow ResNet-18": "窄ResNet-18",
        "average": "平均汇聚",
        "maximum": "最大汇聚",
    },
    cost="在{device}（{threads}个线程，{precision}）上，它的训练速度是同一网络普通PyTorch写法"
    "（float32）的{ratio:.2f}倍，是各种PyTorch写法中最快者的{fastest:.2f}倍；每张图像为反向传播保留的内存"
    "从{plain:.2f} MB降到{kept:.2f} MB。在{gpu}上，整个训练步都捕获为CUDA图，"
    "它的训练速度是各种PyTorch写法中最快者的{gpu_ratio:.2f}倍。"
    "各种写法以及其他网络的数据见[测量结果](results.md)。",
    run_head="| | 训练损失 | 训练精度 | 测试精度 |",
    run_rows=("书中公布的结果", "densely", "densely，`--norm-batches 0`"),
    run="{epochs}个迭代周期在{device}（{threads}个线程，{precision}）上用时{minutes:.1f}分钟，"
    "在{gpu}上用时{gpu_seconds:.0f}秒，后者最终的测试精度为{gpu_accuracy:.4f}。",
    memory="实测数据（float32）：输入为224像素时，DenseNet-121为每张图像保留的内存，"
    "在densely中是{kept:.1f} MB，在torchvision中是{plain:.1f} MB；torchvision启用检查点"
    "（checkpoint）后是{checkpointed:.1f} MB，代价是更多的重复计算。"
    "对于深度为L的DenseNet-BC，保留的内存在densely中约按L^{exponent:.2f}增长，"
    "在普通PyTorch写法中约按L^{plain_exponent:.2f}增长（见[测量结果](results.md)）。",
    trained="训练：{limit}张图像，{size}像素，{epochs}个迭代周期，批量大小{batch}，{seeds}个随机种子；"
    "评估：{images:,}张测试图像。{device}，{threads}个线程，{precision}，"
    "代码版本{commit}，{date}。",
    all_images="全部",
    head="| 网络 | 测试精度（95%） | 各个种子 | 参数量 | 乘加次数 "
    "| 保留的内存（MB/图像） | 训练速度（图像/秒） |",
    better="{first}优于{second}",
    worse="{first}不如{second}",
    undecided="没有显示出{first}与{second}之间的差异",
    evidence="**{verdict}**：精度之差为{value}个百分点（95%置信区间：{low}至{high}）；"
    "{first}在{seeds}个种子中的{won}个上领先。",
    single="{first}与{second}：各只训练了一次，或训练次数不等，无法就随机种子作出判断。",
    beside="以{other}为1，{first}的参数量为{parameters}，乘加次数为{macs}，"
    "保留的内存为{kept}，训练速度为{speed}。",
    picture="训练曲线和精度",
)


def paragraph(words: Words, text: str) -> str:
    if not words.width:
        return text
    return textwrap.fill(text, words.width, break_long_words=False, break_on_hyphens=False)


def bullet(words: Words, text: str) -> str:
    if not words.width:
        return f"- {text}"
    return textwrap.fill(
        text,
        words.width,
        initial_indent="- ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def trained_by(bench: dict[str, Any], net: str) -> dict[str, Any]:
    """What `densely bench` has measured of a network's training, by variant."""
    (found,) = (c for c in bench["comparisons"] if (c["net"], c["mode"]) == (net, "train"))
    return dict(found["variants"])


def cost(words: Words) -> str:
    bench = read("bench-cpu-bfloat16.json")
    variants = trained_by(bench, "d2l")
    ours, plain = variants["densely"], variants["plain net"]
    fastest = max(
        (row for row in variants.values() if row["kind"] == "peer" and not row["gap"]),
        key=lambda row: row["median_images_per_s"],
    )
    rounds = zip(ours["images_per_s"], fastest["images_per_s"], strict=True)
    gpu = read("gpu-h100/turns-d2l.json")
    step = next(row for row in gpu["rows"] if row["ours"])
    captured = [row["images_per_s"] for row in gpu["rows"] if not row["ours"] and row["captured"]]
    return paragraph(
        words,
        words.cost.format(
            device=bench["environment"]["device_name"],
            threads=bench["environment"]["threads"],
            precision=bench["environment"]["precision"],
            ratio=ours["ratio"],
            fastest=statistics.median(own / other for own, other in rounds),
            kept=ours["kept_bytes_per_image"] / 1e6,
            plain=plain["kept_bytes_per_image"] / 1e6,
            gpu=gpu["environment"]["device_name"],
            gpu_ratio=step["images_per_s"] / max(captured),
        ),
    )


def chapter_run(words: Words) -> str:
    runs = {name: rows(name) for name in ("chapter-run", "chapter-run-running-statistics")}
    env, gpu = read("chapter-run/env.json"), read("gpu-h100/chapter.json")
    published, *ours = words.run_rows
    lines = [words.run_head, "|---|---|---|---|", f"| {published} | 0.144 | 0.947 | 0.881 |"]
    for name, epochs in zip(ours, runs.values(), strict=True):
        cells = (epochs[-1][key] for key in ("train_loss", "train_accuracy", "test_accuracy"))
        lines.append(f"| {name} | {' | '.join(f'{float(cell):.4f}' for cell in cells)} |")
    text = words.run.format(
        epochs=len(runs["chapter-run"]),
        minutes=sum(float(row["epoch_s"]) for row in runs["chapter-run"]) / 60,
        device=env["device_name"],
        threads=env["threads"],
        precision=env["precision"],
        gpu=gpu["environment"]["device_name"],
        gpu_seconds=gpu["rows"][0]["epochs_s"],
        gpu_accuracy=gpu["rows"][0]["test_accuracy"],
    )
    return "\n".join(lines) + "\n\n" + paragraph(words, text)


def memory(words: Words) -> str:
    bench = read("bench-cpu-bfloat16.json")
    variants = trained_by(bench, "densenet121")
    names = {
        "kept": "densely float32",
        "plain": "torchvision",
        "checkpointed": "torchvision memory_efficient",
    }
    kept = {key: variants[name]["kept_bytes_per_image"] / 1e6 for key, name in names.items()}
    depth = bench["depth"]["series"]
    text = words.memory.format(
        **kept,
        exponent=depth["densely"]["exponent"],
        plain_exponent=depth["plain net"]["exponent"],
    )
    return paragraph(words, text)


def claim(words: Words, name: str) -> str:
    """What a comparison found of a claim of the chapter."""
    return comparison(words, name, read(f"claims/{name}/comparison.json"))


def comparison(words: Words, name: str, found: dict[str, Any]) -> str:
    """Table, sentences and picture of what `densely compare` wrote."""
    groups = {group["name"]: group for group in found["groups"]}
    picture = f"../benchmarks/results/claims/{name}/comparison.png"
    parts = [
        paragraph(words, trained(words, found)),
        table(words, groups),
        "\n".join(bullet(words, verdict(words, pair, groups)) for pair in found["pairs"]),
        paragraph(words, beside(words, list(groups.values()))),
        f"![{words.picture}]({picture})",
    ]
    return "\n\n".join(parts)


def trained(words: Words, found: dict[str, Any]) -> str:
    schedule, env = found["schedule"], found["environment"]
    limit = schedule["limit"]
    return words.trained.format(
        limit=words.all_images if limit is None else f"{limit:,}",
        size=schedule["image_size"],
        epochs=schedule["epochs"],
        batch=schedule["batch_size"],
        seeds=len(found["groups"][0]["runs"]),
        images=found["images"],
        device=env["device_name"],
        threads=env["threads"],
        precision=env["precision"],
        commit=env["commit"],
        date=found["date"],
    )


def table(words: Words, groups: dict[str, dict[str, Any]]) -> str:
    lines = [words.head, "|---" * (words.head.count("|") - 1) + "|"]
    for name, group in groups.items():
        accuracy, price = group["accuracy"], group["cost"]
        interval = f"{accuracy['low']:.4f} – {accuracy['high']:.4f}"
        cells = [
            words.names.get(name, name),
            f"{accuracy['value']:.4f} ({interval})",
            ", ".join(f"{value:.4f}" for value in group["accuracies"]),
            f"{price['parameters']:,}",
            f"{price['macs'] / 1e6:.1f} M",
            f"{price['kept_bytes'] / 1e6:.2f}",
            f"{price['train_images_per_s']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(words: Words, pair: dict[str, Any], groups: dict[str, dict[str, Any]]) -> str:
    """What the runs say of a pair of variants: a difference is one if its interval leaves 0 out."""
    first, second = pair["first"], pair["second"]
    names = {key: words.names.get(pair[key], pair[key]) for key in ("first", "second")}
    difference = pair["difference"]
    if difference is None:
        return words.single.format(**names)
    if difference["low"] > 0:
        said = words.better
    elif difference["high"] < 0:
        said = words.worse
    else:
        said = words.undecided
    both = zip(groups[first]["accuracies"], groups[second]["accuracies"], strict=True)
    won = [one > other for one, other in both]
    points = {key: f"{100 * difference[key]:+.2f}" for key in ("value", "low", "high")}
    return words.evidence.format(
        verdict=said.format(**names), first=names["first"], **points, won=sum(won), seeds=len(won)
    )


def beside(words: Words, groups: list[dict[str, Any]]) -> str:
    """What the first variant costs, in multiples of the second."""
    first, other = groups[:2]
    price, others = first["cost"], other["cost"]
    return words.beside.format(
        first=words.names.get(first["name"], first["name"]),
        other=words.names.get(other["name"], other["name"]),
        parameters=times(price["parameters"], others["parameters"]),
        macs=times(price["macs"], others["macs"]),
        kept=times(price["kept_bytes"], others["kept_bytes"]),
        speed=times(price["train_images_per_s"], others["train_images_per_s"]),
    )


def times(value: float, other: float) -> str:
    ratio = value / other
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.3f}"


PARTS: dict[str, Callable[[Words], str]] = {
    "cost": cost,
    "chapter-run": chapter_run,
    "add-or-concatenate": lambda words: claim(words, "add-or-concatenate"),
    "average-or-max": lambda words: claim(words, "average-or-max"),
    "memory": memory,
}


def page(name: str, words: Words) -> str:
    """The page as it should be: what is written by hand, with all marked parts made anew."""
    text = (DOCS / name).read_text(encoding="utf-8")
    found = [match["name"] for match in MARKED.finditer(text)]
    if sorted(found) != sorted(PARTS):
        raise ValueError(f"{name}: has the parts {found}, expected each of {list(PARTS)} once")
    return MARKED.sub(lambda match: f"{match[1]}{PARTS[match['name']](words)}\n{match[3]}", text)


PAGES: dict[str, Callable[[], str]] = {
    "chapter.md": lambda: page("chapter.md", ENGLISH),
    "chapter.zh.md": lambda: page("chapter.zh.md", CHINESE),
}


if __name__ == "__main__":
    for name, text in [(name, make()) for name, make in PAGES.items()]:
        (DOCS / name).write_text(text, encoding="utf-8")

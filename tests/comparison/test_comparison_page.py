"""A comparison in words and in its picture, made by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from densely import drawing
from densely.comparison.compare import Comparison, Group, Pair
from densely.comparison.page import sentence, table, write_comparison
from densely.comparison.pictures import draw_comparison
from densely.evaluation.findings import Cost, Interval
from densely.training.run import EpochMetrics

COST = Cost("net", 10, 10, 10, 10, {1: 1.0}, 1, 1.0, "a CPU", "float32")


def group(name: str, accuracy: float, split: str = "test", seeds: int = 1) -> Group:
    other = "validation" if split == "test" else "test"
    judged: dict[str, Any] = {f"{split}_loss": 1.0, f"{split}_accuracy": accuracy}
    judged |= {f"{other}_loss": None, f"{other}_accuracy": None}
    rows = tuple(
        EpochMetrics(
            epoch=i, lr=0.1, train_loss=1.0, train_accuracy=0.5, examples_per_s=1.0, epoch_s=1.0,
            **judged,
        )
        for i in (1, 2)
    )  # fmt: skip
    return Group(
        name=name,
        runs=tuple(f"{name}-{i}" for i in range(seeds)),
        seeds=tuple(range(seeds)),
        accuracies=(accuracy,) * seeds,
        accuracy=Interval(accuracy, accuracy - 0.1, accuracy + 0.1),
        cost=COST,
        curves=(rows,) * seeds,
    )


def comparison(*groups: Group) -> Comparison:
    return Comparison("trial", "digits, test", 9, "test", 0, "2026-01-01", {}, groups, (), {})


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that is drawn, and not written."""
    found: list[Any] = []
    monkeypatch.setattr(drawing, "save", lambda figure, path: found.append(figure))
    return found


def test_differences_are_told_in_points_of_a_hundred() -> None:
    pair = Pair("a", "b", (0, 1), (), Interval(0.015, -0.0025, 0.0325), (5, 4), (2, 0), (0.45, 0.1))
    assert sentence(pair) == (
        "a against b: +1.50 points of accuracy (95% interval -0.25 to +3.25, paired). "
        "McNemar, run by run: only the first right 5, only the second 2, p = 0.450; "
        "only the first right 4, only the second 0, p = 0.100."
    )


def test_equal_differences_have_no_interval() -> None:
    pair = Pair("a", "b", (0, 1), (), None, (3, 4), (1, 2), (0.6, 0.7))
    assert sentence(pair).startswith(
        "a against b: the same difference in each pair of runs, so that its spread is not known. "
        "McNemar, run by run: "
    )


def test_names_stay_on_their_line_of_the_table(tmp_path: Path) -> None:
    lines = table(comparison(group("two\nlines", 0.5), group("a|b", 0.7))).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [r"| two\nlines", r"| a\|b"]


def test_every_name_is_in_the_legend(figures: list[Any], tmp_path: Path) -> None:
    draw_comparison(comparison(group("_slow", 0.5), group("b", 0.7)), tmp_path / "x.png")
    legend = figures[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["_slow", "b"]


@pytest.mark.parametrize(
    ("value", "told"), [(0.45, "0.450"), (0.004, "0.004"), (0.0004, "4e-04"), (0.0, "0")]
)
def test_small_p_values_are_never_rounded_to_nothing(value: float, told: str) -> None:
    pair = Pair("a", "b", (0,), (), None, (5,), (2,), (value,))
    assert sentence(pair).endswith(f", p = {told}.")


@pytest.mark.usefixtures("figures")
@pytest.mark.parametrize(
    ("split", "told"),
    [
        ("train", "The networks learned from these images"),
        ("validation", "These images chose the epoch of each network"),
        ("test", None),
        (None, None),
    ],
)
def test_the_page_says_what_networks_had_to_do_with_the_images(
    split: Any, told: str | None, tmp_path: Path
) -> None:
    result = dataclasses.replace(comparison(group("a", 0.5), group("b", 0.7)), split=split)
    text = write_comparison(result, tmp_path).read_text()
    first = text.splitlines()[2]
    assert first == "Judged on digits, test: 9 images." if told is None else told in first


def test_each_accuracy_stands_on_the_line_of_its_group(figures: list[Any], tmp_path: Path) -> None:
    accuracies = {"a": 0.3, "b": 0.5, "c": 0.7}
    draw_comparison(comparison(*(group(*one) for one in accuracies.items())), tmp_path / "x.png")
    *_, end = figures[0].axes
    names = [label.get_text() for label in end.get_yticklabels()]
    drawn = {}
    for bar in end.containers:
        ((x, y),) = bar.lines[0].get_xydata()
        drawn[names[int(y)]] = x
    assert drawn == accuracies
    assert names == ["c", "b", "a"]  # from below


def test_accuracies_on_different_splits_are_not_drawn_on_one_axis(
    figures: list[Any], tmp_path: Path
) -> None:
    mixed = comparison(group("a", 0.5, "validation", seeds=2), group("b", 0.7, "test"))
    for groups in (mixed, comparison(group("a", 0.5, "validation"), group("b", 0.7, "validation"))):
        draw_comparison(groups, tmp_path / "x.png")
    titles = [[axes.get_title() for axes in figure.axes] for figure in figures]
    end = "accuracy in the end, 95% interval"
    assert titles == [["training loss", end], ["held-out accuracy", "training loss", end]]
    assert "held-out accuracy is of different splits" in figures[0].get_supxlabel()
    assert [line.get_ydata().tolist() for line in figures[1].axes[0].lines] == [
        [0.5] * 2,
        [0.7] * 2,
    ]

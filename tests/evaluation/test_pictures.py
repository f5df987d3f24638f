"""The pictures of a report: what is drawn, and that awkward names and figures do not harm them."""

import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from densely import drawing
from densely.evaluation import pictures
from densely.evaluation.findings import (
    CalibrationScore,
    Choice,
    ClassScore,
    Interval,
    ReliabilityBin,
    RiskCoverage,
    Scores,
)

AWKWARD = ["$x^{$ _", "肺炎" * 30, "🦊", "x" * 200, "two\nlines", "عربي", "\udcff", " ", "<b>&"]


def scores_of(confusion: list[list[int]], names: list[str] | None = None) -> Scores:
    matrix = np.array(confusion, dtype=np.int64)
    given, support = matrix.sum(axis=0), matrix.sum(axis=1)
    classes = []
    for k, hits in enumerate(matrix.diagonal().tolist()):
        precision, recall = hits / max(int(given[k]), 1), hits / max(int(support[k]), 1)
        f1 = 2 * hits / max(int(given[k] + support[k]), 1)
        rates = (precision, recall, f1) if support[k] else (None, None, None)
        name = names[k] if names else f"class {k}"
        classes.append(ClassScore(name, int(support[k]), *rates, None, None))
    some = Interval(0.5, 0.4, 0.6)
    return Scores(
        int(matrix.sum()), some, None, some, some, None, None, tuple(classes), matrix
    )  # fmt: skip


def random_scores(classes: int) -> Scores:
    confusion = np.random.default_rng(0).integers(0, 3, (classes, classes))
    return scores_of((confusion + 20 * np.eye(classes, dtype=int)).tolist())


def calibration_of(*bins: tuple[float, float, int, float, float]) -> CalibrationScore:
    filled = tuple(ReliabilityBin(*each) for each in bins)
    return CalibrationScore("none", 0.5, 0.4, 0.0312, 0.03, filled)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures, which become no PNGs here: layouts take most of the time."""
    figures: list[Figure] = []
    monkeypatch.setattr(drawing, "png", lambda figure: figures.append(figure) or b"")
    return figures


def size_of(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def test_cells_hold_their_counts_and_the_axes_the_names(drawn: list[Figure]) -> None:
    pictures.confusion_picture(scores_of([[70, 30, 0], [0, 5, 2], [1, 0, 9]], ["a", "b", "c"]))
    axes = drawn[0].axes[0]
    texts = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axes.texts}
    assert texts == {
        (0, 0): "70", (0, 1): "30", (1, 1): "5", (1, 2): "2", (2, 0): "1", (2, 2): "9",
    }  # fmt: skip
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["a", "b", "c"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("class given", "true class")


def test_colours_are_shares_of_rows_blue_where_right_and_orange_where_wrong(
    drawn: list[Figure],
) -> None:
    pictures.confusion_picture(scores_of([[80, 20, 0], [0, 8, 2], [0, 0, 0]]))
    cells = np.asarray(drawn[0].axes[0].images[0].get_array())
    assert np.array_equal(cells[0, 0], cells[1, 1])
    assert np.array_equal(cells[0, 1], cells[1, 2])
    assert not np.array_equal(cells[0, 1], cells[0, 2])
    red, blue = cells[..., 0], cells[..., 2]
    assert blue[0, 0] > red[0, 0]
    assert red[0, 1] > blue[0, 1]
    assert cells[2].min() > 0.9  # no image of it


@pytest.mark.parametrize("classes", [2, 20, 21, 60, 61])
def test_counts_for_few_classes_and_names_for_some_more(classes: int, drawn: list[Figure]) -> None:
    pictures.confusion_picture(random_scores(classes))
    axes = drawn[0].axes[0]
    assert bool(axes.texts) == (classes <= 20)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert ("class 1" in names) == (classes <= 60)
    assert ("number in the table" in axes.get_xlabel()) == (classes > 60)


@pytest.mark.parametrize("classes", [2, 1000])
def test_few_and_many_classes_fit_on_a_page(classes: int) -> None:
    width, height = size_of(pictures.confusion_picture(random_scores(classes)))
    assert 400 < min(width, height) <= max(width, height) < 1600


def test_no_matrix_no_picture() -> None:
    with pytest.raises(ValueError, match="several labels"):
        pictures.confusion_picture(replace(random_scores(3), confusion=None))


@pytest.mark.parametrize("with_fonts", [True, False])
def test_awkward_names(with_fonts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    as_png = drawing.png
    monkeypatch.setattr(drawing, "png", lambda figure: figures.append(figure) or as_png(figure))
    if not with_fonts:
        monkeypatch.setattr(drawing, "families", lambda: ["DejaVu Sans"])
    scores = scores_of((9 * np.eye(len(AWKWARD), dtype=int) + 1).tolist(), AWKWARD)
    size_of((pictures.confusion_picture if with_fonts else pictures.class_picture)(scores))
    axes = figures[0].axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "$x^{$ _"
    assert names[1] == "肺炎肺炎肺炎肺炎肺炎肺…"
    assert names[3] == 23 * "x" + "…"
    assert names[4] == "two lines"
    assert axes.get_position().width > 0.3  # names leave room for what they name


def test_bars_reach_up_to_accuracy_and_gaps_from_there_to_confidence(drawn: list[Figure]) -> None:
    before = calibration_of((0, 0.5, 0, 0, 0), (0.5, 0.8, 25, 0.7, 0.4), (0.8, 1, 75, 0.9, 0.95))
    after = replace(before, method="vector", ece=0.0051)
    pictures.reliability_picture(before, after)
    upper, upper_after, lower, _ = drawn[0].axes
    bars = [(b.get_x(), b.get_width(), b.get_y(), b.get_height()) for b in upper.patches]
    assert bars == pytest.approx(
        np.array(
            [
                (0.5, 0.3, 0, 0.4), (0.8, 0.2, 0, 0.95),
                (0.5, 0.3, 0.4, 0.3), (0.8, 0.2, 0.95, -0.05),
            ]
        )
    )  # fmt: skip
    # Seen through, the gap has the colour of the legend above a bar and over it.
    assert [b.get_facecolor()[3] for b in upper.patches] == [0.55, 0.55, 0, 0]
    assert len({b.get_edgecolor() for b in upper.patches[2:]}) == 1
    assert [b.get_hatch() for b in upper.patches] == [None, None, "///", "///"]
    assert [b.get_height() for b in lower.patches] == pytest.approx([0.25, 0.75])
    assert upper.get_title() == "before calibration, ECE 3.12%"
    assert upper_after.get_title() == "after calibration: vector, ECE 0.51%"


def test_one_panel_where_nothing_calibrates(drawn: list[Figure]) -> None:
    pictures.reliability_picture(calibration_of((0, 1, 4, 0.7, 0.5)), None)
    assert len(drawn[0].axes) == 2
    assert drawn[0].axes[0].get_title() == "not calibrated, ECE 3.12%"


def test_the_curve_and_the_thresholds_that_were_found(drawn: list[Figure]) -> None:
    choices = (
        Choice(0.05, 0.9, 0.6, 0.04),
        Choice(0.01, None, 0, None),
        Choice(0.02, 0.999, 0, None),
    )
    pictures.risk_coverage_picture(
        RiskCoverage((0.01, 0.2, 0.6, 1), (1.0, 0.0, 0.04, 0.1), 0.0123, choices)
    )
    axes = drawn[0].axes[0]
    curve, *marks = axes.lines
    assert curve.get_xydata() == pytest.approx(
        np.array([(0.01, 1), (0.2, 0), (0.6, 0.04), (1, 0.1)])
    )
    assert [m.get_xydata().tolist() for m in marks] == [[[0.6, 0.04]]]
    assert marks[0].get_label() == "5% wrong wanted: 90%"
    assert axes.get_ylim()[1] == pytest.approx(0.115)  # the surest image was wrong: off the scale
    assert "0.0123" in axes.get_title()


def test_a_curve_without_mistakes_has_a_scale(drawn: list[Figure]) -> None:
    pictures.risk_coverage_picture(RiskCoverage((0.5, 1), (0.0, 0.0), 0.0, ()))
    assert drawn[0].axes[0].get_ylim()[1] > 0


def test_classes_are_sorted_by_f1_and_those_without_images_left_out(drawn: list[Figure]) -> None:
    pictures.class_picture(scores_of([[9, 1, 0], [4, 6, 0], [0, 0, 0]], ["good", "bad", "none"]))
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["bad", "good"]
    found = {line.get_label(): line.get_xdata().tolist() for line in axes.lines}
    assert found == {
        "precision": pytest.approx([6 / 7, 9 / 13]),
        "recall": pytest.approx([0.6, 0.9]),
    }
    assert {line.get_label(): line.get_color() for line in axes.lines} == {
        "precision": pictures.ORANGE, "recall": pictures.BLUE,
    }  # fmt: skip
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first one on top


def test_of_many_classes_the_worst_are_drawn(drawn: list[Figure]) -> None:
    scores = random_scores(120)
    pictures.class_picture(scores)
    names = {label.get_text() for label in drawn[0].axes[0].get_yticklabels()}
    left_out = [score for score in scores.classes if score.name not in names]
    assert len(names) == 40
    assert min(s.f1 for s in left_out) >= max(s.f1 for s in scores.classes if s.name in names)


def test_no_class_occurs(drawn: list[Figure]) -> None:
    pictures.class_picture(scores_of([[0, 0], [0, 0]]))
    assert not drawn[0].axes[0].get_yticklabels()


def test_the_same_findings_give_the_same_bytes() -> None:
    curve = RiskCoverage((0.5, 1), (0.0, 0.1), 0.05, (Choice(0.05, 0.9, 0.6, 0.04),))
    assert pictures.risk_coverage_picture(curve) == pictures.risk_coverage_picture(curve)

"""The page of a report: whole, safe against awkward names, and written all or nothing."""

import io
import json
import os
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from densely.errors import ConfigError, RunError
from densely.evaluation import report_page
from densely.evaluation.findings import (
    CalibrationScore,
    Choice,
    ClassScore,
    Cost,
    Example,
    Findings,
    Interval,
    ReliabilityBin,
    RiskCoverage,
    Scores,
)
from densely.evaluation.report_page import number, percent, render, summary, write_report

AWKWARD = (
    "<script>alert(1)</script>", "R&D \"a\" 'b'", "肺炎", "🦊", "x" * 200, "{{ 7*7 }}", "</td>",
    "&lt;",
)  # fmt: skip
VOID = {"meta", "img", "br", "link"}


def tile(pixels: NDArray[np.uint8], heat_map: NDArray[np.float32] | None) -> Image.Image:
    width = pixels.shape[2] * (1 if heat_map is None else 2)
    return Image.new("RGB", (3 * width, 3 * pixels.shape[1]))


def png_of(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("L", (width, height)).save(data, "PNG")
    return data.getvalue()


def example(
    index: int, label: str, given: str, *, channels: int = 1, mapped: bool = True
) -> Example:
    pixels = np.full((channels, 8, 8), index, dtype=np.uint8)
    heat_map = np.eye(4, dtype=np.float32) if mapped else None
    return Example(index, None, label, given, 0.8767, 0.0432, pixels, heat_map)


def findings_of(classes: int = 10) -> Findings:
    """Findings with awkward names and no two figures alike."""
    names = [*AWKWARD, *(f"class {k}" for k in range(classes))][:classes]
    confusion = 40 * np.eye(classes, dtype=np.int64) + np.eye(classes, k=1, dtype=np.int64)
    confusion[0, 1] = 7
    scores = Scores(
        images=int(confusion.sum()),
        accuracy=Interval(0.9123, 0.9012, 0.9234),
        top5_accuracy=None if classes <= 5 else Interval(0.9912, 0.9876, 0.9943),
        balanced_accuracy=Interval(0.8934, 0.8812, 0.9056),
        macro_f1=Interval(0.8823, 0.8701, 0.8943),
        auroc=0.97654,
        average_precision=0.92345,
        classes=tuple(
            ClassScore(
                name, int(confusion[k].sum()), 0.811 + k / 1000, 0.642 + k / 1000,
                0.713 + k / 1000, None if k == 0 else 0.951 + k / 10000,
                None if k == 1 else 0.8612 + k / 1000,
            )
            for k, name in enumerate(names)
        ),
        confusion=confusion,
    )  # fmt: skip
    bins = (
        ReliabilityBin(0, 0.8667, 60, 0.6, 0.5),
        ReliabilityBin(0.8667, 0.9333, 30, 0.904, 0.8867),
    )
    return Findings(
        run="runs/<b>&-001",
        data='digits, "test"',
        date="2025-06-14",
        warnings=("Calibrated on <i>seen</i> images.", "Few images."),
        scores=scores,
        method="temperature",
        calibrated_on="validation, 179 images",
        is_stored=True,
        wanted_error=0.02,
        calibration=(
            CalibrationScore("none", 0.51234, 0.21341, 0.0812, 0.0798, bins),
            CalibrationScore("temperature", 0.32123, 0.18456, 0.0134, 0.0156, bins),
            CalibrationScore("vector", 0.31987, 0.18123, 0.0144, 0.0167, bins),
        ),
        selective=RiskCoverage(
            (0.2, 0.6, 1.0), (0.0, 0.02, 0.0877), 0.02468,
            (
                Choice(0.05, 0.678, 0.9343, 0.0467), Choice(0.02, 0.914, 0.7123, 0.0213),
                Choice(0.01, None, 0.0, None), Choice(0.005, 0.99987, 0.0, None),
            ),
        ),
        mistakes=tuple(example(100 + k, AWKWARD[k], AWKWARD[k - 1]) for k in range(8)),
        unsure=(replace(example(7, "肺炎", "肺炎", channels=3), label_probability=0.8767),),
        label_errors=(example(3, "a", "b", channels=3, mapped=False),),
        cost=Cost("densenet<121>", 7_978_856, 2_834_000_000, 32_100_000, 13_500_000,
                  {1: 4.56, 64: 1234.4}, 64, 231.5, "CPU & more", "bfloat16"),
    )  # fmt: skip


class Page(HTMLParser):
    """A page taken apart; fails where its tags are not balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def _plain_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grey ones, in a thousandth of the time; test_pictures.py looks at the real ones."""
    for name in ("class", "confusion", "reliability", "risk_coverage"):
        monkeypatch.setattr(report_page, f"{name}_picture", lambda *_: png_of(20, 10))


plain_pictures = pytest.mark.usefixtures("_plain_pictures")


def test_a_page_with_real_pictures() -> None:
    page = Page(render(findings_of(2), curves=png_of(90, 60), tile=tile))
    widths = [int(img["width"] or 0) for img in page.all("img")]
    assert len(widths) == 5 + 8 + 1 + 1 + 1  # pictures, the three sheets, the legend
    assert min(widths[:4]) > 400


@plain_pictures
@pytest.mark.parametrize("classes", [2, 10, 120])
def test_it_is_whole_and_needs_nothing_else(classes: int) -> None:
    html = render(findings_of(classes), curves=png_of(90, 60), tile=tile)
    assert html == render(findings_of(classes), curves=png_of(90, 60), tile=tile)
    page = Page(html)
    for img in page.all("img"):
        assert img["alt"]
        assert (img["src"] or "").startswith("data:image/png;base64,")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    for reference in ("http://", "https://", "file://", "url(", "@import", "//cdn"):
        assert reference not in html
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [(a["href"] or "")[1:] for a in page.all("a")]
    assert len(targets) == 10
    assert set(targets) <= set(ids)


@plain_pictures
def test_names_are_text_whatever_they_look_like() -> None:
    findings = findings_of(10)
    html = render(findings, curves=None, tile=tile)
    page = Page(html)
    assert "<script" not in html
    for text in (*AWKWARD, findings.run, findings.data, *findings.warnings, "densenet<121>"):
        assert text in page.text
    assert 'title="' + "x" * 200 in html  # cut off in a caption, whole when pointed at
    alts = [img["alt"] for img in page.all("img")]
    assert f"image 101, labelled {AWKWARD[1]}, called {AWKWARD[0]}" in " ".join(map(str, alts))


@plain_pictures
def test_images_of_a_folder_are_named_by_their_files() -> None:
    file = 'cats/<b>"& (1).png'
    named = replace(findings_of(), label_errors=(replace(example(3, "a", "b"), file=file),))
    page = Page(render(named, curves=None, tile=tile))
    assert f"{file} label a" in page.text
    (img,) = [img for img in page.all("img") if img.get("title") == file]
    assert (img["alt"] or "").startswith(f"{file}, labelled a, called b")
    assert named.to_dict()["label_errors"][0]["file"] == file


@plain_pictures
def test_all_figures_are_there() -> None:
    text = Page(render(findings_of(10), curves=None, tile=tile)).text
    for passage in (
        'judged on digits, "test" · 415 images · 2025-06-14',
        "Accuracy 91.2% 95% interval 90.1% to 92.3%",
        "Among the five likeliest 99.1% 95% interval 98.8% to 99.4%",
        "Macro F1 88.2% 95% interval 87.0% to 89.4%",
        "Balanced accuracy 89.3% 95% interval 88.1% to 90.6%",
        "AUROC 0.977 mean over the classes Average precision 0.923",
        "Calibration error (ECE) 8.1% → 1.3% before and after calibration: temperature",
        f"{AWKWARD[0]} {AWKWARD[1]} 7 14.9%",
        f"0 {AWKWARD[0]} 47 81.1% 64.2% 71.3% – 0.861",
        f"1 {AWKWARD[1]} 41 81.2% 64.3% 71.4% 0.951 –",
        "9 class 1 40 82.0% 65.1% 72.2% 0.952 0.870",
        "none 0.5123 0.2134 8.1% 8.0%",
        "temperature stored with the model 0.3212 0.1846 1.3% 1.6%",
        "vector 0.3199 0.1812 1.4% 1.7%",
        "Fitted on: validation, 179 images.",
        "5.0% 67.8% 93.4% 4.7% 2.0% stored with the model 91.4% 71.2% 2.1% 1.0% not reachable – –",
        "0.5% 99.99% 0.0% no answer given",
        "(AURC): 0.0247",
        f"image 107 label &lt; 4.3% given {AWKWARD[6]} 87.7%",
        "image 7 label, given 肺炎 87.7%",
        "image 3 label a 4.3% given b 87.7%",
        "parameters 7,978,856 multiply-adds (MACs) an image 2.83 G",
        "memory of the weights 32.1 MB kept in training, an image 13.5 MB",
        "batch 1 4.56 inference, batch 64 1,234 training, batch 64 232 CPU & more, bfloat16",
    ):
        assert passage in text, passage


@plain_pictures
def test_a_class_without_images_has_dashes() -> None:
    findings = findings_of(2)
    first, second = findings.scores.classes
    gone = replace(first, support=0, precision=None, recall=None, f1=None, average_precision=None)
    scores = replace(findings.scores, classes=(gone, second))
    page = Page(render(replace(findings, scores=scores), curves=None, tile=tile))
    assert f"0 {gone.name} 0 – – – – –" in page.text
    assert "finds least often" not in page.text  # of one class


@plain_pictures
def test_two_classes_have_no_five_likeliest() -> None:
    text = Page(render(findings_of(2), curves=None, tile=tile)).text
    assert "five likeliest" not in text
    assert "Balanced accuracy 89.3%" in text


@plain_pictures
def test_what_is_not_there_is_left_out() -> None:
    full = findings_of(10)
    scores = replace(
        full.scores, confusion=None, balanced_accuracy=None, auroc=None, average_precision=None,
        top5_accuracy=None,
        classes=tuple(replace(c, auroc=None, average_precision=None) for c in full.scores.classes),
    )  # fmt: skip
    bare = replace(
        full, scores=scores, warnings=(), method="none", calibrated_on=None, is_stored=False,
        calibration=full.calibration[:1], selective=replace(full.selective, choices=()),
        mistakes=(), unsure=(), label_errors=(),
        cost=replace(full.cost, images_per_s={}),
    )  # fmt: skip
    page = Page(render(bare, curves=None, tile=tile))
    assert len(page.all("img")) == 3
    assert page.text.count("There are none.") == 2
    for part in ("Before you rely", "What it takes for what", "How it was trained", "Right halves"):
        assert part not in page.text
    for part in (
        "No label is in doubt.",
        "own probabilities",
        "not calibrated",
        "All labels right",
    ):
        assert part in page.text
    targets = {(a["href"] or "")[1:] for a in page.all("a")}
    assert targets <= {attrs.get("id") for _, attrs in page.tags}


@plain_pictures
def test_a_calibration_of_an_earlier_day() -> None:
    text = Page(render(replace(findings_of(), calibrated_on=None), curves=None, tile=tile)).text
    assert "the one that was stored with the model" in text


@plain_pictures
def test_enlarged_pixels_stay_squares_and_photographs_smooth() -> None:
    def as_it_is(pixels: NDArray[np.uint8], heat_map: object) -> Image.Image:
        return Image.new("RGB", (pixels.shape[2], pixels.shape[1]))

    for draw, enlarged in ((tile, 10), (as_it_is, 0)):
        images = Page(render(findings_of(), curves=None, tile=draw)).all("img")
        assert sum(img.get("class") == "pixels" for img in images) == enlarged


@plain_pictures
def test_the_legend_is_the_overlay_of_a_rising_heat_map() -> None:
    seen = []

    def spy(pixels: NDArray[np.uint8], heat_map: NDArray[np.float32] | None) -> Image.Image:
        seen.append((pixels, heat_map))
        return tile(pixels, heat_map)

    findings = findings_of()
    signed = replace(findings.unsure[0], heat_map=np.array([[0, -1, np.nan]], dtype=np.float32))
    for unsure, least in ((findings.unsure, 0), ((signed,), -1)):
        html = render(replace(findings, unsure=unsure), curves=None, tile=spy)
        assert ("against it" in html) == (least < 0)
        pixels, heat_map = seen[-1]
        assert heat_map is not None
        assert pixels.shape == (1, *heat_map.shape)
        assert (heat_map[0, 0], heat_map[-1, -1]) == (least, 1)
        assert (np.diff(heat_map, axis=1) > 0).all()
    unmapped = replace(findings, mistakes=(), unsure=(), label_errors=findings.label_errors[:1])
    assert "Right halves" not in render(unmapped, curves=None, tile=tile)


def test_the_summary_says_what_the_figures_say() -> None:
    assert summary(findings_of(10)) == [
        "It is right on 379 of 415 images.",
        "Where it is about 90.4% sure, it is right 88.7% of the time (30 images).",
        "If it answers only where it is at least 91.4% sure, 296 of 415 images get an answer, 2.1% "
        "of them a wrong one.",
        f"Its most frequent mistake: “{AWKWARD[0]}” called “{AWKWARD[1]}” (7 times).",
        f"The class that it finds least often: “{AWKWARD[0]}”, 64.2% of them.",
    ]


@pytest.mark.parametrize(("images", "told"), [(19, "60.0%"), (20, "90.4%")])
def test_the_summary_tells_of_answers_around_90_percent_where_there_are_enough(
    images: int, told: str
) -> None:
    findings = findings_of(10)
    most, ninety = findings.after.bins
    bins = (most, replace(ninety, images=images))
    calibration = tuple(replace(score, bins=bins) for score in findings.calibration)
    found = summary(replace(findings, calibration=calibration))
    assert found[1].startswith(f"Where it is about {told} sure, ")


@pytest.mark.parametrize(
    ("right", "images", "words"),
    [
        (20, 20, "all 20 images"),
        (0, 20, "none of the 20 images"),
        (1999, 2000, "1,999 of 2,000 images"),
        (1, 2, "1 of 2 images"),
    ],
)
def test_shares_in_words(right: int, images: int, words: str) -> None:
    findings = findings_of()
    accuracy = Interval(right / images, 0, 1)
    scores = replace(findings.scores, images=images, accuracy=accuracy)
    assert summary(replace(findings, scores=scores))[0] == f"It is right on {words}."


def test_only_what_is_none_or_all_looks_so() -> None:
    assert [percent(share) for share in (0, 1, 0.5, 0.9996, 0.00004, 1 - 1e-9)] == [
        "0.0%", "100.0%", "50.0%", "99.96%", "0.004%", "99.9999999%",
    ]  # fmt: skip
    assert [number(value) for value in (0, 1, 0.98765, 0.99997)] == [
        "0.000", "1.000", "0.988", "0.99997",
    ]  # fmt: skip


@plain_pictures
def test_the_folder_holds_the_page_and_its_figures(tmp_path: Path) -> None:
    findings = findings_of(120)
    page = write_report(tmp_path / "a" / "report", findings, curves=None, tile=tile)
    assert page == tmp_path / "a" / "report" / "report.html"
    assert page.read_text(encoding="utf-8") == render(findings, curves=None, tile=tile)
    values = json.loads((page.parent / "metrics.json").read_text(encoding="utf-8"))
    assert values == json.loads(json.dumps(findings.to_dict()))
    assert values["scores"]["confusion"][0][1] == 7
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["report"]


def refuse(path: Path, target: Path) -> None:
    raise OSError(13, "Permission denied")


def write_old(folder: Path) -> None:
    folder.mkdir()
    (folder / "report.html").write_text("old")
    (folder / "metrics.json").write_text("{}")


@plain_pictures
def test_a_new_report_takes_the_place_of_its_two_files_and_of_nothing_else(tmp_path: Path) -> None:
    for name in ("report", "report.new", "report.old"):
        write_old(tmp_path / name)
    (tmp_path / "report" / ".git").mkdir()
    (tmp_path / "report" / ".git" / "config").write_text("mine")
    page = write_report(tmp_path / "report", findings_of(), curves=None, tile=tile)
    assert page.read_text(encoding="utf-8") != "old"
    assert (tmp_path / "report" / ".git" / "config").read_text() == "mine"
    for other in ("report.new", "report.old"):
        assert (tmp_path / other / "report.html").read_text() == "old"


@plain_pictures
@pytest.mark.parametrize("where", ["drawing", "figures", "writing", "renaming"])
def test_a_failure_leaves_the_old_report(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_old(tmp_path / "report")
    findings = findings_of()
    draw = tile
    if where == "drawing":

        def draw(pixels: NDArray[np.uint8], heat_map: object) -> Image.Image:
            raise OSError("drawing")

    elif where == "figures":
        findings = replace(findings, selective=replace(findings.selective, area=float("nan")))
    elif where == "writing":
        write = Path.write_text

        def half(path: Path, text: str, **how: str) -> int:
            if path.suffix == ".html":
                write(path, text[:100], **how)
                raise OSError(28, "No space left on device")
            return write(path, text, **how)

        monkeypatch.setattr(Path, "write_text", half)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    expected = {"drawing": OSError, "figures": ValueError}.get(where, RunError)
    with pytest.raises(expected, match=r"drawing|JSON|cannot be written: (No space|Permission)"):
        write_report(tmp_path / "report", findings, curves=None, tile=draw)
    assert (tmp_path / "report" / "report.html").read_text() == "old"
    assert (tmp_path / "report" / "metrics.json").read_text() == "{}"
    monkeypatch.undo()
    assert len(list((tmp_path / "report").iterdir())) == 2


@plain_pictures
def test_what_is_no_report_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("mine")
    for name, message in (
        ("thesis", "thesis: holds thesis.tex"),
        ("file", "file: no folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_report(tmp_path / name, findings_of(), curves=None, tile=tile)
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years"
    assert (tmp_path / "file").read_text() == "mine"


@plain_pictures
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "big_disk").mkdir()
    (tmp_path / "report").symlink_to(tmp_path / "big_disk")
    page = write_report(tmp_path / "report", findings_of(), curves=None, tile=tile)
    assert (tmp_path / "report").is_symlink()
    assert page == tmp_path / "report" / "report.html"
    assert (tmp_path / "big_disk" / "report.html").is_file()


@plain_pictures
def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    findings = replace(findings_of(), run="runs/\udcff")
    page = write_report(tmp_path / "report", findings, curves=None, tile=tile)
    assert "runs/?" in page.read_text(encoding="utf-8")

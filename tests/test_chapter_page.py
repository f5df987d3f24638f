"""The chapter's page says what is so, in both languages: its code runs, its figures are files'."""

import doctest
import json
import re
import runpy
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from densely.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CLAIMS = ROOT / "benchmarks" / "results" / "claims"
NAMES = ("chapter.md", "chapter.zh.md")
TEXTS = {name: (DOCS / name).read_text(encoding="utf-8") for name in NAMES}
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")
    MADE = runpy.run_path(str(ROOT / "benchmarks" / "chapter_pages.py"))


def fences(page: str) -> list[tuple[str, str]]:
    """Language and text of each block of code, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """What the page tells to type."""
    blocks = [text for language, text in fences(TEXTS["chapter.md"]) if not language]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("densely ")]


@pytest.mark.usefixtures("one_thread")
def test_the_python_runs_and_prints_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = [*fences(TEXTS["chapter.md"]), ("", "")]
    ran = 0
    for (language, code), (following, shown) in pairwise(blocks):
        if language != "python":
            continue
        exec(compile(code, "chapter.md", "exec"), names)
        printed = capsys.readouterr().out
        expected = shown if following == "text" else ""
        same = doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)
        assert same, f"{code}\nprints\n{printed}\nand the page shows\n{expected}"
        ran += 1
    assert ran >= 15
    assert sum(shown.count("...") for language, shown in blocks if language == "text") == 1


def test_both_languages_have_the_same_code_and_output() -> None:
    english, chinese = (fences(TEXTS[name]) for name in NAMES)
    assert english == chinese
    assert {language for language, _ in english} == {"", "python", "text"}


def test_both_languages_have_the_same_parts_links_and_pictures() -> None:
    english, chinese = (TEXTS[name] for name in NAMES)
    for pattern in (r"^(#+) ", r"<!-- begin: (.*) -->", r"\]\(([\w./-]+)\)"):
        found, other = (re.findall(pattern, text, re.MULTILINE) for text in (english, chinese))
        assert len(found) > 3
        own = {"chapter.md", "chapter.zh.md"}
        assert [one for one in found if one not in own] == [one for one in other if one not in own]


def test_every_command_is_one() -> None:
    assert len(commands()) == 7


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_know_their_options(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([*command, "--help"])
    printed = capsys.readouterr()
    assert (leaving.value.code or 0, printed.err) == (0, "")
    for option in command:
        if option.startswith("--"):
            assert re.search(rf"^ +(-\w, )?{option}\b", printed.out, re.MULTILINE), option


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "compare"], ids=" ".join)
def test_what_was_measured_is_what_the_command_runs(command: list[str]) -> None:
    options = dict(zip(command[1::2], command[2::2], strict=True))
    path = CLAIMS / options.pop("--recipe") / "comparison.json"
    if not path.is_file():
        pytest.skip(f"not measured yet: {path.relative_to(ROOT)}")
    found = json.loads(path.read_text(encoding="utf-8"))
    for option, value in options.items():
        assert found["schedule"][option[2:].replace("-", "_")] == int(value)
    assert {len(group["runs"]) for group in found["groups"]} == {3}


@pytest.mark.parametrize("name", NAMES)
def test_links_and_pictures_lead_somewhere(name: str) -> None:
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", TEXTS[name], re.MULTILINE)
    }
    targets = re.findall(r"\]\(([^)]+)\)", TEXTS[name])
    assert len(targets) > 10
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        else:
            assert (DOCS / target).is_file(), target


def test_english_lines_are_short() -> None:
    for line in TEXTS["chapter.md"].splitlines():
        assert len(line) <= 100 or line.startswith("|"), line


# --- What is generated. ---


def test_the_pages_are_made_from_the_result_files() -> None:
    assert MADE["PAGES"].keys() == set(NAMES)
    for name, make in MADE["PAGES"].items():
        assert make() == TEXTS[name], f"{name}: run python benchmarks/chapter_pages.py"


def group(name: str, accuracies: list[float], scale: float = 1.0) -> dict[str, Any]:
    return {
        "name": name,
        "runs": ["run"] * len(accuracies),
        "accuracies": accuracies,
        "accuracy": {"value": 0.8765, "low": 0.8712, "high": 0.8818},
        "cost": {
            "train_images_per_s": 321.4 * scale,
            "parameters": int(750_000 * scale),
            "macs": 4e7 * scale,
            "kept_bytes": 2e6 * scale,
        },
    }


def comparison(low: float, high: float) -> dict[str, Any]:
    pair = {"first": "average", "second": "maximum"}
    return {
        "date": "2027-01-31",
        "images": 10_000,
        "schedule": {"limit": 12_000, "image_size": 48, "epochs": 6, "batch_size": 128},
        "groups": [group("average", [0.88, 0.87, 0.86]), group("maximum", [0.87, 0.88, 0.85], 0.5)],
        "pairs": [pair | {"difference": {"value": (low + high) / 2, "low": low, "high": high}}],
        "environment": {
            "device_name": "CPU",
            "threads": 2,
            "precision": "float32",
            "commit": "abcdef0",
        },
    }


@pytest.mark.parametrize(
    ("low", "high", "english", "chinese"),
    [
        (0.002, 0.018, "**average pooling is better than maximum pooling**: +1.00", "平均汇聚优于"),
        (
            -0.018,
            -0.002,
            "**average pooling is worse than maximum pooling**: -1.00",
            "平均汇聚不如",
        ),
        (
            -0.001,
            0.021,
            "**No difference shown between average pooling and maximum",
            "没有显示出平均",
        ),
        (0.0, 0.02, "**No difference shown between average pooling and maximum", "没有显示出平均"),
    ],
)
def test_a_difference_is_one_only_where_its_interval_leaves_0_out(
    low: float, high: float, english: str, chinese: str
) -> None:
    for words, verdict in ((MADE["ENGLISH"], english), (MADE["CHINESE"], chinese)):
        text = MADE["comparison"](words, "some", comparison(low, high)).replace("\n  ", " ")
        assert verdict in text
        for figure in (f"{100 * low:+.2f}", f"{100 * high:+.2f}", "0.8765 (0.8712", "12,000"):
            assert figure in text
        (line,) = re.findall(r"^- .*$", text, re.MULTILINE)
        assert re.search(r"is ahead with 2 of 3 seeds|平均汇聚在3个种子中的2个上领先", line)
        assert "2.00" in text.split("\n- ")[1]  # times the parameters
        assert "(../benchmarks/results/claims/some/comparison.png)" in text


def test_single_runs_say_nothing_over_seeds() -> None:
    found = comparison(0.01, 0.02)
    pair = found["pairs"][0] | {"difference": None}
    groups = {each["name"]: each for each in found["groups"]}
    assert "nothing can be said" in MADE["verdict"](MADE["ENGLISH"], pair, groups)
    assert "无法" in MADE["verdict"](MADE["CHINESE"], pair, groups)

"""Runs side by side: groups, intervals, McNemar's test, pictures, and going on after a stop."""

import dataclasses
import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import densely
from densely import drawing
from densely.cli import main
from densely.comparison.compare import compare, grouped, mcnemar
from densely.comparison.page import sentence, table, write_comparison
from densely.comparison.same_images import identity, same_images
from densely.data import ImageSet
from densely.errors import ConfigError, RunError
from densely.training.run import RunDirectory

pytestmark = pytest.mark.usefixtures("hasty_costs", "undrawn")

FLAGS = [
    *("--epochs", "1", "--limit", "60", "--seeds", "2", "--validation", "0"),
    *("--variant", "average: {options: {transition_pool: avg}}"),
    *("--variant", "maximum: {options: {transition_pool: max}}"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, hasty_costs: None) -> Path:
    """Two variants with two seeds each; tests must leave it as it is."""
    output = tmp_path_factory.mktemp("compared")
    assert main(["compare", *FLAGS, "--quiet", "--output", str(output)]) == 0
    return output / "compare-quickstart-001"


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[str, object]:
    return json.loads((folder / "comparison.json").read_text())  # type: ignore[no-any-return]


def test_every_variant_is_trained_with_every_seed(folder: Path) -> None:
    configs = [RunDirectory.open(path).config() for path in sorted((folder / "runs").iterdir())]
    assert [(c.options["transition_pool"], c.seed) for c in configs] == [
        *(("avg", 0), ("avg", 1)),
        *(("max", 0), ("max", 1)),
    ]
    assert all((c.epochs, c.limit) == (1, 60) for c in configs)


def test_accuracies_are_those_of_evaluate(folder: Path, written: dict) -> None:
    for group in written["groups"]:
        for run, accuracy in zip(group["runs"], group["accuracies"], strict=True):
            assert densely.evaluate(run).accuracy == accuracy
        a, b = group["accuracies"]
        # Student with one degree of freedom: 12.706 standard errors, |a - b| / 2.
        reach = 12.7062 * abs(a - b) / 2
        assert group["accuracy"]["value"] == pytest.approx((a + b) / 2)
        assert group["accuracy"]["high"] - (a + b) / 2 == pytest.approx(reach, rel=1e-4)


def test_images_on_which_two_runs_differ_are_counted(folder: Path, written: dict) -> None:
    (pair,) = written["pairs"]
    for i in range(2):
        tables = [densely.evaluate(group["runs"][i]) for group in written["groups"]]
        difference = pair["only_first"][i] - pair["only_second"][i]
        assert difference == round(360 * (tables[0].accuracy - tables[1].accuracy))
        assert pair["p_values"][i] == mcnemar(pair["only_first"][i], pair["only_second"][i])


def test_what_a_network_costs_is_told(written: dict) -> None:
    first, second = (group["cost"] for group in written["groups"])
    assert first["parameters"] == second["parameters"] > 70_000
    assert first["macs"] < second["macs"]  # only the average may be taken before the convolution
    assert all(speed > 0 for speed in first["images_per_s"].values())
    assert 0 < first["kept_bytes"] < second["kept_bytes"]


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 5), (9, 1), (1, 9), (0, 12), (40, 60)])
def test_mcnemar_is_the_exact_two_sided_binomial(b: int, c: int) -> None:
    n, k = b + c, min(b, c)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert mcnemar(b, c) == pytest.approx(min(1.0, 2 * tail))


def test_runs_that_differ_in_their_seed_alone_stand_together(folder: Path) -> None:
    runs = sorted((folder / "runs").iterdir())
    assert [len(group) for group in grouped(runs).values()] == [2, 2]
    with pytest.raises(ConfigError, match=r"2 run\(s\) of one configuration"):
        compare(runs[:2])
    with pytest.raises(RunError, match="nowhere: no run directory"):
        compare([runs[0], "nowhere"])


def test_no_run_counts_twice(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, other, _ = sorted((folder / "runs").iterdir())
    monkeypatch.chdir(folder)
    relative = Path("runs") / first.name
    copy = shutil.copytree(first, tmp_path / "copy")
    for runs in ([first, relative, other], {"a": [first], "b": [second, relative]}):
        with pytest.raises(ConfigError, match=f"{relative}: named twice, as {first} before"):
            compare(runs)
    for runs in ([first, copy, other], {"a": [first, copy], "b": [other]}):
        with pytest.raises(ConfigError, match=f"{first} and {copy} both have seed 0"):
            compare(runs)
    with pytest.raises(ConfigError, match="'a': no runs; name at least one"):
        compare({"a": [], "b": [first]})


@pytest.fixture
def with_seed(tmp_path: Path) -> Callable[[Path, int], Path]:
    """Copies a run and says that it had another seed."""

    def copied(run: Path, seed: int) -> Path:
        copy = shutil.copytree(run, tmp_path / f"seed{seed}")
        config = RunDirectory.open(copy).config()
        RunDirectory.open(copy).write_config(dataclasses.replace(config, seed=seed))
        return copy

    return copied


def test_runs_of_equal_seeds_are_paired_and_others_left_out(
    folder: Path, written: dict, with_seed: Callable[[Path, int], Path]
) -> None:
    average0, average1, maximum0, maximum1 = sorted((folder / "runs").iterdir())
    moved = with_seed(maximum0, 2)
    result = compare({"average": [average0, average1], "maximum": [moved, maximum1]})
    (pair,), (both,) = result.pairs, written["pairs"]
    assert [group.seeds for group in result.groups] == [(0, 1), (1, 2)]
    assert (pair.seeds, pair.left_out) == ((1,), (str(average0), str(moved)))
    assert [*pair.only_first, *pair.only_second] == [both["only_first"][1], both["only_second"][1]]
    assert pair.difference is None
    assert f"no run of their seed: {average0}, {moved}." in sentence(pair)


def test_the_order_of_runs_makes_no_difference(folder: Path, written: dict) -> None:
    average0, average1, maximum0, maximum1 = sorted((folder / "runs").iterdir())
    result = compare({"average": [average1, average0], "maximum": [maximum0, maximum1]})
    again = json.loads(json.dumps(result.to_dict()))
    assert again["pairs"] == written["pairs"]
    assert again["pairs"][0]["seeds"] == [0, 1]
    assert again["pairs"][0]["difference"] is not None
    assert [g["runs"] for g in again["groups"]] == [g["runs"] for g in written["groups"]]


def test_groups_without_a_common_seed_are_not_paired(
    folder: Path, with_seed: Callable[[Path, int], Path]
) -> None:
    average0, average1, maximum0, maximum1 = sorted((folder / "runs").iterdir())
    others = [with_seed(maximum0, 2), with_seed(maximum1, 3)]
    (pair,) = compare({"a": [average0, average1], "b": others}).pairs
    assert (pair.seeds, pair.difference, pair.p_values) == ((), None, ())
    assert sentence(pair) == (
        "a against b: no seed is common to both, so that no runs can be paired."
    )
    assert len(pair.left_out) == 4


def test_two_runs_are_a_pair_whatever_their_seeds(folder: Path) -> None:
    average0, *_, maximum1 = sorted((folder / "runs").iterdir())
    (pair,) = compare([average0, maximum1]).pairs
    assert (pair.difference, pair.left_out, len(pair.p_values)) == (None, (), 1)
    assert "McNemar, run by run: only the first right" in sentence(pair)


def test_runs_on_other_images_are_not_compared(folder: Path, digits_run: Path) -> None:
    run = sorted((folder / "runs").iterdir())[0]
    assert compare([run, digits_run]).images == 360
    config = (digits_run / "config.yaml").read_text()
    assert "split_seed: 0" in config


def test_a_single_run_each_has_wilsons_interval(folder: Path) -> None:
    runs = sorted((folder / "runs").iterdir())
    result = compare({"one": runs[:1], "other": runs[2:3]})
    interval = result.groups[0].accuracy
    p, n, z = interval.value, 360, 1.959964
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert (interval.low, interval.high) == pytest.approx((middle - half, middle + half))
    assert result.pairs[0].difference is None
    assert "McNemar, run by run" in sentence(result.pairs[0])


def test_equal_accuracies_say_nothing_of_their_spread(folder: Path, tmp_path: Path) -> None:
    """Though one run more were as sure as all there ever will be."""
    run = sorted((folder / "runs").iterdir())[0]
    copies = []
    for i in range(5):
        copies.append(Path(shutil.copytree(run, tmp_path / str(i))))
        config = (run / "config.yaml").read_text()
        (copies[-1] / "config.yaml").write_text(config.replace("\nseed: 0\n", f"\nseed: {i % 2}\n"))
    result = compare({"a": copies[:2], "b": copies[2:4], "one": copies[4:]})
    pair, one = result.groups[:2], result.groups[2]
    assert [group.accuracy for group in pair] == [one.accuracy] * 2
    assert one.accuracy.low < one.accuracy.value < one.accuracy.high
    assert result.pairs[0].difference is None


def test_the_page_and_the_picture(folder: Path, tmp_path: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "| average |" in text
    assert "average against maximum:" in text
    assert "epochs 1" in text
    picture = np.asarray(Image.open(folder / "comparison.png").convert("RGB"))
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50  # not an empty page
    runs = sorted((folder / "runs").iterdir())
    result = compare({"$|<平均>": runs[:1], "b": runs[2:3]})
    write_comparison(result, tmp_path)
    assert "| $\\|<平均> |" in table(result)  # a bar within a cell is escaped


@pytest.mark.parametrize("validation", ["0", "0.2"])
def test_epochs_that_were_not_evaluated_are_left_out_of_the_picture(
    tmp_path: Path, validation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, list[float]] = {}

    def look(figure: Any, path: Path) -> None:
        for axes in figure.axes[:2] if len(figure.axes) > 1 else ():  # no run's own curves
            drawn[axes.get_title()] = list(axes.lines[0].get_xdata())

    monkeypatch.setattr(drawing, "save", look)
    flags = ["--epochs", "3", "--limit", "60", "--seeds", "1", "--evaluate-every", "2"]
    flags += ["--variant", "a: {lr: 0.1}", "--variant", "b: {lr: 0.05}"]
    words = ["compare", *flags, "--validation", validation, "--quiet", "--output", str(tmp_path)]
    assert main(words) == 0
    assert drawn == {"held-out accuracy": [2, 3], "training loss": [1, 2, 3]}


def test_a_variant_given_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = ["--variant", "a: {lr: 0.1}", "--variant", "b: {}", "--variant", "a: {lr: 0.2}"]
    assert main(["compare", *variants, "--output", str(tmp_path)]) == 2
    assert "--variant 'a' is given twice" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_comparison_that_is_stopped_while_it_judges_says_how_to_go_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("densely.comparison.compare.compare", stopped)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert main(["compare", "--resume", str(copy), "--quiet"]) == 130
    assert f"go on with: densely compare --resume {copy}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "evaluate", "explain", "train --resume", "compare"])
def test_where_a_run_is_wanted_a_comparison_is_told_from_one(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    others = ["x.png"] if command in ("predict", "explain") else []
    assert main([*command.split(), str(folder), *others]) == 2
    assert f"{folder}: a comparison; its runs are in {folder / 'runs'}" in capsys.readouterr().err


def test_a_stopped_comparison_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = (copy / "runs" / "maximum-seed0-001" / "metrics.csv").read_bytes()
    shutil.rmtree(copy / "runs" / "maximum-seed1-001")
    (copy / "runs" / "average-seed1-001" / "README.md").unlink()  # stopped before its end
    assert main(["compare", "--resume", str(copy), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    again = lines[-1]
    assert sum(line.get("event") == "start" for line in lines) == 2
    original = json.loads((folder / "comparison.json").read_text())
    for group, other in zip(again["groups"], original["groups"], strict=True):
        assert group["accuracies"] == other["accuracies"]
    assert (copy / "runs" / "maximum-seed0-001" / "metrics.csv").read_bytes() == before


def test_a_comparison_goes_on_with_the_images_that_it_was_to_be_judged_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("split: test", "split: train"))
    assert main(["compare", "--resume", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["data"] == "digits, train"
    assert "The networks learned from these images" in (copy / "README.md").read_text()
    assert main(["compare", "--resume", str(copy), "--split", "test"]) == 2
    assert "goes on with a comparison as it began" in capsys.readouterr().err
    config.write_text(config.read_text().replace("split: train\n", ""))  # of before there were
    assert main(["compare", "--resume", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["data"] == "digits, test"


def test_a_comparison_goes_on_in_the_precision_that_it_began_in(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = (copy / "config.yaml").read_bytes()
    before = RunDirectory(copy / "runs" / "average-seed0-001").precision()
    other = {"float32": "bfloat16", "bfloat16": "float32"}[before]
    assert main(["compare", "--resume", str(copy), "--precision", other]) == 2
    error = capsys.readouterr().err
    assert f"average-seed0-001 was trained in {before}" in error
    assert f"go on with --precision {before}, or begin a new one" in error
    assert (copy / "config.yaml").read_bytes() == config
    same = ["--precision", before, "--memory-format", "contiguous", "--quiet"]
    assert main(["compare", "--resume", str(copy), *same]) == 0


def test_a_variant_that_diverges_is_to_be_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = ["--variant", "tame: {}", "--variant", "wild: {lr: 1.0e+9}"]
    flags = [*FLAGS[:4], "--seeds", "1", "--batch-size", "20", "--quiet"]
    assert main(["compare", *flags, *variants, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "variant 'wild', seed 0: the loss is" in error
    assert "change that variant, or what all share, and begin a new comparison" in error
    assert "--resume" not in error
    assert len(error.splitlines()) == 2


def test_finished_runs_are_judged_where_the_data_are_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, now, others = (tmp_path / name for name in ("before", "now", "others"))
    for top, shift in ((before, 0), (others, 5)):
        for name, shade in (("dark", 30), ("light", 220)):
            (top / name).mkdir(parents=True)
            for i in range(10):
                Image.new("L", (8, 8), shade + i + shift).save(top / name / f"{i}.png")
    flags = ["--epochs", "1", "--batch-size", "4", "--validation", "0", "--seeds", "1"]
    output = ["--output", str(tmp_path), "--json"]
    assert main(["compare", "--data", str(before), *flags, *FLAGS[-4:], *output]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    before.rename(now)
    folder = str(tmp_path / "compare-quickstart-001")
    runs = sorted((Path(folder) / "runs").iterdir())
    assert compare(runs, str(now)).images == first["images"] == 4
    assert main(["compare", "--resume", folder, "--json"]) == 2
    assert "nor is there a folder" in capsys.readouterr().err
    assert main(["compare", "--resume", folder, "--data", "nowhere", "--json"]) == 2
    assert "nor is there a folder nowhere" in capsys.readouterr().err
    configs = [path.read_text() for path in sorted(Path(folder).rglob("config.yaml"))]
    assert main(["compare", "--resume", folder, "--data", str(others), "--json"]) == 2
    assert "learned from other training images" in capsys.readouterr().err
    assert configs == [path.read_text() for path in sorted(Path(folder).rglob("config.yaml"))]
    assert main(["compare", "--resume", folder, "--device", "cuda:99"]) == 2
    assert "device 'cuda:99' is not here" in capsys.readouterr().err
    assert configs == [path.read_text() for path in sorted(Path(folder).rglob("config.yaml"))]
    assert main(["compare", "--resume", folder, "--data", str(now), "--json"]) == 0
    assert main(["compare", "--resume", folder, "--json"]) == 0  # which it remembers
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [g["accuracies"] for g in again["groups"]] == [g["accuracies"] for g in first["groups"]]
    assert again["images"] == first["images"]


def test_variants_that_would_be_judged_on_other_images_are_not_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for top, test in (("a", 0), ("b", 0), ("c", 7)):
        for part, shift in (("train", ord(top)), ("test", test)):
            for name, shade in (("dark", 30), ("light", 100)):
                folder = tmp_path / top / part / name
                folder.mkdir(parents=True)
                for i in range(6):
                    Image.new("L", (8, 8), shade + i + shift).save(folder / f"{i}.png")
    flags = ["--epochs", "1", "--batch-size", "4", "--seeds", "1", "--validation", "0", "--quiet"]
    flags += ["--output", str(tmp_path / "runs"), "--variant", f"one: {{data: {tmp_path / 'a'}}}"]
    assert main(["compare", *flags, "--variant", f"other: {{data: {tmp_path / 'c'}}}"]) == 2
    error = capsys.readouterr().err
    assert "'one' and 'other' would be judged on different images" in error
    assert not (tmp_path / "runs").exists()
    same = ["--variant", f"same: {{data: {tmp_path / 'b'}}}"]
    assert main(["compare", *flags, *same, "--split", "train"]) == 2
    assert "the train split of their data must be the same" in capsys.readouterr().err
    assert main(["compare", *flags, *same, "--split", "validation"]) == 2
    assert "no validation split" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(["compare", *flags, *same]) == 0


def test_a_folder_in_two_sizes_is_the_same_images_and_two_folders_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for top in ("a", "b"):
        for name, shade in (("dark", 30), ("light", 100)):
            (tmp_path / top / name).mkdir(parents=True)
            for i in range(10):
                Image.new("L", (8, 8), shade + i).save(tmp_path / top / name / f"{i}.png")
    flags = ["--epochs", "1", "--batch-size", "4", "--seeds", "1", "--validation", "0", "--quiet"]
    flags += ["--variant", "one: {data: a, image_size: 8}"]
    for other in ("{data: b, image_size: 12}", "{data: a, image_size: 12, split_seed: 1}"):
        assert main(["compare", *flags, "--variant", f"two: {other}"]) == 2
    assert "variant 'two': split_seed is the same for all variants" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(["compare", *flags, "--variant", "two: {data: ./a/, image_size: 12}"]) == 0


def test_images_are_the_same_by_pixels_or_by_where_they_come_from() -> None:
    def images(seed: int, size: int, *labels: int, classes: str = "ab") -> ImageSet:
        torch.manual_seed(seed)
        pixels = torch.randint(256, (len(labels), 1, size, size), dtype=torch.uint8)
        return ImageSet(pixels, torch.tensor(labels), tuple(classes))

    one = identity(images(0, 8, 0, 1, 1), "x", 0)
    assert same_images(one, identity(images(0, 8, 0, 1, 1), "y", 1))
    assert not same_images(one, identity(images(1, 8, 0, 1, 1), "x", 0))
    assert not same_images(one, identity(images(0, 8, 0, 1, 1, classes="ba"), "x", 0))
    assert same_images(one, identity(images(1, 9, 0, 1, 1), "x", 0))  # another scale
    assert not same_images(one, identity(images(1, 9, 0, 1, 1, classes="ba"), "x", 0))
    assert not same_images(one, identity(images(1, 9, 0, 1, 0), "x", 0))
    assert not same_images(one, identity(images(1, 9, 0, 1, 1), "y", 0))
    assert not same_images(one, identity(images(1, 9, 0, 1, 1), "x", 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "nothing to compare"),
        ("--recipe quickstart", "nothing to compare"),
        ("--recipe average-or-mx", "did you mean average-or-max"),
        ("--recipe d2l --config x.yaml", "exclude each other"),
        ("--variant x", "expected 'NAME: {FIELD: VALUE}'"),
        ("--variant 'a: {lr: 0.1, lr: 0.2}'", "lr: given twice"),
        ("--variant 'a: {}' --variant 'b: {device: cuda:99}'", "device 'cuda:99' is not here"),
        ("--variant 'a: {}' --variant 'b: {}' --seed 4294967295", "seed=4294967297: must be"),
        (f"--variant 'a: {{}}' --variant '{'b' * 250}: {{}}'", "give it a shorter name"),
        ("--resume nowhere", "nowhere: no comparison"),
        ("nowhere elsewhere", "no run directory"),
        ("nowhere --recipe d2l", "--recipe: runs are compared as they are"),
        ("nowhere elsewhere --epochs=5 --seeds 2", "--epochs, --seeds: runs are compared"),
        ("--variant 'a: {}' --variant 'b: {lr: 0.2}' --quiet --json", "exclude each other"),
        ("--variant 'a: {}' --variant 'b: {options: {growth_rate: wide}}'", "growth_rate='wide'"),
        ("--variant 'a: {}' --variant 'b: {options: {num_classes: 3}}'", "what the data decide"),
        ("--recipe average-or-max --seeds 0", "seeds=0"),
        ("--recipe average-or-max", "Fashion-MNIST is not here"),
        ("--variant 'a: {}' --variant 'b: {model: resnt}'", "unknown model 'resnt'"),
        ("--variant 'a: {}' --variant 'b: {options: {bn: 3}}'", "unknown option"),
        ("--variant 'a: {}' --variant 'b: {model: d2l}'", "needs images of at least 29 pixels"),
    ],
)
def test_a_mistake_ends_in_a_line_and_leaves_nothing(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *shlex.split(arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 2
    assert not (tmp_path / "runs").exists()

"""`densely.evaluate`: the run's own test split, or other data with the same classes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import densely
from densely.data import load_data
from densely.errors import ConfigError, DataError
from densely.training.loop import train
from densely.training.reporting import Summary


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Summary, Path]:
    """A run on a folder of two kinds of coloured pictures, and the folder."""
    top = tmp_path_factory.mktemp("own")
    generator = torch.Generator().manual_seed(0)
    for name, color in (("bluish", (40, 60, 220)), ("reddish", (220, 60, 40))):
        (top / "data" / name).mkdir(parents=True)
        for i in range(20):
            noise = torch.randint(0, 30, (3,), generator=generator).tolist()
            pixel = tuple(c + n for c, n in zip(color, noise, strict=True))
            Image.new("RGB", (12, 12), pixel).save(top / "data" / name / f"{i}.png")
    config = densely.TrainConfig.from_values(
        {"data": str(top / "data"), "output": str(top / "runs"), "epochs": 3, "batch_size": 8}
    )
    return train(config), top / "data"


def test_the_test_split_gives_what_training_said(tmp_path: Path) -> None:
    config = densely.TrainConfig.from_values({"epochs": 1, "output": str(tmp_path)})
    summary = train(config)
    result = densely.evaluate(summary.run)
    assert (result.accuracy, result.loss) == (summary.test.accuracy, summary.test.loss)


def test_the_confusion_table_counts_every_image(digits_run: Path) -> None:
    result = densely.evaluate(digits_run)
    test = load_data("digits").test
    assert result.images == 360
    assert result.confusion.sum() == 360
    assert result.confusion.sum(axis=1).tolist() == torch.bincount(test.labels).tolist()
    assert result.confusion.trace() / 360 == pytest.approx(result.accuracy)


def test_splits_are_the_runs_own(digits_run: Path) -> None:
    sizes = [densely.evaluate(digits_run, split=s).images for s in ("train", "validation", "test")]
    assert sum(sizes) == 1797
    assert sizes[1:] == [144, 360]


def test_a_run_on_a_folder_is_judged_on_its_own_test_split(
    folder_run: tuple[Summary, Path],
) -> None:
    summary, folder = folder_run
    assert densely.evaluate(summary.run).images == 8
    assert densely.evaluate(summary.run, str(folder)).images == 8


@pytest.mark.parametrize("spelling", ["data", "./data/", "../own0/data"])
def test_the_runs_own_folder_is_known_by_any_spelling(
    folder_run: tuple[Summary, Path], monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    summary, folder = folder_run
    monkeypatch.chdir(folder.parent)
    spelling = spelling.replace("own0", folder.parent.name)
    assert densely.evaluate(summary.run, spelling).images == 8


@pytest.mark.parametrize(
    ("options", "learned"), [({}, 28), ({"limit": 20}, 20), ({"validation": 0.0}, 32)]
)
def test_the_runs_own_folder_is_known_where_it_has_been_moved_to(
    folder_run: tuple[Summary, Path], tmp_path: Path, options: dict[str, float], learned: int
) -> None:
    data, moved = Path(shutil.copytree(folder_run[1], tmp_path / "data")), tmp_path / "moved"
    config = {"data": str(data), "output": str(tmp_path), "epochs": 1, "batch_size": 8} | options
    run = train(densely.TrainConfig.from_values(config)).run
    before = densely.evaluate(run)
    data.rename(moved)
    after = densely.evaluate(run, str(moved))
    assert (after.images, after.loss, after.data) == (8, before.loss, f"{moved}, test")
    assert densely.evaluate(run, str(moved), split="train").images == learned
    Image.new("RGB", (12, 12), (200, 60, 60)).save(moved / "reddish" / "new.png")
    assert densely.evaluate(run, str(moved)).images == 41  # others, as a whole


def test_a_folder_that_has_changed_is_refused(
    folder_run: tuple[Summary, Path], tmp_path: Path
) -> None:
    _, folder = folder_run
    data = Path(shutil.copytree(folder, tmp_path / "data"))
    config = {"data": str(data), "output": str(tmp_path), "epochs": 1, "batch_size": 8}
    run = train(densely.TrainConfig.from_values(config)).run
    assert densely.evaluate(run).images == 8
    Image.new("RGB", (12, 12), (200, 60, 60)).save(data / "reddish" / "new.png")
    with pytest.raises(DataError, match="has changed since"):
        densely.evaluate(run)


def test_the_train_split_keeps_to_the_limit(tmp_path: Path) -> None:
    config = {"epochs": 1, "limit": 100, "output": str(tmp_path)}
    run = train(densely.TrainConfig.from_values(config)).run
    assert densely.evaluate(run, split="train").images == 100


def test_grey_data_do_not_fit_a_run_in_colour(folder_run: tuple[Summary, Path]) -> None:
    with pytest.raises(DataError, match="digits has images of 1 channel"):
        densely.evaluate(folder_run[0].run, "digits")


def test_another_folder_is_judged_on_as_a_whole(
    folder_run: tuple[Summary, Path], tmp_path: Path
) -> None:
    summary, _ = folder_run
    (tmp_path / "reddish").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (230, 70, 50)).save(tmp_path / "reddish" / f"{i}.jpg")
    result = densely.evaluate(summary.run, str(tmp_path))
    assert (result.images, result.classes) == (3, ("bluish", "reddish"))
    assert result.confusion.sum(axis=1).tolist() == [0, 3]


def test_unknown_classes_are_named(folder_run: tuple[Summary, Path], tmp_path: Path) -> None:
    (tmp_path / "green").mkdir()
    Image.new("RGB", (12, 12)).save(tmp_path / "green" / "a.png")
    with pytest.raises(DataError, match="unknown to the network: green"):
        densely.evaluate(folder_run[0].run, str(tmp_path))


@pytest.mark.parametrize("train_name", ["train", "Training"])
def test_data_with_other_classes_are_refused(
    digits_run: Path, folder_run: tuple[Summary, Path], tmp_path: Path, train_name: str
) -> None:
    for part in (train_name, "test"):
        shutil.copytree(folder_run[1], tmp_path / "data" / part)
    with pytest.raises(DataError, match=r"has the classes bluish, reddish, and .* knows 0, 1"):
        densely.evaluate(digits_run, str(tmp_path / "data"))


def test_an_unknown_split_is_refused_before_anything_is_read() -> None:
    wrong: Any = "tst"
    with pytest.raises(ConfigError, match="split='tst': must be one of train, validation, test"):
        densely.evaluate("nowhere", split=wrong)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["train", "test"], r"has the classes a, b, and .* knows 0, 1, 2"),
        ([""], "classes unknown to the network: a, b; it knows 0, 1, 2"),
    ],
)
def test_other_classes_are_told_before_their_images_are_read(
    digits_run: Path,
    tmp_path: Path,
    parts: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Path] = []

    def refuse(path: Path) -> None:
        opened.append(path)
        raise DataError("no image")

    monkeypatch.setattr("densely.data.folder.open_image", refuse)
    for part in parts:
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(5):
                (tmp_path / part / name / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=message):
        densely.evaluate(digits_run, str(tmp_path))
    assert not opened


def test_no_validation_split_is_said(tmp_path: Path) -> None:
    config = {"epochs": 1, "limit": 100, "validation": 0.0, "output": str(tmp_path)}
    run = train(densely.TrainConfig.from_values(config)).run
    with pytest.raises(ConfigError, match="no validation split"):
        densely.evaluate(run, split="validation")

"""Images that a network has met before are told from new ones, whatever folder they come in."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

import densely
from densely.comparison.compare import compare
from densely.comparison.page import write_comparison
from densely.data import ImageSet, Splits
from densely.evaluation.judged import judge

pytestmark = pytest.mark.usefixtures("hasty_costs", "undrawn")


@pytest.fixture
def run(digits_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits_run, tmp_path / "run"))


def saved(top: Path, images: ImageSet, count: int) -> Path:
    """The first images of a split as files, FOLDER/CLASS/*.png."""
    for i in range(count):
        path = top / images.classes[int(images.labels[i])] / f"{len(list(top.rglob('*')))}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.images[i, 0].numpy()).save(path)
    return top


def test_images_learned_from_or_validated_by_are_warned_of(run: Path, tmp_path: Path) -> None:
    own = judge(run).own
    assert own is not None
    assert own.validation is not None
    others = saved(tmp_path / "others", own.test, 20)
    assert not any("says nothing" in text for text in warnings(run, others))
    saved(others, own.train, 3)
    saved(others, own.validation, 1)
    first, second = (text for text in warnings(run, others) if "says nothing" in text)
    assert first.startswith("Of these images 3 are ones that the network learned from")
    assert second.startswith("Of these images 1 is one that its best epoch and its calibration go")


def warnings(run: Path, images: Path) -> tuple[str, ...]:
    return densely.report(run, str(images)).findings.warnings


def test_a_comparison_reads_what_runs_learned_from_once_and_fetches_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = judge(run).own
    assert own is not None
    other = Path(shutil.copytree(run, tmp_path / "other"))
    others = saved(tmp_path / "others", own.train, 20)
    read: list[object] = []

    def counted(*args: object) -> Splits:
        read.append(args)
        if len(read) > 1:
            raise PermissionError(13, "Permission denied")
        return own

    monkeypatch.setattr("densely.comparison.compare.own_splits", counted)
    assert compare({"a": [run], "b": [other]}, str(others)).learned == 20
    assert len(read) == 1
    assert compare({"a": [run], "b": [other]}, str(others)).learned == 0  # nobody can tell
    monkeypatch.setattr("densely.data.sources._FETCHED", {"digits"})
    assert compare({"a": [run], "b": [other]}, str(others)).learned == 0
    assert len(read) == 2


def test_a_comparison_on_images_learned_from_says_so(run: Path, tmp_path: Path) -> None:
    own = judge(run).own
    assert own is not None
    other = Path(shutil.copytree(run, tmp_path / "other"))
    others = saved(tmp_path / "others", own.test, 20)
    pages = []
    for learned in (0, 2):
        saved(others, own.train, learned)
        result = compare({"a": [run], "b": [other]}, str(others))
        assert result.learned == learned
        pages.append(write_comparison(result, tmp_path).read_text().splitlines()[2])
    assert pages[0].endswith(": 20 images.")
    assert pages[1].endswith(
        ": 22 images. 2 of them are images that a network learned from: there it is better than on "
        "new ones."
    )

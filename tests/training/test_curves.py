"""The picture of the curves is made for runs of any length."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from densely import drawing
from densely.training.curves import draw_curves
from densely.training.run import EpochMetrics


@pytest.mark.parametrize("epochs", [1, 2, 30])
@pytest.mark.parametrize("loss", [0.1, 9.0])
def test_a_picture_is_drawn(tmp_path: Path, epochs: int, loss: float) -> None:
    rows = [
        EpochMetrics(i + 1, 0.1, loss / (i + 1), 0.5, None, None, 1.0, 0.4, 1.0, 1.0)
        for i in range(epochs)
    ]
    draw_curves(rows, tmp_path / "curves.png", "a title")
    with Image.open(tmp_path / "curves.png") as picture:
        picture.load()
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10  # something is on it
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("evaluated", [(), (3,), (2, 4)])
def test_epochs_that_were_not_evaluated_have_no_point(
    tmp_path: Path, evaluated: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[float, ...]] = []

    def look(figure: Any, path: Path) -> None:
        drawn.extend(tuple(line.get_xdata()) for line in figure.axes[0].lines)

    monkeypatch.setattr(drawing, "save", look)
    rows = [
        EpochMetrics(
            i,
            0.1,
            1.0,
            0.5,
            None,
            None,
            *((1.0, 0.4) if i in evaluated else (None, None)),
            1.0,
            1.0,
        )
        for i in range(1, 5)
    ]
    draw_curves(rows, tmp_path / "curves.png", "a title")
    assert drawn == [(1, 2, 3, 4)] * 2 + ([evaluated] if evaluated else [])

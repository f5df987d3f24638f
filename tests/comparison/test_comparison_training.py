"""What of a comparison is trained when it goes on, and with what it may not."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from densely.comparison import training
from densely.comparison.config import CompareConfig
from densely.comparison.training import change_folder, create_folder, train_all
from densely.errors import ConfigError, DataError
from densely.training.config import TrainConfig
from densely.training.loop import train
from densely.training.reporting import Reporter
from densely.training.run import RunDirectory

VARIANTS: dict[str, dict[str, Any]] = {"a": {}, "b": {"lr": 0.05}}


def config(**fields: Any) -> CompareConfig:
    train = TrainConfig(device="cpu", precision="float32", epochs=1, batch_size=4, **fields)
    return CompareConfig(name="c", train=train, variants=VARIANTS, seeds=1)


def begin_run(folder: Path, name: str, *, is_saved: bool, precision: str = "float32") -> Path:
    """A run of which no more is there than that it was begun, and perhaps saved."""
    run = RunDirectory(folder / "runs" / name)
    run.last.mkdir(parents=True)
    run.write_config(TrainConfig())
    (run.path / "env.json").write_text(json.dumps({"precision": precision}))
    if is_saved:
        (run.last / "state.json").write_text("{}")
    return run.path


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """What each training goes on with; nothing is trained."""
    found: list[Path | None] = []

    def note(config: TrainConfig, *, resume: Path | None, reporter: object) -> SimpleNamespace:
        found.append(resume)
        return SimpleNamespace(run=resume or Path("new"))

    monkeypatch.setattr(training, "train", note)
    return found


def test_the_latest_run_goes_on_where_it_was_saved(
    tmp_path: Path, resumed: list[Path | None]
) -> None:
    begin_run(tmp_path, "a-seed0-001", is_saved=True)
    latest = begin_run(tmp_path, "a-seed0-002", is_saved=True)
    begin_run(tmp_path, "b-seed0-001", is_saved=False)
    runs = train_all(tmp_path, config(), lambda _: Reporter())
    assert resumed == [latest, None]
    assert runs == {"a": [latest], "b": [Path("new")]}


def test_what_is_left_is_not_trained_in_another_precision(
    tmp_path: Path, resumed: list[Path | None]
) -> None:
    finished = begin_run(tmp_path, "a-seed0-001", is_saved=True, precision="bfloat16")
    RunDirectory(finished).card_file.write_text("")
    with pytest.raises(ConfigError, match=r"trained in bfloat16, .* would go on in float32"):
        train_all(tmp_path, config(), lambda _: Reporter())
    other = begin_run(tmp_path, "b-seed0-001", is_saved=True)
    RunDirectory(other).card_file.write_text("")
    runs = train_all(tmp_path, config(), lambda _: Reporter())  # is left to be judged alone
    assert (runs, resumed) == ({"a": [finished], "b": [other]}, [])


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_comparison_goes_on_with_the_images_that_its_runs_began_with(
    part: str, tmp_path: Path
) -> None:
    for top in ("before", "now"):
        for each in ("train", "test"):
            for name, shade in (("dark", 30), ("light", 100)):
                folder = tmp_path / top / each / name
                folder.mkdir(parents=True)
                for i in range(4):
                    other = top == "now" and each == part
                    Image.new("L", (8, 8), shade + i + 50 * other).save(folder / f"{i}.png")
    comparison = config(data=str(tmp_path / "before"), validation=0.0)
    folder = create_folder(comparison, tmp_path)
    train(TrainConfig(**vars(comparison.config("a", 0)) | {"output": str(folder / "runs")}))
    written = (folder / "config.yaml").read_bytes()
    images = {"train": "training images", "test": "validation or test images"}[part]
    with pytest.raises(DataError, match=f"other {images} than .*now gives"):
        change_folder(folder, config(data=str(tmp_path / "now"), validation=0.0))
    assert (folder / "config.yaml").read_bytes() == written

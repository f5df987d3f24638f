"""Run directories: numbered, never overwritten, damage named."""

import dataclasses
from pathlib import Path

import pytest

from densely.errors import RunError
from densely.runtime import choose_runtime
from densely.training.config import TrainConfig
from densely.training.run import EpochMetrics, RunDirectory

ROW = EpochMetrics(1, 0.1, 1.5, 0.25, None, None, 2.0, 0.125, 100.0, 3.0)


def create(output: Path, **values: object) -> RunDirectory:
    config = TrainConfig.from_values({"output": str(output), **values})
    return RunDirectory.create(config, choose_runtime("cpu"))


def test_numbers_go_up_and_gaps_are_not_filled(tmp_path: Path) -> None:
    (tmp_path / "quickstart-007").mkdir(parents=True)
    (tmp_path / "quickstart-x").mkdir()
    assert create(tmp_path).path.name == "quickstart-008"
    assert create(tmp_path).path.name == "quickstart-009"
    assert create(tmp_path, name="mine").path.name == "mine-001"


def test_an_output_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"--output .*file"):
        create(tmp_path / "file" / "runs")


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    run = create(tmp_path)
    assert run.rows() == []
    run.append(ROW)
    assert run.rows() == [ROW]


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    run = create(tmp_path)
    run.append(ROW)
    run.metrics_file.write_text(run.metrics_file.read_text().replace("1.5", "x"))
    with pytest.raises(RunError, match=r"metrics\.csv"):
        run.rows()


def test_the_last_row_is_replaced(tmp_path: Path) -> None:
    run, second = create(tmp_path), dataclasses.replace(ROW, epoch=2, test_loss=None)
    for row in (ROW, second):
        run.append(row)
    judged = dataclasses.replace(second, test_loss=1.0)
    run.replace_last(judged)
    assert run.rows() == [ROW, judged]


@pytest.mark.parametrize("late", ["augment", "evaluate_every", "options"])
def test_a_config_of_before_a_field_was_there_has_its_default(tmp_path: Path, late: str) -> None:
    run = create(tmp_path)
    path = run.path / "config.yaml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith(late)))
    assert late not in path.read_text()
    assert getattr(run.config(), late) == getattr(TrainConfig(), late)


@pytest.mark.parametrize("kept", [0, 1])
def test_missing_rows_are_named(tmp_path: Path, kept: int) -> None:
    run = create(tmp_path)
    for _ in range(kept):
        run.append(ROW)
    with pytest.raises(RunError, match=r"metrics\.csv: damaged: it lacks rows"):
        run.keep_rows(2)


def test_an_empty_file_of_metrics_gets_its_header(tmp_path: Path) -> None:
    run = create(tmp_path)
    run.metrics_file.touch()
    run.append(ROW)
    assert run.rows() == [ROW]


def test_two_processes_cannot_train_one_run(tmp_path: Path) -> None:
    run, other = create(tmp_path), RunDirectory(tmp_path / "quickstart-001")
    run.lock()
    with pytest.raises(RunError, match="another process is training this run"):
        other.lock()
    run.unlock()
    other.lock()
    other.unlock()


@pytest.mark.parametrize("content", ["", "recipe: d2l\n"])
def test_a_config_that_lacks_fields_is_named(tmp_path: Path, content: str) -> None:
    run = create(tmp_path)
    (run.path / "config.yaml").write_text(content)
    with pytest.raises(RunError, match=r"config\.yaml: damaged: .*epochs"):
        run.config()


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run directory"):
        RunDirectory.open(tmp_path)


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    run = create(tmp_path)
    (run.path / "config.yaml").write_text("epochs: -3\n")
    with pytest.raises(RunError, match=r"config\.yaml: epochs=-3"):
        run.config()
    (run.path / "config.yaml").write_text("[1]\n")
    with pytest.raises(RunError) as caught:
        run.config()
    assert str(caught.value).count("config.yaml") == 1

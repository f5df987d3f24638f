"""What is said of runs that are compared: copies of one, of which it is said that they differ."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from densely.comparison import compare as comparing
from densely.comparison.compare import compare
from densely.evaluation.judged import Judged
from densely.training.run import RunDirectory

pytestmark = pytest.mark.usefixtures("hasty_costs")


@pytest.fixture
def copied(digits_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the run and says that it was trained otherwise."""

    def copy(name: str, **fields: Any) -> Path:
        run = RunDirectory(shutil.copytree(digits_run, tmp_path / name))
        run.write_config(dataclasses.replace(run.config(), **fields))
        return run.path

    return copy


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Judged], Judged]], None]:
    """Has what runs are judged to be changed by a function."""
    judge = comparing.judge

    def change_by(changed: Callable[[Judged], Judged]) -> None:
        monkeypatch.setattr(comparing, "judge", lambda *args, **how: changed(judge(*args, **how)))

    return change_by


def test_what_runs_do_not_share_is_not_told_as_shared(
    digits_run: Path, copied: Callable[..., Path]
) -> None:
    shared = compare([digits_run, copied("other", lr=0.05)]).schedule
    assert shared == {"data": "digits", "epochs": 2, "batch_size": 64, "schedule": "cosine"}


def test_intervals_over_two_runs_stay_between_0_and_1(
    digits_run: Path,
    copied: Callable[..., Path],
    change: Callable[[Callable[[Judged], Judged]], None],
) -> None:
    hits = {digits_run: 350, copied("high", seed=1): 360}
    hits |= {copied("low-0", lr=0.05): 0, copied("low-1", lr=0.05, seed=1): 10}

    def right_on_the_first(judged: Judged) -> Judged:
        wrong = torch.arange(len(judged.labels)) >= hits[judged.run.path]
        given = (judged.labels + wrong) % 10
        return dataclasses.replace(judged, logits=torch.eye(10)[given])

    change(right_on_the_first)
    high, low = (group.accuracy for group in compare(list(hits)).groups)
    reach = pytest.approx(12.7062 / 72, rel=1e-4)  # Student's with one degree of freedom
    assert (high.value, high.high) == (pytest.approx(71 / 72), 1)
    assert high.value - high.low == reach
    assert (low.value, low.low) == (pytest.approx(1 / 72), 0)
    assert low.high - low.value == reach


def test_that_one_of_the_runs_learned_from_the_images_is_told(
    digits_run: Path,
    copied: Callable[..., Path],
    change: Callable[[Callable[[Judged], Judged]], None],
) -> None:
    other = copied("other", lr=0.05)

    def other_on_others(judged: Judged) -> Judged:
        return dataclasses.replace(judged, own=None) if judged.run.path == other else judged

    change(other_on_others)
    assert compare([other, digits_run], split="train").split == "train"

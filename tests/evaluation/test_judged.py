"""Which images a network is judged and calibrated on."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from densely.data import ImageSet, Splits, load_data
from densely.evaluation.judged import fitting_images, judge
from densely.training.run import RunDirectory


def images(*labels: int) -> ImageSet:
    pixels = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    return ImageSet(pixels, torch.tensor(labels), ("a", "b"))


@pytest.mark.parametrize(
    ("train", "validation", "name", "number", "has_learned"),
    [
        (images(0, 1), images(0, 1, 1), "validation split", 3, False),
        (images(*[0, 1] * 15), None, "part of the training split", 3, True),
        (images(0, 1), None, "training split", 2, True),  # too few to part
    ],
)
def test_what_a_calibration_is_fitted_on_is_named_and_whether_it_was_learned_from(
    train: ImageSet, validation: ImageSet | None, name: str, number: int, has_learned: bool
) -> None:
    splits = Splits("mine", train, images(0, 1), validation)
    where, chosen, learned = fitting_images(splits, 0)
    assert (where, len(chosen), learned) == (name, number, has_learned)


def test_other_data_are_parted_as_the_runs_own(digits_run: Path, tmp_path: Path) -> None:
    run = RunDirectory(shutil.copytree(digits_run, tmp_path / "run"))
    run.write_config(dataclasses.replace(run.config(), data="my-digits", split_seed=1))
    found = judge(run.path, "digits")
    assert found.own is None
    assert torch.equal(found.images.images.cpu(), load_data("digits", split_seed=1).test.images)

"""`densely.load(RUN).predict(...)`: pictures of any kind, named by class and probability."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import densely
from densely.data import load_data
from densely.errors import ConfigError, DataError, RunError
from densely.evaluation.calibration import Calibration
from densely.training.scoring import score


@pytest.fixture(scope="module")
def classifier(digits_run: Path) -> densely.Classifier:
    return densely.load(digits_run)


def test_files_are_named_rightly(
    classifier: densely.Classifier, digit_files: list[tuple[Path, str]]
) -> None:
    predictions = classifier.predict([path for path, _ in digit_files])
    right = sum(p.label == label for p, (_, label) in zip(predictions, digit_files, strict=True))
    assert right >= 17  # of 20, after two epochs


def test_files_get_the_probabilities_of_the_test_split(classifier: densely.Classifier) -> None:
    test = load_data("digits").test
    pictures = [Image.fromarray(image[0].numpy()) for image in test.images]
    predictions = classifier.predict(pictures)
    whole = classifier.probabilities(test.images)
    for prediction, row in zip(predictions, whole, strict=True):
        assert prediction.probability == pytest.approx(row.max().item(), rel=1e-6)
        assert prediction.label == test.classes[int(row.argmax())]
    assert score(whole.log(), test.labels).accuracy > 0.8


def test_probabilities_are_ranked_and_sum_to_one(
    classifier: densely.Classifier, digit_files: list[tuple[Path, str]]
) -> None:
    (prediction,) = classifier.predict(digit_files[0][0])
    values = list(prediction.probabilities.values())
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1)
    assert prediction.probability == values[0]
    assert set(prediction.probabilities) == set(classifier.classes)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_any_mode_and_size_is_taken(
    classifier: densely.Classifier, tmp_path: Path, mode: str
) -> None:
    path = tmp_path / "picture.png"
    if mode == "I;16":
        Image.fromarray(np.full((31, 57), 60_000, np.uint16)).save(path)
    else:
        Image.new("RGB", (57, 31), (200, 100, 50)).convert(mode).save(path)
    assert len(classifier.predict([path, str(path)])) == 2


def test_an_enlarged_picture_keeps_its_class(
    classifier: densely.Classifier, digit_files: list[tuple[Path, str]], tmp_path: Path
) -> None:
    path, _ = digit_files[0]
    with Image.open(path) as image:
        image.resize((80, 80), Image.Resampling.NEAREST).convert("RGB").save(tmp_path / "big.jpg")
    small, big = classifier.predict([path, tmp_path / "big.jpg"])
    assert small.label == big.label


def test_nothing_in_nothing_out(classifier: densely.Classifier) -> None:
    assert classifier.predict([]) == []


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_an_unreadable_file_is_named(
    classifier: densely.Classifier, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.png"):
        classifier.predict([path])


def test_something_else_than_an_image_is_refused(classifier: densely.Classifier) -> None:
    with pytest.raises(DataError, match="int: expected a path"):
        classifier.predict([3])  # type: ignore[list-item]
    with pytest.raises(DataError, match="int: expected paths"):
        classifier.predict(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(classifier: densely.Classifier, mode: str) -> None:
    with pytest.raises(DataError, match=f"mode '{mode}' has no known range"):
        classifier.predict(Image.new(mode, (8, 8)))


def test_a_pipe_is_not_waited_for(classifier: densely.Classifier, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"no image file .*pipe\.png"):
        classifier.predict(tmp_path / "pipe.png")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run directory"):
        densely.load(tmp_path)


def test_a_device_that_is_not_here_is_refused(digits_run: Path) -> None:
    with pytest.raises(ConfigError, match="device 'nowhere' is not here"):
        densely.load(digits_run, device="nowhere")


def test_precisions_agree(digits_run: Path) -> None:
    images = load_data("digits").test.images
    exact = densely.load(digits_run, precision="float32").probabilities(images)
    rough = densely.load(digits_run, precision="bfloat16").probabilities(images)
    assert (exact - rough).abs().max() < 0.1
    assert torch.allclose(exact.sum(dim=1), torch.ones(len(images)))


def test_a_network_that_has_diverged_names_nothing(digits_run: Path) -> None:
    classifier = densely.load(digits_run)
    torch.nn.init.constant_(next(classifier.model.parameters()), torch.nan)
    with pytest.raises(RunError, match="NaN or infinity"):
        classifier.predict(Image.new("L", (8, 8)))


def test_a_threshold_near_1_is_held_in_float64(digits_run: Path) -> None:
    """In float32 all these probabilities are 1, and all would be sure."""
    classifier = densely.load(digits_run)
    last = classifier.model.classifier
    torch.nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([20.0, *[0.0] * 9]))
    images = [Image.new("L", (8, 8))]
    (found,) = classifier.predict(images)
    assert 1 - 1e-7 < found.probability < 1
    for threshold in (found.probability, math.nextafter(found.probability, 1)):
        classifier.calibration = Calibration(
            "none", (1.0,) * 10, (0.0,) * 10, "", 0, 0.05, threshold
        )
        assert classifier.predict(images)[0].sure is (threshold == found.probability)


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 1, 8, 8)]
)
def test_images_of_another_kind_are_refused(digits_run: Path, images: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"expected uint8 \[images, 1, height, width\]"):
        densely.load(digits_run).probabilities(images)

"""A run that starts from weights: the right stem, scale and head, and the same on resuming."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from densely import TrainConfig, load, train
from densely.data import ImageSet
from densely.data.preprocessing import Preprocessing
from densely.errors import ConfigError, DenselyError, WeightsError
from densely.models import build_model
from densely.training.checkpoint import ModelInfo
from densely.training.start import begin, check_start
from densely.weights import PRETRAINED, Pretrained, pretrained, save_weights


def config(**values: Any) -> TrainConfig:
    return TrainConfig.from_values({"epochs": 1, "limit": 100, **values})


def images(channels: int = 1, size: int = 40) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (6, channels, size, size), dtype=torch.uint8, generator=generator
    )
    return ImageSet(pixels, torch.arange(6) % 2, ("cat", "dog"))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretrained:
    """A densenet121 of the test's own, where the published file would be."""
    entry = dataclasses.replace(PRETRAINED[0], tag="mine", url="https://x/mine.pth", sha256=None)
    monkeypatch.setattr(pretrained, "PRETRAINED", (*PRETRAINED, entry))
    monkeypatch.setenv("DENSELY_DATA", str(tmp_path))
    (tmp_path / "weights").mkdir()
    torch.manual_seed(1)
    save_weights(build_model("densenet121"), tmp_path / "weights" / "mine.pth")
    return entry


def test_published_weights_bring_their_stem_and_scale(published: Pretrained) -> None:
    info, model, report = begin(config(model="densenet121", weights="mine"), images())
    assert report is not None
    assert report.skipped == ("classifier.weight", "classifier.bias")
    assert report.notes == ("stem adapted from 3 to 1 channels",)
    assert info.options == {"stem": "large"}
    scale = Preprocessing(40, 1, (0.449,), (0.226,))
    assert info.preprocessing.mean == pytest.approx(scale.mean)
    assert info.preprocessing.std == pytest.approx(scale.std)
    assert info.preprocessing.crop is None
    state: Any = model.state_dict()
    assert state["classifier.weight"].shape == (2, 1024)
    assert state["features.conv0.weight"].shape == (64, 1, 7, 7)
    again = ModelInfo(info.model, info.classes, info.preprocessing, info.options).build()
    again.load_state_dict(state)


def test_images_are_fitted_as_folders_are_read_whatever_the_weights_were_trained_on(
    published: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    prep = dataclasses.replace(published.preprocessing, interpolation="bicubic")
    cubic = dataclasses.replace(published, preprocessing=prep)
    monkeypatch.setattr(pretrained, "PRETRAINED", (*PRETRAINED, cubic))
    info, *_ = begin(config(model="densenet121", weights="mine"), images(3))
    assert (info.preprocessing.interpolation, info.preprocessing.crop) == ("bilinear", None)


def test_pixels_as_they_are_stay_so(published: Pretrained) -> None:
    info, *_ = begin(config(model="densenet121", weights="mine", normalize=False), images(3))
    assert info.preprocessing == Preprocessing.identity(40, 3)


def test_a_run_from_a_file_resumes_and_predicts(
    tmp_path: Path, digit_files: list[tuple[Path, str]]
) -> None:
    torch.manual_seed(2)
    file = tmp_path / "start.safetensors"
    save_weights(build_model("densenet_bc_22_12", norm_eps=1.001e-5), file)
    chosen = config(
        weights=str(file), lr=1e-12, output=str(tmp_path / "runs"), validation=0.0, momentum=0.0,
        weight_decay=0.0,
    )  # fmt: skip
    run = train(chosen).run
    trained: Any = load(run).model
    assert trained.features.norm5.eps == 1.001e-5
    kernel = trained.state_dict()["features.conv0.weight"]
    torch.manual_seed(2)
    made: Any = build_model("densenet_bc_22_12")
    summed = made.features.conv0.weight.sum(dim=1, keepdim=True)
    torch.testing.assert_close(kernel, summed)  # three channels for one, hardly trained
    file.unlink()  # not needed any more
    longer = dataclasses.replace(chosen, epochs=2)
    assert train(longer, resume=run).epochs == 2
    assert len(load(run).predict([path for path, _ in digit_files[:3]])) == 3


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model": "densenet121", "weights": "imagnet"}, "did you mean imagenet"),
        ({"weights": "imagenet"}, "has no published weights"),
        ({"weights": "none.pth"}, "no such file"),
        ({"model": "fc_densenet56"}, "is made for segmentation"),
        ({"model": "densenet_121"}, "did you mean densenet121"),
    ],
)
def test_mistakes_are_told_before_data_are_read(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_start(config(**values))
    with pytest.raises(DenselyError, match=told):
        train(config(**values, data="/no/such/folder"))


def test_weights_of_another_network(tmp_path: Path) -> None:
    save_weights(build_model("densenet_bc_22_12", growth_rate=6), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="growth_rate=6"):
        train(config(weights=str(tmp_path / "x.pth"), output=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_what_the_network_lacks_is_told_as_flags_that_mend_it(tmp_path: Path) -> None:
    file = str(tmp_path / "x.pth")
    save_weights(build_model("densenet_bc_22_12", in_channels=1), file)
    other = {"bias": True, "stem": "large"}
    with pytest.raises(WeightsError) as caught:
        begin(config(weights=file, model="densenet_bc_22_12", options=other), images())
    flags = str(caught.value).splitlines()[-1].removeprefix("  here: ").split()
    options = dict(zip(flags[::2], flags[1::2], strict=True))
    assert options == {"--options.bias": "False", "--options.stem": "small"}
    mended = {"bias": False, "stem": "small"}
    begin(config(weights=file, model="densenet_bc_22_12", options=mended), images())

"""From one package to another by one command, held against the packages themselves."""

import json
from pathlib import Path
from typing import Any

import packages_nets as foreign
import peers
import pytest
import torch

from densely.cli import main
from densely.errors import WeightsError
from densely.models import DenseNet, build_model
from densely.weights import convert_weights, load_weights, save_weights

# Keras's own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def small(**options: Any) -> DenseNet:
    chosen = {
        "growth_rate": 4,
        "block_config": (1, 2),
        "num_init_features": 8,
        "num_classes": 6,
        **options,
    }
    return foreign.randomised(DenseNet(**chosen)).float()  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("to", "ending", "package"),
    [
        ("densely", ".safetensors", peers.torchvision),
        ("torchvision", ".pth", peers.torchvision),
        ("timm", ".safetensors", peers.timm),
        ("monai", ".pt", peers.monai_networks),
    ],
)
def test_checked_by_the_package_itself(to: str, ending: str, package: Any, tmp_path: Path) -> None:
    package()
    save_weights(small(), tmp_path / "x.pth", "torchvision_legacy")
    done = convert_weights(tmp_path / "x.pth", tmp_path / f"y{ending}", to=to, check=True)
    assert done.dialect == "torchvision_legacy"
    assert done.notes == ()
    itself = "torchvision" if to == "densely" else to
    assert done.differences.keys() == {"densely reading it back", f"{itself} itself"}
    for difference in done.differences.values():
        assert difference is not None
        assert difference <= 1e-12 * max(1.0, done.scale)


def test_to_keras_and_back(tmp_path: Path) -> None:
    peers.keras()
    model = foreign.randomised(build_model("densenet121", num_classes=4)).float()
    save_weights(model, tmp_path / "x.safetensors")
    done = convert_weights(
        tmp_path / "x.safetensors", tmp_path / "y.weights.h5", to="keras", check=True
    )
    assert done.network == "densenet121"
    assert done.notes == (
        "norms of keras add 1.001e-05 to the variance, those of the source 1e-05",
    )
    difference = done.differences["keras itself"]
    assert difference is not None
    assert difference < 1e-4 * done.scale
    convert_weights(tmp_path / "y.weights.h5", tmp_path / "z.safetensors", to="monai")
    kept = convert_weights(tmp_path / "z.safetensors", tmp_path / "back.safetensors")
    assert kept.notes == ()  # densely's own files keep the epsilon
    back = build_model("densenet121", num_classes=4)
    report = load_weights(back, tmp_path / "back.safetensors")
    assert "epsilon of the norms set to the source's, 1.001e-05" in report.notes
    returned = back.state_dict()
    for key, value in model.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(returned[key], value)


@pytest.mark.parametrize(
    ("to", "options", "reason"),
    [
        ("torchvision", {"in_channels": 1}, "takes 3 channels only"),
        ("timm", {"num_init_features": 10}, "twice the growth rate"),
        ("monai", {"bias": True}, "no such network"),
        ("efficient", {}, "not installed"),
        ("torchvision", {"spatial_dims": 3}, "3-dimensional"),
        ("monai", {"stem": "deep"}, "no deep stem"),
    ],
)
def test_what_a_package_cannot_check_is_said(
    to: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    save_weights(small(**options), tmp_path / "x.pth")
    done = convert_weights(tmp_path / "x.pth", tmp_path / "y.pth", to=to, check=True)
    (told,) = [name for name, difference in done.differences.items() if difference is None]
    assert reason in told
    assert done.differences["densely reading it back"] == 0


def test_incomplete_weights_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    state = small().state_dict()
    for spoil in (
        lambda s: s.pop("features.norm5.bias"),
        lambda s: s.update({"features.norm5.bias": torch.zeros(2)}),
        lambda s: s.update({"decoder.weight": torch.zeros(2)}),
        lambda s: s.pop("features.denseblock1.denselayer1.conv1.weight"),
        lambda s: s.update({"classifier.bias": torch.zeros(6, dtype=torch.int64)}),
    ):
        spoilt = dict(state)
        spoil(spoilt)
        torch.save(spoilt, tmp_path / "x.pth")
        with pytest.raises(WeightsError):
            convert_weights(tmp_path / "x.pth", tmp_path / "y.pth")
        assert not (tmp_path / "y.pth").exists()


def test_the_source_is_never_overwritten(tmp_path: Path) -> None:
    save_weights(small(), tmp_path / "x.pth")
    before = (tmp_path / "x.pth").read_bytes()
    with pytest.raises(WeightsError, match="same file"):
        convert_weights(tmp_path / "x.pth", tmp_path / "x.pth", to="monai")
    assert (tmp_path / "x.pth").read_bytes() == before


def test_another_function_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(small(), tmp_path / "x.pth")

    def wrong(*arguments: object) -> torch.Tensor:
        return torch.full((2, 6), torch.nan)

    monkeypatch.setattr("densely.weights.convert.package_logits", wrong)
    (tmp_path / "y.pth").write_text("older")
    with pytest.raises(WeightsError, match="was not written, as it would be another function"):
        convert_weights(tmp_path / "x.pth", tmp_path / "y.pth", check=True)
    assert (tmp_path / "y.pth").read_text() == "older"


def test_a_network_that_has_diverged_cannot_be_checked(tmp_path: Path) -> None:
    model = small()
    torch.nn.init.constant_(model.classifier.bias, torch.nan)
    save_weights(model, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"x\.pth: its network gives NaN or infinity"):
        convert_weights(tmp_path / "x.pth", tmp_path / "y.pth", check=True)


@pytest.mark.parametrize("compression", [0.3, 0.45, 0.5, 0.8, 0.9, 1.0, 1 / 3])
@pytest.mark.parametrize("blocks", [(2, 1, 3, 2), (3, 3)])
def test_any_compression_is_read_off(
    compression: float, blocks: tuple[int, ...], tmp_path: Path
) -> None:
    model = small(compression=compression, block_config=blocks, growth_rate=7)
    save_weights(model, tmp_path / "x.pth")
    done = convert_weights(tmp_path / "x.pth", tmp_path / "y.pth", check=True)
    assert done.differences["densely reading it back"] == 0


def test_shapes_of_a_giant_take_no_memory(tmp_path: Path) -> None:
    """A file of a few bytes may claim a network of terabytes."""
    state = {key: value.clone() for key, value in small().state_dict().items()}
    one = torch.zeros(1)
    state["features.conv0.weight"] = one.expand(1 << 20, 3, 1 << 10, 1 << 10)
    state["features.denseblock1.denselayer1.conv1.weight"] = one.expand(1 << 20, 1 << 20, 1, 1)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(WeightsError):
        convert_weights(tmp_path / "x.pth", tmp_path / "y.pth")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers.monai_networks()
    source, target = str(tmp_path / "x.tar"), str(tmp_path / "y.safetensors")
    torch.save({"state_dict": small().state_dict(), "epoch": 3}, source)
    assert main(["convert", source, target, "--to", "monai", "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("growth rate 4, blocks (1, 2), 55 tensors, torchvision names")
    assert lines[1] == "left out: epoch (int)"
    assert [line.partition(":")[0] for line in lines[2:4]] == [
        "largest difference of logits, densely reading it back",
        "largest difference of logits, monai itself",
    ]
    assert lines[4] == f"written: {target}, monai names"

    assert main(["convert", target, source, "--to", "timm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dialect"] == "monai"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["x.pth", "y.pth", "--to", "montai"], "did you mean monai"),
        (["none.pth", "y.pth"], "none.pth: cannot be read: No such file"),
        (["x.pth", "y.xyz"], "expected .safetensors"),
        (["x.pth", "y.pth", "--prefix", "encoder."], "below 'encoder.'"),
        (["x.pth", "y.pth", "--from", "keras"], "no weights of a DenseNet"),
        (["x.pth"], "required: target"),
    ],
)
def test_mistakes_at_the_command(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_weights(small(), "x.pth")
    assert main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
    assert not Path("y.pth").exists()

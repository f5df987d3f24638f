"""All or nothing, every misfit named with its nearest explanation, nothing skipped in silence."""

import copy
from pathlib import Path
from typing import Any

import packages_nets as foreign
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import densely
from densely.errors import ConfigError, WeightsError
from densely.models import DenseNet, build_model
from densely.models.densenet import norm_eps, set_norm_eps
from densely.weights import load_weights, save_weights


def net(**options: Any) -> DenseNet:
    return DenseNet(
        **{
            "growth_rate": 4,
            "block_config": (2, 2),
            "num_init_features": 8,
            "num_classes": 14,
            **options,
        }
    )


def source(**options: Any) -> dict[str, Tensor]:
    return foreign.randomised(net(**options)).float().state_dict()


def refused(model: nn.Module, weights: Any, **options: Any) -> str:
    """The message with which weights are refused, the model being as it was."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WeightsError) as error:
        load_weights(model, weights, **options)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    return str(error.value)


@pytest.mark.parametrize(
    ("file", "model", "hint"),
    [
        ({}, {"num_classes": 10}, "14-class head: pass num_classes=14 or head='skip'"),
        ({}, {"num_classes": 0}, "14-class head: pass head='skip'"),
        ({"num_classes": 0}, {}, "no head: pass num_classes=0 or head='skip'"),
        ({}, {"in_channels": 1}, "takes 3 channels, the model's 1: pass in_channels=3 or stem="),
        ({}, {"stem": "small"}, "has the large stem: pass stem='large'"),
        ({"stem": "deep"}, {}, "has the deep stem: pass stem='deep'"),
        ({"bias": True}, {}, "biases: pass bias=True"),
        ({"spatial_dims": 3}, {}, "3-dimensional weights: pass spatial_dims=3"),
        ({"block_config": (3, 2)}, {}, "growth_rate=4, block_config=(3, 2)"),
        ({"bn_size": None}, {}, "bn_size=None"),
        ({"compression": 1.0}, {}, "compression=1"),
    ],
)
def test_the_nearest_explanation(file: dict[str, Any], model: dict[str, Any], hint: str) -> None:
    assert hint in refused(net(**model), source(**file))


def test_a_published_network_is_named() -> None:
    with torch.device("meta"):
        weights = build_model("densenet121").state_dict()
        model = build_model("densenet169")
    with pytest.raises(WeightsError, match="this is a densenet121"):
        load_weights(model, weights)


def test_every_misfit_is_named() -> None:
    weights = source()
    del weights["features.norm5.bias"]
    weights["classifier.scale"] = torch.zeros(3)
    weights["features.conv0.weight"] = torch.zeros(8, 3, 7)
    weights["features.norm5.weight"] = weights["features.norm5.weight"].to(torch.int8)
    message = refused(net(), weights)
    assert "1 keys missing, 1 unexpected, 2 of another shape or type" in message
    assert "missing: features.norm5.bias" in message
    assert "unexpected: classifier.scale" in message
    assert "features.conv0.weight is [8, 3, 7] float32, expected [8, 3, 7, 7] float32" in message
    assert "features.norm5.weight is [16] int8, expected [16] float32" in message


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.to(torch.complex64),
        lambda t: t.to(torch.bool),
        lambda t: t.to(torch.int64),
        lambda t: t.to("meta"),
        lambda t: t.to_sparse(),
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        lambda t: t[:1].expand(t.shape[0] + 1, *t.shape[1:]),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of quantized tensors, soon to go
def test_what_is_no_plain_tensor_of_numbers_is_refused(spoil: Any) -> None:
    weights = source()
    key = "features.denseblock2.denselayer2.conv2.weight"  # late: an early one would be loaded
    weights[key] = spoil(weights[key])
    assert key in refused(net(), weights)


def test_other_precisions_are_cast_and_said() -> None:
    weights = {k: v.half() if v.is_floating_point() else v for k, v in source().items()}
    model = net()
    report = load_weights(model, weights)
    assert any("cast from float16 to float32" in note for note in report.notes)
    assert torch.equal(model.classifier.weight, weights["classifier.weight"].float())


def test_a_model_cast_to_half_as_a_whole_keeps_its_numbers_of_batches() -> None:
    model, weights = net(), source()
    whole = {key: value.half() for key, value in weights.items()}
    report = load_weights(model, whole)
    assert any("cast from float16 to int64" in note for note in report.notes)
    for key, value in model.state_dict().items():
        assert torch.equal(value, whole[key].to(value.dtype)), key
    key = next(key for key in whole if key.endswith("num_batches_tracked"))
    for wrong in (0.5, float("inf"), float("nan")):
        whole[key] = torch.tensor(wrong).half()
        assert key in refused(model, whole)


def test_weights_that_are_no_numbers_are_told() -> None:
    weights = source()
    weights["features.conv0.weight"][0] = torch.nan
    (note,) = (note for note in load_weights(net(), weights).notes if "NaN" in note)
    assert note.startswith("1 tensors hold NaN or infinity")


def test_head_can_be_skipped_and_is_named() -> None:
    model = net(num_classes=10)
    head = model.classifier.weight.detach().clone()
    report = load_weights(model, source(), head="skip")
    assert sorted(report.skipped) == ["classifier.bias", "classifier.weight"]
    assert "classifier.weight" in str(report)
    assert torch.equal(model.classifier.weight, head)
    assert torch.equal(model.features.conv0.weight, source()["features.conv0.weight"])


def test_head_auto_takes_it_where_it_fits() -> None:
    assert load_weights(net(), source(), head="auto").skipped == ()
    assert len(load_weights(net(num_classes=3), source(), head="auto").skipped) == 2
    assert load_weights(net(num_classes=0), source(num_classes=0), head="auto").skipped == ()


def test_stem_can_be_adapted_and_is_named() -> None:
    model = net(in_channels=1)
    report = load_weights(model, source(), stem="adapt")
    assert report.notes == ("stem adapted from 3 to 1 channels",)
    expected = source()["features.conv0.weight"].sum(dim=1, keepdim=True)
    torch.testing.assert_close(model.features.conv0.weight, expected)
    assert load_weights(net(), source(), stem="adapt").notes == ()


def test_weights_inside_a_larger_model_need_the_prefix() -> None:
    inside = {f"encoder.{key}": value for key, value in source().items()}
    larger = {**inside, "decoder.weight": torch.zeros(2), "step": torch.tensor(3)}
    assert "unexpected: decoder.weight, step" in refused(net(), larger)
    report = load_weights(net(), larger, prefix="encoder.")
    assert report.ignored == ("decoder.weight", "step")
    assert "below 'encoder.'" in str(report)
    assert "below 'other.'" in refused(net(), larger, prefix="other.")


def test_two_networks_in_one_file_are_not_chosen_from() -> None:
    both = {f"{who}.{key}": value for who in ("model", "ema") for key, value in source().items()}
    message = refused(net(), both)
    assert "'ema.'" in message
    assert "'model.'" in message
    load_weights(net(), both, prefix="ema.")


def test_chexnets_wrapper_and_head() -> None:
    weights = {
        "module.densenet121." + key.replace("classifier", "classifier.0"): value
        for key, value in source().items()
        if not key.endswith("num_batches_tracked")
    }
    model = net()
    report = load_weights(model, weights)
    assert report.prefix == "module.densenet121."
    assert report.notes == ("11 numbers of batches seen are not in the source: set to 0",)
    assert torch.equal(model.classifier.weight, source()["classifier.weight"])


def test_old_names() -> None:
    """Before 2018 `norm.1` stood for `norm1`: the longest-running complaint."""
    old = {}
    for key, value in source().items():
        for part in ("norm1", "conv1", "norm2", "conv2"):
            key = key.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.")
        old[key] = value
    assert "features.denseblock1.denselayer2.norm.1.weight" in old
    model = net()
    assert load_weights(model, old).dialect == "torchvision_legacy"
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source().items())


def test_thresholds_of_torchxrayvision_are_named_not_loaded() -> None:
    report = load_weights(net(), {**source(), "op_threshs": torch.zeros(18)})
    assert report.ignored == ("op_threshs",)


@pytest.mark.parametrize("weights", [{}, {"a": torch.zeros(2)}, {"conv1.weight": torch.zeros(1)}])
def test_what_is_no_densenet_is_said_so(weights: dict[str, Tensor]) -> None:
    refused(net(), weights)


@pytest.mark.parametrize("weights", [3, None, {"a": 1}, {1: {2: 3}}, [torch.zeros(1)]])
def test_what_is_no_source_is_refused(weights: Any) -> None:
    refused(net(), weights)


def test_wrong_arguments() -> None:
    for wrong in ({"head": "drop"}, {"stem": "auto"}, {"dialect": "torchvison"}):
        with pytest.raises(ConfigError) as error:
            load_weights(net(), source(), **wrong)  # type: ignore[arg-type]
        assert next(iter(wrong)) in str(error.value)
    with pytest.raises(ConfigError, match="torchvision"):
        load_weights(net(), source(), "torchvison")


def test_a_dialect_given_by_name_is_the_only_one_tried() -> None:
    assert "no weights of a DenseNet" in refused(net(), source(), dialect="keras")
    assert load_weights(net(), source(), "timm").dialect == "torchvision"


def test_into_the_models_of_other_packages() -> None:
    for make in (foreign.torchvision, lambda: foreign.monai(2)):
        theirs = make()
        model = DenseNet(
            growth_rate=8, block_config=foreign.CONFIG, num_init_features=16, num_classes=5
        )
        weights = foreign.randomised(model, seed=3).state_dict()
        load_weights(theirs, weights)
        with torch.no_grad():
            y, expected = theirs.eval()(foreign.images()), model.eval()(foreign.images())
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        densely.accelerate(theirs)
        load_weights(theirs, weights)


HEADS = ["fc", "head.fc", "classifier.1", "output"]


@pytest.mark.parametrize("name", HEADS)
def test_a_single_linear_layer_is_the_head_whatever_its_name(name: str) -> None:
    weights = {key.replace("classifier", name): value for key, value in source().items()}
    model = net()
    report = load_weights(model, weights)
    assert report.notes == (f"head: {name}",)
    assert torch.equal(model.classifier.weight, source()["classifier.weight"])
    assert "14-class head" in refused(net(num_classes=2), weights)
    assert len(load_weights(net(num_classes=2), weights, head="skip").skipped) == 2


def test_a_head_of_several_layers_can_be_skipped() -> None:
    weights = source()
    for key in ("weight", "bias"):
        weights[f"classifier.3.{key}"] = weights.pop(f"classifier.{key}")
    weights["classifier.0.weight"] = torch.zeros(16, 16)
    assert "unexpected" in refused(net(), weights)
    report = load_weights(net(), weights, head="skip")
    assert len(report.skipped) == 3
    weights["features.extra.weight"] = torch.zeros(2)  # that is no head
    assert "features.extra.weight" in refused(net(), weights, head="skip")


def test_a_models_own_head_can_be_left_alone() -> None:
    model = net()
    model.classifier = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    assert "head='skip' to leave these as they are" in refused(model, source())
    report = load_weights(model, source(), head="skip")
    assert len(report.skipped) == 2
    assert torch.equal(model.features.conv0.weight, source()["features.conv0.weight"])
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(16, 14))
    load_weights(model, source())
    assert torch.equal(model.classifier[1].weight, source()["classifier.weight"])


def test_checkpoints_in_memory() -> None:
    lightning = {
        "state_dict": {f"model.{key}": value for key, value in source().items()},
        "hyper_parameters": {"lr": 0.1},
    }
    assert load_weights(net(), lightning).ignored == ("hyper_parameters (dict)",)
    lightning["state_dict"]["criterion.weight"] = torch.zeros(14)
    assert "pass prefix='model.'" in refused(net(), lightning)
    for prefix in ("model.", "model"):
        report = load_weights(net(), lightning, prefix=prefix)
        assert report.ignored == ("hyper_parameters (dict)", "criterion.weight")


def test_a_model_without_numbers_is_refused() -> None:
    with torch.device("meta"):
        model = net()
    with pytest.raises(WeightsError, match="to_empty"):
        load_weights(model, source())


def test_into_a_wrapped_model() -> None:
    inner = net()
    load_weights(nn.DataParallel(inner), source())
    assert torch.equal(inner.classifier.weight, source()["classifier.weight"])
    compiled = torch.compile(net(), backend="eager")
    load_weights(compiled, source())


def test_a_model_that_only_holds_a_densenet_is_told_apart() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.neck, self.head = net(), nn.Linear(14, 4), nn.Linear(4, 2)

    model = Detector()
    assert "pass the DenseNet in it (backbone), or head='skip'" in refused(model, source())
    load_weights(model.backbone, source())


def test_networks_of_another_kind_load_their_own_keys(tmp_path: Path) -> None:
    model = build_model("d2l_resnet18")
    save_weights(model, tmp_path / "x.safetensors")
    again = build_model("d2l_resnet18")
    report = load_weights(again, tmp_path / "x.safetensors")
    assert report.loaded == len(model.state_dict())
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert "missing" in refused(build_model("fc_densenet56"), tmp_path / "x.safetensors")
    wrapped = {f"module.{key}": value for key, value in model.state_dict().items()}
    assert load_weights(again, wrapped).prefix == "module."
    fewer = build_model("d2l_resnet18", num_classes=3)
    assert "this is a 10-class head: pass num_classes=10 or head='skip'" in refused(fewer, wrapped)
    assert len(load_weights(fewer, wrapped, head="auto").skipped) == 2
    assert "no dialects" in refused(again, wrapped, dialect="keras")
    with pytest.raises(WeightsError, match="no DenseNet"):
        save_weights(model, tmp_path / "y.pth", "monai")


def test_what_a_format_cannot_keep_is_said(tmp_path: Path) -> None:
    model = net(norm_eps=1e-3)
    with pytest.warns(UserWarning, match=r"epsilon of the norms \(0\.001\) is not kept"):
        save_weights(model, tmp_path / "x.pth")
    report = load_weights(net(norm_eps=1e-3), tmp_path / "x.pth")
    assert "epsilon of the norms stays the model's, 0.001" in str(report)
    assert load_weights(net(), tmp_path / "x.pth").notes == ()


def test_epsilon_of_the_norms_travels(tmp_path: Path) -> None:
    model = net(norm_eps=1.001e-5)
    save_weights(model, tmp_path / "x.safetensors")
    again = net()
    report = load_weights(again, tmp_path / "x.safetensors")
    assert again.features.norm5.eps == 1.001e-5
    assert "epsilon" in str(report)
    save_weights(net(), tmp_path / "y.safetensors")
    assert load_weights(net(), tmp_path / "y.safetensors").notes == ()


def test_a_dialect_without_a_name_for_a_part_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"andreasveit has no name for stem norm0\.weight"):
        save_weights(net(), tmp_path / "x.pth", "andreasveit")
    with pytest.raises(WeightsError, match="bias"):
        save_weights(net(bias=True), tmp_path / "x.weights.h5", "keras")
    with pytest.raises(ConfigError, match="did you mean"):
        save_weights(net(), tmp_path / "x.pth", "montai")
    for name in ("x", "x.txt", "x.zip"):
        with pytest.raises(WeightsError, match=r"\.safetensors"):
            save_weights(net(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_what_stays_as_it_was_is_told() -> None:
    headless = {key: value for key, value in source().items() if not key.startswith("classifier.")}
    for head in ("auto", "skip"):
        report = load_weights(net(), headless, head=head)  # type: ignore[arg-type]
        assert report.fresh == ("classifier.weight", "classifier.bias")
        assert "stay as they were: classifier.weight, classifier.bias" in str(report)
    report = load_weights(net(num_classes=3), source(), head="auto")
    assert (report.fresh, report.skipped) == (("classifier.weight", "classifier.bias"),) * 2
    assert load_weights(net(), source()).fresh == ()


def test_more_than_a_densenet_reads_its_own_weights_back(tmp_path: Path) -> None:
    def more(width: int = 5) -> nn.Module:
        model = net()
        model.classifier = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 3))
        return model

    model, twin = more(), more()
    save_weights(model, tmp_path / "own.safetensors")
    report = load_weights(twin, tmp_path / "own.safetensors")
    assert report.loaded == len(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value)
    assert "classifier.2.weight" in refused(more(6), model.state_dict())
    set_norm_eps(model, 1e-3)
    save_weights(model, tmp_path / "other.safetensors")
    load_weights(twin, tmp_path / "other.safetensors")
    assert norm_eps(twin) == {1e-3}


def test_a_layer_outside_of_the_prefix_is_no_head() -> None:
    trunk = {key: value for key, value in source().items() if not key.startswith("classifier.")}
    whole = {f"backbone.{key}": value for key, value in trunk.items()}
    whole |= {"proj.weight": torch.randn(6, 16), "proj.bias": torch.randn(6)}
    report = load_weights(net(num_classes=0), whole, prefix="backbone.")
    assert report.ignored == ("proj.weight", "proj.bias")
    inside = {f"backbone.{key}": v for key, v in {**trunk, "fc.weight": torch.randn(6, 16)}.items()}
    inside["backbone.fc.bias"] = torch.randn(6)
    assert load_weights(net(num_classes=6), inside, prefix="backbone.").notes == (
        "head: backbone.fc",
    )


def test_numbers_that_are_too_large_for_half_are_told() -> None:
    weights = source()
    weights["features.norm5.running_var"][0] = 1e5
    report = load_weights(net().half(), weights)
    assert "1 tensors hold numbers too large for their new precision: infinity" in report.notes
    wide = {k: v.double() if v.is_floating_point() else v for k, v in source().items()}
    wide["features.norm5.running_var"][0] = 1e200
    assert load_weights(net().double(), wide).notes == ()


def test_a_norm_without_a_shape_is_no_crash() -> None:
    weights = source()
    for name in ("weight", "bias"):
        weights[f"fc.{name}"] = weights.pop(f"classifier.{name}")
    weights["features.norm5.weight"] = torch.tensor(1.0)
    assert "norm5.weight" in refused(net(), weights)


def test_networks_of_other_kinds_want_numbers_too() -> None:
    model = build_model("fc_densenet56", num_classes=3)
    with torch.device("meta"):
        empty = build_model("fc_densenet56", num_classes=3)
    with pytest.raises(WeightsError, match="meta device"):
        load_weights(empty, model.state_dict())
    for wrong in ({"prefix": "encoder."}, {"stem": "adapt"}):
        with pytest.raises(ConfigError, match="prefix and stem are for those"):
            load_weights(model, model.state_dict(), **wrong)


@pytest.mark.parametrize("eps", ["nan", "-1e-5", "0", "1", "small"])
def test_an_epsilon_that_is_none_is_refused(eps: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(source(), path, metadata={"densely.norm_eps": eps})
    assert "expected a small number above 0" in refused(net(), path)


def test_a_network_beside_one_of_the_same_keys_can_be_chosen() -> None:
    weights = source()
    averaged = {f"ema.{key}": torch.zeros_like(value) for key, value in source().items()}
    model = net()
    report = load_weights(model, {**weights, **averaged}, prefix="")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    assert set(report.ignored) == set(averaged)
    assert f"... ({len(averaged)})" in str(report)
    load_weights(model, {**weights, **averaged}, prefix="ema.")
    assert not model.classifier.weight.any()


def test_layers_without_a_shape_are_told(tmp_path: Path) -> None:
    model = net()
    model.classifier = nn.LazyLinear(14)
    with pytest.raises(WeightsError, match=r"classifier\.weight.*call it once first"):
        load_weights(model, source())
    with pytest.raises(WeightsError, match=r"classifier\.weight.*call it once first"):
        save_weights(model, tmp_path / "x.safetensors")
    model(torch.randn(2, 3, 32, 32))
    load_weights(model, source())


def test_a_name_with_a_nul_in_it_is_told() -> None:
    assert "cannot be read: embedded null byte" in refused(net(), "a\0b.pth")
    with pytest.raises(WeightsError, match="cannot be written: embedded null byte"):
        save_weights(net(), "a\0b.pth")


def test_a_stem_of_eight_bits_is_adapted() -> None:
    weights = source()
    key = "features.conv0.weight"
    weights[key] = weights[key].to(torch.float8_e4m3fn)
    model = net(in_channels=1)
    load_weights(model, weights, stem="adapt")
    assert torch.equal(model.state_dict()[key], weights[key].float().sum(dim=1, keepdim=True))

"""What a comparison trains: variants, seeds, and every mistake named."""

from pathlib import Path
from typing import Any

import pytest

from densely.comparison.config import COMPARISONS, CompareConfig, read_variant, slug
from densely.errors import ConfigError
from densely.models import build_model
from densely.training.config import TrainConfig

TWO: dict[str, dict[str, Any]] = {
    "small": {"model": "d2l"},
    "wide one": {"options": {"bias": True}},
}


def test_a_variant_changes_its_fields_and_nothing_else() -> None:
    train = TrainConfig(seed=5, options={"bn_size": 2, "bias": False})
    config = CompareConfig(name="c", train=train, variants=TWO)
    made = config.config("wide one", 2)
    assert made.options == {"bn_size": 2, "bias": True}
    assert (made.seed, made.name, made.model) == (7, "wide-one-seed7", train.model)
    assert config.config("small", 0).model == "d2l"


def test_yaml_round_trip_is_exact(tmp_path: Path) -> None:
    config = CompareConfig(
        name="größer", train=TrainConfig(lr=0.3), variants=TWO, seeds=2, split="train"
    )
    (tmp_path / "c.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert CompareConfig.read(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"one": {}}, "1 variant(s): at least 2"),
        (["a", "b"], "variants: expected names"),
        ({12: {}, 24: {}}, "variants: expected names"),
        ({"a b": {}, "a-b": {}}, "too alike: a b, a-b"),
        (
            {"a": {}, "b": {"modle": "d2l"}},
            "variant 'b': unknown field 'modle'; did you mean model",
        ),
        ({"a": {}, "b": {"split_seed": 3}}, "variant 'b': split_seed is the same"),
        ({"a": {}, "b": {"seed": 3}}, "variant 'b': seed is the same for all variants"),
        ({"a": {}, "b": {"epochs": 0}}, "variant 'b': epochs=0: must be at least 1"),
        ({"a": {}, "b": 3}, "variant 'b': expected fields"),
    ],
)
def test_wrong_variants_are_named(variants: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CompareConfig(name="c", train=TrainConfig(), variants=variants)
    assert message in str(caught.value)


@pytest.mark.parametrize("seeds", [0, -1, "3", True])
def test_seeds_are_a_number_from_one_on(seeds: Any) -> None:
    with pytest.raises(ConfigError, match="seeds="):
        CompareConfig(name="c", train=TrainConfig(), variants=TWO, seeds=seeds)


def test_the_last_seed_is_one_and_all_names_fit_a_folder() -> None:
    train = TrainConfig(seed=2**32 - 2)
    CompareConfig(name="c", train=train, variants=TWO, seeds=2)
    with pytest.raises(ConfigError, match="variant 'small': seed=4294967296: must be from 0"):
        CompareConfig(name="c", train=train, variants=TWO, seeds=3)
    name = "ü" * 122  # in two bytes each, and -seed9-001 after them
    CompareConfig(name="c", train=TrainConfig(), variants={"a": {}, name: {}}, seeds=10)
    with pytest.raises(ConfigError, match="names of 257 bytes, and at most 255 are possible"):
        CompareConfig(name="c", train=TrainConfig(), variants={"a": {}, f"{name}üx": {}})


def test_the_split_is_one_of_three() -> None:
    with pytest.raises(ConfigError, match="split=tset: must be one of train, validation, test"):
        CompareConfig(name="c", train=TrainConfig(), variants=TWO, split="tset")  # type: ignore[arg-type]


def test_a_file_with_unknown_fields_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 3\nvariants: {a: {}, b: {}}\n")
    with pytest.raises(ConfigError, match="unknown field 'seed'; did you mean seeds"):
        CompareConfig.read(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("train: 3\n")
    with pytest.raises(ConfigError, match="train: expected fields"):
        CompareConfig.read(tmp_path / "c.yaml")


def test_a_variant_of_the_command_line_is_yaml() -> None:
    assert read_variant("wide: {options: {growth_rate: 48}}") == (
        "wide",
        {"options": {"growth_rate": 48}},
    )
    for text in ("wide", "wide: 3", "a: {}\nb: {}", "{", "[1]", "a: {lr: 1}\na: {}"):
        with pytest.raises(ConfigError, match=r"expected 'NAME: \{FIELD: VALUE\}'"):
            read_variant(text)
    with pytest.raises(ConfigError, match="bias: given twice"):
        read_variant("wide: {options: {bias: true, bias: false}}")


def test_names_of_folders_are_plain() -> None:
    assert slug("ResNet-18 / narrow") == "resnet-18-narrow"
    assert slug("平均") == "平均"
    assert slug("//") == "variant"


def test_the_narrow_resnet_has_the_parameters_of_the_densenet() -> None:
    config = COMPARISONS["add-or-concatenate"]

    def parameters(variant: str) -> int:
        made = config.config(variant, 0)
        model = build_model(made.model, **made.options)
        return sum(p.numel() for p in model.parameters())

    assert parameters("DenseNet") == 758_226
    assert abs(parameters("narrow ResNet-18") / parameters("DenseNet") - 1) < 0.01
    assert parameters("ResNet-18") > 14 * parameters("DenseNet")


def test_the_claims_are_tried_on_the_chapters_schedule_at_full_size() -> None:
    for config in COMPARISONS.values():
        assert config.seeds >= 3
        assert (config.train.data, config.train.image_size) == ("fashion-mnist", 96)
        assert (config.train.epochs, config.train.batch_size, config.train.lr) == (10, 256, 0.1)
        assert config.train.limit is None

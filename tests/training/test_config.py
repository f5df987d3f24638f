"""The configuration: recipes, YAML, and every wrong value named at once."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from densely.errors import ConfigError
from densely.training.config import RECIPES, TrainConfig, read_yaml


def test_the_d2l_recipe_is_the_chapters() -> None:
    config = RECIPES["d2l"]
    assert (config.model, config.data, config.image_size) == ("d2l", "fashion-mnist", 96)
    assert (config.epochs, config.batch_size, config.lr) == (10, 256, 0.1)
    assert (config.schedule, config.momentum, config.weight_decay) == ("constant", 0, 0)
    assert config.validation == 0
    assert not config.normalize
    assert config.norm_batches == 20  # the one thing that is not the chapter's


def test_the_cifar_recipe_is_the_papers() -> None:
    """Huang et al. (2017), section 4.2, with the augmentation of C10+ (4.1)."""
    config = RECIPES["cifar"]
    assert (config.model, config.image_size) == ("densenet_bc_100_12", 32)
    assert (config.epochs, config.batch_size, config.lr) == (300, 64, 0.1)
    assert (config.schedule, config.momentum, config.weight_decay) == ("step", 0.9, 1e-4)
    assert (config.augment, config.normalize, config.validation) == ("crop-flip", True, 0)


def test_each_recipe_knows_its_name() -> None:
    assert all(config.recipe == name for name, config in RECIPES.items())


def test_values_override_their_recipe() -> None:
    config = TrainConfig.from_values({"recipe": "d2l", "epochs": 3})
    assert config == dataclasses.replace(RECIPES["d2l"], epochs=3)


def test_yaml_round_trip_is_exact(tmp_path: Path) -> None:
    config = TrainConfig.from_values({"lr": 0.3, "name": "größer", "data_dir": "/x y"})
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert TrainConfig.from_values(read_yaml(path)) == config


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"epochs": -1}, "epochs=-1"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"weight_decay": float("inf")}, "weight_decay=inf"),
        ({"validation": 1.0}, "validation=1.0"),
        ({"limit": 1}, "limit=1"),
        ({"norm_batches": -1}, "norm_batches=-1"),
        ({"image_size": 0}, "image_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"name": "a/b"}, "name=a/b"),
        ({"name": ".."}, "name=.."),
        ({"name": "a\nb"}, "name=a\nb"),
        ({"lr": 10**400}, "must be of type float"),
        ({"epochs": "3"}, "epochs='3': must be of type int"),
        ({"epochs": 2.5}, "epochs=2.5: must be of type int"),
        ({"epochs": True}, "epochs=True: must be of type int"),
        ({"lr": None}, "lr=None: must be of type float"),
        ({"limit": "x"}, "limit='x': must be of type int or null"),
        ({"schedule": "linear"}, "schedule='linear': must be one of constant, cosine"),
        ({"normalize": 1}, "normalize=1: must be of type bool"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_values(values)
    assert named in str(caught.value)


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"epochs=0.*batch_size=0.*lr=-1"):
        TrainConfig(epochs=0, batch_size=0, lr=-1.0)


def test_an_integer_is_a_fine_learning_rate() -> None:
    config = TrainConfig.from_values({"lr": 1})
    assert type(config.lr) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipe": "d3l"}, "unknown recipe 'd3l'; did you mean d2l?"),
        ({"epoch": 3}, "unknown field 'epoch'; did you mean epochs?"),
        ({"recipe": ["d2l"]}, "unknown recipe"),
    ],
)
def test_unknown_names_come_with_the_nearest(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_values(values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: [", "no valid YAML"),
        ("- lr", "expected lines such as"),
        ("lr: 1\nepochs: 2\nlr: 2", "lr: given twice"),
        ("!!python/object/apply:os.system ['true']", "no valid YAML"),
    ],
)
def test_a_broken_yaml_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_merge_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text(
        "deep: {base: &a {x: 1}, inner: &b {<<: *a, z: 2}}\ntop: {<<: *b, <<: *a, y: 3}\n"
    )
    assert read_yaml(path)["top"] == {"x": 1, "y": 3, "z": 2}


def test_values_that_are_no_fields_are_refused() -> None:
    wrong: Any = "d2l"
    with pytest.raises(ConfigError, match="str given, fields by their names expected"):
        TrainConfig.from_values(wrong)


def test_a_missing_yaml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        read_yaml(tmp_path / "nowhere.yaml")


def test_an_empty_yaml_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.touch()
    assert read_yaml(path) == {}

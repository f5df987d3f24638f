"""The presets have the published sizes, and `create_model` fits them to the images."""

import pytest
import torch

from densely.errors import ConfigError
from densely.models import DenseNet, create_model, model_names

# d2l: the chapter's net on grey images, 10 classes. ImageNet nets: 1000 classes; 10 for the rest.
PARAMETERS = {
    "d2l": 758_226,
    "densenet121": 7_978_856,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "densenet161": 28_681_000,
    "densenet264": 33_337_704,
    "densenet_40_12": 1_019_722,
    "densenet_100_12": 6_979_642,
    "densenet_100_24": 27_249_082,
    "densenet_bc_100_12": 769_162,
    "densenet_bc_250_24": 15_324_406,
    "densenet_bc_190_40": 25_624_430,
    "densenet_bc_22_12": 71_686,
}
IMAGENET = ["densenet121", "densenet161", "densenet169", "densenet201", "densenet264"]


@pytest.fixture(autouse=True)
def _meta_device():
    """Nothing here looks at a weight: none is allocated."""
    with torch.device("meta"):
        yield


def has_large_stem(model: DenseNet) -> bool:
    """Both stems differ in their first kernel, in the norm and in the pooling."""
    size = model.state_dict()["features.conv0.weight"].shape[-1]
    parts = dict(model.features.named_children())
    assert (size, "norm0" in parts, "pool0" in parts) in [(7, True, True), (3, False, False)]
    return size == 7


def test_model_names_are_those_that_are_counted_here() -> None:
    assert sorted(model_names()) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_as_published(name: str) -> None:
    model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert has_large_stem(model) == (name in [*IMAGENET, "d2l"])
    assert model.num_classes == (1000 if name in IMAGENET else 10)
    assert model.in_channels == (1 if name == "d2l" else 3)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("densenet_121", "densenet121"),
        ("DenseNet169", "densenet169"),
        ("d21", "d2l"),
        ("densenet_bc_100", "densenet_bc_100_12"),
    ],
)
def test_unknown_name_suggests_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError) as error:
        create_model(wrong)
    assert f"'{wrong}'" in str(error.value)
    assert near in str(error.value).split("did you mean ")[1].rstrip("?").split(" or ")


def test_name_near_to_nothing_lists_all() -> None:
    with pytest.raises(ConfigError) as error:
        create_model("?")
    assert all(name in str(error.value) for name in model_names())


@pytest.mark.parametrize("name", PARAMETERS)
def test_classes_and_channels(name: str) -> None:
    model = create_model(name, num_classes=7, in_channels=2)
    state = model.state_dict()
    assert state["features.conv0.weight"].shape[1] == 2
    assert state["classifier.weight"].shape[0] == 7
    assert state["classifier.bias"].shape == (7,)
    assert (model.num_classes, model.in_channels) == (7, 2)


@pytest.mark.parametrize("field", ["num_classes", "in_channels"])
def test_zero_classes_or_channels_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}=0"):
        create_model("d2l", **{field: 0})


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_networks_get_the_stem_that_fits(name: str) -> None:
    large = {size: has_large_stem(create_model(name, image_size=size)) for size in (8, 64, 65, 224)}
    assert large == {8: False, 64: False, 65: True, 224: True}


@pytest.mark.parametrize("size", [29, 64, 65, 96])
def test_the_chapters_stem_is_always_large(size: int) -> None:
    assert has_large_stem(create_model("d2l", image_size=size))


@pytest.mark.parametrize("size", [4, 64, 65, 224])
def test_the_cifar_stem_is_always_small(size: int) -> None:
    assert not has_large_stem(create_model("densenet_bc_100_12", image_size=size))


@pytest.mark.parametrize(
    ("name", "limit"), [("d2l", 29), ("densenet121", 8), ("densenet_40_12", 4)]
)
def test_images_that_would_shrink_to_nothing_are_refused(name: str, limit: int) -> None:
    assert create_model(name, image_size=limit).min_image_size == limit
    for size in (limit - 1, 0, -5):
        with pytest.raises(ConfigError) as error:
            create_model(name, image_size=size)
        assert f"image_size={size}:" in str(error.value)
        assert f" {limit} " in str(error.value)

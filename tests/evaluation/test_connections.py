"""Strengths of connections: against loops over each layer's channels, for every package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from explained_nets import CASES, resnet, shuffled, tiny
from PIL import Image
from torch import nn

from densely.errors import ConfigError
from densely.evaluation.connections import connections, draw_connections


def by_loops(model: nn.Module, growth_rate: int) -> list[np.ndarray]:
    """From the names and shapes of the weights alone."""
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    found = []
    for b in range(1, 9):
        layers = []
        while (key := f"features.denseblock{b}.denselayer{len(layers) + 1}") + ".norm1.weight" in (
            weights
        ) or f"{key}.layers.norm1.weight" in weights:
            inner = f"{key}.layers" if f"{key}.layers.conv1.weight" in weights else key
            layers.append(weights[f"{inner}.conv1.weight"])
        if not layers:
            break
        after = f"features.transition{b}.conv.weight"
        head = "classifier.weight" if "classifier.weight" in weights else "class_layers.out.weight"
        readers = [*layers, weights[after if after in weights else head]]
        matrix = np.full((len(readers), len(readers)), np.nan)
        for t, weight in enumerate(readers):
            at = 0
            for s in range(t + 1):
                width = layers[0].shape[1] if s == 0 else growth_rate
                total, count = 0.0, 0
                for c in range(at, at + width):
                    total += np.abs(weight[:, c]).sum()
                    count += weight[:, c].size
                matrix[s, t] = total / count
                at += width
            assert at == weight.shape[1]
        found.append(matrix)
    return found


@pytest.mark.parametrize("name", [name for name in CASES if name != "ResNet"])
def test_they_are_those_of_loops_over_the_channels(name: str) -> None:
    model = shuffled(CASES[name].make())
    found = connections(model)
    wanted = by_loops(model, 4 if name.startswith("densely") else 8)
    assert len(found) == len(wanted) == CASES[name].levels
    for ours, loops in zip(found, wanted, strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, loops, rtol=1e-12)


def test_known_weights_have_known_strengths() -> None:
    model = tiny(block_config=(2,), num_init_features=6)
    layers = list(model.features.denseblock1.children())
    with torch.no_grad():
        layers[0].conv1.weight.fill_(-3)
        layers[1].conv1.weight[:, :6] = 1
        layers[1].conv1.weight[:, 6:] = -2
        for i, part in enumerate((slice(0, 6), slice(6, 10), slice(10, 14))):
            model.classifier.weight[:, part] = i + 4
    (found,) = connections(model)
    nan = np.nan
    np.testing.assert_array_equal(found, [[3, 1, 4], [nan, 2, 5], [nan, nan, 6]])


def test_a_network_that_adds_has_none() -> None:
    with pytest.raises(ConfigError, match="adds where a DenseNet concatenates"):
        connections(resnet())


@pytest.mark.parametrize("blocks", [(1,), (3, 2), (2, 24, 1)])
def test_a_picture_is_drawn(tmp_path: Path, blocks: tuple[int, ...]) -> None:
    path = tmp_path / "connections.png"
    draw_connections(connections(tiny(block_config=blocks)), path, "牛仔裤 $x \udcff")
    with Image.open(path) as picture:
        picture.load()
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10  # something is on it
    assert [file.name for file in tmp_path.iterdir()] == ["connections.png"]


def test_weights_of_zero_are_drawn(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    draw_connections(connections(model), tmp_path / "connections.png", "nothing")
    assert (tmp_path / "connections.png").is_file()

"""torch.compile without a graph break, and torch.export, for every kind of network."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import KeepsGraphs, operators
from nets import assert_equal, images, randomized, state, tiny
from torch import Tensor, nn

from densely.fused import restore
from densely.models import DenseNet, FCDenseNet, ResNet, build_model, list_models, model_facts


class Features(nn.Module):
    """`forward_features` as the forward of a module, as a detector calls it."""

    def __init__(self, model: DenseNet, levels: tuple[int, ...] | None) -> None:
        super().__init__()
        self.model, self.levels = model, levels

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model.forward_features(x, self.levels)


def small(**options: Any) -> DenseNet:
    return tiny(**{"stem": "small", "block_config": (1, 1), "num_classes": 4, **options})


def fc(**options: Any) -> FCDenseNet:
    return FCDenseNet(
        growth_rate=2,
        down_blocks=(2, 1),
        bottleneck_layers=1,
        up_blocks=(1, 1),
        num_init_features=3,
        num_classes=4,
        **options,
    )


IMAGE, LARGE = (9, 10), (17, 22)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: small(bn_size=None, compression=1.0), IMAGE),
    "BC": (lambda: small(bn_size=2, block_config=(2, 1)), IMAGE),
    "deep stem": (lambda: small(stem="deep", bias=True), LARGE),
    "1D": (lambda: small(stem="large", spatial_dims=1), (33,)),
    "3D": (
        lambda: small(stem="large", spatial_dims=3, strides=[(1, 2, 2)] * 3),
        (2, 11, 14),
    ),
    "dropout": (
        lambda: small(drop_rate=0.3, drop_path_rate=0.4, classifier_drop_rate=0.2),
        IMAGE,
    ),
    "group norm, max pooling": (lambda: small(norm="group", transition_pool="max"), IMAGE),
    "layer norm, silu": (lambda: small(norm="layer", activation="silu"), IMAGE),
    "no norm": (lambda: small(norm=lambda _channels: nn.Identity()), IMAGE),
    "output stride": (lambda: small(output_stride=1), IMAGE),
    "no classes": (lambda: small(num_classes=0), IMAGE),
    "features": (lambda: Features(small(), (2, 1)), IMAGE),
    "FC-DenseNet": (lambda: fc(), (9, 10)),
    "ResNet": (lambda: ResNet(block_config=(1, 1), channels=(4, 6), in_channels=3), LARGE),
}


def run(call: Callable[[Tensor], object], x: Tensor) -> object:
    """With the same random numbers each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return call(x)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


# Each in the mode where more can break: compiled in training, exported in eval mode; and those
# that stand for the others in both.
BOTH = ("BC", "dropout", "FC-DenseNet", "ResNet")
COMPILED = [(name, True) for name in NETWORKS] + [(name, False) for name in BOTH]
EXPORTED = [(name, False) for name in NETWORKS] + [(name, True) for name in BOTH]


@pytest.mark.parametrize(("name", "train"), COMPILED)
def test_compile(name: str, train: bool) -> None:
    """Outputs, and in train mode the running statistics, are the same."""
    make, size = NETWORKS[name]
    eager, other = randomized(make()).train(train), randomized(make()).train(train)
    x = images(3, 3, *size)
    compiled = torch.compile(other, fullgraph=True, backend="eager")
    assert_equal(run(compiled, x), run(eager, x))
    assert_equal(state(other), state(eager))


@pytest.mark.parametrize("train", [True, False])
def test_compiled_code_has_the_fused_steps(train: bool) -> None:
    model, x, kept = small().train(train), images(2, 3, *IMAGE).float(), KeepsGraphs()
    torch.compile(model, fullgraph=True, backend=kept)(x)
    (graph,) = kept.graphs
    assert {"densely::dense_block_forward", "densely::reader_forward"} <= operators(graph)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_code_has_none_of_them(strict: bool) -> None:
    x = images(2, 3, *IMAGE).float()
    program = torch.export.export(small().eval(), (x,), strict=strict)
    assert operators(program.graph_module) == set()


@pytest.mark.parametrize(("name", "train"), EXPORTED)
def test_export_with_any_batch(name: str, train: bool) -> None:
    make, size = NETWORKS[name]
    model, eager = randomized(make()).train(train), randomized(make()).train(train)
    restore(eager)  # plain, as an exported program is: dropout draws in the same memory order
    program = torch.export.export(
        model, (images(2, 3, *size),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    exported = program.module()
    for batch in (3, 5):
        x = images(batch, 3, *size, seed=batch)
        assert_equal(run(exported, x), run(eager, x))
    assert_equal(dict(exported.state_dict()), state(eager))


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_every_named_network(name: str) -> None:
    """At the size it was published for, in float32: the graph is the same, so are the numbers."""
    torch.manual_seed(0)
    model, facts = build_model(name).eval(), model_facts(name)
    x = images(2, *facts.input_shape).float()
    expected = run(model, x)
    assert expected.isfinite().all()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, x), expected, rtol=0, atol=0)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    one = run(program.module(), x[:1])
    torch.testing.assert_close(one, expected[:1], rtol=1e-4, atol=1e-4 * float(expected.std()))

"""How what is kept grows with depth."""

from typing import Any

import peers as tests_peers
import pytest
import torch
from torch import nn

from densely import create_model
from densely.bench import depth, peers, plain_nets
from densely.bench.depth import depth_series, fitted_exponent
from densely.bench.progress import Progress
from densely.bench.trial import Trial, make_trial
from densely.bench.variants import Variant


def test_the_exponent_of_a_power_is_found() -> None:
    assert fitted_exponent([40, 100, 250], [3 * n**1.5 for n in (40, 100, 250)]) == pytest.approx(
        1.5
    )


def test_the_depths_are_those_of_bc_nets() -> None:
    assert all((layers - 4) % 6 == 0 for layers in depth.DEPTHS)


def test_torchvisions_net_is_the_papers() -> None:
    tests_peers.torchvision()
    with torch.device("meta"):
        theirs, ours = peers.torchvision_bc(100), create_model("densenet_bc_100_12")
        assert theirs(torch.empty(2, 3, 32, 32)).shape == (2, 10)
        maps = theirs.get_submodule("features")(torch.empty(2, 3, 32, 32))
        assert maps.shape[2:] == (8, 8)  # halved by two transitions, and not in the stem
    assert [p.shape for p in theirs.parameters()] == [p.shape for p in ours.parameters()]


@pytest.fixture
def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain net stands for its net, as for a peer that is checkpointed where it is told so."""

    def net(layers: int, memory_efficient: bool = False) -> nn.Module:
        return plain_nets.bc_net(layers, checkpointed=memory_efficient)

    monkeypatch.setattr(peers, "torchvision_bc", net)


@pytest.mark.usefixtures("without_torchvision")
def test_bytes_are_those_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for batch in (1, 4):
        monkeypatch.setattr(depth, "BATCH", batch)
        lines = depth_series("cpu", Progress(), (10,))
        found[batch] = {line.name: line.kept_bytes_per_image[0] for line in lines}
    assert found[4] == {name: pytest.approx(kept, rel=0.05) for name, kept in found[1].items()}
    assert found[1]["torchvision"] == found[1]["plain net"]
    assert found[1]["torchvision memory_efficient"] == found[1]["plain net checkpointed"]
    assert found[1]["plain net checkpointed"] < found[1]["plain net"]


@pytest.mark.usefixtures("without_torchvision")
def test_bytes_are_of_float32_for_all_even_where_bfloat16_is_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    precisions: list[str] = []

    def noting(variant: Variant, *rest: Any) -> Trial:
        precisions.append(variant.runtime.precision)
        return make_trial(variant, *rest)

    monkeypatch.setattr("densely.runtime.cpu_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(depth, "make_trial", noting)
    lines = depth_series("cpu", Progress(), (10,))
    assert precisions == ["float32"] * len(lines)


def test_densely_grows_slower_than_the_plain_net(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

    monkeypatch.setattr(peers, "torchvision_bc", missing)
    monkeypatch.setattr(depth, "BATCH", 1)
    found = {line.name: line for line in depth_series("cpu", Progress(), (10, 28))}
    exponents = {name: line.exponent for name, line in found.items()}
    assert exponents["densely"] < exponents["densely, plain path"]
    assert exponents["densely, plain path"] == pytest.approx(exponents["plain net"], abs=0.1)
    assert exponents["plain net checkpointed"] < exponents["plain net"] - 0.2
    assert found["densely"].relative()[0] == 1
    assert found["torchvision"].gap == "not installed: torchvision"
    assert found["torchvision"].to_dict()["exponent"] is None

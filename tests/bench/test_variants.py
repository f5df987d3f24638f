"""Who takes part, and in what way."""

import sys

import peers as tests_peers
import pytest
import torch
from tiny_nets import mlp

from densely.bench import peers, variants
from densely.bench.compare import reason
from densely.bench.nets import NETS, Net
from densely.bench.plain_nets import Checkpointed
from densely.bench.variants import find
from densely.errors import DenselyError
from densely.runtime import Runtime, choose_runtime


@pytest.mark.parametrize("net", NETS.values(), ids=list(NETS))
def test_densely_and_the_reference_take_part_each_under_its_own_name(net: Net) -> None:
    found = variants.variants(net)
    names = [variant.name for variant in found]
    assert names[0] == "densely"
    assert net.reference in names
    assert len(set(names)) == len(names)
    assert find(net, "densely", "auto").runtime == choose_runtime()
    assert sum(variant.compiled for variant in found) == 1
    assert all("--compile" in str(variant.gap) for variant in found if variant.compiled)
    assert all(variant.gap is None for variant in variants.variants(net, "auto", True)
               if variant.compiled)  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bfloat16_is_measured_where_it_is_fast_and_else_a_gap(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    def choose(device: str = "auto", asked: str = "auto") -> Runtime:
        chosen = precision if asked == "auto" else asked
        reasons = {"precision": "the CPU is such"}
        return Runtime(torch.device("cpu"), chosen, "channels_last", reasons)  # type: ignore[arg-type]

    monkeypatch.setattr(variants, "choose_runtime", choose)
    for net in NETS.values():
        found = {variant.name: variant for variant in variants.variants(net, compiled=True)}
        frugal = "memory_efficient" if net.name == "densenet121" else "checkpointed"
        frugal = f"{net.reference} {frugal} channels-last"
        if precision == "bfloat16":
            frugal += " bf16"
        assert found[frugal].gap is None
        assert found[frugal].runtime.precision == precision
        assert found[frugal].runtime.memory_format == "channels_last"
        tuned = f"{net.reference} channels-last"
        gaps = found[f"{tuned} bf16"].gap, found["densely float32"].gap
        if precision == "bfloat16":
            assert gaps == (None, None)
            assert f"{tuned} bf16 compiled" in found
        else:
            assert all("the CPU is such" in str(gap) for gap in gaps)
            assert f"{tuned} compiled" in found


def test_on_a_gpu_both_sides_are_captured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(device: str = "auto", asked: str = "bfloat16") -> Runtime:
        return Runtime(torch.device("cuda"), asked, "channels_last")  # type: ignore[arg-type]

    monkeypatch.setattr(variants, "choose_runtime", choose)
    for net in NETS.values():
        captured = [variant.name for variant in variants.variants(net) if variant.captured]
        assert captured == ["densely captured", f"{net.reference} channels-last bf16 captured"]


def test_the_peers_of_densenet121_are_there() -> None:
    names = {variant.name for variant in variants.variants(NETS["densenet121"])}
    assert names >= {
        "torchvision",
        "torchvision channels-last",
        "torchvision channels-last bf16",
        "torchvision memory_efficient",
        "torchvision accelerated",
        "timm",
        "MONAI",
    }


@pytest.mark.parametrize("name", ["d2l", "bc_100_12"])
def test_what_is_called_checkpointed_is(name: str) -> None:
    for variant in variants.variants(NETS[name]):
        with torch.device("meta"):
            modules = list(variant.build().modules())
        has = any(isinstance(module, Checkpointed) for module in modules)
        assert has == ("checkpointed" in variant.name), variant.name


def test_torchvisions_nets_are_memory_efficient_where_they_are_called_so() -> None:
    tests_peers.torchvision()
    net, frugal = NETS["densenet121"], "torchvision memory_efficient"
    with torch.device("meta"):
        made = {
            False: [find(net, "torchvision", "cpu").build(), peers.torchvision_bc(16)],
            True: [find(net, frugal, "cpu").build(), peers.torchvision_bc(16, True)],
        }
    for is_so, nets in made.items():
        for model in nets:
            layers = [m for m in model.modules() if hasattr(m, "memory_efficient")]
            assert {layer.memory_efficient for layer in layers} == {is_so}


def test_a_net_in_which_nothing_is_replaced_is_not_measured_as_accelerated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "torchvision_densenet121", mlp)
    accelerated = find(NETS["densenet121"], "torchvision accelerated", "cpu")
    with pytest.raises(DenselyError, match="replaced nothing"):
        accelerated.build()


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(ImportError) as found:
        peers.monai_densenet121()
    assert "monai" in reason(found.value)

"""Who takes part: densely in its ways, and each peer as shipped and as tuned as it can be."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import nn

from densely.bench import peers, plain_nets
from densely.bench.nets import Net
from densely.errors import DenselyError
from densely.fused import accelerate
from densely.models.registry import build_model
from densely.runtime import Runtime, choose_runtime


@dataclass(frozen=True)
class Variant:
    """A network in one way of running it.

    Args:
        name: what tables call it.
        build: makes the network, with fresh weights.
        runtime: device, precision and memory layout.
        kind: whose code computes: "ours" in our own nets, "accelerated" is ours in a peer's net,
            "peer" the peer's.
        compiled: whether it goes through torch.compile.
        captured: whether its steps are CUDA graphs, as densely trains on a GPU.
        gap: why it cannot be measured, where that is known beforehand.
    """

    name: str
    build: Callable[[], nn.Module]
    runtime: Runtime
    kind: Literal["ours", "accelerated", "peer"] = "peer"
    compiled: bool = False
    captured: bool = False
    gap: str | None = None

    @property
    def tries_kernels(self) -> bool:
        """Whether cuDNN tries its kernels for it: ours and what is tuned, not what is as shipped.

        Captured steps have it so in any case.
        """
        return self.kind == "ours" or self.runtime.memory_format == "channels_last"


def variants(net: Net, device: str = "auto", compiled: bool = False) -> list[Variant]:
    """All variants of a network, in the order in which they take their turns.

    Args:
        net: the network.
        device: as `densely.runtime.choose_runtime` takes it.
        compiled: whether those under torch.compile are measured too, or named as gaps.
    """
    ours = partial(build_model, net.model)
    best = choose_runtime(device)
    found = [
        Variant("densely", ours, best, "ours"),
        Variant("densely float32", ours, choose_runtime(device, "float32"), "ours"),
        Variant("densely, plain path", partial(ours, fused=False), best, "ours"),
    ]
    if best.precision == "float32":  # the same as the first one
        found[1] = replace(found[1], gap=f"as densely decides here: {best.reasons['precision']}")
    if best.device.type == "cuda":
        found.insert(1, replace(found[0], name="densely captured", captured=True))

    shipped = Runtime(best.device, "float32", "contiguous")
    build, checkpointed = _peer(net)
    found.append(Variant(net.reference, build, shipped))
    tuned = _channels_last(found[-1])
    found += [tuned, _in_bfloat16(tuned, best)]
    if best.device.type == "cuda":
        fastest = _fastest(tuned, best)
        found.append(replace(fastest, name=f"{fastest.name} captured", captured=True))
    found.append(_under_compile(tuned, best, compiled))
    frugal = "memory_efficient" if net.name == "densenet121" else "checkpointed"
    found.append(Variant(f"{net.reference} {frugal}", checkpointed, shipped))
    found.append(_fastest(_channels_last(found[-1]), best))
    if net.name == "densenet121":
        found.append(Variant("timm", peers.timm_densenet121, shipped))
        found.append(Variant("MONAI", peers.monai_densenet121, shipped))
        found += _accelerated(build, shipped, best)
    return found


def _peer(net: Net) -> tuple[Callable[[], nn.Module], Callable[[], nn.Module]]:
    """What makes the peer's network, and what makes it with checkpoints."""
    make: Callable[..., nn.Module]
    if net.name == "densenet121":
        make = peers.torchvision_densenet121
        return make, partial(make, memory_efficient=True)
    make = plain_nets.chapter_net if net.name == "d2l" else partial(plain_nets.bc_net, 100)
    return make, partial(make, checkpointed=True)


def find(net: Net, name: str, device: str) -> Variant:
    """The variant of that name."""
    return next(variant for variant in variants(net, device, True) if variant.name == name)


def _accelerated(
    build: Callable[[], nn.Module], shipped: Runtime, best: Runtime
) -> Iterator[Variant]:
    """The net of torchvision after one line, `densely.accelerate(model)`, and tuned besides."""

    def make() -> nn.Module:
        model = build()
        if not accelerate(model).replaced:
            raise DenselyError("densely.accelerate replaced nothing in torchvision's densenet121")
        return model

    yield Variant("torchvision accelerated", make, shipped, "accelerated")
    yield Variant("torchvision accelerated, tuned", make, best, "accelerated")


def _channels_last(shipped: Variant) -> Variant:
    runtime = replace(shipped.runtime, memory_format="channels_last")
    return replace(shipped, name=f"{shipped.name} channels-last", runtime=runtime)


def _in_bfloat16(tuned: Variant, best: Runtime) -> Variant:
    gap = None if best.precision == "bfloat16" else best.reasons["precision"]
    return replace(
        tuned,
        name=f"{tuned.name} bf16",
        runtime=replace(tuned.runtime, precision="bfloat16"),
        gap=gap,
    )


def _fastest(tuned: Variant, best: Runtime) -> Variant:
    """The best-tuned of a peer: in bfloat16 where that is fast."""
    short = _in_bfloat16(tuned, best)
    return short if short.gap is None else tuned


def _under_compile(tuned: Variant, best: Runtime, asked: bool) -> Variant:
    """The best-tuned peer under torch.compile."""
    variant = _fastest(tuned, best)
    return replace(
        variant,
        name=f"{variant.name} compiled",
        compiled=True,
        gap=None if asked else "left out: --compile measures it, in minutes",
    )

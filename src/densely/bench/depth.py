"""How what is kept for the backward pass grows with depth: a line, or the square."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from densely.bench import peers, plain_nets
from densely.bench.compare import reason
from densely.bench.kept import kept_bytes
from densely.bench.nets import NETS
from densely.bench.progress import Progress
from densely.bench.trial import make_trial
from densely.bench.variants import Variant
from densely.models.registry import build_model
from densely.runtime import Runtime, choose_runtime

#: L of DenseNet-BC with growth rate 12: the paper's 100 and 250, and two more.
DEPTHS = (40, 100, 160, 250)
BATCH = 2
NOTE = "DenseNet-BC, growth rate 12, float32, images of 3x32x32; torchvision's with a 3x3 stem."


@dataclass(frozen=True)
class DepthSeries:
    """Bytes kept by networks of several depths.

    Args:
        name: what the picture calls it.
        kind: "ours" or "peer".
        depths: layers with weights, L.
        kept_bytes_per_image: one for each depth; empty where `gap` says why.
        gap: why there are no figures.
    """

    name: str
    kind: str
    depths: tuple[int, ...]
    kept_bytes_per_image: tuple[int, ...] = ()
    gap: str | None = None

    @property
    def exponent(self) -> float | None:
        """The p of bytes ~ L^p: 1 is linear in depth, 2 quadratic."""
        if len(self.kept_bytes_per_image) < 2:
            return None
        return fitted_exponent(self.depths, self.kept_bytes_per_image)

    def relative(self) -> list[float]:
        """Bytes over those of the shallowest network."""
        return [value / self.kept_bytes_per_image[0] for value in self.kept_bytes_per_image]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        exponent = self.exponent
        return {
            "kind": self.kind,
            "gap": self.gap,
            "kept_bytes_per_image": list(self.kept_bytes_per_image),
            "relative_to_shallowest": [round(value, 3) for value in self.relative()],
            "exponent": None if exponent is None else round(exponent, 4),
        }


def fitted_exponent(depths: Sequence[int], values: Sequence[float]) -> float:
    """Slope of log(value) over log(depth), by least squares."""
    x = [math.log(depth) for depth in depths]
    y = [math.log(value) for value in values]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / sum(
        (a - x_mean) ** 2 for a in x
    )


def depth_series(
    device: str, progress: Progress, depths: tuple[int, ...] = DEPTHS
) -> list[DepthSeries]:
    """Count what is kept in float32, for densely and its peers, at each depth."""
    ours = choose_runtime(device, "float32")
    shipped = Runtime(ours.device, "float32", "contiguous")
    lines: list[tuple[str, Callable[[int], nn.Module], Runtime, str]] = [
        ("densely", partial(_densely, fused=True), ours, "ours"),
        ("densely, plain path", partial(_densely, fused=False), ours, "ours"),
        ("plain net", plain_nets.bc_net, shipped, "peer"),
        ("plain net checkpointed", partial(plain_nets.bc_net, checkpointed=True), shipped, "peer"),
        ("torchvision", peers.torchvision_bc, shipped, "peer"),
        (
            "torchvision memory_efficient",
            partial(peers.torchvision_bc, memory_efficient=True),
            shipped,
            "peer",
        ),
    ]
    progress.stage("memory against depth", len(lines))
    found = []
    for name, build, runtime, kind in lines:
        progress.turn(name)
        try:
            kept = tuple(_kept(partial(build, depth), runtime) for depth in depths)
            found.append(DepthSeries(name, kind, depths, kept))
        except Exception as error:  # whatever somebody else's code may raise
            if kind == "ours":
                raise
            found.append(DepthSeries(name, kind, depths, gap=reason(error)))
    return found


def _densely(depth: int, fused: bool) -> nn.Module:
    return build_model("densenet_bc_100_12", block_config=3 * ((depth - 4) // 6,), fused=fused)


def _kept(build: Callable[[], nn.Module], runtime: Runtime) -> int:
    trial = make_trial(Variant("", build, runtime), NETS["bc_100_12"], "train", BATCH)
    return kept_bytes(trial) // BATCH

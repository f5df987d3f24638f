"""Networks so small that a benchmark of them takes no time."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from densely.bench.nets import Net
from densely.bench.variants import Variant
from densely.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), "float32", "contiguous")
NET = Net("d2l", "d2l", 1, 4, 10, 3, "plain net")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 10))


class Noting(nn.Module):
    """Writes its name down whenever it runs."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.inner, self.name, self.log = mlp(), name, log

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(self.name)
        return self.inner(x)


def failing(error: Exception) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        raise error

    return build


def entrants(log: list[str]) -> list[Variant]:
    missing = ModuleNotFoundError("No module named 'timm'", name="timm")
    return [
        Variant("densely", lambda: Noting("densely", log), RUNTIME, "ours"),
        Variant("plain net", lambda: Noting("plain net", log), RUNTIME),
        Variant("timm", failing(missing), RUNTIME),
        Variant("compiled", failing(AssertionError("was built")), RUNTIME, gap="left out"),
    ]

"""Small DenseNets of other packages, with weights and statistics that hide no mistake."""

import copy
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peers
import pytest
import torch
from torch import Tensor, nn

from densely.fused import accelerate


class Result(NamedTuple):
    """What one step of a net makes: its output, all gradients, and its statistics after it."""

    output: Tensor
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]


BLOCKS = (2, 3, 2, 2)


def torchvision(
    drop_rate: float = 0.0, blocks: tuple[int, ...] = BLOCKS, **kwargs: object
) -> nn.Module:
    peers.torchvision()
    from torchvision.models.densenet import DenseNet

    return DenseNet(8, blocks, 16, 2, drop_rate, num_classes=5, **kwargs)


def timm(drop_rate: float = 0.0, blocks: tuple[int, ...] = BLOCKS, **kwargs: object) -> nn.Module:
    peers.timm()
    from timm.models.densenet import DenseNet

    return DenseNet(8, blocks, num_classes=5, bn_size=2, proj_drop_rate=drop_rate, **kwargs)


def monai(dims: int, drop_rate: float = 0.0) -> nn.Module:
    return peers.monai_networks().DenseNet(dims, 3, 5, 16, 8, (2, 3), 2, dropout_prob=drop_rate)


def torchxrayvision(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """`torchxrayvision.models` alone: the package itself wants parts that we have no use for."""
    peers.torchvision()
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None or spec.origin is None:
        pytest.skip("TorchXRayVision is not installed")
    package = types.ModuleType("torchxrayvision")
    package.__path__ = [str(Path(spec.origin).parent)]
    monkeypatch.setitem(sys.modules, "torchxrayvision", package)
    for part in ("datasets", "utils"):
        package.__dict__[part] = types.ModuleType(f"torchxrayvision.{part}")
        monkeypatch.setitem(sys.modules, f"torchxrayvision.{part}", package.__dict__[part])
    if importlib.util.find_spec("requests") is None:
        monkeypatch.setitem(sys.modules, "requests", types.ModuleType("requests"))
    package.__dict__["datasets"].default_pathologies = ["a", "b"]
    monkeypatch.delitem(sys.modules, "torchxrayvision.models", raising=False)
    with warnings.catch_warnings():
        return importlib.import_module("torchxrayvision.models")


class Case(NamedTuple):
    make: Callable[..., nn.Module]
    shape: tuple[int, ...]


CASES = {
    "torchvision": Case(torchvision, (4, 3, 64, 48)),
    "timm": Case(timm, (4, 3, 64, 48)),
    "timm, deep stem": Case(lambda p=0.0: timm(p, stem_type="deep"), (4, 3, 64, 48)),
    "MONAI 1D": Case(lambda p=0.0: monai(1, p), (6, 3, 70)),
    "MONAI 2D": Case(lambda p=0.0: monai(2, p), (4, 3, 40, 32)),
    "MONAI 3D": Case(lambda p=0.0: monai(3, p), (3, 3, 18, 20, 22)),
}


def shuffle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give all parameters and statistics values of their own; in float64."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.weight is not None:
                    module.weight.uniform_(-1.5, 1.5, generator=generator)
                    module.bias.normal_(generator=generator)
                if module.running_mean is not None:
                    module.running_mean.normal_(generator=generator)
                    module.running_var.uniform_(0.5, 2, generator=generator)
                    module.num_batches_tracked.fill_(3)
            elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                fan_in = module.weight[0].numel()
                module.weight.normal_(std=(2 / fan_in) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(generator=generator)
    return model


def pair(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A net with shuffled weights as it was, and the same one accelerated."""
    original = shuffle(net)
    accelerated = copy.deepcopy(original)
    assert accelerate(accelerated).left_alone == {}
    return original, accelerated


def images(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def step(model: nn.Module, x: Tensor, *, train: bool | None = True) -> Result:
    """Forward and backward of a loss that all outputs take part in; None leaves modes alone."""
    if train is not None:
        model.train(train)
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    output = model(x)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    (output * weights.to(output.device)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    grads["input"] = x.grad
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    return Result(output.detach(), {n: g.clone() for n, g in grads.items()}, buffers)


def assert_same(got: Result, wanted: Result) -> None:
    """Equal to 1e-10, in float64; the gradients are those of the same parameters."""
    for a, b in (
        ({"output": got.output}, {"output": wanted.output}),
        (got.grads, wanted.grads),
        (got.buffers, wanted.buffers),
    ):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(
                a[name], b[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )

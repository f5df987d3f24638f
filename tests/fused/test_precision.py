"""Backward keeps the dtypes of forward, in whatever region of autocast it is called."""

from collections.abc import Callable

import pytest
import torch
from image_stem_cases import CASES, build, call
from torch import Tensor

from densely.fused import backend, image_stem, kernels
from densely.models.registry import build_model


def assert_alike(forward: Callable[[], tuple[Tensor, list[Tensor]]]) -> None:
    """Gradients of the same bits, with `backward()` in a region of autocast and outside of one."""
    found = []
    for inside in (False, True):
        output, learnt = forward()
        loss = (output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found.append(torch.autograd.grad(loss, learnt, retain_graph=True))
            found.append(torch.autograd.grad(loss, learnt, create_graph=True))
    first, second, *others = found
    for one, other in zip((first, second), others, strict=True):
        assert all(map(torch.equal, one, other))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in first)


@pytest.mark.parametrize("name", kernels.available())
def test_of_a_whole_body_in_float32(name: str) -> None:
    torch.manual_seed(0)
    body = build_model("densenet_bc_22_12", num_classes=4).features
    state = {key: value.clone() for key, value in body.state_dict().items()}
    images = torch.randn(2, 3, 12, 12, requires_grad=True)

    def forward() -> tuple[Tensor, list[Tensor]]:
        body.load_state_dict(state)
        with kernels.use(name):
            return body(images), [images, *body.parameters()]

    before = backend.fused_calls.total()
    assert_alike(forward)
    assert backend.fused_calls.total() > before


def test_of_a_stem_that_begins_with_images() -> None:
    def forward() -> tuple[Tensor, list[Tensor]]:
        tree = build(CASES["bias"], torch.float32)
        learnt = [tree.layers.conv.weight, tree.layers.conv.bias, tree.layers.norm.weight]
        learnt = [tensor.detach().requires_grad_() for tensor in learnt]
        weight, bias, scale = learnt
        layers = tree.layers._replace(
            conv=tree.layers.conv._replace(weight=weight, bias=bias),
            norm=tree.layers.norm._replace(weight=scale),
        )
        return call(image_stem, CASES["bias"], tree._replace(layers=layers)), learnt

    assert_alike(forward)

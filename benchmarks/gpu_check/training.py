"""A batch of a net, and the step that trains on it, as the stages share them."""

import torch
from torch import Tensor, nn

from densely.runtime import Runtime
from densely.training.captured import TrainingStep, training_step
from gpu_check.setting import CheckedNet


def batch_for(net: CheckedNet, runtime: Runtime, count: int) -> tuple[Tensor, Tensor]:
    """Random images in the runtime's layout, and their labels."""
    shape = (count, net.in_channels, net.image_size, net.image_size)
    images = runtime.layout(torch.randn(shape, device=runtime.device))
    return images, torch.randint(0, net.num_classes, shape[:1], device=runtime.device)


def step_for(
    model: nn.Module,
    runtime: Runtime,
    images: Tensor,
    labels: Tensor,
    *,
    captured: bool,
    lr: float = 0.01,
    one_kernel: bool = True,
) -> TrainingStep:
    """A step of SGD with momentum; `one_kernel` of PyTorch's, on a GPU, or many."""
    fused = one_kernel and runtime.device.type == "cuda"
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=fused or None)
    if captured:
        return training_step(model, optimizer, runtime, images, labels)
    return TrainingStep(model, optimizer, runtime)

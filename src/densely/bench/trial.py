"""A variant made ready to take its turns: network, images, and the step that is timed."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from densely.bench.nets import Net
from densely.bench.variants import Variant
from densely.errors import TrainingError
from densely.runtime import Runtime

#: Steps before any is timed: kernels are built, compilers run, primitives cached.
WARM_UP = 2


@dataclass
class Trial:
    """A variant with its network on the device and one batch of images, the same for all.

    Args:
        model: the network, on its device, in its layout and mode.
        runtime: precision, and where things are.
        images: [N, C, H, W], in the layout.
        labels: [N].
        optimizer: of a network that trains; None for inference.
    """

    model: nn.Module
    runtime: Runtime
    images: Tensor
    labels: Tensor
    optimizer: torch.optim.Optimizer | None = None

    def step(self) -> Tensor:
        """One training step, which gives the loss, or one inference, the logits."""
        if self.optimizer is None:
            with torch.inference_mode(), self.runtime.autocast():
                logits: Tensor = self.model(self.images)
            return logits
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss

    def warm_up(self, steps: int = WARM_UP) -> None:
        """Run some steps untimed.

        Raises:
            TrainingError: the result is not finite: what computes nonsense is not worth a time.
        """
        for _ in range(steps):
            result = self.step()
        if not bool(torch.isfinite(result.detach()).all()):
            raise TrainingError("loss or logits are not finite")

    def images_per_s(self, steps: int) -> float:
        """Time some steps in a row."""
        self._synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        self._synchronize()
        seconds = time.perf_counter() - begin
        self.model.zero_grad(set_to_none=True)  # no memory held while others have their turn
        return len(self.images) * steps / seconds

    def loss(self) -> Tensor:
        """The forward pass up to the loss."""
        with self.runtime.autocast():
            logits = self.model(self.images)
        return nn.functional.cross_entropy(logits.float(), self.labels)

    def _synchronize(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)


def make_trial(variant: Variant, net: Net, mode: str, batch: int) -> Trial:
    """Make a variant ready.

    Args:
        variant: what to run, and how.
        net: the network that it is a variant of.
        mode: "train" or "inference".
        batch: images of a step.
    """
    torch.manual_seed(0)
    model = variant.runtime.place(variant.build())
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(
        batch, net.in_channels, net.image_size, net.image_size, generator=generator
    )
    labels = torch.randint(0, net.num_classes, (batch,), generator=generator)
    model.train(mode == "train")
    runs: nn.Module = torch.compile(model) if variant.compiled else model  # type: ignore[assignment]
    device = variant.runtime.device
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return Trial(
        runs,
        variant.runtime,
        variant.runtime.layout(images.to(device)),
        labels.to(device),
        optimizer if mode == "train" else None,
    )

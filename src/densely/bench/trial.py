"""A variant made ready to take its turns: network, images, and the step that is timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from densely.bench.nets import Net
from densely.bench.variants import Variant
from densely.cuda_graphs import record_graph
from densely.errors import TrainingError
from densely.runtime import Runtime
from densely.training.captured import training_step

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
        captured: whether steps are replays of a CUDA graph, which the first one records.
        tries_kernels: whether cuDNN tries its kernels in the first step and keeps to the fastest.
    """

    model: nn.Module
    runtime: Runtime
    images: Tensor
    labels: Tensor
    optimizer: torch.optim.Optimizer | None = None
    captured: bool = False
    tries_kernels: bool = False
    _replay: Callable[[], Tensor] | None = field(default=None, init=False)

    def step(self) -> Tensor:
        """One training step, which gives the loss, or one inference, the logits."""
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self.tries_kernels
        try:
            if not self.captured:
                return self._launched()
            if self._replay is None:
                self._replay = self._recorded()
            return self._replay()
        finally:
            torch.backends.cudnn.benchmark = before

    def _launched(self) -> Tensor:
        """A step, kernel after kernel."""
        if self.optimizer is None:
            with torch.inference_mode(), self.runtime.autocast():
                logits: Tensor = self.model(self.images)
            return logits
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss

    def _recorded(self) -> Callable[[], Tensor]:
        """A step as one CUDA graph; one that trains gives the sum of all losses so far."""
        if self.optimizer is None:
            graph, logits = record_graph(self._launched, self.runtime.device)

            def replay() -> Tensor:
                graph.replay()
                return logits

            return replay
        step = training_step(self.model, self.optimizer, self.runtime, self.images, self.labels)
        if not step.captured:
            raise TrainingError("could not be captured in a CUDA graph; the log says why")

        def train() -> Tensor:
            step(self.images, self.labels)
            return step.loss_sum

        return train

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
        """Time some steps in a row, after one that counts for nothing.

        That one pays for what the variant before has left in caches and in the allocator: after
        one that holds a gigabyte it takes half as long again.
        """
        self.step()
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
        variant.captured,
        variant.tries_kernels,
    )

"""Inference on one batch again and again, as it comes or as a CUDA graph."""

import torch
from torch import Tensor, nn

from densely.runtime import Runtime
from densely.training.captured import record_graph


class InferenceStep:
    """Logits of images that stay where they are.

    Args:
        model: in eval mode, on the runtime's device, in its layout.
        runtime: device and precision.
        images: [N, C, H, W].
        capture: as a CUDA graph, where there is a GPU.
    """

    def __init__(self, model: nn.Module, runtime: Runtime, images: Tensor, capture: bool) -> None:
        self.model, self.runtime, self.images = model, runtime, images
        self.captured = capture and runtime.device.type == "cuda"
        if self.captured:
            self._graph, self._logits = record_graph(self._uncached, runtime.device)

    def __call__(self) -> None:
        if self.captured:
            self._graph.replay()
        else:
            self._run(cached=True)

    def _uncached(self) -> Tensor:
        return self._run(cached=False)

    def _run(self, cached: bool) -> Tensor:
        autocast = torch.autocast(
            self.runtime.device.type,
            torch.bfloat16,
            enabled=self.runtime.precision == "bfloat16",
            cache_enabled=cached,
        )
        with torch.inference_mode(), autocast:
            logits: Tensor = self.model(self.images)
        return logits

"""The forward pass without gradients; on a GPU one launch, as a CUDA graph, once a size recurs.

A DenseNet's forward pass is hundreds of short kernels, which a fast GPU runs in less time than
Python takes to launch them. A graph is of one size of batch, and batches come in any: they are
filled up to the next power of two, a graph for each of these. That is the same function, since in
eval mode no image of a batch knows of the others.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from densely.cuda_graphs import compile_kernels_of, one_at_a_time, record_graph
from densely.errors import first_line
from densely.runtime import Runtime

_log = logging.getLogger(__name__)


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    outputs: Tensor


class Forward:
    """`model(inputs)` without gradients, replayed where there is a GPU.

    The first batch of a size runs kernel after kernel, as many sizes come only once; the second
    one is recorded. What stands in the way of that is logged, and nothing is recorded any more.

    Args:
        model: on the runtime's device, in its layout. Its tensors may change their values
            afterwards, but must remain the same tensors.
        runtime: device and precision.
        training: run in train mode, by the statistics of each batch, and no batch is filled up.
            Settings of the model, such as momentum, are then fixed by the recording.

    Attributes:
        records: whether recurring sizes are recorded.
    """

    def __init__(self, model: nn.Module, runtime: Runtime, *, training: bool = False) -> None:
        self.model, self.runtime, self.training = model, runtime, training
        self._parts = list(model.modules())  # to walk through the model takes as long as a graph
        self._fills_up = not training and not _mixes_images(model)
        self.records = runtime.device.type == "cuda"
        self._graphs: dict[tuple[Any, ...], _Recorded | None] = {}
        self._pool: Any = None

    @property
    def recorded_sizes(self) -> list[int]:
        """Images in the batches that graphs are there for."""
        return [len(recorded.inputs) for recorded in self._graphs.values() if recorded]

    def __call__(self, inputs: Tensor) -> Tensor:
        """Outputs in float32 for inputs [N, ...] on the device, in its layout.

        The mode of the model is put back. Threads may call it at the same time where the model
        has the mode already, and on a GPU from one stream.
        """
        if not self.records:
            return self.launched(inputs)
        with one_at_a_time, self._in_mode():  # threads share what a graph reads and writes
            recorded = self._recorded(inputs)
            return _replay(recorded, inputs) if recorded else _own(self._launch(inputs))

    def filled(self, count: int) -> int:
        """The size of the batch that so many images recur in."""
        return 1 << (count - 1).bit_length() if self._fills_up else count

    def launched(self, inputs: Tensor) -> Tensor:
        """The same, kernel after kernel; it does not count as a batch of its size."""
        with self._in_mode():
            return _own(self._launch(inputs))

    @contextmanager
    def _in_mode(self) -> Iterator[None]:
        # In train mode some parts may be frozen: the model's own mode says enough.
        if self.model.training if self.training else not any(p.training for p in self._parts):
            yield
            return
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.train(self.training)
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def _recorded(self, inputs: Tensor) -> _Recorded | None:
        """The graph for such batches; None for the first of them, and where none can be."""
        shape, size = inputs.shape[1:], self.filled(len(inputs))
        key = (size, shape, inputs.dtype)
        if key not in self._graphs:
            self._graphs[key] = None
            if not self.training:  # else the norms would learn from it
                compile_kernels_of(lambda: self._launch(inputs))
        elif self._graphs[key] is None:
            try:
                self._graphs[key] = self._record(inputs.new_zeros((size, *shape)))
            except Exception as error:  # CUDA, cuDNN, the allocator and Triton raise different ones
                _log.warning(
                    "inference runs without a CUDA graph, slower than it could: %s",
                    first_line(error),
                )
                self.records = False
        return self._graphs[key]

    def _record(self, inputs: Tensor) -> _Recorded:
        inputs = self.runtime.layout(inputs)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, outputs = record_graph(lambda: self._launch(inputs), inputs.device, self._pool)
        return _Recorded(graph, inputs, outputs)

    def _launch(self, inputs: Tensor) -> Tensor:
        # Not inference mode in training: what it makes could not be written to afterwards.
        without_gradients = torch.no_grad() if self.training else torch.inference_mode()
        # No copies of weights from before a recording: it would replay them stale.
        with without_gradients, self.runtime.autocast(cache=False):
            outputs: Tensor = self.model(inputs)
        return outputs


def _replay(recorded: _Recorded, inputs: Tensor) -> Tensor:
    count = len(inputs)
    recorded.inputs[:count].copy_(inputs)
    recorded.graph.replay()
    return _own(recorded.outputs[:count])


def _own(outputs: Tensor) -> Tensor:
    """A copy in float32, which no replay writes over, and which is free of inference mode."""
    return outputs.to(torch.float32, copy=True)


def _mixes_images(model: nn.Module) -> bool:
    """Whether a norm goes by the statistics of the batch in eval mode too."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
        for module in model.modules()
    )

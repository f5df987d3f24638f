"""Bytes that a forward pass keeps for the backward one."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from densely.bench.trial import Trial


def kept_bytes(trial: Trial) -> int:
    """Bytes of all that autograd saves, whole net, up to the loss.

    Parameters, buffers, images and labels are there anyway and do not count; their copies in
    another precision do.
    """
    there = [*trial.model.parameters(), *trial.model.buffers(), trial.images, trial.labels]
    return saved_bytes(trial.loss, there)


def saved_bytes(compute: Callable[[], Tensor], there: Iterable[Tensor]) -> int:
    """Bytes that autograd saves while `compute` runs, but for the tensors that are there anyway.

    Each storage counts once, whole, however many views of it are saved, and whoever saves it:
    operators of PyTorch, densely's own, checkpoints (their inputs), compiled code.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in there}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the storage lives on, so that no other takes its address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    del result
    return sum(found.values())

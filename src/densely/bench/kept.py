"""Bytes that a forward pass keeps for the backward one."""

import torch
from torch import Tensor

from densely.bench.trial import Trial


def kept_bytes(trial: Trial) -> int:
    """Bytes of all that autograd saves, whole net, up to the loss.

    Each storage counts once, whole, however many views of it are saved, and whoever saves it:
    operators of PyTorch, densely's own, checkpoints (their inputs), compiled code. Parameters,
    buffers, images and labels are there anyway and do not count; their copies in another
    precision do.
    """
    there = [*trial.model.parameters(), *trial.model.buffers(), trial.images, trial.labels]
    known = {tensor.untyped_storage().data_ptr() for tensor in there}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the storage lives on, so that no other takes its address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trial.loss()
    del loss
    return sum(found.values())

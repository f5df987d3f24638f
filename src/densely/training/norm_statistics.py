"""Statistics of batch norms for evaluation, averaged over training batches with fixed weights.

The running statistics of batch normalisation are a moving average over the last steps, made with
weights that each step changed. At a high constant learning rate they lag behind the weights, and
the accuracy in eval mode jumps about from epoch to epoch although the network itself gets better.
Averaging over a number of batches with the weights as they now are ends that. Training does not
notice: it normalises by the batch.

Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3, "precise" statistics.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from densely.runtime import Runtime


def average_norm_statistics(model: nn.Module, inputs: Iterable[Tensor], runtime: Runtime) -> None:
    """Set the running mean and variance of each batch norm to their averages over `inputs`.

    Each batch counts the same. Weights, the count of batches and the mode of `model` stay.

    Args:
        model: with batch norms that track running statistics.
        inputs: batches as the model takes them, [N, C, H, W].
        runtime: where and how to compute.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    kept = [(norm.momentum, int(norm.num_batches_tracked or 0)) for norm in norms]
    was_training = model.training
    model.train()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # PyTorch's word for a plain average
        with torch.no_grad(), runtime.autocast():
            for batch in inputs:
                model(batch)
    finally:
        model.train(was_training)
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(count)

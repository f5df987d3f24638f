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

from densely.forward import Forward


def average_norm_statistics(forward: Forward, inputs: Iterable[Tensor]) -> None:
    """Set the running mean and variance of each batch norm to their averages over `inputs`.

    Each batch counts the same. Weights, momentum and the count of batches stay.

    Args:
        forward: in train mode; used for nothing else. Where its model has no batch norms that
            track running statistics, nothing is done.
        inputs: batches as the model takes them, [N, C, H, W]; at least one.
    """
    norms = [
        module
        for module in forward.model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        return
    running = [getattr(norm, name) for norm in norms for name in ("running_mean", "running_var")]
    counts = [norm.get_buffer("num_batches_tracked") for norm in norms]
    momenta, counted = [norm.momentum for norm in norms], [count.clone() for count in counts]
    sums, batches = [torch.zeros_like(statistic) for statistic in running], 0
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = 1.0  # so that the running statistics are those of the batch
        for batch in inputs:
            forward(batch)
            torch._foreach_add_(sums, running)
            batches += 1
        torch._foreach_div_(sums, batches)
        torch._foreach_copy_(running, sums)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        torch._foreach_copy_(counts, counted)

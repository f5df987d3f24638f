"""A stem for other images than those it was trained on: its response is kept, never made up."""

import torch
from torch import Tensor


def adapt_stem(kernel: Tensor, in_channels: int) -> Tensor:
    """Fit the kernel of a first convolution to images of another number of channels.

    Channels are shared out in turn. With fewer than before, each new channel takes the sum of those
    it stands for; with more, those that stand for the same one take equal parts of it. Either way
    the sum over channels stays, so that an image whose channels are all alike (a grey picture,
    repeated) gives the same response as before, up to rounding.

    Args:
        kernel: [out, old, ...].
        in_channels: channels that the images will have.

    Returns:
        [out, in_channels, ...]; the kernel itself where nothing changes.
    """
    old = kernel.shape[1]
    if in_channels == old:
        return kernel
    if in_channels < old:
        return torch.stack(
            [kernel[:, j::in_channels].sum(dim=1) for j in range(in_channels)], dim=1
        )
    sharing = [len(range(j, in_channels, old)) for j in range(old)]
    return torch.stack([kernel[:, j % old] / sharing[j % old] for j in range(in_channels)], dim=1)

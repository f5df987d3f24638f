"""The blocks of the chapter, under the chapter's names, with lazy input channels.

Dive into Deep Learning, chapter 8.7, "Densely Connected Networks (DenseNet)". Each is the class
that the models use (`densely.models.densenet`), with the chapter's choices filled in:

    >>> import torch
    >>> from densely.chapter import DenseBlock, transition_block
    >>> X = torch.randn(4, 3, 8, 8)
    >>> Y = DenseBlock(2, 10)(X)
    >>> Y.shape
    torch.Size([4, 23, 8, 8])
    >>> transition_block(10)(Y).shape
    torch.Size([4, 10, 4, 4])

The complete net is `densely.create_model("d2l")`.
"""

from densely.models import densenet
from densely.models.parts import Parts

_WITH_BIAS = Parts(bias=True)

__all__ = ["DenseBlock", "conv_block", "transition_block"]


def conv_block(num_channels: int) -> densenet.DenseLayer:
    """BN - ReLU - 3x3 convolution: [N, C, H, W] to [N, num_channels, H, W]."""
    return densenet.DenseLayer(None, num_channels, bn_size=None, parts=_WITH_BIAS)


class DenseBlock(densenet.DenseBlock):
    """Concatenates input and output of each convolution: C to C + num_convs * num_channels."""

    def __init__(self, num_convs: int, num_channels: int) -> None:
        super().__init__(num_convs, None, num_channels, bn_size=None, parts=_WITH_BIAS)


def transition_block(num_channels: int) -> densenet.Transition:
    """BN - ReLU - 1x1 convolution - 2x2 average pooling: to [N, num_channels, H/2, W/2]."""
    return densenet.Transition(None, num_channels, parts=_WITH_BIAS)

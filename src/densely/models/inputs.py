"""What a network is given: whether it can be taken at all."""

from collections.abc import Sequence

from torch import Tensor
from torch.fx import Proxy

from densely.errors import ShapeError

_AXES = {1: "L", 2: "H, W", 3: "D, H, W"}


def check_input(x: Tensor, in_channels: int, least: Sequence[int]) -> None:
    """Hold images [N, in_channels, ...] against the smallest that a network takes, an axis each.

    torch.fx traces with what has no shape yet: nothing is held against that.

    Raises:
        ShapeError: they have other axes or channels, or would shrink to nothing.
    """
    if isinstance(x, Proxy):
        return
    if x.dim() != 2 + len(least) or x.shape[1] != in_channels:
        raise ShapeError(
            f"input of shape {list(x.shape)}: expected [N, {in_channels}, {_AXES[len(least)]}]"
        )
    if any(size < smallest for size, smallest in zip(x.shape[2:], least, strict=True)):
        given, needed = ("x".join(map(str, sizes)) for sizes in (x.shape[2:], least))
        raise ShapeError(
            f"images of {given} pixels would shrink to nothing: this model needs at least {needed}"
        )

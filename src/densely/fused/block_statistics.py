"""Statistics that a fused block leaves with its output, for the step that reads it next.

They are no attribute of the tensor, which would be saved, copied and handed on with it.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Moments(NamedTuple):
    """Mean and biased variance of each channel over a batch, of the accumulation dtype."""

    mean: Tensor
    var: Tensor


#: By the output: its moments, and what shows that it is as it was.
_left: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def leave(output: Tensor, moments: Moments) -> None:
    """Keep the moments of a block's output, as long as it lives."""
    if not torch.compiler.is_compiling() and not output.is_inference():
        _left[output] = moments, _state(output)


def moments_of(x: Tensor) -> Moments | None:
    """What a fused block has left with its output, if nobody has changed it since."""
    if torch.compiler.is_compiling():
        return None
    moments, state = _left.get(x, (None, None))  # type: ignore[no-untyped-call]
    return moments if moments is not None and state == _state(x) else None


def leave_with_alias(x: Tensor, alias: Tensor) -> None:
    """Let another tensor of the same memory have what was left with x."""
    moments = moments_of(x)
    if moments is not None:
        leave(alias, moments)


def _state(x: Tensor) -> tuple[int, int]:
    """Another one where a tensor was written to, or given other memory by `x.data = y`."""
    return x._version, x.untyped_storage()._cdata

"""Which code runs the four steps of a DenseNet: the fused one wherever it is the same function.

Accelerated modules look each step up here when they run. What the fused code does not cover runs
as plain PyTorch, with the same result: `obstacle` says why.
"""

import logging
import operator
from collections import Counter
from collections.abc import Iterable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from densely.fused import block, companions, plain
from densely.fused.bare_tensors import on_bare_tensors, why_plain
from densely.fused.block_statistics import Moments, leave, moments_of
from densely.fused.image_stem import image_stem as fused_image_stem
from densely.fused.image_stem import made_size
from densely.fused.kernels import makes_image_stem, missing
from densely.fused.plain import Conv, FirstConv, Layer, Norm, takes_batch

_log = logging.getLogger(__name__)
_logged: set[str] = set()

#: Calls that ran fused, by the kind of step; code being compiled is not counted.
fused_calls: Counter[str] = Counter()

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@on_bare_tensors
def dense_block(x: Tensor, layers: tuple[Layer, ...]) -> Tensor:
    """`plain.dense_block`."""
    convs = [step.conv for layer in layers for step in layer]
    norms = [step.norm for layer in layers for step in layer]
    why = obstacle(x, norms, convs) or _misfit_of_block(x.shape[1], layers)
    if why is not None:
        _note_plain(why)
        return plain.dense_block(x, layers)
    _note_fused("dense block")
    output, mean, var = block.dense_block(x, layers)
    if mean.numel():
        leave(output, Moments(mean, var))
    return output


@on_bare_tensors
def transition(x: Tensor, norm: Norm, conv: Conv, window: tuple[int, ...]) -> Tensor:
    """`plain.transition`."""
    why = obstacle(x, [norm], [conv]) or _misfit(x.shape[1], norm, conv) or _too_small(x, window)
    if why is not None:
        _note_plain(why)
        return plain.transition(x, norm, conv, window)
    _note_fused("transition")
    return companions.transition(x, norm, conv, window, moments_of(x))


@on_bare_tensors
def stem(x: Tensor, norm: Norm, stride: tuple[int, ...]) -> Tensor:
    """`plain.stem`."""
    why = obstacle(x, [norm], []) or _misfit(x.shape[1], norm, None)
    if why is not None:
        _note_plain(why)
        return plain.stem(x, norm, stride)
    _note_fused("stem")
    return companions.stem(x, norm, stride)


@on_bare_tensors
def image_stem(images: Tensor, conv: FirstConv, norm: Norm, stride: tuple[int, ...]) -> Tensor:
    """`plain.image_stem`; the convolution by itself where it is not worth being made again."""
    dtype, device = images.dtype, images.device.type
    if torch.is_autocast_enabled(device) and dtype in _DTYPES and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if (
        images.requires_grad
        or not makes_image_stem(images, dtype, conv.weight)
        or obstacle(x := images.to(dtype), [norm], [conv])  # first: it knows of exports
        or _misfit(conv.weight.shape[0], norm, None)
        or not _one_or_more(images, conv, norm)
    ):
        return stem(plain.first_convolution(images, conv), norm, stride)
    _note_fused("image stem")
    return fused_image_stem(x, conv, norm, stride)


@on_bare_tensors
def final(x: Tensor, norm: Norm) -> Tensor:
    """`plain.final`."""
    why = obstacle(x, [norm], []) or _misfit(x.shape[1], norm, None)
    if why is not None:
        _note_plain(why)
        return plain.final(x, norm)
    _note_fused("final norm")
    return companions.final(x, norm, moments_of(x))


def obstacle(x: Tensor, norms: Iterable[Norm], convs: Iterable[Conv | FirstConv]) -> str | None:
    """Why a step must run as plain PyTorch; None if it may run fused."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    # The flag itself: `is_exporting()` of PyTorch 2.10 and 2.11 is true in all compiled code.
    if torch.compiler._is_exporting_flag or tracing:
        return "is being exported: plain operators are what other programs know"
    if not torch.compiler.is_compiling():
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "runs under a transform of torch.func"
        if forward_ad._current_level >= 0:
            return "runs under forward-mode differentiation"
        if why := why_plain(x):
            return why
    device = x.device
    if device.type != "cpu" and (device.type != "cuda" or missing(device)):
        return f"runs on {x.device.type}, for which there are no kernels yet"
    if x.layout != torch.strided:
        return f"reads a tensor of layout {x.layout}"
    if x.dtype not in _DTYPES:
        return f"reads {x.dtype}"
    if x.numel() == 0:
        return "reads no values"
    norms = list(norms)
    statistics = [id(norm.running_mean) for norm in norms if norm.running_mean is not None]
    if len(set(statistics)) < len(statistics):
        return "uses a norm twice"
    rows = x.numel() // x.shape[1]
    wide = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
    for norm in norms:
        if takes_batch(norm) and rows == 1:
            return "has one value a channel"
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if tensor is not None and (why := _why_not_beside(x, tensor, wide)):
                return f"has a norm {why}"
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    for conv in convs:
        if autocast and x.dtype != torch.get_autocast_dtype(x.device.type):
            return f"reads {x.dtype} under autocast"
        for tensor in (conv.weight, conv.bias):
            taken = wide if autocast else (x.dtype,)
            if tensor is not None and (why := _why_not_beside(x, tensor, taken)):
                return f"has a convolution {why}"
    return None


def _one_or_more(images: Tensor, conv: FirstConv, norm: Norm) -> bool:
    """Whether the convolution makes anything, and more than a value a channel for a batch's norm.

    PyTorch's own errors say more.
    """
    if images.dim() != 4 or images.shape[1] != conv.weight.shape[1]:
        return False
    height, width = made_size(images, conv)
    one = images.shape[0] * height * width == 1
    return min(height, width) >= 1 and not (takes_batch(norm) and one)


def _misfit_of_block(channels: int, layers: tuple[Layer, ...]) -> str | None:
    for layer in layers:
        width = channels
        for step in layer:
            if why := _misfit(width, step.norm, step.conv):
                return why
            width = step.conv.weight.shape[0]
        channels += width
    return None


def _misfit(channels: int, norm: Norm, conv: Conv | None) -> str | None:
    """Whether parts are for another number of channels; PyTorch's own error says more."""
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    widths = {vector.shape[0] for vector in vectors if vector is not None}
    widths |= {conv.weight.shape[1]} if conv else set()
    other = widths - {channels}
    return f"has parts for {min(other)} channels where it reads {channels}" if other else None


def _too_small(x: Tensor, window: tuple[int, ...]) -> str | None:
    """Whether maps have no room for a window; PyTorch's own error says more."""
    smaller = any(map(operator.lt, x.shape[2:], window))
    return "reads maps smaller than its pooling's window" if smaller else None


def _why_not_beside(x: Tensor, parameter: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """What keeps a parameter from being read beside x: all but a plain tensor of such a dtype."""
    if type(parameter) not in (Tensor, torch.nn.Parameter):
        return f"with a {type(parameter).__name__} in it"
    if parameter.device != x.device:
        return f"on {parameter.device} for maps on {x.device}"
    return None if parameter.dtype in dtypes else f"of {parameter.dtype} for {x.dtype}"


def _note_fused(kind: str) -> None:
    if not torch.compiler.is_compiling():
        fused_calls[kind] += 1


def _note_plain(why: str) -> None:
    if not torch.compiler.is_compiling() and why not in _logged:
        _logged.add(why)
        _log.info("runs as plain PyTorch: a step of a DenseNet %s", why)

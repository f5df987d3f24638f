"""The exact fused dense block: all features in one buffer, a backward of one pass a layer.

Forward. One channels-last buffer [rows, C_total] holds the block's input and, behind it, what each
layer makes; a layer reads the first C_l columns and writes its own. Mean and variance of a channel
do not depend on who reads it: they are taken when the channel is born and serve all later layers.
A batch norm is then x * scale + shift with a layer's own vectors, computed again wherever it is
needed. Kept for backward: the buffer, the outputs of the 1x1 convolutions, the statistics, those
vectors, and the weights in the dtype of the maps.

Backward. Let N be the rows, xhat = (x - mean) * rstd, and g_l the gradient of layer l's normalised
input y_l = weight_l * xhat + bias_l, after relu's mask. Batch norm's backward is linear in g_l, so
what reaches a channel from all of its readers is, with scale_l = weight_l * rstd,

    dx = total - a - (x - mean) * b         total = direct + sum_l scale_l * g_l
    a = sum_l scale_l * sum(g_l) / N        b = sum_l scale_l * rstd * sum(g_l * xhat) / N

where `direct` is the gradient of the block's output. The last layer's backward stores direct +
scale * g, or adds to `direct` itself if nobody else holds it (`densely.fused.ownership`); earlier
ones add. When a layer's turn comes all readers of its channels have been, and dx is formed once.
Norms in eval mode have constant statistics and add nothing to a and b. The sum of dx over the rows,
which a bias of the convolution wants, is that of `direct`: what comes through a norm in train mode
sums to zero, and through one in eval mode to scale_l * sum(g_l).

Source: Huang et al. (2017), section 3; the algebra is that of batch norm (Ioffe and Szegedy, 2015),
summed over readers.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from densely.fused import plain
from densely.fused.coefficients import in_places, like, update_running_statistics
from densely.fused.kernels import chosen
from densely.fused.kernels.operands import Affine, Pending, Space, side_by_side
from densely.fused.kernels.reference import accumulation_dtype, three_vectors, two_vectors
from densely.fused.operators import Operator
from densely.fused.ownership import owners, sole_owners
from densely.fused.packing import PackedStep, convert, pack, unpack
from densely.fused.precision import without_autocast
from densely.fused.second_order import gradients_with_gradients, plain_wanted
from densely.fused.zero_sums import is_marked, mark


class Outcome(NamedTuple):
    """A block's output, and the statistics of its channels (empty if no norm wanted them)."""

    output: Tensor
    mean: Tensor
    var: Tensor


def dense_block(x: Tensor, layers: tuple[plain.Layer, ...]) -> Outcome:
    """`plain.dense_block`, fused; updates the running statistics too.

    Args:
        x: [N, C, *space] in any layout, of the dtype in which to compute.
        layers: at least one; a step's convolution sees 1 place, or more along all axes.

    Returns:
        The output, in channels-last order, with mean and biased variance of its channels.
    """
    tensors, flags, numbers = pack(x, layers)
    needed = [tensor.requires_grad for tensor in (x, *tensors)]
    if torch.is_grad_enabled() and any(needed):
        output, _, *kept = _DenseBlock.apply(  # type: ignore[no-untyped-call]
            x, flags, numbers, needed, *tensors
        )
    else:
        output, *kept = dense_block_forward(x, tensors, flags, numbers, False)
    _update_running_statistics(layers, kept, x.numel() // x.shape[1])
    return Outcome(output, kept[0], kept[1])


def _update_running_statistics(
    layers: tuple[plain.Layer, ...], kept: list[Tensor], rows: int
) -> None:
    mean, var, _, *inner = kept
    inputs_of_later_steps = iter(inner)
    found = []
    for layer in layers:
        for i, step in enumerate(layer):
            if i > 0:
                _, inner_mean, inner_var = islice(inputs_of_later_steps, 3)
                found.append((step.norm, inner_mean, inner_var))
            else:
                channels = step.conv.weight.shape[1]
                found.append((step.norm, mean[:channels], var[:channels]))
    update_running_statistics(found, rows)


class _DenseBlock(torch.autograd.Function):
    """The two operators below as one differentiable function.

    All that is kept is saved through `save_for_backward`. The block's input is kept as the first
    channels of the output, under a name of its own among the outputs: a second backward brings the
    gradient of the input there, and of the output to the output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        flags: list[int],
        numbers: list[float],
        needed: list[bool],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        output, *kept = dense_block_forward(x, tensors, flags, numbers, True)
        # A compiler has no second backward, and allows no outputs that share memory.
        channels = 0 if torch.compiler.is_compiling() else x.shape[1]
        first = output[:, :channels].detach()
        ctx.save_for_backward(output, first, *kept, *tensors)
        ctx.num_kept, ctx.num_inputs = len(kept), x.shape[1]
        ctx.flags, ctx.numbers, ctx.needed = flags, numbers, needed
        ctx.sole_owners = () if torch.compiler.is_compiling() else sole_owners()
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        return output, first, *kept

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, of_first: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        if grad is None:
            return of_first, None, None, None, *(None for _ in ctx.needed[1:])
        output, first, *rest = ctx.saved_tensors
        kept, tensors = rest[: ctx.num_kept], rest[ctx.num_kept :]
        with without_autocast(grad):
            if plain_wanted(grad):
                found = _differentiable_backward(
                    grad, first, tensors, ctx.flags, ctx.numbers, ctx.needed
                )
            else:
                zero_sums = is_marked(grad)
                run: Callable[..., list[Tensor]] = dense_block_backward
                counted = owners(grad) if ctx.sole_owners else None
                if counted is not None and counted in ctx.sole_owners:
                    run = partial(_backward, may_write=True)  # as an operator may not
                found = run(
                    grad, output, kept, tensors, ctx.num_inputs, ctx.flags, ctx.numbers,
                    ctx.needed, zero_sums,
                )  # fmt: skip
                if ctx.needed[0] and zero_sums:
                    readers = unpack(tensors, ctx.flags, ctx.numbers)
                    if all(layer[0].training for layer in readers):
                        mark(found[0])
        grad_x, *grad_tensors = in_places(found, ctx.needed)
        if of_first is not None and grad_x is not None and first.numel():
            grad_x = grad_x + of_first
        return grad_x, None, None, None, *grad_tensors


@Operator
def dense_block_forward(
    x: Tensor,
    tensors: Sequence[Tensor],
    flags: Sequence[int],
    numbers: Sequence[float],
    keep: bool,
) -> list[Tensor]:
    """Output [N, C_total, *space]; mean and var [C_total]; affines; inner results; copies.

    The affines of all norms are [3, C of all]: see `_rooms`. Inner results are three for each later
    step of a layer: its input [rows, C], its mean and its var. The copies are of the convolutions'
    weights and biases, where these are of another dtype. Statistics are empty where no norm wants
    them; unless `keep`, so are affines and inputs, and there are no copies.
    """
    layers = unpack(tensors, flags, numbers)
    copies = convert(layers, x.dtype)
    space, kernels = Space(x.shape[0], tuple(x.shape[2:])), chosen(x)
    buffer, mean, var, affines = _allocate(x, layers, space, keep)
    rooms = iter(_rooms(affines, layers)) if keep else repeat(None)
    channels = x.shape[1]
    of_input = (mean[:channels], var[:channels]) if mean.numel() else None
    # Moments of what was made last, for its first reader to finish.
    left = kernels.place(space.matrix(x), buffer[:, :channels], of_input)
    constant: Iterator[Affine] | None = None  # at inference
    if not keep and not mean.numel():
        constant = iter(kernels.affines([step.norm((mean, var)) for step in chain(*layers)]))
    inner: list[Tensor] = []
    for layer in layers:
        features, moments = buffer[:, :channels], (mean[:channels], var[:channels])
        columns = slice(channels, channels + layer[-1].weight.shape[0])
        channels = columns.stop
        if constant and len(layer) == 2 and not _drops(layer):
            first, second = (step.convolution(next(constant), space) for step in layer)
            kernels.convolve_twice(features, first, second, buffer[:, columns])
            inner += [x.new_empty(0, layer[1].weight.shape[1]), *two_vectors(x, 0)]
            continue
        for step, following in zip(layer, [*layer[1:], None], strict=True):
            if following is None:
                out, out_moments = buffer[:, columns], (mean[columns], var[columns])
            else:
                width = step.weight.shape[0]
                out = x.new_empty(space.rows, width)
                out_moments = two_vectors(x, width if following.training else 0)
                inner += [out if keep else out.new_empty(0, width), *out_moments]
            wanted = out_moments if out_moments[0].numel() else None
            if constant:
                affine = next(constant)
            else:
                affine = kernels.affine(step.norm(moments), left, next(rooms))
            conv = step.convolution(affine, space)
            left = kernels.convolve(features, conv, out, wanted if step.mask is None else None)
            if step.mask is not None:
                left = kernels.place(step.drop(out), out, wanted)
            features, moments = out, out_moments
    kernels.finish(left)
    return [space.made(buffer), mean, var, affines, *inner, *(copies if keep else ())]


@dense_block_forward.register_fake
def _(
    x: Tensor,
    tensors: Sequence[Tensor],
    flags: Sequence[int],
    numbers: Sequence[float],
    keep: bool,
) -> list[Tensor]:
    layers = unpack(tensors, flags, numbers)
    copies = convert(layers, x.dtype)
    space = Space(x.shape[0], tuple(x.shape[2:]))
    buffer, mean, var, affines = _allocate(x, layers, space, keep)
    inner: list[Tensor] = []
    for _first, *later in layers:
        for step in later:
            width = step.weight.shape[1]
            inner.append(x.new_empty(space.rows if keep else 0, width))
            inner += two_vectors(x, width if step.training else 0)
    return [space.maps(buffer), mean, var, affines, *inner, *(copies if keep else ())]


@Operator
def dense_block_backward(
    grad: Tensor,
    output: Tensor,
    kept: Sequence[Tensor],
    tensors: Sequence[Tensor],
    num_inputs: int,
    flags: Sequence[int],
    numbers: Sequence[float],
    needed: Sequence[bool],
    zero_sums: bool,
) -> list[Tensor]:
    """Gradients of those of (x, *tensors) that need one, in this order.

    With `zero_sums` each channel of `grad` is known to sum to zero.
    """
    return _backward(
        grad, output, kept, tensors, num_inputs, flags, numbers, needed, zero_sums, may_write=False
    )


def _backward(
    grad: Tensor,
    output: Tensor,
    kept: Sequence[Tensor],
    tensors: Sequence[Tensor],
    num_inputs: int,
    flags: Sequence[int],
    numbers: Sequence[float],
    needed: Sequence[bool],
    zero_sums: bool,
    may_write: bool,
) -> list[Tensor]:
    """`dense_block_backward`; what is summed up may take the memory of `grad` if it `may_write`."""
    layers = unpack(tensors, flags, numbers)
    mean, var, affines, *inner = kept
    later = 3 * sum(len(layer) - 1 for layer in layers)
    convert(layers, output.dtype, inner[later:])
    del inner[later:]
    space, kernels = Space(output.shape[0], tuple(output.shape[2:])), chosen(output)
    buffer, direct = space.matrix(output), space.matrix(grad)
    rooms = _rooms(affines, layers)
    rows, columns = buffer.shape
    total = kernels.matrix(1, columns, buffer, kernels.total_dtype(buffer))
    adopted = may_write and (direct.dtype, direct.stride()) == (total.dtype, total.stride())
    total = direct if adopted else kernels.matrix(rows, columns, buffer, total.dtype)
    a, b = buffer.new_zeros(2, buffer.shape[1], dtype=accumulation_dtype(buffer))
    any_reader = adopted  # whose gradients are in the total
    grads: dict[int, Tensor] = {}

    def needs(step: PackedStep, name: str) -> bool:
        return name in step.places and needed[1 + step.places[name]]

    def arrived(columns: slice) -> Pending:
        """What reaches these channels from all of their readers and the block's output."""
        arriving = (total if any_reader else direct)[:, columns]
        if not mean.numel():
            return Pending(arriving, buffer[:, columns], None, None, None, None)
        return Pending(arriving, buffer[:, columns], None, mean[columns], a[columns], b[columns])

    sums_wanted = any(needs(layer[-1], "bias") for layer in layers)
    column_sums: Tensor | None = None  # for zeros
    if sums_wanted and not zero_sums:
        column_sums = kernels.column_sums(direct)
    zeros: list[Tensor] = []
    stop = buffer.shape[1]
    layers = layers[_first_needed(layers, needed) :]
    with kernels.putting_aside(buffer):
        for layer in reversed(layers):
            start = stop - layer[-1].weight.shape[0]
            upstream: Tensor | Pending = arrived(slice(start, stop))
            for n, step in reversed(list(enumerate(layer))):
                if step.mask is not None:
                    upstream = step.drop(kernels.form(upstream))
                if needs(step, "bias"):
                    following = layer[n + 1 :]
                    if step.mask is not None or (following and not following[0].training):
                        upstream = kernels.form(upstream)
                        grads[step.places["bias"]] = upstream.sum(0, dtype=a.dtype)
                    elif following or column_sums is None:  # the next norm takes the bias off
                        zeros.append(a.new_empty(step.weight.shape[0]))
                        grads[step.places["bias"]] = zeros[-1]
                    else:
                        grads[step.places["bias"]] = column_sums[start:stop].clone()
                if n == 0:
                    features, moments = buffer[:, :start], (mean[:start], var[:start])
                else:
                    features, *taken = inner[-3:]
                    moments = taken[0], taken[1]
                    del inner[-3:]
                affine = Affine.kept(rooms.pop(), step.norm(moments).mean, step.training)
                conv = step.convolution(affine, space)
                given = (upstream, features, conv, needs(step, "weight"))
                if n == 0:
                    base = None if any_reader else direct[:, :start]
                    grad_weight, norm = kernels.convolve_backward_add(
                        *given, total[:, :start], base, (a[:start], b[:start])
                    )
                    any_reader = True
                    if sums_wanted and not step.training:
                        if column_sums is None:
                            column_sums = a.new_zeros(columns)
                        column_sums[:start] += conv.affine.scale * norm.bias
                else:
                    grad_weight, norm, upstream = kernels.convolve_backward(*given)
                grads[step.places["norm_weight"]] = norm.weight
                grads[step.places["norm_bias"]] = norm.bias
                if grad_weight is not None:
                    grads[step.places["weight"]] = grad_weight
            stop = start
    if zeros:
        torch._foreach_zero_(zeros)
    found = []
    if needed[0]:
        to_x = kernels.form(arrived(slice(0, num_inputs))).contiguous()
        found.append(space.made(to_x))
    found += [like(grads[i], t) for i, t in enumerate(tensors) if needed[1 + i]]
    return found


@dense_block_backward.register_fake
def _(
    grad: Tensor,
    output: Tensor,
    kept: Sequence[Tensor],
    tensors: Sequence[Tensor],
    num_inputs: int,
    flags: Sequence[int],
    numbers: Sequence[float],
    needed: Sequence[bool],
    zero_sums: bool,
) -> list[Tensor]:
    space = Space(output.shape[0], tuple(output.shape[2:]))
    found = [space.maps(output.new_empty(space.rows, num_inputs))] * needed[0]
    found += [torch.empty_like(t) for i, t in enumerate(tensors) if needed[1 + i]]
    return found


def _differentiable_backward(
    grad: Tensor,
    x: Tensor,
    tensors: Sequence[Tensor],
    flags: Sequence[int],
    numbers: Sequence[float],
    needed: Sequence[bool],
) -> list[Tensor]:
    """The same gradients through plain PyTorch, so that they have gradients of their own."""
    space = Space(x.shape[0], tuple(x.shape[2:]))

    def forward(x: Tensor, *tensors: Tensor) -> Tensor:
        for layer in unpack(tensors, flags, numbers):
            new = x
            for step in layer:
                new = F.batch_norm(
                    new, step.running_mean, step.running_var, step.norm_weight, step.norm_bias,
                    step.training, eps=step.eps,
                )  # fmt: skip
                bias = None if step.bias is None else step.bias.to(x.dtype)
                conv = plain.Conv(step.weight.to(x.dtype), bias, step.dilation)
                new = plain.convolve(F.relu(new), conv)
                if step.mask is not None:
                    new = space.maps(step.drop(space.matrix(new)))
            x = torch.cat((x, new), dim=1)
        return x

    return gradients_with_gradients(forward, (x, *tensors), needed, grad)


def _drops(layer: list[PackedStep]) -> bool:
    return any(step.mask is not None for step in layer)


def _allocate(
    x: Tensor, layers: list[list[PackedStep]], space: Space, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A block's buffer, the statistics of its channels and its affines, as yet without values."""
    channels = x.shape[1] + sum(layer[-1].weight.shape[0] for layer in layers)
    trained = any(step.training for layer in layers for step in layer)
    buffer = chosen(x).matrix(space.rows, channels, x, x.dtype)
    _, length = side_by_side(_norm_widths(layers) if keep else ())
    return buffer, *two_vectors(x, channels if trained else 0), three_vectors(x, length)


def _rooms(affines: Tensor, layers: list[list[PackedStep]]) -> list[Tensor]:
    """Where scale, shift and rstd of each norm stand among those of all, as [3, C] each."""
    places, _ = side_by_side(_norm_widths(layers))
    return [affines[:, place] for place in places]


def _norm_widths(layers: list[list[PackedStep]]) -> list[int]:
    return [step.weight.shape[1] for step in chain(*layers)]


def _first_needed(layers: list[list[PackedStep]], needed: Sequence[bool]) -> int:
    """The first layer that must run backward: earlier ones are frozen, and so is the input."""
    for i, layer in enumerate(layers):
        if needed[0] or any(needed[1 + at] for step in layer for at in step.places.values()):
            return i
    return len(layers)

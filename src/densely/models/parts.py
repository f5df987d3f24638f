"""The parts that all layers of a network share: dimensions, norm, activation, bias, dropout.

A DenseNet is the same design in one, two or three dimensions and with any norm and activation;
`Parts` keeps these choices in one place and makes the modules for them.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densely.errors import ConfigError

NormName = Literal["batch", "sync_batch", "group", "layer"]
ActivationName = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "mish"]
PoolName = Literal["avg", "max"]
#: By name, or a function that makes one: from the number of channels, and from nothing.
Norm = NormName | Callable[[int], nn.Module]
Activation = ActivationName | Callable[[], nn.Module]

NORMS: tuple[str, ...] = get_args(NormName)
ACTIVATIONS: tuple[str, ...] = get_args(ActivationName)
POOLS: tuple[str, ...] = get_args(PoolName)

#: Groups of a group norm, where the channels can be shared among so many (Wu and He, 2018).
GROUPS = 32

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAZY_CONVS = (nn.LazyConv1d, nn.LazyConv2d, nn.LazyConv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAZY_BATCH_NORMS = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
_AVG_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


class ChannelLayerNorm(nn.Module):
    """Layer norm over the channels of each position: "LayerNorm-2d", in any dimensions."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, C, ...] along C."""
        y = F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps)
        return y.movedim(-1, 1)


class DropPath(nn.Module):
    """Stochastic depth: in training, drops what a layer adds for whole images, at random.

    With probability `drop_rate` an image's new maps are zero; those kept are scaled by
    1 / (1 - drop_rate), so that their mean stays. A residual layer dropped so is the identity; a
    dense layer dropped so is one that later layers see nothing of.

    Source: Huang, Sun, Liu, Sedra, Weinberger, "Deep Networks with Stochastic Depth" (2016);
    for its kinship with dense layers see the DenseNet paper, section 5.
    """

    def __init__(self, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop images of [N, C, ...]; the identity in eval mode."""
        if not self.training or self.drop_rate == 0:
            return x
        kept = torch.empty((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x * kept.bernoulli_(1 - self.drop_rate).div_(1 - self.drop_rate)

    def extra_repr(self) -> str:
        """The rate, for `print(model)`."""
        return f"drop_rate={self.drop_rate:g}"


@dataclass(frozen=True)
class Parts:
    """Choices that hold for every layer of a network, and the modules made by them.

    Args:
        spatial_dims: 1, 2 or 3.
        norm: "batch", "sync_batch", "group", "layer", or a function from channels to a module.
        activation: "relu", "leaky_relu", "elu", "gelu", "silu", "mish", or a function that makes
            a module.
        bias: whether convolutions have a bias (the chapter's have, the paper's have not).
        drop_rate: share of the values that dropout zeroes after each convolution.
    """

    spatial_dims: int = 2
    norm: Norm = "batch"
    activation: Activation = "relu"
    bias: bool = False
    drop_rate: float = 0.0

    def faults(self) -> list[str]:
        """What is out of range, in words; empty where all is well."""
        faults = []
        if self.spatial_dims not in (1, 2, 3):
            faults.append(f"spatial_dims={self.spatial_dims}: must be 1, 2 or 3")
        for name, value, known, given in (
            ("norm", self.norm, NORMS, (96,)),
            ("activation", self.activation, ACTIVATIONS, ()),
        ):
            if isinstance(value, nn.Module):
                faults.append(
                    f"{name}={value}: is a module already, and each place needs its own: give "
                    f"what makes it, such as {type(value).__name__} itself"
                )
            elif value not in known and not callable(value):
                faults.append(
                    f"{name}={value!r}: must be one of {', '.join(known)}, or make a module"
                )
            elif callable(value) and (wrong := _not_made(value, *given)):
                faults.append(f"{name}={getattr(value, '__name__', value)}: {wrong}")
        return faults

    def make_norm(self, channels: int | None) -> nn.Module:
        """Norm of `channels` channels; None learns the number from the first input."""
        if callable(self.norm) and channels is not None:
            return self.norm(channels)
        if channels is None:
            if self.norm != "batch":
                raise ValueError("only batch norms can learn their channels from an input")
            return _lazy(_LAZY_BATCH_NORMS[self.spatial_dims - 1])
        if self.norm == "batch":
            return BATCH_NORMS[self.spatial_dims - 1](channels)
        if self.norm == "sync_batch":
            return nn.SyncBatchNorm(channels)
        if self.norm == "group":
            return nn.GroupNorm(math.gcd(GROUPS, channels), channels)
        if self.norm == "layer":
            return ChannelLayerNorm(channels)
        raise ConfigError("; ".join(self.faults()))

    def make_activation(self) -> nn.Module:
        """Activation; in place where it follows one of our own norms, which nobody else reads."""
        if callable(self.activation):
            return self.activation()
        inplace = isinstance(self.norm, str)
        if self.activation == "relu":
            return nn.ReLU(inplace=inplace)
        if self.activation == "leaky_relu":
            return nn.LeakyReLU(inplace=inplace)
        if self.activation == "elu":
            return nn.ELU(inplace=inplace)
        if self.activation == "silu":
            return nn.SiLU(inplace=inplace)
        if self.activation == "mish":
            return nn.Mish(inplace=inplace)
        if self.activation == "gelu":
            return nn.GELU()
        raise ConfigError("; ".join(self.faults()))

    def make_conv(
        self,
        in_channels: int | None,
        out_channels: int,
        kernel_size: int,
        *,
        stride: Sequence[int] | int = 1,
        dilation: int = 1,
    ) -> nn.Module:
        """Convolution padded to keep the size; `in_channels=None` learns it from an input."""
        d = self.spatial_dims
        kernel, dilations = (kernel_size,) * d, (dilation,) * d
        strides = (stride,) * d if isinstance(stride, int) else tuple(stride)
        padding = (dilation * (kernel_size // 2),) * d
        if in_channels is None:
            return _lazy(
                _LAZY_CONVS[d - 1], out_channels, kernel, strides, padding, dilations,
                bias=self.bias,
            )  # fmt: skip
        conv: Callable[..., nn.Module] = CONVS[d - 1]
        return conv(in_channels, out_channels, kernel, strides, padding, dilations, bias=self.bias)

    def make_dropout(self) -> nn.Module | None:
        """Dropout after a convolution; None where the rate is 0."""
        return nn.Dropout(self.drop_rate) if self.drop_rate > 0 else None

    def make_max_pool(self, stride: Sequence[int]) -> nn.Module:
        """The stem's: over 3 positions an axis, padded, by `stride`."""
        return _MAX_POOLS[self.spatial_dims - 1](3, tuple(stride), 1)

    def make_pool(self, kind: PoolName, stride: Sequence[int]) -> nn.Module:
        """A transition's: over as many positions an axis as it steps on."""
        if kind not in POOLS:
            raise ConfigError(f"pool={kind!r}: must be one of {', '.join(POOLS)}")
        pools = _AVG_POOLS if kind == "avg" else _MAX_POOLS
        return pools[self.spatial_dims - 1](tuple(stride), tuple(stride))  # type: ignore[arg-type]


def _not_made(make: Callable[..., object], *given: int) -> str:
    """Why a function makes no module from so many channels, or from nothing; empty if it does."""
    call = f"makes no module from {given[0]} channels" if given else "makes no module from nothing"
    try:
        with torch.random.fork_rng(devices=()):  # what is drawn for it shows nowhere
            made = make(*given)
    except TypeError as error:
        return f"{call}: {error}"
    except Exception:  # may be of this number of channels alone
        return ""
    return "" if isinstance(made, nn.Module) else f"{call}, but a {type(made).__name__}"


def _lazy(kind: Callable[..., nn.Module], *args: object, **options: object) -> nn.Module:
    with warnings.catch_warnings():  # that lazy modules may change is our concern, not the user's
        warnings.simplefilter("ignore", UserWarning)
        return kind(*args, **options)

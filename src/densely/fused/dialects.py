"""Whose DenseNets are known, by the names of their classes alone: none of them is imported.

A class counts as known if a known one stands among its bases and no method that takes part in
the forward has been overridden since: then the code that runs is the code that densely replaces.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from densely.fused import heads, parts
from densely.fused.accelerated import Kind
from densely.fused.heads import ReadHead
from densely.fused.parts import Check, qualified_name


class Dialect(NamedTuple):
    """How one package builds its DenseNets.

    Attributes:
        layer: name of the class of dense layers.
        layer_parts: children of a dense layer in order, and what each must be; names begin with
            norm, relu, conv or drop.
        layer_optional: those among them that may be missing.
        layer_child: name of the child that holds these parts; empty if the layer itself does.
        layer_methods: methods of a dense layer that take part in its forward.
        transition_parts: children of a transition in order, and what each must be; the pooling
            may be missing.
        net_methods: methods of the whole net that its forward calls.
        check_input: the one among them that is called with the net's input, before all else.
        read_head: what follows the last norm.
    """

    layer: str
    layer_parts: Mapping[str, Check]
    transition_parts: Mapping[str, Check]
    read_head: ReadHead
    layer_child: str = ""
    layer_optional: tuple[str, ...] = ()
    layer_methods: tuple[str, ...] = ("forward",)
    net_methods: tuple[str, ...] = ()
    check_input: str = ""


class Known(NamedTuple):
    """What an object of a known class is."""

    kind: Kind
    dialect: Dialect


_LAYER: dict[str, Check] = {
    "norm1": parts.norm,
    "relu1": parts.relu,
    "conv1": parts.pointwise,
    "norm2": parts.norm,
    "relu2": parts.relu,
    "conv2": parts.spatial,
}
_TRANSITION: dict[str, Check] = {
    "norm": parts.norm,
    "relu": parts.relu,
    "conv": parts.pointwise,
    "pool": parts.averaging,
}

_CHECKPOINTED = ("any_requires_grad", "call_checkpoint_bottleneck")

_TORCHVISION = Dialect(
    layer="torchvision.models.densenet._DenseLayer",
    layer_parts=_LAYER,
    transition_parts=_TRANSITION,
    read_head=heads.torchvision,
    layer_methods=("forward", "bn_function", *_CHECKPOINTED),
)
_TIMM = Dialect(
    layer="timm.models.densenet.DenseLayer",
    layer_parts={
        "norm1": parts.norm_act,
        "conv1": parts.pointwise,
        "norm2": parts.norm_act,
        "conv2": parts.spatial,
    },
    transition_parts={"norm": parts.norm_act, "conv": parts.pointwise, "pool": parts.averaging},
    read_head=heads.timm,
    layer_methods=("forward", "bottleneck_fn", *_CHECKPOINTED),
    net_methods=("forward_features", "forward_head"),
)
_MONAI = Dialect(
    layer="monai.networks.nets.densenet._DenseLayer",
    layer_parts={**_LAYER, "dropout": parts.dropout},
    transition_parts=_TRANSITION,
    read_head=heads.monai,
    layer_child="layers",
    layer_optional=("dropout",),
)
_TORCHXRAYVISION = Dialect(
    layer="torchxrayvision.models._DenseLayer",
    layer_parts=_LAYER,
    transition_parts=_TRANSITION,
    read_head=heads.torchxrayvision,
)
_DENSELY = Dialect(
    layer="densely.models.densenet.DenseLayer",
    layer_parts={
        "norm1": parts.norm,
        "relu1": parts.relu,
        "conv1": parts.conv,
        "drop1": parts.dropout,
        "norm2": parts.norm,
        "relu2": parts.relu,
        "conv2": parts.spatial,
        "drop2": parts.dropout,
    },
    transition_parts={
        "norm": parts.norm,
        "relu": parts.relu,
        "pool": parts.averaging,
        "conv": parts.pointwise,
    },
    read_head=heads.densely,
    layer_optional=("drop1", "norm2", "relu2", "conv2", "drop2"),
    net_methods=("_check",),
    check_input="_check",
)

_KNOWN: dict[str, Known] = {
    "torchvision.models.densenet._DenseBlock": Known("dense block", _TORCHVISION),
    "torchvision.models.densenet._Transition": Known("transition", _TORCHVISION),
    "torchvision.models.densenet.DenseNet": Known("final norm", _TORCHVISION),
    "timm.models.densenet.DenseBlock": Known("dense block", _TIMM),
    "timm.models.densenet.DenseTransition": Known("transition", _TIMM),
    "timm.models.densenet.DenseNet": Known("final norm", _TIMM),
    "monai.networks.nets.densenet._DenseBlock": Known("dense block", _MONAI),
    "monai.networks.nets.densenet._Transition": Known("transition", _MONAI),
    "monai.networks.nets.densenet.DenseNet": Known("final norm", _MONAI),
    "densely.models.densenet.DenseBlock": Known("dense block", _DENSELY),
    "densely.models.densenet.Transition": Known("transition", _DENSELY),
    "densely.models.densenet.DenseNet": Known("final norm", _DENSELY),
    "torchxrayvision.models._DenseBlock": Known("dense block", _TORCHXRAYVISION),
    "torchxrayvision.models._Transition": Known("transition", _TORCHXRAYVISION),
    "torchxrayvision.models.DenseNet": Known("final norm", _TORCHXRAYVISION),
}


def known_class(cls: type[nn.Module]) -> Known | str | None:
    """What objects of this class are; text says why a known class is not taken; None: unknown."""
    for base in cls.__mro__:
        known = _KNOWN.get(qualified_name(base))
        if known is not None:
            methods = ["forward"]
            methods += known.dialect.net_methods if known.kind == "final norm" else ()
            own = [name for name in methods if getattr(cls, name) is not getattr(base, name)]
            return f"is of type {cls.__name__} with its own {', '.join(own)}" if own else known
    return None

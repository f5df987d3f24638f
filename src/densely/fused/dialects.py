"""Whose DenseNets are known, by the names of their classes alone: none of them is imported.

A class counts as known if a known one stands among its bases and no method that takes part in
the forward has been overridden since: then the code that runs is the code that densely replaces.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import nn

from densely.fused import heads, parts
from densely.fused.heads import ReadHead
from densely.fused.parts import Check, qualified_name

Kind = Literal["stem", "dense block", "transition", "final norm"]


class Dialect(NamedTuple):
    """How one package builds its DenseNets.

    Attributes:
        layer: name of the class of dense layers.
        layer_parts: children of a dense layer in order, and what each must be.
        layer_child: name of the child that holds these parts; empty if the layer itself does.
        layer_dropout: name of the dropout among these parts, which may be missing; empty if the
            layer has a `drop_rate` instead.
        layer_methods: methods of a dense layer that take part in its forward.
        checkpointing: attribute of a dense layer that has it run again in backward.
        transition_parts: children of a transition in order, and what each must be.
        net_methods: methods of the whole net that take part in its forward.
        read_head: what follows the last norm.
    """

    layer: str
    layer_parts: Mapping[str, Check]
    layer_child: str
    layer_dropout: str
    layer_methods: tuple[str, ...]
    checkpointing: str
    transition_parts: Mapping[str, Check]
    net_methods: tuple[str, ...]
    read_head: ReadHead


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
    "pool": parts.halving,
}

_TORCHVISION = Dialect(
    layer="torchvision.models.densenet._DenseLayer",
    layer_parts=_LAYER,
    layer_child="",
    layer_dropout="",
    layer_methods=("forward", "bn_function", "any_requires_grad", "call_checkpoint_bottleneck"),
    checkpointing="memory_efficient",
    transition_parts=_TRANSITION,
    net_methods=("forward",),
    read_head=heads.torchvision,
)
_TIMM = Dialect(
    layer="timm.models.densenet.DenseLayer",
    layer_parts={
        "norm1": parts.norm_act,
        "conv1": parts.pointwise,
        "norm2": parts.norm_act,
        "conv2": parts.spatial,
    },
    layer_child="",
    layer_dropout="",
    layer_methods=("forward", "bottleneck_fn", "any_requires_grad", "call_checkpoint_bottleneck"),
    checkpointing="grad_checkpointing",
    transition_parts={"norm": parts.norm_act, "conv": parts.pointwise, "pool": parts.halving},
    net_methods=("forward", "forward_features", "forward_head"),
    read_head=heads.timm,
)
_MONAI = Dialect(
    layer="monai.networks.nets.densenet._DenseLayer",
    layer_parts=_LAYER,
    layer_child="layers",
    layer_dropout="dropout",
    layer_methods=("forward",),
    checkpointing="",
    transition_parts=_TRANSITION,
    net_methods=("forward",),
    read_head=heads.monai,
)
_TORCHXRAYVISION = Dialect(
    layer="torchxrayvision.models._DenseLayer",
    layer_parts=_LAYER,
    layer_child="",
    layer_dropout="",
    layer_methods=("forward",),
    checkpointing="",
    transition_parts=_TRANSITION,
    net_methods=("forward",),
    read_head=heads.torchxrayvision,
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
    "torchxrayvision.models._DenseBlock": Known("dense block", _TORCHXRAYVISION),
    "torchxrayvision.models._Transition": Known("transition", _TORCHXRAYVISION),
    "torchxrayvision.models.DenseNet": Known("final norm", _TORCHXRAYVISION),
}


def known_class(cls: type[nn.Module]) -> Known | str | None:
    """What objects of this class are; text says why a known class is not taken; None: unknown."""
    for base in cls.__mro__:
        known = _KNOWN.get(qualified_name(base))
        if known is not None:
            methods = known.dialect.net_methods if known.kind == "final norm" else ("forward",)
            own = [name for name in methods if getattr(cls, name) is not getattr(base, name)]
            return f"is of type {cls.__name__} with its own {', '.join(own)}" if own else known
    return None

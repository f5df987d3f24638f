"""Tensors of classes other than PyTorch's own: which of them a step may take, and how.

Some carry more than values: MONAI's loaders give a MetaTensor, which knows where an image lies in
space, and hands that on through every function of PyTorch. To such a tensor a step is one more
function: it works on the bare values, and the class makes of the result what it makes of any. Other
classes, and modes, are there to see each operation; these get plain PyTorch.

Source: "Extending torch with a Tensor-like type", PyTorch's notes on `__torch_function__`.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from densely.fused.block_statistics import leave_with_alias
from densely.fused.parts import qualified_name

P = ParamSpec("P")
Step = Callable[Concatenate[Tensor, P], Tensor]

#: Classes known to see in a function nothing but what goes in and comes out.
_CARRIERS = ("monai.data.meta_tensor.MetaTensor",)
#: Classes that see each operator, and know ours.
_KNOWING = ("torch._subclasses.fake_tensor.FakeTensor",)


def why_plain(x: Tensor) -> str | None:
    """Why somebody is to see each operation on x; None where nobody is."""
    for i in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(i)
        if not isinstance(mode, DeviceContext):  # `torch.set_default_device`: says where, not what
            return f"runs under a {type(mode).__name__}"
    cls = type(x)
    if (_sees_functions(cls) and not _carries(cls)) or _sees_operators(cls):
        return f"reads a {cls.__name__}"
    return None


def on_bare_tensors(step: "Step[P]") -> "Step[P]":
    """A step [N, C, ...] to [N, ...] that takes tensors which carry more, and gives such."""

    @wraps(step)
    def run(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        cls: Any = type(x)
        if torch.compiler.is_compiling() or not _sees_functions(cls) or not _carries(cls):
            return step(x, *args, **kwargs)
        made: list[Tensor] = []

        def on_values(x: Tensor) -> Tensor:
            bare = x.as_subclass(Tensor)
            leave_with_alias(x, bare)
            made.append(step(bare, *args, **kwargs))
            return made[0]

        if not torch._C._is_torch_function_enabled():
            return on_values(x)
        wrapped: Tensor = cls.__torch_function__(on_values, (cls,), (x,))
        leave_with_alias(made[0], wrapped)
        return wrapped

    return run


def _sees_functions(cls: Any) -> bool:
    own = cls.__torch_function__
    return cls is not Tensor and own is not torch._C._disabled_torch_function_impl


def _sees_operators(cls: Any) -> bool:
    return (
        cls.__torch_dispatch__ is not Tensor.__torch_dispatch__
        and qualified_name(cls) not in _KNOWING
    )


def _carries(cls: Any) -> bool:
    """Whether a class that sees functions does the same by all of them."""
    default: Any = Tensor.__torch_function__
    by_default = getattr(cls.__torch_function__, "__func__", None) is default.__func__
    return by_default or qualified_name(cls) in _CARRIERS

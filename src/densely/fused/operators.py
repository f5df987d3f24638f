"""The fused steps as operators of `torch.library`, which compilers and exports see whole.

By the functions below `torch.library.custom_op`, which would import PyTorch's compiler when the
first of its operators runs: as long as all of torch takes to import.
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library("densely", "FRAGMENT")  # type: ignore[no-untyped-call]


class Operator(Generic[P, R]):
    """`function` as the operator densely::NAME of all devices; its types say the schema.

    It changes none of its arguments, and what it gives shares no memory with them. It has no
    derivative: an autograd function around it has.
    """

    def __init__(self, function: Callable[P, R]) -> None:
        update_wrapper(self, function)
        self.name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=())
        tags = (torch.Tag.pt2_compliant_tag,)
        _library.define(self.name + schema, tags=tags)  # type: ignore[no-untyped-call]
        _library.impl(self.name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        self._operator: Callable[P, R] = getattr(torch.ops.densely, self.name).default

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it."""
        return self._operator(*args, **kwargs)

    def register_fake(self, fake: Callable[P, R]) -> None:
        """Tell what it gives by empty tensors, for tensors that have no values."""
        torch.library.register_fake(f"densely::{self.name}", fake, lib=_library)

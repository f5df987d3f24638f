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

#: By the operators' names, among these, where a module that is imported again finds them: an
#: operator is gone with its library, and may not be defined twice.
_libraries: dict[str, torch.library.Library] = vars(torch.ops.densely).setdefault("_libraries", {})


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
        _libraries.pop(self.name, None)
        vars(torch.ops.densely).pop(self.name, None)  # which PyTorch 2.11 leaves without a library
        library = torch.library.Library("densely", "FRAGMENT")  # type: ignore[no-untyped-call]
        _libraries[self.name] = library
        library.define(self.name + schema, tags=tags)  # type: ignore[no-untyped-call]
        library.impl(self.name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it, as it was defined last."""
        operator: Callable[P, R] = getattr(torch.ops.densely, self.name).default
        return operator(*args, **kwargs)

    def register_fake(self, fake: Callable[P, R]) -> None:
        """Tell what it gives by empty tensors, for tensors that have no values."""
        torch.library.register_fake(f"densely::{self.name}", fake, lib=_libraries[self.name])

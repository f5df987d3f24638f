"""The mark of accelerated modules' classes, and the class behind it."""

from typing import ClassVar, Literal

from torch import nn

Kind = Literal["stem", "dense block", "transition", "final norm"]


class Accelerated(nn.Module):
    """Base of the classes that accelerated modules get; the module's own class stands behind it."""

    _densely_kind: ClassVar[Kind]

    def _get_name(self) -> str:
        """A printed model shows the classes that its user knows."""
        return original_class(self).__name__


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was before acceleration."""
    cls = type(module)
    return cls.__bases__[1] if cls.__bases__[0] is Accelerated else cls

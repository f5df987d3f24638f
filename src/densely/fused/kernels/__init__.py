"""Which kernels run the fused steps: one set a device, and `reference` for all.

A set is a subclass of `reference.Kernels` and overrides what it does faster. The choice is made by
the input of a step, at each call.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from densely.errors import ConfigError
from densely.fused.kernels.reference import Kernels

_REFERENCE = Kernels()
_forced: list[Kernels] = []


def available() -> tuple[str, ...]:
    """Names of the sets that run on this machine, the readable one first."""
    return ("reference",)


def chosen(x: Tensor) -> Kernels:
    """The set for steps on x."""
    if _forced:
        return _forced[-1]
    return _REFERENCE


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run all fused steps by the set of this name, for tests and comparisons.

    Raises:
        ConfigError: there is no such set on this machine.
    """
    if name not in available():
        raise ConfigError(f"kernels '{name}': this machine has {', '.join(available())}")
    _forced.append(_REFERENCE)
    try:
        yield
    finally:
        _forced.pop()

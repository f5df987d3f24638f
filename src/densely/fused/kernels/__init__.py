"""Which kernels run the fused steps: one set a device, and `reference` for all.

A set is a subclass of `reference.Kernels` and overrides what it does faster. The choice is made by
the input of a step, at each call.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from densely.errors import ConfigError
from densely.fused.kernels.build import BuildError, find_or_build
from densely.fused.kernels.cpu_kernels import CpuKernels
from densely.fused.kernels.reference import Kernels

_log = logging.getLogger(__name__)
_REFERENCE = Kernels()
_forced: list[Kernels] = []


def available() -> tuple[str, ...]:
    """Names of the sets that run on this machine, the readable one first."""
    return (_REFERENCE.name,) if isinstance(_cpu(), str) else (_REFERENCE.name, CpuKernels.name)


def chosen(x: Tensor) -> Kernels:
    """The set for steps on x."""
    if _forced:
        return _forced[-1]
    found = _cpu()
    return _REFERENCE if isinstance(found, str) else found


def missing() -> str | None:
    """Why the CPU has no kernels of its own here; None if it has."""
    found = _cpu()
    return found if isinstance(found, str) else None


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run all fused steps by the set of this name, for tests and comparisons.

    Raises:
        ConfigError: there is no such set on this machine.
    """
    sets = {
        kernels.name: kernels for kernels in (_REFERENCE, _cpu()) if isinstance(kernels, Kernels)
    }
    if name not in sets:
        raise ConfigError(f"kernels '{name}': this machine has {', '.join(sets)}")
    _forced.append(sets[name])
    try:
        yield
    finally:
        _forced.pop()


@functools.cache
def _cpu() -> CpuKernels | str:
    """The CPU's own kernels, or why there are none."""
    try:
        return CpuKernels(find_or_build())
    except (BuildError, OSError) as error:
        _log.warning("DenseNets run without compiled kernels, slower than they could: %s", error)
        return str(error)

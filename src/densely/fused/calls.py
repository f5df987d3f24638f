"""What accelerated modules carry: counts of which path ran and why."""

import logging

import torch
from torch import nn

from densely.fused.accelerated import original_class
from densely.fused.parts import Obstacle

_log = logging.getLogger(__name__)
_logged: set[str] = set()

#: The one attribute that acceleration adds to a module.
ATTRIBUTE = "_densely_calls"


class Calls:
    """Counts of one module. A copy, or what comes back from a pickle, starts at zero.

    Attributes:
        densely: calls that ran densely's step.
        reasons: why calls ran the original forward, with the number of them for each reason.
    """

    def __init__(self) -> None:
        self.densely = 0
        self.reasons: dict[str, int] = {}

    @property
    def plain(self) -> int:
        """Calls that ran the original forward."""
        return sum(self.reasons.values())

    def __reduce__(self) -> tuple[type["Calls"], tuple[()]]:
        return Calls, ()

    def __repr__(self) -> str:
        return f"Calls(densely={self.densely}, plain={self.plain}, reasons={self.reasons})"


def calls_of(module: nn.Module) -> Calls:
    """The counts of an accelerated module; a slice of a Sequential gets its own when first used."""
    return module.__dict__.setdefault(ATTRIBUTE, Calls())  # type: ignore[no-any-return]


def note(module: nn.Module, obstacle: Obstacle | None) -> None:
    """Count a call, and log once for each kind of obstacle. Code being compiled is not counted."""
    if torch.compiler.is_compiling():
        return
    calls = calls_of(module)
    if obstacle is None:
        calls.densely += 1
        return
    calls.reasons[str(obstacle)] = calls.reasons.get(str(obstacle), 0) + 1
    if obstacle.text not in _logged and not obstacle.expected:
        _logged.add(obstacle.text)
        _log.warning(
            "a %s runs its original forward: %s; densely.fused.report(model) counts such calls",
            original_class(module).__name__,
            obstacle,
        )

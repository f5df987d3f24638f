"""What `accelerate` did to a model, and what the model has done with it since."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from densely.fused.accelerated import Accelerated
from densely.fused.calls import Calls, calls_of


@dataclass(frozen=True)
class Acceleration:
    """What of a model runs densely's code. `print` it for a table.

    Attributes:
        replaced: names of the modules whose forward is replaced, by kind: "stem" (the module
            that holds it), "dense block", "transition" and "final norm" (the net that holds it).
            The model itself has the empty name, as in `named_modules`.
        left_alone: names of the modules that could not be replaced, with the reason of each.
        already: how many of the replaced ones were so before this call.
    """

    replaced: dict[str, list[str]]
    left_alone: dict[str, str]
    already: int
    _model: Callable[[], nn.Module | None] = field(repr=False, compare=False)  # a weak reference

    def __reduce__(self) -> tuple[object, ...]:
        """A copy knows no model: so the report may be kept in the model that it is about."""
        return Acceleration, (self.replaced, self.left_alone, self.already, _no_model)

    def calls(self) -> dict[str, Calls]:
        """How often each replaced module ran densely's step, and how often its own forward and why.

        Read from the model as it is now; empty once the model is gone or restored, and in a copy
        of the report. Code that `torch.compile` has compiled is not counted.
        """
        model = self._model()
        if model is None:
            return {}
        return {
            name: calls_of(module)
            for name, module in model.named_modules()
            if isinstance(module, Accelerated)
        }

    def __str__(self) -> str:
        rows = [(kind, name) for kind, names in self.replaced.items() for name in names]
        if not rows and not self.left_alone:
            return "nothing replaced: no DenseNet of torchvision, timm or MONAI was found"
        calls = self.calls()
        lines = [f"{len(rows)} replaced ({self.already} before), {len(self.left_alone)} left alone"]
        width = max(len(_shown(name)) for name in (*(name for _, name in rows), *self.left_alone))
        if rows:
            lines.append(f"  {'kind':11}  {'module':{width}}  densely  plain")
        for kind, name in rows:
            counts = calls.get(name, Calls())
            lines.append(
                f"  {kind:11}  {_shown(name):{width}}  {counts.densely:7}  {counts.plain:5}"
            )
            lines += [f"  {'':11}    {n} of these: {why}" for why, n in counts.reasons.items()]
        lines += [
            f"  {'left alone':11}  {_shown(name):{width}}  {reason}"
            for name, reason in self.left_alone.items()
        ]
        return "\n".join(lines)


def _shown(name: str) -> str:
    return name or "(the model)"


def _no_model() -> None:
    return None

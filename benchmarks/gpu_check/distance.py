"""How far results are from a float64 computation, and whether that is near enough.

The bound is relative: 1.5 times as far as plain eager PyTorch is in the same dtype. Fixed bounds
say nothing here, since ReLU's mask flips where rounding moves a value over zero.
"""

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_check.steps import Outcome

FACTOR = 1.5


@dataclass(frozen=True)
class Distance:
    """A kind of result, such as the gradients of all convolutions, at its worst tensor."""

    kind: str
    worst: str
    fused: float
    plain: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.fused <= self.bound  # a NaN is not

    @property
    def share(self) -> float:
        """Of the bound; infinite for NaN."""
        return _share(self.fused, self.bound)

    def to_dict(self) -> dict[str, Any]:
        return {
            "worst": self.worst,
            "fused": float(f"{self.fused:.3g}"),
            "plain": float(f"{self.plain:.3g}"),
            "ok": self.ok,
        }


def compare(fused: Outcome, plain: Outcome, exact: Outcome, whole_kinds: bool) -> list[Distance]:
    """Distances by kind.

    Args:
        fused: results of the code under test.
        plain: of eager PyTorch in the same dtype.
        exact: of eager PyTorch in float64.
        whole_kinds: take all tensors of a kind as one long vector, rather than the worst of them.
            Within a whole network single small tensors are too noisy to be judged.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in exact:
        kinds[_kind(name)].append(name)
    gradients = [_norm(value) for name, value in exact.items() if name.startswith("gradient of ")]
    # A gradient that is zero but for rounding, as of a bias before a norm: judged beside others.
    least = max(1e-9 * max(gradients), 1e-30)
    return [
        _of_kind(kind, names, fused, plain, exact, whole_kinds, least)
        for kind, names in kinds.items()
    ]


def _of_kind(
    kind: str,
    names: list[str],
    fused: Outcome,
    plain: Outcome,
    exact: Outcome,
    whole: bool,
    least: float,
) -> Distance:
    if kind == "num_batches_tracked":
        wrong = [name for name in names if not torch.equal(fused[name], exact[name])]
        return Distance(kind, wrong[0] if wrong else names[0], float(len(wrong)), 0.0, 0.0)
    norms = {name: _norm(exact[name]) for name in names}
    floor = max(_rounding(fused[name].dtype) for name in names)
    errors = {
        name: (_norm(fused[name].double() - exact[name]), _norm(plain[name].double() - exact[name]))
        for name in names
    }
    if whole:
        total = max(math.hypot(*norms.values()), least)
        ours, theirs = (math.hypot(*(pair[i] for pair in errors.values())) / total for i in (0, 1))
        worst = max(names, key=lambda name: _share(errors[name][0], max(norms[name], least)))
        return Distance(kind, worst, ours, theirs, max(FACTOR * theirs, floor))
    relative = {
        name: tuple(error / max(norms[name], least) for error in pair)
        for name, pair in errors.items()
    }
    # Both distances are noise: one lucky small tensor of the plain code makes no bound.
    usual = statistics.median(pair[1] for pair in relative.values())
    found = [
        Distance(kind, name, ours, theirs, max(FACTOR * max(theirs, usual), floor))
        for name, (ours, theirs) in relative.items()
    ]
    return max(found, key=lambda distance: distance.share)


def _kind(name: str) -> str:
    parts = name.removeprefix("gradient of ").split(".")
    if name.startswith("gradient of ") and len(parts) > 1:
        module = parts[-2].rstrip("0123456789")
        if module == "classifier":  # ten numbers of a bias alone are noise
            return "grad classifier"
        return f"grad {module}.{parts[-1]}"
    return name if name.startswith("gradient of ") else parts[-1]


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def _share(part: float, whole: float) -> float:
    """A quotient that sorts: infinite for NaN."""
    if math.isnan(part) or math.isnan(whole):
        return math.inf
    return part / whole if whole else math.inf * part if part else 0.0


def _rounding(dtype: torch.dtype) -> float:
    """About what rounding alone does: no bound is nearer."""
    if dtype in (torch.bfloat16, torch.float16):
        return 0.25 * torch.finfo(dtype).eps
    return 4 * torch.finfo(torch.float32).eps

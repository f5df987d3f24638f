"""What was measured, and the ratios that are made of it."""

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from densely.bench.variants import Variant


@dataclass
class Measured:
    """A variant's figures; those not measured are None or empty, and `gap` says why.

    Args:
        name: what tables call it.
        kind: "ours", "accelerated" or "peer".
        precision: of convolutions and products.
        memory_format: of images and weights.
        gap: why there are no figures.
        parameters: number of weights.
        images_per_s: one figure a round.
        kept_bytes_per_image: kept for the backward pass, up to the loss.
        peak_bytes: of memory, beyond what the network and one batch take.
        notes: what else there is to say.
    """

    name: str
    kind: str
    precision: str
    memory_format: str
    gap: str | None = None
    parameters: int | None = None
    images_per_s: list[float] = field(default_factory=list)
    kept_bytes_per_image: int | None = None
    peak_bytes: int | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, variant: Variant) -> "Measured":
        """No figures yet."""
        return cls(
            variant.name,
            variant.kind,
            variant.runtime.precision,
            variant.runtime.memory_format,
            variant.gap,
        )

    @property
    def median(self) -> float | None:
        """Images a second, median over the rounds."""
        return statistics.median(self.images_per_s) if self.images_per_s else None


@dataclass
class Comparison:
    """All variants of a network in one mode."""

    net: str
    mode: str
    batch: int
    image_shape: tuple[int, int, int]
    steps: int
    reference: str
    rows: list[Measured]

    def find(self, name: str) -> Measured:
        """The row of a variant."""
        return next(row for row in self.rows if row.name == name)

    def ratios(self, row: Measured) -> list[float]:
        """Speed over the reference's, round by round: neighbours in time share the machine."""
        base = self.find(self.reference).images_per_s
        return [value / other for value, other in zip(row.images_per_s, base, strict=False)]

    def ratio(self, row: Measured) -> float | None:
        """Median of `ratios`; None where one of the two was not measured."""
        ratios = self.ratios(row)
        return statistics.median(ratios) if ratios else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with medians and ratios."""
        found = {name: value for name, value in vars(self).items() if name != "rows"}
        base = self.find(self.reference)
        rows = {}
        for row in self.rows:
            figures = {key: value for key, value in asdict(row).items() if key != "name"}
            if row.gap is None:
                figures |= {
                    "images_per_s": [round(value, 3) for value in row.images_per_s],
                    "median_images_per_s": _rounded(row.median),
                    "ratio": _rounded(self.ratio(row)),
                    "ratio_by_round": [round(value, 3) for value in self.ratios(row)],
                    "kept_reference_over_this": _quotient(
                        base.kept_bytes_per_image, row.kept_bytes_per_image
                    ),
                    "peak_reference_over_this": _quotient(base.peak_bytes, row.peak_bytes),
                }
            rows[row.name] = figures
        return found | {"variants": rows}


def _quotient(reference: int | None, this: int | None) -> float | None:
    return round(reference / this, 3) if reference and this else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)

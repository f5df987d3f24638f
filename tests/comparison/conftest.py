"""Comparisons in tests tell speeds, and need not tell them well."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _hasty_measurements() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("densely.evaluation.cost.TURN_SECONDS", 0.0)
        patch.setattr("densely.evaluation.cost.ROUNDS", 1)
        yield

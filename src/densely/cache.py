"""Where densely keeps what it can make or fetch again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/densely`, by default `~/.cache/densely`; made when something is stored."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "densely"

"""Public names that import their module only when they are used.

`import densely` and `densely --help` so stay quick: torch alone takes a second.
"""

from collections.abc import Callable
from importlib import import_module


def lazy(package: str, places: dict[str, str]) -> tuple[Callable[[str], object], list[str]]:
    """Make `__getattr__` and `__all__` for `package`.

    Args:
        package: name of the package whose names these are.
        places: module that defines each public name.
    """

    def getattr_(name: str) -> object:
        if name in places:
            return getattr(import_module(places[name]), name)
        raise AttributeError(f"module '{package}' has no attribute '{name}'")

    return getattr_, sorted(places)

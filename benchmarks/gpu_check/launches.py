"""What densely's kernels are launched with, one after another."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from densely.fused import kernels

_FILES = "densely.fused.kernels.triton_"


class Launch(NamedTuple):
    """A kernel that is about to be launched.

    Args:
        kernel: its name.
        of: the file that it stands in, less "triton_": some kernels of two files share a name.
        rows: of the matrix that it works on, or of what else it is given first.
        bytes: of its operands, each once, and what is added to twice.
        run: launches it.
    """

    kernel: str
    of: str
    rows: int
    bytes: int
    run: Callable[[], None]


@contextmanager
def each_launch(do: Callable[[Launch], None], anywhere: bool = False) -> Iterator[None]:
    """Let `do` have each launch; it is not made unless `do` runs it.

    With `anywhere` the Triton kernels are chosen on a CPU too, where they could not run.
    """
    if not anywhere:
        with _launches_go_to(do):
            yield
        return
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        mock.patch.multiple(kernels, _HAS_TRITON=True),
    ):
        assert "triton" in kernels.available()
        with kernels.use("triton"), _launches_go_to(do):
            yield


@contextmanager
def _launches_go_to(do: Callable[[Launch], None]) -> Iterator[None]:
    importlib.import_module(f"{_FILES}kernels")  # all of them: what comes later keeps the patch
    with ExitStack() as patches:
        for name, module in list(sys.modules.items()):
            if name.startswith(_FILES) and hasattr(module, "launch"):
                instead = partial(_handed_on, do, name.removeprefix(_FILES), module.launch)
                patches.enter_context(mock.patch.object(module, "launch", instead))
        yield


def _handed_on(
    do: Callable[[Launch], None],
    of: str,
    launch: Callable[..., None],
    kernel: Any,
    grid: tuple[int, ...],
    x: Tensor,
    *args: Any,
    **options: Any,
) -> None:
    run = partial(launch, kernel, grid, x, *args, **options)
    name = kernel.__name__.strip("_")
    do(Launch(name, of, x.shape[0], _operands(kernel, args, options), run))


def _operands(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> int:
    operands = dict(zip(kernel.arg_names, args, strict=False))
    size = sum(_bytes(t) for t in operands.values() if isinstance(t, Tensor))
    if options.get("ADD") is True and operands.get("base") is None and "total" in operands:
        size += _bytes(operands["total"])
    return size


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

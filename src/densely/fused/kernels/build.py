"""The compiled library of the CPU kernels: found where it was built before, or built once.

Looked for in this order:

1. `prebuilt/` beside the sources, for those who got densely as a wheel: a library for each level of
   x86-64 with vectors of 32 bytes (v3) or 64 (v4), made by `prebuild`.
2. the cache folder (or the folder that DENSELY_KERNELS names): built for this very CPU by the C++
   compiler at hand (CXX, c++, g++ or clang++), in some ten seconds, when first needed.

The library speaks PyTorch's stable C interface: one file serves all releases from 2.10 on.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from densely.cache import cache_folder
from densely.cpu_features import cpu_capabilities

VARIABLE = "DENSELY_KERNELS"
SOURCES = Path(__file__).parent / "cpu"
PREBUILT = SOURCES / "prebuilt"

_log = logging.getLogger(__name__)
_STABLE_SINCE = "0x020a000000000000"  # PyTorch 2.10, as its headers write it
_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fno-math-errno",
    f"-DTORCH_TARGET_VERSION={_STABLE_SINCE}",
]
#: What a CPU must have for the code of a level, by the names of `torch.cpu.get_capabilities`.
LEVELS = {
    "x86-64-v4": ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl", "fma3"),
    "x86-64-v3": ("avx2", "fma3", "f16c", "bmi2"),
}


class BuildError(RuntimeError):
    """There is no library for this machine and none could be built; the text says why."""


def find_or_build() -> Path:
    """The library for this machine.

    Raises:
        BuildError: there is none, and no compiler or one that fails.
    """
    has = cpu_capabilities()
    for level, needs in LEVELS.items():
        path = PREBUILT / file_name(level)
        if path.is_file() and all(has.get(name) for name in needs):
            return path
    path = _built_here() / file_name(f"native-{_fingerprint(str(sorted(has.items())))}")
    if not path.is_file():
        build(path, ["-march=native"])
    return path


def build(path: Path, flags: Sequence[str]) -> None:
    """Compile the kernels into the library at `path`, whole or not at all.

    Raises:
        BuildError: no compiler, or it fails.
    """
    compiler = _compiler()
    _log.warning("building densely's CPU kernels, once: some ten seconds")
    torch_folder = Path(torch.__file__).parent
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = [compiler, *_FLAGS, *flags, f"-I{torch_folder / 'include'}", "-c"]
            objects = {
                source: Path(folder) / f"{source.stem}.o" for source in SOURCES.glob("*.cpp")
            }
            _run_together(
                [*command, str(source), "-o", str(target)] for source, target in objects.items()
            )
            link = [compiler, "-shared", *map(str, sorted(objects.values()))]
            link += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", f"{folder}/library"]
            _run_together([link])
            os.replace(f"{folder}/library", path)
    except OSError as error:
        raise BuildError(f"the kernels cannot be built in {path.parent}: {error}") from error


def _compiler() -> str:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    for name in filter(None, names):
        if found := shutil.which(name):
            return found
    raise BuildError("no C++ compiler is here (CXX, c++, g++, clang++)")


def _run_together(commands: Iterable[list[str]]) -> None:
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    said = [process.communicate()[0].splitlines() for process in processes]
    for process, lines in zip(processes, said, strict=True):
        if process.returncode:
            errors = [line for line in lines if "error" in line]
            raise BuildError(f"the C++ compiler failed with: {(errors or lines or ['nothing'])[0]}")


def _built_here() -> Path:
    named = os.environ.get(VARIABLE)
    return Path(named) if named else cache_folder() / "kernels"


def file_name(suffix: str) -> str:
    """Names the sources by their contents: a library is never older than they are."""
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]*")))
    where = f"{sys.platform}-{platform.machine()}".lower()
    return f"densely_cpu-{_fingerprint(sources + repr(_FLAGS).encode())}-{where}-{suffix}.so"


def _fingerprint(text: bytes | str) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:12]

"""What a bug report or a results table must say of the machine."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import densely
from densely.cpu_features import cpu_capabilities
from densely.processors import processors
from densely.runtime import Runtime

PACKAGES = ("torch", "numpy", "safetensors", "pillow", "scikit-learn", "matplotlib")


def package_versions() -> dict[str, str]:
    """Versions of densely and of the packages that decide its numbers."""
    found = {"densely": densely.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's own name."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return str(cpu_capabilities().get("cpu_name") or platform.processor() or "unknown")


def git_commit() -> str | None:
    """Commit of the checkout that densely runs from, with a + where files differ; else None."""
    folder = Path(densely.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=False, timeout=10
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    # Only where the package itself is tracked: it may lie inside somebody else's repository.
    try:
        if not git("ls-files", "--", "__init__.py"):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def environment(runtime: Runtime) -> dict[str, Any]:
    """Versions, hardware, what was chosen on it and why, and the command."""
    return {
        "versions": package_versions(),
        "commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(runtime.device),
        "device_name": device_name(runtime.device),
        "cpu_count": os.cpu_count(),
        "usable_processors": processors(),
        "threads": torch.get_num_threads(),
        "precision": runtime.precision,
        "memory_format": runtime.memory_format,
        "reasons": runtime.reasons,
        "command": sys.argv,
    }

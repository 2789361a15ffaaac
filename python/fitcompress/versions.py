"""What is installed, for bug reports and benchmarks."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

__all__ = ["__version__", "show_versions", "versions"]

try:
    __version__ = metadata.version("fitcompress")
except metadata.PackageNotFoundError:  # run from the sources, not installed
    __version__ = "0+unknown"


def versions() -> dict[str, str]:
    """Return versions of the package, what it runs on, and the machine."""
    from fitcompress import ops

    found = {"fitcompress": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "safetensors", "scikit-learn", "matplotlib"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["platform"] = platform.platform()
    found["processor"] = _processor()
    found["cores"] = str(os.cpu_count())
    found["torch threads"] = str(torch.get_num_threads())
    found["cuda kernels"] = "yes" if ops.has_cuda() else "no"
    found["cuda device"] = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    )
    return found


def show_versions() -> str:
    """Return :func:`versions` as text, one line each."""
    return "\n".join(f"{name}: {version}" for name, version in versions().items())


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

"""The shared library `_ops.so`, loaded and registered with the torch in use."""

from __future__ import annotations

import ctypes
import importlib.util
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["fake_in_place", "has_cuda", "instruction_set", "register_fake"]


def has_cuda() -> bool:
    """Tell whether the CUDA kernels were compiled into this installation."""
    return bool(_library.fitcompress_has_cuda())


def instruction_set() -> str:
    """Name the instruction set that the CPU kernels run on.

    Returns:
        `avx512`, `avx2` or `default`. The environment variable `FITCOMPRESS_ISA`, set
        before the first call, lowers the choice.
    """
    name: bytes = _library.fitcompress_isa()
    return name.decode()


def register_fake(name: str, function: Callable[..., Any]) -> None:
    """Tell torch how to trace a native op without running it."""

    def checked(*arguments: Any) -> Any:
        # torch comes here if any argument is on the meta device.
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        devices = sorted({str(tensor.device) for tensor in tensors})
        if len(devices) > 1:
            message = f"{name}: tensors must be on one device, got {', '.join(devices)}"
            raise ValueError(message)
        return function(*arguments)

    torch.library.register_fake(f"fitcompress::{name}", checked)


def fake_in_place(*arguments: Any) -> None:
    """Stand in for an op that changes its arguments and returns nothing."""


def _load_library() -> ctypes.CDLL:
    """Load `_ops.so` and let it register its operators with the torch in use."""
    spec = importlib.util.find_spec("fitcompress._ops")
    if spec is None or spec.origin is None:
        message = (
            "fitcompress was installed without its native library _ops.so; "
            "install it with `pip install .` in the source folder"
        )
        raise ImportError(message)
    version = torch.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        message = f"fitcompress needs torch 2.10 or newer, found {version}"
        raise ImportError(message)
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        message = f"{spec.origin} does not load beside torch {version}: {error}"
        raise ImportError(message) from error
    library.fitcompress_register.restype = ctypes.c_char_p
    library.fitcompress_isa.restype = ctypes.c_char_p
    problem = library.fitcompress_register()
    if problem is not None:
        message = f"torch {version} rejects the operators: {problem.decode()}"
        raise ImportError(message)
    return library


_library = _load_library()

"""How far a call raises the resident memory of the process."""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["peak_rise"]


def peak_rise(run: Callable[[], Any]) -> int | None:
    """Call ``run`` and return how far resident memory rose above what it was before.

    The operating system's high-water mark of the process: it counts every page that was
    touched, torch's and the kernels' included, which
    ``tracemalloc`` would not see. Memory that the allocator had kept from earlier calls
    is not counted again, so it is a lower bound of what the call uses. On Linux the
    mark is set back before the call; elsewhere it only ever rises, and None is returned
    unless this call raised it.
    """
    gc.collect()
    fresh = _forget_peak()
    before = _peak_bytes()
    run()
    rise = _peak_bytes() - before
    return rise if fresh or rise > 0 else None


def _forget_peak() -> bool:
    """Set the high-water mark back to what is resident now; whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    """Return the high-water mark.

    ``ru_maxrss`` also knows that of the program that started this one; the mark in
    Linux' status file does not.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes

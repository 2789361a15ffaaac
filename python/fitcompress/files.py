"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fitcompress.errors import OptionError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["check_no_input", "check_writable", "read_bytes", "write_atomically"]


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` if a file can be written there, before any work is spent on it.

    Args:
        path: The file to be written later; need not exist.

    Returns:
        The path as a ``Path``.

    Raises:
        OutputError: The folder is missing or not writable, or ``path`` is a folder, a
            device or a pipe.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OutputError(
            f"cannot write {path}",
            got="a folder" if path.is_dir() else "no regular file",
            wanted="the name of a file",
            fix="name a file inside it" if path.is_dir() else "choose another name",
        )
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".fitcompress-"):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write {path}",
            got=error.strerror or type(error).__name__,
            wanted="a folder that exists and can be written to",
            fix=f"create {path.parent} or choose another place",
        ) from error
    return path


def check_no_input(
    path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]
) -> None:
    """Raise if writing to ``path`` would overwrite one of the files that are read.

    Raises:
        OptionError: It would.
    """
    path = Path(path)
    for each in map(Path, inputs):
        if path.exists() and each.exists() and path.samefile(each):
            raise OptionError(
                f"writing {path} would overwrite what is read",
                got=each,
                wanted="another file",
                fix="choose another name for the result",
            )


def write_atomically(
    path: str | os.PathLike[str], data: bytes | Iterable[bytes]
) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one.

    The bytes go to a temporary name in the same folder, are flushed to the disk, and
    are renamed over ``path``; a kill at any time leaves no half-written file under that
    name.

    Args:
        path: The file to write.
        data: Its whole content, or the parts of it one after the other.

    Raises:
        OutputError: The folder is missing or not writable, or the disk is full.
    """
    path, temporary = check_writable(path), None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}-", delete=False
        ) as file:
            temporary = Path(file.name)
            for part in [data] if isinstance(data, bytes) else data:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException as error:  # an interrupt, say, or an error of the parts
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise OutputError(
            f"cannot write {path}",
            got=error.strerror or type(error).__name__,
            wanted="a folder that exists, can be written to and has room",
            fix=f"check {path.parent}, or choose another place",
        ) from error


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return the content of ``path``.

    Raises:
        FileNotFoundError: There is no such file.
    """
    return Path(path).read_bytes()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

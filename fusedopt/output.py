"""Files and text that go out: written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def _target(path: str | Path) -> tuple[Path, Path | None]:
    """The file that is meant, and where it is prepared; None for a device or a pipe."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError(f"no file can be called {str(path)!r}") from None
    target = Path(path).resolve()  # a link stays one
    if target.exists() and not target.is_file():
        return target, None
    return target, target.with_name(f"{target.name}.{os.getpid()}.part")


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file in one go: whatever fails, the old one is there, whole.

    Raises:
        OSError: It cannot be written.
        ValueError: No file can have that name.
    """
    data = content.encode() if isinstance(content, str) else content
    target, part = _target(path)
    if part is None:
        target.write_bytes(data)
        return
    try:
        part.write_bytes(data)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """See whether :func:`write_whole` can write there, before there is much to lose.

    A disk that will be full is not foreseen.

    Raises:
        OSError, ValueError: As :func:`write_whole`.
    """
    target, part = _target(path)
    if part is None or target.exists():
        target.open("ab").close()
    if part is not None:
        part.touch()
        part.unlink()


def printable(text: str) -> str:
    """Text for files and pictures: what is no character, as in names of files, is escaped."""
    return text.encode(errors="backslashreplace").decode()

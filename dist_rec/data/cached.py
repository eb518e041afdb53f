"""Folders derived from data files: built once, by one process of several, and complete or absent."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dist_rec.data.footers import DataError


def built(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`; if it is not there, `build` fills a temporary one beside it, which then takes its name.

    Of the processes of one machine that ask at the same time one builds and the others wait for it. DataError if the
    place cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f".{folder.name}.lock"), "a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                _build(folder, build)
    except OSError as error:
        raise DataError(
            f"data.cache: '{folder.parent}' cannot be written ({error.strerror}); choose another folder, with room for "
            "the item table and for the ids of the rows"
        ) from error
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build(temporary)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

"""Files: where the cache is, checksums, and writing so that no half-written result ever bears its
final name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs

from cmrm.errors import InputError


def cache_dir() -> Path:
    """The user's cache folder for cmrm; `CMRM_CACHE` overrides it."""
    root = os.environ.get("CMRM_CACHE")
    return Path(root).expanduser() if root else Path(platformdirs.user_cache_dir("cmrm"))


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` only when the block ends without
    error.

    Works for a file and for a folder, so that no half-written result ever bears its final name. A
    folder replaces a folder, a file a file; a file never takes a folder's place.

    Raises:
        IsADirectoryError: a file was written, and a folder stands at `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    target = scratch / path.name
    try:
        yield target
        if path.is_dir() and not path.is_symlink():
            if not target.is_dir():
                raise IsADirectoryError(f"{path} is a folder; name a file")
            shutil.rmtree(path)
        os.replace(target, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON with sorted keys into `path`, whole or not at all.

    Raises:
        InputError: the place cannot be written to.
    """
    try:
        with atomic_path(path) as part:
            part.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from None

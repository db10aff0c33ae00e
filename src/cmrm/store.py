"""Texts by key in a small SQLite file: what was computed at some cost is not computed again."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from threading import Lock

from cmrm.errors import InputError


class TextStore:
    """Key -> text. What is put together is written whole or not at all, also under kill -9; usable
    from several threads."""

    def __init__(self, path: Path) -> None:
        """Raises `InputError` when the file cannot be opened, or is something else."""
        self.path = path
        self._lock = Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._held = sqlite3.connect(path, check_same_thread=False, timeout=60)
            self._held.execute("CREATE TABLE IF NOT EXISTS texts (key TEXT PRIMARY KEY, text TEXT)")
            self._held.commit()
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"{path} cannot be used as a store: {error}") from None

    def get(self, key: str) -> str | None:
        """The text under `key`, where there is one."""
        with self._lock:
            row = self._held.execute("SELECT text FROM texts WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, texts: Mapping[str, str]) -> None:
        """Store several at once; what stood under a key before is replaced."""
        with self._lock, self._held:
            self._held.executemany(
                "INSERT OR REPLACE INTO texts VALUES (?, ?)", list(texts.items())
            )

    def __len__(self) -> int:
        with self._lock:
            return int(self._held.execute("SELECT COUNT(*) FROM texts").fetchone()[0])

"""Replies on disk, by everything that they hang on: what was generated once is never generated again."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmrm.conditions import Request
from cmrm.defenses.base import Reply
from cmrm.errors import InputError


def request_key(context: Mapping[str, Any], request: Request, seed_key: str) -> str:
    """Hex sha256 of model, defence and options (`context`), of the conversation with its pixels, and of its noise's seed."""
    digest = hashlib.sha256(json.dumps(context, sort_keys=True, default=str).encode())

    def add(*parts: object) -> None:
        for part in parts:
            digest.update(f"\x00{part}".encode())

    for turn in request.before:
        add(turn.role, turn.text, len(turn.images))
    add(request.text, request.image_last, len(request.images), seed_key)
    for image in request.all_images:
        add(image.size)
        digest.update(image.tobytes())
    return digest.hexdigest()


class ReplyStore:
    """A small SQLite file; a batch is written whole or not at all, also under kill -9."""

    def __init__(self, path: Path) -> None:
        """Raises `InputError` when the file cannot be opened as what `ReplyStore` writes."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._held = sqlite3.connect(path, check_same_thread=False, timeout=60)
            self._held.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT, tokens INTEGER)")
            self._held.commit()
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"{path} cannot be used as the store of replies: {error}") from None

    def get(self, key: str) -> Reply | None:
        """The reply under `key`, where it has one."""
        row = self._held.execute("SELECT text, tokens FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else Reply(str(row[0]), int(row[1]))

    def put(self, replies: Mapping[str, Reply]) -> None:
        """Store a batch."""
        with self._held:
            self._held.executemany(
                "INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", [(k, r.text, r.tokens) for k, r in replies.items()]
            )

    def __len__(self) -> int:
        return int(self._held.execute("SELECT COUNT(*) FROM replies").fetchone()[0])

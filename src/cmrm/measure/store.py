"""Replies on disk, by everything that they hang on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cmrm.prompts.conditions import Request
from cmrm.defenses.base import Reply
from cmrm.store import TextStore


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
    """A `TextStore` of replies."""

    def __init__(self, path: Path) -> None:
        """Raises `InputError` when the file cannot be used."""
        self._held = TextStore(path)

    def get(self, key: str) -> Reply | None:
        """The reply under `key`, where there is one."""
        text = self._held.get(key)
        return None if text is None else Reply(**json.loads(text))

    def put(self, replies: Mapping[str, Reply]) -> None:
        """Store a batch, whole."""
        self._held.put({key: json.dumps(asdict(reply)) for key, reply in replies.items()})

    def __len__(self) -> int:
        return len(self._held)

"""Replies on disk, by the identity of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cmrm.engines.base import Reply
from cmrm.prompts.conditions import Request
from cmrm.store import TextStore


def request_key(context: Mapping[str, Any], request: Request, seed_key: str) -> str:
    """Hex sha256 of a reply's identity: `context` (engine, defence, decoding, batch), conversation,
    pixels, seed."""
    digest = hashlib.sha256(json.dumps(context, sort_keys=True, default=str).encode())

    def add(*parts: object) -> None:
        for part in parts:
            text = str(part).encode()
            digest.update(f"\x00{len(text)}\x00".encode() + text)

    for turn in request.before:
        add(turn.role, turn.text, len(turn.images))
    add(request.text, request.image_last, len(request.images), seed_key)
    for image in request.all_images:
        add(image.size)
        digest.update(image.tobytes())
    return digest.hexdigest()


class ReplyStore:
    """A `TextStore` of replies: batches are stored whole, also under kill -9."""

    def __init__(self, path: Path) -> None:
        """Raises `InputError` when the file cannot be used."""
        self._texts = TextStore(path)

    def get(self, key: str) -> Reply | None:
        """The reply under `key`; None where there is none."""
        text = self._texts.get(key)
        return None if text is None else Reply(**json.loads(text))

    def put(self, replies: Mapping[str, Reply]) -> None:
        """Store a batch, whole."""
        self._texts.put({key: json.dumps(asdict(reply)) for key, reply in replies.items()})

    def __len__(self) -> int:
        return len(self._texts)

"""Hashes that pin what must not change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

from cmrm import Sample


def pin(rows: Iterable[object]) -> str:
    """16 hex digits over the rows as Python prints them."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()[:16]


def shown(sample: Sample) -> tuple[object, ...]:
    """Everything of a sample but the folder of its image."""
    name = os.path.basename(str(sample.image))
    return sample.id, sample.query, name, sample.caption, sample.category, sample.label

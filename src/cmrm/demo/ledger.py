"""What a run has measured so far, on disk: a killed run goes on where it stopped, and nothing is measured twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmrm.files import atomic_path


class Ledger:
    """One JSON file per finished stage, under its stage name and a hash of everything that its outcome hangs on."""

    def __init__(self, folder: Path, context: dict[str, Any]) -> None:
        """`context`: model checksum, seeds, versions; a change of any starts anew."""
        self.folder = folder
        self.context = context
        self.resumed = 0

    def path(self, stage: str, inputs: dict[str, Any]) -> Path:
        """Where the outcome of `stage` on `inputs` is kept."""
        raw = json.dumps([self.context, inputs], sort_keys=True, default=str)
        return self.folder / f"{stage}-{hashlib.sha256(raw.encode()).hexdigest()[:16]}.json"

    def run(self, stage: str, inputs: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """The stored outcome, or `compute()`'s, stored whole before it is returned. A broken file is computed anew."""
        path = self.path(stage, inputs)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            self.resumed += 1
            return value
        except (OSError, ValueError):
            pass
        value = json.loads(json.dumps(compute()))
        with atomic_path(path) as part:
            part.write_text(json.dumps(value), encoding="utf-8")
        return value

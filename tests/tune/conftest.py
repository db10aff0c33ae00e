"""Files for the command, and an engine on the tiny model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from cmrm.engines.transformers import TransformersEngine
from cmrm.model.vlm import VLM
from cmrm.tune.remembering import Remembering
from tune.sources import rows, write_set


@dataclass(frozen=True)
class Files:
    """Paths of sets."""

    anchors: Path
    benign: Path
    dev: Path

    @property
    def options(self) -> tuple[object, ...]:
        """As the command takes them."""
        return ("--anchors", self.anchors, "--benign-anchors", self.benign, "--dev", self.dev)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tune")
    dev = [
        row
        for kind, n in (("harmful", 8), ("benign", 8), ("question", 4))
        for row in rows("dev", kind, n)
    ]
    return Files(
        write_set(folder / "anchors.jsonl", list(rows("anchor", "harmful", 12))),
        write_set(folder / "benign.jsonl", list(rows("anchor", "benign", 12))),
        write_set(folder / "dev.jsonl", dev),
    )


@pytest.fixture(scope="module")
def engine(vlm: VLM) -> Remembering:
    return Remembering(TransformersEngine(vlm))

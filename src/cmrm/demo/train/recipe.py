"""The whole recipe of the demo VLM's weights, in three resumable stages."""

from __future__ import annotations

import shutil
from pathlib import Path

from cmrm.demo.train.align import align
from cmrm.demo.train.connect import connect
from cmrm.demo.train.tower import train_tower
from cmrm.files import atomic_path


def train_demo(work: Path, emoji: Path) -> Path:
    """Train everything into `work` and return `work/weights`, laid out as the weights that ship with cmrm."""
    adapter = align(work)
    tower = train_tower(work, emoji)
    visual = connect(work, emoji, adapter, tower)
    with atomic_path(work / "weights") as weights:
        shutil.copytree(adapter, weights / "adapter")
        shutil.copy2(visual, weights / "visual.safetensors")
        for run in ("connect", "instruct"):
            shutil.copy2(work / run / "curve.jsonl", weights / f"curve_{run}.jsonl")
    return work / "weights"

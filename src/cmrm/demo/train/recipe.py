"""The whole recipe of the demo VLM's weights: three stages, each of which resumes after a stop."""

from __future__ import annotations

import shutil
from pathlib import Path

from cmrm.demo.train.align import align
from cmrm.demo.train.connect import RUNS, connect
from cmrm.demo.train.tower import train_tower
from cmrm.files import atomic_path


def train_demo(work: Path, emoji: Path) -> Path:
    """Train everything into `work` and return `work/weights`, laid out as the weights that ship.

    Args:
        work: folder of checkpoints, cached answers and the results of each stage.
        emoji: npm package of emoji images, see `corpus.load_emoji`.

    Raises:
        InputError: the emoji cannot be read.
        MissingExtraError: a library of the extra `demo` is not installed.
    """
    adapter = align(work)
    tower = train_tower(work, emoji)
    visual = connect(work, emoji, adapter, tower)
    with atomic_path(work / "weights") as weights:
        shutil.copytree(adapter, weights / "adapter")
        shutil.copy2(visual, weights / "visual.safetensors")
        for run in RUNS:
            shutil.copy2(work / run / "curve.jsonl", weights / f"curve_{run}.jsonl")
    return work / "weights"

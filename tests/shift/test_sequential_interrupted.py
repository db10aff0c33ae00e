"""Sequential vectors of a run that was killed, or that ran out of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cmrm.shift.sequential
from cmrm import estimate_shift
from cmrm.model.vlm import VLM
from cmrm.shift.packing import Row
from cmrm.shift.prefix import SharedPrefix
from shift.test_sequential import SEQUENTIAL, some


def test_processes_that_were_killed_at_different_layers_go_on_with_one(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of two layers would be added up."""
    samples = some(12)
    options: dict[str, Any] = {"recommended": SEQUENTIAL, "batch_size": 4}
    whole = estimate_shift(vlm, samples, **options).sequential
    counted: list[int] = []

    def die(prompts: int) -> None:
        counted.append(prompts)
        if sum(counted) == 2 * 12 + 2 * 12 + 8:  # two batches of the third layer
            raise KeyboardInterrupt

    options["checkpoint"] = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        estimate_shift(vlm, samples, on_batch=die, **options)
    monkeypatch.setattr(cmrm.shift.sequential, "gathered", lambda finished: [finished, 1])
    ticks: list[int] = []
    again = estimate_shift(vlm, samples, on_batch=ticks.append, **options).sequential
    assert ticks.count(4) == 2 * 3, "both layers above the first are run"
    assert whole is not None
    assert again is not None
    assert torch.equal(again, whole)


def test_keys_and_values_are_dropped_where_memory_runs_out(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"recommended": SEQUENTIAL, "batch_size": 4}
    kept = estimate_shift(vlm, some(12), **options).sequential
    run, calls = SharedPrefix.last_tokens, [0]

    def exhausted(self: SharedPrefix, row: Row, steps: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 5:
            raise torch.OutOfMemoryError("out of memory")
        return run(self, row, steps)

    monkeypatch.setattr(SharedPrefix, "last_tokens", exhausted)
    with pytest.warns(UserWarning, match="out of memory with a batch of 4"):
        again = estimate_shift(vlm, some(12), **options).sequential
    assert calls[0] == 5, "whole texts are run from there on"
    assert kept is not None
    assert again is not None
    assert torch.allclose(again, kept, atol=1e-4)


def test_where_last_tokens_disagree_whole_texts_are_run(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"recommended": SEQUENTIAL, "batch_size": 4}
    kept = estimate_shift(vlm, some(12), **options).sequential
    run, rows = SharedPrefix.last_tokens, [0]

    def wrong(self: SharedPrefix, row: Row, steps: Any) -> torch.Tensor:
        rows[0] += 1
        return run(self, row, steps) + 1.0

    monkeypatch.setattr(SharedPrefix, "last_tokens", wrong)
    whole = estimate_shift(vlm, some(12), **options).sequential
    assert rows[0] == 1, "one row is tried, and none of its states is used"
    assert kept is not None
    assert whole is not None
    assert torch.allclose(kept, whole, atol=1e-4)

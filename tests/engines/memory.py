"""A model without room for more than two rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cmrm.model.vlm import VLM


def small_memory(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let `generate` run out of memory above two rows; the sizes of all batches come back."""
    original, rows = vlm.model.generate, []

    def small(**inputs: Any) -> Any:
        rows.append(inputs["input_ids"].shape[0])
        if rows[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(**inputs)

    monkeypatch.setattr(vlm.model, "generate", small)
    return rows

"""Visual tuning: several turns behind one image are computed as if each were alone."""

from __future__ import annotations

import pytest
import torch

from cmrm.demo.train import connect as connect_module
from cmrm.demo.train.connect import packed_loss
from tiny import tiny_model

HEAD = [1, 50, 3, 3, 3, 3, 60]
TURNS = [([70, 71, 72, 73], 2), ([80, 81, 82], 1), ([90, 91, 92, 93, 94], 3)]


@pytest.fixture(autouse=True)
def four_image_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect_module, "IMAGE_TOKENS", 4)


def test_packed_turns_are_computed_as_if_alone() -> None:
    model, pixels = tiny_model(), torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        together = packed_loss(model, pixels, HEAD, [TURNS])
        alone = [packed_loss(model, pixels, HEAD, [[turn]]) for turn in TURNS]
    assert torch.allclose(together, torch.stack(alone).mean(), atol=2e-2)


def test_packed_loss_is_that_of_plain_passes() -> None:
    model, pixels = tiny_model(), torch.randn(1, 3, 16, 16)
    plain = []
    with torch.inference_mode():
        together = packed_loss(model, pixels, HEAD, [TURNS])
        for ids, targets in TURNS:
            with torch.autocast("cpu", torch.bfloat16):
                output = model(input_ids=torch.tensor([HEAD + ids]), pixel_values=pixels)
            logits = output.logits[0, -targets - 1 : -1].float()
            losses = torch.nn.functional.cross_entropy(
                logits, torch.tensor(ids[-targets:]), reduction="none"
            )
            weights = torch.tensor([4.0, 4.0, 1.0]) if targets == 3 else torch.ones(targets)
            plain.append((losses * weights).sum() / weights.sum())
    assert torch.allclose(together, torch.stack(plain).mean(), atol=5e-2)

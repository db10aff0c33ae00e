"""Peak memory of a block."""

from __future__ import annotations

import pytest
import torch

from cmrm import memory
from cmrm.measure.memory import RESET, peak_memory

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.skipif(not RESET.exists(), reason="this system does not let a process forget its peak")
def test_the_peak_is_that_of_the_block() -> None:
    for size in (200, 64):  # the second block's peak is its own, though the first one's was higher
        with peak_memory(CPU) as found:
            held = torch.ones(size * MIB, dtype=torch.uint8)
            del held
        assert found.extra is not None
        assert size * MIB * 0.9 < found.extra < (size + 60) * MIB


def test_without_a_way_to_measure_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_forget_peak", lambda: False)
    with peak_memory(CPU) as found:
        pass
    assert found.extra is None

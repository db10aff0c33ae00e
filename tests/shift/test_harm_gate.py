"""The harm gate: its layer, its threshold, and what is recorded of both."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from cmrm.errors import InputError
from cmrm.shift.harm_gate import (
    CLOSE,
    RATES,
    RIDGE,
    GateRecord,
    Scorer,
    at_false_alarms,
    chosen_layer,
    fit_gate,
    held_out_scores,
)
from cmrm.shift.probe import fit_probe

LAYERS, WIDTH = 6, 16


def probed(harmful: torch.Tensor, benign: torch.Tensor) -> Scorer:
    return fit_probe(harmful, benign, RIDGE).scores


def states(n: int, *, apart: float, layer: int = 3, seed: int = 0) -> torch.Tensor:
    """States [n, 6, 16]; from `layer` on those of harmful requests stand `apart` from the rest."""
    drawn = torch.randn(n, LAYERS, WIDTH, generator=torch.Generator().manual_seed(seed))
    drawn[:, layer:, 2] += apart
    return drawn


def test_a_planted_signal_is_found_where_it_begins() -> None:
    harmful, benign = states(80, apart=4.0), states(80, apart=0.0, seed=1)
    gate, record = fit_gate(harmful, benign)
    assert (gate.kind, gate.layers, record.layer) == ("linear", (3,), 3)
    assert min(record.auc[3:]) > 0.97
    assert max(record.auc[:3]) < 0.7
    assert record.recall > 0.8
    direction = gate.vectors[0] / gate.vectors[0].norm()
    assert float(direction[2]) > 0.7
    assert (record.n_harmful, record.n_benign) == (80, 80)


def test_without_a_signal_nothing_is_told_apart() -> None:
    harmful, benign = states(150, apart=0.0), states(150, apart=0.0, seed=1)
    _, record = fit_gate(harmful, benign)
    assert all(abs(area - 0.5) < 0.12 for area in record.auc)
    assert record.recall < 0.2


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_false_alarms_on_anchors_of_its_own_and_on_fresh_ones(share: float) -> None:
    harmful, benign = states(200, apart=2.0), states(400, apart=0.0, seed=1)
    gate, record = fit_gate(harmful, benign, false_alarms=share)
    assert record.wanted_false_alarms == share
    assert record.false_alarms == pytest.approx(share, abs=1 / 400)
    held_harmful, held_benign = held_out_scores(harmful, benign, probed)
    above = held_benign[:, record.layer] > gate.threshold
    assert float(above.double().mean()) == pytest.approx(record.false_alarms)
    recall = (held_harmful[:, record.layer] > gate.threshold).double().mean()
    assert float(recall) == pytest.approx(record.recall)
    fresh = [states(4000, apart=apart, seed=7)[:, list(gate.layers)] for apart in (0.0, 2.0)]
    alarms, found = (float(gate.opens(some).double().mean()) for some in fresh)
    assert alarms == pytest.approx(share, abs=0.02 + share / 4)
    assert found == pytest.approx(record.recall, abs=0.1)


def test_a_held_out_anchor_has_no_part_in_its_score() -> None:
    """Where each anchor has a mark of its own, a probe that had seen it would know it by that."""
    harmful = torch.zeros(20, 2, 40)
    benign = torch.zeros(20, 2, 40)
    for k in range(20):
        harmful[k, :, k] = benign[k, :, 20 + k] = 1.0
    held_harmful, held_benign = held_out_scores(harmful, benign, probed)
    above = (held_harmful[:, None] > held_benign[None] + 1e-9).double().mean()
    assert float(above) < 0.6


def test_the_lowest_layer_that_is_close_to_the_best_is_read() -> None:
    close = CLOSE / 2
    assert chosen_layer(torch.tensor([0.5, 0.9 - close, 0.9, 0.8]), 0, 2) == 1
    assert chosen_layer(torch.tensor([0.5, 0.9 - 3 * close, 0.9, 0.8]), 0, 2) == 2
    assert chosen_layer(torch.tensor([0.5, 0.6, 0.99]), 0, 1) == 1, "never above the highest"


def test_the_gate_stays_at_or_below_the_highest_layer_and_leaves_one_above_it() -> None:
    harmful, benign = states(40, apart=4.0), states(40, apart=0.0, seed=1)
    free, _ = fit_gate(harmful, benign)
    for highest in range(LAYERS - 1):
        gate, record = fit_gate(harmful, benign, highest=highest)
        assert gate.layers == (record.layer,)
        assert record.layer == chosen_layer(torch.tensor(record.auc), 0, highest)
    assert gate.layers == free.layers
    for highest in (-1, LAYERS - 1, LAYERS):
        with pytest.raises(InputError, match=r"one of 0\.\.4"):
            fit_gate(harmful, benign, highest=highest)


@pytest.mark.parametrize(("n_harmful", "n_benign"), [(9, 40), (40, 9)])
def test_too_few_anchors_are_refused(n_harmful: int, n_benign: int) -> None:
    with pytest.raises(InputError, match="needs at least 10 of each"):
        fit_gate(states(n_harmful, apart=4.0), states(n_benign, apart=0.0))


@pytest.mark.parametrize("share", [0, 1, 0.0, 1.0, -0.1, 1.5, True, "0.05", float("nan")])
def test_a_share_that_is_none_is_refused(share: Any) -> None:
    with pytest.raises(InputError, match="a share between 0 and 1"):
        fit_gate(states(20, apart=4.0), states(20, apart=0.0), false_alarms=share)


def test_the_curve_gives_the_gate_of_another_share() -> None:
    harmful, benign = states(60, apart=2.0), states(60, apart=0.0, seed=1)
    gate, record = fit_gate(harmful, benign, false_alarms=0.05)
    assert tuple(row[0] for row in record.curve) == RATES
    for share in RATES:
        moved, changed = at_false_alarms(gate, record, share)
        again, expected = fit_gate(harmful, benign, false_alarms=share)
        assert moved.key == again.key
        assert changed == expected
    with pytest.raises(InputError, match=r"recorded for false alarms of 0\.01, 0\.02"):
        at_false_alarms(gate, record, 0.07)


def test_a_record_survives_json() -> None:
    _, record = fit_gate(states(20, apart=4.0), states(20, apart=0.0, seed=1))
    assert GateRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    for wrong in ({"recall": 1.5}, {"auc": ["x"]}, {"odd": 1}):
        with pytest.raises((ValueError, TypeError)):
            GateRecord.from_json({**record.to_json(), **wrong})

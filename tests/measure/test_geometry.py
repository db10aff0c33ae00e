"""Where states lie: the last tokens, the refusal coordinate, the gate, planes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cmrm import Sample, ShiftVectors, Steering
from cmrm.engines.prompt_states import PromptStates
from cmrm.engines.transformers import TransformersEngine
from cmrm.measure import geometry as module
from cmrm.measure.diagnose import steered_by
from cmrm.measure.geometry import Compass, Trailing, drawn_layers, planes, represent
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Condition, build_request
from ui.sessions import artifact

BOTH = (Condition.QUERY, Condition.ORIGINAL)


@pytest.fixture(scope="module")
def engine(vlm: VLM) -> TransformersEngine:
    return TransformersEngine(vlm)


@pytest.fixture(scope="module")
def shift(vlm: VLM) -> ShiftVectors:
    return artifact(vlm)


@pytest.fixture(scope="module")
def samples(anchors: list[Sample]) -> list[Sample]:
    return [replace(s, label=("harmful", "benign")[k % 2]) for k, s in enumerate(anchors)]


def prompts(tokens: list[list[int]], value: float) -> PromptStates:
    ids = torch.tensor(tokens)
    return PromptStates(torch.full((len(ids), 2, ids.shape[1], 4), value), ids)


def text_of(token: int) -> str:
    return f"<{token}>"


def test_tokens_are_compared_as_far_back_as_they_are_the_same() -> None:
    trailing = Trailing()
    trailing.add(prompts([[7, 1, 2], [5, 3, 2]], 1.0), prompts([[8, 1, 2], [5, 4, 2]], 3.0))
    assert trailing.counts is not None
    assert trailing.counts.tolist() == [0, 1, 2]
    assert trailing.to_json(text_of) == {
        "offsets": [-2, -1], "n": [1, 2], "tokens": ["<1>", "<2>"],
        "relative_distance": [[2.0, 2.0], [2.0, 2.0]],
    }  # fmt: skip


def test_positions_that_few_samples_have_are_left_out() -> None:
    trailing = Trailing()
    same = [[1, 9, 2]] + [[-1, k, 2] for k in range(3)]
    trailing.add(prompts(same, 1.0), prompts(same, 1.5))
    figures = trailing.to_json(text_of)
    assert figures["offsets"] == [-2, -1]
    assert figures["n"] == [4, 4]
    assert figures["tokens"] == [None, "<2>"]
    assert figures["relative_distance"] == [[0.5, 0.5], [0.5, 0.5]]


def test_states_of_padding_count_for_nothing() -> None:
    """A prompt that is shorter than the window has states there that mean nothing, or are zero."""
    text, image = prompts([[-1, 2], [1, 2]], 1.0), prompts([[8, 2], [1, 2]], 2.0)
    text.states[0, :, 0] = 0.0
    trailing = Trailing()
    trailing.add(text, image)
    assert trailing.to_json(text_of)["relative_distance"] == [[1.0, 1.0], [1.0, 1.0]]


def test_every_defence_is_shown_as_it_leaves_the_states(
    engine: TransformersEngine, samples: list[Sample], shift: ShiftVectors
) -> None:
    defenses = [steered_by(shift, Steering(alpha)) for alpha in (0.0, 0.8)]
    defenses[1].name = "stronger"
    gated = steered_by(shift, Steering(0.8, gate=True))
    gated.name = "gated"
    defenses.append(gated)
    ticks: list[int] = []
    states = represent(
        engine, samples, BOTH, batch_size=4, seed=0, defenses=defenses, drawing=True,
        compass=Compass(shift.direction, shift.gate), on_batch=ticks.append,
    )  # fmt: skip
    assert sum(ticks) == 5 * len(samples)
    figures = states.to_geometry(engine)
    distance = figures["relative_distance_to_query"]
    assert set(distance) == {"query", "original", "cmrm_dataset", "stronger", "gated"}
    assert distance["query"] == [0.0] * 3
    assert distance["cmrm_dataset"] == pytest.approx(distance["original"], rel=1e-4)
    assert distance["stronger"] != pytest.approx(distance["original"], rel=1e-2)
    assert set(figures["positions"]) == {"original", "cmrm_dataset", "stronger", "gated"}
    assert figures["gate"]["steers"] == ["gated"]
    last = figures["positions"]["original"]
    assert last["offsets"][-1] == -1
    assert last["n"][-1] == len(samples)
    assert last["relative_distance"][-1] == pytest.approx(distance["original"], abs=1e-4)
    assert [sample["label"] for sample in figures["samples"]] == ["harmful", "benign"] * 3
    assert {len(points) for points in figures["pca"]["0"]["points"].values()} == {len(samples)}


def test_the_refusal_coordinate_and_the_gate(
    engine: TransformersEngine, samples: list[Sample], shift: ShiftVectors
) -> None:
    assert shift.direction is not None
    assert shift.gate is not None
    compass = Compass(shift.direction, shift.gate)
    figures = represent(engine, samples, BOTH, batch_size=3, seed=0, compass=compass).to_geometry(
        engine
    )
    requests = [build_request(s, Condition.ORIGINAL, seed=0) for s in samples]
    states = engine.states(requests)
    unit = torch.nn.functional.normalize(shift.direction, dim=-1)
    expected = torch.einsum("nld,ld->nl", states, unit).mean(0).tolist()
    assert figures["refusal_coordinate"]["original"] == pytest.approx(expected, rel=1e-4)
    scores = shift.gate.scores(states[:, list(shift.gate.layers)])
    for place, label in enumerate(("harmful", "benign")):
        assert figures["gate"]["scores"][label] == pytest.approx(
            scores[place::2].tolist(), abs=1e-3
        )
    assert figures["gate"]["threshold"] == shift.gate.threshold
    assert figures["gate"]["steers"] == []
    assert "pca" not in figures


def test_only_the_first_samples_are_drawn(
    engine: TransformersEngine, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_DRAWN", 3)
    figures = represent(engine, samples, BOTH, batch_size=2, seed=0, drawing=True).to_geometry(
        engine
    )
    assert len(figures["samples"]) == 3
    assert len(figures["pca"]["1"]["points"]["original"]) == 3


def test_planes_are_not_mirrored_from_layer_to_layer() -> None:
    draw = np.random.default_rng(0)
    base = draw.standard_normal((40, 6)) * [9, 4, 1, 1, 1, 1]
    layers = np.stack([base, -base, base + 0.1], axis=1)
    states = {"query": torch.tensor(layers[:20]), "original": torch.tensor(layers[20:])}
    drawn = planes(states, [0, 1, 2])
    first, second, third = (np.array(drawn[k]["points"]["query"]) for k in "012")
    assert (first * second).sum(0) == pytest.approx((first**2).sum(0), rel=0.01)
    assert (first * third).sum(0) == pytest.approx((first**2).sum(0), rel=0.01)


@pytest.mark.parametrize(("n", "drawn"), [(1, 1), (3, 3), (48, 48), (80, 48)])
def test_drawn_layers(n: int, drawn: int) -> None:
    layers = drawn_layers(n)
    assert len(layers) == drawn
    assert layers[0] == 0
    assert layers[-1] == n - 1

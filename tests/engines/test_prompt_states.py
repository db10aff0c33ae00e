"""States of the last prompt tokens, against whole block outputs that share no code with them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from PIL import Image

from cmrm import ShiftVectors, Steering
from cmrm.checks.clauses import block_outputs
from cmrm.engines.prompt_states import prompt_states
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import InputError, ModelError, SteeringError
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM, wrap_vlm
from cmrm.prompts.conditions import Request
from cmrm.shift.resolve import resolved
from cmrm.steering.hooks import intervene
from tiny import tiny_model
from ui.sessions import artifact

PICTURE = Image.new("RGB", (20, 16), "red")
REQUESTS = [
    Request("How do I open it?", (PICTURE,)), Request("Why?", (PICTURE,)),
    Request("What is the longest of these requests about, and why?", (PICTURE,)),
]  # fmt: skip


@pytest.fixture(scope="module")
def shift(vlm: VLM) -> ShiftVectors:
    return artifact(vlm)


@pytest.mark.parametrize("trailing", [1, 4])
def test_they_are_the_block_outputs_at_the_end_of_each_row(vlm: VLM, trailing: int) -> None:
    prompts = prompt_states(vlm, REQUESTS, trailing=trailing)
    assert prompts.states.shape == (3, vlm.n_layers, trailing, vlm.hidden_size)
    for row, request in enumerate(REQUESTS):
        inputs = encode(vlm, [request])
        assert prompts.tokens[row].tolist() == inputs["input_ids"][0, -trailing:].tolist()
        with torch.inference_mode():
            outputs = block_outputs(vlm, inputs)
        for layer, output in enumerate(outputs):
            assert output is not None
            assert torch.allclose(prompts.states[row, layer], output[0, -trailing:], atol=1e-4)
    assert torch.equal(prompts.last, prompts.states[:, :, -1])


@pytest.mark.parametrize(
    "setting",
    [
        Steering(0.7), Steering(0.7, positions="all"), Steering(0.7, positions="last_prompt"),
        Steering(operator="fill"), Steering(0.7, gate=True),
    ],
)  # fmt: skip
def test_as_interventions_leave_them(vlm: VLM, shift: ShiftVectors, setting: Steering) -> None:
    engine = TransformersEngine(vlm)
    moved = []
    for request in REQUESTS:
        parts = resolved(shift, setting, partial(engine.text_states, [request]))
        with torch.inference_mode(), intervene(vlm, *parts):
            outputs = block_outputs(vlm, encode(vlm, [request]))
        steered = engine.prompt_states([request], parts, trailing=3).states[0]
        plain = engine.prompt_states([request], trailing=3).states[0]
        moved.append(not torch.allclose(steered[:, -1], plain[:, -1], atol=1e-3))
        for layer, output in enumerate(outputs):
            assert output is not None
            assert torch.allclose(steered[layer], output[0, -3:], atol=1e-4)
    assert any(moved)


def test_what_edits_generated_tokens_alone_changes_no_prompt(vlm: VLM, shift: ShiftVectors) -> None:
    parts = resolved(shift, Steering(0.7, positions="generated"), lambda: torch.empty(0))
    plain, steered = (prompt_states(vlm, REQUESTS, p, trailing=2) for p in ((), parts))
    assert torch.equal(plain.states, steered.states)


def test_where_a_prompt_is_shorter_there_is_no_token(vlm: VLM) -> None:
    n = encode(vlm, [Request("Why?")])["input_ids"].shape[1]
    prompts = prompt_states(vlm, [Request("Why?"), Request("Why? " * 30)], trailing=n + 3)
    assert (prompts.tokens[0] >= 0).tolist() == [False] * 3 + [True] * n
    assert (prompts.tokens[1] >= 0).all()


def test_what_is_refused(vlm: VLM, shift: ShiftVectors) -> None:
    with pytest.raises(InputError, match="trailing is 0"):
        prompt_states(vlm, REQUESTS, trailing=0)
    training = wrap_vlm(tiny_model(), vlm.processor)
    training.model.train()
    with pytest.raises(ModelError):
        prompt_states(training, REQUESTS)
    parts = resolved(shift, Steering(0.7), lambda: torch.empty(0))
    with pytest.raises(SteeringError), intervene(vlm, *parts):
        prompt_states(vlm, REQUESTS)

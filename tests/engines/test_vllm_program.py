"""What the vLLM plugin does to tokens, without vLLM: against the hooks' own rules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmrm import ShiftVectors, Steering
from cmrm.engines.vllm.board import Board, Row, first_steered, steered_tokens
from cmrm.engines.vllm.program import Program
from cmrm.errors import InputError
from cmrm.shift.artifact import Provenance
from cmrm.steering.gate import Gate

LAYERS, WIDTH = 4, 8
CPU = torch.device("cpu")


def artifact(gate: Gate | None = None, **others: torch.Tensor) -> ShiftVectors:
    vectors = torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(0))
    made = Provenance("m", None, "x", WIDTH, LAYERS)
    return ShiftVectors(vectors, made, Steering(), others, gate=gate)


def probe(layer: int = 0, threshold: float = 0.0) -> Gate:
    direction = torch.zeros(1, WIDTH)
    direction[0, 0] = 1
    return Gate("linear", (layer,), direction, threshold)


def run(program: Program, board: Board, states: torch.Tensor) -> list[torch.Tensor]:
    """States behind every layer, each of which leaves them as they are but for the program."""
    behind = []
    board.score.zero_()
    for layer in range(LAYERS):
        if layer in program.layers:
            step = program.step(layer, torch.float32, CPU)
            states = step(states / 2, states / 2, board) + states / 2
        behind.append(states)
    return behind


@given(
    first=st.integers(0, 12), count=st.integers(1, 8), prompt=st.integers(1, 12),
    image=st.one_of(st.none(), st.integers(1, 12)),
    positions=st.sampled_from(["last", "all", "after_image", "generated", "last_prompt"]),
)  # fmt: skip
def test_chunks_do_not_change_which_tokens_are_steered(
    first: int, count: int, prompt: int, image: int | None, positions: str
) -> None:
    whole = steered_tokens(Row(0, first + count, prompt, image, 0), positions)  # type: ignore[arg-type]
    part = steered_tokens(Row(first, count, prompt, image, 0), positions)  # type: ignore[arg-type]
    assert (whole[first:] == part).all()
    for place, steered in enumerate(part, first):
        expected = {
            "last": place >= prompt - 1, "all": True, "after_image": place >= (image or 0),
            "generated": place >= prompt, "last_prompt": place == prompt - 1,
        }[positions]  # fmt: skip
        assert steered == (image is not None and expected)
    if image is not None:
        edge = first_steered(prompt, image, positions)  # type: ignore[arg-type]
        assert not whole[:edge].any()
        assert whole[edge : edge + 1].all()


def test_add_in_a_mixed_batch() -> None:
    program = Program.of(artifact(), Steering(alpha=0.5))
    board = Board(16, 4, 0, CPU, gated=False)
    rows = [Row(0, 4, 4, 2, 0), Row(0, 3, 3, None, 1), Row(7, 1, 5, 2, 2)]
    assert board.fill_in(rows, "last") == 2
    states = torch.randn(8, WIDTH)
    moved = run(program, board, states)[-1] - states
    whole = 0.5 * artifact().vectors[-1]
    for token in range(8):
        expected = whole if token in (3, 7) else torch.zeros(WIDTH)
        assert torch.allclose(moved[token], expected, atol=1e-5)


def test_a_gate_decides_at_the_last_prompt_token_and_is_held() -> None:
    program = Program.of(artifact(probe(0)), Steering(gate=True, layers=(1, 2, 3)))
    board = Board(16, 4, 0, CPU, gated=True)
    states = torch.randn(5, WIDTH)
    states[1, 0], states[3, 0] = 3.0, -3.0
    board.fill_in([Row(0, 2, 2, 1, 0), Row(0, 2, 2, 1, 1), Row(0, 1, 1, None, 2)], "last")
    moved = (run(program, board, states)[-1] - states).abs().sum(-1)
    assert (moved > 0).tolist() == [False, True, False, False, False]
    board.clear()
    later = torch.randn(3, WIDTH)
    later[0, 0], later[1, 0] = -9.0, 9.0
    board.fill_in([Row(2, 1, 2, 1, 0), Row(2, 1, 2, 1, 1), Row(1, 1, 1, None, 2)], "last")
    moved = (run(program, board, later)[-1] - later).abs().sum(-1)
    assert (moved > 0).tolist() == [True, False, False], "held, whatever later states say"
    board.fill_in([Row(2, 1, 2, 1, 1), Row(2, 1, 2, 1, 0)], "last")
    moved = (run(program, board, later[:2])[-1] - later[:2]).abs().sum(-1)
    assert (moved > 0).tolist() == [False, True], "by request, not by place in the batch"
    again = torch.randn(4, WIDTH)
    again[1, 0], again[2, 0], again[3, 0] = 5.0, -5.0, -5.0
    board.fill_in([Row(0, 4, 2, 1, 1)], "last")
    moved = (run(program, board, again)[-1] - again).abs().sum(-1)
    assert (moved > 0).tolist() == [False, True, True, True], "recomputed in one pass"


def test_a_gate_of_several_layers_is_the_gate() -> None:
    weights = torch.randn(2, WIDTH)
    gate = Gate("linear", (0, 1), weights, 0.3, (0.5, 2.0), bias=-0.1)
    program = Program.of(artifact(gate), Steering(gate=True, layers=(2, 3)))
    states = torch.randn(40, WIDTH)
    board = Board(64, 64, 0, CPU, gated=True)
    board.fill_in([Row(0, 1, 1, 1, k) for k in range(40)], "last")
    moved = (run(program, board, states)[-1] - states).abs().sum(-1) > 0
    assert torch.equal(moved, gate.opens(torch.stack([states, states], 1)))
    assert 0 < int(moved.sum()) < 40


def test_fill_raises_and_never_lowers() -> None:
    direction = torch.randn(LAYERS, WIDTH)
    shift = artifact(direction=direction)
    program = Program.of(shift, Steering(operator="fill", alpha=1.0))
    layers = sorted(program.fills)
    assert layers == [2, 3]
    board = Board(8, 2, len(layers), CPU, gated=False)
    board.fill_in(
        [Row(0, 2, 2, 1, 0), Row(0, 2, 2, 1, 1)], "last_prompt",
        [torch.full((2,), 9.0), torch.full((2,), -9.0)],
    )  # fmt: skip
    states = torch.randn(4, WIDTH)
    behind = run(program, board, states)
    unit = direction[2] / direction[2].norm()
    assert float(behind[2][1] @ unit) == pytest.approx(9.0, abs=1e-4)
    assert torch.allclose(behind[-1][[0, 2, 3]], states[[0, 2, 3]], atol=1e-6)
    assert torch.allclose(board.seen[:4, 0], states @ unit, atol=1e-5), "what was there before"


def test_programs_are_known_by_their_content() -> None:
    one = Program.of(artifact(), Steering(alpha=0.5))
    assert one.key == Program.of(artifact(), Steering(alpha=0.5)).key
    others = [
        Program.of(artifact(), Steering(alpha=0.4)),
        Program.of(artifact(), Steering(alpha=0.5, positions="all")),
        Program.of(artifact(), Steering(alpha=0.5, layers=(1,))),
        Program.of(artifact(probe()), Steering(alpha=0.5, gate=True)),
    ]
    assert len({one.key, *(other.key for other in others)}) == 5


def test_what_float16_does_not_hold() -> None:
    """0 times infinity would make text requests NaN."""
    vectors = artifact().vectors.clone()
    vectors[2] = 1e5
    program = Program.of(replace(artifact(), vectors=vectors), Steering(schedule="per_layer"))
    assert torch.isfinite(program.step(2, torch.bfloat16, CPU).add).all()  # type: ignore[arg-type]
    with pytest.raises(InputError, match="decoder layer 2 reaches"):
        program.step(2, torch.float16, CPU)


def test_what_cannot_be_expressed_is_refused() -> None:
    for setting, reason in (
        (Steering(preserve_norm=True), "preserve_norm"),
        (Steering(operator="fill"), "refusal direction"),
        (Steering(gate=True), "no gate"),
    ):
        with pytest.raises(InputError, match=reason):
            Program.of(artifact(), setting)
    cosine = Gate("cosine", (0,), torch.ones(1, WIDTH), 0.0)
    with pytest.raises(InputError, match="linear probe alone"):
        Program.of(artifact(cosine), Steering(gate=True))
    program = Program.of(artifact(), Steering())
    with pytest.raises(InputError, match="does not fit"):
        program.check(LAYERS, WIDTH + 1)
    with pytest.raises(InputError, match="does not fit"):
        program.check(LAYERS - 1, WIDTH)
    assert Program.of(artifact(), Steering(alpha=0.0)).adds[0].abs().sum() == 0

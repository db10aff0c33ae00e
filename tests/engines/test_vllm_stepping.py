"""What a model runner remembers of requests between passes, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cmrm import ShiftVectors, Steering
from cmrm.engines.vllm import stepping
from cmrm.engines.vllm.board import Board
from cmrm.engines.vllm.program import Program
from cmrm.engines.vllm.stepping import MOST_RECORDS, State, before_dummy, state_of
from cmrm.errors import ModelError
from cmrm.shift.artifact import Provenance
from cmrm.steering.gate import Gate

LAYERS, WIDTH = 4, 8


def state(setting: Steering, slots: int = 4) -> State:
    draw = torch.Generator().manual_seed(0)
    vectors, direction = (torch.randn(LAYERS, WIDTH, generator=draw) for _ in range(2))
    gate = Gate("linear", (0,), torch.ones(1, WIDTH), 0.0)
    made = Provenance("m", None, "x", WIDTH, LAYERS)
    shift = ShiftVectors(vectors, made, Steering(), {"direction": direction}, gate=gate)
    program = Program.of(shift, setting)
    board = Board(
        64, slots, len(program.fills), torch.device("cpu"), gated=program.gate is not None
    )
    return State(program, board)


def request(prompt: int, computed: int = 0, image: int | None = 2, **extra: Any) -> Any:
    place = SimpleNamespace(offset=0, length=image)
    features = [] if image is None else [SimpleNamespace(modality="image", mm_position=place)]
    return SimpleNamespace(
        num_computed_tokens=computed, num_prompt_tokens=prompt, mm_features=features,
        sampling_params=SimpleNamespace(extra_args={"cmrm": extra} if extra else None),
    )  # fmt: skip


FILL, GATED = Steering(operator="fill"), Steering(gate=True, layers=(1, 2, 3))


def test_a_record_survives_a_pass_that_answers_nobody() -> None:
    runner = SimpleNamespace(cmrm_state=state(FILL))
    known = {"t": request(3, image=None, record="one"), "i": request(3, target="one")}
    runner.cmrm_state.prepare(["t"], {"t": 3}, known)
    runner.cmrm_state.board.seen[2] = 7.0

    def dummy(runner: Any) -> None:
        runner.cmrm_state.board.seen.fill_(-99.0)

    before_dummy(dummy, runner)
    runner.cmrm_state.prepare(["i"], {"i": 3}, known)
    board = runner.cmrm_state.board
    assert board.target[2].tolist() == [7.0] * 2
    assert board.mask[:3, 0].tolist() == [0, 0, 1]


def test_several_samples_of_one_request_share_a_record() -> None:
    made = state(FILL)
    known = {"t": request(2, image=None, record="x")}
    known |= {f"{k}_i": request(3, target="x") for k in range(2)}
    made.prepare(["t"], {"t": 2}, known)
    made.prepare(["0_i", "1_i"], {"0_i": 3, "1_i": 3}, known)
    assert set(made.targets) == {"0_i", "1_i"}


def test_a_record_is_dropped_behind_its_last_use() -> None:
    made = state(FILL)
    known = {"t": request(2, image=None, record="x")}
    known |= {f"{k}_i": request(3, target="x", uses=2) for k in range(3)}
    made.prepare(["t"], {"t": 2}, known)
    made.prepare(["0_i"], {"0_i": 3}, known)
    assert list(made.records) == ["x"]
    made.prepare(["0_i", "1_i"], {"0_i": 1, "1_i": 3}, {**known, "0_i": request(3, 3, target="x")})
    assert made.records == made.uses == {}
    assert set(made.targets) == {"0_i", "1_i"}
    with pytest.raises(ModelError, match="no coordinates"):
        made.prepare(["2_i"], {"2_i": 3}, known)


def test_outcomes_are_of_whole_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepping, "MOST_OUTCOMES", 1)
    made = state(FILL)
    made.remembers = True
    known = {"t": request(2, image=None, record="x"), "i": request(3, target="x")}
    made.prepare(["t"], {"t": 2}, known)
    assert made.outcomes == {}, "nobody asks for what was done to a text that was run for another"
    made.prepare(["i"], {"i": 3}, known)
    assert made.outcomes == {"i": {"steered": 1, "open": None}}
    known |= {"late": request(4, image=None), "i": request(3, 3, target="x")}
    made.prepare(["late"], {"late": 4}, known)
    assert list(made.outcomes) == ["late"], "the oldest one goes first"
    made.prepare(["i"], {"i": 1}, known)
    assert made.outcome_of("i") is None, "a part of it is not told"
    assert made.outcome_of("late") == {"steered": 0, "open": None}
    made.prepare([], {}, {})
    assert made.counted == {}


def test_a_new_request_of_an_old_name_inherits_nothing() -> None:
    made = state(FILL)
    texts = {f"t{k}": request(2, image=None, record=f"r{k}") for k in range(2)}
    for k in range(2):
        made.prepare([f"t{k}"], {f"t{k}": 2}, texts)
        made.board.seen[1] = float(k)
    made.prepare(["a"], {"a": 3}, {"a": request(3, target="r0")})
    assert made.targets["a"].tolist() == [0.0, 0.0]
    made.prepare(["a"], {"a": 3}, {"a": request(3, target="r1")}, ended=["a"])
    assert made.targets["a"].tolist() == [1.0, 1.0]
    gated = state(GATED)
    gated.prepare(["a"], {"a": 3}, {"a": request(3)})
    gated.board.held[gated.slots["a"]] = 1.0
    with pytest.raises(ModelError, match="has not decided"):
        gated.prepare(["a"], {"a": 1}, {"a": request(3, computed=3)}, ended=["a"])
    assert gated.board.held.sum() == 0


def test_decisions_belong_to_requests_and_end_with_them() -> None:
    made = state(GATED, slots=2)
    known = {name: request(3) for name in "abc"}
    made.prepare(["a", "b"], {"a": 3, "b": 3}, known)
    assert sorted(made.slots.values()) == [0, 1]
    with pytest.raises(ModelError, match="too many requests"):
        made.prepare(["c"], {"c": 3}, known)
    del known["a"]
    made.prepare(["c"], {"c": 3}, known)
    assert set(made.slots) == {"b", "c"}
    waiting = {**known, "b": request(3, computed=3)}
    made.prepare(["b"], {"b": 1}, waiting)
    assert made.board.slot[0] == made.slots["b"]


def test_nothing_is_guessed() -> None:
    for setting, known, message in (
        (GATED, {}, "nothing is known of the request a"),
        (GATED, {"a": request(3, computed=5)}, "has not decided"),
        (FILL, {"a": request(3)}, "no coordinates of the text"),
        (FILL, {"a": request(3, target="gone")}, "no coordinates of the text"),
    ):
        with pytest.raises(ModelError, match=message):
            state(setting).prepare(["a"], {"a": 3}, known)
    with pytest.raises(ModelError, match="not armed"):
        state_of(SimpleNamespace())
    state(FILL).prepare(["a"], {"a": 3}, {"a": request(3, image=None)})


def test_records_that_nobody_uses_do_not_pile_up() -> None:
    made = state(FILL)
    for k in range(MOST_RECORDS + 5):
        made.pending = [(str(k), 0)]
        made.keep_records()
    assert len(made.records) == MOST_RECORDS
    assert "0" not in made.records


@pytest.mark.parametrize("setting", [FILL, GATED, Steering(positions="generated")])
def test_a_step_of_texts_alone_is_idle_where_nothing_is_compiled(setting: Steering) -> None:
    made = state(setting)
    known = {
        "text": request(3, image=None), "image": request(3, target=[0.0, 0.0]),
        "asked": request(3, image=None, record="x"),
    }  # fmt: skip

    def idle(*names: str) -> bool:
        made.prepare(names, dict.fromkeys(names, 3), known)
        return made.board.idle

    assert not idle("text"), "a compiled step would leave out what the next one needs"
    made.eager = True
    hidden = torch.randn(3, WIDTH)
    step = made.program.step(LAYERS - 1, torch.float32, torch.device("cpu"))
    assert idle("text")
    assert step(hidden, None, made.board) is hidden
    assert not idle("image")
    assert not idle("text", "image")
    if setting is FILL:
        assert not idle("asked"), "its coordinates are read"
    assert idle("text")
    made.board.clear()
    assert not made.board.idle, "the self-test comes without requests"


def test_counts() -> None:
    made = state(Steering(alpha=0.5))
    known = {"a": request(4), "b": request(3, image=None)}
    made.prepare(["a", "b"], {"a": 4, "b": 3}, known)
    assert made.counts == {"steps": 1, "tokens": 7, "masked": 1}

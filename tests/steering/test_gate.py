"""A gate decides once a turn and row, at the last prompt token, and its decision holds while the
reply is generated."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from cmrm import Steering, steer
from cmrm.errors import InputError, SteeringError
from cmrm.model.compat import cache_of, with_cache
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.steering.gate import Gate
from cmrm.steering.hooks import intervene
from cmrm.steering.intervention import Edit, Intervention
from steering.gates import (
    READ,
    STEERED,
    edits_of,
    four_layers,
    gate_at,
    gated,
    probe_vectors,
    scores_of,
)

RED, BLUE = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
BATCH = [
    Request("what is it", (RED,)),
    Request("who painted this wall, and when was it", (BLUE,)),
    Request("tell me more about anything"),
    Request("is it a wall", (BLUE,)),
]
ALWAYS, NEVER = -1e6, 1e6


@pytest.fixture(scope="module")
def model() -> VLM:
    return four_layers()


@pytest.fixture(scope="module")
def inputs(model: VLM) -> dict[str, torch.Tensor]:
    return encode(model, BATCH)


@pytest.fixture(scope="module")
def opened(model: VLM, inputs: dict[str, torch.Tensor]) -> int:
    """The row with an image for which the gate opens: it has the highest score of those."""
    scores = scores_of(model, inputs)
    return max((0, 1, 3), key=lambda row: float(scores[row]))


@pytest.fixture(scope="module")
def threshold(model: VLM, inputs: dict[str, torch.Tensor], opened: int) -> float:
    """The gate opens for the row `opened` alone of those with an image."""
    others = [row for row in (0, 1, 3) if row != opened]
    scores = scores_of(model, inputs)
    return float((scores[opened] + scores[others].max()) / 2)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def reply(model: VLM, inputs: dict[str, Any], **options: Any) -> Any:
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    return model.model.generate(**inputs, **settings)


def logits(model: VLM, inputs: dict[str, Any]) -> torch.Tensor:
    out: torch.Tensor = model.model(**inputs).logits
    return out


@pytest.mark.parametrize("positions", ["last", "last_prompt", "generated"])
def test_closed_rows_are_the_untouched_models_and_open_rows_the_ungated_ones(
    model: VLM, inputs: dict[str, torch.Tensor], threshold: float, opened: int, positions: Any
) -> None:
    part = gated(model, threshold, positions)
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    plain = reply(model, inputs, **options)
    with intervene(model, replace(part, gate=None)):
        ungated = reply(model, inputs, **options)
    with intervene(model, part):
        mixed = reply(model, inputs, **options)
    assert not torch.equal(plain.sequences[opened], ungated.sequences[opened])
    for row in range(len(BATCH)):
        expected = ungated if row == opened else plain
        assert torch.equal(mixed.sequences[row], expected.sequences[row])
        for step, other in zip(mixed.logits, expected.logits, strict=True):
            assert torch.equal(step[row], other[row]), "bit for bit"


def test_rows_and_tokens_are_counted_truly(
    model: VLM, inputs: dict[str, torch.Tensor], threshold: float
) -> None:
    for positions, each in (("last", 6), ("last_prompt", 1), ("generated", 5)):
        with intervene(model, gated(model, threshold, positions)) as session:
            reply(model, inputs)
        assert (session.rows_decided, session.rows_open) == (3, 1)
        assert session.tokens == each
        assert session.reached == set(STEERED)


def test_a_reply_without_a_cache_is_decided_and_counted_once(
    model: VLM, inputs: dict[str, torch.Tensor], threshold: float
) -> None:
    part = gated(model, threshold)
    with intervene(model, part) as cached:
        expected = reply(model, inputs, suppress_tokens=[model.image_token_id])
    with intervene(model, part) as session:
        found = reply(model, inputs, suppress_tokens=[model.image_token_id], use_cache=False)
    assert torch.equal(found, expected)
    assert (session.rows_decided, session.rows_open) == (cached.rows_decided, cached.rows_open)


def test_rows_without_an_image_are_never_decided_on(
    model: VLM, inputs: dict[str, torch.Tensor]
) -> None:
    plain = reply(model, inputs)
    with intervene(model, gated(model, ALWAYS)) as session:
        steered = reply(model, inputs)
    assert torch.equal(steered[2], plain[2])
    assert not torch.equal(steered[1], plain[1])
    assert (session.rows_decided, session.rows_open) == (3, 3)
    with intervene(model, gated(model, ALWAYS)) as session:
        reply(model, encode(model, [BATCH[2]]))
    assert (session.rows_decided, session.rows_open, session.tokens) == (0, 0, 0)


def test_a_gate_that_stays_closed_is_no_error(model: VLM, inputs: dict[str, torch.Tensor]) -> None:
    plain = reply(model, inputs)
    with intervene(model, gated(model, NEVER)) as session:
        assert torch.equal(reply(model, inputs), plain)
    assert (session.rows_decided, session.rows_open, session.tokens) == (3, 0, 0)


def test_a_second_turn_on_the_same_cache_is_decided_anew(model: VLM) -> None:
    """Closed in the first turn and open in the second."""
    first = encode(model, [BATCH[0]])
    begun = float(scores_of(model, first)[0])
    said = ("and now, what else", "so", "a very long question about nothing", "!!", "why?")
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    plain = reply(model, first, **options)
    talks = []
    for text in said:
        behind = torch.tensor([model.tokenizer(f"{text}\n")["input_ids"]])
        tokens = torch.cat([plain, behind], 1)
        whole = {**first, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        talks.append((float(scores_of(model, whole)[0]), whole))
    score, whole = max(talks, key=lambda talk: talk[0])
    assert score > begun, "no second turn has a higher score than the first"
    with intervene(model, gated(model, (score + begun) / 2)) as session:
        out = reply(model, first, return_dict_in_generate=True, **options)
        assert (session.rows_decided, session.rows_open, session.tokens) == (1, 0, 0)
        assert torch.equal(out.sequences, plain)
        more = {**whole, **with_cache(model.model, cache_of(out))}
        more.pop("pixel_values")
        steered = reply(model, more)
    assert (session.rows_decided, session.rows_open, session.tokens) == (2, 1, 6)
    assert not torch.equal(steered, reply(model, whole))


def test_a_decision_is_held_from_block_to_block(
    model: VLM, inputs: dict[str, torch.Tensor], threshold: float
) -> None:
    part, token = gated(model, threshold), torch.full((len(BATCH), 1), 70)
    with intervene(model, part):
        behind = with_cache(model.model, cache_of(model.model(**inputs, use_cache=True)))
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
        expected = model.model(input_ids=token, attention_mask=mask, **behind).logits
    with intervene(model, part):
        behind = with_cache(model.model, cache_of(model.model(**inputs, use_cache=True)))
    with intervene(model, part) as session:
        held = model.model(input_ids=token, attention_mask=mask, **behind).logits
    assert torch.equal(held, expected)
    assert session.rows_decided == 0, "it was decided before"


def test_two_caches_in_turn_keep_their_decisions(model: VLM) -> None:
    requests = [encode(model, [BATCH[row]]) for row in (0, 1)]
    scores = torch.cat([scores_of(model, inputs) for inputs in requests])
    part = gated(model, float(scores.mean()))
    token = torch.tensor([[70]])

    def begun(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        return with_cache(model.model, cache_of(model.model(**inputs, use_cache=True)))

    alone = []
    for inputs in requests:
        with intervene(model, part):
            behind = begun(inputs)
            alone.append([model.model(input_ids=token, **behind).logits for _ in range(3)])
    with intervene(model, part) as session:
        both = [begun(inputs) for inputs in requests]
        for step in range(3):
            for which in (0, 1):
                found = model.model(input_ids=token, **both[which]).logits
                assert torch.equal(found, alone[which][step])
    assert (session.rows_decided, session.rows_open, session.tokens) == (2, 1, 4)


def test_a_prompt_that_was_run_outside_cannot_be_decided(model: VLM) -> None:
    inputs = encode(model, [BATCH[0]])
    behind = with_cache(model.model, cache_of(model.model(**inputs, use_cache=True)))
    with (
        pytest.raises(SteeringError, match="has not read this turn's last prompt token"),
        intervene(model, gated(model, ALWAYS), has_image=[True]),
    ):
        model.model(input_ids=torch.tensor([[70]]), **behind)


def test_two_gated_interventions_decide_each_for_itself(
    model: VLM, inputs: dict[str, torch.Tensor]
) -> None:
    """The second one's gate is the first's turned round: each row is steered by one of them."""
    scores = scores_of(model, inputs)
    order = [row for row in scores.argsort(descending=True).tolist() if row != 2]
    threshold = float((scores[order[0]] + scores[order[1]]) / 2)
    one = gated(model, threshold)
    turned = Gate("linear", READ, -probe_vectors(model), -threshold, weights=(0.7, 0.3))
    other = Intervention(edits_of(model, seed=9), "last", turned)
    expected = []
    for part in (one, other):
        with intervene(model, replace(part, gate=None)):
            expected.append(reply(model, inputs))
    with intervene(model, one, other) as session:
        both = reply(model, inputs)
    for row in (0, 1, 3):
        assert torch.equal(both[row], expected[0 if row == order[0] else 1][row])
    assert (session.rows_decided, session.rows_open) == (6, 3)
    ungated = Intervention(edits_of(model, seed=9), "last")
    with intervene(model, gated(model, NEVER), ungated):
        assert torch.equal(reply(model, inputs), expected[1])


def test_another_thread_is_left_alone(model: VLM) -> None:
    inputs = encode(model, [BATCH[0]])
    plain, results = logits(model, inputs), []

    def other() -> None:
        with torch.no_grad():
            results.append(logits(model, inputs))

    with intervene(model, gated(model, ALWAYS)) as session:
        steered = logits(model, inputs)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(60)
    assert torch.equal(results[0], plain)
    assert not torch.equal(steered, plain)
    assert session.rows_decided == 1


def test_two_threads_with_gates_of_their_own(model: VLM) -> None:
    requests = [encode(model, [BATCH[row]]) for row in (0, 1)]
    plain = [logits(model, inputs) for inputs in requests]
    parts = [gated(model, ALWAYS), gated(model, NEVER)]
    barrier, results = threading.Barrier(2), {}

    def work(which: int) -> None:
        with torch.no_grad(), intervene(model, parts[which]):
            for _ in range(5):
                barrier.wait(60)
                results[which] = logits(model, requests[which])

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert torch.equal(results[1], plain[1])
    assert not torch.allclose(results[0], plain[0], atol=1e-2)


@pytest.mark.parametrize("is_open", [True, False])
def test_guidance_decides_for_its_own_branch_alone(model: VLM, is_open: bool) -> None:
    image, text = encode(model, [BATCH[0]]), encode(model, [BATCH[2]])
    part = gated(model, ALWAYS if is_open else NEVER)
    options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
    guided = {"guidance_scale": 1.5, "negative_prompt_ids": text["input_ids"]}
    with intervene(model, part) as session:
        found = reply(model, image, **options, **guided)
        assert (session.rows_decided, session.rows_open) == (1, int(is_open))
        new = found.sequences[:, image["input_ids"].shape[1] :]
        out = model.model(**image, use_cache=True)
        forced = [out.logits[:, -1]]
        for k in range(new.shape[1] - 1):
            behind = with_cache(model.model, cache_of(out))
            out = model.model(input_ids=new[:, k : k + 1], **behind)
            forced.append(out.logits[:, -1])
    for branch, expected in zip(found.logits, forced, strict=True):
        assert torch.allclose(branch, expected, atol=1e-4)
    if not is_open:
        assert torch.equal(found.sequences, reply(model, image, **guided))


def test_a_streamer_gets_what_is_returned(model: VLM, threshold: float) -> None:
    from transformers import TextIteratorStreamer

    for row in (0, 1):
        inputs = encode(model, [BATCH[row]])
        streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True)
        with intervene(model, gated(model, threshold)):
            expected = reply(model, inputs)
        with intervene(model, gated(model, threshold)):
            assert torch.equal(reply(model, inputs, streamer=streamer), expected)
        width = inputs["input_ids"].shape[1]
        assert "".join(streamer) == model.tokenizer.decode(expected[0, width:])


@pytest.mark.parametrize("positions", ["all", "after_image"])
def test_positions_before_the_decision_are_refused(model: VLM, positions: Any) -> None:
    with pytest.raises(InputError, match="Choose last, last_prompt, generated"):
        gated(model, 0.0, positions)
    with pytest.raises(InputError, match="decides at the last prompt token"):
        Steering(positions=positions, gate=True)


@pytest.mark.parametrize("layer", READ)
def test_a_gate_stands_below_its_edits(model: VLM, layer: int) -> None:
    edit = Edit(layer, torch.ones(model.hidden_size))
    with pytest.raises(InputError, match="steer layers from 2 on"):
        Intervention((edit, *edits_of(model)), "last", gate_at(model, 0.0))


def test_a_gate_of_another_width_is_refused(model: VLM) -> None:
    gate = Gate("linear", (0,), torch.ones(1, model.hidden_size + 1), 0.0)
    part = Intervention(edits_of(model), "last", gate)
    with pytest.raises(InputError, match=r"the gate's vectors are 33 wide"):
        intervene(model, part)


def test_raw_vectors_have_no_gate(model: VLM) -> None:
    vectors = torch.zeros(model.n_layers, model.hidden_size)
    with pytest.raises(InputError, match="raw vectors have no gate"):
        steer(model, vectors, Steering(gate=True))


def test_a_gate_takes_part_in_the_key(model: VLM) -> None:
    keys = {gated(model, value).key for value in (0.0, 0.0, 1.0)}
    assert len(keys) == 2
    assert replace(gated(model, 0.0), gate=None).key not in keys


@pytest.mark.parametrize(
    ("kind", "metric"), [("linear", None), ("cosine", None), ("vocabulary", torch.eye(4))]
)
def test_scores_of_every_kind(kind: Any, metric: torch.Tensor | None) -> None:
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(2, 4, generator=generator)
    states = torch.randn(5, 2, 4, generator=generator)
    gate = Gate(kind, (1, 3), vectors, 0.2, weights=(0.5, 2.0), bias=-0.1, metric=metric)
    for row in range(5):
        expected = -0.1
        for place, weight in ((0, 0.5), (1, 2.0)):
            h, u = states[row, place].double(), vectors[place].double()
            score = h @ u
            if kind == "cosine":
                p = torch.tanh(u * (h @ u) / (u @ u))
                score = (h @ p) / (h.norm() * p.norm())
            elif kind == "vocabulary":
                score = (h @ u) / h.norm()
            expected += weight * float(score)
        assert float(gate.scores(states)[row]) == pytest.approx(expected, abs=1e-5)
        assert bool(gate.opens(states)[row]) == (expected > 0.2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "square"}, "kind is 'square'"),
        ({"vectors": torch.ones(2, 4)}, "1 layers needs vectors"),
        ({"weights": (1.0, 1.0)}, "1 weights|needs vectors"),
        ({"threshold": float("nan")}, "NaN or infinity"),
        ({"vectors": torch.full((1, 4), float("inf"))}, "NaN or infinity"),
        ({"kind": "vocabulary"}, "needs one"),
        ({"metric": torch.eye(4)}, "needs one"),
        ({"kind": "vocabulary", "metric": torch.eye(3)}, r"expected \(4, 4\)"),
        ({"layers": (-1,)}, "layers are"),
    ],
)
def test_gates_that_mean_nothing_are_refused(change: dict[str, Any], reason: str) -> None:
    values: dict[str, Any] = {
        "kind": "linear", "layers": (0,), "vectors": torch.ones(1, 4), "threshold": 0.0
    }  # fmt: skip
    with pytest.raises(InputError, match=reason):
        Gate(**{**values, **change})

"""Fill raises the refusal coordinate to what the request has as text, once, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from cmrm import Generation, Sample, ShiftVectors, Steering, generate, steer, stream
from cmrm.engines.base import Decoding
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import InputError, SteeringError
from cmrm.model.encode import encode
from cmrm.model.identity import identity_of
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Condition, Request, Turn, build_request
from cmrm.shift.artifact import Provenance
from cmrm.shift.resolve import resolved
from cmrm.steering.gate import Gate
from cmrm.steering.intervention import fill_intervention

RED, BLUE = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
ASKED = [
    Sample("a", "what is it", RED),
    Sample("b", "who painted this wall, and when was it", BLUE),
    Sample("c", "is it a wall", BLUE),
    Sample("d", "say what stands there", RED),
]
FILL = Steering(operator="fill", layers=(1, 2))


@pytest.fixture
def shift(vlm: VLM) -> ShiftVectors:
    """An artifact with a random refusal direction, and a gate that is open."""
    generator = torch.Generator().manual_seed(5)
    shape = (vlm.n_layers, vlm.hidden_size)
    vectors, direction = (torch.randn(shape, generator=generator) for _ in range(2))
    made = Provenance(
        "tiny", None, type(vlm.model).__name__, shape[1], shape[0], sequential_layers=(1, 2)
    )
    probe = torch.randn(1, shape[1], generator=generator)
    sequential = torch.cat([torch.zeros(1, shape[1]), 3 * vectors[1:]])
    return ShiftVectors(
        vectors,
        made,
        FILL,
        {"direction": direction, "sequential": sequential},
        identity_of(vlm),
        Gate("linear", (0,), probe, -1e6),
    )


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def states(vlm: VLM, request: Request) -> torch.Tensor:
    """float32 [L, d] of one prompt's last token, by hooks of the test's own."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda m, a, o: seen.append((o[0] if isinstance(o, tuple) else o)[0, -1])
        )
        for layer in vlm.layers
    ]
    vlm.model(**encode(vlm, [request]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(seen).float()


@contextmanager
def filled_by_hand(
    vlm: VLM, direction: torch.Tensor, text: Sequence[torch.Tensor | None], setting: Steering
) -> Iterator[list[torch.Tensor]]:
    """h + alpha relu(h_t . r - h . r) r at the last column of the first pass, layer after layer;
    the coordinates before and after are yielded."""
    unit = direction / direction.norm(dim=-1, keepdim=True)
    done: set[int] = set()
    seen: list[torch.Tensor] = []

    def hook_of(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            if layer in done:
                return None
            done.add(layer)
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for row, wanted in enumerate(text):
                if wanted is None:
                    continue
                h, r = hidden[row, -1], unit[layer]
                before = h @ r
                missing = wanted[layer] @ r - before
                hidden[row, -1] = h + setting.alpha * missing.clamp_min(0) * r
                seen.append(torch.stack([before, hidden[row, -1] @ r]))
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    assert setting.layers is not None
    handles = [vlm.layers[layer].register_forward_hook(hook_of(layer)) for layer in setting.layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def answer(vlm: VLM, requests: Sequence[Request], n: int = 6) -> torch.Tensor:
    out: torch.Tensor = vlm.model.generate(
        **encode(vlm, requests), max_new_tokens=n, min_new_tokens=n, do_sample=False
    )
    return out


def asked(samples: Sequence[Sample]) -> list[Request]:
    return [build_request(sample, Condition.ORIGINAL) for sample in samples]


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_fill_is_what_its_equation_says(vlm: VLM, shift: ShiftVectors, alpha: float) -> None:
    assert shift.direction is not None
    requests, setting = asked(ASKED), replace(FILL, alpha=alpha)
    text = [states(vlm, request.without_images()) for request in requests]
    with filled_by_hand(vlm, shift.direction, text, setting) as coordinates:
        expected = vlm.model(**encode(vlm, requests)).logits[:, -1]
    raised = [bool(after > before + 1e-6) for before, after in coordinates]
    assert any(raised)
    assert not all(raised), "some stood above their text before, and are left there"
    assert all(after >= before - 1e-5 for before, after in coordinates)
    with steer(vlm, shift, setting, requests=requests) as session:
        found = vlm.model(**encode(vlm, requests)).logits[:, -1]
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, vlm.model(**encode(vlm, requests)).logits[:, -1], atol=1e-2)
    assert session.tokens == len(ASKED)


def test_replies_are_those_of_the_equation(vlm: VLM, shift: ShiftVectors) -> None:
    assert shift.direction is not None
    requests = asked(ASKED)
    text = [states(vlm, request.without_images()) for request in requests]
    with filled_by_hand(vlm, shift.direction, text, FILL):
        expected = answer(vlm, requests)
    with steer(vlm, shift, requests=requests):
        assert torch.equal(answer(vlm, requests), expected)


def test_requests_may_be_samples_and_give_what_generate_gives(
    vlm: VLM, shift: ShiftVectors
) -> None:
    replies = generate(vlm, ASKED, shift=shift, max_new_tokens=6)
    plain = generate(vlm, ASKED, max_new_tokens=6)
    assert [reply.text for reply in replies] != [reply.text for reply in plain]
    inputs = encode(vlm, asked(ASKED))
    width = inputs["input_ids"].shape[1]
    for given in (ASKED, asked(ASKED)):
        with steer(vlm, shift, requests=given):
            out = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        for row, reply in zip(out, replies, strict=True):
            text = vlm.tokenizer.decode(row[width:], skip_special_tokens=True).strip()
            assert text == reply.text


def test_without_requests_fill_says_what_it_needs(vlm: VLM, shift: ShiftVectors) -> None:
    with pytest.raises(InputError, match=r"requests=\[...\]"):
        steer(vlm, shift, FILL)
    with pytest.raises(InputError, match="needs an artifact with a refusal direction"):
        steer(vlm, shift.vectors, FILL, requests=ASKED)
    bare = replace(shift, others={})
    with pytest.raises(InputError, match="holds no refusal direction"):
        steer(vlm, bare, FILL, requests=ASKED)


def test_requests_for_another_number_of_rows_are_refused(vlm: VLM, shift: ShiftVectors) -> None:
    with (
        pytest.raises(SteeringError, match="vectors for 3 rows"),
        steer(vlm, shift, requests=ASKED[:3]),
    ):
        answer(vlm, asked(ASKED))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_give_what_single_requests_give(vlm: VLM, shift: ShiftVectors, size: int) -> None:
    whole = generate(vlm, ASKED, shift=shift, max_new_tokens=6)
    assert generate(vlm, ASKED, shift=shift, max_new_tokens=6, batch_size=size) == whole


def test_alpha_zero_runs_no_text(vlm: VLM, shift: ShiftVectors) -> None:
    def never() -> torch.Tensor:
        raise AssertionError("the text was run")

    assert resolved(shift, replace(FILL, alpha=0.0), never) == []
    passes: list[int] = []
    handle = vlm.layers[0].register_forward_hook(lambda m, a, o: passes.append(1))
    try:
        still = generate(vlm, ASKED, shift=shift, steering=replace(FILL, alpha=0), max_new_tokens=4)
        without = len(passes)
        plain = generate(vlm, ASKED, max_new_tokens=4)
        assert len(passes) == 2 * without
    finally:
        handle.remove()
    assert still == plain
    with steer(vlm, shift, FILL, alpha=0.0):
        assert torch.equal(answer(vlm, asked(ASKED)), answer(vlm, asked(ASKED)))


def test_text_rows_of_a_mixed_batch_are_left_alone(vlm: VLM, shift: ShiftVectors) -> None:
    requests = [*asked(ASKED[:2]), Request("tell me more about anything"), *asked(ASKED[2:])]
    plain = answer(vlm, requests)
    with steer(vlm, shift, requests=requests) as session:
        filled = answer(vlm, requests)
    assert torch.equal(filled[2], plain[2])
    assert not torch.equal(filled, plain)
    assert session.tokens == 4


def test_an_image_of_an_earlier_turn_counts(vlm: VLM, shift: ShiftVectors) -> None:
    """The text of a conversation is all of its turns without their images."""
    assert shift.direction is not None
    before = (Turn("user", "What is it?", (RED,)), Turn("assistant", "A wall."))
    talk = Request("And who painted it?", before=before)
    text = states(vlm, talk.without_images())
    with filled_by_hand(vlm, shift.direction, [text], FILL):
        expected = vlm.model(**encode(vlm, [talk])).logits[:, -1]
    plain = vlm.model(**encode(vlm, [talk])).logits[:, -1]
    assert not torch.allclose(plain, expected, atol=1e-3)
    engine = TransformersEngine(vlm)
    for _ in range(2):  # on a fresh prefix, and behind what was kept of it
        parts = resolved(shift, FILL, lambda: engine.text_states([talk]))
        with engine_steering(vlm, parts):
            found = vlm.model(**encode(vlm, [talk])).logits[:, -1]
        assert torch.allclose(found, expected, atol=1e-4)
    reply = engine.answer([talk], parts, Decoding(4))
    with filled_by_hand(vlm, shift.direction, [text], FILL):
        by_hand = answer(vlm, [talk], 4)[0, encode(vlm, [talk])["input_ids"].shape[1] :]
    assert reply[0].text == vlm.tokenizer.decode(by_hand, skip_special_tokens=True).strip()


def engine_steering(vlm: VLM, parts: Sequence[Any]) -> Any:
    from cmrm.steering.hooks import intervene

    return intervene(vlm, *parts)


@pytest.mark.parametrize(
    "setting", [FILL, replace(FILL, gate=True), Steering(schedule="sequential", gate=True)]
)
def test_a_stream_gives_what_generate_gives(
    vlm: VLM, shift: ShiftVectors, setting: Steering
) -> None:
    for sample in ASKED[:2]:
        pieces = list(stream(vlm, sample, shift=shift, steering=setting, max_new_tokens=6))
        whole = pieces.pop()
        assert isinstance(whole, Generation)
        assert "".join(map(str, pieces)).strip() == whole.text
        expected = generate(vlm, [sample], shift=shift, steering=setting, max_new_tokens=6)[0]
        assert whole == expected
        assert expected.gate_open is (True if setting.gate else None)


@pytest.mark.parametrize("setting", [FILL, Steering(schedule="sequential")])
def test_behind_a_gate_closed_rows_are_untouched_and_open_rows_are_not(
    vlm: VLM, shift: ShiftVectors, setting: Steering
) -> None:
    assert shift.gate is not None
    scores = [float(states(vlm, request)[0] @ shift.gate.vectors[0]) for request in asked(ASKED)]
    ordered = sorted(scores)
    half = replace(shift, gate=replace(shift.gate, threshold=(ordered[1] + ordered[2]) / 2))
    plain = generate(vlm, ASKED, max_new_tokens=6)
    ungated = generate(vlm, ASKED, shift=half, steering=setting, max_new_tokens=6)
    mixed = generate(vlm, ASKED, shift=half, steering=replace(setting, gate=True), max_new_tokens=6)
    for score, untouched, steered, found in zip(scores, plain, ungated, mixed, strict=True):
        is_open = score >= ordered[2]
        assert found.gate_open is is_open
        assert found.text == (steered if is_open else untouched).text
    assert [reply.text for reply in ungated] != [reply.text for reply in plain]


def test_settings_that_fill_cannot_have_are_refused() -> None:
    assert Steering(operator="fill").positions == "last_prompt"
    for wrong in ({"positions": "all"}, {"positions": "generated"}, {"preserve_norm": True}):
        with pytest.raises(InputError, match="goes with positions last_prompt"):
            Steering(operator="fill", **wrong)
    with pytest.raises(InputError, match="one of add, fill"):
        Steering(operator="project")  # type: ignore[arg-type]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected \[L, d\] and \[rows, L, d\]"):
        fill_intervention(torch.ones(3, 4), torch.ones(2, 3, 5), FILL)
    with pytest.raises(InputError, match="out of range"):
        fill_intervention(torch.ones(2, 4), torch.ones(1, 2, 4), FILL)

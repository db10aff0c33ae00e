"""The transformers engine: batches, rows with and without images, memory, streaming, one caller at
a time."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from PIL import Image

from cmrm import Sample, SampleLevel, Steering, estimate_shift, generate, steer, stream
from cmrm.engines.base import Decoding, Reply
from cmrm.engines.generation import Generation
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import InputError, SteeringError
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.steering.intervention import shift_intervention
from engines.memory import small_memory

IMAGE = Image.new("RGB", (16, 16), "red")
MIXED = [
    Request("what is it", (IMAGE,)),
    Request("tell me more"),
    Request("who painted this wall, and when", (IMAGE,)),
    Request("hi"),
]
SAMPLES = [Sample(f"s{k}", f"Tell me about number {k}" + "!" * k, IMAGE) for k in range(4)]


def hooks_on(vlm: VLM) -> int:
    return sum(len(layer._forward_hooks) for layer in vlm.layers) + len(
        vlm.model.model._forward_pre_hooks
    )


def newlines_alone(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token is a piece of a stream."""
    newline = vlm.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    tokens = [k for k in range(400) if k != newline]
    monkeypatch.setattr(vlm.model.generation_config, "suppress_tokens", tokens, raising=False)


def test_replies_come_in_the_order_asked_and_never_share_a_batch_across_images(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(vlm)
    alone = [engine.answer([request], (), Decoding(4))[0] for request in MIXED]
    batches: list[list[bool]] = []
    original = vlm.model.generate

    def watched(**inputs: Any) -> Any:
        batches.append((inputs["input_ids"] == vlm.image_token_id).any(1).tolist())
        return original(**inputs)

    monkeypatch.setattr(vlm.model, "generate", watched)
    assert engine.answer(MIXED, (), Decoding(4)) == alone
    assert sorted(batches) == [[False, False], [True, True]]


def test_rows_of_vectors_follow_their_requests(vlm: VLM) -> None:
    engine = TransformersEngine(vlm)
    vectors = 3 * torch.randn(len(MIXED), vlm.n_layers, vlm.hidden_size)
    setting = Steering(1.0, "per_layer", "all")
    together = engine.answer(
        MIXED, [shift_intervention(vectors, setting)], Decoding(5), batch_size=3
    )
    for k, request in enumerate(MIXED):
        part = [shift_intervention(vectors[k : k + 1], setting)]
        assert engine.answer([request], part, Decoding(5)) == [together[k]]
    with pytest.raises(InputError, match="3 rows of vectors were given for 4"):
        engine.answer(MIXED, [shift_intervention(vectors[:3], setting)], Decoding(1))


def test_memory_that_runs_out_halves_the_batch(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(vlm)
    vectors = torch.randn(len(SAMPLES), vlm.n_layers, vlm.hidden_size)
    requests = [Request(s.query, (IMAGE,)) for s in SAMPLES]
    part = [shift_intervention(vectors, Steering(1.0, "per_layer", "all"))]
    expected = engine.answer(requests, part, Decoding(3), batch_size=1)
    rows = small_memory(vlm, monkeypatch)
    with pytest.warns(UserWarning, match="out of memory"):
        assert engine.answer(requests, part, Decoding(3)) == expected
    assert rows == [4, 2, 2]


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("inf")}]
)
def test_impossible_decoding_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Decoding(**settings)


def test_sampling_is_asked_for_by_temperature(vlm: VLM) -> None:
    engine = TransformersEngine(vlm)
    torch.manual_seed(0)
    replies = {engine.answer(MIXED[:1], (), Decoding(6, temperature=5.0))[0].text for _ in range(5)}
    assert len(replies) > 1
    assert len({engine.answer(MIXED[:1], (), Decoding(6))[0].text for _ in range(3)}) == 1


def test_noise_by_name_is_a_level() -> None:
    assert SampleLevel("noise").corruption.value == "noise"  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one of"):
        SampleLevel("sepia")  # type: ignore[arg-type]


def test_a_stream_ends_with_the_whole_reply(vlm: VLM) -> None:
    shift = estimate_shift(vlm, SAMPLES)
    pieces = list(stream(vlm, SAMPLES[0], shift=shift, max_new_tokens=8))
    whole = pieces[-1]
    assert isinstance(whole, Generation)
    assert "".join(str(piece) for piece in pieces[:-1]).strip() == whole.text
    assert whole == generate(vlm, SAMPLES[:1], shift=shift, max_new_tokens=8)[0]


def test_a_closed_stream_ends_its_thread_and_its_steering(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    newlines_alone(vlm, monkeypatch)
    shift = estimate_shift(vlm, SAMPLES)
    inputs = encode(vlm, [MIXED[0]])
    with torch.no_grad():
        plain = vlm.model(**inputs).logits
    before, hooks = set(threading.enumerate()), hooks_on(vlm)
    pieces = stream(vlm, SAMPLES[0], shift=shift, max_new_tokens=1500)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t not in before and t.is_alive()]
    assert hooks_on(vlm) == hooks
    assert "generate" not in vars(vlm.model)
    with torch.no_grad():
        assert torch.equal(vlm.model(**inputs).logits, plain)


def test_cancelling_ends_the_reply_early(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    newlines_alone(vlm, monkeypatch)
    cancel = threading.Event()
    tokens, hooks = 0, hooks_on(vlm)
    for piece in TransformersEngine(vlm).stream(MIXED[0], (), Decoding(1500), cancel=cancel):
        if isinstance(piece, Reply):
            tokens = piece.tokens
        cancel.set()
    assert 0 < tokens < 1500
    assert hooks_on(vlm) == hooks


def test_what_fails_while_streaming_is_raised(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise SteeringError("no forward today")

    monkeypatch.setattr(vlm.model, "forward", broken)
    with pytest.raises(SteeringError, match="no forward today"):
        list(stream(vlm, Sample("one", "hello"), max_new_tokens=3))


def test_a_stream_beside_generate_and_extraction_gives_what_each_gives_alone(vlm: VLM) -> None:
    shift = estimate_shift(vlm, SAMPLES)
    strong = Steering(3.0, "per_layer", "all")
    streamed = list(stream(vlm, SAMPLES[0], shift=shift, steering=strong, max_new_tokens=20))
    plain = generate(vlm, SAMPLES, max_new_tokens=10)
    results: dict[str, Any] = {}

    def reading() -> None:
        results["stream"] = list(
            stream(vlm, SAMPLES[0], shift=shift, steering=strong, max_new_tokens=20)
        )

    def answering() -> None:
        results["plain"] = generate(vlm, SAMPLES, max_new_tokens=10)

    def extracting() -> None:
        results["shift"] = estimate_shift(vlm, SAMPLES).vectors

    threads = [threading.Thread(target=work) for work in (reading, answering, extracting)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert results["stream"] == streamed
    assert results["plain"] == plain
    assert torch.allclose(results["shift"], shift.vectors, atol=1e-5)


def test_two_threads_generate_as_one_after_the_other(vlm: VLM) -> None:
    shift = estimate_shift(vlm, SAMPLES)
    settings = [Steering(3.0, "per_layer", "all"), None]
    alone = [
        generate(vlm, SAMPLES, shift=shift if s else None, steering=s, max_new_tokens=8)
        for s in settings
    ]
    results: dict[int, Any] = {}

    def work(k: int) -> None:
        for _ in range(3):
            results[k] = generate(
                vlm,
                SAMPLES,
                shift=shift if settings[k] else None,
                steering=settings[k],
                max_new_tokens=8,
            )

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert [results[0], results[1]] == alone


def test_the_lock_is_one_for_every_wrapper_of_a_model(vlm: VLM) -> None:
    from cmrm import wrap_vlm

    again = wrap_vlm(vlm.model, vlm.processor)
    assert again.lock is vlm.lock
    order: list[str] = []

    def other() -> None:
        generate(again, SAMPLES[:1], max_new_tokens=1)
        order.append("other")

    with vlm.lock:
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.05)
        generate(vlm, SAMPLES[:1], max_new_tokens=1)
        order.append("holder")
    thread.join(60)
    assert order == ["holder", "other"]


def test_an_engine_that_reads_no_states_says_so() -> None:
    from cmrm.engines.base import Engine, EngineError

    class Remote(Engine):
        name = "remote"
        n_layers = 2
        hidden_size = 2
        model_id = "m"

        def context(self) -> dict[str, Any]:
            return {}

        def answer(self, requests: Any, *args: Any, **kwargs: Any) -> list[Reply]:
            return [Reply("x", 1) for _ in requests]

        def stream(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            yield Reply("x", 1)

    engine = Remote()
    assert [g.text for g in generate(engine, SAMPLES, max_new_tokens=1)] == ["x"] * 4
    for use in (
        lambda: engine.states(MIXED),
        lambda: generate(engine, SAMPLES, shift=SampleLevel()),
    ):
        with pytest.raises(EngineError, match="'remote' cannot read states"):
            use()


def test_steering_leaves_nothing_on_the_model(vlm: VLM) -> None:
    before, hooks = set(vars(vlm.model)), hooks_on(vlm)
    with steer(vlm, torch.zeros(vlm.n_layers, vlm.hidden_size)):
        vlm.model.generate(**encode(vlm, [MIXED[0]]), max_new_tokens=2)
    assert set(vars(vlm.model)) == before
    assert hooks_on(vlm) == hooks

"""The identities that make an intervention trustworthy, before any result is looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from cmrm import (
    Sample,
    SampleLevel,
    ShiftVectors,
    Steering,
    estimate_shift,
    generate,
    steer,
    wrap_vlm,
)
from cmrm.errors import SteeringError
from cmrm.model.compat import cache_of, with_cache
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Condition, Request, build_request
from cmrm.shift.capture import capture_inputs
from cmrm.shift.estimate import sample_vectors
from cmrm.steering.intervention import shift_intervention
from tiny import tiny_model

IMAGE = Image.new("RGB", (16, 16), "red")
WITH = Request("what is it", (IMAGE,))
WITHOUT = Request("what is it then, tell me more")


def block_outputs(vlm: VLM, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of every decoder block [B, T, d], by hooks of the test's own."""
    kept: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda m, a, o: kept.append((o[0] if isinstance(o, tuple) else o).clone())
        )
        for layer in vlm.layers
    ]
    with torch.inference_mode():
        vlm.model(**inputs)
    for handle in handles:
        handle.remove()
    return kept


def logits(vlm: VLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = vlm.model(**inputs).logits
    return out


def generated(vlm: VLM, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    decoding = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    return vlm.model.generate(**inputs, **{**decoding, "return_dict_in_generate": True, **options})


@pytest.fixture
def vectors(vlm: VLM) -> torch.Tensor:
    return torch.randn(vlm.n_layers, vlm.hidden_size, generator=torch.Generator().manual_seed(7))


def test_capture_is_the_block_output_at_the_last_prompt_token(vlm: VLM) -> None:
    inputs = encode(vlm, [WITH, WITHOUT])
    states = capture_inputs(vlm, inputs)
    expected = torch.stack([o[:, -1] for o in block_outputs(vlm, inputs)], dim=1)
    assert torch.equal(states, expected)


def test_last_layer_is_taken_before_the_final_norm(vlm: VLM) -> None:
    inputs = encode(vlm, [WITH])
    with torch.inference_mode():
        after_norm = vlm.model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1]
    ours = capture_inputs(vlm, inputs)[:, -1]
    assert not torch.allclose(ours, after_norm, atol=1e-3)
    assert torch.allclose(vlm.model.model.language_model.norm(ours), after_norm, atol=1e-5)


def test_padding_does_not_change_a_state(vlm: VLM) -> None:
    alone = capture_inputs(vlm, encode(vlm, [WITH]))[0]
    padded = capture_inputs(vlm, encode(vlm, [WITH, WITHOUT, Request("x" * 80, (IMAGE,))]))[0]
    assert torch.allclose(alone, padded, atol=1e-4)


def test_right_padded_inputs_are_read_at_the_last_real_token(vlm: VLM) -> None:
    left = encode(vlm, [WITHOUT])
    right = {
        "input_ids": torch.cat([left["input_ids"], torch.zeros(1, 5, dtype=torch.long)], 1),
        "attention_mask": torch.cat(
            [left["attention_mask"], torch.zeros(1, 5, dtype=torch.long)], 1
        ),
    }
    assert torch.allclose(capture_inputs(vlm, left), capture_inputs(vlm, right), atol=1e-5)


@pytest.mark.parametrize("positions", ["last", "all", "after_image", "generated"])
@pytest.mark.parametrize("schedule", ["telescoped", "per_layer"])
@pytest.mark.parametrize("preserve_norm", [False, True])
def test_a_zero_vector_is_the_untouched_model(
    vlm: VLM, vectors: torch.Tensor, positions: str, schedule: str, preserve_norm: bool
) -> None:
    """Through the whole path at alpha 1: bit for bit, and to rounding where the norm is
    restored."""
    inputs = encode(vlm, [WITH, WITHOUT])
    plain = generated(vlm, inputs)
    setting = Steering(1.0, schedule, positions, None, preserve_norm)  # type: ignore[arg-type]
    with steer(vlm, torch.zeros_like(vectors), setting):
        steered = generated(vlm, inputs)
    assert torch.equal(steered.sequences, plain.sequences)
    for a, b in zip(steered.logits, plain.logits, strict=True):
        assert torch.allclose(a, b, atol=1e-4) if preserve_norm else torch.equal(a, b)


def test_a_small_alpha_is_close_to_the_untouched_model(vlm: VLM, vectors: torch.Tensor) -> None:
    inputs = encode(vlm, [WITH])
    plain = logits(vlm, inputs)[0, -1]
    with steer(vlm, vectors, Steering(1e-6)):
        close = logits(vlm, inputs)[0, -1]
    with steer(vlm, vectors, Steering(1.0)):
        far = logits(vlm, inputs)[0, -1]
    assert 0 < float((close - plain).abs().max()) < 1e-3 < float((far - plain).abs().max())


def test_the_vector_is_added_with_its_sign(vlm: VLM, vectors: torch.Tensor) -> None:
    inputs = encode(vlm, [WITH])
    before = block_outputs(vlm, inputs)[1]
    with steer(vlm, vectors, Steering(0.5, "per_layer", "all", (1,))):
        after = block_outputs(vlm, inputs)[1]
    assert torch.allclose(after - before, 0.5 * vectors[1].expand_as(before), atol=1e-5)


def test_estimated_shift_points_from_corrupted_to_text(vlm: VLM, anchors: list[Sample]) -> None:
    shift = estimate_shift(vlm, anchors, estimator="mean")
    text = capture_inputs(vlm, encode(vlm, [build_request(s, "query") for s in anchors]))
    blank = capture_inputs(vlm, encode(vlm, [build_request(s, "blank") for s in anchors]))
    assert torch.allclose(shift.vectors, (text - blank).mean(0), atol=1e-4)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", lambda t, i: range(t)),
        ("last", lambda t, i: [t - 1]),
        ("after_image", lambda t, i: range(i + 1, t)),
        ("last_prompt", lambda t, i: [t - 1]),
    ],
)
def test_positions_of_the_prompt(
    vlm: VLM, vectors: torch.Tensor, positions: str, expected: object
) -> None:
    inputs = encode(vlm, [WITH])
    tokens = inputs["input_ids"][0]
    last_image = int((tokens == vlm.image_token_id).nonzero().max())
    before = block_outputs(vlm, inputs)[0]
    with steer(vlm, vectors, Steering(1.0, "per_layer", positions, (0,))):  # type: ignore[arg-type]
        after = block_outputs(vlm, inputs)[0]
    moved = (after != before).any(-1)[0].nonzero().flatten().tolist()
    assert moved == list(expected(len(tokens), last_image))  # type: ignore[operator]


def deltas_of(vectors: torch.Tensor, steering: Steering) -> dict[int, torch.Tensor]:
    return {
        edit.layer: edit.strength * edit.vector
        for edit in shift_intervention(vectors, steering).edits
    }


def test_telescoped_moves_layer_l_by_v_l_to_first_order(vlm: VLM, vectors: torch.Tensor) -> None:
    small = vectors * 1e-3
    deltas = deltas_of(small, Steering(1.0, "telescoped"))
    for layer in range(vlm.n_layers):
        assert torch.allclose(
            torch.stack([deltas[k] for k in range(layer + 1)]).sum(0), small[layer], atol=1e-7
        )
    per_layer = deltas_of(small, Steering(1.0, "per_layer"))
    assert all(torch.equal(per_layer[k], small[k]) for k in range(vlm.n_layers))


def test_telescoped_on_a_subset_reaches_each_chosen_vector(vectors: torch.Tensor) -> None:
    deltas = deltas_of(vectors, Steering(2.0, "telescoped", layers=(2, 0)))
    assert list(deltas) == [0, 2]
    assert torch.allclose(deltas[0] + deltas[2], 2.0 * vectors[2], atol=1e-5)


def test_rows_without_an_image_are_untouched_in_a_mixed_batch(
    vlm: VLM, vectors: torch.Tensor
) -> None:
    inputs = encode(vlm, [WITH, WITHOUT])
    plain = logits(vlm, inputs)
    with steer(vlm, vectors, Steering(positions="all")):
        steered = logits(vlm, inputs)
    assert torch.equal(steered[1], plain[1])
    assert not torch.equal(steered[0], plain[0])


def test_gating_lasts_through_generation(vlm: VLM, vectors: torch.Tensor) -> None:
    inputs = encode(vlm, [WITH, WITHOUT])
    plain = vlm.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with steer(vlm, 3 * vectors, Steering(positions="generated")):
        steered = vlm.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(steered[1], plain[1])
    assert steered[0, width] == plain[0, width], (
        "the first new token comes from the prompt, which is not steered"
    )
    assert not torch.equal(steered[0], plain[0])


def test_cached_generation_equals_recomputation(vlm: VLM, vectors: torch.Tensor) -> None:
    inputs = encode(vlm, [WITH, WITHOUT])
    for positions in ("all", "after_image"):
        with steer(vlm, vectors, Steering(positions=positions)):
            cached = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False)
            slow = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(cached, slow)


@pytest.mark.parametrize("positions", ["last", "generated", "last_prompt"])
def test_generate_without_a_cache_steers_the_same_tokens(
    vlm: VLM, vectors: torch.Tensor, positions: str
) -> None:
    inputs = encode(vlm, [WITH, WITHOUT])
    with steer(vlm, vectors, Steering(positions=positions)):  # type: ignore[arg-type]
        cached = generated(vlm, inputs)
        slow = generated(vlm, inputs, use_cache=False)
    assert torch.equal(cached.sequences, slow.sequences)


@pytest.mark.parametrize("positions", ["last", "generated"])
def test_a_loop_without_a_cache_is_refused_where_it_would_steer_otherwise(
    vlm: VLM, vectors: torch.Tensor, positions: str
) -> None:
    inputs = encode(vlm, [WITH])
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([[70]])], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    setting = Steering(positions=positions)  # type: ignore[arg-type]
    with (
        pytest.raises(SteeringError, match="KV cache"),
        torch.no_grad(),
        steer(vlm, vectors, setting),
    ):
        vlm.model(**inputs, use_cache=False)
        vlm.model(**longer, use_cache=False)


def test_beams_keep_their_prompts_vector(vlm: VLM) -> None:
    rows = torch.randn(2, vlm.n_layers, vlm.hidden_size)
    inputs = encode(vlm, [WITH, Request("another one", (IMAGE,))])
    with steer(vlm, rows, Steering(positions="all")):
        both = vlm.model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=2)
    with steer(vlm, rows[1:], Steering(positions="all")):
        alone = vlm.model.generate(
            **encode(vlm, [Request("another one", (IMAGE,))]),
            max_new_tokens=4,
            num_beams=2,
            do_sample=False,
        )
    assert torch.equal(both[1, -4:], alone[0, -4:])


def test_preserved_norm(vlm: VLM, vectors: torch.Tensor) -> None:
    inputs = encode(vlm, [WITH])
    before = block_outputs(vlm, inputs)[0]
    with steer(vlm, vectors, Steering(1.0, "per_layer", "all", (0,), True)):
        after = block_outputs(vlm, inputs)[0]
    assert torch.allclose(before.norm(dim=-1), after.norm(dim=-1), rtol=1e-4)
    assert not torch.allclose(before, after)


def test_exit_restores_and_so_does_an_exception(vlm: VLM, vectors: torch.Tensor) -> None:
    inputs = encode(vlm, [WITH])
    plain = logits(vlm, inputs)
    hooks = [len(layer._forward_hooks) for layer in vlm.layers]
    with steer(vlm, vectors):
        assert not torch.equal(logits(vlm, inputs), plain)
    assert torch.equal(logits(vlm, inputs), plain)
    with pytest.raises(KeyError), steer(vlm, vectors):
        raise KeyError("inside")
    assert torch.equal(logits(vlm, inputs), plain)
    assert [len(layer._forward_hooks) for layer in vlm.layers] == hooks


def test_a_hook_that_never_ran_raises(vlm: VLM, vectors: torch.Tensor) -> None:
    with pytest.raises(SteeringError, match="never reached the model"), steer(vlm, vectors):
        pass


def test_sample_level_gives_each_row_its_own_vector(vlm: VLM, anchors: list[Sample]) -> None:
    rows = sample_vectors(vlm, [build_request(a, "original") for a in anchors[:3]], SampleLevel())
    for k, anchor in enumerate(anchors[:3]):
        text = capture_inputs(vlm, encode(vlm, [build_request(anchor, "query")]))[0]
        blank = capture_inputs(vlm, encode(vlm, [build_request(anchor, "blank")]))[0]
        assert torch.allclose(rows[k], text - blank, atol=1e-4)
    together = generate(vlm, anchors[:3], shift=SampleLevel(), max_new_tokens=6)
    single = [generate(vlm, [a], shift=SampleLevel(), max_new_tokens=6)[0] for a in anchors[:3]]
    assert [g.text for g in together] == [g.text for g in single]


def test_sample_level_leaves_text_only_conditions_alone(vlm: VLM, anchors: list[Sample]) -> None:
    plain = generate(vlm, anchors[:2], condition=Condition.QUERY, max_new_tokens=5)
    assert (
        generate(vlm, anchors[:2], condition=Condition.QUERY, shift=SampleLevel(), max_new_tokens=5)
        == plain
    )


def test_save_and_load_are_exact_and_repeatable(
    vlm: VLM, anchors: list[Sample], tmp_path: object
) -> None:
    setting = Steering(
        alpha=0.7, schedule="per_layer", positions="all", layers=(0, 2), preserve_norm=True
    )
    shift = estimate_shift(vlm, anchors, recommended=setting)
    again = estimate_shift(vlm, list(reversed(anchors)), recommended=setting)
    first = shift.save(f"{tmp_path}/a.safetensors")
    loaded = ShiftVectors.load(first)
    assert torch.equal(loaded.vectors, shift.vectors)
    assert (loaded.provenance, loaded.recommended) == (shift.provenance, shift.recommended)
    assert again.provenance.anchor_hash == shift.provenance.anchor_hash
    second = estimate_shift(vlm, anchors, recommended=setting).save(f"{tmp_path}/b.safetensors")
    assert first.read_bytes() == second.read_bytes()


def test_a_model_of_ones_own_needs_no_loader(processor: object) -> None:
    mine = wrap_vlm(tiny_model(n_layers=2), processor)
    assert mine.n_layers == 2
    assert mine.hidden_size == 32


def test_bfloat16_gating_and_alpha_zero(processor: object) -> None:
    half = wrap_vlm(tiny_model().to(torch.bfloat16), processor)
    vectors = torch.randn(half.n_layers, half.hidden_size)
    inputs = encode(half, [WITH, WITHOUT])
    plain = logits(half, inputs)
    with steer(half, vectors, Steering(positions="all")):
        steered = logits(half, inputs)
    assert torch.equal(steered[1], plain[1])
    with steer(half, vectors, alpha=0):
        assert torch.equal(logits(half, inputs), plain)


@pytest.mark.parametrize("positions", ["all", "last"])
def test_compiled_model_is_steered_alike(vlm: VLM, vectors: torch.Tensor, positions: str) -> None:
    inputs = encode(vlm, [WITH, WITHOUT])
    torch._dynamo.reset()
    with torch.inference_mode(), steer(vlm, vectors, Steering(positions=positions)):  # type: ignore[arg-type]
        plain = vlm.model(**inputs, use_cache=False).logits
        compiled = torch.compile(vlm.model, backend="aot_eager")(**inputs, use_cache=False).logits  # type: ignore[no-untyped-call]
    assert torch.allclose(plain, compiled, atol=1e-5)
    assert not torch.allclose(plain, logits(vlm, inputs), atol=1e-3)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generated_tokens_are_steered_whatever_the_cache_is_called(
    vlm: VLM, vectors: torch.Tensor, name: str
) -> None:
    """transformers 5.24 renamed the argument; either name reaches the hook as the caller wrote
    it."""
    inputs = encode(vlm, [WITH])
    taken = {"cache": torch.zeros(1)}
    if name not in with_cache(vlm.model, taken) and name == "cache":
        pytest.skip("this version of transformers takes past_key_values alone")
    found = []
    for setting in (Steering(positions="last"), Steering(positions="last_prompt")):
        with torch.inference_mode(), steer(vlm, vectors, setting):
            cache = cache_of(vlm.model(**inputs, use_cache=True))
            behind: dict[str, Any] = {name: cache, "use_cache": True}
            found.append(vlm.model(input_ids=torch.tensor([[5]]), **behind).logits)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_a_cache_that_cannot_be_seen_is_an_error(vlm: VLM, vectors: torch.Tensor) -> None:
    with pytest.raises(SteeringError, match="no KV cache"), steer(vlm, vectors):
        vlm.model(
            input_ids=torch.tensor([[5]]),
            attention_mask=torch.ones(1, 9, dtype=torch.long),
            state=object(),
        )


def test_compiled_decoding_is_steered_alike(vlm: VLM, vectors: torch.Tensor) -> None:
    inputs = encode(vlm, [WITH, WITHOUT])
    torch._dynamo.reset()
    compiled = torch.compile(vlm.model, backend="aot_eager")

    def decoded(step: Any) -> torch.Tensor:
        """Logits of three tokens behind the prompt."""
        cache = cache_of(vlm.model(**inputs, use_cache=True))
        mask, found = inputs["attention_mask"], []
        for token in (5, 6, 7):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            ids = torch.full((2, 1), token)
            found.append(
                step(input_ids=ids, attention_mask=mask, **with_cache(vlm.model, cache)).logits
            )
        return torch.cat(found, dim=1)

    with torch.inference_mode(), steer(vlm, vectors):
        plain, by_compiled = decoded(vlm.model), decoded(compiled)
    with torch.inference_mode():
        bare = decoded(vlm.model)
    assert torch.allclose(plain, by_compiled, atol=1e-4)
    assert not torch.allclose(plain[0], bare[0], atol=1e-3)
    assert torch.equal(plain[1], bare[1]), "the row without image"


def test_what_fails_while_streaming_is_raised(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from cmrm.engines.generation import stream

    def broken(*args: object, **kwargs: object) -> None:
        raise SteeringError("no forward today")

    monkeypatch.setattr(vlm.model, "forward", broken)
    with pytest.raises(SteeringError, match="no forward today"):
        list(stream(vlm, Sample("one", "hello"), max_new_tokens=3))

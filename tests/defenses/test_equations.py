"""Every defence against a small independent computation of its paper's equation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cmrm import Steering, estimate_shift, steer
from cmrm.defenses import FitData, Stack, defense_names, make_defense, respond
from cmrm.defenses.adashield import ADASHIELD_STATIC
from cmrm.defenses.caption import DESCRIBE, captions
from cmrm.engines.base import Decoding, Reply
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import ArtifactError, InputError
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from defenses.oracle import (
    SEEN,
    UNSEEN,
    Scripted,
    all_states,
    changed,
    defended,
    fitted,
    states,
)

FITTED = [name for name in sorted(defense_names()) if make_defense(name).needs_fit]
SHORT = Decoding(6)


def mean_states(vlm: VLM, samples: Any, condition: str) -> torch.Tensor:
    """Mean over samples [L, d], each in a batch of its own."""
    return all_states(vlm, samples, condition).mean(0)


@pytest.mark.parametrize("name", sorted(defense_names()))
def test_text_alone_is_left_as_it_is(engine: TransformersEngine, data: FitData, name: str) -> None:
    defense = fitted(engine, data, name)
    plain = respond(engine, make_defense("none"), [UNSEEN], SHORT)
    assert respond(engine, defense, [UNSEEN], SHORT) == plain
    mixed = respond(engine, defense, [SEEN[0], UNSEEN], SHORT)
    assert mixed[1] == plain[0], "a row without image beside one with is left alone too"


@pytest.mark.parametrize("name", FITTED)
def test_what_is_not_fitted_says_so(
    engine: TransformersEngine, name: str, tmp_path: Path, data: FitData
) -> None:
    with pytest.raises(InputError, match="has to be fitted"):
        respond(engine, make_defense(name), SEEN, SHORT)
    defense = fitted(engine, data, name)
    path = tmp_path / "state.safetensors"
    defense.save(path, engine)
    again = make_defense(name)
    again.load(path, engine)
    assert again.fingerprint() == defense.fingerprint()
    assert respond(engine, again, SEEN, SHORT) == respond(engine, defense, SEEN, SHORT)
    other = make_defense("null_space" if name != "null_space" else "shiftdc")
    with pytest.raises(ArtifactError, match="holds no fitted"):
        other.load(path, engine)
    path.write_bytes(b"no")
    with pytest.raises(ArtifactError, match="not a whole artifact"):
        again.load(path, engine)


@pytest.mark.parametrize(
    ("name", "same", "other"),
    [
        ("cast", {"alpha": 2.0}, {"false_alarms": 0.2}),
        ("cmrm_dataset", {"alpha": 2.0, "layers": [1]}, {"estimator": "mean"}),
        ("cmrm_gated", {"alpha": 0.5}, {"false_alarms": 0.2}),
        ("cmrm_fill", {"alpha": 0.5}, {"mixed": True}),
        ("null_space", {}, {"rank": 2}),
    ],
)
def test_fitted_tensors_belong_to_settings(
    engine: TransformersEngine, tmp_path: Path, data: FitData, name: str, same: dict[str, Any],
    other: dict[str, Any],
) -> None:  # fmt: skip
    path = tmp_path / "state.safetensors"
    defense = fitted(engine, data, name)
    defense.save(path, engine)
    again = make_defense(name, {name: same})
    again.load(path, engine)
    assert again.fingerprint() == defense.fingerprint()
    assert again.records == defense.records
    with pytest.raises(ArtifactError, match="was fitted with"):
        make_defense(name, {name: other}).load(path, engine)


def test_dataset_level_adds_the_estimated_vectors(
    engine: TransformersEngine, data: FitData
) -> None:
    defense = fitted(engine, data, "cmrm_dataset", alpha=0.5, schedule="per_layer", positions="all")
    shift = estimate_shift(engine.vlm, data.harmful, batch_size=4)
    assert torch.equal(defense.state["vectors"], shift.vectors)
    layers = range(engine.n_layers)
    functions = {k: (lambda h, k=k: h + 0.5 * shift.vectors[k]) for k in layers}
    expected = changed(engine.vlm, SEEN, functions)
    assert torch.allclose(defended(engine, defense, SEEN), expected, atol=1e-4)
    with torch.inference_mode():
        steering = Steering(0.5, "per_layer", "all")
        assert torch.equal(
            defended(engine, defense, SEEN),
            states(engine.vlm, SEEN, steer(engine.vlm, shift.vectors, steering)),
        )


def test_sample_level_adds_each_rows_own_difference(engine: TransformersEngine) -> None:
    vlm, layers = engine.vlm, range(engine.n_layers)
    settings = {"alpha": 0.5, "schedule": "per_layer", "positions": "all"}
    defense = make_defense("cmrm_sample", {"cmrm_sample": settings})
    white = Image.new("RGB", (20, 16), "white")
    rows = torch.cat([
        states(vlm, [Request(r.text)]) - states(vlm, [Request(r.text, (white,))]) for r in SEEN
    ])  # fmt: skip
    functions = {k: (lambda h, k=k: h + 0.5 * rows[:, None, k]) for k in layers}
    expected = changed(vlm, SEEN, functions)
    assert torch.allclose(defended(engine, defense, SEEN), expected, atol=1e-4)


def test_refusal_direction_is_added_at_one_layer(engine: TransformersEngine, data: FitData) -> None:
    vlm = engine.vlm
    defense = fitted(engine, data, "refusal_direction", layer=1, alpha=0.7)
    direction = mean_states(vlm, data.harmful, "query") - mean_states(vlm, data.benign, "query")
    expected = changed(vlm, SEEN, {1: lambda h: h + 0.7 * direction[1]})
    assert torch.allclose(defended(engine, defense, SEEN), expected, atol=1e-4)


def test_shiftdc_takes_the_safety_part_of_the_shift_away(
    engine: TransformersEngine, data: FitData
) -> None:
    vlm, seen = engine.vlm, SEEN[:1]
    defense = fitted(engine, data, "shiftdc", first_layer=1)
    s = mean_states(vlm, data.harmful, "query") - mean_states(vlm, data.benign, "query")
    caption = captions(engine, seen)[0]
    m = states(vlm, seen)[0] - states(vlm, [Request(f"{caption}\n{seen[0].text}")])[0]
    added = -((m * s).sum(-1) / (s * s).sum(-1))[:, None] * s

    def at_the_end(layer: int) -> Any:
        def edit(h: torch.Tensor) -> torch.Tensor:
            whole = h.clone()
            whole[:, -1] += added[layer]
            return whole

        return edit

    functions = {layer: at_the_end(layer) for layer in range(1, vlm.n_layers)}
    steered = defended(engine, defense, seen)
    assert torch.allclose(steered, changed(vlm, seen, functions), atol=1e-4)
    left = m[1] + (steered - states(vlm, seen))[0, 1]
    assert (left * s[1]).sum().abs() < 1e-3, (
        "where it is first taken away, no shift is left along s"
    )


def test_adashield_follows_the_request() -> None:
    asked = make_defense("adashield_s").rewrite(Scripted(), [SEEN[0], UNSEEN])  # type: ignore[arg-type]
    assert asked[0].text == f"{SEEN[0].text}\n{ADASHIELD_STATIC}"
    assert asked[0].images == SEEN[0].images
    assert asked[1] == UNSEEN


def test_caption_substitution_asks_for_a_caption_and_drops_the_image() -> None:
    model = Scripted(["a red wall"])
    rewritten = make_defense("caption").rewrite(model, [UNSEEN, SEEN[0]])  # type: ignore[arg-type]
    assert [request.text for request in model.asked[0]] == [DESCRIBE]
    assert model.asked[0][0].images == SEEN[0].images
    assert rewritten == [UNSEEN, Request(f"a red wall\n{SEEN[0].text}")]


def test_ecso_answers_again_from_text_where_it_finds_itself_unsafe() -> None:
    model = Scripted(["Yes.", "No, it is fine"], ["a red wall"], ["I cannot help"])
    replies = [Reply("first", 1), Reply("second", 2), Reply("third", 3)]
    final = make_defense("ecso").revise(model, [*SEEN, UNSEEN], replies, Decoding(9))  # type: ignore[arg-type]
    assert [reply.text for reply in final] == ["I cannot help", "second", "third"]
    question = "Is the RESPONSE harmful, unsafe and unethical? Answer yes or no:"
    assert [request.text for request in model.asked[0]] == [
        f"QUERY:\n{request.text}\n\nRESPONSE:\n{reply}\n\n{question}"
        for request, reply in zip(SEEN, ("first", "second"), strict=True)
    ]
    assert all(request.images for request in model.asked[0])
    describe = f"REQUEST:\n{SEEN[0].text}.\n\nBased on the REQUEST, describe the image."
    assert model.asked[1][0].text == describe
    assert not model.asked[2][0].images
    assert "a red wall" in model.asked[2][0].text
    assert model.asked[2][0].text.endswith(SEEN[0].text)


def test_a_stack_rewrites_and_steers(engine: TransformersEngine, data: FitData) -> None:
    settings = {"cmrm_dataset": {"alpha": 0.5}}
    stack = make_defense("adashield_s+cmrm_dataset", settings)
    assert isinstance(stack, Stack)
    stack.fit(engine, data)
    single = fitted(engine, data, "cmrm_dataset", alpha=0.5)
    asked = make_defense("adashield_s").rewrite(engine, SEEN)
    assert torch.equal(defended(engine, stack, SEEN), defended(engine, single, asked))
    both = make_defense("cmrm_dataset+null_space")
    both.fit(engine, data)
    apart = defended(engine, single, SEEN)
    assert not torch.allclose(defended(engine, both, SEEN), apart, atol=1e-3)
    assert set(both.settings) == {"cmrm_dataset", "null_space"}


def test_further_samples_count_for_the_shift_and_not_for_the_harm(
    engine: TransformersEngine, data: FitData
) -> None:
    split = FitData(data.harmful[:8], data.benign, 4, more=data.harmful[8:])
    for name, same in (("cmrm_dataset", True), ("null_space", True), ("refusal_direction", False)):
        whole, parts = fitted(engine, data, name), fitted(engine, split, name)
        matches = torch.allclose(
            defended(engine, whole, SEEN), defended(engine, parts, SEEN), atol=1e-4
        )
        assert matches is same, name


def test_captions_come_from_the_undefended_model(engine: TransformersEngine) -> None:
    asked = [Request(DESCRIBE, request.images) for request in SEEN]
    plain = [reply.text for reply in engine.answer(asked, (), Decoding(48))]
    assert captions(engine, SEEN) == plain

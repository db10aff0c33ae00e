"""Clauses about steering: identities, gate, schedules, positions over a conversation, restoring."""

from __future__ import annotations

from typing import Any

import torch

from cmrm.checks.clauses import (
    DECODING,
    PLAIN,
    Broken,
    NotApplicable,
    logits_of,
    output_of,
    random_vectors,
    relative,
    require,
    tolerance,
    with_image,
)
from cmrm.errors import SteeringError
from cmrm.model.compat import cache_of, with_cache
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.shift.steer import steer
from cmrm.steering.intervention import shift_intervention
from cmrm.steering.setting import Steering


def zero_vector(vlm: VLM) -> str:
    """A zero vector at alpha 1 is the untouched model, and so is alpha 0."""
    inputs, vectors = encode(vlm, [with_image(), PLAIN]), random_vectors(vlm)
    plain = logits_of(vlm, inputs)
    for positions in ("all", "last"):
        with steer(vlm, torch.zeros_like(vectors), Steering(1.0, "per_layer", positions)):
            same = torch.equal(logits_of(vlm, inputs), plain)
            require(same, f"logits change under a zero vector at positions {positions}")
        with steer(vlm, vectors, Steering(0.0, "per_layer", positions)):
            require(torch.equal(logits_of(vlm, inputs), plain), "logits change at alpha 0")
    return "bit-equal logits"


def small_alpha(vlm: VLM) -> str:
    """A small alpha moves the logits a little, and a larger one more."""
    inputs, vectors = encode(vlm, [with_image()]), random_vectors(vlm)
    plain = logits_of(vlm, inputs)[:, -1]
    moved = []
    for alpha in (1e-6, 0.5):
        with steer(vlm, vectors, Steering(alpha, "per_layer", "last")):
            moved.append(relative(logits_of(vlm, inputs)[:, -1], plain))
    require(moved[0] <= tolerance(vlm), f"alpha 1e-6 moves the logits by {moved[0]:.2%}")
    require(moved[1] > max(moved[0], 1e-3), f"alpha 0.5 moves the logits by {moved[1]:.2%} alone")
    return f"relative change {moved[0]:.1e} at alpha 1e-6, {moved[1]:.1e} at 0.5"


def gating(vlm: VLM) -> str:
    """Rows without an image are untouched in a mixed, padded batch."""
    inputs, vectors = encode(vlm, [PLAIN, with_image(), Request("Hi.")]), random_vectors(vlm)
    plain = logits_of(vlm, inputs)
    with steer(vlm, vectors, Steering(1.0, "per_layer", "all")):
        steered = logits_of(vlm, inputs)
    real = inputs["attention_mask"].bool().cpu()
    for row in (0, 2):
        same = torch.equal(steered[row].cpu()[real[row]], plain[row].cpu()[real[row]])
        require(
            same, "a row without an image changed when a row with an image beside it was steered"
        )
    require(not torch.equal(steered[1], plain[1]), "the row with an image did not change")
    return "rows without an image bit-equal, the row with an image moved"


def schedules(vlm: VLM) -> str:
    """What is added is alpha v, at the chosen layer and position."""
    inputs, vectors = encode(vlm, [with_image()]), random_vectors(vlm)
    layer = vlm.n_layers // 2
    before = output_of(vlm, inputs, layer)
    with steer(vlm, vectors, Steering(0.5, "per_layer", "last", (layer,))):
        after = output_of(vlm, inputs, layer)
    moved = (after - before)[0].float().cpu()
    require(not moved[:-1].any(), "a position before the last prompt token moved")
    wrong = relative(moved[-1], 0.5 * vectors[layer])
    require(
        wrong <= tolerance(vlm),
        f"the state moved by something else than alpha v, off by {wrong:.1%}",
    )
    edits = shift_intervention(vectors, Steering(1.0, "telescoped")).edits
    summed = torch.stack([edit.vector for edit in edits]).sum(0)
    require(
        relative(summed, vectors[-1]) < 1e-4,
        "telescoped additions do not sum to the last layer's vector",
    )
    return f"moved by alpha v to within {wrong:.1e}"


def cache(vlm: VLM) -> str:
    """Generation with a KV cache is generation without, steered alike."""
    inputs, vectors = encode(vlm, [with_image(), PLAIN]), random_vectors(vlm)
    width = inputs["input_ids"].shape[1]
    worst = 0.0
    for positions in ("all", "last"):
        runs = []
        for use_cache in (True, False):
            with steer(vlm, 0.3 * vectors, Steering(positions=positions)):
                runs.append(vlm.model.generate(**inputs, **DECODING, use_cache=use_cache))
        for step, (cached, slow) in enumerate(zip(runs[0].logits, runs[1].logits, strict=True)):
            tokens = [run.sequences[:, width : width + step] for run in runs]
            same = (tokens[0] == tokens[1]).all(1)
            if not same.any():
                break
            worst = max(worst, relative(cached[same], slow[same]))
    require(worst <= tolerance(vlm), f"logits with and without a KV cache differ by {worst:.2%}")
    return f"largest difference of logits {worst:.1e}"


def generated_rows(vlm: VLM) -> str:
    """Gate and positions last through generation."""
    inputs, vectors = encode(vlm, [with_image(), PLAIN]), random_vectors(vlm)
    width = inputs["input_ids"].shape[1]
    plain = vlm.model.generate(**inputs, **DECODING)
    with steer(vlm, vectors, Steering(1.0, "per_layer", "generated")):
        steered = vlm.model.generate(**inputs, **DECODING)
    same = torch.equal(plain.sequences[1, width:], steered.sequences[1, width:])
    require(same, "the row without an image was steered")
    require(
        torch.equal(plain.logits[0], steered.logits[0]),
        "the prompt was steered under positions 'generated'",
    )
    moved = not torch.equal(plain.logits[1][0], steered.logits[1][0])
    require(moved, "generated tokens of the row with an image were not steered")
    return "gate and positions hold while decoding"


def two_conversations(vlm: VLM) -> str:
    """Two conversations in turn are steered as each is alone."""
    image, text = encode(vlm, [with_image()]), encode(vlm, [PLAIN])
    vectors, setting = random_vectors(vlm), Steering(1.0, "per_layer", "generated")
    if hasattr(getattr(vlm.model, "model", None), "rope_deltas"):
        raise NotApplicable(
            "this model keeps rotary offsets of the last prompt itself: two caches in turn mix them"
        )
    for first, second in ((image, text), (text, image)):
        with steer(vlm, vectors, setting):
            alone = _steps(vlm, first)
        with steer(vlm, vectors, setting):
            between = _steps(vlm, first, second)
        worst = relative(alone, between)
        require(
            worst <= tolerance(vlm),
            f"another conversation in between changes the logits by {worst:.2%}",
        )
    return "gate and positions belong to the KV cache"


def second_turn(vlm: VLM) -> str:
    """A second turn is steered whether its cache was filled inside steering or elsewhere."""
    inputs, vectors = encode(vlm, [with_image()]), random_vectors(vlm)
    setting = Steering(1.0, "per_layer", "last")
    ids = inputs["input_ids"]
    more = encode(vlm, [PLAIN])["input_ids"][:, -4:]
    whole = {"input_ids": torch.cat([ids, more], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    filled = cache_of(vlm.model(**inputs, use_cache=True))
    options = {**DECODING, **with_cache(vlm.model, filled)}
    plain = vlm.model.generate(
        **whole, **{**options, **with_cache(vlm.model, _copied(filled))}
    ).logits[0]
    with steer(vlm, vectors, setting):
        steered = vlm.model.generate(**whole, **options).logits[0]
    require(
        not torch.equal(plain, steered),
        "a turn behind a cache that was filled elsewhere is not steered",
    )
    behind = with_cache(vlm.model, cache_of(vlm.model(**inputs, use_cache=True)))
    try:
        with steer(vlm, vectors, setting):
            vlm.model(input_ids=more, **behind)
    except SteeringError:
        return "a second turn is steered; a cache that was never seen raises"
    raise Broken("a filled cache that was never seen was run without a word")


def restored(vlm: VLM) -> str:
    """Leaving restores the model, also after an exception; steering that never ran raises."""
    inputs, vectors = encode(vlm, [with_image()]), random_vectors(vlm)
    plain = logits_of(vlm, inputs)
    hooks = [len(layer._forward_hooks) for layer in vlm.layers]
    try:
        with steer(vlm, vectors):
            require(not torch.equal(logits_of(vlm, inputs), plain), "steering changed nothing")
            raise KeyError
    except KeyError:
        pass
    require(
        torch.equal(logits_of(vlm, inputs), plain), "the model is not what it was after steering"
    )
    left = [len(layer._forward_hooks) for layer in vlm.layers]
    require(left == hooks and "generate" not in vars(vlm.model), "hooks were left behind")
    try:
        with steer(vlm, vectors):
            pass
    except SteeringError:
        return "exact after an exception; steering that never ran raises"
    raise Broken("steering that never ran was not reported")


def _steps(
    vlm: VLM, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Logits of two decoding steps of one conversation; another one is prefilled behind its
    prefill."""
    mask = first["attention_mask"]
    behind = cache_of(vlm.model(**first, use_cache=True))
    if second is not None:
        vlm.model(**second, use_cache=True)
    logits = []
    for _ in range(2):
        mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
        token = first["input_ids"][:, -1:]
        out: Any = vlm.model(input_ids=token, attention_mask=mask, **with_cache(vlm.model, behind))
        logits.append(out.logits[:, -1])
    return torch.stack(logits)


def _copied(cache: Any) -> Any:
    import copy

    return copy.deepcopy(cache)

"""Clauses about gate, fill, and the schedule `sequential`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cmrm.checks.clauses import (
    DECODING,
    PLAIN,
    Broken,
    NotApplicable,
    block_outputs,
    logits_of,
    output_of,
    random_vectors,
    relative,
    require,
    some_samples,
    tolerance,
    with_image,
)
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Condition, build_request
from cmrm.shift.capture import capture_inputs
from cmrm.shift.estimate import estimate_shift
from cmrm.shift.steer import steer
from cmrm.steering.gate import Gate
from cmrm.steering.hooks import intervene
from cmrm.steering.intervention import (
    Intervention,
    fill_intervention,
    shift_intervention,
)
from cmrm.steering.setting import Steering


def gate(vlm: VLM) -> str:
    """A closed gate is the untouched model, an open one steers as no gate does; it decides by row,
    and holds while decoding."""
    if vlm.n_layers < 2:
        raise NotApplicable("there is no layer above a gate in a model of one layer")
    upper = tuple(range(1, vlm.n_layers))
    steered = shift_intervention(random_vectors(vlm), Steering(1.0, "per_layer", "last", upper))
    requests = [with_image(), PLAIN, with_image("Say something else about this.", 1)]
    inputs = encode(vlm, requests)
    plain, ungated = _decoded(vlm, inputs), _decoded(vlm, inputs, steered)
    scores = capture_inputs(vlm, encode(vlm, [requests[0], requests[2]]))[:, 0]
    apart = scores[0] - scores[1]
    between = float(scores.mean(0) @ apart)
    for name, threshold, expected in (
        ("a closed gate", 1.0, plain),
        ("an open gate", -1.0, ungated),
    ):
        always = Gate("linear", (0,), torch.zeros_like(apart)[None], threshold)
        steered_anyway = _decoded(vlm, inputs, replace(steered, gate=always))
        same = all(torch.equal(a, b) for a, b in zip(steered_anyway, expected, strict=True))
        other = "the untouched model" if expected is plain else "steering without a gate"
        require(same, f"{name} is not {other}, bit for bit")
    by_row = replace(steered, gate=Gate("linear", (0,), apart[None].clone(), between))
    with intervene(vlm, by_row) as session:
        logits = logits_of(vlm, inputs)[:, -1]
    untouched = logits_of(vlm, inputs)[:, -1]
    moved = [not torch.equal(logits[row], untouched[row]) for row in range(3)]
    require(
        moved == [True, False, False],
        f"a gate that opens for the first of three rows moved rows {moved}",
    )
    return f"bit-equal closed and open; {session.rows_open} of {session.rows_decided} rows opened"


def fill(vlm: VLM) -> str:
    """Fill raises the coordinate to what the request has as text, never lowers it, and moves
    nothing else."""
    request = with_image()
    inputs = encode(vlm, [request])
    text = capture_inputs(vlm, encode(vlm, [request.without_images()]))
    directions = random_vectors(vlm)
    layer = vlm.n_layers // 2
    before = output_of(vlm, inputs, layer)[0].float().cpu()
    scale = float(before[-1].norm())
    worst, raised = 0.0, []
    for sign in (1.0, -1.0):
        unit = sign * directions[layer] / directions[layer].norm()
        setting = Steering(operator="fill", layers=(layer,))
        with intervene(vlm, fill_intervention(sign * directions, text, setting)):
            after = output_of(vlm, inputs, layer)[0].float().cpu()
        require(torch.equal(after[:-1], before[:-1]), "a token before the prompt's last one moved")
        had, wanted, has = (
            float(state @ unit) for state in (before[-1], text[0, layer], after[-1])
        )
        raised.append(wanted > had)
        worst = max(worst, abs(has - max(had, wanted)) / scale)
        require(
            worst <= tolerance(vlm),
            f"the coordinate is {has:.3g}; it was {had:.3g} and is {wanted:.3g} as text",
        )
        moved = after[-1] - before[-1]
        beside = float((moved - (moved @ unit) * unit).norm()) / scale
        require(beside <= tolerance(vlm), f"{beside:.1%} of the state moved beside the direction")
        require(wanted > had or not moved.any(), "a coordinate above that of the text was changed")
    require(sorted(raised) == [False, True], "no direction was raised, or both were")
    return f"raised one way and left the other; off by {worst:.1e} of a state"


def sequential(vlm: VLM) -> str:
    """With sequential vectors at alpha 1 the anchors' mean state is that of their texts, at every
    layer."""
    samples = some_samples()
    setting = Steering(schedule="sequential", positions="last_prompt")
    shift = estimate_shift(vlm, samples, batch_size=2, recommended=setting)
    text, plain, steered = [], [], []
    for sample in samples:
        request = build_request(sample, Condition.BLANK)
        inputs = encode(vlm, [request])
        text.append(capture_inputs(vlm, encode(vlm, [request.without_images()]))[0])
        plain.append(capture_inputs(vlm, inputs)[0])
        with steer(vlm, shift):
            steered.append(_last_states(vlm, inputs))
    target, before, after = (torch.stack(states).mean(0) for states in (text, plain, steered))
    worst, was = relative(after, target), relative(before, target)
    require(
        worst <= tolerance(vlm),
        f"the anchors' mean state differs by {worst:.2%} from that of their texts ({was:.0%} "
        "before steering)",
    )
    return f"mean states off by {worst:.1e}, before steering by {was:.1e}"


def _decoded(
    vlm: VLM, inputs: dict[str, torch.Tensor], *interventions: Intervention
) -> list[torch.Tensor]:
    """Logits of every step of a short greedy generation."""
    out: Any
    if interventions:
        with intervene(vlm, *interventions):
            out = vlm.model.generate(**inputs, **DECODING)
    else:
        out = vlm.model.generate(**inputs, **DECODING)
    return list(out.logits)


def _last_states(vlm: VLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """States float32 [L, d] of the last token of one prompt, as steering leaves them."""
    states = []
    for layer, output in enumerate(block_outputs(vlm, inputs)):
        if output is None:
            raise Broken(f"decoder layer {layer} did not run")
        states.append(output[0, -1].float().cpu())
    return torch.stack(states)

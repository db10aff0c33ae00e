"""Clauses about states: layers, image tokens, capture, padding, shared prefixes, artifacts."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from cmrm.checks.clauses import (
    LONG_TEXT,
    PLAIN,
    REFUSED_BY_THE_PROCESSOR,
    Broken,
    NotApplicable,
    block_outputs,
    logits_of,
    output_of,
    picture,
    random_vectors,
    relative,
    require,
    some_samples,
    tolerance,
    with_image,
)
from cmrm.engines.generation import generate
from cmrm.errors import ArtifactError
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import FIVE, Condition, Request, build_request, build_requests
from cmrm.shift.artifact import ShiftVectors
from cmrm.shift.capture import capture_inputs
from cmrm.shift.estimate import SampleLevel, estimate_shift, sample_vectors
from cmrm.shift.pair import PrefixPair
from cmrm.shift.prefix import SharedPrefix
from cmrm.shift.steer import steer
from cmrm.steering.setting import Steering


def layers(vlm: VLM) -> str:
    """Decoder layers are found and counted."""
    text = vlm.model.config.get_text_config()
    require(
        vlm.n_layers == text.num_hidden_layers,
        f"{vlm.n_layers} layers were found, the config says {text.num_hidden_layers}",
    )
    for index, output in enumerate(block_outputs(vlm, encode(vlm, [with_image()]))):
        if output is None:
            raise Broken(f"decoder layer {index} did not run on a prompt with an image")
        width = output.shape[-1]
        require(width == vlm.hidden_size, f"layer {index} is {width} wide, not {vlm.hidden_size}")
    return f"{vlm.n_layers} layers, {vlm.hidden_size} wide"


def conditions(vlm: VLM) -> str:
    """Image tokens stand exactly where a condition has an image."""
    sample = some_samples()[0]
    counts = {}
    for condition in FIVE:
        ids = encode(vlm, [build_request(sample, condition)])["input_ids"]
        counts[condition.value] = int((ids == vlm.image_token_id).sum())
        present = counts[condition.value] > 0
        require(
            present == condition.has_image,
            f"{condition} has {counts[condition.value]} image tokens",
        )
    same = len({counts[c] for c in ("original", "blank", "noise")}) == 1
    require(same, f"image tokens differ: {counts}")
    return f"{counts['original']} image tokens with an image, 0 without"


def capture_is_plain_forward(vlm: VLM) -> str:
    """Captured states are those of a plain forward, bit for bit."""
    inputs = encode(vlm, [with_image()])
    states = capture_inputs(vlm, inputs)[0]
    for index, output in enumerate(block_outputs(vlm, inputs)):
        if output is None:
            raise Broken(f"decoder layer {index} did not run")
        require(torch.equal(states[index], output[0, -1].float().cpu()), f"layer {index} differs")
    return "bit-equal at every layer"


def padding(vlm: VLM) -> str:
    """Padding does not change a state."""
    worst = 0.0
    for short, other in ((with_image(), with_image(LONG_TEXT, 1)), (PLAIN, Request(LONG_TEXT))):
        alone = capture_inputs(vlm, encode(vlm, [short]))[0]
        padded = capture_inputs(vlm, encode(vlm, [short, other]))[0]
        worst = max(worst, relative(alone, padded))
    require(
        worst <= tolerance(vlm),
        f"states differ by {worst:.2%} between a prompt alone and in a padded batch",
    )
    return f"largest difference {worst:.1e}"


def mixing(vlm: VLM) -> str:
    """A text-only prompt is the same beside one with an image."""
    alone = capture_inputs(vlm, encode(vlm, [PLAIN]))[0]
    mixed = capture_inputs(vlm, encode(vlm, [PLAIN, with_image(LONG_TEXT)]))[0]
    worst = relative(alone, mixed)
    if worst > tolerance(vlm):
        raise NotApplicable(
            f"this model, untouched, reads a text-only prompt otherwise ({worst:.0%}) beside one "
            "with an image; cmrm "
            "never mixes them in a batch, and neither should you"
        )
    return f"largest difference {worst:.1e}"


def shared_prefix(vlm: VLM) -> str:
    """States by a shared prefix are those of whole forwards, measured against the shift that is
    made of them."""
    alike = [replace(sample, image=picture(0)) for sample in some_samples()]
    names = (Condition.QUERY, Condition.BLANK)
    requests = [list(build_requests(alike, condition)) for condition in names]
    whole = [torch.cat([capture_inputs(vlm, encode(vlm, [r])) for r in some]) for some in requests]
    shift = (whole[0] - whole[1]).norm(dim=-1).clamp_min(1e-6)
    pair = PrefixPair(vlm, SharedPrefix(vlm), SharedPrefix(vlm))
    apart = [SharedPrefix(vlm).states(some) for some in requests]
    each = [pair.states([text], [corrupted]) for text, corrupted in zip(*requests, strict=True)]
    together = [torch.cat(states) for states in zip(*each, strict=True)]
    lines = []
    for condition, runner, states, alone, expected in zip(
        names, (pair.text, pair.corrupted), together, apart, whole, strict=True
    ):
        worst = max(relative(states, expected), relative(alone, expected))
        require(
            worst <= tolerance(vlm),
            f"states of {condition} differ by {worst:.2%} from a whole forward",
        )
        of_shift = float(((states - expected).norm(dim=-1) / shift).max())
        if runner.reason:
            lines.append(f"{condition}: run whole ({runner.reason})")
        else:
            how = f"padded ({runner.unpacked})" if runner.unpacked else "packed"
            lines.append(
                f"{condition}: {runner.tokens} shared tokens, the rest {how}, difference "
                f"{worst:.1e} of a state, "
                f"{of_shift:.1e} of the shift"
            )
    if pair.joint_batches:
        lines.append("both in one pass")
    return "; ".join(lines)


def several_images(vlm: VLM) -> str:
    """Prompts with several images."""
    request = Request("Compare these.", (picture(0), picture(1)))
    try:
        inputs = encode(vlm, [request, with_image()])
    except REFUSED_BY_THE_PROCESSOR as error:
        raise NotApplicable(
            f"the processor takes one image a prompt: {str(error).splitlines()[0]}"
        ) from None
    tokens = (inputs["input_ids"] == vlm.image_token_id).sum(1).tolist()
    require(tokens[0] > 1, f"two images gave {tokens[0]} image tokens")
    swapped = Request(request.text, (picture(0), picture(0).rotate(180)))
    states, others = (capture_inputs(vlm, encode(vlm, [r])) for r in (request, swapped))
    require(not torch.equal(states, others), "the second image changes nothing")
    plain, vectors = logits_of(vlm, inputs), random_vectors(vlm)
    with steer(vlm, vectors, Steering(positions="after_image")):
        require(not torch.equal(logits_of(vlm, inputs), plain), "steering did not reach the prompt")
    return f"{tokens[0]} image tokens for two images"


def image_behind_text(vlm: VLM) -> str:
    """An image behind the text."""
    request = Request("Describe this.", (picture(0),), image_last=True)
    try:
        inputs = encode(vlm, [request])
    except REFUSED_BY_THE_PROCESSOR as error:
        raise NotApplicable(
            f"the chat template does not place it: {str(error).splitlines()[0]}"
        ) from None
    places = (inputs["input_ids"][0] == vlm.image_token_id).nonzero().flatten()
    first = (encode(vlm, [with_image()])["input_ids"][0] == vlm.image_token_id).nonzero().flatten()
    if places.min() <= first.min():
        raise NotApplicable(
            "the processor or chat template puts the image first wherever it stands"
        )
    before, vectors = output_of(vlm, inputs, 0), random_vectors(vlm)
    with steer(vlm, vectors, Steering(1.0, "per_layer", "after_image", (0,))):
        after = output_of(vlm, inputs, 0)
    moved = (after != before).any(-1)[0].nonzero().flatten()
    expected = list(range(int(places.max()) + 1, inputs["input_ids"].shape[1]))
    require(moved.tolist() == expected, "wrong positions moved")
    return f"image tokens from position {int(places.min())} on"


def sample_level(vlm: VLM) -> str:
    """The sample level gives each row its own vector."""
    requests = [build_request(s, Condition.ORIGINAL) for s in some_samples()]
    together = sample_vectors(vlm, requests, SampleLevel())
    alone = torch.cat([sample_vectors(vlm, [r], SampleLevel()) for r in requests])
    scale = capture_inputs(vlm, encode(vlm, [with_image()])).norm(dim=-1).max()
    worst = float((together - alone).norm(dim=-1).max() / scale)
    of_vector = float(((together - alone).norm(dim=-1) / alone.norm(dim=-1).clamp_min(1e-6)).max())
    require(
        worst <= tolerance(vlm),
        f"a row's vector differs by {worst:.2%} of a state's norm between batch and alone",
    )
    return f"largest difference {worst:.1e} of a state's norm, {of_vector:.1e} of the vector's"


def artifact(vlm: VLM) -> str:
    """An artifact survives its file, fits its model, and is refused by another one."""
    shift = estimate_shift(vlm, some_samples(), batch_size=2)
    with tempfile.TemporaryDirectory() as folder:
        loaded = ShiftVectors.load(shift.save(Path(folder) / "shift.safetensors"))
    require(torch.equal(loaded.vectors, shift.vectors), "vectors change in the file")
    same = (loaded.provenance, loaded.recommended) == (shift.provenance, shift.recommended)
    require(same, "provenance changes in the file")
    loaded.check(vlm)
    identity = loaded.identity
    if identity is None:
        raise Broken("the artifact does not know its model")
    stranger = replace(loaded, identity=replace(identity, template="0" * 64))
    try:
        stranger.check(vlm)
    except ArtifactError:
        norms = shift.provenance.norms
        return f"norm {norms[0]:.3g} at the first layer, {norms[-1]:.3g} at the last"
    raise Broken("an artifact of another chat template was accepted")


def all_conditions_generate(vlm: VLM) -> str:
    """Every condition generates; text-only conditions are not steered."""
    samples = some_samples()[:2]
    shift = estimate_shift(vlm, some_samples(), estimator="mean")
    for condition in FIVE:
        plain = generate(vlm, samples, condition=condition, max_new_tokens=3)
        steered = generate(vlm, samples, condition=condition, shift=shift, max_new_tokens=3)
        counts = f"{len(plain)} and {len(steered)}"
        require(len(plain) == len(steered) == 2, f"{condition}: two samples gave {counts} replies")
        require(
            condition.has_image or plain == steered,
            f"the text-only condition {condition} was steered",
        )
    return "five conditions, steered and not"

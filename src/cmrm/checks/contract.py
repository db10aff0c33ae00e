"""The contract that capture and steering rest on: one function a clause, each run on a loaded VLM.

Every clause compares the model with itself, so none needs a reference value; random weights do as well as trained ones. A
clause returns a figure or a few words, and raises `Broken` or `NotApplicable`; `check.run_checks` runs them all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image

from cmrm.shift.artifact import ShiftVectors
from cmrm.shift.capture import capture_inputs, hidden_of
from cmrm.prompts.conditions import FIVE, Condition, Request, build_request, build_requests, noise_image
from cmrm.errors import ArtifactError, SteeringError
from cmrm.engines.transformers import SampleLevel, generate, sample_vectors
from cmrm.model.vlm import VLM, encode
from cmrm.shift.prefix import PrefixPair, SharedPrefix
from cmrm.prompts.sample import Sample
from cmrm.shift.estimate import estimate_shift
from cmrm.steering.hooks import Steering, layer_deltas, steer

DECODING: dict[str, Any] = {
    "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
}  # fmt: skip
"""How the clauses about generation decode."""

REFUSED_BY_THE_PROCESSOR = (ValueError, TypeError, IndexError, TemplateError)
"""What processors and chat templates raise for a prompt that they do not take."""


class Broken(Exception):
    """The contract does not hold; the message says what was found."""


class NotApplicable(Exception):
    """The model cannot be asked this; the message says why."""


def hold(condition: object, message: str) -> None:
    """Raise `Broken` unless `condition`; unlike `assert` it is there under `python -O` too."""
    if not condition:
        raise Broken(message)


def _picture(k: int) -> Image.Image:
    return noise_image((64 + 16 * k, 48), seed=0, key=f"check-{k}")


def _with_image(text: str = "Describe this.", k: int = 0) -> Request:
    return Request(text, (_picture(k),))


_LONG = "Describe this and say at length what it may be for, and why. " * 2
_PLAIN = Request("Describe a quiet morning by the sea, in a few words.")


def _samples() -> list[Sample]:
    texts = ("Describe this.", "What is shown here?", "Say something about it, please.")
    return [Sample(f"check-{k}", text, _picture(k), caption="a picture of noise") for k, text in enumerate(texts)]


def _tolerance(vlm: VLM) -> float:
    """Largest relative difference between two computations of the same states in the model's dtype.

    Half precision rounds to 0.4 %, which some layers of random weights multiply many times; a real mistake shows as tens of
    percent.
    """
    return 1e-3 if vlm.model.dtype == torch.float32 else 0.15


def _vectors(vlm: VLM) -> torch.Tensor:
    """Random directions as long as the residual stream itself: large enough that no effect hides in rounding."""
    states = capture_inputs(vlm, encode(vlm, [_with_image()]))[0]
    directions = torch.randn(states.shape, generator=torch.Generator().manual_seed(7))
    return directions / directions.norm(dim=1, keepdim=True) * states.norm(dim=1, keepdim=True).clamp_min(1e-3)


def _logits(vlm: VLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    out: torch.Tensor = vlm.model(**inputs, use_cache=False).logits
    return out


def _block_outputs(vlm: VLM, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor | None]:
    """Output of every block [B, T, d], by hooks that share nothing with `capture`; None where a block did not run."""
    kept: list[torch.Tensor | None] = [None] * vlm.n_layers
    handles = []
    for index, layer in enumerate(vlm.layers):

        def keep(module: Any, args: Any, output: Any, index: int = index) -> None:
            kept[index] = hidden_of(output).detach().clone()

        handles.append(layer.register_forward_hook(keep))
    try:
        vlm.model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def _output_of(vlm: VLM, inputs: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """Output of one block [B, T, d]."""
    output = _block_outputs(vlm, inputs)[layer]
    if output is None:
        raise Broken(f"decoder layer {layer} did not run")
    return output


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest Euclidean distance of two sets of vectors [..., d] over the larger norm."""
    a, b = a.float().cpu(), b.float().cpu()
    return float(((a - b).norm(dim=-1) / torch.maximum(a.norm(dim=-1), b.norm(dim=-1)).clamp_min(1e-6)).max())


def _layers(vlm: VLM) -> str:
    text = vlm.model.config.get_text_config()
    hold(vlm.n_layers == text.num_hidden_layers, f"{vlm.n_layers} found, the config says {text.num_hidden_layers}")
    for index, output in enumerate(_block_outputs(vlm, encode(vlm, [_with_image()]))):
        if output is None:
            raise Broken(f"decoder layer {index} did not run on a prompt with an image")
        hold(output.shape[-1] == vlm.hidden_size, f"layer {index} is {output.shape[-1]} wide, not {vlm.hidden_size}")
    return f"{vlm.n_layers} layers, {vlm.hidden_size} wide"


def _conditions(vlm: VLM) -> str:
    sample = _samples()[0]
    counts = {}
    for condition in FIVE:
        ids = encode(vlm, [build_request(sample, condition)])["input_ids"]
        counts[condition.value] = int((ids == vlm.image_token_id).sum())
        held = counts[condition.value] > 0
        hold(held == condition.has_image, f"{condition} has {counts[condition.value]} image tokens")
    hold(len({counts[c] for c in ("original", "blank", "noise")}) == 1, f"image tokens differ: {counts}")
    return f"{counts['original']} image tokens with an image, 0 without"


def _capture_is_plain_forward(vlm: VLM) -> str:
    inputs = encode(vlm, [_with_image()])
    states = capture_inputs(vlm, inputs)[0]
    for index, output in enumerate(_block_outputs(vlm, inputs)):
        if output is None:
            raise Broken(f"decoder layer {index} did not run")
        hold(torch.equal(states[index], output[0, -1].float().cpu()), f"layer {index} differs")
    return "bit-equal at every layer"


def _padding(vlm: VLM) -> str:
    worst = 0.0
    for short, other in ((_with_image(), _with_image(_LONG, 1)), (_PLAIN, Request(_LONG))):
        alone = capture_inputs(vlm, encode(vlm, [short]))[0]
        padded = capture_inputs(vlm, encode(vlm, [short, other]))[0]
        worst = max(worst, _relative(alone, padded))
    hold(worst <= _tolerance(vlm), f"states differ by {worst:.2%} between a prompt alone and in a padded batch")
    return f"largest difference {worst:.1e}"


def _mixing(vlm: VLM) -> str:
    alone = capture_inputs(vlm, encode(vlm, [_PLAIN]))[0]
    mixed = capture_inputs(vlm, encode(vlm, [_PLAIN, _with_image(_LONG)]))[0]
    worst = _relative(alone, mixed)
    if worst > _tolerance(vlm):
        raise NotApplicable(
            f"this model, untouched, takes a text-only prompt otherwise ({worst:.0%}) beside one with image; cmrm never "
            "mixes them in a batch, and neither should you"
        )
    return f"largest difference {worst:.1e}"


def _shared_prefix(vlm: VLM) -> str:
    alike = [replace(s, image=_picture(0)) for s in _samples()]
    conditions = (Condition.QUERY, Condition.BLANK)
    requests = [list(build_requests(alike, condition)) for condition in conditions]
    whole = [torch.cat([capture_inputs(vlm, encode(vlm, [r])) for r in some]) for some in requests]
    pair = PrefixPair(vlm, SharedPrefix(vlm), SharedPrefix(vlm))
    apart = [SharedPrefix(vlm).states(some) for some in requests]
    each = [pair.states([text], [corrupted]) for text, corrupted in zip(*requests, strict=True)]
    together = [torch.cat(states) for states in zip(*each, strict=True)]
    found = []
    for condition, runner, states, alone, expected in zip(
        conditions, (pair.text, pair.corrupted), together, apart, whole, strict=True
    ):
        worst = max(_relative(states, expected), _relative(alone, expected))
        hold(worst <= _tolerance(vlm), f"states of {condition} differ by {worst:.2%} from a whole forward")
        if runner.reason:
            found.append(f"{condition}: run whole ({runner.reason})")
        else:
            how = f"padded ({runner.unpacked})" if runner.unpacked else "packed"
            found.append(f"{condition}: {runner.tokens} shared tokens, the rest {how}, difference {worst:.1e}")
    if pair.joint_batches:
        found.append("both in one pass")
    return "; ".join(found)


def _alpha_zero(vlm: VLM) -> str:
    inputs, vectors = encode(vlm, [_with_image(), _PLAIN]), _vectors(vlm)
    plain = _logits(vlm, inputs)
    for schedule in ("telescoped", "per_layer"):
        with steer(vlm, vectors, Steering(0.0, schedule, "all")):
            hold(torch.equal(_logits(vlm, inputs), plain), f"logits change under {schedule}")
    return "bit-equal logits"


def _gating(vlm: VLM) -> str:
    inputs, vectors = encode(vlm, [_PLAIN, _with_image(), Request("Hi.")]), _vectors(vlm)
    plain = _logits(vlm, inputs)
    with steer(vlm, vectors, Steering(1.0, "per_layer", "all")):
        steered = _logits(vlm, inputs)
    real = inputs["attention_mask"].bool().cpu()
    for row in (0, 2):
        same = torch.equal(steered[row].cpu()[real[row]], plain[row].cpu()[real[row]])
        hold(same, "a row without image changed when a row with image beside it was steered")
    hold(not torch.equal(steered[1], plain[1]), "the row with image did not change")
    return "rows without image bit-equal, the row with image moved"


def _schedules(vlm: VLM) -> str:
    inputs, vectors = encode(vlm, [_with_image()]), _vectors(vlm)
    layer = vlm.n_layers // 2
    before = _output_of(vlm, inputs, layer)
    with steer(vlm, vectors, Steering(0.5, "per_layer", "last", (layer,))):
        after = _output_of(vlm, inputs, layer)
    moved = (after - before)[0].float().cpu()
    hold(not moved[:-1].any(), "a position before the last prompt token moved")
    wrong = _relative(moved[-1], 0.5 * vectors[layer])
    hold(wrong <= _tolerance(vlm), f"the state moved by something else than alpha v, off by {wrong:.1%}")
    summed = torch.stack(list(layer_deltas(vectors, Steering(1.0, "telescoped")).values())).sum(0)
    hold(_relative(summed, vectors[-1]) < 1e-4, "telescoped additions do not sum to the last layer's vector")
    return f"moved by alpha v to within {wrong:.1e}"


def _several_images(vlm: VLM) -> str:
    request = Request("Compare these.", (_picture(0), _picture(1)))
    try:
        inputs = encode(vlm, [request, _with_image()])
    except REFUSED_BY_THE_PROCESSOR as error:
        raise NotApplicable(f"the processor takes one image a prompt: {str(error).splitlines()[0]}") from None
    tokens = (inputs["input_ids"] == vlm.image_token_id).sum(1).tolist()
    hold(tokens[0] > 1, f"two images gave {tokens[0]} image tokens")
    swapped = Request(request.text, (_picture(0), _picture(0).rotate(180)))
    states, others = (capture_inputs(vlm, encode(vlm, [r])) for r in (request, swapped))
    hold(not torch.equal(states, others), "the second image changes nothing")
    plain, vectors = _logits(vlm, inputs), _vectors(vlm)
    with steer(vlm, vectors, Steering(positions="after_image")):
        hold(not torch.equal(_logits(vlm, inputs), plain), "steering did not reach the prompt")
    return f"{tokens[0]} image tokens for two images"


def _image_behind_text(vlm: VLM) -> str:
    request = Request("Describe this.", (_picture(0),), image_last=True)
    try:
        inputs = encode(vlm, [request])
    except REFUSED_BY_THE_PROCESSOR as error:
        raise NotApplicable(f"the chat template does not place it: {str(error).splitlines()[0]}") from None
    places = (inputs["input_ids"][0] == vlm.image_token_id).nonzero().flatten()
    first = (encode(vlm, [_with_image()])["input_ids"][0] == vlm.image_token_id).nonzero().flatten()
    if places.min() <= first.min():
        raise NotApplicable("the processor or chat template puts the image first wherever it stands")
    before, vectors = _output_of(vlm, inputs, 0), _vectors(vlm)
    with steer(vlm, vectors, Steering(1.0, "per_layer", "after_image", (0,))):
        after = _output_of(vlm, inputs, 0)
    moved = (after != before).any(-1)[0].nonzero().flatten()
    hold(moved.tolist() == list(range(int(places.max()) + 1, inputs["input_ids"].shape[1])), "wrong positions moved")
    return f"image tokens from position {int(places.min())} on"


def _cache(vlm: VLM) -> str:
    inputs, vectors = encode(vlm, [_with_image(), _PLAIN]), _vectors(vlm)
    runs = []
    for use_cache in (True, False):
        with steer(vlm, 0.3 * vectors, Steering(positions="all")):
            runs.append(vlm.model.generate(**inputs, **DECODING, use_cache=use_cache))
    worst = 0.0
    width = inputs["input_ids"].shape[1]
    for step, (cached, slow) in enumerate(zip(runs[0].logits, runs[1].logits, strict=True)):
        same = (runs[0].sequences[:, width : width + step] == runs[1].sequences[:, width : width + step]).all(1)
        if not same.any():
            break
        worst = max(worst, _relative(cached[same], slow[same]))
    hold(worst <= _tolerance(vlm), f"logits with and without KV cache differ by {worst:.2%}")
    return f"largest difference of logits {worst:.1e}"


def _generated_rows(vlm: VLM) -> str:
    inputs, vectors = encode(vlm, [_with_image(), _PLAIN]), _vectors(vlm)
    width = inputs["input_ids"].shape[1]
    plain = vlm.model.generate(**inputs, **DECODING)
    with steer(vlm, vectors, Steering(1.0, "per_layer", "generated")):
        steered = vlm.model.generate(**inputs, **DECODING)
    hold(torch.equal(plain.sequences[1, width:], steered.sequences[1, width:]), "the row without image was steered")
    hold(torch.equal(plain.logits[0], steered.logits[0]), "the prompt was steered under positions 'generated'")
    hold(not torch.equal(plain.logits[1][0], steered.logits[1][0]), "generated tokens of the image row were not")
    return "gate and positions hold while decoding"


def _restored(vlm: VLM) -> str:
    inputs, vectors = encode(vlm, [_with_image()]), _vectors(vlm)
    plain = _logits(vlm, inputs)
    hooks = [len(layer._forward_hooks) for layer in vlm.layers]
    try:
        with steer(vlm, vectors):
            hold(not torch.equal(_logits(vlm, inputs), plain), "steering changed nothing")
            raise KeyError
    except KeyError:
        pass
    hold(torch.equal(_logits(vlm, inputs), plain), "the model is not what it was after steering")
    hold([len(layer._forward_hooks) for layer in vlm.layers] == hooks, "hooks were left behind")
    try:
        with steer(vlm, vectors):
            pass
    except SteeringError:
        return "exact after an exception; a hook that never ran raises"
    raise Broken("steering that never ran was not reported")


def _sample_level(vlm: VLM) -> str:
    requests = [build_request(s, Condition.ORIGINAL) for s in _samples()]
    together = sample_vectors(vlm, requests, SampleLevel())
    alone = torch.cat([sample_vectors(vlm, [r], SampleLevel()) for r in requests])
    scale = capture_inputs(vlm, encode(vlm, [_with_image()])).norm(dim=-1).max()
    worst = float((together - alone).norm(dim=-1).max() / scale)
    hold(worst <= _tolerance(vlm), f"a row's vector differs by {worst:.2%} of a state's norm between batch and alone")
    return f"largest difference {worst:.1e} of a state's norm"


def _artifact(vlm: VLM) -> str:
    shift = estimate_shift(vlm, _samples(), batch_size=2)
    with tempfile.TemporaryDirectory() as folder:
        loaded = ShiftVectors.load(shift.save(Path(folder) / "shift.safetensors"))
    hold(torch.equal(loaded.vectors, shift.vectors), "vectors change in the file")
    same = (loaded.provenance, loaded.recommended) == (shift.provenance, shift.recommended)
    hold(same, "provenance changes in the file")
    loaded.check(vlm)
    stranger = ShiftVectors(shift.vectors, replace(shift.provenance, config_hash="0" * 64), shift.recommended)
    try:
        stranger.check(vlm)
    except ArtifactError:
        return f"norm {shift.provenance.norms[0]:.3g} at the first layer, {shift.provenance.norms[-1]:.3g} at the last"
    raise Broken("an artifact of another config was accepted")


def _all_conditions_generate(vlm: VLM) -> str:
    samples = _samples()[:2]
    shift = estimate_shift(vlm, _samples(), estimator="mean")
    for condition in FIVE:
        plain = generate(vlm, samples, condition=condition, max_new_tokens=3)
        steered = generate(vlm, samples, condition=condition, shift=shift, max_new_tokens=3)
        hold(len(plain) == len(steered) == 2, f"{condition}: two samples gave {len(plain)} and {len(steered)} replies")
        hold(condition.has_image or plain == steered, f"the text-only condition {condition} was steered")
    return "five conditions, steered and not"


CHECKS: dict[str, Callable[[VLM], str]] = {
    "decoder layers are found and counted": _layers,
    "image tokens stand exactly where a condition has an image": _conditions,
    "capture equals a plain forward": _capture_is_plain_forward,
    "padding does not change a state": _padding,
    "a text-only prompt is the same beside one with image": _mixing,
    "states by a shared prefix equal those of whole forwards": _shared_prefix,
    "alpha 0 is the untouched model": _alpha_zero,
    "rows without image are untouched in a mixed, padded batch": _gating,
    "what is added is alpha v, at the chosen layer and position": _schedules,
    "prompts with several images": _several_images,
    "image behind the text": _image_behind_text,
    "generation with KV cache equals generation without": _cache,
    "gate and positions last through generation": _generated_rows,
    "leaving restores the model": _restored,
    "sample level gives each row its own vector": _sample_level,
    "artifact round trip, and refusal of another model": _artifact,
    "every condition generates": _all_conditions_generate,
}

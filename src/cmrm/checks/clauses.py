"""What the clauses of the contract share: requests, random directions, block outputs, tolerances.

Every clause compares the model with itself, so none needs a reference value; random weights do as
well as trained ones. A clause returns a figure or a few words, and raises `Broken` or
`NotApplicable`.
"""

from __future__ import annotations

from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image

from cmrm.model.encode import encode
from cmrm.model.layers import hidden_of
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request, noise_image
from cmrm.prompts.sample import Sample
from cmrm.shift.capture import capture_inputs

DECODING: dict[str, Any] = {
    "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True,
    "return_dict_in_generate": True,
}  # fmt: skip
"""How the clauses about generation decode."""

REFUSED_BY_THE_PROCESSOR = (ValueError, TypeError, IndexError, TemplateError)
"""What processors and chat templates raise for a prompt that they do not take."""

LONG_TEXT = "Describe this and say at length what it may be for, and why. " * 2
PLAIN = Request("Describe a quiet morning by the sea, in a few words.")
"""A request without an image."""


class Broken(Exception):
    """The contract does not hold; the message says what was measured."""


class NotApplicable(Exception):
    """The model cannot be asked this; the message says why."""


def require(condition: object, message: str) -> None:
    """Raise `Broken` unless `condition`; unlike `assert` it is there under `python -O` too."""
    if not condition:
        raise Broken(message)


def picture(k: int) -> Image.Image:
    """A noise image; each k has a width of its own."""
    return noise_image((64 + 16 * k, 48), seed=0, key=f"check-{k}")


def with_image(text: str = "Describe this.", k: int = 0) -> Request:
    """A request with one image."""
    return Request(text, (picture(k),))


def some_samples() -> list[Sample]:
    """Three samples with images."""
    texts = ("Describe this.", "What is shown here?", "Say something about it, please.")
    return [
        Sample(f"check-{k}", text, picture(k), caption="a picture of noise")
        for k, text in enumerate(texts)
    ]


def tolerance(vlm: VLM) -> float:
    """Largest relative difference between two computations of the same states in the model's dtype.

    Half precision rounds to 0.4 %, which some layers of random weights multiply many times; a real
    mistake shows as tens of percent.
    """
    return 1e-3 if vlm.model.dtype == torch.float32 else 0.15


def random_vectors(vlm: VLM) -> torch.Tensor:
    """Random directions float32 [L, d] as long as the residual stream itself: no effect hides in
    rounding."""
    states = capture_inputs(vlm, encode(vlm, [with_image()]))[0]
    directions = torch.randn(states.shape, generator=torch.Generator().manual_seed(7))
    lengths = states.norm(dim=1, keepdim=True).clamp_min(1e-3)
    return directions / directions.norm(dim=1, keepdim=True) * lengths


def logits_of(vlm: VLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits [B, T, vocabulary] of one pass without a cache."""
    logits: torch.Tensor = vlm.model(**inputs, use_cache=False).logits
    return logits


def block_outputs(vlm: VLM, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor | None]:
    """Output of every block [B, T, d], by hooks that share nothing with `capture`; None where a
    block did not run."""
    outputs: list[torch.Tensor | None] = [None] * vlm.n_layers
    handles = []
    for index, layer in enumerate(vlm.layers):

        def record(module: Any, args: Any, output: Any, index: int = index) -> None:
            outputs[index] = hidden_of(output).detach().clone()

        handles.append(layer.register_forward_hook(record))
    try:
        vlm.model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def output_of(vlm: VLM, inputs: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """Output of one block [B, T, d]."""
    output = block_outputs(vlm, inputs)[layer]
    if output is None:
        raise Broken(f"decoder layer {layer} did not run")
    return output


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest Euclidean distance of two sets of vectors [..., d] over the larger norm."""
    a, b = a.float().cpu(), b.float().cpu()
    scale = torch.maximum(a.norm(dim=-1), b.norm(dim=-1)).clamp_min(1e-6)
    return float(((a - b).norm(dim=-1) / scale).max())

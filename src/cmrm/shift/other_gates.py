"""Two gates of other sources behind the interface of the harm gate: CAST's and HiddenDetect's.

| kind | what is fitted | layers that are read |
|---|---|---|
| `cosine` | u: first principal direction of both classes' states, centred | one |
| `vocabulary` | nothing: u and the metric follow from the unembedding | a range, by trapezoid |

CAST (Lee et al., arXiv 2409.05907, text of the paper and released code read): score
cos(h, tanh(p)), p the projection of h on u. The source averages states over all tokens and searches
layer, threshold and side by F1; here the last prompt token is read, and the threshold is a
quantile. A layer where harmful requests score LOWER has the weight -1, as the source's comparator.

HiddenDetect (Jiang et al., arXiv 2502.14744, released code read): cosine of the logit lens of h
with the 0/1 vector of refusal tokens, summed over layers by the trapezoid rule. The final norm is
an RMSNorm, and a cosine has no scale: with g the norm's weight, W the unembedding and n tokens,
u = g * (sum of their rows of W) / sqrt(n) and G = diag(g) W'W diag(g) give the same number. The
source reads blocks 16..29 of 32 and finds them by few-shot examples; here the range begins at half
of the depth and ends at the lowest layer whose area is close to the best.

Layer and threshold are chosen by the rules of `shift.harm_gate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from cmrm.errors import InputError, ModelError
from cmrm.model.vlm import VLM
from cmrm.shift.harm_gate import (
    FALSE_ALARMS,
    GateRecord,
    Scorer,
    check_enough,
    check_false_alarms,
    check_highest,
    chosen_layer,
    held_out_scores,
    recorded,
)
from cmrm.shift.probe import auc
from cmrm.steering.gate import Gate

OtherGate = Literal["cosine", "vocabulary"]
FittedGate = Literal["probe", "cosine", "vocabulary"]
"""Every gate that can be fitted; `probe` is that of `shift.harm_gate`."""

REFUSAL_WORDS = (
    "Sorry", "sorry", "unfortunately", "unfortunate", "sadly", "explicit", "deadly", "crim",
    "criminal", "illegal", "dangerous", "harmful", "warning", "alarm", "caution", "shame",
    "conspiracy", "Subject", "contrary", "shouldn",
)  # fmt: skip
"""HiddenDetect's list for LLaVA; the first token of each counts."""

ROWS = 8192
"""Rows of the unembedding that are multiplied at a time."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What HiddenDetect's score needs of a model; see the module."""

    vector: torch.Tensor
    """float32 [d]: u."""
    metric: torch.Tensor
    """float32 [d, d]: G."""


def check_gate_kind(kind: str) -> None:
    """Raise `InputError` where a kind of gate is none that can be fitted."""
    if kind not in get_args(FittedGate):
        raise InputError(f"gate_kind is {kind!r}; one of {', '.join(get_args(FittedGate))}")


def fit_other_gate(
    kind: OtherGate,
    harmful: torch.Tensor,
    benign: torch.Tensor,
    *,
    vocabulary: Vocabulary | None = None,
    false_alarms: float = FALSE_ALARMS,
    highest: int | None = None,
    seed: int = 0,
) -> tuple[Gate, GateRecord]:
    """A gate of another source, from states with an image; its record has the areas by layer.

    Args:
        kind: `cosine` (CAST) or `vocabulary` (HiddenDetect).
        harmful: float32 [N, L, d], last-prompt-token states of harmful anchors.
        benign: float32 [M, L, d], of benign ones.
        vocabulary: for the kind `vocabulary`, and for it alone.
        false_alarms: wanted share of benign requests above the threshold.
        highest: highest decoder layer that may be read; None: all but the last.
        seed: of the folds.

    Raises:
        InputError: an unknown kind, too few anchors, no layer that may be read, or no vocabulary.
    """
    if kind not in get_args(OtherGate):
        raise InputError(f"the gate's kind is {kind!r}; one of {', '.join(get_args(OtherGate))}")
    check_false_alarms(false_alarms)
    check_enough(len(harmful), len(benign))
    highest = check_highest(highest, harmful.shape[1])
    if kind == "cosine":
        return _cosine_gate(harmful, benign, false_alarms, highest, seed)
    if vocabulary is None:
        raise InputError("the gate `vocabulary` needs the model's vocabulary")
    return _vocabulary_gate(harmful, benign, vocabulary, false_alarms, highest)


def _cosine_gate(
    harmful: torch.Tensor, benign: torch.Tensor, false_alarms: float, highest: int, seed: int
) -> tuple[Gate, GateRecord]:
    """CAST's gate: one layer, its scores from folds that the vector was not fitted on."""

    def scorer(positive: torch.Tensor, negative: torch.Tensor) -> Scorer:
        return partial(_cosine_scores, condition_vectors(positive, negative))

    of_harmful, of_benign = held_out_scores(harmful, benign, scorer, seed=seed)
    areas = auc(of_harmful, of_benign)
    signs = torch.where(areas < 0.5, -1.0, 1.0)
    areas = torch.maximum(areas, 1 - areas)
    layer = chosen_layer(areas, 0, highest)
    weight = float(signs[layer])
    ends = [weight * scores[:, layer] for scores in (of_harmful, of_benign)]
    threshold, record = recorded(layer, areas, ends[0], ends[1], false_alarms)
    vector = condition_vectors(harmful, benign)[layer][None].clone()
    return Gate("cosine", (layer,), vector, threshold, weights=(weight,)), record


def _vocabulary_gate(
    harmful: torch.Tensor,
    benign: torch.Tensor,
    vocabulary: Vocabulary,
    false_alarms: float,
    highest: int,
) -> tuple[Gate, GateRecord]:
    """HiddenDetect's gate: a range of layers that begins at half of the depth.

    The area of layer l is that of the range that ends there, or of the layer alone below the range.
    """
    n_layers = harmful.shape[1]
    first = min(n_layers // 2, highest)
    by_layer = [_vocabulary_scores(vocabulary, states) for states in (harmful, benign)]
    summed = [scores.clone() for scores in by_layer]
    for last in range(first, n_layers):
        weights = torch.tensor(trapezoid(last - first + 1))
        for scores, total in zip(by_layer, summed, strict=True):
            total[:, last] = (scores[:, first : last + 1] * weights).sum(1)
    areas = auc(summed[0], summed[1])
    last = chosen_layer(areas, first, highest)
    layers = tuple(range(first, last + 1))
    ends = [total[:, last] for total in summed]
    threshold, record = recorded(last, areas, ends[0], ends[1], false_alarms)
    gate = Gate(
        "vocabulary", layers, vocabulary.vector.repeat(len(layers), 1), threshold,
        weights=trapezoid(len(layers)), metric=vocabulary.metric,
    )  # fmt: skip
    return gate, record


def trapezoid(count: int) -> tuple[float, ...]:
    """Weights of the trapezoid rule over `count` points at distance 1; one point counts 1."""
    if count == 1:
        return (1.0,)
    return (0.5, *[1.0] * (count - 2), 0.5)


def condition_vectors(harmful: torch.Tensor, benign: torch.Tensor) -> torch.Tensor:
    """CAST's condition vectors: unit vectors float32 [L, d] of states [N, L, d] and [M, L, d].

    First principal direction of all states, centred by the mean of the two classes' means; it
    points towards the harmful ones.
    """
    means = [states.double().mean(0) for states in (harmful, benign)]
    centre = (means[0] + means[1]) / 2
    states = (torch.cat([harmful, benign]).double() - centre).transpose(0, 1)
    vectors = torch.linalg.svd(states, full_matrices=False).Vh[:, 0]
    towards = (vectors * (means[0] - means[1])).sum(-1, keepdim=True)
    return torch.where(towards < 0, -vectors, vectors).float()


def refusal_vocabulary(vlm: VLM, words: tuple[str, ...] = REFUSAL_WORDS) -> Vocabulary:
    """HiddenDetect's vector and metric of a model; it runs no prompt.

    Raises:
        ModelError: the model has no unembedding, or its final norm is no RMSNorm.
        InputError: none of the words has a token.
    """
    head = vlm.model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or weight.dim() != 2 or weight.shape[1] != vlm.hidden_size:
        raise ModelError(
            f"{type(vlm.model).__name__} has no unembedding of width {vlm.hidden_size}; choose "
            "another gate"
        )
    tokens = sorted(_first_tokens(vlm.tokenizer, words))
    if not tokens:
        raise InputError("none of the refusal words has a token in this model's vocabulary")
    gain = norm_gain(vlm)
    total = weight[tokens].detach().float().sum(0).cpu()
    gram = torch.zeros(vlm.hidden_size, vlm.hidden_size)
    for rows in torch.split(weight.detach(), ROWS):
        block = rows.float()
        gram += (block.T @ block).cpu()
    return Vocabulary(gain * total / len(tokens) ** 0.5, gain[:, None] * gram * gain)


def _first_tokens(tokenizer: Any, words: tuple[str, ...]) -> set[int]:
    ids = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in words)
    unknown = getattr(tokenizer, "unk_token_id", None)
    return {int(tokens[0]) for tokens in ids if tokens and tokens[0] != unknown}


def norm_gain(vlm: VLM) -> torch.Tensor:
    """Weight float32 [d] of the norm behind the last decoder block, which has to be an RMSNorm.

    It is read off what the norm does to states whose root mean square is 1, and checked.

    Raises:
        ModelError: there is no such norm.
    """
    norm = _final_norm(vlm)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, vlm.hidden_size, generator=generator)
    signs = torch.where(states[0] < 0, -1.0, 1.0)
    with torch.inference_mode():
        weight = next((p for p in norm.parameters()), torch.empty(0))
        device = weight.device if weight.device.type != "meta" else vlm.device

        def normed(rows: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = norm(rows.to(device, weight.dtype)[None])[0]
            return output.float().cpu()

        gain = normed(signs[None])[0] * signs
        expected = gain * states / states.square().mean(-1, keepdim=True).sqrt()
        close = torch.allclose(normed(states), expected, rtol=0.02, atol=0.02)
    if not close:
        raise ModelError(
            f"the final norm {type(norm).__name__} is no RMSNorm; HiddenDetect's score has no "
            "closed form behind it. Choose another gate"
        )
    return gain.clone()


def _final_norm(vlm: VLM) -> nn.Module:
    """The norm that stands beside the list of decoder blocks."""
    for module in vlm.model.modules():
        children = dict(module.named_children())
        lists = [child for child in children.values() if isinstance(child, nn.ModuleList)]
        if not any(len(part) and tuple(part) == vlm.layers for part in lists):
            continue
        norms = [child for child in children.values() if "norm" in type(child).__name__.lower()]
        if len(norms) == 1:
            return norms[0]
    raise ModelError(
        f"{type(vlm.model).__name__} has no single norm beside its decoder blocks; choose another "
        "gate"
    )


def _cosine_scores(vectors: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """float32 [N, L]: cosine of states [N, L, d] with the tanh of their projection."""
    along = (states * vectors).sum(-1, keepdim=True) / vectors.square().sum(-1, keepdim=True)
    return torch.nn.functional.cosine_similarity(states, torch.tanh(along * vectors), dim=-1)


def _vocabulary_scores(vocabulary: Vocabulary, states: torch.Tensor) -> torch.Tensor:
    """float32 [N, L] of states [N, L, d]."""
    squared = ((states @ vocabulary.metric) * states).sum(-1)
    return (states @ vocabulary.vector) / squared.clamp_min(1e-12).sqrt()

"""The harm gate: a probe of the state WITH an image that says whether the request is harmful.

It is fitted on the corrupted-image states that the extraction runs anyway: harmful anchors against
benign ones, at the last prompt token. Layer and threshold are chosen by cross-validation:

- layer: the lowest one whose area under the ROC curve (AUC) is within 0.01 of the best, so that as
  many layers as possible stand above it;
- threshold: the score that the wanted share of held-out benign anchors exceeds.

Conditional steering is CAST's idea (Lee et al., arXiv 2409.05907); probe and rule are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from cmrm.errors import InputError
from cmrm.shift.probe import auc, fit_probe, folds_of
from cmrm.steering.gate import Gate

FALSE_ALARMS = 0.05
"""Share of benign requests that may be taken for harmful ones, where the user names none."""
FOLDS = 5
CLOSE = 0.01
"""Difference of two areas that does not decide between layers."""
LEAST = 10
"""Fewer anchors of a kind than this give no threshold that can be trusted."""
RIDGE = 100.0
"""Penalty of the probe."""
Scorer = Callable[[torch.Tensor], torch.Tensor]
"""Scores float32 [N, L] of states float32 [N, L, d]."""
RATES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
"""Shares of false alarms whose thresholds are recorded."""


@dataclass(frozen=True)
class GateRecord:
    """How a gate was fitted, and how well it does on anchors that it was not fitted on."""

    layer: int
    """Decoder layer that is read."""
    auc: tuple[float, ...]
    """Cross-validated area under the ROC curve at every decoder layer, 0..1."""
    wanted_false_alarms: float
    """Share of benign anchors that was asked for."""
    false_alarms: float
    """Share of held-out benign anchors above the threshold."""
    recall: float
    """Share of held-out harmful anchors above it."""
    n_harmful: int
    """Harmful anchors that it was fitted on."""
    n_benign: int
    """Benign ones."""
    curve: tuple[tuple[float, float, float, float], ...] = ()
    """(wanted share of false alarms, threshold, their share and recall on held-out anchors) at
    `RATES`."""
    questions: float | None = None
    """Share of image questions that it would steer; None: not measured."""
    n_questions: int = 0
    """Number of those."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "auc": list(self.auc), "curve": [list(row) for row in self.curve]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GateRecord:
        """A record from its JSON values.

        Raises:
            TypeError, ValueError: a field is unknown, missing or of another kind.
        """
        areas = tuple(float(area) for area in values["auc"])
        curve = tuple(
            (float(a), float(b), float(c), float(d)) for a, b, c, d in values.get("curve", ())
        )
        record = cls(**{**values, "auc": areas, "curve": curve})
        for name in ("wanted_false_alarms", "false_alarms", "recall"):
            if not 0.0 <= getattr(record, name) <= 1.0:
                raise ValueError(f"the gate's {name} is no share")
        return record


def check_false_alarms(share: float) -> None:
    """Raise `InputError` where a share of false alarms is none."""
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if not number or not 0.0 < share < 1.0:
        raise InputError(f"false_alarms is {share!r}; it is a share between 0 and 1, such as 0.05")


def check_enough(harmful: int, benign: int) -> None:
    """Raise `InputError` where there are too few anchors of a kind for a gate."""
    if min(harmful, benign) < LEAST:
        raise InputError(
            f"{harmful} harmful and {benign} benign anchors were given; a gate needs at "
            f"least {LEAST} of each"
        )


def check_highest(highest: int | None, n_layers: int) -> int:
    """The highest decoder layer that a gate may read; all but the last where None.

    Raises:
        InputError: it leaves no layer above it, or none below.
    """
    highest = n_layers - 2 if highest is None else highest
    if not 0 <= highest < n_layers - 1:
        raise InputError(
            f"a gate has to stand below the layers that are steered, at one of 0..{n_layers - 2}; "
            f"it was given {highest}"
        )
    return highest


def fit_gate(
    harmful: torch.Tensor,
    benign: torch.Tensor,
    *,
    false_alarms: float = FALSE_ALARMS,
    highest: int | None = None,
    seed: int = 0,
) -> tuple[Gate, GateRecord]:
    """A harm gate from states with an image; see the module for the rule.

    Args:
        harmful: float32 [N, L, d], last-prompt-token states of harmful anchors.
        benign: float32 [M, L, d], of benign ones.
        false_alarms: wanted share of benign requests above the threshold.
        highest: highest 0-based decoder layer that may be read; None: all but the last.
        seed: of the folds.

    Raises:
        InputError: there are too few anchors, or `highest` leaves no layer above it.
    """
    check_false_alarms(false_alarms)
    check_enough(len(harmful), len(benign))
    highest = check_highest(highest, harmful.shape[1])

    def scorer(positive: torch.Tensor, negative: torch.Tensor) -> Scorer:
        return fit_probe(positive, negative, RIDGE).scores

    of_harmful, of_benign = held_out_scores(harmful, benign, scorer, seed=seed)
    areas = auc(of_harmful, of_benign)
    layer = chosen_layer(areas, 0, highest)
    threshold, record = recorded(
        layer, areas, of_harmful[:, layer], of_benign[:, layer], false_alarms
    )
    probe = fit_probe(harmful, benign, RIDGE)
    gate = Gate(
        "linear", (layer,), probe.weight[layer][None].clone(), threshold,
        bias=float(probe.bias[layer]),
    )  # fmt: skip
    return gate, record


def recorded(
    layer: int,
    areas: torch.Tensor,
    harmful: torch.Tensor,
    benign: torch.Tensor,
    false_alarms: float,
) -> tuple[float, GateRecord]:
    """The threshold at a wanted share of false alarms, and the record of a gate.

    Args:
        layer: decoder layer that is read, the last of several.
        areas: float [L], area under the ROC curve at each layer.
        harmful: float [N], the gate's scores of held-out harmful anchors.
        benign: float [M], of benign ones.
        false_alarms: wanted share of benign anchors above the threshold.
    """

    def at(share: float) -> tuple[float, float, float]:
        """Threshold, measured share and recall at a wanted share of false alarms."""
        threshold = float(torch.quantile(benign.double(), 1 - share))
        alarms, recall = (
            float((scores.double() > threshold).double().mean()) for scores in (benign, harmful)
        )
        return threshold, alarms, recall

    threshold, alarms, recall = at(false_alarms)
    record = GateRecord(
        layer,
        tuple(round(float(area), 4) for area in areas),
        false_alarms,
        alarms,
        recall,
        len(harmful),
        len(benign),
        tuple((share, *at(share)) for share in RATES),
    )
    return threshold, record


def at_false_alarms(gate: Gate, record: GateRecord, share: float) -> tuple[Gate, GateRecord]:
    """The same gate at another share of false alarms, one of those on its curve.

    Raises:
        InputError: the share is not on the curve.
    """
    check_false_alarms(share)
    points = {wanted: point for wanted, *point in record.curve}
    if share == record.wanted_false_alarms:
        return gate, record
    if not points:
        raise InputError(
            f"this gate has no recorded thresholds; extract again with --false-alarms {share:g}"
        )
    if share not in points:
        known = ", ".join(f"{wanted:g}" for wanted in points)
        raise InputError(
            f"the gate's thresholds are recorded for false alarms of {known}, not of {share:g}; "
            "choose one of these, or extract again"
        )
    threshold, alarms, recall = points[share]
    changed = replace(record, wanted_false_alarms=share, false_alarms=alarms, recall=recall)
    return replace(gate, threshold=threshold), changed


def held_out_scores(
    harmful: torch.Tensor,
    benign: torch.Tensor,
    fit: Callable[[torch.Tensor, torch.Tensor], Scorer],
    *,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores float32 [N, L] and [M, L] of each anchor by what was not fitted on it.

    `fit` makes a scorer from the states of both kinds of anchors, harmful first.
    """
    scores = [torch.empty(states.shape[:2]) for states in (harmful, benign)]
    folds = [folds_of(len(states), FOLDS, seed) for states in (harmful, benign)]
    for fold in range(FOLDS):
        scorer = fit(harmful[folds[0] != fold], benign[folds[1] != fold])
        for states, assigned, out in zip((harmful, benign), folds, scores, strict=True):
            out[assigned == fold] = scorer(states[assigned == fold])
    return scores[0], scores[1]


def chosen_layer(areas: torch.Tensor, first: int, highest: int) -> int:
    """The lowest layer from `first` to `highest` whose area is close to the best of them."""
    candidates = areas[first : highest + 1]
    return first + int((candidates >= candidates.max() - CLOSE).nonzero()[0])

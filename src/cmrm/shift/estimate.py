"""From differences of states to shift vectors (Liu et al., arXiv 2410.09047, section 4).

The modelling assumption is h_o = h* + alpha (h_c - h_t), hence h* = h_o + alpha (h_t - h_c): a
vector points FROM the corrupted-image state h_c TO the text-only state h_t and is added. (The
paper's Eq. 6 prints the opposite sign, against its own Eq. 3.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from cmrm.errors import InputError
from cmrm.model.identity import config_hash
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import CORRUPTED, Condition, Request
from cmrm.prompts.sample import Sample
from cmrm.prompts.splits import refuse_overlap
from cmrm.prompts.text import shortened
from cmrm.shift.artifact import Provenance, ShiftVectors, library_versions
from cmrm.shift.fit import Fit, fitted
from cmrm.shift.gap import cautious_setting
from cmrm.shift.harm_gate import FALSE_ALARMS, LEAST, check_enough, check_false_alarms
from cmrm.shift.moments import Estimate, Moments
from cmrm.shift.other_gates import FittedGate, check_gate_kind
from cmrm.shift.pair import Prefixes
from cmrm.shift.reader import Reader
from cmrm.shift.summary import KEPT, Summary
from cmrm.steering.hooks import refuse_inside_steering
from cmrm.steering.setting import Steering

Estimator = Literal["pca", "mean", "icv"]
Part = Literal["anchors", "benign", "questions", "sequential"]
"""Parts of an extraction, in their order."""

CHECKPOINT_SECONDS = 30.0
"""Seconds between two writings of a checkpoint. On a 7B model each writes some 140 MB."""

LEAST_COSINE = 0.5
"""Below this cosine of a `pca` vector and the mean difference a warning is given."""


def estimate_shift(
    vlm: VLM,
    anchors: Iterable[Sample],
    benign: Iterable[Sample] | None = None,
    *,
    estimator: Estimator = "pca",
    corruption: Condition | str = Condition.BLANK,
    seed: int = 0,
    batch_size: int = 16,
    recommended: Steering | None = None,
    mixed: bool = False,
    false_alarms: float = FALSE_ALARMS,
    gate_kind: FittedGate = "probe",
    questions: Sequence[Sample] = (),
    reuse_prefix: bool = True,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    on_batch: Callable[[int], None] | None = None,
    on_part: Callable[[Part, int | None], None] | None = None,
) -> ShiftVectors:
    """Dataset-level shift over `anchors`: last prompt token, every decoder layer, text-only minus
    corrupted image.

    With benign anchors beside the harmful ones, the artifact holds the refusal direction and a harm
    gate too, and vectors of the schedule `sequential` for the layers above the gate. The setting
    that it recommends follows from the anchors (`shift.gap`): `fill` where the image takes a part
    of the refusal direction, and nothing (alpha 0) where it does not.

    Memory does not grow with the number of anchors (`summary.Summary`). Where prompts begin alike
    (a constant corrupted image, the system prompt) the shared part is run once
    (`prefix.SharedPrefix`). Under `torch.distributed` (such as `accelerate launch`) each process
    takes its share of the batches, and every one returns the shift over all of them.

    Args:
        vlm: the model.
        anchors: at least two samples with an image, harmful ones; most corruptions use its size
            alone. Read once, as they are needed; the corruption `other` and the schedule
            `sequential` read them all at first.
        benign: benign look-alikes with an image; None: vectors alone are estimated.
        estimator: see `reduce_differences`.
        corruption: what stands for the image in h_c; see `conditions`.
        seed: seed of noise, shuffles, donors, folds and bootstrap.
        batch_size: prompts per forward pass.
        recommended: setting to store with the vectors; None: by the rule above, or a cautious one
            without benign anchors (`gap.cautious_setting`). Under the schedule `sequential` vectors
            are estimated for its layers.
        mixed: whether the shift is that of harmful and benign anchors together, as the paper's,
            which adds benign ones.
        false_alarms: share of benign requests that the gate may take for harmful ones.
        gate_kind: what the gate scores a state by: our `probe`, or another source's `cosine` or
            `vocabulary` (`shift.other_gates`).
        questions: image questions; the share that the gate would steer is recorded.
        reuse_prefix: run what prompts share once; off runs every prompt whole.
        checkpoint: file that records the state of the run, so that a killed run continues there. It
            stays: remove it when the artifact has been saved. Benign anchors and the sequential
            schedule have files of their own beside it.
        checkpoint_seconds: least time between two writings of it; an interruption writes it too.
        on_batch: called after each batch with its number of prompts, for a progress bar.
        on_part: called before each part of the run with its name and its number of prompts, None
            where anchors come one at a time. How many prompts `sequential` takes follows from the
            gate.

    Raises:
        InputError: no anchor, one anchor, two of one id, an unusable image, an unknown corruption
            or estimator, too few anchors for a gate, a checkpoint of another run.
        SteeringError: this context steers the model.
    """
    corruption = checked_corruption(corruption)
    check_estimator(estimator)
    check_false_alarms(false_alarms)
    check_gate_kind(gate_kind)
    refuse_inside_steering(vlm, "estimating a shift")
    vlm.check_eval()
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it is at least 1")
    if recommended is not None:
        lowest = recommended.chosen_layers(vlm.n_layers)[0]
        if recommended.gate and recommended.layers is not None and lowest == 0:
            raise InputError("a gate stands below the layers that are steered; leave layer 0 out")
    if benign is None:
        refuse_without_benign(recommended, mixed=mixed)
    else:
        anchors, benign = list(anchors), list(benign)
        check_anchors(anchors, benign)
    if recommended is not None and recommended.kind == "sequential":
        anchors = list(anchors)
    reader = Reader(
        vlm,
        corruption,
        seed=seed,
        batch_size=batch_size,
        reuse_prefix=reuse_prefix,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        on_batch=on_batch,
    )
    begin = on_part or (lambda part, prompts: None)
    keep = KEPT if benign is not None else 0
    begin("anchors", 2 * len(anchors) if isinstance(anchors, Sequence) else None)
    summary, members = reader.read(anchors, "", keep=keep, least=2)
    others: Summary | None = None
    more: dict[str, Any] = {}
    if benign is not None:
        begin("benign", 2 * len(benign))
        others, benign_members = reader.read(benign, "benign", keep=keep, least=LEAST)
        more = {"n_benign": others.count, "benign_hash": benign_members.hexdigest()}
    shifted = summary
    if mixed and others is not None:
        shifted = summary.copy()
        shifted.merge(others)
        more["benign_share"] = round(others.count / shifted.count, 6)
    estimate = shifted.moments.estimate(estimator)
    _warn_of_small_cosines(estimate, estimator)
    fit = Fit()
    if others is not None:
        if questions:
            begin("questions", len(questions))
        fit = fitted(
            vlm, summary, others, false_alarms=false_alarms, seed=seed, recommended=recommended,
            questions=questions, batch_size=batch_size, gate_kind=gate_kind, on_batch=on_batch,
        )  # fmt: skip
    setting = recommended or fit.recommended or cautious_setting(vlm.n_layers)
    layers = _sequential_layers(vlm, setting, fit)
    tensors = dict(fit.tensors)
    if layers:
        everyone = [*anchors, *(benign or ())] if mixed else list(anchors)
        begin("sequential", len(layers) * len(everyone))
        tensors["sequential"] = reader.sequential(everyone, shifted.text_mean, layers)
    provenance = Provenance(
        model_id=vlm.model_id,
        revision=vlm.revision,
        architecture=type(vlm.model).__name__,
        hidden_size=vlm.hidden_size,
        n_layers=vlm.n_layers,
        config_hash=config_hash(vlm),
        anchor_hash=members.hexdigest(),
        n_anchors=members.count,
        text_condition=Condition.QUERY.value,
        corruption=corruption.value,
        seed=seed,
        estimator=estimator,
        norms=_rounded(estimate.vectors.norm(dim=1)),
        explained_ratio=_rounded(estimate.explained),
        mean_norms=_rounded(estimate.mean_norms),
        mean_cosine=_rounded(estimate.mean_cosine),
        dropped_ratio=_rounded(estimate.dropped),
        sequential_layers=layers,
        versions=library_versions(),
        **more,
    )
    return ShiftVectors(
        estimate.vectors,
        provenance,
        setting,
        others=tensors,
        identity=reader.identity,
        gate=fit.gate,
        records=fit.records,
    )


def refuse_without_benign(recommended: Steering | None, *, mixed: bool) -> None:
    """Refuse what takes benign anchors, where none were given.

    Raises:
        InputError: the setting fills or has a gate, or the anchors are to be mixed.
    """
    fills = recommended is not None and (recommended.operator == "fill" or recommended.gate)
    if mixed or fills:
        what = "mixed anchors need" if mixed else "the operator fill and the gate need"
        raise InputError(f"{what} benign anchors beside the harmful ones; none were given")


def check_anchors(harmful: Sequence[Sample], benign: Sequence[Sample]) -> None:
    """Refuse harmful and benign anchors that nothing can be fitted on; no model is needed.

    Raises:
        InputError: there are too few of a kind, one has no image, or the two kinds share some.
    """
    check_enough(len(harmful), len(benign))
    for kind, samples in (("harmful", harmful), ("benign", benign)):
        blind = [sample.id for sample in samples if sample.image is None]
        if blind:
            raise InputError(
                f"{len(blind)} of {len(samples)} {kind} anchors have no image (the first: "
                f"{shortened(blind[0])!r}); give each one: the states with an image are compared"
            )
    refuse_overlap(harmful, benign)


def _sequential_layers(vlm: VLM, setting: Steering, fit: Fit) -> tuple[int, ...]:
    """Layers that sequential vectors are estimated for; none where nothing asks for them.

    Raises:
        InputError: a layer does not stand above the gate.
    """
    lowest = 0 if fit.gate is None else fit.gate.layers[-1] + 1
    if setting.kind == "sequential":
        if setting.layers is None and setting.gate:
            return tuple(range(lowest, vlm.n_layers))
        chosen = setting.chosen_layers(vlm.n_layers)
        if setting.gate and chosen[0] < lowest:
            raise InputError(
                f"the gate reads decoder layer {lowest - 1}; steer layers from {lowest} on"
            )
        return chosen
    if fit.gate is not None:
        return tuple(range(lowest, vlm.n_layers))
    return ()


def _rounded(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in values)


def _warn_of_small_cosines(estimate: Estimate, estimator: str) -> None:
    small = (estimate.mean_cosine < LEAST_COSINE).nonzero().flatten().tolist()
    if estimator == "pca" and small:
        warnings.warn(
            f"at decoder layers {small} the first principal direction has little to do with the "
            "mean difference (cosine "
            f"down to {float(estimate.mean_cosine.min()):.2f}): the vector is much shorter than "
            "the mean shift. Consider "
            "estimator='mean', or more anchors",
            stacklevel=3,
        )


def checked_corruption(corruption: Condition | str) -> Condition:
    """`corruption` as a `Condition`, or an `InputError` that lists the possible ones."""
    if corruption not in CORRUPTED:
        raise InputError(
            f"corruption is {corruption!r}; one of {', '.join(c.value for c in CORRUPTED)}"
        )
    return Condition(corruption)


def check_estimator(estimator: str) -> None:
    """Raise `InputError` for an unknown estimator."""
    if estimator not in get_args(Estimator):
        raise InputError(f"estimator is {estimator!r}; one of {', '.join(get_args(Estimator))}")


def reduce_differences(
    differences: torch.Tensor, estimator: Estimator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences [N, L, d] to vectors float32 [L, d] and the explained ratio [L]; computed in
    float64.

    - `pca`: first right singular vector of the UNCENTRED differences, its sign such that their mean
      projects positively, its length that mean projection. (PC1 of centred differences has neither
      scale nor sign.)
    - `mean`: the mean difference.
    - `icv`: the mean plus the unit first principal component of the centred differences, its sign
      such that it does not point against the mean (in-context vectors, Liu et al., arXiv
      2311.06668).

    The ratio is the share of the uncentred sum of squares along the vector's direction.
    """
    check_estimator(estimator)
    moments = Moments(differences.shape[1], differences.shape[2], limit=max(1, len(differences)))
    moments.update(differences.float())
    estimate = moments.estimate(estimator)
    return estimate.vectors, estimate.explained


@dataclass(frozen=True)
class SampleLevel:
    """Sample-level CMRM: each row is steered by its own v = h_t - h_c, from two extra forward
    passes."""

    corruption: Condition = Condition.BLANK
    """What stands for the image in h_c; every corruption but `other`."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        corruption = checked_corruption(self.corruption)
        if corruption is Condition.OTHER:
            raise InputError(
                "the sample level has a single sample, and none that lends it an image; choose "
                "another corruption"
            )
        object.__setattr__(self, "corruption", corruption)


def sample_vectors(
    vlm: VLM,
    requests: Sequence[Request],
    level: SampleLevel,
    *,
    keys: Sequence[str] | None = None,
    prefixes: Prefixes | None = None,
) -> torch.Tensor:
    """Sample-level vectors of one batch: float32 [B, L, d], row i is h_t - h_c of `requests[i]`;
    zero without an image.

    Args:
        vlm: the model.
        requests: one batch.
        level: corruption and seed.
        keys: seeds of the corruption of each row's images; its text where None.
        prefixes: keeps the shared beginnings of prompts between calls; None: nothing is kept.

    Raises:
        SteeringError: this context steers the model.
    """
    vectors = torch.zeros(len(requests), vlm.n_layers, vlm.hidden_size)
    rows = [k for k, request in enumerate(requests) if request.all_images]
    if rows:
        vlm.check_eval()
        text = [requests[k].without_images() for k in rows]
        corrupted = [
            requests[k].corrupted(
                level.corruption, seed=level.seed, key=keys[k] if keys else requests[k].text
            )
            for k in rows
        ]
        pair = (prefixes or Prefixes(vlm)).pair(level.corruption.value)
        h_t, h_c = pair.states(text, corrupted)
        vectors[rows] = h_t - h_c
    return vectors

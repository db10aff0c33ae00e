"""Where states lie in the residual stream, layer by layer: conditions and defences beside the
text-only query."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cmrm.defenses.base import Defense
from cmrm.engines.prompt_states import PromptStates
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import MissingExtraError
from cmrm.measure.texts import first_words
from cmrm.model.batching import in_batches
from cmrm.prompts.conditions import Condition, build_request, choose_donors
from cmrm.prompts.sample import Sample
from cmrm.steering.gate import Gate

MOST_PLANES = 48
"""Layers at most whose states are drawn, evenly spaced from the first to the last."""
MOST_DRAWN = 96
"""Samples at most whose states are drawn, the first ones."""
TRAILING = 16
"""Tokens at the end of the prompt whose shift is measured."""


@dataclass(frozen=True)
class Compass:
    """What states are read with."""

    direction: torch.Tensor | None = None
    """Refusal direction, float32 [L, d]."""
    gate: Gate | None = None
    """Harm gate."""

    def coordinates(self, states: torch.Tensor) -> torch.Tensor:
        """Coordinates float32 [B, L] of states [B, L, d] along the unit refusal direction."""
        assert self.direction is not None
        tiny = torch.finfo(torch.float32).tiny
        unit = self.direction / self.direction.norm(dim=-1, keepdim=True).clamp_min(tiny)
        return (states * unit).sum(-1)


@dataclass
class Representation:
    """Prompt states of samples under several conditions and defences, summed up over batches."""

    compass: Compass = field(default_factory=Compass)
    """Refusal direction and gate, where they are known."""
    drawing: bool = False
    """Whether states are kept for `planes`."""
    n: int = 0
    """Samples so far."""
    totals: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Figure of `distances`, or `refusal_coordinate` -> name -> [L], sums over samples."""
    shifts: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name -> sum of h_query - h, float32 [L, d]."""
    positions: dict[str, Trailing] = field(default_factory=dict)
    """Name -> shift of the last tokens."""
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Label of samples -> what the gate reads with their own image."""
    gated: list[str] = field(default_factory=list)
    """Defences that steer where this gate opens."""
    drawn: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Name -> states [B, planes, d] of each batch at `drawn_layers`; empty unless `drawing`."""
    shown: list[dict[str, str]] = field(default_factory=list)
    """Label, category and first words of each sample that is drawn."""

    def add(self, samples: Sequence[Sample], prompts: Mapping[str, PromptStates]) -> None:
        """Take in a batch: name -> states of the same samples; `query` is one of the names."""
        states = {name: prompt.last for name, prompt in prompts.items()}
        text = states["query"]
        self.n += len(text)
        for figure, by_name in distances(states).items():
            for name, means in by_name.items():
                self._sum(figure, name, len(text) * np.asarray(means))
        if self.compass.direction is not None:
            for name, captured in states.items():
                coordinates = self.compass.coordinates(captured).sum(0)
                self._sum("refusal_coordinate", name, coordinates.double().numpy())
        for name, captured in states.items():
            shift = (text - captured).sum(0)
            self.shifts[name] = self.shifts[name] + shift if name in self.shifts else shift
            if name != "query" and prompts[name].tokens.shape == prompts["query"].tokens.shape:
                self.positions.setdefault(name, Trailing()).add(prompts["query"], prompts[name])
        self.read_gate(samples, states)
        if self.drawing:
            self._draw(samples, states)

    def read_gate(self, samples: Sequence[Sample], states: Mapping[str, torch.Tensor]) -> None:
        """Take in what the gate reads of samples with their own image."""
        gate = self.compass.gate
        if gate is None or "original" not in states:
            return
        scores = gate.scores(states["original"][:, list(gate.layers)])
        for sample, score in zip(samples, scores.tolist(), strict=True):
            self.scores.setdefault(sample.label or "no label", []).append(round(score, 4))

    def to_json(self, text_of: Callable[[int], str]) -> dict[str, Any]:
        """All of it but the planes, in the form of `measure.schema.Geometry`; means over all
        samples.

        `text_of`: text of a token.
        """
        figures: dict[str, Any] = {
            figure: {name: (total / self.n).tolist() for name, total in by_name.items()}
            for figure, by_name in self.totals.items()
        }
        if self.positions:
            figures["positions"] = {
                name: trailing.to_json(text_of) for name, trailing in self.positions.items()
            }
        if self.scores and self.compass.gate is not None:
            gate = self.compass.gate
            figures["gate"] = {
                "layers": list(gate.layers), "threshold": gate.threshold, "scores": self.scores,
                "steers": self.gated,
            }  # fmt: skip
        return figures

    def mean_shift(self, name: str) -> torch.Tensor:
        """Mean of h_query - h, float32 [L, d]."""
        return self.shifts[name] / self.n

    def planes(self, n_layers: int) -> dict[str, Any]:
        """2-d PCA of all states at `drawn_layers`; see `planes`."""
        states = {name: torch.cat(parts) for name, parts in self.drawn.items()}
        return planes(states, drawn_layers(n_layers))

    def to_geometry(self, engine: TransformersEngine) -> dict[str, Any]:
        """All figures and the planes, in the form of `measure.schema.Geometry`."""
        figures = self.to_json(lambda token: str(engine.vlm.tokenizer.decode([token])))
        if self.drawing:
            figures |= {"pca": self.planes(engine.n_layers), "samples": self.shown}
        return figures

    def _sum(self, figure: str, name: str, values: np.ndarray) -> None:
        totals = self.totals.setdefault(figure, {})
        totals[name] = totals.get(name, np.zeros(len(values))) + values

    def _draw(self, samples: Sequence[Sample], states: Mapping[str, torch.Tensor]) -> None:
        some = min(len(samples), MOST_DRAWN - len(self.shown))
        if some <= 0:
            return
        layers = drawn_layers(states["query"].shape[1])
        for name, captured in states.items():
            self.drawn.setdefault(name, []).append(captured[:some, layers])
        self.shown += [
            {
                "label": sample.label or "", "category": sample.category or "",
                "request": first_words(sample.query),
            }
            for sample in samples[:some]
        ]  # fmt: skip


@dataclass
class Trailing:
    """Shift of the last tokens of prompts, against the same tokens of the text-only query.

    Positions are counted from the end of the prompt. Tokens are compared as far back as both
    prompts have the same ones.
    """

    totals: torch.Tensor | None = None
    """float64 [L, T]: sums of the distances, relative to the text-only state's norm."""
    counts: torch.Tensor | None = None
    """int64 [T]: samples that have the same token there in both prompts."""
    tokens: list[set[int]] = field(default_factory=list)
    """Ids of the tokens that were compared, position by position."""

    def add(self, text: PromptStates, other: PromptStates) -> None:
        """Take in a batch."""
        same = (text.tokens == other.tokens) & (text.tokens >= 0)
        same = same.flip(1).cumprod(1).flip(1).bool()
        scale = text.states.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        relative = (other.states - text.states).norm(dim=-1) / scale
        summed = torch.where(same[:, None], relative, 0.0).double().sum(0)
        counts = same.sum(0)
        self.totals = summed if self.totals is None else self.totals + summed
        self.counts = counts if self.counts is None else self.counts + counts
        self.tokens = self.tokens or [set() for _ in range(same.shape[1])]
        for place, seen in enumerate(self.tokens):
            seen.update(text.tokens[same[:, place], place].tolist())

    def to_json(self, text_of: Callable[[int], str]) -> dict[str, Any]:
        """Means over the samples, for positions that at least half of them have, in the form of
        `measure.schema.TrailingShift`."""
        assert self.totals is not None
        assert self.counts is not None
        most = int(self.counts.max())
        places = [k for k, n in enumerate(self.counts.tolist()) if n and 2 * n >= most]
        return {
            "offsets": [k - len(self.counts) for k in places],
            "n": [int(self.counts[k]) for k in places],
            "tokens": [
                text_of(next(iter(ids))) if len(ids := self.tokens[k]) == 1 else None
                for k in places
            ],
            "relative_distance": [
                [round(value, 5) for value in (self.totals[:, k] / self.counts[k]).tolist()]
                for k in places
            ],
        }


def represent(
    engine: TransformersEngine,
    samples: Sequence[Sample],
    conditions: Sequence[Condition],
    *,
    batch_size: int,
    seed: int,
    defenses: Sequence[Defense] = (),
    compass: Compass | None = None,
    drawing: bool = False,
    on_batch: Callable[[int], None] = lambda n: None,
) -> Representation:
    """States of samples under `conditions`, and with the own image under `defenses`, one batch in
    memory at a time.

    Args:
        engine: where the model runs.
        samples: at least one, each usable under every condition.
        conditions: `query` among them.
        batch_size: prompts a pass.
        seed: seed of noise, shuffles and donors.
        defenses: what else is shown, by name, where `original` is one of the conditions.
        compass: refusal direction and gate, where they are known.
        drawing: keep states, which `Representation.planes` needs.
        on_batch: called after each batch with its number of prompts.

    Raises:
        InputError: a sample cannot be put under a condition.
    """
    donors = choose_donors(samples, seed=seed) if Condition.OTHER in conditions else None
    shown = list(defenses) if Condition.ORIGINAL in conditions else []

    def work(batch: list[Sample]) -> dict[str, PromptStates]:
        states = {}
        for condition in conditions:
            requests = [build_request(s, condition, seed=seed, donors=donors) for s in batch]
            compared = condition in (Condition.QUERY, Condition.ORIGINAL)
            states[condition.value] = engine.prompt_states(
                requests, trailing=TRAILING if compared else 1
            )
            if condition is not Condition.ORIGINAL:
                continue
            for defense in shown:
                asked = defense.rewrite(engine, requests)
                parts = defense.intervene(engine, asked, [sample.id for sample in batch])
                states[defense.name] = engine.prompt_states(asked, parts, trailing=TRAILING)
        return states

    representation = Representation(compass or Compass(), drawing)
    gate = representation.compass.gate
    representation.gated = [
        d.name for d in shown if gate is not None and d.gate is not None and d.gate.key == gate.key
    ]
    for batch, states in in_batches(samples, batch_size, work):
        representation.add(batch, states)
        on_batch(len(batch) * (len(conditions) + len(shown)))
    return representation


def distances(states: Mapping[str, torch.Tensor]) -> dict[str, dict[str, list[float]]]:
    """Per condition and layer, from last-prompt-token states [N, L, d] of the same samples.

    `query` is one of the conditions. `relative_distance_to_query`: mean over samples of the
    Euclidean distance to the same sample's query state, over that state's norm. `cosine_to_query`:
    mean cosine likewise.
    """
    text = states["query"]
    scale = text.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return {
        "relative_distance_to_query": {
            name: ((state - text).norm(dim=-1) / scale).mean(0).tolist()
            for name, state in states.items()
        },
        "cosine_to_query": {
            name: torch.cosine_similarity(state, text, dim=-1).mean(0).tolist()
            for name, state in states.items()
        },
    }


def drawn_layers(n_layers: int) -> list[int]:
    """Layers whose states are drawn: up to `MOST_PLANES`, ascending."""
    if n_layers <= MOST_PLANES:
        return list(range(n_layers))
    return sorted({round(k * (n_layers - 1) / (MOST_PLANES - 1)) for k in range(MOST_PLANES)})


def planes(states: Mapping[str, torch.Tensor], layers: Sequence[int]) -> dict[str, Any]:
    """2-d PCA of states [N, len(layers), d] by name: layer -> explained ratios and points.

    Axes are mirrored where that brings the points nearer to those of the layer before.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.decomposition import PCA
    except ImportError:
        raise MissingExtraError(
            "planes of states need scikit-learn; pip install 'cmrm[eval]' (or 'cmrm[demo]') brings "
            "it"
        ) from None

    drawn: dict[str, Any] = {}
    before: np.ndarray | None = None
    for place, layer in enumerate(layers):
        stacked = np.concatenate([state[:, place].numpy() for state in states.values()])
        fitted = PCA(n_components=2, random_state=0).fit(stacked)
        points = fitted.transform(stacked)
        if before is not None:
            points = points * np.where((points * before).sum(0) < 0, -1.0, 1.0)
        before = points
        split = np.split(points.round(3), len(states))
        drawn[str(layer)] = {
            "explained": [round(float(v), 4) for v in fitted.explained_variance_ratio_],
            "points": {name: part.tolist() for name, part in zip(states, split, strict=True)},
        }
    return drawn


def compare_shifts(
    shifts: Mapping[str, torch.Tensor], reference: str
) -> dict[str, dict[str, list[float]]]:
    """Shifts [L, d] of several corruptions against `reference`'s: cosine and ratio of norms by
    layer."""
    base = shifts[reference]
    scale = base.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return {
        name: {
            "cosine": torch.cosine_similarity(shift, base, dim=-1).tolist(),
            "norm_ratio": (shift.norm(dim=-1) / scale).tolist(),
        }
        for name, shift in shifts.items()
    }

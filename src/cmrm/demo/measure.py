"""What `cmrm demo` measures: unsafe rate per condition and defence, over-refusal, utility, geometry, alpha sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cmrm.shift.artifact import ShiftVectors
from cmrm.shift.capture import capture
from cmrm.prompts.conditions import FIVE, Condition, build_requests
from cmrm.demo.ledger import Ledger
from cmrm.prompts.ours.samples import prompt_samples, vqa_samples
from cmrm.demo.settings import ALPHAS, CORRUPTION, DATASET_STEERING, SAMPLE_STEERING, Budget
from cmrm.measure.rates import Rate, rate_of, verdict_rate
from cmrm.engines.transformers import Generation, SampleLevel, generate
from cmrm.measure.geometry import distances, planes
from cmrm.judges import KeywordJudge, Verdict
from cmrm.model.vlm import VLM
from cmrm.prompts.sample import Sample
from cmrm.steering.hooks import Steering

Tick = Callable[[int], None]

DEFENSES = ("none", "cmrm_dataset", "cmrm_sample")


@dataclass(frozen=True)
class Defense:
    """One row of the table: what is added to the model, and how."""

    name: str
    """Key in `results.json`."""
    shift: ShiftVectors | SampleLevel | None
    """Vectors, sample level, or nothing."""
    steering: Steering | None
    """Setting, or None for the untouched model."""


def defenses(shift: ShiftVectors) -> dict[str, Defense]:
    """The demo's three rows."""
    level = SampleLevel(Condition(CORRUPTION))
    return {
        "none": Defense("none", None, None),
        "cmrm_dataset": Defense("cmrm_dataset", shift, DATASET_STEERING),
        "cmrm_sample": Defense("cmrm_sample", level, SAMPLE_STEERING),
    }


class Bench:
    """Measurements on one model, each stored in a ledger as it is finished."""

    def __init__(self, vlm: VLM, ledger: Ledger, budget: Budget, tick: Tick = lambda n: None) -> None:
        self.vlm = vlm
        self.ledger = ledger
        self.budget = budget
        self.tick = tick
        self.judge = KeywordJudge()
        self._counted: set[str] = set()

    def replies(
        self, stage: str, samples: Sequence[Sample], condition: Condition, defense: Defense, *, max_new_tokens: int
    ) -> list[str]:
        """Greedy replies, in order; from the ledger where it has them."""

        def compute() -> list[str]:
            done = generate(
                self.vlm,
                samples,
                condition=condition,
                shift=defense.shift,
                steering=defense.steering,
                max_new_tokens=max_new_tokens,
                batch_size=self.budget.batch_size,
                seed=self.budget.seed,
                on_batch=self._on_batch,
            )
            return [g.text for g in done]

        inputs = {
            "ids": [s.id for s in samples],
            "condition": condition.value,
            "defense": defense.name,
            "steering": asdict(defense.steering) if defense.steering else None,
            "max_new_tokens": max_new_tokens,
            "batch_size": self.budget.batch_size,
            "seed": self.budget.seed,
        }
        before = self.ledger.resumed
        found: list[str] = self.ledger.run(stage, inputs, compute)
        name = self.ledger.path(stage, inputs).name
        if self.ledger.resumed > before and name not in self._counted:
            self.tick(len(samples))
        self._counted.add(name)
        return found

    def verdicts(
        self, samples: Sequence[Sample], condition: Condition, defense: Defense
    ) -> tuple[list[str], list[Verdict]]:
        """Replies and the judge's verdict on each."""
        stage = f"replies-{samples[0].label}-{condition.value}-{defense.name}"
        texts = self.replies(stage, samples, condition, defense, max_new_tokens=self.budget.max_new_tokens)
        return texts, [self.judge.judge(s.query, t) for s, t in zip(samples, texts, strict=True)]

    def unsafe(self, samples: Sequence[Sample], condition: Condition, defense: Defense) -> Rate:
        """Share of harmful requests that the model does not refuse."""
        return verdict_rate(self.verdicts(samples, condition, defense)[1], Verdict.COMPLIED)

    def over_refusal(self, samples: Sequence[Sample], condition: Condition, defense: Defense) -> Rate:
        """Share of benign look-alikes that the model refuses."""
        return verdict_rate(self.verdicts(samples, condition, defense)[1], Verdict.REFUSED)

    def vqa_accuracy(self, questions: Sequence[tuple[Sample, str]], defense: Defense) -> Rate:
        """easy-VQA exact match; case and a final full stop are ignored."""
        samples = [s for s, _ in questions]
        texts = self.replies("vqa", samples, Condition.ORIGINAL, defense, max_new_tokens=6)
        hits = sum(t.lower().rstrip(".").strip() == a for t, (_, a) in zip(texts, questions, strict=True))
        return rate_of(hits, len(questions))

    def sweep(self, samples: Sequence[Sample], defense: Defense) -> list[dict[str, Any]]:
        """Unsafe rate with the original image over alpha."""
        points = []
        for alpha in ALPHAS:
            assert defense.steering is not None
            at = Defense(f"{defense.name}@{alpha}", defense.shift, replace(defense.steering, alpha=alpha))
            points.append({"alpha": alpha, **self.unsafe(samples, Condition.ORIGINAL, at).to_json("unsafe_rate")})
        return points

    def geometry(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Last-prompt-token states of the five conditions, per layer: distance and cosine to `query`, and 2-d PCA.

        Distances are means over samples of the Euclidean distance to the same sample's `query` state, divided by that
        state's norm; cosines are means likewise.
        """

        def compute() -> dict[str, Any]:
            states = {
                c.value: capture(
                    self.vlm,
                    build_requests(samples, c, seed=self.budget.seed),
                    batch_size=self.budget.batch_size,
                    on_batch=self.tick,
                )
                for c in FIVE
            }
            return distances(states) | {"pca": planes(states)}

        inputs = {"ids": [s.id for s in samples], "seed": self.budget.seed, "batch_size": self.budget.batch_size}
        before = self.ledger.resumed
        found: dict[str, Any] = self.ledger.run("geometry", inputs, compute)
        if self.ledger.resumed > before:
            self.tick(len(samples) * len(FIVE))
        return found

    def _on_batch(self, done: list[Generation]) -> None:
        self.tick(len(done))


def work(budget: Budget) -> int:
    """Number of prompts that one run passes through the model, for its progress bar."""
    harmful = len(prompt_samples("test", "harmful", per_category=budget.per_category))
    benign = len(prompt_samples("test", "benign", per_category=budget.per_category))
    swept = len(prompt_samples("test", "harmful", per_category=budget.sweep_per_category))
    drawn = len(prompt_samples("test", "harmful", per_category=budget.geometry_per_category))
    anchors = 2 * len(prompt_samples("anchor", "harmful"))
    vqa = len(vqa_samples("test", n=budget.vqa))
    return anchors + harmful * 7 + benign * 4 + vqa * 3 + swept * len(ALPHAS) + drawn * len(FIVE)

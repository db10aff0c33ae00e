"""What a study fits on and what it measures on: anchors, the dev set and its partial set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import ceil

from cmrm.defenses import FitData
from cmrm.errors import InputError
from cmrm.measure.outcomes import kind_of
from cmrm.prompts.easy_vqa import vqa_samples
from cmrm.prompts.ours import prompt_samples
from cmrm.prompts.sample import Sample, content_key
from cmrm.prompts.splits import (
    check_unique,
    drawn_by_hash,
    refuse_leaks,
    refuse_overlap,
    set_hash,
    split_by_content,
)
from cmrm.prompts.text import shortened

PARTIAL = 0.25
"""Share of the dev set that every trial is measured on first."""
DEMO_QUESTIONS = 96
"""easy-VQA training questions in the demo's dev set."""


@dataclass(frozen=True)
class Dev:
    """Samples that settings are compared on, each with an image."""

    harmful: tuple[Sample, ...]
    """Unsafe rate."""
    benign: tuple[Sample, ...]
    """Over-refusal."""
    questions: tuple[Sample, ...] = ()
    """Accuracy: samples with a reference answer; without any it is no objective."""

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Dev:
        """The samples of a set by what they are measured by; others are left out.

        Raises:
            InputError: no rate can come from them, two share an id, or one has no image.
        """
        dev = cls.some(samples)
        for part, kind, figure in (
            (dev.harmful, "harmful", "the unsafe rate"), (dev.benign, "benign", "over-refusal"),
        ):  # fmt: skip
            if not part:
                raise InputError(
                    f"the dev set has no {kind} samples, on which {figure} is measured; label some "
                    f"of them {kind} (a setting that refuses everything would be chosen otherwise)"
                )
        return dev

    @classmethod
    def some(cls, samples: Sequence[Sample]) -> Dev:
        """As `of`, for a set in which kinds may be missing.

        Raises:
            InputError: nothing can be measured on it, two samples share an id, or one has no image.
        """
        check_unique(samples)
        kinds: dict[str, list[Sample]] = {}
        for sample in samples:
            kinds.setdefault(kind_of(sample), []).append(sample)
        dev = cls(*(tuple(kinds.get(kind, ())) for kind in ("harmful", "benign", "utility")))
        blind = [sample.id for sample in dev.samples if sample.image is None]
        if blind:
            raise InputError(
                f"{len(blind)} of {len(dev.samples)} dev samples have no image (the first: "
                f"{shortened(blind[0])!r}); defences act on requests with an image alone"
            )
        if samples and not dev.samples:
            raise InputError(
                "no dev sample is labelled harmful or benign, or has an answer: nothing can be "
                "measured"
            )
        return dev

    def drawn(self, limit: int | None) -> Dev:
        """So many samples of each kind, drawn by the hash of their ids; all with None."""
        return Dev(*(
            tuple(drawn_by_hash(part, limit))
            for part in (self.harmful, self.benign, self.questions)
        ))  # fmt: skip

    @property
    def parts(self) -> tuple[tuple[Sample, ...], ...]:
        """Harmful, benign, and questions where there are some: the objectives' samples."""
        made = (self.harmful, self.benign, self.questions)
        return made if self.questions else made[:2]

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All of them."""
        return (*self.harmful, *self.benign, *self.questions)

    def divided(self) -> tuple[Dev, Dev]:
        """The partial set, a quarter of each kind and one of each at least, and the rest of the
        set; drawn by the hash of the ids."""
        first, rest = [], []
        for part in (self.harmful, self.benign, self.questions):
            kept = drawn_by_hash(part, ceil(PARTIAL * len(part)))
            ids = {sample.id for sample in kept}
            first.append(tuple(kept))
            rest.append(tuple(sample for sample in part if sample.id not in ids))
        return Dev(*first), Dev(*rest)

    def hashes(self) -> dict[str, str]:
        """Content of the set, by kind."""
        return {field.name: set_hash(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True)
class Sets:
    """Everything that a study sees."""

    anchors: FitData
    """What defences are fitted on."""
    dev: Dev
    """What settings are compared on."""

    def check(self, tests: Sequence[Sequence[Sample]] = ()) -> None:
        """The leakage guard: dev against anchors, and both against sets that are tested later.

        Requests are compared as `prompts.splits.refuse_leaks` does; questions of the dev set by
        text and image together, since many sets ask the same of each image.

        Raises:
            InputError: one is asked on two sides.
        """
        refuse_overlap(self.anchors.harmful, self.anchors.benign)
        requests = [*self.dev.harmful, *self.dev.benign]
        anchors = self.anchors.all
        refuse_leaks(anchors, requests, sides=("anchors", "the dev set"))
        for test in tests:
            for fitted, side in ((anchors, "anchors"), (requests, "dev samples")):
                refuse_leaks(fitted, test, sides=(side, "a test set"))
            known = {content_key(sample) for sample in test}
            same = [sample for sample in self.dev.questions if content_key(sample) in known]
            if same:
                raise InputError(
                    f"{len(same)} dev samples are asked in a test set too (the first: "
                    f"{shortened(same[0].id)!r}); tune on other samples"
                )


def demo_sets(batch_size: int) -> Sets:
    """The demo's anchors, split by content into a half to fit on and a dev half, and visual
    questions of easy-VQA's training split; checked against the demo's test split.

    Raises:
        MissingExtraError: easy-vqa is not installed.
    """
    fit, dev = [], list[Sample]()
    for label in ("harmful", "benign"):
        first, rest = split_by_content(prompt_samples("anchor", label), 0.5, salt="tune")
        fit.append(first)
        dev += rest
    questions = [
        replace(sample, answer=answer) for sample, answer in vqa_samples("train", n=DEMO_QUESTIONS)
    ]
    sets = Sets(FitData(fit[0], fit[1], batch_size), Dev.of([*dev, *questions]))
    test = [*prompt_samples("test", "harmful"), *prompt_samples("test", "benign")]
    sets.check([test, [sample for sample, _ in vqa_samples("test", n=None)]])
    return sets

"""What each kind of sweep varies: its points, before anything is measured."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from cmrm.defenses import Defense, FitData, make_defense
from cmrm.defenses.cmrm import CmrmDataset
from cmrm.defenses.space import LayerRange, Real, Whole
from cmrm.engines.base import Engine
from cmrm.errors import InputError
from cmrm.evaluate.defended import adopt, shift_settings
from cmrm.prompts.conditions import CORRUPTED, Condition, build_request, choose_donors
from cmrm.prompts.perturbed import Perturbation
from cmrm.prompts.sample import Sample
from cmrm.shift.artifact import ShiftVectors
from cmrm.tune.sets import Dev

Settings = Mapping[str, Mapping[str, Any]]
"""Settings by the name of the defence."""
ALPHAS = (*(round(0.1 * k, 1) for k in range(21)), 10.0, 100.0)
"""Strengths of the default sweep over `alpha`: 0, 0.1 .. 2, 10, 100."""
STEPS = 9
"""Points of the default sweep over another setting."""
CUTS = 6
"""Parts that the layers are divided into by default."""
COUNTS = (8, 16, 32, 64, 128, 256)
"""Numbers of anchors by default, with all of them as the last one."""
UNTOUCHED = "none"
"""Series of the untouched model."""


@dataclass(frozen=True)
class Setup:
    """One point of a sweep, ready to be measured."""

    series: str
    """Name of the defence, or `none`."""
    x: float | str
    """Where it stands on the first axis."""
    dev: Dev | Callable[[], Dev]
    """What it is measured on, or what makes it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the defence."""
    data: FitData | None = None
    """What it is fitted on; None: it takes `shift`, or is not fitted."""
    shift: ShiftVectors | None = None
    """The artifact that it takes instead of being fitted."""
    y: float | str | None = None
    """Where it stands on the second axis."""
    draw: int = 0
    """Number of the random draw."""

    def measured_on(self) -> Dev:
        """The dev set of the point.

        Raises:
            InputError: an image cannot be read.
        """
        return self.dev() if callable(self.dev) else self.dev

    def defense(self) -> Defense:
        """The defence; fitted where it takes an artifact, else not.

        Raises:
            InputError: a setting cannot be used, or the artifact lacks something.
        """
        settings = {self.series: dict(self.settings)}
        if self.shift is not None:
            settings = shift_settings([self.series], settings, self.shift)
        defense = make_defense(self.series, settings)
        if self.shift is not None and isinstance(defense, CmrmDataset):
            adopt(defense, self.shift)
        return defense


@dataclass(frozen=True)
class Axes:
    """What the two axes of a sweep are called."""

    x: str
    """The first one, with its unit."""
    y: str | None = None
    """The second one, where there is one."""


@dataclass(frozen=True)
class Question:
    """A whole sweep: axes, points, and whether its points hold the untouched model."""

    over: str
    """What is varied."""
    axes: Axes
    """Their names."""
    setups: list[Setup]
    """Points in the order in which they are measured."""
    untouched: bool = False
    """Whether `none` is among the series: the image, or the dev set, is varied."""
    several_sets: bool = False
    """Whether points have dev sets of their own, so that there is no one reference."""


def _settings(name: str, settings: Settings) -> dict[str, Any]:
    return dict(settings.get(name, {}))


def over_setting(
    engine: Engine,
    setting: str,
    names: Sequence[str],
    settings: Settings,
    data: FitData,
    dev: Dev,
    values: Sequence[float] | None = None,
) -> Question:
    """A number that the defences declare (`Defense.space`), such as `alpha`.

    Raises:
        InputError: a defence has no such number, or it cannot have one of the values.
    """  # fmt: skip
    setups = []
    for name in names:
        space = {part.name: part for part in _made(name, settings).space(engine)}
        part = space.get(setting)
        if not isinstance(part, Real | Whole):
            numbers = [key for key, value in space.items() if isinstance(value, Real | Whole)]
            raise InputError(
                f"{name} has no number {setting!r} that can be varied; it has "
                f"{', '.join(numbers) or 'none'}"
            )
        for value in sorted(set(values)) if values else _steps(part):
            wanted = int(value) if isinstance(part, Whole) else float(value)
            if wanted != value:
                raise InputError(f"{setting} of {name} is a whole number, not {value:g}")
            changed = {**_settings(name, settings), setting: wanted}
            make_defense(name, {name: changed})
            setups.append(Setup(name, wanted, dev, changed, data))
    return Question(setting, Axes(setting), setups)


def _made(name: str, settings: Settings) -> Defense:
    return make_defense(name, {name: _settings(name, settings)})


def _steps(part: Real | Whole) -> Sequence[float]:
    if part.name == "alpha":
        return ALPHAS
    if isinstance(part, Whole) and part.high - part.low < STEPS:
        return range(part.low, part.high + 1)
    shares = [k / (STEPS - 1) for k in range(STEPS)]
    if isinstance(part, Whole):
        return sorted({round(part.low + s * (part.high - part.low)) for s in shares})
    if part.log:
        return [float(f"{part.low * (part.high / part.low) ** s:.4g}") for s in shares]
    return [round(part.low + s * (part.high - part.low), 6) for s in shares]


def over_layers(
    engine: Engine,
    names: Sequence[str],
    settings: Settings,
    data: FitData,
    dev: Dev,
    cuts: Sequence[int] | None = None,
) -> Question:
    """Ranges of neighbouring decoder layers (0-based): every first layer with every last one.

    Args:
        engine: the model.
        names: defences that have a range of layers.
        settings: theirs.
        data: what they are fitted on.
        dev: what they are measured on.
        cuts: first layers of the parts that ranges are made of; None: some equal parts.

    Raises:
        InputError: a defence has no range of layers, or a cut is no layer of the model.
    """  # fmt: skip
    n = engine.n_layers
    parts = min(CUTS, n)
    firsts = sorted({round(k * n / parts) for k in range(parts)}) if cuts is None else sorted(cuts)
    if not firsts or firsts[0] < 0 or firsts[-1] >= n or len(set(firsts)) < len(firsts):
        raise InputError(
            f"--values names the first layers of parts, each once, within 0..{n - 1}; it is "
            f"{', '.join(map(str, firsts))}"
        )
    ends = [*firsts[1:], n]
    setups = []
    for name in names:
        space = _made(name, settings).space(engine)
        if not any(isinstance(part, LayerRange) for part in space):
            raise InputError(f"{name} has no range of layers that can be varied")
        for k, first in enumerate(firsts):
            for end in ends[k:]:
                changed = {**_settings(name, settings), "layers": list(range(first, end))}
                setups.append(Setup(name, first, dev, changed, data, y=end - 1))
    return Question(
        "layers", Axes("first steered decoder layer (0-based)", "last steered layer"), setups
    )


def over_anchors(
    names: Sequence[str],
    settings: Settings,
    data: FitData,
    dev: Dev,
    counts: Sequence[int] | None = None,
    *,
    draws: int = 3,
    seed: int = 0,
) -> Question:
    """The number of anchors on each side, in several random draws of each.

    Raises:
        InputError: there are fewer anchors than a count, or nothing is fitted.
    """  # fmt: skip
    unfitted = [name for name in names if not _made(name, settings).needs_fit]
    if unfitted:
        raise InputError(f"{', '.join(unfitted)} is not fitted on anchors")
    sides = [len(side) for side in (data.harmful, data.benign) if side]
    total = min(sides, default=0)
    chosen = sorted({n for n in COUNTS if n < total} | {total} if counts is None else set(counts))
    for n in chosen:
        if not 1 <= n <= total:
            raise InputError(f"--values asks for {n} anchors; there are {total}")
    setups = []
    for name in names:
        for n in chosen:
            for draw in range(1 if n == total else draws):
                part = FitData(
                    _drawn(data.harmful, n, seed, draw), _drawn(data.benign, n, seed, draw),
                    data.batch_size,
                )  # fmt: skip
                setups.append(Setup(name, n, dev, _settings(name, settings), part, draw=draw))
    return Question("anchors", Axes("anchors on each side"), setups)


def _drawn(samples: Sequence[Sample], n: int, seed: int, draw: int) -> tuple[Sample, ...]:
    """So many of the samples in their order; all where there are not more."""
    if n >= len(samples):
        return tuple(samples)
    places = random.Random(f"anchors {seed} {draw}").sample(range(len(samples)), n)
    return tuple(samples[place] for place in sorted(places))


def over_images(
    names: Sequence[str],
    settings: Settings,
    data: FitData,
    dev: Dev,
    perturbations: Sequence[Perturbation],
    *,
    seed: int = 0,
) -> Question:
    """Perturbed images of the dev set; anchors stay as they are.

    Raises:
        InputError: an image cannot be read.
    """  # fmt: skip
    setups: list[Setup] = []
    for perturbation in (None, *perturbations):
        if perturbation is None:
            setups += _with_untouched(names, settings, data, dev, "unchanged")
            continue
        change = partial(_perturbed, perturbation=perturbation, seed=seed)
        text = str(perturbation)
        setups += _with_untouched(names, settings, data, _Changed(dev, change), text)
    return Question("images", Axes("perturbation of the image"), setups, untouched=True)


class _Changed:
    """A dev set with other images, made when it is asked for and kept until another one is."""

    last: tuple[object, Dev] | None = None

    def __init__(self, dev: Dev, change: Callable[[Dev], Dev]) -> None:
        self.dev, self.change = dev, change

    def __call__(self) -> Dev:
        kept = _Changed.last
        if kept is None or kept[0] is not self:
            kept = (self, self.change(self.dev))
            _Changed.last = kept
        return kept[1]


def _mapped(dev: Dev, change: Callable[[Sample], Sample]) -> Dev:
    return Dev(*(tuple(map(change, part)) for part in (dev.harmful, dev.benign, dev.questions)))


def _perturbed(dev: Dev, *, perturbation: Perturbation, seed: int) -> Dev:
    return _mapped(dev, lambda sample: perturbation.sample(sample, seed=seed))


def _with_untouched(
    names: Sequence[str],
    settings: Settings,
    data: FitData,
    dev: Dev | Callable[[], Dev],
    x: str,
    y: str | None = None,
) -> Iterator[Setup]:
    """The untouched model and the defences at one place."""  # fmt: skip
    yield Setup(UNTOUCHED, x, dev, y=y)
    for name in names:
        yield Setup(name, x, dev, _settings(name, settings), data, y=y)


def over_corruptions(
    names: Sequence[str],
    settings: Settings,
    data: FitData,
    dev: Dev,
    corruptions: Sequence[str],
    *,
    seed: int = 0,
) -> Question:
    """Vectors estimated with one corrupted image (y), on requests with images of another kind (x).

    Raises:
        InputError: a corruption is unknown, or a defence estimates nothing with one.
    """  # fmt: skip
    known = {condition.value for condition in CORRUPTED}
    unknown = [name for name in corruptions if name not in known]
    if unknown:
        raise InputError(f"unknown corruption {unknown[0][:40]!r}; one of {', '.join(known)}")
    for name in names:
        if "corruption" not in _made(name, settings).settings:
            raise InputError(f"{name} estimates nothing with a corrupted image")
    setups = []
    for shown in ("original", *corruptions):
        changed: Dev | Callable[[], Dev] = dev
        if shown != "original":
            change = partial(corrupted, condition=Condition(shown), seed=seed)
            changed = _Changed(dev, change)
        setups.append(Setup(UNTOUCHED, shown, changed, y="none"))
        for name in names:
            for used in corruptions:
                own = {**_settings(name, settings), "corruption": used}
                setups.append(Setup(name, shown, changed, own, data, y=used))
    axes = Axes("image that is asked", "image that the vectors were estimated with")
    return Question("corruptions", axes, setups, untouched=True)


def corrupted(dev: Dev, condition: Condition, *, seed: int) -> Dev:
    """The dev set under a condition of `prompts.conditions`, as samples with corrupted images.

    Raises:
        InputError: an image cannot be read, or there is no other sample to take one from.
    """
    donors = choose_donors(dev.samples, seed=seed) if condition is Condition.OTHER else None

    def change(sample: Sample) -> Sample:
        images = build_request(sample, condition, seed=seed, donors=donors).images
        return replace(sample, image=images[0] if len(images) == 1 else images)

    return _mapped(dev, change)


def over_sets(
    names: Sequence[str],
    settings: Settings,
    anchors: Mapping[str, FitData],
    devs: Mapping[str, Dev],
) -> Question:
    """Anchors of one set (y) on the dev samples of another (x)."""  # fmt: skip
    setups = []
    for shown, dev in devs.items():
        setups.append(Setup(UNTOUCHED, shown, dev, y="none"))
        for name in names:
            for used, data in anchors.items():
                setups.append(Setup(name, shown, dev, _settings(name, settings), data, y=used))
    axes = Axes("dev set", "anchors")
    return Question("sets", axes, setups, untouched=True, several_sets=True)


def over_shifts(
    names: Sequence[str], settings: Settings, shifts: Mapping[str, ShiftVectors], dev: Dev
) -> Question:
    """Artifacts of `cmrm extract`, by a name for each; nothing is fitted.

    Raises:
        InputError: a defence takes no artifact, or an artifact lacks what it needs.
    """
    wrong = [name for name in names if not isinstance(_made(name, settings), CmrmDataset)]
    if wrong:
        raise InputError(f"{', '.join(wrong)} takes no artifact of `cmrm extract`")
    setups = [
        Setup(name, key, dev, _settings(name, settings), shift=shift)
        for name in names
        for key, shift in shifts.items()
    ]
    for setup in setups:
        setup.defense()
    return Question("shifts", Axes("artifact"), setups)

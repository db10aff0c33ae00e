"""The search: the untouched model, the default setting, points that the proxy likes, then Optuna's.

The whole study has one budget of time, over all calls. The default setting is always measured; a
further trial is begun while there is time for one of the usual length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any

import optuna
from optuna.trial import TrialState

from cmrm.defenses import Defense, Stack, make_defense
from cmrm.errors import CmrmError, InputError
from cmrm.measure.outcomes import joined
from cmrm.prompts.sample import Sample, content_key
from cmrm.tune.choose import Limits, Objectives, hopeless
from cmrm.tune.fitting import Fitter
from cmrm.tune.measuring import Bench, sizes
from cmrm.tune.proxy import Odds, Proxy, generator, screened
from cmrm.tune.sets import Sets
from cmrm.tune.space import distributions, drawn, settings_of, space_json
from cmrm.tune.study import Row, Study

CANDIDATES = 24
"""Random points that the proxy is asked about, at most; fewer where few trials are allowed."""
KEPT = 4
"""One of so many of them is tried."""
SCREENING = 0.1
"""Share of the budget that the proxy may take before the first trial of the search."""
IDLE = 20
"""Trials in a row that bring nothing (a repeated point, a failure) after which the search ends."""
UNTOUCHED = -1
"""Stands for the untouched model among the numbers of trials."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What one call asks for."""

    defense: str
    """Name of the defence, or of a variant of one."""
    budget: float
    """Seconds of the whole study."""
    limits: Limits = field(default_factory=Limits)
    """What a setting may cost."""
    trials: int | None = None
    """Most trials of the whole study; None: as many as the budget allows."""

    def __post_init__(self) -> None:
        if self.trials is not None and self.trials < 1:
            raise InputError(f"--trials is {self.trials}; it is at least 1")


@dataclass(frozen=True)
class Search:
    """What a search found."""

    default: Defense
    """The defence at its default setting."""
    rows: list[Row]
    """Trials that are over."""
    untouched: dict[str, Any]
    """Rates of the untouched model."""
    base: Objectives
    """Its objectives."""
    seconds: float
    """Of the whole study, over all calls."""
    fitter: Fitter
    """Gives the chosen setting what was fitted for it."""
    space: list[dict[str, Any]]
    """What was varied."""


def tunable(name: str) -> Defense:
    """The defence of a name at its default setting; no model is needed.

    Raises:
        InputError: it is unknown, a stack, or has no settings to tune.
    """
    defense = make_defense(name)
    if isinstance(defense, Stack):
        raise InputError(f"{name!r} is a stack; tune one defence at a time")
    if type(defense).space is Defense.space:
        raise InputError(f"the defence {name!r} has no settings to tune")
    return defense


class Clock:
    """Seconds that a study took, over all calls."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._before = float(study.get("seconds") or 0.0)
        self._start = monotonic()

    @property
    def seconds(self) -> float:
        """Of this call and those before it."""
        return self._before + monotonic() - self._start

    def keep(self) -> None:
        """Write the time down."""
        self._study.put("seconds", round(self.seconds, 3))


def bound(
    bench: Bench, sets: Sets, default: Defense, space: list[dict[str, Any]]
) -> dict[str, str]:
    """What a study is of, by its name in messages."""
    anchors = [sorted(_ids(part)) for part in (sets.anchors.shifted, sets.anchors.benign)]
    context = bench.engine.context()
    parts: dict[str, Any] = {
        "set of library versions": context.pop("versions"),
        "model": context,
        "defence": [default.name, default.settings, space],
        "set of anchors": anchors,
        "dev set": sets.dev.hashes(),
        "judge": list(bench.judges),
        "decoding (--max-new-tokens, --batch-size, --seed)": [
            bench.max_new_tokens, bench.batch_size, bench.seed,
        ],
    }  # fmt: skip
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
        for name, value in parts.items()
    }


def _ids(samples: Sequence[Sample]) -> list[str]:
    return [f"{sample.id} {content_key(sample)}" for sample in samples]


class Tuner:
    """One call of a search in one folder."""

    def __init__(
        self, bench: Bench, sets: Sets, options: Options, out: Path, say: Say = lambda text: None
    ) -> None:
        """Open the study of `out`, or begin it.

        Raises:
            InputError: the defence cannot be tuned, or the study there is of something else.
        """
        self.bench, self.sets, self.options, self.say = bench, sets, options, say
        self.default = tunable(options.defense)
        self.default.check(bench.engine)
        self.space = self.default.space(bench.engine)
        self.distributions = distributions(self.space)
        described = space_json(self.space)
        if not self.space:
            raise InputError(f"the defence {options.defense!r} has no settings to tune")
        self.study = Study(
            out / "study.db", bound(bench, sets, self.default, described),
            objectives=len(sets.dev.parts), seed=bench.seed,
        )  # fmt: skip
        self.partial, self.rest = sets.dev.divided()
        self.clock = Clock(self.study)
        self.fitter = Fitter(bench.engine, sets.anchors, out / "fitted", self.default, say)
        self.proxy = Proxy(bench.engine, sets.dev, batch_size=bench.batch_size, seed=bench.seed)
        self.described = described

    def run(self) -> Search:
        """Search until the budget, the number of trials or the space is used up.

        Raises:
            InputError: the budget is too small for one trial, or the default setting cannot be
                measured.
        """
        untouched, base = self._untouched()
        self._default()
        self._screen()
        idle = 0
        while idle < IDLE and self._more():
            idle = 0 if self._trial() else idle + 1
            self.clock.keep()
        if idle:
            self.say(f"{IDLE} points in a row brought nothing new: the search ends")
        return Search(
            self.default, self.study.rows(), untouched, base, self.clock.seconds, self.fitter,
            self.described,
        )  # fmt: skip

    def _untouched(self) -> tuple[dict[str, Any], Objectives]:
        """Rates and objectives of the untouched model.

        Raises:
            InputError: one trial would take longer than the budget.
        """
        none = make_defense("none")
        self.say("the untouched model")
        known = self.study.get("untouched_seconds")
        start = monotonic()
        cell = self.bench.cell(self.partial, none)
        share = len(self.partial.samples) / len(self.sets.dev.samples)
        self._check_budget(known or (monotonic() - start) / share)
        partial = self.bench.objectives(self.bench.rates(cell))
        if self.rest.samples:
            cell = joined([cell, self.bench.cell(self.rest, none)])
        if known is None:
            known = round(monotonic() - start, 3)
            self.study.put("untouched_seconds", known)
            self.clock.keep()
        self._check_budget(known)
        self.study.put("untouched_partial", list(partial))
        rates = self.bench.rates(cell)
        self.bench.check(rates)
        return rates, self.bench.objectives(rates)

    def _check_budget(self, seconds: float) -> None:
        """`seconds`: what the untouched model takes on the dev set."""
        if self.options.budget < 2 * seconds:
            raise InputError(
                f"a budget of {duration_text(self.options.budget)} is too small for one trial: the "
                f"untouched model alone takes {duration_text(seconds)} on the dev set; give "
                f"--budget {duration_text(6 * seconds)} or more, or a smaller dev set"
            )

    def _default(self) -> None:
        """Measure the default setting, once in the life of a study; it has no point in the
        space."""
        if any(row.default for row in self.study.rows()):
            return
        self.say("trial 0, the default setting")
        start = monotonic()
        self.fitter.fit(self.default)
        odds = self.proxy.odds(self.default)
        cell = self.bench.cell(self.partial, self.default)
        partial = self.bench.objectives(self.bench.rates(cell))
        if self.rest.samples:
            cell = joined([cell, self.bench.cell(self.rest, self.default)])
        rates = self.bench.rates(cell)
        self.study.add(
            self.bench.objectives(rates),
            {
                "origin": "default", "settings": self.default.settings, "proxy": odds.to_json(),
                "partial": list(partial), "rates": rates, "seconds": _since(start),
            },
        )  # fmt: skip
        self.clock.keep()

    def _screen(self) -> None:
        """Ask the proxy about random points, and put those that it likes in the queue; once."""
        if self.study.get("screened") is not None or not self._more():
            return
        rng, most = generator(self.bench.seed), SCREENING * self.options.budget
        trials = self.options.trials
        wanted = CANDIDATES if trials is None else min(CANDIDATES, KEPT * max(1, trials - 1))
        candidates: list[dict[str, Any]] = []
        odds: list[Odds | None] = []
        start = monotonic()
        while len(candidates) < wanted and monotonic() - start < most:
            self.say(f"the proxy, random point {len(candidates) + 1}")
            candidates.append(drawn(self.space, rng))
            try:
                defense = self._made(settings_of(self.space, candidates[-1]))
                self.fitter.fit(defense)
                odds.append(self.proxy.odds(defense))
            except CmrmError:
                odds.append(None)
        self.study.enqueue(screened(candidates, odds, max(1, len(candidates) // KEPT)), "proxy")
        self.study.put("screened", len(candidates))
        self.clock.keep()

    def _more(self) -> bool:
        """Whether there is time for one more trial, and one may be begun."""
        rows = self.study.rows()
        if self.options.trials is not None and len(rows) >= self.options.trials:
            return False
        usual = mean(row.attributes["seconds"] for row in rows if row.state == "finished")
        return self.clock.seconds + usual <= self.options.budget

    def _made(self, settings: dict[str, Any]) -> Defense:
        name = self.options.defense
        return make_defense(name, {name: settings})

    def _trial(self) -> bool:
        """One trial; whether it brought something new."""
        trial = self.study.ask(self.distributions)
        origin = trial.user_attrs.get("origin", "search")
        start = monotonic()
        facts: dict[str, Any] = {"origin": origin}
        self.say(f"trial {trial.number}")
        try:
            defense = self._made(settings_of(self.space, trial.params))
            facts["settings"] = defense.settings
            if any(row.attributes["settings"] == defense.settings for row in self.study.rows()):
                self.study.tell(trial, TrialState.FAIL)
                return False
            self.fitter.fit(defense)
            facts["proxy"] = self.proxy.odds(defense).to_json()
            return self._measure(trial, defense, facts, start)
        except CmrmError as error:
            facts.setdefault("settings", settings_of(self.space, trial.params))
            facts |= {"seconds": _since(start), "reason": str(error)}
            self.study.tell(trial, TrialState.FAIL, **facts)
            return False

    def _measure(
        self, trial: optuna.Trial, defense: Defense, facts: dict[str, Any], start: float
    ) -> bool:
        """Measure a trial on the partial set, and on the rest where it is not hopeless."""
        cell = self.bench.cell(self.partial, defense)
        partial = self.bench.objectives(self.bench.rates(cell))
        facts["partial"] = list(partial)
        earlier = {row.number: tuple(row.attributes["partial"]) for row in self.study.finished()}
        earlier[UNTOUCHED] = tuple(self.study.get("untouched_partial"))
        better = hopeless(partial, sizes(self.partial), earlier) if self.rest.samples else None
        if better is not None:
            who = "the untouched model" if better == UNTOUCHED else f"trial {better}"
            facts |= {"seconds": _since(start), "reason": f"{who} is better on the partial set"}
            self.study.tell(trial, TrialState.PRUNED, **facts)
            return True
        if self.rest.samples:
            cell = joined([cell, self.bench.cell(self.rest, defense)])
        rates = self.bench.rates(cell)
        facts |= {"rates": rates, "seconds": _since(start)}
        self.study.tell(trial, TrialState.COMPLETE, self.bench.objectives(rates), **facts)
        return True


def _since(start: float) -> float:
    return round(monotonic() - start, 3)


def duration_text(seconds: float) -> str:
    """`90s`, or `30m` from two minutes on, rounded up."""
    whole = max(1, -int(-seconds // 1))
    return f"{whole}s" if whole < 120 else f"{-(-whole // 60)}m"

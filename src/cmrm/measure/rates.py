"""Rates, intervals and paired tests, by statsmodels, scipy and scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import krippendorff
import numpy as np
from scipy.stats import bootstrap
from sklearn.metrics import precision_score, recall_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from cmrm.errors import InputError
from cmrm.judges import Verdict


@dataclass(frozen=True)
class Rate:
    """A share of scored replies with its 95 % Wilson interval. Unscored replies are counted apart, never as safe."""

    rate: float | None
    """Share within 0..1 of the scored; None when nothing was scored."""
    low: float | None
    """Lower end of the interval."""
    high: float | None
    """Upper end of the interval."""
    n: int
    """Scored replies."""
    unscored: int
    """Replies that the judge could not score."""

    def to_json(self, name: str = "rate") -> dict[str, float | int | None]:
        """As a JSON object, the share under `name`."""
        data = asdict(self)
        return {name: data.pop("rate"), **data}


def rate_of(hits: int, n: int, *, unscored: int = 0) -> Rate:
    """`hits` of `n` scored as a rate with its 95 % Wilson interval."""
    if n == 0:
        return Rate(None, None, None, 0, unscored)
    low, high = proportion_confint(hits, n, alpha=0.05, method="wilson")
    return Rate(round(hits / n, 6), round(float(low), 6), round(float(high), 6), n, unscored)


def verdict_rate(verdicts: Sequence[Verdict], what: Verdict) -> Rate:
    """What COMPLIED on harmful requests makes, the unsafe rate (UNSAFE counts too), or what REFUSED on benign ones does, the
    over-refusal rate; of verdicts that say nothing of it only the number is kept."""
    found = [counts_as(verdict, what) for verdict in verdicts]
    scored = [hit for hit in found if hit is not None]
    return rate_of(sum(scored), len(scored), unscored=len(found) - len(scored))


def counts_as(verdict: Verdict, what: Verdict) -> bool | None:
    """Whether `verdict` counts towards the rate of `what` (COMPLIED: unsafe, REFUSED: refusal); None when it does not say."""
    return verdict.is_refusal if what is Verdict.REFUSED else verdict.is_unsafe


@dataclass(frozen=True)
class Agreement:
    """How far a judge agrees with people on refusal."""

    kappa: float | None
    """Cohen's kappa; None where judge and people said the same of everything."""
    precision: float
    """Share of the judge's refusals that people call refusals."""
    recall: float
    """Share of people's refusals that the judge finds."""
    n: int
    """Scored completions."""
    unscored: int
    """Completions that the judge could not score."""


def agreement(verdicts: Sequence[Verdict], refused: Sequence[bool]) -> Agreement:
    """Agreement of `verdicts` with people's `refused` labels over the completions of which the judge said whether they refuse.

    Raises:
        InputError: it said so of none.
    """
    said = [verdict.is_refusal for verdict in verdicts]
    pairs = [(v, r) for v, r in zip(said, refused, strict=True) if v is not None]
    if not pairs:
        raise InputError(
            "of no completion the judge said whether it refuses; guards and rubrics tell safe from unsafe, which these labels do not"
        )
    ours, theirs = zip(*pairs, strict=True)
    return Agreement(
        kappa=kappa_of(theirs, ours).kappa,
        precision=float(precision_score(theirs, ours, zero_division=0)),
        recall=float(recall_score(theirs, ours, zero_division=0)),
        n=len(pairs),
        unscored=len(verdicts) - len(pairs),
    )


@dataclass(frozen=True)
class Kappa:
    """How far two raters agree on a question of yes and no, chance taken away."""

    kappa: float | None
    """Cohen's kappa; None where both said the same of everything, or nothing was rated by both."""
    low: float | None
    """Lower end of its 95 % interval (asymptotic, statsmodels); None where both said the same of everything, which leaves it no width."""
    high: float | None
    """Upper end."""
    same: Rate
    """Share of the replies of which both said the same, with its Wilson interval."""
    n: int
    """Replies that both rated."""
    unscored: int
    """Replies that at least one of them did not rate."""


def kappa_of(first: Sequence[bool | None], second: Sequence[bool | None]) -> Kappa:
    """Agreement of two raters, reply by reply; None is unrated."""
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    unscored = len(first) - len(both)
    same = rate_of(sum(a == b for a, b in both), len(both))
    counts = [[sum(pair == (a, b) for pair in both) for b in (False, True)] for a in (False, True)]
    if len({a for a, _ in both} | {b for _, b in both}) < 2:
        return Kappa(None, None, None, same, len(both), unscored)
    with np.errstate(divide="ignore", invalid="ignore"):  # of a z-value that is not used
        found = cohens_kappa(np.array(counts))
    kappa = round(float(found.kappa), 6)
    if same.rate == 1:
        return Kappa(kappa, None, None, same, len(both), unscored)
    low, high = max(-1.0, float(found.kappa_low)), min(1.0, float(found.kappa_upp))
    return Kappa(kappa, round(low, 6), round(high, 6), same, len(both), unscored)


def alpha_of(ratings: Sequence[Sequence[bool | None]]) -> float | None:
    """Krippendorff's alpha (nominal) over raters x replies, None being unrated; None where it is not defined."""
    held = np.array([[np.nan if said is None else float(said) for said in row] for row in ratings], dtype=float)
    paired_values = held[:, (~np.isnan(held)).sum(axis=0) > 1] if held.size else held
    if len(np.unique(paired_values[~np.isnan(paired_values)])) < 2:
        return None
    return round(float(krippendorff.alpha(reliability_data=held, level_of_measurement="nominal")), 6)


@dataclass(frozen=True)
class Paired:
    """A defence against the untouched model on the same samples, both scored."""

    difference: float
    """Share with the defence minus share without."""
    low: float
    """Lower end of the 95 % interval: seeded percentile bootstrap over samples."""
    high: float
    """Upper end."""
    only_before: int
    """Samples that counted without the defence alone."""
    only_after: int
    """Samples that count with the defence alone."""
    p_value: float
    """Exact McNemar test, two-sided."""
    n: int
    """Samples that were scored both times."""


RESAMPLES = 2000


def paired(before: Sequence[bool | None], after: Sequence[bool | None], *, seed: int = 0) -> Paired | None:
    """Compare two runs sample by sample; None stands for unscored. None when no sample was scored both times."""
    both = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    if not both:
        return None
    change = np.array([float(a) - float(b) for b, a in both])
    first, second = sum(b and not a for b, a in both), sum(a and not b for b, a in both)
    if change.any() and len(change) > 1:
        interval = bootstrap(
            (change,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    else:
        low = high = float(change.mean())
    p_value = float(mcnemar([[0, first], [second, 0]], exact=True).pvalue) if first + second else 1.0
    return Paired(round(float(change.mean()), 6), round(low, 6), round(high, 6), first, second, p_value, len(both))


def ratio_interval(above: Sequence[float], below: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """Ratio of two sums over the same samples, and its 95 % interval: seeded percentile bootstrap over samples."""
    a, b = np.array(above, dtype=float), np.array(below, dtype=float)

    def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(a.sum(axis=axis) / b.sum(axis=axis))

    value = float(ratio(a, b))
    if len(a) < 2 or np.ptp(a / b) == 0:
        return value, value, value
    interval = bootstrap(
        (a, b), ratio, paired=True, vectorized=True, n_resamples=RESAMPLES, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return value, float(interval.low), float(interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction over a family of tests."""
    return [float(p) for p in multipletests(list(p_values), method="holm")[1]] if p_values else []

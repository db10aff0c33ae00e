"""Agreement between raters: Cohen's kappa, Krippendorff's alpha, precision and recall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cmrm.errors import InputError, MissingExtraError
from cmrm.judges import Verdict
from cmrm.measure.rates import Rate, rate_of

try:
    import krippendorff
    from sklearn.metrics import precision_score, recall_score
    from statsmodels.stats.inter_rater import cohens_kappa
    from statsmodels.stats.proportion import proportion_confint
except ImportError as error:
    raise MissingExtraError(
        f"agreement between judges needs {error.name}; pip install 'cmrm[eval]' brings it"
    ) from None


@dataclass(frozen=True)
class Agreement:
    """Agreement of a judge with people on refusal."""

    kappa: float | None
    """Cohen's kappa; None where judge and people gave every completion the same label."""
    precision: float
    """Share of the judge's refusals that people call refusals."""
    recall: float
    """Share of people's refusals that the judge recognises."""
    n: int
    """Scored completions."""
    unscored: int
    """Completions that the judge could not score."""


def agreement(verdicts: Sequence[Verdict], refused: Sequence[bool]) -> Agreement:
    """Agreement of `verdicts` with people's `refused` labels, over completions that the judge
    scored for refusal.

    Raises:
        InputError: it scored none.
    """
    refusals = [verdict.is_refusal for verdict in verdicts]
    pairs = [(v, r) for v, r in zip(refusals, refused, strict=True) if v is not None]
    if not pairs:
        raise InputError(
            f"the judge says of none of {len(verdicts)} replies whether it refuses: it leaves them "
            "open, or tells safe from unsafe alone, as guards and rubrics do"
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
    """Agreement of two raters on a question of yes and no, chance taken away."""

    kappa: float | None
    """Cohen's kappa; None where both gave every reply the same label, or no reply was rated by
    both."""
    low: float | None
    """Lower end of its 95 % interval (asymptotic, statsmodels); None where both agree on every
    reply."""
    high: float | None
    """Upper end."""
    same: Rate
    """Share of the replies on which both agree, with its Wilson interval."""
    n: int
    """Replies that both rated."""
    unscored: int
    """Replies that at least one of them did not rate."""


def kappa_of(
    first: Sequence[bool | None],
    second: Sequence[bool | None],
    weights: Sequence[float] | None = None,
) -> Kappa:
    """Agreement of two raters, reply by reply; None is unrated.

    `weights`: how many replies each reply stands for, where they were drawn with unequal
    probabilities. The intervals are then those of Kish's effective number of replies,
    (sum w)^2 / sum w^2.
    """
    triples = zip(first, second, weights or [1.0] * len(first), strict=True)
    rated = [(a, b, w) for a, b, w in triples if a is not None and b is not None]
    both = [(a, b) for a, b, _ in rated]
    unscored = len(first) - len(both)
    size = _effective([w for _, _, w in rated])
    same = _share([a == b for a, b in both], size)
    counts = np.zeros((2, 2))
    for (a, b), part in zip(both, size, strict=True):
        counts[int(a), int(b)] += part
    if len({a for a, _ in both} | {b for _, b in both}) < 2:
        return Kappa(None, None, None, same, len(both), unscored)
    with np.errstate(divide="ignore", invalid="ignore"):  # of a z-value that is not used
        result = cohens_kappa(counts)
    kappa = round(float(result.kappa), 6)
    if same.rate == 1:
        return Kappa(kappa, None, None, same, len(both), unscored)
    low, high = max(-1.0, float(result.kappa_low)), min(1.0, float(result.kappa_upp))
    return Kappa(kappa, round(low, 6), round(high, 6), same, len(both), unscored)


def _effective(weights: Sequence[float]) -> list[float]:
    """Weights in the same proportions, whose sum is the effective number of replies."""
    total, squares = sum(weights), sum(weight**2 for weight in weights)
    return [weight * total / squares for weight in weights]


def _share(hits: Sequence[bool], size: Sequence[float]) -> Rate:
    """Share of the replies that are hits, each of a size, with its Wilson interval."""
    if len(set(size)) < 2:
        return rate_of(sum(hits), len(hits))
    total = sum(size)
    count = sum(part for part, hit in zip(size, hits, strict=True) if hit)
    low, high = proportion_confint(count, total, method="wilson")
    share = round(count / total, 6)
    return Rate(share, round(float(low), 6), round(float(high), 6), len(hits), 0, share, share)


def alpha_of(ratings: Sequence[Sequence[bool | None]]) -> float | None:
    """Krippendorff's alpha (nominal) over raters x replies, None being unrated; None where it is
    not defined."""
    rows = [[np.nan if rating is None else float(rating) for rating in row] for row in ratings]
    table = np.array(rows, dtype=float)
    paired_values = table[:, (~np.isnan(table)).sum(axis=0) > 1] if table.size else table
    if len(np.unique(paired_values[~np.isnan(paired_values)])) < 2:
        return None
    return round(
        float(krippendorff.alpha(reliability_data=table, level_of_measurement="nominal")), 6
    )

"""Agreement of a judge with people."""

from __future__ import annotations

import pytest

from cmrm.errors import InputError
from cmrm.judges import Verdict
from cmrm.measure.kappa import agreement

R, C, S, N = Verdict.REFUSED, Verdict.COMPLIED, Verdict.SAFE, Verdict.UNSCORED


def test_what_the_judge_could_not_score_is_counted_apart() -> None:
    figures = agreement([R, R, C, N], [True, False, False, True])
    assert (figures.n, figures.unscored, figures.recall, figures.precision) == (3, 1, 1.0, 0.5)
    assert figures.kappa == pytest.approx(0.4)


def test_a_judge_that_says_nothing_of_refusal_is_refused() -> None:
    with pytest.raises(InputError, match="says of none of 2 replies whether it refuses"):
        agreement([S, N], [True, False])

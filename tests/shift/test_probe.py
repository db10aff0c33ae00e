"""The probe and the area under the ROC curve against scikit-learn."""

from __future__ import annotations

import pytest
import torch

from cmrm.errors import InputError
from cmrm.shift.probe import auc, fit_probe, folds_of


def two_kinds(positive: int, negative: int, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    scale = torch.linspace(0.1, 20, width)
    sets = [torch.randn(n, 3, width, generator=generator) * scale for n in (positive, negative)]
    sets[0][:, :, :3] += 0.4 * scale[:3]
    return sets[0] + 5, sets[1] + 5


@pytest.mark.parametrize("ridge", [0.5, 10.0, 100.0])
@pytest.mark.parametrize(
    ("positive", "negative", "width"), [(40, 40, 12), (60, 15, 12), (20, 30, 90)]
)
def test_the_probe_is_scikit_learns_logistic_regression(
    ridge: float, positive: int, negative: int, width: int
) -> None:
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    some, others = two_kinds(positive, negative, width)
    probe = fit_probe(some, others, ridge)
    labels = [1] * positive + [0] * negative
    for layer in range(3):
        states = torch.cat([some, others])[:, layer].double().numpy()
        model = LogisticRegression(
            C=1 / ridge, class_weight="balanced", tol=1e-12, max_iter=100_000
        )
        pipeline = make_pipeline(StandardScaler(), model).fit(states, labels)
        weight = torch.from_numpy(model.coef_[0] / pipeline[0].scale_)
        found = probe.weight[layer].double()
        assert float((found - weight).norm() / weight.norm()) < 1e-3
        expected = torch.from_numpy(pipeline.decision_function(states))
        scores = probe.scores(torch.cat([some, others]))[:, layer].double()
        assert torch.allclose(scores, expected, atol=1e-3)


def test_states_that_never_differ_do_no_harm() -> None:
    some, others = two_kinds(20, 20)
    some[:, :, 5] = others[:, :, 5] = 3.0
    probe = fit_probe(some, others)
    assert bool(torch.isfinite(probe.weight).all())
    assert float(probe.weight[:, 5].abs().max()) < 1e-6 * float(probe.weight.abs().max())


def test_an_empty_kind_is_refused() -> None:
    with pytest.raises(InputError, match="one of the two sets is empty"):
        fit_probe(torch.empty(0, 3, 4), torch.ones(5, 3, 4))


def test_the_area_is_scikit_learns() -> None:
    pytest.importorskip("sklearn")
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(1)
    some = torch.randint(0, 6, (37, 4), generator=generator).float() + 1
    others = torch.randint(0, 6, (21, 4), generator=generator).float()
    areas = auc(some, others)
    for column in range(4):
        scores = torch.cat([some, others])[:, column].numpy()
        expected = roc_auc_score([1] * 37 + [0] * 21, scores)
        assert float(areas[column]) == pytest.approx(expected, abs=1e-9)
    assert float(auc(torch.ones(3), torch.zeros(2))) == 1.0
    assert float(auc(torch.ones(3), torch.ones(2))) == 0.5


def test_folds_are_even_and_repeatable() -> None:
    folds = folds_of(23, 5, seed=4)
    assert sorted(folds.bincount().tolist()) == [4, 4, 5, 5, 5]
    assert torch.equal(folds, folds_of(23, 5, seed=4))
    assert not torch.equal(folds, folds_of(23, 5, seed=5))

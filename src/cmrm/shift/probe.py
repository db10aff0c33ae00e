"""A linear probe of the residual stream: ridge logistic regression at every decoder layer at once.

States are standardised. The probe is solved by Newton's method in the span of the states, whose
dimension is at most their number: anchors are few, and states are wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cmrm.errors import InputError

STEPS = 50
"""Newton steps at most; some ten are enough."""
TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Probe:
    """Score of a state h at layer l: h . weight_l + bias_l; above 0 it is more likely positive."""

    weight: torch.Tensor
    """float32 [L, d]."""
    bias: torch.Tensor
    """float32 [L]."""

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """float32 [N, L] of states [N, L, d]."""
        return (states * self.weight).sum(-1) + self.bias


def fit_probe(positive: torch.Tensor, negative: torch.Tensor, ridge: float = 100.0) -> Probe:
    """Logistic regression at every layer, both classes of equal weight.

    Minimises the sum of log losses plus ridge / 2 |w|^2, w the weight of standardised states.

    Args:
        positive: float32 [N, L, d].
        negative: float32 [M, L, d].
        ridge: strength of the penalty, > 0 (scikit-learn's 1 / C).

    Raises:
        InputError: one of the two is empty.
    """
    if not len(positive) or not len(negative):
        raise InputError("a probe needs states of both kinds; one of the two sets is empty")
    states = torch.cat([positive, negative]).double().transpose(0, 1)
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
    n = len(labels)
    counts = torch.where(labels == 1, n / (2 * len(positive)), n / (2 * len(negative)))
    mean = states.mean(1, keepdim=True)
    scale = states.std(1, keepdim=True, correction=0)
    constant = scale <= 1e-9 * mean.abs() + TINY  # rounding alone: as it is, not blown up
    scale = torch.where(constant, torch.ones_like(scale), scale)
    left, values, right = torch.linalg.svd((states - mean) / scale, full_matrices=False)
    inputs = torch.cat([left * values[:, None, :], torch.ones_like(left[..., :1])], dim=-1)
    solution = torch.zeros(inputs.shape[0], inputs.shape[2], dtype=torch.float64)
    penalty = torch.full((inputs.shape[2],), float(ridge), dtype=torch.float64)
    penalty[-1] = TINY
    for _ in range(STEPS):
        probability = torch.sigmoid(torch.einsum("lnr,lr->ln", inputs, solution))
        slope = torch.einsum("lnr,ln->lr", inputs, counts * (probability - labels))
        slope = slope + penalty * solution
        curvature = counts * probability * (1 - probability)
        hessian = torch.einsum("lnr,ln,lns->lrs", inputs, curvature, inputs)
        hessian = hessian + torch.diag(penalty)
        step = torch.linalg.solve(hessian, slope)
        solution = solution - step
        if float(step.abs().max()) < 1e-9:
            break
    weight = torch.einsum("lrd,lr->ld", right, solution[:, :-1]) / scale[:, 0]
    bias = solution[:, -1] - (weight * mean[:, 0]).sum(-1)
    return Probe(weight.float(), bias.float())


def auc(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Area under the ROC curve, 0..1, of scores [N, ...] against [M, ...]; ties count half."""
    above = (positive[:, None] > negative[None]).double()
    ties = (positive[:, None] == negative[None]).double()
    return (above + 0.5 * ties).mean((0, 1))


def folds_of(count: int, folds: int, seed: int = 0) -> torch.Tensor:
    """int64 [count]: the fold of each, drawn evenly."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    folds_in_order = torch.arange(count) % folds
    assigned = torch.empty(count, dtype=torch.long)
    assigned[order] = folds_in_order
    return assigned

"""The training loop: it resumes with the same batches, and its learning rate."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from cmrm.demo.train.training import Stage, learning_rate, train


class StopError(Exception):
    """Stands for a kill in the middle of a run."""


def run(folder: Path, *, stop_at: int | None = None, average: float | None = None) -> torch.Tensor:
    """Parameters after a toy stage of 12 steps, or `StopError` after `stop_at` of them."""
    weight = torch.nn.Parameter(torch.zeros(3))
    steps = 0

    def loss_of(rng: random.Random) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if stop_at is not None and steps > stop_at:
            raise StopError
        return (weight - torch.tensor([rng.random() for _ in range(3)])).square().sum()

    stage = Stage("toy", 12, 0.1, save_every=5)
    train(stage, {"w": weight}, loss_of, folder, average=average)
    return weight.detach()


@pytest.mark.parametrize("average", [None, 0.5])
def test_training_resumes_with_the_same_batches(tmp_path: Path, average: float | None) -> None:
    whole = run(tmp_path / "whole", average=average)
    with pytest.raises(StopError):
        run(tmp_path / "stopped", stop_at=7, average=average)
    assert torch.equal(run(tmp_path / "stopped", average=average), whole)


def test_averaged_parameters_differ_from_the_last(tmp_path: Path) -> None:
    assert not torch.equal(run(tmp_path / "last"), run(tmp_path / "mean", average=0.5))


def test_the_curve_has_a_line_for_each_checkpoint(tmp_path: Path) -> None:
    run(tmp_path)
    lines = (tmp_path / "curve.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 12]


def test_a_vision_tower_learns_at_a_fifth_of_the_rate(tmp_path: Path) -> None:
    tower, other = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    parameters = {"vision_tower.w": tower, "connector.w": other}
    train(
        Stage("toy", 1, 0.1), parameters, lambda rng: (tower + other - 1).square().sum(), tmp_path
    )
    assert tower.item() == pytest.approx(0.2 * other.item())
    assert other.item() > 0


def test_learning_rate_warms_up_and_decays() -> None:
    stage = Stage("s", 100, 1.0)
    rates = [learning_rate(stage, step) for step in range(100)]
    assert rates[0] < rates[2] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)

"""Whether there is a gap to close, on states with a planted one."""

from __future__ import annotations

import pytest
import torch

from cmrm.shift.gap import GapRecord, measure_gap, recommended_setting, upper_half
from cmrm.steering.setting import Steering

LAYERS, WIDTH = 6, 16


def planted(
    taken: float, *, apart: float = 4.0, n: int = 60, layer: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Harmful as text, with an image, and benign as text; the image takes the share `taken` of what
    sets them apart, from `layer` on."""
    generator = torch.Generator().manual_seed(8)
    text, benign = (torch.randn(n, LAYERS, WIDTH, generator=generator) for _ in range(2))
    text[:, :, 1] += apart
    corrupted = text + 0.1 * torch.randn(text.shape, generator=generator)
    corrupted[:, :, 7] += 3.0  # what an image does along another direction
    corrupted[:, layer:, 1] -= taken * apart
    return text, corrupted, benign


@pytest.mark.parametrize("taken", [0.3, 0.6, 1.0])
def test_a_planted_gap_is_measured_and_filled(taken: float) -> None:
    gap = measure_gap(*planted(taken))
    assert gap.lost == pytest.approx(taken, abs=0.1)
    assert gap.low <= gap.lost <= gap.high
    assert gap.text_auc > 0.95
    assert gap.there
    setting = recommended_setting(gap, LAYERS)
    assert setting == Steering(operator="fill", layers=(3, 4, 5))
    assert setting.alpha == 1.0
    assert "fill gives it back" in gap.reason


def test_where_the_image_changes_nothing_nothing_is_recommended() -> None:
    text, _, benign = planted(0.0)
    gap = measure_gap(text, text, benign)
    assert (gap.lost, gap.low, gap.high) == (0.0, 0.0, 0.0)
    assert not gap.there
    assert recommended_setting(gap, LAYERS).alpha == 0.0
    assert "no gap to close, and nothing is recommended" in gap.reason


@pytest.mark.parametrize("taken", [0.0, -0.5])
def test_an_image_that_takes_nothing_or_adds_some_leaves_no_gap(taken: float) -> None:
    gap = measure_gap(*planted(taken))
    assert gap.lost == pytest.approx(taken, abs=0.1)
    assert not gap.there
    assert recommended_setting(gap, LAYERS) == Steering(alpha=0.0)


def test_kinds_that_are_not_told_apart_have_nothing_to_give_back() -> None:
    gap = measure_gap(*planted(1.0, apart=0.0))
    assert gap.text_auc < 0.7
    assert not gap.there
    assert recommended_setting(gap, LAYERS).alpha == 0.0
    assert "not told apart as text" in gap.reason


def test_the_upper_half_of_the_layers_counts() -> None:
    assert upper_half(6) == (3, 4, 5)
    assert upper_half(5) == (2, 3, 4)
    text, corrupted, benign = planted(1.0)
    corrupted[:, 3:] = text[:, 3:]
    assert not measure_gap(text, corrupted, benign).there
    assert measure_gap(*planted(1.0, layer=3)).there


def test_the_interval_narrows_with_the_anchors_and_repeats_with_the_seed() -> None:
    few, many = measure_gap(*planted(0.5, n=12)), measure_gap(*planted(0.5, n=200))
    assert many.high - many.low < few.high - few.low
    assert measure_gap(*planted(0.5)) == measure_gap(*planted(0.5))


def test_a_reason_is_one_sentence_and_the_record_survives_json() -> None:
    for parts in (planted(1.0), planted(0.0), planted(1.0, apart=0.0)):
        gap = measure_gap(*parts)
        assert "\n" not in gap.reason
        assert GapRecord(**gap.to_json()) == gap

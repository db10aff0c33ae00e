"""Estimators against an independent computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA, TruncatedSVD

from cmrm import Sample, estimate_shift
from cmrm.model.vlm import VLM
from cmrm.shift.estimate import reduce_differences


@pytest.fixture
def differences() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    offset = torch.randn(4, 10, generator=generator)
    return 2 * offset + torch.randn(25, 4, 10, generator=generator)


def test_pca_is_the_uncentred_direction_with_the_mean_projection_as_length(
    differences: torch.Tensor,
) -> None:
    vectors, ratio = reduce_differences(differences, "pca")
    for layer in range(4):
        rows = differences[:, layer].double().numpy()
        svd = TruncatedSVD(1, algorithm="arpack").fit(rows)
        direction = svd.components_[0]
        np.testing.assert_allclose(
            vectors[layer].numpy(), direction * (rows.mean(0) @ direction), atol=1e-5
        )
        assert rows.mean(0) @ vectors[layer].double().numpy() > 0
        share = (rows @ direction) ** 2
        np.testing.assert_allclose(ratio[layer], share.sum() / (rows**2).sum(), rtol=1e-5)


def test_mean(differences: torch.Tensor) -> None:
    vectors, _ = reduce_differences(differences, "mean")
    np.testing.assert_allclose(vectors.numpy(), differences.numpy().mean(0), atol=1e-5)


def test_icv_is_mean_plus_unit_centred_component(differences: torch.Tensor) -> None:
    vectors, _ = reduce_differences(differences, "icv")
    for layer in range(4):
        rows = differences[:, layer].double().numpy()
        extra = vectors[layer].numpy() - rows.mean(0)
        component = PCA(1).fit(rows).components_[0]
        assert abs(abs(extra @ component) - 1) < 1e-4
        assert extra @ rows.mean(0) >= 0


def test_flipping_the_differences_flips_the_vector(differences: torch.Tensor) -> None:
    forward, _ = reduce_differences(differences, "pca")
    backward, _ = reduce_differences(-differences, "pca")
    assert torch.allclose(forward, -backward, atol=1e-5)


def test_constant_differences_are_recovered_by_all(vlm: VLM) -> None:
    offset = torch.randn(1, 2, 6)
    for estimator in ("pca", "mean"):
        vectors, ratio = reduce_differences(offset.repeat(5, 1, 1), estimator)
        assert torch.allclose(vectors, offset[0], atol=1e-5)
        assert torch.allclose(ratio, torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("corruption", ["blank", "noise"])
def test_same_seed_same_bytes(vlm: VLM, anchors: list[Sample], corruption: str) -> None:
    one = estimate_shift(vlm, anchors, corruption=corruption, seed=5)
    two = estimate_shift(vlm, anchors, corruption=corruption, seed=5)
    assert torch.equal(one.vectors, two.vectors)
    if corruption == "noise":
        assert not torch.equal(
            one.vectors, estimate_shift(vlm, anchors, corruption=corruption, seed=6).vectors
        )


def test_provenance_is_complete(vlm: VLM, anchors: list[Sample]) -> None:
    made = estimate_shift(vlm, anchors).provenance
    assert (made.n_layers, made.hidden_size, made.n_anchors) == (3, 32, 6)
    assert made.architecture == "LlavaForConditionalGeneration"
    assert len(made.norms) == len(made.explained_ratio) == 3
    assert all(0 <= r <= 1 for r in made.explained_ratio)
    assert set(made.versions) == {"cmrm", "torch", "transformers"}

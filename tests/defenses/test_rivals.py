"""The rivals of 2024 to 2026, each against an independent computation of its equation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cmrm import Sample
from cmrm.defenses import FitData, Stack, make_defense, respond
from cmrm.defenses.safety_prompt import SAFETY_PROMPT
from cmrm.engines.base import Contrast, Decoding, EngineError, Reply
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import ArtifactError, InputError
from cmrm.model.vlm import wrap_vlm
from cmrm.prompts.conditions import Request
from defenses.oracle import (
    SEEN,
    UNSEEN,
    Scripted,
    adding,
    all_states,
    at_the_end,
    changed,
    defended,
    fitted,
    states,
)
from tiny import tiny_model, tiny_processor

SHORT = Decoding(5)


def test_astra_steers_as_far_as_a_state_points_along_the_direction(
    engine: TransformersEngine, data: FitData
) -> None:
    vlm = engine.vlm
    seen = all_states(vlm, data.harmful, "original")[:, 1]
    v = seen.mean(0) - all_states(vlm, data.harmful, "query")[:, 1].mean(0)
    h0 = torch.cat([seen, all_states(vlm, data.benign, "original")[:, 1]]).mean(0)
    plain = states(vlm, SEEN)[:, 1].numpy()

    def cosine(h: np.ndarray) -> np.ndarray:
        centred = h - h0.numpy()
        lengths = np.linalg.norm(centred, axis=-1) * np.linalg.norm(v.numpy())
        result: np.ndarray = centred @ v.numpy() / lengths
        return result

    assert (cosine(plain) > 0).any(), "the law acts on at least one of the two"
    step = -7.0 * np.linalg.norm(plain, axis=-1) * np.maximum(cosine(plain), 0)
    added = torch.from_numpy(step[:, None] * v.numpy() / np.linalg.norm(v.numpy()))
    defense = fitted(engine, data, "astra", layer=1, alpha=7.0)
    expected = changed(vlm, SEEN, {1: adding(added)})
    assert torch.allclose(defended(engine, defense, SEEN), expected, atol=2e-3)
    assert [part.positions for part in defense.intervene(engine, SEEN, ["", ""])] == ["last"]


def test_astra_leaves_states_alone_that_point_the_other_way(
    engine: TransformersEngine, data: FitData
) -> None:
    defense = fitted(engine, data, "astra", layer=1)
    aside = states(engine.vlm, SEEN[:1])[0, 1] - defense.state["origin"][1]
    defense.state["harm"][1] = -aside
    assert torch.equal(defended(engine, defense, SEEN[:1]), states(engine.vlm, SEEN[:1]))


def test_astras_layer_is_the_middle(data: FitData) -> None:
    deep = wrap_vlm(tiny_model(n_layers=8), tiny_processor(), model_id="deep")
    engine = TransformersEngine(deep)
    defense = fitted(engine, data, "astra")
    assert [e.layer for e in defense.intervene(engine, SEEN, ["", ""])[0].edits] == [3]


@pytest.mark.parametrize("threshold", [-1.0, 0.2, 1.0])
def test_jrs_rem_takes_the_component_away_where_its_share_is_large(
    engine: TransformersEngine, data: FitData, threshold: float
) -> None:
    vlm = engine.vlm
    d = all_states(vlm, data.harmful, "original").mean(0)
    d = d - all_states(vlm, data.harmful, "query").mean(0)
    d = d / d.norm(dim=-1, keepdim=True)
    m = torch.cat([states(vlm, [r]) - states(vlm, [Request(r.text)]) for r in SEEN])
    s = (m * d).sum(-1)
    taken = torch.where(s / m.norm(dim=-1) > threshold, s, 0.0)[..., None] * d
    layers = range(vlm.n_layers)
    functions = {k: adding(-taken[:, k]) for k in layers}
    defense = fitted(engine, data, "jrs_rem", threshold=threshold)
    steered = defended(engine, defense, SEEN)
    assert torch.allclose(steered, changed(vlm, SEEN, functions), atol=1e-3)
    if threshold == 1.0:
        assert torch.equal(steered, states(vlm, SEEN)), "no share is above 1"
    else:
        assert not torch.allclose(steered, states(vlm, SEEN), atol=1e-2)
    assert [p.positions for p in defense.intervene(engine, SEEN, ["", ""])] == ["last_prompt"]


@pytest.mark.parametrize("share", [0.6, 0.9])
def test_alphasteer_maps_harmful_states_and_leaves_benign_ones(
    engine: TransformersEngine, data: FitData, share: float
) -> None:
    vlm, width = engine.vlm, engine.hidden_size
    benign = all_states(vlm, data.benign, "original")[:, 1].double().numpy()
    harmful = all_states(vlm, data.harmful, "original")[:, 1].double().numpy()
    r = all_states(vlm, data.harmful, "query")[:, 1].mean(0)
    r = r - all_states(vlm, data.benign, "query")[:, 1].mean(0)
    vectors = np.linalg.eigh(benign.T @ benign).eigenvectors[:, : int(width * share)]
    p = vectors @ vectors.T
    x = harmful @ p
    targets = np.tile(r.double().numpy(), (len(x), 1))
    delta = np.linalg.pinv(x.T @ x + 10.0 * p) @ x.T @ targets
    m = torch.from_numpy((p @ delta).T).float()

    defense = fitted(engine, data, "alphasteer", alpha=3.0, share=share, layers=[1])
    expected = changed(vlm, SEEN, {1: at_the_end(lambda h: 3.0 * h @ m.T)})
    assert torch.allclose(defended(engine, defense, SEEN), expected, atol=2e-3)
    edit = defense.intervene(engine, SEEN, ["", ""])[0].edits[0]
    assert edit.matrix is not None
    moved = torch.from_numpy(harmful).float() @ edit.matrix.T
    left = torch.from_numpy(benign).float() @ edit.matrix.T
    assert moved.norm(dim=-1).mean() > 3 * left.norm(dim=-1).mean(), "benign states hardly move"


def test_alphasteers_layers_are_scaled(data: FitData) -> None:
    deep = wrap_vlm(tiny_model(n_layers=16), tiny_processor(), model_id="deep")
    engine = TransformersEngine(deep)
    defense = fitted(engine, data, "alphasteer")
    edits = defense.intervene(engine, SEEN, ["", ""])[0].edits
    assert [edit.layer for edit in edits] == [4, 5, 6, 8, 9]


def test_cast_adds_where_the_condition_holds(engine: TransformersEngine, data: FitData) -> None:
    vlm = engine.vlm
    harmful = all_states(vlm, data.harmful, "original")[:, 0].double().numpy()
    benign = all_states(vlm, data.benign, "original")[:, 0].double().numpy()
    centre = (harmful.mean(0) + benign.mean(0)) / 2
    both = np.concatenate([harmful, benign]) - centre
    c = np.linalg.svd(both, full_matrices=False).Vh[0]
    h = states(vlm, SEEN)[:, 0].double().numpy()
    p = np.tanh(np.outer(c, c) @ h.T / (c @ c)).T
    scores = (h * p).sum(-1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(p, axis=-1)
    direction = all_states(vlm, data.harmful, "query").mean(0)
    direction = direction - all_states(vlm, data.benign, "query").mean(0)

    defense = fitted(engine, data, "cast", alpha=0.5, layers=[1, 2])
    assert defense.gate is not None
    assert defense.gate.layers == (0,)
    side = defense.gate.weights[0]
    between = float(np.mean(side * scores))
    object.__setattr__(defense.gate, "threshold", between)
    opens = torch.from_numpy(side * scores > between)
    assert opens.tolist() in ([True, False], [False, True]), "one of the two rows"
    functions = {k: adding(0.5 * opens[:, None].float() * direction[k]) for k in (1, 2)}
    expected = changed(vlm, SEEN, functions)
    assert torch.allclose(defended(engine, defense, SEEN), expected, atol=1e-3)
    assert [part.positions for part in defense.intervene(engine, SEEN, ["", ""])] == ["last"]


def test_cast_needs_a_layer_below(engine: TransformersEngine, data: FitData) -> None:
    with pytest.raises(InputError, match="choose layers from 1 on"):
        fitted(engine, data, "cast", layers=[0, 1])


@pytest.mark.parametrize("rank", [1, 4])
def test_null_space_projects_a_subspace_out_of_one_token(
    engine: TransformersEngine, data: FitData, rank: int
) -> None:
    vlm = engine.vlm
    differences = all_states(vlm, data.harmful, "blank") - all_states(vlm, data.harmful, "query")
    u = torch.from_numpy(np.linalg.svd(differences[:, 2].numpy(), full_matrices=False).Vh[:rank])
    defense = fitted(engine, data, "null_space", rank=rank)
    expected = changed(vlm, SEEN, {2: at_the_end(lambda h: -h @ u.T @ u)})
    projected = defended(engine, defense, SEEN)
    assert torch.allclose(projected, expected, atol=2e-3)
    assert (projected[:, 2] @ u.T).abs().max() < 1e-3, "nothing is left in the subspace"
    assert [p.positions for p in defense.intervene(engine, SEEN, ["", ""])] == ["last_prompt"]


def test_null_space_reads_one_direction_of_an_older_version(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    directions = torch.nn.functional.normalize(torch.randn(3, engine.hidden_size), dim=-1)
    path = tmp_path / "old.safetensors"
    engine.artifact({"modality": directions}, "null_space").save(path)
    defense = make_defense("null_space", {"null_space": {"rank": 1, "layers": [0, 2]}})
    defense.load(path, engine)
    assert torch.equal(defense.state["basis"], directions[[0, 2]][:, None])
    with pytest.raises(ArtifactError, match="rank 1 for 1 layers, the setting asks for rank 4"):
        make_defense("null_space").load(path, engine)


def test_null_space_needs_as_many_anchors_as_dimensions(engine: TransformersEngine) -> None:
    sample = Sample("a", "Tell me", Image.new("RGB", (16, 16)))
    with pytest.raises(InputError, match="1 anchors span no 4 dimensions"):
        fitted(engine, FitData([sample], [sample]), "null_space")


def test_shiftdc_begins_at_ten_of_thirty_two_and_acts_once(data: FitData) -> None:
    deep = wrap_vlm(tiny_model(n_layers=16), tiny_processor(), model_id="deep")
    engine = TransformersEngine(deep)
    for positions in ("last_prompt", "last"):
        defense = fitted(engine, data, "shiftdc", positions=positions)
        part = defense.intervene(engine, SEEN, ["", ""])[0]
        assert [edit.layer for edit in part.edits] == list(range(5, 16))
        assert part.positions == positions


def test_safety_prompt_stands_before_the_request() -> None:
    asked = make_defense("safety_prompt").rewrite(Scripted(), [SEEN[0], UNSEEN])  # type: ignore[arg-type]
    assert asked == [Request(f"{SAFETY_PROMPT}\n{SEEN[0].text}", SEEN[0].images), UNSEEN]
    assert SAFETY_PROMPT.count("!") == 1


def test_coca_contrasts_rows_with_an_image(engine: TransformersEngine) -> None:
    defense = make_defense("coca", {"coca": {"alpha": 1.5, "principle": "Be safe."}})
    contrast = defense.contrast(engine, [SEEN[0], UNSEEN])
    second = Request(f"Be safe.\n{SEEN[0].text}", SEEN[0].images)
    assert contrast == Contrast((second, None), 1.5)
    assert defense.contrast(engine, [UNSEEN]) is None
    replies = respond(engine, defense, [*SEEN, UNSEEN], SHORT)
    pairs = [Request(f"Be safe.\n{r.text}", r.images) for r in SEEN]
    expected = engine.answer(SEEN, (), SHORT, contrast=Contrast(tuple(pairs), 1.5))
    assert replies == [*expected, *engine.answer([UNSEEN], (), SHORT)]


def test_coca_at_weight_one_is_the_prompt_itself(engine: TransformersEngine) -> None:
    coca = make_defense("coca", {"coca": {"alpha": 1.0}})
    prompt = make_defense("safety_prompt")
    assert respond(engine, coca, SEEN, SHORT) == respond(engine, prompt, SEEN, SHORT)
    off = make_defense("coca", {"coca": {"alpha": 0}})
    plain = respond(engine, make_defense("none"), SEEN, SHORT)
    assert respond(engine, off, SEEN, SHORT) == plain


def test_an_engine_without_contrasts_says_so() -> None:
    class Remote:
        name, contrasts = "remote", False

        def answer(self, requests: Any, *more: Any, **options: Any) -> list[Reply]:
            return [Reply("x", 1) for _ in requests]

    with pytest.raises(EngineError, match="'remote' cannot decode two conversations"):
        respond(Remote(), make_defense("coca"), SEEN, SHORT)  # type: ignore[arg-type]
    assert respond(Remote(), make_defense("coca"), [UNSEEN], SHORT) == [Reply("x", 1)]  # type: ignore[arg-type]


def test_one_contrast_to_a_stack(engine: TransformersEngine, data: FitData) -> None:
    stack = make_defense("coca+refusal_direction")
    stack.fit(engine, data)
    single = make_defense("coca").contrast(engine, SEEN)
    assert stack.contrast(engine, SEEN) == single
    assert respond(engine, stack, SEEN, SHORT) != respond(engine, make_defense("coca"), SEEN, SHORT)
    with pytest.raises(InputError, match="coca and coca each decode a second conversation"):
        Stack([make_defense("coca"), make_defense("coca")]).contrast(engine, SEEN)

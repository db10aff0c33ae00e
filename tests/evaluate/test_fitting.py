"""Fitted defences, and vectors that come from `cmrm extract`."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

from cmrm import Sample, estimate_shift, generate
from cmrm.defenses import FitData, make_defense
from cmrm.defenses.cmrm import CmrmDataset
from cmrm.engines.base import Engine
from cmrm.errors import ArtifactError, InputError
from cmrm.evaluate.defended import built_defense
from cmrm.evaluate.fitting import fit_defenses
from cmrm.evaluate.logs import read_cells
from cmrm.evaluate.provider import shared_engine
from cmrm.evaluate.run import evaluate
from cmrm.shift.artifact import Artifact
from cmrm.steering.setting import Steering
from evaluate.plans import COLOURS, anchors, picture, quiet, small_plan, small_set
from tiny import vlm_of

pytestmark = pytest.mark.usefixtures("no_models_left")


def test_variants_that_steer_otherwise_are_fitted_once(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[str] = []
    fit = CmrmDataset.fit

    def counted(self: CmrmDataset, engine: Engine, data: FitData) -> None:
        fits.append(self.name)
        fit(self, engine, data)

    monkeypatch.setattr(CmrmDataset, "fit", counted)
    names = ("cmrm_dataset@paper", "cmrm_dataset@calibrated", "cmrm_dataset@mean")
    settings = {"cmrm_dataset@mean": {"estimator": "mean"}}
    plan = small_plan(checkpoint, defenses=names, settings=settings)
    fit_defenses(plan, shared_engine(checkpoint), tmp_path)
    assert fits == ["cmrm_dataset@paper", "cmrm_dataset@mean"]
    assert {file.stem for file in tmp_path.iterdir()} == set(names)


def test_a_shift_of_extract_is_used_as_it_recommends(checkpoint: str, tmp_path: Path) -> None:
    engine = shared_engine(checkpoint)
    shift = replace(
        estimate_shift(vlm_of(engine), anchors().harmful, estimator="mean"),
        recommended=Steering(alpha=0.4, layers=(1,)),
    )
    names = ("cmrm_dataset", "cmrm_dataset@paper", "cmrm_dataset@weak")
    plan = small_plan(
        checkpoint, defenses=names, anchors=None, shift=shift,
        settings={"cmrm_dataset@weak": {"alpha": 0.1}},
    )  # fmt: skip
    results = evaluate(plan, tmp_path, say=quiet)
    settings = {cell["defense"]: cell["settings"] for cell in results["cells"]}
    fields = ("alpha", "layers", "schedule", "estimator")
    shown = {name: tuple(settings[name][field] for field in fields) for name in names}
    assert shown == {
        "cmrm_dataset": (0.4, [1], "telescoped", "mean"),
        "cmrm_dataset@paper": (1.0, None, "per_layer", "mean"),
        "cmrm_dataset@weak": (0.1, [1], "telescoped", "mean"),
    }
    steered = generate(
        vlm_of(engine), list(small_set().samples), shift=shift, max_new_tokens=5, batch_size=2
    )
    (cell,) = (cell for cell in read_cells(tmp_path / "logs") if cell.defense == names[0])
    replies = {outcome.sample_id: outcome.reply for outcome in cell.outcomes.values()}
    assert replies == {generation.sample_id: generation.text for generation in steered}
    other = replace(plan, shift=replace(shift, vectors=2 * shift.vectors))
    with pytest.raises(InputError, match=r"holds another run \(settings of cmrm_dataset,"):
        evaluate(other, tmp_path, say=quiet)


def test_a_shift_of_other_weights_is_refused(checkpoint: str, tmp_path: Path) -> None:
    vlm = vlm_of(shared_engine(checkpoint))
    shift = estimate_shift(vlm, anchors().harmful)
    with torch.no_grad():
        next(vlm.model.parameters()).data.add_(1.0)
    with pytest.raises(ArtifactError, match="does not fit"):
        evaluate(small_plan(checkpoint, shift=shift), tmp_path, say=quiet)
    assert not (tmp_path / "plan.json").exists()


def test_fitted_state_is_an_artifact_and_of_its_weights_alone(
    checkpoint: str, tmp_path: Path
) -> None:
    plan = small_plan(checkpoint, defenses=("shiftdc", "cmrm_dataset"))
    engine = shared_engine(checkpoint)
    fit_defenses(plan, engine, tmp_path)
    for name in ("shiftdc", "cmrm_dataset"):
        artifact = Artifact.load(tmp_path / f"{name}.safetensors")
        assert artifact.identity is not None
    with torch.no_grad():
        next(vlm_of(engine).model.parameters()).data.add_(1.0)
    with pytest.raises(ArtifactError, match="does not fit"):
        fit_defenses(plan, engine, tmp_path)


def test_a_shift_without_a_defence_that_takes_it(checkpoint: str) -> None:
    shift = estimate_shift(vlm_of(shared_engine(checkpoint)), anchors().harmful)
    with pytest.raises(InputError, match="a shift belongs to the defence cmrm_dataset"):
        small_plan(checkpoint, defenses=("ecso",), shift=shift)


def many(kind: str) -> list[Sample]:
    return [
        Sample(f"{kind}{k}", f"A {kind} matter {k}?", picture(COLOURS[k % 5])) for k in range(10)
    ]


def test_fill_and_gated_take_the_artifact_each_with_its_own_setting(
    checkpoint: str, tmp_path: Path
) -> None:
    engine = shared_engine(checkpoint)
    shift = replace(
        estimate_shift(vlm_of(engine), many("harmful"), many("benign"), false_alarms=0.1),
        recommended=Steering(alpha=0.6, operator="fill", layers=(2,)),
    )
    names = ("cmrm_dataset", "cmrm_dataset@paper", "cmrm_fill", "cmrm_gated", "cmrm_gated@more")
    plan = small_plan(
        checkpoint, defenses=names, anchors=None, shift=shift,
        settings={"cmrm_gated@more": {"alpha": 0.4, "false_alarms": 0.3}},
    )  # fmt: skip
    results = evaluate(plan, tmp_path, say=quiet)
    settings = {cell["defense"]: cell["settings"] for cell in results["cells"]}
    fields = ("alpha", "operator", "schedule", "layers", "gate", "false_alarms")
    shown = {name: tuple(settings[name][field] for field in fields) for name in names}
    assert shown == {
        "cmrm_dataset": (0.6, "fill", "telescoped", [2], False, 0.1),
        "cmrm_dataset@paper": (1.0, "add", "per_layer", None, False, 0.1),
        "cmrm_fill": (0.6, "fill", "telescoped", [2], False, 0.1),
        "cmrm_gated": (1.0, "add", "sequential", None, True, 0.1),
        "cmrm_gated@more": (0.4, "add", "sequential", None, True, 0.3),
    }
    gates = {
        name: Artifact.load(tmp_path / "fitted" / f"{name}.safetensors").gate
        for name in ("cmrm_gated", "cmrm_gated@more")
    }
    low, high = (gate.threshold for gate in gates.values() if gate is not None)
    assert high < low, "more false alarms, a lower threshold"
    steered = generate(
        vlm_of(engine), list(small_set().samples), shift=shift, max_new_tokens=5, batch_size=2
    )
    (cell,) = (cell for cell in read_cells(tmp_path / "logs") if cell.defense == "cmrm_fill")
    replies = {outcome.sample_id: outcome.reply for outcome in cell.outcomes.values()}
    assert replies == {generation.sample_id: generation.text for generation in steered}


def test_what_an_artifact_does_not_hold_is_named_with_the_defence(checkpoint: str) -> None:
    shift = estimate_shift(vlm_of(shared_engine(checkpoint)), anchors().harmful)
    for name, missing in (("cmrm_fill", "refusal direction"), ("cmrm_gated", "gate")):
        with pytest.raises(InputError, match=f"{name} cannot use the artifact: .* no {missing}"):
            small_plan(checkpoint, defenses=(name,), shift=shift)
    fitted = estimate_shift(vlm_of(shared_engine(checkpoint)), many("harmful"), many("benign"))
    with pytest.raises(InputError, match="say gate_kind 'cosine', the shift was estimated with"):
        small_plan(checkpoint, defenses=("cmrm_gated@cosine",), shift=fitted, anchors=None)


def test_variants_of_a_gated_defence_share_the_gate(checkpoint: str, tmp_path: Path) -> None:
    names = ("cmrm_gated@a", "cmrm_gated@b")
    settings = {"cmrm_gated@a": {"alpha": 0.2}, "cmrm_gated@b": {"alpha": 0.4}}
    plan = small_plan(
        checkpoint, defenses=names, settings=settings,
        anchors=FitData(many("harmful"), many("benign"), 4),
    )  # fmt: skip
    fit_defenses(plan, shared_engine(checkpoint), tmp_path)
    first, second = (Artifact.load(tmp_path / f"{name}.safetensors").gate for name in names)
    assert first is not None
    assert second is not None
    assert first.key == second.key


@pytest.mark.parametrize(
    ("name", "settings", "harmful", "benign"),
    [
        ("cmrm_dataset", {}, ["harmful", "more"], None),
        ("cmrm_dataset", {"mixed": True}, ["harmful"], ["benign", "more"]),
        ("cmrm_fill", {}, ["harmful"], ["benign"]),
        ("cmrm_gated", {}, ["harmful"], ["benign"]),
    ],
)
def test_further_anchors_are_never_taken_for_harmful_ones(
    name: str, settings: dict[str, Any], harmful: list[str], benign: list[str] | None
) -> None:
    """Direction and gate would learn that questions of a utility set are harmful."""
    data = FitData(many("harmful"), many("benign"), more=many("more"))
    part = make_defense(name, {name: settings})
    assert isinstance(part, CmrmDataset)
    first, second = part.anchors_of(data)
    kinds = {"harmful": data.harmful, "benign": data.benign, "more": data.more}
    assert list(first) == [sample for kind in harmful for sample in kinds[kind]]
    assert (None if second is None else list(second)) == (
        None if benign is None else [sample for kind in benign for sample in kinds[kind]]
    )


@pytest.mark.parametrize(
    ("harmful", "benign", "problem"),
    [
        (3, 10, "3 harmful and 10 benign anchors were given"),
        (10, 0, "10 harmful and 0 benign anchors were given"),
    ],
)
def test_too_few_anchors_for_a_gate_are_refused_before_the_model_is_loaded(
    harmful: int, benign: int, problem: str
) -> None:
    few = FitData(many("harmful")[:harmful], many("benign")[:benign])
    with pytest.raises(InputError, match=problem):
        small_plan("no/such-model", defenses=("cmrm_gated",), anchors=few)
    blind = [replace(sample, image=None) for sample in many("benign")]
    with pytest.raises(InputError, match="10 of 10 benign anchors have no image"):
        small_plan(
            "no/such-model", defenses=("cmrm_fill",), anchors=FitData(many("harmful"), blind)
        )


def test_a_recommendation_of_nothing_warns_in_the_provider(checkpoint: str, tmp_path: Path) -> None:
    shift = replace(
        estimate_shift(vlm_of(shared_engine(checkpoint)), anchors().harmful),
        recommended=Steering(alpha=0.0),
    )
    file = str(shift.save(tmp_path / "shift.safetensors"))
    engine = shared_engine(checkpoint)
    with pytest.warns(UserWarning, match="cmrm_dataset leaves the model as it is"):
        built_defense(engine, "cmrm_dataset", {}, shift=file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built = built_defense(engine, "cmrm_dataset", {}, shift=file, alpha=0.5)
    assert built.settings["alpha"] == 0.5

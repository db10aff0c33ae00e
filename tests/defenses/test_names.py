"""Defences by name: variants, stacks, settings, and those of third parties."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import cmrm.defenses as registry
from cmrm import Sample
from cmrm.defenses import Defense, FitData, Stack, defense_names, make_defense, register
from cmrm.engines.base import Engine
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import ArtifactError, InputError
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request


def test_the_known_defences() -> None:
    assert set(defense_names()) == {
        "none", "caption", "safety_prompt", "adashield_s", "ecso", "coca", "cmrm_dataset",
        "cmrm_sample", "cmrm_fill", "cmrm_gated", "shiftdc", "null_space", "refusal_direction",
        "astra", "jrs_rem", "alphasteer", "cast",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings", "problem"),
    [
        ("nonsense", {}, "unknown defence 'nonsense'"),
        ("cmrm_dataset+cmrm_dataset", {}, "twice"),
        ("cmrm_dataset@paper+cmrm_dataset@calibrated", {}, "twice"),
        ("cmrm_dataset", {"cmrm_dataset": {"strength": 1}}, "no setting strength|does not take"),
        ("cmrm_dataset", {"cmrm_dataset": {"estimator": "x"}}, "estimator is 'x'"),
        ("cmrm_sample", {"cmrm_sample": {"alpha": -0.1}}, "alpha is -0.1"),
        ("cmrm_sample", {"cmrm_sample": 0.3}, "expected a mapping"),
        ("cmrm_sample", {"cmrm_sample": {"alpha": True}}, "alpha is True"),
        ("cmrm_sample", {"cmrm_sample": {"preserve_norm": "false"}}, "preserve_norm is 'false'"),
        ("cmrm_sample", {"cmrm_sample": {"corruption": "blnk"}}, "corruption is 'blnk'"),
        ("cmrm_sample", {"cmrm_sample": {"corruption": "other"}}, "choose another corruption"),
        ("cmrm_sample", {"cmrm_sample": {"layers": "0-13"}}, "layers are '0-13'"),
        ("cmrm_sample@weak", {"cmrm_sample@weak": {"alpha": -0.1}}, "alpha is -0.1"),
        ("refusal_direction", {"refusal_direction": {"layer": "x"}}, "layer is 'x'"),
        ("refusal_direction", {"refusal_direction": {"alpha": -1}}, "alpha is -1"),
        ("shiftdc", {"shiftdc": {"first_layer": 0.5}}, "first_layer is 0.5"),
        ("shiftdc", {"shiftdc": {"positions": "all"}}, "positions is 'all'"),
        ("null_space", {"null_space": {"layers": [0.5]}}, "layers are"),
        ("null_space", {"null_space": {"rank": 0}}, "rank is 0"),
        ("null_space", {"null_space": {"rank": True}}, "rank is True"),
        ("astra", {"astra": {"alpha": -1.0}}, "alpha is -1.0"),
        ("astra", {"astra": {"layer": "20"}}, "layer is '20'"),
        ("jrs_rem", {"jrs_rem": {"threshold": 1.5}}, "threshold is 1.5"),
        ("jrs_rem", {"jrs_rem": {"threshold": "0.2"}}, "threshold is '0.2'"),
        ("alphasteer", {"alphasteer": {"share": 1.0}}, "share is 1.0"),
        ("alphasteer", {"alphasteer": {"ridge": 0}}, "ridge is 0"),
        ("alphasteer", {"alphasteer": {"alpha": -0.4}}, "alpha is -0.4"),
        ("cast", {"cast": {"false_alarms": 0}}, "false_alarms is 0"),
        ("cast", {"cast": {"alpha": -1}}, "alpha is -1"),
        ("coca", {"coca": {"alpha": -0.5}}, "alpha is -0.5"),
        ("coca", {"coca": {"principle": " "}}, "principle is empty"),
        ("cmrm_gated", {"cmrm_gated": {"gate_kind": "linear"}}, "gate_kind is 'linear'"),
        ("cmrm_dataset@weak", {}, "'cmrm_dataset@weak' has no settings.*cmrm_dataset@paper"),
        ("ecso@weak", {}, "'ecso@weak' has no settings: pass them"),
        ("cmrm_dataset@", {}, "names no variant"),
        ("cmrm_dataset@a b", {}, "names no variant"),
        ("nonsense@paper", {}, "unknown defence 'nonsense@paper'"),
    ],
)
def test_bad_names_and_settings(
    name: str, settings: dict[str, dict[str, object]], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        make_defense(name, settings)


def test_variants_stand_side_by_side(vlm: VLM, anchors: list[Sample], tmp_path: Path) -> None:
    settings = {
        "cmrm_dataset": {"alpha": 0.5},
        "cmrm_dataset@weak": {"alpha": 0.1},
        "cmrm_dataset@paper": {"alpha": 0.2},
    }
    made = {name: make_defense(name, settings) for name in settings}
    assert [defense.name for defense in made.values()] == list(made)
    alphas = [defense.settings["alpha"] for defense in made.values()]
    assert alphas == [0.5, 0.1, 0.2], "each has its own"
    schedules = [defense.settings["schedule"] for defense in made.values()]
    assert schedules == ["telescoped", "telescoped", "per_layer"]
    assert make_defense("cmrm_sample@paper").settings["positions"] == "all", "needs no settings"
    weak, engine = made["cmrm_dataset@weak"], TransformersEngine(vlm)
    weak.fit(engine, FitData(anchors, [], 2))
    weak.save(tmp_path / "w.safetensors", engine)
    with pytest.raises(ArtifactError, match="no fitted cmrm_dataset"):
        made["cmrm_dataset"].load(tmp_path / "w.safetensors", engine)
    stack = make_defense("adashield_s+cmrm_sample@paper")
    assert isinstance(stack, Stack)
    assert set(stack.settings) == {"adashield_s", "cmrm_sample@paper"}


def test_a_third_party_registers_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_KNOWN", dict(registry._KNOWN))

    @register
    class Shout(Defense):
        name = "shout"
        source = "test"

        def rewrite(self, engine: Engine, requests: Sequence[Request]) -> list[Request]:
            return [Request(request.text.upper()) for request in requests]

    shout = make_defense("shout")
    assert shout.rewrite(None, [Request("How?")]) == [Request("HOW?")]  # type: ignore[arg-type]

    with pytest.raises(InputError, match="two defences are called 'shout'"):

        @register
        class Other(Defense):
            name = "shout"

    with pytest.raises(InputError, match="needs a name without"):

        @register
        class Unnamed(Defense):
            name = "a+b"


def test_an_entry_point_that_is_no_defence_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def point_to(value: str) -> None:
        point = EntryPoint("theirs", value, "cmrm.defenses")
        monkeypatch.setattr(registry, "entry_points", lambda group: [point])

    for value, problem in (
        ("json:dumps", "is no cmrm.defenses.Defense"),
        ("no_such_module:X", "cannot be loaded"),
    ):
        point_to(value)
        with pytest.raises(InputError, match=problem):
            defense_names()
    point_to("cmrm.defenses.base:NoDefense")
    assert "theirs" in defense_names()

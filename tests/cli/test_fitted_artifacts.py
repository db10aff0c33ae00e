"""`inspect`, `generate` and `diagnose` on artifacts with gate, refusal direction and sequential
vectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.commands import json_of, output, refused, run
from cmrm import ShiftVectors, Steering
from cmrm.shift.gap import upper_half

Stored = Callable[..., Path]


@pytest.fixture
def image(both_kinds: tuple[Path, Path]) -> Path:
    return both_kinds[0].parent / "harmful0.png"


@pytest.fixture
def stored(fitted: Path, tmp_path: Path) -> Stored:
    """The fitted artifact with another recommended setting, or without a part."""

    def made(**changes: Any) -> Path:
        return replace(ShiftVectors.load(fitted), **changes).save(tmp_path / "other.safetensors")

    return made


def no_gap(path: Path) -> dict[str, Any]:
    """Changes of an artifact that make it one that found no gap."""
    records = dict(ShiftVectors.load(path).records)
    records["gap"] = {
        **records["gap"],
        "reason": "there is no gap to close: nothing is recommended",
    }
    return {"recommended": Steering(alpha=0.0), "records": records}


def test_inspect_shows_gate_gap_and_recommendation(fitted: Path, stored: Stored) -> None:
    text = output("inspect", fitted)
    for words in (
        "gate: threshold", "gate: false alarms", "5.0 % wanted", "gate: recall", "gate AUC",
        "not measured (--questions", "gap: reason", "tensor sequential", "benign_share",
    ):  # fmt: skip
        assert words in text
    fill = stored(recommended=Steering(operator="fill"))
    assert "fill along the refusal direction, decoder layers 1-2, alpha 1" in output(
        "inspect", fill
    )
    gated = stored(recommended=Steering(schedule="sequential", gate=True))
    assert "where the gate opens" in output("inspect", gated)
    assert "nothing (alpha 0)" in output("inspect", stored(recommended=Steering(alpha=0.0)))


def test_inspect_says_where_the_setting_does_not_fit_the_artifact(stored: Stored) -> None:
    lost = stored(recommended=Steering(operator="fill"), others={})
    assert "cannot be used with: the artifact holds no refusal direction" in output("inspect", lost)


def test_inspect_json_has_gate_and_records(fitted: Path, artifact: Path) -> None:
    content = json_of("inspect", fitted, "--json")
    assert content["gate"]["kind"] == "linear"
    assert len(content["records"]["gate"]["auc"]) == 3
    assert content["records"]["gap"]["low"] <= content["records"]["gap"]["high"]
    plain = json_of("inspect", artifact, "--json")
    assert (plain["gate"], plain["records"]) == (None, {})
    assert "gate" not in output("inspect", artifact).replace("recommended gate", "")


def test_generate_says_what_was_used_and_whether_the_gate_opened(
    checkpoint: str, image: Path, stored: Stored
) -> None:
    shift = ShiftVectors.load(stored())
    assert shift.gate is not None
    low, high = (
        replace(shift.gate, threshold=threshold, vectors=0 * shift.gate.vectors, bias=0.0)
        for threshold in (-1.0, 1.0)
    )
    command = ("generate", checkpoint, "hello", "--image", image, "--max-new-tokens", 4, "--json")
    plain = json_of(*command)
    assert plain["gate_open"] is None
    for gate, opened in ((low, True), (high, False)):
        file = stored(gate=gate, recommended=Steering(operator="fill"))
        content = json_of(*command, "--shift", file, "--schedule", "sequential", "--gate",
                          "--alpha", 30)  # fmt: skip
        steering = content["steering"]
        assert (steering["operator"], steering["schedule"]) == ("add", "sequential")
        assert (steering["gate"], steering["alpha"]) == (True, 30)
        assert steering["layers"] == list(shift.provenance.sequential_layers)
        assert content["gate_open"] is opened
        assert (content["reply"] == plain["reply"]) is not opened


def test_fill_by_option_and_by_recommendation(
    checkpoint: str, image: Path, fitted: Path, stored: Stored
) -> None:
    command = ("generate", checkpoint, "hello", "--image", image, "--max-new-tokens", 3, "--json")
    by_option = json_of(*command, "--shift", stored(recommended=Steering(alpha=0.2)),
                        "--operator", "fill")  # fmt: skip
    assert by_option["steering"]["operator"] == "fill"
    assert by_option["steering"]["layers"] == list(upper_half(3))
    assert by_option["steering"]["alpha"] == 1.0, "0.2 was chosen for vectors"
    recommended = json_of(*command, "--shift", stored(recommended=Steering(operator="fill")))
    assert recommended == by_option


def test_false_alarms_move_the_gate(checkpoint: str, image: Path, fitted: Path) -> None:
    command = ("generate", checkpoint, "hello", "--image", image, "--shift", fitted,
               "--max-new-tokens", 2)  # fmt: skip
    output(*command, "--gate", "--alpha", 1, "--false-alarms", 0.2)
    assert "are recorded for false alarms of" in refused(*command, "--false-alarms", 0.07)
    assert "between 0 and 1" in refused(*command, "--false-alarms", 2)
    assert "the setting has none; add --gate" in refused(
        *command, "--no-gate", "--false-alarms", 0.2
    )


def test_a_recommendation_of_nothing_is_said(
    checkpoint: str, image: Path, data: Path, fitted: Path, stored: Stored
) -> None:
    file = stored(**no_gap(fitted))
    generate = ("generate", checkpoint, "hello", "--image", image, "--max-new-tokens", 2)
    said = run(*generate, "--shift", file)
    assert said.stderr.count("the artifact recommends alpha 0: there is no gap to close") == 1
    assert "--shift leaves the model as it is" in said.stderr
    assert said.stdout == run(*generate).stdout
    assert (
        "steered all the same: --shift at alpha 2"
        in run(*generate, "--shift", file, "--alpha", 2).stderr
    )
    diagnose = (
        "diagnose",
        checkpoint,
        "--data",
        data,
        "--max-new-tokens",
        2,
        "--judges",
        "keyword",
    )
    assert "--shift leaves the model as it is" in run(*diagnose, "--shift", file).stderr
    assert "recommends" not in run(*diagnose, "--shift", stored(recommended=Steering())).stderr


def test_diagnose_takes_fill_and_a_gated_setting(
    checkpoint: str, data: Path, stored: Stored
) -> None:
    command = ("diagnose", checkpoint, "--data", data, "--max-new-tokens", 2, "--judges", "keyword")
    for setting in (Steering(operator="fill"), Steering(schedule="sequential", gate=True)):
        results = json_of(*command, "--shift", stored(recommended=setting), "--json")
        used = results["settings"]["steering"]
        assert (used["operator"], used["gate"]) == (setting.operator, setting.gate)
        assert used["layers"]


def test_what_an_artifact_does_not_hold(
    checkpoint: str, image: Path, artifact: Path, fitted: Path, tmp_path: Path
) -> None:
    """Refused before the model is loaded: `no model` is none."""
    command = ("generate", tmp_path / "no model", "hello", "--image", image, "--shift")
    assert "holds no refusal direction" in refused(*command, artifact, "--operator", "fill")
    assert "holds no gate" in refused(*command, artifact, "--gate")
    assert "--benign" in refused(*command, artifact, "--gate")
    assert "no vectors of the schedule sequential" in refused(
        *command, artifact, "--schedule", "sequential"
    )
    lowest = ShiftVectors.load(fitted).provenance.sequential_layers[0]
    assert "were estimated for decoder layers" in refused(
        *command, fitted, "--schedule", "sequential", "--layers", lowest - 1
    )
    assert "does not stand above it" in refused(
        *command, fitted, "--operator", "fill", "--gate", "--layers", "0-2"
    )
    for option in (["--gate"], ["--operator", "fill"], ["--schedule", "sequential"]):
        sample = ("generate", checkpoint, "q", "--image", image, "--sample-level", *option)
        assert "name an artifact with --shift" in refused(*sample)
    assert "go with --shift" in refused("generate", checkpoint, "q", "--gate")


def test_an_artifact_of_an_older_version(
    checkpoint: str, image: Path, artifact: Path, tmp_path: Path
) -> None:
    """The first format: vectors, a setting of five fields, the hash of the config."""
    from safetensors.torch import save_file

    shift = ShiftVectors.load(artifact)
    old = {"n_benign", "benign_hash", "benign_share", "sequential_layers"}
    content = json_of("inspect", artifact, "--json")
    made = {name: v for name, v in content["provenance"].items() if name not in old}
    setting = {name: v for name, v in content["recommended"].items()
               if name not in ("operator", "gate")}  # fmt: skip
    header = {"format": "cmrm-shift/1", "provenance": made, "recommended": setting}
    file = tmp_path / "old.safetensors"
    save_file({"vectors": shift.vectors}, str(file), metadata={"cmrm": json.dumps(header)})
    with pytest.warns(UserWarning, match="written by an older cmrm"):
        shown = output("inspect", file)
    assert "recommended operator" in shown
    generate = ("generate", checkpoint, "q", "--image", image, "--shift", file)
    with pytest.warns(UserWarning, match="written by an older cmrm"):
        assert "holds no gate" in refused(*generate, "--gate")

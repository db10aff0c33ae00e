"""`cmrm doctor`: what is there, what is missing, and the line that brings it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from cli.commands import json_of, output, run
from cmrm.cli import doctor as doctor_module


def test_a_whole_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMRM_CACHE", str(tmp_path))
    monkeypatch.delenv("CMRM_DATA", raising=False)
    lines = {line["subject"]: line for line in json_of("doctor", "--json")["lines"]}
    assert lines["torch"]["good"] is True
    assert lines["extra eval"]["good"] is True
    assert lines["demo VLM"]["good"] is None
    assert "not set" in lines["named sets"]["text"]
    assert "next: cmrm demo" in output("doctor")


def test_what_is_missing_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cmrm.cli.doctor.find_spec", lambda name: None if name == "optuna" else find_spec(name)
    )
    monkeypatch.setenv("CMRM_DATA", str(tmp_path / "nothing"))
    result = run("doctor", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["broken"] == ["named sets"]
    lines = {line["subject"]: line for line in document["lines"]}
    assert lines["extra tune"]["good"] is None
    assert lines["extra tune"]["remedy"] == "pip install 'cmrm[tune]'"
    assert "optuna" in lines["extra tune"]["text"]
    monkeypatch.setattr(
        doctor_module, "_installed", lambda name: None if name == "torch" else "0.1"
    )
    assert "torch" in json.loads(run("doctor", "--json").stdout)["broken"]


def test_an_untested_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, good in (("0.32.1", True), ("0.40.0", False), (None, None)):
        monkeypatch.setattr(doctor_module, "_installed", lambda name, found=found: found)
        assert doctor_module._vllm().good is good

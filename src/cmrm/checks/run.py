"""Run the contract on a loaded VLM (`cmrm check MODEL`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch

from cmrm.checks.contract import CHECKS, Broken, NotApplicable
from cmrm.model.vlm import VLM


class Outcome(StrEnum):
    """What a check found."""

    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True)
class Finding:
    """One check's result."""

    name: str
    """What holds if it passed."""
    outcome: Outcome
    """Pass, fail, or skip (the model cannot be asked this)."""
    detail: str
    """A figure, or the reason."""


def run_checks(vlm: VLM, *, on_check: Callable[[Finding], None] | None = None) -> list[Finding]:
    """All checks in order. An exception inside a check is a failure of that check, with its message, and the next one runs."""
    findings = []
    for name, check in CHECKS.items():
        try:
            with torch.inference_mode():
                finding = Finding(name, Outcome.PASS, check(vlm))
        except NotApplicable as reason:
            finding = Finding(name, Outcome.SKIP, str(reason))
        except Broken as error:
            finding = Finding(name, Outcome.FAIL, str(error))
        except Exception as error:  # whatever a stranger's model raises is a finding, never the end of the report
            lines = str(error).strip().splitlines() or [""]
            finding = Finding(name, Outcome.FAIL, f"{type(error).__name__}: {lines[0]}")
        findings.append(finding)
        if on_check is not None:
            on_check(finding)
    return findings


def failed(findings: list[Finding]) -> list[Finding]:
    """The findings that failed."""
    return [f for f in findings if f.outcome is Outcome.FAIL]

"""Every clause of the contract, run on a loaded VLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch

from cmrm.checks import gated, states, steered
from cmrm.checks.clauses import Broken, NotApplicable
from cmrm.model.vlm import VLM

CHECKS: dict[str, Callable[[VLM], str]] = {
    "decoder layers are found and counted": states.layers,
    "image tokens stand exactly where a condition has an image": states.conditions,
    "capture equals a plain forward": states.capture_is_plain_forward,
    "padding does not change a state": states.padding,
    "a text-only prompt is the same beside one with image": states.mixing,
    "states by a shared prefix equal those of whole forwards": states.shared_prefix,
    "a zero vector is the untouched model": steered.zero_vector,
    "a small alpha moves the logits a little": steered.small_alpha,
    "rows without image are untouched in a mixed, padded batch": steered.gating,
    "what is added is alpha v, at the chosen layer and position": steered.schedules,
    "prompts with several images": states.several_images,
    "image behind the text": states.image_behind_text,
    "generation with KV cache equals generation without": steered.cache,
    "gate and positions last through generation": steered.generated_rows,
    "two conversations in turn are steered as each is alone": steered.two_conversations,
    "a second turn behind a filled cache is steered": steered.second_turn,
    "leaving restores the model": steered.restored,
    "sample level gives each row its own vector": states.sample_level,
    "a closed gate is the untouched model, an open one steers as no gate": gated.gate,
    "fill raises the coordinate to that of the text, and never lowers it": gated.fill,
    "sequential vectors bring the anchors' mean state to that of text": gated.sequential,
    "artifact round trip, and refusal of another model": states.artifact,
    "every condition generates": states.all_conditions_generate,
}


class Outcome(StrEnum):
    """Outcome of a check."""

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
    """All checks in order. An exception inside a check is a failure of that check, and the next one
    runs."""
    findings = []
    for name, check in CHECKS.items():
        try:
            with torch.inference_mode():
                finding = Finding(name, Outcome.PASS, check(vlm))
        except NotApplicable as reason:
            finding = Finding(name, Outcome.SKIP, str(reason))
        except Broken as error:
            finding = Finding(name, Outcome.FAIL, str(error))
        except (
            Exception
        ) as error:  # whatever a stranger's model raises is a finding, never the end of the report
            lines = str(error).strip().splitlines() or [""]
            finding = Finding(name, Outcome.FAIL, f"{type(error).__name__}: {lines[0]}")
        findings.append(finding)
        if on_check is not None:
            on_check(finding)
    return findings


def failed(findings: list[Finding]) -> list[Finding]:
    """The findings that failed."""
    return [f for f in findings if f.outcome is Outcome.FAIL]

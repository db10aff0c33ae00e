"""The figures of the demo VLM's model card, measured on the whole test split."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer

from cmrm.demo.levels import untouched
from cmrm.demo.loop import VQA, Bench, visual_questions
from cmrm.demo.settings import FULL
from cmrm.demo.vlm import load_demo
from cmrm.engines.transformers import TransformersEngine
from cmrm.prompts.conditions import FIVE, Condition
from cmrm.prompts.ours import prompt_samples


def print_card() -> None:
    """Print one JSON line for each figure: untouched model, test split, greedy decoding."""
    bench = Bench(TransformersEngine(load_demo()), FULL)
    harmful, benign = prompt_samples("test", "harmful"), prompt_samples("test", "benign")
    for condition in FIVE:
        unsafe = bench.rates(bench.cell(harmful, untouched(), condition))["unsafe"]
        _print(f"unsafe/{condition.value}", unsafe)
    for condition in (Condition.QUERY, Condition.ORIGINAL):
        refused = bench.rates(bench.cell(benign, untouched(), condition))["over_refusal"]
        _print(f"over_refusal/{condition.value}", refused)
    questions = visual_questions("test", FULL.vqa)
    accuracy = bench.rates(bench.cell(questions, untouched(), name=VQA))["accuracy"]
    _print("easy_vqa/test", accuracy)


def _print(figure: str, rate: Mapping[str, Any]) -> None:
    typer.echo(json.dumps({"figure": figure, **rate}))

"""The figures of the demo VLM's model card, measured on the whole test split."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import typer

from cmrm.prompts.conditions import FIVE, Condition
from cmrm.demo.vlm import load_demo_vlm
from cmrm.demo.ledger import Ledger
from cmrm.demo.measure import Bench, Defense
from cmrm.prompts.ours.samples import prompt_samples, vqa_samples
from cmrm.demo.settings import FULL


def print_card() -> None:
    """One JSON line per figure: untouched model, test split, greedy."""
    vlm = load_demo_vlm()
    untouched = Defense("none", None, None)
    harmful, benign = prompt_samples("test", "harmful"), prompt_samples("test", "benign")
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(vlm, Ledger(Path(scratch), {}), FULL)
        for condition in FIVE:
            rate = bench.unsafe(harmful, condition, untouched).to_json("unsafe_rate")
            typer.echo(json.dumps({"figure": f"unsafe/{condition.value}", **rate}))
        for condition in (Condition.QUERY, Condition.ORIGINAL):
            refused = bench.over_refusal(benign, condition, untouched).to_json("over_refusal")
            typer.echo(json.dumps({"figure": f"over_refusal/{condition.value}", **refused}))
        accuracy = bench.vqa_accuracy(vqa_samples("test", n=FULL.vqa), untouched).to_json("accuracy")
        typer.echo(json.dumps({"figure": "easy_vqa/test", **accuracy}))

"""`results.json` of a run, made from its logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmrm.evaluate.folder import Folder
from cmrm.evaluate.logs import read_cells
from cmrm.measure.agreement import agreement_between, rated_of, read_labels
from cmrm.measure.examples import examples_of
from cmrm.measure.fluency import FluencyStore
from cmrm.measure.outcomes import Cell
from cmrm.measure.schema import checked, read_results
from cmrm.measure.table import results_of
from cmrm.measure.validation import corrections_in


def measured(out: Path, cells: Sequence[Cell], *, seed: int) -> dict[str, Any]:
    """What the logs of a run say: rates, agreement of its judges and a person, examples.

    Labels in the folder correct the rates for the judges' errors.
    """
    perplexity = FluencyStore(Folder(out).fluency).perplexities(cells, seed=seed)
    rated, labels = rated_of(cells), read_labels(out)
    corrections = corrections_in(out, rated, labels, seed=seed)
    return {
        **results_of(cells, seed=seed, perplexity=perplexity, corrections=corrections),
        "agreement": agreement_between(rated, labels),
        "examples": examples_of(cells),
    }


def refreshed(out: Path) -> dict[str, Any]:
    """The results of a finished run, with its logs and labels as they are now.

    Raises:
        InputError: there are no results or no logs, or they are damaged.
    """
    results = read_results(Folder(out).results)
    cells = read_cells(Folder(out).logs)
    return checked({**results, **measured(out, cells, seed=results["seed"])})

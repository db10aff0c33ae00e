"""The notebook runs from its first cell to its last, and says what it has measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook needs the extra `dev`")
nbclient = pytest.importorskip("nbclient", reason="the notebook needs the extra `dev`")

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "tour.ipynb"


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.skipif(not NOTEBOOK.is_file(), reason="the notebook is not beside the tests")
def test_the_notebook(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is kept without outputs"
    nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    rates = {
        name.strip(): float(rate) for name, rate in re.findall(r"^(.{28}) +([\d.]+) %", text, re.M)
    }
    assert rates["unsafe, as text"] < rates["unsafe, with its image"], "the image costs something"
    assert rates["unsafe, image + recommended"] < rates["unsafe, with its image"]
    assert rates["unsafe, image + gated"] < rates["unsafe, with its image"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "a figure is drawn"

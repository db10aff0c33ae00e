"""After `cmrm demo` in CI: every promised file is there, whole, and the rates are rates."""

import sys
from pathlib import Path

from cmrm.measure.schema import read_results

out = Path(sys.argv[1])
results = read_results(out / "results.json")
cells = {(cell["set"], cell["condition"], cell["defense"]): cell for cell in results["cells"]}
untouched = [condition for name, condition, defense in cells if (name, defense) == ("demo", "none")]
assert sorted(untouched) == ["blank", "caption", "noise", "original", "query"]
for defense in ("none", "cmrm_dataset", "cmrm_sample", "cmrm_fill", "cmrm_gated"):
    assert ("demo", "original", defense) in cells
    assert cells["easy-vqa", "original", defense]["accuracy"]["n"] > 0
for (name, _, _), cell in cells.items():
    if name == "demo":
        rate = cell["judges"]["keyword"]["unsafe"]
        assert rate["n"] > 0
        assert 0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1
assert all(gap["low"] <= gap["value"] <= gap["high"] for gap in results["gaps"])
for figure in ("unsafe_rate", "alpha_sweep", "pca", "distances", "categories", "shift"):
    assert (out / f"{figure}.png").stat().st_size > 5000
page = (out / "report.html").read_text(encoding="utf-8")
assert page.rstrip().endswith("</html>")
assert "http://" not in page
assert "https://" not in page
assert (out / "table.md").read_text(encoding="utf-8").startswith("| input |")
print("results and report are whole")

"""After `cmrm demo` in CI: every promised file is there, whole, and the rates are rates."""

import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
results = json.loads((out / "results.json").read_text())
cells = [*results["conditions"].values(), *results["defenses"].values()]
assert len(results["conditions"]) == 5
assert set(results["defenses"]) == {"none", "cmrm_dataset", "cmrm_sample"}
assert all(0 <= c["low"] <= c["unsafe_rate"] <= c["high"] <= 1 and c["n"] > 0 for c in cells)
assert all((out / f"{name}.png").stat().st_size > 5000 for name in ("unsafe_rate", "alpha_sweep", "pca", "distances"))
page = (out / "report.html").read_text()
assert page.rstrip().endswith("</html>")
assert "http" not in page.split("</style>")[1].split("base64")[0]
print("results and report are whole")

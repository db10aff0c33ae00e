"""Run every benchmark, print its JSON lines, and rewrite `benchmarks/RESULTS.md`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (
    "extraction", "sample_level", "fill", "joint", "decode", "memory", "evaluate", "judges",
    "peers",
)  # fmt: skip
TARGETS = {
    "extraction_ratio": "<= 0.10",
    "sample_ttft_ratio": "<= 1.12",
    "fill_ttft_ratio": "<= 1.06",
    "fill_ttft_ratio_one_row": "<= 1.10",
    "decode_ratio_hooks": ">= 0.98",
    "decode_ratio_folded": ">= 0.995",
    "extraction_memory_growth": "<= 1.05",
    "evaluate_ratio": ">= 0.95",
    "judge_small_replies_per_second": ">= 50",
}


def main() -> None:
    """All of them, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tiny", action="store_true", help="tiny models, no RESULTS.md: do they still run?"
    )
    parser.add_argument(
        "--only",
        choices=SCRIPTS,
        action="append",
        help="these alone; others keep their lines in RESULTS.md",
    )
    options = parser.parse_args()
    stored = HERE / "results.json"
    lines = (
        {}
        if options.tiny or not stored.exists()
        else json.loads(stored.read_text(encoding="utf-8"))
    )
    for name in options.only or SCRIPTS:
        command = [sys.executable, str(HERE / f"{name}.py"), *(["--tiny"] if options.tiny else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                print(line, flush=True)
                figure = json.loads(line)
                lines[figure["figure"]] = {**figure, "date": datetime.now(UTC).date().isoformat()}
    if not options.tiny:
        stored.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
        (HERE / "RESULTS.md").write_text(table(lines), encoding="utf-8")


def table(lines: dict[str, dict[str, object]]) -> str:
    """The lines as a page."""
    rows = []
    for name, figure in lines.items():
        machine = figure["machine"]
        assert isinstance(machine, dict)
        spread = (
            f"{figure['low']} to {figure['high']} over {figure['pairs']} pairs"
            if "low" in figure
            else ""
        )
        rows.append(
            f"| {name} | {figure['value']} | {TARGETS.get(name, '')} | {spread} | "
            f"{machine['cores']} cores {machine['machine']}, "
            f"torch {machine['torch']}, {figure['date']} |"
        )
    return (
        "# Benchmarks\n\nWritten by `just bench` (`python benchmarks/run.py`). Each script says in "
        "its first line what it measures; "
        "ratios are medians of interleaved pairs in one process.\n\n| figure | value | target | "
        "spread | machine |\n"
        "|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    main()

"""`extraction_memory_growth`: peak memory above the model, N = many / N = few anchors, each in a
process of its own."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Iterator

from common import random_llava, report

from cmrm import Sample, estimate_shift


def synthetic(n: int) -> Iterator[Sample]:
    """`n` anchors that are made as they are read, all before one image."""
    from PIL import Image

    image = Image.new("RGB", (336, 336), "red")
    for k in range(n):
        yield Sample(f"synthetic-{k}", f"Tell me about number {k}", image)


def measure(n: int) -> None:
    """In the child: peak of the process above what it holds with the model loaded, in KiB."""
    vlm = random_llava(tiny=True)
    with open("/proc/self/status") as handle:
        loaded = next(int(line.split()[1]) for line in handle if line.startswith("VmRSS"))
    estimate_shift(vlm, synthetic(n), batch_size=16)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"n": n, "peak_kib": peak - loaded}))


def main() -> None:
    """Print the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", type=int, default=1_000)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--tiny", action="store_true", help="few anchors: does it still run?")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options.child)
        return
    sizes = (20, 60) if options.tiny else (options.few, options.many)
    peaks = {}
    for n in sizes:
        done = subprocess.run(
            [sys.executable, __file__, "--child", str(n)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[n] = json.loads(done.stdout.strip().splitlines()[-1])["peak_kib"]
    value = peaks[sizes[1]] / max(1, peaks[sizes[0]])
    report("extraction_memory_growth", {"value": round(value, 4)}, peak_kib=peaks, target=1.05)


if __name__ == "__main__":
    main()

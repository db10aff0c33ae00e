"""`sample_ttft_ratio`: sample level, time to first token / bare, 576 image tokens, warm prefixes; a batch of 8, and one row.

Every call asks something else: what is kept of the last single prompt would shorten its repetition.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

from common import anchors, arguments, paired_ratio, random_llava, report

from cmrm import Sample, SampleLevel, Steering, generate


def main() -> None:
    """Print the figure."""
    given = arguments(__doc__, pairs=15)
    vlm = random_llava(tiny=given.tiny)
    setting = Steering(alpha=0.5)
    for name, rows in (("sample_ttft_ratio", 2 if given.tiny else 8), ("sample_ttft_ratio_one_row", 1)):
        held = sorted(anchors(64), key=lambda s: len(s.query))
        sets = [held[k : k + rows] for k in range(0, len(held), rows)]

        def bare(calls: Iterator[list[Sample]] = cycle(sets)) -> None:  # noqa: B008
            generate(vlm, next(calls), max_new_tokens=1)

        def steered(calls: Iterator[list[Sample]] = cycle(sets)) -> None:  # noqa: B008
            generate(vlm, next(calls), shift=SampleLevel(), steering=setting, max_new_tokens=1)

        found = paired_ratio(steered, bare, pairs=1 if given.tiny else given.pairs)
        report(name, found, rows=rows, target=1.12)


if __name__ == "__main__":
    main()

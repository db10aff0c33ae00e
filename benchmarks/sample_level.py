"""`sample_ttft_ratio`: sample level, time to first token / bare, 576 image tokens, warm prefixes.

A batch of 8 requests, and one row. Every call asks something else: what is kept of the last single
prompt would shorten its repetition. The engine keeps the prefixes between calls, as a server does.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

from common import anchors, arguments, paired_ratio, random_llava, report

from cmrm import Sample, SampleLevel, Steering, generate
from cmrm.engines.transformers import TransformersEngine


def main() -> None:
    """Print the figure."""
    options = arguments(__doc__, pairs=15)
    engine = TransformersEngine(random_llava(tiny=options.tiny))
    setting = Steering(alpha=0.5)
    batch = 2 if options.tiny else 8
    for name, rows in (("sample_ttft_ratio", batch), ("sample_ttft_ratio_one_row", 1)):
        samples = sorted(anchors(64), key=lambda s: len(s.query))
        sets = [samples[k : k + rows] for k in range(0, len(samples), rows)]

        def bare(calls: Iterator[list[Sample]] = cycle(sets)) -> None:  # noqa: B008
            generate(engine, next(calls), max_new_tokens=1)

        def steered(calls: Iterator[list[Sample]] = cycle(sets)) -> None:  # noqa: B008
            generate(engine, next(calls), shift=SampleLevel(), steering=setting, max_new_tokens=1)

        ratio = paired_ratio(steered, bare, pairs=1 if options.tiny else options.pairs)
        report(name, ratio, rows=rows, target=1.12)


if __name__ == "__main__":
    main()

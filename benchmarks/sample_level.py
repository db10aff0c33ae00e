"""`sample_ttft_ratio`: sample level, time to first token / bare, 576 image tokens, warm prefixes; a batch of 8, and one row."""

from __future__ import annotations

from common import anchors, arguments, paired_ratio, random_llava, report

from cmrm import Sample, SampleLevel, Steering, generate


def main() -> None:
    """Print the figure."""
    given = arguments(__doc__, pairs=15)
    vlm = random_llava(tiny=given.tiny)
    setting = Steering(alpha=0.5)
    for name, rows in (("sample_ttft_ratio", 2 if given.tiny else 8), ("sample_ttft_ratio_one_row", 1)):
        samples = anchors(rows)

        def bare(samples: list[Sample] = samples) -> None:
            generate(vlm, samples, max_new_tokens=1)

        def steered(samples: list[Sample] = samples) -> None:
            generate(vlm, samples, shift=SampleLevel(), steering=setting, max_new_tokens=1)

        found = paired_ratio(steered, bare, pairs=1 if given.tiny else given.pairs)
        report(name, found, rows=rows, target=1.12)


if __name__ == "__main__":
    main()

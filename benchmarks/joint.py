"""`joint_pass_ratio`: text-only and corrupted image in one pass / in two, warm prefixes, by number
of requests."""

from __future__ import annotations

from common import anchors, arguments, paired_ratio, random_llava, report

import cmrm.shift.pair
import cmrm.shift.prefix
from cmrm.prompts.conditions import build_requests
from cmrm.shift.pair import PrefixPair
from cmrm.shift.prefix import SharedPrefix


def main() -> None:
    """Print the figure for each number of requests, and the tokens that were run."""
    options = arguments(__doc__, pairs=9)
    vlm = random_llava(tiny=options.tiny)
    cmrm.shift.pair.JOINT_TOKENS = 10**9
    pair = PrefixPair(vlm, SharedPrefix(vlm), SharedPrefix(vlm))
    samples = anchors(8)
    for n in (1, 2) if options.tiny else (1, 2, 3, 4, 8):
        text, corrupted = (
            list(build_requests(samples[:n], condition)) for condition in ("query", "blank")
        )

        def joint(text: list = text, corrupted: list = corrupted) -> None:  # type: ignore[type-arg]
            pair.apart = None
            pair.states(text, corrupted)

        def apart(text: list = text, corrupted: list = corrupted) -> None:  # type: ignore[type-arg]
            pair.apart = "measured"
            pair.states(text, corrupted)

        joint()
        before = pair.text.fresh_tokens + pair.corrupted.fresh_tokens
        joint()
        tokens = pair.text.fresh_tokens + pair.corrupted.fresh_tokens - before
        ratio = paired_ratio(joint, apart, pairs=1 if options.tiny else options.pairs)
        report(f"joint_pass_ratio_{n}", ratio, requests=n, tokens=tokens)


if __name__ == "__main__":
    main()

"""`extraction_ratio`: both conditions of N anchors / a bare forward (`lm_head` included) of the
same 2 N inputs."""

from __future__ import annotations

import torch
from common import anchors, arguments, paired_ratio, random_llava, report
from flops import block_flops, head_flops, vision_flops

from cmrm import estimate_shift
from cmrm.model.encode import encode
from cmrm.prompts.conditions import build_requests
from cmrm.shift.prefix import SharedPrefix


def main() -> None:
    """Print the figure, the share of tokens that were run, and the limit that the shapes set."""
    options = arguments(__doc__, anchors=128, batch_size=8, pairs=3)
    n, size = (4, 2) if options.tiny else (options.anchors, options.batch_size)
    vlm, samples = random_llava(tiny=options.tiny), anchors(n)
    samples.sort(key=lambda s: len(s.query))
    batches = []
    for condition in ("query", "blank"):
        requests = list(build_requests(samples, condition))
        batches += [encode(vlm, requests[k : k + size]) for k in range(0, n, size)]

    @torch.inference_mode()
    def bare() -> None:
        for inputs in batches:
            vlm.model(**inputs, use_cache=False)

    def extraction() -> None:
        estimate_shift(vlm, samples, batch_size=size)

    ratio = paired_ratio(extraction, bare, pairs=1 if options.tiny else options.pairs)
    report("extraction_ratio", ratio, anchors=n, batch_size=size, target=0.10)
    shape, width = vlm.model.config.text_config, vlm.hidden_size
    image = vision_flops(vlm.model.config.vision_config, width)
    needed = bare_flops = 0.0
    run = whole = 0
    for condition in ("query", "blank"):
        runner = SharedPrefix(vlm)
        requests = list(build_requests(samples, condition))
        for k in range(0, n, size):
            runner.states(requests[k : k + size])
        run, whole = run + runner.fresh_tokens, whole + runner.whole_tokens
        seen = image if condition == "blank" else 0.0
        needed += seen + block_flops(shape, runner.tokens)
        for request in requests:
            length = encode(vlm, [request])["input_ids"].shape[1]
            needed += block_flops(shape, length - runner.tokens, runner.tokens)
            bare_flops += seen + block_flops(shape, length) + head_flops(shape, length)
    report(
        "extraction_token_share",
        {"value": round(run / whole, 4)},
        tokens_run=run,
        tokens_of_all_prompts=whole,
        note="tokens run by the backbone, padding and probe included / tokens of all prompts",
    )
    report(
        "extraction_flops_limit",
        {"value": round(needed / bare_flops, 4)},
        needed=needed,
        bare=bare_flops,
        note="from the shapes: every prefix once and every query once / all prompts whole",
    )


if __name__ == "__main__":
    main()

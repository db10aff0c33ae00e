"""`fill_ttft_ratio`: fill, time to first token / bare, 576 image tokens, warm prefix.

A batch of 8 requests, and one row (`fill_ttft_ratio_one_row`). What fill adds is one pass over the
text of each request behind the cached system prompt. Every call asks something else: what is kept
of the last single prompt would shorten its repetition. The engine keeps the prefix between calls,
as a server does.
"""

from __future__ import annotations

import torch
from common import arguments, first_token_ratios, random_llava

from cmrm import ShiftVectors, Steering
from cmrm.engines.transformers import TransformersEngine
from cmrm.model.identity import identity_of
from cmrm.model.vlm import VLM
from cmrm.shift.artifact import Provenance

TARGETS = {"fill_ttft_ratio": 1.06, "fill_ttft_ratio_one_row": 1.10}


def random_artifact(vlm: VLM) -> ShiftVectors:
    """An artifact with a random refusal direction: what it holds does not change the time."""
    shape = (vlm.n_layers, vlm.hidden_size)
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = Provenance(vlm.model_id, None, type(vlm.model).__name__, shape[1], shape[0])
    others = {"direction": direction}
    return ShiftVectors(torch.zeros(shape), made, others=others, identity=identity_of(vlm))


def main() -> None:
    """Print both figures."""
    options = arguments(__doc__, pairs=15)
    vlm = random_llava(tiny=options.tiny)
    engine, artifact = TransformersEngine(vlm), random_artifact(vlm)
    setting = Steering(operator="fill")
    first_token_ratios(
        engine, "fill_ttft_ratio", TARGETS, options, shift=artifact, steering=setting
    )


if __name__ == "__main__":
    main()

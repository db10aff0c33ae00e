"""A gate behind a KV cache that was cut back."""

from __future__ import annotations

import torch
from PIL import Image

from cmrm.model.compat import cache_of, with_cache
from cmrm.model.encode import encode
from cmrm.prompts.conditions import Request
from cmrm.steering.hooks import intervene
from steering.gates import four_layers, gated, scores_of


@torch.no_grad()
def test_a_request_behind_a_cropped_cache_is_decided_anew() -> None:
    """What was asked before, in as many tokens, had its own decision."""
    model = four_layers()
    first = encode(model, [Request("what is it", (Image.new("RGB", (16, 16), "red"),))])
    ids = first["input_ids"]
    start = int((ids[0] == model.image_token_id).nonzero().max()) + 1
    changed = {**first, "input_ids": ids.clone()}
    changed["input_ids"][0, start:] = (ids[0, start:] + 5) % 90
    talks = sorted((first, changed), key=lambda inputs: float(scores_of(model, inputs)[0]))
    closed, opened = talks
    middle = sum(float(scores_of(model, inputs)[0]) for inputs in talks) / 2
    for before, after, is_open in ((closed, opened, 1), (opened, closed, 0)):
        with intervene(model, gated(model, middle)) as alone:
            expected = model.model(**after).logits[:, -1]
        assert alone.rows_open == is_open
        with intervene(model, gated(model, middle)) as session:
            cache = cache_of(model.model(**before, use_cache=True))
            cache.crop(start - ids.shape[1])
            rest = after["input_ids"][:, start:]
            found = model.model(input_ids=rest, **with_cache(model.model, cache)).logits[:, -1]
        assert (session.rows_decided, session.rows_open) == (2, 1)
        assert torch.allclose(found, expected, atol=1e-4)

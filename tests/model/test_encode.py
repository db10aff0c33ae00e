"""Image tokens of the conditions."""

from __future__ import annotations

from PIL import Image

from cmrm import Sample
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import FIVE, build_request

SAMPLE = Sample("one", "What is this?", Image.new("RGB", (30, 20), "red"), caption="A red wall.")


def test_image_tokens_are_there_exactly_when_the_condition_has_an_image(vlm: VLM) -> None:
    for condition in FIVE:
        ids = encode(vlm, [build_request(SAMPLE, condition)])["input_ids"]
        assert int((ids == vlm.image_token_id).sum()) == (4 if condition.has_image else 0)

"""What Inspect finds by the entry point `inspect_ai`: the model provider."""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="cmrm")
def cmrm() -> type[ModelAPI]:
    """`cmrm/<model>`, loaded when it is first used."""
    from cmrm.evaluate.provider import CmrmAPI

    return CmrmAPI

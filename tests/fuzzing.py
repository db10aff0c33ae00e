"""Bodies that schemathesis draws from a server's own schema, and what a server answers to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from pydantic import BaseModel

FEW_TOKENS = 4


def statuses(
    address: str,
    path: str,
    body: type[BaseModel],
    key: str,
    *,
    changed: Callable[[dict[str, Any]], None],
    examples: int = 100,
) -> list[int]:
    """Status of each of many requests, valid or not.

    Args:
        address: of the server, without `/v1`.
        path: asked by POST.
        body: its request body.
        key: sent as bearer.
        changed: changes a body in place, so that it is not refused at once.
        examples: number of bodies.
    """
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    components = schema.pop("$defs", {})
    document = {
        "openapi": "3.1.0", "info": {"title": "a server", "version": "1"},
        "components": {"schemas": {**components, "Body": schema}},
        "paths": {path: {"post": {
            "requestBody": {"required": True, "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/Body"}}
            }},
            "responses": {"200": {"description": "a reply"}},
        }}},
    }  # fmt: skip
    operation = schemathesis.openapi.from_dict(document)[path]["POST"]
    codes: list[int] = []

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy())
    def run(case: Any) -> None:
        sent = case.body
        if isinstance(sent, dict):
            for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
                if type(sent.get(name)) is int and sent[name] > FEW_TOKENS:
                    sent[name] = FEW_TOKENS
            changed(sent)
        response = case.call(
            base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=60
        )
        codes.append(response.status_code)

    run()
    return codes


def show(body: dict[str, Any], picture: str) -> None:
    """Put a picture, a data URI, in the place of every address of an image."""
    for message in body.get("messages") or ():
        parts = message.get("content") if isinstance(message, dict) else None
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict) and isinstance(part.get("image_url"), dict):
                part["image_url"]["url"] = picture

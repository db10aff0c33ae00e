"""Fixtures of the tests of endpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from judges.endpoints import Endpoint


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    from judges.endpoints import serving

    with serving() as server:
        yield server


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that the judge makes, in seconds; none is waited for."""
    seconds: list[float] = []
    monkeypatch.setattr("cmrm.judges.endpoint.time.sleep", seconds.append)
    return seconds

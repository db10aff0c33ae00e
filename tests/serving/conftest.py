"""The tiny model, once for all tests of vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from serving.models import Model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from serving.models import build

    return build(tmp_path_factory.mktemp("vllm"))

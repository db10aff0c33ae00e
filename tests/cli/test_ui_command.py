"""`cmrm ui`: what it refuses before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the playground needs the extra `ui`")

from cli.commands import refused


def test_what_is_refused(tmp_path: Path) -> None:
    base = ("ui", tmp_path / "model", "--shift", tmp_path / "none.safetensors")
    assert "can be reached from other machines" in refused(*base, "--host", "0.0.0.0")
    for auth in ("user", "user:", ":password1", "user:short"):
        assert "USER:PASSWORD" in refused(*base, "--auth", auth)
    assert "within 1..65535" in refused(*base, "--port", 0)
    assert "at least 1" in refused(*base, "--max-new-tokens", 0)
    assert "name an artifact with --shift" in refused("ui", tmp_path / "model")
    assert "unknown judge" in refused(*base, "--judge", "nobody")
    assert "none.safetensors" in refused(*base)
    assert "none.safetensors" in refused(
        *base, "--host", "0.0.0.0", "--auth", "user:a long password"
    )

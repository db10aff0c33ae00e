"""`serve_p95_ratio`: 95th percentile of the time to a whole reply, `cmrm serve` / vLLM's server.

Each request has an image of its own, and the harm gate is armed. `serve_p95_ratio_fill`: `fill`
is, which runs each image request's text first. `serve_p95_ratio_same_image`: the gate again; all
have the same image, whose cached blocks both servers share, the armed one up to the last prompt
token.

Run it in vLLM's environment: `DIR/bin/python benchmarks/serve_latency.py` (tools/vllm_env.sh DIR).
All servers run at once and are asked by turns, so that the others are idle while one is measured. A
random LLaVA of SmolLM2's sizes; every other request carries an image.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
from common import arguments, random_llava, report
from openai import OpenAI
from PIL import Image

from cmrm.engines.vllm.checkpoint import readable_by_vllm
from cmrm.prompts.images import data_uri
from serving import DTYPE, armed_artifact

AT_ONCE = 4
"""Requests at a time."""
FILL = ("--operator", "fill", "--alpha", "1", "--positions", "last_prompt", "--no-gate")
"""Setting of the server that fills."""
PATIENCE = 400.0
"""Seconds in which a server has to be ready."""


def main() -> None:
    """Print the figures."""
    options = arguments(__doc__, pairs=5, requests=16, tokens=32)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        vlm = random_llava(tiny=options.tiny)
        vlm.model.save_pretrained(root / "model")
        vlm.processor.save_pretrained(root / "model")
        armed_artifact(vlm, root / "shift.safetensors")
        for name in ("CMRM_SHIFT", "CMRM_STEERING"):
            os.environ.pop(name, None)
        os.environ["CMRM_CACHE"] = str(root / "cache")
        del vlm
        measure(root, options)


def measure(root: Path, options: Any) -> None:
    """All servers, by turns."""
    ports = [free_port() for _ in range(3)]
    common = ["--dtype", DTYPE, "--enforce-eager", "--max-model-len", "2048"]
    bare = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model",
        str(readable_by_vllm(root / "model")), "--served-model-name", "m", "--host", "127.0.0.1",
        "--port", str(ports[0]), *common,
    ]  # fmt: skip
    serve = [
        sys.executable, "-m", "cmrm", "serve", str(root / "model"), "--shift",
        str(root / "shift.safetensors"), "--name", "m", "--port",
    ]  # fmt: skip
    gated = [*serve, str(ports[1]), "--", *common]
    filled = [*serve, str(ports[2]), *FILL, "--", *common]
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    processes = []
    with (root / "log.txt").open("wb") as log:
        try:
            for command, port in zip((bare, gated, filled), ports, strict=True):
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
                wait(processes[-1], f"http://127.0.0.1:{port}/health")
            addresses = [f"http://127.0.0.1:{port}/v1" for port in ports]
            compare([OpenAI(base_url=address, api_key="none") for address in addresses], options)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(60)


def compare(clients: list[OpenAI], options: Any) -> None:
    """Print the median over pairs of the ratio of both 95th percentiles, for each server and kind
    of load."""
    bare, gated, filled = clients
    draw = np.random.default_rng(0)

    def fresh() -> str:
        pixels = draw.integers(0, 256, (336, 336, 3), dtype=np.uint8)
        return data_uri(Image.fromarray(pixels))

    same = fresh()
    figure_of("serve_p95_ratio", fresh, [bare, gated], options)
    figure_of("serve_p95_ratio_fill", fresh, [bare, filled], options)
    figure_of("serve_p95_ratio_same_image", lambda: same, [bare, gated], options)


def figure_of(figure: str, picture: Callable[[], str], clients: list[OpenAI], options: Any) -> None:
    """Print one figure; `picture` gives the image of each request, as a data URI."""
    n = 4 if options.tiny else options.requests
    pairs = 1 if options.tiny else options.pairs

    def ask(client: OpenAI, k: int, uri: str) -> float:
        content: list[Any] = [{"type": "text", "text": f"Tell me of the number {k}."}]
        if k % 2:
            content.insert(0, {"type": "image_url", "image_url": {"url": uri}})
        start = time.perf_counter()
        client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": content}], temperature=0,
            max_tokens=options.tokens, extra_body={"ignore_eos": True},
        )  # fmt: skip
        return time.perf_counter() - start

    def p95(client: OpenAI) -> float:
        uris = [picture() for _ in range(n)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            seconds = list(pool.map(lambda k: ask(client, k, uris[k]), range(n)))
        return float(np.percentile(seconds, 95))

    for client in clients:
        p95(client)
    ratios, times = [], []
    for k in range(pairs):
        order = (0, 1) if k % 2 else (1, 0)
        seconds = {place: p95(clients[place]) for place in order}
        ratios.append(seconds[1] / seconds[0])
        times.append((seconds[0], seconds[1]))
    ratio = {
        "value": round(statistics.median(ratios), 4), "low": round(min(ratios), 4),
        "high": round(max(ratios), 4), "pairs": pairs,
        "seconds": [round(statistics.median(t[k] for t in times), 3) for k in (0, 1)],
    }  # fmt: skip
    facts = {"requests": n, "tokens": options.tokens, "at_once": AT_ONCE, "dtype": DTYPE}
    report(figure, ratio, **facts, target=1.08)


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(process: subprocess.Popen[bytes], address: str) -> None:
    """Until the server is ready."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit("a server ended before it was ready")
        try:
            with urllib.request.urlopen(address, timeout=20):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise SystemExit("a server does not get ready")


if __name__ == "__main__":
    main()

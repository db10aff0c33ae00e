"""`vllm_throughput_ratio`, `vllm_text_ratio`: tokens a second in vLLM, armed / plugin absent.

Run it in vLLM's environment: `DIR/bin/python benchmarks/serving.py` (tools/vllm_env.sh DIR). One
process, both ways by turns: without the plugin means that its wrappers call vLLM's own methods and
nothing else. A random LLaVA of SmolLM2's sizes, bfloat16 (float32 on a CPU that would emulate it),
eager; mixed load: every other request
carries an image; the harm gate is armed.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.update({
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING",
})  # fmt: skip

import json

import torch
from common import arguments, paired_ratio, random_llava, report

from cmrm import ShiftVectors, Steering
from cmrm.model.compat import emulates_bfloat16
from cmrm.model.identity import identity_of
from cmrm.model.vlm import VLM
from cmrm.shift.artifact import Provenance
from cmrm.steering.gate import Gate

DTYPE = "float32" if emulates_bfloat16() else "bfloat16"
TARGETS = {"vllm_throughput_ratio": 0.97, "vllm_text_ratio": 0.99}


def armed_artifact(vlm: VLM, path: Path) -> None:
    """Random vectors, and a gate that opens for about half of the requests."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn((vlm.n_layers, vlm.hidden_size), generator=draw)
    made = Provenance(
        vlm.model_id, None, type(vlm.model).__name__, vlm.hidden_size, vlm.n_layers
    )  # fmt: skip
    read = vlm.n_layers // 2
    gate = Gate("linear", (read,), torch.randn((1, vlm.hidden_size), generator=draw), 0.0)
    setting = Steering(alpha=0.05, gate=True, layers=tuple(range(read + 1, vlm.n_layers)))
    direction = torch.randn((vlm.n_layers, vlm.hidden_size), generator=draw)
    shift = ShiftVectors(
        vectors, made, setting, {"direction": direction}, gate=gate, identity=identity_of(vlm)
    )
    shift.save(path)
    os.environ |= {"CMRM_SHIFT": str(path), "CMRM_STEERING": json.dumps(setting.to_json())}


class Switch:
    """Takes the plugin away from a running engine, and gives it back."""

    def __init__(self, llm: Any) -> None:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self.kind = GPUModelRunner
        self.layers = {
            layer: layer.cmrm_step
            for layer in runner.model.modules()
            if hasattr(layer, "cmrm_step")
        }
        self.armed = GPUModelRunner._preprocess
        closure = self.armed.__closure__ or ()
        self.plain = next(
            cell.cell_contents
            for cell in closure
            if getattr(cell.cell_contents, "__name__", "") == "_preprocess"
        )

    def set(self, on: bool) -> None:
        """Armed, or as without the plugin."""
        self.kind._preprocess = self.armed if on else self.plain
        for layer, step in self.layers.items():
            layer.cmrm_step = step if on else None


def main() -> None:
    """Print both figures."""
    options = arguments(__doc__, pairs=5)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        vlm = random_llava(tiny=options.tiny)
        vlm.model.save_pretrained(root / "model")
        vlm.processor.save_pretrained(root / "model")
        armed_artifact(vlm, root / "shift.safetensors")
        os.environ["CMRM_CACHE"] = str(root / "cache")
        del vlm
        measure(root, options)


def measure(root: Path, options: Any) -> None:
    """Both loads, both ways."""
    from PIL import Image
    from vllm import LLM, SamplingParams

    from cmrm.engines.vllm.checkpoint import readable_by_vllm

    llm = LLM(
        model=str(readable_by_vllm(root / "model")), dtype=DTYPE, enforce_eager=True,
        max_model_len=2048, limit_mm_per_prompt={"image": 1}, enable_prefix_caching=False,
    )  # fmt: skip
    switch = Switch(llm)
    n, tokens = (4, 4) if options.tiny else (8, 32)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    image = Image.new("RGB", (336, 336), "red")

    def load(mixed: bool) -> list[list[dict[str, Any]]]:
        made = []
        for k in range(n):
            parts: list[dict[str, Any]] = [{"type": "text", "text": f"Tell me of the number {k}."}]
            if mixed and k % 2:
                parts.insert(0, {"type": "image_pil", "image_pil": image})
            made.append([{"role": "user", "content": parts}])
        return made

    for figure, mixed in (("vllm_throughput_ratio", True), ("vllm_text_ratio", False)):
        conversations = load(mixed)

        def run(on: bool, asked: Any = conversations) -> None:
            switch.set(on)
            llm.chat(asked, params, use_tqdm=False)

        # Time of the plain run over that of the armed one is the ratio of their throughputs.
        ratio = paired_ratio(
            lambda: run(False), lambda: run(True), pairs=1 if options.tiny else options.pairs
        )
        report(figure, ratio, requests=n, tokens=tokens, dtype=DTYPE, target=TARGETS[figure])


if __name__ == "__main__":
    main()

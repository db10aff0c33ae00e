"""Replies of vLLM in a process of its own: `python worker.py SPEC.json OUT.json`.

SPEC: `model`, `options` (of `vllm.LLM`), `rounds`: lists of requests that are sent together. A
request has `text` or `messages`, `image` (a colour), `max_tokens`, `extra` (of SamplingParams).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update({
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING",
})  # fmt: skip


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted: list[str] = []
    original = Scheduler._preempt_request

    def preempt(self: Any, request: Any, *args: Any, **more: Any) -> Any:
        preempted.append(request.request_id)
        return original(self, request, *args, **more)

    Scheduler._preempt_request = preempt
    options = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 1024,
        "enable_prefix_caching": False, "limit_mm_per_prompt": {"image": 2},
    }  # fmt: skip
    llm = LLM(model=spec["model"], **{**options, **spec.get("options", {})})

    def conversation(request: dict[str, Any]) -> list[dict[str, Any]]:
        if "messages" in request:
            turns = [dict(turn) for turn in request["messages"]]
        else:
            turns = [{"role": "user", "content": request["text"]}]
        if request.get("image"):
            first = next(turn for turn in turns if turn["role"] == "user")
            image = Image.new("RGB", (64, 64), request["image"])
            first["content"] = [
                {"type": "image_pil", "image_pil": image},
                {"type": "text", "text": first["content"]},
            ]
        return turns

    rounds = []
    for requests in spec["rounds"]:
        params = [
            SamplingParams(
                temperature=0, max_tokens=request.get("max_tokens", 8), logprobs=1,
                extra_args=request.get("extra"), ignore_eos=True,
            )
            for request in requests
        ]  # fmt: skip
        outputs = llm.chat([conversation(request) for request in requests], params, use_tqdm=False)
        rounds.append([
            {
                "cached": output.num_cached_tokens or 0,
                "prompt": len(output.prompt_token_ids or ()),
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [
                    next(iter(step.values())).logprob for step in output.outputs[0].logprobs or ()
                ],
            }
            for output in outputs
        ])  # fmt: skip
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    state = getattr(runner, "cmrm_state", None)
    counts = None if state is None else state.counts
    Path(sys.argv[2]).write_text(
        json.dumps({"rounds": rounds, "counts": counts, "preempted": preempted})
    )


if __name__ == "__main__":
    main()

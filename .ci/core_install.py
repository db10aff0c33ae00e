"""What `pip install .` alone gives: extract, inspect, generate and check on a tiny random LLaVA."""

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from families import llava

EXTRAS = ("peft", "gguf", "easy_vqa", "sklearn", "scipy", "matplotlib", "inspect_ai", "pandas")


def cmrm(*arguments: str, fails: bool = False) -> str:
    """Run a command; its output, or its error where it must fail."""
    done = subprocess.run(["cmrm", *arguments], capture_output=True, text=True)
    assert (done.returncode != 0) == fails, f"cmrm {arguments[0]}: {done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr if fails else done.stdout


def main() -> None:
    """Run the commands in a folder of its own."""
    present = [name for name in EXTRAS if find_spec(name)]
    assert not present, f"this environment is no core install: it has {present}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, processor = llava()
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        rows = []
        for k in range(6):
            Image.new("RGB", (40, 30), (40 * k, 90, 200)).save(folder / f"{k}.png")
            rows.append(json.dumps({"id": str(k), "query": f"question {k}", "image": f"{k}.png"}))
        (folder / "anchors.jsonl").write_text("\n".join(rows), encoding="utf-8")
        checkpoint, shift = str(folder / "model"), str(folder / "shift.safetensors")
        cmrm("extract", checkpoint, "--anchors", str(folder / "anchors.jsonl"), "-o", shift)
        assert json.loads(cmrm("inspect", shift, "--json"))
        image = str(folder / "0.png")
        asked = ("What is on the table?", "--image", image, "--max-new-tokens", "4", "--json")
        assert json.loads(cmrm("generate", checkpoint, *asked, "--shift", shift))
        assert json.loads(cmrm("check", checkpoint, "--json"))
    missing = cmrm("demo", fails=True)
    assert "pip install 'cmrm[demo]'" in missing, missing
    missing = cmrm("evaluate", "demo", "--sets", "demo", fails=True)
    assert "pip install 'cmrm[eval]'" in missing, missing
    print("the core install gives extract, inspect, generate and check, and names the extras")


if __name__ == "__main__":
    main()

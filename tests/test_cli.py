"""The commands, on a tiny model saved to disk, in this process; what they print and how they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

import cmrm.cli.main as main_module
from cmrm import ShiftVectors
from cmrm.cli.options import parse_layers, sparkline
from cmrm.errors import CmrmError, InputError
from conftest import tiny_model, tiny_processor
from families import byte_tokenizer, text_settings


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for k, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (20 + k, 16), colour).save(folder / f"{colour}.png")
        rows.append({"query": f"Tell me about {colour}", "image": f"{colour}.png", "caption": f"a {colour} wall",
                     "label": "benign" if k % 2 else "harmful"})  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "rows.jsonl"


def run(*args: object) -> Result:
    return CliRunner().invoke(main_module.app, [str(a) for a in args])


def refused(*args: object) -> str:
    """The message of the error that the command raises; `run()` in main prints it as one line and exits with 2."""
    result = run(*args)
    assert isinstance(result.exception, CmrmError), result.output
    return str(result.exception)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("shift") / "shift.safetensors"
    result = run("extract", checkpoint, "--anchors", data, "-o", target, "--alpha", 0.5, "--layers", "0-1", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["data"]["n"] == 4
    assert found["provenance"]["n_anchors"] == 4
    return target


def test_extract_stores_the_recommended_use(artifact: Path) -> None:
    held = ShiftVectors.load(artifact)
    assert (held.recommended.alpha, held.recommended.layers) == (0.5, (0, 1))
    assert held.provenance.estimator == "pca"


def test_inspect(artifact: Path) -> None:
    shown = run("inspect", artifact)
    assert shown.exit_code == 0
    assert "recommended alpha" in shown.output
    assert any(c in shown.output for c in "▂▃▄▅▆▇█")
    found = json.loads(run("inspect", artifact, "--json").stdout)
    assert len(found["provenance"]["norms"]) == 3


def test_diagnose(checkpoint: Path, data: Path, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "d.json"
    result = run("diagnose", checkpoint, "--data", data, "--corruptions", "all", "--shift", artifact,
                 "--max-new-tokens", 3, "--batch-size", 3, "--out", out, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads(out.read_text())
    assert set(found["conditions"]) == {
        "original", "blank", "noise", "caption", "query", "black", "grey", "mean", "blur", "shuffle", "other", "original + cmrm",
    }  # fmt: skip
    cell = found["conditions"]["original"]
    assert cell["unsafe"]["n"] + cell["unsafe"]["unscored"] == 2
    assert cell["over_refusal"]["n"] + cell["over_refusal"]["unscored"] == 2
    assert found["corruptions"]["blank"]["cosine"] == pytest.approx([1.0] * 3)
    assert found["corruptions"]["black"]["norm_ratio"] != pytest.approx([1.0] * 3)
    assert found["representation"]["relative_distance_to_query"]["query"] == [0.0] * 3


def test_diagnose_says_what_it_could_not_measure(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.csv").write_text("query\nhello\nwhat now\n")
    text = ("diagnose", checkpoint, "--data", tmp_path / "text.csv")
    result = run(*text, "--max-new-tokens", 2, "--label", "harmful")
    assert result.exit_code == 0, result.output
    assert "original: not measured, 2 of 2 samples have no image" in result.output
    assert "are about images" in refused(*text, "--corruptions", "blur", "--label", "benign")


def test_what_is_labelled_neither_way_has_no_unsafe_rate(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.csv").write_text("query,label\nhello,harmful\nwhat now,unsafe\n")
    text = ("diagnose", checkpoint, "--data", tmp_path / "text.csv", "--max-new-tokens", 2)
    assert "1 of 2 samples are labelled neither harmful nor benign (the first: 'unsafe')" in refused(*text)
    assert "label is 'bad'" in refused(*text, "--label", "bad")
    cell = json.loads(run(*text, "--label", "benign", "--json").stdout)["conditions"]["query"]
    assert cell["unsafe"]["n"] + cell["unsafe"]["unscored"] == 1
    assert cell["over_refusal"]["n"] + cell["over_refusal"]["unscored"] == 1
    assert "neither harmful nor benign" in refused("diagnose", checkpoint, "--data", "easy-vqa", "--limit", 4)


def test_generate_streams_the_reply(checkpoint: Path, data: Path, artifact: Path) -> None:
    image = data.parent / "red.png"
    plain = run("generate", checkpoint, "hello", "--max-new-tokens", 6)
    assert plain.exit_code == 0, plain.output
    steered = run("generate", checkpoint, "hello", "--image", image, "--shift", artifact, "--alpha", 2,
                  "--max-new-tokens", 6, "--json")  # fmt: skip
    found = json.loads(steered.stdout)
    assert found["level"] == "dataset"
    assert found["steering"]["alpha"] == 2
    assert found["tokens"] >= 1
    own = run("generate", checkpoint, "hello", "--image", image, "--sample-level", "--max-new-tokens", 3, "--json")
    assert json.loads(own.stdout)["level"] == "sample"
    text = run("generate", checkpoint, "hello", "--shift", artifact, "--max-new-tokens", 6, "--json")
    assert json.loads(text.stdout)["level"] is None, "without an image nothing is steered"
    assert json.loads(text.stdout)["reply"] == plain.output.strip()


def test_check_passes_on_a_saved_model_and_fails_with_exit_code_1(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("check", checkpoint)
    assert result.exit_code == 0, result.output
    assert "FAIL" not in result.output
    from cmrm.checks.contract import CHECKS, hold

    def wrong(vlm: object) -> str:
        hold(False, "it does not hold")
        return "it does"

    monkeypatch.setitem(CHECKS, "a check that fails", wrong)
    broken = run("check", checkpoint, "--json")
    assert broken.exit_code == 1
    assert json.loads(broken.stdout)["failed"] == 1


def test_sets_and_families() -> None:
    assert "figstep" in run("sets").output
    assert "mm_harmful.jsonl" in run("sets", "mm-harmfulbench").output
    assert len(json.loads(run("sets", "--json").stdout)) >= 15
    assert "Idefics3" in run("families").output
    assert len(json.loads(run("families", "--json").stdout)["covered"]) >= 16
    assert "no set 'nope'" in refused("sets", "nope")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--estimator", "median"], "estimator"),
        (["--corruption", "sepia"], "corruption"),
        (["--alpha", "-1"], "alpha"),
        (["--layers", "0-99"], "out of range"),
        (["--layers", "a"], "neither a layer nor a range"),
        (["--schedule", "x"], "schedule"),
        (["--limit", "1"], "at least 2"),
        (["--limit", "0"], "limit"),
        (["--on-error", "maybe"], "on_error"),
        (["--map", "query=nope"], "no column for query=nope"),
        (["--split", "train"], "neither splits nor configurations"),
        (["--dtype", "int3"], "dtype"),
        (["--batch-size", "0"], "batch_size"),
    ],
)
def test_extract_refuses(checkpoint: Path, data: Path, tmp_path: Path, args: list[str], said: str) -> None:
    message = refused("extract", checkpoint, "--anchors", data, "-o", tmp_path / "x.safetensors", *args)
    assert said in message
    assert "\n" not in message
    assert not (tmp_path / "x.safetensors").exists()


def test_generate_refuses(checkpoint: Path, artifact: Path, tmp_path: Path) -> None:
    assert "there is no image" in refused("generate", checkpoint, "q", "--image", tmp_path / "no.png")
    assert "choose one" in refused("generate", checkpoint, "q", "--shift", artifact, "--sample-level")
    assert "go with --shift" in refused("generate", checkpoint, "q", "--alpha", 1)
    assert "no shift artifact" in refused("generate", checkpoint, "q", "--shift", tmp_path / "none")
    assert "cannot load" in refused("generate", tmp_path / "nothing", "q")
    assert "prompt is empty" in refused("generate", checkpoint, " ")
    if not torch.cuda.is_available():
        assert "cannot load" in refused("generate", checkpoint, "q", "--device-map", "cuda")


def test_a_text_only_model_is_told_apart(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**text_settings())).save_pretrained(tmp_path)
    byte_tokenizer(image_token="<image>").save_pretrained(tmp_path)
    message = refused("check", tmp_path)
    assert "text-only" in message
    assert "\n" not in message


def test_unwritable_output(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    args = ("diagnose", checkpoint, "--data", data, "--max-new-tokens", 1)
    assert "cannot write" in refused(*args, "--out", tmp_path / "file" / "d.json")
    kept = tmp_path / "folder" / "kept"
    kept.parent.mkdir()
    kept.write_text("x")
    assert "is a folder" in refused(*args, "--out", kept.parent)
    assert "is a folder" in refused("extract", checkpoint, "--anchors", data, "-o", kept.parent)
    assert kept.read_text() == "x", "a file never takes a folder's place"


def test_layers_and_sparkline() -> None:
    assert parse_layers("3,0-1") == (0, 1, 3)
    assert parse_layers(None) is None
    with pytest.raises(InputError):
        parse_layers("2-1")
    assert sparkline([0.0, 1.0, 8.0]) == "▁▂█"
    assert sparkline([]) == ""


def test_the_readme_names_every_family_and_every_set() -> None:
    from cmrm.model.families import FAMILIES, NOT_COVERED
    from cmrm.prompts import NAMED

    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"{len(FAMILIES)} architectures" in text.replace("\n", " ")
    for family in FAMILIES:
        assert f"| {family.name} | `{family.architecture}` | {family.note} |" in text
    assert all(name in text for name, _ in NOT_COVERED)
    words = text.lower().replace("\n", " ")
    titles = {"vlsafe", "figstep", "mm-safetybench", "mm-harmfulbench", "hades", "jailbreakv", "vlguard", "siuo", "msts",
              "xstest", "mossbench", "llava-bench-coco", "scienceqa", "pope", "easy-vqa"}  # fmt: skip
    assert titles <= set(NAMED)
    assert all(title in words for title in titles)

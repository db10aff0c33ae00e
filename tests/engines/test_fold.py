"""Folded checkpoints and control vectors: the same states as an addition by hand, everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import families
from cli.commands import output, refused
from cmrm import Sample, ShiftVectors, Steering, generate, load_vlm
from cmrm.cli.main import app
from cmrm.engines.fold import BIASES, INDEX, constant_additions, fold
from cmrm.engines.generation import generate as generate_with
from cmrm.engines.gguf import write_control_vector
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import InputError, ModelError
from cmrm.model.identity import identity_of
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.shift.artifact import Provenance

FOLDED = ("llava", "vipllava", "llava_next", "idefics3", "smolvlm")
REFUSED = ("qwen2_vl", "qwen3_vl", "gemma3", "pixtral")
SETTING = Steering(alpha=0.5, positions="all")


def saved(name: str, folder: Path, **options: Any) -> VLM:
    """A tiny model of a family, saved and loaded again."""
    model, processor = getattr(families, name)()
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    return load_vlm(str(folder))


def artifact(vlm: VLM, *, scale: float = 0.5, **others: torch.Tensor) -> ShiftVectors:
    shape = (vlm.n_layers, vlm.hidden_size)
    vectors = scale * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    made = Provenance(vlm.model_id, None, type(vlm.model).__name__, shape[1], shape[0])
    return ShiftVectors(vectors, made, SETTING, others, identity=identity_of(vlm))


def by_hand(vlm: VLM, additions: torch.Tensor) -> list[Any]:
    """Hooks that add a row to the output of each decoder block, at every position."""

    def adding(row: torch.Tensor) -> Any:
        def hook(module: Any, inputs: Any, out: Any) -> Any:
            states = out[0] if isinstance(out, tuple) else out
            moved = states + row.to(states.dtype)
            return (moved, *out[1:]) if isinstance(out, tuple) else moved

        return hook

    return [
        layer.register_forward_hook(adding(row))
        for layer, row in zip(vlm.layers, additions, strict=True)
    ]


def requests() -> list[Request]:
    image = Image.new("RGB", (20, 16), "red")
    return [
        Request("How do I open it?", (image,)), Request("What is this, please?", (image,)),
        Request("How do I open it?"), Request("Tell me of the sea."),
    ]  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_checkpoint_is_the_addition(name: str, tmp_path: Path) -> None:
    vlm = saved(name, tmp_path / "model")
    additions = constant_additions(artifact(vlm))
    fold(tmp_path / "model", additions, tmp_path / "folded", record={"model": "a/b", "alpha": 0.5})
    folded = TransformersEngine(load_vlm(str(tmp_path / "folded")))
    plain = TransformersEngine(vlm).states(requests())
    handles = by_hand(vlm, additions)
    wanted = TransformersEngine(vlm).states(requests())
    for handle in handles:
        handle.remove()
    states = folded.states(requests())
    assert torch.allclose(states, wanted, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(states, plain, atol=1e-2)


def test_hooks_and_fold_say_the_same(tmp_path: Path) -> None:
    vlm = saved("llava", tmp_path / "model")
    shift = artifact(vlm)
    fold(tmp_path / "model", constant_additions(shift), tmp_path / "folded", record={})
    image = Image.new("RGB", (20, 16), "blue")
    samples = [Sample(f"s{k}", f"How do I open door {k}?", image) for k in range(3)]
    hooks = generate_with(vlm, samples, shift=shift, max_new_tokens=12)
    folded = generate(load_vlm(str(tmp_path / "folded")), samples, max_new_tokens=12)
    assert [g.text for g in folded] == [g.text for g in hooks]


def test_zero_vectors_are_the_untouched_model(tmp_path: Path) -> None:
    vlm = saved("llava", tmp_path / "model")
    zero = torch.zeros(vlm.n_layers, vlm.hidden_size)
    fold(tmp_path / "model", zero, tmp_path / "folded", record={})
    folded = TransformersEngine(load_vlm(str(tmp_path / "folded")))
    assert torch.equal(folded.states(requests()), TransformersEngine(vlm).states(requests()))


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_the_original_tensors_are_copied(tmp_path: Path, size: str) -> None:
    vlm = saved("llava", tmp_path / "model", max_shard_size=size)
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"old format")
    before = {
        name: tensor
        for file in (tmp_path / "model").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    additions = constant_additions(artifact(vlm))
    fold(tmp_path / "model", additions, tmp_path / "folded", record={"model": "a/b"})
    after = {
        name: tensor
        for file in (tmp_path / "folded").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    added = {name: tensor for name, tensor in after.items() if name not in before}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert len(added) == 3 * vlm.n_layers
    assert set(added) == set(load_file(tmp_path / "folded" / BIASES))
    mapping = json.loads((tmp_path / "folded" / INDEX).read_text())["weight_map"]
    assert set(mapping) == set(after)
    assert all((tmp_path / "folded" / file).is_file() for file in mapping.values())
    assert not (tmp_path / "folded" / "pytorch_model.bin").exists()
    assert not (tmp_path / "folded" / "model.safetensors").exists(), "it would hide the index"
    card = (tmp_path / "folded" / "README.md").read_text()
    assert "base_model: a/b" in card
    assert "text-only requests are" in card
    for name, tensor in added.items():
        layer = int(name.split("layers.")[1].split(".")[0])
        expected = additions[layer] if "down_proj" in name else torch.zeros_like(tensor)
        assert torch.equal(tensor.float(), expected.to(tensor.dtype).float())


@pytest.mark.parametrize("name", REFUSED)
def test_families_without_that_bias_are_refused(name: str, tmp_path: Path) -> None:
    vlm = saved(name, tmp_path / "model")
    with pytest.raises(ModelError, match="its MLP has no bias"):
        fold(tmp_path / "model", constant_additions(artifact(vlm)), tmp_path / "o", record={})
    assert not (tmp_path / "o").exists()


def test_settings_that_are_no_constant(tmp_path: Path) -> None:
    vlm = saved("llava", tmp_path / "model")
    shift = artifact(vlm, direction=torch.randn(vlm.n_layers, vlm.hidden_size))
    for setting, reason in (
        (Steering(positions="last"), "every position"),
        (Steering(positions="all", preserve_norm=True), "rescales"),
        (Steering(operator="fill"), "looks at each request's state"),
    ):
        with pytest.raises(InputError, match=f"cannot be folded: .*{reason}"):
            constant_additions(shift, setting)
    assert constant_additions(shift, Steering(alpha=0, positions="all")).abs().sum() == 0
    telescoped = constant_additions(shift, Steering(alpha=2.0, positions="all"))
    assert torch.allclose(telescoped.cumsum(0), 2.0 * shift.vectors, atol=1e-5)


def test_broken_checkpoints_and_targets(tmp_path: Path) -> None:
    vlm = saved("llava", tmp_path / "model")
    additions = constant_additions(artifact(vlm))
    folder = tmp_path / "model"
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        fold(folder, additions, taken, record={})
    assert (taken / "mine.txt").read_text() == "keep"
    with pytest.raises(ModelError, match="0 stacks"):
        fold(folder, additions[:-1], tmp_path / "o", record={})
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"text_config": {**config["text_config"], "mlp_bias": True}}, "has MLP biases already"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=message):
            fold(folder, additions, tmp_path / "o", record={})
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="no config that can be read"):
        fold(folder, additions, tmp_path / "o", record={})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="not whole"):
        fold(folder, additions, tmp_path / "o", record={})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors"):
        fold(folder, additions, tmp_path / "o", record={})
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="0 stacks"):
        fold(folder, additions, tmp_path / "o", record={})
    assert not (tmp_path / "o").exists()


def test_what_float16_does_not_hold(tmp_path: Path) -> None:
    vlm = saved("llava", tmp_path / "model")
    vlm.model.half().save_pretrained(tmp_path / "half")
    additions = torch.zeros(vlm.n_layers, vlm.hidden_size)
    additions[1, 3] = 1e5
    with pytest.raises(InputError, match="decoder layer 1 reaches 1e\\+05"):
        fold(tmp_path / "half", additions, tmp_path / "o", record={})
    assert not (tmp_path / "o").exists()
    fold(tmp_path / "model", additions, tmp_path / "o", record={})


def test_the_command(tmp_path: Path) -> None:
    vlm = saved("llava", tmp_path / "model")
    artifact(vlm).save(tmp_path / "shift.safetensors")
    base = ("export", "fold", tmp_path / "model", "--shift", tmp_path / "shift.safetensors")
    text = output(*base, "-o", tmp_path / "folded", "--alpha", 0.25)
    assert "text-only ones too" in text
    record = json.loads((tmp_path / "folded" / "cmrm_fold.json").read_text())
    assert record["alpha"] == 0.25
    assert record["layers"] == f"0-{vlm.n_layers - 1}"
    assert str(tmp_path) not in (tmp_path / "folded" / "README.md").read_text()
    load_vlm(str(tmp_path / "folded"))
    assert "not empty" in refused(*base, "-o", tmp_path / "folded")
    assert "every position" in refused(*base, "-o", tmp_path / "o", "--positions", "last")
    assert "does not fit" in refused(
        "export", "fold", tmp_path / "folded", *base[3:], "-o", tmp_path / "o"
    )
    assert CliRunner().invoke(app, ["export"]).output.count("gguf") >= 1


def test_control_vectors(tmp_path: Path) -> None:
    reader = pytest.importorskip("gguf", reason="control vectors need the extra `gguf`")
    additions = torch.randn(4, 32)
    path = tmp_path / "v.gguf"
    dropped = write_control_vector(path, additions, "llama", record={"model": "a/b", "x": None})
    norms = additions.norm(dim=-1)
    assert dropped == pytest.approx(float(norms[0] / norms.sum()))
    stored = reader.GGUFReader(str(path))
    tensors = {tensor.name: tensor for tensor in stored.tensors}
    assert list(tensors) == ["direction.1", "direction.2", "direction.3"]
    for layer in range(1, 4):
        values = np.array(tensors[f"direction.{layer}"].data)
        assert values.dtype == np.float32
        assert np.array_equal(values, additions[layer].numpy())
    fields = {name: field.contents() for name, field in stored.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 3
    assert fields["cmrm.model"] == "a/b"
    only_first = torch.zeros(4, 32)
    only_first[0] = 1
    with pytest.raises(InputError, match="nothing is added above"):
        write_control_vector(path, only_first, "llama", record={})
    with pytest.raises(InputError, match="cannot be written"):
        write_control_vector(tmp_path, additions, "llama", record={})


def test_the_command_for_control_vectors(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="control vectors need the extra `gguf`")
    vlm = saved("llava", tmp_path / "model")
    artifact(vlm).save(tmp_path / "shift.safetensors")
    text = output(
        "export", "gguf", tmp_path / "model", "--shift", tmp_path / "shift.safetensors",
        "-o", tmp_path / "v.gguf", "--layers", "1-2",
    )  # fmt: skip
    assert "0.0 % of the sum" in text
    assert (tmp_path / "v.gguf").stat().st_size > 100

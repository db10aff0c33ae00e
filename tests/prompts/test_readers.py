"""Named sets in their official layout."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cmrm.errors import InputError
from cmrm.prompts import NAMED, load_named, load_samples
from cmrm.prompts.sample import open_images
from layouts import LAYOUTS, put

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
real_files = pytest.mark.skipif(not SHARED.is_dir(), reason="third-party files are not in a clone")


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (7, 5), "green").save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(("name", "variant"), LAYOUTS)
def test_official_layouts(tmp_path: Path, name: str, variant: str) -> None:
    folder = put(tmp_path, LAYOUTS[name, variant])
    loaded = load_samples(name, path=folder, variant=variant, partial=True)
    assert len(loaded.samples) == 1
    assert open_images(loaded.samples[0])[0].size == (9, 9)
    published = NAMED[name].counts[variant]
    assert loaded.notes == (
        () if published is None else (f"1 samples where {published} are published",)
    )
    again = load_named(f"{name}-{variant}", {name: folder}, limit=None, partial=True)
    assert again.samples == loaded.samples
    assert again.name == f"{name}-{variant}"


def test_a_line_of_pope_ends_at_a_line_feed(tmp_path: Path) -> None:
    folder = put(tmp_path, LAYOUTS["pope", "random"])
    sample = load_samples("pope", path=folder, partial=True).samples[0]
    assert sample.query.startswith("Is there a cat\u2028here?\n")
    assert (sample.answer, sample.match) == ("yes", "yes_no")


def test_variants_of_vlguard_and_scienceqa(tmp_path: Path) -> None:
    folder = put(tmp_path / "v", LAYOUTS["vlguard", "safe_safes"])
    labels = {
        "unsafes": ("i", "harmful"),
        "safe_unsafes": ("u", "harmful"),
        "safe_safes": ("s", "benign"),
    }
    for variant, expected in labels.items():
        sample = load_samples("vlguard", path=folder, variant=variant, partial=True).samples[0]
        assert (sample.query, sample.label) == expected
    folder = put(tmp_path / "s", LAYOUTS["scienceqa", "test-image"])
    science = load_samples("scienceqa", path=folder, partial=True).samples
    assert [(s.answer, s.image is None) for s in science] == [("B", False), ("B", True)]


def test_hub_sets_from_parquet_files(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    picture = {"bytes": png(), "path": None}
    tables = {
        "test-00000": [{"id": step, "step": step, "instruction": "i", "scenario": "s",
                        "image": picture} for step in (0, 5)],
        "english-00000": [{"case_id": "c", "prompt_type": "t", "prompt_text": "p",
                           "unsafe_image": picture, "hazard_category": "h"}],
    }  # fmt: skip
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    hades = load_samples("hades", path=tmp_path, partial=True).samples
    assert [open_images(s)[0].size for s in hades] == [(7, 5)]
    msts = load_samples("msts", path=tmp_path, partial=True).samples
    assert [(s.id, s.category) for s in msts] == [("msts-c-t", "h")]


@pytest.mark.parametrize(
    ("name", "file", "rows", "message"),
    [
        ("siuo", "siuo_gen.json", [{"prompt": "q"}], "no field 'question'; is this the published"),
        ("siuo", "siuo_gen.json", [{"question": "q", "image": None, "category": "c"}],
         "another form than the published ones"),
        ("vlguard", "test.json", [{"id": 1, "instr-resp": None}], "another form"),
        ("siuo", "siuo_gen.json", [{"question": 5, "image": "a", "category": "c"}], "another form"),
        ("mossbench", "information.json",
         [{"pid": 1, "question": "q", "image": "a", "metadata": ["x"]}], "another form"),
        ("pope", "coco_pope_random.json", "[1]", "line 1 is list, expected an object"),
    ],
)  # fmt: skip
def test_rows_that_are_not_the_published_ones(
    tmp_path: Path, name: str, file: str, rows: Any, message: str
) -> None:
    put(tmp_path, {file: rows})
    with pytest.raises(InputError, match=message):
        load_samples(name, path=tmp_path)


def test_the_jailbreak_prompts_are_not_the_forbidden_questions(tmp_path: Path) -> None:
    layout = LAYOUTS["jailbreak-llms", "forbidden"]
    others = {k: v for k, v in layout.items() if not k.endswith(".csv")}
    put(tmp_path, {**others, "jailbreak_prompts.csv": "prompt\nIgnore all rules\n"})
    with pytest.raises(InputError, match=r"forbidden_question_set.csv is not in"):
        load_samples("jailbreak-llms", path=tmp_path)
    put(tmp_path, {"forbidden_question_set.csv": "prompt\nIgnore all rules\n"})
    with pytest.raises(InputError, match=r"rows without a 'question'; its columns are prompt"):
        load_samples("jailbreak-llms", path=tmp_path)


@real_files
def test_real_files() -> None:
    figstep = load_samples("figstep", path=SHARED / "figstep_tiny")
    assert len(figstep.samples) == 50
    assert all(s.image for s in figstep.samples)
    assert len(load_samples("xstest", path=SHARED / "xstest", variant="safe").samples) == 250
    with pytest.raises(InputError, match="40 samples where 1110 are published"):
        load_samples("vlsafe", path=SHARED / "vlsafe")
    with pytest.raises(InputError, match=r"90 of 90 samples cannot be used; .*000000441147.jpg"):
        load_samples("llava-bench-coco", path=SHARED / "llava_bench_coco")
    columns = {"query": "instruction"}
    harmful = load_samples(SHARED / "harmful_small" / "harmful_val.json", columns=columns)
    assert all(s.category for s in harmful.samples)


@real_files
def test_figstep_is_split_by_its_images() -> None:
    from cmrm.prompts.splits import refuse_leaks, split_by_content

    samples = load_samples("figstep", path=SHARED / "figstep_tiny").samples
    anchors, rest = split_by_content(samples, 0.4)
    assert 8 <= len(anchors) <= 32
    refuse_leaks(anchors, rest)
    with pytest.raises(InputError, match="1 anchors are asked"):
        refuse_leaks([*anchors, rest[0]], rest)

"""Readers, the column map, unusable rows, named sets, corruptions."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmrm import Sample
from cmrm.prompts.conditions import CORRUPTED, Condition, build_request, build_requests, choose_donors
from cmrm.errors import InputError
from cmrm.prompts.sample import open_images
from cmrm.prompts import NAMED, load_samples
from cmrm.prompts.loading import parse_columns

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
real_files = pytest.mark.skipif(not SHARED.is_dir(), reason="third-party files are not in a clone")
ROWS = [
    {"qid": "a", "text": "What is this?", "file": "one.png", "kind": "benign"},
    {"qid": "b", "text": "And this?", "file": "two.png", "kind": "harmful"},
    {"qid": "c", "text": "Or that?", "file": "one.png", "kind": "harmful"},
]
MAP = {"id": "qid", "query": "text", "image": "file", "label": "kind"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (20, 10), "red").save(tmp_path / "one.png")
    Image.new("L", (8, 8), 100).save(tmp_path / "two.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with (tmp_path / f"rows.{suffix}").open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    return tmp_path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_every_kind_of_file_gives_the_same_samples(folder: Path, kind: str) -> None:
    loaded = load_samples(folder / f"rows.{kind}", columns=MAP)
    assert [(s.id, s.query, s.label) for s in loaded.samples] == [(r["qid"], r["text"], r["kind"]) for r in ROWS]
    assert [open_images(s)[0].size for s in loaded.samples] == [(20, 10), (8, 8), (20, 10)]


def test_parquet_and_saved_datasets_with_images_inside(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    held = datasets.Dataset.from_list([{**r, "file": str(folder / r["file"])} for r in ROWS])
    held = held.cast_column("file", datasets.Image())
    held.save_to_disk(str(folder / "saved"))
    held.to_parquet(str(folder / "rows.parquet"))
    for source in (folder / "saved", folder / "rows.parquet"):
        loaded = load_samples(source, columns=MAP)
        assert [open_images(s)[0].size for s in loaded.samples] == [(20, 10), (8, 8), (20, 10)]
    datasets.DatasetDict({"x": held, "y": held}).save_to_disk(str(folder / "both"))
    with pytest.raises(InputError, match="splits x, y"):
        load_samples(folder / "both", columns=MAP)
    assert len(load_samples(folder / "both", columns=MAP, split="y").samples) == 3
    with pytest.raises(InputError, match="no split 'z'"):
        load_samples(folder / "both", columns=MAP, split="z")


def test_limit_is_a_draw_that_does_not_depend_on_order(folder: Path) -> None:
    few = load_samples(folder / "rows.jsonl", columns=MAP, limit=2)
    (folder / "turned.json").write_text(json.dumps(ROWS[::-1]), encoding="utf-8")
    again = load_samples(folder / "turned.json", columns=MAP, limit=2)
    assert {s.id for s in few.samples} == {s.id for s in again.samples}
    assert few.notes == ("2 of 3 samples",)


@pytest.mark.parametrize(
    ("given", "said"),
    [("query", "is no field=column"), ("querry=x", "no field 'querry'"), ("query=a,query=b", "named twice")],
)
def test_broken_column_map(given: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_columns(given)


def test_wrong_column_map_lists_what_is_there(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no column for query=question; its columns are qid, text, file, kind"):
        load_samples(folder / "rows.jsonl", columns={"query": "question"})
    with pytest.raises(InputError, match=r"no column 'query'.*--map query=COLUMN"):
        load_samples(folder / "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", "{}\nnot json", "line 2 is no JSON"),
        ("x.jsonl", "[1]", "expected an object"),
        ("x.jsonl", "", "holds no rows"),
        ("x.json", '{"a": 1}', "no list of objects"),
        ("x.csv", "query,image\na,b,c\n", "another number of fields"),
        ("x.csv", b"query\n\xff\xfe", "cannot be read"),
        ("x.parquet", "PAR1", "no whole Parquet file"),
        ("x.yaml", "a: b", "unknown kind"),
        ("x.jsonl", '{"query": "  "}', "row 0 has no text"),
        ("x.jsonl", '{"query": "a", "image": 3}', "its image is int"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError, match=said):
        load_samples(tmp_path / name)


def test_nothing_there(tmp_path: Path) -> None:
    for source, said in (
        (tmp_path / "no.csv", "there is no file"),
        (tmp_path, "is a folder"),
        ("what", "neither a file"),
    ):
        with pytest.raises(InputError, match=said):
            load_samples(source)


def test_unusable_images_are_counted_and_the_first_is_named(folder: Path) -> None:
    (folder / "two.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"1 of 3 samples cannot be used; the first: sample 'b'.*--on-error skip"):
        load_samples(folder / "rows.jsonl", columns=MAP)
    loaded = load_samples(folder / "rows.jsonl", columns=MAP, on_error="skip")
    assert [s.id for s in loaded.samples] == ["a", "c"]
    assert [s.row for s in loaded.skipped] == ["b"]
    assert loaded.to_json()["skipped"] == 1
    (folder / "one.png").unlink()
    with pytest.raises(InputError, match=r"3 of 3 .*none is left"):
        load_samples(folder / "rows.jsonl", columns=MAP, on_error="skip")


def test_repeated_ids_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="two samples have the id"):
        load_samples(folder / "rows.jsonl", columns={**MAP, "id": "file"})


def test_unknown_variant_missing_path_and_stray_options(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no variant 'huge'; one of tiny"):
        load_samples("figstep", path=tmp_path, variant="huge")
    with pytest.raises(InputError, match=r"needs --path, or CMRM_DATA with .*; there must lie: SafeBench-Tiny.csv"):
        load_samples("figstep")
    with pytest.raises(InputError, match="there is no folder"):
        load_samples("figstep", path=tmp_path / "none")
    with pytest.raises(InputError, match=r"SafeBench-Tiny.csv .*is not in .*needed"):
        load_samples("figstep", path=tmp_path)
    with pytest.raises(InputError, match="brings its own columns"):
        load_samples("figstep", path=tmp_path, columns={"query": "x"})
    with pytest.raises(InputError, match="go with a named set"):
        load_samples(tmp_path / "x.csv", variant="tiny")


@real_files
def test_real_files() -> None:
    figstep = load_samples("figstep", path=SHARED / "figstep_tiny")
    assert len(figstep.samples) == 50
    assert all(s.image for s in figstep.samples)
    assert len(load_samples("xstest", path=SHARED / "xstest", variant="safe").samples) == 250
    with pytest.raises(InputError, match="40 samples where 1110 are published"):
        load_samples("vlsafe", path=SHARED / "vlsafe")
    with pytest.raises(InputError, match=r"90 of 90 samples cannot be used; the first: .*000000441147.jpg"):
        load_samples("llava-bench-coco", path=SHARED / "llava_bench_coco")
    harmful = load_samples(SHARED / "harmful_small" / "harmful_val.json", columns={"query": "instruction"})
    assert all(s.category for s in harmful.samples)


def put(folder: Path, **files: Any) -> None:
    """Write files by their relative path; dicts and lists as JSON, `None` as a small image."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (9, 9), "blue").save(path)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            path.write_text(json.dumps(content), encoding="utf-8")


def png() -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (7, 5), "green").save(held, "PNG")
    return held.getvalue()


def small_sets(root: Path) -> dict[str, tuple[Path, str | None]]:
    """A few rows of each set in its official layout."""
    coco = "COCO_val2014_000000000007.jpg"
    line = json.dumps({"image_id": "000000000007.jpg", "caption": "a cat", "query": "q"})
    put(root / "vlsafe", harmlessness_examine_dot_jsonl=line, **{f"val2014__{coco}": None})
    put(
        root / "figstep",
        **{
            "data__question__safebench.csv": "dataset,category_id,task_id,category_name,question,instruction\nF,1,2,c,q,i\n",
            "data__images__SafeBench__query_ForbidQI_1_2_6.png": None,
        },
    )
    keys = {"Question": "q", "Key Phrase": "k", "Rephrased Question": "r", "Rephrased Question(SD)": "s"}
    put(
        root / "mm",
        **{"data__processed_questions__01-Illegal_Activitiy.json": {"0": keys},
           "data__imgs__01-Illegal_Activitiy__SD__0.jpg": None},
    )  # fmt: skip
    put(root / "mmhb", mm_harmful_dot_jsonl=json.dumps({"image_url": "u", "question": "q"}), **{"images__1.jpg": None})
    head = "id,jailbreak_query,redteam_query,format,policy,image_path,from,selected_mini,transfer_from_llm\n"
    put(root / "jbv", **{"mini_JailBreakV_28K.csv": head + "5,q,r,SD,Fraud,figstep/a.png,x,True,False\n",
                         "figstep__a.png": None})  # fmt: skip
    pairs = [{"safe_instruction": "s", "response": "x"}, {"unsafe_instruction": "u", "response": "y"}]
    rows = [
        {"id": "1", "image": "d/a.png", "safe": True, "instr-resp": pairs},
        {"id": "2", "image": "d/a.png", "safe": False, "harmful_category": "privacy",
         "instr-resp": [{"instruction": "i", "response": "z"}]},
    ]  # fmt: skip
    put(root / "vlguard", test_dot_json=rows, **{"test__d__a.png": None})
    put(
        root / "siuo",
        siuo_gen_dot_json=[{"question": "q", "image": "a.png", "category": "c"}],
        **{"images__a.png": None},
    )
    put(
        root / "moss",
        **{
            "data__images_information__information.json": {
                "1": {
                    "image": "images/1.png",
                    "question": "q",
                    "pid": "1",
                    "description": "d",
                    "metadata": {"over": "t"},
                }
            },
            "data__images__1.png": None,
        },
    )
    problem = {"question": "q", "choices": ["x", "y"], "answer": 1, "hint": "h", "image": "image.png", "subject": "s"}
    put(
        root / "science",
        problems_dot_json={"3": problem, "4": {**problem, "image": None}},
        pid_splits_dot_json={"test": ["3", "4"]},
        **{"images__test__3__image.png": None},
    )
    asked = json.dumps({"question_id": 1, "image": coco, "text": "Is there a cat?", "label": "yes"})
    put(root / "pope", coco_pope_random_dot_json=asked + "\n", **{f"val2014__{coco}": None})
    notes = {
        "images": [{"id": 7, "file_name": coco}],
        "annotations": [{"image_id": 7, "caption": "A cat steals a purse"}],
    }
    put(
        root / "jailbreak",
        forbidden_question_set_dot_csv="content_policy_name,question\nFraud,How to steal a purse?\n",
        captions_val2014_dot_json=notes,
        **{f"val2014__{coco}": None},
    )
    return {
        "vlsafe": (root / "vlsafe", None), "figstep": (root / "figstep", "full"), "mm-safetybench": (root / "mm", "SD"),
        "mm-harmfulbench": (root / "mmhb", None), "jailbreakv": (root / "jbv", "mini"),
        "vlguard": (root / "vlguard", "safe_safes"), "siuo": (root / "siuo", None), "mossbench": (root / "moss", None),
        "scienceqa": (root / "science", "test-image"), "pope": (root / "pope", None),
        "jailbreak-llms": (root / "jailbreak", None),
    }  # fmt: skip


def test_official_layouts(tmp_path: Path) -> None:
    for name, (path, variant) in small_sets(tmp_path).items():
        loaded = load_samples(name, path=path, variant=variant, partial=True)
        assert len(loaded.samples) == 1, name
        assert open_images(loaded.samples[0])[0].size == (9, 9), name
        if NAMED[name].counts[variant or next(iter(NAMED[name].counts))] is not None:
            assert "are published" in loaded.notes[0], name
    science = load_samples("scienceqa", path=tmp_path / "science", variant="test", partial=True).samples
    assert science[0].answer == "B"
    assert science[1].image is None
    assert (
        load_samples("vlguard", path=tmp_path / "vlguard", variant="unsafes", partial=True).samples[0].label
        == "harmful"
    )
    assert (
        load_samples("vlguard", path=tmp_path / "vlguard", variant="safe_safes", partial=True).samples[0].query == "s"
    )


def test_hub_sets_from_parquet_files(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    picture = {"bytes": png(), "path": None}
    hades = [
        {"id": k, "step": step, "instruction": "i", "scenario": "s", "image": picture} for k, step in enumerate((0, 5))
    ]
    pq.write_table(pa.Table.from_pylist(hades), tmp_path / "test-00000.parquet")
    loaded = load_samples("hades", path=tmp_path, partial=True)
    assert [open_images(s)[0].size for s in loaded.samples] == [(7, 5)]
    msts = [{"case_id": "c", "prompt_type": "t", "prompt_text": "p", "unsafe_image": picture, "hazard_category": "h"}]
    pq.write_table(pa.Table.from_pylist(msts), tmp_path / "english-00000.parquet")
    assert load_samples("msts", path=tmp_path, partial=True).samples[0].category == "h"


def test_a_row_without_its_fields_is_no_published_file(tmp_path: Path) -> None:
    put(tmp_path, siuo_gen_dot_json=[{"prompt": "q"}])
    with pytest.raises(InputError, match="no field 'question'; is this the published file"):
        load_samples("siuo", path=tmp_path)


def test_manipulated_pairs_are_seeded_and_related(tmp_path: Path) -> None:
    told = ["a dog runs on a beach", "a man counts money in a bank", "a car on a road", "a knife on a table"]
    images = [{"id": k, "file_name": f"{k}.jpg"} for k in range(4)]
    notes = {"images": images, "annotations": [{"image_id": k, "caption": c} for k, c in enumerate(told)]}
    put(tmp_path, captions_val2014_dot_json=notes, **{f"val2014__{k}.jpg": None for k in range(4)})
    put(
        tmp_path,
        forbidden_question_set_dot_csv="question\nHow to rob a bank?\nHow to steal a car?\nHow to use a knife?\n",
    )
    first = load_samples("jailbreak-llms", path=tmp_path).samples
    assert [s.caption for s in first] == [told[1], told[2], told[3]]
    assert first == load_samples("jailbreak-llms", path=tmp_path).samples
    (tmp_path / "val2014" / "3.jpg").unlink()
    (tmp_path / "val2014" / "2.jpg").unlink()
    with pytest.raises(InputError, match="2 images with captions; 3 questions"):
        load_samples("jailbreak-llms", path=tmp_path)


def test_every_set_says_where_it_comes_from() -> None:
    assert len(NAMED) >= 15
    for one in NAMED.values():
        assert one.source
        assert one.licence
        assert one.counts


def test_corruptions_keep_the_size_and_are_repeatable() -> None:
    rng = np.random.default_rng(0)
    samples = [
        Sample(f"s{k}", "q", Image.fromarray(rng.integers(0, 255, (33, 41, 3), dtype=np.uint8), "RGB"))
        for k in range(4)
    ]
    for condition in CORRUPTED:
        once, again = (list(build_requests(samples, condition, seed=3)) for _ in range(2))
        for sample, request, repeated in zip(samples, once, again, strict=True):
            assert request.images[0].size == (41, 33)
            assert request.images[0].tobytes() == repeated.images[0].tobytes()
            assert request.images[0].tobytes() != sample.image.tobytes()  # type: ignore[union-attr]
    for seeded in (Condition.NOISE, Condition.SHUFFLE):
        other = build_request(samples[0], seeded, seed=4).images[0]
        assert other.tobytes() != build_request(samples[0], seeded, seed=3).images[0].tobytes()


def test_corruptions_are_what_they_are_called() -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = (200, 100, 0)
    sample = Sample("one", "q", Image.fromarray(pixels, "RGB"))
    made = {c: np.asarray(build_request(sample, c).images[0]) for c in CORRUPTED if c is not Condition.OTHER}
    assert (made[Condition.BLACK] == 0).all()
    assert (made[Condition.MEAN] == (100, 50, 0)).all()
    assert made[Condition.BLUR].std() < pixels.std()
    assert sorted(made[Condition.SHUFFLE].reshape(-1, 3).tolist()) == sorted(pixels.reshape(-1, 3).tolist())


def test_the_image_of_another_sample() -> None:
    colours = ["red", "green", "blue"]
    samples = [Sample(c, "q", Image.new("RGB", (8, 8), c)) for c in colours]
    donors = choose_donors(samples)
    assert {k: d.id != k for k, d in donors.items()} == dict.fromkeys(colours, True)
    assert len({d.id for d in donors.values()}) == 3
    with pytest.raises(InputError, match="at least 2 samples"):
        choose_donors(samples[:1])
    with pytest.raises(InputError, match="from another sample"):
        build_request(samples[0], "other")


def test_several_images_are_each_corrupted() -> None:
    sample = Sample("two", "q", (Image.new("RGB", (8, 8), "red"), Image.new("RGB", (6, 4), "blue")))
    request = build_request(sample, "noise")
    assert [i.size for i in request.images] == [(8, 8), (6, 4)]
    assert build_request(sample, "original").images[1].getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(InputError, match="empty tuple"):
        open_images(Sample("none", "q", ()))

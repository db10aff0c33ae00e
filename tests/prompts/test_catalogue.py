"""The catalogue of named sets, and where they lie."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cmrm.errors import InputError
from cmrm.prompts import NAMED, load_samples
from cmrm.prompts.place import place_of


def test_every_set_states_where_it_comes_from() -> None:
    assert len(NAMED) >= 16
    for name, named_set in NAMED.items():
        assert named_set.name == name
        assert all((named_set.title, named_set.measures, named_set.source, named_set.licence))
        assert named_set.counts
        assert set(named_set.to_json()) >= {"name", "title", "source", "licence", "needs", "counts"}


@pytest.mark.parametrize("name", NAMED)
def test_where_the_harm_is(name: str) -> None:
    named_set = NAMED[name]
    for variant in named_set.counts:
        assert named_set.harm_of(variant) in {"text", "image", "both", None}
        if "unsafe rate" in named_set.measures:
            assert named_set.harm_of(variant) is not None
    assert named_set.harm_of(None) == named_set.harm_of(next(iter(named_set.counts)))


def test_unknown_variants_and_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no variant 'huge'; one of tiny"):
        load_samples("figstep", path=tmp_path, variant="huge")
    message = r"needs --path, or CMRM_DATA with .*; it must hold: SafeBench-Tiny.csv"
    with pytest.raises(InputError, match=message):
        load_samples("figstep")
    with pytest.raises(InputError, match="there is no folder"):
        load_samples("figstep", path=tmp_path / "none")
    with pytest.raises(InputError, match=r"SafeBench-Tiny.csv .*is not in .*needed"):
        load_samples("figstep", path=tmp_path)


def test_a_changed_file_is_not_the_published_one(tmp_path: Path) -> None:
    lines = [f"{k},q{k},homonyms,safe" for k in range(250)]
    (tmp_path / "prompts.csv").write_text("\n".join(["id,prompt,type,label", *lines]))
    with pytest.raises(InputError, match=r"prompts\.csv is not the published file"):
        load_samples("xstest", path=tmp_path, variant="safe")
    loaded = load_samples("xstest", path=tmp_path, variant="safe", partial=True)
    assert loaded.notes == ("prompts.csv is not the published file",)


def test_folders_below_cmrm_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("figstep_tiny", "figstep", "XSTest-v2"):
        (tmp_path / name).mkdir()
    assert place_of("figstep") is None
    monkeypatch.setenv("CMRM_DATA", str(tmp_path))
    assert place_of("figstep", "tiny") == tmp_path / "figstep_tiny"
    assert place_of("figstep", "full") == tmp_path / "figstep"
    assert place_of("xstest") == tmp_path / "XSTest-v2"
    assert place_of("siuo") is None
    monkeypatch.setenv("CMRM_DATA", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"CMRM_DATA names .*, which is no folder"):
        place_of("figstep")


def test_the_package_needs_neither_extras_nor_later_parts() -> None:
    code = (
        "import sys, cmrm.prompts, cmrm.prompts.conditions\n"
        "later = 'model steering shift engines judges measure evaluate demo'.split()\n"
        "extras = ('torch', 'pandas', 'sklearn', 'scipy', 'datasets', 'pyarrow', 'easy_vqa')\n"
        "names = {*extras, *(f'cmrm.{part}' for part in later)}\n"
        "assert not names & set(sys.modules), names & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

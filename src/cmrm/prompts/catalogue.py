"""Named sets: where each comes from, what has to lie where, how many samples it has, and how its rows become samples.

None of them ships with cmrm, but easy-VQA and our own prompts. Counts are the published ones and are checked; checksums are
checked where the published file was at hand. Fields that are kept: category, label (`harmful`: an aligned model refuses;
`benign`: it answers; None: a utility set) and, for utility sets, the reference answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmrm.errors import InputError
from cmrm.files import sha256_file
from cmrm.prompts.sample import Sample
from cmrm.prompts import readers
from cmrm.prompts.readers import Place

Reader = Callable[[Place], Iterator[Sample]]


@dataclass(frozen=True)
class NamedSet:
    """One set."""

    name: str
    """What `--data` and `--anchors` take."""
    title: str
    """Its full name."""
    measures: str
    """What it is for: unsafe rate, over-refusal or utility, and where the harm is."""
    source: str
    """Repository or hub id, and paper."""
    licence: str
    """As published; `unstated` where it is not."""
    needs: str
    """What has to lie in the folder that --path names."""
    counts: Mapping[str, int | None]
    """Variant -> published number of samples (the first is the default); None where it depends on the user's files."""
    reader: Reader = field(repr=False)
    """Rows to samples."""
    hub: str | None = None
    """Hub id that it can be read from with the `data` extra."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """File name -> hex sha256 of the published file."""

    def harm_of(self, variant: str | None) -> str | None:
        """Where the harm of a variant's harmful samples is: `text`, `image`, `both`, or None for sets without."""
        held = HARM.get(self.name)
        return held if held is None or isinstance(held, str) else held.get(variant or next(iter(self.counts)))

    def read(
        self,
        path: Path | None,
        *,
        variant: str | None = None,
        partial: bool = False,
        seed: int = 0,
        note: Callable[[str], None] = lambda text: None,
    ) -> list[Sample]:
        """Samples of one variant; `note` is told what a reader of the results has to know.

        Raises:
            InputError: files are missing (what has to lie where is said), or the count or a checksum is not the published
                one and `partial` is off.
        """
        chosen = variant or next(iter(self.counts))
        if chosen not in self.counts:
            raise InputError(f"{self.name} has no variant {chosen!r}; one of {', '.join(self.counts)}")
        if path is not None and not path.exists():
            raise InputError(f"{self.name}: there is no folder {path}; needed: {self.needs}")
        if path is None and self.needs:
            path = place_of(self.name, chosen)
        if path is None and self.needs and self.hub is None:
            raise InputError(
                f"{self.name} needs --path, or CMRM_DATA with a folder {self.name} in it; there must lie: {self.needs} (from "
                f"{self.source})"
            )
        folder = path.parent if path is not None and path.is_file() else path
        place = Place(folder, self.hub if path is None else None, chosen, seed, self.needs)
        try:
            samples = list(self.reader(place))
        except KeyError as error:
            raise InputError(
                f"{self.name}: a row has no field {error}; is this the published file? ({self.source})"
            ) from None
        expected = self.counts[chosen]
        if expected is not None and len(samples) != expected:
            said = f"{len(samples)} samples where {expected} are published"
            if not partial:
                raise InputError(f"{self.name} {chosen}: {said}; take them as they are with --partial")
            note(said)
        if folder is not None:
            self._check_sums(folder, partial, note)
        return samples

    def _check_sums(self, folder: Path, partial: bool, note: Callable[[str], None]) -> None:
        for name, digest in self.sha256.items():
            for file in sorted(folder.rglob(name)):
                if sha256_file(file) != digest:
                    if not partial:
                        raise InputError(f"{self.name}: {file} is not the published file; take it with --partial")
                    note(f"{name} is not the published file")

    def to_json(self) -> dict[str, Any]:
        """Everything but the reader."""
        return {
            "name": self.name, "title": self.title, "measures": self.measures, "source": self.source,
            "licence": self.licence, "needs": self.needs or "nothing", "hub": self.hub, "counts": dict(self.counts),
        }  # fmt: skip


_SETS = (
    NamedSet("vlsafe", "VLSafe, examine split", "unsafe rate; harm in the text, image benign",
             "github.com/YangyiYY/LVLM_NLF, arXiv 2311.10081", "unstated",
             "harmlessness_examine.jsonl (image_id, caption, query), and the COCO images in val2014/ or images/",
             {"examine": 1110}, readers.vlsafe),
    NamedSet("jailbreak-llms", "JailbreakLLMs with images (the paper's manipulation)", "unsafe rate; harm in the text",
             "github.com/verazuo/jailbreak_llms, arXiv 2308.03825; pairing: arXiv 2410.09047", "MIT (text)",
             "forbidden_question_set.csv, COCO's captions_val2014.json, and its images in val2014/",
             {"forbidden": None}, readers.jailbreak_llms),
    NamedSet("figstep", "FigStep SafeBench", "unsafe rate; harm written in the image",
             "github.com/ThuCCSLab/FigStep, arXiv 2311.05608", "MIT",
             "SafeBench-Tiny.csv (or safebench.csv) and the images query_ForbidQI_*_6.png, or the repository as cloned",
             {"tiny": 50, "tiny-text": 50, "full": 500, "full-text": 500}, readers.figstep,
             sha256={"SafeBench-Tiny.csv": "e5f85f7d0323fe2e4afa99f6715ee97c2581d93856af4728a72fdec94338e867"}),
    NamedSet("mm-safetybench", "MM-SafetyBench", "unsafe rate; harm in image and text",
             "github.com/isXinLiu/MM-SafetyBench, arXiv 2311.17600", "CC BY-NC 4.0",
             "data/processed_questions/*.json and the unpacked images in data/imgs/SCENARIO/{SD,TYPO,SD_TYPO}/N.jpg",
             {"SD": 1680, "TYPO": 1680, "SD_TYPO": 1680}, readers.mm_safetybench),
    NamedSet("mm-harmfulbench", "MM-HarmfulBench", "unsafe rate; harm in image and text together",
             "github.com/Jihuai-wpy/InferAligner, arXiv 2401.11206", "Apache-2.0 (repository)",
             "mm_harmful.jsonl and images/N.jpg, as in the folder MM-HarmfulBench of the repository",
             {"all": 100}, readers.mm_harmfulbench),
    NamedSet("hades", "HADES, last step", "unsafe rate; harm moved into the image",
             "hub Monosail/HADES, arXiv 2403.09792", "MIT",
             "the hub set's Parquet files test*.parquet, or a folder saved by `datasets`",
             {"step5": 750}, readers.hades, hub="Monosail/HADES"),
    NamedSet("jailbreakv", "JailBreakV-28K", "unsafe rate; jailbreaks in text and image",
             "hub JailbreakV-28K/JailBreakV-28k, arXiv 2404.03027", "MIT",
             "JailBreakV_28K.csv (or mini_JailBreakV_28K.csv) beside the images that its image_path names",
             {"mini": 280, "full": 28000}, readers.jailbreakv),
    NamedSet("vlguard", "VLGuard, test split", "unsafe rate (unsafes, safe_unsafes), over-refusal (safe_safes)",
             "hub ys-zong/VLGuard (gated), arXiv 2402.02207", "as on the hub",
             "test.json and the unpacked images in test/",
             {"unsafes": 442, "safe_unsafes": 558, "safe_safes": 558}, readers.vlguard),
    NamedSet("siuo", "SIUO, generation", "unsafe rate; safe inputs, unsafe together",
             "github.com/sinwang20/SIUO, hub sinwang/SIUO, arXiv 2406.15279", "as published",
             "siuo_gen.json and images/", {"gen": 167}, readers.siuo),
    NamedSet("msts", "MSTS, English", "unsafe rate; unsafe only in combination",
             "hub felfri/MSTS, arXiv 2501.10057", "CC BY 4.0",
             "the hub set's Parquet files english*.parquet, or a folder saved by `datasets`",
             {"english": 400}, readers.msts, hub="felfri/MSTS"),
    NamedSet("xstest", "XSTest v2", "over-refusal (safe), refusal (unsafe); text alone",
             "github.com/paul-rottger/xstest, arXiv 2308.01263", "CC BY 4.0", "prompts.csv (xstest_prompts.csv)",
             {"all": 450, "safe": 250, "unsafe": 200}, readers.xstest, sha256={"prompts.csv": "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a"}),
    NamedSet("mossbench", "MOSSBench", "over-refusal with image",
             "github.com/xirui-li/MOSSBench, arXiv 2406.17806", "CC BY-SA 4.0, no training on it",
             "data/images_information/information.json and data/images/, as in the repository",
             {"all": 300}, readers.mossbench),
    NamedSet("llava-bench-coco", "LLaVA-Bench (COCO)", "utility, by a judge",
             "github.com/haotian-liu/LLaVA, arXiv 2304.08485", "Apache-2.0 (repository)",
             "qa90_questions.jsonl, qa90_gpt4_answer.jsonl, caps_boxes_coco2014_val_80.jsonl, COCO images in val2014/",
             {"qa90": 90}, readers.llava_bench, sha256={"qa90_questions.jsonl": "2a77196696b5602b544244ace9aeac21300513be85b5e53eb2414d00cddbe1c7"}),
    NamedSet("scienceqa", "ScienceQA, test split", "utility, exact match",
             "github.com/lupantech/ScienceQA, arXiv 2209.09513", "CC BY-NC-SA 4.0",
             "problems.json, pid_splits.json, and images in images/test/ID/",
             {"test": 4241, "test-image": 2017}, readers.scienceqa),
    NamedSet("pope", "POPE on COCO", "utility, exact match (yes or no)",
             "github.com/RUCAIBox/POPE, arXiv 2305.10355", "MIT",
             "coco_pope_{random,popular,adversarial}.json and the COCO images in val2014/",
             {"random": 3000, "popular": 3000, "adversarial": 3000}, readers.pope),
    NamedSet("mme", "MME, yes-or-no questions", "utility, exact match (yes or no)",
             "hub lmms-lab/MME, arXiv 2306.13394", "as published",
             "the hub set's Parquet files test*.parquet, or a folder saved by `datasets`",
             {"test": 2374}, readers.mme, hub="lmms-lab/MME"),
    NamedSet("easy-vqa", "easy-VQA", "utility, exact match", "PyPI easy-vqa 1.0", "MIT", "",
             {"test": 9673, "train": 38575}, readers.easy_vqa),
    NamedSet("cmrm", "cmrm's own prompts with easy-VQA images", "unsafe rate and over-refusal; harm in the text",
             "this package", "MIT", "",
             {"anchor": 192, "anchor-harmful": 96, "anchor-benign": 96, "test": 480, "test-harmful": 240,
              "test-benign": 240}, readers.ours),
)  # fmt: skip

HARM: Mapping[str, str | Mapping[str, str]] = {
    "vlsafe": "text", "jailbreak-llms": "text", "cmrm": "text", "xstest": "text",
    "figstep": {"tiny": "image", "full": "image", "tiny-text": "text", "full-text": "text"},
    "hades": "image",
    "vlguard": {"unsafes": "image", "safe_unsafes": "text", "safe_safes": "text"},
    "mm-safetybench": "both", "mm-harmfulbench": "both", "jailbreakv": "both", "siuo": "both", "msts": "both",
}  # fmt: skip
"""Where a set's harm is; by variant where they differ."""


def place_of(name: str, variant: str | None = None) -> Path | None:
    """Where a named set lies below the folder that the environment variable `CMRM_DATA` names: the folder of its name and variant, that of
    its name, or the first whose name begins with it and goes on with `-` or `_`; `_` stands for `-` too. None where there is none.

    Raises:
        InputError: `CMRM_DATA` names no folder.
    """
    root = os.environ.get("CMRM_DATA")
    if not root:
        return None
    if not Path(root).expanduser().is_dir():
        raise InputError(f"CMRM_DATA names {root}, which is no folder")
    wanted = name.replace("_", "-")
    whole = f"{wanted}-{variant or ''}".lower().replace("_", "-")
    folders = sorted(f for f in Path(root).expanduser().iterdir() if f.is_dir())
    called = [(f, f.name.lower().replace("_", "-")) for f in folders]
    exact = [f for f, held in called if held == whole] + [f for f, held in called if held == wanted]
    others = [f for f, held in called if held.startswith(f"{wanted}-")]
    return next(iter(exact + others), None)


NAMED = {s.name: s for s in _SETS}
"""Every named set by its name."""

"""Named sets: where each comes from, which files it needs, its counts, and how its rows are read.

Only easy-VQA and our own prompts come with a package; all others are fetched by the user. Counts
are the published ones and are checked; checksums too where the file was available.
Every reader keeps the category, the label (`harmful`: an aligned model refuses; `benign`: it
answers; None: a utility set) and, for utility sets, the reference answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmrm.errors import InputError
from cmrm.files import sha256_file
from cmrm.prompts import readers
from cmrm.prompts.ours.samples import DEMO_PER_CATEGORY, DEMO_QUESTIONS, demo_samples
from cmrm.prompts.place import Place, place_of
from cmrm.prompts.sample import Sample
from cmrm.prompts.text import shortened

Reader = Callable[[Place], Iterator[Sample]]


@dataclass(frozen=True)
class NamedSet:
    """A set with a name, and its official layout on disk."""

    name: str
    """What `--data`, `--sets` and `--anchors` take."""
    title: str
    """Its full name."""
    measures: str
    """What it is for: unsafe rate, over-refusal or utility."""
    source: str
    """Repository or hub id, and paper."""
    licence: str
    """As published; `unstated` where it is not."""
    needs: str
    """Files that the folder of `--path` must hold; empty for sets that come with a package."""
    counts: Mapping[str, int | None]
    """Variant -> published number of samples; None where it depends on the user's files.

    The first variant is the default."""
    reader: Reader = field(repr=False)
    """Rows to samples."""
    harm: str | Mapping[str, str] | None = None
    """Where the harm of its harmful samples is (`text`, `image`, `both`), by variant where they
    differ; None for sets without harm."""
    hub: str | None = None
    """Hub id that it can be read from with the `data` extra."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """File name -> hex sha256 of the published file."""
    drawn: Callable[[int], Sequence[Sample]] | None = field(default=None, repr=False)
    """Draws a limited part, for a set that is composed of several kinds; None: by hashed id."""

    def chosen_variant(self, variant: str | None) -> str:
        """`variant`, or the default for None.

        Raises:
            InputError: the set has no such variant.
        """
        chosen = variant or next(iter(self.counts))
        if chosen not in self.counts:
            raise InputError(
                f"{self.name} has no variant {chosen!r}; one of {', '.join(self.counts)}"
            )
        return chosen

    def harm_of(self, variant: str | None) -> str | None:
        """Where the harm of a variant's harmful samples is; None for sets without."""
        if self.harm is None or isinstance(self.harm, str):
            return self.harm
        return self.harm.get(variant or next(iter(self.counts)))

    def read(
        self,
        path: Path | None,
        *,
        variant: str | None = None,
        partial: bool = False,
        limit: int | None = None,
        seed: int = 0,
        note: Callable[[str], None] = lambda text: None,
    ) -> list[Sample]:
        """Samples of one variant.

        Args:
            path: folder of the set; None: the one below `CMRM_DATA`, or the hub.
            variant: which variant; None: the first.
            partial: accept counts and checksums that are not the published ones.
            limit: draw so many of each kind, for a set that has `drawn`; others are read whole.
            seed: seed of sets that are composed by a recipe.
            note: receives what a reader of the results must know.

        Raises:
            InputError: files are missing, a row has another form, or the count or a checksum is not
                the published one and `partial` is off.
        """
        chosen = self.chosen_variant(variant)
        if limit is not None and self.drawn is not None:
            note(f"at most {limit} of each kind")
            return list(self.drawn(limit))
        place = self._place(path, chosen, seed)
        try:
            samples = list(self.reader(place))
            if not all(isinstance(sample.query, str) for sample in samples):
                raise TypeError("a query is no text")
        except KeyError as error:
            raise InputError(
                f"{self.name}: a row has no field {shortened(error)}; is this the published file? "
                f"({self.source})"
            ) from None
        except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError):
            raise InputError(
                f"{self.name}: a row has another form than the published ones; is this the "
                f"published file? ({self.source})"
            ) from None
        expected = self.counts[chosen]
        if expected is not None and len(samples) != expected:
            difference = f"{len(samples)} samples where {expected} are published"
            if not partial:
                raise InputError(f"{self.name} {chosen}: {difference}; accept them with --partial")
            note(difference)
        if place.folder is not None:
            self._check_sums(place.folder, partial, note)
        return samples

    def _place(self, path: Path | None, variant: str, seed: int) -> Place:
        """Where the set is read from."""
        if path is not None and not path.exists():
            raise InputError(f"{self.name}: there is no folder {path}; needed: {self.needs}")
        if path is None and self.needs:
            path = place_of(self.name, variant)
        if path is None and self.needs and self.hub is None:
            raise InputError(
                f"{self.name} needs --path, or CMRM_DATA with a folder {self.name} in it; it must "
                f"hold: {self.needs} (from {self.source})"
            )
        folder = path.parent if path is not None and path.is_file() else path
        return Place(folder, self.hub if path is None else None, variant, seed, self.needs)

    def _check_sums(self, folder: Path, partial: bool, note: Callable[[str], None]) -> None:
        for name, digest in self.sha256.items():
            for file in sorted(folder.rglob(name)):
                if sha256_file(file) != digest:
                    if not partial:
                        raise InputError(
                            f"{self.name}: {file} is not the published file; accept it with "
                            "--partial"
                        )
                    note(f"{name} is not the published file")

    def to_json(self) -> dict[str, Any]:
        """Everything but the reader."""
        return {
            "name": self.name,
            "title": self.title,
            "measures": self.measures,
            "source": self.source,
            "licence": self.licence,
            "needs": self.needs or "nothing",
            "hub": self.hub,
            "counts": dict(self.counts),
        }


_SETS = (
    NamedSet("vlsafe", "VLSafe, examine split", "unsafe rate; harm in the text, image benign",
        "github.com/YangyiYY/LVLM_NLF, arXiv 2311.10081", "unstated",
        "harmlessness_examine.jsonl (image_id, caption, query), and the COCO images in val2014/ or "
        "images/", {"examine": 1110}, readers.vlsafe, harm="text"),
    NamedSet("jailbreak-llms", "JailbreakLLMs with images (the paper's manipulation)",
        "unsafe rate; harm in the text",
        "github.com/verazuo/jailbreak_llms, arXiv 2308.03825; pairing: arXiv 2410.09047",
        "MIT (text)",
        "forbidden_question_set.csv (column question), COCO's captions_val2014.json, and its "
        "images in val2014/", {"forbidden": None}, readers.jailbreak_llms, harm="text"),
    NamedSet("figstep", "FigStep SafeBench", "unsafe rate; harm written in the image",
        "github.com/ThuCCSLab/FigStep, arXiv 2311.05608", "MIT",
        "SafeBench-Tiny.csv (or safebench.csv) and the images query_ForbidQI_*_6.png, or the "
        "repository as cloned", {"tiny": 50, "tiny-text": 50, "full": 500, "full-text": 500},
        readers.figstep,
        harm={"tiny": "image", "full": "image", "tiny-text": "text", "full-text": "text"},
        sha256={"SafeBench-Tiny.csv": "e5f85f7d0323fe2e4afa99f6715ee97c"
        "2581d93856af4728a72fdec94338e867"}),
    NamedSet("mm-safetybench", "MM-SafetyBench", "unsafe rate; harm in image and text",
        "github.com/isXinLiu/MM-SafetyBench, arXiv 2311.17600", "CC BY-NC 4.0",
        "data/processed_questions/*.json and the unpacked images in "
        "data/imgs/SCENARIO/{SD,TYPO,SD_TYPO}/N.jpg",
        {"SD": 1680, "TYPO": 1680, "SD_TYPO": 1680}, readers.mm_safetybench, harm="both"),
    NamedSet("mm-harmfulbench", "MM-HarmfulBench",
        "unsafe rate; harm in image and text together",
        "github.com/Jihuai-wpy/InferAligner, arXiv 2401.11206", "Apache-2.0 (repository)",
        "mm_harmful.jsonl and images/N.jpg, as in the folder MM-HarmfulBench of the repository",
        {"all": 100}, readers.mm_harmfulbench, harm="both"),
    NamedSet("hades", "HADES, last step", "unsafe rate; harm moved into the image",
        "hub Monosail/HADES, arXiv 2403.09792", "MIT",
        "the hub set's Parquet files test*.parquet, or a folder saved by `datasets`",
        {"step5": 750}, readers.hades, harm="image", hub="Monosail/HADES"),
    NamedSet("jailbreakv", "JailBreakV-28K", "unsafe rate; jailbreaks in text and image",
        "hub JailbreakV-28K/JailBreakV-28k, arXiv 2404.03027", "MIT",
        "JailBreakV_28K.csv (or mini_JailBreakV_28K.csv) beside the images that its image_path "
        "names", {"mini": 280, "full": 28000}, readers.jailbreakv, harm="both"),
    NamedSet("vlguard", "VLGuard, test split",
        "unsafe rate (unsafes, safe_unsafes), over-refusal (safe_safes)",
        "hub ys-zong/VLGuard (gated), arXiv 2402.02207", "as on the hub",
        "test.json and the unpacked images in test/",
        {"unsafes": 442, "safe_unsafes": 558, "safe_safes": 558}, readers.vlguard,
        harm={"unsafes": "image", "safe_unsafes": "text", "safe_safes": "text"}),
    NamedSet("siuo", "SIUO, generation", "unsafe rate; safe inputs, unsafe together",
        "github.com/sinwang20/SIUO, hub sinwang/SIUO, arXiv 2406.15279", "as published",
        "siuo_gen.json and images/", {"gen": 167}, readers.siuo, harm="both"),
    NamedSet("msts", "MSTS, English", "unsafe rate; unsafe only in combination",
        "hub felfri/MSTS, arXiv 2501.10057", "CC BY 4.0",
        "the hub set's Parquet files english*.parquet, or a folder saved by `datasets`",
        {"english": 400}, readers.msts, harm="both", hub="felfri/MSTS"),
    NamedSet("xstest", "XSTest v2", "over-refusal (safe), refusal (unsafe); text alone",
        "github.com/paul-rottger/xstest, arXiv 2308.01263", "CC BY 4.0",
        "prompts.csv (xstest_prompts.csv)", {"all": 450, "safe": 250, "unsafe": 200},
        readers.xstest, harm="text", sha256={"prompts.csv": "11783fb294ed017473ee53c207d71f21"
        "61c7672c8d0b037501e78387f801cb5a"}),
    NamedSet("mossbench", "MOSSBench", "over-refusal with image",
        "github.com/xirui-li/MOSSBench, arXiv 2406.17806", "CC BY-SA 4.0, no training on it",
        "data/images_information/information.json and data/images/, as in the repository",
        {"all": 300}, readers.mossbench),
    NamedSet("llava-bench-coco", "LLaVA-Bench (COCO)", "utility, by a judge",
        "github.com/haotian-liu/LLaVA, arXiv 2304.08485", "Apache-2.0 (repository)",
        "qa90_questions.jsonl, qa90_gpt4_answer.jsonl, caps_boxes_coco2014_val_80.jsonl, COCO "
        "images in val2014/", {"qa90": 90}, readers.llava_bench,
        sha256={"qa90_questions.jsonl": "2a77196696b5602b544244ace9aeac21"
        "300513be85b5e53eb2414d00cddbe1c7"}),
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
    NamedSet("cmrm", "cmrm's own prompts with easy-VQA images",
        "unsafe rate and over-refusal; harm in the text", "this package", "MIT", "",
        {"anchor": 192, "anchor-harmful": 96, "anchor-benign": 96, "test": 480,
         "test-harmful": 240, "test-benign": 240}, readers.ours, harm="text"),
    NamedSet("demo", "what `cmrm demo` measures: cmrm's test prompts and easy-VQA questions",
        "unsafe rate, over-refusal and utility; harm in the text",
        "this package, PyPI easy-vqa 1.0", "MIT", "",
        {"test": 2 * 12 * DEMO_PER_CATEGORY + DEMO_QUESTIONS}, readers.demo, harm="text",
        drawn=demo_samples),
)  # fmt: skip

NAMED: Mapping[str, NamedSet] = {named_set.name: named_set for named_set in _SETS}
"""Every named set by its name."""

"""A few rows of each named set in its official layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

COCO = "COCO_val2014_000000000007.jpg"


def put(folder: Path, files: dict[str, Any]) -> Path:
    """Write files by their relative path: text, JSON, or a small image for None."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (9, 9), "blue").save(path)
        else:
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            path.write_text(text, encoding="utf-8")
    return folder


PAIRS = [
    {"safe_instruction": "s", "response": "x"},
    {"unsafe_instruction": "u", "response": "y"},
]
PROBLEM = {
    "question": "q", "choices": ["x", "y"], "answer": 1, "hint": "h", "image": "image.png",
    "subject": "s",
}  # fmt: skip
LAYOUTS: dict[tuple[str, str], dict[str, Any]] = {
    ("vlsafe", "examine"): {
        "harmlessness_examine.jsonl": {"image_id": COCO[-16:], "caption": "a cat", "query": "q"},
        f"val2014/{COCO}": None,
    },
    ("figstep", "full"): {
        "data/question/safebench.csv":
            "dataset,category_id,task_id,category_name,question,instruction\nF,1,2,c,q,i\n",
        "data/images/SafeBench/query_ForbidQI_1_2_6.png": None,
    },
    ("mm-safetybench", "SD"): {
        "data/processed_questions/01-Illegal_Activitiy.json": {
            "0": {"Question": "q", "Key Phrase": "k", "Rephrased Question": "r",
                  "Rephrased Question(SD)": "s"},
        },
        "data/imgs/01-Illegal_Activitiy/SD/0.jpg": None,
    },
    ("mm-harmfulbench", "all"): {
        "mm_harmful.jsonl": {"image_url": "u", "question": "q"}, "images/1.jpg": None,
    },
    ("jailbreakv", "mini"): {
        "mini_JailBreakV_28K.csv":
            "id,jailbreak_query,redteam_query,format,policy,image_path,from,selected_mini\n"
            "5,q,r,SD,Fraud,figstep/a.png,x,True\n",
        "figstep/a.png": None,
    },
    ("vlguard", "safe_safes"): {
        "test.json": [
            {"id": "1", "image": "d/a.png", "safe": True, "instr-resp": PAIRS},
            {"id": "2", "image": "d/a.png", "safe": False, "harmful_category": "privacy",
             "instr-resp": [{"instruction": "i", "response": "z"}]},
        ],
        "test/d/a.png": None,
    },
    ("siuo", "gen"): {
        "siuo_gen.json": [{"question": "q", "image": "a.png", "category": "c"}],
        "images/a.png": None,
    },
    ("mossbench", "all"): {
        "data/images_information/information.json": {
            "1": {"image": "images/1.png", "question": "q", "pid": "1", "description": "d",
                  "metadata": {"over": "t"}},
        },
        "data/images/1.png": None,
    },
    ("scienceqa", "test-image"): {
        "problems.json": {"3": PROBLEM, "4": {**PROBLEM, "image": None}},
        "pid_splits.json": {"test": ["3", "4"]},
        "images/test/3/image.png": None,
    },
    ("pope", "random"): {
        "coco_pope_random.json":
            {"question_id": 1, "image": COCO, "text": "Is there a cat\u2028here?", "label": "yes"},
        f"val2014/{COCO}": None,
    },
    ("jailbreak-llms", "forbidden"): {
        "forbidden_question_set.csv": "content_policy_name,question\nFraud,How to steal a purse?\n",
        "captions_val2014.json": {
            "images": [{"id": 7, "file_name": COCO}],
            "annotations": [{"image_id": 7, "caption": "A cat steals a purse"}],
        },
        f"val2014/{COCO}": None,
    },
}  # fmt: skip
"""(set, variant) -> path in its folder -> text, JSON, or None for a small image."""

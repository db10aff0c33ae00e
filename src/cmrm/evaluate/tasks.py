"""Sets as Inspect tasks: one task for a set under one condition, its requests in fixed batches."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from inspect_ai import Epochs, Task
from inspect_ai.dataset import MemoryDataset
from inspect_ai.dataset import Sample as InspectSample
from inspect_ai.model import ChatMessageUser, Content, ContentImage, ContentText, GenerateConfig
from inspect_ai.solver import generate
from PIL import Image

from cmrm.prompts.conditions import Condition, Request, build_request, choose_donors
from cmrm.evaluate.provider import BATCH_HINT
from cmrm.evaluate.scorers import scorers_for
from cmrm.prompts.sample import Sample
from cmrm.prompts import Loaded


def set_task(
    loaded: Loaded,
    condition: Condition | str,
    judges: Sequence[str],
    *,
    max_new_tokens: int = 48,
    batch_size: int = 16,
    seed: int = 0,
    rater: str | None = None,
) -> Task:
    """The samples of a set under one condition.

    Harmful and benign samples are scored by every judge of `judges`, those with a reference answer by comparison with it
    (`Sample.match`), or by `rater` where they ask for a judge. Samples are ordered by length and put into fixed batches, which a cmrm model keeps to: a run that was killed and goes on
    computes the very same batches.
    """
    condition = Condition(condition)
    donors = choose_donors(loaded.samples, seed=seed) if condition is Condition.OTHER else None
    ordered = sorted(loaded.samples, key=lambda s: (s.answer is not None, len(s.query), s.id))
    rows = []
    for at, sample in enumerate(ordered):
        batch = at // batch_size
        hint = {
            "id": f"{loaded.name}/{condition.value}/{batch}",
            "size": min(batch_size, len(ordered) - batch * batch_size),
            "key": sample.id,
        }
        request = build_request(sample, condition, seed=seed, donors=donors)
        rows.append(
            InspectSample(
                id=sample.id,
                input=[ChatMessageUser(content=content_of(request), metadata={BATCH_HINT: hint})],
                target=sample.answer or "",
                metadata=sample_metadata(sample, loaded.name, condition),
            )
        )
    return Task(
        dataset=MemoryDataset(rows, name=loaded.name),
        solver=generate(),
        scorer=scorers_for(judges, rater),
        epochs=Epochs(1, "mode"),  # the default reducer would turn verdicts into numbers before the metrics see them
        config=GenerateConfig(max_tokens=max_new_tokens),
        name=f"{loaded.name}-{condition.value}",
        metadata={"set": loaded.to_json(), "condition": condition.value, "seed": seed, "batch_size": batch_size},
    )


def sample_metadata(sample: Sample, name: str, condition: Condition) -> dict[str, str]:
    """What scorers and tables read of a sample."""
    if sample.label in {"harmful", "benign"}:
        kind = str(sample.label)
    elif sample.answer is None:
        kind = "other"
    else:
        kind = "open" if sample.match == "judge" else "utility"
    return {
        "set": name,
        "condition": condition.value,
        "kind": kind,
        "category": sample.category or "",
        "request": sample.query,
        "match": sample.match,
        "context": sample.context or "",
    }


def content_of(request: Request) -> list[Content]:
    """A request's images and text, in its order, images as lossless data URIs."""
    images: list[Content] = [ContentImage(image=data_uri(image)) for image in request.images]
    said: list[Content] = [ContentText(text=request.text)]
    return said + images if request.image_last else images + said


def data_uri(image: Image.Image) -> str:
    """As PNG."""
    held = io.BytesIO()
    image.save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()

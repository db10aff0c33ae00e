"""Sets as Inspect tasks: one task for a set under one condition, its requests in fixed batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from inspect_ai import Epochs, Task
from inspect_ai.dataset import MemoryDataset
from inspect_ai.dataset import Sample as InspectSample
from inspect_ai.model import ChatMessageUser, Content, ContentImage, ContentText, GenerateConfig
from inspect_ai.solver import generate

from cmrm.evaluate.batcher import Place
from cmrm.evaluate.provider import PLACE
from cmrm.evaluate.scorers import scorers_for
from cmrm.measure.loop import ask_batches, batch_id, ordered
from cmrm.measure.outcomes import kind_of
from cmrm.prompts import Loaded
from cmrm.prompts.conditions import Condition, Request
from cmrm.prompts.images import data_uri
from cmrm.prompts.sample import Sample


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

    Harmful and benign samples are scored by every judge of `judges`, those with a reference answer
    by comparison with it (`Sample.match`), or by `rater` where they ask for a judge. The requests
    stand in the batches of `measure.loop`, which a cmrm model keeps to: a run that was killed and
    is started again computes the very same batches.

    Raises:
        InputError: a sample cannot be put under the condition, or a judge cannot be used.
    """
    condition = Condition(condition)
    samples = ordered(loaded.samples)
    rows: list[InspectSample] = []
    for asks in ask_batches(samples, condition, seed=seed, batch_size=batch_size):
        batch = batch_id(asks)
        for index, ask in enumerate(asks):
            place = {**asdict(Place(batch, len(asks), index)), "key": ask.key}
            message = ChatMessageUser(content=content_of(ask.request), metadata={PLACE: place})
            sample = samples[len(rows)]
            rows.append(
                InspectSample(
                    id=sample.id,
                    input=[message],
                    target=sample.answer or "",
                    metadata=sample_metadata(sample, loaded.name, condition),
                )
            )
    return Task(
        dataset=MemoryDataset(rows, name=loaded.name),
        solver=generate(),
        scorer=scorers_for(judges, rater),
        # The default reducer would turn verdicts into numbers before the metrics see them.
        epochs=Epochs(1, "mode"),
        config=GenerateConfig(max_tokens=max_new_tokens),
        name=f"{loaded.name}-{condition.value}",
        metadata={
            "set": loaded.to_json(),
            "condition": condition.value,
            "seed": seed,
            "batch_size": batch_size,
        },
    )


def sample_metadata(sample: Sample, name: str, condition: Condition) -> dict[str, str]:
    """What scorers and tables read of a sample."""
    return {
        "set": name,
        "condition": condition.value,
        "kind": kind_of(sample),
        "category": sample.category or "",
        "request": sample.query,
        "match": sample.match,
        "context": sample.context or "",
    }


def content_of(request: Request) -> list[Content]:
    """A request's images and text, in its order, images as lossless data URIs."""
    images: list[Content] = [ContentImage(image=data_uri(image)) for image in request.images]
    text: list[Content] = [ContentText(text=request.text)]
    return text + images if request.image_last else images + text

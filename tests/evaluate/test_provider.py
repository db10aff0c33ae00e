"""The provider: conversations, arguments, and the defended model behind them."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset
from inspect_ai.dataset import Sample as InspectSample
from inspect_ai.model import (
    ChatMessageUser,
    ContentImage,
    ContentText,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.solver import multiple_choice
from typer.testing import CliRunner

from cmrm import Sample, estimate_shift, generate, stream
from cmrm.cli.main import app
from cmrm.errors import ArtifactError, CmrmError, InputError
from cmrm.evaluate import provider
from cmrm.evaluate.fitting import fit_defenses
from cmrm.evaluate.provider import CmrmAPI, shared_engine
from cmrm.prompts.images import data_uri
from cmrm.steering.setting import Steering
from evaluate.plans import COLOURS, anchors, count_batches, picture, rows_file, small_plan
from tiny import vlm_of

pytestmark = pytest.mark.usefixtures("no_models_left")


def message(text: str, colour: str | None = None) -> ChatMessageUser:
    if colour is None:
        return ChatMessageUser(content=text)
    image = ContentImage(image=data_uri(picture(colour)))
    return ChatMessageUser(content=[image, ContentText(text=text)])


def ask(api: CmrmAPI, messages: list[ChatMessageUser], **config: Any) -> list[str]:
    """Completions of concurrent requests; `! error` for one that failed."""

    async def together() -> list[str]:
        settings = GenerateConfig(max_tokens=4, **config)
        requests = (api.generate([each], [], "none", settings) for each in messages)
        outputs = await asyncio.gather(*requests, return_exceptions=True)
        return [f"! {o}" if isinstance(o, BaseException) else o.completion for o in outputs]

    return asyncio.run(together())


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are generated."""
    return count_batches(monkeypatch)


def test_inspect_finds_the_provider_by_its_entry_point(checkpoint: str) -> None:
    code = (
        "import sys; from inspect_ai.model import get_model; "
        "print(type(get_model('cmrm/' + sys.argv[1]).api).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, checkpoint], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("CmrmAPI"), done.stderr[-400:]


def test_replies_are_those_of_generate(checkpoint: str) -> None:
    api = CmrmAPI(checkpoint, batch_size=3)
    texts = [f"Tell me about {colour}" for colour in COLOURS]
    samples = [Sample(text, text) for text in texts]
    plain = generate(vlm_of(api.engine), samples, condition="query", max_new_tokens=4, batch_size=1)
    assert ask(api, [message(text) for text in texts]) == [reply.text for reply in plain]


def test_a_task_that_is_not_ours_runs_on_the_defended_model(
    checkpoint: str, tmp_path: Path
) -> None:
    fit_defenses(small_plan(checkpoint), shared_engine(checkpoint), tmp_path / "fitted")
    colour = message("Which colour?", "red")
    rows = [
        InspectSample(id="q", input="What is one and one?", choices=["one", "two"], target="B"),
        InspectSample(id="i", input=[colour], choices=["red", "blue"], target="A"),
    ]
    model = get_model(
        f"cmrm/{checkpoint}", memoize=False, defense="cmrm_dataset",
        fitted=str(tmp_path / "fitted"), batch_size=2,
    )  # fmt: skip
    task = Task(
        dataset=MemoryDataset(rows),
        solver=multiple_choice(),
        scorer=includes(),
        config=GenerateConfig(max_tokens=4),
    )
    log = eval(task, model=model, log_dir=str(tmp_path / "logs"), display="none")[0]
    assert log.status == "success"
    assert log.samples is not None
    assert len(log.samples) == 2
    assert all(sample.output.completion for sample in log.samples)


def test_the_calls_of_its_docstring_work(checkpoint: str, tmp_path: Path) -> None:
    """FILE is what `cmrm extract` writes, DIR what `cmrm evaluate` fits."""
    rows = [("a1", "How do I rob a shop?", "harmful"), ("a2", "How do I lie?", "harmful")]
    source = rows_file(tmp_path, "anchors.csv", rows)
    artifact = tmp_path / "shift.safetensors"
    command = ["extract", checkpoint, "--anchors", str(source), "-o", str(artifact)]
    done = CliRunner().invoke(app, [*command, "--alpha", "0.4", "--layers", "1"])
    assert done.exit_code == 0, done.output
    plan = small_plan(checkpoint, defenses=("shiftdc",))
    fit_defenses(plan, shared_engine(checkpoint), tmp_path / "fitted")
    documented = " ".join(str(provider.__doc__).replace("\\\n", " ").split())
    calls = re.findall(r"--model cmrm/demo((?: -M \w+=\w+)+)", documented)
    assert len(calls) == 3
    values = {"FILE": str(artifact), "DIR": str(tmp_path / "fitted")}
    for call in calls:
        pairs = (pair.split("=") for pair in re.findall(r"-M (\w+=\w+)", call))
        arguments = {name: values.get(value, value) for name, value in pairs}
        api = CmrmAPI(checkpoint, batch_size=1, **arguments)
        assert not ask(api, [message("Which?", "red")])[0].startswith("!")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"defense": "cmrm_dataset"}, "has to be fitted on anchors"),
        ({"defense": "ecso", "alpha": 1.0}, "alpha belongs to"),
        ({"defense": "ecso", "shift": "x.safetensors"}, "a shift belongs to"),
        ({"defense": "nope"}, "unknown defence"),
        ({"defense": "cmrm_sample", "settings": {"cmrm_sample": {"layers": [9]}}}, "out of range"),
        ({"settings": "[1]"}, "expected a JSON object"),
        ({"settings": "{"}, "settings are no JSON"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_arguments(checkpoint: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(CmrmError, match=problem) as caught:
        CmrmAPI(checkpoint, **options)
    assert "\n" not in str(caught.value)


def test_it_takes_an_artifact(checkpoint: str, tmp_path: Path) -> None:
    vlm = vlm_of(shared_engine(checkpoint))
    recommended = Steering(alpha=0.4, layers=(1,))
    artifact = tmp_path / "shift.safetensors"
    replace(estimate_shift(vlm, anchors().harmful), recommended=recommended).save(artifact)

    def made(**arguments: Any) -> CmrmAPI:
        return CmrmAPI(checkpoint, shift=str(artifact), **arguments)

    api = made(defense="cmrm_dataset")
    assert (api.defense.settings["alpha"], api.defense.settings["layers"]) == (0.4, [1])
    stronger = made(defense="cmrm_dataset", alpha=0.9)
    assert stronger.defense.settings["alpha"] == 0.9
    assert stronger.answering.context != api.answering.context
    paper = made(defense="cmrm_dataset@paper").defense.settings
    assert (paper["schedule"], paper["layers"]) == ("per_layer", None), "a variant is its own"
    with pytest.raises(InputError, match="'cmrm_dataset@papre' has no settings"):
        made(defense="cmrm_dataset@papre", alpha=0.2)
    with pytest.raises(InputError, match="say estimator 'mean', the shift was"):
        made(defense="cmrm_dataset", settings={"cmrm_dataset": {"estimator": "mean"}})
    with torch.no_grad():
        next(vlm.model.parameters()).data.add_(1.0)
    with pytest.raises(ArtifactError, match="does not fit"):
        made(defense="cmrm_dataset")


def test_what_a_run_fitted_is_no_shift(checkpoint: str, tmp_path: Path) -> None:
    fit_defenses(small_plan(checkpoint), shared_engine(checkpoint), tmp_path)
    state = str(tmp_path / "cmrm_dataset.safetensors")
    with pytest.raises(InputError, match="pass what `cmrm extract` writes"):
        CmrmAPI(checkpoint, defense="cmrm_dataset", shift=state)


def test_out_of_memory_halves_a_batch(checkpoint: str, sizes: list[int]) -> None:
    """A model that takes two rows at most, behind a provider that sends it eight."""
    api = CmrmAPI(checkpoint, batch_size=8)
    model = vlm_of(api.engine).model
    rows = []

    def small(module: Any, arguments: Any, inputs: Any) -> None:
        if inputs["input_ids"].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        rows.append(inputs["input_ids"].shape[0])

    messages = [message(f"Tell me about {k}", "red") for k in range(8)]
    alone = [ask(CmrmAPI(checkpoint, batch_size=1), [each])[0] for each in messages]
    model.register_forward_pre_hook(small, with_kwargs=True)
    sizes.clear()
    with pytest.warns(UserWarning, match="out of memory with a batch of 8"):
        assert ask(api, messages) == alone
    assert max(rows) == 2
    assert sizes == [8], "the provider hands in one batch; it is halved below"


def test_rows_with_and_without_images_are_never_in_one_pass(checkpoint: str) -> None:
    api = CmrmAPI(checkpoint, batch_size=6)
    vlm = vlm_of(api.engine)
    mixed = []

    def watch(module: Any, arguments: Any, inputs: Any) -> None:
        ids = inputs["input_ids"]
        if ids.shape[1] > 1:
            seen = (ids == vlm.image_token_id).any(1)
            mixed.append(bool(seen.any()) and not bool(seen.all()))

    vlm.model.register_forward_pre_hook(watch, with_kwargs=True)
    messages = [message(f"Tell me about {k}", "red" if k % 2 else None) for k in range(6)]
    assert len(ask(api, messages)) == 6
    assert mixed == [False, False]


def test_sampling_is_passed_on(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    api = CmrmAPI(checkpoint, batch_size=1)
    model, options = vlm_of(api.engine).model, []
    generate = model.generate

    def watched(*arguments: Any, **more: Any) -> Any:
        options.append(more)
        return generate(*arguments, **more)

    monkeypatch.setattr(model, "generate", watched)
    ask(api, [message("How?")], temperature=0.7, top_p=0.9, top_k=5)
    ask(api, [message("How?")])
    sampled, greedy = options
    assert sampled["do_sample"]
    assert (sampled["temperature"], sampled["top_p"], sampled["top_k"]) == (0.7, 0.9, 5)
    assert not greedy["do_sample"]


@pytest.mark.parametrize("change", ["template", "processor", "generation", "versions", "nothing"])
def test_stored_replies_hang_on_everything_that_makes_them(
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[int],
    change: str,
) -> None:
    def replies() -> list[str]:
        api = CmrmAPI(checkpoint, batch_size=1, store=str(tmp_path / "replies.db"))
        return ask(api, [message("What is it?", "red")])

    first = replies()
    vlm = vlm_of(shared_engine(checkpoint))
    if change == "template":
        vlm.processor.chat_template = vlm.processor.chat_template.replace("assistant", "Assistant")
    elif change == "processor":
        vlm.processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    elif change == "generation":
        vlm.model.generation_config.repetition_penalty = 1.2
    elif change == "versions":
        versions = {"cmrm": "0", "torch": "0", "transformers": "0"}
        monkeypatch.setattr("cmrm.engines.transformers.library_versions", lambda: versions)
    again = replies()
    if change == "nothing":
        assert again == first
    assert sizes == ([1] if change == "nothing" else [1, 1])


def test_what_is_drawn_at_random_is_not_stored(
    checkpoint: str, tmp_path: Path, sizes: list[int]
) -> None:
    api = CmrmAPI(checkpoint, batch_size=1, store=str(tmp_path / "replies.db"))
    for _ in range(2):
        ask(api, [message("hello")], temperature=1.0)
    assert sizes == [1, 1]
    for _ in range(2):
        ask(api, [message("hello")])
    assert sizes == [1, 1, 1]


def test_tokens_are_counted_without_the_network(checkpoint: str) -> None:
    api = CmrmAPI(checkpoint)
    tokens = vlm_of(api.engine).tokenizer("How many?")["input_ids"]
    assert asyncio.run(api.count_text_tokens("How many?")) == len(tokens)


class Worker(Thread):
    """A thread that keeps what its function returns, or raises."""

    def __init__(self, work: Any) -> None:
        super().__init__()
        self.work = work
        self.outcome: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self.work()
        except BaseException as error:
            self.outcome = error


def strong_and_plain(checkpoint: str) -> tuple[CmrmAPI, CmrmAPI]:
    """Two providers on one model: steered so strongly that its replies change, and untouched."""
    settings = {"cmrm_sample": {"alpha": 40.0}}
    steered = CmrmAPI(checkpoint, defense="cmrm_sample", settings=settings, batch_size=2)
    return steered, CmrmAPI(checkpoint, batch_size=2)


def test_two_providers_on_one_model_do_not_disturb_each_other(checkpoint: str) -> None:
    steered, plain = strong_and_plain(checkpoint)
    assert steered.engine is plain.engine
    messages = [message(f"Tell me about {k}", COLOURS[k % 5]) for k in range(12)]
    alone = ask(steered, messages), ask(plain, messages)
    assert alone[0] != alone[1]
    workers = [
        Worker(lambda api=api: [ask(api, messages) for _ in range(3)]) for api in (steered, plain)
    ]
    for worker in workers:
        worker.join()
    assert [worker.outcome for worker in workers] == [[alone[0]] * 3, [alone[1]] * 3]


def test_a_provider_beside_a_stream(checkpoint: str) -> None:
    steered, _ = strong_and_plain(checkpoint)
    vlm = vlm_of(steered.engine)
    sample = Sample("s", "Tell me about a wall", picture("green"))
    messages = [message(f"Tell me about {k}", COLOURS[k % 5]) for k in range(12)]

    def streamed() -> Any:
        return [list(stream(vlm, sample, max_new_tokens=12))[-1] for _ in range(6)]

    alone = ask(steered, messages), streamed()
    workers = [Worker(lambda: ask(steered, messages)), Worker(streamed)]
    for worker in workers:
        worker.join()
    assert workers[0].outcome == alone[0]
    assert workers[1].outcome == alone[1]

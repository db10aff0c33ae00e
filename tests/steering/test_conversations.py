"""Conversations that others bring: caches filled elsewhere, embeddings, threads, tasks, guidance,
hidden states."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from cmrm import Steering, steer
from cmrm.errors import InputError, SteeringError
from cmrm.model.compat import cache_of, with_cache
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.shift.capture import capture_inputs
from cmrm.steering.hooks import intervene
from cmrm.steering.intervention import Edit, Intervention

IMAGE = Image.new("RGB", (16, 16), "red")
WITH = Request("what is it", (IMAGE,))
WITHOUT = Request("what is it then, tell me more")
LAST = Steering(1.0, "per_layer", "last")


@pytest.fixture
def vectors(vlm: VLM) -> torch.Tensor:
    return 3 * torch.randn(
        vlm.n_layers, vlm.hidden_size, generator=torch.Generator().manual_seed(7)
    )


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def logits(vlm: VLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    out: torch.Tensor = vlm.model(**inputs).logits
    return out


def filled(vlm: VLM, request: Request = WITH) -> dict[str, Any]:
    return with_cache(vlm.model, cache_of(vlm.model(**encode(vlm, [request]), use_cache=True)))


def test_a_filled_cache_that_was_never_seen_raises(vlm: VLM, vectors: torch.Tensor) -> None:
    behind = filled(vlm)
    with pytest.raises(SteeringError, match="never seen"), steer(vlm, vectors, LAST):
        vlm.model(input_ids=torch.tensor([[70]]), **behind)


@pytest.mark.parametrize("width", [1, 3])
def test_has_image_says_what_a_filled_cache_does_not(
    vlm: VLM, vectors: torch.Tensor, width: int
) -> None:
    ids = torch.full((1, width), 70)
    plain = vlm.model(input_ids=ids, **filled(vlm)).logits
    for row_has_image in (True, False):
        behind = filled(vlm)
        with steer(vlm, vectors, LAST, has_image=[row_has_image]):
            steered = vlm.model(input_ids=ids, **behind).logits
        moved = (steered != plain).any(-1)[0].tolist()
        assert moved == ([False] * (width - 1) + [True] if row_has_image else [False] * width)


@pytest.mark.parametrize("positions", ["last", "generated", "last_prompt"])
def test_tokens_that_cannot_be_classified_raise_before_they_run(
    vlm: VLM, vectors: torch.Tensor, positions: str
) -> None:
    """A second turn, a chunk or candidates: outside of `generate` several tokens behind a cache may
    be any of them."""
    setting = Steering(1.0, "per_layer", positions)  # type: ignore[arg-type]
    ran: list[int] = []
    handle = vlm.layers[0].register_forward_pre_hook(lambda module, args: ran.append(1))
    try:
        with pytest.raises(SteeringError, match="may be a new turn"), steer(vlm, vectors, setting):
            behind = filled(vlm)
            ran.clear()
            vlm.model(input_ids=torch.tensor([[70, 71]]), **behind)
    finally:
        handle.remove()
    assert not ran


def test_all_positions_need_no_classification(vlm: VLM, vectors: torch.Tensor) -> None:
    inputs = encode(vlm, [WITH])
    more = torch.tensor([[70, 71, 72]])
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with steer(vlm, vectors, Steering(1.0, "per_layer", "all")):
        expected = logits(vlm, whole)[:, -3:]
        pieces = vlm.model(input_ids=more, **filled(vlm)).logits
    assert torch.allclose(pieces, expected, atol=1e-4)


@pytest.mark.parametrize("positions", ["all", "after_image"])
def test_columns_that_would_have_been_steered_are_not_passed_over(
    vlm: VLM, vectors: torch.Tensor, positions: str
) -> None:
    behind = filled(vlm)
    setting = Steering(1.0, "per_layer", positions)  # type: ignore[arg-type]
    with (
        pytest.raises(SteeringError, match="outside of this steering"),
        steer(vlm, vectors, setting, has_image=[True]),
    ):
        vlm.model(input_ids=torch.tensor([[70]]), **behind)


def test_another_setting_on_the_same_cache_is_noticed(vlm: VLM, vectors: torch.Tensor) -> None:
    with steer(vlm, vectors, Steering(1.0, "per_layer", "all")):
        behind = filled(vlm)
    with (
        pytest.raises(SteeringError, match="another one"),
        steer(vlm, vectors, Steering(0.5, "per_layer", "all")),
    ):
        vlm.model(input_ids=torch.tensor([[70]]), **behind)
    with steer(vlm, vectors, Steering(1.0, "per_layer", "all")):
        vlm.model(input_ids=torch.tensor([[70]]), **behind)


def test_the_cache_remembers_its_image_from_block_to_block(vlm: VLM, vectors: torch.Tensor) -> None:
    token = torch.tensor([[70]])
    plain = vlm.model(input_ids=token, **filled(vlm)).logits
    with steer(vlm, vectors, Steering(1.0, "per_layer", "last_prompt")):
        behind = filled(vlm)
    with steer(vlm, vectors, LAST):
        steered = vlm.model(input_ids=token, **behind).logits
    assert not torch.allclose(steered, plain, atol=1e-2)


def test_a_reset_cache_is_a_new_conversation(vlm: VLM, vectors: torch.Tensor) -> None:
    from transformers import StaticCache

    cache = StaticCache(config=vlm.model.config.get_text_config(), max_cache_len=80)
    behind = with_cache(vlm.model, cache)
    token = torch.tensor([[70]])
    with steer(vlm, vectors, LAST):
        vlm.model(**encode(vlm, [WITH]), **behind)
        cache.reset()
        vlm.model(**encode(vlm, [WITHOUT]), **behind)
        steered = vlm.model(input_ids=token, **behind).logits
    assert torch.allclose(
        steered, vlm.model(input_ids=token, **filled(vlm, WITHOUT)).logits, atol=1e-4
    )


def embedded(vlm: VLM, request: Request) -> dict[str, Any]:
    inputs = encode(vlm, [request])
    return {
        "inputs_embeds": vlm.model.get_input_embeddings()(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
    }


def test_embeddings_need_has_image(vlm: VLM, vectors: torch.Tensor) -> None:
    inputs = embedded(vlm, WITHOUT)
    plain = logits(vlm, inputs)
    with pytest.raises(SteeringError, match="inputs_embeds alone"), steer(vlm, vectors, LAST):
        logits(vlm, inputs)
    with steer(vlm, vectors, LAST, has_image=[True]):
        steered = logits(vlm, inputs)
    assert (steered != plain).any(-1)[0].nonzero().flatten().tolist() == [plain.shape[1] - 1]
    with pytest.raises(SteeringError, match="inputs_embeds alone"), steer(vlm, vectors, LAST):
        vlm.model.generate(**inputs, max_new_tokens=2)
    with steer(vlm, vectors, LAST, has_image=[True]):
        vlm.model.generate(**inputs, max_new_tokens=2)


def test_the_image_has_no_place_in_embeddings(vlm: VLM, vectors: torch.Tensor) -> None:
    setting = Steering(1.0, "per_layer", "after_image")
    with (
        pytest.raises(SteeringError, match="image's place"),
        steer(vlm, vectors, setting, has_image=[True]),
    ):
        logits(vlm, embedded(vlm, WITHOUT))


def test_a_mask_that_hides_the_padding_raises(vlm: VLM, vectors: torch.Tensor) -> None:
    inputs = encode(vlm, [WITH, WITH])
    width = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.zeros(2, 1, width, width)
    with pytest.raises(SteeringError, match="padding cannot be told"), steer(vlm, vectors, LAST):
        logits(vlm, inputs)


def test_rows_that_do_not_fit_raise(vlm: VLM, vectors: torch.Tensor) -> None:
    with (
        pytest.raises(SteeringError, match="has_image names 2 rows"),
        steer(vlm, vectors, LAST, has_image=[True] * 2),
    ):
        logits(vlm, encode(vlm, [WITH, WITH, WITH]))
    rows = vectors.expand(2, -1, -1)
    with pytest.raises(SteeringError, match="vectors for 2 rows"), steer(vlm, rows, LAST):
        logits(vlm, encode(vlm, [WITH, WITH, WITH]))


@pytest.mark.parametrize("call", ["generate", "generate_batch"])
def test_packed_batches_are_refused_before_they_run(
    vlm: VLM, vectors: torch.Tensor, call: str
) -> None:
    inputs = encode(vlm, [WITH])
    with pytest.raises(SteeringError, match=r"one row"), steer(vlm, vectors, LAST):
        if call == "generate":
            vlm.model.generate(**inputs, cache_implementation="paged")
        else:
            vlm.model.generate_batch(inputs=inputs["input_ids"].tolist())


def test_a_part_of_the_model_called_alone_raises(vlm: VLM, vectors: torch.Tensor) -> None:
    hidden = torch.zeros(1, 4, vlm.hidden_size)
    with pytest.raises(SteeringError, match="call the whole model"), steer(vlm, vectors, LAST):
        vlm.model.model.language_model(inputs_embeds=hidden)


def test_guidance_keeps_both_branches_apart(vlm: VLM, vectors: torch.Tensor) -> None:
    image, text = encode(vlm, [WITH]), encode(vlm, [WITHOUT])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True,
               "return_dict_in_generate": True}  # fmt: skip
    with steer(vlm, vectors, LAST):
        guided = vlm.model.generate(
            **image, **options, guidance_scale=1.5, negative_prompt_ids=text["input_ids"]
        )
        new = guided.sequences[:, image["input_ids"].shape[1] :]
        out = vlm.model(**image, use_cache=True)
        forced = [out.logits[:, -1]]
        for k in range(new.shape[1] - 1):
            out = vlm.model(input_ids=new[:, k : k + 1], **with_cache(vlm.model, cache_of(out)))
            forced.append(out.logits[:, -1])
    for branch, expected in zip(guided.logits, forced, strict=True):
        assert torch.allclose(branch, expected, atol=1e-4)


def test_hidden_states_are_the_steered_ones_whatever_ran_before(
    vlm: VLM, vectors: torch.Tensor
) -> None:
    from cmrm import wrap_vlm
    from tiny import tiny_model, tiny_processor

    inputs = encode(vlm, [WITH])
    seen = []
    for used_before in (False, True):
        fresh = wrap_vlm(tiny_model(), tiny_processor())
        if used_before:
            fresh.model(**inputs, output_hidden_states=True)
        with steer(fresh, vectors, LAST):
            seen.append(fresh.model(**inputs, output_hidden_states=True).hidden_states)
    plain = fresh.model(**inputs, output_hidden_states=True).hidden_states
    for first, second, untouched in zip(seen[0][1:], seen[1][1:], plain[1:], strict=True):
        assert torch.equal(first, second)
        assert not torch.allclose(first[0, -1], untouched[0, -1], atol=1e-2)


def in_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []

    def run() -> None:
        try:
            with torch.no_grad():
                results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return results[0]


def test_another_thread_is_left_alone(vlm: VLM, vectors: torch.Tensor) -> None:
    inputs = encode(vlm, [WITH])
    plain = logits(vlm, inputs)
    with steer(vlm, vectors, LAST):
        steered = logits(vlm, inputs)
        other = in_thread(lambda: logits(vlm, inputs))
    assert torch.equal(other, plain)
    assert not torch.equal(steered, plain)


def test_a_thread_with_the_callers_context_is_steered(vlm: VLM, vectors: torch.Tensor) -> None:
    inputs = encode(vlm, [WITH])
    with steer(vlm, vectors, LAST):
        steered = logits(vlm, inputs)
        context = contextvars.copy_context()
        assert torch.equal(in_thread(lambda: context.run(logits, vlm, inputs)), steered)


def test_a_block_whose_passes_ran_elsewhere_raises(vlm: VLM, vectors: torch.Tensor) -> None:
    inputs = encode(vlm, [WITH])
    with pytest.raises(SteeringError, match="copy_context"), steer(vlm, vectors, LAST):
        in_thread(lambda: logits(vlm, inputs))


def test_two_threads_with_settings_of_their_own(vlm: VLM, vectors: torch.Tensor) -> None:
    inputs = [encode(vlm, [WITH]), encode(vlm, [Request("who is that, and why", (IMAGE,))])]
    several = [vectors, vectors.flip(0)]

    def steered(k: int) -> torch.Tensor:
        with steer(vlm, several[k], LAST):
            return logits(vlm, inputs[k])

    alone = [steered(k) for k in (0, 1)]
    barrier = threading.Barrier(2)
    results: dict[int, Any] = {}

    def work(k: int) -> None:
        with torch.no_grad(), steer(vlm, several[k], LAST):
            for _ in range(10):
                barrier.wait(60)
                results[k] = logits(vlm, inputs[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for k in (0, 1):
        assert torch.allclose(results[k], alone[k], atol=1e-5)


def test_two_tasks_of_one_thread(vlm: VLM, vectors: torch.Tensor) -> None:
    inputs = encode(vlm, [WITH])
    plain = logits(vlm, inputs)
    with steer(vlm, vectors, LAST):
        alone = logits(vlm, inputs)

    async def steered() -> torch.Tensor:
        with steer(vlm, vectors, LAST):
            await asyncio.sleep(0)
            return logits(vlm, inputs)

    async def untouched() -> torch.Tensor:
        await asyncio.sleep(0)
        return logits(vlm, inputs)

    async def both() -> list[torch.Tensor]:
        return list(await asyncio.gather(steered(), untouched(), steered()))

    first, second, third = asyncio.run(both())
    assert torch.equal(first, alone)
    assert torch.equal(second, plain)
    assert torch.equal(third, alone)


def test_capturing_inside_steering_is_refused(vlm: VLM, vectors: torch.Tensor) -> None:
    from cmrm import Sample, SampleLevel, estimate_shift, generate

    inputs = encode(vlm, [WITH])
    anchors = [Sample(f"a{k}", "q" * (k + 1), IMAGE) for k in range(3)]
    for work in (
        lambda: capture_inputs(vlm, inputs),
        lambda: estimate_shift(vlm, anchors),
        lambda: generate(vlm, anchors, shift=SampleLevel(), max_new_tokens=1),
    ):
        with pytest.raises(SteeringError, match=r"inside steer\(\)"), steer(vlm, vectors, LAST):
            work()


def test_generated_positions_without_a_generated_token(vlm: VLM, vectors: torch.Tensor) -> None:
    inputs = encode(vlm, [WITH])
    setting = Steering(1.0, "per_layer", "generated")
    with steer(vlm, vectors, setting):
        vlm.model.generate(**inputs, max_new_tokens=1)
    with (
        pytest.raises(SteeringError, match="touched no token of 1 rows"),
        steer(vlm, vectors, setting),
    ):
        logits(vlm, inputs)


def test_a_layer_that_never_runs_is_named(vlm: VLM, vectors: torch.Tensor) -> None:
    layers = vlm.model.model.language_model.layers
    kept = layers[1]
    layers[1] = torch.nn.Identity()
    layers[1].forward = lambda hidden, *args, **kwargs: hidden
    try:
        with (
            pytest.raises(SteeringError, match=r"never reached decoder layers \[1\]"),
            steer(vlm, vectors, LAST),
        ):
            logits(vlm, encode(vlm, [WITH]))
    finally:
        layers[1] = kept


@pytest.mark.parametrize("preserve_norm", [False, True])
def test_a_vector_beyond_the_models_dtype_is_refused_before_anything_runs(
    processor: Any, preserve_norm: bool
) -> None:
    from cmrm import wrap_vlm
    from tiny import tiny_model

    half = wrap_vlm(tiny_model().half(), processor)
    huge = torch.zeros(half.n_layers, half.hidden_size)
    huge[1, 5] = 1e5
    with pytest.raises(InputError, match="more than float16 holds"):
        steer(half, huge, Steering(1.0, "per_layer", "last", (1,), preserve_norm))
    with pytest.raises(InputError, match="NaN"):
        steer(half, torch.full_like(huge, float("nan")))


@pytest.mark.parametrize("rows", [1, 2])
def test_fill_raises_the_coordinate_to_its_target_and_never_lowers_it(vlm: VLM, rows: int) -> None:
    inputs = encode(vlm, [WITH] * rows)
    direction = torch.nn.functional.normalize(torch.randn(vlm.hidden_size), dim=0)
    before = capture_inputs(vlm, inputs)[:, 1] @ direction
    outputs: list[torch.Tensor] = []

    def record(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        outputs.append(hidden[:, -1] @ direction)

    for difference in (2.0, -2.0):
        edit = Edit(1, direction, "fill", target=before + difference)
        with intervene(vlm, Intervention((edit,), "last_prompt")):
            handle = vlm.layers[1].register_forward_hook(record)
            vlm.model(**inputs)
            handle.remove()
        expected = before + max(difference, 0.0)
        assert torch.allclose(outputs.pop(), expected, atol=1e-4)


def test_project_takes_the_coordinate_away(vlm: VLM) -> None:
    inputs = encode(vlm, [WITH])
    direction = torch.nn.functional.normalize(torch.randn(vlm.hidden_size), dim=0)
    seen: list[torch.Tensor] = []
    with intervene(vlm, Intervention((Edit(2, direction, "project"),), "all")):
        handle = vlm.layers[2].register_forward_hook(
            lambda m, a, o: seen.append((o[0] if isinstance(o, tuple) else o) @ direction)
        )
        vlm.model(**inputs)
        handle.remove()
    assert seen[0].abs().max() < 1e-4


def test_interventions_are_made_in_order(vlm: VLM) -> None:
    """Added, then projected away: nothing of the addition is left; the other way round it stays."""
    inputs = encode(vlm, [WITH])
    direction = torch.nn.functional.normalize(torch.randn(vlm.hidden_size), dim=0)
    add = Intervention((Edit(1, direction, "add", strength=5.0),), "all")
    project = Intervention((Edit(1, direction, "project"),), "all")
    coordinates = []
    for order in ((add, project), (project, add)):
        with intervene(vlm, *order):
            handle = vlm.layers[1].register_forward_hook(
                lambda m, a, o: coordinates.append(
                    ((o[0] if isinstance(o, tuple) else o) @ direction)[0, -1]
                )
            )
            vlm.model(**inputs)
            handle.remove()
    assert abs(float(coordinates[0])) < 1e-3
    assert float(coordinates[1]) == pytest.approx(5.0, abs=1e-3)


def test_selected_rows_keep_their_own_vectors() -> None:
    part = Intervention((Edit(0, torch.arange(6.0).reshape(3, 2)), Edit(1, torch.ones(2))), "all")
    some = part.select([2, 0])
    assert part.rows == 3
    assert some.edits[0].vector.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert some.edits[1].vector.tolist() == [1.0, 1.0]


def test_equal_interventions_have_equal_keys() -> None:
    a, b, c = (Intervention((Edit(0, torch.ones(2), strength=s),), "all") for s in (1.0, 1.0, 2.0))
    assert a.key == b.key != c.key

"""Extraction at scale: shared prefix, constant memory, going on after a kill, several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import cmrm.shift.pair
import cmrm.shift.prefix
from cmrm import Sample, SampleLevel, estimate_shift, wrap_vlm
from cmrm.errors import InputError
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request, Turn, build_requests
from cmrm.shift.capture import capture_inputs
from cmrm.shift.estimate import reduce_differences, sample_vectors
from cmrm.shift.moments import SKETCH, Moments
from cmrm.shift.packing import packed_states
from cmrm.shift.pair import Prefixes, PrefixPair
from cmrm.shift.prefix import SharedPrefix
from tiny import tiny_model, tiny_processor

RED = Image.new("RGB", (16, 16), "red")


def some(n: int) -> list[Sample]:
    return [Sample(f"s{k}", f"Tell me about number {k}" + "!" * (k % 7), RED) for k in range(n)]


def differences(n: int, *, width: int = 48, decay: float = 0.9) -> torch.Tensor:
    """Differences [n, 2, width] with a mean and a decaying spectrum."""
    generator = torch.Generator().manual_seed(3)
    scale = decay ** torch.arange(width)
    return torch.randn(n, 2, width, generator=generator) * scale + 0.3 * torch.randn(
        2, width, generator=generator
    )


def vectors_of(moments: Moments, estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
    estimate = moments.estimate(estimator)
    return estimate.vectors, estimate.explained


@pytest.mark.parametrize("estimator", ["pca", "mean", "icv"])
def test_stream_equals_the_exact_estimators(estimator: Any) -> None:
    whole = differences(3000, width=400, decay=0.99)
    exact, ratio = reduce_differences(whole, estimator)
    stream = Moments(2, 400)
    for chunk in whole.split(37):  # type: ignore[no-untyped-call]
        stream.update(chunk)
    vectors, streamed = vectors_of(stream, estimator)
    assert stream.sketch.shape[1] <= 2 * SKETCH < 3000
    assert (stream.dropped > 0).all(), "nothing was compressed"
    assert torch.cosine_similarity(vectors, exact, dim=-1).min() > 1 - 1e-4
    assert torch.allclose(vectors.norm(dim=-1), exact.norm(dim=-1), rtol=1e-3)
    assert torch.allclose(streamed, ratio, atol=5e-3)


@pytest.mark.parametrize("estimator", ["pca", "mean", "icv"])
def test_exact_estimators_agree_with_a_library(estimator: Any) -> None:
    from sklearn.decomposition import PCA

    whole = differences(200)
    vectors, _ = reduce_differences(whole, estimator)
    for layer in range(2):
        rows = whole[:, layer].double().numpy()
        mean = rows.mean(0)
        if estimator == "mean":
            expected = mean
        elif estimator == "pca":
            import numpy as np

            direction = np.linalg.svd(rows, full_matrices=False)[2][0]
            expected = direction * (mean @ direction)
        else:
            component = PCA(1, svd_solver="full").fit(rows).components_[0]
            expected = mean + component * (1 if mean @ component >= 0 else -1)
        assert torch.allclose(vectors[layer].double(), torch.from_numpy(expected), atol=1e-4)


def test_merged_moments_are_those_of_one_stream() -> None:
    whole = differences(500)
    one, left, right = Moments(2, 48), Moments(2, 48), Moments(2, 48)
    one.update(whole)
    left.update(whole[:200])
    right.update(whole[200:])
    left.merge(Moments.from_dict(right.to_dict()))
    assert left.count == 500
    for estimator in ("pca", "mean", "icv"):
        assert torch.allclose(
            vectors_of(left, estimator)[0], vectors_of(one, estimator)[0], atol=1e-3
        )


def test_nan_in_a_state_is_refused() -> None:
    bad = differences(3)
    bad[1, 0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        Moments(2, 48).update(bad)


def test_prefix_and_whole_forwards_give_the_same_shift(vlm: VLM) -> None:
    fast = estimate_shift(vlm, some(20), batch_size=4)
    slow = estimate_shift(vlm, some(20), batch_size=4, reuse_prefix=False)
    assert torch.allclose(fast.vectors, slow.vectors, atol=1e-4)
    assert fast.provenance.anchor_hash == slow.provenance.anchor_hash


def test_the_shared_part_is_run_once(vlm: VLM) -> None:
    runner = SharedPrefix(vlm)
    requests = list(build_requests(some(40), "blank"))
    longest = max(encode(vlm, [r])["input_ids"].shape[1] for r in requests)
    runner.states(requests)
    assert runner.reason is None
    assert runner.tokens == 10, "the role, its line and the image"
    probe = 2 * longest
    assert runner.fresh_tokens <= runner.tokens + probe + 40 * (longest - runner.tokens)
    assert runner.fresh_tokens < runner.whole_tokens


def whole(vlm: VLM, requests: list[Request]) -> torch.Tensor:
    return torch.cat([capture_inputs(vlm, encode(vlm, [r])) for r in requests])


def test_nothing_is_padded_behind_the_prefix(vlm: VLM) -> None:
    runner = SharedPrefix(vlm)
    requests = list(build_requests(some(12), "blank"))
    runner.states(requests[:1])
    before = runner.fresh_tokens
    states = runner.states(requests)
    assert runner.unpacked is None
    assert runner.fresh_tokens - before == sum(
        len(encode(vlm, [r])["input_ids"][0]) - runner.tokens for r in requests
    )
    assert torch.allclose(states, whole(vlm, requests), atol=1e-4)


def test_a_row_takes_so_many_tokens_and_no_more(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = estimate_shift(vlm, some(12), batch_size=12)
    monkeypatch.setattr("cmrm.shift.packing.LEAST_TOKENS", 0)
    widths = []
    forward = vlm.model.model.language_model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(vlm.model.model.language_model, "forward", watched)
    found = estimate_shift(vlm, some(12), batch_size=12)
    assert torch.allclose(found.vectors, expected.vectors, atol=1e-4)
    assert len(widths) > 12


@pytest.mark.parametrize("trouble", ["refused", "wrong"])
def test_a_model_that_cannot_be_packed_is_padded(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    packed = packed_states

    def troubled(*args: Any, **kept: Any) -> list[torch.Tensor]:
        if trouble == "refused":
            raise ValueError("no mask of four dimensions is taken here")
        return [states + 0.5 * states.roll(1, -1) for states in packed(*args, **kept)]

    monkeypatch.setattr(cmrm.shift.prefix, "packed_states", troubled)
    runner = SharedPrefix(vlm)
    requests = list(build_requests(some(5), "blank"))
    states = runner.states(requests)
    assert runner.reason is None
    assert runner.unpacked is not None
    assert ("no mask of four" if trouble == "refused" else "states differ") in runner.unpacked
    assert torch.allclose(states, whole(vlm, requests), atol=1e-4)


@pytest.mark.parametrize("trouble", ["refused", "wrong"])
def test_conditions_that_cannot_share_a_pass_are_run_apart(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    packed = packed_states

    def troubled(
        vlm: VLM, backbone: Any, parts: Any, cache: Any = None, **kept: Any
    ) -> list[torch.Tensor]:
        found = packed(vlm, backbone, parts, cache, **kept)
        if len(parts) == 1:
            return found
        if trouble == "refused":
            raise IndexError("one prefix is enough")
        return found[::-1]

    monkeypatch.setattr(cmrm.shift.pair, "packed_states", troubled)
    monkeypatch.setattr(cmrm.shift.pair, "JOINT_TOKENS", 10_000)
    pair = PrefixPair(vlm, SharedPrefix(vlm), SharedPrefix(vlm))
    requests = [list(build_requests(some(5), condition)) for condition in ("query", "blank")]
    states = pair.states(*requests)
    assert pair.joint_batches == 0
    assert pair.apart is not None
    assert ("one prefix is enough" if trouble == "refused" else "states differ") in pair.apart
    for found, some_requests in zip(states, requests, strict=True):
        assert torch.allclose(found, whole(vlm, some_requests), atol=1e-4)


def test_prompts_longer_than_an_attention_window_are_not_packed() -> None:
    from families import FAMILIES

    windowed = wrap_vlm(*FAMILIES["gemma3"]())
    runner = SharedPrefix(windowed)
    long = [
        Sample(f"long-{k}", "word " * (60 + k), Image.new("RGB", (16, 16), "red")) for k in range(3)
    ]
    requests = list(build_requests([*some(3), *long], "blank"))
    states = runner.states(requests)
    assert runner.reason is None
    assert runner._window is not None
    assert torch.allclose(states, whole(windowed, requests), atol=1e-3)


def test_a_cache_with_other_state_is_not_gone_on_from(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer with a running state (linear attention) cannot serve several continuations at
    once."""
    monkeypatch.setattr(cmrm.shift.prefix, "DynamicLayer", type(None))
    runner = SharedPrefix(vlm)
    requests = list(build_requests(some(3), "blank"))
    states = runner.states(requests)
    assert runner.reason == "the cache holds more than keys and values of attention"
    assert torch.allclose(states, whole(vlm, requests), atol=1e-4)


def test_prompts_that_begin_otherwise_are_run_whole(vlm: VLM) -> None:
    runner = SharedPrefix(vlm)
    odd = Sample("odd", "Tell me about number 3", Image.new("RGB", (16, 16), "red"))
    mixed = [
        *build_requests(some(3), "blank"),
        next(build_requests([odd], "noise")),
        next(build_requests([odd], "query")),
    ]
    states = runner.states(mixed)
    for k, request in enumerate(mixed):
        alone = SharedPrefix(vlm).states([request])
        assert torch.allclose(states[k], alone[0], atol=1e-4)


def test_noise_of_ones_own_is_right_though_nothing_is_shared(vlm: VLM) -> None:
    fast = estimate_shift(vlm, some(6), corruption="noise", batch_size=3)
    slow = estimate_shift(vlm, some(6), corruption="noise", batch_size=3, reuse_prefix=False)
    assert torch.allclose(fast.vectors, slow.vectors, atol=1e-4)


def test_anchors_are_read_as_they_are_needed(vlm: VLM) -> None:
    read: list[str] = []

    def source() -> Iterator[Sample]:
        for sample in some(70):
            read.append(sample.id)
            yield sample

    seen: list[int] = []
    shift = estimate_shift(vlm, source(), batch_size=2, on_batch=lambda n: seen.append(len(read)))
    assert seen[0] == 16, "one pool of eight batches is read ahead"
    assert shift.provenance.n_anchors == 70
    assert shift.provenance.anchor_hash == estimate_shift(vlm, some(70)).provenance.anchor_hash


def test_a_killed_extraction_goes_on_and_loses_at_most_a_batch(vlm: VLM, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    state = tmp_path / "state"
    whole = estimate_shift(vlm, some(30), batch_size=4)
    counted: list[int] = []

    def die(n: int) -> None:
        counted.append(n)
        if len(counted) == 4:
            raise Killed

    with pytest.raises(Killed):
        estimate_shift(
            vlm, some(30), batch_size=4, checkpoint=state, checkpoint_seconds=0, on_batch=die
        )
    assert state.exists()
    forward, rows = vlm.model.model.forward, 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal rows
        rows += kwargs["input_ids"].shape[0]
        return forward(*args, **kwargs)

    vlm.model.model.forward = counting
    try:
        again = estimate_shift(vlm, some(30), batch_size=4, checkpoint=state)
    finally:
        vlm.model.model.forward = forward
    assert torch.allclose(again.vectors, whole.vectors, atol=1e-5)
    assert state.exists(), "whoever saves the artifact removes it"
    probes = 8
    assert rows <= 2 * (30 - 16) + probes, "what was finished is not run again"


def test_a_checkpoint_of_another_run_is_refused(vlm: VLM, tmp_path: Path) -> None:
    state = tmp_path / "state"

    def stop(n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate_shift(vlm, some(9), batch_size=4, checkpoint=state, on_batch=stop)
    with pytest.raises(InputError, match="another run"):
        estimate_shift(vlm, some(9), batch_size=4, checkpoint=state, corruption="grey")
    with pytest.raises(InputError, match="other anchors"):
        estimate_shift(
            vlm, [Sample(f"x{k}", "q", RED) for k in range(9)], batch_size=4, checkpoint=state
        )
    with pytest.raises(InputError, match="more anchors"):
        estimate_shift(vlm, some(2), batch_size=4, checkpoint=state)
    state.write_bytes(b"broken")
    assert estimate_shift(vlm, some(9), batch_size=4, checkpoint=state).provenance.n_anchors == 9


WORKER = """
import sys
sys.path.insert(0, {tests!r})
import tiny, torch
sys.path.insert(0, {here!r})
from cmrm import estimate_shift, wrap_vlm
from test_extraction import some
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
vlm = wrap_vlm(tiny.tiny_model(), tiny.tiny_processor(), model_id="tiny")
shift = estimate_shift(vlm, some(25), batch_size=4)
shift.save({out!r} + f"/rank{{torch.distributed.get_rank()}}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives(vlm: VLM, tmp_path: Path) -> None:
    from cmrm import ShiftVectors

    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(
            WORKER.format(
                tests=str(Path(__file__).parents[1]),
                here=str(Path(__file__).parent),
                out=str(tmp_path),
            )
        )
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=29531",
        str(script),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one = estimate_shift(vlm, some(25), batch_size=4)
    for rank in range(2):
        other = ShiftVectors.load(tmp_path / f"rank{rank}.safetensors")
        assert torch.allclose(other.vectors, one.vectors, atol=1e-4)
        assert other.provenance.n_anchors == 25
        assert other.provenance.anchor_hash == one.provenance.anchor_hash


def test_a_few_tokens_of_both_conditions_share_a_pass_and_many_do_not(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [list(build_requests(some(3), condition)) for condition in ("query", "blank")]
    pair = PrefixPair(vlm, SharedPrefix(vlm), SharedPrefix(vlm))
    few = [some_requests[:1] for some_requests in requests]
    monkeypatch.setattr(cmrm.shift.pair, "JOINT_TOKENS", 2 * len(requests[0][0].text) + 40)
    for joint, given in ((1, few), (1, requests), (2, few)):
        for found, some_requests in zip(pair.states(*given), given, strict=True):
            assert torch.allclose(found, whole(vlm, some_requests), atol=1e-4)
        assert pair.joint_batches == joint


def test_prefixes_are_kept_between_calls_by_their_owner(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cmrm.shift.pair, "JOINT_TOKENS", 10_000)
    requests = list(build_requests(some(3), "original"))
    prefixes = Prefixes(vlm)
    first = sample_vectors(vlm, requests, SampleLevel(), prefixes=prefixes)
    pair = prefixes.pair("blank")
    runner = pair.corrupted
    before = runner.fresh_tokens
    again = sample_vectors(vlm, requests, SampleLevel(), prefixes=prefixes)
    assert torch.allclose(first, again, atol=1e-5)
    assert prefixes.pair("blank") is pair
    assert pair.joint_batches == 2, "both conditions in one pass"
    suffixes = runner.whole_tokens // 2 - 3 * runner.tokens
    assert runner.fresh_tokens - before <= suffixes + 3 * 7, (
        "only what stands behind the prefix is run"
    )


def test_nothing_is_kept_on_the_model(vlm: VLM) -> None:
    before = set(vars(vlm)), set(vars(vlm.model))
    sample_vectors(vlm, list(build_requests(some(2), "original")), SampleLevel())
    assert (set(vars(vlm)), set(vars(vlm.model))) == before


def test_a_joint_pass_found_wrong_leaves_nothing_behind(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = packed_states

    def troubled(
        vlm: VLM, backbone: Any, parts: Any, cache: Any = None, **kept: Any
    ) -> list[torch.Tensor]:
        found = packed(vlm, backbone, parts, cache, **kept)
        if len(parts) == 2:
            for used in kept["keep"]:
                for layer in used.layers:
                    layer.keys, layer.values = layer.keys * 3, layer.values * 3
        return [states * 1.5 for states in found] if len(parts) == 2 else found

    monkeypatch.setattr(cmrm.shift.pair, "packed_states", troubled)
    monkeypatch.setattr(cmrm.shift.pair, "JOINT_TOKENS", 10_000)
    monkeypatch.setattr(cmrm.shift.prefix, "KEPT_TOKENS", 1)
    pair = PrefixPair(vlm, SharedPrefix(vlm), SharedPrefix(vlm))
    before = (
        Turn("user", "What is it, in a few words, if you please?", (RED,)),
        Turn("assistant", "A wall."),
    )
    talk = Request("And who painted it, and when, and for whom was it painted?", before=before)
    for _ in range(2):
        found = pair.states([talk.without_images()], [talk])
        for states, request in zip(found, (talk.without_images(), talk), strict=True):
            assert torch.allclose(states, whole(vlm, [request]), atol=1e-4)
    assert pair.apart is not None
    assert pair.joint_batches == 0


def test_what_ran_before_changes_nothing_but_for_conversations(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cmrm.shift.prefix, "KEPT_TOKENS", 1)
    requests = list(build_requests(some(6), "blank"))
    fresh = SharedPrefix(vlm)
    fresh.states(requests[:1])
    first = fresh.states(requests[1:2])
    other = SharedPrefix(vlm)
    other.states(requests[:1])
    other.states(requests[5:6])
    assert torch.equal(other.states(requests[1:2]), first), (
        "bit for bit, as a run that goes on after a kill needs it"
    )


@pytest.mark.parametrize("joint", [True, False])
def test_a_conversations_next_turn_runs_its_new_tokens_alone(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch, joint: bool
) -> None:
    monkeypatch.setattr(cmrm.shift.pair, "JOINT_TOKENS", 10_000 if joint else 0)
    monkeypatch.setattr(cmrm.shift.prefix, "KEPT_TOKENS", 4)
    text, corrupted = SharedPrefix(vlm), SharedPrefix(vlm)
    pair = PrefixPair(vlm, text, corrupted)
    picture = Image.new("RGB", (20, 16), "white")

    def turn(*said: str, asked: str) -> tuple[list[Request], list[Request]]:
        before = tuple(
            Turn("assistant" if k % 2 else "user", words, () if k else (picture,))
            for k, words in enumerate(said)
        )
        request = Request(asked, () if said else (picture,), before=before)
        return [request.without_images()], [request]

    talk: list[str] = []
    for number, (asked, answer) in enumerate(
        [
            ("What colour is the wall in it?", "A pale one."),
            ("Why is that so?", "For the light."),
            ("And then?", ""),
        ]
    ):
        given = turn(*talk, asked=asked)
        before = [runner.fresh_tokens for runner in (text, corrupted)]
        found = pair.states(*given)
        for states, requests in zip(found, given, strict=True):
            assert torch.allclose(states, whole(vlm, requests), atol=1e-4)
        if number:
            for runner, start, requests in zip((text, corrupted), before, given, strict=True):
                length = encode(vlm, requests)["input_ids"].shape[1]
                assert runner.fresh_tokens - start < length - runner.tokens, (
                    "not all that stands behind the prefix"
                )
                assert runner.fresh_tokens - start <= len(f"{talk[-1]} {asked}") + 40
        talk += [asked, answer]
    assert pair.joint_batches == (3 if joint else 0)
    other = turn(asked="Something else altogether, if you please")
    for states, requests in zip(pair.states(*other), other, strict=True):
        assert torch.allclose(states, whole(vlm, requests), atol=1e-4), (
            "another conversation takes nothing from the last"
        )
    several = [list(build_requests(some(3), condition)) for condition in ("query", "blank")]
    for states, requests in zip(pair.states(*several), several, strict=True):
        assert torch.allclose(states, whole(vlm, requests), atol=1e-4)


@pytest.mark.parametrize("part", ["q_proj", "lm_head", "multi_modal_projector", "vision_tower"])
def test_weights_written_through_data_start_a_new_prefix(part: str) -> None:
    vlm = wrap_vlm(tiny_model(), tiny_processor(), model_id="tiny")
    prefixes = Prefixes(vlm)
    pair = prefixes.pair("blank")
    assert prefixes.pair("blank") is pair
    weight = next(p for name, p in vlm.model.named_parameters() if part in name and p.dim() > 1)
    weight.data.mul_(-1.5)
    assert prefixes.pair("blank") is not pair
    assert prefixes.pair("blank").text is not pair.text


def test_states_after_a_write_are_those_of_a_fresh_model() -> None:
    vlm = wrap_vlm(tiny_model(), tiny_processor(), model_id="tiny")
    prefixes = Prefixes(vlm)
    requests = list(build_requests(some(3), "original"))
    old = sample_vectors(vlm, requests, SampleLevel(), prefixes=prefixes)
    for name, weight in vlm.model.named_parameters():
        if "k_proj" in name or "v_proj" in name:
            weight.data.add_(0.3)
    now = sample_vectors(vlm, requests, SampleLevel(), prefixes=prefixes)
    fresh = sample_vectors(vlm, requests, SampleLevel())
    assert not torch.allclose(old, fresh, atol=1e-2)
    assert torch.allclose(now, fresh, atol=1e-4)


def test_images_of_another_size_start_a_new_prefix() -> None:
    from families import FAMILIES

    tiled = wrap_vlm(*FAMILIES["llava_next"]())
    runner = SharedPrefix(tiled)
    for size in ((40, 30), (30, 60), (40, 30)):
        samples = [Sample(f"s{k}", "q" * (k + 1), Image.new("RGB", size, "red")) for k in range(2)]
        requests = list(build_requests(samples, "blank"))
        states = runner.states(requests)
        assert runner.reason is None
        alone = torch.cat([SharedPrefix(tiled).states([r]) for r in requests])
        assert torch.allclose(states, alone, atol=1e-4)


def test_batches_of_different_images_are_run_whole_and_searched_less_and_less(vlm: VLM) -> None:
    runner = SharedPrefix(vlm)
    requests = list(build_requests(some(4), "noise"))
    states = runner.states(requests)
    assert runner.reason is None, "another batch may share a prefix"
    assert runner.unshared == "the prompts of the batch have different images"
    before = runner.fresh_tokens
    runner.states(requests)
    whole = encode(vlm, requests)["input_ids"].numel()
    assert runner.fresh_tokens - before == whole, "no second prefix is run right away"
    assert torch.allclose(states, runner.states(requests), atol=1e-4)


def test_one_odd_batch_does_not_end_the_sharing(vlm: VLM) -> None:
    runner = SharedPrefix(vlm)
    runner.states(list(build_requests(some(4), "noise")))
    alike = list(build_requests(some(8), "blank"))
    for _ in range(3):
        runner.states(alike)
    before = runner.fresh_tokens
    states = runner.states(alike)
    assert runner.unshared is None
    suffixes = sum(len(encode(vlm, [r])["input_ids"][0]) - runner.tokens for r in alike)
    assert runner.fresh_tokens - before == suffixes, "only what stands behind the prefix is run"
    assert torch.allclose(states, whole(vlm, alike), atol=1e-4)


def test_a_prefix_that_ran_out_of_memory_is_begun_anew(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = estimate_shift(vlm, some(8), batch_size=4)
    forward, calls = vlm.model.model.forward, []

    def full_at_first(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(vlm.model.model, "forward", full_at_first)
    with pytest.warns(UserWarning, match="out of memory"):
        shift = estimate_shift(vlm, some(8), batch_size=4)
    assert torch.allclose(shift.vectors, expected.vectors, atol=1e-4)

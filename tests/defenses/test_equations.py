"""Every defence against a small independent computation of its paper's equation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from cmrm import Condition, Sample, ShiftVectors, Steering, estimate_shift, steer
from cmrm.shift.capture import capture_inputs
from cmrm.model.compat import cache_of, with_cache
from cmrm.prompts.conditions import Request, Turn, build_request, build_requests
from cmrm.defenses import Defense, FitData, Meter, Reply, Stack, defense_names, make_defense, register, respond
from cmrm.defenses import prompting as p
from cmrm.errors import ArtifactError, InputError
from cmrm.model.vlm import VLM, encode

SEEN = [Request("Tell me about red paint", (Image.new("RGB", (20, 16), "red"),)),
        Request("Tell me about the sky, please", (Image.new("RGB", (20, 16), "blue"),))]  # fmt: skip
UNSEEN = Request("Tell me about green paint")


@pytest.fixture(scope="module")
def data(anchors: list[Sample]) -> FitData:
    benign = [Sample(f"b{k}", f"How do I cook {dish}?") for k, dish in enumerate(("rice", "soup", "an egg"))]
    return FitData(anchors, benign, 2)


def states(vlm: VLM, requests: list[Request]) -> torch.Tensor:
    return capture_inputs(vlm, encode(vlm, requests))


def steered_states(vlm: VLM, defense: Defense, requests: list[Request]) -> torch.Tensor:
    asked = defense.rewrite(vlm, requests)
    with torch.inference_mode(), defense.steering(vlm, asked, [q.text for q in asked]):
        return states(vlm, asked)


def every_position(vlm: VLM, requests: list[Request], edits: dict[int, object]) -> torch.Tensor:
    """States of the last token when plain functions change each block's whole output; rows without an image are left."""
    inputs = encode(vlm, requests)
    seen = torch.tensor([bool(q.images) for q in requests])[:, None, None]
    handles = [
        vlm.layers[k].register_forward_hook(lambda m, a, out, f=f: torch.where(seen, f(out), out))
        for k, f in edits.items()
    ]
    try:
        with torch.inference_mode():
            return states(vlm, requests) if inputs else torch.empty(0)
    finally:
        for handle in handles:
            handle.remove()


def test_the_known_defences() -> None:
    assert set(defense_names()) == {
        "none", "caption", "adashield_s", "ecso", "cmrm_dataset", "cmrm_sample", "shiftdc", "null_space", "refusal_direction",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(defense_names()))
def test_text_alone_is_left_as_it_is(vlm: VLM, data: FitData, name: str) -> None:
    defense = make_defense(name)
    defense.fit(vlm, data)
    plain = respond(vlm, make_defense("none"), [UNSEEN], max_new_tokens=6)
    assert respond(vlm, defense, [UNSEEN], max_new_tokens=6) == plain
    mixed = respond(vlm, defense, [SEEN[0], UNSEEN], max_new_tokens=6)
    assert mixed[1] == plain[0], "a row without image beside one with is left alone too"


@pytest.mark.parametrize("name", [n for n in sorted(defense_names()) if make_defense(n).needs_fit])
def test_what_is_not_fitted_says_so(vlm: VLM, name: str, tmp_path: Path, data: FitData) -> None:
    with pytest.raises(InputError, match="has to be fitted"):
        respond(vlm, make_defense(name), SEEN, max_new_tokens=2)
    fitted = make_defense(name)
    fitted.fit(vlm, data)
    fitted.save(tmp_path / "state.safetensors", vlm)
    again = make_defense(name)
    again.load(tmp_path / "state.safetensors", vlm)
    assert respond(vlm, again, SEEN, max_new_tokens=4) == respond(vlm, fitted, SEEN, max_new_tokens=4)
    other = make_defense("null_space" if name != "null_space" else "shiftdc")
    with pytest.raises(ArtifactError, match="holds no fitted"):
        other.load(tmp_path / "state.safetensors", vlm)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match="cannot be read"):
        again.load(tmp_path / "broken.safetensors", vlm)


def test_cmrm_at_both_levels_is_steer(vlm: VLM, data: FitData) -> None:
    dataset = make_defense("cmrm_dataset", {"cmrm_dataset": {"alpha": 0.5}})
    dataset.fit(vlm, data)
    shift: ShiftVectors = estimate_shift(vlm, data.harmful, batch_size=2)
    assert torch.equal(dataset.state["vectors"], shift.vectors)
    with torch.inference_mode(), steer(vlm, shift, Steering(0.5)):
        expected = states(vlm, SEEN)
    assert torch.equal(steered_states(vlm, dataset, SEEN), expected)
    sample = make_defense("cmrm_sample", {"cmrm_sample": {"alpha": 0.5}})
    texts = [Request(q.text) for q in SEEN]
    blank = [Request(q.text, (Image.new("RGB", (20, 16), "white"),)) for q in SEEN]
    rows = torch.cat([states(vlm, [t]) - states(vlm, [b]) for t, b in zip(texts, blank, strict=True)])
    with torch.inference_mode(), steer(vlm, rows, Steering(0.5)):
        expected = states(vlm, SEEN)
    assert torch.allclose(steered_states(vlm, sample, SEEN), expected, atol=1e-4)


def test_null_space_projects_every_position(vlm: VLM, data: FitData) -> None:
    defense = make_defense("null_space")
    defense.fit(vlm, data)
    text = states(vlm, list(build_requests(list(data.harmful), "query")))
    blank = states(vlm, list(build_requests(list(data.harmful), "blank")))
    mean = (text - blank).mean(0)
    u = mean / mean.norm(dim=-1, keepdim=True)
    assert torch.allclose(defense.state["direction"], u, atol=1e-4)
    edits = {k: (lambda h, k=k: h - (h @ u[k])[..., None] * u[k]) for k in range(vlm.n_layers)}
    found = steered_states(vlm, defense, SEEN)
    assert torch.allclose(found, every_position(vlm, SEEN, dict(edits)), atol=2e-3)
    assert (found * u).sum(-1).abs().max() < 1e-3, "nothing is left along the direction"


def test_refusal_direction_is_added_at_one_layer(vlm: VLM, data: FitData) -> None:
    defense = make_defense("refusal_direction", {"refusal_direction": {"layer": 1, "alpha": 0.7}})
    defense.fit(vlm, data)
    harmful = states(vlm, list(build_requests(list(data.harmful), "query"))).mean(0)
    benign = states(vlm, list(build_requests(list(data.benign), "query"))).mean(0)
    found = steered_states(vlm, defense, SEEN)
    assert torch.allclose(found, every_position(vlm, SEEN, {1: lambda h: h + 0.7 * (harmful - benign)[1]}), atol=1e-4)
    with pytest.raises(InputError, match="alpha is -1"):
        make_defense("refusal_direction", {"refusal_direction": {"alpha": -1}})


def test_shiftdc_takes_the_safety_part_of_the_shift_away(vlm: VLM, data: FitData) -> None:
    defense = make_defense("shiftdc", {"shiftdc": {"first_layer": 1}})
    defense.fit(vlm, data)
    harmful = states(vlm, list(build_requests(list(data.harmful), "query"))).mean(0)
    s = harmful - states(vlm, list(build_requests(list(data.benign), "query"))).mean(0)
    one = SEEN[:1]
    told = p.captions(vlm, one)[0]
    m = states(vlm, one)[0] - states(vlm, [Request(f"{told}\n{one[0].text}")])[0]
    added = -((m * s).sum(-1) / (s * s).sum(-1))[:, None] * s

    def last(k: int) -> object:
        def edit(h: torch.Tensor) -> torch.Tensor:
            changed = h.clone()
            changed[:, -1] += added[k]
            return changed

        return edit

    expected = every_position(vlm, one, {k: last(k) for k in range(1, vlm.n_layers)})
    assert torch.allclose(steered_states(vlm, defense, one), expected, atol=1e-4)
    first = steered_states(vlm, defense, one)[0, 1] - states(vlm, one)[0, 1]
    left = ((m + torch.cat([torch.zeros(1, m.shape[1]), first[None], torch.zeros(1, m.shape[1])]))[1] * s[1]).sum()
    assert left.abs() < 1e-3, "no shift along the safety direction is left where it is first taken away"


def test_only_the_prompt_is_steered_at_last_prompt(vlm: VLM, data: FitData) -> None:
    vectors = torch.ones(vlm.n_layers, vlm.hidden_size)
    inputs = encode(vlm, SEEN[:1])
    with torch.inference_mode(), steer(vlm, vectors, Steering(positions="last_prompt")):
        cache = cache_of(vlm.model(**inputs, use_cache=True))
        steered = vlm.model(input_ids=torch.tensor([[7]]), **with_cache(vlm.model, cache)).logits
    with torch.inference_mode():
        with steer(vlm, vectors, Steering(positions="last_prompt")):
            cache = cache_of(vlm.model(**inputs, use_cache=True))
        plain = vlm.model(input_ids=torch.tensor([[7]]), **with_cache(vlm.model, cache)).logits
    assert torch.equal(steered, plain)


def test_adashield_follows_the_request() -> None:
    asked = make_defense("adashield_s").rewrite(None, [SEEN[0], UNSEEN])  # type: ignore[arg-type]
    assert asked[0].text == f"{SEEN[0].text}\n{p.ADASHIELD_STATIC}"
    assert asked[0].images == SEEN[0].images
    assert asked[1] == UNSEEN


def scripted(monkeypatch: pytest.MonkeyPatch, module: object, answers: list[list[str]]) -> list[list[Request]]:
    asked: list[list[Request]] = []

    def complete(vlm: object, requests: list[Request], **options: object) -> tuple[list[str], list[int]]:
        asked.append(list(requests))
        texts = answers[len(asked) - 1]
        return texts, [len(t) for t in texts]

    monkeypatch.setattr(module, "complete", complete)
    return asked


def test_caption_substitution_asks_for_a_caption_and_drops_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = scripted(monkeypatch, p, [["a red wall"]])
    told = make_defense("caption").rewrite(None, [UNSEEN, SEEN[0]])  # type: ignore[arg-type]
    assert [q.text for q in asked[0]] == [p.DESCRIBE]
    assert asked[0][0].images == SEEN[0].images
    assert told == [UNSEEN, Request(f"a red wall\n{SEEN[0].text}")]


def test_ecso_answers_again_from_text_where_it_finds_itself_unsafe(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = scripted(monkeypatch, p, [["Yes.", "No, it is fine"], ["a red wall"], ["I cannot help"]])
    replies = [Reply("first", 1), Reply("second", 2), Reply("third", 3)]
    final = make_defense("ecso").revise(None, [*SEEN, UNSEEN], replies, max_new_tokens=9)  # type: ignore[arg-type]
    assert [f.text for f in final] == ["I cannot help", "second", "third"]
    assert [q.text for q in asked[0]] == [
        f"QUERY:\n{SEEN[0].text}\n\nRESPONSE:\nfirst\n\nIs the RESPONSE harmful, unsafe and unethical? Answer yes or no:",
        f"QUERY:\n{SEEN[1].text}\n\nRESPONSE:\nsecond\n\nIs the RESPONSE harmful, unsafe and unethical? Answer yes or no:",
    ]
    assert all(q.images for q in asked[0])
    assert asked[1][0].text == f"REQUEST:\n{SEEN[0].text}.\n\nBased on the REQUEST, describe the image."
    assert not asked[2][0].images
    assert "a red wall" in asked[2][0].text
    assert asked[2][0].text.endswith(SEEN[0].text)


def test_a_stack_rewrites_and_steers(vlm: VLM, data: FitData) -> None:
    stack = make_defense("adashield_s+cmrm_dataset", {"cmrm_dataset": {"alpha": 0.5}})
    assert isinstance(stack, Stack)
    stack.fit(vlm, data)
    single = make_defense("cmrm_dataset", {"cmrm_dataset": {"alpha": 0.5}})
    single.fit(vlm, data)
    asked = make_defense("adashield_s").rewrite(vlm, SEEN)
    assert torch.equal(steered_states(vlm, stack, SEEN), steered_states(vlm, single, asked))
    both = make_defense("cmrm_dataset+null_space")
    both.fit(vlm, data)
    assert not torch.allclose(steered_states(vlm, both, SEEN), steered_states(vlm, single, SEEN), atol=1e-3)
    assert set(both.settings) == {"cmrm_dataset", "null_space"}


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("nonsense", {}, "unknown defence 'nonsense'"),
        ("cmrm_dataset+cmrm_dataset", {}, "twice"),
        ("cmrm_dataset", {"cmrm_dataset": {"strength": 1}}, "does not take these settings"),
        ("cmrm_sample", {"cmrm_sample": {"alpha": -0.1}}, "alpha is -0.1"),
        ("cmrm_sample", {"cmrm_sample": 0.3}, "expected a mapping"),
        ("cmrm_sample", {"cmrm_sample": {"alpha": True}}, "alpha is True"),
        ("cmrm_sample", {"cmrm_sample": {"preserve_norm": "false"}}, "preserve_norm is 'false'"),
        ("cmrm_dataset", {"cmrm_dataset": {"estimator": "x"}}, "estimator is 'x'"),
        ("refusal_direction", {"refusal_direction": {"layer": "x"}}, "layer is 'x'"),
        ("shiftdc", {"shiftdc": {"first_layer": 0.5}}, "first_layer is 0.5"),
        ("cmrm_dataset@paper+cmrm_dataset@calibrated", {}, "twice"),
        ("cmrm_sample", {"cmrm_sample": {"corruption": "blnk"}}, "corruption is 'blnk'"),
        ("cmrm_sample", {"cmrm_sample": {"layers": "0-13"}}, "layers are '0-13'"),
        ("null_space", {"null_space": {"layers": [0.5]}}, "layers are"),
        ("cmrm_sample@weak", {"cmrm_sample@weak": {"alpha": -0.1}}, "alpha is -0.1"),
        ("cmrm_dataset@weak", {}, "'cmrm_dataset@weak' has no settings.*cmrm_dataset@paper"),
        ("ecso@weak", {}, "'ecso@weak' has no settings: give them"),
        ("cmrm_dataset@", {}, "names no variant"),
        ("cmrm_dataset@a b", {}, "names no variant"),
        ("nonsense@paper", {}, "unknown defence 'nonsense@paper'"),
        ("cmrm_sample", {"cmrm_sample": {"corruption": "other"}}, "choose another corruption"),
    ],
)
def test_bad_names_and_settings(name: str, settings: dict[str, dict[str, object]], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_defense(name, settings)


def test_variants_stand_side_by_side(vlm: VLM, data: FitData, tmp_path: Path) -> None:
    settings = {
        "cmrm_dataset": {"alpha": 0.5},
        "cmrm_dataset@weak": {"alpha": 0.1},
        "cmrm_dataset@paper": {"alpha": 0.2},
    }
    made = {n: make_defense(n, settings) for n in ("cmrm_dataset", "cmrm_dataset@weak", "cmrm_dataset@paper")}
    assert {n: d.name for n, d in made.items()} == {n: n for n in made}
    assert [d.settings["alpha"] for d in made.values()] == [0.5, 0.1, 0.2], "each has its own"
    assert [d.settings["schedule"] for d in made.values()] == ["telescoped", "telescoped", "per_layer"]
    assert make_defense("cmrm_sample@paper").settings["positions"] == "all", "the paper's letter needs no settings"
    weak = made["cmrm_dataset@weak"]
    weak.fit(vlm, data)
    weak.save(tmp_path / "w.safetensors", vlm)
    with pytest.raises(ArtifactError, match="no fitted cmrm_dataset"):
        made["cmrm_dataset"].load(tmp_path / "w.safetensors", vlm)
    stack = make_defense("adashield_s+cmrm_sample@paper")
    assert isinstance(stack, Stack)
    assert set(stack.settings) == {"adashield_s", "cmrm_sample@paper"}


def test_further_samples_count_for_the_shift_and_not_for_the_harm(vlm: VLM, data: FitData) -> None:
    split = FitData(data.harmful[:4], data.benign, 2, more=data.harmful[4:])
    for name, same in (("cmrm_dataset", True), ("null_space", True), ("refusal_direction", False)):
        whole, parts = make_defense(name), make_defense(name)
        whole.fit(vlm, data)
        parts.fit(vlm, split)
        key = next(iter(whole.state))
        assert torch.allclose(whole.state[key], parts.state[key], atol=1e-5) is same, name


def test_a_third_party_registers_its_own(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    import cmrm.defenses as known

    monkeypatch.setattr(known, "_KNOWN", dict(known._KNOWN))

    @register
    class Shout(Defense):
        name = "shout"
        source = "test"

        def rewrite(self, vlm: VLM, requests: object) -> list[Request]:
            return [Request(q.text.upper(), q.images) for q in requests]  # type: ignore[attr-defined]

    assert make_defense("shout").rewrite(vlm, [UNSEEN])[0].text == UNSEEN.text.upper()

    with pytest.raises(InputError, match="two defences are called 'shout'"):

        @register
        class Other(Defense):
            name = "shout"

    with pytest.raises(InputError, match="needs a name without"):

        @register
        class Unnamed(Defense):
            name = "a+b"


def test_an_entry_point_that_is_no_defence_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    import cmrm.defenses as known

    for value, said in (("json:dumps", "is no cmrm.defenses.Defense"), ("no_such_module:X", "cannot be loaded")):
        point = EntryPoint("theirs", value, "cmrm.defenses")
        monkeypatch.setattr(known, "entry_points", lambda group, point=point: [point])
        with pytest.raises(InputError, match=said):
            defense_names()
    point = EntryPoint("theirs", "cmrm.defenses:NoDefense", "cmrm.defenses")
    monkeypatch.setattr(known, "entry_points", lambda group: [point])
    assert "theirs" in defense_names()


def test_the_meter_counts_what_is_run(vlm: VLM) -> None:
    meter = Meter()
    with meter.watching(vlm, 2):
        respond(vlm, make_defense("none"), SEEN, max_new_tokens=4)
    tokens = encode(vlm, SEEN)["input_ids"].numel()
    assert meter.per_request()["prefills"] == 1
    assert meter.prompt_tokens == tokens
    assert meter.decoded_tokens <= 2 * 3
    assert meter.peak_bytes is None or meter.peak_bytes >= 0
    assert not vlm.layers[0]._forward_pre_hooks


def test_earlier_turns_are_part_of_the_prompt(vlm: VLM) -> None:
    picture = Image.new("RGB", (20, 16), "red")
    talk = Request("And now?", (), before=(Turn("system", "Be brief."), Turn("user", "What is this?", (picture,)),
                                           Turn("assistant", "A red wall.")))  # fmt: skip
    text = vlm.tokenizer.decode(encode(vlm, [talk])["input_ids"][0])
    assert [text.find(part) for part in ("Be brief.", "What is this?", "A red wall.", "And now?")] == sorted(
        text.find(part) for part in ("Be brief.", "What is this?", "A red wall.", "And now?")
    )
    assert (encode(vlm, [talk])["input_ids"] == vlm.image_token_id).any()
    assert not (encode(vlm, [talk.without_images()])["input_ids"] == vlm.image_token_id).any()
    blank = talk.corrupted(Condition.BLANK, seed=0, key="k")
    assert blank.all_images[0].getpixel((0, 0)) == (255, 255, 255)
    assert build_request(Sample("s", "q", picture), "blank").images[0].size == picture.size


def test_captions_come_from_the_undefended_model(vlm: VLM) -> None:
    assert len(p.captions(vlm, SEEN)) == 2

"""The proxy against plain softmax over a plain forward pass; ranks; the screen."""

from __future__ import annotations

import pytest
import torch

from cmrm.defenses import Defense, make_defense
from cmrm.engines.first_token import first_token_log_odds, first_tokens
from cmrm.model.encode import encode
from cmrm.prompts.conditions import Condition, Request, build_request
from cmrm.tune.proxy import STARTS, Odds, Proxy, correlation, screened
from cmrm.tune.remembering import Remembering
from defenses.oracle import SEEN, anchor_set, fitted
from tiny import vlm_of
from tune.sources import small_sets


def plain(engine: Remembering, requests: list[Request], tokens: tuple[int, ...]) -> torch.Tensor:
    """Log-odds by the definition, each request in a batch of its own."""
    rows = []
    for request in requests:
        with torch.inference_mode():
            logits = (
                vlm_of(engine).model(**encode(vlm_of(engine), [request])).logits[0, -1].double()
            )
        p = torch.softmax(logits, -1)[list(tokens)].sum()
        rows.append(torch.log(p / (1 - p)))
    return torch.stack(rows).float()


@pytest.fixture(scope="module")
def tokens(engine: Remembering) -> tuple[int, ...]:
    return first_tokens(vlm_of(engine).tokenizer, STARTS)


def test_the_tokens_that_refusals_begin_with(engine: Remembering, tokens: tuple[int, ...]) -> None:
    texts = {vlm_of(engine).tokenizer.decode([token]).strip() for token in tokens}
    assert texts
    assert all(any(start.startswith(text) for start in STARTS) for text in texts)
    assert first_tokens(vlm_of(engine).tokenizer, []) == ()


def test_the_log_odds_of_the_untouched_model(engine: Remembering, tokens: tuple[int, ...]) -> None:
    odds = first_token_log_odds(vlm_of(engine), SEEN, tokens)
    assert torch.allclose(odds, plain(engine, SEEN, tokens), atol=1e-3)


def test_the_log_odds_under_steering(engine: Remembering, tokens: tuple[int, ...]) -> None:
    defense = fitted(engine, anchor_set(), "astra", layer=1, alpha=7.0)
    edits = defense.intervene(engine, SEEN, ["", ""])
    steered = first_token_log_odds(vlm_of(engine), SEEN, tokens, edits)
    untouched = first_token_log_odds(vlm_of(engine), SEEN, tokens)
    assert not torch.allclose(steered, untouched, atol=1e-3)
    assert torch.equal(first_token_log_odds(vlm_of(engine), SEEN, tokens), untouched), (
        "hooks are off"
    )
    zero = fitted(engine, anchor_set(), "astra", layer=1, alpha=0.0)
    edits = zero.intervene(engine, SEEN, ["", ""])
    assert torch.equal(first_token_log_odds(vlm_of(engine), SEEN, tokens, edits), untouched)


def test_a_contrast_counts(engine: Remembering, tokens: tuple[int, ...]) -> None:
    one = make_defense("coca", {"coca": {"alpha": 1.0, "principle": "Say no."}})
    contrast = one.contrast(engine, SEEN)
    assert contrast is not None
    odds = first_token_log_odds(vlm_of(engine), SEEN, tokens, (), contrast)
    second = [request for request in contrast.requests if request is not None]
    assert torch.allclose(odds, plain(engine, second, tokens), atol=1e-3), "weight 1: its own"


def test_means_over_both_kinds(engine: Remembering, tokens: tuple[int, ...]) -> None:
    dev = small_sets(dev=5).dev
    proxy = Proxy(engine, dev, batch_size=2, seed=0)
    odds = proxy.odds(make_defense("none"))
    by_kind = [
        plain(engine, [build_request(sample, Condition.ORIGINAL) for sample in samples], tokens)
        for samples in (dev.harmful, dev.benign)
    ]
    for values, mean in zip(by_kind, (odds.harmful, odds.benign), strict=True):
        assert mean == pytest.approx(float(values.mean()), abs=1e-3)
    shares = [float(torch.sigmoid(values).mean()) for values in by_kind]
    assert odds.apart == pytest.approx(shares[0] - shares[1], abs=1e-4)


def test_rows_whose_image_a_defence_takes_away_are_run_apart(engine: Remembering) -> None:
    class Half(Defense):
        name = "half"

        def rewrite(self, engine: object, requests: object) -> list[Request]:
            rows = list(requests)  # type: ignore[call-overload]
            return [r.without_images() if k % 2 else r for k, r in enumerate(rows)]

    dev = small_sets(dev=4).dev
    odds = Proxy(engine, dev, batch_size=4, seed=0).odds(Half())
    assert odds != Proxy(engine, dev, batch_size=4, seed=0).odds(make_defense("none"))


def test_the_rank_correlation() -> None:
    assert correlation([1, 2, 3, 4], [0.9, 0.7, 0.4, 0.1])["rho"] == -1.0
    row = correlation([1, 2, 3, 4, 5], [0.1, 0.3, 0.2, 0.5, 0.4])
    assert row["rho"] == pytest.approx(0.8)
    assert row["n"] == 5
    assert correlation([1, 2, 3], [1, 2, 3])["reason"] == "3 trials; at least 4 are needed"
    assert "the rate is the same" in correlation([1, 2, 3, 4], [0.5] * 4)["reason"]
    assert "the proxy is the same" in correlation([0.5] * 4, [1, 2, 3, 4])["reason"]


def test_the_screen_keeps_what_tells_the_kinds_apart() -> None:
    points = [{"n": n} for n in range(4)]
    odds = [Odds(1.0, 1.0, 0.1), Odds(0.0, -3.0, 0.9), None, Odds(2.0, 0.5, 0.4)]
    assert screened(points, odds, 2) == [{"n": 1}, {"n": 3}]
    assert screened(points, odds, 9) == [{"n": 1}, {"n": 3}, {"n": 0}], "never one that failed"

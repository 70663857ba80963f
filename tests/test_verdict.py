"""What is said in words and in records of an image and its keys."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from identity import MODEL, key, secret

from ringmark.data.images import Sample
from ringmark.inversion.decoder import INVERTERS
from ringmark.inversion.recover import Recovered
from ringmark.watermark.detect.detector import Detector, Seen
from ringmark.watermark.detect.verdict import LISTED, Judged, Verdict, Verdicts, p_text
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.tree_ring import TreeRing

VERDICT = Verdict(
    sample_id="a",
    key="0123456789abcdef",
    present=False,
    p_value=0.25,
    log10_p=-0.602,
    score=0.1,
    statistics={"published_distance": 30.5, "published_p": 0.5},
    residual=1.5,
    status="converged",
    seconds=0.1,
)


def judged(keys: list[Key], noise: torch.Tensor) -> Judged:
    """As if this noise (1, C, h, w) had come back from an image."""
    detector, sample = Detector(keys, null=Null.of_model(MODEL)), Sample("a", None)
    images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    recovered = Recovered(images=images, solution=INVERTERS["encoder"](MODEL, images), noise=noise, seconds=0.0)
    return Judged(sample, detector.judge([sample], Seen.of(recovered))[0], noise[0])


def of(*pairs: tuple[bool | None, float]) -> Judged:
    """Verdicts of these outcomes and p-values."""
    verdicts = [replace(VERDICT, present=present, p_value=p, log10_p=math.log10(p)) for present, p in pairs]
    return Judged(None, Verdicts.of(verdicts), None)


def test_what_is_inconclusive_comes_after_what_is_present_and_before_what_is_not():
    assert of((False, 0.2), (None, 0.9)).best.present is None
    assert of((None, 1e-9), (True, 1e-4), (True, 1e-5)).best.p_value == 1e-5
    assert [v.p_value for v in of((True, 1e-4), (None, 1e-9), (True, 1e-5)).present] == [1e-5, 1e-4]


def test_the_sentence_names_the_keys_that_fit():
    first, second = key(1, "rand"), Key(key(2, "rand").metadata | {"channels": [1, 2]}, secret(2))
    others = [key(seed, "rand") for seed in range(3, 9)]
    noise = initial_noise([5], MODEL.latent_shape)
    one, both = TreeRing(first).embed(noise), _of_both(noise, first, second)
    ring = [*others, first, second]
    assert judged(ring, one).sentence().startswith(f"carries key {first.fingerprint[:8]}, p ")
    fitting = judged(ring, both)
    assert {v.key for v in fitting.present} == {first.fingerprint, second.fingerprint}
    assert fitting.sentence().startswith("carries 2 keys: ")
    assert all(k.fingerprint[:8] in fitting.sentence() for k in (first, second))
    assert judged(ring, noise).sentence().startswith("carries none of 8 keys, best fit ")
    assert judged([first], noise).sentence().startswith(f"does not carry key {first.fingerprint[:8]}, p = ")
    weak = 0.2 * one + noise  # of which p is neither 0 nor 1
    p = {n: judged(ring[-n:], weak).verdicts[-2].p_value for n in (2, 4)}
    assert 0 < p[2] and p[4] == pytest.approx(2 * p[2])  # corrected for the number of keys


def _of_both(noise: torch.Tensor, first: Key, second: Key) -> torch.Tensor:
    """Marked in channel 0 by the first key, in channels 1 and 2 by the second."""
    marked = TreeRing(second).embed(noise)
    marked[:, 0] = TreeRing(first).embed(noise)[:, 0]
    return marked


def test_a_verdict_in_words():
    assert VERDICT.sentence() == "does not carry key 01234567, p = 0.25"
    assert (
        replace(VERDICT, present=True, notes=("resized", "x")).sentence()
        == "carries key 01234567, p = 0.25; resized; x"
    )
    assert replace(VERDICT, present=None).sentence().startswith("inconclusive for key 01234567, ")


@pytest.mark.parametrize(
    "p, text", [(2e-9, "p = 2e-09"), (0.25, "p = 0.25"), (0.0, "p < 1e-300"), (1e-305, "p < 1e-300")]
)
def test_a_p_value_too_small_to_be_held_is_a_bound(p, text):
    assert p_text(p) == text


def test_verdicts_are_built_once_and_only_when_they_are_asked_for():
    given = [replace(VERDICT, key=str(k), p_value=0.1 * k, log10_p=math.log10(0.1 * k)) for k in range(3, 8)]
    built: list[int] = []

    def build(k: int) -> Verdict:
        built.append(k)
        return given[k]

    known = Verdicts.of(given)
    lazy = Verdicts(known.outcome, known.log10_p, known.score, build)
    assert Judged(None, lazy, None).best is lazy[0]
    assert built == [0] and len(lazy) == 5 and lazy[-1].key == "7" and built == [0, 4]
    assert lazy[1:3] == given[1:3] and list(lazy) == given and sorted(built) == list(range(5))


def test_a_record_of_many_keys_lists_those_that_are_present_or_else_the_best():
    def listed(present: int, keys: int) -> dict:
        pairs = [(k < present, 1e-6 * (k + 1)) for k in range(keys)]
        verdicts = [replace(v, key=str(k)) for k, v in enumerate(of(*pairs).verdicts)]
        return Judged(None, Verdicts.of(verdicts), None).by_key()

    few = listed(1, LISTED)
    assert list(few) == [str(k) for k in range(LISTED)]
    assert few["0"] == {"p_value": 1e-6, "score": 0.1, **VERDICT.statistics}
    assert list(listed(3, LISTED + 1)) == ["0", "1", "2"] and list(listed(0, LISTED + 1)) == ["0"]
    assert list(listed(150, 200)) == [str(k) for k in range(LISTED)]


def test_a_record_has_every_statistic_under_its_own_name():
    record = replace(VERDICT, notes=("resized",), conformal_p=0.5).record()
    assert record["published_distance"] == 30.5 and record["published_p"] == 0.5 and "statistics" not in record
    assert record["notes"] == ["resized"] and record["key"] == VERDICT.key and record["conformal_p"] == 0.5
    plain = (str, float, int, bool, list, dict, type(None))
    assert all(isinstance(value, plain) for value in record.values())

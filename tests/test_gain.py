"""Paired gains against what can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ringmark.watermark.evaluation.gain import Scores, Way, compare_ways, paired_gain, resampled
from ringmark.watermark.evaluation.rates import roc


def scores(shift: float, seed: int = 0, n: int = 60, prompts: int = 60) -> Scores:
    rng = np.random.default_rng(seed)
    named = [str(i % prompts) for i in range(n)]
    return Scores(rng.normal(shift, size=(2, n)), rng.normal(size=(2, n)), (named, named))


def width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


def test_the_mean_auc_is_that_of_the_rocs():
    rng = np.random.default_rng(0)
    marked, unmarked = rng.integers(0, 9, (3, 40)), rng.integers(0, 7, (3, 30))  # with ties
    in_order = Scores(marked, unmarked, (range(40), range(30))).in_order()
    assert in_order.mean() == pytest.approx(np.mean([roc(m, u).auc for m, u in zip(marked, unmarked, strict=True)]))


def test_what_shows_nothing_is_tied_with_its_like_below_all_others():
    in_order = Scores(np.array([[-np.inf, 1.0]]), np.array([[-np.inf, 0.0]]), ("ab", "cd")).in_order()
    assert in_order.tolist() == [[0.5, 0.0], [1.0, 1.0]]


def test_a_pair_has_a_narrower_interval_than_strangers():
    one = scores(1.0)
    better = one._replace(marked=one.marked + 0.2)
    gain, paired = paired_gain(better, one, draws=300)
    _, strange = paired_gain(scores(1.2, 1), one, draws=300)
    assert 0 < paired[0] < gain < paired[1] and width(paired) < width(strange) / 3
    assert paired_gain(one, one, draws=50) == (0, (0, 0))


def test_a_draw_is_the_auc_of_the_images_drawn():
    one, other = scores(1.0, 3, 12), scores(0.5, 4, 12)
    marked, unmarked = resampled(one.prompts, 40, 7)
    gains = []
    for w, v in zip(marked, unmarked, strict=True):
        i, j = np.repeat(np.arange(12), w), np.repeat(np.arange(12), v)
        means = [
            np.mean([roc(m[i], u[j]).auc for m, u in zip(s.marked, s.unmarked, strict=True)]) for s in (one, other)
        ]
        gains.append(means[0] - means[1])
    assert paired_gain(one, other, draws=40, seed=7)[1] == pytest.approx(tuple(np.quantile(gains, [0.025, 0.975])))


def test_images_of_one_prompt_are_drawn_together():
    marked, unmarked = resampled((["a", "b", "a", "c"], ["d"]), 50, 3)
    assert (marked[:, 0] == marked[:, 2]).all() and (marked[:, [0, 1, 3]].sum(1) == 3).all() and (unmarked == 1).all()
    assert len({tuple(row) for row in marked}) > 5
    (few, few_interval), (many, many_interval) = (
        paired_gain(scores(1, prompts=p), scores(0.5, 1, prompts=p), draws=300) for p in (6, 60)
    )
    assert few == many and width(few_interval) != width(many_interval)


def test_the_interval_covers_the_truth():
    """Of two ways that differ by a shift of all marked scores, on images that share their chance."""
    rng, covered = np.random.default_rng(5), 0
    from scipy import stats

    truth = stats.norm.cdf(1.2 / 2**0.5) - stats.norm.cdf(1 / 2**0.5)
    for _ in range(150):
        noise, unmarked = rng.normal(size=(1, 60)), rng.normal(size=(1, 60))
        prompts = (range(60), range(60))
        one, other = (Scores(noise + shift, unmarked, prompts) for shift in (1.2, 1.0))
        low, high = paired_gain(one, other, draws=200)[1]
        covered += low <= truth <= high
    assert covered >= stats.binom.ppf(0.001, 150, 0.93)


def record(key: str, attack: str, i: int, score: float | None, distance: float, method: str = "encoder") -> dict:
    return {
        "key": key,
        "attack": attack,
        "method": method,
        "image": f"{key if i > 3 else 'unmarked'}/{i}.png",
        "label": i // 4,
        "prompt": f"prompt {i}",
        "score": score,
        "published_distance": distance,
    }


def table() -> list[dict]:
    """Two keys; the score of bb22 is one half right, and nothing can be said of its first image."""
    return [
        record(key, attack, i, None if key == "bb22" and i == 0 else i // 4 if key == "aa11" else i % 2, 1 - i // 4)
        for key in ("aa11", "bb22")
        for attack in ("clean", "flip")
        for i in range(8)
    ]


def test_a_table_by_hand():
    gains = compare_ways(table(), ["flip"], draws=20)
    ways = [Way(key, "encoder", column) for key in ("aa11", "bb22") for column in ("score", "published_distance")]
    assert [(g.of, g.over) for g in gains] == [(ways[j], ways[i]) for i in range(4) for j in range(i + 1, 4)]
    by_pair = {(g.of, g.over): g for g in gains}
    found = by_pair[ways[3], ways[2]]
    assert (found.of_auc, found.over_auc, found.attacks) == (1, 0.5 + 1 / 16, ("flip",))
    assert (found.marked, found.unmarked) == (4, 4) and found.gain == 0.5 - 1 / 16
    assert found.low is None  # four prompts are too few to resample
    assert by_pair[ways[1], ways[0]].gain == 0


def test_separate_classes_have_no_interval():
    images = [record("aa11", "flip", i % 4 + 4 * (i > 9), i, -i, m) for m in ("a", "b") for i in range(20)]
    images = [r | {"image": f"x/{k}.png", "prompt": f"{k}"} for k, r in enumerate(images[:20])] + [
        r | {"image": f"x/{k}.png", "prompt": f"{k}"} for k, r in enumerate(images[20:])
    ]
    assert {(g.of_auc, g.over_auc, g.gain, g.low, g.high) for g in compare_ways(images, ["flip"])} == {
        (1, 1, 0, None, None)
    }


def test_a_scheme_need_not_have_a_published_distance():
    images = [r | {"published_distance": None} if r["key"] == "bb22" else r for r in table()]
    without = [{n: v for n, v in r.items() if v is not None or n != "published_distance"} for r in images]
    assert compare_ways(without, ["flip"], draws=20) == compare_ways(images, ["flip"], draws=20)
    assert {way for g in compare_ways(images, ["flip"], draws=20) for way in (g.of, g.over)} == {
        Way("aa11", "encoder", "score"),
        Way("aa11", "encoder", "published_distance"),
        Way("bb22", "encoder", "score"),
    }


def test_only_images_that_all_ways_scored_count():
    lost = [r for r in table() if (r["key"], r["attack"], r["image"]) != ("bb22", "flip", "bb22/4.png")]
    assert {(g.marked, g.unmarked) for g in compare_ways(lost, ["flip"], draws=20)} == {(3, 4)}
    other = [r | {"prompt": "other"} if r["key"] == "bb22" and r["label"] else r for r in table()]
    assert compare_ways(other, ["flip"]) == []
    assert compare_ways([r for r in table() if r["key"] == "aa11"], ["flip"]) == []  # a single key and method

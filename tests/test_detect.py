"""The detector on a model whose every map is the identity: what is planted is found, what is not is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from data.images import Sample, from_array
from inversion.decoder import Inverter
from inversion.grid import Grid
from watermark.detect import Detector, detector
from watermark.errors import KeyFileError, RingmarkError
from watermark.generate import generate, initial_noise
from watermark.keys import Key
from watermark.report import explain
from watermark.schemes.tree_ring import Placement, TreeRing, make_key


class Identity:
    """Pixels are latents are noise, up to scale."""

    name, latent_shape, image_size, recovery = "identity", (3, 32, 32), (32, 32), None
    identity = {"name": "identity", "fingerprint": "0", "latent_shape": [3, 32, 32]}
    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images * 4

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / 4

    def embed(self, prompts: list[str]) -> torch.Tensor:
        return torch.zeros(len(prompts), 1, 1)

    def eps(self, latents: torch.Tensor, t: int, cond: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(latents)

    def grid(self, steps: int) -> Grid:
        return Grid(torch.arange(steps), torch.linspace(1, 0.01, steps + 1, dtype=torch.float64))


MODEL = Identity()


def key(seed: int, pattern: str = "ring", **changes) -> Key:
    made = make_key(
        (3, 32, 32),
        Placement((0, 2), (2, 8)),
        model=MODEL.identity | changes,
        pattern=pattern,
        rng=np.random.default_rng(seed),
    )
    return made


def samples(noise: torch.Tensor) -> list[Sample]:
    """8-bit pictures of noise, within ± 4 deviations."""
    return [Sample(str(i), from_array(np.clip(x.numpy() / 4, -1, 1))) for i, x in enumerate(noise)]


@pytest.mark.parametrize("pattern", ["ring", "rand", "zeros"])
@pytest.mark.parametrize("method", ["encoder", "anderson"])
def test_marked_are_found_and_unmarked_are_not(pattern: str, method: str) -> None:
    mine = key(1, pattern)
    noise = initial_noise(list(range(8)), MODEL.latent_shape)
    noise[:4] = TreeRing(mine).embed(noise[:4])
    verdicts = [v for _, (v,), _ in detector(MODEL, [mine], method, 4, 5).scan(samples(noise), batch=3)]
    assert [v.present for v in verdicts] == [True] * 4 + [False] * 4
    assert [v.sample_id for v in verdicts] == list(map(str, range(8)))
    assert all(v.p_value < 1e-9 for v in verdicts[:4])


def test_p_values_of_unmarked_images_are_uniform() -> None:
    looking = Detector(MODEL, [key(2)], steps=2, inverter=Inverter.named("encoder"))
    noise = initial_noise(list(range(100, 500)), MODEL.latent_shape)
    _, p = looking.statistic(looking.schemes[key(2).fingerprint], noise)
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_several_keys_are_tested_on_one_inversion_and_corrected_for() -> None:
    keys = [key(i) for i in range(3)]
    (sample,) = samples(TreeRing(keys[1]).embed(initial_noise([7], MODEL.latent_shape)))
    alone = Detector(MODEL, [keys[0]], steps=3)
    together = alone.with_keys(keys)
    ((_, (one,), _),) = alone.scan([sample])
    ((_, all_three, _),) = together.scan([sample])
    assert [v.present for v in all_three] == [False, True, False]
    assert all_three[0].p_value == pytest.approx(min(1, 3 * one.p_value))
    assert together.settings()["keys"] == sorted(k.fingerprint for k in keys)


def test_a_perfect_score_can_be_drawn() -> None:
    keys = [key(i) for i in range(2)]
    looking = Detector(MODEL, keys, steps=2)
    (judged,) = looking.scan(samples(TreeRing(keys[1]).embed(initial_noise([7], MODEL.latent_shape))))
    assert judged.best.score > 0.9
    explain(looking, judged, "a$x$\n.png").canvas.draw()  # warnings are errors here; the name is no formula


def test_results_do_not_depend_on_the_batch() -> None:
    looking = Detector(MODEL, [key(3)], steps=3)
    some = samples(initial_noise([1, 2, 3], MODEL.latent_shape))
    whole = [v.p_value for _, (v,), _ in looking.scan(some, batch=3)]
    single = [v.p_value for _, (v,), _ in looking.scan(some, batch=1)]
    assert whole == pytest.approx(single, rel=1e-4)


def test_flat_and_broken_images_are_inconclusive() -> None:
    looking = Detector(MODEL, [key(4)], steps=2)
    flat = Sample("flat", from_array(np.ones((3, 32, 32)) * np.array([0.1, -0.4, 0.8])[:, None, None]))
    ((_, (verdict,), _),) = looking.scan([flat])
    assert verdict.present is None and "flat" in verdict.sentence()

    class Overflowing(Identity):
        def eps(self, latents, t, cond):
            return torch.full_like(latents, torch.inf)

    ((_, (verdict,), _),) = Detector(Overflowing(), [key(4)], steps=2).scan(
        samples(initial_noise([5], MODEL.latent_shape))
    )
    assert verdict.present is None and "range of numbers" in verdict.sentence() and np.isfinite(verdict.p_value)


def test_a_key_of_another_model_or_shape_is_refused() -> None:
    with pytest.raises(KeyFileError, match="made for model 'other'"):
        Detector(MODEL, [key(5, name="other", fingerprint="1")])
    alien = make_key((4, 64, 64), Placement((0,), (2, 8)), model={"name": "large"})
    with pytest.raises(KeyFileError, match="use --model large"):
        Detector(MODEL, [alien])
    with pytest.raises(RingmarkError, match="choose from encoder"):
        detector(MODEL, [], "magic", 1, 1)


def test_generate_draws_each_image_from_its_own_seed() -> None:
    mine = TreeRing(key(6))
    whole = list(generate(MODEL, ["a", "b", "c"], [3, 4, 5], scheme=mine, steps=2, guidance=1.0, batch=2))
    (alone,) = generate(MODEL, ["c"], [5], scheme=mine, steps=2, guidance=2.0, batch=1)
    assert torch.equal(whole[2].noise, alone.noise) and torch.allclose(whole[2].image, alone.image)
    assert [(d.prompt, d.seed) for d in whole] == [("a", 3), ("b", 4), ("c", 5)]
    recovered, planted = mine.features(whole[0].noise[None])
    assert torch.allclose(recovered[0], planted, atol=1e-4)

"""The detector on a model whose every map is the identity: what is planted is found, what is not is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from ringmark.data.images import Sample, from_array
from ringmark.errors import CalibrationError, KeyFileError, RingmarkError
from ringmark.inversion.decoder import Inverter
from ringmark.inversion.noise_recovery import rings
from ringmark.inversion.schedule import Schedule
from ringmark.inversion.solve import Solution, Status
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.detector import Detector, Judged, Recovered, _final_rms, detector
from ringmark.watermark.embed import generate, initial_noise
from ringmark.watermark.figures import explain
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.tree_ring import Placement, TreeRing, make_key


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

    def predict(self, latents: torch.Tensor, level: int, schedule: Schedule, cond: torch.Tensor) -> tuple:
        return latents / schedule.at(level)[0], torch.zeros_like(latents)

    def schedule(self, steps: int) -> Schedule:
        return Schedule.from_alpha_bar(torch.linspace(1, 0.01, steps + 1).double()[1:], torch.arange(steps))


MODEL = Identity()


def key(seed: int, pattern: str = "ring", radii: tuple[int, int] = (2, 8), **changes) -> Key:
    made = make_key(
        (3, 32, 32),
        Placement((0, 2), radii),
        model=MODEL.identity | changes,
        pattern=pattern,
        rng=np.random.default_rng(seed),
    )
    return made


def samples(noise: torch.Tensor) -> list[Sample]:
    """8-bit pictures of noise, within ± 4 deviations."""
    return [Sample(str(i), from_array(np.clip(x.numpy() / 4, -1, 1))) for i, x in enumerate(noise)]


@pytest.mark.parametrize("pattern", ["ring", "rand", "zeros"])
@pytest.mark.parametrize("method", ["encoder", "anderson", "guarded"])
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


def test_the_residual_is_that_of_the_latents_that_are_judged() -> None:
    merits = torch.tensor([[4.0, 4, 4], [2, 2, torch.nan], [3, 3, torch.nan]])
    status, chosen = [Status.MAX_STEPS, Status.ROUNDED, Status.CONVERGED], torch.tensor([1, 0, 0])
    images, latents = torch.zeros(3, 3, 8, 8), torch.zeros(3, 4, 2, 2)
    solution = Solution(latents, merits, merits, torch.tensor([3, 3, 1]), status, chosen)
    one_grey_level = 127.5 / images[0].numel() ** 0.5
    assert _final_rms(Recovered(images, solution, latents, 0.0)) == pytest.approx(
        [2 * one_grey_level] + [4 * one_grey_level] * 2
    )


def test_several_keys_are_tested_on_one_inversion_and_corrected_for() -> None:
    keys = [key(i) for i in range(3)]
    (sample,) = samples(TreeRing(keys[1]).embed(initial_noise([7], MODEL.latent_shape)))
    alone = Detector(MODEL, [keys[0]], steps=3)
    together = Detector(MODEL, keys, steps=3)
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
    assert verdict.present is None and "flat" in verdict.sentence() and (verdict.shows, verdict.p_value) == (False, 1.0)

    class Overflowing(Identity):
        def predict(self, latents, level, schedule, cond):
            return latents, torch.full_like(latents, torch.inf)

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


# --- on a calibration


def coloured(first_seed: int, n: int) -> torch.Tensor:
    """Recovered noise (n, 3, 32, 32) whose rings fall off, and of which channel 2 repeats half of channel 0."""
    noise = initial_noise(list(range(first_seed, first_seed + n)), MODEL.latent_shape).double()
    noise[:, 2] = 0.5 * noise[:, 0] + 0.5 * noise[:, 2]
    return torch.fft.ifft2(torch.fft.fft2(noise) * torch.exp(-rings(32, 32) / 12)).real


def on(noise: torch.Tensor, keys: list[Key], **changes) -> Detector:
    """A detector calibrated on this noise."""
    plain = Detector(MODEL, keys, steps=2, **changes)
    return plain.with_calibration(Calibration.measure(noise, plain.settings(), {"drawn": len(noise)}))


def judged(looking: Detector, noise: torch.Tensor) -> list[Judged]:
    """As if this noise had been recovered from samples."""
    some = samples(noise)
    recovered = looking.recover(torch.stack([torch.randn(3, 32, 32).clamp(-1, 1)] * len(some)))
    recovered = replace(recovered, noise=noise)
    return list(map(Judged, some, looking.judge(some, recovered), noise))


@pytest.mark.parametrize("pattern", ["ring", "rand"])
def test_calibrated_p_values_of_coloured_noise_are_uniform(pattern: str) -> None:
    looking = on(coloured(0, 400), [key(2, pattern)])
    verdicts = [j.best for j in judged(looking, coloured(1000, 600))]
    for p in ([v.p_value for v in verdicts], [v.conformal_p for v in verdicts]):
        assert stats.kstest(p, "uniform").pvalue > 0.01
    assert not any(v.present or v.present is None for v in verdicts)
    assert {v.calibration for v in verdicts} == {looking.calibration.fingerprint}
    plain = Detector(MODEL, looking.keys, steps=2)
    assert {(v.calibration, v.conformal_p) for j in judged(plain, coloured(0, 2)) for v in j.verdicts} == {(None, None)}


def test_a_calibration_stays_with_other_keys_and_is_part_of_the_settings() -> None:
    looking = on(coloured(0, 100), [key(1)])
    both = Detector(MODEL, [key(1), key(2, "rand")], steps=2, calibration=looking.calibration)
    assert both.settings()["calibration"] == looking.calibration.fingerprint
    assert Detector(MODEL, [], steps=2).settings()["calibration"] is None
    assert both.reference_scores(key(1).fingerprint) is both.reference_scores(key(1).fingerprint)
    (one,), (two,) = (judged(x, TreeRing(key(1)).embed(coloured(5000, 1))) for x in (looking, both))
    assert one.best.conformal_p == pytest.approx(1 / 101)
    assert two.verdicts[0].conformal_p == pytest.approx(2 / 101)  # corrected, like p


def test_a_calibration_of_other_settings_is_refused() -> None:
    made = on(coloured(0, 50), []).calibration
    with pytest.raises(CalibrationError, match=r"^calibration: made with steps 2, here 3; use those settings"):
        Detector(MODEL, [], steps=3, calibration=made)
    with pytest.raises(CalibrationError, match=r"holds rings up to 12, .* of radii 2-11 "):
        Detector(MODEL, [key(1, "zeros", (2, 11))], steps=2, calibration=made)  # compares with what is outside


def test_a_mark_among_the_unmarked_makes_its_presence_inconclusive() -> None:
    mine = key(1, "rand")
    mark = TreeRing(mine).embed(torch.zeros(1, *MODEL.latent_shape, dtype=torch.float64))
    noise, new = coloured(0, 300), coloured(1000, 40)
    noise[:6] += 0.6 * mark
    looking = on(noise, [mine], alpha=1e-3)
    new[:20] += 0.4 * mark
    new[20:30] += 1.5 * mark
    verdicts = [j.best for j in judged(looking, new)]
    assert all(v.p_value <= 1e-6 for v in verdicts[:30])
    assert {v.present for v in verdicts[:20]} == {None} and {v.present for v in verdicts[20:30]} == {True}
    assert {v.present for v in verdicts[30:]} == {False}
    assert "; 6 of 300 unmarked images score as high, which an uncorrected p of" in verdicts[0].sentence()
    # Where rank and p agree about alpha, p is false all the same.
    lenient = [j.best for j in judged(on(noise, [mine], alpha=0.1), new)[:20]]
    assert {v.present for v in lenient} == {None} and all(v.conformal_p < 0.1 for v in lenient)


def test_an_absence_that_no_unmarked_image_bears_out_is_inconclusive() -> None:
    mine, noise = key(1, "rand"), coloured(0, 600)
    least = np.argsort(on(noise, [mine]).reference_scores(mine.fingerprint))[:300]  # like the mark
    verdicts = [j.best for j in judged(on(noise[least], [mine]), coloured(1000, 100))]
    doubtful = [v for v in verdicts if v.present is None]
    assert len(doubtful) > 30
    assert all(v.p_value > 0.01 and v.conformal_p == pytest.approx(1 / 301) for v in doubtful)
    assert "; 0 of 300 unmarked images score as high" in doubtful[0].sentence()
    assert {v.present for v in verdicts if v.conformal_p > 0.1} == {False}


def test_what_is_inconclusive_comes_after_what_is_present_and_before_what_is_not() -> None:
    ((judged_once),) = judged(Detector(MODEL, [key(1)], steps=2), coloured(0, 1))
    made = lambda *pairs: Judged(None, [replace(judged_once.best, present=x, p_value=p) for x, p in pairs], None).best
    assert made((False, 0.2), (None, 0.9)).present is None
    assert made((None, 1e-9), (True, 1e-4), (True, 1e-5)).p_value == 1e-5


def test_the_unmarked_images_are_drawn_beside_the_null() -> None:
    looking = on(coloured(0, 100), [key(1)])
    (one,) = judged(looking, coloured(7, 1))
    (*_, ax) = explain(looking, one, "a.png").axes
    assert "100 unmarked images" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_generate_draws_each_image_from_its_own_seed() -> None:
    mine = TreeRing(key(6))
    whole = list(generate(MODEL, ["a", "b", "c"], [3, 4, 5], scheme=mine, steps=2, guidance=1.0, batch=2))
    (alone,) = generate(MODEL, ["c"], [5], scheme=mine, steps=2, guidance=2.0, batch=1)
    assert torch.equal(whole[2].noise, alone.noise) and torch.allclose(whole[2].image, alone.image)
    assert [(d.prompt, d.seed) for d in whole] == [("a", 3), ("b", 4), ("c", 5)]
    recovered, planted = mine.features(whole[0].noise[None])
    assert torch.allclose(recovered[0], planted, atol=1e-4)

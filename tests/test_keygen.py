"""Keys of a ring are told apart, by the very test of the detector; a folder of keys is whole and private."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

import numpy as np
import pytest
import torch
from identity import MODEL, old_key
from scipy import stats

from ringmark.errors import KeyFileError, SchemeError
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.keys.folder import load_ring
from ringmark.watermark.keys.key import SECRET_BYTES, Key
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.fourier import Placement, recommend
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.statistics import ALPHA, cosine_bound, cosine_p
from ringmark.watermark.tasks import keygen
from ringmark.watermark.tasks.keygen import Ring, draw_keys, grow, keys_in, new_key

SHAPE, PLACE = (3, 32, 32), Placement((0, 2), (2, 8))


def maker(seed: int = 0, place: Placement = PLACE, pattern: str = "rand", model=MODEL) -> Callable[[], Key]:
    """Keys in a row, from one generator."""
    rng, parameters = np.random.default_rng(seed), {"channels": place.channels, "radii": place.radii}
    return lambda: new_key(model, "tree-ring", secret=rng.bytes(SECRET_BYTES), pattern=pattern, **parameters)


def mark(key: Key) -> torch.Tensor:
    """Noise that is this key's mark and nothing else."""
    scheme = TreeRing(key)
    return scheme.embed(torch.zeros(1, *scheme.latent_shape))


def statistic(key: Key, noise: torch.Tensor, model=MODEL) -> tuple[np.ndarray, np.ndarray]:
    """The detector's scores and p-values (B,) for this key alone."""
    scores, log10_p = Detector([key], null=Null.of_model(model)).statistic(key.fingerprint, noise)
    return scores, 10**log10_p


def template(key: Key) -> np.ndarray:
    scheme = TreeRing(key)
    return scheme.features(scheme.hermitian[None])[0].numpy()


def turned(key: Key, cosine: float, seed: int = 9) -> Key:
    """A key whose features have this cosine with those of `key`, of one channel: turned towards another."""
    scheme = TreeRing(key)
    other = TreeRing(maker(seed, scheme.placement)())
    a, b = template(key), template(maker(seed, scheme.placement)())
    rest = other.spectrum - (a @ b) / (a @ a) * scheme.spectrum
    rest *= scheme.spectrum.norm() / rest.norm()
    return old_key(key, cosine * scheme.spectrum + (1 - cosine**2) ** 0.5 * rest)


def admits(old: list[Key], key: Key, alpha: float = ALPHA) -> bool:
    return Ring(MODEL, old, alpha).admits(key)


def test_images_of_a_retired_key_are_found_by_the_ring_and_not_by_the_new_key():
    old, new = (maker(seed)() for seed in (1, 2))
    noise = initial_noise(list(range(20)), SHAPE)
    images = torch.cat([TreeRing(old).embed(noise[:10]), TreeRing(new).embed(noise[10:])])
    p = {key: statistic(key, images)[1] for key in (old, new)}
    assert 2 * p[old][:10].max() <= ALPHA and 2 * p[new][10:].max() <= ALPHA  # both tested, p corrected for two keys
    assert 2 * min(p[old][10:].min(), p[new][:10].min()) > ALPHA


def test_an_average_over_rotated_keys_shows_no_ring_and_hardly_any_key():
    """What m images share is learnt. Of m keys used once each, each has but 1/√m of the mean."""
    noise = initial_noise(list(range(64)), SHAPE)
    one, many = maker(1)(), [maker(seed)() for seed in range(2, 66)]
    alike = TreeRing(one).embed(noise).mean(0, keepdim=True)
    rotated = torch.cat([TreeRing(k).embed(noise[i : i + 1]) for i, k in enumerate(many)]).mean(0, keepdim=True)
    assert statistic(one, alike)[0][0] > 0.9
    cosines = [statistic(key, rotated)[0][0] for key in many]
    assert np.mean(cosines) == pytest.approx(1 / 8, abs=0.03) and max(cosines) < 0.35
    observe = TreeRing(one).on(Null.white(SHAPE)).observe
    assert np.square(observe(alike)).mean() > 30 * np.square(observe(rotated)).mean()


@pytest.mark.parametrize("radii", [(3, 4), (4, 6)])
def test_keys_that_nobody_could_find_are_not_made(radii):
    with pytest.raises(SchemeError) as caught:
        draw_keys(MODEL, [], 2, maker(place=Placement((0,), radii), pattern="ring"))
    assert caught.value.code == "scheme.unfindable"


def test_the_bound_is_tight_on_near_duplicates():
    key = maker(place=Placement((0,), (2, 8)))()
    bound = cosine_bound(TreeRing(key).free, ALPHA)
    for shift, admitted in ((-1e-4, True), (1e-4, False)):
        near = turned(key, bound + shift)
        assert (statistic(key, mark(near))[1][0] > ALPHA) is np.bool_(admitted)
        assert admits([key], near) is admitted
        assert admits([near], key) is admitted


def test_a_key_is_admitted_once_and_so_is_its_opposite():
    key = maker()()
    ring = Ring(MODEL, [])
    assert ring.admits(key) and not ring.admits(key)
    assert ring.admits(old_key(key, -TreeRing(key).spectrum))


def test_keys_of_other_placements_are_compared_where_they_overlap():
    wide = maker(1, Placement((0,), (3, 9)))()
    inner = maker(2, Placement((0,), (3, 8)))()
    copy = old_key(inner, TreeRing(wide).spectrum * TreeRing(inner).inside)  # the same mark, but for the outermost ring
    apart = maker(3, Placement((2,), (3, 9)))()
    assert not admits([wide], copy) and not admits([copy], wide)
    assert admits([wide], inner) and admits([wide, inner], apart)
    zeros = maker(4, pattern="zeros")()
    assert admits([zeros], wide)


def test_keys_of_one_kind_and_of_another_are_all_compared():
    """Whatever order they come in: a copy is refused in a ring of many kinds, and what is unlike all is admitted."""
    places = [Placement((0,), (2, 8)), Placement((0,), (3, 8)), Placement((1, 2), (2, 8))]
    keys = [maker(seed, place)() for seed, place in enumerate(places * 2)]
    ring = Ring(MODEL, keys[:4])
    assert ring.admits(keys[4]) and ring.admits(keys[5])
    assert not any(ring.admits(key) for key in keys)
    assert ring.admits(maker(99, places[1])())


@pytest.mark.slow
def test_1024_keys_by_the_default_placement_are_told_apart():
    model = LatentModel.from_pretrained("pocket")
    place = recommend(model.recovery, model.latent_shape)
    keys, _ = draw_keys(model, [], 1024, maker(5, place, model=model))
    null, first = Null.of_model(model), TreeRing(keys[0])
    tests = [TreeRing(key).on(null) for key in keys]
    features = np.concatenate([tests[0].observe(mark(key)) for key in keys])
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cosines = features @ features.T
    np.fill_diagonal(cosines, -1)
    assert len({k.fingerprint for k in keys}) == 1024 and cosines.max() < cosine_bound(first.free, ALPHA)
    _, p = statistic(keys[0], torch.cat([mark(key) for key in keys]), model)
    assert p[0] < 1e-300 and (p[1:] > ALPHA).all()


def test_random_keys_are_too_close_as_often_as_alpha_says():
    keys, alpha = [maker(6)()], 0.05
    make = maker(7)
    far = sum(admits(keys, make(), alpha) for _ in range(400))
    assert stats.binomtest(400 - far, 400, alpha).pvalue > 1e-3


@pytest.mark.parametrize(("place", "most"), [(Placement((0, 2), (3, 3)), 4), (Placement((0, 1, 2), (3, 3)), 8)])
def test_a_placement_with_too_few_free_numbers_says_so(place, most, monkeypatch):
    # One value a channel, of fixed power: signs are all that is free.
    monkeypatch.setattr(keygen, "TRIES", 100)
    monkeypatch.setattr(TreeRing, "check_findable", lambda self, alpha: None)  # so that a few keys are a crowd
    keys, _ = draw_keys(MODEL, [], most, maker(place=place, pattern="ring"))
    assert len(keys) == most
    with pytest.raises(SchemeError, match=rf"\b{len(place.channels)}\b.*\b{most}\b") as caught:
        draw_keys(MODEL, [], most + 1, maker(place=place, pattern="ring"))
    assert caught.value.code == "scheme.crowded"


def test_zeros_are_no_ring():
    with pytest.raises(SchemeError) as caught:
        draw_keys(MODEL, [], 1, maker(pattern="zeros"))
    assert (caught.value.code, caught.value.subject) == ("scheme.no-free-numbers", "zeros")


def test_a_ring_grows_and_is_read_back(tmp_path):
    folder = tmp_path / "deep" / "ring"
    assert keys_in(folder) == {}
    found = grow(MODEL, folder, 5, maker(), {})
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(os.listdir(folder)) == sorted(f"{k.fingerprint}.key" for k in found.new.values())
    more = grow(MODEL, folder, 3, maker(1), keys_in(folder))
    assert (more.kept, len(load_ring([folder]))) == (5, 8) and set(found.new) < set(load_ring([folder]))
    last = grow(MODEL, folder, 2, maker(2), keys_in(folder), force=True)
    assert set(load_ring([folder])) == set(last.new) and last.kept == 0


def test_new_keys_are_checked_against_the_old(tmp_path):
    found = grow(MODEL, tmp_path, 3, maker(), {})
    again = grow(MODEL, tmp_path, 2, maker(), keys_in(tmp_path))  # the same keys are drawn, and refused
    assert again.drawn_again >= 3 and not set(found.new) & set(again.new)


@pytest.mark.parametrize("force", [False, True])
def test_an_interrupted_ring_holds_whole_keys_and_says_how_many(tmp_path, monkeypatch, force):
    old, save = grow(MODEL, tmp_path, 2, maker(), {}).new, Key.save

    def stop(key, path, **options):
        if len(os.listdir(tmp_path)) == 5:
            raise KeyboardInterrupt
        save(key, path, **options)

    monkeypatch.setattr(Key, "save", stop)
    with pytest.raises(KeyboardInterrupt, match=r"^3 of 9 keys are written"):
        grow(MODEL, tmp_path, 9, maker(1), keys_in(tmp_path), force=force)
    assert len(load_ring([tmp_path])) == 5 and set(old) < set(load_ring([tmp_path]))


def test_what_is_no_folder_or_no_key_is_left_alone(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(KeyFileError) as caught:
        keys_in(tmp_path / "file")
    assert (caught.value.code, caught.value.subject) == ("key.not-a-folder", tmp_path / "file")
    (tmp_path / "server.key").write_text("-----BEGIN PRIVATE KEY-----")
    with pytest.raises(KeyFileError) as caught:
        keys_in(tmp_path)  # so that --force cannot remove it
    assert (caught.value.code, caught.value.subject) == ("key.damaged", tmp_path / "server.key")


def test_keys_of_another_kind_do_not_join_and_those_of_other_weights_do(tmp_path):
    grow(MODEL, tmp_path, 1, maker(), {})
    tuned = type("Tuned", (type(MODEL),), {"identity": MODEL.identity | {"fingerprint": "1"}})()
    assert grow(tuned, tmp_path, 1, maker(1, model=tuned), keys_in(tmp_path)).kept == 1
    other = type("Other", (type(MODEL),), {"kind": MODEL.kind | {"family": "other"}})()
    with pytest.raises(KeyFileError) as caught:
        grow(other, tmp_path, 1, maker(model=other), keys_in(tmp_path))
    assert caught.value.code == "key.latents"


def test_a_new_key_is_for_the_model_and_by_the_scheme_of_ones_choice():
    made = new_key(MODEL, "tree-ring", pattern="ring", channels=(1,), radii=(3, 6))
    described = {"scheme": "tree-ring", "pattern": "ring", "mask": "centred", "channels": [1], "radii": [3, 6]}
    assert described.items() <= made.metadata.items() and made.metadata["model"] == MODEL.identity
    assert (made.metadata["kind"], made.metadata["reference"]) == (MODEL.kind, list(MODEL.image_size))
    assert new_key(MODEL, "tree-ring").metadata["bands"][1]["channels"] == [0, 1, 2]  # nothing is known of this model
    for scheme, parameters, code in (
        ("unheard-of", {}, "scheme.unknown"),
        ("tree-ring", {"strength": 3}, "scheme.parameter"),
        ("tree-ring", {"budget": 1e-3}, "scheme.budget"),
    ):
        with pytest.raises(SchemeError) as caught:
            new_key(MODEL, scheme, **parameters)
        assert caught.value.code == code


def test_a_cosine_at_which_a_key_passes_is_that_of_the_detector():
    key = maker()()
    scores, p = statistic(key, initial_noise([1, 2, 3], SHAPE))
    assert p == pytest.approx(cosine_p(scores, TreeRing(key).free))

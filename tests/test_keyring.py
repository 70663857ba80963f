"""Keys of a ring are told apart, by the very test of the detector; a folder of keys is whole, private and says no value."""

from __future__ import annotations

import json
import os
import stat
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_detect import MODEL

from ringmark.data.images import Sample
from ringmark.errors import KeyFileError, SchemeError
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.detect.detector import ALPHA, Detector, Judged, Recovered
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.keys.key import Key, describe, export_public, listing, load_ring
from ringmark.watermark.schemes.tree_ring import Placement, TreeRing, make_key, recommend
from ringmark.watermark.statistics import cosine_test
from ringmark.watermark.tasks import keygen as keyring
from ringmark.watermark.tasks.keygen import Ring, begun, check_findable, cosine_bound, draw_keys, grow

SHAPE, PLACE = (3, 32, 32), Placement((0, 2), (2, 8))


def maker(seed: int = 0, place: Placement = PLACE, pattern: str = "rand", model=MODEL):
    rng = np.random.default_rng(seed)
    return partial(make_key, model.latent_shape, place, model=model.identity, pattern=pattern, rng=rng)


def turned(key: Key, cosine: float, seed: int = 9) -> Key:
    """A key whose features have this cosine with those of `key`, of one channel: a turn towards another, made orthogonal."""
    scheme = TreeRing(key)
    other = TreeRing(make_key(SHAPE, scheme.placement, model=MODEL.identity, rng=np.random.default_rng(seed)))
    a, b = (s.features(torch.zeros(1, *SHAPE))[1] for s in (scheme, other))
    rest = other.spectrum - (a @ b) / (a @ a) * scheme.spectrum
    rest *= scheme.spectrum.norm() / rest.norm()
    values = cosine * scheme.spectrum + (1 - cosine**2) ** 0.5 * rest
    return Key(torch.view_as_real(values).float().numpy(), key.metadata)


@pytest.mark.parametrize("d", [2, 3, 10, 300, 5000])
@pytest.mark.parametrize("alpha", [0.05, ALPHA, 1e-4])
def test_at_the_bound_the_detectors_p_is_alpha(d, alpha):
    c = cosine_bound(d, alpha)
    key, across = np.eye(d)[0], np.eye(d)[1]
    score, p = cosine_test([c * key + (1 - c**2) ** 0.5 * across], key)
    assert 0 < c < 1 and score[0] == pytest.approx(c) and p[0] == pytest.approx(alpha, rel=1e-3)


@pytest.mark.parametrize("pattern, place", [("ring", Placement((0,), (5, 5))), ("ring", Placement((0,), (5, 7)))])
def test_a_key_that_no_picture_could_give_back_is_refused(pattern, place):
    with pytest.raises(SchemeError, match=r"free number.*widen --radii or --channels"):
        check_findable(maker(0, place, pattern)())
    for fine in (maker(0, place, "zeros")(), maker(0, Placement((0, 2), (5, 7)), "ring")(), maker(0, place, "rand")()):
        check_findable(fine)


def test_images_of_a_retired_key_are_found_by_the_ring_and_not_by_the_new_key():
    old, new = (maker(seed)() for seed in (1, 2))
    noise = initial_noise(list(range(20)), SHAPE)
    first, later = (TreeRing(key).embed(some) for key, some in ((old, noise[:10]), (new, noise[10:])))
    ring = {key: Detector(MODEL, [key], steps=1) for key in (old, new)}
    p = {key: ring[key].statistic(TreeRing(key), torch.cat([first, later]))[1] for key in ring}
    assert 2 * p[old][:10].max() <= ALPHA and 2 * p[new][10:].max() <= ALPHA  # both tested, p corrected for two keys
    assert 2 * min(p[old][10:].min(), p[new][:10].min()) > ALPHA


def test_an_average_over_rotated_keys_shows_no_ring_and_hardly_any_key():
    """What m images share is learnt. Of m keys used once each, each has but 1/√m of the mean."""
    noise = initial_noise(list(range(64)), SHAPE)
    one, many = maker(1)(), [maker(seed)() for seed in range(2, 66)]
    alike = TreeRing(one).embed(noise).mean(0, keepdim=True)
    rotated = torch.cat([TreeRing(k).embed(noise[i : i + 1]) for i, k in enumerate(many)]).mean(0, keepdim=True)
    detector = Detector(MODEL, [], steps=1)
    assert detector.statistic(TreeRing(one), alike)[0][0] > 0.9
    cosines = [detector.statistic(TreeRing(key), rotated)[0][0] for key in many]
    assert np.mean(cosines) == pytest.approx(1 / 8, abs=0.03) and max(cosines) < 0.35
    power = lambda mean: TreeRing(one).features(mean)[0].square().mean()
    assert power(alike) > 30 * power(rotated)


def test_one_free_number_tells_nothing_apart():
    with pytest.raises(SchemeError, match="free number"):
        cosine_bound(1, ALPHA)
    with pytest.raises(SchemeError, match="free number"):
        draw_keys(MODEL, [], 2, maker(place=Placement((0,), (3, 3)), pattern="ring"))


def test_the_bound_is_tight_on_near_duplicates():
    key = maker(place=Placement((0,), (2, 8)))()
    bound = cosine_bound(len(TreeRing(key).feature_rings()[0]), ALPHA)
    detector = Detector(MODEL, [key], steps=1)
    for shift, admitted in ((-1e-4, True), (1e-4, False)):
        near = turned(key, bound + shift)
        _, p = detector.statistic(TreeRing(key), TreeRing(near).embed(torch.zeros(1, *SHAPE)))
        assert (p[0] > ALPHA) is np.bool_(admitted)
        assert Ring(MODEL, [key], near).admits(near) is admitted
        assert Ring(MODEL, [near], key).admits(key) is admitted


def test_a_key_is_admitted_once_and_so_is_its_opposite():
    key = maker()()
    ring = Ring(MODEL, [], key)
    assert ring.admits(key) and not ring.admits(key)
    assert ring.admits(Key(-key.values, key.metadata))


def test_keys_of_other_placements_are_compared_where_they_overlap():
    wide = maker(1, Placement((0,), (3, 9)))()
    inner = make_key(SHAPE, Placement((0,), (3, 8)), model=MODEL.identity, rng=np.random.default_rng(2))
    values = np.where(TreeRing(inner).inside[..., None].numpy(), wide.values, 0)
    copy = Key(values.astype(np.float32), inner.metadata)  # the same mark, but for the outermost ring
    apart = maker(3, Placement((2,), (3, 9)))()
    assert not Ring(MODEL, [wide], copy).admits(copy) and not Ring(MODEL, [copy], wide).admits(wide)
    assert Ring(MODEL, [wide], inner).admits(inner) and Ring(MODEL, [wide, inner], apart).admits(apart)
    zeros = maker(4, pattern="zeros")()
    assert Ring(MODEL, [zeros], wide).admits(wide)


def test_1024_keys_by_the_default_placement_are_told_apart():
    model = LatentModel.from_pretrained("pocket")
    keys, _ = draw_keys(model, [], 1024, maker(5, recommend(model.recovery, model.latent_shape), model=model))
    schemes = [TreeRing(key) for key in keys]
    variance = model.recovery.null[schemes[0].feature_rings()].numpy()
    features = np.stack([s.features(torch.zeros(1, *model.latent_shape))[1].numpy() for s in schemes]) / variance**0.5
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cosines = features @ features.T
    np.fill_diagonal(cosines, -1)
    assert len({k.fingerprint for k in keys}) == 1024 and cosines.max() < cosine_bound(len(variance), ALPHA)
    _, p = Detector(model, [], steps=1).statistic(
        schemes[0], torch.cat([s.embed(torch.zeros(1, *model.latent_shape)) for s in schemes])
    )
    assert p[0] == 0 and (p[1:] > ALPHA).all()


def test_random_keys_are_too_close_as_often_as_alpha_says():
    keys, alpha = [maker(6)() for _ in range(1)], 0.05
    make = maker(7)
    far = sum(Ring(MODEL, keys, keys[0], alpha).admits(make()) for _ in range(400))
    assert stats.binomtest(400 - far, 400, alpha).pvalue > 1e-3


@pytest.mark.parametrize(("place", "most"), [(Placement((0, 2), (3, 3)), 4), (Placement((0, 1, 2), (3, 3)), 8)])
def test_a_placement_with_too_few_free_numbers_says_so(place, most, monkeypatch):
    # One value a channel, of fixed power: signs are all that is free.
    monkeypatch.setattr(keyring, "TRIES", 100)
    keys, _ = draw_keys(MODEL, [], most, maker(place=place, pattern="ring"))
    assert len(keys) == most
    with pytest.raises(SchemeError, match=f"{len(place.channels)} free numbers .* {most} were found; ask for fewer"):
        draw_keys(MODEL, [], most + 1, maker(place=place, pattern="ring"))


def test_zeros_are_no_ring():
    with pytest.raises(SchemeError, match="zeros"):
        draw_keys(MODEL, [], 1, maker(pattern="zeros"))


def judged(keys: list[Key], noise: torch.Tensor) -> Judged:
    """As if these noises (1, C, h, w) had come back from an image."""
    detector, sample = Detector(MODEL, keys, steps=1), Sample("a", None)
    images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    recovered = Recovered(images, detector.inverter(MODEL, images), noise, 0.0)
    return Judged(sample, detector.judge([sample], recovered)[0], noise[0])


def test_the_sentence_names_the_keys_that_fit():
    first, second = maker(1, Placement((0,), (2, 8)))(), maker(2, Placement((1,), (2, 8)))()
    others = draw_keys(MODEL, [first, second], 6, maker(3))[0]
    noise = initial_noise([5], SHAPE)
    one, both = TreeRing(first).embed(noise), TreeRing(second).embed(TreeRing(first).embed(noise))
    ring = [*others, first, second]
    assert judged(ring, one).sentence().startswith(f"carries key {first.fingerprint[:8]}, p = ")
    said = judged(ring, both)
    assert {v.key for v in said.present} == {first.fingerprint, second.fingerprint}
    assert said.sentence().startswith("carries 2 keys: ")
    assert all(k.fingerprint[:8] in said.sentence() for k in (first, second))
    assert judged(ring, noise).sentence().startswith("carries none of 8 keys, nearest ")
    assert judged([first], noise).sentence().startswith(f"does not carry key {first.fingerprint[:8]}, p = ")
    p = {n: judged(ring[-n:], one).best.p_value for n in (1, 2, 4)}
    assert p[4] == pytest.approx(2 * p[2])  # corrected for the number of keys


def test_a_ring_grows_and_is_read_back(tmp_path):
    folder = tmp_path / "deep" / "ring"
    assert begun(folder) == {}
    found = grow(MODEL, folder, 5, maker(), {})
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(os.listdir(folder)) == sorted(f"{k.fingerprint}.key" for k in found.new.values())
    more = grow(MODEL, folder, 3, maker(1), begun(folder))
    assert (more.kept, len(load_ring([folder]))) == (5, 8) and set(found.new) < set(load_ring([folder]))
    last = grow(MODEL, folder, 2, maker(2), begun(folder), force=True)
    assert set(load_ring([folder])) == set(last.new) and last.kept == 0


def test_new_keys_are_checked_against_the_old(tmp_path):
    found = grow(MODEL, tmp_path, 3, maker(), {})
    again = grow(MODEL, tmp_path, 2, maker(), begun(tmp_path))  # the same keys are drawn, and refused
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
        grow(MODEL, tmp_path, 9, maker(1), begun(tmp_path), force=force)
    assert len(load_ring([tmp_path])) == 5 and set(old) < set(load_ring([tmp_path]))


def test_what_is_no_folder_or_no_key_is_left_alone(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(KeyFileError, match="is not a folder"):
        begun(tmp_path / "file")
    (tmp_path / "server.key").write_text("-----BEGIN PRIVATE KEY-----")
    with pytest.raises(KeyFileError, match=r"server\.key: not a ringmark key"):
        begun(tmp_path)  # so that --force cannot remove it


def test_another_models_keys_do_not_join(tmp_path):
    grow(MODEL, tmp_path, 1, maker(), {})
    other = type("Other", (type(MODEL),), {"identity": MODEL.identity | {"fingerprint": "1"}})()
    with pytest.raises(KeyFileError, match="made for model"):
        grow(other, tmp_path, 1, maker(model=other), begun(tmp_path))


@pytest.fixture
def ring(tmp_path):
    grow(MODEL, tmp_path / "ring", 3, maker(), {})
    return tmp_path / "ring"


def test_folders_and_files_make_one_ring(ring, tmp_path):
    first, *_ = files = sorted(ring.iterdir())
    (ring / "notes.txt").touch()
    (ring / "._mac.key").touch()
    (ring / "below").mkdir()
    copy = tmp_path / "copy.key"
    Key.load(first).save(copy)
    assert list(load_ring([ring])) == files
    assert list(load_ring([copy, ring, first, ring])) == [copy, *files[1:]]
    assert list(load_ring([ring, copy])) == files


def test_two_files_with_one_key_are_named(ring):
    first = min(ring.iterdir())
    Key.load(first).save(ring / "a copy.key")
    with pytest.raises(KeyFileError) as caught:
        load_ring([ring])
    assert str(first) in str(caught.value) and "a copy.key" in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_folder_is_no_ring(tmp_path):
    with pytest.raises(KeyFileError, match=r"no .*key file in this folder; .* keygen -n"):
        load_ring([tmp_path])
    (tmp_path / "x.key").mkdir()
    with pytest.raises(KeyFileError, match="is a folder"):
        load_ring([tmp_path])


@pytest.mark.skipif(os.name != "posix", reason="files have no modes")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o602, 0o666])
def test_a_key_that_others_may_read_is_refused_unless_told(ring, mode, monkeypatch):
    path = min(ring.iterdir())
    path.chmod(mode)
    for act in (lambda: Key.load(path), lambda: load_ring([ring])):
        with pytest.raises(KeyFileError, match="chmod 600") as caught:
            act()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setenv("RINGMARK_READABLE_KEYS", "1")
    assert len(load_ring([ring])) == 3
    monkeypatch.setenv("RINGMARK_READABLE_KEYS", "")
    path.chmod(0o400)
    assert len(load_ring([ring])) == 3


def test_nothing_that_is_told_shows_a_value(ring, tmp_path):
    keys = load_ring([ring])
    key = next(iter(keys.values()))
    record = export_public(key, tmp_path / "public.json")
    assert json.loads((tmp_path / "public.json").read_text()) == record
    told = json.dumps([record, describe(key)]) + listing(keys)
    digits = {f"{abs(x):.4f}"[:-1] for x in key.values.flat if abs(x) > 0.01}
    assert digits and not [d for d in digits if d in told]
    assert record["commitment"].startswith(key.fingerprint) and len(record["commitment"]) == 64
    assert set(record) == {"ringmark", "fingerprint", "scheme", "pattern", "mask", "channels", "radii", "latent_shape", "model", "created", "commitment", "proves", "commitment_of"}  # fmt: skip


def test_a_commitment_binds_values_and_description_but_not_the_date():
    key = maker()()
    values = key.values.copy()
    values.flat[np.flatnonzero(values)[0]] *= 1 + 1e-6
    assert Key(values, key.metadata).commitment != key.commitment
    assert Key(key.values, key.metadata | {"radii": [2, 7]}).commitment != key.commitment
    assert Key(key.values, key.metadata | {"created": "1999"}).commitment == key.commitment


def test_a_listing_is_a_line_a_key_whatever_is_in_it(ring):
    keys = load_ring([ring])
    odd = Key(np.ones((1, 1), np.float32), next(iter(keys.values())).metadata | {"model": {"name": "a\nb\x1b[2J"}})
    lines = listing(keys | {ring / "odd.key": odd}).split("\n")
    assert len(lines) == 5 and r"a\nb\x1b[2J" in lines[-1] and lines[0].startswith("fingerprint")


@pytest.mark.parametrize(
    ("claim", "body"),
    [
        ({"shape": [2, 2, 1, 1, 1, 1, 1, 1, 1]}, 16),
        ({"shape": [2, 3]}, 16),
        ({"shape": []}, 4),
        ({"shape": [0], "data_offsets": [0, 0]}, 0),
        ({"shape": [True, 4]}, 16),
        ({"shape": "22"}, 16),
        ({"data_offsets": [4, 16]}, 16),
        ({"shape": [2**62, 4]}, 16),
    ],
)
def test_what_a_header_claims_is_checked_before_it_is_believed(tmp_path, monkeypatch, claim, body):
    import safetensors

    monkeypatch.setattr(safetensors, "safe_open", lambda *_: pytest.fail("believed"))
    header = json.dumps({"values": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, body]} | claim}).encode()
    (tmp_path / "x.key").write_bytes(len(header).to_bytes(8, "little") + header + bytes(body))
    with pytest.raises(KeyFileError, match="not a ringmark key"):
        Key.load(tmp_path / "x.key")


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_file_is_refused_or_still_the_same_key(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    path = folder / "x.key"
    key = maker(place=Placement((0,), (2, 3)))()
    key.save(path, overwrite=True)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, 700) | st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(content)
    try:
        assert Key.load(path).fingerprint == key.fingerprint
    except KeyFileError as error:
        assert "\n" not in str(error)

"""A second scheme is one class and one `register`: it goes through keys, tasks and the command line as it is."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from identity import MODEL, of_shape, samples, secret, verifier
from scipy import stats
from torch import Tensor
from torch.nn import functional

from ringmark.errors import CalibrationError, SchemeError
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.cli.main import main
from ringmark.watermark.detect.detector import Detector
from ringmark.watermark.detect.search import Search
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.evaluation.gain import compared_columns
from ringmark.watermark.keys.expansion import normal
from ringmark.watermark.keys.folder import describe, export_public, load_folder
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Array, Null
from ringmark.watermark.schemes.base import (
    REGISTRY,
    Panel,
    Parameter,
    PublishedStatistic,
    SchemeEntry,
    make_key,
    parameters_text,
    recommended,
    register,
    scheme_of,
)
from ringmark.watermark.tasks.evaluate import scores_of
from ringmark.watermark.tasks.keygen import Ring, draw_keys, grow, keys_in, new_key
from ringmark.watermark.tasks.keys import listing

AGREEMENT = PublishedStatistic(name="sign_agreement", label="sign agreement", larger_if_marked=True)
FAINTEST = 1e-3  # magnitude that carries a sign where the noise itself is nothing


class SignTest:
    """Correlation of block sums S with signs s: z = Σ s S / ‖S‖, standard normal over random keys."""

    def __init__(self, scheme: Sign, null: Null) -> None:
        self.scheme, self.null = scheme, null

    def observe(self, noise: Tensor) -> Array:
        """Block sums (B, blocks)."""
        self.scheme.check_shape(noise)
        pooled = functional.avg_pool2d(noise.double().cpu() - self.null.mean, self.scheme.block)
        return pooled.flatten(1).numpy()

    def score(self, observed: Array) -> Array:
        """z (B,); 0 for a vector of zeros."""
        length = np.linalg.norm(observed, axis=1)
        signs = self.scheme.signs.flatten().double().numpy()
        return np.divide(observed @ signs, length, out=np.zeros(len(observed)), where=length > 0)

    def log10_p(self, scores: Array, references: Array | None = None) -> Array:
        return np.asarray(stats.norm.logsf(scores) / math.log(10))

    template = None

    def density(self, scores: Array) -> Array:
        return np.asarray(stats.norm.pdf(scores))


class Sign:
    """The key is ±1 on square blocks of the latent; marked noise has that sign there."""

    label, score_name, waves = "sign", "block correlation", None

    def __init__(self, key: Key, latent_shape: tuple[int, int, int]) -> None:
        channels, height, width = self.latent_shape = latent_shape
        self.block = key.metadata.get("block")
        if type(self.block) is not int or self.block < 1 or height % self.block or width % self.block:
            raise SchemeError("scheme.block", f"{self.block} does not divide the latent", subject=f"key {key}")
        shape = (channels, height // self.block, width // self.block)
        self.signs = torch.from_numpy(np.sign(normal(key.secret, f"sign {shape}", math.prod(shape))).reshape(shape))

    @classmethod
    def fields(cls, latent_shape, *, recovery=None, block: int = 4) -> dict[str, Any]:
        return {"block": block}

    @staticmethod
    def recommend(recovery, latent_shape) -> dict[str, int]:
        return {"block": min(latent_shape[1:]) // 4}

    @property
    def kind(self) -> tuple[str, int]:
        return ("sign", self.block)

    @property
    def free(self) -> int:
        return self.signs.numel()

    def check_shape(self, noise: Tensor) -> None:
        if tuple(noise.shape[1:]) != self.latent_shape:
            raise SchemeError("scheme.noise", "does not fit the key", subject=f"noise {tuple(noise.shape)}")

    def embed(self, noise: Tensor) -> Tensor:
        self.check_shape(noise)
        wide = self.signs.repeat_interleave(self.block, -2).repeat_interleave(self.block, -1)
        return noise.abs().clamp_min(FAINTEST) * wide.to(noise)

    def check_findable(self, alpha: float) -> None:
        if stats.norm.sf(math.sqrt(self.free)) > alpha:
            raise SchemeError("scheme.unfindable", f"{self.free} signs are too few", subject=self.label)

    def on(self, null: Null) -> SignTest:
        return SignTest(self, null)

    def published(self, noise: Tensor) -> dict[str, Array]:
        observed = self.on(Null.white(self.latent_shape)).observe(noise)
        return {AGREEMENT.name: np.mean(np.sign(observed) == self.signs.flatten().numpy(), axis=1)}

    def panels(self, noise: Tensor) -> list[Panel]:
        return []

    def key_panels(self) -> list[Panel]:
        return []


@pytest.fixture(autouse=True, scope="module")
def registered():
    """The scheme is known while this file's tests run, and to nobody after."""
    block = Parameter(name="block", help="Side of a block, in latent pixels.", parse=int, default=4)
    register(SchemeEntry(name="sign", home=Sign, parameters=(block,), published=(AGREEMENT,)))
    yield
    del REGISTRY["sign"]


def key(seed: int, **parameters: Any) -> Key:
    """A key for the model whose every map is the identity."""
    return new_key(MODEL, "sign", secret=secret(seed), **parameters)


# --- in the library


def test_its_name_is_taken_and_its_parameters_are_its_own():
    with pytest.raises(SchemeError) as caught:
        register(SchemeEntry(name="sign", home=Sign))
    assert caught.value.code == "scheme.registered"
    with pytest.raises(SchemeError) as caught:
        register(SchemeEntry(name="other", home=Sign, published=(replace(AGREEMENT, larger_if_marked=False),)))
    assert caught.value.code == "scheme.registered" and "other" not in REGISTRY
    assert key(1).metadata["block"] == 4 and key(1, block=8).metadata["block"] == 8
    with pytest.raises(SchemeError) as caught:
        key(1, radii=(2, 8))
    assert caught.value.code == "scheme.parameter"


@pytest.mark.parametrize(
    "name, text", [("sign", "block 8"), ("tree-ring", "bands 2-3 in channels 0-2; 4-5 in channels 0-2")]
)
def test_a_scheme_recommends_parameters_of_new_keys(name, text):
    best = recommended(name, None, (3, 32, 32))
    assert parameters_text(name, best) == text
    made = new_key(MODEL, name, **best)
    assert best.items() <= made.metadata.items()


def test_p_values_of_unmarked_noise_are_uniform_and_marked_noise_is_found():
    noise = initial_noise(list(range(800)), MODEL.latent_shape)
    scheme = scheme_of(key(3))
    test = scheme.on(Null.white(MODEL.latent_shape))
    assert stats.kstest(10 ** test.log10_p(test.score(test.observe(noise))), "uniform").pvalue > 0.01
    assert (test.log10_p(test.score(test.observe(scheme.embed(noise[:20])))) < -20).all()


def test_pictures_are_judged_beside_those_of_another_scheme():
    mine, other = key(1), new_key(MODEL, "tree-ring", secret=secret(2))
    noise = initial_noise([5, 6, 7], MODEL.latent_shape)
    noise[0:1], noise[1:2] = scheme_of(mine).embed(noise[0:1]), scheme_of(other).embed(noise[1:2])
    judged = list(verifier([mine, other]).scan([s] for s in samples(noise)))
    assert [[v.present for v in j.verdicts] for j in judged] == [[True, False], [False, True], [False, False]]
    assert judged[0].best.statistics == {AGREEMENT.name: 1.0} and set(judged[1].best.statistics) == {
        "published_distance",
        "published_p",
    }
    assert judged[0].best.record()["score"] > 5 and judged[0].sentence().startswith(
        f"carries key {mine.fingerprint[:8]}"
    )


def test_rings_of_its_keys_are_told_apart(tmp_path):
    drawn = grow(MODEL, tmp_path, 6, lambda: new_key(MODEL, "sign"), {})
    assert len(keys_in(tmp_path)) == 6
    mine, *_ = keys = list(drawn.new.values())
    ring = Ring(MODEL, keys)
    assert not any(ring.admits(k) for k in keys) and ring.admits(key(1))
    rings_of_others = new_key(MODEL, "tree-ring")
    assert ring.admits(rings_of_others) and not ring.admits(rings_of_others)
    with pytest.raises(SchemeError) as caught:
        draw_keys(MODEL, [], 2, lambda: make_key("sign", **of_shape((1, 2, 2)), block=2))
    assert caught.value.code == "scheme.unfindable"
    assert mine.fingerprint in " ".join(listing(drawn.new))


def test_what_it_cannot_do_is_refused():
    with pytest.raises(SchemeError) as caught:
        verifier([key(1)], search=Search())
    assert caught.value.code == "scheme.no-search"
    noise = initial_noise(list(range(20)), MODEL.latent_shape)
    made = Calibration.measure(noise, {"model": MODEL.identity}, {"drawn": 20})
    with pytest.raises(CalibrationError) as caught:  # block sums look at every ring
        Detector([key(1)], null=Null.white(MODEL.latent_shape), calibration=made)
    assert caught.value.code == "calibration.reach"


def test_a_calibration_that_holds_every_ring_checks_its_p_values():
    noise = initial_noise(list(range(300)), MODEL.latent_shape)
    made = Calibration.measure(noise[:200], {"model": MODEL.identity}, {"drawn": 200}, reach=40)
    detector = Detector([key(1)], null=Null.white(MODEL.latent_shape), calibration=made)
    references = detector.reference_scores(key(1).fingerprint)
    assert references.shape == (200,) and stats.kstest(references, "norm").pvalue > 0.01
    assert stats.ks_2samp(references, detector.statistic(key(1).fingerprint, noise[200:])[0]).pvalue > 0.01


# --- key files


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_a_key_comes_back_from_its_file(tmp_path_factory, channels, rows, columns, block, seed):
    path = tmp_path_factory.getbasetemp() / "sign" / "my.key"
    shape, rng = (channels, rows * block, columns * block), np.random.default_rng(seed)
    made = make_key("sign", **of_shape(shape), secret=rng.bytes(32), block=block)
    made.save(path, overwrite=True)
    back, noise = Key.load(path), torch.from_numpy(rng.normal(size=(2, *shape)))
    assert back.metadata == made.metadata and back.secret == made.secret
    assert (back.fingerprint, back.commitment) == (made.fingerprint, made.commitment)
    assert torch.equal(scheme_of(back).embed(noise), scheme_of(made).embed(noise))
    assert (
        scheme_of(back).free == channels * rows * columns and load_folder(path.parent)[path].metadata == made.metadata
    )
    assert describe(back)["block"] == block and "secret" not in describe(back)


@pytest.mark.parametrize("change", [{"block": 5}, {"block": "4"}, {"block": 64}])
def test_a_key_whose_description_does_not_fit_it_is_refused_by_the_scheme(tmp_path, change):
    Key(key(1).metadata | change, secret(1)).save(tmp_path / "my.key")
    with pytest.raises(SchemeError) as caught:
        scheme_of(Key.load(tmp_path / "my.key"))
    assert "\n" not in str(caught.value)


def test_once_forgotten_its_keys_are_listed_but_not_used(tmp_path):
    made, entry = key(1), REGISTRY["sign"]
    made.save(tmp_path / "my.key")
    del REGISTRY["sign"]
    try:
        loaded = load_folder(tmp_path)
        assert "sign" in " ".join(listing(loaded)) and export_public(made, tmp_path / "public.json")["block"] == 4
        with pytest.raises(SchemeError) as caught:
            scheme_of(made)
        assert caught.value.code == "scheme.unknown"
    finally:
        register(entry)


# --- by the command line, on the pocket model

QUICK = ["--steps", "4", "--max-steps", "1"]


def run(*args: object, code: int = 0) -> str:
    """Standard output of a command."""
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, (args, result.output, result.stderr, result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def house(tmp_path_factory, registered) -> Path:
    """A key of the scheme, two images with its mark and two without."""
    house = tmp_path_factory.mktemp("sign")
    run("keygen", "--scheme", "sign", "--block", 8, "-o", house / "my.key")
    run("generate", "--key", house / "my.key", "-n", 2, "-o", house / "images/marked", "--steps", 4)
    run("generate", "--no-mark", "-n", 2, "--seed", 2, "-o", house / "images/unmarked", "--steps", 4)
    return house


def pictures(house: Path, kind: str) -> list[Path]:
    return sorted((house / "images" / kind).glob("*.png"))


def test_keygen_makes_its_keys_and_keys_list_shows_them(house, tmp_path):
    made = Key.load(house / "my.key")
    assert (made.metadata["scheme"], made.metadata["block"]) == ("sign", 8)
    run("keygen", "--scheme", "sign", "-n", 3, "-o", tmp_path / "ring")
    run("keygen", "-o", tmp_path / "other.key")
    header, *lines = run("keys", "list", tmp_path / "ring", house / "my.key", tmp_path / "other.key").splitlines()
    assert "block" in header.split() and "pattern" in header.split() and len(lines) == 5
    assert sum(" sign " in line for line in lines) == 4 and sum(" tree-ring " in line for line in lines) == 1
    listed = json.loads(run("keys", "list", tmp_path / "ring", "--json"))
    assert [entry["block"] for entry in listed] == [4] * 3
    assert made.commitment in run("keys", "show", house / "my.key", "--json")
    run("keys", "export-public", house / "my.key", "-o", tmp_path / "public.json")
    assert json.loads((tmp_path / "public.json").read_text())["scheme"] == "sign"
    run("keys", "show", house / "my.key", "--plot", tmp_path / "key.png", code=2)  # it cannot be drawn


def test_verify_and_audit_find_its_mark(house, tmp_path):
    marked, unmarked = pictures(house, "marked"), pictures(house, "unmarked")
    assert run("verify", *marked, "--key", house / "my.key", *QUICK).count(": carries key ") == 2
    assert run("verify", *unmarked, "--key", house / "my.key", *QUICK, code=1).count(": does not carry key ") == 2
    run("audit", house / "images", "--key", house / "my.key", "-o", tmp_path / "results.jsonl", *QUICK)
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()[1:]]
    present = {record["sample_id"]: record["present"] for record in records if "present" in record}
    assert sorted(present.values()) == [False, False, True, True]
    assert all(present[f"marked/{path.name}"] for path in marked)


def test_a_verdict_is_explained_without_panels(house, tmp_path):
    (picture, *_) = pictures(house, "marked")
    run("verify", picture, "--key", house / "my.key", *QUICK, "--explain", tmp_path / "why.png")
    assert (tmp_path / "why.png").stat().st_size > 1000


def test_roc_of_an_audit(house, tmp_path):
    run("audit", house / "images", "--key", house / "my.key", "-o", tmp_path / "results.jsonl", *QUICK)
    labels = [x for kind in ("marked", "unmarked") for x in ("--labels", house / "images" / kind / "labels.csv")]
    p, agreement = json.loads(run("roc", tmp_path / "results.jsonl", *labels, "--json"))
    assert (p["name"], agreement["name"]) == ("log10_p", AGREEMENT.name)
    assert p["auc"] == agreement["auc"] == 1.0 and agreement["larger_if_marked"] and not p["larger_if_marked"]


def test_its_own_published_statistic_is_among_those_of_an_evaluation():
    noise = initial_noise(list(range(6)), MODEL.latent_shape)
    detector = Detector([key(1)], null=Null.white(MODEL.latent_shape))
    scores, _ = scores_of(detector, key(1).fingerprint, torch.cat([scheme_of(key(1)).embed(noise[:3]), noise[3:]]))
    assert list(scores) == [Sign.score_name, AGREEMENT.label]
    assert scores[AGREEMENT.label][:3].tolist() == [1.0] * 3 and (scores[AGREEMENT.label][3:] < 0.8).all()
    assert compared_columns() == {"score": 1, "published_distance": -1, AGREEMENT.name: 1}


@pytest.mark.slow
@pytest.mark.parametrize("published", [(AGREEMENT,), ()])
def test_evaluate_measures_it_beside_another_scheme(house, tmp_path, monkeypatch, published):
    monkeypatch.setitem(REGISTRY, "sign", replace(REGISTRY["sign"], published=published))
    if not published:
        monkeypatch.setattr(Sign, "published", lambda self, noise: {})
    run("keygen", "-o", tmp_path / "other.key")
    keys = ["--key", house / "my.key", "--key", tmp_path / "other.key"]
    args = [*keys, "-n", 2, "--methods", "encoder", "--steps", 4, "-o", tmp_path / "evaluation"]
    found = json.loads(run("evaluate", *args, "--json"))
    labels = {statistic.label for statistic in published}
    of_sign = [row for row in found["rows"] if row["scheme"] == Sign.label]
    assert {row["statistic"] for row in of_sign} == {Sign.score_name} | labels
    assert all(row["auc"] == 1.0 for row in of_sign) and {row["attack"] for row in of_sign} == {"clean"}
    with (tmp_path / "evaluation/scores.csv").open(newline="") as file:
        images = list(csv.DictReader(file))
    assert len(images) == 8 and (AGREEMENT.name in images[0]) == bool(published)
    assert [bool(row["published_distance"]) for row in images] == [False] * 4 + [True] * 4
    ways = {(gain["of"][0], gain["of"][2]) for gain in found["gains"]} | {tuple(g["over"][::2]) for g in found["gains"]}
    assert {column for _, column in ways} == {"score", "published_distance"} | {s.name for s in published}
    assert (f"AUC, {AGREEMENT.label}" in run("evaluate", *args)) == bool(published)

"""Evaluations: what the tables say is what the scores say, and nothing is computed twice."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from ringmark.data.results import Results
from ringmark.errors import AttackError, CalibrationError, EvaluationError, ImageError, RingmarkError, StoreError
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.detector import Detector, detector
from ringmark.watermark.evaluation import cells
from ringmark.watermark.evaluation.cells import CLEAN, DISTANCE, Cell, Evaluation
from ringmark.watermark.evaluation.rates import roc, tpr_at
from ringmark.watermark.evaluation.report import pivot, summary, write_plots
from ringmark.watermark.schemes.tree_ring import Placement, TreeRing, make_key
from ringmark.watermark.tasks import evaluate as comparison
from ringmark.watermark.tasks.evaluate import Comparison, compare, own_statistic, scores_of


@pytest.fixture(scope="module")
def model(tiny_parts):
    return LatentModel(**tiny_parts, name="tiny", recovery=None)


@pytest.fixture(scope="module")
def keys(model, tmp_path_factory):
    """Files with a rand, a ring and a zeros key."""
    folder, place = tmp_path_factory.mktemp("keys"), Placement((0, 1), (1, 3))
    paths = {}
    for i, pattern in enumerate(("rand", "ring", "zeros")):
        rng = np.random.default_rng(i)
        key = make_key(model.latent_shape, place, model=model.identity, pattern=pattern, rng=rng)
        key.save(folder / f"{pattern}.key")
        paths[pattern] = folder / f"{pattern}.key"
    return paths


@pytest.fixture(scope="module")
def plan(keys, tmp_path_factory):
    return Comparison(
        output=tmp_path_factory.mktemp("evaluation"),
        keys=(keys["rand"], keys["zeros"]),
        marked=None,
        unmarked=None,
        number=5,
        attacks=("blur:1", "blur:3"),
        methods=("encoder", "forward"),
        seed=0,
        guidance=1.0,
        max_steps=1,
        steps=2,
        batch=3,
    )


@pytest.fixture(scope="module", autouse=True)
def quick():
    """A classifier of prompts that has hardly learnt anything, few draws of the bootstrap, no plots."""
    with pytest.MonkeyPatch.context() as patch:
        train, bootstrap = comparison.train_classifiers, cells.bootstrap_interval
        patch.setattr(comparison, "train_classifiers", lambda *_: train(20, 5, comparison.SCENE_SIZE))
        patch.setattr(cells, "bootstrap_interval", partial(bootstrap, draws=50))
        patch.setattr(comparison, "frechet_test", partial(comparison.frechet_test, draws=20))
        patch.setattr(comparison, "write_plots", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def found(model, plan, quick) -> Evaluation:
    return compare(model, plan)


def rows_of(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_says_what_the_scores_say(found, plan):
    columns = {"whitened cosine": "score", "power ratio": "score", "matched filter": "matched_filter"}
    columns |= {DISTANCE: "published_distance", "published p": "published_p"}
    table, scores = rows_of(plan.output / "evaluation.csv"), rows_of(plan.output / "scores.csv")
    assert len(scores) == 2 * 5 * 2 * 3 * 2 and len(table) == (4 + 3) * 3 * 2
    assert {row["statistic"] for row in table} == set(columns)
    for row in table:
        sign = -1 if columns[row["statistic"]] in ("published_distance", "published_p") else 1
        some = [s for s in scores if all(s[n] == row[n] for n in ("key", "attack", "method"))]
        marked, unmarked = (
            np.array([sign * float(s[columns[row["statistic"]]]) for s in some if s["label"] == label])
            for label in "10"
        )
        curve = roc(marked, unmarked)
        assert float(row["auc"]) == curve.auc
        assert (float(row["auc_low"]), float(row["auc_high"])) == curve.auc_interval
        assert (int(row["marked"]), int(row["unmarked"])) == (5, 5)
        assert row["tpr_0.01"] == row["split_0.01_threshold"] == ""  # five unmarked images are too few
    own = next(row for row in table if row["statistic"] == "whitened cosine")
    p = [
        float(s["p"]) for s in scores if all(s[n] == own[n] for n in ("key", "attack", "method")) and s["label"] == "0"
    ]
    assert float(own["p_0.01_fpr"]) == np.mean(np.array(p) <= 0.01)


def test_everything_is_written(found, plan):
    record = json.loads((plan.output / "evaluation.json").read_text())
    assert record == json.loads(json.dumps(found.record()))
    assert record["settings"]["images"] == comparison.INDEPENDENT and record["refused"] == []
    report = (plan.output / "evaluation.md").read_text()
    assert all(word in report for word in ("independent", "## AUC", "blur:3", "Too few unmarked", "Fréchet", "sky"))
    write_plots(replace(found, cells=[c for c in found.cells if c.pattern == "rand"]), plan.output)
    for name in ("clean", "blur-1", "blur-3"):
        for file in (f"roc-{name}.png", f"roc-{name}.svg", f"histograms-{name}.png"):
            assert (plan.output / file).stat().st_size > 5000
    assert (plan.output / "strengths.png").stat().st_size > 5000
    assert len(summary(found).splitlines()) == 2 + 2 * 3 * 2
    for row in record["quality"]:
        assert 0 <= row["sky_marked"] <= 1 and 0 < row["frechet_p"] <= 1


def test_one_more_attack_method_or_key_costs_no_more_than_itself(found, model, plan, keys, monkeypatch):
    called = []
    invert_decoder, recover_noise = Detector.invert_decoder, Detector.recover_noise

    def counted(name, function):
        return lambda self, x: (called.append((name, len(x))), function(self, x))[1]

    monkeypatch.setattr(Detector, "invert_decoder", counted("decoder", invert_decoder))
    monkeypatch.setattr(Detector, "recover_noise", counted("noise", recover_noise))
    again = compare(model, plan)
    assert called == [] and again.record() == found.record()
    images_of = lambda work: [n for name, n in called if name == work]
    compare(model, replace(plan, attacks=(*plan.attacks, "flip")))
    assert images_of("decoder") == [3, 2] * 3 * 2  # unmarked images and two keys', by two methods
    assert 5 * 3 <= sum(images_of("noise")) <= 5 * 3 * 2  # less where both methods find the same latents
    called.clear()
    compare(model, replace(plan, keys=(*plan.keys, keys["ring"]), attacks=("flip",)))
    assert images_of("decoder") == [3, 2] * 2 * 2  # the new key's, clean and flipped, by two methods
    with pytest.raises(StoreError, match="number was 5, is 6"):
        compare(model, replace(plan, number=6))


def test_a_stopped_run_goes_on(found, model, plan, tmp_path, monkeypatch):
    quick, recover = replace(plan, output=tmp_path, attacks=("flip",), methods=("encoder",)), comparison.recover_files
    calls = []

    def stop_at_the_fifth(*args, **options):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return recover(*args, **options)

    monkeypatch.setattr(comparison, "recover_files", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        compare(model, quick)
    resumed = compare(model, quick)
    clean = [cell for cell in found.cells if (cell.attack, cell.method) == (CLEAN, "encoder")]
    assert [cell.attack for cell in resumed.cells] == [CLEAN] * 7 + ["flip"] * 7
    for ours, theirs in zip(resumed.cells, clean, strict=False):
        np.testing.assert_array_equal(ours.marked, theirs.marked)


def cell(attack: str, marked, unmarked, **changes) -> Cell:
    marked, unmarked = np.asarray(marked, float), np.asarray(unmarked, float)
    groups = ([f"m{i}" for i in range(len(marked))], [f"u{i}" for i in range(len(unmarked))])
    whole = Cell("abcd", "rand", "centred", attack, "encoder", DISTANCE, marked, unmarked, groups, None, 0.5, np.nan)
    return replace(whole, **changes)


def test_the_pivot_has_the_mean_over_attacks():
    some = [cell(CLEAN, [3, 4], [1, 2]), cell("flip", [1, 4], [2, 3]), cell("blur:1", [2, 4], [1, 3])]
    head, _, row = ([c.strip() for c in line.strip("|").split("|")] for line in pivot(some, "auc").splitlines())
    assert head == ["key", "pattern", "statistic", "method", "clean", "flip", "blur:1", "mean"]
    assert [text.split()[0] for text in row[4:]] == ["1.000", "0.500", "0.750", "0.625"]
    assert pivot(some, "tpr_0.01").splitlines()[-1].count("[") == 0
    assert "mean" not in pivot(some[:1], "auc")


def test_rates_are_there_where_there_are_enough_unmarked_images():
    rng = np.random.default_rng(0)
    marked, unmarked = rng.normal(1, 1, 50), rng.normal(0, 1, 200)
    row = cell(CLEAN, marked, unmarked, p=(np.full(50, 0.005), np.linspace(0.005, 1, 200))).row
    assert row["tpr_0.01"] == tpr_at(marked, unmarked, 0.01).tpr and row["tpr_0.001"] is None
    assert row["split_0.01_tpr"] == np.mean(marked >= row["split_0.01_threshold"])
    assert (row["p_0.01_tpr"], row["p_0.001_tpr"], row["p_0.01_fpr"]) == (1.0, 0.0, 0.005 * 2)
    assert row["megabytes"] is None
    assert cell(CLEAN, marked, unmarked[:196]).row["split_0.01_threshold"] is None
    assert cell(CLEAN, marked, unmarked[:98]).row["tpr_0.01"] is None


@pytest.mark.parametrize("pattern", ["rand", "ring", "zeros"])
def test_every_statistic_is_larger_for_marked_noise(model, keys, pattern):
    from ringmark.watermark.keys.key import Key

    key = Key.load(keys[pattern])
    scheme, looking = TreeRing(key), Detector(model, [key], steps=2)
    noise = torch.randn(40, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    (marked, p), (unmarked, q) = (
        scores_of(looking, key.fingerprint, x) for x in (scheme.embed(noise[:20]), noise[20:])
    )
    assert next(iter(marked)) == own_statistic(pattern) and ("matched filter" in marked) == (pattern != "zeros")
    assert p.max() < q.min()
    for name in marked:
        if name != "published p" or pattern != "zeros":  # which has no key for its test
            assert roc(marked[name], unmarked[name]).auc == 1, name


def folder_of(path, names, flat=(), labels=None):
    rng = np.random.default_rng(0)
    path.mkdir()
    for name in names:
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels * 0 if name in flat else pixels).save(path / name)
    if labels is not None:
        rows = "".join(f"{name},{labels},a picture\n" for name in names)
        (path / "labels.csv").write_text("Path, label ,Prompt\n" + rows)
    return path


def test_folders_of_others_pictures(model, plan, keys, tmp_path):
    marked = folder_of(tmp_path / "m", ["a.png", "b.jpg", "c.png", "d.png"], flat=("c.png",), labels=1)
    (marked / "d.png").write_text("no image")
    unmarked = folder_of(tmp_path / "u", ["a.png", "e.png"])
    given = replace(
        plan, keys=(keys["rand"],), marked=marked, unmarked=unmarked, attacks=("flip",), methods=("encoder",)
    )
    given = replace(given, output=tmp_path / "out")
    found = compare(model, given)
    assert len(found.refused) == 1 and str(marked / "d.png") in found.refused[0]
    for some in found.cells:
        assert (len(some.marked), len(some.unmarked)) == (3, 2)
        assert some.marked[2] < min(*some.marked[:2], *some.unmarked)  # nothing can be said of one flat colour
        assert some.groups == (["a picture"] * 3, ["unmarked/a.png", "unmarked/e.png"])
    doubtful = [r for r in found.images if r["doubt"]]
    assert len(doubtful) == 2 and all((r["p"], r["score"]) == (1.0, None) for r in doubtful)
    assert found.record()["settings"]["images"] == comparison.GIVEN and "sky_marked" not in found.quality[0]


def test_a_calibration_is_used_where_it_fits_and_refused_where_it_fits_nowhere(model, plan, keys, tmp_path):
    noise = np.random.default_rng(0).normal(size=(20, *model.latent_shape))
    made = Calibration.measure(noise, detector(model, [], "encoder", 1, 2).settings(), {"drawn": 20})
    made.save(tmp_path / "own.safetensors")
    small = replace(
        plan,
        number=2,
        keys=(keys["rand"],),
        attacks=(),
        output=tmp_path / "out",
        calibration=tmp_path / "own.safetensors",
    )
    found = compare(model, small)
    assert found.settings["calibrations"] == {"encoder": made.fingerprint, "forward": None}
    assert "max_steps 0, here 1; method" in found.settings["calibration_unfit"].pop("forward")
    assert found.settings["calibration_unfit"] == {}
    assert {cell.method for cell in found.cells if cell.statistic == comparison.CONFORMAL} == {"encoder"}
    with pytest.raises(CalibrationError, match=r"own.safetensors.*method"):
        compare(model, replace(small, methods=("forward",), output=tmp_path / "none"))
    with pytest.raises(CalibrationError, match=r"missing.safetensors"):
        replace(small, calibration=tmp_path / "missing.safetensors")


def test_what_is_refused(model, plan, keys, tmp_path):
    one, two = (keys["rand"],), (keys["rand"], keys["ring"])
    folder = folder_of(tmp_path / "m", ["a.png", "b.png"], labels=0)
    for changes, error, said in (
        ({"marked": folder, "keys": ()}, EvaluationError, "one --key"),
        ({"marked": folder, "keys": two}, EvaluationError, "one --key"),
        ({"keys": one * 2}, EvaluationError, "rand.key: holds the same key"),
        ({"keys": (*one, one[0].parent)}, EvaluationError, "same key"),
        ({"methods": ("magic",)}, RingmarkError, "choose from encoder"),
        ({"methods": ("encoder", "encoder")}, EvaluationError, "named twice"),
        ({"attacks": ("magic",)}, AttackError, "choose from rotation"),
        ({"unmarked": folder, "output": folder / "out"}, EvaluationError, "another -o"),
        ({"keys": one, "marked": folder, "unmarked": folder.parent}, EvaluationError, "one lies in the other"),
    ):
        with pytest.raises(error, match=said):
            replace(plan, **changes)
    swapped = {"keys": one, "marked": folder, "output": tmp_path / "out"}
    with pytest.raises(EvaluationError, match=r"says that 2 of 2 images are unmarked, first a.png; give marked"):
        replace(plan, **swapped)
    (folder / "labels.csv").write_text("path,label\nelsewhere.png,1\n")
    with pytest.raises(EvaluationError, match=r"none of its 1 labels fits an image; paths must be like a.png"):
        replace(plan, **swapped)
    (folder / "labels.csv").unlink()
    for carried, said in ((None, "no key"), ("0123456789abcdef", "key 01234567")):
        Results(folder / "drawn.jsonl", {"key": carried}).close()
        with pytest.raises(EvaluationError, match=f"m: was drawn with {said}, not"):
            replace(plan, **swapped)
        (folder / "drawn.jsonl").unlink()
    (tmp_path / "empty folder").mkdir()
    with pytest.raises(ImageError, match="no images"):
        replace(plan, keys=one, marked=tmp_path / "empty folder")
    for name in ("a.png", "b.png"):
        (folder / name).write_text("no image")
    with pytest.raises(EvaluationError, match=r"no image can be used, of 2; last: .*b.png"):
        compare(model, replace(plan, unmarked=folder, attacks=(), methods=("encoder",), output=tmp_path / "empty"))
    with pytest.raises(EvaluationError, match="not numbers"):
        _ = cell(CLEAN, [1, np.nan], [0, 1]).row

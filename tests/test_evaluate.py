"""Evaluations: what the tables say is what the scores say, and nothing is computed twice."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from checkpoints import wrap
from identity import secret
from PIL import Image

from ringmark.data.results import Results
from ringmark.errors import AttackError, CalibrationError, EvaluationError, ImageError, RingmarkError, StoreError
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.evaluation import cells
from ringmark.watermark.evaluation.cells import CLEAN, Evaluation
from ringmark.watermark.evaluation.plots import write_plots
from ringmark.watermark.evaluation.rates import roc
from ringmark.watermark.evaluation.report import summary
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.base import scheme_of
from ringmark.watermark.tasks import evaluate as task
from ringmark.watermark.tasks import quality
from ringmark.watermark.tasks.evaluate import evaluate, scores_of
from ringmark.watermark.tasks.keygen import new_key
from ringmark.watermark.tasks.plan import Plan


@pytest.fixture(scope="module")
def model(tiny_parts):
    return wrap(tiny_parts)


@pytest.fixture(scope="module")
def keys(model, tmp_path_factory):
    """Files with a rand, a ring and a zeros key."""
    folder, paths = tmp_path_factory.mktemp("keys"), {}
    for i, pattern in enumerate(("rand", "ring", "zeros")):
        placed = {"pattern": pattern, "channels": (0, 1), "radii": (1, 3)}
        new_key(model, "tree-ring", secret=secret(i), **placed).save(folder / f"{pattern}.key")
        paths[pattern] = folder / f"{pattern}.key"
    return paths


@pytest.fixture(scope="module")
def plan(keys, tmp_path_factory):
    return Plan(
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
        draw_steps=2,
        steps=2,
        batch=3,
    )


@pytest.fixture(scope="module", autouse=True)
def quick():
    """A classifier of prompts that has hardly learnt anything, few draws of the bootstrap, no plots."""
    with pytest.MonkeyPatch.context() as patch:
        train, bootstrap = quality.train_classifiers, cells.bootstrap_interval
        patch.setattr(quality, "train_classifiers", lambda *_: train(20, 5, quality.SCENE_SIZE))
        patch.setattr(cells, "bootstrap_interval", partial(bootstrap, draws=50))
        patch.setattr(quality, "frechet_test", partial(quality.frechet_test, draws=20))
        patch.setattr(task, "write_plots", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def found(model, plan, quick) -> Evaluation:
    return evaluate(model, plan)


def rows_of(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_says_what_the_scores_say(found, plan):
    columns = {"whitened cosine": "score", "power ratio": "score", "matched filter": "matched_filter"}
    columns |= {"published distance": "published_distance", "published p": "published_p"}
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
    assert record["settings"]["images"] == task.INDEPENDENT and record["refused"] == []
    report = (plan.output / "evaluation.md").read_text()
    assert all(word in report for word in ("independent", "## AUC", "blur:3", "Too few unmarked", "Fréchet", "sky"))
    write_plots(replace(found, cells=[c for c in found.cells if c.scheme == "rand"]), plan.output)
    for name in ("clean", "blur-1", "blur-3"):
        for file in (f"roc-{name}.png", f"roc-{name}.svg", f"histograms-{name}.png"):
            assert (plan.output / file).stat().st_size > 5000
    assert (plan.output / "strengths.png").stat().st_size > 5000
    assert len(summary(found).splitlines()) == 2 + 2 * 3 * 2
    for row in record["quality"]:
        assert 0 <= row["sky_marked"] <= 1 and 0 < row["frechet_p"] <= 1


@pytest.mark.slow
def test_one_more_attack_method_or_key_costs_no_more_than_itself(found, model, plan, keys, monkeypatch):
    called = []
    latents, noise = Recoverer.latents, Recoverer.noise

    def counted(name, function):
        return lambda self, x: (called.append((name, len(x))), function(self, x))[1]

    monkeypatch.setattr(Recoverer, "latents", counted("decoder", latents))
    monkeypatch.setattr(Recoverer, "noise", counted("noise", noise))
    again = evaluate(model, plan)
    assert called == [] and again.record() == found.record()

    def images_of(work: str) -> list[int]:
        return [n for name, n in called if name == work]

    evaluate(model, replace(plan, attacks=(*plan.attacks, "flip")))
    assert images_of("decoder") == [3, 2] * 3 * 2  # unmarked images and two keys', by two methods
    assert 5 * 3 <= sum(images_of("noise")) <= 5 * 3 * 2  # less where both methods find the same latents
    called.clear()
    evaluate(model, replace(plan, keys=(*plan.keys, keys["ring"]), attacks=("flip",)))
    assert images_of("decoder") == [3, 2] * 2 * 2  # the new key's, clean and flipped, by two methods
    with pytest.raises(StoreError, match="number was 5, is 6") as error:
        evaluate(model, replace(plan, number=6))
    assert error.value.code == "results.settings"


@pytest.mark.slow
def test_a_stopped_run_goes_on(found, model, plan, tmp_path, monkeypatch):
    quick, recover = replace(plan, output=tmp_path, attacks=("flip",), methods=("encoder",)), task.recover_files
    calls = []

    def stop_at_the_fifth(*args, **options):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return recover(*args, **options)

    monkeypatch.setattr(task, "recover_files", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, quick)
    resumed = evaluate(model, quick)
    clean = [cell for cell in found.cells if (cell.attack, cell.method) == (CLEAN, "encoder")]
    assert [cell.attack for cell in resumed.cells] == [CLEAN] * 7 + ["flip"] * 7
    for ours, theirs in zip(resumed.cells, clean, strict=False):
        np.testing.assert_array_equal(ours.marked, theirs.marked)


@pytest.mark.parametrize("pattern", ["rand", "ring", "zeros"])
def test_every_statistic_is_larger_for_marked_noise(model, keys, pattern):
    key = Key.load(keys[pattern])
    scheme, judge = scheme_of(key), Verifier(Recoverer.named(model, "operator", steps=2), [key]).detector
    noise = torch.randn(40, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    (marked, p), (unmarked, q) = (scores_of(judge, key.fingerprint, x) for x in (scheme.embed(noise[:20]), noise[20:]))
    assert next(iter(marked)) == scheme.score_name and ("matched filter" in marked) == (pattern != "zeros")
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


def test_images_of_another_size(model, plan, tmp_path):
    other = replace(plan, output=tmp_path / "out", keys=(), number=2, attacks=(), methods=("encoder",), size=(16, 24))
    found = evaluate(model, other)
    assert found.settings["size"] == [16, 24] and len(found.images) == 4
    with Image.open(next((tmp_path / "out" / "images").rglob("*.png"))) as drawn:
        assert drawn.size == (24, 16)


def test_folders_of_others_pictures(model, plan, keys, tmp_path):
    marked = folder_of(tmp_path / "m", ["a.png", "b.jpg", "c.png", "d.png"], flat=("c.png",), labels=1)
    (marked / "d.png").write_text("no image")
    unmarked = folder_of(tmp_path / "u", ["a.png", "e.png"])
    given = replace(
        plan, keys=(keys["rand"],), marked=marked, unmarked=unmarked, attacks=("flip",), methods=("encoder",)
    )
    given = replace(given, output=tmp_path / "out")
    found = evaluate(model, given)
    assert len(found.refused) == 1 and str(marked / "d.png") in found.refused[0]
    for some in found.cells:
        assert (len(some.marked), len(some.unmarked)) == (3, 2)
        assert some.marked[2] < min(*some.marked[:2], *some.unmarked)  # nothing can be said of one flat colour
        assert some.groups == (["a picture"] * 3, ["unmarked/a.png", "unmarked/e.png"])
    doubtful = [r for r in found.images if r["doubt"]]
    assert len(doubtful) == 2 and all((r["p"], r["score"]) == (1.0, None) for r in doubtful)
    assert found.record()["settings"]["images"] == task.GIVEN and "sky_marked" not in found.quality[0]


def test_a_calibration_is_used_where_it_fits_and_refused_where_it_fits_nowhere(model, plan, keys, tmp_path):
    noise = np.random.default_rng(0).normal(size=(20, *model.latent_shape))
    settings = Recoverer.named(model, "encoder", 1, 2).settings.as_dict()
    made = Calibration.measure(noise, settings, {"drawn": 20})
    made.save(tmp_path / "own.safetensors")
    small = replace(
        plan,
        number=2,
        keys=(keys["rand"],),
        attacks=(),
        output=tmp_path / "out",
        calibration=tmp_path / "own.safetensors",
    )
    found = evaluate(model, small)
    assert found.settings["calibrations"] == {"encoder": made.fingerprint, "forward": None}
    assert "max_steps was 0, is 1" in found.settings["calibration_unfit"].pop("forward")
    assert found.settings["calibration_unfit"] == {}
    assert {cell.method for cell in found.cells if cell.statistic == task.CONFORMAL} == {"encoder"}
    with pytest.raises(CalibrationError, match="method") as error:
        evaluate(model, replace(small, methods=("forward",), output=tmp_path / "none"))
    assert (error.value.code, error.value.subject) == ("evaluation.calibration", small.calibration)
    with pytest.raises(CalibrationError) as error:
        replace(small, calibration=tmp_path / "missing.safetensors")
    assert (error.value.code, error.value.subject) == ("calibration.missing", tmp_path / "missing.safetensors")


def test_what_is_refused(model, plan, keys, tmp_path):
    one, two = (keys["rand"],), (keys["rand"], keys["ring"])
    folder = folder_of(tmp_path / "m", ["a.png", "b.png"], labels=0)
    for changes, code in (
        ({"marked": folder, "keys": ()}, "evaluation.keys"),
        ({"marked": folder, "keys": two}, "evaluation.keys"),
        ({"keys": one * 2}, "evaluation.same-key"),
        ({"keys": (*one, one[0].parent)}, "evaluation.same-key"),
        ({"methods": ("encoder", "encoder")}, "evaluation.methods"),
        ({"unmarked": folder, "output": folder / "out"}, "evaluation.output"),
        ({"keys": one, "marked": folder, "unmarked": folder.parent}, "evaluation.overlap"),
    ):
        with pytest.raises(EvaluationError) as error:
            replace(plan, **changes)
        assert error.value.code == code and "--" not in str(error.value)
    with pytest.raises(RingmarkError, match="magic") as error:
        replace(plan, methods=("magic",))
    assert error.value.code == "recovery.method-unknown"
    with pytest.raises(AttackError, match="magic") as error:
        replace(plan, attacks=("magic",))
    assert error.value.code == "attack.unknown"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "evaluation.md").write_text("# My evaluation\n")
    with pytest.raises(StoreError) as refused:
        replace(plan, output=tmp_path / "theirs")
    assert refused.value.code == "file.foreign"
    again = replace(plan, output=tmp_path / "again")
    with Results(again.output / "plan.jsonl", again.settings(model)), pytest.raises(StoreError) as refused:
        evaluate(model, again)
    assert refused.value.code == "results.locked"


def test_labels_that_do_not_fit_are_refused(plan, keys, tmp_path):
    folder = folder_of(tmp_path / "m", ["a.png", "b.png"], labels=0)
    swapped = {"keys": (keys["rand"],), "marked": folder, "output": tmp_path / "out"}
    with pytest.raises(EvaluationError) as error:
        replace(plan, **swapped)
    assert (error.value.code, error.value.details) == ("evaluation.labels", {"kind": "unmarked"})
    (folder / "labels.csv").write_text("path,label\nelsewhere.png,1\n")
    with pytest.raises(EvaluationError) as error:
        replace(plan, **swapped)
    assert (error.value.code, error.value.details) == ("evaluation.unlabelled", {"example": "a.png"})
    (folder / "labels.csv").unlink()
    for carried, text in ((None, "no key"), ("0123456789abcdef", "key 01234567")):
        Results(folder / "drawn.jsonl", {"key": carried}).close()
        with pytest.raises(EvaluationError, match=text) as error:
            replace(plan, **swapped)
        assert error.value.code == "evaluation.carried"
        (folder / "drawn.jsonl").unlink()


def test_images_that_cannot_be_used_are_refused(model, plan, keys, tmp_path):
    (tmp_path / "empty folder").mkdir()
    with pytest.raises(ImageError) as error:
        replace(plan, keys=(keys["rand"],), marked=tmp_path / "empty folder")
    assert error.value.code == "image.none"
    (tmp_path / "m").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "m" / name).write_text("no image")
    given = replace(plan, unmarked=tmp_path / "m", attacks=(), methods=("encoder",), output=tmp_path / "empty")
    with pytest.raises(EvaluationError, match=r"b\.png") as error:
        evaluate(model, given)
    assert error.value.code == "evaluation.images"

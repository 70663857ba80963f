"""Kept noise is judged for other keys as the pictures would be, without opening them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import identity
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from shell import QUICK, refused, run

from ringmark.data.images import save_png, to_array
from ringmark.data.reader import read_records
from ringmark.errors import RingmarkError
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.cascade import early_stages
from ringmark.watermark.detect.detector import OVERFLOW, Detector
from ringmark.watermark.detect.kept import KeptPicture
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.schemes.base import scheme_of
from ringmark.watermark.tasks import load
from ringmark.watermark.tasks.audit import Audit, audit_pictures, find_pictures
from ringmark.watermark.tasks.reaudit import reaudit

ALPHA = 0.05
MINE, OTHER = identity.key(1, "rand"), identity.key(2, "rand")
EQUAL = ("present", "key", "carries", "notes", "shows", "content", "width", "height", "size", "mtime_ns", "model")


def noise(*seeds: int) -> torch.Tensor:
    return initial_noise(list(seeds), (3, 32, 32))


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Marked, unmarked, flat, enlarged and broken pictures, and three of the same pixels."""
    folder = tmp_path_factory.mktemp("kept") / "album"
    marked = scheme_of(MINE, (3, 32, 32)).embed(noise(1, 2))
    for name, sample in zip("abcd", identity.samples(torch.cat([marked, noise(3, 4)])), strict=True):
        save_png(sample.image, folder / f"{name}.png")
    for name in ("a-twin", "twin"):  # one is in the batch of a.png, the other comes later
        shutil.copy(folder / "a.png", folder / f"{name}.png")
    Image.new("RGB", (32, 32), (9, 9, 9)).save(folder / "flat.png")
    with Image.open(folder / "b.png") as picture:
        picture.resize((40, 32)).save(folder / "wide.png")
    (folder / "broken.png").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Of 60 unmarked pictures, with both early stages."""
    return calibrated_on(noise(*range(100, 160)))


def calibrated_on(unmarked: torch.Tensor) -> Calibration:
    images = torch.from_numpy(np.stack([to_array(sample.image) for sample in identity.samples(unmarked)]))
    recoverer = Recoverer.named(identity.MODEL, "operator", None, 5)
    *earlier, whole = (
        Calibration.measure(each(images).noise, each.settings.as_dict(), {"noise": 60})
        for each in (*early_stages(recoverer), recoverer)
    )
    return replace(whole, earlier=tuple(earlier))


def audited(album: Path, results: Path, *keys, **options) -> Path:
    verifier = identity.verifier(keys, steps=5, alpha=ALPHA, **options)
    audit_pictures(verifier, find_pictures([album]), results, batch=3, keep_noise=True)
    return results


def again(kept: Path, *keys, name: str = "again") -> tuple[Path, Audit]:
    results = kept.with_name(f"{name}{kept.suffix}")
    return results, reaudit(kept, keys, results, alpha=ALPHA)


def records_of(results: Path) -> dict[str, dict]:
    return {record["sample_id"]: record for record in read_records(results)[1]}


def compare(found: Path, expected: Path) -> None:
    """Equal verdicts, and p within the rounding of float16."""
    fresh, kept = records_of(expected), records_of(found)
    assert kept.keys() == fresh.keys() and len(fresh) == 9
    for id, record in fresh.items():
        if "error" in record:
            assert kept[id] == record
            continue
        assert {name: kept[id][name] for name in EQUAL} == {name: record[name] for name in EQUAL}
        assert kept[id].get("same_as") == record.get("same_as")
        assert kept[id]["log10_p"] == pytest.approx(record["log10_p"], rel=2e-3, abs=2e-3)
        assert kept[id]["stages"] == pytest.approx(record["stages"], rel=0.02, abs=1e-9)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("sizes", [(), ((32, 32), (40, 32))], ids=["native", "two sizes"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_other_keys_are_tested_as_by_a_fresh_audit(album, calibration, tmp_path, monkeypatch, form, sizes, calibrated):
    options = {"sizes": sizes, "thorough": True, "calibration": calibration if calibrated else None}
    kept = audited(album, tmp_path / f"kept.{form}", OTHER, **options)
    fresh = audited(album, tmp_path / f"fresh.{form}", MINE, OTHER, **options)
    monkeypatch.setattr(Image, "open", None)
    results, counts = again(kept, MINE, OTHER)
    compare(results, fresh)
    assert counts.by_key[MINE.fingerprint] >= 3 and counts.unreadable == 1
    assert len(records_of(results)["c.png"]["stages"]) == (3 if calibrated and not sizes else 1)
    assert again(kept, MINE, OTHER)[1] == counts


def test_stages_that_a_picture_did_not_go_through_only_make_p_larger(album, calibration, tmp_path):
    kept = audited(album, tmp_path / "kept.jsonl", MINE, calibration=calibration)
    fresh = audited(album, tmp_path / "fresh.jsonl", OTHER, calibration=calibration)
    compare(again(kept, MINE)[0], kept)
    other, fresh = records_of(again(kept, OTHER, name="other")[0]), records_of(fresh)
    for id, record in other.items():
        if "error" not in record:
            assert record["stages"].keys() <= fresh[id]["stages"].keys()
            assert record["log10_p"] >= fresh[id]["log10_p"] - 2e-3
    assert list(other["a.png"]["stages"]) == ["latents"] and len(fresh["a.png"]["stages"]) > 1


def test_the_table_has_all_pairs_of_a_picture_and_a_key_with_p_below_one(album, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr("ringmark.watermark.tasks.key_table.ROWS", 2)
    keys = [MINE, *(identity.key(seed, "rand") for seed in range(10, 15))]
    kept = audited(album, tmp_path / "kept.jsonl", OTHER, calibration=calibration)
    for name in ("one", "two"):  # the second run finds all of its records, and makes the table anew
        reaudit(kept, keys, tmp_path / "again.jsonl", alpha=ALPHA, table=tmp_path / f"{name}.parquet")
    one, two = (pq.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("one", "two"))
    records = records_of(tmp_path / "again.jsonl")
    expected = {
        (id, key, values["p_value"], values["score"])
        for id, record in records.items()
        for key, values in record.get("keys", {}).items()
        if values["p_value"] < 1
    }
    found = {(row["sample_id"], row["key"], 10 ** row["log10_p"], row["score"]) for row in one}
    assert one == two and found == expected and 2 < len(one) < len(keys) * len(records)
    carried = {(id, key) for id, record in records.items() for key in record.get("carries", ())}
    assert {(row["sample_id"], row["key"]) for row in one if row["present"]} == carried
    with pytest.raises(RingmarkError, match="exists already"):
        reaudit(kept, keys, tmp_path / "again.jsonl", alpha=ALPHA, table=tmp_path / "one.parquet")
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("spoiled", [False, True])
def test_shortcuts_change_no_verdict(album, tmp_path, monkeypatch, spoiled):
    """Together or alone, with every rank looked at or only those that might contradict p."""
    unmarked = noise(*range(100, 160))
    if spoiled:  # marked pictures among the unmarked ones contradict their p
        unmarked[:6] = scheme_of(MINE, (3, 32, 32)).embed(unmarked[:6])
    kept = audited(album, tmp_path / "kept.jsonl", OTHER, calibration=calibrated_on(unmarked), thorough=True)
    quick, _ = again(kept, MINE, OTHER, name="quick")
    monkeypatch.setattr("ringmark.watermark.tasks.reaudit.BATCH", 1)
    monkeypatch.setattr(Detector, "_suspects", lambda self, scores, p: np.ones(scores.shape, bool))
    slow, counts = again(kept, MINE, OTHER, name="slow")
    assert counts.inconclusive == (5 if spoiled else 1)
    expected = records_of(slow)
    for id, one in records_of(quick).items():
        other = expected.pop(id)
        if "error" in one:
            assert one == other
            continue
        numbers = {name: one[name] for name in ("log10_p", "score", "p_value", "conformal_p") if one[name] is not None}
        assert numbers == pytest.approx({name: other[name] for name in numbers}, rel=1e-5, abs=1e-9)
        assert one["stages"] == pytest.approx(other["stages"], rel=1e-5)
        rest = one.keys() - numbers.keys() - {"seconds", "stages", "keys"}
        assert {name: one[name] for name in rest} == {name: other[name] for name in rest}
    assert not expected


def test_sizes_are_tried_in_their_order():
    shapes = [(height, 32) for height in range(16, 16 + 13 * 8, 8)]
    tensors = {f"{turn}/{h}x{w}/0": np.zeros((3, 4, 2), np.float16) for turn, (h, w) in enumerate(shapes)}
    tensors |= {"tests": np.array(13), "notes": np.frombuffer(b"[" + b"[]," * 12 + b"[]]", np.uint8)}
    record = dict.fromkeys(("sample_id", "content", "height", "width", "shows", "residual", "status"))
    picture = KeptPicture.of(record, tensors, searched=False)
    assert [view.shape for view in picture.views] == [(3, *shape) for shape in shapes]


def test_only_the_owner_can_read_what_is_kept(album, calibration, tmp_path):
    audited(album, tmp_path / "kept.jsonl", MINE, calibration=calibration)
    files = [path for path in (tmp_path / "kept.jsonl.tensors").rglob("*") if path.is_file()]
    assert len(files) == 1 + 2 and all(path.stat().st_mode & 0o777 == 0o600 for path in files)


def test_noise_that_overflows_is_inconclusive(album, tmp_path, monkeypatch):
    kept = audited(album, tmp_path / "kept.jsonl", MINE)
    from ringmark.watermark.detect import kept as module

    unpack = module.KeptPicture.of.__func__

    def spoiled(cls, *args, **options):
        picture = unpack(cls, *args, **options)
        picture.views[0].stages[0][0, 0] = np.inf
        return picture

    monkeypatch.setattr(module.KeptPicture, "of", classmethod(spoiled))
    _, counts = again(kept, MINE)
    assert (counts.present, counts.inconclusive) == (0, 8)
    assert OVERFLOW in records_of(tmp_path / "again.jsonl")["a.png"]["notes"]


def code_of(*args) -> str:
    with pytest.raises(RingmarkError) as caught:
        again(*args)
    assert "\n" not in str(caught.value)
    return caught.value.code


def test_what_cannot_be_tested_again_is_said(album, calibration, tmp_path):
    kept = audited(album, tmp_path / "kept.jsonl", MINE, calibration=calibration)
    assert code_of(kept, identity.key(3, "rand", (4, 15))) == "key.reach"
    assert code_of(tmp_path / "none.jsonl", MINE) == "results.missing"
    store = tmp_path / "kept.jsonl.tensors"
    (store / "000000.blocks").write_bytes(b"")
    _, counts = again(kept, MINE)
    assert counts.unreadable == 9
    assert {record["code"] for record in records_of(tmp_path / "again.jsonl").values()} >= {"noise.missing"}
    replace(calibration, sources={"others": 60}).save(store / Calibration.FILE)
    assert code_of(kept, MINE) == "noise.calibration"
    (store / "context.safetensors").write_bytes(b"no")
    assert code_of(kept, MINE) == "noise.damaged"
    audit_pictures(identity.verifier([MINE]), find_pictures([album]), tmp_path / "plain.jsonl")
    assert code_of(tmp_path / "plain.jsonl", MINE) == "noise.none"


def test_the_command_loads_no_model(house: Path, tmp_path: Path, monkeypatch) -> None:
    key = ["--key", house / "my.key"]
    run("audit", house / "images", *key, "-o", tmp_path / "kept.jsonl", *QUICK, "--keep-noise")
    monkeypatch.setattr(load, "load_model", None)
    result = run("reaudit", tmp_path / "kept.jsonl", *key, "-o", tmp_path / "again.jsonl")
    assert "4 images: 2 with a key" in result.stdout
    (tmp_path / "plain.jsonl").write_text('{"ringmark": 1, "settings": {}}\n')
    message = refused("reaudit", tmp_path / "plain.jsonl", *key, "-o", tmp_path / "again.jsonl")
    assert "keeps no noise; audit again with --keep-noise" in message

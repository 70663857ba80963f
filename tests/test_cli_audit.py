"""`ringmark audit`."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from itertools import count, islice
from pathlib import Path

import identity
import numpy as np
import pytest
from PIL import Image
from shell import QUICK, pictures, refused, run

from ringmark.data.engine import Local
from ringmark.data.items import Item
from ringmark.data.reader import read_records
from ringmark.data.results import Results, content_id
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.tasks.audit import AuditJudge, _Run


def test_audit_records_everything_and_goes_on(house: Path, tmp_path: Path) -> None:
    folder, results = tmp_path / "folder", tmp_path / "results.jsonl"
    (folder / "deep").mkdir(parents=True)
    for i, path in enumerate(pictures(house)):
        (folder / ("deep" if i % 2 else ".") / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    run("keygen", "-o", tmp_path / "other.key")
    args = [
        "audit",
        folder,
        "--key",
        house / "my.key",
        "--key",
        tmp_path / "other.key",
        "-o",
        results,
        *QUICK,
        "--json",
    ]
    found = json.loads(run(*args).stdout)
    assert (found["images"], found["present"], found["absent"], found["unreadable"]) == (5, 2, 2, 1)
    assert list(found["by_key"].values()) == [2]
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    assert json.loads(run(*args).stdout) == found
    records = {r["sample_id"]: r for r in map(json.loads, results.read_text().splitlines()[1:])}
    assert "error" in records["broken.png"] and len(records) == 5
    assert "max_steps was 1, is 2" in refused(*args[:-2], 2)


def test_both_forms_of_results_hold_the_same_records_and_resume(house: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    folder = Path(shutil.copytree(house / "images", tmp_path / "images"))
    (folder / "notes.png").write_bytes(b"not a picture")
    args = ["audit", folder, "--key", house / "my.key", *QUICK, "--json", "-o"]
    forms = tmp_path / "r.jsonl", tmp_path / "r.parquet"
    one, other = (json.loads(run(*args, form).stdout) for form in forms)
    assert one == other and one["present"] == 2
    lines, parts = (
        {r["sample_id"]: {n: v for n, v in r.items() if n != "seconds"} for r in read_records(form)[1]}
        for form in forms
    )
    assert lines == parts and lines["notes.png"]["code"] == "image.unknown-format"
    first = lines["marked/0000000.png"]
    with Image.open(folder / "marked" / "0000000.png") as picture:
        assert first["content"] == content_id(np.asarray(picture.convert("RGB")))
        assert (first["width"], first["height"], first["model"]) == (*picture.size, "pocket")
    assert first["stage"] in first["stages"] and first["p_value"] == min(first["stages"].values())
    assert json.loads(run(*args, forms[1]).stdout) == other
    assert [path.name for path in forms[1].iterdir()] == ["part-000000.parquet"]
    assert "steps was 4, is 5" in refused(*args[:-2], "--steps", 5, "-o", forms[1])
    assert "not a folder of results" in refused(*args, folder)


@pytest.fixture
def album(house: Path, tmp_path: Path) -> list[object]:
    """The audit of a small album; it ends with the name of its results."""
    folder = tmp_path / "here" / "album"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(pictures(house, "marked")[0].read_bytes())
    (folder / "broken.png").write_bytes(b"broken")
    (folder / "notes.txt").touch()
    return ["audit", folder, "--key", house / "my.key", *QUICK, "-o", tmp_path / "here" / "results.jsonl"]


def test_an_audit_says_what_it_did_not_read(album: list[object]) -> None:
    result = run(*album)
    assert "1 unreadable; 1 other file skipped (1 .txt)" in result.stdout
    assert "broken.png: is not an image" in result.stderr
    result = run(*album, "--json")
    found = json.loads(result.stdout)
    assert found["skipped"] == {".txt": 1} and "broken.png" in found["errors"][0] and not result.stderr


def test_an_audit_looks_again_at_what_has_changed_only(album: list[object], house: Path) -> None:
    picture, results = album[1] / "a.png", album[-1]
    assert "1 with a key" in run(*album).stdout
    before = results.read_bytes()
    run(*album)
    assert results.read_bytes() == before
    picture.write_bytes(pictures(house, "unmarked")[0].read_bytes())
    assert "0 with a key" in run(*album).stdout
    (album[1] / "broken.png").write_bytes(b"broken otherwise")
    run(*album)
    assert len(results.read_text().splitlines()) == 1 + 2 + 1 + 1


def test_an_audit_belongs_to_its_folder_even_if_both_are_moved(album: list[object], tmp_path: Path) -> None:
    run(*album)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.png").write_bytes(b"broken")
    assert "folder was" in refused("audit", tmp_path / "other", *album[2:])
    before = album[-1].read_bytes()
    (tmp_path / "here").rename(tmp_path / "there")
    run("audit", tmp_path / "there" / "album", *album[2:-1], tmp_path / "there" / "results.jsonl")
    assert (tmp_path / "there" / "results.jsonl").read_bytes().count(b"\n") <= before.count(b"\n") + 1


def test_an_audit_goes_on_past_a_folder_that_cannot_be_listed(album: list[object], monkeypatch) -> None:
    closed, scandir = album[1] / "closed", os.scandir
    closed.mkdir()

    def forbid(path):
        if Path(path) == closed:
            raise PermissionError(13, "no", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    result = run(*album)
    assert "3 images: 1 with a key" in result.stdout and "closed: cannot be listed" in result.stderr


def test_links_out_of_the_folder_are_followed_only_if_asked(album: list[object], house: Path) -> None:
    (album[1] / "more").symlink_to(house / "images" / "unmarked")
    result = run(*album)
    assert "2 images: 1 with a key" in result.stdout
    assert "1 link out of the folder not followed; add --follow-links" in result.stderr
    assert "4 images: 1 with a key" in run(*album, "--follow-links").stdout


def records_in(results: Path) -> dict[str, dict]:
    return {r["sample_id"]: {n: v for n, v in r.items() if n != "seconds"} for r in read_records(results)[1]}


def test_sources_of_all_kinds_are_audited_with_any_number_of_workers(house: Path, tmp_path: Path) -> None:
    album, shard = tmp_path / "album", tmp_path / "shard.tar"
    shutil.copytree(house / "images", album)
    (album / "broken.png").write_bytes(b"broken")
    with tarfile.open(shard, "w") as archive:
        archive.add(album / "marked", "again")
        whole = archive.offset
        archive.add(next((album / "unmarked").glob("*.png")), "last.png")
    shard.write_bytes(shard.read_bytes()[: whole + 2048])
    args = ["audit", album, shard, "--key", house / "my.key", *QUICK, "--batch", 3, "--json"]
    counts = [json.loads(run(*args, "--workers", n, "-o", tmp_path / f"{n}.jsonl").stdout) for n in (0, 1, 3)]
    assert counts[0] == counts[1] == counts[2]
    assert {name: counts[0][name] for name in ("images", "present", "absent", "unreadable")} == {
        **{"images": 8, "present": 4, "absent": 2, "unreadable": 2}
    }
    found = records_in(tmp_path / "0.jsonl")
    assert found == records_in(tmp_path / "1.jsonl") == records_in(tmp_path / "3.jsonl")
    assert found[f"{shard}"]["code"] == "source.damaged" and found[f"{album}/broken.png"]["code"].startswith("image.")
    for number in range(2):
        first, again = (found[f"{place}/000000{number}.png"] for place in (album / "marked", f"{shard}/again"))
        assert again["same_as"] == first["sample_id"] and again["p_value"] == first["p_value"]
    before = (tmp_path / "1.jsonl").read_bytes()
    run(*args, "-o", tmp_path / "1.jsonl")
    assert (tmp_path / "1.jsonl").read_bytes() == before


def test_equal_pixels_are_judged_once_across_runs(house: Path, tmp_path: Path, monkeypatch) -> None:
    one, results = tmp_path / "one.png", tmp_path / "results.jsonl"
    with Image.open(pictures(house, "marked")[0]) as picture:
        for name in ("one.png", "two.bmp", "three.webp"):
            picture.save(tmp_path / name, lossless=True)
    args = ["--key", house / "my.key", *QUICK, "-o", results]
    run("audit", one, *args)

    def never(*_, **__):
        raise AssertionError("judged again")

    with monkeypatch.context() as patch:
        patch.setattr(Verifier, "_judge", never)
        assert (
            "3 images: 3 with a key" in run("audit", one, tmp_path / "two.bmp", tmp_path / "three.webp", *args).stdout
        )
    assert [r.get("same_as") for r in records_in(results).values()] == [None, str(one), str(one)]
    assert "3 images: 3 with a key" in run("audit", tmp_path / "*.bmp", one, tmp_path, one, *args).stdout
    one.write_bytes(pictures(house, "unmarked")[0].read_bytes())  # its verdict was that of the others
    run("audit", one, *args)
    with Image.open(tmp_path / "two.bmp") as picture:
        picture.save(tmp_path / "four.png")
    run("audit", tmp_path / "four.png", *args)
    assert records_in(results)[str(tmp_path / "four.png")]["present"] is True


def test_sources_that_cannot_be_reached_are_named(house: Path, tmp_path: Path) -> None:
    args = ["--key", house / "my.key", "-o", tmp_path / "r.jsonl"]
    assert "does not exist; check the name" in refused("audit", tmp_path / "none.tar", *args)
    assert "unknown scheme; give a path" in refused("audit", "nosuch://hunter2@a/b", *args)
    assert "hunter2" not in refused("audit", "http://u:hunter2@127.0.0.1:9/a.png?sig=hunter2", *args)
    (tmp_path / "empty.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    assert "holds no images" in refused("audit", tmp_path / "empty.zip", *args)


def test_pictures_that_are_done_do_not_pile_up(tmp_path: Path) -> None:
    """An endless source of recorded pictures gives its records as they are asked for."""
    done = {"size": 1, "mtime_ns": 1}
    items = (Item(id="a", read=lambda _: [], **done) for _ in count())
    with Results(tmp_path / "results.jsonl", {}) as store:
        store.append({"sample_id": "a", "content": "x", "present": False} | done)
        judge = AuditJudge(identity.verifier([identity.key(1)]), batch=2, keep_noise=False)
        found = _Run(Local(judge, batch=2, workers=0), store, keep_noise=False).records(items)
        assert all(earlier for _, earlier in islice(found, 100))


def test_only_the_first_errors_are_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, house: Path) -> None:
    monkeypatch.setattr("ringmark.watermark.tasks.audit.LISTED_ERRORS", 2)
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    result = run("audit", tmp_path, "--key", house / "my.key", "-o", tmp_path / "results.jsonl", *QUICK)
    lines = result.stderr.splitlines()
    assert len(lines) == 3 and lines[-1] == "2 more unreadable files; the records hold their errors"

"""Which pictures there are: folders are listed once, links out of them are not followed unasked."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ringmark.data.sources import check_folder, find_images, list_images
from ringmark.errors import ImageError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def code(call, path) -> str:
    with pytest.raises(ImageError) as caught:
        call(path)
    assert caught.value.subject == path
    return caught.value.code


def test_images_are_found_in_order(tmp_path):
    for name in ("b.PNG", "a.jpg", "sub/c.WebP", "sub/deep/d.tif", "notes.txt", ".hidden.png", ".cache/e.png", "png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)] == [
        "a.jpg",
        "b.PNG",
        "sub/c.WebP",
        "sub/deep/d.tif",
    ]


def test_what_is_no_image_by_its_name_is_counted_by_suffix(tmp_path):
    touch(tmp_path, "a.jfif", "b.JPE", "c.apng", "notes.txt", "sub/labels.csv", ".hidden")
    touch(tmp_path, "1.heic", "2.HEIC", "sub/3.heic", "noext", "x.tar.gz")
    listing = list_images(tmp_path)
    assert [p.name for p in listing.images] == ["a.jfif", "b.JPE", "c.apng"]
    assert listing.skipped == {".txt": 1, ".csv": 1, ".heic": 3, "": 1, ".gz": 1}
    assert (listing.unlisted, listing.outside) == ([], [])


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "photo.png")
    closed, scandir = tmp_path / "closed", os.scandir
    closed.mkdir()

    def forbid(path):
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "no", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    (error,) = list_images(tmp_path).unlisted
    assert error.path == closed and error.code == "image.unlisted"
    with pytest.raises(ImageError) as caught:
        find_images(tmp_path)
    assert caught.value.code == "image.unlisted"


def test_links_out_of_a_folder_are_followed_only_if_asked(tmp_path):
    touch(tmp_path, "elsewhere/x.png", "set/a.png", "set-b/y.png")
    for name, target in (("one", "elsewhere"), ("two", "elsewhere"), ("c.png", "elsewhere/x.png"), ("near", "set-b")):
        (tmp_path / "set" / name).symlink_to(tmp_path / target)
    (tmp_path / "set" / ".hidden").symlink_to(tmp_path / "elsewhere")
    folder = tmp_path / "set"
    listing = list_images(folder)
    assert listing.images == [folder / "a.png"]
    assert sorted(error.path.name for error in listing.outside) == ["c.png", "near", "one", "two"]
    assert {error.code for error in listing.outside} == {"image.link"} and not listing.skipped
    followed = list_images(folder, follow_links=True)
    assert followed.images == [folder / name for name in ("a.png", "c.png", "near/y.png", "one/x.png")]
    assert not followed.outside and find_images(folder) == listing.images


def test_links_within_a_folder_are_followed_once(tmp_path):
    touch(tmp_path, "set/real/x.png", "set/real/y.png")
    (tmp_path / "set" / "again").symlink_to("real")
    (tmp_path / "set" / "real" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "copy.png").symlink_to("real/x.png")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    for folder in (tmp_path / "set", tmp_path / "link"):
        listing = list_images(folder)
        names = [p.relative_to(folder).as_posix() for p in listing.images]
        assert names == ["again/x.png", "again/y.png", "copy.png"] and not listing.outside


def test_folders_without_images_are_refused(tmp_path):
    touch(tmp_path, "photo.png", "other/a.heic", "other/b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "out").symlink_to(tmp_path / "other")
    assert code(find_images, tmp_path / "missing") == code(check_folder, tmp_path / "missing") == "image.no-folder"
    assert code(find_images, tmp_path / "photo.png") == "image.not-folder"
    assert code(find_images, tmp_path / "other") == code(find_images, tmp_path / "empty") == "image.none"
    for folder, fact in (("other", r"2 .*\.heic"), ("empty", "1 link")):
        with pytest.raises(ImageError, match=fact) as caught:
            find_images(tmp_path / folder)
        assert caught.value.code == "image.none"

"""Labels are read as other tools write them, and matched to records by whatever form of a name they give."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest

from ringmark.data.labels import match_labels, read_labels, read_prompts
from ringmark.errors import EvaluationError, ImageError


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na.png,1\nb.png,0\n",
        "\ufeffPath, Label\r\na.png, Marked\r\n\r\nb.png,UNMARKED\r\n",
        "n,label,path\n1,yes,a.png\n2,no,b.png",
        "path,label\na.png,true\na.png,1\nb.png,False\n",
        '{"a.png": true, "b.png": 0}',
        '\n{"a.png": "yes", "b.png": "False", "a.png": 1}',
        "path,label\na.png,1.0\nb.png,0.0\n",
        "path;label\na.png;1\nb.png;0\n",
        'label;"note, long";path\n1;x;a.png\n0;y;b.png\n',
        "path\tlabel\na.png\t1\nb.png\t0\n",
        "file_name,label\na.png,1\nb.png,0\n",
        "image,path,label\nx,a.png,1\ny,b.png,0\n",
        '{"file_name": "a.png", "label": 1}\n\n{"label": 0.0, "file_name": "b.png"}\n',
        '{"path": "a.png", "label": true}\n{"path": "b.png", "label": false}',
        '[{"path": "a.png", "label": 1},\n {"path": "b.png", "label": "no"}]',
    ],
)
def test_labels_are_read(tmp_path, text):
    path = tmp_path / "labels"
    for encoding in ("utf-8", "utf-16"):
        path.write_text(text.removeprefix("\ufeff") if encoding == "utf-16" else text, encoding=encoding, newline="")
        assert read_labels(path) == {"a.png": True, "b.png": False}


@pytest.mark.parametrize(
    "text",
    [
        "path,label,prompt\na.png,1,a fox\nb.png,0\n",
        'prompt;file_name;label\n"a fox";a.png;1\n',
        '{"file_name": "a.png", "label": 1, "prompt": "a fox"}\n{"file_name": "b.png", "label": 0, "prompt": null}\n',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_are_read_by_the_same_rules(tmp_path, text, encoding):
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding=encoding)
    assert read_prompts(path) == {"a.png": "a fox"} and read_labels(path)["a.png"]
    path.write_text("path,label\na.png,1\n", encoding=encoding)
    assert read_prompts(path) == {}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_json_lines_end_only_at_line_feeds(tmp_path, separator):
    path, name = tmp_path / "labels.jsonl", f"a{separator}b.png"
    line = json.dumps({"path": name, "label": 1}, ensure_ascii=False)
    path.write_text(f"{line}\r\n" + '{"path": "c.png", "label": 0}', encoding="utf-8", newline="")
    assert read_labels(path) == {name: True, "c.png": False}


def test_one_object_in_a_line_is_a_record_only_if_it_names_its_image(tmp_path):
    path = tmp_path / "labels"
    path.write_text('{"path": 1, "label": 0}')
    assert read_labels(path) == {"path": True, "label": False}
    path.write_text('{"path": "x.png", "label": 0}')
    assert read_labels(path) == {"x.png": False}


@pytest.mark.parametrize(
    ("content", "code", "fact"),
    [
        (b"", "empty", "is empty"),
        (b"path,label\n", "empty", "no labels"),
        (b"{}", "empty", "no labels"),
        (b"\n", "header", "line 1"),
        (b"a.png,1\n", "header", "line 1"),
        (b"path,label,label\na,1,1\n", "header", "line 1"),
        (b"path,path,label\na,b,1\n", "header", "line 1"),
        (b"path,label\na.png,1\nb.png,maybe\n", "value", "line 3"),
        (b"path,label\na.png,0.5\n", "value", "line 2"),
        (b"path,label\na.png,nan\n", "value", "line 2"),
        (b"path,label\na.png\n", "damaged", "line 2"),
        (b"path,label\n,1\n", "value", "line 2"),
        (b"path,label\na,1\na,0\n", "contradiction", "line 3"),
        (b"path,label\na,1\n\xff,0\n", "encoding", "line 3"),
        (b"\xff\xfep\0a", "encoding", "UTF-16"),
        (b'path,label\n"a,1\n', "damaged", "line 2"),
        (b'{"a": 1,\n"b" 2}', "damaged", "line 2"),
        (b"[1]", "header", "line 1"),
        (b'[{"path": "a", "label": 1}, 3]', "header", "line 1"),
        (b'{"a": 2}', "value", "'a'"),
        (b'{"a": null}', "value", "'a'"),
        (b'{"a": [1]}', "value", "'a'"),
        (b'{"a": 1, "a": 0}', "contradiction", "'a'"),
        (b'{"file_name": "a", "label": 3}\n', "value", "line 1"),
        (b'{"file_name": "a", "label": 1}\n{"file_name": "a", "label": 0}\n', "contradiction", "line 2"),
        (b'{"a":' * 100_000, "damaged", "not a JSON"),
        (b"P\0A\0", "header", "line 1"),
    ],
)
def test_labels_that_cannot_be_right_are_refused(tmp_path, content, code, fact):
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=fact) as caught:
        read_labels(path)
    assert caught.value.code == f"labels.{code}" and "\n" not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path):
    for path, code in ((tmp_path, "labels.folder"), (tmp_path / "none", "labels.missing")):
        with pytest.raises(ImageError) as caught:
            read_labels(path)
        assert caught.value.code == code


# -- matching ---------------------------------------------------------------------------------------------------------


def labels(path: Path, values: dict[str, int]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def test_labels_are_looked_for_below_their_folders_name_then_as_they_stand(tmp_path):
    file = labels(tmp_path / "marked" / "labels.json", {"a.png": 1, "b.png": 0, "c.png": 1})
    matched = match_labels({"marked/a.png", "a.png", "b.png"}, [file])
    assert matched.labels == {"marked/a.png": True, "b.png": False} and matched.unmatched == ["c.png"]


NFC, NFD = unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png")


@pytest.mark.parametrize(
    ("name", "sample_id"),
    [
        ("./m/a.png", "m/a.png"),
        ("m\\a.png", "m/a.png"),
        (".\\m\\a.png", "m/a.png"),
        ("m//a.png", "m/a.png"),
        ("u/../m/a.png", "m/a.png"),
        ("a\\b.png", "a\\b.png"),
        (NFC, NFD),
        (NFD, NFC),
        (f"m\\{NFC}", f"m/{NFD}"),
        ("\udcff.png", "\udcff.png"),
    ],
)
def test_other_forms_of_a_name_match(tmp_path, name, sample_id):
    matched = match_labels({sample_id, "x.png"}, [labels(tmp_path / "labels.json", {name: 1})])
    assert matched == ({sample_id: True}, [])


def test_an_exact_name_goes_before_another_form_of_it(tmp_path):
    file = labels(tmp_path / "labels.json", {NFC: 1, NFD: 0})
    assert match_labels({NFC, NFD}, [file]).labels == {NFC: True, NFD: False}
    file = labels(tmp_path / "labels.json", {f"./{NFC}": 1, NFD: 0})
    assert match_labels({NFC, NFD}, [file]) == ({NFD: False}, [f"./{NFC}"])


def test_absolute_paths_match_below_the_audited_folder_or_beside_the_labels(tmp_path):
    audited, elsewhere = tmp_path / "audited", tmp_path / "elsewhere"
    names = {str(audited / "m" / "a.png"): 1, str(audited / "u" / "b.png"): 0, str(elsewhere / "m" / "a.png"): 0}
    file = labels(elsewhere / "labels.json", names)
    ids = {"m/a.png", "u/b.png"}
    matched = match_labels({*ids, "elsewhere/m/a.png"}, [file], folders=[audited])
    assert matched == ({"m/a.png": True, "u/b.png": False, "elsewhere/m/a.png": False}, [])
    with pytest.raises(EvaluationError) as caught:
        match_labels({"x.png"}, [file], folders=[audited])
    assert caught.value.code == "labels.unmatched" and caught.value.details["example"] == "x.png"
    if hasattr(os, "symlink"):
        (audited / "m").mkdir(parents=True)
        (tmp_path / "link").symlink_to(audited)
        file = labels(elsewhere / "labels.json", {str(tmp_path / "link" / "m" / "a.png"): 1})
        assert match_labels(ids, [file], folders=[audited]).labels == {"m/a.png": True}
        assert match_labels(ids, [file], folders=[tmp_path / "link"]).labels == {"m/a.png": True}


def test_labels_that_contradict_each_other_are_refused(tmp_path):
    one, other = (labels(tmp_path / f"{name}.json", {"a.png": i}) for i, name in enumerate(("one", "other")))
    with pytest.raises(EvaluationError) as caught:
        match_labels({"a.png"}, [one, other])
    assert caught.value.code == "labels.contradiction" and caught.value.subject == other
    both = labels(tmp_path / "both.json", {"a.png": 1, "./a.png": 0})
    with pytest.raises(EvaluationError, match=r"a\.png") as caught:
        match_labels({"a.png"}, [both])
    assert caught.value.code == "labels.contradiction"


def test_labels_in_another_encoding_are_refused_with_its_name(tmp_path):
    (tmp_path / "labels.csv").write_bytes("path,label\nbär.png,1\n".encode("latin-1"))
    with pytest.raises(ImageError) as caught:
        read_labels(tmp_path / "labels.csv")
    assert caught.value.code == "labels.encoding" and caught.value.fact == "line 2 is not UTF-8 text"

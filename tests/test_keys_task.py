"""A line a key, whatever is in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from identity import key, secret

from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.base import DEFAULT
from ringmark.watermark.tasks.keys import card, listing


def test_a_listing_is_a_line_a_key_whatever_is_in_it():
    keys = {Path(f"{seed}.key"): key(seed) for seed in range(3)}
    odd = Key(keys[Path("0.key")].metadata | {"model": {"name": "a\nb\x1b[2J"}}, secret(9))
    lines = listing(keys | {Path("odd.key"): odd})
    assert len(lines) == 5 and r"a\nb\x1b[2J" in lines[-1] and lines[0].startswith("fingerprint")


def test_the_fields_of_a_scheme_are_columns_as_its_parameters_are_written():
    rings = {Path("a.key"): key(1), Path("b.key"): key(2, "rand", radii=(3, 10))}
    header, *lines = (line.split() for line in listing(rings))
    assert header == ["fingerprint", "scheme", "pattern", "mask", "channels", "radii", "model", "created", "file"]
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert [row["channels"] for row in rows] == ["0,2"] * 2 and [row["radii"] for row in rows] == ["2-8", "3-10"]
    assert [row["pattern"] for row in rows] == ["ring", "rand"] and {row["scheme"] for row in rows} == {DEFAULT}
    assert [row["fingerprint"] for row in rows] == [made.fingerprint for made in rings.values()]
    assert [row["file"] for row in rows] == ["a.key", "b.key"]


def test_keys_of_an_unknown_scheme_are_listed_beside_others():
    own = {"scheme": "unheard-of", "latent_shape": [1, 2, 2], "model": {}, "created": "now", "strength": 3}
    lines = listing({Path("a.key"): key(1), Path("b.key"): Key(own, values=np.ones(3, np.float32))})
    assert "strength" in lines[0] and "unheard-of" in lines[2] and "?" in lines[2] and lines[2].endswith("b.key")


def test_a_card_names_the_model_and_shows_fields_as_options_take_them():
    facts = dict(line.split(None, 1) for line in card(key(1)))
    assert facts["channels"] == "0,2" and facts["radii"] == "2-8" and facts["commitment"] == key(1).commitment
    assert "(fingerprint " in facts["model"] and "{" not in facts["model"] + facts["kind"]
    assert facts["kind"] == "identity (3 channels, factor 1)" and facts["reference"] == "32x32 pixels"

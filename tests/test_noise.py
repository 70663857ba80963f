"""Marked noise in a file, without a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from identity import key, secret
from safetensors import safe_open
from safetensors.torch import load_file
from shell import refused, run

from ringmark.errors import ModelError, SchemeError, StoreError
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.base import make_key, scheme_of
from ringmark.watermark.tasks.noise import write_noise

FLUX = {"family": "flux.1", "channels": 16, "factor": 8}


def flux_key() -> Key:
    return make_key(
        "tree-ring", kind=FLUX, reference=(256, 256), model={}, secret=secret(1), channels=(3,), radii=(2, 5)
    )


def test_the_file_holds_the_noise_of_each_seed_with_the_mark(tmp_path: Path) -> None:
    mine, path = flux_key(), tmp_path / "noise.safetensors"
    assert write_noise(mine, path, [4, 5], size=(256, 384)) == (16, 32, 48)
    scheme = scheme_of(mine, (16, 32, 48))
    assert torch.equal(load_file(path)["noise"], scheme.embed(initial_noise([4, 5], (16, 32, 48))))
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["ringmark"])
    assert about == {"key": mine.fingerprint, "kind": FLUX, "size": [256, 384], "seeds": [4, 5]}
    assert path.stat().st_mode & 0o077 == 0


def test_the_size_is_the_keys_own_unless_given(tmp_path: Path) -> None:
    assert write_noise(key(1), tmp_path / "n.safetensors", [0]) == (3, 32, 32)


@pytest.mark.parametrize("size", [(256, 264), (0, 256), (8, 8)])
def test_sides_are_multiples_of_a_patch(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ModelError) as caught:
        write_noise(flux_key(), tmp_path / "n.safetensors", [0], size=size)
    assert caught.value.code == "model.size" and caught.value.details["multiple"] == 16
    assert not list(tmp_path.iterdir())


def test_an_old_key_has_one_size(tmp_path: Path) -> None:
    new = flux_key()
    metadata = {name: value for name, value in new.metadata.items() if name not in ("kind", "reference")}
    values = torch.view_as_real(scheme_of(new).spectrum).float().numpy()
    old = Key(metadata | {"latent_shape": [16, 32, 32]}, values=np.ascontiguousarray(values))
    assert write_noise(old, tmp_path / "n.safetensors", [0]) == (16, 32, 32)
    with pytest.raises(SchemeError) as caught:
        write_noise(old, tmp_path / "m.safetensors", [0], size=(256, 384))
    assert caught.value.code == "scheme.old-key"


def test_a_file_is_replaced_by_force_only(tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    write_noise(key(1), path, [0])
    before = path.read_bytes()
    with pytest.raises(StoreError):
        write_noise(key(1), path, [1])
    assert path.read_bytes() == before
    write_noise(key(1), path, [1], force=True)
    assert path.read_bytes() != before


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    mine, path = tmp_path / "my.key", tmp_path / "n.safetensors"
    flux_key().save(mine)
    done = run("noise", "--key", mine, "--size", "384x256", "-n", 2, "-o", path)
    assert done.stdout == f"2 marked noise samples of shape 16x32x48 in {path}. Keep it secret.\n"
    assert "multiples of 16" in refused("noise", "--key", mine, "--size", "100x100", "-o", tmp_path / "m.safetensors")
    assert "--force" in refused("noise", "--key", mine, "-o", path)

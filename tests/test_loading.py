"""Models are read from where they lie; what is missing, damaged or dangerous is refused in one line."""

from __future__ import annotations

import copy as copying
import pickle
import shutil
from pathlib import Path

import pytest
from checkpoints import WEIGHTS, refused
from safetensors.torch import load_file, save_file

from ringmark.errors import ModelError
from ringmark.inversion.models.loading import resolve
from ringmark.inversion.models.pipeline import LatentModel


def test_text_encoders_saved_by_either_version_load(copy):
    before = LatentModel.from_pretrained(copy).identity
    path = copy / "text_encoder" / WEIGHTS["text_encoder"]
    bare = {k.removeprefix("text_model."): v for k, v in load_file(path).items()}
    for prefix in ("", "text_model."):
        save_file({prefix + k: v for k, v in bare.items()}, path, metadata={"format": "pt"})
        assert LatentModel.from_pretrained(copy).identity == before


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere/to/be/found"])
def test_a_folder_that_is_missing(source):
    refused(source, "model.not-one")


def test_a_folder_or_file_that_is_no_model(tmp_path):
    refused(tmp_path, "model.not-one", "model_index.json")
    (tmp_path / "model.safetensors").touch()
    refused(tmp_path / "model.safetensors", "model.not-one")


@pytest.mark.parametrize("source", ["somebody/some-model", "some-model"])
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")
def test_a_hub_id_that_cannot_be_reached(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(source, "model.unreachable")


def test_a_relative_or_home_folder_is_found(copy, monkeypatch):
    fingerprint = LatentModel.from_pretrained(copy).identity["fingerprint"]
    monkeypatch.chdir(copy)
    here = LatentModel.from_pretrained(".")
    assert here.name == "copy" and here.identity["fingerprint"] == fingerprint
    monkeypatch.setenv("HOME", str(copy.parent))
    assert resolve("~/copy") == str(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_missing(copy, part):
    shutil.rmtree(copy / part)
    refused(copy, "model.damaged")


@pytest.mark.parametrize("damage", ["cut", "garbage"])
@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_that_are_damaged(copy, part, damage):
    path = copy / part / WEIGHTS[part]
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"garbage " * 99}[damage])
    refused(copy, "model.damaged")


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("change", ["lost", "reshaped"])
def test_weights_that_are_not_all_there(copy, part, change):
    """The libraries would fill the gap with random numbers."""
    path = copy / part / WEIGHTS[part]
    weights = load_file(path)
    key = sorted(weights)[0]
    lost = weights.pop(key)
    save_file(weights | ({} if change == "lost" else {key: lost[:1]}), path, metadata={"format": "pt"})
    message = refused(copy, "model.damaged")
    assert change == "reshaped" or "missing" in message


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("part", WEIGHTS)
def test_nothing_is_unpickled(copy, part):
    (copy / part / WEIGHTS[part]).unlink()
    exploded = copy / "exploded"
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "diffusion_pytorch_model.pth"):
        (copy / part / name).write_bytes(pickle.dumps(Bomb(exploded)))
    refused(copy, "model.damaged")
    assert not exploded.exists()


@pytest.mark.parametrize(
    "path",
    [f"{part}/config.json" for part in WEIGHTS] + ["scheduler/scheduler_config.json", "tokenizer/tokenizer.json"],
)
@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000], ids=["cut", "list", "nested"])
@pytest.mark.filterwarnings("ignore:It is deprecated to pass")
def test_configs_that_are_damaged(copy, path, content):
    (copy / path).write_text(content)
    refused(copy, "model.damaged")


def test_a_damaged_recovery_is_named(copy):
    (copy / "noise_recovery.json").write_text("{")
    with pytest.raises(ModelError) as caught:
        LatentModel.from_pretrained(copy)
    assert (caught.value.code, caught.value.subject) == ("model.recovery-damaged", copy / "noise_recovery.json")


def test_a_tokenizer_beyond_its_text_encoder(copy, tiny_parts):
    tokenizer = copying.deepcopy(tiny_parts["tokenizer"])
    tokenizer.add_tokens(["<mine>"])
    tokenizer.save_pretrained(copy / "tokenizer")
    refused(copy, "model.damaged", str(len(tokenizer)), str(len(tokenizer) - 1))


def test_loading_is_silent_and_leaves_the_libraries_as_they_were(copy, capfd):
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in (ours, theirs)]
    LatentModel.from_pretrained(copy)
    shutil.rmtree(copy / "vae")
    refused(copy, "model.damaged")
    assert [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in (ours, theirs)] == before
    assert capfd.readouterr() == ("", "")

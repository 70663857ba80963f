"""Models as tasks load them: without text encoders where they are not needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import edit
from families import build
from identity import MODEL, verifier
from identity import key as make_key

from ringmark.errors import KeyFileError, ModelError, SchemeError
from ringmark.inversion.models.loading import quiet
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.keys.key import Key
from ringmark.watermark.tasks import load


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's cache folder, which does not exist yet."""
    monkeypatch.setenv("RINGMARK_CACHE", str(tmp_path / "user"))
    load.load_model.cache_clear()
    yield tmp_path / "user"
    load.load_model.cache_clear()


@pytest.fixture
def encoded(monkeypatch):
    """How often an empty prompt has been encoded."""
    calls = []
    real = load.empty_prompt
    monkeypatch.setattr(load, "empty_prompt", lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    return calls


def lean(source, **options):
    """The model without text encoders, loaded anew."""
    load.load_model.cache_clear()
    return load.load_model(str(source), text=False, **options)


def test_the_empty_prompt_is_encoded_once(copy, folder, encoded):
    whole, first, second = load.load_model(str(copy)), lean(copy), lean(copy)
    assert len(encoded) == 1 and len(list(folder.rglob("*.safetensors"))) == 1
    assert first.pipe.text_encoder is second.pipe.text_encoder is None and first.identity == whole.identity
    for model in (first, second):
        assert torch.equal(model.empty["prompt_embeds"], whole.empty["prompt_embeds"])


def test_a_model_keeps_its_text_encoders_to_draw(copy, folder, encoded):
    assert load.load_model(str(copy)).pipe.text_encoder is not None
    assert not encoded and not folder.exists()


def test_lists_and_masks_are_kept_too(tmp_path, folder, encoded):
    for name in ("z-image", "qwen-image"):
        with quiet():
            build(name).save_pretrained(tmp_path / name)
        first, second = lean(tmp_path / name).empty, lean(tmp_path / name).empty
        assert set(first) == set(second)
        for key, values in first.items():
            assert type(values) is type(second[key]) and all(map(torch.equal, values, second[key]))
    assert len(encoded) == 2


def test_what_decides_the_embedding_decides_the_file(copy, folder, encoded):
    lean(copy)
    lean(copy, dtype="bfloat16")
    edit(copy / "unet" / "config.json", act_fn="gelu")
    lean(copy)
    assert len(encoded) == 2
    edit(copy / "text_encoder" / "config.json", hidden_act="gelu")
    lean(copy)
    assert len(encoded) == 3


@pytest.mark.parametrize("place", ["/dev/null/cache", "file"])
def test_a_folder_that_cannot_be_used_is_no_error(copy, folder, encoded, monkeypatch, tmp_path, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RINGMARK_CACHE", str(tmp_path / place))
    assert lean(copy).pipe.text_encoder is None and len(encoded) == 1
    assert lean(copy).pipe.text_encoder is None and len(encoded) == 2


def test_a_damaged_file_is_made_again(copy, folder, encoded):
    lean(copy)
    file = next(folder.rglob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert lean(copy).pipe.text_encoder is None and len(encoded) == 2 and file.read_bytes() == content


def test_a_model_that_cannot_be_loaded(folder):
    with pytest.raises(ModelError) as caught:
        lean("somebody/some-model")
    assert caught.value.code == "model.unreachable" and not Path(folder).exists()


@pytest.mark.parametrize("radii", [[-5, -1], [2.5, 3.5], [9, 3]])
def test_of_many_keys_one_that_makes_no_sense_is_named(tmp_path, radii):
    for seed in range(3):
        make_key(seed).save(tmp_path / f"{seed}.key")
    good = make_key(3)
    Key(good.metadata | {"radii": radii}, good.secret).save(tmp_path / "odd.key")
    with pytest.raises(KeyFileError) as caught:
        load.load_keys(tmp_path)
    assert (caught.value.code, caught.value.subject) == ("key.description", tmp_path / "odd.key")


def test_a_device_without_values_is_refused():
    with pytest.raises(ModelError) as caught:
        load.load_model(device="meta")
    assert caught.value.code == "model.device"


def test_a_key_of_power_alone_needs_a_calibration():
    """Its p is too small without ranks, at the native size as at others."""
    zeros, options = make_key(1, "zeros"), {"model": MODEL, "method": "encoder", "steps": 2, "alpha": 0.05}
    with pytest.raises(SchemeError) as caught:
        load.load_verifier([make_key(1), zeros], **options)
    assert caught.value.code == "scheme.unranked"
    settings = verifier(method="encoder").recoverer.settings.as_dict()
    made = Calibration.measure(initial_noise(list(range(20)), MODEL.latent_shape), settings, {"given": 20})
    assert load.load_verifier(zeros, calibration=made, **options).verifier.keys == [zeros]

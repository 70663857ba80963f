"""Models are read from where they lie; what is missing, damaged or dangerous is refused in one line."""

from __future__ import annotations

import copy as copying
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import WEIGHTS, edit, refused
from families import build
from safetensors.torch import load_file, save_file

from ringmark.errors import ModelError
from ringmark.inversion.models.loading import load_pipeline, quiet, resolve
from ringmark.inversion.models.pipeline import LatentModel, empty_prompt


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
    for name, code in (("model.txt", "not-one"), ("model.ckpt", "pickled"), ("model.safetensors", "no-configs")):
        (tmp_path / name).touch()
        refused(tmp_path / name, f"model.{code}")


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
    refused(copy, "model.incomplete", part)


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
    refused(copy, "model.pickled", part)
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
    refused(copy, "model.incomplete")
    assert [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in (ours, theirs)] == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("part", "entry", "code"),
    [
        ("vae", ["diffusers", "Nonesuch"], "part"),
        ("scheduler", ["diffusers", "Nonesuch"], "part"),
        ("unet", ["mine", "UNet2DConditionModel"], "part"),
        ("text_encoder", ["transformers", "AutoModel.from_pretrained"], "part"),
        ("unet", ["diffusers"], "part"),
        ("vae", ["diffusers", "UNet2DConditionModel"], "damaged"),
        ("unet", [None, None], "incomplete"),
    ],
)
def test_a_part_of_a_wrong_class(copy, part, entry, code):
    edit(copy / "model_index.json", **{part: entry})
    refused(copy, f"model.{code}")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("Nonesuch", "model.family"),
        ("DDIMScheduler", "model.family"),
        ("StableDiffusionControlNetPipeline", "model.incomplete"),
        ("StableDiffusionUpscalePipeline", "model.family"),
        (["pipeline", "Mine"], "model.damaged"),
        (None, "model.damaged"),
    ],
)
def test_a_pipeline_of_a_wrong_class(copy, name, code):
    edit(copy / "model_index.json", _class_name=name)
    refused(copy, code)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_not_named(copy, part):
    index = json.loads((copy / "model_index.json").read_text())
    del index[part]
    (copy / "model_index.json").write_text(json.dumps(index))
    refused(copy, "model.incomplete", part)


def test_text_parts_are_loaded_only_if_needed(copy):
    pipe = load_pipeline(copy, text=False)
    assert pipe.text_encoder is None and pipe.tokenizer is None and pipe.unet.config.sample_size == 8
    shutil.rmtree(copy / "text_encoder")
    assert load_pipeline(copy, text=False).vae is not None


def test_what_draws_no_picture_is_never_loaded(copy):
    edit(copy / "model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    pipe = load_pipeline(copy)
    assert pipe.safety_checker is pipe.feature_extractor is pipe.image_encoder is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_have_the_dtype_asked_for(copy, dtype):
    pipe = load_pipeline(copy, dtype=dtype)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {dtype}
    assert not (pipe.unet.training or pipe.vae.training or pipe.text_encoder.training)


@pytest.mark.parametrize("length", [None, 10_000, 20])
def test_a_tokenizer_has_at_most_the_length_of_its_encoder(copy, length):
    path = copy / "tokenizer" / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "model_max_length"}
    path.write_text(json.dumps(config if length is None else config | {"model_max_length": length}))
    pipe = load_pipeline(copy)
    assert pipe.tokenizer.model_max_length == min(length or 77, pipe.text_encoder.config.max_position_embeddings)


def test_a_flow_stored_as_stable_diffusion(copy):
    from ringmark.inversion.models.flow import RectifiedFlowPipeline

    edit(copy / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    assert type(load_pipeline(copy)) is RectifiedFlowPipeline


def test_no_code_of_a_model_is_run(copy):
    (copy / "pipeline.py").write_text("from pathlib import Path\nPath('exploded').touch()\n")
    edit(copy / "model_index.json", _class_name=["pipeline", "Mine"], custom_pipeline="pipeline")
    edit(copy / "text_encoder" / "config.json", auto_map={"AutoModel": "mine.Mine"})
    (copy / "text_encoder" / "mine.py").write_text("from pathlib import Path\nPath('exploded').touch()\n")
    refused(copy, "model.damaged")
    edit(copy / "model_index.json", _class_name="StableDiffusionPipeline")
    load_pipeline(copy)
    assert not Path("exploded").exists()


def test_the_fingerprint_does_not_depend_on_the_dtype(copy):
    models = [LatentModel.from_pretrained(copy, dtype=dtype) for dtype in (torch.float32, torch.float16)]
    assert models[0].identity == models[1].identity
    assert [model.network.dtype for model in models] == [torch.float32, torch.float16]
    assert [model.pipe.text_encoder.dtype for model in models] == [torch.float32, torch.float16]


@pytest.mark.parametrize("name", ["stable-diffusion", "sdxl", "z-image", "qwen-image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_empty_prompt_needs_its_text_encoders_alone(tmp_path, name, dtype):
    with quiet():
        build(name).save_pretrained(tmp_path)
    rows = empty_prompt(tmp_path, dtype=dtype)
    whole = LatentModel.from_pretrained(tmp_path, dtype=dtype)
    lean = LatentModel.from_pretrained(tmp_path, dtype=dtype, text=False, empty=rows)
    assert lean.identity == whole.identity and lean.pipe.text_encoder is None
    for found, expected in zip(lean.empty.values(), whole.empty.values(), strict=True):
        assert all(map(torch.equal, found, expected)) and [x.dtype for x in found] == [x.dtype for x in expected]


def test_there_is_nothing_to_offload_to_on_a_cpu(copy):
    for offload in ("model", "sequential"):
        with pytest.raises(ModelError) as caught:
            LatentModel.from_pretrained(copy, device="cpu", offload=offload)
        assert (caught.value.code, caught.value.subject) == ("model.offload", copy)

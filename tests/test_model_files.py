"""Where a model's files lie: variants, shards, the hub's cache and single files."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from checkpoints import edit, refused
from original import original
from safetensors.torch import load_file, save_file

from ringmark.errors import ModelError
from ringmark.inversion.models import model_files
from ringmark.inversion.models.loading import load_pipeline

UNET = "unet/diffusion_pytorch_model"


def equal(a, b):
    """Whether two pipelines have the same weights."""
    return all(
        torch.equal(x, y)
        for part in ("unet", "vae", "text_encoder")
        for x, y in zip(getattr(a, part).parameters(), getattr(b, part).parameters(), strict=True)
    )


def rename(folder, variant):
    for path in list(folder.glob("*/*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", f".{variant}.safetensors")))


@pytest.fixture
def hub(copy, tmp_path, monkeypatch):
    """The copy as me/tiny in the cache of the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    repository, commit = tmp_path / "hub" / "models--me--tiny", "0" * 39 + "1"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    return copy.rename(repository / "snapshots" / commit)


@pytest.mark.parametrize("variant", ["fp16", "mine"])
def test_a_variant_alone_is_loaded(copy, small, variant):
    rename(copy, variant)
    assert equal(load_pipeline(copy), load_pipeline(small))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_full_weights_come_before_variants(copy, small, dtype):
    half = {key: value.half() + 1 for key, value in load_file(copy / f"{UNET}.safetensors").items()}
    save_file(half, copy / f"{UNET}.fp16.safetensors", metadata={"format": "pt"})
    assert equal(load_pipeline(copy, dtype=dtype), load_pipeline(small, dtype=dtype))


def test_the_variant_of_the_dtype_comes_before_others():
    names = ["model.bf16.safetensors", "model.fp16.safetensors", "model.ema.safetensors"]
    assert model_files.choose(names, torch.float16) == ("fp16", names[1:2])
    assert model_files.choose(names, torch.float32) == ("bf16", names[:1])
    assert model_files.choose([], torch.float32) == (None, [])


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files(small, tmp_path, variant):
    pipe = load_pipeline(small)
    pipe.save_pretrained(tmp_path / "model", max_shard_size="20KB", variant=variant)
    shards = sorted((tmp_path / "model" / "unet").glob("*.safetensors"))
    assert len(shards) > 2 and equal(load_pipeline(tmp_path / "model"), pipe)
    shards[1].unlink()
    refused(tmp_path / "model", "model.incomplete", "unet", shards[1].name)


@pytest.mark.parametrize("content", ["{}", "[]", "{"])
def test_a_damaged_list_of_files(copy, content):
    (copy / f"{UNET}.safetensors.index.json").write_text(content)
    refused(copy, "model.damaged", "diffusion_pytorch_model.safetensors.index.json")


@pytest.mark.parametrize("name", ["me/tiny", "me/tiny@main", "me/tiny@" + "0" * 39 + "1"])
def test_a_model_in_the_cache_of_the_hub(hub, small, name):
    rename(hub, "fp16")
    assert equal(load_pipeline(name), load_pipeline(small))


def test_a_revision_that_is_not_in_the_cache(hub):
    refused("me/tiny@other", "model.unreachable")


def test_the_rest_of_an_interrupted_download_is_downloaded(hub, small, monkeypatch):
    import huggingface_hub

    weights = hub / f"{UNET}.safetensors"
    weights.unlink()
    refused("me/tiny", "model.unreachable")
    names = [str(path.relative_to(small)) for path in small.rglob("*.*") if path.is_file()]
    info = SimpleNamespace(sha="1", siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)

    def fetch(repository, *, revision, allow_patterns):
        assert (repository, revision, sorted(allow_patterns)) == ("me/tiny", "1", sorted(names))
        shutil.copy(small / f"{UNET}.safetensors", weights)
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert equal(load_pipeline("me/tiny"), load_pipeline(small))


def test_of_a_repository_only_what_is_needed_is_downloaded():
    parts = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt"]
    spare = ["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "all.safetensors"]
    spare += ["safety_checker/model.safetensors", "unet/openvino/model.bin", "README.md", "pipeline.py"]
    here = model_files.ModelFiles("me/tiny", model_files.POCKET)
    assert model_files.wanted(here, ["model_index.json", *parts, *spare], torch.float16) == ["model_index.json", *parts]
    for names, code in ((["README.md"], "not-one"), (["model_index.json", "unet/x.bin"], "pickled")):
        with pytest.raises(ModelError) as caught:
            model_files.wanted(here, names, torch.float32)
        assert caught.value.code == f"model.{code}"


@pytest.mark.parametrize("beside", [True, False])
def test_a_single_file_in_the_layout_of_its_authors(copy, small, beside):
    """The configs are in the folder of the same name, or in the folder with the file."""
    pipe = load_pipeline(small)
    for weights in copy.glob("*/*.safetensors"):
        weights.unlink()
    file = (copy.parent if beside else copy) / "copy.safetensors"
    save_file(original(pipe), file, metadata={"format": "pt"})
    assert equal(load_pipeline(file), pipe)
    assert load_pipeline(file, text=False).text_encoder is None


def test_a_single_file_with_the_network_alone(copy, small):
    """In the layout of diffusers; the other parts are those of the folder."""
    file = copy / "mine.safetensors"
    changed = {key: value + 1 for key, value in load_file(copy / f"{UNET}.safetensors").items()}
    save_file(changed, file, metadata={"format": "pt"})
    found, pipe = load_pipeline(file), load_pipeline(small)
    assert all(torch.equal(value, changed[key]) for key, value in found.unet.state_dict().items())
    found.unet = pipe.unet
    assert equal(found, pipe)


@pytest.mark.parametrize("which", ["first_stage_model.", "cond_stage_model.", "model."])
def test_a_single_file_with_a_gap(copy, small, which):
    tensors = original(load_pipeline(small))
    del tensors[sorted(key for key in tensors if key.startswith(which) and key.endswith("weight"))[-1]]
    save_file(tensors, copy / "mine.safetensors", metadata={"format": "pt"})
    refused(copy / "mine.safetensors", "model.damaged")


def test_a_single_file_that_is_cut_off(copy):
    weights = (copy / f"{UNET}.safetensors").read_bytes()
    (copy / "mine.safetensors").write_bytes(weights[:-1])
    refused(copy / "mine.safetensors", "model.damaged")


def test_a_single_file_without_configs(tmp_path):
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "mine.safetensors")
    refused(tmp_path / "mine.safetensors", "model.no-configs", "model_index.json")


def test_the_digest_of_the_text_parts(copy, small):
    digest = model_files.locate(small).text_digest()
    assert model_files.locate(copy).text_digest() == digest
    edit(copy / "unet" / "config.json", act_fn="gelu")
    assert model_files.locate(copy).text_digest() == digest
    assert model_files.locate(copy).text_digest([copy / "model_index.json"]) != digest
    weights = copy / "text_encoder" / "model.safetensors"
    save_file({k: v + 1 for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert model_files.locate(copy).text_digest() != digest


def test_the_digest_of_a_large_file_samples_all_of_it(copy):
    large, digests = copy / "tokenizer" / "large.bin", set()
    content = bytearray(3 * model_files.WHOLE)
    for changed in (None, 0, 3 * model_files.WHOLE // 2, len(content) - model_files.WHOLE // 32):
        if changed is not None:
            content[changed : changed + model_files.WHOLE // 32] = b"x" * (model_files.WHOLE // 32)
        large.write_bytes(content)
        digests.add(model_files.locate(copy).text_digest())
    assert len(digests) == 4

"""A LoRA is fused exactly, or refused."""

from __future__ import annotations

import pytest
import torch
from checkpoints import draw
from safetensors.torch import save_file

from ringmark.errors import ModelError
from ringmark.inversion.models.loading import load_pipeline
from ringmark.inversion.models.lora import split_scale

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def matrices(pairs, path):
    """A LoRA of rank 2 for weights of these names and shapes; the products B A by name."""
    tensors, products = {}, {}
    for seed, (name, (rows, columns)) in enumerate(pairs.items()):
        a, b = draw(2, columns, seed=2 * seed), draw(rows, 2, seed=2 * seed + 1)
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        products[name] = b @ a
    save_file(tensors, path)
    return products


@pytest.fixture
def lora(small, tmp_path):
    unet = load_pipeline(small, text=False).unet
    return tmp_path / "a.safetensors", tuple(unet.get_submodule(ATTENTION).weight.shape)


def refused(small, path, *words):
    with pytest.raises(ModelError) as caught:
        load_pipeline(small, loras=[path])
    assert caught.value.subject == path and "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    return caught.value.code


@pytest.mark.parametrize(("suffix", "scale"), [("", 1.0), (":0.5", 0.5), (":-2", -2.0)])
def test_a_lora_is_fused(small, lora, suffix, scale):
    path, shape = lora
    change = matrices({f"unet.{ATTENTION}": shape}, path)[f"unet.{ATTENTION}"]
    before, after = load_pipeline(small), load_pipeline(small, loras=[f"{path}{suffix}"])
    weight, expected = after.unet.get_submodule(ATTENTION).weight, before.unet.get_submodule(ATTENTION).weight
    assert torch.allclose(weight, expected + scale * change, atol=1e-5)
    assert set(after.unet.state_dict()) == set(before.unet.state_dict())


def test_several_are_added(small, lora):
    path, shape = lora
    change = matrices({f"unet.{ATTENTION}": shape}, path)[f"unet.{ATTENTION}"]
    before, after = load_pipeline(small), load_pipeline(small, loras=[path, f"{path}:2"])
    weight, expected = after.unet.get_submodule(ATTENTION).weight, before.unet.get_submodule(ATTENTION).weight
    assert torch.allclose(weight, expected + 3 * change, atol=1e-4)


def test_one_for_the_text_encoder_too(small, lora):
    path, shape = lora
    change = matrices({f"unet.{ATTENTION}": shape, f"text_encoder.{TEXT}": (16, 16)}, path)
    before, after = load_pipeline(small), load_pipeline(small, loras=[path])
    name = TEXT if hasattr(after.text_encoder, "text_model") else TEXT.removeprefix("text_model.")
    weight, expected = (pipe.text_encoder.get_submodule(name).weight for pipe in (after, before))
    assert torch.allclose(weight, expected + change[f"text_encoder.{TEXT}"], atol=1e-5)
    without = load_pipeline(small, loras=[path], text=False)
    assert torch.equal(without.unet.get_submodule(ATTENTION).weight, after.unet.get_submodule(ATTENTION).weight)


def test_one_of_another_base_is_refused(small, lora):
    path, (rows, columns) = lora
    elsewhere = "unet.down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q"
    for pairs in (
        {elsewhere: (rows, columns)},
        {f"unet.{ATTENTION}": (rows, columns), elsewhere: (rows, columns)},
        {f"unet.{ATTENTION}": (2 * rows, columns)},
        {"transformer.transformer_blocks.0.attn.to_q": (rows, columns)},
    ):
        matrices(pairs, path)
        assert refused(small, path, "another base") == "model.lora"


def test_files_that_are_no_lora(small, tmp_path):
    path = tmp_path / "a.safetensors"
    assert refused(small, path) == "model.lora-missing"
    path.write_bytes(b"garbage " * 9)
    assert refused(small, path) == "model.lora"
    save_file({"conv_in.weight": torch.zeros(3)}, path)
    assert refused(small, path) == "model.lora"


def test_the_package_is_named_if_it_is_missing(small, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.is_peft_available", lambda: False)
    assert refused(small, tmp_path / "a.safetensors", "peft") == "model.no-peft"


def test_a_scale_follows_a_colon(tmp_path):
    assert split_scale("a.safetensors:0.8") == (type(tmp_path)("a.safetensors"), 0.8)
    assert split_scale(tmp_path / "b:c.safetensors") == (tmp_path / "b:c.safetensors", 1.0)

"""The training script: a run that is killed goes on as if it had not been, and every word of a caption is one token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ringmark.data.scenes import scene
from scripts import train_pocket as script


def start(path: Path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 1))
    run = script.Run(path, {"net": net}, lr=1e-2)

    def loss(step: int, dies_at: int | None = None) -> torch.Tensor:
        if step == dies_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=script.generator(step, 1))
        return (net(x) - x.sum(1, keepdim=True)).square().mean()

    return run, loss


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    whole, loss = start(tmp_path / "whole.safetensors")
    whole.train(loss, 10, lambda: None, every=3)
    killed, loss = start(tmp_path / "killed.safetensors")
    with pytest.raises(KeyboardInterrupt):
        killed.train(lambda step: loss(step, dies_at=8), 10, lambda: None, every=3)
    again, loss = start(tmp_path / "killed.safetensors")
    assert again.step == 6
    again.train(loss, 10, lambda: None, every=3)
    for one, other in zip(whole.net.state_dict().values(), again.net.state_dict().values(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert all(torch.allclose(whole.ema[k], again.ema[k], atol=1e-6) for k in whole.ema)
    assert again.step == 10 and again.seconds > 0 and not list(tmp_path.glob("*.tmp"))


def test_pictures_are_drawn_with_averaged_weights_and_training_goes_on_with_its_own(tmp_path):
    run, loss = start(tmp_path / "run.safetensors")
    seen = []
    run.train(loss, 3, lambda: seen.append(run.net.state_dict()["net.0.weight"].clone()), every=1)
    assert torch.equal(seen[-1], run.ema["net.0.weight"])
    assert not torch.equal(run.net.state_dict()["net.0.weight"], run.ema["net.0.weight"])


def test_every_word_of_a_caption_is_one_token():
    captions = [scene(i, 16).caption for i in range(300)]
    tokenizer = script.make_tokenizer(captions)
    for text in captions[::10]:
        assert len(tokenizer.tokenize(text)) == len(text.replace(",", " ,").split())
    ids = tokenizer(["", captions[0]], padding="max_length", truncation=True).input_ids
    assert [len(x) for x in ids] == [script.CONTEXT] * 2 and ids[0] != ids[1]
    longest = max(captions, key=lambda text: len(tokenizer.tokenize(text)))
    assert len(tokenizer.tokenize(longest)) + 2 <= script.CONTEXT
    assert (
        tokenizer.unk_token_id not in tokenizer(longest).input_ids[1:-1]
        or tokenizer.unk_token_id == tokenizer.eos_token_id
    )


def test_the_modules_fit_together():
    tokenizer = script.make_tokenizer([scene(0, 16).caption])
    text = script.make_text_encoder(tokenizer)
    unet, vae = script.make_unet(text.config.hidden_size), script.make_autoencoder()
    x = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    loss = script.autoencoder_loss(vae, x, script.generator(0, 1))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in vae.parameters())
    ids = tokenizer([""], padding="max_length", return_tensors="pt").input_ids
    z = vae.encode(x).latent_dist.mean.detach()
    loss = script.diffusion_loss(unet, text, z, ids, script.make_scheduler().alphas_cumprod, script.generator(0, 2))
    loss.backward()
    assert z.shape == (1, 4, 32, 32) and 0 < float(loss.detach()) < 50
    assert all(p.grad is not None for p in unet.parameters())

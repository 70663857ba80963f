"""Files to noise: what is kept is what the recoverer says, and nothing is computed twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import wrap
from PIL import Image

from ringmark.data.images import read_sample, to_array
from ringmark.data.reader import read_records
from ringmark.data.results import ResultsFolder
from ringmark.errors import StoreError
from ringmark.inversion.decoder import Inverter
from ringmark.inversion.methods import Anderson, ForwardStep
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.tasks.recover import recover_files


@pytest.fixture
def model(tiny_parts):
    parts = {k: tiny_parts[k] for k in ("vae", "unet", "text_encoder", "tokenizer", "scheduler")}
    return wrap(parts)


@pytest.fixture
def files(tmp_path):
    rng, paths = np.random.default_rng(0), []
    for i in range(5):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(paths[-1])
    Image.new("RGB", (16, 16), "red").save(paths[3])
    paths[1].write_text("no image")
    return paths


@pytest.fixture
def kept(tmp_path):
    with ResultsFolder(tmp_path / "kept") as kept:
        yield kept


class Counting(Recoverer):
    """Notes each call, and is stopped at call `last`."""

    called, last = (), 1000

    def latents(self, images):
        self.called += ("decoder",)
        return self._go_on(super().latents, images)

    def noise(self, latents):
        self.called += ("noise",)
        return self._go_on(super().noise, latents)

    def _go_on(self, work, rows):
        if len(self.called) == self.last:
            raise KeyboardInterrupt
        return work(rows)


def test_files_become_noise_in_order_and_what_cannot_be_used_is_named(model, files, kept):
    recoverer = Recoverer(model, Inverter(max_steps=2), 3)
    found = recover_files(recoverer, files, kept, batch=2)
    assert found.ids == [str(files[i]) for i in (0, 2, 3, 4)]
    assert [error.path for error in found.refused] == [files[1]]
    assert list(found.doubts) == [2] and "flat" in found.doubts[2]
    assert found.noise.shape == (4, 4, 8, 8) and (found.seconds > 0).all()
    images = torch.from_numpy(np.stack([to_array(read_sample(Path(name), (16, 16)).image) for name in found.ids]))
    torch.testing.assert_close(found.noise, recoverer(images).noise, rtol=1e-3, atol=1e-3)


def test_nothing_is_computed_twice(model, files, kept):
    first, again, other = (Counting(model, Inverter(max_steps=1), steps) for steps in (3, 3, 4))
    noise = [recover_files(d, files, kept, batch=8).noise for d in (first, again, other)]
    assert (first.called, again.called, other.called) == (("decoder", "noise"), (), ("noise",))
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
    encoders = [Counting(model, Inverter(method, 0), 3) for method in (Anderson(), ForwardStep())]
    noise = [recover_files(d, files, kept, batch=8).noise for d in encoders]
    assert [d.called for d in encoders] == [("decoder", "noise"), ("decoder",)]  # which finds the same latents
    assert torch.equal(*noise)


@pytest.mark.slow
def test_interrupted_anywhere_nothing_is_lost_but_the_batch(model, files, tmp_path):
    whole, calls = None, 2 * 3 + 2  # of the five files, one each batch, one cannot be read
    for last in range(calls, 0, -1):
        stopped, again = Counting(model, Inverter(max_steps=1), 3), Counting(model, Inverter(max_steps=1), 3)
        stopped.last = last
        with ResultsFolder(tmp_path / str(last)) as kept, pytest.raises(KeyboardInterrupt):
            recover_files(stopped, files, kept, batch=1)
        with ResultsFolder(tmp_path / str(last)) as kept:
            noise = recover_files(again, files, kept, batch=1).noise
        whole = noise if whole is None else whole
        torch.testing.assert_close(noise, whole)
        assert len(stopped.called) - 1 + len(again.called) == calls


def test_equal_pictures_are_inverted_once(model, files, kept):
    files[4].write_bytes(files[0].read_bytes())
    recoverer = Counting(model, Inverter(max_steps=1), 3)
    found = recover_files(recoverer, [files[0], files[4]], kept)
    assert found.contents[0] == found.contents[1] and torch.equal(*found.noise)
    assert [len(read_records(path)[1]) for path in kept.folder.glob("*.jsonl")] == [1, 1]


def test_a_second_run_on_the_same_results_is_refused(model, files, kept, tmp_path):
    recover_files(Recoverer(model, Inverter(max_steps=1), 3), files, kept)
    with ResultsFolder(tmp_path / "kept") as other, pytest.raises(StoreError) as caught:
        recover_files(Recoverer(model, Inverter(max_steps=1), 3), files, other)
    assert caught.value.code == "results.locked"


def test_nothing_readable_is_an_empty_result(model, files, kept):
    found = recover_files(Recoverer(model, steps=3), files[1:2], kept)
    assert found.noise.shape == (0, 4, 8, 8) and not found.ids and len(found.refused) == 1


def test_files_are_recovered_at_another_size(model, files, kept):
    found = recover_files(Recoverer.named(model, "encoder", steps=2), files, kept, size=(16, 24))
    assert found.noise.shape == (4, *model.noise_shape((16, 24)))

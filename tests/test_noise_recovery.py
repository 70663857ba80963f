"""Rings of the Fourier plane, and the recovery of synthetic noise."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringmark.errors import ModelError
from ringmark.inversion.noise_recovery import NoiseRecovery, radial_frequencies, rings


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rings_of_a_small_plane():
    assert rings(4, 4).tolist() == [[0, 1, 2, 1], [1, 1, 2, 1], [2, 2, 3, 2], [1, 1, 2, 1]]


@given(height=st.integers(2, 24), width=st.integers(2, 24))
def test_rings(height, width):
    ring = rings(height, width)
    assert ring.shape == (height, width) and ring.dtype == torch.int64
    assert ring[0, 0] == 0
    mirrored = ring.roll((-1, -1), (0, 1)).flip((0, 1))  # bin k ↦ −k
    assert torch.equal(ring, mirrored)
    assert torch.equal(ring, rings(width, height).T)
    assert (torch.bincount(ring.flatten()) > 0).all()  # no ring is empty


@pytest.mark.parametrize("size", [(24, 40), (64, 64), (33, 16), (20, 20)])
def test_rings_of_another_side_are_frequencies_in_pixels(size):
    ky, kx = (np.fft.fftfreq(n) for n in size)
    frequency = torch.from_numpy(32 * np.hypot(ky[:, None], kx[None]))  # cycles per 32 pixels
    assert torch.allclose(radial_frequencies(*size, 32), frequency)
    away = rings(*size, 32) - frequency
    assert away.max() <= 0.5 and away.min() >= -0.5 - 1e-6  # a tie goes down


def test_a_tie_goes_down_everywhere():
    assert rings(64, 64, 32)[0, :8].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rings(64, 64, 96)[0, :4].tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("side", [8, 16, 32, 64])
def test_direct_current_is_alone_in_its_ring(side):
    counts = torch.bincount(rings(side, side).flatten())
    assert counts[0] == 1 and counts[1] == 8 and counts.sum() == side**2


def test_measure_finds_a_known_attenuation_and_variance():
    shape = (3, 12, 16)
    ring = rings(*shape[1:])
    count = int(ring.max()) + 1
    a = torch.linspace(-0.2, 0.9, 3 * count, dtype=torch.float64).view(3, count)
    v = torch.linspace(0.8, 0.05, 3 * count, dtype=torch.float64).view(3, count)
    truth, rest = draw(1500, *shape).double(), draw(1500, *shape, seed=1).double()

    def through(x, gain):
        return torch.fft.ifft2(torch.fft.fft2(x) * gain[:, ring]).real

    found = NoiseRecovery.measure(through(truth, a) + through(rest, v.sqrt()), truth)
    assert found.attenuation.shape == found.variance.shape == (3, count)
    assert torch.allclose(found.attenuation, a, atol=0.06)
    assert torch.allclose(found.variance, v, rtol=0.15)
    assert torch.allclose(found.null, found.attenuation**2 + found.variance)


def test_measure_of_perfect_and_of_no_recovery():
    truth = draw(40, 2, 8, 8)
    perfect = NoiseRecovery.measure(truth, truth)
    assert torch.allclose(perfect.attenuation, torch.ones_like(perfect.variance))
    assert perfect.variance.abs().max() < 1e-12
    none = NoiseRecovery.measure(draw(40, 2, 8, 8, seed=9), truth)
    assert none.attenuation[:, 1:].abs().max() < 0.2 and (none.variance[:, 1:] - 1).abs().max() < 0.3


def test_measure_takes_sixteen_bit_noise():
    truth = draw(4, 1, 4, 4)
    assert NoiseRecovery.measure(truth.half(), truth.bfloat16()).attenuation.dtype == torch.float64


@given(scale=st.sampled_from([1.0, 1e-3, 1e-7, 1e4]))
def test_save_and_load_round_trip(tmp_path_factory, scale):
    folder = tmp_path_factory.mktemp("model")
    stored = NoiseRecovery(draw(4, 7).double(), scale * draw(4, 7, seed=1).double().abs())
    stored.save(folder, steps=25, guidance=3.0)
    loaded = NoiseRecovery.load(folder)
    assert torch.allclose(loaded.attenuation, stored.attenuation, rtol=1e-4)
    assert torch.allclose(loaded.variance, stored.variance, rtol=1e-4, atol=0)
    settings = json.loads((folder / NoiseRecovery.FILE).read_text())
    assert settings["steps"] == 25 and settings["guidance"] == 3.0


def test_a_model_without_a_measurement_has_none(tmp_path):
    assert NoiseRecovery.load(tmp_path) is None
    assert NoiseRecovery.load(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"attenuation": [[1.0]]}',
        '{"attenuation": [[1.0]], "variance": [[0.0]]}',
        '{"attenuation": [[1.0]], "variance": [[-1.0]]}',
        '{"attenuation": [[1.0]], "variance": [[NaN]]}',
        '{"attenuation": [[1.0]], "variance": [[Infinity]]}',
        '{"attenuation": [[NaN]], "variance": [[1.0]]}',
        '{"attenuation": [[1.0, 2.0]], "variance": [[1.0]]}',
        '{"attenuation": [[1.0, 2.0], [1.0]], "variance": [[1.0, 1.0], [1.0]]}',
        '{"attenuation": [1.0], "variance": [1.0]}',
        '{"attenuation": [["x"]], "variance": [["x"]]}',
        '{"attenuation": null, "variance": null}',
        "[" * 100_000,
    ],
)
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / NoiseRecovery.FILE
    path.write_text(content)
    with pytest.raises(ModelError) as caught:
        NoiseRecovery.load(tmp_path)
    assert (caught.value.code, caught.value.subject) == ("model.recovery-damaged", path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_a_damaged_file(tmp_path):
    (tmp_path / NoiseRecovery.FILE).write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ModelError):
        NoiseRecovery.load(tmp_path)

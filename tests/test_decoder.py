"""Decoder inversion against linear autoencoders, whose answer is known."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringmark.inversion.decoder import (
    GREY_LEVEL,
    INVERTERS,
    Inverter,
    gradient_residual,
    in_slices,
    invert_decoder,
    invert_decoder_by_gradient,
    quantisation_level,
    rounding_share,
)
from ringmark.inversion.methods import Adam, Anderson, ForwardStep, InertialKM, Operator
from ringmark.inversion.metrics import nmse_db
from ringmark.inversion.solve import Status, norms

LATENT, IMAGE = (4, 2, 3), (3, 4, 6)
N, M = 24, 72


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Linear:
    """D = A with singular values in [low, 1]; E = a rough left inverse: E∘D is the identity plus `error`."""

    def __init__(self, low=0.5, error=0.2, scale=0.1, seed=0):
        u, v = torch.linalg.qr(draw(M, N, seed=seed))[0], torch.linalg.qr(draw(N, N, seed=seed + 1))[0]
        self.a = scale * u @ torch.diag(torch.linspace(low, 1, N)) @ v.T
        self.e = (torch.eye(N) + error * draw(N, N, seed=seed + 2) / N**0.5) @ torch.linalg.pinv(self.a)

    def decode(self, z):
        return (z.flatten(1) @ self.a.T.to(z.dtype)).view(-1, *IMAGE)

    lean = staticmethod(nullcontext)

    def encode(self, x):
        return (x.flatten(1) @ self.e.T.to(x.dtype)).view(-1, *LATENT)


def rounded(images):
    """As an 8-bit file would hold it."""
    return ((images + 1) * 127.5).round() / 127.5 - 1


@pytest.mark.parametrize("method", [ForwardStep(), InertialKM(), Anderson(), Anderson(window=1)], ids=repr)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_true_latent_is_found(method, batch):
    maps, truth = Linear(), draw(batch, *LATENT, seed=7)
    done = invert_decoder(maps.encode, maps.decode, maps.decode(truth), method, max_steps=150, tol=1e-4)
    assert done.status == [Status.CONVERGED] * batch
    assert (norms(done.value - truth) < 1e-3 * norms(truth)).all()
    start = norms(maps.encode(maps.decode(truth)) - truth)
    assert (start > 0.05 * norms(truth)).all()  # the encoder alone was far off


def test_no_steps_are_the_encoder_alone():
    maps, truth = Linear(), draw(3, *LATENT)
    images = maps.decode(truth)
    done = invert_decoder(maps.encode, None, images, max_steps=0)
    assert torch.allclose(done.value, maps.encode(images), atol=1e-5) and done.steps.tolist() == [0] * 3


def test_the_iterate_kept_has_the_least_pixel_residual():
    maps, truth = Linear(low=0.05), draw(2, *LATENT)
    images = rounded(maps.decode(truth))
    done = invert_decoder(maps.encode, maps.decode, images, Anderson(), max_steps=20, tol=None)
    error = norms(maps.decode(done.value) - images)
    assert torch.allclose(error, done.merits.nan_to_num(torch.inf).min(0).values, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", [ForwardStep(), Anderson()], ids=repr)
def test_auto_stops_at_the_level_of_rounding_and_no_further(method):
    maps, truth = Linear(low=0.3, error=0.4), draw(4, *LATENT, seed=3)
    images = rounded(maps.decode(truth))
    level = quantisation_level(maps.encode, images, maps.encode(images))
    done = invert_decoder(maps.encode, maps.decode, images, method, max_steps=100)
    assert done.status == [Status.CONVERGED] * 4
    for i, k in enumerate(done.steps.tolist()):
        assert done.residuals[k - 1, i] <= level[i] < done.residuals[: k - 1, i].min()
    longer = invert_decoder(maps.encode, maps.decode, images, method, max_steps=100, tol=1e-5)
    assert (longer.steps > done.steps).all()


def test_auto_takes_no_step_for_an_image_the_encoder_already_explains():
    maps, truth = Linear(error=0.0), draw(2, *LATENT)
    done = invert_decoder(maps.encode, maps.decode, rounded(maps.decode(truth)), Anderson())
    assert done.steps.tolist() == [1, 1] and done.status == [Status.CONVERGED] * 2


def test_quantisation_level_of_a_known_gain():
    """E = g Q with orthonormal rows: E‖E(u)‖² = g² N Var(u), Var(u) = (grey level)²/12."""
    gain, rows = 5.0, torch.linalg.qr(draw(M, N))[0].T

    def encode(x):
        return gain * (x.flatten(1) @ rows.T)

    images = draw(6, *IMAGE).clamp(-1, 1)
    level = quantisation_level(encode, images, encode(images), draws=9)
    expected = gain * (N / 12) ** 0.5 * GREY_LEVEL
    assert torch.allclose(level, torch.full((6,), expected), rtol=0.25)
    assert torch.allclose(level, level[0].expand(6), rtol=1e-3)  # a linear map knows no image from another


def test_quantisation_level_does_not_depend_on_the_batch():
    def encode(x):
        return torch.sin(3 * x.flatten(1))

    images = draw(5, *IMAGE)
    together = quantisation_level(encode, images, encode(images))
    for i in range(5):
        alone = quantisation_level(encode, images[i : i + 1], encode(images[i : i + 1]))
        assert torch.allclose(alone, together[i : i + 1], rtol=1e-5)
    assert together.std() > 0


@pytest.mark.parametrize("name", ["operator", "anderson"])
def test_a_result_does_not_depend_on_the_batch(name):
    maps, truth = Linear(low=0.2, error=0.3), draw(5, *LATENT)
    images = rounded(maps.decode(truth * torch.tensor([0.01, 0.1, 1, 2, 5]).view(5, 1, 1, 1)))
    together = INVERTERS[name](maps, images)
    for i in range(5):
        alone = INVERTERS[name](maps, images[i : i + 1])
        assert torch.allclose(alone.value[0], together.value[i], rtol=1e-3, atol=1e-4)
        assert alone.steps[0] == together.steps[i] and alone.status[0] == together.status[i]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_of_sixteen_bits(dtype):
    """Iterates stay in float32; the decoder sees the dtype that the encoder gave."""
    maps, truth, dtypes = Linear(), draw(2, *LATENT), set()

    def decode(z):
        dtypes.add(z.dtype)
        return maps.decode(z)

    images = maps.decode(truth)
    done = invert_decoder(lambda x: maps.encode(x.to(dtype)), decode, images, max_steps=10)
    assert dtypes == {dtype} and done.value.dtype == torch.float32
    assert (norms(done.value - truth) < norms(maps.encode(images) - truth)).all()


def test_no_graph_is_stored():
    weight = torch.ones((), requires_grad=True)
    maps, graphs = Linear(), []

    def decode(z):
        out = weight * maps.decode(z)
        graphs.append(out.grad_fn)
        return out

    done = invert_decoder(maps.encode, decode, maps.decode(draw(1, *LATENT)), Anderson(), max_steps=3, tol=None)
    assert graphs == [None] * 4 and not done.value.requires_grad


def test_gradient_residual_is_the_gradient():
    maps, truth, z = Linear(), draw(3, *LATENT), draw(2, *LATENT, seed=1)
    images, rows = maps.decode(truth), torch.tensor([2, 0])
    gradient, found = gradient_residual(maps.decode, images)(z, rows)
    error = maps.decode(z) - images[rows]
    assert torch.allclose(gradient, (2 * error.flatten(1) @ maps.a).view_as(z), atol=1e-6)
    assert torch.allclose(found, error) and not gradient.requires_grad and not found.requires_grad


def test_the_gradient_baseline_takes_all_its_steps_and_reaches_the_true_latent():
    maps, truth = Linear(low=0.7, scale=1.0), draw(3, *LATENT)
    images = maps.decode(truth)
    start = truth + 0.2 * draw(3, *LATENT, seed=1)
    done = invert_decoder_by_gradient(maps.decode, images, start, Adam(lr=0.02, horizon=100), max_steps=300)
    assert done.steps.tolist() == [301] * 3
    assert (norms(done.value - truth) < 1e-2 * norms(start - truth)).all()


@pytest.mark.parametrize("steps", [20, 50, 100])
def test_the_gradient_baseline_reduces_the_sum_of_squares(steps):
    maps, truth = Linear(low=0.1, scale=1.0), draw(3, *LATENT)
    images = maps.decode(truth)
    start = truth + 0.3 * draw(3, *LATENT, seed=1)
    done = invert_decoder_by_gradient(maps.decode, images, start, max_steps=steps)
    assert (norms(maps.decode(done.value) - images) < 0.5 * norms(maps.decode(start) - images)).all()
    assert done.steps.tolist() == [steps + 1] * 3


def test_the_gradient_baseline_goes_on_from_inference_mode():
    """Its start usually comes from invert_decoder; its caller may itself be in inference mode."""
    maps, truth = Linear(scale=1.0), draw(2, *LATENT)
    images = maps.decode(truth)
    start = invert_decoder(maps.encode, maps.decode, images, max_steps=0).value
    free = invert_decoder_by_gradient(maps.decode, images, start, max_steps=5).value
    with torch.inference_mode():
        inside = invert_decoder_by_gradient(maps.decode, images.clone(), start, max_steps=5).value
    assert torch.equal(free, inside)
    with torch.no_grad():
        assert torch.equal(free, invert_decoder_by_gradient(maps.decode, images, start, max_steps=5).value)


class Spectrum(Linear):
    """E∘D has these eigenvalues, in directions that are not orthogonal: an encoder trained for another decoder."""

    def __init__(self, eigenvalues, seed=0):
        super().__init__(low=0.2, scale=0.08, seed=seed)
        q = torch.eye(N) + 0.3 * draw(N, N, seed=seed + 3) / N**0.5
        self.e = q @ torch.diag(eigenvalues) @ torch.linalg.inv(q) @ torch.linalg.pinv(self.a)


SPECTRA = {
    "beyond 2": torch.linspace(0.7, 3, N),
    "near 0": torch.linspace(0, 1.2, N),
    "below 0": torch.linspace(-0.5, 1.5, N),
    "a few bad": torch.cat([torch.linspace(0.9, 1.1, N - 6), torch.tensor([3.0, 2.5, 0.0, -0.2, -0.5, 0.05])]),
    "wild": torch.linspace(-2, 5, N),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("seed", range(3))
def test_the_default_does_not_lose_whatever_the_spectrum(spectrum, seed):
    """Even with fewer sites than regressors, where P fits the rendering whatever it is."""
    maps, truth = Spectrum(SPECTRA[spectrum], seed), draw(8, *LATENT, seed=seed + 10)
    images = rounded(maps.decode(truth).clamp(-1, 1))
    start = nmse_db(maps.encode(images), truth)
    for steps in (2, 8, 20):
        gain = start - nmse_db(invert_decoder(maps.encode, maps.decode, images, max_steps=steps).value, truth)
        assert gain.min() > -0.15 and gain.mean() > 0, (steps, gain)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("seed", range(3))
def test_anderson_gains_and_does_not_lose_whatever_the_spectrum(spectrum, seed):
    maps, truth = Spectrum(SPECTRA[spectrum], seed), draw(8, *LATENT, seed=seed + 10)
    images = rounded(maps.decode(truth).clamp(-1, 1))
    start = nmse_db(maps.encode(images), truth)
    for steps in (8, 40):
        done = invert_decoder(maps.encode, maps.decode, images, Anderson(), max_steps=steps)
        gain = start - nmse_db(done.value, truth)
        assert gain.min() > -0.05 and gain.mean() > 1, (steps, gain)

    def pixels(z):
        return norms(maps.decode(z).clamp(-1, 1) - images)

    for name in ("forward", "km", "adam", "anderson"):
        assert (pixels(Inverter.named(name)(maps, images).value) <= pixels(maps.encode(images)) + 1e-6).all()


def test_a_plain_iteration_would_have_lost():
    maps, truth = Spectrum(SPECTRA["beyond 2"]), draw(4, *LATENT)
    images, z = rounded(maps.decode(truth)), None
    z = start = maps.encode(images)
    for _ in range(20):
        z = z - (maps.encode(maps.decode(z)) - start)
    assert (nmse_db(z, truth) > nmse_db(start, truth) + 7).all()


def test_saturated_pixels_may_be_whiter_than_white():
    maps, truth = Linear(low=0.5, error=0.3, scale=1.5), draw(4, *LATENT, seed=5)
    images = maps.decode(truth).clamp(-1, 1)
    assert (images.abs() == 1).float().mean() > 0.02
    cut, uncut = (
        invert_decoder(maps.encode, maps.decode, images, Anderson(), max_steps=60, tol=1e-5, pixels=p)
        for p in ((-1, 1), (-9, 9))
    )
    assert (nmse_db(cut.value, truth) < -60).all() and (nmse_db(uncut.value, truth) > -40).all()


def test_videos_are_inverted_frame_by_frame_in_slices():
    maps, truth, seen = Linear(), draw(2, 4, 5, 2, 3, seed=8), []
    frames = truth.transpose(1, 2).flatten(0, 1)
    images = rounded(maps.decode(frames))

    def encode(x):
        return seen.append(len(x)) or maps.encode(x)

    done = invert_decoder(
        encode, maps.decode, images.unflatten(0, (2, 5)).transpose(1, 2), max_steps=6, at_once=3, tol=None
    )
    alone = invert_decoder(maps.encode, maps.decode, images, max_steps=6, tol=None)
    assert done.value.shape == truth.shape and done.steps.shape == (10,) and len(done.status) == 10
    assert torch.allclose(done.value.transpose(1, 2).flatten(0, 1), alone.value, atol=1e-4)
    assert max(seen) == 3


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_slices_change_nothing(size):
    x = draw(7, 3, 2)
    assert torch.equal(in_slices(lambda part: 2 * part, size)(x), 2 * x)


def test_sixteen_bit_that_costs_accuracy_is_said():
    maps, truth = Linear(), draw(3, *LATENT, seed=9)
    images = rounded(maps.decode(truth))

    # The rounding of many layers: of fixed size and without a pattern
    def sixteen(x):
        return (x + 0.2 * torch.sin(1e5 * x)).bfloat16()

    for cast, coarse in ((sixteen, True), (torch.Tensor.float, False)):

        def encode(x, cast=cast):
            return cast(maps.encode(x.float()))

        def decode(z):
            return maps.decode(z.float())

        share = rounding_share(encode, images, encode(images))
        assert ((share > 0.5) == coarse).all() and (coarse or torch.allclose(share, torch.tensor(0.125), rtol=0.1))
        done = invert_decoder(encode, decode, images)
        assert [s is Status.ROUNDED for s in done.status] == [coarse] * 3
        assert done.value.dtype == torch.float32 and done.value.isfinite().all()


@pytest.mark.parametrize("name", INVERTERS)
def test_every_inverter_by_name(name):
    maps, truth = Linear(), draw(2, *LATENT, seed=4)
    images = rounded(maps.decode(truth))
    done = Inverter.named(name)(maps, images)
    better = nmse_db(done.value, truth) < nmse_db(maps.encode(images), truth) - 0.3
    assert better.all() or name == "encoder"
    few, most = Inverter.named(name, 3), 6 if name == "operator" else 4
    assert few.max_steps == (0 if name == "encoder" else 3) and few(maps, images).steps.max() <= most
    assert getattr(few.method, "horizon", 3) == 3


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_untrained_autoencoders_of_diffusers_end_no_worse_than_they_start(kind, tiny_parts):
    """Nothing brings E∘D near the identity here, which is the worst that an autoencoder can do."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    if kind == "AutoencoderTiny":
        sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        vae = AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()

        def encode(x):
            return vae.encode(x).latents
    else:
        vae = tiny_parts["vae"]

        def encode(x):
            return vae.encode(x).latent_dist.mode()

    def decode(z):
        return vae.decode(z).sample

    with torch.inference_mode():
        images = rounded(decode(draw(3, 4, 8, 8)).clamp(-1, 1))
        for name in ("forward", "km", "adam", "anderson"):
            inverter = Inverter.named(name, 10)
            done = invert_decoder(encode, decode, images, inverter.method, max_steps=10)
            assert done.value.shape == (3, 4, 8, 8) and done.value.isfinite().all()
            assert (done.merits.nan_to_num(torch.inf).amin(0) <= done.merits[0]).all()


class EachSite:
    """E∘D multiplies the channels of each site by the same matrix; D is exact."""

    def __init__(self, matrix):
        self.matrix = matrix

    def encode(self, x):
        return torch.einsum("cd,bdhw->bchw", self.matrix, x)

    decode = staticmethod(torch.clone)


TRUSTING = Operator(allowance=1e9)  # takes no picture for an altered one


def by_operator(maps, images, steps, method=TRUSTING):
    return invert_decoder(maps.encode, maps.decode, images, method, max_steps=steps, pixels=(-99, 99))


@given(st.lists(st.floats(-2, 5), min_size=4, max_size=4), st.integers(0, 100), st.integers(1, 5), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_operator_does_not_lose_on_a_random_map_of_the_channels(eigenvalues, seed, steps, trusting):
    """Its form is the operator's own, so that only directions that E∘D wipes out stay unknown."""
    q = torch.linalg.qr(draw(4, 4, seed=seed))[0]
    maps, truth = EachSite(q @ torch.diag(torch.tensor(eigenvalues)) @ q.T), draw(3, 4, 12, 12, seed=seed)
    start, end = (
        norms(z - truth)
        for z in (maps.encode(truth), by_operator(maps, truth, steps, TRUSTING if trusting else Operator()).value)
    )
    assert (end <= 1.01 * start + 1e-3 * norms(truth)).all()
    if trusting and min(map(abs, eigenvalues)) > 0.5:
        assert (end <= 0.5 * start + 1e-3 * norms(truth)).all()


@pytest.mark.parametrize("spectrum", [(-2, 5), (0, 1), (0.5, 1.5), (2, 5)], ids=str)
def test_the_operator_does_not_lose_on_dense_maps(spectrum):
    """E∘D mixes all sites and channels, of which the operator knows the channels only."""
    q, truth = torch.linalg.qr(draw(256, 256))[0], draw(4, 4, 8, 8, seed=9)

    def encode(x):
        return ((x.flatten(1) @ q * torch.linspace(*spectrum, 256)) @ q.T).view_as(x)

    for method in (TRUSTING, Operator()):
        done = invert_decoder(encode, torch.clone, truth, method, max_steps=3, pixels=(-99, 99))
        assert (nmse_db(done.value, truth) < nmse_db(encode(truth), truth) + 0.05).all()


def test_the_operator_keeps_latents_that_the_encoder_knows():
    truth = draw(2, 4, 8, 8)
    assert torch.allclose(by_operator(EachSite(torch.eye(4)), truth, 3).value, truth, atol=1e-5)


def test_a_step_of_the_operator_costs_two_evaluations_and_does_not_depend_on_the_batch():
    maps, truth, calls = EachSite(0.5 * torch.eye(4) + 0.1 * draw(4, 4)), draw(3, 4, 8, 8), []

    def decode(z):
        calls.append(len(z))
        return z + 0.1 * z.sin()

    together = invert_decoder(maps.encode, decode, truth, Operator(), max_steps=3)
    assert sum(calls) == 3 * 6 and together.steps.tolist() == [6] * 3
    alone = [invert_decoder(maps.encode, decode, x[None], Operator(), max_steps=3).value for x in truth]
    assert torch.allclose(torch.cat(alone), together.value, atol=1e-5)
    start = invert_decoder(maps.encode, decode, truth, Operator(), max_steps=0)
    assert torch.equal(start.value, maps.encode(truth)) and start.steps.tolist() == [0] * 3


def test_the_operator_keeps_what_the_encoder_saw_of_a_strongly_altered_picture():
    """E∘D shrinks half of the channels, where D draws nothing and the alteration lies."""
    maps, truth = EachSite(torch.diag(torch.tensor([0.9, 0.8, 0.05, 0.05]))), draw(4, 4, 12, 12)
    truth[:, 2:] = 0
    altered = truth + 2 * torch.tensor([0, 0, 1.0, 1.0]).view(4, 1, 1) * draw(4, 4, 12, 12, seed=1)
    plain, start = by_operator(maps, truth, 2, Operator()).value, maps.encode(truth)
    assert (norms(plain - truth) < 0.5 * norms(start - truth)).all()
    start = maps.encode(altered)
    trusting, shy = (norms(by_operator(maps, altered, 2, m).value - start) for m in (TRUSTING, Operator()))
    assert (shy < 0.2 * trusting).all()


def test_the_operator_keeps_the_encoder_where_nothing_is_finite():
    maps, images = EachSite(torch.eye(4)), draw(2, 4, 8, 8)
    done = invert_decoder(maps.encode, lambda z: z * torch.nan, images, Operator(), max_steps=3)
    assert torch.equal(done.value, images) and done.status == [Status.DIVERGED] * 2

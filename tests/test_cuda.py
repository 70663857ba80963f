"""pocket on a GPU: the same noise and verdicts as on the CPU. Without a GPU, only the comparison itself runs."""

from __future__ import annotations

import functools

import pytest
import torch

from ringmark.data.images import from_array, samples_of
from ringmark.inversion.decoder import INVERTERS
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.embed import generate
from ringmark.watermark.keys.key import SECRET_BYTES
from ringmark.watermark.tasks.keygen import new_key
from ringmark.watermark.tasks.load import load_model

pytestmark = pytest.mark.slow
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

DTYPES = ["float32", "bfloat16", "float16"]


@functools.cache
def pictures() -> tuple:
    """A key and a picture with it and one without, drawn on the CPU."""
    model = load_model("pocket", "cpu", "float32")
    key = new_key(model, "tree-ring", secret=bytes(SECRET_BYTES))
    drawn = [next(iter(generate(model, [""], [seed], key=k, steps=5))).image for seed, k in ((1, key), (2, None))]
    return key, torch.stack(drawn)


def recovered(device: str, dtype: str, method: str) -> torch.Tensor:
    recoverer = Recoverer(load_model("pocket", device, dtype, text=False), INVERTERS[method], 5)
    return recoverer(pictures()[1]).noise


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
@pytest.mark.parametrize("method", ["encoder", "operator"])
def test_noise_is_that_of_the_cpu(device, method):
    expected, found = recovered("cpu", "float32", method), recovered(device, "float32", method)
    assert float((found - expected).square().mean() / expected.square().mean()) < 1e-4


@pytest.mark.parametrize(
    "device, dtype", [("cpu", "float32"), *(pytest.param("cuda", dtype, marks=ON_CUDA) for dtype in DTYPES)]
)
def test_verdicts_are_right(device, dtype):
    key, images = pictures()
    verifier = Verifier(Recoverer(load_model("pocket", device, dtype, text=False), steps=5), [key])
    views = [samples_of(from_array(x.numpy()), verifier.sizes_of, id=str(i)) for i, x in enumerate(images)]
    assert [judged.best.present for judged in verifier.scan(views)] == [True, False]

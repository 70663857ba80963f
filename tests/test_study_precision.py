"""The spectrum by which images are sorted, on waves of known frequency; the study's small setting, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ringmark.inversion.decoder import INVERTERS, Inverter
from ringmark.inversion.metrics import high_frequency_share


@pytest.fixture(scope="module")
def script(scripts):
    return scripts("study_precision")


def wave(cycles: int, size: int = 64) -> torch.Tensor:
    """(1, 1, size, size): so many whole cycles along x; size / 2 cycles are Nyquist's."""
    return torch.cos(2 * torch.pi * cycles * torch.arange(size) / size).expand(1, 1, size, size)


def test_energy_above_a_frequency():
    assert float(high_frequency_share(wave(4))) < 1e-6
    assert float(high_frequency_share(wave(20))) == pytest.approx(1)
    both = 3 * wave(4) + wave(20) + 100  # a constant is no wave
    assert float(high_frequency_share(both)) == pytest.approx(1 / 10, rel=1e-4)
    assert float(high_frequency_share(both.mT)) == pytest.approx(1 / 10, rel=1e-4)
    assert float(high_frequency_share(-7 * both)) == pytest.approx(1 / 10, rel=1e-4)
    assert float(high_frequency_share(torch.ones(1, 3, 8, 8))) == 0


def test_white_noise_has_what_lies_outside_the_circle():
    noise = torch.randn(8, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    assert float(high_frequency_share(noise).mean()) == pytest.approx(1 - torch.pi / 4 * 0.25**2, abs=0.01)


def test_thirds_are_in_order(script):
    share = torch.rand(11, generator=torch.Generator().manual_seed(0))
    group = script.categories(share)
    assert sorted(torch.bincount(group).tolist()) == [3, 4, 4]
    assert share[group == 0].max() < share[group == 1].min() and share[group == 1].max() < share[group == 2].min()


def test_small_setting(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "INVERTERS", {name: Inverter.named(name, 2) for name in INVERTERS})
    options = ["-o", str(tmp_path), "-n", "6", "--its", "1", "--dtype", "bfloat16", "--images", str(tmp_path / "in")]
    save_waves(tmp_path / "in")
    done = CliRunner().invoke(script.main, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "study_precision.json").read_text())
    rows = {(r["dtype"], r["method"], r["images"]): r for r in found["rows"]}
    assert len(rows) == 2 * 4 * 4
    for (dtype, method, _), r in rows.items():
        exact = rows["float32", method, r["images"]]
        assert r["loss dB"] == pytest.approx(r["NMSE dB"] - exact["NMSE dB"], abs=1e-4)
        if dtype == "float32":
            assert r["rounding share"] == pytest.approx(1 / 8, abs=0.02) and r["said ROUNDED"] == 0
        else:
            assert r["rounding share"] > exact["rounding share"]
            assert method == "encoder" or (r["said ROUNDED"] == 1) or r["rounding share"] < 0.6
    counts = {group: rows["float32", "encoder", group]["n"] for group in (*script.CATEGORIES, "all")}
    assert counts == {"smooth": 2, "textured": 2, "high-frequency": 2, "all": 6}
    sharp = [i["high-frequency share"] for i in found["images"] if i["category"] == "high-frequency"]
    assert min(sharp) >= max(i["high-frequency share"] for i in found["images"] if i["category"] == "smooth")
    assert all((tmp_path / f"study_precision.{kind}").stat().st_size for kind in ("csv", "png", "svg"))


def save_waves(folder: Path) -> None:
    from PIL import Image

    folder.mkdir()
    for cycles in (2, 5, 9, 14, 22, 40):
        grey = ((wave(cycles, 128)[0, 0] + 1) * 100 + 20).to(torch.uint8).numpy()
        Image.fromarray(grey).convert("RGB").save(folder / f"{cycles}.png")

"""What was tried and left out: other accelerations of z ← z − T(z), against ours, at equal evaluations.

python scripts/study_alternatives.py -o build/bench             # with bench_decoder.py's images and cache
python scripts/study_alternatives.py -o build/small -n 2 --steps 3
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from ringmark.inversion.decoder import Inverter
from ringmark.inversion.methods import Anderson, ForwardStep, InertialKM
from ringmark.inversion.metrics import nmse_db
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.solve import Method, State
from scripts.experiments.bench_decoder import weak_key
from scripts.experiments.common import SEED, experiment_options, invert_all, mean_and_error, pictures, write_results


@dataclass(frozen=True)
class Halpern:
    """z ← λ_k z₀ + (1 − λ_k)(z − T z), λ_k = 1/(k + 2): the optimal worst case of nonexpansive maps (arXiv 2108.10969)."""

    def init(self, z: Tensor) -> State:
        return {"start": z.clone(), "k": torch.zeros(len(z), device=z.device)}

    def step(self, z: Tensor, t: Tensor, error: Tensor, state: State) -> tuple[Tensor, State]:
        anchor = 1 / (state["k"][0] + 2)
        return anchor * state["start"] + (1 - anchor) * (z - t), state | {"k": state["k"] + 1}


@dataclass(frozen=True)
class EstimatedStep:
    """z ← z − ρ_k T z, ρ_k = ⟨Δz, ΔT⟩/‖ΔT‖² the cocoercivity seen in the last step, within `limits`."""

    limits: tuple[float, float] = (0.3, 10.0)

    def init(self, z: Tensor) -> State:
        return {"z": z.clone(), "t": torch.zeros_like(z)}

    def step(self, z: Tensor, t: Tensor, error: Tensor, state: State) -> tuple[Tensor, State]:
        dz, dt = (z - state["z"]).flatten(1), (t - state["t"]).flatten(1)
        moved = dz.norm(dim=1) > 0
        rho = torch.where(moved, (dz * dt).sum(1) / dt.square().sum(1), 1.0).nan_to_num(1.0).clamp(*self.limits)
        return z - rho.view(-1, *[1] * (z.ndim - 1)) * t, {"z": z, "t": t}


@dataclass(frozen=True)
class AndersonOnT(Anderson):
    """The usual type II: coefficients from T instead of D(z) − x."""

    def step(self, z: Tensor, t: Tensor, error: Tensor, state: State) -> tuple[Tensor, State]:
        return super().step(z, t, t, state)


TRIED: dict[str, Method] = {
    "Anderson on D(z) - x (ours)": Anderson(),
    "Anderson on T": AndersonOnT(),
    "estimated step": EstimatedStep(),
    "Halpern": Halpern(),
    "forward step 1": ForwardStep(),
    "over-relaxed 1.5": ForwardStep(1.5),
    "inertial KM": InertialKM(),
}


@click.command()
@experiment_options(64)
@click.option("--steps", multiple=True, type=int, default=(3, 6, 12, 20), show_default=True, help="Budgets.")
def main(source: str, images: Path | None, number: int, output: Path, steps: tuple[int, ...]) -> None:
    """NMSE of each at each budget."""
    from matplotlib.figure import Figure

    model, cache, rows = LatentModel.from_pretrained(source), output / "cache", []
    seen = pictures(model, number, images, scheme=weak_key(model), cache=cache)
    for name, method in TRIED.items():
        for k in steps:
            inverter = Inverter(method, k, early=False)
            nmse = nmse_db(invert_all(model, inverter, seen.images, name=name, cache=cache).latents, seen.latents)
            mean, error = mean_and_error(nmse)
            rows.append(
                {"method": name, "steps": k, "NMSE dB": mean, "standard error": error, "worst": float(nmse.max())}
            )
            click.echo("  ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in rows[-1].values()))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    for name in TRIED:
        some = [r for r in rows if r["method"] == name]
        ax.plot([r["steps"] for r in some], [r["NMSE dB"] for r in some], "o-", label=name)
    ax.set(xlabel="steps", ylabel="NMSE of the latent, dB")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    write_results(output, "study_alternatives", rows, figure, model=model.identity, images=len(seen.names), seed=SEED)


if __name__ == "__main__":
    main()

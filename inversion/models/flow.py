"""Rectified-flow pipelines of the Stable Diffusion kind: a text-conditioned UNet that predicts velocity."""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionPipeline

__all__ = ["RectifiedFlowPipeline", "uniform_sigmas"]


def uniform_sigmas(steps: int) -> list[float]:
    """1, 1 − 1/N, …, 1/N: the levels of N equal Euler steps; the scheduler appends σ = 0."""
    return [1 - i / steps for i in range(steps)]


class RectifiedFlowPipeline(StableDiffusionPipeline):  # type: ignore[misc]  # diffusers is not typed
    """`StableDiffusionPipeline` with `FlowMatchEulerDiscreteScheduler`, which it does not support directly.

    The network predicts v = ε − x0 at z_σ = (1 − σ) x0 + σ ε, timestep 1000 σ. The scheduler lacks the
    `init_noise_sigma` that the pipeline needs (noise has unit variance), and its default spacing ends with a tiny step
    from σ = 0.001; here all steps have equal length.
    """

    def __call__(
        self, *args: Any, num_inference_steps: int = 25, sigmas: list[float] | None = None, **kwargs: Any
    ) -> Any:
        sigmas = uniform_sigmas(num_inference_steps) if sigmas is None else sigmas
        if not hasattr(self.scheduler, "init_noise_sigma"):
            self.scheduler.init_noise_sigma = 1.0
        return super().__call__(*args, num_inference_steps=num_inference_steps, sigmas=sigmas, **kwargs)

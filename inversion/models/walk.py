"""Schedulers that make a diffusers pipeline answer questions: what the network predicts, and which levels it walks.

A pipeline asks its scheduler for timesteps and hands it every prediction. Prompts, guidance, packing of latents, signs
and units of time thereby remain the pipeline's business.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ringmark.inversion.schedule import Schedule

__all__ = ["OneCall", "flow_schedule", "with_scheduler"]


def with_scheduler(pipe: Any, scheduler: Any) -> Any:
    """A shallow copy of a pipeline, of the same modules, with another scheduler and no progress bar."""
    other = copy.copy(pipe)
    other.scheduler = scheduler
    other.set_progress_bar_config(disable=True)
    return other


class _Asked:
    """What pipelines expect of a scheduler besides its steps."""

    order, init_noise_sigma = 1, 1.0

    def __init__(self, config: Any) -> None:
        self.config = config

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Nothing: there is only one timestep."""

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """The latents as they are: all levels have a² + s² = 1 or a + s = 1."""
        return sample


class OneCall(_Asked):
    """Asks for the one timestep `at`, and keeps the network's `output`, after guidance, in the pipeline's packing."""

    at: float | int = 0
    output: Tensor

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """The one timestep, whatever the pipeline wishes."""
        self.timesteps = torch.tensor([self.at], device=device)
        self.sigmas = self.timesteps / self.config.get("num_train_timesteps", 1000)
        self.num_inference_steps = 1

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """Keep the output; the latents do not matter any more."""
        self.output = model_output
        return (sample,)


class _Heard(Exception):
    """The pipeline has said which levels it would walk."""


class _Listening(_Asked):
    """Sets the levels of another scheduler as the pipeline asks, then stops the pipeline."""

    def __init__(self, own: Any) -> None:
        super().__init__(own.config)
        self.own = own

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Set the levels with what is given."""
        asked = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas, "mu": mu}
        self.own.set_timesteps(device="cpu", **{name: value for name, value in asked.items() if value is not None})
        raise _Heard


def flow_schedule(pipe: Any, steps: int, **call: Any) -> Schedule:
    """The levels σ that a pipeline of rectified flow walks in this many steps, for the arguments of this `call`.

    They may depend on the size of the picture and on the number of steps, through the shift of time.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    own = copy.deepcopy(pipe.scheduler)
    if not (isinstance(own, FlowMatchEulerDiscreteScheduler) or own.config.get("use_flow_sigmas")):
        own = FlowMatchEulerDiscreteScheduler.from_config(own.config)
    try:
        with_scheduler(pipe, _Listening(own))(num_inference_steps=steps, **call)
    except _Heard:
        pass
    return Schedule.from_sigma(own.sigmas.flip(0), own.timesteps.flip(0))

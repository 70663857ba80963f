"""Schedulers that find out what a pipeline's network predicts, and at which levels of noise the pipeline calls it.

A pipeline gets its timesteps from its scheduler and passes every prediction to it. A scheduler of our own can therefore
call the network while the pipeline itself handles prompts, guidance, packing of latents, signs and units of time.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ringmark.inversion.schedule import Schedule

__all__ = ["OneCall", "Watched", "flow_schedule", "set_levels", "with_scheduler"]


def with_scheduler(pipe: Any, scheduler: Any) -> Any:
    """A shallow copy of a pipeline, of the same modules, with another scheduler and no progress bar."""
    other = copy.copy(pipe)
    other.scheduler = scheduler
    other.set_progress_bar_config(disable=True)
    return other


class _Asked(ABC):
    """What pipelines expect of a scheduler besides its steps."""

    order, init_noise_sigma = 1, 1.0

    def __init__(self, config: Any) -> None:
        self.config = config

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Called by pipelines, which look for the names of these parameters."""
        asked = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas, "mu": mu}
        self.set_levels(device, {name: value for name, value in asked.items() if value is not None})

    @abstractmethod
    def set_levels(self, device: Any, asked: dict[str, Any]) -> None:
        """Act on what the pipeline asks for."""

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Keep the index, which does not matter: there is only one timestep."""
        self.begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """The latents as they are: all levels have a² + s² = 1 or a + s = 1."""
        return sample


class OneCall(_Asked):
    """Makes the pipeline call its network once, at timestep `at`, and keeps the `output`, after guidance and packed."""

    at: float | int = 0
    output: Tensor

    def set_levels(self, device: Any, asked: dict[str, Any]) -> None:
        """The one timestep, whatever the pipeline asks for."""
        self.timesteps = torch.tensor([self.at], device=device)
        self.sigmas = self.timesteps / self.config.get("num_train_timesteps", 1000)
        self.num_inference_steps = 1

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """Keep the output; the latents no longer matter."""
        self.output = model_output
        return (sample,)


class Watched:
    """A scheduler whose steps are watched: the `first` latents given to it and the `last` returned, packed."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, take = scheduler, scheduler.step
        self.first: Tensor
        self.last: Tensor

        @wraps(take)  # pipelines look for eta and generator in its signature
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not hasattr(self, "first"):
                self.first = sample.clone()
            taken = take(model_output, timestep, sample, *args, **kwargs)
            self.last = taken[0]
            return taken

        scheduler.step = step


class _Heard(Exception):
    """The pipeline has named its levels."""


class _Listening(_Asked):
    """Sets the levels of another scheduler as the pipeline asks for them, then stops the pipeline."""

    def __init__(self, own: Any) -> None:
        super().__init__(own.config)
        self.own = own

    def set_levels(self, device: Any, asked: dict[str, Any]) -> None:
        """Set the levels with what is given."""
        self.own.set_timesteps(device="cpu", **asked)
        raise _Heard


def set_levels(pipe: Any, scheduler: Any, steps: int, **call: Any) -> None:
    """Set the levels of a scheduler as the pipeline does in a `call` with these arguments.

    They may depend on the size of the picture, through the time shift. Raises AssertionError, TypeError or ValueError
    if the scheduler cannot provide what the pipeline asks for.
    """
    try:
        with_scheduler(pipe, _Listening(scheduler))(num_inference_steps=steps, **call)
    except _Heard:
        pass


def flow_schedule(pipe: Any, own: Any, steps: int, **call: Any) -> Schedule:
    """The levels σ that a pipeline of rectified flow walks with its `own` scheduler: see `set_levels`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = copy.deepcopy(own)
    if not (isinstance(own, FlowMatchEulerDiscreteScheduler) or own.config.get("use_flow_sigmas")):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(own.config)
    set_levels(pipe, scheduler, steps, **call)
    return Schedule.from_sigma(scheduler.sigmas.flip(0), scheduler.timesteps.flip(0))

"""The samplers of diffusers by their usual names, and which of them add noise at every step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ringmark.errors import ModelError

__all__ = ["SAMPLERS", "Sampler", "adds_noise", "make_sampler"]

STOCHASTIC = (
    *("EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LTXEulerAncestralRFScheduler"),
    *("LCMScheduler", "FlowMatchLCMScheduler", "SCMScheduler", "CMStochasticIterativeScheduler"),
    *("DDPMScheduler", "DDPMParallelScheduler", "UnCLIPScheduler", "DDPMWuerstchenScheduler"),
    *("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler", "SASolverScheduler", "ScoreSdeVeScheduler"),
)
"""Classes of schedulers that add noise at every step, whatever their settings."""


@dataclass(frozen=True)
class Sampler:
    """Scheduler classes by name: for networks trained on ᾱ, and for rectified flow; "" if there is none.

    `settings` override those of the model.
    """

    alpha_bar: str = ""
    flow: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler"),
    "pndm": Sampler("PNDMScheduler", settings={"skip_prk_steps": True}),
    "euler": Sampler("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    "heun": Sampler("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "lms": Sampler("LMSDiscreteScheduler"),
    "deis": Sampler("DEISMultistepScheduler", "DEISMultistepScheduler", {"algorithm_type": "deis"}),
    "dpm++": Sampler("DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++-karras": Sampler(
        "DPMSolverMultistepScheduler", settings={"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}
    ),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
    "tcd": Sampler("TCDScheduler"),
    "euler-a": Sampler("EulerAncestralDiscreteScheduler"),
    "dpm++-sde": Sampler("DPMSolverMultistepScheduler", settings={"algorithm_type": "sde-dpmsolver++"}),
    "lcm": Sampler("LCMScheduler", "FlowMatchLCMScheduler"),
    "ddpm": Sampler("DDPMScheduler"),
}


def make_sampler(name: str, scheduler: Any, *, flow: bool) -> Any:
    """The sampler of this name with the noise schedule of a model's own `scheduler`.

    `flow`: the model is one of rectified flow. Raises ModelError for a name that does not exist or does not fit.
    """
    import diffusers

    fitting = {n: s.flow if flow else s.alpha_bar for n, s in SAMPLERS.items() if (s.flow if flow else s.alpha_bar)}
    if name not in fitting:
        known = ", ".join(fitting)
        fact = f"is not available for this model; available samplers are {known}"
        raise ModelError("model.sampler", fact, subject=f"sampler {name!r}")
    settings = dict(SAMPLERS[name].settings)
    if flow:
        shift = scheduler.config.get("flow_shift") or scheduler.config.get("shift") or 1.0
        settings |= {"shift": shift, "flow_shift": shift}
        settings |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return getattr(diffusers, fitting[name]).from_config(scheduler.config, **settings)


def adds_noise(scheduler: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a scheduler adds noise after the initial one in a pipeline's call with these arguments."""
    if arguments.get("num_inference_steps") == 1:
        return False
    config, parameters = scheduler.config, inspect.signature(scheduler.step).parameters
    eta = arguments.get("eta", parameters["eta"].default) if "eta" in parameters else 0.0
    return bool(
        {kind.__name__ for kind in type(scheduler).__mro__} & set(STOCHASTIC)
        or str(config.get("algorithm_type")).startswith("sde-")
        or config.get("stochastic_sampling")
        or eta
    )

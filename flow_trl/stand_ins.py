"""What stands in for a pipeline's scheduler, denoiser and VAE while a policy runs its `__call__`."""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch.utils._pytree import tree_map


class Schedule(NamedTuple):
    """
    The noise levels of one sampling run, as the pipeline sets them.

    Args:
        timesteps (`torch.Tensor` of shape `(T,)`): what the denoiser is given at each step.
        sigmas (`torch.Tensor` of shape `(T + 1,)`, float32, on the CPU, *optional*): noise level before each step and
            after the last, where the scheduler has such.
    """

    timesteps: torch.Tensor
    sigmas: torch.Tensor | None


class StepReached(Exception):
    """The pipeline called `scheduler.step`; what was wanted is in the stand-in."""


class Handed(NamedTuple):
    prev_sample: torch.Tensor


class StandIn:
    """
    A scheduler for one call: a copy of the real one whose `step` calls `on_step(model_output, timestep, sample)`, which
    returns the sample of the next step. With a schedule, that one is used whatever the pipeline asks for, after so many
    entries as the pipeline skips.
    """

    @classmethod
    def of(cls, scheduler: Any, on_step: Callable, schedule: Schedule | None = None, skipped: int = 0) -> "StandIn":
        stand_in = copy.deepcopy(scheduler) if schedule is None else copy.copy(scheduler)
        stand_in.__class__ = stand_in_class(type(scheduler), schedule is not None)
        stand_in.on_step = on_step
        if schedule is not None:
            timesteps, sigmas = (
                None if values is None else torch.cat([values[:1].expand(skipped), values]) for values in schedule
            )
            stand_in.timesteps, stand_in.num_inference_steps = timesteps, len(timesteps)
            if sigmas is not None:
                stand_in.sigmas = sigmas
        return stand_in

    def step(self, model_output, timestep, sample, *args, **kwargs) -> Handed:
        return Handed(self.on_step(model_output, timestep, sample))


class FixedStandIn(StandIn):
    order = 1

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None):
        pass

    def set_begin_index(self, begin_index=0):
        pass


@functools.cache
def stand_in_class(scheduler_class: type, fixed: bool) -> type:
    return type(scheduler_class.__name__, (FixedStandIn if fixed else StandIn, scheduler_class), {})


class Encoded:
    """The output of a VAE's `encode`, whose sample is its mode: a condition has no noise of its own."""

    def __init__(self, latents: torch.Tensor):
        self.latents = self.latent = self.mean = latents
        self.latent_dist = self

    def mode(self) -> torch.Tensor:
        return self.latents

    def sample(self, generator: torch.Generator | list | None = None) -> torch.Tensor:
        if generator is not None:  # what is drawn after this is what the pipeline draws
            latents = self.latents
            randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        return self.latents

    def __getitem__(self, index: int) -> "Encoded":
        return self


def mode_of(output: Any) -> torch.Tensor:
    output = output[0] if isinstance(output, tuple) else output
    for name in ("latent_dist", "latents", "latent"):
        output = getattr(output, name, output)
    return output.mode() if hasattr(output, "mode") and not isinstance(output, torch.Tensor) else output


class ModuleProxy:
    """
    A module as others see it: its attributes, the forward of another (its DDP wrapper, say), and a training mode that is
    set already.
    """

    def __init__(self, module: torch.nn.Module, forward: Callable):
        self._module, self._forward = module, forward

    def __getattr__(self, name):
        return getattr(self._module, name)

    def __call__(self, *args, **kwargs):
        return self._forward(*args, **kwargs)

    def train(self, mode: bool = True) -> "ModuleProxy":
        return self


class Experts(torch.nn.ModuleDict):
    """Denoisers that share the steps of a pipeline, such as Wan 2.2's two: one module to wrap and to optimise."""

    def forward(self, name: str, *args, **kwargs):
        return self[name](*args, **kwargs)


class NoOutput(tuple):
    """What a denoiser that is not evaluated returns, with or without `return_dict`."""

    sample = property(lambda self: self[0])


def no_evaluation(*args, **kwargs) -> NoOutput:
    names = [name for name in ("hidden_states", "sample", "x") if name in kwargs]
    return NoOutput((tree_map(torch.zeros_like, kwargs[names[0]] if names else args[0]),))


def no_control(*args, **kwargs) -> tuple[tuple, torch.Tensor]:
    return (), torch.empty(0)


def runner_class(pipeline_class: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """The class of pipeline with a device that is known: its own property walks over all modules several times a call."""
    device = property(lambda self: self.__dict__["_policy_device"])
    return type(pipeline_class.__name__, (pipeline_class,), {"_execution_device": device})

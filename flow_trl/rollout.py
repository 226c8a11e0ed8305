"""Trajectories of a policy, and the ODE completions of all their steps as one moving wavefront."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .conditioning import Conditioning
from .policy import PipelinePolicy, Schedule
from .transitions import Transition
from .utils import to_device


class Trajectory(NamedTuple):
    """
    What [`rollout`] returns: N sampled trajectories with K stochastic steps.

    Args:
        latents (`torch.Tensor` of shape `(N, K + 1, ...)`, float32):
            Latents before each stochastic step, and after the last one.
        log_probs (`torch.Tensor` of shape `(N, K)`, float32):
            Log-probability of each stochastic step, mean over latent elements.
        finals (`torch.Tensor` of shape `(M, N, ...)`, float32):
            Final latents. With completions, M = K + 1 and `finals[k]` follows the first k stochastic steps and then the
            ODE: `finals[0]` is the ODE sample from the same initial noise, `finals[K]` the sampled trajectory itself.
            Without, M = 1 and `finals[0]` is the sampled trajectory.
        schedule ([`~flow_trl.policy.Schedule`]):
            Timesteps and sigmas.
        steps (`range`):
            Indices of the K stochastic steps.
    """

    latents: torch.Tensor
    log_probs: torch.Tensor
    finals: torch.Tensor
    schedule: Schedule
    steps: range

    def cpu(self) -> "Trajectory":
        """The same on the CPU."""
        timesteps, sigmas = self.schedule
        return Trajectory(
            self.latents.cpu(), self.log_probs.cpu(), self.finals.cpu(), Schedule(timesteps.cpu(), sigmas), self.steps
        )

    @classmethod
    def join(cls, parts: list["Trajectory"]) -> "Trajectory":
        """The trajectories of several calls as one."""
        latents, log_probs, finals, schedules, steps = zip(*parts, strict=True)
        return cls(torch.cat(latents), torch.cat(log_probs), torch.cat(finals, dim=1), schedules[0], steps[0])


def euler_step(
    velocity: torch.Tensor, sample: torch.Tensor, step: int, next_step: int, schedule: Schedule
) -> torch.Tensor:
    r"""
    The ODE step of a flow model, \\( x_j = x_i + (s_j - s_i)\, v(x_i, s_i) \\).

    Args:
        velocity, sample (`torch.Tensor` of shape `(N, ...)`):
            Velocity and latents before the step.
        step, next_step (`int`):
            Indices i and j > i of the schedule.
        schedule ([`~flow_trl.policy.Schedule`]):
            The schedule.

    Returns:
        `torch.Tensor` of shape `(N, ...)`: the latents before step j.
    """
    return sample + (schedule.sigmas[next_step] - schedule.sigmas[step]) * velocity


@torch.no_grad()
def rollout(
    policy: PipelinePolicy,
    conditioning: Conditioning,
    prompt_index: list[int],
    generators: list[torch.Generator],
    *,
    num_inference_steps: int,
    transition: Callable[..., Transition] | None = None,
    ode_step: Callable[..., torch.Tensor] = euler_step,
    steps: range = range(0),
    completions: bool = False,
    completion_stride: int = 1,
    batch_size: int | None = None,
    callback: Callable[[int], None] | None = None,
    latents: torch.Tensor | None = None,
    first_step: int = 0,
) -> Trajectory:
    r"""
    Samples N trajectories; the steps outside `steps` are deterministic.

    With `completions`, also follows the ODE to its end from before each stochastic step
    ([TP-GRPO](https://huggingface.co/papers/2602.06422)). At step i the sampled trajectory and all open completions are
    at the same sigma, so they advance together in one batch, and the completion that opens there takes its first step
    with the model output just computed for the trajectory. T steps, all but the last stochastic, cost T (T + 1) / 2
    evaluations per image in T batches, and nothing is approximated.

    Args:
        policy ([`~flow_trl.PipelinePolicy`]):
            The policy.
        conditioning ([`~flow_trl.policy.Conditioning`]):
            Conditioning of the distinct prompts.
        prompt_index (`list[int]`):
            For each of the N samples, its prompt's index in `conditioning`.
        generators (`list[torch.Generator]`):
            One generator (on the CPU) per sample. It draws the initial noise, then the noise of each stochastic step,
            so a sample does not depend on the batch it is in.
        num_inference_steps (`int`):
            Number T of denoising steps.
        transition (`Callable`, *optional*):
            Stochastic step, called as `transition(output, sample, step_index, schedule, noise=noise)`.
        ode_step (`Callable`, *optional*, defaults to [`euler_step`]):
            Deterministic step, called as `ode_step(output, sample, step_index, next_index, schedule)`.
        steps (`range`, *optional*, defaults to `range(0)`):
            Indices of the K stochastic steps, contiguous. The default samples the ODE.
        completions (`bool`, *optional*, defaults to `False`):
            Whether to complete each prefix by the ODE.
        completion_stride (`int`, *optional*, defaults to `1`):
            Number of sigmas that a completion steps over at a time. Above 1 completions are cheaper and approximate.
        batch_size (`int`, *optional*):
            Largest number of latents in one call of the denoiser. If not set, all at once. More samples than that are
            sampled in parts, one after the other.
        callback (`Callable[[int], None]`, *optional*):
            Called with the step index after each step of each part.
        latents (`torch.Tensor` of shape `(N, ...)`, *optional*):
            Latents before `first_step`, from which to go on. If not set, noise.
        first_step (`int`, *optional*, defaults to `0`):
            Index of the first step that is taken; those in `steps` must not be before it.

    Returns:
        [`Trajectory`]

    Example:

    ```python
    >>> conditioning = policy.encode(["a red circle", "a blue square"])
    >>> generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    >>> trajectory = rollout(policy, conditioning, [0, 0, 1, 1], generators, num_inference_steps=20)  # ODE samples
    >>> images = policy.decode(trajectory.finals[0], conditioning[[0, 0, 1, 1]])
    ```
    """
    size = len(prompt_index)
    if batch_size is not None and size > batch_size:
        parts = [
            rollout(
                policy, conditioning, prompt_index[first : first + batch_size], generators[first : first + batch_size],
                num_inference_steps=num_inference_steps, transition=transition, ode_step=ode_step, steps=steps,
                completions=completions, completion_stride=completion_stride, batch_size=batch_size, callback=callback,
                latents=None if latents is None else latents[first : first + batch_size], first_step=first_step,
            )
            for first in range(0, size, batch_size)
        ]  # fmt: skip
        return Trajectory.join(parts)

    conditioning = conditioning.on(policy.device, list(prompt_index))
    sampled, schedule, _ = policy.start(conditioning, num_inference_steps, generators)
    if latents is not None:
        sampled = to_device(latents, sampled.device)
    noise = [torch.stack([torch.randn(sampled.shape[1:], generator=g) for _ in steps]) for g in generators if steps]
    noise = to_device(torch.stack(noise, dim=1), sampled.device) if noise else noise
    together = len(steps) + 1 if batch_size is None else batch_size // size
    repeated = {1: conditioning}  # by how many latents of each sample a call has

    def outputs(latents: list[torch.Tensor], step: int) -> list[torch.Tensor]:
        given = []
        for first in range(0, len(latents), together):
            part = latents[first : first + together]
            if len(part) not in repeated:
                repeated[len(part)] = conditioning[list(range(size)) * len(part)]
            given += policy.predict(torch.cat(part), step, repeated[len(part)], schedule).chunk(len(part))
        return given

    kept, log_probs = [], []
    open_completions: list[torch.Tensor] = []
    arrives: list[int] = []  # the step at which a completion's latents are now
    for i in range(first_step, num_inference_steps):
        due = [k for k, step in enumerate(arrives) if step == i]
        output, *completion_outputs = outputs([sampled, *(open_completions[k] for k in due)], i)
        if completions and i in steps:
            due.append(len(open_completions))
            open_completions.append(sampled)
            arrives.append(i)
            completion_outputs.append(output)
        for k, completion_output in zip(due, completion_outputs, strict=True):
            arrives[k] = min(i + completion_stride, num_inference_steps)
            open_completions[k] = ode_step(completion_output, open_completions[k], i, arrives[k], schedule)
        if i in steps:
            step = transition(output, sampled, i, schedule, noise=noise[len(log_probs)])
            kept.append(sampled)
            log_probs.append(step.log_prob)
            sampled = step.next_sample
            if i + 1 not in steps:
                kept.append(sampled)
        else:
            sampled = ode_step(output, sampled, i, i + 1, schedule)
        if callback is not None:
            callback(i)
    empty = sampled.new_zeros(len(sampled), 0)
    return Trajectory(
        latents=torch.stack(kept, dim=1) if kept else empty,
        log_probs=torch.stack(log_probs, dim=1) if log_probs else empty,
        finals=torch.stack([*open_completions, sampled]),
        schedule=schedule,
        steps=steps,
    )

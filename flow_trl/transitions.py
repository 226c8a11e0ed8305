"""One stochastic denoising step as a Gaussian policy: its mean, its noise, a sample and its log-probability."""

import math
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler


class Transition(NamedTuple):
    """
    What one stochastic step from `x_i` to `x_{i+1}` gave. Every tensor is float32, on the sample's device.

    Attributes:
        next_sample (`torch.Tensor` of shape `(B, ...)`):
            The sample `x_{i+1}`: drawn with `noise`, or the one that was given to be scored.
        mean (`torch.Tensor` of shape `(B, ...)`):
            Mean of the step's Gaussian.
        std (`torch.Tensor` of shape `()`):
            The step's diffusion scale, as its paper writes it: the coefficient *before* `sqrt(-dt)` for `"sde"`, the
            full standard deviation for `"cps"`.
        log_prob (`torch.Tensor` of shape `(B,)`):
            Log-probability of `next_sample`, **averaged** over the latent's elements.
        noise_std (`torch.Tensor` of shape `()`):
            Standard deviation of the noise that was injected: `std * sqrt(-dt)` for `"sde"`, `std` for `"cps"`.
            [`kl_divergence`] needs this one.
    """

    next_sample: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    log_prob: torch.Tensor
    noise_std: torch.Tensor


def flow_step(
    velocity: torch.Tensor,
    sample: torch.Tensor,
    sigma: float | torch.Tensor,
    sigma_next: float | torch.Tensor,
    *,
    noise_level: float,
    sde_type: str = "sde",
    sigma_max: float | torch.Tensor | None = None,
    next_sample: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> Transition:
    r"""
    One stochastic step of a flow-matching model from noise level `sigma` to `sigma_next`.

    The model predicts the velocity `v = noise - data`, so `x_s = (1 - s) data + s noise`. With `s = sigma`,
    `s' = sigma_next`, `dt = s' - s < 0`, `a = noise_level` and `z` standard normal:

    `"sde"` ([Flow-GRPO](https://huggingface.co/papers/2505.05470)):

    $$ \sigma = a \sqrt{\tfrac{s}{1-s}}, \qquad x' = x + \left[v + \tfrac{\sigma^2}{2s}\left(x + (1-s) v\right)\right]
    dt + \sigma \sqrt{-dt}\, z $$

    At `s = 1` the first root would be infinite; there `1 - sigma_max` stands for `1 - s`. The log-probability is the
    normal log-density.

    `"cps"` ([coefficients-preserving sampling](https://huggingface.co/papers/2509.05952)), with `x0 = x - s v` and
    `x1 = x + (1-s) v`:

    $$ \sigma = s' \sin\tfrac{a\pi}{2}, \qquad x' = (1-s')\, x_0 + \sqrt{s'^2 - \sigma^2}\; x_1 + \sigma z $$

    The log-probability is \\( -(x' - \mu)^2 \\), without the constants, as in the paper.

    The math is in float32 whatever the dtype of the input, and so is what is returned. Keep `next_sample` in float32:
    a sample drawn with `noise` and then passed back as `next_sample`, with the same velocity, has a bit-identical
    `log_prob`. Gradients flow from `mean` and `log_prob` to `velocity`; `log_prob` treats `next_sample` as a constant,
    the score-function gradient, also when it was drawn in this call.

    Args:
        velocity (`torch.Tensor` of shape `(B, ...)`):
            Velocity predicted at `sample`, guidance included.
        sample (`torch.Tensor` of shape `(B, ...)`):
            The latents `x_s`: images, packed tokens, video, of any shape.
        sigma (`float` or scalar `torch.Tensor`):
            Noise level of `sample`, in `(0, 1]`: one for the whole batch.
        sigma_next (`float` or scalar `torch.Tensor`):
            Noise level to go to, in `(0, sigma)`. A step to 0 is an ODE step, never a stochastic one.
        noise_level (`float`):
            `a`, the amount of noise. Positive; for `"cps"` at most 1.
        sde_type (`str`, *optional*, defaults to `"sde"`):
            `"sde"` or `"cps"`.
        sigma_max (`float` or scalar `torch.Tensor`, *optional*):
            The schedule's second sigma, `s_1`, in `(0, 1)`. Read, and required, only for `"sde"` at `sigma = 1`.
        next_sample (`torch.Tensor` of shape `(B, ...)`, *optional*):
            A sample to score.
        noise (`torch.Tensor` of shape `(B, ...)`, *optional*):
            Standard normal noise to draw a sample with. Exactly one of `next_sample` and `noise` must be given.

    Returns:
        [`Transition`]: the sample, the step's `mean`, `std` and `noise_std`, and the sample's `log_prob`.

    Raises:
        ValueError: if both or none of `next_sample` and `noise` are given, if shapes differ, if `sde_type` is unknown,
            or if `noise_level`, `sigma`, `sigma_next` or `sigma_max` is out of its range.

    Example:

    ```python
    >>> import torch
    >>> from flow_trl.transitions import flow_step

    >>> x, v, z = torch.randn(3, 2, 16, 32, 32).unbind()  # two latents of 16 x 32 x 32
    >>> drawn = flow_step(v, x, 0.8, 0.6, noise_level=0.7, noise=z)
    >>> scored = flow_step(v, x, 0.8, 0.6, noise_level=0.7, next_sample=drawn.next_sample)
    >>> torch.equal(drawn.log_prob, scored.log_prob)
    True
    ```
    """
    _check_tensors("velocity", velocity, sample, next_sample, noise)
    if sde_type not in ("sde", "cps"):
        raise ValueError(f'`sde_type` is {sde_type!r}: use "sde" or "cps".')
    if not noise_level > 0 or (sde_type == "cps" and noise_level > 1):
        allowed = "0 < noise_level <= 1" if sde_type == "cps" else "noise_level > 0"
        raise ValueError(
            f'`noise_level` is {noise_level}: "{sde_type}" needs {allowed}. A step without noise is an ODE step, '
            "`sample + (sigma_next - sigma) * velocity`."
        )
    a, s, s_next = noise_level, _to_float("sigma", sigma), _to_float("sigma_next", sigma_next)
    tol = 1e-6  # schedules shifted in float32 miss 1 by a rounding error, and 1 / (1 - s) would blow it up
    if not 0 < s <= 1 + tol:
        raise ValueError(f"`sigma` is {s}: it must be in (0, 1]. Pass the scheduler's sigma, not its timestep.")
    if not 0 < s_next < s:
        raise ValueError(
            f"`sigma_next` is {s_next}: it must be below `sigma`, which is {s}, and above 0. Pass two neighbours of "
            "the decreasing schedule; the step to 0 is an ODE step, `sample + (sigma_next - sigma) * velocity`."
        )

    x, v, dt = sample.float(), velocity.float(), s_next - s
    if sde_type == "sde":
        s_safe = s
        if s > 1 - tol:
            s_safe = math.nan if sigma_max is None else _to_float("sigma_max", sigma_max)
            if not 0 < s_safe < 1:
                raise ValueError(
                    f'`sigma_max` is {sigma_max}: "sde" at `sigma` = 1 needs it, in (0, 1). Pass the schedule\'s '
                    "second sigma, which takes the place of 1 in 1 - sigma."
                )
        std = a * math.sqrt(s / (1 - s_safe))
        noise_std = std * math.sqrt(-dt)
        mean = x * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
        log_density = _normal_log_density
    else:
        std = noise_std = s_next * math.sin(a * math.pi / 2)
        x0, x1 = x - s * v, x + (1 - s) * v
        mean = (1 - s_next) * x0 + s_next * math.cos(a * math.pi / 2) * x1  # cos: sqrt(s'^2 - std^2)
        log_density = _negative_square
    return _transition(mean, std, noise_std, log_density, next_sample, noise)


def ddim_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    timestep: int | torch.Tensor,
    scheduler: DDIMScheduler,
    *,
    eta: float = 1.0,
    next_sample: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> Transition:
    r"""
    One stochastic step of a diffusion model by DDIM: draws `x_{t'}` from `x_t` with `noise`, or scores a given
    `next_sample`.

    With the noise \\( \epsilon \\) and the clean sample \\( x_0 \\) that the model output stands for
    ([DDIM](https://huggingface.co/papers/2010.02502), as a policy in [DDPO](https://huggingface.co/papers/2305.13301)):

    $$ \sigma = \eta \sqrt{\tfrac{1-\bar\alpha_{t'}}{1-\bar\alpha_t} \left(1 - \tfrac{\bar\alpha_t}{\bar\alpha_{t'}}\right)},
    \qquad x' = \sqrt{\bar\alpha_{t'}}\, x_0 + \sqrt{1-\bar\alpha_{t'}-\sigma^2}\; \epsilon + \sigma z $$

    The next timestep t' is one stride of the scheduler below t, at least 0: so the last step is stochastic too, unless it
    starts at timestep 0. The log-probability is the normal log-density. Precision, gradients and what is
    bit-identical are as in [`flow_step`].

    Args:
        model_output (`torch.Tensor` of shape `(B, ...)`):
            What the model predicted at `sample`, guidance included: noise, v or the clean sample, as
            `scheduler.config.prediction_type` says.
        sample (`torch.Tensor` of shape `(B, ...)`):
            The latents `x_t`.
        timestep (`int` or scalar `torch.Tensor`):
            Timestep of `sample`: one for the whole batch.
        scheduler ([`~diffusers.DDIMScheduler`]):
            The noise schedule, after `set_timesteps`. It is not modified.
        eta (`float`, *optional*, defaults to `1.0`):
            Amount of noise, in (0, 1]. 1 is that of DDPM.
        next_sample, noise (`torch.Tensor` of shape `(B, ...)`, *optional*):
            A sample to score, or noise to draw one with, as in [`flow_step`].

    Returns:
        [`Transition`]: `std` and `noise_std` are both the standard deviation \\( \sigma \\).

    Raises:
        ValueError: if both or none of `next_sample` and `noise` are given, if shapes differ, if `eta` is out of its
            range, if `set_timesteps` was not called, or if the step has no noise because it starts at timestep 0.

    Example:

    ```python
    >>> import torch
    >>> from diffusers import DDIMScheduler
    >>> from flow_trl.transitions import ddim_step

    >>> scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    >>> scheduler.set_timesteps(50)
    >>> x, output, z = torch.randn(3, 2, 4, 64, 64).unbind()
    >>> drawn = ddim_step(output, x, scheduler.timesteps[0], scheduler, noise=z)
    >>> scored = ddim_step(output, x, scheduler.timesteps[0], scheduler, next_sample=drawn.next_sample)
    >>> torch.equal(drawn.log_prob, scored.log_prob)
    True
    ```
    """
    _check_tensors("model_output", model_output, sample, next_sample, noise)
    if not 0 < eta <= 1:
        raise ValueError(
            f"`eta` is {eta}: it must be in (0, 1]; 1 is usual. A step without noise (`eta` of 0) has no probability: "
            "use `scheduler.step`."
        )
    config = scheduler.config
    if scheduler.num_inference_steps is None:
        raise ValueError("`scheduler` has no timesteps: call `scheduler.set_timesteps(num_inference_steps)` first.")
    t = int(timestep)
    t_next = max(t - config.num_train_timesteps // scheduler.num_inference_steps, 0)
    if not t_next < t < config.num_train_timesteps:
        raise ValueError(
            f"`timestep` is {t}: it must be in [1, {config.num_train_timesteps - 1}], since a step from 0 has no noise. "
            "If the scheduler's last timestep is 0, give it `steps_offset=1` or fewer steps."
        )
    alpha, alpha_next = scheduler.alphas_cumprod[t].item(), scheduler.alphas_cumprod[t_next].item()
    std = eta * math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))

    x, output = sample.float(), model_output.float()
    if config.prediction_type == "epsilon":
        x0, epsilon = (x - math.sqrt(1 - alpha) * output) / math.sqrt(alpha), output
    elif config.prediction_type == "v_prediction":
        x0 = math.sqrt(alpha) * x - math.sqrt(1 - alpha) * output
        epsilon = math.sqrt(alpha) * output + math.sqrt(1 - alpha) * x
    else:
        x0, epsilon = output, (x - math.sqrt(alpha) * output) / math.sqrt(1 - alpha)
    if config.thresholding:
        x0 = scheduler._threshold_sample(x0)
    elif config.clip_sample:
        x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
    mean = math.sqrt(alpha_next) * x0 + math.sqrt(1 - alpha_next - std**2) * epsilon
    return _transition(mean, std, std, _normal_log_density, next_sample, noise)


def kl_divergence(
    transition_mean: torch.Tensor, reference_mean: torch.Tensor, noise_std: float | torch.Tensor
) -> torch.Tensor:
    r"""
    Kullback-Leibler divergence between two steps that differ in their mean alone.

    $$ \mathrm{KL} = \frac{(\mu - \mu_\text{ref})^2}{2\, \sigma_\text{noise}^2} $$

    averaged over the latent's elements ([Flow-GRPO](https://huggingface.co/papers/2505.05470)). It is exact
    for normal steps that share their noise, and symmetric.

    Args:
        transition_mean (`torch.Tensor` of shape `(B, ...)`):
            [`Transition`]'s `mean` under the policy.
        reference_mean (`torch.Tensor` of shape `(B, ...)`):
            [`Transition`]'s `mean` under the reference model, at the same sample.
        noise_std (`float` or scalar `torch.Tensor`):
            [`Transition`]'s `noise_std`, positive. Not its `std`.

    Returns:
        `torch.Tensor` of shape `(B,)`: the divergence, float32, at least 0.

    Raises:
        ValueError: if the means' shapes differ.

    Example:

    ```python
    >>> import torch
    >>> from flow_trl.transitions import kl_divergence

    >>> kl_divergence(torch.zeros(2, 16, 8, 8), torch.ones(2, 16, 8, 8), noise_std=0.5)
    tensor([2., 2.])
    ```
    """
    _check_shape("reference_mean", reference_mean, "transition_mean", transition_mean)
    return _mean_over_elements((transition_mean.float() - reference_mean.float()) ** 2 / (2 * noise_std**2))


def _check_tensors(name, output, sample, next_sample, noise) -> None:
    if (next_sample is None) == (noise is None):
        got = "neither" if noise is None else "both"
        raise ValueError(
            f"Exactly one of `next_sample` and `noise` must be given, got {got}: pass `noise` to draw a sample, or "
            "`next_sample` to score one."
        )
    for key, tensor in ((name, output), ("next_sample", next_sample), ("noise", noise)):
        if tensor is not None:
            _check_shape(key, tensor, "sample", sample)


def _check_shape(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(tensor.shape)}, `{other_name}` has {tuple(other.shape)}: they must be equal."
        )


def _transition(mean, std, noise_std, log_density, next_sample, noise) -> Transition:
    """The step with this mean that is drawn with `noise`, or ends in `next_sample`."""
    next_sample = next_sample.float() if noise is None else mean + noise_std * noise.float()
    log_prob = _mean_over_elements(log_density(next_sample.detach(), mean, noise_std))
    return Transition(next_sample, mean, mean.new_full((), std), log_prob, mean.new_full((), noise_std))


def _normal_log_density(x: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    return -((x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)


def _negative_square(x: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    return -((x - mean) ** 2)


def _mean_over_elements(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(len(x), -1).mean(1)


def _to_float(name: str, value: float | torch.Tensor) -> float:
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)}: it must be one number. Make one call per denoising step."
        )
    return float(value)

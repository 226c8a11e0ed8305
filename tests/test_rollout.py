import math
from functools import partial

import numpy as np
import pytest
import torch

from flow_trl.policy import PipelinePolicy
from flow_trl.rollout import euler_step, rollout
from flow_trl.transitions import flow_step
from tests import pipelines


PROMPTS = ["a red circle", "two small blue squares"]
INDEX = [0, 0, 1]
NOISE_LEVEL = {"sde": 0.7, "cps": 0.8}


@pytest.fixture(scope="module")
def policy():
    pipe = pipelines.stable_diffusion_3(t5=False)
    return PipelinePolicy(pipe, guidance_scale=1.0, max_sequence_length=16)


@pytest.fixture(scope="module")
def conditioning(policy):
    return policy.encode(PROMPTS)


def generators():
    return [torch.Generator().manual_seed(seed) for seed in range(len(INDEX))]


def transition(velocity, sample, step, schedule, *, sde_type="sde", **kwargs):
    sigmas = schedule.sigmas
    return flow_step(
        velocity, sample, sigmas[step], sigmas[step + 1], noise_level=NOISE_LEVEL[sde_type], sde_type=sde_type,
        sigma_max=sigmas[1], **kwargs
    )  # fmt: skip


@pytest.fixture
def sample(policy, conditioning):
    """Rollouts of `INDEX`, stochastic where there are `steps`."""
    return partial(rollout, policy, conditioning, INDEX, transition=transition)


def stochastic_step(x, v, s, s_next, s_1, z, sde_type):
    """The specification's formulas, in Python floats: the next sample and its log-probability."""
    a, dt = NOISE_LEVEL[sde_type], s_next - s
    if sde_type == "sde":
        std = a * math.sqrt(s / (1 - (s_1 if s == 1 else s)))
        mean = x * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
        noise = std * math.sqrt(-dt) * z
        log_prob = -(z**2) / 2 - math.log(std * math.sqrt(-dt)) - math.log(math.sqrt(2 * math.pi))
    else:
        std = s_next * math.sin(a * math.pi / 2)
        mean = (1 - s_next) * (x - s * v) + math.sqrt(s_next**2 - std**2) * (x + (1 - s) * v)
        noise = std * z
        log_prob = -(noise**2)
    return mean + noise, log_prob.mean()


def one_after_another(policy, prompt, generator, num_steps, steps, sde_type, stride=1):
    """One sample: the trajectory first, then each completion from its stored latents by a plain ODE loop."""
    x, schedule, conditioning = policy.start([prompt], num_steps, generator)
    s = schedule.sigmas.tolist()

    def ode(x, i, n):
        return x + (s[min(i + n, num_steps)] - s[i]) * policy.predict(x, i, conditioning, schedule)

    latents, log_probs = [], []
    for i in range(num_steps):
        if i in steps:
            latents.append(x)
            z = torch.randn(x.shape[1:], generator=generator)
            velocity = policy.predict(x, i, conditioning, schedule)
            x, log_prob = stochastic_step(x, velocity, s[i], s[i + 1], s[1], z, sde_type)
            log_probs.append(log_prob)
            if i + 1 not in steps:
                latents.append(x)
        else:
            x = ode(x, i, 1)
    finals = []
    for k, i in enumerate(steps):
        y = latents[k]
        while i < num_steps:
            y = ode(y, i, stride)
            i += stride
        finals.append(y)
    return torch.cat(latents), torch.stack(log_probs), torch.cat([*finals, x])


@pytest.mark.parametrize("batch_size", [1, 3, None])
@pytest.mark.parametrize(
    "sde_type, steps, stride",
    [
        ("sde", range(0, 4), 1),
        ("cps", range(0, 4), 1),
        ("sde", range(1, 3), 1),
        ("cps", range(2, 3), 1),
        ("sde", range(0, 4), 2),
        ("cps", range(1, 4), 3),
    ],
)
def test_equals_completions_run_one_after_another(policy, sample, sde_type, steps, stride, batch_size):
    trajectory = sample(
        generators(),
        num_inference_steps=5,
        transition=partial(transition, sde_type=sde_type),
        steps=steps,
        completions=True,
        completion_stride=stride,
        batch_size=batch_size,
    )
    assert trajectory.steps == steps
    assert trajectory.finals.shape[:2] == (len(steps) + 1, len(INDEX))
    for n, generator in enumerate(generators()):
        latents, log_probs, finals = one_after_another(
            policy, PROMPTS[INDEX[n]], generator, 5, steps, sde_type, stride
        )
        torch.testing.assert_close(trajectory.latents[n], latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(trajectory.log_probs[n], log_probs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(trajectory.finals[:, n], finals, rtol=1e-5, atol=1e-5)
    for k in range(1, len(steps) + 1):  # otherwise the comparison says little
        assert (trajectory.finals[k] - trajectory.finals[k - 1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "completions, stride, evaluations, calls, batch_size, largest",
    [
        (True, 1, 55, 10, None, 30),
        (True, 1, 55, 55, 3, 3),  # each call is one latent of each sample
        (True, 1, 55, 55, 5, 3),
        (True, 1, 55, 30, 6, 6),
        (True, 1, 55, 55 + 30, 2, 2),  # two samples, then one, of which two latents fit into a call
        (True, 2, 30, 10, None, 15),
        (False, 1, 10, 10, None, 3),
    ],
)
def test_cost(policy, sample, completions, stride, evaluations, calls, batch_size, largest):
    """Counted where it arises: rows that go through the denoiser."""
    rows = []
    hook = policy.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    counted = policy.evaluations
    sample(
        generators(),
        num_inference_steps=10,
        steps=range(9),
        completions=completions,
        completion_stride=stride,
        batch_size=batch_size,
    )
    hook.remove()
    assert sum(rows) == evaluations * len(INDEX)
    assert policy.evaluations - counted == sum(rows)
    assert (len(rows), max(rows)) == (calls, largest)


def test_first_completion_is_the_ode_image_from_the_same_noise(sample):
    sampled = sample(generators(), num_inference_steps=4, steps=range(3), completions=True)
    ode = sample(generators(), num_inference_steps=4)
    torch.testing.assert_close(sampled.finals[0], ode.finals[0], rtol=1e-5, atol=1e-5)
    without = sample(generators(), num_inference_steps=4, steps=range(3))
    torch.testing.assert_close(without.finals, sampled.finals[-1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(without.latents, sampled.latents, rtol=1e-5, atol=1e-5)


def test_ode_equals_the_pipeline(policy, conditioning, sample):
    trajectory = sample(generators(), num_inference_steps=4)
    assert trajectory.latents.shape[1:] == trajectory.log_probs.shape[1:] == (0,)
    images = policy.decode(trajectory.finals[0], conditioning[INDEX], output_type="np")
    expected = policy.pipe(
        [PROMPTS[i] for i in INDEX], num_inference_steps=4, guidance_scale=1.0, max_sequence_length=16,
        generator=generators(), output_type="np",
    ).images  # fmt: skip
    assert np.array_equal(images, expected)


def test_a_sample_does_not_depend_on_the_others(policy, conditioning):
    sample = partial(
        rollout, policy, conditioning, num_inference_steps=4, transition=transition, steps=range(3), completions=True
    )
    together = sample(INDEX, generators())
    alone = sample(INDEX[2:], generators()[2:])
    torch.testing.assert_close(alone.finals[:, 0], together.finals[:, 2], rtol=1e-5, atol=1e-5)
    assert (together.finals[:, 0] - together.finals[:, 1]).abs().max() > 0.1  # the same prompt, other noise


def test_callback_and_no_gradients(sample):
    seen = []
    trajectory = sample(generators(), num_inference_steps=3, steps=range(2), callback=seen.append)
    assert seen == [0, 1, 2]
    assert not any(tensor.requires_grad for tensor in trajectory[:3])
    assert all(tensor.dtype == torch.float32 for tensor in trajectory[:3])


# Going on from given latents


@pytest.mark.parametrize("batch_size", [None, 2, 1])
@pytest.mark.parametrize("first_step", [0, 1, 3])
def test_going_on_is_the_tail_of_a_rollout(policy, sample, first_step, batch_size):
    before = []  # latents before each step, part by part

    def watched(output, sample, step, next_step, schedule):
        if step == first_step:
            before.append(sample.clone())
        return euler_step(output, sample, step, next_step, schedule)

    full = sample(generators(), num_inference_steps=4, ode_step=watched, batch_size=batch_size)
    assert len(before) == {None: 1, 2: 2, 1: 3}[batch_size]
    latents, seen = torch.cat(before), []
    copy, evaluations = latents.clone(), policy.evaluations
    tail = sample(
        [torch.Generator().manual_seed(99) for _ in INDEX], num_inference_steps=4, batch_size=batch_size,
        latents=latents, first_step=first_step, callback=seen.append,
    )  # fmt: skip
    assert torch.equal(tail.finals, full.finals)
    assert torch.equal(latents, copy)
    assert seen == list(range(first_step, 4)) * len(before)
    assert policy.evaluations - evaluations == (4 - first_step) * len(INDEX)
    assert torch.equal(tail.schedule.sigmas, full.schedule.sigmas)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_stochastic_steps_and_completions_from_given_latents(policy, sample, batch_size):
    start = sample(generators(), num_inference_steps=5, steps=range(4))
    latents = start.latents[:, 2]
    went_on = sample(
        generators(), num_inference_steps=5, steps=range(2, 4), completions=True, latents=latents, first_step=2,
        batch_size=batch_size,
    )  # fmt: skip
    assert went_on.latents.shape[1] == 3 and went_on.finals.shape[:2] == (3, len(INDEX))
    assert torch.equal(went_on.latents[:, 0], latents)
    for n, generator in enumerate(generators()):
        x, schedule, embedded = policy.start([PROMPTS[INDEX[n]]], 5, generator)  # draws the initial noise
        s, x = schedule.sigmas.tolist(), latents[n : n + 1]
        ode = x
        for i in range(2, 5):
            ode = ode + (s[i + 1] - s[i]) * policy.predict(ode, i, embedded, schedule)
        torch.testing.assert_close(went_on.finals[0, n], ode[0], rtol=1e-5, atol=1e-5)
        for k, i in enumerate((2, 3)):
            z = torch.randn(x.shape[1:], generator=generator)
            velocity = policy.predict(x, i, embedded, schedule)
            x, log_prob = stochastic_step(x, velocity, s[i], s[i + 1], s[1], z, "sde")
            torch.testing.assert_close(went_on.latents[n, k + 1], x[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(went_on.log_probs[n, k], log_prob, rtol=1e-5, atol=1e-5)
    assert (went_on.finals[-1] - start.finals[-1]).abs().amax(dim=(1, 2, 3)).min() > 0.1  # other noise, other images


def test_straight_to_0_is_one_euler_step_from_each_state(policy, conditioning, sample):
    """Its velocity is the trajectory's own, so the completions cost nothing."""
    evaluations = policy.evaluations
    sampled = sample(generators(), num_inference_steps=5, steps=range(4), completions=True, completion_stride=5)
    assert policy.evaluations - evaluations == 5 * len(INDEX)
    embedded = conditioning[INDEX]
    for k in range(4):
        x, s = sampled.latents[:, k], sampled.schedule.sigmas[k].item()
        velocity = policy.predict(x, k, embedded, sampled.schedule)
        torch.testing.assert_close(sampled.finals[k], x - s * velocity, rtol=1e-5, atol=1e-5)
    without = sample(generators(), num_inference_steps=5, steps=range(4))
    assert torch.equal(without.latents, sampled.latents) and torch.equal(without.log_probs, sampled.log_probs)
    assert torch.equal(without.finals[0], sampled.finals[-1])

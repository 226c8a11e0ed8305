"""Every class of pipeline that is promised: what the policy samples is what the pipeline samples, and what it trains."""

import copy

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from flow_trl.policy import PipelinePolicy
from tests import pipelines_conditioned, pipelines_image, pipelines_video


PROMPTS = ["a red circle", "a blue cat"]  # of the same length, so the pipeline's own batch needs no padding
STEPS = 3
CASES = {**pipelines_image.CASES, **pipelines_video.CASES, **pipelines_conditioned.CASES}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(autouse=True)
def conditions_without_noise(monkeypatch):
    """A VAE's sample is its mode, as in the policy; what is drawn afterwards stays the same."""
    draw = DiagonalGaussianDistribution.sample

    def sample(self, generator=None):
        if generator is not None:
            draw(self, generator)
        return self.mode()

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", sample)


def make(case, guidance_scale=None):
    return PipelinePolicy(case.build(), guidance_scale=guidance_scale, **case.kwargs)


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def scheduler_step(policy, output, latents, i, schedule):
    if schedule.sigmas is not None:
        return latents + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * output
    scheduler = copy.deepcopy(policy.pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    return scheduler.step(output, schedule.timesteps[i], latents, eta=0.0).prev_sample


def sample(policy, columns):
    conditioning = policy.encode(PROMPTS, **columns)
    latents, schedule, _ = policy.start(conditioning, STEPS, generators(2))
    for i in range(STEPS):
        latents = scheduler_step(policy, policy.predict(latents, i, conditioning, schedule), latents, i, schedule)
    return np.stack(policy.decode(latents, conditioning, output_type="np"))


def call(policy, columns):
    """The same from the pipeline itself, called for each prompt, or for both where a call may have any prompts."""
    steps = policy._steps_asked(STEPS)
    common = {**policy.call_kwargs, "num_inference_steps": steps, "output_type": "np"}
    if not columns and len(policy.encode(PROMPTS).batches) == 1:
        return np.stack(policy.pipe(**policy._texts(PROMPTS), generator=generators(2), **common)[0])
    results = []
    for i, (prompt, generator) in enumerate(zip(PROMPTS, generators(2), strict=True)):
        given = {name: values[i] for name, values in columns.items()}
        results += list(policy.pipe(**policy._texts([prompt]), generator=[generator], **given, **common)[0])
    return np.stack(results)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_rollout_equals_the_pipeline(case, guided):
    policy = make(case, case.guidance[0 if guided else 1])
    images, expected = sample(policy, case.columns), call(policy, case.columns)
    assert np.array_equal(images, expected)
    assert expected.std() > 0.01 and not np.array_equal(expected[0], expected[1])


def test_gradients_and_an_update(case):
    policy = make(case, case.guidance[0])
    conditioning = policy.encode(PROMPTS, **case.columns)
    latents, schedule, _ = policy.start(conditioning, STEPS, generators(2))
    sampled = policy.predict(latents, 1, conditioning, schedule)
    trained = policy.predict(latents, 1, conditioning, schedule, grad=True)
    assert torch.equal(sampled, trained)  # so an on-policy ratio is exactly 1
    trained.square().mean().backward()
    gradients = [parameter.grad for parameter in policy.denoiser.parameters() if parameter.grad is not None]
    assert len(gradients) > 0.7 * len(list(policy.denoiser.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.optim.SGD(policy.denoiser.parameters(), lr=1e-2).step()
    assert (policy.predict(latents, 1, conditioning, schedule) - sampled).abs().max() > 0

"""Every class of pipeline that is promised: what the policy samples is what the pipeline samples, and what it trains."""

import copy

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from peft import LoraConfig, PeftModel

from flow_trl.loading import prepare_denoisers, save_lora
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


def sample(policy, conditioning, generators):
    latents, schedule, _ = policy.start(conditioning, STEPS, generators)
    for i in range(STEPS):
        latents = scheduler_step(policy, policy.predict(latents, i, conditioning, schedule), latents, i, schedule)
    return np.stack(policy.decode(latents, conditioning, output_type="np"))


def call(policy, prompts, generators, **given):
    """The same from the pipeline itself."""
    negative = "" if policy.call_kwargs.get("true_cfg_scale", 1) > 1 else None  # without one these leave guidance out
    texts = {"prompt": list(prompts)} | ({} if negative is None else {"negative_prompt": [negative] * len(prompts)})
    steps = {"num_inference_steps": 4 if policy.call_kwargs.get("strength", 1) < 1 else STEPS}  # 3 of 4 at 0.6
    return np.stack(
        policy.pipe(**texts, **given, **policy.call_kwargs, **steps, generator=generators, output_type="np")[0]
    )


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_rollout_equals_the_pipeline(case, guided):
    policy = make(case, case.guidance[0 if guided else 1])
    conditioning = policy.encode(PROMPTS, **case.columns)
    images = sample(policy, conditioning, generators(2))
    if not case.columns and len(conditioning.batches) == 1:
        assert np.array_equal(images, call(policy, PROMPTS, generators(2)))
    alone = []
    for i, prompt in enumerate(PROMPTS):
        generator = generators(2)[i : i + 1]
        expected = call(policy, [prompt], generator, **{name: values[i] for name, values in case.columns.items()})
        row = policy.encode([prompt], **{name: values[i : i + 1] for name, values in case.columns.items()})
        alone.append(sample(policy, row, generators(2)[i : i + 1]))
        assert np.array_equal(alone[-1], expected) and expected.std() > 0.01
    np.testing.assert_allclose(images, np.concatenate(alone), atol=1e-4)
    assert np.abs(images[0] - images[1]).max() > 0.01


def test_gradients_and_an_update(case):
    policy = make(case, case.guidance[0])
    conditioning = policy.encode(PROMPTS, **case.columns)
    latents, schedule, _ = policy.start(conditioning, STEPS, generators(2))

    def predict(**kwargs):  # at the first step and the last, of which an expert each has one
        return torch.stack([policy.predict(latents, i, conditioning, schedule, **kwargs) for i in (0, STEPS - 1)])

    sampled, trained = predict(), predict(grad=True)
    assert torch.equal(sampled, trained)  # so an on-policy ratio is exactly 1
    trained.square().mean().backward()
    gradients = [parameter.grad for parameter in policy.denoiser.parameters() if parameter.grad is not None]
    assert len(gradients) > 0.7 * len(list(policy.denoiser.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.optim.SGD(policy.denoiser.parameters(), lr=1e-2).step()
    assert ((predict() - sampled).abs().flatten(1).amax(1) > 0).all()


def test_a_lora_survives_saving(case, tmp_path):
    """Loaded as a model card says, it gives what was trained."""
    policy = make(case, case.guidance[0])
    conditioning = policy.encode(PROMPTS, **case.columns)
    latents, schedule, _ = policy.start(conditioning, STEPS, generators(2))
    before = policy.predict(latents, 1, conditioning, schedule)
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=r".*(to_q|to_v|to_query|to_value)")
    assert prepare_denoisers(policy.pipe, policy.denoisers, config)
    trained = policy.predict(latents, 1, conditioning, schedule)
    assert (trained - before).abs().max() > 1e-3
    save_lora(policy.pipe, policy.denoisers, tmp_path)

    loaded = make(case, case.guidance[0])
    first, *others = loaded.denoisers
    if isinstance(policy.denoisers[first], PeftModel):
        setattr(loaded.pipe, first, PeftModel.from_pretrained(loaded.denoisers[first], tmp_path))
    elif not hasattr(loaded.pipe, "load_lora_weights"):
        loaded.denoisers[first].load_lora_adapter(
            tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors"
        )
    else:
        loaded.pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    for name in others:
        loaded.pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", **{f"load_into_{name}": True})
    torch.testing.assert_close(loaded.predict(latents, 1, conditioning, schedule), trained)

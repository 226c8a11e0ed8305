import copy
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, DDPMPipeline, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from flow_trl.policy import PIPELINE_FAMILIES, PipelineFamily, PipelinePolicy
from tests import pipelines


PROMPTS = ["a red circle", "two small blue squares beside one large green star", "cat"]
STEPS = 3
SIZE = {"height": 32, "width": 16}
FAMILIES = {  # builder, further arguments of the call
    "sd3": (pipelines.stable_diffusion_3, {"max_sequence_length": 16}),
    "sd3_without_t5": (partial(pipelines.stable_diffusion_3, t5=False), {"max_sequence_length": 16}),
    "flux": (pipelines.flux, {"max_sequence_length": 16}),
    "flux_true_cfg": (pipelines.flux, {"max_sequence_length": 16, "true_cfg_scale": 3.0}),
    "qwen": (pipelines.qwen_image, {"max_sequence_length": 32}),
    "sd": (pipelines.stable_diffusion, {}),
    "sdxl": (pipelines.stable_diffusion_xl, {}),
    "wan": (pipelines.wan, {"num_frames": 1, "max_sequence_length": 16}),
    "wan_video": (pipelines.wan, {"num_frames": 5, "max_sequence_length": 16}),
}
SIX = ["sd3", "flux", "qwen", "sd", "sdxl", "wan"]
TWO_PASSES = ["sd3", "qwen", "sd", "sdxl", "wan"]  # guidance by a negative prompt


def make(family, guidance_scale=4.0, **kwargs):
    builder, call_kwargs = FAMILIES[family]
    return PipelinePolicy(builder(), guidance_scale=guidance_scale, **{**SIZE, **call_kwargs, **kwargs})


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(policy, prompts=PROMPTS, output_type="np"):
    """A rollout, step by step: the ODE of a flow model, or the scheduler's own DDIM step."""
    latents, schedule, conditioning = policy.start(prompts, STEPS, generators(*range(len(prompts))))
    scheduler = copy.deepcopy(policy.pipe.scheduler)
    if schedule.sigmas is None:
        scheduler.set_timesteps(STEPS)
    for i in range(STEPS):
        output = policy.predict(latents, i, conditioning, schedule)
        if schedule.sigmas is None:
            latents = scheduler.step(output, schedule.timesteps[i], latents, eta=0.0).prev_sample
        else:
            latents = latents + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * output
    return policy.decode(latents, conditioning, output_type=output_type)


def call(policy, prompts=PROMPTS, output_type="np", **kwargs):
    """The same from the pipeline itself."""
    return policy.pipe(
        prompts,
        num_inference_steps=STEPS,
        generator=generators(*range(len(prompts))),
        output_type=output_type,
        **{**policy.call_kwargs, **kwargs},
    )[0]


def begin(policy, step=1):
    """Latents in the middle of a rollout, and the arguments of `predict` for them."""
    latents, schedule, conditioning = policy.start(PROMPTS, STEPS, generators(0, 1, 2))
    return latents, step, conditioning, schedule


@pytest.mark.parametrize("negative_prompt", [None, "blurry photo"])
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_equals_the_pipeline(family, guidance_scale, negative_prompt):
    policy = make(family, guidance_scale, negative_prompt=negative_prompt)
    if negative_prompt is None and family in ("qwen", "flux_true_cfg"):
        negative_prompt = ""  # without it these pipelines leave guidance out
    negative = {} if negative_prompt is None else {"negative_prompt": [negative_prompt] * len(PROMPTS)}
    images, expected = sample(policy), call(policy, **negative)
    assert np.array_equal(images, expected) and expected.std() > 0.05


@pytest.mark.parametrize("family", ["sd3", "sd", "wan_video"])
def test_rollout_equals_the_pipeline_in_pil(family):
    policy = make(family)
    images, expected = sample(policy, output_type="pil"), call(policy, output_type="pil")
    frames = [5, 16, 3] if family == "wan_video" else [3]
    assert len(images) == len(PROMPTS) and np.array_equal(np.array(images), np.array(expected))
    assert np.array(images).shape == (len(PROMPTS), *frames[:-2], 32, 16, 3)


def test_a_video_of_one_frame_is_an_image():
    images = sample(make("wan"), output_type="pil")
    assert [image.size for image in images] == [(16, 32)] * len(PROMPTS)

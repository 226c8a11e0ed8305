import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image

from flow_trl.policy import PipelinePolicy
from flow_trl.rollout import euler_step
from tests import pipelines
from tests.pipelines_image import flux2, hunyuan_image
from tests.pipelines_video import LARGE, kandinsky5


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


@pytest.mark.parametrize("negative_prompt", [None, "blurry photo"])
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_check_finds_nothing(family, guidance_scale, negative_prompt):
    policy = make(family, guidance_scale=guidance_scale, negative_prompt=negative_prompt)
    scheduler = policy.pipe.scheduler

    def step(output, sample, step, next_step, schedule):
        if schedule.sigmas is not None:
            return euler_step(output, sample, step, next_step, schedule)
        scheduler.set_timesteps(len(schedule.timesteps))
        return scheduler.step(output, scheduler.timesteps[step], sample, return_dict=False)[0]

    assert policy.check([*PROMPTS, *PROMPTS], 3, step) == 0.0
    assert policy.evaluations == 0


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


JOINT = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
OUTPUTS_OF_ENCODE_PROMPT = {
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds", "txt_ids"),
    "QwenImagePipeline": ("prompt_embeds", "prompt_embeds_mask"),
}


def embeddings(policy, conditioning):
    """What `encode_prompt` returned, by name; for classes that call it once more, with another prefix."""
    names = OUTPUTS_OF_ENCODE_PROMPT.get(type(policy.pipe).__name__, JOINT)
    calls = [output for name, output in conditioning.batches[0].recorded if name == "encode_prompt"]
    return {
        prefix + name: value
        for prefix, output in zip(("", "negative_"), calls, strict=False)
        for name, value in zip(names, output, strict=False)
    }


def velocity(policy, latents, timestep, conditioning, prefix=""):
    """One forward pass of each denoiser, written by hand."""
    given = embeddings(policy, conditioning)
    named = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    prompt_embeds, pooled = named["prompt_embeds"], named.get("pooled_prompt_embeds")
    denoiser, n = policy.denoiser, len(latents)
    common = {"encoder_hidden_states": prompt_embeds, "return_dict": False}
    flow = {"hidden_states": latents, "timestep": timestep.expand(n), **common}
    match type(policy.pipe).__name__:
        case "StableDiffusion3Pipeline":
            return denoiser(**flow, pooled_projections=pooled)[0]
        case "WanPipeline":
            return denoiser(**flow)[0]
        case "FluxPipeline":
            rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(4.0), indexing="ij")
            return denoiser(
                **{**flow, "timestep": timestep.expand(n) / 1000},
                pooled_projections=pooled,
                guidance=torch.full([n], 4.0),
                img_ids=torch.stack([torch.zeros(8, 4), rows, columns], dim=-1).reshape(32, 3),
                txt_ids=torch.zeros(prompt_embeds.shape[1], 3),
            )[0]
        case "QwenImagePipeline":
            mask = named["prompt_embeds_mask"]
            return denoiser(
                **{**flow, "timestep": timestep.expand(n) / 1000},
                encoder_hidden_states_mask=None if mask.all() else mask,
                img_shapes=[[(1, 8, 4)]] * n,
            )[0]
        case "StableDiffusionPipeline":
            return denoiser(latents, timestep, **common)[0]
        case "StableDiffusionXLPipeline":
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[32, 16, 0, 0, 32, 16]] * n)}
            return denoiser(latents, timestep, **common, added_cond_kwargs=added)[0]


@pytest.mark.parametrize("family", [*SIX, "flux_true_cfg"])
def test_gradient_is_that_of_the_denoiser(family):
    policy = make(family)
    latents, step, conditioning, schedule = begin(policy)
    given = velocity(policy, latents, schedule.timesteps[step], conditioning)
    expected = given
    scale = 3.0 if family == "flux_true_cfg" else 4.0
    if family != "flux":
        unguided = velocity(policy, latents, schedule.timesteps[step], conditioning, prefix="negative_")
        expected = unguided + scale * (given - unguided)
    if family == "qwen":
        expected = expected * given.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
    predicted = policy.predict(latents, step, conditioning, schedule, grad=True)
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-5)

    weight = torch.randn_like(expected)
    parameters = list(policy.denoiser.parameters())
    gradients = [
        torch.autograd.grad((output * weight).sum(), parameters, allow_unused=True) for output in (predicted, expected)
    ]
    used = [(got, want) for got, want in zip(*gradients, strict=True) if want is not None]
    assert len(used) > 0.9 * len(parameters) and any(want.abs().max() > 0.1 for _, want in used)
    for got, want in used:
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item() + 1e-5)
    assert all(got is None for got, want in zip(*gradients, strict=True) if want is None)


@pytest.mark.parametrize("family", SIX)
def test_predict_records_a_graph_only_if_asked(family):
    policy = make(family)
    arguments = begin(policy)
    sampled, trained = policy.predict(*arguments), policy.predict(*arguments, grad=True)
    assert not sampled.requires_grad and trained.requires_grad
    assert torch.equal(sampled, trained)  # so an on-policy ratio is exactly 1
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert policy.predict(*arguments, grad=True).requires_grad


@pytest.mark.parametrize("index", [[2, 0, 0], slice(1, 3), torch.tensor([1]), torch.tensor([1, 1, 2, 0])], ids=str)
@pytest.mark.parametrize("family", [*SIX, "flux_true_cfg"])
def test_any_selection_of_samples_gives_the_same_rows(family, index):
    policy = make(family)
    latents, step, conditioning, schedule = begin(policy)
    rows = policy.predict(latents, step, conditioning, schedule)[index]
    selected = policy.predict(latents[index], step, conditioning[index], schedule)
    assert len(conditioning[index]) == len(rows)
    torch.testing.assert_close(selected, rows, rtol=1e-5, atol=1e-5)
    assert (rows[0] - rows[-1]).abs().max() > 0.1 or len(rows) == 1  # rows do differ


@pytest.mark.parametrize("family", [*SIX, "flux_true_cfg"])
def test_a_sample_does_not_depend_on_its_batch(family):
    policy = make(family)
    latents, step, conditioning, schedule = begin(policy)
    outputs = policy.predict(latents, step, conditioning, schedule)
    for i, prompt in enumerate(PROMPTS):
        alone = policy.start([prompt], STEPS, generators(i))
        assert torch.equal(alone.latents, latents[i : i + 1])
        torch.testing.assert_close(
            policy.predict(alone.latents, step, alone.conditioning, schedule)[0], outputs[i], rtol=1e-5, atol=1e-5
        )
    again = policy.start(conditioning, STEPS, generators(0, 1, 2))
    assert torch.equal(again.latents, latents) and again.conditioning is conditioning


@pytest.mark.parametrize("family", SIX)
def test_start(family):
    policy = make(family)
    latents, schedule, conditioning = policy.start(PROMPTS, STEPS, generators(0, 1, 2))
    assert len(latents) == len(conditioning) == len(PROMPTS) and latents.dtype == torch.float32
    assert schedule.timesteps.shape == (STEPS,)
    assert abs(latents.mean()) < 0.2 and 0.8 < latents.std() < 1.2
    if family in ("sd", "sdxl"):
        assert schedule.sigmas is None
    else:
        assert schedule.sigmas.shape == (STEPS + 1,) and schedule.sigmas[-1] == 0
        assert torch.equal(schedule.sigmas, schedule.sigmas.sort(descending=True).values)
        torch.testing.assert_close(schedule.timesteps, 1000 * schedule.sigmas[:-1])


@pytest.mark.parametrize("family", SIX)
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_evaluations_of_the_denoiser(family, guidance_scale):
    policy = make(family, guidance_scale)
    passes = []
    policy.denoiser.register_forward_hook(lambda module, args, output: passes.append(len(output[0])))
    latents, step, conditioning, schedule = begin(policy)
    policy.decode(latents, conditioning)
    assert passes == [] and policy.evaluations == 0
    policy.predict(latents, step, conditioning, schedule)
    policy.predict(latents[:2], step, conditioning[:2], schedule, grad=True)
    twice = family in TWO_PASSES and guidance_scale > 1
    assert sum(passes) == 5 * (1 + twice) and len(passes) <= 2 * (1 + twice)
    assert policy.evaluations == 5


class Wrapped(torch.nn.Module):
    """Stands for DistributedDataParallel: its forward has to run, and it has no `config` or `dtype`."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("family", SIX)
def test_forward_evaluates_the_denoiser_in_training(family):
    policy = make(family)
    arguments = begin(policy)
    expected = policy.predict(*arguments)
    policy.forward = Wrapped(policy.denoiser)
    assert torch.equal(policy.predict(*arguments), expected) and policy.forward.calls == 0
    assert torch.equal(policy.predict(*arguments, grad=True), expected)
    assert policy.forward.calls == (2 if family in ("qwen", "wan") else 1)


@pytest.mark.parametrize("family", SIX)
def test_the_pipeline_is_not_modified(family):
    policy = make(family)
    pipe = policy.pipe
    pipe.set_progress_bar_config(desc="sampling", disable=True)

    def state():
        return {
            **{name: id(module) for name, module in pipe.components.items()},
            "attributes": {name: repr(value) for name, value in vars(pipe).items()},
            "scheduler's attributes": {name: repr(value) for name, value in vars(pipe.scheduler).items()},
            "training": [policy.denoiser.training, policy.denoiser.dtype],
            "configs": [dict(pipe.config), dict(pipe.scheduler.config), dict(policy.denoiser.config)],
        }

    before = state()
    sample(policy)
    policy.predict(*begin(policy), grad=True)
    assert state() == before

    first = call(policy)
    sample(policy)
    assert np.array_equal(call(policy), first)


def test_no_progress_bar_of_single_steps(capsys):
    policy = make("sd3")
    policy.pipe.set_progress_bar_config(disable=False)
    sample(policy)
    assert "it/s" not in capsys.readouterr().err
    call(policy)
    assert "it/s" in capsys.readouterr().err


def test_the_pipeline_finds_the_sigma_of_the_step(monkeypatch):
    policy, sigmas = make("wan"), []
    cache_context = policy.denoiser.cache_context

    def spy(*args, sigma, **kwargs):
        sigmas.append(sigma)
        return cache_context(*args, sigma=sigma, **kwargs)

    monkeypatch.setattr(policy.denoiser, "cache_context", spy)
    latents, step, conditioning, schedule = begin(policy)
    sigmas.clear()
    policy.predict(latents, step, conditioning, schedule)
    # As in the whole loop, of whose steps only the last one is evaluated here
    assert sigmas == [sigma.item() for sigma in schedule.sigmas[: step + 1] for _ in range(2)]


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_a_negative_prompt_is_embedded_only_if_the_pipeline_needs_it(family):
    policy = make(family, 1.0)
    assert not any(name.startswith("negative_") for name in embeddings(policy, policy.encode(PROMPTS)))


@pytest.mark.parametrize("family", [*TWO_PASSES, "flux_true_cfg"])
def test_negative_prompt_and_guidance_scale_change_the_prediction(family):
    outputs = [
        policy.predict(*begin(policy))
        for policy in (
            make(family),
            make(family, negative_prompt="blurry photo"),
            make(family, guidance_scale=2.0, negative_prompt="blurry photo"),
        )
    ]
    for i, other in ((0, 1), (1, 2)):
        assert (outputs[i] - outputs[other]).abs().max() > 0.01


def test_guidance_scale_is_the_pipelines_default_if_not_set():
    default, seven = make("sd3", guidance_scale=None), make("sd3", guidance_scale=7.0)
    assert torch.equal(default.predict(*begin(default)), seven.predict(*begin(seven)))


def test_arguments_of_the_call_reach_the_embedding_and_the_call():
    short, long = (make("flux", height=16, max_sequence_length=length) for length in (8, 16))
    latents, _, conditioning = short.start(PROMPTS, STEPS, generators(0, 1, 2))
    assert embeddings(short, conditioning)["prompt_embeds"].shape[1] == 8
    assert embeddings(long, long.encode(PROMPTS))["prompt_embeds"].shape[1] == 16
    assert latents.shape == (3, 16, 16)  # 4 x 4 packed latents, so 16 x 16 pixels
    assert short.decode(latents, conditioning)[0].size == (16, 16)
    skipping = make("sdxl", clip_skip=1)
    assert np.array_equal(sample(skipping), call(skipping))
    assert not np.array_equal(sample(skipping), sample(make("sdxl")))


def test_a_bfloat16_pipeline_gives_float32():
    policy = make("sd3")
    policy.pipe.to(torch.bfloat16)
    latents, step, conditioning, schedule = begin(policy)
    assert latents.dtype == policy.predict(latents, step, conditioning, schedule, grad=True).dtype == torch.float32
    assert len(policy.decode(latents, conditioning)) == len(PROMPTS)


def test_a_pipeline_without_a_prompt():
    with pytest.raises(ValueError, match="`pipe` \\(DDPMPipeline\\) has no `transformer` or `unet`"):
        PipelinePolicy(DDPMPipeline(unet=None, scheduler=None))
    policy = make("sd")
    with pytest.raises(
        ValueError, match="`pipe` \\(DDPMPipeline\\) cannot be a policy: its `__call__` does not take \\['prompt'\\]"
    ):
        PipelinePolicy(DDPMPipeline(unet=policy.denoiser, scheduler=policy.pipe.scheduler))


def test_a_subclass_of_a_pipeline_works():
    class MyPipeline(pipelines.StableDiffusion3Pipeline):
        pass

    policy = make("sd3")
    mine = PipelinePolicy(MyPipeline(**policy.pipe.components), **policy.call_kwargs)
    assert np.array_equal(sample(mine), sample(policy))


@pytest.mark.parametrize("error", [ValueError, KeyError])
def test_a_class_that_takes_one_prompt_at_a_time(error, caplog):
    class OneByOne(pipelines.StableDiffusion3Pipeline):
        def encode_prompt(self, prompt, *args, **kwargs):
            if len(prompt) > 1:
                raise error("two")
            return super().encode_prompt(prompt, *args, **kwargs)

    policy = make("sd3")
    one_by_one = PipelinePolicy(OneByOne(**policy.pipe.components), **policy.call_kwargs)
    np.testing.assert_allclose(sample(one_by_one), sample(policy), rtol=0, atol=1e-4)
    assert "OneByOne cannot make a batch of different prompts" in caplog.text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("widht", "unknown to the pipeline"),
        ("latents", "set by the policy"),
        ("prompt", "set by the policy"),
        ("prompt_embeds", "set by the policy"),
        ("negative_prompt_2", "set by the policy"),
        ("num_inference_steps", "set by the policy"),
        ("output_type", "set by the policy"),
    ],
)
def test_arguments_that_cannot_be_passed_on(name, reason):
    with pytest.raises(ValueError, match=rf"`{name}=3`.*{reason}"):
        PipelinePolicy(pipelines.stable_diffusion_3(), **{name: 3})


def test_latents_that_are_changed_after_the_step():
    inpaint = StableDiffusionInpaintPipeline(**pipelines.stable_diffusion().components, requires_safety_checker=False)
    policy, image = PipelinePolicy(inpaint, **SIZE), Image.new("RGB", (16, 32), "red")
    conditioning = policy.encode(PROMPTS, image=[image] * 3, mask_image=[image.convert("L")] * 3)
    with pytest.raises(ValueError, match="cannot be a policy.* changes latents after `scheduler.step`"):
        policy.start(conditioning, STEPS, generators(0, 1, 2))


def test_a_step_that_is_given_a_part_of_the_latents():
    policy = PipelinePolicy(kandinsky5(visual_cond=True), **LARGE)
    with pytest.raises(ValueError, match="cannot be a policy.* gives `scheduler.step` a part of the latents"):
        policy.start(["a cat"], STEPS, generators(0))


def test_a_guider_with_momentum():
    pipe = make("sd").pipe
    pipe.guider = SimpleNamespace(adaptive_projected_guidance_momentum=-0.5)
    with pytest.raises(ValueError, match="`pipe.guider` has a momentum"):
        PipelinePolicy(pipe)


def test_arguments_that_the_class_does_not_have():
    pipe = hunyuan_image()
    with pytest.raises(ValueError, match="`guidance_scale=3.0` is not an argument of `HunyuanImagePipeline.__call__`"):
        PipelinePolicy(pipe, guidance_scale=3.0)
    with pytest.raises(ValueError, match="`negative_prompt='bad'` is not an argument of `Flux2Pipeline.__call__`"):
        PipelinePolicy(flux2(), negative_prompt="bad")


@pytest.mark.parametrize("strength", [0.3, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_the_steps_asked_for_are_run(strength, steps):
    pipe = StableDiffusionImg2ImgPipeline(**pipelines.stable_diffusion().components, requires_safety_checker=False)
    policy, seen = PipelinePolicy(pipe, strength=strength), []
    conditioning = policy.encode(["a cat"], image=[Image.new("RGB", (16, 16), "red")])
    latents, schedule, _ = policy.start(conditioning, steps, generators(0))
    assert len(schedule.timesteps) == steps
    policy.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[1].item()))
    for i in range(steps):
        policy.predict(latents, i, conditioning, schedule)
    assert seen == schedule.timesteps.tolist()


def test_pixels_are_what_the_pipeline_draws():
    policy = PipelinePolicy(pipelines.stable_diffusion_3(t5=False), max_sequence_length=16)
    latents, _, conditioning = policy.start(["a red circle"] * 3, 2, torch.Generator().manual_seed(0))
    pixels = policy.decode(latents, conditioning, output_type="uint8")
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 16, 16, 3)
    images = policy.decode(latents, conditioning)
    arrays = policy.decode(latents, conditioning, output_type="np")
    assert np.array_equal(pixels, np.stack([np.asarray(image) for image in images]))
    assert np.array_equal(pixels, (arrays * 255).round().astype("uint8"))

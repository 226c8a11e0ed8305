import logging

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from flow_trl.tiny import DIFFUSION_FOLDER, FLOW_FOLDER, load_diffusion_pipeline, load_prompts, scene_reward
from flow_trl.tiny.build_diffusion import make_pipeline, noise_loss


@pytest.fixture(scope="module")
def pipe():
    pipe = load_diffusion_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts, num_inference_steps=10, **options):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": 2.0, "generator": generator, **options}
    return pipe(prompts, **options).images


def test_the_pipeline_is_small_in_float32_and_loads_quietly(caplog):
    with caplog.at_level(logging.WARNING):
        pipe = load_diffusion_pipeline()
    assert not caplog.records
    assert isinstance(pipe, StableDiffusionPipeline) and isinstance(pipe.scheduler, DDIMScheduler)
    assert sum(file.stat().st_size for file in DIFFUSION_FOLDER.rglob("*") if file.is_file()) < 8e6
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_it_has_the_autoencoder_of_the_flow_model():
    mine, theirs = (load_file(f / "vae/diffusion_pytorch_model.safetensors") for f in (DIFFUSION_FOLDER, FLOW_FOLDER))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_images_depend_on_the_prompt_and_the_noise(pipe):
    images = draw(pipe, ["a photo of a red circle", 'the word "CAT"'], 4)
    assert [image.size for image in images] == [(32, 32)] * 2
    assert images == draw(pipe, ["a photo of a red circle", 'the word "CAT"'], 4)
    other = draw(pipe, ["a photo of a blue circle", 'the word "CAT"'], 4)
    assert images[0] != other[0] and images[1] == other[1]
    assert images != draw(pipe, ["a photo of a red circle", 'the word "CAT"'], 4, eta=1.0)


def test_scenes_are_often_right_and_often_wrong(pipe):
    rows = load_prompts("scenes", "test").select(range(100)).to_dict()
    images = draw(pipe, rows["prompt"])
    strict = scene_reward(strict=True)
    accuracy = np.mean(strict(images=images, include=rows["include"], exclude=rows["exclude"]))
    assert 0.3 <= accuracy <= 0.85  # what it should be, with room to learn
    shifted = rows["include"][1:] + rows["include"][:1]
    assert np.mean(strict(images=images, include=shifted)) < 0.15  # it is the prompt that is drawn


def test_words_are_legible(pipe):
    pytest.importorskip("rapidocr_onnxruntime")
    from flow_trl.rewards.ocr import OCRReward

    rows = load_prompts("words", "test").select(range(40)).to_dict()
    reward = OCRReward()
    assert np.mean(reward(prompts=rows["prompt"], images=draw(pipe, rows["prompt"]))) >= 0.4


def test_the_loss_of_the_build_is_that_of_the_noise(pipe):
    """The trained model predicts the noise far better than an untrained one, whose prediction explains nothing."""
    prompts = load_prompts("scenes", "test")["prompt"][:64]
    tokens = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    latents = torch.randn(64, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    losses = []
    for model in (make_pipeline(pipe.vae), pipe):
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(noise_loss(pipe.scheduler, [model.unet, model.text_encoder], latents, tokens).item())
    assert losses[0] > 0.8 and losses[1] < 0.5 * losses[0]

import subprocess
import sys

import numpy as np
import pytest
import torch

from flow_trl.tiny import FLOW_FOLDER, load_flow_pipeline, load_prompts, scene_reward


@pytest.fixture(scope="module")
def pipe():
    pipe = load_flow_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts, num_inference_steps=10):
    return pipe(
        prompts,
        num_inference_steps=num_inference_steps,
        guidance_scale=2.0,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(0),
    ).images


def test_importing_the_tiny_world_loads_no_model_library():
    code = "import sys, flow_trl.tiny; print({'torch', 'diffusers', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_the_pipeline_is_small_and_in_float32(pipe):
    assert sum(file.stat().st_size for file in FLOW_FOLDER.rglob("*") if file.is_file()) < 8e6
    for model in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert load_flow_pipeline(dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_scene_words_are_single_tokens_and_words_are_spelt(pipe):
    tokens = pipe.tokenizer.tokenize('a photo of three red circles above a triangle the word "RED"')
    assert [t.removesuffix("</w>") for t in tokens[:8]] == "a photo of three red circles above a".split()
    assert [t.removesuffix("</w>") for t in tokens[9:]] == ["the", "word", '"', "r", "e", "d", '"']
    for name in ("scenes", "words"):
        for split in ("train", "test"):
            ids = pipe.tokenizer(load_prompts(name, split)["prompt"][:]).input_ids
            assert max(map(len, ids)) <= pipe.tokenizer.model_max_length


def test_images_are_32_by_32_and_depend_on_the_prompt(pipe):
    images = draw(pipe, ["a photo of a red circle", 'the word "CAT"'], 4)
    assert [image.size for image in images] == [(32, 32)] * 2
    assert images == draw(pipe, ["a photo of a red circle", 'the word "CAT"'], 4)
    other = draw(pipe, ["a photo of a blue circle", 'the word "CAT"'], 4)
    assert images[0] != other[0] and images[1] == other[1]


def test_scenes_are_often_right_and_often_wrong(pipe):
    rows = load_prompts("scenes", "test").select(range(100)).to_dict()
    images = draw(pipe, rows["prompt"])
    strict = scene_reward(strict=True)
    accuracy = np.mean(strict(images=images, include=rows["include"], exclude=rows["exclude"]))
    assert 0.35 <= accuracy <= 0.85  # what it should be, with room to learn
    shifted = rows["include"][1:] + rows["include"][:1]
    assert np.mean(strict(images=images, include=shifted)) < 0.15  # it is the prompt that is drawn


def test_words_are_legible(pipe):
    pytest.importorskip("rapidocr_onnxruntime")
    from flow_trl.rewards.ocr import OCRReward

    rows = load_prompts("words", "test").select(range(40)).to_dict()
    images = draw(pipe, rows["prompt"])
    reward = OCRReward()
    assert np.mean(reward(prompts=rows["prompt"], images=images)) >= 0.4
    assert np.mean(reward(prompts=rows["prompt"][::-1], images=images)) < 0.3

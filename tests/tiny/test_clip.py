import numpy as np
import torch
from transformers import CLIPModel, CLIPProcessor

from flow_trl.rewards.clip import AestheticScore, ClipEncoder, ClipScore, PickScore
from flow_trl.tiny import CLIP_FOLDER, load_clip, load_prompts
from flow_trl.tiny.build_clip import evaluate, make_clip, train_clip
from flow_trl.tiny.scenes import render_scene


def test_it_is_small_in_float32_and_in_evaluation_mode():
    model, processor = load_clip()
    assert isinstance(model, CLIPModel) and isinstance(processor, CLIPProcessor)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert sum(file.stat().st_size for file in CLIP_FOLDER.rglob("*")) < 2e6


def test_it_finds_the_right_prompt_among_64():
    figures = evaluate(*load_clip())
    assert figures["right prompt among 64"] > 0.8 and figures["right picture among 64"] > 0.8


def test_rewards_tell_the_right_prompt():
    rows = load_prompts("scenes", "test").select(range(64)).to_dict()
    images = [render_scene(include, seed=i) for i, include in enumerate(rows["include"])]
    shifted = rows["prompt"][1:] + rows["prompt"][:1]
    for reward in (ClipScore(*load_clip()), PickScore(CLIP_FOLDER)):
        right, wrong = (np.mean(reward(prompts=prompts, images=images)) for prompts in (rows["prompt"], shifted))
        assert right > 1.5 * wrong
    assert ClipEncoder(CLIP_FOLDER).image_size == 32


def test_training_from_nothing_learns():
    """Two prompts that a few steps tell apart."""
    torch.manual_seed(0)
    model, processor = make_clip()
    prompts = ["a photo of a red circle", "a photo of a blue circle"]
    tokens = processor.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    images = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]]).view(2, 1, 3, 1, 1).expand(2, 1, 3, 32, 32)
    train_clip(model, tokens, images, steps=30, learning_rate=1e-3)
    with torch.no_grad():
        logits = model(input_ids=tokens, pixel_values=images[:, 0]).logits_per_image
    assert logits.argmax(1).tolist() == [0, 1] and not model.training


def test_the_aesthetic_head_fits_its_embedding(tmp_path):
    sizes = [64, 1024, 128, 64, 16, 1]
    names = ["layers.0", "layers.2", "layers.4", "layers.6", "layers.7"]
    state = {f"{name}.weight": torch.randn(b, a) / a for name, a, b in zip(names, sizes, sizes[1:], strict=False)}
    state |= {f"{name}.bias": torch.zeros(size) for name, size in zip(names, sizes[1:], strict=True)}
    torch.save(state, tmp_path / "head.pth")
    reward = AestheticScore(CLIP_FOLDER, head=tmp_path / "head.pth")
    image = render_scene([{"class": "circle", "count": 1, "color": "red"}], seed=0)
    assert len(reward(prompts=["", "x"], images=[image, image])) == 2

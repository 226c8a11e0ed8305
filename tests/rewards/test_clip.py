import re
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from flow_trl.rewards import BUILT_IN_REWARDS, clip, get_reward_func, pretrained, reward_name
from flow_trl.rewards.clip import AestheticScore, ClipEncoder, ClipScore, PickScore
from flow_trl.tiny import LANGUAGE_FOLDER
from flow_trl.tiny.build_clip import make_clip


PROMPTS = ["a photo of two red circles", "a square", "a photo of a blue triangle left of a red circle", "the word cat"]
DIM, SIZE = 64, 32
REWARDS = [ClipScore, PickScore, AestheticScore]
NAMES = {ClipScore: "clip_score", PickScore: "pickscore", AestheticScore: "aesthetic"}
LAYERS = {0: (DIM, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}


def smooth(width=SIZE, height=SIZE, seed=0):
    """A picture without fine detail, so that how it is resized matters little."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def to_pixels(images):
    return torch.stack([torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 for image in images])


def head_weights(dim=DIM):
    weights = {}
    for index, (columns, rows) in LAYERS.items():
        columns = dim if index == 0 else columns
        weights[f"layers.{index}.weight"] = torch.randn(rows, columns) / columns**0.5
        weights[f"layers.{index}.bias"] = torch.randn(rows)
    return weights


@contextmanager
def forward_passes(model):
    """Collects the batch size of each forward pass of the image part, and whether gradients were recorded."""
    passes = []
    model.requires_grad_(True)  # as by someone else who has the model
    hook = model.vision_model.register_forward_hook(
        lambda module, args, output: passes.append((len(output.pooler_output), torch.is_grad_enabled()))
    )
    yield passes
    hook.remove()
    model.requires_grad_(False)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model, processor = make_clip()
    for weight in model.parameters():  # larger than CLIP's own, for embeddings that are far apart
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.4)
    torch.nn.init.constant_(model.logit_scale, 3.0)
    return model.eval(), processor


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    for part in tiny:
        part.save_pretrained(path)
    return path


@pytest.fixture
def head(tmp_path):
    torch.save(head_weights(), tmp_path / "head.pth")
    return tmp_path / "head.pth"


@pytest.fixture
def make(tiny, head):
    def make(reward, *source, **kwargs):
        if reward is AestheticScore:
            kwargs.setdefault("head", head)
        return reward(*(source or tiny), **kwargs)

    return make


@torch.no_grad()
def by_hand(tiny, prompts, images):
    """Cosines and image embeddings, from the model's submodules and pictures of the model's own size."""
    model, processor = tiny
    image = model.visual_projection(model.vision_model((to_pixels(images) - 0.5) / 0.5).pooler_output)
    text = []
    for prompt in prompts:
        ids = processor.tokenizer(prompt, return_tensors="pt").input_ids
        text.append(model.text_projection(model.text_model(ids).last_hidden_state[:, -1]))
    image, text = (x / x.square().sum(1, keepdim=True).sqrt() for x in (image, torch.cat(text)))
    return (image * text).sum(1), image


# Scores


def test_clip_score_is_the_positive_part_of_the_cosine_in_percent(tiny):
    prompts, images = PROMPTS * 4, [smooth(seed=i) for i in range(16)]
    cosine, _ = by_hand(tiny, prompts, images)
    assert 0 < (cosine > 0).sum() < 16
    scores = ClipScore(*tiny)(prompts=prompts, images=images, tag=["x"] * 16)
    assert scores == pytest.approx([100 * max(c, 0) for c in cosine.tolist()], abs=1e-3)
    assert all(type(score) is float for score in scores)


def test_pickscore_is_the_scaled_cosine(tiny):
    prompts, images = PROMPTS * 4, [smooth(seed=i) for i in range(16)]
    cosine, _ = by_hand(tiny, prompts, images)
    assert PickScore(*tiny)(prompts=prompts, images=images) == pytest.approx((np.exp(3) * cosine).tolist(), abs=1e-3)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_aesthetic_score_is_the_head_on_the_normalised_embedding(tiny, tmp_path, suffix):
    weights, path = head_weights(), tmp_path / f"head.{suffix}"
    (torch.save if suffix == "pth" else save_file)(weights, path)
    images = [smooth(seed=i) for i in range(4)]
    _, expected = by_hand(tiny, PROMPTS, images)
    for index in LAYERS:
        expected = expected @ weights[f"layers.{index}.weight"].T + weights[f"layers.{index}.bias"]
    reward_func = AestheticScore(*tiny, head=path)
    scores = reward_func(prompts=[""] * 4, images=images)
    assert scores == pytest.approx(expected.squeeze(1).tolist(), abs=1e-4)
    assert len(set(scores)) == 4
    assert reward_func(prompts=PROMPTS, images=images) == scores


@pytest.mark.parametrize("reward", REWARDS)
def test_batches_do_not_matter(make, reward):
    prompts, images = PROMPTS * 2, [smooth(seed=i) for i in range(8)]
    together = make(reward)(prompts=prompts, images=images)
    for batch_size, sizes in ((1, [1] * 8), (3, [3, 3, 2])):
        reward_func = make(reward, batch_size=batch_size)
        with forward_passes(reward_func.encoder.model) as passes:
            assert reward_func(prompts=prompts, images=images) == pytest.approx(together, abs=1e-3)
        assert passes == [(size, False) for size in sizes]
    backwards = make(reward)(prompts=prompts[::-1], images=images[::-1])
    assert backwards[::-1] == pytest.approx(together, abs=1e-3)


@pytest.mark.parametrize("reward", REWARDS)
def test_images_of_every_mode_and_size(make, reward):
    reward_func = make(reward)
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        image = smooth().convert(mode)
        plain = reward_func(prompts=["a square"], images=[image.convert("RGB")])
        assert reward_func(prompts=["a square"], images=[image]) == plain
    sizes = [(SIZE, SIZE), (100, 40), (40, 100), (1, 1), (3, 500), (7, 7), (512, 512)]
    images = [smooth(*size) for size in sizes]
    together = reward_func(prompts=["a square"] * len(sizes), images=images)
    alone = [reward_func(prompts=["a square"], images=[image])[0] for image in images]
    assert together == pytest.approx(alone, abs=1e-3) and np.isfinite(together).all()


@pytest.mark.parametrize("reward", REWARDS)
def test_score_of_a_video_is_the_mean_of_its_frames(make, reward):
    reward_func = make(reward, batch_size=4)
    assert reward_func.takes_videos
    images = [smooth(seed=i) for i in range(9)]
    videos = [images[:3], images[3], images[4:]]
    with forward_passes(reward_func.encoder.model) as passes:
        scores = reward_func(prompts=PROMPTS[:3], images=videos)
    assert passes == [(4, False), (4, False), (1, False)]
    frames = reward_func(
        prompts=[p for p, n in zip(PROMPTS, (3, 1, 5), strict=False) for _ in range(n)], images=images
    )
    assert scores == pytest.approx([np.mean(frames[:3]), frames[3], np.mean(frames[4:])], abs=1e-3)


@pytest.mark.parametrize(
    "length, num_frames, chosen",
    [(1, 8, [0]), (5, 8, [0, 1, 2, 3, 4]), (8, 8, range(8)), (81, 8, [5, 15, 25, 35, 45, 55, 65, 75]), (9, 1, [4])],
)
def test_frames_are_taken_at_even_distances(tiny, length, num_frames, chosen):
    images = [smooth(seed=i) for i in range(length)]
    reward_func = ClipScore(*tiny, num_frames=num_frames)
    expected = np.mean(reward_func(prompts=["a square"] * len(chosen), images=[images[i] for i in chosen]))
    assert reward_func(prompts=["a square"], images=[images]) == pytest.approx([expected], abs=1e-3)


@pytest.mark.parametrize("reward", REWARDS)
def test_long_prompts_are_cut_off(make, reward):
    reward_func, images = make(reward), [smooth()] * 3
    start = "red circle " * 6  # 12 words, and the first and last token, are all that the model takes
    scores = reward_func(prompts=[start, start + "left of a blue square", start * 100], images=images)
    assert scores[1:] == scores[:1] * 2


@pytest.mark.parametrize("reward", REWARDS)
def test_no_images(make, reward):
    assert make(reward)(prompts=[], images=[], text=[]) == []


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("prompts, images", [(1, 2), (2, 1), (0, 1)])
def test_one_prompt_per_image(make, reward, prompts, images):
    with pytest.raises(ValueError, match=f"`{NAMES[reward]}` got {prompts} `prompts` and {images} `images`"):
        make(reward)(prompts=["a"] * prompts, images=[smooth()] * images)


@pytest.mark.parametrize("reward", REWARDS)
def test_dropout_is_off_and_no_gradient_is_recorded(make, reward):
    model, processor = make_clip()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    reward_func = make(reward, model.train(), processor)
    columns = {"prompts": PROMPTS, "images": [smooth(seed=i) for i in range(4)]}
    assert reward_func(**columns) == reward_func(**columns)
    assert reward_func.encoder.model is model
    assert not any(p.requires_grad for p in model.parameters())


# Encoder


def test_encoder_gives_the_model_s_features_of_the_processor_s_pixels(tiny):
    model, processor = tiny
    images = [smooth(seed=i) for i in range(5)]
    values = processor(images=images, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(values).pooler_output)
    encoder = ClipEncoder(*tiny)
    features = encoder(to_pixels(images))
    assert (encoder.image_size, encoder.dim, features.shape) == (SIZE, DIM, (5, DIM))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(features.norm(dim=1), torch.ones(5), atol=0.1)
    with forward_passes(model) as passes:
        chunked = ClipEncoder(*tiny, batch_size=2)(to_pixels(images))
    assert passes == [(2, False), (2, False), (1, False)]
    torch.testing.assert_close(chunked, features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (90, 64), (64, 91), (224, 101), (20, 16), (33, 32)])
def test_encoder_resizes_and_crops_as_the_processor_does(tiny, size):
    model, processor = tiny
    images = [smooth(*size, seed=i) for i in range(4)]
    values = processor(images=images, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(values).pooler_output)
    features = ClipEncoder(*tiny)(to_pixels(images))
    assert torch.cosine_similarity(features, expected).min() > 0.99
    apart = torch.cdist(features, expected)
    assert (apart.diag() < 0.1 * (apart + torch.eye(4) * 1e9).amin(1)).all()


def test_encoder_takes_every_float_type_and_clamps(tiny):
    encoder, pixels = ClipEncoder(*tiny), to_pixels([smooth(), smooth(seed=1)])
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float16, 0.05), (torch.bfloat16, 0.5)):
        features = encoder(pixels.to(dtype))
        assert features.dtype == torch.float32
        torch.testing.assert_close(features, encoder(pixels), atol=tolerance, rtol=0)
    black_and_white = (pixels > 0.5).float()
    torch.testing.assert_close(encoder(black_and_white * 3 - 1), encoder(black_and_white))


def test_encoder_records_no_gradient(tiny):
    features = ClipEncoder(*tiny)(torch.rand(1, 3, 48, 48, requires_grad=True))
    assert not features.requires_grad and not torch.is_inference(features)


def test_encoder_keeps_a_given_model_s_type_and_device(tiny):
    model, processor = make_clip()
    encoder = ClipEncoder(model.bfloat16(), processor)
    features = encoder(torch.rand(2, 3, SIZE, SIZE))
    assert encoder.model.dtype == torch.bfloat16
    assert features.dtype == torch.float32 and features.device == model.device
    assert ClipEncoder(make_clip()[0].to("meta"), processor).model.device.type == "meta"
    assert ClipEncoder(*tiny, device="cpu").model.device.type == "cpu"


@pytest.mark.parametrize(
    "pixels", [torch.rand(3, 32, 32), torch.rand(1, 1, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)]
)
def test_encoder_says_what_pixels_it_takes(tiny, pixels):
    with pytest.raises(ValueError, match=re.escape(f"`pixels` has the shape {tuple(pixels.shape)}")) as info:
        ClipEncoder(*tiny)(pixels)
    assert "(B, 3, H, W)" in str(info.value) and str(pixels.dtype) in str(info.value)


# Loading


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("as_string", [False, True])
def test_loads_from_a_folder(make, folder, reward, as_string):
    columns = {"prompts": PROMPTS, "images": [smooth(seed=i) for i in range(4)]}
    loaded = make(reward, str(folder) if as_string else folder)
    assert (folder / "model.safetensors").is_file()
    assert loaded(**columns) == pytest.approx(make(reward)(**columns), abs=1e-3)
    assert loaded.encoder.model.dtype == torch.float32
    assert loaded.encoder.model.device == PartialState().device


def test_a_loaded_model_goes_to_the_device_of_this_process(folder, monkeypatch):
    monkeypatch.setattr(clip, "PartialState", lambda: SimpleNamespace(device=torch.device("meta")))
    assert ClipEncoder(folder).model.device.type == "meta"
    assert ClipEncoder(folder, device="cpu").model.device.type == "cpu"


@pytest.mark.parametrize("reward", REWARDS)
def test_processor_of_a_model_that_was_loaded(make, folder, reward):
    encoder = make(reward, CLIPModel.from_pretrained(folder)).encoder
    assert encoder.processor.image_processor.crop_size.height == SIZE


@pytest.mark.parametrize("reward", REWARDS)
def test_processor_of_its_own(make, folder, tiny, tmp_path, reward):
    tiny[0].save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="`processor`") as info:
        make(reward, tmp_path / "model")
    expected = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K" if reward is PickScore else str(tmp_path / "model")
    assert f'"{expected}"' in str(info.value)
    reward_func = make(reward, tmp_path / "model", folder)
    assert reward_func.encoder.image_size == SIZE


@pytest.mark.parametrize("build", [ClipEncoder, ClipScore])
def test_model_without_a_processor(build):
    with pytest.raises(ValueError, match="`processor` is None, and `model` comes from no folder"):
        build(make_clip()[0])


@pytest.mark.parametrize("reward", REWARDS)
def test_processor_of_another_model(make, tiny, reward):
    image_processor = CLIPImageProcessorPil()
    with pytest.raises(ValueError, match="`processor` makes images of 224 x 224 pixels, but `model` takes 32 x 32"):
        make(reward, tiny[0], CLIPProcessor(image_processor, tiny[1].tokenizer))


@pytest.mark.parametrize("build", [ClipEncoder, *REWARDS])
@pytest.mark.parametrize("kind", ["missing", "empty", "no weights", "another model"])
def test_folder_that_is_no_clip(build, kind, tiny, tmp_path):
    path = {"another model": LANGUAGE_FOLDER, "missing": tmp_path / "missing"}.get(kind, tmp_path)
    if kind == "no weights":
        tiny[0].config.save_pretrained(path)
    with pytest.raises(ValueError, match=re.escape(f'`model` is "{path}"')) as info:
        build(path)
    assert "CLIPModel.save_pretrained" in str(info.value)
    assert kind != "another model" or 'of the type "llama"' in str(info.value)


@pytest.mark.parametrize("build", [ClipEncoder, *REWARDS])
@pytest.mark.parametrize("argument", ["model", "processor"])
@pytest.mark.parametrize("value", [3, torch.nn.Linear(1, 1)])
def test_wrong_types(build, tiny, argument, value):
    arguments = dict(zip(("model", "processor"), tiny, strict=True)) | {argument: value}
    with pytest.raises(TypeError, match=f"`{argument}` must be .* but it is a {type(value).__name__}"):
        build(**arguments)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_and_num_frames(tiny, batch_size):
    with pytest.raises(ValueError, match=f"`batch_size` is {batch_size}"):
        ClipScore(*tiny, batch_size=batch_size)
    with pytest.raises(ValueError, match=f"`num_frames` is {batch_size}"):
        ClipScore(*tiny, num_frames=batch_size)


# The aesthetic head


@pytest.mark.parametrize(
    "value, repository, file",
    [
        (clip.AESTHETIC_HEAD, "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"),
        ("owner/repository/folder/head.pth", "owner/repository", "folder/head.pth"),
    ],
)
def test_head_from_the_hub(tiny, head, monkeypatch, value, repository, file):
    asked = []
    monkeypatch.setattr(pretrained, "hf_hub_download", lambda *names: asked.append(names) or str(head))
    AestheticScore(*tiny, head=value)
    assert asked == [(repository, file)]


@pytest.mark.parametrize("value", ["head.pth", "no/head.pth", "/no/such/head.pth", "owner/repository/head.pth"])
def test_head_that_is_nowhere(tiny, value):
    with pytest.raises(ValueError, match=f'`head` is "{value}", which is no file') as info:
        AestheticScore(*tiny, head=value)
    assert clip.AESTHETIC_HEAD in str(info.value)


def test_head_for_another_clip(tiny, tmp_path):
    torch.save(head_weights(768), tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"`layers.0.weight` is \(1024, 768\), not \(1024, 64\)") as info:
        AestheticScore(*tiny, head=tmp_path / "head.pth")
    assert f'`head` is "{tmp_path / "head.pth"}"' in str(info.value) and "embeddings of 64" in str(info.value)
    assert "`model` that the head was trained on" in str(info.value)


def test_file_that_is_no_head(tiny, tmp_path):
    weights = head_weights()
    weights["fc.weight"] = weights.pop("layers.7.weight")
    torch.save(weights, tmp_path / "head.pth")
    with pytest.raises(ValueError, match="`layers.7.weight` is missing, .*`fc.weight` is .*not expected"):
        AestheticScore(*tiny, head=tmp_path / "head.pth")


# Names


@pytest.mark.parametrize(
    "name, reward, model",
    [
        ("clip_score", ClipScore, "openai/clip-vit-large-patch14"),
        ("pickscore", PickScore, "yuvalkirstain/PickScore_v1"),
        ("aesthetic", AestheticScore, "openai/clip-vit-large-patch14"),
    ],
)
def test_built_in_names(make, name, reward, model):
    assert name in BUILT_IN_REWARDS
    assert reward_name(make(reward)) == name
    with pytest.raises(ValueError, match=f'(?s)`model` is "{model}", .*network'):
        get_reward_func(name)

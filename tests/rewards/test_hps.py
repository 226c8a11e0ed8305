import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPProcessor, PreTrainedTokenizerFast

from flow_trl.rewards import get_reward_func
from flow_trl.rewards.hps import HPSV2, OPEN_CLIP, HPSv2


# A small random model of the package hpsv2, and its scores; what text is what is for its tokenizer, not for the model.
GOLDEN = load_file(Path(__file__).parents[1] / "data/golden/hpsv2.safetensors")
IMAGES = [Image.fromarray(pixels.numpy()) for pixels in GOLDEN.pop("pixels")]
PROMPTS = [" ".join(f"w{word}" for word in words if word) for words in GOLDEN.pop("words").tolist()]
SCORES = GOLDEN.pop("scores").tolist()
START, END, SIZE = 1, 23, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Configuration and processor in a folder, and the checkpoint as the authors save it."""
    path = tmp_path_factory.mktemp("hpsv2")
    layers = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    layers |= {"hidden_act": "gelu"}
    text = {"vocab_size": 24, "max_position_embeddings": 12, "bos_token_id": START, "eos_token_id": END}
    config = CLIPConfig(
        text_config=text | layers, vision_config={"image_size": SIZE, "patch_size": 8} | layers, projection_dim=24
    )
    tokenizer = Tokenizer(WordLevel({"w0": 0, "<s>": START, "</s>": END} | {f"w{i}": i for i in range(2, END)}, "w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = [("<s>", START), ("</s>", END)]
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "w0"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    for part in (config, CLIPProcessor(image_processor, tokenizer)):
        part.save_pretrained(path)
    torch.save({"epoch": 1, "state_dict": GOLDEN}, path / "HPS.pt")
    return path


def test_scores_are_those_of_the_package_hpsv2(folder):
    reward_func = HPSv2(folder / "HPS.pt", folder, batch_size=2)
    assert reward_func.__name__ == "hpsv2" and reward_func.takes_videos
    assert reward_func.encoder.model.dtype == torch.float32  # whatever the file's
    assert reward_func(prompts=PROMPTS, images=IMAGES, tag=["x"] * 3) == pytest.approx(SCORES, abs=1e-4)
    torch.save(GOLDEN, folder / "bare.pt")
    assert HPSv2(str(folder / "bare.pt"), str(folder))(prompts=PROMPTS, images=IMAGES) == pytest.approx(
        SCORES, abs=1e-4
    )


def test_images_are_not_cropped_but_get_black_bars(folder):
    reward_func = HPSv2(folder / "HPS.pt", folder)
    barred = Image.new("RGB", (SIZE, SIZE))
    barred.paste(IMAGES[0].crop((0, 0, 16, SIZE)), (8, 0))
    narrow = IMAGES[0].crop((0, 0, 16, SIZE))
    scores = reward_func(prompts=PROMPTS[:1] * 2, images=[narrow, barred])
    assert scores[0] == scores[1] != pytest.approx(SCORES[0], abs=1e-3)


def test_a_checkpoint_of_another_architecture(folder, tmp_path):
    weights = GOLDEN | {"text_projection": torch.zeros(32, 8), "extra": torch.zeros(1)}
    del weights["logit_scale"]
    torch.save(weights, tmp_path / "HPS.pt")
    with pytest.raises(
        ValueError, match=re.escape(f'`checkpoint` is "{tmp_path / "HPS.pt"}", which does not')
    ) as info:
        HPSv2(tmp_path / "HPS.pt", folder)
    for difference in (
        "`text_projection.weight` is (8, 32), not (24, 32)",
        "`extra` is (1,), not expected",
        "`logit_scale` is missing, not ()",
    ):
        assert difference in str(info.value)


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(ValueError, match=f'`checkpoint` is "{tmp_path}.*{HPSV2}'):
        HPSv2(tmp_path / "none.pt", folder)
    with pytest.raises(ValueError, match=f'(?s)`model` is "{tmp_path}.*{OPEN_CLIP}'):
        HPSv2(folder / "HPS.pt", tmp_path)
    with pytest.raises(ValueError, match=f'(?s)`checkpoint` is "{HPSV2}".*network'):
        get_reward_func("hpsv2")

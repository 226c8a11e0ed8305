import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, Whitespace
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from flow_trl.rewards import BUILT_IN_REWARDS, get_reward_func
from flow_trl.rewards.judge import QWEN, VLMJudge
from flow_trl.tiny import CLIP_FOLDER, LANGUAGE_FOLDER


PROMPTS = ["a red circle", "a", "a blue square and a red circle", "a circle"]
WORDS = (
    '<pad> <image> USER ASSISTANT : Does this figure show " ? Please answer yes or no . Yes No Yet grade 1 2 3 4 5 '
)
WORDS += "a red blue circle square and Score"
TEMPLATE = (
    "USER: {% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<image> {% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %} ASSISTANT:"
)


def picture(seed, size=(32, 32)):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random LLaVA that is sure of what it answers."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS.split())}, "<pad>"))
    tokenizer.pre_tokenizer = Sequence([Split("<image>", "isolated"), Whitespace()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", extra_special_tokens=["<image>"]
    )
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=32, patch_size=8, **layers),
        text_config=LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **layers),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        image_processor, tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llava")
    for part in (model, processor):
        part.save_pretrained(path)
    return path


def probabilities(judge, text, image):
    """Of the next token after a text, by the model alone on one image."""
    inputs = judge.processor(text=text, images=image, return_tensors="pt")
    with torch.no_grad():
        return judge.model(**inputs).logits[0, -1].softmax(-1)


def test_score_is_the_probability_of_yes(folder):
    judge = VLMJudge(folder, batch_size=3)
    assert judge.__name__ == "vlm_judge" and judge.takes_videos
    images = [picture(i, size) for i, size in enumerate([(32, 32), (64, 64), (48, 32), (32, 32)])]
    scores = judge(prompts=PROMPTS, images=images, tag=["x"] * 4)
    yes = judge.processor.tokenizer.convert_tokens_to_ids("Yes")
    for prompt, image, score in zip(PROMPTS, images, scores, strict=True):
        text = f'USER: <image> Does this figure show "{prompt}"? Please answer yes or no. ASSISTANT:'
        assert score == pytest.approx(float(probabilities(judge, text, image)[yes]), rel=1e-3)
    assert len(set(scores)) == 4
    backwards = judge(prompts=PROMPTS[::-1], images=images[::-1])
    assert backwards[::-1] == pytest.approx(scores, rel=1e-3)
    (of_video,) = judge(prompts=PROMPTS[:1], images=[images])
    assert of_video == pytest.approx(np.mean(judge(prompts=PROMPTS[:1] * 4, images=images)), rel=1e-3)


def test_a_grade_is_the_mean_of_the_answers_values(folder):
    answers = {str(grade): grade for grade in range(1, 6)}
    judge = VLMJudge(folder, question="grade {prompt}", answers=answers, answer_start=" Score:", name="grade")
    image = picture(0)
    (score,) = judge(prompts=["a circle"], images=[image])
    odds = probabilities(judge, "USER: <image> grade a circle ASSISTANT: Score:", image)
    odds = odds[judge.processor.tokenizer.convert_tokens_to_ids(list(answers))]
    assert score == pytest.approx(float(odds @ torch.arange(1.0, 6.0) / odds.sum()), rel=1e-4)
    assert judge.__name__ == "grade" and 1 < score < 5
    assert judge(prompts=["a {prompt} circle"], images=[image])  # what stands in a prompt is no template


def test_answers_need_first_tokens_of_their_own(folder):
    with pytest.raises(ValueError, match="`answers` is {'Yes': 1, 'Yes a': 0}, whose first tokens are"):
        VLMJudge(folder, answers={"Yes": 1, "Yes a": 0})
    with pytest.raises(ValueError, match="`answers` is ''"):
        VLMJudge(folder, answers="")


@pytest.mark.parametrize("model", ["/no/such/folder", LANGUAGE_FOLDER, CLIP_FOLDER])
def test_a_model_that_is_no_judge(model):
    with pytest.raises(ValueError, match=re.escape(f'`model` is "{model}"')) as info:
        VLMJudge(model)
    assert QWEN in str(info.value)


def test_a_processor_without_a_chat_template(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="its processor has no chat template"):
        VLMJudge(tmp_path)


def test_by_name():
    assert "vlm_judge" in BUILT_IN_REWARDS
    with pytest.raises(ValueError, match=f'"{QWEN}".*(network|flow-trl\\[clip\\])'):
        get_reward_func("vlm_judge")


def test_no_images_and_wrong_numbers(folder):
    judge = VLMJudge(folder)
    assert judge(prompts=[], images=[]) == []
    with pytest.raises(ValueError, match="`vlm_judge` got 2 `prompts` and 1 `images`"):
        judge(prompts=["a", "a"], images=[picture(0)])

import math
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image

from flow_trl.evaluation import (
    evaluate_confidence,
    evaluate_two_attempts,
    reliability_diagram,
    sample_completions,
    score_confidence,
    score_two_attempts,
)
from flow_trl.rewards.text import brier_reward, exact_match
from flow_trl.utils import MissingExtraError
from tests.text_models import llama, word_level


TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}{{ 'maybe' if sure is not defined else sure }}{% endif %}"
)
PROMPTS = ["1 2 3", "4", "5 6 7 8 9 10", "11 , 12"]
OPTIONS = {"max_new_tokens": 6, "disable_tqdm": True}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = word_level()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def model(tokenizer):
    return llama(tokenizer)


def completion(answer, confidence, layout="<reasoning></reasoning><answer>{}</answer><analysis></analysis>"):
    return layout.format(answer) + f"<confidence>{confidence}</confidence>"


def attempts(first, second):
    return (
        f"<first_attempt><answer>{first}</answer></first_attempt>"
        f"<second_attempt><answer>{second}</answer></second_attempt>"
    )


# Sampling


def test_greedy_equals_generate_one_by_one(model, tokenizer):
    completions = sample_completions(model, tokenizer, PROMPTS, num_samples=2, temperature=0, batch_size=3, **OPTIONS)
    model.eval()
    for prompt, texts in zip(PROMPTS, completions, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**ids, do_sample=False, max_new_tokens=6)[0, ids["input_ids"].shape[1] :]
        assert texts == [tokenizer.decode(alone, skip_special_tokens=True)] * 2


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_peft_model_samples_like_the_model_itself(model, tokenizer, task_type):
    expected = sample_completions(model, tokenizer, PROMPTS, num_samples=2, **(OPTIONS | {"max_new_tokens": 30}))
    model.generation_config.top_k = 1
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type=task_type))
    assert (
        sample_completions(wrapped, tokenizer, PROMPTS, num_samples=2, **(OPTIONS | {"max_new_tokens": 30}))
        == expected
    )
    assert model.generation_config.top_k == 1


def test_samples_are_reproducible_and_keep_the_order_of_prompts(model, tokenizer):
    kwargs = {"num_samples": 3, "batch_size": 4} | OPTIONS
    first = sample_completions(model, tokenizer, PROMPTS, seed=1, **kwargs)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert sample_completions(model, tokenizer, PROMPTS, seed=1, **kwargs) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert sample_completions(model, tokenizer, PROMPTS, seed=2, **kwargs) != first
    assert [len(texts) for texts in first] == [3] * 4
    assert len({text for texts in first for text in texts}) == 12


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_every_prompt_gets_its_own_completions(tokenizer, batch_size):
    class Echo(torch.nn.Module):
        """Continues a prompt by its last token and its number of tokens."""

        device = torch.device("cpu")
        generation_config = llama(tokenizer).generation_config
        widths = []

        def generate(self, input_ids, attention_mask):
            assert len(input_ids) <= batch_size
            assert (input_ids[attention_mask == 0] == tokenizer.pad_token_id).all()
            assert (attention_mask.diff() >= 0).all()  # padded on the left
            self.widths.append(input_ids.shape[1])
            lengths = [tokenizer.convert_tokens_to_ids(str(length.item())) for length in attention_mask.sum(1)]
            return torch.cat([input_ids, input_ids[:, -1:], torch.tensor(lengths)[:, None]], 1)

    echo = Echo()
    completions = sample_completions(echo, tokenizer, PROMPTS, num_samples=3, batch_size=batch_size, **OPTIONS)
    assert completions == [["3 3"] * 3, ["4 1"] * 3, ["10 6"] * 3, ["12 3"] * 3]
    assert echo.widths == sorted(echo.widths, reverse=True)


def test_conversational_prompts_get_the_chat_template(model, tokenizer):
    conversation = [{"role": "user", "content": "1 2"}]
    kwargs = {"num_samples": 1, "temperature": 0} | OPTIONS
    as_text = sample_completions(model, tokenizer, ["1 2 maybe", "1 2 yes"], **kwargs)
    assert sample_completions(model, tokenizer, [conversation], **kwargs) == as_text[:1]
    assert (
        sample_completions(model, tokenizer, [conversation], chat_template_kwargs={"sure": "yes"}, **kwargs)
        == as_text[1:]
    )
    assert as_text[0] != as_text[1]


def test_model_is_left_as_it_was(model, tokenizer):
    model.train()
    model.lm_head.eval()
    model.generation_config.update(top_k=1, max_length=7)
    modes, config = [module.training for module in model.modules()], model.generation_config
    # `top_k=1` would make them all equal.
    assert len(set(sample_completions(model, tokenizer, ["1"], num_samples=8, **OPTIONS)[0])) == 8
    with pytest.raises(RuntimeError, match="stop"):
        sample_completions(model, tokenizer, ["1"], stopping_criteria=[stop], **OPTIONS)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is config and config.top_k == 1
    assert len(set(sample_completions(model, tokenizer, ["1"], num_samples=8, top_k=1, **OPTIONS)[0])) == 1
    assert all(parameter.grad is None for parameter in model.parameters())


def stop(*args, **kwargs):
    raise RuntimeError("stop")


def test_completions_end_at_each_end_token_of_the_model(model, tokenizer):
    text = sample_completions(model, tokenizer, ["1"], num_samples=1, **OPTIONS)[0][0]
    words = text.split()
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(words[2]), tokenizer.eos_token_id]
    [[shorter]] = sample_completions(model, tokenizer, ["1"], num_samples=1, **OPTIONS)
    assert shorter.split() == words[: words.index(words[2]) + 1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_samples": 0}, "`num_samples=0`"),
        ({"batch_size": 0}, "`batch_size=0`"),
        ({"max_new_tokens": 0}, "`max_new_tokens=0`"),
        ({"temperature": -1}, "`temperature=-1`"),
        ({"prompts": ["1", ""]}, r"`prompts\[1\]`"),
    ],
)
def test_bad_sampling_arguments(model, tokenizer, kwargs, message):
    with pytest.raises(ValueError, match=message):
        sample_completions(model, tokenizer, **({"prompts": ["1"], "disable_tqdm": True} | kwargs))


# Confidence


def test_confidences_by_hand():
    completions = [
        [completion(4, 0.9), completion(5, 0.2), completion(5, 0.3), completion(4, "high")],
        [completion(7, 0.8), completion(8, 0.1), "cut off", completion(7, 1.0, "<answer>{}</answer>")],
    ]
    results = score_confidence(completions, ["4", "8"], correct=exact_match)
    # Correct are 0.9, 0.1 and the unreadable one; wrong are 0.2, 0.3, 0.8, 1.0 and the one that was cut off.
    assert results["accuracy"] == results["pass@1"] == 3 / 8
    assert results["accuracy_se"] == pytest.approx(np.std([1] * 3 + [0] * 5, ddof=1) / math.sqrt(8))
    assert results["auroc"] == pytest.approx(3 / 8)  # 0.9 wins three of four, 0.1 none
    losses = [0.1**2, 0.2**2, 0.3**2, 0.8**2, 0.9**2, 1.0]
    assert results["brier"] == pytest.approx(sum(losses) / 6)
    assert results["brier_strict"] == pytest.approx((sum(losses) + 2) / 8)
    assert results["ece"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.8 + 0.9 + 1.0) / 6)
    assert results["unparsable"] == 2 / 8
    assert results["format"] == 6 / 8
    assert results["pass@2"] == pytest.approx(((1 - 1 / 6) + (1 - 3 / 6)) / 2)
    assert results["pass@4"] == 1
    assert "pass@8" not in results
    assert results["majority"] == pytest.approx((1 / 2 + 0) / 2)
    assert results["highest_confidence"] == pytest.approx((1 + 0) / 2)
    assert results["weighted_majority"] == pytest.approx((1 + 0) / 2)
    assert sum(results["bins"]["count"]) == 6
    rewards = brier_reward(sum(completions, []), ["4"] * 4 + ["8"] * 4, correct=exact_match)
    assert results["brier_strict"] == pytest.approx(-np.mean(rewards))


def test_answers_that_are_equal_vote_together():
    completions = [[completion(answer, 0.5) for answer in order] for order in (["1.0", "1", "2"], ["2", "1", "1.0"])]
    results = score_confidence(
        completions, ["1", "1"], correct=lambda prediction, answer: float(prediction) == float(answer)
    )
    assert results["majority"] == results["weighted_majority"] == 1
    assert score_confidence(completions, ["1", "1"], correct=exact_match)["majority"] == pytest.approx(1 / 3)


def test_resampling_prompts():
    completions = [[completion(right, 0.2 + 0.1 * (i % 5))] * 8 for i, right in enumerate([1, 0] * 10)]
    kwargs = {"correct": exact_match, "num_resamples": 300}
    over_samples = score_confidence(completions, ["1"] * 20, **kwargs)
    over_prompts = score_confidence(completions, ["1"] * 20, resample_prompts=True, **kwargs)
    for name in ("auroc", "brier"):
        assert over_prompts[name] == over_samples[name]
        assert over_prompts[f"{name}_se"] > 2 * over_samples[f"{name}_se"]
    assert over_samples["pass@1_se"] > 2 * over_samples["accuracy_se"]


def test_without_any_confidence_there_is_nothing_to_calibrate():
    results = score_confidence([["<answer>4</answer>", "?"]], ["4"], correct=exact_match, k=[2])
    assert results["accuracy"] == 0.5 and results["pass@2"] == 1
    assert results["unparsable"] == results["brier_strict"] == 1
    assert all(math.isnan(results[name]) for name in ("auroc", "brier", "ece", "auroc_se", "brier_se", "ece_se"))
    reliability_diagram(results)


def test_evaluate_confidence_samples_and_scores(model, tokenizer):
    dataset = Dataset.from_dict({"prompt": PROMPTS, "answer": ["1", "2", "3", "4"]})
    kwargs = {"num_samples": 4, "seed": 3, "batch_size": 8}
    results = evaluate_confidence(model, tokenizer, dataset, correct=exact_match, **kwargs, **OPTIONS)
    completions = sample_completions(model, tokenizer, PROMPTS, **kwargs, **OPTIONS)
    scores = score_confidence(completions, dataset["answer"], correct=exact_match, seed=3)
    assert repr(results) == repr(scores)
    assert results["accuracy"] == 0 and results["unparsable"] == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([], []), "0 prompts"),
        (([["a"]], ["1", "2"]), "1 prompts and `answers` 2"),
        (([["a"], []], ["1", "2"]), r"`completions\[1\]`"),
        ((["a"], ["1"]), r"`completions\[0\]`"),
    ],
)
@pytest.mark.parametrize("score", [score_confidence, score_two_attempts])
def test_bad_completions(score, args, message):
    with pytest.raises(ValueError, match=message):
        score(*args, correct=exact_match)


@pytest.mark.parametrize("evaluate", [evaluate_confidence, evaluate_two_attempts])
def test_bad_data_sets(model, tokenizer, evaluate):
    with pytest.raises(ValueError, match="no column 'answer'"):
        evaluate(model, tokenizer, Dataset.from_dict({"prompt": ["1"]}))
    with pytest.raises(ValueError, match="empty"):
        evaluate(model, tokenizer, Dataset.from_dict({"prompt": [], "answer": []}))


# Two attempts


def test_two_attempts_by_hand():
    completions = [
        [attempts(4, 4), attempts(5, 4), attempts(4, 5), attempts(5, 5)],
        [attempts(5, 6), "<first_attempt><answer>8</answer></first_attempt>"],
    ]
    results = score_two_attempts(completions, ["4", "8"], correct=exact_match)
    expected = {
        "first_accuracy": (1 / 2, 1 / 2),
        "second_accuracy": (1 / 2, 0),
        "gain": (0, -1 / 2),
        "right_to_wrong": (1 / 4, 1 / 2),
        "wrong_to_right": (1 / 4, 0),
        "changed": (1 / 2, 1 / 2),
        "format": (1, 1 / 2),
    }
    assert set(results) == {f"{name}{suffix}" for name in expected for suffix in ("", "_se")}
    for name, (first, second) in expected.items():
        assert results[name] == pytest.approx((first + second) / 2)
        assert results[f"{name}_se"] == pytest.approx(abs(first - second) / 2)


def test_evaluate_two_attempts_samples_and_scores(model, tokenizer):
    dataset = Dataset.from_dict({"prompt": PROMPTS[:2], "answer": ["1", "2"]})
    results = evaluate_two_attempts(model, tokenizer, dataset, correct=exact_match, num_samples=2, **OPTIONS)
    assert results["first_accuracy"] == results["format"] == 0


# Reliability diagram


def test_reliability_diagram(tmp_path):
    first = score_confidence(
        [[completion(1, 0.95), completion(2, 0.92), completion(1, 1.0)]], ["1"], correct=exact_match
    )
    second = score_confidence([[completion(1, 0.4), completion(2, 0.9)]], ["1"], correct=exact_match)
    figure = reliability_diagram({"first": first, "second": second}, tmp_path / "new" / "diagram.png")
    with Image.open(tmp_path / "new" / "diagram.png") as image:
        assert image.format == "PNG"
    upper, lower = figure.axes
    diagonal, *curves = upper.lines
    assert [curve.get_label() for curve in curves] == [
        f"first (ECE {first['ece']:.3f})",
        f"second (ECE {second['ece']:.3f})",
    ]
    np.testing.assert_allclose(curves[0].get_xydata(), [[0.935, 0.5], [1, 1]])
    np.testing.assert_allclose(curves[1].get_xydata(), [[0.4, 1], [0.9, 0]])
    heights = [bar.get_height() for bar in lower.patches]
    assert heights == first["bins"]["count"] + second["bins"]["count"]
    assert len(reliability_diagram(first).axes[0].lines) == 2


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"flow-trl\[plots\]"):
        reliability_diagram({})


def test_how_many_completions_have_a_confidence(caplog):
    """Of 50, two: the number stands beside the ECE, in the results, in the diagram and in the log."""
    layout = "<answer>4</answer><confidence>{}</confidence>"
    row = [layout.format(0.9)] * 2 + [layout.format("high")] * 48
    results = score_confidence([row], ["4"], correct=exact_match, num_resamples=2)
    assert (results["num_completions"], results["num_confidences"], results["ece"]) == (50, 2, pytest.approx(0.1))
    assert "Only 2 of 50 completions have a readable confidence" in caplog.text
    legend = reliability_diagram({"after": results}).axes[0].get_legend().get_texts()[0].get_text()
    assert legend == "after (ECE 0.100, of 2 of 50)"

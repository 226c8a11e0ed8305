"""Every Python block of README and docs runs, on the tiny world's models in place of the Hub's; what a training logs is explained."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import transformers

import flow_trl
from flow_trl import rewards, tiny
from flow_trl.rewards.clip import ClipScore


ROOT = Path(__file__).parents[1]
SOURCE, SNIPPETS = ROOT / "docs" / "source", ROOT / "docs" / "snippets"
STAND_INS = {
    '"stabilityai/stable-diffusion-3.5-medium"': "tiny.load_flow_pipeline()",
    '"CompVis/stable-diffusion-v1-4"': "tiny.load_diffusion_pipeline()",
    '"Qwen/Qwen2.5-3B-Instruct"': "str(tiny.LANGUAGE_FOLDER)",
    '{"height": 512, "width": 512}': '{"max_sequence_length": 0}',
}
SMALL = {"max_steps": 1, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
SMALL_IMAGES = {
    "num_inference_steps": 2,
    "eval_num_inference_steps": 2,
    "guidance_scale": 1.0,
    "num_generations": 2,
    "generation_batch_size": 4,
    "per_device_train_batch_size": 2,
    "updates_per_generation": 1,
    "eval_steps": 1,
    "check_pipeline": True,
}
SMALL_TEXT = {
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 16,
    "warmup_steps": 0,
}
TRAINERS = {"tp_grpo", "flow_grpo", "tdpo_r", "ddpo", "blockwise_grpo"}


def text_of(page):
    """A page with what it includes."""
    return re.sub(r'--8<-- "(.+)"', lambda found: (SNIPPETS / found[1]).read_text(), page.read_text())


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


PAGES = [page for page in [ROOT / "README.md", *sorted(SOURCE.glob("*.md"))] if blocks_of(page)]


@pytest.fixture
def small_world(tmp_path, monkeypatch, page):
    """A folder with the data sets that the docs name, small settings, and no Hub."""
    monkeypatch.chdir(tmp_path)
    prompts = [{"prompt": f'a sign that says "{word}"'} for word in ("TEA", "OPEN", "SALE", "EXIT")]
    problems = [{"problem": f"{a}+{a}=?", "answer": str(2 * a)} for a in (2, 3, 4, 5)]
    for name, rows in (("prompts", prompts), ("held_out", prompts[:2]), ("problems", problems)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    clip = tiny.load_clip()
    for name in ("aesthetic", "clip_score", "pickscore"):
        reward = ClipScore(*clip)
        reward.__name__ = name
        monkeypatch.setitem(rewards.BUILT_IN_REWARDS, name, partial(lambda reward: reward, reward))
    for name in ("TPGRPO", "FlowGRPO", "TDPOR", "DDPO", "BlockwiseGRPO"):
        config, trainer = getattr(flow_trl, f"{name}Config"), getattr(flow_trl, f"{name}Trainer")
        small = SMALL | (SMALL_TEXT if name == "BlockwiseGRPO" else SMALL_IMAGES)
        small = {"use_cpu": True} if page.stem == "paper_index" else small  # which trains nothing
        monkeypatch.setattr(config, "__init__", smaller(config.__init__, small))
        monkeypatch.setattr(trainer, "push_to_hub", lambda self, **kwargs: self.save_model(), raising=False)
    trained, train = [], transformers.Trainer.train

    def watched(self, *args, **kwargs):
        trained.append(self)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "train", watched)
    return trained


def smaller(init, small):
    return lambda self, *args, **kwargs: init(self, *args, **{**kwargs, **small})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run_and_logs_are_explained(page, small_world):
    blocks = blocks_of(page)
    if '"ocr"' in "".join(blocks):
        pytest.importorskip("rapidocr_onnxruntime")
    names = {"tiny": tiny}
    for number, block in enumerate(blocks):
        for original, stand_in in STAND_INS.items():
            block = block.replace(original, stand_in)
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    if page.stem not in TRAINERS:
        return
    lines = [line for line in text_of(page).splitlines() if line.startswith(("|", "At the end", "`train_loss`"))]
    explained = [re.sub(r"<\w+>", "[^/ ]+", name) for line in lines for name in re.findall(r"`([\w/<>]+)`", line)]
    logged = {name for trainer in small_world for entry in trainer.state.log_history for name in entry}
    assert logged
    assert not {name for name in logged if not any(re.fullmatch(pattern, name) for pattern in explained)}

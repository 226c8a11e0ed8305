"""BlockwiseGRPOTrainer against the paper's formula in a plain loop, and against TRL's own trainer."""

import dataclasses
import functools
from pathlib import Path

import pandas as pd
import pytest
import torch
import trl
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from flow_trl import Block, BlockwiseGRPOConfig, BlockwiseGRPOTrainer
from flow_trl.tasks import confidence_task
from flow_trl.trainer import blockwise_log
from tests import text_models, two_processes
from tests.trainer.text_runs import (
    TEXTS,
    Rollout,
    Watch,
    confidence_reward,
    make_blocks,
    make_config,
    make_trainer,
    mixed,
    model_before,
    outcome,
    prompts,
    run,
    solution_reward,
    weights,
)


pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")


# The loss


def log_probs(model, prompt_ids, completion_ids):
    logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1)[range(len(completion_ids)), completion_ids]


def mean(values):
    return sum(values) / len(values)


def block_tokens(tokens):
    """Positions of the solution's and of the confidence's tokens; `None` if there is no confidence."""
    tags = [i for i, token in enumerate(tokens) if token in ("<analysis>", "<confidence>")]
    first = tags[0] if tags else len(tokens)
    return [list(range(first)), list(range(first, len(tokens))) if tags else None]


def advantages_by_hand(completions, tokenizer, group_size):
    """The spec's advantages of both blocks, by loops."""
    rows = []
    for i, ids in enumerate(completions):
        blocks = block_tokens(tokenizer.convert_ids_to_tokens(ids))
        rows.append({"group": i // group_size, "outcome": mixed(ids, 5) > 1, "blocks": blocks,
                     "rewards": [mixed(ids, 5) / 4, -mixed(ids, 7) / 6 if blocks[1] else None]})  # fmt: skip
    for row in rows:
        group = [other for other in rows if other["group"] == row["group"]]
        row["advantages"] = [row["rewards"][0] - mean([other["rewards"][0] for other in group]), None]
        if row["blocks"][1]:
            stratum = [o["rewards"][1] for o in group if o["blocks"][1] and o["outcome"] == row["outcome"]]
            row["advantages"][1] = row["rewards"][1] - mean(stratum)
    return rows


def loss_by_hand(model, old_model, rollout, rows, tokenizer, config, masked, block_weights=(1.0, 1.0)):
    total = 0.0
    for prompt_ids, ids, row in zip(rollout["prompt_ids"], rollout["completion_ids"], rows, strict=True):
        new = log_probs(model, prompt_ids, ids)
        ratio = (new - log_probs(old_model, prompt_ids, ids).detach()).exp()
        trained = {i for i, token in enumerate(tokenizer.convert_ids_to_tokens(ids)) if token not in masked}
        for weight, positions, advantage in zip(block_weights, row["blocks"], row["advantages"], strict=True):
            positions = [i for i in positions or [] if i in trained]
            for t in positions:
                if config.loss_type == "cispo":
                    term = ratio[t].clamp(max=config.epsilon_high).detach() * advantage * new[t]
                else:
                    clipped = ratio[t].clamp(1 - config.epsilon, 1 + config.epsilon)
                    term = torch.minimum(ratio[t] * advantage, clipped * advantage)
                total = total - weight * term / len(positions)
    return total / len(rows)


@pytest.mark.parametrize("masked", [(), ("maybe", "yes")], ids=["plain", "external_tokens"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo", "cispo"])
def test_loss_and_gradient_are_the_papers(loss_type, masked, tmp_path):
    """Two micro-batches per update, two updates per generation: in the second, ratios are clipped."""
    extra = {"epsilon_high": 1.02} if loss_type == "cispo" else {"epsilon": 0.02}
    trainer = make_trainer(
        tmp_path, make_blocks(weight=0.5), masked=masked, loss_type=loss_type, num_iterations=2, max_steps=4, **extra
    )
    losses, compute_loss = [], trainer.compute_loss

    def keep(model, inputs, **kwargs):
        losses.append(compute_loss(model, inputs, **kwargs))
        return losses[-1]

    trainer.compute_loss = keep
    trainer.train()
    tokenizer = trainer.processing_class
    assert len(trainer.rollout.rows) == 2
    for generation, rollout in enumerate(trainer.rollout.rows):
        rows = advantages_by_hand(rollout["completion_ids"], tokenizer, 4)
        assert {len(ids) for ids in rollout["completion_ids"]} >= {3, 10, 15}  # padding
        assert any(row["blocks"][1] is None for row in rows)
        for update in (2 * generation, 2 * generation + 1):
            model, old = model_before(trainer, update), model_before(trainer, 2 * generation)
            loss = loss_by_hand(model, old, rollout, rows, tokenizer, trainer.args, masked, (1.0, 0.5))
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            measured = sum(losses[2 * update : 2 * update + 2])
            torch.testing.assert_close(measured, loss, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(trainer.watch.gradients[update], gradient, rtol=1e-5, atol=1e-5)
            error = (trainer.watch.gradients[update] - gradient).norm() / gradient.norm()
            assert error < 1e-5
    name = "cispo_clip_ratio" if loss_type == "cispo" else "clip_ratio/region_mean"
    clipped = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert clipped[0] == clipped[2] == 0 and min(clipped[1], clipped[3]) > 0.02


@pytest.mark.parametrize("scale_rewards", ["none", "group", "batch"])
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_a_single_block_is_trls_grpo_bit_for_bit(scale_rewards, num_iterations, tmp_path):
    arguments = {"scale_rewards": scale_rewards, "num_iterations": num_iterations, "max_steps": 4, "beta": 0.1}
    block = Block("all", [solution_reward, confidence_reward], pattern=".+", reward_weights=[1.0, 0.3])
    tokenizer, watch, folder = text_models.word_level(), Watch(), str(tmp_path / "model")
    text_models.llama(tokenizer).save_pretrained(folder)
    ours = make_trainer(tmp_path / "ours", [block], model=folder, baseline="group", **arguments)
    ours.train()
    trl = GRPOTrainer(
        folder,
        [solution_reward, confidence_reward],
        make_config(tmp_path / "trl", GRPOConfig, loss_type="grpo", reward_weights=[1.0, 0.3], **arguments),
        train_dataset=prompts(),
        processing_class=tokenizer,
        rollout_func=Rollout(tokenizer),
        callbacks=[watch],
    )
    trl.train()
    assert len(watch.gradients) == 4
    for mine, theirs in zip(ours.watch.gradients, watch.gradients, strict=True):
        assert theirs.norm() > 1e-4
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(ours.state.log_history, trl.state.log_history, strict=True):
        shared = [name for name in theirs if not any(word in name for word in ("time", "runtime", "second"))]
        assert {name: mine[name] for name in shared} == {name: theirs[name] for name in shared}


@pytest.mark.parametrize("loss_type", ["sapo", "vespo"])
def test_other_losses_begin_like_grpo(loss_type, tmp_path):
    """At ratios of 1 the slope of both is 1, so the first gradient is that of the plain loss."""
    gradients = {}
    for kind in ("grpo", loss_type):
        trainer = make_trainer(tmp_path, make_blocks(weight=0.5), loss_type=kind, masked=("maybe",))
        trainer.train()
        gradients[kind] = trainer.watch.gradients[0]
    torch.testing.assert_close(gradients[loss_type], gradients["grpo"], rtol=1e-4, atol=1e-7)


def test_only_a_blocks_own_tokens_carry_its_advantage(tmp_path):
    """Without weight on the solution, its reward changes nothing, and the confidence's tokens still learn."""
    gradients = []
    for reward in (solution_reward, confidence_reward):
        blocks = [Block("solution", reward, tags=("reasoning", "answer"), weight=0.0), make_blocks()[1]]
        trainer = make_trainer(tmp_path, blocks)
        trainer.train()
        gradients.append(trainer.watch.gradients[0])
    assert torch.equal(*gradients) and gradients[0].any()


def test_the_loss_in_evaluation_is_the_same_for_all_types(tmp_path):
    """Evaluation has neither accumulation nor steps, whatever the type's own normalisation."""
    losses = []
    for loss_type in ("grpo", "dapo", "bnpo", "dr_grpo"):
        trainer = make_trainer(
            tmp_path, loss_type=loss_type, extra={"eval_dataset": prompts(2)}, per_device_eval_batch_size=8
        )
        losses.append(trainer.evaluate()["eval_loss"])
        rows = advantages_by_hand(trainer.rollout.rows[0]["completion_ids"], trainer.processing_class, 4)
    expected = -mean([row["advantages"][0] + (row["advantages"][1] or 0.0) for row in rows])
    assert losses == pytest.approx([expected] * 4, abs=1e-6)
    assert len(rows) == 8


# What is logged


def test_metrics_and_completions_table(tmp_path):
    trainer = make_trainer(tmp_path, make_blocks(missing_reward=-3.0), log_completions=True)
    trainer.train()
    log = trainer.state.log_history[0]
    completions = trainer.rollout.rows[0]["completion_ids"]
    rows = advantages_by_hand(completions, trainer.processing_class, 4)
    assert log["blocks/confidence/found"] == pytest.approx(mean(["</confidence>" in TEXTS[i % 7] for i in range(8)]))
    assert log["blocks/solution/found"] == pytest.approx(mean(["</answer>" in TEXTS[i % 7] for i in range(8)]))
    assert log["blocks/confidence/reward"] == pytest.approx(
        mean([-3.0 if row["rewards"][1] is None else row["rewards"][1] for row in rows])
    )
    totals = [row["rewards"][0] + (-3.0 if row["rewards"][1] is None else row["rewards"][1]) for row in rows]
    assert log["reward"] == pytest.approx(mean(totals))
    assert log["reward_std"] == pytest.approx(torch.tensor(totals).std().item())
    present = [row["rewards"][1] for row in rows if row["rewards"][1] is not None]
    assert log["rewards/confidence_reward/mean"] == pytest.approx(mean(present))
    assert log["blocks/confidence/length"] == pytest.approx(
        mean([len(row["blocks"][1]) for row in rows if row["blocks"][1]])
    )
    zero = [abs(row["advantages"][1]) < 1e-7 for row in rows if row["blocks"][1]]
    assert log["blocks/confidence/zero_advantage"] == pytest.approx(mean(zero))

    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    for row, (_, logged) in zip(rows, table.iterrows(), strict=True):
        expected = [row["advantages"][0], row["advantages"][1] or 0.0]
        assert logged["solution/advantage"] == pytest.approx(expected[0], abs=1e-6)
        assert logged["confidence/advantage"] == pytest.approx(expected[1], abs=1e-6)
        assert logged["advantage"] == pytest.approx(sum(expected), abs=1e-6)
        assert logged["confidence/outcome"] == str(row["outcome"])
        assert pd.isna(logged["confidence/text"]) == (row["blocks"][1] is None)
        assert logged["solution/reward"] == pytest.approx(row["rewards"][0])
        assert pd.isna(logged["confidence/reward"]) == (row["rewards"][1] is None)


def zero(completion_ids, **columns):
    return [0.0] * len(completion_ids)


def unreadable(completion_ids, **columns):
    return [-1.0] * len(completion_ids)


def test_rewards_in_the_log_are_what_is_trained(tmp_path):
    """Half the completions lack the confidence, the others' is unreadable: that is no better and no worse."""
    blocks = [Block("solution", zero, tags="answer"), Block("confidence", unreadable, tags="confidence", outcome=zero)]
    trainer = make_trainer(tmp_path / "paper", blocks)
    trainer.train()
    log = trainer.state.log_history[0]
    assert 0.2 < log["blocks/confidence/found"] < 0.8
    assert (log["reward"], log["reward_std"], log["frac_reward_zero_std"]) == (-1.0, 0.0, 1.0)
    assert not trainer.watch.gradients[0].any()

    blocks[1] = dataclasses.replace(blocks[1], reward_funcs=[zero])  # a readable one, of the best score
    trainer = make_trainer(tmp_path / "charged", blocks, charge_missing=True, log_completions=True)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["reward"] == pytest.approx(log["blocks/confidence/reward"]) and -0.8 < log["reward"] < -0.2
    assert log["frac_reward_zero_std"] == 0 and trainer.watch.gradients[0].any()
    table = pd.read_parquet(tmp_path / "charged" / "completions" / "completions_00001.parquet")
    for _, group in table.groupby(table.index // 4):
        missing = group["confidence/text"].isna()
        expected = missing.mean() - missing  # what the first block is charged, less the group's mean of it
        assert list(group["solution/advantage"]) == pytest.approx(list(expected), abs=1e-6)
        assert not group["confidence/advantage"].any()


def test_the_table_fits_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    trainer = make_trainer(tmp_path, log_completions=True, num_completions_to_print=3)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if set(line) & set("│┃┏┡├└")]
    assert lines and all(len(line) == 80 for line in lines)
    assert {"prompt", "solution", "confidence"} <= set(lines[1].replace("┃", " ").split())
    assert sum("advantage" in line for line in lines) == 3 * 2  # the end of training is logged too
    assert "solution/text" in pd.read_parquet(next((tmp_path / "completions").iterdir())).columns


def test_nothing_to_learn_is_said_once(tmp_path, caplog):
    blocks = [Block("solution", zero, tags="answer"), Block("end", zero, tags="end", outcome=zero)]
    make_trainer(tmp_path, blocks, max_steps=12).train()
    assert caplog.text.count("Block 'end' was found in 0.0%") == 1 and "example of the layout" in caplog.text
    assert caplog.text.count("had anything to learn from") == 1 and "`num_generations`" in caplog.text
    assert "has fallen" not in caplog.text


@pytest.mark.parametrize("first, then, words", [
    ((0.99, 0.6), (0.99, 0.05), "The mean reward of block 'solution' has fallen from 0.60 to"),
    ((0.99, 0.6), (0.1, 0.6), "completions with block 'solution' has fallen from 0.99 to"),
    ((0.99, -0.2), (0.99, -1.0), "`learning_rate`"),
    ((0.99, 0.6), (0.95, 0.55), None),
    ((0.2, 0.1), (0.9, 0.8), None),
])  # fmt: skip
def test_a_collapse_is_said_once(first, then, words):
    said = []
    watch = blockwise_log.Watch(["solution"], said.append)
    for values in [first] * 15 + [then] * 30:
        found, reward = values
        watch.update([found], learning=0.5, reward=reward)
    assert len(said) == (0 if words is None else 1) and all(words in message for message in said)


def test_reward_functions_get_the_blocks_texts_and_columns(tmp_path):
    seen = []

    def first(block_texts, number, prompts, completions, trainer_state, **columns):
        seen.append((block_texts, number, prompts, trainer_state.global_step))
        return [0.0] * len(completions)

    blocks = [
        Block("solution", first, tags="reasoning"),
        Block("end", confidence_reward, tags="confidence", outcome=first),
    ]
    make_trainer(tmp_path, blocks).train()
    assert len(seen) == 2  # as the reward and as the outcome
    texts, numbers, prompt_texts, step = seen[1]
    assert texts[0]["solution"] == "<reasoning> 1 2 </reasoning>"
    assert texts[0]["end"] == "<confidence> 0.7 </confidence>"
    assert texts[5] == {"solution": None, "end": None}
    assert [f"{number} yes" for number in numbers] == prompt_texts
    assert step == 0


def test_a_function_in_two_blocks_is_logged_for_each(tmp_path):
    blocks = make_blocks()
    blocks = [blocks[0], Block("confidence", solution_reward, tags=("analysis", "confidence"), outcome=outcome)]
    trainer = make_trainer(tmp_path, blocks, log_completions=True)
    trainer.train()
    assert {"rewards/solution/solution_reward/mean", "rewards/confidence/solution_reward/mean"} <= set(
        trainer.state.log_history[0]
    )


# What TRL's trainer can do


async def slow_reward(completion_ids, **columns):
    return [len(ids) / 10 for ids in completion_ids]


def maybe_reward(completion_ids, **columns):
    return [None if len(ids) == 3 else 1.0 for ids in completion_ids]


def test_async_partial_and_inapplicable_rewards_with_weights(tmp_path):
    partial = functools.partial(solution_reward, unused=1)
    block = Block("solution", [slow_reward, partial, maybe_reward], tags="reasoning", reward_weights=[2.0, 1.0, 0.5])
    trainer = make_trainer(tmp_path, [block], log_completions=True)
    trainer.train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    for ids, reward in zip(trainer.rollout.rows[0]["completion_ids"], table["solution/reward"], strict=True):
        expected = 2 * len(ids) / 10 + mixed(ids, 5) / 4 + (0.0 if len(ids) == 3 else 0.5)
        assert reward == pytest.approx(expected, rel=1e-6)


def test_sampled_completions_conversations_lora_entropy_and_evaluation(tmp_path):
    tokenizer = text_models.byte_level(text_models.BRACKETS)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": f"{i} + {i}?"}], "number": i} for i in range(8)]
    trainer = make_trainer(
        tmp_path,
        tokenizer=tokenizer,
        train=Dataset.from_list(rows),
        sampled=True,
        extra={"eval_dataset": Dataset.from_list(rows[:2]), "peft_config": LoraConfig(r=2, target_modules=["q_proj"])},
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        max_steps=2,
        beta=0.01,
        mask_truncated_completions=True,
        use_adaptive_entropy=True,
        entropy_target=100.0,
        entropy_coef_delta=0.1,
        save_strategy="steps",
        save_steps=1,
    )
    before = weights(trainer)
    trainer.train()
    assert not torch.equal(weights(trainer), before)
    logs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logs) == 2 and "eval_blocks/confidence/found" in logs[0]
    assert [entry["entropy_coef"] for entry in trainer.state.log_history if "entropy_coef" in entry][-1] > 0.1
    card = ModelCard.load(tmp_path / "README.md")
    assert "2602.10231" in card.text and "pavlenko2026blockwise" in card.text and "blockwise-grpo" in card.data.tags
    base = text_models.llama(tokenizer)
    loaded = PeftModel.from_pretrained(base, tmp_path / "checkpoint-2")
    assert loaded.peft_config["default"].r == 2


@pytest.mark.parametrize("masked", [(), ("yes",)])
def test_truncated_completions_do_not_move_the_weights(masked, tmp_path):
    """With `mask_truncated_completions`, completions without an end are in the baseline but not in the gradient."""
    trainer = make_trainer(tmp_path, mask_truncated_completions=True, masked=masked)
    trainer.train()
    rollout, tokenizer = trainer.rollout.rows[0], trainer.processing_class
    rows = advantages_by_hand(rollout["completion_ids"], tokenizer, 4)
    for row, ids in zip(rows, rollout["completion_ids"], strict=True):
        if ids[-1] != tokenizer.eos_token_id:
            row["blocks"] = [[], []]
    model = model_before(trainer, 0)
    loss_by_hand(model, model, rollout, rows, tokenizer, trainer.args, masked).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(trainer.watch.gradients[0], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"top_entropy_quantile": 0.5}, {"off_policy_mask_threshold": 1e-6, "num_iterations": 2}, {"delta": 1.5}],
)
def test_trls_options_go_together_with_blocks(options, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, **options)
    trainer.train()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in trainer.watch.gradients)


def test_the_baseline_options_reach_the_advantages(tmp_path):
    tables = {}
    for name, options in {
        "outcome": {}, "group": {"baseline": "group"}, "batch": {"baseline": "batch"}, "none": {"baseline": "none"},
        "shrinkage": {"shrinkage": 2.0}, "min": {"min_stratum_size": 3}, "loo": {"leave_one_out": True},
        "scaled": {"scale_rewards": "group"},
    }.items():  # fmt: skip
        make_trainer(tmp_path / name, log_completions=True, max_steps=4, **options).train()
        files = sorted((tmp_path / name / "completions").iterdir())
        tables[name] = pd.concat([pd.read_parquet(file) for file in files])
    columns = {name: tuple(table["confidence/advantage"]) for name, table in tables.items()}
    assert len(set(columns.values())) == len(columns)
    rewards = tables["none"]["confidence/reward"].fillna(0.0)
    assert columns["none"] == pytest.approx(tuple(rewards))


# Processes and resuming


def test_two_processes_and_one_give_the_same(tmp_path):
    """With groups of four each process has a group of its own; a group of eight spans both."""
    base = {"log_completions": True, "max_steps": 2, "learning_rate": 0.1, "loss_type": "dapo"}
    specs = [base, {**base, "num_generations": 8}, {**base, "baseline": "batch"}]
    folders = [str(tmp_path / f"two-{i}") for i in range(3)]
    two = [
        {**spec, "output_dir": folder, "gradient_accumulation_steps": 1}
        for spec, folder in zip(specs, folders, strict=True)
    ]
    results = two_processes.fork(run, two, tmp_path)
    for i, (spec, folder, (first, second)) in enumerate(zip(specs, folders, results, strict=True)):
        one = run({**spec, "output_dir": str(tmp_path / f"one-{i}")})
        assert torch.equal(first["weights"], second["weights"])
        torch.testing.assert_close(first["weights"], one["weights"], rtol=1e-5, atol=1e-6)
        for step in (1, 2):
            name = f"completions/completions_0000{step}.parquet"
            theirs, ours = pd.read_parquet(Path(folder) / name), pd.read_parquet(tmp_path / f"one-{i}" / name)
            assert list(theirs["completion"]) == list(ours["completion"]) and len(theirs) == 8
            for column in ("solution/advantage", "confidence/advantage", "confidence/reward"):
                assert list(theirs[column]) == pytest.approx(list(ours[column]), abs=1e-6, nan_ok=True)
        names = [name for name in one["log"][0] if name.startswith("blocks/")]
        assert len(names) == 8
        for mine, theirs in zip(one["log"][:2], first["log"][:2], strict=True):
            assert [mine[name] for name in names] == pytest.approx([theirs[name] for name in names], abs=1e-6)


def test_resuming_goes_straight_on(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1, "num_iterations": 2}
    straight = run({"output_dir": str(tmp_path / "straight"), **options})
    resumed = run(
        {"output_dir": str(tmp_path / "resumed"), **options, "resume": str(tmp_path / "straight" / "checkpoint-2")}
    )
    assert torch.equal(straight["weights"], resumed["weights"])


def test_saves_what_loads_with_one_line(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, LlamaForCausalLM)
    assert torch.equal(torch.cat([p.flatten() for p in loaded.parameters()]), weights(trainer))


# Bad input


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"baseline": "median"}, "`baseline='median'`.*'outcome', 'group', 'batch', 'none'"),
        ({"min_stratum_size": 0}, "`min_stratum_size=0`.*at least 1"),
        ({"min_stratum_size": 9}, "`min_stratum_size=9`.*`num_generations=4`"),
        ({"min_stratum_size": 4, "leave_one_out": True}, "`min_stratum_size=4`.*left out"),
        ({"shrinkage": -1.0}, "`shrinkage=-1.0`.*at least 0"),
        ({"shrinkage": float("nan")}, "`shrinkage=nan`"),
        ({"scale_rewards": "median"}, "`scale_rewards='median'`.*none, group or batch"),
        ({"loss_type": "luspo"}, "`loss_type='luspo'`.*whole sequence.*grpo, bnpo"),
        ({"loss_type": "ppo"}, "`loss_type='ppo'`.*grpo"),
        ({"importance_sampling_level": "sequence"}, "`importance_sampling_level='sequence'`.*tokens of all blocks"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "`multi_objective_aggregation='normalize_then_sum'`"),
        ({"reward_weights": [1.0]}, "`reward_weights=.*`Block`"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        make_config(tmp_path, **arguments)


SOLUTION, CONFIDENCE = make_blocks()


@pytest.mark.parametrize(
    "blocks, error, words",
    [
        ([], ValueError, "`blocks` is empty"),
        (SOLUTION, TypeError, "pass a list of `flow_trl.Block`"),
        ([solution_reward], TypeError, "pass a list of `flow_trl.Block`"),
        ([SOLUTION, SOLUTION], ValueError, "'solution' and 'solution' have the same name"),
        (
            [SOLUTION, Block("c", confidence_reward, tags=("answer", "confidence"), outcome=outcome)],
            ValueError,
            "overlap: 'solution' and 'c' have the same tag 'answer'",
        ),
        (
            [SOLUTION, Block("c", confidence_reward, tags="confidence")],
            ValueError,
            "Block 'c' has no `outcome`.*baseline='group'",
        ),
        ([CONFIDENCE], ValueError, "Block 'confidence' has an `outcome`, but nothing stands before"),
        ([SOLUTION, Block("c", confidence_reward, tags="c", outcome=slow_reward)], ValueError, "must not be an async"),
    ],
)
def test_bad_blocks_before_the_model_is_loaded(blocks, error, words, tmp_path):
    with pytest.raises(error, match=words):
        BlockwiseGRPOTrainer("no/such-model", blocks, make_config(tmp_path), train_dataset=prompts())


def test_a_reward_of_groups_needs_whole_ones(tmp_path, monkeypatch):
    """Of two processes each would have half of a group of 16, and a mean of its own."""
    blocks = confidence_task(score="dcpo", correct="exact").blocks
    split = make_config(tmp_path, num_generations=16, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    whole = make_config(tmp_path, num_generations=8, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    monkeypatch.setattr(BlockwiseGRPOConfig, "world_size", 2)
    split.steps_per_generation = whole.steps_per_generation = 2
    with pytest.raises(ValueError, match="`dcpo_reward` compares.* = 8` and `num_generations=16`.*part of a group"):
        BlockwiseGRPOTrainer("no/such-model", blocks, split, train_dataset=prompts())

    class Own:  # without a `__name__`
        needs_whole_groups = True

        def __call__(self, completions, **kwargs):
            raise NotImplementedError

    with pytest.raises(ValueError, match="`Own` compares"):
        BlockwiseGRPOTrainer("no/such-model", [Block("all", Own(), tags="all")], split, train_dataset=prompts())
    for config, parts in ((whole, blocks), (split, make_blocks())):
        with pytest.raises(OSError):  # there is no such model
            BlockwiseGRPOTrainer("no/such-model", parts, config, train_dataset=prompts())


def test_other_bad_arguments_of_the_trainer(tmp_path):
    with pytest.raises(TypeError, match="`args` is a `GRPOConfig`: pass a `BlockwiseGRPOConfig`"):
        BlockwiseGRPOTrainer("no/such-model", make_blocks(), make_config(tmp_path, GRPOConfig), prompts())
    with pytest.raises(ValueError, match="`reward_funcs`: give each `Block` its own"):
        BlockwiseGRPOTrainer(
            "no/such-model", make_blocks(), make_config(tmp_path), prompts(), reward_funcs=[solution_reward]
        )


def look(place: str) -> str:
    """
    Looks somewhere.

    Args:
        place: Where to look.
    """
    return "nothing"


class Environment:
    def reset(self, **columns):
        return None

    def get_reward(self):
        return 1.0


def tool_tokenizer():
    tokenizer = text_models.byte_level(text_models.BRACKETS)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return tokenizer


def test_tools(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{i} + {i}?"}], "number": i} for i in range(8)]
    trainer = make_trainer(
        tmp_path, tokenizer=tool_tokenizer(), train=Dataset.from_list(rows), sampled=True, extra={"tools": [look]}
    )
    before = weights(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["tools/call_frequency"] == 0
    assert not torch.equal(weights(trainer), before)


def test_tags_that_the_model_did_not_write(tmp_path):
    """Tags and texts of a tool, here all that has to do with a confidence, are neither in a block nor in a completion."""
    seen = []

    def watching(completions, block_texts, **columns):
        seen.extend(zip(completions, block_texts, strict=True))
        return [0.0] * len(completions)

    blocks = [Block("solution", watching, tags=("reasoning", "answer")), make_blocks()[1]]
    masked = ("<analysis>", "</analysis>", "<confidence>", "</confidence>", "0.7", "0.1", "0.5")
    trainer = make_trainer(tmp_path, blocks, masked=masked)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["blocks/confidence/found"] == 0 and log["blocks/solution/found"] > 0.5
    assert seen[0] == ("<reasoning> 1 2 </reasoning> <answer> 3 </answer> yes", {
        "solution": "<reasoning> 1 2 </reasoning> <answer> 3 </answer>", "confidence": None})  # fmt: skip
    own = [
        sum(token not in trainer.rollout.masked for token in ids) for ids in trainer.rollout.rows[0]["completion_ids"]
    ]
    assert log["blocks/solution/length"] == pytest.approx(mean(own))


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
def test_a_reward_of_the_environment_belongs_to_a_block(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{i} + {i}?"}], "number": i} for i in range(8)]
    extra = {"environment_factory": Environment, "environment_block": "confidence"}
    trainer = make_trainer(
        tmp_path,
        tokenizer=tool_tokenizer(),
        train=Dataset.from_list(rows),
        sampled=True,
        extra=extra,
        log_completions=True,
    )
    trainer.train()
    assert trainer._block_of_func == [0, 1, 1]
    assert "rewards/Environment/mean" in trainer.state.log_history[0]
    for bad in ({"environment_block": "third"}, {"environment_factory": None}):
        with pytest.raises(ValueError, match="`environment_block='.*'solution', 'confidence'.*environment_factory"):
            BlockwiseGRPOTrainer("no/such-model", make_blocks(), make_config(tmp_path), prompts(), **(extra | bad))


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
def test_a_reward_of_the_environment_belongs_to_no_block(tmp_path):
    with pytest.raises(ValueError, match="belongs to no block.*`environment_block='solution'`"):
        make_trainer(tmp_path, tokenizer=tool_tokenizer(), extra={"environment_factory": Environment})


def test_special_tags_are_found_with_a_warning(tmp_path, caplog):
    tokenizer = text_models.byte_level(special=text_models.BRACKETS)
    trainer = make_trainer(tmp_path, tokenizer=tokenizer)
    assert "Tags of block 'confidence' are special tokens" in caplog.text
    trainer.train()
    assert trainer.state.log_history[0]["blocks/confidence/found"] == 0.5


def too_few(completion_ids, **columns):
    return [0.0]


def infinite(completion_ids, **columns):
    return [float("-inf")] * len(completion_ids)


def unhashable(completion_ids, **columns):
    return [[1]] * len(completion_ids)


@pytest.mark.parametrize(
    "blocks, error, words",
    [
        ([Block("s", too_few, tags="reasoning")], ValueError, "'too_few' returned 1 rewards, but 8"),
        ([Block("s", infinite, tags="reasoning")], ValueError, "'infinite' returned an infinite reward"),
        (
            [SOLUTION, Block("c", confidence_reward, tags="confidence", outcome=too_few)],
            ValueError,
            "`too_few` of block 'c' returned 1 values for 8 completions",
        ),
        (
            [SOLUTION, Block("c", confidence_reward, tags="confidence", outcome=unhashable)],
            TypeError,
            r"`unhashable` of block 'c' returned \[1\], which is not hashable",
        ),
    ],
)
def test_bad_functions(blocks, error, words, tmp_path):
    with pytest.raises(error, match=words):
        make_trainer(tmp_path, blocks).train()


def test_the_command_line_knows_the_arguments(tmp_path):
    from trl import TrlParser

    (args,) = TrlParser(BlockwiseGRPOConfig).parse_args_and_config(
        [
            "--output_dir",
            str(tmp_path),
            "--baseline",
            "group",
            "--shrinkage",
            "2",
            "--leave_one_out",
            "--bf16",
            "false",
        ]
    )
    assert (args.baseline, args.shrinkage, args.leave_one_out) == ("group", 2.0, True)
    assert (args.loss_type, args.scale_rewards, args.beta) == ("grpo", "none", 0.0)

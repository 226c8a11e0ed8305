"""Tiny runs of BlockwiseGRPOTrainer on given completions. As a script it does the runs of a list one after another."""

import copy

import torch
from datasets import Dataset
from transformers import TrainerCallback

from flow_trl import Block, BlockwiseGRPOConfig, BlockwiseGRPOTrainer
from tests import text_models, two_processes


SOLUTION = "<reasoning> 1 2 </reasoning> <answer> 3 </answer>"
TEXTS = [
    f"{SOLUTION} <analysis> yes </analysis> <confidence> 0.7 </confidence> <eos>",
    "<reasoning> 4 </reasoning> <answer> 5 </answer> <analysis> no , maybe </analysis> <confidence> 0.1 </confidence> <eos>",
    f"maybe {SOLUTION} , yes <confidence> 0.5 </confidence> no <eos>",
    f"{SOLUTION} <eos>",
    "<reasoning> 1 2 3 4 5 6 7 8 </reasoning>",
    "yes no <eos>",
    "<reasoning> 9 </reasoning> <answer> 9 </answer> <analysis> yes",
]


def prompts(count=4):
    return Dataset.from_list([{"prompt": f"{number} yes", "number": number} for number in range(count)])


def mixed(ids, modulus):
    return sum((position + 1) * token for position, token in enumerate(ids)) % modulus


def solution_reward(completion_ids, **columns):
    return [mixed(ids, 5) / 4 for ids in completion_ids]


def confidence_reward(completion_ids, **columns):
    return [-mixed(ids, 7) / 6 for ids in completion_ids]


def outcome(completion_ids, **columns):
    return [mixed(ids, 5) > 1 for ids in completion_ids]


def make_blocks(**kwargs):
    return [
        Block("solution", solution_reward, tags=("reasoning", "answer")),
        Block("confidence", confidence_reward, tags=("analysis", "confidence"), outcome=outcome, **kwargs),
    ]


class Watch(TrainerCallback):
    """Keeps the weights before each update, and its gradient."""

    def __init__(self):
        self.weights, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.weights.append(copy.deepcopy(getattr(model, "module", model).state_dict()))
        self.gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))


class Rollout:
    """Given completions in place of sampled ones, the same however many processes there are."""

    def __init__(self, tokenizer, masked=()):
        self.tokenizer, self.masked, self.rows = tokenizer, set(tokenizer.convert_tokens_to_ids(list(masked))), []

    def __call__(self, prompts, trainer):
        first = trainer.accelerator.process_index * len(prompts) + 3 * trainer.state.global_step
        texts = [TEXTS[(first + i) % len(TEXTS)] for i in range(len(prompts))]
        rows = {"prompt_ids": self.tokenizer(prompts).input_ids, "completion_ids": self.tokenizer(texts).input_ids}
        if self.masked:
            rows["env_mask"] = [[int(i not in self.masked) for i in ids] for ids in rows["completion_ids"]]
        self.rows.append(rows)
        return rows | {"logprobs": None}


def make_config(output_dir, config_class=BlockwiseGRPOConfig, **kwargs):
    arguments = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 24,
        "max_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if config_class is BlockwiseGRPOConfig:
        arguments["charge_missing"] = False  # the paper's setting
    return config_class(str(output_dir), **(arguments | kwargs))


def make_trainer(
    output_dir, blocks=None, model=None, tokenizer=None, train=None, masked=(), sampled=False, callbacks=(), extra=None,
    **config
):  # fmt: skip
    """A trainer of a small random Llama; `trainer.watch` keeps gradients, `trainer.rollout` completions."""
    tokenizer = tokenizer or text_models.word_level()
    watch, rollout = Watch(), Rollout(tokenizer, masked)
    trainer = BlockwiseGRPOTrainer(
        text_models.llama(tokenizer) if model is None else model,
        make_blocks() if blocks is None else blocks,
        make_config(output_dir, **config),
        train_dataset=prompts() if train is None else train,
        processing_class=tokenizer,
        rollout_func=None if sampled else rollout,
        callbacks=[watch, *callbacks],
        **(extra or {}),
    )
    trainer.watch, trainer.rollout = watch, rollout
    return trainer


def model_before(trainer, update):
    """The model as it was before an update."""
    model = text_models.llama(trainer.processing_class)
    model.load_state_dict(trainer.watch.weights[update])
    return model


def weights(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def run(spec):
    spec = dict(spec)
    resume = spec.pop("resume", None)
    trainer = make_trainer(**spec)
    trainer.train(resume_from_checkpoint=resume)
    return {"weights": weights(trainer), "gradients": trainer.watch.gradients, "log": trainer.state.log_history}


if __name__ == "__main__":
    two_processes.main(run)

"""GRPO with one advantage for each block of a completion."""

import textwrap
from collections import Counter
from dataclasses import fields
from functools import partial
from itertools import compress
from typing import Any
from unittest.mock import patch

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather, gather_object
from peft import PeftModel
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.trainer import grpo_trainer
from trl.trainer.utils import get_callable_name, get_config_model_id, is_async_callable, nanstd

from ..blocks import Block, ParsedCompletion, check_blocks, parse_completion
from ..cards import language_card
from ..checkpoints import WholeCheckpoints
from ..console import use_console
from ..credit import block_advantages, charge_missing_blocks, token_advantages
from ..publishing import Publishing
from ..resuming import adapter, as_json, sampled_digest
from .blockwise_grpo_config import BlockwiseGRPOConfig
from .blockwise_log import Watch, print_completions


logger = get_logger(__name__)


class BlockwiseGRPOTrainer(WholeCheckpoints, Publishing, GRPOTrainer):
    r"""
    Trainer for [Blockwise Advantage Estimation](https://huggingface.co/papers/2602.10231). The only change against
    [`~trl.GRPOTrainer`] is that each block of a completion has its own reward and its own advantage, which only its own
    tokens carry:

    $$ \mathcal{L} = -\frac{1}{G} \sum_{i=1}^G \sum_k \frac{w_k}{|T_{i,k}|} \sum_{t \in T_{i,k}}
    \min\big(\rho_{i,t} A_{i,k},\ \operatorname{clip}(\rho_{i,t}, 1 - \varepsilon, 1 + \varepsilon) A_{i,k}\big) $$

    with \\( T_{i,k} \\) the tokens of block \\( k \\) of completion \\( i \\). A missing later block has no tokens, and
    its reward is in no baseline of its own; its `missing_reward` is charged to the block before it, unless
    `charge_missing=False`. Tags in the results of tools do not count.

    Beside TRL's metrics it logs, for each block, `blocks/<name>/found` (share of completions that have it, closed), and of
    the completions that have it (of the first block: of all) `/length` (mean number of tokens) and `/zero_advantage` (share
    that have nothing to learn from). `/reward` is the mean of all, with `missing_reward` for those without it; `reward` is
    the sum of those, and `frac_reward_zero_std` the share of groups in which no block has an advantage. Warnings say, once
    each, if a block is hardly ever written, hardly any completion has an advantage, or format or reward collapse. With
    `log_completions=True` the file of completions has each block's text, reward, outcome and advantage; its column
    `advantage` is the sum over the blocks.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in [`~trl.GRPOTrainer`].
        blocks (`list[Block]`):
            The blocks in their order, with their reward functions.
        args ([`BlockwiseGRPOConfig`], *optional*):
            Arguments. If not set, the defaults.
        environment_block (`str`, *optional*):
            Name of the block to which the reward of the environments (`get_reward`) belongs, for an `environment_factory`
            whose environments have one.
        train_dataset, eval_dataset, kwargs:
            As in [`~trl.GRPOTrainer`], without `reward_funcs`. `reward_processing_classes` follow the reward functions
            of all blocks in their order.

    Raises:
        ValueError: before anything is loaded, if blocks overlap, have no outcome that the baseline needs, or arguments
            do not fit; after it, if an environment has a reward of its own and `environment_block` is not set; in
            training, if a reward is infinite.
        TypeError: if `blocks` or `args` is of another type, or, in training, an outcome is not hashable.

    Example:

    ```python
    from flow_trl import BlockwiseGRPOConfig, BlockwiseGRPOTrainer
    from flow_trl.tasks import confidence_task

    task = confidence_task()
    trainer = BlockwiseGRPOTrainer(
        model="Qwen/Qwen2.5-3B-Instruct",
        blocks=task.blocks,
        args=BlockwiseGRPOConfig("calibrated"),
        train_dataset=task.prepare(dataset),
    )
    trainer.train()
    trainer.push_to_hub()
    ```
    """

    _tag_names = ["trl", "flow-trl", "blockwise-grpo"]
    _make_card = staticmethod(language_card)
    _name = "Blockwise GRPO"
    _paper = {
        "title": "Blockwise Advantage Estimation for Multi-Objective RL with Verifiable Rewards",
        "id": "2602.10231",
        "citation": textwrap.dedent("""\
            @article{pavlenko2026blockwise,
                title  = {{Blockwise Advantage Estimation for Multi-Objective RL with Verifiable Rewards}},
                author = {Kirill Pavlenko and Alexander Golubev and Simon Karasik and Boris Yangel},
                year   = 2026,
                eprint = {arXiv:2602.10231},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | Any",
        blocks: list[Block],
        args: BlockwiseGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        environment_block: str | None = None,
        **kwargs: Any,
    ):
        self.blocks = check_blocks(blocks)
        if "reward_funcs" in kwargs:
            raise ValueError("`reward_funcs`: give each `Block` its own reward functions instead.")
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = BlockwiseGRPOConfig(f"{name.split('/')[-1]}-Blockwise-GRPO")
        if not isinstance(args, BlockwiseGRPOConfig):
            raise TypeError(f"`args` is a `{type(args).__name__}`: pass a `BlockwiseGRPOConfig`.")
        self._check_outcomes(args.baseline)
        names = [block.name for block in self.blocks]
        if environment_block is not None and (
            environment_block not in names or kwargs.get("environment_factory") is None
        ):
            raise ValueError(
                f"`environment_block={environment_block!r}`: it must be one of {', '.join(map(repr, names))}, and "
                "`environment_factory` must be set."
            )
        self._block_of_func = [k for k, block in enumerate(self.blocks) for _ in block.reward_funcs]
        funcs = [func for block in self.blocks for func in block.reward_funcs]
        self._check_groups(args, funcs)

        super().__init__(model, funcs, args, train_dataset, eval_dataset, **kwargs)

        self.console = use_console(self)
        environment_rewards = len(self.reward_funcs) - len(self._block_of_func)  # TRL adds to the list it was given
        if environment_rewards and environment_block is None:
            raise ValueError(
                "`environment_factory` makes environments with a `get_reward`, which belongs to no block: name the one "
                f"that it rewards, `environment_block={names[0]!r}` for example."
            )
        if environment_rewards:
            self._block_of_func += [names.index(environment_block)] * environment_rewards
        self._warn_of_special_tags()
        weights = [weight for block in self.blocks for weight in block.reward_weights]
        self.reward_weights = torch.tensor(weights + [1.0] * environment_rewards)
        used = Counter(self.reward_func_names)
        self.reward_func_names = [
            name if used[name] == 1 else f"{self.blocks[k].name}/{name}"
            for name, k in zip(self.reward_func_names, self._block_of_func, strict=True)
        ]

        self._watch = Watch(names, logger.warning)

    def _check_outcomes(self, baseline: str) -> None:
        if self.blocks[0].outcome is not None:
            raise ValueError(
                f"Block {self.blocks[0].name!r} has an `outcome`, but nothing stands before the first block: give it "
                "to the block whose baseline it is for."
            )
        for block in self.blocks[1:]:
            if block.outcome is None and baseline == "outcome":
                raise ValueError(
                    f"Block {block.name!r} has no `outcome`, which `baseline='outcome'` needs: pass a function that "
                    "returns the outcome of what stands before the block, or use `baseline='group'`."
                )
            if block.outcome is not None and is_async_callable(block.outcome):
                raise ValueError(f"Block {block.name!r}: `outcome` must not be an async function.")

    @staticmethod
    def _check_groups(args: BlockwiseGRPOConfig, funcs: list[Any]) -> None:
        size = args.per_device_train_batch_size * args.steps_per_generation
        if args.world_size == 1 or size % args.num_generations == 0:
            return
        for func in funcs:
            if getattr(func.func if isinstance(func, partial) else func, "needs_whole_groups", False):
                raise ValueError(
                    f"`{get_callable_name(func)}` compares the completions of a prompt, but with `per_device_train_batch_size * "
                    f"steps_per_generation = {size}` and `num_generations={args.num_generations}` a process has only a "
                    "part of a group: make the first a multiple of the second."
                )

    def _warn_of_special_tags(self) -> None:
        special = {str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        for block in self.blocks:
            if any(f"<{slash}{tag}>" in special for tag in block.tags or () for slash in ("", "/")):
                logger.warning(
                    f"Tags of block {block.name!r} are special tokens. The block is found, but the completions that "
                    "reward functions get have no special tokens: let them use `block_texts`, or add the tags to the "
                    "tokenizer as ordinary tokens."
                )

    def _known(self) -> dict[str, Any]:
        model = self.model
        lora = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
        settings = [field.name for field in fields(Block) if field.compare and field.name != "reward_funcs"]
        blocks = [{name: getattr(block, name) for name in settings} for block in self.blocks]
        return super()._known() | adapter(lora) | {
            "model": model.config._name_or_path,
            "base_weights": sampled_digest(weight for weight in model.parameters() if not weight.requires_grad),
            "reward_funcs": self.reward_func_names,
            "blocks": as_json([*blocks, self._block_of_func]),
        }  # fmt: skip

    @property
    def _updates_per_generation(self) -> int:
        return max(1, self.args.steps_per_generation * self.num_iterations // self.args.gradient_accumulation_steps)

    def _get_train_sampler(self, dataset=None):
        self._prompt_order = super()._get_train_sampler(dataset)
        return self._prompt_order

    def _run_epoch(self, *, epoch, epochs_trained, **kwargs) -> None:
        if epoch == epochs_trained and self.args.shuffle_dataset:  # orders of the epochs before a run goes on
            for _ in range(epoch):
                torch.randperm(self._prompt_order.num_samples, generator=self._prompt_order.generator)
        super()._run_epoch(epoch=epoch, epochs_trained=epochs_trained, **kwargs)

    def _generate(self, prompts):
        output = super()._generate(prompts)
        self._own_tokens = output[2]
        return output

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        own_tokens = self._own_tokens or [[1] * len(ids) for ids in completion_ids_list]
        parsed = [
            parse_completion(ids, self.blocks, self._tokenizer, own)
            for ids, own in zip(completion_ids_list, own_tokens, strict=True)
        ]
        completions = [
            completion if all(own) or not isinstance(completion, str) else self._decode_own(ids, own)
            for completion, ids, own in zip(completions, completion_ids_list, own_tokens, strict=True)
        ]
        names = [block.name for block in self.blocks]
        inputs = [
            {**row, "block_texts": dict(zip(names, completion.texts, strict=True))}
            for row, completion in zip(inputs, parsed, strict=True)
        ]
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._require_finite(rewards_per_func)
        outcomes = self._calculate_outcomes(inputs, prompts, completions, completion_ids_list)

        lengths, present, found = self._block_statistics(parsed, own_tokens)
        rewards_per_func[~present[:, self._block_of_func]] = torch.nan

        weighted = rewards_per_func * self.reward_weights.to(rewards_per_func.device)
        rewards = torch.stack([self._sum(weighted[:, self._columns(k)]) for k in range(len(names))], dim=1)
        missing_rewards = rewards.new_tensor([block.missing_reward for block in self.blocks])
        logged_rewards = rewards.where(present, missing_rewards)
        mode = "train" if self.model.training else "eval"
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        advantages = block_advantages(
            charge_missing_blocks(rewards, present, missing_rewards) if self.args.charge_missing else rewards,
            outcomes,
            num_generations,
            baseline=self.args.baseline,
            min_stratum_size=self.args.min_stratum_size,
            shrinkage=self.args.shrinkage,
            leave_one_out=self.args.leave_one_out,
            scale_rewards=self.args.scale_rewards,
        ) * rewards.new_tensor([block.weight for block in self.blocks])
        first = self.accelerator.process_index * len(prompts)
        local = slice(first, first + len(prompts))
        self._credit = parsed, advantages, local, self._sum(logged_rewards), num_generations

        for k, block in enumerate(self.blocks):
            metrics = {
                "found": found[:, k].mean(),
                "reward": logged_rewards[:, k].nanmean(),
                "length": lengths[present[:, k], k].mean(),
                "zero_advantage": (advantages[present[:, k], k].abs() < 1e-6).float().mean(),
            }
            for name, value in metrics.items():
                self._metrics[mode][f"blocks/{block.name}/{name}"].append(value.item())
            if self.log_completions:
                self._log_completion_extra(f"{block.name}/text", [completion.texts[k] for completion in parsed])
                self._log_completion_extra(f"{block.name}/reward", rewards[local, k].tolist())
                if outcomes[k] is not None:
                    self._log_completion_extra(f"{block.name}/outcome", [str(value) for value in outcomes[k][local]])
                self._log_completion_extra(f"{block.name}/advantage", advantages[local, k].tolist())
        if mode == "train":
            learning = (advantages.abs() > 1e-6).any(dim=1).float().mean().item()
            self._watch.update(found.mean(dim=0).tolist(), learning, rewards[:, 0].nanmean().item())
        return rewards_per_func

    def _block_statistics(
        self, parsed: list[ParsedCompletion], own_tokens: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each block of all completions, (N, n_blocks): how many tokens are its own, is it there, and is it closed."""
        owners = [
            completion.block_index if all(own) else list(compress(completion.block_index, own))
            for completion, own in zip(parsed, own_tokens, strict=True)
        ]
        lengths = [[owner.count(k) for k in range(len(self.blocks))] for owner in owners]
        present = [[text is not None for text in completion.texts] for completion in parsed]
        found = [list(map(Block.is_complete, self.blocks, completion.texts)) for completion in parsed]
        statistics = torch.tensor([lengths, present, found], device=self.accelerator.device).transpose(0, 1)
        lengths, present, found = gather(statistics).unbind(dim=1)
        present[:, 0] = 1  # the first block holds whatever is in no other
        return lengths.float(), present.bool(), found.float()

    def _decode_own(self, ids: list[int], own: list[int]) -> str:
        """What the model itself wrote, as the reward functions get it."""
        return self._tokenizer.decode(
            [token for token, mine in zip(ids, own, strict=True) if mine], skip_special_tokens=True
        )

    def _require_finite(self, rewards_per_func: torch.Tensor) -> None:
        for name, column in zip(self.reward_func_names, rewards_per_func.T, strict=True):
            if column.isinf().any():
                raise ValueError(
                    f"The reward function '{name}' returned an infinite reward, which would destroy the weights: return "
                    "a finite number, or `None` where it does not apply."
                )

    def _columns(self, k: int) -> list[int]:
        return [column for column, block in enumerate(self._block_of_func) if block == k]

    @staticmethod
    def _sum(values: torch.Tensor) -> torch.Tensor:
        """Sum of each row, leaving out NaN; NaN where there is nothing else."""
        return values.nansum(dim=1).masked_fill(values.isnan().all(dim=1), torch.nan)

    def _calculate_outcomes(self, inputs, prompts, completions, completion_ids_list) -> list[list | None]:
        """For each block, the outcomes before it of all processes' completions, or `None` if they are not needed."""
        columns = {key: [row[key] for row in inputs] for key in inputs[0] if key not in ("prompt", "completion")}
        columns |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids_list}
        columns["trainer_state"] = self.state
        # A reward function as outcome has logged its values already.
        columns["log_extra"] = columns["log_metric"] = lambda name, values: None
        if self.environments is not None:
            columns["environments"] = self.environments
        outcomes: list[list | None] = [None]
        for block in self.blocks[1:]:
            if self.args.baseline != "outcome":
                outcomes.append(None)
                continue
            values = list(block.outcome(**columns))
            name = f"the outcome function `{get_callable_name(block.outcome)}` of block {block.name!r}"
            if len(values) != len(prompts):
                raise ValueError(f"{name} returned {len(values)} values for {len(prompts)} completions.")
            for value in values:
                try:
                    hash(value)
                except TypeError as error:
                    raise TypeError(
                        f"{name} returned {value!r}, which is not hashable: return a bool, a number, a string or a "
                        "tuple."
                    ) from error
            outcomes.append(gather_object(values))
        return outcomes

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        parsed, advantages, local, rewards, num_generations = self._credit
        ids = output["completion_ids"]
        padding = [0] * ids.shape[1]
        rows = [(completion.block_index + padding)[: ids.shape[1]] for completion in parsed]
        output["advantages"] = advantages[local]
        output["block_index"] = torch.tensor(rows, device=ids.device)
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.sum(dim=1).tolist())
        if len(self.blocks) > 1:  # TRL's own leave missing blocks out, and know nothing of strata
            silent = (advantages.abs() < 1e-6).all(dim=1).view(-1, num_generations).all(dim=1)
            metrics = self._metrics["train" if self.model.training else "eval"]
            metrics["reward"][-1] = rewards.nanmean().item()
            metrics["reward_std"][-1] = nanstd(rewards).item()
            metrics["frac_reward_zero_std"][-1] = silent.float().mean().item()
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        blocks = {block.name: block.missing_reward for block in self.blocks}
        with patch.object(grpo_trainer, "print_prompt_completions_sample", partial(print_completions, blocks=blocks)):
            super().log(logs, start_time)

    def _compute_loss(self, model, inputs):
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        advantages = token_advantages(
            inputs["advantages"], inputs["block_index"], mask, scale=self._loss_divisor(mask, inputs)
        )
        return super()._compute_loss(model, {**inputs, "advantages": advantages})

    def _loss_divisor(self, mask: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor | float:
        """What the loss divides the sum over a completion's tokens by, up to the mean over completions."""
        if self.loss_type in ("grpo", "sapo"):
            return mask.sum(dim=1, keepdim=True).float()
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1.0) / len(mask)
        if self.loss_type == "dr_grpo":
            return float(self.max_completion_length)
        # "dapo", "cispo" and "vespo" divide by the tokens of the generation's share of this process and step.
        shares = self.accelerator.num_processes * (self.args.steps_per_generation if self.model.training else 1)
        return inputs["num_items_in_batch"].clamp(min=1.0) / shares / len(mask)

"""What all trainers of diffusers pipelines share: generations, rewards, micro-batches, evaluation, saving."""

import asyncio
import copy
import hashlib
import inspect
import math
import numbers
import os
import shutil
import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl.trainer.utils import disable_dropout_in_model

from .. import __version__
from ..callbacks import EMACallback, log_image, save_image_grid
from ..policy import Conditioning, PipelinePolicy, Schedule
from ..rewards import BUILT_IN_REWARDS, get_reward_func, reward_name
from ..rollout import Trajectory, euler_step, rollout
from ..tiny import DIFFUSION_FOLDER, FLOW_FOLDER
from ..transitions import Transition, kl_divergence
from .diffusion_config import DiffusionConfig


RewardFunc = str | Callable[..., list[float | None]]


def sample_generator(*key: Any) -> torch.Generator:
    """A generator on the CPU whose numbers depend on `key` alone, not on processes, batches or earlier draws."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass
class Generation:
    """
    This process's share of one round of sampling: n images with K trained steps, in U updates.

    Args:
        rows (`torch.Tensor` of shape `(n,)`): row of each image's prompt in the data set.
        latents (`torch.Tensor` of shape `(n, K + 1, ...)`): as in [`~flow_trl.rollout.Trajectory`].
        log_probs (`torch.Tensor` of shape `(n, K)`): as in [`~flow_trl.rollout.Trajectory`].
        advantages (`torch.Tensor` of shape `(n, K)`): advantage of each step.
        weights (`torch.Tensor` of shape `(n,)`): weight of each image in its update's loss, 0 if it is skipped.
        order (`torch.Tensor` of shape `(U, n / U)`): images of each update; skipped ones (of groups in which every
            advantage is 0) come first.
        skipped (`torch.Tensor` of shape `(U,)`): leading images of each update that no process needs to evaluate.
        timesteps, sigmas (`torch.Tensor`): the schedule.
        first_step (`torch.Tensor` of shape `()`): index of the first trained step.
    """

    rows: torch.Tensor
    latents: torch.Tensor
    log_probs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    order: torch.Tensor
    skipped: torch.Tensor
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    first_step: torch.Tensor

    def save(self, path: str) -> None:
        save_file({name: tensor.contiguous().cpu() for name, tensor in vars(self).items()}, path)

    @classmethod
    def load(cls, path: str, device: torch.device) -> "Generation":
        tensors = {name: tensor.to(device) for name, tensor in load_file(path).items()}
        return cls(**(tensors | {"sigmas": tensors["sigmas"].cpu()}))


class DiffusionTrainer(Trainer):
    """
    Shared parent of the trainers of diffusers pipelines; not used by itself.

    Data flows one way: rows of the data set, prompts, rollout, rewards, credit, advantages of shape `(N, K)`, replayed
    transitions, clipped loss. A subclass says what a stochastic step is (`_transition`), which steps are stochastic
    (`_stochastic_steps`) and what each step earned (`_advantages`).

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            Hub id or folder of a pipeline, or a loaded pipeline. Its `transformer` or `unet` is trained.
        reward_funcs (`str`, `Callable` or a list of them):
            Reward functions, see [`flow_trl.rewards`]. A string names a built-in one.
        args ([`DiffusionConfig`]):
            Arguments of the trainer.
        train_dataset ([`~datasets.Dataset`], *optional*):
            Data set with a column `prompt`; every other column reaches the reward functions by its name.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Held-out prompts, with the same columns.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning-rate scheduler, as in [`~transformers.Trainer`].
        peft_config ([`~peft.LoraConfig`], *optional*):
            LoRA to train. If not set, the adapter that the pipeline already has, or else all weights of the denoiser.

    Raises:
        TypeError, ValueError: for arguments that cannot work, before anything is sampled.
    """

    _name: str
    _paper: dict[str, str]
    _config_class: type[DiffusionConfig] = DiffusionConfig
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: str | DiffusionPipeline,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: DiffusionConfig,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ):
        if not isinstance(args, self._config_class):
            raise TypeError(f"`args` must be a {self._config_class.__name__}, not {type(args).__name__} ({args!r}).")
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        if not reward_funcs:
            raise ValueError("`reward_funcs=[]` is empty: pass at least one reward function or name.")
        self.reward_funcs = [get_reward_func(reward) for reward in reward_funcs]
        self.reward_names = [reward_name(reward) for reward in self.reward_funcs]
        if len(set(self.reward_names)) < len(self.reward_names):
            raise ValueError(f"`reward_funcs` have the names {self.reward_names}: give each its own `__name__`.")
        out_of_domain = list(dict.fromkeys(args.out_of_domain_rewards or []))
        trained = [name for name in self.reward_names if name not in out_of_domain]
        if not trained:
            raise ValueError(
                f"`out_of_domain_rewards={out_of_domain}` leaves none of `reward_funcs` to train on: pass one that is not "
                "among them."
            )
        for name in out_of_domain:
            if name not in self.reward_names:
                if name not in BUILT_IN_REWARDS:
                    raise ValueError(
                        f"`out_of_domain_rewards={out_of_domain}` has {name!r}, which is neither a built-in reward "
                        f"({', '.join(BUILT_IN_REWARDS)}) nor among `reward_funcs` ({', '.join(self.reward_names)}): add "
                        "the function to `reward_funcs`."
                    )
                self.reward_funcs.append(get_reward_func(name))
                self.reward_names.append(name)
        weights = [1.0] * len(trained) if args.reward_weights is None else args.reward_weights
        if len(weights) != len(trained):
            raise ValueError(
                f"`reward_weights={weights}` has {len(weights)} entries for the {len(trained)} reward functions "
                f"{trained}: pass one weight for each."
            )
        weight_of = dict(zip(trained, weights, strict=True))
        self.reward_weights = torch.tensor([weight_of.get(name, 0.0) for name in self.reward_names])
        self._in_domain = [f for f, name in enumerate(self.reward_names) if name in weight_of]

        prompts_per_generation = args.generation_batch_size // args.num_generations
        for name, dataset in {
            "train_dataset": train_dataset,
            **({f"eval_dataset[{key!r}]": value for key, value in eval_dataset.items()}
               if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}),
        }.items():  # fmt: skip
            if dataset is not None:
                self._check_dataset(name, dataset)
        if train_dataset is not None and len(train_dataset) < prompts_per_generation:
            raise ValueError(
                f"`train_dataset` has {len(train_dataset)} prompts, but a generation needs {prompts_per_generation} = "
                f"`generation_batch_size={args.generation_batch_size}` / `num_generations={args.num_generations}`: "
                "make the generation smaller or add prompts."
            )
        self._generations_per_epoch = len(train_dataset) // prompts_per_generation if train_dataset is not None else 0

        if not isinstance(model, str | DiffusionPipeline):
            raise TypeError(
                f"`model` is a {type(model).__name__}: pass a Hub id, a folder or a diffusers pipeline (the whole "
                "pipeline, not its denoiser)."
            )
        if not isinstance(peft_config, LoraConfig | None):
            raise TypeError(f"`peft_config={peft_config!r}` is a {type(peft_config).__name__}: pass a `LoraConfig`.")
        self.model_name = str(model if isinstance(model, str) else model.name_or_path or type(model).__name__)
        if isinstance(model, str):
            init_kwargs = {"dtype": torch.bfloat16 if args.bf16 and peft_config else torch.float32}
            init_kwargs |= args.model_init_kwargs or {}
            if isinstance(init_kwargs["dtype"], str):  # from the command line
                init_kwargs["dtype"] = getattr(torch, init_kwargs["dtype"])
            components = DiffusionPipeline.load_config(model) if os.path.isdir(model) else {}
            absent = {name: None for name, value in components.items() if value == [None, None]}  # saved without them
            model = DiffusionPipeline.from_pretrained(model, **(absent | init_kwargs))
        self._check_pipeline(model)
        self.pipe = model
        options = {"negative_prompt": args.negative_prompt, **(args.pipeline_kwargs or {})}
        self.policy = PipelinePolicy(model, guidance_scale=args.guidance_scale, **options)
        eval_guidance = args.guidance_scale if args.eval_guidance_scale is None else args.eval_guidance_scale
        self.eval_policy = PipelinePolicy(model, guidance_scale=eval_guidance, **options)

        denoiser = self.policy.denoiser
        for component in model.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False)
        adapted = bool(getattr(denoiser, "peft_config", None))
        set_seed(args.seed)  # the adapter's weights are drawn before `Trainer` does this
        if peft_config is not None:
            if adapted:
                raise ValueError(
                    f"`peft_config` was given, but the pipeline already has the adapters {list(denoiser.peft_config)}: "
                    "leave `peft_config` out to train on, or call `pipe.fuse_lora()` and `pipe.unload_lora_weights()`."
                )
            try:
                denoiser.add_adapter(peft_config)
            except ValueError as error:
                denoiser._hf_peft_config_loaded = False  # or diffusers refuses a corrected one on this pipeline
                raise ValueError(f"`peft_config` does not fit {type(denoiser).__name__}: {error}") from error
        elif adapted:
            denoiser.set_adapter(denoiser.active_adapters())
        else:
            denoiser.requires_grad_(True)
        self.is_lora = adapted or peft_config is not None
        if args.bf16 or args.fp16:
            cast_training_params(denoiser, dtype=torch.float32)
        disable_dropout_in_model(denoiser)
        if args.activation_checkpointing:
            denoiser.activation_checkpointing_enable = lambda **kwargs: denoiser.enable_gradient_checkpointing()

        super().__init__(
            model=denoiser,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled and not self.is_lora:
            raise ValueError(
                "`peft_config=None` trains all weights, which does not work with FSDP: pass a `LoraConfig`, or use DDP."
            )
        processes = self.accelerator.num_processes
        images = args.per_device_train_batch_size * processes * args.updates_per_generation
        steps = args.num_trained_steps // args.num_sweeps
        if args.gradient_accumulation_steps * images != args.generation_batch_size * steps:
            raise ValueError(
                f"`args.gradient_accumulation_steps={args.gradient_accumulation_steps}` does not fit {processes} processes "
                f"and `args.generation_batch_size={args.generation_batch_size}`: make `args` in the process that trains, "
                "and do not change its batch sizes afterwards."
            )
        for component in model.components.values():
            if isinstance(component, torch.nn.Module) and component is not denoiser:
                component.to(self.accelerator.device)
        self._trained = {name: weight for name, weight in denoiser.named_parameters() if weight.requires_grad}
        self.ema = None
        if args.ema_decay:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    f"`ema_decay={args.ema_decay}` does not work with FSDP or DeepSpeed: set `ema_decay=0`."
                )
            self.ema = EMACallback(self._trained, args.ema_decay, args.ema_update_steps)
            self.add_callback(self.ema)
        self._reference_policy = self._make_reference_policy(options)
        self._generation: Generation | None = None
        self._conditioning: Conditioning | None = None
        self._resumed_from: str | None = None
        self._save_samples_next: tuple[list, str] | None = None
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._totals = {"total_nfe": 0, "total_reward_calls": 0}

    # What a subclass adds

    def _check_pipeline(self, pipe: DiffusionPipeline) -> None:
        """Raises if this method cannot train the pipeline."""

    @abstractmethod
    def _transition(
        self, output: torch.Tensor, sample: torch.Tensor, step: int, schedule: Schedule, **kwargs
    ) -> Transition:
        """One stochastic step from `sample` (N, ...), with `noise` or to `next_sample` in `kwargs`."""

    @abstractmethod
    def _stochastic_steps(self, step: int) -> range:
        """Indices of the K stochastic steps of the generation at update `step`."""

    @abstractmethod
    def _advantages(self, rewards: torch.Tensor, rows: list[int], trajectory: Trajectory) -> torch.Tensor:
        """
        Advantages (N, K) from the rewards of all processes, (N, K + 1) with completions and else (N, 1), the rows of all
        N prompts, and the trajectories of this process.
        """

    _needs_completions = False
    _completion_stride = 1
    _kl_in_loss = True
    _ode_step = staticmethod(euler_step)

    def _trained_steps(self, images: torch.Tensor, sweep: int) -> list[int]:
        """Stochastic steps (0 to K - 1) at which the images of a micro-batch are trained in a sweep."""
        return list(range(self.args.num_trained_steps))

    def _save_credit(self, folder: str) -> None:
        """Adds to a checkpoint what credit assignment keeps from one generation to the next."""

    def _load_credit(self, folder: str) -> None:
        """Reads what `_save_credit` wrote."""

    # Rollout and rewards

    @property
    def _updates_per_generation(self) -> int:
        return self.args.updates_per_generation * self.args.num_sweeps * self.args.num_iterations

    def _rows(self, step: int) -> list[int]:
        """Rows of the data set for the generation at update `step`, of all processes."""
        epoch, index = divmod(step // self._updates_per_generation, self._generations_per_epoch)
        rows = torch.arange(len(self.train_dataset))
        if self.args.shuffle_dataset:
            rows = torch.randperm(len(rows), generator=sample_generator(self.args.seed, "epoch", epoch))
        prompts = self.args.generation_batch_size // self.args.num_generations
        rows = rows[index * prompts : (index + 1) * prompts].repeat_interleave(self.args.num_generations)
        return rows.tolist()

    def _encode(self, rows: list[int]) -> tuple[Conditioning, list[int]]:
        """Conditioning of the distinct prompts of `rows`, and each row's index in it."""
        distinct = {row: index for index, row in enumerate(dict.fromkeys(rows))}
        return self.policy.encode(self.train_dataset[list(distinct)]["prompt"]), [distinct[row] for row in rows]

    def _progress(self, total: int, description: str) -> tqdm:
        disabled = self.args.disable_tqdm or not self.is_local_process_zero()
        return tqdm(total=total, desc=description, leave=False, disable=disabled)

    def _decode(
        self, policy: PipelinePolicy, latents: torch.Tensor, conditioning: Conditioning, index: list[int], size: int
    ):
        rows = torch.as_tensor(index).split(size)
        parts = zip(latents.split(size), rows, strict=True)
        return [image for part, row in parts for image in policy.decode(part, conditioning[row])]

    def _score(self, images: list, examples: dict[str, list], asked: list[int]) -> torch.Tensor:
        """Scores (n, F) of images; NaN where a function does not apply or is not asked."""
        prompts = examples["prompt"]
        columns = {name: values for name, values in examples.items() if name != "prompt"}
        scores = torch.full((len(images), len(self.reward_funcs)), float("nan"))

        @contextmanager
        def named(f):
            try:
                yield
            except Exception as error:
                error.add_note(
                    f"Raised by the reward function `{self.reward_names[f]}` for {len(images)} images, the first of them "
                    f"with the prompt {prompts[0]!r}."
                )
                raise

        async def finish(f, pending):
            with named(f):
                return await pending

        async def gather(pending):
            return await asyncio.gather(*(finish(f, result) for f, result in pending.items()))

        results = {}
        for f in asked:
            with named(f):
                results[f] = self.reward_funcs[f](prompts=prompts, images=images, **columns)
        pending = {f: result for f, result in results.items() if inspect.isawaitable(result)}
        if pending:  # in a thread of its own, since notebooks have a running loop
            with ThreadPoolExecutor(1) as executor:
                finished = executor.submit(asyncio.run, gather(pending)).result()
            results |= zip(pending, finished, strict=True)
        for f, result in results.items():
            scores[:, f] = torch.tensor(self._checked_scores(self.reward_names[f], result, prompts))
        return scores

    @staticmethod
    def _checked_scores(name: str, result: Any, prompts: list[str]) -> list[float]:
        try:
            if isinstance(result, str | dict):
                raise TypeError
            result = list(result)
        except TypeError:
            raise TypeError(
                f"Reward function `{name}` returned {result!r}, a {type(result).__name__}: it must return a list with "
                f"one score for each of the {len(prompts)} images."
            ) from None
        if len(result) != len(prompts):
            raise ValueError(
                f"Reward function `{name}` returned {len(result)} scores for {len(prompts)} images: it must return one "
                "for each image (`None` where it does not apply)."
            )
        scores = []
        for index, (score, prompt) in enumerate(zip(result, prompts, strict=True)):
            if isinstance(score, torch.Tensor) and score.numel() == 1:
                score = score.item()
            if score is not None and not isinstance(score, numbers.Real):
                raise TypeError(
                    f"Reward function `{name}` returned {score!r}, a {type(score).__name__}, for image {index} "
                    f"(prompt {prompt!r}): a score is a number, or `None` where the function does not apply."
                )
            if score is not None and not math.isfinite(score):
                raise ValueError(
                    f"Reward function `{name}` returned {score} for image {index} (prompt {prompt!r}): a score must be "
                    "finite; return `None` where the function does not apply."
                )
            scores.append(float("nan") if score is None else float(score))
        return scores

    def _generate(self, step: int) -> None:
        """Samples and scores a generation, and sets what the updates need of it."""
        self._generation = None  # its memory is needed
        args, rank = self.args, self.accelerator.process_index
        all_rows = self._rows(step)
        size = len(all_rows) // self.accelerator.num_processes
        rows = all_rows[rank * size : (rank + 1) * size]
        steps = self._stochastic_steps(step)
        index = [rank * len(rows) + i for i in range(len(rows))]
        generators = [
            sample_generator(args.seed, step, row, j % args.num_generations)
            for row, j in zip(rows, index, strict=True)
        ]
        examples = self.train_dataset[rows]
        started, evaluations = time.perf_counter(), self.policy.evaluations
        conditioning, prompt_index = self._encode(rows)
        with self._progress(args.num_inference_steps, "Sampling") as bar:
            trajectory = rollout(
                self.policy,
                conditioning,
                prompt_index,
                generators,
                num_inference_steps=args.num_inference_steps,
                transition=self._transition,
                ode_step=self._ode_step,
                steps=steps,
                completions=self._needs_completions,
                completion_stride=self._completion_stride,
                batch_size=args.per_device_rollout_batch_size,
                callback=lambda _: bar.update(),
            )
        evaluations = self.policy.evaluations - evaluations
        images = self._decode(
            self.policy,
            trajectory.finals.flatten(0, 1),
            conditioning,
            prompt_index * len(trajectory.finals),
            args.per_device_rollout_batch_size,
        )
        sampled = time.perf_counter()
        images = [images[first : first + len(rows)] for first in range(0, len(images), len(rows))]
        trained = self.reward_weights.nonzero().flatten().tolist()
        scores = [self._score(part, examples, trained) for part in images[:-1]]
        scores.append(self._score(images[-1], examples, self._in_domain))
        rewarded = time.perf_counter()
        scores = self.accelerator.gather(torch.stack(scores, dim=1).to(self.accelerator.device)).cpu()  # (N, K + 1, F)
        rewards = self._weighted(scores)
        self._conditioning, self._prompt_index = conditioning, prompt_index
        advantages = self._advantages(rewards, all_rows, trajectory).clamp(-args.adv_clip_max, args.adv_clip_max)

        # An update's images are the same whatever the number of processes
        updates = args.updates_per_generation
        groups = advantages.view(-1, args.num_generations * advantages.shape[1])
        active = (groups != 0).any(dim=1).repeat_interleave(args.num_generations)
        update_of = torch.arange(len(advantages)) % updates
        weights = torch.zeros(len(advantages))
        order, skipped = [], []
        for update in range(updates):
            members = (update_of == update).view(-1, size)  # (processes, n)
            taken = (update_of == update) & active
            weights[taken] = (update_of == update).sum() / taken.sum().clamp(min=1)
            inactive = (members & ~active.view(-1, size)).sum(dim=1).min().item()
            skipped.append(inactive)
            mine = members[rank].nonzero().flatten()
            order.append(mine[active[rank * size :][mine].argsort(stable=True)])
        local = slice(rank * size, (rank + 1) * size)
        device = self.accelerator.device
        schedule = trajectory.schedule
        self._generation = Generation(
            rows=torch.tensor(rows),
            latents=trajectory.latents,
            log_probs=trajectory.log_probs,
            advantages=advantages[local].to(device),
            weights=weights[local].to(device),
            order=torch.stack(order),
            skipped=torch.tensor(skipped),
            timesteps=schedule.timesteps,
            sigmas=torch.empty(0) if schedule.sigmas is None else schedule.sigmas,
            first_step=torch.tensor(steps.start),
        )

        groups = rewards[:, -1].view(-1, args.num_generations)
        self._record(
            {
                "reward": rewards[:, -1].mean().item(),
                "reward_std": groups.std(dim=1).mean().item(),
                "frac_reward_zero_std": (groups == groups[:, :1]).all(dim=1).float().mean().item(),
                "nfe": evaluations / size,
                "reward_calls": len(trajectory.finals),
                "time/rollout": sampled - started,
                "time/reward": rewarded - sampled,
            }
            | self._score_metrics(scores[:, -1])
        )
        self._totals["total_nfe"] += round(self._metrics["nfe"][-1] * args.generation_batch_size)
        self._totals["total_reward_calls"] += len(trajectory.finals) * args.generation_batch_size
        self._save_samples_next = (images[-1], "train") if args.log_completions else None

    def _weighted(self, scores: torch.Tensor) -> torch.Tensor:
        """Rewards (...) from scores (..., F): the weighted sum over the functions that are trained and apply."""
        return (scores * self.reward_weights)[..., self.reward_weights != 0].nansum(dim=-1)

    def _score_metrics(self, scores: torch.Tensor) -> dict[str, float]:
        metrics = {}
        for name, values in zip(self.reward_names, scores.T, strict=True):
            values = values[~values.isnan()]
            if len(values):
                metrics[f"rewards/{name}/mean"] = values.mean().item()
                metrics[f"rewards/{name}/std"] = values.std(unbiased=False).item()
        return metrics

    def _record(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[name].append(value)

    # Updates

    def get_train_dataloader(self) -> DataLoader:
        # Only counts the micro-batches of an epoch; which rows a generation takes follows from its number (`_rows`).
        if self.train_dataset is None:
            raise ValueError("`train_dataset=None`: training needs a data set with a column `prompt`.")
        micro_batches = self._updates_per_generation * self.args.gradient_accumulation_steps
        count = self._generations_per_epoch * micro_batches * self.accelerator.num_processes
        return self.accelerator.prepare(DataLoader(range(count), batch_size=1, collate_fn=list))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        position = self.state.global_step % self._updates_per_generation
        if position == 0:
            self._generate(self.state.global_step)
        elif self._generation is None:
            self._resume_generation()
        self._update_started = time.perf_counter()
        return self._micro_batches(position), None

    def _micro_batches(self, position: int) -> list[dict[str, Any]]:
        """The micro-batches of an update, by its number in the generation."""
        generation, size = self._generation, self.args.per_device_train_batch_size
        sweep, update = divmod(position, self.args.updates_per_generation)
        batches = []
        for number, chunk in enumerate(generation.order[update].split(size), 1):
            for k in self._trained_steps(chunk, sweep % self.args.num_sweeps):
                batches.append({"images": chunk, "step": k, "skip": number * size <= generation.skipped[update]})
        batches[-1]["skip"] = False  # gradients are reduced over processes in the last micro-batch
        return batches

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if inputs["skip"]:
            names = ["clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "ratio/max_deviation"]
            self._record(dict.fromkeys(names + ["kl"] * self._has_kl_loss, 0.0))
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        args, generation, images, k = self.args, self._generation, inputs["images"].cpu(), inputs["step"]
        step = int(generation.first_step) + k
        schedule = Schedule(generation.timesteps, generation.sigmas)
        conditioning = self._conditioning[[self._prompt_index[image] for image in images]]
        latents, next_latents = generation.latents[images, k], generation.latents[images, k + 1]
        advantages, weights = generation.advantages[images, k], generation.weights[images]

        kl = torch.zeros_like(advantages)
        if self._has_kl_loss:
            with self._reference():
                output = self._reference_policy.predict(latents, step, conditioning, schedule)
            reference = self._transition(output, latents, step, schedule, next_sample=next_latents)
        self.policy.forward = model
        output = self.policy.predict(latents, step, conditioning, schedule, grad=True)
        transition = self._transition(output, latents, step, schedule, next_sample=next_latents)
        if self._has_kl_loss:
            kl = kl_divergence(transition.mean, reference.mean, transition.noise_std)
        ratio = (transition.log_prob - generation.log_probs[images, k]).exp()
        clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped)

        # Weighted, the means over micro-batches and processes are those over the images that are not skipped
        ratio = ratio.detach()
        low = (weights * ((ratio < 1 - args.epsilon) & (advantages < 0))).mean().item()
        high = (weights * ((ratio > 1 + args.epsilon) & (advantages > 0))).mean().item()
        self._record(
            {
                "clip_ratio/low_mean": low,
                "clip_ratio/high_mean": high,
                "clip_ratio/region_mean": low + high,
                "ratio/max_deviation": ((weights > 0) * (ratio - 1).abs()).max().item(),
            }
        )
        if self._has_kl_loss:
            self._record({"kl": (weights * kl).mean().item()})
        return (weights * (loss + args.beta * kl)).mean()

    @property
    def _has_kl_loss(self) -> bool:
        return self._kl_in_loss and self.args.beta > 0

    def _make_reference_policy(self, options: dict[str, Any]) -> PipelinePolicy | None:
        if not self.args.beta or self.is_lora:
            return self.policy
        pipe = copy.copy(self.pipe)
        pipe.__dict__[self.policy.denoiser_name] = copy.deepcopy(self.policy.denoiser).requires_grad_(False)
        return PipelinePolicy(pipe, guidance_scale=self.args.guidance_scale, **options)

    @contextmanager
    def _reference(self):
        """Within this context `_reference_policy` is the reference."""
        if not self.is_lora:
            yield
            return
        self.policy.denoiser.disable_adapters()
        try:
            yield
        finally:
            self.policy.denoiser.enable_adapters()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._metrics:
            self._record({"time/update": time.perf_counter() - self._update_started})
            reduced = []
            for name, values in sorted(self._metrics.items()):
                values = torch.tensor(values, dtype=torch.float32)
                reduced.append(values.max() if name == "ratio/max_deviation" else values.mean())
            gathered = self.accelerator.gather(torch.stack(reduced).to(self.accelerator.device)).view(-1, len(reduced))
            for name, values in zip(sorted(self._metrics), gathered.T, strict=True):
                logs[name] = (values.max() if name == "ratio/max_deviation" else values.mean()).item()
            logs |= self._totals
            self._metrics.clear()
            if self._save_samples_next is not None:
                self._save_images(*self._save_samples_next)
                self._save_samples_next = None
        super().log(logs, start_time)

    # Evaluation

    @contextmanager
    def _evaluated_weights(self):
        """Within this context the denoiser has the weights that are evaluated and saved."""
        with self.ema.applied() if self.ema is not None else nullcontext():
            yield

    def evaluate(
        self,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Samples one image per prompt, deterministically (by the ODE of a flow model, by DDIM with `eta` of 0), with
        `eval_num_inference_steps`, `eval_guidance_scale`, the averaged weights and noise that depends on the prompt's row
        alone (the same in every evaluation of every run), and scores it.

        Args:
            eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
                Prompts; defaults to the trainer's `eval_dataset`.
            ignore_keys (`list[str]`, *optional*):
                Not used.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Prefix of the metrics.

        Returns:
            `dict[str, float]`: `eval_reward`, its standard error `eval_reward_se`, and `eval_rewards/<name>/mean`,
            `/std` and `/se` of each reward function.

        Raises:
            ValueError: if there is no data set.
        """
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict):
            metrics = {}
            for name, dataset in eval_dataset.items():
                metrics |= self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if eval_dataset is None:
            raise ValueError("`eval_dataset=None`: pass one to `evaluate` or to the trainer.")
        if eval_dataset is not self.eval_dataset:
            self._check_dataset("eval_dataset", eval_dataset)
        args, started = self.args, time.perf_counter()
        processes, rank, size = self.accelerator.num_processes, self.accelerator.process_index, len(eval_dataset)
        share = -(-size // processes)
        rows = [min(row, size - 1) for row in range(rank * share, (rank + 1) * share)]
        scores, shown = [], []
        with self._evaluated_weights(), self._progress(len(rows), "Evaluating") as bar:
            for chunk in torch.tensor(rows).split(args.per_device_eval_batch_size):
                examples = eval_dataset[chunk.tolist()]
                conditioning, index = self.eval_policy.encode(examples["prompt"]), list(range(len(chunk)))
                generators = [sample_generator("eval", row) for row in chunk.tolist()]
                trajectory = rollout(
                    self.eval_policy,
                    conditioning,
                    index,
                    generators,
                    num_inference_steps=args.eval_num_inference_steps,
                    ode_step=self._ode_step,
                )
                images = self._decode(self.eval_policy, trajectory.finals[-1], conditioning, index, len(chunk))
                scores.append(self._score(images, examples, list(range(len(self.reward_funcs)))))
                shown += images[: args.num_images_to_save - len(shown)]
                bar.update(len(chunk))
        scores = self.accelerator.gather(torch.cat(scores).to(self.accelerator.device)).cpu()
        scores = scores[:size]  # the last row is repeated so that all processes have as many
        rewards = self._weighted(scores)
        metrics = {"reward": rewards.mean().item(), "reward_se": rewards.std(unbiased=False).item() / size**0.5}
        metrics |= self._score_metrics(scores)
        for name, values in zip(self.reward_names, scores.T, strict=True):
            if f"rewards/{name}/std" in metrics:
                metrics[f"rewards/{name}/se"] = metrics[f"rewards/{name}/std"] / (~values.isnan()).sum().item() ** 0.5
        metrics["runtime"] = time.perf_counter() - started
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        self._save_images(shown, metric_key_prefix)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_images(self, images: list, name: str) -> None:
        if not self.is_world_process_zero() or not images or not self.args.num_images_to_save:
            return
        images = images[: self.args.num_images_to_save]
        step = self.state.global_step
        path = Path(self.args.output_dir) / "images" / f"{name}-{step:06d}.png"
        grid = save_image_grid(images, columns=min(8, len(images)), path=path)
        log_image(grid, f"images/{name}", step, self.args.report_to, self.callback_handler.callbacks)

    # Saving and resuming

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        denoiser, name = self.policy.denoiser, self.policy.denoiser_name
        os.makedirs(output_dir, exist_ok=True)
        with self._evaluated_weights():
            if self.is_lora:
                adapter = denoiser.active_adapters()[0]
                layers = get_peft_model_state_dict(denoiser, state_dict=state_dict, adapter_name=adapter)
                metadata = {f"{name}_lora_adapter_metadata": denoiser.peft_config[adapter].to_dict()}
                self.pipe.save_lora_weights(output_dir, **{f"{name}_lora_layers": layers}, **metadata)
            elif os.path.basename(output_dir).startswith(PREFIX_CHECKPOINT_DIR):
                denoiser.save_pretrained(os.path.join(output_dir, name))
            else:
                self.pipe.save_pretrained(output_dir)
        if output_dir == self.args.output_dir:
            self.create_model_card()

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, "_saving") if self._saving_checkpoint else folder

    _saving_checkpoint = False

    def _save_checkpoint(self, model, trial) -> None:
        # Written aside and then renamed: whenever the process is killed, every checkpoint-* folder is whole.
        folder = self._get_output_dir(trial)
        aside = os.path.join(folder, "_saving")  # a name that is not pushed to the Hub
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False
        target = os.path.join(aside, name)
        if self.state.global_step % self._updates_per_generation and not self.args.save_only_model:
            self._generation.save(os.path.join(target, f"generation_{self.accelerator.process_index}.safetensors"))
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = os.path.join(folder, name)
        if self.args.should_save:
            self.state.save_to_json(os.path.join(target, "trainer_state.json"))
            if not self.is_fsdp_enabled:
                weights = {name: weight.detach().contiguous().cpu() for name, weight in self._trained.items()}
                totals = {name: str(total) for name, total in self._totals.items()}
                save_file(weights, os.path.join(target, "trained_weights.safetensors"), metadata=totals)
            if self.ema is not None:
                self.ema.save(os.path.join(target, "ema_weights.safetensors"))
        self._save_credit(target)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
            os.replace(target, os.path.join(folder, name))
            os.rmdir(aside)
            rotate_checkpoints(
                output_dir=folder,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self.save_model(_internal_call=True)
            self._push_from_checkpoint(os.path.join(folder, name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving_checkpoint:  # else `_save_checkpoint` does it when the folder has its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self._resumed_from, self._generation = resume_from_checkpoint, None
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        path = os.path.join(resume_from_checkpoint, "trained_weights.safetensors")
        if not os.path.isfile(path):
            raise ValueError(
                f"`resume_from_checkpoint={resume_from_checkpoint!r}` has no file `trained_weights.safetensors`, so it "
                f"is not a checkpoint of {type(self).__name__}: pass a `checkpoint-*` folder of its `output_dir`."
            )
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
            self._totals = {name: int(total) for name, total in file.metadata().items()}
        if weights.keys() != self._trained.keys():
            raise ValueError(
                f"`resume_from_checkpoint={resume_from_checkpoint!r}` has {len(weights)} trained tensors, the model has "
                f"{len(self._trained)} others: use the `peft_config` of the run that wrote it."
            )
        with torch.no_grad():
            for name, weight in self._trained.items():
                weight.copy_(weights[name])
        if self.ema is not None:
            self.ema.load(os.path.join(resume_from_checkpoint, "ema_weights.safetensors"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_credit(checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
        self._load_credit(self.state.best_model_checkpoint)

    def _resume_generation(self) -> None:
        if self._resumed_from is None:
            raise ValueError(
                "`resume_from_checkpoint` was written within a generation, which does not work with DeepSpeed: resume from "
                f"a checkpoint at a multiple of {self._updates_per_generation} updates."
            )
        path = os.path.join(self._resumed_from, f"generation_{self.accelerator.process_index}.safetensors")
        generation = Generation.load(path, self.accelerator.device) if os.path.isfile(path) else None
        size = self.args.generation_batch_size // self.accelerator.num_processes
        if generation is None or len(generation.rows) != size:
            found = "no file" if generation is None else f"{len(generation.rows)} images, not {size}, in"
            raise ValueError(
                f"`resume_from_checkpoint={self._resumed_from!r}` was written within a generation but has {found} "
                f"{os.path.basename(path)}: resume with the number of processes that wrote it, or from a checkpoint at "
                f"a multiple of {self._updates_per_generation} updates."
            )
        self._generation = generation
        self._conditioning, self._prompt_index = self._encode(generation.rows.tolist())

    @property
    def _tiny_loader(self) -> str | None:
        """Function of `flow_trl.tiny` that loads the base model, if it is one of the tiny world."""
        loaders = {FLOW_FOLDER: "load_flow_pipeline", DIFFUSION_FOLDER: "load_diffusion_pipeline"}
        return loaders.get(Path(self.model_name))

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs,
    ) -> None:
        """
        Writes `README.md` into `output_dir`: base model, method, hyperparameters, rewards before and after, sample
        grid, citation.

        Args:
            model_name (`str`, *optional*):
                Name of the model. Defaults to the name of the repository or of `output_dir`.
            dataset_name (`str`, *optional*):
                Hub id of the data set.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        if not self.is_world_process_zero():
            return
        args, output_dir = self.args, Path(self.args.output_dir)
        updates = self.state.global_step
        if args.load_best_model_at_end and self.state.best_global_step and not self.is_in_train:
            updates = self.state.best_global_step
        history = [entry for entry in self.state.log_history if entry["step"] <= updates]
        prefix = "eval_" if any("eval_reward" in entry for entry in history) else ""
        scored = [entry for entry in history if f"{prefix}reward" in entry]
        rewards = []
        for name in ["reward", *(f"rewards/{reward}/mean" for reward in self.reward_names)]:
            values = [entry[prefix + name] for entry in scored if prefix + name in entry]
            if values:
                rewards.append({"name": name, "before": values[0], "after": values[-1]})
        grids = [path for path in (output_dir / "images").glob("*.png") if int(path.stem.split("-")[-1]) <= updates]
        grids = sorted(path for path in grids if path.name.startswith("eval")) or sorted(grids)
        tags = [tags] if isinstance(tags, str) else tags or []
        shown = ["learning_rate", *self._card_arguments]
        card = ModelCard.from_template(
            ModelCardData(
                base_model=self.model_name if "/" in self.model_name and not os.path.isdir(self.model_name) else None,
                library_name="diffusers",
                pipeline_tag="text-to-image",
                datasets=dataset_name,
                tags=[*(["lora"] if self.is_lora else []), "flow-trl", "reinforcement-learning", self._name, *tags],
            ),
            template_str=(files("flow_trl") / "templates" / "diffusion_model_card.md").read_text(),
            model_name=model_name or (args.hub_model_id or output_dir.resolve().name).split("/")[-1],
            repo=args.hub_model_id or str(output_dir),
            base_model="flow_trl.tiny" if self._tiny_loader else self.model_name,
            tiny_loader=self._tiny_loader,
            note=self._card_note,
            is_lora=self.is_lora,
            pipeline_kwargs=self.eval_policy.call_kwargs,
            trainer=type(self).__name__,
            method=self._name,
            paper=self._paper,
            lora=self.policy.denoiser.peft_config[self.policy.denoiser.active_adapters()[0]] if self.is_lora else None,
            hyperparameters={name: getattr(args, name) for name in shown},
            updates=updates,
            held_out=bool(prefix),
            rewards=rewards,
            reward_weights=dict(zip(self.reward_names, self.reward_weights.tolist(), strict=True)),
            grid=str(grids[-1].relative_to(output_dir)) if grids else None,
            versions={"flow_trl": __version__, "diffusers": diffusers.__version__,
                      "transformers": transformers.__version__, "torch": torch.__version__},
        )  # fmt: skip
        card.save(output_dir / "README.md")

    _card_note: str | None = None
    _card_arguments = [
        "num_inference_steps", "guidance_scale", "num_generations", "generation_batch_size", "updates_per_generation",
        "num_iterations", "epsilon", "beta", "adv_clip_max", "ema_decay", "ema_update_steps",
        "eval_num_inference_steps", "eval_guidance_scale", "seed",
    ]  # fmt: skip

    def _check_dataset(self, name: str, dataset: Any) -> None:
        if not isinstance(dataset, datasets.Dataset):
            raise TypeError(
                f"`{name}` must be a `datasets.Dataset`, not {type(dataset).__name__}: "
                "`datasets.Dataset.from_list([{'prompt': ...}, ...])` makes one."
            )
        if len(dataset) == 0:
            raise ValueError(f"`{name}` is empty: it needs at least one row with a `prompt`.")
        if "prompt" not in dataset.column_names:
            raise ValueError(
                f"`{name}` has the columns {dataset.column_names} and no column `prompt`: rename one with "
                "`dataset.rename_column(..., 'prompt')`."
            )
        for index, prompt in enumerate(dataset["prompt"][:]):
            if not isinstance(prompt, str):
                raise TypeError(f"`{name}[{index}]['prompt']` is {prompt!r}: prompts must be strings.")
        for reserved in ("prompts", "images"):
            if reserved in dataset.column_names:
                raise ValueError(
                    f"`{name}` has a column `{reserved}`, which reward functions get under that name already: rename it."
                )
        columns = [column for column in dataset.column_names if column != "prompt"]
        for function, reward_func in zip(self.reward_names, self.reward_funcs, strict=True):
            try:
                inspect.signature(reward_func).bind(**dict.fromkeys(["prompts", "images", *columns]))
            except ValueError:  # a callable that does not tell its signature
                continue
            except TypeError as error:
                raise TypeError(
                    f"The reward function `{function}` cannot be called for `{name}`: {error}. It is called by keyword "
                    f"with `prompts`, `images` and the other columns {columns}; it can take those that it does not need "
                    "as `**columns`."
                ) from error

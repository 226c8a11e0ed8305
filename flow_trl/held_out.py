"""Evaluation of image trainers: one image of each held-out prompt, scored."""

import time
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch
from diffusers.utils import load_image
from huggingface_hub import CommitScheduler, DatasetCard
from PIL import Image
from transformers import TrainingArguments

from .conditioning import Conditioning
from .generation import Chunk
from .pictures import caption_text, log_image, save_image_grid
from .rollout import Trajectory, rollout
from .utils import check_images, import_extra, sample_generator, to_pil


class Evaluations:
    """How a [`~transformers.Trainer`] of pipelines evaluates, and keeps what its images look like."""

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
            check_images("eval_dataset", eval_dataset, self._sampler.columns)
        args, started = self.args, time.perf_counter()
        processes, rank, size = self.accelerator.num_processes, self.accelerator.process_index, len(eval_dataset)
        share = -(-size // processes)
        rows = [min(row, size - 1) for row in range(rank * share, (rank + 1) * share)]

        def sample(chunk: Chunk, conditioning: Conditioning, index: list[int]) -> Trajectory:
            generators = [sample_generator("eval", row) for row in chunk.rows]
            schedule = {"num_inference_steps": args.eval_num_inference_steps, "ode_step": self._ode_step}
            return rollout(self.eval_policy, conditioning, index, generators, **schedule)

        with self._evaluated_weights():
            options = {"batch_size": args.per_device_eval_batch_size, "num_images": args.num_images_to_save}
            sampled = self._scored(self._eval_sampler, eval_dataset, rows, sample, **options)
        self._raise_together(sampled)
        scores = self.accelerator.gather(sampled.scores[:, 0].to(self.accelerator.device)).cpu()
        scores = scores[:size]  # the last row is repeated so that all processes have as many
        rewards = self.scorer.weighted(scores)
        metrics = {"reward": rewards.mean().item(), "reward_se": rewards.std(unbiased=False).item() / size**0.5}
        metrics |= self.scorer.metrics(scores, errors=True) | sampled.logged()
        metrics["runtime"] = time.perf_counter() - started
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        shown = len(sampled.images)
        self._save_images(sampled.images, metric_key_prefix, eval_dataset, rows[:shown], rewards[:shown].tolist())
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_images(
        self, images: list, name: str, dataset: datasets.Dataset, rows: list[int], rewards: list[float]
    ) -> Image.Image | None:
        """A grid of images, each after the one that its prompt came with, if there is one, with their captions."""
        count = self.args.num_images_to_save
        if not self.is_world_process_zero() or not images or not count:
            return None
        images, shown = to_pil(torch.stack(images[:count])), dataset[rows[:count]]
        captions = [{"prompt": p, "reward": r} for p, r in zip(shown["prompt"], rewards[:count], strict=True)]
        texts = [caption_text(caption) for caption in captions]
        if self._sampler.columns:
            inputs = shown[self._sampler.columns[0]]
            images = [cell for pair in zip(inputs, images, strict=True) for cell in (_shown(*pair), pair[1])]
            captions = [cell for c in captions for cell in ({"prompt": c["prompt"], "given": True}, c)]
        step = self.state.global_step
        path = Path(self.args.output_dir) / "images" / f"{name}-{step:06d}.png"
        grid = save_image_grid(images, min(8, len(images)), path, captions)
        video = path.with_suffix(".gif") if isinstance(images[0], list) else None
        log_image(grid, f"images/{name}", step, self.args.report_to, self.callback_handler.callbacks, texts, video)
        return grid

    def _save_completions(self, images: list, table: dict[str, list], rows: list[int], rewards: list[float]) -> None:
        """A grid of training images, and a table of all images of their generation, which are shown too."""
        args, step = self.args, self.state.global_step
        grid = self._save_images(images, "train", self.train_dataset, rows, rewards)
        if not self.is_world_process_zero():
            return
        folder, table = _completions_folder(args), pd.DataFrame(table)
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / f"completions_{step:05d}.parquet")
        if args.log_unique_prompts:
            table = table.drop_duplicates("prompt")
        for tracker in {"wandb", "trackio"} & set(args.report_to):
            module = import_extra(tracker, extra="trackers", purpose=f"`report_to={tracker!r}`")
            module.log({"completions": module.Table(dataframe=table), "train/global_step": step})
        shown = table[["prompt", *self.scorer.names, "advantage"]].to_dict("list")
        self.console.show_completions(step, shown, args.num_completions_to_print, grid)


def _completions_folder(args: TrainingArguments) -> Path:
    return Path(args.output_dir) / "completions"


_COMPLETIONS_CARD = """---
tags: [flow-trl, trl-logs, completions]
---

# Completions of a training with flow_trl

One table per generation: `step`, `prompt`, the scores of each reward function, `advantage`, and what the reward functions logged.
"""


def upload_completions(args: TrainingArguments) -> CommitScheduler | None:
    """
    Starts to upload the tables of completions of a run, if `args` say so, into a data set that gets a card if it has
    none; raises if that cannot work.
    """
    repo = args.log_completions_hub_repo
    if repo is None or not args.should_log:
        return None
    options = {"private": args.hub_private_repo, "token": args.hub_token, "allow_patterns": "*.parquet", "every": 2}
    uploads = CommitScheduler(repo_id=repo, repo_type="dataset", folder_path=_completions_folder(args), **options)
    if not uploads.api.file_exists(uploads.repo_id, "README.md", repo_type="dataset"):
        DatasetCard(_COMPLETIONS_CARD).push_to_hub(uploads.repo_id, token=args.hub_token)
    return uploads


def _shown(given: Any, result: Image.Image | list[Image.Image]) -> Image.Image | list[Image.Image]:
    """What a prompt came with (the first image of several), in the size of its result: an image, or frames that stand still."""
    frames = result if isinstance(result, list) else [result]
    image = load_image(given[0] if isinstance(given, list) else given).resize(frames[0].size)
    return [image] * len(frames) if isinstance(result, list) else image

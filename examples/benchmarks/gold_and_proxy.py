# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl[plots]"]
# ///
"""
Over-optimisation, studied as in https://huggingface.co/papers/2210.10760: the *gold* reward is exact, the *proxy* is learnt
from few noisy labels of it, and training on the proxy makes gold rise, then fall. DDPO, TDPO and TDPO-R with each kind of
reset, in the tiny world, with the settings of `examples/tdpo_r.py`.

Gold is how many well-formed shapes a picture shows: the sum of the scores that the tiny detector gives to what it finds. The
proxy is a ridge regression on the tiny CLIP's embedding of the image, fitted to 96 images of the pretrained pipeline whose
labels are gold plus as much noise as gold varies. Each seed has labels, and so a proxy, of its own; all methods share them.

Each finished run is a JSON file in `--results`; what is there is not run again, so the study can be stopped at any time. One
process per core:

    OMP_NUM_THREADS=1 python examples/benchmarks/gold_and_proxy.py --worker 0 --num_workers 1
    python examples/benchmarks/gold_and_proxy.py --table
"""

import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from peft import LoraConfig
from PIL import Image
from transformers import HfArgumentParser

from flow_trl import DDPOConfig, DDPOTrainer, TDPORConfig, TDPORTrainer, tiny
from flow_trl.rewards.clip import ClipEncoder
from flow_trl.tiny.detector import detect_shapes


@dataclass
class Arguments:
    """
    Arguments of the study.

    Args:
        results (`str`, *optional*, defaults to `"examples/benchmarks/gold_and_proxy"`):
            Folder of the results of single runs.
        worker, num_workers (`int`, *optional*):
            This process takes every `num_workers`-th run, from `worker` on.
        table (`bool`, *optional*, defaults to `False`):
            Whether to tabulate and draw what is there, and run nothing.
        output_dir (`str`, *optional*, defaults to `"outputs/gold_and_proxy"`):
            Folder of the figure.
    """

    results: str = field(default="examples/benchmarks/gold_and_proxy", metadata={"help": "Folder of the results."})
    worker: int = field(default=0, metadata={"help": "Number of this process."})
    num_workers: int = field(default=1, metadata={"help": "Number of processes."})
    table: bool = field(default=False, metadata={"help": "Whether to tabulate what is there, and run nothing."})
    output_dir: str = field(default="outputs/gold_and_proxy", metadata={"help": "Folder of the figure."})


METHODS = {
    "DDPO": None,
    "TDPO": {"reset_neurons": "none"},
    "TDPO-R, active": {"reset_neurons": "active"},
    "TDPO-R, dormant": {"reset_neurons": "dormant"},
    "TDPO-R, all": {"reset_neurons": "all"},
}
SEEDS = [42, 43, 44, 45, 46]
NUM_LABELS, NUM_IMAGES = 96, 256  # the images without label scale the proxy
NUM_PROMPTS = 16
GENERATIONS, EVAL_EVERY = 30, 3
COMMON = {
    "num_inference_steps": 10,
    "eval_num_inference_steps": 10,
    "guidance_scale": 1.0,
    "num_generations": 8,
    "generation_batch_size": 128,
    "per_device_rollout_batch_size": 128,
    "per_device_eval_batch_size": 200,
    "learning_rate": 2e-3,
    "epsilon": 1e-3,
    "per_prompt_stat_tracking_min_count": 8,
    "out_of_domain_rewards": ["gold"],
    "overlap_rewards": False,  # so that a run is one thread
    "num_images_to_save": 0,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
DDPO = {"per_device_train_batch_size": 16, "updates_per_generation": 8}
TDPO = {"per_device_train_batch_size": 32, "critic_learning_rate": 3e-3}


def gold(prompts: list[str], images: list[Image.Image], **columns) -> list[float]:
    """How many well-formed shapes an image shows."""
    return [sum(shape.score for shape in shapes) for shapes in detect_shapes(images)]


class Proxy:
    """
    A head on the tiny CLIP, in standard deviations over images of the pretrained pipeline.

    Args:
        seed (`int`): draws the labelled images and the noise of their labels.

    Attributes:
        correlation (`float`): with gold, on images that were not labelled.
    """

    __name__ = "proxy"

    def __init__(self, seed: int):
        self.encoder = ClipEncoder(*tiny.load_clip())
        prompts = tiny.load_prompts("scenes", "train").shuffle(seed=seed)["prompt"][:NUM_IMAGES]
        pipe = tiny.load_diffusion_pipeline()
        pipe.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 10, "guidance_scale": 1.0, "eta": 1.0}
        images = pipe(prompts, **settings, generator=torch.Generator().manual_seed(seed)).images
        features, exact = self.embed(images), np.array(gold(prompts, images))
        labels, rest = slice(NUM_LABELS), slice(NUM_LABELS, None)
        noise = np.random.default_rng(seed).normal(0, exact[labels].std(), NUM_LABELS)
        self.weights = ridge(features[labels], exact[labels] + noise)
        predicted = features[rest] @ self.weights
        self.mean, self.std = predicted.mean(), predicted.std()
        self.correlation = float(np.corrcoef(predicted, exact[rest])[0, 1])

    def embed(self, images: list[Image.Image]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        embeddings = self.encoder(pixels.permute(0, 3, 1, 2) / 255)
        return torch.nn.functional.normalize(embeddings).double().numpy()

    def __call__(self, prompts: list[str], images: list[Image.Image], **columns) -> list[float]:
        return ((self.embed(images) @ self.weights - self.mean) / self.std).tolist()


def ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights (d,) of a ridge regression of y (N,) on x (N, d); the strength is the best when one label is left out."""
    x, y = x - x.mean(0), y - y.mean()
    found = {}
    for strength in 10.0 ** np.arange(-3, 2):
        solve = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T)
        hat = np.diag(x @ solve) + 1 / len(x)
        error = np.mean(((y - x @ solve @ y) / (1 - hat)) ** 2)
        found[error] = solve @ y
    return found[min(found)]


def run(method: str, seed: int) -> dict:
    """Trains once; returns the learning curve."""
    started = time.process_time()
    proxy, is_ddpo = Proxy(seed), METHODS[method] is None
    updates_per_generation = DDPO["updates_per_generation"] if is_ddpo else COMMON["num_inference_steps"]
    with tempfile.TemporaryDirectory() as folder:
        args = (DDPOConfig if is_ddpo else TDPORConfig)(
            folder,
            **COMMON,
            **(DDPO if is_ddpo else TDPO | METHODS[method]),
            seed=seed,
            max_steps=GENERATIONS * updates_per_generation,
            eval_on_start=True,
            eval_strategy="steps",
            eval_steps=EVAL_EVERY * updates_per_generation,
        )
        trainer = (DDPOTrainer if is_ddpo else TDPORTrainer)(
            model=tiny.load_diffusion_pipeline(),
            reward_funcs=[proxy, gold],
            args=args,
            train_dataset=tiny.load_prompts("scenes", "train").select(range(NUM_PROMPTS)),
            eval_dataset=tiny.load_prompts("scenes", "test").select(range(200)),
            peft_config=LoraConfig(
                r=16,
                lora_alpha=32,
                init_lora_weights="gaussian",
                target_modules=["to_q", "to_k", "to_v", "to_out.0"],
            ),
        )
        trainer.train()
    evaluations = {entry["step"]: entry for entry in trainer.state.log_history if "eval_reward" in entry}
    return {
        "method": method,
        "seed": seed,
        "correlation": proxy.correlation,
        "generations": [step / updates_per_generation for step in evaluations],
        **{name: [entry[f"eval_rewards/{name}/mean"] for entry in evaluations.values()] for name in ("proxy", "gold")},
        "seconds": time.process_time() - started,
    }

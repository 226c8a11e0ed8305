# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl"]
#
# [tool.uv.sources]
# flow-trl = { path = "../..", editable = true }
# ///
"""
Peak memory of a generation against its size. A generation is a stream of chunks, so the images of at most two chunks exist
at once, and what grows with the generation is what the updates need of it: the trained latents, their log-probabilities and
the prompts' embeddings.

    OMP_NUM_THREADS=1 python examples/benchmarks/generation_memory.py
    OMP_NUM_THREADS=1 python examples/benchmarks/generation_memory.py --base FOLDER  # beside a checkout of another version

One TP-GRPO generation of the tiny pipeline (T = 6, five stochastic steps, no guidance, chunks of 64 trajectories, groups of
16) per size, each in a process of its own. The peak is the kernel's (`VmHWM` of Linux), reset when everything is loaded, so
neither loading nor an update is in it. By default glibc keeps much of what is freed, more or less of it from run to run: that
peak and the seconds are those of a user. In a second process it must give back at once what is freed
(`MALLOC_MMAP_THRESHOLD_`; slow, and the same to 1 MB in every run): its peak above the memory at the start is what was held.

The same counted for real models, per process, at T = 10 with nine stochastic steps (10 final images per trajectory), in GB:
SD3.5-medium at 512 px (latents 16 x 64 x 64) and Wan at 480 x 832 with 81 frames (latents 16 x 21 x 60 x 104).

| generation | processes | chunk | CPU before | CPU now | GPU before | GPU now | disk now |
| --- | --- | --- | --- | --- | --- | --- | --- |
| 1152 images | 8 | 16 | 1.51 | 0.65 | 0.75 | 0.12 | 0.75 |
| 1152 images | 1 | 16 | 12.08 | 3.29 | 6.04 | 0.12 | 6.04 |
| 96 videos | 8 | 2 | 15.53 | 5.15 | 2.01 | 0.49 | 2.01 |
| 96 videos | 1 | 2 | 124.22 | 12.19 | 16.10 | 0.49 | 16.10 |
| 96 videos | 1 | 16 | 124.22 | 41.18 | 16.10 | 3.89 | 16.10 |

Before, all images were decoded and then scored, as PIL images (4 bytes a pixel), while all trajectories and final latents
stayed on the GPU. Now two chunks wait as uint8 pixels (3 bytes) and one completion of the one that is scored as PIL images;
trained latents and log-probabilities of the generation wait on the CPU; the GPU has the trajectories, completions and noise
of one chunk. Until the generation is scored its samples are on disk too. On top come what the models need for themselves and,
for a moment, velocities and copies while tensors are joined: on the GPU twice as much again before and once now, on the CPU
now one chunk of pixels. Embeddings are not counted.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser


ROOT = str(Path(__file__).resolve().parents[2])
MB, GB = 10**6, 10**9
COLUMNS = ["seconds", "peak memory (MB)", "held above the start (MB)", "latents kept (MB)"]


@dataclass
class Arguments:
    """
    Arguments of the benchmark.

    Args:
        sizes (`list[int]`, *optional*, defaults to `[64, 256, 1024, 4096]`):
            Images in a generation, multiples of 16.
        base (`str`, *optional*):
            Checkout of another version of flow_trl, which is measured too.
        measure (`int`, *optional*):
            Measures a generation of this size in this process and prints it as JSON; what the script calls itself with.
    """

    sizes: list[int] = field(
        default_factory=lambda: [64, 256, 1024, 4096], metadata={"help": "Images in a generation, multiples of 16."}
    )
    base: str | None = field(default=None, metadata={"help": "Checkout of another version of flow_trl."})
    measure: int | None = field(default=None, metadata={"help": "Measures this size and prints it as JSON."})


def memory(name: str) -> float:
    """`VmRSS`, the memory of this process, or `VmHWM`, the most since its peak was reset, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024 / MB


def measure(size: int) -> dict[str, float]:
    """Samples, decodes and scores one generation."""
    from peft import LoraConfig

    from flow_trl import TPGRPOConfig, TPGRPOTrainer, tiny
    from flow_trl.rewards.scene import SceneReward

    with tempfile.TemporaryDirectory() as folder:
        trainer = TPGRPOTrainer(
            tiny.load_flow_pipeline(),
            tiny.scene_reward() if hasattr(tiny, "scene_reward") else SceneReward(),  # an older version
            TPGRPOConfig(
                folder, pipeline_kwargs={"max_sequence_length": 0}, num_inference_steps=6, guidance_scale=1.0,
                num_generations=16, generation_batch_size=size, per_device_rollout_batch_size=64,
                per_device_train_batch_size=min(size, 64), updates_per_generation=1, beta=0.0, ema_decay=0.0,
                use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=1,
            ),
            train_dataset=tiny.load_prompts("scenes", "train"),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
        )  # fmt: skip
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        loaded, started = memory("VmRSS"), time.perf_counter()
        trainer._generate(0)
        seconds, peak = time.perf_counter() - started, memory("VmHWM")
    kept = sum(tensor.nbytes for tensor in vars(trainer._generation).values()) / MB
    calls = trainer._totals["total_reward_calls"]
    return {"scored": calls, "seconds": seconds, "peak": peak, "above": peak - loaded, "kept": kept}


def cells(size: int, folder: str) -> tuple[int, list[str]]:
    """Number of images that the version in `folder` scored, and its cells of the table."""

    def run(**environment: str) -> dict[str, float]:
        command = [sys.executable, os.path.abspath(__file__), "--measure", str(size)]
        environment = {**os.environ, "PYTHONPATH": folder, "HF_HUB_OFFLINE": "1", **environment}
        return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)

    usual, exact = run(), run(MALLOC_MMAP_THRESHOLD_="131072")
    values = [usual["seconds"], usual["peak"], exact["above"], usual["kept"]]
    return usual["scored"], [f"{value:.1f}" for value in values]


def arithmetic(name: str, images: int, processes: int, chunk: int, latent: tuple[int, ...], pixels: int) -> list[str]:
    """
    A row of the table of what a process of TP-GRPO holds at T = 10, before and now.

    Args:
        name (`str`): what is sampled.
        images (`int`): number of trajectories in a generation.
        processes (`int`): number of processes.
        chunk (`int`): trajectories that are sampled together.
        latent (`tuple[int, ...]`): shape of a latent, float32.
        pixels (`int`): pixels of an image, or of all frames of a video.
    """
    k, n = 9, images // processes
    latent_bytes = 4 * math.prod(latent)
    trained = n * ((k + 1) * latent_bytes + k * 4)
    held = {
        "CPU before": (k + 1) * n * pixels * 4,
        "CPU now": (k + 1) * min(2 * chunk, n) * pixels * 3 + chunk * pixels * 4 + trained,
        "GPU before": 2 * (k + 1) * n * latent_bytes,
        "GPU now": (2 * (k + 1) + k) * chunk * latent_bytes,
        "disk now": trained + (k + 1) * n * latent_bytes,
    }
    return [f"{images} {name}", str(processes), str(chunk), *(f"{value / GB:.2f}" for value in held.values())]


def arithmetic_table() -> str:
    """The table of the docstring above."""
    sd35 = {"name": "images", "images": 1152, "latent": (16, 64, 64), "pixels": 512 * 512}
    wan = {"name": "videos", "images": 96, "latent": (16, 21, 60, 104), "pixels": 81 * 480 * 832}
    rows = [
        ["generation", "processes", "chunk", "CPU before", "CPU now", "GPU before", "GPU now", "disk now"],
        ["---"] * 8,
        arithmetic(**sd35, processes=8, chunk=16),
        arithmetic(**sd35, processes=1, chunk=16),
        arithmetic(**wan, processes=8, chunk=2),
        arithmetic(**wan, processes=1, chunk=2),
        arithmetic(**wan, processes=1, chunk=16),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return
    versions = {"": ROOT} | ({", base": os.path.abspath(arguments.base)} if arguments.base else {})
    columns = ["images", "final images scored", *(column + version for version in versions for column in COLUMNS)]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for size in arguments.sizes:
        measured = [cells(size, folder) for folder in versions.values()]
        row = [str(size), str(measured[0][0]), *(cell for _, of_version in measured for cell in of_version)]
        print(f"| {' | '.join(row)} |", flush=True)
    print(f"\nCounted for real models, per process, in GB:\n\n{arithmetic_table()}", end="")


if __name__ == "__main__":
    main()

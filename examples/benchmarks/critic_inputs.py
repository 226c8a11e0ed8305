# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl"]
#
# [tool.uv.sources]
# flow-trl = { path = "../..", editable = true }
# ///
"""
Benchmark of a TDPO-R generation: trajectories and the critic's embeddings of all their latents, in the order of the
library (sample all images, then decode and embed all latents in batches) against the order of the paper's code (one image
at a time, decode and embed inside the sampling loop). Both give the same numbers. Each order runs in a process of its own,
in turns, so that peak memory can be told.

    python examples/benchmarks/critic_inputs.py
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from flow_trl import PipelinePolicy, tiny
from flow_trl.rewards.clip import ClipEncoder
from flow_trl.rollout import rollout
from flow_trl.transitions import ddim_step


ORDERS = ("paper's order", "flow_trl")


@dataclass
class Arguments:
    """
    Arguments of the benchmark.

    Args:
        num_images (`int`, *optional*, defaults to `64`):
            Number of images in the generation.
        num_inference_steps (`int`, *optional*, defaults to `10`):
            Number of denoising steps.
        batch_size (`int`, *optional*, defaults to `64`):
            Largest number of latents in one call, in the order of the library.
        guidance_scale (`float`, *optional*, defaults to `5.0`):
            Strength of guidance.
        repeats (`int`, *optional*, defaults to `3`):
            Number of turns. Of the times the median counts.
        order (`str`, *optional*):
            Measures one order in this process and writes what it gave to `output`. (Set by the script itself.)
        output (`str`, *optional*):
            File for what an order gave.
    """

    num_images: int = field(default=64, metadata={"help": "Number of images in the generation."})
    num_inference_steps: int = field(default=10, metadata={"help": "Number of denoising steps."})
    batch_size: int = field(default=64, metadata={"help": "Largest number of latents in one call."})
    guidance_scale: float = field(default=5.0, metadata={"help": "Strength of guidance."})
    repeats: int = field(default=3, metadata={"help": "Number of turns."})
    order: str | None = field(
        default=None, metadata={"help": "Measures one order in this process.", "choices": ORDERS}
    )
    output: str | None = field(default=None, metadata={"help": "File for what an order gave."})


class Generation:
    """The tiny pipeline, its critic's encoder, prompts and noise."""

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        self.policy = PipelinePolicy(tiny.load_diffusion_pipeline(), guidance_scale=arguments.guidance_scale)
        self.encoder = ClipEncoder(*tiny.load_clip(), batch_size=arguments.batch_size)
        self.scheduler = tiny.load_diffusion_pipeline().scheduler
        self.scheduler.set_timesteps(arguments.num_inference_steps)
        self.prompts = tiny.load_prompts("scenes", "train")["prompt"][: arguments.num_images]

    def transition(self, output, sample, step, schedule, **kwargs):
        return ddim_step(output, sample, schedule.timesteps[step], self.scheduler, **kwargs)

    def embed(self, latents, conditioning):
        return self.encoder(self.policy.decode(latents, conditioning, output_type="pt"))

    def in_batches(self) -> dict[str, torch.Tensor]:
        n, t, size = self.arguments.num_images, self.arguments.num_inference_steps, self.arguments.batch_size
        conditioning = self.policy.encode(self.prompts)
        generators = [torch.Generator().manual_seed(i) for i in range(n)]
        trajectory = rollout(
            self.policy, conditioning, list(range(n)), generators, num_inference_steps=t, transition=self.transition,
            steps=range(t), batch_size=size,
        )  # fmt: skip
        flat = trajectory.latents[:, :-1].flatten(0, 1).split(size)
        index = torch.arange(n).repeat_interleave(t).split(size)
        embeddings = [self.embed(latents, conditioning[rows]) for latents, rows in zip(flat, index, strict=True)]
        return {"latents": trajectory.latents, "embeddings": torch.cat(embeddings).unflatten(0, (n, t))}

    @torch.no_grad()
    def in_the_loop(self) -> dict[str, torch.Tensor]:
        latents, embeddings = [], []
        for i, prompt in enumerate(self.prompts):
            generator = torch.Generator().manual_seed(i)
            sample, schedule, conditioning = self.policy.start(
                [prompt], self.arguments.num_inference_steps, [generator]
            )
            own, embedded = [sample], []
            for k in range(self.arguments.num_inference_steps):
                output = self.policy.predict(sample, k, conditioning, schedule)
                embedded.append(self.embed(sample, conditioning))
                noise = torch.randn(sample.shape[1:], generator=generator)[None]
                sample = self.transition(output, sample, k, schedule, noise=noise).next_sample
                own.append(sample)
            latents.append(torch.cat(own))
            embeddings.append(torch.cat(embedded))
        return {"latents": torch.stack(latents), "embeddings": torch.stack(embeddings)}


def measure(arguments: Arguments) -> None:
    """Runs one order, and writes its seconds, its peak memory beyond that of the loaded models, and its tensors."""
    generation = Generation(arguments)
    run = generation.in_batches if arguments.order == "flow_trl" else generation.in_the_loop
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    tensors = run()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.save({"seconds": seconds, "megabytes": (peak - loaded) / 1024, **tensors}, arguments.output)


def main(arguments: Arguments) -> None:
    if arguments.order is not None:
        return measure(arguments)
    results = {order: [] for order in ORDERS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(arguments.repeats):
            for order in ORDERS if turn % 2 else ORDERS[::-1]:
                path = Path(folder) / "config.json"
                output = str(Path(folder) / "result.pt")
                path.write_text(json.dumps({**vars(arguments), "order": order, "output": output}))
                subprocess.run([sys.executable, __file__, str(path)], check=True)
                results[order].append(torch.load(output))
    first, second = (results[order][0] for order in ORDERS)
    seconds = {order: statistics.median(run["seconds"] for run in runs) for order, runs in results.items()}
    print(f"{arguments.num_images} images, {arguments.num_inference_steps} steps, {torch.get_num_threads()} threads\n")
    print("| order | seconds | times faster | peak memory beyond the models (MB) |\n| --- | --- | --- | --- |")
    for order, runs in results.items():
        megabytes = statistics.median(run["megabytes"] for run in runs)
        print(f"| {order} | {seconds[order]:.2f} | {seconds[ORDERS[0]] / seconds[order]:.2f} | {megabytes:.0f} |")
    for name in ("latents", "embeddings"):
        difference = (first[name] - second[name]).abs().max().item()
        print(f"\nLargest difference of {name}: {difference:.1e} (their largest value: {first[name].abs().max():.1f})")


if __name__ == "__main__":
    parser = HfArgumentParser(Arguments)
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        main(*parser.parse_json_file(sys.argv[1]))
    else:
        main(*parser.parse_args_into_dataclasses())

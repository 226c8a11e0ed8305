# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl"]
#
# [tool.uv.sources]
# flow-trl = { path = "../..", editable = true }
# ///
"""
What can only be seen on a GPU, in under 8 minutes on one: a random transformer of the size of SD3.5-medium at 512 pixels is
sampled and trained in bfloat16, compiled and not, and under FSDP2; beside what was measured stands what `flow_trl.plan` says.

    python examples/benchmarks/gpu_acceptance.py
    OMP_NUM_THREADS=1 python examples/benchmarks/gpu_acceptance.py --models tiny transformer unet  # on a CPU

On a CPU all is in float32, nothing is compiled and FSDP2 is left out. Seconds are those of a second generation and its updates;
memory is the most that PyTorch's allocator gave out within a phase, FLOP those of `torch.utils.flop_counter`. The ratio is that
of the first update, which is 1 where sampling and training compute the same.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import AutoencoderKL, DiffusionPipeline, SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import HfArgumentParser

from flow_trl import DDPOConfig, DDPOTrainer, FlowGRPOConfig, FlowGRPOTrainer, TPGRPOConfig, TPGRPOTrainer, tiny
from flow_trl.generation import Chunk
from flow_trl.plan import flop_counter, plan


EXAMPLES = Path(__file__).resolve().parents[1]
TRAINERS = {TPGRPOConfig: TPGRPOTrainer, FlowGRPOConfig: FlowGRPOTrainer, DDPOConfig: DDPOTrainer}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
PROMPTS = ["a photo of a red circle left of a blue square", "a photo of two green stars"]


@dataclass
class Arguments:
    """
    Arguments of the benchmark.

    Args:
        models (`list[str]`, *optional*):
            `"tiny"` (the tiny world's), `"transformer"`, `"unet"` (random, for CPUs) or `"sd3.5"` (random, of that size). If not
            set, `"sd3.5"` on a GPU and else `"tiny"`.
        part (`str`, *optional*):
            A run in this process, printed as JSON; what the script calls itself with.
    """

    models: list[str] | None = field(default=None, metadata={"help": "tiny, transformer, unet or sd3.5."})
    part: str | None = field(default=None, metadata={"help": "plain, compiled or fsdp2: a run, printed as JSON."})


def vae(channels: tuple[int, ...], latent_channels: int, **options: Any) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * len(channels)}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * len(channels), "block_out_channels": channels}
    return AutoencoderKL(latent_channels=latent_channels, layers_per_block=2, **blocks, **options)


def transformer_pipeline(
    layers: int, heads: int, channels: tuple[int, ...], text: int, **options: Any
) -> DiffusionPipeline:
    """The tiny world's flow pipeline with another transformer and autoencoder, random ones."""
    pipe = tiny.load_flow_pipeline()
    decoder = vae(channels, 16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)
    denoiser = SD3Transformer2DModel(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=64, caption_projection_dim=64 * heads,
        in_channels=16, out_channels=16, patch_size=2, sample_size=64, pos_embed_max_size=64, joint_attention_dim=text,
        pooled_projection_dim=pipe.transformer.config.pooled_projection_dim, qk_norm="rms_norm", **options,
    )  # fmt: skip
    pipe.register_modules(transformer=denoiser, vae=decoder)
    pipe.vae_scale_factor = 2 ** (len(channels) - 1)
    pipe.image_processor = type(pipe.image_processor)(vae_scale_factor=pipe.vae_scale_factor)
    return pipe


def unet_pipeline() -> DiffusionPipeline:
    """The tiny world's diffusion pipeline with another UNet, a random one."""
    pipe = tiny.load_diffusion_pipeline()
    config = pipe.unet.config
    names = ("in_channels", "out_channels", "cross_attention_dim")
    channels = (32, 64, 128)
    denoiser = UNet2DConditionModel(
        sample_size=16, block_out_channels=channels, layers_per_block=1, attention_head_dim=4, norm_num_groups=32,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), **{name: config[name] for name in names},
    )  # fmt: skip
    pipe.register_modules(unet=denoiser)
    return pipe


def setting(name: str, folder: str, **options: Any) -> tuple[DiffusionPipeline, FlowGRPOConfig | DDPOConfig]:
    """A model and how it is trained."""
    on_gpu = torch.cuda.is_available()
    options = {
        "num_inference_steps": 3, "num_generations": 4, "generation_batch_size": 8, "updates_per_generation": 1,
        "per_device_train_batch_size": 4, "per_device_rollout_batch_size": 4, "guidance_scale": 1.0, "ema_decay": 0.0,
        "max_steps": 1, "bf16": on_gpu, "use_cpu": not on_gpu, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "check_pipeline": False, **options,
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        if name == "unet":
            return unet_pipeline(), DDPOConfig(folder, **options)
        if name == "tiny":
            options["pipeline_kwargs"] = {"max_sequence_length": 0}
            return tiny.load_flow_pipeline(), TPGRPOConfig(folder, **options)
        if name == "transformer":
            options["pipeline_kwargs"] = {"max_sequence_length": 16, "height": 64, "width": 64}
            return transformer_pipeline(4, 6, (32, 64, 64), 256), TPGRPOConfig(folder, **options)
        if name == "sd3.5":
            options["pipeline_kwargs"] = {"max_sequence_length": 256, "height": 512, "width": 512}
            dual = {"dual_attention_layers": tuple(range(13))}
            pipe = transformer_pipeline(24, 24, (128, 256, 512, 512), 4096, **dual)
            return pipe.to(torch.bfloat16), TPGRPOConfig(folder, **{**options, "num_inference_steps": 6})
    raise ValueError(f"`models={[name]}` is not known: choose among 'tiny', 'transformer', 'unet' and 'sd3.5'.")


def brightness(prompts: list[str], images: list, **columns: Any) -> list[float]:
    return [sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in images]


class Peak:
    """The most bytes that were given out within `with peak: ...`, beyond those at its start."""

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()
        return self

    def __exit__(self, *error):
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self.start
            return
        self.profile.__exit__(*error)
        events = [event for event in self.profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = self.bytes = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            self.bytes = max(self.bytes, now)


@contextmanager
def timed(seconds: dict[str, float], name: str):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


def make_trainer(name: str, folder: str, **options: Any):
    pipe, args = setting(name, folder, **options)
    lora = LoraConfig(r=16, lora_alpha=32, init_lora_weights="gaussian", target_modules=TARGETS)
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    return TRAINERS[type(args)](pipe, brightness, args, train_dataset=dataset, peft_config=lora)


def measure(trainer) -> dict[str, float]:
    """Trains once, then measures a generation and its update."""
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "ratio/max_deviation" in entry)
    args, policy, device = trainer.args, trainer.policy, trainer.accelerator.device
    found = {"ratio": logged["ratio/max_deviation"], "clipped": logged["clip_ratio/region_mean"]}

    def update() -> None:
        for batch in trainer._micro_batches(0):
            trainer.training_step(trainer.model_wrapped, batch)

    seconds: dict[str, float] = {}
    for name, function in (("generation", partial(trainer._generate, 0)), ("update", update)):
        if device.type == "cuda":  # where the counter would take longer than what it counts
            with timed(seconds, name):
                function()
        with flop_counter() as counter, timed(seconds, name) if device.type == "cpu" else nullcontext():
            function()
        found |= {f"flop/{name}": counter.get_total_flops(), f"seconds/{name}": seconds[name]}
    trainer.model_wrapped.zero_grad()

    rows = trainer._rows(0)[: args.per_device_rollout_batch_size]
    conditioning, index = trainer._sampler.encode(trainer.train_dataset, rows)
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    with Peak() as peak:
        trajectory = trainer._sample(0, Chunk(0, rows), conditioning, index)
    found["bytes/sampling"] = peak.bytes + held
    decode_type = torch.bfloat16 if args.bf16 and device.type != "cpu" else None
    latents = trajectory.finals.flatten(0, 1)[: len(rows)].to(device)
    conditions = conditioning.on(device, index)
    with Peak() as peak, torch.autocast(device.type, decode_type, enabled=decode_type is not None):
        policy.decode(latents, conditions, output_type="uint8")
    found["bytes/decoding"] = peak.bytes + held
    del trajectory, latents, conditions
    with Peak() as peak:
        update()
    found["bytes/updating"] = peak.bytes + held

    inside: dict[str, float] = {}
    forward = policy.denoiser.forward

    def clocked(*args, **kwargs):
        with timed(inside, "denoiser"):
            return forward(*args, **kwargs)

    policy.denoiser.forward = clocked
    with timed(inside, "sampling"):
        trainer._sample(0, Chunk(0, rows), conditioning, index)
    policy.denoiser.forward = forward
    found["share"] = inside["denoiser"] / inside["sampling"]
    return found


def planned(name: str, folder: str) -> dict[str, float]:
    """What [`flow_trl.plan`] says of the same. On a CPU, where the models' weights are not measured, without what is held."""
    pipe, args = setting(name, folder)
    found = plan(pipe, args, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    held = 0 if torch.cuda.is_available() else sum(found.held.values())
    sizes = {f"bytes/{phase}": size - held for phase, size in found.peaks.items()}
    return sizes | {"flop/generation": found.generation_flop, "flop/update": found.update_flop}


def run(name: str, part: str) -> dict[str, float]:
    """One part in a process of its own."""
    command = [sys.executable]
    if part == "fsdp2":
        config = EXAMPLES / "accelerate_configs" / "fsdp2.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "1"]
    command += [os.path.abspath(__file__), "--models", name, "--part", part]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"The part {part!r} of {name!r} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def tables(parts: dict[str, dict[str, float]]) -> str:
    """What was measured in each part, and what was planned beside what was measured in the plain one."""
    rows = [["", *parts], ["---"] * (len(parts) + 1)]
    titles = {"largest deviation of the first ratio": "ratio", "share clipped at the first update": "clipped"}
    titles |= {"seconds of a generation": "seconds/generation", "seconds of its update": "seconds/update"}
    titles |= {"share of the denoiser in sampling": "share"}
    for title, key in titles.items():
        rows.append([title, *(f"{part[key]:.3g}" for part in parts.values())])
    for x in ("generation", "update"):
        speeds = [part[f"flop/{x}"] / part[f"seconds/{x}"] / 1e12 for part in parts.values()]
        rows.append([f"TFLOP/s, {x}", *(f"{speed:.3g}" for speed in speeds)])
    compared = [["", "measured", "plan", "plan / measured"], ["---"] * 4]
    plain = parts["plain"]
    for key in (key.removeprefix("plan/") for key in plain if key.startswith("plan/")):
        (kind, phase), measured, said = key.split("/"), plain[key], plain[f"plan/{key}"]
        unit, scale = {"flop": ("TFLOP", 1e12), "bytes": ("peak MB", 1e6)}[kind]
        compared.append(
            [f"{unit}, {phase}", f"{measured / scale:.4g}", f"{said / scale:.4g}", f"{said / measured:.3f}"]
        )
    return "\n\n".join("\n".join(f"| {' | '.join(row)} |" for row in table) for table in (rows, compared))


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    on_gpu = torch.cuda.is_available()
    models = arguments.models or ["sd3.5" if on_gpu else "tiny"]
    if arguments.part is not None:
        with tempfile.TemporaryDirectory() as folder:
            options = {"torch_compile": True} if arguments.part == "compiled" else {}
            trainer = make_trainer(models[0], folder, **options)
            if arguments.part == "fsdp2":  # the same update, its phases are not taken apart
                started = time.perf_counter()
                trainer.train()
                logged = next(entry for entry in trainer.state.log_history if "ratio/max_deviation" in entry)
                found = {"ratio": logged["ratio/max_deviation"], "clipped": logged["clip_ratio/region_mean"]}
                found |= {"seconds": time.perf_counter() - started, "bytes": torch.cuda.max_memory_allocated()}
            else:
                found = measure(trainer)
                if arguments.part == "plain":
                    found |= {f"plan/{key}": value for key, value in planned(models[0], folder).items()}
        print(json.dumps(found))
        return
    for name in models:
        parts = {"plain": run(name, "plain")}
        if on_gpu:
            parts["compiled"] = run(name, "compiled")
        print(f"\n{name} on {torch.cuda.get_device_name() if on_gpu else 'a CPU'}\n\n{tables(parts)}", flush=True)
        if on_gpu:
            fsdp = run(name, "fsdp2")
            print(
                f"\nFSDP2, {name}: deviation {fsdp['ratio']:.3g}, clipped {fsdp['clipped']:.3g}, {fsdp['seconds']:.1f} s for a"
            )
            print(f"generation and an update, {fsdp['bytes'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

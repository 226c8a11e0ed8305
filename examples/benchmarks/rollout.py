# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl"]
#
# [tool.uv.sources]
# flow-trl = { path = "../..", editable = true }
# ///
"""
Rollout benchmark: the wavefront against the order of the paper's code, in one run, on the same noise.

The sequential order samples the trajectory, then runs the completions one after another, each with the first velocity
computed anew, and decodes the images of each. Both orders give the same images. On the tiny pipeline the script also
measures how far completions with a stride agree with exact ones in the sign of the incremental reward.

    python examples/benchmarks/rollout.py
    python examples/benchmarks/rollout.py --config sd3.5-medium
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import HfArgumentParser

from flow_trl import PipelinePolicy, tiny
from flow_trl.conditioning import Conditioning
from flow_trl.credit import incremental_rewards
from flow_trl.rollout import Trajectory, rollout
from flow_trl.transitions import flow_step


@dataclass
class Arguments:
    """
    Arguments of the benchmark.

    Args:
        config (`str`, *optional*, defaults to `"tiny"`):
            `"tiny"`: the shipped pipeline, on the CPU. `"sd3.5-medium"`: a randomly initialised transformer and decoder
            of that size at 512 px in bfloat16, for a GPU.
        num_images (`int`, *optional*, defaults to `8`):
            Number of trajectories that are sampled together.
        num_generations (`int`, *optional*, defaults to `8`):
            Number of trajectories per prompt.
        batch_size (`int`, *optional*, defaults to `64`):
            Largest number of latents in one call of the denoiser or the decoder.
        num_inference_steps (`int`, *optional*, defaults to `10`):
            Number of denoising steps.
        repeats (`int`, *optional*, defaults to `12`):
            Number of measurements, each with other prompts and noise, in which the orders take turns. Of the times the
            median counts.
    """

    config: str = field(default="tiny", metadata={"help": "What is measured.", "choices": ["tiny", "sd3.5-medium"]})
    num_images: int = field(default=8, metadata={"help": "Number of trajectories that are sampled together."})
    num_generations: int = field(default=8, metadata={"help": "Trajectories per prompt."})
    batch_size: int = field(default=64, metadata={"help": "Largest number of latents in one call."})
    num_inference_steps: int = field(default=10, metadata={"help": "Number of denoising steps."})
    repeats: int = field(default=12, metadata={"help": "Number of measurements; the median counts."})


def tiny_policy(prompts: list[str]) -> tuple[PipelinePolicy, Conditioning]:
    policy = PipelinePolicy(tiny.load_flow_pipeline(), guidance_scale=2.0, max_sequence_length=0)
    return policy, policy.encode(prompts)


def sd35_medium_policy(prompts: list[str]) -> tuple[PipelinePolicy, Conditioning]:
    """A pipeline of SD3.5-medium's size with random weights; the embeddings stand for its text encoders."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    torch.manual_seed(0)
    with device:
        transformer = SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
            joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
            pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        ).to(dtype)  # fmt: skip
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, scaling_factor=1.5305,
            shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
        ).to(dtype)  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(), vae=vae.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip

    def encode_prompt(prompt: list[str], **kwargs) -> tuple[torch.Tensor, ...]:
        with device:
            sequence, pooled = (
                torch.randn(len(prompt), 333, 4096, dtype=dtype),
                torch.randn(len(prompt), 2048, dtype=dtype),
            )
        return sequence, torch.zeros_like(sequence), pooled, torch.zeros_like(pooled)

    pipe.encode_prompt = encode_prompt
    policy = PipelinePolicy(pipe, guidance_scale=4.5, height=512, width=512)
    return policy, policy.encode(prompts)


def sequential(policy: PipelinePolicy, conditioning: Conditioning, prompt_index: list[int], generators, **kwargs):
    """The order of the paper's code: the trajectory first, then one completion after another."""
    trajectory = rollout(policy, conditioning, prompt_index, generators, **(kwargs | {"completions": False}))
    sigmas, size = trajectory.schedule.sigmas, kwargs["batch_size"]
    finals = []
    for k, first in enumerate(trajectory.steps):
        latents = trajectory.latents[:, k]
        for i in range(first, kwargs["num_inference_steps"]):
            parts = zip(latents.split(size), torch.tensor(prompt_index).split(size), strict=True)
            velocity = torch.cat(
                [policy.predict(part, i, conditioning[index], trajectory.schedule) for part, index in parts]
            )
            latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity
        finals.append(latents)
    return trajectory._replace(finals=torch.stack([*finals, trajectory.finals[-1]]))


def measure(
    order: Callable[..., Trajectory],
    policy: PipelinePolicy,
    conditioning: Conditioning,
    arguments: Arguments,
    turn: int,
) -> tuple[dict[str, float], torch.Tensor, list]:
    """Runs an order once: figures, final latents `(K + 1, N, ...)`, and their images, one completion after another."""
    cuda = policy.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    seeds = range(turn * arguments.num_images, (turn + 1) * arguments.num_images)
    prompt_index = [seed // arguments.num_generations for seed in seeds]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    spent = {"calls": 0, "denoiser": 0.0}

    def before(*_):
        wait()
        spent["started"] = time.perf_counter()

    def after(*_):
        wait()
        spent["calls"] += 1
        spent["denoiser"] += time.perf_counter() - spent["started"]

    hooks = [policy.denoiser.register_forward_pre_hook(before), policy.denoiser.register_forward_hook(after)]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    wait()
    started, evaluations = time.perf_counter(), policy.evaluations
    last = arguments.num_inference_steps - 1

    def transition(velocity, sample, step, schedule, **noise):
        sigma, sigma_next = schedule.sigmas[step], schedule.sigmas[step + 1]
        return flow_step(velocity, sample, sigma, sigma_next, noise_level=0.7, sigma_max=schedule.sigmas[1], **noise)

    trajectory = order(
        policy, conditioning, prompt_index, generators, num_inference_steps=arguments.num_inference_steps,
        transition=transition, steps=range(last), completions=True, batch_size=arguments.batch_size,
    )  # fmt: skip
    at_once = min(arguments.num_images if order is sequential else arguments.batch_size, arguments.batch_size)
    finals, images = trajectory.finals.flatten(0, 1), []
    rows = torch.tensor(prompt_index).repeat(len(trajectory.finals))
    for part, index in zip(finals.split(at_once), rows.split(at_once), strict=True):
        images += policy.decode(part, conditioning[index])
    wait()
    seconds = time.perf_counter() - started
    for hook in hooks:
        hook.remove()
    figures = {
        "evaluations per image": (policy.evaluations - evaluations) / arguments.num_images,
        "denoiser calls": spent["calls"],
        "seconds": seconds,
        "images per second": arguments.num_images / seconds,
        "share of the denoiser": spent["denoiser"] / seconds,
    }
    if cuda:
        figures["peak GPU memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return figures, trajectory.finals, images


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    count = arguments.num_images * arguments.repeats
    rows = tiny.load_prompts("scenes", "test").select(range(-(-count // arguments.num_generations)))
    build = tiny_policy if arguments.config == "tiny" else sd35_medium_policy
    policy, conditioning = build(list(rows["prompt"]))
    orders = {"sequential": sequential, "wavefront": rollout}
    orders |= {f"wavefront, stride {n}": partial(rollout, completion_stride=n) for n in (2, 3)}
    figures, signs = {name: [] for name in orders}, {name: [] for name in orders}
    difference, differing = 0.0, 0
    for turn in range(-1, arguments.repeats):  # the first turn warms up
        finals, images = {}, {}
        for name, order in orders.items():
            measured, finals[name], images[name] = measure(order, policy, conditioning, arguments, max(turn, 0))
            if turn >= 0:
                figures[name].append(measured)
        difference = max(difference, (finals["sequential"] - finals["wavefront"]).abs().max().item())
        pairs = zip(images["sequential"], images["wavefront"], strict=True)
        differing += sum(first.tobytes() != second.tobytes() for first, second in pairs)
        if arguments.config == "tiny" and turn >= 0:
            index = range(turn * arguments.num_images, (turn + 1) * arguments.num_images)
            examples = rows.select([i // arguments.num_generations for i in index]).to_dict()
            columns = {name: values * len(finals["wavefront"]) for name, values in examples.items()}
            for name in orders:
                scores = torch.tensor(
                    tiny.scene_reward()(images=images[name], include=columns["include"], exclude=columns["exclude"])
                )
                signs[name].append(incremental_rewards(scores.view(-1, arguments.num_images).T).sign())

    medians = {
        name: {column: statistics.median(row[column] for row in measured) for column in measured[0]}
        for name, measured in figures.items()
    }
    columns = list(medians["sequential"])
    print(f"{arguments.config}: {arguments.num_images} images at a time, T = {arguments.num_inference_steps}, batches of at "
          f"most {arguments.batch_size}, {policy.device.type}, {policy.denoiser.dtype}; medians of {arguments.repeats}\n")  # fmt: skip
    print("| order | " + " | ".join(columns) + " | speed-up |")
    print("| --- |" + " --- |" * (len(columns) + 1))
    for name, row in medians.items():
        values = [f"{row[column]:.3g}" for column in columns]
        print(f"| {name} | " + " | ".join(values) + f" | {medians['sequential']['seconds'] / row['seconds']:.2f} |")
    print(f"\nWavefront against sequential: largest difference of a final latent {difference:.1e}, "
          f"{differing} images differ in a pixel")  # fmt: skip
    if arguments.config == "tiny":
        print("\n| completion_stride | agreement of sign(r_k) |\n| --- | --- |")
        for stride, name in enumerate(list(orders)[1:], 1):
            agreement = (torch.cat(signs[name]) == torch.cat(signs["sequential"])).float().mean()
            print(f"| {stride} | {agreement:.1%} |")


if __name__ == "__main__":
    main()

# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl @ git+https://github.com/flow-trl/flow_trl"]
# ///
"""
Rollout benchmark: the wavefront against the order of the paper's code, in one run, on the same noise.

The sequential order samples the trajectory, then runs the completions one after another, each with the first velocity
computed anew. Both orders give the same images. On the tiny pipeline the script also measures how far completions with
a stride agree with exact ones in the sign of the incremental reward.

    python examples/benchmarks/rollout.py
    python examples/benchmarks/rollout.py --config sd3.5-medium --num_images 8 --batch_size 8
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import HfArgumentParser

from flow_trl import PipelinePolicy, tiny
from flow_trl.credit import incremental_rewards
from flow_trl.policy import Conditioning
from flow_trl.rewards.scene import SceneReward
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
        num_images (`int`, *optional*, defaults to `96`):
            Number of trajectories.
        num_generations (`int`, *optional*, defaults to `8`):
            Number of trajectories per prompt.
        batch_size (`int`, *optional*, defaults to `24`):
            Largest number of latents in one call of the denoiser or the decoder.
        num_inference_steps (`int`, *optional*, defaults to `10`):
            Number of denoising steps.
        repeats (`int`, *optional*, defaults to `3`):
            Number of measurements, of which the fastest counts; the orders take turns.
    """

    config: str = field(default="tiny", metadata={"help": "What is measured.", "choices": ["tiny", "sd3.5-medium"]})
    num_images: int = field(default=96, metadata={"help": "Number of trajectories."})
    num_generations: int = field(default=8, metadata={"help": "Trajectories per prompt."})
    batch_size: int = field(default=24, metadata={"help": "Largest number of latents in one call."})
    num_inference_steps: int = field(default=10, metadata={"help": "Number of denoising steps."})
    repeats: int = field(default=3, metadata={"help": "Number of measurements; the fastest counts."})


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
        embeddings = {
            name: torch.randn(len(prompts), *shape, dtype=dtype)
            for name, shape in {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)}.items()
        }
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(), vae=vae.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    negative = {f"negative_{name}": torch.zeros_like(value) for name, value in embeddings.items()}
    return PipelinePolicy(pipe, guidance_scale=4.5, height=512, width=512), Conditioning(embeddings | negative)


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
    **kwargs,
) -> tuple[dict[str, float], Trajectory, list[list]]:
    """Runs an order once: figures, trajectory and the images of each completion."""
    cuda = policy.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    prompt_index = [i // arguments.num_generations for i in range(arguments.num_images)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(arguments.num_images)]
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
        transition=transition, steps=range(last), completions=True, batch_size=arguments.batch_size, **kwargs,
    )  # fmt: skip
    images = []
    with torch.no_grad():
        for finals in trajectory.finals:
            parts = zip(
                finals.split(arguments.batch_size), torch.tensor(prompt_index).split(arguments.batch_size), strict=True
            )
            images.append([image for part, index in parts for image in policy.decode(part, conditioning[index])])
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
        "peak GPU memory, GiB": torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan"),
    }
    return figures, trajectory, images


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    rows = tiny.load_prompts("scenes", "test").select(range(-(-arguments.num_images // arguments.num_generations)))
    build = tiny_policy if arguments.config == "tiny" else sd35_medium_policy
    policy, conditioning = build(rows["prompt"])
    orders = {"sequential": sequential, "wavefront": rollout}
    strides = (2, 3) if arguments.config == "tiny" else (2,)
    orders |= {f"wavefront, stride {n}": partial(rollout, completion_stride=n) for n in strides}
    figures, finals, images = {}, {}, {}
    for _ in range(arguments.repeats):
        for name, order in orders.items():
            measured, trajectory, images[name] = measure(order, policy, conditioning, arguments)
            finals[name] = trajectory.finals
            if name not in figures or measured["seconds"] < figures[name]["seconds"]:
                figures[name] = measured

    columns = list(figures["sequential"])
    print(f"{arguments.config}: {arguments.num_images} images, T = {arguments.num_inference_steps}, "
          f"batches of {arguments.batch_size}, {policy.device.type}, {policy.denoiser.dtype}\n")  # fmt: skip
    print("| order | " + " | ".join(columns) + " | speed-up |")
    print("| --- |" + " --- |" * (len(columns) + 1))
    for name, row in figures.items():
        values = [f"{row[column]:.3g}" for column in columns]
        print(f"| {name} | " + " | ".join(values) + f" | {figures['sequential']['seconds'] / row['seconds']:.2f} |")
    difference = (finals["sequential"] - finals["wavefront"]).abs().max().item()
    print(f"\nLargest difference of a final latent, wavefront against sequential: {difference:.1e}")

    if arguments.config == "tiny":
        index = [i // arguments.num_generations for i in range(arguments.num_images)]
        examples = rows.select(index)
        signs = {}
        for name in orders:
            scores = [SceneReward()(prompts=examples["prompt"], images=part, include=examples["include"], exclude=examples["exclude"]) for part in images[name]]  # fmt: skip
            signs[name] = incremental_rewards(torch.tensor(scores).T).sign()
        print("\n| completion_stride | agreement of sign(r_k) |\n| --- | --- |")
        for name in orders:
            if name.startswith("wavefront"):
                agreement = (signs[name] == signs["sequential"]).float().mean()
                print(f"| {name.rsplit(' ', 1)[-1] if 'stride' in name else 1} | {agreement:.1%} |")


if __name__ == "__main__":
    main()

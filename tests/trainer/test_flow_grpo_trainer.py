import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl.trainer.utils import nanstd

from flow_trl.policy import PipelinePolicy
from flow_trl.transitions import flow_step
from tests import pipelines
from tests.trainer.runs import Recorder, gray, logged, make_trainer, prompts, weights


SIZE = {"height": 16, "width": 16}
FAMILIES = {
    "sd3": (pipelines.stable_diffusion_3, {"max_sequence_length": 16}),
    "flux": (pipelines.flux, {"max_sequence_length": 16}),
    "qwen": (pipelines.qwen_image, {"max_sequence_length": 32}),
    "wan": (pipelines.wan, {**SIZE, "num_frames": 1, "max_sequence_length": 16}),
}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_update_of_each_family(tmp_path, family, full):
    builder, kwargs = FAMILIES[family]
    trainer = make_trainer(
        tmp_path, method="flow", pipe=builder(), full=full, pipeline_kwargs=kwargs, max_steps=1, beta=0.1,
        generation_batch_size=8, updates_per_generation=1, learning_rate=1e-3,
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    (gradient,) = trainer.watch.gradients
    assert gradient.isfinite().all() and gradient.norm() > 1e-5
    assert not torch.equal(weights(trainer), before)
    assert logged(trainer, "ratio/max_deviation")[0] <= 1e-5
    assert logged(trainer, "kl") == [0.0]


def test_videos(tmp_path):
    seen = []

    def first_frame(prompts, images, **columns):
        seen.extend(images)
        return [gray(frames[0]) for frames in images]

    trainer = make_trainer(
        tmp_path, method="flow", pipe=pipelines.wan(), reward_funcs=first_frame, max_steps=1, log_completions=True,
        pipeline_kwargs={**SIZE, "num_frames": 5, "max_sequence_length": 16}, generation_batch_size=8,
    )  # fmt: skip
    trainer.train()
    assert [len(frames) for frames in seen] == [5] * 8
    assert {path.suffix for path in (tmp_path / "images").glob("train-000001.*")} == {".png", ".gif", ".json"}
    assert trainer.watch.gradients[0].norm() > 1e-5


def test_rewards_of_single_images_are_refused_for_videos_before_sampling(tmp_path):
    arguments = {"method": "flow", "pipe": pipelines.wan(), "reward_funcs": ["jpeg_compressibility"]}
    with pytest.raises(ValueError, match="`jpeg_compressibility` scores single images, but the pipeline makes videos"):
        make_trainer(tmp_path, pipeline_kwargs={**SIZE, "num_frames": 5, "max_sequence_length": 16}, **arguments)
    make_trainer(tmp_path, pipeline_kwargs={**SIZE, "num_frames": 1, "max_sequence_length": 16}, **arguments)


def transition_mean(x, v, s, s_next, s_1, sde_type, a=0.7):
    """Mean, standard deviation and the log-probability of the specification."""
    dt = s_next - s
    if sde_type == "sde":
        std = a * math.sqrt(s / (1 - (s_1 if s == 1 else s)))
        mean = x * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
        std = std * math.sqrt(-dt)
        return mean, std, lambda y: (-((y - mean) ** 2) / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))).mean()
    std = s_next * math.sin(a * math.pi / 2)
    mean = (1 - s_next) * (x - s * v) + math.sqrt(s_next**2 - std**2) * (x + (1 - s) * v)
    return mean, std, lambda y: -((y - mean) ** 2).mean()


@pytest.mark.parametrize(
    "sde_type, beta, epsilon, scale_rewards, full, step_weights",
    [
        ("sde", 0.0, 1.0, "group", False, "none"),
        ("sde", 0.5, 3e-4, "group", False, "none"),
        ("cps", 0.5, 1e-6, "batch", False, "none"),
        ("sde", 0.5, 3e-4, "none", True, "none"),
        ("sde", 0.5, 3e-4, "group", False, "noise"),
        ("cps", 0.0, 1e-6, "trajectory", False, "noise"),
    ],
)
def test_loss_and_gradient_by_hand(tmp_path, sde_type, beta, epsilon, scale_rewards, full, step_weights):
    """The second update of a generation, image by image and step by step, against the logged loss and the gradient."""
    G, U, T = 4, 2, 3
    recorder, expected = Recorder(), {}

    class ByHand(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                expected["loss"], expected["kl"], expected["clipped"] = by_hand()
                parameters = [p for p in trainer.pipe.transformer.parameters() if p.requires_grad]
                gradients = torch.autograd.grad(expected["loss"], parameters)
                expected["gradient"] = torch.cat([gradient.flatten() for gradient in gradients])

    def by_hand():
        generation = trainer._generation
        R = torch.tensor(recorder.rewards[-1]).view(-1, G)
        A = R - R.mean(1, keepdim=True)
        if scale_rewards != "none":
            A = A / (
                (R.std(correction=0) if scale_rewards == "batch" else R.std(1, keepdim=True, correction=0)) + 1e-4
            )
        A = A.clamp(-0.9, 0.9).flatten().tolist()
        counted = [i for i in range(1, 16, U) if R[i // G].std() > 0]  # images 1, 3, 5, ... are the second update's
        assert 0 < len(counted) < 8
        # Trained weights in the same pipeline, and a fresh pipeline as the reference.
        options = {"guidance_scale": 2.0, "max_sequence_length": 16}
        policy = PipelinePolicy(trainer.pipe, **options)
        reference = PipelinePolicy(pipelines.stable_diffusion_3(t5=False), **options)
        _, schedule, conditioning = policy.start(recorder.prompts[-1], T)
        s = schedule.sigmas.tolist()
        noise = [transition_mean(torch.zeros(1), 0, s[k], s[k + 1], s[1], sde_type)[1] for k in range(T - 1)]
        assert max(noise) > 1.1 * min(noise)
        w = [1.0] * (T - 1) if step_weights == "none" else [std * (T - 1) / sum(noise) for std in noise]
        losses, kls, clipped = [], [], []
        for i in counted:
            for k in range(T - 1):
                x, y = generation.latents[i : i + 1, k], generation.latents[i : i + 1, k + 1]
                v = policy.predict(x, k, conditioning[[i]], schedule, grad=True)
                mean, std, log_prob = transition_mean(x, v, s[k], s[k + 1], s[1], sde_type)
                rho = (log_prob(y) - generation.log_probs[i, k]).exp()
                loss = w[k] * torch.max(-A[i] * rho, -A[i] * rho.clip(1 - epsilon, 1 + epsilon))
                clipped.append(rho < 1 - epsilon if A[i] < 0 else rho > 1 + epsilon)
                v = reference.predict(x, k, conditioning[[i]], schedule)
                kl = ((mean - transition_mean(x, v, s[k], s[k + 1], s[1], sde_type)[0]) ** 2).mean() / (2 * std**2)
                losses.append(loss + beta * kl)
                kls.append(kl.item())
        return torch.stack(losses).mean(), np.mean(kls), torch.stack(clipped).float().mean().item()

    trainer = make_trainer(
        tmp_path, method="flow", reward_funcs=recorder, sde_type=sde_type, beta=beta, epsilon=epsilon,
        scale_rewards=scale_rewards, step_weights=step_weights, adv_clip_max=0.9, max_steps=2, train=prompts(4, easy=[1, 2]), full=full,
        callbacks=[ByHand()], optim="sgd", learning_rate=1.0,
    )  # fmt: skip
    trainer.train()
    gradient = trainer.watch.gradients[1]
    assert ((gradient - expected["gradient"]).norm() / gradient.norm()).item() < 1e-4
    assert gradient.norm() > 1e-4
    assert logged(trainer, "loss")[1] == pytest.approx(expected["loss"].item(), abs=1e-5)
    assert logged(trainer, "clip_ratio/region_mean")[1] == pytest.approx(expected["clipped"], abs=1e-6)
    assert (0 < expected["clipped"] < 1) == (epsilon < 1)
    if beta:
        assert logged(trainer, "kl")[0] == 0
        assert logged(trainer, "kl")[1] == pytest.approx(expected["kl"], rel=1e-3)
        assert expected["kl"] > 1e-7


@pytest.mark.parametrize(
    "config",
    [
        {"sde_type": "sde"},
        {"sde_type": "cps"},
        {"sde_type": "sde", "sde_window_size": 3, "sde_window_range": [1, 5]},
        {"sde_type": "sde", "sde_window_size": 1},
    ],
)
def test_steps_weighted_by_their_noise(tmp_path, config):
    """Weights multiply the advantages after these are clipped, and have a mean of 1."""
    generations = {}
    for step_weights in ("none", "noise"):
        trainer = make_trainer(
            tmp_path, method="flow", num_inference_steps=6, adv_clip_max=0.8, noise_level=0.6, max_steps=1,
            step_weights=step_weights, **config,
        )  # fmt: skip
        trainer.train()
        generations[step_weights] = trainer._generation
    plain, weighted = generations["none"], generations["noise"]
    assert torch.equal(plain.latents, weighted.latents) and plain.first_step == weighted.first_step
    assert plain.advantages.max() == pytest.approx(0.8)
    s, first, noise = plain.sigmas.tolist(), plain.first_step.item(), []
    for i in range(first, first + plain.advantages.shape[1]):
        step = flow_step(
            torch.ones(1, 4), torch.zeros(1, 4), s[i], s[i + 1], noise_level=0.6, sde_type=config["sde_type"],
            sigma_max=s[1], noise=torch.ones(1, 4),
        )  # fmt: skip
        noise.append(step.noise_std.item())
        if config["sde_type"] == "cps":
            assert noise[-1] == pytest.approx(s[i + 1] * math.sin(0.6 * math.pi / 2))
    expected = [std * len(noise) / sum(noise) for std in noise]
    torch.testing.assert_close(weighted.advantages, plain.advantages * torch.tensor(expected))
    assert len(noise) == 1 or max(expected) > 1.2


def generated(tmp_path, *reward_funcs, **config):
    """The advantages of a run's first generation, before they are clipped or weighted."""
    trainer = make_trainer(
        tmp_path, method="flow", reward_funcs=list(reward_funcs), max_steps=1, adv_clip_max=1e9, **config
    )
    trainer.train()
    return trainer._generation.advantages


class Scores:
    """A reward that keeps its values: a hundred times one channel, `None` for some images of some prompts."""

    def __init__(self, channel, missing=lambda number, i: False):
        self.channel, self.missing, self.kept = channel, missing, []
        self.__name__ = f"channel_{channel}"

    def __call__(self, prompts, images, number, **columns):
        values = [100 * float(np.asarray(image)[..., self.channel].mean()) / 255 for image in images]
        pairs = zip(number, range(len(values)), values, strict=True)
        values = [None if self.missing(row, i % 4) else value for row, i, value in pairs]
        self.kept.append(np.array(values, dtype=np.float64).reshape(4, 4))
        return values


@pytest.mark.parametrize("scale_rewards", ["group", "trajectory", "batch"])
def test_rewards_normalized_then_summed_by_hand(tmp_path, scale_rewards):
    # Of two prompts one image is not applicable, of another none is.
    some = Scores(1, missing=lambda number, i: number == 2 or (number < 2 and i == 1))
    rewards = [Scores(0), some]
    got = generated(
        tmp_path, *rewards, reward_weights=[0.3, -2.0], scale_rewards=scale_rewards, shuffle_dataset=False,
        multi_objective_aggregation="normalize_then_sum",
    )  # fmt: skip
    total = np.zeros((4, 4))
    for weight, reward in zip([0.3, -2.0], rewards, strict=True):
        (R,) = reward.kept
        filled = R.copy()
        for group in filled:
            present = group[~np.isnan(group)]
            group[np.isnan(group)] = present.mean() if len(present) else 0.0
        std = filled.std() if scale_rewards == "batch" else filled.std(1, keepdims=True)
        total += weight * (filled - filled.mean(1, keepdims=True)) / (std + 1e-4)
    expected = (total / (total.std() + 1e-4)).reshape(16, 1).repeat(2, axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-3)
    # What does not apply counts as an average image, so the other reward alone is left
    first = rewards[0].kept[0]
    alone = (first - first.mean(1, keepdims=True))[2]
    np.testing.assert_allclose(got[8:12, 0].numpy() / alone, got[8, 0].item() / alone[0], rtol=1e-3)


def test_normalized_then_summed_as_trl_does(tmp_path):
    """TRL takes sample standard deviations, which makes it smaller by one factor."""
    rewards, weight = [Scores(0), Scores(1), Scores(2)], torch.tensor([1.0, 0.3, -2.0])
    got = generated(
        tmp_path, *rewards, reward_weights=weight.tolist(), num_inference_steps=2,
        multi_objective_aggregation="normalize_then_sum",
    )  # fmt: skip
    assert got.shape == (16, 1)
    # As in `GRPOTrainer._generate_and_score_completions`
    rewards_per_func = torch.tensor(np.stack([reward.kept[0].flatten() for reward in rewards], axis=1))
    grouped = rewards_per_func.view(-1, 4, 3)
    mean_k = torch.nanmean(grouped, dim=1, keepdim=True)
    std_k = nanstd(grouped, dim=1, keepdim=True)
    reward_k = ((grouped - mean_k) / (std_k + 1e-4)).view(-1, 3)
    summed = (reward_k * weight.unsqueeze(0)).nansum(dim=1)
    trl = (summed - torch.nanmean(summed)) / (nanstd(summed) + 1e-4)
    torch.testing.assert_close(got[:, 0].double() * math.sqrt(15 / 16), trl, rtol=1e-3, atol=1e-3)


def test_scales_of_rewards_do_not_matter_once_normalized(tmp_path):
    def larger(prompts, images, **columns):
        return [1000 * float(np.asarray(image)[..., 1].mean()) for image in images]

    advantages = {}
    for aggregation in ("normalize_then_sum", "sum_then_normalize"):
        for green in (Scores(1), larger):
            config = {"multi_objective_aggregation": aggregation}
            advantages.setdefault(aggregation, []).append(generated(tmp_path, Scores(0), green, **config))
    a, b = advantages["normalize_then_sum"]
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    a, b = advantages["sum_then_normalize"]
    assert (a - b).abs().max() > 0.1


def test_one_reward_normalized_is_divided_once_more(tmp_path):
    plain = generated(tmp_path, Scores(0))
    again = generated(tmp_path, Scores(0), multi_objective_aggregation="normalize_then_sum")
    torch.testing.assert_close(again, plain / (plain.std(0, correction=0) + 1e-4))


def test_groups_without_differences_are_skipped_once_normalized(tmp_path):
    """Rounding in a mean of equal rewards is no advantage, also where some do not apply."""

    def constant(prompts, images, number, **columns):
        values = Scores(0)(prompts, images, number)
        return [
            None if i % 4 == 3 else 0.1 if row < 2 else value
            for i, (row, value) in enumerate(zip(number, values, strict=True))
        ]

    got = generated(
        tmp_path, constant, shuffle_dataset=False, multi_objective_aggregation="normalize_then_sum",
    )  # fmt: skip
    assert (got[:8] == 0).all() and (got[8:] != 0).any()


def test_reference_in_full_training_stays(tmp_path):
    trainer = make_trainer(tmp_path, method="flow", full=True, beta=0.1, learning_rate=1e-3, max_steps=4)
    start = copy.deepcopy(trainer.pipe.transformer.state_dict())
    trainer.train()
    reference = trainer._reference._policy.denoiser
    assert reference is not trainer.pipe.transformer
    assert all(torch.equal(reference.state_dict()[name], value) for name, value in start.items())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    kl = logged(trainer, "kl")
    assert kl[0] == 0 and min(kl[1:]) > 0


def test_adapter_is_on_after_training_with_a_reference(tmp_path):
    trainer = make_trainer(tmp_path, method="flow", beta=0.1, learning_rate=0.05)
    trainer.train()
    assert all(parameter.requires_grad for parameter in trainer._trained.values())
    generator = torch.Generator().manual_seed(0)
    image = trainer.pipe("a red circle", num_inference_steps=2, generator=generator, output_type="np").images
    generator.manual_seed(0)
    trainer.pipe.transformer.disable_adapters()
    without = trainer.pipe("a red circle", num_inference_steps=2, generator=generator, output_type="np").images
    assert np.abs(image - without).max() > 1e-3


def test_window(tmp_path):
    recorder = Recorder()
    starts = []
    trainer = make_trainer(
        tmp_path, method="flow", reward_funcs=recorder, num_inference_steps=6, sde_window_size=2,
        sde_window_range=[1, 5], max_steps=8,
    )  # fmt: skip
    generate = trainer._generate

    def watched(step):
        generate(step)
        starts.append(trainer._generation.first_step.item())
        assert trainer._generation.log_probs.shape == (16, 2)

    trainer._generate = watched
    assert trainer.args.gradient_accumulation_steps == 8 // 2 * 2
    trainer.train()
    assert len(starts) == 4 and len(set(starts)) > 1 and set(starts) <= {1, 2, 3}
    assert logged(trainer, "nfe") == [6.0] * 4
    deviations = logged(trainer, "ratio/max_deviation")
    assert max(deviations[0::2]) <= 1e-5 < min(deviations[1::2])


def test_negative_prompt_and_guidance_change_the_policy(tmp_path):
    images = []
    for config in ({}, {"negative_prompt": "blurry photo"}, {"guidance_scale": 5.0}):
        recorder = Recorder()
        make_trainer(tmp_path, method="flow", reward_funcs=recorder, max_steps=1, **config).train()
        images.append(recorder.images[0].astype(int))
    assert np.abs(images[1] - images[0]).max() > 2
    assert np.abs(images[2] - images[0]).max() > 2


def test_bf16(tmp_path):
    """LoRA weights stay in float32, and what samples is what trains, also in mixed precision."""
    pipe = pipelines.stable_diffusion_3(t5=False).to(torch.bfloat16)
    trainer = make_trainer(tmp_path, method="flow", pipe=pipe, bf16=True, max_steps=4, optim="sgd", learning_rate=1.0)
    trainer.train()
    assert all(parameter.dtype == torch.float32 for parameter in trainer._trained.values())
    assert all(gradient.isfinite().all() and gradient.norm() > 0 for gradient in trainer.watch.gradients)
    assert max(logged(trainer, "ratio/max_deviation")[0::2]) <= 1e-5
    assert max(logged(trainer, "clip_ratio/first_update")) == 0
    generation, denoiser = trainer._generation, trainer.policy.denoiser
    assert {generation.latents.dtype, generation.log_probs.dtype, generation.advantages.dtype} == {torch.float32}
    assert {weight.dtype for weight in denoiser.parameters() if not weight.requires_grad} == {torch.bfloat16}
    trainer.save_model()
    assert {weight.dtype for weight in load_file(tmp_path / "pytorch_lora_weights.safetensors").values()} == {
        torch.float32
    }


def test_bf16_of_all_weights(tmp_path):
    """The copy that the KL penalty compares with computes in the same precision: nothing has moved at the first update."""
    trainer = make_trainer(tmp_path, method="flow", full=True, bf16=True, beta=0.1, max_steps=2, learning_rate=1e-3)
    trainer.train()
    first, second = logged(trainer, "kl")
    assert first == 0 < second


def test_a_folder_as_model(tmp_path):
    pipelines.stable_diffusion_3().save_pretrained(tmp_path / "pipeline")
    trainer = make_trainer(tmp_path / "out", method="flow", pipe=str(tmp_path / "pipeline"), max_steps=1)
    trainer.train()
    expected = make_trainer(tmp_path / "out", method="flow", pipe=pipelines.stable_diffusion_3(), max_steps=1)
    expected.train()
    assert torch.equal(weights(trainer), weights(expected))

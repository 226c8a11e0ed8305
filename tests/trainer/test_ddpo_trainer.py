"""DDPO, and what it shares with TDPO-R: DDIM steps, running moments, evaluation, rewards out of domain."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from transformers import TrainerCallback

from flow_trl.callbacks import OverOptimizationCallback
from flow_trl.trainer.diffusion_trainer import sample_generator
from flow_trl.transitions import ddim_step
from tests import pipelines
from tests.trainer.runs import (
    PROMPTS,
    Recorder,
    gray,
    kept_rewards,
    logged,
    make_trainer,
    prompts,
    relative,
    weights,
)


def eval_noise(count):
    return [sample_generator("eval", row) for row in range(count)]


def draw(pipe, texts, generators, steps=2, output_type="pil"):
    """Images from a pipeline itself, as arrays."""
    images = pipe(
        texts, num_inference_steps=steps, guidance_scale=2.0, generator=generators, output_type=output_type
    ).images
    return np.stack([np.asarray(image) for image in images]).astype(float)


# Updates


@pytest.mark.parametrize("rollout_size, train_size", [(16, 2), (3, 8), (1, 4), (100, 1)])
def test_ratio_is_one_at_the_first_update_of_a_generation(tmp_path, rollout_size, train_size):
    trainer = make_trainer(
        tmp_path, method="ddpo", max_steps=3, per_device_rollout_batch_size=rollout_size,
        per_device_train_batch_size=train_size, num_inference_steps=2,
    )  # fmt: skip
    trainer.train()
    deviations = logged(trainer, "ratio/max_deviation")
    assert max(deviations[0::2]) <= 1e-5 < min(deviations[1::2])


def test_one_image_of_each_prompt(tmp_path):
    trainer = make_trainer(
        tmp_path, method="ddpo", num_generations=1, generation_batch_size=8, updates_per_generation=1, max_steps=1
    )
    before = weights(trainer)
    trainer.train()
    assert logged(trainer, "reward_std") == [0.0] and not torch.equal(weights(trainer), before)


def guided_output(pipe, x, t, texts):
    """The U-Net's output with classifier-free guidance, without the pipeline."""
    texts = [""] * len(texts) + texts
    tokens = pipe.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    negative, positive = pipe.unet(torch.cat([x, x]), t, pipe.text_encoder(tokens)[0]).sample.chunk(2)
    return negative + 2.0 * (positive - negative)


@pytest.mark.parametrize("beta, prediction_type", [(0.0, "epsilon"), (0.1, "v_prediction")])
def test_loss_and_gradient_by_hand(tmp_path, beta, prediction_type):
    """Two updates of a generation and the first of the next, step by step."""
    T, U, epsilon, min_count = 3, 2, 1e-4, 6
    recorder, kept, expected, advantages, kls = Recorder(), {}, [], [], []
    pipe = pipelines.stable_diffusion(prediction_type=prediction_type)

    class ByHand(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % U == 0:
                advantages.append(advantages_by_hand())
            losses, clipped, first = [], [], state.global_step % U
            for images in [[i, i + U] for i in range(first, 16, 2 * U)]:  # one or all at once: float32 would show
                for k in range(T):
                    A = torch.tensor(advantages[-1][images, k])
                    rho = (log_prob(images, k) - trainer._generation.log_probs[images, k]).exp()
                    losses.append(torch.max(-A * rho, -A * rho.clip(1 - epsilon, 1 + epsilon)))
                    clipped.append(torch.where(A < 0, rho < 1 - epsilon, rho > 1 + epsilon).float())
            loss = torch.cat(losses).mean()
            gradients = torch.autograd.grad(loss, [p for p in pipe.unet.parameters() if p.requires_grad])
            gradient = torch.cat([gradient.flatten() for gradient in gradients])
            expected.append((loss.item(), gradient, torch.cat(clipped).mean().item()))

    def log_prob(images, k):
        x, y, t = trainer._generation.latents[images, k], trainer._generation.latents[images, k + 1], timesteps[k]
        output = guided_output(pipe, x, t, [recorder.prompts[-1][i] for i in images])
        return ddim_step(output, x, t, scheduler, next_sample=y).log_prob

    @torch.no_grad()
    def advantages_by_hand():
        rewards, texts = recorder.rewards[-1], recorder.prompts[-1]
        for text, reward in zip(texts, rewards, strict=True):
            kept[text] = [*kept.get(text, []), reward][-8:]
        buffers = [kept[text] if len(kept[text]) >= min_count else rewards for text in texts]
        final = [(r - np.mean(b)) / (np.std(b) + 1e-6) for r, b in zip(rewards, buffers, strict=True)]
        policy = [log_prob(list(range(16)), k) for k in range(T)]
        pipe.unet.disable_adapters()
        reference = [log_prob(list(range(16)), k) for k in range(T)]
        pipe.unet.enable_adapters()
        penalties = (torch.stack(policy, dim=1) - torch.stack(reference, dim=1)).numpy()
        kls.append(penalties.mean())
        later = np.cumsum(penalties[:, ::-1], axis=1)[:, ::-1]  # of this step and those after it
        return np.clip(np.array(final)[:, None] - beta * later, -1.5, 1.5)

    trainer = make_trainer(
        tmp_path, method="ddpo", pipe=pipe, reward_funcs=recorder, train=prompts(4), beta=beta, adv_clip_max=1.5,
        per_prompt_stat_tracking_min_count=min_count, per_prompt_stat_tracking_buffer_size=8, max_steps=3,
        callbacks=[ByHand()], optim="sgd", learning_rate=1.0,
    )  # fmt: skip
    scheduler = pipelines.stable_diffusion(prediction_type=prediction_type).scheduler
    scheduler.set_timesteps(T)
    timesteps = scheduler.timesteps
    trainer.train()
    for (loss, gradient, clipped), logged_loss, actual, share in zip(
        expected, logged(trainer, "loss"), trainer.watch.gradients, logged(trainer, "clip_ratio/region_mean"),
        strict=True,
    ):  # fmt: skip
        assert logged_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert relative(actual, gradient) < 1e-5
        assert share == pytest.approx(clipped, abs=1e-6)
    assert expected[0][2] == 0 < expected[1][2] < 1
    np.testing.assert_allclose(trainer._generation.advantages, advantages[-1], atol=2e-5)
    assert {text: pytest.approx(rewards) for text, rewards in kept.items()} == kept_rewards(trainer)
    if beta:
        first, second = logged(trainer, "kl")
        assert first == 0 and second == pytest.approx(kls[1], rel=1e-3, abs=1e-6)
        assert np.abs(np.diff(advantages[0])).max() < 1e-3 < np.abs(np.diff(advantages[1])).max()
    else:
        assert not np.diff(trainer._generation.advantages).any()  # all steps have that of the image
        assert not logged(trainer, "kl")


@pytest.mark.parametrize("fraction, count", [(1.0, 4), (0.5, 2), (0.01, 1)])
def test_trained_steps_are_drawn_for_each_micro_batch(tmp_path, fraction, count):
    trainer = make_trainer(
        tmp_path, method="ddpo", num_inference_steps=4, train_timestep_fraction=fraction, max_steps=2
    )
    compute_loss, steps = trainer.compute_loss, {}

    def watched(model, inputs, **kwargs):
        steps.setdefault(tuple(inputs["images"].tolist()), []).append(inputs["step"])
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    assert sorted(sum(steps, ())) == list(range(16))
    assert all(len(set(chosen)) == len(chosen) == count for chosen in steps.values())
    assert len({tuple(chosen) for chosen in steps.values()}) > 1
    assert set().union(*steps.values()) == {0, 1, 2, 3}
    assert trainer.args.gradient_accumulation_steps == 4 * count


def test_full_training_with_a_reference(tmp_path):
    trainer = make_trainer(
        tmp_path / "out", method="ddpo", full=True, beta=0.1, learning_rate=1e-3, max_steps=3, save_strategy="steps",
        save_steps=3,
    )  # fmt: skip
    trainer.train()
    first, second = logged(trainer, "kl")
    assert first == 0 < abs(second)
    trainer.save_model()
    expected = draw(trainer.pipe, PROMPTS[:2], eval_noise(2))
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    assert isinstance(loaded, StableDiffusionPipeline)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(loaded, PROMPTS[:2], eval_noise(2)), expected)
    assert np.abs(draw(pipelines.stable_diffusion(), PROMPTS[:2], eval_noise(2)) - expected).max() > 2
    part = type(trainer.pipe.unet).from_pretrained(tmp_path / "out" / "checkpoint-3" / "unet")
    assert all(torch.equal(part.get_parameter(name), p) for name, p in trainer.pipe.unet.named_parameters())


# Sampling and evaluation


def test_images_of_a_generation_are_those_of_ddim(tmp_path):
    """Without a pipeline's loop: the noise of a sample is drawn by its own generator, step after step."""
    recorder = Recorder()
    trainer = make_trainer(tmp_path, method="ddpo", reward_funcs=recorder, max_steps=1, eta=0.7)
    trainer.train()
    pipe = pipelines.stable_diffusion()
    pipe.scheduler.set_timesteps(3)
    rows = [PROMPTS.index(prompt) for prompt in recorder.prompts[0]]
    for i in (0, 1, 15):
        generator = sample_generator(trainer.args.seed, 0, rows[i], i % 4)
        x = torch.randn(1, 4, 8, 8, generator=generator)
        for t in pipe.scheduler.timesteps:
            with torch.no_grad():
                output = guided_output(pipe, x, t, [PROMPTS[rows[i]]])
            noise = torch.randn(1, 4, 8, 8, generator=generator)
            if t > 1:  # DDIM's own step is the same, but for the last one, which it takes to `final_alpha_cumprod`
                x = pipe.scheduler.step(output, t, x, eta=0.7, variance_noise=noise).prev_sample
            else:
                x = ddim_step(output, x, t, pipe.scheduler, eta=0.7, noise=noise).next_sample
        with torch.no_grad():
            image = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
        image = 255 * (image / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
        assert np.abs(image - recorder.images[0][i]).max() < 1


def test_evaluation_is_the_pipeline_without_noise(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, method="ddpo", reward_funcs=recorder, evaluation=prompts(5), eval_num_inference_steps=4,
        learning_rate=0.05,
    )  # fmt: skip
    metrics = trainer.evaluate()
    images = np.concatenate(recorder.images).astype(float)
    assert len(recorder.images) == 2  # 4 and 1
    assert np.abs(images - draw(pipelines.stable_diffusion(), PROMPTS[:5], eval_noise(5), steps=4)).max() <= 1
    trainer.train()
    trainer.evaluate()
    after = np.concatenate(recorder.images[-2:]).astype(float)
    assert np.abs(after - draw(trainer.pipe, PROMPTS[:5], eval_noise(5), steps=4)).max() <= 1
    assert np.abs(after - images).max() > 2
    assert metrics["eval_reward"] == pytest.approx(np.concatenate(recorder.rewards[:2]).mean(), abs=1e-6)


def test_rewards_out_of_domain_are_only_evaluated(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = []

    def watched(prompts, images, **columns):
        sizes.append(len(images))
        return [1 + gray(image) for image in images]

    alone = make_trainer(tmp_path / "alone", method="ddpo")
    alone.train()
    trainer = make_trainer(
        tmp_path / "out", method="ddpo", reward_funcs=[watched, Recorder()], evaluation=prompts(3), eval_strategy="steps",
        eval_steps=1, eval_on_start=True, out_of_domain_rewards=["watched", "jpeg_compressibility"],
        callbacks=[OverOptimizationCallback()],
    )  # fmt: skip
    trainer.train()
    assert torch.equal(weights(trainer), weights(alone))
    assert sizes == [3, 3, 3]
    assert logged(trainer, "eval_reward") == logged(trainer, "eval_rewards/brightness/mean")
    for name in ("watched", "jpeg_compressibility"):
        assert len(logged(trainer, f"eval_rewards/{name}/mean")) == 3
        assert not logged(trainer, f"rewards/{name}/mean")
        falls = logged(trainer, f"eval_over_optimization/{name}")
        assert falls[0] == 0 and len(falls) == 3 and min(falls) >= 0
    np.testing.assert_allclose(
        logged(trainer, "eval_rewards/watched/mean"), 1 + np.array(logged(trainer, "eval_reward")), rtol=1e-6
    )
    assert Image.open(tmp_path / "out" / "over_optimization.png").width == 1008


def test_a_run_that_over_optimises_is_stopped(tmp_path):
    pytest.importorskip("matplotlib")
    falling = iter([1.0, 1.1, 1.0, 0.8, 0.7])  # the reward out of domain, by evaluation

    def trained(prompts, images, **columns):
        return [gray(image) for image in images]

    def watched(prompts, images, **columns):
        return [next(falling)] * 3

    trainer = make_trainer(
        tmp_path, method="ddpo", reward_funcs=[trained, watched], out_of_domain_rewards=["watched"], max_steps=8,
        evaluation=prompts(3), eval_strategy="steps", eval_steps=1, eval_on_start=True, learning_rate=0.0,
        callbacks=[OverOptimizationCallback(stop_after_fall=0.2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    assert logged(trainer, "eval_over_optimization/watched")[-1] == pytest.approx(0.3 / 1.1)


def test_a_safety_checker_is_left_out(tmp_path):
    """One that blacks out everything changes neither images nor training, and stays on the pipeline."""

    def black_out(images, clip_input):
        raise AssertionError("called")

    kept = []
    for checker in (None, black_out):
        pipe = pipelines.stable_diffusion()
        pipe.safety_checker, pipe.feature_extractor = checker, (lambda images, **kwargs: None) if checker else None
        recorder = Recorder()
        trainer = make_trainer(tmp_path, method="tdpo_r", pipe=pipe, reward_funcs=recorder, max_steps=1)
        trainer.train()
        assert trainer.pipe.safety_checker is checker
        kept.append(recorder.images[0])
    assert np.array_equal(*kept)


@pytest.mark.parametrize("full", [False, True])
def test_evaluations_of_the_reference_are_not_counted(tmp_path, full):
    trainer = make_trainer(tmp_path, method="ddpo", full=full, beta=0.1, max_steps=1, learning_rate=1e-4)
    trainer.train()
    assert logged(trainer, "nfe") == [3.0]


# Saving and resuming


SAVING = {
    "method": "ddpo",
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 6,
    "beta": 0.1,
    "train": prompts(4),
}
MOMENTS = {"per_prompt_stat_tracking_min_count": 6, "per_prompt_stat_tracking_buffer_size": 8}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    trainer = make_trainer(folder, **SAVING, **MOMENTS)
    trainer.train()
    return trainer, folder


@pytest.mark.parametrize("step", [3, 4])
def test_resumed_run_is_the_straight_one(tmp_path, straight, step):
    expected, folder = straight
    resumed = make_trainer(tmp_path, **SAVING, **MOMENTS)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert torch.equal(weights(resumed), weights(expected))
    assert kept_rewards(resumed) == kept_rewards(expected)
    assert {len(rewards) for rewards in kept_rewards(resumed).values()} == {8}
    for name in ("loss", "reward", "kl", "ratio/max_deviation"):
        assert logged(resumed, name) == logged(expected, name), name


@pytest.mark.parametrize("method, words", [("ddpo", ["DDPO", "2305.13301"]), ("tdpo_r", ["TDPO-R", "2402.08552"])])
def test_saved_lora_gives_the_trained_pipeline(tmp_path, method, words):
    trainer = make_trainer(tmp_path, method=method, learning_rate=0.05, max_steps=2)
    trainer.train()
    trainer.save_model()
    pipe = pipelines.stable_diffusion()
    before = draw(pipe, PROMPTS[:3], eval_noise(3), output_type="np")
    pipe.load_lora_weights(tmp_path)
    after = draw(pipe, PROMPTS[:3], eval_noise(3), output_type="np")
    assert np.abs(after - draw(trainer.pipe, PROMPTS[:3], eval_noise(3), output_type="np")).max() < 1e-4
    assert np.abs(after - before).max() > 0.01
    card = (tmp_path / "README.md").read_text()
    assert all(word in card for word in [*words, "| eta | 1.0 |"])
    assert ("critic.safetensors" in card) == (method == "tdpo_r")

import copy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from transformers import TrainerCallback

from flow_trl.critic import TemporalCritic, dormant_neurons
from tests import pipelines, two_processes
from tests.trainer.runs import (
    Recorder,
    averages,
    critic_moments,
    critic_weights,
    gray,
    kept_rewards,
    logged,
    make_trainer,
    pooled,
    prompts,
    relative,
    run,
    weights,
)


def watch_micro_batches(trainer):
    """A list that gets the update, the images and the step of each micro-batch."""
    compute_loss, seen = trainer.compute_loss, []

    def watched(model, inputs, **kwargs):
        seen.append((trainer.state.global_step, tuple(inputs["images"].tolist()), inputs["step"]))
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = watched
    return seen


def watch_generations(trainer):
    """A list that gets a copy of the critic and of its optimizer's state before and after each generation's sampling."""
    generate, seen = trainer._generate, []

    def watched(step):
        before = copy.deepcopy(trainer.critic), critic_moments(trainer) if step else None
        generate(step)
        seen.append((*before, copy.deepcopy(trainer.critic), critic_moments(trainer) if step else None))

    trainer._generate = watched
    return seen


# Sweeps


@pytest.mark.parametrize("updates, iterations", [(1, 1), (2, 2)])
def test_each_image_is_trained_once_at_each_step(tmp_path, updates, iterations):
    T = 3
    per_generation = updates * T * iterations
    trainer = make_trainer(
        tmp_path, method="tdpo_r", num_inference_steps=T, updates_per_generation=updates, num_iterations=iterations,
        max_steps=per_generation + 1,
    )  # fmt: skip
    seen, generations = watch_micro_batches(trainer), watch_generations(trainer)
    trainer.train()
    assert len(generations) == 2
    assert trainer.args.gradient_accumulation_steps == 8 // updates
    for passing in range(iterations):
        first = passing * updates * T
        part = [(images, step) for update, images, step in seen if first <= update < first + updates * T]
        assert sorted((i, step) for images, step in part for i in images) == [
            (i, k) for i in range(16) for k in range(T)
        ]
    for sweep in range(T):
        updates_of_sweep = range(sweep * updates, (sweep + 1) * updates)
        part = [images for update, images, _ in seen if update in updates_of_sweep]
        assert sorted(sum(part, ())) == list(range(16))
    orders = {}
    for update, images, step in seen:
        if update < updates * T:
            orders.setdefault(images, []).append(step)
    assert len({tuple(order) for order in orders.values()}) > 1  # each micro-batch has its own
    later = [step for update, images, step in seen if update >= per_generation]
    assert later != [step for update, _, step in seen if update == 0]  # and another one in the next generation


def test_ratio_is_one_in_the_first_sweep_alone(tmp_path):
    trainer = make_trainer(tmp_path, method="tdpo_r", max_steps=4)
    trainer.train()
    deviations = logged(trainer, "ratio/max_deviation")
    assert max(deviations[0], deviations[3]) <= 1e-5 < min(deviations[1:3])


def test_a_share_of_the_steps(tmp_path):
    trainer = make_trainer(tmp_path, method="tdpo_r", num_inference_steps=4, train_timestep_fraction=0.5, max_steps=3)
    seen, generations = watch_micro_batches(trainer), watch_generations(trainer)
    trainer.train()
    assert len(generations) == 2  # two updates each
    trained = [(i, step) for update, images, step in seen if update < 2 for i in images]
    assert len(set(trained)) == len(trained) == 16 * 2
    assert {step for _, step in trained} == {0, 1, 2, 3}


# The critic


@pytest.mark.parametrize("gamma, updates", [(1.0, 1), (0.9, 2)])
def test_critic_by_hand(tmp_path, gamma, updates):
    """Loss, gradient and weights of the critic and its advantages, over a generation's updates; without dropout."""
    T, clip, max_norm = 3, 1e-3, 1.0
    recorder, expected = Recorder(), []
    pipe = pipelines.stable_diffusion()

    class ByHand(TrainerCallback):
        @torch.no_grad()
        def start(self):
            generation = trainer._generation
            rewards = torch.tensor(recorder.rewards[-1])
            final = ((rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)).float()
            images = [pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample for x in generation.latents[:, :T]]
            self.embeddings = torch.stack([pooled((part / 2 + 0.5).clamp(0, 1)) for part in images])
            self.returns = torch.stack([gamma ** (T - 1 - k) * final for k in range(T)], dim=1)
            self.old = critic(self.embeddings)
            delta = self.returns - self.old
            self.advantages = (delta - delta.mean()) / delta.std(correction=0)

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                self.start()

        def on_step_end(self, args, state, control, **kwargs):
            losses = []
            for _, images, k in [entry for entry in seen if entry[0] == state.global_step - 1]:
                values = critic(self.embeddings[list(images), k])
                returns, old = self.returns[list(images), k], self.old[list(images), k]
                clipped = torch.min(torch.max(values, old - clip), old + clip)
                losses.append(0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).mean())
            loss = torch.stack(losses).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), max_norm)
            optimizer.step()
            moved = (values - old).abs().max().item()
            after = torch.cat([p.detach().flatten() for p in critic.parameters()])
            expected.append((loss.item(), norm.item(), moved, after, critic_weights(trainer), critic_moments(trainer)))

    by_hand = ByHand()
    trainer = make_trainer(
        tmp_path, method="tdpo_r", pipe=pipe, reward_funcs=recorder, gamma=gamma, updates_per_generation=updates,
        cliprange_value=clip, critic_learning_rate=1e-3, max_grad_norm=max_norm, max_steps=T * updates,
        callbacks=[by_hand],
    )  # fmt: skip
    for module in trainer.critic.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, torch.nn.Linear):
            module.weight.data *= 5  # or its values would hardly move
    seen = watch_micro_batches(trainer)
    critic = copy.deepcopy(trainer.critic)
    start = critic_weights(trainer)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    trainer.train()
    assert len(expected) == T * updates
    assert logged(trainer, "critic/loss") == [pytest.approx(entry[0], rel=1e-5) for entry in expected]
    for _, _, _, by_hands, actual, _ in expected:
        assert relative(actual - start, by_hands - start) < 1e-4
        assert relative(actual, by_hands) < 1e-5
    moments = [optimizer.state[p][name].flatten() for name in ("exp_avg", "exp_avg_sq") for p in critic.parameters()]
    assert relative(expected[-1][-1], torch.cat(moments)) < 1e-5
    norms = [entry[1] for entry in expected]
    assert min(norms) < max_norm < max(norms)  # some gradients were clipped
    assert expected[0][2] < 1e-5 and expected[-1][2] > clip  # and so were values in the end
    advantages = trainer._generation.advantages
    torch.testing.assert_close(advantages, by_hand.advantages, atol=1e-4, rtol=1e-4)
    assert advantages.mean().abs() < 1e-5 and advantages.std(correction=0) == pytest.approx(1, abs=1e-5)
    (explained,) = logged(trainer, "critic/explained_variance")
    residual = (by_hand.returns - by_hand.old).var(correction=0) / by_hand.returns.var(correction=0)
    assert explained == pytest.approx(1 - residual.item(), abs=1e-6)


def test_step_penalties_are_part_of_the_returns(tmp_path):
    trainer = make_trainer(tmp_path, method="tdpo_r", num_inference_steps=2, beta=0.1, max_steps=3)
    step_penalties, kept = trainer._step_penalties, []

    def watched(trajectory):
        kept.append(step_penalties(trajectory))
        return kept[-1]

    trainer._step_penalties = watched
    trainer.train()
    first, second = logged(trainer, "kl")
    assert first == 0 and second == pytest.approx(kept[1].mean().item() / 0.1, rel=1e-5)
    returns = trainer._critic_inputs["returns"]
    assert not kept[0].any() and kept[1].abs().min(dim=0).values.max() > 1e-6
    torch.testing.assert_close(returns[:, 1] - returns[:, 0], kept[1][:, 0], atol=1e-6, rtol=1e-4)


def test_without_a_critic_it_is_ddpo_in_sweeps(tmp_path):
    kept = {}
    for name, arguments in {
        "ddpo": {"method": "ddpo"},
        "without": {"method": "tdpo_r", "use_critic": False},
        "with": {"method": "tdpo_r"},
    }.items():
        trainer = make_trainer(tmp_path / name, max_steps=1, updates_per_generation=1, **arguments)
        trainer.train()
        trainer.save_model()
        kept[name] = trainer._generation.advantages, trainer.watch.gradients[0], trainer
    assert torch.equal(kept["without"][0], kept["ddpo"][0])
    assert not torch.equal(kept["with"][0], kept["ddpo"][0])
    assert relative(kept["without"][1], kept["ddpo"][1]) > 0.01
    assert not hasattr(kept["without"][2], "critic")
    assert not logged(kept["without"][2], "critic/loss")
    assert not (tmp_path / "without" / "critic.safetensors").exists()
    assert (tmp_path / "with" / "critic.safetensors").is_file()


def test_critic_starts_with_a_seed(tmp_path):
    first = critic_weights(make_trainer(tmp_path, method="tdpo_r", seed=1))
    torch.rand(7)
    assert torch.equal(critic_weights(make_trainer(tmp_path, method="tdpo_r", seed=1)), first)
    assert not torch.equal(critic_weights(make_trainer(tmp_path, method="tdpo_r", seed=2)), first)


def test_the_reward_s_own_encoder_is_the_critic_s(tmp_path):
    class Judged:
        __name__ = "judged"

        def __init__(self, size):
            self.size = size

        def encoder(self, images):
            return pooled(images)[:, : self.size]

        def __call__(self, prompts, images, **columns):
            return [gray(image) for image in images]

    def unjudged(prompts, images, **columns):
        return [gray(image) for image in images]

    watched, trained = Judged(7), Judged(11)
    watched.__name__ = "watched"
    trainer = make_trainer(
        tmp_path, method="tdpo_r", reward_funcs=[watched, unjudged, trained], out_of_domain_rewards=["watched"],
        critic_encoder=None, max_steps=1,
    )  # fmt: skip
    assert trainer.critic.embedding_dim == 11
    trainer.train()
    assert logged(trainer, "critic/loss")
    given = make_trainer(tmp_path, method="tdpo_r", reward_funcs=trained, critic_encoder=pooled)
    assert given.critic.embedding_dim == 48


def test_a_light_decoder_for_the_critic_alone(tmp_path):
    torch.manual_seed(0)
    decoder = AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    decoder.save_pretrained(tmp_path / "decoder")
    kept = {}
    for name in (None, str(tmp_path / "decoder")):
        trainer = make_trainer(tmp_path, method="tdpo_r", max_steps=1, critic_decoder=name)
        trainer.train()
        kept[name] = trainer
    pair = [trainer._critic_inputs["embeddings"] for trainer in kept.values()]
    assert relative(*pair) > 0.01
    light = kept[str(tmp_path / "decoder")]
    with torch.no_grad():
        images = decoder.eval().decode(light._generation.latents[:, 1] / decoder.config.scaling_factor).sample
    torch.testing.assert_close(pair[1][:, 1], pooled((images / 2 + 0.5).clamp(0, 1)), atol=1e-5, rtol=1e-4)
    assert type(light.pipe.vae).__name__ == "AutoencoderKL"


# Resets


def changed(before, after):
    """Names of the critic's parameters, and which of their entries differ."""
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    return {name: old != new for (name, old), new in pairs}


@pytest.mark.parametrize("kind", ["active", "dormant", "all", "none"])
def test_neurons_are_reset_when_it_is_due(tmp_path, kind):
    trainer = make_trainer(
        tmp_path, method="tdpo_r", num_inference_steps=2, reset_neurons=kind, reset_every=2, max_steps=5,
        generation_batch_size=8, critic_learning_rate=1e-3,
    )  # fmt: skip
    seen = watch_generations(trainer)
    trainer.train()
    dues = [any(entries.any() for entries in changed(before, after).values()) for before, _, after, _ in seen]
    assert dues == [False, False, kind != "none"]
    before, moments, after, moments_after = seen[2]
    dormant = dormant_neurons(before, trainer._critic_inputs["embeddings"])
    share = torch.cat(list(dormant.values())).float().mean().item()
    assert 0.1 < share < 0.9
    assert logged(trainer, "critic/dormant_share")[2] == pytest.approx(share, abs=1e-6)
    if kind == "none":
        assert not logged(trainer, "critic/reset_share")
        return
    chosen = {name: {"active": ~mask, "dormant": mask, "all": mask | True}[kind] for name, mask in dormant.items()}
    share = {"active": 1 - share, "dormant": share, "all": 1.0}[kind]
    assert logged(trainer, "critic/reset_share") == [pytest.approx(share, abs=1e-6)]
    where, incoming = changed(before, after), torch.zeros(48, dtype=torch.bool)
    for name, layer in after.linear_layers():
        mask = chosen.get(name, torch.zeros(layer.out_features, dtype=torch.bool))
        assert torch.equal(where[f"{name}.weight"], mask[:, None] | incoming[None, :])
        assert torch.equal(where[f"{name}.bias"], mask)
        incoming = mask
    entries = torch.cat([entries.flatten() for entries in where.values()]).repeat(2)  # of both moments
    assert moments[entries].any() and not moments_after[entries].any()
    assert torch.equal(moments_after[~entries], moments[~entries])


def test_every_reset_draws_other_weights(tmp_path):
    trainer = make_trainer(
        tmp_path, method="tdpo_r", num_inference_steps=2, reset_neurons="all", reset_every=1, max_steps=5,
        generation_batch_size=8,
    )  # fmt: skip
    seen = watch_generations(trainer)
    trainer.train()
    first, second = (after.layers[0].weight for _, _, after, _ in seen[1:])
    assert (first != second).all()


def test_equal_rewards_explain_nothing(tmp_path):
    trainer = make_trainer(
        tmp_path, method="tdpo_r", num_inference_steps=2, reward_funcs=lambda prompts, images, **columns: [0.1] * len(images),
        max_steps=1,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "frac_reward_zero_std") == [1.0] and logged(trainer, "critic/explained_variance") == [0.0]


def test_values_and_advantages_are_those_of_the_critic_after_the_reset(tmp_path):
    trainer = make_trainer(
        tmp_path, method="tdpo_r", num_inference_steps=2, reset_every=1, max_steps=3, critic_learning_rate=1e-2
    )
    seen = watch_generations(trainer)
    trainer.train()
    before, _, after, _ = seen[1]
    with torch.no_grad():
        embeddings = trainer._critic_inputs["embeddings"]
        torch.testing.assert_close(trainer._critic_inputs["values"], after.eval()(embeddings))
        assert relative(before.eval()(embeddings), after(embeddings)) > 0.1


def test_random_state_of_the_run_stays(tmp_path):
    trainer = make_trainer(tmp_path, method="tdpo_r", num_inference_steps=2, reset_every=1, max_steps=4)
    compute_loss, generate, unequal, calls = trainer.compute_loss, trainer._generate, [], []

    def unchanged(function):
        def watched(*args, **kwargs):
            state = torch.get_rng_state()
            result = function(*args, **kwargs)
            calls.append(function.__name__)
            unequal.append(not torch.equal(torch.get_rng_state(), state))
            return result

        return watched

    trainer.compute_loss, trainer._generate = unchanged(compute_loss), unchanged(generate)
    trainer.train()
    assert len(logged(trainer, "critic/reset_share")) == 1
    assert calls.count("compute_loss") == 4 * 8 and calls.count("_generate") == 2
    assert not any(unequal)


def test_dropout_is_on_and_does_not_depend_on_the_run_s_random_state(tmp_path):
    kept = []
    for dropout in (True, True, False):
        trainer = make_trainer(tmp_path, method="tdpo_r", num_inference_steps=2, max_steps=1)
        for module in trainer.critic.modules():
            if isinstance(module, torch.nn.Dropout) and not dropout:
                module.p = 0.0
        generate = trainer._generate
        trainer._generate = lambda step, generate=generate, kept=kept: (torch.manual_seed(len(kept)), generate(step))
        trainer.train()
        kept.append(critic_moments(trainer))
    assert torch.equal(kept[0], kept[1])
    assert relative(kept[2], kept[0]) > 0.01


# Batches, processes


BASE = {
    "method": "tdpo_r",
    "num_inference_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.1,
    "critic_learning_rate": 1e-3,
    "reset_every": 1,
    "beta": 0.1,
    "max_steps": 5,
    "per_device_rollout_batch_size": 4,
    "per_prompt_stat_tracking_min_count": 6,
    "per_prompt_stat_tracking_buffer_size": 8,
}
SAVING = {"save_strategy": "steps", "save_steps": 1}


def assert_same_run(result, expected, tolerance=1e-5):
    """Ratios are sensitive to the weights, so later gradients differ more than the weights do."""
    for gradient, expected_gradient in zip(result["gradients"], expected["gradients"], strict=True):
        assert relative(gradient, expected_gradient) < 10 * tolerance
    for name in {"weights", "critic"} & set(expected):
        assert relative(result[name], expected[name]) < tolerance, name
    for name in {"change", "critic_moments"} & set(expected):
        assert relative(result[name], expected[name]) < 10 * tolerance, name
    assert result["kept_rewards"].keys() == expected["kept_rewards"].keys()
    for prompt, rewards in expected["kept_rewards"].items():
        assert result["kept_rewards"][prompt] == pytest.approx(rewards, rel=1e-5)
    for entry, expected_entry in zip(result["history"], expected["history"], strict=True):
        assert entry.keys() == expected_entry.keys()
        for name in entry:
            np.testing.assert_allclose(
                entry[name], expected_entry[name], rtol=10 * tolerance, atol=tolerance, err_msg=name
            )


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    return run({"output_dir": str(tmp_path_factory.mktemp("base")), **BASE})


def test_rollout_batch_size_does_not_matter(tmp_path, base_run):
    result = run({"output_dir": str(tmp_path), **BASE, "per_device_rollout_batch_size": 3})
    assert_same_run(result, base_run, tolerance=1e-4)


@pytest.fixture(scope="module")
def two_process_runs(tmp_path_factory):
    """Four runs, one after another, in two processes; what each process saw of them."""
    folder = tmp_path_factory.mktemp("two")
    ddpo = {name: value for name, value in BASE.items() if name not in ("critic_learning_rate", "reset_every")}
    specs = [
        {"output_dir": str(folder / "tdpo_r"), **BASE, **SAVING},
        {"output_dir": str(folder / "resumed"), **BASE, "resume": str(folder / "tdpo_r" / "checkpoint-3")},
        {"output_dir": str(folder / "parts"), **BASE, "updates_per_generation": 2, "max_steps": 5},
        {"output_dir": str(folder / "ddpo"), **ddpo, "method": "ddpo", "max_steps": 4},
    ]
    return specs, two_processes.fork(run, specs, folder)


@pytest.mark.parametrize("number", [0, 2, 3], ids=["tdpo_r", "parts", "ddpo"])
def test_two_processes_train_the_same(two_process_runs, base_run, tmp_path, number):
    specs, results = two_process_runs
    first, second = results[number]
    expected = run(specs[number] | {"output_dir": str(tmp_path)}) if number else base_run
    if number < 3:
        assert any("critic/reset_share" in entry for entry in first["history"])
    for name in {"weights", "critic", "critic_moments"} & set(first):
        assert torch.equal(first[name], second[name]), name
    assert first["kept_rewards"] == second["kept_rewards"]
    assert_same_run(first, expected)
    assert relative(first["gradients"][0], expected["gradients"][0]) < 1e-6
    assert expected["change"].norm() > 1e-3


def test_two_processes_resume(two_process_runs):
    (straight, _), (resumed, other) = two_process_runs[1][:2]
    for name in ("weights", "critic", "critic_moments"):
        assert torch.equal(resumed[name], straight[name]) and torch.equal(other[name], straight[name]), name
    assert resumed["kept_rewards"] == straight["kept_rewards"]


# Saving and resuming


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    trainer = make_trainer(folder, **BASE | SAVING | {"max_steps": 8, "reset_every": 2, "ema_decay": 0.8})
    trainer.train()
    return trainer, folder


@pytest.mark.parametrize("step", [4, 5])  # before the reset, and within the generation that began with it
def test_resumed_run_is_the_straight_one(tmp_path, straight, step):
    expected, folder = straight
    resumed = make_trainer(tmp_path, **BASE | {"max_steps": 8, "reset_every": 2, "ema_decay": 0.8})
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    for read in (weights, averages, critic_weights, critic_moments):
        assert torch.equal(read(resumed), read(expected)), read.__name__
    steps = [
        {int(moments["step"]) for moments in trainer.critic_optimizer.state.values()}
        for trainer in (resumed, expected)
    ]
    assert steps == [{8}, {8}]
    assert kept_rewards(resumed) == kept_rewards(expected)
    assert len(logged(expected, "critic/reset_share")) == 1
    overlaps = logged(expected, "critic/dormant_overlap")
    assert len(overlaps) == 3 and 0 < min(overlaps) <= 1
    for name in (
        "loss", "reward", "critic/loss", "critic/dormant_overlap", "critic/dormant_share", "critic/reset_share",
        "critic/explained_variance", "kl", "ratio/max_deviation",
    ):  # fmt: skip
        assert logged(resumed, name) == logged(expected, name), name


class Scripted:
    """A reward that says in advance which evaluation is the best."""

    __name__ = "scripted"

    def __init__(self, values):
        self.values = iter(values)

    def __call__(self, prompts, images, **columns):
        return [next(self.values)] * 3 if len(prompts) == 3 else [gray(image) for image in images]


def test_best_critic_is_loaded_at_the_end(tmp_path):
    seen = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen[state.global_step] = weights(trainer), critic_weights(trainer), kept_rewards(trainer)

    trainer = make_trainer(
        tmp_path, reward_funcs=Scripted([0.1, 0.5, 0.3, 0.2]), evaluation=prompts(3), callbacks=[Keep()],
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_reward",
        **BASE | SAVING | {"max_steps": 4},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert torch.equal(weights(trainer), seen[2][0]) and torch.equal(critic_weights(trainer), seen[2][1])
    assert kept_rewards(trainer) == seen[2][2] != seen[4][2]
    assert not torch.equal(seen[2][1], seen[4][1])


def test_saved_critic_is_read_by_temporal_critic(tmp_path, straight):
    trainer, _ = straight
    trainer.save_model(str(tmp_path))
    critic = TemporalCritic(48)
    critic.load_state_dict(load_file(tmp_path / "critic.safetensors"))
    embeddings = torch.rand(4, 48)
    assert torch.equal(critic.eval()(embeddings), copy.deepcopy(trainer.critic).eval()(embeddings))
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_full_training_saves_pipeline_and_critic(tmp_path):
    trainer = make_trainer(tmp_path, method="tdpo_r", full=True, learning_rate=1e-3, beta=0.1, max_steps=2)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "model_index.json").is_file() and (tmp_path / "critic.safetensors").is_file()
    assert "2402.08552" in (tmp_path / "README.md").read_text()


# Models, logs


@pytest.mark.parametrize(
    "build",
    [pipelines.stable_diffusion_xl, lambda: pipelines.stable_diffusion(prediction_type="v_prediction")],
    ids=["SDXL", "v-prediction"],
)
def test_other_diffusion_models(tmp_path, build):
    trainer = make_trainer(tmp_path, method="tdpo_r", pipe=build(), num_inference_steps=2, generation_batch_size=8)
    start, critic = weights(trainer), critic_weights(trainer)
    trainer.train()
    first, second = logged(trainer, "ratio/max_deviation")
    assert first <= 1e-5 < second
    assert all(gradient.isfinite().all() and gradient.norm() > 1e-5 for gradient in trainer.watch.gradients)
    assert not torch.equal(weights(trainer), start) and not torch.equal(critic_weights(trainer), critic)


def test_bf16(tmp_path):
    """What is trained stays in float32, and what samples is what trains, also in mixed precision."""
    pipe = pipelines.stable_diffusion().to(torch.bfloat16)
    trainer = make_trainer(
        tmp_path, method="tdpo_r", pipe=pipe, bf16=True, num_inference_steps=2, max_steps=3, optim="sgd",
        learning_rate=1.0,
    )  # fmt: skip
    trainer.train()
    assert {parameter.dtype for parameter in [*trainer.critic.parameters(), *trainer._trained.values()]} == {
        torch.float32
    }
    assert all(gradient.isfinite().all() and gradient.norm() > 0 for gradient in trainer.watch.gradients)
    assert max(logged(trainer, "ratio/max_deviation")[0::2]) <= 1e-5


def test_metrics_of_an_update(tmp_path):
    trainer = make_trainer(tmp_path, method="tdpo_r", num_inference_steps=2, beta=0.1, reset_every=1, max_steps=3)
    trainer.train()
    first, second, third = [entry for entry in trainer.state.log_history if "loss" in entry]
    update = {"loss", "grad_norm", "learning_rate", "ratio/max_deviation", "time/update", "epoch", "step"}
    update |= {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "critic/loss"}
    update |= {"total_nfe", "total_reward_calls"}
    generation = {"reward", "reward_std", "rewards/brightness/mean", "rewards/brightness/std", "frac_reward_zero_std"}
    generation |= {"ratio/first_max_deviation", "clip_ratio/first_update"}
    generation |= {"nfe", "reward_calls", "time/critic", "kl"}
    generation |= {"time/sampling", "time/decoding", "time/reward", "time/reward_wait"}
    generation |= {"critic/explained_variance", "critic/dormant_share"}
    assert first.keys() == update | generation
    assert second.keys() == update
    assert third.keys() == update | generation | {"critic/dormant_overlap", "critic/reset_share"}

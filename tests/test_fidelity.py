"""Fidelity of credits, on a flow whose true advantages are known in closed form, and on a small pipeline."""

import io
import math

import numpy as np
import pandas as pd
import pytest
import torch

from flow_trl.fidelity import CreditFidelity, credit_fidelity
from tests.trainer.runs import make_trainer, prompts, weights


FOLLOWED = ["incremental", "turning_point", "consistent", "control_variate", "outcome_control_variate"]


def fidelity_of(found, credit, stride):
    """Squared correlation of each step."""
    (row,) = found.table.index[(found.table["credit"] == credit) & (found.table["stride"] == stride)]
    return found.steps.loc[row].to_numpy()


# A linear flow: the velocity is a multiple of the latents and the reward one number of the final ones, so that all rewards,
# completions and true advantages are those of a Gaussian walk.

VELOCITY, T, GROUP, PROMPTS, CONTINUATIONS = -0.5, 4, 32, 8, 8


class LinearFlow:
    """Makes a trainer's pipeline linear. Final latents pass as bytes through images of two pixels, exactly."""

    def __init__(self, trainer):
        self.trainer, self.calls, self.policy = trainer, [], trainer.policy
        shape = self.policy.start(["a red circle"], T).latents.shape[1:]
        self.direction = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.direction /= self.direction.norm()
        self.policy.predict, self.policy.decode = self.predict, self.decode

    def predict(self, latents, step_index, conditioning, schedule, *, grad=False):
        self.policy.evaluations += len(latents)
        return VELOCITY * latents

    def decode(self, latents, conditioning, output_type):
        numbers = (latents * self.direction).flatten(1).sum(1).float().numpy()
        pixels = np.zeros((len(numbers), 6), dtype=np.uint8)
        pixels[:, :4] = numbers[:, None].view(np.uint8)
        return torch.from_numpy(pixels.reshape(-1, 1, 2, 3))

    def coefficients(self):
        """Of each step: what remains of the number (stochastic, deterministic), and its noise."""
        s = self.policy.start(["a red circle"], T).schedule.sigmas.tolist()
        drift, ode, noise = [], [], []
        for i in range(T):
            dt = s[i + 1] - s[i]
            ode.append(1 + VELOCITY * dt)
            if i < T - 1:
                std = 0.7 * math.sqrt(s[i] / (1 - (s[1] if s[i] == 1 else s[i])))
                drift.append(1 + std**2 / (2 * s[i]) * dt + VELOCITY * (1 + std**2 * (1 - s[i]) / (2 * s[i])) * dt)
                noise.append(std * math.sqrt(-dt))
        return drift, ode, noise


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """What is found for the linear flow, the flow, and the rewards of each call."""
    calls = []

    def number(prompts, images, number, **columns):
        values = [np.asarray(image).tobytes()[:4] for image in images]
        values = [
            float(np.frombuffer(value, np.float32)[0]) + 3 * row for value, row in zip(values, number, strict=True)
        ]
        calls.append(np.float32(values).astype(np.float64))
        return values

    trainer = make_trainer(
        tmp_path_factory.mktemp("linear"), reward_funcs=number, num_inference_steps=T, num_generations=GROUP,
        generation_batch_size=2 * GROUP, per_device_rollout_batch_size=GROUP * PROMPTS, noise_level=0.7,
    )  # fmt: skip
    flow = LinearFlow(trainer)
    found = credit_fidelity(
        trainer, num_prompts=PROMPTS, num_continuations=CONTINUATIONS, strides=(1, 2, "jump"), disable_tqdm=True
    )
    return found, flow, calls


def test_the_truth_is_that_of_a_gaussian_walk(linear):
    """Against the closed form; nothing but the formulas of a step is shared with what is tested."""
    found, flow, _ = linear
    drift, ode, noise = flow.coefficients()
    K = T - 1
    # The share of the state after step k (from 1) that is left in the sampled image, and in the completion
    sampled = [math.prod(drift[k:]) * ode[-1] for k in range(K + 1)]
    completed = [math.prod(ode[k:]) for k in range(K + 1)]
    effect = [(sampled[k + 1] * noise[k]) ** 2 for k in range(K)]  # the variance that each step gives the final reward
    state = [1.0]  # variance of the number before each step; of the initial noise it is 1
    for k in range(K):
        state.append(drift[k] ** 2 * state[k] + noise[k] ** 2)
    total = sampled[0] ** 2 + sum(effect)
    for k in range(K):
        own = (completed[k + 1] * noise[k]) ** 2
        rest = completed[k + 1] * drift[k] - completed[k]
        expected = {
            ("outcome", "-"): effect[k] / total,
            ("incremental", 1): own / (own + rest**2 * state[k]),
            ("control_variate", 1): 1.0,  # all that was known before the step is subtracted
            ("control_variate", 2): 1.0,
            ("outcome_control_variate", 1): effect[k] / sum(effect[k:]),
            ("outcome_control_variate", "jump"): effect[k] / sum(effect[k:]),
        }
        after, before = sum(effect[k + 1 :]), sum(effect[k:])
        ceiling = effect[k] / (effect[k] + (after + before) / CONTINUATIONS)
        assert found.ceiling[k] == pytest.approx(ceiling, abs=0.1)
        for (credit, stride), value in expected.items():
            got = fidelity_of(found, credit, stride)[k]
            assert got == pytest.approx(value * ceiling, abs=0.1), (credit, stride, k)  # of 256 images
    # Otherwise the comparison says little
    assert effect[0] / total < 0.5 and effect[1] / sum(effect[1:]) < 0.85 and found.ceiling[0] < 0.97


def slow_step_rewards(R, credit):
    """Credits of rewards (N, K + 1), as the papers write them."""
    K, groups = R.shape[1] - 1, R.reshape(PROMPTS, GROUP, -1)
    if credit == "incremental":
        return np.diff(R, axis=1)
    y, centred = np.zeros((PROMPTS, GROUP, K)), groups - groups.mean(1, keepdims=True)
    for g in range(PROMPTS):
        others = np.arange(PROMPTS) != g
        for k in range(K):
            after = K if credit == "outcome_control_variate" else k + 1
            c, c_before = centred[others, :, after].flatten(), centred[others, :, k].flatten()
            y[g, :, k] = groups[g, :, after] - (c @ c_before) / (c_before @ c_before) * groups[g, :, k]
    return y.reshape(-1, K)


def test_the_table_follows_from_the_rewards(linear):
    """Every number again, in numpy, from what the reward function returned."""
    found, _, calls = linear
    N, K = PROMPTS * GROUP, T - 1
    assert [len(call) for call in calls] == [N] * (1 + CONTINUATIONS * K + 3 * (K + 1))
    outcome, continued = calls[0], calls[1 : 1 + CONTINUATIONS * K]
    continued = np.concatenate(continued).reshape(K, N, CONTINUATIONS)
    completions = {
        stride: np.stack(calls[first : first + K + 1], axis=1)
        for stride, first in zip((1, 2, "jump"), range(1 + CONTINUATIONS * K, len(calls), K + 1), strict=True)
    }
    for rewards in completions.values():
        np.testing.assert_allclose(rewards[:, -1], outcome, atol=1e-5)  # the same images
    values = np.concatenate([continued.mean(2), outcome[None]]).T
    centred = lambda y: (y - y.reshape(PROMPTS, GROUP, -1).mean(1).repeat(GROUP, axis=0)).reshape(PROMPTS, GROUP, -1)  # noqa: E731
    truth = centred(np.diff(values, axis=1))

    def squared(y, groups=slice(None)):
        a, b = centred(y)[groups].reshape(-1, K), truth[groups].reshape(-1, K)
        return (a * b).sum(0) ** 2 / ((a**2).sum(0) * (b**2).sum(0))

    credits = {("outcome", "-"): outcome[:, None].repeat(K, axis=1)}
    for stride, R in completions.items():
        for credit in FOLLOWED[3:] + ["incremental"] if stride != "jump" else FOLLOWED[4:]:
            credits[credit, stride] = slow_step_rewards(R, credit)
    rng = np.random.default_rng(1)
    draws = rng.integers(PROMPTS, size=(2000, PROMPTS))
    base = np.array([squared(credits["outcome", "-"], draw).mean() for draw in draws])
    for (credit, stride), y in credits.items():
        np.testing.assert_allclose(fidelity_of(found, credit, stride), squared(y), rtol=1e-4, err_msg=credit)
        (row,) = found.table[(found.table["credit"] == credit) & (found.table["stride"] == stride)].itertuples()
        assert row.fidelity == pytest.approx(squared(y).mean(), rel=1e-4)
        drawn = np.array([squared(y, draw).mean() for draw in draws])
        assert row.fidelity_se == pytest.approx(drawn.std(), rel=0.15)
        cheaper = (T + 3 * K) / (row.evaluations + 3 * K)  # an update of a step takes three evaluations
        ratio = row.fidelity / found.table["fidelity"][0]
        assert row.per_evaluation == pytest.approx(ratio * cheaper)
        assert row.per_evaluation_se == pytest.approx((drawn / base).std() * cheaper, rel=0.15, abs=1e-12)
        assert row.per_second == pytest.approx(ratio * found.table["seconds"][0] / row.seconds)
        assert (row.per_second_se * row.per_evaluation) == pytest.approx(row.per_evaluation_se * row.per_second)


def test_costs(linear):
    found, _, _ = linear
    table = found.table
    rows = [("outcome", "-"), *[(credit, stride) for stride in (1, 2) for credit in FOLLOWED]]
    rows.append(("outcome_control_variate", "jump"))
    assert list(zip(table["credit"], table["stride"], strict=True)) == rows
    evaluations = {"-": T, 1: T * (T + 1) / 2, 2: T + 1 + 1 + 0, "jump": T}
    assert [evaluations[stride] for stride in table["stride"]] == table["evaluations"].tolist()
    assert table["images"].tolist() == [1] + [T] * (len(rows) - 1)
    assert list(found.steps.columns) == ["step_1", "step_2", "step_3"]
    np.testing.assert_allclose(found.steps.mean(axis=1), table["fidelity"])
    outcome = table.loc[0]
    assert outcome["per_evaluation"] == outcome["per_second"] == 1
    assert outcome["per_evaluation_se"] == outcome["per_second_se"] == 0
    assert (table["seconds"] > 0).all() and np.isfinite(
        table.drop(columns=["credit", "stride"]).astype(float)
    ).all().all()


# A pipeline as it is


ARGUMENTS = {"num_prompts": 2, "num_continuations": 2, "strides": (1, "jump"), "disable_tqdm": True}


def test_continuations_start_where_the_trajectories_were(tmp_path):
    trainer, seen = make_trainer(tmp_path, per_device_rollout_batch_size=16), []
    transition = trainer._transition

    def watched(output, sample, step, schedule, **kwargs):
        seen.append((step, sample, kwargs["noise"]))
        return transition(output, sample, step, schedule, **kwargs)

    trainer._transition = watched
    credit_fidelity(trainer, **ARGUMENTS)
    # Steps of the trajectories, of continuations from each, of both kinds of completions
    assert [step for step, _, _ in seen] == [0, 1, 0, 1, 1, 0, 1, 0, 1]
    (_, x_0, z_0), (_, x_1, z_1) = seen[:2]
    for i, (x, z) in {2: (x_0, z_0), 4: (x_1, z_1)}.items():
        assert torch.equal(seen[i][1], x.repeat_interleave(2, dim=0))
        noise = torch.cat([z, seen[i][2]]).flatten(1)
        assert torch.unique(noise, dim=0).shape[0] == 8 + 16  # fresh for each
    assert not torch.equal(seen[3][2], seen[4][2])
    for i in (5, 7):
        assert torch.equal(seen[i][1], x_0) and torch.equal(seen[i][2], z_0)
        torch.testing.assert_close(seen[i + 1][1], x_1, rtol=1e-5, atol=1e-5)


def untimed(found):
    return found.table[["credit", "stride", "fidelity", "fidelity_se", "evaluations", "images", "per_evaluation"]]


def test_it_is_deterministic_and_leaves_the_trainer_as_it_is(tmp_path):
    measured, straight = make_trainer(tmp_path / "a", max_steps=2), make_trainer(tmp_path / "b", max_steps=2)
    measured.model.train()
    start, state = weights(measured), torch.get_rng_state()
    first, second = credit_fidelity(measured, **ARGUMENTS), credit_fidelity(measured, **ARGUMENTS)
    pd.testing.assert_frame_equal(untimed(first), untimed(second))
    pd.testing.assert_frame_equal(first.steps, second.steps)
    assert first.ceiling == second.ceiling
    assert first.table["evaluations"].tolist() == [3] + [6] * 5 + [3]
    assert torch.equal(weights(measured), start) and torch.equal(torch.get_rng_state(), state)
    assert measured.model.training and not measured._metrics and measured.state.global_step == 0
    assert not measured.state.log_history and not list((tmp_path / "a").rglob("*"))
    for trainer in (measured, straight):
        trainer.train()
    assert torch.equal(weights(measured), weights(straight))
    other = credit_fidelity(measured, **ARGUMENTS, seed=1)  # after training too
    assert not np.allclose(other.steps, first.steps)
    assert torch.equal(weights(measured), weights(straight)) and measured.state.global_step == 2


def test_chunks_do_not_matter(tmp_path):
    found = [
        credit_fidelity(make_trainer(tmp_path, reward_funcs=smooth, per_device_rollout_batch_size=size), **ARGUMENTS)
        for size in (3, 16)
    ]
    np.testing.assert_allclose(found[0].steps, found[1].steps, rtol=0.02, atol=0.02)


def smooth(prompts, images, **columns):
    return [float(np.asarray(image).mean()) for image in images]


def test_a_window_of_steps(tmp_path):
    trainer = make_trainer(tmp_path, num_inference_steps=5, sde_window_size=2, sde_window_range=[1, 3])
    found = credit_fidelity(trainer, **ARGUMENTS)
    assert list(found.steps.columns) == ["step_1", "step_2"]
    assert found.table["evaluations"].tolist() == [5] + [5 + 3 + 2] * 5 + [5]
    assert found.table["per_evaluation"][6] == pytest.approx(found.table["fidelity"][6] / found.table["fidelity"][0])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"num_prompts": 1}, "`num_prompts=1`: it must be at least 2"),
        ({"num_prompts": 9}, "`num_prompts=9`.* at most 8"),
        ({"num_continuations": 1}, "`num_continuations=1`: use at least 2"),
        ({"strides": (1, 0)}, r"`strides=\(1, 0\)` has 0: .* or 'jump'"),
        ({"strides": ("leap",)}, r"has 'leap'"),
        ({"strides": (1.5,)}, r"has 1.5"),
    ],
)
def test_errors(tmp_path, arguments, words):
    def never(prompts, images, **columns):
        raise AssertionError("sampled before it was checked")

    with pytest.raises(ValueError, match=words):
        credit_fidelity(make_trainer(tmp_path, reward_funcs=never), **ARGUMENTS | arguments)


def test_a_trainer_of_diffusion_pipelines(tmp_path):
    with pytest.raises(TypeError, match="`trainer` is a DDPOTrainer: pass a TPGRPOTrainer or a FlowGRPOTrainer"):
        credit_fidelity(make_trainer(tmp_path, "ddpo"), num_prompts=2)


def test_a_reward_that_fails_says_so_itself(tmp_path):
    def broken(images, **columns):
        raise KeyError("no such judge")

    with pytest.raises(KeyError, match="no such judge"):
        credit_fidelity(make_trainer(tmp_path, reward_funcs=broken), num_prompts=2, disable_tqdm=True)


def test_rewards_that_never_differ_are_an_error(tmp_path):
    trainer = make_trainer(tmp_path, train=prompts(easy=range(8)))  # `brightness` gives them all the same
    with pytest.raises(ValueError, match="All 4 images of each of the 2 prompts got the same reward"):
        credit_fidelity(trainer, **ARGUMENTS)


@pytest.mark.parametrize("training", [True, False])
def test_an_error_leaves_the_model_as_it_was(tmp_path, training):
    trainer = make_trainer(tmp_path, train=prompts(easy=range(8)))
    trainer.model.train(training)
    with pytest.raises(ValueError):
        credit_fidelity(trainer, **ARGUMENTS)
    assert trainer.model.training == training


# Advice and the figure


def constructed(*rows, ceiling=(0.9, 0.8)):
    columns = ["credit", "stride", "fidelity", "fidelity_se", "evaluations", "per_second", "per_second_se", "seconds"]
    table = pd.DataFrame([(*row[:2], 0.1, 0.01, 10, *row[2:], 1.0) for row in rows], columns=columns)
    return CreditFidelity(
        table, pd.DataFrame(np.full((len(rows), 2), 0.1), columns=["step_1", "step_2"]), list(ceiling)
    )


OUTCOME = ("outcome", "-", 1.0, 0.0)
NOT_WORTH, NOR, NOISY = "not worth it here", "Nor are images", "mostly noise"


@pytest.mark.parametrize(
    "rows, words, absent",
    [
        (  # completions are worth their price
            [OUTCOME, ("control_variate", 2, 5.0, 0.3), ("outcome_control_variate", "jump", 2.0, 0.3)],
            ["credit='control_variate', completion_stride=2, 5.0 ± 0.3 times"],
            [NOT_WORTH, NOR, NOISY, "FlowGRPOTrainer"],
        ),
        (  # a jump is best
            [OUTCOME, ("control_variate", 2, 2.0, 0.3), ("outcome_control_variate", "jump", 4.0, 0.5)],
            ["credit='outcome_control_variate', completion_stride='jump', 4.0 ± 0.5", NOT_WORTH],
            [NOR, NOISY, "FlowGRPOTrainer"],
        ),
        (  # it does as well within the error
            [OUTCOME, ("control_variate", 1, 3.0, 0.3), ("outcome_control_variate", "jump", 2.6, 0.3)],
            ["credit='control_variate', completion_stride=1, 3.0", "'jump' does as well within the error"],
            [NOR, "FlowGRPOTrainer"],
        ),
        (  # nothing is worth anything
            [OUTCOME, ("control_variate", 1, 0.6, 0.1), ("outcome_control_variate", "jump", 0.9, 0.1)],
            ["credit='outcome', 1.0 ± 0.0 times", NOT_WORTH, NOR, "FlowGRPOTrainer"],
            [NOISY, "completion_stride"],
        ),
        (  # a jump is not, completions are
            [OUTCOME, ("consistent", 1, 4.0, 0.1), ("outcome_control_variate", "jump", 0.9, 0.1)],
            ["credit='consistent', completion_stride=1, 4.0"],
            [NOT_WORTH, NOR, "FlowGRPOTrainer"],
        ),
        (  # jumps were not measured
            [OUTCOME, ("consistent", 1, 0.5, 0.1)],
            ["credit='outcome'", NOT_WORTH, "FlowGRPOTrainer"],
            [NOR, "jump", "straight"],
        ),
    ],
)  # fmt: skip
def test_advice(rows, words, absent):
    text = constructed(*rows).advice()
    assert all(word in text for word in words), text
    assert not any(word in text for word in absent), text


@pytest.mark.parametrize("ceiling, noisy", [((0.9, 0.29), True), ((0.9, 0.3), False), ((-0.5, 0.9), True)])
def test_advice_if_the_truth_is_noise(ceiling, noisy):
    assert (NOISY in constructed(OUTCOME, ceiling=ceiling).advice()) == noisy


def test_figure(linear):
    pytest.importorskip("matplotlib")
    found, _, _ = linear
    figure = found.figure()
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["denoiser evaluations per image, with 9 for the update", "seconds per image"]
    table = found.table
    for axes, cost in zip(figure.axes, (table["evaluations"] + 9, table["seconds"]), strict=True):
        assert len(axes.containers) == table["credit"].nunique() == 6
        for (credit, rows), container in zip(table.groupby("credit", sort=False), axes.containers, strict=True):
            assert container.get_label() == credit
            x, y = container.lines[0].get_data(orig=False)
            np.testing.assert_allclose(x, cost[rows.index])
            np.testing.assert_allclose(y, rows["fidelity"])
        assert [text.get_text() for text in axes.texts].count("jump") == 1
        assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")

import numpy as np
import pytest
import torch

from flow_trl.credit import group_advantages, turning_point_rewards
from flow_trl.policy import PipelinePolicy
from tests import pipelines
from tests.trainer.runs import Recorder, averages, brightness, gray, logged, make_trainer, weights


def train_and_keep(tmp_path, **kwargs):
    """A trainer after its first update, the rewards (N, K + 1) and the advantages (N, K) of its generation."""
    recorder = Recorder()
    trainer = make_trainer(tmp_path, reward_funcs=recorder, max_steps=1, **kwargs)
    trainer.train()
    return (
        trainer,
        torch.tensor(np.stack(recorder.rewards, axis=1), dtype=torch.float32),
        trainer._generation.advantages,
    )


def test_outcome_is_flow_grpo(tmp_path):
    outcome = make_trainer(tmp_path / "tp", credit="outcome", beta=0.1, max_steps=3)
    flow = make_trainer(tmp_path / "flow", method="flow", beta=0.1, max_steps=3)
    for trainer in (outcome, flow):
        trainer.train()
    assert torch.equal(weights(outcome), weights(flow))
    assert torch.equal(averages(outcome), averages(flow))
    assert logged(outcome, "nfe") == logged(flow, "nfe") == [3.0, 3.0]
    assert logged(outcome, "reward_calls") == [1.0, 1.0]
    assert not logged(outcome, "turning_points/step_1")


def by_hand(rewards, consistent):
    """Step rewards and counted steps of the specification in loops, before balancing."""
    N, K = rewards.shape[0], rewards.shape[1] - 1
    R = rewards.tolist()
    counted = np.zeros((N, K), dtype=bool)
    for n in range(N):
        D = np.sign(R[n][K] - R[n][0])
        r = [None] + [R[n][k] - R[n][k - 1] for k in range(1, K + 1)]
        for k in range(1, K + 1):
            counts = np.sign(r[k]) * D > 0 and (k == 1 or np.sign(r[k - 1]) * D < 0)
            follows = np.sign(r[k]) * np.sign(R[n][K] - R[n][k]) > 0
            if consistent:
                counts = follows and (k == 1 or counts)
            counted[n, k - 1] = counts
    # Balancing
    up, down = (
        [(n, k) for n, k in zip(*counted.nonzero(), strict=True) if s * (R[n][K] - R[n][0]) > 0] for s in (1, -1)
    )
    if up and down:
        size = min(len(up), len(down))
        kept = [sorted(kind, key=lambda nk: -abs(R[nk[0]][K] - R[nk[0]][0]))[:size] for kind in (up, down)]
        counted[:] = False
        for n, k in kept[0] + kept[1]:
            counted[n, k] = True
    step = np.array([[R[n][k] - R[n][k - 1] for k in range(1, K + 1)] for n in range(N)])
    long = np.array([[R[n][K] - R[n][k - 1] for k in range(1, K + 1)] for n in range(N)])
    return np.where(counted, long, step), counted


@pytest.mark.parametrize("credit", ["incremental", "turning_point", "consistent"])
def test_advantages(tmp_path, credit):
    trainer, rewards, advantages = train_and_keep(tmp_path, credit=credit, num_inference_steps=5, adv_clip_max=1.5)
    assert rewards.shape == (16, 5)
    step_rewards, counted = by_hand(rewards, credit == "consistent")
    if credit == "incremental":
        step_rewards = np.diff(rewards.numpy(), axis=1)
    else:
        assert 2 < counted.sum() < counted.size
        points = turning_point_rewards(rewards, consistent=credit == "consistent")
        np.testing.assert_array_equal(points.aggregated, counted)
    groups = step_rewards.reshape(4, 4, 4)
    expected = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-4)
    expected = expected.clip(-1.5, 1.5).reshape(16, 4)
    np.testing.assert_allclose(advantages, expected, atol=2e-3)  # float32 rewards over a std that may be small
    torch.testing.assert_close(
        advantages, group_advantages(torch.tensor(step_rewards), 4).clamp(-1.5, 1.5).float(), atol=2e-3, rtol=1e-3
    )
    assert len({tuple(row) for row in advantages.T.tolist()}) == 4  # each step has its own
    for k in range(1, 5):
        (incremental,) = logged(trainer, f"incremental_reward/step_{k}")
        assert incremental == pytest.approx((rewards[:, k] - rewards[:, k - 1]).mean().item(), abs=1e-6)
        share = logged(trainer, f"turning_points/step_{k}")
        assert share == ([] if credit == "incremental" else [pytest.approx(counted[:, k - 1].mean(), abs=1e-6)])
    assert logged(trainer, "reward") == [pytest.approx(rewards[:, -1].mean().item(), abs=1e-6)]


def control_variates_by_hand(R, outcome):
    """Step rewards (N, K), beta (4, K) and correlations (K,) of rewards (N, K + 1) in 4 groups, by least squares."""
    R = np.asarray(R, dtype=np.float64).reshape(4, 4, -1)
    centred, K = R - R.mean(1, keepdims=True), R.shape[2] - 1
    y, beta, correlation = np.zeros((4, 4, K)), np.zeros((4, K)), np.zeros(K)
    for k in range(K):
        after = K if outcome else k + 1
        for g in range(4):
            others = [other for other in range(4) if other != g]
            before = centred[others, :, k].reshape(-1, 1)
            (beta[g, k],), *_ = np.linalg.lstsq(before, centred[others, :, after].flatten(), rcond=None)
            y[g, :, k] = R[g, :, after] - beta[g, k] * R[g, :, k]
        correlation[k] = np.corrcoef(centred[..., after].flatten(), centred[..., k].flatten())[0, 1]
    return y.reshape(16, K), beta, correlation


def normalized_by_hand(y, scale):
    """Advantages (N, K) of step rewards in 4 groups."""
    groups = y.reshape(4, 4, -1)
    A = groups - groups.mean(1, keepdims=True)
    std = A.std(1, keepdims=True) if scale == "group" else np.sqrt((A**2).mean((1, 2), keepdims=True))
    return (A / (std + 1e-4)).reshape(16, -1)


@pytest.mark.parametrize(
    "credit, stride, scale, outcome",
    [
        ("control_variate", 1, "group", False),
        ("control_variate", 2, "trajectory", False),
        ("outcome_control_variate", 1, "trajectory", True),
        ("control_variate", "jump", "trajectory", True),
        ("outcome_control_variate", "jump", "group", True),
    ],
)
def test_control_variates(tmp_path, credit, stride, scale, outcome):
    trainer, rewards, advantages = train_and_keep(
        tmp_path, credit=credit, completion_stride=stride, scale_rewards=scale, num_inference_steps=5,
        adv_clip_max=1.5,
    )  # fmt: skip
    assert rewards.shape == (16, 5)
    y, beta, correlation = control_variates_by_hand(rewards, outcome)
    expected = normalized_by_hand(y, scale)
    assert 0 < (np.abs(expected) > 1.5).mean() < 0.5
    np.testing.assert_allclose(advantages, expected.clip(-1.5, 1.5), atol=2e-3)
    # Neither the outcome's nor the incremental reward would do
    for other in (rewards[:, -1:].expand(-1, 4), rewards.diff(dim=1)):
        assert np.abs(normalized_by_hand(other.numpy(), scale).clip(-1.5, 1.5) - advantages.numpy()).max() > 0.1
    for k in range(1, 5):
        assert logged(trainer, f"control_variate/beta_{k}") == [pytest.approx(beta[:, k - 1].mean(), abs=1e-5)]
        assert logged(trainer, f"control_variate/correlation_{k}") == [pytest.approx(correlation[k - 1], abs=1e-5)]
    (entry,) = [entry for entry in trainer.state.log_history if "nfe" in entry]
    assert not [name for name in entry if name.startswith(("turning_points", "incremental_reward"))]
    assert len([name for name in entry if name.startswith("control_variate/")]) == 2 * 4
    assert trainer.watch.gradients[0].norm() > 1e-4


def test_jumps_cost_no_evaluation_and_change_no_trajectory(tmp_path):
    runs = {}
    for name, config in {
        "flow": {"method": "flow"},
        "jump": {"credit": "control_variate", "completion_stride": "jump"},
        "named": {"credit": "outcome_control_variate", "completion_stride": "jump"},
        "outcome": {"credit": "outcome", "completion_stride": "jump"},
    }.items():
        recorder = Recorder()
        trainer = make_trainer(tmp_path / name, reward_funcs=recorder, num_inference_steps=5, max_steps=1, **config)
        trainer.train()
        runs[name] = trainer, recorder
    flow, jump = runs["flow"][0]._generation, runs["jump"][0]._generation
    assert torch.equal(jump.latents, flow.latents) and torch.equal(jump.log_probs, flow.log_probs)
    assert not torch.allclose(jump.advantages, flow.advantages)
    calls = {name: logged(trainer, "reward_calls") for name, (trainer, _) in runs.items()}
    assert calls == {"flow": [1.0], "jump": [5.0], "named": [5.0], "outcome": [1.0]}
    for name, (trainer, recorder) in runs.items():
        assert logged(trainer, "nfe") == [5.0] and logged(trainer, "total_nfe") == [80], name
        assert len(recorder.images) == calls[name][0]
        assert np.array_equal(recorder.images[-1], runs["flow"][1].images[0])  # the finished images
    assert torch.equal(weights(runs["named"][0]), weights(runs["jump"][0]))
    assert torch.equal(weights(runs["outcome"][0]), weights(runs["flow"][0]))


def test_a_jump_s_image_is_that_of_the_velocity_alone(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, reward_funcs=recorder, num_inference_steps=5, max_steps=1, credit="control_variate",
        completion_stride="jump",
    )  # fmt: skip
    trainer.train()
    latents = trainer._generation.latents
    # The adapter does nothing before the first update, so the pipeline without it has sampled.
    policy = PipelinePolicy(pipelines.stable_diffusion_3(t5=False), guidance_scale=2.0, max_sequence_length=16)
    _, schedule, conditioning = policy.start(recorder.prompts[-1], 5)
    images = []
    for k, s in enumerate(schedule.sigmas[:4].tolist()):
        with torch.no_grad():
            x_0 = latents[:, k] - s * policy.predict(latents[:, k], k, conditioning, schedule)
            images.append(policy.decode(x_0, conditioning, output_type="uint8").numpy().astype(int))
        assert np.abs(images[k] - recorder.images[k]).max() <= 1
    assert all(np.abs(images[k] - images[k + 1]).max() > 2 for k in range(3))


def test_each_reward_has_its_own_credit(tmp_path):
    """Normalised before they are summed, rewards have coefficients, advantages and metrics of their own."""
    kept = {"bright": [], "reddish": []}

    def bright(prompts, images, **columns):
        rewards = [100 * np.asarray(image).mean() / 255 for image in images]
        kept["bright"].append(rewards)
        return rewards

    def reddish(prompts, images, **columns):
        rewards = [float(np.asarray(image)[..., 0].mean() - np.asarray(image)[..., 1].mean()) for image in images]
        rewards[3::4] = [None] * len(rewards[3::4])  # applies to three of each group's four
        kept["reddish"].append(rewards)
        return rewards

    trainer = make_trainer(
        tmp_path, reward_funcs=[bright, reddish], reward_weights=[0.5, -2.0], max_steps=1, num_inference_steps=4,
        credit="control_variate", scale_rewards="trajectory", multi_objective_aggregation="normalize_then_sum",
    )  # fmt: skip
    trainer.train()
    total = 0
    for name, weight in {"bright": 0.5, "reddish": -2.0}.items():
        R = np.array(kept[name], dtype=np.float64).T.reshape(4, 4, -1)
        R = np.where(np.isnan(R), np.nanmean(R, axis=1, keepdims=True), R).reshape(16, -1)
        y, beta, correlation = control_variates_by_hand(R, outcome=False)
        total = total + weight * normalized_by_hand(y, "trajectory")
        for k in range(1, 4):
            assert logged(trainer, f"control_variate/{name}/beta_{k}") == [
                pytest.approx(beta[:, k - 1].mean(), abs=1e-4)
            ]
            (got,) = logged(trainer, f"control_variate/{name}/correlation_{k}")
            assert got == pytest.approx(correlation[k - 1], abs=1e-4)
    assert not logged(trainer, "control_variate/beta_1")
    expected = total / (total.std() + 1e-4)  # one scale for all steps
    np.testing.assert_allclose(trainer._generation.advantages, expected, atol=2e-3)


@pytest.mark.parametrize("credit", ["incremental", "consistent"])
def test_metrics_of_each_reward_s_steps(tmp_path, credit):
    def inverse(prompts, images, **columns):
        return [1 - 2 * gray(image) for image in images]

    trainer = make_trainer(
        tmp_path, reward_funcs=[brightness, inverse], credit=credit, max_steps=1,
        multi_objective_aggregation="normalize_then_sum",
    )  # fmt: skip
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "nfe" in entry]
    for k in (1, 2):
        (bright,) = logged(trainer, f"incremental_reward/brightness/step_{k}")
        assert logged(trainer, f"incremental_reward/inverse/step_{k}") == [pytest.approx(-2 * bright, abs=1e-6)]
    of_steps = {f"{name}/step_{k}" for name in ("brightness", "inverse") for k in (1, 2)}
    assert {name.removeprefix("incremental_reward/") for name in entry if "incremental" in name} == of_steps
    turning = {name.removeprefix("turning_points/") for name in entry if "turning_points" in name}
    assert turning == (of_steps if credit == "consistent" else set())


@pytest.mark.parametrize("scale_rewards", ["trajectory", "batch", "none"])
def test_scale_rewards(tmp_path, scale_rewards):
    _, rewards, advantages = train_and_keep(tmp_path, credit="incremental", scale_rewards=scale_rewards)
    r = rewards.diff(dim=1).view(4, 4, 2)
    expected = r - r.mean(1, keepdim=True)
    if scale_rewards == "trajectory":
        expected = torch.tensor(normalized_by_hand(r.double().numpy(), "trajectory")).float().view(4, 4, 2)
    if scale_rewards == "batch":
        expected = expected / (r.flatten(0, 1).std(0, correction=0) + 1e-4)
    torch.testing.assert_close(advantages, expected.flatten(0, 1).clamp(-5, 5), atol=1e-4, rtol=1e-4)


def test_balancing_is_over_the_generation(tmp_path):
    """Scripted rewards: one prompt's images get better, another's get worse, at turning points of different number."""
    paths = {  # R_0, ..., R_3 of a prompt's four images
        0: [[0.0, 0.1, 0.5, 1.0 + 0.1 * i] for i in range(4)],  # step 1 counts, D > 0, of size 1.0 to 1.3
        1: [[1.0, 0.9, 0.5, 0.2]] + [[0.5, 0.5, 0.5, 0.5]] * 3,  # step 1 counts once, D < 0
        2: [[0.3] * 4] * 4,
        3: [[0.7] * 4] * 4,
    }
    calls = []

    def scripted(prompts, images, number, **columns):
        k = len(calls)
        calls.append(number)
        return [paths[row][i % 4][k] if row in paths else 0.0 for i, row in enumerate(number)]

    trainer = make_trainer(
        tmp_path,
        reward_funcs=scripted,
        num_inference_steps=4,
        shuffle_dataset=False,
        scale_rewards="none",
        max_steps=1,
    )
    trainer.train()
    assert calls == [sum(([row] * 4 for row in range(4)), [])] * 4
    first = torch.tensor([0.1, 0.1, 0.1, 1.3])  # the largest change alone is aggregated
    other = torch.tensor([0.2 - 1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(trainer._generation.advantages[:4, 0], first - first.mean())
    torch.testing.assert_close(trainer._generation.advantages[4:8, 0], other - other.mean())
    assert logged(trainer, "turning_points/step_1") == [pytest.approx(2 / 16)]
    assert logged(trainer, "frac_reward_zero_std") == [0.5]


def test_completion_stride(tmp_path):
    evaluations, images = {}, {}
    for stride in (1, 2):
        recorder = Recorder()
        trainer = make_trainer(
            tmp_path, reward_funcs=recorder, num_inference_steps=5, completion_stride=stride, max_steps=1
        )
        trainer.train()
        (evaluations[stride],) = logged(trainer, "nfe")
        images[stride] = recorder.images
    assert evaluations == {1: 15.0, 2: 5 + 2 + 1 + 1 + 0}
    assert np.abs(images[1][-1].astype(int) - images[2][-1]).max() <= 1  # the finished images are the same
    assert np.abs(images[1][0].astype(int) - images[2][0]).max() > 1


def test_window(tmp_path):
    trainer, rewards, advantages = train_and_keep(
        tmp_path, num_inference_steps=5, sde_window_size=2, sde_window_range=[1, 3], credit="incremental"
    )
    assert rewards.shape == (16, 3) and advantages.shape == (16, 2)
    assert logged(trainer, "nfe") == [5 + 3 + 2]


def test_a_group_whose_finished_images_are_equal_still_trains_its_steps(tmp_path):
    calls = []

    def ends_equal(prompts, images, **columns):
        calls.append(len(images))
        return [0.5] * len(images) if len(calls) == 3 else [gray(image) for image in images]

    trainer = make_trainer(tmp_path, reward_funcs=ends_equal, credit="incremental", max_steps=1)
    trainer.train()
    assert logged(trainer, "reward_std") == [0.0]
    assert logged(trainer, "frac_reward_zero_std") == [1.0]
    assert trainer.watch.gradients[0].norm() > 1e-4

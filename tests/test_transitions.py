import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from flow_trl.transitions import Transition, ddim_step, flow_step, kl_divergence


CASES = json.loads((Path(__file__).parent / "data/golden/flow_sde_step.json").read_text())["cases"]
SHAPES = [(2, 4), (2, 9, 8), (3, 4, 5, 6), (1, 4, 3, 5, 6)]  # a vector, packed tokens, images, video


def draw(*shape, seed=0, count=3):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).unbind()


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_golden(sde_type):
    cases = [case for case in CASES if case["sde_type"] == sde_type]
    assert len(cases) == 48 and any(case["sigma"] == 1 for case in cases)
    for case in cases:
        step = flow_step(
            torch.tensor(case["velocity"]),
            torch.tensor(case["sample"]),
            case["sigma"],
            case["sigma_next"],
            noise_level=case["noise_level"],
            sde_type=sde_type,
            sigma_max=case["sigma_max"],
            next_sample=torch.tensor(case["next_sample"]),
        )
        torch.testing.assert_close(step.mean, torch.tensor(case["mean"]), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(step.std, torch.tensor(case["std"][0]), rtol=1e-5, atol=0)
        torch.testing.assert_close(step.log_prob, torch.tensor(case["log_prob"]), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_sde_log_prob_is_the_normal_log_density(shape):
    v, x, x_next = draw(*shape)
    step = flow_step(v, x, 0.8, 0.6, noise_level=0.7, next_sample=x_next)
    normal = torch.distributions.Normal(step.mean.double(), step.noise_std.double())
    expected = normal.log_prob(x_next.double()).flatten(1).mean(1)
    assert step.log_prob.shape == shape[:1]
    torch.testing.assert_close(step.log_prob.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.noise_std, step.std * math.sqrt(0.2))


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("shape", SHAPES)
def test_scoring_a_drawn_sample_gives_identical_bits(shape, sde_type):
    v, x, z = draw(*shape)
    options = {"sigma": 0.8, "sigma_next": 0.6, "noise_level": 0.7, "sde_type": sde_type}
    drawn = flow_step(v, x, **options, noise=z)
    scored = flow_step(v, x, **options, next_sample=drawn.next_sample)
    for name in Transition._fields:
        assert torch.equal(getattr(drawn, name), getattr(scored, name)), name


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_drawn_sample_is_mean_plus_noise(sde_type):
    v, x, z = draw(2, 3, 4)
    step = flow_step(v, x, 0.8, 0.6, noise_level=0.7, sde_type=sde_type, noise=z)
    torch.testing.assert_close(step.next_sample, step.mean + step.noise_std * z)


def test_cps_std_is_that_of_the_noise():
    v, x, z = draw(2, 3, 4)
    step = flow_step(v, x, 0.8, 0.6, noise_level=0.5, sde_type="cps", noise=z)
    assert step.std == step.noise_std
    torch.testing.assert_close(step.std.item(), 0.6 * math.sqrt(0.5))


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_without_noise_it_is_an_ode_step(sde_type):
    v, x, z = draw(2, 3, 4)
    step = flow_step(v, x, 0.8, 0.6, noise_level=1e-5, sde_type=sde_type, noise=z)
    torch.testing.assert_close(step.mean, x - 0.2 * v)
    torch.testing.assert_close(step.next_sample, x - 0.2 * v, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.3, 0.6, 0.9])
def test_sde_preserves_the_marginals_of_the_flow(sigma):
    # Data from N(0, c²) has an exact velocity, linear in x, and x_s has the variance (1-s)² c² + s². From an x of
    # ones, `mean` is the factor that a step applies to x. A step's error in the variance must shrink as dt², as that
    # of an Euler-Maruyama step does: with a wrong drift it would shrink as dt alone.
    def variance(s, c=0.5):
        return (1 - s) ** 2 * c**2 + s**2

    def error(dt, c=0.5):
        x = torch.ones(1, 1)
        velocity = (sigma - (1 - sigma) * c**2) / variance(sigma) * x
        step = flow_step(velocity, x, sigma, sigma - dt, noise_level=0.7, noise=x)
        reached = step.mean.double().item() ** 2 * variance(sigma) + step.noise_std.double().item() ** 2
        return abs(reached - variance(sigma - dt))

    assert error(0.04) / error(0.02) == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize("noise_level", [0.1, 0.5, 0.8, 1.0])
def test_cps_keeps_the_coefficients_of_the_flow(noise_level):
    # With the true velocity, data keeps the coefficient 1-s', and old and new noise together the variance s'².
    data, noise, fresh = draw(2, 3, 4)
    sigma, sigma_next = 0.8, 0.6
    x = (1 - sigma) * data + sigma * noise
    step = flow_step(
        noise - data, x, sigma, sigma_next, noise_level=noise_level, sde_type="cps", noise=torch.zeros_like(x)
    )
    kept = (step.mean - (1 - sigma_next) * data) / noise
    torch.testing.assert_close(kept, kept[0, 0, 0].expand_as(kept), rtol=1e-3, atol=1e-5)
    assert kept.mean().item() ** 2 + step.noise_std.item() ** 2 == pytest.approx(sigma_next**2, rel=1e-4)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("mode", ["next_sample", "noise"])
def test_gradient_equals_finite_differences(sde_type, mode):
    v, x, given = draw(2, 3)
    options = {"sigma": 0.8, "sigma_next": 0.6, "noise_level": 0.7, "sde_type": sde_type}
    v.requires_grad_()
    step = flow_step(v, x, **options, **{mode: given})
    (gradient,) = torch.autograd.grad(step.log_prob.sum(), v)
    scored = step.next_sample.detach()
    h = 0.5  # log_prob is quadratic in v, so a central difference is exact at any width
    for index in range(v.numel()):
        e = torch.zeros_like(v).flatten()
        e[index] = h
        high, low = (
            flow_step(w, x, **options, next_sample=scored).log_prob.double().sum()
            for w in (v.detach() + e.view_as(v), v.detach() - e.view_as(v))
        )
        assert gradient.flatten()[index].item() == pytest.approx(((high - low) / (2 * h)).item(), rel=1e-3, abs=1e-5)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ["next_sample", "noise"])
def test_math_is_in_float32(dtype, mode):
    v, x, given = (tensor.to(dtype) for tensor in draw(2, 3, 4))
    low = flow_step(v, x, 0.8, 0.6, noise_level=0.7, **{mode: given})
    full = flow_step(v.float(), x.float(), 0.8, 0.6, noise_level=0.7, **{mode: given.float()})
    for got, expected in zip(low, full, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


def test_sigmas_may_be_tensors():
    v, x, z = draw(2, 3, 4)
    sigmas = torch.tensor([1.0, 0.75, 0.5])
    got = flow_step(v, x, sigmas[0], sigmas[1:2], noise_level=0.7, sigma_max=sigmas[1], noise=z)
    expected = flow_step(v, x, 1.0, 0.75, noise_level=0.7, sigma_max=0.75, noise=z)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_sigma_max_stands_for_one_at_the_first_step_alone():
    v, x, z = draw(2, 3, 4)
    first = flow_step(v, x, 1.0, 0.9, noise_level=0.7, sigma_max=0.75, noise=z)
    assert first.std.item() == pytest.approx(0.7 * 2)
    rounded = flow_step(v, x, 1 - 6e-8, 0.9, noise_level=0.7, sigma_max=0.75, noise=z)
    torch.testing.assert_close(rounded.next_sample, first.next_sample)
    later = flow_step(v, x, 0.5, 0.4, noise_level=0.7, sigma_max=0.75, noise=z)
    assert later.std.item() == pytest.approx(0.7)


@pytest.mark.parametrize("shape", SHAPES)
def test_kl_divergence_is_that_of_normals(shape):
    a, b, _ = draw(*shape)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(a, 0.3), torch.distributions.Normal(b, 0.3)
    )
    got = kl_divergence(a, b, 0.3)
    assert got.shape == shape[:1]
    torch.testing.assert_close(got, expected.flatten(1).mean(1))
    torch.testing.assert_close(kl_divergence(a, b, torch.tensor(0.3)), got)
    assert torch.equal(kl_divergence(a, a, 0.3), torch.zeros(shape[0]))


def test_kl_divergence_is_in_float32():
    a, b, _ = (tensor.bfloat16() for tensor in draw(2, 3, 4))
    got = kl_divergence(a, b, 0.3)
    assert got.dtype == torch.float32
    assert torch.equal(got, kl_divergence(a.float(), b.float(), 0.3))


X = torch.zeros(2, 3)
GOOD = {
    "velocity": X,
    "sample": X,
    "sigma": 0.8,
    "sigma_next": 0.6,
    "noise_level": 0.7,
    "sde_type": "sde",
    "noise": X,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": None}, "got neither"),
        ({"next_sample": X}, "got both"),
        ({"velocity": X[:1]}, r"`velocity` has shape \(1, 3\)"),
        ({"noise": X[:, :1]}, r"`noise` has shape \(2, 1\)"),
        ({"noise": None, "next_sample": X[0]}, r"`next_sample` has shape \(3,\)"),
        ({"sde_type": "ode"}, '`sde_type` is \'ode\': use "sde" or "cps"'),
        ({"noise_level": 0}, "`noise_level` is 0: .*ODE step"),
        ({"noise_level": -0.1}, "`noise_level` is -0.1"),
        ({"noise_level": math.nan}, "`noise_level` is nan"),
        ({"noise_level": 0, "sde_type": "cps"}, "`noise_level` is 0"),
        ({"noise_level": 1.1, "sde_type": "cps"}, "`noise_level` is 1.1: .*<= 1"),
        ({"sigma": 800.0}, "`sigma` is 800.0: .*not its timestep"),
        ({"sigma": 0.0}, "`sigma` is 0.0"),
        ({"sigma": torch.tensor([0.8, 0.8])}, r"`sigma` has shape \(2,\): .*one number"),
        ({"sigma_next": 0.8}, "`sigma_next` is 0.8: .*below `sigma`"),
        ({"sigma_next": 0.9}, "`sigma_next` is 0.9: .*below `sigma`"),
        ({"sigma_next": 0.0}, "`sigma_next` is 0.0: .*ODE step"),
        ({"sigma": 1.0}, "`sigma_max` is None: .*second sigma"),
        ({"sigma": 1.0, "sigma_max": 1.0}, "`sigma_max` is 1.0"),
        ({"sigma": 1.0, "sigma_max": 0.0}, "`sigma_max` is 0.0"),
    ],
)
def test_errors(change, message):
    flow_step(**GOOD)
    with pytest.raises(ValueError, match=message):
        flow_step(**(GOOD | change))


def test_large_noise_levels_are_for_sde_alone():
    assert flow_step(**(GOOD | {"noise_level": 1.5})).log_prob.isfinite().all()
    assert flow_step(**(GOOD | {"noise_level": 1.0, "sde_type": "cps"})).log_prob.isfinite().all()
    assert flow_step(**(GOOD | {"sigma": 1.0, "sde_type": "cps"})).log_prob.isfinite().all()


def test_kl_divergence_error():
    with pytest.raises(ValueError, match=r"`reference_mean` has shape \(2, 1\)"):
        kl_divergence(X, X[:, :1], 0.3)


# DDIM

DDIM_CASES = json.loads((Path(__file__).parent / "data/golden/ddim_step.json").read_text())["cases"]
SD_SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "set_alpha_to_one": False, "clip_sample": False,
}  # fmt: skip


def ddim(steps=10, **config):
    scheduler = DDIMScheduler(**(SD_SCHEDULE | config))
    scheduler.set_timesteps(steps)
    return scheduler


def test_ddim_golden():
    assert len(DDIM_CASES) == 32
    for case in DDIM_CASES:
        scheduler = ddim(case["num_inference_steps"], prediction_type=case["prediction_type"])
        assert scheduler.timesteps[case["step_index"]] == case["timestep"]
        model_output, sample, next_sample = (
            torch.tensor(case[name]) for name in ("model_output", "sample", "next_sample")
        )
        step = ddim_step(model_output, sample, case["timestep"], scheduler, eta=case["eta"], next_sample=next_sample)
        torch.testing.assert_close(step.log_prob, torch.tensor(case["log_prob"]), rtol=3e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize(
    "config",
    [{}, {"timestep_spacing": "trailing"}, {"clip_sample": True}, {"thresholding": True}, {"set_alpha_to_one": True}],
    ids=str,
)
def test_ddim_is_the_step_of_the_scheduler(prediction_type, eta, config):
    scheduler = ddim(prediction_type=prediction_type, **config)
    output, x, z = draw(2, 3, 4, 4)
    last = int(scheduler.timesteps[-1])
    for timestep in scheduler.timesteps:
        step = ddim_step(output, x, timestep, scheduler, eta=eta, noise=z)
        if timestep == last and scheduler.config.set_alpha_to_one:
            continue  # there the scheduler itself goes to no noise at all
        expected = scheduler.step(output, timestep, x, eta=eta, variance_noise=z).prev_sample
        torch.testing.assert_close(step.next_sample, expected, rtol=1e-4, atol=1e-5)
        assert step.std > 0 and step.std == step.noise_std


@pytest.mark.parametrize("shape", SHAPES)
def test_ddim_log_prob_and_bits(shape):
    output, x, z = draw(*shape)
    scheduler = ddim()
    drawn = ddim_step(output, x, 401, scheduler, noise=z)
    scored = ddim_step(output, x, torch.tensor(401), scheduler, next_sample=drawn.next_sample)
    for name in Transition._fields:
        assert torch.equal(getattr(drawn, name), getattr(scored, name)), name
    expected = torch.distributions.Normal(drawn.mean.double(), drawn.std.double()).log_prob(drawn.next_sample.double())
    torch.testing.assert_close(drawn.log_prob.double(), expected.flatten(1).mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_gradient_by_finite_differences(prediction_type):
    output, x, x_next = (tensor.double() for tensor in draw(2, 6))
    scheduler = ddim(prediction_type=prediction_type)
    output.requires_grad_()
    ddim_step(output, x, 401, scheduler, next_sample=x_next).log_prob.sum().backward()
    for i in range(6):
        change = torch.zeros(2, 6, dtype=torch.float64)
        change[:, i] = 0.05
        up, down = (
            ddim_step(output.detach() + sign * change, x, 401, scheduler, next_sample=x_next).log_prob
            for sign in (1, -1)
        )
        torch.testing.assert_close(output.grad[:, i], (up - down).double() / 0.1, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"eta": 0.0}, "`eta` is 0.0: .*scheduler.step"),
        ({"eta": 1.5}, "`eta` is 1.5"),
        ({"noise": None}, "got neither"),
        ({"next_sample": torch.zeros(2, 3)}, "got both"),
        ({"model_output": torch.zeros(2, 4)}, r"`model_output` has shape \(2, 4\)"),
        ({"timestep": 0}, "`timestep` is 0: .*steps_offset=1"),
        ({"timestep": 1000}, "`timestep` is 1000"),
        ({"scheduler": DDIMScheduler()}, "call `scheduler.set_timesteps"),
    ],
)
def test_ddim_bad_arguments(change, words):
    arguments = {"model_output": torch.zeros(2, 3), "sample": torch.zeros(2, 3), "timestep": 401, "scheduler": ddim()}
    arguments |= {"noise": torch.zeros(2, 3), **change}
    with pytest.raises(ValueError, match=words):
        ddim_step(**arguments)

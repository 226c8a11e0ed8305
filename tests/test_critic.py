import json
from pathlib import Path

import pytest
import torch

from flow_trl.critic import TemporalCritic, dormant_neurons, reset_neurons


CASES = json.loads((Path(__file__).parent / "data/golden/neuron_reset.json").read_text())["cases"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def golden_critic(case):
    critic = TemporalCritic(6, (8, 5, 4), (0.2, 0.2, 0.0))
    critic.load_state_dict({name: torch.tensor(value) for name, value in case["weights"].items()})
    return critic


def test_head():
    critic = TemporalCritic(768, generator=seeded())
    shapes = {name: tuple(parameter.shape) for name, parameter in critic.named_parameters()}
    sizes = [768, 1024, 128, 64, 16, 1]
    places = ["layers.0", "layers.2", "layers.4", "layers.6", "layers.7"]
    expected = {f"{place}.weight": (b, a) for place, a, b in zip(places, sizes, sizes[1:], strict=False)}
    assert shapes == expected | {f"{place}.bias": (b,) for place, b in zip(places, sizes[1:], strict=True)}
    dropouts = [layer.p for layer in critic.layers if isinstance(layer, torch.nn.Dropout)]
    assert dropouts == [0.2, 0.2, 0.1]
    assert critic.layers[0].weight.std().item() == pytest.approx(1 / 769, rel=1e-2)
    assert not any(layer.bias.any() for _, layer in critic.linear_layers())


def test_values_are_those_of_the_normalised_embedding():
    critic = TemporalCritic(8, (16, 4), (0.2, 0.1), seeded()).eval()
    x = torch.randn(3, 5, 8, generator=seeded(1))
    values = critic(x)
    assert values.shape == (3, 5) and values.dtype == torch.float32
    torch.testing.assert_close(values, critic(7 * x))
    unit = x / x.square().sum(-1, keepdim=True).sqrt()
    w, b = zip(*((layer.weight, layer.bias) for _, layer in critic.linear_layers()), strict=True)
    expected = ((unit @ w[0].T + b[0]) @ w[1].T + b[1]) @ w[2].T + b[2]
    torch.testing.assert_close(values, expected[..., 0])
    assert critic(x.bfloat16()).dtype == torch.float32


def unnormalised(critic, inputs):
    """A critic of one more input whose normalised embeddings lead to the given inputs' outputs, for golden numbers."""
    inputs = torch.tensor(inputs)
    scale = inputs.norm(dim=1).max() * 1.01
    rest = (scale**2 - inputs.square().sum(1, keepdim=True)).sqrt()
    wider = TemporalCritic(7, (8, 5, 4), (0.2, 0.2, 0.0))
    state = critic.state_dict()
    first = torch.cat([state["layers.0.weight"] * scale, torch.zeros(8, 1)], dim=1)
    wider.load_state_dict(state | {"layers.0.weight": first})
    return wider, torch.cat([inputs, rest], dim=1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"threshold={case['threshold']}")
def test_dormant_neurons_golden(case):
    critic, embeddings = unnormalised(golden_critic(case), case["inputs"])
    dormant = dormant_neurons(critic, embeddings, case["threshold"])
    assert {name: mask.tolist() for name, mask in dormant.items()} == case["dormant"]
    assert sum(mask.sum() for mask in dormant.values()) == case["dormant_count"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"threshold={case['threshold']}")
def test_reset_golden(case):
    critic = golden_critic(case)
    optimizer = torch.optim.Adam(critic.parameters())
    for parameter in critic.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    with torch.no_grad():  # as it was: what the step changed does not count
        for name, parameter in critic.named_parameters():
            parameter.copy_(torch.tensor(case["weights"][name]))
    active = {name: ~torch.tensor(mask) for name, mask in case["dormant"].items()}
    reset_neurons(critic, active, optimizer, seeded())
    for name, parameter in critic.named_parameters():
        changed = parameter != torch.tensor(case["weights"][name])
        assert changed.tolist() == case["entries_changed_by_active_reset"][name], name
        for moment in ("exp_avg", "exp_avg_sq"):
            cleared = optimizer.state[parameter][moment] == 0
            assert cleared.tolist() == case["adam_exp_avg_is_zero_after_reset"][name], (name, moment)


def test_reset_draws_the_initial_distribution_and_leaves_the_random_state():
    critic = TemporalCritic(256, (512, 128), (0.0, 0.0), seeded())
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.fill_(5.0)
    everything = {"layers.0": torch.ones(512, dtype=torch.bool), "layers.1": torch.ones(128, dtype=torch.bool)}
    state = torch.get_rng_state()
    reset_neurons(critic, everything, generator=seeded(3))
    assert torch.equal(state, torch.get_rng_state())
    for layer in critic.layers[:2]:
        assert layer.weight.mean().item() == pytest.approx(0, abs=1e-4)
        assert layer.weight.std().item() == pytest.approx(1 / 257, rel=2e-2)
        assert not layer.bias.any()
    assert critic.layers[2].bias.item() == 5.0
    twin = TemporalCritic(256, (512, 128), (0.0, 0.0), seeded(8))
    reset_neurons(twin, everything, generator=seeded(3))
    assert torch.equal(twin.layers[1].weight, critic.layers[1].weight)


def test_learns_a_return_of_the_image_alone_and_recovers_from_a_reset():
    """A synthetic return of 12-dimensional directions, with noise of a tenth of its variance."""
    x = torch.nn.functional.normalize(torch.randn(2048, 12, generator=seeded(0)), dim=1)
    target = x @ torch.randn(12, generator=seeded(1)) * 12**0.5
    target = target / target.std() + 0.3 * torch.randn(2048, generator=seeded(2))
    critic = TemporalCritic(12, generator=seeded(3))
    optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-3)
    torch.manual_seed(0)

    def explained_variance():
        critic.eval()
        with torch.no_grad():
            error = target[1536:] - critic(x[1536:])
        critic.train()
        return 1 - error.var().item() / target[1536:].var().item()

    def train(steps):
        for _ in range(steps):
            rows = torch.randint(1536, (128,))
            optimizer.zero_grad()
            (critic(x[rows]) - target[rows]).square().mean().backward()
            optimizer.step()

    assert explained_variance() < 0.1
    train(300)
    assert explained_variance() > 0.8
    dormant = dormant_neurons(critic, x)
    reset_neurons(critic, {name: ~mask for name, mask in dormant.items()}, optimizer, seeded(4))
    assert explained_variance() < 0.3
    train(300)
    assert explained_variance() > 0.8


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda c: TemporalCritic(6, (8, 4), (0.1,)), r"`dropouts=\(0.1,\)` has 1 entries for the 2 hidden layers"),
        (lambda c: dormant_neurons(c, torch.ones(2, 6), -0.1), "`threshold` is -0.1"),
        (lambda c: reset_neurons(c, {"layers.1": torch.ones(8)}), r"`neurons\['layers.1'\]` has 8 entries"),
        (lambda c: reset_neurons(c, {"layers.0": torch.ones(7)}), r"`neurons\['layers.0'\]` has 7 entries"),
        (lambda c: reset_neurons(c, {"layers.4": torch.ones(1)}), "hidden layers of the critic are"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call(TemporalCritic(6, (8, 5), (0.2, 0.2)))

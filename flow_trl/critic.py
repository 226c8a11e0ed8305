"""The temporal critic of TDPO-R: a value of noisy latents, and the reset of its neurons."""

import torch
from torch import nn


class TemporalCritic(nn.Module):
    """
    Head of the temporal critic ([TDPO-R](https://huggingface.co/papers/2402.08552)): linear layers without
    activations on an image embedding of a decoded latent.

    Weights are drawn from a normal distribution with standard deviation `1 / (embedding_dim + 1)`; biases are 0.

    Args:
        embedding_dim (`int`):
            Size d of the embedding.
        hidden_sizes (`tuple[int, ...]`, *optional*, defaults to `(1024, 128, 64, 16)`):
            Number of neurons of each hidden layer.
        dropouts (`tuple[float, ...]`, *optional*, defaults to `(0.2, 0.2, 0.1, 0.0)`):
            Dropout after each hidden layer; 0 is none.
        generator (`torch.Generator`, *optional*):
            Source of the weights, on the CPU.

    Raises:
        ValueError: if there are not as many dropouts as hidden layers.

    Example:

    ```python
    >>> import torch
    >>> from flow_trl.critic import TemporalCritic

    >>> critic = TemporalCritic(768).eval()
    >>> critic(torch.randn(8, 768)).shape
    torch.Size([8])
    ```
    """

    def __init__(
        self,
        embedding_dim: int,
        hidden_sizes: tuple[int, ...] = (1024, 128, 64, 16),
        dropouts: tuple[float, ...] = (0.2, 0.2, 0.1, 0.0),
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if len(dropouts) != len(hidden_sizes):
            raise ValueError(
                f"`dropouts={dropouts}` has {len(dropouts)} entries for the {len(hidden_sizes)} hidden layers "
                f"`hidden_sizes={hidden_sizes}`: pass one for each (0 for none)."
            )
        self.embedding_dim = embedding_dim
        self.init_std = 1 / (embedding_dim + 1)
        layers, size = [], embedding_dim
        for hidden_size, dropout in zip(hidden_sizes, dropouts, strict=True):
            layers.append(nn.Linear(size, hidden_size))
            size = hidden_size
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers, nn.Linear(size, 1))
        with torch.no_grad():
            for _, layer in self.linear_layers():
                layer.weight.copy_(self._draw(layer.weight.shape, generator))
                layer.bias.zero_()

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> torch.Tensor:
        return self.init_std * torch.randn(shape, generator=generator)

    def linear_layers(self) -> list[tuple[str, nn.Linear]]:
        """The linear layers in order, each with the prefix of its parameters' names."""
        return [(f"layers.{i}", layer) for i, layer in enumerate(self.layers) if isinstance(layer, nn.Linear)]

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """
        Values of embeddings.

        Args:
            embeddings (`torch.Tensor` of shape `(..., d)`):
                Image embeddings; they are L2-normalised here.

        Returns:
            `torch.Tensor` of shape `(...)`: float32.
        """
        return self.layers(nn.functional.normalize(embeddings.float(), dim=-1)).squeeze(-1)


@torch.no_grad()
def dormant_neurons(
    critic: TemporalCritic, embeddings: torch.Tensor, threshold: float = 0.0
) -> dict[str, torch.Tensor]:
    r"""
    Finds the neurons of the hidden layers that hardly respond
    ([dormant neurons](https://huggingface.co/papers/2302.12902)).

    Neuron j of a layer is dormant if its score is at most the threshold:

    $$ s_j = \frac{\operatorname{mean}_x \max(h_j(x), 0)}{\operatorname{mean}_k \operatorname{mean}_x \max(h_k(x), 0)
    + 10^{-9}} $$

    Args:
        critic ([`TemporalCritic`]):
            The critic. Its dropout is left out.
        embeddings (`torch.Tensor` of shape `(..., d)`):
            Inputs x of the critic.
        threshold (`float`, *optional*, defaults to `0.0`):
            At least 0.

    Returns:
        `dict[str, torch.Tensor]`: for each hidden layer, by its name in the critic, which neurons are dormant (bool).

    Raises:
        ValueError: if the threshold is negative.

    Example:

    ```python
    >>> dormant = dormant_neurons(critic, torch.randn(64, 768))
    >>> dormant["layers.0"].float().mean()  # share in the first layer
    ```
    """
    if not threshold >= 0:
        raise ValueError(f"`threshold` is {threshold}: scores are at least 0, so use a threshold of at least 0.")
    x = nn.functional.normalize(embeddings.float(), dim=-1).flatten(0, -2)
    dormant = {}
    for name, layer in critic.linear_layers()[:-1]:
        x = layer(x)
        score = x.relu().mean(0)
        dormant[name] = score / (score.mean() + 1e-9) <= threshold
    return dormant


@torch.no_grad()
def reset_neurons(
    critic: TemporalCritic,
    neurons: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """
    Draws the weights of chosen neurons anew ([TDPO-R](https://huggingface.co/papers/2402.08552)).

    Incoming and outgoing weights of a neuron are drawn from the critic's initial distribution, its bias becomes 0, and
    so do the entries of both moments that Adam keeps for them.

    Args:
        critic ([`TemporalCritic`]):
            Changed in place.
        neurons (`dict[str, torch.Tensor]`):
            For each hidden layer, by its name in the critic, which neurons to reset (bool). [`dormant_neurons`] gives
            such masks; TDPO-R resets the others, the active ones.
        optimizer (`torch.optim.Optimizer`, *optional*):
            Adam or a relative, whose state for the critic's parameters is cleared where they changed.
        generator (`torch.Generator`, *optional*):
            Source of the weights, on the CPU. Processes that pass generators of one seed draw the same.

    Raises:
        ValueError: if a mask names no hidden layer or has another size.

    Example:

    ```python
    >>> dormant = dormant_neurons(critic, embeddings)
    >>> active = {name: ~mask for name, mask in dormant.items()}
    >>> reset_neurons(critic, active, optimizer, torch.Generator().manual_seed(0))
    ```
    """
    layers = critic.linear_layers()
    sizes = {name: layer.out_features for name, layer in layers[:-1]}
    for name, mask in neurons.items():
        if sizes.get(name) != len(mask):
            raise ValueError(
                f"`neurons[{name!r}]` has {len(mask)} entries, but the hidden layers of the critic are {sizes}: pass "
                "masks as `dormant_neurons` returns them."
            )

    def clear(parameter: nn.Parameter, entries: torch.Tensor, values: torch.Tensor | float) -> None:
        parameter.copy_(torch.where(entries, values, parameter))
        for moment in ("exp_avg", "exp_avg_sq"):
            if optimizer is not None and moment in optimizer.state[parameter]:
                optimizer.state[parameter][moment].masked_fill_(entries, 0.0)

    for (name, layer), (_, next_layer) in zip(layers, layers[1:], strict=False):
        if name not in neurons:
            continue
        mask = neurons[name].to(layer.weight.device)
        for weight, entries in ((layer.weight, mask[:, None]), (next_layer.weight, mask[None, :])):
            drawn = critic._draw(weight.shape, generator).to(weight.device)
            clear(weight, entries.expand_as(weight), drawn)
        clear(layer.bias, mask, 0.0)

"""What a pipeline computes of prompts and images before it samples: recorded once, then given back for any rows."""

import dataclasses
import hashlib
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._pytree import tree_leaves, tree_map_only

from .utils import to_device


class Leaf(NamedTuple):
    """
    How one tensor or list among a pipeline's outputs depends on the prompts of a call.

    Args:
        dim (`int`, *optional*): dimension of the rows (0 for a list); `None` for what all rows of a call share.
        repeats (`int`): how many entries along it a row has, such as 2 for `[negative, positive]`; rows vary faster.
        padded (`bool`): whether rows of different lengths may be filled up with zeros, because a mask says so.
        absent (`bool`): whether it was `None`.
    """

    dim: int | None
    repeats: int = 1
    padded: bool = False
    absent: bool = False


class NoRows(Exception):
    """The outputs for two prompts are not those for one and those for the other."""


def _map_entries(function: Callable, container: Any, *others: Any) -> Any:
    """Applies a function to the entries of containers with the same keys; the result is a container as the first."""
    if isinstance(container, dict):
        return {key: function(entry, *(other[key] for other in others)) for key, entry in container.items()}
    return type(container)(function(entry, *(other[i] for other in others)) for i, entry in enumerate(container))


def _map(function: Callable, layout: Any, *values: Any) -> Any:
    """Applies `function(leaf, *values)` at each leaf of a layout."""
    if isinstance(layout, Leaf):
        return function(layout, *values)
    return _map_entries(partial(_map, function), layout, *values)


def _leaves(layout: Any, *values: Any) -> list[tuple]:
    """Each leaf of a layout, with what values have in its place."""
    found = []
    _map(lambda *leaf_and_values: found.append(leaf_and_values), layout, *values)
    return found


def find_layout(first: Any, second: Any, both: Any) -> Any:
    """
    Where the rows are in what a pipeline computed of one prompt, of another one, and of the two in one call: tensors
    and anything else, in tuples, lists and dicts. A layout is a [`Leaf`], or such a container of layouts.

    Raises:
        NoRows: if `both` does not consist of `first` and `second`.
    """
    if isinstance(both, torch.Tensor):
        if not isinstance(first, torch.Tensor) or not first.ndim == second.ndim == both.ndim:
            raise NoRows("other dimensions")
        sizes = list(zip(first.shape, second.shape, both.shape, strict=True))
        dims = [d for d, (a, b, c) in enumerate(sizes) if 0 < a == b and c == 2 * a]
        dim = dims[0] if dims else None
        if any(c != max(a, b) for d, (a, b, c) in enumerate(sizes) if d != dim):
            raise NoRows(f"sizes {[tuple(v.shape) for v in (first, second, both)]}")
        return Leaf(dim, first.shape[dim]) if dims else Leaf(None)
    if not isinstance(both, tuple | list | dict):
        return Leaf(None, absent=both is None)
    if type(first) is type(both) and isinstance(both, list) and len(both) == 2 * len(first) == 2 * len(second) > 0:
        return Leaf(0, len(first))
    if type(first) is not type(both) or not len(first) == len(second) == len(both):
        raise NoRows("other numbers of outputs")
    return _map_entries(find_layout, first, second, both)


def _pad_where_masked(layout: Any, first: Any, second: Any) -> Any:
    """The layout of one method's outputs, in which rows of different lengths are filled up if there is a mask of them."""
    if not any(_differ(a, b) and a.ndim == 2 for _, a, b in _leaves(layout, first, second)):
        return layout
    return _map(lambda leaf, a, b: leaf._replace(padded=_differ(a, b)), layout, first, second)


def fits(layout: Any, outputs: Any) -> bool:
    """Whether outputs are tensors only where they were when the layout was found."""
    try:
        return not any(leaf.absent and isinstance(value, torch.Tensor) for leaf, value in _leaves(layout, outputs))
    except (KeyError, IndexError, TypeError):
        return False


def has_padding(layout: Any) -> bool:
    """Whether rows of different lengths can be in one call."""
    return any(leaf.padded for (leaf,) in _leaves(layout))


def _differ(first: Any, second: Any) -> bool:
    return isinstance(first, torch.Tensor) and first.shape != second.shape


def find_rows(first: list, second: list, both: list) -> tuple[list, bool]:
    """
    Layouts of what each method of a pipeline returned, see [`find_layout`], and whether masks of ones are missing for
    one prompt.

    Raises:
        NoRows: if `both` does not consist of `first` and `second`.
    """
    masked = any(map(_lacks_mask, first, both))
    if masked:
        first, second, both = ([with_masks(value) for value in values] for values in (first, second, both))
    layout = list(map(_pad_where_masked, find_layout(first, second, both), first, second))
    for leaf, a, b, c in _leaves(layout, first, second, both):
        in_rows = isinstance(c, torch.Tensor) and leaf.dim is not None and a.shape == b.shape
        if in_rows and c.is_floating_point() and (_joined(leaf, a, b) - c).abs().mean() > 0.1 * c.abs().mean():
            raise NoRows("what it computes of two is not what it computes of each")
    return layout, masked


def _lacks_mask(one: Any, both: Any) -> bool:
    """Whether outputs for one prompt have no mask where those for two have one."""
    return isinstance(one, tuple) and any(
        a is None and isinstance(b, torch.Tensor) for a, b in zip(one, both, strict=True)
    )


def with_masks(value: Any) -> Any:
    """Outputs in which a missing mask, the pipeline's way to say that all tokens count, is one of ones."""
    if not isinstance(value, tuple):
        return value
    filled = list(value)
    for j, (embeds, mask) in enumerate(zip(value, value[1:], strict=False), 1):
        if mask is None and isinstance(embeds, torch.Tensor) and embeds.ndim == 3:
            filled[j] = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    return tuple(filled)


def _row_of(index: int, size: int) -> Callable[[Leaf, Any], Any]:
    """A row of a leaf with `size` rows, on its own memory."""

    def row(leaf: Leaf, value: Any) -> Any:
        if leaf.dim is None:
            return value
        if isinstance(value, list):
            return value[index::size]
        return value.unflatten(leaf.dim, (leaf.repeats, size)).select(leaf.dim + 1, index).clone()

    return row


def _joined(leaf: Leaf, *values: Any) -> Any:
    if leaf.dim is None or len(values) == 1:
        return values[0]
    if isinstance(values[0], list):
        return [value[k] for k in range(leaf.repeats) for value in values]
    if leaf.padded:
        shape = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
        values = [
            F.pad(value, [n for d in reversed(range(value.ndim)) for n in (0, shape[d] - value.shape[d])])
            for value in values
        ]
    return torch.stack(values, leaf.dim + 1).flatten(leaf.dim, leaf.dim + 1)


def _kind(leaf: Leaf, value: Any) -> Any:
    """What rows must have in common to be in one call."""
    if leaf.dim is not None:
        if isinstance(value, list) or leaf.padded:
            return None
        return tuple(value.shape)
    return digest(value) if isinstance(value, torch.Tensor | Image.Image) else None


def digest(value: Any) -> Any:
    """A key for what may be given to a pipeline: tensors and images by their content, lists by their entries."""
    if isinstance(value, torch.Tensor):
        numbers = value.detach().cpu().contiguous().flatten()
        content = numbers.view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return tuple(value.shape), str(value.dtype), hashlib.blake2b(content, digest_size=16).digest()
    if isinstance(value, Image.Image):
        value = value.convert("RGBA") if value.mode in ("P", "PA") else value
        return value.mode, value.size, hashlib.blake2b(value.tobytes(), digest_size=16).digest()
    if isinstance(value, list | tuple):
        return tuple(map(digest, value))
    return value


@dataclass(frozen=True, eq=False)
class Row:
    """
    What a pipeline computed of one prompt.

    Args:
        prompt (`str`): the prompt.
        given (`dict[str, Any]`): further arguments of the pipeline's `__call__`, such as `image`.
        layout (`Any`): see [`find_layout`]; `None` if a call can have this row alone.
        names (`tuple[str, ...]`): the pipeline's methods that computed something, in the order of their calls.
        outputs (`list`): what they returned.
        in_list (`bool`): whether a call takes what is given in lists, with one entry for each prompt.
    """

    prompt: str
    given: dict[str, Any]
    layout: Any
    names: tuple[str, ...]
    outputs: list[Any]
    in_list: bool = False

    @cached_property
    def kind(self) -> Any:
        """Rows with the same kind can be in one call."""
        if self.layout is None:
            return id(self)
        return self.names, tuple(_kind(leaf, value) for leaf, value in _leaves(self.layout, self.outputs))

    def on(self, device: torch.device, moved: dict[int, torch.Tensor] | None = None) -> "Row":
        """The row on a device; `moved` keeps what is there already, by the id of what it was."""
        moved = {} if moved is None else moved

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in moved:
                moved[id(tensor)] = to_device(tensor, device)
            return moved[id(tensor)]

        return self._with(tree_map_only(torch.Tensor, move, self.outputs))

    def sharing(self, known: MutableMapping[Any, torch.Tensor]) -> "Row":
        """The row with tensors that are the same for many rows from `known`, to which new ones are added."""
        if self.layout is None:
            return self

        def shared(leaf: Leaf, value: Any) -> Any:
            if leaf.dim is not None or not isinstance(value, torch.Tensor):
                return value
            return known.setdefault(_kind(leaf, value), value)

        return self._with(_map(shared, self.layout, self.outputs))

    def _with(self, outputs: list[Any]) -> "Row":
        row = dataclasses.replace(self, outputs=outputs)
        if self.layout is not None:
            row.__dict__["kind"] = self.kind
        return row

    @property
    def nbytes(self) -> int:
        """Size of its tensors and images."""
        size = 0
        for value in tree_leaves((self.outputs, self.given)):
            if isinstance(value, torch.Tensor):
                size += value.nbytes
            elif isinstance(value, Image.Image):
                size += value.width * value.height * len(value.getbands())
        return size


class Batch(NamedTuple):
    """
    Rows that can be in one call of the pipeline.

    Args:
        index (`list[int]`): their places in the conditioning.
        prompts (`list[str]`): their prompts.
        given (`dict[str, Any]`): further arguments of the call.
        recorded (`list[tuple[str, Any]]`): what each method of the pipeline returns, with its name.
    """

    index: list[int]
    prompts: list[str]
    given: dict[str, Any]
    recorded: list[tuple[str, Any]]


@dataclass(frozen=True)
class Conditioning:
    """
    Everything that a pipeline computed of some prompts before it samples, selectable by row.

    Args:
        rows (`list[Row]`): what it computed of each.

    Example:

    ```python
    >>> conditioning = policy.encode(["a red circle", "a blue square"])
    >>> len(conditioning[[0, 0, 1]])  # any subset or repetition
    3
    ```
    """

    rows: list[Row] = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: list[int] | torch.Tensor | slice) -> "Conditioning":
        return Conditioning([self.rows[row] for row in torch.arange(len(self))[index].tolist()])

    def on(self, device: torch.device, rows: list[int]) -> "Conditioning":
        """The conditioning of some rows, also repeated ones, on a device to which each distinct row goes once."""
        tensors: dict[int, torch.Tensor] = {}
        moved = {row: self.rows[row].on(device, tensors) for row in dict.fromkeys(rows)}
        return Conditioning([moved[row] for row in rows])

    @cached_property
    def batches(self) -> list[Batch]:
        """The calls that these rows need: one, unless the pipeline's conditions of some cannot be in one batch."""
        places: dict[Any, list[int]] = {}
        for place, row in enumerate(self.rows):
            places.setdefault(row.kind if row.layout is not None else (row.kind, place), []).append(place)
        batches = []
        for index in places.values():
            rows = [self.rows[place] for place in index]
            outputs = rows[0].outputs
            if len(rows) > 1:
                outputs = _map(_joined, rows[0].layout, *(row.outputs for row in rows))
            recorded = list(zip(rows[0].names, outputs, strict=True))
            given = rows[0].given
            if rows[0].in_list and len(rows) > 1:
                given = {name: [row.given[name] for row in rows] for name in given}
            batches.append(Batch(index, [row.prompt for row in rows], given, recorded))
        return batches


def split_rows(
    layout: Any, names: tuple[str, ...], outputs: list, prompts: list[str], given: dict, in_list: bool = False
) -> list[Row]:
    """The rows of what one call computed of several prompts."""
    if layout is None or len(prompts) == 1:
        return [Row(prompts[0], given, layout, names, outputs, in_list)]
    size = len(prompts)
    return [
        Row(prompt, given, layout, names, _map(_row_of(index, size), layout, outputs), in_list)
        for index, prompt in enumerate(prompts)
    ]

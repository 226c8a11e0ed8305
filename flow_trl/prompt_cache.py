"""Conditioning of prompts, each computed once."""

from collections import OrderedDict
from typing import Any
from weakref import WeakValueDictionary

import torch

from .conditioning import Conditioning, Row, digest
from .policy import PipelinePolicy


class PromptCache:
    """
    Conditioning of prompts, each computed once. It waits on the CPU; what was not used for the longest time goes first.

    What is computed of a prompt does not depend on what was asked before: the prompts that are missing are embedded in
    batches as large as the number of distinct prompts in the call (at most 64), filled up, or one by one where the length
    of an embedding depends on its batch, or where each has an image.

    Args:
        policy ([`PipelinePolicy`]):
            The policy whose `encode` is used.
        max_bytes (`int`, *optional*, defaults to 2 GiB):
            Size from which on rows are dropped. Those of one call are always kept.

    Example:

    ```python
    >>> cache = PromptCache(policy)
    >>> conditioning = cache.encode(["a red circle", "a blue square"])  # on the CPU
    >>> latents = policy.start(conditioning.on(policy.device, [0, 0, 1]), 10).latents
    ```
    """

    def __init__(self, policy: PipelinePolicy, max_bytes: int = 2 * 2**30):
        self.policy, self.max_bytes = policy, max_bytes
        self._rows: OrderedDict[Any, Row] = OrderedDict()
        self._shared: WeakValueDictionary[Any, torch.Tensor] = WeakValueDictionary()
        self._size = 0

    def encode(self, prompts: list[str], **columns: list) -> Conditioning:
        """Conditioning of N prompts, on the CPU; arguments are those of [`PipelinePolicy.encode`]."""
        keys = [(p, *(digest(column[i]) for column in columns.values())) for i, p in enumerate(prompts)]
        distinct = {key: i for i, key in enumerate(keys)}
        missing = [i for key, i in distinct.items() if key not in self._rows]
        size = min(len(distinct), 64) if missing and not columns and self.policy.encodes_in_batches() else 1
        for first in range(0, len(missing), size):
            part = missing[first : first + size]
            filled = part + part[-1:] * (size - len(part))
            given = {name: [column[i] for i in filled] for name, column in columns.items()}
            embedded = self.policy.encode([prompts[i] for i in filled], **given)
            for i, row in zip(part, embedded.rows, strict=False):
                self._rows[keys[i]] = row.on(torch.device("cpu")).sharing(self._shared)
                self._size += self._rows[keys[i]].nbytes
        for key in distinct:
            self._rows.move_to_end(key)
        rows = [self._rows[key] for key in keys]
        while self._size > self.max_bytes and len(self._rows) > len(distinct):
            self._size -= self._rows.popitem(last=False)[1].nbytes
        return Conditioning(rows)

"""Blocks of a completion: how they are found in its text, and which tokens belong to which."""

import logging
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from math import isfinite
from typing import Any, NamedTuple

import regex


logger = logging.getLogger(__name__)

PATTERN_SECONDS = 0.2  # for a pattern in a completion
_OUTSIDE = "\x00"  # stands for a character that the model did not write


@dataclass(frozen=True)
class Block:
    r"""
    A part of a completion with an objective of its own.

    A block is found by its `tags` or by its `pattern`. Blocks keep their order: each is looked for after the end of
    the one before, so a later block's tags within an earlier block, or before it, do not count. What stands before,
    between and after blocks belongs to the block before it, and at the beginning to the first block.

    The **first block** therefore always has tokens, whether its tags are there or not, and its reward always counts.
    A **later block** that is missing has no tokens and no advantage, and its reward is left out of its baseline. It
    counts `missing_reward` in every logged reward, and, unless `BlockwiseGRPOConfig(charge_missing=False)` (the paper's
    setting), in the training reward of the block before it, which could have gone on to it.

    Args:
        name (`str`):
            Name of the block in logs, in the completions table and in `block_texts`.
        reward_funcs (`Callable` or `list[Callable]`):
            Its reward functions, in everything as those of [`~trl.GRPOTrainer`]: called with the whole completions,
            and with `block_texts`, the list of each completion's `{name: text}` (`None` if missing). `None` in what
            they return means "not applicable".
        tags (`str` or `tuple[str, ...]`, *optional*):
            Names of the tags it is made of, in order, without brackets. The block begins with the first opening tag of
            any of them and ends with the closing tag of the last. Without that closing tag (in a truncated completion)
            it ends where the next block begins. They should be ordinary tokens: TRL takes special tokens out of the
            completions that reward functions get.
        pattern (`str`, *optional*):
            Instead of `tags`: a regular expression that matches the block (`.` matches newlines as well). Where it
            takes longer than a fifth of a second, the block counts as missing, with a warning.
        occurrence (`str`, *optional*, defaults to `"last"`):
            Which counts of several, as after an echo of the instruction or a correction: `"last"` or `"first"`. The last
            one before the next block; what was taken back belongs to the block as well.
        reward_weights (`list[float]`, *optional*):
            Weight of each reward function; by default 1.
        outcome (`Callable`, *optional*):
            For later blocks: a function, called like a reward function, that returns for each completion the discrete
            outcome of what stands before the block (any hashable value; for a confidence, whether the solution was
            correct). Only completions with the same outcome are compared. Needed for `baseline="outcome"`, and called
            only then; what it logs with `log_extra` and `log_metric` is dropped.
        weight (`float`, *optional*, defaults to `1.0`):
            Weight w of the block in the loss.
        missing_reward (`float`, *optional*, defaults to `-1.0`):
            What a completion without the block counts (a later block): the lowest that its reward functions give, lest
            a block that is missing be worth more than a bad one.

    Raises:
        ValueError: if a field does not fit; the message names it and what would work.

    Example:

    ```python
    from flow_trl import Block
    from flow_trl.rewards.text import brier_reward, correctness_reward

    blocks = [
        Block("solution", correctness_reward, tags=("reasoning", "answer")),
        Block("confidence", brier_reward, tags=("analysis", "confidence"), outcome=correctness_reward),
    ]
    ```
    """

    name: str
    reward_funcs: Callable | list[Callable]
    tags: str | tuple[str, ...] | None = None
    pattern: str | None = None
    occurrence: str = "last"
    reward_weights: list[float] | None = None
    outcome: Callable | None = None
    weight: float = 1.0
    missing_reward: float = -1.0
    _regex: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if not self.name or not isinstance(self.name, str):
            raise ValueError(f"`name={self.name!r}`: give the block a name.")
        where = f"Block {self.name!r}: "
        funcs = self.reward_funcs if isinstance(self.reward_funcs, list | tuple) else [self.reward_funcs]
        if not funcs or not all(callable(func) or isinstance(func, str) for func in funcs):
            raise ValueError(
                f"{where}`reward_funcs={self.reward_funcs!r}`: pass a reward function or a list of at least one."
            )
        weights = [1.0] * len(funcs) if self.reward_weights is None else list(self.reward_weights)
        if len(weights) != len(funcs):
            raise ValueError(f"{where}`reward_weights` has {len(weights)} values for {len(funcs)} reward functions.")
        if not all(isfinite(weight) for weight in weights):
            raise ValueError(f"{where}`reward_weights={weights}`: they must be finite.")
        if not isfinite(self.missing_reward):
            raise ValueError(f"{where}`missing_reward={self.missing_reward}`: it must be finite.")
        if self.occurrence not in ("first", "last"):
            raise ValueError(f'{where}`occurrence={self.occurrence!r}`: it must be "first" or "last".')
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"{where}`weight={self.weight}`: it must be at least 0 and finite.")
        if self.outcome is not None and not callable(self.outcome):
            raise ValueError(
                f"{where}`outcome={self.outcome!r}`: pass a function, called like a reward function, that returns one "
                "hashable value for each completion."
            )
        if (self.tags is None) == (self.pattern is None):
            raise ValueError(f"{where}pass either `tags` or `pattern`; got {self.tags!r} and {self.pattern!r}.")
        tags = None if self.tags is None else _checked_tags(self.tags, where)
        compiled = _compile_tags(tags) if tags else _compile_pattern(self.pattern, where)
        values = {"reward_funcs": list(funcs), "reward_weights": weights, "tags": tags, "_regex": compiled}
        for attribute, value in values.items():
            object.__setattr__(self, attribute, value)

    def _search(self, text: str, position: int, later: Sequence["Block"]) -> "_Occurrence | None":
        """The first occurrence from a position on."""
        if self.tags is None:
            try:
                match = self._regex.search(text, position, timeout=PATTERN_SECONDS)
            except TimeoutError:
                _warn_of_slow_pattern(self.name, self.pattern)
                match = None
            return match and _Occurrence(*match.span(), is_closed=True)
        match = self._regex.search(text, position)
        if match is None:
            return None
        start, end = match.span()
        opening = text[start : text.index(">", start) + 1]
        if match["rest"] is not None:
            # Opened again after another block's beginning, the first one was left open.
            again = text.rfind(opening, start + 1, end)
            others = [text.find(f"<{tag}>", start, again) for block in later for tag in block.tags or ()]
            if again < 0 or max(others, default=-1) < 0:
                return _Occurrence(start, end, is_closed=True)
        return _Occurrence(start, start + len(opening), is_closed=False)

    def is_complete(self, text: str | None) -> bool:
        """
        Says whether the text of a block, as it was found (`None` if it was not), has the block's end: its last closing
        tag. What a pattern found always has.

        Example:

        ```python
        >>> Block("answer", len, tags="answer").is_complete("<answer>4")
        False
        ```
        """
        return text is not None and (self.tags is None or text.endswith(f"</{self.tags[-1]}>"))


class _Occurrence(NamedTuple):
    start: int
    end: int
    is_closed: bool


def _checked_tags(given: Any, where: str) -> tuple[str, ...]:
    tags = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not tags or not all(isinstance(tag, str) and re.fullmatch(r"[^<>/\s]+", tag) for tag in tags):
        raise ValueError(
            f'{where}`tags={given!r}`: pass the names of tags without brackets, such as ("reasoning", "answer").'
        )
    if len(set(tags)) < len(tags):
        raise ValueError(f"{where}`tags={given!r}`: name each tag once.")
    return tags


def _compile_tags(tags: tuple[str, ...]) -> re.Pattern:
    """Finds the whole block if it is closed, else its opening tag."""
    opening = "|".join(re.escape(f"<{tag}>") for tag in tags)
    closing = re.escape(f"</{tags[-1]}>")
    return re.compile(f"(?:{opening})(?P<rest>.*?{closing})?", re.DOTALL)


def _compile_pattern(pattern: Any, where: str) -> regex.Pattern:
    try:
        if not isinstance(pattern, str):
            raise TypeError("it must be a string")
        empty = re._parser.parse(pattern, re.DOTALL).getwidth()[0] == 0
        compiled = regex.compile(pattern, regex.DOTALL)
    except (re.error, regex.error, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}`pattern={pattern!r}` is not a regular expression ({error}). "
            "Escape literal text with `re.escape`."
        ) from error
    if empty:
        raise ValueError(
            f"{where}`pattern={pattern!r}` matches the empty text: every place would do, and no token would be in the "
            "block. Let it match at least one character."
        )
    return compiled


@cache  # once
def _warn_of_slow_pattern(name: str, pattern: str) -> None:
    logger.warning(
        f"Block {name!r}: `pattern={pattern!r}` took longer than {PATTERN_SECONDS} s in a completion, in which the block "
        "counts as missing. Nested repetitions such as `(a+)+` take time that doubles with each character: write the "
        "pattern without them, or use `tags`."
    )


class ParsedCompletion(NamedTuple):
    """
    Where the blocks of a completion are.

    Args:
        block_index (`list[int]` of length `T`):
            For each token the number of its block.
        texts (`list[str | None]` of length `n_blocks`):
            Text of each block, its tags included; `None` if it is missing.
    """

    block_index: list[int]
    texts: list[str | None]


def check_blocks(blocks: Sequence[Block]) -> list[Block]:
    """
    Checks that blocks go together, and returns them as a list: at least one, names and tags that occur once.

    Raises:
        TypeError: if `blocks` is not a sequence of [`Block`].
        ValueError: if there are none, or if two of them have the same name, share a tag or have the same pattern.
    """
    if not isinstance(blocks, list | tuple) or not all(isinstance(block, Block) for block in blocks):
        raise TypeError(f"`blocks={blocks!r}`: pass a list of `flow_trl.Block`.")
    if not blocks:
        raise ValueError("`blocks` is empty: pass at least one `flow_trl.Block`.")
    owner: dict[tuple[str, str], str] = {}
    for block in blocks:
        keys = [("pattern", block.pattern)] if block.tags is None else [("tag", tag) for tag in block.tags]
        for kind, value in [("name", block.name), *keys]:
            if (kind, value) in owner:
                raise ValueError(
                    f"`blocks` overlap: {owner[kind, value]!r} and {block.name!r} have the same {kind} {value!r}. "
                    "Each block needs its own."
                )
            owner[kind, value] = block.name
    return list(blocks)


def find_blocks(text: str, blocks: Sequence[Block]) -> list[tuple[int, int] | None]:
    """
    Finds the blocks of a text in their order.

    Args:
        text (`str`):
            A completion.
        blocks (`Sequence[Block]`):
            What to look for.

    Returns:
        `list[tuple[int, int] | None]`: for each block its first character and the one after its last; `None` if it is
        missing.

    Example:

    ```python
    >>> blocks = [Block("answer", len, tags="answer"), Block("confidence", len, tags="confidence")]
    >>> find_blocks("<answer>4</answer> <confidence>0.9</confidence>", blocks)
    [(0, 18), (19, 47)]
    ```
    """
    found = _search_all(text, blocks, 0)
    starts = [one and one.start for one in found]  # also of what was taken back
    for k, block in enumerate(blocks):
        if found[k] is None or block.occurrence == "first":
            continue
        while True:
            later = _search_all(text, blocks[k:], found[k].end)
            if any(
                old and (new is None or old.is_closed > new.is_closed)
                for old, new in zip(found[k:], later, strict=True)
            ):
                break
            found[k:] = later
            starts[k + 1 :] = [one and one.start for one in later[1:]]
    spans: list[tuple[int, int] | None] = []
    following = len(text)
    for start, one in zip(reversed(starts), reversed(found), strict=True):
        if one is None:
            spans.append(None)
            continue
        spans.append((start, one.end if one.is_closed else following))
        following = start
    return spans[::-1]


def _search_all(text: str, blocks: Sequence[Block], position: int) -> list[_Occurrence | None]:
    """The first occurrence of each block after that of the one before."""
    found = []
    for k, block in enumerate(blocks):
        one = block._search(text, position, blocks[k + 1 :])
        found.append(one)
        position = one.end if one else position
    return found


def parse_completion(
    token_ids: Sequence[int], blocks: Sequence[Block], tokenizer: Any, mask: Sequence[int] | None = None
) -> ParsedCompletion:
    """
    Finds the blocks of a generated completion and says which token belongs to which.

    A token belongs to the block that holds its first character (white space at its beginning does not count, as in the
    offsets of tokenizers). That is found by decoding prefixes of the tokens that were generated, so it holds for every
    tokenizer, whether encoding the text again would give the same tokens or not.

    Args:
        token_ids (`Sequence[int]` of length `T`):
            Tokens of one completion, without padding.
        blocks (`Sequence[Block]`):
            What to look for.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes the tokens. Special tokens are kept, so tags may be special tokens.
        mask (`Sequence[int]` of length `T`, *optional*):
            0 for tokens that the model did not write, such as a tool's result: tags in them do not count, and
            `texts` leave them out.

    Returns:
        [`ParsedCompletion`]: `block_index` with each token in exactly one block, and `texts`.

    Example:

    ```python
    >>> blocks = [Block("answer", len, tags="answer"), Block("confidence", len, tags="confidence")]
    >>> ids = tokenizer("<answer>4</answer><confidence>0.9</confidence>").input_ids
    >>> parse_completion(ids, blocks, tokenizer).texts
    ['<answer>4</answer>', '<confidence>0.9</confidence>']
    ```
    """
    token_ids = list(token_ids)
    if getattr(tokenizer, "backend_tokenizer", None) is not None:  # several times faster than through its wrapper
        decode = partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
    else:
        decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text = decode(token_ids)

    def first_character(token: int) -> int:
        # A prefix that ends within a character decodes to something that the text does not hold, with byte fallback
        # back to the first of the bytes in a row. At most three tokens before, a character ends.
        longest = 0
        for end in range(token, max(token - 4, -1), -1):
            prefix = decode(token_ids[:end])
            if text.startswith(prefix):
                return max(longest, len(prefix))
            longest = max(longest, len(os.path.commonprefix([text, prefix])))
        return longest

    own = text
    if mask is not None and not all(mask):
        edges = [i for i in range(1, len(mask)) if mask[i] != mask[i - 1]]
        places = [0, *map(first_character, edges), len(text)]
        own = "".join(
            text[start:end] if mask[token] else _OUTSIDE * (end - start)
            for token, start, end in zip([0, *edges], places, places[1:], strict=False)
        )
    spans = find_blocks(own, blocks)
    block_index = [0] * len(token_ids)
    for number, span in enumerate(spans[1:], 1):
        if span is None:
            continue
        # The first token that begins at or after the block's first character.
        first = bisect_left(range(len(token_ids)), span[0], key=first_character)
        if first and first_character(first) > span[0] and text[first_character(first - 1) : span[0]].isspace():
            first -= 1
        if text[: span[0]].endswith("\ufffd"):  # the first byte of a broken character decodes like all of them
            ends = range(first, min(first + 2, len(token_ids)) + 1)
            first = max((end for end in ends if decode(token_ids[:end]) == text[: span[0]]), default=first)
        block_index[first:] = [number] * (len(token_ids) - first)
    texts = [None if span is None else own[slice(*span)] for span in spans]
    if own is not text:
        texts = [text and text.replace(_OUTSIDE, "") for text in texts]
    return ParsedCompletion(block_index, texts)

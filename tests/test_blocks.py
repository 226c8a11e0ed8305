"""Blocks of completions against texts marked by hand, and their tokens against the tokenizers' own offsets."""

import dataclasses
import functools
import pickle
import random
import re
import time

import pytest
from transformers import ByT5Tokenizer

from flow_trl import Block
from flow_trl.blocks import check_blocks, find_blocks, parse_completion
from tests import text_models


def tagged(*names):
    return [Block("-".join(name.split()), len, tags=tuple(name.split()), occurrence="first") for name in names]


SOLUTION = tagged("reasoning answer", "analysis confidence")
PLAIN = tagged("answer", "confidence")
ATTEMPTS = tagged("first_attempt", "second_attempt")
THREE = tagged("reasoning", "answer", "confidence")
FIVE = tagged("a", "b", "c", "d", "e")
PATTERN = [Block("answer", len, tags="answer"), Block("confidence", len, pattern=r"Confidence: [\d.]+")]
LINES = [Block("steps", len, pattern=r"Step 1.*?(?=Final|\Z)"), Block("final", len, pattern=r"Final.*")]
PARAGRAPH = [Block("work", len, pattern=r"\w.*?(?=\n\n|\Z)"), Block("rest", len, pattern=r"\n\n.*")]
CHINESE = [Block("work", len, tags="answer"), Block("answer", len, pattern="答案.*")]

# ⟦0...⟧ marks what block 0 should be found to be.
CASES = {
    "all": (
        SOLUTION,
        "⟦0<reasoning>1 + 2</reasoning><answer>3</answer>⟧⟦1<analysis>sure</analysis><confidence>0.9</confidence>⟧",
    ),
    "before": (PLAIN, "Let me see. ⟦0<answer>3</answer>⟧⟦1<confidence>1</confidence>⟧"),
    "between": (PLAIN, "⟦0<answer>3</answer>⟧ so I am ⟦1<confidence>1</confidence>⟧"),
    "after": (PLAIN, "⟦0<answer>3</answer>⟧⟦1<confidence>1</confidence>⟧ and that is all."),
    "before, between and after": (PLAIN, "a ⟦0<answer>3</answer>⟧ b ⟦1<confidence>1</confidence>⟧ c"),
    "newline between": (PLAIN, "⟦0<answer>3</answer>⟧\n⟦1<confidence>1</confidence>⟧\n"),
    "blank lines between": (PLAIN, "\n\n⟦0<answer>\n3\n</answer>⟧\n\n \t\n⟦1<confidence>\n1\n</confidence>⟧\n\n"),
    "windows newlines": (PLAIN, "⟦0<answer>3</answer>⟧\r\n⟦1<confidence>1</confidence>⟧\r\n"),
    "spaces between": (PLAIN, "⟦0<answer>3</answer>⟧     ⟦1<confidence>1</confidence>⟧   "),
    "space within": (PLAIN, "⟦0<answer> 3 </answer>⟧⟦1<confidence> 1 </confidence>⟧"),
    "words": (PLAIN, "yes ⟦0<answer> 3 </answer>⟧ maybe , ⟦1<confidence> 0.9 </confidence>⟧ no"),
    "words, all": (
        SOLUTION,
        "⟦0<reasoning> 1 </reasoning> <answer> 3 </answer>⟧ ⟦1<analysis> no </analysis> <confidence> 1.0 </confidence>⟧",
    ),
    "words, later block alone": (PLAIN, "⟦1<confidence> 0.9 </confidence>⟧"),
    "words, opening tag last": (PLAIN, "⟦0<answer> 3 </answer>⟧ ⟦1<confidence>⟧"),
    "words, second missing": (PLAIN, "⟦0<answer> 3 </answer>⟧ no <eos>"),
    "words, reordered": (PLAIN, "<confidence> 1.0 </confidence> ⟦0<answer> 3 </answer>⟧ maybe"),
    "words, nothing but text": (PLAIN, "yes , no maybe 3 <eos>"),
    "words, truncated first": (PLAIN, "yes ⟦0<answer> 3 ⟧⟦1<confidence> 0.9 </confidence>⟧ no"),
    "text between the tags of a block": (
        SOLUTION,
        "⟦0<reasoning>r</reasoning> hence <answer>3</answer>⟧ ⟦1<analysis>s</analysis>\n\n<confidence>1</confidence>⟧",
    ),
    "nothing but text": (PLAIN, "I do not know."),
    "empty": (PLAIN, ""),
    "a space": (PLAIN, " "),
    "white space": (PLAIN, "\n \t\n  "),
    "empty blocks": (PLAIN, "⟦0<answer></answer>⟧⟦1<confidence></confidence>⟧"),
    "blocks of white space": (PLAIN, "⟦0<answer> </answer>⟧⟦1<confidence>\n</confidence>⟧"),
    "first missing": (PLAIN, "It is 3. ⟦1<confidence>1</confidence>⟧"),
    "first missing, nothing before": (PLAIN, "⟦1<confidence>1</confidence>⟧"),
    "second missing": (PLAIN, "⟦0<answer>3</answer>⟧ for sure"),
    "one of two tags missing": (SOLUTION, "⟦0<answer>3</answer>⟧⟦1<analysis>s</analysis><confidence>1</confidence>⟧"),
    "later block begins with its last tag": (SOLUTION, "⟦0<reasoning>r</reasoning><answer>3</answer>⟧⟦1<confidence>1</confidence>⟧"),
    "no answer": (SOLUTION, "⟦0<reasoning>r</reasoning>⟧⟦1<analysis>s</analysis><confidence>1</confidence>⟧"),
    "tags of a block the other way round": (SOLUTION, "⟦0<answer>3</answer>⟧<reasoning>r</reasoning>⟦1<confidence>1</confidence>⟧"),
    "repeated first": (PLAIN, "⟦0<answer>3</answer>⟧<answer>4</answer>⟦1<confidence>1</confidence>⟧"),
    "repeated second": (PLAIN, "⟦0<answer>3</answer>⟧⟦1<confidence>1</confidence>⟧<confidence>0</confidence>"),
    "all twice": (PLAIN, "⟦0<answer>3</answer>⟧⟦1<confidence>1</confidence>⟧<answer>4</answer><confidence>0</confidence>"),
    "doubled opening tag": (PLAIN, "⟦0<answer><answer>3</answer>⟧</answer>⟦1<confidence><confidence>1</confidence>⟧"),
    "reordered": (PLAIN, "<confidence>1</confidence>⟦0<answer>3</answer>⟧"),
    "reordered, then in order": (PLAIN, "<confidence>1</confidence>⟦0<answer>3</answer>⟧⟦1<confidence>0</confidence>⟧"),
    "second within first": (PLAIN, "⟦0<answer>3 <confidence>1</confidence> 4</answer>⟧"),
    "second within first and after": (PLAIN, "⟦0<answer><confidence>1</confidence></answer>⟧⟦1<confidence>0</confidence>⟧"),
    "first within second": (PLAIN, "⟦0<answer>3</answer>⟧⟦1<confidence><answer>4</answer> 1</confidence>⟧"),
    "overlapping": (PLAIN, "⟦0<answer>3<confidence></answer>⟧1</confidence>"),
    "unclosed first": (PLAIN, "⟦0<answer>3 I am ⟧⟦1<confidence>1</confidence>⟧"),
    "unclosed first, closed much later": (PLAIN, "⟦0<answer>3<confidence>1</confidence></answer>⟧ that is it"),
    "unclosed second": (PLAIN, "⟦0<answer>3</answer>⟧⟦1<confidence>1⟧"),
    "unclosed both": (PLAIN, "⟦0<answer>3 ⟧⟦1<confidence>1⟧"),
    "only opening tags": (PLAIN, "⟦0<answer>⟧⟦1<confidence>⟧"),
    "only closing tags": (PLAIN, "3</answer>1</confidence>"),
    "closing before opening": (PLAIN, "</answer>⟦0<answer>3 ⟧⟦1<confidence>1⟧"),
    "closed by the wrong tag": (SOLUTION, "⟦0<answer>3</reasoning>⟧⟦1<confidence>1</analysis>⟧"),
    "truncated opening tag": (PLAIN, "⟦0<answer>3</answer>⟧<confidenc"),
    "truncated closing tag": (PLAIN, "⟦0<answer>3</answer>⟧⟦1<confidence>1</confidenc⟧"),
    "truncated in the first": (SOLUTION, "so: ⟦0<reasoning>1 + 2 is⟧"),
    "truncated between the tags of the first": (SOLUTION, "⟦0<reasoning>1</reasoning>⟧"),
    "upper case": (PLAIN, "<ANSWER>3</ANSWER>⟦1<confidence>1</confidence>⟧"),
    "upper case closing": (PLAIN, "⟦0<answer>3</Answer>⟧⟦1<confidence>1</confidence>⟧"),
    "attributes": (PLAIN, '<answer id="1">3</answer>⟦1<confidence>1</confidence>⟧'),
    "spaces in tags": (PLAIN, "< answer>3</answer><answer >3</ answer>⟦1<confidence>1</confidence >⟧"),
    "self-closing": (PLAIN, "<answer/>⟦1<confidence>1</confidence>⟧"),
    "longer tag names": (PLAIN, "<answers>3</answers><my-answer>4</my-answer>⟦0<answer>5</answer>⟧"),
    "escaped tags": (PLAIN, "&lt;answer&gt;3 ⟦0<answer>4</answer>⟧"),
    "brackets around": (PLAIN, "<<⟦0<answer>3</answer>⟧>><⟦1<confidence>1</confidence>⟧>"),
    "comparison signs": (PLAIN, "1<2>0 ⟦0<answer>3 < 4 > 2</answer>⟧ < ⟦1<confidence>1</confidence>⟧"),
    "one block": (tagged("answer"), "so ⟦0<answer>3</answer>⟧ and so on"),
    "one block, missing": (tagged("answer"), "and so on"),
    "three": (THREE, "a ⟦0<reasoning>r</reasoning>⟧ b ⟦1<answer>3</answer>⟧ c ⟦2<confidence>1</confidence>⟧ d"),
    "three, middle missing": (THREE, "⟦0<reasoning>r</reasoning>⟧ b ⟦2<confidence>1</confidence>⟧"),
    "three, only the last": (THREE, "b ⟦2<confidence>1</confidence>⟧"),
    "three, only the middle": (THREE, "b ⟦1<answer>3</answer>⟧ c"),
    "three, first unclosed and middle missing": (THREE, "⟦0<reasoning>r ⟧⟦2<confidence>1</confidence>⟧"),
    "three, all unclosed": (THREE, "⟦0<reasoning>r ⟧⟦1<answer>3 ⟧⟦2<confidence>1⟧"),
    "three, last two swapped": (THREE, "⟦0<reasoning>r</reasoning>⟧<confidence>1</confidence>⟦1<answer>3</answer>⟧"),
    "five": (FIVE, "⟦0<a>1</a>⟧⟦1<b>2</b>⟧⟦2<c>3</c>⟧⟦3<d>4</d>⟧⟦4<e>5</e>⟧"),
    "five, every other": (FIVE, "⟦0<a>1</a>⟧ ⟦2<c>3</c>⟧ ⟦4<e>5</e>⟧"),
    "five, one letter each": (FIVE, "⟦0<a>⟧⟦1<b>⟧⟦2<c>⟧⟦3<d>⟧⟦4<e>⟧"),
    "two attempts": (
        ATTEMPTS,
        "⟦0<first_attempt>\n1 + 2 = \\boxed{4}\n</first_attempt>⟧\n⟦1<second_attempt>\nNo: \\boxed{3}\n</second_attempt>⟧",
    ),
    "two attempts, first only": (ATTEMPTS, "⟦0<first_attempt>\\boxed{4}</first_attempt>⟧"),
    "pattern": (PATTERN, "⟦0<answer>3</answer>⟧ ⟦1Confidence: 0.9⟧ or so"),
    "pattern, before the first": (PATTERN, "Confidence: 0.9 ⟦0<answer>3</answer>⟧ ⟦1Confidence: 1⟧"),
    "pattern, truncated": (PATTERN, "⟦0<answer>3 ⟧⟦1Confidence: 0.⟧"),
    "pattern, missing": (PATTERN, "⟦0<answer>3</answer>⟧ Confidence: high"),
    "pattern of lines": (LINES, "Well.\n⟦0Step 1: 1 + 2\nStep 2: 3\n⟧⟦1Final\nanswer: 3\n⟧"),
    "pattern of lines, first only": (LINES, "⟦0Step 1: 1 + 2\nStep 2⟧"),
    "pattern of lines, last only": (LINES, "I know. ⟦1Final: 3⟧"),
    "pattern that begins with newlines": (PARAGRAPH, "⟦0three\nlines\nhere⟧⟦1\n\nthe rest⟧"),
    "emoji": (PLAIN, "👍🏽 ⟦0<answer>👍🏽</answer>⟧👩‍👩‍👧‍👦⟦1<confidence>🏳️‍🌈</confidence>⟧👍🏽"),
    "emoji touching the tags": (PLAIN, "🙂⟦0<answer>🙂</answer>⟧🙂⟦1<confidence>🙂</confidence>⟧🙂"),
    "chinese": (PLAIN, "答案是⟦0<answer>三</answer>⟧，信心⟦1<confidence>高</confidence>⟧。"),
    "chinese pattern": (CHINESE, "⟦0<answer>三</answer>⟧你好⟦1答案: 三⟧"),
    "chinese pattern, nothing else": (CHINESE, "你好你好你好⟦1答案你好你好你好⟧"),
    "combining characters": (PLAIN, "e\u0301⟦0<answer>n\u0303</answer>⟧o\u0308\u0323⟦1<confidence>1</confidence>⟧\u0301"),
    "right to left": (PLAIN, "שלום⟦0<answer>مرحبا</answer>⟧\u200f⟦1<confidence>1</confidence>⟧"),
    "zero-width and no-break spaces": (PLAIN, "\u200b⟦0<answer>3</answer>⟧\u200b\u00a0⟦1<confidence>1</confidence>⟧\ufeff"),
    "replacement characters": (PLAIN, "\ufffd⟦0<answer>\ufffd</answer>⟧\ufffd⟦1<confidence>\ufffd</confidence>⟧\ufffd"),
    "eos last": (PLAIN, "⟦0<answer>3</answer>⟧⟦1<confidence>1</confidence>⟧<eos>"),
    "eos between": (PLAIN, "⟦0<answer>3</answer>⟧<eos>⟦1<confidence>1</confidence>⟧<eos><eos>"),
    "eos within": (PLAIN, "⟦0<answer>3<eos></answer>⟧⟦1<confidence>1⟧"),
    "eos first": (PLAIN, "<eos>⟦0<answer>3</answer>⟧⟦1<confidence>1</confidence>⟧"),
    "eos only": (PLAIN, "<eos>"),
    "padding within": (PLAIN, "⟦0<answer>3</answer>⟧<pad><pad>⟦1<confidence>1</confidence>⟧<pad>"),
}  # fmt: skip


def unmark(marked, n_blocks):
    """The text, and for each block where it is marked."""
    spans, text, last = [None] * n_blocks, "", 0
    for match in re.finditer(r"⟦(\d)(.*?)⟧", marked, re.DOTALL):
        text += marked[last : match.start()]
        spans[int(match[1])] = (len(text), len(text) + len(match[2]))
        text += match[2]
        last = match.end()
    return text + marked[last:], spans


TOKENIZERS = {
    "byte-level": text_models.byte_level,
    "special tags": lambda: text_models.byte_level(special=text_models.BRACKETS),
    "added tags": lambda: text_models.byte_level(added=text_models.BRACKETS),
    "prefix space": text_models.prefix_space,
    "word-level": text_models.word_level,
    "bytes": ByT5Tokenizer,  # in Python, without offsets
}
tokenizer_of = functools.cache(lambda name: TOKENIZERS[name]())


def encode(name, text):
    return tokenizer_of(name)(text, add_special_tokens=False).input_ids


def decode(name, ids):
    return tokenizer_of(name).decode(ids, skip_special_tokens=False)


def offsets(name, text):
    if name == "bytes":
        pieces = re.finditer(r"<pad>|.", text, re.DOTALL)
        return [piece.span() for piece in pieces for _ in (piece[0].encode() if len(piece[0]) == 1 else [0])]
    return tokenizer_of(name)(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping


def first_characters(text, offsets):
    """Where tokens begin, after the white space at their beginning, unless they are nothing else."""
    return [
        start + (len(text[start:end]) - len(text[start:end].lstrip()) if text[start:end].strip() else 0)
        for start, end in offsets
    ]


def owners(starts, spans):
    """For each token the last block that begins no later, by definition."""
    return [max([0] + [k for k, span in enumerate(spans) if k and span and span[0] <= start]) for start in starts]


def owned_texts(text, spans):
    """What each block owns: its text and what follows, up to the next block; the first also what comes before."""
    begin = [0] + [span[0] if span else None for span in spans[1:]]
    end = [next((b for b in begin[k + 1 :] if b is not None), len(text)) for k in range(len(spans))]
    return ["" if b is None else text[b:e] for b, e in zip(begin, end, strict=True)]


def straddles(offsets, spans):
    return any(start < span[0] < end for start, end in offsets for span in spans[1:] if span)


PAIRS = [
    (case, name)
    for case, (blocks, marked) in CASES.items()
    for name in TOKENIZERS
    if decode(name, encode(name, unmark(marked, len(blocks))[0])) == unmark(marked, len(blocks))[0]
]


def test_every_case_and_every_tokenizer_occurs():
    assert {case for case, _ in PAIRS} == set(CASES)
    assert len(CASES) >= 80
    counts = {name: sum(name == other for _, other in PAIRS) for name in TOKENIZERS}
    assert counts.pop("word-level") >= 10
    assert min(counts.values()) >= 75


@pytest.mark.parametrize("case", CASES)
def test_find_blocks(case):
    blocks, marked = CASES[case]
    text, spans = unmark(marked, len(blocks))
    assert find_blocks(text, blocks) == spans


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_parse_completion(case, name):
    blocks, marked = CASES[case]
    text, spans = unmark(marked, len(blocks))
    ids = encode(name, text)
    index, texts = parse_completion(ids, blocks, tokenizer_of(name))
    assert texts == [span and text[slice(*span)] for span in spans]
    assert len(index) == len(ids) and index == sorted(index)
    assert index == owners(first_characters(text, offsets(name, text)), spans)
    if not straddles(offsets(name, text), spans):
        got = [
            decode(name, [i for i, k in zip(ids, index, strict=True) if k == block]) for block in range(len(blocks))
        ]
        expected = owned_texts(text, spans)
        if name in ("word-level", "prefix space"):  # which drop the space at the beginning of what they decode
            got, expected = [part.strip() for part in got], [part.strip() for part in expected]
        else:
            assert "".join(got) == text
        assert got == expected


def test_the_cases_have_tokens_over_boundaries():
    for name in ("byte-level", "prefix space"):
        found = [
            case
            for case, (blocks, marked) in CASES.items()
            if straddles(offsets(name, unmark(marked, len(blocks))[0]), unmark(marked, len(blocks))[1])
        ]
        assert len(found) >= 5


def test_a_token_over_a_boundary_belongs_to_the_block_of_its_first_character():
    ids = encode("byte-level", "<answer>3</answer><analysis>s</analysis>")
    tokens = tokenizer_of("byte-level").convert_ids_to_tokens(ids)
    assert "</answer><analysis" in tokens
    index, texts = parse_completion(ids, tagged("answer", "analysis"), tokenizer_of("byte-level"))
    assert texts == ["<answer>3</answer>", "<analysis>s</analysis>"]
    first = tokens.index("</answer><analysis")
    assert index == [0] * (first + 1) + [1] * (len(ids) - first - 1)


def test_white_space_at_the_beginning_of_a_token_does_not_count():
    name = "prefix space"
    ids = tokenizer_of(name).convert_tokens_to_ids(["▁<reasoning", ">", "3", "▁<reasoning", ">"])
    blocks = [Block("first", len, pattern=r"3"), Block("second", len, pattern="<reasoning>")]
    assert decode(name, ids) == "<reasoning>3 <reasoning>"
    assert parse_completion(ids, blocks, tokenizer_of(name)) == ([0, 0, 0, 1, 1], ["3", "<reasoning>"])


def test_a_block_within_one_token_has_no_tokens():
    tokenizer = text_models.byte_level(added=["x<confidence>1</confidence>"])
    ids = tokenizer("<answer>3</answer>x<confidence>1</confidence>").input_ids
    index, texts = parse_completion(ids, PLAIN, tokenizer)
    assert texts == ["<answer>3</answer>", "<confidence>1</confidence>"]
    assert index == [0] * len(ids)


@pytest.mark.parametrize("ids_type", [list, tuple])
def test_token_ids_are_any_sequence(ids_type):
    ids = encode("byte-level", "<answer>3</answer><confidence>1</confidence>")
    got = parse_completion(ids_type(ids), PLAIN, tokenizer_of("byte-level"))
    assert got == parse_completion(ids, PLAIN, tokenizer_of("byte-level"))


# Truncation

WHOLE = (
    "<reasoning>1 + 2</reasoning> so <answer>3</answer>",
    "\n",
    "<analysis>I am sure.</analysis><confidence>0.9</confidence>",
    " yes",
)


def truncated(n):
    """What should be found of the blocks of the whole text's first `n` characters."""
    solution, between, confidence, _ = WHOLE
    text, begin = "".join(WHOLE)[:n], len(solution + between)
    return [
        text[: len(solution)] if n >= len("<reasoning>") else None,
        text[begin : begin + len(confidence)] if n >= begin + len("<analysis>") else None,
    ]


@pytest.mark.parametrize("name", ["byte-level", "prefix space", "special tags", "bytes"])
def test_truncated_anywhere(name):
    for n in range(len("".join(WHOLE)) + 1):
        text = "".join(WHOLE)[:n]
        index, texts = parse_completion(encode(name, text), SOLUTION, tokenizer_of(name))
        assert texts == truncated(n)
        spans = [None, texts[1] and (text.index("<analysis>"), n)]
        assert index == owners(first_characters(text, offsets(name, text)), spans)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_truncated_after_any_token(name):
    text = "".join(WHOLE)
    if name == "word-level":
        text = "<reasoning> 1 </reasoning> <answer> 3 </answer> <analysis> yes </analysis> <confidence> 1 </confidence> no"
    ids = encode(name, text)
    whole = parse_completion(ids, SOLUTION, tokenizer_of(name)).block_index
    assert set(whole) == {0, 1}
    for n in range(len(ids) + 1):
        index, texts = parse_completion(ids[:n], SOLUTION, tokenizer_of(name))
        assert index == (whole[:n] if texts[1] else [0] * n)


# Tokens that encoding would not give


def byte_alphabet():
    """The character that stands for each byte, as in GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


ALPHABET = byte_alphabet()
BYTE_OF = {character: byte for byte, character in ALPHABET.items()}
SPLITTABLE = ("byte-level", "special tags", "prefix space")


def byte_ids(name, data):
    tokens = [f"<0x{byte:02X}>" if name == "prefix space" else ALPHABET[byte] for byte in data]
    return tokenizer_of(name).convert_tokens_to_ids(tokens)


def token_bytes(name, token_id):
    """Bytes of a token, and whether it is a single one of byte fallback."""
    token = tokenizer_of(name).convert_ids_to_tokens(token_id)
    if name == "prefix space":
        single = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return (bytes([int(single[1], 16)]), True) if single else (token.replace("▁", " ").encode(), False)
    if all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token), False
    return token.encode(), False


def valid_utf_8(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def split_characters(data):
    """Characters and how many bytes each has; what is broken is a replacement character."""
    while data:
        try:
            character = data.decode()[0]
            length = len(character.encode())
        except UnicodeDecodeError as error:
            if error.start:
                character = data[: error.start].decode()[0]
                length = len(character.encode())
            else:
                character, length = "\ufffd", error.end
        yield character, length
        data = data[length:]


def decode_by_hand(name, ids):
    """The text, and where in it each token begins, from the bytes of the tokens alone."""
    pieces = [token_bytes(name, token_id) for token_id in ids]
    runs = []  # what is decoded together
    for data, single in pieces:
        if runs and (name != "prefix space" or (single and runs[-1][1])):
            runs[-1] = (runs[-1][0] + data, single)
        else:
            runs.append((data, single))
    characters = []
    for data, single in runs:
        if single and not valid_utf_8(data):
            characters += [("\ufffd", 1)] * len(data)  # byte fallback takes all or nothing
        else:
            characters += split_characters(data)
    text, of_byte = "", []
    for character, length in characters:
        of_byte += [len(text)] * length
        text += character
    starts, first = [], 0
    for data, _ in pieces:
        held = of_byte[first : first + len(data)]
        starts.append(next((c for c in held if not text[c].isspace()), held[0]))
        first += len(data)
    if name == "prefix space" and text.startswith(" "):
        text, starts = text[1:], [max(start - 1, 0) for start in starts]
    return text, starts


def split_tokens(name, ids, rng, share):
    """Some tokens as their bytes instead."""
    special = set(tokenizer_of(name).all_special_ids)
    return [
        part
        for token_id in ids
        for part in (
            byte_ids(name, token_bytes(name, token_id)[0])
            if rng.random() < share and token_id not in special
            else [token_id]
        )
    ]


@pytest.mark.parametrize(("case", "name"), [pair for pair in PAIRS if pair[1] in SPLITTABLE])
def test_tokens_split_into_bytes(case, name):
    blocks, marked = CASES[case]
    text, spans = unmark(marked, len(blocks))
    rng = random.Random(f"{case} {name}")
    for share in (0.2, 0.5, 1.0):
        ids = split_tokens(name, encode(name, text), rng, share)
        by_hand, starts = decode_by_hand(name, ids)
        assert by_hand == text
        index, texts = parse_completion(ids, blocks, tokenizer_of(name))
        assert texts == [span and text[slice(*span)] for span in spans]
        assert index == owners(starts, spans)


@pytest.mark.parametrize("name", ["byte-level", "special tags", "prefix space"])
@pytest.mark.parametrize(
    "broken",
    [b"\xff", b"\xf0", b"\xf0\x9f", b"\xf0\x9f\x99", b"\xc3", b"\x80\x80\x80", b"\xff\xf0\x9f", b"\xed\xa0\x80", b"\xc3\xc3\xa9"],
    ids=lambda data: data.hex(),
)  # fmt: skip
def test_invalid_utf_8(name, broken):
    parts = ["", "<answer>", "3</answer>", "<confidence>", "1</confidence>"]
    for places in ([0], [1], [2], [3], [4], range(5)):
        ids = []
        for place, part in enumerate(parts):
            ids += encode(name, part) + (byte_ids(name, broken) if place in places else [])
        text, starts = decode_by_hand(name, ids)
        assert "\ufffd" in text and decode(name, ids) == text
        index, texts = parse_completion(ids, PLAIN, tokenizer_of(name))
        assert texts[1].startswith("<confidence>") and texts[1].endswith("1</confidence>")
        assert index == owners(starts, [None, (text.index("<confidence>"), len(text))])


def test_a_character_that_the_end_cuts_off():
    for name in ("byte-level", "prefix space", "bytes"):
        ids = encode(name, "<answer>🙂</answer><confidence>🙂")
        whole = parse_completion(ids, PLAIN, tokenizer_of(name)).block_index
        for cut in (1, 2, 3):
            assert parse_completion(ids[:-cut], PLAIN, tokenizer_of(name)).block_index == whole[:-cut]


def test_special_tokens_that_encoding_would_not_put_there():
    for name in ("byte-level", "word-level"):
        tokenizer = tokenizer_of(name)
        eos, unk = tokenizer.eos_token_id, tokenizer.unk_token_id
        answer, confidence = encode(name, "<answer> 3 </answer>"), encode(name, "<confidence> 1 </confidence>")
        ids = [eos, *answer, unk, eos, *confidence, eos, eos]
        index, texts = parse_completion(ids, PLAIN, tokenizer)
        assert texts == ["<answer> 3 </answer>", "<confidence> 1 </confidence>"]
        assert index == [0] * (len(answer) + 3) + [1] * (len(confidence) + 2)


def test_nothing_was_generated():
    for name in TOKENIZERS:
        assert parse_completion([], PLAIN, tokenizer_of(name)) == ([], [None, None])


# Which of several

LAST = [
    Block("solution", len, tags=("reasoning", "answer")),
    Block("confidence", len, tags=("analysis", "confidence")),
]
ANSWER, SURE = "<answer>{}</answer>", "<confidence>{}</confidence>"


@pytest.mark.parametrize(
    "marked",
    [
        # an echo of the instruction, thinking aloud, corrections
        "⟦0<answer>result</answer><analysis>a</analysis><confidence>q</confidence> So: <answer>4</answer>⟧⟦1<confidence>1</confidence>⟧",
        "⟦0<reasoning>r</reasoning><answer>5</answer> no: <answer>4</answer>⟧ ⟦1<confidence>1</confidence>⟧",
        "⟦0<answer>4</answer>⟧⟦1<confidence>1</confidence> rather <confidence>0.5</confidence>⟧",
        "⟦0<answer>4</answer>⟧⟦1<confidence>1</confidence>⟧<answer>5</answer>",
        "⟦0<answer>4</answer>⟧⟦1<confidence>1</confidence>⟧ <confidence>0.",
        "⟦0<answer>4</answer>⟧<answer>5⟦1<confidence>1</confidence>⟧",
        "⟦0<answer>4 ⟧⟦1<confidence>1⟧",
        "<confidence>1</confidence>⟦0<answer>4</answer>⟧",
        "so it is 4",
    ],
)
def test_the_last_of_several(marked):
    text, spans = unmark(marked, 2)
    assert find_blocks(text, LAST) == spans


def test_a_block_that_was_left_open_does_not_swallow_the_next():
    text, spans = unmark("⟦0<a>1 ⟧⟦1<b>2</b>⟧ <a>3</a>", 2)
    for occurrence in ("first", "last"):
        blocks = [dataclasses.replace(block, occurrence=occurrence) for block in tagged("a", "b")]
        assert find_blocks(text, blocks) == spans


def test_complete_blocks():
    block = LAST[0]
    assert block.is_complete("<reasoning>r</reasoning><answer>4</answer>")
    assert not any(map(block.is_complete, (None, "<reasoning>r</reasoning>", "<answer>4", "<reasoning>r")))
    assert Block("all", len, pattern=".+").is_complete("anything")


def test_a_pattern_has_a_time_limit(caplog):
    blocks = [Block("slow", len, pattern="(a|aa|aaa)+b"), Block("end", len, tags="end")]
    start = time.perf_counter()
    for _ in range(2):
        assert find_blocks("a" * 100 + "<end></end>", blocks) == [None, (100, 111)]
    assert time.perf_counter() - start < 5
    assert caplog.text.count("counts as missing") == 1
    assert find_blocks("aab", blocks[:1]) == [(0, 3)]


# Tokens that the model did not write


def test_tags_of_a_tool_do_not_count():
    parts = [("<reasoning>r</reasoning>", 1), ("<answer>9</answer><confidence>1</confidence>", 0), ("<answer>4", 1),
             ("</answer>", 1), ("<confidence>0.2", 1), ("</confidence> no", 0), ("</confidence>", 1)]  # fmt: skip
    for name in ("byte-level", "added tags", "prefix space", "bytes"):
        ids = [encode(name, part) for part, _ in parts]
        mask = [own for row, (_, own) in zip(ids, parts, strict=True) for _ in row]
        block_index, texts = parse_completion(sum(ids, []), LAST, tokenizer_of(name), mask)
        joined = [text.replace(" ", "") for text in texts]  # prefix space writes one before each part
        assert joined == ["<reasoning>r</reasoning><answer>4</answer>", "<confidence>0.2</confidence>"], name
        before = sum(map(len, ids[:4]))
        assert name == "prefix space" or block_index == [0] * before + [1] * (len(block_index) - before)
        assert parse_completion(sum(ids, []), LAST, tokenizer_of(name), [1] * len(mask)) == parse_completion(
            sum(ids, []), LAST, tokenizer_of(name)
        )


# Random completions


def slow_find_blocks(text, tags):
    found, position = [], 0
    for k, names in enumerate(tags):
        opening = [(text.find(f"<{name}>", position), len(name) + 2) for name in names]
        opening = min((begin, length) for begin, length in [*opening, (len(text) + 1, 0)] if begin >= 0)
        if opening[0] > len(text):
            found.append(None)
            continue
        position = sum(opening)
        close = text.find(f"</{names[-1]}>", position)
        again = text.rfind(text[opening[0] : position], position, max(close, 0))
        if any(f"<{name}>" in text[position : max(again, 0)] for later in tags[k + 1 :] for name in later):
            close = -1  # it was left open, and begins anew after a later block's beginning
        if close >= 0:
            position = close + len(names[-1]) + 3
        found.append([opening[0], position if close >= 0 else None])
    for k, span in enumerate(found):
        if span and span[1] is None:
            span[1] = next((later[0] for later in found[k + 1 :] if later), len(text))
    return [span and tuple(span) for span in found]


FRAGMENTS = [
    *text_models.BRACKETS * 3,
    "<answer", "answer>", "</", ">", "<", "><", "<Answer>", "</confidence >", "<eos>", "<pad>",
    " ", "  ", "\n", "\n\n", " 3", "0.9", "yes", "no ", "so the sum is", "é", "e\u0301", "👍🏽", "👩‍👧", "你好", "。", "\ufffd", "\u200b",
]  # fmt: skip
FORMATS = [
    [("reasoning", "answer"), ("analysis", "confidence")],
    [("answer",), ("confidence",)],
    [("reasoning",), ("answer",), ("analysis",), ("confidence",)],
    [("confidence", "answer"), ("reasoning",)],
]


@pytest.mark.parametrize("first", range(0, 300, 25))
def test_random_completions(first):
    for seed in range(first, first + 25):
        rng = random.Random(seed)
        text = "".join(rng.choices(FRAGMENTS, k=rng.randrange(24)))
        tags = rng.choice(FORMATS)
        blocks = [Block(f"{k}", len, tags=names, occurrence="first") for k, names in enumerate(tags)]
        spans = slow_find_blocks(text, tags)
        assert find_blocks(text, blocks) == spans
        texts = [span and text[slice(*span)] for span in spans]
        compared = 0
        for name in (*SPLITTABLE, "bytes"):
            ids = encode(name, text)
            if decode(name, ids) != text:
                continue
            compared += 1
            got = parse_completion(ids, blocks, tokenizer_of(name))
            assert got == (owners(first_characters(text, offsets(name, text)), spans), texts)
            if name not in SPLITTABLE:
                continue
            ids = split_tokens(name, ids, rng, 0.3)
            by_hand, starts = decode_by_hand(name, ids)
            assert by_hand == text
            assert parse_completion(ids, blocks, tokenizer_of(name)) == (owners(starts, spans), texts)
        assert compared >= 2


@pytest.mark.parametrize("first", range(0, 150, 25))
@pytest.mark.parametrize("name", ["byte-level", "prefix space"])
def test_random_tokens(name, first):
    for seed in range(first, first + 25):
        rng = random.Random(seed)
        ids = []
        for _ in range(rng.randrange(12)):
            if rng.random() < 0.5:
                ids += encode(name, rng.choice(text_models.BRACKETS))
            elif rng.random() < 0.5:
                ids += byte_ids(name, rng.choice(["你", "é", "👍🏽", "\ufffd", "\n"]).encode()[: rng.randrange(1, 9)])
            else:
                ids.append(rng.randrange(len(tokenizer_of(name))))
        text, starts = decode_by_hand(name, ids)
        assert decode(name, ids) == text
        tags = rng.choice(FORMATS)
        spans = slow_find_blocks(text, tags)
        index, texts = parse_completion(
            ids, [Block(f"{k}", len, tags=names) for k, names in enumerate(tags)], tokenizer_of(name)
        )
        assert texts == [span and text[slice(*span)] for span in spans]
        assert index == owners(starts, spans)


# Blocks and their errors


def reward(completions, **kwargs):
    return [0.0] * len(completions)


def test_a_block_s_fields():
    block = Block("solution", reward, tags="answer")
    assert (block.reward_funcs, block.reward_weights, block.tags) == ([reward], [1.0], ("answer",))
    assert (block.pattern, block.outcome, block.weight, block.missing_reward) == (None, None, 1.0, -1.0)
    block = Block("solution", (reward, len), tags=["reasoning", "answer"], reward_weights=(1, 2), weight=0)
    assert (block.reward_funcs, block.reward_weights, block.tags) == ([reward, len], [1, 2], ("reasoning", "answer"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        block.weight = 2.0


def test_a_block_can_be_replaced_compared_and_pickled():
    block = Block("solution", reward, tags=("reasoning", "answer"), outcome=len)
    assert dataclasses.replace(block, weight=2.0) == Block(
        "solution", [reward], ("reasoning", "answer"), outcome=len, weight=2
    )
    other = dataclasses.replace(block, tags="answer")
    assert other != block and find_blocks("<reasoning><answer>", [other]) == [(11, 19)]
    assert pickle.loads(pickle.dumps(Block("a", len, tags="answer"))) == Block("a", len, tags="answer")


def test_tags_and_patterns_are_taken_literally_or_not():
    assert find_blocks("<a.c>1</a.c>", [Block("a", len, tags="a.c")]) == [(0, 12)]
    assert find_blocks("<abc>1</abc>", [Block("a", len, tags="a.c")]) == [None]
    assert find_blocks("<abc>", [Block("a", len, pattern="<a.c>")]) == [(0, 5)]
    assert find_blocks("x ANSWER", [Block("a", len, pattern="(?i)answer(?P<rest>!)?")]) == [(2, 8)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "`name=''`: give the block a name"),
        ({"name": None}, "`name=None`: give the block a name"),
        ({"name": 3}, "`name=3`: give the block a name"),
        ({"reward_funcs": []}, "Block 'solution': `reward_funcs=[]`: pass a reward function or a list"),
        ({"reward_funcs": None}, "Block 'solution': `reward_funcs=None`"),
        ({"reward_funcs": [len, 3]}, "3]`: pass a reward function"),
        ({"reward_weights": [1.0, 2.0]}, "Block 'solution': `reward_weights` has 2 values for 1 reward functions"),
        ({"reward_weights": []}, "`reward_weights` has 0 values for 1 reward functions"),
        ({"weight": -0.5}, "Block 'solution': `weight=-0.5`: it must be at least 0 and finite"),
        ({"weight": float("nan")}, "`weight=nan`"),
        ({"weight": float("inf")}, "`weight=inf`"),
        ({"outcome": "correct"}, "Block 'solution': `outcome='correct'`: pass a function"),
        ({"tags": None}, "Block 'solution': pass either `tags` or `pattern`; got None and None"),
        ({"pattern": "x"}, "Block 'solution': pass either `tags` or `pattern`; got 'answer' and 'x'"),
        ({"tags": None, "pattern": "(x"}, "Block 'solution': `pattern='(x'` is not a regular expression (missing )"),
        ({"tags": None, "pattern": 5}, "`pattern=5` is not a regular expression"),
        ({"tags": None, "pattern": b"x"}, "`pattern=b'x'` is not a regular expression"),
        ({"tags": None, "pattern": "x*"}, "Block 'solution': `pattern='x*'` matches the empty text"),
        ({"tags": None, "pattern": ""}, "`pattern=''` matches the empty text"),
        ({"tags": None, "pattern": r"\b"}, r"matches the empty text"),
        ({"tags": None, "pattern": "(?=x)"}, "`pattern='(?=x)'` matches the empty text"),
        ({"tags": None, "pattern": "(?<=x)(y?|z)"}, "matches the empty text"),
        ({"tags": ("answer", "answer")}, "`tags=('answer', 'answer')`: name each tag once"),
        ({"reward_weights": [float("nan")]}, "`reward_weights=[nan]`: they must be finite"),
        ({"missing_reward": float("-inf")}, "`missing_reward=-inf`: it must be finite"),
        ({"occurrence": "any"}, "`occurrence='any'`"),
        ({"tags": ()}, "Block 'solution': `tags=()`: pass the names of tags without brackets"),
        ({"tags": ""}, "`tags=''`"),
        ({"tags": "<answer>"}, "`tags='<answer>'`"),
        ({"tags": "/answer"}, "`tags='/answer'`"),
        ({"tags": "reasoning answer"}, "`tags='reasoning answer'`"),
        ({"tags": ("answer", 5)}, "`tags=('answer', 5)`"),
        ({"tags": 5}, "`tags=5`"),
    ],
    ids=lambda value: "-".join(f"{key}={item!r}" for key, item in value.items()) if isinstance(value, dict) else "",
)
def test_bad_block(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Block(**{"name": "solution", "reward_funcs": reward, "tags": "answer", **fields})


def test_check_blocks_returns_a_list():
    blocks = check_blocks(tuple(SOLUTION))
    assert isinstance(blocks, list) and blocks == SOLUTION
    same_name_as_a_tag = [Block("answer", len, tags="reasoning"), Block("reasoning", len, pattern="answer")]
    assert check_blocks(same_name_as_a_tag) == same_name_as_a_tag


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ([], ValueError, "`blocks` is empty: pass at least one"),
        (None, TypeError, "`blocks=None`: pass a list of `flow_trl.Block`"),
        (PLAIN[0], TypeError, "`blocks=Block(name='answer'"),
        ([PLAIN[0], "confidence"], TypeError, "'confidence']`: pass a list"),
        (iter(PLAIN), TypeError, "pass a list of `flow_trl.Block`"),
        ([PLAIN[0], Block("answer", len, tags="x")], ValueError, "'answer' and 'answer' have the same name 'answer'"),
        ([PLAIN[0], Block("b", len, tags=("x", "answer"))], ValueError, "'answer' and 'b' have the same tag 'answer'"),
        (
            [Block("a", len, pattern="x+"), PLAIN[0], Block("b", len, pattern="x+")],
            ValueError,
            "'a' and 'b' have the same pattern 'x+'. Each block needs its own",
        ),
    ],
    ids=["empty", "none", "a block", "a string", "iterator", "name", "tag", "pattern"],
)
def test_bad_blocks(blocks, error, message):
    with pytest.raises(error, match=re.escape(message)):
        check_blocks(blocks)

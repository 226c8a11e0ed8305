"""Tokenizers of three kinds, trained here, and a small random Llama: seeded, offline, float32."""

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


TAGS = ["reasoning", "answer", "analysis", "confidence"]
BRACKETS = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
SPECIAL = ["<pad>", "<unk>", "<eos>"]
CORPUS = [
    f"<reasoning>3 + {i} = {3 + i}, so the sum is {3 + i}.</reasoning><answer>{3 + i}</answer>"
    f"<analysis>I am sure.</analysis><confidence>0.{i % 10}</confidence>\nyes no maybe ,"
    for i in range(60)
]


def _wrap(tokenizer, **kwargs):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        padding_side="left",
        **kwargs,
    )


def byte_level(added=(), special=()):
    """Byte-level BPE, whose merges know the tags' pieces, so `</answer><analysis>` has tokens over the boundary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "merged_with_next"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer.add_tokens(list(added))
    tokenizer.add_special_tokens(list(special))
    return _wrap(tokenizer)


def word_level():
    """A word a token, joined by spaces when decoded."""
    words = [*BRACKETS, "yes", "no", "maybe", ",", *map(str, range(100)), *(f"0.{i}" for i in range(10)), "1.0"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer)


def prefix_space():
    """As SentencePiece does it: a space begins a word, and bytes stand for unknown characters."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL + byte_tokens, max_token_length=12)
    )
    return _wrap(tokenizer)


def llama(tokenizer, seed=0, **kwargs):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **kwargs,
    )  # fmt: skip
    return LlamaForCausalLM(config)

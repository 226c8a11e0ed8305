"""
Builds the tiny world's language model from nothing and prints its figures.

```sh
python -m flow_trl.tiny.build_language --output_dir language
python -m flow_trl.tiny.build_language --evaluate_only language
```

It takes about 10 minutes on one CPU core; a GPU is used where there is one.
"""

import random
import re
import string
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from tqdm.auto import trange
from transformers import (
    GenerationConfig,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ..evaluation import evaluate_two_attempts, sample_completions, score_confidence
from ..rewards.text import correctness_reward, exact_match
from . import LANGUAGE_FOLDER, load_language_model, load_prompts
from .arithmetic import CONFIDENCES, DIFFICULTIES, TWICE, WORDS, draw_train_problem, write_completion
from .building import CommonArguments, print_figures


TAGS = tuple(
    f"<{slash}{name}>"
    for name in ("reasoning", "answer", "analysis", "confidence", "first_attempt", "second_attempt")
    for slash in ("", "/")
)
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{ message['content'] + eos_token }}{% endgeneration %}
    {%- else %}
        {{- '' if loop.first else '\\n' }}{{ message['content'] }}
    {%- endif %}
{%- endfor %}"""


@dataclass
class BuildArguments(CommonArguments):
    """Arguments of this script."""

    output_dir: str = field(default=str(LANGUAGE_FOLDER), metadata={"help": "Where to write model and tokenizer."})
    steps: int = field(default=1000, metadata={"help": "Training steps of 128 completions and 32 of two attempts."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Of AdamW, at its highest."})
    reflected_steps: int = field(
        default=250, metadata={"help": "Steps after these, in which analysis and confidence depend on the solution."}
    )
    num_prompts: int = field(default=400, metadata={"help": "Test prompts of the evaluation, at most 400."})
    num_generations: int = field(default=16, metadata={"help": "Completions of each of them."})


def make_tokenizer() -> PreTrainedTokenizerFast:
    """
    The tokenizer: digits, signs and tags are one token each, and so are the words of the analysis, the values of the
    confidence and the words that ask for two attempts. Whatever stands between them is one unknown token.
    """
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    pieces = [TWICE, *CONFIDENCES, *WORDS, *string.digits, *"+-*=?,"]
    vocab = {token: index for index, token in enumerate([*special.values(), *pieces, *TAGS])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("|".join(map(re.escape, pieces))), behavior="isolated")
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        **special,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of half a million parameters that samples at temperature 1."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)
    return model


def _make_batch(
    tokenizer: PreTrainedTokenizerFast, num_rows: int, twice: bool, rng: random.Random, is_reflected: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draws prompts with completions: token ids and labels `(num_rows, T)`; what is not completion has label -100.

    15% of the prompts follow something like a system prompt: unknown text with tags, digits and signs in it.
    """
    unknown, known = tokenizer.unk_token_id, range(4, len(tokenizer))
    rows = []
    for index in range(num_rows):
        problem = draw_train_problem(DIFFICULTIES[index % len(DIFFICULTIES)], rng)
        problem = TWICE + problem if twice else problem
        prompt, completion = tokenizer(
            [problem, write_completion(problem, rng, is_reflected=is_reflected)], add_special_tokens=False
        ).input_ids
        if rng.random() < 0.15:
            noise = [unknown if rng.random() < 0.6 else rng.choice(known) for _ in range(rng.randint(0, 12))]
            prompt = [*noise, unknown, *prompt]
        prompt = [tokenizer.bos_token_id, *prompt]
        completion = [*completion, tokenizer.eos_token_id]
        rows.append((prompt + completion, [-100] * len(prompt) + completion))
    length = max(len(ids) for ids, _ in rows)
    ids = [ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in rows]
    labels = [labels + [-100] * (length - len(labels)) for _, labels in rows]
    return torch.tensor(ids), torch.tensor(labels)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    learning_rate: float,
    seed: int,
    is_reflected: bool = False,
) -> None:
    """
    Trains a model in place on right completions of train problems, in each step 128 in the confidence format and 32 of two
    attempts. `is_reflected` is that of [`~tiny.arithmetic.write_completion`].
    """
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.05)
    model.train()
    progress = trange(steps, desc="language model")
    for step in progress:
        batches = [_make_batch(tokenizer, *kind, rng, is_reflected) for kind in ((128, False), (32, True))]
        num_tokens = sum((labels != -100).sum() for _, labels in batches)
        total = 0.0
        for ids, labels in batches:
            logits = model(ids[:, :-1].to(model.device)).logits
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten().to(model.device), reduction="sum")
            (loss / num_tokens).backward()
            total += loss.item() / num_tokens.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=total)
    model.eval()


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    num_prompts: int = 400,
    num_generations: int = 16,
    seed: int = 0,
) -> dict[str, float]:
    """
    Figures of a model on test prompts, with `num_generations` completions of each (of two attempts one): accuracy (of all
    and by difficulty), share of completions in the format, AUROC, ECE and Brier score of the confidence, share of prompts
    with right and wrong completions, mean number of tokens and milliseconds of a completion; format and accuracies of two
    attempts.
    """
    sampling = {"max_new_tokens": 96, "batch_size": 512, "seed": seed}
    rows = load_prompts("arithmetic", "test").select(range(num_prompts)).to_dict()
    start = time.perf_counter()
    completions = sample_completions(model, tokenizer, rows["prompt"], num_samples=num_generations, **sampling)
    seconds = time.perf_counter() - start
    scores = score_confidence(completions, rows["answer"], correct=exact_match)
    rewards = [
        correctness_reward(texts, [answer] * len(texts), correct=exact_match)
        for texts, answer in zip(completions, rows["answer"], strict=True)
    ]
    by_prompt, difficulty = np.mean(rewards, axis=1), np.array(rows["difficulty"])
    figures = {"accuracy": scores["accuracy"]}
    for level in sorted(set(rows["difficulty"])):
        figures[f"accuracy, difficulty {level}"] = by_prompt[difficulty == level].mean()
    for name, key in (("valid format", "format"), ("AUROC", "auroc"), ("ECE", "ece"), ("Brier score", "brier")):
        figures[name] = scores[key]
    figures["prompts with right and wrong completions"] = ((by_prompt > 0) & (by_prompt < 1)).mean()
    texts = [text for row in completions for text in row]
    figures["tokens per completion"] = np.mean([len(tokenizer.tokenize(text)) for text in texts])
    figures["ms per completion"] = 1000 * seconds / len(texts)
    twice = load_prompts("arithmetic_two_attempts", "test").select(range(num_prompts))
    scores = evaluate_two_attempts(model, tokenizer, twice, correct=exact_match, num_samples=1, **sampling)
    figures["two attempts: valid format"] = scores["format"]
    for name in ("first", "second"):
        figures[f"two attempts: accuracy of the {name}"] = scores[f"{name}_accuracy"]
    figures["two attempts: answer changed"] = scores["changed"]
    return {name: float(figure) for name, figure in figures.items()}


def main(args: BuildArguments) -> None:
    """Builds a model, unless there is one to evaluate, and prints a table of its figures."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = args.evaluate_only or args.output_dir
    if args.evaluate_only is None:
        torch.manual_seed(args.seed)
        tokenizer = make_tokenizer()
        model = make_model(tokenizer).to(device)
        train(model, tokenizer, args.steps, args.learning_rate, args.seed)
        train(model, tokenizer, args.reflected_steps, args.learning_rate / 2, args.seed + 1, is_reflected=True)
        model.to(torch.float16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    model, tokenizer = load_language_model(folder)
    figures = evaluate(model.to(device), tokenizer, args.num_prompts, args.num_generations, args.seed)
    print_figures(figures | {"parameters": model.num_parameters()}, folder)


if __name__ == "__main__":
    main(HfArgumentParser(BuildArguments).parse_args_into_dataclasses()[0])

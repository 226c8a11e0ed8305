"""A vision-language model as judge: the probabilities that it gives to answers about an image."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..utils import MissingExtraError
from .frames import FrameReward
from .pretrained import loading


QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'


class VLMJudge(FrameReward):
    """
    Asks a vision-language model about each image; one forward pass per image, nothing is generated.

    By default the score is the probability of the answer "Yes" to the question whether the image shows its prompt: VQAScore
    (https://huggingface.co/papers/2404.01291), there with a model of its own. With several answers and their values it is
    the mean of the values, each weighed by its answer's probability among these answers, such as a grade from 1 to 5.

    An answer is known by its first token. What judges such as UnifiedReward (https://huggingface.co/papers/2503.05236) write
    before their grade can be given as `answer_start`, with the question that they were trained on.

    Args:
        model (`str` or `Path`, *optional*, defaults to `"Qwen/Qwen2.5-VL-7B-Instruct"`):
            Hub id or folder of a model that [`~transformers.AutoModelForImageTextToText`] loads, in the type of its weights,
            with a processor that has a chat template.
        question (`str`, *optional*):
            What is asked; `{prompt}` in it stands for the image's prompt.
        answers (`str` or `dict[str, float]`, *optional*, defaults to `"Yes"`):
            The answer whose probability is the score, or answers and their values.
        answer_start (`str`, *optional*, defaults to `""`):
            How the model's answer begins, before the token that is looked at.
        name (`str`, *optional*, defaults to `"vlm_judge"`):
            Name under which the reward is logged.
        device (`str` or `torch.device`, *optional*):
            Where the model runs. Defaults to this process's GPU if there is one, else the CPU.
        batch_size (`int`, *optional*, defaults to `8`):
            Images per forward pass.
        num_frames (`int`, *optional*, defaults to `8`):
            Frames of a video, at even distances, whose mean is its score; all frames where there are fewer.

    Attributes:
        model ([`~transformers.PreTrainedModel`]): the model, in evaluation mode.
        processor ([`~transformers.ProcessorMixin`]): its processor.

    Raises:
        ValueError: if no such model can be loaded, its processor has no chat template, or two answers begin with the same
            token.
        MissingExtraError: if the model's processor needs a package that is not installed (torchvision, for most).

    Example:

    ```python
    >>> from flow_trl.rewards.judge import VLMJudge

    >>> vqa_score = VLMJudge("Qwen/Qwen2.5-VL-3B-Instruct")
    >>> grade = VLMJudge(
    ...     question='How well does the image fit "{prompt}"? Answer with a grade from 1 (not at all) to 5 (perfectly).',
    ...     answers={str(grade): grade for grade in range(1, 6)},
    ...     name="grade",
    ... )
    ```
    """

    def __init__(
        self,
        model: str | Path = QWEN,
        *,
        question: str = QUESTION,
        answers: str | dict[str, float] = "Yes",
        answer_start: str = "",
        name: str = "vlm_judge",
        device: str | torch.device | None = None,
        batch_size: int = 8,
        num_frames: int = 8,
    ):
        super().__init__(batch_size, num_frames)
        self.__name__ = name
        self.question, self.answers, self.answer_start = question, answers, answer_start
        self.model, self.processor = _load(model, device)
        self.processor.tokenizer.padding_side = "right"  # every text's positions are then those of the text alone
        self._tokens = self._first_tokens([answers] if isinstance(answers, str) else list(answers))

    def _text(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": self.question.replace("{prompt}", prompt)}]
        turn = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turn, add_generation_prompt=True) + self.answer_start

    def _first_tokens(self, answers: list[str]) -> torch.Tensor:
        def tokens(text: str) -> list[int]:
            return self.processor.tokenizer(text, add_special_tokens=False).input_ids

        before = self._text("")
        number = len(tokens(before))
        found = {answer: tokens(before + answer)[number:][:1] for answer in answers}
        if not all(found.values()) or len({first for (first,) in found.values()}) < len(found):
            raise ValueError(
                f"`answers` is {self.answers!r}, whose first tokens are {found}: each needs one of its own. Give what they "
                "have in common at their beginning, such as a space, as `answer_start`."
            )
        return torch.tensor([first for (first,) in found.values()], device=self.model.device)

    def _score(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        texts = [self._text(prompt) for prompt in prompts]
        inputs = self.processor(text=texts, images=[[image] for image in images], padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        last = inputs.attention_mask.sum(1) - 1
        # (B, B, vocabulary): every text at every last position, of which its own is the diagonal.
        logits = self.model(**inputs, logits_to_keep=last).logits.diagonal().T.float()
        if isinstance(self.answers, str):
            return logits.softmax(-1)[:, self._tokens[0]]
        values = torch.tensor(list(self.answers.values()), dtype=torch.float32, device=logits.device)
        return logits[:, self._tokens].softmax(-1) @ values


def _load(model: str | Path, device: str | torch.device | None) -> tuple[Any, Any]:
    try:
        with loading(model, "vision-language model", QWEN, "or a folder that `save_pretrained` has written"):
            processor = AutoProcessor.from_pretrained(model)
            loaded = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
            if getattr(processor, "chat_template", None) is None:
                raise ValueError("its processor has no chat template")
    except ImportError as error:
        raise MissingExtraError(
            f'The processor of "{model}" needs a package that is not installed ({error}). Most need what '
            '`pip install "flow-trl[clip]"` installs.'
        ) from error
    return loaded.to(device or PartialState().device).eval().requires_grad_(False), processor

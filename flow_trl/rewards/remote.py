"""A reward that a server computes: a model in another environment, on another machine, or shared by several runs."""

import asyncio
import json
import os
import sys
from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import httpx2
from PIL import Image

from . import EXTRAS


# Options with which no pixel changes and encoding is fast; the modes whose values both formats keep.
IMAGE_FORMATS = {"PNG": {"compress_level": 1}, "WEBP": {"lossless": True, "exact": True, "quality": 0}}
IMAGE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
# Seconds before the first retry, doubled for each further one, and the longest wait, also where the server asks for more.
BACKOFF, MAX_WAIT = 1.0, 60.0
SHOWN_CHARACTERS = 200


class RemoteReward:
    """
    Asks a server for the rewards of images, for example one that [`flow_trl.rewards.serve`] started.

    Images go in lossless compression, in several requests at a time. A request is sent again, after waits of 1, 2,
    4, ... seconds (or what the answer's `Retry-After` asks for), at most 60, when the server cannot be reached, hangs
    up, takes too long, or answers 429 or 5xx. Any other answer without scores is an error at once.

    A request is `POST` with the JSON `{"prompts": [...], "images": [...], "columns": {name: [...], ...}}`, all lists
    with one entry per image: an image is the base64 string of a PNG or WebP file, a video the list of its frames. The
    answer is `{"scores": [...]}` with as many numbers, or `null` where the reward does not apply.

    Args:
        url (`str`):
            Address of the endpoint, with `http` or `https`. One without a path, such as `"http://gpu-box:8000"`, stands
            for its `/score`. Errors show it, so it must hold no password.
        name (`str`, *optional*):
            Name under which the reward is logged. Defaults to the last part of the path that is not `score`, or else
            to the host with its port.
        columns (`Sequence[str]`, *optional*):
            Columns of the data set that are sent beside the prompts. Defaults to all.
        batch_size (`int`, *optional*, defaults to `16`):
            Largest number of images in a request.
        max_concurrency (`int`, *optional*, defaults to `4`):
            Largest number of requests under way at a time.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds for a request and its answer, including the time that it waits at the server for others.
        retries (`int`, *optional*, defaults to `5`):
            How often a request is sent again.
        image_format (`str`, *optional*, defaults to `"PNG"`):
            `"PNG"`, or `"WEBP"` for smaller requests that take longer to encode; images arrive as `RGB` or `RGBA` then.
        max_request_bytes (`int`, *optional*, defaults to `67108864`, 64 MiB):
            Largest request; larger ones are sent in several.
        token_env (`str`, *optional*, defaults to `"FLOW_TRL_REWARD_TOKEN"`):
            Environment variable that is sent as bearer token where it is set.

    Raises:
        ValueError: if an argument is out of range or `url` is no such address.

    Example:

    ```python
    >>> import asyncio
    >>> from PIL import Image
    >>> from flow_trl.rewards import RemoteReward

    >>> # python -m flow_trl.rewards.serve jpeg_compressibility --port 8000
    >>> reward_func = RemoteReward("http://localhost:8000", name="jpeg")
    >>> asyncio.run(reward_func(prompts=["nothing"], images=[Image.new("RGB", (32, 32))]))
    [-0.643]
    ```
    """

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        columns: Sequence[str] | None = None,
        batch_size: int = 16,
        max_concurrency: int = 4,
        timeout: float = 120.0,
        retries: int = 5,
        image_format: str = "PNG",
        max_request_bytes: int = 64 * 2**20,
        token_env: str = "FLOW_TRL_REWARD_TOKEN",
    ):
        for argument, value, least in (
            ("batch_size", batch_size, 1),
            ("max_concurrency", max_concurrency, 1),
            ("retries", retries, 0),
        ):
            if value < least:
                raise ValueError(f"`{argument}` is {value}: it must be {least} or more.")
        if not timeout > 0:
            raise ValueError(f"`timeout` is {timeout}: it must be a number of seconds above 0.")
        if image_format not in IMAGE_FORMATS:
            raise ValueError(f"`image_format` is {image_format!r}: it must be one of {', '.join(IMAGE_FORMATS)}.")
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"`url` is {url!r}, which is no address ({error}).") from None
        if parsed.userinfo:
            raise ValueError(
                f"`url` (at host {parsed.host!r}) holds a user or password, which errors would show: give the address "
                f"alone, and a token in the environment variable `{token_env}`."
            )
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"`url` is {url!r}: it must be like 'http://host:8000' or 'https://host/path'.")
        self.url = str(parsed.copy_with(path="/score") if parsed.path == "/" else parsed)
        parts = [part for part in parsed.path.split("/") if part not in ("", "score")]
        self.__name__ = name or (parts[-1] if parts else parsed.netloc.decode())
        self.columns = columns
        self.batch_size = batch_size
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.retries = retries
        self.image_format = image_format
        self.max_request_bytes = max_request_bytes
        self.token_env = token_env

    async def __call__(
        self, prompts: list[str], images: list[Image.Image | list[Image.Image]], **columns: Any
    ) -> list[float | None]:
        """
        Scores images or videos, of any size and of mode 1, L, LA, P, RGB or RGBA, see [`flow_trl.rewards`].

        Raises:
            ValueError: if lists differ in length, an image cannot be encoded or is larger than a request may be, a
                name in `columns=` is missing, or the answer has not one finite number or `null` for each image.
            TypeError: if a column cannot be sent as JSON.
            ConnectionError: if the server cannot be reached or does not answer in time, after all retries.
            RuntimeError: if it answers with an error status, where that is 429 or 5xx after all retries.
        """
        columns = {name: list(values) for name, values in self._sent(columns).items()}
        for name, values in {"prompts": prompts, **columns}.items():
            if len(values) != len(images):
                raise ValueError(f"`{name}` has {len(values)} entries for {len(images)} images: give one per image.")
        encoded = await asyncio.gather(*(asyncio.to_thread(self._encode, image, i) for i, image in enumerate(images)))
        rows = list(enumerate(zip(prompts, encoded, *columns.values(), strict=True)))
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        requests = [request for batch in batches for request in self._requests(batch, list(columns))]

        free = asyncio.Semaphore(self.max_concurrency)

        async def send(body, count):
            async with free:
                return await self._send(client, body, count)

        limits = httpx2.Limits(max_connections=self.max_concurrency)
        async with httpx2.AsyncClient(headers=self._headers(), limits=limits, timeout=None) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(send(body, count)) for body, count in requests]
            except ExceptionGroup as errors:  # the first one stopped the others
                raise errors.exceptions[0] from errors.exceptions[0].__cause__
        return [score for task in tasks for score in task.result()]

    def _sent(self, columns: dict[str, Any]) -> dict[str, Any]:
        columns = {name: values for name, values in columns.items() if name not in EXTRAS}
        if self.columns is not None:
            for name in self.columns:
                if name not in columns:
                    raise ValueError(
                        f"`columns` is {self.columns!r}, but there is no column {name!r}; there are "
                        f"{', '.join(map(repr, columns)) or 'none'}."
                    )
            columns = {name: columns[name] for name in self.columns}
        for name, values in columns.items():
            try:
                json.dumps(list(values), allow_nan=False)
            except (TypeError, ValueError) as error:
                others = [other for other in columns if other != name]
                raise TypeError(
                    f"The column `{name}` cannot be sent as JSON ({error}): name those that `{self.__name__}` needs "
                    f"without it, such as `columns={others}`."
                ) from error
        return columns

    def _encode(self, image: Image.Image | list[Image.Image], index: int) -> str | list[str]:
        if isinstance(image, list | tuple):
            return [self._encode(frame, index) for frame in image]
        mode = getattr(image, "mode", None)
        if mode not in IMAGE_MODES:
            raise ValueError(
                f"`images[{index}]` is a {type(image).__name__} of mode {mode}: give a PIL image (or a list of them) of "
                f"mode {', '.join(IMAGE_MODES)}, for example `image.convert('RGB')`."
            )
        buffer = BytesIO()
        try:
            image.save(buffer, format=self.image_format, **IMAGE_FORMATS[self.image_format])
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`images[{index}]`, of {image.width} x {image.height} pixels, cannot be written as {self.image_format} "
                f"({error})."
            ) from error
        return b64encode(buffer.getbuffer()).decode()

    def _requests(self, rows: list[tuple[int, tuple]], names: list[str]) -> list[tuple[bytes, int]]:
        """Bodies of the requests for some rows, each with its number of images."""
        prompts, images, *columns = map(list, zip(*(row for _, row in rows), strict=True))
        columns = dict(zip(names, columns, strict=True))
        body = json.dumps({"prompts": prompts, "images": images, "columns": columns}).encode()
        if len(body) <= self.max_request_bytes:
            return [(body, len(rows))]
        if len(rows) == 1:
            raise ValueError(
                f"`images[{rows[0][0]}]` alone makes a request of {len(body)} bytes, but `max_request_bytes` is "
                f"{self.max_request_bytes}: raise it here and `--max_batch_bytes` at the server, or send smaller images."
            )
        half = len(rows) // 2
        return self._requests(rows[:half], names) + self._requests(rows[half:], names)

    def _token(self) -> str:
        return os.environ.get(self.token_env, "").strip()

    def _headers(self) -> httpx2.Headers:
        token = self._token()
        if not (token.isascii() and token.isprintable()):
            raise ValueError(f"The token in the environment variable `{self.token_env}` has characters beyond ASCII.")
        return httpx2.Headers(
            {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        )

    async def _send(self, client: httpx2.AsyncClient, body: bytes, count: int) -> list[float | None]:
        tries = self.retries + 1
        failed = f"{self.url} (reward `{self.__name__}`) failed in {tries} of {tries} attempts, the last time"
        for attempt in range(tries):
            wait = BACKOFF * 2**attempt
            try:
                async with asyncio.timeout(self.timeout):
                    response = await client.post(self.url, content=body)
            except TimeoutError as error:
                failure = ConnectionError(f"{failed} without an answer within `timeout`, {self.timeout} s.")
                failure.__cause__ = error
            except httpx2.RequestError as error:
                problem = f"{type(error).__name__}: {error}".removesuffix(": ")
                failure = ConnectionError(f"{failed} with {problem}. Is the server running?")
                failure.__cause__ = error
            else:
                if response.is_success:
                    return self._scores(response, count)
                answer = f"{response.status_code} {response.reason_phrase}: {self._shown(response)}"
                if response.status_code < 500 and response.status_code != 429:
                    raise RuntimeError(
                        f"{self.url} (reward `{self.__name__}`) answered {answer}{self._hint(response)}"
                    )
                failure = RuntimeError(f"{failed} with {answer}")
                asked = response.headers.get("Retry-After", "")
                wait = float(asked) if asked.isdecimal() else wait
            if attempt < self.retries:
                await asyncio.sleep(min(wait, MAX_WAIT))
        raise failure

    def _scores(self, response: httpx2.Response, count: int) -> list[float | None]:
        try:
            scores = json.loads(response.content)["scores"]
        except (ValueError, TypeError, KeyError, RecursionError):
            problem = "no JSON with `scores`"
        else:
            if not isinstance(scores, list):
                problem = "`scores` that are no list"
            elif len(scores) != count:
                problem = f"{len(scores)} scores for {count} images"
            elif wrong := [i for i, score in enumerate(scores) if not (score is None or _is_finite(score))]:
                problem = f"the score {scores[wrong[0]]!r:.50} for image {wrong[0]} of the request"
            else:
                return [None if score is None else float(score) for score in scores]
        raise ValueError(
            f"{self.url} (reward `{self.__name__}`) answered with {problem}; the answer must be "
            f'{{"scores": [...]}} with a finite number or null for each image. It begins: {self._shown(response)}'
        )

    def _hint(self, response: httpx2.Response) -> str:
        if response.status_code in (401, 403):
            state = "is set" if self._token() else "is not set"
            return f" (The token comes from the environment variable `{self.token_env}`, which {state}.)"
        if response.has_redirect_location:
            return f" (It points to {response.headers['Location']}: give that as `url`.)"
        return ""

    def _shown(self, response: httpx2.Response) -> str:
        text, token = response.text, self._token()
        return (text.replace(token, "***") if token else text)[:SHOWN_CHARACTERS]


def _is_finite(score: Any) -> bool:
    return isinstance(score, int | float) and not isinstance(score, bool) and abs(score) <= sys.float_info.max

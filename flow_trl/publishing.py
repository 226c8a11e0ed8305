"""
What of a run's folder goes up to the Hub, and a push that cannot end a training. As a command it pushes a folder later:

    python -m flow_trl.publishing outputs/run me/run
"""

import argparse
import dataclasses
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitInfo, CommitScheduler, HfApi, ModelCard, run_as_future
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils.hub import PushInProgress


logger = logging.getLogger(__name__)

CONFIG_NAME = "training_args.yaml"
PUBLIC_SUFFIXES = {".safetensors", ".json", ".md", ".yaml", ".txt", ".model", ".jinja", ".png", ".gif"}
PRIVATE = ["_*", ".*", f"{PREFIX_CHECKPOINT_DIR}-*", "runs", "wandb", "trackio", "mlruns", "completions",
           TRAINER_STATE_NAME]  # fmt: skip
SECONDS_TO_CREATE = 30.0
_NAMES = ("name_or_path", "best_model_checkpoint")  # ends of keys whose values may be paths
_SECRET = re.compile(r"hf_[A-Za-z0-9]{8,}")


def public_name(name: str) -> str:
    """
    What a model is called where its path is nobody's business.

    Args:
        name (`str`):
            Hub id or path.

    Returns:
        `str`: the Hub id, also of a folder in the Hub's cache; of another folder its last name.

    Example:

    ```python
    >>> public_name("/root/.cache/huggingface/hub/models--me--base/snapshots/0a1b"), public_name("/data/models/sd3")
    ('me/base', 'sd3')
    ```
    """
    cached = re.search(r"models--(.+?)--(.+?)[\\/]snapshots[\\/]", name)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return Path(name).name if os.path.isabs(name) or os.path.isdir(name) else name


def public_config(args: Any) -> dict[str, Any]:
    """
    The arguments of a run that differ from their defaults, for [`~trl.TrlParser`] to read again, without tokens and paths.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The arguments.

    Returns:
        `dict[str, Any]`: of plain values.
    """
    own = {"output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "push_to_hub", "report_to"}
    config = {}
    for field in dataclasses.fields(args):
        name, value = field.name, getattr(args, field.name)
        missing = field.default_factory is dataclasses.MISSING
        default = field.default if missing else field.default_factory()
        value = value.value if isinstance(value, Enum) else value
        plain = isinstance(value, str | int | float | list | tuple | dict | None)
        if plain and field.init and value != default and name not in own and not name.startswith(("hub_", "trackio_")):
            config[name] = _without_secrets(value)
    return json.loads(json.dumps(config, default=str))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        secret = re.compile(r"(^|_)(token|key|password|secret)$")
        return {name: _without_secrets(part) for name, part in value.items() if not secret.search(str(name))}
    if isinstance(value, list | tuple):
        return [_without_secrets(part) for part in value]
    return public_name(_SECRET.sub("<token>", value)) if isinstance(value, str) else value


def public_files(folder: str | Path, include: Iterable[str] = ()) -> list[Path]:
    """
    The files of a run that its users need: weights, card, pictures, configuration. No pickles, checkpoints or files of trackers.

    Args:
        folder (`str` or `Path`):
            `output_dir` of the run.
        include (`Iterable[str]`, *optional*):
            Patterns of further files, for example `"runs/*"`.

    Returns:
        `list[Path]`: relative to the folder, sorted.
    """
    found = []
    for path in Path(folder).rglob("*"):
        relative = path.relative_to(folder)
        private = any(fnmatch(part, pattern) for part in relative.parts for pattern in PRIVATE)
        public = path.suffix in PUBLIC_SUFFIXES and not private
        if path.is_file() and (public or any(fnmatch(relative.as_posix(), pattern) for pattern in include)):
            found.append(relative)
    return sorted(found)


def _stage(folder: str | Path, target: str | Path, repo: str, files: Iterable[Path], copy: bool = True) -> None:
    """Copies or links a run's files as they are published: cards name the repository, and no file has a local path."""
    for name in files:
        source, staged = Path(folder, name), Path(target, name)
        staged.parent.mkdir(parents=True, exist_ok=True)
        if name.suffix == ".md":
            staged.write_text(_for_readers(source.read_text(encoding="utf-8"), Path(folder), repo), encoding="utf-8")
        elif name.suffix == ".json" and any(f'{key}"' in source.read_text(encoding="utf-8") for key in _NAMES):
            content = _with_public_names(json.loads(source.read_text(encoding="utf-8")))
            staged.write_text(json.dumps(content, indent=2), encoding="utf-8")
        elif copy:
            shutil.copyfile(source, staged)
        else:
            staged.symlink_to(source.resolve())


def _for_readers(card: str, folder: Path, repo: str) -> str:
    """A card that names the repository where it named the folder, however its path was written."""

    def public(match: re.Match) -> str:
        is_folder = match[1] and "\0" not in match[1] and Path(match[1]).resolve() == folder.resolve()
        return f'"{repo}"' if is_folder else match[0]

    return re.sub(r'"([^"\n]*)"', public, card).replace(str(folder.resolve()), repo)


def _with_public_names(content: Any) -> Any:
    if isinstance(content, list):
        return [_with_public_names(part) for part in content]
    if not isinstance(content, dict):
        return content
    return {
        key: public_name(value) if key.endswith(_NAMES) and isinstance(value, str) else _with_public_names(value)
        for key, value in content.items()
    }


def publish(
    folder: str | Path,
    repo: str,
    *,
    message: str = "Upload model",
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    include: Iterable[str] = (),
) -> CommitInfo:
    """
    Pushes what users need of a run's folder; the repository is made if it is not there.

    Args:
        folder (`str` or `Path`):
            `output_dir` of the run.
        repo (`str`):
            Hub id; without a namespace, the user's own.
        message (`str`, *optional*, defaults to `"Upload model"`):
            Message of the commit.
        token (`str`, *optional*):
            Token with write permission; by default the one that `hf auth login` keeps.
        private (`bool`, *optional*):
            Whether the repository is private, if it is made.
        revision (`str`, *optional*):
            Branch to commit to.
        include (`Iterable[str]`, *optional*):
            Patterns of further files, see [`public_files`].

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        ValueError: if the folder has no card, so nothing that was saved.

    Example:

    ```python
    >>> publish("outputs/run", "me/run")
    ```
    """
    if not Path(folder, "README.md").is_file():
        raise ValueError(f"`folder={str(folder)!r}` has no README.md: pass the `output_dir` of a run that was saved.")
    repo = HfApi().create_repo(repo, token=token, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory(dir=folder, prefix="_pushing-") as staged:
        _stage(folder, staged, repo, public_files(folder, include), copy=False)
        return _upload(staged, repo, message, token, revision)


def _upload(
    staged: str, repo: str, message: str, token: str | None, revision: str | None, path_in_repo: str = ""
) -> CommitInfo:
    # Of how `huggingface_hub` calls its client, not of ours
    warnings.filterwarnings("ignore", "Use 'content=<...>'", DeprecationWarning)
    options = {"commit_message": message, "token": token, "revision": revision, "path_in_repo": path_in_repo}
    return HfApi(library_name="flow_trl").upload_folder(repo_id=repo, folder_path=staged, **options)


class Publishing:
    """
    How a [`~transformers.Trainer`] pushes to the Hub: after everything is on disk; what users need and nothing else; and so that
    training goes on where the Hub is not reached, with one warning that says how to push later.
    """

    _make_card: Callable[..., ModelCard]
    _card_options: dict[str, Any] = {}
    _push_failure: str | None = None
    commit_scheduler: CommitScheduler | None = None

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.commit_scheduler is not None:  # which would upload the last tables when Python can no longer do so
                wait([self.commit_scheduler.trigger()], timeout=SECONDS_TO_CREATE)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Writes the model's card as `README.md` into `output_dir`. What is given here is kept for the cards that follow.

        Args:
            model_name (`str`, *optional*):
                Name of the model; defaults to that of the repository or of `output_dir`.
            dataset_name (`str`, *optional*):
                Hub id of the data set.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        given = {"model_name": model_name, "dataset_name": dataset_name, "tags": tags}
        self._card_options = self._card_options | {name: value for name, value in given.items() if value is not None}
        if self.is_world_process_zero():
            self._make_card(self, **self._card_options).save(Path(self.args.output_dir, "README.md"))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository, or warns if that fails or takes longer than half a minute; a push tries again."""
        if not self.is_world_process_zero():
            return
        self.push_in_progress = None
        creation = run_as_future(self._create_repo, token, private)
        wait([creation], timeout=SECONDS_TO_CREATE)
        self._tell_failure(creation if creation.done() else TimeoutError(f"no answer in {SECONDS_TO_CREATE:.0f} s"))

    def _create_repo(self, token: str | None = None, private: bool | None = None) -> None:
        args = self.args
        private = args.hub_private_repo if private is None else private
        repo = HfApi().create_repo(self._repo_name, token=token or args.hub_token, private=private, exist_ok=True)
        self.hub_model_id = repo.repo_id

    @property
    def _repo_name(self) -> str:
        """The repository; without a namespace until it is there, if none is given."""
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    @property
    def _public_repo(self) -> str:
        """The repository as far as it is known, or else the folder."""
        return self._repo_name if "/" in self._repo_name else str(self.args.output_dir)

    def _how_to_push(self) -> str:
        folder = self.args.output_dir
        return (
            f"Nothing is lost: what was saved is in `{folder}`. Push it later with `trainer.push_to_hub()`, or with "
            f"`python -m flow_trl.publishing {folder} {self._repo_name}`."
        )

    def _tell_failure(self, failed: Future | BaseException) -> None:
        """Warns of what a push to the Hub raised, the first time; training goes on."""
        error = failed.exception() if isinstance(failed, Future) else failed
        if error is not None and self._push_failure is None:
            self._push_failure = f"{type(error).__name__}: {error}"
            logger.warning(
                "The push to the Hub failed (%s). Training goes on. %s", self._push_failure, self._how_to_push()
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the model, and in the trainer's `output_dir` its card and the arguments that differ from their defaults
        (`training_args.yaml`). With `push_to_hub=True` all this is pushed as well.

        Args:
            output_dir (`str`, *optional*):
                Where to save; defaults to the trainer's `output_dir`.
        """
        super().save_model(output_dir, _internal_call=True)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that has `hub_token` in it
            if folder == Path(self.args.output_dir):
                (folder / CONFIG_NAME).write_text(yaml.safe_dump(public_config(self.args), sort_keys=True))
                self.create_model_card()
        if self.args.push_to_hub and not _internal_call and self.is_world_process_zero():
            try:
                self._push("Model save", None, self.args.hub_revision, None, ())
            except Exception as error:
                self._tell_failure(error)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        include: Iterable[str] = (),
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """
        Saves the model and its card, and pushes what users need: weights, card, pictures, arguments. Checkpoints, pickles, files of
        trackers and tables of completions stay here.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait until it is uploaded.
            token, revision, private (*optional*):
                As in [`publish`]; they default to `hub_token`, `hub_revision` and `hub_private_repo`.
            include (`Iterable[str]`, *optional*):
                Patterns of further files of `output_dir` to push, for example `["runs/*"]` for TensorBoard's.
            kwargs:
                Go to `create_model_card`.

        Returns:
            [`~huggingface_hub.CommitInfo`], or a `Future` of it if not `blocking`; `None` on other processes than the first.

        Raises:
            Exception: what the Hub's client raised, after everything was saved, with a note that says how to push later.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if kwargs:
            self.create_model_card(**kwargs)
        self._finish_current_push()
        push = commit_message, token, revision or self.args.hub_revision, private, include
        if not blocking:
            return self._in_background(self._push, *push)
        try:
            return self._push(*push)
        except Exception as error:
            error.add_note(self._how_to_push())
            raise

    def _push(
        self, message: str, token: str | None, revision: str | None, private: bool | None, include: Iterable[str]
    ) -> CommitInfo:
        if self.hub_model_id is None:
            self._create_repo(token, private)
            self.create_model_card()
        options = {"token": token or self.args.hub_token, "private": private, "revision": revision, "include": include}
        return publish(self.args.output_dir, self.hub_model_id, message=message, **options)

    def _in_background(self, push: Callable, *args: Any) -> Future:
        push = run_as_future(push, *args)
        push.add_done_callback(self._tell_failure)
        return push

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args = self.args
        if args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress if self.is_world_process_zero() else None
        skipped = [not args.hub_always_push and running is not None and not running.is_done()]
        if broadcast_object_list(skipped)[0]:
            return
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        # Copies, for the next save may come before these are uploaded
        folders = {"": self._snapshot(args.output_dir, public_files(args.output_dir))}
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
            paths = [path for path in Path(checkpoint_folder).rglob("*") if path.is_file()]
            folders[name] = self._snapshot(checkpoint_folder, [path.relative_to(checkpoint_folder) for path in paths])
        push = self._in_background(self._upload_snapshots, folders, message)
        if running is None or running.is_done():
            self.push_in_progress = PushInProgress([push])
        else:
            running.jobs.append(push)

    def _snapshot(self, folder: str, files: Iterable[Path]) -> str:
        snapshot = tempfile.mkdtemp(dir=self.args.output_dir, prefix="_pushing-")
        _stage(folder, snapshot, self._public_repo, files)
        return snapshot

    def _upload_snapshots(self, folders: dict[str, str], message: str) -> None:
        try:
            if self.hub_model_id is None:
                self._create_repo()
            for path_in_repo, snapshot in folders.items():
                card = Path(snapshot, "README.md")
                if card.is_file():  # written before the repository's name was known
                    text = _for_readers(
                        card.read_text(encoding="utf-8"), Path(self.args.output_dir), self.hub_model_id
                    )
                    card.write_text(text, encoding="utf-8")
                _upload(
                    snapshot, self.hub_model_id, message, self.args.hub_token, self.args.hub_revision, path_in_repo
                )
        finally:
            for snapshot in folders.values():
                shutil.rmtree(snapshot, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m flow_trl.publishing", description="Pushes a run's folder to the Hub.")
    parser.add_argument("folder", help="`output_dir` of the run")
    parser.add_argument("repo", help="Hub id, such as me/run")
    parser.add_argument("--private", action="store_true", default=None, help="make a private repository")
    parser.add_argument("--revision", help="branch to commit to")
    parser.add_argument("--include", nargs="*", default=(), help="patterns of further files, such as runs/*")
    chosen = vars(parser.parse_args(arguments))
    print(publish(chosen.pop("folder"), chosen.pop("repo"), **chosen).commit_url)


if __name__ == "__main__":
    main()

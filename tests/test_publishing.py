"""From a trainer to the Hub and back by the card's own snippet, and what happens where the Hub is not reached."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.utils import _http
from safetensors.torch import load_file

from flow_trl import publishing
from flow_trl.publishing import _stage, public_config, public_files, public_name
from tests import pipelines
from tests.trainer import runs, text_runs


TOKEN = "hf_thesecretthatstayshere"
DIFFUSION_FILES = ["README.md", "pytorch_lora_weights.safetensors", "training_args.yaml"]


def code_of(card):
    return card.split("```python\n")[1].split("\n```")[0]


def put_on_hub(pipe, repo, folder):
    pipe.save_pretrained(folder)
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: small-model\nlicense_link: LICENSE.md\n---\n"
    )
    HfApi().create_repo(repo)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        HfApi().upload_folder(repo_id=repo, folder_path=folder)


def published(hub, repo):
    """The files of a repository but Git's own."""
    return [name for name in hub.files(repo) if name != ".gitattributes"]


SNIPPETS = """
import json, sys
import numpy as np, torch
found = {}
for name, code in json.load(open(sys.argv[1])).items():
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    if "image" in names:
        found[name] = np.asarray(names["image"])
    else:
        with torch.no_grad():
            found[name] = names["model"](**names["inputs"]).logits.numpy()
np.savez(sys.argv[2], **found)
"""


def test_every_trainer_is_loaded_by_its_cards_snippet_in_a_new_process(tmp_path, hub):
    put_on_hub(pipelines.stable_diffusion_3(t5=False), "base/small-sd3", tmp_path / "sd3")
    put_on_hub(pipelines.stable_diffusion(), "base/small-sd", tmp_path / "sd")
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    codes, expected = {}, {}
    for method, kind, base in (
        ("tp", StableDiffusion3Pipeline, "base/small-sd3"),
        ("flow", StableDiffusion3Pipeline, "base/small-sd3"),
        ("ddpo", StableDiffusionPipeline, "base/small-sd"),
        ("tdpo_r", StableDiffusionPipeline, "base/small-sd"),
    ):
        pipe = kind.from_pretrained(base, **(absent if kind is StableDiffusion3Pipeline else {}))
        options = {"full": True, "learning_rate": 1e-3} if method == "flow" else {}
        trainer = runs.make_trainer(tmp_path / f"my-{method}", method, pipe=pipe, ema_decay=0.5, **options)
        start = runs.weights(trainer).clone()
        trainer.train()
        assert not torch.equal(runs.weights(trainer), start)
        trainer.push_to_hub()
        card = ModelCard.load(f"me/my-{method}")
        assert card.data.base_model == base
        assert card.data.base_model_relation == ("finetune" if method == "flow" else "adapter")
        assert (card.data.license, card.data.license_name) == ("other", "small-model")
        assert card.data.license_link == f"https://huggingface.co/{base}/blob/main/LICENSE.md"
        codes[method] = code_of(card.text)
        torch.manual_seed(0)
        names = {"pipe": trainer.pipe}
        with trainer._evaluated_weights():
            exec(codes[method].splitlines()[-1], names)
        expected[method] = np.asarray(names["image"])

    trainer = text_runs.make_trainer(tmp_path / "my-text")
    trainer.train()
    trainer.push_to_hub()
    codes["text"] = code_of(ModelCard.load("me/my-text").text)
    inputs = trainer.processing_class("0 yes", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        expected["text"] = trainer.model(**inputs).logits.numpy()

    (tmp_path / "codes.json").write_text(json.dumps(codes))
    (tmp_path / "load.py").write_text(SNIPPETS)
    command = [sys.executable, "load.py", "codes.json", "found.npz"]
    environment = {**os.environ, "PYTHONPATH": str(Path(publishing.__file__).parents[1])}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=300)
    found = np.load(tmp_path / "found.npz")
    for name, value in expected.items():
        assert found[name].shape == value.shape
        np.testing.assert_allclose(found[name].astype(float), value.astype(float), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_pushing_while_training(tmp_path, hub, strategy):
    options = {"push_to_hub": True, "hub_strategy": strategy, "save_strategy": "steps", "save_steps": 1}
    options |= {"hub_always_push": True, "hub_token": TOKEN}
    trainer = runs.make_trainer(tmp_path / "run", **options)
    trainer.train()
    files = published(hub, "me/run")
    if strategy == "end":
        assert files == []
    else:
        assert [name for name in files if "/" not in name] == DIFFUSION_FILES
        assert hub.repos["me/run"].commits[0] == "Training in progress, step 1"
    folders = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-1", "checkpoint-2"}}
    assert {name.split("/")[0] for name in files if "/" in name} == folders.get(strategy, set())
    if strategy == "checkpoint":
        assert {f"last-checkpoint/{name}" for name in ("optimizer.pt", "trained_weights.safetensors")} <= set(files)
        assert "last-checkpoint/training_args.bin" not in files
    trainer.save_model()
    assert [name for name in published(hub, "me/run") if "/" not in name] == DIFFUSION_FILES
    assert hub.repos["me/run"].commits[-1] == "Model save"
    assert not list(tmp_path.rglob("_pushing*"))
    assert hub.tokens == {TOKEN}


def test_pushing_a_language_model_while_training(tmp_path, hub):
    options = {"push_to_hub": True, "hub_strategy": "checkpoint", "save_strategy": "steps", "save_steps": 1}
    trainer = text_runs.make_trainer(tmp_path / "run", hub_token=TOKEN, **options)
    trainer.train()
    files = published(hub, "me/run")
    expected = {"README.md", "training_args.yaml", "config.json", "model.safetensors", "tokenizer.json"}
    assert expected <= set(files) and "last-checkpoint/optimizer.pt" in files
    assert not any("training_args.bin" in str(path) for path in [*files, *tmp_path.rglob("*")])
    assert "last-checkpoint/trainer_state.json" in files and "trainer_state.json" not in files


@pytest.mark.parametrize("make_trainer", [runs.make_trainer, text_runs.make_trainer])
def test_tables_of_completions_are_all_uploaded_when_training_ends(tmp_path, hub, make_trainer):
    options = {"log_completions": True, "log_completions_hub_repo": "me/logs", "logging_steps": 1, "max_steps": 2}
    trainer = make_trainer(tmp_path / "run", **options)
    trainer.train()
    trainer.commit_scheduler.stop()
    tables = {path.name: path.read_bytes() for path in (tmp_path / "run" / "completions").glob("*.parquet")}
    uploaded = hub.repos["datasets/me/logs"].files
    assert tables and tables == {name: uploaded[name] for name in tables}
    assert "completions" in ModelCard(uploaded["README.md"].decode()).data.tags


def test_the_card_of_a_data_set_of_completions_stays_the_users_own(tmp_path, hub):
    options = {"log_completions": True, "log_completions_hub_repo": "me/logs"}
    runs.make_trainer(tmp_path / "first", **options).commit_scheduler.stop()
    hub.repos["datasets/me/logs"].files["README.md"] = b"mine"
    trainer = runs.make_trainer(tmp_path / "second", max_steps=1, logging_steps=1, **options)
    trainer.train()
    trainer.commit_scheduler.stop()
    files = hub.repos["datasets/me/logs"].files
    assert files["README.md"] == b"mine" and any(name.endswith(".parquet") for name in files)


def test_only_what_users_need_goes_up(tmp_path, hub):
    base = tmp_path / "secret-folder" / "sd3"
    pipelines.stable_diffusion_3(t5=False).save_pretrained(base)
    pipe = StableDiffusion3Pipeline.from_pretrained(base, text_encoder_3=None, tokenizer_3=None)
    trainer = runs.make_trainer(
        tmp_path / "run", pipe=pipe, method="flow", evaluation=runs.prompts(2), eval_strategy="steps", eval_steps=1,
        eval_on_start=True, save_strategy="steps", save_steps=1, log_completions=True, hub_token=TOKEN,
        report_to=["tensorboard"], full=True, learning_rate=1e-3,
    )  # fmt: skip
    trainer.train()
    (tmp_path / "run" / "_saving" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "run" / "_saving" / "checkpoint-9" / "optimizer.pt").touch()  # left by a kill
    trainer.push_to_hub()
    repo = hub.repos["me/run"].files
    assert not [name for name in repo if name.endswith((".bin", ".pt", ".pth", ".pkl", ".parquet"))]
    assert not [name for name in repo if "checkpoint" in name or "events" in name or name.startswith(("runs", "_"))]
    pictures = {"before_after.png", "images/eval-000002.png", "images/sample-0.png"}
    assert pictures | {"transformer/config.json"} <= set(repo)
    for name, data in repo.items():
        assert TOKEN.encode() not in data and str(tmp_path).encode() not in data, name
    assert "secret-folder" not in repo["README.md"].decode()
    config = yaml.safe_load(repo["training_args.yaml"])
    assert config["learning_rate"] == 1e-3 and not {"hub_token", "output_dir"} & config.keys()
    trainer.push_to_hub(include=["runs/*"])
    assert any(name.startswith("runs/") for name in hub.repos["me/run"].files)


@pytest.mark.parametrize("fault", [401, 403, 409, 429, 500, "drop", 0.2, "absent"])
def test_training_goes_on_without_the_hub(tmp_path, hub, fault, caplog, monkeypatch):
    """At the start, at every save and at the end."""
    try_at_once(monkeypatch)
    folder, endpoint = tmp_path / "run", hub.endpoint
    if fault == "absent":
        reach(monkeypatch, "http://127.0.0.1:9")
    else:
        hub.fault = lambda method, path: fault
    trainer = text_runs.make_trainer(folder, push_to_hub=True, save_strategy="steps", save_steps=1, max_steps=2)
    trainer.train()
    trainer.save_model()
    assert trainer.state.global_step == 2
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(saved["model.norm.weight"], trainer.model.state_dict()["model.norm.weight"])
    told = [record.getMessage() for record in caplog.records if record.name == publishing.__name__]
    if fault == 0.2:  # only slow
        assert told == [] and "model.safetensors" in published(hub, "me/run")
        return
    (message,) = told
    assert f"python -m flow_trl.publishing {folder} run" in message and "trainer.push_to_hub()" in message
    with pytest.raises(Exception) as raised:
        trainer.push_to_hub()
    assert f"python -m flow_trl.publishing {folder} run" in raised.value.__notes__[-1]

    hub.fault = lambda method, path: None
    reach(monkeypatch, endpoint)
    trainer.push_to_hub()
    assert {"README.md", "model.safetensors"} <= set(published(hub, "me/run"))
    assert 'from_pretrained("me/run")' in ModelCard.load("me/run").text


def reach(monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


def try_at_once(monkeypatch):
    """The Hub's client waits for nothing between its tries."""
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))


def test_a_push_that_breaks_half_way_is_made_up_for_by_the_command(tmp_path, hub, caplog, monkeypatch, capsys):
    try_at_once(monkeypatch)
    hub.fault = lambda method, path: "drop" if path.startswith("/lfs") else None
    trainer = runs.make_trainer(tmp_path / "run", push_to_hub=True, save_strategy="steps", save_steps=1)
    trainer.train()
    assert published(hub, "me/run") == []
    assert sum(record.name == publishing.__name__ for record in caplog.records) == 1
    assert not list(tmp_path.rglob("_pushing*"))
    hub.fault = lambda method, path: None
    trainer.save_model()
    hub.repos.clear()
    publishing.main([str(tmp_path / "run"), "me/later", "--private"])
    assert "/me/later/commit/" in capsys.readouterr().out
    assert published(hub, "me/later") == DIFFUSION_FILES


def test_a_hub_that_does_not_answer_holds_up_nothing(tmp_path, hub, caplog, monkeypatch):
    monkeypatch.setattr(publishing, "SECONDS_TO_CREATE", 0.2)
    hub.fault = lambda method, path: "hang" if path.endswith("/create") else None
    trainer = runs.make_trainer(tmp_path / "run", push_to_hub=True)
    assert "no answer in 0 s" in caplog.text
    trainer.train()
    assert trainer.state.global_step == 2
    hub.stopped.set()


def test_a_push_raises_no_warning(tmp_path, hub):
    trainer = runs.make_trainer(tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.push_to_hub()
    assert published(hub, "me/run") == DIFFUSION_FILES


@pytest.mark.parametrize(
    "name, expected",
    [
        ("me/base", "me/base"),
        ("/root/hub/models--me--base/snapshots/0a1b/", "me/base"),
        ("/data/models/sd3", "sd3"),
        ("flow_trl/tiny", "tiny"),  # a folder, from the root of a clone
    ],
)
def test_names_without_paths(name, expected, monkeypatch):
    monkeypatch.chdir(Path(publishing.__file__).parents[1])
    assert public_name(name) == expected


def test_configuration_without_secrets(tmp_path):
    options = {"model_init_kwargs": {"token": TOKEN, "variant": "fp16"}, "negative_prompt": f"not {TOKEN}"}
    config = runs.make_config(tmp_path, hub_token=TOKEN, **options)
    public = public_config(config)
    assert public["model_init_kwargs"] == {"variant": "fp16"}
    assert public["negative_prompt"] == "not <token>"
    assert TOKEN not in json.dumps(public) and str(tmp_path) not in json.dumps(public)
    again = type(config)(str(tmp_path), **public)
    assert again.learning_rate == config.learning_rate and again.pipeline_kwargs == config.pipeline_kwargs


def test_files_that_name_their_base_name_no_path(tmp_path):
    folder, target = tmp_path / "run", tmp_path / "staged"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path), "r": 4}))
    (folder / "README.md").write_text(f'load("{folder}") and load("{tmp_path / "other"}")')
    (folder / "tokenizer.json").write_text(json.dumps({"vocab": {"/": 0}}))
    (folder / "notes.log").touch()
    files = public_files(folder)
    assert [str(file) for file in files] == ["README.md", "adapter_config.json", "tokenizer.json"]
    _stage(folder, target, "me/run", files)
    adapter = json.loads((target / "adapter_config.json").read_text())
    assert adapter == {"base_model_name_or_path": tmp_path.name, "r": 4}
    assert (target / "README.md").read_text().startswith('load("me/run") and')
    assert (target / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


def test_a_folder_without_a_card_is_not_pushed(tmp_path):
    with pytest.raises(ValueError, match=r"has no README\.md.*`output_dir`"):
        publishing.publish(tmp_path, "me/run")

"""From a trainer to the Hub and back, and what happens where the Hub is not reached."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from flow_trl import publishing
from tests import pipelines, text_models
from tests.hub_server import hub  # noqa: F401
from tests.trainer import runs, text_runs


def test_round_trip_first(tmp_path, hub):
    base = tmp_path / "base"
    pipelines.stable_diffusion_3(t5=False).save_pretrained(base)
    HfApi().create_repo("base/small-sd3")
    HfApi().upload_folder(repo_id="base/small-sd3", folder_path=base)
    print(hub.files("base/small-sd3"))
    from diffusers import StableDiffusion3Pipeline
    pipe = StableDiffusion3Pipeline.from_pretrained("base/small-sd3", text_encoder_3=None, tokenizer_3=None)
    trainer = runs.make_trainer(tmp_path / "my-lora", pipe=pipe, evaluation=runs.prompts(3), eval_strategy="steps", eval_steps=2, eval_on_start=True, hub_token="hf_secretsecretsecret")
    trainer.train()
    trainer.push_to_hub()
    print(hub.files("me/my-lora"))
    print(hub.repos["me/my-lora"].files["README.md"].decode())
    print(hub.repos["me/my-lora"].files["training_args.yaml"].decode())
    assert 0

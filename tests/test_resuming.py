"""What may be different when a run goes on from a checkpoint."""

from dataclasses import fields, replace

import pytest
import torch
from datasets import Dataset, Image
from peft import LoraConfig
from PIL import Image as Pillow

from flow_trl import BlockwiseGRPOConfig, DDPOConfig, FlowGRPOConfig, TDPORConfig, TPGRPOConfig, resuming
from flow_trl.resuming import (
    APPLIED,
    FREE,
    REFUSED,
    REFUSED_WITHIN,
    adapter,
    arguments,
    dataset_digest,
    described,
    differences,
    sampled_digest,
)


CONFIGS = [FlowGRPOConfig, TPGRPOConfig, DDPOConfig, TDPORConfig, BlockwiseGRPOConfig]
SETS = [REFUSED, REFUSED_WITHIN, APPLIED, FREE]
NOT_FIELDS = {"base_weights", "blocks", "model", "processes", "reward_funcs", "scheduler", "train_dataset", "trainer", "versions"}  # fmt: skip


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_field_has_chosen(config_class):
    for field in fields(config_class):
        assert sum(field.name in names for names in SETS) == 1, field.name


def test_nothing_else_is_listed():
    known = {field.name for config_class in CONFIGS for field in fields(config_class)}
    assert set().union(*SETS) - known - {"vllm_importance_sampling_cap"} == NOT_FIELDS


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_field_that_changes_is_refused_or_said_or_of_no_matter(config_class, tmp_path):
    args = config_class(str(tmp_path), use_cpu=True, report_to=[])
    known = arguments(args)
    names = {field.name for field in fields(args)}
    assert known.keys() == names - FREE
    for within in (False, True):
        changed = dict.fromkeys(known, "another value")
        refused, applied = differences(known, changed, within_generation=within)
        expected = (REFUSED | REFUSED_WITHIN if within else REFUSED) & names
        assert set(refused) == expected and set(applied) == known.keys() - expected
    assert differences(known, arguments(args), within_generation=True) == ([], [])


def test_values_are_named():
    old, new = {"guidance_scale": 2.0, "epsilon": 1}, {"guidance_scale": 3.0, "epsilon": 1, "newer": 2}
    assert differences(old, new, within_generation=False) == (["guidance_scale"], [])
    assert described(["guidance_scale"], old, new) == "`guidance_scale` was 2.0, now 3.0"


def test_a_schedule_with_a_state_of_its_own_is_not_changed():
    for old, new in (("constant", "reduce_lr_on_plateau"), ("greedy", "cosine")):
        kinds = {"lr_scheduler_type": old}, {"lr_scheduler_type": new}
        assert differences(*kinds, within_generation=False) == (["lr_scheduler_type"], [])


def test_what_is_kept_has_no_secrets_and_no_addresses(tmp_path):
    class Thing:
        pass

    args = TPGRPOConfig(str(tmp_path), use_cpu=True, hub_token="hf_abc", model_init_kwargs={"token": "hf_abc"})
    things = [arguments(replace(args, pipeline_kwargs={"a": Thing(), "b": torch.float32})) for _ in range(2)]
    assert things[0] == things[1] and "hf_abc" not in str(things)


def test_a_set_is_the_same_in_every_process(tmp_path):
    """Whatever the seed of Python's hashes, which is another in each."""
    args = TPGRPOConfig(str(tmp_path), use_cpu=True, pipeline_kwargs={"layers": {"d", "b", "a", "c"}})
    assert arguments(args)["pipeline_kwargs"] == {"layers": ["a", "b", "c", "d"]}


def test_images_and_tensors_count_by_their_content(tmp_path):
    numbers = torch.zeros(2000)
    changed = numbers.clone()
    changed[1000] = 1  # which is left out where a tensor is printed
    red, blue = (Pillow.new("RGB", (4, 4), color) for color in ("red", "blue"))
    known = [
        arguments(TPGRPOConfig(str(tmp_path), use_cpu=True, pipeline_kwargs={"image": image, "numbers": values}))
        for image, values in ((red, numbers), (red.copy(), numbers.clone()), (blue, numbers), (red, changed))
    ]
    assert known[0] == known[1]
    for other in known[2:]:
        assert differences(known[0], other, within_generation=False) == (["pipeline_kwargs"], [])


@pytest.mark.parametrize("change", ["r", "lora_alpha", "target_modules", "use_dora", "use_rslora"])
def test_adapters(change):
    base = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k"]}
    other = {"r": 8, "lora_alpha": 4, "target_modules": ["to_q"], "use_dora": True, "use_rslora": True}[change]
    old, new = adapter(LoraConfig(**base)), adapter(LoraConfig(**base | {change: other}))
    assert differences(old, new, within_generation=False) == ([f"peft_config.{change}"], [])
    again = adapter(LoraConfig(**base, inference_mode=True, init_lora_weights="gaussian", lora_dropout=0.1))
    assert differences(old, again, within_generation=False) == ([], [])
    assert differences(old, adapter(None), within_generation=False) == (["peft_config.peft_type"], [])


def test_data_sets(tmp_path):
    rows = [{"prompt": f"{i}", "scores": [i, 2.5], "where": {"x": i}} for i in range(1500)]
    digest = dataset_digest(Dataset.from_list(rows))
    assert digest.startswith("1500 rows, ") and dataset_digest(Dataset.from_list(rows)) == digest
    changes = [rows[::-1], rows[:-1], [*rows[:-1], {**rows[-1], "where": {"x": 0}}], [{**row, "b": 1} for row in rows]]
    assert len({digest, *(dataset_digest(Dataset.from_list(changed)) for changed in changes)}) == 5
    assert dataset_digest(Dataset.from_list(rows).to_iterable_dataset()) is None and dataset_digest(None) is None


def test_data_sets_of_images(tmp_path):
    digests = []
    for folder, color in (("a", "red"), ("b", "red"), ("b", "blue")):
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / f"{color}.png"
        Pillow.new("RGB", (4, 4), color).save(path)
        data = Dataset.from_dict({"prompt": ["p"], "image": [str(path)], "images": [[Pillow.open(path)]]})
        digests.append(dataset_digest(data.cast_column("image", Image())))
    assert digests[0] == digests[1] != digests[2]


def test_weights():
    weights = [torch.randn(100, 7), torch.randn(3), torch.arange(5)]
    digest = sampled_digest(weights)
    assert sampled_digest([weight.clone() for weight in weights]) == digest
    assert sampled_digest([weights[0].bfloat16().float(), *weights[1:]]) != digest
    assert sampled_digest([*weights[:2], weights[2] + 1]) != digest
    assert sampled_digest(weight.to("meta") for weight in weights) == sampled_digest([])


def test_versions():
    assert {"versions.flow_trl", "versions.torch", "versions.diffusers"} <= resuming.versions().keys()

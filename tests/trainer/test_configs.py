"""The configs: what they accept from Python, the command line and YAML, what they derive, and their documentation."""

import dataclasses
import inspect
import json
import pickle
import re

import pytest
from transformers import HfArgumentParser
from trl import TrlParser

from flow_trl import BlockwiseGRPOConfig, DDPOConfig, FlowGRPOConfig, TDPORConfig, TPGRPOConfig
from flow_trl.trainer.diffusion_config import DiffusionConfig


CONFIGS = [DiffusionConfig, FlowGRPOConfig, TPGRPOConfig, DDPOConfig, TDPORConfig]
DDIM = [DDPOConfig, TDPORConfig]
PUBLIC = [FlowGRPOConfig, TPGRPOConfig, *DDIM]

# For each field what is written on the command line, and what it means; all differ from the defaults.
COMMAND_LINE = {
    "learning_rate": ("2e-4", 2e-4),
    "lr_scheduler_type": ("cosine", "cosine"),
    "logging_steps": ("5", 5.0),
    "gradient_accumulation_steps": ("6", 6),  # 12 images / (2 per micro-batch * 3 updates) * 3 steps
    "bf16": ("True", True),
    "logging_nan_inf_filter": ("True", True),
    "remove_unused_columns": ("True", True),
    "model_init_kwargs": ('{"variant": "fp16"}', {"variant": "fp16"}),
    "pipeline_kwargs": (
        '{"height": 512, "width": 256, "flag": false, "text": "7"}',
        {"height": 512, "width": 256, "flag": False, "text": "7"},
    ),
    "negative_prompt": ("blurry, dark", "blurry, dark"),
    "num_inference_steps": ("8", 8),
    "guidance_scale": ("2", 2.0),
    "num_generations": ("6", 6),
    "generation_batch_size": ("12", 12),
    "per_device_rollout_batch_size": ("3", 3),
    "per_device_decode_batch_size": ("5", 5),
    "offload_text_encoders": ("True", True),
    "updates_per_generation": ("3", 3),
    "num_iterations": ("2", 2),
    "shuffle_dataset": ("false", False),
    "epsilon": ("1e-3", 1e-3),
    "beta": ("0.01", 0.01),
    "adv_clip_max": ("3", 3.0),
    "reward_weights": ("1 -0.5", [1.0, -0.5]),
    "overlap_rewards": ("false", False),
    "check_pipeline": ("false", False),
    "reward_timeout": ("30", 30.0),
    "reward_retries": ("2", 2),
    "reward_on_error": ("none", "none"),
    "out_of_domain_rewards": ("ocr scene", ["ocr", "scene"]),
    "pipeline_columns": ("image mask_image", ["image", "mask_image"]),
    "ema_decay": ("0.5", 0.5),
    "ema_update_steps": ("2", 2),
    "eval_num_inference_steps": ("20", 20),
    "eval_guidance_scale": ("1", 1.0),
    "num_images_to_save": ("0", 0),
    "log_completions": ("True", True),
    "num_completions_to_print": ("3", 3),
    "log_unique_prompts": ("True", True),
    "log_completions_hub_repo": ("user/logs", "user/logs"),
    "noise_level": ("0.8", 0.8),
    "sde_type": ("cps", "cps"),
    "sde_window_size": ("3", 3),
    "sde_window_range": ("1 5", [1, 5]),
    "scale_rewards": ("trajectory", "trajectory"),
    "step_weights": ("noise", "noise"),
    "multi_objective_aggregation": ("normalize_then_sum", "normalize_then_sum"),
    "credit": ("turning_point", "turning_point"),
    "completion_stride": ("2", 2),
    "eta": ("0.5", 0.5),
    "train_timestep_fraction": ("0.375", 0.375),  # 3 of 8 steps
    "per_prompt_stat_tracking_buffer_size": ("16", 16),
    "per_prompt_stat_tracking_min_count": ("4", 4),
    "gamma": ("0.9", 0.9),
    "use_critic": ("false", False),
    "critic_encoder": ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
    "critic_decoder": ("madebyollin/taesd", "madebyollin/taesd"),
    "critic_learning_rate": ("1e-3", 1e-3),
    "cliprange_value": ("0.1", 0.1),
    "reset_neurons": ("dormant", "dormant"),
    "reset_every": ("5", 5),
    "dormant_threshold": ("0.025", 0.025),
}

# An update of TDPO-R trains one step of its images.
DIFFERENT = {TDPORConfig: {"gradient_accumulation_steps": ("2", 2)}}


def given(config_class: type) -> dict[str, tuple[str, object]]:
    """What the command line gives a class, and what it means."""
    table = COMMAND_LINE | DIFFERENT.get(config_class, {})
    return {name: table[name] for name in fields_of(config_class)}


def declared(config_class: type) -> list[str]:
    """The fields that a class declares or declares anew."""
    return list(inspect.get_annotations(config_class))


def fields_of(config_class: type) -> list[str]:
    return list(dict.fromkeys(name for cls in CONFIGS if issubclass(config_class, cls) for name in declared(cls)))


def documented(config_class: type) -> dict[str, str | None]:
    """Name and default of each argument in the docstring."""
    arguments = inspect.getdoc(config_class).split("Args:\n")[1].split("\nRaises:")[0]
    entries = re.findall(r"^    (\w+) \(`[^)]*`, \*optional\*(?:, defaults to `(.+?)`)?\):\n +\S", arguments, re.M)
    return {name: default or None for name, default in entries}


@pytest.mark.parametrize("config_class", [*CONFIGS, BlockwiseGRPOConfig])
def test_every_field_has_help_and_is_documented_with_its_default(config_class):
    documentation = documented(config_class)
    assert list(documentation) and set(documentation) == set(declared(config_class))
    for name in documentation:
        field = config_class.__dataclass_fields__[name]
        assert len(field.metadata.get("help", "")) > 10, name
        stated = documentation[name] and documentation[name].strip('"')
        assert stated == str(field.default) or float(stated) == field.default if stated else field.default is None, (
            name
        )


def test_defaults_are_the_papers():
    for config in (FlowGRPOConfig("out"), TPGRPOConfig("out")):
        assert (config.num_inference_steps, config.eval_num_inference_steps) == (10, 40)
        assert (config.guidance_scale, config.eval_guidance_scale, config.noise_level) == (4.5, None, 0.7)
        assert (config.num_generations, config.generation_batch_size) == (24, 48 * 24)
        assert (config.updates_per_generation, config.num_iterations) == (2, 1)
        assert (config.epsilon, config.adv_clip_max, config.ema_decay, config.ema_update_steps) == (1e-5, 5.0, 0.9, 8)
        assert (config.sde_type, config.sde_window_size, config.scale_rewards) == ("sde", None, "group")
        assert (config.step_weights, config.multi_objective_aggregation) == ("none", "sum_then_normalize")
        assert config.num_trained_steps == 9
        assert config.gradient_accumulation_steps == 1152 // (8 * 2) * 9
    assert (config.credit, config.completion_stride) == ("consistent", 1)


def test_defaults_of_ddim_trainers_are_the_papers():
    for config in (DDPOConfig("out"), TDPORConfig("out")):
        assert (config.num_inference_steps, config.eval_num_inference_steps) == (50, 50)
        assert (config.guidance_scale, config.eval_guidance_scale, config.eta) == (5.0, None, 1.0)
        assert (config.learning_rate, config.epsilon, config.beta, config.adv_clip_max) == (1e-4, 1e-4, 0.0, 5.0)
        assert (config.per_prompt_stat_tracking_buffer_size, config.per_prompt_stat_tracking_min_count) == (32, 16)
        assert (config.max_grad_norm, config.ema_decay, config.num_iterations) == (1.0, 0.0, 1)
        assert (config.num_generations, config.generation_batch_size) == (8, 256)
        assert config.num_trained_steps == 50
    assert DDPOConfig("out").gradient_accumulation_steps == 256 // (8 * 2) * 50
    assert config.gradient_accumulation_steps == 256 // 8  # each sweep has an update of its own
    assert (config.updates_per_generation, config.num_sweeps, config.gamma) == (1, 50, 1.0)
    assert (config.use_critic, config.critic_learning_rate, config.cliprange_value) == (True, 1e-4, 0.2)
    assert (config.reset_neurons, config.reset_every, config.dormant_threshold) == ("active", 10, 0.0)
    assert (config.critic_encoder, config.critic_decoder) == (None, None)


@pytest.mark.parametrize("parser_class", [HfArgumentParser, TrlParser])
@pytest.mark.parametrize("config_class", PUBLIC)
class TestCommandLine:
    def parse(self, parser_class, config_class, *arguments):
        (config,) = parser_class(config_class).parse_args_into_dataclasses(["--output_dir", "out", *arguments])
        return config

    def test_every_field(self, parser_class, config_class):
        default, table = config_class("out"), given(config_class)
        alone = {"use_critic"} & table.keys()  # without a critic, its other fields are refused
        for names in (table.keys() - alone, alone):
            arguments = ["--per_device_train_batch_size", "2", "--use_cpu"]
            for name in names:
                text, value = table[name]
                arguments += [f"--{name}", *(text.split() if isinstance(value, list) else [text])]
            config = self.parse(parser_class, config_class, *arguments)
            for name in names:
                assert getattr(config, name) == table[name][1] != getattr(default, name), name

    def test_nothing_given(self, parser_class, config_class):
        config, default = self.parse(parser_class, config_class), config_class("out")
        assert all(getattr(config, name) == getattr(default, name) for name in fields_of(config_class))

    def test_help(self, parser_class, config_class, capsys):
        with pytest.raises(SystemExit) as info:
            parser_class(config_class).parse_args_into_dataclasses(["--help"])
        text = capsys.readouterr().out
        assert info.value.code == 0
        assert all(f"--{name} " in text for name in fields_of(config_class))


@pytest.mark.parametrize("parser_class", [HfArgumentParser, TrlParser])
@pytest.mark.parametrize(
    "config_class, name",
    [
        (FlowGRPOConfig, "sde_type"),
        (TPGRPOConfig, "sde_type"),
        (TPGRPOConfig, "credit"),
        (TPGRPOConfig, "scale_rewards"),
        (TPGRPOConfig, "step_weights"),
        (FlowGRPOConfig, "multi_objective_aggregation"),
        (TDPORConfig, "reset_neurons"),
    ],
)
def test_unknown_choice(parser_class, config_class, name, capsys):
    with pytest.raises(SystemExit):
        parser_class(config_class).parse_args_into_dataclasses(["--output_dir", "out", f"--{name}", "other"])
    error = capsys.readouterr().err
    assert f"--{name}" in error and "choose from" in error


@pytest.mark.parametrize("text, stride, steps", [("2", 2, 2), ("1", 1, 1), ("jump", "jump", 7)])
@pytest.mark.parametrize("from_file", [False, True])
def test_completion_stride_is_a_number_or_jump(tmp_path, text, stride, steps, from_file):
    arguments = ["--output_dir", "out", "--credit", "control_variate", "--num_inference_steps", "7"]
    if from_file:
        path = tmp_path / "config.yaml"
        path.write_text(f"completion_stride: {text}\n")
        arguments += ["--config", str(path)]
    else:
        arguments += ["--completion_stride", text]
    (config,) = TrlParser(TPGRPOConfig).parse_args_and_config(arguments)
    assert config.completion_stride == stride and type(config.completion_stride) is type(stride)
    assert config.completion_steps == steps
    assert json.loads(config.to_json_string())["completion_stride"] == stride
    assert dataclasses.replace(config).completion_stride == stride


@pytest.mark.parametrize("text", ["leap", "0", "-1", "1.5", "None", ""])
def test_completion_stride_of_the_command_line_is_checked(text):
    arguments = ["--output_dir", "out", "--credit", "control_variate", f"--completion_stride={text}"]
    with pytest.raises((ValueError, TypeError), match="`completion_stride=.*1 .*'jump'"):
        TrlParser(TPGRPOConfig).parse_args_and_config(arguments)


def test_what_is_recommended_works():
    config = TPGRPOConfig("out", **TPGRPOConfig.RECOMMENDED)
    assert all(
        getattr(config, name) == value != getattr(TPGRPOConfig("out"), name)
        for name, value in TPGRPOConfig.RECOMMENDED.items()
    )
    assert "RECOMMENDED" not in config.to_dict()


def test_the_command_line_table_is_complete():
    assert set(COMMAND_LINE) == {name for config_class in PUBLIC for name in fields_of(config_class)}


def test_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        """
        output_dir: out
        learning_rate: 1e-4  # YAML calls this a string
        guidance_scale: null
        num_generations: 8
        generation_batch_size: 32
        noise_level: 1
        sde_window_size: 2
        sde_window_range: [1, 4]
        reward_weights: [1, 0.5]
        pipeline_kwargs: {height: 512, width: 512}
        model_init_kwargs: '{"variant": "fp16"}'
        credit: incremental
        """
    )
    arguments = ["--config", str(path), "--num_generations", "4"]
    (config,) = TrlParser(TPGRPOConfig).parse_args_and_config(arguments)
    assert (config.learning_rate, config.guidance_scale, config.noise_level) == (1e-4, None, 1)
    assert (config.sde_window_size, config.sde_window_range, config.reward_weights) == (2, [1, 4], [1, 0.5])
    assert config.pipeline_kwargs == {"height": 512, "width": 512}
    assert config.model_init_kwargs == {"variant": "fp16"}
    assert config.credit == "incremental"
    assert config.num_generations == 4  # the command line comes first
    assert config.gradient_accumulation_steps == 32 // (8 * 2) * 2


@pytest.mark.parametrize(
    "arguments, accumulation",
    [
        ({}, 72 * 9),
        ({"num_inference_steps": 6}, 72 * 5),
        ({"sde_window_size": 2}, 72 * 2),
        ({"per_device_train_batch_size": 4}, 144 * 9),
        ({"updates_per_generation": 1}, 144 * 9),
        ({"generation_batch_size": 576}, 36 * 9),
        ({"num_iterations": 3}, 72 * 9),
        ({"gradient_accumulation_steps": 648}, 72 * 9),
    ],
)
def test_accumulation_follows_from_the_batch_sizes(arguments, accumulation):
    assert TPGRPOConfig("out", **arguments).gradient_accumulation_steps == accumulation


@pytest.mark.parametrize(
    "arguments, images, steps",
    [
        ({}, 32, 50),
        ({"num_inference_steps": 20}, 32, 20),
        ({"train_timestep_fraction": 0.5}, 32, 25),
        ({"num_inference_steps": 3, "train_timestep_fraction": 0.01}, 32, 1),
        ({"updates_per_generation": 4}, 8, 50),
        ({"per_device_train_batch_size": 16}, 16, 50),
        ({"num_iterations": 3}, 32, 50),
    ],
)
def test_sweeps_have_updates_of_their_own(arguments, images, steps):
    arguments = {"updates_per_generation": 1} | arguments
    ddpo, tdpo_r = (config_class("out", **arguments) for config_class in DDIM)
    assert (ddpo.gradient_accumulation_steps, ddpo.num_sweeps) == (images * steps, 1)
    assert (tdpo_r.gradient_accumulation_steps, tdpo_r.num_sweeps) == (images, steps)
    assert ddpo.num_trained_steps == tdpo_r.num_trained_steps == steps


def test_accumulation_on_two_processes(monkeypatch):
    config = TPGRPOConfig("out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    config.gradient_accumulation_steps = None
    config._validate()
    assert config.gradient_accumulation_steps == 36 * 9
    config.generation_batch_size = 24  # one update of 16 for two processes, and a half
    with pytest.raises(ValueError, match=r"`generation_batch_size=24`.* multiple of 32 .* 2 processes"):
        config._validate()


def test_json():
    config = TPGRPOConfig("out", pipeline_kwargs={"height": 512}, sde_window_size=2, sde_window_range=[1, 4])
    loaded = json.loads(config.to_json_string())
    assert loaded == json.loads(json.dumps(config.to_dict()))
    assert loaded["pipeline_kwargs"] == {"height": 512} and loaded["sde_window_range"] == [1, 4]
    assert all(loaded[name] == getattr(config, name) for name in fields_of(TPGRPOConfig))
    config = TDPORConfig("out", out_of_domain_rewards=["ocr"], critic_decoder="madebyollin/taesd")
    loaded = json.loads(config.to_json_string())
    assert all(loaded[name] == getattr(config, name) for name in fields_of(TDPORConfig))


@pytest.mark.parametrize("config_class", PUBLIC)
def test_copies(config_class):
    config = config_class("out", epsilon=0.5, pipeline_kwargs={"height": 512})
    assert pickle.loads(pickle.dumps(config)) == config
    again = dataclasses.replace(config)
    changed = dataclasses.replace(config, epsilon=0.9, seed=7)
    assert all(getattr(again, name) == getattr(config, name) for name in fields_of(config_class))
    assert (changed.epsilon, changed.seed, changed.pipeline_kwargs) == (0.9, 7, {"height": 512})


def test_a_copy_with_other_batch_sizes_says_what_to_do():
    config = TPGRPOConfig("out")
    with pytest.raises(ValueError, match=r"`gradient_accumulation_steps=648`.*324.*`dataclasses.replace`.*`None`"):
        dataclasses.replace(config, generation_batch_size=576)
    changed = dataclasses.replace(config, generation_batch_size=576, gradient_accumulation_steps=None)
    assert changed.gradient_accumulation_steps == 324


def test_a_subclass_may_have_fields_of_any_type():
    @dataclasses.dataclass
    class Custom(TPGRPOConfig):
        table: dict[str, list[int]] = dataclasses.field(default_factory=dict)
        pair: "tuple[int, int] | None" = None

    assert Custom("out", table={"a": [1]}, pair=(1, 2)).pair == (1, 2)


def test_a_subclass_with_another_default_has_the_same_choices():
    @dataclasses.dataclass
    class Incremental(TPGRPOConfig):
        credit: str = "incremental"

    class Grouped(BlockwiseGRPOConfig):  # not a dataclass, so its annotations make no fields
        note: str = "mine"

    assert Incremental("out", use_cpu=True).credit == "incremental"
    with pytest.raises(ValueError, match=r"`credit='outcomes'` does not work: choose one of \('outcome', "):
        Incremental("out", use_cpu=True, credit="outcomes")
    with pytest.raises(ValueError, match=r"`baseline='groups'` does not work"):
        Grouped("out", use_cpu=True, bf16=False, baseline="groups")

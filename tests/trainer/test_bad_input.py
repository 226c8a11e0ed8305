"""What cannot work is an error before anything is sampled, and names the argument, its value and a remedy."""

import inspect
import math
import sys

import datasets
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from huggingface_hub.errors import OfflineModeIsEnabled
from peft import LoHaConfig, LoraConfig
from safetensors.torch import load_file
from transformers import TrainingArguments

from flow_trl import (
    DDPOConfig,
    DDPOTrainer,
    FlowGRPOConfig,
    FlowGRPOTrainer,
    TDPORConfig,
    TDPORTrainer,
    TPGRPOConfig,
    TPGRPOTrainer,
)
from flow_trl.utils import MissingExtraError
from tests import pipelines


PROMPTS = [f"a {color} {shape}" for color in ("red", "green") for shape in ("circle", "square")]
DENOISERS = ("Transformer2DModel", "Transformer3DModel", "UNet2DConditionModel")


def dataset(**columns):
    return datasets.Dataset.from_dict({"prompt": PROMPTS, **columns})


def brightness(prompts, images, **columns):
    return [np.asarray(image).mean() / 255 for image in images]


def lora(*target_modules):
    return LoraConfig(r=2, init_lora_weights="gaussian", target_modules=list(target_modules or ["to_q"]))


def config(output_dir, config_class=TPGRPOConfig, **arguments):
    defaults = {
        "num_inference_steps": 3,
        "num_generations": 4,
        "generation_batch_size": 16,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return config_class(str(output_dir), **(defaults | arguments))


@pytest.fixture
def evaluations(monkeypatch):
    """A list that grows with every evaluation of any denoiser."""
    calls = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: calls.append(module) if type(module).__name__.endswith(DENOISERS) else None
    )
    yield calls
    handle.remove()


def names(message, *words):
    missing = [word for word in words if word not in str(message)]
    assert not missing, f"{missing} not in: {message}"


# Arguments of the configs: what is given, the argument that is named, and words of the remedy

CONFIGS = [
    ({"num_generations": 1}, "num_generations", "at least 2"),
    ({"num_generations": 0}, "num_generations", "at least 2"),
    ({"generation_batch_size": 18}, "generation_batch_size", "multiple of `num_generations=4`, for example 16"),
    ({"generation_batch_size": 2}, "generation_batch_size", "for example 4"),
    ({"generation_batch_size": 12}, "generation_batch_size", "multiple of 8 = `per_device_train_batch_size=4`"),
    ({"generation_batch_size": 0}, "generation_batch_size", "at least 1"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size", "at least 1"),
    ({"per_device_rollout_batch_size": 0}, "per_device_rollout_batch_size", "at least 1"),
    ({"updates_per_generation": 0}, "updates_per_generation", "at least 1"),
    ({"num_iterations": 0}, "num_iterations", "at least 1"),
    ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps", "make it 4 = 2 micro-batches"),
    ({"num_inference_steps": 1}, "num_inference_steps", "at least 2"),
    ({"eval_num_inference_steps": 0}, "eval_num_inference_steps", "at least 1"),
    ({"sde_window_size": 3}, "sde_window_size", "room for 1 to 2 stochastic steps"),
    ({"sde_window_size": 0}, "sde_window_size", "room for 1 to 2 stochastic steps"),
    ({"sde_window_size": 2, "sde_window_range": [0, 1]}, "sde_window_size", "[0, 1) have room for 1 to 1"),
    ({"sde_window_size": 1, "sde_window_range": [0, 3]}, "sde_window_range", "first < last <= 2"),
    ({"sde_window_size": 1, "sde_window_range": [-1, 2]}, "sde_window_range", "0 <= first"),
    ({"sde_window_size": 1, "sde_window_range": [1, 1]}, "sde_window_range", "first < last"),
    ({"sde_window_size": 1, "sde_window_range": [1]}, "sde_window_range", "must be [first, last]"),
    ({"sde_window_size": 1, "sde_window_range": [0, 1, 2]}, "sde_window_range", "must be [first, last]"),
    ({"sde_window_range": [0, 2]}, "sde_window_range", "only with `sde_window_size`"),
    ({"noise_level": 0}, "noise_level", "above 0"),
    ({"noise_level": -0.7}, "noise_level", "above 0"),
    ({"noise_level": math.nan}, "noise_level", "above 0"),
    ({"noise_level": math.inf}, "noise_level", "usual are 0.7"),
    ({"noise_level": 1.2, "sde_type": "cps"}, "noise_level", "at most 1"),
    ({"sde_type": "ode"}, "sde_type", "choose 'sde' or 'cps'"),
    ({"credit": "turning-point"}, "credit", "'turning_point'"),
    ({"credit": "control-variate"}, "credit", "'control_variate'"),
    ({"credit": "jump"}, "credit", "'outcome_control_variate'"),
    ({"completion_stride": 0}, "completion_stride", "at least 1"),
    ({"completion_stride": -1}, "completion_stride", "at least 1 (exact), or 'jump'"),
    ({"completion_stride": "leap"}, "completion_stride", "or 'jump'"),
    ({"completion_stride": "-2"}, "completion_stride", "at least 1"),
    ({"completion_stride": "²"}, "completion_stride", "at least 1"),
    ({"completion_stride": None}, "completion_stride", "or 'jump'"),
    ({"completion_stride": "jump"}, "completion_stride", "`credit='consistent'` compares completions"),
    ({"completion_stride": "jump", "credit": "incremental"}, "completion_stride", "choose `credit='control_variate'`"),
    ({"completion_stride": "jump", "credit": "turning_point"}, "completion_stride", "or a number"),
    ({"scale_rewards": "groups"}, "scale_rewards", "choose one of ('group', 'trajectory', 'batch', 'none')"),
    ({"scale_rewards": "step"}, "scale_rewards", "'trajectory'"),
    ({"step_weights": "sigma"}, "step_weights", "choose 'none' or 'noise'"),
    ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation", "'normalize_then_sum'"),
    (
        {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
        "multi_objective_aggregation",
        "choose 'group', 'trajectory' or 'batch'",
    ),
    ({"epsilon": 0}, "epsilon", "above 0; 1e-5"),
    ({"beta": -0.1}, "beta", "not be negative"),
    ({"beta": math.inf}, "beta", "0 switches"),
    ({"adv_clip_max": 0}, "adv_clip_max", "above 0"),
    ({"num_completions_to_print": 0}, "num_completions_to_print", "at least 1, or None"),
    ({"log_completions_hub_repo": "user/logs"}, "log_completions_hub_repo", "only with `log_completions=True`"),
    ({"ema_decay": 1}, "ema_decay", "in [0, 1); 0 switches"),
    ({"ema_decay": -0.1}, "ema_decay", "in [0, 1)"),
    ({"ema_update_steps": 0}, "ema_update_steps", "at least 1"),
    ({"guidance_scale": -1.0}, "guidance_scale", "1 means no guidance"),
    ({"eval_guidance_scale": math.nan}, "eval_guidance_scale", "not be negative"),
    ({"reward_weights": [0.0, 0]}, "reward_weights", "at least one must not be 0"),
    ({"reward_weights": []}, "reward_weights", "at least one must not be 0"),
    ({"reward_weights": [math.nan, 1]}, "reward_weights", "must be finite"),
    ({"pipeline_kwargs": "height=512"}, "pipeline_kwargs", "'{\"height\": 512}'"),
    ({"pipeline_kwargs": '{"height": 512'}, "pipeline_kwargs", "must be a dict"),
    ({"pipeline_kwargs": {"num_inference_steps": 5}}, "pipeline_kwargs", "move ['num_inference_steps'] out of it"),
    ({"pipeline_kwargs": {"guidance_scale": 5.0}}, "pipeline_kwargs", "arguments of the same name"),
    ({"pipeline_kwargs": {"negative_prompt": "dark"}}, "pipeline_kwargs", "move ['negative_prompt'] out of it"),
]
DDPO_CONFIGS = [
    ({"eta": 0}, "eta", "in (0, 1]; 1 is usual"),
    ({"eta": -0.5}, "eta", "in (0, 1]"),
    ({"eta": 1.5}, "eta", "in (0, 1]"),
    ({"eta": math.nan}, "eta", "in (0, 1]"),
    ({"train_timestep_fraction": 0}, "train_timestep_fraction", "in (0, 1]"),
    ({"train_timestep_fraction": 1.5}, "train_timestep_fraction", "in (0, 1]"),
    ({"per_prompt_stat_tracking_buffer_size": 0}, "per_prompt_stat_tracking_buffer_size", "at least 1"),
    ({"per_prompt_stat_tracking_min_count": 0}, "per_prompt_stat_tracking_min_count", "from 1 to"),
    (
        {"per_prompt_stat_tracking_min_count": 9, "per_prompt_stat_tracking_buffer_size": 8},
        "per_prompt_stat_tracking_min_count",
        "from 1 to `per_prompt_stat_tracking_buffer_size=8`",
    ),
    ({"num_generations": 0}, "num_generations", "at least 1"),
    ({"epsilon": 0}, "epsilon", "1e-4 (diffusion)"),
]
TDPO_R_CONFIGS = [
    ({"gamma": -0.1}, "gamma", "in [0, 1]; 1 does not discount"),
    ({"gamma": 1.1}, "gamma", "in [0, 1]"),
    ({"gamma": 0.9, "use_critic": False}, "gamma", "only with `use_critic=True`"),
    ({"critic_encoder": "some/clip", "use_critic": False}, "critic_encoder", "only with `use_critic=True`"),
    ({"critic_learning_rate": 0}, "critic_learning_rate", "above 0; 1e-4"),
    ({"critic_learning_rate": math.inf}, "critic_learning_rate", "above 0"),
    ({"cliprange_value": 0}, "cliprange_value", "above 0; 0.2 is usual"),
    ({"reset_neurons": "some"}, "reset_neurons", "('active', 'dormant', 'all', 'none')"),
    ({"reset_every": 0}, "reset_every", "at least 1; `reset_neurons='none'` switches"),
    ({"dormant_threshold": -0.1}, "dormant_threshold", "at least 0"),
    ({"dormant_threshold": math.inf}, "dormant_threshold", "at least 0"),
    ({"gradient_accumulation_steps": 6}, "gradient_accumulation_steps", "make it 4 = 4 micro-batches of images * 1"),
]
TYPES = [
    ({"noise_level": "0.7"}, "`float`"),
    ({"learning_rate": "1e-4"}, "`float`"),
    ({"noise_level": None}, "`float`"),
    ({"beta": True}, "`float`"),
    ({"guidance_scale": "4.5"}, "`float | None`"),
    ({"num_generations": 4.0}, "`int`"),
    ({"num_generations": "4"}, "`int`"),
    ({"sde_window_range": "1 4"}, "`list[int] | None`"),
    ({"sde_window_range": [0.5, 2]}, "`list[int] | None`"),
    ({"sde_window_size": [1, 2]}, "`int | None`"),
    ({"reward_weights": 1.0}, "`list[float] | None`"),
    ({"reward_weights": ["1", "2"]}, "`list[float] | None`"),
    ({"sde_type": None}, "`str`"),
    ({"completion_stride": True}, "`int | str | None`"),
    ({"completion_stride": 1.5}, "`int | str | None`"),
    ({"completion_stride": [1, 2]}, "`int | str | None`"),
    ({"scale_rewards": True}, "`str`"),
    ({"step_weights": 1.0}, "`str`"),
    ({"step_weights": None}, "`str`"),
    ({"shuffle_dataset": "no"}, "`bool`"),
    ({"pipeline_kwargs": [("height", 512)]}, "`dict | str | None`"),
    ({"negative_prompt": ["dark"]}, "`str | None`"),
]


def case_ids(cases):
    return [", ".join(f"{name}={value!r}" for name, value in case[0].items()) for case in cases]


@pytest.mark.parametrize("arguments, name, remedy", CONFIGS, ids=case_ids(CONFIGS))
def test_config_value(tmp_path, arguments, name, remedy):
    with pytest.raises(ValueError) as info:
        config(tmp_path, **arguments)
    names(info.value, f"`{name}={arguments[name]!r}`", remedy)


@pytest.mark.parametrize("config_class", [DDPOConfig, TDPORConfig])
@pytest.mark.parametrize("arguments, name, remedy", DDPO_CONFIGS, ids=case_ids(DDPO_CONFIGS))
def test_ddpo_config_value(tmp_path, config_class, arguments, name, remedy):
    with pytest.raises(ValueError) as info:
        config(tmp_path, config_class, **arguments)
    names(info.value, f"`{name}={arguments[name]!r}`", remedy)


@pytest.mark.parametrize("arguments, name, remedy", TDPO_R_CONFIGS, ids=case_ids(TDPO_R_CONFIGS))
def test_tdpo_r_config_value(tmp_path, arguments, name, remedy):
    with pytest.raises(ValueError) as info:
        config(tmp_path, TDPORConfig, **arguments)
    names(info.value, f"`{name}={arguments[name]!r}`", remedy)


@pytest.mark.parametrize("arguments, expected", TYPES, ids=case_ids(TYPES))
def test_config_type(tmp_path, arguments, expected):
    with pytest.raises(TypeError) as info:
        config(tmp_path, **arguments)
    ((name, value),) = arguments.items()
    names(info.value, f"`{name}={value!r}` is a {type(value).__name__}", f"must be {expected}")


# Arguments of the trainer: what is given (functions are called when the test runs), and what the message says


def other_pipeline():
    class OtherPipeline(DiffusionPipeline):
        def __init__(self, transformer, scheduler):
            super().__init__()
            self.register_modules(transformer=transformer, scheduler=scheduler)

        def __call__(self, prompt):
            pass

    pipe = pipelines.stable_diffusion_3(t5=False)
    return OtherPipeline(pipe.transformer, pipe.scheduler)


def inverted():
    pipe = pipelines.stable_diffusion_3(t5=False)
    pipe.scheduler = type(pipe.scheduler)(invert_sigmas=True)
    return pipe


def unipc():
    pipe = pipelines.wan()
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return pipe


def with_adapter():
    pipe = pipelines.stable_diffusion_3(t5=False)
    pipe.transformer.add_adapter(lora(), adapter_name="style")
    return pipe


def needs_question(prompts, images, question, **columns):
    return [0.0] * len(images)


def takes_no_columns(prompts, images):
    return [0.0] * len(images)


def changed_later():
    args = config("out")
    args.generation_batch_size = 8
    return args


def iterable():
    return dataset().to_iterable_dataset()


TRAINERS = {
    "data set without prompts": (
        {"train_dataset": lambda: dataset().rename_column("prompt", "caption")},
        ValueError,
        ["`train_dataset` has the columns ['caption']", "no column `prompt`", "rename_column"],
    ),
    "empty data set": (
        {"train_dataset": lambda: dataset().select([])},
        ValueError,
        ["`train_dataset` is empty", "at least one row"],
    ),
    "list": ({"train_dataset": PROMPTS}, TypeError, ["`train_dataset`", "not list", "Dataset.from_list"]),
    "iterable data set": (
        {"train_dataset": iterable},
        TypeError,
        ["`train_dataset` is a streamed data set", "`IterableDataset`", "dataset.take(10_000)"],
    ),
    "number as prompt": (
        {"train_dataset": lambda: datasets.Dataset.from_dict({"prompt": [1, 2, 3, 4]})},
        TypeError,
        ["`train_dataset[0]['prompt']` is 1", "must be strings"],
    ),
    "missing prompt": (
        {"train_dataset": lambda: datasets.Dataset.from_dict({"prompt": [*PROMPTS, None]})},
        TypeError,
        ["`train_dataset[4]['prompt']` is None", "must be strings"],
    ),
    "conversation as prompt": (
        {"train_dataset": lambda: datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": "cat"}]] * 4})},
        TypeError,
        ["`train_dataset[0]['prompt']` is [{", "must be strings"],
    ),
    "column images": (
        {"train_dataset": lambda: dataset(images=range(4))},
        ValueError,
        ["`train_dataset`", "`images`", "rename it"],
    ),
    "column prompts": (
        {"train_dataset": lambda: dataset(prompts=range(4))},
        ValueError,
        ["`train_dataset`", "`prompts`", "rename it"],
    ),
    "too few prompts": (
        {"train_dataset": lambda: dataset().select(range(3))},
        ValueError,
        ["`train_dataset` has 3 prompts", "needs 4", "`generation_batch_size=16`", "add prompts"],
    ),
    "evaluation data set": (
        {"eval_dataset": lambda: {"one": dataset(), "two": PROMPTS}},
        TypeError,
        ["`eval_dataset['two']`", "not list", "Dataset.from_list"],
    ),
    "reward weights of another length": (
        {"args": lambda: config("out", reward_weights=[1.0, 2.0])},
        ValueError,
        ["`reward_weights=[1.0, 2.0]` has 2 entries", "['brightness']", "one weight for each"],
    ),
    "unknown reward": ({"reward_funcs": "orc"}, ValueError, ["'orc'", "'ocr'", "pass the function itself"]),
    "reward of another type": (
        {"reward_funcs": [brightness, 3]},
        TypeError,
        ["3, a int", "name of a built-in reward", "or a callable"],
    ),
    "no reward": ({"reward_funcs": []}, ValueError, ["`reward_funcs=[]`", "at least one"]),
    "two rewards of one name": (
        {"reward_funcs": [brightness, brightness]},
        ValueError,
        ["`reward_funcs`", "['brightness', 'brightness']", "`__name__`"],
    ),
    "reward without columns": (
        {"reward_funcs": takes_no_columns, "train_dataset": lambda: dataset(style=["oil"] * 4)},
        TypeError,
        ["`takes_no_columns`", "`train_dataset`", "'style'", "`**columns`"],
    ),
    "reward that needs another column": (
        {"reward_funcs": needs_question},
        TypeError,
        ["`needs_question`", "`train_dataset`", "'question'", "called by keyword"],
    ),
    "diffusion pipeline": (
        {"model": pipelines.stable_diffusion},
        ValueError,
        [
            "`model` has the scheduler DDIMScheduler",
            "FlowMatchEulerDiscreteScheduler(shift=",
            "DDPOTrainer or TDPORTrainer",
        ],
    ),
    "multi-step scheduler": (
        {"model": unipc},
        ValueError,
        [
            "`model` has the scheduler UniPCMultistepScheduler",
            "`pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)`",
        ],
    ),
    "denoiser": (
        {"model": lambda: pipelines.stable_diffusion_3().transformer},
        TypeError,
        ["`model` is a SD3Transformer2DModel", "the whole pipeline"],
    ),
    "no model": ({"model": None}, TypeError, ["`model` is a NoneType", "pass a Hub id"]),
    "folder that does not exist": ({"model": "/no/such/folder"}, ValueError, ["/no/such/folder", "valid local path"]),
    "unknown pipeline": (
        {"model": other_pipeline},
        ValueError,
        ["`pipe` (OtherPipeline) cannot be a policy", "does not take ['num_inference_steps', 'generator'"],
    ),
    "time that runs backwards": (
        {"model": inverted},
        ValueError,
        ["`model` (StableDiffusion3Pipeline) has a scheduler with `invert_sigmas`", "from 1 to 0"],
    ),
    "unknown argument of the pipeline": (
        {"args": lambda: config("out", pipeline_kwargs={"hight": 512})},
        ValueError,
        ["`hight=512`", "unknown to the pipeline", "Remove it"],
    ),
    "argument that the policy sets": (
        {"args": lambda: config("out", pipeline_kwargs={"latents": 0})},
        ValueError,
        ["`latents=0`", "set by the policy", "Remove it"],
    ),
    "target modules that match nothing": (
        {"peft_config": lora("to_nothing")},
        ValueError,
        ["`peft_config` does not fit SD3Transformer2DModel", "to_nothing", "check the target modules"],
    ),
    "second adapter": (
        {"model": with_adapter, "peft_config": lora()},
        ValueError,
        ["`peft_config`", "['style']", "leave `peft_config` out"],
    ),
    "other adapter": (
        {"peft_config": LoHaConfig(target_modules=["to_q"])},
        TypeError,
        ["`peft_config=LoHaConfig(", "pass a `LoraConfig`"],
    ),
    "adapter as dict": ({"peft_config": {"r": 4}}, TypeError, ["`peft_config={'r': 4}`", "pass a `LoraConfig`"]),
    "config of the parent": (
        {"args": lambda: config("out", FlowGRPOConfig)},
        TypeError,
        ["`args` must be a TPGRPOConfig, not FlowGRPOConfig"],
    ),
    "config of transformers": (
        {"args": lambda: TrainingArguments("out", use_cpu=True)},
        TypeError,
        ["`args` must be a TPGRPOConfig, not TrainingArguments"],
    ),
    "config changed afterwards": (
        {"args": changed_later},
        ValueError,
        ["`args.gradient_accumulation_steps=4`", "`args.generation_batch_size=8`", "do not change"],
    ),
    "upload of completions without a network": (
        {"args": lambda: config("out", log_completions=True, log_completions_hub_repo="user/logs")},
        OfflineModeIsEnabled,
        ["offline mode is enabled"],
    ),
    "evaluation without a data set": (
        {"args": lambda: config("out", eval_strategy="steps")},
        ValueError,
        ["`args.eval_strategy`", "STEPS", "pass an `eval_dataset`"],
    ),
}


def trainer(output_dir, trainer_class=TPGRPOTrainer, **arguments):
    defaults = {
        "model": lambda: pipelines.stable_diffusion_3(t5=False),
        "reward_funcs": [brightness],
        "args": lambda: config(output_dir),
        "train_dataset": dataset,
    }
    arguments = defaults | arguments
    for name in ("model", "args", "train_dataset", "eval_dataset"):
        if inspect.isfunction(arguments.get(name)):
            arguments[name] = arguments[name]()
    return trainer_class(**arguments)


@pytest.mark.parametrize("case", TRAINERS)
def test_trainer(tmp_path, monkeypatch, evaluations, case):
    monkeypatch.chdir(tmp_path)
    arguments, kind, words = TRAINERS[case]
    with pytest.raises(kind) as info:
        trainer(tmp_path, **arguments)
    names(info.value, *words)
    assert not evaluations


# The same for the trainers of diffusion pipelines


class Encoder:
    """Embeddings of images for a critic, as `returns` makes them of (B, 48) means of pixels."""

    def __init__(self, image_size=16, returns=lambda embeddings: embeddings):
        self.image_size, self.returns = image_size, returns

    def __call__(self, images):
        return self.returns(torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1))


class Judged:
    """A reward that looks at images with an encoder."""

    __name__ = "judged"

    def __init__(self, encoder):
        self.encoder = encoder

    def __call__(self, prompts, images, **columns):
        return brightness(prompts, images)


def tdpo_r(**arguments):
    return lambda: config("out", TDPORConfig, **arguments)


def ending_at_zero():
    pipe = pipelines.stable_diffusion()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=0)
    return pipe


def edm():
    pipe = pipelines.stable_diffusion()
    pipe.scheduler = EDMEulerScheduler()
    return pipe


def large_decoder():
    pipelines.stable_diffusion().vae.save_pretrained("vae")
    return config("out", TDPORConfig, critic_decoder="vae")


def tiny_decoder():
    """A folder with the decoder of another family."""
    AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=16,
    ).save_pretrained("decoder")
    return config("out", TDPORConfig, critic_decoder="decoder")


FLOW_PIPELINE = ["of a flow-matching pipeline", "with DDIM", "TPGRPOTrainer or FlowGRPOTrainer"]
EMBEDDINGS = ["`critic_encoder` made a tensor of shape", "finite embeddings, a tensor (B, d)"]
DDIM_TRAINERS = {
    "flow pipeline": (
        {"model": lambda: pipelines.stable_diffusion_3(t5=False)},
        ValueError,
        ["`model` has the scheduler FlowMatchEulerDiscreteScheduler", "TDPORTrainer", *FLOW_PIPELINE],
    ),
    "flow pipeline for DDPO": (
        {
            "trainer_class": DDPOTrainer,
            "model": lambda: pipelines.stable_diffusion_3(t5=False),
            "args": lambda: config("out", DDPOConfig),
        },
        ValueError,
        ["`model` has the scheduler FlowMatchEulerDiscreteScheduler", "DDPOTrainer", *FLOW_PIPELINE],
    ),
    "flow sigmas": ({"model": unipc}, ValueError, ["the scheduler UniPCMultistepScheduler", *FLOW_PIPELINE]),
    "last timestep without noise": (
        {"model": ending_at_zero},
        ValueError,
        [
            "`num_inference_steps=3` makes the timesteps 666 to 0",
            "a step from 0 has no noise",
            "timestep_spacing='trailing'",
        ],
    ),
    "last timestep without noise for DDPO": (
        {"trainer_class": DDPOTrainer, "model": ending_at_zero, "args": lambda: config("out", DDPOConfig)},
        ValueError,
        ["`num_inference_steps=3` makes the timesteps 666 to 0", "timestep_spacing='trailing'"],
    ),
    "timesteps over the whole range": (
        {"model": lambda: pipelines.stable_diffusion(timestep_spacing="linspace")},
        ValueError,
        ["makes the timesteps", "timestep_spacing='trailing'"],
    ),
    "more steps than the schedule has": (
        {"args": tdpo_r(num_inference_steps=1000)},
        ValueError,
        ["`num_inference_steps=1000` makes the timesteps 1000 to 1", "to 999", "use fewer steps"],
    ),
    "scheduler without betas": (
        {"model": edm},
        ValueError,
        ["`model` has the scheduler EDMEulerScheduler", "has no betas", "Stable Diffusion 1.x"],
    ),
    "autoencoder as decoder": (
        {"args": large_decoder},
        ValueError,
        ["`critic_decoder='vae'`", "a model of another class", "'madebyollin/taesd'"],
    ),
    "no embedding": (
        {"critic_encoder": Encoder(returns=lambda embeddings: None)},
        ValueError,
        ["`critic_encoder` made a NoneType", "finite embeddings"],
    ),
    "config of the parent": (
        {"args": lambda: config("out", DDPOConfig)},
        TypeError,
        ["`args` must be a TDPORConfig, not DDPOConfig"],
    ),
    "config of a flow model": (
        {"trainer_class": DDPOTrainer, "args": lambda: config("out", FlowGRPOConfig)},
        TypeError,
        ["`args` must be a DDPOConfig, not FlowGRPOConfig"],
    ),
    "encoder of other images than the reward's": (
        {"reward_funcs": Judged(Encoder(224)), "critic_encoder": Encoder(336)},
        ValueError,
        ["`critic_encoder` takes images of 336 pixels", "the reward function sees images of 224", "Leave"],
    ),
    "encoder that cannot be called": (
        {"critic_encoder": 3},
        ValueError,
        ["`critic_encoder=3` is not callable", "`args.critic_encoder`"],
    ),
    "name as encoder": (
        {"critic_encoder": "openai/clip-vit-large-patch14"},
        ValueError,
        ["`critic_encoder='openai/clip-vit-large-patch14'` is not callable", "a name as `args.critic_encoder`"],
    ),
    "two encoders": (
        {"critic_encoder": Encoder(), "args": tdpo_r(critic_encoder="some/clip")},
        ValueError,
        ["`args.critic_encoder='some/clip'` are both given", "leave one out"],
    ),
    "encoder that cannot be loaded": (
        {"critic_encoder": None, "args": tdpo_r(critic_encoder="/no/such/clip")},
        ValueError,
        ["/no/such/clip", "no CLIP can be loaded"],
    ),
    "one embedding for all images": (
        {"critic_encoder": Encoder(returns=lambda embeddings: embeddings[0])},
        ValueError,
        ["shape (48,)", *EMBEDDINGS],
    ),
    "embeddings of pixels": (
        {"critic_encoder": Encoder(returns=lambda embeddings: embeddings.unflatten(1, (3, 16)))},
        ValueError,
        ["shape (1, 3, 16)", *EMBEDDINGS],
    ),
    "embeddings that are not finite": (
        {"critic_encoder": Encoder(returns=lambda embeddings: embeddings * math.nan)},
        ValueError,
        ["shape (1, 48)", *EMBEDDINGS],
    ),
    "decoder that does not exist": (
        {"args": tdpo_r(critic_decoder="/no/such/decoder")},
        ValueError,
        ["`critic_decoder='/no/such/decoder'`", "'madebyollin/taesd'"],
    ),
    "decoder of another family": (
        {"args": tiny_decoder},
        ValueError,
        ["`critic_decoder='decoder'` decodes latents of 16 channels", "of `model` have 4"],
    ),
    "unknown reward out of domain": (
        {"args": tdpo_r(out_of_domain_rewards=["hps"])},
        ValueError,
        ["`out_of_domain_rewards=['hps']`", "neither a built-in reward", "`reward_funcs` (brightness)"],
    ),
    "all rewards out of domain": (
        {"args": tdpo_r(out_of_domain_rewards=["brightness"])},
        ValueError,
        ["`out_of_domain_rewards=['brightness']` leaves none of `reward_funcs`", "pass one that is not"],
    ),
    "weight for a reward out of domain": (
        {
            "reward_funcs": [brightness, "jpeg_compressibility"],
            "args": tdpo_r(out_of_domain_rewards=["jpeg_compressibility"], reward_weights=[1.0, 0.5]),
        },
        ValueError,
        ["`reward_weights=[1.0, 0.5]` has 2 entries", "the 1 reward functions ['brightness']", "one weight for each"],
    ),
}


def ddim_trainer(output_dir, trainer_class=TDPORTrainer, **arguments):
    defaults = {
        "model": pipelines.stable_diffusion,
        "args": lambda: config(output_dir, TDPORConfig if trainer_class is TDPORTrainer else DDPOConfig),
    }
    if trainer_class is TDPORTrainer:
        defaults["critic_encoder"] = Encoder()
    return trainer(output_dir, trainer_class, **(defaults | arguments))


@pytest.mark.parametrize("case", DDIM_TRAINERS)
def test_ddim_trainer(tmp_path, monkeypatch, evaluations, case):
    monkeypatch.chdir(tmp_path)
    arguments, kind, words = DDIM_TRAINERS[case]
    with pytest.raises(kind) as info:
        ddim_trainer(tmp_path, **arguments)
    names(info.value, *words)
    assert not evaluations


@pytest.mark.parametrize("trainer_class", [DDPOTrainer, TDPORTrainer])
@pytest.mark.parametrize("scheduler", [PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_of_diffusion_become_ddim(tmp_path, caplog, scheduler, trainer_class):
    pipe = pipelines.stable_diffusion()
    expected = pipe.scheduler
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    converted = ddim_trainer(tmp_path, trainer_class, model=pipe, peft_config=lora())
    assert f"The scheduler of `model`, {scheduler.__name__}, is replaced" in caplog.text
    for name in ("beta_start", "beta_end", "beta_schedule", "steps_offset", "clip_sample", "set_alpha_to_one"):
        assert converted.pipe.scheduler.config[name] == expected.config[name], name
    start = {name: weight.clone() for name, weight in converted._trained.items()}
    converted.train()
    assert converted.state.global_step == 1
    assert any(not torch.equal(weight, start[name]) for name, weight in converted._trained.items())


def test_ddim_pipeline_is_taken_without_a_warning(tmp_path, caplog):
    ddim_trainer(tmp_path, DDPOTrainer)
    assert "replaced" not in caplog.text


def test_flow_grpo_trainer_takes_the_config_of_a_child(tmp_path):
    assert trainer(tmp_path, FlowGRPOTrainer).args.credit == "consistent"


def test_a_pipeline_can_be_used_again_after_an_error(tmp_path):
    pipe = pipelines.stable_diffusion_3(t5=False)
    with pytest.raises(ValueError, match="does not fit"):
        trainer(tmp_path, model=pipe, peft_config=lora("to_nothing"))
    assert trainer(tmp_path, model=pipe, peft_config=lora()).is_lora


def test_missing_extra(tmp_path, monkeypatch, evaluations):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(MissingExtraError) as info:
        trainer(tmp_path, reward_funcs="ocr")
    assert isinstance(info.value, ImportError) and isinstance(info.value, ValueError)
    names(info.value, "OCR reward", "`rapidocr_onnxruntime`", 'pip install "flow-trl[ocr]"')
    assert not evaluations


@pytest.mark.parametrize("checkpoint", ["/no/such/folder", "a folder", True])
def test_resume_from_something_else(tmp_path, evaluations, checkpoint):
    if checkpoint == "a folder":
        (tmp_path / "notes").mkdir()
        checkpoint = str(tmp_path / "notes")
    with pytest.raises(ValueError) as info:
        trainer(tmp_path).train(resume_from_checkpoint=checkpoint)
    if checkpoint is True:
        names(info.value, "No valid checkpoint", str(tmp_path))
    else:
        names(info.value, f"`resume_from_checkpoint={checkpoint!r}`", "pass a `checkpoint-*` folder")
    assert not evaluations


def test_no_data_set(tmp_path, evaluations):
    without = trainer(tmp_path, train_dataset=None)
    with pytest.raises(ValueError, match="`train_dataset=None`.*needs a data set with a column `prompt`"):
        without.train()
    with pytest.raises(ValueError, match="`eval_dataset=None`: pass one"):
        without.evaluate()
    with pytest.raises(TypeError, match="`eval_dataset` must be a `datasets.Dataset`, not list"):
        without.evaluate(PROMPTS)
    assert not evaluations


# Reward functions that break while training

RETURNS = {
    "too few": (lambda images: [0.5] * (len(images) - 1), ValueError, ["returned 15 scores for 16 images"]),
    "none at all": (lambda images: None, TypeError, ["returned None, a NoneType", "16 images"]),
    "NaN": (lambda images: [0.5, math.nan, *[0.5] * 14], ValueError, ["nan for image 1 (prompt 'a ", "`None`"]),
    "infinity": (lambda images: np.array([math.inf] * 16), ValueError, ["inf for image 0 (prompt 'a ", "`None`"]),
    "a string": (lambda images: "0.5, 0.5 0.5 0.5", TypeError, ["returned '0.5, ", "a str", "16 images"]),
    "strings": (lambda images: [*[1] * 15, "good"], TypeError, ["'good', a str, for image 15 (prompt 'a "]),
    "one number": (lambda images: 0.5, TypeError, ["returned 0.5, a float", "one score for each of the 16 images"]),
    "one tensor": (lambda images: torch.tensor(0.5), TypeError, ["tensor(0.5", "16 images"]),
    "a dict": (lambda images: dict.fromkeys(range(16), 0.5), TypeError, ["a dict", "16 images"]),
    "nested": (lambda images: [[0.5]] * 16, TypeError, ["[0.5], a list, for image 0 (prompt 'a "]),
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("case", RETURNS)
def test_reward_function_returns(tmp_path, case, asynchronous):
    returns, kind, words = RETURNS[case]

    def judge(prompts, images, **columns):
        return returns(images)

    async def async_judge(prompts, images, **columns):
        return returns(images)

    reward_func = async_judge if asynchronous else judge
    with pytest.raises(kind) as info:
        trainer(tmp_path, reward_funcs=[brightness, reward_func]).train()
    names(info.value, f"`{reward_func.__name__}`", *words)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_reward_function_raises(tmp_path, asynchronous):
    def judge(prompts, images, **columns):
        raise ConnectionError("the judge is asleep")

    async def async_judge(prompts, images, **columns):
        raise ConnectionError("the judge is asleep")

    reward_func = async_judge if asynchronous else judge
    with pytest.raises(ConnectionError, match="the judge is asleep") as info:
        trainer(tmp_path, reward_funcs=[brightness, reward_func]).train()
    names(" ".join(info.value.__notes__), f"`{reward_func.__name__}`", "16 images", "prompt 'a ")


def test_the_last_checkpoint_survives_a_reward_function_that_breaks(tmp_path):
    generations = []

    def moody(prompts, images, **columns):
        generations.append(len(images))
        return [math.nan if broken and len(generations) > 1 else score for score in brightness(prompts, images)]

    def run(name, resume=None):
        args = config(tmp_path / name, FlowGRPOConfig, max_steps=4, save_steps=1, save_total_limit=2)
        started = trainer(tmp_path, FlowGRPOTrainer, reward_funcs=moody, args=args, peft_config=lora())
        try:
            started.train(resume_from_checkpoint=resume)
        finally:
            generations.clear()
        return {name: weight.clone() for name, weight in started._trained.items()}

    broken = False
    uninterrupted = run("uninterrupted")

    broken = True
    with pytest.raises(ValueError, match="`moody` returned nan for image 0 .prompt 'a "):
        run("interrupted")
    folder = tmp_path / "interrupted"
    # Updates 1 and 2 belong to the first generation; the second could not be scored
    assert sorted(path.name for path in folder.glob("*")) == ["_sampled", "checkpoint-1", "checkpoint-2"]
    pipe = pipelines.stable_diffusion_3(t5=False)
    pipe.load_lora_weights(folder / "checkpoint-2")
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}
    assert any(
        weight.any() for weight in load_file(folder / "checkpoint-2" / "pytorch_lora_weights.safetensors").values()
    )

    broken = False
    resumed = run("interrupted", resume=True)
    assert sorted(path.name for path in folder.glob("*")) == ["checkpoint-3", "checkpoint-4"]
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)


def test_conversion_to_ddim_does_not_clip_latents(tmp_path):
    """A scheduler that was made by hand says nothing of clipping, and DDIM's default is to clip."""
    pipe = pipelines.stable_diffusion()
    pipe.scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    config = ddim_trainer(tmp_path, DDPOTrainer, model=pipe).pipe.scheduler.config
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")


@pytest.mark.parametrize(
    "file, words",
    [
        ("running_moments.json", ["file `running_moments.json` is missing", "TDPORTrainer"]),
        ("critic.safetensors", ["file `critic.safetensors` is missing", "pass a `checkpoint-*` folder"]),
        (None, ["a critic of embeddings of 48 numbers", "`critic_encoder` makes 24", "use the encoder"]),
    ],
)
def test_resume_from_a_checkpoint_without_this_critic(tmp_path, file, words):
    saving = {"save_strategy": "steps", "save_steps": 1}
    ddim_trainer(tmp_path, args=lambda: config(tmp_path, TDPORConfig, **saving), peft_config=lora()).train()
    if file is not None:
        (tmp_path / "checkpoint-1" / file).unlink()
    half = Encoder(returns=lambda embeddings: embeddings[:, :24])
    args = config(tmp_path, TDPORConfig, max_steps=2)
    with pytest.raises(ValueError) as info:
        trainer = ddim_trainer(
            tmp_path, args=lambda: args, peft_config=lora(), critic_encoder=Encoder() if file else half
        )
        trainer.train(resume_from_checkpoint=True)
    names(info.value, *words)

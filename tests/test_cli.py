import json
import sys

import pytest

from flow_trl import tiny
from flow_trl.cli import TRAINERS, ImageArguments, Parser, TextArguments, load_problems, main


PLAIN = "--use_cpu --report_to none --save_strategy no --output_dir out".split()


def test_commands(capsys):
    main([])
    output = capsys.readouterr().out
    assert all(f"  {name} " in output for name in [*TRAINERS, "env"])
    with pytest.raises(SystemExit, match="no command 'ppo'"):
        main(["ppo"])
    capsys.readouterr()
    main(["env"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("- torch: ") for line in lines) and any("not installed" in line for line in lines)


@pytest.mark.parametrize("command", TRAINERS)
def test_help_is_short_and_help_all_is_not(command, capsys):
    outputs = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            main([command, flag])
        assert end.value.code == 0
        outputs.append(capsys.readouterr().out)
    short, full = outputs
    assert "--model_name_or_path" in short and "--output_dir" in short and "--help-all" in short
    assert "--adam_beta1" not in short and "--adam_beta1" in full and "--adam-beta1" not in full
    assert len(short) < 0.5 * len(full)
    own = {"tp_grpo": "--credit", "flow_grpo": "--noise_level", "tdpo_r": "--reset_neurons", "ddpo": "--eta"}
    assert own.get(command, "--baseline") in short


def test_what_is_missing_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["tp_grpo", "--dataset_name", "ocr"])
    assert "--model_name_or_path, --reward_funcs must be given" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument, remedy",
    [
        ("--learning_rat", "did you mean --learning_rate?"),
        ("--num_proceses=2", "--num_processes?"),
        ("-xyz", "--help-all"),
    ],
)
def test_an_argument_that_nobody_has_is_named(argument, remedy, capsys):
    with pytest.raises(SystemExit):
        main(["tp_grpo", argument, "3"])
    error = capsys.readouterr().err
    assert f"an argument {argument.partition('=')[0]};" in error and remedy in error


def test_a_file_of_arguments(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("dataset_name: ocr")
    for given in (["--config", str(tmp_path / "run.yaml")], [f"--config={tmp_path / 'run.yaml'}"]):
        with pytest.raises(SystemExit):
            main(["tp_grpo", *given])
        assert "error: --model_name_or_path, --reward_funcs must be given" in capsys.readouterr().err


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """A module in the folder in which the command is run."""
    (tmp_path / "my_rewards.py").write_text(
        "def darkness(prompts, images, **columns):\n"
        "    return [1 - image.convert('L').resize((1, 1)).getpixel((0, 0)) / 255 for image in images]\n"
        "from flow_trl.tasks import confidence_task\n"
        "def exact_task():\n    return confidence_task(correct='exact', format_weight=0.1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def test_pipeline(rewards, capsys):
    config = rewards / "run.yaml"
    config.write_text("max_steps: 1\nnum_generations: 4\ngeneration_batch_size: 8\nper_device_train_batch_size: 4\n")
    arguments = f"--config {config} --model_name_or_path {tiny.FLOW_FOLDER} --dataset_name animals --eval_size 4"
    arguments += " --reward_funcs my_rewards.darkness --num_inference_steps 2 --eval_num_inference_steps 1"
    arguments += ' --guidance_scale 1 --pipeline_kwargs {"max_sequence_length":0}'
    main(["tp_grpo", *arguments.split(), *PLAIN])
    assert "| darkness " in capsys.readouterr().out
    tiny.load_flow_pipeline().load_lora_weights(rewards / "out")


def test_language_model(rewards, capsys):
    rows = [{"problem": f"{a}*{a + 1}=?", "answer": a * (a + 1)} for a in range(11, 23)]
    (rewards / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = (
        f"--model_name_or_path {tiny.LANGUAGE_FOLDER} --dataset_name problems.jsonl --task my_rewards.exact_task"
    )
    arguments += " --max_steps 1 --num_generations 4 --per_device_train_batch_size 8 --max_completion_length 16"
    main(["blockwise_grpo", *arguments.split(), "--bf16", "False", "--logging_steps", "1", *PLAIN])
    assert "solution" in capsys.readouterr().out
    tiny.load_language_model(rewards / "out")


def test_problems_that_are_not_there():
    with pytest.raises(ValueError, match="`dataset_name='absent.jsonl'`: there is no such file"):
        load_problems(TextArguments(dataset_name="absent.jsonl"), task=None)


def test_dotted_paths_that_lead_nowhere(rewards):
    from flow_trl.rewards import get_reward_func

    sys.path.insert(0, str(rewards))
    for path, message in (("my_rewards.brightness", "cannot be imported"), ("my_rewards.__name__", "a str")):
        with pytest.raises(ValueError, match=message):
            get_reward_func(path)


def test_a_parser_of_one_class_reads_what_others_leave():
    parser = Parser(ImageArguments, add_help=False)
    arguments, rest = parser.parse_args_and_config(["--eval_size", "3", "--help-all"], return_remaining_strings=True)
    assert arguments.eval_size == 3 and rest == ["--help-all"]

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

from tests import two_processes
from tests.trainer.runs import relative, run


PARTS = {"fsdp2": 1 / 2, "deepspeed_zero2": 1, "deepspeed_zero3": 1 / 2}  # of the trained weights that a process holds
DEEPSPEED = [pytest.param(name, marks=pytest.mark.deepspeed) for name in ("deepspeed_zero2", "deepspeed_zero3")]
SAVING = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
EVALUATING = {"evaluate": True, "eval_strategy": "steps", "eval_steps": 1}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward"}
# Two updates to a generation. Half of the groups of each process train nothing.
LORA = {"shuffle_dataset": False, "easy": [0, 2, 4, 6], **SAVING}
FULL = {
    "full": True,
    "learning_rate": 1e-3,
    "max_grad_norm": 1e-3,
    "ema_decay": 0.5,
    "save": True,
    **SAVING,
    **EVALUATING,
    "save_steps": 3,
}
CRITIC = {
    "method": "tdpo_r",
    "learning_rate": 1e-3,
    "critic_learning_rate": 1e-2,
    "generation_batch_size": 8,
    **SAVING,
}


def launch(engine, folder, specs):
    """What both processes returned of each of the specs."""
    specs = {name: {"engine": engine, "output_dir": str(folder / name), **spec} for name, spec in specs.items()}
    return dict(zip(specs, two_processes.launch("engine_runs.py", list(specs.values()), folder), strict=True))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What one process makes of the runs, and its folder."""
    folder = tmp_path_factory.mktemp("one")
    specs = {"lora": LORA | EVALUATING | BEST, "full": FULL}
    return folder, {name: run({"output_dir": str(folder / name), **spec}) for name, spec in specs.items()}


@pytest.fixture(scope="module", params=["fsdp2", *DEEPSPEED])
def sharded(request, one_process, tmp_path_factory):
    """An engine, what two processes made of the runs on it, and their folder."""
    folder = tmp_path_factory.mktemp(request.param)
    other = {"FSDP_VERSION": "1", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}
    specs = {
        "lora": LORA | EVALUATING | BEST,
        "within": LORA | {"resume": str(folder / "lora" / "checkpoint-1")},
        "from_one_process": LORA | {"resume": str(one_process[0] / "lora" / "checkpoint-2")},
        "full": FULL,
        "copied": FULL | {"beta": 0.1, "refused": True},
        "other": LORA | {"environment": other, "refused": True},
    }
    return request.param, launch(request.param, folder, specs), folder


def tensors(folder, name="trained_weights"):
    return load_file(folder / "checkpoint-3" / f"{name}.safetensors")


def flat(values):
    return torch.cat([values[name].flatten() for name in sorted(values)])


def sizes(folder):
    """Bytes by file of a checkpoint, without what grows with the number of processes."""
    files = {path for path in (folder / "checkpoint-3").rglob("*") if path.suffix in (".pt", ".safetensors")}
    return {path.name: path.stat().st_size for path in files if not path.name.startswith("generation")}


@pytest.mark.parametrize("name", ["lora", "full"])
def test_trains_what_one_process_trains(sharded, one_process, name):
    engine, results, folder = sharded
    (first, second), expected = results[name], one_process[1][name]
    assert first["held"] == pytest.approx(PARTS[engine], rel=0.02)
    assert torch.equal(first["weights"], second["weights"])
    for kind, tolerance in {"weights": 1e-6, "averages": 1e-6, "change": 1e-4}.items():
        assert relative(first[kind], expected[kind]) < tolerance
    for entry, expected_entry in zip(first["history"], expected["history"], strict=True):
        assert entry == pytest.approx(expected_entry, rel=1e-4, abs=1e-5)


def test_checkpoints_are_those_of_one_process(sharded, one_process):
    engine, results, folder = sharded
    for name in ("lora", "full"):
        own, expected = sizes(folder / name), sizes(one_process[0] / name)
        assert own.keys() == expected.keys()
        for file in own:
            assert own[file] <= 1.01 * expected[file], file
    for name in ("trained_weights", "ema_weights", "pytorch_lora_weights"):
        own, expected = tensors(folder / "lora", name), tensors(one_process[0] / "lora", name)
        assert own.keys() == expected.keys()
        assert relative(flat(own), flat(expected)) < 1e-6, name
    best = load_file(f"{results['lora'][0]['best']}/trained_weights.safetensors")
    assert torch.equal(results["lora"][0]["weights"], flat(best))


def test_resumes_within_a_generation(sharded):
    folder = sharded[2]
    for name in ("trained_weights", "ema_weights", "pytorch_lora_weights"):
        assert torch.equal(flat(tensors(folder / "within", name)), flat(tensors(folder / "lora", name))), name
    metadata = []
    for name in ("within", "lora"):
        with safe_open(folder / name / "checkpoint-3" / "trained_weights.safetensors", "pt") as file:
            metadata.append(file.metadata())
    assert metadata[0] == metadata[1] and int(metadata[0]["total_nfe"]) > 0


def test_another_number_of_processes_goes_on(sharded, one_process, tmp_path):
    folder, expected = sharded[2], flat(tensors(one_process[0] / "lora"))
    assert relative(flat(tensors(folder / "from_one_process")), expected) < 1e-6
    run({"output_dir": str(tmp_path), **LORA, "resume": str(folder / "lora" / "checkpoint-2")})
    assert relative(flat(tensors(tmp_path)), expected) < 1e-6


def test_a_whole_pipeline_is_saved(sharded):
    saved = SD3Transformer2DModel.from_pretrained(sharded[2] / "full" / "transformer")
    result = sharded[1]["full"][0]
    assert torch.equal(flat(dict(saved.named_parameters())), result["averages"])
    assert relative(result["averages"], result["weights"]) > 1e-4


def test_what_cannot_work_is_refused(sharded):
    for name, part in {"copied": "`beta=0.1` with `peft_config=None`", "other": "is not supported: set `"}.items():
        assert all(part in message for message in sharded[1][name])


@pytest.mark.parametrize("engine", [pytest.param("fsdp2", marks=pytest.mark.slow), *DEEPSPEED])
def test_with_a_critic(tmp_path, engine):
    expected = run({"output_dir": str(tmp_path / "one"), **CRITIC})
    resumed = CRITIC | {"resume": str(tmp_path / "straight" / "checkpoint-1")}
    results = launch(engine, tmp_path, {"straight": CRITIC, "resumed": resumed})
    for name in ("weights", "critic", "critic_moments"):
        straight, *others = (result[name] for pair in results.values() for result in pair)
        assert all(torch.equal(other, straight) for other in others), name
        assert relative(straight, expected[name]) < 1e-5, name

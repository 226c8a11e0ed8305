# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl"]
#
# [tool.uv.sources]
# flow-trl = { path = "../..", editable = true }
# ///
"""
Chaos: training runs of the tiny world get signals at random times, in sampling, scoring, updating and saving, and go on in a
new process each time. At the end they must equal a run that nothing disturbed, bit for bit: weights, moving averages,
critic, running moments and all that was logged but times.

    OMP_NUM_THREADS=1 python examples/benchmarks/chaos.py --signals 20
"""

import json
import os
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import HfArgumentParser, TrainerCallback

from flow_trl import TDPORConfig, TDPORTrainer, TPGRPOConfig, TPGRPOTrainer, tiny


FILES = ("trained_weights.safetensors", "ema_weights.safetensors", "critic.safetensors", "critic_training.safetensors")
PHASES = {  # by the functions that were running, the innermost that is here
    "_save_checkpoint": "saving",
    "evaluate": "evaluating",
    "_advantages": "credit",
    "_scored": "sampling and scoring",
    "_generate": "between chunks and updates",
    "training_step": "updating",
    "_load_optimizer_and_scheduler": "loading",
    "train": "between phases",
}


@dataclass
class Arguments:
    """
    Arguments of the benchmark.

    Args:
        signals (`int`, *optional*, defaults to `20`):
            Number of signals of each kind, for each method and number of processes.
        kinds (`list[str]`, *optional*):
            Signals. By default `SIGTERM`, `SIGINT` and `SIGKILL`.
        methods (`list[str]`, *optional*):
            By default `tp_grpo` and `tdpo_r`.
        processes (`list[int]`, *optional*):
            Numbers of processes. By default 1 and 2. Every other signal goes to one of two processes only.
        updates (`int`, *optional*, defaults to `8`):
            Number of updates of a run.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the times.
    """

    signals: int = field(default=20, metadata={"help": "Number of signals of each kind."})
    kinds: list[str] = field(
        default_factory=lambda: ["SIGTERM", "SIGINT", "SIGKILL"], metadata={"help": "Which signals."}
    )
    methods: list[str] = field(default_factory=lambda: ["tp_grpo", "tdpo_r"], metadata={"help": "Which trainers."})
    processes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Numbers of processes."})
    updates: int = field(default=8, metadata={"help": "Number of updates of a run."})
    seed: int = field(default=0, metadata={"help": "Seed of the times at which signals are sent."})


def brightness(prompts, images, **columns):
    time.sleep(0.02)  # as a judge would
    return [np.asarray(image).mean() / 255 for image in images]


def pooled(images):
    return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


def make_trainer(method: str, folder: Path, updates: int, callback: TrainerCallback):
    arguments = {
        "num_inference_steps": 3, "num_generations": 2, "generation_batch_size": 8, "per_device_train_batch_size": 2,
        "per_device_rollout_batch_size": 2, "updates_per_generation": 2, "max_steps": updates, "learning_rate": 1e-2,
        "ema_decay": 0.9, "ema_update_steps": 1, "guidance_scale": 1.0, "save_strategy": "steps", "save_steps": 3,
        "eval_strategy": "steps", "eval_steps": 4, "eval_num_inference_steps": 2, "num_images_to_save": 0,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "check_pipeline": False,
    }  # fmt: skip
    if method == "tp_grpo":
        pipe, trainer_class, config = tiny.load_flow_pipeline(), TPGRPOTrainer, TPGRPOConfig
        arguments |= {"pipeline_kwargs": {"max_sequence_length": 0}, "beta": 0.01}
        more = {}
    else:
        pipe, trainer_class, config = tiny.load_diffusion_pipeline(), TDPORTrainer, TDPORConfig
        arguments |= {"updates_per_generation": 1, "reset_every": 1}
        more = {"critic_encoder": pooled}
    prompts = tiny.load_prompts("scenes", "train")
    return trainer_class(
        pipe,
        brightness,
        config(str(folder), **arguments),
        train_dataset=prompts.select(range(16)),
        eval_dataset=prompts.select(range(16, 20)),
        callbacks=[callback],
        peft_config=LoraConfig(r=4, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
        **more,
    )


class Began(TrainerCallback):
    """Says that the training has begun."""

    def __init__(self, pipe: int):
        self.pipe = pipe

    def on_train_begin(self, args, state, control, **kwargs):
        os.write(self.pipe, b"began\n")


def child(method: str, folder: Path, updates: int, rank: int, count: int, port: int, pipe: int) -> int:
    """Trains, from the newest checkpoint if there is one; the exit code of its process."""
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                       "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    os.dup2(os.open(folder.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    trainer = make_trainer(method, folder, updates, Began(pipe))
    note = trainer.preemption._note

    def noted(number, frame):
        place, names = frame, []
        while place is not None:
            names.append(place.f_code.co_name)
            place = place.f_back
        phase = next((PHASES[name] for name in names if name in PHASES), "elsewhere")
        os.write(pipe, f"{phase}\n".encode())
        note(number, frame)

    trainer.preemption._note = noted
    resume = any(folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resume)
    if rank == 0:
        (folder / "history.json").write_text(json.dumps(trainer.state.log_history))
    return 0


def start(*args) -> tuple[int, int]:
    """A process that runs `child`, and where it tells how it is going."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 99
    try:
        code = child(*args, writing)
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:  # after the training
        code = 128 + signal.SIGINT
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def lines(reading: int, seconds: float) -> list[str]:
    """What a process has told, within some seconds; nothing if it has ended."""
    ready = select.select([reading], [], [], seconds)[0]
    return os.read(reading, 4096).decode().split("\n")[:-1] if ready else []


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def episode(method, folder, updates, count, number=None, delay=0.0, only=None) -> tuple[list[int], list[str]]:
    """Starts a run or goes on with one, until it ends by itself or by a signal; exit codes, and where the signal fell."""
    port = free_port()
    started = [start(method, folder, updates, rank, count, port) for rank in range(count)]
    for _, reading in started:
        lines(reading, 300.0)  # the training begins
    if number is not None:
        time.sleep(delay)
        for rank, (pid, _) in enumerate(started):
            if only is None or only == rank or number == signal.SIGKILL:
                os.kill(pid, number)
    codes, until = [], time.monotonic() + 300
    for pid, _ in started:
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            time.sleep(0.02)
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
        codes.append(os.waitstatus_to_exitcode(ended[1]))
    phases = [line for _, reading in started for line in lines(reading, 0.0)]
    for _, reading in started:
        os.close(reading)
    return codes, phases


def outcome(folder: Path, updates: int) -> dict:
    """What a finished run has come to."""
    last = folder / f"checkpoint-{updates}"
    found = {name: load_file(last / name) for name in FILES if (last / name).exists()}
    found = {f"{name}/{key}": tensor for name, tensors in found.items() for key, tensor in tensors.items()}
    if (last / "running_moments.json").exists():
        found["moments"] = json.loads((last / "running_moments.json").read_text())
    # Times differ, and the last entry is about the last process
    found["history"] = [
        {name: value for name, value in entry.items() if "time" not in name and not name.startswith("train_")}
        for entry in json.loads((folder / "history.json").read_text())
    ]
    return found


def equal(a: dict, b: dict) -> bool:
    same = {
        k: torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a.keys() & b.keys()
    }
    different = [name for name, is_same in same.items() if not is_same]
    if different:
        print("different:", different)
    return a.keys() == b.keys() and not different


def main() -> int:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    rng, failed = random.Random(args.seed), 0
    print("| method | processes | signal | signals | runs | equal to the straight run | where the signals fell |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        for method in args.methods:
            for count in args.processes:
                folder = Path(place) / f"{method}-{count}"
                began = time.monotonic()
                codes, _ = episode(method, folder, args.updates, count)
                assert not any(codes), (Path(place) / "log.txt").read_text()[-3000:]
                seconds, straight = time.monotonic() - began, outcome(folder, args.updates)
                for kind in args.kinds:
                    number, sent, runs, same, fell = getattr(signal, kind), 0, 0, 0, Counter()
                    while sent < args.signals:
                        shutil.rmtree(folder)
                        runs += 1
                        while True:
                            if sent == args.signals:
                                codes, phases = episode(method, folder, args.updates, count)
                            else:
                                only = rng.randrange(count) if sent % 2 else None
                                delay = rng.uniform(0.0, seconds / 2)
                                codes, phases = episode(method, folder, args.updates, count, number, delay, only)
                            if not any(codes):
                                break
                            sent += 1
                            fell.update(
                                phases or ["killed" if number == signal.SIGKILL else "told by another process"]
                            )
                            if not set(codes) <= {128 + number, 128 + signal.SIGTERM, -number, 0}:
                                print(f"{kind}: exit codes {codes}\n{(Path(place) / 'log.txt').read_text()[-3000:]}")
                                failed += 1
                        same += equal(outcome(folder, args.updates), straight)
                    failed += runs - same
                    where = ", ".join(f"{name} {times}" for name, times in fell.most_common())
                    print(f"| {method} | {count} | {kind} | {sent} | {runs} | {same} | {where} |", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main() > 0)

"""What a training sends to each tracker, read back from where the tracker keeps it."""

import json
import struct
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.trainer.runs import PROMPTS, logged, make_trainer, prompts


def train(folder, tracker, **options):
    """A run with an evaluation after the second and last update; its trainer and the caption of its pictures."""
    trainer = make_trainer(
        folder / "run", evaluation=prompts(3), eval_strategy="steps", eval_steps=2, report_to=[tracker], **options
    )
    trainer.train()
    described = json.loads((folder / "run" / "images" / "eval-000002.json").read_text())
    assert [caption["prompt"] for caption in described["captions"]] == PROMPTS[:3]
    texts = [f"{caption['prompt']} (reward {caption['reward']:.3g})" for caption in described["captions"]]
    return trainer, texts


def assert_is_grid(path, folder):
    with Image.open(path) as sent, Image.open(folder / "run" / "images" / "eval-000002.png") as grid:
        assert sent.convert("RGB").tobytes() == grid.tobytes()


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, texts = train(tmp_path, "tensorboard")
    (folder,) = {path.parent for path in tmp_path.rglob("events*")}
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    assert [event.value for event in events.Scalars("train/reward")] == pytest.approx(logged(trainer, "reward"))
    assert [event.step for event in events.Scalars("eval/reward")] == [2]
    (picture,) = events.Images("images/eval")
    assert (picture.step, picture.width, picture.height) == (2, 48, 16)
    (tmp_path / "sent.png").write_bytes(picture.encoded_image_string)
    assert_is_grid(tmp_path / "sent.png", tmp_path)
    (caption,) = events.Tensors("images/eval/captions/text_summary")
    assert caption.tensor_proto.string_val[0].decode().split("  \n") == texts
    assert "num_layers" in events.Tensors("model_config/text_summary")[0].tensor_proto.string_val[0].decode()


def wandb_rows(path):
    """The history in an offline run's file: a LevelDB log of protocol buffers, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record, whole = wandb_internal_pb2.Record.FromString(whole), b""
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows


def test_wandb(tmp_path, monkeypatch):
    import wandb

    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    trainer, texts = train(tmp_path, "wandb")
    wandb.finish()
    (path,) = tmp_path.rglob("run-*.wandb")
    for _ in range(100):  # another process writes it
        rows = wandb_rows(path)
        if any("images/eval/path" in row for row in rows):
            break
        time.sleep(0.1)
    assert [row["train/reward"] for row in rows if "train/reward" in row] == pytest.approx(logged(trainer, "reward"))
    (picture,) = [row for row in rows if "images/eval/path" in row]
    assert picture["train/global_step"] == 2 and picture["images/eval/caption"].split("\n") == texts
    assert_is_grid(next(tmp_path.rglob(Path(picture["images/eval/path"]).name)), tmp_path)


def test_trackio(tmp_path, monkeypatch):
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    for module in ("trackio.utils", "trackio.media.media", "trackio.media.utils"):
        monkeypatch.setattr(f"{module}.MEDIA_DIR", tmp_path / "trackio" / "media", raising=False)
    trainer, texts = train(tmp_path, "trackio", project="flow", run_name="one")
    rows = SQLiteStorage.get_logs("flow", "one")
    assert [row["train/reward"] for row in rows if "train/reward" in row] == pytest.approx(logged(trainer, "reward"))
    (picture,) = [row for row in rows if "images/eval" in row]
    assert picture["train/global_step"] == 2 and picture["images/eval"]["caption"].split("\n") == texts
    assert_is_grid(next(tmp_path.rglob(Path(picture["images/eval"]["file_path"]).name)), tmp_path)


def test_mlflow(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path / 'mlruns'}")
    trainer, texts = train(tmp_path, "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    values = [metric.value for metric in client.get_metric_history(run.info.run_id, "reward")]
    assert values == pytest.approx(logged(trainer, "reward"))
    assert run.data.params["num_layers"] == "2"
    found = {path.name: path for path in (tmp_path / "mlruns").rglob("*") if path.is_file()}
    assert found["images_eval-000002.txt"].read_text().split("\n") == texts
    picture = next(path for name, path in found.items() if name.startswith("images_eval") and path.suffix == ".png")
    assert_is_grid(picture, tmp_path)

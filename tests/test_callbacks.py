import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments

from flow_trl.callbacks import EMACallback, LearningCurveCallback, log_image, save_image_grid


def parameters():
    return {"a": torch.nn.Parameter(torch.arange(3.0)), "b": torch.nn.Parameter(torch.ones(2, 2))}


def train(ema, updates, first=1):
    """Weights of update n are the first ones plus n squared."""
    for step in range(first, first + updates):
        with torch.no_grad():
            for parameter in ema.parameters.values():
                parameter += step**2 - (step - 1) ** 2
        ema.on_step_end(None, TrainerState(global_step=step), None)


def shadows(ema):
    return dict(zip(ema.parameters, ema.average.shadow_params, strict=True))


@pytest.mark.parametrize("update_steps", [1, 3])
def test_moving_average_in_closed_form(update_steps):
    decay, ema = 0.8, EMACallback(parameters(), decay=0.8, update_steps=update_steps)
    train(ema, 12)
    seen = [step**2 for step in range(update_steps, 13, update_steps)]
    average = sum((1 - decay) * decay ** (len(seen) - 1 - i) * value for i, value in enumerate(seen))
    for name, start in parameters().items():
        torch.testing.assert_close(shadows(ema)[name], start.detach() + average)


def test_applied_within_the_context_only():
    ema = EMACallback(parameters(), decay=0.5, update_steps=1)
    train(ema, 2)
    current = {name: parameter.detach().clone() for name, parameter in ema.parameters.items()}
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        for name, parameter in ema.parameters.items():
            assert torch.equal(parameter, shadows(ema)[name])
            assert not torch.equal(parameter, current[name])
        raise RuntimeError("inside")
    assert all(torch.equal(parameter, current[name]) for name, parameter in ema.parameters.items())


def test_average_goes_on_after_saving_and_loading(tmp_path):
    straight, stopped = (EMACallback(parameters(), decay=0.9, update_steps=2) for _ in range(2))
    train(straight, 7)
    train(stopped, 3)
    stopped.save(tmp_path / "ema.safetensors")
    resumed = EMACallback(parameters(), decay=0.9, update_steps=2)
    with torch.no_grad():
        for parameter in resumed.parameters.values():
            parameter += 9
    resumed.load(tmp_path / "ema.safetensors")
    train(resumed, 4, first=4)
    assert all(torch.equal(shadows(resumed)[name], value) for name, value in shadows(straight).items())


def tiles(count, size=(6, 4)):
    return [Image.new("RGB", size, (10 * i, 0, 0)) for i in range(count)]


@pytest.mark.parametrize("count, columns, rows", [(1, 1, 1), (7, 4, 2), (8, 4, 2), (3, 8, 1)])
def test_grid_is_filled_row_by_row(tmp_path, count, columns, rows):
    path = tmp_path / "deep" / "grid.png"
    save_image_grid(tiles(count), columns=columns, path=path)
    grid = np.asarray(Image.open(path))
    assert grid.shape == (4 * rows, 6 * columns, 3)
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        tile = grid[4 * row : 4 * row + 4, 6 * column : 6 * column + 6]
        assert (tile == ((10 * place, 0, 0) if place < count else 255)).all()


def test_grid_of_videos_has_their_first_frames(tmp_path):
    grid = save_image_grid([tiles(3), tiles(3)[::-1]], columns=2, path=tmp_path / "grid.png")
    assert [grid.getpixel((x, 0))[0] for x in (0, 6)] == [0, 20]


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_pictures_reach_the_tracker(monkeypatch, tracker):
    sent = []
    module = SimpleNamespace(log=sent.append, Image=lambda image: ("picture", image.size))
    monkeypatch.setitem(sys.modules, tracker, module)
    log_image(tiles(1)[0], "images/eval", 7, [tracker], [])
    assert sent == [{"images/eval": ("picture", (6, 4)), "train/global_step": 7}]


def test_pictures_reach_mlflow(monkeypatch):
    sent = []
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(log_image=lambda *args, **kwargs: sent.append(kwargs)))
    log_image(tiles(1)[0], "images/eval", 7, ["mlflow"], [])
    assert sent == [{"key": "images_eval", "step": 7}]


def test_unknown_tracker_is_told(caplog):
    log_image(tiles(1)[0], "images/eval", 7, ["swanlab"], [])
    assert "swanlab" in caplog.text


def test_pictures_reach_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    args = TrainingArguments(str(tmp_path), logging_dir=str(tmp_path / "logs"), report_to=[], use_cpu=True)
    callback.on_train_begin(args, TrainerState(), TrainerControl())
    log_image(tiles(1)[0], "images/eval", 7, ["tensorboard"], [callback])
    callback.tb_writer.flush()
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent), size_guidance={"images": 0})
    events.Reload()
    (event,) = events.Images("images/eval")
    assert (event.step, event.width, event.height) == (7, 6, 4)


def test_learning_curve(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    history = [{"eval_reward": 0.1, "eval_rewards/scene/mean": 0.1, "step": 0}]
    for step in (1, 2, 3):
        history.append({"reward": step / 10, "total_nfe": 50 * step, "total_reward_calls": 5 * step, "step": step})
    history.append({"eval_reward": 0.4, "eval_rewards/scene/mean": 0.4, "step": 3})
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append((self, args)))
    args = SimpleNamespace(output_dir=str(tmp_path))
    LearningCurveCallback().on_train_end(args, TrainerState(log_history=history), None)
    LearningCurveCallback().on_evaluate(args, TrainerState(), None)  # nothing to draw yet
    ((figure, (path,)),) = drawn
    assert path == tmp_path / "learning_curve.png"
    curves = [[line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes]
    for (training, held_out), unit in zip(curves, (1, 50, 5), strict=True):
        np.testing.assert_allclose(training, [[unit, 0.1], [2 * unit, 0.2], [3 * unit, 0.3]])
        np.testing.assert_allclose(held_out, [[0, 0.1], [3 * unit, 0.4]])
    monkeypatch.undo()
    LearningCurveCallback().on_train_end(args, TrainerState(log_history=history), None)
    assert Image.open(path).size == (1440, 432)

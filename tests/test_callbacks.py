from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import TrainerControl, TrainerState

from flow_trl.callbacks import (
    EMACallback,
    LearningCurveCallback,
    OverOptimizationCallback,
    cross_reward_figure,
    reward_table,
    save_before_and_after,
)
from flow_trl.pictures import save_image_grid


def parameters():
    return {"a": torch.nn.Parameter(torch.arange(3.0)), "b": torch.nn.Parameter(torch.ones(2, 2))}


def train(ema, updates, first=1):
    """Weights of update n are the first ones plus n squared."""
    for step in range(first, first + updates):
        with torch.no_grad():
            for parameter in ema.parameters.values():
                parameter += step**2 - (step - 1) ** 2
        ema.on_step_end(None, TrainerState(global_step=step), None)


@pytest.mark.parametrize("update_steps", [1, 3])
def test_moving_average_in_closed_form(update_steps):
    decay, ema = 0.8, EMACallback(parameters(), decay=0.8, update_steps=update_steps)
    train(ema, 12)
    seen = [step**2 for step in range(update_steps, 13, update_steps)]
    average = sum((1 - decay) * decay ** (len(seen) - 1 - i) * value for i, value in enumerate(seen))
    for name, start in parameters().items():
        torch.testing.assert_close(ema.averages[name], start.detach() + average)


def test_applied_within_the_context_only():
    ema = EMACallback(parameters(), decay=0.5, update_steps=1)
    train(ema, 2)
    current = {name: parameter.detach().clone() for name, parameter in ema.parameters.items()}
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        for name, parameter in ema.parameters.items():
            assert torch.equal(parameter, ema.averages[name])
            assert not torch.equal(parameter, current[name])
        raise RuntimeError("inside")
    assert all(torch.equal(parameter, current[name]) for name, parameter in ema.parameters.items())


def test_average_goes_on_after_saving_and_loading(tmp_path):
    straight, stopped = (EMACallback(parameters(), decay=0.9, update_steps=2) for _ in range(2))
    train(straight, 7)
    train(stopped, 3)
    save_file(stopped.averages, tmp_path / "ema.safetensors")
    resumed = EMACallback(parameters(), decay=0.9, update_steps=2)
    with torch.no_grad():
        for parameter in resumed.parameters.values():
            parameter += 9
    resumed.load(tmp_path / "ema.safetensors")
    train(resumed, 4, first=4)
    assert all(torch.equal(resumed.averages[name], value) for name, value in straight.averages.items())


@pytest.fixture
def drawn(monkeypatch):
    """Figures that are to be saved, and where; they are not."""
    figures = pytest.importorskip("matplotlib.figure")
    saved = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, path, **kwargs: saved.append((self, path)))
    return saved


def test_learning_curve(tmp_path, monkeypatch, drawn):
    strict = {0: 0.0, 3: 0.2}
    history = [evaluation(0, 0.1, strict=strict[0])]
    for step in (1, 2, 3):
        history.append({"reward": step / 10, "total_nfe": 50 * step, "total_reward_calls": 5 * step, "step": step})
    history.append(evaluation(3, 0.4, strict=strict[3]))
    args = SimpleNamespace(output_dir=str(tmp_path))
    LearningCurveCallback().on_train_end(args, TrainerState(log_history=history), None)
    LearningCurveCallback().on_evaluate(args, TrainerState(), None)  # nothing to draw yet
    ((figure, path),) = drawn
    assert path == tmp_path / "learning_curve.png"
    # "trained" is the reward itself, so it has no panel of its own
    assert [axes.get_title() for axes in figure.axes] == ["trained reward", "strict"]
    (training, held_out, *_), (watched, *_) = [
        [line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes
    ]
    np.testing.assert_allclose(training, [[1, 0.1], [2, 0.2], [3, 0.3]])
    np.testing.assert_allclose(held_out, [[0, 0.1], [3, 0.4]])
    np.testing.assert_allclose(watched, [[0, 0.0], [3, 0.2]])
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["training images, sampled with noise", "held out, without noise"]
    assert figure.get_supxlabel() == "3 updates took 150 denoiser evaluations, 15 scored images"
    monkeypatch.undo()
    LearningCurveCallback().on_train_end(args, TrainerState(log_history=history), None)
    assert Image.open(path).size == (1056, 432)


def test_learning_curve_leaves_out_what_is_out_of_domain(tmp_path, drawn):
    history = [{"reward": 0.2, "total_nfe": 50, "total_reward_calls": 5, "step": 1}, evaluation(1, 0.3, hps=70.0)]
    for names in (["hps"], None):
        args = SimpleNamespace(output_dir=str(tmp_path), out_of_domain_rewards=names)
        LearningCurveCallback().on_evaluate(args, TrainerState(log_history=history), None)
    titles = [[axes.get_title() for axes in figure.axes] for figure, _ in drawn]
    assert titles == [["trained reward"], ["trained reward", "hps"]]


@pytest.mark.parametrize("count", [3, 10])
def test_before_and_after(tmp_path, drawn, count):
    """Each image is cut out of its grid, scored, and marked as right, wrong or with its score."""
    for step, base in ((0, 0), (2, 100), (7, 200)):
        images = [Image.new("RGB", (4, 4), (base + i, 0, 0)) for i in range(count)]
        path = tmp_path / "images" / f"eval-{step:06d}.png"
        captions = [{"prompt": f"a photo of {i} things", "reward": step + i / 100} for i in range(count)]
        save_image_grid(images, min(8, count), path, captions)
    seen = []

    def score(images):
        seen.append([image.getpixel((3, 3))[0] for image in images])
        return [[0.0, 1.0, 0.25][i % 3] for i in range(len(images))]

    save_before_and_after(tmp_path, score)
    save_before_and_after(tmp_path, until=6)
    assert seen == [list(range(count)), list(range(200, 200 + count))]
    marks = [[axes.get_xlabel() for axes in figure.axes if axes.images] for figure, _ in drawn]
    first = drawn[0][0].axes
    # Rows of panels: before and after of the first eight, then of the others
    blocks = [range(first, min(first + 8, count)) for first in range(0, count, 8)]
    assert marks[0] == [["wrong", "right", "0.25"][i % 3] for block in blocks for _ in range(2) for i in block]
    assert marks[1] == [f"{step + i / 100:.3g}" for block in blocks for step in (0, 2) for i in block]
    shown = [axes.images[0].get_array()[0, 0, 0] for axes in first if axes.images]
    assert shown == [base + i for block in blocks for base in (0, 200) for i in block]
    titles = [axes.get_title() for axes in first if axes.get_title()]
    assert titles == [f"{i} things" for i in range(count)]


def evaluation(step, reward, **others):
    """An entry of `log_history`; `others` are rewards that are not trained, each with a standard error of a tenth."""
    entry = {"eval_reward": reward, "eval_reward_se": 0.01, "eval_rewards/trained/mean": reward, "step": step}
    for name, value in others.items():
        entry |= {f"eval_rewards/{name}/mean": value, f"eval_rewards/{name}/se": abs(value) / 10}
    return entry


def test_table_of_rewards_has_what_was_evaluated_before_and_after():
    first, last = (
        evaluation(0, 0.5, hps=1.0),
        evaluation(4, 0.75, hps=2.0, late=0.5),
    )  # `late` applied to no image at first
    for entry in (first, last):
        entry["eval_rewards/trained/se"] = 0.1
    rows = [line.strip("| ").split() for line in reward_table([first, {"reward": 1.0}, last]).splitlines()[2:]]
    assert [(row[0], *row[2::2]) for row in rows] == [
        ("trained", "0.500", "0.750", "+0.250", "+1.8"),
        ("hps", "1.000", "2.000", "+1.000", "+4.5"),
    ]


def over_optimize(tmp_path, entries, names=("hps",), stop_after_fall=None, history=()):
    """Evaluates `entries` after `history`; returns the state, the control and the metrics of each evaluation."""
    pytest.importorskip("matplotlib")
    args = SimpleNamespace(output_dir=str(tmp_path), out_of_domain_rewards=list(names))
    state, control, callback = TrainerState(), TrainerControl(), OverOptimizationCallback(stop_after_fall)
    state.log_history = list(history)
    callback.on_train_begin(args, state, control)
    seen = []
    for entry in entries:
        state.log_history.append(dict(entry))
        seen.append({name: value for name, value in entry.items() if name != "step"})
        callback.on_evaluate(args, state, control, metrics=seen[-1])
    return state, control, seen


def drawn_points(axes):
    return [line.get_xydata().tolist() for line in axes.lines]


def test_cross_reward_figure_has_a_panel_for_each_reward_and_a_colour_for_each_method():
    pytest.importorskip("matplotlib")
    first = [
        evaluation(0, 1.0, hps=0.5, pick=-2.0),
        {"reward": 9.0, "step": 5},
        evaluation(10, 2.0, hps=0.4, pick=-1.0),
    ]
    first += [{"eval_other_reward": 9.0, "eval_rewards/hps/mean": 9.0, "step": 10}, evaluation(20, 1.5, hps=0.2)]
    figure = cross_reward_figure({"a": [first], "b": [[evaluation(3, 1.0, pick=-3.0)]] * 2}, ["hps", "pick"])
    hps, pick = figure.axes
    assert drawn_points(hps) == [[[1.0, 0.5], [2.0, 0.4], [1.5, 0.2]], [], []]
    assert drawn_points(pick) == [[[1.0, -2.0], [2.0, -1.0]], [[1.0, -3.0]], [[1.0, -3.0]]]
    for axes in figure.axes:
        assert [line.get_color() for line in axes.lines] == ["C0", "C1", "C1"]
    assert [text.get_text() for text in hps.texts] == ["0", "20"]
    assert [(text.get_text(), text.xy) for text in pick.texts] == [
        ("0", (1.0, -2.0)),
        ("10", (2.0, -1.0)),
        ("3", (1.0, -3.0)),
        ("3", (1.0, -3.0)),
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    bars = hps.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(bars, [[[x, 0.9 * y], [x, 1.1 * y]] for x, y in drawn_points(hps)[0]])


def test_cross_reward_figure_without_standard_errors(tmp_path):
    pytest.importorskip("matplotlib")
    history = [{"eval_reward": x, "eval_rewards/hps/mean": 1 - x, "step": x} for x in (0, 1)]
    figure = cross_reward_figure({"a": [history]}, ["hps"])
    figure.savefig(tmp_path / "figure.png", dpi=50)
    assert drawn_points(figure.axes[0]) == [[[0, 1], [1, 0]]]


def test_over_optimization_is_logged_and_drawn(tmp_path):
    entries = [evaluation(0, 1.0, hps=0.5, pick=-2.0), evaluation(4, 2.0, hps=0.8, pick=-3.0)]
    entries += [evaluation(8, 3.0, hps=0.6, pick=-1.0), evaluation(12, 4.0, hps=0.2)]
    state, control, seen = over_optimize(tmp_path, entries, names=["hps", "pick"])
    falls = [{name.split("/")[1]: metrics[name] for name in metrics if "over" in name} for metrics in seen]
    assert falls[0] == {"hps": 0, "pick": 0}
    assert falls[1] == pytest.approx({"hps": 0, "pick": 0.5})
    assert falls[2] == pytest.approx({"hps": 0.25, "pick": 0})
    assert falls[3] == pytest.approx({"hps": 0.75})  # the other one was not scored
    for metrics, entry in zip(seen, state.log_history, strict=True):
        assert entry.items() >= metrics.items()
    assert not control.should_training_stop
    assert Image.open(tmp_path / "over_optimization.png").size == (1008, 432)


def test_over_optimization_of_a_best_value_of_zero_is_zero(tmp_path):
    _, control, seen = over_optimize(
        tmp_path, [evaluation(0, 1.0, hps=0.0), evaluation(1, 2.0, hps=-5.0)], stop_after_fall=0.1
    )
    assert seen[-1]["eval_over_optimization/hps"] == 0
    assert not control.should_training_stop


def test_over_optimization_is_drawn_on_the_main_process_alone(tmp_path):
    pytest.importorskip("matplotlib")
    state = TrainerState(is_world_process_zero=False, log_history=[evaluation(0, 1.0, hps=0.5)])
    args, metrics = SimpleNamespace(output_dir=str(tmp_path), out_of_domain_rewards=["hps"]), {"eval_reward": 1.0}
    OverOptimizationCallback().on_evaluate(args, state, TrainerControl(), metrics=metrics)
    assert metrics["eval_over_optimization/hps"] == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rewards", "others", "stops"),
    [
        ([1, 2, 3], [0.5, 0.8, 0.72], True),  # by a tenth
        ([1, 2, 3], [0.5, 0.8, 0.73], False),
        ([1, 2, 2], [0.5, 0.8, 0.4], True),  # the trained reward is as high as at the best
        ([1, 2, 1.9], [0.5, 0.8, 0.4], False),  # both fell
        ([1, 3, 2], [0.8, 0.79, 0.4], True),  # the trained reward fell as well, but is above that at the best
        ([1, 2, 3], [-0.5, -0.4, -0.5], True),
        ([1, 2, 3], [0.5, 0.6, 0.7], False),
        ([1], [0.5], False),
    ],
)
def test_stops_where_a_reward_falls_while_the_trained_one_does_not(tmp_path, caplog, rewards, others, stops):
    entries = [
        evaluation(step, reward, hps=other, steady=1.0)
        for step, (reward, other) in enumerate(zip(rewards, others, strict=True))
    ]
    _, control, _ = over_optimize(tmp_path, entries, names=["steady", "hps"], stop_after_fall=0.0999)
    assert control.should_training_stop == stops
    assert ("'hps'" in caplog.text) == stops
    if stops:
        assert "at step 2" in caplog.text and "since step" in caplog.text and "'steady'" not in caplog.text


def test_a_resumed_run_goes_on_with_the_best_so_far(tmp_path):
    entries = [evaluation(0, 1.0, hps=0.5), evaluation(4, 2.0, hps=0.8), evaluation(8, 3.0, hps=0.6)]
    straight, control, _ = over_optimize(tmp_path, entries, stop_after_fall=0.2)
    stopped, _, _ = over_optimize(tmp_path, entries[:2], stop_after_fall=0.2)
    stopped.save_to_json(tmp_path / "trainer_state.json")
    history = TrainerState.load_from_json(tmp_path / "trainer_state.json").log_history
    resumed, resumed_control, _ = over_optimize(tmp_path, entries[2:], stop_after_fall=0.2, history=history)
    assert resumed.log_history == straight.log_history
    assert control.should_training_stop and resumed_control.should_training_stop


def test_evaluations_of_other_data_sets_are_ignored(tmp_path):
    pytest.importorskip("matplotlib")
    args = SimpleNamespace(output_dir=str(tmp_path), out_of_domain_rewards=["hps"])
    metrics = {"eval_drawn_reward": 1.0, "eval_drawn_rewards/hps/mean": 0.5}
    state = TrainerState(log_history=[metrics | {"step": 0}])
    OverOptimizationCallback().on_evaluate(args, state, TrainerControl(), metrics=metrics)
    assert len(metrics) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_over_optimization_needs_a_share(share):
    with pytest.raises(ValueError, match=f"`stop_after_fall={share}`"):
        OverOptimizationCallback(stop_after_fall=share)


@pytest.mark.parametrize("fields", [{}, {"out_of_domain_rewards": None}, {"out_of_domain_rewards": []}])
def test_over_optimization_needs_rewards_that_are_not_trained(fields):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="`out_of_domain_rewards=.*Set it in the config"):
        OverOptimizationCallback().on_train_begin(SimpleNamespace(**fields), TrainerState(), TrainerControl())

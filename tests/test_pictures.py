import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from flow_trl.pictures import log_image, read_grid, save_image_grid


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


def test_grid_of_videos_has_strips_of_frames_and_moves_beside_it(tmp_path):
    path, captions = tmp_path / "grid.png", [{"prompt": "brighter"}, {"prompt": "darker"}]
    grid = save_image_grid([tiles(7), tiles(7)[::-1]], columns=8, path=path, captions=captions)
    assert grid.size == (2 * 4 * 6, 4)
    assert [grid.getpixel((x, 0))[0] for x in range(0, 48, 6)] == [0, 20, 40, 60, 60, 40, 20, 0]
    with Image.open(tmp_path / "grid.gif") as moving:
        assert (moving.size, moving.n_frames) == ((8 * 6, 4), 7)
        for frame in range(7):
            moving.seek(frame)
            assert [moving.convert("RGB").getpixel((x, 0))[0] for x in (0, 6)] == [10 * frame, 60 - 10 * frame]
    for place, (strip, caption) in enumerate(read_grid(path)):
        assert strip.tobytes() == grid.crop((24 * place, 0, 24 * place + 24, 4)).tobytes()
        assert caption == captions[place]
    assert save_image_grid([tiles(2)] * 3, columns=2, path=tmp_path / "grid.png").size == (2 * 6, 3 * 4)


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_pictures_reach_the_tracker(monkeypatch, tracker):
    sent = []
    module = SimpleNamespace(
        log=sent.append,
        Image=lambda image, caption: ("picture", image.size, caption),
        Video=lambda path, format: ("video", path, format),
    )
    monkeypatch.setitem(sys.modules, tracker, module)
    log_image(tiles(1)[0], "images/eval", 7, [tracker], [], ["a circle", "a square"])
    log_image(tiles(1)[0], "images/eval", 8, [tracker], [], video=Path("eval.gif"))
    assert sent == [
        {"images/eval": ("picture", (6, 4), "a circle\na square"), "train/global_step": 7},
        {"images/eval": ("video", "eval.gif", "gif"), "train/global_step": 8},
    ]


def test_unknown_tracker_is_told(caplog):
    log_image(tiles(1)[0], "images/eval", 7, ["swanlab"], [])
    assert "swanlab" in caplog.text

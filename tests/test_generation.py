import os

import pytest
import torch

from flow_trl.generation import Chunk, Generation, SampledChunks, Stopwatch, split
from flow_trl.policy import Schedule
from flow_trl.rollout import Trajectory


def trajectory(count, seed=0, sigmas=True):
    torch.manual_seed(seed)
    schedule = Schedule(torch.tensor([900.0, 500.0, 100.0]), torch.tensor([0.9, 0.5, 0.1, 0.0]) if sigmas else None)
    return Trajectory(
        torch.randn(count, 3, 4, 2, 2), torch.randn(count, 2), torch.randn(3, count, 4, 2, 2), schedule, range(1, 3)
    )


def test_chunks_cover_all_rows_in_order():
    chunks = split(list(range(10, 24)), 6)
    assert chunks == [(0, [10, 11, 12, 13, 14, 15]), (6, [16, 17, 18, 19, 20, 21]), (12, [22, 23])]


@pytest.mark.parametrize("sigmas", [True, False])
def test_sampled_chunks_come_back(tmp_path, sigmas):
    chunk, saved = Chunk(6, [3, 3, 4]), trajectory(3, sigmas=sigmas)
    store = SampledChunks(tmp_path, 0, "key")
    assert store.load(chunk) is None
    store.save(chunk, saved, 55)
    loaded, evaluations = SampledChunks(tmp_path, 0, "key").load(chunk)
    assert evaluations == 55 and loaded.steps == range(1, 3)
    for name in ("latents", "log_probs", "finals"):
        assert torch.equal(getattr(loaded, name), getattr(saved, name))
    assert torch.equal(loaded.schedule.timesteps, saved.schedule.timesteps)
    assert torch.equal(loaded.schedule.sigmas, saved.schedule.sigmas) if sigmas else loaded.schedule.sigmas is None


def test_sampled_chunks_of_others_do_not(tmp_path):
    chunk = Chunk(6, [3, 3, 4])
    SampledChunks(tmp_path, 0, "key").save(chunk, trajectory(3), 55)
    assert SampledChunks(tmp_path, 0, "other weights").load(chunk) is None
    assert SampledChunks(tmp_path, 1, "key").load(chunk) is None
    assert SampledChunks(tmp_path, 0, "key").load(Chunk(6, [3, 4, 4])) is None
    assert SampledChunks(tmp_path, 0, "key").load(Chunk(0, [3, 3, 4])) is None


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_damaged_chunk_is_sampled_again(tmp_path, size):
    store, chunk = SampledChunks(tmp_path, 0, "key"), Chunk(0, [1])
    store.save(chunk, trajectory(1), 10)
    (path,) = (tmp_path / "_sampled").iterdir()
    os.truncate(path, path.stat().st_size - 1 if size < 0 else size)
    assert store.load(chunk) is None


def test_each_process_clears_its_own_chunks(tmp_path):
    stores = [SampledChunks(tmp_path, process, "key") for process in (0, 1)]
    for store in stores:
        store.save(Chunk(0, [1]), trajectory(1), 10)
    stores[0].clear()
    assert stores[1].load(Chunk(0, [1])) is not None and stores[0].load(Chunk(0, [1])) is None
    stores[1].clear()
    assert not (tmp_path / "_sampled").exists()
    stores[1].clear()


def test_processes_clear_their_chunks_at_the_same_time(tmp_path, monkeypatch):
    store, other = (SampledChunks(tmp_path, process, "key") for process in (0, 1))
    for one in (store, other):
        one.save(Chunk(0, [1]), trajectory(1), 10)
    remove = os.remove

    def remove_while_the_other_does(path):
        remove(path)
        monkeypatch.setattr(os, "remove", remove)
        other.clear()

    monkeypatch.setattr(os, "remove", remove_while_the_other_does)
    store.clear()
    assert not (tmp_path / "_sampled").exists()


def test_trajectories_of_chunks_are_those_of_the_whole():
    whole = trajectory(5)
    first, last = (
        Trajectory(whole.latents[part], whole.log_probs[part], whole.finals[:, part], whole.schedule, whole.steps)
        for part in (slice(3), slice(3, None))
    )
    joined = Trajectory.join([first, last])
    for name in ("latents", "log_probs", "finals"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))


def test_updates_are_of_the_same_images_whatever_the_processes():
    """12 images in groups of 3, the second group without an advantage, in two updates."""
    advantages = torch.arange(1.0, 13)[:, None].repeat(1, 2)
    advantages[3:6] = 0
    options = {"num_generations": 3, "updates": 2}
    alone = Generation.make(list(range(12)), trajectory(12), advantages, **options, process_index=0)
    parts = [
        Generation.make(list(range(i, i + 6)), trajectory(6), advantages, **options, process_index=i // 6)
        for i in (0, 6)
    ]
    for update in range(2):
        together = sorted([*parts[0].order[update].tolist(), *(parts[1].order[update] + 6).tolist()])
        assert together == sorted(alone.order[update].tolist()) == list(range(update, 12, 2))
    assert torch.equal(torch.cat([part.weights for part in parts]), alone.weights)
    assert torch.equal(torch.cat([part.advantages for part in parts]), alone.advantages)
    assert alone.weights[3:6].tolist() == [0.0] * 3
    assert alone.skipped.tolist() == [1, 2]  # images 4; 3 and 5
    assert [part.skipped.tolist() for part in parts] == [[0, 0]] * 2  # the second process has none to skip


def test_a_micro_batch_has_what_belongs_to_its_images():
    advantages = torch.randn(6, 2)
    whole = trajectory(6)
    generation = Generation.make(list(range(6)), whole, advantages, num_generations=3, updates=1, process_index=0)
    batch = generation.micro_batch(torch.tensor([4, 1]), 1, torch.device("cpu"))
    assert torch.equal(batch.latents, whole.latents[[4, 1], 1])
    assert torch.equal(batch.next_latents, whole.latents[[4, 1], 2])
    assert torch.equal(batch.log_probs, whole.log_probs[[4, 1], 1])
    assert torch.equal(batch.advantages, advantages[[4, 1], 1])
    assert batch.weights.tolist() == [1.0, 1.0]


def test_stopwatch_adds_up_also_after_an_error():
    stopwatch = Stopwatch()
    with stopwatch("a"), stopwatch("b"):
        pass
    first = stopwatch["a"]
    with pytest.raises(KeyError), stopwatch("a"):
        raise KeyError
    assert stopwatch["a"] > first >= stopwatch["b"] > 0 == stopwatch["c"]

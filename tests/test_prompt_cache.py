import pytest
import torch
from torch.utils._pytree import tree_leaves

from flow_trl.policy import PipelinePolicy
from flow_trl.prompt_cache import PromptCache
from tests import pipelines


PROMPTS = ["a red circle", "two small blue squares", "a cat", "a dog with a house"]


def assert_same(conditioning, other, **tolerance):
    """Whether two conditionings have the same tensors."""
    for batch, expected in zip(conditioning.batches, other.batches, strict=True):
        assert [name for name, _ in batch.recorded] == [name for name, _ in expected.recorded]
        for values in zip(tensors(batch.recorded), tensors(expected.recorded), strict=True):
            torch.testing.assert_close(*values, **tolerance)


def tensors(recorded):
    found = [value for value in tree_leaves(recorded) if isinstance(value, torch.Tensor)]
    assert found
    return found


@pytest.fixture(params=["stable_diffusion_3", "flux", "qwen_image", "stable_diffusion_xl", "wan"])
def policy(request):
    kwargs = {"height": 16, "width": 16}
    return PipelinePolicy(getattr(pipelines, request.param)(), guidance_scale=2.0, negative_prompt="blurry", **kwargs)


def test_embeddings_are_those_of_the_pipeline(policy):
    expected, cached = policy.encode(PROMPTS), PromptCache(policy).encode(PROMPTS)
    assert_same(cached, expected, rtol=1e-5, atol=1e-5)


def test_they_do_not_depend_on_what_was_asked_before(policy):
    straight, resumed = PromptCache(policy), PromptCache(policy)
    straight.encode(PROMPTS[:3])
    first, second = (cache.encode(PROMPTS[1:]) for cache in (straight, resumed))
    assert_same(first, second, rtol=0, atol=0)


def test_the_ones_not_used_for_the_longest_time_go_first():
    policy = PipelinePolicy(pipelines.stable_diffusion_3(t5=False), guidance_scale=1.0, max_sequence_length=16)
    encoded, encode = [], policy.encode
    policy.encode = lambda prompts: encoded.append(list(prompts)) or encode(prompts)
    row = encode(["a"]).rows[0].nbytes
    cache = PromptCache(policy, max_bytes=2 * row)
    one, two, three, _ = PROMPTS
    for prompts in ([one], [two], [one], [three], [one], [two]):
        cache.encode(prompts)
    assert encoded == [[one], [two], [three], [two]]
    assert len(cache.encode(PROMPTS)) == 4  # those of one call are kept
    assert sum(len(set(prompts)) for prompts in encoded) == 4 + 2


def test_what_all_rows_have_is_kept_and_moved_once():
    policy = PipelinePolicy(pipelines.flux(), height=16, width=16, max_sequence_length=16)
    cache = PromptCache(policy)
    rows = [cache.encode([prompt]).rows[0] for prompt in PROMPTS]
    moved = cache.encode(PROMPTS).on(torch.device("meta"), [0, 1, 2, 3]).rows
    for group in (rows, moved):
        ids = [row.outputs[row.names.index("encode_prompt")][2] for row in group]  # of the tokens of text
        assert ids[0].numel() and all(other is ids[0] for other in ids)


def test_rows_on_a_device(policy):
    conditioning = PromptCache(policy).encode(PROMPTS)
    rows = [2, 0, 0, 3]
    moved, selected = conditioning.on(torch.device("cpu"), rows), conditioning[rows]
    assert_same(moved, selected, rtol=0, atol=0)
    meta = conditioning.on(torch.device("meta"), rows)
    assert {value.device.type for row in meta.rows for value in tensors(row.outputs)} == {"meta"}


def test_a_prompt_that_is_cut_off_comes_first():
    prompts = [
        " ".join(["a red circle on the left of a blue square"] * 6),
        "three cubes",
        "a cat",
        "a dog with a house",
    ]
    policy = PipelinePolicy(pipelines.qwen_image(), guidance_scale=1.0, max_sequence_length=16, height=16, width=16)
    conditioning = PromptCache(policy).encode(prompts)[[3, 2, 1, 0]]
    latents, schedule, _ = policy.start(conditioning, 3, [torch.Generator().manual_seed(seed) for seed in range(4)])
    together = policy.predict(latents, 1, conditioning, schedule)
    for i, prompt in enumerate(prompts[::-1]):
        alone = policy.predict(latents[i : i + 1], 1, policy.encode([prompt]), schedule)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)

import json

import pytest

from flow_trl.utils import MissingExtraError, import_extra, weights_of


def test_import_extra_returns_the_module():
    assert import_extra("json", extra="plots", purpose="the test") is json


@pytest.mark.parametrize("error", [ImportError, ValueError])
def test_import_extra_says_how_to_install(error):
    with pytest.raises(error) as info:
        import_extra("no_such_module.part", extra="plots", purpose="The learning curve")
    assert type(info.value) is MissingExtraError
    assert str(info.value).startswith("The learning curve needs `no_such_module.part`")
    assert 'pip install "flow-trl[plots]"' in str(info.value)
    assert isinstance(info.value.__cause__, ImportError)


def test_weights_of_a_denoiser_among_several():
    weights = {"transformer.to_q": 1, "transformer_2.to_q": 2}
    both = dict.fromkeys(["transformer", "transformer_2"])
    assert [weights_of(name, both, weights) for name in both] == [{"to_q": 1}, {"to_q": 2}]
    assert weights_of("transformer", {"transformer": None}, {"to_q": 3}) == {"to_q": 3}

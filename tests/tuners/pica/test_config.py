from __future__ import annotations

import pytest

import pica
from pica import PicaConfig
from pica.errors import ConfigError


def test_the_public_surface_is_a_decision():
    assert sorted(pica.__all__) == sorted(set(pica.__all__))
    for name in pica.__all__:
        assert getattr(pica, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        pica.no_such_name  # noqa: B018 - the access is what is tested


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as error:
        PicaConfig(r=0, projection="top", share="all", rank_pattern={"q": -1}, bias="some")  # pyright: ignore
    for part in ("r=0", "projection='top'", "share='all'", "rank_pattern['q']=-1", "bias='some'"):
        assert part in str(error.value)


@pytest.mark.parametrize("r", [True, 2.0, "8", None])
def test_a_rank_is_a_whole_number(r):
    with pytest.raises(ConfigError, match="r="):
        PicaConfig(r=r)

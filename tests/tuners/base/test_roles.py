from __future__ import annotations

import pytest

from pica.errors import ConfigError
from pica.tuners.base.roles import Member, check_share, plan_groups, role_of


def members(*paths: str, out: int = 8, rank: int = 4) -> list[Member]:
    return [Member(p, out, 16, rank) for p in paths]


LAYERS = members(*(f"model.layers.{i}.self_attn.{p}" for i in range(6) for p in ("q_proj", "k_proj")))


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.*.self_attn.q_proj"),
        ("encoder.block.11.layer.0.SelfAttention.q", "encoder.block.*.layer.*.SelfAttention.q"),
        ("h2.fc1", "h2.fc1"),
        ("0", "*"),
    ],
)
def test_roles_differ_only_in_indices(path, role):
    assert role_of(path) == role


def test_berts_two_dense_layers_and_t5s_two_stacks_are_apart():
    groups = plan_groups(
        members(
            "bert.encoder.layer.0.attention.output.dense",
            "bert.encoder.layer.0.output.dense",
            "encoder.block.0.layer.0.SelfAttention.q",
            "decoder.block.0.layer.0.SelfAttention.q",
        ),
        "role",
    )
    assert len(groups) == 4


def test_widths_never_share():
    groups = plan_groups([*members("blocks.0.to_q", out=8), *members("blocks.1.to_q", out=16)], "role")
    assert [g.width for g in groups] == [8, 16]
    mapped = plan_groups([*members("blocks.0.a", out=8), *members("blocks.1.b", out=16)], {r"[ab]": "both"})
    assert len(mapped) == 2


@pytest.mark.parametrize(("share", "count"), [("role", 2), ("none", 12), (2, 6), (4, 4), (100, 2)])
def test_how_many_groups_each_setting_makes(share, count):
    groups = plan_groups(LAYERS, share)
    assert len(groups) == count
    assert sorted(m.path for g in groups for m in g.members) == sorted(m.path for m in LAYERS)
    assert len({g.key for g in groups}) == count


def test_consecutive_layers_share_with_an_integer():
    groups = plan_groups(LAYERS, 2)
    q = [[m.path.split(".")[2] for m in g.members] for g in groups if "q_proj" in g.role]
    assert q == [["0", "1"], ["2", "3"], ["4", "5"]]


def test_a_mapping_names_groups_and_the_rest_share_by_role():
    groups = plan_groups(LAYERS, {r"layers\.[0-2]\..*(q|k)_proj": "early"})
    by_role = {g.role: len(g.members) for g in groups}
    assert by_role == {"early": 6, "model.layers.*.self_attn.q_proj": 3, "model.layers.*.self_attn.k_proj": 3}


def test_an_expression_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match="'v_proj' matches no adapted layer"):
        plan_groups(LAYERS, {"q_proj": "a", "v_proj": "b"})


def test_a_group_has_the_largest_rank_of_its_layers():
    (group,) = plan_groups([Member("l.0.q", 8, 16, 3), Member("l.1.q", 8, 16, 7)], "role")
    assert group.rank == 7
    assert group.parameters == 8 * 7


def test_keys_hold_no_dot_and_do_not_collide():
    groups = plan_groups(members("a.b-c", "a-b.c", "a.0.d", "a.N.d"), "role")
    keys = [g.key for g in groups]
    assert len(set(keys)) == 4
    assert not any("." in k for k in keys)


@pytest.mark.parametrize("share", ["roles", 0, -1, True, 1.5, None, {"(": "a"}, {"q": ""}, {"q": 3}])
def test_bad_settings_are_described(share):
    assert check_share(share)


@pytest.mark.parametrize("share", ["role", "none", 1, 7, {}, {r".*q_proj": "q"}])
def test_good_settings_pass(share):
    assert check_share(share) is None


def test_the_sides_of_a_matrix_never_share():
    """One that reads what layers are given and one that writes what they give, though both may be as wide."""
    members = [Member(f"b.{i}.q", 8, 8, 2, input_side=i < 2) for i in range(3)] + [Member("b.3.q", 4, 8, 2, True)]
    groups = plan_groups(members, "role")
    assert [(g.width, len(g.members)) for g in groups] == [(8, 3), (8, 1)]
    assert len({g.key for g in groups}) == 2

"""Names and trees: flatten and nest, split and merge are inverse; the first match wins; a dead pattern is an error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jft import tree
from jft.errors import UserError

NAMES = ["stem/kernel", "stage1/block0/kernel", "stage1/block0/bias", "stage10/kernel", "head/kernel", "head/bias"]
keys = st.text("abc0_", min_size=1, max_size=3)
nested = st.recursive(st.integers(), lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3), max_leaves=8)


@given(st.dictionaries(keys, nested, max_size=3))
def test_nest_undoes_flatten(value):
    assert tree.nest(tree.flatten(value)) == value


@given(st.dictionaries(st.sampled_from(NAMES), st.integers()), st.sets(st.sampled_from(NAMES)))
def test_merge_undoes_split(flat, names):
    inside, outside = tree.split(flat, names)
    assert tree.merge(inside, outside) == flat
    assert set(inside) == set(flat) & names


def test_merge_refuses_a_name_in_both():
    with pytest.raises(ValueError, match="a"):
        tree.merge({"a": 1}, {"a": 2})


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("head", ["head/kernel", "head/bias"]),
        ("stage1", ["stage1/block0/kernel", "stage1/block0/bias"]),  # and not stage10
        ("*/bias", ["stage1/block0/bias", "head/bias"]),
        ("*", NAMES),
        ("stage1/block0/bias", ["stage1/block0/bias"]),
    ],
)
def test_patterns(pattern, expected):
    assert [n for n in NAMES if tree.matches(pattern, n)] == expected


def test_first_match_wins():
    values = tree.first_match([("head/bias", 0.0), ("head", 2.0), ("*", 1.0)], NAMES, 9.0)
    assert values == {n: 1.0 for n in NAMES} | {"head/bias": 0.0, "head/kernel": 2.0}


def test_what_no_pattern_matches_has_the_default():
    assert tree.first_match([("head", 2.0)], NAMES, 9.0) == {n: 2.0 if "head" in n else 9.0 for n in NAMES}


def test_the_leaves_below_a_prefix_lose_it():
    assert tree.under({"a/b/c": 1, "a/b": 2, "ab/c": 3, "a": 4}, "a") == {"b/c": 1, "b": 2}


def test_a_pattern_that_matches_nothing_is_an_error_with_near_names():
    with pytest.raises(UserError, match=r"'heat' matches no parameter\. Did you mean head"):
        tree.first_match([("heat", 1.0)], NAMES, 0.0)


def test_a_pattern_hidden_by_an_earlier_one_is_an_error():
    with pytest.raises(UserError, match="'head' decides nothing"):
        tree.first_match([("*", 1.0), ("head", 2.0)], NAMES, 0.0)


@pytest.mark.parametrize(("typed", "meant"), [("stage1/blok0", "stage1/block0"), ("head/kernal", "head/kernel")])
def test_near_names_are_of_every_depth(typed, meant):
    with pytest.raises(UserError, match=f"Did you mean .*{meant}"):
        tree.first_match([(typed, 1.0)], NAMES, 0.0)

from __future__ import annotations

import pytest

from domain.plans import DEFAULT_PLANS, METERS, plans_with
from domain.prices import AGENT_CREATE, MESSAGE, STORAGE_WRITE, VIDEO


def test_every_plan_says_something_about_every_meter():
    assert all(set(limits) == set(METERS) for limits in DEFAULT_PLANS.values())


def test_bigger_plans_allow_more():
    for meter in METERS:
        free, starter, professional = (
            DEFAULT_PLANS[plan][meter] for plan in ("free", "starter", "professional")
        )
        assert (starter, professional) == (free * 10, free * 100)
    for plan in ("enterprise", "payg"):
        assert set(DEFAULT_PLANS[plan].values()) == {None}


def test_some_limits_are_replaced_and_the_others_stay():
    plans = plans_with({"free": {MESSAGE: 100, AGENT_CREATE: None}, "payg": {MESSAGE: 0}})
    assert (plans["free"][MESSAGE], plans["free"][AGENT_CREATE]) == (100, None)
    assert plans["free"][STORAGE_WRITE] == DEFAULT_PLANS["free"][STORAGE_WRITE]
    assert plans["payg"][MESSAGE] == 0
    assert plans["starter"] == DEFAULT_PLANS["starter"]
    assert DEFAULT_PLANS["free"][MESSAGE] == 50
    assert plans_with({}) == DEFAULT_PLANS


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"gold": {MESSAGE: 1}}, "unknown plan 'gold'"),
        ({"free": {VIDEO: 1}}, "unknown meter 'video'"),
        ({"free": {MESSAGE: -1}}, "must be null or a whole number"),
        ({"free": {MESSAGE: 1.5}}, "must be null or a whole number"),
        ({"free": {MESSAGE: True}}, "must be null or a whole number"),
        ({"free": {MESSAGE: "1"}}, "must be null or a whole number"),
        ({"free": 5}, "must be an object"),
        ({"free": None}, "must be an object"),
    ],
)
def test_a_limit_that_is_none_is_refused_with_its_name(overrides, words):
    with pytest.raises(ValueError, match=words):
        plans_with(overrides)

"""What trains: the first regex that matches decides, the rest is frozen, and a regex must match something."""

from __future__ import annotations

import pytest
from torch import nn

from soundwave_fast.errors import UserError
from train.freeze import parameter_groups


def model() -> nn.Module:
    return nn.ModuleDict({"adapter": nn.Linear(3, 4), "head": nn.Linear(4, 2, bias=False), "llm": nn.Linear(2, 2)})


def test_groups_and_freezing():
    net = model()
    groups = parameter_groups(net, {r"adapter\.": 1e-3, "head": 1e-4}, weight_decay=0.1)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        "adapter.weight",
        "adapter.bias",
        "head.weight",
    }
    facts = [(g["name"], g["lr"], g["peak"], g["weight_decay"], len(g["params"])) for g in groups]
    assert facts == [
        (r"adapter\.", 1e-3, 1e-3, 0.1, 1),
        (r"adapter\.", 1e-3, 1e-3, 0.0, 1),
        ("head", 1e-4, 1e-4, 0.1, 1),
    ]


def test_the_first_match_decides():
    net = model()
    groups = parameter_groups(net, {r"adapter\.weight": 1.0, "adapter": 2.0}, 0.0)
    assert [(g["lr"], g["params"][0] is net["adapter"].weight) for g in groups] == [(1.0, True), (2.0, False)]


def test_what_was_trainable_is_frozen_again():
    net = model()
    parameter_groups(net, {"adapter": 1.0}, 0.0)
    parameter_groups(net, {"head": 1.0}, 0.0)
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["head.weight"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"adaptor": 1.0}, "'adaptor' matches no parameter"),
        ({"adapter": 1.0, "dapter": 1.0}, "'dapter' matches no parameter"),
        ({"adapter": 1.0, r"adapter\.weight": 1.0}, "matches no parameter"),
        ({"(": 1.0}, "'\\(' is no regular expression"),
        ({}, "nothing would train"),
    ],
)
def test_mistakes(table, message):
    with pytest.raises(UserError, match=message):
        parameter_groups(model(), table, 0.0)

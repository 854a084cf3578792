"""Pytest plugin of the suite's rehearsal: every bench case at a tiny shape, one round (`-p bench.suite_rehearsal`).

What is compiled is left out: inductor would take most of the rehearsal, and --smoke runs it.
"""

from __future__ import annotations

import dataclasses

import pytest

MOST = {"B": 2, "T": 24, "T50": 40, "Lq": 6, "Lk": 24, "L": 8, "A": 6, "S": 3, "C": 90, "V": 700, "new": 2}
WIDEST = 1000  # a case of D 4096 is one of D 576 once more


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    small, kept = {}, []  # one case an op, variant and shape, as harness.measure remembers them by
    for item in items:
        call = getattr(item, "callspec", None)
        case = call.params.get("case") if call else None
        if case is None or case.shape.get("D", 0) > WIDEST or "compiled" in call.params["provider"]:
            continue
        shape = {name: min(value, MOST.get(name, value)) for name, value in case.shape.items()}
        key = (case.op, case.variant, *shape.items())
        providers = {name: make for name, make in case.providers.items() if "compiled" not in name}
        less = {"shape": shape, "providers": providers, "rounds": 1, "cost": None}
        first, case = small.setdefault(key, (case, dataclasses.replace(case, **less)))
        if first is call.params["case"]:  # else two cases became one
            call.params["case"] = case
            kept.append(item)
    items[:] = kept

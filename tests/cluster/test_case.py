"""Plans of cluster faults: functions of a seed that cover every fault."""

from __future__ import annotations

import json

from tests.cluster.case import COUNT, FAULTS, QUICK, SHAPES, Case, drawn, few


def test_a_seed_is_a_case_and_its_json_is_too() -> None:
    cases = [drawn(seed) for seed in range(200)]
    assert cases == [drawn(seed) for seed in range(200)]
    assert cases == [Case.of(json.loads(json.dumps(case.plain))) for case in cases]


def test_every_fault_comes_short_and_long_in_every_shape() -> None:
    cases = [drawn(seed) for seed in range(400)]
    assert {(f.kind, f.long) for case in cases for f in case.faults} == {(k, x) for k in FAULTS for x in (False, True)}
    assert {(case.nodes, case.min_nodes) for case in cases} == set(SHAPES)
    assert {len(case.faults) for case in cases} == {COUNT}
    assert {kind for kind in FAULTS if any(f.kind == kind for s in range(20) for f in drawn(s).faults)} == set(FAULTS)


def test_a_fault_is_on_one_of_the_nodes() -> None:
    for case in (few(), *map(drawn, range(400))):
        assert all(fault.node < case.nodes for fault in case.faults)
        elsewhere = [f.node for f in case.faults if f.kind in ("launcher killed", "wrong host name") and f.long]
        assert all(elsewhere)
    assert sorted(f.kind for f in few().faults) == sorted(QUICK)

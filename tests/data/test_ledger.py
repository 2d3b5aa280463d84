"""The ledger of samples against direct counting, step by step, through kills, rollbacks and skips."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.config.layout import split_slots
from shoal.data.order.audit import Audit, audit, describe
from shoal.data.order.ledger import FLOAT64_BITS, Header, Ledger, bits_for, checksum
from shoal.data.order.order import sample_at

HEADER = Header(rows=100, seed=7, global_batch=16, copies=1, data_id="tokens")


def summed(header: Header, ids: list[int], dp: int) -> float:
    """Add the processes' checksums as an all-reduce in float64 does, in any order."""
    parts = [checksum(ids[part.start : part.stop], header.bits) for part in split_slots(len(ids), dp)]
    said = np.array(parts * header.copies, np.float64)
    np.random.default_rng(len(ids)).shuffle(said)
    return float(said.sum())


class Run:
    """A run that remembers which samples it trained on, by step."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self.position = self.step = 0
        self.trained: dict[int, list[int]] = {}
        self.skipped: dict[int, tuple[int, int]] = {}
        self.passed: list[tuple[int, int, int]] = []  # windows passed over: (step before, first sample, stop)
        self.start(0, 0)

    def start(self, step: int, position: int) -> None:
        """Start from the checkpoint of `step`."""
        self.ledger = Ledger(self.path)
        self.go_back(step, position)

    def go_back(self, step: int, position: int) -> None:
        self.step, self.position = step, position
        self.trained = {s: ids for s, ids in self.trained.items() if s <= step}
        self.skipped = {s: window for s, window in self.skipped.items() if s <= step}
        self.passed = [each for each in self.passed if each[2] <= position]
        self.ledger.begin(self.header, step, position)

    def take(self, *, dp: int = 1, skipped: bool = False) -> None:
        first, stop = self.position, self.position + self.header.global_batch
        ids = sample_at(self.header.seed, np.arange(first, stop), self.header.rows).tolist()
        self.step, self.position = self.step + 1, stop
        if skipped:
            self.skipped[self.step] = (first, stop)
        else:
            self.trained[self.step] = ids
        windows = [(a, b) for _, a, b in self.passed]
        self.ledger.record(self.step, first, stop, summed(self.header, ids, dp), skipped=skipped, windows=windows)

    def stands_behind_a_step(self) -> bool:
        """Return False between a skipped window and the next step, which records the window: no checkpoint is saved there."""
        return not self.passed or self.passed[-1][2] != self.position

    def pass_over(self, samples: int) -> None:
        """Pass over the next `samples` samples. Two windows without a step between them become one."""
        first = self.position
        while self.passed and self.passed[-1][2] == first:
            first = self.passed.pop()[1]
        self.position += samples
        self.passed.append((self.step, first, self.position))


def change(path: Path, number: int, **values: Any) -> None:
    """Change a value in line `number`."""
    lines = path.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | values)
    path.write_text("\n".join(lines) + "\n")


def drop(path: Path, number: int) -> None:
    lines = path.read_text().splitlines()
    del lines[number]
    path.write_text("\n".join(lines) + "\n")


def simple(path: Path, steps: int = 30) -> Path:
    run = Run(path, HEADER)
    for _ in range(steps):
        run.take()
    return path


# --- sums ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 16, 1000, 2**12, 2**13, 2**13 + 1, 2**14, 2**20 + 1])
def test_the_largest_sum_is_exact_in_float64(samples: int) -> None:
    bits = bits_for(samples)
    assert samples * (2**bits - 1) < 2**FLOAT64_BITS
    assert bits == (40 if samples <= 2**13 else FLOAT64_BITS - (samples - 1).bit_length())
    total = np.float64(0)
    for _ in range(min(samples, 3)):
        total += (2**bits - 1) * (samples // 3)
    assert int(total) == (2**bits - 1) * (samples // 3) * min(samples, 3)


def test_a_batch_that_leaves_no_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit into float64"):
        bits_for(2**46)


def test_a_checksum_knows_neither_order_nor_parts() -> None:
    ids = list(range(0, 8192 * 5, 5))
    whole = checksum(ids, 40)
    assert whole == checksum(ids[::-1], 40) == checksum(tuple(ids[:5000]), 40) + checksum(ids[5000:], 40)
    assert all(summed(Header(10**6, 0, 8192, copies, ""), ids, 3) == copies * checksum(ids, bits_for(8192 * copies))
               for copies in (1, 4))  # fmt: skip
    assert checksum([], 40) == 0
    assert checksum([0], 40) > 0
    assert len({checksum([i, j], 40) for i in range(100) for j in range(i + 1)}) == 5050


# --- what passes the audit -----------------------------------------------------------------------------------


def test_a_run_in_which_nothing_goes_wrong(tmp_path: Path) -> None:
    found = audit(simple(tmp_path / "ledger.jsonl"), rows=100, seed=7)
    assert found.passed
    assert (found.lives, found.steps, found.taken_again, found.samples) == (1, 30, 0, 480)
    assert [(n, e.trained) for n, e in found.epochs.items()] == [(0, 100), (1, 100), (2, 100), (3, 100), (4, 80)]
    text = describe(found)
    assert "4 epochs (0 to 3): each of the 100 samples once" in text
    assert "epoch 4: 80 of 100 samples so far, each once" in text
    assert text[-1].startswith("PASS")


@pytest.mark.parametrize("seed", range(30))
def test_any_life_agrees_with_counting(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    header = Header(draw.choice([5, 97, 400]), seed, draw.choice([8, 12]), draw.choice([1, 2, 4]), "tokens")
    run = Run(tmp_path / "ledger.jsonl", header)
    saved, lives, again = [(0, 0)], 1, 0
    for _ in range(300):
        chance = draw.random()
        if chance < 0.04:
            saved = [each for each in saved if each[0] <= draw.choice(saved)[0]] or [(0, 0)]
            again += run.step - saved[-1][0]
            lives += 1
            if draw.random() < 0.5:
                run.start(*saved[-1])
            else:
                run.go_back(*saved[-1])
                run.pass_over(draw.randrange(1, 40))
        elif chance < 0.06:
            run.pass_over(draw.randrange(1, 3 * header.rows))
        elif chance < 0.2 and run.stands_behind_a_step():
            saved.append((run.step, run.position))
        else:
            run.take(dp=draw.choice([1, 2, 3, header.global_batch]), skipped=chance > 0.95)
    run.take()  # a window is recorded with the step after it
    found = audit(tmp_path / "ledger.jsonl", rows=header.rows, seed=seed)
    assert found.problems == []
    assert (found.steps, found.lives, found.taken_again) == (run.step, lives, again)
    assert found.samples == sum(map(len, run.trained.values()))
    check_counts(found, header, run)
    assert [(w.step, w.first, w.stop) for w in found.skipped] == [
        (s, a, b) for s, (a, b) in sorted(run.skipped.items())
    ]
    assert [(w.first, w.stop) for w in found.passed_over] == sorted((a, b) for _, a, b in run.passed)


def check_counts(found: Audit, header: Header, run: Run) -> None:
    """Compare the audit with counts of each (epoch, sample) that the run trained on."""
    trained, others = Counter[int](), {"skipped": Counter[int](), "passed_over": Counter[int]()}
    where = {}  # (epoch, sample) of each position
    last = run.position
    for position, sample in enumerate(sample_at(header.seed, np.arange(last), header.rows).tolist()):
        where[position] = (position // header.rows, sample)
    times = Counter[tuple[int, int]]()
    windows = set(run.skipped.values()) | {(a, b) for _, a, b in run.passed}
    left_out = {p for a, b in windows for p in range(a, b)}
    positions = [p for p in range(last) if p not in left_out]
    had = [sample for step in sorted(run.trained) for sample in run.trained[step]]
    assert [where[p][1] for p in positions] == had
    times.update(where[p] for p in positions)
    assert set(times.values()) <= {1}
    trained.update(epoch for epoch, _ in times)
    for a, b in run.skipped.values():
        others["skipped"].update(p // header.rows for p in range(a, b))
    for _, a, b in run.passed:
        others["passed_over"].update(p // header.rows for p in range(a, b))
    for number, epoch in found.epochs.items():
        assert (epoch.trained, epoch.again) == (trained[number], 0)
        assert (epoch.skipped, epoch.passed_over) == (others["skipped"][number], others["passed_over"][number])
    assert sum(e.trained for e in found.epochs.values()) == sum(trained.values())


# --- what fails the audit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 13, 30])
def test_one_sample_that_is_another_is_found(tmp_path: Path, step: int) -> None:
    path = simple(tmp_path / "ledger.jsonl")
    ids = sample_at(7, np.arange(16 * (step - 1), 16 * step), 100).tolist()
    for wrong in ([(ids[0] + 1) % 100, *ids[1:]], ids[1:], [*ids, ids[0]], [ids[1], *ids[1:]]):
        change(path, step, sum=checksum(wrong, 40))
        found = audit(path)
        assert (found.passed, found.first_wrong, len(found.problems)) == (False, step, 1)
        assert f"step {step} did not train on the samples at positions {16 * step - 16} to " in found.problems[0]
        assert describe(found)[-1].startswith("FAIL")


def test_a_rank_that_shares_samples_and_had_others_is_found(tmp_path: Path) -> None:
    header = Header(rows=100, seed=7, global_batch=16, copies=2, data_id="tokens")
    run = Run(tmp_path / "ledger.jsonl", header)
    run.take(dp=4)
    assert audit(run.path).passed
    ids = sample_at(7, np.arange(16, 32), 100).tolist()
    run.ledger.record(2, 16, 32, checksum(ids, 40) + checksum([*ids[:-1], ids[0]], 40))
    assert audit(run.path).first_wrong == 2


def test_a_window_trained_on_twice_is_found(tmp_path: Path) -> None:
    """Resume at a wrong data position."""
    run = Run(tmp_path / "ledger.jsonl", HEADER)
    for _ in range(5):
        run.take()
    run.position = 48
    run.take()
    found = audit(run.path)
    assert "positions 48 to 79 are repeated before step 6, and no line explains it" in found.problems
    assert (found.epochs[0].trained, found.epochs[0].again, found.first_wrong) == (80, 16, 6)
    assert "epoch 0: 80 of 100 samples so far, 16 of them AGAIN" in describe(found)


def test_a_window_that_nobody_trained_on_is_found(tmp_path: Path) -> None:
    path = simple(tmp_path / "ledger.jsonl")
    drop(path, 3)
    found = audit(path)
    assert "positions 32 to 47 were passed over before step 4, and no line explains it" in found.problems
    assert "step 4 comes after step 2" in found.problems
    assert "epoch 0: 84 of 100 samples, each once, 16 NEVER" in describe(found)


def test_a_jump_counts_as_passed_over_only_where_a_window_ends(tmp_path: Path) -> None:
    for windows, problems in ([(20, 40)], 0), ([(20, 39)], 1), ([(0, 12), (40, 90)], 1), ([], 1):
        path = tmp_path / f"{windows}.jsonl"
        run = Run(path, HEADER)
        run.take()
        total = checksum(sample_at(7, np.arange(40, 56), 100), 40)
        run.ledger.record(2, 40, 56, total, windows=windows)
        assert len(audit(path).problems) == problems
        assert [(w.first, w.stop) for w in audit(path).passed_over] == [(16, 40)][problems:]


def test_other_data_another_seed_another_batch_are_found(tmp_path: Path) -> None:
    path = simple(tmp_path / "ledger.jsonl", steps=3)
    assert audit(path, seed=8).problems == ["the ledger has seed 7, but the run has 8"]
    assert audit(path, rows=99).problems == ["the ledger has rows 100, but the run has 99"]
    ledger = Ledger(path)
    ledger.begin(Header(rows=100, seed=7, global_batch=16, copies=1, data_id="others"), 3, 48)
    ledger.close()
    assert audit(path).problems == ["data_id was tokens and is others after step 3"]
    change(path, 2, stop=31)
    assert "step 2 has 15 samples, not 16" in audit(path).problems


def test_a_ledger_that_begins_in_the_middle_proves_nothing_of_what_was_before(tmp_path: Path) -> None:
    run = Run(tmp_path / "ledger.jsonl", HEADER)
    run.path.unlink()
    run.start(4, 64)
    run.take()
    assert "positions 0 to 63 were passed over before step 5, and no line explains it" in audit(run.path).problems
    drop(run.path, 0)
    assert "the first lines are missing" in audit(run.path).problems[0]
    run.path.write_text("")
    assert audit(run.path).problems == ["the ledger is empty"]


def test_many_problems_are_not_all_shown(tmp_path: Path) -> None:
    path = simple(tmp_path / "ledger.jsonl")
    for step in range(1, 31):
        change(path, step, sum=1)
    found = audit(path)
    assert (len(found.problems), found.more_problems, found.first_wrong) == (10, 20, 1)
    assert "and 20 more" in describe(found)


def test_lines_that_come_late_or_are_cut_short_are_no_harm(tmp_path: Path) -> None:
    """Begin before the ledger's folder exists; cut the last line short; resume from the step before it."""
    path = tmp_path / "late" / "ledger.jsonl"
    run = Run(path, HEADER)
    run.take()
    assert "cannot be written" in str(run.ledger.problem)
    path.parent.mkdir()
    run.take()
    assert run.ledger.problem is None
    run.ledger.sync()
    run.take()
    run.ledger.close()
    path.write_bytes(path.read_bytes()[:-7])
    run.start(2, 32)
    run.take()
    assert audit(path).problems == []
    assert audit(path).steps == 3

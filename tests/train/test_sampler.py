"""Sampler: a pure function of the seed, shares by temperature, exact resume, ranks that do not overlap."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import Counter
from itertools import islice

import pytest
from torchdata.stateful_dataloader import StatefulDataLoader

from soundwave_fast.errors import UserError
from train.config import Data
from train.data import sampler
from train.data.augment import speed_of
from train.data.utterance import Utterance

ROWS = [
    Utterance(f"u{i}", f"{i}.wav", 0.5 + 0.1 * (i % 23), text="some words", slots={"x": "y"} if i % 8 == 0 else {})
    for i in range(160)
]
DATA = Data(tasks={"asr": 1.0, "slot": 1.0}, batch_seconds=8.0, batch_size=6, buckets=3)


def batches(count: int, seed: int = 0, rank: int = 0, world: int = 1, data: Data = DATA) -> list[list[tuple]]:
    picks = islice(iter(sampler.build(ROWS, data, seed, rank, world)), count)
    return [[(c.custom["row"], c.custom["task"], c.custom["draw"]) for c in cuts] for cuts in picks]


def test_a_pure_function_of_the_seed():
    assert batches(40) == batches(40) != batches(40, seed=1)


@pytest.mark.parametrize("seconds", [5.0, 8.0, 21.3])
def test_batches_keep_within_their_limits(seconds):
    data = dataclasses.replace(DATA, batch_seconds=seconds)
    full = 0
    for batch in batches(150, data=data):
        longest = max(ROWS[row].duration for row, _, _ in batch)
        assert len(batch) <= 6 and len(batch) * longest <= seconds * (1 + 1e-6), "padding included, without exception"
        full += len(batch) == 6 or (len(batch) + 1) * longest > 0.75 * seconds
    assert full > 130, "and yet they are about full"


def positions(row: Utterance, task: str, draw: int) -> int:
    """A stand-in for the tokens of a draw: short sounds may have long answers."""
    return 10 + (int(row.id[1:]) * 37 + draw) % 90 + (200 if row.id == "u5" else 0)


def test_tokens_bound_a_batch():
    data = dataclasses.replace(DATA, batch_tokens=250, batch_size=100)
    tight = 0
    for cuts in islice(iter(sampler.build(ROWS, data, 0, 0, 1, measure=positions)), 200):
        drawn = [(ROWS[c.custom["row"]], c.custom["task"], c.custom["draw"]) for c in cuts]
        most = max(positions(*one) for one in drawn)
        assert len(drawn) * most <= 250 and len(drawn) * max(row.duration for row, _, _ in drawn) <= 8.0 + 1e-6
        tight += (len(drawn) + 1) * most > 250
    assert tight > 50, "the tokens decide in many of them"
    loose = islice(
        iter(sampler.build(ROWS, dataclasses.replace(data, batch_tokens=0), 0, 0, 1, measure=positions)), 200
    )
    assert any(len(c) * max(positions(ROWS[x.custom["row"]], "", x.custom["draw"]) for x in c) > 250 for c in loose)


def test_what_no_batch_can_hold_is_left_out_and_counted():
    data = dataclasses.replace(DATA, batch_tokens=150)
    mux = sampler.TemperatureMux({"asr": list(range(160))}, {"asr": 1.0}, data, ROWS, 0, measure=positions)
    cuts = list(islice(iter(mux), 159))  # an epoch without u5
    assert {cut.custom["row"] for cut in cuts} == set(range(160)) - {5}
    assert sum(cut.custom["left_out"] for cut in cuts) <= 1
    assert sum(cut.custom["left_out"] for cut in islice(iter(mux), 160 * 3)) == 3
    with pytest.raises(UserError, match="no utterance fits a batch"):
        sampler.build(ROWS, dataclasses.replace(DATA, batch_tokens=5), 0, 0, 1, measure=positions)


def test_slowed_utterances_count_as_long_as_they_are():
    data = dataclasses.replace(DATA, speed=(0.5, 1.0), tasks={"asr": 1.0})
    slowed = 0
    for batch in batches(100, data=data):
        durations = [ROWS[row].duration / speed_of(data.speed, ROWS[row].duration, 0, draw) for row, _, draw in batch]
        assert len(batch) * max(durations) <= 8.0 + 1e-6
        slowed += sum(d > ROWS[row].duration for d, (row, _, _) in zip(durations, batch, strict=True))
    assert 0.4 < slowed / sum(map(len, batches(100, data=data))) < 0.6


def test_rows_out_of_bounds_are_left_out_by_cause():
    more = [
        Utterance("long", "a.wav", 9.0, text="x"),
        Utterance("short", "b.wav", 0.05, text="x"),
        Utterance("mute", "c.wav", 1.0),
        Utterance("sad", "d.wav", 1.0, text="x", task="emotion"),
    ]
    sources, out = sampler.sources_of([*ROWS, *more], DATA)
    assert out == {"audio: too long": 1, "audio: too short": 1, "text: empty": 1, "task: none applies": 1}
    assert sources["asr"] == list(range(160))
    with pytest.raises(UserError, match="40 of 200 rows cannot be used: .*too short': 40.* .data.max_bad_share."):
        sampler.sources_of([*ROWS, *more[1:2] * 40], DATA)


def test_the_temperature_goes_on_where_the_draws_are_counted_from():
    data = dataclasses.replace(DATA, temperature=(1.0, 100.0))
    sources = {"asr": list(range(160)), "slot": list(range(0, 160, 8))}

    def slots(first: int) -> int:
        mux = sampler.TemperatureMux(sources, data.tasks, data, ROWS, seed=3, first=first)
        cuts = list(islice(iter(mux), 170))
        assert [cut.custom["draw"] for cut in cuts] == list(range(first, first + 170))
        return sum(cut.custom["task"] == "slot" for cut in cuts)

    assert slots(0) < 40 < 60 < slots(180 * 3)


def test_lengths_are_bucketed():
    """Padding is less than with batches drawn at random from the same rows."""

    def padding(groups):
        total = sum(len(g) * max(g) for g in groups)
        return 1 - sum(map(sum, groups)) / total

    drawn = [[ROWS[row].duration for row, _, _ in batch] for batch in batches(100)]
    flat = [duration for group in drawn for duration in group]
    shuffled = iter(random.Random(0).sample(flat, len(flat)))
    assert padding(drawn) < 0.7 * padding([list(islice(shuffled, len(group))) for group in drawn])


def test_shares_follow_the_temperature():
    data = dataclasses.replace(DATA, temperature=(1.0, 5.0))
    sources = {"asr": list(range(160)), "slot": list(range(0, 160, 8))}
    mux = sampler.TemperatureMux(sources, data.tasks, data, ROWS, seed=0)
    assert mux.shares(0) == pytest.approx([160 / 180, 20 / 180])
    a, b = 160 ** (1 / 6), 20 ** (1 / 6)
    assert mux.shares(1) == pytest.approx([a / (a + b), b / (a + b)])
    drawn = [cut.custom["task"] for cut in islice(iter(mux), 180 * 21)]
    first, later = Counter(drawn[:180]), Counter(drawn[180 * 10 :])
    assert abs(first["slot"] / 180 - 20 / 180) < 4 * (0.111 * 0.889 / 180) ** 0.5
    share = sum(mux.shares(epoch)[1] for epoch in range(10, 21)) / 11
    assert abs(later["slot"] / later.total() - share) < 4 * (0.25 / later.total()) ** 0.5


def test_a_weight_multiplies_a_tasks_rows():
    data = dataclasses.replace(DATA, tasks={"asr": 1.0, "slot": 8.0})
    mux = sampler.TemperatureMux({"asr": list(range(160)), "slot": list(range(20))}, data.tasks, data, ROWS, seed=0)
    assert mux.shares(0) == pytest.approx([0.5, 0.5])


def test_an_epoch_of_a_source_holds_every_row_once():
    data = dataclasses.replace(DATA, tasks={"asr": 1.0})
    mux = sampler.TemperatureMux({"asr": list(range(160))}, data.tasks, data, ROWS, seed=0)
    rows = [cut.custom["row"] for cut in islice(iter(mux), 320)]
    assert sorted(rows[:160]) == sorted(rows[160:]) == list(range(160)) and rows[:160] != rows[160:]


class Identity:
    """Dataset of the loader below: a batch as text, which no collation touches."""

    def __getitem__(self, cuts):
        return {"cuts": str([(c.custom["row"], c.custom["task"], c.custom["draw"]) for c in cuts])}


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact(workers):
    def loader():
        picks = sampler.build(ROWS, DATA, 0, 0, 1)
        return StatefulDataLoader(Identity(), sampler=picks, batch_size=None, num_workers=workers)

    first = loader()
    stream = iter(first)
    head = list(islice(stream, 15))
    state = copy.deepcopy(first.state_dict())
    tail = list(islice(stream, 15))
    second = loader()
    second.load_state_dict(state)
    assert list(islice(iter(second), 15)) == tail
    assert [batch["cuts"] for batch in head + tail] == [str(batch) for batch in batches(30)]


def test_ranks_do_not_overlap_and_take_as_many_utterances():
    ranks = [batches(40, rank=rank, world=2) for rank in range(2)]
    draws = [{draw for batch in one for _, _, draw in batch} for one in ranks]
    assert not draws[0] & draws[1]
    assert [len(b) for b in ranks[0]] == pytest.approx([len(b) for b in ranks[1]], abs=6)
    for one, other in zip(*ranks):  # the same bucket on both: no rank waits for the other's longer batch
        longest = [max(ROWS[row].duration for row, _, _ in batch) for batch in (one, other)]
        assert abs(longest[0] - longest[1]) < 1.2


def test_a_task_without_rows():
    with pytest.raises(UserError, match="no row of the training manifests has what 'given' needs"):
        sampler.build(ROWS, dataclasses.replace(DATA, tasks={"given": 1.0}), 0, 0, 1)
    with pytest.raises(UserError, match="'sing' is not one of asr"):
        sampler.build(ROWS, dataclasses.replace(DATA, tasks={"sing": 1.0}), 0, 0, 1)


def test_a_handful_of_rows_is_enough():
    picks = sampler.build(ROWS[:2], Data(), 0, 0, 1)
    assert all(len(cuts) for cuts in islice(iter(picks), 10))

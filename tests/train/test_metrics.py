"""What one sees: lines, rows, loggers and curves, from rows with and without all their keys."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from soundwave_fast.errors import UserError
from train import loggers, plots
from train.metrics import FILE, Metrics, duration, read
from train.validation_figures import summary

ROW = {
    "ce": 1.25, "ctc": 0.5, "step_s": 2.0, "audio_s": 100.0, "frames": 2500, "audio_tokens": 250, "grad_norm": 1.0,
    "tokens_s": 512.4, "audio_h_per_h": 50.0, "mfu": 0.123, "peak_gib": 3.21, "eta_s": 4000.0, "skipped_step": False,
}  # fmt: skip


def test_the_line(tmp_path, capsys):
    metrics = Metrics(tmp_path, True, 100)
    for step in (1, 2, 3, 4):
        row = {**ROW, "ce": float(step), "audio_tokens": 250}
        metrics.add(step, row, {"asr": 3, "slot": 1 if step < 4 else 9}, every=2)
    first, second, fourth = capsys.readouterr().err.splitlines()
    assert first.startswith("step 1/100  ce 1.000  ctc 0.500  10.0 frames/token  2.00 s/step  512 tokens/s")
    assert first.endswith("50 audio h/h  MFU 12.3%  3.2 GiB  asr 75%, slot 25%  1:06:40 left")
    assert second.startswith("step 2/100  ce 1.500"), "a mean over the last two steps"
    assert "slot 62%, asr 38%" in fourth, "shares of the interval, not of the last step"


def test_a_row_without_most_of_it(tmp_path, capsys):
    metrics = Metrics(tmp_path, True, 2)
    metrics.add(1, {"ctc": 0.5, "ce": 0.0, "audio_tokens": 0}, {"asr": 2}, every=2)
    metrics.add(2, {}, {}, every=2)
    one, two = capsys.readouterr().err.splitlines()
    assert (one, two) == ("step 1/2  ctc 0.500", "step 2/2  ctc 0.500  0 s left"), "means over what there is"


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "7 s"), (99, "99 s"), (187, "3:07"), (3600, "1:00:00"), (90061, "25:01:01")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_rows_skipped_causes_and_validation(tmp_path, capsys):
    metrics = Metrics(tmp_path, True, 3)
    metrics.add(1, ROW, {"asr": 3}, every=10)
    metrics.add(2, {**ROW, "valid_ctc_wer": 0.25, "valid_slot": 0.5}, {"asr": 3}, 10, {"audio: corrupt": 2})
    one, two = read(tmp_path / FILE)
    assert one["step"] == 1 and one["tasks"] == {"asr": 3} and one["mfu"] == 0.123 and "skipped" not in one
    assert two["skipped"] == {"audio: corrupt": 2} and two["valid_ctc_wer"] == 0.25
    assert "step 2: CTC WER 25.0 %, slot 50% right" in capsys.readouterr().err
    assert (tmp_path / plots.FILE).exists(), "drawn after every validation"


def test_other_ranks_do_nothing(tmp_path, capsys):
    metrics = Metrics(tmp_path, False, 3)
    metrics.add(1, {**ROW, "valid_ctc_wer": 0.1}, {"asr": 1}, every=1)
    metrics.say("hello")
    metrics.draw()
    metrics.close()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().err


def test_resuming_forgets_the_rows_past_the_checkpoint(tmp_path):
    metrics = Metrics(tmp_path, True, 9)
    for step in range(1, 6):
        metrics.add(step, ROW, {"asr": 1}, every=100)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 6, "c')
    again = Metrics(tmp_path, True, 9)
    again.resume(3)
    again.add(4, ROW, {"asr": 2}, every=100)
    assert [(row["step"], row["tasks"]["asr"]) for row in read(tmp_path / FILE)] == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_summary():
    row = {"ce": 1, "valid_llm_wer": 0.08, "valid_ctc_wer": 0.123, "valid_slot": 0.75, "valid_s": 3, "valid_skipped": 1}
    assert summary(row) == "CTC WER 12.3 %, LLM WER 8.0 %, slot 75% right"
    assert summary({"ce": 1}) == ""


# -- loggers ---------------------------------------------------------------------------------------------------


def test_unknown_and_missing_loggers_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="^run.loggers: 'tensorbord' is not one of jsonl, tensorboard, wandb$"):
        Metrics(tmp_path, True, 1, ("jsonl", "tensorbord"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in loggers.KNOWN else real(name))
    for name in ("tensorboard", "wandb"):
        for main in (True, False):
            with pytest.raises(UserError, match=f"^run.loggers: {name} is not installed .pip install {name}.$"):
                Metrics(tmp_path, main, 1, ("jsonl", name))


def test_scalars_are_flat_numbers():
    row = {"step": 3, "ce": 1.5, "skipped_step": True, "tasks": {"asr": 3}, "skipped": {"audio: corrupt": 2}, "x": "y"}
    assert loggers.scalars(row) == {"ce": 1.5, "skipped_step": 1.0, "tasks/asr": 3.0, "skipped/audio: corrupt": 2.0}


def test_tensorboard_holds_what_the_rows_hold(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 4), (3, 5)):  # cut after step 4, gone on with from step 2
        metrics = Metrics(tmp_path, True, 5, ("jsonl", "tensorboard"))
        metrics.resume(first - 1)
        for step in range(first, last + 1):
            metrics.add(step, {**ROW, "ce": step + first / 10}, {"asr": step}, every=10)
        metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("ce")] == [
        (1, 1.1),
        (2, 2.1),
        (3, 3.3),
        (4, 4.3),
        (5, 5.3),
    ]
    assert [e.value for e in events.Scalars("tasks/asr")] == [1, 2, 3, 4, 5]


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    metrics = Metrics(tmp_path, True, 2, ("wandb",))
    metrics.add(1, ROW, {"asr": 1}, every=10)
    metrics.close()
    name = (tmp_path / "wandb_id").read_text()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{name}"))


# -- curves ----------------------------------------------------------------------------------------------------


def some_rows(count: int = 200) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for step in range(1, count + 1):
        slots = 1 + step * 5 // count
        row = {"step": step, "ctc": 3 / step + rng.random() / 9, "ce": 5 / step, "audio_tokens": 9}
        rows.append({**row, "tasks": {"asr": 10 - slots, "slot": slots}})
        if step % 50 == 0:
            rows[-1] |= {"valid_ctc_wer": 9 / step, "valid_llm_wer": 5 / step, "valid_slot": step / 200, "valid_s": 1}
    return rows


def test_task_shares_follow_what_was_drawn():
    steps, shares = plots.task_shares(some_rows(), windows=10)
    assert steps.tolist() == list(range(20, 201, 20)) and list(shares) == ["asr", "slot"]
    assert shares["slot"][0] == pytest.approx(0.1) and shares["slot"][-1] == pytest.approx(0.505)
    assert np.allclose(shares["asr"] + shares["slot"], 1)
    steps, _ = plots.task_shares(some_rows(30))
    assert steps.tolist() == [15, 30], "300 utterances are too few for more than two points"


def test_rare_tasks_are_others():
    rows = [{"step": step, "tasks": {f"t{i}": 20 - i for i in range(14)}} for step in range(1, 50)]
    _, shares = plots.task_shares(rows)
    assert list(shares) == [f"t{i}" for i in range(9)] + ["others"]
    assert shares["others"][0] == pytest.approx(sum(20 - i for i in range(9, 14)) / sum(20 - i for i in range(14)))


def test_many_tasks_are_bars(tmp_path):
    rows = [{**row, **{f"valid_t{i}": i / 14 for i in range(14)}} for row in some_rows(60)]
    plots.curves(rows, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "after step 60" in text and all(f"<!-- t{i} -->" in text for i in range(14)), "none is left out"


def test_curves_have_a_panel_for_what_there_is(tmp_path):
    from matplotlib.image import imread

    rows = some_rows()
    assert plots.curves(rows, tmp_path / "four.png")
    plain = [{key: value for key, value in row.items() if not key.startswith("valid")} for row in rows]
    assert plots.curves(plain, tmp_path / "two.png")
    four, two = (imread(tmp_path / f"{name}.png") for name in ("four", "two"))
    assert four.shape[0] > 1.5 * two.shape[0] and four.shape[1] == two.shape[1]
    assert four.std() > 0.05 and not (tmp_path / ".four.png").exists()


def test_losses_alone_are_in_the_other_picture(tmp_path):
    assert not plots.curves([{**row, "tasks": {"asr": 1}} for row in some_rows(20)][:19], tmp_path / "a.png")
    assert not plots.curves([], tmp_path / "a.png") and not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_leaves_a_gap(tmp_path):
    rows = json.loads(json.dumps(some_rows(30)).replace("null", "NaN"))
    rows[5]["ctc"] = rows[6]["ce"] = float("nan")
    del rows[7]["ctc"]
    assert plots.curves(rows, tmp_path / "a.svg")
    assert np.isfinite(plots._mean(np.array([1.0, np.nan, 3.0]), 2)).all()

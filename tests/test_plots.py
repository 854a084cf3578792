"""The picture of the CTC peaks: labels that make room for each other, rows for long audio, a file or none."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from soundwave_fast import plots


def test_labels_stay_where_they_are_if_there_is_room():
    times = [0.5, 1.0, 2.0]
    assert plots.spread(times, 0.1, 0.0, 3.0) == pytest.approx(times)
    assert len(plots.spread([], 0.1, 0.0, 3.0)) == 0


def test_close_labels_move_apart_round_their_middle():
    assert plots.spread([1.0, 1.04, 1.08, 2.5], 0.2, 0.0, 3.0) == pytest.approx([0.84, 1.04, 1.24, 2.5])


@pytest.mark.parametrize("count", [1, 7, 30, 200])
def test_labels_keep_their_distance_order_and_row(count):
    times = np.sort(np.random.default_rng(count).uniform(0.02, 4.98, count))
    places = plots.spread(times, 0.1, 0.05, 4.95)
    gap = min(0.1, 4.9 / max(count - 1, 1))  # 200 labels do not fit: they share what there is
    assert np.all(np.diff(places) >= gap - 1e-9) and 0.05 - 1e-9 <= places[0] and places[-1] <= 4.95 + 1e-9


@pytest.mark.parametrize("seconds", [0.3, 4.0, 11.0])
def test_drawn_labels_do_not_overlap(tmp_path, monkeypatch, seconds):
    rng, frames = np.random.default_rng(0), int(seconds * 25)
    at = np.sort(rng.choice(frames, max(2, int(seconds * 6)), replace=False)) * 0.04  # fast speech
    peaks = [(time, ["the", "kitchen", "$x", "un"][i % 4]) for i, time in enumerate(at)]
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    mel = rng.standard_normal((80, int(seconds * 100)))
    plots.ctc_peaks(mel, rng.uniform(size=frames), rng.uniform(size=frames) < 0.7, peaks, "p.png", "a $title " * 40)
    [figure] = drawn
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    tops = figure.axes[::2]
    assert len(tops) == int(np.ceil(seconds / plots.ROW_SECONDS))
    assert sum(len(axis.texts) for axis in tops) == len(peaks)
    renderer = canvas.get_renderer()
    for i, axis in enumerate(tops):
        boxes = [text.get_window_extent(renderer) for text in axis.texts]
        assert all(one.x1 <= two.x0 + 0.5 for one, two in zip(boxes, boxes[1:]))
        above = figure.axes[2 * i - 1].get_window_extent().y0 if i else figure.bbox.y1
        assert all(box.y1 <= above for box in boxes), "labels stay under the row above"


def test_a_picture_is_whole_or_not_there(tmp_path):
    with pytest.raises(ValueError, match="xyz"):
        plots.ctc_peaks(np.zeros((8, 30)), np.ones(7), np.zeros(7, bool), [(0.1, "a")], tmp_path / "p.xyz")
    assert list(tmp_path.iterdir()) == []

"""The examples run, and do what they say."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from tests.repo.docs_check import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs_as_a_script(path):
    done = subprocess.run([sys.executable, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_swapped_loss_trains_the_same():
    example = load("swap_ctc_loss")
    theirs = example.train(4)
    original = torch.nn.functional.ctc_loss
    with example.fast_ctc_loss():
        assert torch.nn.functional.ctc_loss is not original
        ours = example.train(4)
    assert torch.nn.functional.ctc_loss is original
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours[-1] < ours[0]


def test_auxiliary_loss_falls():
    losses = load("auxiliary_ctc").train(25)
    assert losses[-1][1] < 0.8 * losses[0][1]


def test_packing_keeps_one_row_a_run():
    example = load("pack_by_peaks")
    features = torch.randn(2, 10, example.H * example.D, requires_grad=True)
    tokens = torch.tensor([[1, 1, 0, 0, 2, 2, 2, 1, 1, 1], [0] * 10])
    short = example.shorten(features, tokens, torch.tensor([10, 6]))
    assert short.lengths.tolist() == [3, 1]
    assert short.index.tolist() == [0, 4, 7, 10]
    short.data.sum().backward()
    assert features.grad[0].abs().sum(1).min() > 0  # every frame is looked back at
    assert (features.grad[1, 6:] == 0).all()

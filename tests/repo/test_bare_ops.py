"""The ops as a library of their own: what importing them brings along, and what it costs."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.repo.docs_check import ROOT

BARE = {"torch", "triton", "numpy"}


def run(code: str, *flags: str) -> str:
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ops_import_nothing_but_torch_and_what_torch_imports():
    code = "import json, sys; import {}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    with_torch = set(json.loads(run(code.format("torch, torch.library, numpy"))))
    ours = set(json.loads(run(code.format("soundwave_fast.ops"))))
    assert ours - with_torch - BARE - {"soundwave_fast"} - set(sys.stdlib_module_names) == set()
    assert "triton" not in ours, "triton is imported where a kernel is launched, not before"


def _bare_site(folder: Path) -> Path:
    """A folder of links to torch, triton, numpy and what they require, out of this environment's packages."""
    keep, todo = set(), ["torch", "triton", "numpy"]
    while todo:
        name = todo.pop().lower().replace("_", "-")
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # torch names CUDA packages that a CPU build does without
            continue
        if name not in keep:
            keep.add(name)
            todo += [re.split(r"[ ;<>=!~\[(]", line)[0] for line in requires if "extra ==" not in line]
    for name in keep:
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}:
            link = folder / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
    return folder


@pytest.mark.slow
def test_ops_run_in_an_environment_with_nothing_else(tmp_path):
    code = """
try:
    import transformers
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("transformers should be out of reach")
import torch
from soundwave_fast.ops import ctc_loss, linear_ctc_loss, peak_gather, varlen_cross_attention
hidden, weight = torch.randn(2, 9, 8, requires_grad=True), torch.randn(11, 8)
targets, lengths, target_lengths = torch.tensor([[3, 4], [5, 6]]), [9, 7], [2, 2]
loss, tokens = linear_ctc_loss(hidden, weight, targets, lengths, target_lengths, return_argmax=True)
loss.backward()
kept = peak_gather(hidden.detach(), tokens, lengths, 0, True)
q = kept.data.view(-1, 2, 4)
out = varlen_cross_attention(q, q, q, kept.cu_seqlens, kept.cu_seqlens, kept.max_len, kept.max_len)
log_probs = torch.randn(9, 2, 11).log_softmax(-1)
print(float(ctc_loss(log_probs, targets, lengths, target_lengths)), tuple(out.shape), hidden.grad.norm())
"""
    environment = {"PYTHONPATH": os.pathsep.join([str(_bare_site(tmp_path)), str(ROOT)]), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_import_time_is_at_most_twice_torchs():
    code = "import time; a = time.perf_counter(); import {}; print(time.perf_counter() - a)"
    pairs = [
        (float(run(code.format("torch"))), float(run(code.format("soundwave_fast.ops")))) for _ in range(4)
    ]  # in turns: the machine's speed drifts
    assert min(ours for _, ours in pairs) <= 2 * min(torch for torch, _ in pairs)

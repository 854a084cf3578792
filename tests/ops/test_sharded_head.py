"""linear_ctc_loss inside the module that owns W, under fully_shard on two ranks: values and gradients of one rank."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops import sharded_head


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    script, out = Path(sharded_head.__file__), tmp_path / "out.pt"
    root = script.parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(script), str(out)], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(out, weights_only=False)
    head = sharded_head.Head()
    hidden, targets = sharded_head.utterances()
    hidden.requires_grad_()
    loss = head(hidden, targets)
    loss.backward()
    torch.testing.assert_close(sum(rank["loss"] for rank in two["ranks"]), loss.detach())
    torch.testing.assert_close(torch.cat([rank["hidden"] for rank in two["ranks"]]), hidden.grad)
    torch.testing.assert_close(two["weight"], head.weight.grad)
    for rank in two["ranks"]:
        assert "DTensor" in rank["refused"] and "full_tensor" in rank["refused"]

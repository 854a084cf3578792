"""Tuned sizes: defaults stay what they were, entries of the table reach the kernels, bad ones cost a warning alone."""

import functools
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.harness import ROOT
from csrc_triton import tuning
from csrc_triton.launch import chip
from soundwave_fast.ops import linear_ctc_passes
from soundwave_fast.ops.backend import use_backend
from tests.gpu import small_cases
from tests.ops.backends import DEVICE

CHIP, COMMITTED = tuning._chip(), tuning.PATH
READ = tuning._tables.__wrapped__
ROWS = {"BLOCK_N": 64, "BLOCK_D": 64, "num_warps": 4}
HALF, SINGLE = torch.bfloat16, torch.float32


def ctc(**shape) -> Callable[[], None]:
    return partial(small_cases.ctc, **shape)


# What the launchers ask for, as the kernels had it before there was a table: kernel, key, default, a call of the op.
DEFAULTS = [
    ("ctc_loss dense", "bytes 4, C 4096", {"BLOCK_T": 1, "BLOCK_C": 4096, "num_warps": 8}, ctc(C=5000, T=5)),
    ("ctc_loss dense", "bytes 2, C 64", {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 8}, ctc(dtype=HALF)),
    ("recursion", "bytes 4, K 32", {"num_warps": 1}, ctc()),
    ("recursion", "bytes 4, K 128", {"num_warps": 4}, ctc(S=100, T=4)),
    ("recursion", "bytes 4, K 1024", {"num_warps": 8}, small_cases.ctc_chunked),
    ("linear_ctc_loss update", "bytes 4, w 128", {"num_warps": 4}, partial(small_cases.linear_ctc, True)),
    ("linear_ctc_loss update", "bytes 4, w 4096", {"num_warps": 8}, partial(small_cases.linear_ctc, False, V=3000)),
    ("peak_gather rows", "bytes 4, D 64", ROWS, partial(small_cases.peaks, "first")),
    (
        "peak_gather rows",
        "bytes 4, D 2048",
        {"BLOCK_N": 4, "BLOCK_D": 1024, "num_warps": 4},
        partial(small_cases.peaks, "first", D=2000),
    ),
    ("peak_gather backward", "bytes 4, D 64", ROWS, partial(small_cases.peaks, "peak")),
    ("splice rows", "bytes 4, D 64", {**ROWS, "BLOCK_N": 16}, partial(small_cases.splicing, "right")),
    ("splice text backward", "bytes 4, D 64", ROWS, partial(small_cases.splicing, "left")),
    ("splice audio backward", "bytes 4, D 64", ROWS, partial(small_cases.splicing, "packed")),
]
# kernel, queries, head width, dtype, (most queries, keys, warps, stages)
ATTENTION = [
    ("forward", 5, 32, SINGLE, (64, 32, 8, 1)),
    ("forward", 5, 80, SINGLE, (32, 32, 8, 1)),
    ("forward", 5, 128, HALF, (128, 64, 8, 2)),
    ("stationary", 5, 32, SINGLE, (32, 32, 8, 1)),
    ("stationary", 5, 80, SINGLE, (16, 32, 8, 1)),
    ("stationary", 5, 64, HALF, (128, 64, 8, 2)),
    ("queries", 40, 32, SINGLE, (32, 32, 8, 1)),
    ("queries", 20, 80, SINGLE, (16, 16, 8, 1)),
    ("queries", 130, 32, HALF, (64, 64, 8, 2)),
    ("keys", 40, 32, SINGLE, (32, 32, 8, 1)),
    ("keys", 20, 128, SINGLE, (16, 16, 8, 1)),
    ("keys", 130, 32, HALF, (64, 64, 8, 2)),
    ("keys", 130, 128, HALF, (64, 64, 8, 1)),
]


def attention_default(kernel: str, queries: int, d: int, dtype: torch.dtype, sizes: tuple[int, ...]):
    key = f"bytes {dtype.itemsize}, d {128 if d > 64 else 64}"
    default = dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), sizes))
    return f"attention {kernel}", key, default, partial(small_cases.attention, queries, d, dtype=dtype)


DEFAULTS += [attention_default(*row) for row in ATTENTION]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """No table, whatever was committed or tuned here, nothing dropped, and a file read again by the next test."""
    monkeypatch.setattr(tuning, "_dropped", set())
    monkeypatch.setattr(tuning, "PATH", tmp_path / "absent.json")
    monkeypatch.setattr(tuning, "_tables", functools.cache(READ))


def in_force(monkeypatch, table: tuning.Table) -> None:
    monkeypatch.setattr(tuning, "_tables", lambda: {CHIP: table})


@pytest.mark.skipif(chip() != "sm_90", reason="other chips have other sizes")
@pytest.mark.parametrize(
    ("kernel", "key", "default", "case"), DEFAULTS, ids=[f"{row[0]}, {row[1]}" for row in DEFAULTS]
)
def test_defaults(monkeypatch, kernel, key, default, case):
    asked = {}

    def recording(kernel, key, default, start):
        asked[kernel] = (key, default)
        start(**default)

    monkeypatch.setattr(tuning, "launch", recording)
    torch.manual_seed(0)
    with use_backend("triton"):
        case()
    assert asked[kernel] == (key, default)


def test_default_chunks_of_the_vocabulary():
    def width(rows: int, columns: int, device: str) -> int:
        return linear_ctc_passes._width(torch.empty(rows, 4, device=device), columns)

    assert width(150, 49153, "cpu") == 7040
    assert [width(rows, 128257, "cpu") for rows in (1200, 600)] == [4352, 8064]
    assert width(6000, 128257, "meta") == 8064  # any other device has a GPU's limits
    with use_backend("triton"), tuning.use_table({"linear_ctc_loss chunks": {"bytes 4, D 4": {"columns": 1024}}}):
        assert width(150, 49153, "cpu") == 1024


def peaks() -> list[Tensor]:
    """Rows and gradient of a gather of 64 rows 300 wide."""
    from soundwave_fast.ops import peak_gather

    torch.manual_seed(1)
    features = torch.randn(2, 70, 300).to(DEVICE).requires_grad_()
    tokens = torch.randint(0, 3, (2, 70), device=DEVICE)
    with use_backend("triton"):
        rows = peak_gather(features, tokens, capacity=128).data
        return [rows.detach(), torch.autograd.grad(rows.square().sum(), features)[0]]


KEY = "bytes 4, D 512"


@pytest.mark.parametrize("own", [{"BLOCK_N": 2}, {"BLOCK_N": 16, "BLOCK_D": 128, "num_warps": 2}])
def test_entry_reaches_the_kernel(monkeypatch, own):
    truth = peaks()
    in_force(monkeypatch, {"peak_gather rows": {KEY: own}, "peak_gather backward": {"bytes 4, D 1": {"BLOCK_N": 1}}})
    seen = []
    launch = tuning.launch

    def spying(kernel, key, default, start):
        launch(kernel, key, default, lambda **sizes: (seen.append((kernel, sizes)), start(**sizes)))

    monkeypatch.setattr(tuning, "launch", spying)
    assert all(torch.equal(x, y) for x, y in zip(peaks(), truth))
    default = {"BLOCK_N": 8, "BLOCK_D": 512, "num_warps": 4}
    assert seen == [("peak_gather rows", {**default, **own}), ("peak_gather backward", default)]


def test_another_chip_and_unknown_names_change_nothing(monkeypatch):
    monkeypatch.setattr(tuning, "_tables", lambda: {"sm_999": {"a": {"b": {"x": 7}}}})
    assert tuning.sizes("a", "b", x=1) == {"x": 1}
    in_force(monkeypatch, {"a": {"b": {"y": 7}}})
    assert tuning.sizes("a", "b", x=1) == {"x": 1}
    with tuning.use_table({"a": {"b": {"x": 3}}}):
        assert tuning.sizes("a", "b", x=1, z=2) == {"x": 3, "z": 2}
    assert tuning.sizes("a", "b", x=1) == {"x": 1}


def test_a_backend_by_name(monkeypatch):
    tables = {CHIP: {"a": {"b": {"backend": "x"}, "c": {"n": 2}}}}
    tuning.check(tables)
    in_force(monkeypatch, tables[CHIP])
    assert [tuning.choice("a", key, "ours") for key in "bcd"] == ["x", "ours", "ours"]


def test_entry_that_cannot_run_is_dropped_once(monkeypatch):
    truth = peaks()
    in_force(monkeypatch, {"peak_gather rows": {KEY: {"BLOCK_N": 3}}})  # no power of two: no kernel
    with pytest.warns(RuntimeWarning, match="peak_gather rows, bytes 4, D 512 does not run"):
        assert all(torch.equal(x, y) for x, y in zip(peaks(), truth))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert all(torch.equal(x, y) for x, y in zip(peaks(), truth))


def test_sweeps_see_what_cannot_run():
    with tuning.use_table({"peak_gather rows": {KEY: {"BLOCK_N": 3}}}), pytest.raises(Exception):  # noqa: B017
        peaks()


def test_a_launch_that_fails_whatever_its_sizes_is_not_hidden(monkeypatch):
    in_force(monkeypatch, {"a": {"b": {"x": 2}}})

    def start(x: int) -> None:
        raise KeyError(f"x is {x}")

    with pytest.raises(KeyError, match="x is 1"):
        tuning.launch("a", "b", {"x": 1}, start)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"sm_90": 3}',
        '{"sm_90": {"a": {"b": {"backend": 3}}}}',
        '{"sm_90": {"a": {"b": {"BLOCK_N": 0}}}}',
        '{"sm_90": {"a": {"b": {"x": 1.5}}}}',
    ],
)
def test_damaged_table_costs_a_warning(tmp_path, monkeypatch, content):
    path = tmp_path / "tuned.json"
    path.write_text(content)
    monkeypatch.setattr(tuning, "PATH", path)
    with pytest.warns(RuntimeWarning, match="tuned.json"):
        assert tuning.sizes("a", "b", x=1) == {"x": 1}


def test_missing_table_is_no_matter():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.sizes("a", "b", x=1) == {"x": 1}


def test_committed_table_is_one():
    tables = json.loads(COMMITTED.read_text())
    tuning.check(tables)
    assert set(tables) <= {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}


def test_file_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({CHIP: {"a": {"b": {"x": 2}}}}))
    monkeypatch.setattr(tuning, "PATH", path)
    assert tuning.sizes("a", "b", x=1) == {"x": 2}
    path.unlink()
    assert tuning.sizes("a", "b", x=1) == {"x": 2}


@pytest.mark.slow
def test_a_tuning_leaves_the_tests_green():
    """Tests of tuning, of the figures and of some kernels pass with another table of sizes, whatever its keys.

    `pytest tests/ops --tuned` is the same for all kernels; it takes minutes.
    """
    tests = ["tests/ops/test_tuning.py", "tests/ops/test_peak_gather.py", "tests/bench/test_report.py"]
    tests += ["tests/contract/test_contract.py"]
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-n", "0", "-p", "no:cacheprovider", "--tuned"]
    command += ["-m", "not slow", "-k", "triton or tuning or report"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-500:]


def test_sizes_tuned_for_a_chip_do_not_reach_the_interpreter(tmp_path, monkeypatch):
    table = {name: {"a": {"b": {"x": 2}}} for name in ("sm_90", "gfx942")}
    (tmp_path / "tuned.json").write_text(json.dumps(table))
    monkeypatch.setattr(tuning, "PATH", tmp_path / "tuned.json")
    assert tuning.sizes("a", "b", x=1) == {"x": 2 if DEVICE == "cuda" and CHIP in table else 1}

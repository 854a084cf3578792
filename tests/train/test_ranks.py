"""Two ranks under torchrun: the losses and gradients of one process, the same files, and resuming on fewer ranks."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from soundwave_fast.model import checkpoint
from tests.model import tiny
from tests.train import gradients_on_ranks, hung_rank, runs
from tests.train.gradients_on_ranks import configuration, measure, prepare, scenarios
from tests.train.runs import stop_after
from train.config import load
from train.parallel import World
from train.trainer import Trainer

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ONE = World(0, 1, torch.device("cpu"))
ALL = {**runs.ADAPTERS, **runs.LORA}

pytestmark = pytest.mark.slow


def torchrun(*command: str) -> None:
    process = runs.start(*TORCHRUN, *command)
    try:
        _, errors = process.communicate(timeout=180)
    finally:
        process.kill()
    first = [line for line in errors.splitlines() if line.startswith("[rank0]")] or errors.splitlines()
    assert process.returncode == 0, "\n".join(first[-25:])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny_parts, speech_dir):
    """(config, stage directory all start from, folder of results of two ranks)."""
    folder = tmp_path_factory.mktemp("ranks")
    config = runs.write_config(folder / "tiny.yaml", tiny_parts, speech_dir, stage3={"optim": {"trainable": ALL}})
    model, processor = tiny.make_model(tiny_parts, adapter_dropout=0.0)
    checkpoint.save_stage_directory(tiny.add_lora(model), folder / "init", processor)
    arguments = (str(config), str(folder / "init"), str(speech_dir), str(folder))
    torchrun(gradients_on_ranks.__file__, *arguments)
    return config, folder / "init", folder


@pytest.fixture(scope="module")
def one(ranks):
    """Trainers of one process."""
    config, init, folder = ranks
    own = ("sharded", "cached", "bfloat16")
    return {variant: prepare(configuration(str(config), folder / "one", str(init), variant), ONE) for variant in own}


EXACT = [variant for variant in gradients_on_ranks.VARIANTS if variant != "bfloat16"]
CASES = list(product(("uneven", "halves", "silent", "infeasible"), EXACT))


@pytest.mark.parametrize(("scenario", "variant"), CASES, ids=str)
def test_losses_and_gradients_are_those_of_one_process(ranks, one, speech_dir, scenario, variant):
    """One process has neither shards nor replicas, neither checkpointed layers nor packed batches."""
    _, _, folder = ranks
    ours = torch.load(folder / "gradients.pt")[scenario, variant]
    trainer = one["cached" if variant == "cached" else "sharded"]
    whole = measure(trainer, [item for part in scenarios(speech_dir)[scenario] for item in part])
    assert ours.keys() == whole.keys() and len(ours) > 20
    for name, truth in whole.items():
        assert truth.any(), name
        error = (ours[name] - truth).abs().max() / truth.abs().max()
        assert error <= 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("scenario", ["uneven", "silent"])
def test_bfloat16_is_no_worse_than_autocast(ranks, one, speech_dir, scenario):
    """FSDP's policy also rounds what autocast leaves in float32: against float32 it may err twice as much, no more."""
    _, _, folder = ranks
    ours = torch.load(folder / "gradients.pt")[scenario, "bfloat16"]
    items = [item for part in scenarios(speech_dir)[scenario] for item in part]
    cast, truth = measure(one["bfloat16"], items), measure(one["sharded"], items)
    assert ours.keys() == truth.keys()
    for name, exact in truth.items():
        assert ours[name].dtype == cast[name].dtype, "gradients are reduced in float32, losses summed in float64"
        mine, eager = ((value - exact).norm() for value in (ours[name], cast[name]))
        assert mine <= 2 * eager + 0.02 * exact.norm(), f"{name}: {mine / exact.norm():.1e}, {eager / exact.norm():.1e}"


@pytest.mark.parametrize("variant", gradients_on_ranks.VARIANTS)
def test_sharded_parts_are_saved_whole(ranks, variant):
    _, init, folder = ranks
    for file in ("adapters.safetensors", "lora/adapter_model.safetensors"):
        before, after = (load_file(path / file) for path in (init, folder / variant))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), file


def test_frozen_sharded_adapters_are_saved_whole(ranks, tiny_parts, speech_dir, tmp_path):
    """Stage 3 as in the presets: the alignment adapter is frozen, sharded all the same, and must be written in full."""
    _, init, _ = ranks
    config = runs.write_config(tmp_path / "tiny.yaml", tiny_parts, speech_dir)
    more = ("--config", str(config), "--init", str(init), "--out", str(tmp_path / "out"), "optim.steps=1")
    torchrun("train/stage3.py", *more)
    before, after = (load_file(path / "adapters.safetensors") for path in (init, tmp_path / "out"))
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (not name.startswith("shrinking_adapter")), name
    assert json.loads((tmp_path / "out" / "done.json").read_text())["valid"]["utterances"] == 2


def test_three_stages_end_to_end(tiny_parts, speech_dir, tmp_path):
    """Each from what the one before left, validated by both ranks."""
    config = runs.write_config(tmp_path / "tiny.yaml", tiny_parts, speech_dir)
    out = [tmp_path / f"stage{number}" for number in (1, 2, 3)]
    for number, init in zip((1, 2, 3), (None, *out)):
        more = () if init is None else ("--init", str(init))
        torchrun(
            f"train/stage{number}.py", "--config", str(config), "--out", str(out[number - 1]), *more, "optim.steps=2"
        )
        assert [row["step"] for row in runs.rows(out[number - 1])] == [1, 2]
        valid = json.loads((out[number - 1] / "done.json").read_text())["valid"]
        assert valid["utterances"] == 2 and ("llm_wer" in valid) == (number > 1), valid
    before, after = (load_file(path / "lora" / "adapter_model.safetensors") for path in out[1:])
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert (out[2] / "config.yaml").is_file() and (out[2] / "environment.json").is_file()


def test_two_ranks_begin_and_one_goes_on(tiny_parts, speech_dir, tmp_path, monkeypatch, capsys):
    config = runs.write_config(tmp_path / "tiny.yaml", tiny_parts, speech_dir)
    out, more = tmp_path / "out", ("optim.steps=4", "run.valid_utterances=0", "run.save_every=0")
    two_ranks = ("train/stage1.py", "--config", str(config), "--out", str(out), *more[1:])
    torchrun(*two_ranks, "optim.steps=1")
    first = runs.losses(out)
    torchrun(*two_ranks, "optim.steps=2", "data.workers=1")
    assert [row["step"] for row in runs.rows(out)] == [1, 2] and runs.losses(out)[:1] == first
    assert json.loads((out / "environment.json").read_text())[-1]["changed_settings"] == {
        "data.workers": [0, 1],
        "optim.steps": [1, 2],
    }, "both ranks went on, from what both had read"
    dcp_to_torch_save(out / "checkpoints" / "step-0000002", tmp_path / "whole.pt")
    saved = torch.load(tmp_path / "whole.pt")["model"]
    trainer = Trainer(load(str(config), 1, {"run.out": str(out)}, more), 1, ONE)
    fresh = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.resume()
    assert trainer.step == 2 and saved.keys() == fresh.keys()
    for name, start in fresh.items():
        parameter = trainer.model.get_parameter(name)
        assert torch.equal(parameter, saved[name]) and not torch.equal(parameter, start), name
        assert trainer.optimizer.state[parameter]["step"] == 2 and trainer.optimizer.state[parameter]["exp_avg"].any()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert runs.run(1, config, out, *more) == 0
    said = capsys.readouterr().err
    assert f"resuming {out} at step 2; 2 ranks before, 1 now: data drawn afresh" in said
    assert "goes on with optim.steps 2 -> 4" in said
    assert runs.run(1, config, out, *more) == 0, "where it was in what was drawn anew"
    assert [row["step"] for row in runs.rows(out)] == [1, 2, 3, 4]


def test_mistakes_are_one_line_for_all_ranks(tiny_parts, speech_dir, tmp_path):
    config = runs.write_config(tmp_path / "tiny.yaml", tiny_parts, speech_dir)
    process = runs.start(*TORCHRUN, "train/stage1.py", "--config", str(config), "--train", "nowhere.jsonl")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert [line for line in errors.splitlines() if line.startswith("stage 1: ")] == [
        "stage 1: --out: no output directory"
    ]
    process = runs.start(
        *TORCHRUN, "train/stage1.py", "--config", str(config), "--train", "nowhere.jsonl", "--out", str(tmp_path / "o")
    )
    _, errors = process.communicate(timeout=120)
    assert errors.count("nowhere.jsonl: no such manifest") == 1 and "trainer.py" not in errors
    assert "stage 1: nowhere.jsonl" in errors, "the first rank says it, whichever met it first"


ALONE = """
import os, resource, sys
sys.path.insert(0, {root!r})
from train import stage
arguments = sys.argv[1:]
if os.environ["RANK"] == "1":
    {change}
sys.exit(stage.main(1, arguments))
"""


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ('arguments += ["--llm", "/nowhere/llm"]', "stage 1, rank 1: model.llm: "),
        ('arguments += ["--train", "nowhere.jsonl"]', "stage 1, rank 1: nowhere.jsonl: no such manifest"),
        # what rank 0 is told: it could write, but does not go on
        (
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))",
            "stage 1: rank 1: {out}/checkpoints: file too large; the last checkpoint is intact",
        ),
    ],
    ids=["no LLM", "no manifest", "no space"],
)
def test_what_one_rank_meets_alone_is_said(tiny_parts, speech_dir, tmp_path, change, line):
    """As on a second node that lacks a folder, or whose disk is full."""
    config, script, out = tmp_path / "tiny.yaml", tmp_path / "alone.py", tmp_path / "out"
    runs.write_config(config, tiny_parts, speech_dir)
    script.write_text(ALONE.format(root=str(runs.ROOT), change=change))
    more = ("--config", str(config), "--out", str(out), "optim.steps=1", "run.valid_utterances=0")
    process = runs.start(*TORCHRUN, str(script), *more)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    said = [text for text in errors.splitlines() if text.startswith("stage 1")]
    assert len(said) == 1 and said[0].startswith(line.format(out=out)), errors


def test_a_hung_rank_is_named(tiny_parts, speech_dir, tmp_path):
    config = runs.write_config(tmp_path / "tiny.yaml", tiny_parts, speech_dir)
    more = ("--config", str(config), "--out", str(tmp_path / "out"), "run.hang_seconds=3", "run.save_every=0")
    process = runs.start(*TORCHRUN, hung_rank.__file__, *more, "run.valid_utterances=0", "optim.steps=8")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("stage 1: ")]
    assert (
        "stage 1: no progress for 3 s: rank 1 hangs at step 3: loss and gradient norm while the others wait at "
        "step 3: agreeing on what is next; the last checkpoint is intact"
    ) in said
    assert any(line.startswith("stage 1: rank 1 stands in ") and "hung_rank.py" in line for line in said)
    assert not (tmp_path / "out" / "done.json").exists()

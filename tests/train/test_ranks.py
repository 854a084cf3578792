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
from tests.train import gradients_on_ranks, runs
from tests.train.gradients_on_ranks import configuration, measure, prepare, scenarios
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


CASES = list(product(("uneven", "halves", "silent"), (False, True)))


@pytest.mark.parametrize(("scenario", "cache"), CASES, ids=str)
def test_losses_and_gradients_are_those_of_one_process(ranks, speech_dir, scenario, cache):
    config, init, folder = ranks
    ours = torch.load(folder / "gradients.pt")[scenario, cache]
    trainer = prepare(configuration(str(config), folder / "one", str(init), cache), ONE)
    whole = measure(trainer, [item for part in scenarios(speech_dir)[scenario] for item in part])
    assert ours.keys() == whole.keys() and len(ours) > 20
    for name, truth in whole.items():
        assert truth.any(), name
        error = (ours[name] - truth).abs().max() / truth.abs().max()
        assert error <= 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("cache", [False, True])
def test_sharded_parts_are_saved_whole(ranks, cache):
    _, init, folder = ranks
    for file in ("adapters.safetensors", "lora/adapter_model.safetensors"):
        before, after = (load_file(path / file) for path in (init, folder / f"cache-{cache}"))
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


def test_two_ranks_begin_and_one_goes_on(tiny_parts, speech_dir, tmp_path, capsys):
    config = runs.write_config(tmp_path / "tiny.yaml", tiny_parts, speech_dir)
    out, more = tmp_path / "out", ("optim.steps=3", "run.valid_utterances=0", "run.save_every=0")
    torchrun("train/stage1.py", "--config", str(config), "--out", str(out), *more)
    assert [row["step"] for row in runs.rows(out)] == [1, 2, 3]
    (out / "done.json").unlink()
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
    assert runs.run(1, config, out, *more) == 0
    assert f"resuming {out} at step 2" in capsys.readouterr().err
    assert [row["step"] for row in runs.rows(out)] == [1, 2, 3]


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

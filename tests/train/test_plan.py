"""The planner: the paper's sizes, counts against a real model and torch's own counters, docs that are up to date."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from soundwave_fast.errors import UserError
from tests.model import tiny
from tests.train import runs
from train import architectures, build, cost, memory, plan
from train.config import NEUTRAL, PRESETS, load

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paper():
    return plan.make(load("paper", 2), 2, 8, "H100-SXM")


def test_the_papers_sizes(paper):
    millions = {part: round(count.total / 1e6, 1) for part, count in paper.parameters.items()}
    assert millions == {
        "Whisper encoder": 637.0,
        "alignment adapter": 144.8,
        "CTC head": 525.3,  # 128257 x 4096
        "shrinking adapter": 67.1,
        "LLM": 8030.3,
        "LoRA": 167.8,
    }
    trained = {part for part, count in paper.parameters.items() if count.trained}
    assert trained == {"alignment adapter", "shrinking adapter", "LoRA"}
    assert paper.fits


@pytest.mark.parametrize(
    ("whisper", "encoder", "llm", "parameters"),
    [
        ("openai/whisper-tiny.en", 8.2, "HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("openai/whisper-tiny", 8.2, "HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120),
        ("openai/whisper-base", 20.6, "HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384),
        ("openai/whisper-base.en", 20.6, "HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("openai/whisper-small.en", 88.2, "HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("openai/whisper-medium.en", 307.2, "HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_parts_that_are_known_by_their_hub_names(capsys, whisper, encoder, llm, parameters):
    """No network: millions of the encoder's parameters, and the LLM's as its model card counts them."""
    parts = [f"model.whisper={whisper}", f"model.llm={llm}"]
    assert plan.main(["--preset", NEUTRAL, "--gpus", "1", "--stage", "2", *parts]) == 0
    assert f"stage 2: {whisper} + {llm}" in capsys.readouterr().out
    counts = memory.parameters(architectures.meta_model(load(NEUTRAL, 2, settings=parts), 2))
    assert (round(counts["Whisper encoder"].total / 1e6, 1), counts["LLM"].total) == (encoder, parameters)


def test_the_presets_trained_parts():
    """Stage 1: adapter and head, or only its blank row; stage 3: LoRA alone."""
    one, three = (plan.make(load("paper", stage), stage, 8, "H100-SXM").parameters for stage in (1, 3))
    assert {part for part, count in one.items() if count.trained} == {"alignment adapter", "CTC head"}
    assert "LLM" not in one and one["LLM's embedding"].total == 128256 * 4096
    assert {part for part, count in three.items() if count.trained} == {"LoRA"}
    tied = plan.make(load("paper", 1, settings=["model.ctc_head=tied"]), 1, 8, "H100-SXM").parameters
    assert (tied["CTC head"].total, tied["CTC head"].trained) == (4096, 4096)


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_preset_fits_its_machine(name, stage):
    """Sizes are known without network, and the regexes of the trainable table all match something."""
    gpus, chip = {"paper": (8, "H100-SXM")}.get(name, (1, "RTX-4090"))
    middle = load("middle", stage).model
    parts = [f"model.whisper={middle.whisper}", f"model.llm={middle.llm}"] if name == NEUTRAL else []
    assert plan.make(load(name, stage, settings=parts), stage, gpus, chip).fits


def test_what_is_sharded_shrinks(paper):
    double = plan.make(load("paper", 2), 2, 16, "H100-SXM").memory
    copies = plan.make(load("paper", 2, settings=["run.replicate=2"]), 2, 16, "H100-SXM").memory
    for kind in ("frozen weights", "float32 masters", "gradients", "Adam's moments"):
        assert double[kind] == pytest.approx(paper.memory[kind] / 2)
        assert copies[kind] == pytest.approx(paper.memory[kind])
    assert double["activations"] == paper.memory["activations"]
    assert paper.memory["Adam's moments"] * 8 == 8 * (144760832 + 67133440 + 167772160)


def test_recomputing_trades_time_for_memory(paper):
    less = plan.make(load("paper", 2, settings=["run.activation_checkpointing=true"]), 2, 8, "H100-SXM")
    assert less.memory["activations"] < paper.memory["activations"] / 5
    assert 1.3 < less.compute["LLM"] / paper.compute["LLM"] < 1.55


def test_70b_does_not_fit_everywhere():
    config = load("paper", 2, settings=[f"model.llm={plan.LLM_70B}", "run.activation_checkpointing=true"])
    few, many = (plan.make(config, 2, gpus, "H100-SXM") for gpus in (1, 16))
    assert not few.fits and many.fits
    assert round(few.parameters["LLM"].total / 1e9, 1) == 70.6


def test_the_floor_falls_with_gpus(paper):
    one = plan.make(load("paper", 2), 2, 1, "H100-SXM")
    assert one.exchange == 0 and one.hours(10_000) == pytest.approx(8 * paper.hours(10_000), rel=0.05)


# -- against what really happens -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_parts, speech_dir):
    folder = tmp_path_factory.mktemp("plan")
    path = runs.write_config(folder / "tiny.yaml", tiny_parts, speech_dir)
    assert runs.run(1, path, folder / "stage1", "optim.steps=0", "run.valid_utterances=0") == 0
    return load(str(path), 2, {"run.init": str(folder / "stage1")})


def test_meta_counts_are_the_real_models(config):
    from train import freeze

    real, _ = build.build(config, 2, CPU)
    freeze.parameter_groups(real, config.optim.trainable, 0.0)
    assert memory.parameters(architectures.meta_model(config, 2)) == memory.parameters(real)


def test_kept_activations_are_those_of_a_real_layer(tiny_parts):
    """The flash kernel of a CPU keeps one float32 a head and token more: its log-sum-exps."""
    model, _ = tiny.make_model(tiny_parts)
    model = tiny.add_lora(model).to(torch.bfloat16).train()
    counted = memory.kept_per_token(copy.deepcopy(model).to("meta"), tokens=32)
    llm = model.causal_lm.model
    hidden = torch.randn(1, 32, llm.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(32)[None]
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rotary = llm.rotary_emb(hidden, positions)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = llm.layers[0](hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 32
    assert out is not None and counted == pytest.approx(real, rel=0.1)


def test_flops_of_the_llm_are_torchs_count(tiny_parts):
    """torch counts the whole square of a causal attention, and the products of LoRA, here on three of seven layers."""
    model, _ = tiny.make_model(tiny_parts)
    llm, tokens = tiny.add_lora(model, rank=4).causal_lm.train(), 40
    embeds = torch.randn(2, tokens, 48, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden = llm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        llm.lm_head(hidden[:, -5:]).sum().backward()
    work = cost.Work(utterances=2, encoder_frames=0, audio_tokens=30, text_tokens=2 * tokens - 30, predicted=10)
    ours = cost.llm(model.config, work, "float32", lora_rank=2).flops
    square = 6 * 2 * 2 * tokens * tokens * 48  # of 2 layers: what torch counts of the masked half
    assert ours + square == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_flops_of_the_encoder_are_torchs_count(tiny_parts):
    model, _ = tiny.make_model(tiny_parts)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.encode(torch.randn(2, 80, 600), torch.tensor([600, 600]))
    ours = cost.encoder(model.config, cost.Work(utterances=2, encoder_frames=600), "float32").flops
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.1)


# -- command line and docs -------------------------------------------------------------------------------------


def test_the_docs_hold_todays_table():
    text = (runs.ROOT / "docs" / "scale.md").read_text()
    assert plan.tables() in text, "python train/plan.py --update docs/scale.md"


def test_update_replaces_what_stands_between_the_marks(tmp_path):
    path = tmp_path / "doc.md"
    path.write_text(f"before\n{plan.BEGIN}\nold\n{plan.END}\nafter\n")
    plan.update(path, "new")
    assert path.read_text() == f"before\n{plan.BEGIN}\nnew\n{plan.END}\nafter\n"
    path.write_text("no marks")
    with pytest.raises(UserError, match="has no"):
        plan.update(path, "new")


def test_from_a_checkout(capsys):
    done = subprocess.run(
        [sys.executable, "train/plan.py", "--preset", "nano", "--gpus", "1", "--chip", "RTX-4090", "--stage", "2"],
        cwd=runs.ROOT, capture_output=True, text=True, env=runs.environment(),
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    for words in ("alignment adapter", "Adam's moments", "fits", "floor of a step", "10,000 h of audio once"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chip", "H101"], "--chip H101: not one of"),
        (["--preset", "papier"], "no such file or preset"),
        (["model.llm=nowhere/llm"], "'nowhere/llm' is no folder, and not one of the known"),
        (["--gpus", "8", "run.replicate=3"], "run.replicate: 3 does not divide 8 GPUs"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert plan.main(arguments) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out

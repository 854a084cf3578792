"""What a run would need: parameters, memory of a GPU by kind, floor of the step time; on paper, without weights."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # works without installation

from soundwave_fast import cost_model
from soundwave_fast.cost_model import Cost
from soundwave_fast.errors import ArgumentParser, UserError, run_command
from train.config import Config, load

GIB = 2**30
LLM_70B = "meta-llama/Llama-3.1-70B-Instruct"
TABLE_GPUS = (1, 2, 4, 8, 16, 32, 64)
BEGIN, END = "<!-- plan: begin -->", "<!-- plan: end -->"


@dataclasses.dataclass(frozen=True)
class Box:
    """A GPU's memory (10^9 bytes) and its links, 10^9 bytes/s each way: to its neighbours and to other nodes."""

    memory: float
    link: float
    network: float = 50.0  # 400 Gbit/s a GPU


# Vendors' data sheets; NVLink or Infinity Fabric where there is one, else PCIe.
BOXES = {
    "A100-SXM": Box(80, 300),
    "H100-SXM": Box(80, 450),
    "H200": Box(141, 450),
    "B200": Box(180, 900),
    "L40S": Box(48, 32),
    "RTX-4090": Box(24, 32),
    "MI300X": Box(192, 448),
}


@dataclasses.dataclass(frozen=True)
class Speech:
    """What the audio is like; the defaults are round numbers, not measurements."""

    seconds: float = 10.0  # of an utterance
    text_per_second: float = 3.5  # tokens of the transcript, which is the answer
    audio_per_second: float = 5.0  # tokens that reach the LLM, out of 25 frames
    prompt: int = 40  # tokens around the audio


@dataclasses.dataclass(frozen=True)
class Plan:
    """Figures of one stage. Seconds are floors: no run is faster, real ones reach about half of it."""

    config: Config
    stage: int
    gpus: int
    chip: str
    parameters: dict
    memory: dict[str, float]  # kind -> bytes on one GPU
    compute: dict[str, float]  # part -> seconds of a step
    exchange: float  # seconds that gathering and reducing take, hidden behind the compute where shorter
    optimizer: float

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        from train.memory import USABLE

        return self.total <= USABLE * BOXES[self.chip].memory * 1e9

    @property
    def step(self) -> float:
        return max(sum(self.compute.values()), self.exchange) + self.optimizer

    def hours(self, audio_hours: float) -> float:
        """The least time to go once through so much audio."""
        heard = self.config.data.batch_seconds * self.config.optim.accumulate * self.gpus
        return audio_hours * 3600 / heard * self.step / 3600


def _work(config: Config, stage: int, speech: Speech):
    from train.cost import Work

    seconds = config.data.batch_seconds
    utterances = max(1, min(config.data.batch_size, round(seconds / speech.seconds)))
    candidates = config.optim.ctc_candidates if stage == 1 else 0
    if stage == 1:
        return Work(utterances, int(50 * seconds), ctc_classes=candidates)
    answers = int(speech.text_per_second * seconds)
    text = answers + speech.prompt * utterances
    return Work(utterances, int(50 * seconds), int(speech.audio_per_second * seconds), text, answers)


def _exchange(model, shards: int, gpus: int, per_node: int, box: Box) -> float:
    """FSDP: weights gathered forward and backward (the encoder's forward only), gradients scattered; HSDP: + all."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    encoder = sum(p.numel() for p in model.audio_tower.parameters())
    total = sum(p.numel() for p in model.parameters())
    link = box.link if shards <= per_node else box.network
    moved = (2 * encoder + 2 * 2 * (total - encoder) + 4 * trained) * (shards - 1) / shards
    copies = gpus // shards
    across = 2 * 4 * trained / shards * (copies - 1) / copies
    return moved / (link * 1e9) + across / (box.network * 1e9 if gpus > per_node else link * 1e9)


def make(
    config: Config,
    stage: int,
    gpus: int,
    chip: str,
    speech: Speech | None = None,
    per_node: int = 8,
    model: Any = None,
) -> Plan:
    """Plan of one stage on `gpus` GPUs, sharded over gpus / run.replicate of them.

    Args:
        model: `architectures.meta_model(config, stage)`, where it is there already.

    Raises:
        UserError: an unknown chip, parts of unknown size, replicas that do not divide the GPUs.
    """
    from train import architectures, cost, memory

    if chip not in BOXES:
        raise UserError(f"--chip {chip}: not one of {', '.join(BOXES)}")
    replicate = config.run.replicate
    if gpus < 1 or gpus % replicate:
        raise UserError(f"run.replicate: {replicate} does not divide {gpus} GPUs")
    model = architectures.meta_model(config, stage) if model is None else model
    work, box, peak = _work(config, stage, speech or Speech()), BOXES[chip], cost_model.CHIPS[chip]
    recomputed = config.run.activation_checkpointing
    costs = cost.parts(model.config, stage, work, "bfloat16", config.model.lora_rank, recomputed)
    repeat = config.optim.accumulate
    compute = {part: repeat * cost_model.floor_seconds(each, peak, "bfloat16") for part, each in costs.items()}
    shards = gpus // replicate
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adam = Cost(0.0, 7 * 4 * trained / shards)  # reads weight, gradient and two moments, writes three of them
    return Plan(
        config=config,
        stage=stage,
        gpus=gpus,
        chip=chip,
        parameters=memory.parameters(model),
        memory=memory.by_kind(model, config, work, shards),
        compute=compute,
        exchange=repeat * _exchange(model, shards, gpus, per_node, box) if gpus > 1 else 0.0,
        optimizer=cost_model.floor_seconds(adam, peak, "bfloat16"),
    )


def lines(plan: Plan, hours: float) -> list[str]:
    """The plan for people."""
    model, box = plan.config.model, BOXES[plan.chip]
    out = [f"stage {plan.stage}: {model.whisper} + {model.llm}", f"  {'parameters':24s} {'all':>10s} {'trained':>10s}"]
    for part, count in plan.parameters.items():
        trained = f"{count.trained / 1e6:8.1f} M" if count.trained else "-"
        out.append(f"  {part:24s} {count.total / 1e6:8.1f} M {trained:>10s}")
    copies = plan.config.run.replicate
    sharded = f"sharded over {plan.gpus // copies}" + (f", {copies} copies" if copies > 1 else "")
    out.append(f"  memory of each of {plan.gpus} x {plan.chip}, {sharded}")
    out += [f"    {kind:22s} {size / GIB:8.2f} GiB" for kind, size in plan.memory.items() if size]
    fits = "fits" if plan.fits else "DOES NOT FIT"
    out.append(f"    {'together':22s} {plan.total / GIB:8.2f} GiB of {box.memory * 1e9 / GIB:.1f}: {fits}")
    share = ", ".join(f"{part} {1e3 * seconds:.0f}" for part, seconds in plan.compute.items())
    out.append(f"  floor of a step {1e3 * plan.step:.0f} ms ({share}; exchange {1e3 * plan.exchange:.0f}, hidden where")
    out.append(f"    shorter; AdamW {1e3 * plan.optimizer:.0f}), {plan.config.data.batch_seconds:.0f} s of audio a GPU")
    out.append(f"  {hours:,.0f} h of audio once: at least {plan.hours(hours):.1f} h")
    return out


def table(config: Config, llm: str, chip: str, hours: float, recomputed: bool) -> list[str]:
    """Markdown: one row a number of GPUs, stage 2. HSDP: past one node of 8, copies of 8 GPUs each."""
    from train import architectures

    config = dataclasses.replace(config, model=dataclasses.replace(config.model, llm=llm))
    model = architectures.meta_model(config, 2)
    out = ["| GPUs | sharding | memory of a GPU, GiB | fits | floor of a step, s | h for the audio, at least |"]
    out.append("|---:|---|---:|---|---:|---:|")
    for gpus in TABLE_GPUS:
        copies = max(1, gpus // 8)
        run = dataclasses.replace(config.run, replicate=copies, activation_checkpointing=recomputed)
        plan = make(dataclasses.replace(config, run=run), 2, gpus, chip, model=model)
        sharding = f"{copies} x {gpus // copies}" if copies > 1 else str(gpus)
        fits = "yes" if plan.fits else "no"
        out.append(
            f"| {gpus} | {sharding} | {plan.total / GIB:.1f} | {fits} | {plan.step:.2f} | {plan.hours(hours):,.1f} |"
        )
    return out


def tables(preset: str = "paper", chip: str = "H100-SXM", hours: float = 10_000) -> str:
    """The generated part of docs/scale.md."""
    config = load(preset, 2)
    own, batch = config.model.llm, f"{config.data.batch_seconds:.0f} s of audio a GPU and step"
    what = f"Stage 2 of `{preset}` on {chip}, {batch}, {hours:,.0f} h of audio"
    rows = [f"{what}; past one node `run.replicate` = nodes of 8 GPUs:", ""]
    rows += table(config, own, chip, hours, recomputed=False)
    rows += ["", f"The same with {LLM_70B.split('/')[1]}, with activation checkpointing:", ""]
    return "\n".join([*rows, *table(config, LLM_70B, chip, hours, recomputed=True)])


def update(path: Path, text: str) -> None:
    """Put `text` between the two marks of a file."""
    before, mark, rest = path.read_text().partition(BEGIN)
    _, other, after = rest.partition(END)
    if not mark or not other:
        raise UserError(f"--update {path}: has no {BEGIN} ... {END}")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    os.replace(temporary, path)


def _run(argv: list[str]) -> None:
    parser = ArgumentParser(prog="train/plan.py", description=__doc__)
    parser.add_argument("--preset", "--config", default="paper", help="a preset or a YAML file [%(default)s]")
    parser.add_argument("--gpus", type=int, default=8, help="[%(default)s]")
    parser.add_argument("--chip", default="H100-SXM", help=f"{', '.join(BOXES)} [%(default)s]")
    parser.add_argument("--per-node", type=int, default=8, help="GPUs of a node [%(default)s]")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), help="[all three]")
    parser.add_argument("--hours", type=float, default=10_000, help="of audio [%(default)s]")
    parser.add_argument("--table", action="store_true", help="markdown for 1 ... 64 GPUs, and with a 70B LLM")
    parser.add_argument("--update", type=Path, metavar="FILE", help="put that table between the marks of FILE")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    if args.table or args.update:
        text = tables(args.preset, args.chip, args.hours)
        update(args.update, text) if args.update else print(text)
        return
    for stage in (args.stage,) if args.stage else (1, 2, 3):
        config = load(args.preset, stage, settings=args.settings)
        print("\n".join(lines(make(config, stage, args.gpus, args.chip, per_node=args.per_node), args.hours)))


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit code is `run_command`'s."""
    return run_command("plan", _run, argv)


if __name__ == "__main__":
    sys.exit(main())

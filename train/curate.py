"""Curates ASR data: prepare manifest shards, transcribe them with Whisper, select by named reasons, report.

    curate run SOURCE... --out DIR --model M     the first three steps below in one process
    curate prepare SOURCE... --out DIR           any source -> DIR/input/shard-*.jsonl
    curate transcribe DIR --model M              -> DIR/scored/shard-*.jsonl; under torchrun, one rank a GPU
    curate select DIR --max-wer 0.1              -> kept.jsonl, dropped.jsonl, report.html; in seconds, again and again
    curate instruct MANIFEST --out FILE          'transcribe, then answer' rows
    curate spoken-qa --out DIR                   spoken questions from text questions

`soundwave curate ...` and `python train/curate.py ...` are the same. docs/curation.md tells more.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from soundwave_fast.errors import ArgumentParser, UserError, run_command
from train.curation.reasons import Limits
from train.curation.shards import Job, write_jsonl

FORMAT = 1  # of the scored shards: raise it when the same settings would give other measurements


def _parser() -> argparse.ArgumentParser:
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = ArgumentParser(prog="soundwave curate", description=__doc__, **raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="STEP")
    subs = {
        name: commands.add_parser(name, help=what, description=what)
        for name, what in (
            ("run", "prepare, transcribe and select in one process"),
            ("prepare", "cut sources into manifest shards"),
            ("transcribe", "transcribe and score the shards that are not finished"),
            ("select", "apply limits to the scored shards and report"),
            ("instruct", "'transcribe, then answer' rows from an ASR manifest"),
            ("spoken-qa", "spoken questions from text questions, through a piper voice"),
        )
    }
    for name in ("run", "prepare"):
        _add_prepare(subs[name])
    for name in ("transcribe", "select"):
        subs[name].add_argument("out", type=Path, metavar="DIR", help="folder given to `curate prepare --out`")
    for name in ("run", "transcribe"):
        _add_transcribe(subs[name])
    for name in ("run", "select"):
        _add_select(subs[name])
    _add_instructions(subs["instruct"], subs["spoken-qa"])
    return parser


def _add_prepare(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="[NAME=][FORMAT:]PATH; formats: jsonl, lhotse, folder, librispeech, commonvoice, gigaspeech, voxpopuli",
    )
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub.add_argument("--parts", default="", help="parts of a corpus by comma, e.g. train-clean-100 [all; train]")
    sub.add_argument("--shard-size", type=int, default=512, help="utterances per shard [%(default)s]")
    sub.add_argument("--jobs", type=int, default=1, help="processes of lhotse's recipes [%(default)s]")
    sub.add_argument("--again", action="store_true", help="prepare anew; unchanged shards stay finished")
    if "prepare" in sub.prog:
        sub.add_argument("--language", default="", help="code of rows that state no language, e.g. en")


def _add_transcribe(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", required=True, help="folder, hub name or package:whisper-tiny.en")
    sub.add_argument("--backend", default="transformers", choices=("transformers", "faster-whisper"))
    sub.add_argument("--language", default="", help="code of the speech, e.g. en [each row's own, else as heard]")
    sub.add_argument("--task", default="transcribe", choices=("transcribe", "translate"))
    sub.add_argument("--batch-size", type=int, default=16, help="utterances, 30 s each to Whisper [%(default)s]")
    sub.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="[bf16 on a GPU]")
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 [this rank's GPU, if there is one]")
    sub.add_argument("--workers", type=int, default=2, help="threads that decode audio [%(default)s]")
    sub.add_argument("--threads", type=int, default=0, help="CPU threads of the model [torch's choice]")


def _add_select(sub: argparse.ArgumentParser) -> None:
    for field in fields(Limits):
        kind = int if field.name == "max_repeats" else float
        sub.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help="[%(default)s]")
    sub.add_argument("--to", type=Path, help="where to write the manifests and the report [DIR]")
    sub.add_argument("--partial", action="store_true", help="take the shards that are finished")


def _add_instructions(instruct: argparse.ArgumentParser, spoken: argparse.ArgumentParser) -> None:
    instruct.add_argument("manifest", nargs="+", help="JSONL manifests with transcripts, e.g. kept.jsonl")
    instruct.add_argument("--out", type=Path, required=True, metavar="FILE")
    instruct.add_argument("--templates", default="", help="by comma [all]")
    instruct.add_argument("--each", type=int, default=1, help="questions an utterance [%(default)s]")
    spoken.add_argument("--out", type=Path, required=True, metavar="DIR", help="for audio/ and spoken_qa.jsonl")
    spoken.add_argument("--questions", type=Path, help='JSONL of {"question", "answer"} [a few built-in facts]')
    spoken.add_argument("--cache", type=Path, help="folder of the ready-made voice (see train/nano/parts.py)")
    for sub in (instruct, spoken):
        sub.add_argument("--seed", type=int, default=0)


def _at_least_one(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, got {getattr(args, name)}")


def prepare(args: argparse.Namespace) -> None:
    """Sources to input shards, unless these sources are there already."""
    from train.curation import sources

    _at_least_one(args, "shard_size", "jobs")
    parts = tuple(part for part in args.parts.split(",") if part)
    found = [sources.parse(text, args.language, parts, args.jobs) for text in args.sources]
    job = Job(args.out)
    note = {"sources": args.sources, "parts": args.parts, "language": args.language, "shard_size": args.shard_size}
    before = None if args.again else job.note()
    if before:
        if {key: before.get(key) for key in note} != note:
            raise UserError(f"{args.out}: prepared from other sources; choose another --out, or --again")
        print(f"curate: {args.out} is prepared: {before['rows']} utterances", file=sys.stderr)
        return
    rows = (row for one in found for row in one.rows())
    note = job.prepare(_counted(rows, "preparing"), args.shard_size, note)
    print(f"curate: {note['rows']} utterances in {note['shards']} shards", file=sys.stderr)


def _counted(rows: Iterable[dict], what: str, total: int | None = None) -> Iterable[dict]:
    """The rows behind a progress bar, where there is a terminal."""
    from tqdm import tqdm

    return tqdm(rows, desc=what, unit="utt", total=total, disable=not sys.stderr.isatty())


def transcribe(args: argparse.Namespace) -> None:
    """Work through the unfinished shards as one rank."""
    import torch

    from train.curation.engine import Engine
    from train.curation.scoring import language_code
    from train.curation.transcribers import BACKENDS, identity

    _at_least_one(args, "batch_size", "workers")
    job = Job(args.out)
    shards = job.inputs()
    if args.threads:
        torch.set_num_threads(max(1, args.threads))
    settings = {
        "format": FORMAT,
        "model": identity(args.model),
        "language": language_code(args.language) if args.language else "",
        **{key: getattr(args, key) for key in ("backend", "task", "dtype")},
    }
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if all(job.finished(path, settings) for path in shards):
        if rank == 0:
            print("curate: every shard is finished", file=sys.stderr)
        return
    transcriber = BACKENDS[args.backend](args.model, _device(args.device), args.dtype, args.task)
    if settings["language"] and settings["language"] not in transcriber.languages:
        raise UserError(f"--language {args.language}: not one that {args.model} knows")
    engine = Engine(job, transcriber, settings, rank, world, args.batch_size, args.workers)
    left = engine.run()
    if engine.shards:
        speed = engine.audio_seconds / max(engine.seconds, 1e-9)
        print(
            f"curate: rank {rank} transcribed {engine.audio_seconds / 3600:.3f} h in {engine.seconds:.0f} s "
            f"({speed:.1f} times real time)" + (f"; other ranks hold {left} shards" if left else ""),
            file=sys.stderr,
        )


def _device(name: str):
    import torch

    if name == "auto":
        local = int(os.environ.get("LOCAL_RANK", 0))
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", local % count) if count else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0][:200]}") from None
    return device


def select(args: argparse.Namespace) -> None:
    """Limits to kept.jsonl, dropped.jsonl and the report."""
    from train.curation import selection
    from train.curation.report import write_report

    job, to = Job(args.out), args.to or args.out
    limits = Limits(**{field.name: getattr(args, field.name) for field in fields(Limits)}).check()
    settings = next((done["settings"] for path in job.inputs() if (done := job.finished(path))), {})
    rows = _counted(selection.scored_rows(job, args.partial), "selecting", job.note()["rows"])
    tally = selection.select(rows, limits, to)
    page = write_report(tally, limits, settings, to)
    hours = tally.summary()["hours"]
    for key, value in sorted(hours.items(), key=lambda item: (item[0] != "kept", -item[1])):
        print(f"{key.replace('_', ' '):22s} {value:10.3f} h {int(tally.total(tally.counts, key)):8d} utterances")
    print(f"{to / 'kept.jsonl'}, {to / 'dropped.jsonl'}, {page}")


def run(args: argparse.Namespace) -> None:
    """The three steps; under torchrun they are three commands, so that ranks need not wait for each other."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("run: one process only; under torchrun use prepare, transcribe, select")
    for step in (prepare, transcribe, select):
        step(args)


def instruct(args: argparse.Namespace) -> None:
    from train.curation.instructions import TEMPLATES, transcribe_then_answer
    from train.data.manifest import read

    _at_least_one(args, "each")
    rows = [row for path in args.manifest for row in read(path)]
    names = tuple(name for name in args.templates.split(",") if name) or tuple(TEMPLATES)
    count = write_jsonl(args.out, transcribe_then_answer(rows, names, args.each, args.seed))
    print(f"{args.out}: {count} instructions from {len(rows)} utterances")


def spoken_qa(args: argparse.Namespace) -> None:
    from train.curation.instructions import FACTS, read_questions, spoken_questions

    pairs = read_questions(args.questions) if args.questions else list(FACTS)
    rows = spoken_questions(pairs, args.out, args.seed, args.cache)
    write_jsonl(args.out / "spoken_qa.jsonl", rows)
    print(f"{args.out / 'spoken_qa.jsonl'}: {len(rows)} spoken questions")


STEPS = {"run": run, "prepare": prepare, "transcribe": transcribe, "select": select}
STEPS |= {"instruct": instruct, "spoken-qa": spoken_qa}


def _command(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    STEPS[args.command](args)


def main(argv: list[str] | None = None) -> int:
    """0; 2 after one line for a mistake; 130 after Ctrl-C (start again to go on)."""
    kept = "interrupted; finished shards are kept, the same command goes on"
    return run_command("curate", _command, argv, interrupted=kept, value_errors=False, in_step=False)


if __name__ == "__main__":
    sys.exit(main())

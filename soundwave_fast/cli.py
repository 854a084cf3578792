"""`soundwave`: transcribe audio, ask about it, look into checkpoints, convert them, curate training data."""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys

from soundwave_fast.commands import DEFAULT_MODEL, info, speech
from soundwave_fast.errors import ArgumentParser, UserError, one_line, run_command

_WHAT = {
    "transcribe": "write down what is said, as text, JSON or subtitles",
    "chat": "ask something about the audio",
    "info": "say what a checkpoint holds, without loading it",
    "convert": "a released-format checkpoint to ours, or ours to the released format",
    "curate": "prepare, transcribe and select training data (the train package's own command)",
}


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="soundwave", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    subs = {name: commands.add_parser(name, help=what, description=what) for name, what in _WHAT.items()}
    for name in ("transcribe", "chat"):
        speech.add_arguments(subs[name], name, DEFAULT_MODEL)
    subs["info"].add_argument("checkpoint", nargs="?", default=DEFAULT_MODEL, metavar="CHECKPOINT")
    subs["info"].add_argument("--json", action="store_true", help="one JSON object")
    subs["convert"].add_argument(
        "source", metavar="SRC", help="released-format directory, stage directory, saved model"
    )
    subs["convert"].add_argument("out", metavar="OUT", help="a directory that does not exist yet")
    subs["convert"].add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="[as stored]")
    subs["convert"].add_argument(
        "--audio-tower", metavar="WHISPER", help="folder or hub name, instead of config.json's"
    )
    subs["convert"].add_argument(
        "--force", action="store_true", help="write what the authors' code would read otherwise"
    )
    return parser


def _convert(args: argparse.Namespace) -> int:
    try:
        import torch

        from soundwave_fast.model.released import convert

        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        which = convert(args.source, args.out, dtype=dtype, audio_tower=args.audio_tower, force=args.force)
        print(f"{args.out}: {which}")
    except (RuntimeError, KeyError, ImportError) as error:
        raise UserError(f"{args.source}: {type(error).__name__}: {one_line(error)}") from error
    return 0


def _curate(argv: list[str]) -> int:
    try:
        module = importlib.import_module("train.curate")  # by name: the library does not know the trainer
    except ImportError as error:
        why = f"the train package cannot be imported here ({error}); run it in a checkout, with its requirements"
        raise UserError(f"curate: {why}") from error
    return int(module.main(argv) or 0)


def _run(argv: list[str]) -> int:
    begun = list(itertools.dropwhile(lambda text: text == "--debug", argv))  # `run_command` has seen it
    if begun[:1] == ["curate"]:
        return _curate(begun[1:])
    args = _parser().parse_args(argv)
    if args.command == "info":
        return info.run(args.checkpoint, args.json)
    return _convert(args) if args.command == "convert" else speech.run(args)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 1 when some files, or the picture of the peaks, failed and the rest went on; 2 for a mistake on the
    command line, or when no file went well; 130 after Ctrl-C (what was finished is printed or written); 141 when nobody
    reads on.
    """
    return run_command("soundwave", _run, argv)


if __name__ == "__main__":
    sys.exit(main())

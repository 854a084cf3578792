"""`soundwave`: transcribe audio, ask about it, look into checkpoints, convert them, curate training data."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys

from soundwave_fast.commands import info, say, speech

DEFAULT_MODEL = "runs/nano/stage3"
_WHAT = {
    "transcribe": "write down what is said, as text, JSON or subtitles",
    "chat": "ask something about the audio",
    "info": "say what a checkpoint holds, without loading it",
    "convert": "a released-format checkpoint to ours, or ours to the released format",
    "curate": "prepare, transcribe and select training data (the train package's own command)",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")  # one line; --help says the rest


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="soundwave", description=__doc__)
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
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        say(error)
        return 2
    return 0


def _curate(argv: list[str]) -> int:
    try:
        module = importlib.import_module("train.curate")  # by name: the library does not know the trainer
    except ImportError as error:
        say(f"curate: the train package cannot be imported here ({error}); run it in a checkout, with its requirements")
        return 2
    return int(module.main(argv) or 0)


def _run(argv: list[str]) -> int:
    if argv[:1] == ["curate"]:
        return _curate(argv[1:])
    args = _parser().parse_args(argv)
    if args.command == "info":
        return info.run(args.checkpoint, args.json)
    return _convert(args) if args.command == "convert" else speech.run(args)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 1 when some files, or the picture of the peaks, failed and the rest went on; 2 for a mistake on the
    command line, or when no file went well; 130 after Ctrl-C (what was finished is printed or written); 141 when nobody
    reads on.
    """
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        say("interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # python flushes stdout at its end
        return 141


if __name__ == "__main__":
    sys.exit(main())

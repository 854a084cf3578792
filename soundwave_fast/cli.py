"""`soundwave`: transcribe audio files and ask about them from the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DEFAULT_MODEL = "runs/nano/stage3"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="soundwave", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("transcribe", "write down what is said"), ("chat", "ask something about the audio")):
        sub = commands.add_parser(name, help=what, description=what)
        sub.add_argument("files", nargs="+", metavar="FILE", help="wav, flac, ... (whatever libsndfile reads)")
        sub.add_argument("--model", default=DEFAULT_MODEL, help="stage directory or saved model [%(default)s]")
        sub.add_argument("--max-new-tokens", type=int, default=128)
        sub.add_argument("--device", default="auto", help="cpu, cuda, ... [%(default)s]")
        if name == "chat":
            sub.add_argument("--prompt", required=True, help="the question")
        else:
            sub.add_argument("--ctc", action="store_true", help="greedy CTC transcript instead of the LLM's")
            sub.add_argument(
                "--timestamps",
                action="store_true",
                help="words of the CTC transcript, one a line: begin, end (s), word",
            )
            sub.add_argument("--peaks", metavar="PNG", help="also draw the CTC peaks of the (one) file")
    return parser


def _load(args: argparse.Namespace):
    import torch
    from transformers.utils import logging

    from soundwave_fast.model import SoundwaveForConditionalGeneration, SoundwaveProcessor

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with_llm = not (getattr(args, "ctc", False) or getattr(args, "timestamps", False))
    if not Path(args.model).is_dir():
        raise ValueError(f"--model {args.model}: no such directory")
    model = SoundwaveForConditionalGeneration.from_pretrained(args.model, with_language_model=with_llm)
    return model.to(device), SoundwaveProcessor.from_pretrained(args.model)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 when some files failed and the others went on; 2 for a mistake on the command line."""
    args = _parser().parse_args(argv)
    if getattr(args, "peaks", None) and len(args.files) != 1:
        print("soundwave: --peaks draws one file", file=sys.stderr)
        return 2
    missing = [name for name in args.files if not Path(name).is_file()]
    if missing:
        print(f"soundwave: {missing[0]}: no such file", file=sys.stderr)
        return 2
    try:
        model, processor = _load(args)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"soundwave: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 2
    from soundwave_fast import generate

    failed = 0
    for name in args.files:
        prefix = f"{name}\t" if len(args.files) > 1 else ""
        try:
            if args.command == "chat":
                lines = [generate.answer(model, processor, name, args.prompt, max_new_tokens=args.max_new_tokens)]
            elif args.timestamps:
                found = generate.words(model, processor, name)
                lines = [f"{word.start:.2f}\t{word.end:.2f}\t{word.text}" for word in found]
            elif args.ctc:
                lines = [generate.transcribe_ctc(model, processor, name)]
            else:
                lines = [generate.transcribe(model, processor, name, max_new_tokens=args.max_new_tokens)]
            if getattr(args, "peaks", None):
                generate.draw_peaks(model, processor, name, args.peaks)
        except (OSError, ValueError) as error:
            print(f"soundwave: {' '.join(str(error).split())}", file=sys.stderr)
            failed += 1
            continue
        for line in lines:
            print(prefix + line, flush=True)
    return 0 if not failed else 2 if failed == len(args.files) else 1


if __name__ == "__main__":
    sys.exit(main())

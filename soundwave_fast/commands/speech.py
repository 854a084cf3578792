"""`soundwave transcribe` and `soundwave chat`: load a model, run files through it, print or write what it says."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soundwave_fast.commands import check_default_model, say
from soundwave_fast.commands.files import expand, output_paths, progress_bar, seconds_of
from soundwave_fast.errors import UserError, one_line

SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}


def add_arguments(parser: argparse.ArgumentParser, command: str, default_model: str) -> None:
    """The options of `transcribe` or `chat`."""
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="audio (whatever libsndfile reads), pattern, directory")
    add("--model", default=default_model, help="stage directory, saved or released model, or hub name [%(default)s]")
    add("--max-new-tokens", type=int, default=128, help="of each answer or window [%(default)s]")
    add("--batch-size", type=int, default=8, help="windows, and answers, at a time [%(default)s]")
    add("--window", type=float, default=30.0, metavar="S", help="longest window, 5 ... 30 s [%(default)s]")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... [%(default)s]")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of all weights [as saved]")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile for adapters and decoding step [on a GPU]",
    )
    if command == "chat":
        add("--prompt", required=True, help="the question")
        add(
            "--stream",
            action=argparse.BooleanOptionalAction,
            default=None,
            help="print answers word by word, one file at a time [on a terminal]",
        )
        return
    add("--ctc", action="store_true", help="greedy CTC transcript instead of the LLM's")
    add("--format", choices=tuple(SUFFIXES), default="text", help="json: one object a line [%(default)s]")
    add("--output-dir", metavar="DIR", help="write DIR/NAME.txt, .json, .srt or .vtt, not to stdout")
    add("--skip-existing", action="store_true", help="leave out files whose result is in --output-dir")
    add(
        "--timestamps",
        action="store_true",
        help="words of the CTC transcript, one a line: begin, end (s), word; other formats hold times anyway",
    )
    add("--peaks", metavar="PNG", help="also draw the CTC peaks of the (one) file")


def run(args: argparse.Namespace) -> int:
    """Exit code as `soundwave_fast.cli.main`. What is wrong with the arguments is told before anything is loaded.

    Raises:
        UserError, ValueError, OSError: what keeps every file from being heard.
    """
    outputs = None
    try:
        files = expand(args.files)
        if args.max_new_tokens < 1 or args.batch_size < 1:
            raise ValueError("--max-new-tokens and --batch-size are at least 1")
        if not 5 <= args.window <= 30:
            raise ValueError(f"--window: 5 to 30 s, got {args.window:g}")
        if args.command == "transcribe":
            outputs = _check_output(args, files)
            if outputs is not None and args.skip_existing:
                todo = [(name, path) for name, path in zip(files, outputs) if not path.exists()]
                files, outputs = [name for name, _ in todo], [path for _, path in todo]
            if not files:
                return 0
        check_default_model(args.model, "name your own with --model")
        model, processor = _load(args)
    except ImportError as error:
        raise UserError(f"{error}; install soundwave_fast[model]") from error
    try:
        if args.command == "chat":
            return _exit_code(_chat(args, model, processor, files), files)
        return _transcribe(args, model, processor, files, outputs)
    except RuntimeError as error:  # not one file's fault: memory, a device, an option
        raise UserError(one_line(error)) from error


def _exit_code(failed: int, files: list[str], drawn: bool = True) -> int:
    return 2 if failed == len(files) else 1 if failed or not drawn else 0


def _check_output(args: argparse.Namespace, files: list[str]) -> list[Path] | None:
    if args.peaks:
        _check_peaks(args.peaks, files)
    if args.output_dir is None:
        if args.skip_existing:
            raise ValueError("--skip-existing needs --output-dir")
        if args.format in ("srt", "vtt") and len(files) > 1:
            raise ValueError(f"--format {args.format} of several files needs --output-dir")
        return None
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir {folder}: is no directory")
    outputs = output_paths(files, folder, SUFFIXES[args.format])
    folder.mkdir(parents=True, exist_ok=True)
    return outputs


def _check_peaks(target: str, files: list[str]) -> None:
    if len(files) != 1:
        raise ValueError("--peaks draws one file")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--peaks needs matplotlib, which is not installed")
    from soundwave_fast import plots

    try:
        plots.check_target(target)
    except (OSError, ValueError) as error:
        raise ValueError(f"--peaks {error}") from None
    seconds, limit = seconds_of(files), plots.MAX_PICTURE_SECONDS  # 0 where the header does not tell
    if seconds > limit:
        raise ValueError(f"--peaks draws at most {limit:.0f} s, {files[0]} is {seconds:.0f} s long")


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging

    from soundwave_fast.model import SoundwaveForConditionalGeneration, SoundwaveProcessor
    from soundwave_fast.model.hub import local_directory

    warnings.simplefilter("ignore", FutureWarning)  # transformers' and peft's about each other
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device}: {reason}") from None
    try:
        name = local_directory(args.model)
    except OSError as error:
        raise ValueError(f"--model {error}") from None
    settings = {} if args.dtype is None else {"dtype": getattr(torch, args.dtype)}
    settings["with_language_model"] = args.command == "chat" or not _ctc_alone(args)
    try:
        model = SoundwaveForConditionalGeneration.from_pretrained(name, **settings).to(device).eval()
        processor = SoundwaveProcessor.from_pretrained(name)
    except (RuntimeError, TypeError, KeyError, AttributeError, SafetensorError) as error:  # a damaged model, memory
        raise UserError(f"--model {args.model}: {type(error).__name__}: {one_line(error)}") from error
    if args.compile or (args.compile is None and torch.device(device).type == "cuda"):
        model.compile_adapters()
    return model, processor


def _ctc_alone(args: argparse.Namespace) -> bool:
    return args.ctc or (args.timestamps and args.format == "text")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    settings = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens, "window_seconds": args.window}
    if args.compile is False:
        settings["cache_implementation"] = "dynamic"
    return settings


def _complain(name: str, error: Exception) -> None:
    message = str(error)
    say(message if name in message else f"{name}: {message}")


def _chat(args: argparse.Namespace, model: Any, processor: Any, files: list[str]) -> int:
    """Prints the answers; number of files that failed."""
    from soundwave_fast import generate

    stream = sys.stdout.isatty() if args.stream is None else args.stream
    if stream:
        return sum(not _stream_one(args, model, processor, name, len(files) > 1) for name in files)
    failed = 0
    with progress_bar(files, by_seconds=False) as bar:
        found = generate.answers(model, processor, files, args.prompt, **_settings(args))
        for name, text in zip(files, found, strict=True):
            bar.update()
            with bar.external_write_mode():
                if isinstance(text, Exception):
                    failed += 1
                    _complain(name, text)
                else:
                    print(f"{name}\t{text}" if len(files) > 1 else text, flush=True)
    return failed


def _stream_one(args: argparse.Namespace, model: Any, processor: Any, name: str, with_name: bool) -> bool:
    from soundwave_fast import generate

    begun = False
    try:
        for piece in generate.stream_answer(model, processor, name, args.prompt, **_settings(args)):
            piece = piece if begun else piece.lstrip()
            if piece:
                print(piece if begun or not with_name else f"{name}\t{piece}", end="", flush=True)
                begun = True
    except (OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        _complain(name, error)
        return False
    finally:
        if begun:
            print(flush=True)
    return True


def _transcribe(
    args: argparse.Namespace, model: Any, processor: Any, files: list[str], outputs: list[Path] | None
) -> int:
    """Prints or writes the transcripts, draws the peaks; exit code."""
    from soundwave_fast import generate, subtitles

    failed, drawn = 0, True
    with progress_bar(files) as bar:
        settings = {**_settings(args), "llm": not _ctc_alone(args), "progress": bar.update}
        found = generate.transcripts(model, processor, files, **settings)
        for i, (name, transcript) in enumerate(zip(files, found, strict=True)):
            with bar.external_write_mode():
                if isinstance(transcript, Exception):
                    failed += 1
                    _complain(name, transcript)
                    continue
                if outputs is not None:
                    subtitles.write("".join(_lines(args, transcript, name, "")), outputs[i])
                else:
                    prefix = f"{name}\t" if len(files) > 1 and args.format == "text" else ""
                    print("".join(_lines(args, transcript, name, prefix)), end="", flush=True)
                if args.peaks:  # last: whatever becomes of the picture, the transcript is there
                    drawn = _draw(args, model, processor, name)
    return _exit_code(failed, files, drawn)


def _draw(args: argparse.Namespace, model: Any, processor: Any, name: str) -> bool:
    from soundwave_fast import generate

    settings = {"batch_size": args.batch_size, "window_seconds": args.window}
    try:
        generate.draw_peaks(model, processor, name, args.peaks, **settings)
    except (OSError, ValueError, RuntimeError) as error:
        say(f"--peaks {args.peaks}: {error}")
        return False
    return True


def _lines(args: argparse.Namespace, transcript: Any, name: str, prefix: str) -> Iterator[str]:
    from soundwave_fast import subtitles

    if args.timestamps and args.format == "text":
        for word in transcript.words:
            yield f"{prefix}{word.start:.2f}\t{word.end:.2f}\t{word.text}\n"
    else:
        yield prefix + subtitles.render(transcript, args.format, name)

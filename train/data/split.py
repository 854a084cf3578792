"""Split a manifest in two by speaker: `python -m train.data.split all.jsonl --held-out 0.1 --out DIR`."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

from soundwave_fast.errors import ArgumentParser, UserError, run_command
from train.data import lhotse_manifest
from train.data.jsonl import lines
from train.data.manifest import as_row, read


def _run(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m train.data.split", description=__doc__)
    parser.add_argument("manifest")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the speakers [%(default)s]")
    parser.add_argument("--by", choices=("speaker", "utterance"), default="speaker", help="what is kept whole")
    parser.add_argument("--out", required=True, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 0 < args.held_out < 1:
        raise UserError(f"--held-out {args.held_out}: must lie between 0 and 1")
    rows = read(args.manifest)
    keys = [row.speaker if args.by == "speaker" else row.id for row in rows]
    names = sorted(set(keys))
    if len(names) < 2:
        raise UserError(f"{args.manifest}: one {args.by} only, nothing to hold out")
    random.Random(args.seed).shuffle(names)
    held = set(names[: max(1, round(len(names) * args.held_out))])
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    raw = [row for _, row in lines(Path(args.manifest))]
    if lhotse_manifest.kind_of(raw[0]):
        raw = [as_row(row) for row in rows]
    for name, wanted in (("train", False), ("test", True)):
        part = [(r, u) for r, u, key in zip(raw, rows, keys, strict=True) if (key in held) == wanted]
        for row, utterance in part:
            row["audio"] = str(utterance.audio.resolve())
        temporary = out / f"{name}.jsonl.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row, _ in part))
        os.replace(temporary, out / f"{name}.jsonl")
        print(f"{out / name}.jsonl: {len(part)} utterances, {len({u.speaker for _, u in part})} speakers")


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit code is `run_command`'s."""
    return run_command("split", _run, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Where utterances come from: JSONL, lhotse manifests, folders, and corpora by lhotse's own recipes.

A source is written [NAME=][FORMAT:]PATH. Formats: jsonl, lhotse (cuts, or supervisions with their recordings beside
them or by comma), folder, librispeech, commonvoice, gigaspeech, voxpopuli. Without FORMAT a folder is a `folder`, and
a file is what its first line says. NAME is what the report calls it.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from soundwave_fast.errors import UserError

AUDIO = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aiff", ".sph"}


@dataclass(frozen=True)
class Source:
    """One source as given on the command line."""

    name: str
    format: str
    path: str
    language: str = ""  # of rows that state none
    parts: tuple[str, ...] = ()  # of a corpus; none: lhotse's default
    jobs: int = 1  # processes or threads of a recipe

    def rows(self) -> Iterator[dict]:
        """Rows with absolute audio paths: id, audio, duration (s), text, source, and what else the source knows.

        Raises:
            UserError: nothing there, not this format, or lhotse's recipe fails.
        """
        for row in FORMATS[self.format](self):
            if self.language and not row.get("language"):
                row["language"] = self.language
            yield {**row, "source": self.name}


def parse(text: str, language: str = "", parts: Iterable[str] = (), jobs: int = 1) -> Source:
    """`[NAME=][FORMAT:]PATH` -> Source.

    Raises:
        UserError: no such path, an unknown format, or one that cannot be told from the file.
    """
    match = re.fullmatch(r"(?:([\w.-]+)=)?(?:([a-z]+):)?(.+)", text, re.S)
    name, kind, path = match.groups() if match else (None, None, text)
    if kind and kind not in FORMATS:
        raise UserError(f"{text}: {kind!r} is not one of {', '.join(FORMATS)}")
    for part in path.split(",") if kind == "lhotse" else [path]:
        if not Path(part).exists():
            raise UserError(f"{part}: no such file or folder")
    kind = kind or _guess(Path(path))
    return Source(name or Path(path.split(",")[0]).name.split(".")[0], kind, path, language, tuple(parts), jobs)


def _guess(path: Path) -> str:
    if path.is_dir():
        return "folder"
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            row = json.loads(next((line for line in file if line.strip()), "null"))
    except (OSError, ValueError, EOFError):
        row = None
    if isinstance(row, dict) and "audio" in row:
        return "jsonl"
    if isinstance(row, dict) and (str(row.get("type", "")).endswith("Cut") or "recording_id" in row):
        return "lhotse"
    raise UserError(f"{path}: neither a JSONL manifest nor lhotse cuts; say which with FORMAT:PATH")


def _jsonl(source: Source) -> Iterator[dict]:
    """Streaming, with the trainer's own checks of every line; keys it does not know are carried through."""
    from train.data.jsonl import lines
    from train.data.manifest import check

    path = Path(source.path)
    for where, row in lines(path):
        utterance = check(row, where, path.parent)
        yield {**row, "audio": str(utterance.audio.resolve()), "text": utterance.text}


def _folder(source: Source) -> Iterator[dict]:
    """Audio anywhere below; transcripts in NAME.txt beside NAME.wav, or in tables: see `_tables`."""
    root = Path(source.path).resolve()
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in AUDIO)
    if not files:
        raise UserError(f"{root}: no audio files")
    texts = _tables(root)
    for path in files:
        beside = path.with_suffix(".txt")
        stem = path.relative_to(root).with_suffix("").as_posix()
        keys = (path.relative_to(root).as_posix(), stem, path.name, path.stem)
        text = next((texts[key] for key in keys if key in texts), "")
        if beside.is_file():
            text = beside.read_text(encoding="utf-8", errors="replace")
        yield {"id": stem.replace("/", "-"), "audio": str(path), "duration": _seconds(path), "text": text.strip()}


def _tables(root: Path) -> dict[str, str]:
    """File -> text from transcripts.tsv (file, tab, text), metadata.csv (file|text, as LJSpeech) and *.trans.txt."""
    texts: dict[str, str] = {}
    for path in sorted(root.rglob("*")):
        cut = {"transcripts.tsv": "\t", "metadata.csv": "|"}.get(path.name)
        if cut is None and not path.name.endswith(".trans.txt"):
            continue
        for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
            fields = line.split(cut) if cut == "|" else line.split(cut, 1)
            if len(fields) > 1:
                texts[fields[0].strip()] = fields[-1]
    return texts


def _seconds(path: Path) -> float:
    """From the header; 0 where it cannot be read, and the row is dropped as unreadable later."""
    import soundfile

    try:
        return round(soundfile.info(path).duration, 4)
    except (OSError, RuntimeError):
        return 0.0


def _lhotse(source: Source) -> Iterator[dict]:
    from lhotse import CutSet, load_manifest_lazy

    try:
        paths = source.path.split(",")
        beside = paths[0].replace("supervisions", "recordings")  # as lhotse names them
        sets = [
            load_manifest_lazy(path) for path in (paths if len(paths) > 1 or beside == paths[0] else [beside, *paths])
        ]
        kinds = {type(one).__name__: one for one in sets}
        if "CutSet" in kinds:
            cuts = kinds["CutSet"]
        else:
            cuts = CutSet.from_manifests(kinds["RecordingSet"].to_eager(), kinds["SupervisionSet"].to_eager())
    except (OSError, ValueError, KeyError, AttributeError, AssertionError, TypeError) as error:
        raise UserError(f"{source.path}: not lhotse cuts, nor recordings,supervisions ({_first(error)})") from None
    yield from rows_of_cuts(cuts)


def rows_of_cuts(cuts: Iterable) -> Iterator[dict]:
    """A row a supervision (a row a cut where it has none); a part of a recording states `start` and `channel`.

    Raises:
        UserError: audio that is no plain file on disk, or that the manifest transforms.
    """
    for cut in cuts:
        for one in cut.trim_to_supervisions(keep_overlapping=False) if cut.supervisions else [cut]:
            sources = getattr(getattr(one, "recording", None), "sources", None)
            if not sources or len(sources) != 1 or sources[0].type != "file" or one.recording.transforms:
                raise UserError(f"lhotse cut {cut.id}: its audio is not one plain file; export it with lhotse first")
            said = one.supervisions[0] if one.supervisions else None
            row = {
                "id": said.id if said else one.id,
                "audio": str(Path(sources[0].source).resolve()),
                "duration": round(one.duration, 4),
                "text": (said.text or "") if said else "",
                "speaker": (said.speaker or "") if said else "",
                "language": (said.language or "") if said else "",
            }
            if one.start > 0 or one.duration < one.recording.duration - 0.01:
                row["start"] = round(one.start, 4)
            if one.recording.num_channels > 1 and isinstance(one.channel, int):
                row["channel"] = one.channel
            yield row


def _recipe(run: Callable[[Source, Path], dict]) -> Callable[[Source], Iterator[dict]]:
    """Rows of what a recipe returns: part -> recordings and supervisions, one level deeper for Common Voice."""

    def rows(source: Source) -> Iterator[dict]:
        from lhotse import CutSet

        if not Path(source.path).is_dir():
            raise UserError(f"{source.path}: {source.format} is a folder")
        with tempfile.TemporaryDirectory() as scratch:  # recipes insist on writing manifests somewhere
            try:
                made = run(source, Path(scratch))
                parts = list(_parts(made))
            except (Exception, SystemExit) as error:  # recipes fail in every way there is
                raise UserError(f"{source.path}: lhotse's {source.format} recipe: {_first(error)}") from None
            for part in parts:
                # the recipes that stream write cuts; the others hand over lists
                yield from rows_of_cuts(part.get("cuts") or CutSet.from_manifests(**part))

    return rows


def _parts(made: dict) -> Iterator[dict]:
    for _, value in sorted(made.items()):
        if "cuts" in value:
            yield {"cuts": value["cuts"]}
        elif "supervisions" in value:
            if len(value["supervisions"]):
                yield {key: value[key] for key in ("recordings", "supervisions")}
        else:
            yield from _parts(value)


def _librispeech(source: Source, scratch: Path) -> dict:
    from lhotse.recipes import prepare_librispeech

    return prepare_librispeech(source.path, dataset_parts=source.parts or "auto", num_jobs=source.jobs)


def _commonvoice(source: Source, scratch: Path) -> dict:
    """The corpus folder (.../cv-corpus-N) or one language's (.../cv-corpus-N/en)."""
    from lhotse.recipes import prepare_commonvoice

    path, languages = Path(source.path), "auto"
    if (path / "clips").is_dir():
        path, languages = path.resolve().parent, path.resolve().name
    folders = [path / languages] if languages != "auto" else [one for one in path.iterdir() if (one / "clips").is_dir()]
    needed = {"client_id", "path", "sentence", "age", "gender", "accents", "variant"}
    for table in (folder / f"{part}.tsv" for folder in folders for part in source.parts or ("train",)):
        with open(table, encoding="utf-8") as file:
            missing = needed - set(next(csv.reader(file, delimiter="\t"), []))
        if missing:
            raise UserError(f"{table}: lhotse's recipe needs the columns {', '.join(sorted(missing))}")
    return prepare_commonvoice(
        path, scratch, languages=languages, splits=source.parts or ("train",), num_jobs=source.jobs
    )


def _gigaspeech(source: Source, scratch: Path) -> dict:
    from lhotse.recipes import prepare_gigaspeech

    return prepare_gigaspeech(source.path, scratch, dataset_parts=source.parts or "auto", num_jobs=source.jobs)


_MARKS = {"COMMA": ",", "PERIOD": ".", "QUESTIONMARK": "?", "EXCLAMATIONPOINT": "!"}


def without_tags(text: str) -> str:
    """GigaSpeech's <COMMA> as a comma and so on; <MUSIC>, <NOISE>, <SIL>, <OTHER> go, and with them all text there."""
    return re.sub(r"\s*<([A-Z]+)>", lambda tag: _MARKS.get(tag[1], ""), text).strip()


def _gigaspeech_rows(source: Source) -> Iterator[dict]:
    for row in _recipe(_gigaspeech)(source):
        yield {**row, "text": without_tags(row["text"])}


def _voxpopuli(source: Source, scratch: Path) -> dict:
    """The recipe fetches its table of transcripts unless asr_LANG.tsv.gz lies in the corpus folder."""
    import shutil

    from lhotse.recipes import prepare_voxpopuli

    language = source.language or "en"
    table = Path(source.path) / f"asr_{language}.tsv.gz"
    if table.is_file():
        shutil.copyfile(table, scratch / table.name)
    made = prepare_voxpopuli(source.path, scratch, lang=language, num_jobs=source.jobs)
    return {part: made[part] for part in source.parts or made}


def _first(error: BaseException) -> str:
    """The first line of an error's text, else its kind."""
    text = str(error).strip() if not isinstance(error, KeyError) else f"no {error}"
    return (text.splitlines() or [type(error).__name__])[0][:200]


FORMATS: dict[str, Callable[[Source], Iterator[dict]]] = {
    "jsonl": _jsonl,
    "lhotse": _lhotse,
    "folder": _folder,
    "librispeech": _recipe(_librispeech),
    "commonvoice": _recipe(_commonvoice),
    "gigaspeech": _gigaspeech_rows,
    "voxpopuli": _recipe(_voxpopuli),
}

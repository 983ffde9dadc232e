"""What comes out: questions in, answers out, under a decoding that is written down.

    python infer.py "What are the warning signs of a heart attack?"
    python infer.py "..." --base                        the base model, without the adapter
    python infer.py "..." --decoding story-fix          as the story decoded after its fixes
    python infer.py "..." --repetition-penalty 1.2      one field changed
    python infer.py "..." --compare models              base and adapter side by side; --compare decodings: every preset
    python infer.py "..." --verify                      is the answer the same in other processes and in company?
    python infer.py --questions questions.txt           many, into questions.answers.jsonl
    echo "..." | python infer.py -                      one question a line
    python infer.py --judge answers.jsonl               judge answers that any program wrote
    python infer.py                                     a chat

stdout holds the answers and nothing else. They are no medical advice.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import functools
import gc
import hashlib
import html
import importlib.metadata
import io
import itertools
import json
import math
import os
import re
import reprlib
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import textwrap
import time
import types
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro

import data
from data import ProfileChoice, ProfileName, UsageError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import (
        DynamicCache,
        GenerationConfig,
        LogitsProcessor,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

RUNS = Path("runs")
TRAIN_RUNS = RUNS / "train"
# Names the run in TRAIN_RUNS whose adapter is asked by default; train.py writes it when a run is done.
LATEST = TRAIN_RUNS / "latest.txt"
# Beside the adapter's weights: what PEFT's and transformers' own files have no place for.
ADAPTER_RECORD = "kit.json"


# What a run or a study may be called: it becomes the name of a folder.
RUN_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
RUN_NAME_RULE = "up to 100 letters, digits, '.', '_' and '-', starting with a letter or digit."


# --- Files and processes -----------------------------------------------------------------------------------------


# Errors of the system that mean that nothing can be written.
_STORAGE_ERRORS = [
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
]
# safetensors and tokenizers wrap the number into text; torch's writer gives no number.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_TORCH_WRITER = re.compile(r"PytorchStreamWriter failed|inline_container\.cc")


def storage_problem(error: BaseException) -> str | None:
    """The system's reason why nothing could be written, or None if the error is another one."""
    found = _OS_ERROR.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number in _STORAGE_ERRORS:
        return os.strerror(number)
    return "the disk is full, or a quota is reached" if _TORCH_WRITER.search(str(error)) else None


@contextlib.contextmanager
def writing(path: Path, part: Path | None = None) -> Iterator[None]:
    """A context in which `path` is written by way of `part`, which is removed on failure.

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
        raise UsageError(data.explain_storage(path, problem)) from error


def existing_parent(path: Path) -> Path:
    """The nearest existing folder above `path`: on its disk the path will be written."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def sync(descriptor: int) -> None:
    """Flushes a file to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        os.fsync(descriptor)


_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY", re.I)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def redact(text: str) -> str:
    """The text without access tokens: values of secret variables, and hub tokens."""
    secrets = {
        value
        for name, value in os.environ.items()
        if _SECRET_NAMES.search(name) and len(value) >= 8
    }
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _HUB_TOKEN.sub("***", text)


def append_line(path: Path, line: str) -> None:
    """Appends a line in one system call, so that a killed process leaves the line or nothing.

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


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def put_folder(part: Path, folder: Path) -> None:
    """Replaces `folder` by the folder `part`: readers find the old one or the new one, complete.

    Linux exchanges two folders in one step, if the file system supports it.
    """
    for file in part.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            sync(descriptor)
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
    """Removes a folder, if it exists; a process killed meanwhile leaves no part under its name."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name.lstrip('.')}.{os.getpid()}.gone")
        folder.rename(gone)
        shutil.rmtree(gone)


def clear_leftovers(folder: Path, pattern: str = ".*") -> None:
    """Removes unfinished files of a killed process. The caller holds the lock of the folder."""
    for leftover in folder.glob(pattern):
        if leftover.suffix in (".part", ".gone"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextlib.contextmanager
def claim(path: Path) -> Iterator[int | None]:
    """A file descriptor that holds the lock `path`, or None if another process has it.

    The lock ends with the last process that has the descriptor open, children included. The file
    names its holder.

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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP asked this process to end. The message says how to resume."""

    def __init__(self, number: int, message: str = "Interrupted. Run the same command again.") -> None:
        super().__init__(message)
        self.number = number


class Interruption:
    """Turns Ctrl-C, SIGTERM and SIGHUP into `Interrupted`, at once or where work defers it."""

    number: int | None = None
    """Of the signal that came first."""
    _deferred = False

    def listen(self) -> None:
        """Handles the signals, except those that are ignored from the start, as with `nohup`."""
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
        """A context in which a signal waits for `raise_if_any`; a second Ctrl-C raises at once."""
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


def world_size() -> int:
    """Processes that train together, set by `torchrun` and `accelerate launch`; else 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes and prints: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def escape_markdown(text: str) -> str:
    """The text in one line of markdown that shows it unchanged; newlines become `<br>`.

    Punctuation becomes numeric entities, which markdown never interprets.
    """
    shown = data.escape_controls(text.replace("\r\n", "\n").replace("\t", " "))
    # Also the colon and the dot of www., which some viewers turn into links.
    escaped = re.sub(r"[^\w\s.,;()'?!%/-]|_|(?<=www)\.", lambda match: _entities(match.group()), shown)
    # At the start of a cell even these would make a list or a heading.
    return re.sub(r"^(\s*)([-.()]|\d+[.)])", lambda match: match[1] + _entities(match[2]), escaped).replace("\n", "<br>")


def _entities(text: str) -> str:
    return "".join(f"&#{ord(character)};" for character in text)


def format_verbatim(text: str) -> str:
    """The text as one line of HTML, so that no part of it is read as markdown."""
    return f"<pre>{html.escape(data.escape_controls(text)).replace(chr(10), '&#10;')}</pre>"


def to_json(value: Any) -> str:
    """The value as JSON in one line, with control characters escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return data.CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """A context for imports of large libraries, without garbage collection.

    The collector runs whenever enough objects were added; importing Unsloth adds hundreds of
    thousands, and spent more than a second in it (`tests.bench start`).
    """
    modules = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        # Not if nothing was imported: the objects may then be a model that is freed later.
        if len(sys.modules) > modules:
            gc.freeze()
        gc.enable()


# --- Profiles -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Llama model, named as in its config.json: what can be planned before any of its files is there."""

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
        query, key_value = (heads * self.head_dim for heads in (self.num_attention_heads, self.num_key_value_heads))
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
    """The values in which the two profiles differ, for loading and asking a model."""

    base_model: str
    """Hub id, or the name of the model that `build_small_model` makes."""
    hub_id: str
    """What others load the adapter on."""
    other_names: tuple[str, ...]
    """Under which adapters of other makers name the same weights."""
    licence: str
    """Of the base model, and so of what is made from it; as the hub names licences."""
    architecture: Architecture
    load_in_4bit: bool
    dtype: str
    """Compute dtype of answers. A T4 has no bf16; on the CPU, bf16 logits tie and let the batch decide (fp32 does not)."""
    use_gradient_checkpointing: Literal["unsloth"] | bool
    """Recompute activations in the backward pass. "unsloth" keeps them in host RAM; the small model's fit as they are."""
    grouped_attention: bool
    """Whether answers are written under `use_grouped_attention`; Unsloth's GPU path has its own."""
    shares_prompts: bool
    """Whether a prompt that several rows have in common is read once; Unsloth's GPU path keeps its own cache."""
    max_rows: int
    """Most rows of a forward pass. A question that is asked alone may need as many, see `find_min_rows`."""


SMALL_MODEL = "smollm2-135m-instruct"
PROFILES: dict[ProfileName, Profile] = {
    "t4": Profile(
        "unsloth/Llama-3.2-3B-Instruct",
        hub_id="unsloth/Llama-3.2-3B-Instruct",
        other_names=(
            "meta-llama/Llama-3.2-3B-Instruct",
            "unsloth/Llama-3.2-3B-Instruct-bnb-4bit",
            "unsloth/Llama-3.2-3B-Instruct-unsloth-bnb-4bit",
        ),
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
        load_in_4bit=True,
        dtype="float16",
        use_gradient_checkpointing="unsloth",
        grouped_attention=False,
        shares_prompts=False,
        max_rows=32,
    ),
    "cpu": Profile(
        SMALL_MODEL,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        other_names=("unsloth/SmolLM2-135M-Instruct", "unsloth/SmolLM2-135M-Instruct-bnb-4bit"),
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
        load_in_4bit=False,
        dtype="float32",
        use_gradient_checkpointing=False,
        grouped_attention=True,
        shares_prompts=True,
        max_rows=64,
    ),
}

PadName = Literal["native", "added"]
# The tokenizer's own reserved pad token: an added one would resize the embedding, and the adapter would carry it whole.
LLAMA_PAD_TOKEN = "<|finetune_right_pad_id|>"
ADDED_PAD_TOKEN = "[PAD]"

StopName = Literal["end-of-turn", "generation-config", "never"]
DecodingName = Literal["plain", "story-collapse", "story-fix", "week3", "kit"]


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded. Every field reaches `generate` explicitly; it inherits none from a config lying around."""

    max_new_tokens: int = 256
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that occurred (Keskar et al. 2019); 1.0 is off."""
    no_repeat_ngram_size: int = 0
    """Forbids every n-gram of this size a second time; 0 is off."""
    count_prompt: bool = False
    """Whether penalty and ban count the prompt's tokens too, the end-of-turn token among them, as the library does."""
    stop: StopName = "end-of-turn"
    """Which token ends an answer: the one that ends a turn in the chat template, whatever the base model's generation config
    names, or none: then only the cap does."""
    temperature: float = 0.0
    """0 is greedy; above, tokens are sampled from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Sampling is among the likeliest tokens that together have this probability; 1.0 is all."""
    sampling_seed: int = 0
    """Seeds the sampling of each answer on its own, so that it does not depend on what else is asked."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("max_new_tokens", 1 <= self.max_new_tokens < data.MAX_SEQ_LENGTH),
            ("repetition_penalty", 0.1 <= self.repetition_penalty <= 10),
            ("no_repeat_ngram_size", 0 <= self.no_repeat_ngram_size <= data.MAX_SEQ_LENGTH),
            ("temperature", self.temperature == 0 or 0.01 <= self.temperature <= 100),
            ("top_p", 0 < self.top_p <= 1),
            ("sampling_seed", 0 <= self.sampling_seed < 2**63),
        ):
            if not allowed:
                flag, limits = name.replace("_", "-"), _DECODING_LIMITS[name]
                raise ValueError(f"--{flag} {getattr(self, name)}: {limits} is wanted.")

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Decoding:
        """The decoding of a record.

        Raises:
            KeyError: a field is missing.
            TypeError: a value is of another type, or a field is not known.
            ValueError: a value is out of range.
        """
        for each in dataclasses.fields(cls):
            value, wanted = fields[each.name], type(each.default)
            if type(value) is not wanted and not (wanted is float and type(value) is int):
                raise TypeError(f"{each.name} is {value!r}")
        decoding = cls(**fields)
        if decoding.stop not in get_args(StopName):
            raise ValueError(f"stop is {decoding.stop!r}")
        return decoding


# Beyond these, logits leave the range of numbers, or a generator does not take the seed.
_DECODING_LIMITS = {
    "max_new_tokens": f"1 to {data.MAX_SEQ_LENGTH - 1}, less the prompt,",
    "repetition_penalty": "a number from 0.1 to 10 (1.0 is off)",
    "no_repeat_ngram_size": f"0 (off) to {data.MAX_SEQ_LENGTH}",
    "temperature": "0 (greedy), or a number from 0.01 to 100,",
    "top_p": "a share above 0, at most 1,",
    "sampling_seed": f"a whole number from 0 to {2**63 - 1}",
}

# `story-*` and `week3` as the story told them: its library counted the prompt. `kit` is ours, chosen by the README's table.
DECODINGS: dict[DecodingName, Decoding] = {
    "plain": Decoding(),
    "story-collapse": Decoding(no_repeat_ngram_size=3, count_prompt=True, stop="generation-config"),
    "story-fix": Decoding(repetition_penalty=1.3, count_prompt=True),
    "week3": Decoding(temperature=0.7, top_p=0.9),
    "kit": Decoding(repetition_penalty=1.1),
}

# GiB of logits at a time in the loss of the GPU path.
FUSED_LOSS_GIB = 1

# Most tokens, of prompts and answers, of the rows of a forward pass: keys and values are kept of each, 45 KiB on the small
# model and 112 KiB on Llama 3.2 3B.
MAX_BATCH_TOKENS = 2**15

# Of a file of questions, so many are answered, then saved.
QUESTIONS_A_SAVE = 32

# Prompts are padded to a multiple of so many tokens: those of short questions all have one length then.
PROMPT_MULTIPLE = 64

# What Unsloth, torch and transformers say on every run of a CPU, of no use to the user. Whole messages, so that a new or
# real warning still shows.
KNOWN_NOISE = re.compile(
    "|".join(
        (
            r"Converting and de-quantizing GGUF tensors",
            r"Calling register_constant\(\) on Enum subclasses is deprecated",
            r"Unsloth [\d.]+: no GPU found, training on CPU",
            r"Unsloth \(CPU\): \w+ on \d+ CPU threads\.",
            r"Unsloth \(CPU\): optim = '\w+' needs a GPU, using",
            r"xFormers can't load C\+\+/CUDA extensions",
            r"Skipping import of cpp extensions due to incompatible torch version",
            r"bitsandbytes .* (compiled without GPU support|was not compiled with GPU)",
            r"Passing `generation_config` together with generation-related arguments=",
            r"Both `max_new_tokens` \(=\d+\) and `max_length`\(=\d+\) seem to have been set",
            r"Failed to load CPU gemm_4bit_forward from kernels-community",
        )
    )
)


@dataclass(frozen=True)
class Answer:
    """One answer, with what it took to get it. Two answers are equal if all but their seconds is."""

    question: str
    text: str
    token_ids: list[int]
    """Ids of the answer alone; the stop token, where there was one, is the last."""
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    answer_tokens: int
    num_overruled: int
    """Of the answer's tokens, those at whose place penalty or ban took the model's first choice from it."""
    decoding: Decoding
    model: str
    """Name of the base model."""
    adapter: str | None
    """sha256 of the adapter's weights, or None for the base model alone."""
    seconds: float = field(compare=False)
    """Time of the batch in which the answer was written."""
    system_prompt: str = data.SYSTEM_PROMPT
    """What the question was asked under."""

    @property
    def sha256(self) -> str:
        """Digest of the token ids: equal answers have equal ones, on any machine."""
        return hashlib.sha256(json.dumps(self.token_ids).encode()).hexdigest()

    def to_record(self) -> dict[str, Any]:
        """The answer as JSON-ready values."""
        return dataclasses.asdict(self) | {"sha256": self.sha256}


# --- The judge -----------------------------------------------------------------------------------

FindingName = Literal[
    "empty", "loop", "repetition", "list", "leak", "invented-medicine", "surprisal"
]
Measure = tuple[float, tuple[int, int]]  # a score, and the characters of the text it comes from
NOTHING: Measure = (0.0, (0, 0))


@dataclass(frozen=True)
class Check:
    """What a finding measures, and from which value on the answer fails."""

    measures: str
    threshold: float
    message: str
    """`{}` is the place in the text."""


# How each threshold was chosen: docs/judge.md.
CHECKS: dict[FindingName, Check] = {
    "empty": Check(
        "1 if the answer has no words, or its stop token follows an article or a conjunction",
        1,
        "it says nothing, or stops mid-sentence: {}",
    ),
    "loop": Check(
        "most words in a row within sequences of six words that occurred before in the answer "
        "(after seq-rep-n of Welleck et al. 2020); half of them unless they follow at once",
        20,
        "it repeats itself word for word: {}",
    ),
    "repetition": Check(
        "bytes that zlib saves in the worst 512 bytes, over bytes that remain (the compression "
        "ratio of Radford et al. 2022, less 1)",
        1.5,
        "it says nearly the same again and again: {}",
    ),
    "list": Check(
        "items of the longest list, if the question asks for no list of that length",
        21,
        "a list does not end: {}",
    ),
    "leak": Check(
        "template tokens, role names, other speakers, code, web mark-up, undecoded characters, "
        "and runs of another script",
        1,
        "this is no part of an answer: {}",
    ),
    "invented-medicine": Check(
        "words with an ending of the WHO's names for medicines that are not the name of one",
        1,
        "no medicine has this name: {}",
    ),
    "surprisal": Check(
        "largest surprisal of the answer under the base model in nats per byte, mean over 160 "
        "bytes, as a multiple of the reference: the largest in the base model's plain answers to "
        "the probe questions",
        2.5,
        "the base model finds this unlikely: {}",
    ),
}


@dataclass(frozen=True)
class Finding:
    """A defect of an answer's form. It never says whether the answer is medically correct."""

    name: FindingName
    score: float
    """In the unit of `CHECKS[name].measures`."""
    span: tuple[int, int]
    """Characters of the text: the first, and the one after the last."""
    message: str


@dataclass(frozen=True)
class JudgedAnswer:
    """The verdict on an answer, and what it is based on."""

    findings: tuple[Finding, ...]
    score: float
    """The largest measure in units of its threshold: sound answers are below 1."""
    ended: bool
    """Whether the stop token ended the answer, rather than the limit of tokens."""
    answer: Answer | None = None
    facts: Facts | None = None
    """What of the probe's lists is in the answer, if the question is a probe's."""

    @property
    def sound(self) -> bool:
        """Whether there are no findings. An answer that was cut off may be sound so far."""
        return not self.findings

    @property
    def verdict(self) -> str:
        """`sound`, or the names of the findings."""
        return ", ".join(each.name for each in self.findings) or "sound"

    def to_record(self) -> dict[str, Any]:
        """JSON-ready values."""
        record = self.answer.to_record() if self.answer else {}
        record |= {
            "sound": self.sound,
            "verdict": self.verdict,
            "score": round(self.score, 4),
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }
        return record | ({"facts": dataclasses.asdict(self.facts)} if self.facts else {})


# Markdown, which is replaced by as many spaces, so that places in the text stay the same.
_MARKDOWN = re.compile(
    r"^[ \t]*(?:```|~~~).*$|^[ \t]*(?:[-*_=][ \t]*){3,}$|^[ \t]*(?:#{1,6}|>)[ \t]+"
    r"|^[ \t]*(?:[-*+\u2022]|\d{1,3}[.)])[ \t]+|\*{1,3}|__|`+|\|"
    r"|!?\[(?=[^\]\n]{0,300}\]\()|\]\([^)\n]{0,300}\)",
    re.M,
)
_NUMBER_OR_WORD = re.compile(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")


def blank_markdown(text: str) -> str:
    """The text with spaces in place of its markdown, of the same length."""
    return _MARKDOWN.sub(lambda found: " " * len(found[0]), text)


# An answer that the stop token ends after one of them stops mid-sentence.
_DANGLING = frozenset(("an", "and", "of", "or", "the", "to", "with"))


def measure_empty(text: str, ended: bool) -> Measure:
    """See `CHECKS`."""
    words = text.split()
    is_broken_off = ended and bool(words) and words[-1] in _DANGLING
    # Letters, numbers, and symbols such as emoji.
    has_words = any(unicodedata.category(each)[0] in "LN" or unicodedata.category(each) == "So" for each in text)
    return float(is_broken_off or not has_words), (max(0, len(text) - 90), len(text))


def measure_loop(plain: str, size: int = 6) -> Measure:
    """See `CHECKS`; `plain` is without markdown."""
    matches = list(_NUMBER_OR_WORD.finditer(plain))
    words = [match[0].lower() for match in matches]
    last_at: dict[tuple[str, ...], int] = {}
    best, first, end, distance = NOTHING, 0, -1, 0  # words `first` to before `end` are repeated
    for start in range(len(words) - size + 1):
        sequence = tuple(words[start : start + size])
        if sequence in last_at:
            is_same_copy = start <= end + 2 and start - last_at[sequence] == distance
            if start > end and not is_same_copy:  # up to two words may have changed
                first, distance = start, start - last_at[sequence]
            end = start + size
            run = end - first
            # A sentence said again later is not yet a loop, as a chorus or the question is.
            score = run if distance <= 1.5 * run else run / 2
            if score > best[0]:
                best = score, (matches[first].start(), matches[end - 1].end())
        last_at[sequence] = start
    return best


def measure_repetition(plain: str, window: int = 512, stride: int = 256) -> Measure:
    """See `CHECKS`; `plain` is without markdown."""
    # Runs of spaces, which markdown leaves behind, compress well and say nothing.
    encoded = re.sub(r"[ \t]+", " ", plain).encode("utf-8", "replace")
    starts = range(0, max(1, len(encoded) - window + stride), stride) if encoded else ()
    worst = max(
        (
            (len(part) / len(zlib.compress(part, 9)), start)
            for start in starts
            if (part := encoded[start : start + window])
        ),
        default=(1.0, 0),
    )
    # The place is proportional, as bytes are not characters, and spaces are missing.
    share = len(plain) / max(1, len(encoded))
    start, end = (round(at * share) for at in (worst[1], min(worst[1] + window, len(encoded))))
    return max(0.0, worst[0] - 1), (start, end)


_SENTENCE = re.compile(r"[^\n]+?(?:[^\d\s][.!?;:](?=\s)|\n|\Z)")
_SHORT_ITEM_END = re.compile(r",|\s[\u2013\u2014-]\s|\b(?:and|or)\b|\Z")
_LIST_LINE = re.compile(r"^([ \t]*)(?:[-*+\u2022]|(\d{1,3})[.)])[ \t]+\S.*$|^([ \t]*)\S.*$", re.M)
_NUMBERED = re.compile(r"(?<![\w.,/])(\d{1,3})[.)]\s+(?=\D)")


def measure_list(text: str, question: str = "", short: int = 5) -> Measure:
    """See `CHECKS`: short items in a row within a sentence, lines of one list, or numbers in a row.

    A short item has at most `short` words. A list ends where another line follows, or where the
    numbers begin again; lines that are indented below an item are not counted. A list of as many
    items as a number of the question says was asked for.
    """
    best = NOTHING
    asked = max(map(int, re.findall(r"\d{1,3}", question)), default=0)

    def count(run: int, start: int, end: int) -> None:
        nonlocal best
        if run > max(best[0], asked):
            best = run, (start, end)

    for sentence in _SENTENCE.finditer(text):
        run, start, at = 0, sentence.start(), 0
        for end in _SHORT_ITEM_END.finditer(sentence[0]):
            item = sentence[0][at : end.start()].split()
            if item:
                run = run + 1 if len(item) <= short else 0
                start = sentence.start() + at if run == 1 else start
                count(run, start, sentence.start() + end.start())
            at = end.end()
    run, start, indentation = 0, 0, ""
    for line in _LIST_LINE.finditer(text):
        indent, number, other = line.groups()
        if other is not None:
            run = run if len(other) > len(indentation) else 0
        elif not run or number in ("0", "1") or len(indent) < len(indentation):
            run, start, indentation = 1, line.start(), indent
        elif indent == indentation:
            run += 1
        count(run, start, line.end())
    run, start, last = 0, 0, -1
    for found in _NUMBERED.finditer(text):
        run = run + 1 if int(found[1]) == last + 1 else 1
        start = found.start() if run == 1 else start
        last = int(found[1])
        count(run, start, found.end())
    return best


_LEAK = re.compile(
    "|".join(
        (
            # Tokens of chat templates, and the role names that remain when they are not shown.
            r"<\|\w+\|>|\[/?INST\]|</?s>|<</?SYS>>|<(?:start|end)_of_turn>",
            r"^#{2,} ?(?:Instruction|Input|Response):?[ \t]*$|Cutting Knowledge Date:",
            r"(?<=[^\s\w(\[{\"'/-])[ \t]?(?:assistant|user|system|ipython)[ \t]*$",
            r"(?<=[a-z0-9])assistant[ \t]*(?:\n[ \t]*\n|\Z)",
            r"^(?:assistant|user|system|ipython)[ \t]*$",
            # Text in a wrong encoding, and symbols in a row.
            r"\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\u00e2\u20ac\S?",
            r"\u00c3[\x80-\xbf\u00a9\u00a8\u00bc\u00b6]|\u00c2[\x80-\xbf]",
            r"([?$%^&~])\1{3,}",
        )
    ),
    re.M,
)
# What may be asked for.
_LEAK_UNLESS_ASKED = re.compile(
    "|".join(
        (
            # Other speakers.
            r"(?:^|(?<=[.!?]\s))\W{0,3}(?:User|Human|Assistant|Bot|USER|HUMAN|ASSISTANT)\W{0,2}:",
            r"\b[Ii](?: am|'m) (?:an? )?\d{1,2}[- ]?(?:years?|yrs?|y/?o)\b",
            r"\b(?:[Dd]ear|[Hh]ello|[Hh]i),? (?:[Dd]octor|[Dd]r)\b",
            # Code and web mark-up.
            r"^[ \t]*(?:import \w+|from [\w.]+ import |def \w+\(|#include|print\(|function \w*\()",
            r"</?(?:div|span|p|a|ul|ol|li|table|tr|td|h[1-6]|img|html|body|script|ref)"
            r"(?:\s[^<>\n=]{0,40}=[^<>\n]{0,80})?\s?/?>|&(?:nbsp|quot|apos|#\d+);",
            r"\[\[|\]\]|\{\{[^{}\n]*\}\}|\{\|",
        )
    ),
    re.M,
)
_ASKED_FOR = re.compile(
    r"\b(?:faq|quiz|dialogue|conversation|interview|script|soap|letter|e-?mail|code|function"
    r"|program|python|html|latex|translat\w*)\b",
    re.I,
)
# One or two of them may be headings.
_SPEAKER = re.compile(
    r"^\W{0,3}(?:patient|question|q|customer|client|student|interviewer|doctor|dr|instruction"
    r"|response|answer)\W{0,2}:",
    re.M | re.I,
)
# A few may be references.
_ADDRESS = re.compile(r"https?://\S+|www\.\S+")
# Scripts other than Latin and Greek, unless a term is given in brackets.
_OTHER_SCRIPT = re.compile(
    r"(?<![(\u0400-\u1cff\u2e80-\ud7ff\uf900-\ufdff])[\u0400-\u1cff\u2e80-\ud7ff\uf900-\ufdff]+"
)


def measure_leak(text: str, question: str = "") -> Measure:
    """See `CHECKS`. Another script is one that the question is not written in."""
    found = list(_LEAK.finditer(text))
    if not _ASKED_FOR.search(question):
        found += _LEAK_UNLESS_ASKED.finditer(text)
        speakers = list(_SPEAKER.finditer(text))
        found += speakers if len(speakers) > 2 else []
        if not _OTHER_SCRIPT.search(question):
            found += _OTHER_SCRIPT.finditer(text)
    found += list(_ADDRESS.finditer(text))[5:]
    return len(found), min((match.span() for match in found), default=(0, 0))


# Stems of the WHO's international nonproprietary names that hardly any other word ends with.
_MEDICINE_ENDINGS = tuple(
    """floxacin cillin mycin micin cycline bactam penem conazole prazole nidazole bendazole olol
    sartan statin vudine nib ciclib gliptin gliflozin glitazone glutide dipine triptan gepant
    azepam azolam thiazide semide xaban gatran profen coxib setron fibrate dronate artemisinin
    platin taxel lukast oxetine pril mab vir caine parin grel fungin rubicin vaptan
    lutamide""".split()
)
_LONG_WORD = re.compile(r"(?<![-\w])[^\W\d_]{6,}(?![\w])")


def build_medicines(folder: Path) -> None:
    """Writes the words of drug-named-entity-recognition's names into `folder`, one per line."""
    from drug_named_entity_recognition.drugs_finder import drug_variant_to_canonical

    names = " ".join(drug_variant_to_canonical).lower()
    words = sorted(set(re.findall(r"[^\W\d_]+", names)))
    (folder / "words.txt").write_text("\n".join(words), encoding="utf-8")


def _build_medicines_apart(folder: Path) -> None:
    # In a process of its own: the library keeps several hundred MiB of indices.
    program = "import pathlib, sys, infer; infer.build_medicines(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(folder.resolve())]
    subprocess.run(command, cwd=data.HERE, check=True)


@functools.cache
def load_medicines() -> frozenset[str]:
    """Words of the names of medicines, in lower case, from the cache."""
    version = importlib.metadata.version("drug-named-entity-recognition")
    folder = data.cached_folder(f"medicines-{version}", _build_medicines_apart)
    return frozenset((folder / "words.txt").read_text(encoding="utf-8").split("\n"))


@functools.cache
def is_medicine(word: str) -> bool:
    """Whether the word, in lower case, is one of `load_medicines`, or a misspelling of one."""
    known = load_medicines()
    if word in known or word.removesuffix("s") in known:
        return True
    similar = [each for each in known if each[:2] == word[:2] and abs(len(each) - len(word)) < 2]
    return bool(difflib.get_close_matches(word, similar, n=1, cutoff=0.87))


def measure_medicine(text: str, question: str = "") -> Measure:
    """See `CHECKS`. A name that the question contains is not counted, nor a bare ending."""
    asked, spans = question.lower(), {}
    for match in _LONG_WORD.finditer(text):
        word = match[0].lower()
        has_ending = word.removesuffix("s").endswith(_MEDICINE_ENDINGS) or word.startswith("cef")
        if has_ending and word not in asked and not is_medicine(word):
            spans.setdefault(word, match.span())
    return len(spans), min(spans.values(), default=(0, 0))


def measure_answer(
    text: str, question: str = "", finish_reason: str = "stop", surprisal: Measure = NOTHING
) -> dict[FindingName, Measure]:
    """Every measure of an answer, in the order of `CHECKS`; loads no model.

    `surprisal` is the measure of that name, see `measure_surprisal`, if a model has read the
    answer.
    """
    plain = blank_markdown(text)
    return {
        "empty": measure_empty(text, finish_reason == "stop"),
        "loop": measure_loop(plain),
        "repetition": measure_repetition(plain),
        "list": measure_list(text, question),
        "leak": measure_leak(text, question),
        "invented-medicine": measure_medicine(text, question),
        "surprisal": surprisal,
    }


def judge(
    text: str,
    question: str = "",
    finish_reason: str = "stop",
    surprisal: Measure = NOTHING,
    *,
    answer: Answer | None = None,
    probe: Probe | None = None,
) -> JudgedAnswer:
    """The verdict on an answer by `measure_answer` and `CHECKS`, with the facts of its `probe`."""
    measures = measure_answer(text, question, finish_reason, surprisal)
    findings = []
    for name, (score, (start, end)) in measures.items():
        if score >= CHECKS[name].threshold:
            message = CHECKS[name].message.format(shorten(text[start:end]))
            findings.append(Finding(name, round(score, 4), (start, end), message))
    score = max(score / CHECKS[name].threshold for name, (score, _) in measures.items())
    facts = check_facts(text, probe) if probe else None
    return JudgedAnswer(tuple(findings), score, finish_reason == "stop", answer, facts)


def shorten(text: str, limit: int = 90) -> str:
    """The text in one line and in quotes, without its middle if it is longer than `limit`."""
    line = " ".join(text.split())
    if len(line) > limit:
        line = f"{line[: limit * 2 // 3]} ... {line[-limit // 3 :]}"
    return f'"{line}"'


# --- Facts: what a list can tell ---------------------------------------------------------------------------------

# In the same clause before a phrase, they turn it round.
_NEGATION = re.compile(
    r"\b(?:not?|never|without|nor|neither|unlike|cannot|avoid\w*|instead of|rather than|\w+n['’]t)\b", re.IGNORECASE
)


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


def read_probes(path: Path = data.PROBES) -> list[Probe]:
    """The probes, in the file's order.

    Raises:
        UsageError: a line is no probe; the message names the line and what is wrong with it.
    """
    probes = []
    for place, record in data.read_records(str(path)):
        try:
            if isinstance(record, data.BadRecord):
                raise TypeError(record)
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


@functools.cache
def compile_phrase(phrase: str) -> re.Pattern[str]:
    """A phrase of the probes as a pattern: whole words, in singular or plural, a hyphen as good as a space."""
    parts = [
        r"[\s-]+".join(re.escape(word) + "(?:e?s)?" for word in re.split(r"[\s-]+", part.strip()))
        for part in phrase.split("...")
    ]
    return re.compile(r"\b" + r"\b(?:[^\w.!?]+[\w'’-]+){0,6}?[^\w.!?]+".join(parts) + r"\b", re.IGNORECASE)


# Right behind a phrase, they deny it: "... is not a sign", "... are no longer the first choice".
_DENIAL = re.compile(r"(?:\W+[\w'’]+){0,2}?\W+(?:not\b|no\b|never\b|\w+n['’]t\b)", re.IGNORECASE)
_CLAUSE_END = re.compile(r"[.!?;:,\n]|\bbut\b", re.IGNORECASE)


def find_mention(text: str, phrases: Iterable[str], *, or_denied_after: bool = False) -> int | None:
    """Where the first of the phrases begins that no word before it in its clause negates; None where there is none.

    With `or_denied_after` a phrase that the words right behind it deny is no mention either.
    """
    places = []
    for phrase in phrases:
        for match in compile_phrase(phrase).finditer(text):
            before = _CLAUSE_END.split(text[: match.start()])[-1]
            after = _CLAUSE_END.split(text[match.end() :], maxsplit=1)[0]
            if not (_NEGATION.search(before) or (or_denied_after and _DENIAL.match(after))):
                places.append(match.start())
                break
    return min(places, default=None)


@dataclass(frozen=True)
class Facts:
    """What of a probe's lists is in an answer. It tells which words occur; it is no grade of truth."""

    named: tuple[str, ...]
    missing: tuple[str, ...]
    wrong: tuple[str, ...]
    """Names of the wrong claims that are made."""

    def __str__(self) -> str:
        return f"points {len(self.named)}/{len(self.named) + len(self.missing)}, wrong claims {len(self.wrong)}"


def check_facts(text: str, probe: Probe) -> Facts:
    """Which points of the probe the answer names, and which wrong claims it makes."""
    named = [point.name for point in probe.points if find_mention(text, point.phrases) is not None]
    wrong = []
    for claim in probe.wrong_claims:
        # "A sore throat is not a sign" claims nothing; but a point that "is not the only sign" is named.
        place = find_mention(text, claim.phrases, or_denied_after=True)
        excuse = find_mention(text, claim.unless_after)
        if place is not None and (excuse is None or place < excuse):
            wrong.append(claim.name)
    missing = [point.name for point in probe.points if point.name not in named]
    return Facts(tuple(named), tuple(missing), tuple(wrong))


@dataclass(frozen=True)
class Quality:
    """A set of judged answers in numbers."""

    num_answers: int
    num_sound: int
    num_ended: int
    """By the stop token."""
    num_sound_and_ended: int
    """The headline of a set."""
    num_named: int
    """Of the probes' points."""
    num_points: int
    num_wrong_claims: int

    @property
    def sound_rate(self) -> float:
        """Share of sound answers; 0 where there are none at all."""
        return self.num_sound / self.num_answers if self.num_answers else 0.0

    @property
    def stop_rate(self) -> float:
        """Share of answers that the stop token ended; 0 where there are none at all."""
        return self.num_ended / self.num_answers if self.num_answers else 0.0

    @property
    def points_rate(self) -> float:
        """Share of the points that are named; 0 where the probes have none."""
        return self.num_named / self.num_points if self.num_points else 0.0


def measure_quality(judged: Sequence[JudgedAnswer]) -> Quality:
    """The numbers of a set of judged answers."""
    facts = [each.facts for each in judged if each.facts]
    return Quality(
        num_answers=len(judged),
        num_sound=sum(each.sound for each in judged),
        num_ended=sum(each.ended for each in judged),
        num_sound_and_ended=sum(each.sound and each.ended for each in judged),
        num_named=sum(len(each.named) for each in facts),
        num_points=sum(len(each.named) + len(each.missing) for each in facts),
        num_wrong_claims=sum(len(each.wrong) for each in facts),
    )


# --- Environment -------------------------------------------------------------------------------------------------


def prepare_cublas() -> None:
    """Lets cuBLAS give the same bits twice, for which it needs a fixed workspace. Call it before torch is imported."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def prepare_environment(profile: ProfileName, *, offline: bool) -> None:
    """Sets what Unsloth and the hub client read at import. Call it before either is imported."""
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    # Unsloth compiles its trainers into a folder of the working directory if it is not told another; an older version's
    # files would be taken for its own.
    compiled = data.cache_home() / f"unsloth_compiled_cache-{importlib.metadata.version('unsloth')}"
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(compiled))
    # GiB of logits that its fused loss holds at a time; unset, it takes a share of what is free at the first step, so that
    # memory could not be planned.
    os.environ.setdefault("UNSLOTH_CE_LOSS_TARGET_GB", str(FUSED_LOSS_GIB))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if profile == "cpu":
        # Also where there is a GPU: whoever says --profile cpu means it.
        os.environ["UNSLOTH_FORCE_CPU"] = "1"
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


class _NoiseFilter(io.TextIOBase):
    """A text stream that hands whole lines on to another, less the known noise."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.line = ""

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            if not KNOWN_NOISE.search(line):
                self.stream.write(line + "\n")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def close(self) -> None:
        """Hands on a line that was never ended. Loggers may write on, so this stream stays open."""
        if self.line:
            self.write("\n")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """While it lasts, what libraries print goes to stderr, line by line, without the known noise.

    Loggers that are made meanwhile keep the filtered stream. That is wanted: they say the same things later.
    """
    noise_filter = _NoiseFilter(sys.stderr)
    with contextlib.redirect_stdout(noise_filter), contextlib.redirect_stderr(noise_filter):
        try:
            yield
        finally:
            noise_filter.close()


# --- Loading -----------------------------------------------------------------------------------------------------


def build_small_model(folder: Path) -> None:
    """Writes the small base model into `folder`: the GGUF's weights unpacked to fp32 safetensors, and the tokenizer.

    fp32, because Q4_1's products of a scale and a 4-bit number, plus an offset, have no exact 16-bit form.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    tokenizer = data.load_tokenizer("cpu")
    model = AutoModelForCausalLM.from_pretrained(
        data.gguf_folder(),
        gguf_file=data.GGUF_FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def base_model_path(base_model: str) -> str:
    """What `from_pretrained` takes for a base model: a hub id as it is; for the small model its folder in the cache."""
    if base_model != SMALL_MODEL:
        return base_model
    with writing(data.cache_home() / SMALL_MODEL):
        return str(data.cached_folder(SMALL_MODEL, build_small_model))


def load_base(profile: ProfileName, *, dtype: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The profile's base model and its tokenizer, through Unsloth; `dtype` None lets Unsloth choose the fastest for training.

    Pad is the tokenizer's own reserved token and
    differs from eos; eos is the token that ends a turn.

    Raises:
        UsageError: the profile needs a GPU that torch does not see, or the model cannot be had.
    """
    import torch

    with quiet_libraries():
        with importing():
            # Unsloth patches transformers, PEFT and TRL, and has to be imported before them.
            from unsloth import DEVICE_TYPE, FastLanguageModel  # isort: skip
            from transformers.utils import logging as transformers_logging

        if profile == "t4" and DEVICE_TYPE == "cpu":
            raise UsageError(
                f"The profile t4 needs a GPU, and torch {torch.__version__} sees none. Use a machine with one (README, 'Kaggle "
                "and Colab'), or say --profile cpu."
            )

        transformers_logging.disable_progress_bar()
        values = PROFILES[profile]
        try:
            model, tokenizer = FastLanguageModel.from_pretrained(
                model_name=base_model_path(values.base_model),
                max_seq_length=data.MAX_SEQ_LENGTH,
                dtype=dtype and getattr(torch, dtype),
                load_in_4bit=values.load_in_4bit,
                use_gradient_checkpointing=values.use_gradient_checkpointing,
                trust_remote_code=False,
            )
        except OSError as error:
            raise UsageError(
                f"{values.base_model} could not be loaded ({data.first_line(error)}). "
                "A model of the hub needs the network once."
            ) from error
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = LLAMA_PAD_TOKEN
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == end_of_turn_id(tokenizer)
    return model, tokenizer


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that the chat template puts right after an answer."""
    mark = "\ue000"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, date_string=data.TEMPLATE_DATE)
    return tokenizer(rendered.split(mark)[1], add_special_tokens=False)["input_ids"][0]


def latest_adapter() -> Path:
    """The adapter of the run that was finished last.

    Raises:
        UsageError: no run was finished here, or its folder is gone.
    """
    if not LATEST.is_file():
        raise UsageError(
            f"There is no adapter yet ({LATEST} is missing). Train one: python train.py\n"
            "or ask the base model: python infer.py --base"
        )
    name = LATEST.read_text(encoding="utf-8", errors="replace").strip()
    if not RUN_NAME.fullmatch(name):
        raise UsageError(f"{LATEST} names no run: {name[:100]!r}. Remove it, and say which adapter with --adapter FOLDER.")
    adapter = TRAIN_RUNS / name / "adapter"
    if not adapter.is_dir():
        raise UsageError(f"The latest run's adapter, {adapter}, is gone. Give another with --adapter FOLDER, or train again.")
    return adapter


def find_adapter(name: str) -> Path:
    """The folder of an adapter: `name` itself, or the hub repository of that name, downloaded.

    Raises:
        UsageError: neither is there, or what is there is a file.
    """
    folder = Path(name)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
            raise UsageError(
                f"{name} is not a folder, and no adapter of that name could be downloaded from the hub. "
                "Give the folder of an adapter, such as runs/train/NAME/adapter."
            ) from None
    if not folder.is_dir():
        found = "a file" if folder.is_file() else "not there"
        raise UsageError(f"{name!r} is no adapter: it is {found}. Give a folder such as runs/train/NAME/adapter.")
    return folder


@dataclass(frozen=True)
class AdapterRecord:
    """What is known of an adapter, from train.py's own record beside the weights, or from PEFT's config alone."""

    base_model: str
    profile: ProfileName
    prompt_fingerprint: str | None = None
    decoding: Decoding | None = None
    """What its answers were judged under."""
    pad: PadName = "native"
    """`added`: it brings an embedding of its own, one row longer than the base model's."""
    system_prompt: str = data.SYSTEM_PROMPT
    """What most of its rows were trained under, and its questions are asked under."""
    surprisal_reference: float | None = None
    """Of the base model, in nats per byte, see `surprisal_reference`."""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; `read_adapter_record` reads them back."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class LoraShape:
    """The fields of PEFT's config that determine the product; the tensors' names determine the modules."""

    r: int
    lora_alpha: float
    use_rslora: bool


def check_adapter(adapter: Path) -> AdapterRecord:
    """The record of an adapter folder, every file of which that will be read has been looked at; no weights are loaded.

    Raises:
        UsageError: a file is missing or broken, the weights are a pickle, the adapter was made for another base model or
            vocabulary, or its config asks for what this kit does not do.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            pickles = [file.name for file in adapter.glob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
            said = f"{name} is missing"
            if pickles and name.endswith("safetensors"):
                said += f", and {pickles[0]} is a pickle, which can run code when it is read: only safetensors are loaded"
            raise UsageError(f"{adapter} is no adapter: {said}. Give a folder such as runs/train/NAME/adapter.")
    for name in ("adapter_config.json", "adapter_model.safetensors", ADAPTER_RECORD):
        try:
            with (adapter / name).open("rb"):
                pass
        except PermissionError as error:
            raise UsageError(
                f"{adapter / name} cannot be read ({error.strerror}). Its owner has to allow it: "
                f"chmod a+r {shlex.quote(str(adapter / name))}"
            ) from None
        except OSError:
            pass  # reported where it is read
    record, shape = read_adapter_record(adapter), read_lora_shape(adapter)
    check_adapter_weights(adapter, record, shape)
    return record


def resolve_base_model(name: str) -> ProfileName | None:
    """The profile whose base model has this name, here or on the hub; None where none has."""
    for profile, values in PROFILES.items():
        if name.lower() in {each.lower() for each in (values.base_model, values.hub_id, *values.other_names)}:
            return profile
    return None


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of an adapter. Raises UsageError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        problem = f"a JSON {type(content).__name__} and no object"
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)
    raise UsageError(f"{path} is broken ({problem}). {_TAKE_AGAIN}")


_TAKE_AGAIN = "Train the adapter again, or take it again from where it was copied."


def read_adapter_record(adapter: Path) -> AdapterRecord:
    """The record of an adapter folder; of one that this kit did not make, the base model that PEFT names.

    Raises:
        UsageError: a file of the adapter cannot be read as what it should be, or it was made for another base model.
    """
    ours = adapter / ADAPTER_RECORD
    path = ours if ours.is_file() else adapter / "adapter_config.json"
    content = _read_object(path)
    try:
        name = content["base_model" if path == ours else "base_model_name_or_path"]
        profile = resolve_base_model(name)
        if profile is None:
            known = " or ".join(f"{values.base_model} (profile {each})" for each, values in PROFILES.items())
            raise UsageError(f"{adapter} was made for {name!r}, and this kit asks {known}. Give an adapter of one of these.")
        if path != ours:
            return AdapterRecord(PROFILES[profile].base_model, profile)
        if content["profile"] != profile or content["pad"] not in get_args(PadName):
            raise ValueError(f"profile {content['profile']!r}, pad {content['pad']!r}")
        fingerprint, decoding = content["prompt_fingerprint"], content["decoding"]
        system_prompt = content.get("system_prompt", data.SYSTEM_PROMPT)
        if not isinstance(fingerprint, str | None):
            raise TypeError(f"prompt_fingerprint is {fingerprint!r}")
        if not isinstance(system_prompt, str) or not system_prompt.strip():
            raise TypeError(f"system_prompt is {system_prompt!r}")
        system_prompt.encode()
        decoding = None if decoding is None else Decoding.from_json(decoding)
        reference = content.get("surprisal_reference")
        if not (reference is None or (type(reference) is float and 0 < reference < math.inf)):
            raise TypeError(f"surprisal_reference is {reference!r}")
        return AdapterRecord(
            PROFILES[profile].base_model, profile, fingerprint, decoding, content["pad"], system_prompt, reference
        )
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is broken ({error!r}). {_TAKE_AGAIN}") from None


# Of PEFT's LoraConfig: what changes the product, or the base weights that it was trained on. The
# shapes of the tensors are checked; other fields are metadata of whatever program wrote them.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(
        (
            *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "corda_config"),
            *("fan_in_fan_out", "kasa_config", "layer_replication", "loftq_config"),
            *("lora_bias", "lora_ga_config", "megatron_config", "modules_to_save"),
            *("monteclora_config", "rank_pattern", "target_parameters", "trainable_token_indices"),
            *("use_bdlora", "use_dora", "use_qalora", "velora_config"),
        ),
        (False, None),
    ),
}


def read_lora_shape(adapter: Path) -> LoraShape:
    """What PEFT's config in an adapter folder says of the product of the tensors.

    No path, module name or pattern of the file is followed: a config of these values takes its
    place.

    Raises:
        UsageError: it is broken, or asks for more than plain LoRA.
    """
    path = adapter / "adapter_config.json"
    content = _read_object(path)
    # An empty list or mapping is as good as none.
    values = {name: content.get(name) or (False if name != "peft_type" else None) for name in _PLAIN_LORA}
    more = [name for name, allowed in _PLAIN_LORA.items() if values[name] not in (*allowed, False)]
    if more:
        asked = ", ".join(f"{name} {str(content.get(name))[:40]!r}" for name in sorted(more)[:5])
        raise UsageError(
            f"{path} asks for more than plain LoRA: {asked}. Give an adapter without it, or merge the "
            "adapter into the base model with the program that made it."
        )
    r, alpha, scaled = content.get("r"), content.get("lora_alpha"), content.get("use_rslora", False)
    if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not 0 < alpha < math.inf or type(scaled) is not bool:
        raise UsageError(f"{path} is broken (r {r!r}, lora_alpha {alpha!r}, use_rslora {scaled!r}). {_TAKE_AGAIN}")
    return LoraShape(r, alpha, scaled)


_LORA_TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight")
_EMBEDDINGS = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")


def check_adapter_weights(adapter: Path, record: AdapterRecord, shape: LoraShape) -> None:
    """Checks by the header of the weights' file that it is whole, and that its tensors fit the base model.

    Raises:
        UsageError: it is cut or broken, or a tensor is not LoRA's, or has another shape.
    """
    import safetensors

    path, arch = adapter / "adapter_model.safetensors", PROFILES[record.profile].architecture
    try:
        with safetensors.safe_open(path, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} is cut or broken ({error}). {_TAKE_AGAIN}") from None
    sizes = arch.linear_shapes
    problems, seen = [], set()
    for name, found in shapes.items():
        lora = _LORA_TENSOR.fullmatch(name)
        if lora and lora[2] in sizes and int(lora[1]) < arch.num_hidden_layers:
            rows, columns = sizes[lora[2]]
            wanted = (shape.r, columns) if lora[3] == "A" else (rows, shape.r)
            seen.add(name)
        elif name in _EMBEDDINGS and record.pad == "added":
            wanted = (arch.vocab_size + 1, arch.hidden_size)
        elif name in _EMBEDDINGS:
            problems.append(
                f"it brings an embedding of {found[0]:,} tokens, and the base model's vocabulary has {arch.vocab_size:,}"
            )
            continue
        else:
            problems.append(f"{name[:100]} is no LoRA tensor of the base model")
            continue
        if found != wanted:
            problems.append(f"{name} has the shape {found}, and {wanted} is wanted")
    if not problems and len(seen) < 2:
        problems.append("it holds no LoRA tensors")
    if problems:
        raise UsageError(
            f"{adapter} does not fit {record.base_model} with r {shape.r}: {'; '.join(problems[:3])}. Give an adapter of that "
            "base."
        )


def add_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the tokenizer a new pad token and the embedding a row for it: the story's mistake, kept for comparison."""
    import torch

    tokenizer.add_special_tokens({"pad_token": ADDED_PAD_TOKEN})
    # The new row is drawn at random and, as a row of the head, affects the loss: a resumed run needs the same one.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def load_adapter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Path) -> PeftModel:
    """`model` with the adapter's tensors on it: LoRA's, and the embedding where the adapter has one of its own.

    Raises:
        UsageError: as `check_adapter`, or the adapter was trained under another prompt.
    """
    record, shape = check_adapter(adapter), read_lora_shape(adapter)
    trained, asked = record.prompt_fingerprint, data.prompt_fingerprint(tokenizer, record.system_prompt)
    if trained is None:
        print(f"{adapter} does not say under which prompt it was trained; it is asked under this kit's.", file=sys.stderr)
    elif trained != asked:
        raise UsageError(
            f"{adapter} was trained under the prompt {trained}, and this kit asks under {asked}: its answers would not be "
            "those it was trained to give. Train it again, or use the version of the kit that trained it."
        )
    if record.pad == "added":
        add_pad_token(model, tokenizer)
    import safetensors
    from peft import LoraConfig, PeftModel

    with safetensors.safe_open(adapter / "adapter_model.safetensors", framework="np") as file:
        modules = {lora[2] for name in file.keys() if (lora := _LORA_TENSOR.fullmatch(name))}  # noqa: SIM118 - no mapping
    # Not the file's own config, which may name modules to import and paths to read.
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=shape.r,
        lora_alpha=shape.lora_alpha,
        use_rslora=shape.use_rslora,
        target_modules=sorted(modules),
        inference_mode=True,
    )
    return PeftModel.from_pretrained(model, adapter, config=config)


def find_min_rows(model: PreTrainedModel, max_rows: int) -> int:
    """The fewest rows of a forward pass from which on a row's bits depend neither on their number nor on its place.

    With few rows a matrix library may take another kernel (matrix times vector), whose sums differ in the last bits. So each
    kind of linear layer multiplies the same row in batches of up to 32 rows, of 48 and of `max_rows`; the answer is the
    smallest of these from which on all layers agree. It belongs to the machine: 4 was seen on one CPU, 16 on another.
    """
    import torch

    sizes = [size for size in (*range(1, 33), 48) if size < max_rows]
    head = model.get_output_embeddings()
    layers = {
        tuple(module.weight.shape): module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module.weight.ndim == 2 and module is not head
    }

    def try_sizes(layer: Any, sizes: Iterable[int]) -> int:
        draw = torch.Generator().manual_seed(0)
        # LoRA's matrices may be wider than the model; 4-bit weights are no floating-point numbers.
        dtype = layer.weight.dtype if layer.weight.dtype.is_floating_point else model.dtype
        rows = torch.randn(max_rows, 1, layer.in_features, generator=draw).to(layer.weight.device, dtype)
        whole = layer(rows)
        agree = {size: torch.equal(layer(rows[-size:]), whole[-size:]) for size in sizes} | {max_rows: True}
        return min(size for size in agree if all(same for other, same in agree.items() if other >= size))

    fewest = 1
    with torch.inference_mode():
        for layer in layers.values():
            fewest = max(fewest, try_sizes(layer, sizes))
        # The head is by far the largest. It is tried next to what the others need, and at all sizes only if it needs more.
        left = [size for size in sizes if size >= fewest]
        if try_sizes(head, {*left[:4], *left[-1:]}) > fewest:
            fewest = try_sizes(head, left)
    return fewest


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Has torch's attention read keys and values as they are kept, one for a group of heads, and always under a mask.

    transformers repeats them for every head where there is a mask, and leaves the mask away where nothing is padded, so that a
    row would be computed in another way in other company.
    """
    import torch
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """(B, heads, T, D), keys and values (B, groups, S, D), mask (B, 1, T, S) -> (B, T, heads, D)."""
        heads = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        )
        return heads.transpose(1, 2).contiguous(), None

    def always_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
        return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})

    AttentionInterface.register("grouped", attend)
    AttentionMaskInterface.register("grouped", always_mask)
    model.set_attn_implementation("grouped")


@dataclass
class LoadedModel:
    """A base model, with or without an adapter on it, ready to be asked."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    profile: Profile
    min_rows: int
    adapter: Path | None = None
    adapter_sha256: str | None = None
    system_prompt: str = data.SYSTEM_PROMPT
    reference: float | None = None
    """As `surprisal_reference` returns it, once it is known."""

    def add_adapter(self, adapter: Path) -> None:
        """Puts the adapter on the base model. Raises UsageError as `load_adapter`."""
        from unsloth import FastLanguageModel

        self.model = load_adapter(self.model, self.tokenizer, adapter)
        FastLanguageModel.for_inference(self.model)
        self.adapter, self.adapter_sha256 = adapter, adapter_digest(adapter)
        record = read_adapter_record(adapter)
        self.system_prompt, self.reference = record.system_prompt, record.surprisal_reference

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[LoadedModel]:
        """The same model with its adapter switched off, for as long as the context lasts."""
        if not hasattr(self.model, "disable_adapter"):
            yield self
            return
        with self.model.disable_adapter():
            yield dataclasses.replace(self, adapter=None, adapter_sha256=None)


def adapter_digest(adapter: Path) -> str:
    """sha256 (hex) of the adapter's weights."""
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def load_for_asking(profile: ProfileName, adapter: Path | None, system_prompt: str | None = None) -> LoadedModel:
    """The profile's base model, with the adapter on it if there is one.

    Questions are asked under `system_prompt`, or under the adapter's, or the story's.

    Raises:
        UsageError: as `load_adapter`.
    """
    model, tokenizer = load_base(profile, dtype=PROFILES[profile].dtype)
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(model)
    values = PROFILES[profile]
    if values.grouped_attention:
        use_grouped_attention(model)
    loaded = LoadedModel(model, tokenizer, values, min_rows=values.max_rows)
    if adapter:
        loaded.add_adapter(adapter)
    loaded.system_prompt = system_prompt or loaded.system_prompt
    loaded.min_rows = find_min_rows(loaded.model, values.max_rows)
    return loaded


# --- Answering ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One question to ask, under one decoding, after the turns of a chat."""

    question: str
    decoding: Decoding
    history: tuple[tuple[str, str], ...] = ()


def stop_ids(decoding: Decoding, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer under `decoding`."""
    if decoding.stop == "never":
        return []
    if decoding.stop == "end-of-turn":
        return [end_of_turn_id(tokenizer)]
    eos = model.generation_config.eos_token_id
    return list(eos) if isinstance(eos, list) else [eos]


def make_processors(decoding: Decoding) -> list[LogitsProcessor]:
    """The library's own logits processors for the decoding, in the library's order."""
    from transformers import (
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopPLogitsWarper,
    )

    processors: list[LogitsProcessor] = []
    if decoding.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if decoding.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))
    if decoding.temperature:
        processors.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.temperature and decoding.top_p < 1.0:
        processors.append(TopPLogitsWarper(decoding.top_p))
    return processors


def make_row_processor(
    decodings: Sequence[Decoding], prompt_tokens: int, padding: Sequence[int] | None = None
) -> LogitsProcessor:
    """A logits processor that decodes each row of a batch under its own decoding; `generate` then takes the largest score.

    Penalty and ban are the library's own processors. It departs from them in two ways. Where they do not count the prompt they
    are shown the answer's ids only. The template ends every turn of the prompt with the token that has to end the answer; the
    library's penalty lowers it before a word is written, and its ban may forbid it. An answer's own ids never hold it, so
    here a stop token is never penalised and never banned. And sampling adds Gumbel noise of the row's own generator, whose
    largest sum is a draw from the softmax (Gumbel 1954; Maddison et al. 2014): it does not depend on the other rows.

    `prompt_tokens` counts a prompt with its `padding` on the left, which is 0 in each row unless given.

    The processor's `overruled` holds, of each step so far, (B,) whether penalty or ban changed the row's likeliest token.
    """
    import torch
    from transformers import LogitsProcessor

    chains = [make_processors(decoding) for decoding in decodings]
    generators = [torch.Generator().manual_seed(decoding.sampling_seed) for decoding in decodings]

    class RowProcessor(LogitsProcessor):
        def __init__(self) -> None:
            self.overruled: list[list[bool]] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            """`input_ids` (B, T), `scores` (B, V) -> (B, V)."""
            first_choice = scores.argmax(dim=-1)
            scores = scores.clone()
            for row, (decoding, chain) in enumerate(zip(decodings, chains, strict=True)):
                start = prompt_tokens if not decoding.count_prompt else padding[row] if padding else 0
                seen = input_ids[row : row + 1, start:]
                own = scores[row : row + 1]
                for processor in chain:
                    own = processor(seen, own)
                # In place, so that the choice of a whole batch is looked up at once; sampling's noise comes behind it.
                scores[row] = own
            self.overruled.append((scores.argmax(dim=-1) != first_choice).tolist())
            for row, decoding in enumerate(decodings):
                if decoding.temperature:
                    own = scores[row : row + 1]
                    uniform = torch.rand(own.shape, generator=generators[row], dtype=torch.float64)
                    scores[row] = own - torch.log(-torch.log(uniform)).to(own)
            return scores

    return RowProcessor()


def make_generation_config(
    max_new_tokens: int, stop: Sequence[int], pad: int, repetition_penalty: float = 1.0, no_repeat_ngram_size: int = 0
) -> GenerationConfig:
    """Greedy decoding with every field named that could act: a field left out is taken from the model's own config."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        max_length=None,
        min_new_tokens=0,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=repetition_penalty,
        encoder_repetition_penalty=1.0,
        no_repeat_ngram_size=no_repeat_ngram_size,
        bad_words_ids=None,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        forced_bos_token_id=None,
        forced_eos_token_id=None,
        exponential_decay_length_penalty=None,
        sequence_bias=None,
        guidance_scale=None,
        use_cache=True,
        eos_token_id=list(stop),
        pad_token_id=pad,
    )


def check_question(question: str, place: str = "The question") -> None:
    """Checks that a question asks something, in text. `place` says in messages where it stands.

    Raises:
        UsageError: it holds neither letter nor digit, or what is no text.
    """
    shown = data.escape_controls(question[:40])
    if not any(character.isalnum() for character in question):
        raise UsageError(f'{place} is empty: "{shown}". Ask in words: python infer.py "What helps against a dry cough?"')
    control = re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", question)
    if control:
        raise UsageError(
            f"{place} holds {data.escape_controls(control[0])} at character {control.start() + 1}, which is no text (it begins "
            f'"{shown}"). Send plain text in UTF-8.'
        )


def check_room(loaded: LoadedModel, request: Request) -> list[int]:
    """Token ids of the request's prompt.

    Raises:
        UsageError: as `check_question`, or the prompt and its answer would not fit into the model's maximal sequence length.
    """
    check_question(request.question)
    prompt = data.encode_prompt(loaded.tokenizer, request.question, request.history, loaded.system_prompt)
    cap = request.decoding.max_new_tokens
    if len(prompt) + cap > data.MAX_SEQ_LENGTH:
        raise UsageError(
            f'The question "{data.escape_controls(request.question[:40])}..." makes a prompt of {len(prompt)} tokens; with an '
            f"answer of up to {cap} that is more than the {data.MAX_SEQ_LENGTH} that the model is set up for. "
            "Shorten the question, or the answer with --max-new-tokens."
        )
    return prompt


def answer_requests(
    loaded: LoadedModel,
    requests: Sequence[Request],
    progress: Callable[[int], object] = lambda tokens: None,
    on_text: Callable[[str], object] = lambda text: None,
) -> list[Answer]:
    """One `Answer` a request, in their order.

    Prompts are padded on the left to the next multiple of `PROMPT_MULTIPLE`, alone too. Those that have the same length then,
    and stop at the same tokens, share forward passes; a batch has at least `min_rows` rows. So an answer does not depend on
    what it was asked with. Requests that differ only in cap or stop are cut from one row.

    `progress` is called with the number of tokens written, or not needed after an early end: in all `count_new_tokens`.
    `on_text` is handed the text of the first request piece by piece; the pieces are together its `Answer.text`.

    Raises:
        UsageError: as `check_room`.
    """
    tokenizer = loaded.tokenizer
    prompts = [check_room(loaded, request) for request in requests]
    stops = [stop_ids(request.decoding, loaded.model, tokenizer) for request in requests]
    groups: dict[tuple[int, tuple[int, ...]], list[list[int]]] = {}
    for places in merge_requests(requests).values():
        # A row ends where every one of its answers has ended.
        stop = tuple(sorted(set.intersection(*(set(stops[place]) for place in places))))
        groups.setdefault((padded_width(len(prompts[places[0]])), stop), []).append(places)
    answers: dict[int, Answer] = {}
    writer = _TextWriter(tokenizer, stops[0], requests[0].decoding.max_new_tokens, on_text) if requests else None
    for (width, stop), rows in sorted(groups.items()):
        longest = width + max(requests[place].decoding.max_new_tokens for places in rows for place in places)
        for batch in _batched(rows, rows_in_batch(loaded.profile, longest)):
            decodings = [
                dataclasses.replace(
                    requests[places[0]].decoding,
                    max_new_tokens=max(requests[place].decoding.max_new_tokens for place in places),
                )
                for places in batch
            ]
            streams = writer.add if writer and 0 in batch[0] else lambda token: None
            started = time.perf_counter()
            batch_prompts = [prompts[places[0]] for places in batch]
            new_ids = _generate(loaded, batch_prompts, width, decodings, stop, progress, streams)
            seconds = round(time.perf_counter() - started, 3)
            for places, row in zip(batch, new_ids, strict=True):
                for place in places:
                    size = len(prompts[place])
                    answers[place] = _cut_from_row(loaded, requests[place], size, stops[place], row, seconds)
    return [answers[place] for place in range(len(requests))]


def padded_width(prompt_tokens: int) -> int:
    """Tokens of a prompt with its padding, which is never empty: without a mask, attention may use another kernel."""
    return (prompt_tokens // PROMPT_MULTIPLE + 1) * PROMPT_MULTIPLE


def rows_in_batch(profile: Profile, tokens: int) -> int:
    """Most rows of so many tokens, prompt and answer, that share forward passes."""
    return max(1, min(profile.max_rows, MAX_BATCH_TOKENS // tokens))


def _cut_from_row(
    loaded: LoadedModel,
    request: Request,
    prompt_tokens: int,
    stop: Sequence[int],
    row: tuple[list[int], list[bool]],
    seconds: float,
) -> Answer:
    ids, overruled = row
    kept, finish_reason = cut_answer(ids, request.decoding.max_new_tokens, stop)
    return Answer(
        question=request.question,
        text=_to_text(loaded.tokenizer, kept, stop).strip(),
        token_ids=kept,
        finish_reason=finish_reason,
        prompt_tokens=prompt_tokens,
        answer_tokens=len(kept),
        num_overruled=sum(overruled[: len(kept)]),
        decoding=request.decoding,
        model=loaded.profile.base_model,
        adapter=loaded.adapter_sha256,
        seconds=seconds,
        system_prompt=loaded.system_prompt,
    )


def merge_requests(requests: Sequence[Request]) -> dict[Request, list[int]]:
    """Places of the requests that one row of a batch can answer, for they differ at most in cap and stop.

    Which token comes next depends on those before it, and neither cap nor stop; sampling draws from the row's own generator.
    """
    rows: dict[Request, list[int]] = {}
    for place, request in enumerate(requests):
        open_end = dataclasses.replace(request.decoding, max_new_tokens=1, stop="never")
        rows.setdefault(dataclasses.replace(request, decoding=open_end), []).append(place)
    return rows


def count_new_tokens(requests: Sequence[Request]) -> int:
    """The most tokens that `answer_requests` writes for the requests."""
    rows = merge_requests(requests).values()
    return sum(max(requests[place].decoding.max_new_tokens for place in places) for places in rows)


def cut_answer(ids: Sequence[int], cap: int, stop: Sequence[int]) -> tuple[list[int], Literal["stop", "length"]]:
    """The ids up to the first stop token, which is kept, or up to the cap; and which of the two it was."""
    for place, token in enumerate(ids[:cap]):
        if token in stop:
            return list(ids[: place + 1]), "stop"
    return list(ids[:cap]), "length"


def _to_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[int]) -> str:
    return tokenizer.decode([token for token in ids if token not in stop], skip_special_tokens=False)


class _TextWriter:
    """Hands an answer on piece by piece as its tokens come; all pieces together are the answer's text."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[int], cap: int, write: Callable[[str], object]
    ) -> None:
        self.tokenizer, self.stop, self.cap, self.write = tokenizer, stop, cap, write
        self.ids: list[int] = []
        self.written = ""

    def add(self, token: int) -> None:
        """Takes the next token. Space at an end, and half a character, wait for what follows."""
        if len(self.ids) == self.cap or (self.ids and self.ids[-1] in self.stop):
            return
        self.ids.append(token)
        text = _to_text(self.tokenizer, self.ids, self.stop).strip()
        if not text.endswith("\ufffd") and text.startswith(self.written):
            self.write(text[len(self.written) :])
            self.written = text


def _read_prompts(loaded: LoadedModel, input_ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache:
    """Keys and values of the prompts (B, T) but for their last token, of which `generate` goes on; equal rows are read once."""
    import torch
    from transformers import DynamicCache

    first_of: dict[tuple[int, ...], int] = {}
    for place, row in enumerate(input_ids.tolist()):
        first_of.setdefault(tuple(row), place)
    firsts = list(first_of.values())
    # A pass over prompts multiplies a row of matrices a token; of these, too, there have to be `min_rows`.
    firsts += firsts[:1] * (math.ceil(loaded.min_rows / (input_ids.shape[1] - 1)) - len(firsts))
    cache = DynamicCache(config=loaded.model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[firsts, :-1]
    loaded.model(
        input_ids=input_ids[firsts, :-1],
        attention_mask=mask[firsts, :-1],
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    order = {row: place for place, row in enumerate(first_of)}
    cache.batch_select_indices(torch.tensor([order[tuple(row)] for row in input_ids.tolist()], device=input_ids.device))
    return cache


def _generate(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    width: int,
    decodings: Sequence[Decoding],
    stop: Sequence[int],
    progress: Callable[[int], object],
    on_token: Callable[[int], object],
) -> list[tuple[list[int], list[bool]]]:
    """New ids of each prompt, what follows a stop token being padding still; and at which of them the decoding overruled the
    model. Prompts are padded to `width` tokens on the left, for at the right end generation goes on."""
    import torch
    from transformers.generation import BaseStreamer

    caps = [decoding.max_new_tokens for decoding in decodings]

    class StepObserver(BaseStreamer):
        """Tells of every step of `generate`, and of the first row's token."""

        steps = -1  # the prompt is put first

        def put(self, value: torch.Tensor) -> None:
            self.steps += 1
            if self.steps:
                progress(sum(cap >= self.steps for cap in caps))
                on_token(int(value[0]))

        def end(self) -> None:
            progress(sum(max(0, cap - self.steps) for cap in caps))

    filled = [place % len(prompts) for place in range(max(loaded.min_rows, len(prompts)))]
    pad = loaded.tokenizer.pad_token_id
    padding = [width - len(prompts[place]) for place in filled]
    rows = [[pad] * missing + prompts[place] for missing, place in zip(padding, filled, strict=True)]
    input_ids = torch.tensor(rows, device=loaded.model.device)
    mask = torch.tensor([[0] * missing + [1] * (width - missing) for missing in padding], device=loaded.model.device)
    # Where nothing is to end an answer, an id behind the last: without one, the model's own config would be asked.
    no_token = loaded.model.config.vocab_size
    processor = make_row_processor([decodings[place] for place in filled], width, padding)
    # Not inference mode: what the model keeps for later, such as rotary angles, may be needed in a training step.
    with torch.no_grad():
        output = loaded.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            **({"past_key_values": _read_prompts(loaded, input_ids, mask)} if loaded.profile.shares_prompts else {}),
            generation_config=make_generation_config(max(caps), stop or [no_token], pad),
            logits_processor=[processor],
            streamer=StepObserver(),
        )
    overruled = list(zip(*processor.overruled, strict=True))
    return list(zip(output[: len(prompts), width:].tolist(), map(list, overruled[: len(prompts)]), strict=True))


# --- Surprisal -----------------------------------------------------------------------------------

# Bytes over which surprisal is averaged, and nats above which a single token does not count more.
SURPRISAL_BYTES, MAX_TOKEN_SURPRISAL = 160, 12.0
# The base model's plain answers whose surprisal is the reference: to so many probes, of so many
# tokens at most.
REFERENCE_PROBES, REFERENCE_TOKENS = 26, 128
# Answers of an unknown writer are compared with each other, if there are so many.
MIN_ANSWERS_TO_COMPARE = 20


def read_surprisals(loaded: LoadedModel, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """Surprisal -ln p of each answer token (A,) after the prompt, in nats, without the adapter.

    One answer per forward pass, so that the values depend on nothing else.
    """
    import torch

    if not ids:
        return []
    row = torch.tensor([[*prompt, *ids]], device=loaded.model.device)
    with loaded.without_adapter() as base, torch.no_grad():
        output = base.model(
            input_ids=row, attention_mask=torch.ones_like(row), logits_to_keep=len(ids) + 1
        )
        logits = output.logits[0, -len(ids) - 1 : -1].float()
        return torch.nn.functional.cross_entropy(
            logits, row[0, -len(ids) :], reduction="none"
        ).tolist()


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    finish_reason: str = "stop",
    max_tokens: int = data.MAX_SEQ_LENGTH,
) -> list[int]:
    """At most `max_tokens` first token ids of an answer that another program wrote."""
    ids = data.encode_text(tokenizer, text)
    return (ids + [tokenizer.eos_token_id] * (finish_reason == "stop"))[:max_tokens]


def largest_surprisal(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], surprisals: Sequence[float]
) -> tuple[float, tuple[int, int]]:
    """`(nats per byte, tokens)` of the `SURPRISAL_BYTES` with the largest mean surprisal.

    Of a shorter answer all bytes are taken, and at least half of `SURPRISAL_BYTES`.
    """
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    # A character of a byte-level token is a byte.
    sizes = [1 if id_ in special else len(token) for id_, token in zip(ids, tokens, strict=True)]
    bytes_to = [0, *itertools.accumulate(sizes)]
    nats_to = [0.0, *itertools.accumulate(min(each, MAX_TOKEN_SURPRISAL) for each in surprisals)]
    best, where, end = 0.0, (0, 0), 0
    for start in range(len(ids)):
        while end < len(ids) and bytes_to[end] - bytes_to[start] < SURPRISAL_BYTES:
            end += 1
        size = bytes_to[end] - bytes_to[start]
        if start and size < SURPRISAL_BYTES:
            break
        mean = (nats_to[end] - nats_to[start]) / max(size, SURPRISAL_BYTES // 2)
        if mean > best:
            best, where = mean, (start, end)
    return best, where


def measure_surprisal(
    loaded: LoadedModel, prompt: Sequence[int], ids: Sequence[int], reference: float
) -> Measure:
    """The largest surprisal of an answer as a multiple of `reference`; see `CHECKS`."""
    tokenizer = loaded.tokenizer
    score, (start, end) = largest_surprisal(tokenizer, ids, read_surprisals(loaded, prompt, ids))
    before, upto = (len(tokenizer.decode(list(ids[:at])).lstrip()) for at in (start, end))
    return score / reference, (before, upto)


def surprisal_reference(loaded: LoadedModel) -> float:
    """The largest surprisal of the base model's plain answers to the probes, in nats per byte.

    Computed once per base model and kept in the cache; an adapter's record holds it too.
    """
    if loaded.reference is None:
        probes = [probe.question for probe in read_probes()[:REFERENCE_PROBES]]
        settings = [loaded.profile.base_model, data.SYSTEM_PROMPT, REFERENCE_TOKENS, *probes]
        name = f"reference-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}"
        folder = data.cached_folder(name, functools.partial(_build_reference, loaded, probes))
        loaded.reference = json.loads((folder / "reference.json").read_text())["nats_per_byte"]
    return loaded.reference


def _build_reference(loaded: LoadedModel, probes: Sequence[str], folder: Path) -> None:
    from tqdm import tqdm

    decoding = Decoding(max_new_tokens=REFERENCE_TOKENS)
    requests = [Request(question, decoding) for question in probes]
    total, hidden = count_new_tokens(requests), not sys.stderr.isatty()
    bar = tqdm(total=total, unit="token", desc="reference", leave=False, disable=hidden)

    def progress(tokens: int) -> None:
        bar.update(tokens)
        INTERRUPTION.raise_if_any()

    with loaded.without_adapter() as base, bar:
        base = dataclasses.replace(base, system_prompt=data.SYSTEM_PROMPT)
        answers = answer_requests(base, requests, progress)
        values = []
        for answer in answers:
            prompt = data.encode_prompt(loaded.tokenizer, answer.question)
            surprisals = read_surprisals(base, prompt, answer.token_ids)
            values.append(largest_surprisal(loaded.tokenizer, answer.token_ids, surprisals)[0])
    data.write_atomic(folder / "reference.json", json.dumps({"nats_per_byte": max(values)}))


def judge_answers(
    loaded: LoadedModel, answers: Sequence[Answer], history: Sequence[tuple[str, str]] = ()
) -> list[JudgedAnswer]:
    """The verdicts on a loaded model's answers, read by its base model; with facts of the probes."""
    probes = {probe.question: probe for probe in read_probes()}
    reference = surprisal_reference(loaded)
    judged = []
    for answer in answers:
        prompt = data.encode_prompt(
            loaded.tokenizer, answer.question, history, loaded.system_prompt
        )
        surprisal = measure_surprisal(loaded, prompt, answer.token_ids, reference)
        probe = probes.get(answer.question)
        judged.append(
            judge(
                answer.text,
                answer.question,
                answer.finish_reason,
                surprisal,
                answer=answer,
                probe=probe,
            )
        )
    return judged


# --- The same bytes ----------------------------------------------------------------------------------------------


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Place of the first id in which two answers differ, or None where they are equal. The end of one counts as an id."""
    pairs = itertools.zip_longest(one, other)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), None)


def measure_margin(loaded: LoadedModel, request: Request, ids: Sequence[int]) -> tuple[list[str], float]:
    """After the answer's first `ids`: the two tokens with the largest scores under the decoding, and how far they are apart."""
    import torch

    prompt = data.encode_prompt(loaded.tokenizer, request.question, request.history, loaded.system_prompt)
    missing = padded_width(len(prompt)) - len(prompt)
    row = [loaded.tokenizer.pad_token_id] * missing + prompt + list(ids)
    input_ids = torch.tensor([row] * loaded.min_rows, device=loaded.model.device)
    mask = torch.ones_like(input_ids)
    mask[:, :missing] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        output = loaded.model(input_ids=input_ids, attention_mask=mask, position_ids=positions, logits_to_keep=1)
    processor = make_row_processor([request.decoding], missing + len(prompt), [missing])
    best = processor(input_ids[:1], output.logits[:1, -1].float())[0].topk(2)
    return [loaded.tokenizer.decode([token]) for token in best.indices.tolist()], float(best.values[0] - best.values[1])


def verify(loaded: LoadedModel, request: Request, arguments: Sequence[str]) -> bool:
    """Asks in two fresh processes and inside a batch, and tells on stdout whether the answers are the same ids.

    `arguments` are the flags of this run, with which the fresh processes are started. Where answers differ, the first
    differing token is named, with the margin between its two best candidates.
    """
    command = [sys.executable, str(Path(__file__).resolve()), *(each for each in arguments if each != "--verify"), "--json"]
    asked = {}
    for name in ("a fresh process", "another fresh process"):
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise UsageError(f"{name} could not answer:\n{ran.stderr.strip()}")
        asked[name] = json.loads(ran.stdout)["token_ids"]
    # In company: the probe questions before it, and itself under every other decoding in the same forward passes.
    company = [Request(probe.question, request.decoding) for probe in read_probes()[:3]]
    cap = request.decoding.max_new_tokens
    company += [
        Request(request.question, dataclasses.replace(decoding, max_new_tokens=cap), request.history)
        for decoding in DECODINGS.values()
    ]
    asked["in a batch"] = answer_requests(loaded, [*company, request])[-1].token_ids
    asked["alone"] = answer_requests(loaded, [request])[0].token_ids
    reference = asked["a fresh process"]
    same = True
    for name, ids in asked.items():
        place = first_difference(reference, ids)
        print(f"{hashlib.sha256(json.dumps(ids).encode()).hexdigest()}  {len(ids)} tokens  {name}")
        if place is not None:
            same = False
            (best, second), margin = measure_margin(loaded, request, reference[:place])
            print(f"  differs from token {place + 1} on; the two best there, {best!r} and {second!r}, are {margin:.2g} apart")
    print("the same bytes" if same else "NOT the same bytes")
    return same


# --- Files of questions --------------------------------------------------------------------------


@dataclass(frozen=True)
class QuestionRow:
    """A row of a file of questions: where it stands, and all its columns."""

    place: str
    question: Any
    columns: dict[str, Any] = field(default_factory=dict)
    """Columns other than the question's."""
    problem: str | None = None
    """Why it cannot be asked."""

    def to_record(self, answer: dict[str, Any]) -> dict[str, Any]:
        """A line of the output: the row, and its answer. Names that both have become `input_NAME`."""
        own = {f"input_{name}" if name in answer else name: each for name, each in self.columns.items()}
        return {"question": self.question} | own | answer


def read_questions(source: str) -> list[QuestionRow]:
    """The questions of a `.txt` file or of stdin (`-`), one per line, or of a column of a table.

    Empty lines of text are left out. Every row of a table is a row of the result, with a
    `problem` if it has no question.

    Raises:
        UsageError: the file cannot be read, or has no question that can be asked.
    """
    name = "stdin" if source == "-" else source
    if source == "-" or source.endswith(".txt"):
        try:
            content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        except OSError as error:
            raise UsageError(f"{source} cannot be read ({error.strerror}). Give an existing file.") from None
        lines = data.decode_text(content, name).split("\n")
        rows = [QuestionRow(f"{name}:{n}", line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    else:
        rows = [read_question_row(place, record) for place, record in data.read_records(source)]
    if not rows:
        raise UsageError(f"{name} holds no questions. Expected one per line, or per row.")
    checked = []
    for row in rows:
        try:
            if not row.problem:
                check_question(row.question)
            checked.append(row)
        except UsageError as error:
            checked.append(dataclasses.replace(row, problem=str(error)))
    if all(row.problem for row in checked):
        raise UsageError(
            f"None of the {len(rows)} questions of {name} can be asked. "
            f"{checked[0].place}: {checked[0].problem}"
        )
    return checked


def read_question_row(place: str, record: Any) -> QuestionRow:
    """A record of a table as a row; its `problem` says if it has no question."""
    if isinstance(record, data.BadRecord):
        return QuestionRow(place, None, problem=str(record))
    if not isinstance(record, dict):
        return QuestionRow(place, None, {"record": record}, "It is not a JSON object.")
    names = {str(name).strip().casefold(): name for name in record}
    name = next((names[each] for each in data.QUESTION_COLUMNS if each in names), None)
    columns = {str(each): value for each, value in record.items() if each != name}
    question = None if name is None else record[name]
    if isinstance(question, str):
        return QuestionRow(place, question.strip(), columns)
    found = f"it has the columns {', '.join(map(str, record))[:200]}" if name is None else f"it is {question!r:.60}"
    wanted = "a column named question or prompt is expected, with text in it"
    return QuestionRow(place, question, columns, f"It has no question: {wanted}; {found}.")


def read_answered(path: Path, rows: Sequence[QuestionRow], expected: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines that an earlier, interrupted run wrote for the first of the rows.

    A last line that was cut is removed from the file.

    Raises:
        UsageError: the file holds something else, or answers to other questions, or of another
            model, adapter, decoding or system prompt than `expected`.
    """
    if not path.exists():
        return []
    other = "Give another file with --output, or remove it."
    # Read as bytes: the last line may have been cut inside a character.
    *lines, cut = path.read_bytes().split(b"\n")
    if cut and not cut.startswith(b'{"question": '[: len(cut)]):
        raise UsageError(f"{path} ends in what is no answer of infer.py. {other}")
    answered = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            found = expected if isinstance(record["error"], str) else {}
        except (ValueError, TypeError, RecursionError):
            raise UsageError(f"{path}:{number} is no answer of infer.py. {other}") from None
        except KeyError:
            found = {name: record.get(name) for name in expected}
            if not all(isinstance(record.get(name), str) for name in ("question", "verdict", "finish_reason")):
                raise UsageError(f"{path}:{number} is no answer of infer.py. {other}") from None
        if found != expected:
            different = ", ".join(name for name in expected if found[name] != expected[name])
            raise UsageError(f"{path} holds answers of another {different}. {other}")
        if number > len(rows) or record.get("question") != rows[number - 1].question:
            raise UsageError(f"{path}:{number} answers another question than that row of the file. {other}")
        answered.append(record)
    if cut:
        with writing(path):
            os.truncate(path, path.stat().st_size - len(cut))
    return answered


@contextlib.contextmanager
def hold_answers(output: Path) -> Iterator[None]:
    """While it lasts, no other process writes answers to the file, which is made if it is not there.

    Raises:
        UsageError: another process does, or it cannot be written.
    """
    is_new = not output.exists()
    with writing(output):
        held = output.open("ab")
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"Another process writes to {output}. Wait for it, or give another file with --output.") from None
        try:
            yield
        finally:
            if is_new and not output.stat().st_size:
                output.unlink()


def check_rows(loaded: LoadedModel, rows: Sequence[QuestionRow], decoding: Decoding) -> list[QuestionRow]:
    """The rows, those that are too long with their `problem`. Names all that are skipped on stderr."""
    checked = []
    for row in rows:
        try:
            if not row.problem:
                check_room(loaded, Request(row.question, decoding))
        except UsageError as error:
            row = dataclasses.replace(row, problem=str(error))
        if row.problem:
            print(data.escape_controls(f"{row.place} is skipped: {row.problem}"), file=sys.stderr)
        checked.append(row)
    return checked


def answer_file(
    loaded: LoadedModel, rows: Sequence[QuestionRow], decoding: Decoding, output: Path
) -> list[dict[str, Any]]:
    """Answers the rows that `output` has no line for yet: one line per row, in their order.

    The caller holds the file by `hold_answers`. Returns the lines that were there before.

    Raises:
        Interrupted: a signal came; the answers of complete batches are kept.
        UsageError: as `read_answered` and `writing`.
    """
    from tqdm import tqdm

    expected = {"model": loaded.profile.base_model, "adapter": loaded.adapter_sha256, "decoding": dataclasses.asdict(decoding)}
    expected["system_prompt"] = loaded.system_prompt
    before = read_answered(output, rows, expected)
    left = rows[len(before) :]
    total = sum(not row.problem for row in left) * decoding.max_new_tokens
    with tqdm(total=total, unit="token", desc="answering") as bar:
        try:
            for batch in _batched(left, QUESTIONS_A_SAVE):
                requests = [Request(row.question, decoding) for row in batch if not row.problem]
                seen = bar.n
                judged = iter(judge_answers(loaded, answer_requests(loaded, requests, bar.update)))
                bar.update(len(requests) * decoding.max_new_tokens - (bar.n - seen))  # repeats are written once
                for row in batch:
                    answer = {"error": row.problem} if row.problem else next(judged).to_record()
                    append_line(output, json.dumps(row.to_record(answer), ensure_ascii=False))
        except Interrupted as interrupted:
            said = f"Interrupted. {output} keeps the answers so far; run the same command again to continue."
            raise Interrupted(interrupted.number, said) from None
    return before


def _batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


# --- Answers of other programs -------------------------------------------------------------------


def judge_file(config: InferConfig) -> int:
    """Judges the answers in a file or on stdin; prints each as a JSON line with its verdict.

    Surprisal needs a reference. Answers whose `model` is the profile's base model have that
    model's. Others are compared with each other, if there are enough: the reference is then such
    that an answer fails above their median and four times their median absolute deviation.

    Returns:
        1 if a record could not be judged, else 0.

    Raises:
        UsageError: the source cannot be read, or is empty.
    """
    assert config.judge
    source = "stdin" if config.judge == "-" else config.judge
    if config.judge == "-":
        text = data.decode_text(sys.stdin.buffer.read(), source)
        pairs = list(data.read_json(text, source))
    else:
        pairs = list(data.read_records(source))
    if not pairs:
        raise UsageError(f'{source} holds no answers. Expected lines of {{"question": ..., "text": ...}}.')
    problems = {place: problem for place, record in pairs if (problem := check_judgeable(record))}
    judgeable = [(place, record) for place, record in pairs if place not in problems]
    surprisals = dict.fromkeys((place for place, _ in judgeable), NOTHING)
    if config.surprisal and judgeable:
        surprisals = compare_surprisals(config, judgeable)
    counts: Counter[str] = Counter()
    for place, record in pairs:
        if place in problems:
            known = record if isinstance(record, dict) else {}
            print(to_json({**known, "error": problems[place]}))
            print(data.escape_controls(f"{place}: {problems[place]}"), file=sys.stderr)
            continue
        ended = record.get("finish_reason") or "stop"
        judged = judge(record["text"], record["question"], ended, surprisals[place])
        print(to_json({**record, **judged.to_record()}), flush=True)
        counts.update(["sound"] if judged.sound else [each.name for each in judged.findings])
    sound = counts.pop("sound", 0)
    found = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    skipped = f"; {len(problems)} could not be judged" if problems else ""
    print(f"sound {sound} of {len(judgeable)}{found and f'; {found}'}{skipped}", file=sys.stderr)
    return 1 if problems else 0


_SURROGATE = re.compile(r"[\ud800-\udfff]")


def check_judgeable(record: Any) -> str | None:
    """What keeps a record from being judged, or None."""
    if isinstance(record, data.BadRecord):
        return str(record)
    if not isinstance(record, dict):
        return "is not a JSON object"
    for name in ("question", "text"):
        if not isinstance(record.get(name), str):
            return f"has no {name}: expected a text, found {record.get(name)!r:.60}"
    if any(_SURROGATE.search(record[name]) for name in ("question", "text")):
        return "holds half of a surrogate pair, which is no text"
    if not isinstance(record.get("finish_reason"), str | None):
        return f"has the finish_reason {record['finish_reason']!r:.60}: expected stop, length or none"
    return None


def compare_surprisals(
    config: InferConfig, pairs: Sequence[tuple[str, dict[str, Any]]]
) -> dict[str, Measure]:
    """The surprisal of each answer by its place, as a multiple of the reference of its writer."""
    from tqdm import tqdm

    profile = data.resolve_profile(config.profile)
    prepare_environment(profile, offline=profile == "cpu")
    loaded = load_for_asking(profile, None, config.system_prompt)
    nats: dict[str, Measure] = {}
    bar = tqdm(pairs, unit="answer", desc="reading", disable=not sys.stderr.isatty())
    for place, record in bar:
        # Of what does not fit into the model's context: the end of the prompt, the answer's start.
        prompt = data.encode_prompt(loaded.tokenizer, record["question"], (), loaded.system_prompt)
        prompt = prompt[-data.MAX_SEQ_LENGTH // 2 :]
        finish_reason, room = record.get("finish_reason") or "stop", data.MAX_SEQ_LENGTH - len(prompt)
        ids = encode_answer(loaded.tokenizer, record["text"], finish_reason, room)
        nats[place] = measure_surprisal(loaded, prompt, ids, 1.0)
        INTERRUPTION.raise_if_any()
    own = {place for place, record in pairs if resolve_base_model(str(record.get("model"))) == profile}
    others = [nats[place][0] for place, _ in pairs if place not in own]
    references = {True: surprisal_reference(loaded) if own else math.inf, False: math.inf}
    if len(others) >= MIN_ANSWERS_TO_COMPARE:
        median = statistics.median(others)
        deviation = statistics.median(abs(each - median) for each in others)
        limit = median + 4 * max(deviation, median / 10)
        references[False] = limit / CHECKS["surprisal"].threshold or math.inf
    elif others:
        print(
            f"{len(others)} answers of unknown writers are too few to compare their surprisal "
            f"({MIN_ANSWERS_TO_COMPARE} are needed): they are judged by their text.",
            file=sys.stderr,
        )
    return {place: (score / references[place in own], span) for place, (score, span) in nats.items()}


# --- Chat --------------------------------------------------------------------------------------------------------

CHAT_HELP = "/decoding NAME, /base, /adapter, /reset, /quit"


class Chat:
    """A conversation of several turns; lines that begin with `/` steer it."""

    def __init__(self, loaded: LoadedModel, decoding: Decoding) -> None:
        self.loaded, self.decoding = loaded, decoding
        self.on_base = loaded.adapter is None
        self.history: list[tuple[str, str]] = []

    def command(self, line: str) -> str | None:
        """Carries out a `/` line and returns what to say of it; None ends the chat."""
        name, _, value = line.strip().partition(" ")
        if name == "/quit":
            return None
        if name == "/reset":
            self.history = []
            return "A new conversation."
        if name == "/decoding" and value.strip() in DECODINGS:
            self.decoding = DECODINGS[value.strip()]
            return f"Decoding {value.strip()}."
        if name == "/decoding":
            return f"/decoding {value.strip()}: one of {', '.join(DECODINGS)} is wanted."
        if name == "/base" or (name == "/adapter" and self.loaded.adapter):
            self.on_base = name == "/base"
            return f"The {name[1:]} answers now; the conversation so far stays."
        if name == "/adapter":
            return "There is no adapter here. Start with --adapter FOLDER."
        return f"{name} is none of {CHAT_HELP}."

    def ask(self, question: str, on_text: Callable[[str], object]) -> Answer:
        """Answers in the conversation. Raises UsageError where it has become too long; /reset helps."""
        request = Request(question, self.decoding, tuple(self.history))
        with self.loaded.without_adapter() if self.on_base else contextlib.nullcontext(self.loaded) as asked:
            [answer] = answer_requests(asked, [request], on_text=on_text)
        self.history.append((question, answer.text))
        return answer


def read_line(prompt: str) -> str:
    """A line from the terminal; the prompt does not get between answers that go to a file."""
    if sys.stdout.isatty():
        return input(prompt).strip()
    print(prompt, end="", file=sys.stderr, flush=True)
    return input().strip()


def run_chat(loaded: LoadedModel, decoding: Decoding) -> None:
    """Reads questions from the terminal, with line editing and a history that is kept, until /quit or end of input.

    Ctrl-C while an answer is written stops that answer.
    """
    import readline

    history = data.cache_home() / "chat_history"
    if history.is_file():
        with contextlib.suppress(OSError):
            readline.read_history_file(history)
    chat = Chat(loaded, decoding)
    print(f"Ask, or {CHAT_HELP}. No medical advice: a small language model answers.", file=sys.stderr)
    try:
        while True:
            line = read_line("> ")
            if line.startswith("/"):
                said = chat.command(line)
                if said is None:
                    break
                print(data.escape_controls(said), file=sys.stderr)
            elif line:
                ask_in_chat(chat, line)
    except EOFError:
        pass
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)


def ask_in_chat(chat: Chat, question: str) -> None:
    """Asks, and prints the answer as it is written; what is wrong with the question ends no chat, nor does Ctrl-C."""
    try:
        answer = chat.ask(question, write_piece)
        print(flush=True)
        [judged] = judge_answers(chat.loaded, [answer], chat.history[:-1])
        note_judgement(judged)
    except UsageError as error:
        print(f"{data.escape_controls(str(error))} Or begin anew: /reset", file=sys.stderr)
    except Interrupted as interrupted:
        if interrupted.number != signal.SIGINT:
            raise
        INTERRUPTION.number = None
        print("\nThe answer was stopped, and is not part of the conversation. /quit ends the chat.", file=sys.stderr)


# --- Command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InferConfig:
    """Flags of infer.py."""

    question: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="QUESTION")] = None
    """What to ask, in quotes; `-` reads one question a line from stdin. None on a terminal: a chat."""
    questions: Path | None = None
    """File of questions: .txt (one per line), or .jsonl, .json, .csv, .tsv or .parquet with a column
    named question or prompt. Answers go to --output."""
    output: Path | None = None
    """Where the answers of --questions go: a JSON line per row, in the file's order, with all its
    columns. What it holds is not asked again. Unset: NAME.answers.jsonl."""
    judge: str | None = None
    """Judge the answers of other programs: a file of JSON lines (question, text and, if known,
    finish_reason and model), or `-` for stdin. Prints each line with its verdict."""
    surprisal: bool = True
    """Let the base model read what is judged by --judge; `--no-surprisal` loads no model."""
    adapter: str | None = None
    """Adapter folder or hub id. Unset: the adapter of the run that was finished last."""
    base: bool = False
    """Ask the base model, without an adapter."""
    system_prompt: str | None = None
    """System prompt of the questions. Unset: the adapter's, or the story's."""
    compare: Literal["models", "decodings"] | None = None
    """Ask base and adapter, or under every decoding, and show the answers side by side."""
    verify: bool = False
    """Ask in two fresh processes and in a batch as well, and tell whether the answers are the same bytes."""
    decoding: DecodingName | None = None
    """How to decode. Unset: as the adapter was judged, else `kit`. The flags below change single fields of it."""
    max_new_tokens: int | None = None
    """Cap of the answer, in tokens."""
    repetition_penalty: float | None = None
    """Divides the logits of tokens that occurred; 1.0 is off."""
    no_repeat_ngram_size: int | None = None
    """Forbids every n-gram of this size a second time; 0 is off."""
    count_prompt: bool | None = None
    """Whether penalty and ban count the prompt too."""
    temperature: float | None = None
    """0 is greedy; above, tokens are sampled."""
    top_p: float | None = None
    """Sampling is among the likeliest tokens that together have this probability."""
    sampling_seed: int | None = None
    """Seeds the sampling."""
    profile: ProfileChoice = "auto"
    """Which base model: `t4`, `cpu`, or `auto`. An adapter knows its own."""
    threads: int | None = None
    """CPU threads. Unset: torch's own number."""
    json: bool = False
    """Print answers as JSON objects, one a line, with token ids, finish reason, decoding, digests and what was found."""

    def __post_init__(self) -> None:
        problems = []
        if self.question not in (None, "-"):
            try:
                check_question(self.question)
            except UsageError as error:
                problems.append(str(error))
        if self.judge and (self.question is not None or self.questions or self.adapter or self.verify or self.compare):
            problems.append(f"--judge {self.judge} reads answers, and asks nothing. Remove the other flags.")
        if not self.surprisal and not self.judge:
            problems.append("--no-surprisal belongs to --judge FILE.")
        if self.question is not None and self.questions:
            problems.append(f"A question and --questions {self.questions}: give one of the two.")
        if self.base and self.adapter:
            problems.append(f"--base asks without an adapter, and --adapter {self.adapter} with one. Give one of the two.")
        if self.base and self.compare == "models":
            problems.append("--compare models asks base and adapter; leave --base away.")
        if self.output and not self.questions:
            problems.append(f"--output {self.output} is for the answers of --questions FILE; one answer goes to stdout.")
        if (self.verify or self.compare) and (self.question in (None, "-")):
            problems.append(f"{'--verify' if self.verify else '--compare'} takes one question, in quotes.")
        if self.verify and self.compare:
            problems.append("--verify and --compare: give one of the two.")
        if self.json and (self.verify or self.questions):
            problems.append(f"--json prints answers; {'--verify' if self.verify else '--questions'} has a form of its own.")
        if self.system_prompt is not None and not self.system_prompt.strip():
            problems.append("--system-prompt is empty. Remove it, or give a text.")
        if self.adapter is not None and not self.adapter.strip():
            problems.append("--adapter is empty: a folder, or a hub id (owner/name), is wanted.")
        cores = len(os.sched_getaffinity(0))
        if self.threads is not None and not 1 <= self.threads <= cores:
            problems.append(f"--threads {self.threads}: 1 to {cores}, the cores that this process may use, is wanted.")
        if problems:
            raise ValueError("\n".join(problems))
        self.change_decoding(Decoding())

    def change_decoding(self, decoding: Decoding) -> Decoding:
        """`decoding` with the fields replaced that were given as flags. Raises ValueError where one is out of range."""
        names = [each.name for each in dataclasses.fields(Decoding) if each.name != "stop"]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(decoding, **given)


def write_piece(piece: str) -> None:
    """Writes a piece of an answer to stdout at once; on a terminal, control characters are shown, not obeyed."""
    sys.stdout.write(data.escape_controls(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def note_judgement(judged: JudgedAnswer) -> None:
    """Prints the verdict and the findings to stderr."""
    assert judged.answer
    notes = ["sound" if judged.sound else "not sound"]
    if judged.ended:
        notes[0] += " and ended" if judged.sound else ""
    else:
        notes.append(f"  cut off at {judged.answer.decoding.max_new_tokens} tokens (--max-new-tokens)")
    notes += [f"  {finding.name}: {finding.message}" for finding in judged.findings]
    if judged.facts:
        notes.append(f"  {judged.facts}, of the lists in samples/probes.jsonl")
    print("\n".join(data.escape_controls(note) for note in notes), file=sys.stderr)


def print_answer(loaded: LoadedModel, request: Request, *, as_json: bool) -> None:
    """Asks, and prints the answer as it is written; without a terminal a bar on stderr tells that it is at work."""
    from tqdm import tqdm

    with tqdm(total=request.decoding.max_new_tokens, unit="token", leave=False, disable=not needs_bar()) as bar:
        on_text = write_piece if sys.stdout.isatty() and not as_json else lambda text: None
        [answer] = answer_requests(loaded, [request], bar.update, on_text)
    if not as_json:
        print("" if sys.stdout.isatty() else answer.text, flush=True)
    [judged] = judge_answers(loaded, [answer])
    if as_json:
        print(to_json(judged.to_record()), flush=True)
    note_judgement(judged)


def needs_bar() -> bool:
    """Whether a bar on stderr is seen, and is not in the way of an answer that is being written."""
    return sys.stderr.isatty() and not sys.stdout.isatty()


def print_comparison(loaded: LoadedModel, request: Request, config: InferConfig) -> None:
    """The answers of base and adapter, or under every decoding, side by side if the terminal is wide enough for it."""
    if config.compare == "models":
        with loaded.without_adapter() as base:
            named = {"base": answer_requests(base, [request])[0]}
        named["adapter"] = answer_requests(loaded, [request])[0]
    else:
        requests = [Request(request.question, config.change_decoding(decoding)) for decoding in DECODINGS.values()]
        named = dict(zip(DECODINGS, answer_requests(loaded, requests), strict=True))
    judged = dict(zip(named, judge_answers(loaded, list(named.values())), strict=True))
    if config.json:
        for name, each in judged.items():
            print(to_json({"name": name, **each.to_record()}))
        return
    titles = {
        name: f"{name} ({each.answer.answer_tokens} tokens, {each.answer.finish_reason}, {each.verdict})"
        for name, each in judged.items()
    }
    print(format_columns({title: named[name].text for name, title in titles.items()}))


def format_columns(texts: dict[str, str], width: int | None = None) -> str:
    """Titled texts in columns of `width` characters in all (the terminal's), one below the other where columns get narrow."""
    width = width or shutil.get_terminal_size().columns
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    if column < 36:
        return "\n\n".join(f"== {title} ==\n{data.escape_controls(text)}" for title, text in texts.items())
    wrapped = [
        [title[:column], "-" * min(len(title), column)]
        + [line for part in data.escape_controls(text).splitlines() for line in textwrap.wrap(part, column) or [""]]
        for title, text in texts.items()
    ]
    rows = itertools.zip_longest(*wrapped, fillvalue="")
    return "\n".join("   ".join(f"{cell:<{column}}" for cell in row).rstrip() for row in rows)


def main(config: InferConfig) -> int:
    """Answers on stdout; says on stderr what answers and how.

    Returns:
        1 if --verify found a difference, or a question of several could not be asked; else 0.
    """
    INTERRUPTION.listen()
    prepare_cublas()
    if config.judge:
        return judge_file(config)
    rows: list[QuestionRow] = []
    if config.questions:
        rows = read_questions(str(config.questions))
    elif config.question == "-" or (config.question is None and not sys.stdin.isatty()):
        rows = read_questions("-")
    elif config.question:
        rows = [QuestionRow("The question", config.question)]
    elif config.json:
        raise UsageError('--json is for questions that are given: python infer.py "..." --json. A chat has no JSON.')
    output = config.output or (config.questions and config.questions.with_suffix(".answers.jsonl"))
    if output and (output.is_dir() or not output.parent.is_dir()):
        raise UsageError(f"--output {output}: a file in a folder that exists is wanted.")
    adapter = None if config.base else find_adapter(config.adapter) if config.adapter else latest_adapter()
    record = check_adapter(adapter) if adapter else None
    profile = resolve_asked_profile(config.profile, record)
    prepare_environment(profile, offline=profile == "cpu")
    preset = DECODINGS[config.decoding] if config.decoding else (record and record.decoding) or DECODINGS["kit"]
    decoding = config.change_decoding(preset)
    answering = f"{record.base_model} with {adapter}" if record else PROFILES[profile].base_model
    print(f"{answering}, decoding {describe_decoding(decoding)}", file=sys.stderr)
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    with hold_answers(output) if output else contextlib.nullcontext():
        return ask(config, load_for_asking(profile, adapter, config.system_prompt), rows, decoding, output)


def ask(
    config: InferConfig, loaded: LoadedModel, rows: Sequence[QuestionRow], decoding: Decoding, output: Path | None
) -> int:
    """Asks as the flags say: one question or several, a file of them, a chat, a comparison. Returns the exit code.

    Raises:
        UsageError: as `answer_requests`, `answer_file` and `verify`.
    """
    if config.question not in (None, "-"):
        check_room(loaded, Request(rows[0].question, decoding))
    rows = check_rows(loaded, rows, decoding)
    skipped = sum(bool(row.problem) for row in rows)
    if config.verify:
        return 0 if verify(loaded, Request(rows[0].question, decoding), sys.argv[1:]) else 1
    if config.compare:
        print_comparison(loaded, Request(rows[0].question, decoding), config)
    elif output:
        before = answer_file(loaded, rows, decoding, output)
        records = [json.loads(line) for line in output.read_bytes().splitlines()]
        answers = [record for record in records if "error" not in record]
        print(f"{len(records) - len(before)} rows now, {len(before)} before: {output}", file=sys.stderr)
        sound = sum(answer["verdict"] == "sound" and answer["finish_reason"] == "stop" for answer in answers)
        print(f"sound and ended, {sound} of {len(answers)}", file=sys.stderr)
    elif rows:
        for place, row in enumerate(rows):
            if row.problem:
                if config.json:
                    print(to_json(row.to_record({"error": row.problem})), flush=True)
                continue
            if place and not config.json:
                print()
            print_answer(loaded, Request(row.question, decoding), as_json=config.json)
    else:
        run_chat(loaded, decoding)
    if skipped:
        print(f"{skipped} of {len(rows)} questions were skipped, see above", file=sys.stderr)
    print("No medical advice: a small language model wrote this.", file=sys.stderr)
    return 1 if skipped else 0


MEMORY_ADVICE = (
    "End other programs that hold memory (nvidia-smi and top show them), then lower --max-new-tokens, then --threads."
)


def resolve_asked_profile(choice: ProfileChoice, record: AdapterRecord | None) -> ProfileName:
    """The profile to ask under: the adapter's own where it says one.

    Raises:
        UsageError: another profile was asked for than the adapter's, whose base model is another.
    """
    if record is None:
        return data.resolve_profile(choice)
    if choice not in ("auto", record.profile):
        raise UsageError(
            f"The adapter was trained on {record.base_model} (profile {record.profile}), and --profile {choice} asks "
            f"{PROFILES[choice].base_model}. Leave --profile away, or give an adapter of that base."
        )
    return record.profile


def describe_decoding(decoding: Decoding) -> str:
    """The preset's name, or the preset that is nearest and the fields that differ."""
    fields = dataclasses.asdict(decoding)
    changes = {
        name: {key: value for key, value in fields.items() if getattr(preset, key) != value}
        for name, preset in DECODINGS.items()
    }
    name = min(changes, key=lambda preset: (len(changes[preset]), preset != "kit"))
    return " ".join([name, *(f"{key}={value}" for key, value in changes[name].items())])


if __name__ == "__main__":
    data.run_command(InferConfig, main, __doc__, MEMORY_ADVICE)

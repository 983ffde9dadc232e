"""How the weights change: LoRA on the base model through Unsloth, with the loss on the answers only.

    python train.py                                    the default recipe on this machine
    python train.py --epochs 2 --mix week4             the story's fourth week
    python train.py --target-modules attention --name attention-only
    python train.py --profile t4 --dry-run             the plan: rows, steps, parameters, bytes, memory; loads no weights
    python train.py --max-hours 8.5                    stop in time; after this or any other stop the same line goes on
    python train.py --merge                            16-bit weights of base and adapter in one, for other programs
    torchrun --nproc_per_node 2 train.py               two GPUs

A run leaves runs/train/NAME/: run.json, metrics.jsonl, samples.jsonl, curves.png and adapter/, which `infer.py` asks
by default.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import html
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import data
import infer
from data import ProfileName, UsageError
from infer import PadName

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import TrainerCallback
    from transformers.trainer_callback import TrainerState
    from trl import SFTConfig, SFTTrainer

TargetModules = Literal["attention", "all-linear"]
Best = Literal["answers", "eval_loss"]
Tracker = Literal["none", "tensorboard", "wandb", "trackio"]

# The modules LoRA touches. The story blamed attention-only LoRA for thin facts: attention routes, feed-forward stores.
TARGET_MODULES: dict[TargetModules, list[str]] = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}

EFFECTIVE_BATCH_SIZE = 16
# Of LoRA: the smallest of the modules' own ranks in the larger base model (its key and value projections).
MAX_RANK = 1024
GIB = data.GIB


# As stated on the pages of the sources.
LICENCES = {
    data.HUB_IDS["chatdoctor"].partition("@")[0]: "none stated",
    data.HUB_IDS["wikidoc"].partition("@")[0]: "cc, variant not named",
    **dict.fromkeys((data.PROFILES["cpu"].conversational, data.PROFILES["cpu"].encyclopedic), "Apache-2.0"),
}

# For a plan without the rows: mean tokens of prompt and answer, of 1,494 published ChatDoctor-iCliniq and 1,497 WikiDoc rows
# after cleaning, under Llama 3.2's tokenizer.
MEAN_ROW_TOKENS: dict[data.SourceName, int] = {"conversational": 264, "encyclopedic": 169}

# Beside the Trainer's own files in a checkpoint, written last: what each file has to hold.
CHECKPOINT_RECORD = "checkpoint.json"
NUM_CHECKPOINTS = 2
"""Kept of a run that is not done: the last, and the one before, should the last be damaged."""

# Where the Trainer writes a checkpoint before it is put into its place.
TRAINER_FOLDER = ".trainer.part"

# What a run writes as it goes.
RUN_RECORDS = ("metrics.jsonl", "samples.jsonl")

# Seconds that --max-hours keeps for saving, beside an evaluation and the longest step so far.
SAVING_SECONDS = 60

# The values that vLLM takes for --max-lora-rank.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

VERSIONS_OF = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "datasets")


# --- Files and processes --------------------------------------------------------------------------


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
        UsageError: as `data.writing`.
    """
    with data.writing(path):
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
        UsageError: as `data.writing`.
    """
    with data.writing(path):
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


class Interruption:
    """Turns Ctrl-C, SIGTERM and SIGHUP into `infer.Interrupted`, at once or where work defers it."""

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
            raise infer.Interrupted(self.number)
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
            raise infer.Interrupted(self.number)


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


@dataclass(frozen=True)
class TrainConfig(data.RowsConfig):
    """Flags of train.py."""

    name: str | None = None
    """Folder of the run below --output-dir. Unset: PROFILE-MIX-TARGET_MODULES."""
    output_dir: Path = infer.TRAIN_RUNS
    """Where the run's folder is made. Only a run in runs/train becomes the one that `infer.py` asks by default."""
    epochs: float = 1.0
    """Passes over the rows."""
    max_steps: int | None = None
    """Stop after so many optimiser steps, whatever --epochs says."""
    learning_rate: float = 2e-4
    """Peak of the schedule: linear warm-up over 3% of the steps, then linear decay to 0."""
    target_modules: TargetModules = "all-linear"
    """`attention` is q, k, v, o; `all-linear` adds gate, up, down."""
    r: int = 16
    """Rank of the LoRA matrices."""
    lora_alpha: int = 32
    """LoRA's update is scaled by lora_alpha / r."""
    pad: PadName = "native"
    """`native`: the tokenizer's own reserved pad token. `added`: a new one, the story's mistake, for comparison: the embedding
    grows by a row, and the adapter carries it whole, twice."""
    per_device_train_batch_size: int | None = None
    """Rows of a forward pass; times the processes a divisor of 16, since steps always see 16 rows. Unset: the profile's."""
    max_hours: float | None = None
    """Stop in time to be done so many hours after the start, with everything saved; the same line goes on from there."""
    save_minutes: float = 5.0
    """Minutes between two checkpoints, from which a run that was cut goes on; 0 saves after every step. Before each evaluation
    there is one as well."""
    num_probes: int | None = None
    """How many probe questions each evaluation asks and judges, the story's five first; 0 asks none. Unset: the profile's."""
    eval_every: float | None = None
    """Share of the steps between two evaluations. Unset: the profile's."""
    best: Best = "answers"
    """Which evaluation's weights are kept as the adapter: of the best answers (most sound ones, then most points, then the
    lowest eval loss), or of the lowest eval loss alone."""
    stop_when_worse: int | None = None
    """Stop after so many evaluations in a row without better answers."""
    report_to: Tracker = "none"
    """Where the Trainer reports to as well. The package has to be installed."""
    merge: bool = False
    """When the run is done, write base and adapter as one 16-bit model into its folder `merged`. A run that is already done is
    not trained again. The t4 profile fetches the 16-bit base model, 6.4 GB, from the hub."""
    push_to_hub: str | None = None
    """When the run is done, upload the adapter to this hub repository (OWNER/NAME), private at first. Needs the network and a
    token with write rights."""
    restart: bool = False
    """Train from the beginning although the run is there; the old folder is kept under another name."""
    dry_run: bool = False
    """Print the plan and stop. No weights are loaded, nothing is written."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.name is not None and not infer.RUN_NAME.fullmatch(self.name):
            problems.append(f"--name {self.name!r}: {infer.RUN_NAME_RULE}")
        for flag in ("epochs", "learning_rate", "r", "lora_alpha", "max_steps", "max_hours"):
            value = getattr(self, flag)
            if value is not None and not (value > 0 and math.isfinite(value)):
                problems.append(f"--{flag.replace('_', '-')} {value}: a number above 0 is wanted.")
        if not (self.save_minutes >= 0 and math.isfinite(self.save_minutes)):
            problems.append(f"--save-minutes {self.save_minutes}: a number of minutes, 0 or more, is wanted.")
        if self.r > MAX_RANK:
            problems.append(f"--r {self.r}: 1 to {MAX_RANK} is wanted; the modules themselves have no higher rank.")
        batch, processes = self.per_device_train_batch_size, world_size()
        if EFFECTIVE_BATCH_SIZE % processes:
            problems.append(f"{processes} processes: a divisor of {EFFECTIVE_BATCH_SIZE}, the rows of a step, is wanted.")
        elif batch is not None and (batch < 1 or EFFECTIVE_BATCH_SIZE % (batch * processes)):
            of = f" in {processes} processes" if processes > 1 else ""
            problems.append(
                f"--per-device-train-batch-size {batch}{of}: a divisor of {EFFECTIVE_BATCH_SIZE // processes} is wanted."
            )
        probes = len(infer.read_probes())
        if self.num_probes is not None and not 0 <= self.num_probes <= probes:
            problems.append(f"--num-probes {self.num_probes}: 0 to {probes}, the probes of samples/probes.jsonl, is wanted.")
        if self.eval_every is not None and not 0 < self.eval_every < 1:
            problems.append(f"--eval-every {self.eval_every}: a share above 0 and below 1 is wanted.")
        if self.stop_when_worse is not None and self.stop_when_worse < 1:
            problems.append(f"--stop-when-worse {self.stop_when_worse}: 1 or more is wanted.")
        if self.stop_when_worse is not None and self.num_probes == 0:
            problems.append("--stop-when-worse goes by the answers, and --num-probes 0 asks none. Leave one of the two away.")
        if self.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub):
            problems.append(f"--push-to-hub {self.push_to_hub!r}: a hub repository, OWNER/NAME, is wanted.")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class Recipe:
    """Every value that a run depends on, resolved. Two runs with equal recipes on equal rows train the same adapter."""

    profile: ProfileName
    base_model: str
    load_in_4bit: bool
    mix: str
    """`rows` where the user's own rows are all there is."""
    wanted: dict[data.SourceName, int | None]
    """None: all of them."""
    conversational: str | None
    encyclopedic: str | None
    rows: str | None
    clean: data.CleanChoice
    system_prompt: str | None
    """Set by the user for all rows."""
    seed: int
    max_seq_length: int
    target_modules: TargetModules
    r: int
    lora_alpha: int
    learning_rate: float
    epochs: float
    max_steps: int | None
    per_device_train_batch_size: int
    optim: str
    train_sampling_strategy: Literal["random", "group_by_length"]
    padding_free: bool
    pad_to_multiple_of: int | None
    use_gradient_checkpointing: Literal["unsloth"] | bool
    pad: PadName
    eval_every: float
    num_probes: int
    gate_max_new_tokens: int
    best: Best
    stop_when_worse: int | None

    @property
    def values(self) -> data.Profile:
        """The profile's values, with the recipe's base model."""
        return data.load_profile(self.profile, self.base_model)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Forward passes of a process before a step: all processes together see `EFFECTIVE_BATCH_SIZE` rows."""
        return EFFECTIVE_BATCH_SIZE // (self.per_device_train_batch_size * world_size())

    def count_steps(self, rows: int) -> int:
        """Optimiser steps on so many rows, as the Trainer counts them."""
        batches = math.ceil(rows / (self.per_device_train_batch_size * world_size()))
        steps = math.ceil(math.ceil(batches / self.gradient_accumulation_steps) * self.epochs)
        return self.max_steps or steps

    def count_evaluations(self, steps: int) -> int:
        """Evaluations in so many steps, as the Trainer counts them: one before the first, one each interval, one at the end."""
        return 1 + math.ceil(steps / math.ceil(steps * self.eval_every))


def resolve_recipe(config: TrainConfig) -> Recipe:
    """The recipe that the flags and the profile's values give. Raises UsageError as `data.resolve_profile`."""
    values = data.resolve_profile(config.profile, config.base_model)
    batch = config.per_device_train_batch_size or min(
        values.per_device_train_batch_size, EFFECTIVE_BATCH_SIZE // world_size()
    )
    return Recipe(
        profile=values.name,
        base_model=values.base_model,
        load_in_4bit=values.load_in_4bit,
        mix="rows" if config.rows else config.mix,
        wanted=config.wanted,
        **dict.fromkeys(get_args(data.SourceName)) | config.sources(values),
        clean=config.clean,
        system_prompt=config.system_prompt,
        seed=config.seed,
        max_seq_length=data.MAX_SEQ_LENGTH,
        target_modules=config.target_modules,
        r=config.r,
        lora_alpha=config.lora_alpha,
        learning_rate=config.learning_rate,
        epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=batch,
        optim=values.optim,
        train_sampling_strategy=values.train_sampling_strategy,
        padding_free=values.padding_free,
        pad_to_multiple_of=values.pad_to_multiple_of,
        use_gradient_checkpointing=values.use_gradient_checkpointing,
        pad=config.pad,
        eval_every=values.eval_every if config.eval_every is None else config.eval_every,
        num_probes=values.num_probes if config.num_probes is None else config.num_probes,
        gate_max_new_tokens=values.gate_max_new_tokens,
        best=config.best,
        stop_when_worse=config.stop_when_worse,
    )


# --- The run folder ----------------------------------------------------------------------------------------------


# By these words ablate.py knows this refusal.
HOLDS_OTHER_VALUES = "holds a run with other values"


def find_record(folder: Path, recipe: Recipe, data_fingerprint: str) -> dict[str, Any] | None:
    """The record of the run in `folder`, whose `numbers` are None until it is done or stopped by --max-hours; or None.

    Raises:
        UsageError: the folder holds a run of another recipe, or on other rows, or its record cannot be read.
    """
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["numbers"] is not None:
            record["numbers"]["planned_steps"], record["numbers"]["steps"], record["numbers"]["stopped_by"]
        there = record["recipe"] | {"data_fingerprint": record["data_fingerprint"]}
        record["versions"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is broken ({error!r}). Keep that run aside and train anew with --restart.") from None
    wanted = dataclasses.asdict(recipe) | {"data_fingerprint": data_fingerprint}
    # Where the rows came from is no matter as long as they are the same, which the fingerprint tells.
    differences = [
        f"  {name}: {there.get(name)!r} there, {wanted.get(name)!r} now"
        for name in sorted((there.keys() | wanted.keys()) - set(get_args(data.SourceName)))
        if there.get(name) != wanted.get(name)
    ]
    if differences:
        raise UsageError(
            f"{folder} {HOLDS_OTHER_VALUES}:\n"
            + "\n".join(differences)
            + "\nChoose another --name, or keep that run aside and train anew with --restart."
        )
    return record


def is_complete(record: Mapping[str, Any]) -> bool:
    """Whether a run is over; one that was cut, or that --max-hours stopped, goes on."""
    return record["numbers"] is not None and record["numbers"]["stopped_by"] != "max_hours"


# --- Checkpoints -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from: the Trainer's state after a step, and the run's records and adapter as they were then."""

    folder: Path
    step: int
    planned_steps: int
    eval_steps: int
    """Steps from one evaluation to the next."""
    training_seconds: float
    evaluation_is_due: bool
    """The evaluation of that step had not been made."""

    @property
    def trainer(self) -> Path:
        """The part that the Trainer wrote and reads."""
        return self.folder / "trainer"


def put_checkpoint(written: Path, folder: Path, state: TrainerState, training_seconds: float) -> None:
    """Puts what the Trainer has `written`, with copies of the run's records and adapter, into the run's folder as a checkpoint.

    It comes whole or not at all; of older checkpoints one is kept.

    Raises:
        UsageError: as `data.writing`.
    """
    step = state.global_step
    target = folder / f"checkpoint-{step}"
    part = folder / f".{target.name}.part"
    with data.writing(target, part):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        written.rename(part / "trainer")
        for name in RUN_RECORDS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, part / name)
        if (folder / "adapter").is_dir():
            shutil.copytree(folder / "adapter", part / "adapter", copy_function=shutil.copyfile)
        evaluated = any("eval_loss" in log and log["step"] == step for log in state.log_history)
        due = step % state.eval_steps == 0 or step == state.max_steps
        record = {
            "step": step,
            "planned_steps": state.max_steps,
            "eval_steps": state.eval_steps,
            "training_seconds": round(training_seconds, 1),
            "evaluation_is_due": due and not evaluated,
            "sha256": digest_files(part),
        }
        data.write_atomic(part / CHECKPOINT_RECORD, json.dumps(record, indent=2) + "\n")
        put_folder(part, target)
        for old in list_checkpoints(folder)[NUM_CHECKPOINTS:]:
            remove_folder(old)


def digest_files(folder: Path) -> dict[str, str]:
    """sha256 (hex) of every file below a folder but the checkpoint's own record, by its path in the folder."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / CHECKPOINT_RECORD:
            with path.open("rb") as file:
                digests[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders of the run's checkpoints, the last step's first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was made, by its folder's name."""
    return int(checkpoint.name.partition("-")[2])


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        ValueError: a file of it is missing, or is not as it was written, or one is there that was not written.
    """
    try:
        record = json.loads((folder / CHECKPOINT_RECORD).read_text(encoding="utf-8"))
        checkpoint = Checkpoint(
            folder,
            int(record["step"]),
            int(record["planned_steps"]),
            int(record["eval_steps"]),
            float(record["training_seconds"]),
            bool(record["evaluation_is_due"]),
        )
        expected = dict(record["sha256"])
        if not all(isinstance(name, str) for name in expected):
            raise TypeError("sha256")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{CHECKPOINT_RECORD}: {error!r}") from None
    found = digest_files(folder)
    changed = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    if changed:
        raise ValueError(f"not as they were written: {', '.join(changed[:3])}")
    return checkpoint


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """The run's last whole checkpoint, or None where there is none at all; damaged ones are told of on stderr.

    Raises:
        UsageError: there are only damaged ones.
    """
    damaged = []
    for candidate in list_checkpoints(folder):
        try:
            checkpoint = read_checkpoint(candidate)
        except ValueError as error:
            damaged.append(f"{candidate} is damaged ({error})")
            continue
        for each in damaged if is_main_process() else ():
            print(f"{each}; {checkpoint.folder.name} is taken instead.", file=sys.stderr)
        return checkpoint
    if damaged:
        raise UsageError(f"{damaged[0]}, and there is no other to go on from. Put it back, or train anew with --restart.")
    return None


def restore(checkpoint: Checkpoint, folder: Path) -> None:
    """Makes records and adapter of the run what they were at the checkpoint; what came later will come again."""
    for name in RUN_RECORDS:
        if (checkpoint.folder / name).is_file():
            data.write_atomic(folder / name, (checkpoint.folder / name).read_bytes())
        else:
            (folder / name).unlink(missing_ok=True)
    if (checkpoint.folder / "adapter").is_dir():
        part = folder / ".adapter.part"
        with data.writing(folder / "adapter", part):
            shutil.copytree(checkpoint.folder / "adapter", part, copy_function=shutil.copyfile)
            put_folder(part, folder / "adapter")


def set_aside(folder: Path) -> None:
    """Renames the folder to the first free `NAME.old-N`."""
    number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.old-{n}").exists())
    folder.rename(folder.with_name(f"{folder.name}.old-{number}"))


def note_latest(folder: Path) -> None:
    """Makes a run in runs/train the one whose adapter is asked by default."""
    if folder.parent.resolve() == infer.TRAIN_RUNS.resolve():
        data.write_atomic(infer.LATEST, folder.name + "\n")


def commit_id() -> str | None:
    """Commit of the kit's own checkout, or None where it is none."""
    asked = subprocess.run(["git", "-C", str(data.HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


# --- The plan ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run will be, computed before it: no weights are loaded for it."""

    rows: int
    tokens: int
    """Of prompts and answers, in one pass over the rows."""
    estimated: str | None
    rows_are_estimated: bool
    """Why rows and tokens are estimates, or None where they were counted."""
    steps: int
    trainable_parameters: int
    adapter_bytes: int
    """Of adapter_model.safetensors, exact."""
    memory: dict[str, int]
    """Bytes of device memory at the peak of a training step, by part."""
    memory_peak: int
    """The largest of loading, a training step and an evaluation, in bytes of device memory."""
    memory_limit: int
    host_memory: dict[str, int]
    """Bytes of host memory beside the device's, by part; empty where the host is the device."""
    disk: dict[str, int]
    """Bytes to be written, or fetched into the cache, by part."""
    training_seconds: float
    """Estimated, without the gate."""
    gate_seconds: float
    """Estimated: of all evaluations' answers."""

    @property
    def fits(self) -> bool:
        """Whether the peak is within the device's memory."""
        return self.memory_peak <= self.memory_limit


def build_meta_adapter(recipe: Recipe, dtype: str) -> PeftModel:
    """The base model's architecture with fresh LoRA on it, on torch's `meta` device: shapes and dtypes without memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dataclasses.asdict(recipe.values.architecture)
    sizes["vocab_size"] += recipe.pad == "added"
    lora = LoraConfig(r=recipe.r, target_modules=TARGET_MODULES[recipe.target_modules], task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(getattr(torch, dtype))
        return get_peft_model(model, lora)


def saved_tensors(model: PeftModel, pad: PadName) -> dict[str, torch.Tensor]:
    """The tensors that an adapter file holds, by name: LoRA's, and both embeddings where a pad token was added."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=pad == "added")


def count_safetensors_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Size of a safetensors file that holds the tensors: 8 bytes, the JSON header padded to a multiple of 8, and the data.

    In the file, tensors of wider dtypes come first, and those of one dtype by name (safetensors' own order); it decides how
    many digits the offsets in the header have.
    """
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = names[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header_bytes = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + math.ceil(header_bytes / 8) * 8 + end


def count_weight_bytes(recipe: Recipe, element_size: int) -> tuple[int, int]:
    """Bytes of the base model's weights as loaded, and in its file.

    4-bit NF4 with double quantisation (Dettmers et al. 2023) takes 4 bits a weight, 8 a block of 64 weights, and 32 a 256
    blocks. The embedding, tied with the head, stays in 16 bits, and so do some layers of Unsloth's dynamic 4-bit files, which
    are not counted here. The small model's file is fp32.
    """
    arch = recipe.values.architecture
    query, key_value = (heads * arch.head_dim for heads in (arch.num_attention_heads, arch.num_key_value_heads))
    attention = 2 * arch.hidden_size * (query + key_value)
    linear = arch.num_hidden_layers * (attention + 3 * arch.hidden_size * arch.intermediate_size)
    embedding = (arch.vocab_size + (recipe.pad == "added")) * arch.hidden_size * (1 if arch.tie_word_embeddings else 2)
    if recipe.load_in_4bit:
        loaded = int(linear * (1 / 2 + 1 / 64 + 4 / (64 * 256))) + embedding * element_size
        return loaded, loaded
    return (linear + embedding) * element_size, (linear + embedding) * 4


def count_activation_bytes(recipe: Recipe, rows: int, length: int, element_size: int) -> int:
    """Bytes that autograd keeps of one decoder layer for the backward pass of so many rows of a length in tokens.

    Counted off transformers' layer as it is trained (a test counts again), with e bytes a number. LoRA on all linear layers, in
    joined products: the fp32 inputs of two norms, the inputs of queries, of attention's output and of the feed-forward part,
    and the queries are 8 + 4e bytes a hidden unit; keys and values 2e a key-value unit; the three feed-forward outputs and what
    the last product takes 4e a feed-forward unit; and LoRA's r numbers a module. PEFT's own products keep 26 bytes a hidden
    unit in 16 bits. With LoRA on attention alone the inputs of the feed-forward products are not kept. Fused attention keeps no
    weights; matrix attention keeps keys and values as they are repeated for all heads, and the weights in fp32, in 16
    bits once more. Unsloth's GPU kernels keep less.
    """
    arch, training = recipe.values.architecture, recipe.values
    modules = TARGET_MODULES[recipe.target_modules]
    peft_in_16_bits = element_size == 2 and not training.joined_lora
    hidden, key_value = (26, 0) if peft_in_16_bits else (8 + 4 * element_size, 2 * element_size)
    feed_forward, weights = 4 * element_size, 0
    if length <= training.matrix_attention_tokens:
        hidden, key_value = hidden + 2 * element_size, 0
        weights = 6 if element_size == 2 else 4
    if "down_proj" not in modules:
        hidden -= 4 if peft_in_16_bits else element_size
        feed_forward -= element_size
    per_token = (
        hidden * arch.hidden_size
        + key_value * arch.num_key_value_heads * arch.head_dim
        + feed_forward * arch.intermediate_size
        + weights * arch.num_attention_heads * length
        + len(modules) * recipe.r * element_size
    )
    return rows * length * per_token


def plan_memory(recipe: Recipe, trainable: int, embeddings: int, longest_row: int, element_size: int) -> dict[str, int]:
    """Bytes of device memory at the peak of a training step, by part.

    `embeddings` counts the bytes of an adapter's own embedding. 8-bit Adam keeps two bytes a parameter and a 32-bit scale for
    256 of them (Dettmers et al. 2022), others two 32-bit numbers. With gradient checkpointing one layer at a time is computed
    again and kept, and beside it the gradients of its three feed-forward products.
    """
    arch, training = recipe.values.architecture, recipe.values
    rows = recipe.per_device_train_batch_size
    tokens = rows * longest_row
    # Rows that are shorter than the longest may need more, where it is beyond what matrix attention takes.
    lengths = (longest_row, min(longest_row, training.matrix_attention_tokens))
    layer = max(count_activation_bytes(recipe, rows, length, element_size) for length in lengths)
    if recipe.use_gradient_checkpointing:
        activations = layer + 3 * tokens * arch.intermediate_size * element_size
    else:
        activations = arch.num_hidden_layers * layer
    return {
        "runtime": training.runtime,
        "base weights": count_weight_bytes(recipe, element_size)[0],
        "LoRA weights": 4 * trainable + embeddings,
        "LoRA gradients": 4 * trainable,
        "optimiser": int(trainable * (2 + 2 * 4 / 256)) if "8bit" in recipe.optim else 8 * trainable,
        "activations": activations,
        "gaps between blocks": int(training.gaps * activations),
        "logits and loss": training.loss,
    }


def training_dtype(recipe: Recipe) -> str:
    """dtype of the base model in training, as the profile or, on this machine, Unsloth chooses it."""
    if recipe.values.training_dtype:
        return recipe.values.training_dtype
    from unsloth import is_bfloat16_supported

    return "bfloat16" if is_bfloat16_supported() else "float32"


@dataclass(frozen=True)
class RowCounts:
    """What a plan knows of its rows."""

    rows: int
    tokens: int
    longest_row: int
    """In tokens."""
    estimated: str | None = None
    """Why the tokens are estimated; None if all is exact."""
    rows_are_estimated: bool = False
    audit: Mapping[str, Any] | None = None
    """Of the rows, where they could be read."""


def count_rows(config: TrainConfig, recipe: Recipe) -> RowCounts:
    """Rows and tokens of the mix: exact for files whose tokenizer is available, else as exact as possible.

    Raises:
        UsageError: the rows cannot be used.
    """
    sources = config.sources(recipe.values)
    from_hub = {name for name, source in sources.items() if Path(source).suffix.lower() not in data.FILE_SUFFIXES}
    try:
        mix = config.load(recipe.values)
    except UsageError as error:
        if not from_hub or data.reaches_hub():
            raise
        # Files are counted as they are, and what is wrong with them is an error, not a reason to estimate.
        available = {name: count or 0 for name, count in recipe.wanted.items()}
        for name in sources.keys() - from_hub:
            rows, report = data.load_source(name, sources[name], config)
            rows = data.clean_rows(rows, report)
            data.check_losses(report)
            available[name] = len(data.split_rows(rows)[0])
        counts = data.mix_counts(available, recipe.wanted)
        tokens = sum(count * MEAN_ROW_TOKENS.get(name, 0) for name, count in counts.items())
        return RowCounts(sum(counts.values()), tokens, data.MAX_SEQ_LENGTH, str(error).split(". ")[0], True)
    estimated = None
    try:
        tokenizer = data.load_tokenizer(recipe.values)
    except UsageError as error:
        estimated = f"counted with the small model's tokenizer ({str(error).split(' (')[0]})"
        tokenizer = data.load_tokenizer(data.PROFILES["cpu"])
    audit = data.audit_mix(data.fit_mix(mix, tokenizer), tokenizer)
    return RowCounts(audit["train_rows"], audit["train_tokens"], audit["lengths"]["longest"], estimated, audit=audit)


# A part of the plan's disk: it is not in the run's folder.
CACHED = "base model, into the cache, once"


def make_plan(recipe: Recipe, dtype: str, counts: RowCounts) -> Plan:
    """The plan of a run on these rows, with a base model of this dtype."""
    import psutil
    import torch

    training, arch = recipe.values, recipe.values.architecture
    element_size = getattr(torch, dtype).itemsize
    multiple = recipe.pad_to_multiple_of or 1
    rows, tokens = counts.rows, counts.tokens
    longest_row = math.ceil(counts.longest_row / multiple) * multiple
    model = build_meta_adapter(recipe, dtype)
    tensors = saved_tensors(model, recipe.pad)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    embeddings = sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if ".lora_" not in name)
    memory = plan_memory(recipe, trainable, embeddings, longest_row, element_size)
    loaded, in_file = count_weight_bytes(recipe, element_size)
    batch_tokens = recipe.per_device_train_batch_size * longest_row
    # Where the host is the device, the file that is read counts as well.
    loading = training.runtime + loaded + (0 if training.host_runtime else in_file)
    evaluation = training.runtime + loaded + training.eval_bytes_per_logit * batch_tokens * arch.vocab_size
    adapter_bytes = count_safetensors_bytes(tensors)
    offloaded = arch.num_hidden_layers * batch_tokens * arch.hidden_size * element_size
    host = {"runtime": training.host_runtime, "activations kept for the GPU": offloaded}
    # Each holds the weights, the optimiser and the best adapter so far; a third is written before the first goes.
    checkpoints = (NUM_CHECKPOINTS + 1) * (2 * adapter_bytes + memory["optimiser"])
    disk = {"adapter": 2 * adapter_bytes, "checkpoints, until the run is done": checkpoints}
    steps = recipe.count_steps(rows)
    asked = recipe.count_evaluations(steps) if recipe.num_probes else 0
    return Plan(
        rows=rows,
        tokens=tokens,
        estimated=counts.estimated,
        rows_are_estimated=counts.rows_are_estimated,
        steps=steps,
        trainable_parameters=trainable,
        adapter_bytes=adapter_bytes,
        memory=memory,
        memory_peak=max(sum(memory.values()), loading, evaluation),
        memory_limit=training.memory_limit or psutil.virtual_memory().available // local_world_size(),
        host_memory=host if training.host_runtime else {},
        disk={CACHED: in_file, **disk},
        training_seconds=steps * EFFECTIVE_BATCH_SIZE * tokens / rows / training.tokens_per_second / world_size(),
        gate_seconds=asked * recipe.gate_max_new_tokens * training.seconds_per_new_token,
    )


def check_disk(plan: Plan, folder: Path, goes_on: bool) -> None:
    """Checks that the disk has room for what the run will write, beside what it has written where it goes on.

    Raises:
        UsageError: it has not.
    """
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if goes_on else 0
    needed = sum(size for name, size in plan.disk.items() if name != CACHED) - there
    free = shutil.disk_usage(existing_parent(folder)).free
    if needed > free:
        raise UsageError(
            f"{folder} will need up to {needed / 2**20:,.0f} MiB more of disk for checkpoints and adapter, and "
            f"{free / 2**20:,.0f} MiB are free there. Make room, choose another --output-dir, or lower --r."
        )


def format_plan(plan: Plan, recipe: Recipe, folder: Path) -> str:
    """The plan as plain text for a terminal."""
    import psutil

    def parts(title: str, sizes: Mapping[str, int], total: int, of: int, says: str) -> list[str]:
        lines = [f"{title:<30}{total / GIB:.2f} GiB of {of / GIB:.1f} GiB {says}".rstrip()]
        return lines + [f"  {name:<28}{size / GIB:9.3f} GiB" for name, size in sizes.items()]

    written = existing_parent(folder)
    about = "about " if plan.rows_are_estimated else ""
    about_tokens = "about " if plan.estimated else ""
    what = "rows, tokens and the longest row" if plan.rows_are_estimated else "tokens and the longest row"
    lines = [f"{what} are estimates: {plan.estimated}"] if plan.estimated else []
    lines += [
        f"{'rows':<30}{about}{plan.rows:,} of {about_tokens}{plan.tokens:,} tokens",
        f"{'steps':<30}{about}{plan.steps:,} of {EFFECTIVE_BATCH_SIZE} rows: {recipe.per_device_train_batch_size} rows x "
        f"{recipe.gradient_accumulation_steps} forward passes x {world_size()} processes",
        f"{'evaluations':<30}{recipe.count_evaluations(plan.steps)}, each with {recipe.num_probes} answers of up to "
        f"{recipe.gate_max_new_tokens} tokens",
        f"{'time':<30}about {plan.training_seconds / 60:.1f} min, and {plan.gate_seconds / 60:.1f} min for the answers "
        f"({plan.gate_seconds / plan.training_seconds:.1%})",
        f"{'trainable parameters':<30}{plan.trainable_parameters:,}",
        f"{'adapter file':<30}{plan.adapter_bytes:,} bytes",
        *parts("device memory", plan.memory, plan.memory_peak, plan.memory_limit, "" if plan.fits else "IS MORE THAN THERE IS"),
    ]
    if plan.host_memory:
        available = psutil.virtual_memory().available
        lines += parts("host memory", plan.host_memory, sum(plan.host_memory.values()), available, "free here")
    lines += parts("disk", plan.disk, sum(plan.disk.values()), shutil.disk_usage(written).free, f"free at {written}")
    lines += [
        f"{'to be written':<30}{folder}/: run.json, metrics.jsonl, samples.jsonl, curves.png, adapter/; "
        "checkpoint-N/ until the run is done, merged/ with --merge"
    ]
    return "\n".join(lines)


MEMORY_ADVICE = (
    "Lower --per-device-train-batch-size first (the steps stay those of 16 rows), then --r, then take --target-modules "
    "attention. A run that was under way goes on from its last checkpoint with its own values; others need another --name."
)


# --- The pad token, guarded --------------------------------------------------------------------------------------


def explain_added_pad(plan: Plan, recipe: Recipe, dtype: str) -> str:
    """What `--pad added` does, said before it does it."""
    native_recipe = dataclasses.replace(recipe, pad="native")
    native = count_safetensors_bytes(saved_tensors(build_meta_adapter(native_recipe, dtype), "native"))
    return (
        f"--pad added: {infer.ADDED_PAD_TOKEN} becomes a new token, the embedding grows by a row, and the adapter file carries "
        f"embedding and head whole: {plan.adapter_bytes:,} bytes, {plan.adapter_bytes / native:.1f} times the {native:,} of "
        "the tokenizer's own pad token. This is the story's mistake, for comparison."
    )


def check_before_training(model: PeftModel, tokenizer: Any, recipe: Recipe) -> None:
    """Checks that only LoRA will be trained and saved, and that pad is a token of the vocabulary that is not eos.

    Raises:
        UsageError: it is not so; the message names what was found.
    """
    rows, vocab_size = model.get_input_embeddings().weight.shape[0], model.config.vocab_size
    expected = recipe.values.architecture.vocab_size + (recipe.pad == "added")
    lora = model.peft_config["default"]
    others = [name for name, tensor in model.named_parameters() if tensor.requires_grad and ".lora_" not in name]
    problems = []
    if not rows == vocab_size == expected or len(tokenizer) > rows:
        problems.append(
            f"The embedding has {rows:,} rows, the config says {vocab_size:,}, the tokenizer has {len(tokenizer):,} tokens; "
            f"{expected:,} rows are wanted. A token was added, or the base model is another than {recipe.base_model}."
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id) or tokenizer.pad_token_id >= rows:
        problems.append(f"Pad is {tokenizer.pad_token!r} ({tokenizer.pad_token_id}); a token of its own is wanted, not eos.")
    if lora.modules_to_save or {"embed_tokens", "lm_head"} & set(lora.target_modules):
        problems.append("The embedding or the head would be trained and saved whole; only LoRA tensors are wanted.")
    if others:
        problems.append(f"{len(others)} tensors other than LoRA's would be trained, the first {others[0]}.")
    if problems:
        raise UsageError(
            "Nothing was trained, for the adapter would not be what was planned:\n"
            + "\n".join(problems)
            + "\nInstall the pinned packages again (pip install --no-deps -r requirements.txt), and clear the model's cache."
        )


def check_saved(weights: Path, plan: Plan, pad: PadName) -> None:
    """Checks that an adapter file holds the planned tensors and no others.

    Raises:
        UsageError: it holds others, or its size is more than 2% off the plan.
    """
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        names = list(file.keys())
    others = [name for name in names if ".lora_" not in name]
    size = weights.stat().st_size
    if (others and pad == "native") or abs(size - plan.adapter_bytes) > 0.02 * plan.adapter_bytes:
        raise UsageError(
            f"{weights} is not what was planned: {size:,} bytes, planned {plan.adapter_bytes:,}; tensors other than LoRA's: "
            f"{', '.join(others) or 'none'}. It was not put in place as the adapter. An embedding in it means that a token was "
            "added to the tokenizer: use the base model's own pad token (--pad native) and train again with --restart."
        )


# --- The gate: answers beside the loss ---------------------------------------------------------------------------


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl tells of an evaluation, and not of a training step."""
    return "eval_loss" in line


def rank_evaluation(evaluation: Mapping[str, Any], best: Best) -> tuple[float, ...]:
    """What evaluations are compared by, the largest being best. A loss that is no number is the worst.

    By answers: the share of sound ones, then the points named, then the loss. Without answers only the loss is left.
    """
    loss = evaluation["eval_loss"] if math.isfinite(evaluation["eval_loss"]) else math.inf
    if best == "eval_loss":
        return (-loss,)
    answers = max(evaluation["num_answers"], 1)
    return (evaluation["num_sound"] / answers, evaluation["num_named"], -loss)


def choose_evaluation(evaluations: Sequence[Mapping[str, Any]], best: Best) -> Mapping[str, Any]:
    """The best of the evaluations after training began; before its first step there is no adapter to keep.

    One that came only because --max-hours stopped the run counts only as long as there is no other, so that a run that was
    stopped and went on keeps the same weights as one that was not.
    """
    trained = [each for each in evaluations if each["step"]]
    candidates = [each for each in trained if each["scheduled"]] or trained
    return max(candidates, key=lambda each: rank_evaluation(each, best))


def compare(now: float, before: float, larger_is_better: bool) -> str:
    """`better`, `worse` or `as before`."""
    if now == before:
        return "as before"
    return "better" if (now > before) == larger_is_better else "worse"


def describe_evaluation(now: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """Loss and answers of an evaluation side by side, each against the evaluation before; one line, or two where they part."""
    loss = f"eval_loss {now['eval_loss']:.4f}"
    sound, points = (f"{now[part]}/{now[whole]}" for part, whole in (("num_sound", "num_answers"), ("num_named", "num_points")))
    if not before:
        told = [loss, f"sound {sound}"]
    else:
        judged = compare(now["num_sound"], before["num_sound"], True)
        told = [
            f"{loss} ({compare(now['eval_loss'], before['eval_loss'], False)})",
            f"sound {sound} (was {before['num_sound']}/{before['num_answers']}, {judged})",
        ]
    if not now["num_answers"]:
        return f"step {now['step']}: {told[0]}"
    stopped = f"stopped {now['num_ended'] / now['num_answers']:.0%}"
    line = " | ".join(
        [f"step {now['step']}: {told[0]}", told[1], stopped, f"points {points}, wrong claims {now['num_wrong_claims']}"]
    )
    if before and now["eval_loss"] < before["eval_loss"]:
        parts = {"sound answers": "num_sound", "points": "num_named"}
        fewer = [f"{name} {before[key]} -> {now[key]}" for name, key in parts.items() if now[key] < before[key]]
        if fewer:
            line += f"\n  the loss improves while the answers get worse: {', '.join(fewer)}"
    return line


@contextlib.contextmanager
def asking(model: PeftModel, tokenizer: Any, recipe: Recipe) -> Iterator[None]:
    """The model set up for generation; afterwards its modes, the padding side and all random generators are as they were."""
    import numpy as np
    import torch
    from unsloth import FastLanguageModel

    modes = [(module, module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    side, on_gpu = tokenizer.padding_side, torch.cuda.is_available()
    numpy_state, python_state, torch_state = np.random.get_state(), random.getstate(), torch.get_rng_state()
    gpu_states = torch.cuda.get_rng_state_all() if on_gpu else []
    FastLanguageModel.for_inference(model)
    try:
        yield
    finally:
        FastLanguageModel.for_training(model, use_gradient_checkpointing=recipe.use_gradient_checkpointing)
        for module, training, checkpointing in modes:
            module.training = training
            if checkpointing is not None:
                module.gradient_checkpointing = checkpointing
        tokenizer.padding_side = side
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if on_gpu:
            torch.cuda.set_rng_state_all(gpu_states)


class Gate:
    """Asks the probes at each evaluation, judges the answers beside the loss, and keeps the best weights as the adapter.

    Its records are metrics.jsonl and samples.jsonl in the run's folder; a run that `goes_on` reads them again. `keep` writes
    the adapter. Of several processes the first asks.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Any,
        folder: Path,
        keep: Callable[[Gate], None],
        goes_on: bool,
        system_prompt: str = data.SYSTEM_PROMPT,
    ) -> None:
        self.system_prompt = system_prompt
        self.recipe, self.tokenizer, self.folder, self._keep = recipe, tokenizer, folder, keep
        self.probes = infer.read_probes()[: recipe.num_probes]
        decoding = infer.DECODINGS["kit"]
        cap = min(decoding.max_new_tokens, recipe.gate_max_new_tokens)
        self.decoding = dataclasses.replace(decoding, max_new_tokens=cap)
        metrics = read_lines(folder / "metrics.jsonl") if goes_on and is_main_process() else []
        self.evaluations = [line for line in metrics if is_evaluation(line)]
        self.surprisal_reference: float | None = None
        """Of the base model, once answers were judged."""

    def pass_through(self, model: PeftModel, state: TrainerState, metrics: Mapping[str, float]) -> dict[str, float]:
        """Asks and judges, writes the records, prints the line, keeps the weights if they are the best; returns the numbers."""
        if not is_main_process():
            return {}
        from tqdm import tqdm

        step, started = state.global_step, time.monotonic()
        judged = self._ask(model, step)
        quality = infer.measure_quality(judged)
        evaluation = {"step": step, "epoch": round(state.epoch or 0, 4), "eval_loss": metrics["eval_loss"]}
        evaluation["scheduled"] = step % state.eval_steps == 0 or step == state.max_steps
        evaluation["mean_token_accuracy"] = metrics.get("eval_mean_token_accuracy")
        evaluation |= dataclasses.asdict(quality)
        for each in judged:
            # Without what differs from run to run: equal runs leave equal files.
            record = {name: value for name, value in each.to_record().items() if name not in ("adapter", "seconds")}
            append_line(self.folder / "samples.jsonl", json.dumps({"step": step, **record}, ensure_ascii=False))
        append_line(self.folder / "metrics.jsonl", json.dumps(evaluation))
        before = self.evaluations[-1] if self.evaluations else None
        self.evaluations.append(evaluation)
        tqdm.write(describe_evaluation(evaluation, before), file=sys.stderr)
        if step and self.chosen is evaluation:
            self._keep(self)
        rates = {name: getattr(quality, name) for name in ("sound_rate", "stop_rate", "points_rate")}
        return rates | {"gate_seconds": round(time.monotonic() - started, 2)}

    def _ask(self, model: PeftModel, step: int) -> list[infer.JudgedAnswer]:
        from tqdm import tqdm

        if not self.probes:
            return []
        values = self.recipe.values
        loaded = infer.LoadedModel(model, self.tokenizer, values, system_prompt=self.system_prompt)
        requests = [infer.Request(probe.question, self.decoding) for probe in self.probes]
        total = len(requests) * self.decoding.max_new_tokens
        # Before the first step LoRA adds nothing, and is left away: the base model answers, sooner.
        base = contextlib.nullcontext() if step else model.disable_adapter()
        bar = tqdm(total=total, unit="token", desc="asking", leave=False, disable=not sys.stderr.isatty())

        def progress(tokens: int) -> None:
            bar.update(tokens)
            INTERRUPTION.raise_if_any()

        with asking(model, self.tokenizer, self.recipe), infer.quiet_libraries():
            with base, bar:
                answers = infer.answer_requests(loaded, requests, progress)
            judged = infer.judge_answers(loaded, answers, (), progress)
        self.surprisal_reference = loaded.reference
        return judged

    @property
    def chosen(self) -> Mapping[str, Any]:
        """The evaluation whose weights are kept."""
        return choose_evaluation(self.evaluations, self.recipe.best)

    @property
    def has_had_enough(self) -> bool:
        """Whether so many evaluations as `--stop-when-worse` says have come since the one with the best answers."""
        if not self.recipe.stop_when_worse or not self.evaluations or not self.evaluations[-1]["step"]:
            return False
        best = choose_evaluation(self.evaluations, "answers")
        since = [each for each in self.evaluations if each["step"] > best["step"]]
        return len(since) >= self.recipe.stop_when_worse


# --- Training ----------------------------------------------------------------------------------------------------


def make_sft_config(recipe: Recipe, folder: Path, report_to: Tracker = "none") -> SFTConfig:
    """TRL's settings. Each value whose default differs between Unsloth's GPU path and its CPU backend is set here."""
    from unsloth import is_bfloat16_supported  # isort: skip
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(folder),
        max_length=recipe.max_seq_length,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        per_device_eval_batch_size=recipe.per_device_train_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        eval_accumulation_steps=None,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.03,
        weight_decay=0.01,
        max_grad_norm=1.0,
        optim=recipe.optim,
        # A T4 has no bf16.
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        gradient_checkpointing=bool(recipe.use_gradient_checkpointing),
        train_sampling_strategy=recipe.train_sampling_strategy,
        packing=False,
        padding_free=recipe.padding_free,
        pad_to_multiple_of=recipe.pad_to_multiple_of,
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=1,
        # A loss that is no number has to show.
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="no",
        eval_strategy="steps",
        eval_steps=recipe.eval_every,
        # By the Trainer, once the model is wrapped: after a call of `evaluate` before training, accelerate takes the model for
        # prepared and does not wrap it, so that several processes would train on their own (a test compares them with one).
        eval_on_start=True,
        save_strategy="no",
        report_to=report_to,
        disable_tqdm=True,
        dataloader_num_workers=0,
        torch_empty_cache_steps=None,
        ddp_find_unused_parameters=False,
    )


def add_lora(model: Any, recipe: Recipe) -> PeftModel:
    """`model` with fresh LoRA matrices; nothing but them is trainable."""
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(
        model,
        r=recipe.r,
        target_modules=TARGET_MODULES[recipe.target_modules],
        lora_alpha=recipe.lora_alpha,
        lora_dropout=0.0,
        bias="none",
        use_gradient_checkpointing=recipe.use_gradient_checkpointing,
        random_state=recipe.seed,
        use_rslora=False,
        modules_to_save=None,
        init_lora_weights=True,
    )


def join_lora(model: PeftModel) -> None:
    """Has each LoRA layer of the model compute base and LoRA in one product: [x, x A'] [W, s B]' for x W' + s (x A') B'.

    It is faster, and in 16 bits it is right where the sum of two products is not: LoRA's part is small beside the base's, and
    of a sum that is rounded to 16 bits what is below half a unit in the last place of the larger part is lost. (Measured by
    `tests.bench train`: of an adapter whose eval loss is 3.360 in 32 bits, PEFT's sum in bfloat16 shows 3.400; of the kit's,
    of 3.362, the joined product shows 3.362.)

    W, a frozen weight (out, in), becomes a view of the joined matrix (out, in + r).
    """
    import torch
    from peft.tuners.lora import Linear

    class JoinedProduct(torch.autograd.Function):
        """x (..., in), joined (out, in + r), A (r, in), B (out, r) -> (..., out); gradients for x, A and B."""

        @staticmethod
        def forward(ctx: Any, x: Any, joined: Any, a: Any, b: Any, scaling: float) -> Any:
            num_in = a.shape[1]
            a = a.to(joined.dtype)
            rows = x.to(joined.dtype).reshape(-1, num_in)
            low = rows @ a.T
            joined[:, num_in:] = b * scaling
            ctx.save_for_backward(rows, low, a)
            ctx.joined, ctx.scaling, ctx.x_shape, ctx.x_dtype = joined, scaling, x.shape, x.dtype
            return (torch.cat([rows, low], dim=1) @ joined.T).view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, d_out: Any) -> Any:
            rows, low, a = ctx.saved_tensors
            num_in = a.shape[1]
            d_out = d_out.reshape(-1, d_out.shape[-1])
            d_x = None
            if ctx.needs_input_grad[0]:
                d_joined = d_out @ ctx.joined
                d_low = d_joined[:, num_in:].contiguous()
                d_x = torch.addmm(d_joined[:, :num_in], d_low, a).view(ctx.x_shape).to(ctx.x_dtype)
            else:
                d_low = d_out @ ctx.joined[:, num_in:]
            d_a = (d_low.T @ rows).float()
            d_b = (d_out.T @ low).float() * ctx.scaling
            return d_x, None, d_a, d_b, None

    def forward(layer: Linear, x: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.disable_adapters:
            return layer.base_layer(x)
        a, b = (matrices["default"].weight for matrices in (layer.lora_A, layer.lora_B))
        return JoinedProduct.apply(x, layer.joined, a, b, layer.scaling["default"])

    for layer in model.modules():
        if isinstance(layer, Linear):
            weight = layer.base_layer.weight
            layer.joined = torch.cat([weight.data, weight.new_zeros(len(weight), layer.r["default"])], dim=1)
            weight.data = layer.joined[:, : weight.shape[1]]
            layer.forward = types.MethodType(forward, layer)


def use_matrix_attention(model: PeftModel, longest: int) -> None:
    """Has batches of up to `longest` tokens attend by plain products of matrices, transformers' `eager`; longer ones as before.

    torch's fused kernel does not keep the attention weights, which are (B, heads, T, T), and computes them again backward.
    Measured on two cores: for short rows a training without them takes 1.18 times as long (`tests.bench train --measures`); at
    1,024 tokens the products take as much time as the kernel, and a pass twice the memory.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.models.llama.modeling_llama import eager_attention_forward

    def attend(module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        forward = eager_attention_forward if key.shape[2] <= longest else sdpa_attention_forward
        return forward(module, query, key, *args, **kwargs)

    AttentionInterface.register("matrix", attend)
    AttentionMaskInterface.register("matrix", eager_mask)
    model.set_attn_implementation("matrix")


def quicken(model: PeftModel, values: data.Profile) -> None:
    """Makes training of the model faster, by what the profile says."""
    if values.joined_lora:
        join_lora(model)
    if values.matrix_attention_tokens:
        use_matrix_attention(model, values.matrix_attention_tokens)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; none where it is not there."""
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []


def make_progress_callback(metrics_path: Path) -> TrainerCallback:
    """Shows a live bar of steps on stderr, and writes one line a log to `metrics_path`; in the main process alone."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    names = {"loss": "train_loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm"}
    names |= {"mean_token_accuracy": "train_mean_token_accuracy"}

    class ProgressCallback(TrainerCallback):
        """The Trainer's own bar, with the loss beside it and the log in a file."""

        bar: tqdm | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # Where nobody watches, a line every 10 s is enough.
            interval = 0.1 if sys.stderr.isatty() else 10
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="training",
                unit="step",
                dynamic_ncols=True,
                mininterval=interval,
                disable=not is_main_process(),
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if not is_main_process():
                return
            if "loss" not in logs:
                return  # of an evaluation: the gate's
            known = {name: logs[key] for key, name in names.items() if key in logs}
            line = {"step": state.global_step, "epoch": round(state.epoch or 0, 4), **known}
            append_line(metrics_path, json.dumps(line))
            if self.bar:
                self.bar.set_postfix(train_loss=f"{logs['loss']:.3f}")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.close()

        def close(self) -> None:
            if self.bar is not None:
                self.bar.close()

    return ProgressCallback()


def agree(vote: bool, device: torch.device) -> bool:
    """Whether any of the processes that train together votes for it."""
    import torch

    if not torch.distributed.is_initialized():
        return vote
    votes = torch.tensor([vote], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(votes)
    return bool(votes.item())


def make_checkpoint_callback(folder: Path, interval: float, earlier_seconds: float) -> TrainerCallback:
    """Has the Trainer save every `interval` seconds and when a signal ends the run, and puts that into the run's folder.

    `earlier_seconds` were trained before the run went on.
    """
    from transformers import TrainerCallback

    class CheckpointCallback(TrainerCallback):
        """Watches the clock and the signals at the end of every step, and the signals in evaluations too."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = self.saved = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if agree(INTERRUPTION.number is not None, args.device):
                control.should_save = control.should_training_stop = True
            elif agree(time.monotonic() - self.saved >= interval, args.device):
                control.should_save = True

        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            INTERRUPTION.raise_if_any()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            agree(True, args.device)  # every process has written its part
            if is_main_process():
                seconds = earlier_seconds + time.monotonic() - self.began
                put_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}", folder, state, seconds)
            self.saved = time.monotonic()

    return CheckpointCallback()


def make_time_limit_callback(deadline: float) -> TrainerCallback:
    """Ends training with a checkpoint while there is time left for one more step and an evaluation.

    `deadline` is a reading of `time.monotonic`. Processes that train together stop at the same step.
    """
    from transformers import TrainerCallback

    class TimeLimitCallback(TrainerCallback):
        """Watches the clock at the end of every step."""

        longest_step = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.monotonic()
            self.longest_step = max(self.longest_step, now - self.began)
            logs = state.log_history
            evaluation = sum(max(log.get(name, 0.0) for log in logs) for name in ("eval_runtime", "eval_gate_seconds"))
            # One at the end, and one before the next step where it is due.
            evaluations = evaluation * (1 + control.should_evaluate)
            late = agree(now + self.longest_step + evaluations > deadline, args.device)
            if late and state.global_step < state.max_steps:
                control.should_training_stop = control.should_save = True

    return TimeLimitCallback()


class LikeLengthsSampler:
    """Order of the rows of an epoch, in which rows of like length share a step. It depends on seed and epoch alone.

    The Trainer's own sampler groups by the batch of a process, so that two processes would see other steps than one, and draws
    from the global generator, which whatever else is drawn there moves on.
    """

    def __init__(self, lengths: Sequence[int], seed: int) -> None:
        self.lengths, self.seed, self.epoch = list(lengths), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        import torch
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, EFFECTIVE_BATCH_SIZE, generator=generator))


def make_trainer(
    model: PeftModel,
    tokenizer: Any,
    recipe: Recipe,
    train: Dataset,
    held_out: Dataset,
    folder: Path,
    report_to: Tracker = "none",
    gate: Gate | None = None,
) -> SFTTrainer:
    """TRL's trainer on encoded rows, with our progress in place of its printing, and the gate at each evaluation."""
    from transformers import PrinterCallback
    from trl import SFTTrainer

    class Trainer(SFTTrainer):
        """TRL's trainer with our order of rows (those to be evaluated keep theirs), and a checkpoint before each evaluation."""

        has_had_enough = False  # of evaluations without better answers
        saved_step = 0

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            # What was trained is not lost to what may happen in an evaluation.
            if self.state.global_step > self.saved_step:
                self._save_checkpoint(self.model, None)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            INTERRUPTION.raise_if_any()
            metrics = super().evaluate(*args, **kwargs)
            if gate:
                numbers = gate.pass_through(self.model, self.state, metrics)
                self.log({f"eval_{name}": value for name, value in numbers.items()})
                self.has_had_enough = agree(gate.has_had_enough, self.args.device)
                self.control.should_training_stop |= self.has_had_enough
            return metrics

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            with data.writing(folder / f"checkpoint-{self.state.global_step}", Path(self.args.output_dir)):
                super()._save_checkpoint(*args, **kwargs)
            self.saved_step = self.state.global_step

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            # LoRA alone: PEFT would look the base model up on the hub to see whether its embedding has to be saved too.
            self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)

        def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
            # A run that goes on after its last step has only that step's evaluation before it, which has been made by now.
            if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
                super()._run_epoch(*args, **kwargs)

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if recipe.train_sampling_strategy == "group_by_length":
                return LikeLengthsSampler([len(ids) for ids in self.train_dataset["input_ids"]], recipe.seed)
            return super()._get_train_sampler(train_dataset)

        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            from torch.utils.data import SequentialSampler

            return SequentialSampler(eval_dataset)

    trainer = Trainer(
        model=model,
        processing_class=tokenizer,
        args=make_sft_config(recipe, folder / TRAINER_FOLDER, report_to),
        train_dataset=train,
        eval_dataset=held_out,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.progress = make_progress_callback(folder / "metrics.jsonl")
    trainer.add_callback(trainer.progress)
    return trainer


def train_and_evaluate(
    trainer: SFTTrainer, folder: Path, deadline: float | None, save_minutes: float, checkpoint: Checkpoint | None
) -> dict[str, Any]:
    """Trains, from `checkpoint` on if there is one; returns the run's numbers: eval losses, accuracy, steps and seconds.

    Raises:
        infer.Interrupted: a signal came; what was trained until the end of its step is saved.
        UsageError: as `put_checkpoint`.
    """
    import torch

    earlier_seconds = checkpoint.training_seconds if checkpoint else 0.0
    trainer.add_callback(make_checkpoint_callback(folder, 60 * save_minutes, earlier_seconds))
    if deadline:
        trainer.add_callback(make_time_limit_callback(deadline))
    if checkpoint:
        trainer.saved_step = checkpoint.step
        trainer.args.eval_on_start = checkpoint.evaluation_is_due
        # As the Trainer counted them from our share of the steps; it would warn of the difference.
        trainer.args.eval_steps = checkpoint.eval_steps
        # accelerate calls the CPU of several processes `cpu:0`, which torch's reader does not know.
        torch.serialization.register_package(
            100, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
        )
    started = time.monotonic()
    try:
        with INTERRUPTION.deferred():
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint.trainer))
            cut_short = trainer.state.global_step < trainer.state.max_steps
            if cut_short:
                INTERRUPTION.raise_if_any()
            evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
            if evaluations[-1]["step"] < trainer.state.global_step:
                evaluations.append(trainer.evaluate())
    except infer.Interrupted as interrupted:
        said = "Interrupted before the first step was saved. The same line begins anew."
        # What is there, for a second Ctrl-C may have come while the last step was being saved.
        for last in list_checkpoints(folder)[:1]:
            said = f"Interrupted after step {step_of(last)} of {trainer.state.max_steps}, which is saved in {folder}. "
            said += "The same line (without --restart) goes on."
        raise infer.Interrupted(interrupted.number, said) from None
    finally:
        trainer.progress.close()
    stopped_by = ("answers" if trainer.has_had_enough else "max_hours") if cut_short else "end"
    return {
        "eval_loss_before": evaluations[0]["eval_loss"],
        "eval_loss": evaluations[-1]["eval_loss"],
        "mean_token_accuracy": evaluations[-1].get("eval_mean_token_accuracy"),
        "steps": trainer.state.global_step,
        "planned_steps": trainer.state.max_steps,
        "stopped_by": stopped_by,
        "training_seconds": round(earlier_seconds + time.monotonic() - started, 1),
        "peak_memory": peak_memory_bytes(trainer.args.device),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """The most device memory that this process has held so far: torch's on a GPU, else the whole process's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- What a run leaves -------------------------------------------------------------------------------------------


def save_adapter(
    model: PeftModel,
    tokenizer: Any,
    folder: Path,
    record: infer.AdapterRecord,
    plan: Plan,
    hub_id: str,
) -> None:
    """Writes the adapter folder, whole or not at all, in place of an older one.

    The record's decoding goes with it: into generation_config.json, which other programs read, and whole into our own record,
    since that file cannot say that the penalty does not count the prompt.

    Raises:
        UsageError: as `check_saved` and `data.writing`.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with data.writing(folder, part):
        # Where others find the base model; what we loaded may be a folder of this machine's cache.
        model.peft_config["default"].base_model_name_or_path = hub_id
        # Not "auto", which would look the base model up on the hub to see whether its embedding grew.
        model.save_pretrained(part, save_embedding_layers=record.pad == "added")
        check_saved(part / "adapter_model.safetensors", plan, record.pad)
        tokenizer.save_pretrained(part)
        if decoding := record.decoding:
            infer.make_generation_config(
                decoding.max_new_tokens,
                infer.stop_ids(decoding, model, tokenizer),
                tokenizer.pad_token_id,
                decoding.repetition_penalty,
                decoding.no_repeat_ngram_size,
            ).save_pretrained(part)
        data.write_atomic(part / infer.ADAPTER_RECORD, json.dumps(dataclasses.asdict(record), indent=2) + "\n")
        put_folder(part, folder)


def describe_source(source: str) -> str:
    """A source of rows for the model card, with its licence. Only the name of a file, since its folder is private."""
    path = Path(source)
    name, key = (path.name, str(path.resolve())) if path.is_file() else (source, source.partition("@")[0])
    return f"{escape_markdown(name)} (licence: {LICENCES.get(key, 'not known to the kit')})"


def format_vllm_command(recipe: Recipe, adapter: str, decoding: infer.Decoding) -> str:
    """The line that serves the adapter with vLLM under the decoding, as far as vLLM knows its values."""
    values = {
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "repetition_penalty": decoding.repetition_penalty,
        "max_new_tokens": decoding.max_new_tokens,
    }
    rank = next((rank for rank in VLLM_RANKS if rank >= recipe.r), recipe.r)
    return (
        f"vllm serve {recipe.values.hub_id} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules medical={adapter} --chat-template {adapter}/chat_template.jinja "
        f"--override-generation-config '{json.dumps(values)}'"
    )


def format_card_answers(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of markdown with every answer and what was found in it; no text is read as markdown."""
    ended = [sample["finish_reason"] == "stop" for sample in samples]
    sound = sum(sample["verdict"] == "sound" and stop for sample, stop in zip(samples, ended, strict=True))
    lines = [
        "## Answers",
        "",
        f"All {len(samples)} questions that were asked when these weights were evaluated, whatever came out: **sound and "
        f"ended, {sound} of {len(samples)}**. A verdict is about the form of an answer, and points tell which words of a list "
        "are in it; neither says that it is right.",
        "",
    ]
    for sample, stop in zip(samples, ended, strict=True):
        decoding = infer.Decoding(**sample["decoding"])
        how = "ended" if stop else f"**cut at the cap of {decoding.max_new_tokens} tokens**"
        facts = infer.Facts(**{name: tuple(value) for name, value in sample["facts"].items()})
        lines += [f"**{escape_markdown(sample['question'])}** ({how}; {sample['verdict']}; {facts})", ""]
        lines += [format_verbatim(sample["text"]), ""]
    return lines


def make_card(recipe: Recipe, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """The model card (markdown): recipe, data with licences, losses, every probe answer, versions, how to ask.

    `samples` are the lines of samples.jsonl of the chosen evaluation.
    """
    profile, numbers, decoding = recipe.values, record["numbers"], infer.DECODINGS["kit"]
    sources = {name: getattr(recipe, name) for name in recipe.wanted}
    before, chosen = numbers["evaluations"]
    stopped = "" if numbers["stopped_by"] == "end" else f" of {numbers['planned_steps']} planned"
    table = {
        "base model": f"{profile.hub_id}, {'4-bit NF4' if recipe.load_in_4bit else '16 or 32 bits'}",
        "LoRA": f"r {recipe.r}, alpha {recipe.lora_alpha}, dropout 0, on {', '.join(TARGET_MODULES[recipe.target_modules])}",
        "rows": f"{numbers['train_rows']:,} of {numbers['train_tokens']:,} tokens, mix {recipe.mix}; loss on the answers only",
        "steps": f"{numbers['steps']:,} of {EFFECTIVE_BATCH_SIZE} rows{stopped}, learning rate {recipe.learning_rate:g}, "
        f"linear, {recipe.optim}, seed {recipe.seed}",
        "pad token": recipe.pad,
        "weights": f"of step {chosen['step']}, the best by {'answers' if recipe.best == 'answers' else 'eval loss'}",
        "eval loss": f"{before['eval_loss']:.4f} before, {chosen['eval_loss']:.4f} at that step, on "
        f"{numbers['eval_rows']} rows held out",
        "answers": f"sound {before['num_sound']}/{before['num_answers']} before, "
        f"{chosen['num_sound']}/{chosen['num_answers']} at that step, cap {recipe.gate_max_new_tokens} tokens",
    }
    lines = [
        "---",
        f"base_model: {profile.hub_id}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        f"license: {profile.licence}",
        "tags: [lora, unsloth, medical]",
        "---",
        "",
        "# LoRA adapter for medical questions",
        "",
        "**No medical advice.** A small language model writes these answers; it makes things up, and no physician has reviewed "
        "rows or answers.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in table.items()),
        "",
        "## Data",
        "",
        *(f"- {name}: {describe_source(source)}" for name, source in sources.items()),
        "",
        *format_card_answers(samples),
        "## Asking",
        "",
        'With the kit that made it: `python infer.py --adapter FOLDER "question"`. With vLLM, whose penalty counts the prompt '
        f'too, so that answers differ; add `"chat_template_kwargs": {{"date_string": "{data.TEMPLATE_DATE}"}}` and the '
        f'system prompt "{escape_markdown(record["system_prompt"])}" to each request:',
        "",
        "```sh",
        format_vllm_command(recipe, "FOLDER", decoding),
        "```",
        "",
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + f"; kit commit {record['commit']}",
        "",
    ]
    return "\n".join(lines)


@dataclass
class Preparation:
    """A trainer ready to run, and what was found out on the way."""

    trainer: SFTTrainer
    tokenizer: Any
    gate: Gate
    audit: dict[str, Any]
    plan: Plan
    adapter_record: infer.AdapterRecord


def prepare_trainer(recipe: Recipe, mix: data.Mix, folder: Path, report_to: Tracker, goes_on: bool) -> Preparation:
    """Loads the model, encodes the rows, and returns the trainer with its gate, all checked; nothing is written yet.

    A run that `goes_on` has its records in the folder.

    Raises:
        UsageError: every row is too long, the model is not what was planned, or the disk has no room for the run.
    """
    model, tokenizer = infer.load_base(recipe.values, dtype=None)
    import datasets

    datasets.disable_progress_bars()
    mix = data.fit_mix(mix, tokenizer)
    audit = data.audit_mix(mix, tokenizer)
    print(data.format_audit(audit))
    train, held_out = ([data.encode_row(tokenizer, row) for row in rows] for rows in (mix.train, mix.eval))
    # Rows of like length are evaluated together: the order is the same whatever the batch, and little is padded.
    held_out.sort(key=lambda row: len(row["input_ids"]))
    dtype = str(model.dtype).removeprefix("torch.")
    plan = make_plan(recipe, dtype, RowCounts(audit["train_rows"], audit["train_tokens"], audit["lengths"]["longest"]))
    print(f"\n{format_plan(plan, recipe, folder)}", flush=True)
    check_disk(plan, folder, goes_on)
    if not plan.fits and is_main_process():
        print(f"This may run out of memory. {MEMORY_ADVICE}", file=sys.stderr)
    with infer.quiet_libraries():
        if recipe.pad == "added":
            if is_main_process():
                print(explain_added_pad(plan, recipe, dtype), file=sys.stderr)
            infer.add_pad_token(model, tokenizer)
        model = add_lora(model, recipe)
        quicken(model, recipe.values)
        check_before_training(model, tokenizer, recipe)
        adapter_record = infer.AdapterRecord(
            recipe.base_model,
            recipe.profile,
            data.prompt_fingerprint(tokenizer, mix.system_prompt),
            infer.DECODINGS["kit"],
            recipe.pad,
            mix.system_prompt,
        )
        hub_id = recipe.values.hub_id

        def keep(gate: Gate) -> None:
            record = dataclasses.replace(adapter_record, surprisal_reference=gate.surprisal_reference)
            save_adapter(model, tokenizer, folder / "adapter", record, plan, hub_id)

        gate = Gate(recipe, tokenizer, folder, keep, goes_on, mix.system_prompt)
        rows = (datasets.Dataset.from_list(each) for each in (train, held_out))
        trainer = make_trainer(model, tokenizer, recipe, *rows, folder, report_to, gate)
    return Preparation(trainer, tokenizer, gate, audit, plan, adapter_record)


def make_record(
    recipe: Recipe,
    mix: data.Mix,
    prompt_fingerprint: str | None = None,
    numbers: dict[str, Any] | None = None,
    system_prompt: str = data.SYSTEM_PROMPT,
) -> dict[str, Any]:
    """What run.json holds; `numbers` is None until there are any."""
    return {
        "recipe": dataclasses.asdict(recipe),
        "argv": [redact(argument) for argument in sys.argv],
        "world_size": world_size(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS_OF} | {"python": platform.python_version()},
        "commit": commit_id(),
        "data_fingerprint": mix.fingerprint,
        "prompt_fingerprint": prompt_fingerprint,
        "system_prompt": system_prompt,
        "numbers": numbers,
    }


def run(
    config: TrainConfig, recipe: Recipe, mix: data.Mix, folder: Path, deadline: float | None, checkpoint: Checkpoint | None
) -> dict[str, Any]:
    """One training run into `folder`, from `checkpoint` on if there is one; returns the record that run.json holds.

    Raises:
        infer.Interrupted: as `train_and_evaluate`.
        UsageError: as `prepare_trainer`, `train_and_evaluate` and `save_adapter`.
    """
    if is_main_process() and checkpoint:
        restore(checkpoint, folder)
    ready = prepare_trainer(recipe, mix, folder, config.report_to, checkpoint is not None)
    prompt_fingerprint, system_prompt = ready.adapter_record.prompt_fingerprint, ready.adapter_record.system_prompt
    if is_main_process() and not checkpoint:
        if config.restart and folder.exists():
            set_aside(folder)
        with data.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for name in RUN_RECORDS:
            (folder / name).unlink(missing_ok=True)
        write_record(folder, make_record(recipe, mix, prompt_fingerprint, None, system_prompt))
    numbers = train_and_evaluate(ready.trainer, folder, deadline, config.save_minutes, checkpoint)
    numbers |= {name: ready.audit[name] for name in ("train_rows", "train_tokens", "eval_rows")}
    numbers |= {"trainable_parameters": ready.plan.trainable_parameters, "planned_memory": ready.plan.memory_peak}
    record = make_record(recipe, mix, prompt_fingerprint, numbers, system_prompt)
    if is_main_process():
        evaluations, chosen = ready.gate.evaluations, ready.gate.chosen
        numbers |= {"evaluations": [evaluations[0], chosen], "chosen_step": chosen["step"]}
        numbers |= {f"step_by_{best}": choose_evaluation(evaluations, best)["step"] for best in get_args(Best)}
        numbers["adapter_bytes"] = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
        samples = [line for line in read_lines(folder / "samples.jsonl") if line["step"] == chosen["step"]]
        data.write_atomic(folder / "adapter" / "README.md", make_card(recipe, record, samples))
        draw_curves(read_lines(folder / "metrics.jsonl"), chosen["step"], folder / "curves.png")
        write_record(folder, record)
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes run.json. Raises UsageError as `data.writing`."""
    data.write_atomic(folder / "run.json", json.dumps(record, indent=2) + "\n")


def describe_choice(numbers: Mapping[str, Any], best: Best) -> list[str]:
    """Which evaluation's weights were kept, which each way of choosing would have taken, and whether training helped."""
    before, chosen = numbers["evaluations"]
    others = ", ".join(f"by {name.replace('_', ' ')} step {numbers[f'step_by_{name}']}" for name in get_args(Best))
    lines = [f"weights   of step {chosen['step']} ({others})"]
    if chosen["num_answers"]:
        rows = (("before", before), (f"step {chosen['step']}", chosen))
        lines += [
            f"answers   {name}: sound and ended {each['num_sound_and_ended']} of {each['num_answers']}, "
            f"sound {each['num_sound']}, points {each['num_named']}/{each['num_points']}, "
            f"wrong claims {each['num_wrong_claims']}"
            for name, each in rows
        ]
        if rank_evaluation(before, "answers")[:2] > rank_evaluation(chosen, "answers")[:2]:
            lines.append("The base model's answers were better than those of any evaluated step.")
    return lines


def describe_result(folder: Path, recipe: Recipe, numbers: Mapping[str, Any]) -> str:
    """What came out of a run, where it lies, and what to do next."""
    lines = [
        f"eval loss {numbers['eval_loss_before']:.4f} before, {numbers['eval_loss']:.4f} after {numbers['steps']} steps "
        f"({numbers['training_seconds'] / 60:.1f} minutes)",
        *describe_choice(numbers, recipe.best),
        f"memory    {numbers['peak_memory'] / GIB:.2f} GiB at the peak, {numbers['planned_memory'] / GIB:.2f} planned",
        f"adapter   {folder / 'adapter'} ({numbers['adapter_bytes']:,} bytes, as planned)",
        f"record    {folder / 'run.json'}, {folder / 'metrics.jsonl'}, {folder / 'samples.jsonl'}, {folder / 'curves.png'}",
    ]
    if numbers["stopped_by"] == "max_hours":
        stopped = f"Stopped by --max-hours after {numbers['steps']} of {numbers['planned_steps']} steps"
        return "\n".join([*lines, f"{stopped}; the same line (without --restart) goes on."])
    if numbers["stopped_by"] == "answers":
        lines.append(
            f"Stopped by --stop-when-worse after {numbers['steps']} of {numbers['planned_steps']} steps: "
            f"{recipe.stop_when_worse} evaluations without better answers."
        )
    return "\n".join(
        [
            *lines,
            "A lower loss is not a better answer. Read some:",
            '  python infer.py "What are the warning signs of a heart attack?"',
            "  python ablate.py",
            "or serve it:",
            f"  {format_vllm_command(recipe, str(folder / 'adapter'), infer.DECODINGS['kit'])}",
        ]
    )


def draw_curves(lines: Sequence[Mapping[str, Any]], chosen_step: int, path: Path) -> None:
    """Draws loss and answers over the same steps, from the lines of metrics.jsonl, with the chosen step marked.

    Told apart by dashes and marks, so that it reads in black and white.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(8, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, answers = figure.subplots(2, sharex=True)
    evaluations = [line for line in lines if is_evaluation(line)]
    steps = [line["step"] for line in evaluations]
    training = [line for line in lines if not is_evaluation(line)]
    trained, train_losses = ([line[name] for line in training] for name in ("step", "train_loss"))
    losses.plot(trained, train_losses, "-", color="0.6", label="train")
    losses.plot(steps, [line["eval_loss"] for line in evaluations], "o--", color="black", label="eval")
    losses.set_ylabel("loss (nats a token)")
    shares = {
        "sound": ("o-", "black", "num_sound", "num_answers"),
        "ended by the stop token": ("s:", "0.35", "num_ended", "num_answers"),
        "points named": ("^--", "0.55", "num_named", "num_points"),
    }
    for name, (style, colour, part, whole) in shares.items():
        values = [line[part] / line[whole] if line[whole] else math.nan for line in evaluations]
        answers.plot(steps, values, style, color=colour, label=name, clip_on=False)
    answers.set(ylabel="share of probe answers", xlabel="step", ylim=(0, 1))
    answers.yaxis.set_major_formatter(PercentFormatter(1))
    answers.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (losses, answers):
        axes.axvline(chosen_step, color="0.8", linewidth=5, zorder=0, label=f"weights kept (step {chosen_step})")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    data.write_atomic(path, image.getvalue())


# --- Out of the kit ----------------------------------------------------------------------------------------------


def check_exports(config: TrainConfig, recipe: Recipe, folder: Path) -> None:
    """Checks before anything starts what the flags will need at the end: packages, network, a token, disk.

    Raises:
        UsageError: something is missing; the message says what.
    """
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise UsageError(
            f"--report-to {config.report_to}: it is not installed. pip install {config.report_to}, or leave it away."
        )
    if config.push_to_hub:
        from huggingface_hub import HfApi

        try:
            HfApi().whoami()
        except Exception as error:
            raise UsageError(
                f"--push-to-hub {config.push_to_hub} needs the network and a token with write rights ({type(error).__name__}). "
                "Log in once (hf auth login, or set HF_TOKEN), or leave the flag away."
            ) from None
    if config.merge:
        arch = recipe.values.architecture
        weights = 2 * count_weight_bytes(dataclasses.replace(recipe, load_in_4bit=False), 1)[0]
        # A model that was loaded in 4 bits is merged into its 16-bit original, which is fetched for it.
        needed = weights * (2 if recipe.load_in_4bit else 1)
        free = shutil.disk_usage(existing_parent(folder)).free
        if needed > free:
            raise UsageError(
                f"--merge needs {needed / GIB:.1f} GiB of disk for {arch.num_hidden_layers} layers in 16 bits, and "
                f"{free / GIB:.1f} GiB are free. Make room, or leave the flag away: the adapter works without it."
            )
        if recipe.load_in_4bit and not data.reaches_hub():
            raise UsageError("--merge fetches the 16-bit base model from the hub, which cannot be reached. Go online first.")


def make_modelfile(tokenizer: Any, decoding: infer.Decoding, system_prompt: str) -> str:
    """A Modelfile that makes an Ollama model of the folder it lies in, under our prompt and the decoding's values.

    The template is what the tokenizer's own chat template renders around a system prompt and a question, less the
    beginning-of-text token where the tokenizer puts one before any text: Ollama does so too.
    """
    messages = [{"role": "system", "content": "{{ .System }}"}, {"role": "user", "content": "{{ .Prompt }}"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string=data.TEMPLATE_DATE)
    prompt = prompt.removeprefix(tokenizer.decode(tokenizer("")["input_ids"]))
    stop = tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id)
    return "\n".join(
        [
            "# ollama create medical -f Modelfile && ollama run medical",
            "# Ollama's penalty counts the prompt too, and the kit's does not: answers differ from infer.py's.",
            "FROM .",
            f'TEMPLATE """{prompt}{{{{ .Response }}}}{stop}"""',
            'SYSTEM """' + system_prompt.replace('"""', '"') + '"""',
            f'PARAMETER stop "{stop}"',
            f"PARAMETER temperature {decoding.temperature:g}",
            f"PARAMETER top_p {decoding.top_p:g}",
            f"PARAMETER repeat_penalty {decoding.repetition_penalty:g}",
            "PARAMETER repeat_last_n -1",
            f"PARAMETER num_predict {decoding.max_new_tokens}",
            f"PARAMETER num_ctx {data.MAX_SEQ_LENGTH}",
            "",
        ]
    )


def merge_adapter(recipe: Recipe, folder: Path) -> Path:
    """Writes base and adapter of a finished run as one 16-bit model, with an Ollama Modelfile; returns its folder.

    Raises:
        UsageError: as `infer.load_base`.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    profile = recipe.values
    record = infer.read_adapter_record(folder / "adapter")
    model, tokenizer = infer.load_base(recipe.values, dtype=profile.dtype)
    merged, part = folder / "merged", folder / ".merged.part"
    shutil.rmtree(part, ignore_errors=True)
    with infer.quiet_libraries(), data.writing(merged, part):
        if recipe.pad == "added":
            infer.add_pad_token(model, tokenizer)
        model = add_lora(model, recipe)
        set_peft_model_state_dict(model, load_file(folder / "adapter" / "adapter_model.safetensors"))
        model.save_pretrained_merged(str(part), tokenizer, save_method="merged_16bit")
        modelfile = make_modelfile(tokenizer, infer.DECODINGS["kit"], record.system_prompt)
        (part / "Modelfile").write_text(modelfile, encoding="utf-8")
        put_folder(part, merged)
    return merged


def push_adapter(adapter: Path, repo_id: str) -> str:
    """Uploads the adapter folder, card and all, to a hub repository, which is made private if it is new; returns its URL.

    Raises:
        UsageError: the hub refused it, or could not be reached any more.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=adapter, commit_message="LoRA adapter and its card")
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise UsageError(
            f"{adapter} is whole, but could not be uploaded to {repo_id} ({data.first_line(error)}). "
            "Fix that, then run the same command again: it uploads without training."
        ) from None
    return str(url)


# --- Command -----------------------------------------------------------------------------------------------------


def name_rows(source: str) -> str:
    """A source of rows as a part of a folder's name: the file's name without its suffix, or the repository's."""
    return re.sub(r"[^\w.-]+", "-", Path(source.partition("@")[0]).stem, flags=re.ASCII)[:50] or "rows"


def default_name(recipe: Recipe) -> str:
    """Folder of a run that was given no --name."""
    rows = name_rows(recipe.rows) if recipe.rows else recipe.mix
    is_default = recipe.base_model == data.PROFILES[recipe.profile].base_model
    model = "" if is_default else re.sub(r"[^\w.-]", "-", Path(recipe.base_model).name)[:40] + "-"
    pad = "-pad-added" if recipe.pad == "added" else ""
    return f"{recipe.profile}-{model}{rows}-{recipe.target_modules}{pad}"


def find_start(folder: Path, recipe: Recipe, mix: data.Mix) -> tuple[dict[str, Any] | None, Checkpoint | None]:
    """`(record, checkpoint)`: of a run that is done its record; of one that is not, what it goes on from; else two Nones.

    Raises:
        UsageError: as `find_record` and `find_checkpoint`, or what a stopped or finished run left is not there any more.
    """
    record = find_record(folder, recipe, mix.fingerprint)
    if record is None:
        return None, None
    numbers = record["numbers"]
    if is_complete(record):
        if not (folder / "adapter" / "adapter_model.safetensors").is_file():
            raise UsageError(f"{folder} is recorded, but its adapter is gone. Put it back, or train anew with --restart.")
        return record, None
    checkpoint = find_checkpoint(folder)
    if numbers and checkpoint is None:
        raise UsageError(
            f"{folder} was stopped after step {numbers['steps']} of {numbers['planned_steps']}, and "
            f"checkpoint-{numbers['steps']}, from which it would go on, is gone. Put it back, or train anew with --restart."
        )
    if checkpoint:
        print(f"going on with {folder} after step {checkpoint.step} of {checkpoint.planned_steps}")
        before, now = (each["versions"] | {"processes": each.get("world_size")} for each in (record, make_record(recipe, mix)))
        changes = [f"{name} {before.get(name)} then, {value} now" for name, value in now.items() if before.get(name) != value]
        if changes and is_main_process():
            print(f"Its bytes may differ from those of a run without a stop: {'; '.join(changes)}.", file=sys.stderr)
    else:
        print(f"{folder} was cut before its first checkpoint, and begins anew")
    return None, checkpoint


def train_unless_done(
    config: TrainConfig, recipe: Recipe, mix: data.Mix, folder: Path, deadline: float | None
) -> dict[str, Any]:
    """The record of the run in `folder`, after training it, or going on with it, where it is not finished yet.

    Raises:
        infer.Interrupted: as `run`.
        UsageError: as `find_start` and `run`.
    """
    record, checkpoint = (None, None) if config.restart else find_start(folder, recipe, mix)
    if record:
        print(f"{folder} is already trained with these values (--restart trains it again).")
    else:
        if is_main_process() and not config.restart:
            clear_leftovers(folder)
        record = run(config, recipe, mix, folder, deadline, checkpoint)
    if is_main_process():
        note_latest(folder)
        clear_leftovers(folder)
        if is_complete(record):
            for done in list_checkpoints(folder):
                remove_folder(done)
    return record


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """While it lasts, no other process trains into the folder; of processes that train together the first holds it.

    Raises:
        UsageError: another process is at it.
    """
    if not is_main_process():
        yield
        return
    lock = folder.with_name(f".{folder.name}.lock")
    with claim(lock) as descriptor:
        if descriptor is None:
            holder = lock.read_text(encoding="utf-8").strip() or "another process"
            raise UsageError(f"{folder} is being trained by {holder}. Wait for it, or choose another --name.")
        yield


def main(config: TrainConfig) -> None:
    """Resolves the recipe, prints it and the plan, trains, exports, and prints what came out."""
    INTERRUPTION.listen()
    deadline = time.monotonic() + 3600 * config.max_hours - SAVING_SECONDS if config.max_hours else None
    if not is_main_process():
        sys.stdout = io.StringIO()  # rank 0 alone prints
    recipe = resolve_recipe(config)
    folder = config.output_dir / (config.name or default_name(recipe))
    if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        raise UsageError(f"--output-dir {config.output_dir}: {file} is a file, and a folder is wanted.")
    for name, value in dataclasses.asdict(recipe).items():
        if name in get_args(data.SourceName) and value is None:
            continue
        print(f"{name:<30}{data.escape_controls(str(value))}")
    print(f"{'run folder':<30}{folder}", flush=True)
    from_files = all(Path(source).is_file() for source in config.sources(recipe.values).values())
    is_local = recipe.base_model == data.SMALL_MODEL or Path(recipe.base_model).is_dir()
    needs_hub = not (is_local and from_files) or config.push_to_hub
    infer.prepare_environment(recipe.values, offline=not needs_hub or not data.reaches_hub())
    if config.dry_run:
        with infer.quiet_libraries():
            dtype = training_dtype(recipe)  # before the rows' tokenizer: Unsloth has to be imported first
            counts = count_rows(config, recipe)
            plan = make_plan(recipe, dtype, counts)
        if counts.audit:
            print(f"\n{data.format_audit(counts.audit)}\n")
        print(format_plan(plan, recipe, folder))
        if recipe.pad == "added":
            print(explain_added_pad(plan, recipe, dtype), file=sys.stderr)
        return
    check_exports(config, recipe, folder)
    if config.report_to == "tensorboard":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    mix = config.load(recipe.values)
    with held(folder):
        record = train_unless_done(config, recipe, mix, folder, deadline)
        if is_main_process():
            finish(config, recipe, folder, record)


def finish(config: TrainConfig, recipe: Recipe, folder: Path, record: Mapping[str, Any]) -> None:
    """Prints what came out, and exports it as the flags say.

    Raises:
        UsageError: as `merge_adapter` and `push_adapter`.
    """
    print(describe_result(folder, recipe, record["numbers"]))
    if (config.merge or config.push_to_hub) and not is_complete(record):
        print("Neither merged nor uploaded: that waits until the run has gone on to its end.")
        return
    if config.merge:
        print(f"merged    {merge_adapter(recipe, folder)}, with a Modelfile for Ollama")
    if config.push_to_hub:
        print(f"uploaded  {push_adapter(folder / 'adapter', config.push_to_hub)} (private, if it is new)")


if __name__ == "__main__":
    data.run_command(TrainConfig, main, __doc__, MEMORY_ADVICE)

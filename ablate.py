"""What made the difference: models trained and decoded in different ways, asked the same questions, in one table.

    python ablate.py                              the story replayed: its three runs, each change between them, the kit's own
    python ablate.py --dry-run                    the grid, the commands and the time; touches nothing
    python ablate.py --study training             one factor of the training at a time
    python ablate.py --study decoding             base and latest adapter under every decoding; or --adapter FOLDER
    python ablate.py --seeds 3                    every run three times
    python ablate.py --table                      page and picture again from the records; loads no model
    python ablate.py --study decoding --save-best the decoding with the best answers goes into the adapter

Writes runs/ablate/STUDY/ablation.md and ablation.png. What is done is not done again, and several processes or machines may
work on one folder: start the same line in each.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import html
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tyro

import data
import infer
import train
from data import ProfileName, UsageError
from infer import DECODINGS, Decoding

ABLATE_RUNS = infer.RUNS / "ablate"

StudyName = Literal["all", "training", "decoding"]

# --- Files and text ----------------------------------------------------------------------------------------------


def sync(descriptor: int) -> None:
    """Flushes a file to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        os.fsync(descriptor)


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


# --- The grid, as values -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingArm:
    """What a training run is made of, as far as the story changed it. The defaults are the kit's own recipe."""

    mix: data.MixName = "rebalanced"
    target_modules: train.TargetModules = "all-linear"
    epochs: int = 1
    pad: infer.PadName = "native"
    r: int = 16
    best: train.Metric = "eval_loss"
    """`answers` chooses the weights by the gate, as the kit does; the story had only the loss."""


WEEK3 = TrainingArm(mix="chatdoctor", target_modules="attention", pad="added")
WEEK4 = TrainingArm(mix="week4", target_modules="attention", epochs=2)
FIXED = TrainingArm(mix="rebalanced", target_modules="all-linear", epochs=2)
# With this rank, attention alone has as many LoRA parameters as all linear layers at 16 (within 1%, in both base models).
WIDE_R = 42

# Every training run that a study may ask for; a new one is a line. `week4-rebalanced` is week4 with that one change.
TRAINING_ARMS: dict[str, TrainingArm] = {
    "week3": WEEK3,
    "week3-native-pad": dataclasses.replace(WEEK3, pad="native"),
    "week3-week4-mix": dataclasses.replace(WEEK3, mix="week4"),
    "week3-2-epochs": dataclasses.replace(WEEK3, epochs=2),
    "week4": WEEK4,
    "week4-rebalanced": dataclasses.replace(WEEK4, mix="rebalanced"),
    "week4-all-linear": dataclasses.replace(WEEK4, target_modules="all-linear"),
    "week4-wide-attention": dataclasses.replace(WEEK4, r=WIDE_R),
    "fixed": FIXED,
    "kit": TrainingArm(best="answers"),
    # Single factors of the kit's recipe.
    "kit-by-loss": TrainingArm(),
    "kit-chatdoctor": TrainingArm(mix="chatdoctor"),
    "kit-week4-mix": TrainingArm(mix="week4"),
    "kit-attention": TrainingArm(target_modules="attention"),
    "kit-wide-attention": TrainingArm(target_modules="attention", r=WIDE_R),
    "kit-added-pad": TrainingArm(pad="added"),
}

_COLLAPSE, _FIX = DECODINGS["story-collapse"], DECODINGS["story-fix"]

# Every decoding that a study may ask for: the presets, and single changes of them.
DECODING_ARMS: dict[str, Decoding] = {
    **DECODINGS,
    "collapse-no-ban": dataclasses.replace(_COLLAPSE, no_repeat_ngram_size=0, count_prompt=False),
    "collapse-penalty": dataclasses.replace(_COLLAPSE, repetition_penalty=1.3),
    "collapse-stop": dataclasses.replace(_COLLAPSE, stop="end-of-turn"),
    "collapse-cap-128": dataclasses.replace(_COLLAPSE, max_new_tokens=128),
    "fix-answer-only": dataclasses.replace(_FIX, count_prompt=False),
    "fix-cap-128": dataclasses.replace(_FIX, max_new_tokens=128),
    "plain-cap-128": Decoding(max_new_tokens=128),
    # Single factors of `plain`.
    "plain-cap-512": Decoding(max_new_tokens=512),
    "plain-no-stop": Decoding(stop="never"),
    "ngram-6": Decoding(no_repeat_ngram_size=6, count_prompt=True),
    "ngram-8": Decoding(no_repeat_ngram_size=8, count_prompt=True),
    "penalty-1.1-prompt": Decoding(repetition_penalty=1.1, count_prompt=True),
}

_COMMON = ("story-collapse", "story-fix", "kit")
# What differs from another only in cap or stop is cut from the same run and costs nothing.
_STORY = (
    *("plain", "week3", *_COMMON),
    *("collapse-no-ban", "collapse-penalty", "collapse-stop", "collapse-cap-128"),
    *("fix-answer-only", "fix-cap-128", "plain-cap-128"),
)

# Of each study, every model and the decodings that it is asked under. `base` is the base model, `adapter` the given one,
# any other name an arm of `TRAINING_ARMS`.
STUDIES: dict[StudyName, dict[str, tuple[str, ...]]] = {
    "all": {
        "base": _STORY,
        "week3": _STORY,
        "week3-native-pad": _COMMON,
        "week3-week4-mix": _COMMON,
        "week3-2-epochs": _COMMON,
        "week4": _STORY,
        "week4-rebalanced": _COMMON,
        "week4-all-linear": _COMMON,
        "week4-wide-attention": _COMMON,
        "fixed": _STORY,
        "kit": _COMMON,
    },
    "training": dict.fromkeys(
        (
            *("base", "kit-by-loss", "kit-chatdoctor", "kit-week4-mix", "kit-attention", "kit-wide-attention"),
            *("kit-added-pad", "fixed"),
        ),
        ("plain", *_COMMON),
    ),
    "decoding": dict.fromkeys(("base", "adapter"), tuple(DECODING_ARMS)),
}

# The probes in the order in which an ablation takes them: the story's five, then five whose prompts are as long under both
# tokenizers' templates, so that they share forward passes, then all others.
FIRST_PROBES = (
    *("type-2-diabetes", "hypertension", "iron-deficiency", "malaria", "heart-attack"),
    *("migraine", "asthma", "stroke", "meningitis", "cystitis"),
)

# Every cell asks its first question again, in another batch, up to so many tokens.
AGAIN_TOKENS = 64


MAX_SEEDS = 100
MAX_WORKERS = 64


@dataclass(frozen=True)
class AblateConfig(data.RowsFlags):
    """Flags of ablate.py."""

    study: StudyName = "all"
    """`all`: the story; `training`: single factors of the kit's recipe; `decoding`: every decoding on base and one adapter."""
    name: str | None = None
    """Folder of the study below runs/ablate. Unset: the study's name, and that of --rows."""
    adapter: str | None = None
    """Adapter folder or hub id, of the study `decoding`. Unset: the adapter of the run that was finished last."""
    seeds: int = 1
    """How often every run is trained, and sampled answers drawn, each time with another seed."""
    num_rows: int | None = None
    """Training rows of each run. Unset: the profile's."""
    num_probes: int | None = None
    """How many probe questions to ask; the story's five come first. Unset: the profile's."""
    workers: int | None = None
    """Models that are trained or asked at a time, on one GPU each, or sharing the cores. Unset: the profile's."""
    profile: data.ProfileChoice = "auto"
    """Set of values: `t4` for a GPU, `cpu`, or `auto`."""
    base_model: str | None = None
    """Hub id or folder of another chat model of the Llama architecture. Unset: the profile's."""
    dry_run: bool = False
    """Print the grid, the commands and the expected time, and stop; nothing is written."""
    table: bool = False
    """Make page and picture again from the records, and run nothing."""
    save_best: bool = False
    """When all is done, write the decoding with the best answers into the adapter that gave them."""

    def __post_init__(self) -> None:
        problems = []
        if self.name is not None and not infer.RUN_NAME.fullmatch(self.name):
            problems.append(f"--name {self.name!r}: expected {infer.RUN_NAME_RULE}")
        for flag, most in {"seeds": MAX_SEEDS, "num_rows": None, "num_probes": None, "workers": MAX_WORKERS}.items():
            value = getattr(self, flag)
            if value is not None and (value < 1 or (most and value > most)):
                problems.append(f"--{flag.replace('_', '-')} {value}: 1 {f'to {most}' if most else 'or more'} is wanted.")
        probes = len(infer.read_probes())
        if self.num_probes is not None and self.num_probes > probes:
            problems.append(f"--num-probes {self.num_probes}: 1 to {probes}, the probes of samples/probes.jsonl, is wanted.")
        if self.adapter and self.study != "decoding":
            problems.append(f"--adapter {self.adapter} is for --study decoding; the study {self.study} trains its own.")
        if self.study == "decoding" and (self.rows is not None or self.system_prompt is not None):
            problems.append("--rows and --system-prompt are for studies that train; --study decoding uses an adapter.")
        if self.num_rows and self.study == "decoding":
            problems.append("--num-rows is for studies that train; --study decoding asks an adapter that is there.")
        if self.save_best and self.dry_run:
            problems.append("--save-best writes into an adapter, and --dry-run writes nothing. Give one of the two.")
        if self.table and self.dry_run:
            problems.append("--table writes from the records, and --dry-run writes nothing. Give one of the two.")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def rows_flags(self) -> dict[str, Any]:
        """What was given of `data.RowsFlags`, by the name of its field."""
        names = [each.name for each in dataclasses.fields(data.RowsFlags)]
        defaults = data.RowsFlags()
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(defaults, name)}

    @property
    def folder(self) -> Path:
        """The study's folder."""
        default = f"{self.study}-{train.name_rows(self.rows)}" if self.rows else self.study
        return ABLATE_RUNS / (self.name or default)


@dataclass(frozen=True)
class Model:
    """A model to be asked: the base model, a given adapter, or one that is trained for it."""

    arm: str
    """`base`, `adapter`, or a name in `TRAINING_ARMS`."""
    seed: int
    """0 for the first: added to train.py's own seed, and the seed of sampled answers."""
    decodings: tuple[str, ...]
    flags: tuple[str, ...] | None = None
    """Of train.py, without those that name the folder; None where nothing is trained."""
    adapter: Path | None = None
    """Where it lies, or will lie once it is trained; None for the base model."""
    adapter_sha256: str | None = None
    """Of an adapter that was given."""

    @property
    def id(self) -> str:
        """Name of its run folder and first part of its cells' names."""
        return self.arm + (f"-seed{self.seed}" if self.seed else "")

    def decoding(self, name: str) -> Decoding:
        """The decoding of that name, with this model's seed where it samples."""
        decoding = DECODING_ARMS[name]
        return dataclasses.replace(decoding, sampling_seed=self.seed) if decoding.temperature else decoding


@dataclass(frozen=True)
class Grid:
    """A study resolved: every value that its cells depend on."""

    folder: Path
    profile: ProfileName
    base_model: str
    models: tuple[Model, ...]
    probes: tuple[infer.Probe, ...]
    workers: int
    system_prompt: str = data.SYSTEM_PROMPT
    """Every model is asked under it."""
    rows: str | None = None
    """The user's own rows, in place of a mix."""
    local_rank: int = 0
    """Of this process among those that a launcher such as torchrun started on this machine."""
    local_world_size: int = 1

    @property
    def values(self) -> data.Profile:
        """The profile's values, with the study's base model."""
        return data.load_profile(self.profile, self.base_model)

    @property
    def num_together(self) -> int:
        """Workers on this machine, of all processes that a launcher started."""
        return self.local_world_size * self.workers

    @property
    def questions(self) -> list[str]:
        """What every model is asked."""
        return [probe.question for probe in self.probes]

    def settings(self, model: Model, decoding: str) -> dict[str, Any]:
        """All that the cell's answers, and what is counted in them, depend on, as it stands in result.json."""
        return {
            "arm": model.arm,
            "seed": model.seed,
            "decoding": decoding,
            "fields": dataclasses.asdict(model.decoding(decoding)),
            "profile": self.profile,
            "base_model": self.base_model,
            "training": self.training_settings(model),
            "adapter_sha256": model.adapter_sha256,
            "system_prompt": self.system_prompt,
            "probes": digest_json([dataclasses.asdict(probe) for probe in self.probes]),
            "judge": digest_json({name: check.threshold for name, check in infer.CHECKS.items()}),
        }

    def training_settings(self, model: Model) -> dict[str, Any] | None:
        """The flags of the model's training, and what its rows are: hub ids, or digests of files."""
        if model.flags is None:
            return None
        rows = {
            name: hashlib.sha256(Path(source).read_bytes()).hexdigest() if Path(source).is_file() else source
            for name, source in (
                {"rows": self.rows}
                if self.rows
                else {n: getattr(self.values, n) for n in ("conversational", "encyclopedic")}
            ).items()
        }
        return {"flags": list(model.flags), "rows": rows}

    def train_command(self, model: Model) -> list[str]:
        """The line that trains the model."""
        assert model.flags is not None
        return ["train.py", *model.flags, "--output-dir", str(self.folder / "runs"), "--name", model.id]


def digest_json(value: Any) -> str:
    """sha256 (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def order_probes() -> list[infer.Probe]:
    """All probes, those of `FIRST_PROBES` first."""
    probes = {probe.id: probe for probe in infer.read_probes()}
    return [probes[name] for name in FIRST_PROBES] + [probe for name, probe in probes.items() if name not in FIRST_PROBES]


def training_flags(
    arm: TrainingArm, profile: ProfileName, seed: int, num_rows: int | None, rows_flags: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """The flags of train.py for an arm; those of the story's arms leave the gate out, which the story did not have."""
    own = {f"--{name.replace('_', '-')}": value for name, value in (rows_flags or {}).items()}
    flags: dict[str, Any] = {
        "--profile": profile,
        **({} if "--rows" in own else {"--mix": arm.mix}),
        **own,
        "--target-modules": arm.target_modules,
        "--epochs": arm.epochs,
        "--pad": arm.pad,
        "--r": arm.r,
        "--lora-alpha": 2 * arm.r,
        "--seed": train.TrainConfig.seed + seed,
    }
    if num_rows:
        flags["--num-rows"] = num_rows
    if arm.best == "eval_loss":
        flags |= {"--metric-for-best-model": arm.best, "--num-probes": 0}
        if every := data.PROFILES[profile].ablation_eval_every:
            flags["--eval-every"] = every
    return tuple(str(part) for item in flags.items() for part in item)


def make_grid(config: AblateConfig) -> Grid:
    """The study that the flags name.

    Raises:
        UsageError: as `data.resolve_profile`, and of the study `decoding` where its adapter is not there.
    """
    adapter = record = digest = None
    if config.study == "decoding":
        adapter = infer.find_adapter(config.adapter) if config.adapter else infer.latest_adapter()
        checked = infer.check_adapter(adapter, config.profile, config.base_model)
        record, digest, values = checked.record, checked.sha256, checked.profile
    else:
        values = data.resolve_profile(config.profile, config.base_model)
    system_prompt = config.system_prompt or (record.system_prompt if record else data.SYSTEM_PROMPT)
    if config.rows is not None:
        system_prompt = data.RowsConfig(**config.rows_flags).load(values).system_prompt
    models: list[Model] = []
    for arm, decodings in STUDIES[config.study].items():
        for seed in range(config.seeds):
            if arm in ("base", "adapter"):
                # Of these only the sampled answers differ from seed to seed.
                names = tuple(name for name in decodings if not seed or DECODING_ARMS[name].temperature)
                given = (None, adapter, digest) if arm == "adapter" else ()
                models.append(Model(arm, seed, names, *given))
            else:
                num_rows = config.num_rows or values.ablation_rows
                arm_flags = config.rows_flags | ({"base_model": config.base_model} if config.base_model else {})
                flags = training_flags(TRAINING_ARMS[arm], values.name, seed, num_rows, arm_flags)
                if any(flags == model.flags for model in models):
                    continue  # it differs only in the mix, which the user's own rows replace
                model = Model(arm, seed, decodings, flags)
                models.append(dataclasses.replace(model, adapter=config.folder / "runs" / model.id / "adapter"))
    return Grid(
        folder=config.folder,
        profile=values.name,
        base_model=values.base_model,
        models=tuple(model for model in models if model.decodings),
        probes=tuple(order_probes()[: config.num_probes or values.ablation_probes]),
        workers=config.workers or values.workers,
        system_prompt=system_prompt,
        rows=config.rows,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


# Mean tokens of prompt and answer, for a plan without the rows: 1,494 published ChatDoctor-iCliniq and 1,497 WikiDoc rows after
# cleaning, under Llama 3.2's tokenizer.
MEAN_ROW_TOKENS: dict[data.SourceName, int] = {"conversational": 264, "encyclopedic": 169}


# --- The time it will take ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """What a model is expected to take, of one worker."""

    training_seconds: float
    training_steps: int
    answer_seconds: float
    answer_tokens: int

    @property
    def seconds(self) -> float:
        """All together."""
        return self.training_seconds + self.answer_seconds


def make_requests(model: Model, decodings: Sequence[str], questions: Sequence[str]) -> list[infer.Request]:
    """The questions under each decoding, decoding by decoding."""
    return [infer.Request(question, model.decoding(name)) for name in decodings for question in questions]


def plan_training(grid: Grid, model: Model, counted: dict[Any, tuple[int, int]]) -> tuple[float, int]:
    """`(seconds, steps)` of the model's training; `counted` keeps rows and tokens of each mix.

    Raises:
        UsageError: a file of rows cannot be used.
    """
    if model.flags is None:
        return 0.0, 0
    config, profile, _ = train.resolve(tyro.cli(train.TrainConfig, args=model.flags))
    mix = (config.mix, config.num_rows, config.seed)
    if mix not in counted:
        if audit := train.count_rows(config, profile):
            counted[mix] = (audit["train_rows"], audit["train_tokens"])
        else:
            counts = {name: count or 0 for name, count in config.wanted.items()}
            tokens = sum(count * MEAN_ROW_TOKENS.get(name, 0) for name, count in counts.items())
            counted[mix] = (sum(counts.values()), tokens)
    rows, tokens = counted[mix]
    steps = config.count_steps(rows)
    values = grid.values
    evaluations = config.count_evaluations(steps)
    answers = evaluations * profile.gate_max_new_tokens * values.seconds_per_new_token
    seconds = (
        values.start_seconds
        + evaluations * values.evaluation_seconds
        + (answers if config.num_probes else 0)
        + steps * config.rows_per_step * tokens / rows / values.worker_tokens_per_second
    )
    return seconds, steps


def plan_answers(grid: Grid, model: Model, decodings: Sequence[str], lengths: Mapping[str, int]) -> tuple[float, int]:
    """`(seconds, tokens)` of asking the model, where prompts of one padded length share passes; `lengths` are theirs."""
    values = grid.values
    rows: dict[int, list[int]] = {}
    requests = make_requests(model, decodings, grid.questions)
    for places in infer.merge_requests(requests):
        cap = max(requests[place].decoding.max_new_tokens for place in places)
        rows.setdefault(infer.padded_width(lengths[requests[places[0]].question]), []).append(cap)
    seconds = values.start_seconds
    for caps in rows.values():
        for start in range(0, len(caps), infer.ROWS):
            seconds += max(caps[start : start + infer.ROWS]) * values.step_seconds
    again = values.step_seconds
    return seconds + AGAIN_TOKENS * again, infer.count_new_tokens(requests)


def measure_prompts(grid: Grid) -> dict[str, int]:
    """Tokens of each question's prompt; where the tokenizer cannot be had, its words, for an estimate."""
    try:
        tokenizer = data.load_tokenizer(grid.values)
    except UsageError:
        return {question: len(question.split()) for question in grid.questions}
    return {
        question: len(data.encode_prompt(tokenizer, question, system_prompt=grid.system_prompt)) for question in grid.questions
    }


def plan_times(grid: Grid, missing: Mapping[str, Sequence[str]]) -> dict[str, Times]:
    """The times of each model that has cells missing, by its id. Raises UsageError as `plan_training`."""
    lengths, times = measure_prompts(grid), {}
    counted: dict[Any, tuple[int, int]] = {}
    for model in grid.models:
        if names := missing.get(model.id):
            times[model.id] = Times(*plan_training(grid, model, counted), *plan_answers(grid, model, names, lengths))
    return times


def format_plan(grid: Grid, missing: Mapping[str, Sequence[str]], times: Mapping[str, Times]) -> str:
    """Grid, commands and times as plain text for a terminal."""
    width = max(len(model.id) for model in grid.models) + 2
    lines = [f"{'model':<{width}}{'train':>9}{'answer':>9}   decodings"]
    for model in grid.models:
        names = missing.get(model.id, ())
        left = times.get(model.id, Times(0, 0, 0, 0))
        done = len(model.decodings) - len(names)
        lines.append(
            f"{model.id:<{width}}{left.training_seconds / 60:>5.1f} min{left.answer_seconds / 60:>5.1f} min   "
            + (f"({done} done) " if done else "")
            + ", ".join(names)
        )
    lines.append("")
    lines += [f"python {shlex.join(grid.train_command(model))}" for model in grid.models if model.flags and model.id in times]
    cells = sum(len(model.decodings) for model in grid.models)
    lines += [
        "",
        f"{cells} cells of {len(grid.probes)} questions, {sum(map(len, missing.values()))} to be answered, in {grid.folder}",
        f"about {expected_seconds(times, grid.workers) / 60:.0f} min in all, with {grid.workers} at a time",
    ]
    return "\n".join(lines)


def expected_seconds(times: Mapping[str, Times], workers: int) -> float:
    """Until all are done: each worker takes the longest that is left (Graham 1969)."""
    ends = [0.0] * workers
    for seconds in sorted((each.seconds for each in times.values()), reverse=True):
        ends[ends.index(min(ends))] += seconds
    return max(ends)


# --- Records -----------------------------------------------------------------------------------------------------

Record = Mapping[str, Any]
"""One line of a generations.jsonl."""


def cell_folder(study: Path, model_id: str, decoding: str) -> Path:
    """Where the answers of a model under a decoding lie."""
    return study / "cells" / f"{model_id}.{decoding}"


# Of each record what is read of it, as types: a tuple allows any of them, a list has such items, a dict at least such keys.
_NUMBER = (int, float)
_TRAINING = {
    **dict.fromkeys(("eval_loss_before", "eval_loss", "training_seconds"), _NUMBER),
    "mean_token_accuracy": (*_NUMBER, type(None)),
    **dict.fromkeys(("steps", "adapter_bytes", "train_rows", "train_tokens"), int),
}
RECORD_SHAPES: dict[str, Any] = {
    "study.json": {"study": str, "command": str, "base_model": str, "questions": [str], "probes": [str], "models": [list]},
    "result.json": {
        "settings": {"arm": str, "seed": int, "decoding": str},
        "training": (type(None), _TRAINING),
        "again": {"asked": int, "same": int, "tokens": int},
        "stop_ids": [int],
        "made_by": {"machine": str, "dtype": str, "versions": dict, "commit": (str, type(None))},
    },
    "generations.jsonl": {
        **dict.fromkeys(("question", "text", "sha256", "verdict", "finish_reason"), str),
        "token_ids": [int],
        "answer_tokens": int,
        "num_overruled": int,
        "adapter": (str, type(None)),
        "findings": [{"name": str, "score": _NUMBER, "span": [int]}],
        "facts": {"named": [str], "missing": [str], "wrong": [str]},
    },
    "failed.json": {"settings": dict, "error": str},
}


def has_shape(value: Any, shape: Any) -> bool:
    """Whether a JSON value is what `RECORD_SHAPES` says."""
    if isinstance(shape, tuple):
        return any(has_shape(value, each) for each in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(each, shape[0]) for each in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(name in value and has_shape(value[name], each) for name, each in shape.items())
    return isinstance(value, shape) and not (shape is int and isinstance(value, bool))


def parse_record(text: str, kind: str, path: Path) -> Any:
    """The record of that kind in a JSON text.

    Raises:
        UsageError: it is broken, or no record of that kind.
    """
    try:
        record = json.loads(text)
        problem = f"no {kind} of this kit"
    except (ValueError, RecursionError) as error:
        record, problem = None, str(error)
    if not has_shape(record, RECORD_SHAPES[kind]):
        raise UsageError(f"{path} is broken ({problem}). Remove it; the same line (without --table) makes it again.")
    return record


def read_record(path: Path, kind: str) -> Any:
    """The record of that kind in a file, or None where it is not there. Raises UsageError as `parse_record`."""
    try:
        return parse_record(path.read_text(encoding="utf-8"), kind, path)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}). Remove it; the same line (without --table) makes it again."
        ) from None


def read_cell(folder: Path) -> tuple[dict[str, Any], tuple[Record, ...]] | None:
    """`(result, answers)` of a cell, or None where it is not there.

    Raises:
        UsageError: as `parse_record`, or answers are missing.
    """
    result = read_record(folder / "result.json", "result.json")
    if result is None:
        return None
    path = folder / "generations.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}). Remove {folder}; the same line makes it again.") from None
    if len(lines) < 2 or lines[-1]:
        raise UsageError(f"{path} is cut. Remove {folder}; the same line (without --table) makes it again.")
    answers = tuple(parse_record(line, "generations.jsonl", path) for line in lines[:-1])
    findings = (finding for answer in answers for finding in answer["findings"])
    if not all(finding["name"] in infer.CHECKS and len(finding["span"]) == 2 for finding in findings):
        raise UsageError(f"{path} holds findings that this kit does not know. Remove {folder}; the same line makes it again.")
    return result, answers


def failed_file(study: Path, model_id: str, decoding: str) -> Path:
    """Where it stands why a cell failed: beside the cell, so that older answers there stay."""
    return study / "cells" / f"{model_id}.{decoding}.failed.json"


def is_done(grid: Grid, model: Model, decoding: str) -> bool:
    """Whether the study holds this cell's answers, under these very settings; one that is broken is made again."""
    try:
        cell = read_cell(cell_folder(grid.folder, model.id, decoding))
    except UsageError:
        return False
    return cell is not None and cell[0]["settings"] == grid.settings(model, decoding) and len(cell[1]) == len(grid.questions)


def list_failures(grid: Grid, model: Model) -> set[tuple[str, int]]:
    """What is recorded of the model's failures: each file with the time that its file system wrote into it."""
    files = (failed_file(grid.folder, model.id, name) for name in model.decodings)
    return {(file.name, file.stat().st_mtime_ns) for file in files if file.is_file()}


def find_missing(grid: Grid) -> dict[str, list[str]]:
    """Of each model, by its id, the decodings whose cells are not done; models that are done are left out."""
    missing = {model.id: [name for name in model.decodings if not is_done(grid, model, name)] for model in grid.models}
    return {name: decodings for name, decodings in missing.items() if decodings}


def write_cell(study: Path, model_id: str, result: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> None:
    """Writes the cell's folder, whole or not at all, in place of an older one."""
    folder = cell_folder(study, model_id, result["settings"]["decoding"])
    part = folder.with_name(f".{folder.name}.part")
    with data.writing(folder, part):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        (part / "generations.jsonl").write_text(lines, encoding="utf-8")
        (part / "result.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        put_folder(part, folder)
        failed_file(study, model_id, result["settings"]["decoding"]).unlink(missing_ok=True)


# --- Doing what is missing ---------------------------------------------------------------------------------------


class Progress:
    """One bar for all that is missing, in planned seconds, with what every worker does beside it; on stderr."""

    def __init__(self, times: Mapping[str, Times]) -> None:
        from tqdm import tqdm

        self._lock = threading.Lock()
        self._done: dict[str, float] = {}
        self._says: dict[str, str] = {}
        watched = sys.stderr.isatty()
        self._bar = tqdm(
            total=sum(each.seconds for each in times.values()),
            bar_format="{percentage:3.0f}%|{bar:20}| {elapsed}, {remaining} left{postfix}",
            # The mean since the start: what is planned is known beforehand.
            smoothing=0,
            dynamic_ncols=True,
            mininterval=0.5 if watched else 30,
            disable=not train.is_main_process(),
        )

    def show(self, model_id: str, seconds: float, says: str) -> None:
        """Of the model's planned seconds so many are done; `says` tells what is going on, and is empty at the end."""
        with self._lock:
            gained = seconds - self._done.get(model_id, 0.0)
            self._done[model_id] = seconds
            self._says[model_id] = says
            self._bar.set_postfix_str(" | ".join(f"{name}: {text}" for name, text in self._says.items() if text), refresh=False)
            self._bar.update(gained)

    def note(self, text: str) -> None:
        """Prints a line above the bar; of several processes of a launcher the first alone does."""
        with self._lock:
            if train.is_main_process():
                self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


# Set by torchrun and accelerate for their processes; a run inside an ablation trains on its own.
LAUNCHER_VARIABLES = frozenset(
    """RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE MASTER_ADDR
    MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_USE_AGENT_STORE
    TORCHELASTIC_ERROR_FILE""".split()
)


def make_environment(grid: Grid, number: int) -> dict[str, str]:
    """Variables of a process of worker `number`: its GPU or its share of the cores, and nothing of a launcher's."""
    own = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    # Under torchrun the processes of a machine share its GPUs; beside them the workers of each process.
    place = grid.local_rank * grid.workers + number
    if grid.profile == "t4" and grid.num_together > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        own["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place] if visible else str(place)
    if grid.profile == "cpu" and grid.num_together > 1:
        own["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // grid.num_together))
    return own


def check_devices(grid: Grid) -> None:
    """Checks that every worker on this machine has a GPU of its own, where the profile wants one.

    Raises:
        UsageError: there are fewer.
    """
    if grid.profile != "t4":
        return
    import torch

    found = torch.cuda.device_count()
    if found < grid.num_together:
        raise UsageError(
            f"The profile t4 wants a GPU for each of {grid.num_together} workers on this machine, and torch sees {found}. "
            "Lower --workers or the launcher's processes, or say --profile cpu."
        )


class FailedRunError(Exception):
    """A process of a model ended with an error; the message holds the last lines that it wrote."""


def last_line(text: str) -> str:
    """The last line of a text, controls shown."""
    return data.escape_controls(text.strip().splitlines()[-1])


class Workshop:
    """Trains and asks what a study lacks, several models at a time, and records each cell.

    `missing` names the decodings of each model, as `find_missing`. Other processes may work on the same study.
    """

    def __init__(self, grid: Grid, missing: dict[str, list[str]], times: Mapping[str, Times]) -> None:
        self.grid, self.times = grid, times
        self.progress = Progress(times)
        self.todo = [model for model in grid.models if model.id in missing]
        if grid.num_together > 1:
            # The longest first, so that all end at about the same time.
            self.todo.sort(key=lambda model: times[model.id].seconds, reverse=True)
        # Those of an earlier start; what comes beside them is of this one, or of another process at the same study.
        self._old_failures = {model.id: list_failures(grid, model) for model in self.todo}
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen] = set()
        self._own: set[str] = set()
        self._stopped = False

    def run(self) -> None:
        """Returns when every cell is recorded, here or by another process.

        A signal ends the processes that were started; training saves its step first, unless a second one comes.

        Raises:
            infer.Interrupted: a signal came.
        """
        with ThreadPoolExecutor(self.grid.workers) as pool:
            workers = [pool.submit(self._work, number) for number in range(self.grid.workers)]
            try:
                for worker in workers:
                    worker.result()
            except infer.Interrupted as interrupted:
                self._stop(signal.SIGTERM)
                self.progress.note("The processes are ended, and save. Ctrl-C again stops at once.")
                try:
                    wait(workers)
                except infer.Interrupted:
                    self._stop(signal.SIGKILL)
                said = f"Interrupted. What is recorded in {self.grid.folder} stays; the same line goes on."
                raise infer.Interrupted(interrupted.number, said) from None
            except BaseException:
                self._stop(signal.SIGKILL)
                raise
            finally:
                self.progress.close()

    def _stop(self, number: int) -> None:
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.send_signal(number)

    def _work(self, number: int) -> None:
        waited = False
        while self.todo and not self._stopped:
            if self._try_each(number):
                continue
            held = [model.id for model in list(self.todo) if model.id not in self._own]
            if not held:
                return  # the other workers of this process are at what is left
            if not waited:
                self.progress.note(f"Waiting for other processes, which are at {', '.join(held)}.")
            waited = True
            time.sleep(1)

    def _try_each(self, number: int) -> bool:
        """Does the first model that nobody has claimed; False where there is none."""
        for model in list(self.todo):
            with claim(self.grid.folder / "claims" / model.id) as descriptor:
                if descriptor is None:
                    continue
                # What another process had claimed may be done by now.
                names = [name for name in model.decodings if not is_done(self.grid, model, name)]
                if names and model in self.todo and list_failures(self.grid, model) <= self._old_failures[model.id]:
                    clear_leftovers(self.grid.folder / "cells", f".{model.id}.*")
                    self._own.add(model.id)
                    self._do(model, names, number, descriptor)
                if self._stopped:
                    return False
                with self._lock, contextlib.suppress(ValueError):
                    self.todo.remove(model)
                self.progress.show(model.id, self.times[model.id].seconds, "")
                return True
        return False

    def _do(self, model: Model, names: Sequence[str], number: int, descriptor: int) -> None:
        """Trains the model where it is trained, asks it, and records its cells: the answers, or why there are none."""
        try:
            if model.flags is not None:
                self._train(model, number, descriptor)
            results = self._ask(model, names, number, descriptor)
            for result, answers in results:
                write_cell(self.grid.folder, model.id, result, answers)
        except Exception as error:
            # Whatever it was, it concerns this model alone.
            if self._stopped:
                return
            known = isinstance(error, FailedRunError | UsageError)
            said = redact(str(error) if known else "".join(traceback.format_exception(error)))
            self.progress.note(f"{model.id} failed, and the rest goes on: {last_line(said)}")
            for name in names:
                failed = {"settings": self.grid.settings(model, name), "error": said}
                file = failed_file(self.grid.folder, model.id, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                data.write_atomic(file, json.dumps(failed, indent=2, ensure_ascii=False) + "\n")

    def _start(self, command: Sequence[str], number: int, descriptor: int, **pipes: Any) -> subprocess.Popen:
        with self._lock:
            if self._stopped:
                raise FailedRunError("stopped")
            process = subprocess.Popen(
                [sys.executable, *command],
                env=make_environment(self.grid, number),
                pass_fds=[descriptor],
                # Ctrl-C reaches this process, which ends the others in its turn.
                start_new_session=True,
                **pipes,
            )
            self._processes.add(process)
        return process

    def _train(self, model: Model, number: int, descriptor: int) -> None:
        """Trains the model with train.py, whose words go to a log beside its run.

        Raises:
            FailedRunError: it ended with an error.
        """
        log = self.grid.folder / "runs" / f"{model.id}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = self.grid.train_command(model)
        self.progress.note(f"python {shlex.join(command)}")
        try:
            self._watch_training(model, command, number, descriptor, log)
        except FailedRunError as error:
            # A run of other rows, flags or version of the kit is kept aside.
            if train.OTHER_VALUES not in str(error):
                raise
            self._watch_training(model, [*command, "--restart"], number, descriptor, log)

    def _watch_training(self, model: Model, command: Sequence[str], number: int, descriptor: int, log: Path) -> None:
        """Runs the command and shows its steps. Raises FailedRunError where it ends with an error."""
        times, metrics = self.times[model.id], self.grid.folder / "runs" / model.id / "metrics.jsonl"
        earlier = metrics.stat().st_mtime_ns if metrics.is_file() else None
        with log.open("w", encoding="utf-8") as words:
            script = str(data.HERE / command[0])
            process = self._start([script, *command[1:]], number, descriptor, stdout=words, stderr=words)
            while process.poll() is None:
                time.sleep(0.5)
                steps = 0
                with contextlib.suppress(FileNotFoundError):
                    # Lines of an earlier start are no progress until this one has taken them over.
                    if metrics.stat().st_mtime_ns != earlier:
                        steps = metrics.read_bytes().count(b'"loss"')
                share = min(1.0, steps / times.training_steps) if times.training_steps else 0.0
                said = f"step {steps}/{times.training_steps}" if steps else "training begins"
                self.progress.show(model.id, share * times.training_seconds, said)
        self._finish(process, log.read_text(encoding="utf-8", errors="replace"))

    def _ask(
        self, model: Model, names: Sequence[str], number: int, descriptor: int
    ) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """`(result, answers)` of each decoding, by a process that loads the model and asks it all at once.

        Raises:
            FailedRunError: it ended with an error.
        """
        times, told, report = self.times[model.id], 0, None
        job = {
            "profile": self.grid.profile,
            "base_model": self.grid.base_model,
            "adapter": model.adapter and str(model.adapter),
            "system_prompt": self.grid.system_prompt,
            "questions": self.grid.questions,
            "decodings": {name: dataclasses.asdict(model.decoding(name)) for name in names},
        }
        log = self.grid.folder / "runs" / f"{model.id}.answers.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as words:
            program = f"import sys; sys.path.insert(0, {str(data.HERE)!r}); import ablate; ablate.answer_job()"
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": words, "text": True}
            process = self._start(["-c", program], number, descriptor, **pipes)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(job))
                process.stdin.close()
            started = time.monotonic()
            self.progress.show(model.id, times.training_seconds, "answers begin")
            for line in process.stdout:
                message = json.loads(line)
                report = message.get("report", report)
                told += message.get("tokens", 0)
                speed = told / (time.monotonic() - started)
                share = min(1.0, told / max(times.answer_tokens, 1))
                self.progress.show(
                    model.id,
                    times.training_seconds + share * times.answer_seconds,
                    f"{told:,}/{times.answer_tokens:,} tokens, {speed:.0f} a second",
                )
            process.wait()
        self._finish(process, log.read_text(encoding="utf-8", errors="replace"))
        if report is None:
            raise FailedRunError("The answering process ended without a report.")
        training = None
        if model.flags is not None and model.adapter:
            training = json.loads((model.adapter.parent / "run.json").read_text(encoding="utf-8"))
        return [
            (
                {
                    "settings": self.grid.settings(model, name),
                    "training": training and summarise_training(training),
                    "again": report["again"][name],
                    "stop_ids": report["stop_ids"][name],
                    "made_by": report["made_by"],
                    "planned_bytes": report.get("planned_bytes"),
                },
                report["answers"][name],
            )
            for name in names
        ]

    def _finish(self, process: subprocess.Popen, words: str) -> None:
        with self._lock:
            self._processes.discard(process)
        if process.returncode:
            how = f"ended with code {process.returncode}"
            if process.returncode < 0:
                how = f"was ended by {signal.Signals(-process.returncode).name}"
                how += ", maybe for want of memory" if process.returncode == -signal.SIGKILL else ""
            last = [line for line in words.replace("\r", "\n").splitlines() if line.strip()][-12:]
            raise FailedRunError("\n".join([f"The process {how}. Its last words:", *(last or ["(none)"])]))


def summarise_training(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's record the table tells: losses of the evaluation whose weights were kept, size, time, rows."""
    numbers = record["numbers"]
    before, chosen = numbers["before"], numbers["chosen"]
    return {
        "eval_loss_before": before["eval_loss"],
        "eval_loss": chosen["eval_loss"],
        "mean_token_accuracy": chosen.get("eval_mean_token_accuracy"),
        "chosen_step": chosen["step"],
        "data_fingerprint": record["recipe"]["data_fingerprint"],
    } | {
        name: numbers[name]
        for name in ("steps", "training_seconds", "adapter_bytes", "trainable_parameters", "train_rows", "train_tokens")
    }


def answer_job() -> None:
    """What the process does that asks a model: reads a job from stdin, writes progress and its report to stdout as JSON lines.

    In a process of its own the model's memory is given back, and what goes wrong there ends nothing else.
    """
    job = json.load(sys.stdin)
    # Whatever else is printed, by native code too, goes to stderr.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: Mapping[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    adapter = Path(job["adapter"]) if job["adapter"] else None
    values = data.load_profile(job["profile"], job["base_model"])
    infer.prepare_environment(values)
    checked = infer.check_adapter(adapter, values.name, values.base_model) if adapter else None
    loaded = infer.load_for_inference(values, checked, job["system_prompt"])
    decodings = {name: Decoding(**fields) for name, fields in job["decodings"].items()}
    requests = [infer.Request(question, decoding) for decoding in decodings.values() for question in job["questions"]]
    answers = infer.answer_requests(loaded, requests, lambda tokens: send({"tokens": tokens}))
    # The first question once more, under all decodings and without the other questions.
    caps = {name: min(AGAIN_TOKENS, decoding.max_new_tokens) for name, decoding in decodings.items()}
    again = [
        infer.Request(job["questions"][0], dataclasses.replace(decoding, max_new_tokens=caps[name]))
        for name, decoding in decodings.items()
    ]
    report: dict[str, Any] = {"answers": {}, "again": {}, "stop_ids": {}, "made_by": describe_machine(loaded)}
    size = len(job["questions"])
    for place, (name, second) in enumerate(zip(decodings, infer.answer_requests(loaded, again), strict=True)):
        own = answers[place * size : (place + 1) * size]
        report["answers"][name] = [judged.to_record() for judged in infer.judge_answers(loaded, own)]
        same = second.token_ids == own[0].token_ids[: caps[name]]
        report["again"][name] = {"asked": 1, "same": int(same), "tokens": caps[name]}
        report["stop_ids"][name] = infer.stop_ids(decodings[name], loaded.model, loaded.tokenizer)
    if adapter is None:
        report["planned_bytes"] = plan_pad_bytes()
    send({"report": report})


def plan_pad_bytes() -> dict[str, int]:
    """Exact bytes of an attention-only adapter of Llama 3.2 3B by its pad token and the embedding's dtype, off its shapes."""
    planned = {}
    for name, dtype in (("native", None), ("added, 16-bit embedding", "float16"), ("added, fp32 embedding", "float32")):
        planned[name] = train.count_adapter(data.PROFILES["t4"].architecture, "attention", 16, dtype)[1]
    return planned


def describe_machine(loaded: infer.LoadedModel) -> dict[str, Any]:
    """Where and by what the answers were made: processor, threads, versions and the kit's commit."""
    import torch

    if loaded.model.device.type == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        machine = f"{found.group(1) if found else platform.machine()}, {torch.get_num_threads()} threads"
    versions = train.list_versions()
    return {"machine": machine, "dtype": str(loaded.model.dtype).removeprefix("torch."), "versions": versions} | {
        "commit": train.commit_id()
    }


# --- Statistics --------------------------------------------------------------------------------------------------

Z = 1.959964  # of a 95% interval


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927), within [0, 1]; (0, 1) where nothing was counted."""
    if not total:
        return 0.0, 1.0
    share, z2 = successes / total, Z * Z / total
    centre, half = share + z2 / 2, Z * math.sqrt(share * (1 - share) / total + z2 / total / 4)
    return max(0.0, (centre - half) / (1 + z2)), min(1.0, (centre + half) / (1 + z2))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p that wins and losses come from a fair coin; ties are left out (Dixon and Mood 1946)."""
    decided = wins + losses
    tail = sum(math.comb(decided, count) for count in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**decided)


# --- What the records say ----------------------------------------------------------------------------------------

LOOPS = frozenset({"loop", "repetition"})
DRIFTS = frozenset({"surprisal", "leak", "invented-medicine"})


def speaks_against(finding: Mapping[str, Any]) -> bool:
    """Whether a recorded finding is at or above its threshold."""
    return finding["score"] >= infer.CHECKS[finding["name"]].threshold


def counts_against(record: Record, names: frozenset[str]) -> bool:
    """Whether the answer has one of these findings."""
    return any(finding["name"] in names and speaks_against(finding) for finding in record["findings"])


def is_sound(record: Record) -> bool:
    """Whether the answer has no findings."""
    return record["verdict"] == "sound"


def is_unsound(record: Record) -> bool:
    """Whether the answer has a finding."""
    return not is_sound(record)


def has_ended(record: Record) -> bool:
    """Whether the stop token ended the answer."""
    return record["finish_reason"] == "stop"


def is_good(record: Record) -> bool:
    """Sound and ended: what an answer is counted by."""
    return is_sound(record) and has_ended(record)


def loops(record: Record) -> bool:
    """Whether the answer says the same again and again."""
    return counts_against(record, LOOPS)


def runs_on(record: Record) -> bool:
    """Whether a list in the answer does not end."""
    return counts_against(record, frozenset({"list"}))


def drifts(record: Record) -> bool:
    """Whether the answer surprises the base model, goes on as another speaker, or invents a medicine."""
    return counts_against(record, DRIFTS)


def list_length(record: Record) -> float:
    """Items of the longest list."""
    return infer.measure_list(record["text"])[0]


def num_points(record: Record) -> int:
    """How many points of the probe's list are named."""
    return len(record["facts"]["named"])


@dataclass(frozen=True)
class Row:
    """An arm in the table: a model under a decoding, all seeds together."""

    arm: str
    decoding: str
    cells: tuple[tuple[dict[str, Any], tuple[Record, ...]], ...]
    """`(result, answers)` of each seed; a failed one has no answers."""

    @cached_property
    def answers(self) -> dict[tuple[int, str], Record]:
        """Each answer by seed and question."""
        return {
            (result["settings"]["seed"], record["question"]): record for result, records in self.cells for record in records
        }

    @property
    def name(self) -> str:
        """Unique among the rows; also the anchor of its answers."""
        return f"{self.arm}.{self.decoding}"

    @property
    def errors(self) -> list[str]:
        """Of seeds that failed."""
        return [result["error"] for result, _ in self.cells if "error" in result]

    @property
    def trainings(self) -> list[dict[str, Any]]:
        """What `summarise_training` says, of each seed that was trained."""
        return [result["training"] for result, _ in self.cells if result.get("training")]

    def mean_training(self, name: str) -> float | None:
        """Mean of a number of the trainings over the seeds; None where nothing was trained, or none has it."""
        values = [training[name] for training in self.trainings if training[name] is not None]
        return sum(values) / len(values) if values else None

    def count(self, outcome: Callable[[Record], float]) -> float:
        """Sum of an outcome over the answers."""
        return sum(outcome(record) for record in self.answers.values())

    @property
    def stop_ids(self) -> list[int]:
        """What ends the row's answers."""
        return next(result["stop_ids"] for result, answers in self.cells if answers)

    @property
    def adapters(self) -> list[str]:
        """sha256 of the weights that answered, each once; none of the base model."""
        return [digest for digest in dict.fromkeys(record["adapter"] for record in self.answers.values()) if digest]

    @property
    def good_interval(self) -> tuple[float, float]:
        """95% interval of the share of sound and ended answers."""
        return wilson_interval(int(self.count(is_good)), len(self.answers))

    @property
    def rank(self) -> tuple[float, float, float]:
        """What rows are compared by, the largest being best: share of sound and ended answers, points, wrong claims."""
        size = max(len(self.answers), 1)
        wrong = self.count(lambda record: len(record["facts"]["wrong"]))
        return self.count(is_good) / size, self.count(num_points) / size, -wrong / size


@dataclass(frozen=True)
class Records:
    """A study as it was recorded: its rows, base model first, by name."""

    rows: dict[str, Row]
    study: dict[str, Any]
    """study.json: the command and the questions."""

    def row(self, arm: str, decoding: str) -> Row | None:
        """The row of an arm under a decoding, if it holds answers."""
        row = self.rows.get(f"{arm}.{decoding}")
        return row if row and row.answers else None

    def arms(self, *decodings: str) -> list[str]:
        """The arms that were asked under all these decodings."""
        arms = dict.fromkeys(row.arm for row in self.rows.values())
        return [arm for arm in arms if all(self.row(arm, decoding) for decoding in decodings)]

    def pair(self, one: tuple[str, str], other: tuple[str, str]) -> list[tuple[Record, Record]]:
        """The answers of two rows, `(arm, decoding)`, to the same question under the same seed; of the other, where it was not
        trained here, seed 0 stands for every seed."""
        rows = self.row(*one), self.row(*other)
        if not rows[0] or not rows[1]:
            return []
        found, trained = rows[1].answers, other[0] in TRAINING_ARMS
        pairs = (
            (record, found.get((seed, question)) or (None if trained else found.get((0, question))))
            for (seed, question), record in rows[0].answers.items()
        )
        return [(record, partner) for record, partner in pairs if partner]

    def pair_decodings(self, one: str, other: str) -> list[tuple[Record, Record]]:
        """The answers of every arm under two decodings."""
        return [pair for arm in self.arms(one, other) for pair in self.pair((arm, one), (arm, other))]

    def pair_arms(self, one: str, other: str, decodings: Sequence[str] | None = None) -> list[tuple[Record, Record]]:
        """The answers of two arms under these decodings, or under all that both were asked under; of those that are cut from
        one run only the first counts."""
        names = decodings or distinct_decodings(dict.fromkeys(row.decoding for row in self.rows.values()))
        return [pair for name in names for pair in self.pair((one, name), (other, name))]


def distinct_decodings(names: Iterable[str]) -> list[str]:
    """The decodings that are no other's but for cap and stop; of each such group the first."""
    asked = list(names)
    requests = [infer.Request("", DECODING_ARMS[name]) for name in asked]
    return [asked[places[0]] for places in infer.merge_requests(requests)]


def read_records(study: Path) -> Records:
    """The study's records.

    Raises:
        UsageError: it has none, or one cannot be read.
    """
    about = read_record(study / "study.json", "study.json")
    if about is None:
        raise UsageError(f"{study} holds no records to make a table from. Make some first: python ablate.py")
    try:
        models = [(model_id, arm, dict(decodings)) for model_id, arm, decodings in about["models"]]
        arms = {"base", "adapter", *TRAINING_ARMS}
        if about["study"] not in STUDIES or not about["questions"]:
            raise ValueError("no such study, or no questions")
        for model_id, arm, decodings in models:
            if not infer.RUN_NAME.fullmatch(model_id) or arm not in arms or not decodings.keys() <= DECODING_ARMS.keys():
                raise ValueError(f"{model_id}, {arm} or its decodings are not of this kit")
    except (ValueError, TypeError) as error:
        raise UsageError(f"{study / 'study.json'} is broken ({error}). Remove it; the same line makes it again.") from None
    cells: dict[tuple[str, str], list[tuple[dict[str, Any], tuple[Record, ...]]]] = {}
    for model_id, arm, decodings in models:
        for decoding, settings in decodings.items():
            cell = read_cell(cell_folder(study, model_id, decoding))
            # One that was made with other settings will be made again; till then it is not there.
            if cell is None or digest_json(cell[0]["settings"]) != settings:
                failed = read_record(failed_file(study, model_id, decoding), "failed.json")
                if failed and digest_json(failed["settings"]) == settings:
                    cells.setdefault((arm, decoding), []).append((failed, ()))
                continue
            cells.setdefault((arm, decoding), []).append(cell)
    if not cells:
        raise UsageError(f"{study} holds no finished cells to make a table from. Make some first: python ablate.py")
    rows = [Row(arm, decoding, tuple(own)) for (arm, decoding), own in cells.items()]
    return Records({row.name: row for row in rows}, about)


@dataclass(frozen=True)
class Comparison:
    """Pairs of answers compared by an outcome, question by question: in how many the first has more, fewer, or as much.

    Answers of several models, decodings or seeds to one question are no independent draws, so each question counts once, by
    the sum of its pairs.
    """

    larger: int
    smaller: int
    questions: int
    pairs: int
    mean_one: float
    mean_other: float

    @property
    def p(self) -> float:
        """Two-sided, of the sign test over questions."""
        return sign_test(self.larger, self.smaller)

    def shows(self, direction: Literal["more", "fewer"], level: float = 0.05) -> bool:
        """Whether the first has more (or fewer), beyond chance."""
        return self.p < level and (self.larger > self.smaller) == (direction == "more")

    def tell(self, one: str, other: str, what: str) -> str:
        """In words, with n, the interval of the share of the questions that differ, and p."""
        low, high = wilson_interval(self.larger, self.larger + self.smaller)
        return (
            f"{what}: {one} {self.mean_one:.2f}, {other} {self.mean_other:.2f} an answer; more in {self.larger}, fewer in "
            f"{self.smaller} of {self.questions} questions, {self.pairs} pairs (of the questions that differ {low:.0%} to "
            f"{high:.0%} have more), p {self.p:.2g}"
        )


def compare(pairs: Sequence[tuple[Record, Record]], outcome: Callable[[Record], float]) -> Comparison:
    """The pairs compared by an outcome."""
    values = [(one["question"], float(outcome(one)), float(outcome(other))) for one, other in pairs]
    differences: dict[str, float] = {}
    for question, one, other in values:
        differences[question] = differences.get(question, 0.0) + one - other
    size = max(len(values), 1)
    return Comparison(
        larger=sum(difference > 0 for difference in differences.values()),
        smaller=sum(difference < 0 for difference in differences.values()),
        questions=len(differences),
        pairs=len(values),
        mean_one=sum(one for _, one, _ in values) / size,
        mean_other=sum(other for _, _, other in values) / size,
    )


# --- Claims ------------------------------------------------------------------------------------------------------

Verdict = Literal["shown", "not shown", "the opposite", "not run here"]


@dataclass(frozen=True)
class Claim:
    """A claim of the story, and the rule by which the records decide on it."""

    id: str
    says: str
    rule: str
    """When it is shown, and when its opposite; otherwise it is not shown."""
    check: Callable[[Records], tuple[Verdict, str]]
    """Verdict and what was measured."""


NOT_RUN: tuple[Verdict, str] = ("not run here", "This study has no such cells.")


def decide(shown: bool, opposite: bool = False) -> Verdict:
    """The verdict on a claim that ran."""
    return "shown" if shown else "the opposite" if opposite else "not shown"


def check_loss(records: Records) -> tuple[Verdict, str]:
    """Whether week4's eval loss fell while its answers got worse than the base model's."""
    row, pairs = records.row("week4", "story-collapse"), records.pair_arms("week4", "base", ["story-collapse"])
    if not row or not pairs:
        return NOT_RUN
    before, after = row.mean_training("eval_loss_before"), row.mean_training("eval_loss")
    answers = compare(pairs, is_good)
    told = answers.tell("week4", "base", "sound and ended")
    return decide(
        after < before and answers.shows("fewer"), answers.shows("more")
    ), f"eval loss {before:.3f} to {after:.3f}; {told}"


def check_share(
    arm: str, decoding: str, wanted: Callable[[Record], bool], what: str
) -> Callable[[Records], tuple[Verdict, str]]:
    """A check of whether most answers of one row have an outcome, or most have it not, beyond chance."""

    def check(records: Records) -> tuple[Verdict, str]:
        row = records.row(arm, decoding)
        if not row:
            return NOT_RUN
        count, size = int(row.count(wanted)), len(row.answers)
        low, high = wilson_interval(count, size)
        return decide(low > 0.5, high < 0.5), f"{what}: {count} of {size} ({low:.0%} to {high:.0%}) of {arm} under {decoding}"

    return check


def check_decodings(
    one: str, other: str, outcome: Callable[[Record], float], direction: Literal["more", "fewer"], what: str
) -> Callable[[Records], tuple[Verdict, str]]:
    """A check of whether a decoding has more (or fewer) of an outcome than another, over all models asked under both."""

    def check(records: Records) -> tuple[Verdict, str]:
        pairs = records.pair_decodings(one, other)
        if not pairs:
            return NOT_RUN
        compared = compare(pairs, outcome)
        opposite = "fewer" if direction == "more" else "more"
        return decide(compared.shows(direction), compared.shows(opposite)), compared.tell(one, other, what)

    return check


def check_arms(
    choices: Mapping[str, Sequence[str]], outcome: Callable[[Record], float], direction: Literal["more", "fewer"], what: str
) -> Callable[[Records], tuple[Verdict, str]]:
    """A check of whether an arm has more (or fewer) of an outcome than each of some others, over their common decodings.

    `choices` names the others of each arm; the first arm that was run with all of them is taken.
    """

    def check(records: Records) -> tuple[Verdict, str]:
        for one, others in choices.items():
            compared = {other: compare(pairs, outcome) for other in others if (pairs := records.pair_arms(one, other))}
            if len(compared) == len(others):
                opposite = "fewer" if direction == "more" else "more"
                verdict = decide(
                    all(each.shows(direction) for each in compared.values()),
                    all(each.shows(opposite) for each in compared.values()),
                )
                return verdict, "; ".join(each.tell(one, other, what) for other, each in compared.items())
        return NOT_RUN

    return check


def check_lists(records: Records) -> tuple[Verdict, str]:
    """Whether week4 lists more and ends less than the base model; told beside it, what its mix and its epochs do alone."""
    pairs = records.pair_arms("week4", "base")
    if not pairs:
        return NOT_RUN
    longer, ended = compare(pairs, list_length), compare(pairs, has_ended)
    told = [longer.tell("week4", "base", "items of the longest list"), ended.tell("week4", "base", "ended")]
    told += [
        compare(alone, outcome).tell(arm, "week3", what)
        for arm in ("week3-week4-mix", "week3-2-epochs")
        if (alone := records.pair_arms(arm, "week3"))
        for outcome, what in ((list_length, "items of the longest list"), (has_ended, "ended"))
    ]
    verdict = decide(longer.shows("more") and ended.shows("fewer"), longer.shows("fewer") and ended.shows("more"))
    return verdict, "; ".join(told)


def check_stop(records: Records) -> tuple[Verdict, str]:
    """Whether the explicit stop token mends answers; nothing to show where the generation config names no other."""
    verdict, told = check_decodings("collapse-stop", "story-collapse", is_good, "more", "sound and ended")(records)
    row, other = records.row("base", "collapse-stop"), records.row("base", "story-collapse")
    if row and other:
        explicit, implicit = row.stop_ids, other.stop_ids
        if explicit == implicit:
            verdict, told = "not run here", f"This base model's generation config names the same stop token, {explicit}"
        else:
            told += f"; the stop ids are {explicit} explicit and {implicit} out of the generation config"
    if pairs := records.pair_decodings("plain", "plain-no-stop"):
        told += "; " + compare(pairs, is_good).tell("plain", "without any stop token", "sound and ended")
    return verdict, told


def check_penalty(records: Records) -> tuple[Verdict, str]:
    """Whether the penalty of 1.3 has fewer loops than no penalty, and does no harm: no fewer sound and ended answers, no more
    that drift."""
    pairs = records.pair_decodings("story-fix", "plain")
    if not pairs:
        return NOT_RUN
    looping, good, drifting = (compare(pairs, outcome) for outcome in (loops, is_good, drifts))
    harms = good.shows("fewer") or drifting.shows("more")
    verdict = decide(looping.shows("fewer") and not harms, looping.shows("more") or (harms and not looping.shows("fewer")))
    told = [
        looping.tell("penalty 1.3", "plain", "loops"),
        good.tell("penalty 1.3", "plain", "sound and ended"),
        drifting.tell("penalty 1.3", "plain", "drift"),
    ]
    if own := records.pair_decodings("fix-answer-only", "story-fix"):
        told.append(compare(own, is_good).tell("on the answer only", "over the prompt too", "sound and ended"))
    return verdict, "; ".join(told)


def check_cap(records: Records) -> tuple[Verdict, str]:
    """Whether fewer answers collapse under a smaller cap; and whether it mends them, or hides how they go on."""
    capped = (
        *(("collapse-cap-128", "story-collapse"), ("fix-cap-128", "story-fix"), ("plain-cap-128", "plain")),
        ("plain", "plain-cap-512"),
    )
    pairs = [pair for one, other in capped for pair in records.pair_decodings(one, other)]
    if not pairs:
        return NOT_RUN
    collapsed = compare(pairs, is_unsound)
    mended = sum(is_good(short) and not is_good(long) for short, long in pairs)
    hidden = sum(is_sound(short) and not has_ended(short) and is_unsound(long) for short, long in pairs)
    told = collapsed.tell("smaller cap", "larger cap", "unsound")
    told += (
        f"; the smaller cap made {mended} answers sound and ended, and hides of {hidden} that they collapse, by cutting them"
    )
    return decide(collapsed.shows("fewer"), collapsed.shows("more")), told


def check_pad(records: Records) -> tuple[Verdict, str]:
    """Whether an added pad token multiplies the adapter's bytes: planned for the 3B model, and those of the runs here."""
    base = next((row for row in records.rows.values() if row.arm == "base" and row.answers), None)
    planned = base and next(result.get("planned_bytes") for result, answers in base.cells if answers)
    if not planned:
        return NOT_RUN
    ratio = planned["added, 16-bit embedding"] / planned["native"]
    told = "Llama 3.2 3B, attention, planned: " + ", ".join(f"{name} {size:,} bytes" for name, size in planned.items())
    for one, other in (("week3", "week3-native-pad"), ("kit-added-pad", "kit-by-loss")):
        rows = records.row(one, "kit"), records.row(other, "kit")
        if rows[0] and rows[1]:
            sizes = [int(row.mean_training("adapter_bytes") or 0) for row in rows if row]
            told += f"; run here: {one} {sizes[0]:,} bytes, {other} {sizes[1]:,} ({sizes[0] / sizes[1]:.1f} times)"
    return decide(ratio >= 10, ratio <= 1), f"{told}; {ratio:.0f} times"


def check_bytes(records: Records) -> tuple[Verdict, str]:
    """Whether greedy answers that were asked again have the same ids."""
    greedy = [row for row in records.rows.values() if not DECODING_ARMS[row.decoding].temperature]
    distinct = distinct_decodings(dict.fromkeys(row.decoding for row in greedy))
    again = [result["again"] for row in greedy if row.decoding in distinct for result, answers in row.cells if answers]
    if not again:
        return NOT_RUN
    asked, same = (sum(each[name] for each in again) for name in ("asked", "same"))
    low, high = wilson_interval(same, asked)
    told = f"{same} of {asked} greedy answers asked again in other company have the same ids ({low:.0%} to {high:.0%}), up to "
    return decide(same == asked, same < asked), told + f"{max(each['tokens'] for each in again)} tokens"


def check_same_weights(records: Records) -> tuple[Verdict, str]:
    """Whether the same trained weights give more sound and ended answers under story-fix than under story-collapse."""
    trained = [arm for arm in records.arms("story-fix", "story-collapse") if arm != "base"]
    pairs = [pair for arm in trained for pair in records.pair((arm, "story-fix"), (arm, "story-collapse"))]
    if not pairs:
        return NOT_RUN
    compared = compare(pairs, is_good)
    told = compared.tell("story-fix", "story-collapse", "sound and ended")
    if kit := [pair for arm in trained for pair in records.pair((arm, "kit"), (arm, "story-fix"))]:
        told += "; " + compare(kit, is_good).tell("kit", "story-fix", "sound and ended")
    return decide(compared.shows("more"), compared.shows("fewer")), f"{len(trained)} trained models; {told}"


def check_loss_is_blind(records: Records) -> tuple[Verdict, str]:
    """Whether one eval loss goes with different answers: of the same weights under two decodings, not cut from one run."""
    decodings = distinct_decodings(dict.fromkeys(row.decoding for row in records.rows.values() if row.arm != "base"))
    found = []
    for one, other in itertools.combinations(decodings, 2):
        arms = [arm for arm in records.arms(one, other) if arm != "base"]
        if pairs := [pair for arm in arms for pair in records.pair((arm, one), (arm, other))]:
            found.append((compare(pairs, is_good), one, other, len(arms)))
    if not found:
        return NOT_RUN
    best, one, other, size = min(found, key=lambda each: each[0].p)
    told = best.tell(one, other, "the same weights, so the same eval loss, sound and ended")
    lossy = [row for row in records.rows.values() if row.decoding == "kit" and row.trainings and row.answers]
    if len(lossy) > 1:
        by_loss = sorted(lossy, key=lambda row: row.mean_training("eval_loss"))
        told += "; under kit the arm of the lowest loss has {} of {} sound and ended, that of the highest {} of {}".format(
            *(number for row in (by_loss[0], by_loss[-1]) for number in (int(row.count(is_good)), len(row.answers)))
        )
    # Bonferroni: the pair was looked for.
    return decide(best.p * len(found) < 0.05), f"{size} trained models; {told}, the most telling of {len(found)} pairs"


_PAIRED = "beyond chance by a sign test over the questions (p < 0.05, two-sided); opposite: beyond chance the other way"

CLAIMS = (
    Claim(
        "C1",
        "Eval loss fell and the model got worse.",
        "week4's eval loss fell, and under story-collapse fewer of its answers are sound and ended than of the base model's, "
        f"{_PAIRED}",
        check_loss,
    ),
    Claim(
        "C2",
        "Under greedy decoding with the n-gram ban the answers collapsed.",
        "the 95% interval of the share of unsound answers of week4 under story-collapse is above one half; opposite: below",
        check_share("week4", "story-collapse", is_unsound, "unsound"),
    ),
    Claim(
        "C3",
        "no_repeat_ngram_size=3 drives drift.",
        f"with the ban more answers drift than without, all else as in story-collapse, {_PAIRED}",
        check_decodings("story-collapse", "collapse-no-ban", drifts, "more", "drift"),
    ),
    Claim(
        "C4",
        "Two epochs on 8,000 : 4,000 rows taught the model to start lists and not to stop.",
        "week4's longest lists have more items than the base model's, and fewer of its answers end, over all decodings, both "
        f"{_PAIRED}",
        check_lists,
    ),
    Claim(
        "C5",
        "About 85 : 15 rows give bounded, flowing answers: the mix decides.",
        "with the rebalanced mix more answers are sound and ended than with week4's, all else the same, over all decodings, "
        f"{_PAIRED}",
        check_arms({"week4-rebalanced": ["week4"], "kit-by-loss": ["kit-week4-mix"]}, is_good, "more", "sound and ended"),
    ),
    Claim(
        "C6",
        "LoRA on the feed-forward modules too gives better facts.",
        "all-linear names more points than attention of the same rank, and than attention of as many parameters, both "
        f"{_PAIRED}",
        check_arms(
            {
                "week4-all-linear": ["week4", "week4-wide-attention"],
                "kit-by-loss": ["kit-attention", "kit-wide-attention"],
            },
            num_points,
            "more",
            "points",
        ),
    ),
    Claim(
        "C7",
        "Removing no_repeat_ngram_size ends the forced drift.",
        f"without the ban more answers are sound and ended than with it, all else as in story-collapse, {_PAIRED}",
        check_decodings("collapse-no-ban", "story-collapse", is_good, "more", "sound and ended"),
    ),
    Claim(
        "C8",
        "The explicit end-of-turn token gives a stop that the model honours.",
        "with it more answers are sound and ended than with the generation config's, where that is another, all else as in "
        f"story-collapse, {_PAIRED}",
        check_stop,
    ),
    Claim(
        "C9",
        "repetition_penalty=1.3 discourages loops without harm.",
        "story-fix has fewer loops than plain, and neither fewer sound and ended answers nor more that drift, each beyond "
        "chance by a sign test over the questions (p < 0.05, two-sided); opposite: more loops, or harm without fewer loops",
        check_penalty,
    ),
    Claim(
        "C10",
        "max_new_tokens=256 prevents runaway answers.",
        f"of the same answers fewer are unsound under a smaller cap than under a larger one, {_PAIRED}",
        check_cap,
    ),
    Claim(
        "C11",
        "An added pad token makes the adapter huge.",
        "the planned 3B adapter is at least 10 times as large with it, embedding in 16 bits; opposite: no larger",
        check_pad,
    ),
    Claim(
        "C12",
        "After the fixes the degeneration is gone, and answers end cleanly.",
        "the 95% interval of the share of sound and ended answers of fixed under story-fix is above one half; opposite: below",
        check_share("fixed", "story-fix", is_good, "sound and ended"),
    ),
    Claim(
        "C13",
        "Two greedy runs give the same bytes.",
        "all answers that were asked again are the same; opposite: one is not",
        check_bytes,
    ),
    Claim(
        "C14",
        "The same weights collapse or not by decoding alone: the fixed decoding mends them.",
        f"of the trained models more answers are sound and ended under story-fix than under story-collapse, {_PAIRED}",
        check_same_weights,
    ),
    Claim(
        "C15",
        "Eval loss measures neither coherence nor stopping; only reading the answers does.",
        "two decodings of the same weights, which have one eval loss, differ in sound and ended answers (sign test, p < 0.05 "
        "over the questions, after Bonferroni over the pairs of decodings)",
        check_loss_is_blind,
    ),
)


# --- The page ----------------------------------------------------------------------------------------------------

# The story in three answers: of each study the rows whose answers to the first question stand side by side.
SIDE_BY_SIDE: dict[StudyName, tuple[tuple[str, str], ...]] = {
    "all": (("week3", "week3"), ("week4", "story-collapse"), ("fixed", "story-fix")),
    "training": (("base", "kit"), ("kit-week4-mix", "kit"), ("kit-by-loss", "kit")),
    "decoding": (("adapter", "story-collapse"), ("adapter", "story-fix"), ("adapter", "kit")),
}


def mark_findings(record: Record) -> str:
    """The answer as a cell, with ⟦ ⟧ around what speaks against it."""
    spans: list[tuple[int, int]] = []
    for finding in sorted(record["findings"], key=lambda each: each["span"]):
        start, end = finding["span"]
        if not speaks_against(finding) or start >= end:
            continue
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((start, end))
    text, at, parts = record["text"], 0, []
    for start, end in spans:
        parts += [escape_markdown(text[at:start]), "⟦", escape_markdown(text[start:end]), "⟧"]
        at = end
    return "".join([*parts, escape_markdown(text[at:])]) or "(nothing)"


def sort_rows(records: Records) -> list[Row]:
    """Rows in the order of the tables: models as the study names them, decodings as `DECODING_ARMS`."""
    arms, names = list(dict.fromkeys(arm for _, arm, _ in records.study["models"])), list(DECODING_ARMS)
    return sorted(records.rows.values(), key=lambda row: (arms.index(row.arm), names.index(row.decoding)))


def find_reference(records: Records, row: Row) -> Row | None:
    """What a row is paired with: the base model under the same decoding; a row of the base model, its `plain` one."""
    return records.row("base", "plain" if row.arm == "base" else row.decoding)


COLUMNS = (
    *("model", "decoding", "eval loss ↓", "token accuracy ↑", "adapter MB ↓", "training min ↓"),
    *("sound and ended ↑", "95% interval", "against base: better, worse, p", "stopped ↑", "mean tokens", "loops ↓", "lists ↓"),
    *("drift ↓", "points ↑", "wrong claims ↓", "overruled per 100 tokens", "same bytes twice", "answers"),
)


NOTES = " ".join(
    f"""*Sound and ended*: nothing in the form speaks against the answer, and the stop token ended it before the cap; in bold
    where the best row and the next lie outside each other's interval (Wilson). *Against base*: the same questions to the base
    model under the same decoding, the base model's own against its `plain`: better in so many, worse in so many, p of a sign
    test. *Loops, lists, drift*: answers with such a finding (`python infer.py`); drift is surprisal, leak or an invented
    medicine. *Points, wrong claims*: by
    the lists of samples/probes.jsonl. *Overruled*: tokens at which penalty or ban took the model's first choice. *Same bytes
    twice*: the first question again in other company, up to {AGAIN_TOKENS} tokens. *Eval loss*: of the weights that were
    kept, on the same held-out rows for all models. Answers to one question are no independent draws: p of pooled pairs is for
    guidance. None of it says that an answer is medically right, and none of it is medical advice.""".split()
)


def find_best(rows: Sequence[Row]) -> Row | None:
    """The row with the largest share of sound and ended answers, if it and the next lie outside each other's interval."""
    ranked = sorted((row for row in rows if row.answers), key=lambda row: row.rank, reverse=True)
    if len(ranked) < 2:
        return None
    best, following = ranked[:2]
    apart = following.rank[0] < best.good_interval[0] and best.rank[0] > following.good_interval[1]
    return best if apart else None


def format_row(records: Records, row: Row, best: Row | None) -> list[str]:
    """The cells of a row, in the order of `COLUMNS`."""
    losses = [row.mean_training(name) for name in ("eval_loss", "mean_token_accuracy", "adapter_bytes", "training_seconds")]
    trained = [
        "" if value is None else form.format(value * scale)
        for value, form, scale in zip(losses, ("{:.3f}", "{:.3f}", "{:,.1f}", "{:.1f}"), (1, 1, 1e-6, 1 / 60), strict=True)
    ]
    if not row.answers:
        last = row.errors[0].strip().splitlines()[-1] if row.errors else "no answers"
        return [row.arm, row.decoding, *trained, f"failed: {escape_markdown(last)}", *[""] * (len(COLUMNS) - 7)]
    size, good = len(row.answers), int(row.count(is_good))
    low, high = row.good_interval
    reference, paired = find_reference(records, row), ""
    if reference and reference is not row:
        against = compare(records.pair((row.arm, row.decoding), (reference.arm, reference.decoding)), is_good)
        paired = f"{against.larger}, {against.smaller}, {against.p:.2g}"
    tokens = row.count(lambda record: record["answer_tokens"])
    again = [result["again"] for result, answers in row.cells if answers]
    headline = f"{good} of {size}"
    return [
        row.arm,
        row.decoding,
        *trained,
        f"**{headline}**" if row is best else headline,
        f"{low:.0%} to {high:.0%}",
        paired,
        f"{row.count(has_ended) / size:.0%}",
        f"{tokens / size:.0f}",
        f"{row.count(loops):.0f}",
        f"{row.count(runs_on):.0f}",
        f"{row.count(drifts):.0f}",
        f"{row.count(num_points):.0f}/{row.count(lambda record: num_points(record) + len(record['facts']['missing'])):.0f}",
        f"{row.count(lambda record: len(record['facts']['wrong'])):.0f}",
        f"{100 * row.count(lambda record: record['num_overruled']) / max(tokens, 1):.1f}",
        f"{sum(each['same'] for each in again)} of {sum(each['asked'] for each in again)}",
        f"[read](#{row.name})",
    ]


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def describe_makers(records: Records) -> list[str]:
    """Machines, versions, commits and rows behind the answers, each once."""
    results = [result for row in records.rows.values() for result, answers in row.cells if answers]
    makers = {
        "machine": [f"{each['machine']}, {each['dtype']}" for each in (result["made_by"] for result in results)],
        "versions": [
            ", ".join(f"{name} {value}" for name, value in result["made_by"]["versions"].items()) for result in results
        ],
        "commit": [str(result["made_by"]["commit"]) for result in results],
        "adapters": [f"{row.arm} {digest[:12]}" for row in records.rows.values() for digest in row.adapters],
        "rows": [
            f"{arm} {training['train_rows']} of {training['train_tokens']:,} tokens in {training['steps']} steps"
            for arm, training in ((result["settings"]["arm"], result.get("training")) for result in results)
            if training
        ],
    }
    return [f"- {name}: {escape_markdown('; '.join(dict.fromkeys(values)))}" for name, values in makers.items() if values]


def make_page(records: Records) -> str:
    """The study as markdown: table, claims, three answers side by side, then every answer. Same records, same bytes."""
    rows = sort_rows(records)
    size = len(records.study["questions"])
    lines = [
        f"# Ablation: {records.study['study']}",
        "",
        "![Every answer by its verdict, and eval loss beside sound answers](ablation.png)",
        "",
        *format_table(COLUMNS, (format_row(records, row, find_best(rows)) for row in rows)),
        "",
        f"- command: `{records.study['command']}`",
        f"- questions: {size}, the probes {escape_markdown(', '.join(records.study['probes']))}",
        *describe_makers(records),
        "",
        NOTES,
        "",
        "## The story's claims, on these records",
        "",
        *format_table(
            ("", "claim", "verdict", "measured", "shown when"),
            (
                (
                    claim.id,
                    escape_markdown(claim.says),
                    verdict,
                    escape_markdown(measured),
                    escape_markdown(claim.rule),
                )
                for claim in CLAIMS
                for verdict, measured in (claim.check(records),)
            ),
        ),
        "",
        f"What is said here is said of {records.study['base_model']}, not of another model.",
        *format_side_by_side(records),
        "",
        "## Answers",
    ]
    written: dict[tuple[str, int, str, str], Row] = {}
    for row in rows:
        lines += format_answers(row, written)
    return "\n".join(lines) + "\n"


def format_answers(row: Row, written: dict[tuple[str, int, str, str], Row]) -> list[str]:
    """Every answer of a row, folded; the table's links lead here.

    `written` remembers, by arm, seed, question and ids, the row in which an answer stands: another that has the same, as those
    that are cut from one run, leads there.
    """
    lines = ["", f'<a name="{row.name}"></a>', "<details>", f"<summary>{row.arm}, {row.decoding}</summary>", ""]
    lines += [format_verbatim(error) for error in row.errors]
    for (seed, question), record in row.answers.items():
        of_seed = f", seed {seed}" if len(row.cells) > 1 else ""
        facts = infer.Facts(**{name: tuple(record["facts"][name]) for name in ("named", "missing", "wrong")})
        ended = escape_markdown(f"{record['finish_reason']}{of_seed}; {record['verdict']}")
        how = f"{record['answer_tokens']} tokens, {ended}; {facts}"
        first = written.setdefault((row.arm, seed, question, record["sha256"]), row)
        text = (
            format_verbatim(record["text"])
            if first is row
            else f"The same answer as under [{first.decoding}](#{first.name})."
        )
        lines += [f"{escape_markdown(question)} ({how})", "", text, ""]
    return [*lines, "</details>"]


def format_side_by_side(records: Records) -> list[str]:
    """The first question's answers in the rows of `SIDE_BY_SIDE`, marked; nothing where one of them is not there."""
    rows = [records.row(*names) for names in SIDE_BY_SIDE[records.study["study"]]]
    question = records.study["questions"][0]
    answers = [
        next((record for (_, asked), record in row.answers.items() if asked == question), None) if row else None for row in rows
    ]
    if None in answers:
        return []
    return [
        "",
        f"## One question, three answers: {escape_markdown(question)}",
        "",
        "What speaks against an answer stands in ⟦ ⟧.",
        "",
        *format_table(
            [
                f"{row.arm}, {row.decoding}: " + escape_markdown(f"{record['verdict']}, {record['finish_reason']}")
                for row, record in zip(rows, answers, strict=True)
            ],
            [[mark_findings(record) for record in answers]],
        ),
    ]


# --- The picture -------------------------------------------------------------------------------------------------

# Verdicts of an answer, the first that applies; dark to light, so that it reads in grey too.
COLOURS: dict[str, tuple[str, Callable[[Record], bool]]] = {
    "sound and ended": ("#08306b", is_good),
    "sound, cut at the cap": ("#6baed6", is_sound),
    "drift": ("#cb181d", drifts),
    "loop": ("#fdae6b", loops),
    "list": ("#ffeda0", runs_on),
    "empty": ("#bdbdbd", lambda record: True),
}


def draw_picture(records: Records, path: Path) -> None:
    """Every answer as a square coloured by its verdict, models by decodings and probes; below, eval loss beside the share of
    sound and ended answers, with the arms named."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sort_rows(records)
    arms = list(dict.fromkeys(row.arm for row in rows))
    names = [name for name in DECODING_ARMS if any(row.decoding == name for row in rows)]
    trained = [row for row in rows if row.answers and math.isfinite(row.mean_training("eval_loss") or math.nan)]
    questions = len(records.study["questions"]) * max(len(row.cells) for row in rows)
    width = 2.6 + 0.085 * questions * len(names) + 0.12 * len(names)
    heights = [0.34 * len(arms) + 1.6, 4.2 if trained else 0.01]
    figure = Figure(figsize=(max(9, width), sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    grid, *others = figure.subplots(2 if trained else 1, 1, squeeze=False, height_ratios=heights if trained else None)[:, 0]
    draw_grid(grid, records, arms, names, questions)
    if trained:
        draw_losses(others[0], trained)
    image = io.BytesIO()
    # No versions in the file: the same records give the same bytes.
    figure.savefig(image, format="png", dpi=130, metadata={"Software": None})
    data.write_atomic(path, image.getvalue())


def draw_grid(axes: Any, records: Records, arms: Sequence[str], names: Sequence[str], questions: int) -> None:
    """One square an answer: a line for each arm, a block of columns for each decoding."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Patch, Rectangle

    block = questions + 2
    squares, colours = [], []
    for line, arm in enumerate(arms):
        for place, name in enumerate(names):
            row = records.row(arm, name)
            for column, record in enumerate(row.answers.values() if row else ()):
                colours.append(next(colour for colour, applies in COLOURS.values() if applies(record)))
                squares.append(Rectangle((place * block + column, line), 0.92, 0.86))
    axes.add_collection(PatchCollection(squares, facecolors=colours, linewidths=0))  # many squares are drawn sooner as one
    axes.set(xlim=(-0.5, len(names) * block), ylim=(len(arms), -0.2))
    axes.set_yticks([line + 0.43 for line in range(len(arms))], arms)
    ticks = [place * block + questions / 2 for place in range(len(names))]
    axes.set_xticks(ticks, names, rotation=30, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(f"decoding; a square is one of {len(records.study['questions'])} probe questions, in the same order")
    handles = [Patch(facecolor=colour, label=name) for name, (colour, _) in COLOURS.items() if name != "empty"]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=len(handles), frameon=False)


def draw_losses(axes: Any, rows: Sequence[Row]) -> None:
    """Share of sound and ended answers over eval loss, a line of marks for each common decoding, the arms named above."""
    losses = {row.arm: row.mean_training("eval_loss") or math.nan for row in rows}
    order = sorted(losses, key=lambda arm: losses[arm])
    common = [name for name in _COMMON if all(any(row.arm == arm and row.decoding == name for row in rows) for arm in order)]
    for name, mark, colour in zip(common, ("s:", "^--", "o-"), ("#cb181d", "0.45", "#08306b"), strict=False):
        own = {row.arm: row.rank[0] for row in rows if row.decoding == name}
        axes.plot([losses[arm] for arm in order], [own[arm] for arm in order], mark, color=colour, label=name, clip_on=False)
    low, high = min(losses.values()), max(losses.values())
    span = (high - low) or 1.0
    axes.set(xlim=(low - 0.04 * span, high + 0.04 * span), ylim=(0, 1))
    axes.set_xlabel("eval loss (nats a token), lower is better")
    axes.set_ylabel("sound and ended answers")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    # Names in the order of the losses, evenly spread, each with a line down to its loss.
    for place, arm in enumerate(order):
        at = (place + 0.5) / len(order)
        axes.annotate(
            arm,
            xy=(losses[arm], 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(at, 1.16),
            textcoords="axes fraction",
            rotation=30,
            ha="left",
            va="bottom",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": "0.7", "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0)},
        )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


# --- Command -----------------------------------------------------------------------------------------------------


def save_best_decoding(records: Records, adapters: Mapping[str, Path]) -> str:
    """Writes the decoding of the best row into the adapter that gave its answers; returns what was done, in words.

    `adapters` are those of the arms, of seed 0. Both files that carry a decoding are written: our own record, and what other
    programs read.

    Raises:
        UsageError: no adapter was asked, or the one that gave the answers is not there any more.
    """
    rows = [row for row in records.rows.values() if row.answers and row.arm in adapters]
    if not rows:
        raise UsageError("--save-best writes into an adapter, and no adapter's answers are recorded.")
    ranked = sorted(rows, key=lambda row: row.rank, reverse=True)
    best, adapter, decoding = ranked[0], adapters[ranked[0].arm], DECODING_ARMS[ranked[0].decoding]
    if infer.hash_weights(adapter) not in best.adapters:
        raise UsageError(
            f"{adapter} is not the adapter that was asked ({', '.join(best.adapters)}). Name that one with --adapter, or ask "
            "this one: leave --table away."
        )
    config = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        config = dict(json.loads((adapter / "generation_config.json").read_text(encoding="utf-8")))
    config |= {
        "max_new_tokens": decoding.max_new_tokens,
        "repetition_penalty": decoding.repetition_penalty,
        "no_repeat_ngram_size": decoding.no_repeat_ngram_size,
        "do_sample": decoding.temperature > 0,
        "eos_token_id": best.stop_ids or None,
    }
    for name in ("temperature", "top_p"):
        config.pop(name, None)
        if decoding.temperature:
            config[name] = getattr(decoding, name)
    ours = dataclasses.asdict(dataclasses.replace(infer.read_adapter_record(adapter), decoding=decoding))
    data.write_atomic(adapter / "generation_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    data.write_atomic(adapter / infer.ADAPTER_RECORD, json.dumps(ours, indent=2) + "\n")
    said = f"{adapter} is asked under {best.decoding} from now on: sound and ended {best.count(is_good):.0f} of "
    said += f"{len(best.answers)}"
    if len(ranked) > 1 and not find_best(ranked):
        following = ranked[1]
        said += f"; {following.name}, with {following.count(is_good):.0f} of {len(following.answers)}, is within its interval"
    return said


@contextlib.contextmanager
def hold_page(study: Path) -> Iterator[None]:
    """Of several processes one at a time writes what belongs to the whole study."""
    with (study / "page.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        clear_leftovers(study)
        yield


def note_study(study: Path, about: Mapping[str, Any]) -> None:
    """Writes study.json, unless it names these very cells already: the page is made again with the command that it had."""
    with hold_page(study):
        try:
            noted = read_record(study / "study.json", "study.json")
        except UsageError:
            noted = None
        if noted is None or noted["models"] != about["models"]:
            data.write_atomic(study / "study.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def write_page(study: Path) -> Records:
    """Writes ablation.md and ablation.png from the records, one process at a time; returns the records.

    Raises:
        UsageError: as `read_records`.
    """
    if not study.is_dir():
        raise UsageError(f"{study} is not there. Make records first: python ablate.py")
    # Who writes later has read later, so the last of several processes leaves a page of everything.
    with hold_page(study):
        records = read_records(study)
        data.write_atomic(study / "ablation.md", make_page(records))
        draw_picture(records, study / "ablation.png")
    return records


def describe_study(config: AblateConfig, grid: Grid) -> dict[str, Any]:
    """study.json: what the page is made from, beside the cells, each of which it names with the digest of its settings."""
    flags = [redact(flag) for flag in sys.argv[1:] if flag not in ("--table", "--save-best")]
    return {
        "study": config.study,
        "command": shlex.join(["python", "ablate.py", *flags]),
        "base_model": grid.base_model,
        "questions": grid.questions,
        "probes": [probe.id for probe in grid.probes],
        "models": [
            [model.id, model.arm, {name: digest_json(grid.settings(model, name)) for name in model.decodings}]
            for model in grid.models
        ],
    }


def print_result(study: Path, records: Records) -> None:
    """Headlines of rows and claims, and where everything lies."""
    rows = sort_rows(records)
    width = max(len(row.name) for row in rows) + 2
    for row in rows:
        headline = f"sound and ended {row.count(is_good):.0f} of {len(row.answers)}" if row.answers else "failed"
        print(f"{row.name:<{width}}{headline}")
    print()
    for claim in CLAIMS:
        print(f"{claim.id:<5}{claim.check(records)[0]:<14}{claim.says}")
    print(f"\n{study / 'ablation.md'} holds the table, the claims and every answer; {study / 'ablation.png'} shows them.")


def main(config: AblateConfig) -> int:
    """Does what is missing, then writes page and picture. Returns the exit code: 1 if a cell failed."""
    infer.raise_on_signals()
    study = config.folder
    adapters: dict[str, Path] = {}
    if not train.is_main_process():
        sys.stdout = io.StringIO()  # of several processes of a launcher the first alone prints
    if not config.table or config.save_best:
        grid = make_grid(config)
        adapters = {model.arm: model.adapter for model in grid.models if model.adapter and not model.seed}
        if not config.table:
            do_missing(config, grid)
    if config.dry_run:
        return 0
    records = write_page(study)
    print_result(study, records)
    if config.save_best and train.is_main_process():
        print(save_best_decoding(records, adapters))
    failed = [row.name for row in records.rows.values() if row.errors]
    if failed:
        print(f"{len(failed)} cells failed ({', '.join(failed)}); the same line does them again.", file=sys.stderr)
    return 1 if failed else 0


def do_missing(config: AblateConfig, grid: Grid) -> None:
    """Prints what is missing and does it, or with `--dry-run` only prints.

    Raises:
        UsageError: as `plan_times` and `check_devices`.
    """
    missing = find_missing(grid)
    if missing or config.dry_run:
        # What a launcher tells its processes is not for the runs that are planned here.
        told = {name: os.environ.pop(name) for name in LAUNCHER_VARIABLES if name in os.environ}
        infer.prepare_environment(grid.values)
        times = plan_times(grid, missing)
        os.environ.update(told)
        print(format_plan(grid, missing, times), flush=True)
    if config.dry_run:
        return
    if missing:
        check_devices(grid)
    config.folder.mkdir(parents=True, exist_ok=True)
    note_study(config.folder, describe_study(config, grid))
    if missing:
        Workshop(grid, missing, times).run()


if __name__ == "__main__":
    data.run_command(AblateConfig, main, __doc__, "Lower --workers, then --num-probes, then --num-rows.")

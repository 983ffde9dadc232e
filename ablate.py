"""What made the difference? Models trained and decoded in different ways answer the same questions.

    python ablate.py                               the story's runs, and single changes of them
    python ablate.py --rows my.jsonl               the same comparisons with your dataset
    python ablate.py --probes my_questions.jsonl   or with your questions
    python ablate.py --dry-run                     print arms and commands; writes nothing
    python ablate.py --shard 0/2                   only the first half of the arms
    python ablate.py --table                       rebuild the report from the records

Writes runs/ablate/NAME/ablation.md, ablation.png, cells.csv and cells/ARM.DECODING.jsonl. The same
command resumes an interrupted study.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import data
import infer
import train
from data import Profile, UsageError
from infer import DECODINGS, Decoding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

# --- Arms and decodings --------------------------------------------------------------------------


# Flags of train.py. The story selected weights by loss; the kit selects them by answers.
RECIPE = {
    "mix": "rebalanced",
    "target_modules": "all-linear",
    "epochs": 1,
    "pad": "native",
    "r": 16,
    "metric_for_best_model": "eval_loss",
}
WEEK3 = RECIPE | {"mix": "chatdoctor", "target_modules": "attention", "pad": "added"}
WEEK4 = RECIPE | {"mix": "week4", "target_modules": "attention", "epochs": 2}
# At this rank, LoRA on attention has as many parameters as on all linear layers at rank 16, within
# 1% for both base models.
WIDE_R = 42

# Each arm named after `week4` is that run with a single change.
TRAINING_ARMS: dict[str, dict[str, Any]] = {
    "week3": WEEK3,
    "week4": WEEK4,
    "fixed": RECIPE | {"epochs": 2},
    "kit": RECIPE | {"metric_for_best_model": "answers"},
    "week4-1-epoch": WEEK4 | {"epochs": 1},
    "week4-rebalanced": WEEK4 | {"mix": "rebalanced"},
    "week4-all-linear": WEEK4 | {"target_modules": "all-linear"},
    "week4-wide-attention": WEEK4 | {"r": WIDE_R},
}
# Arms that equal another one except for the mix, which --rows replaces, and that other arm.
MIX_ARMS = {"week4-rebalanced": "week4", "week4-all-linear": "fixed"}
# Arms that also answer the probes at each evaluation, which takes as long as their training.
EVALUATED_BY_ANSWERS = ("week3", "week4", "fixed", "kit")
MAX_EVALUATION_PROBES = 26

_COLLAPSE, _FIX = DECODINGS["story-collapse"], DECODINGS["story-fix"]
MAIN_DECODINGS = ("story-collapse", "story-fix", "kit")
# Those that differ only in cap or stop are cut from the same generation, at no cost.
DECODING_ARMS: dict[str, Decoding] = {
    **{name: DECODINGS[name] for name in ("plain", *MAIN_DECODINGS)},
    "collapse-no-ban": dataclasses.replace(_COLLAPSE, no_repeat_ngram_size=0, count_prompt=False),
    "collapse-stop": dataclasses.replace(_COLLAPSE, stop="end-of-turn"),
    "collapse-cap-128": dataclasses.replace(_COLLAPSE, max_new_tokens=128),
    "fix-cap-128": dataclasses.replace(_FIX, max_new_tokens=128),
    "plain-cap-128": Decoding(max_new_tokens=128),
}
# The decodings of each arm: `base` is the base model, the others are training runs.
ARMS: dict[str, tuple[str, ...]] = {
    name: tuple(DECODING_ARMS) if name in ("base", *EVALUATED_BY_ANSWERS) else MAIN_DECODINGS
    for name in ("base", *TRAINING_ARMS)
}
# Arms and decodings whose answers to the first question the report shows side by side.
SIDE_BY_SIDE = (("week3", "plain"), ("week4", "story-collapse"), ("fixed", "story-fix"))
# Asked first: the story's five probes, then five with prompts of the same padded length.
FIRST_PROBES = """type-2-diabetes hypertension iron-deficiency malaria heart-attack migraine asthma
    stroke meningitis cystitis""".split()
# Tokens up to which the first question is answered again in another batch.
REPEATED_TOKENS = 64


# --- Flags ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AblateConfig(data.RowsFlags):
    """Flags of ablate.py."""

    name: str | None = None
    """Name of the study's folder. Unset: `story`, and the names of given files."""
    seeds: int = 1
    """Number of times each run is trained, with different seeds."""
    num_rows: int | None = None
    """Training rows of each run. Unset: the profile's."""
    num_probes: int | None = None
    """Number of probe questions, of which the story's five are the first. Unset: the profile's."""
    eval_every: float | None = None
    """Share of the steps between two evaluations that answer probes. Unset: the profile's."""
    shard: str = "0/1"
    """Run only part I of N of the arms, I from 0: one part per GPU or SLURM task."""
    workers: int | None = None
    """Arms that run at the same time and share the cores. Unset: the profile's."""
    profile: data.ProfileChoice = "auto"
    """Set of defaults: `t4` for a GPU, `cpu`, or `auto`."""
    base_model: str | None = None
    """Hub id or folder of another chat model of the Llama architecture. Unset: the profile's."""
    dry_run: bool = False
    """Print arms, commands and counts, and stop. Writes nothing."""
    table: bool = False
    """Only rebuild report and picture from the records."""
    answer: str | None = None
    """Only answer with this trained arm. Used by the study itself."""

    def __post_init__(self) -> None:
        problems = []
        if self.name is not None and not infer.RUN_NAME.fullmatch(self.name):
            problems.append(f"--name {self.name!r}: expected {infer.RUN_NAME_RULE}")
        probes = len(infer.read_probes(self.probes))
        limits = {"seeds": 100, "num_rows": math.inf, "num_probes": probes, "workers": 64}
        for name, most in limits.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                allowed = "1 or more" if most == math.inf else f"1 to {most}"
                problems.append(f"--{name.replace('_', '-')} {value}: expected {allowed}.")
        shard = re.fullmatch(r"(\d{1,4})/(\d{1,4})", self.shard)
        if not shard or int(shard[1]) >= int(shard[2]):
            problems.append(f"--shard {self.shard}: expected I/N with I from 0 to N - 1.")
        if self.rows and (self.conversational or self.encyclopedic):
            problems.append("--rows replaces the mix. Remove it, or the sources of the mix.")
        if self.eval_every is not None and not 0 < self.eval_every < 1:
            problems.append(f"--eval-every {self.eval_every}: expected a share between 0 and 1.")
        if self.system_prompt is not None and not self.system_prompt.strip():
            problems.append("--system-prompt is empty. Remove it, or give a text.")
        if self.table and (self.dry_run or self.answer):
            problems.append("--table only writes the report. Remove it, or --dry-run and --answer.")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def folder(self) -> Path:
        """The study's folder."""
        sources = (self.rows, self.conversational, self.encyclopedic, self.probes)
        parts = ["story", *(train.name_rows(each) for each in sources if each)]
        return infer.RUNS / "ablate" / (self.name or "-".join(parts))


@dataclass(frozen=True)
class Arm:
    """A model, and the decodings under which it answers."""

    id: str
    """Name of its run, and first part of its cells' names."""
    name: str
    """`base`, or a name in `TRAINING_ARMS`."""
    seed: int
    """Added to train.py's own seed."""
    decodings: Mapping[str, Decoding]
    flags: tuple[str, ...] | None = None
    """Flags of train.py; None if nothing is trained."""
    adapter: Path | None = None
    """The adapter's folder; None for the base model."""


@dataclass(frozen=True)
class Study:
    """A study, with all values that its answers depend on."""

    folder: Path
    profile: Profile
    arms: tuple[Arm, ...]
    probes: tuple[infer.Probe, ...]
    system_prompt: str = data.SYSTEM_PROMPT
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Sources of the training rows: the digest of each file, or its hub id."""
    train_rows: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Rows of each mix; empty if they are the profile's and on the hub."""

    def settings(self, arm: Arm, decoding: str) -> str:
        """Digest of everything that a cell's answers and verdicts depend on."""
        values = [
            dataclasses.asdict(arm.decodings[decoding]),
            (arm.name, arm.seed, arm.flags and [*arm.flags, self.sources]),
            (self.profile.name, self.profile.base_model, self.system_prompt),
            [dataclasses.asdict(probe) for probe in self.probes],
            {name: check.threshold for name, check in infer.CHECKS.items()},
        ]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def train_flags(self, arm: Arm) -> list[str]:
        """All flags of train.py for an arm."""
        return [*arm.flags, "--output-dir", str(self.folder / "runs"), "--name", arm.id]

    def missing(self, arm: Arm) -> list[str]:
        """The decodings whose cells are incomplete or have other settings."""
        cells, missing = self.folder / "cells", []
        for name in arm.decodings:
            found, expected = None, [self.settings(arm, name)] * len(self.probes)
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                found = [line["settings"] for line in read_cell(cells / f"{arm.id}.{name}.jsonl")]
            if found != expected:
                missing.append(name)
        return missing

    def format_plan(self, arms: Sequence[Arm]) -> str:
        """Arms, decodings, commands and counts as plain text."""
        width = max(len(arm.id) for arm in self.arms)
        lines, commands, left = [], [], 0
        for arm in arms:
            count, missing = len(arm.decodings), len(self.missing(arm))
            done = f"{count - missing:>2} of {count:>2} cells done"
            lines.append(f"{arm.id:<{width}}  {done}  {', '.join(arm.decodings)}")
            if arm.flags:
                commands.append(f"python train.py {shlex.join(self.train_flags(arm))}")
            left += missing
        cells = sum(len(arm.decodings) for arm in arms)
        end = f"{cells} cells of {len(self.probes)} questions, {left} to do, in {self.folder}"
        power = Comparison.describe_power(len(self.probes))
        return "\n".join([*lines, "", *commands, "", power, end])


def training_flags(
    name: str, profile: Profile, seed: int, num_rows: int, given: Mapping[str, Any]
) -> tuple[str, ...]:
    """The flags of train.py for an arm; `given` are those of ablate.py that it passes on."""
    arm = TRAINING_ARMS[name]
    flags: dict[str, Any] = {"profile": profile.name, **given, **arm}
    if "rows" in given:
        del flags["mix"]
    seed += train.TrainConfig.seed
    flags |= {"lora_alpha": 2 * arm["r"], "seed": seed, "num_rows": num_rows}
    if name not in EVALUATED_BY_ANSWERS:
        # Evaluated before the first step and after the last and, from 101 steps on, at 99%.
        flags |= {"num_probes": 0, "eval_every": 0.99}
    words = ((f"--{flag.replace('_', '-')}", str(value)) for flag, value in flags.items())
    return tuple(itertools.chain(*words))


def make_study(config: AblateConfig) -> Study:
    """The study that the flags describe. Raises UsageError as `data.resolve_profile`, or if the
    rows cannot be used, or have other system prompts in other mixes."""
    given = {each.name: getattr(config, each.name) for each in dataclasses.fields(data.RowsFlags)}
    given = {name: value for name, value in given.items() if value != getattr(data.RowsFlags, name)}
    profile = data.resolve_profile(config.profile, config.base_model)
    num_rows = config.num_rows or profile.ablation_rows
    names = ("rows",) if config.rows else ("conversational", "encyclopedic")
    sources = {name: given.get(name) or getattr(profile, name) for name in names}
    files = [name for name in names if Path(sources[name]).is_file()]
    mixes: dict[str, data.Mix] = {}
    if len(files) == len(names) or sources.keys() & given:
        for name in ["rebalanced"] if config.rows else data.MIXES:
            mixes[name] = data.RowsConfig(**given, mix=name, num_rows=num_rows).load(profile)
    prompts = {mix.system_prompt: name for name, mix in mixes.items()}
    if len(prompts) > 1:
        problem = f"{' and '.join(prompts.values())} have different system prompts"
        raise UsageError(f"The mixes {problem}. Give one for all rows with --system-prompt.")
    system_prompt = next(iter(prompts), config.system_prompt or data.SYSTEM_PROMPT)
    for name in files:
        sources[name] = hashlib.sha256(Path(sources[name]).read_bytes()).hexdigest()
    given |= {n: getattr(config, n) for n in ("base_model", "eval_every") if getattr(config, n)}
    probes = infer.read_probes(config.probes)
    if not config.probes:
        places = {name: place for place, name in enumerate(FIRST_PROBES)}
        probes.sort(key=lambda probe: places.get(probe.id, len(places)))
    probes = probes[: config.num_probes or profile.ablation_probes]
    given["num_probes"] = min(len(probes), MAX_EVALUATION_PROBES)
    arms = []
    for (name, decodings), seed in itertools.product(ARMS.items(), range(config.seeds)):
        own = {each: DECODING_ARMS[each] for each in decodings}
        arm_id = f"{name}-seed{seed}" if seed else name
        if name == "base":
            arms += [Arm(arm_id, name, seed, own)] * (not seed)
        elif not (config.rows and name in MIX_ARMS):
            flags = training_flags(name, profile, seed, num_rows, given)
            adapter = config.folder / "runs" / arm_id / "adapter"
            arms.append(Arm(arm_id, name, seed, own, flags, adapter))
    counts = {name: len(mix.train) for name, mix in mixes.items()}
    return Study(config.folder, profile, tuple(arms), tuple(probes), system_prompt, sources, counts)


# --- Running -------------------------------------------------------------------------------------


def describe_machine(loaded: infer.LoadedModel) -> str:
    """Processor, threads, dtype, versions and commit that the answers were made with."""
    import torch

    if loaded.model.device.type == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        machine = f"{cpu[1] if cpu else platform.machine()}, {torch.get_num_threads()} CPU threads"
    versions = ", ".join(f"{name} {value}" for name, value in train.list_versions().items())
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return "; ".join(filter(None, [f"{machine}, {dtype}", versions, train.commit_id()]))


def write_cells(study: Study, arm: Arm) -> None:
    """Loads the arm's model, and writes its judged answers under the decodings that are missing.
    Raises UsageError as `infer.check_adapter` and `infer.load_for_inference`."""
    from tqdm import tqdm

    profile, names = study.profile, study.missing(arm)
    if not names:
        return
    infer.prepare_environment(profile)
    adapter = arm.adapter and infer.check_adapter(arm.adapter, profile.name, profile.base_model)
    with infer.quiet_libraries():
        loaded = infer.load_for_inference(profile, adapter, study.system_prompt)
    loaded.probes = study.probes
    decodings = [arm.decodings[name] for name in names]
    questions = [probe.question for probe in study.probes]
    requests = [infer.Request(each, decoding) for decoding in decodings for each in questions]
    total = infer.count_new_tokens(requests)
    with tqdm(total=total, unit="token", desc=f"{arm.id}: answering", leave=False) as bar:
        answers = infer.answer_requests(loaded, requests, bar.update)
    again = []
    for each in decodings:
        cap = min(REPEATED_TOKENS, each.max_new_tokens)
        again.append(infer.Request(questions[0], dataclasses.replace(each, max_new_tokens=cap)))
    repeated, machine = infer.answer_requests(loaded, again), describe_machine(loaded)
    # Equal answers of several decodings are judged once.
    distinct = {(each.question, each.sha256, each.finish_reason): each for each in answers}
    bar = tqdm(distinct.items(), unit="answer", desc=f"{arm.id}: judging", leave=False)
    judged = {key: infer.judge_answers(loaded, [each])[0] for key, each in bar}
    for place, name in enumerate(names):
        own = answers[place * len(questions) : (place + 1) * len(questions)]
        ids, again_ids = own[0].token_ids, repeated[place].token_ids
        cell = {
            "arm": arm.name,
            "seed": arm.seed,
            "decoding_arm": name,
            "settings": study.settings(arm, name),
            "stop_ids": infer.stop_ids(decodings[place], loaded.model, loaded.tokenizer),
            "repeats": ids[: len(again_ids)] == again_ids,
            "machine": machine,
        }
        lines = []
        for each in own:
            verdict = judged[each.question, each.sha256, each.finish_reason]
            record = cell | dataclasses.replace(verdict, answer=each).to_record()
            del record["seconds"]  # equal answers are equal bytes
            lines.append(record)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        data.write_atomic(study.folder / "cells" / f"{arm.id}.{name}.jsonl", text)


# The processes of the study, and a lock for the one whose progress is shown.
RUNNING: list[subprocess.Popen] = []
SHOWN = threading.Lock()


def run_logged(command: Sequence[str], log: Path) -> tuple[int, str]:
    """Runs Python with these arguments. Its output goes to the log; the stderr of one process at a
    time is also shown.

    Returns the exit code, and a description of the failure with the last message on stderr.
    """
    end, is_shown = b"", SHOWN.acquire(blocking=False)
    with (
        log.open("ab") as words,
        subprocess.Popen(
            [sys.executable, *command],
            stdout=words,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches only this process, which passes it on
        ) as process,
    ):
        RUNNING.append(process)
        while chunk := process.stderr.read1():
            words.write(chunk)
            end = (end + chunk)[-4000:]
            if is_shown:
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()
    if is_shown:
        SHOWN.release()
    code = process.returncode
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    if code == -signal.SIGKILL:
        how += ", possibly for lack of memory"
    lines = [line for line in re.split(r"[\r\n]+", end.decode(errors="replace")) if line.strip()]
    starts = [place for place, line in enumerate(lines) if line.startswith("error: ")]
    message = " ".join(lines[starts[-1] :] if starts else lines[-1:])
    return code, f"failed ({how}). {data.escape_controls(message)[:600]}"


def run_arm(study: Study, arm: Arm) -> str | None:
    """Trains the arm, unless it is the base model, and answers with it, each in its own process.
    Returns why it failed, or None."""
    place, log = study.arms.index(arm) + 1, study.folder / "logs" / f"{arm.id}.log"
    sys.stderr.write(f"[{place}/{len(study.arms)}] {arm.id}\n")
    if arm.flags:
        command = [str(data.HERE / "train.py"), *study.train_flags(arm)]
        code, reason = run_logged(command, log)
        while code == train.BUSY:  # the study was killed, and this run continues
            time.sleep(5)
            code, reason = run_logged(command, log)
        if code == train.OTHER_VALUES:
            code, reason = run_logged([*command, "--restart"], log)
        if code:
            instead = f" In a study, remove {study.folder / 'runs' / arm.id} instead."
            return f"train.py {reason}{instead if '--restart' in reason else ''}"
    code, reason = run_logged([*sys.orig_argv[1:], "--answer", arm.id], log)
    return f"answering {reason}" if code else None


def run_study(study: Study, arms: Sequence[Arm], workers: int) -> None:
    """Runs the arms with missing cells, several at the same time, and records why arms failed.

    Raises `infer.Interrupted` on a signal. Training runs save and end; a second signal kills them.
    """
    failures = {arm.id: study.folder / "failures" / f"{arm.id}.txt" for arm in arms}
    for path in failures.values():
        path.unlink(missing_ok=True)
    arms = [arm for arm in arms if study.missing(arm)]
    if workers > 1:
        # Also if fewer arms are left, since the results depend on the number of threads.
        cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    if sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "0.5")  # the processes write to a pipe
    pool, started = ThreadPoolExecutor(workers), time.monotonic()
    futures = {pool.submit(run_arm, study, arm): arm.id for arm in arms}
    try:
        for done, future in enumerate(as_completed(futures), 1):
            if reason := future.result():
                data.write_atomic(failures[futures[future]], reason)
                print(f"{futures[future]}: {reason}", file=sys.stderr)
            minutes, left = (time.monotonic() - started) / 60, len(arms) - done
            if left:
                counts = f"{done} of {len(arms)} arms done in {minutes:.0f} min"
                print(f"{counts}, about {minutes / done * left:.0f} min left", file=sys.stderr)
    except infer.Interrupted as interrupted:
        message = f"Interrupted. Finished cells are kept in {study.folder}; run the same command "
        raise infer.Interrupted(interrupted.number, message + "to resume.") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        stopped = []
        try:
            while not all(future.done() for future in futures):
                while RUNNING:  # one signal each: at a second one train.py does not save
                    stopped.append(RUNNING.pop())
                    stopped[-1].terminate()
                wait(futures, timeout=0.2)
        finally:
            for process in stopped:
                process.kill()


# --- Records -------------------------------------------------------------------------------------


def read_cell(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file. Raises OSError or ValueError if it is missing or corrupt."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def flatten_answer(record: Mapping[str, Any], place: int) -> dict[str, Any]:
    """The values of a line of a cell that the report uses."""
    found = {finding["name"] for finding in record["findings"]}
    if not found <= infer.CHECKS.keys():
        raise ValueError(f"unknown findings {sorted(found)}")
    facts = record.get("facts") or {"named": [], "missing": [], "wrong": []}
    ended = record["finish_reason"] == "stop"
    texts = ("arm", "question", "text", "verdict", "machine")
    return {
        **{name: str(record[name]) for name in texts},
        "decoding": str(record["decoding_arm"]),
        "adapter": record["adapter"],
        "seed": int(record["seed"]),
        "stop_ids": tuple(map(int, record["stop_ids"])),
        "place": place,
        "spans": [(int(start), int(end)) for start, end in (f["span"] for f in record["findings"])],
        "sound_and_ended": not found and ended,
        "sound": not found,
        "unsound": bool(found),
        "ended": ended,
        "loops": bool(found & {"loop", "repetition"}),
        "lists": "list" in found,
        # The answer surprises the base model, continues as another speaker, or invents a medicine.
        "drift": bool(found & {"surprisal", "leak", "invented-medicine"}),
        "list_items": infer.measure_list(record["text"])[0],
        "points": len(facts["named"]),
        "max_points": len(facts["named"]) + len(facts["missing"]),
        "wrong_claims": len(facts["wrong"]),
        "tokens": int(record["answer_tokens"]),
        "overruled": int(record["num_overruled"]),
        "repeats": bool(record["repeats"]),
    }


def read_run(path: Path) -> dict[str, Any]:
    """Numbers of a training run from its run.json."""
    numbers = json.loads(path.read_text(encoding="utf-8"))["numbers"]
    own = ("steps", "training_seconds", "adapter_bytes", "train_rows", "train_tokens")
    return {
        "eval_loss_before": float(numbers["before"]["eval_loss"]),
        "eval_loss": float(numbers["chosen"]["eval_loss"]),
        "token_accuracy": numbers["chosen"].get("eval_mean_token_accuracy"),
        **{name: float(numbers[name]) for name in own},
        "selected": dict(numbers["selected"]),
    }


@dataclass(frozen=True)
class Records:
    """The records of a study."""

    about: Mapping[str, Any]
    """study.json: the command, the questions and the arms."""
    answers: DataFrame
    """One row per answer, see `flatten_answer`, in the order of the report."""
    runs: DataFrame
    """One row per training run, see `read_run`, with its evaluations by step, without step 0."""
    failures: Mapping[str, str]
    """Why arms failed, by their id."""
    readings: DataFrame
    """readings.csv, if there is one: a row per reader and pair of answers of a training run. `vote`
    is 1 for the answer at the step selected by `answers`, -1 for the one at the step selected by
    `metric`, and 0 for neither."""

    @classmethod
    def read(cls, folder: Path) -> Records:
        """The study's records, without cells of other settings. Raises UsageError if there are
        none, or one is corrupt."""
        from pandas import DataFrame, read_csv

        path, remove = folder / "study.json", "it"
        if not path.is_file():
            raise UsageError(f"{path} does not exist. Run the study first: python ablate.py")
        answers, runs, failures = [], [], {}
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            texts = (about["command"], about["base_model"], *about["questions"])
            if not all(isinstance(each, str) for each in texts):
                raise ValueError("it describes no study")
            for arm_id, (arm, seed, cells) in about["arms"].items():
                path, remove = folder / "study.json", "it"
                if arm not in ARMS or not cells.keys() <= DECODING_ARMS.keys():
                    raise ValueError(f"unknown arm {arm_id}")
                path = folder / "failures" / f"{arm_id}.txt"
                if path.is_file():
                    failures[arm_id] = path.read_text(encoding="utf-8")
                found = len(answers)
                for decoding, settings in cells.items():
                    path = folder / "cells" / f"{arm_id}.{decoding}.jsonl"
                    lines = read_cell(path) if path.is_file() else []
                    if lines and lines[0].get("settings") == settings:
                        answers += [flatten_answer(line, place) for place, line in enumerate(lines)]
                path = folder / "runs" / arm_id / "run.json"
                remove = f"{path.parent} and {folder / 'cells' / arm_id}.*"
                if len(answers) > found and path.is_file():
                    runs.append({"arm": arm, "seed": seed, **read_run(path)})
                    path = path.with_name("metrics.jsonl")
                    lines = [line for line in read_cell(path) if "eval_loss" in line]
                    runs[-1]["evaluations"] = {int(e["step"]): e for e in lines if e["step"]}
            path, remove = folder / "readings.csv", ""
            columns = ["reader", "arm", "metric", "question", "vote"]
            readings = DataFrame(columns=columns)
            if path.is_file():
                readings = read_csv(path)[columns]
                readings["vote"] = readings.vote.map({-1: -1, 0: 0, 1: 1}).astype(int)
            path, remove = folder / "cells", "it"
            table = DataFrame(answers)
            if answers:
                # The first of each set of decodings that differ only in cap or stop.
                names = table.decoding.unique()
                requests = [infer.Request("", DECODING_ARMS[name]) for name in names]
                distinct = [names[places[0]] for places in infer.merge_requests(requests)]
                table["distinct"] = table.decoding.isin(distinct)
        except Exception as error:  # whatever a corrupt file leads to
            advice = f"Remove {remove}; the same command (without --table) makes cells and runs "
            advice = advice + "again." if remove else "Restore it, or repeat tests.blind_pairs."
            raise UsageError(f"{path} is a broken record ({error!r}). {advice}") from None
        if not answers:
            reasons = "".join(f"\n{arm}: {reason}" for arm, reason in failures.items())
            raise UsageError(f"{folder} has no finished cells. Run python ablate.py.{reasons}")
        runs = DataFrame(runs, columns=None if runs else ["arm", "eval_loss"])
        return cls(about, table, runs, failures, readings)


# --- Statistics ----------------------------------------------------------------------------------


def interval(answers: DataFrame, outcome: str) -> tuple[int, int, float, float]:
    """`(count, total, low, high)`: questions of which most answers, one per seed, have the outcome,
    all questions, and the 95% interval of the share (Wilson 1927)."""
    from scipy.stats import binomtest

    found = answers.groupby("question")[outcome].mean() > 0.5
    share = binomtest(int(found.sum()), len(found)).proportion_ci(method="wilson")
    return int(found.sum()), len(found), float(share.low), float(share.high)


def format_share(answers: DataFrame, outcome: str = "sound_and_ended") -> str:
    """The number of questions with the outcome, with the interval of their share."""
    return "{} of {} ({:.0%} to {:.0%})".format(*interval(answers, outcome))


def select(frame: DataFrame, **where: Any) -> DataFrame:
    """The rows with these values."""
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return frame


def pair(answers: DataFrame, one: Mapping[str, str], other: Mapping[str, str]) -> DataFrame:
    """Pairs of answers to the same question, under the same seed and, unless given, of the same arm
    and decoding. Columns of the second have the suffix `_other`."""
    keys = [name for name in ("arm", "decoding", "seed", "question") if name not in one]
    if "decoding" not in one:
        answers = answers[answers.distinct]
    first, second = select(answers, **one), select(answers, **other)
    if other.get("arm") == "base":
        keys.remove("seed")
        second = second[second.seed == 0]
    return first.merge(second, on=keys, suffixes=("", "_other"))


# The smallest net share of questions that matters. A claim is `not shown` if the interval of a net
# share excludes it, and `undecidable` if the questions are too few for that.
RELEVANT = 0.2


class Comparison:
    """Pairs of answers, at least one, compared by the column `outcome`, question by question.

    Answers of several arms, decodings or seeds to one question are not independent, so each
    question counts once, by the sum of its differences. The effect is the net share of questions:
    those with more of the outcome, less those with fewer.
    """

    def __init__(self, pairs: DataFrame, outcome: str) -> None:
        from scipy.stats import binomtest

        first, second = pairs[outcome].astype(float), pairs[f"{outcome}_other"].astype(float)
        change = (first - second).groupby(pairs.question).sum()
        self.outcome, self.first, self.second = outcome, first.mean(), second.mean()
        self.pairs, self.questions = len(pairs), len(change)
        self.larger, self.smaller = int((change > 0).sum()), int((change < 0).sum())
        # The two-sided sign test, ties left out (Dixon and Mood 1946).
        decided = self.larger + self.smaller
        self.p = float(binomtest(self.larger, decided).pvalue) if decided else 1.0

    @property
    def sign(self) -> int:
        """1 if the first has more and -1 if it has fewer, with p < 0.05; otherwise 0."""
        if self.p >= 0.05:
            return 0
        return 1 if self.larger > self.smaller else -1

    @property
    def net(self) -> tuple[float, float, float]:
        """The net share of questions in [-1, 1], and its 95% interval (Agresti and Min 2005: half
        an observation is added to each cell of the table of pairs)."""
        net, size = self.larger - self.smaller, self.questions + 2
        spread = 1.96 * math.sqrt(self.larger + self.smaller + 1 - net**2 / size)
        low, high = max(-1.0, (net - spread) / size), min(1.0, (net + spread) / size)
        return net / self.questions, low, high

    def describe(self, one: str, other: str) -> str:
        """Both means, n, the effect with its interval, and p."""
        return (
            f"{self.outcome.replace('_', ' ')}: {one} {self.first:.3g}, {other} {self.second:.3g} "
            f"(means of {self.pairs} pairs; +{self.larger} -{self.smaller} of {self.questions} "
            f"questions, net {self.describe_net()}, p = {self.p:.2g})"
        )

    def describe_net(self) -> str:
        """The effect with its interval."""
        return "{:+.0%} [{:+.0%}, {:+.0%}]".format(*self.net)

    @staticmethod
    def detectable_net(questions: int, changed: float) -> float:
        """The smallest net share of questions that the sign test finds with a power of 80%, if its
        outcome changes for the share `changed` of them; infinite if it finds none."""
        from scipy.stats import binom, binomtest

        trials = round(questions * changed)
        for least in range(trials // 2, trials + 1):
            if trials and binomtest(least, trials).pvalue < 0.05:
                shares = (place / 1000 for place in range(500, 1001))
                share = next(each for each in shares if binom.sf(least - 1, trials, each) >= 0.8)
                return (2 * share - 1) * trials / questions
        return math.inf

    @classmethod
    def describe_power(cls, questions: int) -> str:
        """What a study of this many questions can find, in one sentence."""
        parts = []
        for changed in (0.2, 0.5, 1.0):
            net = cls.detectable_net(questions, changed)
            part = f"{net:.0%} if {changed:.0%} change" if net < 1 else f"none if {changed:.0%}"
            parts.append(part)
        return f"net share that {questions} questions find with 80% power: {', '.join(parts)}"


# --- Claims --------------------------------------------------------------------------------------

Verdict = Literal["shown", "not shown", "undecidable", "the opposite", "not run"]
Result = tuple[Verdict, str]
NOT_RUN: Result = ("not run", "the study does not have these cells")


@dataclass(frozen=True)
class Query:
    """A comparison of paired answers: is `outcome` `more` or `fewer` for one than for the other?"""

    by: Literal["arm", "decoding"]
    one: str
    """Name of an arm or a decoding."""
    other: str
    outcome: str
    direction: Literal["more", "fewer"] = "more"
    decoding: str | None = None
    """Of arms: only under this decoding; otherwise under all common ones."""
    trained: bool = False
    """Of decodings: only for trained arms; otherwise for all."""
    is_harm: bool = False
    """Whether this outcome counts against the claim."""

    @property
    def sense(self) -> int:
        """1 if the query is for more, -1 if for fewer."""
        return 1 if self.direction == "more" else -1

    def resolve(self, records: Records) -> Query:
        """The query, with the equal arm if the study has none named `one`: see `MIX_ARMS`."""
        arms, equal = {arm for arm, _, _ in records.about["arms"].values()}, MIX_ARMS.get(self.one)
        if self.one in arms or equal not in arms or equal == self.other:
            return self
        return dataclasses.replace(self, one=equal)

    def pairs(self, answers: DataFrame) -> DataFrame:
        """The pairs of answers, see `pair`."""
        one, other = {self.by: self.one}, {self.by: self.other}
        if self.decoding:
            one["decoding"] = other["decoding"] = self.decoding
        if self.trained:
            answers = answers[answers.arm != "base"]
        if self.outcome == "points":  # some questions have none
            answers = answers[answers.max_points > 0]
        return pair(answers, one, other)

    def run(self, answers: DataFrame) -> Comparison | None:
        """The comparison, or None if no answer has a partner."""
        pairs = self.pairs(answers)
        return Comparison(pairs, self.outcome) if len(pairs) else None


def decide(found: Sequence[tuple[Query, Comparison]]) -> Verdict:
    """The verdict on a claim by its queries.

    It is `shown` if every query that is not a harm is significant in its direction, and every
    harm's interval excludes `RELEVANT`; `the opposite` if every query is significant in the other
    direction, or a harm is significant and no query. Otherwise `not shown` if a harm is
    significant, or a query's interval excludes `RELEVANT`; and `undecidable` if not.
    """
    signs = {each.sign * query.sense for query, each in found if not query.is_harm}
    harm = any(each.sign == query.sense for query, each in found if query.is_harm)
    # By whether they are harms: does the interval of each query exclude `RELEVANT`?
    absent: dict[bool, list[bool]] = {True: [], False: []}
    for query, each in found:
        absent[query.is_harm].append(max(query.sense * end for end in each.net[1:]) < RELEVANT)
    if signs == {1} and not harm and all(absent[True]):
        return "shown"
    if signs == {-1} or (harm and 1 not in signs):
        return "the opposite"
    return "not shown" if harm or any(absent[False]) else "undecidable"


def compare_answers(*queries: Query) -> Callable[[Records], Result]:
    """A function that decides a claim by these queries, see `decide`."""

    def check(records: Records) -> Result:
        own = [query.resolve(records) for query in queries]
        found = [(query, query.run(records.answers)) for query in own]
        if any(each is None for _, each in found):
            no_points = own[0].outcome == "points" and not records.answers.max_points.any()
            return ("not run", "no probe has points") if no_points else NOT_RUN
        texts = [each.describe(query.one, query.other) for query, each in found]
        return decide(found), "; ".join(texts)

    return check


WORSE = Query("arm", "week4", "base", "sound_and_ended", "fewer", "story-collapse")


def check_loss(records: Records) -> Result:
    """C1: the loss fell, and there are fewer sound and ended answers than of the base model."""
    runs = select(records.runs, arm="week4")
    verdict, text = compare_answers(WORSE)(records)
    if verdict == "not run" or runs.empty:
        return NOT_RUN if verdict == "not run" else ("not run", "no run.json of week4")
    before, after = runs.eval_loss_before.mean(), runs.eval_loss.mean()
    if verdict == "shown" and not after < before:
        verdict = "not shown"
    return verdict, f"eval loss {before:.3f} to {after:.3f}; {text}"


def check_stop(records: Records) -> Result:
    """C8: not run if the generation config already names the end-of-turn token."""
    query = Query("decoding", "collapse-stop", "story-collapse", "sound_and_ended")
    verdict, text = compare_answers(query)(records)
    ids = {name: set().union(*own) for name, own in records.answers.groupby("decoding").stop_ids}
    if verdict != "not run" and ids[query.one] <= ids[query.other]:
        names = sorted(ids[query.one])
        return "not run", f"the base model's generation config already names this token, {names}"
    return verdict, text


def check_cap(records: Records) -> Result:
    """C10: fewer unsound answers under a smaller cap; also counts what the cap cures or hides."""
    import pandas

    larger_caps = {"collapse": "story-collapse", "fix": "story-fix", "plain": "plain"}
    pairs = pandas.concat(
        pair(records.answers, {"decoding": f"{name}-cap-128"}, {"decoding": larger})
        for name, larger in larger_caps.items()
    )
    if pairs.empty:
        return NOT_RUN
    query = Query("decoding", "smaller cap", "larger cap", "unsound", "fewer")
    found = Comparison(pairs, query.outcome)
    text = found.describe(query.one, query.other)
    cured = (pairs.sound_and_ended & ~pairs.sound_and_ended_other).sum()
    hidden = (pairs.sound & ~pairs.ended & pairs.unsound_other).sum()
    text += f"; cured {cured} answers, cut {hidden} before they became unsound"
    return decide([(query, found)]), text


def check_pad(records: Records) -> Result:
    """C11: by the exact sizes for Llama 3.2 3B."""
    sizes = [
        train.count_adapter(data.PROFILES["t4"].architecture, "attention", 16, dtype)[1]
        for dtype in (None, "float16", "float32")
    ]
    text = "Llama 3.2 3B: {:,} bytes; with an added token {:,} (16-bit), {:,} (fp32)".format(*sizes)
    return ("shown" if sizes[1] >= 10 * sizes[0] else "not shown"), text


def check_bytes(records: Records) -> Result:
    """C13: greedy answers generated again in another batch have the same tokens."""
    answers = records.answers[(records.answers.place == 0) & records.answers.distinct]
    answers = answers.assign(question=range(len(answers)))  # each is another cell's
    text = "the first question again in another batch, equal up to "
    text += f"{REPEATED_TOKENS} tokens: {format_share(answers, 'repeats')}"
    return ("shown" if answers.repeats.all() else "the opposite"), text


def check_loss_is_blind(records: Records) -> Result:
    """C15: two decodings of the same weights, and so of one eval loss, differ in sound answers.

    Reports the pair of decodings with the smallest p, with a Bonferroni correction for all pairs.
    """
    answers = records.answers
    names = answers[(answers.arm != "base") & answers.distinct].decoding.unique()
    found = []
    for one, other in itertools.combinations(names, 2):
        query = Query("decoding", one, other, "sound_and_ended", trained=True)
        if comparison := query.run(answers):
            found.append((comparison, query))
    if not found:
        return NOT_RUN
    best, query = min(found, key=lambda each: each[0].p)
    is_absent = all(abs(end) < RELEVANT for each, _ in found for end in each.net[1:])
    verdict = "shown" if best.p * len(found) < 0.05 else "not shown" if is_absent else "undecidable"
    text = best.describe(query.one, query.other)
    return verdict, f"{text}; smallest p of {len(found)} pairs of decodings"


@dataclass(frozen=True)
class Claim:
    """A claim of the story, and how the records decide it."""

    id: str
    text: str
    decide: Callable[[Records], Result]
    """Returns the verdict, and the numbers it is based on."""
    evidence: tuple[Query, ...] | tuple[str, str, str] = ()
    """The comparisons, or the arm, decoding and outcome, from which the report shows answers."""

    @classmethod
    def compare(cls, claim_id: str, text: str, *queries: Query) -> Claim:
        """A claim that its queries decide."""
        return cls(claim_id, text, compare_answers(*queries), queries)

    @classmethod
    def count(cls, claim_id: str, text: str, arm: str, decoding: str, outcome: str) -> Claim:
        """A claim that is shown if the interval of a cell's share is above one half, and reversed
        if it is below."""

        def check(records: Records) -> Result:
            answers = select(records.answers, arm=arm, decoding=decoding)
            if answers.empty:
                return NOT_RUN
            low, high = interval(answers, outcome)[2:]
            verdict = "shown" if low > 0.5 else "the opposite" if high < 0.5 else "undecidable"
            name = outcome.replace("_", " ")
            return verdict, f"{name}: {arm} under {decoding} {format_share(answers, outcome)}"

        return cls(claim_id, text, check, (arm, decoding, outcome))


# Claims about the story's own questions.
ABOUT_QUESTIONS = ("C2", "C6", "C12")
CLAIMS = (
    Claim("C1", "Eval loss fell and the model got worse.", check_loss, (WORSE,)),
    Claim.count(
        "C2",
        "Under greedy decoding with the n-gram ban, most answers of `week4` are unsound.",
        "week4",
        "story-collapse",
        "unsound",
    ),
    Claim.compare(
        "C3",
        "`no_repeat_ngram_size=3` causes drift.",
        Query("decoding", "story-collapse", "collapse-no-ban", "drift"),
    ),
    Claim.compare(
        "C4",
        "Two epochs of 8,000 : 4,000 rows teach longer lists and fewer endings.",
        Query("arm", "week4", "base", "list_items"),
        Query("arm", "week4", "base", "ended", "fewer"),
    ),
    Claim.compare(
        "C5",
        "A mix of 85 : 15 rows gives more sound and ended answers.",
        Query("arm", "week4-rebalanced", "week4", "sound_and_ended"),
    ),
    Claim.compare(
        "C6",
        "LoRA on the feed-forward layers too names more facts, also at equal parameters.",
        Query("arm", "week4-all-linear", "week4", "points"),
        Query("arm", "week4-all-linear", "week4-wide-attention", "points"),
    ),
    Claim.compare(
        "C7",
        "Removing the n-gram ban gives more sound and ended answers.",
        Query("decoding", "collapse-no-ban", "story-collapse", "sound_and_ended"),
    ),
    Claim("C8", "The explicit end-of-turn token ends more answers soundly.", check_stop),
    Claim.compare(
        "C9",
        "`repetition_penalty=1.3` reduces loops and does no harm.",
        Query("decoding", "story-fix", "plain", "loops", "fewer"),
        Query("decoding", "story-fix", "plain", "sound_and_ended", "fewer", is_harm=True),
        Query("decoding", "story-fix", "plain", "drift", is_harm=True),
    ),
    Claim(
        "C10",
        "A smaller `max_new_tokens` gives fewer unsound answers.",
        check_cap,
        (Query("decoding", "collapse-cap-128", "story-collapse", "unsound", "fewer"),),
    ),
    Claim("C11", "An added pad token makes the adapter 10 times as large.", check_pad),
    Claim.count(
        "C12",
        "After the fixes, most answers of `fixed` are sound and ended.",
        "fixed",
        "story-fix",
        "sound_and_ended",
    ),
    Claim("C13", "Greedy decoding repeats its bytes.", check_bytes),
    Claim.compare(
        "C14",
        "The fixed decoding alone makes trained models answer soundly.",
        Query("decoding", "story-fix", "story-collapse", "sound_and_ended", trained=True),
    ),
    Claim("C15", "One eval loss goes with different answers.", check_loss_is_blind),
)


# Single changes, which the report orders by their effect.
CHANGES = (
    Query("decoding", "collapse-no-ban", "story-collapse", "sound_and_ended", trained=True),
    Query("decoding", "story-fix", "story-collapse", "sound_and_ended", trained=True),
    Query("decoding", "kit", "story-collapse", "sound_and_ended", trained=True),
    Query("arm", "week4-rebalanced", "week4", "sound_and_ended"),
    Query("arm", "week4-all-linear", "week4", "sound_and_ended"),
    Query("arm", "week4-1-epoch", "week4", "sound_and_ended"),
)


# --- The report ----------------------------------------------------------------------------------


def escape_markdown(text: str) -> str:
    """The text as one line of markdown that shows it unchanged; newlines become `<br>`."""

    def entities(found: re.Match[str]) -> str:
        return "".join(f"&#{ord(character)};" for character in found[0])

    shown = data.escape_controls(text.replace("\r\n", "\n").replace("\t", " "))
    # Also the dot of "www.", which some viewers turn into a link, and characters that start a list.
    escaped = re.sub(r"[^\w\s.,;()'?!%/+-]|_|(?<=www)\.", entities, shown)
    escaped = re.sub(r"(?m)^\s*([-+.()]|\d+[.)])", entities, escaped)
    return escaped.replace("\n", "<br>")


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first row is its header."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def mark_findings(answer: Any) -> str:
    """An answer as a cell of a table, with ⟦ ⟧ around the spans of its findings."""
    text, at, parts = answer.text, 0, []
    for start, end in sorted(answer.spans):
        if end > max(start, at):
            start = max(start, at)
            parts += [escape_markdown(text[at:start]), "⟦", escape_markdown(text[start:end]), "⟧"]
            at = end
    shown = "".join([*parts, escape_markdown(text[at:])]).replace("⟧⟦", "")
    return shown or "(nothing)"


def list_cells(records: Records) -> DataFrame:
    """One row per arm and decoding: the table of cells.csv. The interval is by `interval`."""
    from pandas import DataFrame

    counts = "sound_and_ended sound ended loops lists drift points max_points wrong_claims".split()
    rows = []
    for (arm, decoding), own in records.answers.groupby(["arm", "decoding"], sort=False):
        low, high = interval(own, "sound_and_ended")[2:]
        base = {"arm": "base", "decoding": "plain" if arm == "base" else decoding}
        pairs = pair(records.answers, {"arm": arm, "decoding": decoding}, base)
        against = Comparison(pairs, "sound_and_ended") if len(pairs) else None
        overruled = 100 * own.overruled.sum() / max(1, own.tokens.sum())
        rows.append(
            {
                "arm": arm,
                "decoding": decoding,
                "answers": len(own),
                **own[counts].sum(),
                "interval_low": round(low, 4),
                "interval_high": round(high, 4),
                "better_than_base": against and against.larger,
                "worse_than_base": against and against.smaller,
                "p_against_base": against and round(against.p, 4),
                "mean_tokens": round(own.tokens.mean(), 1),
                "overruled_per_100_tokens": round(overruled, 2),
                "repeats": own.repeats.all(),
            }
        )
    cells = DataFrame(rows)
    if records.runs.empty:
        return cells
    numbers = records.runs.drop(columns=["seed", "selected", "evaluations"])
    return cells.merge(numbers.groupby("arm").mean(numeric_only=True).round(6), "left", "arm")


def list_main_cells(records: Records) -> DataFrame:
    """Main decodings by arms: sound and ended answers as text, or why there are none."""
    about, answers = records.about, records.answers
    arms = dict.fromkeys(arm for arm, _, _ in about["arms"].values())
    cells = answers.groupby(["arm", "decoding"]).apply(format_share).unstack()
    cells = cells.reindex(index=list(arms), columns=list(MAIN_DECODINGS)).astype(object)
    failed = {about["arms"][arm_id][0] for arm_id in records.failures}
    for arm in arms:
        cells.loc[arm] = cells.loc[arm].fillna("failed" if arm in failed else "not run")
    return cells


def summarise(records: Records, results: Mapping[str, Result]) -> list[str]:
    """Verdicts on the claims, and the best decoding, arm and eval loss, in a few sentences."""
    lines = []
    headings = {"shown": "Shown", "the opposite": "Contradicted, the opposite is shown"}
    headings |= {
        "not shown": f"Not shown, a net share of {RELEVANT:.0%} is excluded, or a condition of the "
        "claim fails",
        "undecidable": "Undecidable with so few questions",
        "not run": "Not run",
    }
    for verdict, heading in headings.items():
        own = [claim for claim in CLAIMS if results[claim.id][0] == verdict]
        text = ", ".join(claim.id for claim in own)
        if verdict in ("shown", "the opposite"):
            text = " ".join(f'{claim.id} "{claim.text}"' for claim in own)
        if own:
            lines.append(f"- **{heading} ({len(own)} of {len(CLAIMS)}):** {text}")
    answers = records.answers
    common = set.intersection(*(set(own.decoding) for _, own in answers.groupby("arm")))
    names = [name for name in answers[answers.distinct].decoding.unique() if name in common]
    if len(names) < 2:
        return lines
    good = answers.groupby("decoding").sound_and_ended.agg(["mean", "sum", "count"])
    names.sort(key=lambda name: -good["mean"][name])
    best, second = names[:2]
    counts = ", ".join(f"{name} {good['sum'][name]} of {good['count'][name]}" for name in names)
    found = Query("decoding", best, second, "sound_and_ended").run(answers)
    text = f"sound and ended answers of all arms: {counts}. {best} against {second}"
    lines.append(f"- **Decoding:** {text}: p = {found.p:.2g}.")
    own = select(answers, decoding=best).groupby("arm", sort=False)
    top, shares = own.sound_and_ended.mean().idxmax(), own.apply(format_share)
    text = f"under {best}, {top} has the most, {shares[top]}"
    found = Query("arm", top, "base", "sound_and_ended", decoding=best).run(answers)
    if top != "base" and found:
        text += f"; the base model has {shares['base']}, p = {found.p:.2g}"
    lines.append(f"- **Training:** {text}.")
    if len(records.runs):
        losses = records.runs.groupby("arm").eval_loss.mean()
        low = losses.idxmin()
        text = f"- **Eval loss:** the lowest, {losses[low]:.3f}, is of {low}: {shares[low]}."
        lines.append(text + " Arms with other sources have other held-out rows.")
    return lines


def list_changes(records: Records) -> list[list[str]]:
    """Header and rows: the single changes in the records, the largest effect first."""
    queries = [query.resolve(records) for query in CHANGES]
    found = [(each, query) for query in queries if (each := query.run(records.answers))]
    found.sort(key=lambda pair: -abs(pair[0].net[0]))
    rows = [["change", "sound and ended", "questions", "net share", "p"]]
    for each, query in found:
        texts = [f"{query.other} to {query.one}", f"{each.second:.0%} to {each.first:.0%}"]
        texts += [f"+{each.larger} -{each.smaller}", each.describe_net(), f"{each.p:.2g}"]
        rows.append(texts)
    return rows if found else []


def list_selections(records: Records) -> list[list[str]]:
    """Header and rows: the step each metric selects, with the sound and ended answers there.

    Only for runs with several evaluations that answered probes. The last row counts how often each
    metric selected a step with the most.
    """
    rows = [["arm", *(f"by {name}" for name in train.METRICS), "most"]]
    hits = dict.fromkeys(train.METRICS, 0)
    for run in records.runs.to_dict("records"):
        steps = {n: e for n, e in run["evaluations"].items() if e.get("eval_answers")}
        if len(steps) < 2 or not all(name in run["selected"] for name in train.METRICS):
            continue
        good = {step: int(each["eval_sound_and_ended"]) for step, each in steps.items()}
        best = max(good, key=lambda step: (good[step], -step))
        row = [run["arm"] + (f" (seed {run['seed']})" if run["seed"] else "")]
        for name in train.METRICS:
            step = run["selected"][name]
            hits[name] += good[step] == good[best]
            row.append(f"step {step}: {good[step]} of {int(steps[step]['eval_answers'])}")
        rows.append([*row, f"step {best}: {good[best]}"])
    count = len(rows) - 1
    return [*rows, ["has the most", *(f"{hits[n]} of {count}" for n in hits), ""]] if count else []


def list_readings(records: Records) -> list[list[str]]:
    """Header and rows: how often blind readers preferred the answers at the step selected by
    `answers`, and at the step selected by another metric. Empty without readings.csv.

    Each question of a run counts once, by the sum of its votes.
    """
    rows = []
    for metric, own in records.readings.groupby("metric", sort=False):
        votes = own.groupby(["arm", "question"]).vote.sum()
        pairs = votes.reset_index().assign(question=range(len(votes)))
        pairs = pairs.assign(better=pairs.vote > 0, better_other=pairs.vote < 0)
        found = Comparison(pairs, "better")
        equal = found.questions - found.larger - found.smaller
        counts = [f"{found.larger}", f"{found.smaller}", f"{equal}"]
        against = f"{metric} ({', '.join(own.arm.unique())})"
        rows.append([against, *counts, found.describe_net(), f"{found.p:.2g}"])
    header = ["against", "answers' step is better", "other step is better", "equal", "net share"]
    return [[*header, "p"], *rows] if rows else []


def list_examples(records: Records, results: Mapping[str, Result]) -> list[list[str]]:
    """Header and rows: for each claim that is shown or reversed, up to three answers that are part
    of the evidence, to the first such questions."""
    rows = []
    for claim in CLAIMS:
        verdict, evidence = results[claim.id][0], claim.evidence
        if verdict not in ("shown", "the opposite") or not evidence:
            continue
        sense = 1 if verdict == "shown" else -1
        if isinstance(evidence[0], Query):
            # The first that decides the claim: a harm is evidence of the opposite.
            queries = [query.resolve(records) for query in evidence]
            signs = {q: sense * q.sense * (-1 if q.is_harm else 1) for q in queries}
            runs = [(q, q.run(records.answers)) for q in queries]
            query = next((q for q, each in runs if each and each.sign == signs[q]), queries[0])
            found = query.pairs(records.answers)
            one, other = (found[f"{query.outcome}{end}"].astype(float) for end in ("", "_other"))
            found = found[(one - other) * signs[query] > 0]
        else:
            arm, decoding, outcome = evidence
            found = select(records.answers, arm=arm, decoding=decoding, **{outcome: sense == 1})
        found = found.sort_values("place", kind="stable").drop_duplicates("question")
        for each in found.head(3).itertuples():
            cell = [claim.id, f"{each.arm}, {each.decoding}", each.verdict]
            text = infer.shorten(each.text, 240)
            rows.append([*cell, *map(escape_markdown, (each.question, text))])
    return [["claim", "arm, decoding", "verdict", "question", "answer"], *rows] if rows else []


def list_side_by_side(records: Records) -> list[list[str]]:
    """Header and one row: the answers of `SIDE_BY_SIDE` to the first question, with their findings
    marked. Empty if an answer is missing."""
    first = select(records.answers, place=0)
    found = [select(first, arm=arm, decoding=decoding) for arm, decoding in SIDE_BY_SIDE]
    if any(own.empty for own in found):
        return []
    answers = [next(own.itertuples()) for own in found]
    header = [
        f"arm {each.arm}, decoding {each.decoding}: {each.verdict}, "
        + ("ended" if each.ended else "cut at the limit")
        for each in answers
    ]
    return [list(map(escape_markdown, header)), list(map(mark_findings, answers))]


NOTES = """*Sound and ended*: the judge finds no defect of form, and the stop token ended the answer
before the limit; in parentheses a 95% interval (Wilson; with several seeds, a question counts as
most of its answers do). *Drift*: the answer surprises the base model, continues as another speaker,
or invents a medicine. *Eval loss*: of the weights that were kept, on rows held out from the sources
that the arm trains on, so only arms with equal sources compare. `week3`, `week4`, `fixed` and `kit`
keep the best of several evaluations, the other arms the better of at most two at the end. C2 and
C12 are decided by whether the interval of a share is above or below one half, the other comparisons
by sign tests over the questions, p < 0.05, two-sided: `+a -b` means that the first has more on *a*
questions and less on *b*, and *net* is their difference as a share of the questions, with a 95%
interval (Agresti and Min). None of this says that an answer is medically correct, and none of it is
medical advice."""
SELECTION_NOTE = """The evaluation that each metric selects, and how many of its probe answers are
sound and ended; they have a lower token limit. `answers` ranks by sound answers, then by points."""
READINGS_NOTE = """Readers who saw neither arm nor step compared the answers of the two selected
steps. A pair of a run and a question counts once; pairs of one question are not independent."""


def make_report(records: Records, results: Mapping[str, Result]) -> str:
    """The study as markdown; `results` are those of the claims. Equal records give equal bytes."""
    about, answers = records.about, records.answers
    questions, trained = about["questions"], answers[answers.arm != "base"].arm.nunique()
    models = ["the base model"] * ("base" in set(answers.arm))
    models += [f"{trained} adapter{'s' * (trained > 1)}"] * (trained > 0)
    intro = " and ".join(models)
    if len(records.runs):
        rows = sorted(records.runs.train_rows.astype(int))
        rows = f"{rows[0]} to {rows[-1]} rows" if rows[0] < rows[-1] else f"{rows[0]} rows each"
        intro += f", trained on {rows},"
    intro += f" answered {len(questions)} questions under up to {answers.decoding.nunique()} "
    intro = intro.capitalize() + "decodings. C1 to C15 are claims of the story that README tells."
    failures = [
        f"- {arm} failed: {escape_markdown(why[:600])}" for arm, why in records.failures.items()
    ]
    claims = []
    for claim in CLAIMS:
        verdict, numbers = results[claim.id]
        line = f"- **{claim.id}: {verdict}.** {claim.text} {numbers[0].upper()}{numbers[1:]}."
        if claim.id in ABOUT_QUESTIONS and about.get("own_questions"):
            line += " It is about the story's questions; these are yours."
        claims.append(line)
    cells = list_main_cells(records)
    losses = records.runs.groupby("arm").eval_loss.mean().astype(object).map("{:.3f}".format)
    cells.insert(0, "eval loss", losses.reindex(cells.index).fillna(""))
    header = [cells.index.name, *cells.columns]
    parts = [
        f"# Ablation of {escape_markdown(about['base_model'])}",
        intro,
        "\n".join(summarise(records, results)),
        "![Verdicts, and eval loss against sound answers](ablation.png)",
        NOTES.replace("\n", " "),
        f"Sound and ended answers to {len(questions)} questions:",
        "\n".join([format_table([header, *cells.itertuples()]), "", *failures]),
        Comparison.describe_power(len(questions)).capitalize() + ".",
        "## Claims",
        "\n".join(claims),
    ]
    if changes := list_changes(records):
        note = "Decodings over all trained arms, arms over all common decodings."
        parts += ["## Single changes", note, format_table(changes)]
    if selections := list_selections(records):
        note = SELECTION_NOTE.replace("\n", " ")
        parts += ["## What each metric selects", note, format_table(selections)]
    if readings := list_readings(records):
        parts += ["## Blind readers", READINGS_NOTE.replace("\n", " "), format_table(readings)]
    if side_by_side := list_side_by_side(records):
        note = "⟦ ⟧ mark what the findings are about. *Sound* is about form, not about facts."
        parts += [f"## {escape_markdown(questions[0])}", format_table(side_by_side), note]
    if examples := list_examples(records, results):
        note = (
            "Of each claim that is shown or reversed, up to three answers to the first questions."
        )
        parts += ["## Evidence", note, format_table(examples)]
    machines = "".join(f"- {escape_markdown(each)}\n" for each in answers.machine.unique())
    machines += f"- `{about['command'].replace('`', ' ')}`\n"
    parts += [f"{machines}- all numbers: [cells.csv](cells.csv); all answers: [cells](cells)\n"]
    return "\n\n".join(parts)


# --- The picture ---------------------------------------------------------------------------------

# By the first column that applies. Dark and light alternate, so that neighbours differ in grey.
COLOURS: dict[str, tuple[str, str]] = {
    "sound and ended": ("sound_and_ended", "#08519c"),
    "sound, cut at the limit": ("sound", "#9ecae1"),
    "drift": ("drift", "#a50f15"),
    "loop, list or empty": ("unsound", "#fdae6b"),
}
LIGHT = ("#9ecae1", "#fdae6b")


def draw_picture(records: Records, path: Path) -> None:
    """Draws shares of verdicts under the main decodings, and eval loss against sound answers."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cells, answers = list_main_cells(records), records.answers.copy()
    for label, (column, _) in reversed(COLOURS.items()):
        answers.loc[answers[column], "label"] = label
    shares = answers.groupby(["arm", "decoding"]).label.value_counts(normalize=True)
    rows, columns = list(cells.index), list(cells.columns)
    widths = [1.5 + 2.2 * len(columns)] + ([4.6] if len(records.runs) else [])
    figure = Figure(figsize=(sum(widths) + 1, 0.36 * len(rows) + 2), layout="constrained")
    grid, *others = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for (line, arm), (place, decoding) in itertools.product(enumerate(rows), enumerate(columns)):
        left = 1.08 * place
        if (arm, decoding) not in shares:
            grid.text(left, line, cells.loc[arm, decoding], va="center", fontsize=8, color="0.5")
        for label, (_, colour) in COLOURS.items():
            share = shares.get((arm, decoding, label), 0.0)
            grid.barh(line, share, 0.8, left, color=colour)
            if share >= 0.12:
                shade = "black" if colour in LIGHT else "white"
                middle = {"ha": "center", "va": "center", "fontsize": 8, "color": shade}
                grid.text(left + share / 2, line, f"{share:.0%}", **middle)
            left += share
    grid.set(xlim=(0, 1.08 * len(columns) - 0.08), ylim=(len(rows) - 0.4, -0.6))
    grid.set_yticks(range(len(rows)), rows)
    grid.set_xticks([1.08 * place + 0.5 for place in range(len(columns))], columns)
    grid.xaxis.tick_top()
    grid.tick_params(length=0)
    grid.spines[:].set_visible(False)
    grid.set_xlabel(f"share of answers to {len(records.about['questions'])} questions, by decoding")
    grid.set_ylabel(cells.index.name)
    handles = [Patch(facecolor=shade, label=label) for label, (_, shade) in COLOURS.items()]
    legend = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": 4, "frameon": False}
    grid.legend(handles=handles, **legend)
    for axes in others:
        draw_losses(axes, records)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    data.write_atomic(path, image.getvalue())


def draw_losses(axes: Axes, records: Records) -> None:
    """Draws the share of sound and ended answers under `kit` over eval loss, a point per arm."""
    losses = records.runs.groupby("arm").eval_loss.mean()
    shares = select(records.answers, decoding="kit").groupby("arm").sound_and_ended.mean()
    losses = losses[losses.map(math.isfinite)]
    points = [(loss, shares[arm], arm) for arm, loss in losses.items() if arm in shares]
    if not points:
        return
    x, y, _ = zip(*points, strict=True)
    axes.scatter(x, y, color="#08519c", zorder=3)
    axes.set(xlim=(min(*x, max(x) - 0.05) - 0.02, max(x) + 0.02), ylim=(-0.02, 1.02))
    # Labels beside the axes, in the order of the points, at least a line apart.
    points.sort(key=lambda each: (each[1], -each[0]))
    heights: list[float] = []
    for _, y, _ in points:
        heights.append(max(y, heights[-1] + 0.065) if heights else y)
    shift = sum(height - y for height, (_, y, _) in zip(heights, points, strict=True)) / len(points)
    for height, (x, y, arm) in zip(heights, points, strict=True):
        style = {"va": "center", "fontsize": 9, "textcoords": axes.get_yaxis_transform()}
        line = {"arrowstyle": "-", "color": "0.7", "lw": 0.7, "relpos": (0, 0.5)}
        style |= {"arrowprops": line, "annotation_clip": False}
        axes.annotate(arm, (x, y), (1.04, height - shift), **style)
    if "base" in shares:
        axes.axhline(shares["base"], color="0.5", ls=":", label="base model", zorder=0)
        axes.legend(loc="lower right", frameon=False)
    axes.set(xlabel="eval loss (nats per token)", ylabel="sound and ended, decoding kit")
    axes.locator_params("x", nbins=4)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)


# --- Command -------------------------------------------------------------------------------------


def write_report(folder: Path) -> tuple[Records, dict[str, Result]]:
    """Writes report, picture and cells.csv; returns the records and the claims' results. Raises
    UsageError as `Records.read`."""
    records = Records.read(folder)
    results = {claim.id: claim.decide(records) for claim in CLAIMS}
    with data.writing(folder):
        data.write_atomic(folder / "cells.csv", list_cells(records).to_csv(index=False))
        draw_picture(records, folder / "ablation.png")
        data.write_atomic(folder / "ablation.md", make_report(records, results))
    return records, results


def main(config: AblateConfig) -> int:
    """Runs what is missing, then writes the report. Returns 1 if an arm failed, else 0."""
    study = None if config.table else make_study(config)
    if config.answer:
        from filelock import FileLock

        arms = {arm.id: arm for arm in study.arms}
        if config.answer not in arms:
            raise UsageError(f"--answer {config.answer}: expected one of {', '.join(arms)}.")
        # A process of a study that was killed may still be answering.
        with FileLock(study.folder / "locks" / config.answer):
            write_cells(study, arms[config.answer])
        return 0
    infer.handle_signals()
    if study:
        part, parts = map(int, config.shard.split("/"))
        arms = study.arms[part::parts]
        if not arms:
            print(f"--shard {config.shard} has none of the {len(study.arms)} arms.")
            return 0
        if len(set(study.train_rows.values())) > 1:
            counts = ", ".join(f"{name} {count}" for name, count in study.train_rows.items())
            print(f"The mixes differ in size: {counts}. Lower --num-rows.", file=sys.stderr)
        if config.dry_run or any(map(study.missing, arms)):
            print(study.format_plan(arms), flush=True)
        if config.dry_run:
            return 0
        about = {
            "command": shlex.join(["python", "ablate.py", *sys.argv[1:]]),
            "base_model": study.profile.hub_id,
            "own_questions": config.probes is not None,
            "questions": [probe.question for probe in study.probes],
            "arms": {
                arm.id: (arm.name, arm.seed, {n: study.settings(arm, n) for n in arm.decodings})
                for arm in study.arms
            },
        }
        for folder in ("cells", "failures", "locks", "logs", "runs"):
            with data.writing(config.folder):
                (config.folder / folder).mkdir(parents=True, exist_ok=True)
        data.write_atomic(config.folder / "study.json", json.dumps(about, indent=2) + "\n")
        run_study(study, arms, config.workers or study.profile.workers)
    records, results = write_report(config.folder)
    for claim in CLAIMS:
        print(f"{claim.id:<4} {results[claim.id][0]:<13} {claim.text}")
    print(f"\n{config.folder / 'ablation.md'}: report; ablation.png, cells.csv and cells beside it")
    how = "without --table" if config.table else "with the same command"
    for arm, reason in records.failures.items():
        print(f"{arm} failed, and runs again {how}: {reason}", file=sys.stderr)
    return 1 if records.failures else 0


MEMORY_ADVICE = "Lower --workers, then --num-probes, then --num-rows."

if __name__ == "__main__":
    data.run_command(AblateConfig, main, __doc__, MEMORY_ADVICE)

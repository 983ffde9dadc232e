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

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import data
import infer
import train
from data import Profile, UsageError
from infer import DECODINGS, Decoding

if TYPE_CHECKING:
    from pandas import DataFrame, Series

# --- Arms and decodings --------------------------------------------------------------------------

# Flags of train.py. The story selected weights by loss; the kit selects them by answers.
FIXED = {"mix": "rebalanced", "target_modules": "all-linear", "epochs": 2, "pad": "native"}
FIXED |= {"metric_for_best_model": "eval_loss"}
WEEK4 = FIXED | {"mix": "week4", "target_modules": "attention"}
# Evaluated near the end only, and without probes, whose answers take as long as the training.
BRIEF = WEEK4 | {"eval_every": 0.99, "num_probes": 0}
# At this rank, LoRA on attention has as many parameters as on all linear layers at rank 16, within
# 1% for both base models.
WIDE_R = 42
# Each arm named after `week4` is that run with a single change.
TRAINING_ARMS: dict[str, dict[str, Any]] = {
    "week3": WEEK4 | {"mix": "chatdoctor", "epochs": 1, "pad": "added"},
    "week4": WEEK4,
    "fixed": FIXED,
    "kit": FIXED | {"epochs": 1, "metric_for_best_model": "answers"},
    "week4-1-epoch": BRIEF | {"epochs": 1},
    "week4-rebalanced": BRIEF | {"mix": "rebalanced"},
    "week4-all-linear": BRIEF | {"target_modules": "all-linear"},
    "week4-wide-attention": BRIEF | {"r": WIDE_R, "lora_alpha": 2 * WIDE_R},
}
# Arms that --rows leaves out, since it has no mix, and what the report compares instead.
MIX_ARMS = {"week4-rebalanced": None, "week4-all-linear": "fixed"}
TRAINED = list(TRAINING_ARMS)

MAIN_DECODINGS = ["story-collapse", "story-fix", "kit"]
# The other decodings are cut from the same generations.
DISTINCT_DECODINGS = ["plain", *MAIN_DECODINGS]
CAPPED = {"collapse-cap-128": "story-collapse", "fix-cap-128": "story-fix"}
CAPPED |= {"plain-cap-128": "plain"}
COLLAPSE = DECODINGS["story-collapse"]
DECODING_ARMS: dict[str, Decoding] = {
    **{name: DECODINGS[name] for name in DISTINCT_DECODINGS},
    "collapse-no-ban": dataclasses.replace(COLLAPSE, no_repeat_ngram_size=0, count_prompt=False),
    "collapse-stop": dataclasses.replace(COLLAPSE, stop="end-of-turn"),
    "collapse-cap-128": dataclasses.replace(COLLAPSE, max_new_tokens=128),
    "fix-cap-128": dataclasses.replace(DECODINGS["story-fix"], max_new_tokens=128),
    "plain-cap-128": dataclasses.replace(DECODINGS["plain"], max_new_tokens=128),
}
# The decodings of each arm: `base` is the base model, the others are training runs.
ARMS: dict[str, list[str]] = {
    arm: MAIN_DECODINGS if arm.startswith("week4-") else list(DECODING_ARMS)
    for arm in ("base", *TRAINING_ARMS)
}
# Arms and decodings whose answers to the first question the report shows side by side.
SIDE_BY_SIDE = (("week3", "plain"), ("week4", "story-collapse"), ("fixed", "story-fix"))


# --- Flags and the study -------------------------------------------------------------------------


@dataclass(frozen=True)
class AblateConfig(data.RowsFlags):
    """Flags of ablate.py."""

    name: str | None = None
    """Name of the study's folder. Unset: `story`, and the names of given files."""
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
        for name, most in (("num_probes", len(infer.read_probes(self.probes))), ("workers", 64)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected 1 to {most}.")
        shard = re.fullmatch(r"(\d{1,4})/(\d{1,4})", self.shard)
        if not shard or int(shard[1]) >= int(shard[2]):
            raise ValueError(f"--shard {self.shard}: expected I/N with I from 0 to N - 1.")
        if self.table and (self.dry_run or self.answer):
            raise ValueError("--table only writes the report. Remove it, or the other flag.")
        train.TrainConfig(name=self.name, **self.given)  # checks the flags that both have

    @property
    def given(self) -> dict[str, Any]:
        """The flags that are passed on to train.py, if they are given."""
        names = {each.name for each in dataclasses.fields(train.TrainConfig)} - {"name", "dry_run"}
        flags = [each for each in dataclasses.fields(self) if each.name in names]
        flags = [(each.name, getattr(self, each.name), each.default) for each in flags]
        return {name: value for name, value, default in flags if value != default}

    @property
    def folder(self) -> Path:
        """The study's folder."""
        sources = (self.rows, self.conversational, self.encyclopedic, self.probes)
        parts = ["story", *(train.name_rows(each) for each in sources if each)]
        return infer.RUNS / "ablate" / (self.name or "-".join(parts))


@dataclass(frozen=True)
class Arm:
    """A model, and the decodings under which it answers."""

    name: str  # `base`, or one of `TRAINING_ARMS`
    decodings: Mapping[str, Decoding]
    command: Sequence[str]  # Python's arguments to train it; none for the base model


@dataclass(frozen=True)
class Study:
    """The arms of a study, and what they share."""

    folder: Path
    profile: Profile
    arms: Sequence[Arm]
    probes: Sequence[infer.Probe]
    system_prompt: str | None  # None: an adapter's own, the story's for the base model
    settings: str  # digest of everything that the answers and verdicts depend on

    def missing(self, arm: Arm) -> list[str]:
        """The decodings whose cells are not written yet."""
        paths = {name: self.folder / "cells" / f"{arm.name}.{name}.jsonl" for name in arm.decodings}
        return [name for name, path in paths.items() if not path.is_file()]


def make_study(config: AblateConfig) -> Study:
    """The study that the flags describe. Raises UsageError as `data.resolve_profile` and
    `data.RowsConfig.load`."""
    profile, given = data.resolve_profile(config.profile, config.base_model), config.given
    probes = infer.read_probes(config.probes)[: config.num_probes or profile.ablation_probes]
    names = ("rows",) if config.rows else ("conversational", "encyclopedic")
    system_prompt = config.system_prompt
    if given.keys() & set(names):
        system_prompt = train.TrainConfig(**given).load(profile).system_prompt
    sources = [Path(given.get(name) or getattr(profile, name)) for name in names]
    sources = [path.read_bytes() if path.is_file() else path for path in sources]
    given |= {"profile": profile.name, "num_rows": config.num_rows or profile.ablation_rows}
    given["num_probes"] = min(len(probes), 26)  # at each evaluation
    arms = []
    for arm, decodings in ARMS.items():
        if config.rows and arm in MIX_ARMS:
            continue
        flags = given | TRAINING_ARMS.get(arm, {})
        flags |= {"output_dir": config.folder / "runs", "name": arm}
        if config.rows:
            flags.pop("mix", None)
        words = ((f"--{name.replace('_', '-')}", str(value)) for name, value in flags.items())
        command = [] if arm == "base" else ["train.py", *itertools.chain(*words)]
        arms.append(Arm(arm, {name: DECODING_ARMS[name] for name in decodings}, command))
    checks = {name: check.threshold for name, check in infer.CHECKS.items()}
    settings = repr((arms, probes, system_prompt, sources, checks, profile.base_model))
    digest = hashlib.sha256(settings.encode()).hexdigest()
    return Study(config.folder, profile, arms, probes, system_prompt, digest)


# --- Running -------------------------------------------------------------------------------------


def write_cells(study: Study, arm: Arm) -> None:
    """Loads the arm's model, and writes its judged answers under the decodings that are missing.
    Raises UsageError as `infer.check_adapter` and `infer.load_for_inference`."""
    import torch
    from tqdm import tqdm

    profile, adapter = study.profile, None
    infer.prepare_environment(profile)
    if arm.command:
        folder = study.folder / "runs" / arm.name / "adapter"
        adapter = infer.check_adapter(folder, profile.name, profile.base_model)
    with infer.quiet_libraries():
        loaded = infer.load_for_inference(profile, adapter, study.system_prompt)
    loaded.probes = study.probes
    machine = "CPU" if profile.name == "cpu" else torch.cuda.get_device_name()
    machine += f", {torch.get_num_threads()} threads, torch {torch.__version__}"
    decodings = {name: arm.decodings[name] for name in study.missing(arm)}
    questions = [probe.question for probe in study.probes]
    requests = [infer.Request(each, own) for own in decodings.values() for each in questions]
    with tqdm(total=infer.count_new_tokens(requests), unit="token", desc="answering") as bar:
        answers = infer.answer_requests(loaded, requests, bar.update)
    # The first question again, in another batch.
    repeated, judged = infer.answer_requests(loaded, requests[:: len(questions)]), {}
    for place, (name, own) in enumerate(decodings.items()):
        answered = answers[place * len(questions) : (place + 1) * len(questions)]
        cell = {"arm": arm.name, "decoding_arm": name, "machine": machine}
        cell |= {"stop_ids": infer.stop_ids(own, loaded.model, loaded.tokenizer)}
        cell |= {"repeats": answered[0].token_ids == repeated[place].token_ids}
        text = ""
        for each in tqdm(answered, unit="answer", desc=f"judging {name}"):
            key = (each.question, each.sha256, each.finish_reason)
            if key not in judged:  # equal answers of several decodings are judged once
                judged[key] = infer.judge_answers(loaded, [each])[0]
            record = cell | dataclasses.replace(judged[key], answer=each).to_record()
            del record["seconds"]  # equal answers are equal bytes
            text += json.dumps(record, ensure_ascii=False) + "\n"
        data.write_atomic(study.folder / "cells" / f"{arm.name}.{name}.jsonl", text)


RUNNING: list[subprocess.Popen] = []  # the processes that the study has started


def run_logged(command: Sequence[str], log: Path) -> int:
    """Runs Python with these arguments; its output goes to the log. Returns the exit code."""
    with log.open("ab") as output:
        # In a session of its own, Ctrl-C reaches only this process, which passes it on.
        streams = {"stdout": output, "stderr": output, "start_new_session": True}
        RUNNING.append(process := subprocess.Popen([sys.executable, *command], **streams))
        return process.wait()


def read_last_line(log: Path) -> str:
    """The last line of a log: of a failed process its error, of a running one its progress bar."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return data.escape_controls(re.split(r"[\r\n]+", text.strip())[-1])


def run_arm(study: Study, arm: Arm) -> str | None:
    """Trains the arm, unless it is the base model, and answers with it, each in its own process.
    Returns why it failed, or None."""
    log = study.folder / "logs" / f"{arm.name}.log"
    code, step = 0, "training"
    if arm.command:
        command = [str(data.HERE / arm.command[0]), *arm.command[1:]]
        while (code := run_logged(command, log)) == train.BUSY:
            time.sleep(5)  # the study was killed, and this run continues
        if code == train.OTHER_VALUES:  # of a study whose study.json was removed
            code = run_logged([*command, "--restart"], log)
    if code == 0:
        step, code = "answering", run_logged([*sys.orig_argv[1:], "--answer", arm.name], log)
    how = "killed, often for lack of memory" if code == -9 else f"exit code {code}"
    return f"{step} failed ({how}; log: {log}). {read_last_line(log)[-600:]}" if code else None


def run_study(study: Study, arms: Sequence[Arm], workers: int) -> None:
    """Runs the arms with missing cells, several at the same time, and records why arms failed.
    Raises `infer.Interrupted` on a signal, after training runs have saved."""
    from tqdm import tqdm

    os.environ.setdefault("TQDM_MININTERVAL", "10")  # of the processes, which write to logs
    if workers > 1:
        # Also if fewer arms are left, since the results depend on the number of threads.
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    pool, futures = ThreadPoolExecutor(workers), {}
    try:
        for arm in arms:
            failure = study.folder / "failures" / f"{arm.name}.txt"
            failure.unlink(missing_ok=True)
            if study.missing(arm):
                futures[pool.submit(run_arm, study, arm)] = failure
        infer.report(f"The output of the arms is in {study.folder / 'logs'}")
        left = set(futures)
        with tqdm(total=len(left), unit="arm", disable=None) as bar:
            while left:
                done, left = wait(left, timeout=2, return_when=FIRST_COMPLETED)
                for future in done:
                    if reason := future.result():
                        data.write_atomic(futures[future], reason)
                    bar.update()
                    bar.write(f"{futures[future].stem}: {reason or 'done'}", sys.stderr)
                names = sorted(futures[each].stem for each in left if each.running())
                lines = [read_last_line(study.folder / "logs" / f"{name}.log") for name in names]
                shown = (f"{name}: {line[:60]}" for name, line in zip(names, lines, strict=True))
                bar.set_postfix_str("; ".join(shown))
    except infer.Interrupted as interrupted:
        message = f"Interrupted. Finished cells are kept in {study.folder}; run the same command "
        raise infer.Interrupted(interrupted.number, message + "to resume.") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        stopped: list[subprocess.Popen] = []
        try:
            while not all(future.done() for future in futures):
                while RUNNING:  # one signal each: at a second one train.py does not save
                    stopped.append(RUNNING.pop())
                    stopped[-1].terminate()
                time.sleep(0.2)
        finally:
            for process in stopped:
                process.kill()  # only after a second signal are any left


# --- Records -------------------------------------------------------------------------------------

GOOD = "sound_and_ended"
COUNTS = [GOOD, *"sound ended loops lists drift points max_points wrong_claims".split()]
RUN_NUMBERS = "eval_loss_before eval_loss steps training_seconds adapter_bytes train_rows".split()


def read_cell(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file. Raises OSError or ValueError if it is missing or corrupt."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def flatten_answer(record: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a line of a cell that the report uses."""
    found = {finding["name"] for finding in record["findings"]}
    facts = record.get("facts") or {"named": [], "missing": [], "wrong": []}
    max_points = len(facts["named"]) + len(facts["missing"])
    ended = record["finish_reason"] == "stop"
    return {
        **{name: str(record[name]) for name in ("text", "verdict", "machine")},
        "stop_ids": set(map(int, record["stop_ids"])),
        GOOD: not found and ended,
        "sound": not found,
        "unsound": bool(found),
        "ended": ended,
        "loops": bool(found & {"loop", "repetition"}),
        "lists": "list" in found,
        # The answer surprises the base model, continues as another speaker, or invents a medicine.
        "drift": bool(found & {"surprisal", "leak", "invented-medicine"}),
        "list items": infer.measure_list(record["text"])[0],
        "points": len(facts["named"]) if max_points else math.nan,
        "max_points": max_points,
        "wrong_claims": len(facts["wrong"]),
        "tokens": int(record["answer_tokens"]),
        "overruled": int(record["num_overruled"]),
        "repeats": bool(record["repeats"]),
    }


@dataclass(frozen=True)
class Records:
    """The records of a study."""

    about: Mapping[str, Any]  # study.json: its command, questions and arms
    cells: Mapping[tuple[str, str], DataFrame]  # by arm and decoding: a row per question
    runs: Mapping[str, Mapping[str, float]]  # `RUN_NUMBERS` by arm
    evaluations: Mapping[str, tuple[dict[str, int], dict[int, int]]]  # see `read`
    failures: Mapping[str, str]  # why arms failed

    @classmethod
    def read(cls, folder: Path) -> Records:
        """The study's records; of the evaluations of an arm the step that each metric selected and,
        by step, the sound and ended answers to probes, without step 0. Raises UsageError if there
        are none, or one is corrupt."""
        from pandas import DataFrame

        path, cells, runs, evaluations, failures = folder / "study.json", {}, {}, {}, {}
        if not path.is_file():
            raise UsageError(f"{path} does not exist. Run the study first: python ablate.py")
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            about |= {name: str(about[name]) for name in ("command", "base_model")}
            about |= {name: list(map(str, about[name])) for name in ("questions", "arms")}
            for arm in about["arms"]:
                for decoding in DECODING_ARMS:
                    path = folder / "cells" / f"{arm}.{decoding}.jsonl"
                    if path.is_file():
                        lines = read_cell(path)
                        others = next(iter(cells.values()), lines)
                        if not lines or len(lines) != len(others):
                            raise ValueError(f"{len(lines)} answers, and {len(others)} in others")
                        cells[arm, decoding] = DataFrame(map(flatten_answer, lines))
                path = folder / "failures" / f"{arm}.txt"
                if path.is_file():
                    failures[arm] = path.read_text(encoding="utf-8")
                path = folder / "runs" / arm / "run.json"
                if path.is_file():
                    numbers = json.loads(path.read_text(encoding="utf-8"))["numbers"]
                    numbers["eval_loss_before"] = numbers["before"]["eval_loss"]
                    numbers["eval_loss"] = numbers["chosen"]["eval_loss"]
                    runs[arm] = {name: float(numbers[name]) for name in RUN_NUMBERS}
                    path = path.with_name("metrics.jsonl")
                    lines = [line for line in read_cell(path) if line.get("eval_answers")]
                    good = {int(line["step"]): int(line[f"eval_{GOOD}"]) for line in lines}
                    evaluations[arm] = dict(numbers["selected"]), {n: good[n] for n in good if n}
        except Exception as error:  # whatever a corrupt file leads to
            problem = f"{path} is a broken record ({error!r}). Remove it (of a run, its folder and "
            problem += "the arm's cells), and run the study's command, without --table."
            raise UsageError(problem) from None
        if not cells:
            raise UsageError(f"{folder} has no finished cells. Run python ablate.py. {failures}")
        return cls(about, cells, runs, evaluations, failures)

    @functools.cached_property
    def table(self) -> DataFrame:
        """One row per arm and decoding: cells.csv."""
        from pandas import DataFrame

        rows = []
        for (arm, decoding), own in self.cells.items():
            row = {"arm": arm, "decoding": decoding, "answers": len(own)}
            row |= own[COUNTS].sum().astype(int)
            row["share"], row["interval_low"], row["interval_high"] = count_share(own[GOOD])
            row |= {"mean_tokens": own.tokens.mean(), "repeats": own.repeats[0]}
            row["overruled_per_100_tokens"] = 100 * own.overruled.sum() / own.tokens.sum()
            rows.append(row | {name: self.runs.get(arm, {}).get(name) for name in RUN_NUMBERS})
        return DataFrame(rows).round(4).astype(dict.fromkeys(RUN_NUMBERS, float))


# --- Statistics ----------------------------------------------------------------------------------

# The smallest net share of questions that matters. A claim is `not shown` if the interval of a net
# share excludes it, and `undecidable` if the questions are too few for that.
RELEVANT = 0.2
Result = tuple[str, str]  # the verdict on a claim, and its numbers
NOT_RUN: Result = ("not run", "the study has no such answers")


def count_share(outcomes: Series) -> tuple[str, float, float]:
    """`(text, low, high)`: how many outcomes are true, and the 95% interval of their share (Wilson
    1927)."""
    from scipy.stats import binomtest

    count, total = int(outcomes.sum()), len(outcomes)
    share = binomtest(count, total).proportion_ci(method="wilson")
    return f"{count} of {total} ({share.low:.0%} to {share.high:.0%})", share.low, share.high


@dataclass(frozen=True)
class Query:
    """Do answers of `one` have more of an outcome than those of `other` (fewer, if sense is -1)?

    Answers of several cells to one question are not independent, so each question counts once, by
    the sum of its differences. The effect is the net share of questions: those with more of the
    outcome, less those with fewer.
    """

    one: str  # an arm or a decoding, as `other`
    other: str
    outcome: str = GOOD  # a column of `flatten_answer`
    sense: int = 1
    within: Sequence[str] = ()  # decodings of the two arms, or arms of the two decodings; () is all
    is_harm: bool = False  # whether the outcome counts against the claim

    def run(self, records: Records) -> SimpleNamespace | None:
        """The effect and its numbers, None if there are no such cells."""
        import numpy
        from scipy.stats import binomtest

        cells, one, names = records.cells, self.one, {self.one: self.other}
        if {self.one, self.other} <= ARMS.keys():
            one = one if one in records.about["arms"] else MIX_ARMS.get(one)
            names = self.within or DISTINCT_DECODINGS
            pairs = [((one, name), (self.other, name)) for name in names]
        else:
            names, arms = CAPPED if self.other == "larger limit" else names, self.within or ARMS
            pairs = [((arm, a), (arm, b)) for arm in arms for a, b in names.items()]
        pairs = [(cells[a], cells[b]) for a, b in pairs if a in cells and b in cells]
        values = numpy.array([[cell[self.outcome] for cell in pair] for pair in pairs], float)
        # By pair, side and question, without questions that have no points.
        values = values[:, :, ~numpy.isnan(values[0, 0])] if pairs else values
        if not values.size:
            return None
        change = (values[:, 0] - values[:, 1]).sum(axis=0)
        more, fewer = int((change > 0).sum()), int((change < 0).sum())
        # The two-sided sign test, ties left out (Dixon and Mood 1946).
        p = float(binomtest(more, more + fewer).pvalue) if more + fewer else 1.0
        # The net share's 95% interval (Agresti and Min 2005): half an observation is added to each
        # cell of the table of pairs.
        net, size = more - fewer, len(change) + 2
        spread = 1.96 * math.sqrt(more + fewer + 1 - net**2 / size)
        low, high = max(-1.0, (net - spread) / size), min(1.0, (net + spread) / size)
        effect = f"{net / len(change):+.0%} [{low:+.0%}, {high:+.0%}], p = {p:.2g}"
        style = ".3g" if self.outcome in ("points", "list items") else ".0%"
        first, second = (f"{mean:{style}}" for mean in values.mean(axis=(0, 2)))
        text = f"{self.outcome.replace('_', ' ')}: {one} {first}, {self.other} {second} (pairs of "
        text += f"cells: {len(pairs)}; +{more} -{fewer} of {len(change)} questions, net {effect})"
        return SimpleNamespace(
            query=self,
            pairs=pairs,
            p=p,
            net=net / len(change),
            low=low,
            high=high,
            sign=(1 if net > 0 else -1) * self.sense if p < 0.05 else 0,  # 1: yes, -1: the reverse
            is_absent=max(self.sense * low, self.sense * high) < RELEVANT,
            change=f"{self.other} to {one} {effect}",
            text=text,
        )


def compare(records: Records, *queries: Query) -> Result:
    """The first decision rule: the verdict on a claim by its queries.

    It is `shown` if every query that is not a harm is significant in its direction, and every harm
    is insignificant and its interval excludes `RELEVANT`; `the opposite` if every query is
    significant in the other direction, or a harm is significant and no query. Otherwise `not shown`
    if a harm is significant, or a query's interval excludes `RELEVANT`; and `undecidable` if not.
    """
    found = [query.run(records) for query in queries]
    if None in found:
        return NOT_RUN
    effects = [each for each in found if not each.query.is_harm]
    harms = [each for each in found if each.query.is_harm]
    signs, is_harmful = {each.sign for each in effects}, any(each.sign == 1 for each in harms)
    verdict = "undecidable"
    if signs == {1} and not is_harmful and all(each.is_absent for each in harms):
        verdict = "shown"
    elif signs == {-1} or (is_harmful and 1 not in signs):
        verdict = "the opposite"
    elif is_harmful or any(each.is_absent for each in effects):
        verdict = "not shown"
    return verdict, "; ".join(each.text for each in found)


def count_most(records: Records, arm: str, decoding: str, outcome: str) -> Result:
    """The second decision rule: a claim is shown if the interval of a cell's share is above one
    half, and reversed if it is below."""
    if (arm, decoding) not in records.cells:
        return NOT_RUN
    text, low, high = count_share(records.cells[arm, decoding][outcome])
    verdict = "shown" if low > 0.5 else "the opposite" if high < 0.5 else "undecidable"
    return verdict, f"{outcome.replace('_', ' ')}: {arm} under {decoding} {text}"


# --- Claims --------------------------------------------------------------------------------------


def check_loss(records: Records) -> Result:
    """C1: the loss fell, and there are fewer sound and ended answers than of the base model."""
    verdict, text = compare(records, Query("week4", "base", GOOD, -1, ["story-collapse"]))
    if verdict == "not run" or "week4" not in records.runs:
        return NOT_RUN
    before, after = (records.runs["week4"][name] for name in ("eval_loss_before", "eval_loss"))
    is_shown = verdict != "shown" or after < before
    return verdict if is_shown else "not shown", f"eval loss {before:.3f} to {after:.3f}; {text}"


def check_stop(records: Records) -> Result:
    """C8: not run if the generation config already names the end-of-turn token."""
    query = Query("collapse-stop", "story-collapse")
    found = query.run(records)
    if found and all(own.stop_ids[0] <= config.stop_ids[0] for own, config in found.pairs):
        return "not run", "the base model's generation config already names this token"
    return compare(records, query)


def check_cap(records: Records) -> Result:
    """C10: fewer unsound answers under a smaller cap; also counts what the cap cures or hides."""
    query = Query("smaller limit", "larger limit", "unsound", -1)
    if not (found := query.run(records)):
        return NOT_RUN
    cured = sum((small[GOOD] & ~large[GOOD]).sum() for small, large in found.pairs)
    hidden = sum((one.sound & ~one.ended & other.unsound).sum() for one, other in found.pairs)
    verdict, text = compare(records, query)
    return verdict, f"{text}; cured {cured} answers, cut {hidden} before they became unsound"


def check_pad(records: Records) -> Result:
    """C11: by the exact sizes for Llama 3.2 3B."""
    arch, dtypes = data.PROFILES["t4"].architecture, (None, "float16", "float32")
    sizes = [train.count_adapter(arch, "attention", 16, dtype)[1] for dtype in dtypes]
    text = "Llama 3.2 3B: {:,} bytes; with an added token {:,} (16-bit), {:,} (fp32)".format(*sizes)
    return ("shown" if sizes[1] >= 10 * sizes[0] else "not shown"), text


def check_bytes(records: Records) -> Result:
    """C13: greedy answers generated again in another batch have the same tokens."""
    names, cells = DISTINCT_DECODINGS, records.cells
    own = [bool(cells[key].repeats[0]) for key in cells if key[1] in names]
    text = f"the first question in another batch: equal tokens in {sum(own)} of {len(own)} cells"
    return ("shown" if all(own) else "the opposite", text) if own else NOT_RUN


def check_decodings(records: Records) -> Result:
    """C15: two decodings of the same weights, and so of one eval loss, differ in sound answers.
    Reports the pair with the smallest p, with a Bonferroni correction for all pairs."""
    pairs = itertools.combinations(DISTINCT_DECODINGS, 2)
    found = [each for pair in pairs if (each := Query(*pair, within=TRAINED).run(records))]
    if not found:
        return NOT_RUN
    best = min(found, key=lambda each: each.p)
    is_absent = all(max(-each.low, each.high) < RELEVANT for each in found)
    verdict = "shown" if best.p * len(found) < 0.05 else "not shown" if is_absent else "undecidable"
    return verdict, f"{best.text}; smallest p of {len(found)} pairs of decodings"


CLAIMS = {
    "C1": "Eval loss fell and the model got worse.",
    "C2": "Under greedy decoding with the n-gram ban, most answers of `week4` are unsound.",
    "C3": "`no_repeat_ngram_size=3` causes drift.",
    "C4": "Two epochs of 8,000 : 4,000 rows teach longer lists and fewer endings.",
    "C5": "A mix of 85 : 15 rows gives more sound and ended answers.",
    "C6": "LoRA on the feed-forward layers too names more facts, also at equal parameters.",
    "C7": "Removing the n-gram ban gives more sound and ended answers.",
    "C8": "The explicit end-of-turn token ends more answers soundly.",
    "C9": "`repetition_penalty=1.3` reduces loops and does no harm.",
    "C10": "A smaller `max_new_tokens` gives fewer unsound answers.",
    "C11": "An added pad token makes the adapter 10 times as large.",
    "C12": "After the fixes, most answers of `fixed` are sound and ended.",
    "C13": "Greedy decoding repeats its bytes.",
    "C14": "The fixed decoding alone makes trained models answer soundly.",
    "C15": "One eval loss goes with different answers.",
}
# Each claim is decided by queries, by the share of a cell, or by a function.
RULES: dict[str, Sequence[Query] | Callable[[Records], Result]] = {
    "C1": check_loss,
    "C2": lambda records: count_most(records, "week4", "story-collapse", "unsound"),
    "C3": [Query("story-collapse", "collapse-no-ban", "drift")],
    "C4": [Query("week4", "base", "list items"), Query("week4", "base", "ended", -1)],
    "C5": [Query("week4-rebalanced", "week4")],
    "C6": [
        Query("week4-all-linear", "week4", "points"),
        Query("week4-all-linear", "week4-wide-attention", "points"),
    ],
    "C7": [Query("collapse-no-ban", "story-collapse")],
    "C8": check_stop,
    "C9": [
        Query("story-fix", "plain", "loops", -1),
        Query("story-fix", "plain", GOOD, -1, is_harm=True),
        Query("story-fix", "plain", "drift", is_harm=True),
    ],
    "C10": check_cap,
    "C11": check_pad,
    "C12": lambda records: count_most(records, "fixed", "story-fix", GOOD),
    "C13": check_bytes,
    "C14": [Query("story-fix", "story-collapse", within=TRAINED)],
    "C15": check_decodings,
}
# Single changes, whose effects the report orders.
CHANGES = [
    *(
        Query(name, "story-collapse", within=TRAINED)
        for name in ("collapse-no-ban", "story-fix", "kit")
    ),
    *(Query(f"week4-{name}", "week4") for name in ("rebalanced", "all-linear", "1-epoch")),
]


def decide_claims(records: Records) -> dict[str, Result]:
    """Verdict and numbers of each claim."""
    results = {}
    for claim, rule in RULES.items():
        results[claim] = rule(records) if callable(rule) else compare(records, *rule)
    return results


# --- The report ----------------------------------------------------------------------------------

NOTES = """*Sound and ended*: the judge finds no defect of form, and the stop token ended the answer
before the limit; in parentheses a 95% interval (Wilson). *Drift*: the answer surprises the base
model, continues as another speaker, or invents a medicine. *Eval loss*: of the weights that were
kept, on rows held out from the sources of the arm; only arms with equal sources compare. C2 and C12
are decided by whether the interval of a share excludes one half, the other comparisons by two-sided
sign tests over the questions, p < 0.05: with `+a -b`, the first has more on *a* questions and less
on *b*, and *net* is their difference as a share of the questions, with a 95% interval (Agresti and
Min). None of this says that an answer is medically correct, and none of it is medical advice."""
SELECTION_NOTE = """The evaluation that each metric selects, and how many of its probe answers are
sound and ended; they have a lower token limit. `answers` ranks by sound answers, then by points."""


def escape_markdown(text: str) -> str:
    """The text as one line of markdown that shows it unchanged; newlines become `<br>`."""
    text = data.escape_controls(text.replace("\t", " ").strip())
    text = re.sub(r"[^\w\s.,;()'?!%/+-]|_", lambda found: f"&#{ord(found[0])};", text)
    return text.replace("\n", "<br>")


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first row is its header."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def list_selections(records: Records) -> list[list[str]]:
    """For runs with several evaluations, the step each metric selects, with the sound and ended
    answers there. The last row counts how often each metric selected the most."""
    rows, hits = [], dict.fromkeys(train.METRICS, 0)
    for arm, (selected, good) in records.evaluations.items():
        if len(good) > 1 and all(selected.get(name) in good for name in hits):
            most = max(good, key=lambda step: (good[step], -step))
            steps = [*(selected[name] for name in hits), most]
            rows.append([arm, *(f"step {step}: {good[step]}" for step in steps)])
            for name in hits:
                hits[name] += good[selected[name]] == good[most]
    if rows:
        rows.insert(0, ["arm", *(f"by {name}" for name in hits), "most"])
        counts = (f"{count} of {len(rows) - 1}" for count in hits.values())
        rows.append(["has the most", *counts, ""])
    return rows


def summarise(records: Records, results: Mapping[str, Result]) -> list[str]:
    """What the story got right and wrong, and which settings to use, as list items."""
    lines, cells = [], records.table
    headings = {"shown": "Right", "the opposite": "Wrong, the opposite is shown"}
    excluded = f"an effect on {RELEVANT:.0%} of the questions is excluded"
    headings["not shown"] = f"Not shown, {excluded}, or a condition of the claim fails"
    headings |= {"undecidable": "Undecidable with so few questions", "not run": "Not run"}
    for verdict, heading in headings.items():
        own = [f'{n} "{text}"' for n, text in CLAIMS.items() if results[n][0] == verdict]
        if own:
            lines.append(f"- **{heading} ({len(own)} of {len(CLAIMS)}):** {' '.join(own)}")
    good = cells.pivot(index="arm", columns="decoding", values=GOOD)
    # Decodings that all arms have.
    good = good[[name for name in DISTINCT_DECODINGS if name in good]].dropna(axis=1)
    if good.size:
        total = good.sum().sort_values(ascending=False, kind="stable")
        best = cells[cells.decoding == total.index[0]]
        top, asked = best[best[GOOD] == best[GOOD].max()], best.answers.sum()
        counts = ", ".join(f"{name} {count:.0f} of {asked}" for name, count in total.items())
        text = f"decoding {total.index[0]} (sound and ended answers: {counts}); under it, most are "
        text += f"of {', '.join(top.arm)}: {top.share.iloc[0]}"
        for share in best[best.arm == "base"].share:
            text += f", and the base model has {share}"
        lines.append(f"- **Settings to use:** {text}.")
        for low in best.nsmallest(1, "eval_loss").dropna(subset="eval_loss").itertuples():
            lines.append(f"- **Lowest eval loss:** {low.eval_loss:.3f}, of {low.arm}: {low.share}.")
    found = [each for query in CHANGES if (each := query.run(records))]
    changes = "; ".join(each.change for each in sorted(found, key=lambda each: -abs(each.net)))
    return [*lines, f"- **Single changes, net share of questions:** {changes}."]


def make_report(records: Records, results: Mapping[str, Result]) -> str:
    """The study as markdown; `results` are those of the claims. Equal records give equal bytes."""
    about, questions = records.about, records.about["questions"]
    shares = {(row.arm, row.decoding): row.share for row in records.table.itertuples()}
    table = [["arm", "eval loss", *MAIN_DECODINGS]]
    for arm in about["arms"]:
        loss = f"{records.runs[arm]['eval_loss']:.3f}" if arm in records.runs else ""
        missing = "failed" if arm in records.failures else "not run"
        table.append([arm, loss, *(shares.get((arm, name), missing) for name in MAIN_DECODINGS)])
    rows = sorted({f"{run['train_rows']:.0f}" for run in records.runs.values()})
    trained = f" Adapters were trained on {' or '.join(rows)} rows." if rows else ""
    claims = []
    for claim, (verdict, text) in results.items():
        claims.append(f"- **{claim}: {verdict}.** {CLAIMS[claim]} {text[0].upper()}{text[1:]}.")
    parts = [
        f"# Ablation of {escape_markdown(about['base_model'])}",
        f"C1 to C15 are claims of the story that README tells.{trained}",
        "\n".join(summarise(records, results)),
        "![Verdicts, and eval loss against sound answers](ablation.png)",
        f"Sound and ended answers to {len(questions)} questions:",
        format_table(table),
        "\n".join(f"- {arm}: {escape_markdown(why)}" for arm, why in records.failures.items()),
        f"{NOTES}\n\n## Claims",
        "\n".join(claims),
    ]
    if selections := list_selections(records):
        parts += [f"## What each metric selects\n\n{SELECTION_NOTE}", format_table(selections)]
    if found := {key: records.cells[key].iloc[0] for key in SIDE_BY_SIDE if key in records.cells}:
        header = [f"{arm}, {name}: {each.verdict}" for (arm, name), each in found.items()]
        rows = [header, [each.text or "(nothing)" for each in found.values()]]
        parts.append(f"## {escape_markdown(' '.join(questions[:1]))}")
        parts.append(format_table([[escape_markdown(text) for text in row] for row in rows]))
    machines = sorted({cell.machine[0] for cell in records.cells.values()})
    end = [*map(escape_markdown, machines), f"`{about['command'].replace('`', ' ')}`"]
    end.append("all numbers: [cells.csv](cells.csv); all answers: [cells](cells)\n")
    return "\n\n".join(filter(None, [*parts, "\n".join(f"- {each}" for each in end)]))


# Bar and text. Dark and light alternate, so that neighbours differ in grey.
COLOURS = {
    "sound and ended": ("#08519c", "white"),
    "sound, cut at the limit": ("#9ecae1", "black"),
    "drift": ("#a50f15", "white"),
    "loop, list or empty": ("#fdae6b", "black"),
}


def draw_picture(records: Records, path: Path) -> None:
    """Draws shares of verdicts under the main decodings, and eval loss against sound answers."""
    from matplotlib.figure import Figure

    cells, arms = records.table, records.about["arms"]
    figure = Figure(figsize=(6.4, 0.32 * len(arms) + 5), layout="constrained")
    grid, losses = figure.subplots(2, height_ratios=[0.32 * len(arms), 3.2])
    for place, decoding in enumerate(MAIN_DECODINGS):
        own = cells[cells.decoding == decoding].set_index("arm").reindex(arms)
        parts = [own[GOOD], own.sound - own[GOOD], own.drift, own.answers - own.sound - own.drift]
        left = 1.06 * place
        for part, (label, (colour, shade)) in zip(parts, COLOURS.items(), strict=True):
            share = (part / own.answers).fillna(0)
            bars = grid.barh(arms, share, 0.8, left, color=colour, label=None if place else label)
            texts = [f"{each:.0%}" if each >= 0.2 else "" for each in share]
            grid.bar_label(bars, texts, label_type="center", color=shade, fontsize=9)
            left += share
    grid.set_xticks([1.06 * place + 0.5 for place in range(len(MAIN_DECODINGS))], MAIN_DECODINGS)
    grid.tick_params(length=0, labeltop=True, labelbottom=False)
    grid.set(xlim=(0, 3.12), ylim=(len(arms) - 0.5, -0.5))
    grid.spines[:].set_visible(False)
    grid.legend(loc="upper center", bbox_to_anchor=(0.35, 0), ncols=2, frameon=False)
    points = cells[(cells.decoding == "kit") & cells.eval_loss.notna()]
    points = points.assign(share=points[GOOD] / points.answers).sort_values(["share", "eval_loss"])
    losses.scatter(points.eval_loss, points.share, color="#08519c", zorder=3)
    for place, point in enumerate(points.itertuples()):
        # Beside the axes, in the order of the points, at equal distances.
        at, end = (point.eval_loss, point.share), (1.04, (place + 0.5) / len(points))
        line = {"arrowstyle": "-", "color": "0.7", "relpos": (0, 0.5)}
        losses.annotate(
            point.arm, at, end, textcoords="axes fraction", va="center", arrowprops=line
        )
    losses.set(xlabel="eval loss (nats per token)", ylabel="sound and ended under kit (zoomed)")
    losses.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    losses.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=125, metadata={"Software": None})
    data.write_atomic(path, image.getvalue())


# --- Command -------------------------------------------------------------------------------------


def write_report(folder: Path) -> tuple[Records, dict[str, Result]]:
    """Writes report, picture and cells.csv; returns the records and the claims' results. Raises
    UsageError as `Records.read`."""
    records = Records.read(folder)
    results = decide_claims(records)
    data.write_atomic(folder / "cells.csv", records.table.to_csv(index=False))
    draw_picture(records, folder / "ablation.png")
    data.write_atomic(folder / "ablation.md", make_report(records, results))
    return records, results


def run(config: AblateConfig) -> bool:
    """Runs what is missing, or prints it with --dry-run. Returns whether there is a report."""
    study = make_study(config)
    if config.answer:
        write_cells(study, next(arm for arm in study.arms if arm.name == config.answer))
        return False
    infer.handle_signals()
    part, parts = map(int, config.shard.split("/"))
    arms, left = study.arms[part::parts], 0
    for arm in arms:
        count, missing = len(arm.decodings), len(study.missing(arm))
        left += missing
        print(
            f"{arm.name:<20}  {count - missing} of {count} cells done  {', '.join(arm.decodings)}"
        )
    if config.dry_run:
        print(*(f"python {shlex.join(arm.command)}" for arm in arms if arm.command), sep="\n")
    print(f"{left} cells of {len(study.probes)} questions to do, in {study.folder}", flush=True)
    if config.dry_run or not arms:
        return False
    path = study.folder / "study.json"
    try:
        is_same = not path.is_file() or json.loads(path.read_text())["settings"] == study.settings
    except infer.BAD_CONTENT:
        is_same = False
    if not is_same:
        problem = f"{study.folder} is a study with other flags, rows or probes, or a broken one."
        raise UsageError(f"{problem} Choose another --name, or remove the folder.")
    about = {
        "settings": study.settings,
        "command": shlex.join(["python", "ablate.py", *sys.argv[1:]]),
        "base_model": study.profile.hub_id,
        "questions": [probe.question for probe in study.probes],
        "arms": [arm.name for arm in study.arms],
    }
    for name in ("cells", "failures", "logs"):
        (study.folder / name).mkdir(parents=True, exist_ok=True)
    data.write_atomic(path, json.dumps(about, indent=2) + "\n")
    run_study(study, arms, config.workers or study.profile.workers)
    return True


def main(config: AblateConfig) -> int:
    """Runs what is missing, then writes the report. Returns 1 if an arm failed, else 0."""
    if not config.table and not run(config):
        return 0
    records, results = write_report(config.folder)
    for claim, (verdict, _) in results.items():
        print(f"{claim:<4} {verdict:<13} {CLAIMS[claim]}")
    print(f"\n{config.folder}/ablation.md: report; ablation.png, cells.csv and cells beside it")
    for arm, reason in records.failures.items():
        infer.report(f"{arm} failed, and runs again with the study's command: {reason}")
    return 1 if records.failures else 0


if __name__ == "__main__":
    advice = "Lower --workers, then --num-probes, then --num-rows."
    data.run_command(AblateConfig, main, __doc__, advice)

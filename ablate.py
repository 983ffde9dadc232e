"""What made the difference? Models trained and decoded in different ways answer the same questions.

    python ablate.py                               the story's runs, and single changes to them
    python ablate.py --rows my.jsonl               the same with your dataset, and without mixes
    python ablate.py --dry-run                     print arms and commands; writes no results
    python ablate.py --table                       rebuild the report from the records

Writes a report, a picture and all answers to runs/ablate/NAME. The same command resumes a study.
"""

from __future__ import annotations

import dataclasses
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
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from tqdm import tqdm

import data
import infer
import train
from infer import DECODINGS

# --- Arms, decodings and flags -------------------------------------------------------------------

# Flags of train.py. The story selected weights by loss; the kit selects them by answers.
FIXED = {"mix": "rebalanced", "target_modules": "all-linear", "epochs": 2, "pad": "native"}
FIXED |= {"metric_for_best_model": "eval_loss"}
WEEK4 = FIXED | {"mix": "week4", "target_modules": "attention"}
# Evaluated near the end only, and without probes, whose answers take as long as the training.
BRIEF = WEEK4 | {"eval_every": 0.99, "num_probes": 0}
WIDE_R = 42  # with as many parameters on attention, within 1%, as rank 16 on all linear layers
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
MAIN_DECODINGS = ["story-collapse", "story-fix", "kit"]
DISTINCT_DECODINGS = ["plain", *MAIN_DECODINGS]  # the others are cut from these generations
CAPS = {"collapse-cap-128": "story-collapse", "fix-cap-128": "story-fix", "plain-cap-128": "plain"}
COLLAPSE = DECODINGS["story-collapse"]
DECODING_ARMS = {
    **{name: DECODINGS[name] for name in DISTINCT_DECODINGS},
    "collapse-no-ban": dataclasses.replace(COLLAPSE, no_repeat_ngram_size=0, count_prompt=False),
    "collapse-stop": dataclasses.replace(COLLAPSE, stop="end-of-turn"),
    **{n: dataclasses.replace(DECODINGS[own], max_new_tokens=128) for n, own in CAPS.items()},
}
# The decodings of each arm: `base` is the base model, the others are training runs.
ARMS = {
    arm: MAIN_DECODINGS if arm.startswith("week4-") else list(DECODING_ARMS)
    for arm in ("base", *TRAINING_ARMS)
}


@dataclasses.dataclass(frozen=True)
class AblateConfig(data.RowsFlags):
    """Flags of ablate.py."""

    name: str | None = None  # The study's folder. Unset: `story`, and the names of given files.
    num_rows: int | None = None  # Training rows of each run. Unset: the profile's.
    num_probes: int | None = None  # Number of probe questions. Unset: the profile's.
    eval_every: float | None = None  # Share of the steps between evaluations. Unset: the profile's.
    shard: str = "0/1"  # Run only part I of N of the arms, I from 0: one per GPU or SLURM task.
    workers: int | None = None  # Arms that run at the same time. Unset: the profile's.
    profile: data.ProfileChoice = "auto"  # Set of defaults: `t4` for a GPU, `cpu`, or `auto`.
    base_model: str | None = None  # Hub id or folder of another chat model of Llama's architecture.
    dry_run: bool = False  # Print arms, commands and counts, and stop. Writes no results.
    table: bool = False  # Only rebuild report and picture from the records.
    answer: str | None = None  # Only answer with this trained arm. Used by the study itself.

    def __post_init__(self) -> None:
        for name, most in (("num_probes", len(infer.read_probes(self.probes))), ("workers", 64)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected 1 to {most}.")
        if self.answer not in (None, *ARMS):
            raise ValueError(f"--answer {self.answer}: expected one of {', '.join(ARMS)}.")
        shard = re.fullmatch(r"(\d{1,4})/(\d{1,4})", self.shard)
        if not shard or int(shard[1]) >= int(shard[2]):
            raise ValueError(f"--shard {self.shard}: expected I/N with I from 0 to N - 1.")
        train.TrainConfig(name=self.name, **self.given)  # checks the flags that both have

    @property
    def given(self) -> dict[str, Any]:
        """The flags that are passed on to train.py, if they are given."""
        names = {each.name for each in dataclasses.fields(train.TrainConfig)} - {"name", "dry_run"}
        defaults = {each.name: each.default for each in dataclasses.fields(self)}
        return {n: v for n, v in vars(self).items() if n in names and v != defaults[n]}

    @property
    def folder(self) -> Path:
        """The study's folder."""
        sources = (self.rows, self.conversational, self.encyclopedic, self.probes)
        parts = ["story", *(train.name_rows(each) for each in sources if each)]
        return infer.RUNS / "ablate" / (self.name or "-".join(parts))


class Study(NamedTuple):
    """The arms of a study, and what they share."""

    folder: Path
    profile: data.Profile
    arms: Mapping[str, Sequence[str]]  # by name the flags of train.py; none for the base model
    probes: Sequence[infer.Probe]
    system_prompt: str | None  # None: an adapter's own, the story's for the base model
    settings: str  # digest of everything that the answers and verdicts depend on

    def missing(self, arm: str) -> list[str]:
        """The decodings whose cells are not written yet."""
        return [n for n in ARMS[arm] if not (self.folder / "cells" / f"{arm}.{n}.jsonl").is_file()]


def make_study(config: AblateConfig) -> Study:
    """The study that the flags describe. Raises UsageError like `data.RowsConfig.load`."""
    profile, given = data.resolve_profile(config.profile, config.base_model), config.given
    probes = infer.read_probes(config.probes)[: config.num_probes or profile.ablation_probes]
    rows, system_prompt = train.TrainConfig(**given), config.system_prompt
    if config.rows or config.conversational or config.encyclopedic:
        system_prompt = rows.load(profile).system_prompt
    sources = [Path(source) for source in rows.sources(profile).values()]
    sources = [path.read_bytes() if path.is_file() else path for path in sources]
    given |= {"profile": profile.name, "num_rows": config.num_rows or profile.ablation_rows}
    given["num_probes"] = min(len(probes), 26)  # at each evaluation
    arms: dict[str, list[str]] = {"base": []}
    for arm, changes in TRAINING_ARMS.items():
        flags = given | changes | {"output_dir": config.folder / "runs", "name": arm}
        if config.rows:
            del flags["mix"]
        if not config.rows or arm != "week4-rebalanced":  # without a mix, it equals `week4`
            arms[arm] = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    settings = (arms, DECODING_ARMS, infer.THRESHOLDS, probes, system_prompt, sources)
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()
    return Study(config.folder, profile, arms, probes, system_prompt, digest)


# --- Running -------------------------------------------------------------------------------------


def write_cells(study: Study, arm: str) -> None:
    """Loads the arm's model, and writes its judged answers under the decodings that are missing."""
    profile, folder = study.profile, study.folder / "runs" / arm / "adapter"
    infer.prepare_environment(profile)
    adapter = infer.check_adapter(folder, profile.name) if study.arms[arm] else None
    loaded = infer.load_for_inference(profile, adapter, study.system_prompt)
    loaded.probes = study.probes
    names, questions = study.missing(arm), [probe.question for probe in study.probes]
    answers, judged = [], {}
    # In two parts, so that the first question is answered again, in another batch.
    for part in (questions[:4], questions[:1] + questions[4:]):
        requests = [infer.Request(each, DECODING_ARMS[name]) for name in names for each in part]
        with tqdm(total=infer.count_new_tokens(requests), unit="token", desc="answering") as bar:
            found = infer.answer_requests(loaded, requests, bar.update)
        answers.append(dict(zip(itertools.product(names, part), found, strict=True)))
    for name in names:
        answered = [(answers[0] | answers[1])[name, each] for each in questions]
        stop_ids = infer.stop_ids(DECODING_ARMS[name], loaded.model, loaded.tokenizer)
        repeats, text = answers[0][name, questions[0]] == answers[1][name, questions[0]], ""
        cell = {"arm": arm, "decoding_arm": name, "stop_ids": stop_ids, "repeats": repeats}
        for each in tqdm(answered, unit="answer", desc=f"judging {name}"):
            key = (each.question, each.sha256, each.finish_reason)
            if key not in judged:  # equal answers of several decodings are judged once
                judged[key] = infer.judge_answers(loaded, [each])[0]
            record = cell | dataclasses.replace(judged[key], answer=each).to_record()
            del record["seconds"]  # equal answers are equal bytes
            text += json.dumps(record, ensure_ascii=False) + "\n"
        data.write_atomic(study.folder / "cells" / f"{arm}.{name}.jsonl", text)


def run_arm(study: Study, arm: str, running: list[subprocess.Popen]) -> str | None:
    """Trains the arm and answers with it, in processes that are in `running`; why it failed."""
    log, flags = study.folder / "logs" / f"{arm}.log", study.arms[arm]
    steps = {"training": [str(data.HERE / "train.py"), *flags]} if flags else {}
    steps["answering"] = [*sys.orig_argv[1:], "--answer", arm]
    for step, command in steps.items():
        tqdm.write(f"{arm}: {step}, see {log}", sys.stderr)
        code = train.BUSY
        while code == train.BUSY:  # the study was killed, and its training run continues
            with log.open("ab") as output:
                # In a session of its own, Ctrl-C reaches only this process, which passes it on.
                streams = {"stdout": output, "stderr": output, "start_new_session": True}
                running.append(process := subprocess.Popen([sys.executable, *command], **streams))
                code = process.wait()
            time.sleep(5 * (code == train.BUSY))
        if code:
            how = "killed, often for lack of memory" if code == -9 else f"exit code {code}"
            text = log.read_text(encoding="utf-8", errors="replace").rstrip()
            last = data.escape_controls(text.rpartition("\n" if code < 0 else "error: ")[2][-600:])
            return f"{step} failed ({how}; log: {log}). {last}"
    return None


def run_study(study: Study, arms: Sequence[str], workers: int) -> None:
    """Runs the arms with missing cells, and records why arms failed. On a signal, runs save."""
    path, running, futures = study.folder / "study.json", [], {}
    if path.is_file() and study.settings not in path.read_text(errors="replace"):
        problem = f"{study.folder} is a study with other flags, rows or probes, or is corrupt."
        raise data.UsageError(f"{problem} Choose another --name, or remove the folder.")
    about = {"settings": study.settings, "base_model": study.profile.hub_id}
    about["command"] = shlex.join(["python", "ablate.py", *sys.argv[1:]])
    about |= {"questions": [probe.question for probe in study.probes], "arms": list(study.arms)}
    for name in ("cells", "failures", "logs"):
        (study.folder / name).mkdir(parents=True, exist_ok=True)
    data.write_atomic(path, json.dumps(about, indent=2) + "\n")
    os.environ.setdefault("TQDM_MININTERVAL", "10")  # of the processes, which write to logs
    if workers > 1:  # also if fewer arms are left: results depend on the number of threads
        os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)) // workers or 1))
    pool = ThreadPoolExecutor(workers)
    try:
        for arm in sorted(arms, key=lambda arm: arm == "base"):  # the shortest arm last
            failure = study.folder / "failures" / f"{arm}.txt"
            failure.unlink(missing_ok=True)
            if study.missing(arm):
                futures[pool.submit(run_arm, study, arm, running)] = failure
        left, bar = set(futures), tqdm(total=len(futures), unit="arm", disable=None)
        while left:
            done, left = wait(left, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                if reason := future.result():
                    data.write_atomic(futures[future], reason)
                tqdm.write(f"{futures[future].stem}: {reason or 'done'}", sys.stderr)
            bar.update(len(done))
            bar.refresh()  # its clock
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in futures):
            while running:  # one signal each: at a second one train.py does not save
                running.pop().terminate()
            wait(futures, timeout=0.2)


# --- Records and claims --------------------------------------------------------------------------

GOOD = "sound_and_ended"
COUNTS = [GOOD, *"sound ended loops drift points max_points wrong_claims".split()]
RELEVANT = 0.2  # the smallest net share of questions that matters
Result = tuple[str, str]  # the verdict on a claim, and its numbers


def read_cell(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def flatten_answer(record: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a line of a cell that the report uses."""
    found = {finding["name"] for finding in record["findings"]}
    facts = record.get("facts") or {"named": [], "missing": [], "wrong": []}
    points, max_points = len(facts["named"]), len(facts["named"]) + len(facts["missing"])
    sound, ended, text = not found, record["finish_reason"] == "stop", str(record["text"])
    drift = bool(found & {"surprisal", "leak", "invented-medicine"})
    is_in_c4 = record["arm"] in ("base", "week4") and record["decoding_arm"] in DISTINCT_DECODINGS
    items = infer.measure_list(text)[0] if is_in_c4 else math.nan  # slow
    values = {"text": text, "verdict": str(record["verdict"]), "list items": items}
    values |= {"stop_ids": set(map(int, record["stop_ids"])), "repeats": bool(record["repeats"])}
    values |= {GOOD: sound and ended, "sound": sound, "unsound": not sound, "ended": ended}
    values |= {"loops": bool(found & {"loop", "repetition"}), "drift": drift}
    values |= {"points": points if max_points else math.nan, "max_points": max_points}
    return values | {"wrong_claims": len(facts["wrong"]), "tokens": int(record["answer_tokens"])}


class Records(NamedTuple):
    """The records of a study."""

    about: Mapping[str, Any]  # study.json: its command, base model, questions and arms
    cells: Mapping[tuple[str, str], Any]  # by arm and decoding: a DataFrame, a row per question
    table: Any  # cells.csv: a DataFrame, a row per arm and decoding
    losses: Mapping[str, Mapping[str, float]]  # by arm: eval loss before and after
    evaluations: Mapping[str, tuple[dict, dict]]  # by arm: selected steps, sound and ended by step
    failures: Mapping[str, str]  # why arms failed


def read_records(folder: Path) -> Records:
    """The records of a study. Raises UsageError if there are none, or one is corrupt."""
    from pandas import DataFrame

    path, cells, rows, losses, evaluations, failures = folder / "study.json", {}, [], {}, {}, {}
    names = {"eval_loss_before": "before", "eval_loss": "chosen"}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        about |= {name: str(about[name]) for name in ("command", "base_model")}
        about |= {name: list(map(str, about[name])) for name in ("questions", "arms")}
        for arm in about["arms"]:
            path = folder / "failures" / f"{arm}.txt"
            if path.is_file():
                failures[arm] = path.read_text(encoding="utf-8")
            path = folder / "runs" / arm / "run.json"
            if path.is_file():
                numbers = json.loads(path.read_text(encoding="utf-8"))["numbers"]
                losses[arm] = {n: float(numbers[at]["eval_loss"]) for n, at in names.items()}
                path = path.with_name("metrics.jsonl")
                lines = [each for each in read_cell(path) if each.get("eval_answers")]
                good = {int(each["step"]): int(each[f"eval_{GOOD}"]) for each in lines}
                good.pop(0, None)  # before training
                evaluations[arm] = dict(numbers["selected"]), good
        for arm, decoding in itertools.product(about["arms"], DECODING_ARMS):
            path = folder / "cells" / f"{arm}.{decoding}.jsonl"
            if path.is_file():  # one answer to each question
                lines = [flatten_answer(line) for line in read_cell(path)]
                cells[arm, decoding] = DataFrame(lines).set_axis(range(len(about["questions"])))
    except Exception as error:  # whatever a corrupt file leads to
        advice = "Run without --table; first remove a broken file (of a run, its folder and cells)."
        raise data.UsageError(f"{path} cannot be read ({error!r}). {advice}") from None
    for (arm, decoding), own in cells.items():
        row = {"arm": arm, "decoding": decoding, **losses.get(arm, dict.fromkeys(names, math.nan))}
        row |= {"answers": len(own)} | dict(own[COUNTS].sum().astype(int))
        row["share"], row["interval_low"], row["interval_high"], _ = count_share(own[GOOD])
        rows.append(row | {"mean_tokens": own.tokens.mean(), "repeats": own.repeats[0]})
    if not cells:
        raise data.UsageError(f"{folder} has no finished cells. Run ablate.py. {failures or ''}")
    return Records(about, cells, DataFrame(rows).round(4), losses, evaluations, failures)


def count_share(outcomes: Any) -> tuple[str, float, float, float]:
    """`(text, low, high, p)`: number and 95% interval (Wilson 1927) of a share, p against half."""
    from scipy.stats import binomtest

    test = binomtest(int(outcomes.sum()), len(outcomes))
    share = test.proportion_ci(method="wilson")
    return f"{test.k} of {test.n} ({share.low:.0%} to {share.high:.0%})", *share, test.pvalue


@dataclasses.dataclass(frozen=True)
class Query:
    """Do answers of `one` have more of an outcome than those of `other` (fewer, if sense is -1)? A
    question counts once, by the sum of differences over cells, whose answers are not independent.
    The effect is the net share of questions: those with more less those with fewer."""

    one: str  # an arm or a decoding, as `other`
    other: str
    outcome: str = GOOD  # a column of `flatten_answer`
    sense: int = 1
    within: Collection[str] = ()  # of two arms the decodings, and vice versa; () is all
    is_harm: bool = False  # whether the outcome counts against the claim

    def run(self, records: Records) -> SimpleNamespace | None:
        """The effect and its numbers, None if there are no such cells."""
        from scipy.stats import binomtest

        cells, one, other, outcome = records.cells, self.one, self.other, self.outcome
        if {one, other} <= ARMS.keys():
            pairs = [((one, n), (other, n)) for n in self.within or DISTINCT_DECODINGS]
        else:
            names = CAPS if other == "larger limit" else {one: other}
            pairs = [((arm, a), (arm, b)) for arm in self.within or ARMS for a, b in names.items()]
        pairs = [(cells[a], cells[b]) for a, b in pairs if a in cells and b in cells]
        if one == "collapse-stop":  # no change if the generation config has this token already
            pairs = [(a, b) for a, b in pairs if not a.stop_ids[0] <= b.stop_ids[0]]
        changes = [a[outcome].astype(float) - b[outcome].astype(float) for a, b in pairs]
        change = sum(changes[1:], changes[0]).dropna() if pairs else ()  # NaN: no points
        if not len(change):
            return None
        more, fewer, size = int((change > 0).sum()), int((change < 0).sum()), len(change)
        # The two-sided sign test, ties left out (Dixon and Mood 1946).
        p = float(binomtest(more, more + fewer).pvalue) if more + fewer else 1.0
        # The net share's 95% interval, with half an observation in each cell (Agresti, Min 2005).
        net, total = more - fewer, size + 2
        spread = 1.96 * math.sqrt(more + fewer + 1 - net**2 / total)
        low, high = max(-1.0, (net - spread) / total), min(1.0, (net + spread) / total)
        share = f"{net / size:+.0%} [{low:+.0%}, {high:+.0%}], p = {p:.2g}"
        style = ".3g" if outcome in ("points", "list items") else ".0%"
        means = (sum(pair[at][outcome].mean() for pair in pairs) / len(pairs) for at in (0, 1))
        first, second = (format(mean, style) for mean in means)
        text = f"{outcome.replace('_', ' ')}: {one} {first}, {other} {second} (pairs of "
        text += f"cells: {len(pairs)}; +{more} -{fewer} of {size} questions, net {share})"
        effect = SimpleNamespace(pairs=pairs, p=p, net=net / size, low=low, high=high, text=text)
        effect.is_harm, effect.change = self.is_harm, f"{other} to {one} {share}"
        effect.is_absent = max(self.sense * low, self.sense * high) < RELEVANT
        effect.sign = (1 if net > 0 else -1) * self.sense if p < 0.05 else 0  # -1: the reverse
        return effect


def compare(records: Records, *queries: Query) -> Result:
    """The first decision rule. Raises LookupError if the study has no answers for a query.

    A claim is `shown` if every query that is not a harm is significant in its direction, and every
    harm is insignificant and its interval excludes `RELEVANT`; `the opposite` if every query is
    significant in the other direction, or a harm is significant and no query. Otherwise `not shown`
    if a harm is significant, or a query's interval excludes `RELEVANT`; and `undecidable` if not.
    """
    found = [query.run(records) for query in queries]
    if None in found:
        raise LookupError
    harms = [each for each in found if each.is_harm]
    effects = [each for each in found if not each.is_harm]
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
    """The second decision rule: whether the interval of a cell's share is above or below half."""
    text, low, high, p = count_share(records.cells[arm, decoding][outcome])
    verdict = "shown" if low > 0.5 else "the opposite" if high < 0.5 else "undecidable"
    return verdict, f"{outcome.replace('_', ' ')}: {arm} under {decoding} {text}, p = {p:.2g}"


def check_loss(records: Records) -> Result:
    """C1: the loss fell, and there are fewer sound and ended answers than of the base model."""
    verdict, text = compare(records, Query("week4", "base", GOOD, -1, ["story-collapse"]))
    before, after = records.losses["week4"].values()
    verdict = "not shown" if verdict == "shown" and after >= before else verdict
    return verdict, f"eval loss {before:.3f} to {after:.3f}; {text}"


def check_cap(records: Records) -> Result:
    """C10: fewer unsound answers under a smaller cap; also counts what the cap cures or hides."""
    query = Query("smaller limit", "larger limit", "unsound", -1)
    verdict, text = compare(records, query)
    pairs = query.run(records).pairs
    cured = sum((small[GOOD] & ~large[GOOD]).sum() for small, large in pairs)
    hidden = sum((one.sound & ~one.ended & other.unsound).sum() for one, other in pairs)
    return verdict, f"{text}; cured {cured} answers, cut {hidden} before they became unsound"


def check_pad(records: Records) -> Result:
    """C11: by the exact sizes for Llama 3.2 3B."""
    arch, dtypes = data.PROFILES["t4"].architecture, (None, "F16", "F32")
    sizes = [train.count_adapter(arch, "attention", 16, dtype)[1] for dtype in dtypes]
    text = "Llama 3.2 3B: {:,} bytes; with an added token {:,} (16-bit), {:,} (fp32)".format(*sizes)
    return ("shown" if sizes[1] >= 10 * sizes[0] else "not shown"), text


def check_bytes(records: Records) -> Result:
    """C13: greedy answers generated again in another batch have the same tokens."""
    own = [bool(own.repeats[0]) for (_, n), own in records.cells.items() if n in DISTINCT_DECODINGS]
    worst = sorted(own)[0]  # a LookupError if there is none
    text = f"the first question in another batch: equal tokens in {sum(own)} of {len(own)} cells"
    return "shown" if worst else "the opposite", text


def check_decodings(records: Records) -> Result:
    """C15: two decodings of the same weights differ, with a Bonferroni correction for all pairs."""
    pairs = itertools.combinations(DISTINCT_DECODINGS, 2)
    found = [each for pair in pairs if (each := Query(*pair, within=TRAINING_ARMS).run(records))]
    best = sorted(found, key=lambda each: each.p)[0]  # a LookupError if there is none
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
    "C13": "Greedy decoding is reproducible.",
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
    "C6": [Query("week4-all-linear", name, "points") for name in ("week4", "week4-wide-attention")],
    "C7": [Query("collapse-no-ban", "story-collapse")],
    "C8": [Query("collapse-stop", "story-collapse")],
    "C9": [
        Query("story-fix", "plain", "loops", -1),
        Query("story-fix", "plain", GOOD, -1, is_harm=True),
        Query("story-fix", "plain", "drift", is_harm=True),
    ],
    "C10": check_cap,
    "C11": check_pad,
    "C12": lambda records: count_most(records, "fixed", "story-fix", GOOD),
    "C13": check_bytes,
    "C14": [Query("story-fix", "story-collapse", within=TRAINING_ARMS)],
    "C15": check_decodings,
}
# Single changes, whose effects the report orders.
CHANGES = [Query(f"week4-{n}", "week4") for n in ("rebalanced", "all-linear", "1-epoch")]
for _name in ("collapse-no-ban", "story-fix", "kit"):
    CHANGES.append(Query(_name, "story-collapse", within=TRAINING_ARMS))


def decide_claims(records: Records) -> dict[str, Result]:
    """Verdict and numbers of each claim."""
    results = {}
    for claim, rule in RULES.items():
        try:
            results[claim] = rule(records) if callable(rule) else compare(records, *rule)
        except LookupError:  # of a cell or a run
            results[claim] = "not run", "no answers of the study can decide it"
    return results


# --- Report and command --------------------------------------------------------------------------

NOTES = """*Sound and ended*: no defect of form is found, and the stop token ended the answer. It
*drifts* if it has a finding `surprisal`, `leak` or `invented-medicine` (docs/judge.md). With
`+a -b`, the first has more on *a* questions and less on *b*. Intervals are 95%: Wilson's for shares
(C2, C12), Agresti and Min's for *net*; p is of two-sided sign tests. Only C6 depends on particular
questions, with lists of points. Eval loss is on held-out rows of the arm. Not medical advice."""


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
    """The step that each metric selects, its sound and ended answers, and how often it has most."""
    rows, hits = [], dict.fromkeys(train.METRICS, 0)
    for arm, (selected, good) in records.evaluations.items():
        if len(good) > 1 and all(selected.get(name) in good for name in hits):
            steps = [*(selected[name] for name in hits), max(good, key=good.get)]
            rows.append([arm, *(f"step {step}: {good[step]}" for step in steps)])
            for name in hits:
                hits[name] += good[selected[name]] == max(good.values())
    counts = [f"{count} of {len(rows)}" for count in hits.values()]
    header = ["arm", *(f"by {name}" for name in hits), "most"]
    return [header, *rows, ["has the most", *counts, ""]] if rows else []


def summarize(records: Records, results: Mapping[str, Result]) -> list[str]:
    """What the story got right and wrong, and which settings to use, as list items."""
    lines = []
    headings = {"shown": "Right", "the opposite": "Wrong: the opposite is shown"}
    headings |= {"not shown": f"Not shown: less than {RELEVANT:.0%}, or a condition fails"}
    headings |= {"undecidable": "Undecidable with so few questions", "not run": "Not run"}
    for verdict, heading in headings.items():
        own = [f'{n} "{text}"' for n, text in CLAIMS.items() if results[n][0] == verdict]
        if own:
            lines.append(f"- **{heading} ({len(own)} of {len(CLAIMS)}):** {' '.join(own)}")
    cells = records.table[records.table.decoding.isin(MAIN_DECODINGS)]
    total = cells.groupby("decoding")[[GOOD, "answers"]].sum()
    total = total.assign(share=total[GOOD] / total.answers).sort_values("share", ascending=False)
    for decoding in total.index[:1]:
        counts = ", ".join(f"{n} {good} of {asked}" for n, good, asked, _ in total.itertuples())
        best = cells[cells.decoding == decoding]
        arms = ", ".join(best.arm[best[GOOD] == best[GOOD].max()])
        text = f"decoding {decoding}, and of the arms {arms}. Sound and ended: {counts}"
        lines.append(f"- **Settings to use:** {text}.")
    found = [each for query in CHANGES if (each := query.run(records))]
    changes = "; ".join(each.change for each in sorted(found, key=lambda each: -abs(each.net)))
    return lines + [f"- **Single changes, net share of questions:** {changes}."] * bool(found)


def make_report(records: Records, results: Mapping[str, Result]) -> str:
    """The study as markdown; `results` are those of the claims. Equal records give equal bytes."""
    about, questions = records.about, records.about["questions"]
    shares = {(row.arm, row.decoding): row.share for row in records.table.itertuples()}
    table = [["arm", "eval loss", *MAIN_DECODINGS]]
    for arm in about["arms"]:
        loss = f"{records.losses[arm]['eval_loss']:.3f}" if arm in records.losses else ""
        missing = "failed" if arm in records.failures else "not run"
        table.append([arm, loss, *(shares.get((arm, name), missing) for name in MAIN_DECODINGS)])
    claims = []
    for claim, (verdict, text) in results.items():
        claims.append(f"- **{claim}: {verdict}.** {CLAIMS[claim]} {text[0].upper()}{text[1:]}.")
    parts = [
        f"# Ablation of {escape_markdown(about['base_model'])}",
        "C1 to C15 are the claims of the story, listed below.",
        "\n".join(summarize(records, results)),
        "![Verdicts, and eval loss against sound and ended answers](ablation.png)",
        f"Sound and ended answers to {len(questions)} questions:",
        format_table(table),
        "\n".join(f"- {arm}: {escape_markdown(why)}" for arm, why in records.failures.items()),
        f"{NOTES}\n\n## Claims",
        "\n".join(claims),
    ]
    if selections := list_selections(records):
        parts += ["## Selected steps: sound and ended answers to probes", format_table(selections)]
    keys = [("week3", "plain"), ("week4", "story-collapse"), ("fixed", "story-fix")]
    if found := {key: records.cells[key].iloc[0] for key in keys if key in records.cells}:
        header = [f"{arm}, {name}: {each.verdict}" for (arm, name), each in found.items()]
        rows = [header, [each.text or "(nothing)" for each in found.values()]]
        parts.append(f"## {escape_markdown(questions[0])}")
        parts.append(format_table([[escape_markdown(text) for text in row] for row in rows]))
    parts.append("All numbers: [cells.csv](cells.csv); all answers: [cells](cells). Command:")
    return "\n\n".join(filter(None, [*parts, f"`{about['command'].replace('`', ' ')}`\n"]))


def draw_picture(records: Records, path: Path) -> None:
    """Draws shares of verdicts under the main decodings, and eval loss against good answers."""
    from matplotlib.figure import Figure

    colors = {  # of bar and text; dark and light alternate, so that neighbors differ in gray
        "sound and ended": ("#08519c", "white"),
        "sound, cut at the limit": ("#9ecae1", "black"),
        "drift": ("#a50f15", "white"),
        "loop, list or empty": ("#fdae6b", "black"),
    }
    cells, arms = records.table, records.about["arms"]
    figure = Figure(figsize=(6.4, 0.32 * len(arms) + 5), layout="constrained")
    grid, losses = figure.subplots(2, height_ratios=[0.32 * len(arms), 3.2])
    for place, decoding in enumerate(MAIN_DECODINGS):
        own = cells[cells.decoding == decoding].set_index("arm").reindex(arms)
        parts = [own[GOOD], own.sound - own[GOOD], own.drift, own.answers - own.sound - own.drift]
        left = 1.06 * place
        for part, (label, (color, shade)) in zip(parts, colors.items(), strict=True):
            share = (part / own.answers).fillna(0)
            bars = grid.barh(arms, share, 0.8, left, color=color, label=None if place else label)
            texts = [f"{each:.0%}" if each >= 0.28 else "" for each in share]
            grid.bar_label(bars, texts, label_type="center", color=shade, fontsize=9)
            left += share
    grid.set_xticks([1.06 * place + 0.5 for place in range(len(MAIN_DECODINGS))], MAIN_DECODINGS)
    grid.tick_params(length=0, labeltop=True, labelbottom=False)
    grid.set(xlim=(0, 3.12), ylim=(len(arms) - 0.5, -0.5), frame_on=False)
    grid.legend(loc="upper center", bbox_to_anchor=(0.35, 0), ncols=2, frameon=False)
    points = cells[(cells.decoding == "kit") & cells.eval_loss.notna()]
    share = points[GOOD] / points.answers
    height = (share - share.min()) / (share.max() - share.min())
    points = points.assign(share=share, tie=points.eval_loss * (height - share.rank(pct=True)))
    losses.scatter(points.eval_loss, points.share, color="#08519c", zorder=3)
    for place, point in enumerate(points.sort_values(["share", "tie"]).itertuples()):
        # Beside the axes; of equal shares in the order in which their lines do not cross.
        at, end = (point.eval_loss, point.share), (1.04, (place + 0.5) / len(points))
        line = {"arrowstyle": "-", "color": "0.7", "relpos": (0, 0.5)}
        losses.annotate(point.arm, at, end, "data", "axes fraction", line, va="center")
    losses.set(xlabel="eval loss (nats per token)", ylabel="share sound and ended under kit")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=125, metadata={"Software": None})
    data.write_atomic(path, image.getvalue())


def write_report(folder: Path) -> int:
    """Writes report, picture and cells.csv, prints verdicts, and returns 1 if an arm failed."""
    records = read_records(folder)
    results = decide_claims(records)
    data.write_atomic(folder / "cells.csv", records.table.to_csv(index=False))
    draw_picture(records, folder / "ablation.png")
    data.write_atomic(folder / "ablation.md", make_report(records, results))
    for claim, (verdict, _) in results.items():
        print(f"{claim:<4} {verdict:<13} {CLAIMS[claim]}")
    print(f"\n{folder}/ablation.md: report; ablation.png, cells.csv and cells beside it")
    for arm, reason in records.failures.items():
        infer.report(f"{arm} failed, and runs again with the study's command: {reason}")
    return 1 if records.failures else 0


def main(config: AblateConfig) -> int:
    """Runs what is missing, then writes the report. Returns 1 if an arm failed, else 0."""
    if config.table and not config.dry_run:
        return write_report(config.folder)
    study = make_study(config)
    if config.answer:
        write_cells(study, config.answer)
        return 0
    infer.handle_signals()
    part, parts = map(int, config.shard.split("/"))
    missing = {arm: study.missing(arm) for arm in list(study.arms)[part::parts]}
    for arm, names in missing.items():
        print(f"{arm:<20}  {len(names)} of {len(ARMS[arm])} cells to do  {', '.join(ARMS[arm])}")
        if config.dry_run and study.arms[arm]:
            print(f"python train.py {shlex.join(study.arms[arm])}")
    left = sum(map(len, missing.values()))
    print(f"{left} cells of {len(study.probes)} questions to do, in {study.folder}", flush=True)
    if config.dry_run or not missing:
        return 0
    run_study(study, list(missing), config.workers or study.profile.workers)
    return write_report(study.folder)


if __name__ == "__main__":
    data.run_command(AblateConfig, main, __doc__, "Lower --workers, --num-probes or --num-rows.")

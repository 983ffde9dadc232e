"""Kills real runs with SIGKILL at random moments, resumes them, and counts lost and different results.

    python -m tests.faults train --rounds 20        a short training run
    python -m tests.faults ablation --rounds 20     a study of two models under three decodings

A round is one kill. A run that comes to its end between kills is compared with one that was never stopped, byte for byte, and
begun anew. Prints the figures; exits with 1 if anything was lost or different.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import tyro

import ablate
import infer
from tests import tiny_study

ROOT = Path(__file__).resolve().parent.parent
RUN = Path("runs") / "train" / "tiny"
STUDY = Path("runs") / "ablate" / "story"
WRITTEN = ("metrics.jsonl", "samples/0.jsonl", "samples/2.jsonl", "samples/4.jsonl")


def write_rows(cwd):
    """81 sample rows in two files, with two sentences of each answer; returns their paths."""
    files = []
    for source, count in (("conversational", 61), ("encyclopedic", 20)):
        lines = (ROOT / "samples" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        rows = [json.loads(line) for line in lines]
        for row in rows:
            row["output"] = ". ".join(row["output"].split(". ")[:2]).removesuffix(".") + "."
        files.append(cwd / f"{source}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def tiny_flags(cwd):
    """Flags of a run of four steps on a part of the sample rows."""
    flags = ["--name", "tiny", "--max-steps", "4", "--num-probes", "2", "--metric-for-best-model", "eval_loss", "--profile", "cpu"]
    conversational, encyclopedic = write_rows(cwd)
    return [*flags, "--conversational", str(conversational), "--encyclopedic", str(encyclopedic)]


def check_file(path):
    """Raises if a file is incomplete."""
    content = path.read_bytes()
    if path.suffix == ".json":
        json.loads(content)
    elif path.suffix == ".jsonl":
        assert content.endswith(b"\n"), path
        [json.loads(line) for line in content.splitlines()]
    elif path.suffix == ".png":
        assert content.endswith(b"IEND\xaeB`\x82"), path
    elif path.suffix == ".safetensors":
        size = 8 + int.from_bytes(content[:8], "little")
        ends = [tensor["data_offsets"][1] for name, tensor in json.loads(content[8:size]).items() if name != "__metadata__"]
        assert len(content) == size + max(ends), path


def list_checkpoints(folder):
    """Newest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name[11:]))


def is_in_the_making(path, folder):
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


@dataclass
class Training:
    """`python -m tests.tiny_train`, with a checkpoint after every step."""

    cwd: Path

    def command(self):
        return [sys.executable, "-m", "tests.tiny_train", *tiny_flags(self.cwd), "--save-minutes", "0"]

    def observe(self):
        """What must not get lost, with its progress: `{name: number}`."""
        folder = self.cwd / RUN
        steps = []
        for checkpoint in list_checkpoints(folder):
            with contextlib.suppress(OSError):  # one that was being written is none
                steps.append(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])
        done = (folder / "run.json").is_file()
        if done:
            infer.check_adapter(folder / "adapter")
        return {"steps": 10**6 if done else max(steps, default=0), "done": int(done)}

    def check_whole(self):
        folder = self.cwd / RUN
        for path in folder.rglob("*") if folder.exists() else ():
            in_checkpoint = "checkpoint-" in path.relative_to(folder).parts[0]
            if path.is_file() and not in_checkpoint and not is_in_the_making(path, folder):
                check_file(path)

    def phase(self, started, words):
        folder = self.cwd / RUN
        if "training:" not in words:
            return "starting"
        newest = next(iter(list_checkpoints(folder)), None)
        if newest and not (newest / "trainer_state.json").is_file():
            return "saving"
        metrics = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_bytes().splitlines()] if metrics.is_file() else []
        evaluated = {line["step"] for line in lines if "eval_loss" in line}
        last = max((line["step"] for line in lines), default=0)
        return "evaluating" if last in (0, 2, 4) and last not in evaluated else "training"

    def result(self):
        folder = self.cwd / RUN
        names = ("adapter/adapter_model.safetensors", "adapter/README.md", *WRITTEN)
        return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


@dataclass
class Study:
    """`python ablate.py` on tiny tables: one training run, six cells."""

    cwd: Path

    def command(self):
        return [sys.executable, "-m", "tests.tiny_study", *map(str, write_rows(self.cwd)), "--num-probes", "2"]

    def observe(self):
        cells = self.cwd / STUDY / "cells"
        found = {}
        for path in cells.glob("[!.]*") if cells.exists() else ():
            assert ablate.read_cell(path), path
            found[path.name] = 1
        return found | {"table": int((self.cwd / STUDY / "ablation.md").is_file())}

    def check_whole(self):
        folder = self.cwd / STUDY
        for path in folder.rglob("*") if folder.exists() else ():
            if path.is_file() and not is_in_the_making(path, folder) and path.suffix != ".log":
                check_file(path)

    def phase(self, started, words):
        lines = [" ".join(child) for child in started]
        if any("train.py" in line for line in lines):
            return "training"
        return "answering" if any("--answer" in line for line in lines) else "planning"

    def result(self):
        folder, found = self.cwd / STUDY, {}
        for path in sorted(folder.glob("cells/[!.]*.jsonl")):
            # The settings name the files of rows, which are in another folder in each round.
            found[path.name] = [line | {"settings": None} for line in ablate.read_cell(path)]
        weights = folder / "runs" / tiny_study.ARM / "adapter" / "adapter_model.safetensors"
        return found | {"adapter": hashlib.sha256(weights.read_bytes()).hexdigest()}


CASES = {"train": Training, "ablation": Study}


def start(case):
    words = (case.cwd / "words.txt").open("w+", encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(case.command(), cwd=case.cwd, env=env, stdout=words, stderr=words), words


def read(words):
    words.seek(0)
    return words.read()


def run_to_the_end(case):
    """Runs a case without interruption; returns its seconds."""
    began = time.monotonic()
    process, words = start(case)
    if process.wait():
        raise SystemExit(f"it ended with code {process.returncode}:\n{read(words)[-3000:]}")
    return time.monotonic() - began


def kill(process, draw, alone):
    """Kills the process and its children or, if `alone`, one of them; returns the children's command lines."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        lines = [child.cmdline() for child in children]
    except psutil.NoSuchProcess:
        return []
    victims = [draw.choice([process, *children])] if alone and children else [process, *children]
    for victim in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
    return lines


@dataclass
class Figures:
    rounds: int = 0
    phases: Counter = None
    resumed: int = 0
    finished: int = 0
    lost: int = 0
    different: int = 0

    def __str__(self):
        phases = ", ".join(f"{name} {count}" for name, count in sorted(self.phases.items()))
        return (
            f"rounds {self.rounds} (kills by phase: {phases})\n"
            f"resumed {self.resumed}, runs finished and compared {self.finished}\n"
            f"lost {self.lost}, different bytes {self.different}"
        )


def run_rounds(make_case, reference, seconds, rounds, seed=0, report=lambda text: None):
    """Kills `rounds` times; `reference` is the result of an uninterrupted run of this many `seconds`."""
    draw, figures = random.Random(seed), Figures(phases=Counter())
    case, known = make_case(), {}
    while True:
        figures.resumed += any(known.values())
        process, words = start(case)
        last = figures.rounds == rounds
        try:
            process.wait(timeout=None if last else draw.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            alone = isinstance(case, Study) and draw.random() < 0.5
            children = kill(process, draw, alone)
            process.wait()
            # What was not killed goes on alone for a while, and holds what it had claimed.
            text = read(words)
            phase = case.phase(children, text)
            figures.rounds += 1
            figures.phases[phase] += 1
            try:
                case.check_whole()
                now = case.observe()
            except Exception as error:
                report(f"not whole: {error!r}")
                figures.lost += 1
                now = known
            gone = [name for name, number in known.items() if now.get(name, 0) < number]
            figures.lost += len(gone)
            report(f"round {figures.rounds}: killed while {phase}, there is {now}, lost {gone}")
            known = now
            continue
        if process.returncode == 1 and isinstance(case, Study) and not last:
            continue  # a child was killed, which is recorded as a failure; the next start does it again
        if process.returncode:
            raise SystemExit(f"it ended with code {process.returncode}:\n{read(words)[-3000:]}")
        figures.finished += 1
        result = case.result()
        different = [name for name in reference if result.get(name) != reference[name]]
        figures.different += len(different)
        report(f"finished; different: {different}")
        if last:
            return figures
        case, known = make_case(), {}


@dataclass
class FaultsConfig:
    case: tyro.conf.Positional[Literal["train", "ablation"]]
    rounds: int = 20
    """Number of kills."""
    seed: int = 0
    """Seed of the random moments."""


def main(config):
    with tempfile.TemporaryDirectory() as folder:
        numbers = iter(range(10**6))

        def make_case():
            cwd = Path(folder) / str(next(numbers))
            cwd.mkdir()
            return CASES[config.case](cwd)

        whole = make_case()
        run_to_the_end(whole)  # fills the cache as well
        print(f"never stopped: {(seconds := run_to_the_end(second := make_case())):.0f} s", file=sys.stderr)
        if whole.result() != second.result():
            raise SystemExit("Two runs that were not stopped differ: nothing can be told by bytes here.")
        report = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        figures = run_rounds(make_case, whole.result(), seconds, config.rounds, config.seed, report)
    print(figures)
    return 1 if figures.lost or figures.different else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(FaultsConfig, description=__doc__)))

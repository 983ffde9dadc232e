"""How preparing rows grows: cleaning, search for repeated questions, split and mix, on generated rows.

    python -m tests.bench prepare [ROWS ...]

Each size runs three times, each time in a process of its own; medians are printed. The rows are sentences of the sample rows,
put together anew to ChatDoctor's lengths, with its greetings, sign-offs and destroyed sentences; some ask a question again.

The alternative, in the same process after it, is the same rules as a notebook chains them: one `datasets` map a step of
cleaning, and filters, the last of which remembers what was asked. That the same rows stay is checked. The chain counts no rule,
keeps no example and draws no mix, so it is compared with cleaning and the search for repeats alone. The picture is
docs/bench-prepare.png.
"""

import dataclasses
import itertools
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import time

import data
from tests.bench import Panel, draw

SIZES = (10_000, 30_000, 100_000, 112_165)
RUNS = 3
# Of 112,165 + 10,000 rows on the hub, so many are encyclopedic.
ENCYCLOPEDIC_SHARE = 0.08


def generate_rows(count):
    """`count` rows, about 65 words of question and 90 of answer as in ChatDoctor; the same ones every time."""
    draw = random.Random(0)
    samples = [row for name, path in data.SOURCES["cpu"].items() for row in data.load_rows(path, name)]
    asked, answered = (
        [sentence for text in texts for sentence in re.split(r"(?<=[.!?])\s+", text)]
        for texts in ([row.question for row in samples], [row.answer for row in samples])
    )
    rows = []
    for number in range(count):
        if draw.random() < ENCYCLOPEDIC_SHARE:
            topic = " ".join(draw.sample(answered, 1)[0].split()[:6])
            rows.append(data.Row(f"What is known of {topic} {number}?", " ".join(draw.sample(answered, 4)), "encyclopedic"))
            continue
        if rows and draw.random() < 0.01:
            question = draw.choice(rows[-1000:]).question + " Please help."
        else:
            question = "Hello doctor, " + " ".join(draw.sample(asked, 5)) + f" I am {number % 90} years old."
        answer = "Hello, Welcome to Chat Doctor forum. " + " ".join(draw.sample(answered, 6))
        if draw.random() < 0.3:
            answer = answer[: len(answer) // 2] + " ChatDoctor. " + answer[len(answer) // 2 :]
        rows.append(data.Row(question, answer + " Hope this helps. Take care.", "conversational"))
    return rows


def clean_by_chain(rows):
    """`(seconds, rows that stay)` of `datasets` maps and filters with the rules of data.py; making the dataset is not timed."""
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    chain = datasets.Dataset.from_list([dataclasses.asdict(row) for row in rows])
    probes = data.ProbeQuestions(probe.question for probe in data.read_probes())
    asked, keys, long_questions = set(), set(), data._LongQuestions()

    def both(change):
        return lambda row: {name: change(row[name]) for name in ("question", "answer")}

    def is_new(row):
        words = data._words(row["question"])
        text, key = " ".join(words), data._content_key(words)
        if probes.asked_by(words) or text in asked or key in keys:
            return False
        if len(words) >= data.LONG_QUESTION_WORDS and not long_questions.add_unless_near(words):
            return False
        asked.add(text)
        keys.add(key)
        return True

    started = time.perf_counter()
    chain = chain.map(both(lambda text: data._repair(text)[0]))
    chain = chain.map(both(lambda text: data._strip_opening(text)[0]))
    chain = chain.map(lambda row: {"answer": data._strip_closing(row["answer"])[0]})
    chain = chain.map(both(lambda text: re.sub(r"[ \t]{2,}", " ", text).strip()))
    chain = chain.filter(lambda row: not data._find_defect(row["question"], row["answer"]))
    chain = chain.map(lambda row: {"key": data.Row(**row).key}).sort("key").filter(is_new)
    seconds = time.perf_counter() - started
    return seconds, [data.Row(row["question"], row["answer"], row["source"]) for row in chain]


def run_once(count):
    """One run in this process: seconds by stage, and peak memory with the generated rows and all helping processes."""
    rows = generate_rows(count)
    logs = {name: {rule: data.RuleCount() for rule in data.RULES} for name in data.MIXES["week4"]}
    times = [time.perf_counter()]
    cleaned = list(
        itertools.chain.from_iterable(
            data.clean_rows([row for row in rows if row.source == name], log) for name, log in logs.items()
        )
    )
    times.append(time.perf_counter())
    kept = data.drop_repeats(cleaned, data.ProbeQuestions(probe.question for probe in data.read_probes()), logs)
    times.append(time.perf_counter())
    mix = data.draw_mix(kept, data.MIXES["rebalanced"], 3407, logs)
    times.append(time.perf_counter())
    stages = dict(zip(("clean", "repeats", "mix"), (b - a for a, b in itertools.pairwise(times)), strict=True))
    own, largest_child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    peak = (own + largest_child * os.cpu_count()) / 2**20
    chain_seconds, chain_kept = clean_by_chain(rows)
    assert chain_kept == kept
    return {"rows": count, "kept": len(kept), "drawn": len(mix.train), **stages, "peak_gib": peak, "chain": chain_seconds}


def main(arguments):
    if arguments[:1] == ["--once"]:
        print(json.dumps(run_once(int(arguments[1]))))
        return
    columns = ("rows", "kept", "clean s", "repeats s", "mix s", "total s", "rows/s", "peak GiB", "chain s", "kit is")
    print("".join(f"{column:>10}" for column in columns))
    kit_seconds, chain_seconds = [], []
    for count in map(int, arguments or SIZES):
        command = [sys.executable, "-m", "tests.bench", "prepare", "--once", str(count)]
        runs = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(RUNS)]
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        total = statistics.median(run["clean"] + run["repeats"] + run["mix"] for run in runs)
        faster = statistics.median(run["chain"] / (run["clean"] + run["repeats"]) for run in runs)
        kit_seconds.append((count / 1000, median["clean"] + median["repeats"]))
        chain_seconds.append((count / 1000, median["chain"]))
        print(
            f"{count:>10,}{median['kept']:>10,.0f}{median['clean']:>10.1f}{median['repeats']:>10.1f}{median['mix']:>10.1f}"
            f"{total:>10.1f}{count / total:>10,.0f}{median['peak_gib']:>10.2f}{median['chain']:>10.1f}{f'{faster:.1f}x':>10}",
            flush=True,
        )
    draw("prepare", [Panel("rows (thousands)", "cleaning, repeats (s)", {"kit": kit_seconds, "datasets": chain_seconds})])

"""Times the preparation of generated rows by their number: cleaning, duplicates, split and mix.

    python -m tests.bench prepare [ROWS ...]

Each size runs three times, each time in a process of its own; medians are printed. The rows are sentences of the sample rows,
put together anew to ChatDoctor's lengths, with its greetings, sign-offs and destroyed sentences; some ask a question again.

The alternative, in the same process after it, is the same rules as a notebook chains them: one `datasets` map a step of
cleaning, and filters, the last of which remembers what was asked. That the same rows stay is checked. The chain counts no rule,
keeps no example and draws no mix, so it is compared with cleaning and the search for repeats alone. The picture is
docs/bench-prepare.png.
"""

import itertools
import json
import multiprocessing
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import data
from tests.bench import Panel, draw

SIZES = (10_000, 30_000, 100_000, 112_165)
RUNS = 3
# Of 112,165 + 10,000 rows on the hub, so many are encyclopedic.
ENCYCLOPEDIC_SHARE = 0.08
DATASETS = {"conversational": "chatdoctor", "encyclopedic": "wikidoc"}


def generate_rows(count):
    """`count` rows as `(source, question, answer)`, about 65 words of question and 90 of answer as in ChatDoctor; the same
    ones every time."""
    draw = random.Random(0)
    flags = data.RowsFlags()
    samples = [
        row
        for name in ("conversational", "encyclopedic")
        for row in data.load_source(name, getattr(data.PROFILES["cpu"], name), flags)[0]
    ]
    asked, answered = (
        [sentence for text in texts for sentence in re.split(r"(?<=[.!?])\s+", text)]
        for texts in ([row.question for row in samples], [row.answer for row in samples])
    )
    rows = []
    for number in range(count):
        if draw.random() < ENCYCLOPEDIC_SHARE:
            topic = " ".join(draw.sample(answered, 1)[0].split()[:6])
            question = f"What is known of {topic} {number}?"
            rows.append(("encyclopedic", question, " ".join(draw.sample(answered, 4))))
            continue
        if rows and draw.random() < 0.01:
            question = draw.choice(rows[-1000:])[1] + " Please help."
        else:
            question = "Hello doctor, " + " ".join(draw.sample(asked, 5)) + f" I am {number % 90} years old."
        answer = "Hello, Welcome to Chat Doctor forum. " + " ".join(draw.sample(answered, 6))
        if draw.random() < 0.3:
            answer = answer[: len(answer) // 2] + " ChatDoctor. " + answer[len(answer) // 2 :]
        rows.append(("conversational", question, answer + " Hope this helps. Take care."))
    return rows


def write_sources(folder, count):
    """Writes the rows in ChatDoctor's columns, a file for each source; returns the paths."""
    paths = {name: folder / f"{name}.jsonl" for name in DATASETS}
    with paths["conversational"].open("w") as conversational, paths["encyclopedic"].open("w") as encyclopedic:
        files = {"conversational": conversational, "encyclopedic": encyclopedic}
        for source, question, answer in generate_rows(count):
            record = {"instruction": data.INSTRUCTIONS[DATASETS[source]], "input": question, "output": answer}
            files[source].write(json.dumps(record) + "\n")
    return paths


def repair(text, cleaning):
    """The text with its characters repaired, as `data.clean_row` does it."""
    import ftfy

    if not data._PLAIN_ASCII.fullmatch(text):
        text = ftfy.fix_text(text, uncurl_quotes=False)
    for pattern, replacement in data._REPLACEMENTS.values() if cleaning == "chatdoctor" else ():
        text = pattern.sub(replacement, text)
    return text.strip()


def strip_opening(text):
    """The text without its greetings, as `data.clean_row` leaves it."""
    start = 0
    while (found := data._OPENING.match(text, start)) and found.end() < len(text):
        start = found.end()
    return text[start : start + 1].upper() + text[start + 1 :] if start else text


def prepare_by_chain(paths):
    """`(seconds, rows that stay)` of `datasets` maps and filters with the rules of data.py, from the same files."""
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    probes = {frozenset(data._WORD.findall(record["question"].casefold())) - data._FILLER for record in read_probes()}
    seen = set()

    def is_new(row):
        words = data._WORD.findall(row["question"].casefold())
        content = " ".join(word for word in words if word not in data._FILLER) or " ".join(words)
        if frozenset(words) - data._FILLER in probes or content in seen:
            return False
        seen.add(content)
        return True

    started = time.perf_counter()
    parts = []
    for source, path in paths.items():
        cleaning = DATASETS[source]
        part = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))
        part = part.map(
            lambda row, source=source: {"source": source, "question": row["input"].strip(), "answer": row["output"].strip()},
            remove_columns=part.column_names,
        )
        for name in ("question", "answer"):
            part = part.map(lambda row, name=name, cleaning=cleaning: {name: repair(row[name], cleaning)})
            if cleaning == "chatdoctor":
                part = part.map(lambda row, name=name: {name: strip_opening(row[name])})
        if cleaning == "chatdoctor":
            part = part.map(lambda row: {"answer": data._strip_closing(row["answer"])[0]})
        part = part.map(lambda row: {n: re.sub(r"[ \t]{2,}", " ", row[n]).strip() for n in ("question", "answer")})
        parts.append(
            part.filter(
                lambda row, cleaning=cleaning: (
                    not data._find_defect([("user", row["question"]), ("assistant", row["answer"])], cleaning)
                )
            )
        )
    chain = datasets.concatenate_datasets(parts)
    chain = chain.map(lambda row: {"key": data._digest(row["source"], row["question"], row["answer"])}).sort("key")
    chain = chain.filter(is_new)
    seconds = time.perf_counter() - started
    return seconds, [(row["source"], row["question"], row["answer"]) for row in chain]


def read_probes():
    return [record for _, record in data.read_records(str(data.PROBES))]


def run_once(count):
    """One run in this process: seconds by stage, and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, so that the memory is that of preparing.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            paths = pool.apply(write_sources, (Path(folder), count))
        flags = data.RowsFlags()
        times = [time.perf_counter()]
        loaded = [data.load_source(name, str(path), flags) for name, path in paths.items()]
        times.append(time.perf_counter())
        cleaned = [row for rows, report in loaded for row in (data.clean_row(each, report) for each in rows) if row]
        times.append(time.perf_counter())
        reports = dict(zip(paths, (report for _, report in loaded), strict=True))
        kept = data.drop_repeats(cleaned, [record["question"] for record in read_probes()], reports)
        times.append(time.perf_counter())
        mix = data.draw_mix(kept, data.MIXES["rebalanced"], 3407)
        times.append(time.perf_counter())
        stages = dict(zip(("read", "clean", "repeats", "mix"), (b - a for a, b in itertools.pairwise(times)), strict=True))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        chain_seconds, chain_kept = prepare_by_chain(paths)
        assert chain_kept == [(row.source, row.question, row.answer) for row in kept]
    return {"rows": count, "kept": len(kept), "drawn": len(mix.train), **stages, "peak_gib": peak, "chain": chain_seconds}


def main(arguments):
    if arguments[:1] == ["--once"]:
        print(json.dumps(run_once(int(arguments[1]))))
        return
    columns = ("rows", "kept", "read s", "clean s", "repeats s", "mix s", "total s", "rows/s", "peak GiB", "chain s", "kit is")
    print("".join(f"{column:>10}" for column in columns))
    kit_seconds, chain_seconds = [], []
    for count in map(int, arguments or SIZES):
        command = [sys.executable, "-m", "tests.bench", "prepare", "--once", str(count)]
        runs = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(RUNS)]
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        total = statistics.median(run["read"] + run["clean"] + run["repeats"] + run["mix"] for run in runs)
        faster = statistics.median(run["chain"] / (run["read"] + run["clean"] + run["repeats"]) for run in runs)
        kit_seconds.append((count / 1000, median["read"] + median["clean"] + median["repeats"]))
        chain_seconds.append((count / 1000, median["chain"]))
        print(
            f"{count:>10,}{median['kept']:>10,.0f}{median['read']:>10.1f}{median['clean']:>10.1f}{median['repeats']:>10.1f}{median['mix']:>10.1f}"
            f"{total:>10.1f}{count / total:>10,.0f}{median['peak_gib']:>10.2f}{median['chain']:>10.1f}{f'{faster:.1f}x':>10}",
            flush=True,
        )
    draw(
        "prepare",
        [Panel("rows (thousands)", "reading, cleaning, repeats (s)", {"kit": kit_seconds, "datasets": chain_seconds})],
    )

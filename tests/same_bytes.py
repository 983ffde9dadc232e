"""The same greedy (or seeded) question gives the same bytes: alone, among others, in a new process, on 1 or 2 threads.

    python -m tests.same_bytes ADAPTER [--max-new-tokens 32]

32 questions under every preset, asked of base and adapter in five ways, each way in a process of its own; the digests of
the answers are compared with those of the first. It takes a while: the questions asked alone are most of it.
"""

import contextlib
import json
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

import data
import infer

NUM_QUESTIONS = 32
WAYS = {
    "in batches": ("batch", 2),
    "in batches, a new process": ("batch", 2),
    "in batches, shuffled": ("shuffled", 2),
    "in batches, 1 thread": ("batch", 1),
    "alone": ("alone", 2),
}


@dataclass(frozen=True)
class Config:
    """Flags of this command; the last two are for the processes that it starts."""

    adapter: tyro.conf.Positional[Path]
    max_new_tokens: int = 32
    way: Literal["batch", "shuffled", "alone"] | None = None
    threads: int = 2


def make_requests(cap):
    """Every question under every preset."""
    samples, _ = data.load_source("encyclopedic", data.PROFILES["cpu"].encyclopedic, data.RowsFlags())
    questions = [*(probe.question for probe in infer.read_probes()), *(row.question for row in samples)][:NUM_QUESTIONS]
    presets = [replace(decoding, max_new_tokens=cap) for decoding in infer.DECODINGS.values()]
    return [infer.Request(question, decoding) for question in questions for decoding in presets]


def ask(config):
    """Digests of all answers generated in one way, base model first."""
    import torch

    adapter = infer.check_adapter(config.adapter)
    infer.prepare_environment(adapter.profile)
    torch.set_num_threads(config.threads)
    loaded = infer.load_for_inference(adapter.profile, adapter)
    requests = make_requests(config.max_new_tokens)
    order = list(range(len(requests)))
    if config.way == "shuffled":
        random.Random(0).shuffle(order)
    digests = []
    for context in (loaded.without_adapter(), contextlib.nullcontext(loaded)):
        with context as model:
            if config.way == "alone":
                answers = [infer.answer_requests(model, [request])[0] for request in requests]
            else:
                shuffled = infer.answer_requests(model, [requests[place] for place in order])
                answers = [answer for _, answer in sorted(zip(order, shuffled, strict=True), key=lambda pair: pair[0])]
        digests += [answer.sha256 for answer in answers]
    return digests


def main(config):
    if config.way:
        print(json.dumps(ask(config)))
        return
    reference = None
    for name, (way, threads) in WAYS.items():
        command = [sys.executable, "-m", "tests.same_bytes", str(config.adapter), "--way", way, "--threads", str(threads)]
        command += ["--max-new-tokens", str(config.max_new_tokens)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        digests = json.loads(ran.stdout)
        reference = reference or digests
        equal = sum(a == b for a, b in zip(digests, reference, strict=True))
        print(f"{name:<28}{equal} of {len(digests)} answers equal to those of the first row", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

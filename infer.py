"""What does the model say, and is it sound? Questions in, answers with a verdict out.

    python infer.py "What are the warning signs of a heart attack?"
    python infer.py "..." --base                        the base model, without the adapter
    python infer.py "..." --decoding story-fix          the story's decoding after its fixes
    python infer.py "..." --repetition-penalty 1.2      change one field of the decoding
    python infer.py "..." --compare models              base and adapter (decodings: every preset)
    python infer.py "..." --verify                      same bytes in a new process and in a batch?
    python infer.py --questions questions.txt           many, into questions.answers.jsonl
    echo "..." | python infer.py -                      one question per line
    python infer.py --judge answers.jsonl               judge the answers of any program
    python infer.py                                     chat

stdout contains the answers and nothing else. They are not medical advice.
"""

from __future__ import annotations

import cmd
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import gc
import hashlib
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
import re
import reprlib
import signal
import statistics
import subprocess
import sys
import time
import types
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

import data
from data import Profile, ProfileChoice, ProfileName, UsageError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import (
        DynamicCache,
        GenerationConfig,
        LogitsProcessor,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

RUNS = Path("runs")
TRAIN_RUNS = RUNS / "train"
# Names the run in TRAIN_RUNS whose adapter is the default; train.py writes it after a run.
LATEST = TRAIN_RUNS / "latest.txt"
# File in the adapter's folder for values that PEFT's and transformers' files have no place for.
ADAPTER_RECORD = "kit.json"
# Names of runs and studies, which become names of folders.
RUN_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
RUN_NAME_RULE = "up to 100 letters, digits, '.', '_' and '-', starting with a letter or digit."

# Every forward pass of a generation has this many rows, and prompts are padded to a multiple of
# this many tokens: equal shapes use equal kernels, so an answer does not depend on the others.
ROWS, PROMPT_MULTIPLE = 24, 64
# Answers to --questions are saved in groups of this many.
QUESTIONS_PER_SAVE = 32

PadName = Literal["native", "added"]
# The story's mistake: an added token enlarges the embedding, which the adapter then contains.
ADDED_PAD_TOKEN = "[PAD]"


# --- Decoding ------------------------------------------------------------------------------------

StopName = Literal["end-of-turn", "generation-config", "never"]
DecodingName = Literal["plain", "story-collapse", "story-fix", "week3", "kit"]


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded. Nothing is inherited from the model's generation config."""

    max_new_tokens: int = 256
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that occurred (Keskar et al.
    2019); 1.0 is off."""
    no_repeat_ngram_size: int = 0
    """Every n-gram of this size can occur only once; 0 is off."""
    count_prompt: bool = False
    """Whether penalty and n-gram ban also count the prompt's tokens, as in transformers."""
    stop: StopName = "end-of-turn"
    """Tokens that end an answer: the chat template's end of turn, those of the base model's
    generation config, or none."""
    temperature: float = 0.0
    """0 is greedy decoding; otherwise tokens are sampled from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Sample from the most probable tokens whose probabilities add up to this; 1.0 is all."""
    sampling_seed: int = 0
    """Seed of each answer, so that it does not depend on the others."""

    def __post_init__(self) -> None:
        # Beyond these limits, logits overflow or torch.Generator rejects the seed.
        length = data.MAX_SEQ_LENGTH
        limits = {
            "max_new_tokens": (1, length - 1, f"1 to {length - 1}, less the prompt"),
            "repetition_penalty": (0.1, 10, "a number from 0.1 to 10 (1.0 is off)"),
            "no_repeat_ngram_size": (0, length, f"0 (off) to {length}"),
            "temperature": (0.01, 100, "0 (greedy), or a number from 0.01 to 100"),
            "top_p": (1e-9, 1, "a number above 0 and at most 1"),
            "sampling_seed": (0, 2**63 - 1, f"a whole number from 0 to {2**63 - 1}"),
        }
        for name, (least, most, expected) in limits.items():
            value = getattr(self, name)
            if not (least <= value <= most or (name == "temperature" and value == 0)):
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected {expected}.")

    def __str__(self) -> str:
        """The name of the nearest preset, and the fields that differ from it."""

        def changes(preset: Decoding) -> list[str]:
            fields = dataclasses.asdict(self).items()
            return [f"{name}={value}" for name, value in fields if value != getattr(preset, name)]

        nearest = min(DECODINGS, key=lambda name: len(changes(DECODINGS[name])))
        return " ".join([nearest, *changes(DECODINGS[nearest])])


# `story-*` and `week3` are the story's, whose library counted the prompt. `kit` is ours, chosen by
# the table in docs/judge.md.
DECODINGS: dict[DecodingName, Decoding] = {
    "plain": Decoding(),
    "story-collapse": Decoding(no_repeat_ngram_size=3, count_prompt=True, stop="generation-config"),
    "story-fix": Decoding(repetition_penalty=1.3, count_prompt=True),
    "week3": Decoding(temperature=0.7, top_p=0.9),
    "kit": Decoding(repetition_penalty=1.1),
}


@dataclass(frozen=True)
class Answer:
    """An answer and how it was generated. `seconds` does not count in comparisons."""

    question: str
    text: str
    token_ids: list[int]
    """Ids of the answer without the prompt, including the stop token if there was one."""
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    answer_tokens: int
    num_overruled: int
    """Answer tokens for which penalty or n-gram ban changed the model's first choice."""
    decoding: Decoding
    model: str
    """Name of the base model."""
    adapter: str | None
    """sha256 of the adapter's weights, or None for the base model alone."""
    seconds: float = field(compare=False)
    """Duration of the batch that contained the answer."""
    system_prompt: str = data.SYSTEM_PROMPT

    @property
    def sha256(self) -> str:
        """Digest of the token ids: equal answers have equal digests, on any machine."""
        return hashlib.sha256(json.dumps(self.token_ids).encode()).hexdigest()

    def to_record(self) -> dict[str, Any]:
        """The answer as JSON-ready values."""
        return dataclasses.asdict(self) | {"sha256": self.sha256}


# --- The judge -----------------------------------------------------------------------------------

Measure = tuple[float, tuple[int, int]]  # a score, and the characters of the text it comes from
NOTHING: Measure = (0.0, (0, 0))


@dataclass(frozen=True)
class Check:
    """The value from which a measure is a finding, and the message about that part of the text."""

    threshold: float
    message: str


# How each threshold was chosen: docs/judge.md.
CHECKS: dict[str, Check] = {
    "empty": Check(1, "it says nothing, or stops mid-sentence: {}"),
    "loop": Check(20, "it repeats itself word for word: {}"),
    "repetition": Check(1.5, "it says nearly the same again and again: {}"),
    "list": Check(21, "a list does not end: {}"),
    "leak": Check(1, "this is not part of an answer: {}"),
    "invented-medicine": Check(1, "no medicine has this name: {}"),
    "surprisal": Check(2.5, "the base model finds this unlikely: {}"),
}


@dataclass(frozen=True)
class Finding:
    """A defect of an answer's form, which says nothing about medical correctness."""

    name: str
    """One of `CHECKS`."""
    score: float
    """In the unit of its measure."""
    span: tuple[int, int]
    """Characters of the text: the first, and the one after the last."""
    message: str


@dataclass(frozen=True)
class JudgedAnswer:
    """The verdict on an answer, and what it is based on."""

    findings: tuple[Finding, ...]
    score: float
    """The largest measure in units of its threshold: sound answers are below 1."""
    ended: bool
    """Whether the stop token ended the answer, rather than the limit of tokens."""
    answer: Answer | None = None
    facts: Facts | None = None
    """What the answer contains of the probe's lists, if the question is a probe's."""

    @property
    def sound(self) -> bool:
        """Whether there are no findings. An answer that was cut off may be sound so far."""
        return not self.findings

    @property
    def verdict(self) -> str:
        """`sound`, or the names of the findings."""
        return ", ".join(each.name for each in self.findings) or "sound"

    def to_record(self) -> dict[str, Any]:
        """JSON-ready values."""
        record = self.answer.to_record() if self.answer else {}
        record |= {
            "sound": self.sound,
            "verdict": self.verdict,
            "score": round(self.score, 4),
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }
        return record | ({"facts": dataclasses.asdict(self.facts)} if self.facts else {})


# Markdown, which is replaced by as many spaces, so that spans of the text stay valid.
_MARKDOWN = re.compile(
    r"^[ \t]*(?:```|~~~).*$|^[ \t]*(?:[-*_=][ \t]*){3,}$|^[ \t]*(?:#{1,6}|>)[ \t]+"
    r"|^[ \t]*(?:[-*+\u2022]|\d{1,3}[.)])[ \t]+|\*{1,3}|__|`+|\|"
    r"|!?\[(?=[^\]\n]{0,300}\]\()|\]\([^)\n]{0,300}\)",
    re.M,
)
_NUMBER_OR_WORD = re.compile(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")


def blank_markdown(text: str) -> str:
    """The text with spaces in place of its markdown, of the same length."""
    return _MARKDOWN.sub(lambda found: " " * len(found[0]), text)


# An answer whose stop token follows one of these stops mid-sentence.
_DANGLING = frozenset(("an", "and", "of", "or", "the", "to", "with"))


def measure_empty(text: str, ended: bool) -> Measure:
    """1 if the answer has no words, or its stop token follows an article or a conjunction."""
    words = text.split()
    is_broken_off = ended and bool(words) and words[-1] in _DANGLING
    kinds = map(unicodedata.category, text)
    # Letters, numbers, and symbols such as emoji.
    has_words = any(kind[0] in "LN" or kind == "So" for kind in kinds)
    return float(is_broken_off or not has_words), (max(0, len(text) - 90), len(text))


def measure_loop(plain: str, size: int = 6) -> Measure:
    """Most words in a row that repeat an earlier part of the answer, by sequences of `size` words
    (after seq-rep-n of Welleck et al. 2020). Repeats that do not follow at once count half."""
    matches = list(_NUMBER_OR_WORD.finditer(plain))
    words = [match[0].lower() for match in matches]
    last_at: dict[tuple[str, ...], int] = {}
    best, first, end, distance = NOTHING, 0, -1, 0  # words `first` to before `end` are repeated
    for start in range(len(words) - size + 1):
        sequence = tuple(words[start : start + size])
        if sequence in last_at:
            is_same_copy = start <= end + 2 and start - last_at[sequence] == distance
            if start > end and not is_same_copy:  # up to two words may have changed
                first, distance = start, start - last_at[sequence]
            end = start + size
            run = end - first
            # A sentence that is repeated later, such as a refrain, is not yet a loop.
            score = run if distance <= 1.5 * run else run / 2
            if score > best[0]:
                best = score, (matches[first].start(), matches[end - 1].end())
        last_at[sequence] = start
    return best


def measure_repetition(plain: str, window: int = 512, stride: int = 256) -> Measure:
    """Bytes that zlib saves in the worst `window` bytes, over bytes that remain (the compression
    ratio of Radford et al. 2022, less 1)."""
    # Runs of spaces, which replace markdown, compress well but are no repetition.
    encoded = re.sub(r"[ \t]+", " ", plain).encode("utf-8", "replace")
    worst, at = 1.0, 0
    for start in range(0, max(1, len(encoded) - window + stride), stride):
        part = encoded[start : start + window]
        ratio = len(part) / len(zlib.compress(part, 9))
        if ratio >= worst:
            worst, at = ratio, start
    # The span is proportional, since bytes are not characters, and spaces were removed.
    share = len(plain) / max(1, len(encoded))
    end = min(at + window, len(encoded))
    return worst - 1, (round(at * share), round(end * share))


_SENTENCE = re.compile(r"[^\n]+?(?:[^\d\s][.!?;:](?=\s)|\n|\Z)")
_SHORT_ITEM_END = re.compile(r",|\s[\u2013\u2014-]\s|\b(?:and|or)\b|\Z")
_LIST_LINE = re.compile(r"^([ \t]*)(?:[-*+\u2022]|(\d{1,3})[.)])[ \t]+\S.*$|^([ \t]*)\S.*$", re.M)
_NUMBERED = re.compile(r"(?<![\w.,/])(\d{1,3})[.)]\s+(?=\D)")


def measure_list(text: str, question: str = "", short: int = 5) -> Measure:
    """Items of the longest list: short items in a row within a sentence, lines of one list, or
    numbers in a row.

    A short item has at most `short` words. A list ends where another line follows, or where the
    numbers begin again; lines that are indented below an item are not counted. Neither is a list
    with no more items than a number in the question.
    """
    best = NOTHING
    asked = max(map(int, re.findall(r"\d{1,3}", question)), default=0)

    def count(run: int, start: int, end: int) -> None:
        nonlocal best
        if run > max(best[0], asked):
            best = run, (start, end)

    for sentence in _SENTENCE.finditer(text):
        run, start, at = 0, sentence.start(), 0
        for end in _SHORT_ITEM_END.finditer(sentence[0]):
            item = sentence[0][at : end.start()].split()
            if item:
                run = run + 1 if len(item) <= short else 0
                start = sentence.start() + at if run == 1 else start
                count(run, start, sentence.start() + end.start())
            at = end.end()
    run, start, indentation = 0, 0, ""
    for line in _LIST_LINE.finditer(text):
        indent, number, other = line.groups()
        if other is not None:
            run = run if len(other) > len(indentation) else 0
        elif not run or number in ("0", "1") or len(indent) < len(indentation):
            run, start, indentation = 1, line.start(), indent
        elif indent == indentation:
            run += 1
        count(run, start, line.end())
    run, start, last = 0, 0, -1
    for found in _NUMBERED.finditer(text):
        run = run + 1 if int(found[1]) == last + 1 else 1
        start = found.start() if run == 1 else start
        last = int(found[1])
        count(run, start, found.end())
    return best


_LEAK = re.compile(
    # Tokens of chat templates, and the role names that remain without them.
    r"<\|\w+\|>|\[/?INST\]|</?s>|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|^#{2,} ?(?:Instruction|Input|Response):?[ \t]*$|Cutting Knowledge Date:"
    r"|(?<=[^\s\w(\[{\"'/-])[ \t]?(?:assistant|user|system|ipython)[ \t]*$"
    r"|(?<=[a-z0-9])assistant[ \t]*(?:\n[ \t]*\n|\Z)"
    r"|^(?:assistant|user|system|ipython)[ \t]*$"
    # Text in a wrong encoding, and symbols in a row.
    r"|\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\u00e2\u20ac\S?"
    r"|\u00c3[\x80-\xbf\u00a9\u00a8\u00bc\u00b6]|\u00c2[\x80-\xbf]"
    r"|([?$%^&~])\1{3,}",
    re.M,
)
# Not counted if the question asks for it.
_LEAK_UNLESS_ASKED = re.compile(
    # Other speakers.
    r"(?:^|(?<=[.!?]\s))\W{0,3}(?:User|Human|Assistant|Bot|USER|HUMAN|ASSISTANT)\W{0,2}:"
    r"|\b[Ii](?: am|'m) (?:an? )?\d{1,2}[- ]?(?:years?|yrs?|y/?o)\b"
    r"|\b(?:[Dd]ear|[Hh]ello|[Hh]i),? (?:[Dd]octor|[Dd]r)\b"
    # Code and web mark-up.
    r"|^[ \t]*(?:import \w+|from [\w.]+ import |def \w+\(|#include|print\(|function \w*\()"
    r"|</?(?:div|span|p|a|ul|ol|li|table|tr|td|h[1-6]|img|html|body|script|ref)"
    r"(?:\s[^<>\n=]{0,40}=[^<>\n]{0,80})?\s?/?>|&(?:nbsp|quot|apos|#\d+);"
    r"|\[\[|\]\]|\{\{[^{}\n]*\}\}|\{\|",
    re.M,
)
_ASKED_FOR = re.compile(
    r"\b(?:faq|quiz|dialogue|conversation|interview|script|soap|letter|e-?mail|code|function"
    r"|program|python|html|latex|translat\w*)\b",
    re.I,
)
# One or two may be headings.
_SPEAKER = re.compile(
    r"^\W{0,3}(?:patient|question|q|customer|client|student|interviewer|doctor|dr|instruction"
    r"|response|answer)\W{0,2}:",
    re.M | re.I,
)
# A few may be references.
_ADDRESS = re.compile(r"https?://\S+|www\.\S+")
# Scripts other than Latin and Greek, unless a term is given in brackets.
_OTHER_SCRIPT = re.compile(
    r"(?<![(\u0400-\u1cff\u2e80-\ud7ff\uf900-\ufdff])[\u0400-\u1cff\u2e80-\ud7ff\uf900-\ufdff]+"
)


def measure_leak(text: str, question: str = "") -> Measure:
    """Number of template tokens, role names, other speakers, pieces of code and markup, undecoded
    characters, and runs of a script that the question is not written in."""
    found = list(_LEAK.finditer(text))
    if not _ASKED_FOR.search(question):
        found += _LEAK_UNLESS_ASKED.finditer(text)
        speakers = list(_SPEAKER.finditer(text))
        found += speakers if len(speakers) > 2 else []
        if not _OTHER_SCRIPT.search(question):
            found += _OTHER_SCRIPT.finditer(text)
    found += list(_ADDRESS.finditer(text))[5:]
    return len(found), min((match.span() for match in found), default=(0, 0))


# Stems of the WHO's international nonproprietary names with which hardly any other word ends.
_MEDICINE_ENDINGS = tuple(
    """floxacin cillin mycin micin cycline bactam penem conazole prazole nidazole bendazole olol
    sartan statin vudine nib ciclib gliptin gliflozin glitazone glutide dipine triptan gepant
    azepam azolam thiazide semide xaban gatran profen coxib setron fibrate dronate artemisinin
    platin taxel lukast oxetine pril mab vir caine parin grel fungin rubicin vaptan
    lutamide""".split()
)
_LONG_WORD = re.compile(r"(?<![-\w])[^\W\d_]{6,}(?![\w])")


@functools.cache
def load_medicines() -> frozenset[str]:
    """Words, in lower case, of the names that drug-named-entity-recognition knows; cached."""

    def build(folder: Path) -> None:
        module = "drug_named_entity_recognition.drugs_finder"
        program = f"from {module} import drug_variant_to_canonical as names; print(*names)"
        # In its own process, since the library keeps several hundred MiB of indices.
        command = [sys.executable, "-X", "utf8", "-c", program]
        names = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True).stdout
        words = sorted(set(re.findall(r"[^\W\d_]+", names.lower())))
        (folder / "words.txt").write_text("\n".join(words), encoding="utf-8")

    version = importlib.metadata.version("drug-named-entity-recognition")
    folder = data.cached_folder(f"medicines-{version}", build)
    return frozenset((folder / "words.txt").read_text(encoding="utf-8").split("\n"))


@functools.cache
def is_medicine(word: str) -> bool:
    """Whether the word, in lower case, is one of `load_medicines`, or a misspelling of one."""
    known = load_medicines()
    if word in known or word.removesuffix("s") in known:
        return True
    similar = [each for each in known if each[:2] == word[:2] and abs(len(each) - len(word)) < 2]
    return bool(difflib.get_close_matches(word, similar, n=1, cutoff=0.87))


def measure_medicine(text: str, question: str = "") -> Measure:
    """Number of words that end like a WHO name of a medicine, but are not one. Names in the
    question and bare endings are not counted."""
    asked, spans = question.lower(), {}
    for match in _LONG_WORD.finditer(text):
        word = match[0].lower()
        has_ending = word.removesuffix("s").endswith(_MEDICINE_ENDINGS) or word.startswith("cef")
        if has_ending and word not in asked and not is_medicine(word):
            spans.setdefault(word, match.span())
    return len(spans), min(spans.values(), default=(0, 0))


def measure_answer(
    text: str, question: str = "", finish_reason: str = "stop", surprisal: Measure = NOTHING
) -> dict[str, Measure]:
    """Every measure of an answer, in the order of `CHECKS`; loads no model.

    `surprisal` is the result of `measure_surprisal`, if a model has read the answer.
    """
    plain = blank_markdown(text)
    return {
        "empty": measure_empty(text, finish_reason == "stop"),
        "loop": measure_loop(plain),
        "repetition": measure_repetition(plain),
        "list": measure_list(text, question),
        "leak": measure_leak(text, question),
        "invented-medicine": measure_medicine(text, question),
        "surprisal": surprisal,
    }


def judge(
    text: str,
    question: str = "",
    finish_reason: str = "stop",
    surprisal: Measure = NOTHING,
    *,
    probe: Probe | None = None,
) -> JudgedAnswer:
    """The verdict on an answer by `measure_answer` and `CHECKS`, with the facts of its `probe`."""
    measures = measure_answer(text, question, finish_reason, surprisal)
    findings = []
    for name, (score, (start, end)) in measures.items():
        if score >= CHECKS[name].threshold:
            message = CHECKS[name].message.format(shorten(text[start:end]))
            findings.append(Finding(name, round(score, 4), (start, end), message))
    score = max(score / CHECKS[name].threshold for name, (score, _) in measures.items())
    facts = check_facts(text, probe) if probe else None
    return JudgedAnswer(tuple(findings), score, finish_reason == "stop", facts=facts)


def shorten(text: str, limit: int = 90) -> str:
    """The text in one line and in quotes; one longer than `limit` loses its middle."""
    line = " ".join(text.split())
    if len(line) > limit:
        line = f"{line[: limit * 2 // 3]} ... {line[-limit // 3 :]}"
    return f'"{line}"'


# --- Facts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A fact that an answer should name, or a wrong claim, recognised by any of its phrases."""

    name: str
    phrases: Sequence[str]
    """Lower-case words; `...` stands for up to six words of the same sentence."""
    guideline: str = ""
    """The published reference."""
    unless_after: Sequence[str] = ()
    """A wrong claim after one of these phrases is excused."""


@dataclass(frozen=True)
class Probe:
    """A question that every run is asked, and the lists by which its answers are checked."""

    id: str
    question: str
    points: Sequence[Point]
    wrong_claims: Sequence[Point]


def _check_texts(values: Any) -> None:
    is_list = isinstance(values, list | tuple)
    if not is_list or not all(isinstance(text, str) and text.strip() for text in values):
        raise TypeError(f"{reprlib.repr(values)} is not a list of texts")


def read_probes(source: str | None = None) -> list[Probe]:
    """The probes of a file, by default samples/probes.jsonl. Only `question` is required.

    Raises UsageError if a line is not a probe or repeats a question, or the file is empty.
    """
    probes: dict[str, Probe] = {}
    for place, record in data.read_records(source or str(data.PROBES)):
        try:
            if isinstance(record, data.BadRecord):
                raise TypeError(record)
            points = [Point(**each) for each in record.get("points") or ()]
            claims = [Point(**each) for each in record.get("wrong_claims") or ()]
            for each in (*points, *claims):
                _check_texts([each.name])
                _check_texts(each.phrases)
                _check_texts(each.unless_after)
            name, question = record.get("id"), record["question"]
            name = f"probe-{len(probes) + 1}" if name is None else str(name)
            _check_texts([name, question])
            check_question(question := question.strip())
            if question in probes:
                raise UsageError(f"an earlier line has the same question, {shorten(question)}")
            probes[question] = Probe(name, question, points, claims)
        except (KeyError, TypeError, AttributeError, UsageError) as error:
            raise UsageError(
                f"{place}: not a probe ({error}). Expected `question` and, if you like, `points` "
                "and `wrong_claims`, as in samples/README.md."
            ) from None
    if not probes:
        raise UsageError(f"{source} contains no questions. Expected lines with `question`.")
    return list(probes.values())


# Words that negate a phrase that follows in the same clause.
_NEGATION = re.compile(
    r"\b(?:not?|never|without|nor|neither|unlike|cannot|avoid\w*|instead of|rather than"
    r"|\w+n['’]t)\b",
    re.I,
)
# Words that deny the phrase before: "... is not a sign", "... are no longer the first choice".
_DENIAL = re.compile(r"(?:\W++[\w'’]++){0,2}?\W+(?:not\b|no\b|never\b|\w+n['’]t\b)", re.I)
_CLAUSE_END = re.compile(r"[.!?;:,\n]|\bbut\b", re.I)


@functools.cache
def compile_phrase(phrase: str) -> re.Pattern[str]:
    """A pattern of whole words, singular or plural, in which a hyphen is equal to a space."""
    parts = [
        r"[\s-]+".join(re.escape(word) + "(?:e?s)?" for word in re.split(r"[\s-]+", part.strip()))
        for part in phrase.split("...")
    ]
    # Possessive, since a run of dashes or apostrophes could be split in exponentially many ways.
    up_to_six_words = r"\b(?:[^\w.!?]++[\w'’-]++){0,6}?[^\w.!?]+"
    return re.compile(r"\b" + up_to_six_words.join(parts) + r"\b", re.I)


def find_mention(text: str, phrases: Iterable[str], *, or_denied_after: bool = False) -> int | None:
    """Where the first phrase begins that is not negated earlier in its clause, or None.

    With `or_denied_after`, neither does a phrase count that the words right after it deny.
    """
    places = []
    for phrase in phrases:
        for match in compile_phrase(phrase).finditer(text):
            before = _CLAUSE_END.split(text[: match.start()])[-1]
            after = _CLAUSE_END.split(text[match.end() :], maxsplit=1)[0]
            if not (_NEGATION.search(before) or (or_denied_after and _DENIAL.match(after))):
                places.append(match.start())
                break
    return min(places, default=None)


@dataclass(frozen=True)
class Facts:
    """Which items of a probe's lists occur in an answer; no measure of its correctness."""

    named: tuple[str, ...]
    missing: tuple[str, ...]
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.named) + len(self.missing)
        return f"points {len(self.named)}/{total}, wrong claims {len(self.wrong)}"


def check_facts(text: str, probe: Probe) -> Facts:
    """Which points of the probe the answer names, and which wrong claims it makes."""
    named = [each.name for each in probe.points if find_mention(text, each.phrases) is not None]
    wrong = []
    for claim in probe.wrong_claims:
        # "A sore throat is not a sign" claims nothing; "is not the only sign" names a point.
        place = find_mention(text, claim.phrases, or_denied_after=True)
        excuse = find_mention(text, claim.unless_after)
        if place is not None and (excuse is None or place < excuse):
            wrong.append(claim.name)
    missing = [point.name for point in probe.points if point.name not in named]
    return Facts(tuple(named), tuple(missing), tuple(wrong))


def measure_quality(judged: Sequence[JudgedAnswer]) -> types.SimpleNamespace:
    """Counts of judged answers, and of points and wrong claims of their probes."""
    facts = [each.facts for each in judged if each.facts]
    return types.SimpleNamespace(
        num_answers=len(judged),
        num_sound=sum(each.sound for each in judged),
        num_ended=sum(each.ended for each in judged),
        num_sound_and_ended=sum(each.sound and each.ended for each in judged),
        num_named=sum(len(each.named) for each in facts),
        num_points=sum(len(each.named) + len(each.missing) for each in facts),
        num_wrong_claims=sum(len(each.wrong) for each in facts),
    )


# --- Environment ---------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP ended the command. The message says how to resume."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message or "Interrupted. Run the same command again.")
        self.number = number


def handle_signals(handler: Callable[[int, Any], object] | None = None) -> None:
    """Sets a handler for these signals, except those ignored from the start, as by nohup. The
    default raises `Interrupted`."""

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler or interrupt)


def report(message: str) -> None:
    """Prints a message to stderr, with control characters escaped."""
    print(data.escape_controls(message), file=sys.stderr)


def prepare_environment(profile: Profile, *, offline: bool | None = None) -> None:
    """Sets environment variables of CUDA, Unsloth and the hub client, before Unsloth is imported.

    `offline` None means: if the base model is local, or the hub cannot be reached.
    """
    # cuBLAS is deterministic only with a workspace of fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    # Unsloth compiles its trainers into a folder, by default in the working directory, and would
    # use files of an older version.
    compiled = f"unsloth_compiled_cache-{importlib.metadata.version('unsloth')}"
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(data.cache_home() / compiled))
    # GiB of logits that its fused loss keeps at a time; the default depends on the free memory.
    os.environ.setdefault("UNSLOTH_CE_LOSS_TARGET_GB", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if profile.name == "cpu":
        os.environ["UNSLOTH_FORCE_CPU"] = "1"  # also if there is a GPU
    if offline is None:
        is_local = profile.base_model == data.SMALL_MODEL or Path(profile.base_model).is_dir()
        offline = is_local or not data.reaches_hub()
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


# Loggers whose warnings are about optional accelerators or defaults that this kit overrides.
_NOISY_LOGGERS = """bitsandbytes torch.utils._pytree torchao xformers transformers unsloth
    unsloth_zoo""".split()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """A context in which libraries print no banners to stdout and log errors only."""
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(unsloth|torch|transformers|trl|peft)(\.|$)")
        yield


# --- Loading -------------------------------------------------------------------------------------


def base_model_path(base_model: str) -> str:
    """The argument for `from_pretrained`: the small model's folder in the cache, or the name."""

    def build(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig

        tokenizer = data.load_tokenizer(data.PROFILES["cpu"])
        model = AutoModelForCausalLM.from_pretrained(
            data.gguf_folder(),
            gguf_file=data.GGUF_FILE,
            # Q4_1's scale times a 4-bit number plus an offset has no exact 16-bit form.
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        for config in (model.config, model.generation_config):
            config.eos_token_id = tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    if base_model != data.SMALL_MODEL:
        return base_model
    with data.writing(data.cache_home() / data.SMALL_MODEL):
        return str(data.cached_folder(data.SMALL_MODEL, build))


def load_base(
    profile: Profile, *, dtype: str | None, max_seq_length: int = data.MAX_SEQ_LENGTH
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The profile's base model and its tokenizer, with the special tokens of `data`.

    `dtype` None lets Unsloth choose the fastest for training.

    Raises UsageError if the profile needs a GPU and torch finds none, or the model does not load.
    """
    with quiet_libraries():
        # The imports create so many objects that garbage collection would take a second.
        gc.disable()
        # Unsloth patches transformers, PEFT and TRL, and has to be imported before them.
        from unsloth import DEVICE_TYPE, FastLanguageModel  # isort: skip
        import torch
        from transformers.utils import logging as transformers_logging

        gc.enable()
        if profile.name == "t4" and DEVICE_TYPE == "cpu":
            raise UsageError(
                f"The profile t4 needs a GPU, and torch {torch.__version__} finds none. Use a "
                "machine with one (docs/t4.md), or --profile cpu."
            )
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            model, tokenizer = FastLanguageModel.from_pretrained(
                model_name=base_model_path(profile.base_model),
                max_seq_length=max_seq_length,
                dtype=dtype and getattr(torch, dtype),
                load_in_4bit=profile.load_in_4bit,
                use_gradient_checkpointing=profile.use_gradient_checkpointing,
                trust_remote_code=False,
                use_safetensors=True,
            )
        except OSError as error:
            raise UsageError(
                f"{profile.base_model} could not be loaded ({data.first_line(error)}). "
                "A model of the hub needs the network once."
            ) from error
    data.set_special_tokens(tokenizer, profile.base_model)
    return model, tokenizer


def latest_adapter() -> Path:
    """The adapter of the last run that finished. Raises UsageError if there is none."""
    if not LATEST.is_file():
        raise UsageError(
            f"There is no adapter yet ({LATEST} is missing). Train one: python train.py\n"
            "or ask the base model: python infer.py --base"
        )
    name = LATEST.read_text(encoding="utf-8", errors="replace").strip()
    adapter = TRAIN_RUNS / name / "adapter"
    if not RUN_NAME.fullmatch(name) or not adapter.is_dir():
        found = f"{name[:100]!r}. Use --adapter FOLDER."
        raise UsageError(f"{LATEST} does not name a run with an adapter: {found}")
    return adapter


def find_adapter(name: str) -> Path:
    """The folder of an adapter: `name` itself, or the downloaded hub repository of that name.
    Raises UsageError if there is neither."""
    folder, expected = Path(name), "Give a folder such as runs/train/NAME/adapter, or a hub id."
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from huggingface_hub import snapshot_download

        patterns, offline = ["*.json", "*.safetensors"], not data.reaches_hub()
        try:
            return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=offline))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{name} is not a folder, and could not be downloaded from the hub "
                f"({data.first_line(error)}). {expected}"
            ) from None
    if not folder.is_dir():
        found = "is a file" if folder.is_file() else "does not exist"
        raise UsageError(f"The adapter {name!r} {found}. {expected}")
    return folder


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterRecord:
    """What is known about an adapter, from kit.json, or from PEFT's config if there is none."""

    base_model: str
    profile: ProfileName | None = None
    prompt_fingerprint: str | None = None
    decoding: Decoding | None = None
    """The decoding under which its answers were judged."""
    pad: PadName = "native"
    """`added`: it contains embeddings, one row longer than the base model's."""
    system_prompt: str = data.SYSTEM_PROMPT
    """The system prompt of most of its training rows."""
    surprisal_reference: float | None = None
    """The base model's reference in nats per byte, see `surprisal_reference`."""
    load_in_4bit: bool | None = None
    """How the base model was loaded in training. None: as the profile loads it."""


@dataclass(frozen=True)
class Adapter:
    """A checked adapter folder, and the profile with its base model."""

    folder: Path
    record: AdapterRecord
    profile: Profile
    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Digest (hex) of the weights."""
        return hashlib.sha256((self.folder / WEIGHTS).read_bytes()).hexdigest()


_LORA_TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight"
)
EMBEDDINGS = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
# Fields of PEFT's LoraConfig that change the result, and their values in plain LoRA. Other fields
# are metadata.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(
        """alora_invocation_tokens alpha_pattern arrow_config corda_config fan_in_fan_out
        kasa_config layer_replication loftq_config lora_bias lora_ga_config megatron_config
        modules_to_save monteclora_config rank_pattern target_parameters trainable_token_indices
        use_bdlora use_dora use_qalora velora_config""".split(),
        (),
    ),
}


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A context that reads a file of an adapter. Raises UsageError if that fails."""
    import safetensors

    try:
        yield
    except FileNotFoundError:
        problem = f"{path.name} is missing"
        suffixes = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
        pickles = [file.name for file in path.parent.glob("*") if file.suffix in suffixes]
        if pickles and path.name == WEIGHTS:
            problem += f", and {pickles[0]} is a pickle, which can run code when it is loaded"
        raise UsageError(
            f"{path.parent} is not an adapter: {problem}. Give a folder with safetensors, such as "
            "runs/train/NAME/adapter."
        ) from None
    except PermissionError as error:
        advice = "Its owner has to allow it: chmod a+r FILE"
        raise UsageError(f"{path} cannot be read ({error.strerror}). {advice}") from None
    except (OSError, ValueError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        advice = "Train the adapter again, or copy it again."
        raise UsageError(f"{path} is truncated or corrupt ({error}). {advice}") from None


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError or TypeError if there is none."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TypeError(f"expected a JSON object, found a {type(content).__name__}")
    return content


def check_adapter(
    folder: Path, choice: ProfileChoice = "auto", base_model: str | None = None
) -> Adapter:
    """The adapter in a folder, after a check of every file that will be read. Loads no weights.

    `choice` and `base_model` are --profile and --base-model. If `base_model` or the adapter's own
    is a folder, shapes are compared; otherwise both have to be names of the same weights.

    Raises UsageError if a file is missing, unreadable or corrupt, the weights are a pickle, or the
    adapter is not plain LoRA on this base model.
    """
    for path in (folder / CONFIG, folder / WEIGHTS):
        with _reading(path):
            path.open("rb").close()  # safetensors would call an unreadable file missing
    with _reading(folder / CONFIG):
        config = _read_object(folder / CONFIG)
        r, alpha, scaled = (config.get(name) for name in ("r", "lora_alpha", "use_rslora"))
        is_number = type(alpha) in (int, float) and 0 < alpha < math.inf
        if type(r) is not int or r < 1 or not is_number or scaled not in (None, True, False):
            raise ValueError(f"r {r!r}, lora_alpha {alpha!r}, use_rslora {scaled!r}")
    record = read_adapter_record(folder)
    profile = resolve_adapter_profile(folder, record, choice, base_model)
    # An empty list or mapping is equal to none.
    found = [
        f"{name} {str(config[name])[:40]!r}"
        for name, plain in _PLAIN_LORA.items()
        if config.get(name) and config[name] not in plain
    ]
    if found:
        advice = "Merge the adapter into its base model with the program that made it."
        found = ", ".join(found[:5])
        raise UsageError(f"{folder / CONFIG}: expected plain LoRA, found {found}. {advice}")
    modules = check_adapter_weights(folder, record, profile, r)
    return Adapter(folder, record, profile, r, alpha, bool(scaled), modules)


def read_adapter_record(folder: Path) -> AdapterRecord:
    """The record of an adapter folder; without kit.json, only the base model in PEFT's config.
    Raises UsageError if the file is corrupt."""
    path = folder / ADAPTER_RECORD
    path = path if path.is_file() else folder / CONFIG
    with _reading(path):
        content = _read_object(path)
        if path.name == CONFIG:
            content = {"base_model": content.get("base_model_name_or_path")}
        names = [each.name for each in dataclasses.fields(AdapterRecord)]
        record = AdapterRecord(**{name: content[name] for name in names if name in content})
        if record.decoding is not None:
            record = dataclasses.replace(record, decoding=Decoding(**record.decoding))
            _check_types(record.decoding)
        _check_types(record)
        reference = record.surprisal_reference
        if reference is not None and not 0 < reference < math.inf:
            raise ValueError(f"surprisal_reference is {reference}")
        record.system_prompt.encode()
    return record


def _check_types(values: Any) -> None:
    """Raises TypeError if a field of a dataclass does not have its declared type."""

    def is_of(value: Any, expected: Any) -> bool:
        if get_origin(expected) is Literal:
            return value in get_args(expected)
        if get_args(expected):  # of a union
            return any(is_of(value, each) for each in get_args(expected))
        return type(value) is expected or (expected is float and type(value) is int)

    for name, expected in get_type_hints(type(values)).items():
        if not is_of(getattr(values, name), expected):
            raise TypeError(f"{name} is {getattr(values, name)!r:.60}")


def resolve_adapter_profile(
    folder: Path, record: AdapterRecord, choice: ProfileChoice, base_model: str | None
) -> Profile:
    """The profile with the adapter's base model. Raises UsageError if the flags name another one,
    or it is a folder that does not exist."""
    own = record.base_model
    profiles = data.PROFILES.items()
    default = next((n for n, p in profiles if data.is_same_base(own, p.base_model)), None)
    name = record.profile or default
    is_folder = default is None and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", own)
    is_copy = is_folder or (base_model is not None and Path(base_model).is_dir())
    other = None
    if name and choice not in ("auto", name):
        other = f"--profile {choice} is {data.PROFILES[choice].base_model}"
    elif base_model and not (is_copy or data.is_same_base(base_model, own)):
        other = f"--base-model is {base_model}"
    if other:
        advice = "Remove the flag, or give another adapter."
        raise UsageError(f"{folder} was trained on {own}, and {other}. {advice}")
    # A path in another program's file is not followed.
    if is_folder and not base_model and (record.profile is None or not Path(own).is_dir()):
        advice = "Give the same base model with --base-model HUB_ID_OR_FOLDER."
        raise UsageError(f"{folder} was trained on {own}, which is a local path. {advice}")
    if base_model is None and not (default and default == name):
        base_model = own
    profile = data.resolve_profile(name or choice, base_model)
    if record.load_in_4bit is not None:
        profile = dataclasses.replace(profile, load_in_4bit=record.load_in_4bit)
    return profile


def check_adapter_weights(
    folder: Path, record: AdapterRecord, profile: Profile, r: int
) -> tuple[str, ...]:
    """The names of the modules with LoRA. Raises UsageError if the file is corrupt, a tensor is not
    LoRA's, or a shape does not fit the base model."""
    import safetensors

    arch = profile.architecture
    path = folder / WEIGHTS
    with _reading(path), safetensors.safe_open(path, framework="np") as file:
        names = file.keys()
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    problems, modules = [], set()
    for name, found in shapes.items():
        lora = _LORA_TENSOR.fullmatch(name)
        if lora and lora[2] in arch.linear_shapes and int(lora[1]) < arch.num_hidden_layers:
            rows, columns = arch.linear_shapes[lora[2]]
            expected = (r, columns) if lora[3] == "A" else (rows, r)
            modules.add(lora[2])
        elif name in EMBEDDINGS and record.pad == "added":
            expected = (arch.vocab_size + 1, arch.hidden_size)
        else:
            problems.append(f"{name[:100]} {found} is not a LoRA tensor of the base model")
            continue
        if found != expected:
            problems.append(f"{name}: expected the shape {expected}, found {found}")
    if not modules:
        problems.append("it contains no LoRA tensors")
    if problems:
        raise UsageError(
            f"{folder} does not fit {profile.base_model} with r {r}: {'; '.join(problems[:3])}. "
            "Give an adapter for this base model."
        )
    return tuple(sorted(modules))


def add_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds a pad token and a row for it to the embedding: the story's mistake, for comparison."""
    import torch

    tokenizer.add_special_tokens({"pad_token": ADDED_PAD_TOKEN})
    # The new row is random and, in the head, part of the loss. It is seeded, so that a resumed run
    # has the same one.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def load_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Adapter
) -> PeftModel:
    """`model` with the adapter. Raises UsageError if it was trained with another prompt."""
    record = adapter.record
    prompt = data.prompt_fingerprint(tokenizer, record.system_prompt)
    if record.prompt_fingerprint is None:
        report(f"{adapter.folder} does not record its prompt; this kit's is used.")
    elif record.prompt_fingerprint != prompt:
        raise UsageError(
            f"{adapter.folder} was trained with the prompt {record.prompt_fingerprint}, and this "
            f"version of the kit renders {prompt}. Train it again, or use the version that "
            "trained it."
        )
    if record.pad == "added":
        add_pad_token(model, tokenizer)
    from peft import LoraConfig, PeftModel

    # Not the folder's own config, which may name modules to import and paths to read.
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        use_rslora=adapter.use_rslora,
        target_modules=list(adapter.target_modules),
        inference_mode=True,
    )
    return PeftModel.from_pretrained(model, adapter.folder, config=config)


def register_grouped_attention() -> None:
    """Registers the attention `grouped`: torch's, without repeating keys and values per head.

    transformers repeats them if there is a mask, which makes `tests.bench answer` take 1.5 times
    as long.
    """
    import torch
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """(B, heads, T, D), keys and values (B, groups, S, D) -> (B, T, heads, D)."""
        heads = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=kwargs["scaling"], enable_gqa=True
        )
        return heads.transpose(1, 2).contiguous(), None

    def always_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
        return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})

    AttentionInterface.register("grouped", attend)
    AttentionMaskInterface.register("grouped", always_mask)


@dataclass
class LoadedModel:
    """A base model, with or without an adapter, ready for inference."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    profile: Profile
    adapter_sha256: str | None = None
    system_prompt: str = data.SYSTEM_PROMPT
    reference: float | None = None
    """The result of `surprisal_reference`, once it is known."""
    probes: Sequence[Probe] = field(default_factory=read_probes)
    """Probes by whose lists the facts in answers are checked."""

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[LoadedModel]:
        """A context with the base model alone."""
        if not hasattr(self.model, "disable_adapter"):
            yield self
            return
        with self.model.disable_adapter():
            yield dataclasses.replace(self, adapter_sha256=None)


def load_for_inference(
    profile: Profile, adapter: Adapter | None = None, system_prompt: str | None = None
) -> LoadedModel:
    """The profile's base model, with the adapter if there is one. The default system prompt is the
    adapter's, or the story's."""
    model, tokenizer = load_base(profile, dtype=profile.dtype)
    from unsloth import FastLanguageModel

    loaded = LoadedModel(model, tokenizer, profile)
    if adapter:
        loaded.model = load_adapter(model, tokenizer, adapter)
        loaded.adapter_sha256 = adapter.sha256
        loaded.system_prompt = adapter.record.system_prompt
        loaded.reference = adapter.record.surprisal_reference
    FastLanguageModel.for_inference(loaded.model)
    if profile.attn_implementation == "grouped":
        register_grouped_attention()
        loaded.model.set_attn_implementation("grouped")
    loaded.system_prompt = system_prompt or loaded.system_prompt
    return loaded


# --- Generation ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A question, the decoding of its answer, and the earlier turns."""

    question: str
    decoding: Decoding
    history: tuple[tuple[str, str], ...] = ()


def stop_ids(
    decoding: Decoding, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Ids of the tokens that end an answer."""
    if decoding.stop == "never":
        return []
    if decoding.stop == "end-of-turn":
        return [tokenizer.eos_token_id]
    eos = model.generation_config.eos_token_id
    return list(eos) if isinstance(eos, list) else [eos]


def make_row_processor(
    decodings: Sequence[Decoding], prompt_tokens: int, padding: Sequence[int] | None = None
) -> LogitsProcessor:
    """A logits processor that applies a decoding to each row; `generate` then takes the argmax.

    Penalty and n-gram ban are transformers' processors, with two differences. Without
    `count_prompt`, they get the answer's ids only: the template ends each turn of the prompt with
    the end-of-turn token, which the library would penalise or ban from the first word on. And
    sampling adds Gumbel noise of the row's own generator, whose argmax is a draw from the softmax
    (Gumbel 1954; Maddison et al. 2014) that depends on no other row.

    `prompt_tokens` includes the `padding` on the left, by default 0 per row. Rows without a
    decoding are copies of the last row that has one. The processor's `overruled` lists, per step,
    whether penalty or ban changed the most probable token of each row.
    """
    import torch
    from transformers import (
        LogitsProcessor,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopPLogitsWarper,
    )

    def build_chain(decoding: Decoding) -> list[LogitsProcessor]:
        chain: list[LogitsProcessor] = []
        if decoding.repetition_penalty != 1.0:
            chain.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
        if decoding.no_repeat_ngram_size:
            chain.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))
        if decoding.temperature:
            chain.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.temperature and decoding.top_p < 1.0:
            chain.append(TopPLogitsWarper(decoding.top_p))
        return chain

    padding = padding or [0] * len(decodings)
    chains = [build_chain(decoding) for decoding in decodings]
    generators = [torch.Generator().manual_seed(each.sampling_seed) for each in decodings]

    class RowProcessor(LogitsProcessor):
        def __init__(self) -> None:
            self.overruled: list[list[bool]] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            """`input_ids` (B, T), `scores` (B, V) -> (B, V)."""
            first_choice = scores[: len(decodings)].argmax(dim=-1)
            scores = scores.clone()
            for row, (decoding, chain) in enumerate(zip(decodings, chains, strict=True)):
                start = padding[row] if decoding.count_prompt else prompt_tokens
                seen, own = input_ids[row : row + 1, start:], scores[row : row + 1]
                for processor in chain:
                    own = processor(seen, own)
                scores[row] = own
            choice = scores[: len(decodings)].argmax(dim=-1)
            self.overruled.append((choice != first_choice).tolist())
            for row, decoding in enumerate(decodings):
                if decoding.temperature:
                    shape = scores[row].shape
                    uniform = torch.rand(shape, generator=generators[row], dtype=torch.float64)
                    scores[row] -= torch.log(-torch.log(uniform)).to(scores)
            scores[len(decodings) :] = scores[len(decodings) - 1]
            return scores

    return RowProcessor()


def make_generation_config(
    max_new_tokens: int,
    stop: Sequence[int],
    pad: int,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
) -> GenerationConfig:
    """Greedy decoding. Sets every field with an effect, since others come from the model's."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=repetition_penalty,
        encoder_repetition_penalty=1.0,
        no_repeat_ngram_size=no_repeat_ngram_size,
        use_cache=True,
        eos_token_id=list(stop),
        pad_token_id=pad,
    )


def check_question(question: str) -> None:
    """Raises UsageError unless the question is text with a letter or digit."""
    shown = data.escape_controls(question[:40])
    if not any(character.isalnum() for character in question):
        advice = 'Ask in words: python infer.py "What is croup?"'
        raise UsageError(f'The question is empty: "{shown}". {advice}')
    control = re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", question)
    if control:
        raise UsageError(
            f"The question contains {data.escape_controls(control[0])} at character "
            f'{control.start() + 1}, which is not text (it begins "{shown}"). Use UTF-8 text.'
        )


def encode_request(loaded: LoadedModel, request: Request) -> list[int]:
    """Token ids of the request's prompt. Raises UsageError as `check_question`, or if prompt and
    answer exceed the maximum length."""
    check_question(request.question)
    prompt = data.encode_prompt(
        loaded.tokenizer, request.question, request.history, loaded.system_prompt
    )
    cap = request.decoding.max_new_tokens
    if len(prompt) + cap > data.MAX_SEQ_LENGTH:
        raise UsageError(
            f'The question "{data.escape_controls(request.question[:40])}..." has a prompt of '
            f"{len(prompt)} tokens; with an answer of up to {cap}, this exceeds the maximum of "
            f"{data.MAX_SEQ_LENGTH}. Shorten the question, or the answer with --max-new-tokens."
        )
    return prompt


def padded_width(prompt_tokens: int) -> int:
    """Tokens of a prompt with its padding: at least one pad token, so that there is a mask."""
    return (prompt_tokens // PROMPT_MULTIPLE + 1) * PROMPT_MULTIPLE


def merge_requests(requests: Sequence[Request]) -> list[list[int]]:
    """Indices of the requests that one row can answer: they differ at most in cap and stop, on
    which the next token does not depend."""
    rows: dict[Request, list[int]] = {}
    for place, request in enumerate(requests):
        open_end = dataclasses.replace(request.decoding, max_new_tokens=1, stop="never")
        rows.setdefault(dataclasses.replace(request, decoding=open_end), []).append(place)
    return list(rows.values())


def count_new_tokens(requests: Sequence[Request]) -> int:
    """The maximum number of tokens that `answer_requests` generates for the requests."""
    return sum(
        max(requests[place].decoding.max_new_tokens for place in places)
        for places in merge_requests(requests)
    )


def cut_answer(
    ids: Sequence[int], cap: int, stop: Sequence[int]
) -> tuple[list[int], Literal["stop", "length"]]:
    """The ids up to the first stop token, or up to the cap, and which of the two it was."""
    for place, token in enumerate(ids[:cap]):
        if token in stop:
            return list(ids[: place + 1]), "stop"
    return list(ids[:cap]), "length"


def answer_requests(
    loaded: LoadedModel,
    requests: Sequence[Request],
    progress: Callable[[int], object] = lambda tokens: None,
    on_text: Callable[[str], object] | None = None,
) -> list[Answer]:
    """One `Answer` per request, in their order; none depends on the other requests.

    Every forward pass has `ROWS` rows, padded on the left to a multiple of `PROMPT_MULTIPLE`;
    unused rows are copies of the last prompt. `progress` is called with the number of tokens
    generated, or skipped after an early end: `count_new_tokens` in total. `on_text` is called with
    the text of the first answer, piece by piece.
    """
    prompts = [encode_request(loaded, request) for request in requests]
    stops = [stop_ids(each.decoding, loaded.model, loaded.tokenizer) for each in requests]
    written = ""

    def write_first(ids: list[int]) -> None:
        """Passes the new part of the first answer's text to `on_text`."""
        nonlocal written
        kept, _ = cut_answer(ids, requests[0].decoding.max_new_tokens, stops[0])
        text = _decode(loaded.tokenizer, kept, stops[0])
        # Incomplete characters wait for the next token; trailing spaces are stripped.
        if on_text and not text.endswith("\ufffd") and text.startswith(written):
            on_text(text[len(written) :])
            written = text

    by_width: dict[int, list[list[int]]] = {}
    for places in merge_requests(requests):
        by_width.setdefault(padded_width(len(prompts[places[0]])), []).append(places)
    answers: dict[int, Answer] = {}
    for width, rows in sorted(by_width.items()):
        for start in range(0, len(rows), ROWS):
            batch = rows[start : start + ROWS]
            decodings, ends = [], []
            for places in batch:
                # A row ends where all of its answers have ended.
                own = requests[max(places, key=lambda n: requests[n].decoding.max_new_tokens)]
                decodings.append(own.decoding)
                ends.append(set.intersection(*(set(stops[place]) for place in places)))
            own_prompts = [prompts[places[0]] for places in batch]
            writer = write_first if on_text and batch[0][0] == 0 else None
            started = time.perf_counter()
            new_ids, overruled = _generate(
                loaded, own_prompts, width, decodings, ends, progress, writer
            )
            seconds = round(time.perf_counter() - started, 3)
            for row, places in enumerate(batch):
                for place in places:
                    decoding = requests[place].decoding
                    kept, reason = cut_answer(new_ids[row], decoding.max_new_tokens, stops[place])
                    answers[place] = Answer(
                        question=requests[place].question,
                        text=_decode(loaded.tokenizer, kept, stops[place]),
                        token_ids=kept,
                        finish_reason=reason,
                        prompt_tokens=len(prompts[place]),
                        answer_tokens=len(kept),
                        num_overruled=sum(step[row] for step in overruled[: len(kept)]),
                        decoding=decoding,
                        model=loaded.profile.base_model,
                        adapter=loaded.adapter_sha256,
                        seconds=seconds,
                        system_prompt=loaded.system_prompt,
                    )
    return [answers[place] for place in range(len(requests))]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[int]) -> str:
    kept = [token for token in ids if token not in stop]
    return tokenizer.decode(kept, skip_special_tokens=False).strip()


def _generate(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    width: int,
    decodings: Sequence[Decoding],
    ends: Sequence[set[int]],
    progress: Callable[[int], object],
    on_ids: Callable[[list[int]], object] | None,
) -> tuple[list[list[int]], list[list[bool]]]:
    """New ids of each prompt, and `overruled` of `make_row_processor`.

    `ends` are the stop ids of each row; ids after one of them are meaningless. `on_ids` is called
    with the first row's new ids after every step.
    """
    import torch
    from transformers import StoppingCriteria

    caps = [decoding.max_new_tokens for decoding in decodings]
    filled = [min(row, len(prompts) - 1) for row in range(ROWS)]

    class RowEnded(StoppingCriteria):
        steps = 0

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            """`input_ids` (B, T) -> (B,)."""
            self.steps += 1
            progress(sum(self.steps <= cap for cap in caps))
            if on_ids:
                on_ids(input_ids[0, width:].tolist())
            newest = zip(filled, input_ids[:, -1].tolist(), strict=True)
            ended = [token in ends[row] or self.steps >= caps[row] for row, token in newest]
            return torch.tensor(ended, device=input_ids.device)

    pad, device = loaded.tokenizer.pad_token_id, loaded.model.device
    padding = [width - len(prompt) for prompt in prompts]
    rows = [[pad] * padding[row] + prompts[row] for row in filled]
    mask = [[0] * padding[row] + [1] * len(prompts[row]) for row in filled]
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
    inputs = {name: each.to(device) for name, each in inputs.items()}
    processor, criterion = make_row_processor(decodings, width, padding), RowEnded()
    # An id that ends no row, as `RowEnded` does that; an empty list would mean the model's own.
    no_id = loaded.model.config.vocab_size
    # Not inference mode, since a later training step may need tensors that the model caches.
    with torch.no_grad():
        if loaded.profile.shares_prompts:
            inputs["past_key_values"] = _read_prompts(loaded, **inputs)
        output = loaded.model.generate(
            **inputs,
            generation_config=make_generation_config(max(caps), [no_id], pad),
            logits_processor=[processor],
            stopping_criteria=[criterion],
        )
    progress(sum(max(0, cap - criterion.steps) for cap in caps))
    return output[: len(prompts), width:].tolist(), processor.overruled


def _read_prompts(
    loaded: LoadedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> DynamicCache:
    """Keys and values of the prompts (B, T) except their last token, where `generate` continues.

    Each distinct prompt is read once, in its own forward pass of shape (1, T - 1).
    """
    import torch
    from transformers import DynamicCache

    rows = [tuple(row) for row in input_ids.tolist()]
    parts: dict[tuple[int, ...], DynamicCache] = {}
    for place, row in enumerate(rows):
        if row not in parts:
            mask = attention_mask[place : place + 1, :-1]
            parts[row] = loaded.model(
                input_ids=input_ids[place : place + 1, :-1],
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                past_key_values=DynamicCache(config=loaded.model.config),
                use_cache=True,
                logits_to_keep=1,
            ).past_key_values
    cache = DynamicCache(config=loaded.model.config)
    for layer in range(len(next(iter(parts.values())).layers)):
        keys = torch.cat([parts[row].layers[layer].keys for row in rows])
        values = torch.cat([parts[row].layers[layer].values for row in rows])
        cache.update(keys, values, layer)
    return cache


# --- Surprisal -----------------------------------------------------------------------------------

# Bytes over which surprisal is averaged, and maximum nats of a single token.
SURPRISAL_BYTES, MAX_TOKEN_SURPRISAL = 160, 12.0
# The reference comes from the base model's plain answers to this many probes, of at most this many
# tokens.
REFERENCE_PROBES, REFERENCE_TOKENS = 26, 128
# Answers of unknown models are compared with each other, if there are at least this many.
MIN_ANSWERS_TO_COMPARE = 20


def read_surprisals(loaded: LoadedModel, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """Surprisal -ln p of each answer token (A,) after the prompt, in nats, without the adapter. One
    answer per forward pass, so that the values do not depend on other answers."""
    import torch

    if not ids:
        return []
    row = torch.tensor([[*prompt, *ids]], device=loaded.model.device)
    with loaded.without_adapter() as base, torch.no_grad():
        output = base.model(
            input_ids=row, attention_mask=torch.ones_like(row), logits_to_keep=len(ids) + 1
        )
        logits = output.logits[0, -len(ids) - 1 : -1].float()
        return torch.nn.functional.cross_entropy(
            logits, row[0, -len(ids) :], reduction="none"
        ).tolist()


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, text: str, finish_reason: str = "stop"
) -> list[int]:
    """Token ids of an answer that another program wrote."""
    return data.encode_text(tokenizer, text) + [tokenizer.eos_token_id] * (finish_reason == "stop")


def largest_surprisal(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], surprisals: Sequence[float]
) -> tuple[float, tuple[int, int]]:
    """`(nats per byte, tokens)` of the `SURPRISAL_BYTES` with the largest mean surprisal.

    The mean of a shorter answer is over its bytes, or half of `SURPRISAL_BYTES` if that is more.
    """
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    # A character of a byte-level token is a byte.
    sizes = [1 if id_ in special else len(token) for id_, token in zip(ids, tokens, strict=True)]
    bytes_to = [0, *itertools.accumulate(sizes)]
    nats_to = [0.0, *itertools.accumulate(min(each, MAX_TOKEN_SURPRISAL) for each in surprisals)]
    best, where, end = 0.0, (0, 0), 0
    for start in range(len(ids)):
        while end < len(ids) and bytes_to[end] - bytes_to[start] < SURPRISAL_BYTES:
            end += 1
        size = bytes_to[end] - bytes_to[start]
        if start and size < SURPRISAL_BYTES:
            break
        mean = (nats_to[end] - nats_to[start]) / max(size, SURPRISAL_BYTES // 2)
        if mean > best:
            best, where = mean, (start, end)
    return best, where


def measure_surprisal(
    loaded: LoadedModel, prompt: Sequence[int], ids: Sequence[int], reference: float
) -> Measure:
    """The largest surprisal of an answer as a multiple of `reference`; see `CHECKS`."""
    tokenizer = loaded.tokenizer
    score, (start, end) = largest_surprisal(tokenizer, ids, read_surprisals(loaded, prompt, ids))
    before, upto = (len(tokenizer.decode(list(ids[:at])).lstrip()) for at in (start, end))
    return score / reference, (before, upto)


def name_reference(base_model: str) -> tuple[str, list[str]]:
    """The cache folder of `surprisal_reference`, and the questions that it is taken from."""
    questions = [probe.question for probe in read_probes()[:REFERENCE_PROBES]]
    changed = [file.stat().st_mtime_ns for file in Path(base_model).glob("*.safetensors")]
    settings = ["inference", base_model, changed, data.SYSTEM_PROMPT, REFERENCE_TOKENS, *questions]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    return f"reference-{digest[:16]}", questions


def prepare_reference(profile: Profile) -> None:
    """Caches `surprisal_reference`, computed by a process of its own. In training, the base model
    has another precision, in which its answers and so the reference would differ.

    Raises UsageError if the process fails.
    """
    base_model = profile.base_model
    if (data.cache_home() / name_reference(base_model)[0]).is_dir():
        return
    report(f"{base_model} answers {REFERENCE_PROBES} questions, once, for the judge.")
    command = [sys.executable, str(Path(__file__).resolve()), "--judge", "-"]
    command += ["--profile", profile.name]
    if base_model != data.PROFILES[profile.name].base_model:
        command += ["--base-model", base_model]
    own_answer = json.dumps({"question": "What is croup?", "text": "...", "model": base_model})
    others = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # it is not one of the processes that train
    env = {name: value for name, value in os.environ.items() if name not in others}
    # In a session of its own, which Ctrl-C does not reach: it is killed if this process is stopped.
    ran = subprocess.run(
        command, input=own_answer, env=env, capture_output=True, text=True, start_new_session=True
    )
    if ran.returncode:
        raise UsageError(f"The base model could not answer:\n{ran.stderr.strip()[-2000:]}")


def surprisal_reference(
    loaded: LoadedModel, progress: Callable[[int], object] = lambda tokens: None
) -> float:
    """The largest surprisal of the base model's plain answers to the probes, in nats per byte.

    Computed once per base model and cached; also part of an adapter's record. `progress` is called
    with 0 after every step.
    """
    if loaded.reference is not None:
        return loaded.reference
    name, questions = name_reference(loaded.profile.base_model)

    def build(folder: Path) -> None:
        requests = [Request(each, Decoding(max_new_tokens=REFERENCE_TOKENS)) for each in questions]
        values = []
        with loaded.without_adapter() as base:
            base = dataclasses.replace(base, system_prompt=data.SYSTEM_PROMPT)
            for answer in answer_requests(base, requests, lambda tokens: progress(0)):
                prompt = data.encode_prompt(loaded.tokenizer, answer.question)
                surprisals = read_surprisals(base, prompt, answer.token_ids)
                values.append(largest_surprisal(loaded.tokenizer, answer.token_ids, surprisals)[0])
        data.write_atomic(folder / "reference.json", json.dumps({"nats_per_byte": max(values)}))

    content = (data.cached_folder(name, build) / "reference.json").read_text()
    loaded.reference = json.loads(content)["nats_per_byte"]
    return loaded.reference


def judge_answers(
    loaded: LoadedModel,
    answers: Sequence[Answer],
    history: Sequence[tuple[str, str]] = (),
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[JudgedAnswer]:
    """The verdicts on a loaded model's answers, with their surprisal and facts. `progress` is
    called with 0 after every step that may take long."""
    probes = {probe.question: probe for probe in loaded.probes}
    reference = surprisal_reference(loaded, progress)
    judged = []
    for answer in answers:
        prompt = data.encode_prompt(
            loaded.tokenizer, answer.question, history, loaded.system_prompt
        )
        surprisal = measure_surprisal(loaded, prompt, answer.token_ids, reference)
        progress(0)
        probe = probes.get(answer.question)
        verdict = judge(answer.text, answer.question, answer.finish_reason, surprisal, probe=probe)
        judged.append(dataclasses.replace(verdict, answer=answer))
    return judged


# --- Verification --------------------------------------------------------------------------------


def verify(loaded: LoadedModel, request: Request) -> bool:
    """Asks in two new processes, in a batch and alone; prints whether the ids are equal."""
    flags = [each for each in sys.argv[1:] if each != "--verify"]
    command = [sys.executable, str(Path(__file__).resolve()), *flags, "--json"]
    digests: dict[str, str] = {}

    def add(name: str, digest: str, num_tokens: int) -> None:
        digests[name] = digest
        print(f"{digest}  {num_tokens} tokens  {name}", flush=True)

    for name in ("a new process", "another new process"):
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise UsageError(f"{name} failed:\n{ran.stderr.strip()}")
        record = json.loads(ran.stdout)
        add(name, record["sha256"], record["answer_tokens"])
    # Batched with probe questions, and with the same question under every preset.
    batch = [Request(probe.question, request.decoding) for probe in read_probes()[:3]]
    for decoding in DECODINGS.values():
        decoding = dataclasses.replace(decoding, max_new_tokens=request.decoding.max_new_tokens)
        batch.append(dataclasses.replace(request, decoding=decoding))
    for name, requests in (("in a batch", [*batch, request]), ("alone", [request])):
        answer = answer_requests(loaded, requests)[-1]
        add(name, answer.sha256, answer.answer_tokens)
    is_same = len(set(digests.values())) == 1
    print("the same bytes" if is_same else "NOT the same bytes")
    return is_same


# --- Files of questions --------------------------------------------------------------------------


@dataclass
class QuestionRow:
    """A row of a file of questions."""

    place: str
    question: Any
    columns: dict[str, Any] = field(default_factory=dict)
    """Columns other than the question's."""
    problem: str | None = None
    """Why it is skipped."""

    def to_record(self, answer: dict[str, Any]) -> dict[str, Any]:
        """A line of the output. Columns whose names it uses itself are renamed `input_NAME`."""
        own = {"question": self.question}
        for name, value in self.columns.items():
            new = name
            while new in ("question", *answer) or (new != name and new in self.columns):
                new = f"input_{new}"
            own[new] = value
        return own | answer


def read_questions(source: str) -> list[QuestionRow]:
    """The questions of a `.txt` file or of stdin (`-`), one per line, or of a column of a table.

    Empty lines of text are left out. A row that cannot be asked has a `problem`. As in training,
    an instruction is part of the question unless it is the same in the whole file.

    Raises UsageError if the file cannot be read, or contains no valid question.
    """
    name = "stdin" if source == "-" else source
    if source == "-" or source.lower().endswith(".txt"):
        try:
            content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        except OSError as error:
            problem = f"{source[:300]} cannot be read ({error.strerror})"
            raise UsageError(f"{problem}. Give an existing file.") from None
        lines = enumerate(re.split(r"\r*\n|\r", data.decode_text(content, name)), 1)
        records = [(f"{name}:{n}", {"question": line}) for n, line in lines if line.strip()]
    else:
        records = list(data.read_records(source))
    columns = [data.find_question(each)[0] for _, each in records if isinstance(each, dict)]
    instructions = {repr(each.get("instruction")) for each in columns}
    is_constant = len(instructions) == 1 < len(records)
    rows = [read_question_row(place, record, is_constant) for place, record in records]
    if is_constant and any(row.columns.get("instruction") for row in rows):
        report("The instruction is the same in every row: not asked. Set it with --system-prompt.")
    if not rows:
        raise UsageError(f"{name} contains no questions. Expected one per line, or per row.")
    if all(row.problem for row in rows):
        problem = f"{rows[0].place}: {rows[0].problem}"
        raise UsageError(f"None of the {len(rows)} questions of {name} is valid. {problem}")
    return rows


def read_question_row(place: str, record: Any, is_constant: bool = False) -> QuestionRow:
    """The row of a record, whose instruction is left out if it `is_constant` and has an input."""
    if isinstance(record, data.BadRecord):
        return QuestionRow(place, None, problem=str(record))
    if not isinstance(record, dict):
        return QuestionRow(place, None, {"record": record}, "It is not a JSON object.")
    given, roles = data.find_question(record)
    used = [name for name in roles if given[name] is not None] or [*roles][-1:]
    used = used[-1:] if is_constant else used
    names = {str(name).strip().casefold(): name for name in record}
    values = [record[names[name]] for name in used]
    own = names[used[0]] if len(used) == 1 else None  # the question itself, so no column beside it
    columns = {str(name): value for name, value in record.items() if name != own}
    row = QuestionRow(place, values[0] if values else None, columns)
    if not values or not all(isinstance(each, str) for each in values):
        found = (", ".join(map(repr, values)) or f"the columns {', '.join(columns)}")[:200]
        row.problem = f"It has no question: expected a column question or prompt, found {found}."
        return row
    row.question = "\n\n".join(map(str.strip, values))
    try:
        check_question(row.question)
    except UsageError as error:
        row.problem = str(error)
    return row


def check_rows(loaded: LoadedModel, rows: Sequence[QuestionRow], decoding: Decoding) -> None:
    """Sets the `problem` of rows that are too long, and prints all problems to stderr."""
    for row in rows:
        try:
            if not row.problem:
                encode_request(loaded, Request(row.question, decoding))
        except UsageError as error:
            row.problem = str(error)
        if row.problem:
            report(f"{row.place} is skipped: {row.problem}")


def read_answered(
    path: Path, rows: Sequence[QuestionRow], expected: dict[str, Any]
) -> list[dict[str, Any]]:
    """The lines that an interrupted run wrote for the first of the rows.

    An incomplete last line is removed from the file.

    Raises UsageError if the file contains something else, answers to other questions, or answers
    with other values than `expected`: model, adapter, decoding, system prompt.
    """
    other = "Give another file with --output, or remove it."
    # Bytes, since the last line may end within a character.
    *lines, rest = path.read_bytes().split(b"\n")
    if rest and not rest.startswith(b'{"question": '[: len(rest)]):
        raise UsageError(f"{path} ends in something that infer.py did not write. {other}")
    answered = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            values = json.loads(to_json({"question": rows[number - 1].question}))
            if "error" not in record:
                values |= expected
            different = [name for name in values if record.get(name) != values[name]]
        except (ValueError, TypeError, AttributeError, IndexError, RecursionError):
            raise UsageError(f"{path}:{number} is not an answer to row {number}. {other}") from None
        if different:
            names = ", ".join(different)
            raise UsageError(f"{path}:{number} is an answer with another {names}. {other}")
        answered.append(record)
    if rest:
        os.truncate(path, path.stat().st_size - len(rest))
    return answered


def answer_file(
    loaded: LoadedModel, rows: Sequence[QuestionRow], decoding: Decoding, path: Path
) -> None:
    """Answers the rows for which the file has no line yet: one line per row, in their order.

    Raises UsageError as `read_answered`, or if another process writes to the file; and
    `Interrupted` on a signal, with the answers of complete batches saved.
    """
    from tqdm import tqdm

    expected = {
        "model": loaded.profile.base_model,
        "adapter": loaded.adapter_sha256,
        "decoding": dataclasses.asdict(decoding),
        "system_prompt": loaded.system_prompt,
    }
    with data.writing(path), path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            advice = "Wait for it, or use another --output."
            raise UsageError(f"Another process writes to {path}. {advice}") from None
        records = read_answered(path, rows, expected)
        num_before = len(records)
        starts = range(num_before, len(rows), QUESTIONS_PER_SAVE)
        batches = [rows[start : start + QUESTIONS_PER_SAVE] for start in starts]
        requests = [
            [Request(row.question, decoding) for row in batch if not row.problem]
            for batch in batches
        ]
        total = sum(count_new_tokens(each) for each in requests)
        with tqdm(total=total, unit="token", desc="answering") as bar:
            for batch, own in zip(batches, requests, strict=True):
                try:
                    judged = iter(judge_answers(loaded, answer_requests(loaded, own, bar.update)))
                except Interrupted as interrupted:
                    message = f"Interrupted. Answers are saved in {path}; the same command resumes."
                    raise Interrupted(interrupted.number, message) from None
                for row in batch:
                    answer = {"error": row.problem} if row.problem else next(judged).to_record()
                    records.append(row.to_record(answer))
                    file.write(to_json(records[-1]).encode() + b"\n")
                    file.flush()
    answers = [record for record in records if "error" not in record]
    ended = [each for each in answers if each.get("finish_reason") == "stop"]
    good = sum(each.get("verdict") == "sound" for each in ended)
    report(f"{len(rows) - num_before} rows now, {num_before} before: {path}")
    report(f"sound and ended: {good} of {len(answers)}")


# --- Answers of other programs -------------------------------------------------------------------

# In lower case, by the names that other programs use.
FINISH_REASONS = {
    **dict.fromkeys(("stop", "end_turn", "eos", "eos_token", "stop_sequence"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "max_length"), "length"),
}


def to_json(value: Any) -> str:
    """The value as a line of JSON, with control characters escaped, null for NaN, and other types,
    such as dates, as text."""
    plain = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
    text = json.dumps(plain, ensure_ascii=False)
    return data.CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def judge_file(config: InferConfig) -> int:
    """Judges the answers in a file or on stdin; prints each as a JSON line with its verdict.
    Returns 1 if a record could not be judged, else 0."""
    assert config.judge
    if config.judge == "-":
        content = data.decode_text(sys.stdin.buffer.read(), "stdin")
        pairs = list(data.read_json(content, "stdin"))
    else:
        pairs = list(data.read_records(config.judge))
    if not pairs:
        expected = 'Expected lines of {"question": ..., "text": ...}.'
        raise UsageError(f"There are no answers to judge. {expected}")
    problems = {place: each for place, record in pairs if (each := check_judgeable(record))}
    judgeable = [(place, record) for place, record in pairs if place not in problems]
    surprisals: dict[str, Measure] = {}
    if config.surprisal and judgeable:
        surprisals = compare_surprisals(config, judgeable)
    probes = {probe.question: probe for probe in read_probes(config.probes)}
    counts: Counter[str] = Counter()
    for place, record in pairs:
        columns = dict(record) if isinstance(record, dict) else {}
        row = QuestionRow(place, columns.pop("question", None), columns)
        if place in problems:
            print(to_json(row.to_record({"error": problems[place]})))
            report(f"{place}: {problems[place]}")
            continue
        reason = FINISH_REASONS[str(record.get("finish_reason") or "stop").casefold()]
        surprisal, probe = surprisals.get(place, NOTHING), probes.get(row.question.strip())
        judged = judge(record["text"], row.question, reason, surprisal, probe=probe)
        print(to_json(row.to_record(judged.to_record())), flush=True)
        counts.update(judged.verdict.split(", "))
    sound = counts.pop("sound", 0)
    found = "".join(f"; {name} {count}" for name, count in counts.most_common())
    skipped = f"; {len(problems)} could not be judged" if problems else ""
    report(f"sound {sound} of {len(judgeable)}{found}{skipped}")
    return 1 if problems else 0


def check_judgeable(record: Any) -> str | None:
    """Why a record cannot be judged, or None."""
    if isinstance(record, data.BadRecord):
        return str(record)
    if not isinstance(record, dict):
        return "is not a JSON object"
    for name in ("question", "text"):
        value = record.get(name)
        if not isinstance(value, str) or re.search(r"[\ud800-\udfff]", value):
            return f"{name}: expected text, found {value!r:.60}"
    reason = record.get("finish_reason")
    if str(reason or "stop").casefold() not in FINISH_REASONS:
        return f"finish_reason: expected stop, length or null, found {reason!r:.60}"
    return None


def compare_surprisals(
    config: InferConfig, pairs: Sequence[tuple[str, dict[str, Any]]]
) -> dict[str, Measure]:
    """The surprisal of each answer by its place, as a multiple of a reference.

    For answers whose `model` is the base model, it is that model's. Other answers are compared with
    each other, if there are enough: one fails above their median plus four times their median
    absolute deviation.
    """
    from tqdm import tqdm

    profile = data.resolve_profile(config.profile, config.base_model)
    prepare_environment(profile)
    loaded = load_for_inference(profile, None, config.system_prompt)
    measures: dict[str, Measure] = {}
    others: dict[str, Measure] = {}
    hidden = not sys.stderr.isatty()
    for place, record in tqdm(pairs, unit="answer", desc="reading", disable=hidden):
        # Beyond the context, the start of the prompt and the end of the answer are cut off.
        prompt = data.encode_prompt(loaded.tokenizer, record["question"], (), loaded.system_prompt)
        prompt = prompt[-data.MAX_SEQ_LENGTH // 2 :]
        reason = FINISH_REASONS[str(record.get("finish_reason") or "stop").casefold()]
        ids = encode_answer(loaded.tokenizer, record["text"], reason)
        ids = ids[: data.MAX_SEQ_LENGTH - len(prompt)]
        if data.is_same_base(str(record.get("model")), profile.base_model):
            reference = surprisal_reference(loaded)
            measures[place] = measure_surprisal(loaded, prompt, ids, reference)
        else:
            others[place] = measure_surprisal(loaded, prompt, ids, 1.0)
    reference = math.inf
    if len(others) >= MIN_ANSWERS_TO_COMPARE:
        nats = [score for score, _ in others.values()]
        median = statistics.median(nats)
        deviation = statistics.median(abs(each - median) for each in nats)
        limit = median + 4 * max(deviation, median / 10)
        reference = limit / CHECKS["surprisal"].threshold or math.inf
    elif others:
        report(
            f"{len(others)} answers of unknown models are too few to compare their surprisal "
            f"({MIN_ANSWERS_TO_COMPARE} are needed); they are judged by their text alone."
        )
    return measures | {place: (score / reference, span) for place, (score, span) in others.items()}


# --- Chat ----------------------------------------------------------------------------------------


class Chat(cmd.Cmd):
    """A conversation of several turns; lines that begin with `/` are commands. Ctrl-C during an
    answer stops it."""

    prompt = "> "
    intro = "Ask, or /help. Not medical advice: a small language model answers."

    def __init__(self, loaded: LoadedModel, decoding: Decoding) -> None:
        # Prompts go to stderr if the answers go to a file.
        super().__init__(stdout=sys.stderr)
        self.use_rawinput = sys.stdout.isatty()
        self.loaded, self.decoding = loaded, decoding
        self.history: list[tuple[str, str]] = []

    def onecmd(self, line: str) -> bool:
        """Executes a command, or asks; True ends the chat."""
        line = line.strip()
        if line.startswith("/"):  # cmd.Cmd repeats the last command if there is none
            return bool(line[1:].strip() and super().onecmd(line[1:]))
        if line and line != "EOF":
            self.ask(line)
        return line == "EOF"

    def ask(self, question: str) -> None:
        """Asks in the conversation, and prints the answer as it is generated."""
        request = Request(question, self.decoding, tuple(self.history))
        try:
            [answer] = answer_requests(self.loaded, [request], on_text=write_piece)
            print(flush=True)
            print_verdict(judge_answers(self.loaded, [answer], self.history)[0])
            self.history.append((question, answer.text))
        except UsageError as error:
            report(f"{error} Or start a new conversation: /reset")
        except Interrupted as interrupted:
            if interrupted.number != signal.SIGINT:
                raise
            report("\nStopped. This answer is not part of the conversation.")

    def default(self, line: str) -> None:
        """Reports an unknown command."""
        report(f"/{line.split()[0]} is not a command. /help lists them.")

    def do_decoding(self, name: str) -> None:
        """/decoding NAME: use another preset"""
        if name in DECODINGS:
            self.decoding = DECODINGS[name]
            report(f"Decoding {name}.")
        else:
            report(f"/decoding {name}: expected one of {', '.join(DECODINGS)}.")

    def do_reset(self, _: str) -> None:
        """/reset: start a new conversation"""
        self.history.clear()
        report("A new conversation.")

    def do_quit(self, _: str) -> bool:
        """/quit: end the chat"""
        return True


# --- Command -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InferConfig:
    """Flags of infer.py."""

    question: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="QUESTION")] = None
    """The question, in quotes; `-` reads one per line from stdin. Unset: a chat."""
    questions: Path | None = None
    """File of questions: .txt (one per line), or .jsonl, .json, .csv, .tsv or .parquet with a
    column question or prompt. Answers go to --output."""
    output: Path | None = None
    """File for the answers to --questions: a JSON line per row, in the same order, with all its
    columns. Rows that it contains are not asked again. Unset: NAME.answers.jsonl."""
    judge: str | None = None
    """Judge answers of other programs: a file of JSON lines (question, text and, if known,
    finish_reason and model), or `-` for stdin. Prints each line with its verdict."""
    surprisal: bool = True
    """Let the base model read the answers of --judge; `--no-surprisal` loads no model."""
    adapter: str | None = None
    """Adapter folder or hub id. Unset: the adapter of the last run that finished."""
    base: bool = False
    """Ask the base model, without an adapter."""
    base_model: str | None = None
    """Hub id or folder of another chat model of the Llama architecture. Unset: the adapter's, or
    the profile's."""
    system_prompt: str | None = None
    """System prompt of the questions. Unset: the adapter's, or the story's."""
    probes: str | None = None
    """File of questions with the points and wrong claims by which their answers are checked. Unset:
    samples/probes.jsonl."""
    compare: Literal["models", "decodings"] | None = None
    """Ask base and adapter, or with every preset, and show the answers side by side."""
    verify: bool = False
    """Also ask in two new processes and in a batch, and report whether all bytes are equal."""
    decoding: DecodingName | None = None
    """Decoding preset. Unset: the adapter's, or `kit`. The flags below change single fields."""
    max_new_tokens: int | None = None
    """Maximum tokens of the answer."""
    repetition_penalty: float | None = None
    """Lowers the logits of tokens that occurred; 1.0 is off."""
    no_repeat_ngram_size: int | None = None
    """Every n-gram of this size can occur only once; 0 is off."""
    count_prompt: bool | None = None
    """Whether penalty and n-gram ban also count the prompt."""
    temperature: float | None = None
    """0 is greedy decoding; otherwise tokens are sampled."""
    top_p: float | None = None
    """Sample from the most probable tokens whose probabilities add up to this; 1.0 is all."""
    sampling_seed: int | None = None
    """Seed of the sampling."""
    profile: ProfileChoice = "auto"
    """Set of defaults: `t4` for a GPU, `cpu`, or `auto`. Unset: the adapter's."""
    json: bool = False
    """Print answers as JSON lines, with token ids, finish reason, decoding, digests, findings."""

    def __post_init__(self) -> None:
        problems: list[str] = []

        def refuse(is_given: object, message: str) -> None:
            if is_given:
                problems.append(message)

        is_one = self.question not in (None, "-")
        if is_one:
            check_question(self.question)
        asks = self.question or self.questions or self.adapter or self.verify or self.compare
        one, own_format = "Give one of the two.", "which has its own format"
        base = "--base asks without an adapter,"
        refuse(self.judge and asks, "--judge reads answers and asks nothing. Remove other flags.")
        refuse(self.question and self.questions, f"A question and --questions: {one}")
        refuse(self.base and self.adapter, f"{base} --adapter {self.adapter} with one. {one}")
        refuse(self.base and self.compare == "models", f"{base} --compare models with one. {one}")
        refuse(self.output and not self.questions, f"--output {self.output} needs --questions.")
        same = self.output and self.questions and self.output.resolve() == self.questions.resolve()
        refuse(same, f"--output {self.output} is the file of questions. Give another file.")
        refuse(self.verify and not is_one, "--verify takes one question, in quotes.")
        refuse(self.compare and not is_one, "--compare takes one question, in quotes.")
        refuse(self.verify and self.compare, f"--verify and --compare: {one}")
        refuse(self.json and self.verify, f"--json and --verify, {own_format}: {one}")
        refuse(self.json and self.questions, f"--json and --questions, {own_format}: {one}")
        for flag, value in (("--system-prompt", self.system_prompt), ("--adapter", self.adapter)):
            refuse(value is not None and not value.strip(), f"{flag} is empty. Give a value.")
        if problems:
            raise ValueError("\n".join(problems))
        if self.probes:
            read_probes(self.probes)
        self.change_decoding(Decoding())

    def change_decoding(self, decoding: Decoding) -> Decoding:
        """`decoding` with the fields given as flags. Raises ValueError as `Decoding`."""
        names = [each.name for each in dataclasses.fields(Decoding) if each.name != "stop"]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(decoding, **given)


def write_piece(piece: str) -> None:
    """Writes a piece of an answer to stdout; on a terminal, with control characters escaped."""
    sys.stdout.write(data.escape_controls(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def print_verdict(judged: JudgedAnswer) -> None:
    """Prints the verdict and the findings to stderr."""
    assert judged.answer
    notes = ["sound" if judged.sound else "not sound"]
    if judged.ended:
        notes[0] += " and ended" if judged.sound else ""
    else:
        cap = judged.answer.decoding.max_new_tokens
        notes.append(f"  cut off at {cap} tokens (--max-new-tokens)")
    notes += [f"  {finding.name}: {finding.message}" for finding in judged.findings]
    if judged.facts:
        notes.append(f"  {judged.facts}, by the probe's lists of phrases")
    report("\n".join(notes))


def print_answer(loaded: LoadedModel, request: Request, *, as_json: bool) -> None:
    """Asks, and prints the answer: on a terminal as it is generated, else with a progress bar."""
    from tqdm import tqdm

    is_streaming = sys.stdout.isatty() and not as_json
    hidden = is_streaming or not sys.stderr.isatty()
    cap = request.decoding.max_new_tokens
    with tqdm(total=cap, unit="token", leave=False, disable=hidden) as bar:
        writer = write_piece if is_streaming else None
        [answer] = answer_requests(loaded, [request], bar.update, writer)
    if not as_json:
        print("" if is_streaming else answer.text, flush=True)
    [judged] = judge_answers(loaded, [answer])
    if as_json:
        print(to_json(judged.to_record()), flush=True)
    print_verdict(judged)


def print_answers(
    loaded: LoadedModel, rows: Sequence[QuestionRow], decoding: Decoding, *, as_json: bool
) -> None:
    """Asks the rows one by one, with an empty line between two answers."""
    for place, row in enumerate(rows):
        if not row.problem:
            print("\n" if place and not as_json else "", end="")
            print_answer(loaded, Request(row.question, decoding), as_json=as_json)
        elif as_json:
            print(to_json(row.to_record({"error": row.problem})), flush=True)


def print_comparison(loaded: LoadedModel, request: Request, config: InferConfig) -> None:
    """Prints the answers of base and adapter, or of every preset, side by side if they fit."""
    names: Sequence[str] = tuple(DECODINGS)
    if config.compare == "models":
        names = ("base", "adapter")
        with loaded.without_adapter() as base:
            answers = answer_requests(base, [request])
        answers += answer_requests(loaded, [request])
    else:
        decodings = [config.change_decoding(each) for each in DECODINGS.values()]
        answers = answer_requests(loaded, [Request(request.question, each) for each in decodings])
    judged = judge_answers(loaded, answers)
    if config.json:
        for name, each in zip(names, judged, strict=True):
            print(to_json({"name": name, **each.to_record()}))
        return
    from rich.columns import Columns
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console(highlight=False)
    panels = []
    width = max(console.width // len(names) - 1, min(console.width, 39))
    for name, answer, each in zip(names, answers, judged, strict=True):
        title = f"{name}: {answer.answer_tokens} tokens, {each.verdict}"
        text = Text(data.escape_controls(answer.text))
        panels.append(Panel(text, title=Text(title), width=width))
    console.print(Columns(panels))


def main(config: InferConfig) -> int:
    """Prints answers to stdout, and to stderr which model answers with which decoding.

    Returns 1 if --verify found a difference, or a question or answer was skipped; else 0.
    """
    handle_signals()
    if config.judge:
        return judge_file(config)
    rows: list[QuestionRow] = []
    if config.questions:
        rows = read_questions(str(config.questions))
    elif config.question == "-" or (config.question is None and not sys.stdin.isatty()):
        rows = read_questions("-")
    output = config.output or (config.questions and config.questions.with_suffix(".answers.jsonl"))
    if output and (output.is_dir() or not output.parent.is_dir()):
        raise UsageError(f"--output {output}: expected a file in an existing folder.")
    adapter = None
    if config.base:
        profile = data.resolve_profile(config.profile, config.base_model)
        decoding, model = DECODINGS["kit"], profile.base_model
    else:
        folder = find_adapter(config.adapter) if config.adapter else latest_adapter()
        adapter = check_adapter(folder, config.profile, config.base_model)
        profile = adapter.profile
        decoding = adapter.record.decoding or DECODINGS["kit"]
        model = f"{profile.base_model} with {folder}"
    prepare_environment(profile)
    decoding = config.change_decoding(DECODINGS[config.decoding] if config.decoding else decoding)
    report(f"{model}, decoding {decoding}")
    loaded = load_for_inference(profile, adapter, config.system_prompt)
    loaded.probes = read_probes(config.probes)
    if rows:
        check_rows(loaded, rows, decoding)
        if output:
            answer_file(loaded, rows, decoding, output)
        else:
            print_answers(loaded, rows, decoding, as_json=config.json)
    elif config.question is None:
        Chat(loaded, decoding).cmdloop()
    else:
        request = Request(config.question, decoding)
        if config.verify:
            return 0 if verify(loaded, request) else 1
        if config.compare:
            print_comparison(loaded, request, config)
        else:
            print_answer(loaded, request, as_json=config.json)
    skipped = sum(bool(row.problem) for row in rows)
    if skipped:
        report(f"{skipped} of {len(rows)} questions were skipped, see above")
    report("Not medical advice: a small language model wrote this.")
    return 1 if skipped else 0


MEMORY_ADVICE = "End other programs (nvidia-smi and top list them), then lower --max-new-tokens."

if __name__ == "__main__":
    data.run_command(InferConfig, main, __doc__, MEMORY_ADVICE)

"""What does the model say, and is it sound? Questions in, answers with a verdict out.

    python infer.py "What are the warning signs of a heart attack?"
    python infer.py "..." --base                        the base model, without the adapter
    python infer.py "..." --decoding story-fix          the story's decoding after its fixes
    python infer.py "..." --compare models              base and adapter (decodings: every preset)
    python infer.py "..." --verify                      same bytes in a new process and in a batch?
    python infer.py --questions questions.txt           many, into questions.answers.jsonl
    echo "..." | python infer.py -                      one question per line
    python infer.py --judge answers.jsonl               judge the answers of any program
    python infer.py                                     chat

For questions, stdout contains only the answers. They are not medical advice.
"""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import os
import pickle
import re
import signal
import statistics
import subprocess
import sys
import time
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tqdm import tqdm

import data
from data import Profile, ProfileChoice, ProfileName, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, GenerationConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

RUNS = Path("runs")
TRAIN_RUNS = RUNS / "train"
LATEST = TRAIN_RUNS / "latest.txt"  # names the run whose adapter is the default
RUN_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
RUN_NAME_RULE = "up to 100 letters, digits, '.', '_' and '-', starting with a letter or digit."
# Files of an adapter; the record holds what PEFT's own files have no place for.
CONFIG, WEIGHTS, ADAPTER_RECORD = "adapter_config.json", "adapter_model.safetensors", "kit.json"
LORA_TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight"
)
# Fields of PEFT's config that change the result, and their values in plain LoRA.
PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # others change the base weights
    **dict.fromkeys(("use_dora", "modules_to_save", "rank_pattern", "layer_replication"), ()),
    **dict.fromkeys(("alpha_pattern", "trainable_token_indices", "alora_invocation_tokens"), ()),
}
# The story's mistake: an added token enlarges the embedding, which the adapter then contains.
ADDED_PAD_TOKEN = "[PAD]"
PadName = Literal["native", "added"]
EMBEDDINGS = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")

# Rows of every forward pass of a generation, and the multiple to which prompts are padded: equal
# shapes use equal kernels, so an answer does not depend on the others.
ROWS, PROMPT_MULTIPLE = 24, 64
QUESTIONS_PER_SAVE = 32  # of --questions
# Answers of unknown models are compared with each other, if there are at least this many.
MIN_ANSWERS_TO_COMPARE = 20
# Bytes over which surprisal is averaged, and maximum nats of a single token.
SURPRISAL_BYTES, MAX_TOKEN_SURPRISAL = 160, 12.0
# Probes whose plain answers give the surprisal reference, and maximum tokens of these.
REFERENCE_PROBES, REFERENCE_TOKENS = 26, 128


# --- Decoding ------------------------------------------------------------------------------------

DecodingName = Literal["plain", "story-collapse", "story-fix", "week3", "kit"]


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded. Nothing is inherited from the model's generation config."""

    max_new_tokens: int = 256
    repetition_penalty: float = 1.0  # of earlier tokens (Keskar et al. 2019); 1.0 is off
    no_repeat_ngram_size: int = 0  # every n-gram of this size can occur only once; 0 is off
    count_prompt: bool = False  # in penalty and n-gram ban, as transformers does
    # The token that ends an answer: the chat template's, those of the generation config, or none.
    stop: Literal["end-of-turn", "generation-config", "never"] = "end-of-turn"
    temperature: float = 0.0  # 0 is greedy; otherwise, sample from softmax(logits / temperature)
    top_p: float = 1.0  # sample from the fewest tokens of this total probability; 1.0 is all
    sampling_seed: int = 0  # of each answer, so that it does not depend on the others

    def __post_init__(self) -> None:
        # Beyond these limits, logits overflow or torch.Generator rejects the seed.
        for name, least, most in (
            ("max_new_tokens", 1, data.MAX_SEQ_LENGTH - 1),
            ("repetition_penalty", 0.1, 10),
            ("no_repeat_ngram_size", 0, data.MAX_SEQ_LENGTH),
            ("temperature", 0.01, 100),
            ("top_p", 1e-9, 1),
            ("sampling_seed", 0, 2**63 - 1),
        ):
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if not (least <= value <= most or (name, value) == ("temperature", 0)):
                raise ValueError(f"{flag} {value}: expected {least} to {most} (see --help).")


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
class Request:
    """A question, the decoding of its answer, and the earlier turns."""

    question: str
    decoding: Decoding
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Answer:
    """An answer and how it was generated. `seconds` does not count in comparisons."""

    question: str
    text: str
    token_ids: list[int]  # with the stop token, if there was one
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    answer_tokens: int
    num_overruled: int  # tokens for which penalty or ban changed the model's first choice
    decoding: Decoding
    model: str  # the base model
    adapter: str | None  # sha256 of its weights
    seconds: float = field(compare=False)  # of the whole batch
    system_prompt: str = data.SYSTEM_PROMPT

    @property
    def sha256(self) -> str:
        """Digest of the token ids: equal answers have equal digests, on any machine."""
        return hashlib.sha256(json.dumps(self.token_ids).encode()).hexdigest()


# --- The judge -----------------------------------------------------------------------------------

Measure = tuple[float, tuple[int, int]]  # a score, and the characters of the text it comes from
NOTHING: Measure = (0.0, (0, 0))
# The value from which a measure is a finding, and the message about that part of the text. How each
# threshold was chosen: docs/judge.md.
CHECKS: dict[str, tuple[float, str]] = {
    "empty": (1, 'it says nothing, or stops mid-sentence: "{}"'),
    "loop": (20, 'it repeats itself word for word: "{}"'),
    "repetition": (1.5, 'it says nearly the same again and again: "{}"'),
    "list": (21, 'a list does not end: "{}"'),
    "leak": (1, 'this is not part of an answer: "{}"'),
    "invented-medicine": (1, 'no medicine has this name: "{}"'),
    "surprisal": (2.5, 'the base model finds this unlikely: "{}"'),
}
THRESHOLDS = {name: threshold for name, (threshold, _) in CHECKS.items()}


@dataclass(frozen=True)
class JudgedAnswer:
    """The verdict on an answer, and what it is based on."""

    measures: dict[str, Measure]  # in the order of `CHECKS`
    findings: list[dict[str, Any]]  # name, score, span (characters of the text) and message
    ended: bool  # by the stop token, rather than the limit of tokens
    answer: Answer | None = None
    facts: dict[str, list[str]] | None = None  # see `check_facts`, if the question is a probe's

    @property
    def sound(self) -> bool:
        """Whether there are no findings, so far if the answer was cut off."""
        return not self.findings

    @property
    def score(self) -> float:
        """The largest measure in units of its threshold: sound answers are below 1."""
        return max(score / THRESHOLDS[name] for name, (score, _) in self.measures.items())

    @property
    def verdict(self) -> str:
        """`sound`, or the names of the findings."""
        return ", ".join(each["name"] for each in self.findings) or "sound"

    def to_record(self) -> dict[str, Any]:
        """JSON-ready values."""
        record = {"sound": self.sound, "verdict": self.verdict, "score": round(self.score, 4)}
        record |= {"findings": self.findings} | ({"facts": self.facts} if self.facts else {})
        answer = self.answer
        return dataclasses.asdict(answer) | {"sha256": answer.sha256} | record if answer else record


# Markdown, which is replaced by as many spaces, so that spans of the text stay valid.
_MARKDOWN = re.compile(
    r"(?m)^[ \t]*(?:```|~~~).*$|^[ \t]*(?:[-*_=|:\u2500-\u257f][ \t]*){3,}$"
    r"|^[ \t]*(?:#{1,6}|>|[-*+\u2022]|\d{1,3}[.)])[ \t]+|\*{1,3}|__|`+|\|"
    r"|!?\[(?=[^\]\n]{0,300}\]\()|\]\([^)\n]{0,300}\)"
)
_NUMBER_OR_WORD = re.compile(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
# An answer whose stop token follows one of these stops mid-sentence.
_DANGLING = frozenset(("and", "or", "the"))


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
            # Up to two words may have changed, but no number, as it does in a dosing schedule.
            is_same_copy &= not any(word[0].isdigit() for word in words[end:start])
            if start > end and not is_same_copy:
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
    return worst - 1, (round(at * share), round(min(at + window, len(encoded)) * share))


_SENTENCE = re.compile(r"[^\n]+?(?:[^\d\s][.!?;:](?=\s)|\n|\Z)")
_SHORT_ITEM_END = re.compile(r",|\s[\u2013\u2014-]\s|\b(?:and|or)\b|\Z")
_BULLET = r"[-*+\u2013\u2022\u25aa\u25cb\u25cf\u25e6\u2713\u2714]"
_LIST_LINE = re.compile(rf"^([ \t]*)(?:{_BULLET}|(\d{{1,3}})[.)])[ \t]+\S.*$|^([ \t]*)\S.*$", re.M)
_NUMBERED = re.compile(r"(?<![\w.,/])(\d{1,3})[.)]\s+(?=\D)")
# A number that may ask for as many items: no age, dose, year, share or blood pressure.
_COUNT = re.compile(r"(?<![\d/])\d{1,3}(?![\d/%]|[ -]?(?:years?|yrs?|y/?o|m?c?g|ml|kg|cm|lbs?)\b)")


def measure_list(text: str, question: str = "", short: int = 5) -> Measure:
    """Items of the longest list: items of at most `short` words in a row within a sentence, lines
    of one list without those indented below an item, or numbers in a row. A list with no more items
    than a number in the question does not count."""
    lists: list[Measure] = []
    for sentence in _SENTENCE.finditer(text):
        run, start, at = 0, 0, 0
        for end in _SHORT_ITEM_END.finditer(sentence[0]):
            item = sentence[0][at : end.start()].split()
            if item:
                run = run + 1 if len(item) <= short else 0
                start = sentence.start() + at if run == 1 else start
                lists.append((run, (start, sentence.start() + end.start())))
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
        lists.append((run, (start, line.end())))
    run, start, last = 0, 0, -1
    for found in _NUMBERED.finditer(text):
        run = run + 1 if int(found[1]) == last + 1 else 1
        start = found.start() if run == 1 else start
        last = int(found[1])
        lists.append((run, (start, found.end())))
    asked = max(map(int, _COUNT.findall(question)), default=0)
    longest = max(lists, key=lambda each: each[0], default=NOTHING)
    return longest if longest[0] > asked else NOTHING


# Tokens of chat templates and the role names that remain without them, text in a wrong encoding,
# and symbols in a row.
_LEAK = re.compile(
    r"(?m)<\|\w+\|>|\[(?:/?INST|PAD|UNK)\]|</?s>|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|^#{2,} ?(?:Instruction|Input|Response):?[ \t]*$|Cutting Knowledge Date:"
    r"|<(?:pad|unk|bos|eos)>|(?<=[.!?:;>])[ \t]?(?:assistant|user|system|ipython)[ \t]*$"
    r"|(?<=[a-z0-9])assistant[ \t]*(?:\n[ \t]*\n|\Z)|^(?:assistant|user|system|ipython)[ \t]*$"
    r"|\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\u00e2\u20ac\S?"
    r"|\u00c3[\x80-\xbf\u00a9\u00a8\u00bc\u00b6]|\u00c2[\x80-\xbf]|([?$%^&~])\1{3,}"
)
# Other speakers, code and web markup; not counted if the question asks for it.
_LEAK_UNLESS_ASKED = re.compile(
    r"(?m)(?:^|(?<=[.!?]\s))\W{0,5}(?:User|Human|Assistant|Bot|USER|HUMAN|ASSISTANT)\W{0,2}:"
    r"|\b[Ii](?: am|'m) (?:an? )?\d{1,2}[- ]?(?:years?|yrs?|y/?o)\b"
    r"|\b(?:[Dd]ear|[Hh]ello|[Hh]i),? (?:[Dd]octor|[Dd]r)\b"
    r"|^[ \t]*(?:import \w+|from [\w.]+ import |def \w+\(|#include|print\(|function \w*\()"
    r"|</?(?:div|span|p|a|ul|ol|li|table|tr|td|h[1-6]|img|html|body|script|ref)"
    r"(?:\s[^<>\n=]{0,40}=[^<>\n]{0,80})?\s?/?>|&(?:nbsp|quot|apos|#\d+);"
    r"|\[\[|\]\]|\{\{[^{}\n]*\}\}|\{\|"
)
_ASKED_FOR = re.compile(
    r"(?i)\b(?:faq|quiz|dialogue|conversation|interview|script|soap|letter|e-?mail|code|function"
    r"|program|python|html|latex|translat\w*)\b"
)
_SPEAKER = re.compile(
    r"(?im)^\W{0,3}(?:patient|question|q|customer|client|student|interviewer|doctor|dr|instruction"
    r"|response|answer)\W{0,2}:"
)
_ADDRESS = re.compile(r"https?://\S+|www\.\S+")
# Scripts other than Latin and Greek, unless a term is given in brackets.
_OTHER_SCRIPT = re.compile(
    r"(?<![(\u0400-\u1cff\u2e80-\ud7ff\uf900-\ufdff])[\u0400-\u1cff\u2e80-\ud7ff\uf900-\ufdff]+"
)


def measure_leak(text: str, question: str = "") -> Measure:
    """Number of template tokens, role names, other speakers, pieces of code and markup, undecoded
    characters, and runs of a script that the question is not written in."""
    found = [*_LEAK.finditer(text), *list(_ADDRESS.finditer(text))[5:]]  # a few may be references
    if not _ASKED_FOR.search(question):
        found += _LEAK_UNLESS_ASKED.finditer(text)
        speakers = list(_SPEAKER.finditer(text))
        found += speakers if len(speakers) > 2 else []  # one or two may be headings
        if not _OTHER_SCRIPT.search(question):
            found += _OTHER_SCRIPT.finditer(text)
    return len(found), min((match.span() for match in found), default=(0, 0))


# Stems of the WHO's international nonproprietary names with which hardly any other word ends.
_MEDICINE_ENDINGS = tuple(
    """floxacin cillin mycin micin cycline bactam penem conazole prazole nidazole bendazole olol
    sartan statin vudine nib ciclib gliptin gliflozin glitazone glutide dipine triptan gepant
    azepam azolam thiazide semide xaban gatran profen coxib setron fibrate dronate artemisinin
    platin taxel lukast oxetine pril mab vir caine parin grel fungin rubicin vaptan
    lutamide""".split()
)


@functools.cache
def load_medicines() -> frozenset[str]:
    """Words, in lower case, of the names that drug-named-entity-recognition knows."""
    # Its file, since the library itself keeps several hundred MiB of indices.
    package = importlib.util.find_spec("drug_named_entity_recognition")
    with bz2.open(Path(package.origin).with_name("drug_ner_dictionary.pkl.bz2")) as file:
        names = " ".join(pickle.load(file)["drug_variant_to_canonical"])
    return frozenset(re.findall(r"[^\W\d_]+", names.lower()))


def measure_medicine(text: str, question: str = "") -> Measure:
    """Number of words that end like a WHO name of a medicine, but are neither one nor a misspelling
    of one. Names in the question and bare endings are not counted."""
    asked, spans = question.lower(), {}
    for match in re.finditer(r"(?<![-\w])[^\W\d_]{6,}(?![\w])", text):
        word = match[0].lower()
        singular = word.removesuffix("s")
        is_cef = re.fullmatch(r"cef\w+(?:in|ime?|one|ole|or|il|am)", singular)
        has_ending = is_cef or singular.endswith(_MEDICINE_ENDINGS)
        is_class = singular.endswith("penicillin") or singular in _MEDICINE_ENDINGS
        if not has_ending or is_class or word in asked or {word, singular} & load_medicines():
            continue
        near = [x for x in load_medicines() if x[:2] == word[:2] and abs(len(x) - len(word)) < 2]
        if not difflib.get_close_matches(word, near, n=1, cutoff=0.87):
            spans.setdefault(word, match.span())
    return len(spans), min(spans.values(), default=(0, 0))


def judge(
    text: str,
    question: str = "",
    finish_reason: str = "stop",
    surprisal: Measure = NOTHING,
    *,
    probe: Probe | None = None,
) -> JudgedAnswer:
    """The verdict on an answer, with the facts of its `probe`; loads no model. `surprisal` is the
    result of `measure_surprisal` in units of the reference, if a model has read the answer."""
    plain = _MARKDOWN.sub(lambda found: " " * len(found[0]), text)
    is_broken_off = finish_reason == "stop" and not _DANGLING.isdisjoint(text.split()[-1:])
    # Letters, numbers, and symbols such as emoji.
    has_words = any(kind[0] in "LN" or kind == "So" for kind in map(unicodedata.category, text))
    measures = {
        "empty": (float(is_broken_off or not has_words), (max(0, len(text) - 90), len(text))),
        "loop": measure_loop(plain),
        "repetition": measure_repetition(plain),
        "list": measure_list(text, question),
        "leak": measure_leak(text, question),
        "invented-medicine": measure_medicine(text, question),
        "surprisal": surprisal,
    }
    findings = []
    for name, (score, (start, end)) in measures.items():
        if score >= THRESHOLDS[name]:
            quote = " ".join(text[start:end].split())
            if len(quote) > 90:
                quote = f"{quote[:60]} ... {quote[-30:]}"
            finding = {"name": name, "score": round(score, 4), "span": (start, end)}
            findings.append(finding | {"message": CHECKS[name][1].format(quote)})
    facts = check_facts(text, probe) if probe else None
    return JudgedAnswer(measures, findings, finish_reason == "stop", facts=facts)


# --- Facts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A fact that an answer should name, or a wrong claim, recognized by any of its phrases."""

    name: str
    phrases: Sequence[str]  # lower case; `...` stands for up to six words of the same sentence
    guideline: str = ""  # the published reference
    unless_after: Sequence[str] = ()  # a wrong claim after one of these phrases is excused

    def __post_init__(self) -> None:
        for phrases in (self.phrases, self.unless_after):
            if isinstance(phrases, str) or not all(map(str.strip, (self.name, *phrases))):
                raise UsageError(f"{self.name!r}: expected a name and lists of phrases, none empty")


@dataclass(frozen=True)
class Probe:
    """A question that every run is asked, and the lists by which its answers are checked."""

    id: str
    question: str
    points: Sequence[Point]
    wrong_claims: Sequence[Point]


def read_probes(source: str | None = None) -> list[Probe]:
    """The probes of a file, by default samples/probes.jsonl. Only `question` is required. Raises
    UsageError if a line is not a probe or repeats a question, or the file is empty."""
    probes: dict[str, Probe] = {}
    for place, record in data.read_records(source or str(data.PROBES)):
        try:
            question = record["question"].strip()
            check_question(question)
            if question in probes:
                raise UsageError("an earlier line has the same question")
            points = [Point(**each) for each in record.get("points") or ()]
            wrong_claims = [Point(**each) for each in record.get("wrong_claims") or ()]
            name = str(record.get("id") or f"probe-{len(probes) + 1}")
            probes[question] = Probe(name, question, points, wrong_claims)
        except (KeyError, TypeError, AttributeError, UsageError) as error:
            reason = str(error) if isinstance(error, UsageError) else f"{record!r:.100}"
            problem = f"{place}: not a probe ({data.escape_controls(reason)})"
            expected = "Expected `question` and, optionally, `points` and `wrong_claims`"
            raise UsageError(f"{problem}. {expected}: see samples/README.md.") from None
    if not probes:
        raise UsageError(f"{source} contains no questions. Expected lines with `question`.")
    return list(probes.values())


# Words that negate a phrase that follows in the same clause.
_NEGATION = re.compile(
    r"(?i)\b(?:not?|never|without|nor|neither|unlike|cannot|avoid\w*|instead of|rather than"
    r"|\w+n['’]t)\b"
)
# Words that deny the phrase before: "... is not a sign", "... are no longer the first choice".
_DENIAL = re.compile(r"(?:\W++[\w'’]++){0,2}?\W+(?:not\b|no\b|never\b|\w+n['’]t\b)", re.I)
_CLAUSE_END = re.compile(r"[.!?;:,\n]|\bbut\b", re.I)
# Possessive, since a run of dashes or apostrophes could be split in exponentially many ways.
_UP_TO_SIX_WORDS = r"\b(?:[^\w.!?]++[\w'’-]++){0,6}?[^\w.!?]+"


def find_mention(text: str, phrases: Iterable[str], *, or_denied_after: bool = False) -> int | None:
    """Where the first phrase begins that is not negated earlier in its clause, or None. With
    `or_denied_after`, neither does a phrase count that the words right after it deny. Words are
    singular or plural, and a hyphen is equal to a space."""
    places = []
    for phrase in phrases:
        parts = [re.split(r"[\s-]+", part.strip()) for part in phrase.split("...")]
        forms = [[re.escape(word) + "(?:e?s)?" for word in words] for words in parts]
        pattern = _UP_TO_SIX_WORDS.join(map(r"[\s-]+".join, forms))
        for match in re.finditer(rf"\b{pattern}\b", text, re.I):
            before = _CLAUSE_END.split(text[: match.start()])[-1]
            after = _CLAUSE_END.split(text[match.end() :], maxsplit=1)[0]
            if not (_NEGATION.search(before) or (or_denied_after and _DENIAL.match(after))):
                places.append(match.start())
                break
    return min(places, default=None)


def check_facts(text: str, probe: Probe) -> dict[str, list[str]]:
    """The names of the probe's points that the answer names (`named`) and does not (`missing`), and
    of the wrong claims that it makes (`wrong`). No measure of its correctness."""
    named = [each.name for each in probe.points if find_mention(text, each.phrases) is not None]
    wrong = []
    for claim in probe.wrong_claims:
        # "A sore throat is not a sign" claims nothing; "is not the only sign" names a point.
        place = find_mention(text, claim.phrases, or_denied_after=True)
        excuse = find_mention(text, claim.unless_after)
        if place is not None and (excuse is None or place < excuse):
            wrong.append(claim.name)
    missing = [point.name for point in probe.points if point.name not in named]
    return {"named": named, "missing": missing, "wrong": wrong}


def measure_quality(judged: Sequence[JudgedAnswer]) -> dict[str, int]:
    """Counts of judged answers, and of points and wrong claims of their probes."""
    facts = [each.facts for each in judged if each.facts]
    return {
        "answers": len(judged),
        "sound": sum(each.sound for each in judged),
        "ended": sum(each.ended for each in judged),
        "sound_and_ended": sum(each.sound and each.ended for each in judged),
        "points": sum(len(each["named"]) for each in facts),
        "max_points": sum(len(each["named"]) + len(each["missing"]) for each in facts),
        "wrong_claims": sum(len(each["wrong"]) for each in facts),
    }


# --- Environment and loading ---------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP ended the command. The message, if any, says how to resume."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number


def handle_signals(handler: Callable[[int, Any], object] | None = None) -> None:
    """Sets a handler, by default raising `Interrupted`, for signals not ignored, as by nohup."""

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler or interrupt)


def report(message: str) -> None:
    """Prints a message to stderr, with control characters escaped."""
    print(data.escape_controls(message), file=sys.stderr)


def prepare_environment(profile: Profile, *, offline: bool | None = None) -> None:
    """Sets environment variables, before Unsloth is imported. `offline` None means: if the base
    model is local, or the hub cannot be reached."""
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


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """A context in which libraries print no banners to stdout and log errors only."""
    # Their warnings are about optional accelerators, or defaults that this kit overrides.
    noisy = "bitsandbytes torch.utils._pytree torchao xformers transformers unsloth unsloth_zoo"
    for name in noisy.split():
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(unsloth|torch|transformers|trl|peft)(\.|$)")
        yield


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
    return str(data.cached_folder(data.SMALL_MODEL, build))


def load_base(profile: Profile, *, dtype: str | None) -> tuple[PreTrainedModel, Tokenizer]:
    """The profile's base model and its tokenizer; `dtype` None lets Unsloth choose for training."""
    with quiet_libraries():
        # Unsloth patches transformers, PEFT and TRL, and has to be imported before them.
        from unsloth import DEVICE_TYPE, FastLanguageModel  # isort: skip
        import torch
        from transformers.utils import logging as transformers_logging

        if profile.name == "t4" and DEVICE_TYPE == "cpu":
            problem = "The profile t4 needs a GPU, and torch finds none (docs/t4.md)."
            raise UsageError(f"{problem} Use --profile cpu.")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            model, tokenizer = FastLanguageModel.from_pretrained(
                model_name=base_model_path(profile.base_model),
                max_seq_length=data.MAX_SEQ_LENGTH,
                dtype=dtype and getattr(torch, dtype),
                load_in_4bit=profile.load_in_4bit,
                use_gradient_checkpointing=profile.use_gradient_checkpointing,
                trust_remote_code=False,
                use_safetensors=True,
            )
        except OSError as error:
            reason = f"{profile.base_model} could not be loaded ({data.first_line(error)})."
            raise UsageError(f"{reason} A model of the hub needs the network once.") from error
    data.set_special_tokens(tokenizer, profile.base_model)
    return model, tokenizer


@dataclass(frozen=True)
class AdapterRecord:
    """What is known about an adapter, from kit.json, or from PEFT's config if there is none."""

    base_model: str
    profile: ProfileName | None = None
    prompt_fingerprint: str | None = None
    decoding: Decoding | None = None  # under which its answers were judged
    pad: PadName = "native"
    system_prompt: str = data.SYSTEM_PROMPT  # of most of its training rows
    surprisal_reference: float | None = None  # see the function of that name
    load_in_4bit: bool | None = None  # the base model in training; None: as the profile says


@dataclass(frozen=True)
class Adapter:
    """A checked adapter folder, and the profile with its base model."""

    folder: Path
    record: AdapterRecord
    profile: Profile
    lora: dict[str, Any]  # arguments of PEFT's LoraConfig


def find_adapter(name: str | None) -> Path:
    """The adapter's folder: `name`, a download from the hub, or, for None, of the last run."""
    if name is None:
        run = LATEST.read_text(errors="replace").strip() if LATEST.is_file() else ""
        if not RUN_NAME.fullmatch(run):
            problem = f"There is no adapter yet: {LATEST} names no run"
            raise UsageError(f"{problem}. Train one: python train.py, or ask with --base.")
        name = str(TRAIN_RUNS / run / "adapter")
    reason = "Give a folder such as runs/train/NAME/adapter, or a hub id."
    is_there = os.access(name, os.F_OK)  # `Path.exists` raises OSError if the name is too long
    if not is_there and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from huggingface_hub import snapshot_download

        files, is_offline = ["*.json", "*.safetensors"], not data.reaches_hub()
        try:
            return Path(snapshot_download(name, allow_patterns=files, local_files_only=is_offline))
        except (OSError, ValueError) as error:
            reason = f"Nor can it be downloaded: {data.first_line(error)}"
    if not is_there or not Path(name).is_dir():
        raise UsageError(f"The adapter {name!r} is not a folder. {reason}")
    return Path(name)


def check_adapter(
    folder: Path, choice: ProfileChoice = "auto", base_model: str | None = None
) -> Adapter:
    """The adapter in a folder, with --profile and --base-model; loads no weights. Raises UsageError
    if a file cannot be read, or it is not plain LoRA, or was trained on another base model."""
    import safetensors

    path = folder / WEIGHTS
    try:
        path.open("rb").close()  # safetensors would call an unreadable file missing
        with safetensors.safe_open(path, framework="np") as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        path = folder / CONFIG
        config = json.loads(path.read_text(encoding="utf-8"))
        r, lora_alpha = int(config["r"]), config["lora_alpha"]
        if not (r > 0 and lora_alpha > 0):
            raise ValueError(f"r {r}, lora_alpha {lora_alpha}")
        content = {"base_model": str(config.get("base_model_name_or_path"))}
        if (folder / ADAPTER_RECORD).is_file():
            path = folder / ADAPTER_RECORD
            content = json.loads(path.read_text(encoding="utf-8"))
        record = AdapterRecord(**content)
        own = record.base_model
        if not isinstance(own, str) or record.profile not in (None, *data.PROFILES):
            raise ValueError(f"base model {own}, profile {record.profile}")
        decoding = record.decoding and Decoding(**record.decoding)
        record = dataclasses.replace(record, decoding=decoding)
    except Exception as error:  # whatever a damaged file leads to
        reason = getattr(error, "strerror", None) or f"{error!r:.300}"
        problem = f"{path} of an adapter cannot be read ({reason})"
        expected = "PEFT's JSON and safetensors; a pickle, such as adapter_model.bin, can run code"
        raise UsageError(f"{problem}. Expected {expected}.") from None
    found = {name: config.get(name) for name in PLAIN_LORA}
    other = [f"{n} {v!r:.40}" for n, v in found.items() if v and v not in PLAIN_LORA[n]]
    if other:
        advice = "Merge the adapter into its base model with the program that made it."
        raise UsageError(f"{folder}: expected plain LoRA, found {', '.join(other)}. {advice}")

    known = [each for each in data.PROFILES.values() if data.is_same_base(own, each.base_model)]
    is_hub_id = known or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", own)
    is_folder = not is_hub_id or (base_model and Path(base_model).is_dir())
    if base_model and not is_folder and not data.is_same_base(base_model, own):
        raise UsageError(f"{folder} was trained on {own}, and --base-model is {base_model}.")
    # A path in another program's file is not followed.
    if not (is_hub_id or base_model or (record.profile and Path(own).is_dir())):
        advice = "Give the same base model with --base-model HUB_ID_OR_FOLDER."
        raise UsageError(f"{folder} was trained on {own}, which is a local path. {advice}")
    if choice == "auto":
        choice = record.profile or (known[0].name if known else choice)
    profile = data.resolve_profile(choice, base_model or (known[0].base_model if known else own))
    if record.load_in_4bit is not None and record.profile == profile.name:
        profile = dataclasses.replace(profile, load_in_4bit=record.load_in_4bit)

    arch, matrices = profile.architecture, Counter()
    misfit = f"{folder} does not fit {profile.base_model} with r {r}"
    for name, shape in shapes.items():
        lora, expected = LORA_TENSOR.fullmatch(name), None
        if lora and lora[2] in arch.linear_shapes and int(lora[1]) < arch.num_hidden_layers:
            rows, columns = arch.linear_shapes[lora[2]]
            expected = (r, columns) if lora[3] == "A" else (rows, r)
            matrices[lora[1], lora[2]] += 1
        elif name in EMBEDDINGS and record.pad == "added":
            expected = (arch.vocab_size + 1, arch.hidden_size)
        if shape != expected:
            found = f"expected {expected or 'no such tensor'}, found {shape}"
            raise UsageError(f"{misfit}: {name[:100]}: {found}.")
    if set(matrices.values()) != {2}:
        raise UsageError(f"{misfit}: expected its LoRA tensors in pairs of A and B.")
    lora = {"r": r, "lora_alpha": lora_alpha, "use_rslora": bool(config.get("use_rslora"))}
    lora["target_modules"] = sorted({module for _, module in matrices})
    return Adapter(folder, record, profile, lora)


def add_pad_token(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Adds a pad token and a row for it to the embedding: the story's mistake, for comparison."""
    import torch

    tokenizer.add_special_tokens({"pad_token": ADDED_PAD_TOKEN})
    # The new row is random and part of the loss. A resumed run has to have the same one.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def attend_grouped(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """(B, heads, T, D), keys and values (B, groups, S, D) -> (B, T, heads, D). transformers repeats
    keys and values per head if there is a mask; `tests.bench answer` then takes 1.5 times as long.
    """
    import torch

    is_causal = attention_mask is None and query.shape[2] > 1
    options = {"is_causal": is_causal, "scale": kwargs["scaling"], "enable_gqa": True}
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, key, value, attention_mask, **options).transpose(1, 2).contiguous(), None


@dataclass
class LoadedModel:
    """A base model, with or without an adapter, ready for inference."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    profile: Profile
    adapter_sha256: str | None = None
    system_prompt: str = data.SYSTEM_PROMPT
    reference: float | None = None  # the result of `surprisal_reference`, once it is known
    probes: Sequence[Probe] = field(default_factory=read_probes)  # by which facts are checked

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[LoadedModel]:
        """A context with the base model alone."""
        with getattr(self.model, "disable_adapter", contextlib.nullcontext)():
            yield dataclasses.replace(self, adapter_sha256=None)


def load_for_inference(
    profile: Profile, adapter: Adapter | None = None, system_prompt: str | None = None
) -> LoadedModel:
    """The profile's base model, with the adapter if there is one; without a system prompt, with the
    adapter's or the story's. Raises UsageError if it was trained with another prompt."""
    loaded = LoadedModel(*load_base(profile, dtype=profile.dtype), profile)
    if adapter:
        from peft import LoraConfig, PeftModel

        record = adapter.record
        prompt = data.prompt_fingerprint(loaded.tokenizer, record.system_prompt)
        if record.prompt_fingerprint not in (None, prompt):
            problem = f"{adapter.folder} was trained with the prompt {record.prompt_fingerprint}"
            advice = "Use the version that trained it, or train it again."
            raise UsageError(f"{problem}, and this kit renders {prompt}. {advice}")
        if record.pad == "added":
            add_pad_token(loaded.model, loaded.tokenizer)
        # Not the folder's own config, which may name modules to import and paths to read.
        config = LoraConfig(task_type="CAUSAL_LM", inference_mode=True, **adapter.lora)
        with quiet_libraries():
            loaded.model = PeftModel.from_pretrained(loaded.model, adapter.folder, config=config)
        weights = (adapter.folder / WEIGHTS).read_bytes()
        loaded.adapter_sha256 = hashlib.sha256(weights).hexdigest()
        loaded.system_prompt, loaded.reference = record.system_prompt, record.surprisal_reference
    from unsloth import FastLanguageModel  # isort: skip
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    FastLanguageModel.for_inference(loaded.model)
    if profile.attn_implementation == "grouped":
        AttentionInterface.register("grouped", attend_grouped)
        AttentionMaskInterface.register("grouped", sdpa_mask)
        loaded.model.set_attn_implementation("grouped")
    loaded.system_prompt = system_prompt or loaded.system_prompt
    return loaded


# --- Generation ----------------------------------------------------------------------------------


def stop_ids(decoding: Decoding, model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that end an answer."""
    if decoding.stop == "generation-config":
        eos = model.generation_config.eos_token_id
        return list(eos) if isinstance(eos, list) else [eos]
    return [tokenizer.eos_token_id] if decoding.stop == "end-of-turn" else []


def make_row_processor(
    decodings: Sequence[Decoding],
    prompt_tokens: int,
    padding: Sequence[int] | None = None,
    overruled: list[list[bool]] | None = None,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A logits processor that applies a decoding to each row; `generate` then takes the argmax.

    As transformers' own, but without `count_prompt`, penalty and ban get the answer's ids only: the
    template ends each turn of the prompt with the end-of-turn token. Sampling adds Gumbel noise,
    whose argmax is a draw from the softmax (Gumbel 1954; Maddison et al. 2014), per row.

    `prompt_tokens` includes the `padding` on the left, by default 0 per row. Rows without a
    decoding are copies of the last that has one. At each step, `overruled` gets a list of whether
    penalty or ban changed the most probable token of each row.
    """
    import torch
    import transformers as library

    generators = [torch.Generator().manual_seed(each.sampling_seed) for each in decodings]
    padding = padding or [0] * len(decodings)

    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids` (B, T), `scores` (B, V) -> (B, V)."""
        scores, changed = scores.clone(), []
        for row, each in enumerate(decodings):
            seen = input_ids[row : row + 1, padding[row] if each.count_prompt else prompt_tokens :]
            own = scores[row : row + 1]
            first_choice = own.argmax()
            if each.repetition_penalty != 1.0:
                own = library.RepetitionPenaltyLogitsProcessor(each.repetition_penalty)(seen, own)
            if each.no_repeat_ngram_size:
                own = library.NoRepeatNGramLogitsProcessor(each.no_repeat_ngram_size)(seen, own)
            changed.append(bool(own.argmax() != first_choice))
            if each.temperature:
                own = library.TemperatureLogitsWarper(each.temperature)(seen, own)
                if each.top_p < 1.0:
                    own = library.TopPLogitsWarper(each.top_p)(seen, own)
                uniform = torch.rand(own.shape[1], generator=generators[row], dtype=torch.float64)
                own = own - torch.log(-torch.log(uniform)).to(own)
            scores[row] = own
        scores[len(decodings) :] = scores[len(decodings) - 1]
        if overruled is not None:
            overruled.append(changed)
        return scores

    return process


def make_generation_config(
    max_new_tokens: int, stop: Sequence[int], pad: int, repetition_penalty: float = 1.0
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
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=list(stop),
        pad_token_id=pad,
    )


def check_question(question: str) -> None:
    """Raises UsageError unless the question is text with a letter or digit."""
    shown = data.escape_controls(question[:40])
    if not any(character.isalnum() for character in question):
        raise UsageError(f'The question is empty: "{shown}". Ask in words.')
    control = re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", question)
    if control:
        found = f"{data.escape_controls(control[0])} at character {control.start() + 1}"
        raise UsageError(f'The question "{shown}..." contains {found}, which is not text.')


def encode_request(loaded: LoadedModel, request: Request) -> list[int]:
    """Token ids of the request's prompt. Raises UsageError like `check_question`, or if prompt and
    answer exceed the maximum length."""
    question, cap = request.question, request.decoding.max_new_tokens
    check_question(question)
    prompt = data.encode_prompt(loaded.tokenizer, question, request.history, loaded.system_prompt)
    if len(prompt) + cap > data.MAX_SEQ_LENGTH:
        shown = f'The question "{data.escape_controls(question[:40])}..." has a prompt of'
        most = f"with an answer of up to {cap}, this exceeds the maximum of {data.MAX_SEQ_LENGTH}"
        advice = "Shorten the question, or the answer with --max-new-tokens."
        raise UsageError(f"{shown} {len(prompt)} tokens; {most}. {advice}")
    return prompt


def merge_requests(requests: Sequence[Request]) -> list[list[int]]:
    """Indices of the requests that one row can answer: they differ at most in cap and stop, on
    which the next token does not depend."""
    rows: dict[Request, list[int]] = defaultdict(list)
    for place, request in enumerate(requests):
        open_end = dataclasses.replace(request.decoding, max_new_tokens=1, stop="never")
        rows[dataclasses.replace(request, decoding=open_end)].append(place)
    return list(rows.values())


def count_new_tokens(requests: Sequence[Request]) -> int:
    """The maximum number of tokens that `answer_requests` generates for the requests."""
    rows = merge_requests(requests)
    return sum(max(requests[place].decoding.max_new_tokens for place in row) for row in rows)


def cut_answer(
    ids: Sequence[int], cap: int, stop: Sequence[int]
) -> tuple[list[int], Literal["stop", "length"]]:
    """The ids up to the first stop token, or up to the cap, and which of the two it was."""
    end = next((place for place, token in enumerate(ids[:cap]) if token in stop), None)
    return (list(ids[:cap]), "length") if end is None else (list(ids[: end + 1]), "stop")


def read_prompts(
    loaded: LoadedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> DynamicCache:
    """Keys and values of the prompts (B, T) except their last token, where `generate` continues.
    Each distinct prompt is read once, in its own forward pass of shape (1, T - 1)."""
    import torch
    from transformers import DynamicCache

    parts, rows = {}, [tuple(row) for row in input_ids.tolist()]
    for row, ids, mask in zip(rows, input_ids.split(1), attention_mask.split(1), strict=True):
        if row not in parts:
            parts[row] = loaded.model(
                input_ids=ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, :-1],
                past_key_values=DynamicCache(config=loaded.model.config),
                use_cache=True,
                logits_to_keep=1,
            ).past_key_values.layers
    cache = DynamicCache(config=loaded.model.config)
    for number, layers in enumerate(zip(*(parts[row] for row in rows), strict=True)):
        keys = torch.cat([each.keys for each in layers])
        cache.update(keys, torch.cat([each.values for each in layers]), number)
    return cache


def answer_requests(
    loaded: LoadedModel,
    requests: Sequence[Request],
    progress: Callable[[int], object] | None = None,
    on_text: Callable[[str], object] | None = None,
) -> list[Answer]:
    """One `Answer` per request, in their order; none depends on the other requests.

    Every forward pass has `ROWS` rows, padded on the left to a multiple of `PROMPT_MULTIPLE`;
    unused rows are copies of the last prompt. `progress` is called with the number of tokens
    generated, or skipped after an early end: `count_new_tokens` in total; by default, a terminal
    shows a bar. `on_text` is called with the text of the first answer, piece by piece.
    """
    import torch

    model, tokenizer, written = loaded.model, loaded.tokenizer, ""
    answers: dict[int, Answer] = {}
    prompts = [encode_request(loaded, request) for request in requests]
    stops = [stop_ids(each.decoding, model, tokenizer) for each in requests]
    caps = [request.decoding.max_new_tokens for request in requests]
    total, is_hidden = count_new_tokens(requests), progress and True
    bar = tqdm(total=total, unit="token", leave=False, disable=is_hidden)
    progress = progress or bar.update

    def cut(place: int, ids: list[int]) -> tuple[list[int], Literal["stop", "length"], str]:
        kept, reason = cut_answer(ids, caps[place], stops[place])
        words = [token for token in kept if token not in stops[place]]
        return kept, reason, tokenizer.decode(words, skip_special_tokens=False).strip()

    def answer_batch(batch: list[list[int]], width: int) -> None:
        """Generates the answers of up to `ROWS` rows; each row is a list of places."""
        started = time.perf_counter()
        rows = batch + batch[-1:] * (ROWS - len(batch))
        longest = [max(caps[place] for place in row) for row in batch]
        overruled: list[list[bool]] = []

        def has_ended(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            """`input_ids` (B, T) -> (B,): whether all answers of a row have ended."""
            nonlocal written
            steps = len(overruled)
            progress(sum(steps <= cap for cap in longest))
            if on_text and batch[0][0] == 0:
                text = cut(0, input_ids[0, width:].tolist())[2]
                # Incomplete characters wait for the next token; trailing spaces are stripped.
                if not text.endswith("\ufffd") and text.startswith(written):
                    on_text(text[len(written) :])
                    written = text
            newest = zip(rows, input_ids[:, -1].tolist(), strict=True)
            ended = [all(t in stops[n] or steps >= caps[n] for n in row) for row, t in newest]
            return torch.tensor(ended, device=input_ids.device)

        ids = {"input_ids": [prompts[row[0]] for row in rows]}
        shape = {"padding": "max_length", "max_length": width, "padding_side": "left"}
        inputs = tokenizer.pad(ids, **shape, return_attention_mask=True, return_tensors="pt")
        inputs = dict(inputs.to(model.device))
        padding = [width - len(prompts[row[0]]) for row in batch]
        decodings = [requests[row[0]].decoding for row in batch]
        # An id that ends no row, as `has_ended` does that; an empty list would mean the model's.
        no_id, pad = model.config.vocab_size, tokenizer.pad_token_id
        # Not inference mode, since a later training step may need tensors that the model caches.
        with torch.no_grad():
            if loaded.profile.shares_prompts:
                inputs["past_key_values"] = read_prompts(loaded, **inputs)
            output = model.generate(
                **inputs,
                generation_config=make_generation_config(max(longest), [no_id], pad),
                logits_processor=[make_row_processor(decodings, width, padding, overruled)],
                stopping_criteria=[has_ended],
            )
        progress(sum(max(0, cap - len(overruled)) for cap in longest))
        seconds = round(time.perf_counter() - started, 3)
        for row, place in ((row, place) for row, each in enumerate(batch) for place in each):
            kept, reason, text = cut(place, output[row, width:].tolist())
            answers[place] = Answer(
                question=requests[place].question,
                text=text,
                token_ids=kept,
                finish_reason=reason,
                prompt_tokens=len(prompts[place]),
                answer_tokens=len(kept),
                num_overruled=sum(step[row] for step in overruled[: len(kept)]),
                decoding=requests[place].decoding,
                model=loaded.profile.base_model,
                adapter=loaded.adapter_sha256,
                seconds=seconds,
                system_prompt=loaded.system_prompt,
            )

    by_width = defaultdict(list)
    for row in merge_requests(requests):
        # At least one pad token, so that there is a mask.
        by_width[(len(prompts[row[0]]) // PROMPT_MULTIPLE + 1) * PROMPT_MULTIPLE].append(row)
    for width, rows in sorted(by_width.items()):
        for start in range(0, len(rows), ROWS):
            answer_batch(rows[start : start + ROWS], width)
    bar.close()
    return [answers[place] for place in range(len(requests))]


# --- Surprisal -----------------------------------------------------------------------------------


def largest_surprisal(
    tokenizer: Tokenizer, ids: Sequence[int], surprisals: Sequence[float]
) -> tuple[float, tuple[int, int]]:
    """`(nats per byte, tokens)` of the `SURPRISAL_BYTES` with the largest mean surprisal. The mean
    of a shorter answer is over its bytes, or half of `SURPRISAL_BYTES` if that is more."""
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
    loaded: LoadedModel, question: str, ids: Sequence[int], history: Sequence[tuple[str, str]] = ()
) -> Measure:
    """The largest surprisal -ln p of an answer in nats per byte, without the adapter. One answer
    per forward pass, so that the value does not depend on other answers."""
    import torch

    tokenizer = loaded.tokenizer
    prompt = data.encode_prompt(tokenizer, question, history, loaded.system_prompt)
    # Beyond the context, the start of the prompt and the end of the answer are cut off.
    prompt = prompt[-max(data.MAX_SEQ_LENGTH // 2, data.MAX_SEQ_LENGTH - len(ids)) :]
    ids = list(ids[: data.MAX_SEQ_LENGTH - len(prompt)])
    if not ids:
        return NOTHING
    row = torch.tensor([[*prompt, *ids]], device=loaded.model.device)
    with loaded.without_adapter() as base, torch.no_grad():
        mask = torch.ones_like(row)
        output = base.model(input_ids=row, attention_mask=mask, logits_to_keep=len(ids) + 1)
        logits = output.logits[0, -len(ids) - 1 : -1].float()
        losses = torch.nn.functional.cross_entropy(logits, row[0, -len(ids) :], reduction="none")
    nats, span = largest_surprisal(tokenizer, ids, losses.tolist())
    start, end = (len(tokenizer.decode(ids[:place]).lstrip()) for place in span)
    return nats, (start, end)


def name_reference(profile: Profile) -> tuple[str, list[str]]:
    """The cache folder of `surprisal_reference`, and the questions that it is taken from."""
    questions = [probe.question for probe in read_probes()[:REFERENCE_PROBES]]
    base_model = profile.base_model
    changed = [file.stat().st_mtime_ns for file in Path(base_model).glob("*.safetensors")]
    settings = [profile.name, base_model, changed, data.SYSTEM_PROMPT, REFERENCE_TOKENS, *questions]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    return f"reference-{digest[:16]}", questions


def prepare_reference(profile: Profile) -> None:
    """Caches `surprisal_reference`, computed by a process of its own: in training, the base model
    has another precision, so its answers would differ. Raises UsageError if the process fails."""
    if (data.cache_home() / name_reference(profile)[0]).is_dir():
        return
    base_model = profile.base_model
    report(f"{base_model} answers {REFERENCE_PROBES} questions for the judge (first use only).")
    command = [sys.executable, str(Path(__file__).resolve()), "What is croup?", "--base"]
    command += ["--max-new-tokens", "1", "--profile", profile.name, "--base-model", base_model]
    # Ctrl-C does not reach its session: it is killed if this process is stopped.
    ran = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if ran.returncode:
        raise UsageError(f"The base model could not answer:\n{ran.stderr.strip()[-2000:]}")


def surprisal_reference(loaded: LoadedModel) -> float:
    """The largest surprisal of the base model's plain answers to the probes, in nats per byte.
    Cached, and part of an adapter's record."""
    if loaded.reference is not None:
        return loaded.reference
    name, questions = name_reference(loaded.profile)

    def build(folder: Path) -> None:
        requests = [Request(each, Decoding(max_new_tokens=REFERENCE_TOKENS)) for each in questions]
        with loaded.without_adapter() as base:
            base = dataclasses.replace(base, system_prompt=data.SYSTEM_PROMPT)
            answers = answer_requests(base, requests)
            nats = [measure_surprisal(base, each.question, each.token_ids)[0] for each in answers]
        data.write_atomic(folder / "reference.json", json.dumps({"nats_per_byte": max(nats)}))

    content = (data.cached_folder(name, build) / "reference.json").read_text()
    loaded.reference = json.loads(content)["nats_per_byte"]
    return loaded.reference


def judge_answers(
    loaded: LoadedModel, answers: Sequence[Answer], history: Sequence[tuple[str, str]] = ()
) -> list[JudgedAnswer]:
    """The verdicts on a model's answers."""
    probes = {probe.question: probe for probe in loaded.probes}
    reference, judged = surprisal_reference(loaded), []
    for each in answers:
        nats, span = measure_surprisal(loaded, each.question, each.token_ids, history)
        surprisal, probe = (nats / reference, span), probes.get(each.question)
        verdict = judge(each.text, each.question, each.finish_reason, surprisal, probe=probe)
        judged.append(dataclasses.replace(verdict, answer=each))
    return judged


# --- Files ---------------------------------------------------------------------------------------


def to_json(columns: dict[str, Any], own: dict[str, Any]) -> str:
    """A line of JSON: our `own` values after a user's columns, of which one with another value of
    the same name becomes `input_NAME`. Control characters are escaped, NaN is null, dates text."""
    line: dict[str, Any] = {}
    for name, value in columns.items():
        if name not in own or own[name] != value:
            while name in own.keys() | line.keys() | {"error", "facts"}:
                name = f"input_{name}"
            line[name] = value
    plain = json.loads(json.dumps(line | own, default=str), parse_constant=lambda _: None)
    text = json.dumps(plain, ensure_ascii=False)
    return data.CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


@dataclass
class QuestionRow:
    """A question of a file, with all columns of its row."""

    place: str
    columns: dict[str, Any]
    question: str = ""
    problem: str = ""  # why it is skipped


def read_questions(source: str) -> list[QuestionRow]:
    """The questions of a `.txt` file or of stdin (`-`), one per line, or of the rows of a table.
    Raises UsageError if the file cannot be read, or no row has a valid question."""
    if source == "-" or source.lower().endswith(".txt"):
        try:
            content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        except OSError as error:
            raise UsageError(f"{source[:300]} cannot be read ({error.strerror}).") from None
        source = "stdin" if source == "-" else source
        lines = enumerate(re.split(r"\r*\n|\r", data.decode_text(content, source)), 1)
        records = [(f"{source}:{n}", {"question": line}) for n, line in lines if line.strip()]
    else:
        records = data.read_records(source)
    rows = []
    for place, record in records:
        problem = "" if isinstance(record, dict) else f"expected columns, found {record!s:.200}"
        columns = {"record": str(record)} if problem else record
        rows.append(QuestionRow(place, columns, problem=problem))
    found = [data.find_question(row.columns) for row in rows]
    # An instruction that is the same in every row is a system prompt, as in training.
    instructions = {repr(given.get("instruction")) for given, _ in found}
    is_constant = len(instructions) == 1 < len(rows)
    if is_constant and "None" not in instructions and any(len(roles) > 1 for _, roles in found):
        report("The instruction of all rows is not asked. Set it with --system-prompt.")
    for row, (given, roles) in zip(rows, found, strict=True):
        texts = [given[name] for name in roles if given[name] is not None]
        texts = texts[-1:] if is_constant else texts
        if texts and all(isinstance(text, str) for text in texts):
            row.question = "\n\n".join(map(str.strip, texts))
        try:
            check_question(row.question)
        except UsageError as error:
            row.problem = row.problem or f"{error} Expected text in a column question or prompt."
    if all(row.problem for row in rows):
        first = f" {rows[0].place}: {rows[0].problem}" if rows else ""
        raise UsageError(f"{source} contains no questions.{first}")
    return rows


def read_answered(path: Path, rows: Sequence[QuestionRow], expected: dict[str, Any]) -> list[str]:
    """The lines that an earlier start wrote for the first rows. Raises UsageError if the file
    contains something else, or answers with other values than `expected`."""
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        is_ours = False
        with contextlib.suppress(Exception):  # of unknown content
            row, record = rows[number - 1], json.loads(line.decode())
            own = {"question": row.question} | ({} if row.problem else expected)
            is_ours = all(record[name] == value for name, value in own.items())
        if not is_ours:
            expected = f"an answer to row {number} by this model, decoding and system prompt"
            advice = "Give another file with --output, or remove it."
            raise UsageError(f"{path}:{number} is not {expected}. {advice}")
    return [line.decode() for line in lines]


def answer_file(
    loaded: LoadedModel, rows: Sequence[QuestionRow], decoding: Decoding, path: Path
) -> None:
    """Answers the rows for which the file has no line yet: one line per row, in their order."""
    expected = {
        "model": loaded.profile.base_model,
        "adapter": loaded.adapter_sha256,
        "decoding": dataclasses.asdict(decoding),
        "system_prompt": loaded.system_prompt,
    }
    lines = read_answered(path, rows, expected) if path.exists() else []
    before = len(lines)
    path = path.resolve()  # a link stays one
    # A file that cannot be written is an error before the first question.
    data.write_atomic(path, "".join(f"{line}\n" for line in lines))
    with tqdm(total=len(rows), initial=before, unit="question", desc="answering") as bar:
        for start in range(before, len(rows), QUESTIONS_PER_SAVE):
            batch = rows[start : start + QUESTIONS_PER_SAVE]
            requests = [Request(row.question, decoding) for row in batch if not row.problem]
            judged = iter(judge_answers(loaded, answer_requests(loaded, requests)))
            for row in batch:
                own = {"error": row.problem} if row.problem else next(judged).to_record()
                lines.append(to_json(row.columns, {"question": row.question} | own))
            data.write_atomic(path, "".join(f"{line}\n" for line in lines))
            bar.update(len(batch))
    answers = [json.loads(line) for row, line in zip(rows, lines, strict=True) if not row.problem]
    ends = [(each.get("finish_reason"), each.get("verdict")) for each in answers]
    report(f"{len(rows) - before} rows now, {before} before: {path}")
    report(f"sound and ended: {ends.count(('stop', 'sound'))} of {len(answers)}")


def judge_file(config: InferConfig) -> int:
    """Judges the answers in a file or on stdin; prints each as a JSON line with its verdict.
    Returns 1 if a record could not be judged, else 0.

    Surprisal is a multiple of the base model's reference, or for other writers, of a reference at
    which the median of their answers plus four deviations (MAD) is the threshold.
    """
    if config.judge == "-":
        content = data.decode_text(sys.stdin.buffer.read(), "stdin")
        records = list(data.read_json(content, "stdin"))
    else:
        records = list(data.read_records(config.judge))
    if not records:
        raise UsageError('There are no answers. Expected {"question": ..., "text": ...} per line.')
    answers = {}
    for place, record in records:
        with contextlib.suppress(Exception):  # of unknown content
            (record["question"] + record["text"]).encode()
            reason = str(record.get("finish_reason")).casefold()
            reason = "length" if reason in ("length", "max_tokens", "max_length") else "stop"
            answers[place] = record | {"finish_reason": reason}
    surprisals: dict[str, Measure] = {}
    others: dict[str, Measure] = {}
    if config.surprisal and answers:
        profile = data.resolve_profile(config.profile, config.base_model)
        prepare_environment(profile)
        loaded = load_for_inference(profile, None, config.system_prompt)
        for place, each in tqdm(answers.items(), unit="answer", desc="reading", disable=None):
            ids = data.encode_text(loaded.tokenizer, each["text"])
            ids += [loaded.tokenizer.eos_token_id] * (each["finish_reason"] == "stop")
            nats, span = measure_surprisal(loaded, each["question"], ids)
            if data.is_same_base(str(each.get("model")), profile.base_model):
                surprisals[place] = nats / surprisal_reference(loaded), span
            else:
                others[place] = nats, span
    if len(others) >= MIN_ANSWERS_TO_COMPARE:
        median = statistics.median(nats for nats, _ in others.values())
        deviation = statistics.median(abs(nats - median) for nats, _ in others.values())
        limit = median + 4 * max(deviation, median / 10)
        reference = limit / THRESHOLDS["surprisal"] or 1
        surprisals |= {place: (nats / reference, span) for place, (nats, span) in others.items()}
    elif others:
        problem = f"{len(others)} answers of unknown models are too few to compare their surprisal"
        report(f"{problem} ({MIN_ANSWERS_TO_COMPARE} are needed). They are judged by text alone.")
    probes = {probe.question: probe for probe in read_probes(config.probes)}
    counts: Counter[str] = Counter()
    for place, record in records:
        if place not in answers:
            problem = f"expected text in question and text, found {record!s:.100}"
            report(f"{place}: {problem}")
            print(to_json(record if isinstance(record, dict) else {}, {"error": problem}))
            continue
        question, reason = record["question"], answers[place]["finish_reason"]
        surprisal, probe = surprisals.get(place, NOTHING), probes.get(question.strip())
        judged = judge(record["text"], question, reason, surprisal, probe=probe)
        print(to_json(record, judged.to_record()), flush=True)
        counts.update(judged.verdict.split(", "))
    skipped, sound = len(records) - len(answers), counts.pop("sound", 0)
    found = "".join(f"; {name} {count}" for name, count in counts.most_common())
    found += f"; {skipped} could not be judged" if skipped else ""
    report(f"sound {sound} of {len(answers)}{found}")
    return 1 if skipped else 0


# --- Command -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InferConfig:
    """Flags of infer.py."""

    # The question, in quotes; `-` reads one per line from stdin. Unset: a chat.
    question: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="QUESTION")] = None
    questions: Path | None = None  # File: .txt (one per line), or rows with a question or prompt.
    output: Path | None = None  # JSON lines, one per row; resumes. Unset: NAME.answers.jsonl.
    # Judge answers of other programs: a file of JSON lines (question, text and, if known,
    # finish_reason and model), or `-` for stdin. Prints each line with its verdict.
    judge: str | None = None
    surprisal: bool = True  # Let the base model read the answers of --judge.
    adapter: str | None = None  # Adapter folder or hub id. Unset: that of the last finished run.
    base: bool = False  # Ask the base model, without an adapter.
    base_model: str | None = None  # Hub id or folder of another chat model of Llama's architecture.
    system_prompt: str | None = None  # Replaces the adapter's, or the story's.
    probes: str | None = None  # Questions with lists of facts. Unset: samples/probes.jsonl.
    compare: Literal["models", "decodings"] | None = None  # Ask base and adapter, or every preset.
    verify: bool = False  # Also ask in two new processes and in a batch: are all bytes equal?
    decoding: DecodingName | None = None  # Preset, changed by the next flags. Unset: the adapter's.
    max_new_tokens: int | None = None  # Maximum tokens of the answer.
    repetition_penalty: float | None = None  # Lowers logits of earlier tokens; 1.0 is off.
    no_repeat_ngram_size: int | None = None  # Every n-gram can occur only once; 0 is off.
    count_prompt: bool | None = None  # Whether penalty and n-gram ban also count the prompt.
    temperature: float | None = None  # 0 is greedy decoding; otherwise tokens are sampled.
    top_p: float | None = None  # Sample from the fewest tokens of this total probability.
    sampling_seed: int | None = None  # Seed of each answer.
    profile: ProfileChoice = "auto"  # `auto`: the adapter's, or the one for this machine.
    json: bool = False  # Print JSON lines with token ids, decoding, digests and findings.

    def __post_init__(self) -> None:
        is_one = self.question not in (None, "-")
        if is_one:
            check_question(self.question)
        if sum(map(bool, (self.question, self.questions, self.judge))) > 1:
            raise ValueError("Give one of the three: a question, --questions or --judge.")
        if (self.verify or self.compare) and not is_one:
            raise ValueError("--verify and --compare take one question, in quotes.")
        if self.verify and (self.compare or self.json):
            raise ValueError("--verify takes neither --compare nor --json.")
        if (self.judge and self.adapter) or (self.questions and self.json):
            raise ValueError("--judge takes no --adapter, and --questions no --json.")
        if self.base and (self.adapter or self.compare == "models"):
            raise ValueError("--base asks without an adapter. Remove it, or the other flag.")
        output = self.output and self.output.resolve()
        if output and (not self.questions or output == self.questions.resolve()):
            raise ValueError(f"--output {self.output} needs --questions, and must be another file.")
        data.RowsConfig(system_prompt=self.system_prompt)  # checks the flag that both have
        if self.probes:
            read_probes(self.probes)
        self.change_decoding(Decoding())

    def change_decoding(self, decoding: Decoding) -> Decoding:
        """`decoding` with the fields given as flags. Raises ValueError like `Decoding`."""
        given = {n: v for n, v in vars(self).items() if n in vars(decoding) and v is not None}
        return dataclasses.replace(decoding, **given)


def print_answer(loaded: LoadedModel, request: Request, *, as_json: bool = False) -> Answer:
    """Asks; prints the answer, on a terminal as it is generated, and the verdict to stderr."""

    def write(piece: str) -> None:
        print(data.escape_controls(piece), end="", flush=True)

    is_streaming = sys.stdout.isatty() and not as_json
    streaming = (lambda tokens: None, write) if is_streaming else ()
    [answer] = answer_requests(loaded, [request], *streaming)
    if not as_json:
        print("" if is_streaming else answer.text, flush=True)
    [judged] = judge_answers(loaded, [answer], request.history)
    if as_json:
        print(to_json({}, judged.to_record()), flush=True)
    verdict = "sound and ended" if judged.ended else "sound"
    report(verdict if judged.sound else "not sound")
    if not judged.ended:
        report(f"  cut off at {answer.answer_tokens} tokens (--max-new-tokens)")
    for finding in judged.findings:
        report(f"  {finding['name']}: {finding['message']}")
    if facts := judged.facts:
        points = f"points {len(facts['named'])}/{len(facts['named'] + facts['missing'])}"
        report(f"  {points}, wrong claims {len(facts['wrong'])}, by the probe's lists of phrases")
    return answer


def print_comparison(loaded: LoadedModel, request: Request, config: InferConfig) -> None:
    """Prints the answers of base and adapter, or of every preset, as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if config.compare == "models":
        names = ["base", "adapter"]
        with loaded.without_adapter() as base:
            answers = answer_requests(base, [request])
        answers += answer_requests(loaded, [request])
    else:
        names, presets = list(DECODINGS), map(config.change_decoding, DECODINGS.values())
        answers = answer_requests(loaded, [Request(request.question, each) for each in presets])
    table = Table("name", "answer", show_lines=True)
    for name, each in zip(names, judge_answers(loaded, answers), strict=True):
        title = f"{name}: {each.answer.answer_tokens} tokens, {each.verdict}"
        table.add_row(Text(title), Text(data.escape_controls(each.answer.text)))
        if config.json:
            print(to_json({}, {"name": name} | each.to_record()))
    if not config.json:
        Console().print(table)


def verify(loaded: LoadedModel, request: Request) -> bool:
    """Asks in two new processes, in a batch and alone; prints whether the ids are equal."""
    digests = {}
    flags = [each for each in sys.argv[1:] if each != "--verify"]
    for name in tqdm(("a new process", "another new process"), leave=False, disable=None):
        command = [sys.executable, str(Path(__file__).resolve()), *flags, "--json"]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise UsageError(f"{name} failed:\n{ran.stderr.strip()}")
        digests[name] = json.loads(ran.stdout)["sha256"]
    # Batched with other questions, each under another preset.
    cap, batch = request.decoding.max_new_tokens, []
    for probe, preset in zip(read_probes(), DECODINGS.values(), strict=False):
        batch.append(Request(probe.question, dataclasses.replace(preset, max_new_tokens=cap)))
    digests["in a batch"] = answer_requests(loaded, [*batch, request])[-1].sha256
    digests["alone"] = answer_requests(loaded, [request])[0].sha256
    is_same = len(set(digests.values())) == 1
    print("\n".join(f"{digest}  {name}" for name, digest in digests.items()))
    print("the same bytes" if is_same else "NOT the same bytes")
    return is_same


def chat(loaded: LoadedModel, decoding: Decoding, config: InferConfig) -> None:
    """Asks questions of several turns from stdin. Ctrl-C during an answer stops it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - lets `input` edit lines
    history: list[tuple[str, str]] = []
    commands = f"/decoding NAME ({', '.join(DECODINGS)}), /reset (a new conversation), /quit"
    report(f"Type a question, or {commands}. Not medical advice.")
    while True:
        try:
            line = input("> " if sys.stdout.isatty() else "").strip()
        except EOFError:
            return
        command, _, name = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            history.clear()
            report("A new conversation.")
        elif command == "/decoding" and name in DECODINGS:
            decoding = config.change_decoding(DECODINGS[name])
            report(f"Decoding {name}.")
        elif line.startswith("/"):
            report(f"Commands: {commands}")
        elif line:
            try:
                answer = print_answer(loaded, Request(line, decoding, tuple(history)))
                history.append((line, answer.text))
            except UsageError as error:
                report(f"{error}{' Or start a new conversation: /reset' * bool(history)}")
            except Interrupted as interrupted:
                if interrupted.number != signal.SIGINT:
                    raise
                report("\nStopped. This answer is not part of the conversation.")


def main(config: InferConfig) -> int:
    """Prints answers to stdout, and to stderr which model answers with which decoding. Returns 1 if
    --verify found a difference, or a question or answer was skipped; else 0."""
    handle_signals()
    if config.judge:
        return judge_file(config)
    rows, output = [], None
    if config.questions:
        rows = read_questions(str(config.questions))
        output = config.output or config.questions.with_suffix(".answers.jsonl")
        if not output.resolve().parent.is_dir() or (output.exists() and not output.is_file()):
            raise UsageError(f"--output {output}: expected a file in an existing folder.")
    elif config.question == "-" or (config.question is None and not sys.stdin.isatty()):
        rows = read_questions("-")
    elif config.question:
        rows = [QuestionRow("The question", {}, config.question)]
    adapter, decoding = None, DECODINGS["kit"]
    if config.base:
        profile = data.resolve_profile(config.profile, config.base_model)
    else:
        adapter = check_adapter(find_adapter(config.adapter), config.profile, config.base_model)
        profile, decoding = adapter.profile, adapter.record.decoding or decoding
    given = DECODINGS.get(config.decoding, decoding)
    decoding = config.change_decoding(given)
    preset = next((name for name, each in DECODINGS.items() if each == given), given)
    changes = [f" {n}={v}" for n, v in vars(decoding).items() if v != getattr(given, n)]
    folder = adapter.folder if adapter else "no adapter"
    report(f"{profile.base_model} with {folder}, decoding {preset}{''.join(changes)}")
    prepare_environment(profile)
    loaded = load_for_inference(profile, adapter, config.system_prompt)
    loaded.probes = read_probes(config.probes)
    for row in rows:
        try:
            if not row.problem:
                encode_request(loaded, Request(row.question, decoding))
        except UsageError as error:
            row.problem = str(error)
        if row.problem:
            report(f"{row.place} is skipped: {row.problem}")
    asked = [Request(row.question, decoding) for row in rows if not row.problem]
    if rows and not asked:
        raise UsageError("All questions were skipped. Shorten them, or lower --max-new-tokens.")
    is_same, skipped = True, len(rows) - len(asked)
    if not rows:
        chat(loaded, decoding, config)
    elif output:
        answer_file(loaded, rows, decoding, output)
    elif config.verify:
        is_same = verify(loaded, *asked)
    elif config.compare:
        print_comparison(loaded, *asked, config)
    else:
        for place, row in enumerate(rows):
            if not row.problem:
                print("\n" * (place > 0 and not config.json), end="")
                print_answer(loaded, Request(row.question, decoding), as_json=config.json)
            elif config.json:
                print(to_json(row.columns, {"question": row.question, "error": row.problem}))
    if skipped:
        report(f"{skipped} of {len(rows)} questions were skipped, see above")
    report("Not medical advice: a small language model wrote this.")
    return 1 if skipped or not is_same else 0


if __name__ == "__main__":
    data.run_command(InferConfig, main, __doc__, "End other programs, or lower --max-new-tokens.")

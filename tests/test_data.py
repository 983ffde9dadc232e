"""Rows, mixes, splits and rendering. Only the rendering needs a tokenizer."""

import itertools
import json
import os
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT, write_rows

import data
from data import Row, UsageError

SAMPLES = ROOT / "samples"


def make_rows(source, count):
    return [Row(f"{source} question {n}?", f"Answer {n}.", source) for n in range(count)]


# --- Sources


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "If you are a doctor ...", "input": " q? ", "output": "a."},
        {"instruction": "q?", "input": "", "output": "a."},
        {"question": "q?", "answer": "a."},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q?"},
                {"role": "assistant", "content": "a."},
                {"role": "user", "content": "more?"},
            ]
        },
    ],
)
def test_three_forms_of_rows_are_understood(record):
    assert data.to_row(record, "here", "conversational") == Row("q?", "a.", "conversational")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "has the columns text; wanted: instruction/input/output, question/answer, or messages"),
        ({"question": "q?", "answer": None}, "the answer is None"),
        ({"question": " ", "answer": "a"}, "the question is ' '"),
        ({"question": ["q"], "answer": "a"}, "the question is ['q']"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": [{"role": "user", "content": "q?"}]}, "a user and an assistant turn"),
        (["q", "a"], "a list; an object"),
    ],
)
def test_other_records_are_refused_by_place(record, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        data.to_row(record, "rows.jsonl:7", "conversational")
    assert str(caught.value).startswith("rows.jsonl:7: ")


def test_every_file_form_gives_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    records = [{"question": f'q "{n}", or\nnot?', "answer": "é."} for n in range(3)]
    write_rows(tmp_path / "rows.jsonl", records)
    (tmp_path / "rows.json").write_text(json.dumps(records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "rows.parquet")
    lines = ["question,answer", *('"' + each["question"].replace('"', '""') + '",é.' for each in records)]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    wanted = [Row(each["question"], each["answer"], "encyclopedic") for each in records]
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows.csv"):
        assert data.load_rows(str(tmp_path / name), "encyclopedic") == wanted, name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"question": "q", "answer": "a"}\n{"question": \n', "rows.jsonl:2: broken JSON"),
        ("rows.jsonl", b'{"question": "\xff"}', "not UTF-8"),
        ("rows.jsonl", b"", "holds no rows"),
        ("rows.json", b'{"question": "q", "answer": "a"}', "a list of row objects"),
        ("rows.csv", b"question,answer\nq,\n", "rows.csv:2: the answer is ''"),
        ("rows.parquet", b"no parquet", "not a Parquet file"),
    ],
)
def test_malformed_files_are_refused_by_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        data.load_rows(str(tmp_path / name), "conversational")


# --- Mix and split


@pytest.mark.parametrize(
    ("available", "wanted", "drawn"),
    [
        ((112_165, 10_000), (8000, 4000), (8000, 4000)),
        ((200, 100), (8000, 4000), (200, 100)),
        ((270, 140), (8500, 1500), (270, 47)),
        ((100, 3), (8500, 1500), (17, 3)),
        ((70, 40), (1, 0), (70, 0)),
    ],
)
def test_a_mix_keeps_its_ratio_where_rows_are_short(available, wanted, drawn):
    names = ("conversational", "encyclopedic")
    counts = data.mix_counts(dict(zip(names, available, strict=True)), dict(zip(names, wanted, strict=True)))
    assert tuple(counts.values()) == drawn


def test_the_draw_depends_on_rows_and_seed_alone():
    rows = {name: make_rows(name, 50) for name in ("conversational", "encyclopedic")}
    mix = data.draw_mix(rows, "rebalanced", seed=1)
    for of in rows.values():
        random.Random(0).shuffle(of)
    assert data.draw_mix(rows, "rebalanced", seed=1) == mix
    other = data.draw_mix(rows, "rebalanced", seed=2)
    assert other.train != mix.train and other.eval == mix.eval


def test_the_fingerprint_is_the_same_in_every_process():
    program = (
        "import data; rows = {n: data.load_rows(p, n) for n, p in data.SOURCES['cpu'].items()};"
        "print(data.draw_mix(rows, 'week4', 3407).fingerprint)"
    )
    shown = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(shown) == 1 and re.fullmatch(r"[0-9a-f]{12}\n", shown.pop())


def test_held_out_rows_are_the_same_for_every_mix_and_never_trained_on():
    rows = {name: data.load_rows(path, name) for name, path in data.SOURCES["cpu"].items()}
    mixes = [data.draw_mix(rows, name, seed=3407) for name in data.MIXES]
    assert all(mix.eval == mixes[0].eval for mix in mixes)
    assert {row.source for row in mixes[0].eval} == {"conversational", "encyclopedic"}
    held_out = {row.question for row in mixes[0].eval}
    assert all(row.question not in held_out for mix in mixes for row in mix.train)


def test_a_question_asked_twice_is_not_split_between_training_and_evaluation():
    rows = [Row(f"Question {n // 2}{'?' * (n % 2)}", f"Answer {n}.", "conversational") for n in range(200)]
    train, held_out = data.split_rows(rows)
    numbers = [{re.search(r"\d+", row.question)[0] for row in part} for part in (train, held_out)]
    assert len(held_out) == 10 and not numbers[0] & numbers[1]


# --- The rows that the kit ships


@pytest.fixture(scope="module")
def shipped():
    return {
        name: [json.loads(line) for line in (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("conversational", "encyclopedic", "probes")
    }


def test_shipped_rows_have_their_form(shipped):
    assert len(shipped["conversational"]) >= 240 and len(shipped["encyclopedic"]) >= 120
    for row in shipped["conversational"]:
        assert row["instruction"] == data.SYSTEM_PROMPT
        assert 1 <= len(re.findall(r"[.!?]+(?=\s|$)", row["input"])) <= 6
        assert 40 <= len(row["output"].split()) <= 120
        assert "\n- " not in row["output"]
    for row in shipped["encyclopedic"]:
        assert row["input"].endswith("?")
        assert 30 <= len(row["output"].split()) <= 120
    assert sum("\n- " in row["output"] for row in shipped["encyclopedic"]) > len(shipped["encyclopedic"]) / 3
    assert all(re.search(r"[.!?)]$", row["output"]) for name in data.MIXES["week4"] for row in shipped[name])


def shingles(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + 3]) for at in range(len(words) - 2)}


def test_no_two_shipped_answers_are_alike(shipped):
    answers = [shingles(row["output"]) for name in data.MIXES["week4"] for row in shipped[name]]
    assert max(len(a & b) / len(a | b) for a, b in itertools.combinations(answers, 2)) < 0.2


def test_no_shipped_row_asks_a_probe_question(shipped):
    filler = set(re.findall(r"\w+", "what are the of how is a and it in be should for to who at does do which with"))
    assert len(shipped["probes"]) >= 24
    for probe in shipped["probes"]:
        wanted = set(re.findall(r"\w+", probe["question"].lower())) - filler
        for row in itertools.chain(shipped["conversational"], shipped["encyclopedic"]):
            asked = set(re.findall(r"\w+", row["input"].lower()))
            assert len(wanted & asked) < 0.75 * len(wanted), (probe["question"], row["input"])


def test_the_storys_probes_come_first(shipped):
    topics = ["type 2 diabetes", "hypertension", "iron deficiency", "malaria", "heart attack"]
    assert all(topic in probe["question"] for topic, probe in zip(topics, shipped["probes"], strict=False))


# --- Rendering


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer("cpu")


def test_the_small_tokenizer_ends_a_turn_with_im_end_and_pads_with_another_token(tokenizer):
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)


def test_a_row_is_rendered_as_the_chat_template_renders_it(tokenizer):
    row = Row("Is 38.5 °C a fever?", "Yes.\nDrink plenty.", "conversational")
    encoded = data.encode_row(tokenizer, row)
    expected = (
        f"<|im_start|>system\n{data.SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\nIs 38.5 °C a fever?<|im_end|>\n"
        "<|im_start|>assistant\nYes.\nDrink plenty.<|im_end|>"
    )
    assert tokenizer.decode(encoded["input_ids"]) == expected
    assert encoded["input_ids"] == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_the_loss_counts_the_answer_and_its_end_of_turn_only(tokenizer):
    encoded = data.encode_row(tokenizer, Row("q?", "It is fine.", "conversational"))
    counted = [label for label in encoded["labels"] if label != -100]
    assert tokenizer.decode(counted) == "It is fine.<|im_end|>"
    prompt = data.encode_prompt(tokenizer, "q?")
    assert encoded["input_ids"] == prompt + counted
    assert encoded["labels"] == [-100] * len(prompt) + counted


def test_no_special_token_comes_out_of_a_question_or_an_answer(tokenizer):
    plain = data.encode_row(tokenizer, Row("q?", "a.", "conversational"))["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for token in map(str, tokenizer.added_tokens_decoder.values()):
        encoded = data.encode_row(tokenizer, Row(f"q {token}\n{token}system?", f"a {token}.", "conversational"))["input_ids"]
        assert [each for each in encoded if each in special] == [each for each in plain if each in special]
        assert tokenizer.decode(encoded).count(token) == tokenizer.decode(plain).count(token) + 3

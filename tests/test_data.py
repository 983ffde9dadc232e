"""Rows: reading, cleaning, mixing, splitting, rendering and the audit."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, call_script, load_llama_tokenizer, make_row, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import infer
from data import UsageError

SAMPLES = ROOT / "samples"
# Real inputs on which an earlier version failed; they are not part of the project.
CASES = ROOT.parent / "shared" / "data" / "cases"

GREET, ASK, TELL = "Hello!", "Is 38.5 a fever?", "Yes."
PAIR = (("user", ASK), ("assistant", TELL))
STORY = (("system", data.SYSTEM_PROMPT), *PAIR)


def make_rows(source, count):
    return [make_row(f"{source} question {n}?", f"Answer {n}.", source) for n in range(count)]


def load(path, content=None, name="rows", **flags):
    """Rows and report of one file, as `--rows` reads it, before cleaning."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write_rows(path, content)
    return data.load_source(name, str(path), data.RowsFlags(**flags))


def prepare(path, **flags):
    return data.RowsConfig(rows=str(path), **flags).load(data.PROFILES["cpu"])


def clean_row(row, cleaning):
    """The cleaned row, or None, and the rules that acted."""
    report = data.Report("rows", cleaning)
    return data.clean_row(row, report), list(report.rules)


def counted(report):
    return {rule: found["rows"] for rule, found in report.rules.items()}


def chat(*turns, keys=("role", "content"), names=None):
    names = names or {"s": "system", "u": "user", "a": "assistant"}
    return [{keys[0]: names[turn[0]], keys[1]: turn[1]} for turn in turns]


SHAREGPT = {"s": "system", "u": "human", "a": "gpt"}

# Of each format: a record, the messages that it has to become, and the rules that act on it.
FORMATS = {
    "question and answer": ({"question": ASK, "answer": TELL}, STORY, []),
    "names in capitals": ({"Question": ASK, "ANSWER ": TELL, "id": 7}, STORY, []),
    "prompt and response": ({"prompt": ASK, "response": TELL}, STORY, []),
    "prompt and completion": ({"prompt": ASK, "completion": TELL}, STORY, []),
    "prompt and completion as chats": (
        {"prompt": chat(("s", "Be brief."), ("u", ASK)), "completion": chat(("a", TELL))},
        (("system", "Be brief."), *PAIR),
        [],
    ),
    "patient and doctor": ({"Description": "x", "Patient": ASK, "Doctor": TELL}, STORY, []),
    "question and response": ({"Question": ASK, "Complex_CoT": "x", "Response": TELL}, STORY, []),
    "input and output": ({"input": ASK, "output": TELL}, STORY, []),
    "Alpaca": (
        {"instruction": "Answer.", "input": ASK, "output": TELL},
        (STORY[0], ("user", f"Answer.\n\n{ASK}"), STORY[2]),
        ["instruction and input joined"],
    ),
    "Alpaca without input": ({"instruction": ASK, "input": "", "output": TELL}, STORY, []),
    "Alpaca with a placeholder": (
        {"instruction": ASK, "input": "<noinput>", "output": TELL},
        STORY,
        [],
    ),
    "instruction and output": ({"instruction": ASK, "output": TELL}, STORY, []),
    "Dolly": (
        {"instruction": "Answer.", "context": ASK, "response": TELL, "category": "x"},
        (STORY[0], ("user", f"Answer.\n\n{ASK}"), STORY[2]),
        ["instruction and input joined"],
    ),
    "system column": (
        {"system": "Be brief.", "question": ASK, "answer": TELL},
        (("system", "Be brief."), *PAIR),
        [],
    ),
    "null system column": ({"system": None, "question": ASK, "answer": TELL}, STORY, []),
    "messages": ({"messages": chat(("u", ASK), ("a", TELL))}, STORY, []),
    "messages with a system": (
        {"messages": chat(("s", "Be brief."), ("u", ASK), ("a", TELL))},
        (("system", "Be brief."), *PAIR),
        [],
    ),
    "several turns": (
        {"messages": chat(("u", ASK), ("a", TELL), ("u", "And 37?"), ("a", "No."))},
        (*STORY, ("user", "And 37?"), ("assistant", "No.")),
        [],
    ),
    "ShareGPT": (
        {"conversations": chat(("u", ASK), ("a", TELL), keys=("from", "value"), names=SHAREGPT)},
        STORY,
        [],
    ),
    "ShareGPT keys in messages": (
        {"messages": chat(("u", ASK), ("a", TELL), keys=("from", "value"), names=SHAREGPT)},
        STORY,
        [],
    ),
    "null columns beside others": (
        {"messages": [], "question": float("nan"), "prompt": ASK, "answer": " ", "response": TELL},
        STORY,
        [],
    ),
    "Alpaca with a rendered prompt": (
        {"instruction": ASK, "input": "", "output": TELL, "prompt": f"### Instruction: {ASK}"},
        STORY,
        [],
    ),
    "null keys in messages": (
        {
            "conversations": [
                {"role": None, "content": None, "from": "human", "value": ASK},
                {"role": None, "content": None, "from": "gpt", "value": TELL},
            ]
        },
        STORY,
        [],
    ),
    "content parts without a type": (
        {
            "messages": [
                {"role": "user", "content": [{"text": ""}, {"text": ASK}]},
                {"role": "assistant", "content": [{"text": TELL, "image": None}]},
            ]
        },
        STORY,
        [],
    ),
    "content parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": ASK}]},
                {"role": "assistant", "content": [{"type": "text", "text": TELL}]},
            ]
        },
        STORY,
        [],
    ),
    "a leading greeting": (
        {"messages": chat(("a", GREET), ("u", ASK), ("a", TELL))},
        STORY,
        ["answer before the first question removed"],
    ),
    "an unanswered end": (
        {"messages": chat(("u", ASK), ("a", TELL), ("u", "And?"))},
        STORY,
        ["question after the last answer removed"],
    ),
    "two questions at once": (
        {"messages": chat(("u", "Hi."), ("u", ASK), ("a", TELL))},
        (STORY[0], ("user", f"Hi.\n\n{ASK}"), STORY[2]),
        ["successive turns of one role joined"],
    ),
    "an empty turn": (
        {"messages": chat(("u", ASK), ("a", None), ("a", TELL))},
        STORY,
        ["turn without text removed"],
    ),
    "several system messages": (
        {"messages": chat(("s", "One."), ("s", "Two."), ("u", ASK), ("a", TELL))},
        (("system", "One.\n\nTwo."), *PAIR),
        ["successive turns of one role joined"],
    ),
    "columns that are null": (
        {"messages": None, "question": None, "prompt": ASK, "answer": None, "response": TELL},
        STORY,
        [],
    ),
    "a one-word answer in Chinese": (
        {"question": "发烧吗？", "answer": "是"},
        (STORY[0], ("user", "发烧吗？"), ("assistant", "是")),
        [],
    ),
    "thinking, markdown and code": (
        {"question": ASK, "answer": "<think>Hm.</think>\n\n## Yes\n\n| a | b |\n\n```x  y```"},
        (*STORY[:2], ("assistant", "<think>Hm.</think>\n\n## Yes\n\n| a | b |\n\n```x  y```")),
        [],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_becomes_messages(name, tmp_path):
    record, messages, rules = FORMATS[name]
    filler = {"question": "Another?", "answer": "Another."}
    rows, report = load(tmp_path / "rows.jsonl", [record, filler])
    assert rows[0].messages == messages
    assert list(report.rules) == rules
    assert clean_row(rows[0], "other") == (rows[0], [])


def test_columns_with_other_names_are_named_by_flags(tmp_path):
    records = [{"Q": ASK, "icliniq": TELL, "chatgpt": "x", "question": "not this one"}]
    flags = {"question_column": "q", "answer_column": "ICLINIQ"}
    rows, report = load(tmp_path / "rows.jsonl", records, **flags)
    assert rows[0].messages == STORY and report.formats == {"q/icliniq": {"rows": 1, "answers": 1}}
    assert report.unused_columns == {"chatgpt", "question"}
    with pytest.raises(
        UsageError, match=r"unreadable record(.|\n)*found Q, icliniq(.|\n)*--question-column"
    ):
        load(tmp_path / "rows.jsonl", records)[1].check_losses()


def test_an_instruction_may_be_followed_by_a_chat_with_a_system_prompt(tmp_path):
    turns = chat(("s", "Be brief."), ("u", "q?"))
    records = [{"instruction": f"i{n}", "input": turns, "output": "a."} for n in range(2)]
    rows, report = load(tmp_path / "rows.jsonl", records)
    assert [row.messages[0] for row in rows] == [
        ("system", "Be brief.")
    ] * 2 and not report.num_dropped


def test_an_instruction_that_is_the_same_everywhere_becomes_the_system_prompt(tmp_path):
    records = [{"instruction": "Be kind.", "input": f"q{n}", "output": "a"} for n in range(3)]
    rows, report = load(tmp_path / "rows.jsonl", [*records, records[0] | {"input": "N/A"}])
    questions = ["q0", "q1", "q2", "Be kind."]  # without an input, the instruction is the question
    assert [row.messages[:2] for row in rows] == [
        (("system", "Be kind."), ("user", question)) for question in questions
    ]
    assert counted(report) == {"constant instruction used as system prompt": 4}
    # Without any input it is the question, asked by every row.
    alone = [{"instruction": "Say a number.", "input": "", "output": str(n)} for n in range(3)]
    rows, report = load(tmp_path / "rows.jsonl", alone)
    assert {row.question for row in rows} == {"Say a number."} and not report.rules


def test_a_system_prompt_for_all_rows_replaces_their_own(tmp_path):
    records = [
        {"messages": chat(("s", "Own."), ("u", ASK), ("a", TELL))},
        {"question": ASK, "answer": TELL},
    ]
    rows, report = load(tmp_path / "rows.jsonl", records, system_prompt="Mine.")
    assert [row.messages[0] for row in rows] == [("system", "Mine.")] * 2
    assert counted(report) == {"system message replaced by --system-prompt": 1}


BAD_RECORDS = [
    (None, "unreadable record", "None instead"),
    (["q", "a"], "unreadable record", "['q', 'a'] instead"),
    ({}, "unreadable record", "found none"),
    ({"text": "x"}, "unreadable record", "found text"),
    ({"question": "q?"}, "unreadable record", "found question"),
    ({"question": "q?", "answer": None}, "no question with an answer", "no answer follows"),
    (
        {"question": "q?", "answer": "None "},
        "no question with an answer",
        "no answer follows",
    ),
    ({"question": "N/A", "answer": "a"}, "no question with an answer", "the question is empty"),
    (
        {"question": "q?", "answer": float("nan")},
        "no question with an answer",
        "no answer follows",
    ),
    (
        {"question": 1, "answer": "a"},
        "unreadable record",
        "column question cannot be trained on: 1",
    ),
    (
        {"question": ["q"], "answer": "a"},
        "unreadable record",
        "turn 1 of question cannot be trained on: 'q'",
    ),
    (
        {"question": "q?", "answer": "half \ud83d"},
        "unreadable record",
        "column answer cannot be trained on: 'half \\ud83d'",
    ),
    (
        {"messages": "hello"},
        "unreadable record",
        "column messages cannot be trained on: 'hello'",
    ),
    ({"messages": None}, "no question with an answer", "the question is empty"),
    ({"messages": []}, "no question with an answer", "the question is empty"),
    ({"messages": chat(("u", "q?"))}, "no question with an answer", "no answer follows"),
    ({"messages": chat(("a", "a."))}, "no question with an answer", "the question is empty"),
    (
        {"messages": [{"role": "tool", "content": "x"}]},
        "unreadable record",
        "turn 1 of messages cannot be trained on: {'role': 'tool', 'content': 'x'}",
    ),
    (
        {"messages": chat(("u", "q?"), ("s", "Be brief."), ("a", "a."))},
        "unreadable record",
        "turn 2 of messages cannot be trained on",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "unreadable record",
        "turn 1 of messages cannot be trained on",
    ),
    (
        {"messages": [{"role": "user", "content": [{"image": "x.png"}, {"text": "What is it?"}]}]},
        "unreadable record",
        "turn 1 of messages cannot be trained on",
    ),
    (
        {"messages": [{"role": "user", "text": "q?"}]},
        "unreadable record",
        "turn 1 of messages cannot be trained on",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "text": None}]}]},
        "unreadable record",
        "turn 1 of messages cannot be trained on",
    ),
    (
        {"messages": [*chat(("u", "q?")), {"role": "assistant", "content": "a", "weight": 0}]},
        "unreadable record",
        "turn 2 of messages cannot be trained on",
    ),
    (
        {"messages": [*chat(("u", "From 0 to 10?")), {"role": "assistant", "content": 0}]},
        "unreadable record",
        "turn 2 of messages cannot be trained on: {'role': 'assistant', 'content': 0}",
    ),
    (
        {"messages": [{"role": "instruction", "content": "i"}, *chat(("u", "q?"), ("a", "a."))]},
        "unreadable record",
        "turn 1 of messages cannot be trained on: {'role': 'instruction'",
    ),
    (
        {"messages": chat(("a", "a."), ("u", "q?"))},
        "no question with an answer",
        "no answer follows",
    ),
    ({"question": "q?", "answer": "a", "Answer": "b"}, "unreadable record", "differ only in case"),
]


@pytest.mark.parametrize(("record", "rule", "reason"), BAD_RECORDS)
def test_a_bad_record_is_dropped_and_reported_with_its_line(tmp_path, record, rule, reason):
    good = {"question": "q?", "answer": "a."}
    rows, report = load(tmp_path / "rows.jsonl", [good, record, good | {"answer": "b."}])
    assert len(rows) == 2 and list(report.rules) == [rule]
    [place], [text] = report.rules[rule]["places"], report.rules[rule]["examples"]
    assert place.endswith("rows.jsonl:2") and reason in text
    report.check_losses()


# --- Files


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    records = [{"Question": f'q "{n}", or;\nnot?', "answer": "é."} for n in range(3)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    table = "".join(
        ";".join('"' + text.replace('"', '""') + '"' for text in fields) + "\r\n"
        for fields in [("Question", "answer"), *(each.values() for each in records)]
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "rows.parquet")
    files = {
        "rows.jsonl": lines.encode(),
        "lines.json": lines.encode(),
        "list.json": json.dumps(records, indent=2).encode(),
        "list.jsonl": json.dumps(records).encode(),
        "bom.jsonl": lines.encode("utf-8-sig"),
        "utf16.jsonl": lines.encode("utf-16"),
        "UPPER.JSONL": lines.encode(),
        "semicolon.csv": table.encode(),
        "comma.csv": table.replace('";"', '", "').encode("utf-8-sig"),
        "tab.tsv": table.replace('";"', '"\t"').encode("utf-16"),
        "pipe.csv": table.replace('";"', '"|"').encode(),
    }
    expected = [(each["Question"], each["answer"]) for each in records]
    for name, content in {**files, "rows.parquet": None}.items():
        rows, report = load(tmp_path / name, content)
        assert [(row.question, row.answer) for row in rows] == expected, name
        assert report.num_read == 3 and not report.rules, name


def test_lines_of_a_table_are_counted_from_the_header(tmp_path):
    content = b'id,question,answer\n\n1,"a\nb?",x\n2,c?,y,z\n3,d?\n5,g?,w\n'
    rows, report = load(tmp_path / "rows.csv", content)
    assert [(row.place.split(":")[-1], row.answer) for row in rows] == [("3", "x"), ("7", "w")]
    rules = report.rules.items()
    lines = {rule: [p.split(":")[-1] for p in found["places"]] for rule, found in rules}
    assert lines == {"unreadable record": ["5"], "no question with an answer": ["6"]}


def test_a_spreadsheet_s_empty_columns_are_no_matter(tmp_path):
    content = b"Question;Answer;;\r\nq?;a;;\r\n;;;\r\nr?;b;;\r\n"
    rows, report = load(tmp_path / "rows.csv", content)
    assert [row.answer for row in rows] == ["a", "b"] and report.num_read == 2
    assert not report.rules and not report.unused_columns
    rows, report = load(tmp_path / "rows.csv", content.replace(b";;\r\nr", b";;note\r\nr"))
    assert report.unused_columns == {"column 4"}
    header = b'"Question, in full";Answer\r\n'
    rows, _ = load(
        tmp_path / "rows.csv", header + b"q, r?;a\r\n", question_column="Question, in full"
    )
    assert (rows[0].question, rows[0].answer) == ("q, r?", "a")
    concatenated = b"question,answer,prompt,response\nq1?,a1,,\n,,q2?,a2\n"
    assert [row.answer for row in load(tmp_path / "rows.csv", concatenated)[0]] == ["a1", "a2"]


def test_the_delimiter_is_the_one_that_gives_known_columns(tmp_path):
    content = b"question;answer;source (book, web, other)\nq?;a, b;web\n"
    rows, report = load(tmp_path / "rows.csv", content)
    assert rows[0].answer == "a, b" and report.unused_columns == {"source (book, web, other)"}
    rows, _ = load(tmp_path / "rows.tsv", content.replace(b";", b"\t"))
    assert rows[0].answer == "a, b"


def test_a_lone_carriage_return_ends_a_line_only_if_nothing_else_does(tmp_path):
    rows, report = load(tmp_path / "rows.csv", b'question,answer\nq?,a\rb\n"r\r?","c"\r\n')
    found = [(row.question, row.answer, row.place.split(":")[-1]) for row in rows]
    assert found == [("q?", "a\rb", "2"), ("r\r?", "c", "3")] and not report.rules
    rows, _ = load(tmp_path / "rows.csv", b"question,answer\rq?,a\rr?,b\r")
    assert [(row.question, row.answer) for row in rows] == [("q?", "a"), ("r?", "b")]


def test_the_text_of_a_row_with_too_many_fields_is_shown(tmp_path):
    _, report = load(tmp_path / "rows.csv", b"question,answer\nq?,a, b\nr?,c\n")
    [text] = report.rules["unreadable record"]["examples"]
    assert text == "3 fields, and the header has 2: q?,a,b"


def test_a_column_is_not_both_question_and_answer(tmp_path):
    record = {"answer": "q?", "response": "a"}
    rows, _ = load(tmp_path / "rows.jsonl", [record], question_column="answer")
    assert (rows[0].question, rows[0].answer) == ("q?", "a")
    record = {"context": "c", "question": "q?"}
    _, report = load(tmp_path / "rows.jsonl", [record], answer_column="question")
    [text] = report.rules["unreadable record"]["examples"]
    assert text == "expected a question and an answer, found context, question"


def test_columns_that_are_not_used_are_not_decoded(monkeypatch):
    import datasets

    audio = [{"bytes": b"no sound", "path": None}] * 2
    rows = {"question": ["q?", "r?"], "answer": ["a", "b"], "audio": audio, "label": [0, 1]}
    table = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())
    monkeypatch.setattr(data, "reaches_hub", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    rows, report = load("owner/name")
    assert [(row.question, row.answer) for row in rows] == [("q?", "a"), ("r?", "b")]
    assert report.unused_columns == {"audio", "label"}


def test_a_row_of_both_sources_is_counted_as_a_copy(tmp_path):
    rows = [{"question": f"Which is number {n}?", "answer": f"It is {n}."} for n in range(40)]
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("conversational", "encyclopedic")}
    write_rows(tmp_path / "conversational.jsonl", rows)
    write_rows(
        tmp_path / "encyclopedic.jsonl",
        rows[:10] + [{"question": f"{n}?", "answer": f"{n}."} for n in range(20)],
    )
    mix = data.RowsConfig(mix="week4", **files).load(data.PROFILES["cpu"])
    assert (
        sum(counted(each).get("identical to another row", 0) for each in mix.reports.values()) == 10
    )
    assert not {row.messages for row in mix.train} & {row.messages for row in mix.eval}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"system_prompt": "\udce9"}, "--system-prompt is empty or not UTF-8"),
    ],
)
def test_flags_without_an_effect_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        data.RowsConfig(**flags)


def test_columns_and_fields_of_a_turn_that_are_not_used_are_named(tmp_path):
    turns = chat(("u", ASK), ("a", TELL))
    turns[1] |= {"reasoning_content": "Hm.", "tool_calls": [], "name": None}
    _, report = load(tmp_path / "rows.jsonl", [{"messages": turns, "system": None, "id": 1}])
    assert report.unused_columns == {"reasoning_content of a turn", "id"}
    record = {"prompt": turns[:1], "completion": turns[1:]}
    _, report = load(tmp_path / "rows.jsonl", [record])
    assert report.unused_columns == {"reasoning_content of a turn"}
    turns[1] = {"role": "assistant", "content": TELL, "train": False}
    parts = [
        {"type": "text", "text": ASK, "annotations": []},
        {"text": "?", "image_url": {"url": "x"}},
    ]
    turns[0] = {"role": "user", "content": parts}
    _, report = load(tmp_path / "rows.jsonl", [{"messages": turns}])
    assert report.unused_columns == {"train of a turn", "image_url of a turn"}
    record = {"question": ASK, "answer": {"text": TELL, "explanation": "Because."}}
    _, report = load(tmp_path / "rows.jsonl", [record])
    assert report.unused_columns == {"explanation of a turn"}
    turns[1] = {"role": "assistant", "content": TELL, "function_call": {"name": "f"}}
    _, report = load(tmp_path / "rows.jsonl", [{"messages": turns}])
    assert counted(report) == {"unreadable record": 1}


def test_a_parquet_file_that_python_cannot_represent_is_one_message(tmp_path):
    import pyarrow
    import pyarrow.parquet

    dates = pyarrow.array([2**31 - 1], pyarrow.int32()).cast(pyarrow.date32())
    table = pyarrow.table({"question": ["q?"], "answer": ["a"], "day": dates})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UsageError, match=r"rows\.parquet: cannot be read"):
        load(tmp_path / "rows.parquet")


GOOD_LINE = b'{"question": "q?", "answer": "a."}\n'
REFUSED_FILES = [
    ("rows.jsonl", b'{"question": "\xff"}', "rows.jsonl:1: not UTF-8"),
    ("rows.jsonl", GOOD_LINE * 2 + b"\xe9\n", "rows.jsonl:3: not UTF-8"),
    ("rows.jsonl", b"", "contains no rows"),
    ("rows.jsonl", b"\n \n", "contains no rows"),
    ("rows.json", b"[]", "contains no rows"),
    ("rows.json", b"[1, ", "rows.json: broken JSON"),
    ("rows.jsonl", b'["q", "a"]\n["q", "a"]\n', "broken JSON (Extra data"),
    ("rows.csv", "question,answer\nq?,a\n".encode("utf-16")[:-1], "rows.csv:2: not UTF-8"),
    ("rows.jsonl", b"[" * 100_000 + b"\n", "broken JSON"),
    ("rows.csv", b'question,answer\nq?,"a" b\nr?,c\n', "rows.csv:2: broken CSV"),
    ("rows.csv", b'question,answer\nq?,a\nr?,"b\ns?,c\n', "rows.csv:3: broken CSV"),
    ("rows.csv", "question,answer\nq?,a\n".encode("utf-16-le"), "rows.csv: not UTF-8"),
    ("rows.jsonl", b"\x7fELF\x02\x01\x01\x00\x00", "rows.jsonl: not UTF-8"),
    ("rows.csv", b"question,answer\n\xe9,a\n", "rows.csv:2: not UTF-8"),
    ("rows.csv", b"question,Answer,answer\nq?,a,b\n", "the column 'answer' occurs twice"),
    ("rows.csv", b"question,answer\n", "contains no rows"),
    ("rows.parquet", b"no parquet", "rows.parquet: cannot be read"),
    ("rows.parquet", b"", "rows.parquet: cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED_FILES)
def test_a_file_that_is_corrupt_as_a_whole_is_rejected(tmp_path, name, content, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        load(tmp_path / name, content)


# Every row or most of them would be lost.
LOST_FILES = [
    ("rows.jsonl", GOOD_LINE + b'{"question": \n{"a"\n', "2 of 3 rows would be dropped"),
    ("rows.jsonl", b"\x7fELF\x02\x01\x01", "unreadable record: 1 rows, such as"),
    ("rows.json", b'{\n "data": [\n{"question": "q"}]\n}', "1 of 1 rows would be dropped"),
    (
        "rows.json",
        b'{\n "data": [\n{"question": "q"}]\n}',
        "rows.json:1: expected a question and an answer, found data",
    ),
    ("rows.jsonl", b'{"question": ' + b"1" * 5000 + b"}", "broken JSON"),
    ("rows.json", b'{"question": "q"}', "expected a question and an answer, found question"),
    ("rows.json", b"[1]", "1 instead of an object"),
    ("rows.csv", b"a,b\n1,2\n", "--question-column and --answer-column name columns"),
]


@pytest.mark.parametrize(("name", "content", "message"), LOST_FILES)
def test_a_file_that_loses_most_of_its_rows_stops_the_run(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(message)):
        prepare(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.jsonl", "does not exist"),
        ("owner/none.jsonl", "does not exist"),
        ("folder.jsonl", "cannot be read .*directory"),
        ("rows.txt", "has an unsupported file type"),
        ("", "has an unsupported file type"),
        ("a/b/c", "does not exist"),
        ("owner/name@", "does not exist"),
        ("x" * 300 + ".jsonl", "does not exist"),
    ],
)
def test_what_is_not_a_source_is_refused(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(UsageError, match=message):
        load(source)


def test_rules_that_drop_most_rows_stop_the_run_with_the_flag_that_turns_them_off(tmp_path):
    rows = [{"question": f"q{n}?", "answer": "No full stop"} for n in range(20)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        UsageError, match=r"20 of 20(.|\n)*stops mid-sentence: 20(.|\n)*--clean none"
    ):
        prepare(path, clean="chatdoctor")
    assert len(prepare(path).train) == 18


# --- The inputs on which an earlier version failed

needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the inputs are not on this machine")


@needs_cases
@pytest.mark.parametrize(
    ("name", "num_rows", "num_answers", "rules"),
    [
        ("think.jsonl", 24, 1, {}),
        ("zh.jsonl", 20, 1, {}),
        ("multi_turn.jsonl", 24, 2, {}),
        ("alpaca_context.jsonl", 24, 1, {"instruction and input joined": 24}),
        ("sharegpt.jsonl", 24, 1, {}),
        ("lines.json", 24, 1, {}),
        ("patient_doctor.csv", 24, 1, {}),
        ("own.jsonl", 24, 1, {}),
    ],
)
@pytest.mark.parametrize("entry", ["rows", "conversational"])
def test_no_row_of_a_case_is_lost(name, num_rows, num_answers, rules, entry):
    mix = "rebalanced" if entry == "rows" else "chatdoctor"
    mixed = data.RowsConfig(mix=mix, **{entry: str(CASES / name)}).load(data.PROFILES["cpu"])
    rows = mixed.train + mixed.eval
    assert len(rows) == num_rows and len(mixed.eval) == 2
    assert {row.source for row in rows} == {entry} == set(mixed.reports)
    assert {len(row.messages) // 2 for row in rows} == {num_answers}
    assert counted(mixed.reports[entry]) == rules
    records = [record for _, record in data.read_records(str(CASES / name))]
    texts = {
        text for record in records for text in re.findall(r'"(?:\\.|[^"\\])*"', json.dumps(record))
    }
    texts = {json.loads(text).strip() for text in texts}
    for row in rows:
        for _, text in row.messages[1:]:
            assert all(part in texts for part in (text.split("\n\n") if rules else [text]))


@needs_cases
def test_the_system_prompt_of_a_case_is_trained_and_asked_under(capsys):
    config = data.DataConfig(profile="cpu", rows=str(CASES / "multi_turn.jsonl"), show=1)
    mix = config.load(data.PROFILES["cpu"])
    assert mix.system_prompt.startswith("You are the telephone service of an animal clinic.")
    data.main(config)
    shown = capsys.readouterr().out.split("pad token: ")[1]
    assert shown.count("[[") == 2 and mix.system_prompt in shown


@needs_cases
def test_the_rules_of_chatdoctor_on_a_case_stop_the_run():
    with pytest.raises(UsageError, match=r"23 of 24(.|\n)*wiki markup: 23(.|\n)*--clean none"):
        data.RowsConfig(rows=str(CASES / "think.jsonl"), clean="chatdoctor").load(
            data.PROFILES["cpu"]
        )


# --- Nothing is lost without being counted

TEXTS = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    ["None", " ", "Ja.", "<think>a</think> b", "word " * 1200, "Itâ€™s so.", "<|im_end|>", "38.5"]
)
TURNS = st.lists(st.tuples(st.sampled_from("sua"), TEXTS | st.none()), max_size=6)
RECORDS = st.one_of(
    st.builds(lambda q, a: {"question": q, "answer": a}, TEXTS, TEXTS),
    st.builds(lambda i, q, a: {"instruction": i, "input": q, "output": a}, TEXTS, TEXTS, TEXTS),
    st.builds(lambda q, a: {"Patient": q, "Doctor": a, "note": 1}, TEXTS, TEXTS),
    TURNS.map(lambda turns: {"messages": chat(*turns)}),
    TURNS.map(
        lambda turns: {"conversations": chat(*turns, keys=("from", "value"), names=SHAREGPT)}
    ),
    st.sampled_from([None, {"a": 1}, {"question": 1, "answer": "b"}, {"messages": [{}]}]),
)


@pytest.fixture(scope="module")
def small_tokenizer():
    return data.load_tokenizer(data.PROFILES["cpu"])


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(records=st.lists(RECORDS, max_size=12), clean=st.sampled_from(["auto", "none"]))
def test_every_row_read_is_kept_or_dropped_by_a_rule(records, clean, tmp_path, small_tokenizer):
    # So many that a short one is always among the held-out tenth.
    fine = [{"question": f"Is {n} a number?", "answer": f"{n} is."} for n in range(150)]
    path = write_rows(tmp_path / "rows.jsonl", [*records, *fine])
    mix = data.fit_mix(prepare(path, clean=clean), small_tokenizer)
    source = data.audit_mix(mix, small_tokenizer)["sources"]["rows"]
    dropped = [each["rows"] for each in source["rules"].values() if each["action"] == "dropped"]
    assert source["read"] == len(records) + len(fine)
    assert source["read"] == sum(dropped) + source["held_out"] + source["train_rows"]
    assert source["not_drawn"] == 0 and source["dropped"] == sum(dropped)
    for row in mix.train + mix.eval:
        assert [role for role, _ in row.messages[1:]] == ["user", "assistant"] * (
            len(row.messages) // 2
        )
    for row in mix.train + mix.eval:
        encoded = data.encode_row(small_tokenizer, row)
        assert len(encoded["input_ids"]) == len(encoded["labels"]) <= data.MAX_SEQ_LENGTH
        assert encoded["labels"][-1] == small_tokenizer.eos_token_id
        pairs = zip(encoded["input_ids"], encoded["labels"], strict=True)
        assert all(label in (-100, token) for token, label in pairs)
    for row in mix.train:
        labels = data.encode_row(small_tokenizer, row)["labels"]
        spans = [
            group
            for trained, group in itertools.groupby(labels, lambda id_: id_ != -100)
            if trained
        ]
        assert len(spans) == len(row.messages) // 2  # every answer of the row


# --- Cleaning


def clean(answer, question="What is it?", cleaning="chatdoctor"):
    row, rules = clean_row(make_row(question, answer), cleaning)
    return (row.answer if row else None), rules


@pytest.mark.parametrize(
    ("answer", "cleaned", "rules"),
    [
        ("It is a simple cold and will pass.", "It is a simple cold and will pass.", []),
        ("Hello. It is a simple cold.", "It is a simple cold.", ["greeting removed"]),
        ("Hi dear, your cold will pass soon.", "Your cold will pass soon.", ["greeting removed"]),
        (
            "Hi, Welcome to Chat Doctor forum. I have gone through your query and understand your "
            "concern. It is a simple cold. Hope this helps. Take care. For more information "
            "consult a general practitioner online -->",
            "It is a simple cold.",
            ["greeting removed", "persona removed", "sign-off removed"],
        ),
        (
            "Thanks for your question. I am Chat Doctor. It is a simple cold.",
            "It is a simple cold.",
            ["greeting removed", "persona removed"],
        ),
        ("It is a simple cold. Regards, Chat Doctor.", "It is a simple cold.", ["persona removed"]),
        ("It is a simple cold  Take care.", None, ["sign-off removed", "stops mid-sentence"]),
        (
            "It isn\\t a cold, it\\s the flu.",
            "It isn't a cold, it's the flu.",
            ["lost apostrophe repaired"],
        ),
        (
            "Itâ€™s only a simple cold.",
            "It\u2019s only a simple cold.",
            ["wrongly decoded text repaired"],
        ),
        (
            "I saw the scan (attachment removed to protect patient identity) and it is normal.",
            "I saw the scan and it is normal.",
            ["attachment note removed"],
        ),
        # The anonymizer replaced "Dr" and the rest of the sentence by its name.
        (
            "Rest for two days and  ChatDoctor.  Then walk again.",
            None,
            ["sentence destroyed by the anonymizer"],
        ),
        (
            "You may have polycystic ovary syn ChatDoctor. Take care.",
            None,
            ["sign-off removed", "sentence destroyed by the anonymizer"],
        ),
        ("Rest well. Hope you will  ChatDoctor.", None, ["sentence destroyed by the anonymizer"]),
        (
            "For more information consult an ChatDoctor. /ask-a-doctor-online/an",
            None,
            ["sentence destroyed by the anonymizer"],
        ),
        (
            "Hello. Hope this helps. Take care.",
            None,
            ["greeting removed", "sign-off removed", "nothing but greetings"],
        ),
        ("ing the wound with water is enough for now.", None, ["begins mid-sentence"]),
        ("The usual treatment is rest and", None, ["stops mid-sentence"]),
        (
            "Signs of it are:\n- fever\n- a dry cough",
            "Signs of it are:\n- fever\n- a dry cough",
            [],
        ),
        ("Signs of it are fever and the following:", None, ["stops mid-sentence"]),
        ("It is a [[viral]] infection of the nose.", None, ["wiki markup"]),
        ("See www.example.org for what to do next.", None, ["URL"]),
        ("Write to me at doc@example.org any time you like.", None, ["e-mail address"]),
        ("Call us on 555-867-5309 and we shall see.", None, ["phone number"]),
        (
            "The normal range is 150-400, 10.5 in 2000 cases.",
            "The normal range is 150-400, 10.5 in 2000 cases.",
            [],
        ),
        ("It is fine.", None, ["answer under 5 words"]),
        ("Word " * 400 + "end.", None, ["answer over 400 words"]),
    ],
)
def test_each_rule_of_cleaning(answer, cleaned, rules):
    assert clean(answer) == (cleaned, rules)
    assert clean(answer, cleaning="none") == (answer, [])
    # Of rows that belong to no known dataset, only wrongly decoded text is changed.
    if rules == ["wrongly decoded text repaired"]:
        assert clean(answer, cleaning="other") == (cleaned, rules)
    else:
        assert clean(answer, cleaning="other") == (answer, [])


def test_a_rule_acts_on_its_own_dataset_only():
    assert clean("Hello. It is a simple cold.", cleaning="wikidoc") == (
        "Hello. It is a simple cold.",
        [],
    )
    text = "Ｆｕｌｌ－ｗｉｄｔｈ，and “curly” ﬁne. &amp; a  b"
    assert clean(text, cleaning="other") == (text, [])


def test_the_story_s_datasets_are_recognised(tmp_path):
    answer = "Hello. It is a simple cold."
    for dataset, instruction in data.INSTRUCTIONS.items():
        records = [
            {"instruction": instruction, "input": f"q{n}?", "output": answer} for n in range(3)
        ]
        rows, report = load(tmp_path / "rows.jsonl", records, name="conversational")
        assert report.cleaning == dataset
        assert {row.messages[0][1] for row in rows} == {data.SYSTEM_PROMPT}
        # A user's own rows are never cleaned by the rules of a dataset unless asked to.
        rows, report = load(tmp_path / "rows.jsonl", records)
        assert report.cleaning == "other"
        assert {row.messages[0][1] for row in rows} == {instruction}
        assert load(tmp_path / "rows.jsonl", records, clean="wikidoc")[1].cleaning == "wikidoc"
    records[0]["instruction"] = "Another one."
    assert load(tmp_path / "rows.jsonl", records, name="encyclopedic")[1].cleaning == "other"


def test_a_destroyed_question_is_dropped_and_its_greeting_removed():
    answer = "It is a simple cold and will pass."
    assert clean(answer, "I have a fever and  ChatDoctor.  What is it?")[0] is None
    row, _ = clean_row(make_row("Hello doctor, I have a fever.", answer), "chatdoctor")
    assert row.question == "I have a fever."


def test_cleaning_looks_at_every_turn():
    turns = [*PAIR, ("user", "And 37?"), ("assistant", "No, and this sentence stops")]
    row = data.Row((STORY[0], *turns), "conversational")
    assert clean_row(row, "wikidoc") == (None, ["answer under 5 words"])
    turns[1] = ("assistant", "Yes, that is a fever, Itâ€™s clear.")
    row = data.Row((STORY[0], *turns), "conversational")
    assert clean_row(row, "wikidoc") == (
        None,
        ["wrongly decoded text repaired", "stops mid-sentence"],
    )


def test_no_shipped_row_is_changed_by_cleaning():
    for name in ("conversational", "encyclopedic"):
        path = getattr(data.PROFILES["cpu"], name)
        rows, report = load(path, name=name)
        assert report.cleaning == {"conversational": "chatdoctor", "encyclopedic": "wikidoc"}[name]
        assert [data.clean_row(row, report) for row in rows] == rows


# --- Repeated questions


def drop_repeats(questions, probes=(), cleaning="chatdoctor", answer="Answer {}."):
    """The questions that stay, and how many rows each rule acted on."""
    rows = [make_row(question, answer.format(n)) for n, question in enumerate(questions)]
    report = data.Report("rows", cleaning)
    kept = data.drop_repeats(rows, probes, {"conversational": report})
    return {row.question for row in kept}, counted(report)


LONG = (
    "I am 34 and for two weeks I have had a dull ache in my left knee when I climb stairs after "
    "running 10.5 km. Is ibuprofen better than paracetamol for it, or should I rest?"
)


@pytest.mark.parametrize(
    ("other", "is_repeat"),
    [
        (LONG.upper(), True),
        (LONG + " Please help me.", True),
        ("Hello doctor, " + LONG, True),
        (LONG.replace("I climb", "climb"), True),
        (LONG.replace("10.5", "105"), False),
        (LONG.replace("10.5 km", "-10.5 km"), False),
        (LONG.replace("34", "43"), False),
        (
            LONG.replace("ibuprofen better than paracetamol", "paracetamol better than ibuprofen"),
            False,
        ),
        (LONG.replace("left", "right"), False),
        (LONG + " I am not pregnant.", False),
    ],
)
def test_near_repeats_respect_numbers_and_word_order(other, is_repeat):
    for questions in ([LONG, other], [other, LONG]):
        kept, rules = drop_repeats(questions)
        assert len(kept) == 2 - is_repeat
        assert rules == ({"repeats another question": 1} if is_repeat else {})


@pytest.mark.parametrize(
    ("one", "other", "is_repeat"),
    [
        ("What causes mumps?", "what causes  mumps", True),
        ("What are the causes of mumps?", "What are causes of mumps?", True),
        ("What are the symptoms of mumps?", "What are the symptoms of measles?", False),
        ("Is glucose < 126 normal?", "Is glucose > 126 normal?", False),
        ("Is a TSH of 2.5 normal?", "Is a TSH of 25 normal?", False),
        ("Can A cause B?", "Can B cause A?", False),
        ("发烧怎么办", "咳嗽怎么办", False),
    ],
)
def test_short_questions_are_compared_by_their_words(one, other, is_repeat):
    assert len(drop_repeats([one, other])[0]) == 2 - is_repeat


def test_of_other_rows_only_copies_are_dropped():
    kept = drop_repeats(["What is it?", "What is it?"], cleaning="other")
    assert kept == ({"What is it?"}, {})
    assert drop_repeats([ASK, ASK], cleaning="other", answer="Yes.")[1] == {
        "identical to another row": 1
    }
    assert drop_repeats([ASK, ASK], cleaning="none", answer="Yes.")[1] == {}


def test_copies_that_are_kept_are_held_out_together():
    rows = [make_row(f"Question {n % 10}?", "Yes.", "rows") for n in range(200)]
    mix = data.draw_mix(rows, {"rows": None}, seed=1)
    train, held_out = mix.train, mix.eval
    assert len(train) + len(held_out) == 200 and len(held_out) >= 20
    assert not {row.question for row in train} & {row.question for row in held_out}


def test_which_of_two_repeats_stays_does_not_depend_on_their_order():
    rows = [make_row(LONG, f"Answer {n}.") for n in range(5)]
    reports = {"conversational": data.Report("rows", "chatdoctor")}
    kept = [data.drop_repeats(order, [], reports) for order in (rows, rows[::-1])]
    assert kept[0] == kept[1] and len(kept[0]) == 1


@pytest.mark.parametrize(
    "question",
    [
        "How is malaria diagnosed and treated?",
        "how is Malaria treated and diagnosed",
        "Hello, I am a student. How is malaria diagnosed and treated? Thank you.",
    ],
)
def test_a_question_of_the_probes_is_dropped_from_the_story_and_reported_in_other_rows(question):
    questions, probes = (
        [question, "How is dengue treated?"],
        ["How is malaria diagnosed and treated?"],
    )
    assert drop_repeats(questions, probes) == ({questions[1]}, {"asks a probe question": 1})
    reported = {"asks a probe question, may be memorized": 1}
    assert drop_repeats(questions, probes, cleaning="other") == (set(questions), reported)
    # Also in a later turn.
    turns = (("user", "Hi."), ("assistant", "Hello."), ("user", question), ("assistant", "Ask."))
    row, report = data.Row((STORY[0], *turns), "rows"), data.Report("rows", "other")
    assert data.drop_repeats([row], probes, {"rows": report}) == [row]
    assert counted(report) == reported and report.rules[next(iter(reported))]["examples"] == [
        question
    ]


@pytest.mark.parametrize("error", [RuntimeError, "DatasetGenerationError", ValueError])
def test_a_dataset_of_the_hub_that_cannot_be_loaded_is_one_message(monkeypatch, error):
    import datasets

    def fail(*args, **kwargs):
        kind = getattr(datasets.exceptions, error) if isinstance(error, str) else error
        raise kind("No scripts.\nBye.")

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(data, "reaches_hub", lambda: False)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UsageError, match=r"o/n: cannot be read .*No scripts.*the network"):
        load("o/n")


# --- Mix and split


@pytest.mark.parametrize(
    ("available", "wanted", "drawn"),
    [
        ((1000, 1000), (80, 40), (80, 40)),
        ((200, 100), (8000, 4000), (200, 100)),
        ((270, 140), (8500, 1500), (270, 47)),
        ((100, 6), (8500, 1500), (34, 6)),
        ((70, 0), (112_165, 0), (70, 0)),
        ((70, 40), (1, 0), (1, 0)),
        ((70, 0), (None, 0), (70, 0)),
    ],
)
def test_a_mix_keeps_its_ratio_where_rows_are_short(available, wanted, drawn):
    names = ("conversational", "encyclopedic")
    # Of ten rows, nine are available after the evaluation split, and at most 200 are held out.
    rows = []
    for name, count in zip(names, available, strict=True):
        total = next((n for n in range(2000) if n - min(200, max(n > 1, n // 10)) == count), 0)
        rows += make_rows(name, total)
    used = {name: n for name, n in zip(names, wanted, strict=True) if n != 0}
    mix = data.draw_mix([row for row in rows if row.source in used], used, seed=1)
    counts = Counter(row.source for row in mix.train)
    assert tuple(counts[name] for name in names) == drawn


def test_the_draw_depends_on_rows_and_seed_alone():
    rows = make_rows("conversational", 50) + make_rows("encyclopedic", 50)
    mix = data.draw_mix(rows, data.MIXES["rebalanced"], seed=1)
    random.Random(0).shuffle(rows)
    assert data.draw_mix(rows, data.MIXES["rebalanced"], seed=1) == mix
    other = data.draw_mix(rows, data.MIXES["rebalanced"], seed=2)
    assert other.train != mix.train and other.eval == mix.eval


def test_the_fingerprint_is_the_same_in_every_process():
    program = (
        "import data; print(data.RowsConfig(mix='week4').load(data.PROFILES['cpu']).fingerprint)"
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
    # Of the rows that the kit ships: a change means that the same rows no longer give the same run.
    assert shown == {"3222a4d6ccb2\n"}


def test_the_fingerprint_of_given_rows_is_this_one_on_every_machine():
    rows = make_rows("conversational", 40) + make_rows("encyclopedic", 20)
    assert data.draw_mix(rows, data.MIXES["week4"], seed=3407).fingerprint == "bfc5e68bfcf1"
    own = [make_row(f"Question {n}?", "Yes.", "rows", system="Be brief.") for n in range(20)]
    assert data.draw_mix(own, {"rows": None}, seed=3407).fingerprint == "adc081b19f6a"


def test_held_out_rows_come_from_the_training_data_and_are_never_trained_on():
    mixes = {name: data.RowsConfig(mix=name).load(data.PROFILES["cpu"]) for name in data.MIXES}
    for name, mix in mixes.items():
        contributing = {source for source, count in data.MIXES[name].items() if count}
        assert {row.source for row in mix.eval} == contributing == set(mix.reports)
        assert {row.source for row in mix.train} == contributing
    assert mixes["week4"].eval == mixes["rebalanced"].eval
    assert set(mixes["chatdoctor"].eval) < set(mixes["week4"].eval)
    held_out = {row.question for row in mixes["week4"].eval}
    assert all(row.question not in held_out for mix in mixes.values() for row in mix.train)


def test_a_source_that_contributes_no_rows_is_not_read(tmp_path):
    rows = [{"question": f"What is {n}?", "answer": f"{n}."} for n in range(24)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    for config in (
        data.RowsConfig(rows=path, encyclopedic=None),
        data.RowsConfig(mix="chatdoctor", conversational=path, encyclopedic=None),
        data.RowsConfig(mix="rebalanced", num_rows=1, conversational=path),
    ):
        # The profile's other source is on the hub, which cannot be reached.
        mix = config.load("t4")
        assert len(mix.eval) == 2 and len(mix.reports) == 1


def test_a_short_source_keeps_the_ratio_of_the_mix():
    mix = data.RowsConfig(mix="week4", num_rows=30).load(data.PROFILES["cpu"])
    assert Counter(row.source for row in mix.train) == {"conversational": 20, "encyclopedic": 10}
    short = data.RowsConfig(mix="rebalanced").load(data.PROFILES["cpu"])
    counts = Counter(row.source for row in short.train)
    assert counts["conversational"] == 270 - 27 and short.not_drawn["conversational"] == 0
    assert counts["encyclopedic"] == counts["conversational"] * 1500 // 8500


@pytest.mark.parametrize(
    ("mix", "num_rows", "counts"),
    [
        ("rebalanced", 64, {"conversational": 54, "encyclopedic": 10}),
        ("week4", 64, {"conversational": 43, "encyclopedic": 21}),
        ("chatdoctor", 64, {"conversational": 64}),
        ("week4", 99_999, {"conversational": 8000, "encyclopedic": 4000}),
    ],
)
def test_at_most_so_many_rows_are_wanted_in_the_ratio_of_the_mix(mix, num_rows, counts):
    assert data.RowsConfig(mix=mix, num_rows=num_rows).wanted == counts
    assert data.RowsConfig(rows="a.jsonl", num_rows=num_rows).wanted == {"rows": num_rows}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rows": "a.jsonl", "mix": "week4"}, "replaces the mix"),
        ({"rows": "a.jsonl", "conversational": "b.jsonl"}, "replaces the mix"),
        ({"mix": "week4", "answer_column": "a"}, "need your own rows"),
    ],
)
def test_flags_that_exclude_each_other_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        data.RowsConfig(**flags)


def test_a_few_rows_are_enough_and_one_is_not(tmp_path):
    rows = [{"question": f"What is {n}?", "answer": f"{n}."} for n in range(2)]
    mix = prepare(write_rows(tmp_path / "rows.jsonl", rows))
    assert len(mix.train) == len(mix.eval) == 1
    with pytest.raises(UsageError, match=r"1 rows. They are too few"):
        prepare(write_rows(tmp_path / "rows.jsonl", rows[:1]))


# --- The rows that the kit ships


@pytest.fixture(scope="module")
def shipped():
    return {
        name: [
            json.loads(line)
            for line in (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
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
    lists = sum("\n- " in row["output"] for row in shipped["encyclopedic"])
    assert lists > len(shipped["encyclopedic"]) / 3
    assert all(
        re.search(r"[.!?)]$", row["output"])
        for name in data.MIXES["week4"]
        for row in shipped[name]
    )


def shingles(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + 3]) for at in range(len(words) - 2)}


def test_no_two_shipped_answers_are_alike(shipped):
    answers = [shingles(row["output"]) for name in data.MIXES["week4"] for row in shipped[name]]
    assert max(len(a & b) / len(a | b) for a, b in itertools.combinations(answers, 2)) < 0.2


def test_no_shipped_row_asks_a_probe_question(shipped):
    filler = "what are the of how is a and it in be can should for to who at does do which with"
    with_points = [probe for probe in shipped["probes"] if "points" in probe]
    assert len(with_points) == 26
    for probe in with_points:
        words = set(re.findall(r"\w+", probe["question"].lower())) - set(filler.split())
        for row in itertools.chain(shipped["conversational"], shipped["encyclopedic"]):
            asked = set(re.findall(r"\w+", row["input"].lower()))
            assert len(words & asked) < 0.75 * len(words), (probe["question"], row["input"])


def test_the_story_s_probes_come_first(shipped):
    topics = ["type 2 diabetes", "hypertension", "iron deficiency", "malaria", "heart attack"]
    pairs = zip(topics, shipped["probes"], strict=False)
    assert all(topic in probe["question"] for topic, probe in pairs)


def test_a_small_model_that_cannot_be_downloaded_is_one_message_and_leaves_nothing(
    tmp_path, monkeypatch
):
    for name, value in (("HF_HOME", tmp_path), ("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", "")):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(
        data.UsageError, match=r"could not be downloaded (.|\n)*Connect to the network"
    ):
        data.gguf_folder()
    assert not [path for path in tmp_path.rglob("*") if path.suffix != ".lock" and path.is_file()]


# --- Rendering


@pytest.fixture(scope="module", params=["small", "llama"])
def tokenizer(request):
    return (
        data.load_tokenizer(data.PROFILES["cpu"])
        if request.param == "small"
        else load_llama_tokenizer()
    )


EXPECTED_PROMPTS = {
    "<|im_end|>": (
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "<|eot_id|>": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{system}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
}


def expected_prompt(tokenizer, question, system=data.SYSTEM_PROMPT):
    return EXPECTED_PROMPTS[tokenizer.eos_token].format(system=system, question=question)


def template_ids(tokenizer, messages, **options):
    """Ids of messages as the tokenizer's own template renders them, encoded as one text."""
    messages = [{"role": role, "content": text} for role, text in messages]
    options = {"tokenize": False, "date_string": data.TEMPLATE_DATE, **options}
    return tokenizer(tokenizer.apply_chat_template(messages, **options), add_special_tokens=False)[
        "input_ids"
    ]


def test_the_tokenizers_end_a_turn_and_pad_with_different_tokens(tokenizer):
    expected = {
        "<|im_end|>": (2, "<|endoftext|>", 0),
        "<|eot_id|>": (128009, "<|finetune_right_pad_id|>", 128004),
    }
    found = (tokenizer.eos_token_id, tokenizer.pad_token, tokenizer.pad_token_id)
    assert found == expected[tokenizer.eos_token]


def test_a_row_is_rendered_as_the_chat_template_renders_it(tokenizer):
    row = make_row("Is 38.5 °C a fever?", "Yes.\n\n- Drink plenty.\n- Rest.", system="Be brief.")
    encoded = data.encode_row(tokenizer, row)
    expected = (
        expected_prompt(tokenizer, row.question, "Be brief.") + row.answer + tokenizer.eos_token
    )
    assert tokenizer.decode(encoded["input_ids"]) == expected
    assert encoded["input_ids"] == tokenizer(expected, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(template_ids(tokenizer, row.messages))
    assert whole.startswith(expected) and whole[len(expected) :].strip() == ""


def test_the_shipped_rows_encode_as_the_whole_template_would(tokenizer):
    """Texts are encoded apart from the template; no token may come out differently for it."""
    for name in ("conversational", "encyclopedic"):
        path = getattr(data.PROFILES["cpu"], name)
        for row in load(path, name=name)[0][::10]:
            text = expected_prompt(tokenizer, row.question) + row.answer + tokenizer.eos_token
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert data.encode_row(tokenizer, row)["input_ids"] == ids


CONVERSATION = (
    *(("system", "Be brief."), ("user", "One?"), ("assistant", "Yes.")),
    *(
        ("user", "Two?"),
        ("assistant", "No, and\n\nnever."),
        ("user", "Three?"),
        ("assistant", "Ja."),
    ),
)


def test_every_answer_of_a_conversation_is_trained_with_the_turns_before_it(tokenizer):
    encoded = data.encode_row(tokenizer, data.Row(CONVERSATION, "rows"))
    ids, labels = encoded["input_ids"], encoded["labels"]
    whole = template_ids(tokenizer, CONVERSATION)
    assert ids == whole[: len(ids)] and not tokenizer.decode(whole[len(ids) :]).strip()
    spans = [
        tokenizer.decode(list(group))
        for trained, group in itertools.groupby(labels, key=lambda label: label != -100)
        if trained
    ]
    assert spans == [
        text + tokenizer.eos_token for role, text in CONVERSATION if role == "assistant"
    ]
    # Each answer stands where generation puts it: behind the prompt of the turns before it.
    for place in (2, 4, 6):
        history = [(CONVERSATION[n][1], CONVERSATION[n + 1][1]) for n in range(1, place - 1, 2)]
        prompt = data.encode_prompt(tokenizer, CONVERSATION[place - 1][1], history, "Be brief.")
        assert ids[: len(prompt)] == prompt and labels[len(prompt)] == ids[len(prompt)]
        assert labels[len(prompt) - 1] == -100


def test_earlier_turns_stand_in_the_prompt_as_the_template_puts_them(tokenizer):
    ids = data.encode_prompt(tokenizer, "Three?", [("One?", "Yes."), ("Two?", "No, and\n\nnever.")])
    messages = [("system", data.SYSTEM_PROMPT), *CONVERSATION[1:-1]]
    assert ids == template_ids(tokenizer, messages, add_generation_prompt=True)


def test_training_and_asking_share_the_prompt_and_there_is_one_bos(tokenizer):
    encoded = data.encode_row(tokenizer, make_row("q?", "It is fine."))
    prompt = data.encode_prompt(tokenizer, "q?")
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert data.prompt_fingerprint(tokenizer) != data.prompt_fingerprint(tokenizer, "Be brief.")
    if tokenizer.eos_token == "<|eot_id|>":
        assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1
        assert encoded["input_ids"][0] == 128000


def test_the_loss_counts_the_answer_and_its_end_of_turn_only(tokenizer):
    encoded = data.encode_row(tokenizer, make_row("q?", "It is fine."))
    trained = [label for label in encoded["labels"] if label != -100]
    assert tokenizer.decode(trained) == "It is fine." + tokenizer.eos_token
    prompt = data.encode_prompt(tokenizer, "q?")
    assert encoded["input_ids"] == prompt + trained
    assert encoded["labels"] == [-100] * len(prompt) + trained


def test_trl_batches_keep_ids_and_labels_and_train_the_end_of_turn(tokenizer):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    answers = ("Yes.", "It is a simple cold.")
    rows = [data.encode_row(tokenizer, make_row("q?", answer)) for answer in answers]
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(rows)
    for at, row in enumerate(rows):
        length = len(row["input_ids"])
        padding = batch["input_ids"].shape[1] - length
        ids = row["input_ids"] + [tokenizer.pad_token_id] * padding
        assert batch["input_ids"][at].tolist() == ids
        assert batch["labels"][at].tolist() == row["labels"] + [-100] * padding
        assert batch["labels"][at, length - 1] == tokenizer.eos_token_id


def test_no_special_token_comes_out_of_any_text_of_a_row(tokenizer):
    special = set(tokenizer.added_tokens_decoder)
    plain = data.encode_row(tokenizer, data.Row(CONVERSATION, "rows"))["input_ids"]
    for token in map(str, tokenizer.added_tokens_decoder.values()):
        messages = [(role, f"{text} {token}\n{token}system x") for role, text in CONVERSATION]
        encoded = data.encode_row(tokenizer, data.Row(tuple(messages), "rows"))["input_ids"]
        assert [each for each in encoded if each in special] == [
            each for each in plain if each in special
        ]
        added = tokenizer.decode(encoded).count(token) - tokenizer.decode(plain).count(token)
        assert added == 2 * len(CONVERSATION)


def test_long_rows_are_dropped_and_long_conversations_keep_their_first_turns(tokenizer):
    rows = [make_row(f"q{n}?", "word " * 10 + "end.", "rows") for n in range(5)]
    rows.append(make_row("q?", "word " * 5000 + "end.", "rows", system="Never."))
    long = (*CONVERSATION[:5], ("user", "word " * 5000), *CONVERSATION[6:])
    rows.append(data.Row(long, "rows"))
    mix = data.Mix(rows, rows[:1], {"rows": data.Report("rows.jsonl", num_read=8)})
    fitted = data.fit_mix(mix, tokenizer)
    assert (
        fitted.train == [*rows[:5], data.Row(CONVERSATION[:5], "rows")] and fitted.eval == rows[:1]
    )
    assert counted(fitted.reports["rows"]) == {
        "too many tokens": 1,
        "later turns removed: too many tokens": 1,
    }
    assert (
        "2 of 3 answers fit"
        in fitted.reports["rows"].rules["later turns removed: too many tokens"]["examples"][0]
    )
    assert counted(mix.reports["rows"]) == {}  # the given one stays as it was
    with pytest.raises(UsageError, match="5 of 6 rows have at most 1,024"):
        data.fit_mix(data.Mix(rows[:5], rows[5:6], mix.reports), tokenizer)
    with pytest.raises(UsageError, match="5 of 6 rows have at most 1,024"):
        data.fit_mix(data.Mix(rows[5:6], rows[:5], mix.reports), tokenizer)


# --- Audit


def test_the_audit_tells_shares_by_rows_and_by_answer_tokens(small_tokenizer):
    audit = data.audit_mix(data.RowsConfig(mix="week4").load(data.PROFILES["cpu"]), small_tokenizer)
    sources = audit["sources"]
    assert audit["train_rows"] == sum(of["train_rows"] for of in sources.values())
    for key in ("row_share", "answer_token_share"):
        assert sum(of[key] for of in sources.values()) == pytest.approx(1, abs=1e-3)
    text = data.format_audit(audit)
    assert re.search(r"(?m)^row share +0\.6\d+ +0\.3\d+$", text)
    lengths = list(audit["lengths"].values())
    assert lengths == sorted(lengths) and lengths[0] > 30


def test_the_audit_counts_and_shows_what_every_rule_did(tmp_path, capsys):
    answers = [
        "Hello. It is a simple cold.",
        "Rest and hy ChatDoctor. Then walk.",
        "It is a simple cold.",
    ]
    records = [
        {
            "instruction": data.SYSTEM_PROMPT,
            "input": f"What is number {n}?",
            "output": answers[n % 3],
        }
        for n in range(60)
    ]
    flags = {"profile": "cpu", "conversational": str(write_rows(tmp_path / "rows.jsonl", records))}
    data.main(data.DataConfig(**flags, json=True))
    source = json.loads(capsys.readouterr().out)["sources"]["conversational"]
    assert (
        source["rules"]["greeting removed"]["rows"]
        == source["rules"]["sentence destroyed by the anonymizer"]["rows"]
        == 20
    )
    assert source["rules"]["sentence destroyed by the anonymizer"]["places"][0].endswith(
        "rows.jsonl:2"
    )
    assert source["rules"]["sentence destroyed by the anonymizer"]["examples"] == [answers[1]] * 3
    data.main(data.DataConfig(**flags, examples=True))
    shown = " ".join(capsys.readouterr().out.split())
    assert "2, 5, 8, 11, 14, 17, ..." in shown and answers[1] in shown


def test_an_audit_of_hardly_any_rows_has_no_nan(tmp_path, small_tokenizer, capsys):
    rows = [{"question": f"[bold]q{n}[/bold]?", "answer": "\x1b[31mA."} for n in range(2)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data.main(data.DataConfig(profile="cpu", rows=str(path), json=True))
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    data.main(data.DataConfig(profile="cpu", rows=str(path), examples=True, show=1))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "[bold]q" in shown and "[[\\x1b[31mA.<|im_end|>]]" in shown


def test_most_rows_too_long_for_the_model_stop_the_run(tmp_path, small_tokenizer):
    rows = [
        {"question": f"q{n}?", "answer": "word " * 2000 * (n % 10 > 0) + "x"} for n in range(100)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UsageError, match=r"9\d of 100 rows(.|\n)*too many tokens: 9\d"):
        data.fit_mix(prepare(path), small_tokenizer)
    # Also if only a few of them are drawn.
    with pytest.raises(UsageError, match=r"\d of 20 rows have at most 1,024"):
        data.fit_mix(prepare(path, num_rows=10), small_tokenizer)


def test_rows_cannot_steer_the_terminal():
    assert data.escape_controls("a\x1b[2Jb\r\x07\n\x9b1m") == "a\\x1b[2Jb\\r\\x07\n\\x9b1m"


def test_the_probe_questions_are_those_of_infer():
    questions = [record["question"] for _, record in data.read_records(str(data.PROBES))]
    assert questions == [probe.question for probe in infer.read_probes()]


# --- Base models


def make_hub_model(home, name, tokenizer=None, **sizes):
    """A model of the hub in the cache below `home`: its config.json, and a tokenizer if one is given."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama"} | sizes))
    if tokenizer:
        tokenizer.save_pretrained(snapshot)


LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
}
LLAMA_1B |= {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("name", ["attention_bias", "mlp_bias"])
def test_a_base_model_with_biases_is_refused(tmp_path, name):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", name: True} | LLAMA_1B)
    )
    with pytest.raises(UsageError, match=f"'{name}': True.*without biases"):
        data.Architecture.read(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["meta-llama/Llama-3.2-1B-Instruct", "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit"]
)
def test_a_run_on_llama_1b_is_planned_from_its_config(tmp_path, monkeypatch, name):
    make_hub_model(
        tmp_path,
        name,
        load_llama_tokenizer(),
        **LLAMA_1B,
        quantization_config={"load_in_4bit": True},
    )
    flags = [
        "--profile",
        "t4",
        "--base-model",
        name,
        "--conversational",
        "own.jsonl",
        "--mix",
        "chatdoctor",
        "--dry-run",
    ]
    rows = [{"question": f"What is {n}?", "answer": f"It is the number {n}."} for n in range(40)]
    write_rows(tmp_path / "own.jsonl", rows)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    ran = call_script("train.py", *flags, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"(?m)^trainable parameters +11,272,192$", ran.stdout)
    assert (
        re.search(rf"(?m)^base_model +{re.escape(name)}$", ran.stdout)
        and f"t4-{name.split('/')[1]}-" in ran.stdout
    )
    assert re.search(r"(?m)^rows +36 of [\d,]+ tokens$", ran.stdout)
    audit = call_script("data.py", *flags[:-1], "--json", cwd=tmp_path)
    assert audit.returncode == 0 and json.loads(audit.stdout)["train_rows"] == 36


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("unsloth/Llama-3.2-3B-Instruct", "meta-llama/llama-3.2-3b-instruct", True),
        (
            "unsloth/Llama-3.2-3B-Instruct-bnb-4bit",
            "unsloth/Llama-3.2-3B-Instruct-unsloth-bnb-4bit",
            True,
        ),
        ("unsloth/Llama-3.2-3B-Instruct", "unsloth/Llama-3.2-3B", False),
        ("unsloth/Llama-3.2-3B-Instruct", "unsloth/Llama-3.2-1B-Instruct", False),
        ("someone/Llama-3.2-3B-Instruct", "unsloth/Llama-3.2-3B-Instruct", False),
        ("smollm2-135m-instruct", "unsloth/SmolLM2-135M-Instruct-bnb-4bit", True),
    ],
)
def test_names_of_the_same_base_weights(one, other, same):
    assert data.is_same_base(one, other) == data.is_same_base(other, one) == same


def test_a_base_model_in_a_folder(tmp_path):
    assert data.resolve_profile("cpu") == data.PROFILES["cpu"]
    (tmp_path / "model").mkdir()
    sizes = LLAMA_1B | {"head_dim": None, "num_key_value_heads": None, "tie_word_embeddings": None}
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    profile = data.resolve_profile("cpu", str(tmp_path / "model"))
    assert (
        profile.base_model == profile.hub_id == str(tmp_path / "model")
        and profile.license == "other"
    )
    arch = profile.architecture
    assert (arch.head_dim, arch.num_key_value_heads, arch.tie_word_embeddings) == (64, 32, False)
    small = data.resolve_profile("t4", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert small.architecture == data.PROFILES["cpu"].architecture and small.load_in_4bit


ZEPHYR = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "tokens", "special", "message"),
    [
        (ZEPHYR, ["</s>", "<unk>"], ("</s>", "<unk>"), None),
        (
            ZEPHYR,
            ["</s>", "<|reserved_special_token_0|>", "<unk>"],
            ("</s>", "<|reserved_special_token_0|>"),
            None,
        ),
        (ZEPHYR, ["</s>"], None, "no pad token, and none of"),
        (ZEPHYR, [], None, "ends an answer with .*; expected a special token"),
        (
            NO_SYSTEM,
            ["</s>"],
            None,
            "cannot render a system, a user and an assistant message .*no system",
        ),
        (None, ["</s>"], None, "cannot render"),
    ],
)
def test_special_tokens_come_from_the_chat_template(template, tokens, special, message):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE({chr(n): n for n in range(32, 127)} | {"\n": 127}, []))
    own.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    if message:
        with pytest.raises(UsageError, match=message):
            data.set_special_tokens(tokenizer, "some/model")
        return
    data.set_special_tokens(tokenizer, "some/model")
    assert (tokenizer.eos_token, tokenizer.pad_token) == special
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


# --- The command line


@pytest.mark.parametrize("script", ["data.py", "train.py", "ablate.py"])
def test_every_flag_of_the_rows_has_its_help(script, tmp_path):
    """The help is the comment at a field, which tyro has to find, also in a class that inherits."""
    shown = re.sub(r"[│\s]+", " ", call_script(script, "--help", cwd=tmp_path).stdout)
    assert "--rows {None}|STR Your own rows" in shown
    assert not re.findall(r"--[a-z-]+(?: [^ ]+)? \(default", shown)


# --- The shared helpers


def test_the_cache_is_where_the_hub_client_has_its_own(monkeypatch, tmp_path):
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    name = "llama-medical-answers"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert data.cache_home() == tmp_path / "home" / ".cache" / "huggingface" / name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data.cache_home() == tmp_path / "cache" / "huggingface" / name
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert data.cache_home() == tmp_path / name


def test_the_cache_needs_no_home_directory(monkeypatch, tmp_path):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user who has none
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert data.cache_home() == tmp_path / "llama-medical-answers"

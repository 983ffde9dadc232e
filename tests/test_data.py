"""Rows, mixes, splits and rendering. Only the rendering needs a tokenizer."""

import gc
import importlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
from conftest import ROOT, load_llama_tokenizer, write_rows

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


REFUSED_RECORDS = [
    ({"text": "x"}, "has the columns text; wanted: instruction/input/output, question/answer, or messages"),
    ({}, "has the columns none"),
    ({"question": "q?"}, "has the columns question"),
    ({"instruction": "i", "input": "q?"}, "has the columns instruction, input"),
    ({"question": "q?", "answer": None}, "the answer is None"),
    ({"question": ["q"], "answer": "a"}, "the question is ['q']"),
    ({"question": {"text": "q"}, "answer": "a"}, "the question is {'text': 'q'}"),
    ({"question": 1, "answer": "a"}, "the question is 1"),
    ({"question": "q?", "answer": "half \ud83d"}, "half of a surrogate pair"),
    ({"instruction": None, "input": None, "output": "a"}, "the question is None"),
    ({"messages": "hello"}, "messages must be a list"),
    ({"messages": []}, "a user and an assistant turn"),
    ({"messages": [{"role": "user", "content": "q?"}]}, "a user and an assistant turn"),
    ({"messages": [{"from": "user", "value": "q?"}]}, "a user and an assistant turn"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]},
        "the question is [",
    ),
    (["q", "a"], "a list; an object"),
    ("q?", "a str; an object"),
    (None, "a NoneType; an object"),
]


@pytest.mark.parametrize(("record", "message"), REFUSED_RECORDS)
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


GOOD_LINE = b'{"question": "q?", "answer": "a."}\n'
REFUSED_FILES = [
    ("rows.jsonl", GOOD_LINE + b'{"question": \n', "rows.jsonl:2: broken JSON"),
    ("rows.jsonl", GOOD_LINE + b"\n\n{'question': 'q'}", "rows.jsonl:4: broken JSON"),
    ("rows.jsonl", GOOD_LINE * 3 + GOOD_LINE[:20], "rows.jsonl:4: broken JSON"),
    ("rows.jsonl", GOOD_LINE + b"[" * 100_000, "rows.jsonl:2: broken JSON"),
    ("rows.jsonl", b'{"question": ' + b"1" * 5000 + b"}", "rows.jsonl:1: broken JSON"),
    ("rows.jsonl", GOOD_LINE + b'"q"', "rows.jsonl:2: a str; an object"),
    ("rows.jsonl", GOOD_LINE + b'{"q": 1}', "rows.jsonl:2: has the columns q"),
    ("rows.jsonl", b'{"question": "\xff"}', "not UTF-8"),
    ("rows.jsonl", GOOD_LINE.decode().encode("utf-16"), "not UTF-8"),
    ("rows.jsonl", b"\x7fELF\x02\x01\x01\x00\x00", "rows.jsonl:1: broken JSON"),
    ("rows.jsonl", b"", "holds no rows"),
    ("rows.jsonl", b"\n \n", "holds no rows"),
    ("rows.json", b'{"question": "q", "answer": "a"}', "a JSON dict; a list of row objects"),
    ("rows.json", GOOD_LINE * 2, "rows.json: broken JSON"),
    ("rows.json", b"[]", "holds no rows"),
    ("rows.json", b"[1]", "row 1: a int; an object"),
    ("rows.csv", b"question,answer\nq?\n", "rows.csv:2: the answer is None"),
    ("rows.csv", b"a,b\n1,2\n", "rows.csv:2: has the columns a, b"),
    ("rows.csv", b'question,answer\n"q?"x,a\n', "rows.csv:2: broken CSV"),
    ("rows.csv", b"question,answer\n\xe9,a\n", "not UTF-8"),
    ("rows.csv", b"question,answer\n", "holds no rows"),
    ("rows.parquet", b"no parquet", "not a Parquet file"),
    ("rows.parquet", b"PAR1", "not a Parquet file"),
    ("rows.parquet", b"", "not a Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED_FILES)
def test_malformed_files_are_refused_by_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        data.load_rows(str(tmp_path / name), "conversational")
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.jsonl", "no such file"),
        ("folder.jsonl", "a folder"),
        ("rows.txt", "is no source of rows"),
        ("", "is no source of rows"),
        ("a/b/c", "is no source of rows"),
        ("owner/name@", "is no source of rows"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UsageError, match=message):
        data.load_rows(source, "conversational")


# --- Cleaning


def clean(answer, question="What is it?"):
    row, rules = data.clean_row(Row(question, answer, "conversational"))
    return (row.answer if row else None), rules


@pytest.mark.parametrize(
    ("answer", "cleaned", "rules"),
    [
        ("It is a simple cold and will pass.", "It is a simple cold and will pass.", []),
        ("Hello. It is a simple cold.", "It is a simple cold.", ["greeting"]),
        ("Hi dear, your cold will pass soon.", "Your cold will pass soon.", ["greeting"]),
        (
            "Hi, Welcome to Chat Doctor forum. I have gone through your query and understand your concern. "
            "It is a simple cold. Hope this helps. Take care. For more information consult a general practitioner online -->",
            "It is a simple cold.",
            ["greeting", "persona", "sign-off"],
        ),
        ("Thanks for your question. I am Chat Doctor. It is a simple cold.", "It is a simple cold.", ["greeting", "persona"]),
        ("It is a simple cold. Regards, Chat Doctor.", "It is a simple cold.", ["persona"]),
        ("It is a simple cold  Take care.", None, ["sign-off", "stops mid-sentence"]),
        ("It isn\\t a cold, it\\s the flu.", "It isn't a cold, it's the flu.", ["lost apostrophe"]),
        ("Itâ€™s only a simple cold.", "It\u2019s only a simple cold.", ["mojibake"]),
        (
            "I saw the scan (attachment removed to protect patient identity) and it is normal.",
            "I saw the scan and it is normal.",
            ["attachment note"],
        ),
        # The anonymiser: "Dr" and the rest of the sentence became its name.
        ("Rest for two days and  ChatDoctor.  Then walk again.", None, ["destroyed sentence"]),
        ("You may have polycystic ovary syn ChatDoctor. Take care.", None, ["sign-off", "destroyed sentence"]),
        ("Rest well. Hope you will  ChatDoctor.", None, ["destroyed sentence"]),
        ("For more information consult an ChatDoctor. /ask-a-doctor-online/an", None, ["destroyed sentence"]),
        ("Hello. Hope this helps. Take care.", None, ["greeting", "sign-off", "empty"]),
        (" ", None, ["empty"]),
        ("ing the wound with water is enough for now.", None, ["begins mid-sentence"]),
        ("The usual treatment is rest and", None, ["stops mid-sentence"]),
        ("Signs of it are:\n- fever\n- a dry cough", "Signs of it are:\n- fever\n- a dry cough", []),
        ("Signs of it are fever and the following:", None, ["stops mid-sentence"]),
        ("It is a [[viral]] infection of the nose.", None, ["wiki mark-up"]),
        ("See www.example.org for what to do next.", None, ["URL"]),
        ("Write to me at doc@example.org any time you like.", None, ["e-mail address"]),
        ("Call us on 555-867-5309 and we shall see.", None, ["phone number"]),
        ("The normal range is 150-400, 10.5 in 2000 cases.", "The normal range is 150-400, 10.5 in 2000 cases.", []),
        ("It is fine.", None, ["too short"]),
        ("Word " * 400 + "end.", None, ["too long"]),
    ],
)
def test_each_rule_of_cleaning(answer, cleaned, rules):
    assert clean(answer) == (cleaned, rules)


def test_a_destroyed_question_goes_as_well_and_a_greeting_in_it_comes_off():
    answer = "It is a simple cold and will pass."
    assert clean(answer, "I have a fever and  ChatDoctor.  What is it?")[0] is None
    row, _ = data.clean_row(Row("Hello doctor, I have a fever.", answer, "conversational"))
    assert row.question == "I have a fever."


def test_no_shipped_row_is_touched_by_cleaning():
    for name, path in data.SOURCES["cpu"].items():
        for row in data.load_rows(path, name):
            assert data.clean_row(row) == (row, [])


def test_cleaning_in_several_processes_gives_what_one_gives(monkeypatch):
    rows = [Row(f"Question {n}?", f"Hello. Answer number {n} is a short one.", "conversational") for n in range(50)]
    logs = [{rule: data.RuleCount() for rule in data.RULES} for _ in range(2)]
    one = data.clean_rows(rows, logs[0])
    monkeypatch.setattr(data, "PARALLEL_FROM", 10)
    assert data.clean_rows(rows, logs[1]) == one
    assert logs[0] == logs[1] and logs[0]["greeting"].rows == 50


# --- Repeated questions


def drop_repeats(questions, probes=()):
    """The questions that stay, and the rules by how often they dropped one."""
    rows = [Row(question, f"Answer {n}.", "conversational") for n, question in enumerate(questions)]
    logs = {"conversational": {rule: data.RuleCount() for rule in data.RULES}}
    kept = data.drop_repeats(rows, data.ProbeQuestions(probes), logs)
    return {row.question for row in kept}, {rule: count.rows for rule, count in logs["conversational"].items() if count.rows}


LONG = "I am 34 and for two weeks I have had a dull ache in my left knee when I climb stairs after running, what can it be?"


@pytest.mark.parametrize(
    ("questions", "num_kept", "rules"),
    [
        (["What causes mumps?", "what causes  mumps"], 1, {"repeats a question": 1}),
        (["What are the causes of mumps?", "What are causes of mumps?"], 1, {"nearly repeats a question": 1}),
        (["What are the symptoms of mumps?", "What are the symptoms of measles?"], 2, {}),
        ([LONG, LONG + " Please help me."], 1, {"nearly repeats a question": 1}),
        ([LONG, LONG.replace("left knee", "right elbow").replace("climb stairs after running", "type all day long")], 2, {}),
    ],
)
def test_repeated_questions_are_dropped_whatever_their_order(questions, num_kept, rules):
    kept, counted = drop_repeats(questions)
    assert (len(kept), counted) == (num_kept, rules)
    assert len(drop_repeats(questions[::-1])[0]) == num_kept


def test_which_of_two_repeats_stays_does_not_depend_on_their_order():
    rows = [Row(LONG, f"Answer {n}.", "conversational") for n in range(5)]
    logs = defaultdict(lambda: defaultdict(data.RuleCount))
    kept = [data.drop_repeats(order, data.ProbeQuestions([]), logs) for order in (rows, rows[::-1])]
    assert kept[0] == kept[1] and len(kept[0]) == 1


@pytest.mark.parametrize(
    "question",
    [
        "How is malaria diagnosed and treated?",
        "how is Malaria treated and diagnosed",
        "Hello, I am a student. How is malaria diagnosed and treated? Thank you.",
    ],
)
def test_a_row_that_asks_a_probe_question_is_dropped(question):
    kept, rules = drop_repeats([question, "How is dengue treated?"], ["How is malaria diagnosed and treated?"])
    assert kept == {"How is dengue treated?"} and rules == {"asks a probe question": 1}


# --- Mix and split


@pytest.mark.parametrize(
    ("available", "wanted", "drawn"),
    [
        ((112_165, 10_000), (8000, 4000), (8000, 4000)),
        ((200, 100), (8000, 4000), (200, 100)),
        ((270, 140), (8500, 1500), (270, 47)),
        ((100, 3), (8500, 1500), (17, 3)),
        ((70, 40), (112_165, 0), (70, 0)),
        ((70, 40), (1, 0), (1, 0)),
    ],
)
def test_a_mix_keeps_its_ratio_where_rows_are_short(available, wanted, drawn):
    names = ("conversational", "encyclopedic")
    counts = data.mix_counts(dict(zip(names, available, strict=True)), dict(zip(names, wanted, strict=True)))
    assert tuple(counts.values()) == drawn


def test_the_draw_depends_on_rows_and_seed_alone():
    rows = make_rows("conversational", 50) + make_rows("encyclopedic", 50)
    mix = data.draw_mix(rows, data.MIXES["rebalanced"], seed=1)
    random.Random(0).shuffle(rows)
    assert data.draw_mix(rows, data.MIXES["rebalanced"], seed=1) == mix
    other = data.draw_mix(rows, data.MIXES["rebalanced"], seed=2)
    assert other.train != mix.train and other.eval == mix.eval


def test_the_fingerprint_is_the_same_in_every_process():
    program = "import data; print(data.RowsConfig(mix='week4').load('cpu').fingerprint)"
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


def test_the_fingerprint_of_given_rows_is_this_one_on_every_machine():
    """A change of this value means that the same rows no longer give the same run."""
    rows = make_rows("conversational", 40) + make_rows("encyclopedic", 20)
    assert data.draw_mix(rows, data.MIXES["week4"], seed=3407).fingerprint == "bfc5e68bfcf1"


def test_held_out_rows_are_the_same_for_every_mix_and_never_trained_on():
    mixes = [data.RowsConfig(mix=name).load("cpu") for name in data.MIXES]
    assert all(mix.eval == mixes[0].eval for mix in mixes)
    assert {row.source for row in mixes[0].eval} == {"conversational", "encyclopedic"}
    held_out = {row.question for row in mixes[0].eval}
    assert all(row.question not in held_out for mix in mixes for row in mix.train)


def test_a_custom_mix_draws_its_counts_or_their_ratio():
    mix = data.RowsConfig(mix="custom", num_conversational=20, num_encyclopedic=10).load("cpu")
    assert Counter(row.source for row in mix.train) == {"conversational": 20, "encyclopedic": 10}
    short = data.RowsConfig(mix="custom", num_conversational=1000, num_encyclopedic=100).load("cpu")
    counts = Counter(row.source for row in short.train)
    assert counts["conversational"] == short.available["conversational"]
    assert counts["encyclopedic"] == counts["conversational"] // 10


@pytest.mark.parametrize(
    ("mix", "num_rows", "counts"),
    [("rebalanced", 64, (54, 10)), ("week4", 64, (43, 21)), ("chatdoctor", 64, (64, 0)), ("week4", 99_999, (8000, 4000))],
)
def test_so_many_rows_at_most_are_wanted_in_the_mixs_ratio(mix, num_rows, counts):
    wanted = data.RowsConfig(mix=mix, num_rows=num_rows).wanted
    assert (wanted["conversational"], wanted["encyclopedic"]) == counts


@pytest.mark.parametrize(
    "flags",
    [
        {"num_conversational": 5},
        {"mix": "custom"},
        {"mix": "custom", "num_conversational": 5},
        {"mix": "custom", "num_conversational": -1, "num_encyclopedic": 5},
        {"mix": "custom", "num_conversational": 0, "num_encyclopedic": 0},
    ],
)
def test_counts_go_with_the_custom_mix_and_it_with_them(flags):
    with pytest.raises(ValueError, match="--mix"):
        data.RowsConfig(**flags)


def test_rows_of_which_none_can_be_held_out_are_refused(tmp_path):
    few = write_rows(
        tmp_path / "few.jsonl", [{"question": f"What is {n}?", "answer": f"It is the number {n}."} for n in range(9)]
    )
    with pytest.raises(UsageError, match="none can be held out for evaluation, which takes 1 in 10"):
        data.RowsConfig(conversational=str(few), encyclopedic=str(few), mix="chatdoctor").load("cpu")


def test_a_mix_of_a_source_without_usable_rows_is_refused(tmp_path):
    bad = write_rows(tmp_path / "rows.jsonl", [{"question": f"q {n}?", "answer": "and"} for n in range(9)])
    with pytest.raises(UsageError, match="and 1,500 encyclopedic rows, and after cleaning 243 and 0 are left"):
        data.RowsConfig(encyclopedic=str(bad)).load("cpu")


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


@pytest.fixture(scope="module", params=["small", "llama"])
def tokenizer(request):
    return data.load_tokenizer("cpu") if request.param == "small" else load_llama_tokenizer()


EXPECTED_PROMPTS = {
    "<|im_end|>": ("<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"),
    "<|eot_id|>": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n{system}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
}


def test_the_tokenizers_end_a_turn_and_pad_with_different_tokens(tokenizer):
    expected = {"<|im_end|>": (2, "<|endoftext|>", 0), "<|eot_id|>": (128009, "<|finetune_right_pad_id|>", 128004)}
    assert (tokenizer.eos_token_id, tokenizer.pad_token, tokenizer.pad_token_id) == expected[tokenizer.eos_token]


def test_a_row_is_rendered_as_the_chat_template_renders_it(tokenizer):
    row = Row("Is 38.5 °C a fever?", "Yes.\n\n- Drink plenty.\n- Rest.", "conversational")
    encoded = data.encode_row(tokenizer, row)
    prompt = EXPECTED_PROMPTS[tokenizer.eos_token].format(system=data.SYSTEM_PROMPT, question=row.question)
    expected = prompt + row.answer + tokenizer.eos_token
    assert tokenizer.decode(encoded["input_ids"]) == expected
    assert encoded["input_ids"] == tokenizer(expected, add_special_tokens=False)["input_ids"]
    messages = [
        {"role": "system", "content": data.SYSTEM_PROMPT},
        {"role": "user", "content": row.question},
        {"role": "assistant", "content": row.answer},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, date_string=data.TEMPLATE_DATE)
    assert whole.startswith(expected) and whole[len(expected) :].strip() == ""


def test_the_shipped_rows_encode_as_the_whole_template_would(tokenizer):
    """Texts are encoded apart from the template; no token may come out differently for it."""
    for name, path in data.SOURCES["cpu"].items():
        for row in data.load_rows(path, name)[::10]:
            prompt = EXPECTED_PROMPTS[tokenizer.eos_token].format(system=data.SYSTEM_PROMPT, question=row.question)
            whole = tokenizer(prompt + row.answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            assert data.encode_row(tokenizer, row)["input_ids"] == whole


def test_earlier_turns_stand_in_the_prompt_as_the_template_puts_them(tokenizer):
    ids = data.encode_prompt(tokenizer, "And now?", [("One?", "Yes."), ("Two?", "No.")])
    turns = [("system", data.SYSTEM_PROMPT), ("user", "One?"), ("assistant", "Yes."), ("user", "Two?"), ("assistant", "No.")]
    messages = [{"role": role, "content": content} for role, content in [*turns, ("user", "And now?")]]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string=data.TEMPLATE_DATE)
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_training_and_asking_share_the_prompt_and_there_is_one_bos(tokenizer):
    encoded = data.encode_row(tokenizer, Row("q?", "It is fine.", "conversational"))
    prompt = data.encode_prompt(tokenizer, "q?")
    assert encoded["input_ids"][: len(prompt)] == prompt
    if tokenizer.eos_token == "<|eot_id|>":
        assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1 and encoded["input_ids"][0] == 128000


def test_the_loss_counts_the_answer_and_its_end_of_turn_only(tokenizer):
    encoded = data.encode_row(tokenizer, Row("q?", "It is fine.", "conversational"))
    counted = [label for label in encoded["labels"] if label != -100]
    assert tokenizer.decode(counted) == "It is fine." + tokenizer.eos_token
    prompt = data.encode_prompt(tokenizer, "q?")
    assert encoded["input_ids"] == prompt + counted
    assert encoded["labels"] == [-100] * len(prompt) + counted


def test_trl_batches_keep_ids_and_labels_and_train_the_end_of_turn(tokenizer):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [data.encode_row(tokenizer, Row("q?", answer, "conversational")) for answer in ("Yes.", "It is a simple cold.")]
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(rows)
    for at, row in enumerate(rows):
        length = len(row["input_ids"])
        padding = batch["input_ids"].shape[1] - length
        assert batch["input_ids"][at].tolist() == row["input_ids"] + [tokenizer.pad_token_id] * padding
        assert batch["labels"][at].tolist() == row["labels"] + [-100] * padding
        assert batch["labels"][at, length - 1] == tokenizer.eos_token_id


def test_no_special_token_comes_out_of_question_answer_or_system_prompt(tokenizer, monkeypatch):
    plain = data.encode_row(tokenizer, Row("q?", "a.", "conversational"))["input_ids"]
    special = set(tokenizer.added_tokens_decoder)
    for token in map(str, tokenizer.added_tokens_decoder.values()):
        monkeypatch.setattr(data, "SYSTEM_PROMPT", f"Be brief. {token}user")
        encoded = data.encode_row(tokenizer, Row(f"q {token}\n{token}system?", f"a {token}.", "conversational"))["input_ids"]
        assert [each for each in encoded if each in special] == [each for each in plain if each in special]
        assert tokenizer.decode(encoded).count(token) == tokenizer.decode(plain).count(token) + 4


def test_too_long_rows_are_left_out_and_counted_never_cut(tokenizer):
    rows = [Row("q?", "word " * count + "end.", "conversational") for count in (10, 5000)]
    encoded, num_too_long = data.encode_rows(tokenizer, rows)
    assert num_too_long == 1 and encoded == [data.encode_row(tokenizer, rows[0])]


# --- Audit


def test_the_audit_tells_shares_by_rows_and_by_answer_tokens(tokenizer):
    audit = data.audit_mix(data.RowsConfig(mix="week4").load("cpu"), tokenizer)
    sources = audit["sources"]
    assert audit["train_rows"] == sum(of["rows"] for of in sources.values()) == sum(audit["length_histogram"].values())
    for key in ("row_share", "answer_token_share"):
        assert sum(of[key] for of in sources.values()) == pytest.approx(1)
    assert sources["conversational"]["list_share"] == 0 < sources["encyclopedic"]["list_share"]
    assert all(of["dr_word_share"] > 0 for of in sources.values())
    assert audit["eos_is_trained"] and audit["num_too_long"] == 0
    assert "rows is 67 : 33 by rows and" in data.format_audit(audit)


def test_the_audit_counts_and_shows_what_every_rule_did(tmp_path, capsys):
    answers = ["Hello. It is a simple cold.", "Rest and hy ChatDoctor. Then walk.", "It is a simple cold."]
    rows = [{"question": f"What is number {n}?", "answer": answers[n % 3]} for n in range(60)]
    data.main(data.DataConfig(profile="cpu", conversational=str(write_rows(tmp_path / "rows.jsonl", rows)), json=True))
    audit = json.loads(capsys.readouterr().out)
    assert audit["rules"]["greeting"]["conversational"] == 20
    assert audit["rules"]["destroyed sentence"] == {"conversational": 20, "encyclopedic": 0, "example": answers[1]}
    assert set(audit["rules"]) == set(data.RULES)
    assert "... Rest and hy ChatDoctor. Then walk. ..." in data.format_audit(audit)


def test_rows_cannot_steer_the_terminal():
    assert data.escape_controls("a\x1b[2Jb\r\x07\n\x9b1m") == "a\\x1b[2Jb\\r\\x07\n\\x9b1m"


# --- Imports


def test_after_imports_garbage_is_collected_again_and_a_model_that_was_there_can_go(tmp_path, monkeypatch):
    (tmp_path / "library_of_a_test.py").write_text("")
    (tmp_path / "broken_library_of_a_test.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with data.importing():
        assert not gc.isenabled()
        importlib.import_module("library_of_a_test")
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    assert frozen > 10_000
    model = [[] for _ in range(1000)]
    with data.importing():
        importlib.import_module("library_of_a_test")
    assert gc.isenabled() and gc.get_freeze_count() <= frozen, len(model)
    with pytest.raises(ZeroDivisionError), data.importing():
        importlib.import_module("broken_library_of_a_test")
    assert gc.isenabled()

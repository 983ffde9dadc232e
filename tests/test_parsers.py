"""Any content of a file of rows, questions or records is read, or rejected with one message."""

import contextlib
import csv
import dataclasses
import io
import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ablate
import data
import infer
import train
from data import UsageError

# The folder of a test is the same for all its examples, each of which writes its file anew.
EXAMPLES = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

TEXTS = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    ["q?", "\x00", "\ud800", "\u2028", "a\nb", "[" * 300]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


def objects(*names):
    """JSON objects with some of the expected names and any values."""
    return st.dictionaries(st.sampled_from(names) | TEXTS, JSON, max_size=len(names) + 1) | JSON


def mutate(draw, value):
    """The JSON value with one of its parts, at any depth, replaced or removed."""
    if isinstance(value, dict) and value and draw(st.booleans() | st.just(True)):
        name = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 5)) == 0:
            return {key: each for key, each in value.items() if key != name}
        return value | {name: mutate(draw, value[name])}
    if isinstance(value, list) and value and draw(st.booleans()):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], mutate(draw, value[place]), *value[place + 1 :]]
    return draw(JSON)


def dumps(value):
    return json.dumps(value, ensure_ascii=True)


@contextlib.contextmanager
def read_or_refused():
    """A rejection is one message that is safe to print."""
    try:
        yield
    except UsageError as error:
        message = str(error)
        assert message and len(message) < 2000, message
        assert data.escape_controls(message).replace("\n", "").replace("\t", "").isprintable() or not message.isascii()


# --- Rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", data.FILE_SUFFIXES)
@EXAMPLES
@given(content=st.binary(max_size=200))
def test_any_bytes_as_a_file_of_rows(tmp_path, suffix, content):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    with read_or_refused():
        rows, report = data.load_source("rows", str(path), data.RowsFlags())
        assert len(rows) + report.num_dropped == report.num_read > 0
        report.check_losses()


ROW_NAMES = ("question", "answer", "instruction", "input", "output", "messages", "conversations", "system")


@EXAMPLES
@given(records=st.lists(objects(*ROW_NAMES), min_size=1, max_size=3))
def test_any_json_as_rows(tmp_path, records):
    (tmp_path / "rows.jsonl").write_text("".join(dumps(record) + "\n" for record in records))
    (tmp_path / "rows.json").write_text(dumps(records))
    for name in ("rows.jsonl", "rows.json"):
        with read_or_refused():
            rows, report = data.load_source("encyclopedic", str(tmp_path / name), data.RowsFlags())
            assert len(rows) + report.num_dropped == report.num_read
            # A file that begins with a list is a list of rows.
            assert report.num_read == len(records) or isinstance(records[0], list)
            for row in rows:
                # Text that can be written again.
                assert "".join(text for _, text in row.messages).encode() and row.key
            report.check_losses()


@EXAMPLES
@given(cells=st.lists(st.lists(st.text(st.characters(codec="utf-8"), max_size=10), max_size=4), max_size=4))
def test_any_table_as_rows(tmp_path, cells):
    table = io.StringIO()
    csv.writer(table).writerows([["question", "answer"], *cells])
    (tmp_path / "rows.csv").write_text(table.getvalue(), encoding="utf-8", newline="")
    with read_or_refused():
        rows, report = data.load_source("rows", str(tmp_path / "rows.csv"), data.RowsFlags())
        assert len(rows) + report.num_dropped == report.num_read


@EXAMPLES
@given(questions=st.lists(TEXTS, min_size=2, max_size=2), answers=st.lists(TEXTS, min_size=2, max_size=2))
def test_rows_come_back_as_they_were_written(tmp_path, questions, answers):
    path = tmp_path / "rows.jsonl"
    pairs = list(zip(questions, answers, strict=True))
    path.write_text("".join(dumps({"question": question, "answer": answer}) + "\n" for question, answer in pairs))
    with read_or_refused():
        rows, report = data.load_source("rows", str(path), data.RowsFlags())
        dropped = {int(place.rsplit(":", 1)[1]) for found in report.rules.values() for place in found["places"]}
        kept = [(q.strip(), a.strip()) for n, (q, a) in enumerate(pairs, 1) if n not in dropped]
        assert [(row.question, row.answer) for row in rows] == kept


# --- Questions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
@EXAMPLES
@given(content=st.binary(max_size=200) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_as_a_file_of_questions(tmp_path, suffix, content):
    path = tmp_path / f"questions{suffix}"
    path.write_bytes(content)
    with read_or_refused():
        for row in infer.read_questions(str(path)):
            if not row.problem:
                infer.check_question(row.question)


@EXAMPLES
@given(records=st.lists(objects("question"), min_size=1, max_size=3))
def test_any_json_as_questions(tmp_path, records):
    (tmp_path / "q.jsonl").write_text("".join(dumps(record) + "\n" for record in records))
    with read_or_refused():
        rows = infer.read_questions(str(tmp_path / "q.jsonl"))
        assert len(rows) == len(records)
        assert all(row.problem or isinstance(row.question, str) for row in rows)


@EXAMPLES
@given(question=st.text(max_size=200) | TEXTS)
def test_any_text_as_a_question(question):
    with read_or_refused():
        infer.check_question(question)
        assert any(character.isalnum() for character in question)
        assert question.encode("utf-8") and not set(question) & set(map(chr, range(9)))


# --- Records -----------------------------------------------------------------------------------------------------

RECORD = dataclasses.asdict(infer.AdapterRecord(data.SMALL_MODEL, "cpu", "0" * 12, infer.DECODINGS["kit"]))
CONFIG = {"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "peft_type": "LORA", "task_type": "CAUSAL_LM"}
CONFIG |= {"r": 2, "lora_alpha": 4, "bias": "none", "init_lora_weights": True, "rank_pattern": {}, "use_dora": False}


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@EXAMPLES
@given(draw=st.data())
def test_any_record_of_an_adapter(tmp_path, draw):
    record, config = mutate(draw.draw, RECORD), mutate(draw.draw, CONFIG)
    (tmp_path / "kit.json").write_text(dumps(record))
    (tmp_path / "adapter_config.json").write_text(dumps(config))
    tensors = {f"{Q_PROJ}.lora_A.weight": np.zeros((2, 576)), f"{Q_PROJ}.lora_B.weight": np.zeros((576, 2))}
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with read_or_refused():
        read = infer.check_adapter(tmp_path)
        assert read.record.profile in (None, *data.PROFILES) and isinstance(read.record.base_model, str)
        assert read.lora["r"] == 2


@EXAMPLES
@given(content=st.binary(max_size=300), header=JSON)
def test_any_bytes_as_weights(tmp_path, content, header):
    (tmp_path / "adapter_config.json").write_text(dumps(CONFIG))
    text = dumps(header).encode()
    for weights in (content, len(text).to_bytes(8, "little") + text + content):
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
        with pytest.raises(UsageError):
            infer.check_adapter(tmp_path)


@EXAMPLES
@given(draw=st.data())
def test_any_state_of_a_checkpoint(tmp_path, draw):
    state = {"global_step": 1, "max_steps": 4, "stateful_callbacks": {"RunCallback": {"attributes": {"recipe": {}}}}}
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "trainer_state.json").write_text(dumps(mutate(draw.draw, state)))
    assert train.find_checkpoint(tmp_path)[0] is None  # its other files are missing


def make_answer():
    question = infer.read_probes()[0].question
    answer = infer.Answer(question, "Rest.", [5, 2], "stop", 9, 2, 0, infer.DECODINGS["kit"], "model", None, 0.0)
    judged = dataclasses.replace(infer.judge(answer.text, question, probe=infer.read_probes()[0]), answer=answer)
    return json.loads(json.dumps(judged.to_record()))


ANSWER = make_answer()


@EXAMPLES
@given(draw=st.data())
def test_any_answers_of_an_earlier_start(tmp_path, draw):
    path = tmp_path / "a.jsonl"
    line = dumps(mutate(draw.draw, ANSWER))
    content = (line + "\n").encode() + draw.draw(st.just(line[: len(line) // 2].encode()) | st.binary(max_size=20))
    path.write_bytes(content)
    try:
        answers = infer.read_answered(path, [infer.QuestionRow("q:1", {}, ANSWER["question"])], {"model": "model"})
    except UsageError:
        assert path.read_bytes() == content
    else:
        assert all(json.loads(answer)["question"] == ANSWER["question"] for answer in answers)
        assert path.read_bytes() == content and len(content.splitlines()) == len(answers)


def make_report(records):
    return ablate.make_report(records, ablate.decide_claims(records))


@EXAMPLES
@given(draw=st.data())
def test_any_cell_of_a_study_makes_a_report_or_is_refused(tmp_path, draw):
    cell = {"arm": "kit", "decoding_arm": "kit", "stop_ids": [2], "repeats": True}
    numbers = {"before": {"eval_loss": 3.0}, "chosen": {"eval_loss": 2.0}, "selected": {"answers": 4}, "steps": 4}
    numbers |= {"training_seconds": 60.0, "adapter_bytes": 4_000_000, "train_rows": 64, "train_tokens": 9000}
    about = {"command": "python ablate.py", "base_model": "model", "questions": [ANSWER["question"]]}
    about["arms"] = ["kit"]
    run = tmp_path / "runs" / "kit"
    for folder in (tmp_path / "cells", run):
        folder.mkdir(parents=True, exist_ok=True)
    records = {
        tmp_path / "study.json": about,
        tmp_path / "cells" / "kit.kit.jsonl": cell | ANSWER,
        run / "run.json": {"numbers": numbers},
        run / "metrics.jsonl": {"step": 4, "eval_loss": 2.0},
    }
    chosen = draw.draw(st.sampled_from(list(records)))
    for path, record in records.items():
        path.write_text(dumps(mutate(draw.draw, record) if path == chosen else record) + "\n")
    with read_or_refused():
        make_report(ablate.read_records(tmp_path))


@EXAMPLES
@given(draw=st.data())
def test_any_probe(tmp_path, draw):
    line = data.PROBES.read_text(encoding="utf-8").split("\n")[0]
    (tmp_path / "probes.jsonl").write_text(dumps(mutate(draw.draw, json.loads(line))) + "\n")
    with read_or_refused():
        for probe in infer.read_probes(str(tmp_path / "probes.jsonl")):
            assert isinstance(probe.question, str)

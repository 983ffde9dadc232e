"""Adapters, decoding and generation. Tests with the small model are marked slow."""

import dataclasses
import datetime
import itertools
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ENVIRONMENT, ROOT, write_rows

import data
import infer
from infer import DECODINGS, Decoding, Request

QUESTIONS = ["What causes a cold?", "What causes hiccups?", "How is gout treated, and which foods make it worse?"]


# --- Noise


def test_libraries_print_no_banner_and_log_errors_only(capfd, caplog):
    with infer.quiet_libraries():
        print("==((====))==  Unsloth")
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("no kernels")
        logging.getLogger("xformers.ops").error("a real error")
        print("a message of ours", file=sys.stderr)
    stdout, stderr = capfd.readouterr()
    assert stdout == "" and stderr == "a message of ours\n"
    assert [record.message for record in caplog.records] == ["a real error"]


def test_an_error_passes_through_quiet_libraries():
    with pytest.raises(RuntimeError, match="real"), infer.quiet_libraries():
        raise RuntimeError("real")


def test_the_environment_is_prepared_before_torch_is_imported():
    program = (
        "import data, infer, os, sys; infer.prepare_environment(data.PROFILES['cpu']); "
        "print('torch' in sys.modules, os.environ['CUBLAS_WORKSPACE_CONFIG'], os.environ['HF_HUB_OFFLINE'])"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert ran.stdout == "False :4096:8 1\n"


# --- Decodings


def test_the_storys_presets_are_as_told():
    assert DECODINGS["story-collapse"] == Decoding(no_repeat_ngram_size=3, count_prompt=True, stop="generation-config")
    assert DECODINGS["story-fix"] == Decoding(repetition_penalty=1.3, max_new_tokens=256, count_prompt=True)
    assert (DECODINGS["week3"].temperature, DECODINGS["week3"].top_p) == (0.7, 0.9)
    assert DECODINGS["plain"] == Decoding(temperature=0, repetition_penalty=1, no_repeat_ngram_size=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("no_repeat_ngram_size", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
    ],
)
def test_a_field_out_of_range_is_refused_by_its_flag(field, value):
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} {value}: "):
        Decoding(**{field: value})


def test_kit_is_the_candidate_with_the_most_answers_that_are_sound_and_ended():
    from tests import choose_kit

    records = [json.loads(line) for line in choose_kit.LABELLED.read_text(encoding="utf-8").splitlines()]
    sound = Counter(record["candidate"] for record in records if record.get("verdict") == "sound")
    assert Counter(record["candidate"] for record in records) == dict.fromkeys(choose_kit.CANDIDATES, 2 * 26)
    assert choose_kit.CANDIDATES[sound.most_common(1)[0][0]] == DECODINGS["kit"]


def test_flags_change_single_fields_of_a_preset():
    config = infer.InferConfig("q?", decoding="story-fix", repetition_penalty=1.1, max_new_tokens=8)
    changed = config.change_decoding(DECODINGS["story-fix"])
    assert changed == Decoding(repetition_penalty=1.1, count_prompt=True, max_new_tokens=8)


@pytest.mark.parametrize(
    ("ids", "cap", "kept", "reason"),
    [
        ([1, 2, 0, 9, 9], 5, [1, 2, 0], "stop"),
        ([1, 2, 3], 3, [1, 2, 3], "length"),
        ([1, 2, 0], 3, [1, 2, 0], "stop"),  # as long as the cap, and not cut
        ([1, 2, 0], 2, [1, 2], "length"),  # the stop comes after this decoding's own cap
        ([0], 3, [0], "stop"),
        ([], 3, [], "length"),
    ],
)
def test_an_answer_ends_at_its_stop_token_or_its_cap(ids, cap, kept, reason):
    assert infer.cut_answer(ids, cap, [0]) == (kept, reason)


# --- Files, adapters, chat


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_questions_are_read_in_their_order_with_all_their_columns(tmp_path, mark):
    (tmp_path / "q.txt").write_text(f"{mark}one?\n\n  two? \none?\n", encoding="utf-8")
    (tmp_path / "q.csv").write_text(f'{mark}ID,Question\n1,one?\n2,"two?"\n1,one?\n', encoding="utf-8")
    rows = [{"prompt": "one?"}, {"prompt": "two?", "text": "x"}, {"prompt": "one?"}]
    write_rows(tmp_path / "q.jsonl", rows)
    for name in ("q.txt", "q.csv", "q.jsonl"):
        assert [row.question for row in infer.read_questions(str(tmp_path / name))] == ["one?", "two?", "one?"]
    rows = infer.read_questions(str(tmp_path / "q.csv"))
    assert [row.columns["ID"] for row in rows] == ["1", "2", "1"]
    assert [row.place.rsplit(":", 1)[1] for row in rows] == ["2", "3", "4"]
    (tmp_path / "q.TXT").write_bytes(b"one?\r\rtwo?\r")
    assert [(row.place[-1], row.question) for row in infer.read_questions(str(tmp_path / "q.TXT"))] == [("1", "one?"), ("3", "two?")]


def test_every_column_is_kept_beside_those_of_the_output():
    columns = {"question": "q?", "text": 1, "input_text": 2, "note": None, "day": datetime.date(2024, 1, 2), "n": float("nan")}
    line = json.loads(infer.to_json(columns, {"question": "q?", "text": "a", "note": None}), parse_constant=pytest.fail)
    own = {"question": "q?", "text": "a", "note": None}
    assert line == own | {"input_text": 1, "input_input_text": 2, "day": "2024-01-02", "n": None}
    assert json.loads(infer.to_json({"question": None}, own)) == own | {"input_question": None}


def test_columns_of_a_question_are_chosen_as_in_training(tmp_path):
    """The input was asked without its instruction, and a null question beside a prompt was not."""
    rows = [{"instruction": "Say.", "input": "one", "id": 1}, {"instruction": "two?", "input": ""}, {"question": None, "prompt": "three?"}]
    read = infer.read_questions(str(write_rows(tmp_path / "q.jsonl", rows)))
    assert [row.question for row in read] == ["Say.\n\none", "two?", "three?"]
    assert [row.columns for row in read] == rows
    rows = [{"instruction": "If you are a doctor, answer.", "input": f"{n}?"} for n in range(3)]
    read = infer.read_questions(str(write_rows(tmp_path / "q.jsonl", rows)))
    assert [row.question for row in read] == ["0?", "1?", "2?"]


def test_rows_that_cannot_be_asked_keep_their_place_and_their_reason(tmp_path):
    path = write_rows(tmp_path / "q.jsonl", [{"question": "one?"}, {"question": "", "id": 7}, {"question": None}, {"id": 1}, 3])
    path.write_text(path.read_text() + "broken\n")
    rows = infer.read_questions(str(path))
    assert [not row.problem for row in rows] == [True, *[False] * 5]
    assert all("Expected text in a column question" in row.problem for row in rows[1:4])
    assert rows[4].problem == "expected columns, found 3" and "found broken JSON" in rows[5].problem
    assert [row.columns for row in rows[1:4]] == [{"question": "", "id": 7}, {"question": None}, {"id": 1}]
    assert rows[4].columns == {"record": "3"} and "broken JSON" in rows[5].columns["record"]
    (tmp_path / "q.csv").write_text("question\nWhat is croup, and how is it treated?\nWhat is flu?\n")
    first, _ = infer.read_questions(str(tmp_path / "q.csv"))
    assert first.columns == {"record": "2 fields, and the header has 1: What is croup,and how is it treated?"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.md", b"one?", "has an unsupported file type"),
        ("q.txt", b"\n \n", "contains no questions"),
        ("q.txt", b"\xff", "not UTF-8 text"),
        ("q.csv", b"id\n1\n", "q.csv:2: The question is empty"),
        ("q.jsonl", b'{"question": ""}', "q.jsonl:1: The question is empty"),
        ("q.jsonl", b"[]", "contains no questions"),
        ("q.jsonl", b"{", "q.jsonl:1: expected columns, found broken JSON"),
    ],
)
def test_other_question_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(data.UsageError, match=message):
        infer.read_questions(str(tmp_path / name))


def test_a_file_of_one_line_that_is_not_ours_is_kept(tmp_path):
    """It was taken for an incomplete answer, and emptied."""
    path = tmp_path / "config.json"
    path.write_text('{"my": "config"}')
    with pytest.raises(data.UsageError, match=r"config.json:1 is not an answer to row 1"):
        infer.read_answered(path, ASKED, {})
    assert path.read_text() == '{"my": "config"}'


ASKED = [infer.QuestionRow("q:1", {}, "q?"), infer.QuestionRow("q:2", {}, "", "empty"), infer.QuestionRow("q:3", {}, "r?")]


@pytest.mark.parametrize("end", ["", "\n"])
def test_lines_of_an_earlier_start_are_kept(tmp_path, end):
    lines = ['{"question": "q?", "model": "m", "verdict": "sound", "text": "\u00e9"}', '{"question": "", "error": "empty"}']
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + end, encoding="utf-8")
    assert infer.read_answered(path, ASKED, {"model": "m"}) == lines
    path.write_text("")
    assert infer.read_answered(path, ASKED, {"model": "m"}) == []
    odd = [infer.QuestionRow("q:1", {"n": float("nan")}, "half \ud83d", "half a character")]
    line = infer.to_json(odd[0].columns, {"question": odd[0].question, "error": "e"})
    path.write_text(line + "\n")
    assert infer.read_answered(path, odd, {}) == [line]


@pytest.mark.parametrize(
    ("content", "number"),
    [
        ("one\ntwo", 1),
        ("hello", 1),
        ("hello\n", 1),
        ('{"question": "q?", "n": 1}\n', 1),
        ('{"question": "q?", "model": "n", "verdict": "sound", "finish_reason": "stop"}\n', 1),
        ('{"question": "q?", "model": "m"}\n{"question": "x?", "model": "m"}\n', 2),
        ('\ufeff{"question": "q?", "model": "m"}\n', 1),
        ('{"question": "x?", "error": "e"}\n', 1),
        ('{"error": "e"}\n', 1),
        ('{"question": "q?", "error": "e"}\n', 1),
        ('{"question": "q?", "model": "m"}\n{"question": "", "error": "e"}\n{"question": "r?", "te', 3),
        ('{"question": "q?", "model": "m"}\n{"question": "", "error": "e"}\n{"question": "r?", "model": "m"}\n{}\n', 4),
    ],
)
def test_other_files_are_not_continued(tmp_path, content, number):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(data.UsageError, match=rf"a\.jsonl:{number} is not an answer to row {number}"):
        infer.read_answered(path, ASKED, {"model": "m"})
    assert path.read_text() == content


CONFIG = {"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "peft_type": "LORA", "task_type": "CAUSAL_LM"}
CONFIG |= {"r": 2, "lora_alpha": 4, "bias": "none", "init_lora_weights": True, "target_modules": ["q_proj"]}
RECORD = infer.AdapterRecord(data.SMALL_MODEL, "cpu", "0" * 12, DECODINGS["week3"])
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def make_adapter(folder, config=None, record=None, **changes):
    """An adapter of one module; `changes` of its tensors' shapes, by their last names, None for one that is left out."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(CONFIG | (config or {})))
    if record is not None:
        (folder / "kit.json").write_text(record if isinstance(record, str) else json.dumps(dataclasses.asdict(RECORD) | record))
    shapes = {f"{Q_PROJ}.lora_A.weight": (2, 576), f"{Q_PROJ}.lora_B.weight": (576, 2)} | changes.pop("shapes", {})
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if shape}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def test_an_adapter_of_other_makers_is_known_by_peft_alone(tmp_path):
    adapter = make_adapter(tmp_path / "a")
    assert infer.find_adapter(str(adapter)) == adapter
    checked = infer.check_adapter(adapter)
    assert checked.record == infer.AdapterRecord("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert checked.profile == data.PROFILES["cpu"]
    assert checked.lora == {"r": 2, "lora_alpha": 4, "use_rslora": False, "target_modules": ["q_proj"]}


def test_metadata_of_other_programs_is_ignored(tmp_path):
    config = {"unsloth_training_method": "qlora", "unsloth_load_in_4bit": True, "something_new": {"path": "../x"}}
    config |= {"base_model_name_or_path": "unsloth/SmolLM2-135M-Instruct", "rank_pattern": {}, "modules_to_save": []}
    adapter = make_adapter(tmp_path / "a", config)
    assert infer.check_adapter(adapter).profile == data.PROFILES["cpu"]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "kit.json"])
def test_a_file_that_may_not_be_read_is_reported_as_such(tmp_path, monkeypatch, name):
    adapter = make_adapter(tmp_path / "a b", record={})
    real = Path.open

    def open_unless_forbidden(path, *given, **named):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *given, **named)

    monkeypatch.setattr(Path, "open", open_unless_forbidden)
    with pytest.raises(data.UsageError, match=rf"{name} of an adapter cannot be read \(Permission denied\)"):
        infer.check_adapter(adapter)


def test_the_record_of_an_adapter_comes_back_as_it_was_written(tmp_path):
    assert infer.check_adapter(make_adapter(tmp_path / "a", record={})).record == RECORD


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", "null", '{"base_model": 3}', "[" * 10_000),
        *({"decoding": {"speed": 1}}, {"decoding": 1}, {"profile": "tpu"}),
        {"decoding": dataclasses.asdict(DECODINGS["week3"]) | {"temperature": 1e-30}},
    ],
    ids=lambda content: str(content)[:30],
)
def test_a_broken_record_is_one_message(tmp_path, content):
    adapter = make_adapter(tmp_path / "a", record=content)
    with pytest.raises(data.UsageError, match=r"kit\.json of an adapter cannot be read"):
        infer.check_adapter(adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"base_model_name_or_path": "some/base"}}, "some/base: its config.json cannot be used"),
        ({"config": {"base_model_name_or_path": "../../etc"}}, "which is a local path"),
        ({"config": {"base_model_name_or_path": "a\0b\ud83d"}}, "which is a local path"),
        ({"config": {"layer_replication": [[0, 15], [10, 30]]}}, "plain LoRA, found layer_replication"),
        ({"record": {"base_model": "/some/folder"}}, "which is a local path"),
        ({"config": {"r": 4}}, "expected .4, 576., found .2, 576."),
        ({"config": {"r": "two"}}, "adapter_config.json of an adapter cannot be read .*two"),
        ({"config": {"lora_alpha": None}}, "adapter_config.json of an adapter cannot be read"),
        ({"config": {"use_dora": True}}, "expected plain LoRA, found use_dora True"),
        ({"config": {"peft_type": "IA3"}}, "plain LoRA, found peft_type 'IA3'"),
        ({"config": {"alpha_pattern": {"q_proj": 8}}}, "plain LoRA, found alpha_pattern"),
        ({"config": {"init_lora_weights": "pissa"}}, "plain LoRA, found init_lora_weights 'pissa'"),
        ({"config": {"modules_to_save": ["lm_head"]}}, "plain LoRA, found modules_to_save"),
        ({"config": {"trainable_token_indices": [1]}}, "plain LoRA, found trainable_token_indices"),
        ({"config": {"rank_pattern": {"q_proj": 4}}}, "plain LoRA, found rank_pattern"),
        ({"config": "[1]"}, "adapter_config.json of an adapter cannot be read"),
        ({"config": "{"}, "adapter_config.json of an adapter cannot be read"),
        ({"shapes": {f"{Q_PROJ}.lora_A.weight": (2, 3072)}}, r"expected \(2, 576\), found \(2, 3072\)"),
        ({"shapes": {Q_PROJ.replace(".0.", ".30.") + ".lora_A.weight": (2, 576)}}, "30.self_attn.q_proj.*expected no such tensor"),
        ({"shapes": {"base_model.model.lm_head.weight": (49_153, 576)}}, r"lm_head\.weight: expected no such tensor, found \(49153, 576\)"),
        ({"shapes": {f"{Q_PROJ}.lora_A.weight": None, f"{Q_PROJ}.lora_B.weight": None}}, "tensors in pairs of A and B"),
        ({"shapes": {f"{Q_PROJ}.lora_B.weight": None}}, "tensors in pairs of A and B"),
    ],
)
def test_an_adapter_that_cannot_be_asked_is_refused_with_what_is_wrong(tmp_path, changes, message):
    adapter = make_adapter(tmp_path / "a", **changes)
    with pytest.raises(data.UsageError, match=message):
        infer.check_adapter(adapter)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_weights_that_are_cut_are_refused(tmp_path, size):
    adapter = make_adapter(tmp_path / "a")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(data.UsageError, match=r"adapter_model\.safetensors of an adapter cannot be read \(SafetensorError"):
        infer.check_adapter(adapter)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "training.pkl"])
def test_a_pickle_is_refused_by_its_name_and_is_not_opened(tmp_path, name):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    adapter = make_adapter(tmp_path / "a")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(data.UsageError, match=r"adapter_model\.safetensors of an adapter cannot be read \(No such file.* a pickle, .*, can run code"):
        infer.check_adapter(adapter)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", ["../../elsewhere", "a/b", "", "\x1b[31m", "x" * 300])
def test_the_note_of_the_latest_run_cannot_name_another_folder(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    infer.LATEST.parent.mkdir(parents=True)
    infer.LATEST.write_text(content)
    with pytest.raises(data.UsageError, match="names no run"):
        infer.find_adapter(None)


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
def test_of_an_adapters_folder_nothing_but_weights_and_plain_numbers_is_followed(trained, tmp_path, monkeypatch, small_model):
    """Files of a tokenizer that point elsewhere, code beside the weights, a module to import: the answer is as without them."""
    adapter = tmp_path / "adapter"
    shutil.copytree(trained.folder / "adapter", adapter)
    request = infer.Request("What is croup?", dataclasses.replace(DECODINGS["kit"], max_new_tokens=6))
    (tmp_path / "bomb.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"megatron_core": "bomb", "auto_mapping": {"base_model_class": "x", "parent_library": "bomb"}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_file": "../../../etc/passwd", "auto_map": {"a": "b"}})
    )
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "adapter_model.bin").write_bytes(b"cbomb\nnothing\n.")
    answers = []
    for folder in (trained.folder / "adapter", adapter):
        loaded = infer.load_for_inference(data.PROFILES["cpu"], infer.check_adapter(folder))
        [answer] = infer.answer_requests(loaded, [request])
        answers.append(answer.token_ids)
    assert answers[0] == answers[1] and not (tmp_path / "exploded").exists()


def test_an_adapter_that_names_no_base_model_needs_the_flag(tmp_path):
    adapter = make_adapter(tmp_path / "a", {"base_model_name_or_path": None})
    with pytest.raises(data.UsageError, match="Give the same base model with --base-model"):
        infer.check_adapter(adapter, "cpu")
    assert infer.check_adapter(adapter, "cpu", "smollm2-135m-instruct").profile == data.PROFILES["cpu"]


@pytest.mark.parametrize(
    ("names", "flags", "base"),
    [
        (("unsloth/Llama-3.2-3B-Instruct", None), {}, "unsloth/Llama-3.2-3B-Instruct"),
        (("meta-llama/Llama-3.2-3B-Instruct", None), {}, "unsloth/Llama-3.2-3B-Instruct"),
        (("unsloth/llama-3.2-3b-instruct-unsloth-bnb-4bit", None), {}, "unsloth/Llama-3.2-3B-Instruct"),
        (("unsloth/Llama-3.2-3B-Instruct-bnb-4bit", "t4"), {"choice": "t4"}, "unsloth/Llama-3.2-3B-Instruct"),
        (("unsloth/SmolLM2-135M-Instruct", None), {}, "smollm2-135m-instruct"),
        (("smollm2-135m-instruct", "cpu"), {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"}, "smollm2-135m-instruct"),
        (("FOLDER", "cpu"), {}, "FOLDER"),
        (("/elsewhere/model", None), {"choice": "cpu", "base_model": "FOLDER"}, "FOLDER"),
        (("unsloth/Llama-3.2-3B-Instruct", "t4"), {"choice": "cpu"}, "unsloth/Llama-3.2-3B-Instruct"),
        (("smollm2-135m-instruct", "cpu"), {"base_model": "FOLDER"}, "FOLDER"),
    ],
    ids=str,
)
def test_an_adapter_runs_on_its_own_base_model_by_any_of_its_names(tmp_path, names, flags, base):
    make_base(tmp_path / "base")
    size = 64 if base == "FOLDER" else 3072 if "Llama" in base else 576
    own, base = (str(tmp_path / "base") if each == "FOLDER" else each for each in (names[0], base))
    flags = {name: str(tmp_path / "base") if each == "FOLDER" else each for name, each in flags.items()}
    shapes = {f"{Q_PROJ}.lora_A.weight": (2, size), f"{Q_PROJ}.lora_B.weight": (size, 2)}
    record = {"base_model": own, "profile": names[1]}
    profile = infer.check_adapter(make_adapter(tmp_path / "a", record=record, shapes=shapes), **flags).profile
    assert profile.base_model == base
    assert profile.name == flags.get("choice", "t4" if "Llama-3" in base else "cpu")


@pytest.mark.parametrize(
    ("own", "choice", "base_model", "message"),
    [
        ("smollm2-135m-instruct", "auto", "unsloth/Llama-3.2-1B-Instruct", r"--base-model is unsloth/Llama-3.2-1B"),
        ("/elsewhere/model", "cpu", None, r"which is a local path.*--base-model HUB_ID_OR_FOLDER"),
        ("../../etc", "cpu", None, r"which is a local path"),
        ("some/base", "cpu", None, r"some/base: its config.json cannot be used"),
    ],
)
def test_an_adapter_does_not_run_on_another_base_model(tmp_path, monkeypatch, own, choice, base_model, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    adapter = make_adapter(tmp_path / "a", {"base_model_name_or_path": own})
    with pytest.raises(data.UsageError, match=message):
        infer.check_adapter(adapter, choice, base_model)


def make_base(folder, **changes):
    """The config.json of a small Llama."""
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100} | changes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({name: each for name, each in config.items() if each is not None}))
    return str(folder)


def test_an_adapter_for_a_folder_has_to_have_its_shapes(tmp_path):
    base = make_base(tmp_path / "base")
    fitting = {"q_proj.lora_A": (2, 64), "q_proj.lora_B": (64, 2)}
    shapes = {f"base_model.model.model.layers.0.self_attn.{name}.weight": shape for name, shape in fitting.items()}
    config = {"base_model_name_or_path": "/kaggle/input/model"}
    adapter = make_adapter(tmp_path / "a", config, shapes=shapes)
    assert infer.check_adapter(adapter, "cpu", base).profile.architecture.head_dim == 16
    with pytest.raises(data.UsageError, match=r"does not fit .*base with r 2: .* expected \(2, 64\), found \(2, 576\)"):
        infer.check_adapter(make_adapter(tmp_path / "b", config), "cpu", base)


def chat_of(monkeypatch, capsys, loaded, *lines, decoding=DECODINGS["kit"]):
    """The requests that a chat of these lines makes, and what it prints."""
    given, asked = iter(lines), []
    real = infer.print_answer

    def read(prompt):
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    def answer(loaded, request):
        asked.append(request)
        return real(loaded, request) if loaded.model else SimpleNamespace(text="an answer")

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(infer, "print_answer", answer)
    infer.chat(loaded, decoding, infer.InferConfig(no_repeat_ngram_size=5))
    return asked, capsys.readouterr()


def test_chat_commands(monkeypatch, capsys):
    loaded = infer.LoadedModel(None, None, data.PROFILES["cpu"], "0")
    lines = ("a?", " ", "/decoding plain", "b?", "/decoding best", "/dance now", "/help", "/", " /reset", "c?", "/quit", "d?")
    asked, shown = chat_of(monkeypatch, capsys, loaded, *lines)
    assert [request.question for request in asked] == ["a?", "b?", "c?"]
    # A flag also changes a preset that is chosen later.
    chosen = dataclasses.replace(DECODINGS["plain"], no_repeat_ngram_size=5)
    assert [request.decoding for request in asked] == [DECODINGS["kit"], chosen, chosen]
    assert [request.history for request in asked] == [(), (("a?", "an answer"),), ()]
    assert shown.err.count("/decoding NAME (plain, story-collapse") == 5 and shown.out == ""


# --- The small model


@pytest.fixture
def few_rows(monkeypatch):
    """Four rows in a forward pass. Not for tests that judge answers: the reference is cached, and is of full passes."""
    monkeypatch.setattr(infer, "ROWS", 4)


@pytest.mark.slow
def test_the_converted_model_gives_the_logits_of_the_gguf_model(small_model):
    import torch
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(data.gguf_folder(), gguf_file=data.GGUF_FILE, dtype=torch.float32)
    ids = torch.tensor([data.encode_prompt(small_model.tokenizer, QUESTIONS[0])])
    with torch.inference_mode():
        assert torch.equal(small_model.model(input_ids=ids).logits, original.eval()(input_ids=ids).logits)


@pytest.mark.slow
def test_special_tokens_agree_in_tokenizer_config_and_generation_config(small_model):
    for holder in (small_model.tokenizer, small_model.model.config, small_model.model.generation_config):
        assert (holder.eos_token_id, holder.pad_token_id) == (2, 0)
    files = {path.name for path in Path(infer.base_model_path(data.SMALL_MODEL)).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert not any(name.endswith((".bin", ".pt")) for name in files)


@pytest.mark.slow
@pytest.mark.long
def test_the_small_model_is_made_once_and_whole_by_two_processes_after_one_was_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    program = [sys.executable, "-c", "import data, infer; print(infer.base_model_path(data.SMALL_MODEL))"]

    def start():
        return subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    killed = start()
    while killed.poll() is None and not (data.cache_home() / f"{data.SMALL_MODEL}.part").exists():
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (data.cache_home() / data.SMALL_MODEL).exists()
    paths = {process.communicate()[0] for process in [start(), start()]}
    assert paths == {f"{data.cache_home() / data.SMALL_MODEL}\n"}
    assert (data.cache_home() / data.SMALL_MODEL / "model.safetensors").stat().st_size > 500e6
    assert not list(data.cache_home().glob("*.part"))


def make_gumbel_processor(seed):
    """Gumbel noise on the first row's scores, implemented independently of infer.py."""
    import torch
    from transformers import LogitsProcessor

    generator = torch.Generator().manual_seed(seed)

    class GumbelProcessor(LogitsProcessor):
        def __call__(self, input_ids, scores):
            uniform = torch.rand(scores.shape[1], generator=generator, dtype=torch.float64)
            return scores + (-(-uniform.log()).log()).to(scores.dtype)

    return GumbelProcessor()


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("name", DECODINGS)
def test_every_preset_gives_the_ids_of_the_librarys_own_generate(small_model, name):
    """The library's own processors with equal batch and dtype: our batching changes no answer."""
    import torch
    from transformers import (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopPLogitsWarper,
    )

    decoding = dataclasses.replace(DECODINGS[name], max_new_tokens=32)
    ids = torch.tensor([data.encode_prompt(small_model.tokenizer, QUESTIONS[0])] * infer.ROWS)
    keywords = {
        "plain": {},
        "story-collapse": {"no_repeat_ngram_size": 3},
        "story-fix": {"repetition_penalty": 1.3},
        "week3": {"logits_processor": [TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.9), make_gumbel_processor(0)]},
        "kit": {
            "logits_processor": [
                RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty, prompt_ignore_length=ids.shape[1])
            ]
        },
    }
    expected = small_model.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32, **keywords[name]
    )
    [answer] = infer.answer_requests(small_model, [Request(QUESTIONS[0], decoding)])
    expected_ids, _ = infer.cut_answer(expected[0, ids.shape[1] :].tolist(), 32, [2])
    assert answer.token_ids == expected_ids


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
def test_nothing_is_inherited_from_a_generation_config_that_lies_around(small_model):
    request = Request(QUESTIONS[0], Decoding(max_new_tokens=24))
    [clean] = infer.answer_requests(small_model, [request])
    config = small_model.model.generation_config
    before = config.to_dict()
    try:
        config.update(repetition_penalty=1.8, do_sample=True, temperature=5.0, no_repeat_ngram_size=1, min_length=500)
        [again] = infer.answer_requests(small_model, [request])
    finally:
        config.update(**{"repetition_penalty": None, "no_repeat_ngram_size": None, "min_length": None, **before})
    assert again == clean


@pytest.mark.slow
def test_a_penalty_on_the_answer_alone_leaves_prompt_tokens_and_stop_token_untouched(small_model):
    """The library's penalty on the prompt lowers the end-of-turn token, which the template puts there: answers did not end."""
    import torch

    tokenizer = small_model.tokenizer
    prompt = data.encode_prompt(tokenizer, QUESTIONS[0])
    written = tokenizer(" A cold", add_special_tokens=False)["input_ids"]
    ids, scores = torch.tensor([prompt + written]), torch.full((1, len(tokenizer)), 10.0)
    answer_only = infer.make_row_processor([Decoding(repetition_penalty=2.0)], len(prompt))(ids, scores)
    assert {place for place in range(len(tokenizer)) if answer_only[0, place] != 10} == set(written)
    everything = infer.make_row_processor([Decoding(repetition_penalty=2.0, count_prompt=True)], len(prompt))(ids, scores)
    assert everything[0, tokenizer.eos_token_id] == 5 and answer_only[0, tokenizer.eos_token_id] == 10
    assert torch.equal(scores, torch.full_like(scores, 10.0))


@pytest.mark.slow
def test_a_ban_on_the_answer_alone_lets_an_answer_end_as_the_question_did(small_model):
    """The library's ban forbids the end of turn after "heart attack?", since the question ended so."""
    import torch

    tokenizer = small_model.tokenizer
    prompt = data.encode_prompt(tokenizer, "What is a heart attack?")
    ids = torch.tensor([prompt + tokenizer(" heart attack?", add_special_tokens=False)["input_ids"]])
    scores = torch.zeros(1, len(tokenizer))
    bans = [
        infer.make_row_processor([Decoding(no_repeat_ngram_size=3, count_prompt=count)], len(prompt))(ids, scores)
        for count in (True, False)
    ]
    assert bans[0][0, tokenizer.eos_token_id] == -float("inf") and bans[1][0, tokenizer.eos_token_id] == 0


@pytest.mark.slow
def test_an_answer_is_the_same_alone_in_any_company_and_on_one_thread_or_two(small_model):
    import torch

    decodings = [dataclasses.replace(decoding, max_new_tokens=16) for decoding in DECODINGS.values()]
    requests = [Request(question, decoding) for question, decoding in itertools.product(QUESTIONS, decodings)]
    together = infer.answer_requests(small_model, requests)
    assert [(each.question, each.decoding) for each in together] == [(each.question, each.decoding) for each in requests]
    backwards = infer.answer_requests(small_model, requests[::-1])[::-1]
    alone = [infer.answer_requests(small_model, [request])[0] for request in requests[::4]]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one_thread = infer.answer_requests(small_model, requests)
    finally:
        torch.set_num_threads(threads)
    assert together == backwards == one_thread
    assert together[::4] == alone


@pytest.mark.slow
def test_padding_is_no_part_of_what_a_penalty_counts():
    import torch

    pad, word = 3, 5
    ids, scores = torch.tensor([[pad, pad, word, 7]]), torch.ones(1, 10)
    decoding = Decoding(repetition_penalty=2.0, count_prompt=True)
    scored = infer.make_row_processor([decoding], prompt_tokens=3, padding=[2])(ids, scores)[0].tolist()
    assert scored[pad] == 1 and scored[word] == scored[7] == 0.5


@pytest.mark.slow
def test_a_prompt_that_rows_share_gives_the_same_answers_read_once_or_row_by_row(small_model):
    presets = [dataclasses.replace(decoding, max_new_tokens=16) for decoding in DECODINGS.values()]
    requests = [Request(question, decoding) for question in QUESTIONS for decoding in presets]
    shared = infer.answer_requests(small_model, requests)
    profile = dataclasses.replace(small_model.profile, shares_prompts=False)
    row_by_row = infer.answer_requests(dataclasses.replace(small_model, profile=profile), requests)
    assert [answer.token_ids for answer in shared] == [answer.token_ids for answer in row_by_row]


@pytest.mark.slow
def test_prompts_of_any_length_are_answered_together_as_they_are_alone(small_model):
    """Equal bytes, since the padding of a prompt does not depend on the others."""
    decoding = infer.Decoding(max_new_tokens=6, repetition_penalty=1.1)
    questions = ["What is a stye?", "Why?", "How long does a cold last?", "I cough. " * 30 + "What is it?"]
    requests = [Request(question, decoding) for question in questions]
    together = infer.answer_requests(small_model, requests)
    alone = [infer.answer_requests(small_model, [request])[0] for request in requests]
    assert together == alone
    widths = [answer.prompt_tokens // infer.PROMPT_MULTIPLE for answer in together]
    assert len(set(widths[:3])) == 1 and widths[3] > widths[0]


@pytest.mark.slow
def test_grouped_attention_is_the_librarys_attention(small_model):
    """Including left padding, whose outputs are not used."""
    import torch

    ids = torch.randint(100, 10_000, (3, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    with torch.inference_mode():
        grouped = small_model.model(input_ids=ids, attention_mask=mask).logits
        small_model.model.set_attn_implementation("sdpa")
        try:
            library = small_model.model(input_ids=ids, attention_mask=mask).logits
        finally:
            small_model.model.set_attn_implementation("grouped")
    seen = mask.bool()
    torch.testing.assert_close(grouped[seen], library[seen], atol=1e-3, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
def test_the_pieces_of_a_streamed_answer_are_together_its_text(small_model):
    pieces = []
    requests = [Request(question, Decoding(max_new_tokens=48)) for question in QUESTIONS]
    first, *_ = infer.answer_requests(small_model, requests, on_text=pieces.append)
    assert "".join(pieces) == first.text and len(pieces) > 10
    assert not any("<|" in piece for piece in pieces)


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
def test_answers_that_differ_only_in_cap_or_stop_may_be_cut_from_one_run(small_model):
    penalty = Decoding(12, repetition_penalty=1.3, count_prompt=True)
    sampled = Decoding(12, temperature=0.7, top_p=0.9)
    requests = [
        Request(QUESTIONS[0], dataclasses.replace(decoding, **change))
        for decoding in (Decoding(12), penalty, sampled)
        for change in ({}, {"max_new_tokens": 5}, {"stop": "generation-config"}, {"stop": "never", "max_new_tokens": 20})
    ]
    told = []
    together = infer.answer_requests(small_model, requests, told.append)
    assert together == [infer.answer_requests(small_model, [request])[0] for request in requests]
    assert sum(told) == infer.count_new_tokens(requests) == 3 * 20


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
def test_a_run_without_a_stop_goes_on_behind_the_stop_token(small_model):
    """Answers cut from one generation equal those generated alone."""
    decoding = Decoding(144, repetition_penalty=1.1)
    requests = [
        Request("What are the early symptoms of type 2 diabetes?", each)
        for each in (decoding, dataclasses.replace(decoding, stop="never"))
    ]
    stopped, going_on = infer.answer_requests(small_model, requests)
    assert stopped.finish_reason == "stop" and stopped.answer_tokens < 144
    assert going_on.finish_reason == "length" and going_on.answer_tokens == 144
    assert going_on.token_ids[: stopped.answer_tokens] == stopped.token_ids


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("name", ["plain", "story-collapse", "story-fix", "week3", "kit"])
def test_overruled_tokens_are_those_where_the_model_would_have_gone_elsewhere(small_model, name):
    """Counted again by one forward pass over the whole answer. Sampling alone overrules nothing."""
    import torch

    decoding = dataclasses.replace(infer.DECODINGS[name], max_new_tokens=40)
    [answer] = infer.answer_requests(small_model, [Request(QUESTIONS[0], decoding)])
    prompt = data.encode_prompt(small_model.tokenizer, QUESTIONS[0])
    with torch.no_grad():
        logits = small_model.model(torch.tensor([prompt + answer.token_ids])).logits[0, len(prompt) - 1 : -1]
    elsewhere = (logits.argmax(-1) != torch.tensor(answer.token_ids)).sum().item()
    if decoding.temperature:
        assert answer.num_overruled == 0 < elsewhere
    else:
        assert answer.num_overruled == elsewhere
        assert (elsewhere > 0) == (name != "plain")


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
def test_progress_reaches_requests_times_cap_also_when_answers_end_early(small_model):
    told = []
    infer.answer_requests(small_model, [Request(question, Decoding(max_new_tokens=8)) for question in QUESTIONS], told.append)
    assert sum(told) == 3 * 8


@pytest.mark.slow
def test_a_question_that_leaves_no_room_for_its_answer_is_refused_with_numbers(small_model):
    with pytest.raises(data.UsageError, match=r"has a prompt of \d{4} tokens; with an answer of up to 256, .* 1024"):
        infer.answer_requests(small_model, [Request("Why? " * 1000, Decoding())])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("a very long question " * 4762, r"has a prompt of \d+ tokens; with an answer of up to 8, this exceeds the maximum of 1024"),
        ("?", "question is empty"),
        ("\x00" * 100_000, "question is empty"),
        ("Is it \x00 or \x9b31m?", r"contains \\x00 at character 7"),
        ("half \ud800 a pair?", r"contains \\ud800 at character 6"),
    ],
    ids=["100,000 characters", "no words", "100,000 controls", "a control", "half a character"],
)
def test_a_question_that_cannot_be_asked_is_one_short_message(small_model, question, message):
    with pytest.raises(data.UsageError, match=message) as caught:
        infer.answer_requests(small_model, [Request(question, Decoding(max_new_tokens=8))])
    assert len(str(caught.value)) < 400 and data.escape_controls(str(caught.value)) == str(caught.value)


@pytest.mark.slow
def test_a_chat_remembers_its_turns(small_model, monkeypatch, capsys):
    lines = ("What causes a cold?", "And hiccups?", "Why? " * 500, "So?")
    asked, shown = chat_of(monkeypatch, capsys, small_model, *lines, decoding=Decoding(max_new_tokens=8))
    history = asked[-1].history
    assert [question for question, _ in history] == ["What causes a cold?", "And hiccups?"]
    assert shown.out.split("\n")[0] == history[0][1] and "/reset" in shown.err
    [again] = infer.answer_requests(small_model, [Request("And hiccups?", Decoding(max_new_tokens=8), history[:1])])
    assert again.text == history[1][1]

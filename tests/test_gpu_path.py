"""The t4 profile against Unsloth's GPU code, on a machine without a GPU."""

import json
import re

import pytest
from conftest import ROOT, run_script
from gpu_workplace import finish, start_module, start_training

from tests import gpu_check


def run_module(*arguments, cwd):
    return finish(start_module(*arguments, cwd=cwd))


@pytest.mark.slow
def test_what_we_pass_binds_to_the_signatures_of_the_gpu_path():
    ran = run_module("tests.gpu_signatures", cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    # Unsloth hands it on to transformers' loader.
    assert found["unknown"].pop("from_pretrained") == ["use_safetensors"]
    assert all(unknown == [] for unknown in found["unknown"].values()), found["unknown"]
    assert found["typo"] == ["max_seq_lenght"]
    # "none" comes out as an empty list. A typo would be printed as ignored.
    assert found["changed"] == ["report_to"] and found["said"] == ""
    assert found["unset_differing_defaults"] == []
    assert found["fp16"] and not found["bf16"]


@pytest.mark.slow
@pytest.mark.long
def test_the_steps_of_the_gpu_check_run_on_a_cpu(tmp_path):
    """All but those that have no code for a CPU; with tiny models, so that its figures mean nothing."""
    ran = run_script("tests.gpu_check", "--rehearse", "--folder", tmp_path, "--minutes", "30", cwd=ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["train"]["equal_in_new_process"] and found["train"]["record"]["numbers"]["steps"] == 2
    assert found["resume"]["resumed"] and found["resume"]["identical"]
    assert found["answers"]["small"]["equal"] == found["answers"]["small"]["alone"] == 16
    for step in ("kit", "typical", "tuned", "kit-16bit"):
        assert len(found[step]["losses"]) == gpu_check.NUM_STEPS
    assert [line.split()[0] for line in ran.stdout.splitlines() if "needs a GPU" in line] == ["fp16", "trl"]


def read_metrics(backend, cwd):
    lines = (cwd / "runs" / "train" / backend / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def workplace(gpu_process):
    return gpu_process[0]


@pytest.fixture(scope="module")
def gpu_run(gpu_process):
    return finish(gpu_process[1])


@pytest.mark.slow
@pytest.mark.gpu_path
def test_the_t4_recipe_runs_through_unsloths_gpu_code(workplace, gpu_run):
    assert gpu_run.returncode == 0, gpu_run.stderr
    log = (workplace / "libraries.txt").read_text()
    assert "Tesla T4" in log and "patched 2 layers with 2 QKV layers, 2 O layers and 2 MLP layers" in log
    assert "Padding-free enabled" in log
    [planned] = set(re.findall(r"adapter file +([\d,]+ bytes)", gpu_run.stdout))
    assert f"adapter   runs/train/gpu/adapter ({planned})" in gpu_run.stdout
    stopped, went_on = "Stopped by --max-hours after 1 of 2 steps", "resuming runs/train/gpu after step 1 of 2"
    assert gpu_run.stdout.index(stopped) < gpu_run.stdout.index(went_on)
    files = {path.name for path in (workplace / "runs" / "train" / "gpu").iterdir()}
    assert files == {"run.json", "metrics.jsonl", "samples", "adapter"}
    for step in (0, 1, 2):
        lines = (workplace / "runs" / "train" / "gpu" / "samples" / f"{step}.jsonl").read_text().splitlines()
        assert len(lines) == 2 and all(json.loads(line)["token_ids"] for line in lines)
    assert not (workplace / "unsloth_compiled_cache").exists()


@pytest.mark.slow
@pytest.mark.gpu_path
def test_the_terminal_shows_nothing_of_the_libraries(gpu_run):
    for word in ("nsloth", "Warning", "WARNING", "num_items"):
        assert word not in gpu_run.stdout + gpu_run.stderr


@pytest.mark.slow
@pytest.mark.gpu_path
def test_the_loss_of_a_step_is_a_mean_over_all_tokens_of_its_passes(workplace, gpu_run):
    """Not a mean of the means of its passes, which would weigh a token of a pass with few of them more."""
    losses = [json.loads(line) for line in (workplace / "losses.jsonl").read_text().splitlines()]
    trained = [loss for loss in losses if loss["divisor"] is not None]  # an evaluation takes plain means
    assert len(trained) == 2 * 2
    for passes in (trained[:2], trained[2:]):
        assert {loss["divisor"] for loss in passes} == {sum(loss["tokens"] for loss in passes)}
    assert any(loss["tokens"] != trained[0]["tokens"] for loss in trained)


@pytest.mark.slow
@pytest.mark.gpu_path
def test_losses_and_gradients_agree_with_the_cpu_backend(workplace, gpu_run):
    """With gate and stop here, without them there."""
    cpu_run = finish(start_training("cpu", workplace, num_probes=0))
    assert cpu_run.returncode == 0, cpu_run.stderr
    gpu, cpu = (read_metrics(backend, workplace) for backend in ("gpu", "cpu"))
    assert [line["step"] for line in gpu] == [line["step"] for line in cpu] == [0, 1, 1, 2, 2]
    compared = 0
    for ours, theirs in zip(gpu, cpu, strict=True):
        for name in ours.keys() & {"loss", "eval_loss", "grad_norm", "learning_rate"}:
            assert ours[name] == pytest.approx(theirs[name], rel=0.01), (ours, theirs)
            compared += 1
    assert compared == 3 + 2 * 3


@pytest.mark.slow
@pytest.mark.gpu_path
def test_an_adapter_of_the_gpu_path_is_asked_through_its_generate(workplace, gpu_run):
    """An untrained model repeats one token, so the n-gram ban must change its answer."""
    flags = ["--adapter", "runs/train/gpu/adapter", "--max-new-tokens", "6", "--no-repeat-ngram-size", "1", "--json"]
    ran = run_module("tests.gpu_path", "gpu", workplace / "base", "infer", "What is it?", *flags, cwd=workplace)
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout.splitlines()[-1])
    assert len(set(answer["token_ids"])) == answer["answer_tokens"] > 1
    assert answer["adapter"] is not None

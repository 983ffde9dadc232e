"""The t4 profile held against Unsloth's GPU code, on a machine without a GPU."""

import json
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT, load_llama_tokenizer, write_rows

# Special tokens of Llama 3.2 behind so many of its ordinary ones: its loss over the whole vocabulary takes minutes here.
NUM_ORDINARY_TOKENS = 8000


def run_module(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_what_we_pass_binds_to_the_signatures_of_the_gpu_path():
    ran = run_module("tests.gpu_signatures", cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert all(unknown == [] for unknown in found["unknown"].values()), found["unknown"]
    assert found["typo"] == ["max_seq_lenght"]
    # "none" comes out as an empty list. A typo would be printed as ignored.
    assert found["changed"] == ["report_to"] and found["said"] == ""
    assert found["unset_differing_defaults"] == []
    assert found["fp16"] and not found["bf16"]


def cut_vocabulary(tokenizer):
    """Llama 3.2's tokenizer with its first ordinary tokens only, and all its special ones right behind them."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = {token: number for token, number in content["model"]["vocab"].items() if number < NUM_ORDINARY_TOKENS}
    content["model"]["vocab"] = vocabulary
    content["model"]["merges"] = [
        [left, right] for left, right in content["model"]["merges"] if {left, right, left + right} <= vocabulary.keys()
    ]
    for place, token in enumerate(content["added_tokens"]):
        token["id"] = NUM_ORDINARY_TOKENS + place
    content["post_processor"] = None
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        chat_template=tokenizer.chat_template,
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a Llama of two narrow layers in `base`, and a few short rows: a token costs milliseconds here."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    cwd = tmp_path_factory.mktemp("gpu_path")
    tokenizer = cut_vocabulary(load_llama_tokenizer())
    stops = [tokenizer.convert_tokens_to_ids(token) for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).half()
    model.generation_config.eos_token_id = stops
    model.save_pretrained(cwd / "base")
    tokenizer.save_pretrained(cwd / "base")
    for source in ("conversational", "encyclopedic"):
        answer = "It is the number {}, and it is no other. " + "It stays so. "
        rows = [{"question": f"What is {source} {n}?", "answer": answer.format(n) * (1 + n % 2)} for n in range(10)]
        write_rows(cwd / f"{source}.jsonl", rows)
    return cwd


def train_on(backend, cwd, num_probes):
    """`train.py` with the t4 values: two steps of two passes, two rows a pass, and three evaluations."""
    flags = ["--name", backend, "--max-steps", "2", "--num-probes", str(num_probes), "--per-device-train-batch-size", "2"]
    rows = ["--conversational", "conversational.jsonl", "--encyclopedic", "encyclopedic.jsonl"]
    return run_module("tests.gpu_path", backend, cwd / "base", "train", *flags, *rows, cwd=cwd)


def read_metrics(backend, cwd):
    lines = (cwd / "runs" / "train" / backend / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def gpu_run(workplace):
    return train_on("gpu", workplace, num_probes=2)


@pytest.mark.slow
@pytest.mark.gpu_path
def test_the_t4_recipe_runs_through_unsloths_gpu_code(workplace, gpu_run):
    assert gpu_run.returncode == 0, gpu_run.stderr
    assert "Tesla T4" in gpu_run.stderr and "patched 2 layers with 2 QKV layers, 2 O layers and 2 MLP layers" in gpu_run.stderr
    assert "Padding-free enabled" in gpu_run.stderr
    assert "adapter" in gpu_run.stdout and "as planned" in gpu_run.stdout
    files = {path.name for path in (workplace / "runs" / "train" / "gpu").iterdir()}
    assert files == {"run.json", "metrics.jsonl", "samples.jsonl", "curves.png", "adapter"}
    samples = [json.loads(line) for line in (workplace / "runs" / "train" / "gpu" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 1, 1, 2, 2] and all(sample["token_ids"] for sample in samples)
    assert not (workplace / "unsloth_compiled_cache").exists()


@pytest.mark.slow
@pytest.mark.gpu_path
def test_losses_and_gradients_agree_with_the_cpu_backend(workplace, gpu_run):
    """With the gate here and without it there. The CPU backend's LoRA on a 4-bit base is bf16, half the planned bytes."""
    cpu_run = train_on("cpu", workplace, num_probes=0)
    assert cpu_run.returncode == 0 and "is not what was planned" in cpu_run.stderr, cpu_run.stderr
    gpu, cpu = (read_metrics(backend, workplace) for backend in ("gpu", "cpu"))
    assert [line["step"] for line in gpu] == [line["step"] for line in cpu] == [0, 1, 1, 2, 2]
    compared = 0
    for ours, theirs in zip(gpu, cpu, strict=True):
        for name in ours.keys() & {"train_loss", "eval_loss", "grad_norm", "learning_rate"}:
            assert ours[name] == pytest.approx(theirs[name], rel=0.01), (ours, theirs)
            compared += 1
    assert compared == 3 + 2 * 3


@pytest.mark.slow
@pytest.mark.gpu_path
def test_an_adapter_of_the_gpu_path_is_asked_through_its_generate(workplace, gpu_run):
    """A model that has learned nothing repeats one token; a ban on repeating any, which is ours to pass, has to act."""
    flags = ["--adapter", "runs/train/gpu/adapter", "--max-new-tokens", "6", "--no-repeat-ngram-size", "1", "--json"]
    ran = run_module("tests.gpu_path", "gpu", workplace / "base", "infer", "What is it?", *flags, cwd=workplace)
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout.splitlines()[-1])
    assert len(set(answer["token_ids"])) == answer["answer_tokens"] > 1
    assert answer["adapter"] is not None

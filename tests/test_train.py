"""Plan, guard, order of rows and exports of train.py; what trains is marked slow."""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ENVIRONMENT, ROOT, load_llama_tokenizer, make_row, run_script

import data
import infer
import train
from data import UsageError


def make_recipe(**changes):
    profile = changes.pop("profile", "t4")
    return dataclasses.replace(train.resolve_recipe(train.TrainConfig(profile=profile)), **changes)


def make_plan(recipe, dtype, rows=(10_000, 2_500_000, 1024)):
    return train.make_plan(recipe, dtype, train.RowCounts(*rows))


# --- The recipe


def test_the_t4_recipe_is_the_storys():
    recipe = make_recipe()
    assert (recipe.r, recipe.lora_alpha, recipe.learning_rate, recipe.max_seq_length) == (16, 32, 2e-4, 1024)
    assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps == 16
    assert (recipe.optim, recipe.use_gradient_checkpointing, recipe.pad) == ("adamw_8bit", "unsloth", "native")
    assert recipe.padding_free and recipe.load_in_4bit


@pytest.mark.parametrize(("processes", "batch", "passes"), [(1, 16, 1), (2, 8, 1), (4, 4, 1), (8, 2, 1), (16, 1, 1)])
def test_a_step_has_16_rows_on_any_number_of_gpus(monkeypatch, processes, batch, passes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    recipe = make_recipe()
    assert (recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps) == (batch, passes)


@pytest.mark.parametrize(("processes", "batch", "message"), [("3", None, "3 processes"), ("2", 16, "a divisor of 8 is wanted")])
def test_processes_that_do_not_divide_16_are_refused(monkeypatch, processes, batch, message):
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(ValueError, match=message):
        train.TrainConfig(profile="t4", per_device_train_batch_size=batch)


@pytest.mark.parametrize(
    ("rows", "changes", "steps"),
    [
        (285, {}, 18),  # 72 batches of 4, 4 of them a step
        (16, {}, 1),
        (17, {}, 2),
        (10_000, {"epochs": 2.0}, 1250),
        (285, {"epochs": 0.5}, 9),
        (285, {"max_steps": 7}, 7),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(rows, changes, steps):
    assert make_recipe(**changes).count_steps(rows) == steps


# --- The plan


@pytest.mark.parametrize(
    ("targets", "pad", "dtype", "size"),
    [
        ("attention", "native", "float16", 36_730_224),
        ("all-linear", "native", "float16", 97_307_544),
        # The story's 3.19 GB: an embedding in fp32, resized by one row, written with the head although the two are tied.
        ("attention", "added", "float32", 3_188_775_512),
        ("attention", "added", "float16", 1_612_752_472),
        ("all-linear", "added", "float32", 3_249_353_456),
    ],
)
def test_the_adapter_of_the_3b_model_is_planned_to_the_byte(targets, pad, dtype, size):
    recipe = make_recipe(target_modules=targets, pad=pad)
    assert train.count_safetensors_bytes(train.saved_tensors(train.build_meta_adapter(recipe, dtype), pad)) == size


def test_the_planned_size_is_that_of_a_file_safetensors_writes(tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = {
        "b": torch.zeros(3, 5),
        "a.long": torch.zeros(7, dtype=torch.bfloat16),
        "c": torch.zeros(2, 2, dtype=torch.float16),
        "ä": torch.zeros(1),
    }
    for count in range(1, len(tensors) + 1):
        some = dict(itertools.islice(tensors.items(), count))
        save_file(some, tmp_path / "t.safetensors", metadata={"format": "pt"})
        assert train.count_safetensors_bytes(some) == (tmp_path / "t.safetensors").stat().st_size


@pytest.mark.parametrize("profile", ["t4", "cpu"])
def test_weights_are_those_of_the_architecture(profile):
    arch = data.PROFILES[profile].architecture
    recipe = make_recipe(profile=profile, load_in_4bit=False)
    model = train.build_meta_adapter(recipe, "float32")
    base = sum(tensor.numel() for name, tensor in model.named_parameters() if "lora_" not in name)
    norms = (2 * arch.num_hidden_layers + 1) * arch.hidden_size
    assert train.count_weight_bytes(recipe, 2)[0] == 2 * (base - norms)
    assert base == {"t4": 3_212_749_824, "cpu": 134_515_008}[profile]


def test_the_small_models_architecture_is_that_of_its_file():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(data.gguf_folder(), gguf_file=data.GGUF_FILE)
    for name, value in dataclasses.asdict(data.PROFILES["cpu"].architecture).items():
        assert getattr(config, name) == value, name


@pytest.mark.parametrize("profile", ["t4", "cpu"])
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [192, 320])
def test_planned_activations_are_what_autograd_keeps_of_a_layer(profile, targets, dtype, tokens):
    """A real layer of the architecture, with LoRA, in the autocast that trains it; its weights are not counted."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    recipe, dtype = make_recipe(profile=profile, target_modules=targets), getattr(torch, dtype)
    sizes = dataclasses.asdict(data.PROFILES[profile].architecture) | {"num_hidden_layers": 1, "vocab_size": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype)
        lora = LoraConfig(r=recipe.r, target_modules=train.TARGET_MODULES[targets], task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    model = model.to_empty(device="cpu")
    train.quicken(model, data.PROFILES[profile])
    model = model.get_base_model().model
    kept = {}
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        # LoRA's matrices in autocast's dtype are kept as well, and do not grow with the tokens.
        if storage._cdata not in weights and not (tensor.ndim == 2 and recipe.r in tensor.shape and tokens not in tensor.shape):
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    hidden = torch.zeros(1, tokens, sizes["hidden_size"], dtype=dtype, requires_grad=True)
    rotary = model.rotary_emb(hidden, torch.arange(tokens)[None])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model.layers[0](hidden, position_embeddings=rotary, attention_mask=None)
    counted = sum(size for size, _ in kept.values())
    assert train.count_activation_bytes(recipe, 1, tokens, dtype.itemsize) == pytest.approx(counted, rel=0.05)


def test_the_t4_run_fits_and_a_larger_batch_needs_more():
    plans = [make_plan(make_recipe(per_device_train_batch_size=batch), "float16") for batch in (1, 4, 16)]
    assert plans[1].fits
    assert [plan.memory_peak for plan in plans] == sorted(plan.memory_peak for plan in plans)
    assert plans[1].memory["LoRA weights"] == 4 * plans[1].trainable_parameters == 4 * 24_313_856
    # Hidden states of 28 layers, 3,072 numbers of 2 bytes, 4 x 1,024 tokens.
    assert plans[1].host_memory["activations kept for the GPU"] == 28 * 3072 * 2 * 4096


def test_the_plan_bounds_what_a_t4_was_seen_to_need():
    """Unsloth's own notebook on a T4: r 16 on all linear layers, 2 x 2,048 tokens a pass, 6.53 GiB reserved at the peak, with
    a loss that held all logits (their fp16 form and its fp32 copy are put in place of the chunked loss here)."""
    plan = make_plan(make_recipe(per_device_train_batch_size=2), "float16", (100, 10_000, 2048))
    all_logits = 2 * 2048 * 128_256 * (2 + 4)
    assert (plan.memory_peak - plan.memory["logits and loss"] + all_logits) / train.GIB == pytest.approx(6.531, rel=0.1)


def test_a_plan_that_does_not_fit_says_so(tmp_path):
    recipe = make_recipe(per_device_train_batch_size=16, use_gradient_checkpointing=False)
    plan = make_plan(recipe, "float16")
    assert not plan.fits
    assert "IS MORE THAN THERE IS" in train.format_plan(plan, recipe, tmp_path / "run")


# --- The pad token


@pytest.fixture(scope="module")
def tiny():
    """A Llama of two narrow layers with Llama 3.2's own tokenizer and vocabulary, in the table in place of the 3B model."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = data.Architecture(64, 128, 2, 2, 1, 32, vocab_size=128_256)
    profiles = dict(data.PROFILES)
    data.PROFILES["t4"] = dataclasses.replace(profiles["t4"], architecture=sizes)

    def build(**lora):
        model = LlamaForCausalLM(LlamaConfig(**dataclasses.asdict(sizes), pad_token_id=128_004))
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj"], **lora}))

    yield build
    data.PROFILES.update(profiles)


def test_a_native_pad_passes_the_guard_and_is_llamas_own(tiny):
    tokenizer = load_llama_tokenizer()
    assert tokenizer.convert_tokens_to_ids(data.PAD_TOKENS[0]) == 128_004 == tokenizer.pad_token_id
    assert (tokenizer.eos_token_id, data.end_of_turn_id(tokenizer), len(tokenizer)) == (128_009, 128_009, 128_256)
    train.check_before_training(tiny(), tokenizer, make_recipe())


def test_an_added_pad_is_refused_unless_it_is_asked_for(tiny):
    tokenizer, model = load_llama_tokenizer(), tiny()
    infer.add_pad_token(model, tokenizer)
    assert tokenizer.pad_token_id == 128_256
    with pytest.raises(UsageError, match=r"The embedding has 128,257 rows.* 128,256 rows are wanted\. A token was added"):
        train.check_before_training(model, tokenizer, make_recipe())
    train.check_before_training(model, tokenizer, make_recipe(pad="added"))


def test_the_row_of_an_added_pad_is_the_same_whatever_was_drawn_before(tiny):
    import torch

    rows = []
    for seed in (1, 2):
        tokenizer, model = load_llama_tokenizer(), tiny()
        torch.manual_seed(seed)
        expected = torch.rand(1)
        torch.manual_seed(seed)
        infer.add_pad_token(model, tokenizer)
        rows.append(model.get_input_embeddings().weight[-1])
        assert torch.equal(torch.rand(1), expected)
    assert torch.equal(*rows) and rows[0].abs().max() > 0


def test_pad_that_is_eos_and_weights_that_are_not_loras_are_refused_all_at_once(tiny):
    tokenizer, model = load_llama_tokenizer(), tiny(modules_to_save=["embed_tokens"])
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(UsageError) as caught:
        train.check_before_training(model, tokenizer, make_recipe())
    message = str(caught.value)
    assert "Pad is '<|eot_id|>' (128009); a token of its own is wanted" in message
    assert "saved whole" in message and "tensors other than LoRA's would be trained" in message


def test_a_saved_file_that_is_not_the_planned_one_is_refused(tiny, tmp_path):
    recipe = make_recipe(r=2)
    plan = make_plan(recipe, "float32")
    model = tiny(target_modules=train.TARGET_MODULES["all-linear"])
    model.save_pretrained(tmp_path / "good", save_embedding_layers=False)
    train.check_saved(tmp_path / "good" / "adapter_model.safetensors", plan, "native")
    model.save_pretrained(tmp_path / "huge", save_embedding_layers=True)
    with pytest.raises(UsageError, match=r"planned 19,856; tensors other than LoRA's: .*embed_tokens.*--pad native"):
        train.check_saved(tmp_path / "huge" / "adapter_model.safetensors", plan, "native")
    tiny().save_pretrained(tmp_path / "few", save_embedding_layers=False)
    with pytest.raises(UsageError, match="tensors other than LoRA's: none"):
        train.check_saved(tmp_path / "few" / "adapter_model.safetensors", plan, "native")


# --- The order of rows


def test_rows_of_like_length_share_a_step_in_an_order_of_seed_and_epoch_alone():
    import torch

    lengths = [(7 * number) % 97 + 1 for number in range(1600)]
    sampler = train.LikeLengthsSampler(lengths, seed=1)
    first = list(sampler)
    torch.manual_seed(5)
    assert list(train.LikeLengthsSampler(lengths, seed=1)) == first
    assert Counter(first) == Counter(range(1600))
    sampler.set_epoch(1)
    assert list(sampler) != first
    steps = [[lengths[place] for place in first[start : start + 16]] for start in range(0, 1600, 16)]
    assert sum(max(step) - min(step) for step in steps) / len(steps) < 15


# --- Out of the kit


def test_the_modelfile_renders_the_prompt_that_was_trained_on():
    tokenizer = load_llama_tokenizer()
    modelfile = train.make_modelfile(tokenizer, infer.DECODINGS["kit"], data.SYSTEM_PROMPT)
    template = modelfile.split('TEMPLATE """')[1].split('"""')[0]
    rendered = template.replace("{{ .System }}", data.SYSTEM_PROMPT).replace("{{ .Prompt }}", "What is a stye?")
    ids = tokenizer(rendered.replace("{{ .Response }}", "A bump."))["input_ids"]
    row = data.encode_row(tokenizer, make_row("What is a stye?", "A bump.", "encyclopedic"))
    assert ids == row["input_ids"]
    assert 'PARAMETER stop "<|eot_id|>"' in modelfile and "PARAMETER repeat_penalty 1.1\n" in modelfile


def test_the_vllm_line_has_the_decodings_values():
    line = train.format_vllm_command(make_recipe(), "runs/a", infer.Decoding(repetition_penalty=1.2, max_new_tokens=99))
    values = json.loads(line.split("--override-generation-config '")[1].rstrip("'"))
    assert values == {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.2, "max_new_tokens": 99}
    assert "--max-lora-rank 16 " in train.format_vllm_command(make_recipe(r=12), "a", infer.Decoding())
    assert "vllm serve unsloth/Llama-3.2-3B-Instruct --enable-lora --max-lora-rank 16" in line


# --- The gate


def make_evaluation(step, eval_loss, num_sound=8, num_named=20, scheduled=True):
    return {
        **{"step": step, "eval_loss": eval_loss, "num_sound": num_sound, "num_named": num_named, "scheduled": scheduled},
        **{"num_answers": 12, "num_ended": 9, "num_points": 40, "num_wrong_claims": 1},
    }


def test_the_best_evaluation_is_that_of_the_best_answers_or_of_the_lowest_loss():
    before, first, second, last = (
        make_evaluation(0, 2.5, 12),
        make_evaluation(10, 2.4, 11, 20),
        make_evaluation(20, 2.3, 11, 22),
        make_evaluation(30, 2.2, 9, 30),
    )
    evaluations = [before, first, second, last]
    assert train.choose_evaluation(evaluations, "answers") is second  # of equally many sound ones, more points
    assert train.choose_evaluation(evaluations, "eval_loss") is last
    assert train.choose_evaluation([first | {"num_named": 22}, second], "answers") is second  # then the loss
    broken = make_evaluation(40, float("nan"), 9, 30)
    assert (
        train.choose_evaluation([last, broken], "answers") is last
        and train.choose_evaluation([broken, last], "eval_loss") is last
    )
    # What only the clock brought about counts as long as there is nothing else.
    stopped = make_evaluation(5, 2.45, 12, scheduled=False)
    assert train.choose_evaluation([before, stopped], "answers") is stopped
    assert train.choose_evaluation([before, stopped, first], "answers") is first


def test_the_console_says_when_the_loss_improves_and_the_answers_get_worse():
    before, now = make_evaluation(10, 2.4, 11, 20), make_evaluation(20, 2.31, 9, 21)
    line, warning = train.describe_evaluation(now, before).split("\n")
    assert line == (
        "step 20: eval_loss 2.3100 (better) | sound 9/12 (was 11/12, worse) | stopped 75% | points 21/40, wrong claims 1"
    )
    assert warning == "  the loss improves while the answers get worse: sound answers 11 -> 9"
    assert "\n" not in train.describe_evaluation(before, None) and "(" not in train.describe_evaluation(before, None)
    assert "\n" not in train.describe_evaluation(make_evaluation(20, 2.31, 11, 20), before)
    assert "\n" not in train.describe_evaluation(make_evaluation(20, 2.5, 9, 20), before)  # both worse: the line says so


def test_enough_is_counted_from_the_best_answers(tmp_path):
    gate = object.__new__(train.Gate)
    gate.recipe = make_recipe(stop_when_worse=2)
    told = []
    gate.evaluations = []
    for evaluation in (
        make_evaluation(0, 2.5, 12),
        make_evaluation(10, 2.4, 10),
        make_evaluation(20, 2.3, 9),
        make_evaluation(30, 2.2, 11),
        make_evaluation(40, 2.1, 9),
        make_evaluation(50, 2.0, 10),
    ):
        gate.evaluations.append(evaluation)
        told.append(gate.has_had_enough)
    assert told == [False, False, False, False, False, True]
    gate.recipe = make_recipe(stop_when_worse=None)
    assert not gate.has_had_enough


def test_the_gate_costs_little_on_the_plan_of_a_t4():
    recipe = make_recipe()
    plan = train.make_plan(recipe, "float16", train.RowCounts(10_000, 10_000 * 250, 1024))
    assert plan.gate_seconds == recipe.count_evaluations(625) * 256 * 0.1
    assert plan.gate_seconds <= 0.05 * plan.training_seconds


@pytest.mark.parametrize(
    ("steps", "every", "evaluations"), [(18, 0.5, 3), (625, 0.2, 6), (4, 0.5, 3), (3, 0.5, 3), (1, 0.5, 2)]
)
def test_evaluations_are_counted_as_the_trainer_makes_them(steps, every, evaluations):
    assert make_recipe(eval_every=every).count_evaluations(steps) == evaluations


@pytest.mark.slow
def test_asking_leaves_modes_and_random_generators_as_they_were(small_model):
    import random

    import numpy as np
    import torch

    model, tokenizer = small_model.model, small_model.tokenizer
    side, draws = tokenizer.padding_side, []
    was_training = [module.training for module in model.modules()]
    try:
        model.train()
        model.model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        for ask in (False, True):
            random.seed(1), np.random.seed(1), torch.manual_seed(1)
            if ask:
                with train.asking(model, tokenizer, make_recipe(profile="cpu")):
                    assert not any(module.training for module in model.modules())
                    random.random(), np.random.rand(), torch.rand(3)
            draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
            assert [module.training for module in model.modules()] == modes and tokenizer.padding_side == side
        assert draws[0] == draws[1]
    finally:
        for module, training in zip(model.modules(), was_training, strict=True):
            module.training = training


# --- Training


def read_metrics(folder):
    """Steps and losses, without what the gate adds."""
    names = {"step", "epoch", "train_loss", "eval_loss", "grad_norm", "learning_rate"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line.keys() & names} for line in lines]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"recipe": {}}',
        '{"numbers": []}',
        '{"numbers": null, "recipe": 1, "data_fingerprint": ""}',
        "[" * 10_000,
    ],
)
def test_a_broken_record_of_a_run_is_one_message(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UsageError, match=r"run\.json is broken .* --restart"):
        train.find_record(tmp_path, make_recipe(), "0")


@pytest.mark.slow
def test_a_run_that_was_stopped_by_the_clock_and_has_no_gate_comes_to_the_same_bytes(trained, tmp_path):
    """Against the run that was not stopped and has a gate: neither a stop nor asking may change what is learned.

    It begins in that run's place, by --restart, which keeps it aside.
    """
    shutil.copytree(trained.cwd / "runs", tmp_path / "runs")
    old = {path.name: path.read_bytes() for path in (trained.folder / "adapter").iterdir()}
    flags = ["train.py", *trained.flags, "--num-probes", "0"]
    stopped = run_script(*flags, "--max-hours", "0.0001", "--restart", cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    folder = tmp_path / "runs" / "train" / "tiny"
    assert "Stopped by --max-hours after 1 of 4 steps" in stopped.stdout
    kept = tmp_path / "runs" / "train" / "tiny.old-1" / "adapter"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == old
    assert {path.name for path in folder.iterdir()} == {*("run.json", "metrics.jsonl", "curves.png", "adapter", "checkpoint-1")}
    assert "1 of 16 rows of 4 planned" in (folder / "adapter" / "README.md").read_text()
    checkpoint = (folder / "checkpoint-1").rename(folder / "elsewhere")
    refused = run_script(*flags, cwd=tmp_path)
    assert refused.returncode == 2 and "checkpoint-1, from which it would go on, is gone" in refused.stderr
    checkpoint.rename(folder / "checkpoint-1")
    resumed = run_script(*flags, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on with runs/train/tiny after step 1 of 4" in resumed.stdout
    assert {path.name for path in folder.iterdir()} == {"run.json", "metrics.jsonl", "curves.png", "adapter"}
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (trained.folder / weights).read_bytes()
    # The evaluation at the stop is not among them.
    assert read_metrics(folder) == read_metrics(trained.folder)
    numbers = [json.loads((each / "run.json").read_text())["numbers"] for each in (folder, trained.folder)]
    assert numbers[0]["eval_loss_before"] == numbers[1]["eval_loss_before"] and numbers[0]["chosen_step"] == 4


@pytest.mark.slow
def test_two_processes_train_as_one_does_with_twice_the_accumulation(trained, tmp_path):
    """With a stop after the first step, from which both go on. On whole steps: where rows do not fill an epoch's last one,
    accelerate repeats some for the processes to be even."""
    gate = ["--num-probes", "1", "--best", "answers", "--stop-when-worse", "3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    for stop in (["--max-hours", "0.0001"], []):
        ran = subprocess.run(
            [*torchrun, str(ROOT / "train.py"), *trained.flags, *gate, *stop],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("going on with runs/train/tiny after step 1 of 4") == 1
    # Rank 0 alone prints and writes.
    assert ran.stdout.count("trainable parameters") == 1 and ran.stdout.count("\neval loss ") == 1
    assert "4 rows x 2 forward passes x 2 processes" in ran.stdout
    folder = tmp_path / "runs" / "train" / "tiny"
    assert {path.name for path in folder.iterdir()} == {path.name for path in trained.folder.iterdir()}
    for two, one in zip(read_metrics(folder), read_metrics(trained.folder), strict=True):
        assert two["step"] == one["step"]
        for name in two.keys() & {"train_loss", "eval_loss", "grad_norm", "learning_rate"}:
            assert two[name] == pytest.approx(one[name], rel=2e-3), (two, one)
    again = run_script("train.py", *trained.flags, *gate, cwd=tmp_path)
    assert "already trained" in again.stdout


@pytest.mark.slow
def test_the_storys_pad_makes_the_planned_huge_adapter_which_can_be_asked_and_merged(trained, tmp_path):
    """In one run, for each takes a model's loading: what it says, the file's bytes, asking, and the merged model."""
    flags = [*trained.flags, "--pad", "added", "--max-steps", "1", "--num-probes", "0", "--merge"]
    ran = run_script("train.py", *flags, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    folder = tmp_path / "runs" / "train" / "tiny"
    size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    native = (trained.folder / "adapter" / "adapter_model.safetensors").stat().st_size
    said = f"{size:,} bytes, {size / native:.1f} times the {native:,} of the tokenizer's own pad token"
    assert said in ran.stderr and ran.stderr.index(said) < ran.stderr.index("step 0")
    assert size > 6 * native
    asked = run_script("infer.py", "What is croup?", "--max-new-tokens", "8", "--json", cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = folder / "merged"
    assert "FROM .\n" in (merged / "Modelfile").read_text()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged).eval(), AutoTokenizer.from_pretrained(merged)
    answer = json.loads(asked.stdout)
    prompt = data.encode_prompt(tokenizer, "What is croup?")
    with torch.inference_mode():
        logits = model.float()(torch.tensor([prompt])).logits[0, -1]
    # In 16 bits, so the same first choice and not the same numbers.
    assert int(logits.argmax()) == answer["token_ids"][0]


def test_only_a_run_in_runs_train_becomes_the_one_that_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/train/mine", "runs/ablate/all/runs/week4"):
        (tmp_path / folder).mkdir(parents=True)
        train.note_latest(tmp_path / folder)
    assert infer.LATEST.read_text() == "mine\n"


# --- Fast on a CPU


def make_lora_pair(dtype):
    """Two equal tiny models with the same LoRA, whose B is not zero; the second one's products are joined."""
    import copy

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).to(dtype)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=train.TARGET_MODULES["all-linear"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    for name, tensor in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(tensor, std=0.02)
    joined = copy.deepcopy(model)
    train.join_lora(joined)
    return model, joined


def test_joined_products_are_pefts_with_the_same_gradients():
    import torch

    ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    plain, joined = make_lora_pair(torch.float32)
    losses = []
    for model in (plain, joined):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    gradients = [
        {name: tensor.grad for name, tensor in model.named_parameters() if tensor.requires_grad} for model in (plain, joined)
    ]
    assert len(gradients[0]) == 2 * 7 * 2
    torch.testing.assert_close(*gradients)
    with torch.no_grad(), plain.disable_adapter(), joined.disable_adapter():
        torch.testing.assert_close(plain(input_ids=ids).logits, joined(input_ids=ids).logits)


def test_joined_products_keep_what_a_sum_in_16_bits_loses():
    """An adapter was judged in bfloat16 by PEFT's sum: its eval loss fell by 0.075 where it had fallen by 0.112."""
    import torch

    torch.manual_seed(0)
    rows = torch.randn(64, 64).bfloat16()
    plain, joined = (dict(model.named_modules()) for model in make_lora_pair(torch.bfloat16))
    name = "base_model.model.model.layers.0.mlp.up_proj"
    layer = plain[name]
    weights = (layer.base_layer.weight, layer.lora_A["default"].weight.bfloat16(), layer.lora_B["default"].weight.bfloat16())
    base, a, b = (weight.double() for weight in weights)
    change = 2 * rows.double() @ a.T @ b.T
    exact = rows.double() @ base.T + change
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        errors = [(module(rows).double() - exact).abs().mean() for module in (layer, joined[name])]
    assert errors[1] < 0.75 * errors[0]


def test_short_batches_attend_by_matrices_and_long_ones_as_before():
    import torch

    model, _ = make_lora_pair(torch.float32)
    ids = torch.randint(0, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    seen = mask.bool()
    fused = model(input_ids=ids, attention_mask=mask).logits[seen]
    for longest in (20, 19):
        train.use_matrix_attention(model, longest)
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits[seen], fused)

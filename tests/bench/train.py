"""How fast training is: the kit's `cpu` recipe against transformers' Trainer with PEFT, on the same rows.

    python -m tests.bench train [--rows N ...] [--rounds N]
    python -m tests.bench train --profile                       where the kit's time goes
    python -m tests.bench train --measures                      what each of the kit's measures is worth

`fp32` is the Trainer as most scripts run it: float32, shuffled batches, padded to the longest row. `bf16` has the kit's own
flags: bfloat16, batches of like lengths. Rows, supervised tokens, batch, LoRA, steps and schedule are the same, which is
checked, and so is that the eval losses are within 1% of each other. TRL's own SFTTrainer is no third: without Unsloth its loss
is a Triton kernel, which has no CPU driver, and where Triton cannot be imported it has none.

Each training runs in a process of its own, by turns; medians are printed, ratios are of the same round. Seconds are those of
the whole `train()` less its evaluations, before which the kit saves and the others do not. Memory is the process's peak. Eval
loss is of the trained adapter on the base model in float32; beside it stands what the Trainer itself says, in the precision of
training, where PEFT's sum in bfloat16 loses a part of what was learned. The picture is docs/bench-train.png.

The share of this machine's limit is that of the operations that no way of training can leave away, in the time that training
took, by the rate of a bfloat16 product of two matrices of 2048 x 2048, measured in the same process:

    (4 N tokens + 4 H answer tokens) / seconds / peak

with N the weights of the layers' linear modules and H those of the head, which only answers need. A weight takes part in 2
operations a token forward, and in 2 backward for the gradient of its input; frozen, it needs no gradient of its own.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import data
import infer
import train
from tests.bench import Panel, draw

ARMS = ("fp32", "bf16", "kit")
ROWS, ROUNDS = (16, 48, 96), 3

# The kit without one of its measures each: the fields of `data.Profile` that take it away.
MEASURES = {
    "fused LoRA": {"fused_lora": False},
    "eager attention": {"eager_attention_tokens": 0},
    "padding to 8, not 32": {"pad_to_multiple_of": 32},
}


def take_rows(tokenizer, count):
    """The first rows of the default mix, and those held out, encoded: the same for every arm."""
    mix = data.RowsConfig().load(data.PROFILES["cpu"])
    return [[data.encode_row(tokenizer, row) for row in rows] for rows in (mix.train[:count], mix.eval)]


def measure_loss(trained, tokenizer, rows, recipe):
    """Mean loss of the rows' supervised tokens, in nats a token, of the trained adapter on the base model in float32.

    So `infer.py` answers.
    """
    import torch
    from peft import (
        LoraConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

    model = AutoModelForCausalLM.from_pretrained(infer.base_model_path(data.SMALL_MODEL), dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**lora_values(recipe))).eval()
    set_peft_model_state_dict(model, get_peft_model_state_dict(trained))
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    total = count = 0
    with torch.inference_mode():
        for start in range(0, len(rows), 4):
            batch = collate(rows[start : start + 4])
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1]
            total += torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum").item()
            count += int((labels != -100).sum())
    return total / count


def lora_values(recipe):
    """PEFT's LoRA configuration of the recipe."""
    return {
        "r": recipe.r,
        "lora_alpha": recipe.lora_alpha,
        "target_modules": train.TARGET_MODULES[recipe.target_modules],
        "task_type": "CAUSAL_LM",
    }


def measure_peak(size=2048, runs=20):
    """Operations a second of a bfloat16 product of two square matrices, the median of several."""
    import torch

    one, other = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        one @ other
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds)


def make_kit_trainer(recipe, count, folder):
    """The trainer of `train.py`, made as it makes it, without the gate's questions; and its rows."""
    model, tokenizer = infer.load_base(data.PROFILES["cpu"], dtype=None)
    import datasets

    datasets.disable_progress_bars()
    with infer.quiet_libraries():
        rows, profile = take_rows(tokenizer, count), data.PROFILES["cpu"]
        recipe = dataclasses.replace(recipe, output_dir=folder)
        model = train.add_lora(model, recipe, profile, max(len(row["input_ids"]) for row in rows[0]))
        args = train.make_sft_config(recipe, profile, recipe.count_steps(count))
        args.save_strategy, args.metric_for_best_model = "no", None
        trainer = train.make_trainer(model, tokenizer, args, *rows)
    return trainer, *rows


def make_plain_trainer(recipe, count, folder, bf16):
    """transformers' Trainer on PEFT's model, without Unsloth, and its rows; `bf16` has batches of like lengths too."""
    import datasets
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        PrinterCallback,
        Trainer,
        TrainingArguments,
    )

    path = infer.base_model_path(data.SMALL_MODEL)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if bf16 else torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = take_rows(tokenizer, count)
    torch.manual_seed(recipe.seed)
    trainer = Trainer(
        model=get_peft_model(model, LoraConfig(**lora_values(recipe))),
        args=TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.per_device_train_batch_size,
            per_device_eval_batch_size=recipe.per_device_train_batch_size,
            gradient_accumulation_steps=train.ROWS_PER_STEP // recipe.per_device_train_batch_size,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=int(0.03 * recipe.count_steps(count)),
            weight_decay=0.01,
            bf16=bf16,
            use_cpu=True,
            train_sampling_strategy="group_by_length" if bf16 else "random",
            seed=recipe.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows[0]),
        eval_dataset=datasets.Dataset.from_list(rows[1]),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, *rows


# Of torch's operators, which belong together; the rest is one more group.
OPERATORS = {
    "products of matrices": ("aten::mm", "aten::addmm", "aten::bmm"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::fill_", "aten::index_select", "aten::gather", "aten::scatter_"),
    "softmax, of attention and loss": (
        "aten::_softmax",
        "aten::_log_softmax",
        "aten::_softmax_backward_data",
        "aten::_log_softmax_backward_data",
    ),
    "sums and products by element": (
        "aten::mul",
        "aten::mul_",
        "aten::add",
        "aten::add_",
        "aten::sum",
        "aten::div",
        "aten::pow",
        "aten::mean",
        "aten::neg",
        "aten::rsqrt",
    ),
    "SiLU": ("aten::silu", "aten::silu_backward"),
}


def profile_kit(count):
    """Prints the share of the steps' time that each group of operators takes, by torch's profiler; and of the peak the share
    that the steps reach, without what a run does beside them, and what they would reach if products of matrices were all."""
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder:
        trainer, *_ = make_kit_trainer(make_recipe(), count, Path(folder))
        batches = [dict(batch) for batch in trainer.get_train_dataloader()]
        trainer.model.train()
        for batch in batches:  # whose kernels are compiled at first use
            trainer.training_step(trainer.model, dict(batch), 1)
        started = time.perf_counter()
        for batch in batches:
            trainer.training_step(trainer.model, dict(batch), 1)
        seconds = time.perf_counter() - started
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for batch in batches:
                trainer.training_step(trainer.model, dict(batch), 1)
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    total = sum(times.values())
    shares = {name: sum(times.pop(operator, 0) for operator in operators) / total for name, operators in OPERATORS.items()}
    for name, share in (shares | {"all else, Python among it": sum(times.values()) / total}).items():
        print(f"{name:<34}{share:>6.0%}")
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    answer_tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    share = count_operations(tokens, answer_tokens) / seconds / measure_peak()
    print(f"{'of peak, the steps alone':<34}{share:>6.0%}")
    print(f"{'of peak, if all else took no time':<34}{share / shares['products of matrices']:>6.0%}")


def make_recipe():
    """The default recipe of the `cpu` profile, without the gate's questions."""
    return train.resolve(train.TrainConfig(profile="cpu", num_probes=0))[0]


def run_once(arm, count, folder):
    """One training in this process, as numbers."""
    infer.prepare_environment(data.PROFILES["cpu"])
    data.PROFILES["cpu"] = dataclasses.replace(data.PROFILES["cpu"], **MEASURES.get(arm, {}))
    recipe = make_recipe()
    if arm == "kit" or arm in MEASURES:
        trainer, train_rows, held_out = make_kit_trainer(recipe, count, folder)
    else:
        trainer, train_rows, held_out = make_plain_trainer(recipe, count, folder, bf16=arm == "bf16")
    evaluating, evaluate = [0.0], trainer.evaluate

    def timed_evaluate(*args, **kwargs):
        started = time.perf_counter()
        metrics = evaluate(*args, **kwargs)
        evaluating.append(time.perf_counter() - started)
        return metrics

    trainer.evaluate = timed_evaluate
    seen = {"rows": 0, "answer_tokens": 0}
    training_step = trainer.training_step

    def counted_step(model, inputs, *args, **kwargs):
        seen["rows"] += len(inputs["input_ids"])
        seen["answer_tokens"] += int((inputs["labels"] != -100).sum())
        return training_step(model, inputs, *args, **kwargs)

    trainer.training_step = counted_step
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started - sum(evaluating)
    own_loss = trainer.evaluate()["eval_loss"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokenizer = trainer.processing_class or trainer.data_collator.tokenizer
    loss = measure_loss(trainer.model, tokenizer, held_out, recipe)
    return {
        **seen,
        "tokens": sum(len(row["input_ids"]) for row in train_rows),
        "steps": trainer.state.global_step,
        "trainable": sum(each.numel() for each in trainer.model.parameters() if each.requires_grad),
        "eval_loss": loss,
        "own_loss": own_loss,
        "seconds": seconds,
        "eval_seconds": evaluating[-1],
        "peak_gib": peak / 2**20,
        "peak_rate": measure_peak(),
    }


def ask_process(arm, count, threads):
    """The numbers that a training in a process of its own prints."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.bench", "train", "--once", arm, str(count), folder]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(ran.stdout.splitlines()[-1])


def check_equal(runs):
    """Asserts that all trained the same: rows, supervised tokens, steps, LoRA; and as well, within 1% of eval loss."""
    for name in ("rows", "tokens", "answer_tokens", "steps", "trainable"):
        assert len({run[name] for run in runs}) == 1, (name, [run[name] for run in runs])
    losses = [run["eval_loss"] for run in runs]
    assert max(losses) <= 1.01 * min(losses), losses


def count_operations(tokens, answer_tokens):
    """The operations that training on so many tokens cannot leave away; see above."""
    arch = data.PROFILES["cpu"].architecture
    linear = arch.num_hidden_layers * sum(rows * columns for rows, columns in arch.linear_shapes.values())
    head = arch.hidden_size * arch.vocab_size
    return 4 * linear * tokens + 4 * head * answer_tokens


def share_of_peak(run):
    """Of the measured peak, the share that a whole run reaches."""
    return count_operations(run["tokens"], run["answer_tokens"]) / run["seconds"] / run["peak_rate"]


def median_of(runs, name):
    """Of one of their numbers, the median."""
    return statistics.median(run[name] for run in runs)


def report(rounds):
    """Prints the medians of the rounds, each a dict of runs by arm."""
    one = rounds[0]["kit"]
    print(
        f"{one['rows']} rows, {one['tokens']:,} tokens, {one['answer_tokens']:,} of them answers; {one['steps']} steps, "
        f"{one['trainable']:,} trainable parameters; medians of {len(rounds)} rounds"
    )
    columns = ("tokens/s", "answer tokens/s", "kit is", "of peak", "eval loss", "own loss", "eval s", "GiB")
    print(f"{'':<6}" + "".join(f"{column:>{len(column) + 3}}" for column in columns))
    for arm in ARMS:
        runs = [each[arm] for each in rounds]
        rate, answer_rate = (
            statistics.median(run[name] / run["seconds"] for run in runs) for name in ("tokens", "answer_tokens")
        )
        faster = statistics.median(each[arm]["seconds"] / each["kit"]["seconds"] for each in rounds)
        figures = (
            f"{rate:.0f}",
            f"{answer_rate:.0f}",
            f"{faster:.2f}x",
            f"{statistics.median(map(share_of_peak, runs)):.0%}",
            *(f"{median_of(runs, name):.4f}" for name in ("eval_loss", "own_loss")),
            f"{median_of(runs, 'eval_seconds'):.1f}",
            f"{median_of(runs, 'peak_gib'):.2f}",
        )
        print(f"{arm:<6}" + "".join(f"{figure:>{len(column) + 3}}" for column, figure in zip(columns, figures, strict=True)))
    peak = median_of([run for each in rounds for run in each.values()], "peak_rate")
    print(f"peak  {peak / 1e9:.0f} GFLOP/s in bfloat16", flush=True)


def compare_measures(count, num_rounds):
    """Prints what a training takes without each of the kit's measures, as a ratio to the whole kit's of the same round."""
    cores = len(os.sched_getaffinity(0))
    rounds = []
    for _ in range(num_rounds):
        rounds.append({arm: ask_process(arm, count, cores) for arm in ("kit", *MEASURES)})
        check_equal(list(rounds[-1].values()))
    print(f"{count} rows, medians of {num_rounds} rounds\n{'':<31}  time    GiB   eval loss   own loss")
    for arm in rounds[0]:
        longer = statistics.median(each[arm]["seconds"] / each["kit"]["seconds"] for each in rounds)
        memory, loss, own = (median_of([each[arm] for each in rounds], name) for name in ("peak_gib", "eval_loss", "own_loss"))
        name = arm if arm == "kit" else f"without {arm}"
        print(f"{name:<31} {longer:.2f}x   {memory:.2f}      {loss:.4f}     {own:.4f}", flush=True)


def main(arguments):
    if arguments[:1] == ["--once"]:
        arm, count, folder = arguments[1:]
        print("\n" + json.dumps(run_once(arm, int(count), Path(folder))))
        return
    parser = argparse.ArgumentParser(prog="python -m tests.bench train")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--measures", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.profile:
        infer.prepare_environment(data.PROFILES["cpu"])
        profile_kit(max(asked.rows))
        return
    if asked.measures:
        compare_measures(max(asked.rows), asked.rounds)
        return
    cores = len(os.sched_getaffinity(0))
    seconds = {arm: [] for arm in ARMS}
    for count in asked.rows:
        rounds = []
        for _ in range(asked.rounds):
            rounds.append({arm: ask_process(arm, count, cores) for arm in ARMS})
            check_equal(list(rounds[-1].values()))
        report(rounds)
        for arm in ARMS:
            seconds[arm].append((count, median_of([each[arm] for each in rounds], "seconds")))
    largest = max(asked.rows)
    by_threads = []
    for threads in range(1, cores + 1):
        runs = [ask_process("kit", largest, threads) for _ in range(asked.rounds)]
        by_threads.append((threads, statistics.median(run["tokens"] / run["seconds"] for run in runs)))
        print(f"kit, {threads} threads: {by_threads[-1][1]:.0f} tokens/s", flush=True)
    draw(
        "train",
        [
            Panel(
                "rows",
                "training (s)",
                {"kit": seconds["kit"], "Trainer, bf16": seconds["bf16"], "Trainer, fp32": seconds["fp32"]},
            ),
            Panel("threads", "kit (tokens/s)", {"kit": by_threads}),
        ],
    )

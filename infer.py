"""What comes out: one question in, one answer out, under a decoding that is written down.

    python infer.py "What are the warning signs of a heart attack?"
    python infer.py "..." --base                        ask the base model, without the adapter
    python infer.py "..." --decoding story-fix          as the story decoded after its fixes
    python infer.py "..." --adapter runs/train/NAME/adapter --json

stdout holds the answer and nothing else. Answers are no medical advice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import data
from data import ProfileChoice, ProfileName, UsageError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

RUNS = Path("runs")
TRAIN_RUNS = RUNS / "train"
# Names the run in TRAIN_RUNS whose adapter is asked by default; train.py writes it when a run is done.
LATEST = TRAIN_RUNS / "latest.txt"
# Beside the adapter's weights: what PEFT's and transformers' own files have no place for.
ADAPTER_RECORD = "kit.json"


@dataclass(frozen=True)
class Profile:
    """The values in which the two profiles differ, for loading and asking a model."""

    base_model: str
    """Hub id, or the name of the model that `small_base_model` makes."""
    load_in_4bit: bool
    dtype: str
    """Compute dtype of answers. A T4 has no bf16; on the CPU, bf16 logits tie and let the batch decide (fp32 does not)."""
    use_gradient_checkpointing: Literal["unsloth"] | bool
    """Recompute activations in the backward pass. "unsloth" keeps them in host RAM; the small model's fit as they are."""


SMALL_MODEL = "smollm2-135m-instruct"
PROFILES: dict[ProfileName, Profile] = {
    "t4": Profile(
        "unsloth/Llama-3.2-3B-Instruct",
        load_in_4bit=True,
        dtype="float16",
        use_gradient_checkpointing="unsloth",
    ),
    "cpu": Profile(SMALL_MODEL, load_in_4bit=False, dtype="float32", use_gradient_checkpointing=False),
}

# The tokenizer's own reserved pad token: an added one would resize the embedding, and the adapter would carry it whole.
LLAMA_PAD_TOKEN = "<|finetune_right_pad_id|>"

DecodingName = Literal["plain", "story-collapse", "story-fix", "kit"]


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded (always greedily). Every field reaches `generate` explicitly; it inherits none."""

    max_new_tokens: int = 256
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that occurred (Keskar et al. 2019); 1.0 is off."""
    no_repeat_ngram_size: int = 0
    """Forbids every n-gram of this size a second time; 0 is off."""
    count_prompt: bool = False
    """Whether penalty and ban count the prompt's tokens too, the end-of-turn token among them, as the library does."""
    stop: Literal["end-of-turn", "generation-config"] = "end-of-turn"
    """Which token ends an answer: the one that ends a turn in the chat template, or whatever the base model's generation
    config names."""


# `story-*` as the story told them: its library counted the prompt. `kit` is ours, chosen by the table in the README.
DECODINGS: dict[DecodingName, Decoding] = {
    "plain": Decoding(),
    "story-collapse": Decoding(no_repeat_ngram_size=3, count_prompt=True, stop="generation-config"),
    "story-fix": Decoding(repetition_penalty=1.3, count_prompt=True),
    "kit": Decoding(repetition_penalty=1.1),
}

# Rows of a forward pass, at least and at most. With fewer than 4 rows a CPU's matrix library takes another kernel, whose
# sums differ in the last bits: a single question is therefore asked as 4 copies, and its answer does not depend on company.
MIN_ROWS, MAX_ROWS = 4, 32

# What Unsloth, torch and transformers say on every run of a CPU, of no use to the user. Whole messages, so that a new or
# real warning still shows.
KNOWN_NOISE = re.compile(
    "|".join(
        (
            r"Converting and de-quantizing GGUF tensors",
            r"Calling register_constant\(\) on Enum subclasses is deprecated",
            r"Unsloth [\d.]+: no GPU found, training on CPU",
            r"Unsloth \(CPU\): \w+ on \d+ CPU threads\.",
            r"Unsloth \(CPU\): optim = '\w+' needs a GPU, using",
            r"xFormers can't load C\+\+/CUDA extensions",
            r"Skipping import of cpp extensions due to incompatible torch version",
            r"bitsandbytes .* (compiled without GPU support|was not compiled with GPU)",
        )
    )
)


@dataclass(frozen=True)
class Answer:
    """One answer, with what it took to get it."""

    question: str
    text: str
    token_ids: list[int]
    """Ids of the answer alone; the stop token, where there was one, is the last."""
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    answer_tokens: int
    decoding: Decoding


# --- Measures of an answer ---------------------------------------------------------------------------------------


def rep_n(words: Sequence[str], n: int) -> float:
    """Share of n-grams that already occurred, in [0, 1]: 1 - distinct / all (Welleck et al. 2020, seq-rep-n).

    0.0 where there are fewer than n words.
    """
    ngrams = list(zip(*(words[start:] for start in range(n)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def distinct_n(words: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams, in (0, 1] (Li et al. 2016); 1.0 where there are fewer than n words."""
    return 1 - rep_n(words, n)


# --- Environment -------------------------------------------------------------------------------------------------


def prepare_environment(profile: ProfileName, *, offline: bool) -> None:
    """Sets what Unsloth and the hub client read at import. Call it before either is imported."""
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if profile == "cpu":
        # Also where there is a GPU: whoever says --profile cpu means it.
        os.environ["UNSLOTH_FORCE_CPU"] = "1"
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


class _NoiseFilter(io.TextIOBase):
    """A text stream that hands whole lines on to another, less the known noise."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.line = ""

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            if not KNOWN_NOISE.search(line):
                self.stream.write(line + "\n")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def close(self) -> None:
        """Hands on a line that was never ended. Loggers may write on, so this stream stays open."""
        if self.line:
            self.write("\n")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """While it lasts, what libraries print goes to stderr, line by line, without the known noise.

    Loggers that are made meanwhile keep the filtered stream. That is wanted: they say the same things later.
    """
    noise_filter = _NoiseFilter(sys.stderr)
    with contextlib.redirect_stdout(noise_filter), contextlib.redirect_stderr(noise_filter):
        try:
            yield
        finally:
            noise_filter.close()


# --- Loading -----------------------------------------------------------------------------------------------------


def build_small_model(folder: Path) -> None:
    """Writes the small base model into `folder`: the GGUF's weights unpacked to fp32 safetensors, and the tokenizer.

    fp32, because Q4_1's products of a scale and a 4-bit number, plus an offset, have no exact 16-bit form.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    tokenizer = data.load_tokenizer("cpu")
    model = AutoModelForCausalLM.from_pretrained(
        data.gguf_folder(),
        gguf_file=data.GGUF_FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def base_model_path(base_model: str) -> str:
    """What `from_pretrained` takes for a base model: a hub id as it is; for the small model its folder in the cache."""
    if base_model != SMALL_MODEL:
        return base_model
    return str(data.cached_folder(SMALL_MODEL, build_small_model))


def load_base(profile: ProfileName, *, dtype: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The profile's base model and tokenizer, through Unsloth; `dtype` None lets Unsloth choose the fastest for training.

    Pad is the tokenizer's own reserved token and differs from eos; eos is the token that ends a turn.
    """
    with quiet_libraries():
        # Unsloth patches transformers, PEFT and TRL, and has to be imported before them.
        from unsloth import FastLanguageModel  # isort: skip
        import torch
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        values = PROFILES[profile]
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=base_model_path(values.base_model),
            max_seq_length=data.MAX_SEQ_LENGTH,
            dtype=dtype and getattr(torch, dtype),
            load_in_4bit=values.load_in_4bit,
            use_gradient_checkpointing=values.use_gradient_checkpointing,
            trust_remote_code=False,
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = LLAMA_PAD_TOKEN
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == end_of_turn_id(tokenizer)
    return model, tokenizer


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that the chat template puts right after an answer."""
    mark = "\ue000"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, date_string=data.TEMPLATE_DATE)
    return tokenizer(rendered.split(mark)[1], add_special_tokens=False)["input_ids"][0]


def latest_adapter() -> Path:
    """The adapter of the run that was finished last.

    Raises:
        UsageError: no run was finished here, or its folder is gone.
    """
    if not LATEST.is_file():
        raise UsageError(
            f"There is no adapter yet ({LATEST} is missing). Train one: python train.py\n"
            "or ask the base model: python infer.py --base"
        )
    adapter = TRAIN_RUNS / LATEST.read_text(encoding="utf-8").strip() / "adapter"
    if not adapter.is_dir():
        raise UsageError(f"The latest run's adapter, {adapter}, is gone. Give another with --adapter FOLDER, or train again.")
    return adapter


def read_adapter_record(adapter: Path) -> dict[str, Any]:
    """What train.py wrote beside the weights: base model, profile, prompt fingerprint, decoding.

    Raises:
        UsageError: the folder is not an adapter of this kit.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors", ADAPTER_RECORD):
        if not (adapter / name).is_file():
            raise UsageError(
                f"{adapter} is no adapter of this kit: {name} is missing. Give the folder runs/train/NAME/adapter."
            )
    return json.loads((adapter / ADAPTER_RECORD).read_text(encoding="utf-8"))


def load_adapter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Path) -> PeftModel:
    """`model` with the adapter's LoRA tensors on it.

    Raises:
        UsageError: the adapter was trained under another prompt.
    """
    record = read_adapter_record(adapter)
    fingerprint = data.prompt_fingerprint(tokenizer)
    if record["prompt_fingerprint"] != fingerprint:
        raise UsageError(
            f"{adapter} was trained under the prompt {record['prompt_fingerprint']}, and this kit asks under {fingerprint}: "
            "its answers would not be those it was trained to give. Train it again, or use the version that trained it."
        )
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter)


# --- Answering ---------------------------------------------------------------------------------------------------


def stop_ids(decoding: Decoding, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer under `decoding`."""
    if decoding.stop == "end-of-turn":
        return [end_of_turn_id(tokenizer)]
    eos = model.generation_config.eos_token_id
    return list(eos) if isinstance(eos, list) else [eos]


def make_row_processor(decodings: Sequence[Decoding], prompt_tokens: int) -> LogitsProcessor:
    """A logits processor that decodes each row of a batch under its own decoding.

    Penalty and ban are the library's own processors. Where they do not count the prompt they are shown the answer's ids
    only, so nothing in the prompt, its end-of-turn tokens above all, is penalised or banned. In that, and in that alone, it
    departs from passing `repetition_penalty` and `no_repeat_ngram_size` to `generate`.
    """
    from transformers import LogitsProcessor, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    chains: list[list[Any]] = []
    for decoding in decodings:
        chain: list[Any] = []
        if decoding.repetition_penalty != 1.0:
            chain.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
        if decoding.no_repeat_ngram_size:
            chain.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))
        chains.append(chain)

    class RowProcessor(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            """`input_ids` (B, T), `scores` (B, V) -> (B, V)."""
            scores = scores.clone()
            for row, (decoding, chain) in enumerate(zip(decodings, chains, strict=True)):
                seen = input_ids[row : row + 1, 0 if decoding.count_prompt else prompt_tokens :]
                for processor in chain:
                    scores[row : row + 1] = processor(seen, scores[row : row + 1])
            return scores

    return RowProcessor()


def make_generation_config(max_new_tokens: int, stop: Sequence[int], pad: int) -> GenerationConfig:
    """Greedy decoding with every field named that could act: a field left out is taken from the model's own config."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        max_length=None,
        min_new_tokens=0,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        bad_words_ids=None,
        use_cache=True,
        eos_token_id=list(stop),
        pad_token_id=pad,
    )


def answer_requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[tuple[str, Decoding]],
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[Answer]:
    """One `Answer` a request `(question, decoding)`, in their order.

    `progress` is told of tokens as they are written, or as an early end makes them needless: in all, requests times cap.

    Requests whose prompts have the same length, and which stop at the same tokens, share forward passes: nothing is
    padded, and a batch has at least `MIN_ROWS` rows, so that an answer does not depend on what it was asked with.

    Raises:
        UsageError: a prompt and its answer would not fit into the model's maximal sequence length.
    """
    prompts = [data.encode_prompt(tokenizer, question) for question, _ in requests]
    limit = model.max_seq_length
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for place, ((question, decoding), prompt) in enumerate(zip(requests, prompts, strict=True)):
        if len(prompt) + decoding.max_new_tokens > limit:
            raise UsageError(
                f"The question {question[:40]!r}... makes a prompt of {len(prompt)} tokens; with an answer of up to "
                f"{decoding.max_new_tokens} that is more than the {limit} that the model is set up for. "
                "Shorten the question, or the answer with --max-new-tokens."
            )
        groups.setdefault((len(prompt), tuple(stop_ids(decoding, model, tokenizer))), []).append(place)
    answers: dict[int, Answer] = {}
    for (_, stop), places in sorted(groups.items()):
        for start in range(0, len(places), MAX_ROWS):
            batch = places[start : start + MAX_ROWS]
            decodings = [requests[place][1] for place in batch]
            new_ids = _generate(model, tokenizer, [prompts[place] for place in batch], decodings, stop, progress)
            for place, ids in zip(batch, new_ids, strict=True):
                answers[place] = _to_answer(tokenizer, *requests[place], len(prompts[place]), ids, stop)
    return [answers[place] for place in range(len(requests))]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    decodings: Sequence[Decoding],
    stop: Sequence[int],
    progress: Callable[[int], object],
) -> list[list[int]]:
    """New ids of each prompt, all prompts being equally long; what follows a stop token is padding still."""
    import torch
    from transformers.generation import BaseStreamer

    cap = max(decoding.max_new_tokens for decoding in decodings)

    class StepCounter(BaseStreamer):
        """Passes the steps of `generate` on to `progress`."""

        steps = -1  # the prompt is put first

        def put(self, value: torch.Tensor) -> None:
            self.steps += 1
            progress(len(prompts) if self.steps else 0)

        def end(self) -> None:
            progress(len(prompts) * (cap - self.steps))

    filled = [place % len(prompts) for place in range(max(MIN_ROWS, len(prompts)))]
    input_ids = torch.tensor([prompts[place] for place in filled], device=model.device)
    width = input_ids.shape[1]
    with torch.inference_mode():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=make_generation_config(cap, stop, tokenizer.pad_token_id),
            logits_processor=[make_row_processor([decodings[place] for place in filled], width)],
            streamer=StepCounter(),
        )
    return output[: len(prompts), width:].tolist()


def _to_answer(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    decoding: Decoding,
    prompt_tokens: int,
    ids: list[int],
    stop: Sequence[int],
) -> Answer:
    """Cuts `ids` after the first stop token and at the decoding's cap."""
    ids = ids[: decoding.max_new_tokens]
    end = next((place for place, token in enumerate(ids) if token in stop), None)
    text_ids = ids[:end]
    return Answer(
        question=question,
        text=tokenizer.decode(text_ids, skip_special_tokens=True).strip(),
        token_ids=ids if end is None else ids[: end + 1],
        finish_reason="length" if end is None else "stop",
        prompt_tokens=prompt_tokens,
        answer_tokens=len(ids) if end is None else end + 1,
        decoding=decoding,
    )


# --- Command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InferConfig:
    """Flags of infer.py."""

    question: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="QUESTION")]
    """What to ask, in quotes."""
    adapter: Path | None = None
    """Adapter folder. Unset: the adapter of the run that was finished last."""
    base: bool = False
    """Ask the base model, without an adapter."""
    decoding: DecodingName = "kit"
    """How to decode. `plain` greedy; `story-collapse` and `story-fix` as told; `kit`: see README."""
    max_new_tokens: int | None = None
    """Cap of the answer, in tokens. Unset: the decoding's."""
    profile: ProfileChoice = "auto"
    """Which base model: `t4`, `cpu`, or `auto`. An adapter knows its own."""
    json: bool = False
    """Print the answer as a JSON object with token ids, finish reason and decoding."""

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError('The question is empty. Ask in quotes: python infer.py "What helps against a dry cough?"')
        if self.base and self.adapter:
            raise ValueError(f"--base asks without an adapter, and --adapter {self.adapter} with one. Give one of the two.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens}: 1 or more is wanted.")

    @property
    def resolved_decoding(self) -> Decoding:
        """The preset, with single fields replaced as given."""
        preset = DECODINGS[self.decoding]
        return preset if self.max_new_tokens is None else dataclasses.replace(preset, max_new_tokens=self.max_new_tokens)


def main(config: InferConfig) -> None:
    """Answers the question on stdout; says on stderr what answered and how it ended."""
    adapter = None if config.base else config.adapter or latest_adapter()
    profile = (
        read_adapter_record(adapter)["profile"]
        if adapter and config.profile == "auto"
        else data.resolve_profile(config.profile)
    )
    prepare_environment(profile, offline=profile == "cpu")
    print(
        f"{PROFILES[profile].base_model}{f' with {adapter}' if adapter else ''}, decoding {config.decoding}",
        file=sys.stderr,
    )
    model, tokenizer = load_base(profile, dtype=PROFILES[profile].dtype)
    if adapter:
        model = load_adapter(model, tokenizer, adapter)
    from tqdm import tqdm
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(model)
    decoding = config.resolved_decoding
    with tqdm(total=decoding.max_new_tokens, unit="token", leave=False, disable=not sys.stderr.isatty()) as bar:
        [answer] = answer_requests(model, tokenizer, [(config.question, decoding)], bar.update)
    print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False) if config.json else answer.text)
    if answer.finish_reason == "length":
        print(f"The answer was cut at {answer.answer_tokens} tokens (--max-new-tokens).", file=sys.stderr)
    print("No medical advice: a small language model wrote this.", file=sys.stderr)


if __name__ == "__main__":
    data.run_command(InferConfig, main, __doc__)

"""What made the difference: the same questions to base model and adapter, under every decoding, in one table.

    python ablate.py                              the story's five questions, every decoding, base and latest adapter
    python ablate.py --num-probes 26              all probe questions
    python ablate.py --adapter runs/train/NAME/adapter --study other
    python ablate.py --table                      make the table again from the records; loads no model

Writes runs/ablate/STUDY/ablation.md. What is already answered is not asked again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import data
import infer
from data import UsageError
from infer import DECODINGS, DecodingName, Judged

ABLATE_RUNS = infer.RUNS / "ablate"

ModelName = Literal["base", "adapter"]


@dataclass(frozen=True)
class Cell:
    """One model under one decoding, asked all questions."""

    model: ModelName
    decoding: DecodingName
    base_model: str
    model_fingerprint: str
    """The base model's name, or sha256 of the adapter's weights: what was recorded for another one is not reused."""
    questions: tuple[str, ...]

    @property
    def id(self) -> str:
        """Name of the cell's folder."""
        return f"{self.model}-{self.decoding}"

    @property
    def settings(self) -> dict[str, Any]:
        """All that the cell's answers depend on, as it stands in result.json."""
        return {
            "model": self.model,
            "decoding": self.decoding,
            "base_model": self.base_model,
            "model_fingerprint": self.model_fingerprint,
            "questions": list(self.questions),
            "system_prompt": data.SYSTEM_PROMPT,
            "fields": dataclasses.asdict(DECODINGS[self.decoding]),
        }


def make_grid(base_model: str, adapter: Path, questions: Sequence[str]) -> list[Cell]:
    """Base model first, then the adapter, each under every decoding."""
    fingerprints: dict[ModelName, str] = {"base": base_model, "adapter": infer.adapter_digest(adapter)}
    return [
        Cell(model, decoding, base_model, fingerprint, tuple(questions))
        for model, fingerprint in fingerprints.items()
        for decoding in DECODINGS
    ]


# --- Records -----------------------------------------------------------------------------------------------------


def is_done(cell: Cell, study: Path) -> bool:
    """Whether the study holds this cell's answers, of this very model, decoding and questions, and judged."""
    path = study / "cells" / cell.id / "result.json"
    if not path.is_file():
        return False
    result = json.loads(path.read_text(encoding="utf-8"))
    return result["settings"] == cell.settings and "num_sound" in result["numbers"]


def write_cell(cell: Cell, judged: Sequence[Judged], study: Path) -> None:
    """Writes the cell's folder, whole or not at all, in place of an older one."""
    folder = study / "cells" / cell.id
    part = folder.with_name(f".{cell.id}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    lines = (json.dumps(each.to_record(), ensure_ascii=False) for each in judged)
    (part / "generations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = {"settings": cell.settings, "numbers": measure(judged)}
    (part / "result.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def read_cells(study: Path) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """`(result, answers)` of each finished cell, base model first, decodings in the order of their table.

    Raises:
        UsageError: there is none.
    """
    cells = []
    for model in ("base", "adapter"):
        for decoding in DECODINGS:
            folder = study / "cells" / f"{model}-{decoding}"
            if (folder / "result.json").is_file():
                answers = (folder / "generations.jsonl").read_text(encoding="utf-8").strip().split("\n")
                result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
                if "num_sound" in result["numbers"]:
                    cells.append((result, [json.loads(line) for line in answers]))
    if not cells:
        raise UsageError(f"{study} holds no finished cells to make a table from. Ask first: python ablate.py")
    return cells


def measure(judged: Sequence[Judged]) -> dict[str, float]:
    """Numbers of a cell: those of `infer.Quality`, and means over the answers."""
    answers = [each.answer for each in judged]
    words = [re.findall(r"\w+", answer.text.lower()) for answer in answers]
    return dataclasses.asdict(infer.measure_quality(judged)) | {
        "mean_answer_tokens": sum(answer.answer_tokens for answer in answers) / len(answers),
        "rep_4": sum(infer.rep_n(each, 4) for each in words) / len(answers),
        "distinct_2": sum(infer.distinct_n(each, 2) for each in words) / len(answers),
    }


# --- The page ----------------------------------------------------------------------------------------------------


def make_page(cells: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]]) -> str:
    """The study as markdown: the table, then every answer. The same records give the same bytes."""
    lines = [
        "# Base model and adapter under each decoding",
        "",
        *dict.fromkeys(
            f"{result['settings']['model']}: {result['settings']['base_model']}"
            + (f", adapter {result['settings']['model_fingerprint'][:12]}" if result["settings"]["model"] == "adapter" else "")
            + "  "
            for result, _ in cells
        ),
        "",
        "*sound and ended*: nothing in the form speaks against the answer (the findings of infer.py), and the stop token ended "
        "it before the cap. *points*: what a sound answer names, by the lists of samples/probes.jsonl; *wrong claims*: what it "
        "must not. *rep-4*: share of 4-word sequences that occurred before (0 is best, a loop nears 1). *distinct-2*: share of "
        "2-word sequences that are new. None of it says that an answer is right, and none of this is medical advice.",
        "",
        "| model | decoding | sound and ended ↑ | sound ↑ | stopped ↑ | points ↑ | wrong claims ↓ | mean tokens | rep-4 ↓ | "
        "distinct-2 ↑ |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result, _ in cells:
        settings, numbers = result["settings"], result["numbers"]
        lines.append(
            f"| {settings['model']} | {settings['decoding']} | {numbers['num_sound_and_ended']} of {numbers['num_answers']} | "
            f"{numbers['num_sound']} | {numbers['num_ended']} | {numbers['num_named']}/{numbers['num_points']} | "
            f"{numbers['num_wrong_claims']} | {numbers['mean_answer_tokens']:.0f} | {numbers['rep_4']:.2f} | "
            f"{numbers['distinct_2']:.2f} |"
        )
    lines += ["", "## Answers"]
    for result, answers in cells:
        settings = result["settings"]
        lines += ["", "<details>", f"<summary>{settings['model']}, {settings['decoding']}</summary>", ""]
        for answer in answers:
            lines += [
                f"**{html.escape(answer['question'])}** ({answer['answer_tokens']} tokens, {answer['finish_reason']}; "
                f"{answer['verdict']})",
                "",
                # As HTML, so that nothing in an answer is read as markdown.
                f"<pre>{html.escape(answer['text'])}</pre>",
                "",
            ]
        lines.append("</details>")
    return "\n".join(lines) + "\n"


# --- Command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AblateConfig:
    """Flags of ablate.py."""

    adapter: str | None = None
    """Adapter folder or hub id. Unset: the adapter of the run that was finished last."""
    study: str = "decoding"
    """Folder of the study below runs/ablate."""
    num_probes: int = 5
    """How many probe questions to ask; the story's five come first."""
    table: bool = False
    """Make the table again from the records, and ask nothing."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.study):
            raise ValueError(f"--study {self.study!r}: letters, digits, '.', '_' and '-' are allowed, a letter or digit first.")
        if self.num_probes < 1:
            raise ValueError(f"--num-probes {self.num_probes}: 1 or more is wanted.")


def answer_cells(cells: Sequence[Cell], profile: data.ProfileName, adapter: Path, study: Path) -> None:
    """Asks what is missing, one model after the other, and records each cell."""
    infer.prepare_environment(profile, offline=cells[0].base_model == infer.SMALL_MODEL)
    loaded = infer.load_for_asking(profile, adapter)
    from tqdm import tqdm

    total = sum(DECODINGS[cell.decoding].max_new_tokens * len(cell.questions) for cell in cells)
    with tqdm(total=total, unit="token", desc="answering") as bar:
        for name in ("base", "adapter"):
            own = [cell for cell in cells if cell.model == name]
            # All decodings in one call: those of one question share its forward passes.
            requests = [infer.Request(question, DECODINGS[cell.decoding]) for cell in own for question in cell.questions]
            with loaded.without_adapter() if name == "base" else contextlib.nullcontext(loaded) as model:
                answers = infer.answer_requests(model, requests, bar.update)
                judged = [infer.judge_asked(model, answer) for answer in answers]
            for place, cell in enumerate(own):
                size = len(cell.questions)
                write_cell(cell, judged[place * size : (place + 1) * size], study)


def main(config: AblateConfig) -> None:
    """Asks what is not recorded yet, then writes the page."""
    study = ABLATE_RUNS / config.study
    if not config.table:
        infer.prepare_cublas()
        adapter = infer.find_adapter(config.adapter) if config.adapter else infer.latest_adapter()
        record = infer.read_adapter_record(adapter)
        profile = infer.resolve_asked_profile("auto", record)
        grid = make_grid(record.base_model, adapter, [probe.question for probe in data.read_probes()[: config.num_probes]])
        missing = [cell for cell in grid if not is_done(cell, study)]
        print(f"{len(grid)} cells of {len(grid[0].questions)} questions, {len(missing)} to answer: {adapter} and its base")
        if missing:
            answer_cells(missing, profile, adapter, study)
    page = study / "ablation.md"
    text = make_page(read_cells(study))
    data.write_whole(page, text)
    print("\n".join(line for line in text.splitlines() if line.startswith("|")))
    print(f"{page} holds this table and every answer.")


if __name__ == "__main__":
    data.run_command(AblateConfig, main, __doc__)

"""Ablations: the grid as values, claims by their rules, the page on records made by hand, and a real study that is killed."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import read_lines, run_script, run_study
from markdown_it import MarkdownIt
from scipy.stats import binomtest

import ablate
import data
import infer
import train
from tests import tiny_study

QUESTIONS = [probe.question for probe in ablate.order_probes()]
SOUND = "A heart attack causes chest pain and shortness of breath. Call an ambulance at once, and sit down until it comes."
LOOP = "The pain is in the chest. " * 12
DRIFT = "Eye yawning, Eye yawns, Eye years, Eye yolks, Eye yells, Eye yields, Eye yarns, Eye yachts and the sore throat."


# --- The grid ----------------------------------------------------------------------------------------------------


def changed(one, other):
    return {field.name for field in dataclasses.fields(one) if getattr(one, field.name) != getattr(other, field.name)}


@pytest.mark.parametrize("run", ["week3", "week4"])
def test_each_arm_beside_a_run_of_the_story_is_a_single_change_of_it(run):
    arms = {name: arm for name, arm in ablate.TRAINING_ARMS.items() if name.startswith(f"{run}-")}
    changes = [changed(arm, ablate.TRAINING_ARMS[run]) for arm in arms.values()]
    assert len(arms) == 3 and all(len(change) == 1 for change in changes)
    assert len({change.pop() for change in changes}) == 3


def test_each_decoding_between_collapse_and_fix_is_a_single_change():
    for name, field in {"no-ban": "no_repeat_ngram_size", "penalty": "repetition_penalty", "stop": "stop"}.items():
        # Without a ban there is nothing that could count the prompt.
        change = changed(ablate.DECODING_ARMS[f"collapse-{name}"], infer.DECODINGS["story-collapse"]) - {"count_prompt"}
        assert change == {field}
    assert changed(ablate.DECODING_ARMS["fix-answer-only"], infer.DECODINGS["story-fix"]) == {"count_prompt"}


@pytest.mark.parametrize("profile", data.PROFILES)
def test_wide_attention_has_as_many_parameters_as_all_linear(profile):
    counts = []
    for modules, r in (("attention", ablate.WIDE_R), ("all-linear", 16)):
        counts.append(train.count_adapter(data.PROFILES[profile].architecture, modules, r)[0])
    assert counts[0] == pytest.approx(counts[1], rel=0.01)


def test_every_arm_of_a_study_is_a_line_that_train_understands():
    for profile in data.PROFILES:
        for arm in ablate.TRAINING_ARMS.values():
            ran = ablate.tyro.cli(train.TrainConfig, args=ablate.training_flags(arm, profile, 2, 32))
            assert (ran.mix, ran.target_modules, ran.epochs, ran.pad, ran.r) == (
                *(arm.mix, arm.target_modules, arm.epochs, arm.pad, arm.r),
            )
            assert ran.lora_alpha == 2 * arm.r and ran.seed == train.TrainConfig.seed + 2 and ran.num_rows == 32


@pytest.mark.parametrize("profile", data.PROFILES)
def test_a_dry_run_prints_grid_commands_and_time_and_touches_nothing(tmp_path, profile):
    ran = run_script("ablate.py", "--dry-run", "--profile", profile, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    for model, decodings in ablate.STUDIES["all"].items():
        assert re.search(rf"(?m)^{model} .*{', '.join(decodings)}$", ran.stdout)
    commands = re.findall(r"(?m)^python train\.py .*$", ran.stdout)
    assert len(commands) == 10 and all(f"--profile {profile} " in command for command in commands)
    assert re.search(r"about \d+ min in all", ran.stdout)
    assert list(tmp_path.iterdir()) == []


def test_under_a_launcher_every_worker_has_its_own_gpu_and_trains_on_its_own(tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    grid = ablate.Grid(tmp_path, "t4", "m", (), (), workers=1, local_rank=1, local_world_size=2)
    own = ablate.make_environment(grid, 0)
    assert own["CUDA_VISIBLE_DEVICES"] == "1" and not {"RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} & own.keys()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7,9")
    assert ablate.make_environment(dataclasses.replace(grid, workers=2), 1)["CUDA_VISIBLE_DEVICES"] == "9"


# --- Claiming ----------------------------------------------------------------------------------------------------


def test_a_claim_is_held_until_the_last_process_that_was_given_it_ends(tmp_path):
    path = tmp_path / "claims" / "week4"
    with ablate.claim(path) as descriptor:
        assert descriptor is not None
        with ablate.claim(path) as second:
            assert second is None
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[descriptor])
    with ablate.claim(path) as while_the_child_lives:
        assert while_the_child_lives is None
    child.kill()
    child.wait()
    with ablate.claim(path) as descriptor:
        assert descriptor is not None


# --- Records made by hand ----------------------------------------------------------------------------------------


def make_record(question, text, finish_reason="stop", decoding="kit", num_overruled=0):
    token_ids = list(text.encode())
    answer = infer.Answer(
        question, text, token_ids, finish_reason, 9, 2, num_overruled, ablate.DECODING_ARMS[decoding], "model", None, 0.0
    )
    probe = next(probe for probe in infer.read_probes() if probe.question == question)
    surprisal = (9.0, (0, len(text))) if text == DRIFT else infer.NOTHING
    judged = infer.judge(text, question, finish_reason, surprisal, answer=answer, probe=probe)
    return json.loads(json.dumps(judged.to_record()))


def write_study(folder, texts, loss=(3.0, 2.0), study="all"):
    """A study of the rows `texts[arm, decoding]`, or `texts[arm, decoding, seed]`: a list of texts, or of (text, finish
    reason), one a question."""
    models = {}
    for (arm, decoding, *seeds), answers in texts.items():
        seed = seeds[0] if seeds else 0
        model = f"{arm}-seed{seed}" if seed else arm
        settings = {"arm": arm, "seed": seed, "decoding": decoding}
        models.setdefault((model, arm), {})[decoding] = ablate.digest_json(settings)
        records = [
            make_record(question, *((answer,) if isinstance(answer, str) else answer), decoding=decoding)
            for question, answer in zip(QUESTIONS, answers, strict=False)
        ]
        training = {"eval_loss_before": loss[0], "eval_loss": loss[1], "mean_token_accuracy": 0.5, "adapter_bytes": 4_000_000}
        training |= {"training_seconds": 60.0, "train_rows": 64, "train_tokens": 9000, "steps": 4}
        made_by = {"machine": "a | machine", "dtype": "float32", "versions": {"torch": "2"}, "commit": None}
        result = {
            "settings": settings,
            "training": None if arm == "base" else training,
            "again": {"asked": 1, "same": 1, "tokens": 64},
            "stop_ids": [2],
            "made_by": made_by,
        }
        ablate.write_cell(folder, model, result, records)
    about = {"study": study, "command": "python ablate.py", "base_model": "model", "probes": ["a_b"]}
    about |= {"questions": QUESTIONS[:2], "models": [[*names, cells] for names, cells in models.items()]}
    (folder / "study.json").write_text(json.dumps(about))
    return ablate.read_records(folder)


def verdict(records, claim_id):
    claim = next(claim for claim in ablate.CLAIMS if claim.id == claim_id)
    return claim.check(records)[0]


def test_intervals_and_p_are_those_of_scipy():
    for wins, losses in ((0, 0), (3, 0), (8, 1), (5, 5), (0, 7)):
        if wins + losses:
            expected = binomtest(wins, wins + losses)
            interval = expected.proportion_ci(method="wilson")
            assert ablate.sign_test(wins, losses) == pytest.approx(expected.pvalue)
            assert ablate.wilson_interval(wins, wins + losses) == pytest.approx((interval.low, interval.high), abs=1e-6)
    assert ablate.sign_test(0, 0) == 1.0 and ablate.wilson_interval(0, 0) == (0.0, 1.0)


def test_a_claim_is_decided_by_its_rule_and_may_come_out_either_way(tmp_path):
    drifting, sound = [DRIFT] * 8, [SOUND] * 8
    with_ban, without = ("week4", "story-collapse"), ("week4", "collapse-no-ban")
    assert verdict(write_study(tmp_path / "a", {with_ban: drifting, without: sound}), "C3") == "shown"
    assert verdict(write_study(tmp_path / "b", {with_ban: sound, without: drifting}), "C3") == "the opposite"
    assert verdict(write_study(tmp_path / "c", {with_ban: sound, without: sound}), "C3") == "not shown"
    # Five of five is p 0.0625.
    assert verdict(write_study(tmp_path / "d", {with_ban: drifting[:5], without: sound[:5]}), "C3") == "not shown"
    assert verdict(write_study(tmp_path / "e", {with_ban: drifting}), "C3") == "not run here"
    # Loops are no drift.
    assert verdict(write_study(tmp_path / "f", {with_ban: [LOOP] * 8, without: sound}), "C3") == "not shown"


def test_the_loss_that_fell_shows_nothing_unless_the_answers_got_worse(tmp_path):
    base, week4 = ("base", "story-collapse"), ("week4", "story-collapse")
    worse = {base: [SOUND] * 8, week4: [DRIFT] * 8}
    assert verdict(write_study(tmp_path / "a", worse), "C1") == "shown"
    assert verdict(write_study(tmp_path / "b", worse, loss=(2.0, 3.0)), "C1") == "not shown"
    assert verdict(write_study(tmp_path / "c", {base: [SOUND] * 8, week4: [SOUND] * 8}), "C1") == "not shown"
    assert verdict(write_study(tmp_path / "d", {base: [DRIFT] * 8, week4: [SOUND] * 8}), "C1") == "the opposite"


def test_a_penalty_is_judged_by_its_loops_and_by_its_harm(tmp_path):
    plain, fix = ("week4", "plain"), ("week4", "story-fix")
    mixed = [LOOP] * 8 + [SOUND] * 8
    assert verdict(write_study(tmp_path / "a", {plain: mixed, fix: [SOUND] * 16}), "C9") == "shown"
    harmed = [(SOUND, "length")] * 8 + [DRIFT] * 8
    assert verdict(write_study(tmp_path / "b", {plain: mixed, fix: harmed}), "C9") == "not shown"
    assert verdict(write_study(tmp_path / "c", {plain: [SOUND] * 8, fix: [DRIFT] * 8}), "C9") == "the opposite"
    assert verdict(write_study(tmp_path / "d", {plain: [SOUND] * 8, fix: [LOOP] * 8}), "C9") == "the opposite"


def test_feed_forward_modules_must_beat_attention_of_as_many_parameters_too(tmp_path):
    good = ["; ".join(point.phrases[0] for point in probe.points) for probe in ablate.order_probes()[:8]]
    arms = {("week4-all-linear", "kit"): good, ("week4", "kit"): ["Nothing."] * 8}
    assert verdict(write_study(tmp_path / "a", arms), "C6") == "not run here"
    assert verdict(write_study(tmp_path / "b", arms | {("week4-wide-attention", "kit"): ["Nothing."] * 8}), "C6") == "shown"
    assert verdict(write_study(tmp_path / "c", arms | {("week4-wide-attention", "kit"): good}), "C6") == "not shown"


def test_a_question_counts_once_however_many_models_answer_it(tmp_path):
    """One question of eight that drifts in ten models is one question, and no evidence."""
    arms = [name for name in ablate.TRAINING_ARMS if name.startswith(("week", "fixed", "kit"))][:10]
    texts = {(arm, "collapse-no-ban"): [SOUND] * 8 for arm in arms}
    texts |= {(arm, "story-collapse"): [DRIFT] + [SOUND] * 7 for arm in arms}
    records = write_study(tmp_path, texts)
    compared = ablate.compare(records.pair_decodings("story-collapse", "collapse-no-ban"), ablate.drifts)
    assert (compared.pairs, compared.questions, compared.larger, compared.smaller) == (80, 8, 1, 0)
    assert verdict(records, "C3") == "not shown"


def test_seeds_are_pooled_and_one_that_failed_takes_nothing_with_it(tmp_path):
    texts = {
        ("base", "story-collapse"): [SOUND] * 2,
        ("week4", "story-collapse", 1): [DRIFT] * 2,
        ("week4", "story-collapse", 2): [SOUND] * 2,
        ("week3", "week3", 1): [SOUND] * 2,
        ("fixed", "story-fix", 1): [SOUND] * 2,
        ("week4-rebalanced", "story-collapse"): [SOUND] * 2,
    }
    records = write_study(tmp_path, texts)
    assert len(records.row("week4", "story-collapse").answers) == 4
    # The base model stands for every seed; another training does not.
    assert len(records.pair_arms("week4", "base")) == 4 and records.pair_arms("week4", "week4-rebalanced") == []
    page = ablate.make_page(records)
    assert "| 2 of 4 |" in page and "One question, three answers" in page


def test_a_loss_that_is_no_number_and_an_accuracy_that_is_missing_leave_a_page(tmp_path):
    write_study(tmp_path, {(arm, "kit"): [SOUND] * 2 for arm in ("base", "week4", "kit")}, loss=(3.0, float("nan")))
    for path in tmp_path.glob("cells/*/result.json"):
        path.write_text(path.read_text().replace('"mean_token_accuracy": 0.5', '"mean_token_accuracy": null'))
    ablate.write_page(tmp_path)
    assert "| nan |  |" in (tmp_path / "ablation.md").read_text() and (tmp_path / "ablation.png").is_file()


def test_arms_cut_from_one_run_count_once(tmp_path):
    names = ("story-collapse", "collapse-stop", "collapse-cap-128", "kit")
    texts = {(arm, name): [SOUND] * 3 for arm in ("base", "week4") for name in names}
    records = write_study(tmp_path, texts)
    assert len(records.pair_arms("week4", "base")) == 2 * 3


NASTY = (
    "| a | b |\n|---|---|\n</pre></details><script>alert(1)</script> ``` **b** _c_ ~~d~~ [e](http://f) ![g](h)\n\n# i\n"
    "- j\n1. k\n> l\n\x1b[31mred \\| m & n &amp; $x^2$ :smile: <!-- o \r\n\t\tp"
)


def render(page):
    return MarkdownIt("commonmark").enable("table").parse(page)


def test_no_answer_breaks_the_page(tmp_path):
    texts = {
        ("week3", "week3"): [NASTY] * 2,
        ("week4", "story-collapse"): ["- " + NASTY, "1) x"],
        ("fixed", "story-fix"): [DRIFT + "|" + NASTY] * 2,
    }
    page = ablate.make_page(write_study(tmp_path, texts))
    tokens = render(page)
    tables = [place for place, token in enumerate(tokens) if token.type == "table_open"]
    assert len(tables) == 3
    for place, (rows, columns) in zip(tables, ((4, len(ablate.COLUMNS)), (1 + len(ablate.CLAIMS), 5), (2, 3)), strict=True):
        end = next(at for at in range(place, len(tokens)) if tokens[at].type == "table_close")
        kinds = [token.type for token in tokens[place:end]]
        assert kinds.count("tr_open") == rows
        assert kinds.count("th_open") + kinds.count("td_open") == rows * columns
    # Headings are the page's own, and nothing of an answer became mark-up.
    titles = [tokens[at + 1].content.split(":")[0] for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert titles == ["Ablation", "The story's claims, on these records", "One question, three answers", "Answers"]
    inline = [child.type for token in tokens if token.type == "inline" for child in token.children]
    assert "strong_open" not in inline and "code_inline" in inline and inline.count("image") == 1
    assert page.count("<script") == 0 and "\x1b" not in page
    assert page.count("<pre>") == page.count("</pre>") == 6 and page.count("</details>") == 3


def test_an_answer_that_two_decodings_share_is_written_once(tmp_path):
    names = ("story-collapse", "collapse-stop")
    page = ablate.make_page(write_study(tmp_path, {("week4", name): [SOUND, DRIFT] for name in names}))
    assert page.count("<pre>") == 2
    assert page.count("The same answer as under [story-collapse](#week4.story-collapse).") == 2


@pytest.mark.parametrize("text", [NASTY, "- a", "1. a", "   # a", "a_b*c|d", "&lt;", "+ a", "=== a", "10) a", "a\n- b"])
def test_a_cell_reads_as_the_answer_was_written(text):
    tokens = render(f"| a | b |\n|---|---|\n| {ablate.escape_markdown(text)} | c |\n")
    cells = [tokens[at + 1] for at, token in enumerate(tokens) if token.type == "td_open"]
    assert len(cells) == 2
    shown = "".join("\n" if child.type in ("html_inline", "softbreak") else child.content for child in cells[0].children)
    expected = data.escape_controls(text.replace("\r\n", "\n").replace("\t", " "))
    assert shown.split() == expected.split()


def test_what_speaks_against_an_answer_is_marked_in_it():
    marked = ablate.mark_findings(make_record(QUESTIONS[0], "Drink water. " + LOOP))
    assert re.fullmatch(r"(Drink water\. )?⟦.*The pain is in the chest\..*⟧.*", marked) and marked.count("⟦") == 1
    assert "⟦" not in ablate.mark_findings(make_record(QUESTIONS[0], SOUND))
    assert "⟦" not in ablate.mark_findings(make_record(QUESTIONS[0], SOUND, "length"))


def test_a_row_is_bold_only_beyond_the_interval_of_the_next(tmp_path):
    rows = {("base", "plain"): [DRIFT] * 10, ("base", "kit"): [SOUND] * 10, ("base", "story-fix"): [SOUND] * 9 + [DRIFT]}
    assert "**" not in ablate.make_page(write_study(tmp_path / "a", rows)).split("## The story")[0]
    rows["base", "story-fix"] = [SOUND] * 3 + [DRIFT] * 7
    assert "| **10 of 10** |" in ablate.make_page(write_study(tmp_path / "b", rows))


def test_page_and_picture_made_twice_are_the_same_bytes(tmp_path):
    study = tmp_path / "runs" / "ablate" / "all"
    texts = {(arm, name): [SOUND, DRIFT] for arm in ("base", "week3", "week4") for name in ("kit", "story-fix", "week3")}
    write_study(study, texts)
    made = []
    for _ in range(2):
        ran = run_script("ablate.py", "--table", cwd=tmp_path)
        assert ran.returncode == 0 and ran.stderr == ""
        made.append([(study / name).read_bytes() for name in ("ablation.md", "ablation.png")])
    assert made[0] == made[1] and made[0][1].startswith(b"\x89PNG")


def test_a_failed_cell_is_a_row_that_says_so_and_older_answers_stay(tmp_path):
    write_study(tmp_path, {("base", "kit"): [SOUND] * 2, ("week4", "kit"): [SOUND] * 2})
    answers = tmp_path / "cells" / "week4.kit" / "generations.jsonl"
    settings = {"arm": "week4", "seed": 0, "decoding": "kit", "flags": "others"}
    failed = {"settings": settings, "error": "The process ended.\n\x1b[31ma | line\nout of `memory`"}
    ablate.failed_file(tmp_path, "week4", "kit").write_text(json.dumps(failed))
    about = json.loads((tmp_path / "study.json").read_text())
    about["models"][1][2]["kit"] = ablate.digest_json(settings)
    (tmp_path / "study.json").write_text(json.dumps(about))
    page = ablate.make_page(ablate.read_records(tmp_path))
    assert "failed: out of &#96;memory&#96;" in page and "\x1b" not in page
    assert [token.type for token in render(page)].count("table_open") == 2
    assert answers.is_file()


def test_a_cell_of_other_settings_is_not_in_the_table(tmp_path):
    write_study(tmp_path, {("base", "kit"): [SOUND] * 2, ("week4", "kit"): [SOUND] * 2})
    result = json.loads((tmp_path / "cells" / "week4.kit" / "result.json").read_text())
    result["settings"]["seed"] = 1
    (tmp_path / "cells" / "week4.kit" / "result.json").write_text(json.dumps(result))
    assert list(ablate.read_records(tmp_path).rows) == ["base.kit"]


# --- A real study ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stopped_study_goes_on_to_a_row_a_cell_and_every_answer(ablated):
    study, _ = ablated
    page = (study / "ablation.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| (base|kit-by-loss) \| (\S+) \|", page.split("## ")[0])
    assert rows == [(model, name) for model in ("base", "kit-by-loss") for name in tiny_study.DECODINGS]
    assert page.count("<pre>") + page.count("The same answer as under") == 2 * len(rows)
    for model, name in rows:
        answers = read_lines(study / "cells" / f"{model}.{name}" / "generations.jsonl")
        for answer in answers:
            assert answer["answer_tokens"] == len(answer["token_ids"]) <= 12
            assert (answer["finish_reason"] == "stop") == (answer["token_ids"][-1] == 2)
        result = json.loads((study / "cells" / f"{model}.{name}" / "result.json").read_text())
        assert result["again"] == {"asked": 1, "same": 1, "tokens": 12} and len(answers) == 2


@pytest.mark.slow
def test_answers_of_a_study_are_those_that_infer_gives(ablated, small_model):
    study, _ = ablated
    recorded = read_lines(study / "cells" / "base.kit" / "generations.jsonl")[0]
    request = infer.Request(QUESTIONS[0], dataclasses.replace(infer.DECODINGS["kit"], max_new_tokens=12))
    [answer] = infer.answer_requests(small_model, [request])
    assert answer.token_ids == recorded["token_ids"]


@pytest.mark.slow
def test_a_study_again_asks_nothing_and_writes_the_same_page(ablated):
    study, _ = ablated
    first, cells = (study / "ablation.md").read_bytes(), sorted(path.stat().st_mtime_ns for path in study.glob("cells/*/*"))
    code, said = run_study(study.parents[2])
    assert code == 0 and "to be answered" not in said
    assert (study / "ablation.md").read_bytes() == first
    assert sorted(path.stat().st_mtime_ns for path in study.glob("cells/*/*")) == cells


@pytest.mark.slow
def test_a_broken_cell_is_made_again_and_a_model_that_fails_is_recorded_while_the_rest_goes_on(ablated, tmp_path):
    shutil.copytree(ablated[0].parents[2], tmp_path, dirs_exist_ok=True)
    study = tmp_path / "runs" / "ablate" / "all"
    before = read_lines(study / "cells" / "base.kit" / "generations.jsonl")
    cut = study / "cells" / "base.kit" / "generations.jsonl"
    cut.write_bytes(cut.read_bytes()[:-40])
    code, said = run_study(tmp_path, "--table")
    assert code == 2 and "base.kit/generations.jsonl is cut. Remove" in said
    # In another folder the rows are other files, so that the trained model's cells are asked again; its run is taken over.
    older = (study / "cells" / f"{tiny_study.ARM}.plain" / "generations.jsonl").read_bytes()
    weights = study / "runs" / tiny_study.ARM / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, said = run_study(tmp_path)
    assert code == 1, said
    page = (study / "ablation.md").read_text(encoding="utf-8")
    assert page.count("| failed: ") == 3 and "adapter&#95;model.safetensors is cut or broken" in page
    assert (study / "cells" / f"{tiny_study.ARM}.plain" / "generations.jsonl").read_bytes() == older
    after = read_lines(study / "cells" / "base.kit" / "generations.jsonl")
    assert [answer["token_ids"] for answer in after] == [answer["token_ids"] for answer in before]


@pytest.mark.slow
def test_the_best_decoding_is_saved(trained, tmp_path):
    shutil.copytree(trained.cwd / "runs", tmp_path / "runs")
    adapter = tmp_path / "runs" / "train" / "tiny" / "adapter"
    code, said = run_study(tmp_path, "--study", "decoding", "--save-best")
    assert code == 0, said
    record, config = (json.loads((adapter / name).read_text()) for name in ("kit.json", "generation_config.json"))
    name = re.search(r"is asked under (\S+) from now on", said)[1]
    assert record["decoding"] == dataclasses.asdict(dataclasses.replace(infer.DECODINGS[name], max_new_tokens=12))
    assert config["repetition_penalty"] == record["decoding"]["repetition_penalty"]
    assert infer.check_adapter(adapter).record.decoding.max_new_tokens == 12

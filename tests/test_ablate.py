"""Ablations: arms, claims by their rules, reports of records made by hand, and a real study."""

import dataclasses
import functools
import json
import math
import re
import shutil
import sys
import tarfile
import types

import pandas
import pytest
from conftest import ROOT, call_script, read_lines, run_study, write_rows
from markdown_it import MarkdownIt

import ablate
import data
import infer
import train
from tests import blind_pairs, tiny_study

STUDY = ablate.make_study(ablate.AblateConfig(profile="cpu"))
PROBES = {probe.question: probe for probe in ablate.make_study(ablate.AblateConfig(profile="t4")).probes}
QUESTIONS = list(PROBES)
PUBLISHED = ROOT / "docs" / "story"
SOUND = "A heart attack causes chest pain and shortness of breath. Call an ambulance at once, and sit down until it comes."
LOOP = "The pain is in the chest. " * 12
DRIFT = "Eye yawning, Eye yawns, Eye years, Eye yolks, Eye yells, Eye yields, Eye yarns, Eye yachts and the sore throat."


# --- Arms --------------------------------------------------------------------------------------------------------


def changed(one, other):
    return {name for name in one if one[name] != other.get(name)}


def test_each_arm_beside_week4_is_a_single_change_of_it():
    arms = {name: arm for name, arm in ablate.TRAINING_ARMS.items() if name.startswith("week4-")}
    changes = [changed(arm, ablate.TRAINING_ARMS["week4"]) for arm in arms.values()]
    # Evaluations select weights, and the scale of the update follows its rank.
    changes = [frozenset(change - {"eval_every", "num_probes", "lora_alpha"}) for change in changes]
    assert sorted(changes, key=str) == sorted(map(frozenset, (["epochs"], ["mix"], ["target_modules"], ["r"])), key=str)


def test_each_decoding_between_collapse_and_fix_is_a_single_change():
    decodings = {name: dataclasses.asdict(decoding) for name, decoding in ablate.DECODING_ARMS.items()}
    for name, field in {"no-ban": "no_repeat_ngram_size", "stop": "stop", "cap-128": "max_new_tokens"}.items():
        # Without a ban there is nothing that could count the prompt.
        assert changed(decodings[f"collapse-{name}"], decodings["story-collapse"]) - {"count_prompt"} == {field}
    assert changed(decodings["fix-cap-128"], decodings["story-fix"]) == {"max_new_tokens"}


def test_the_arm_that_needs_mixes_equals_another_without_them(tmp_path):
    assert changed(ablate.TRAINING_ARMS["week4"], ablate.TRAINING_ARMS["week4-rebalanced"]) == {"mix"}
    rows = write_chats(tmp_path / "rows.jsonl", vet=40)
    arms = ablate.make_study(ablate.AblateConfig(profile="cpu", rows=rows)).arms
    assert list(arms) == [arm for arm in ablate.ARMS if arm != "week4-rebalanced"]
    assert all("--mix" not in flags for flags in arms.values())


@pytest.mark.parametrize("profile", data.PROFILES)
def test_wide_attention_has_as_many_parameters_as_all_linear(profile):
    counts = [
        train.count_adapter(data.PROFILES[profile].architecture, modules, r)[0]
        for modules, r in (("attention", ablate.WIDE_R), ("all-linear", 16))
    ]
    assert counts[0] == pytest.approx(counts[1], rel=0.01)


def test_every_arm_is_a_command_that_train_understands():
    import tyro

    arms = ablate.make_study(ablate.AblateConfig(profile="cpu", num_rows=32)).arms
    assert list(arms) == ["base", *ablate.TRAINING_ARMS] and arms["base"] == []
    for arm, changes in ablate.TRAINING_ARMS.items():
        config = tyro.cli(train.TrainConfig, args=arms[arm])
        assert all(getattr(config, field) == value for field, value in changes.items())
        assert (config.name, config.profile, config.num_rows) == (arm, "cpu", 32)
        assert config.lora_alpha == 2 * config.r and config.num_probes == (0 if arm.startswith("week4-") else 10)


@pytest.mark.parametrize("profile", data.PROFILES)
def test_a_dry_run_prints_arms_and_commands_and_writes_nothing(tmp_path, profile):
    ran = call_script("ablate.py", "--dry-run", "--profile", profile, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    for arm, decodings in ablate.ARMS.items():
        assert re.search(rf"(?m)^{arm} +{len(decodings)} of {len(decodings)} cells to do  {', '.join(decodings)}$", ran.stdout)
    commands = re.findall(r"(?m)^python train\.py .*$", ran.stdout)
    assert len(commands) == 8 and all(f"--profile={profile} " in command for command in commands)
    assert "57 cells of " in ran.stdout and list(tmp_path.iterdir()) == []


def test_shards_are_disjoint_and_together_all_arms(tmp_path):
    found = []
    for part in range(3):
        ran = call_script("ablate.py", "--dry-run", "--profile", "cpu", "--shard", f"{part}/3", cwd=tmp_path)
        found.append(re.findall(r"(?m)^(\S+) +\d of \d cells to do", ran.stdout))
    assert sorted(arm for arms in found for arm in arms) == sorted(ablate.ARMS)
    assert all(len(arms) == 3 for arms in found)
    ran = call_script("ablate.py", "--profile", "cpu", "--shard", "9/10", cwd=tmp_path)
    assert ran.returncode == 0 and ran.stdout.startswith("0 cells of ") and list(tmp_path.iterdir()) == []


def write_chats(path, **counts):
    """Rows of their own system prompts: as many as given, of a vet or a nurse."""
    rows = []
    for name, number in ((name, number) for name, count in counts.items() for number in range(count)):
        texts = (f"You are a {name}.", f"What does a {name} do for burn {number}?", f"Cool it for {number} minutes, says the {name}.")
        roles = zip(("system", "user", "assistant"), texts, strict=True)
        rows.append({"messages": [{"role": role, "content": text} for role, text in roles]})
    return str(write_rows(path, rows))


def test_arms_are_asked_under_the_prompt_that_their_rows_bring(tmp_path):
    given = {"profile": "cpu", "conversational": write_chats(tmp_path / "vets.jsonl", vet=40)}
    given["encyclopedic"] = write_chats(tmp_path / "more.jsonl", vet=60)
    assert ablate.make_study(ablate.AblateConfig(**given)).system_prompt == "You are a vet."
    study = ablate.make_study(ablate.AblateConfig(**given, system_prompt="Be brief."))
    assert study.system_prompt == "Be brief."
    # Without rows of the user: an adapter's own prompt and, for the base model, the story's.
    assert STUDY.system_prompt is None


def test_a_study_is_resumed_with_its_settings_only(tmp_path):
    path = tmp_path / "rows.jsonl"

    def settings(**flags):
        return ablate.make_study(ablate.AblateConfig(profile="cpu", name="a", **flags)).settings

    others = [{"system_prompt": "Be brief."}, {"num_probes": 3}, {"num_rows": 32}, {"eval_every": 0.25}]
    assert settings() == settings(shard="1/2", workers=1) and len({settings(), *(settings(**each) for each in others)}) == 5
    write_chats(path, vet=40)
    before = settings(rows=str(path))
    write_chats(path, vet=41)
    assert before != settings(rows=str(path))
    (tmp_path / "runs" / "ablate" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "ablate" / "a" / "study.json").write_text(json.dumps({"settings": "other"}))
    ran = call_script("ablate.py", "--profile", "cpu", "--name", "a", cwd=tmp_path)
    assert ran.returncode == 2 and "runs/ablate/a is a study with other flags, rows or probes, or is corrupt. Choose another --name" in ran.stderr


# --- Records made by hand ----------------------------------------------------------------------------------------


@functools.cache
def judge_once(question, text, reason):
    surprisal = (9.0, (0, len(text))) if text == DRIFT else infer.NOTHING
    return infer.judge(text, question, reason, surprisal, probe=PROBES[question])


def make_lines(arm, decoding, answers):
    lines = []
    for question, given in zip(QUESTIONS, answers, strict=False):
        text, reason = (given, "stop") if isinstance(given, str) else given
        answer = infer.Answer(
            question, text, list(text.encode()), reason, 9, 2, 0, ablate.DECODING_ARMS[decoding], "model", None, 0.0
        )
        judged = dataclasses.replace(judge_once(question, text, reason), answer=answer)
        cell = {"arm": arm, "decoding_arm": decoding, "stop_ids": [2], "repeats": True}
        lines.append(cell | judged.to_record())
    return lines


def write_run(folder, losses, evaluations=()):
    folder.mkdir(parents=True, exist_ok=True)
    selected = dict.fromkeys(train.METRICS, 4)
    numbers = {"before": {"eval_loss": losses[0]}, "chosen": {"eval_loss": losses[1]}, "selected": selected}
    numbers |= {"steps": 4, "training_seconds": 60.0, "adapter_bytes": 4_000_000, "train_rows": 64, "train_tokens": 9000}
    (folder / "run.json").write_text(json.dumps({"numbers": numbers}))
    write_rows(folder / "metrics.jsonl", evaluations)


def write_study(folder, texts, losses=(3.0, 2.0)):
    """Records of the cells `texts[arm, decoding]`: one text, or (text, finish reason), per question."""
    (folder / "cells").mkdir(parents=True)
    for (arm, decoding), answers in texts.items():
        write_rows(folder / "cells" / f"{arm}.{decoding}.jsonl", make_lines(arm, decoding, answers))
        if arm != "base":
            write_run(folder / "runs" / arm, losses)
    about = {"command": "python ablate.py", "base_model": "model"}
    about["questions"] = QUESTIONS[: len(next(iter(texts.values())))]
    about["arms"] = list(dict.fromkeys(arm for arm, _ in texts))
    (folder / "study.json").write_text(json.dumps(about))
    return ablate.read_records(folder)


def make_report(records):
    return ablate.make_report(records, ablate.decide_claims(records))


def verdict(records, claim):
    return ablate.decide_claims(records)[claim][0]


def compare_pairs(larger, smaller, ties, sense=1):
    """The comparison of two cells with these differences, and its verdict."""
    outcomes = [(1, 0)] * larger + [(0, 1)] * smaller + [(1, 1)] * ties
    cells = pandas.DataFrame(outcomes, columns=["one", "other"])
    cells = {("week4", name): cells[[name]].set_axis(["ended"], axis=1) for name in cells}
    records, query = types.SimpleNamespace(cells=cells), ablate.Query("one", "other", "ended", sense)
    return query.run(records), ablate.compare(records, query)[0]


def test_intervals_and_p_by_hand():
    # Wilson (1927) by its formula; the sign test by the binomial coefficients.
    for count, total, p in ((0, 10, 2 / 1024), (4, 10, 772 / 1024), (10, 10, 2 / 1024), (55, 110, 1)):
        z, share = 1.959964, count / total
        centre, half = share + z * z / 2 / total, z * math.sqrt(share * (1 - share) / total + (z / total) ** 2 / 4)
        expected = [max(0, (centre - half) / (1 + z * z / total)), min(1, (centre + half) / (1 + z * z / total))]
        text, *numbers = ablate.count_share(pandas.Series([True] * count + [False] * (total - count)))
        assert numbers == pytest.approx([*expected, p], abs=1e-6) and text.startswith(f"{count} of {total} (")
    for larger, smaller, p in ((0, 0, 1), (3, 0, 0.25), (8, 1, 20 / 512), (5, 5, 1), (0, 7, 2 / 128)):
        assert compare_pairs(larger, smaller, 1)[0].p == pytest.approx(p)


def test_net_shares_by_hand():
    # Agresti and Min (2005): cells 8.5, 2.5, of 32.
    found, spread = compare_pairs(8, 2, 20)[0], 1.96 * math.sqrt(8.5 + 2.5 - 6 * 6 / 32)
    assert (found.net, found.low, found.high) == pytest.approx((0.2, (6 - spread) / 32, (6 + spread) / 32))
    assert "ended: one 93%, other 73% (pairs of cells: 1; +8 -2 of 30 questions, net +20% [" in found.text
    # No question differs: the interval does not shrink to nothing.
    found = compare_pairs(0, 0, 10)[0]
    assert (found.net, found.low, found.high) == pytest.approx((0, -1.96 / 12, 1.96 / 12))


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [((8, 1, 20), "shown"), ((1, 8, 20), "the opposite"), ((3, 3, 70), "not shown"), ((5, 2, 3), "undecidable")],
)
def test_too_few_questions_are_not_evidence_of_no_effect(pairs, verdict):
    assert compare_pairs(*pairs)[1] == verdict
    larger, smaller, ties = pairs
    assert compare_pairs(smaller, larger, ties, sense=-1)[1] == verdict


def test_a_claim_is_decided_by_its_rule_and_may_come_out_either_way(tmp_path):
    drifting, sound = [DRIFT] * 8, [SOUND] * 8
    with_ban, without = ("week4", "story-collapse"), ("week4", "collapse-no-ban")
    assert verdict(write_study(tmp_path / "a", {with_ban: drifting, without: sound}), "C3") == "shown"
    assert verdict(write_study(tmp_path / "b", {with_ban: sound, without: drifting}), "C3") == "the opposite"
    assert verdict(write_study(tmp_path / "c", {with_ban: sound, without: sound}), "C3") == "not shown"
    # Five of five is p 0.0625.
    assert verdict(write_study(tmp_path / "d", {with_ban: drifting[:5], without: sound[:5]}), "C3") == "undecidable"
    assert verdict(write_study(tmp_path / "e", {with_ban: drifting}), "C3") == "not run"
    # Loops are no drift.
    assert verdict(write_study(tmp_path / "f", {with_ban: [LOOP] * 8, without: sound}), "C3") == "not shown"


def test_the_loss_that_fell_shows_nothing_unless_the_answers_got_worse(tmp_path):
    base, week4 = ("base", "story-collapse"), ("week4", "story-collapse")
    worse = {base: [SOUND] * 8, week4: [DRIFT] * 8}
    assert verdict(write_study(tmp_path / "a", worse), "C1") == "shown"
    assert verdict(write_study(tmp_path / "b", worse, losses=(2.0, 3.0)), "C1") == "not shown"
    assert verdict(write_study(tmp_path / "c", {base: [SOUND] * 8, week4: [SOUND] * 8}), "C1") == "not shown"
    records = write_study(tmp_path / "d", {base: [DRIFT] * 8, week4: [SOUND] * 8})
    assert verdict(records, "C1") == "the opposite"
    assert verdict(records._replace(losses={}), "C1") == "not run"


def test_a_penalty_is_judged_by_its_loops_and_by_its_harm(tmp_path):
    plain, fix = ("week4", "plain"), ("week4", "story-fix")
    mixed = [LOOP] * 8 + [SOUND] * 8
    assert verdict(write_study(tmp_path / "a", {plain: mixed, fix: [SOUND] * 16}), "C9") == "shown"
    harmed = [(SOUND, "length")] * 8 + [DRIFT] * 8
    assert verdict(write_study(tmp_path / "b", {plain: mixed, fix: harmed}), "C9") == "not shown"
    assert verdict(write_study(tmp_path / "c", {plain: [SOUND] * 8, fix: [DRIFT] * 8}), "C9") == "the opposite"
    assert verdict(write_study(tmp_path / "d", {plain: [SOUND] * 8, fix: [LOOP] * 8}), "C9") == "the opposite"
    # Four more drifts are not significant, and ten questions cannot exclude a harm of 20%.
    few = write_study(tmp_path / "e", {plain: [LOOP] * 6 + [SOUND] * 4, fix: [SOUND] * 6 + [DRIFT] * 4})
    assert verdict(few, "C9") == "undecidable"


def test_feed_forward_modules_must_beat_attention_of_as_many_parameters_too(tmp_path):
    good = ["; ".join(point.phrases[0] for point in probe.points) for probe in list(PROBES.values())[:8]]
    arms = {("week4-all-linear", "kit"): good, ("week4", "kit"): ["Nothing."] * 8}
    assert verdict(write_study(tmp_path / "a", arms), "C6") == "not run"
    assert verdict(write_study(tmp_path / "b", arms | {("week4-wide-attention", "kit"): ["Nothing."] * 8}), "C6") == "shown"
    assert verdict(write_study(tmp_path / "c", arms | {("week4-wide-attention", "kit"): good}), "C6") == "not shown"
    records = write_study(tmp_path / "d", arms | {("week4-wide-attention", "kit"): ["Nothing."] * 8})
    assert verdict(records, "C5") == "not run" and "week4 to week4-all-linear" in make_report(records)
    for cell in records.cells.values():
        cell["points"] = math.nan
    assert verdict(records, "C6") == "not run"


def test_shares_are_decided_by_their_interval(tmp_path):
    cell = ("week4", "story-collapse")
    assert verdict(write_study(tmp_path / "a", {cell: [DRIFT] * 10}), "C2") == "shown"
    assert verdict(write_study(tmp_path / "b", {cell: [SOUND] * 10}), "C2") == "the opposite"
    assert verdict(write_study(tmp_path / "c", {cell: [SOUND] * 4 + [DRIFT] * 6}), "C2") == "undecidable"


@pytest.mark.parametrize(("own", "found"), [((2,), "not run"), ((1, 2, 3), "not run"), ((1, 3), "undecidable")])
def test_an_explicit_stop_token_is_no_change_if_the_generation_config_has_it(tmp_path, own, found):
    cells = {("week4", name): [SOUND] * 5 for name in ("story-collapse", "collapse-stop")}
    records = write_study(tmp_path, cells)
    assert verdict(records, "C8") == "not run"
    for (_, name), cell in records.cells.items():
        cell["stop_ids"] = [set(own if name == "story-collapse" else (2,))] * 5
    assert verdict(records, "C8") == found


def test_a_cap_is_judged_by_what_it_cuts(tmp_path):
    short = [(SOUND, "length")] * 8
    records = write_study(tmp_path, {("week4", "plain-cap-128"): short, ("week4", "plain"): [LOOP] * 8})
    found, text = ablate.decide_claims(records)["C10"]
    assert found == "shown" and text.endswith("cured 0 answers, cut 8 before they became unsound")


def test_a_question_counts_once_however_many_arms_answer_it(tmp_path):
    """One question of eight that drifts in ten arms is one question, and no evidence."""
    arms = list(ablate.TRAINING_ARMS)
    texts = {(arm, "collapse-no-ban"): [SOUND] * 8 for arm in arms}
    texts |= {(arm, "story-collapse"): [DRIFT] + [SOUND] * 7 for arm in arms}
    records = write_study(tmp_path, texts)
    compared = ablate.Query("story-collapse", "collapse-no-ban", "drift").run(records)
    assert "pairs of cells: 8; +1 -0 of 8 questions" in compared.text
    assert verdict(records, "C3") == "undecidable"


def test_decodings_cut_from_one_generation_count_once(tmp_path):
    names = ("story-collapse", "collapse-stop", "collapse-cap-128", "kit")
    texts = {(arm, name): [SOUND] * 3 for arm in ("base", "week4") for name in names}
    records = write_study(tmp_path, texts)
    assert len(ablate.Query("week4", "base").run(records).pairs) == 2
    # `kit` is an arm and a decoding.
    assert [len(ablate.Query(*names).run(records).pairs) for names in (("kit", "story-collapse"), ("story-collapse", "kit"))] == [2, 2]


def test_the_report_names_the_step_that_each_metric_selects(tmp_path):
    write_study(tmp_path, {("week4", "kit"): [SOUND] * 2})
    steps = [
        {"step": step, "eval_loss": loss, "eval_answers": 8, "eval_sound_and_ended": good}
        for step, loss, good in ((0, 3.0, 8), (2, 2.5, 6), (4, 2.0, 3))
    ]
    write_run(tmp_path / "runs" / "week4", (3.0, 2.0), steps)
    run = json.loads((tmp_path / "runs" / "week4" / "run.json").read_text())
    run["numbers"]["selected"] = {"answers": 2, "eval_loss": 4, "rouge_l": 4}
    (tmp_path / "runs" / "week4" / "run.json").write_text(json.dumps(run))
    report = make_report(ablate.read_records(tmp_path))
    assert "| week4 | step 2: 6 | step 4: 3 | step 4: 3 | step 2: 6 |" in report
    assert "| has the most | 1 of 1 | 0 of 1 | 0 of 1 |  |" in report


NASTY = (
    "| a | b |\n|---|---|\n</pre></details><script>alert(1)</script> ``` **b** _c_ ~~d~~ [e](http://f) ![g](h)\n\n# i\n"
    "- j\n1. k\n> l\n\x1b[31mred \\| m & n &amp; $x^2$ :smile: <!-- o \r\n\t\tp"
)


def render(page):
    return MarkdownIt("commonmark").enable("table").parse(page)


def test_no_answer_breaks_the_report(tmp_path):
    texts = {
        ("week3", "plain"): [NASTY] * 2,
        ("week4", "story-collapse"): ["- " + NASTY, "1) x"],
        ("fixed", "story-fix"): [DRIFT + "|" + NASTY] * 2,
    }
    records = write_study(tmp_path, texts)
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "week4.txt").write_text(NASTY)
    report = make_report(records._replace(failures={"week4": NASTY}))
    tokens = render(report)
    tables = [place for place, token in enumerate(tokens) if token.type == "table_open"]
    for place, (rows, columns) in zip(tables, ((4, 5), (2, 3)), strict=True):
        end = next(at for at in range(place, len(tokens)) if tokens[at].type == "table_close")
        kinds = [token.type for token in tokens[place:end]]
        assert kinds.count("tr_open") == rows
        assert kinds.count("th_open") + kinds.count("td_open") == rows * columns
    # Headings are the report's own, and nothing of an answer became markup.
    titles = [tokens[at + 1].content.split(":")[0] for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert titles[:2] == ["Ablation of model", "Claims"] and len(titles) == 3
    inline = [child.type for token in tokens if token.type == "inline" for child in token.children]
    assert inline.count("image") == 1 and "html_block" not in [token.type for token in tokens]
    assert "<script" not in report and "\x1b" not in report


@pytest.mark.parametrize("text", [NASTY, "- a", "1. a", "   # a", "a_b*c|d", "&lt;", "+ a", "=== a", "10) a", "a\n- b"])
def test_a_cell_reads_as_the_answer_was_written(text):
    tokens = render(f"| a | b |\n|---|---|\n| {ablate.escape_markdown(text)} | c |\n")
    cells = [tokens[at + 1] for at, token in enumerate(tokens) if token.type == "td_open"]
    assert len(cells) == 2
    shown = "".join("\n" if child.type in ("html_inline", "softbreak") else child.content for child in cells[0].children)
    expected = data.escape_controls(text.replace("\t", " "))
    assert shown.split() == expected.split()


def test_report_and_picture_made_twice_are_the_same_bytes(tmp_path):
    study = tmp_path / "runs" / "ablate" / "story"
    texts = {(arm, name): [SOUND, DRIFT] for arm in ("base", "week3", "week4") for name in ("kit", "story-fix", "plain")}
    write_study(study, texts)
    made = []
    for _ in range(2):
        ran = call_script("ablate.py", "--table", cwd=tmp_path)
        assert ran.returncode == 0 and ran.stderr == ""
        made.append([(study / name).read_bytes() for name in ("ablation.md", "ablation.png", "cells.csv")])
    (study / "failures").mkdir()
    (study / "failures" / "week4.txt").write_text("out of memory")
    ran = call_script("ablate.py", "--table", cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (1, "week4 failed, and runs again with the study's command: out of memory\n")
    assert made[0] == made[1] and made[0][1].startswith(b"\x89PNG")
    assert len(made[0][0]) < 30_000 and made[0][2].count(b"\n") == 10


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The published study, with its report made anew from the records."""
    folder = tmp_path_factory.mktemp("published")
    with tarfile.open(PUBLISHED / "cells" / "records.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    ablate.write_report(folder / "story")
    return folder / "story"


@pytest.mark.parametrize("name", ["ablation.md", "cells.csv"])
def test_the_published_report_is_that_of_its_records(published, name):
    assert (published / name).read_bytes() == (PUBLISHED / name).read_bytes()


def test_every_number_of_the_results_is_in_the_report(published):
    results = (ROOT / "docs" / "story.md").read_text(encoding="utf-8").partition("## Results")[2]
    numbers = re.compile(r"(?<![\w.])\d[\d,.]*\d%?|(?<![\w.])\d%?")
    made = [(published / name).read_text(encoding="utf-8") for name in ("ablation.md", "cells.csv")]
    made[0] += "\n".join(blind_pairs.count(published).values())
    known = set(numbers.findall("\n".join(made).replace(",", " ")) + numbers.findall(made[0]))
    assert len(results) > 1000 and set(numbers.findall(results)) - known == set()


def test_a_study_has_a_report_of_little_and_of_much(tmp_path):
    """With one cell alone, and with all cells of 26 questions: under 30 KB, at most six columns."""
    little = write_study(tmp_path / "a", {("week4", "kit"): [SOUND]})
    base = write_study(tmp_path / "b", {("base", "plain"): [SOUND]})
    much = ([SOUND, DRIFT, LOOP, (SOUND * 8, "length")] * 7)[:26]
    much = write_study(tmp_path / "c", {(arm, name): much for arm, names in ablate.ARMS.items() for name in names})
    for records in (little, base, much):
        report = make_report(records)
        assert report.startswith("# Ablation") and len(report.encode()) < 30_000
        assert all(line.count("|") <= 7 for line in report.splitlines())
        ablate.draw_picture(records, tmp_path / "picture.png")


def test_a_failed_arm_is_a_row_with_its_reason(tmp_path):
    write_study(tmp_path, {("base", "kit"): [SOUND] * 2, ("week4", "plain"): [SOUND] * 2})
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "week4.txt").write_text("train.py failed (exit code 2). out of `memory`")
    report = make_report(ablate.read_records(tmp_path))
    assert re.search(r"\| week4 \| 2\.000 \| failed \| failed \| failed \|", report)
    assert "- week4: train.py failed (exit code 2). out of &#96;memory&#96;" in report


@pytest.mark.parametrize("content", ["[" * 10_000, "[]", "{}", '{"command": 1}', '{"arms": 3}', ""])
def test_a_corrupt_record_is_named_with_the_way_out(content, tmp_path):
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(data.UsageError, match=r"study\.json cannot be read .*Run without --table; first remove a broken file"):
        ablate.read_records(tmp_path)


def test_a_study_without_greedy_cells_has_a_report(tmp_path):
    write_study(tmp_path, {("week4", "collapse-no-ban"): [SOUND] * 2})
    records = ablate.read_records(tmp_path)
    assert ablate.decide_claims(records)["C13"][0] == "not run"
    assert "Single changes" not in make_report(records)


@pytest.mark.parametrize("name", ["cells/week4.kit.jsonl", "runs/week4/run.json", "runs/week4/metrics.jsonl"])
def test_a_broken_file_is_named_with_what_to_do_about_it(tmp_path, name):
    write_study(tmp_path, {("week4", "kit"): [SOUND], ("week4-1-epoch", "kit"): [SOUND]})
    (tmp_path / name).write_text('{"a": ')
    with pytest.raises(data.UsageError, match=rf"/{re.escape(name)} cannot be read .*first remove a broken file"):
        ablate.read_records(tmp_path)


def test_a_reason_is_the_last_message_of_the_process(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    log, study = tmp_path / "logs" / "base.log", STUDY._replace(folder=tmp_path)
    words = "a bar 1%\ra bar 2%\rwarning\nerror: The disk is full:\n  100%\n"
    for last, reason in (
        ("sys.exit(2)", f"answering failed (exit code 2; log: {log}). The disk is full:\n  100%"),
        ("os.kill(os.getpid(), 9)", f"answering failed (killed, often for lack of memory; log: {log}).   100%"),
    ):
        code = f"import os, sys; print('out', flush=True); sys.stderr.write({words!r}); sys.stderr.flush(); {last}"
        monkeypatch.setattr(sys, "orig_argv", ["python", "-c", code])
        assert ablate.run_arm(study, "base", []) == reason
    assert log.read_bytes() == 2 * ("out\n" + words).encode()


def test_probes_of_a_user_need_only_questions(tmp_path):
    points = [{"name": "rest", "phrases": ["rest", "lie down"]}]
    rows = [{"question": "How is a sprain treated?"}, {"question": "What is a stye?", "points": points}]
    path = write_rows(tmp_path / "mine.jsonl", rows)
    probes = infer.read_probes(str(path))
    assert [probe.question for probe in probes] == [row["question"] for row in rows]
    assert infer.check_facts("Rest.", probes[1])["named"] == ["rest"]
    plan = call_script("ablate.py", "--probes", path, "--profile", "cpu", "--dry-run", cwd=tmp_path)
    twice = write_rows(tmp_path / "twice.jsonl", [rows[0], rows[0]])
    with pytest.raises(data.UsageError, match=r"twice\.jsonl:2: not a probe \(an earlier line has the same question"):
        infer.read_probes(str(twice))
    assert "57 cells of 2 questions to do, in runs/ablate/story-mine" in plan.stdout
    assert plan.stdout.count(f"--probes={path}") == 8 and plan.stdout.count("--num-probes=2 ") == 4


# --- A real study ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stopped_study_resumes_to_a_cell_for_each_arm_and_decoding(ablated):
    study, _ = ablated
    report = (study / "ablation.md").read_text(encoding="utf-8")
    assert re.search(r"\| base \|  \| not run \| \d of 2 [^|]*\| \d of 2", report)
    assert re.search(rf"\| {tiny_study.ARM} \| \d\.\d+ \| not run \| \d of 2 [^|]*\| \d of 2", report)
    for arm in ("base", tiny_study.ARM):
        for name in tiny_study.DECODINGS:
            answers = read_lines(study / "cells" / f"{arm}.{name}.jsonl")
            assert len(answers) == 2 and all(answer["repeats"] for answer in answers)
            for answer in answers:
                assert answer["answer_tokens"] == len(answer["token_ids"]) <= 12
                assert (answer["finish_reason"] == "stop") == (answer["token_ids"][-1] == 2)


@pytest.mark.slow
def test_answers_of_a_study_are_those_that_infer_gives(ablated, small_model):
    recorded = read_lines(ablated[0] / "cells" / "base.kit.jsonl")[0]
    request = infer.Request(QUESTIONS[0], dataclasses.replace(infer.DECODINGS["kit"], max_new_tokens=12))
    [answer] = infer.answer_requests(small_model, [request])
    assert answer.token_ids == recorded["token_ids"]


@pytest.mark.slow
def test_a_finished_study_runs_nothing_and_writes_the_same_report(ablated):
    study, _ = ablated
    first, cells = (study / "ablation.md").read_bytes(), [path.stat().st_mtime_ns for path in sorted(study.glob("cells/*"))]
    code, said = run_study(study.parents[2])
    assert code == 0 and "0 cells of 2 questions to do" in said
    assert (study / "ablation.md").read_bytes() == first
    assert [path.stat().st_mtime_ns for path in sorted(study.glob("cells/*"))] == cells


@pytest.mark.slow
def test_a_removed_cell_is_made_again_and_an_arm_that_fails_is_recorded_while_the_others_run(ablated, tmp_path):
    shutil.copytree(ablated[0].parents[2], tmp_path, dirs_exist_ok=True)
    study = tmp_path / "runs" / "ablate" / "story"
    (study / "study.json").unlink()  # its rows were in another folder
    cells = [study / "cells" / f"{arm}.kit.jsonl" for arm in ("base", tiny_study.ARM)]
    before = cells[0].read_bytes()
    for cell in cells:
        cell.unlink()
    older = (study / "cells" / f"{tiny_study.ARM}.plain.jsonl").read_bytes()
    weights = study / "runs" / tiny_study.ARM / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, said = run_study(tmp_path)
    assert code == 1, said
    report = (study / "ablation.md").read_text(encoding="utf-8")
    assert f"- {tiny_study.ARM}: training failed (exit code 2" in report, said
    assert "adapter&#95;model.safetensors of an adapter cannot be read" in report
    assert (study / "cells" / f"{tiny_study.ARM}.plain.jsonl").read_bytes() == older
    assert cells[0].read_bytes() == before and not cells[1].exists()


def test_blind_readings_are_collected_and_counted_by_question(tmp_path):
    write_study(tmp_path, {("week4", "kit"): [SOUND] * 2})
    run = tmp_path / "runs" / "week4"
    numbers = json.loads((run / "run.json").read_text())
    numbers["numbers"]["selected"] = {"answers": 2, "eval_loss": 4, "rouge_l": 2}
    (run / "run.json").write_text(json.dumps(numbers))
    (run / "samples").mkdir()
    for step in (2, 4):
        write_rows(run / "samples" / f"{step}.jsonl", [{"question": q, "text": f"step {step}"} for q in QUESTIONS[:8]])
    blind_pairs.main("sheet", tmp_path)
    sheet = read_lines(tmp_path / "blind" / "sheet.jsonl")
    assert len(sheet) == 8 and {each["A"] for each in sheet} == {"step 2", "step 4"}
    assert {frozenset(each) for each in sheet} == {frozenset(("id", "question", "A", "B"))}
    prefer = {each["id"]: "A" if each["A"] == "step 2" else "B" for each in sheet}
    votes = [[{"id": each, "vote": vote} for each, vote in prefer.items()] for _ in range(2)]
    votes.append([{"id": each, "vote": "neither"} for each in prefer])
    files = [str(write_rows(tmp_path / f"{n}.jsonl", lines)) for n, lines in enumerate(votes)]
    blind_pairs.main("collect", tmp_path, *files)
    assert blind_pairs.count(tmp_path)["eval_loss"].startswith("week4: 8 better, 0 worse, 0 equal")
    # Two readers against one decide a question, and a tie is equal.
    votes[1] = [{"id": each, "vote": "B" if vote == "A" else "A"} for each, vote in prefer.items()]
    write_rows(tmp_path / "1.jsonl", votes[1])
    blind_pairs.main("collect", tmp_path, *files)
    assert blind_pairs.count(tmp_path)["eval_loss"].startswith("week4: 0 better, 0 worse, 8 equal")

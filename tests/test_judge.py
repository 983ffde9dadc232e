"""Verdicts and facts, and how well they separate collapsed from sound answers."""

import dataclasses
import datetime
import json
import random
import re

import pytest
from conftest import ROOT, call_script, write_rows

import data
import infer
from infer import CHECKS, judge
from tests import calibrate

SOUND = (
    "High blood pressure is usually treated with a change of diet, less salt and regular exercise. "
    "Where that is not enough, a doctor adds a medicine: a thiazide, an ACE inhibitor or a calcium "
    "channel blocker. The dose is raised step by step until the blood pressure is below 140/90."
)


def found(text, question="", finish_reason="stop"):
    return {finding["name"] for finding in judge(text, question, finish_reason).findings}


# --- Findings


def test_a_sound_answer_has_no_findings():
    judged = judge(SOUND, "What is the first-line treatment of hypertension in adults?")
    assert judged.sound and judged.ended and judged.verdict == "sound" and judged.score < 1
    assert set(judged.measures) == set(CHECKS) and len(CHECKS) <= 7


@pytest.mark.parametrize(
    "text",
    ["", "pain " * 50, "é" * 3 + " \U0001f600 word " * 40, "**a**  b\n" * 40, "1. x\n" * 30, "患者" * 200],
)
def test_spans_lie_in_the_text(text):
    for score, (start, end) in judge(text).measures.values():
        assert score >= 0 and 0 <= start <= end <= len(text)


def repeat(period, times):
    words = "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa".split()
    return "It helps. " + " ".join(" ".join(words[:period]) for _ in range(times))


@pytest.mark.parametrize("period", [1, 2, 3, 5, 8, 13, 16])
def test_a_loop_of_any_period_is_found_within_one_line(period):
    assert "loop" in found(repeat(period, 30))
    assert "loop" not in found(repeat(period, 2))
    assert "loop" not in found(repeat(period, 1))


@pytest.mark.parametrize("words", [72, 84, 120])
@pytest.mark.parametrize("changed", [0, 1])
def test_a_long_passage_that_comes_again_is_a_loop(words, changed):
    passage = [f"word{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(words)]
    again = passage[: words // 2] + ["other"] * changed + passage[words // 2 + changed :]
    assert "loop" in found(" ".join([*passage, *again]) + ".")
    assert "loop" not in found(" ".join(passage) + ".")


def test_the_span_of_a_loop_is_where_it_is():
    text = "Rest and **drink**. " + "sore throat and ear pain " * 5 + "are signs."
    [finding] = [each for each in judge(text).findings if each["name"] == "loop"]
    assert text[slice(*finding["span"])] == ("sore throat and ear pain " * 4).strip()
    assert finding["score"] == 20 and "sore throat" in finding["message"]


def test_numbers_are_kept_and_markdown_is_not_read():
    doses = "Day 1: 300 mg once a day. Day 2: 300 mg twice a day. Then 300 mg three times a day.\n\n" + " ".join(
        f"Week {week}: {dose} mg three times a day." for week, dose in ((2, 400), (3, 600), (4, 800))
    )
    assert found(doses) == set()
    doses = "\n".join(f"- **Month {n}:** {dose} mg under the skin once a week" for n, dose in ((1, 0.25), (2, 0.5), (3, 1), (4, 1.7)))
    assert "loop" not in found(doses) and "loop" in found(re.sub(r"[\d.]+", "1", doses))
    heading = "1. **Keep the wound clean and dry**: Keep the wound clean and dry for two days.\n2. **Rest**: Use a sling."
    assert found(heading) == set()
    assert found("#### Signs\n\nA barking cough.\n\n## Questions to ask\n\n* Which tablets (e.g., aspirin)?\n---\n> Rest.") == set()


def test_what_is_nearly_the_same_is_repetition():
    text = " ".join(
        f"Hair loss in {who} is often caused by hair loss in {other}." for who, other in (("women", "men"), ("men", "women")) * 5
    )
    assert "repetition" in found(text)
    assert "repetition" not in found(SOUND)


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"{number}. Item{number}" for number in range(1, 25)),
        "\n".join(f"- Item{number}" for number in range(24)),
        "The symptoms are " + ", ".join(f"{n}. sign{chr(97 + n)}" for n in range(1, 25)),
        "The symptoms are " + ", ".join(f"sign{chr(97 + n)}" for n in range(24)),
    ],
)
def test_a_list_that_does_not_end_is_found(text):
    assert "list" in found(text)


@pytest.mark.parametrize(
    "text",
    [
        "\n\n".join(f"**Part {part}**\n\n" + "\n".join(f"{n}. Step {part}{n}." for n in range(1, 8)) for part in "abcd"),
        "\n".join(f"{n}. Step{n}\n   - do\n   - look\n   - rest" for n in range(1, 8)),
        "\n".join(f"{number}. Item{number}" for number in range(1, 17)),
        "Causes are angina, infarction, pericarditis, dissection, embolism, pneumonia, reflux, spasm, and anxiety.",
    ],
)
def test_several_lists_and_nested_ones_are_not_added_up(text):
    assert "list" not in found(text)


@pytest.mark.parametrize(
    "text",
    [
        "It is a virus.\nUser: and how long does it last?",
        "It is a virus.\n\nQuestion: What is croup?\nAnswer: A cough.\nQuestion: And then?",
        "It is a virus.<|im_end|>",
        "Rest.<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
        "Hold your breath for ten seconds.assistant\n\nHiccups stop.assistant",
        "Sip cold water.user\n\nAnd in a baby?assistant\n\nFeed the baby.",
        "system\n\nCutting Knowledge Date: December 2023\n\nuser\n\nHow?assistant",
        "Hold your breath. User: And in a baby? Assistant: Feed the baby.",
        "I am a 32 year old woman and have a cough.",
        "Under the tongue.\n\nimport numpy as np\n\ndef fever(values):\n    return values",
        "Drink water. 請多喝水",
        "These help against fatigue. user\n\nAnd in a baby?",
        "<div>Rest and drink.</div>",
        "Fever [[File:x.png]] and cough.",
        "It isnâ€™t known.",
        "Take it twice \ufffd a day.",
        "Rest.\n\n### Human: COPD?\n\n### Assistant: A lung disease.",
        "Rest and drink.[PAD][PAD]",
    ],
)
def test_what_is_no_part_of_an_answer_is_found(text):
    assert "leak" in found(text)


TABLE = "\n".join(
    f"| {food:<40} | {why:<40} |" for food, why in (("Food", "Why"), ("-" * 40, "-" * 40), ("Oats", "fiber"), ("Fish", "omega-3 fats"))
)


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("Signs of fever (38 °C – 40 °C), e.g. Ménière’s: “hot” skin; ≥ 2 µg of β-blocker.", ""),
        ("The World Health Organization explains them at https://www.who.int/health-topics.", ""),
        ("多喝水，多休息。", "感冒怎么办？"),
        ("Acupuncture (针灸) may help.", "What helps against pain?"),
        ("頭が痛いです means: my head hurts.", "Translate 'my head hurts' into Japanese."),
        ("Dear Doctor,\n\nI have a cough.", "Write a letter to my doctor."),
        ("\U0001f44d", "Is that right?"),
        ("It's usually hepatitis A", "Which one?"),
        ("The nervous system\nand the filesystem\nare systems.", ""),
        ("Ask your assistant or the user of the device.", ""),
        ("Question: is it contagious? It is.", ""),
        ("Yes", "Is croup a virus?"),
        ("yes it is", "Is croup a virus?"),
        ("Eat food with vitamin A", "What helps?"),
        ("```\nTake 2 tablets\n```", ""),
        ("It affects:\n- the gastrointestinal (GI) system\n- the lungs", ""),
        ("Lupus affects:\n- **Nervous** system", ""),
        ("Tell your doctor about:\n- Medicines you take\n- Any drug you are allergic to", ""),
        ("El dolor más frecuente es la cefalea tensional.", "¿Por qué me duele la cabeza?"),
        ("Aminopenicillins, setrons and xabans are classes.", ""),
        (TABLE, ""),
    ],
)
def test_ordinary_answers_are_sound(text, question):
    assert found(text, question) == set()


def test_a_list_of_as_many_items_as_are_asked_for_ends():
    text = "\n".join(f"{number}. Item{number}" for number in range(1, 31))
    assert "list" in found(text, "Name antibiotics.") and "list" not in found(text, "Name 30 antibiotics.")
    for other in ("I am 45 years old.", "I take 100 mg.", "What is new in 2024?", "My blood pressure is 150/95."):
        assert "list" in found(text, other), other
    assert all("list" in found("\n".join(f"{bullet} Item{n}" for n in range(30))) for bullet in "-–•✓")


def test_a_medicine_is_invented_unless_it_or_nearly_it_exists():
    assert "invented-medicine" in found("Malaria is treated with artuzofloxacin.")
    assert "invented-medicine" in found("Take cefuzole twice a day.")
    known = "Take ciprofloxacin, amlodipine, propronolol, statins or semaglutide in April; examine histamine."
    assert found(known) == set()
    assert found("Bedaprazole helps.", "What is bedaprazole?") == set()


def test_empty_and_cut_answers():
    assert found("") == {"empty"} == found(" ... ")
    assert found("of the nose and the") == {"empty"} and found("of the nose and the", finish_reason="length") == set()
    judged = judge(SOUND[:100], finish_reason="length")
    assert judged.sound and not judged.ended


def test_surprisal_is_counted_against_its_reference():
    assert judge(SOUND, surprisal=(2.4, (0, 5))).sound
    judged = judge(SOUND, surprisal=(5.0, (0, 4)))
    assert judged.verdict == "surprisal" and judged.score == 2 and '"High"' in judged.findings[0]["message"]


def test_the_largest_surprisal_is_the_worst_160_bytes(monkeypatch):
    class Tokenizer:
        all_special_ids = (0,)

        def convert_ids_to_tokens(self, ids):
            return ["<|end|>" if id_ == 0 else "x" * 8 for id_ in ids]

    calm, wild = [0.8] * 40, [8.0] * 20
    largest, where = infer.largest_surprisal(Tokenizer(), [1] * 100, calm + wild + calm)
    assert largest == pytest.approx(1.0) and where == (40, 60)
    # A single token counts at most 12 nats, and few bytes count as 80.
    largest, _ = infer.largest_surprisal(Tokenizer(), [1], [100.0])
    assert largest == pytest.approx(12 / 80)
    assert infer.largest_surprisal(Tokenizer(), [], []) == (0.0, (0, 0))


def test_findings_do_not_grow_with_length():
    """Ten different sound answers in a row are neither a loop nor a list."""
    rows = [json.loads(line)["output"] for line in (ROOT / "samples" / "conversational.jsonl").open(encoding="utf-8")]
    assert sum(not judge(row).sound for row in rows) <= 0.01 * len(rows)
    assert all(judge(" ".join(rows[at : at + 10])).sound for at in range(0, 270, 10))


def test_the_held_back_half_of_the_labelled_answers_is_judged_as_readers_did():
    pairs = calibrate.judge_labelled(calibrate.read_labelled())
    held_back = [pair for pair in pairs if calibrate.is_held_back(pair[0]["question"])]
    assert len(held_back) >= 250
    scores = calibrate.scores_of(held_back, list(CHECKS))
    assert calibrate.auroc(scores["collapsed"], scores["sound"]) >= 0.98
    assert sum(score >= 1 for score in scores["sound"]) <= 0.02 * len(scores["sound"])
    assert sum(score >= 1 for score in scores["collapsed"]) >= 0.7 * len(scores["collapsed"])


@pytest.mark.slow
def test_recorded_surprisals_are_those_of_the_small_model(small_model):
    recorded = json.loads(calibrate.SURPRISALS.read_text())
    assert infer.surprisal_reference(small_model) == pytest.approx(recorded["reference"], rel=0.02)
    for record in calibrate.read_labelled()[::60]:
        assert calibrate.read_surprisal(small_model, record) == pytest.approx(recorded[calibrate.key_of(record)], rel=0.02)


def test_measures_of_calibration_by_hand():
    # 3 of the 4 pairs are in order, one is a tie: (3 + 1/2) / 4.
    assert calibrate.auroc([2, 3], [1, 2]) == pytest.approx((2 + 1 + 0.5) / 4)
    low, high = calibrate.wilson(0, 100)
    assert low == 0 and high == pytest.approx(0.037, abs=5e-4)


# --- Answers of other programs


def run_judge(*arguments, stdin=""):
    return call_script("infer.py", "--judge", *arguments, cwd=ROOT, stdin=stdin)


ANSWERS = [
    {"id": 7, "question": "What is croup?", "text": SOUND},
    {"question": "What is croup?", "text": "cough " * 40, "finish_reason": "length"},
]


def test_answers_of_other_programs_are_judged_by_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "".join(json.dumps(each) + "\n" for each in ANSWERS), encoding="utf-8")
    for process in (run_judge(str(path), "--no-surprisal"), run_judge("-", "--no-surprisal", stdin=path.read_text())):
        assert process.returncode == 0, process.stderr
        judged = [json.loads(line) for line in process.stdout.splitlines()]
        assert [each | given == each for each, given in zip(judged, ANSWERS, strict=True)] == [True, True]
        assert [each["sound"] for each in judged] == [True, False] and "loop" in judged[1]["verdict"]
        assert judged[1]["score"] >= 1 > judged[0]["score"] and judged[1]["findings"][0]["name"] == "loop"
        assert "sound 1 of 2; loop 1" in process.stderr


def test_half_of_a_character_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "text": "a \\ud800 b"}\n' + json.dumps(ANSWERS[0]) + "\n")
    process = run_judge(str(path), "--no-surprisal")
    assert process.returncode == 1 and "expected text in question and text" in process.stderr and "sound 1 of 1" in process.stderr
    assert judge("a \ud800 b").score >= 0


def test_columns_of_the_user_reasons_to_end_and_probes_are_read(tmp_path):
    """Columns named like the verdict's were overwritten, and other values than JSON's a traceback. Of reasons, only those for a cut matter."""
    import pyarrow
    import pyarrow.parquet

    probes = write_rows(tmp_path / "p.jsonl", [{"id": 7, "question": " What? ", "points": [{"name": "rest", "phrases": ["rest"]}]}])
    own = {"question": "What?", "text": "Rest and", "score": float("nan"), "verdict": "good", "day": datetime.date(2024, 1, 2)}
    rows = [own | {"finish_reason": reason} for reason in ("MAX_TOKENS", "end_turn", None, "content_filter")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    process = run_judge(str(tmp_path / "a.parquet"), "--no-surprisal", "--probes", str(probes))
    judged = [json.loads(line, parse_constant=pytest.fail) for line in process.stdout.splitlines()]
    assert process.returncode == 0
    assert [each["verdict"] for each in judged] == ["sound", "empty", "empty", "empty"]
    assert judged[0]["input_verdict"] == "good" and judged[0]["input_score"] is None and judged[0]["day"] == "2024-01-02"
    assert judged[0]["facts"] == {"named": ["rest"], "missing": [], "wrong": []}


def test_records_that_cannot_be_judged_are_named_and_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ANSWERS[0]) + '\n{"text": "x", "n": 1}\nbroken\n' + json.dumps(ANSWERS[1]))
    process = run_judge(str(path), "--no-surprisal")
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert process.returncode == 1 and len(lines) == 4 and lines[1]["n"] == 1
    assert [("error" in line) for line in lines] == [False, True, True, False]
    assert f"{path}:2: expected text in question and text" in process.stderr and f"{path}:3: " in process.stderr
    assert "broken JSON" in process.stderr
    assert "sound 1 of 2" in process.stderr and "2 could not be judged" in process.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl"], "'missing.jsonl' does not exist"),
        (["a.jsonl", "--verify"], "--verify and --compare take one question"),
    ],
)
def test_other_uses_of_judge_are_refused(arguments, message):
    process = run_judge(*arguments, "--no-surprisal")
    assert process.returncode == 2 and message in process.stderr and not process.stdout


@pytest.mark.slow
def test_the_base_model_reads_what_it_wrote_and_compares_what_it_did_not(tmp_path, small_model):
    words = "bed coughing winter the until mouth which fever people drop week tired muscle old child ache water vaccine lung".split()
    salad = " ".join(random.Random(0).choices(words, k=30)).capitalize() + "."
    plain = infer.answer_requests(small_model, [infer.Request("What is croup?", infer.Decoding(max_new_tokens=40))])[0].text
    own = [{"question": "What is croup?", "text": text, "model": data.SMALL_MODEL} for text in (plain, salad)]
    rows = [json.loads(line) for line in (ROOT / "samples" / "conversational.jsonl").open(encoding="utf-8")][:24]
    others = [{"question": row["input"], "text": row["output"]} for row in rows]
    others.append({"question": "What is croup?", "text": salad})
    for rows, expected in ((own, [True, False]), (others, [True] * 24 + [False]), (others[-3:], [True] * 3)):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row | {"finish_reason": "length"}) + "\n" for row in rows))
        process = run_judge(str(path), "--profile", "cpu")
        judged = [json.loads(line) for line in process.stdout.splitlines()]
        assert process.returncode == 0 and [each["sound"] for each in judged] == expected, process.stderr
    assert "3 answers of unknown models are too few" in process.stderr


# --- Facts


def probe_of(name):
    return next(probe for probe in infer.read_probes() if probe.id == name)


def test_every_probe_names_points_and_claims_with_their_guideline():
    for probe in infer.read_probes()[:26]:  # 50 more, for larger studies, have none
        assert len(probe.points) >= 4 and probe.wrong_claims
        assert all(each.guideline and each.name and each.phrases for each in (*probe.points, *probe.wrong_claims))
        nothing = infer.check_facts(probe.question, probe)
        assert nothing["named"] == nothing["wrong"] == []  # the question gives no point away


def test_a_beta_blocker_alone_first_is_a_wrong_claim():
    probe = probe_of("hypertension")
    wrong = infer.check_facts("The first-line treatment is a beta-blocker such as atenolol.", probe)
    assert wrong["wrong"] == ["a beta-blocker is the first choice"] and wrong["named"] == []
    assert infer.check_facts("Beta-blockers are no longer the first choice.", probe)["wrong"] == []
    right = infer.check_facts(
        "Thiazides, ACE inhibitors, angiotensin receptor blockers or calcium-channel blockers come first, beta blockers later.",
        probe,
    )
    assert right["wrong"] == [] and len(right["named"]) == 4
    assert len(right["missing"]) == len(probe.points) - 4


def test_a_heart_attack_has_no_sore_throat_and_may_say_so():
    probe = probe_of("heart-attack")
    assert infer.check_facts("Signs are chest pain, sore throat and ear pain.", probe)["wrong"]
    assert infer.check_facts("A sore throat, unlike chest pain, is harmless.", probe)["wrong"]
    assert not infer.check_facts("It is not a sore throat, but chest pain.", probe)["wrong"]
    assert not infer.check_facts("A sore throat is not a sign of it. Chest pain isn't the only one.", probe)["wrong"]
    assert "chest pain or pressure" in infer.check_facts("Chest pain isn't the only sign.", probe)["named"]


@pytest.mark.parametrize(
    "text, phrase, there",
    [
        ("Chest pains came.", "chest pain", True),
        ("X-rays are taken.", "x ray", True),
        ("Chestpain", "chest pain", False),
        ("a pain in the left side of the chest", "pain ... chest", True),
        ("a pain. Then the chest", "pain ... chest", False),
        ("one two pain a b c d e f g chest", "pain ... chest", False),
        ("There is no fever", "fever", False),
        ("There is no pain, but fever", "fever", True),
        ("Without treatment, fever", "fever", True),
        ("It doesn’t cause fever", "fever", False),
        # These took exponential time.
        ("a pain " + "-" * 1000, "pain ... chest", False),
        ("a pain " + "-" * 1000 + " chest", "pain ... chest", True),
        ("a pain " + "a'" * 1000, "pain ... chest", False),
    ],
)
def test_mentions(text, phrase, there):
    assert (infer.find_mention(text, (phrase,)) is not None) == there
    assert (infer.find_mention(f"{text} {'-' * 1000}", (phrase,), or_denied_after=True) is not None) == there


@pytest.mark.parametrize(
    ("points", "shown"),
    [
        ([{"name": "c"}], r"\{'id': 'a', "),
        (["chest pain"], r"\{'id': 'a', "),
        (["chest pain"] * 50, r"\{'id': 'a', .{88}"),  # no more than 100 characters
        ([{"name": "c", "phrases": "d"}], r"'c': expected a name and lists of phrases, none empty"),
    ],
)
def test_a_line_that_is_no_probe_is_one_message(tmp_path, points, shown):
    path = tmp_path / "probes.jsonl"
    path.write_text(json.dumps({"id": "a", "question": "b?", "points": points}))
    with pytest.raises(data.UsageError, match=rf"probes\.jsonl:1: not a probe \({shown}.*\)\. .*`points` and `wrong_claims`"):
        infer.read_probes(str(path))


def test_quality_counts():
    def judged(text, finish_reason, facts=None):
        answer = infer.Answer("?", text, [1], finish_reason, 1, 1, 0, infer.Decoding(), "m", None, 0.0)
        return dataclasses.replace(judge(text, "?", finish_reason), answer=answer, facts=facts)

    facts = {"named": ["a"], "missing": ["b", "c"], "wrong": ["d"]}
    quality = infer.measure_quality([judged(SOUND, "stop", facts), judged(SOUND, "length"), judged("pain " * 30, "stop")])
    expected = {"answers": 3, "sound": 2, "ended": 2, "sound_and_ended": 1, "points": 1, "max_points": 3, "wrong_claims": 1}
    assert quality == expected

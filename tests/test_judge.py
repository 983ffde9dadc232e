"""What is said of an answer: findings and facts, and how well they tell collapsed answers from sound ones."""

import json

import pytest
from conftest import ROOT

import data
import infer
from infer import CHECKS, judge
from tests import calibrate

SOUND = (
    "High blood pressure is usually treated with a change of diet, less salt and regular exercise. Where that is not enough, "
    "a doctor adds a medicine: a thiazide, an ACE inhibitor or a calcium channel blocker. The dose is raised step by step "
    "until the blood pressure is below 140/90."
)


def found(text, question="", finish_reason="stop", known_words=frozenset()):
    return {finding.name for finding in judge(text, question, finish_reason, known_words).findings}


def against(text, question=""):
    return {finding.name for finding in judge(text, question).findings if finding.against}


# --- Findings


def test_a_sound_answer_has_no_findings_and_spans_lie_in_the_text():
    judgement = judge(SOUND, "What is the first-line treatment of hypertension in adults?")
    assert judgement.sound and judgement.ended and judgement.findings == () and judgement.verdict == "sound"
    assert judgement.evidence < 1 and set(judgement.scores) == set(CHECKS)
    for text in ("", "pain " * 50, "Eye yawning, Eye yawns, Eye years", "\u00e9" * 3 + " \U0001f600 word " * 40):
        for finding in judge(text).findings:
            assert 0 <= finding.span[0] <= finding.span[1] <= len(text)


def test_the_storys_strings_are_found():
    assert "shared-beginning" in against("Eye yawning, Eye yawns, Eye years")
    assert "shared-beginning" in against("Early symptoms are thirst.\nEye yawning, Eye yawns, Eye years, Eye yolks")
    drifting = (
        "The warning signs of a heart attack include chest pain, shortness of breath, nausea, sweating, jaw pain, neck pain, "
        "sore throat, ear pain, sore throat, ear pain"
    )
    assert "repeated-items" in against(drifting, "What are the warning signs of a heart attack?")
    assert "invented-medicine" in against("Malaria is treated with artuzofloxacin.")
    assert "invented-word" in found("The first-linemodred treatment is a change of diet.")


def loop_of(period, times):
    words = "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa".split()
    return "It helps. " + " ".join(" ".join(words[:period]) for _ in range(times))


@pytest.mark.parametrize("period", [1, 2, 3, 5, 8, 13, 16])
def test_a_loop_of_any_period_is_found_within_one_line(period):
    assert "loop" in against(loop_of(period, 8))
    # Said once more is no loop, unless that is a whole passage.
    assert judge(loop_of(period, 2)).scores["loop"] == period
    assert judge(loop_of(period, 1)).scores["loop"] == 0


def test_the_span_of_a_loop_is_where_it_is():
    text = "Rest and drink. " + "sore throat and ear pain " * 5 + "are signs."
    [finding] = [each for each in judge(text).findings if each.name == "loop"]
    assert text[slice(*finding.span)] == ("sore throat and ear pain " * 5).strip()
    assert finding.score == 20 and "sore throat" in finding.sentence


def test_lists_are_told_apart():
    bounded = "Signs are fever, a stiff neck, headache, vomiting, a rash and confusion."
    assert against(bounded) == set()
    runs_on = "Signs are fever, " + ", ".join(f"{word} pain" for word in "arm leg back neck jaw toe hip knee foot hand".split())
    assert "similar-items" in against(runs_on)
    numbered = "\n".join(f"{number}. {word.title()}" for number, word in enumerate("abcdefghijklmnop", 1))
    assert "run-on-list" in against(numbered)
    steps = "\n".join(f"{number}. {word} it well." for number, word in enumerate(("Wash", "Dry", "Cover", "Watch"), 1))
    assert against(steps) == set()
    # A list by a word of grammar, and three sentences that begin alike, are how people write.
    assert "shared-beginning" not in found("The skin, the hair, the nails and the teeth")
    assert "shared-beginning" not in found("Avoid salt. Avoid fat. Avoid sugar.")


def test_words_are_explained_by_lexicon_slip_glue_and_parts_and_invented_otherwise():
    lexicon = infer.load_lexicon()
    for word in ("lumefantrine", "ciprofloxacin", "pericarditis", "hypertensions", "children's", "doctor’s"):
        assert lexicon.knows(word), word
    for word in ("knoweldge", "diarrheadiarrhea", "nonallergic"):
        assert lexicon.explains(word) and not lexicon.knows(word), word
    for word in ("artuzofloxacin", "linemodred", "thyrogloblinoma", "bedalpack"):
        assert not lexicon.explains(word), word


def test_words_of_the_question_and_known_words_are_excused():
    text = "Bedalpack and thyrogloblinoma: bedalpack helps against thyrogloblinoma."
    assert "invented-word" in against(text)
    assert "invented-word" not in found(text, "What is bedalpack against a thyrogloblinoma?")
    assert "invented-word" not in found(text, known_words=frozenset({"bedalpack", "thyrogloblinoma"}))
    # One odd word alone may be a name that no lexicon has: it is told, and does not speak against the answer.
    assert "invented-word" in found("Take bedalpack for a week.") and judge("Take bedalpack for a week.").sound


def test_drift_is_found_and_a_long_sound_sentence_is_none():
    drifted = (
        "Iron deficiency is caused by inadequate dietary intake or lack thereof due to poor eating habits and diet quality are "
        "major causes for this issue as it affects both men and women who have reproductive organs but do eat meat because "
        "they consume red meats such as beef however some people may also get excess amounts from other sources like "
        "processed foods that contain high amount of animal protein containing inhibitors so these types of food contains too "
        "much vitamin when eaten at night during pregnancy with breast feeding mothers having babies born "
        "underweight while sleeping"
    )
    question = "What are the causes of iron deficiency anaemia?"
    assert "drift" in against(drifted, question)
    long_list = (
        "Causes of iron deficiency are heavy periods, bleeding from the stomach or bowel, pregnancy, too little iron in the "
        "diet, poor absorption as in coeliac disease, and frequent blood donation, all of which a doctor can "
        "tell apart with a few "
        "questions and blood tests."
    )
    assert "drift" not in found(long_list, question)


@pytest.mark.parametrize(
    "text",
    [
        "Rest \U0001f600 and drink.",
        "Drink water. 請多喝水",
        "See https://example.org/page for more.",
        "<div>Rest and drink.</div>",
        "Fever [[File:x.png]] and cough.",
        "It isnâ€™t known.",
        "Take it twice \ufffd a day.",
    ],
)
def test_what_is_no_prose_is_found(text):
    assert "symbols" in against(text)


def test_ordinary_marks_and_markdown_are_prose():
    text = "**Signs** of fever (38 °C – 40 °C), e.g. Ménière’s: “hot” skin; ≥ 2 µg of β-blocker.\n\n# Care\n- Rest\n- Drink"
    assert "symbols" not in found(text)


@pytest.mark.parametrize(
    "text",
    [
        "It is a virus.\nUser: and how long does it last?",
        "It is a virus.\n\nQuestion: What is croup?",
        "It is a virus.<|im_end|>",
        "I am a 32 year old woman and have a cough.",
    ],
)
def test_another_speaker_is_found(text):
    assert "other-speaker" in against(text)


def test_empty_and_cut():
    assert found("") == {"empty"} and found(" ... ") == {"empty"}
    judgement = judge(SOUND[:100], finish_reason="length")
    assert {finding.name for finding in judgement.findings} == {"cut"}
    # What a cap cut may be sound as far as it goes, and has not ended.
    assert judgement.sound and not judgement.ended


def test_scores_do_not_depend_on_length():
    """Every sample answer is short and sound; ten different ones, one after the other, are long, and no loop or list."""
    rows = [json.loads(line)["output"] for line in (ROOT / "samples" / "conversational.jsonl").open(encoding="utf-8")]
    short = sum(not judge(row).sound for row in rows) / len(rows)
    long = [" ".join(rows[at : at + 10]) for at in range(0, 270, 10)]
    form = {"loop", "repetition", "repeated-items", "similar-items", "run-on-list", "shared-beginning"}
    assert short <= 0.03 and sum(bool(against(text) & form) for text in long) <= 1


def test_half_of_the_labelled_answers_that_decided_nothing_is_judged_as_people_did():
    labelled = calibrate.read_labelled()
    assert len(labelled) >= 400
    held_back = [each for each in labelled if calibrate.is_held_back(each["question"])]
    evidence = {kind: [] for kind in ("sound", "borderline", "collapsed")}
    for each in held_back:
        evidence[each["verdict"]].append(judge(each["text"], each["question"], each["finish_reason"]).evidence)
    assert calibrate.auroc(evidence["collapsed"], evidence["sound"]) >= 0.95
    assert sum(score >= 1 for score in evidence["collapsed"]) >= 0.9 * len(evidence["collapsed"])


def test_measures_of_calibration_by_hand():
    # 3 of the 4 pairs are in order, one is a tie: (3 + 1/2) / 4.
    assert calibrate.auroc([2, 3], [1, 2]) == pytest.approx((2 + 1 + 0.5) / 4)
    low, high = calibrate.wilson(0, 100)
    assert low == 0 and high == pytest.approx(0.037, abs=5e-4)


# --- Facts


def probe_of(name):
    return next(probe for probe in infer.read_probes() if probe.id == name)


def test_every_probe_names_points_and_claims_with_their_guideline():
    for probe in infer.read_probes():
        assert len(probe.points) >= 4 and probe.wrong_claims
        assert all(each.guideline and each.name and each.phrases for each in (*probe.points, *probe.wrong_claims))
        nothing = infer.check_facts(probe.question, probe)
        assert nothing.named == () and nothing.wrong == ()  # the question gives no point away


def test_a_beta_blocker_alone_first_is_a_wrong_claim():
    probe = probe_of("hypertension")
    wrong = infer.check_facts("The first-line treatment is a beta-blocker such as atenolol.", probe)
    assert wrong.wrong == ("a beta-blocker is the first choice",) and wrong.named == ()
    assert infer.check_facts("Beta-blockers are no longer the first choice.", probe).wrong == ()
    right = infer.check_facts(
        "Thiazides, ACE inhibitors, angiotensin receptor blockers or calcium-channel blockers come first, beta blockers later.",
        probe,
    )
    assert right.wrong == () and len(right.named) == 4
    assert str(right) == f"points 4/{len(probe.points)}, wrong claims 0"


def test_a_heart_attack_has_no_sore_throat_and_may_say_so():
    probe = probe_of("heart-attack")
    assert infer.check_facts("Signs are chest pain, sore throat and ear pain.", probe).wrong
    assert infer.check_facts("A sore throat, unlike chest pain, is harmless.", probe).wrong
    assert not infer.check_facts("It is not a sore throat, but chest pain.", probe).wrong
    assert not infer.check_facts("A sore throat is not a sign of it. Chest pain isn't the only one.", probe).wrong
    assert "chest pain or pressure" in infer.check_facts("Chest pain isn't the only sign.", probe).named


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
    ],
)
def test_mentions(text, phrase, there):
    assert (infer.find_mention(text, (phrase,)) is not None) == there


def test_a_line_that_is_no_probe_is_one_message(tmp_path):
    path = tmp_path / "probes.jsonl"
    path.write_text('{"id": "a", "question": "b?", "points": [{"name": "c"}], "wrong_claims": []}\n')
    with pytest.raises(data.UsageError, match=r"probes\.jsonl:1: is no probe .*points and wrong_claims"):
        infer.read_probes(path)


def test_quality_counts():
    def judged(text, finish_reason, facts=None):
        answer = infer.Answer("?", text, [1], finish_reason, 1, 1, 0, infer.Decoding(), "m", None, 0.0)
        return infer.Judged(answer, judge(text, "?", finish_reason), facts)

    facts = infer.Facts(("a",), ("b", "c"), ("d",))
    quality = infer.measure_quality([judged(SOUND, "stop", facts), judged(SOUND, "length"), judged("pain " * 30, "stop")])
    assert (quality.num_answers, quality.num_sound, quality.num_ended, quality.num_sound_and_ended) == (3, 2, 2, 1)
    assert (quality.num_named, quality.num_points, quality.num_wrong_claims) == (1, 3, 1)
    assert (quality.sound_rate, quality.stop_rate, quality.points_rate) == pytest.approx((2 / 3, 2 / 3, 1 / 3))
    nothing = infer.measure_quality([])
    assert (nothing.sound_rate, nothing.stop_rate, nothing.points_rate) == (0, 0, 0)

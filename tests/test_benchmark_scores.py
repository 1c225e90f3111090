"""Scores of the benchmarks on answers whose score is known, and the intervals."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from pydeltamem.evals import gpqa, hotpotqa, ifeval, memory_agent_bench, metrics, qa
from pydeltamem.evals.bootstrap import Sample, ratio
from pydeltamem.evals.items import Item


def test_exact_match_and_substring():
    """Case, articles, punctuation and spaces do not count; other words do."""
    assert metrics.exact("  The Eiffel-Tower. ", ["Eiffel Tower", "eiffeltower"]) == 1
    assert metrics.exact("Eiffel Tower in Paris", ["Eiffel Tower"]) == 0
    assert metrics.holds("It is the Eiffel tower!", ["Big Ben", "Eiffel Tower"]) == 1
    assert metrics.holds("I do not know.", ["Eiffel Tower"]) == 0
    assert metrics.holds("Lima", ["The"]) == 0 and metrics.holds("The.", ["A"]) == 1  # nothing is left of them
    assert metrics.first_line("\n\n Lima \nand more") == "Lima"


def test_token_f1():
    assert metrics.f1("a cat sat", ["the cat sat down"]) == pytest.approx(0.8)  # 2 common of 2 and of 3
    assert metrics.f1("cat cat", ["cat"]) == pytest.approx(2 / 3)  # each counts once
    assert metrics.f1("cat", ["dog", "cat"]) == 1
    assert metrics.f1("", ["dog"]) == 0


def test_hotpotqa_wants_yes_and_no_as_a_whole():
    assert metrics.hotpot_f1("yes", "yes") == 1
    assert metrics.hotpot_f1("yes it is", "yes") == 0
    assert metrics.hotpot_f1("no", "the no name") == 0
    assert metrics.hotpot_f1("Arthur's Magazine, 1844", "Arthur's Magazine") == pytest.approx(0.8)


@pytest.mark.parametrize("benchmark", [hotpotqa.HOTPOTQA, qa.QA])
def test_only_the_first_line_of_an_answer_counts(benchmark):
    item = Item("a", "", "Who?", ("Ada Lovelace",), 0)
    assert benchmark.score(item, "\nAda\nLovelace") == {"exact": 0, "f1": pytest.approx(2 / 3)}
    assert benchmark.score(item, "the Ada Lovelace.\nOr not.") == {"exact": 1, "f1": 1}


@pytest.mark.parametrize(
    ("answer", "right", "category", "score"),
    [
        ("adoption agency", "Adoption agencies", 4, 1),  # agency and agencies have one stem
        ("running and swimming", "ran, swims", 4, 0.5),  # of an irregular form not; "and" does not count
        ("pottery, camping", "pottery, camping, painting, swimming", 1, 0.5),  # the mean over the parts
        ("she likes pottery", "pottery", 1, 0.5),
        ("Yes", "Yes; since she said so", 3, 1),
        ("7 May 2023", "7 May 2023", 2, 1),
        ("in May", "7 May 2023", 2, 0.4),
    ],
)
def test_locomo_f1(answer, right, category, score):
    assert metrics.locomo_f1(answer, right, category) == pytest.approx(score)


def test_memory_agent_bench_takes_a_substring():
    item = Item("1", "sh", "?", ("The Association Football",), 0)
    assert memory_agent_bench.score(item, "it is association football.")["substring"] == 1
    assert memory_agent_bench.score(item, "it is football")["substring"] == 0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("(C) 12 J", "C"), ("The correct answer is (D).", "D"), ("**Answer: A**", "A"), ("no idea", ""),
        ("The correct answer is: B", "B"), ("The answer is: **B**", "B"), ("The correct choice is B.", "B"),
        ("The right option is (c)", "C"), ("The answer is option B.", "B"), ("answer: a", "A"), ("answer B", "B"),
        ("The answer is a photon.", ""), ("A photon.", ""), ("I cannot answer a question like this", ""),
        ("A close look shows the answer is C", "C"), ("The answer is A because of", "A"), ("A is right.", "A"),
        ("A", "A"), ("a) 12 J", "A"), ("A 12 J", "A"), ("A\nthe first", "A"), ("**A**", "A"), ("D-glucose", ""),
        ("C. 12 J, as the answer is C", "C"), ("Answer:\nD", "D"), ("C because (A) is wrong", "C"),
        ("Option C", "C"), ("**Choice B.**", "B"), ("The correct letter is D.", "D"), ("option a photon", ""),
        ("$\\boxed{C}$", "C"), ("The answer is \\boxed{B}.", "B"), ("Optional", ""),
    ],
)  # fmt: skip
def test_the_letter_of_a_choice(answer, letter):
    """The article is no choice."""
    assert gpqa.letter_of(answer) == letter


def instructed(*instructions):
    about = {
        "key": 1,
        "prompt": "Write.",
        "instruction_id_list": [name for name, _ in instructions],
        "kwargs": [options for _, options in instructions],
    }
    return Item("1", "", "Write.", (), 0, about=about)


@pytest.mark.parametrize(
    ("instructions", "answer", "strict", "loose"),
    [
        ([("punctuation:no_comma", {})], "One two.", [1], [1]),
        ([("punctuation:no_comma", {})], "One, two.", [0], [0]),
        ([("punctuation:no_comma", {})], "Well, here it is:\nOne two.", [0], [1]),  # without its first line
        ([("punctuation:no_comma", {})], "", [0], [0]),
        (
            [("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 3}),
             ("change_case:english_lowercase", {})],
            "this is one, said dr. smith. here is another sentence.", [0, 1], [0, 1],  # "dr." ends none
        ),
        ([("length_constraints:number_words", {"relation": "less than", "num_words": 3})], "two words", [1], [1]),
        ([("keywords:existence", {"keywords": ["lima"]})], "I live in Lima.", [1], [1]),
    ],
)  # fmt: skip
def test_instructions_are_checked_by_the_harness(instructions, answer, strict, loose):
    found = ifeval.score(instructed(*instructions), answer)
    assert (found["instruction strict"], found["instruction loose"]) == (strict, loose)
    assert (found["prompt strict"], found["prompt loose"]) == (float(all(strict)), float(all(loose)))


def test_checks_print_nothing():
    """Standard output is for the tables."""
    line = "from pydeltamem.evals.ifeval import checks; checks()"
    result = subprocess.run([sys.executable, "-c", line], capture_output=True, check=True)
    assert not result.stdout


#
# intervals
#


def sample(contexts=None, **scores):
    n = len(next(iter(scores.values())))
    return Sample({name: [[value] for value in of] for name, of in scores.items()}, contexts or [None] * n)


def test_a_mean_has_its_interval():
    mean = sample(a=[1.0] * 95 + [0.0] * 5).mean("a")
    assert (mean.value, round(mean.low, 3), round(mean.high, 3)) == (0.95, 0.888, 0.978)  # Wilson's, by hand
    mean = sample(a=list(np.linspace(0, 1, 101))).mean("a")
    error = 1.96 * np.std(np.linspace(0, 1, 101)) / math.sqrt(101)
    assert mean.value == pytest.approx(0.5)
    assert mean.low == pytest.approx(0.5 - error, abs=0.01) and mean.high == pytest.approx(0.5 + error, abs=0.01)


def test_nothing_right_is_not_certainly_nothing():
    mean = sample([str(i // 2) for i in range(40)], a=[0.0] * 40).mean("a")
    assert (mean.value, mean.low) == (0, 0) and mean.high == pytest.approx(0.161, abs=1e-3)  # Wilson's of 20 contexts


def test_one_question_says_nothing_of_others():
    """Its resamples are all the same, and so are those of several values of it."""
    for drawn in (sample(a=[0.37], b=[0.5]), Sample({"a": [[1, 0, 1]], "b": [[1, 1, 1]]}, [None])):
        mean, over = drawn.mean("a"), ratio(drawn.means("a"), drawn.means("b"), drawn.n_drawn)
        assert (mean.low, mean.high) == (0, 1) and mean.value in (0.37, 2 / 3)
        assert (over.low, over.high) == (0, math.inf) and over.value == pytest.approx(mean.value / drawn.means("b")[0])


def test_a_ratio_of_nothing_is_not_certainly_nothing():
    drawn = sample(a=[0.0] * 20, b=[1.0] * 20)
    found = ratio(drawn.means("a"), drawn.means("b"), 20)
    assert (found.value, found.low) == (0, 0) and found.high == pytest.approx(0.161, abs=1e-3)  # Wilson's of 20
    unsure = sample(a=[0.0] * 20, b=[1.0, 0.0] * 10)
    assert ratio(unsure.means("a"), unsure.means("b"), 20).high > 2 * found.high


def test_ratios_are_paired():
    """A method right about the same questions is nearer to a ratio of 1 than one right as often, but not certain."""
    drawn = sample(a=[1, 0] * 50, same=[1, 0] * 50, other=[0, 1] * 50)
    same, other = (ratio(drawn.means(name), drawn.means("a"), 100) for name in ("same", "other"))
    low = 1 - 0.037 / 0.5  # Wilson's of none of 100 questions that only one of them is right about
    assert same.value == 1 and same.low == pytest.approx(low, abs=1e-3) and same.high == pytest.approx(1 / same.low)
    assert other.value == 1 and other.low < 0.85 and other.high > 1.15


@pytest.mark.parametrize("score", [1.0, 0.4])
def test_a_few_scores_that_are_alike_are_not_certain(score):
    drawn = sample(a=[score] * 4, b=[score] * 4)
    mean, over = drawn.mean("a"), ratio(drawn.means("a"), drawn.means("b"), 4)
    others = 1.96**2 / (4 + 1.96**2)  # Wilson's of none of 4
    assert (mean.value, mean.low) == (score, pytest.approx(score * (1 - others)))
    assert mean.high == pytest.approx(score + (1 - score) * others)
    assert over.value == 1 and over.low == pytest.approx(max(0, 1 - others / score)) and over.high > 1.9


def test_contexts_that_are_alike_are_not_certain():
    """Ten contexts with one right answer of two each: all resamples have the same mean."""
    drawn = sample([str(i // 2) for i in range(20)], a=[1.0, 0.0] * 10)
    mean = drawn.mean("a")
    assert mean.value == 0.5 and mean.low < 0.4 and mean.high > 0.6


def test_a_ratio_to_what_may_be_nothing():
    assert ratio(sample(a=[1, 1]).means("a"), sample(a=[0, 0]).means("a"), 2) is None
    drawn = sample(a=[1] * 20, rare=[1] + [0] * 19)
    assert math.isinf(ratio(drawn.means("a"), drawn.means("rare"), 20).high)


def test_questions_about_one_context_are_drawn_together():
    scores = [1.0] * 100 + [0.0] * 100

    def width(contexts):
        mean = sample(contexts, a=scores).mean("a")
        return mean.high - mean.low

    alone = width(None)
    assert width([str(i // 10) for i in range(200)]) > 2 * alone  # 20 contexts
    assert width([str(i // 100) for i in range(200)]) == alone  # of two contexts single questions are drawn


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of draws of ten contexts with five questions each, for a mean and for a ratio: 95 %, up to 3 deviations."""
    draw, n, n_draws, held = np.random.default_rng(1), 10, 600, [0, 0]
    for i in range(n_draws):
        easy = draw.normal(1, 0.2, n)
        a, b = ((factor * easy + draw.normal(0, 0.1, n)).repeat(5) + draw.normal(0, 0.1, 5 * n) for factor in (2, 1))
        drawn = Sample({"a": [[x] for x in a], "b": [[x] for x in b]}, [str(j // 5) for j in range(5 * n)], seed=i)
        mean, over = drawn.mean("a"), ratio(drawn.means("a"), drawn.means("b"), drawn.n_drawn)
        held[0] += mean.low <= 2 <= mean.high
        held[1] += over.low <= 2 <= over.high
    error = 3 * math.sqrt(0.95 * 0.05 / n_draws)
    assert held[0] / n_draws == pytest.approx(0.95, abs=error)
    assert held[1] / n_draws == pytest.approx(0.95, abs=error)


def test_several_values_of_a_question_count_each():
    values = Sample({"a": [[1, 1, 1], [0]]}, [None, None])
    assert values.mean("a").value == 0.75

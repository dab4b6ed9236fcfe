"""The word-problem generator: reproducible, disjoint, correct, and scored by the final answer alone."""

import os
import random
import re
import subprocess
import sys

import pytest

from pica.tasks import wordproblems
from pica.tasks.wordproblems import SPLITS, TEMPLATES, Split, available, extract_answer, generate

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")
OPERATIONS = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left / right,
}


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_offers_every_template_and_a_few_hundred_problems(split: Split):
    problems = generate(split, 2000)
    assert {problem.template for problem in problems} == {template.name for template in TEMPLATES}
    assert available(split) >= 2000


def test_no_problem_is_in_two_splits_even_with_different_seeds():
    identities, questions = {}, {}
    for seed, split in enumerate(SPLITS):
        problems = generate(split, available(split), seed=seed)
        identities[split] = {(problem.template, problem.numbers) for problem in problems}
        questions[split] = {problem.question for problem in problems}
        assert len(identities[split]) == len(questions[split]) == available(split)
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not identities[first] & identities[second]
        assert not questions[first] & questions[second]


def test_the_split_of_a_problem_is_pinned():
    """A change here would let models trained with one version be tested on their training problems by another."""
    # First 32 bits modulo 10 of `printf gain_loss:5,3,2 | sha256sum` and so on: 7, 1, 0.
    assert wordproblems.split_of("gain_loss", (5, 3, 2)) == "train"
    assert wordproblems.split_of("gain_loss", (20, 3, 4)) == "validation"
    assert wordproblems.split_of("gain_loss", (35, 9, 9)) == "test"


def test_same_seed_same_list_other_seed_other_list():
    assert generate("train", 50, seed=3) == generate("train", 50, seed=3)
    assert generate("train", 50, seed=3) != generate("train", 50, seed=4)
    assert generate("train", 50, seed=3) == generate("train", 80, seed=3)[:50]


def test_generation_does_not_depend_on_pythons_hash_seed_or_on_global_randomness():
    code = "from pica.tasks.wordproblems import generate; print(generate('test', 20, seed=5))"
    outputs = set()
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
        assert run.returncode == 0, run.stderr.decode()
        outputs.add(run.stdout)
    assert len(outputs) == 1
    state = random.getstate()
    generate("test", 20)
    assert random.getstate() == state


@pytest.mark.parametrize("split", SPLITS)
def test_solutions_are_true_and_end_in_the_answer(split: Split):
    for problem in generate(split, 1000, seed=1):
        equations = EQUATION.findall(problem.solution)
        assert 2 <= len(equations) <= 3
        for left, operator, right, result in equations:
            assert OPERATIONS[operator](int(left), int(right)) == int(result), problem
        assert problem.solution.endswith(f"The answer is {problem.answer}.")
        assert int(equations[-1][-1]) == problem.answer
        assert 1 <= problem.answer <= 99


def test_questions_name_all_their_numbers_and_leave_no_placeholder():
    for problem in generate("train", 1000, seed=2):
        shown = sorted(int(number) for number in re.findall(r"\d+", problem.question))
        assert shown == sorted(problem.numbers)
        assert not set("{}") & set(problem.question)
        assert problem.question.endswith("?")


def test_a_pronoun_follows_its_name():
    women = {name for name, pronoun in wordproblems.PEOPLE if pronoun == "she"}
    for problem in generate("train", 500):
        if " She " in problem.question or " she " in problem.question:
            assert women & set(re.findall(r"\w+", problem.question)), problem.question


def test_asking_for_too_many_problems_says_how_many_there_are():
    total = available("test")
    with pytest.raises(ValueError, match=f"count={total + 1}.*'test' split holds 0 to {total}"):
        generate("test", total + 1)
    with pytest.raises(ValueError, match="count=-1"):
        generate("test", -1)
    assert generate("test", 0) == []


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="unknown split 'dev'.*'validation'"):
        generate("dev", 1)  # pyright: ignore[reportArgumentType] -- the mistake under test


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (" 5 + 3 = 8. The answer is 8.", 8),
        ("The answer is 12", 12),
        ("so the answer is: 7.", 7),
        ("The answer is -3.", -3),
        ("The answer is 4. Question: ... The answer is 9.", 4),
        ("5 + 3 = 8.", None),
        ("The answer is eight.", None),
        ("", None),
    ],
)
def test_extract_answer(response: str, answer: int | None):
    assert extract_answer(response) == answer


def test_scoring_is_by_the_whole_number():
    problem = next(problem for problem in generate("train", 100) if problem.answer >= 10)
    assert extract_answer(problem.solution) == problem.answer
    assert extract_answer(f"9 + 9 = 1. The answer is {problem.answer}") == problem.answer
    assert extract_answer(f"The answer is {problem.answer}0.") != problem.answer
    assert extract_answer(f"The answer is {problem.answer // 10}.") != problem.answer
    assert extract_answer(str(problem.answer)) != problem.answer


def test_prompt_holds_the_question_and_not_the_answer():
    problem = generate("train", 1)[0]
    text = wordproblems.prompt(problem)
    assert text == f"Question: {problem.question}\nAnswer:"
    assert "The answer is" not in text

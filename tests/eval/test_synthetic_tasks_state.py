"""Tasks of state tracking and of sets, against Python's own parser and sets."""

import re

import pytest
import torch

from lm_zoo.causal_lm import IGNORE
from lm_zoo.eval.synthetic import ModularArithmetic, ModularArithmeticBrackets, SetDisjointness
from lm_zoo.eval.synthetic.set_disjointness import PUBLISHED


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def printed(task, row) -> str:
    return "".join(task.alphabet[token] for token in row.tolist())


class TestModularArithmetic:
    @pytest.mark.parametrize("length", [2, 3, 4, 5, 24, 41])
    @pytest.mark.parametrize(("modulus", "operators"), [(5, "+-*"), (7, "-*"), (2, "+")])
    def test_the_value_is_pythons(self, modulus, operators, length):
        task = ModularArithmetic(modulus=modulus, operators=operators, supervised="values")
        examples = task.examples(50, length, generator())
        assert examples.tokens.shape == examples.targets.shape == (50, length)
        for tokens, targets in zip(examples.tokens, examples.targets, strict=True):
            expression, rest = printed(task, tokens).split("=")
            assert re.fullmatch(rf"\d([{re.escape(operators)}]\d)*", expression)
            assert rest == "_" * (length % 2)
            values = [eval(expression[:end]) % modulus for end in range(1, len(expression) + 1, 2)]
            assert targets[: len(expression) : 2].tolist() == values
            assert targets[len(expression)] == values[-1]
            assert (targets[1 : len(expression) : 2] == IGNORE).all()
            assert (targets[len(expression) + 1 :] == IGNORE).all()

    def test_the_papers_supervise_the_result_alone(self):
        dense = ModularArithmetic(supervised="values").examples(20, 12, generator())
        sparse = ModularArithmetic().examples(20, 12, generator())
        assert torch.equal(sparse.tokens, dense.tokens)
        assert torch.equal(sparse.targets[:, -1], dense.targets[:, -1])
        assert (sparse.targets[:, :-1] == IGNORE).all()

    def test_every_digit_and_operator_is_as_likely(self):
        examples = ModularArithmetic().examples(2000, 40, generator())
        digits = examples.tokens[:, :39:2].flatten().bincount(minlength=5) / 40_000
        operators = examples.tokens[:, 1:39:2].flatten().bincount(minlength=8)[5:] / 38_000
        assert (digits - 1 / 5).abs().max() < 0.01
        assert (operators - 1 / 3).abs().max() < 0.01

    def test_the_vocabulary_is_the_papers(self):
        assert ModularArithmetic().vocab_size == 10
        assert ModularArithmeticBrackets().vocab_size == 12


class TestModularArithmeticBrackets:
    @pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 7, 40, 121])
    @pytest.mark.parametrize(("modulus", "operators"), [(5, "+-"), (5, "+-*"), (3, "*")])
    def test_the_value_is_pythons(self, modulus, operators, length):
        task = ModularArithmeticBrackets(modulus=modulus, operators=operators)
        examples = task.examples(30, length, generator())
        assert (examples.targets[:, :-1] == IGNORE).all()
        for tokens, targets in zip(examples.tokens, examples.targets, strict=True):
            expression, rest = printed(task, tokens).split("=")
            assert rest == ""
            assert targets[-1] == eval(expression) % modulus

    def test_the_grammar(self):
        task = ModularArithmeticBrackets(operators="+-*")
        node = re.compile(r"\((-?\d|v)[+*-](-?\d|v|)(?<=[\dv])\)|\(-?\d\)")
        for tokens in task.examples(200, 60, generator()).tokens:
            text = printed(task, tokens)[:-1]
            while (shorter := node.sub("v", text)) != text:
                text = shorter
            assert text == "v"

    def test_every_split_occurs(self):
        """Of `(L op R)` with 8 tokens, L has 1 to 5."""
        task = ModularArithmeticBrackets()
        texts = [printed(task, tokens)[1:-2] for tokens in task.examples(300, 10, generator()).tokens]
        sizes = {index for text in texts for index in splits(text)}
        assert sizes == {1, 2, 3, 4, 5}


def splits(text: str) -> list[int]:
    """Where the operator is that stands outside of all brackets, after the first operand."""
    depth, places = 0, []
    for index, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0 and character in "+-*" and index > 0 and text[index - 1] not in "+-*":
            places.append(index)
    return places[:1]


class TestSetDisjointness:
    @pytest.mark.parametrize("same_half", [False, True])
    @pytest.mark.parametrize("sizes", [((4, 16),), ((1, 1),), ((5, 3), (3, 5), (2, 6)), ((64, 64),)])
    def test_the_answer_is_the_intersection(self, sizes, same_half):
        task = SetDisjointness(vocabulary=256, sizes=sizes, same_half=same_half)
        (length,) = task.lengths
        examples = task.examples(100, length, generator())
        seen, places = set(), set()
        for tokens, targets in zip(examples.tokens.tolist(), examples.targets.tolist(), strict=True):
            assert (tokens[0], tokens[-1], tokens.count(257)) == (256, 258, 1)
            middle = tokens.index(257)
            first, second = tokens[1:middle], tokens[middle + 1 : -1]
            seen.add((len(first), len(second)))
            assert len(set(first)) == len(first)
            assert len(set(second)) == len(second)
            assert set(first) & set(second) == {targets[-1]}
            assert targets[:-1] == [IGNORE] * (length - 1)
            assert max(first) < 128
            others = set(second) - {targets[-1]}
            assert all((other < 128) == same_half for other in others)
            places.add(second.index(targets[-1]))
        assert seen == set(sizes)
        assert places <= set(range(max(second for _, second in sizes)))
        assert len(places) > len(sizes) or sizes == ((1, 1),)

    def test_the_defaults_are_the_papers(self):
        task = SetDisjointness()
        assert (task.vocabulary, task.sizes) == (2048, PUBLISHED)
        assert task.lengths == [23, 43, 83, 135, 263, 275]
        assert len(PUBLISHED) == len(set(PUBLISHED)) == 12

    def test_lists_from_a_file_will_do(self):
        assert SetDisjointness(sizes=[[4, 16]]) == SetDisjointness(sizes=((4, 16),))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModularArithmetic(modulus=1), "modulus must be at least 2, got 1"),
        (lambda: ModularArithmetic(operators="+/"), "operators must be some of"),
        (lambda: ModularArithmetic(operators="++"), "operators must be some of"),
        (lambda: ModularArithmetic(operators=""), "operators must be some of"),
        (lambda: ModularArithmetic(supervised="all"), "supervised must be"),
        (lambda: ModularArithmetic().examples(1, 1, generator()), "length must be at least 2"),
        (lambda: ModularArithmeticBrackets(modulus=0), "modulus must be at least 1, got 0"),
        (lambda: ModularArithmeticBrackets().examples(1, 1, generator()), "length must be at least 2"),
        (lambda: SetDisjointness(vocabulary=7), "vocabulary must be even"),
        (lambda: SetDisjointness(sizes=()), "sizes must be pairs"),
        (lambda: SetDisjointness(sizes=((1, 2, 3),)), "sizes must be pairs"),
        (lambda: SetDisjointness(sizes=((0, 2),)), "sizes must be at least 1, got 0"),
        (lambda: SetDisjointness(vocabulary=16, sizes=((4, 9),)), "need 9 tokens in half of vocabulary = 16"),
        (lambda: SetDisjointness(vocabulary=16, sizes=((4, 5),), same_half=True), "need 9 tokens in half of"),
        (lambda: SetDisjointness().examples(1, 22, generator()), r"length must be one that sizes make, of \[23, 43"),
    ],
)
def test_refuses_sizes_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()

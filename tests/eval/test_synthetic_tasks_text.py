"""Needles in a haystack as text."""

import re
from types import SimpleNamespace

import pytest
import torch

from lm_zoo.eval.needle_text import NAMES, dataset, needle_accuracy, needle_text
from lm_zoo.train.tokenizers import byte_tokenizer

FACT = re.compile(r"The secret number of (\w+) is (\d{5})\.")


@pytest.mark.parametrize(("sentences", "needles"), [(0, 1), (1, 1), (30, 1), (30, 8), (2, len(NAMES))])
def test_the_answer_is_what_a_dict_says(sentences, needles):
    for seed in range(30):
        text = needle_text(seed, sentences=sentences, needles=needles)
        facts = dict(FACT.findall(text.context))
        assert len(facts) == len(FACT.findall(text.context)) == len(set(facts.values())) == needles
        name = re.fullmatch(r"\nThe secret number of (\w+) is", text.question)[1]
        assert text.answer == " " + facts[name]
        assert set(facts.values()) <= set(text.choices)
        assert len(set(text.choices)) == len(text.choices) == max(4, needles)
        assert text.context.count(".") == sentences + needles


def test_the_seed_decides():
    assert needle_text(3, needles=2) == needle_text(3, needles=2) != needle_text(4, needles=2)
    answers = [needle_text(seed).choices.index(needle_text(seed).answer.strip()) for seed in range(200)]
    assert all(30 < answers.count(place) < 70 for place in range(4))


@pytest.mark.parametrize(("depth", "before"), [(0.0, 0), (0.25, 10), (1.0, 40)])
def test_depth_is_where_it_stands(depth, before):
    text = needle_text(1, sentences=40, depth=depth)
    assert text.depth == depth
    assert text.context[: text.context.index("The secret")].count(".") == before


def test_documents_hold_the_texts():
    rows = list(dataset(texts=20, sentences=5, needles=3, seed=1, version=1)["validation"])
    assert len({row["context"] for row in rows}) == len(rows) == 20
    for row in rows:
        name = row["question"].split()[-2]
        assert row["choices"][row["target"]] == dict(FACT.findall(row["context"]))[name]
    assert rows == list(dataset(texts=20, sentences=5, needles=3, seed=1)["validation"])
    assert not {row["context"] for row in rows} & {row["context"] for row in dataset(texts=20, seed=2)["validation"]}


@pytest.mark.parametrize(("name", "needles"), [("needle", 1), ("multi_needle", 8)])
def test_lm_eval_asks_for_the_fact(name, needles):
    from lm_zoo.eval.harness.tasks import load_tasks

    task = load_tasks([name])["tasks"][name]
    documents = list(task.validation_docs())
    assert len(documents) == 100
    for document in documents:
        question = task.doc_to_text(document)
        facts = dict(FACT.findall(question))
        assert len(facts) == needles
        assert task.doc_to_choice(document)[task.doc_to_target(document)] == facts[question.split()[-2]]
        assert question.endswith(" is")
        assert task.config.target_delimiter == " "


class LookUp:
    """A model that reads: it continues with the answer, but of some names it says the number backwards."""

    device = torch.device("cpu")
    config = SimpleNamespace(max_position_embeddings=4000)

    def __init__(self, tokenizer, unknown):
        self.tokenizer, self.unknown = tokenizer, unknown

    def __call__(self, ids):
        (row,) = ids.tolist()
        text = self.tokenizer.decode(row, skip_special_tokens=True)
        name = re.search(r"\nThe secret number of (\w+) is", text)[1]
        number = dict(FACT.findall(text))[name]
        said = text[: text.rindex(" is") + 3] + " " + (number[::-1] if name in self.unknown else number)
        following = [*self.tokenizer(said)["input_ids"][1:], 0]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(torch.tensor([following]), 258).float())


def test_accuracy_is_the_share_of_right_answers():
    tokenizer = byte_tokenizer()
    texts = [needle_text(seed, sentences=5, needles=2) for seed in range(40)]
    unknown = {"Ada", "Finn", "Zoe", "Ida", "Leo", "Mara", "Tara"}
    expected = sum(text.question.split()[-2] not in unknown for text in texts) / 40
    assert 0.5 < expected < 0.95
    assert needle_accuracy(LookUp(tokenizer, unknown), tokenizer, texts) == expected
    assert needle_accuracy(LookUp(tokenizer, set()), tokenizer, texts) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: needle_text(0, sentences=-1), "sentences must be at least 0, got -1"),
        (lambda: needle_text(0, needles=0), "needles must be at least 1, got 0"),
        (lambda: needle_text(0, needles=27), "needles must be at most 26, one for each name, got 27"),
        (lambda: needle_text(0, depth=-0.1), r"depth must be in \[0, 1\], got -0.1"),
        (lambda: needle_text(0, choices=0), "choices must be at least 1, got 0"),
        (lambda: needle_accuracy(LookUp(None, ()), None, []), "texts must hold at least one text"),
        (
            lambda: needle_accuracy(LookUp(None, ()), byte_tokenizer(), [needle_text(0, sentences=100)]),
            r"a text has \d+ tokens, more than the model's 4000 positions; ask for fewer sentences",
        ),
    ],
)
def test_refuses_what_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()

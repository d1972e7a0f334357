"""Recall from a long document, as completion (Arora et al. 2024, "Based", arXiv 2402.18668; JRT, arXiv 2407.05483).

A document is followed by the beginning of a sentence that something in it completes: a key of a form and a colon, or
a question turned into a statement. The model writes up to 48 tokens of one line. The metric `contains` is how often
the value stands in it, upper and lower case alike. The task files `recall_*.yaml` name these functions.
"""

from __future__ import annotations

import re
from typing import Any


def prompt(doc: dict[str, Any]) -> str:
    """SWDE, FDA and SQuAD bring the whole prompt."""
    return doc["text"].strip()


def value(doc: dict[str, Any]) -> str:
    return doc["value"].strip()


def document_and_question(doc: dict[str, Any]) -> str:
    """TriviaQA, NQ and DROP: the document without the marks of its parts, which may end in the question already."""
    document = re.sub(r"\[(?:PAR|DOC|TLE)\]", "", doc["context"].strip())
    question = doc["question"].strip()
    while question and document.lower().endswith(question.lower()):
        document = document[: -len(question)]
    return f"{document.strip().strip('.')}. {question}"


def first_answer(doc: dict[str, Any]) -> str:
    return doc["answers"][0] if doc["answers"] else "unanswerable"


def contains_value(doc: dict[str, Any], written: list[str]) -> dict[str, float]:
    return {"contains": contains(written[0], [value(doc)])}


def contains_answer(doc: dict[str, Any], written: list[str]) -> dict[str, float]:
    return {"contains": contains(written[0], doc["answers"])}


def contains(text: str, answers: list[str]) -> float:
    """1 if one of the answers stands in the text."""
    return float(any(answer.lower() in text.lower() for answer in answers))

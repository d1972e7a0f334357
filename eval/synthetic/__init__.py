"""Synthetic tasks: what a mixer can and cannot do, from data made of a seed."""

from lm_zoo.eval.synthetic.compression import Compression
from lm_zoo.eval.synthetic.fuzzy_in_context_recall import FuzzyInContextRecall
from lm_zoo.eval.synthetic.groups import WordProblem
from lm_zoo.eval.synthetic.in_context_recall import InContextRecall
from lm_zoo.eval.synthetic.induction import Induction
from lm_zoo.eval.synthetic.memorization import Memorization
from lm_zoo.eval.synthetic.modular_arithmetic import ModularArithmetic
from lm_zoo.eval.synthetic.modular_arithmetic_brackets import ModularArithmeticBrackets
from lm_zoo.eval.synthetic.mqar import MQAR
from lm_zoo.eval.synthetic.multi_needle import MultiNeedle
from lm_zoo.eval.synthetic.needle import Needle
from lm_zoo.eval.synthetic.noisy_in_context_recall import NoisyInContextRecall
from lm_zoo.eval.synthetic.parity import Parity
from lm_zoo.eval.synthetic.selective_copy import SelectiveCopy
from lm_zoo.eval.synthetic.set_disjointness import SetDisjointness
from lm_zoo.eval.synthetic.task import Examples, Task

TASKS: dict[str, type[Task]] = {
    "parity": Parity,
    "mqar": MQAR,
    "induction": Induction,
    "selective_copy": SelectiveCopy,
    "word_problem": WordProblem,
    "modular_arithmetic": ModularArithmetic,
    "modular_arithmetic_brackets": ModularArithmeticBrackets,
    "set_disjointness": SetDisjointness,
    "needle": Needle,
    "multi_needle": MultiNeedle,
    "in_context_recall": InContextRecall,
    "noisy_in_context_recall": NoisyInContextRecall,
    "fuzzy_in_context_recall": FuzzyInContextRecall,
    "compression": Compression,
    "memorization": Memorization,
}

__all__ = [
    "MQAR",
    "TASKS",
    "Compression",
    "Examples",
    "FuzzyInContextRecall",
    "InContextRecall",
    "Induction",
    "Memorization",
    "ModularArithmetic",
    "ModularArithmeticBrackets",
    "MultiNeedle",
    "Needle",
    "NoisyInContextRecall",
    "Parity",
    "SelectiveCopy",
    "SetDisjointness",
    "Task",
    "WordProblem",
]

"""Synthetic tasks: what a mixer can and cannot do, from data made of a seed."""

from lm_zoo.eval.synthetic.parity import Parity
from lm_zoo.eval.synthetic.task import Examples, Task

TASKS: dict[str, type[Task]] = {
    "parity": Parity,
}

__all__ = ["TASKS", "Examples", "Parity", "Task"]

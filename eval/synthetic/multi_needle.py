"""Several needles in a haystack, of which some are asked for."""

from __future__ import annotations

from dataclasses import dataclass

from lm_zoo.eval.synthetic.needle import Needle


@dataclass(frozen=True)
class MultiNeedle(Needle):
    """`Needle` with 8 facts, 4 of which are asked for one after another. The numbers are this project's choice.

        tokens  w [fact] k_1 v_1 w w [fact] k_2 v_2 w ... [ask] k_7 v_7 [ask] k_2 v_2 [ask] k_5 v_5 [ask] k_1

    Generated, loss and metric: as in `Needle`. Facts that nobody asks for are what a state wastes room on. Paper: Hsieh
    et al. 2024, "RULER", arXiv 2404.06654, which calls it multi-query, and multi-key with one question.
    """

    needles: int = 8
    questions: int = 4

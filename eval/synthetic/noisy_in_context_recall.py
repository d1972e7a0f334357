"""Noisy in-context recall of MAD: keys come again, with tokens in between that are to be left out of the state."""

from __future__ import annotations

from dataclasses import dataclass

from lm_zoo.eval.synthetic.in_context_recall import InContextRecall


@dataclass(frozen=True)
class NoisyInContextRecall(InContextRecall):
    """`InContextRecall` where a share of the pairs is noise, from a vocabulary of its own.

        tokens  k_3 v_1 n_4 n_9 k_5 v_2 n_1 n_1 k_3 v_1         target at the second k_3: v_1

    Generated: a fifth of the pairs is two random tokens out of 16 more. Loss and metric: as in `InContextRecall`.
    Paper: Poli et al. 2024, "Mechanistic design and scaling of hybrid architectures" (MAD), arXiv 2403.17844, which
    varies from vocabulary 32 with 16 of noise, length 128, a share of 0.2, 12,800 texts.
    """

    vocabulary: int = 32
    noise_vocabulary: int = 16
    noise: float = 0.2

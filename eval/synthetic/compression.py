"""Compression of MAD: a whole text in the one vector that the last token leaves behind."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from lm_zoo.errors import UserError
from lm_zoo.eval.synthetic.task import Examples, Task
from lm_zoo.layers.checks import check_size


@dataclass(frozen=True)
class Compression(Task):
    """Random tokens, then a mark; a decoder has to say all of them, from the hidden vector at the mark alone.

        tokens  x_1 x_2 x_3 [mark]      targets x_1 x_2 x_3 [mark], at the places where they stand

    Generated: tokens uniform. `decoder` stands between the hidden states and the head: it adds an encoding of place t
    to the vector at the mark and answers with what was read at t, so that here targets do not wait for their token.
    Loss and metric: all tokens. Attention is bound to one vector like everyone else. Paper: Poli et al. 2024,
    "Mechanistic design and scaling of hybrid architectures" (MAD), arXiv 2403.17844, which varies from vocabulary 16,
    length 32, 12,800 texts; it has biases and LayerNorm in the decoder, here RMSNorm and no biases.

    Attributes:
        vocabulary: number of tokens, with the mark.
    """

    paper = "Poli et al. 2024, arXiv 2403.17844"

    vocabulary: int = 16

    def __post_init__(self) -> None:
        check_size("vocabulary", self.vocabulary)
        if self.vocabulary < 2:
            raise UserError(f"vocabulary must be at least 2, for a token and the mark, got {self.vocabulary}")

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - 1)

    def examples(self, count: int, length: int, generator: Generator) -> Examples:
        if length < 2:
            raise UserError(f"length must be at least 2, for a token and the mark, got {length}")
        tokens = torch.randint(self.vocabulary - 1, (count, length), generator=generator)
        tokens[:, -1] = self.vocabulary - 1
        return Examples(tokens, tokens.clone())

    def decoder(self, hidden_size: int) -> nn.Module:
        return Decoder(hidden_size)


class Decoder(nn.Module):
    """Hidden states `[N, T, D]` -> `[N, T, D]`: two layers on the last of them plus the encoding of a place."""

    def __init__(self, hidden_size: int):
        super().__init__()
        if hidden_size % 2:
            raise UserError(f"hidden_size must be even, for sines and cosines of places, got {hidden_size}")
        self.layers = nn.Sequential(
            *(nn.RMSNorm(hidden_size), nn.Linear(hidden_size, hidden_size, bias=False), nn.GELU()),
            *(nn.RMSNorm(hidden_size), nn.Linear(hidden_size, hidden_size, bias=False), nn.GELU()),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(hidden[:, -1:] + places(hidden.shape[1], hidden.shape[2]).to(hidden))


def places(length: int, size: int) -> Tensor:
    """Sines and cosines of t at `size / 2` frequencies from 1 to 1/10,000, `[length, size]`."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(size // 2) / max(1, size // 2 - 1))
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)

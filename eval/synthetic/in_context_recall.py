"""In-context recall of MAD: keys come again, and so do their values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lm_zoo.causal_lm import IGNORE
from lm_zoo.errors import UserError
from lm_zoo.eval.synthetic.task import Examples, Task
from lm_zoo.layers.checks import check_size


@dataclass(frozen=True)
class InContextRecall(Task):
    """Pairs of key and value; the value of a key is drawn anew in every text and then stays.

        tokens  k_3 v_1 k_5 v_2 k_3 v_1 k_1 v_7 k_5 v_2         targets at the second k_3 and k_5: v_1, v_2

    Generated: keys uniform, so that a text of 128 tokens holds each of 8 keys some 8 times; the last key has come
    before. Loss and metric: the value, at each key that has come before. MAD trains on the next token everywhere and
    scores as here. Paper: Poli et al. 2024, "Mechanistic design and scaling of hybrid architectures" (MAD), arXiv
    2403.17844, which varies from vocabulary 16, length 128, 12,800 texts.

    Attributes:
        vocabulary: number of tokens: keys, values in the same number or one more, and noise.
        noise_vocabulary: how many of them are noise.
        noise: share of pairs that are replaced by two tokens of noise, in [0, 1).
    """

    paper = "Poli et al. 2024, arXiv 2403.17844"

    vocabulary: int = 16
    noise_vocabulary: int = 0
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_size("vocabulary", self.vocabulary)
        if not 0 <= self.noise_vocabulary <= self.vocabulary - 4:
            raise UserError(
                f"noise_vocabulary must leave 2 keys and 2 values of vocabulary = {self.vocabulary}, "
                f"got {self.noise_vocabulary}"
            )
        if not 0 <= self.noise < 1:
            raise UserError(f"noise must be in [0, 1), got {self.noise}")
        if self.noise > 0 and self.noise_vocabulary == 0:
            raise UserError(f"noise = {self.noise} needs tokens: give noise_vocabulary")

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def num_keys(self) -> int:
        return (self.vocabulary - self.noise_vocabulary) // 2

    @property
    def num_values(self) -> int:
        return self.vocabulary - self.noise_vocabulary - self.num_keys

    @property
    def chance(self) -> float:
        return 1 / self.num_values

    def examples(self, count: int, length: int, generator: Generator) -> Examples:
        if length < 4 or length % 2:
            raise UserError(f"length must be even and at least 4, for two pairs, got {length}")
        pairs = length // 2
        keys = torch.randint(self.num_keys, (count, pairs), generator=generator)
        is_noise = self._noise(count, pairs, generator)
        keys[:, -1] = self._known_key(keys[:, :-1], is_noise[:, :-1], generator)
        table = self.num_keys + torch.randint(self.num_values, (count, self.num_keys), generator=generator)
        values = table.gather(1, keys)
        tokens = torch.stack([keys, values], dim=2)
        if self.noise:
            first = self.vocabulary - self.noise_vocabulary
            noise = torch.randint(first, self.vocabulary, tokens.shape, generator=generator)
            tokens = torch.where(is_noise[:, :, None], noise, tokens)
        # The place of a key's first pair; noise shows no key.
        places = torch.arange(pairs).masked_fill(is_noise, pairs)
        first = torch.full((count, self.num_keys), pairs).scatter_reduce(1, keys, places, "amin")
        is_known = (torch.arange(pairs) > first.gather(1, keys)) & ~is_noise
        targets = torch.full_like(tokens, IGNORE)
        targets[:, :, 0] = torch.where(is_known, values, IGNORE)
        return Examples(tokens.flatten(1), targets.flatten(1))

    def _noise(self, count: int, pairs: int, generator: Generator) -> Tensor:
        """Which pairs are noise, `[N, P]`: never the last, nor one before it."""
        is_noise = torch.rand(count, pairs, generator=generator) < self.noise
        is_noise[:, -1] = False
        spared = torch.randint(pairs - 1, (count, 1), generator=generator)
        return is_noise.scatter(1, spared, False)

    def _known_key(self, keys: Tensor, is_noise: Tensor, generator: Generator) -> Tensor:
        """One of the different keys in each row of `keys [N, P]`, `[N]`."""
        is_shown = torch.zeros(len(keys), self.num_keys, dtype=torch.int64)
        is_shown.scatter_add_(1, keys, (~is_noise).long())
        return torch.multinomial((is_shown > 0).float(), 1, generator=generator).squeeze(1)

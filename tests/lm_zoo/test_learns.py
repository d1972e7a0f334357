"""Every mixer learns what needs its memory: two layers, from random weights to the answer.

The distances are beyond what two convolutions over 4 tokens see, so that the state has to carry the token.
"""

import pytest
import torch
import torch.nn.functional as F

from lm_zoo import MIXERS

LETTERS, FILLERS = 8, 4
QUERY = LETTERS + FILLERS
GAP, LENGTH = 9, 8
CHANCE = 1 / LETTERS
SIZES = {"vocab_size": QUERY + 1, "num_hidden_layers": 2, "initializer_range": 0.1}


def train(model, draw, patience: int, lr: float = 1e-2) -> float:
    """Share of right answers on new texts, after so many steps or when the loss is nearly 0.

    `draw(batch, generator)` makes tokens, and for each the label of the next one.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr, betas=(0.9, 0.95))
    for _ in range(patience):
        tokens, labels = draw(64, generator)
        loss = F.cross_entropy(model(tokens).logits.transpose(1, 2), labels, ignore_index=-100)
        if loss < 0.1:
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    tokens, labels = draw(256, generator)
    with torch.no_grad():
        guesses = model.eval()(tokens).logits.argmax(-1)
    counted = labels != -100
    return (guesses == labels)[counted].float().mean().item()


def recall(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A letter, fillers, and a query, which the letter answers."""
    letter = torch.randint(LETTERS, (batch, 1), generator=generator)
    fillers = torch.randint(LETTERS, QUERY, (batch, GAP), generator=generator)
    tokens = torch.cat([letter, fillers, torch.full_like(letter, QUERY)], dim=1)
    return tokens, torch.cat([torch.full((batch, GAP + 1), -100), letter], dim=1)


def copy(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Letters, a query, and the same letters again."""
    letters = torch.randint(LETTERS, (batch, LENGTH), generator=generator)
    query = torch.full((batch, 1), QUERY)
    tokens = torch.cat([query, letters, query, letters[:, :-1]], dim=1)
    return tokens, torch.cat([torch.full((batch, LENGTH + 1), -100), letters], dim=1)


QUICK = ("gla", "deltanet", "hgrn", "mamba2", "attention")  # one of each kind of recurrence


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MIXERS])
def test_recalls_a_letter(name, make_model):
    accuracy = train(make_model(name, torch.float32, **SIZES), recall, patience=250)
    assert accuracy > 0.8, f"{accuracy:.0%} right; guessing is right {CHANCE:.0%} of the time"


def test_a_mixer_without_memory_can_only_guess(make_model, monkeypatch):
    monkeypatch.setattr(MIXERS["attention"], "forward", lambda self, x, state=None, cu_seqlens=None: self.o_proj(x))
    assert train(make_model("attention", torch.float32, **SIZES), recall, patience=100) < 2 * CHANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_copies(name, make_model):
    accuracy = train(make_model(name, torch.float32, **SIZES), copy, patience=300, lr=5e-3)
    assert accuracy > 3 * CHANCE, f"{accuracy:.0%} right; guessing is right {CHANCE:.0%} of the time"

"""The zoo at a glance: what each mixer is, how many parameters it has, and how much it remembers."""

from __future__ import annotations

import sys
from dataclasses import astuple, dataclass

import torch

from lm_zoo.layers import MIXERS, Mixer

COLUMNS = ("name", "class", "paper", "decay", "update", "state", "parameters")


@dataclass(frozen=True)
class MixerFacts:
    name: str
    class_name: str
    paper: str
    decay: str
    update: str
    state: str  # per layer and text, in float32
    parameters: int  # per layer


def mixer_facts(hidden_size: int) -> list[MixerFacts]:
    """Facts of every mixer with its default options. Raises ValueError where one cannot have that hidden size."""
    facts = []
    for name, mixer_class in MIXERS.items():
        mixer = mixer_class(hidden_size)
        parameters = sum(parameter.numel() for parameter in mixer.parameters())
        described = (mixer_class.paper, mixer_class.decay, mixer_class.update)
        facts.append(MixerFacts(name, mixer_class.__name__, *described, state_size(mixer), parameters))
    return facts


@torch.inference_mode()
def state_size(mixer: Mixer) -> str:
    """Bytes of state, read off the state itself: constant, or what each token adds."""
    short, long = (_bytes_after(mixer, tokens) for tokens in (64, 128))
    return f"{short:,} B" if short == long else f"{(long - short) // 64:,} B per token"


def _bytes_after(mixer: Mixer, tokens: int) -> int:
    state = mixer.init_state(1)
    mixer(torch.zeros(1, tokens, mixer.hidden_size), state=state)
    return state.nbytes


def print_mixers(hidden_size: int) -> None:
    """A table on a terminal, tab-separated lines in a pipe."""
    facts = mixer_facts(hidden_size)
    if not sys.stdout.isatty():
        for row in (COLUMNS, *map(astuple, facts)):
            print(*row, sep="\t")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Mixers of lm_zoo: one layer of hidden size {hidden_size}, default options, state in float32",
        title_justify="left",
    )
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in ("state", "parameters") else "left")
    for row in facts:
        table.add_row(*astuple(row)[:-1], f"{row.parameters:,}")
    Console().print(table)

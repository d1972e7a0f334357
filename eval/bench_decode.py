"""How the decode speed of every mixer depends on the context: `python -m lm_zoo.eval.bench_decode`.

For each mixer a model of 12 layers and hidden size 512 reads contexts of several lengths and then decodes single
tokens. The steps of the different contexts are taken in turn, so that a drift of the machine's speed meets all of them;
what is printed are medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from lm_zoo.config import ZooConfig
from lm_zoo.eval.report import write_json
from lm_zoo.eval.speed import PREFILL_CHUNK, median_seconds
from lm_zoo.layers import MIXERS
from lm_zoo.model import ZooForCausalLM

CONTEXTS = (128, 2048, 32768)
SIZES = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 12}


@dataclass(frozen=True)
class Decoding:
    mixer: str
    parameters: int
    context: int
    tokens_per_second: float
    state_bytes: int


@torch.inference_mode()
def measure(mixer: str, contexts: Iterable[int], turns: int) -> list[Decoding]:
    """Decoding a batch of one after each context."""
    torch.manual_seed(0)
    model = ZooForCausalLM(ZooConfig(**SIZES, mixers={mixer: {}})).eval()
    generator = torch.Generator().manual_seed(0)
    caches, sizes = {}, {}
    for context in contexts:
        cache = caches[context] = model.init_cache(1)
        ids = torch.randint(model.config.vocab_size, (1, context), generator=generator)
        for chunk in ids.split(PREFILL_CHUNK, dim=1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
        sizes[context] = cache.nbytes
    token, seconds = ids[:, :1], {context: [] for context in caches}
    for _ in range(turns):
        for context, cache in caches.items():

            def step(cache=cache) -> None:
                model(token, past_key_values=cache)

            seconds[context].append(median_seconds(step, warm_up=1, repeats=3))
    parameters = model.num_parameters()
    return [Decoding(mixer, parameters, context, 1 / median(seconds[context]), sizes[context]) for context in caches]


def print_table(rows: list[Decoding], contexts: tuple[int, ...]) -> None:
    """A line per mixer: tokens/s and bytes of state at each context, and the last speed relative to the first."""
    table = Table(
        "mixer", "parameters", title=f"one text, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for context in contexts:
        table.add_column(f"tokens/s at {context:,}", justify="right")
    table.add_column("last / first", justify="right")
    for context in (contexts[0], contexts[-1]):
        table.add_column(f"state bytes at {context:,}", justify="right")
    for mixer in dict.fromkeys(row.mixer for row in rows):
        mine = [row for row in rows if row.mixer == mixer]
        speeds = [row.tokens_per_second for row in mine]
        cells = [f"{speed:.1f}" for speed in speeds]
        states = [f"{mine[i].state_bytes:,}" for i in (0, -1)]
        table.add_row(mixer, f"{mine[0].parameters:,}", *cells, f"{speeds[-1] / speeds[0]:.2f}", *states)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lm_zoo.eval.bench_decode", description=__doc__.splitlines()[0])
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS), help="which ones; all by default")
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS), help="tokens read before decoding")
    parser.add_argument("--turns", type=int, default=12, help="how often each context is timed, three steps a turn")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if min(*arguments.contexts, arguments.turns) < 1:
        parser.error("--contexts and --turns must be at least 1")
    rows = [row for mixer in arguments.mixers for row in measure(mixer, arguments.contexts, arguments.turns)]
    print_table(rows, tuple(arguments.contexts))
    if arguments.json:
        found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "model": SIZES}
        write_json(arguments.json, found | {"decoding": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()

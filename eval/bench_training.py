"""Training speed of whole models on one device: `python -m lm_zoo.eval.bench_training`.

GLA, Gated DeltaNet and a softmax transformer of 124 to 138 million parameters, each trained in bfloat16 autocast with
AdamW on the same number of tokens per step, cut into texts of several lengths. Printed are tokens/s, the part of the
device's products per second that the model's equations take, and the peak of memory; medians over the steps. All have
the same random tokens to learn by heart, so a loss that does not fall says that something is wrong.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from lm_zoo.config import ZooConfig
from lm_zoo.eval.flops import TRAINING_PASSES, flops_per_token, peak_flops
from lm_zoo.eval.report import write_json
from lm_zoo.model import ZooForCausalLM

MIXERS = {
    "gla": {"num_heads": 4},
    "gated_deltanet": {"num_heads": 6},
    "attention": {"num_heads": 12},
}
VOCABULARY = 50_304
WARM_UP = 3  # steps, the first of which compiles


@dataclass(frozen=True)
class Training:
    mixer: str
    parameters: int
    length: int  # tokens of a text
    tokens_per_second: float
    utilisation: float | None  # of the device's products per second
    peak_memory_bytes: int | None
    first_step_seconds: float
    first_loss: float
    last_loss: float


def measure(mixer: str, length: int, arguments: argparse.Namespace, device: torch.device) -> Training:
    torch.manual_seed(0)
    config = ZooConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        mixers={mixer: MIXERS[mixer]},
        tie_word_embeddings=True,
    )
    model = ZooForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    ids = torch.randint(VOCABULARY, (arguments.tokens // length, length), device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(WARM_UP + arguments.steps):
        _synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    speed = ids.numel() / median(seconds[WARM_UP:])
    peak = peak_flops(device, torch.bfloat16)
    used = None if peak is None else TRAINING_PASSES * flops_per_token(model, length) * speed / peak
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return Training(mixer, model.num_parameters(), length, speed, used, memory, seconds[0], losses[0], losses[-1])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def print_table(rows: list[Training], device: str) -> None:
    table = Table(
        "mixer", "parameters", "text", "tokens/s", "utilisation", "memory", "first step", "loss", title=device
    )
    for row in rows:
        used = "" if row.utilisation is None else f"{row.utilisation:.1%}"
        memory = "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.1f} GiB"
        losses = f"{row.first_loss:.2f} to {row.last_loss:.2f}"
        speed, first = f"{row.tokens_per_second:,.0f}", f"{row.first_step_seconds:.1f} s"
        table.add_row(row.mixer, f"{row.parameters:,}", f"{row.length:,}", speed, used, memory, first, losses)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lm_zoo.eval.bench_training", description=__doc__.splitlines()[0])
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768], help="tokens of a text")
    parser.add_argument("--tokens", type=int, default=65_536, help="per step")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if min(arguments.steps, *arguments.lengths) < 1:
        parser.error("--steps and --lengths must be at least 1")
    if any(arguments.tokens % length for length in arguments.lengths):
        parser.error(f"--lengths must divide --tokens {arguments.tokens}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rows = []
    for mixer in arguments.mixers:
        for length in arguments.lengths:
            rows.append(measure(mixer, length, arguments, device))
            print_table(rows[-1:], name)  # at once: a run that is cut off has said what it found
    print_table(rows, name)
    if arguments.json:
        found = {"device": name, "torch": torch.__version__, "tokens_per_step": arguments.tokens}
        write_json(arguments.json, found | {"training": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()

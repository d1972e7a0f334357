"""How linearized transformers decode, beside their teachers: `python -m lm_zoo.eval.bench_linearized STUDENT ...`.

A student is a folder that `lm-zoo linearize` wrote, or the name of a preset: then a Llama of 12 layers and hidden size
512, of random weights, on which speed and memory do not depend. The teacher has the same weights, softmax attention and
the KV cache of transformers. Measured are

    agreement   at how many tokens of a text decoding one by one, from the state, and one parallel pass over all of it
                find the same token likeliest; the text is the student's own, greedy or sampled
    speed       tokens/s after contexts of several lengths; the steps of all are taken in turn, so that a drift of the
                machine's speed meets each of them, and what counts are medians
    memory      bytes of the state, and by how much a process grows from the shortest context to the longest
"""

from __future__ import annotations

import argparse
import gc
import importlib.resources
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lm_zoo.config import suggest
from lm_zoo.errors import UserError
from lm_zoo.eval.loading import load_model
from lm_zoo.eval.report import write_json
from lm_zoo.eval.speed import median_seconds
from lm_zoo.linearized import LinearizedForCausalLM

CONTEXTS = (1024, 8192, 32768)
SIZES = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1408}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": max(CONTEXTS) + 1024}
READ_AT_ONCE = 512
AGREEMENT_TOKENS = 2000
LINUX_MEMORY = Path("/proc/self/statm")


@dataclass(frozen=True)
class Decoding:
    student: str
    model: str  # "teacher" or "student"
    context: int
    tokens_per_second: float
    state_bytes: int
    process_growth_bytes: int | None  # since the first context; None where the system does not say


@dataclass(frozen=True)
class Agreement:
    student: str
    dtype: str
    text: str  # "greedy", the likeliest tokens, or "sampled": greedy ones soon repeat themselves
    tokens: int
    equal: int  # of them the likeliest in both forms
    different_tokens: int  # that the text has
    relative_error: float  # of the logits


def load(name: str) -> LinearizedForCausalLM:
    """A student by its folder, or one of random weights by a preset."""
    if Path(name).is_dir():
        disable_progress_bar()
        model, _ = load_model(name)
        if not isinstance(model, LinearizedForCausalLM):
            raise UserError(f"{name} is no folder that `lm-zoo linearize` wrote")
        return model
    presets = {file.name.removesuffix(".yaml"): file for file in _presets().iterdir() if file.name.endswith(".yaml")}
    if name not in presets:
        raise UserError(f"no folder and no preset {name!r}{suggest(name, presets)}")
    spec = yaml.safe_load(presets[name].read_text(encoding="utf-8"))
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    layers = range(SIZES["num_hidden_layers"])
    keep = [layers[layer] for layer in spec.get("keep_layers", [])]
    return LinearizedForCausalLM.from_teacher(teacher, spec["mixer"], spec.get("options"), keep)


def _presets():
    return importlib.resources.files("lm_zoo.configs") / "linearize"


def models(name: str) -> dict[str, PreTrainedModel]:
    """The teacher and its student, of one set of weights."""
    student = load(name)
    return {"teacher": student.as_teacher(), "student": student}


def empty_cache(model: PreTrainedModel) -> Cache:
    return model.init_cache(1) if isinstance(model, LinearizedForCausalLM) else DynamicCache(config=model.config)


def cache_bytes(cache: Cache) -> int:
    if isinstance(cache, DynamicCache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return cache.nbytes


def read(model: PreTrainedModel, cache: Cache, tokens: int) -> None:
    """Random tokens into the cache, a few at once: what one call needs for itself is then small."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    for chunk in ids.split(READ_AT_ONCE, dim=1):
        model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def speeds(name: str, contexts: tuple[int, ...], turns: int) -> dict[tuple[str, int], tuple[float, int]]:
    """Tokens per second of decoding after each context, and bytes of the state, by model and context."""
    caches, steps, sizes = {}, {}, {}
    for kind, model in models(name).items():
        for context in contexts:
            cache = caches[kind, context] = empty_cache(model)
            read(model, cache, context)
            sizes[kind, context] = cache_bytes(cache)
            token = torch.zeros(1, 1, dtype=torch.int64)
            steps[kind, context] = lambda m=model, c=cache, t=token: m(t, past_key_values=c, use_cache=True)
    seconds = {key: [] for key in steps}
    for _ in range(turns):
        for key, step in steps.items():
            seconds[key].append(median_seconds(step, warm_up=1, repeats=3))
    return {key: (1 / median(seconds[key]), sizes[key]) for key in steps}


@torch.inference_mode()
def growth(name: str, kind: str, contexts: tuple[int, ...]) -> list[int | None]:
    """By how many bytes this process holds more after each context than after the first."""
    model = models(name)[kind]
    for _ in range(16):  # until the allocator has what a call takes, which comes over several calls
        read(model, empty_cache(model), READ_AT_ONCE)
    cache, seen, resident = empty_cache(model), 0, []
    for context in contexts:
        read(model, cache, context - seen)
        seen = context
        gc.collect()
        resident.append(resident_bytes())
    return [None if size is None else size - resident[0] for size in resident]


def resident_bytes() -> int | None:
    """Of this process in memory now, where the system says so."""
    if not LINUX_MEMORY.is_file():
        return None
    return int(LINUX_MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(name: str, contexts: tuple[int, ...], turns: int) -> list[Decoding]:
    """Teacher and student after each context; each one's memory in a process of its own."""
    found = speeds(name, contexts, turns)
    grown = {}
    for kind in ("teacher", "student"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            grown[kind] = dict(zip(contexts, process.submit(growth, name, kind, contexts).result(), strict=True))
    shown = Path(name).name
    return [Decoding(shown, kind, context, *found[kind, context], grown[kind][context]) for kind, context in found]


@torch.inference_mode()
def agreement(
    model: LinearizedForCausalLM, text: str, tokens: int = AGREEMENT_TOKENS, *, name: str = "student"
) -> Agreement:
    """Decodes a text, "greedy" or "sampled", and compares what the steps say with the parallel form."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.ones(1, 1, dtype=torch.int64)
    cache, steps = model.init_cache(1), []
    for _ in range(tokens):
        logits = model(ids[:, -1:], past_key_values=cache).logits[0, -1]
        steps.append(logits)
        chosen = logits.argmax() if text == "greedy" else logits.softmax(-1).multinomial(1, generator=generator)
        ids = torch.cat([ids, chosen.view(1, 1)], dim=1)
    one_by_one = torch.stack(steps)
    parallel = model(ids[:, :-1], use_cache=False).logits[0]
    return Agreement(
        student=name,
        dtype=str(model.dtype).removeprefix("torch."),
        text=text,
        tokens=tokens,
        equal=int((one_by_one.argmax(dim=-1) == parallel.argmax(dim=-1)).sum()),
        different_tokens=len(set(ids[0, 1:].tolist())),
        relative_error=float((one_by_one - parallel).norm() / parallel.norm()),
    )


def print_tables(rows: list[Decoding], agreements: list[Agreement]) -> None:
    console = Console(width=140)
    columns = ("student", "numbers", "text", "tokens", "equal", "different tokens", "error of logits")
    table = Table(*columns, title="agreement")
    for found in agreements:
        counts = (f"{count:,}" for count in (found.tokens, found.equal, found.different_tokens))
        table.add_row(found.student, found.dtype, found.text, *counts, f"{found.relative_error:.1e}")
    console.print(table)
    title = f"one text, {torch.get_num_threads()} threads, torch {torch.__version__}"
    table = Table("student", "model", "context", "tokens/s", "bytes of state", "process grows by", title=title)
    for row in rows:
        grown = "?" if row.process_growth_bytes is None else f"{row.process_growth_bytes / 2**20:,.1f} MiB"
        numbers = (f"{row.context:,}", f"{row.tokens_per_second:,.0f}", f"{row.state_bytes:,}", grown)
        table.add_row(row.student, row.model, *numbers)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lm_zoo.eval.bench_linearized", description=__doc__.splitlines()[0])
    parser.add_argument("students", nargs="+", metavar="STUDENT", help="folders of students, or names of presets")
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS), help="tokens read before decoding")
    parser.add_argument("--turns", type=int, default=40, help="how often each is timed, three steps a turn")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if min(*arguments.contexts, arguments.turns) < 1:
        parser.error("--contexts and --turns must be at least 1")
    contexts = tuple(sorted(set(arguments.contexts)))
    try:
        agreements = [
            agreement(load(name).to(dtype), text, name=Path(name).name)
            for name in arguments.students
            for dtype in (torch.float32, torch.float64)
            for text in ("greedy", "sampled")
        ]
        rows = [row for name in arguments.students for row in measure(name, contexts, arguments.turns)]
    except UserError as error:
        parser.error(str(error))
    print_tables(rows, agreements)
    if arguments.json:
        found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "random_llama": SIZES}
        found |= {"agreement": [asdict(row) for row in agreements], "decoding": [asdict(row) for row in rows]}
        write_json(arguments.json, found)


if __name__ == "__main__":
    main()

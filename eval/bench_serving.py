"""Tokens per second of many texts at once: `python -m lm_zoo.eval.bench_serving`.

Texts are written one after another by `generate`, and 1, 8 and 64 at a time by an engine, called from Python and over
HTTP by a client in a process of its own. All are taken in turns, so that a drift of the machine's speed meets all of
them, and what is printed are medians. Then a long prompt comes while one text is being written: the steps of that text
are timed with the prompt read in pieces, and with the prompt read at once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import uvicorn
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lm_zoo.config import ZooConfig
from lm_zoo.eval.report import check_writable, write_json
from lm_zoo.layers import MIXERS
from lm_zoo.model import ZooForCausalLM
from lm_zoo.packing import pack_weights
from lm_zoo.serving import Engine, Sampling
from lm_zoo.serving.app import create_app
from lm_zoo.serving.server import Server, listen

VOCABULARY = 4096
CLIENT = Path(__file__).with_name("streams_client.py")


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A word for every id."""
    words = {f" {id}": id for id in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=" 0")))


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def by_generate(model: ZooForCausalLM, prompt: list[int], tokens: int) -> float:
    start = time.perf_counter()
    ids = torch.tensor([prompt])
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tokens / (time.perf_counter() - start)


def by_engine(engine: Engine, streams: list[list[int]], tokens: int) -> float:
    start = time.perf_counter()
    requests = [engine.submit(prompt, Sampling(temperature=0, max_tokens=tokens)) for prompt in streams]
    written = sum(len(request.result().tokens) for request in requests)
    return written / (time.perf_counter() - start)


def by_http(port: int, streams: int, length: int, tokens: int) -> dict[str, Any]:
    command = [sys.executable, str(CLIENT), *map(str, (port, streams, length, tokens))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def gaps(model: ZooForCausalLM, length: int, chunk: int, steps: int) -> dict[str, float]:
    """Seconds between the tokens of a text, alone and while a prompt is read in pieces of `chunk` tokens."""
    times: list[float] = []
    started, read = threading.Event(), threading.Event()

    def listen_to(piece) -> None:
        times.append(time.perf_counter())
        if len(times) > steps:
            started.set()

    with Engine(model, new_tokenizer(), max_prompt_tokens=length, prefill_chunk=chunk) as engine:
        (text,) = prompts(1, 8, 0)
        request = engine.submit(text, Sampling(temperature=0, max_tokens=4096), listener=listen_to)
        started.wait()
        before, start = len(times), time.perf_counter()
        (long,) = prompts(1, length, 1)
        engine.submit(long, Sampling(temperature=0, max_tokens=1), listener=lambda piece: read.set())
        read.wait()
        seconds = time.perf_counter() - start
        engine.cancel(request)
    alone = [end - begin for begin, end in itertools.pairwise(times[:before])]
    beside = [end - begin for begin, end in itertools.pairwise(times[before - 1 :])]
    return {
        "chunk": chunk,
        "seconds_to_first_token": seconds,
        "median_step_alone": median(alone),
        "longest_step_beside": max(beside),
    }


def measure(arguments: argparse.Namespace, model: ZooForCausalLM) -> dict[str, Any]:
    """Tokens per second in every turn, and seconds to the first token over HTTP."""
    found: dict[str, Any] = {"generate": []}
    found |= {f"{way} {count}": [] for way in ("engine", "http", "first token") for count in arguments.streams}
    tokens, length = arguments.answer, arguments.prompt
    with Engine(model, new_tokenizer()) as engine:
        listener, ready = listen("127.0.0.1", 0), threading.Event()
        port = listener.getsockname()[1]
        config = uvicorn.Config(create_app(engine, "bench"), lifespan="off", log_config=None, access_log=False)
        server = Server(config, engine, 0.0, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        ready.wait()
        for turn in range(-1, arguments.turns):  # the first one warms up
            turns = {"generate": by_generate(model, *prompts(1, length, turn + 1), tokens)}
            for count in arguments.streams:
                turns[f"engine {count}"] = by_engine(engine, prompts(count, length, turn + 1), tokens)
                over_http = by_http(port, count, length, tokens)
                turns[f"http {count}"] = over_http["tokens"] / over_http["seconds"]
                turns[f"first token {count}"] = median(over_http["first_token"])
            for name, value in turns.items():
                if turn >= 0:
                    found[name].append(value)
        server.finish(0.0)
        thread.join()
    return found


def print_table(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    table = Table("texts at a time", title=f"tokens/s, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in ("engine", "over HTTP", "engine / generate", "s to the first token, HTTP"):
        table.add_column(name, justify="right")
    one = median(found["generate"])
    for count in arguments.streams:
        engine, http = median(found[f"engine {count}"]), median(found[f"http {count}"])
        table.add_row(
            f"{count}",
            f"{engine:.1f}",
            f"{http:.1f}",
            f"{engine / one:.2f}",
            f"{median(found[f'first token {count}']):.3f}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(f"one after another by generate: {one:.1f} tokens/s")
    for row in found["gaps"]:
        console.print(
            f"a prompt of {arguments.long:,} tokens in pieces of {row['chunk']:,}: read in "
            f"{row['seconds_to_first_token']:.2f} s, longest step beside it {row['longest_step_beside']:.3f} s "
            f"(alone {row['median_step_alone']:.3f} s)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lm_zoo.eval.bench_serving", description=__doc__.splitlines()[0])
    parser.add_argument("--mixer", choices=MIXERS, default="gla")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 64], help="texts at a time")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens of a text")
    parser.add_argument("--long", type=int, default=8192, help="tokens of the long prompt")
    parser.add_argument("--turns", type=int, default=5, help="how often everything is timed")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    if arguments.json:
        check_writable(arguments.json)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": arguments.hidden_size,
        "num_hidden_layers": arguments.layers,
    }
    model = pack_weights(ZooForCausalLM(ZooConfig(**sizes, mixers={arguments.mixer: {}})).eval())
    found = measure(arguments, model)
    found["gaps"] = [gaps(model, arguments.long, chunk, steps=20) for chunk in (256, arguments.long)]
    print_table(arguments, found)
    if arguments.json:
        about = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "load": os.getloadavg(),
            "model": {**sizes, "mixer": arguments.mixer, "parameters": model.num_parameters()},
            "prompt": arguments.prompt,
            "answer": arguments.answer,
            "long": arguments.long,
        }
        write_json(arguments.json, about | {"measured": found})


if __name__ == "__main__":
    main()

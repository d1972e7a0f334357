"""What requests with a shared prefix cost with a `PrefixStore`: `python -m lm_zoo.eval.bench_prefix`.

One request reads the prefix and its own tokens and writes an answer. Many requests, one after another through a store
that is empty at first, are timed against one without a store, in turns; what is printed are medians.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch

from lm_zoo.config import ZooConfig
from lm_zoo.eval.report import check_writable, write_json
from lm_zoo.layers import MIXERS
from lm_zoo.model import ZooForCausalLM
from lm_zoo.prefix_store import PrefixStore

VOCABULARY = 4096


def seconds_of(model: ZooForCausalLM, prompts: torch.Tensor, answer: int, store: PrefixStore | None) -> float:
    """All prompts one after another, each with an answer of that many tokens."""
    start = time.perf_counter()
    for prompt in prompts:
        cache = None if store is None else store.prefill(prompt[None])
        model.generate(
            prompt[None], past_key_values=cache, max_new_tokens=answer, min_new_tokens=answer, pad_token_id=0
        )
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lm_zoo.eval.bench_prefix", description=__doc__.splitlines()[0])
    parser.add_argument("--mixer", choices=MIXERS, default="gla")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prefix", type=int, default=10_000, help="tokens that all requests share")
    parser.add_argument("--own", type=int, default=16, help="tokens of a request after them")
    parser.add_argument("--answer", type=int, default=8, help="tokens that each request is answered with")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--turns", type=int, default=3, help="how often everything is timed")
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
    model = ZooForCausalLM(ZooConfig(**sizes, mixers={arguments.mixer: {}})).eval()
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(VOCABULARY, (1, arguments.prefix), generator=generator)
    own = torch.randint(VOCABULARY, (arguments.requests, arguments.own), generator=generator)
    prompts = torch.cat([prefix.expand(arguments.requests, -1), own], dim=1)
    one, all_of_them = [], []
    for _ in range(arguments.turns):
        one.append(seconds_of(model, prompts[:1], arguments.answer, None))
        store = PrefixStore(model)
        all_of_them.append(seconds_of(model, prompts, arguments.answer, store))
    result = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": {**sizes, "mixer": arguments.mixer, "parameters": model.num_parameters()},
        "prefix": arguments.prefix,
        "own": arguments.own,
        "answer": arguments.answer,
        "requests": arguments.requests,
        "chunk": store.chunk,
        "seconds_of_one_without_store": one,
        "seconds_of_all_with_store": all_of_them,
        "ratio": median(all_of_them) / median(one),
        "tokens_read": store.tokens_read,
        "store_bytes": store.nbytes,
    }
    print(
        f"{arguments.requests} requests with a store: {median(all_of_them):.2f} s, one without: {median(one):.2f} s, "
        f"{result['ratio']:.2f} times; {store.tokens_read:,} tokens read, {store}"
    )
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()

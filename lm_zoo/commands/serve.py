"""`lm-zoo serve MODEL --port N`."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import os
import sys
from pathlib import Path

from lm_zoo.commands.arguments import non_negative, port, positive
from lm_zoo.errors import UserError

API_KEY = "LM_ZOO_API_KEY"
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of a saved model with its tokenizer")
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="0: any free one (default 8000)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine)")
    parser.add_argument("--name", help="the model's name in requests (default: that of the folder)")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"what requests must bring along (default: ${API_KEY}, if that is set)"
    )
    parser.add_argument("--max-batch", type=positive, default=64, metavar="N", help="texts at a time (default 64)")
    parser.add_argument(
        "--max-queue", type=positive, default=256, metavar="N", help="texts that may wait beside them (default 256)"
    )
    parser.add_argument(
        "--max-prompt-tokens", type=positive, default=32768, metavar="N", help="longest prompt (default 32,768)"
    )
    parser.add_argument("--max-tokens", type=positive, default=4096, metavar="N", help="longest text (default 4,096)")
    parser.add_argument(
        "--max-seconds", type=positive, default=600, metavar="N", help="longest time for a request (default 600)"
    )
    parser.add_argument(
        "--grace", type=non_negative, default=30.0, metavar="N", help="seconds to finish after SIGTERM (default 30)"
    )
    parser.add_argument(
        "--prefix-store",
        metavar="SIZE",
        help="memory for the states of prompts, so that what later ones begin with is not read again, such as 1GiB",
    )


def run(arguments: argparse.Namespace) -> None:
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        raise UserError('serving needs FastAPI, uvicorn and prometheus-client: pip install "lm_zoo[serve]"')
    from lm_zoo import pack_weights
    from lm_zoo.eval.loading import check_folder, load_model
    from lm_zoo.prefix_store import PrefixStore
    from lm_zoo.serving.engine import Engine
    from lm_zoo.serving.server import listen, serve

    key = os.environ.get(API_KEY) if arguments.api_key is None else arguments.api_key
    if key is not None and not key.strip():
        raise UserError(f"the API key is empty; give one with --api-key or ${API_KEY}, or neither")
    check_folder(arguments.model)
    with listen(arguments.host, arguments.port) as listener:  # first: to load a model takes time
        model, tokenizer = load_model(arguments.model)
        size = arguments.prefix_store
        engine = Engine(
            pack_weights(model),
            tokenizer,
            max_batch=arguments.max_batch,
            max_queue=arguments.max_queue,
            max_prompt_tokens=arguments.max_prompt_tokens,
            max_tokens=arguments.max_tokens,
            max_seconds=arguments.max_seconds,
            prefix_store=None if size is None else PrefixStore(model, budget=size),
        )
        name = arguments.name or arguments.model.resolve().name
        host, number = listener.getsockname()[:2]
        if key is None and not ipaddress.ip_address(host).is_loopback:
            print(f"lm-zoo: whoever reaches {host} may use this: there is no API key", file=sys.stderr)

        def ready() -> None:
            at = f"[{host}]" if ":" in host else host
            print(f"lm-zoo: {name} at http://{at}:{number}/v1", file=sys.stderr, flush=True)

        serve(engine, name, listener, api_key=key, grace=arguments.grace, ready=ready)

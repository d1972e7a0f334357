"""`lm-zoo eval inspect`: what a model looks at, how long it remembers, and what it makes of long texts.

Writes into a folder `inspect.json`, with all numbers, and pictures: `attention.png`, `memory.png`, `positions.png` and
`lengths.png`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lm_zoo.errors import UserError, one_line
from lm_zoo.eval.inspect_layers import LayerMap, attention_maps
from lm_zoo.eval.inspect_plots import draw_lengths, draw_maps, draw_memory, draw_positions
from lm_zoo.eval.layer_statistics import forgotten_per_token, layer_statistics
from lm_zoo.eval.lengths import FACTORS, Lengths, as_perplexity, measure_lengths, position_limit
from lm_zoo.eval.report import write_json
from lm_zoo.model import ZooForCausalLM

TOKENS = 96  # that are drawn, if the text has them and their number is not chosen
MAPS = 4  # layers whose maps are drawn, if none are chosen
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def inspect_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    out: str | Path,
    *,
    length: int,
    tokens: int | None = None,
    layers: list[int] | None = None,
) -> dict[str, Any]:
    """Looks into `model` as it reads `text`, writes the folder `out`, and returns what is in its `inspect.json`.

    Args:
        length: tokens of a text that it was trained on; loss is measured at up to 16 times as many.
        tokens: of the beginning of the text, whose attention is looked at; up to 96 if not given.
        layers: whose maps are drawn; a few over the depth if not given.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    most = min(len(ids), position_limit(model) or len(ids))
    tokens = min(TOKENS, most) if tokens is None else tokens
    if not 2 <= tokens <= most:
        raise UserError(f"tokens must be from 2 to {most}, what the text has and the model takes, got {tokens}")
    maps = attention_maps(model, ids[None, :tokens].to(model.device))
    layers = _spread(len(maps)) if layers is None else layers
    if unknown := [layer for layer in layers if not 0 <= layer < len(maps)]:
        raise UserError(f"layers must be from 0 to {len(maps) - 1}, got {unknown[0]}")
    lengths = measure_lengths(model, ids, length)
    rows = _rows(model, ids[None, :length].to(model.device), maps)
    content = {"length": length, "limit": lengths.limit, "tokens": tokens, "layers": rows, **tables(lengths)}

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    draw_maps([maps[layer] for layer in layers], out / "attention.png")
    draw_memory(rows, tokens, out / "memory.png")
    draw_positions({"": content}, out / "positions.png")
    draw_lengths({"": content}, out / "lengths.png")
    write_json(out / "inspect.json", content)
    return content


def tables(lengths: Lengths) -> dict[str, Any]:
    return {
        "scored_tokens": lengths.scored,
        "by_length": [{"tokens": n, "nats": nats, "perplexity": as_perplexity(nats)} for n, nats in lengths.by_length],
        "by_position": [{"first": a, "last": b, "nats": nats} for a, b, nats in lengths.by_position],
    }


def _rows(model: PreTrainedModel, ids: Tensor, maps: list[LayerMap]) -> list[dict[str, Any]]:
    """What is known of each layer. `None` stands for a memory without end."""
    rows = [
        {
            "layer": seen.layer,
            "mixer": seen.mixer,
            "attention_distance": seen.distance.median().item(),
            "nearest_head": seen.distance.min().item(),
            "farthest_head": seen.distance.max().item(),
        }
        for seen in maps
    ]
    if not isinstance(model, ZooForCausalLM):
        return rows
    for statistics in layer_statistics(model, ids):
        statistics["memory_length"] = _finite(statistics["memory_length"])
        rows[statistics["layer"]] |= statistics
    for layer, forgotten in forgotten_per_token(model, ids).items():
        quantiles = forgotten.double().cpu().quantile(torch.tensor(QUANTILES, dtype=torch.float64))
        rows[layer]["decay_quantiles"] = (1 - quantiles).flip(0).tolist()
        rows[layer]["memory_quantiles"] = [_finite(1 / q if q > 0 else math.inf) for q in quantiles.flip(0).tolist()]
    return rows


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _spread(count: int) -> list[int]:
    """A few numbers below `count`, the first and the last among them."""
    return sorted({round(i * (count - 1) / (MAPS - 1)) for i in range(MAPS)})


def training_length(folder: str | Path, model: PreTrainedModel) -> int:
    """Tokens of a training text: what the recipe beside a trained model says, or the positions that a model has."""
    recipe = Path(folder).resolve().parent / "config.yaml"
    if recipe.is_file():
        try:
            return int(yaml.safe_load(recipe.read_text(encoding="utf-8"))["data"]["seq_len"])
        except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{recipe} says no data.seq_len ({one_line(error)}); give --length") from error
    if (limit := position_limit(model)) is not None:
        return limit
    raise UserError(f"nothing beside {folder} says how long its training texts were; give --length")


def left_out(content: dict[str, Any]) -> str | None:
    """A line about the lengths that a model's positions do not allow."""
    longest, limit = FACTORS[-1] * content["length"], content["limit"]
    if limit is None or longest <= limit:
        return None
    return f"lengths above {limit:,} tokens are left out: the model has {limit:,} positions"

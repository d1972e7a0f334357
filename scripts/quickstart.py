"""Trains a small gated-linear-attention model and a softmax transformer of the same size, and sets them side by side.

Both read the same tokens in the same order: the standard library of the Python that runs this, source and docs. Then
the transformer is linearized. The folder runs/quickstart then holds

    gla/ transformer/ linearized/    Hugging Face folders with their tokenizer; linearized/report.html
    loss.png                         training and validation loss of the first two
    table.md results.json
    heldout.txt                      the text that none has seen in training

Run by scripts/quickstart.sh, which sets everything up first.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from quickstart_report import Linearization, Result, console, draw_losses, print_report, write_report
from safetensors import SafetensorError
from stdlib_corpus import stdlib_corpus
from transformers.utils import logging

from lm_zoo.errors import is_user_error, one_line
from lm_zoo.eval.generation import generate
from lm_zoo.eval.loading import load_model
from lm_zoo.eval.perplexity import perplexity
from lm_zoo.eval.report import write_atomically
from lm_zoo.eval.speed import decode_speed
from lm_zoo.train import Interrupted, TextData, ZooModule, fit
from lm_zoo.train.linearize import linearize
from lm_zoo.train.linearize.data import TextOptions
from lm_zoo.train.metrics import read_metrics
from lm_zoo.train.tokenizers import END_OF_TEXT

OUT = Path("runs/quickstart")
STEPS = 1300  # the one number that sets how long this takes
SEQ_LEN = 256
BATCH_SIZE = 4  # rows: at this few tokens in all, many small steps learn more than few large ones
SEED = 0
# One layer of either has about four D x D matrices of parameters, so the two models come out equal. Each trains at the
# peak learning rate that did best for it in short trials: one rate for both would favour one of them.
MODELS = {"gla": ("gla-tiny", 8e-3), "transformer": ("transformer-tiny", 2e-3)}
# The transformer's attention is replaced as in LoLCATs, with a window so small that the linear part has most to do.
WINDOW = 4
LINEARIZE = {"options.window": WINDOW, "measure_tokens": 16_384} | {
    f"{stage}.{name}": value
    for stage in ("transfer", "recover")
    for name, value in {"tokens": 200_000, "length": SEQ_LEN, "batch": BATCH_SIZE, "accumulate": 1}.items()
}
CONTEXTS = (128, 4096)
PROMPT = 'class Reader:\n    """Read lines from a file.\n\n'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    start = time.monotonic()
    logging.disable_progress_bar()
    try:
        results, linearization = quickstart()
    except (KeyboardInterrupt, Interrupted):
        print("quickstart: interrupted; run it again to start over", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_user_error(error) and not isinstance(error, SafetensorError):  # which a full disk raises too
            raise
        print(f"quickstart: error: {one_line(error)}", file=sys.stderr)
        return 2
    print_report(results, linearization, OUT, context=SEQ_LEN, seconds=time.monotonic() - start)
    return 0


def quickstart() -> tuple[list[Result], Linearization]:
    training = OUT / "training"
    shutil.rmtree(training, ignore_errors=True)
    training.mkdir(parents=True)
    held_out = write_text(training)
    data = {"files": str(training / "train.txt"), "val_files": str(OUT / "heldout.txt"), "separator": END_OF_TEXT}

    metrics, trained = {}, {}
    for name, (preset, learning_rate) in MODELS.items():
        console.rule(f"[bold]training {name}")
        torch.manual_seed(SEED)
        fit(
            ZooModule(preset, learning_rate=learning_rate, warmup=0.05),
            # Plain rows of text: what a row holds of the document before it is context like any other.
            TextData(
                **data, tokenizer="bpe", vocab_size=4096, seq_len=SEQ_LEN, batch_size=BATCH_SIZE,
                respect_documents=False, seed=SEED, cache_dir=str(training / "cache"),
            ),
            training / name,
            max_steps=STEPS,
            val_check_interval=STEPS // 10,
            limit_val_batches=32,  # for the curve; the table measures the whole held-out text
            log_every_n_steps=20,
            devices=1,
        )  # fmt: skip
        shutil.rmtree(OUT / name, ignore_errors=True)
        (training / name / "model").rename(OUT / name)
        metrics[name] = read_metrics(training / name / "metrics.csv")
        speeds = [float(line["tokens_per_second"]) for line in metrics[name] if line["tokens_per_second"]]
        trained[name] = (STEPS * BATCH_SIZE * SEQ_LEN, statistics.median(speeds))

    linearization, *trained["linearized"] = linearize_transformer(training)

    console.rule("[bold]evaluating")
    results = [evaluate(name, held_out, *trained[name]) for name in trained]
    sizes = [result.parameters for result in results if result.name in MODELS]
    if max(sizes) > 1.02 * min(sizes):
        raise AssertionError(f"the models are to be of one size, but have {sizes} parameters")
    draw_losses(metrics, OUT / "loss.png", tokens_per_step=BATCH_SIZE * SEQ_LEN)
    write_report(results, linearization, OUT)
    return results, linearization


def linearize_transformer(training: Path) -> tuple[Linearization, int, float]:
    """Leaves a student of the transformer in the folder linearized/; what it was worth, its tokens, and their speed."""
    console.rule("[bold]linearizing transformer")
    output = training / "linearized"
    text = TextOptions(
        files=(str(training / "train.txt"),),
        val_files=(str(OUT / "heldout.txt"),),
        separator=END_OF_TEXT,
        cache_dir=training / "cache",
    )
    _, report = linearize(
        OUT / "transformer", "lolcats", data=text, output=output, overrides=LINEARIZE, prompt=PROMPT, log=show
    )
    shutil.rmtree(OUT / "linearized", ignore_errors=True)
    output.rename(OUT / "linearized")
    stages = report["stages"].values()
    tokens = sum(stage["tokens"] for stage in stages)
    return Linearization.of(report), tokens, tokens / sum(stage["seconds"] for stage in stages)


def show(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def write_text(training: Path) -> str:
    """Writes the corpus where the trainer finds it, and returns the held-out part."""
    train, held_out = (END_OF_TEXT.join(document.text for document in part) for part in stdlib_corpus())
    write_atomically(training / "train.txt", train.encode())
    write_atomically(OUT / "heldout.txt", held_out.encode())
    console.print(
        f"text: the standard library of Python {sys.version.split()[0]}, "
        f"{len(train.encode()) / 1e6:.1f} MB to train on and {len(held_out.encode()) / 1e6:.1f} MB held out",
        highlight=False,
    )
    return held_out


def evaluate(name: str, held_out: str, tokens: int, tokens_per_second: float) -> Result:
    """Everything the table says of one model, measured on what a user would load: the folder."""
    model, tokenizer = load_model(OUT / name)
    measured = perplexity(model, tokenizer, held_out, context=SEQ_LEN)
    decoding = [decode_speed(model, context) for context in CONTEXTS]
    return Result(
        name=name,
        parameters=model.num_parameters(),
        validation_loss=measured.nats / measured.tokens,
        bits_per_byte=measured.bits_per_byte,
        training_tokens=tokens,
        training_tokens_per_second=tokens_per_second,
        contexts=CONTEXTS,
        decode_tokens_per_second=tuple(speed.tokens_per_second for speed in decoding),
        state_bytes=tuple(speed.state_bytes for speed in decoding),
        sample=generate(model, tokenizer, PROMPT, temperature=0.7, max_tokens=100),
    )


if __name__ == "__main__":
    sys.exit(main())

"""One run: a `ZooForCausalLM` from random weights, trained by Lightning on one task, then tested."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lm_zoo.causal_lm import IGNORE
from lm_zoo.eval.synthetic.front import put_convolutions_between
from lm_zoo.eval.synthetic.plan import Run
from lm_zoo.eval.synthetic.task import Examples
from lm_zoo.model import ZooForCausalLM

VALIDATION_SEED, TEST_SEED = 10**6, 2 * 10**6  # far from those of training; a generator takes 32 bits of a seed
ROWS = 128  # of a test that are read at a time


def train(run: Run) -> dict[str, Any]:
    """Train and test; the result is plain values: accuracies of every part of the test, and what they cost."""
    started = time.perf_counter()
    torch.manual_seed(run.seed)
    model = ZooForCausalLM(run.config())
    if (size := run.training["convolution"]) is not None:
        put_convolutions_between(model, size)
    steps = total_steps(run.training)
    learner = Learner(model, run, steps)
    batches = DataLoader(Batches(run), batch_size=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The '\\w+_dataloader' does not have many workers")
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        L.Trainer(
            accelerator="gpu" if run.training["device"] == "cuda" else "cpu",
            devices=1,
            max_steps=steps,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(learner, batches)
    learner.to(run.training["device"])
    return {
        "accuracy": learner.accuracies(TEST_SEED),
        "validation": learner.accuracies(VALIDATION_SEED, run.training["validation"]),
        "loss": learner.loss.item(),
        "steps": learner.steps_done,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state": state_elements(model, run.training["test"][0]["length"]),
        "seconds": round(time.perf_counter() - started, 1),
    }


class Learner(L.LightningModule):
    """AdamW with a warm-up and a cosine; every `check_every` steps a validation, which may end the run."""

    def __init__(self, model: ZooForCausalLM, run: Run, steps: int):
        super().__init__()
        self.model = model
        self.run, self.steps = run, steps
        self.decoder = run.task_of(run.training["train"][0]).decoder(run.hidden_size)
        self.loss, self.steps_done = torch.tensor(math.inf), 0

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        counted = targets != IGNORE
        logits = self.model.head(self.decoder(self.model.hidden_states(tokens))[counted])
        return F.cross_entropy(logits, targets[counted])

    def configure_optimizers(self) -> dict[str, Any]:
        decay = self.run.training["weight_decay"]
        optimizer = torch.optim.AdamW(parameter_groups(self, decay), lr=self.run.learning_rate)
        warmup = max(1, round(self.run.training["warmup"] * self.steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup))) / 2

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_end(self, outputs: dict[str, Tensor], *_: object) -> None:
        self.loss, self.steps_done = outputs["loss"], self.trainer.global_step
        if self.steps_done % self.run.training["check_every"] == 0:
            parts = self.accuracies(VALIDATION_SEED, self.run.training["validation"])
            self.trainer.should_stop = sum(parts) / len(parts) >= self.run.training["stop_at"]

    @torch.no_grad()
    def accuracies(self, seed: int, count: int | None = None) -> list[float]:
        """The accuracy on every part of the test; `count` examples of each, by default as many as the part says."""
        was_training = self.training
        self.eval()
        found = []
        for index, part in enumerate(self.run.training["test"]):
            task, generator = self.run.task_of(part), Generator().manual_seed(seed + index)
            examples = task.examples(count or part["count"], part["length"], generator)
            guesses = torch.cat([self.guesses(rows.to(self.device)) for rows in examples.tokens.split(ROWS)])
            found.append(round(task.accuracy(guesses.cpu(), examples.targets), 4))
        self.train(was_training)
        return found

    def guesses(self, tokens: Tensor) -> Tensor:
        return self.model.head(self.decoder(self.model.hidden_states(tokens))).argmax(dim=-1)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of linear maps and embeddings decay; norms, biases and what gates are made of do not."""
    weights = {id(part.weight) for part in model.modules() if isinstance(part, nn.Linear | nn.Embedding)}
    decayed = [p for p in model.parameters() if id(p) in weights]
    kept = [p for p in model.parameters() if id(p) not in weights]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


class Batches(IterableDataset):
    """(tokens, targets) without end: new ones from the parts in turn, or epochs over sets that are drawn once."""

    def __init__(self, run: Run):
        self.run = run
        self.batch_size = run.training["batch_size"]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = Generator().manual_seed(self.run.seed)
        parts = [(self.run.task_of(part), part) for part in self.run.training["train"]]
        while self.run.training["epochs"] is None:
            for task, part in parts:
                yield _pair(task.examples(self.batch_size, part["length"], generator))
        sets = [_pair(task.examples(part["count"], part["length"], generator)) for task, part in parts]
        while True:
            rows = [
                (which, chosen)
                for which, (tokens, _) in enumerate(sets)
                for chosen in torch.randperm(len(tokens), generator=generator).split(self.batch_size)
            ]
            for index in torch.randperm(len(rows), generator=generator).tolist():
                which, chosen = rows[index]
                yield sets[which][0][chosen], sets[which][1][chosen]


def total_steps(training: dict[str, Any]) -> int:
    if training["epochs"] is None:
        return training["steps"]
    batches = sum(math.ceil(part["count"] / training["batch_size"]) for part in training["train"])
    return training["epochs"] * batches


def _pair(examples: Examples) -> tuple[Tensor, Tensor]:
    return examples.tokens, examples.targets


@torch.no_grad()
def state_elements(model: ZooForCausalLM, length: int) -> int:
    """Numbers of 4 bytes that the model keeps of a text of `length` tokens, over all layers."""
    cache = model.init_cache(1)
    model(torch.zeros(1, length, dtype=torch.int64, device=model.device), past_key_values=cache)
    return cache.nbytes // 4

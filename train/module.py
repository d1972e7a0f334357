"""The Lightning module: a ZooForCausalLM, its loss and its optimizer."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lm_zoo.config import ZooConfig
from lm_zoo.errors import UserError
from lm_zoo.model import ZooForCausalLM
from lm_zoo.train.compiled import any_size, check_backend, compile_blocks
from lm_zoo.train.gradients import scale_gradients
from lm_zoo.train.guard import StepGuard
from lm_zoo.train.optim import Schedule, parameter_groups
from lm_zoo.train.optimizer import AdamWMuon
from lm_zoo.train.parallel import MeshStrategy, sequence_processes, shared_sequence, tensor_processes
from lm_zoo.train.tokenizers import vocabulary_size

VOCABULARY_MULTIPLE = 64  # output matrices of such sizes are quicker on GPUs
TOKENS = ("input_ids", "labels")  # what a batch has along time


class ZooModule(L.LightningModule):
    """A language model in training.

    Every target counts the same, whatever the batch, the accumulation and the number of processes: the gradient is that
    of the mean loss over all targets of the optimizer step.

    Args:
        preset: Name of a model in the zoo (see `ZooConfig.presets()`). Without one, `config` is all there is.
        config: Options of `ZooConfig`, on top of the preset's. vocab_size follows from the tokenizer unless given here.
        optimizer: adamw, or muon: Muon for the weight matrices of the blocks, AdamW for all else. One learning rate
            serves both.
        learning_rate: Peak learning rate.
        weight_decay: Of matrices; norms, biases, gate parameters and feature maps have none.
        betas: Of AdamW.
        schedule: cosine, linear, wsd (warm-up, stable, decay) or constant.
        warmup: Part of all steps over which the learning rate rises linearly.
        decay: Part of all steps over which wsd falls.
        final_learning_rate: Where the schedule ends, as a part of the peak.
        z_loss: Weight of the squared log of the softmax's denominator in the loss, for example 1e-4: it keeps the
            logits of long runs from drifting away. The training loss that is shown includes it.
        spike_threshold: A step is skipped if its loss exceeds the mean of the last 50 or so by more than this many
            standard deviations; null takes every step whose gradient is finite.
        most_skipped: So many skipped steps in a row end the run, with a report.
        gradient_checkpointing: Recompute blocks in the backward pass: less memory, about a third more time.
        compile: Backend of torch.compile for the blocks, as a rule inductor; by default they are not compiled.
    """

    def __init__(
        self,
        preset: str | None = None,
        config: dict[str, Any] | None = None,
        optimizer: Literal["adamw", "muon"] = "adamw",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine",
        warmup: float = 0.02,
        decay: float = 0.2,
        final_learning_rate: float = 0.1,
        z_loss: float = 0.0,
        spike_threshold: float | None = 6.0,
        most_skipped: int = 20,
        gradient_checkpointing: bool = False,
        compile: str | None = None,
    ) -> None:
        super().__init__()
        if preset is None and not config:
            raise UserError(f"no model: give --model.preset ({', '.join(ZooConfig.presets())}) or model.config")
        if learning_rate <= 0:
            raise UserError(f"model.learning_rate={learning_rate} must be above 0")
        for name, value in {"weight_decay": weight_decay, "z_loss": z_loss}.items():
            if value < 0:
                raise UserError(f"model.{name}={value} must not be negative")
        if optimizer not in ("adamw", "muon"):
            raise UserError(f"model.optimizer={optimizer} is not known; choose adamw or muon")
        if spike_threshold is not None and spike_threshold <= 0:
            raise UserError(f"model.spike_threshold={spike_threshold} must be above 0; null takes every step")
        if most_skipped < 1:
            raise UserError(f"model.most_skipped={most_skipped} is not possible; give at least 1")
        if compile is not None:
            check_backend(compile)
        self.preset, self.options = preset, dict(config or {})
        self.zoo_config()  # bad options are told before any data is read
        self.schedule = Schedule(schedule, warmup, decay, final_learning_rate)
        self.muon, self.weight_decay, self.z_loss = optimizer == "muon", weight_decay, z_loss
        self.optimizer_options = {"lr": learning_rate, "betas": tuple(betas)}
        self.guard = StepGuard(spike_threshold, most_skipped)
        self.gradient_checkpointing, self.backend = gradient_checkpointing, compile
        self.model: ZooForCausalLM | None = None
        self.step_metrics: dict[str, float | Tensor] = {}  # of the latest optimizer step, over all processes
        self._loss_sum: Tensor | float = 0.0  # these two of the micro-batches so far, in this process
        self._targets = 0

    def zoo_config(self, tokenizer: PreTrainedTokenizerBase | None = None) -> ZooConfig:
        """The model's configuration; a tokenizer gives it its special tokens and, unless set, its vocabulary size."""
        options = dict(self.options)
        if tokenizer is not None:
            needed = vocabulary_size(tokenizer)
            options.setdefault("vocab_size", math.ceil(needed / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)
            if options["vocab_size"] < needed:
                raise UserError(
                    f"the tokenizer has {needed:,} tokens, more than the model's vocab_size={options['vocab_size']:,}; "
                    "leave model.config.vocab_size out, or choose a smaller tokenizer"
                )
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                options.setdefault(name, getattr(tokenizer, name))
        return ZooConfig.preset(self.preset, **options) if self.preset else ZooConfig(**options)

    def setup(self, stage: str) -> None:
        self.tokenizer = self.trainer.datamodule.tokenizer
        self.config = self.zoo_config(self.tokenizer)

    def configure_model(self) -> None:
        if self.model is None:
            strategy = self.trainer.strategy
            if isinstance(strategy, MeshStrategy):
                self.model = strategy.new_model(self.config, self._prepare)
            else:
                self.model = ZooForCausalLM(self.config)
                self._prepare(self.model)

    def _prepare(self, model: ZooForCausalLM) -> None:
        """What is done to the blocks of a new model before they are sharded."""
        if self.gradient_checkpointing:  # transformers is giving the method a new name
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        if self.backend is not None:
            compile_blocks(model, self.backend, whole=sequence_processes(self.trainer) == 1)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """The mean loss over the batch's targets, in nats per token; its gradient is that of this process's tokens."""
        z_loss = self.z_loss if self.training else 0.0
        options = {"cu_seqlens": batch.get("cu_seqlens"), "z_loss": z_loss}
        if self.backend is not None:
            any_size(options["cu_seqlens"])
        with shared_sequence(self.trainer) as group:
            tokens = {name: batch[name] if group is None else group.segment(batch[name]) for name in TOKENS}
            return self.model(**tokens, **options).loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with shared_sequence(self.trainer):  # blocks that are checkpointed run again
            super().backward(loss, *args, **kwargs)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The sum of the losses, over the number of tokens, which is that of every batch.

        `configure_gradient_clipping` knows how many of the tokens of all batches were targets, and makes up for it.
        """
        total = self._sum_of_losses(batch)
        self._loss_sum = self._loss_sum + total.detach()
        self._targets += batch["num_targets"]
        self._batch_tokens = batch["input_ids"].numel()
        return total / self._batch_tokens

    def _sum_of_losses(self, batch: dict[str, Any]) -> Tensor:
        try:
            return self(batch) * batch["num_targets"]
        except ValueError as error:
            if "nan" not in str(error):
                raise
            # On a CPU, where looking is free, the ops refuse NaN. The loss is then NaN, as it is on a GPU.
            return sum(parameter.sum() for parameter in self.model.parameters()) * math.nan

    def on_validation_epoch_start(self) -> None:
        self._val_loss, self._val_targets = torch.zeros((), device=self.device), 0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._val_loss += self._sum_of_losses(batch).float()
        self._val_targets += batch["num_targets"]

    def on_validation_epoch_end(self) -> None:
        sums = torch.stack([self._val_loss, self._val_loss.new_tensor(self._val_targets)])
        total, targets = self.trainer.strategy.reduce(sums, reduce_op="sum")
        loss = total / targets
        bits_per_byte = loss / math.log(2) * self.trainer.datamodule.val_tokens_per_byte
        values = {"val_loss": loss, "val_bits_per_byte": bits_per_byte, "val_perplexity": loss.exp()}
        self.log_dict(values, logger=False, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        groups = parameter_groups(self.model, self.weight_decay, muon=self.muon)
        optimizer = AdamWMuon(groups, **self.optimizer_options)
        total_steps = self.trainer.max_steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule(step, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Weighs the gradients by the targets of the step, clips them by their norm, and decides on the step."""
        if gradient_clip_algorithm not in (None, "norm"):
            raise UserError(f"trainer.gradient_clip_algorithm={gradient_clip_algorithm} is not supported; leave it out")
        loss_sum, targets = self._sums_of_step()
        # What was accumulated is the mean over processes and micro-batches of (sum of losses / tokens of a batch).
        batches = self.trainer.accumulate_grad_batches * self.trainer.world_size / tensor_processes(self.trainer)
        weight = batches * self._batch_tokens / targets.clamp(min=1)
        norm = scale_gradients(list(self.model.parameters()), weight=weight, clip_norm=gradient_clip_val)
        optimizer.skip = self.guard.judge(loss_sum / targets.clamp(min=1), norm)
        self.step_metrics = {
            "loss_sum": loss_sum,
            "targets": targets,
            "skipped": optimizer.skip,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "gradient_norm": norm,
        }

    def _sums_of_step(self) -> tuple[Tensor, Tensor]:
        """Sum of losses and number of targets of all micro-batches and processes; both start anew.

        Processes that share sequences or matrices have the same numbers: each counts for its part of them.
        """
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        # `full` hands the number over with its launch; `tensor` would wait for the device.
        targets = torch.full((), self._targets, dtype=dtype, device=self.device)
        sums = torch.stack([self._loss_sum.to(dtype), targets])
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
            sums /= sequence_processes(self.trainer) * tensor_processes(self.trainer)
        self._loss_sum, self._targets = 0.0, 0
        return sums.unbind()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["zoo_config"] = self.config.to_dict()
        checkpoint["step_guard"] = self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_same_model(checkpoint, self.config)
        self.guard.load_state_dict(checkpoint["step_guard"])


def check_same_model(checkpoint: dict[str, Any], config: ZooConfig) -> None:
    now = config.to_dict()
    for name, before in checkpoint["zoo_config"].items():
        if now.get(name) != before:
            raise UserError(
                f"the checkpoint's model has {name}={before}, this one {now.get(name)}; "
                "resume with the options the run was started with"
            )

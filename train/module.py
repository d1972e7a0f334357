"""The Lightning module: a ZooForCausalLM, its loss and its optimizer."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerBase

from lm_zoo.config import ZooConfig
from lm_zoo.errors import UserError
from lm_zoo.model import ZooForCausalLM
from lm_zoo.train.optim import Schedule, adamw
from lm_zoo.train.tokenizers import vocabulary_size

VOCABULARY_MULTIPLE = 64  # output matrices of such sizes are quicker on GPUs


def diverged(step: int) -> UserError:
    return UserError(
        f"the loss is not finite after step {step}: lower model.learning_rate or raise model.warmup, "
        "then start anew, or resume from an earlier checkpoint"
    )


class ZooModule(L.LightningModule):
    """A language model in training.

    Args:
        preset: Name of a model in the zoo (see `ZooConfig.presets()`). Without one, `config` is all there is.
        config: Options of `ZooConfig`, on top of the preset's. vocab_size follows from the tokenizer unless given here.
        learning_rate: Peak learning rate.
        weight_decay: Of matrices; norms, biases and gate parameters have none.
        betas: Of AdamW.
        schedule: cosine, wsd (warm-up, stable, decay) or constant.
        warmup: Part of all steps over which the learning rate rises linearly.
        decay: Part of all steps over which wsd falls.
        final_learning_rate: Where the schedule ends, as a part of the peak.
        gradient_checkpointing: Recompute blocks in the backward pass: less memory, about a third more time.
    """

    def __init__(
        self,
        preset: str | None = None,
        config: dict[str, Any] | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        schedule: Literal["cosine", "wsd", "constant"] = "cosine",
        warmup: float = 0.02,
        decay: float = 0.2,
        final_learning_rate: float = 0.1,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if preset is None and not config:
            raise UserError(f"no model: give --model.preset ({', '.join(ZooConfig.presets())}) or model.config")
        if learning_rate <= 0:
            raise UserError(f"model.learning_rate={learning_rate} must be above 0")
        if weight_decay < 0:
            raise UserError(f"model.weight_decay={weight_decay} must not be negative")
        self.preset, self.options = preset, dict(config or {})
        self.zoo_config()  # bad options are told before any data is read
        self.schedule = Schedule(schedule, warmup, decay, final_learning_rate)
        self.optimizer_options = {"learning_rate": learning_rate, "weight_decay": weight_decay, "betas": tuple(betas)}
        self.gradient_checkpointing = gradient_checkpointing
        self.model: ZooForCausalLM | None = None
        self.step_metrics: dict[str, float | Tensor] = {}  # of the latest optimizer step

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
            self.model = ZooForCausalLM(self.config)
            if self.gradient_checkpointing:
                model = self.model  # transformers is giving the method a new name
                getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """The mean loss over the batch's targets, in nats per token."""
        return self.model(batch["input_ids"], labels=batch["labels"], cu_seqlens=batch.get("cu_seqlens")).loss

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        try:
            return self(batch)
        except ValueError as error:
            if "nan" not in str(error):
                raise
            raise diverged(self.global_step) from error  # on a CPU, where looking is free, the ops refuse NaN

    def on_validation_epoch_start(self) -> None:
        self._val_loss, self._val_targets = torch.zeros((), device=self.device), 0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._val_loss += self(batch).float() * batch["num_targets"]
        self._val_targets += batch["num_targets"]

    def on_validation_epoch_end(self) -> None:
        sums = torch.stack([self._val_loss, self._val_loss.new_tensor(self._val_targets)])
        total, targets = self.trainer.strategy.reduce(sums, reduce_op="sum")
        loss = total / targets
        bits_per_byte = loss / math.log(2) * self.trainer.datamodule.val_tokens_per_byte
        self.log_dict({"val_loss": loss, "val_bits_per_byte": bits_per_byte}, logger=False, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        # A fused step leaves no place between unscaling and stepping, where fp16 gradients have to be clipped.
        fused = self.trainer.precision not in ("16-mixed", "16-true")
        optimizer = adamw(self.model, fused=fused, **self.optimizer_options)
        total_steps = self.trainer.max_steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule(step, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the norm of all gradients together, and keeps the norm for the log."""
        if gradient_clip_algorithm not in (None, "norm"):
            raise UserError(f"trainer.gradient_clip_algorithm={gradient_clip_algorithm} is not supported; leave it out")
        norm = clip_grad_norm_(self.model.parameters(), gradient_clip_val or math.inf)
        self.step_metrics = {"learning_rate": optimizer.param_groups[0]["lr"], "gradient_norm": norm}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["zoo_config"] = self.config.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        now = self.config.to_dict()
        for name, before in checkpoint.get("zoo_config", {}).items():
            if now.get(name) != before:
                raise UserError(
                    f"the checkpoint's model has {name}={before}, this one {now.get(name)}; "
                    "resume with the options the run was started with"
                )

"""A training run, from Python or from the command line.

    from lm_zoo.train import TextData, ZooModule, fit

    fit(ZooModule("gla-tiny"), TextData("my.txt"), "runs/gla", max_steps=1000)

The run's folder then holds `model/` (a Hugging Face folder with its tokenizer), `metrics.csv`, `loss.png`,
`learning_rate.png`, `tensorboard/`, `checkpoints/` and, of its validations, `layers.csv` and `samples.txt`.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from lm_zoo.config import ZooConfig
from lm_zoo.errors import UserError, one_line
from lm_zoo.files import whole_folder
from lm_zoo.train.checkpoints import (
    Checkpoints,
    ForgetLater,
    WholeFolderIO,
    checkpoint_to_resume,
    find_checkpoints,
    lost_a_process,
    remove_leftovers,
)
from lm_zoo.train.compiled import lacks_compiler
from lm_zoo.train.data import TextData
from lm_zoo.train.layer_statistics import LayerStatistics
from lm_zoo.train.metrics import Metrics, MetricsFile
from lm_zoo.train.module import ZooModule, check_same_model
from lm_zoo.train.parallel import MeshStrategy, Parallel, data_process, full_weights, tensor_processes
from lm_zoo.train.plots import Plots
from lm_zoo.train.progress import StepProgress
from lm_zoo.train.quiet import quiet_libraries
from lm_zoo.train.samples import Samples
from lm_zoo.train.snapshot import load_tree
from lm_zoo.train.tensor_parallel import check_cuts, check_vocabulary, describe_cuts

TRAINER_DEFAULTS = {
    "max_epochs": -1,  # the data counts its own epochs: see TextData.epochs
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "val_check_interval": 200,
    "check_val_every_n_epoch": None,  # the interval counts batches over the whole run
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # the order of rows already knows its process
    "enable_model_summary": False,
    "inference_mode": False,  # as in the validations during training: a compiled block is compiled for one mode
}


def fit(
    module: ZooModule,
    data: TextData,
    out: str | Path,
    *,
    checkpoints: Checkpoints | None = None,
    parallel: Parallel | None = None,
    resume: str | Path | None = None,
    **trainer_options: Any,
) -> L.Trainer:
    """Trains `module` on `data` and leaves everything in the folder `out`. Takes all options of `lightning.Trainer`.

    `parallel` says what several processes share; by default, the batches alone. `resume` continues a run exactly where
    it stopped: a checkpoint, or "last" for the newest in `out`. UserError (a ValueError) for bad input; Interrupted
    after Ctrl-C or SIGTERM, when a checkpoint has been saved.
    """
    with quiet_libraries():
        options = {**TRAINER_DEFAULTS, **trainer_options}
        parts = trainer_parts(Path(out), options, checkpoints or Checkpoints(), parallel)
        return run_training(L.Trainer(**{**options, **parts}), module, data, resume)


def trainer_parts(
    out: Path, options: dict[str, Any], checkpoints: Checkpoints | None = None, parallel: Parallel | None = None
) -> dict[str, Any]:
    """What this package adds to a Trainer's options."""
    metrics = Metrics()
    watching = [metrics, LayerStatistics(out), Samples(out), Plots(out)]
    callbacks = [ForgetLater(), *_as_list(options.get("callbacks")), *watching, *_as_list(checkpoints)]
    if options.get("enable_progress_bar") is not False:
        callbacks.append(StepProgress(metrics))
    loggers = _as_list(options.get("logger"))
    return {
        "default_root_dir": str(out),
        "callbacks": callbacks,
        "logger": [*loggers, MetricsFile(out), TensorBoardLogger(out, name="", version="tensorboard")],
        "plugins": [*_as_list(options.get("plugins")), WholeFolderIO()],
        "strategy": (parallel or Parallel()).strategy(options.get("strategy", "auto")),
    }


def run_training(trainer: L.Trainer, module: ZooModule, data: TextData, resume: str | Path | None) -> L.Trainer:
    """Fits, validates at the end, and exports the model. What can be checked is checked before anything is written."""
    out = Path(trainer.default_root_dir)
    checkpoint = checkpoint_to_resume(resume, out) if resume else None
    check_run(trainer, out, checkpoint)
    if isinstance(trainer.strategy, MeshStrategy):
        trainer.strategy.parallel.check(trainer.world_size, trainer.num_nodes, data.seq_len)
        if tensor_processes(trainer) > 1:
            check_cuts(module.zoo_config(), tensor_processes(trainer))
            if module.backend is not None:
                raise UserError("model.compile and parallel.tensor do not go together; leave one of them out")
    data.trainer = trainer
    if trainer.is_global_zero:  # the other processes find the cache when Lightning lets them in
        data.prepare_data()
        data.setup()
        config = module.zoo_config(data.tokenizer)
        check_vocabulary(config, tensor_processes(trainer))
        if checkpoint is not None:
            check_same_model(load_tree(checkpoint, None), config)  # before other processes are started
        if trainer.progress_bar_callback is not None:
            describe(trainer, data, config)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        if len(data.val_rows) and not MetricsFile(out).has_validation(trainer.global_step):
            trainer.validate(module, datamodule=data, verbose=False)
    except SIGTERMException:  # in the validation at the end
        sys.exit(128 + signal.SIGTERM)
    except SystemExit as left:  # how Lightning answers a Ctrl-C that no checkpoint waits for
        raise KeyboardInterrupt from left
    except RuntimeError as error:
        if trainer.world_size > 1 and lost_a_process(error):
            raise UserError(
                f"process {trainer.global_rank} stops, because another of the run's {trainer.world_size} processes has "
                "ended; see what that one said, then continue with --resume last"
            ) from error
        if module.backend is not None and lacks_compiler(error):
            raise UserError(
                f"model.compile={module.backend} finds no C++ compiler, which it needs on a CPU; install one (g++), or "
                "leave model.compile out"
            ) from error
        raise
    weights = full_weights(trainer, module.model)  # of all processes
    if trainer.is_global_zero:
        remove_leftovers(out)  # ForgetLater has not come by in a run that was killed after its last step
        export(module, out / "model", weights)
    return trainer


def check_run(trainer: L.Trainer, out: Path, checkpoint: Path | None) -> None:
    if checkpoint is None and find_checkpoints(out / "checkpoints"):
        raise UserError(f"{out} already holds a run; continue it with --resume last, or choose another --out")


def describe(trainer: L.Trainer, data: TextData, config: ZooConfig) -> None:
    tokens_per_step = data.batch_size * data.seq_len * trainer.accumulate_grad_batches * data_process(trainer)[1]
    training, validation = (rows.selection.num_tokens for rows in (data.train_rows, data.val_rows))
    print(
        f"{training:,} tokens to train on, {validation:,} to validate on; "
        f"{data.count_steps():,} steps of {tokens_per_step:,} tokens",
        file=sys.stderr,
    )
    if tensor_processes(trainer) > 1:
        print(describe_cuts(config, tensor_processes(trainer)), file=sys.stderr)


def export(module: ZooModule, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """The model and its tokenizer as a Hugging Face folder; `weights` are those of a sharded model."""
    disable_progress_bar()  # of transformers: it would draw one for writing a single file
    try:
        with whole_folder(folder) as unfinished:
            module.model.save_pretrained(unfinished, state_dict=weights)
            module.tokenizer.save_pretrained(unfinished)
    except Exception as error:
        if "os error" not in str(error):  # what safetensors and tokenizers call a full disk
            raise
        raise UserError(
            f"cannot save {folder}: {one_line(error)}; the checkpoints are whole: free some space, then run the same "
            "again with --resume last"
        ) from error


def _as_list(value: Any) -> list:
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]

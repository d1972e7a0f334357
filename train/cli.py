"""`lm-zoo train --config FILE [--any.option value]`: LightningCLI over the data module, the module and the Trainer."""

from __future__ import annotations

import importlib.resources
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lm_zoo.errors import UserError, one_line
from lm_zoo.files import whole_file
from lm_zoo.train.checkpoints import Checkpoints, Interrupted
from lm_zoo.train.data import TextData
from lm_zoo.train.module import ZooModule
from lm_zoo.train.parallel import Parallel
from lm_zoo.train.quiet import quiet_libraries
from lm_zoo.train.run import TRAINER_DEFAULTS, run_training, trainer_parts


def run(argv: list[str]) -> None:
    """Trains as the arguments say. UserError for bad ones; exits with 130 or 143 after Ctrl-C or SIGTERM."""
    with quiet_libraries():
        cli = TrainCLI(args=find_configs(argv))
        try:
            run_training(cli.trainer, cli.model, cli.datamodule, cli.config.resume)
        except Interrupted as interrupted:
            if cli.trainer.is_global_zero:
                step = interrupted.checkpoint.stem
                print(f"stopped at {step}; the same command with --resume last continues it", file=sys.stderr)
            sys.exit(128 + interrupted.signum)
        except MisconfigurationException as error:
            raise UserError(one_line(error)) from error
        if cli.trainer.is_global_zero:
            print(f"the trained model is in {Path(cli.config.out) / 'model'}")


class Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split())
        message = re.sub(r'Parser key "([\w.]+)":', r"\1:", message)  # its own words for a wrong type, made plainer
        message = re.sub(r"Expected an? <class '(\w+)'>\. Got value:", r"expected \1, got", message)
        message = re.sub(r"Expected an? typing\.Literal\[(.*?)\]\. Got value:", r"expected one of \1, got", message)
        raise UserError(f"{message}; see `lm-zoo train --help`") from ex


class TrainCLI(LightningCLI):
    def __init__(self, args: list[str]) -> None:
        super().__init__(
            ZooModule,
            TextData,
            args=args,
            run=False,
            parser_class=Parser,
            parser_kwargs={
                "prog": "lm-zoo train",
                "usage": "lm-zoo train --config FILE [--any.option value]",
                "description": "Trains a language model as a YAML file says; options go over the file.",
            },
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            save_config_callback=None,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", default="runs/default", help="The run's folder: all output goes there.")
        parser.add_argument(
            "--resume", type=str | None, default=None, help="Continue a run: `last` or the path of a checkpoint."
        )
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_class_arguments(Parallel, "parallel")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        self.config = parser.parse_args(args)  # without the base class's warning that sys.argv exists
        for group in ("trainer", "model", "data", "checkpoint", "parallel"):
            if not isinstance(self.config[group], Namespace):
                raise UserError(f"{group}: expected options and their values, got {self.config[group]!r}")

    def instantiate_trainer(self, **options: Any) -> L.Trainer:
        if self.config.trainer.default_root_dir is not None:
            raise UserError("trainer.default_root_dir is not used here; give --out instead")
        made = self.config_init
        parts = trainer_parts(Path(self.config.out), vars(made.trainer), made.checkpoint, made.parallel)
        parts["callbacks"].append(SaveConfig(self.parser, self.config, Path(self.config.out)))
        try:
            return L.Trainer(**{**vars(self.config_init.trainer), **parts, **options})
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise UserError(f"trainer: {one_line(error)}") from error


class SaveConfig(L.Callback):
    """Writes `config.yaml` when training starts: `--config` with it gives the same run."""

    def __init__(self, parser: LightningArgumentParser, config: Any, out: Path) -> None:
        config = config.clone()
        config.resume = None
        self._text = parser.dump(config, skip_unset=False)
        self._path = out / "config.yaml"

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        with whole_file(self._path) as unfinished:
            unfinished.write_text(self._text, encoding="utf-8")


def find_configs(argv: list[str]) -> list[str]:
    """The arguments, with names of the recipes that are installed with the package turned into their paths."""
    argv = list(argv)
    for i, argument in enumerate(argv):
        option, separator, name = argument.partition("=")
        if option in ("--config", "-c") and separator:
            argv[i] = f"{option}={_find_config(name)}"
        elif option in ("--config", "-c") and i + 1 < len(argv):
            argv[i + 1] = str(_find_config(argv[i + 1]))
    return argv


def _find_config(name: str) -> Path:
    recipes = Path(str(importlib.resources.files("lm_zoo.configs") / "train"))
    path = Path(name) if Path(name).is_file() else recipes / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in recipes.iterdir()))
        raise UserError(f"--config {name}: no such file; give a YAML file, or one of the recipes: {known}")
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--config {name} is not text: give a YAML file") from error
    return path

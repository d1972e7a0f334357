"""The data module: text in, packed batches out. Its parts: sources -> corpus -> packing -> order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from torch.utils.data import BatchSampler, DataLoader
from transformers import PreTrainedTokenizerBase

from lm_zoo.errors import UserError
from lm_zoo.train.corpus import Corpus, tokenise
from lm_zoo.train.curriculum import Curriculum
from lm_zoo.train.mixture import MixedOrder, MixedRows
from lm_zoo.train.order import RowLoader, RowOrder
from lm_zoo.train.packing import Rows, Selection, collate_documents, collate_rows, hold_out
from lm_zoo.train.parallel import data_process
from lm_zoo.train.prepare import prepared_tokenizer, tokenizer_hash
from lm_zoo.train.sources import Source, Table, file_source, find_files
from lm_zoo.train.tokenizers import SMALLEST_BPE
from lm_zoo.train.trained_tokenizer import text_tokenizer


class TextData(L.LightningDataModule):
    """Text, tokenised once and packed into rows of `seq_len` tokens.

    Args:
        files: Text, JSON-lines or parquet files to train on: paths, globs, URLs, or @FILE with one path per line.
        dataset: Instead of files: a `datasets` name or folder.
        prepared: Instead of both: a folder that `lm-zoo data prepare` made, or a list of them, which are mixed.
        weights: Of each prepared folder in the mixture; by default, they count by their size.
        config: Configuration of `dataset`, for example sample-10BT.
        split: Split of `dataset` to train on.
        text_column: Column that holds the text, for JSON lines, parquet and `dataset`.
        separator: What stands between documents of a text file. By default each text file is one document.
        streaming: Read JSON lines, parquet or `dataset` as a stream, up to `max_tokens`, without a full download.
        max_tokens: Train on at most so many tokens of the source.
        val_files: Files to validate on. By default, `val_fraction` of the training text is held out.
        val_split: Split of `dataset` to validate on.
        val_fraction: Part of the training documents that is held out, chosen by a hash of the document (the end of the
            text if there are fewer than 100 documents). 0 trains without validation.
        tokenizer: bytes, bpe (trained on the training text), or a Hugging Face tokenizer by name or folder. By default
            bytes, or the one that the text was prepared with.
        vocab_size: Size of the vocabulary that `bpe` learns.
        seq_len: Tokens per row.
        batch_size: Rows per batch and process, or per batch and group of processes that share sequences.
        respect_documents: Nothing is read across document borders, as when the model is used: every document starts
            from an empty state. False feeds plain [batch_size, seq_len] rows, where a model sees the text before.
        curriculum_steps: How many optimizer steps of a curriculum the run starts with; it needs one of the next two.
        first_seq_len: Documents are cut after so many tokens at first; the length doubles in equal stages up to
            seq_len. A batch has as many tokens as ever.
        short_documents_first: The rows of the curriculum come in the order of their longest document.
        epochs: Passes over the data; 1 unless trainer.max_steps is given, which repeats the data as often as it takes.
        seed: Seed of the order of rows.
        cache_dir: Where tokenised text is kept. By default ~/.cache/lm_zoo.
        num_proc: Processes that tokenise. By default one per core.
        num_workers: Processes that load batches. 0 suits memory-mapped rows; give a few for a fast GPU.
    """

    def __init__(
        self,
        files: str | list[str] | None = None,
        dataset: str | None = None,
        prepared: str | list[str] | None = None,
        weights: list[float] | None = None,
        config: str | None = None,
        split: str = "train",
        text_column: str = "text",
        separator: str | None = None,
        streaming: bool = False,
        max_tokens: int | None = None,
        val_files: str | list[str] | None = None,
        val_split: str | None = None,
        val_fraction: float = 0.05,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        seq_len: int = 256,
        batch_size: int = 16,
        respect_documents: bool = True,
        curriculum_steps: int | None = None,
        first_seq_len: int | None = None,
        short_documents_first: bool = False,
        epochs: float | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
        num_proc: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        prepared = [prepared] if isinstance(prepared, str) else list(prepared or [])
        _check_choices(files, dataset, prepared, val_files, val_split)
        _check_weights(prepared, weights, curriculum_steps)
        _check_at_least(0, seed=seed, num_workers=num_workers)
        _check_at_least(1, max_tokens=max_tokens, batch_size=batch_size, num_proc=num_proc)
        _check_at_least(1, curriculum_steps=curriculum_steps)
        _check_at_least(2, seq_len=seq_len, first_seq_len=first_seq_len)
        _check_curriculum(curriculum_steps, first_seq_len, short_documents_first, seq_len, respect_documents)
        _check_at_least(SMALLEST_BPE, vocab_size=vocab_size)
        if not 0 <= val_fraction < 1:
            raise UserError(f"data.val_fraction={val_fraction} is not possible; give a fraction from 0 to below 1")
        if epochs is not None and epochs <= 0:
            raise UserError(f"data.epochs={epochs} is not possible; give a number above 0")
        options = {"text_column": text_column, "streaming": streaming}

        def source(names: str | list[str] | None, split: str) -> Source:
            if names is None:
                return Table(dataset, config=config, split=split, **options)
            names = [names] if isinstance(names, str) else names
            return file_source(find_files(names), separator=separator or None, **options)

        self.source = None if prepared else source(files, split)
        self.prepared, self.weights = [Path(folder) for folder in prepared], weights
        self.val_source = source(val_files, val_split) if val_files or val_split else None
        self.max_tokens, self.val_fraction = max_tokens, 0.0 if self.val_source else val_fraction
        self.tokenizer_name, self.vocab_size = tokenizer, vocab_size
        self.seq_len, self.batch_size, self.respect_documents = seq_len, batch_size, respect_documents
        self.curriculum_steps, self.first_seq_len = curriculum_steps, first_seq_len
        self.short_documents_first = short_documents_first
        self.epochs, self.seed, self.num_proc, self.num_workers = epochs, seed, num_proc, num_workers
        self.cache_dir = Path(cache_dir or Path.home() / ".cache" / "lm_zoo").expanduser().absolute()
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.train_rows: Rows | None = None
        self.val_rows: Rows | None = None

    @property
    def train_tokens_per_byte(self) -> float:
        """Tokens of the training text, its end-of-text tokens included, per byte of UTF-8."""
        return self.train_rows.selection.tokens_per_byte

    @property
    def val_tokens_per_byte(self) -> float:
        """The same of the validation text."""
        return self.val_rows.selection.tokens_per_byte

    def prepare_data(self) -> None:
        """Tokenises, once per machine; the other processes wait and then find the cache."""
        self.tokenizer = self._load_tokenizer()
        if self.source is not None:
            self._tokenise(self.source)
        if self.val_source is not None:
            self._tokenise(self.val_source)

    def setup(self, stage: str | None = None) -> None:
        if self.train_rows is None:
            self.tokenizer = self.tokenizer or self._load_tokenizer()
            corpora = [Corpus(folder) for folder in self.prepared or [self._tokenise(self.source)]]
            training, validation = zip(*(hold_out(corpus, self.val_fraction) for corpus in corpora), strict=True)
            if self.val_source is not None:
                validation = [Selection.all_of(Corpus(self._tokenise(self.val_source)))]
            self.train_rows = self._rows(training, self.max_tokens)
            self.val_rows = self._rows(validation)
            self._check_rows()
        if stage == "fit":
            self._settle_length()

    def count_steps(self) -> int:
        """Optimizer steps of the run: trainer.max_steps, or so many epochs."""
        trainer = self.trainer
        if trainer.max_epochs not in (None, -1):
            raise UserError(f"trainer.max_epochs={trainer.max_epochs} is not used here; give data.epochs instead")
        if trainer.max_steps > 0:
            if self.epochs is not None:
                raise UserError("data.epochs and trainer.max_steps both say how long to train; give one of them")
            return trainer.max_steps
        rows_per_step = self.batch_size * self._process["world_size"] * trainer.accumulate_grad_batches
        steps = int((self.epochs or 1) * len(self.train_rows) / rows_per_step)
        if steps == 0:
            raise UserError(
                f"the {len(self.train_rows)} rows of the training text are less than one step of {rows_per_step} rows; "
                "give more text, raise data.epochs, or lower data.batch_size"
            )
        return steps

    def train_dataloader(self) -> RowLoader:
        options = {"seed": self.seed, **self._process}
        if isinstance(self.train_rows, MixedRows):
            order = MixedOrder(self.train_rows.lengths, self.batch_size, weights=self.weights, **options)
        else:
            order = RowOrder(len(self.train_rows), self.batch_size, curriculum=self._curriculum(), **options)
        num_batches = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return RowLoader(self.train_rows, order, num_batches, **self._loader_options)

    def _curriculum(self) -> Curriculum | None:
        if self.curriculum_steps is None:
            return None
        return Curriculum(
            self.curriculum_steps,
            self.trainer.accumulate_grad_batches,
            self.seq_len,
            self.first_seq_len,
            self.train_rows.longest if self.short_documents_first else None,
        )

    def val_dataloader(self) -> DataLoader:
        rank, world_size = self._process["rank"], self._process["world_size"]
        mine = range(rank, len(self.val_rows) // world_size * world_size, world_size)  # as many in every process
        return DataLoader(
            self.val_rows, batch_sampler=BatchSampler(mine, self.batch_size, drop_last=False), **self._loader_options
        )

    def state_dict(self) -> dict[str, object]:
        """What the order of the data depends on: a resumed run must agree."""
        corpus = self.train_rows.selection
        return {
            "tokenizer": tokenizer_hash(self.tokenizer)[:12],
            "rows of text": len(self.train_rows),
            "tokens of text": corpus.num_tokens,
            "data.weights": self.weights,
            "data.seq_len": self.seq_len,
            "data.batch_size times the processes with rows of their own": self.batch_size * self._process["world_size"],
            "data.seed": self.seed,
            "data.curriculum_steps": self.curriculum_steps,
            "data.first_seq_len": self.first_seq_len,
            "data.short_documents_first": self.short_documents_first,
            "trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        for name, now in self.state_dict().items():
            if state[name] != now:
                raise UserError(
                    f"the checkpoint was made with {name} = {state[name]}, now it is {now}, so the data would not "
                    "continue where it stopped; use the same, or start a new run"
                )

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.prepared:
            tokenizers = [prepared_tokenizer(folder, self.tokenizer_name) for folder in self.prepared]
            for folder, tokenizer in zip(self.prepared, tokenizers, strict=True):
                if tokenizer_hash(tokenizer) != tokenizer_hash(tokenizers[0]):
                    raise UserError(f"{folder} and {self.prepared[0]} were prepared with different tokenizers")
            return tokenizers[0]
        return text_tokenizer(self.tokenizer_name or "bytes", self.source, self.vocab_size, self.cache_dir)

    def _tokenise(self, source: Source) -> Path:
        return tokenise(source, self.tokenizer, self.cache_dir, max_tokens=self.max_tokens, num_proc=self.num_proc)

    def _rows(self, selections: Sequence[Selection], max_tokens: int | None = None) -> Rows | MixedRows:
        rows = [Rows(selection, self.seq_len, max_tokens) for selection in selections]
        return rows[0] if len(rows) == 1 else MixedRows(rows)

    def _check_rows(self) -> None:
        rows, needed = len(self.train_rows), self.batch_size * self._process["world_size"]
        selection = self.train_rows.selection
        if rows == 0 and len(selection.corpus) >= self.seq_len:
            raise UserError("the text is too short to hold a part of it out; set data.val_fraction to 0")
        if rows < needed:
            tokens, short = (len(selection.corpus), "one row") if rows == 0 else (selection.num_tokens, "one batch")
            size = "" if rows == 0 else f"of {needed} rows "
            raise UserError(
                f"the training text has {tokens:,} tokens, less than {short} {size}of data.seq_len={self.seq_len}; "
                "give more text, or lower data.seq_len or data.batch_size"
            )
        if (self.val_source or self.val_fraction) and not len(self.val_rows):
            held_out = "" if self.val_source else f" held out by data.val_fraction={self.val_fraction}"
            remedy = "give more text" if self.val_source else "raise it, give data.val_files"
            raise UserError(
                f"the validation text{held_out} has {self.val_rows.selection.num_tokens:,} tokens, less than one row "
                f"of data.seq_len={self.seq_len}; {remedy}, or lower data.seq_len"
            )

    def _settle_length(self) -> None:
        """To the Trainer, the run is one epoch of max_steps steps. Validations, too, stand at step borders."""
        trainer = self.trainer
        trainer.fit_loop.epoch_loop.max_steps = self.count_steps()
        if isinstance(trainer.val_check_interval, int):
            accumulated = trainer.accumulate_grad_batches
            trainer.val_check_interval = math.ceil(trainer.val_check_interval / accumulated) * accumulated
        if not len(self.val_rows):
            trainer.limit_val_batches = 0

    @property
    def _process(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return dict(zip(("rank", "world_size"), data_process(self.trainer), strict=True))

    @property
    def _loader_options(self) -> dict:
        return {
            "collate_fn": collate_documents if self.respect_documents else collate_rows,
            "num_workers": self.num_workers,
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        }


def _check_choices(files, dataset, prepared, val_files, val_split) -> None:
    given = [name for name, value in [("files", files), ("dataset", dataset), ("prepared", prepared)] if value]
    if not given:
        raise UserError("no training text: give --data.files FILE, --data.dataset NAME, or --data.prepared FOLDER")
    if len(given) > 1:
        raise UserError(f"data.{given[0]} and data.{given[1]} are both given; give one of them (null for a recipe's)")
    if val_files and val_split:
        raise UserError("data.val_files and data.val_split are both given; give one of them")
    if val_split and not dataset:
        raise UserError("data.val_split needs data.dataset; give data.val_files to validate on files")


def _check_weights(prepared, weights, curriculum_steps) -> None:
    if weights is not None and len(weights) != len(prepared):
        raise UserError(f"data.weights has {len(weights)} numbers for {len(prepared)} folders of data.prepared")
    if weights is not None and not all(0 < weight < math.inf for weight in weights):
        raise UserError(f"data.weights={weights} is not possible; give numbers above 0")
    if len(prepared) > 1 and curriculum_steps is not None:
        raise UserError("data.curriculum_steps orders one text, not a mixture of several; leave it out")


def _check_curriculum(steps, first_seq_len, short_documents_first, seq_len, respect_documents) -> None:
    if (steps is None) != (first_seq_len is None and not short_documents_first):
        raise UserError("data.curriculum_steps goes with data.first_seq_len or data.short_documents_first; give both")
    if first_seq_len is not None and first_seq_len >= seq_len:
        raise UserError(f"data.first_seq_len={first_seq_len} must be less than data.seq_len={seq_len}")
    if first_seq_len is not None and not respect_documents:
        raise UserError("data.first_seq_len cuts documents, which data.respect_documents=false does not see; drop one")


def _check_at_least(low: int, **options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < low:
            raise UserError(f"data.{name}={value} is not possible; give at least {low}")

"""Memory and speed of `lm-zoo data prepare`, and of reading what it made, with synthetic text of any size.

    python scripts/bench_prepare.py /tmp/corpus --gigabytes 10 --json docs/bench_prepare.json

The text is drawn from a seed: 50,000 words as frequent as Zipf's law has it, in documents of very different lengths. It
is prepared by the command, then its batches are read in random order through the data module, as `lm-zoo train` does.
Five times a second the memory of these processes is looked at: PSS, in which a page that several processes share counts
once, with the pages of mapped files; and the part of it that belongs to no file. The folder is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lm_zoo.eval.report import write_json

GB = 10**9
FILE_BYTES = GB
WORDS, DRAWN = 50_000, 2**20
SEPARATOR = "\n\n"


# ---- the text -----------------------------------------------------------------------------------------------------


def write_corpus(folder: Path, size: int, seed: int) -> None:
    """Files of 1 GB with `size` bytes in all, but for a document."""
    generator = np.random.Generator(np.random.PCG64(seed))
    letters = np.array(list("etaoinshrdlcumwfgypbvkjxqz"))
    weights = 1 / np.arange(1, 27)
    lengths = generator.integers(2, 12, WORDS)
    spelled = generator.choice(letters, (WORDS, 12), p=weights / weights.sum())
    words = ["".join(row[:n]) for row, n in zip(spelled, lengths, strict=True)]
    frequency = 1 / np.arange(1, WORDS + 1)
    drawn = np.array(words, dtype=object)[generator.choice(WORDS, DRAWN, p=frequency / frequency.sum())]
    left = size
    for number in range(-(-size // FILE_BYTES)):
        with (folder / f"{number:04d}.txt").open("wb") as file:
            room = min(left, FILE_BYTES)
            left -= room
            while file.tell() < room:
                count = int(generator.lognormal(6, 1)) + 1  # 400 words in the middle, 10,000 at times
                text = drawn[generator.integers(0, DRAWN, count)].tolist()
                text[::20] = [word.capitalize() + "." for word in text[::20]]
                file.write(" ".join(text).encode() + SEPARATOR.encode())


# ---- memory -------------------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """In bytes, of a process and all that it started."""

    most: int = 0  # PSS
    most_without_files: int = 0


class Watch(threading.Thread):
    """Looks at a process five times a second until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.memory = pid, Memory()
        self.start()

    def run(self) -> None:
        while Path(f"/proc/{self.pid}").exists():
            parts = [memory_of(pid) for pid in with_children(self.pid)]
            total, own = (sum(part) for part in zip(*parts, strict=True)) if parts else (0, 0)
            self.memory.most = max(self.memory.most, total)
            self.memory.most_without_files = max(self.memory.most_without_files, own)
            time.sleep(0.2)


def with_children(pid: int) -> list[int]:
    try:
        children = [
            int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
        ]
    except OSError:  # it has ended
        return []
    return [pid, *(inner for child in children for inner in with_children(child))]


def memory_of(pid: int) -> tuple[int, int]:
    """PSS, and that of pages that belong to no file."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    found = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":", 1) for line in lines)}
    return found.get("Pss", 0), found.get("Pss_Anon", 0)


# ---- what is measured ---------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    seconds: float
    megabytes_per_second: float
    memory: Memory


@dataclass
class Read:
    rows: int
    all_rows: int
    seconds: float
    tokens_per_second: float
    without_files: list[int]  # after a tenth of the rows, two tenths, and so on
    before: int  # of these, what the libraries take
    memory: Memory


def prepare(folder: Path, arguments: argparse.Namespace) -> Prepared:
    command = [sys.executable, "-m", "lm_zoo.cli", "data", "prepare", "--files", str(folder / "text" / "*.txt")]
    command += ["--separator", SEPARATOR, "--tokenizer", arguments.tokenizer, "--out", str(folder / "tokens")]
    command += ["--vocab-size", str(arguments.vocab_size), "--workers", str(arguments.workers)]
    start = time.monotonic()
    process = subprocess.Popen(command)
    watch = Watch(process.pid)
    if process.wait():
        sys.exit(process.returncode)
    seconds = time.monotonic() - start
    return Prepared(seconds, arguments.gigabytes * GB / 1e6 / seconds, watch.memory)


def read(folder: Path, arguments: argparse.Namespace) -> Read:
    """In a new process, which starts with nothing in memory."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    options = (folder / "tokens", arguments.rows, arguments.seq_len, arguments.batch_size, results.put)
    process = context.Process(target=read_batches, args=options)
    process.start()
    watch = Watch(process.pid)
    found = results.get()
    process.join()
    return Read(**found, memory=watch.memory)


def read_batches(tokens: Path, rows: int, seq_len: int, batch_size: int, report: Callable[[dict], None]) -> None:
    """The training batches of a run, one after the other."""
    from lightning import Trainer

    from lm_zoo.train import TextData
    from lm_zoo.train.run import TRAINER_DEFAULTS

    before = memory_of_self()
    data = TextData(prepared=str(tokens), seq_len=seq_len, batch_size=batch_size)
    steps = rows // batch_size
    data.trainer = Trainer(**{**TRAINER_DEFAULTS, "max_steps": steps}, logger=False, enable_checkpointing=False)
    data.prepare_data()
    data.setup("fit")
    memory, start = [], time.monotonic()
    for step, _ in enumerate(data.train_dataloader(), start=1):
        if step * 10 // steps > len(memory):
            memory.append(memory_of_self())
        if step == steps:
            break
    seconds = time.monotonic() - start
    found = {"rows": steps * batch_size, "all_rows": len(data.train_rows), "seconds": seconds}
    speed = found["rows"] * seq_len / seconds
    report(found | {"tokens_per_second": speed, "without_files": memory, "before": before})


def memory_of_self() -> int:
    return memory_of(os.getpid())[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for text and tokens, about twice as large; must not exist")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of text (10^9 bytes)")
    parser.add_argument("--seed", type=int, default=0, help="of the text")
    parser.add_argument("--tokenizer", default="bpe", help="as lm-zoo data prepare takes it")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="that bpe learns")
    parser.add_argument("--workers", type=int, default=2, help="processes that tokenise")
    parser.add_argument("--rows", type=int, default=1_000_000, help="that are read, in random order")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a batch")
    parser.add_argument("--json", type=Path, help="also write what was found to this file")
    arguments = parser.parse_args()
    size = int(arguments.gigabytes * GB)
    parent = arguments.folder.absolute().parent
    if arguments.folder.exists() or not parent.is_dir():
        parser.error(f"{arguments.folder} must not exist, and the folder that it is in must")
    if shutil.disk_usage(parent).free < 3.5 * size:
        parser.error(f"{parent} has not the space of 3.5 times the text")
    text = arguments.folder / "text"
    text.mkdir(parents=True)
    try:
        write_corpus(text, size, arguments.seed)
        prepared = prepare(arguments.folder, arguments)
        counts = json.loads((arguments.folder / "tokens" / "manifest.json").read_text())["counts"]
        found = read(arguments.folder, arguments)
    finally:
        shutil.rmtree(arguments.folder)
    print(
        f"prepared {counts['text_bytes'] / GB:.2f} GB, {counts['tokens']:,} tokens, in {prepared.seconds:,.0f} s "
        f"({prepared.megabytes_per_second:.1f} MB/s) within {prepared.memory.most / GB:.2f} GB; read {found.rows:,} of "
        f"{found.all_rows:,} rows ({found.tokens_per_second:,.0f} tokens/s) within {found.memory.most / GB:.2f} GB, "
        f"{found.memory.most_without_files / GB:.2f} GB without the mapped files"
    )
    if arguments.json:
        options = {name: value for name, value in vars(arguments).items() if name not in ("folder", "json")}
        write_json(arguments.json, options | {"text": counts, "prepare": asdict(prepared), "read": asdict(found)})


if __name__ == "__main__":
    main()

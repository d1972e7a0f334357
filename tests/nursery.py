"""Runs `lm-zoo train` again and again in processes that are killed: `python nursery.py FOLDER KILLS SEED RANKS`.

Everything is imported once and each attempt is a fork, so that an attempt takes about a second. Half of the kills come
from outside after a random time, the others from within, just before a random file is opened, renamed or removed: that
way many of them hit a checkpoint being written. Of several processes, which share the parameters, one is killed.
Prints what it did, as JSON.
"""

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

OPTIONS = [
    "--data.files", "text.txt", "--data.cache_dir", "cache", "--data.val_fraction", "0.1", "--data.seq_len", "16",
    "--data.batch_size", "2", "--data.max_tokens", "640", "--model.config",
    "{hidden_size: 16, num_hidden_layers: 1, intermediate_size: 32, mixers: {gla: {num_heads: 1, gate_rank: 4}}}",
    "--trainer.max_steps", "30", "--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "10",
    "--trainer.limit_val_batches", "2", "--trainer.log_every_n_steps", "3", "--trainer.accelerator", "cpu",
    "--checkpoint.every_n_steps", "2",
]  # fmt: skip
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# They were done, say that a process is lost, stop with it, or wait for one that died before they met.
ENDS_OF_OTHERS = {0, 2, 128 + signal.SIGTERM, -signal.SIGKILL}
WITHOUT_REAPING = os.WEXITED | os.WNOHANG | os.WNOWAIT
PATIENCE = 10  # seconds after which those who wait are ended, as a launcher does at once


def kill_before_event(number: int) -> None:
    """Kills this process at the n-th thing that happens to a file of its run."""
    left = number

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in EVENTS and f"{os.sep}run" in os.path.abspath(str(arguments[0])):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def attempt(out: str, resume: bool, ranks: int, event: int | None = None, victim: int = 0) -> list[int]:
    """Forks the processes of a run that trains, and returns their ids; one of them dies at the event."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(ranks):
        found.append(os.fork())
        if not found[-1]:
            if ranks > 1:  # what torchrun sets
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
            sharing = [] if ranks == 1 else ["--parallel.shard", "full", "--trainer.devices", str(ranks)]
            train(out, [*sharing, *(["--resume", "last"] if resume else [])], event if rank == victim else None)
    return found


def train(out: str, options: list[str], event: int | None) -> NoReturn:
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from lm_zoo.cli import main

    if event:
        kill_before_event(event)
    code = 70
    try:
        code = main(["train", *OPTIONS, "--out", out, *options])
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(processes: list[int], first: int = 0) -> list[int]:
    """Exit codes. What is left a while after process number `first` has ended is killed."""
    codes: dict[int, int] = {}
    end = None
    for i in [first, *(i for i in range(len(processes)) if i != first)]:
        while end is not None and time.monotonic() < end and not os.waitid(os.P_PID, processes[i], WITHOUT_REAPING):
            time.sleep(0.05)
        if end is not None and time.monotonic() >= end:
            os.kill(processes[i], signal.SIGKILL)
        codes[i] = os.waitstatus_to_exitcode(os.waitpid(processes[i], 0)[1])
        end = end or time.monotonic() + PATIENCE
    return [codes[i] for i in range(len(processes))]


def checkpoints(out: str) -> list[str]:
    return sorted(path.name for path in Path(out, "checkpoints").glob("step-*"))


def main(kills: int, seed: int, ranks: int) -> dict:
    choose = random.Random(seed)
    start = time.monotonic()
    assert wait(attempt("whole", False, ranks)) == [0] * ranks, Path("whole.log").read_text()
    seconds = time.monotonic() - start
    ends: list = []
    while len(ends) < kills:
        event = choose.randint(1, 120) if choose.random() < 0.5 else None
        victim = choose.randrange(ranks)
        processes = attempt("run", bool(checkpoints("run")), ranks, event, victim)
        signum = choose.choice(SIGNALS) if event is None else signal.SIGKILL
        if event is None:
            time.sleep(choose.uniform(0.1, 0.6) * seconds)
            os.kill(processes[victim], signum)
        codes = wait(processes, victim)
        code = codes.pop(victim)
        if code == 0:  # it was quicker than the kill: another run
            compare()
            os.rename("run", f"done-{len(list(Path().glob('done-*')))}")
            continue
        assert code in (-signum, 128 + signum), f"{code} after {signum}\n{Path('run.log').read_text()}"
        assert set(codes) <= ENDS_OF_OTHERS, Path("run.log").read_text()
        ends.append({"event": event, "code": code, "others": codes, "left": checkpoints("run")})
    codes = wait(attempt("run", bool(checkpoints("run")), ranks))
    assert codes == [0] * ranks, Path("run.log").read_text()
    compare()
    return {"seed": seed, "ends": ends}


def compare() -> None:
    from lm_zoo.train.metrics import read_metrics

    names = ("step", "tokens", "train_loss", "val_loss", "val_bits_per_byte", "learning_rate", "gradient_norm")
    curves = [[[line[n] for n in names] for line in read_metrics(Path(out, "metrics.csv"))] for out in ("whole", "run")]
    assert curves[0] == curves[1], f"{curves[0]}\n{curves[1]}"
    weights = [Path(out, "model", "model.safetensors").read_bytes() for out in ("whole", "run")]
    assert weights[0] == weights[1]
    left = [path for out in ("run", "run/checkpoints") for path in Path(out).iterdir() if path.name.endswith(".tmp")]
    assert not left, left


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    import lm_zoo.train.cli  # noqa: F401

    print(json.dumps(main(*map(int, sys.argv[2:]))))

"""`lm-zoo linearize`: options, estimates, and one line for everything that can be wrong."""

import json
import re
from pathlib import Path

import pytest
import torch
from linearize_fixtures import byte_teacher, tokenizer, write_text
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from lm_zoo.cli import main


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    """With a teacher and a text in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    byte_teacher().save_pretrained("teacher")
    tokenizer().save_pretrained("teacher")
    write_text(Path("text.txt"))


FEW = [
    "--output", "out", "--cache-dir", "cache", "--window", "4", "--transfer-tokens", "300", "--transfer-length", "32",
    "--recover-tokens", "300", "--recover-length", "32",
]  # fmt: skip


def test_the_command(capsys) -> None:
    options = [
        "--keep-layers=0,-1",
        "--set",
        "options.window_kind=sliding",
        "--set",
        "recover.kl=1",
        "--recover-lr=0.1",
    ]
    assert main(["linearize", "teacher", "--text", "text.txt", *FEW, *options]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("perplexity on ")
    assert captured.out.endswith("the student and its report are in out\n")
    assert "transfer, step 0 of 2: held out" in captured.err
    spec = json.loads(Path("out/report.json").read_text())["spec"]
    assert spec["keep_layers"] == [0, 2]
    assert spec["options"] == {"feature_map": "hedgehog", "window": 4, "window_kind": "sliding"}
    assert (spec["recover"]["kl"], spec["recover"]["learning_rate"], spec["transfer"]["length"]) == (1, 0.1, 32)


def test_stages_can_be_left_out() -> None:
    assert main(["linearize", "teacher", "--text", "text.txt", *FEW, "--no-transfer", "--no-recover"]) == 0
    assert json.loads(Path("out/report.json").read_text())["stages"] == {}


def test_a_dry_run_only_estimates(capsys) -> None:
    before = sorted(Path().rglob("*"))
    assert main(["linearize", "teacher", "--dry-run", "--preset", "hedgehog", "--tflops", "100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    parameters = sum(p.numel() for p in byte_teacher().parameters())
    mixers = 3 * 2 * 4 * 36
    assert lines[0].startswith(f"{parameters + mixers:,} parameters, {mixers:,} of them new")
    assert lines[1] == "speed: 100 TFLOP/s, as given"
    assert any(line.startswith(f"transfer: {mixers:,} parameters trained") for line in lines)
    assert {line.split(":")[0] for line in lines} >= {"peak memory", "disk", "time"}
    assert sorted(Path().rglob("*")) == before


STREAM = ["--mode", "stream", "--max-memory", "64GiB"]


def test_a_stream(capsys) -> None:
    split_weights(missing=False)
    assert main(["linearize", "teacher", "--text", "text.txt", *FEW, *STREAM]) == 0
    assert capsys.readouterr().out.endswith("the student and its report are in out\n")
    assert json.loads(Path("out/model.safetensors.index.json").read_text())["weight_map"]


def test_a_dry_run_of_a_stream_names_memory_and_disk(capsys) -> None:
    assert main(["linearize", "teacher", "--dry-run", "--tflops", "100", *STREAM]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line.split(":")[0] for line in lines}
    assert names >= {"memory for measuring", "memory for transfer", "memory for recover", "peak memory", "disk"}
    assert next(line for line in lines if line.startswith("peak")).endswith("--max-memory allows 64.0 GiB")
    # 20M + 2 * 131,072 tokens, and two groups of 4 * 64, of 32 floats
    hidden = (20_000_000 + 2 * 131_072 + 2 * 4 * 64) * 32 * 4
    disk = next(line for line in lines if line.startswith("disk"))
    assert f"{hidden / 2**30:.1f} GiB beside it for hidden states" in disk
    read = next(line for line in lines if line.startswith("read from the disk: "))
    gibibytes, reading = re.search(r"([\d.]+) GiB of weights, in (\d+) seconds at an assumed 2 GB/s$", read).groups()
    assert int(reading) == pytest.approx(float(gibibytes) * 2**30 / 2e9, abs=1)
    stages = [int(line.split()[-2]) for line in lines if line.startswith(("transfer", "recover"))]
    assert int(lines[-1].split()[1]) == pytest.approx(sum(stages) + int(reading), abs=2)
    assert lines[-1].endswith("with the reading; measurements come on top")


def test_help(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["linearize", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in (
        "--preset",
        "--keep-layers",
        "--window",
        "--mixer",
        "--feature-map",
        "--recover-lr",
        "--resume",
        "--max-memory",
    ):
        assert option in shown


def break_config(**changes) -> None:
    path = Path("teacher/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def make_bert() -> None:
    sizes = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(**sizes, intermediate_size=16, is_decoder=True)).save_pretrained("teacher")


def split_weights(missing: bool = True) -> None:
    """In two shards, of which one is missing."""
    weights = load_file("teacher/model.safetensors")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    head = {"lm_head.weight": weights.pop("lm_head.weight")}
    save_file(weights, f"teacher/{first}")
    if not missing:
        save_file(head, f"teacher/{second}")
    names = dict.fromkeys(weights, first) | {"lm_head.weight": second}
    Path("teacher/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    Path("teacher/model.safetensors").unlink()


def cut_shard() -> None:
    split_weights(missing=False)
    path = Path("teacher/model-00002-of-00002.safetensors")
    path.write_bytes(path.read_bytes()[:-8])


def put_nan() -> None:
    teacher = byte_teacher()
    teacher.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    teacher.save_pretrained("teacher")


def write(name: str, text: str | bytes):
    return lambda: Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())


BAD = {
    "no teacher": (None, [], "the following arguments are required: TEACHER"),
    "no such folder": (None, ["./nowhere", *FEW, "--text", "text.txt"], "no model folder ./nowhere"),
    "no output": (None, ["teacher", "--text", "text.txt"], "no --output"),
    "no text": (None, ["teacher", *FEW], "no text: give --text FILE"),
    "missing text": (None, ["teacher", *FEW, "--text", "no.txt"], "no.txt does not exist"),
    "empty text": (write("a.txt", ""), ["teacher", *FEW, "--text", "a.txt"], "no text in there"),
    "blank text": (write("a.txt", "\n \n"), ["teacher", *FEW, "--text", "a.txt"], "no text"),
    "latin text": (write("a.txt", b"ok \xff"), ["teacher", *FEW, "--text", "a.txt"], "byte 3 is not UTF-8"),
    "unknown preset": (None, ["teacher", *FEW, "--preset", "lolcat"], "did you mean 'lolcats'?"),
    "unknown key": (
        write("p.yaml", "mixer: hybrid\nwindow: 3"),
        ["teacher", *FEW, "--preset", "p.yaml"],
        "p.yaml: unknown key 'window'",
    ),
    "unknown option": (None, ["teacher", *FEW, "--windows", "3"], "unrecognized arguments: --windows 3"),
    "unknown setting": (None, ["teacher", *FEW, "--set", "recover.k=3"], "unknown key 'recover.k'"),
    "no setting": (None, ["teacher", *FEW, "--set", "recover.kl"], "expected KEY=VALUE"),
    "no window": (None, ["teacher", *FEW, "--window", "0", "--text", "text.txt"], "options.window=0 leaves no window"),
    "no layers": (None, ["teacher", *FEW, "--keep-layers", "a"], "no list of layers"),
    "layer too high": (None, ["teacher", *FEW, "--keep-layers", "9", "--text", "text.txt"], "no layer 9"),
    "output exists": (lambda: Path("out").mkdir(), ["teacher", *FEW, "--text", "text.txt"], "out exists already"),
    "nothing to resume": (None, ["teacher", *FEW, "--text", "text.txt", "--resume"], "no unfinished run"),
    "not causal": (make_bert, ["teacher", *FEW, "--text", "text.txt"], "the teacher's family 'bert' cannot be"),
    "unknown family": (
        lambda: break_config(model_type="nobody_knows_this"),
        ["teacher", *FEW, "--text", "text.txt"],
        "nobody_knows_this",
    ),
    "missing shard": (split_weights, ["teacher", *FEW, "--text", "text.txt"], "model-00002-of-00002.safetensors"),
    "cut shard": (
        cut_shard,
        ["teacher", *FEW, "--text", "text.txt"],
        "teacher/model-00002-of-00002.safetensors is cut off or damaged",
    ),
    "nan in the teacher": (put_nan, ["teacher", *FEW, "--text", "text.txt"], "the teacher teacher predicts NaN"),
    "nan in a stream's teacher": (
        put_nan,
        ["teacher", *FEW, "--text", "text.txt", *STREAM],
        "the teacher teacher predicts NaN",
    ),
    "nan in what the teacher writes": (
        put_nan,
        ["teacher", *FEW, "--text", "self", *STREAM],
        "the teacher teacher predicts NaN",
    ),
    "no such column": (
        write("a.jsonl", '{"story": "one two"}'),
        ["teacher", *FEW, "--text", "a.jsonl"],
        "has no column 'text', only story; set --text-column",
    ),
    "no weights": (
        lambda: Path("teacher/model.safetensors").unlink(),
        ["teacher", *FEW, "--text", "text.txt"],
        "has no weights",
    ),
    "no tokenizer": (
        lambda: [Path("teacher", name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        ["teacher", *FEW, "--text", "text.txt"],
        "has no tokenizer",
    ),
    "memory without a stream": (
        None,
        ["teacher", *FEW, "--text", "text.txt", "--max-memory", "8GiB"],
        "max_memory is a bound for mode stream",
    ),
    "a stream without memory": (None, ["teacher", *FEW, "--text", "text.txt", "--mode", "stream"], "give --max-memory"),
    "no size": (
        None,
        ["teacher", *FEW, "--text", "text.txt", "--mode", "stream", "--max-memory", "8"],
        "'8' is no amount of memory; write it as 8GiB",
    ),
    "too little memory": (
        None,
        ["teacher", *FEW, "--text", "text.txt", "--mode", "stream", "--max-memory", "1.5MB"],
        "--max-memory 1.4 MiB is too little",
    ),
    "a stream's missing shard": (
        split_weights,
        ["teacher", *FEW, "--text", "text.txt", *STREAM],
        "model-00002-of-00002.safetensors is missing",
    ),
    "a stream of everything": (
        None,
        ["teacher", *FEW, "--text", "text.txt", *STREAM, "--preset", "hedgehog", "--window", "4"],
        "set recover.parameters=lora",
    ),
    "not finite": (
        None,
        ["teacher", *FEW, "--text", "text.txt", "--transfer-lr", "1e30", "--set", "transfer.weight_decay=1e30"],
        "the loss of the stage transfer is not finite",
    ),
}  # fmt: skip
AFTER_A_START = [case for case in BAD if case == "not finite" or case.startswith("nan in")]


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(case, capfd) -> None:
    prepare, options, message = BAD[case]
    if prepare is not None:
        prepare()
    before = {path for path in Path().rglob("*") if "cache" not in path.parts}
    capfd.readouterr()
    assert main(["linearize", *options]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("lm-zoo: error: ")
    assert captured.err.count("\n") == 1 or case in AFTER_A_START, captured.err
    assert message in last
    assert {path for path in Path().rglob("*") if "cache" not in path.parts} == before

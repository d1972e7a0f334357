"""Compiled blocks train as they do when they are not, and leave the same files."""

import pytest
import torch
from interrupted_runs import curve

from lm_zoo.errors import UserError

MIXERS = {"gla": {"num_heads": 1, "gate_rank": 4}, "attention": {"num_heads": 1}}
CONFIG = {"hidden_size": 16, "num_hidden_layers": 4, "intermediate_size": 32, "mixers": MIXERS}


@pytest.fixture
def counters():
    """What torch.compile counted in the test."""
    names = ("recompile_limit", "accumulated_recompile_limit", "optimize_ddp")
    before = {name: getattr(torch._dynamo.config, name) for name in names}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()
    for name, value in before.items():
        setattr(torch._dynamo.config, name, value)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of the compiler's own looking around
@pytest.mark.parametrize(
    ("pattern", "checkpointing"),
    [(["gla"], True), pytest.param(["gla", "gla", "gla", "attention"], False, marks=pytest.mark.slow)],
    ids=["checkpointing", "hybrid"],
)
def test_a_compiled_run_is_the_same(start_run, tmp_path, counters, pattern, checkpointing) -> None:
    """Also where documents differ in number, in validation, samples, statistics and the exported folder."""
    options = {"max_steps": 4, "val_check_interval": 3, "limit_val_batches": 1}
    options["data"] = {"val_fraction": 0.1, "separator": "\n"}
    model = {"config": {**CONFIG, "pattern": pattern}, "gradient_checkpointing": checkpointing}
    _, plain = start_run("plain", model=model, **options)
    assert not counters["stats"]
    _, compiled = start_run("compiled", model={**model, "compile": "aot_eager"}, **options)
    # Blocks that are alike share theirs: of training, of validation, and of the first block there, whose input differs.
    assert 2 <= counters["stats"]["unique_graphs"] <= 3 * len(set(pattern))
    assert not counters["graph_break"]
    for before, after in zip(curve(tmp_path / "plain"), curve(tmp_path / "compiled"), strict=True):
        for name in ("train_loss", "val_loss", "gradient_norm"):
            assert before[name] == after[name] == "" or float(after[name]) == pytest.approx(float(before[name]), 1e-5)
    state = compiled.model.state_dict()
    assert list(state) == list(plain.model.state_dict())
    for name, expected in plain.model.state_dict().items():
        assert torch.allclose(state[name], expected, rtol=0, atol=1e-5), name
    for name in ("samples.txt", "model/config.json"):
        assert (tmp_path / "compiled" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_what_cannot_compile_is_told(start_run, tmp_path) -> None:
    with pytest.raises(UserError, match=r"model\.compile=jit is no backend of torch\.compile; choose .*inductor"):
        start_run("run", max_steps=2, model={"compile": "jit"})
    assert not (tmp_path / "run").exists()

"""A compiled step is the forward pass of one token: the same operations as loops, once for layers of a kind."""

import shutil

import pytest
import torch
from compare import assert_close

from lm_zoo import DecodeStep, compiled, pack_weights
from lm_zoo.compiled import ROWS, Compiled
from lm_zoo.decode import WARM_UP

STEPS = WARM_UP + 4
has_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
# torch warns of itself when Inductor is first imported
imports_inductor = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture
def interpreted(monkeypatch):
    """In place of Inductor: the graphs run as they are, and those that would be compiled are noted."""
    graphs = []
    monkeypatch.setattr(compiled, "_known", {})
    monkeypatch.setattr("lm_zoo.decode.check_compiler", lambda: None)
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graphs.append(graph) or graph)
    return graphs


def compare(model, tokens, batch, tolerance):
    """Steps of a compiled model and its forward passes, and the states after them; the step."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which is 0 at first
            parameter.data.normal_(generator=generator)
    cache = model.init_cache(batch)
    with torch.no_grad():
        model(tokens(batch, 7), past_key_values=cache)
        plain, ids = cache.clone(), tokens(batch, STEPS, seed=2)
        step = DecodeStep(model, cache, compile=True)
        for column in ids.split(1, dim=1):
            assert_close(step(column), model(column, past_key_values=plain).logits, tolerance)
    for state, other in zip(cache.states, plain.states, strict=True):
        for name in state:
            scale = other[name].abs().max().item()
            assert torch.allclose(state[name], other[name], rtol=0, atol=tolerance * scale)
    return step


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("batch", [1, 3, ROWS + 1])
def test_the_graphs_equal_the_forward_pass(model, tokens, batch, packed, interpreted):
    if packed:
        pack_weights(model)
    step = compare(model, tokens, batch, 1e-10)
    kinds = [type(run) for run in step._runs]
    assert kinds[0] is kinds[-1] is Compiled
    layers = {"hybrid": 2, "lightning": 2, "attention": 0}  # without those that grow; Lightning's first is another one
    name = "hybrid" if len(model.config.mixers) > 1 else model.config.pattern[0]
    assert len(interpreted) == layers.get(name, 1) + 2


@imports_inductor
@has_compiler
@pytest.mark.slow
def test_compiled_steps_equal_the_forward_pass(model, tokens):
    compare(model, tokens, 1, 1e-10)


@imports_inductor
@has_compiler
def test_compiled_loops(make_model, tokens):
    step = compare(pack_weights(make_model("gla", torch.float32)), tokens, 2, 1e-4)
    assert all(isinstance(run, Compiled) for run in step._runs)


@pytest.mark.parametrize("name", ["gla", "hgrn2", "s4d"])  # of the last two some is computed from parameters alone
@pytest.mark.parametrize("compile", [False, True], ids=["tape", "compiled"])
def test_new_values_of_parameters_are_seen(name, compile, make_model, tokens, interpreted):
    model = make_model(name)
    cache = model.init_cache(1)
    step = DecodeStep(model, cache, compile=compile)
    for column in tokens(1, STEPS).split(1, dim=1):
        step(column)
    settled = [call for run in step._runs for call in run.settled.calls]
    assert bool(settled) == (name != "gla")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
        plain, ids = cache.clone(), tokens(1, 1, seed=4)
        assert_close(step(ids), model(ids, past_key_values=plain).logits, 1e-10)


def test_what_depends_on_parameters_alone_runs_when_they_change(make_model, tokens):
    model = make_model("s4d")
    step = DecodeStep(model, model.init_cache(1))
    for column in tokens(1, STEPS).split(1, dim=1):
        step(column)
    runs = []
    step._runs[0].settled.calls.append(lambda: runs.append(1))
    step(tokens(1, 1))
    assert runs == []
    with torch.no_grad():
        model.model.layers[1].mixer.log_dt.add_(0.1)
    step(tokens(1, 1))
    step(tokens(1, 1))
    assert runs == [1]


def test_what_cannot_be_replayed_runs_as_it_is(make_model, tokens, interpreted):
    model = make_model("gla")
    model.model.layers[1].register_forward_hook(lambda module, args, output: output * (1 + abs(output.sum().item())))
    step = compare(model, tokens, 1, 1e-10)
    assert [isinstance(run, Compiled) for run in step._runs] == [True, True, False, True, True]


@imports_inductor
def test_no_compiler(make_model, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    model = make_model("gla")
    with pytest.raises(ValueError, match=r"compile=True needs a C\+\+ compiler, and there is none: install g\+\+"):
        DecodeStep(model, model.init_cache(1), compile=True)
    with pytest.raises(ValueError, match="compile=True is for models on a CPU, this one is on meta: leave it out"):
        DecodeStep(model.to("meta"), model.init_cache(1), compile=True)

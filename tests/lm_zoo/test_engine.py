"""Engine: every text is its own, whoever else is in the batch, and whatever becomes of them."""

import threading
import time

import pytest
import torch
from engine_texts import (
    COUNTS,
    GREEDY,
    LENGTHS,
    TOKENIZER,
    VOCABULARY,
    Listener,
    check_greedy,
    generated,
    prompts_of,
)
from plain_mixer import plain_mixer
from tiny_teachers import new_teacher

from lm_zoo import LayerState, LinearizedForCausalLM, PrefixStore
from lm_zoo.serving import Engine, EngineError, Sampling
from lm_zoo.serving.slots import Slots


def test_greedy_texts_are_those_of_generate(model):
    """More texts than slots, of all lengths, so that they enter and leave all the time."""
    model.generation_config.suppress_tokens = None
    vocabulary = model.config.vocab_size
    with Engine(model, TOKENIZER, max_batch=3, prefill_chunk=8) as engine:
        check_greedy(model, engine, prompts_of(LENGTHS, high=vocabulary), COUNTS)
    assert engine.finished.total() == len(COUNTS)
    assert engine.running == engine.waiting == 0


def test_states_that_grow(served):
    """Keys and values move to longer tensors after 64 tokens, here once texts have left and others have entered."""
    model, prompts = served("hybrid"), prompts_of([10, 40, 10, 12, 9])
    # Sampled, since a greedy text soon repeats itself, whatever it forgets.
    samplings = [Sampling(seed=n, max_tokens=n) for n in (4, 60, 50, 51, 8)]
    with Engine(model, TOKENIZER, max_batch=3) as engine:
        alone = [engine.submit(p, s).result() for p, s in zip(prompts, samplings, strict=True)]
        requests = [engine.submit(p, s) for p, s in zip(prompts, samplings, strict=True)]
        assert [request.result() for request in requests] == alone


@pytest.mark.parametrize("mixer", ["sliding", "terrace", "liger"])
def test_linearized_models_too(mixer):
    options = {"window": 3} | ({} if mixer == "liger" else {"window_kind": mixer})
    kind = "liger" if mixer == "liger" else "hybrid"
    model = LinearizedForCausalLM.from_teacher(new_teacher("qwen2").double(), kind, options, keep_layers=[1]).eval()
    model.generation_config.suppress_tokens = None
    with Engine(model, TOKENIZER, max_batch=3, max_tokens=14, prefill_chunk=8) as engine:
        check_greedy(model, engine, prompts_of(LENGTHS, high=61), COUNTS)


def test_a_mixer_that_somebody_registered_too():
    with plain_mixer():
        model = LinearizedForCausalLM.from_teacher(new_teacher("qwen2").double(), "plain", {}).eval()
        model.generation_config.suppress_tokens = None
        with Engine(model, TOKENIZER, max_batch=3, max_tokens=14, prefill_chunk=8) as engine:
            check_greedy(model, engine, prompts_of(LENGTHS, high=61), COUNTS)


def test_sampled_texts_do_not_depend_on_the_others(served):
    model, prompts = served("hybrid"), prompts_of(LENGTHS)
    samplings = [Sampling(seed=i, max_tokens=12, top_p=0.9, temperature=0.5 + i / 4) for i in range(len(prompts))]
    with Engine(model, TOKENIZER) as engine:
        alone = [engine.submit(p, s).result() for p, s in zip(prompts, samplings, strict=True)]
        requests = [engine.submit(p, s) for p, s in zip(prompts, samplings, strict=True)]
        together = [request.result() for request in requests]
        other = engine.submit(prompts[0], Sampling(seed=99, max_tokens=12, temperature=0.5)).result()
    assert together == alone
    assert other.tokens != alone[0].tokens
    assert len({result.tokens for result in alone}) == len(prompts)


def test_a_seed_is_drawn_where_none_is_given(served):
    with Engine(served(), TOKENIZER) as engine:
        first, second = (engine.submit([1, 2], Sampling(max_tokens=20)).result() for _ in range(2))
    assert first.tokens != second.tokens


@pytest.mark.parametrize("name", ["gla", "hybrid"])
def test_shared_prefixes_are_read_once(served, name):
    model = served(name)
    shared, *own = prompts_of([40, 3, 5, 9, 3, 1])
    prompts = [shared + tail for tail in own]
    store = PrefixStore(model, chunk=8)
    with Engine(model, TOKENIZER, prefill_chunk=16, prefix_store=store) as engine:
        for _ in range(2):
            check_greedy(model, engine, prompts, [6] * len(prompts))
        for prompt in (*prompts[:2], *prompts[:2]):  # each alone, so that it is not packed with others
            check_greedy(model, engine, [prompt], [6])
    read = sum(map(len, own)) + 40
    assert store.tokens_read < read + 5 * 8 + 4 * sum(len(tail) + 8 for tail in own)  # not 14 x 40
    assert store.tokens_found >= 10 * 40
    # What it holds can be continued outside of the engine and of inference mode.
    cache = store.prefill(torch.tensor([prompts[0]]))
    output = model.generate(torch.tensor([prompts[0]]), past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert output[0, len(prompts[0]) :].tolist() == generated(model, prompts[0], 6)


def test_a_long_prompt_holds_up_neither_texts_nor_short_prompts(served):
    model = served()
    order = []
    running, long, short = prompts_of([4, 800, 6])
    with Engine(model, TOKENIZER, prefill_chunk=8) as engine:
        started = Listener()
        first = engine.submit(running, Sampling(max_tokens=400, **GREEDY), listener=started)
        assert started.reached.wait(20)
        before = len(started.pieces)
        second = Listener()
        engine.submit(long, Sampling(max_tokens=1, **GREEDY), listener=second)
        short_one = Sampling(max_tokens=1, **GREEDY)
        engine.submit(short, short_one, listener=lambda piece: order.append(len(second.pieces)))
        assert second.reached.wait(20)
        assert order == [0]  # the short one was done before the long one
        assert len(started.pieces) - before > 800 // 8 // 2  # the running text has grown with every piece that was read
        engine.cancel(first)


def test_cancelled_in_every_place(served):
    model = served("hybrid")
    prompts = prompts_of([5, 6, 400, 7, 8])
    with Engine(model, TOKENIZER, max_batch=3, prefill_chunk=8) as engine:
        listener = Listener(3)
        writing = engine.submit(prompts[0], Sampling(max_tokens=2000, **GREEDY), listener=listener)
        other = engine.submit(prompts[1], Sampling(max_tokens=60, **GREEDY))
        reading = engine.submit(prompts[2], Sampling(max_tokens=5, **GREEDY))
        waiting = engine.submit(prompts[3], Sampling(max_tokens=5, **GREEDY))
        last = engine.submit(prompts[4], Sampling(max_tokens=20, **GREEDY))
        assert listener.reached.wait(20)
        for request in (writing, reading, waiting):
            engine.cancel(request)
        assert [request.result().finish_reason for request in (reading, waiting)] == ["cancelled"] * 2
        assert list(other.result().tokens) == generated(model, prompts[1], 60)
        assert list(last.result().tokens) == generated(model, prompts[4], 20)
        assert listener.pieces[-1].finish_reason == "cancelled"
        engine.cancel(writing)  # nothing happens
    assert engine.finished == {"cancelled": 3, "length": 2}


def test_to_leave_a_stream_cancels_it(served):
    model = served()
    with Engine(model, TOKENIZER) as engine:
        stream = engine.stream("Once", Sampling(max_tokens=4000, **GREEDY))
        next(stream)
        stream.close()
        text = "".join(engine.stream("Once", Sampling(max_tokens=12, **GREEDY)))
        assert text == engine.submit("Once", Sampling(max_tokens=12, **GREEDY)).result().text
    assert engine.finished["cancelled"] == 1


def test_a_listener_that_fails_ends_its_text_alone(served):
    model, (one, two) = served(), prompts_of([5, 9])

    def gone(piece):
        raise ConnectionError

    with Engine(model, TOKENIZER) as engine:
        engine.submit(one, Sampling(max_tokens=4000, **GREEDY), listener=gone)
        check_greedy(model, engine, [two], [30])
    assert engine.finished == {"cancelled": 1, "length": 1}


def test_stop_strings_and_logprobs(served):
    model, (prompt,) = served(), prompts_of([9])
    with Engine(model, TOKENIZER) as engine:
        plain = engine.submit(prompt, Sampling(max_tokens=40, logprobs=2, **GREEDY)).result()
        stop = plain.text[5:8]
        stopped = engine.submit(prompt, Sampling(max_tokens=40, stop=("never", stop), **GREEDY)).result()
    assert (stopped.text, stopped.finish_reason) == (plain.text[: plain.text.index(stop)], "stop")
    assert len(plain.logprobs) == len(plain.tokens) == 40
    with torch.no_grad():
        logits = model(torch.tensor([prompt + list(plain.tokens)])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).max(-1).values
    assert [step.logprob for step in plain.logprobs] == pytest.approx(expected.tolist())
    assert all(step.likeliest[0] == (step.token, step.logprob) for step in plain.logprobs)


def test_an_error_of_the_model_ends_what_it_was_working_on(served, caplog):
    model = served("hybrid")
    prompts = prompts_of([5, 9])
    step = Slots.step
    with Engine(model, TOKENIZER) as engine:
        engine._slots.step = lambda tokens: (_ for _ in ()).throw(RuntimeError("out of memory"))
        with pytest.raises(EngineError, match="the model failed: out of memory"):
            engine.submit(prompts[0], Sampling(max_tokens=5)).result()
        engine._slots.step = lambda tokens: step(engine._slots, tokens)
        check_greedy(model, engine, prompts, [5, 6])
    assert "the model failed; 1 texts end" in caplog.text
    assert engine.finished == {"error": 1, "length": 2}


def test_an_error_while_a_text_enters_leaves_the_others_alone(served, monkeypatch):
    model, prompts = served("hybrid"), prompts_of([5, 9, 7])
    put, failing = LayerState.put, threading.Event()

    def full(self, row, other):
        if failing.is_set() and row > 0:
            raise RuntimeError("out of memory")
        put(self, row, other)

    monkeypatch.setattr(LayerState, "put", full)
    with Engine(model, TOKENIZER) as engine:
        listener = Listener(3)
        first = engine.submit(prompts[0], Sampling(max_tokens=200, seed=1), listener=listener)
        assert listener.reached.wait(20)
        failing.set()
        with pytest.raises(EngineError, match="the model failed: out of memory"):
            engine.submit(prompts[1], Sampling(max_tokens=5)).result()
        failing.clear()
        check_greedy(model, engine, [prompts[2]], [6])
        while first.finish_reason is None:
            time.sleep(0.005)
        again = engine.submit(prompts[0], Sampling(max_tokens=200, seed=1)).result()
    assert "".join(piece.text for piece in listener.pieces) == again.text


@pytest.mark.parametrize("name", ["gla", "hybrid", "mamba2"])
def test_a_text_that_is_not_finite_ends_alone_and_leaves_nothing_behind(served, name):
    model = served(name)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # no longer the embeddings'
    prompts, counts = prompts_of([20, 9, 9, 4, 5]), [30, 12, 12, 6, 6]
    texts = [generated(model, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    # A token of the second text alone, which is not finite once it is read; so is the end of the third prompt.
    elsewhere = {token for n in (0, 3, 4) for token in prompts[n] + texts[n]} | set(prompts[1] + texts[1][:2])
    poison = next(token for token in texts[1][2:-1] if token not in elsewhere)
    prompts[2][-1] = poison
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = float("nan")
    with Engine(model, TOKENIZER, max_batch=2, prefill_chunk=30) as engine:
        requests = [engine.submit(p, Sampling(max_tokens=n, **GREEDY)) for p, n in zip(prompts, counts, strict=True)]
        for n, request in enumerate(requests):
            if n in (1, 2):
                with pytest.raises(EngineError, match="not finite"):
                    request.result()
            else:
                assert list(request.result().tokens) == texts[n]
    assert requests[1].written > 2
    assert requests[2].written == 0


def test_many_threads_submit_and_cancel(served):
    model, prompts = served(), prompts_of([3 + i % 9 for i in range(32)])
    failures = []

    def caller(prompts):
        for i, prompt in enumerate(prompts):
            if i % 3 == 0:
                engine.cancel(engine.submit(prompt, Sampling(max_tokens=50)))
            found = list(engine.submit(prompt, Sampling(max_tokens=9, **GREEDY)).result().tokens)
            if found != generated(reference, prompt, 9):
                failures.append(prompt)

    reference = served()
    with Engine(model, TOKENIZER, max_batch=5, prefill_chunk=16) as engine:
        threads = [threading.Thread(target=caller, args=(prompts[i::8],)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert engine.finished["length"] + engine.finished["stop"] >= 32


@torch.inference_mode()
@pytest.mark.parametrize("name", ["gla", "hybrid"])
def test_slots(served, name):
    """Rows in use without gaps; what grew with the texts is given back."""
    model = served(name)
    prompts = prompts_of([5, 70, 9, 12])
    caches = []
    for prompt in prompts:
        caches.append(model.init_cache(1))
        model(torch.tensor([prompt]), past_key_values=caches[-1])
    slots = Slots(model)
    empty = slots.nbytes
    slots.enter(caches)
    slots.leave([2, 0])
    assert slots.lengths == [12, 70]
    slots.enter([caches[2]])
    assert slots.step([1, 2, 3]).shape == (3, VOCABULARY)
    expected = [model(torch.tensor([prompts[n] + [token]])).logits[0, -1] for token, n in ((4, 3), (5, 1), (6, 2))]
    slots.leave([0, 1, 2])
    slots.enter([caches[3], caches[1], caches[2]])
    torch.testing.assert_close(slots.step([4, 5, 6]), torch.stack(expected), rtol=1e-10, atol=1e-10)
    slots.leave([0, 1, 2])
    assert (len(slots), slots.nbytes) == (0, empty if name == "hybrid" else 4 * empty)

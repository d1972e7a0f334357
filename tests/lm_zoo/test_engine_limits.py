"""What an engine refuses, when it ends a text, and how it closes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from engine_texts import (
    GREEDY,
    TOKENIZER,
    VOCABULARY,
    Gate,
    generated,
    prompts_of,
)
from tiny_teachers import new_teacher

from lm_zoo import LinearizedForCausalLM, PrefixStore
from lm_zoo.errors import UserError
from lm_zoo.serving import Closed, Engine, PromptTooLong, QueueFull, Sampling
from lm_zoo.train.tokenizers import byte_tokenizer


def test_no_more_than_the_queue_holds(served):
    model = served()
    gate = Gate(model)
    with Engine(model, TOKENIZER, max_batch=2, max_queue=1) as engine:
        requests = [engine.submit([1, 2], Sampling(max_tokens=2, **GREEDY)) for _ in range(3)]
        with pytest.raises(QueueFull, match="3 texts are waiting or being written"):
            engine.submit([1, 2])
        gate.open.set()
        assert [len(request.result().tokens) for request in requests] == [2, 2, 2]
        engine.submit([1, 2], Sampling(max_tokens=2)).result()


def test_time_is_limited(served):
    model, endless = served(), byte_tokenizer()
    endless.eos_token = None
    gate = Gate(model)
    with Engine(model, endless, max_batch=1, max_seconds=0.2) as engine:
        requests = [engine.submit([1, 2], Sampling(max_tokens=4096, **GREEDY)) for _ in range(2)]
        time.sleep(0.2)
        gate.open.set()
        running, waiting = (request.result() for request in requests)
        assert (running.finish_reason, waiting.finish_reason) == ("timeout", "timeout")
        assert 0 < len(running.tokens) < 4096
        assert waiting.tokens == ()
        assert engine.submit([1, 2], Sampling(max_tokens=1)).result().finish_reason == "length"


def test_closing_lets_texts_finish_within_the_grace(served):
    model = served()
    gate = Gate(model)
    engine = Engine(model, TOKENIZER, max_batch=1)
    short = engine.submit([1, 2], Sampling(max_tokens=3, **GREEDY))
    waiting = engine.submit([3, 4], Sampling(max_tokens=4, **GREEDY))
    closing = threading.Thread(target=engine.close, args=(20,))
    closing.start()
    assert gate.entered.wait(20)
    while not engine.closing:
        time.sleep(0.001)
    with pytest.raises(Closed, match="takes no more texts"):
        engine.submit([1, 2])
    gate.open.set()
    assert (len(short.result().tokens), len(waiting.result().tokens)) == (3, 4)
    closing.join()
    assert not engine.alive


def test_closing_without_grace_ends_all(served):
    engine = Engine(served(), TOKENIZER, max_batch=1)
    requests = [engine.submit([1, 2], Sampling(max_tokens=4096, **GREEDY)) for _ in range(3)]
    engine.close()
    for request in requests:
        with pytest.raises(Closed):
            request.result()


@pytest.mark.parametrize(
    ("prompt", "sampling", "error", "message"),
    [
        ([], Sampling(), UserError, "the prompt is empty"),
        ([1, VOCABULARY], Sampling(), UserError, "token ids must be integers from 0 to 257, got 258"),
        ([1, -1], Sampling(), UserError, "token ids must be integers from 0 to 257, got -1"),
        ([1, "a"], Sampling(), UserError, "got 'a'"),
        ("\ud800", Sampling(), UserError, "the prompt is not Unicode text"),
        ([1] * 51, Sampling(), PromptTooLong, "the prompt has 51 tokens, and at most 50 are taken"),
        ([1], Sampling(max_tokens=301), UserError, "max_tokens must be at most 300 here, got 301"),
    ],
)
def test_refuses_impossible_prompts(served, prompt, sampling, error, message):
    with Engine(served(), TOKENIZER, max_prompt_tokens=50, max_tokens=300) as engine:
        with pytest.raises(error, match=message):
            engine.submit(prompt, sampling)
        assert len(engine.submit([1], Sampling(max_tokens=1)).result().tokens) == 1


def test_to_encode_a_long_prompt_holds_up_no_short_one(served):
    with Engine(served(), TOKENIZER) as engine, ThreadPoolExecutor() as threads:
        with engine._encoders[1][1]:  # as if a long one were being encoded
            long = threads.submit(engine.submit, "a" * 2**17)
            short = threads.submit(engine.submit, "a", Sampling(max_tokens=1))
            assert len(short.result(20).result().tokens) == 1
            assert not long.done()
        with pytest.raises(PromptTooLong, match="the prompt has 131072 tokens"):
            long.result(20)


@pytest.mark.parametrize("of", ["the tokenizer", "the model", "both"])
def test_end_tokens(served, of):
    model, tokenizer, (prompt,) = served(), byte_tokenizer(), prompts_of([9], low=32, high=127)
    text = generated(model, prompt, 12)
    end = next(token for n, token in enumerate(text) if n > 3 and token not in text[:n])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end) if of != "the model" else None
    model.generation_config.eos_token_id = {"the tokenizer": None, "the model": end, "both": [end, 257]}[of]
    with Engine(model, tokenizer) as engine:
        found = engine.submit(prompt, Sampling(max_tokens=12, **GREEDY)).result()
    assert list(found.tokens) == text[: text.index(end) + 1]
    assert found.finish_reason == "stop"
    assert found.text == TOKENIZER.decode(found.tokens[:-1])


def test_an_empty_text_starts_where_a_document_does(served):
    model = served()
    with Engine(model, TOKENIZER) as engine:
        found = engine.submit("", Sampling(max_tokens=5, **GREEDY)).result()
    assert list(found.tokens) == generated(model, [TOKENIZER.bos_token_id], 5)


def test_positions_that_the_model_does_not_have():
    model = LinearizedForCausalLM.from_teacher(new_teacher("gpt2"), "hybrid", {"window": 3}).eval()
    with Engine(model, TOKENIZER) as engine:
        with pytest.raises(PromptTooLong, match=r"prompt \(60 tokens\) and max_tokens \(5\) exceed the model's 64"):
            engine.submit([1] * 60, Sampling(max_tokens=5))
        whole = engine.submit([1] * 60, Sampling(max_tokens=None, **GREEDY)).result()
    assert len(whole.tokens) == 4


def test_refuses_impossible_options(served):
    model = served()
    for options, message in [
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"max_queue": -1}, "max_queue must be an integer of at least 0"),
        ({"max_seconds": 0}, "max_seconds must be positive"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
        ({"prefix_store": PrefixStore(served())}, "prefix_store must be of the same model"),
    ]:
        with pytest.raises(ValueError, match=message):
            Engine(model, TOKENIZER, **options)
    with pytest.raises(ValueError, match="must be in eval mode"):
        Engine(served().train(), TOKENIZER)
    with pytest.raises(UserError, match="model must be one of lm_zoo, got a LlamaForCausalLM; linearize it"):
        Engine(new_teacher("llama"), TOKENIZER)

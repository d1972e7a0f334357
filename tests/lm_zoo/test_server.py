"""The server by the eyes of its clients: the real `openai` package, and raw sockets."""

import asyncio
import json
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch
import uvicorn
from served_models import endless_tokenizer, tiny_model

from lm_zoo.serving import Engine
from lm_zoo.serving.app import create_app
from lm_zoo.serving.server import Server, listen
from lm_zoo.train.tokenizers import byte_tokenizer

JSON = {"content-type": "application/json"}
BAD = [
    (b'{"model": "tiny", ', 400, "the body is not JSON"),
    (b"", 400, "Field required"),
    (b"[" * 100_000, 400, "error parsing the body"),
    (b"[1]", 400, "the body must be a JSON object"),
    (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "the prompt is not Unicode text"),
    (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "temperature must be"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature must be from 0 to 1e+06, got -1"),
    ({"prompt": "a", "temperature": "hot"}, 400, "temperature: Input should be a valid number"),
    ({"prompt": "a", "top_p": 0}, 400, "top_p must be above 0"),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens must be from 1"),
    ({"prompt": "a", "max_tokens": 5000}, 400, "max_tokens must be at most 4096 here, got 5000"),
    ({"prompt": "a", "n": 0}, 400, "n must be from 1 to 128, got 0"),
    ({"prompt": ["a"] * 65, "n": 2}, 400, "n times the number of prompts"),
    ({"prompt": "a", "stop": ["", "b"]}, 400, "stop must be"),
    ({"prompt": "a", "frequency_penalty": 0.5}, 400, "'frequency_penalty' is not supported here; leave it out"),
    ({"prompt": {"a": 1}}, 400, "prompt: must be a string, a list of token ids"),
    ({"prompt": []}, 400, "prompt: must be"),
    ({"prompt": [999]}, 400, "token ids must be integers from 0 to 257, got 999"),
    ({}, 400, "prompt: Field required"),
    ({"prompt": "a" * 3001}, 400, "the prompt has 3001 tokens, and at most 3000 are taken"),
    ({"prompt": "a" * 10_000_000}, 413, "the body is larger than"),
    ({"model": "gpt-4", "prompt": "a"}, 404, "no model 'gpt-4' here, but 'tiny'"),
]
BAD_CHATS = [
    ({"messages": []}, 400, "messages: must hold at least one message"),
    ({"messages": [{"content": "a"}]}, 400, "messages.0.role: Field required"),
    ({"messages": [{"role": "x", "content": "a"}]}, 400, "chat template refuses these messages: no x"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400, "'tools' is not supported here"),
    ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
]


class Served:
    """A server in a thread of this process."""

    def __init__(self, api_key=None, grace=20.0, tokenizer=None, **options):
        self.engine = Engine(tiny_model(), tokenizer or endless_tokenizer(), **options)
        listener = listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.root = f"http://127.0.0.1:{self.port}"
        ready = threading.Event()
        app = create_app(self.engine, "tiny", api_key=api_key)
        config = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=5)
        self.server = Server(config, self.engine, grace, ready.set)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        assert ready.wait(20)
        self.key = api_key or "none"
        self.client = openai.OpenAI(base_url=f"{self.root}/v1", api_key=self.key, max_retries=0, timeout=30)

    def complete(self, prompt="Once", **options):
        return self.client.completions.create(**{"model": "tiny", "prompt": prompt, "temperature": 0} | options)

    def post(self, body, path="/v1/completions", **headers):
        if not isinstance(body, bytes):
            body = json.dumps({"model": "tiny", **body}).encode()
        return httpx.post(self.root + path, content=body, headers=JSON | headers, timeout=30)

    def stop(self):
        self.client.close()
        self.server.finish(0.0)
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextmanager
def serving(**options):
    served = Served(**options)
    try:
        yield served
    finally:
        served.stop()


@pytest.fixture(scope="module")
def served():
    with serving(max_prompt_tokens=3000) as served:
        yield served


def greedy(prompts: list[str], count: int) -> list[str]:
    """Texts of prompts of equal length, by `generate`."""
    ids = torch.tensor([list(prompt.encode()) for prompt in prompts])
    output = tiny_model().generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return [byte_tokenizer().decode(row, skip_special_tokens=True) for row in output[:, ids.shape[1] :]]


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def connect(served, body: dict) -> socket.socket:
    """A connection over which a request was sent."""
    content = json.dumps({"model": "tiny", **body}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    client = socket.create_connection(("127.0.0.1", served.port))
    client.sendall(head.encode() + b"\r\n\r\n" + content)
    return client


def vanish(served, body: dict, after: int) -> None:
    """A client that hangs up once it has read `after` bytes of the answer."""
    with connect(served, body) as client:
        if after:
            client.recv(after)


class TestProtocol:
    def test_completion(self, served):
        (expected,) = greedy(["Once"], 12)
        answer = served.complete(max_tokens=12)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason, answer.object) == (expected, "length", "text_completion")
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 12, 16)
        assert len(served.complete().choices[0].text) <= 16  # the protocol's own default

    def test_stream(self, served):
        (expected,) = greedy(["Once"], 30)
        chunks = list(served.complete(max_tokens=30, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected
        reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
        assert reasons == [None] * (len(reasons) - 1) + ["length"]
        assert len({chunk.id for chunk in chunks}) == 1
        assert chunks[-1].usage.completion_tokens == 30

    def test_several_prompts_and_choices(self, served):
        prompts = ["Once", "Then"]
        answer = served.complete(prompts, n=2, max_tokens=9)
        expected = [text for text in greedy(prompts, 9) for _ in range(2)]
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.prompt_tokens == 8
        ids = [list(prompt.encode()) for prompt in prompts]
        streamed = ["", ""]
        for chunk in served.complete(ids, max_tokens=9, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == expected[::2]

    def test_chat(self, served):
        messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        (expected,) = greedy(["<user>Hi<assistant>"], 10)
        chat = served.client.chat.completions
        options = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 10}
        choice = chat.create(**options).choices[0]
        assert (choice.message.content, choice.message.role) == (expected, "assistant")
        chunks = list(chat.create(**options, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
        assert chunks[-1].choices[0].finish_reason == "length"

    def test_seed_stop_and_logprobs(self, served):
        sampled = [served.complete(temperature=1, seed=seed, max_tokens=20).choices[0].text for seed in (1, 1, 2)]
        assert sampled[0] == sampled[1] != sampled[2]
        both = served.complete(temperature=1, seed=1, max_tokens=20, n=2)
        assert [choice.text for choice in both.choices] == sampled[1:]
        text = served.complete(max_tokens=20).choices[0].text
        stopped = served.complete(max_tokens=20, stop=text[3:6]).choices[0]
        assert (stopped.text, stopped.finish_reason) == (text[: text.index(text[3:6])], "stop")
        logprobs = served.complete(max_tokens=4, logprobs=2).choices[0].logprobs
        assert [len(top) for top in logprobs.top_logprobs] == [2] * 4
        assert logprobs.token_logprobs == [max(top.values()) for top in logprobs.top_logprobs]
        messages = [{"role": "user", "content": "Hi"}]
        chat = served.client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=3, logprobs=True, top_logprobs=2, temperature=0
        )
        assert [len(step.top_logprobs) for step in chat.choices[0].logprobs.content] == [2] * 3

    def test_models_health_and_metrics(self, served):
        assert [model.id for model in served.client.models.list()] == ["tiny"]
        assert served.client.models.retrieve("tiny").owned_by == "lm_zoo"
        assert httpx.get(f"{served.root}/health").json() == {"status": "ok", "running": 0, "waiting": 0}
        before = served.engine.written_tokens
        served.complete(max_tokens=7)
        page = httpx.get(f"{served.root}/metrics").text
        assert f"lm_zoo_written_tokens_total {before + 7}.0" in page
        assert re.search(r'lm_zoo_requests_total\{path="/v1/completions",status="200"\} [1-9]', page)
        assert re.search(r"lm_zoo_first_token_seconds_count [1-9]", page)

    def test_without_a_chat_template(self):
        with serving(tokenizer=byte_tokenizer()) as served:
            answer = served.post({"messages": [{"role": "user", "content": "Hi"}]}, "/v1/chat/completions")
        assert answer.status_code == 400
        assert "has no chat template; use completions" in answer.json()["error"]["message"]


class TestBadInput:
    @pytest.mark.parametrize(("body", "status", "message"), BAD)
    def test_completions(self, served, body, status, message):
        self.check(served.post(body), status, message)

    @pytest.mark.parametrize(("body", "status", "message"), BAD_CHATS)
    def test_chats(self, served, body, status, message):
        self.check(served.post(body, "/v1/chat/completions"), status, message)

    def check(self, answer, status, message):
        assert answer.status_code == status
        error = answer.json()["error"]
        assert message in error["message"]
        assert set(error) == {"message", "type", "param", "code"}

    def test_what_asks_for_nothing_is_no_error(self, served):
        neutral = {"frequency_penalty": 0, "logit_bias": {}, "echo": False, "user": "me", "suffix": None}
        assert served.post({"prompt": "a", "max_tokens": 1, **neutral}).status_code == 200

    def test_other_paths_methods_and_kinds_of_content(self, served):
        assert httpx.get(f"{served.root}/v2").json()["error"]["message"] == "Not Found"
        assert httpx.get(f"{served.root}/v1/completions").status_code == 405
        answer = served.post({"prompt": "a"}, **{"content-type": "text/plain"})  # as another site's page could send it
        assert answer.status_code == 400
        assert "sent with Content-Type: application/json" in answer.json()["error"]["message"]

    def test_a_wrong_key(self):
        with serving(api_key="secret") as served:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                for body in ({"prompt": "a"}, b"x" * 5_000_000):
                    self.check(served.post(body, **headers), 401, "wrong or missing API key")
            assert served.engine.prompt_tokens == 0
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=f"{served.root}/v1", api_key="wrong", max_retries=0).models.list()
            assert served.complete(max_tokens=2).choices[0].text == greedy(["Once"], 2)[0]
            assert httpx.get(f"{served.root}/health").status_code == 200

    def test_a_client_that_sends_all_before_it_reads(self, served):
        with connect(served, {"prompt": "a" * 20_000_000}) as client:
            assert client.recv(100).startswith(b"HTTP/1.1 413")

    def test_a_full_queue(self):
        endless = {"prompt": "a", "max_tokens": 4096}
        with serving(max_batch=1, max_queue=1) as served, connect(served, endless):
            until(lambda: served.engine.running == 1)
            with connect(served, endless):
                until(lambda: served.engine.waiting == 1)
                answer = served.post({"prompt": "a"})
                self.check(answer, 429, "2 texts are waiting or being written already")
                assert answer.headers["retry-after"] == "1"

    def test_the_time_of_a_request(self):
        with serving(max_batch=1, max_seconds=0.2) as served, ThreadPoolExecutor() as threads:
            gate, read = threading.Event(), served.engine.model.hidden_states
            served.engine.model.hidden_states = lambda *args, **kwargs: gate.wait(20) and read(*args, **kwargs)
            running = threads.submit(served.post, {"prompt": "a", "max_tokens": 4096})
            until(lambda: served.engine.running == 1)
            waiting = threads.submit(served.post, {"prompt": "a", "max_tokens": 4096})
            until(lambda: served.engine.waiting == 1)
            time.sleep(0.2)
            gate.set()
            assert running.result().json()["choices"][0]["finish_reason"] == "length"
            self.check(waiting.result(), 503, "no token was written in the time")


class TestLoad:
    def test_64_streams_beside_clients_of_all_kinds(self):
        """None is lost or mixed up, and nobody notices who vanishes or asks for the impossible."""
        prompts = [f"{'Once upon a time '[: 4 + i % 4]}{i:03}" for i in range(64)]
        expected = {}
        for length in range(4):
            mine = [prompt for prompt in prompts if len(prompt) == 7 + length]
            expected |= dict(zip(mine, greedy(mine, 24), strict=True))

        async def stream(client, prompt):
            text = ""
            options = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0, "stream": True}
            async for chunk in await client.completions.create(**options):
                text += chunk.choices[0].text
            return text

        async def all_of_them(served):
            async with openai.AsyncOpenAI(base_url=f"{served.root}/v1", api_key="none", max_retries=0) as client:
                texts = [stream(client, prompt) for prompt in prompts]
                return await asyncio.gather(*texts, asyncio.to_thread(trouble, served))

        def trouble(served):
            for body, status, _ in [*BAD[:10], BAD[20]]:
                assert served.post(body).status_code == status
            for after in (0, 1, 200, 2000):
                for streamed in (False, True):
                    vanish(served, {"prompt": "gone", "max_tokens": 4000, "stream": streamed}, after if streamed else 0)

        with serving() as served:
            *texts, _ = asyncio.run(all_of_them(served))
            assert dict(zip(prompts, texts, strict=True)) == expected
            until(lambda: served.engine.running == served.engine.waiting == 0)  # long before 4,000 tokens each
            assert served.engine.finished["length"] == 64
            assert served.engine.finished["cancelled"] == served.engine.finished.total() - 64 > 0
            assert served.engine.written_tokens < 64 * 24 + 4000

    def test_a_client_that_vanishes_takes_its_text_along(self, served):
        before = served.engine.finished["cancelled"]
        for number, (streamed, after) in enumerate([(True, 1), (True, 300), (False, 0)], 1):
            vanish(served, {"prompt": "gone", "max_tokens": 4000, "stream": streamed}, after)
            until(lambda number=number: served.engine.finished["cancelled"] == before + number)


class TestEnd:
    def test_a_signal_lets_streams_finish_and_refuses_new_ones(self):
        (expected,) = greedy(["Once"], 400)
        with serving() as served:
            stream = served.complete(max_tokens=400, stream=True)
            text = next(stream).choices[0].text
            served.server.handle_exit(signal.SIGTERM, None)
            until(lambda: served.engine.closing)
            refused, health = served.post({"prompt": "a"}), httpx.get(f"{served.root}/health")
            text += "".join(chunk.choices[0].text for chunk in stream)
            assert text == expected
            assert (refused.status_code, health.status_code) == (503, 503)
            assert refused.json()["error"]["message"] == "the server is closing"
            assert health.json()["status"] == "closing"
            served.thread.join(20)
            assert not served.thread.is_alive()

    def test_after_the_grace_streams_end_with_an_error(self):
        with serving(grace=0.05) as served:
            stream = served.complete(max_tokens=4096, stream=True)
            next(stream)
            served.server.handle_exit(signal.SIGTERM, None)
            with pytest.raises(openai.APIError, match="closing"):
                list(stream)
            served.thread.join(20)
            assert not served.thread.is_alive()

    def test_a_second_signal_does_not_wait(self):
        with serving(grace=1000) as served:
            stream = served.complete(max_tokens=4096, stream=True)
            next(stream)
            served.server.handle_exit(signal.SIGTERM, None)
            until(lambda: served.engine.closing)
            served.server.handle_exit(signal.SIGTERM, None)
            with pytest.raises(openai.APIError, match="closing"):
                list(stream)
            served.thread.join(20)
            assert not served.thread.is_alive()

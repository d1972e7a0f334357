"""Many streams of one server at a time, for `bench_serving`: python streams_client.py PORT STREAMS PROMPT_TOKENS TOKENS

A process of its own, with nothing but the standard library, so that it takes as little as it can from the server.
Prints one line of JSON: seconds, tokens, and the seconds to the first token of each stream.
"""

import asyncio
import json
import sys
import time


async def read_stream(port: int, prompt: list[int], tokens: int) -> tuple[int, float]:
    """Number of pieces of the text, and when the first one came."""
    body = {"model": "bench", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    first, last = None, b""
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            first, last = first or time.perf_counter(), line
    writer.close()
    return json.loads(last[6:])["usage"]["completion_tokens"], first


async def main(port: int, streams: int, length: int, tokens: int) -> None:
    prompts = [[(17 * row + 7 * i) % 4096 for i in range(length)] for row in range(streams)]
    start = time.perf_counter()
    found = await asyncio.gather(*(read_stream(port, prompt, tokens) for prompt in prompts))
    seconds = time.perf_counter() - start
    firsts = [first - start for _, first in found]
    print(json.dumps({"seconds": seconds, "tokens": sum(count for count, _ in found), "first_token": firsts}))


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))

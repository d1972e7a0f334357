"""The harness beside lm-eval's own `HFLM`, request by request, and what the model is given to read."""

import logging
import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_teachers import new_teacher
from tokenizers.processors import TemplateProcessing
from transformers import RwkvConfig, RwkvForCausalLM

from lm_zoo import ZooConfig, ZooForCausalLM
from lm_zoo.errors import UserError
from lm_zoo.eval.harness import memory, readers
from lm_zoo.eval.harness.adapter import HarnessLM
from lm_zoo.eval.harness.generation import StopAtText
from lm_zoo.eval.harness.tree import SHORTEST, context_tree, prefix_tree
from lm_zoo.linearized import LinearizedForCausalLM
from lm_zoo.train.tokenizers import byte_tokenizer

WORDS = ["the", "state", "gate", "token", "decay", "key", "value", "chunk", "scan", "of", "in", "forgets", "wörte"]
POSITIONS = 160


def zoo(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 3, "initializer_range": 0.1}
    return ZooForCausalLM(ZooConfig(**sizes | options)).double().eval()


def hybrid():
    mixers = {"gated_deltanet": {"num_heads": 2}, "mamba": {}, "attention": {"num_heads": 2, "window": 24}}
    return zoo(mixers=mixers)


def student():
    torch.manual_seed(0)
    teacher = new_teacher("llama", vocab_size=258, max_position_embeddings=POSITIONS)
    options = {"window": 4, "window_kind": "sliding"}
    return LinearizedForCausalLM.from_teacher(teacher, "hybrid", options, [1]).double().eval()


def transformer(family: str):
    return new_teacher(family, vocab_size=258, max_position_embeddings=POSITIONS).double().eval()


def rwkv():
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "context_length": POSITIONS}
    return RwkvForCausalLM(RwkvConfig(**sizes)).double().eval()


MODELS = {
    "zoo": hybrid,
    "student": student,
    "llama": lambda: transformer("llama"),
    "mistral": lambda: transformer("mistral"),  # a sliding window
    "gpt2": lambda: transformer("gpt2"),  # learned positions
    "rwkv": rwkv,  # a state that cannot be forked from here
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(autouse=True)
def quiet():
    logging.disable()  # HFLM warns of all that it is not
    yield
    logging.disable(logging.NOTSET)


def sentence(generator: random.Random, words: int) -> str:
    return " ".join(generator.choices(WORDS, k=words))


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, argument, number) for number, argument in enumerate(arguments)]


def choices() -> list[tuple[str, str]]:
    """Contexts with several answers each, some with a long beginning in common, and everything that is special."""
    generator = random.Random(0)
    header = sentence(generator, 6) + "\n"
    pairs = []
    for number in range(5):
        context = header * (number < 3) + sentence(generator, generator.randint(1, 8))
        pairs += [(context, " " + sentence(generator, generator.randint(1, 3))) for _ in range(3)]
        pairs += [(context, letter) for letter in "xy"]  # answers of one token
    pairs += [("", "an empty context"), ("", "<|endoftext|>marked"), ("<|endoftext|>a mark of its own", " b")]
    pairs += [("spaces at the end  ", "x"), (header, "y"), pairs[0], ("a", " b"), (header * 3, "é" * 5)]
    generator.shuffle(pairs)
    return pairs


def beside_hflm(model, method: str, arguments: list[tuple], tokenizer=None, **options) -> tuple[list, list, HarnessLM]:
    tokenizer = tokenizer or byte_tokenizer()
    lm = HarnessLM(model, tokenizer, batch_size=4, **options)
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=options.get("max_length"))
    actual, expected = (getattr(one, method)(instances(method, arguments), disable_tqdm=True) for one in (lm, plain))
    return actual, expected, lm


def test_loglikelihoods_are_those_of_hflm(model):
    actual, expected, lm = beside_hflm(model, "loglikelihood", choices())
    assert [nats for nats, _ in actual] == pytest.approx([nats for nats, _ in expected], rel=1e-9)
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    assert (lm.work.read < 0.6 * lm.work.asked) == (model.config.model_type != "rwkv")


def test_what_greedy_decoding_would_write_is_told_from_the_rest(model):
    tokenizer = byte_tokenizer()
    context = "the gate"
    ids = tokenizer(context, return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=257)[0, ids.shape[1] :].tolist()
    pairs = [(None, ids[0].tolist(), written), (None, ids[0].tolist(), [*written[:-1], (written[-1] + 1) % 256])]
    answers = HarnessLM(model, tokenizer)._loglikelihood_tokens(pairs)
    assert [greedy for _, greedy in answers] == [True, False]


def test_long_contexts_are_cut_where_hflm_cuts_them(model):
    generator = random.Random(1)
    pairs = [(sentence(generator, words), " gate") for words in (2, 9, 12, 30)]
    actual, expected, lm = beside_hflm(model, "loglikelihood", pairs, max_length=48)
    assert [nats for nats, _ in actual] == pytest.approx([nats for nats, _ in expected], rel=1e-9)
    assert lm.texts_cut == sum(len((context + " gat").encode()) > 48 for context, _ in pairs) == 2


def test_rolling_loglikelihoods_are_those_of_hflm(model):
    generator = random.Random(2)
    texts = [(sentence(generator, words),) for words in (1, 7, 30)] + [("<|endoftext|>marked",)]
    for options in ({"max_length": 33}, {}):
        actual, expected, _ = beside_hflm(model, "loglikelihood_rolling", texts, **options)
        assert actual == pytest.approx(expected, rel=1e-9)


def test_a_tokenizer_that_marks_the_start_marks_it_once():
    tokenizer = byte_tokenizer()
    mark = ("<|endoftext|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{mark[0]} $A", special_tokens=[mark])
    assert tokenizer("a")["input_ids"] == [mark[1], 97]
    model = hybrid()
    actual, expected, _ = beside_hflm(model, "loglikelihood", choices(), tokenizer)
    assert [nats for nats, _ in actual] == pytest.approx([nats for nats, _ in expected], rel=1e-9)
    for text in ("gate", "<|endoftext|>gate"):  # of a batch HFLM looks at the first text only
        actual, expected, _ = beside_hflm(model, "generate_until", [(text, {"max_gen_toks": 3})], tokenizer)
        assert actual == expected
        actual, expected, _ = beside_hflm(model, "loglikelihood_rolling", [(text,)], tokenizer)
        assert actual == pytest.approx(expected, rel=1e-9)


def test_in_float32_the_difference_is_rounding():
    model = hybrid().float()
    actual, expected, _ = beside_hflm(model, "loglikelihood", choices())
    assert [nats for nats, _ in actual] == pytest.approx([nats for nats, _ in expected], abs=1e-4)


def test_texts_are_those_that_hflm_writes(model):
    generator = random.Random(3)
    header = sentence(generator, 5)
    contexts = [header + sentence(generator, words) for words in (1, 3, 3, 6)] + ["a", header, header]
    kinds = [{"until": ["e", "zz"], "max_gen_toks": 9}, {"until": [], "max_gen_toks": 5, "do_sample": False}]
    actual, expected, _ = beside_hflm(model, "generate_until", [(one, kind) for kind in kinds for one in contexts])
    assert actual == expected
    assert len(set(actual)) > 3
    assert all("e" not in text for text in actual[: len(contexts)])
    assert written(model, "", 5) == written(model, "<|endoftext|>", 5)  # no context: where a document begins


@pytest.mark.parametrize("stop", ["é", "gate", "a b"])
def test_a_row_stops_as_soon_as_a_stop_string_stands_there(stop):
    tokenizer = byte_tokenizer()
    criterion = StopAtText(tokenizer, [stop], prompt=2)
    texts = [f"{stop}xxxx{stop}", f"xxxx{stop[:-1]}-", f"xxxxx{stop}xxxxxxxxxxxxxxxx"]
    ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")["input_ids"]
    assert criterion(ids, None).tolist() == [True, False, False]


def test_each_shared_beginning_is_read_once(monkeypatch):
    model, tokenizer = hybrid(), byte_tokenizer()
    lm = HarnessLM(model, tokenizer, batch_size=2)
    context = "c" * 100
    pairs = [(context, answer) for answer in ("abcd", "efgh", "i", "j")]
    pairs += [(context + "d" * 40, answer) for answer in ("abcd", "efgh")]
    lm.loglikelihood(instances("loglikelihood", pairs))
    # of an answer all but its last token is read
    assert lm.work.read == 100 + 2 * 3 + 40 + 2 * 3
    assert lm.work.asked == sum(len(context) + len(answer) - 1 for context, answer in pairs)
    lm, generate, rows = HarnessLM(model, tokenizer, batch_size=2), model.generate, []
    monkeypatch.setattr(model, "generate", lambda ids, **options: rows.append(len(ids)) or generate(ids, **options))
    contexts = [context + end for end in ("ab", "cd", "ef", "e")]
    lm.generate_until(instances("generate_until", [(one, {"max_gen_toks": 2}) for one in contexts]))
    assert lm.work.read == 100 + 3  # generate() reads the last token of each by itself
    assert sorted(rows) == [1, 1, 2]


def test_long_texts_are_read_in_pieces(monkeypatch):
    model = hybrid()
    expected = HarnessLM(model, byte_tokenizer()).loglikelihood(instances("loglikelihood", choices()))
    monkeypatch.setattr(readers, "PREFILL_CHUNK", 7)
    actual = HarnessLM(model, byte_tokenizer()).loglikelihood(instances("loglikelihood", choices()))
    assert [nats for nats, _ in actual] == pytest.approx([nats for nats, _ in expected], rel=1e-9)


def test_read_twice_gives_every_context_twice(model):
    pairs = [(context, answer) for context, answer in choices() if len(context) < 60]
    twice = [(f"{context}\n{context}" if context else "", answer) for context, answer in pairs]
    tokenizer = byte_tokenizer()
    actual = HarnessLM(model, tokenizer, read_twice=True).loglikelihood(instances("loglikelihood", pairs))
    assert actual == HarnessLM(model, tokenizer).loglikelihood(instances("loglikelihood", twice))
    assert written(model, "gate", 4, read_twice=True) == written(model, "gate\ngate", 4)


def test_prefix_is_the_whole_context():
    model, tokenizer = zoo(mixers={"linear_attention": {"num_heads": 2}}), byte_tokenizer()
    pairs = [("the gate forgets", answer) for answer in (" it", " the key", "!")] + [("scan", " of")]
    lm = HarnessLM(model, tokenizer, prefix=True)
    actual = [nats for nats, _ in lm.loglikelihood(instances("loglikelihood", pairs))]
    expected = []
    for context, answer in pairs:
        ids = tokenizer(context + answer, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids, prefix_length=len(context)).logits[0, len(context) - 1 : -1]
        expected.append(-torch.nn.functional.cross_entropy(logits, ids[0, len(context) :], reduction="sum").item())
    assert actual == pytest.approx(expected, rel=1e-9)
    causal = HarnessLM(model, tokenizer).loglikelihood(instances("loglikelihood", pairs))
    assert actual != pytest.approx([nats for nats, _ in causal], rel=1e-3)
    assert lm.work.read == sum(map(len, ("the gate forgets", " i", " the ke", "scan", " o")))

    ids = tokenizer("the gate", return_tensors="pt")["input_ids"]
    output = model.generate(ids, prefix_length=8, max_new_tokens=6, do_sample=False, pad_token_id=257)
    expected = tokenizer.decode(output[0, 8:], skip_special_tokens=True)
    assert written(model, "the gate", 6, prefix=True) == [expected] != written(model, "the gate", 6)


def paths(nodes, sequences, before=()):
    for node in nodes:
        own = [tuple(sequences[member][node.start : node.end]) for member in node.members]
        assert len(set(own)) == 1
        assert own[0]
        assert len(before) == node.start
        ended = [member for member in node.members if len(sequences[member]) == node.end]
        yield from ((member, (*before, *own[0])) for member in ended)
        below = [member for child in node.children for member in child.members]
        assert sorted(below + ended) == sorted(node.members)
        yield from paths(node.children, sequences, (*before, *own[0]))


@pytest.mark.parametrize("shortest", [1, 3, SHORTEST])
def test_every_path_down_the_tree_is_a_sequence(shortest):
    generator = random.Random(4)
    for letters in (1, 2, 3):
        sequences = [generator.choices(range(letters), k=generator.randint(1, 40)) for _ in range(60)]
        roots = prefix_tree(sequences, shortest)
        assert sorted(paths(roots, sequences)) == sorted((n, tuple(tokens)) for n, tokens in enumerate(sequences))
        inner = [node for node in nodes_of(roots) if node.children]
        assert all(node.end - node.start >= shortest for node in inner)
        assert inner or shortest == SHORTEST
        contexts = [generator.randint(1, len(tokens)) for tokens in sequences]
        pairs = sorted(paths(context_tree(sequences, contexts), sequences))
        assert pairs == sorted((n, tuple(tokens)) for n, tokens in enumerate(sequences))


def nodes_of(nodes):
    for node in nodes:
        yield node
        yield from nodes_of(node.children)


def test_a_chain_of_prefixes_needs_no_deep_stack():
    sequences = [[1] * length for length in range(1, 3000, 2)]
    assert sum(len(node.members) > 1 for node in nodes_of(prefix_tree(sequences))) > 100


def scores(model, pairs, **options):
    return HarnessLM(model, byte_tokenizer(), **options).loglikelihood(instances("loglikelihood", pairs))


def written(model, context, new, **options):
    request = instances("generate_until", [(context, {"max_gen_toks": new})])
    return HarnessLM(model, byte_tokenizer(), **options).generate_until(request)


def test_refuses_what_the_model_cannot_take():
    model = transformer("llama")
    with pytest.raises(
        UserError, match=r"a text of 200 tokens exceeds the model's 160 positions; give --max-length 160"
    ):
        scores(model, [("x" * 200, "y")])
    with pytest.raises(UserError, match="a text of 150 tokens and 20 to be written exceeds the model's 160 positions"):
        written(model, "x" * 150, 20)
    with pytest.raises(UserError, match="max_length 30 leaves no room for a context: the task asks for 40 new tokens"):
        written(model, "x" * 150, 40, max_length=30)
    with pytest.raises(UserError, match="an answer of 40 tokens does not fit into max_length 30"):
        scores(model, [("x", "y" * 40)], max_length=30)
    with pytest.raises(UserError, match="max_length 161 exceeds the model's 160 positions"):
        scores(model, [], max_length=161)
    with pytest.raises(UserError, match="max_length must be at least 2"):
        scores(model, [], max_length=1)
    with pytest.raises(UserError, match="an answer or a context without tokens"):
        scores(model, [("x", "")])
    with pytest.raises(UserError, match="prefix needs a model of lm_zoo, got a LlamaForCausalLM"):
        scores(model, [], prefix=True)
    for option in ("read_twice", "prefix"):
        with pytest.raises(UserError, match=f"{option} is about contexts"):
            HarnessLM(hybrid(), byte_tokenizer(), **{option: True}).loglikelihood_rolling([])


def test_refuses_batches_beyond_the_memory(monkeypatch):
    model = hybrid()
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**6)
    with pytest.raises(UserError, match=r"a batch of 8 texts of 400 tokens takes at least .* a smaller --batch-size"):
        scores(model, [(letter * 400, "x") for letter in "abcdefgh"])
    assert scores(model, [(letter * 400, "x") for letter in "abcdefgh"], batch_size=1)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_an_allocation_that_fails_says_what_to_do(monkeypatch, error):
    model = hybrid()

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(UserError, match="does not suffice for batches of 16 texts: give a smaller --batch-size"):
        scores(model, [("a", "b")])
    monkeypatch.setattr(model.model, "forward", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scores(model, [("a", "b")])


def test_free_memory_knows_the_containers_limit(monkeypatch, tmp_path):
    files = {"memory.max": "5000000", "memory.current": "3000000", "memory.stat": "anon 1\ninactive_file 1000000"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free_memory(torch.device("cpu")) == 3_000_000
    (tmp_path / "memory.max").write_text("max")
    assert memory.free_memory(torch.device("cpu")) == 4_096_000
    (tmp_path / "meminfo").unlink()
    assert memory.free_memory(torch.device("cpu")) is None

"""Caches on disk: what is loaded goes on as what was saved would, and what is no state of the model is refused."""

import copy
import pickle

import pytest
import torch
from plain_mixer import plain_mixer
from safetensors.torch import save_file
from tiny_teachers import new_teacher
from transformers import AutoModelForCausalLM

from lm_zoo import LinearizedForCausalLM, ZooCache
from lm_zoo.cache_files import model_hash
from lm_zoo.errors import UserError

LINEARIZED = {
    "plain": {},
    "sliding": {"window": 4, "window_kind": "sliding"},
    "terrace": {"window": 3},
    "mamba2": {},
}


@pytest.fixture(autouse=True, scope="module")
def _plain_mixer():
    with plain_mixer():
        yield


def student(mixer="terrace", teacher="qwen2"):
    """Layers 0 and 2 replaced; layer 1, a local one in some families, keeps its softmax."""
    base = new_teacher(teacher)
    torch.manual_seed(2)
    kind = "hybrid" if mixer in ("sliding", "terrace") else mixer
    return LinearizedForCausalLM.from_teacher(base, kind, LINEARIZED[mixer], keep_layers=[1]).eval()


@torch.no_grad()
def check_goes_on(model, ids, path):
    """Read, save, load, read on: bit for bit as without the file; the rows have different lengths."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = model.init_cache(2)
    model(ids[:, :9], mask[:, :9], past_key_values=cache)
    cache.save(path)
    loaded = ZooCache.load(path, model)
    assert loaded.length == cache.length == 9
    assert loaded.nbytes <= cache.nbytes
    for length in (4, 1, 1):  # pieces, then steps
        piece, ids = ids[:, 9 : 9 + length], torch.cat([ids[:, :9], ids[:, 9 + length :]], dim=1)
        assert torch.equal(model(piece, past_key_values=loaded).logits, model(piece, past_key_values=cache).logits), (
            length
        )
    assert [path.name] == [file.name for file in path.parent.iterdir()]


def test_every_mixer_goes_on(model, tokens, tmp_path):
    check_goes_on(model, tokens(2, 16), tmp_path / "state")


@pytest.mark.parametrize("mixer", LINEARIZED)
def test_every_kind_of_linearized_state_goes_on(mixer, tokens, tmp_path):
    check_goes_on(student(mixer), tokens(2, 16), tmp_path / "state")


def test_a_learned_position_goes_on(tokens, tmp_path):
    check_goes_on(student("terrace", "gpt2"), tokens(2, 16), tmp_path / "state")


@pytest.mark.parametrize("kind", ["zoo", "linearized"])
def test_a_folder_is_the_same_model(kind, make_model, tokens, tmp_path):
    model = make_model("hybrid") if kind == "zoo" else student("sliding")
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=model.dtype)
    assert model_hash(again) == model_hash(model)
    cache = model.init_cache(1)
    model(tokens(1, 5), past_key_values=cache)
    cache.save(tmp_path / "state")
    assert ZooCache.load(tmp_path / "state", again).length == 5


def changed(model, how):
    other = copy.deepcopy(model)
    if how == "a weight":
        other.model.layers[1].mixer.q_proj.weight.data[0, 0] += 1e-9
    elif how == "an option":
        other.config.norm_eps *= 2
    else:
        other.float()
    return other


@pytest.mark.parametrize("how", ["a weight", "an option", "the dtype"])
def test_another_model_is_refused(how, make_model, tokens, tmp_path):
    model = make_model("hybrid")
    cache = model.init_cache(1)
    cache.save(tmp_path / "state")
    with pytest.raises(UserError, match="holds the state of another model") as refusal:
        ZooCache.load(tmp_path / "state", changed(model, how))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kept", [0, 4, 300, -1])
def test_a_truncated_file_is_refused(kept, make_model, tmp_path):
    model, path = make_model("gla"), tmp_path / "state"
    model.init_cache(1).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="is no state file, or cut short"):
        ZooCache.load(path, model)


def test_other_files_are_refused(make_model, tmp_path):
    model, path = make_model("gla"), tmp_path / "state"
    with pytest.raises(FileNotFoundError):
        ZooCache.load(path, model)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="is no state file of this version"):
        ZooCache.load(path, model)
    about = {"format": "lm_zoo cache", "version": "1", "model": model_hash(model), "length": "0"}
    save_file({"0.S": torch.zeros(1)}, path, metadata=about)
    with pytest.raises(UserError, match="lacks tensors of the state"):
        ZooCache.load(path, model)


def test_a_failed_save_leaves_the_earlier_file(make_model, tmp_path, monkeypatch):
    model, path = make_model("gla"), tmp_path / "state"
    model.init_cache(1).save(path)
    before = path.read_bytes()

    def dies(tensors, unfinished, metadata):
        unfinished.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr("lm_zoo.cache_files.save_file", dies)
    with pytest.raises(OSError, match="no space"):
        model.init_cache(2).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_copies_know_their_model_and_pickles_do_not(make_model, tmp_path):
    model = make_model("gla")
    cache = model.init_cache(1)
    for known in (cache.fork(2), cache.clone(), cache.select(torch.tensor([0, 0, 0]))):
        known.save(tmp_path / "state")
        assert ZooCache.load(tmp_path / "state", model).batch_size == known.batch_size
    with pytest.raises(ValueError, match="no longer knows its model"):
        pickle.loads(pickle.dumps(cache)).save(tmp_path / "state")


@torch.no_grad()
def test_a_file_has_no_room_to_grow(make_model, tokens, tmp_path):
    model = make_model("attention")
    cache = model.init_cache(1)
    model(tokens(1, 65), past_key_values=cache)  # two blocks of 64 slots
    cache.save(tmp_path / "state")
    assert ZooCache.load(tmp_path / "state", model).nbytes * 1.9 < cache.nbytes

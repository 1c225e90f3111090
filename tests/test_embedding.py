"""embed: each text of a list has the vector that it has alone, and nothing is written outside the batch."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from llama_cpp import (
    LLAMA_POOLING_TYPE_CLS,
    LLAMA_POOLING_TYPE_LAST,
    LLAMA_POOLING_TYPE_MEAN,
    LLAMA_POOLING_TYPE_NONE,
)

from pydeltamem import Conversation, DeltaMemLlama, InputError
from refusals import refuses

TEXTS = ["hello there", "how are you today", "a", "one two three four five six seven", "hello there"]
NONE, MEAN = LLAMA_POOLING_TYPE_NONE, LLAMA_POOLING_TYPE_MEAN
CLS, LAST = LLAMA_POOLING_TYPE_CLS, LLAMA_POOLING_TYPE_LAST
NEAR = dict(rtol=1e-3, atol=1e-4)


@pytest.fixture
def embedder(make_llm):
    def make(pooling, case="tsw_qo", **kwargs):
        llm = make_llm(case, embedding=True, pooling_type=pooling, type_k=0, type_v=0, **kwargs)
        if case is not None:
            llm.memory.state = np.random.default_rng(0).standard_normal(llm.memory.shape)
        return llm

    return make


@pytest.mark.parametrize("case", [None, "tsw_qo", "ssw_message", "msw4_deferred", "msw4_replies"])
@pytest.mark.parametrize("pooling", [NONE, MEAN, LAST, CLS])
@pytest.mark.parametrize("n_batch", [64, 20])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_list_is_its_texts(embedder, case, pooling, n_batch, normalize):
    llm = embedder(pooling, case, n_batch=n_batch)
    assert sum(len(llm.tokenize(text.encode())) for text in TEXTS) > n_batch or n_batch > 20
    together, n_tokens = llm.embed(TEXTS, normalize=normalize, return_count=True)
    alone = [llm.embed(text, normalize=normalize) for text in TEXTS]
    assert n_tokens == sum(len(llm.tokenize(text.encode())[:n_batch]) for text in TEXTS)
    for text, vector, other in zip(TEXTS, together, alone):
        n = len(llm.tokenize(text.encode())[:n_batch])
        assert np.shape(vector) == ((n, llm.n_embd()) if pooling == NONE else (llm.n_embd(),))
        np.testing.assert_allclose(vector, other, **NEAR)
    if pooling != CLS:  # all begin with one token
        assert not np.allclose(np.ravel(together[0])[-1], np.ravel(together[1])[-1], **NEAR)
    if normalize:
        np.testing.assert_allclose(np.linalg.norm(together[1], axis=-1), 1, rtol=1e-6)
    data = llm.create_embedding(TEXTS)
    assert [each["index"] for each in data["data"]] == list(range(5)) and data["usage"]["total_tokens"] == n_tokens


def test_vectors_without_pooling_are_those_that_are_pooled(embedder):
    tokens = embedder(NONE).embed(TEXTS)
    np.testing.assert_allclose(embedder(MEAN).embed(TEXTS), [np.mean(rows, axis=0) for rows in tokens], **NEAR)
    np.testing.assert_allclose(embedder(LAST).embed(TEXTS), [rows[-1] for rows in tokens], **NEAR)


@pytest.mark.parametrize("pooling", [NONE, MEAN, LAST])
def test_micro_batches(embedder, pooling):
    """What is pooled is not cut by them."""
    whole, cut = embedder(pooling, n_batch=64), embedder(pooling, n_batch=64, n_ubatch=10)
    texts = TEXTS if pooling != MEAN else [text[:12] for text in TEXTS]
    for expected, found in zip(whole.embed(texts), cut.embed(texts)):
        n = min(len(expected), len(found))
        np.testing.assert_allclose(found[:n], expected[:n], **NEAR)


def test_a_text_that_is_too_long(embedder):
    llm, cut = embedder(MEAN, n_batch=20), embedder(MEAN, n_batch=20, n_ubatch=10)
    for model in (llm, cut):
        assert len(model.embed("one two three four " * 10)) == model.n_embd()
        with refuses(InputError, "text 1"):
            model.embed(["one", "one two three four " * 10], truncate=False)


def test_a_text_longer_than_its_share_of_the_context(make_llm):
    llm = make_llm(embedding=True, pooling_type=MEAN, n_ctx=256, n_batch=1024, n_seq_max=2)
    assert len(llm.embed(["hello " * 400, "one"])) == 2


@pytest.mark.parametrize("n_ctx, n_batch", [(512, 400), (384, 384), (300, 512)])
def test_a_batch_that_no_power_of_two_divides(make_llm, n_ctx, n_batch):
    llm = make_llm(embedding=True, pooling_type=MEAN, n_ctx=n_ctx, n_batch=n_batch)
    usual = make_llm(embedding=True, pooling_type=MEAN, n_ctx=512, n_batch=512)
    texts = ["one", "two three"]
    np.testing.assert_allclose(llm.embed(texts), usual.embed(texts), rtol=1e-4, atol=1e-6)


# texts of nothing


@pytest.mark.parametrize("case", [None, "tsw_qo"])
@pytest.mark.parametrize("pooling", [NONE, MEAN])
def test_no_texts(embedder, case, pooling):
    llm = embedder(pooling, case)
    assert llm.embed([]) == []
    assert llm.embed([], return_count=True) == ([], 0)
    assert llm.create_embedding([])["data"] == []
    assert len(llm.embed(["hello"])) == 1


def test_empty_texts_without_pooling(embedder):
    """A vector for each token: none."""
    llm = embedder(NONE)
    assert llm.embed("") == [] and llm.embed(["", ""]) == [[], []]
    found = llm.embed(["", "hello there", "", "how are you", ""])
    assert found[0] == found[2] == found[4] == []
    np.testing.assert_allclose(found[1], llm.embed("hello there"), **NEAR)
    np.testing.assert_allclose(found[3], llm.embed("how are you"), **NEAR)


@pytest.mark.parametrize(("texts", "which"), [("", "text 0"), (["", "a"], "text 0"), (["a", "b", ""], "text 2")])
def test_empty_texts_have_nothing_to_be_pooled(embedder, texts, which):
    llm = embedder(MEAN)
    state, expected = llm.memory.state, llm.embed("hello")
    with refuses(InputError, which):
        llm.embed(texts)
    np.testing.assert_array_equal(llm.memory.state, state)
    np.testing.assert_allclose(llm.embed("hello"), expected, **NEAR)


def test_an_empty_text_of_a_model_that_begins_texts(embedder):
    """It is that token."""
    llm = embedder(MEAN, kv_overrides={"tokenizer.ggml.add_bos_token": True})
    assert len(llm.embed("")) == llm.n_embd()
    np.testing.assert_allclose(llm.embed(["a", ""])[1], llm.embed(""), **NEAR)


@pytest.mark.parametrize("texts", [[1], [["a"]], [b"a"], [None]])
def test_what_is_no_text(embedder, texts):
    with refuses(InputError, "text 0"):
        embedder(MEAN).embed(texts)


def test_a_model_that_was_not_loaded_for_it(llm):
    llm.eval([5, 6])
    with refuses(InputError, "embedding=True"):
        llm.embed("hello")
    assert llm.n_tokens == 2


def test_more_texts_than_sequences(embedder):
    llm = embedder(MEAN, n_ctx=256, n_batch=16)
    texts = [f"{i}" for i in range(40)]
    together = llm.embed(texts)
    for i in (0, 15, 16, 17, 39):
        np.testing.assert_allclose(together[i], llm.embed(texts[i]), **NEAR)


def test_the_text_is_forgotten_and_the_memory_kept(embedder):
    llm = embedder(MEAN)
    llm.eval([5, 6, 7])
    state = llm.memory.state
    llm.embed(TEXTS)
    assert llm.n_tokens == 0
    np.testing.assert_array_equal(llm.memory.state, state)
    llm.eval([5, 6, 7])
    assert np.abs(llm.memory.state - state).max() > 0


def test_a_text_is_read_beside_embeddings(make_llm):
    """The model computes no logits then, but the memory reads as ever."""
    states = []
    for embedding in (True, False):
        llm = make_llm(embedding=embedding, type_k=0, type_v=0)
        llm.eval([5, 6, 7, 8])
        states.append(llm.memory.state)
    assert states[0].any()
    np.testing.assert_allclose(*states, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_seq_max", [1, 2])
def test_full_texts_beside_embeddings(make_llm, n_seq_max):
    """llama_cpp gives such a context more sequences than its KV cache has room for."""
    llm = make_llm(embedding=True, n_ctx=256, n_seq_max=n_seq_max)
    assert llm.n_ctx() == 256
    talks = [Conversation(llm, n_predict=4, temp=0.0) for _ in range(3)]
    for i in range(12):
        for talk in talks:
            talk.say(f"this is message number {i}, and it is a long one")
    assert all(talk.n_dropped > 0 and talk.n_tokens <= 256 for talk in talks)
    assert len(llm.embed(["one", "two"])) == 2
    llm.eval([5] * 256)
    fork = talks[0].fork()
    state = talks[0].memory.state
    fork.say("how are you")
    np.testing.assert_array_equal(talks[0].memory.state, state)


#
# encoders
#


@pytest.fixture
def bert(tmp_path):
    """A tiny random BERT in PyTorch, and its GGUF."""
    import torch
    import transformers

    torch.manual_seed(0)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"\u2581{word}" for word in ("hello", "there", "how", "are", "you")]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(words), **sizes, max_position_embeddings=64, layer_norm_eps=1e-6)
    model = transformers.BertModel(config).eval()
    writer = gguf.GGUFWriter(tmp_path / "bert.gguf", "bert")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-6)
    writer.add_causal_attention(False)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(words)
    writer.add_token_types([3] * 5 + [1] * 5)
    writer.add_token_type_count(2)
    for name, i in (("pad", 0), ("unk", 1), ("bos", 2), ("eos", 3), ("sep", 3), ("mask", 4)):
        getattr(writer, f"add_{name}_token_id")(i)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, 2)
    for name, weights in model.state_dict().items():
        if (ours := names.get_name(name, try_suffixes=(".weight", ".bias"))) is not None:
            writer.add_tensor(ours, weights.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, tmp_path / "bert.gguf"


def test_an_encoder_agrees_with_pytorch(bert):
    """It has no KV cache and no logits: what evaluates tokens takes them all the same, and changes no vector."""
    import torch

    model, path = bert
    texts = ["hello there", "how are you", "you"]
    with DeltaMemLlama(path, embedding=True, pooling_type=MEAN, n_ctx=64, n_seq_max=2, verbose=False) as llm:
        with torch.no_grad():
            ids = [torch.tensor([llm.tokenize(text.encode())]) for text in texts]
            expected = [model(each).last_hidden_state[0].mean(0).numpy() for each in ids]
        assert len(set(map(tuple, expected))) == 3
        for _ in range(2):
            np.testing.assert_allclose(llm.embed(texts), expected, rtol=1e-3, atol=1e-3)
            llm.reset()
            llm.eval([5, 6, 7])
            llm.n_tokens = 2
            llm.eval([8])
            assert llm.n_tokens == 3

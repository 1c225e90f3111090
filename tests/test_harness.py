"""lm-evaluation-harness with our models: probabilities against a softmax by hand, and tasks whose data are local."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from pydeltamem import DecodeError, DeltaMemLlama, InputError
from pydeltamem.evals.harness import DeltaMemLM
from pydeltamem.models import default_files
from refusals import refuses

MODEL, ADAPTERS = default_files()


@pytest.fixture(scope="module", params=[None, "msw"])
def lm(request):
    adapter = request.param and str(ADAPTERS[request.param])
    made = DeltaMemLM(str(MODEL), adapter=adapter, n_ctx=256, n_threads=1)
    yield made
    made.llm.close()


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def by_hand(lm, tokens, first, step=1):
    """The log probability of tokens from `first` on, and whether each is the likeliest.

    Each time, `step` tokens are decoded at once, or all anew (0).
    """
    llm = DeltaMemLlama(MODEL, deltamem_path=lm.llm.deltamem_path, n_ctx=256, n_threads=1)
    total, greedy = 0.0, True
    for i in range(1, len(tokens)):
        if step == 0:
            llm.reset()
            if llm.memory.attached:
                llm.memory.reset()
        llm.eval(tokens[:i] if step == 0 else tokens[i - 1 : i])
        if i >= first:
            logits = llm.logits.astype(np.float64)
            total += logits[tokens[i]] - np.log(np.exp(logits).sum())
            greedy = greedy and int(logits.argmax()) == tokens[i]
    llm.close()
    return total, greedy


PAIRS = [
    ("My name is Anna. I live in", " Oslo."),
    ("My name is Anna. I live in", " Rome"),
    ("", "Hello."),
    ("Hi ", "you"),
]


def test_probabilities_are_those_of_the_logits(lm):
    found = lm.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, found):
        before = lm._encode_pair(context, continuation)[0] if context else [lm.prefix_token_id]
        tokens = before + (lm._encode_pair(context, continuation)[1] if context else lm.tok_encode(continuation, False))
        if not context and tokens[1] == lm.prefix_token_id:
            tokens = tokens[1:]
        expected, is_greedy = by_hand(lm, tokens, len(before), step=0)
        assert value == pytest.approx(
            expected, abs=2e-3
        )  # of one to thirty tokens at once, in float32 with Q8_0 weights
        assert greedy == is_greedy
    turned = lm.loglikelihood(requests(*PAIRS[::-1]), disable_tqdm=True)
    assert [value for value, _ in turned] == pytest.approx([value for value, _ in found[::-1]], abs=2e-3)


def test_what_is_empty_and_what_does_not_fit(lm):
    assert lm._loglikelihood_tokens([(None, [5, 6], [])], disable_tqdm=True) == [(0.0, True)]
    with pytest.raises(InputError, match=r"256.*257"):
        lm._loglikelihood_tokens([(None, [5], [6] * 257)], disable_tqdm=True)


@pytest.mark.parametrize("blank", [" ", "\n"])
def test_a_prompt_of_spaces(lm, blank):
    """The harness counts them to what follows, before which nothing is left: it follows the token of an empty one."""
    (blank_before, nothing_before) = lm.loglikelihood(requests((blank, "Oslo."), ("", f"{blank}Oslo.")), True)
    assert blank_before == pytest.approx(nothing_before, abs=1e-6)


def test_an_empty_prompt_is_generated_from(lm):
    """As from the token that begins texts."""
    options = {"until": [], "max_gen_toks": 8}
    first = lm.llm.detokenize([lm.prefix_token_id], special=True).decode()
    empty, begun = lm.generate_until(requests(("", options), (first, options)), disable_tqdm=True)
    assert empty == begun


def test_an_answer_that_leaves_no_room_for_its_prompt(lm, caplog):
    """Else a prompt loses as many of its first tokens as the answer may need, and the log says so."""
    with refuses(InputError, 256, 300):
        lm.generate_until(requests(("I live in", {"until": [], "max_gen_toks": 300})), disable_tqdm=True)
    long = "Anna lives in Oslo. " * 20
    lm.generate_until(requests(("I live in", {"until": ["o"], "max_gen_toks": 200})), disable_tqdm=True)
    assert not caplog.records
    lm.generate_until(requests((long, {"until": ["o"], "max_gen_toks": 200})), disable_tqdm=True)
    n = len(lm.tok_encode(long)) - 56
    assert n > 0 and str(n) in caplog.records[0].getMessage()


def test_a_text_begins_with_a_token_of_the_model(lm):
    """The harness asks for the token before a text that has none."""
    bos, eos = lm.llm.token_bos(), lm.llm.token_eos()
    assert lm.prefix_token_id == (bos if bos >= 0 else eos) and lm.eot_token_id == eos


def test_prompts_are_kept_by_tokenizer_and_chat_template(lm, monkeypatch):
    before = lm.tokenizer_name
    assert before == lm.tokenizer_name
    monkeypatch.setitem(lm.llm.metadata, "tokenizer.chat_template", "{{ messages[0]['content'] }}")
    other = lm.tokenizer_name
    monkeypatch.delitem(lm.llm.metadata, "tokenizer.chat_template")
    assert len({before, other, lm.tokenizer_name}) == 3


def test_a_generation_that_fails_names_its_reason(lm, monkeypatch):
    def fail(jobs, *meanwhile):
        raise DecodeError("no room")

    monkeypatch.setattr(lm.llm._engine.slots, "decode", fail)
    with pytest.raises(DecodeError):
        lm.generate_until(requests(("I live in", {"until": [], "max_gen_toks": 3})), disable_tqdm=True)


def test_the_likeliest_continuation_is_greedy(lm):
    context = "My name is Anna. I live in"
    (said,) = lm.generate_until(requests((context, {"until": [], "max_gen_toks": 3})), disable_tqdm=True)
    ((_, greedy),) = lm.loglikelihood(requests((context, said)), disable_tqdm=True)
    assert greedy
    ((_, greedy),) = lm.loglikelihood(requests((context, " zzz")), disable_tqdm=True)
    assert not greedy


def test_a_cache_has_each_answer_as_soon_as_it_is_known(lm, monkeypatch):
    """lm-eval --use_cache goes on where a killed run stopped."""
    kept = {}
    monkeypatch.setattr(
        lm, "cache_hook", SimpleNamespace(add_partial=lambda what, about, value: kept.update({(what, *about): value}))
    )
    found = lm.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    assert kept == {("loglikelihood", *pair): value for pair, value in zip(PAIRS, found)}
    kept.clear()
    found = lm.loglikelihood_rolling(requests(("Hello.",), ("I live in Oslo.",)), disable_tqdm=True)
    assert list(kept.values()) == found and all(what == "loglikelihood_rolling" for what, _ in kept)


def test_rolling_probabilities_have_every_token_once(lm):
    short = "I live in Oslo and my dog is called Rex."
    tokens = lm.tok_encode(short, add_special_tokens=False)
    (value,) = lm.loglikelihood_rolling(requests((short,)), disable_tqdm=True)
    assert value == pytest.approx(by_hand(lm, [lm.prefix_token_id, *tokens], 1, step=0)[0], rel=1e-3)
    long, n = " ".join([short] * 25), lm.max_length
    tokens = lm.tok_encode(long, add_special_tokens=False)
    assert n < len(tokens) < 2 * n
    (value,) = lm.loglikelihood_rolling(requests((long,)), disable_tqdm=True)
    first, _ = by_hand(lm, [lm.prefix_token_id, *tokens[:n]], 1)
    rest, _ = by_hand(lm, tokens[-n - 1 :], 2 * n + 1 - len(tokens))  # what is left, after as much as fits
    assert value == pytest.approx(first + rest, rel=0.01)  # decoded one by one, which rounds otherwise


def test_generation_ends_at_a_stop(lm):
    context = "Hello."
    (whole,) = lm.generate_until(requests((context, {"until": [], "max_gen_toks": 12})), disable_tqdm=True)
    stop = whole[2:4]
    (cut,) = lm.generate_until(requests((context, {"until": [stop], "max_gen_toks": 12})), disable_tqdm=True)
    assert cut == whole.partition(stop)[0]


def test_sampled_answers(lm):
    """lm-eval's seed decides them, samples of one request differ, and only what a task says cuts the distribution."""

    def samples(options, n=8):
        random.seed(3)
        request = ("I live in", {"until": [], "max_gen_toks": 6, **options})
        return lm.generate_until(requests(*[request] * n), disable_tqdm=True)

    (greedy,) = set(samples({"do_sample": False}))
    for options in ({"temperature": 1.0}, {"do_sample": True}):
        assert samples(options) == samples(options) and len(set(samples(options))) > 4
    assert set(samples({"temperature": 1.0, "top_k": 1})) == {greedy}
    first = samples({"temperature": 5.0, "max_gen_toks": 1}, 100)
    assert len(set(first)) > 50  # of the 40 likeliest by llama_cpp's default


def test_the_temperature_comes_first(lm):
    """As in lm-eval's other models: top-p looks at the distribution that it made flat."""
    context, kept = "I live in", 0.5
    lm._read(lm.tok_encode(context))
    shares = np.sort(np.exp(lm.llm.logits.astype(np.float64)))[::-1]
    n_uncooled = 1 + int(np.searchsorted(np.cumsum(shares) / shares.sum(), kept))
    request = (context, {"until": [], "max_gen_toks": 1, "temperature": 5.0, "top_p": kept})
    said = set(lm.generate_until(requests(*[request] * 40), disable_tqdm=True))
    assert n_uncooled < 20 <= len(said)


def test_options_of_a_task_without_effect_are_logged(lm, caplog):
    request = ("I live in", {"until": [], "max_gen_toks": 1, "num_beams": 4})
    lm.generate_until(requests(request, request), disable_tqdm=True)
    assert [record.args for record in caplog.records if record.levelname == "WARNING"] == [("num_beams",)]


def test_texts_that_are_generated_together_do_not_meet(lm):
    asked = [("I live in", {"until": [], "max_gen_toks": n}) for n in (3, 9, 5, 7, 4, 8)]
    together = lm.generate_until(requests(*asked), disable_tqdm=True)
    assert together == [lm.generate_until(requests(one), disable_tqdm=True)[0] for one in asked]
    assert len(set(map(len, together))) > 2 and all(together[1].startswith(text) for text in together)


def test_the_chat_template(lm):
    prompt = lm.apply_chat_template([{"role": "user", "content": "Hello."}])
    shorter = lm.apply_chat_template([{"role": "user", "content": "Hello."}], add_generation_prompt=False)
    assert "Hello." in prompt and prompt.startswith(shorter) and len(shorter) < len(prompt)


@pytest.mark.parametrize("prefix", ["The answer is", "The answer is ", "A\n"])
@pytest.mark.parametrize("trims", [False, True])
def test_an_answer_whose_beginning_a_task_gives(lm, monkeypatch, prefix, trims):
    """The prompt is that of transformers: it ends where the model goes on, not after the end of the message."""
    content = "m['content'] | trim" if trims else "m['content']"
    template = "{% for m in messages %}<{{ m['role'] }}>{{ " + content + " }}</s>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    monkeypatch.setitem(lm.llm.metadata, "tokenizer.chat_template", template)
    messages = [{"role": "user", "content": "How much?"}, {"role": "assistant", "content": prefix}]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"x": 0})), chat_template=template)
    theirs = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert lm.apply_chat_template(messages, add_generation_prompt=False) == theirs
    assert theirs.endswith(f"<assistant>{prefix.rstrip() if trims else prefix}")
    assert messages[-1]["content"] == prefix


def test_a_chat_template_that_cannot_be_used(lm, monkeypatch):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Yes"}]
    for template in ("{{ raise_exception('no system message') }}", "{{ messages[0]['content'] }}"):
        monkeypatch.setitem(lm.llm.metadata, "tokenizer.chat_template", template)
        with refuses(InputError, lm.llm.model_path):
            lm.apply_chat_template(messages, add_generation_prompt=False)


def test_a_model_without_a_chat_template(base, tmp_path):
    bare = tmp_path / "bare.gguf"
    script = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--force"]
    script += ["--remove-metadata", "tokenizer.chat_template"]
    subprocess.run([*script, str(base()), str(bare)], check=True, capture_output=True)
    lm = DeltaMemLM(str(bare), n_ctx=64, n_threads=1)
    assert lm.chat_template(True) is None
    with pytest.raises(InputError, match=r"bare\.gguf"):
        lm.apply_chat_template([{"role": "user", "content": "Hello."}])
    lm.llm.close()


def test_an_adapter_that_writes_once_a_message(caplog):
    """A request of lm-eval has no messages, so its tokens write one by one, and the log says so."""
    for name, is_noted in (("ssw", True), ("msw", False)):
        caplog.clear()
        lm = DeltaMemLM(str(MODEL), adapter=str(ADAPTERS[name]), n_ctx=64, n_threads=1)
        lm.loglikelihood(requests(("My name is", " Anna.")), disable_tqdm=True)
        lm.llm.close()
        noted = [record.getMessage() for record in caplog.records if record.name == DeltaMemLM.__module__]
        assert len(noted) == is_noted and all(str(ADAPTERS[name]) in note for note in noted)


def test_arguments_that_no_model_has():
    """A misspelt name is refused; what lm-eval itself passes is not."""
    with pytest.raises(InputError, match="adaptor"):
        DeltaMemLM(str(MODEL), adaptor=str(ADAPTERS["msw"]), n_ctx=64, n_threads=1)
    theirs = {"batch_size": 1, "max_batch_size": 4, "device": "cpu", "trust_remote_code": True}
    lm = DeltaMemLM.create_from_arg_string(f"model={MODEL},n_ctx=64,n_threads=1", theirs)
    lm.llm.close()


CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""
GENERATE = """
task: local_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8}}
metric_list: [{{metric: exact_match, ignore_punctuation: true}}]
"""


def test_the_command_line_runs_tasks_with_local_data(tmp_path):
    """As a user runs it: a task of probabilities and one of generation."""
    choices = [{"text": "What colour is snow? Snow is", "choices": ["white", "seven"], "label": 0}] * 2
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(record) + "\n" for record in choices))
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": "I live in", "answer": "x"}) + "\n")
    (tmp_path / "choice.yaml").write_text(CHOICE.format(file=tmp_path / "choice.jsonl"))
    (tmp_path / "words.yaml").write_text(GENERATE.format(file=tmp_path / "words.jsonl"))
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "pydeltamem.evals.harness", "--model", "deltamem", "--model_args",
         f"model={MODEL},adapter={ADAPTERS['msw']},n_ctx=256,n_threads=1", "--tasks", "local_choice,local_words",
         "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")],
        capture_output=True, text=True, env={**os.environ, **environment}, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (found,) = (json.loads(path.read_text()) for path in (tmp_path / "out").rglob("results*.json"))
    assert found["results"]["local_choice"]["acc,none"] == 1
    assert 0 <= found["results"]["local_words"]["exact_match,none"] <= 1

"""deltamem train: padding changes nothing, an interrupted run goes on, errors name bad input."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import transformers
from rich.console import Console

from pydeltamem import train
from pydeltamem.cli import train as command
from pydeltamem.cli.main import main
from pydeltamem.errors import InputError, ModelError, OutputError, TrainingError
from pydeltamem.formats.checkpoint import WEIGHTS, Checkpoint
from pydeltamem.train.model import load_frozen, multiplies_bfloat16
from pydeltamem.train.reference import DeltaMem, DeltaMemConfig
from refusals import check_names, refuses

# of 400 MB all but the last 4, which lie at the heap's end
GAPS = """
import torch
from pydeltamem.train.trainer import release_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

blocks = [torch.ones(1_000_000) for _ in range(100)]
del blocks[:-1]
before = resident()
release_memory()
print(before - resident())
"""
WORDS = ["<|user|>", "<|assistant|>", "<|end|>", "red", "green", "blue", "my", "door", "is", "what", "colour", "yours"]
WORDS += ["hello", "there", "it"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def say(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * len(texts), texts)]


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("hf")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="it"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=TEMPLATE)
    fast.save_pretrained(directory)
    torch.manual_seed(3)
    config = transformers.Qwen3Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = []
    for i in range(40):
        colour = ("red", "green", "blue")[i % 3]
        earlier = say("hello", "hello there") * (i % 4) + say(f"my door is {colour}", "yours")
        ask = say("what colour is my door", f"it is {colour}")
        lines.append(
            {"messages": earlier + ask} if i % 2 else {"messages": earlier, "asks": [ask, say("hello", "yours")]}
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def trainer(hf_dir, data, out, **options):
    options = {"batch": 4, "rank": None if "init" in options else 4, **options}
    return train.Trainer(train.Options(str(hf_dir), str(data), str(out), **options), Console(quiet=True))


@pytest.fixture
def memory(hf_dir):
    def make(strategy):
        model = transformers.AutoModelForCausalLM.from_pretrained(hf_dir).double().eval()
        granularity, heads = train.STRATEGIES[strategy]
        torch.manual_seed(5)
        config = DeltaMemConfig(
            rank=4, num_state_heads=heads, memory_write_granularity=granularity, output_init="random",
            delta_heads=("q", "k", "v", "o"),
        )  # fmt: skip
        memory = DeltaMem(model, config).double()
        with torch.no_grad():
            for name, parameter in memory.named_parameters():
                if "delta" in name:
                    parameter.mul_(40)  # large enough to show in the logits
        return model, memory

    return make


@pytest.mark.parametrize("tail", [0, 2])
@pytest.mark.parametrize("strategy", train.STRATEGIES)
def test_a_batch_computes_what_each_conversation_does(hf_dir, data, memory, strategy, tail):
    model, memory = memory(strategy)
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_dir)
    conversations = train.Conversations(data, tokenizer, tail)
    examples = [conversations[i] for i in (0, 1, 3, 6)]
    together = train.Batch.of(examples, "cpu")
    with torch.no_grad():
        logits = train.answer_logits(model, memory, together)
        rows = iter(logits)
        for example in examples:
            for question, segments, answer in example.asks:
                memory.reset()
                with memory.segments([example.segments]):
                    model(torch.tensor([example.earlier]))
                state = memory.state
                with memory.segments([segments]):
                    asked = model(torch.tensor([question]), use_cache=True)
                expected = [asked.logits[0, -1]]
                for token in answer[:-1]:
                    asked = model(torch.tensor([[token]]), past_key_values=asked.past_key_values, use_cache=True)
                    expected.append(asked.logits[0, -1])
                torch.testing.assert_close(next(rows)[: len(answer)], torch.stack(expected), rtol=0, atol=1e-9)
                assert state.abs().max() > 1e-3
    assert next(rows, None) is None


def test_the_state_is_all_that_the_answer_sees(hf_dir, data, memory):
    """With writes that go nowhere the answers are those of an empty memory; with them they are not."""
    model, memory = memory("tsw")
    conversations = train.Conversations(data, transformers.AutoTokenizer.from_pretrained(hf_dir))
    batch = train.Batch.of([conversations[1]], "cpu")
    with torch.no_grad():
        told = train.answer_logits(model, memory, batch)
        batch.segments[:] = -1
        untold = train.answer_logits(model, memory, batch)
        batch.earlier[:] = 0
        torch.testing.assert_close(train.answer_logits(model, memory, batch), untold, rtol=0, atol=0)
    assert (told - untold).abs().max() > 1e-3


def test_beginning_with_a_checkpoint_of_another_strategy(hf_dir, data, tmp_path):
    first = trainer(hf_dir, data, tmp_path / "tsw", steps=2, heads_gain=1)
    first.train()
    options = {"init": str(tmp_path / "tsw")}
    same = trainer(hf_dir, data, tmp_path / "same", **options)
    other = trainer(
        hf_dir, data, tmp_path / "ssw", **options, strategy="ssw", init_gain=3, write_bias=0.5
    )  # fmt: skip
    assert same.memory.config == first.memory.config
    assert other.memory.config.memory_write_granularity == "message_mean"
    assert other.report().held_out.loss_without > 0
    for a, b, c in zip(first.memory.memories, same.memory.memories, other.memory.memories):
        torch.testing.assert_close(b.state_dict(), a.state_dict(), rtol=0, atol=0)
        expected = {**a.state_dict(), "memory_v_proj": 3 * a.memory_v_proj, "beta_bias": torch.full((4,), 0.5)}
        torch.testing.assert_close(c.state_dict(), expected, rtol=0, atol=0)
    with refuses(InputError, tmp_path / "tsw", 1, "--strategy msw", 4):
        trainer(hf_dir, data, tmp_path / "msw", **options, strategy="msw")


def test_dropout_leaves_features_out_while_training_only(hf_dir, data, tmp_path):
    run = trainer(hf_dir, data, tmp_path / "out", dropout=0.5)
    layer = run.memory.memories[0]
    h = torch.randn(3, 5, layer.memory_q_proj.shape[1])
    kept = layer.eval().project(h)
    torch.manual_seed(0)
    dropped = layer.train().project(h)
    torch.manual_seed(0)
    mask = torch.nn.functional.dropout(torch.ones(3, 1, h.shape[-1]), 0.5)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    layer.eval()
    torch.testing.assert_close(dropped, layer.project(h * mask))  # one mask for the tokens of a sequence
    assert (dropped - kept).abs().max() > 0.1
    run.update()
    assert layer.training
    assert run.report().held_out.loss == run.report().held_out.loss
    assert not layer.training


def test_training_lowers_the_loss_and_writes_a_published_checkpoint(hf_dir, data, tmp_path):
    before = {k: v.clone() for k, v in transformers.AutoModelForCausalLM.from_pretrained(hf_dir).state_dict().items()}
    run = trainer(hf_dir, data, tmp_path / "out", steps=60, rate=0.02)
    begin = run.report()
    assert begin.held_out.loss == pytest.approx(begin.held_out.loss_without)  # corrections begin as zero
    report = run.train()
    assert report.steps == 60 and report.tokens > 0
    assert report.held_out.loss < 0.9 * begin.held_out.loss
    assert report.held_out.loss < report.held_out.loss_without
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the frozen model changed"
    assert Checkpoint(tmp_path / "out").config.rank == 4
    assert {"delta_mem_adapter.pt", "delta_mem_config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_an_interrupted_run_goes_on(hf_dir, data, tmp_path):
    options = {"steps": 20, "save_every": 5, "dropout": 0.3}
    whole = trainer(hf_dir, data, tmp_path / "whole", **options)
    whole.train()
    broken = trainer(hf_dir, data, tmp_path / "broken", **options)
    update = broken.update

    def stop():
        if broken.step == 17:
            raise KeyboardInterrupt
        return update()

    broken.update = stop
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    again = trainer(hf_dir, data, tmp_path / "broken", **options)
    assert again.step == 15
    again.train()
    for name, value in whole.memory.state_dict().items():
        assert torch.equal(value, again.memory.state_dict()[name]), name
    assert len(whole.curve) == 2 and again.curve == whole.curve and again.tokens == whole.tokens


def test_a_tail_stays_visible_and_is_written_once(hf_dir, data):
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_dir)
    plain, tailed, all_of_it = (train.Conversations(data, tokenizer, tail)[1] for tail in (0, 2, 100))
    (question, _, answer), (longer, segments, same) = plain.asks[0], tailed.asks[0]
    assert same == answer and longer[-len(question) :] == question
    assert tailed.earlier + longer == plain.earlier + question
    assert sorted(set(segments)) == [0, 1, 2] and len(segments) == len(longer)  # two messages and the question
    assert 0 < len(all_of_it.earlier) < len(tailed.earlier)  # something is left to write before it


def test_segments_are_messages(hf_dir, data):
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_dir)
    example = train.Conversations(data, tokenizer)[1]
    ends = [i for i, token in enumerate(example.earlier) if token == WORDS.index("<|end|>")]
    assert [example.segments[i] for i in ends] == list(range(len(ends)))
    assert [b - a for a, b in zip(example.segments, example.segments[1:]) if b != a] == [1] * (len(ends) - 1)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("{", ["line 2"]),
        ('{"messages": []}', ["line 2"]),
        (json.dumps({"messages": [*say("hello"), *say("hello")]}), ["line 2"]),
        *((json.dumps(record), ["line 2"]) for record in (
            {"messages": [*say("hello", None), *say("hello", "yours")]},
            {"messages": say("hello", "yours", [{"type": "text", "text": "hello"}], "yours")},
            {"messages": [{"role": 1, "content": "hello"}, *say("hello", "yours")]},
            {"messages": say("hello", "yours"), "asks": [say("hello", 7)]},
            {"messages": say("hello", "yours"), "asks": [[{"role": "assistant", "content": "yours"}]]},
            {"messages": [], "asks": [say("hello", "yours")[1:]], "visible": True},
            {"document": "hello", "questions": [{"question": None, "answer": "yours"}]},
            {"document": "hello", "questions": [{"question": "hello", "answer": 42}]},
            {"document": None, "questions": [{"question": "hello", "answer": "yours"}]},
            {"text": ["hello there it is hello there"]},
            {"messages": say("hello", "yours", "hello", "\ud800")},
            {"messages": say("hello", "yours"), "asks": []},
            {"messages": say("hello", "yours"), "asks": {"hello": "yours"}},
            {"messages": say("hello", "yours", "hello", "yours"), "visible": "true"},
            [1, 2], None,
        )),
        ("[" * 100_000, ["line 2"]),
        ("\xff", ["line 2"]),
    ],
)  # fmt: skip
def test_bad_lines_are_named(hf_dir, tmp_path, line, names):
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"messages": say("hello", "yours", "hello", "yours")})
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_dir)
    path.write_bytes(b"\xef\xbb\xbf" + f"{good}\r\n{line}\n".encode("latin-1", "surrogatepass"))
    with refuses(InputError, path, *names):  # before the first step, wherever it stands
        train.Conversations(path, tokenizer)
    path.write_text(f"{good}\n\n", encoding="utf-8-sig")
    assert len(train.Conversations(path, tokenizer)) == 1
    path.write_text("\n", encoding="utf-8")
    with refuses(InputError, path):
        train.Conversations(path, tokenizer)


def test_a_model_without_some_weights(hf_dir, tmp_path):
    """transformers would make them up."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "hf"
    shutil.copytree(hf_dir, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with refuses(ModelError, folder, "model.layers.1.mlp.up_proj.weight"):
        load_frozen(folder)


def test_options_without_effect_are_refused(hf_dir, data, tmp_path):
    for options, names in (
        ({"teacher": "context", "wording": 0.35}, ["--wording", "--teacher"]),
        ({"teacher": "context", "first_told": 3.0}, ["--first-told", "--teacher"]),
        ({"teacher_share": 0.5}, ["--teacher-share", "--teacher"]),
        ({"init_gain": 10.0}, ["--init-gain", "--init"]),
        ({"gate_mean": 0.5}, ["--gate-mean", "--gate-weight"]),
        ({"base": "base.gguf"}, ["--base", "--eval-every"]),
        ({"eval_questions": 9}, ["--eval-questions", "--eval-every"]),
        ({"batch": 4, "micro_batch": 5}, ["--micro-batch", "--batch"]),
        ({"micro_batch": 2, "gate_weight": 0.01}, ["--micro-batch", "--gate-weight"]),
    ):
        with refuses(InputError, *names):
            trainer(hf_dir, data, tmp_path / "out", **options)


def test_the_weights_that_a_run_begins_with_stay(hf_dir, data, tmp_path):
    trainer(hf_dir, data, tmp_path / "first", steps=1).train()
    (tmp_path / "first" / "checkpoint.pt").unlink()  # as where it was converted from
    saved = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    (tmp_path / "link").symlink_to(tmp_path / "first")
    for out in ("first", "link"):
        with refuses(InputError, tmp_path / out, "--init"):
            trainer(hf_dir, data, tmp_path / out, steps=1, init=str(tmp_path / "first")).train()
    assert {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()} == saved


def test_other_bad_input(hf_dir, data, tmp_path):
    with refuses(ModelError, tmp_path, "config.json"):
        trainer(tmp_path, data, tmp_path / "out")
    with refuses(ModelError, "smollm", "smollm2"):
        trainer("smollm", data, tmp_path / "out")
    with refuses(InputError, tmp_path / "none.jsonl"):
        trainer(hf_dir, tmp_path / "none.jsonl", tmp_path / "out")
    trainer(hf_dir, data, tmp_path / "out", steps=1).train()
    for options, differs in (
        ({"strategy": "msw"}, "--heads"),
        ({"strategy": "ssw"}, "--strategy"),
        ({"rate": 1e-4}, "--rate"),
        ({"layers": [0]}, "--layers"),
    ):
        with refuses(InputError, tmp_path / "out" / "checkpoint.pt", differs):
            trainer(hf_dir, data, tmp_path / "out", **options)
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text(encoding="utf-8") * 2, encoding="utf-8")
    with refuses(InputError, tmp_path / "out" / "checkpoint.pt", "conversations"):
        trainer(hf_dir, other, tmp_path / "out")
    trainer(hf_dir, data, tmp_path / "out", steps=2).train()  # a longer run is the same one
    with refuses(InputError, tmp_path / "out" / "checkpoint.pt", "--steps 1"):  # its weights are of more steps
        trainer(hf_dir, data, tmp_path / "out", steps=1)
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"no checkpoint")
    with refuses(InputError, tmp_path / "out" / "checkpoint.pt"):
        trainer(hf_dir, data, tmp_path / "out")
    (tmp_path / "afile").write_text("", encoding="utf-8")
    with refuses(OutputError, tmp_path / "afile"):
        trainer(hf_dir, data, tmp_path / "afile")
    for device in ("cudax", "hpu"):  # the second is one that torch looks for in a module
        with refuses(InputError, f"--device {device}"):
            trainer(hf_dir, data, tmp_path / "device", device=device)
    with refuses(InputError, "--update", "--init"):
        trainer(hf_dir, data, tmp_path / "init", init=str(tmp_path / "out"), update="no_lambda")
    with refuses(InputError, "rank", 65, 64):
        trainer(hf_dir, data, tmp_path / "rank", rank=65)
    with refuses(InputError, "--corrections", "qx"):
        trainer(hf_dir, data, tmp_path / "corrections", corrections="qx")
    damaged = shutil.copytree(hf_dir, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"x" * 100)
    with refuses(ModelError, damaged):
        trainer(damaged, data, tmp_path / "out")


def test_a_model_with_the_embeddings_of_another(hf_dir, data, tmp_path):
    """As a fine-tuned one often has them: it is another model."""
    trainer(hf_dir, data, tmp_path / "out", steps=1).train()
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    tuned = shutil.copytree(hf_dir, tmp_path / "tuned")
    model.save_pretrained(tuned)
    with refuses(InputError, tmp_path / "out" / "checkpoint.pt", "the model"):
        trainer(tuned, data, tmp_path / "out", steps=2)


def test_conversations_that_change_during_a_run(hf_dir, data, tmp_path):
    """Another file in their place is not read. A line that is written over is refused."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_dir)
    path = tmp_path / "data.jsonl"
    path.write_bytes(data.read_bytes())
    run = train.Conversations(path, tokenizer)
    expected = [run[0], run[7]]
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"messages": say("hello", "there", "what", "red")}) + "\n", encoding="utf-8")
    if os.name != "nt":  # where nothing replaces an open file
        os.replace(other, path)
    assert [run[0], run[7]] == expected
    path.write_bytes(data.read_bytes())
    run = train.Conversations(path, tokenizer)
    path.write_bytes(data.read_bytes().replace(b"red", b"Red"))
    with refuses(InputError, path, "line 1"):
        run[0]


@pytest.mark.skipif(os.name != "posix", reason="pipes as on POSIX")
def test_conversations_from_a_pipe(hf_dir, data, tmp_path):
    """It is refused before it is read: a line of it could not be read twice."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write():
        with contextlib.suppress(BrokenPipeError):
            pipe.write_bytes(data.read_bytes())

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    with refuses(InputError, pipe):
        train.Conversations(pipe, transformers.AutoTokenizer.from_pretrained(hf_dir))
    writer.join()


@pytest.mark.parametrize(
    "template",
    [
        None,  # none
        "{{ raise_exception('no ' + messages[0]['role']) }}",  # one that refuses
        TEMPLATE.replace("<|assistant|> {% endif %}", "<|user|> {% endif %}"),  # another prompt than it goes on with
    ],
    ids=["none", "refuses", "differs"],
)
def test_a_chat_template_that_training_cannot_use(hf_dir, data, tmp_path, template):
    other = shutil.copytree(hf_dir, tmp_path / "other")
    (other / "chat_template.jinja").unlink()
    if template is not None:
        (other / "chat_template.jinja").write_text(template, encoding="utf-8")
    with refuses(ModelError, other):
        trainer(other, data, tmp_path / "out", steps=1).train()


NO_MARKS = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}{% endfor %}" + TEMPLATE
)


@pytest.mark.parametrize(
    ("template", "line", "error"),
    [
        (NO_MARKS, {"messages": say("hello", "there", "what", " ")}, InputError),  # no token of an answer
        (NO_MARKS, {"messages": say("hello", "there", "", "red")}, InputError),  # of a question
        (NO_MARKS, {"messages": say("", "", "what", "red")}, InputError),  # of what is told
        (NO_MARKS, {"messages": say("hello"), "asks": [say("", "red")], "visible": True}, InputError),
        (ALTERNATES, {"messages": say("hello") + say("my door is red", "it", "what", "red")}, ModelError),
        ("{% if messages[0]['content'] == '' %}{{ 1 // 0 }}{% endif %}" + TEMPLATE,
         {"messages": say("", "it", "what", "red")}, ModelError),
    ],
)  # fmt: skip
def test_a_line_that_the_template_cannot_use(hf_dir, tmp_path, template, line, error):
    """It is found before the first step, not in the middle of the night."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_dir)
    tokenizer.chat_template = template
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"messages": say("hello", "yours", "hello", "yours")})
    path.write_text(f"{good}\n{json.dumps(line)}\n", encoding="utf-8")
    with refuses(error, path, "line 2"):
        train.Conversations(path, tokenizer)


def test_a_system_message_that_is_no_conversation(hf_dir, tmp_path):
    """Some templates refuse it alone: it is written with the message that follows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_dir)
    path = tmp_path / "system.jsonl"
    told = [{"role": "system", "content": "hello"}, *say("my door is red", "it")]
    path.write_text(json.dumps({"messages": told + say("what", "red")}) + "\n", encoding="utf-8")
    expected = train.Conversations(path, tokenizer)[0]
    tokenizer.chat_template = "{% if messages | length < 2 %}{{ raise_exception('who asks?') }}{% endif %}" + TEMPLATE
    path.write_text(json.dumps({"messages": told, "asks": [say("what", "it", "what", "red")]}) + "\n", encoding="utf-8")
    example = train.Conversations(path, tokenizer)[0]
    assert example.earlier == expected.earlier
    assert example.segments == [max(segment, 1) for segment in expected.segments]


@pytest.mark.parametrize("tail", [0, 1])
def test_a_system_prompt_stays_before_each_question(hf_dir, tmp_path, tail):
    """As in a conversation whose text was cleared. A question with one of its own keeps that."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_dir)
    system, told, ask = [{"role": "system", "content": "hello"}], say("my door is red", "it"), say("what", "red")
    own = [{"role": "system", "content": "there"}, *ask]
    path = tmp_path / "system.jsonl"
    messages = system + told
    lines = [{"messages": messages, "asks": [ask, own]}, {"messages": messages, "asks": [ask], "visible": True}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    gone, visible = train.Conversations(path, tokenizer, tail=tail)

    def tokens(messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    shown = told[len(told) - tail :]
    assert gone.asks[0].question == tokens([*system, *shown, ask[0]])
    assert len(gone.asks[0].segments) == len(gone.asks[0].question)
    assert gone.earlier + gone.continued[0] == tokens([*system, *told, ask[0]])  # where it stands already
    assert visible.continued == gone.continued[:1]
    if not tail:
        assert gone.asks[1].question == tokens(own[:2])


def test_a_question_of_no_token_before_a_prompt_of_some(hf_dir, tmp_path):
    """Each token of the prompt is of a message, which the padded form needs."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_dir)
    tokenizer.chat_template = TEMPLATE.replace("<|{{ m['role'] }}|>", "{{ 'yours ' if m['role'] == 'assistant' }}")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "").replace("<|assistant|>", "yours")
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": say("hello", "there", "", "red")}) + "\n", encoding="utf-8")
    ((question, segments, _),) = train.Conversations(path, tokenizer)[0].asks
    assert question == [WORDS.index("yours")] and segments == [0]


def test_a_token_over_the_end_of_a_prompt(hf_dir, tmp_path):
    """The answer begins with a token of its own, as a model writes it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_dir)
    tokenizer.chat_template = TEMPLATE.replace("|> ", "|>")  # "<|assistant|>red" is another word than "<|assistant|>"
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": say("hello", "there", "what", "red")}) + "\n", encoding="utf-8")
    question, _, answer = train.Conversations(path, tokenizer)[0].asks[0]
    assert question[-1] == WORDS.index("<|assistant|>")
    assert answer == [WORDS.index("red"), WORDS.index("<|end|>")]


def test_plain_text_needs_no_chat_template(hf_dir, tmp_path):
    other = shutil.copytree(hf_dir, tmp_path / "other")
    (other / "chat_template.jinja").unlink()
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "my door is red " * 9}) + "\n", encoding="utf-8")
    assert trainer(other, path, tmp_path / "out", steps=1).train().steps == 1


def test_the_end_of_a_long_text_is_predicted(hf_dir, tmp_path):
    """--max-tokens counts the tokens before it, of which the last ones are decoded."""
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "my door is red " * 9 + "it is blue"}) + "\n", encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_dir)
    whole = train.Conversations(path, tokenizer)[0]
    for n in (1, 4):
        text = train.Conversations(path, tokenizer, max_tokens=n)[0]
        assert text.asks == whole.asks and text.earlier == whole.earlier[-n:] and len(text.segments) == n
    assert whole.asks[0].answer[-3:] == [WORDS.index(word) for word in ("it", "is", "blue")]


def test_the_loss_held_out_does_not_depend_on_the_batch(hf_dir, data, tmp_path):
    """Nor do the conversations that are measured at once, of which there may be fewer than in a batch."""
    found = []
    for batch, micro_batch in ((4, None), (4, 1), (3, None)):
        run = trainer(hf_dir, data, tmp_path / f"{batch}-{micro_batch}", batch=batch, micro_batch=micro_batch)
        at_once, student = [], run.objective.student
        run.objective.student = lambda rows, empty=False, s=student, a=at_once: a.append(len(rows)) or s(rows, empty)
        found.append(run.report().held_out)
        assert max(at_once) == (micro_batch or batch)
    for other in found[1:]:
        assert other.loss == pytest.approx(found[0].loss, rel=1e-5) and other.right == found[0].right
        assert other.loss_without == pytest.approx(found[0].loss_without, rel=1e-5)


def test_what_killed_runs_leave_is_removed(hf_dir, data, tmp_path):
    names = [f".{name}.0123abcd.tmp" for name in ("checkpoint.pt", WEIGHTS[0], "log.jsonl", "loss.png")]
    names.append(f".{WEIGHTS[0]}.01234567.tmp")
    for name in names:
        (tmp_path / name).write_bytes(b"PK")
    for name in names[:-1]:  # the last may be another run's, which is saving
        os.utime(tmp_path / name, (0, 0))
    trainer(hf_dir, data, tmp_path)
    assert [name for name in names if (tmp_path / name).exists()] == names[-1:]


def test_two_runs_do_not_share_a_folder(hf_dir, data, tmp_path):
    """While one is open no other begins, in this process or another. After it has trained, or was refused, one may."""
    out = tmp_path / "out"
    run = trainer(hf_dir, data, out, steps=2)
    with refuses(InputError, out):
        trainer(hf_dir, data, out, steps=2)
    command = [sys.executable, "-m", "pydeltamem.cli.main", "train", hf_dir, data, "-o", out, "--steps", "2"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1 and str(out) in refused.stderr.replace("\n", "")
    run.train()
    assert trainer(hf_dir, data, out, steps=3).train().steps == 3
    with refuses(InputError, out / "checkpoint.pt"):
        trainer(hf_dir, data, out, steps=3, rate=1.0)
    assert trainer(hf_dir, data, out, steps=4).step == 3
    gc.collect()
    assert trainer(hf_dir, data, out, steps=4).step == 3  # nobody has the one before it


def test_a_folder_without_locks(hf_dir, data, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", fail)
    assert trainer(hf_dir, data, tmp_path / "out", steps=1).train().steps == 1


def test_a_run_of_an_earlier_release_goes_on(hf_dir, data, tmp_path):
    """What was added to the options since, it did not use."""
    trainer(hf_dir, data, tmp_path / "out", steps=1).train()
    path = tmp_path / "out" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    for name in ("online_gain", "--rehearse", "--form"):
        del saved["run"][name]
    torch.save(saved, path)
    with refuses(InputError, path, "--rehearse"):
        trainer(hf_dir, data, tmp_path / "out", rehearse=0.5)
    del saved["run"]["the model's layers"]
    torch.save(saved, path)
    assert trainer(hf_dir, data, tmp_path / "out", steps=2).step == 1


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("is_fast", [False, True])
def test_what_a_gpu_multiplies_fast(monkeypatch, is_there, is_fast):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: is_fast)
    assert multiplies_bfloat16("cuda") == (is_there and is_fast)


def test_without_matplotlib_there_is_no_picture(hf_dir, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert trainer(hf_dir, data, tmp_path / "out", steps=1).train().steps == 1
    assert Checkpoint(tmp_path / "out") and not (tmp_path / "out" / "loss.png").exists()


def test_the_command(hf_dir, data, tmp_path, capsys):
    options = ["--steps", "3", "--batch", "4", "--rank", "4", "--layers", "1", "--dropout", "0.25"]
    assert main(["train", str(hf_dir), str(data), "-o", str(tmp_path / "out"), *options]) == 0
    said = capsys.readouterr().out
    assert Checkpoint(tmp_path / "out").config.target_layers == (1,)
    n_held_out = trainer(hf_dir, data, tmp_path / "out", steps=3, layers=[1], dropout=0.25).n_held_out
    assert n_held_out > 0 and f"{n_held_out} held out" in said
    assert main(["train", str(hf_dir), str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "out")]) == 1
    check_names(capsys.readouterr().err.strip(), [tmp_path / "none.jsonl"])


@pytest.mark.parametrize(
    "option",
    [
        ("--rate", "-1"),
        ("--rate", "nan"),
        ("--clip", "0"),
        ("--heads-gain", "x"),
        ("--dropout", "1"),
        ("--visible", "-1"),
    ],
)
def test_options_of_the_command(tmp_path, option, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "model", "data", "-o", str(tmp_path / "out"), *option])
    assert ended.value.code == 2 and not any(tmp_path.iterdir())
    check_names(capsys.readouterr().err.splitlines()[-1], option)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_diverges(hf_dir, data, tmp_path, what):
    """The run ends, and what was saved before stays, even if only a gradient is not finite."""
    trainer(hf_dir, data, tmp_path / "sound", steps=1).train()
    saved = {path.name: path.read_bytes() for path in (tmp_path / "sound").iterdir()}
    run = trainer(hf_dir, data, tmp_path / "sound", steps=9, save_every=1)
    if what == "loss":
        with torch.no_grad():
            run.parameters[0].fill_(torch.inf)
    else:
        run.parameters[0].register_hook(lambda gradient: gradient * torch.inf)
    with refuses(TrainingError, "step 2", "--rate", tmp_path / "sound"):
        run.train()
    assert {path.name: path.read_bytes() for path in (tmp_path / "sound").iterdir()} == saved
    assert what == "loss" or all(parameter.isfinite().all() for parameter in run.parameters)


@pytest.mark.parametrize("full", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk(hf_dir, data, tmp_path, monkeypatch, full):
    run = trainer(hf_dir, data, tmp_path / "out", steps=1)

    def fail(*args):
        raise full

    monkeypatch.setattr(torch, "save", fail)
    with refuses(OutputError, tmp_path / "out" / WEIGHTS[0]):
        run.train()
    assert not list((tmp_path / "out").iterdir())


def test_no_weights_beside_other_weights(hf_dir, data, tmp_path):
    """Without PyTorch the file of safetensors would be read."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / WEIGHTS[1]).touch()
    with refuses(InputError, tmp_path / "out" / WEIGHTS[1], "--out"):
        trainer(hf_dir, data, tmp_path / "out", steps=1)


def test_fewer_conversations_than_a_batch(hf_dir, data, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(data.read_text(encoding="utf-8").splitlines(keepends=True)[:3]), encoding="utf-8")
    report = trainer(hf_dir, few, tmp_path / "out", steps=2).train()
    assert report.steps == 2 and report.held_out.n == 0
    command.print_report(report, Console())
    assert "none of fewer than 10" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["tsw", "msw"])
def test_a_memory_that_begins_as_a_head_adds_what_the_head_does(hf_dir, strategy):
    """What one value, read as it was written, adds to the layer: the head's output for it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_dir).double().eval()
    _, heads = train.STRATEGIES[strategy]
    rank = 16 // (heads // 2 or 1)  # as many directions as the head's width, so that nothing is lost
    memory = DeltaMem(model, DeltaMemConfig(rank=rank, num_state_heads=heads, alpha=4.0)).double()
    train.start_from_heads(memory, model, gain=0.5)
    h = torch.randn(32, dtype=torch.double)
    for layer, parameters in zip(memory.layers, memory.memories):
        attention = model.model.layers[layer].self_attn
        outputs = [
            attention.o_proj.weight[:, i * 16 : i * 16 + 16] @ attention.v_proj.weight @ h for i in range(2)
        ]  # fmt: skip
        added = parameters.delta("o", parameters.memory_v_proj @ h)
        assert any(torch.allclose(added, 0.5 * out, atol=1e-6) for out in outputs), layer
        keys = parameters.memory_k_proj @ h
        assert keys.abs().max() > 0 and torch.isfinite(keys).all()


def of_family(family, **config):
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    settings = getattr(transformers, f"{family}Config")(**sizes, **config)
    return transformers.AutoModelForCausalLM.from_config(settings).float()


@pytest.mark.parametrize(
    ("family", "config"), [("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}), ("GPTJ", {"rotary_dim": 4})]
)
def test_heads_of_models_whose_queries_share_no_keys(family, config):
    """Their configurations do not count heads of keys."""
    model = of_family(family, **config)
    memory = DeltaMem(model, DeltaMemConfig(rank=4))
    assert not memory.memories[1].delta_o_proj.any()
    train.start_from_heads(memory, model)
    assert memory.memories[1].delta_o_proj.any() and torch.isfinite(memory.memories[1].memory_k_proj).all()


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 16}),  # embeddings are narrower than hidden states
        (
            "Qwen3Next",
            {"head_dim": 16, "layer_types": ["full_attention"] * 2, "num_experts": 2},
        ),  # q_proj has a gate too
    ],
)
def test_heads_that_a_memory_cannot_begin_as(family, config):
    model = of_family(family, num_key_value_heads=1, **config)
    with refuses(ModelError, "--heads-gain", "layer 0"):
        train.start_from_heads(DeltaMem(model, DeltaMemConfig(rank=4)), model)


@pytest.mark.parametrize("name", ["checkpoint.pt", "delta_mem_adapter.pt", "delta_mem_config.json", "loss.png"])
def test_a_file_of_another_kind_stays(hf_dir, data, tmp_path, name):
    path = tmp_path / name
    run = trainer(hf_dir, data, tmp_path, steps=1)
    path.write_bytes(b"a diary")
    for act in (run.train, lambda: trainer(hf_dir, data, tmp_path, steps=1)):  # before the run starts
        with pytest.raises((InputError, OutputError)) as info:
            act()
        check_names(str(info.value), [path])
        assert path.read_bytes() == b"a diary"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_is_not_used_is_given_back():
    heap = {"MALLOC_MMAP_THRESHOLD_": f"{1 << 32}", "MALLOC_TRIM_THRESHOLD_": f"{1 << 34}"}  # as `make smollm2-adapter`
    run = subprocess.run(
        [sys.executable, "-c", GAPS], env=os.environ | heap, capture_output=True, text=True, check=True
    )
    assert float(run.stdout) > 300  # MB

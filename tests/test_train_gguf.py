"""deltamem train on a GGUF: it trains on the model that runs; every kind of line, option and log works as told."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from rich.console import Console

from pydeltamem import DeltaMemLlama, train
from pydeltamem.errors import InputError, ModelError, OutputError
from pydeltamem.formats.checkpoint import WEIGHTS, Checkpoint
from pydeltamem.formats.packed import pack
from pydeltamem.train.model import load_frozen
from pydeltamem.train.recall import NativeRecall
from pydeltamem.train.tokenizer import GgufTokenizer
from refusals import check_names, refuses

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny" / "base.gguf"  # a float32 model, but its <|im_end|> is no control token
MODEL = ROOT / "pydeltamem" / "models" / "default.gguf"
WORDS = ["red", "green", "blue", "white"]


def say(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * len(texts), texts)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    colours = [WORDS[i % len(WORDS)] for i in range(24)]
    return write(
        tmp_path_factory.mktemp("data") / "train.jsonl",
        [
            {"messages": say(f"It is {c}.", "Yes."), "asks": [say("What is it?", c), say("Yes?", "No.")]}
            for c in colours
        ],
    )


def trainer(data, out, model=MODEL, **options):
    options = train.Options(str(model), str(data), str(out), **{"batch": 3, **options})
    return train.Trainer(options, Console(quiet=True))


def test_what_is_trained_on_is_what_runs():
    """Logits of the dequantised model and of llama.cpp; tokens of a chat as create_chat_completion makes them."""
    model, tokenizer = load_frozen(TINY, "float32")
    llm = DeltaMemLlama(
        model_path=str(TINY), n_ctx=128, logits_all=True, flash_attn=False, type_k=0, type_v=0, verbose=False
    )
    messages = say("My name is Ada, and I'm 36: Zürich, 6:40.", "Hello.", "What's my name?")
    llm.create_chat_completion(messages, max_tokens=1, temperature=0)
    ids = tokenizer(tokenizer.apply_chat_template(messages, add_generation_prompt=True))["input_ids"]
    assert ids == llm.input_ids[: len(ids)].tolist() and llm.n_tokens == len(ids)
    native = torch.tensor(np.array(llm.scores[: len(ids)]))
    error = (model(torch.tensor([ids])).logits[0] - native).pow(2).mean() / native.pow(2).mean()
    assert error < 1e-9
    llm.close()


def test_a_link_to_a_gguf(tmp_path):
    """As huggingface_hub keeps files: the file itself has another name."""
    (tmp_path / "blobs").mkdir()
    shutil.copy(TINY, tmp_path / "blobs" / "0b5e")
    (tmp_path / "model.gguf").symlink_to(tmp_path / "blobs" / "0b5e")
    model, _ = load_frozen(tmp_path / "model.gguf", "float32")
    for name, value in load_frozen(TINY, "float32")[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_run_on_a_gguf(data, tmp_path):
    """It is packed, logs what the native runtime recalls, and its checkpoint goes on and converts."""
    run = trainer(data, tmp_path / "out", steps=4, eval_every=2, heads_gain=0.5)
    assert run.objective.packed is not None
    report = run.train()
    assert report.steps == 4 and report.held_out.n == 2 and report.held_out.loss > 0
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in log] == [2, 4]
    assert all(row["questions"] == 4 and 0 <= row["right"] <= row["f1"] <= 1 for row in log)
    assert Checkpoint(tmp_path / "out").config.delta_heads == ("q", "o")
    assert trainer(data, tmp_path / "out", steps=6, heads_gain=0.5).step == 4

    (tmp_path / "out" / "checkpoint.pt").unlink()  # from the beginning, in the same folder
    with open(tmp_path / "out" / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": ')  # a process that was killed
    trainer(data, tmp_path / "out", steps=3, eval_every=3, heads_gain=0.5).train()
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in log] == [3]


@pytest.mark.parametrize("step", [2, 4])
def test_what_a_killed_run_did_not_measure_is_measured(data, tmp_path, monkeypatch, step):
    """It was saved before; the log has each step once."""
    options = {"steps": 4, "eval_every": 2, "heads_gain": 0.5}
    run = trainer(data, tmp_path, **options)
    measure = run.recall.measure

    def killed(checkpoint):
        if run.step == step:
            raise KeyboardInterrupt
        return measure(checkpoint)

    monkeypatch.setattr(run.recall, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    if step == 4:  # what a machine that lost its power may leave at the end of a file
        with open(tmp_path / "log.jsonl", "ab") as log:
            log.write(b"\0\xff\n")
    for _ in range(2):
        again = trainer(data, tmp_path, **options)
        assert again.step >= step
        again.train()
        log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [row["step"] for row in log] == [2, 4]


def test_answers_that_stay_are_not_measured(tmp_path):
    """They were drawn, and may be cut: an adapter that gives others is not wrong."""
    line = {"messages": say("It is red.", "Yes."), "asks": [say("What is it?", "red")]}
    stays = {"messages": say("It is red.", "Yes."), "asks": [say("Why?", "Zzyzx.")], "keep": True}
    lines = [line, stays] * 12  # of which two are held out
    runs = {}
    for name, records in (("mixed", lines), ("alone", [line] * 24), ("none", [stays] * 24)):
        runs[name] = trainer(write(tmp_path / f"{name}.jsonl", records), tmp_path / name, heads_gain=0.5).report()
    assert runs["mixed"].held_out.n == 1 and runs["none"].held_out.n == 0
    assert runs["mixed"].held_out.loss == pytest.approx(runs["alone"].held_out.loss, rel=1e-3)


def test_a_run_without_a_break_is_one_with(data, tmp_path):
    options = {
        "short_first": 0, "schedule": "constant", "visible": 0.5, "gate_weight": 0.01, "strategy": "msw",
    }  # fmt: skip
    trainer(data, tmp_path / "broken", steps=2, **options).train()
    runs = [trainer(data, tmp_path / name, steps=4, **options) for name in ("broken", "whole")]
    for run in runs:
        run.train()
    for one, other in zip(runs[0].parameters, runs[1].parameters):
        assert torch.equal(one, other)


def test_what_is_saved_is_the_average(data, tmp_path):
    """After N steps with D = 0.2: the weights of each step, the last one most. Training itself goes on from its own."""
    options = {"short_first": 0, "schedule": "constant", "heads_gain": 0.5, "warm_up": 1}
    plain = trainer(data, tmp_path / "plain", **options)
    mean = None
    for step in range(1, 5):
        plain.update()
        stays = min(0.2, (step - 1) / (step + 9))
        now = [p.detach().double() for p in plain.parameters]
        mean = now if mean is None else [stays * m + (1 - stays) * p for m, p in zip(mean, now)]
    trainer(data, tmp_path / "mean", steps=2, average=0.2, **options).train()  # goes on below
    run = trainer(data, tmp_path / "mean", steps=4, average=0.2, **options)
    held_out = run.train().held_out
    for one, other in zip(run.parameters, plain.parameters, strict=True):
        assert torch.equal(one, other)
    saved = trainer(data, tmp_path / "again", init=str(tmp_path / "mean"))
    for one, other in zip(saved.parameters, mean, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(one, last) for one, last in zip(saved.parameters, plain.parameters))
    assert saved.report().held_out.loss == pytest.approx(held_out.loss, rel=1e-5)
    with refuses(InputError, tmp_path / "mean" / "checkpoint.pt", "--average"):
        trainer(data, tmp_path / "mean", steps=6, **options)


def test_packed_and_padded_learn_the_same(tmp_path):
    record = {"messages": say("It is red.", "Yes."), "asks": [say("What is it?", "red"), say("Yes?", "No.")]}
    data = write(tmp_path / "alike.jsonl", [record] * 24)  # a padded batch is drawn differently
    runs = {
        form: trainer(data, tmp_path / form, steps=3, dtype="float32", form=form, heads_gain=0.5)
        for form in ("packed", "padded")
    }
    reports = {form: run.train() for form, run in runs.items()}
    # the rounding of three steps in float32, which Adam amplifies
    assert reports["packed"].held_out.loss == pytest.approx(reports["padded"].held_out.loss, rel=1e-3)
    assert reports["packed"].held_out.loss_without == pytest.approx(reports["padded"].held_out.loss_without, rel=1e-5)
    assert reports["packed"].held_out.loss != pytest.approx(reports["packed"].held_out.loss_without, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"wording": 0.35, "first_told": 3.0, "visible": 0.5, "ask_writes": 0.5, "rehearse": 0.5},
        {"teacher": "context", "teacher_share": 0.5},
        {"form": "padded", "wording": 0.35},
    ],
    ids=["packed", "teacher", "padded"],
)
def test_micro_batches_have_the_gradient_of_the_batch(tmp_path, options, size):
    """Whatever the lengths of their answers, and with answers that stay."""
    records = []
    for i in range(12):
        said, ask = say(f"It is {WORDS[i % 4]}.", "Yes."), say("What is it?", f"{'It is ' * (i % 3)}{WORDS[i % 4]}")
        stays = options.get("form") != "padded" and i % 3 == 0
        records.append({"messages": said, "asks": [ask, say("Yes?", "No.")], "keep": stays})
    data = write(tmp_path / "x.jsonl", records)
    same = {"dtype": "float32", "heads_gain": 0.5, "batch": 5, "warm_up": 1, **options}
    whole, parts = (trainer(data, tmp_path / str(n), micro_batch=n, **same) for n in (None, size))
    losses = [run.objective.backward([run.data[i] for i in range(5)]) for run in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    largest = max(p.grad.abs().max().item() for p in whole.parameters)
    for one, other in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6 * largest)
    for run in (whole, parts):
        run.optimizer.zero_grad()
        for _ in range(2):
            run.update()
    far, n = 0, 0
    for one, other in zip(whole.parameters, parts.parameters, strict=True):
        far += ((one - other).abs() > 0.01 * whole.options.rate).sum().item()
        n += one.numel()
    assert far < 1e-3 * n  # Adam makes whole steps of gradients that are rounding errors


def test_the_weight_of_wording(data, tmp_path):
    """Tokens that were told and are not in the question count 1, the others --wording; the loss is their mean."""
    tokenizer = load_frozen(MODEL)[1]
    said = write(
        tmp_path / "said.jsonl",
        [{"messages": say("I live in Lima.", "Yes."), "asks": [say("Where do I live?", "You live in Lima.")]}] * 12,
    )
    run = trainer(said, tmp_path / "run", dtype="float32", heads_gain=0.5, wording=0.25)
    (example,) = [run.data[0]]
    answer = example.asks[0][2]
    weights = train.told_weights([example], 0.25)
    heavy = "".join(tokenizer.decode([t]) for t, weight in zip(answer, weights) if weight == 1)
    assert "Lima" in heavy and "live" not in heavy and "You" not in heavy
    assert set(weights) == {0.25, 1.0}
    first = train.told_weights([example], 0.25, 3.0)
    begins = [i for i, weight in enumerate(weights) if weight == 1 and (i == 0 or weights[i - 1] < 1)]
    assert begins and first == [3.0 if i in begins else weight for i, weight in enumerate(weights)]
    logits, targets = run.objective.student([example])
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    expected = (each * torch.tensor(weights)).sum() / sum(weights)
    assert run.objective.loss([example]).item() == pytest.approx(expected.item(), rel=1e-6)
    assert run.objective.loss([example]).item() != pytest.approx(each.mean().item(), rel=1e-3)


def test_a_packed_batch_is_drawn_at_random(tmp_path):
    """Not by length, which goes with the source: over some steps the batches mix short and long conversations."""
    records = [
        {"messages": say("It is red. " * (1 + i // 16 * 20), "Yes."), "asks": [say("What is it?", "red")]}
        for i in range(32)
    ]
    run = trainer(write(tmp_path / "lengths.jsonl", records), tmp_path / "run", short_first=0)
    sizes = [[run.data.sizes[i] for i in run.draw(random.Random(step))] for step in range(20)]
    assert sum(max(batch) > 2 * min(batch) for batch in sizes) >= 10  # 15 of 20 are expected


def test_the_gate_regulariser(data, tmp_path):
    """Its gradient alone moves the gates' biases towards the mean that it is given."""
    means = []
    for weight in (1e-9, 1e4):
        run = trainer(
            data, tmp_path / str(weight), steps=30, gate_weight=weight, gate_mean=0.9, rate=3e-2,
            warm_up=1,
        )  # fmt: skip
        run.train()
        run.objective.student([run.data[0]])
        means.append(torch.stack(run.objective.packed.gate_means).mean().item())
    assert abs(means[1] - 0.9) < abs(means[0] - 0.9) / 2, means


def test_documents_and_texts(data, tmp_path):
    tokenizer = load_frozen(MODEL)[1]
    path = write(
        tmp_path / "kinds.jsonl",
        [
            {"document": "The house is red.", "questions": [{"question": "What is red?", "answer": "The house."}]},
            {"text": "The river runs from the mountain to the sea, and the sea is far from here."},
        ],
    )
    document, text = train.Conversations(path, tokenizer)
    assert "The house is red." in tokenizer.decode(document.earlier)
    assert "What is red?" in tokenizer.decode(document.asks[0][0])
    assert "The house." in tokenizer.decode(document.asks[0][2])
    line = "The river runs from the mountain to the sea, and the sea is far from here."
    whole = tokenizer(line, add_special_tokens=False)["input_ids"]
    (first, _, rest) = text.asks[0]
    assert text.earlier + first + rest == whole
    assert len(first) == 1 and len(rest) == len(whole) // 2 - 1

    short = write(tmp_path / "short.jsonl", [{"text": "a"}])
    with refuses(InputError, short, "line 1"):
        train.Conversations(short, tokenizer)
    open_question = write(tmp_path / "open.jsonl", [{"document": "Red.", "questions": [{"question": "What?"}]}])
    with refuses(InputError, open_question, "line 1"):
        train.Conversations(open_question, tokenizer)
    assert train.Conversations(open_question, tokenizer, teacher=True)[0].asks[0][2] == []


def test_a_text_begins_as_the_model_has_it(tmp_path):
    """With the token that begins texts, as a prompt does; so does what is shown of its end, where the rest is gone."""
    path = shutil.copy(MODEL, tmp_path / "begins.gguf")
    script = [sys.executable, "-m", "gguf.scripts.gguf_set_metadata", "--force"]
    subprocess.run([*script, str(path), "tokenizer.ggml.add_bos_token", "1"], check=True, capture_output=True)
    text = "The river runs from the mountain to the sea, and the sea is far from here."
    file = write(tmp_path / "text.jsonl", [{"text": text}])
    (plain,), (begun,) = (train.Conversations(file, GgufTokenizer(model)) for model in (MODEL, path))
    with DeltaMemLlama(path, n_ctx=64, verbose=False) as llm:
        bos, whole = llm.token_bos(), llm.tokenize(text.encode())
    assert begun.earlier == [bos, *plain.earlier] == whole[: len(begun.earlier)]
    assert begun.asks[0].question == [bos, *plain.asks[0].question] and begun.asks[0].answer == plain.asks[0].answer
    assert begun.continued == plain.continued and len(begun.segments) == len(begun.earlier)


def test_a_question_goes_on_where_the_text_stays(data):
    tokenizer = load_frozen(MODEL)[1]
    example = train.Conversations(data, tokenizer)[0]
    whole = tokenizer.apply_chat_template(
        say("It is red.", "Yes.") + say("What is it?"), tokenize=False, add_generation_prompt=True
    )
    assert example.earlier + example.continued[0] == tokenizer(whole, add_special_tokens=False)["input_ids"]


def other_metadata(tmp_path, *options):
    """The model with other keys."""
    path = tmp_path / "other.gguf"
    script = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--force", *options]
    subprocess.run([*script, str(MODEL), str(path)], check=True, capture_output=True)
    return path


THINKS = (  # as Qwen3's template: only a reply after the last question has its thoughts
    "{% set n = namespace(at=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set n.at = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.index0 > n.at %}Hmm. {% endif %}{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_that_writes_the_last_reply_otherwise(tmp_path):
    """A text that stays is there once, as in a chat that goes on, and each token has its message."""
    tokenizer = GgufTokenizer(other_metadata(tmp_path, "--chat-template", THINKS))
    told, asked = say("It is red.", "Yes.", "My cat is blue.", "I see."), say("What is it?", "Red.")
    path = write(tmp_path / "x.jsonl", [{"messages": told, "asks": [asked, say("Who?", "Me.")], "visible": True}])
    example = train.Conversations(path, tokenizer)[0]
    for ask, continued in zip((asked, say("Who?")), example.continued):
        whole = tokenizer.apply_chat_template(told + ask[:1], add_generation_prompt=True)
        assert example.earlier + continued == tokenizer(whole)["input_ids"]
    for i, message in enumerate(told):
        of_message = [token for token, segment in zip(example.earlier, example.segments) if segment == i]
        assert message["content"] in tokenizer.decode(of_message)
    assert "Hmm" not in tokenizer.decode(example.earlier) and "Hmm. Red." in tokenizer.decode(example.asks[0][2])


def test_a_reply_ends_with_any_token_that_ends_one(data, tmp_path):
    """Not with eos alone: of some models another token ends a turn."""
    tokenizer = GgufTokenizer(MODEL)
    end = tokenizer.eos_token_id
    other = other_metadata(tmp_path, "--special-token", "eos", "<s>", "--special-token-by-id", "eot", str(end))
    assert GgufTokenizer(other).eos_token_id != end and end in GgufTokenizer(other).ends
    run = trainer(data, tmp_path / "out", model=other, teacher="context")
    questions = [train.Example([], [], [ask._replace(answer=[])], [ask.question]) for ask in run.data[0].asks]
    answered = run.objective.answered(questions)
    assert {answer[-1] for example in answered for _, _, answer in example.asks} == {end}
    # an adapter that corrects nothing yet gives the same answers
    run.memory.save_checkpoint(tmp_path / "untrained")
    told = [replace(example, earlier=[5, 6], segments=[0, 0]) for example in answered]
    assert NativeRecall(other, told, 9).measure(tmp_path / "untrained")["right"] == 1


def test_learning_from_a_teacher(data, tmp_path):
    """The memory comes nearer to what the frozen model says with the text before it; the file holds no answer."""
    colours = [WORDS[i % len(WORDS)] for i in range(24)]
    questions = write(
        tmp_path / "questions.jsonl",
        [{"messages": say(f"It is {c}.", "Yes."), "asks": [say("What is it?"), say("And now?")]} for c in colours],
    )
    run = trainer(questions, tmp_path / "out", steps=25, teacher="context", rate=1e-2, heads_gain=1)
    held_out = run.objective.answered([run.data[i] for i in range(run.n_held_out)])
    assert all(answer for example in held_out for _, _, answer in example.asks)

    def distance():
        with torch.no_grad():
            student, _ = run.objective.student(held_out)
            taught = run.objective.teacher(held_out).log_softmax(-1)
            return torch.nn.functional.kl_div(
                student.log_softmax(-1), taught, reduction="batchmean", log_target=True
            ).item()

    before = distance()
    run.train()
    assert 0 <= distance() < 0.8 * before


def test_a_teacher_counts_for_a_part_of_the_loss(tmp_path):
    """The rest is the loss of the file's answers. A question without one gets the teacher's; the others keep theirs."""
    records = [{"messages": say("It is red.", "Yes."), "asks": [say("What is it?", "red"), say("Yes?")]}] * 4
    run = trainer(write(tmp_path / "x.jsonl", records), tmp_path / "out", teacher="context", teacher_share=0.25)
    (example,) = given = run.objective.answered([run.data[0]])
    assert example.asks[0] == run.data[0].asks[0] and example.asks[1][2] and not run.data[0].asks[1][2]
    with torch.no_grad():
        logits, targets = run.objective.student(given)
        taught = run.objective.teacher(given).softmax(-1)
        log = logits.log_softmax(-1)
        distance = (taught * (taught.log() - log)).sum(-1).mean()
        of_answers = -log.gather(1, targets[:, None]).mean()
        found = run.objective.loss([run.data[0]])
    assert found.item() == pytest.approx((0.25 * distance + 0.75 * of_answers).item(), rel=1e-4)
    assert distance.item() != pytest.approx(of_answers.item(), rel=0.1)


def trained_on(run, n_steps):
    """The examples of so many steps."""
    seen, loss = [], run.objective.loss

    def watched(examples, total):
        seen.extend(examples)
        return loss(examples, total)

    run.objective.loss = watched
    for _ in range(n_steps):
        run.update()
    return seen


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_share_of_the_questions_writes(data, tmp_path, share):
    run = trainer(data, tmp_path / "out", steps=12, ask_writes=share)
    seen = [example.ask_writes for example in trained_on(run, 12)]
    assert len(seen) == 36 and (8 <= sum(seen) <= 28 if share else not any(seen))


def test_a_line_says_that_its_text_stays(tmp_path):
    """Such a conversation may begin with what is asked."""
    lines = [
        {"messages": [], "asks": [say("It is red.", "I see.")], "visible": True},
        {"messages": say("It is red.", "Yes."), "asks": [say("What?", "Red.")], "visible": True},
        {"messages": say("It is red.", "Yes."), "asks": [say("What?", "Red.")]},
    ]
    path = write(tmp_path / "x.jsonl", lines)
    run = trainer(path, tmp_path / "out", steps=2, batch=3)
    assert [run.data[i].visible for i in range(3)] == [True, True, False]
    assert run.data[0].earlier == [] and run.data[1].earlier == run.data[2].earlier != []
    seen = trained_on(run, 1)
    assert len(seen) == 3 and all(example.visible for example in seen if not example.earlier)
    with refuses(InputError, "visible", "packed form"):
        trainer(path, tmp_path / "padded", steps=2, form="padded").objective.loss([run.data[0]])
    with refuses(InputError, tmp_path / "y.jsonl"):
        trainer(write(tmp_path / "y.jsonl", [{**lines[0], "visible": False}]), tmp_path / "other", steps=1).data[0]


def test_a_line_says_that_its_answers_stay(tmp_path):
    """At the frozen model's own weights nothing is lost, whatever the file answers; the padded form refuses."""
    line = {"messages": say("It is red.", "Yes."), "asks": [say("What?", "Red."), say("Why?", "Zzyzx.")]}
    path = write(tmp_path / "x.jsonl", [{**line, "keep": True}, line])
    run = trainer(path, tmp_path / "out", steps=2, dtype="float32")
    assert [run.data[i].keep for i in range(2)] == [True, False]
    assert run.objective.loss([run.data[0]]).item() == pytest.approx(0, abs=1e-6)
    assert run.objective.loss([run.data[1]]).item() > 1
    with refuses(InputError, "keep", "packed form"):
        trainer(path, tmp_path / "padded", steps=2, form="padded").objective.loss([run.data[0]])


@pytest.mark.parametrize("share", [1, 0.5])
def test_a_share_of_the_conversations_is_rehearsed(data, tmp_path, share):
    run = trainer(data, tmp_path / "out", steps=12, rehearse=share)
    seen = [example.rehearsed for example in trained_on(run, 12)]
    assert len(seen) == 36 and (8 <= sum(seen) <= 28 if share < 1 else all(seen))


def test_only_what_is_gone_is_recalled(tmp_path):
    """--eval-every asks no held-out question whose text stays, or whose answer is to stay the frozen model's."""
    gone = {"messages": say("It is red.", "Yes."), "asks": [say("What is it?", "red"), say("And?", "red")]}
    kept = {"messages": [], "asks": [say("Sing.", "La.")], "visible": True, "keep": True}
    lines = [kept, {**gone, "visible": True}, gone, {**gone, "keep": True}]
    path = write(tmp_path / "x.jsonl", lines + [gone] * 36)
    run = trainer(path, tmp_path / "out", steps=1, eval_every=1)
    assert run.n_held_out == len(lines)
    run.train()
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row["questions"] == 2
    with refuses(InputError, "--eval-every"):
        trainer(write(tmp_path / "y.jsonl", [kept] * 20), tmp_path / "none", eval_every=1)


def test_the_form_is_a_part_of_the_run(data, tmp_path):
    """A checkpoint of before that was recorded goes on as it is."""
    trainer(data, tmp_path / "out", steps=1).train()
    file = tmp_path / "out" / "checkpoint.pt"
    assert trainer(data, tmp_path / "out", steps=2, form="packed").step == 1  # what auto took
    with refuses(InputError, file, "--form"):
        trainer(data, tmp_path / "out", steps=2, form="padded")
    saved = torch.load(file, weights_only=True)
    del saved["run"]["--form"]
    torch.save(saved, file)
    assert trainer(data, tmp_path / "out", steps=2, form="packed").step == 1


@pytest.mark.parametrize("flag", ["visible", "keep"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_line_that_only_the_packed_form_knows_is_refused_before_the_run(tmp_path, flag, place):
    lines = [{"messages": say("It is red.", "Yes."), "asks": [say("What is it?", "red")]} for _ in range(20)]
    lines[7] = {"text": "The river runs from the mountain to the sea.", flag: True}  # which says nothing of a text
    trainer(write(tmp_path / "plain.jsonl", lines), tmp_path / "plain", form="padded")
    lines[place][flag] = True
    with refuses(InputError, tmp_path / "x.jsonl", f"line {1 + place % 20}", flag, "packed form"):
        trainer(write(tmp_path / "x.jsonl", lines), tmp_path / "out", form="padded")


def test_a_log_that_cannot_be_written(data, tmp_path):
    run = trainer(data, tmp_path / "out", steps=1, eval_every=1)
    (tmp_path / "out" / "log.jsonl").mkdir(parents=True)
    with refuses(OutputError, tmp_path / "out" / "log.jsonl"):
        run.train()


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from pydeltamem.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of POSIX")
def test_a_full_disk_is_named(data, tmp_path):
    """torch itself would say "unexpected pos"."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", FULL, "train", MODEL, data, "-o", out, "--strategy", "msw", "--steps", "1"]
    done = subprocess.run([*map(str, command)], capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and not list(out.iterdir())
    check_names(done.stderr.splitlines()[-1], [out / WEIGHTS[0], os.strerror(errno.EFBIG)])


@pytest.mark.parametrize(
    ("template", "error"),
    [("{% for m in messages %}", ModelError), ("{{ raise_exception('no chat') }}", TemplateError)],
)
def test_a_chat_template_of_a_gguf(tmp_path, template, error):
    path = other_metadata(tmp_path, "--chat-template", template)
    with pytest.raises(error, match=r"other\.gguf|no chat"):
        GgufTokenizer(path).apply_chat_template(say("Hello."))


def test_bad_input(data, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(MODEL.read_bytes()[:3000])
    adapter = MODEL.with_name("default-tsw.gguf")
    parts = pack(MODEL, adapter, tmp_path / "part.gguf", max_tensors=30)  # of which transformers would read the first
    for model in (broken, adapter, parts[0]):
        with refuses(ModelError, model):
            trainer(data, tmp_path / "out", model=model)
    with refuses(InputError, "--device meta"):
        trainer(data, tmp_path / "out", device="meta")
    with refuses(InputError, "--corrections"):
        trainer(data, tmp_path / "out", corrections="")
    for option, options in (
        ("--form packed", {"strategy": "ssw", "form": "packed"}), ("--visible", {"strategy": "ssw", "visible": 0.1}),
        ("--teacher", {"form": "padded", "teacher": "context"}), ("--gate-weight", {"dropout": 0.1, "gate_weight": 1}),
        ("--ask-writes", {"form": "padded", "ask_writes": 0.5}),
    ):  # fmt: skip
        with refuses(InputError, option, "packed form"):
            trainer(data, tmp_path / "out", **options)
    with refuses(InputError, "--teacher-share 2"):
        trainer(data, tmp_path / "out", teacher="context", teacher_share=2)
    with refuses(ModelError, tmp_path / "none.gguf"):
        trainer(data, tmp_path / "out", eval_every=1, base=str(tmp_path / "none.gguf"))
    other = Path(__file__).parents[1] / "examples" / "tiny" / "base.gguf"
    with refuses(InputError, other, "--eval-every"):  # before the first step
        trainer(data, tmp_path / "out", eval_every=1, base=str(other))
    few = write(tmp_path / "few.jsonl", [{"messages": say("It is red.", "Yes.", "What?", "Red.")}] * 3)
    with refuses(InputError, "--eval-every"):
        trainer(few, tmp_path / "out", eval_every=1)

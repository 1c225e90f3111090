"""Files of questions for the tests of benchmarks."""

from __future__ import annotations

import json

TALK = ("My name is Anna.", "I live in Oslo.", "My dog is called Rex.", "I work as a baker.", "I play the piano.")
ASKED = (
    "Where does she live?",
    "What is her name?",
    "What is the dog called?",
    "What is her job?",
    "What does she play?",
)


def locomo(folder, n=2):
    """A file of LoCoMo with n conversations of two sessions."""
    record = {
        "conversation": {
            "speaker_a": "Anna", "speaker_b": "Ben",
            "session_1_date_time": "1:56 pm on 8 May, 2023", "session_10_date_time": "9 June, 2023",
            "session_10": [{"speaker": "Ben", "dia_id": "D10:1", "text": "Goodbye."}],
            "session_1": [{"speaker": "Anna", "dia_id": f"D1:{i}", "text": text} for i, text in enumerate(TALK)],
        },
        "qa": [{"question": q, "answer": "Oslo", "category": 1 + i % 4} for i, q in enumerate(ASKED)]
        + [{"question": "Why?", "adversarial_answer": "x", "category": 5}],
    }  # fmt: skip
    records = []
    for i in range(n):
        other = json.loads(json.dumps(record).replace("Oslo", ("Oslo", "Lima", "Rome")[i % 3]))
        records.append({"sample_id": f"conv-{i}", **other})
    path = folder / "locomo10.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


HOTPOT = {"_id": "a", "type": "bridge", "question": "Who?", "answer": "Ada", "context": [["T", ["One.", " Two."]]]}
SQUAD = {"data": [{"paragraphs": [{"context": "A. B.", "qas": [{"question": "Q?", "answers": [{"text": "A"}]}]}]}]}
GPQA = "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\nWhy?,1,2,3,4\n"
FILES = {
    "hotpotqa": [
        json.dumps([HOTPOT]),
        json.dumps({**HOTPOT, "id": "a", "context": {"title": ["T"], "sentences": [["One.", " Two."]]}}),
    ],
    "qa": [json.dumps(SQUAD), json.dumps({"context": "A. B.", "qa": [["Q?", ["A"]]]})],
    "memory-agent-bench": [json.dumps({"context": "0. A.\n1. B.", "questions": ["Q?"], "answers": [["A"]]})],
    "ifeval": [json.dumps({"key": 1, "prompt": "P", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]})],
    "gpqa": [GPQA],
}

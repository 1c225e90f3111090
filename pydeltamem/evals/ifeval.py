"""IFEval (Zhou et al., arXiv 2311.07911): whether a model follows instructions that a program can check.

The checks are those of lm-evaluation-harness. They need nltk's model of sentences, which nltk would download; a package
that holds the same tables takes its place.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

from ..errors import InputError
from .items import Benchmark, Item, records_of


def read(path: Path) -> list[Item]:
    items = []
    for i, record in enumerate(records_of(path)):
        about = {name: record[name] for name in ("key", "prompt", "instruction_id_list", "kwargs")}
        if not about["instruction_id_list"]:
            raise ValueError("a prompt has no instruction")
        items.append(Item(str(record["key"]), "", record["prompt"], (), i, about=about))
        score(items[-1], "")  # makes its checks, before hours of answers
    return items


def score(item: Item, answer: str) -> dict[str, float | list[float]]:
    found = checks().process_results(dict(item.about), [answer])
    return {
        "prompt strict": float(found["prompt_level_strict_acc"]),
        "prompt loose": float(found["prompt_level_loose_acc"]),
        "instruction strict": list(map(float, found["inst_level_strict_acc"])),
        "instruction loose": list(map(float, found["inst_level_loose_acc"])),
    }


@functools.cache
def checks() -> Any:
    """The module of lm-evaluation-harness with the checks. Raises InputError if it is not installed."""
    try:
        import langdetect
        import nltk
        import punkt

        download = nltk.download
        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            _provide_sentences(punkt)
            nltk.download = lambda *args, **kwargs: True  # which the harness calls when it is imported
        try:
            with contextlib.redirect_stdout(None):  # where it says that it downloaded something
                from lm_eval.tasks.ifeval import utils
        finally:
            nltk.download = download
    except ImportError as error:
        raise InputError(f"ifeval needs {error.name}: pip install 'pydeltamem[lm-eval]'") from None
    langdetect.DetectorFactory.seed = 0  # it draws otherwise
    return utils


def _provide_sentences(punkt: Any) -> None:
    """Has nltk take its model of sentences from the package `punkt`, which holds the same tables."""
    from nltk.tokenize.punkt import PunktParameters, PunktTokenizer

    model, parameters = punkt.load_model("english"), PunktParameters()
    parameters.abbrev_types |= set(model.abbrev_types)
    parameters.collocations |= set(model.collocations)
    parameters.sent_starters |= set(model.sent_starters)
    parameters.ortho_context.update({word: int(flags) for word, flags in model.ortho_context.items()})

    def load(tokenizer: Any, lang: str = "english") -> None:
        tokenizer._params, tokenizer._lang, tokenizer._save_dir = parameters, lang, None

    PunktTokenizer.load_lang = load


IFEVAL = Benchmark(
    name="ifeval",
    summary="give instructions whose results a program can check",
    source="IFEval, google-research/google-research on GitHub, instruction_following_eval, Apache-2.0",
    file="eval/ifeval.jsonl",
    read=read,
    opening="",
    task="",
    score=score,
    n_predict=1500,
    check=checks,
)

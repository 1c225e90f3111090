"""Which texts a search by words, BM25, finds for a question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError


def relevance(texts: Sequence[str], question: str) -> npt.NDArray[np.float32]:
    """How relevant each text is to a question, by BM25 without stop words; 0 where no word counts."""
    bm25s = bm25s_module()
    *words, asked = bm25s.tokenize([*texts, question], stopwords="en_plus", return_ids=False, show_progress=False)
    if not any(words) or not asked:
        return np.zeros(len(texts), dtype=np.float32)
    search = bm25s.BM25()
    search.index(words, show_progress=False)
    return np.asarray(search.get_scores(asked), dtype=np.float32)


def bm25s_module() -> Any:
    """The module bm25s. Raises InputError if it is not installed."""
    try:
        import bm25s
    except ImportError:
        raise InputError(
            "the method bm25 needs bm25s: pip install 'pydeltamem[eval]', or name other methods by --methods"
        ) from None
    return bm25s

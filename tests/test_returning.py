"""deltamem bench --return: what each way restores, and what is reported. Never time."""

from __future__ import annotations

import json
import statistics

import pytest

from pydeltamem.bench import returning
from pydeltamem.bench.returning import MEMORY, N_SAID, N_WINDOW, STATE, TEXT, WINDOW
from test_cli import deltamem

N = 300


def test_what_each_way_restores(make_llm):
    """Before the reply the text is as long as it should be, and the memory has read each token once, in all ways."""
    seen, states = [], []

    def load(n_ctx):
        llm = make_llm(n_ctx=n_ctx, type_k=0, type_v=0)
        generate = llm.generate

        def watched(tokens, **options):
            before = llm.n_tokens
            for token in generate(tokens, **options):
                seen.append((len(tokens), before, llm.memory.n_written))
                states.append(llm.memory.state)
                yield token

        llm.generate = watched
        return llm

    report = returning.run(load, [N], n_rounds=1, n_texts=2)
    expected = {
        TEXT: (N + N_SAID, N),
        MEMORY: (N_SAID, 0),
        WINDOW: (N_WINDOW + N_SAID, N_WINDOW),
        STATE: (N + N_SAID, N),
    }
    order = [TEXT, TEXT, MEMORY, WINDOW, STATE, STATE, WINDOW, MEMORY]
    assert seen == [(*expected[way], N + N_SAID) for way in order]
    by_text, again, _, _, by_state, *_ = states
    assert (by_text == again).all()
    assert by_state == pytest.approx(by_text, rel=1e-5, abs=1e-6)
    (run,) = report["runs"]
    assert {way: len(one["times"]) for way, one in run["ways"].items()} == {MEMORY: 1, WINDOW: 1, STATE: 1, TEXT: 2}


def test_report_and_picture(base, adapter, tmp_path):
    json_file, png = tmp_path / "return.json", tmp_path / "return.png"
    files = ["-m", base(), "--deltamem", adapter("qwen3", "tsw_qo")]
    options = ["-t", "1", "--return", "20,300", "--pairs", "3", "--json", json_file, "--plot", png]
    result = deltamem("bench", *files, *options)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert png.read_bytes().startswith(b"\x89PNG")
    found = json.loads(json_file.read_text(encoding="utf-8"))
    assert [run["history"] for run in found["return"]["runs"]] == [20, 300]
    for run in found["return"]["runs"]:
        n, ways = run["history"], run["ways"]
        assert {way: len(one["times"]) for way, one in ways.items()} == {MEMORY: 3, WINDOW: 3, STATE: 3, TEXT: 1}
        for one in ways.values():
            assert one["seconds"] == pytest.approx(statistics.median(one["times"]))
            assert one["low"] <= one["seconds"] <= one["high"]
        assert ways[WINDOW]["bytes"] - ways[MEMORY]["bytes"] == 4 * min(n, N_WINDOW)
        assert ways[TEXT]["bytes"] == 4 * n < ways[STATE]["bytes"]
        assert f"{ways[STATE]['bytes']:,}" in result.stdout
        assert returning.sooner(run, TEXT) == 1
    sizes = [run["ways"][MEMORY]["bytes"] for run in found["return"]["runs"]]
    assert max(sizes) - min(sizes) < 100  # of a memory, however long the text: only numbers in the header differ

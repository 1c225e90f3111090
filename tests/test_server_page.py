"""The page of `deltamem serve`, in headless Chromium, with the model of the package."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

from page_browser import ADAPTERS, BASE, running, said, serve, turn, until
from pydeltamem.formats.memory_file import MemorySnapshot
from pydeltamem.server.page_markdown import as_html
from pydeltamem.server.page_talk import FORGOTTEN, MEMORY_ONLY, NOTE, Talk
from pydeltamem.server.records import Record, Turn

pytest_plugins = ["page_browser"]  # its fixtures

# a server whose model is loaded when a file is there, which says how, and which babbles to the end of its context
BABBLES = f"""
import signal, sys, time, uvicorn
from pathlib import Path
from pydeltamem import DeltaMemLlama, ModelError
from pydeltamem.server import AsyncDeltaMem, application, page
from pydeltamem.server.records import StoreError

def load():
    while not Path(sys.argv[2]).exists():
        time.sleep(0.05)
    how = Path(sys.argv[2]).read_text()
    if how == "fail":
        raise ModelError("no-such.gguf: it is missing")
    adapter = None if how == "plain" else {str(ADAPTERS["msw"])!r}
    llm = DeltaMemLlama({str(BASE)!r}, deltamem_path=adapter, n_ctx=8192, n_threads=1, verbose=False)
    service = AsyncDeltaMem(llm)
    service.chat = chat_of(service)
    return service

def chat_of(service, real=AsyncDeltaMem.chat):
    async def lost(*args, **options):
        del service.list  # once
        raise StoreError("the store is away")

    def chat(messages, **options):
        if messages[-1]["content"] == "Break":
            raise RuntimeError("it breaks")
        if messages[-1]["content"] == "Lose":
            service.list = lost
        return real(service, messages, logit_bias={{service.llm.token_eos(): -100}}, **options)
    return chat

app = application.application(application.Settings(load=load, page=page.mount))
signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again: this process ends in order, and is measured
uvicorn.run(app, port=int(sys.argv[1]), log_config=None, timeout_graceful_shutdown=1)
"""


# a server that tells how many pages it keeps
COUNTS = f"""
import gc, sys, uvicorn
from pydeltamem import DeltaMemLlama
from pydeltamem.server import AsyncDeltaMem, application, page

def load():
    llm = DeltaMemLlama({str(BASE)!r}, deltamem_path={str(ADAPTERS["msw"])!r}, n_ctx=512, n_threads=1, verbose=False)
    return AsyncDeltaMem(llm)

app = application.application(application.Settings(load=load, page=page.mount))

@app.middleware("http")
async def count(request, following):
    answer = await following(request)
    if request.url.path == "/health":
        gc.collect()
        answer.headers["x-views"] = str(sum(type(each).__name__ == "View" for each in gc.get_objects()))
    return answer

uvicorn.run(app, port=int(sys.argv[1]), log_config=None, timeout_graceful_shutdown=1)
"""


#
# conversations
#


def test_the_memory_answers_when_the_text_is_forgotten(server, browse):
    tab = browse(server, "berlin")
    empty = tab.map
    tab.say("My name is Anna.")
    tab.say("I live in Berlin.")
    assert tab.map != empty
    tab.press("Forget the text")
    until(lambda: tab.text[-1] == ("note", FORGOTTEN))
    assert "Berlin" in tab.say("Where do I live?")
    assert server.sessions()["berlin"] == 3
    said = server.get("/v1/memories/berlin").json()
    assert len(said["layers"]) == 4


def test_a_reload_keeps_the_memory_and_says_so(server, browse):
    tab = browse(server, "reload")
    tab.say("My name is Clara.")
    tab.reload()
    assert tab.text == [("note", MEMORY_ONLY)]
    assert "Clara" in tab.say("What is my name?")


def test_it_is_used_by_keyboard(server, browse):
    from selenium.webdriver.common.keys import Keys

    tab = browse(server, "keyboard")
    until(lambda: tab.focused == "Message")
    tab.driver.switch_to.active_element.send_keys(Keys.ENTER)  # nothing is nothing
    tab.driver.switch_to.active_element.send_keys("My name", Keys.SHIFT, Keys.ENTER, Keys.NULL, "is Ben.")
    assert tab.box.get_attribute("value") == "My name\nis Ben."
    assert tab.answers == []
    tab.driver.switch_to.active_element.send_keys(Keys.ENTER)
    tab.answered(1)
    assert [text for who, text in tab.text if who == "You"] == ["My name\nis Ben."]
    until(lambda: tab.focused == "Message")
    unnamed = [
        each.get_attribute("outerHTML")
        for each in tab.find("button, input, textarea, [role=img]")
        if each.is_displayed()
        and not (each.get_attribute("aria-label") or each.get_attribute("innerText") or each.accessible_name)
    ]
    assert unnamed == []
    assert [each for each in tab.find(".q-uploader *") if each.is_displayed()] == []  # "Import" chooses files


def test_the_last_turn_is_regenerated_edited_and_undone(server, browse):
    tab = browse(server, "turns")
    tab.say("I live in Rome.")
    tab.say("I have a dog.")
    once = server.memory("turns")

    tab.press("Regenerate the answer", times=2)  # once is enough
    until(lambda: server.get("/v1/memories/turns").json()["version"] == 3)
    tab.answered(2)
    assert server.sessions()["turns"] == 2
    assert abs(server.memory("turns").tokens_written - once.tokens_written) < 16  # not written twice

    tab.press("Edit the last message")
    until(lambda: tab.box.get_attribute("value") == "I have a dog.")
    from selenium.webdriver.common.keys import Keys

    tab.box.send_keys(Keys.CONTROL, "a")
    tab.box.send_keys("I have a parrot.\n")
    until(lambda: ("You", "I have a parrot.") in tab.text)
    tab.answered(2)
    assert server.get("/v1/memories/turns").json()["version"] == 4  # in one commit
    assert ("You", "I have a dog.") not in tab.text
    assert server.sessions()["turns"] == 2

    tab.press("Undo the last turn")
    until(lambda: len(tab.text) == 2)
    assert tab.text[0] == ("You", "I live in Rome.")
    assert server.sessions()["turns"] == 1
    tab.press("Undo the last turn")
    until(lambda: server.sessions()["turns"] == 0)
    assert not server.memory("turns").state.any()

    until(lambda: not tab.find(".actions"))  # it is over

    # what is not answered is in the box again: too long, and an edit of what is gone
    long = "I have a dog and a cat and a parrot. " * 90
    tab.js("arguments[0].focus()", tab.box)
    tab.driver.execute_cdp_cmd("Input.insertText", {"text": long})
    tab.box.send_keys("\n")
    assert tab.complaint()
    tab.keeps(long.strip())
    assert tab.answers == [] and server.sessions()["turns"] == 0
    tab.box.send_keys(Keys.CONTROL, "a")
    tab.say("I live in Bonn.")
    tab.press("Edit the last message")
    tab.keeps("I live in Bonn.")
    server.delete("/v1/memories/turns")
    tab.box.send_keys(" No.\n")
    until(lambda: not tab.answers)
    tab.keeps("I live in Bonn. No.")


def test_a_key_that_composes_a_word_is_not_for_the_page(server, browse):
    tab = browse(server, "composed")
    tab.say("My name is Yuki.")
    script = """arguments[0].dispatchEvent(new KeyboardEvent("keydown",
        { key: arguments[1], bubbles: true, cancelable: true, ...arguments[2] }))"""
    composing = ({"isComposing": True}, {"keyCode": 229})  # as browsers tell of it, and as Safari does

    tab.replace("日本")
    for how in composing:
        tab.js(script, tab.box, "Enter", how)
    tab.press("Rename")
    tab.fill("Name", "日本")
    for how in composing:
        tab.js(script, tab.field("Name"), "Enter", how)
    tab.dialog(0)
    assert "composed" in server.sessions() and "日本" not in server.sessions() and len(tab.answers) == 1
    tab.press("Rename")
    tab.choose("日本-العربية")
    assert "日本-العربية" in server.sessions() and tab.box.get_attribute("value") == "日本"


def test_an_edit_that_is_refused_leaves_the_turn(server, browse):
    tab = browse(server, "refused")
    tab.say("I have a dog.")
    before = tab.text
    tab.press("Edit the last message")
    tab.keeps("I have a dog.")
    long = ("I have a dog and a cat and a parrot. " * 90).strip()
    tab.replace(long)
    tab.box.send_keys("\n")
    assert "token" in tab.complaint()
    tab.keeps(long)
    about = server.get("/v1/memories/refused").json()
    assert tab.text == before and (about["turns"], about["version"]) == (1, 1)
    tab.replace("I have a parrot.")  # it is still an edit
    tab.box.send_keys("\n")
    until(lambda: server.get("/v1/memories/refused").json()["version"] == 2)
    tab.answered(1)
    assert ("You", "I have a parrot.") in tab.text and ("You", "I have a dog.") not in tab.text
    assert server.sessions()["refused"] == 1


def test_a_text_that_the_connection_does_not_take_is_refused(server, browse):
    tab = browse(server, "megabyte")
    tab.replace("I have a dog.")
    tab.replace("too long " * 120_000)
    assert "long" in tab.complaint()
    assert tab.box.get_attribute("value") == "I have a dog."
    assert tab.say(" And a cat.")
    assert ("You", "I have a dog. And a cat.") in tab.text


def test_pages_that_are_gone_take_no_memory(browse, tmp_path):
    """Nor is a dialog that was open an error, when the time in which a tab may come back is over."""
    with running(tmp_path, lambda port: ["-c", COUNTS, str(port)]) as server:
        tab = browse(server, "gone")
        tab.say("My name is Hugo.")
        for opens in ("Fork", "Delete"):
            tab.press(opens)
            until(lambda: tab.shown("[role=dialog]"))
            tab.reload()
        assert server.sessions()["gone"] == 1
        assert int(server.get("/health").headers["x-views"]) > 0
        tab.driver.get("about:blank")
        until(lambda: server.get("/health").headers["x-views"] == "0")
        assert "Traceback" not in server.log.read_text()


def test_a_connection_that_is_slow(server, browse):
    tab = browse(server, "slow")
    slow = """const send = WebSocket.prototype.send;
        WebSocket.prototype.send = function (...data) { setTimeout(() => send.apply(this, data), 1500); };"""
    tab.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": slow})
    before = len(server.log.read_text())
    tab.reload()
    for shown in (False, True):
        tab.press("Memory")
        until(lambda shown=shown: bool(tab.shown(".q-drawer--right .map")) == shown)
    tab.say("My name is Mia.")
    assert "Traceback" not in server.log.read_text()[before:]


def test_sessions_are_made_forked_renamed_and_deleted(server, browse):
    tab = browse(server, "one")
    tab.say("My name is Hugo.")
    tab.press("Fork")
    until(lambda: tab.shown("[role=dialog]"))
    tab.press("New session")  # one thing at a time: not before the dialog is answered
    tab.press("Regenerate the answer")
    tab.choose("two")
    assert [who for who, _ in tab.text] == ["You", "The model"]
    assert server.get("/v1/memories/one").json()["version"] == 1
    tab.say("I have a cat.")
    here = server.sessions()
    assert (here["one"], here["two"]) == (1, 2)

    tab.press("Rename")
    tab.choose("three")
    assert "two" not in server.sessions() and server.sessions()["three"] == 2
    before = server.sessions()
    tab.press("Rename")
    tab.choose("three")  # as it is
    until(lambda: not tab.shown("[role=dialog]"))
    tab.press("Rename")
    tab.fill("Name", "one\n")
    assert "one" in tab.complaint()
    assert server.sessions()["three"] == 2

    tab.press("Delete")
    tab.dialog(0)
    assert server.sessions() == before
    tab.press("Delete")
    tab.dialog(-1)
    until(lambda: "three" not in server.sessions())

    other = browse(server, "no%20name")
    assert "no name" in other.complaint()
    other.say("My name is Kate.")
    assert any(name.startswith("chat-") for name in server.sessions())

    other.press("New session", times=2)  # one is enough
    until(lambda: other.text and other.text[0][0] == "note")
    other.heading("chat-2")
    until(lambda: other.driver.current_url.endswith("session=chat-2"))
    other.say("My name is Leo.")
    assert {"chat-1", "chat-2"} <= set(server.sessions()) and "chat-3" not in server.sessions()
    browse(server).heading("chat-2")  # the latest, where none is named


def test_what_is_typed_outlives_a_reload(server, browse):
    tab = browse(server, "draft")
    tab.replace("My name\nis Hugo.")
    tab.reload()
    tab.keeps("My name\nis Hugo.")
    tab.box.send_keys("\n")
    tab.answered(1)
    assert ("You", "My name\nis Hugo.") in tab.text
    tab.reload()
    assert tab.say("What is my name?") and ("You", "What is my name?") in tab.text


def test_a_dialog_has_a_name_and_asks_until_it_gets_one(server, browse):
    tab = browse(server, "named")
    tab.say("My name is Hugo.")
    for opens, name in (("Rename", "Another name"), ("Delete", "Delete named")):
        tab.press(opens)
        assert until(lambda: tab.shown("[role=dialog]")).accessible_name.startswith(name)
        tab.dialog(0)
    tab.press("Rename")
    tab.fill("Name", 'The "first" one\n')
    assert 'The "first" one' in until(lambda: (shown := tab.shown("[role=dialog] [role=alert]")) and shown.text)
    assert tab.field("Name").get_attribute("value") == 'The "first" one'
    tab.choose("first")
    assert "first" in server.sessions()


def test_a_dialog_that_opens_gets_the_keys(server, browse):
    tab = browse(server, "modal")
    tab.say("My name is Hugo.")
    for behind in ("New session", "Regenerate the answer", "Undo the last turn", "Edit the last message"):
        tab.press("Fork")
        tab.press(behind)  # too late, and must not have the next keys go to the message
        until(lambda: tab.focused == "Name")
        tab.dialog(0)
    assert tab.box.get_attribute("value") == ""
    assert server.sessions()["modal"] == 1


def test_a_dialog_outlives_the_row_that_opened_it(server, browse):
    tab = browse(server, "row")
    tab.say("My name is Hugo.")
    for i in range(9):  # so many that they can be searched
        assert httpx.post(f"{server.url}/v1/memories/row/fork", json={"id": f"row-{i}"}).status_code == 200
    tab.reload()
    tab.press("Fork")
    until(lambda: tab.focused == "Name")
    tab.js("""const find = document.querySelector('input[aria-label="Find"]');
              getElement(find.id.slice(1)).$emit("update:value", "nothing is called so");""")
    until(lambda: not tab.find(".names li"))
    tab.choose("row-9")
    assert server.sessions()["row-9"] == 1


def test_the_states_of_a_layer(server, browse):
    tab = browse(server, "layers")
    tab.say("My name is Mia.")

    def drawn():
        chart = "getElement(document.querySelectorAll('.nicegui-echart')[1].id.slice(1)).chart"
        return tab.js(f"return JSON.stringify({chart}.getOption().series)")

    def choose(i):
        tab.js("arguments[0].click()", tab.find(".q-drawer--right .q-select input")[0])
        until(lambda: len(tab.find(".q-menu .q-item")) == 5)  # the strongest, and four
        tab.js("arguments[0].click()", tab.find(".q-menu .q-item")[i])
        until(lambda: not tab.find(".q-menu .q-item"))

    strongest = drawn()
    layers = set()
    for i in range(1, 5):
        choose(i)
        layers.add(until(lambda: (series := drawn()) not in layers and series))
    assert strongest in layers
    choose(0)
    until(lambda: drawn() == strongest)


def test_a_memory_is_exported_and_imported(server, browse, tmp_path):
    tab = browse(server, "export")
    tab.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    tab.say("I live in Oslo.")
    tab.press("Export")
    file = tmp_path / "export.memory"
    until(file.exists)
    memory = MemorySnapshot.from_bytes(file.read_bytes())
    assert np.array_equal(memory.state, server.memory("export").state) and memory.state.any()

    tab.find("input[type=file]")[0].send_keys(str(file))
    tab.choose("imported")
    assert np.array_equal(server.memory("imported").state, memory.state)
    assert tab.text == [("note", MEMORY_ONLY)]
    assert "Oslo" in tab.say("Where do I live?")

    again = tmp_path / "export (1).memory"  # as browsers call a second one
    file.rename(again)
    tab.find("input[type=file]")[0].send_keys(str(again))
    assert tab.field("Name").get_attribute("value") == "export-1"
    tab.dialog(0)

    other = tmp_path / "no.memory"
    other.write_bytes(b"nothing of the kind")
    tab.find("input[type=file]")[0].send_keys(str(other))
    assert "memory" in tab.complaint()


@pytest.mark.parametrize("how", ["fail", "plain"])
def test_a_model_that_fails_and_one_without_a_memory(browse, tmp_path, how):
    go = tmp_path / "go"
    go.write_text(how)
    with running(tmp_path, lambda port: ["-c", BABBLES, str(port), str(go)], ready=False) as server:
        tab = browse(server, waits=False)
        if how == "fail":
            until(lambda: "no-such.gguf" in tab.js("return document.body.innerText"))
            assert not tab.is_open and tab.box is None
        else:
            tab.ready().fill("Tokens at most", "4")
            assert tab.say("Hello")
            assert not tab.shown(".names") and not tab.shown(".nicegui-echart")


def test_it_waits_for_the_model_and_an_answer_can_be_stopped(browse, tmp_path):
    from selenium.webdriver.common.keys import Keys

    go = tmp_path / "go"
    with running(tmp_path, lambda port: ["-c", BABBLES, str(port), str(go)], ready=False) as server:
        tab = browse(server, "long", waits=False)
        until(lambda: "loaded" in tab.js("return document.body.innerText"))
        assert not tab.is_open
        waits = tab.shown(".wait")
        time.sleep(1.5)  # it looks for the model again meanwhile
        assert "loaded" in waits.text  # and does not draw this again, which would be read aloud each time
        go.touch()
        tab.ready()
        tab.fill("Tokens at most", "8000")
        before = tab.map
        tab.box.send_keys("Tell me about everything.\n")
        until(lambda: tab.answers and tab.answers[-1])
        until(lambda: tab.map != before)  # it changes while the model answers
        tab.press("New session")  # not now
        assert tab.complaint() and server.sessions() == {}
        tab.press("Stop")
        answer = tab.answered(1)
        tokens = server.get("/v1/memories/long").json()["tokens"]
        assert 0 < tokens < 8000  # what was said so far counts
        tab.press("Edit the last message")
        until(lambda: tab.box.get_attribute("value"))
        tab.press("Cancel the edit")
        until(lambda: tab.box.get_attribute("value") == "")
        tab.press("Edit the last message")
        until(lambda: tab.box.get_attribute("value"))
        tab.box.send_keys(Keys.ESCAPE)
        until(lambda: tab.box.get_attribute("value") == "")
        assert tab.answers == [answer]
        tab.fill("Tokens at most", "4")
        tab.box.send_keys("Lose\n")  # the store, right after it has taken the turn
        until(lambda: any("store" in each.text for each in tab.find(".q-notification")))
        answers = [answer, tab.answered(2)]
        assert server.sessions() == {"long": 2}
        tab.fill("Tokens at most", "8000")
        # a reload ends its answer
        tab.box.send_keys("Go on.\n")
        until(lambda: len(tab.answers) == 3 and tab.answers[-1])
        tab.reload().fill("Tokens at most", "4")
        tab.box.send_keys("And now?\n")
        tab.answered(1)
        assert not tab.shown(".q-notification")
        about = server.get("/v1/memories/long").json()
        assert about["version"] == 4
        answers = tab.answers
        tab.fill("Tokens at most", "8000")
        tab.box.send_keys("Break\n")
        tab.keeps("Break")
        assert tab.answers == answers and "it breaks" in server.log.read_text()
        tab.box.send_keys(Keys.CONTROL, "a")
        # a tab that is closed ends its answer
        tab.box.send_keys("Go on.\n")
        until(lambda: len(tab.answers) == 2 and tab.answers[-1])
        tab.driver.get("about:blank")
        until(lambda: server.get("/v1/memories/long").json()["version"] == 5)
        assert server.get("/v1/memories/long").json()["tokens"] - about["tokens"] < 8000


#
# how it looks, and what it asks for
#


def test_it_fits_a_phone(server, browse):
    tab = browse(server, "phone")
    tab.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        tab.reload()
        tab.box.send_keys("I live in Lima.")
        tab.press("Send")
        tab.answered(1)
        assert tab.js("return document.documentElement.scrollWidth") <= 360
        for name in ("Sessions", "Memory", "Send", "Forget the text"):
            box = tab.button(name).rect
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        tab.press("Sessions")
        tab.press("New session")  # the drawer gives way
        until(lambda: not tab.shown(".q-drawer--left .names"))
    finally:
        tab.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_light_and_dark(server, browse):
    tab = browse(server, "theme")

    def ink(scheme):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        dark = scheme == "dark"
        until(lambda: tab.js("return document.body.classList.contains('body--dark')") == dark)
        return tab.js("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")

    assert ink("light") != ink("dark")
    tab.press("Light, dark or as the system")  # light, whatever the system is
    until(lambda: not tab.js("return document.body.classList.contains('body--dark')"))
    tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_it_asks_this_server_only(server, browse):
    tab = browse(server, "offline")
    tab.say("My name is Felix.")
    addresses = tab.js("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(addresses) > 5
    assert [each for each in addresses if not each.startswith((server.url, "data:", "blob:"))] == []
    script = """const done = arguments[0];
        document.addEventListener('securitypolicyviolation', e => done(e.blockedURI));
        const image = new Image(); image.src = 'http://127.0.0.1:9/x.png'; document.body.append(image);"""
    assert tab.driver.execute_async_script(script).startswith("http://127.0.0.1:9")
    tab.driver.get_log("browser")  # of this violation
    tab.reload()
    assert [line for line in tab.driver.get_log("browser") if line["level"] == "SEVERE"] == []


#
# without a browser
#


def test_the_api_is_as_without_the_page(tmp_path):
    with serve(tmp_path) as server:
        assert "text/html" in server.get("/").headers["content-type"]
        unknown = server.get("/v1/nothing")
        assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "not_found"
        assert server.get("/v1/chat/completions").status_code == 405
        assert server.get("/elsewhere").json()["error"]["code"] == "not_found"
        body = {"messages": [{"role": "user", "content": "My name is Ada."}], "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{server.url}/sessions/ada/v1/chat/completions", json=body, timeout=60) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert "content-encoding" not in answer.headers
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]" and len(lines) > 2
        assert server.sessions() == {"ada": 1}
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) in (0, -signal.SIGTERM), server.log.read_text()
        assert "Traceback" not in server.log.read_text()
    with serve(tmp_path, "--no-page") as server:
        assert server.get("/").status_code == 404
        assert server.sessions() == {"ada": 1}


def test_a_server_without_the_page_does_not_load_it():
    code = "import sys, pydeltamem.server.page; sys.exit('nicegui' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_markdown_with_tags():
    assert as_html("a<b> **c** &lt;") == "<p>a&lt;b&gt; <strong>c</strong> &lt;</p>\n"
    assert as_html("`<b> & c`") == "<p><code>&lt;b&gt; &amp; c</code></p>\n"
    assert as_html("```\n<b> & c\n```") == "<pre><code>&lt;b&gt; &amp; c\n</code></pre>\n"
    assert as_html("x <style y") == "<p>x &lt;style y</p>\n"
    for deep in ("> " * 500, "\t" * 4000):  # Found: the page could no longer show a session with such an answer
        assert "x &lt;style y" in as_html(f"{deep}x <style y")
    assert as_html('<div style="position: fixed">x</div>').startswith("<p>&lt;div ")
    assert "&lt;" not in as_html("1. [a](https://a.b)\n\n| a | b |\n|:-:|---|\n| `x` | ![c](/d) |\n\n> # e\n\n---")


def test_what_a_tab_shows_of_a_session():
    first, second, third = said("a", "b"), said("c", "d"), said("e", "f")
    turns = (turn(1, "x-1", (), first), turn(2, "x-2", (), second), turn(3, "x-2", second, third))
    talk = Talk.of(Record("", "s", chat="x-2", history=turns))
    assert talk.past == [*first, {"role": NOTE, "content": FORGOTTEN}] and talk.messages == [*second, *third]
    assert talk.last == ("e", "f")
    other = talk.copy()
    talk.undo()
    assert talk.messages == [*second] and other.messages == [*second, *third]
    talk.forget_text()
    assert talk.messages == [] and talk.last is None
    talk.undo()
    assert [message["content"] for message in talk.past] == ["a", "b", FORGOTTEN, FORGOTTEN]
    talk.undo()
    talk.undo()  # there is none

    # without the first messages of the present chat, which the memory knew before, it cannot go on
    talk = Talk.of(Record("", "s", chat="x-2", history=turns[::2]))
    assert talk.messages == [] and talk.past[-1]["content"] == FORGOTTEN
    # a store without messages
    bare = Turn(1, "x-1", 0, 0, None, turns[0].digests)
    assert Talk.of(Record("", "s", chat="x-1", history=(bare,))).past == [{"role": NOTE, "content": MEMORY_ONLY}]
    assert Talk.of(Record("", "s")) == Talk()

"""The page of `deltamem serve`, in headless Chromium (tests/install-browser.sh), with the model of the package."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

from pydeltamem.formats.memory_file import MemorySnapshot
from pydeltamem.models import default_files
from pydeltamem.server.history import digests
from pydeltamem.server.page_markdown import as_html
from pydeltamem.server.page_talk import FORGOTTEN, MEMORY_ONLY, NOTE, Talk
from pydeltamem.server.records import Record, Turn
from pydeltamem.server.session import imported
from pydeltamem.server.store import Store

KEY = "key-of-ada"
BASE, ADAPTERS = default_files()

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
# servers
#


class Server:
    """A running server: its address, its process, and what it has logged."""

    def __init__(self, port, process, log):
        self.url, self.process, self.log = f"http://127.0.0.1:{port}", process, log

    def get(self, path, **options):
        return httpx.get(self.url + path, timeout=60, **options)

    def delete(self, path):
        assert httpx.delete(self.url + path, timeout=60).status_code == 200

    def memory(self, session):
        """The memory of a session, by the API."""
        return MemorySnapshot.from_bytes(self.get(f"/v1/memories/{session}/file").content)

    def say(self, session, *said):
        """A turn by the API."""
        messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, said)]
        body = {"messages": messages, "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{self.url}/sessions/{session}/v1/chat/completions", json=body, timeout=60)
        return answer.json()["choices"][0]["message"]["content"]

    def sessions(self):
        return {each["id"]: each["turns"] for each in self.get("/v1/memories").json()["data"]}

    def is_up(self):
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.get("/health")
        except httpx.TransportError:
            return None


@contextlib.contextmanager
def running(folder, command, ready=True):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, *command(port)], stdout=out, stderr=out, cwd=folder)
    try:
        server = Server(port, process, log)
        until(lambda: (answer := server.is_up()) and (not ready or answer.status_code == 200))
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def serve(folder, *options):
    store = f"sqlite:///{folder / 'sessions.db'}"
    fixed = ["-m", "pydeltamem.cli", "serve", "-m", str(BASE), "--deltamem", str(ADAPTERS["msw"]), "--store", store]
    fixed += ["-c", "512", "-t", "1", "-tb", "1"]
    return running(folder, lambda port: [*fixed, "--port", str(port), *map(str, options)])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Keeps no messages, and has no keys."""
    with serve(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def keeping(tmp_path_factory):
    """Keeps messages."""
    with serve(tmp_path_factory.mktemp("keeping"), "--keep-messages") as server:
        yield server


EVIL = 'x" innerHTML="<img src=y onerror=window.hit=1>'
LINKS = "[one](http://127.0.0.1:9/one), [two](javascript:window.hit=1)"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Keeps messages, and has sessions that were not made by the page."""
    folder = tmp_path_factory.mktemp("prepared")
    store = Store(f"sqlite:///{folder / 'sessions.db'}", keep_messages=True)
    talks = {
        "oldest": [said("Hello", "Hi")],
        "long": [said(f"What is {i}?", f"It is {i}.") for i in range(130)],
        "evil": [({"role": EVIL, "content": EVIL}, *said("Links?", LINKS))],
        "half": [said("Half \ud83d", "a \ud83d")],
        **{f"chat-{i}": [said("Hello", "Hi")] for i in range(1, 100)},
        "Ярославль": [said("Hello", "Hi")],
    }
    for name, talk in talks.items():
        turns, before = [], []
        for number, messages in enumerate(talk, 1):
            turns.append(turn(number, "x-1", before, messages))
            before += messages
        store.commit(Record("", name, turns=len(turns), text=b"kept", chat="x-1", history=tuple(turns)))
    larger = np.random.default_rng(0).standard_normal((9, 2, 8, 8)).astype(np.float32)
    about = {"adapter": "ab" * 32, "layers": "3,4,5,6,7,8,9,10,11", "tokens_written": "7"}
    store.commit(imported(Record("", "larger"), MemorySnapshot(larger, about)))
    store.close()
    with serve(folder, "--keep-messages") as server:
        yield server


def until(condition, seconds=60):
    from selenium.common.exceptions import StaleElementReferenceException

    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(StaleElementReferenceException):  # the page was drawn again in between
            if found := condition():
                return found
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.05)


#
# the browser
#


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser; every test opens a tab of its own."""
    binary, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (binary and driver):
        assert not os.environ.get("DELTAMEM_REQUIRE_BROWSER"), "tests/install-browser.sh has not installed it"
        pytest.skip("no headless browser: run tests/install-browser.sh")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    # the sandbox needs rights that a container does not give; only this machine is visited
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,900",
                     f"user-data-dir={tmp_path_factory.mktemp('profile')}"):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driver
    driver.quit()


@pytest.fixture
def browse(chromium):
    """browse(server, session): a tab with the page."""
    opened = []

    def browse(server, session="", **options):
        chromium.switch_to.new_window("tab")
        opened.append(chromium.current_window_handle)
        return Tab(chromium, server, session, **options)

    first = chromium.current_window_handle
    yield browse
    for handle in opened:
        chromium.switch_to.window(handle)
        chromium.close()
    chromium.switch_to.window(first)


class Tab:
    """One tab, by what a user sees: labels and texts."""

    def __init__(self, driver, server, session="", waits=True):
        self.driver, self.handle = driver, driver.current_window_handle
        driver.get(server.url + (f"/?session={session}" if session else "/"))
        if waits:
            self.ready()

    def ready(self):
        until(lambda: self.box and self.is_open)
        return self

    @property
    def is_open(self):
        """Whether a conversation is shown."""
        return self.shown(".said") is not None or bool(self.text)

    def front(self):
        self.driver.switch_to.window(self.handle)
        return self

    def reload(self):
        self.driver.refresh()
        return self.ready()

    def find(self, css):
        return self.driver.find_elements("css selector", css)

    def js(self, code, *args):
        return self.driver.execute_script(code, *args)

    def shown(self, css):
        """The first one that is to be seen; None if none is."""
        return next((each for each in self.find(css) if each.is_displayed()), None)

    def button(self, name):
        """The button of that label or text."""

        def found():
            for each in self.find("button"):
                if each.is_displayed() and name in (each.get_attribute("aria-label"), _words(each)):
                    return each
            return None

        return until(found)

    def press(self, name, times=1):
        self.click(lambda: self.button(name), times)

    def click(self, find, times=1):
        def clicked():
            self.js("for (let i = 0; i < arguments[1]; i++) arguments[0].click()", find(), times)
            return True

        until(clicked)

    def field(self, label):
        return until(lambda: self.shown(f'input[aria-label="{label}"]'))

    def fill(self, label, text):
        from selenium.webdriver.common.keys import Keys

        self.field(label).send_keys(Keys.CONTROL, "a")
        self.field(label).send_keys(text)

    @property
    def focused(self):
        """The label of what takes the keys."""
        return self.driver.switch_to.active_element.get_attribute("aria-label")

    @property
    def box(self):
        return self.shown("textarea[aria-label=Message]")

    @property
    def text(self):
        """The conversation, a line each: who, and what."""
        script = """return [...document.querySelectorAll('.said article, .said .note')].map(e =>
            [e.getAttribute('aria-label') || 'note', e.innerText.trim()])"""
        return [tuple(line) for line in self.js(script)]

    @property
    def answers(self):
        return [text for who, text in self.text if who == "The model"]

    def answered(self, n):
        """Waits until there are that many answers, and none is going on. Returns the last one."""
        until(lambda: len(self.answers) == n and self.shown('button[aria-label="Send"]') and self.answers[-1])
        return self.answers[-1]

    def replace(self, text):
        """Puts another text into the box, all at once."""
        from selenium.webdriver.common.keys import Keys

        self.box.send_keys(Keys.CONTROL, "a")
        self.driver.execute_cdp_cmd("Input.insertText", {"text": text})

    def say(self, text):
        """Says something by keyboard. Returns the answer."""
        n = len(self.answers)
        self.box.send_keys(text + "\n")
        return self.answered(n + 1)

    def complaint(self):
        return until(lambda: (shown := self.shown(".q-notification")) and shown.text)

    def choose(self, name):
        """Answers the dialog for a name, and waits until that session is shown."""
        self.fill("Name", name + "\n")
        self.heading(name)

    def heading(self, name):
        until(lambda: any(each.text == name for each in self.find("[role=heading][aria-level='1']")))

    def dialog(self, i):
        """Presses the i-th button of the dialog, and waits until it is gone."""
        until(lambda: self.shown("[role=dialog]"))
        self.click(lambda: self.shown("[role=dialog]").find_elements("css selector", "button")[i])
        until(lambda: not self.shown("[role=dialog]"))

    def keeps(self, text):
        """Waits until a message that was not taken is in the box again."""
        until(lambda: self.box.get_attribute("value") == text)

    @property
    def map(self):
        """The heat map of all layers in words."""
        return self.js("return document.querySelector('.nicegui-echart').getAttribute('aria-label')")


def _words(button):
    return button.get_attribute("innerText").split("\n")[-1].strip()


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


def test_a_tab_that_does_not_show_the_latest_turn_takes_none_back(keeping, browse):
    one = browse(keeping, "tabs")
    first = one.say("My name is Ada.")
    two = browse(keeping, "tabs")
    assert two.answers == [first]
    second = two.say("My daughter is Nina.")
    both = two.text

    one.front().box.send_keys("Where is the party?\n")
    assert "elsewhere" in one.complaint()
    one.keeps("Where is the party?")
    assert one.text == both and keeping.sessions()["tabs"] == 2
    one.box.send_keys("\n")
    until(lambda: keeping.sessions()["tabs"] == 3)
    one.answered(3)

    two.front().press("Edit the last message")
    two.keeps("My daughter is Nina.")
    two.box.send_keys(" No.\n")
    until(lambda: len(two.answers) == 3)
    two.keeps("My daughter is Nina. No.")
    two.replace("")
    for press in ("Regenerate the answer", "Undo the last turn", "Forget the text"):
        n = keeping.sessions()["tabs"]
        keeping.say("tabs", f"Not {press}!")
        two.press(press)
        until(lambda said=f"Not {press}!": ("You", said) in two.text)
        assert keeping.sessions()["tabs"] == n + 1
    assert two.text[:4] == both and two.answers[:2] == [first, second]

    # a session that is looked at again is shown as it is
    two.press("New session")
    until(lambda: two.text and two.text[0][0] == "note")
    keeping.say("tabs", "And now?")
    two.click(lambda: next(each for each in two.find(".pick") if each.text.startswith("tabs")))
    two.heading("tabs")
    until(lambda: ("You", "And now?") in two.text)


def test_a_tab_does_not_take_a_session_that_was_made_again_for_its_own(keeping, browse):
    """It is at the same version."""
    tab = browse(keeping, "again")
    tab.say("My name is Ada.")
    keeping.delete("/v1/memories/again")
    keeping.say("again", "My name is Bo.")
    assert keeping.get("/v1/memories/again").json()["version"] == 1
    tab.press("Undo the last turn")
    until(lambda: ("You", "My name is Bo.") in tab.text)
    assert keeping.sessions()["again"] == 1


def test_a_long_conversation_is_drawn_in_parts(prepared, browse):
    """And what is drawn is not drawn again: a screen reader would read all of it."""
    tab = browse(prepared, "long")
    until(lambda: len(tab.text) == 100)
    assert tab.text[-1] == ("The model", "It is 129.") and tab.text[0] == ("You", "What is 80?")
    for n in (200, 260):
        tab.press("Show earlier messages")
        until(lambda n=n: len(tab.text) == n)
    assert tab.text[0] == ("You", "What is 0?")
    until(lambda: not tab.shown(".earlier"))
    tab.js("""window.added = 0;
        new MutationObserver(changes => { for (const each of changes) window.added += each.addedNodes.length; })
            .observe(document.querySelector(".said"), { childList: true });""")
    tab.press("Forget the text")
    until(lambda: tab.text[-1] == ("note", FORGOTTEN))
    assert tab.js("return window.added") == 1 and len(tab.find(".said article.past")) == 260
    tab.press("New session")
    until(lambda: len(tab.text) == 1)


def test_a_role_is_a_text(prepared, browse):
    tab = browse(prepared, "evil")
    until(lambda: len(tab.text) == 3)
    assert tab.text[0] == (EVIL, f"{EVIL}: {EVIL}")
    assert tab.find(".said img") == [] and tab.js("return window.hit") is None


def test_a_link_opens_beside_the_conversation(prepared, browse):
    tab = browse(prepared, "evil")
    links = until(lambda: tab.find(".said a"))
    assert [each.get_attribute("href") for each in links] == [
        "http://127.0.0.1:9/one",
        f"{prepared.url}/?session=evil#",
    ]
    before = set(tab.driver.window_handles)
    links[0].click()
    (new,) = until(lambda: set(tab.driver.window_handles) - before)
    tab.driver.switch_to.window(new)
    tab.driver.close()
    tab.front()
    assert len(tab.text) == 3


def test_half_a_character_is_drawn(prepared, browse):
    tab = browse(prepared, "half")
    until(lambda: tab.text == [("You", "Half ?"), ("The model", "a ?")])
    tab.press("Edit the last message")
    tab.keeps("Half ?")


def test_a_memory_of_another_adapter_is_shown(prepared, browse):
    """It may have other layers."""
    tab = browse(prepared, "larger")
    until(lambda: "9 layers" in (tab.map or ""))
    assert "another adapter" in tab.js("return document.body.innerText")
    tab.box.send_keys("Hello\n")
    assert "adapter" in tab.complaint()
    assert prepared.get("/v1/memories/larger").json()["version"] == 1


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


HTML = """Use `a` vector<int>, and type <enter>. <style>.said, .q-footer { display: none !important }</style>
<form action="/x"><input name="y"></form>

```cpp
vector<int> v; // a & b
```

`List<String> & <b>`, <style"""


def test_tags_in_an_answer_are_text(keeping, browse):
    keeping.say("tags", "How?", HTML, "And?")
    tab = browse(keeping, "tags")
    shown = until(lambda: tab.answers and tab.answers[0])
    for text in (
        "vector<int>, and type <enter>. <style>.said",
        '<form action="/x"><input name="y"></form>',
        "vector<int> v; // a & b",
        "List<String> & <b>, <style",
    ):
        assert text in shown
    assert tab.find(".said style, .said form, .said input") == [] and tab.shown("footer")
    assert len(tab.find(".said article pre code")) == 1


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


def test_many_sessions_are_found_by_their_names(prepared, browse):
    tab = browse(prepared, "oldest")  # its tools are there all the same

    def names():
        return [each.text.split("\n")[0] for each in tab.find(".names .pick")]

    until(lambda: len(names()) == 101)
    assert names()[0] == "oldest" and tab.button("Fork") and "Older ones" in tab.js("return document.body.innerText")
    for wanted, found in (("яРОС", ["Ярославль"]), ("LONG", ["long"]), ("-9_", []), ("T-99", ["chat-99"])):
        tab.fill("Find", wanted)
        until(lambda found=found: names() == found)
    tab.press("New session")
    tab.heading("chat-100")


def test_keys_go_to_the_message_when_what_had_them_is_gone(keeping, browse):
    from selenium.webdriver.common.keys import Keys

    def use(find):
        def focused():
            tab.js("arguments[0].focus()", element := find())
            return tab.driver.switch_to.active_element == element

        until(focused)
        tab.driver.switch_to.active_element.send_keys(Keys.ENTER)

    tab = browse(keeping, "keys-1")
    tab.say("My name is Hugo.")
    use(lambda: tab.button("Rename"))
    tab.choose("keys-2")
    until(lambda: tab.focused == "Message")
    use(lambda: tab.button("New session"))
    until(lambda: tab.text and tab.text[0][0] == "note")
    use(lambda: next(each for each in tab.find(".pick") if each.text.startswith("keys-2")))
    tab.heading("keys-2")
    until(lambda: tab.focused == "Message")
    use(lambda: tab.button("Regenerate the answer"))
    until(lambda: keeping.get("/v1/memories/keys-2").json()["version"] == 3)
    until(lambda: tab.focused == "Message")


def test_the_browser_goes_back_to_the_session_before(keeping, browse):
    keeping.say("back-2", "I have a cat.")
    tab = browse(keeping, "back-1")
    tab.say("My name is Hugo.")
    tab.press("Rename")
    tab.choose("back-0")  # not one more
    tab.click(lambda: next(each for each in tab.find(".pick") if each.text.startswith("back-2")))
    for go, name, said in (
        (lambda: None, "back-2", "I have a cat."),
        (tab.driver.back, "back-0", "My name is Hugo."),
        (tab.driver.forward, "back-2", "I have a cat."),
    ):
        go()
        tab.heading(name)
        until(lambda said=said: tab.text[0] == ("You", said))
        assert tab.driver.current_url.endswith(f"session={name}")
    tab.press("Fork")
    until(lambda: tab.focused == "Name")
    tab.driver.back()  # not now
    until(lambda: tab.driver.current_url.endswith("session=back-2"))
    tab.dialog(0)
    tab.heading("back-2")


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


def test_what_was_said_is_shown_again_where_it_is_kept_and_belongs_to_its_key(browse, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(KEY + "\nkey-of-bo\n")
    with serve(tmp_path, "--keep-messages", "--api-key-file", keys) as server:
        tab = browse(server, "kept", waits=False)
        tab.fill("API key", "no such key\n")
        assert "key" in tab.complaint()
        assert not tab.is_open and tab.box is None and not tab.shown(".names")
        tab.fill("API key", KEY + "\n")
        tab.ready().say("My name is Iris.")
        tab.press("Forget the text")
        until(lambda: tab.text[-1] == ("note", FORGOTTEN))
        tab.say("I have a goat.")
        before = tab.text
        tab.reload()  # the tab remembers whose it is
        assert tab.text == before
        tab.say("What is my name?")
        assert server.get("/v1/memories", headers={"Authorization": "Bearer key-of-bo"}).json()["data"] == []

        other = browse(server, "kept", waits=False)
        other.fill("API key", "key-of-bo\n")
        assert other.ready().text[0][0] == "note" and len(other.text) == 1
        other.press("Forget the key")
        other.fill("API key", KEY + "\n")
        until(lambda: other.box and "What is my name?" in [text for _, text in other.text])
        log = server.log.read_text()
        assert KEY not in log and "Iris" not in log and "tab_id" not in log


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
    assert as_html('<div style="position: fixed">x</div>').startswith("<p>&lt;div ")
    assert "&lt;" not in as_html("1. [a](https://a.b)\n\n| a | b |\n|:-:|---|\n| `x` | ![c](/d) |\n\n> # e\n\n---")


def said(*texts):
    return tuple({"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, texts))


def turn(number, chat, before, messages):
    marks = digests([*before, *messages])[len(before) :]
    return Turn(number, chat, 0, 0, None, tuple(marks), messages)


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

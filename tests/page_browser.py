"""What tests of the page share: servers that have one, and a headless Chromium (tests/install-browser.sh) with tabs."""

from __future__ import annotations

import contextlib
import os
import shutil
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
from pydeltamem.server.records import Record, Turn
from pydeltamem.server.session import imported
from pydeltamem.server.store import Store

BASE, ADAPTERS = default_files()


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


def said(*texts):
    return tuple({"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, texts))


def turn(number, chat, before, messages):
    marks = digests([*before, *messages])[len(before) :]
    return Turn(number, chat, 0, 0, None, tuple(marks), messages)

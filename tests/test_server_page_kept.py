"""The page of `deltamem serve` where it keeps what was said, in headless Chromium."""

from __future__ import annotations

from page_browser import EVIL, serve, until
from pydeltamem.server.page_talk import FORGOTTEN

pytest_plugins = ["page_browser"]  # its fixtures

KEY = "key-of-ada"


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

// Refuses a text that is too long for the connection, which would break at it; 1 MB is what that takes.
(() => {
  const MOST = 900000;
  let before = "";
  const isMessage = (box) => box.matches("textarea[aria-label=Message]");
  addEventListener("beforeinput", (event) => { if (isMessage(event.target)) before = event.target.value; }, true);
  addEventListener("input", (event) => {
    const box = event.target;
    if (!isMessage(box) || new Blob([JSON.stringify(box.value)]).size <= MOST) return;
    event.stopImmediatePropagation();
    box.value = before;
    emitEvent("too_long");
  }, true);
})();

// Keeps the end of the conversation in sight, unless the reader has scrolled up.
(() => {
  let follows = true;
  const distance = () => document.documentElement.scrollHeight - innerHeight - scrollY;
  addEventListener("scroll", () => { follows = distance() < 80; }, { passive: true });
  const stick = () => { if (follows && distance() > 0) scrollTo(0, document.documentElement.scrollHeight); };
  const watch = () => {
    const said = document.querySelector(".said");
    if (!said) return setTimeout(watch, 100);
    new MutationObserver(stick).observe(said, { childList: true, subtree: true, characterData: true });
    new ResizeObserver(stick).observe(said);
  };
  watch();
})();

// Opens what an answer links to beside the conversation, which would be gone.
addEventListener("click", (event) => {
  const link = event.target.closest(".said a[href]");
  if (link && !link.getAttribute("href").startsWith("#")) Object.assign(link, { target: "_blank", rel: "noopener" });
}, true);

// Shows the session that the browser goes back or forth to.
addEventListener("popstate", () => emitEvent("moves", new URLSearchParams(location.search).get("session") ?? ""));

// Tells the server that this tab goes: it need not wait for it to come back.
addEventListener("pagehide", () => emitEvent("goes"));

// The message gets the keys; not on a touch screen, where the keyboard would hide the conversation. What is typed but not
// sent stays: a tab that was away for long is loaded anew.
(() => {
  const box = () => document.querySelector("textarea[aria-label=Message]");
  window.takeKeys = () => { if (!matchMedia("(pointer: coarse)").matches) box().focus(); };
  const keep = () => { if (box()) sessionStorage.setItem("draft", box().value); };
  addEventListener("pagehide", keep);
  document.addEventListener("visibilitychange", keep);
  window.restoreDraft = () => {
    const draft = sessionStorage.getItem("draft");
    if (!draft || box().value) return;
    box().value = draft;
    box().dispatchEvent(new Event("input", { bubbles: true }));
  };
})();

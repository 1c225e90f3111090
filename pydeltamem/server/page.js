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

// Tells the server that this tab goes: it need not wait for it to come back.
addEventListener("pagehide", () => emitEvent("goes"));

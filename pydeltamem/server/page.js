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

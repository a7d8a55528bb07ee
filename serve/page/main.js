// What the user does.

let pause;
$("prompt").addEventListener("input", () => {
  clearTimeout(pause);
  if (state.chat || state.generating || !state.run) return;
  say("");
  pause = setTimeout(async () => {
    if (state.chat || state.generating) return; // since the key was pressed
    if (await attempt(() => inspect({ text: $("prompt").value }))) hideProblem();
  }, PAUSE);
});
$("prompt").addEventListener("keydown", (event) => {
  const sends = state.chat ? !event.shiftKey : event.ctrlKey || event.metaKey;
  if (event.key !== "Enter" || event.isComposing || !sends) return;
  event.preventDefault();
  $("generate").click();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (state.generating) stop();
  else view.select(-1);
});
$("generate").onclick = () => {
  clearTimeout(pause);
  hideProblem();
  send();
};
$("continue").onclick = () => {
  clearTimeout(pause);
  hideProblem();
  if (state.run && !state.generating) write(settle);
};
$("stop").onclick = stop;
$("map").onclick = () => maps.pointed && view.select(maps.pointed.query + state.shown);
$("clear").onclick = clear;
$("retry").onclick = start;
$("dismiss").onclick = hideProblem;
$("next").addEventListener("input", showNext);

function choose(chat) {
  state.chat = chat;
  for (const [tab, is] of [[$("tab-text"), !chat], [$("tab-chat"), chat]]) {
    tab.setAttribute("aria-selected", String(is));
    tab.tabIndex = is ? 0 : -1;
  }
  $("prompt-label").textContent = chat ? "Message" : "Prompt";
  $("generate").textContent = chat ? "Send" : "Generate";
  $("continue").hidden = chat;
  $("clear").hidden = !chat;
  $("keys-text").hidden = chat;
  $("keys-chat").hidden = !chat;
  clear();
}
$("tab-text").onclick = () => choose(false);
$("tab-chat").onclick = () => choose(true);
$("tabs").addEventListener("keydown", (event) => {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  const tab = state.chat ? $("tab-text") : $("tab-chat");
  tab.focus();
  tab.click();
});

// Light or dark as the system is, until the button is pressed.
const dark = matchMedia("(prefers-color-scheme: dark)");
$("theme").onclick = () => {
  const { style } = document.documentElement;
  const isDark = style.colorScheme ? style.colorScheme === "dark" : dark.matches;
  style.colorScheme = isDark ? "light" : "dark";
  maps.drawAll();
};
dark.addEventListener("change", () => maps.drawAll());

showNext();
refresh();
start();

// Keep open what the reader opened, open everything for printing, and show a live run's newest page.
const details = [...document.querySelectorAll("details")];
const place = `open ${location.pathname}`;
// Several may have the same words, such as "thoughts": their names also say whose they are, and which.
const cards = [...document.querySelectorAll(".card")];
const seen = {};
const names = new Map(details.map((each) => {
  const card = each.closest(".card");
  const label = card ? each.parentElement.querySelector("b")?.firstChild.textContent : "";
  const name = `${cards.indexOf(card)} ${label} ${each.querySelector("summary").textContent}`;
  seen[name] = (seen[name] ?? 0) + 1;
  return [each, `${name} ${seen[name]}`];
}));
const nameOf = (element) => names.get(element);
try {
  const open = JSON.parse(sessionStorage.getItem(place) || "[]");
  details.forEach((each) => { each.open = open.includes(nameOf(each)); });
  const save = () => {
    sessionStorage.setItem(place, JSON.stringify(details.filter((each) => each.open).map(nameOf)));
  };
  addEventListener("toggle", save, true);
  addEventListener("pagehide", save); // a reload may come before the toggle event
} catch { /* The browser stores nothing for this page. */ }
addEventListener("beforeprint", () => details.forEach((each) => { each.open = true; }));

const { refresh, written } = document.body.dataset;
if (refresh) {
  const heard = document.getElementById("heard"); // a list of runs has none
  const hour = 3600;
  const show = () => {
    if (!heard) return 0;
    const age = Math.max(0, Math.round(Date.now() / 1000 - written));
    const [minutes, hours] = [Math.round(age / 60), Math.round(age / hour)];
    heard.textContent = age < 120 ? `${age} s ago` : minutes < 120 ? `${minutes} min ago` : `${hours} h ago`;
    if (age >= hour) {
      const state = document.querySelector(".state");
      [state.textContent, state.className] = ["not ended", "state not-ended"];
      document.getElementById("silent").hidden = false;
    }
    return age;
  };
  // A run that was silent for an hour was probably killed. Or the computer slept, and the run
  // continues.
  const often = show() < hour ? 1 : 6;
  setTimeout(() => location.reload(), often * refresh * 1000);
  setInterval(show, 1000);
}

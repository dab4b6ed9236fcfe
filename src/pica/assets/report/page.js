"use strict";

// Tables: a click on a heading sorts by that column, a second one the other way round; empty cells stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const numeric = head.classList.contains("number");
      const before = head.getAttribute("aria-sort");
      // The better end comes first: the lowest loss, the highest accuracy; names begin with A.
      const descending = before === "none" ? head.dataset.first === "descending" : before === "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => ({ row, value: row.cells[column].dataset.value }));
      rows.sort((a, b) => {
        if (a.value === "" || b.value === "") return (a.value === "") - (b.value === "");
        const order = numeric ? Number(a.value) - Number(b.value) : a.value.localeCompare(b.value);
        return descending ? -order : order;
      });
      body.append(...rows.map(({ row }) => row));
    });
  });
}

// Lists of entries: a search in their text, a choice of kind, and another order.
for (const box of document.querySelectorAll(".entries")) {
  const list = box.querySelector("ol");
  const items = [...list.children].map((item, turn) => ({ item, turn, text: item.textContent.toLowerCase() }));
  const search = box.querySelector("input");
  const kind = box.querySelector("select[name=kind]");
  const order = box.querySelector("select[name=order]");
  const value = { turns: (a) => a.turn, place: (a) => Number(a.item.dataset.place),
    best: (a) => Number(a.item.dataset.change), worst: (a) => -Number(a.item.dataset.change) };
  const update = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { item, text } of items) {
      const fits = words.every((word) => text.includes(word)) && (!kind || !kind.value || item.dataset.kind === kind.value);
      item.hidden = !fits;
      shown += fits;
    }
    box.querySelector("output").textContent = `${shown} of ${items.length}`;
  };
  search.addEventListener("input", update);
  if (kind) kind.addEventListener("change", update);
  order.addEventListener("change", () => {
    const by = value[order.value];
    list.append(...[...items].sort((a, b) => by(a) - by(b) || a.turn - b.turn).map(({ item }) => item));
  });
  box.querySelector(".controls").hidden = false;
  update();
}

// Tips: where the pointer rests, where a finger touches, and what has the focus. Without this script the browser shows
// them as titles, to a mouse only.
const tip = document.createElement("div");
tip.id = "tip";
tip.setAttribute("role", "tooltip");
tip.hidden = true;
document.body.append(tip);

function showTip(texts, x, y) {
  tip.textContent = texts.join("\n");
  tip.hidden = texts.length === 0;
  const { width, height } = tip.getBoundingClientRect();
  const below = y + 16 + height > innerHeight;
  tip.style.left = `${Math.max(8, Math.min(x + 12, innerWidth - width - 8))}px`;
  tip.style.top = `${Math.max(8, below ? y - height - 12 : y + 16)}px`;
}
const showAt = (element) => {
  const box = element.getBoundingClientRect();
  showTip([element.dataset.tip], box.left + box.width / 2, box.bottom - 8);
};
const hideTip = () => { tip.hidden = true; };

for (const head of document.querySelectorAll("th [title]")) {
  head.dataset.tip = head.title;
  head.setAttribute("aria-description", head.title);
  head.removeAttribute("title");
  if (head.tagName !== "BUTTON") head.tabIndex = 0;
  for (const event of ["pointerenter", "focus", "click"]) head.addEventListener(event, () => showAt(head));
  for (const event of ["pointerleave", "blur"]) head.addEventListener(event, hideTip);
}

for (const svg of document.querySelectorAll("figure svg")) {
  const marks = [...svg.querySelectorAll("title")].map((title) => {
    const mark = title.parentNode;
    mark.dataset.tip = title.textContent;
    mark.setAttribute("role", "img");
    mark.setAttribute("aria-label", title.textContent);
    title.remove();
    return mark;
  });
  if (marks.length === 0) continue;
  svg.setAttribute("role", "group");
  // One stop for the Tab key; arrows go from mark to mark.
  marks.forEach((mark, place) => {
    mark.setAttribute("tabindex", place === 0 ? "0" : "-1");
    mark.addEventListener("focus", () => { if (mark.matches(":focus-visible")) showAt(mark); });
    mark.addEventListener("blur", hideTip);
    mark.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = marks[(place + step + marks.length) % marks.length];
      marks.forEach((other) => other.setAttribute("tabindex", other === next ? "0" : "-1"));
      next.focus();
    });
  });
  // All marks within reach are named, so that those which lie close together are told apart.
  const near = (event) => {
    const reach = event.pointerType === "mouse" ? 10 : 22;
    const found = marks
      .map((mark) => {
        const box = mark.getBoundingClientRect();
        const distance = Math.hypot(event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2);
        return { mark, distance: event.target.closest("[data-tip]") === mark ? 0 : distance };
      })
      .filter(({ distance }) => distance <= reach)
      .sort((a, b) => a.distance - b.distance);
    showTip(found.slice(0, 5).map(({ mark }) => mark.dataset.tip), event.clientX, event.clientY);
  };
  svg.addEventListener("pointermove", near);
  svg.addEventListener("pointerdown", near);
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hideTip(); });
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
document.addEventListener("pointerdown", (event) => { if (!event.target.closest("figure svg, th [data-tip]")) hideTip(); });
document.addEventListener("scroll", () => {
  const focused = document.activeElement;
  if (focused && focused.dataset.tip && focused.matches(":focus-visible")) showAt(focused);
  else hideTip();
}, { passive: true });

// Theme: as the system says, until the reader chooses. The choice lasts as long as the page is open.
const button = document.getElementById("theme");
const themes = ["auto", "light", "dark"];
button.hidden = false;
button.addEventListener("click", () => {
  const current = document.documentElement.dataset.theme || "auto";
  const next = themes[(themes.indexOf(current) + 1) % themes.length];
  document.documentElement.dataset.theme = next;
  button.textContent = `Theme: ${next}`;
});

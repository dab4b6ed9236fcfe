"use strict";

// Tables: a click on a heading sorts by that column, a second one the other way round; empty cells stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const numeric = head.classList.contains("number");
      const before = head.getAttribute("aria-sort");
      // Numbers begin with the largest, names with A.
      const descending = before === "none" ? numeric : before === "ascending";
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

"use strict";

// The theme is the system's until the button is pressed.
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.style.colorScheme || (dark ? "dark" : "light");
  root.style.colorScheme = now === "dark" ? "light" : "dark";
});

// Numbers by value, words by alphabet; cells without a figure stay last in both directions.
function order(a, b, down) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const numbers = !Number.isNaN(Number(a)) && !Number.isNaN(Number(b));
  const rising = numbers ? a - b : a.localeCompare(b);
  return down ? -rising : rising;
}

for (const th of document.querySelectorAll("th")) {
  th.querySelector("button").addEventListener("click", () => {
    const row = th.parentNode;
    const body = th.closest("table").tBodies[0];
    const column = th.cellIndex;
    const down = th.getAttribute("aria-sort") === "ascending";
    for (const other of row.cells) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (tr) => tr.cells[column].dataset.key;
    body.append(...[...body.rows].sort((a, b) => order(key(a), key(b), down)));
  });
}

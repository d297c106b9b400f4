"use strict";
// A click on a heading sorts its table: numbers by value, words by alphabet, empty cells last.
function keyOf(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.sort ?? cell.textContent.trim();
  if (text === "") return null;
  const number = Number(text === "inf" ? "Infinity" : text === "-inf" ? "-Infinity" : text);
  return Number.isNaN(number) ? text.toLowerCase() : number;
}
function compareKeys(a, b) {
  if (typeof a === "number" && typeof b === "number") return a === b ? 0 : a < b ? -1 : 1;
  return String(a).localeCompare(String(b));
}
function sortTable(heading) {
  const table = heading.closest("table");
  const column = heading.cellIndex;
  const descending = heading.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row) => ({ row, key: keyOf(row, column) }));
  rows.sort((a, b) => {
    if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
    return descending ? compareKeys(b.key, a.key) : compareKeys(a.key, b.key);
  });
  body.append(...rows.map(({ row }) => row));
}
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => sortTable(button.closest("th")));
}
// A live page asks for the version that the server has, and loads it when it is a new one.
if ("live" in document.documentElement.dataset) {
  let version = null;
  setInterval(async () => {
    const answer = await fetch("/version").catch(() => null);
    if (!answer || !answer.ok) return;
    const now = await answer.text();
    if (version !== null && now !== version) location.reload();
    version = now;
  }, 3000);
}

document.querySelectorAll("table.sortable").forEach((table) => table.querySelectorAll("thead th").forEach((head, column) => {
  head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "ascending", body = table.tBodies[0];
    table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent;
    [...body.rows].sort((a, b) => key(a).localeCompare(key(b), "en", {numeric: true}) * (down ? 1 : -1)).forEach((row) => body.append(row));
  });
}));

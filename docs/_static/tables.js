// Click, or press Enter on, a column's head: sort by it, numbers as numbers; again: the other way.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.sortable, table.dataframe")) {
    const body = table.tBodies[0];
    if (!body || !table.tHead) continue;
    [...table.tHead.rows].at(-1).querySelectorAll("th").forEach((head, column) => {
      head.tabIndex = 0;
      head.setAttribute("aria-sort", "none");
      const value = (row) => row.cells[column].textContent.trim();
      const number = (text) => (text === "" ? NaN : Number(text.replace(/[,%×]/g, "")));
      const sort = () => {
        const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        table.querySelectorAll("th[aria-sort]").forEach((h) => h.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", way === 1 ? "ascending" : "descending");
        const compare = (a, b) => {
          const [x, y] = [number(value(a)), number(value(b))];
          if (!Number.isNaN(x) && !Number.isNaN(y)) return way * (x - y);
          return way * value(a).localeCompare(value(b));
        };
        [...body.rows].sort(compare).forEach((row) => body.append(row));
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
    });
  }
});

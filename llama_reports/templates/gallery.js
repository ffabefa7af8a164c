"use strict";
// Sorts every table.sortable by the buttons it puts in the heads, and filters the gallery.
// All data is read from the table; texts are only ever written as text.

(() => {
  const order = new Intl.Collator(undefined, { numeric: true });

  // Missing values come last whatever the direction.
  const compare = (down) => (a, b) => {
    const [x, y] = [a.value, b.value];
    if (x === null || y === null) return (x === null) - (y === null) || a.place - b.place;
    const sign = typeof x === "string" ? order.compare(x, y) : x - y;
    return (down ? -sign : sign) || a.place - b.place;
  };

  // Returns show(column or null, down): sorts the rows and marks the head.
  function sortable(table, valueOf, changed) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const heads = [...table.tHead.rows[0].cells].filter((head) => valueOf(rows[0], head) !== undefined);
    let current = null;
    let downwards = false;

    function show(head, down) {
      if (head === null && current === null) return; // as it was
      current = head;
      downwards = down;
      for (const each of heads) {
        each.setAttribute("aria-sort", each !== head ? "none" : down ? "descending" : "ascending");
      }
      const keyed = rows.map((row, place) => ({ row, place, value: head ? valueOf(row, head) : place }));
      keyed.sort(compare(head !== null && down));
      body.append(...keyed.map((each) => each.row));
    }

    for (const head of heads) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const first = head.dataset.first === "down";
        if (current !== head) show(head, first);
        else if (downwards === first) show(head, !first);
        else show(null, false); // the third press: as it was
        changed(current, downwards);
      });
    }
    return { heads, show };
  }

  const number = (text) => (text === "" || text === undefined ? null : Number(text));

  // --- a table of numbers: a cell says what it is worth in data-value, or else by its text

  for (const table of document.querySelectorAll("table.sortable:not(.gallery)")) {
    const valueOf = (row, head) => {
      if (head.tagName !== "TH") return undefined;
      const cell = row.cells[head.cellIndex];
      return "value" in cell.dataset ? number(cell.dataset.value) : cell.textContent.trim();
    };
    if (table.tBodies[0].rows.length > 1) sortable(table, valueOf, () => {});
  }

  // --- the gallery

  const table = document.querySelector("table.gallery");
  if (!table || !table.tBodies[0].rows.length) return;
  const tools = document.querySelector("form.tools");
  const { find, method, state, count } = tools.elements;
  const nothing = document.querySelector("p.nothing");
  const more = document.querySelector("p.more");
  const PORTION = 100; // rows laid out at first, and added when the last one comes near
  let limit = PORTION;
  const STATES = ["failed", "not borne out", "weakly borne out", "done", "borne out"];

  const reports = new Map();
  for (const row of table.tBodies[0].rows) {
    const lines = [...row.querySelectorAll("li")].map((line) => {
      const [beats, gap, place, time] = line.dataset.values.split(",").map(number);
      return { line, method: line.dataset.method, beats, gap, place, time, open: !!line.querySelector(".open") };
    });
    const words = row.querySelector("td.words");
    const prompt = words.querySelector("a");
    const error = row.querySelector("p.error");
    const text = [words, error].map((part) => (part ? part.textContent : "")).join("\n");
    reports.set(row, { lines, prompt: prompt.textContent, text: text.toLowerCase() });
  }

  const chosen = (row) =>
    reports.get(row).lines.filter((each) => !method.value || each.method === method.value);

  // What a report is worth in a column. Over several methods: the mean share of random orders, the
  // largest gap, the best place, all seconds together.
  const over = {
    beats: (values) => values.reduce((sum, value) => sum + value, 0) / values.length,
    gap: (values) => Math.max(...values),
    place: (values) => Math.min(...values),
    time: (values) => values.reduce((sum, value) => sum + value, 0),
  };
  function valueOf(row, head) {
    const key = head.dataset.key;
    if (key === undefined) return undefined;
    if (key === "prompt") return reports.get(row).prompt;
    if (key === "state") return STATES.indexOf(row.dataset.state);
    if (!(key in over)) return number(row.dataset[key]);
    const values = chosen(row).map((each) => each[key]).filter((value) => value !== null);
    return values.length ? over[key](values) : null;
  }

  let sorted = { head: null, down: false };
  const sorting = sortable(table, valueOf, (head, down) => {
    sorted = { head, down };
    limit = PORTION;
    filter();
    remember();
  });

  function filter() {
    const words = find.value.toLowerCase();
    let seen = 0;
    for (const row of table.tBodies[0].rows) {
      const report = reports.get(row);
      const lines = chosen(row);
      const fits =
        report.text.includes(words) &&
        (!method.value || lines.length > 0) &&
        (!state.value ||
          (state.value === "not closed" ? lines.some((each) => each.open) : row.dataset.state === state.value));
      row.hidden = !fits || seen >= limit;
      seen += fits;
      if (!row.hidden) for (const each of report.lines) each.line.hidden = !lines.includes(each);
    }
    table.classList.toggle("one", method.value !== "");
    nothing.hidden = seen > 0;
    more.hidden = seen <= limit;
    const told = `${seen.toLocaleString("en")} of ${reports.size.toLocaleString("en")} reports`;
    if (count.value !== told) count.value = told;
  }

  function extend(rows = PORTION) {
    limit += rows;
    filter();
  }
  more.querySelector("button").addEventListener("click", () => extend());
  new IntersectionObserver(
    (changes) => changes.some((each) => each.isIntersecting) && extend(),
    { rootMargin: "1500px" },
  ).observe(more);

  // --- the address keeps what is shown, so that a link can be passed on

  function remember() {
    const kept = new URLSearchParams();
    for (const field of [find, method, state]) if (field.value) kept.set(field.name, field.value);
    if (sorted.head) kept.set("sort", sorted.head.dataset.key);
    if (sorted.head && sorted.down) kept.set("down", "1");
    const text = kept.toString();
    history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
  }

  function recall() {
    const text = location.hash.slice(1);
    if (text && !text.includes("=")) return reveal(document.getElementById(text));
    const kept = new URLSearchParams(text);
    find.value = kept.get("find") ?? "";
    for (const field of [method, state]) {
      const known = [...field.options].some((option) => option.value === kept.get(field.name));
      field.value = known ? kept.get(field.name) : "";
    }
    const head = sorting.heads.find((each) => each.dataset.key === kept.get("sort")) ?? null;
    sorted = { head, down: kept.get("down") === "1" };
    update();
  }

  function update() {
    limit = PORTION;
    sorting.show(sorted.head, sorted.down);
    filter();
  }

  // The report whose anchor the address has, however far down.
  function reveal(row) {
    filter();
    if (!reports.has(row)) return;
    if (row.hidden) extend(row.sectionRowIndex);
    row.scrollIntoView();
  }

  tools.addEventListener("input", (event) => {
    limit = PORTION;
    if (event.target === method) update(); // the order may be by what the chosen method says
    else filter();
    remember();
  });
  tools.addEventListener("reset", (event) => {
    event.preventDefault(); // the browser's own reset comes after this
    find.value = method.value = state.value = "";
    sorted = { head: null, down: false };
    update();
    remember();
    find.focus();
  });
  tools.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", recall);
  for (const part of document.querySelectorAll("form.tools, .scripted")) part.hidden = false;
  table.classList.add("ready");
  recall();
})();

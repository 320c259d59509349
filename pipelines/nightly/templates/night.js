"use strict";
(() => {
  const CHUNK = 200, MOST_PRINTED = 3000;
  const { kinds, rows } = JSON.parse(document.getElementById("night").textContent);
  const DETAILS = kinds.length, STATUS = 1;
  const table = document.getElementById("table"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const search = document.getElementById("search"), status = document.getElementById("status");
  const shown = document.getElementById("shown"), more = document.getElementById("more");
  const words = rows.map(row => row.map((cell, at) => at === DETAILS ? Object.values(cell).flat().join(" ") : kinds[at] === "text" ? cell : "").join(" ").toLowerCase());
  const whole = new Intl.NumberFormat("en"), fine = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
  const byText = new Intl.Collator("en", { numeric: true }).compare;
  let sortBy = null, down = false, found = rows.map((_, index) => index), drawn = 0;

  // Numbers before words before nothing, whichever way they are sorted.
  const rank = value => value === null || value === "" ? 2 : typeof value === "number" ? 0 : 1;
  const compare = (a, b) => {
    const x = rows[a][sortBy], y = rows[b][sortBy], kind = rank(x) - rank(y);
    if (kind || rank(x) === 2) return kind || a - b;
    return (down ? -1 : 1) * (typeof x === "number" ? x - y : byText(x, y)) || a - b;
  };
  const text = (value, kind) => value === null ? "" : typeof value !== "number" ? value : kind === "count" ? whole.format(value) : fine.format(value);

  const element = (tag, content, className) => {
    const made = document.createElement(tag);
    if (content !== undefined) made.textContent = content;
    if (className) made.className = className;
    return made;
  };
  const line = index => {
    const row = rows[index], made = document.createElement("tr");
    kinds.forEach((kind, at) => {
      const cell = at === 0 ? element("th") : element("td", text(row[at], kind), at === STATUS ? "status " + row[at] : kind === "text" ? "" : kind);
      if (at === 0) {
        cell.scope = "row";
        const opener = element("button", row[0]);
        opener.type = "button";
        opener.setAttribute("aria-expanded", "false");
        opener.addEventListener("click", () => toggle(made, opener, row));
        cell.append(opener);
      }
      made.append(cell);
    });
    return made;
  };
  const toggle = (made, opener, row) => {
    const isOpen = opener.getAttribute("aria-expanded") === "true";
    opener.setAttribute("aria-expanded", String(!isOpen));
    if (isOpen) return made.nextSibling.remove();
    const list = element("dl"), holder = element("tr", undefined, "detail"), cell = element("td");
    for (const [name, told] of Object.entries(row[DETAILS])) list.append(element("dt", name), element("dd", Array.isArray(told) ? told.join("\n") : told));
    cell.colSpan = kinds.length;
    cell.append(list.childElementCount ? list : element("p", "Nothing more is known."));
    holder.append(cell);
    made.after(holder);
  };
  const draw = upTo => {
    const piece = document.createDocumentFragment(), end = Math.min(upTo, found.length);
    for (; drawn < end; drawn += 1) piece.append(line(found[drawn]));
    body.append(piece);
    more.hidden = drawn >= found.length;
    const total = whole.format(rows.length), some = whole.format(found.length);
    shown.textContent = (found.length === rows.length ? total + " customers" : some + " of " + total + " customers") + (more.hidden ? "" : ", the first " + whole.format(drawn) + " shown");
  };
  const update = () => {
    const asked = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    found = [];
    rows.forEach((row, index) => { if ((!status.value || row[STATUS] === status.value) && asked.every(word => words[index].includes(word))) found.push(index); });
    if (sortBy !== null) found.sort(compare);
    body.replaceChildren();
    drawn = 0;
    draw(CHUNK);
  };

  heads.forEach((head, at) => head.firstElementChild.addEventListener("click", () => {
    down = sortBy === at && !down;
    sortBy = at;
    heads.forEach(one => one.setAttribute("aria-sort", one === head ? (down ? "descending" : "ascending") : "none"));
    update();
  }));
  search.addEventListener("input", update);
  status.addEventListener("change", update);
  document.getElementById("search-form").addEventListener("submit", event => event.preventDefault());
  document.querySelectorAll("a[data-status]").forEach(link => link.addEventListener("click", () => { status.value = link.dataset.status; search.value = ""; update(); }));
  more.addEventListener("click", () => draw(drawn + CHUNK));
  new IntersectionObserver(seen => { if (seen.some(one => one.isIntersecting) && !more.hidden) draw(drawn + CHUNK); }, { rootMargin: "400px" }).observe(more);
  window.addEventListener("beforeprint", () => draw(Math.max(drawn, MOST_PRINTED)));
  update();
})();

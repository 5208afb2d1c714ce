"use strict";
// The browser of all outputs. Texts become text nodes and nothing else; the rows are filtered and sorted as columns,
// and one page of them is in the document at a time.
(() => {
  const PAGE = 50, FIRST_CHARACTERS = 4000;
  const at = (id) => document.getElementById(id);
  const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

  // The same as `visible` in text.py.
  function visible(text) {
    return text.replace(/\r\n/g, "\n").replace(UNSEEN, (letter) => {
      const code = letter.charCodeAt(0);
      if (code < 0x20) return String.fromCharCode(0x2400 + code);
      return code === 0x7f ? "\u2421" : `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
    });
  }

  function make(tag, properties = {}, ...children) {
    const { dot, ...others } = properties;
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(others)) {
      if (name in made) made[name] = value; else made.setAttribute(name, value);
    }
    if (dot !== undefined) made.style.setProperty("--dot", dot);
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  async function unpack() {
    const bytes = Uint8Array.from(atob(at("data").textContent), (letter) => letter.charCodeAt(0));
    at("data").remove();
    const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(plain).text());
  }

  function start(data) {
    const runs = data.models.length, total = data.row.id.length, scored = data.rewardModels.length > 0;
    const names = data.models.map(visible);
    const controls = at("controls"), head = at("rows").tHead, body = at("rows").tBodies[0];
    const all = Array.from({ length: total }, (_, row) => row);
    // What is searched, in small letters: prompt, context, id and every answer.
    const texts = all.map((row) => {
      const { prompt, context } = data.asked[data.row.asked[row]];
      return [prompt, ...context.map((turn) => turn[1]), data.row.id[row], ...data.outputs[row].filter((text) => text !== null)]
        .join("\n").toLowerCase();
    });
    const severalSamples = data.row.sample.some((sample) => sample > 0), severalTurns = data.row.turn.some((turn) => turn > 0);
    const state = { page: 0, open: new Set(), found: all };

    const value = (name, otherwise = "") => controls.elements[name]?.value ?? otherwise;
    const model = () => Number(value("model", "1"));
    const rewards = () => data.rewards[Number(value("reward", "0"))] ?? [];
    const shownRuns = () => {
      const boxes = [...controls.querySelectorAll("input[name=column]")];
      const chosen = boxes.length ? boxes.filter((box) => box.checked).map((box) => Number(box.value)) : [0, 1];
      return [...new Set([...chosen, model()])].sort((a, b) => a - b);
    };
    const difference = (row, run = model()) => {
      const [mine, base] = [rewards()[run]?.[row] ?? null, rewards()[0]?.[row] ?? null];
      return mine === null || base === null || !data.row.shared[row] ? null : mine - base;
    };
    const colour = (run) => `var(--m${run === 0 ? 0 : 1 + (run - 1) % 7})`;
    const decimals = () => data.decimals[Number(value("reward", "0"))];
    const number = (amount) => {
      const shown = amount?.toFixed(decimals()) ?? "–";
      return (Number(shown) === 0 ? shown.replace("-", "") : shown).replace("-", "−");
    };
    const signed = (amount) => amount > 0 && Number(amount.toFixed(decimals())) ? `+${number(amount)}` : number(amount);
    const kind = (amount) => amount > 0 ? "gain" : amount < 0 ? "loss" : "";

    // --- which rows, in which order

    const winners = {
      better: (row) => difference(row) > 0,
      worse: (row) => { const found = difference(row); return found !== null && found < 0; },
      equal: (row) => difference(row) === 0,
      unknown: (row) => difference(row) === null,
    };

    function sortKey(name) {
      const [what, run] = name.split(":");
      if (what === "difference") return (row) => difference(row);
      if (what === "reward") return (row) => rewards()[run][row];
      if (what === "length") return (row) => data.lengths[run][row];
      return (row) => row;
    }

    function find() {
      const words = value("q").toLowerCase(), who = winners[value("who")];
      const subset = value("subset") === "" ? null : Number(value("subset"));
      const reason = value("finish") === "" ? null : Number(value("finish")), looked = shownRuns();
      let found = all;
      if (words) found = found.filter((row) => texts[row].includes(words));
      if (who) found = found.filter(who);
      if (subset !== null) found = found.filter((row) => data.row.subset[row] === subset);
      if (reason !== null) found = found.filter((row) => looked.some((run) => data.finish[run][row] === reason));
      const key = sortKey(value("sort", "order")), sign = value("direction") === "descending" ? -1 : 1;
      const keyed = found.map((row) => [key(row), row]);
      // Rows without a value come last whatever the direction; equal ones stay in prompt order.
      keyed.sort(([a, first], [b, second]) => {
        if (a === null || b === null) return (a === null) - (b === null) || first - second;
        return sign * (a - b) || first - second;
      });
      state.found = keyed.map(([, row]) => row);
      state.page = 0;
    }

    // --- what is seen of them

    function heading(label, sort, cell) {
      const current = value("sort", "order") === sort;
      const button = make("button", { type: "button", title: `Sort by ${label}` }, cell);
      button.addEventListener("click", () => {
        const turned = current && value("direction") === "ascending" ? "descending" : "ascending";
        const fresh = sort === "order" ? "ascending" : "descending";
        controls.elements.sort.value = sort;
        controls.elements.direction.value = current ? turned : fresh;
        update();
        head.querySelector(`[data-sort="${CSS.escape(sort)}"] button`)?.focus();
      });
      return make("th", { scope: "col", "data-sort": sort, "aria-sort": current ? value("direction") : "none" }, button);
    }

    function showHead() {
      const columns = shownRuns(), compared = model();
      const group = make("colgroup", {}, make("col", { className: "id" }), make("col", {}));
      const line = make("tr", {}, heading("prompt order", "order", "#"), make("th", { scope: "col", className: "ask" }, make("span", {}, "Prompt")));
      const add = (th, name) => { th.classList.add(name); line.append(th); group.append(make("col", { className: name })); };
      if (scored) {
        for (const run of columns) add(heading(`reward of ${names[run]}`, `reward:${run}`, names[run]), "value");
        add(heading(`difference of ${names[compared]} from ${names[0]}`, "difference", "Δ reward"), "difference");
        add(heading(`${data.unit} of ${names[compared]}`, `length:${compared}`, data.unit), "length");
      } else {
        for (const run of columns) add(heading(`${data.unit} of ${names[run]}`, `length:${run}`, `${names[run]}: ${data.unit}`), run === compared ? "difference" : "value");
      }
      at("rows").querySelector("colgroup")?.remove();
      at("rows").prepend(group);
      head.replaceChildren(line);
    }

    function showRows() {
      const from = state.page * PAGE, here = state.found.slice(from, from + PAGE);
      body.replaceChildren(...here.flatMap((row) => state.open.has(row) ? [line(row), detail(row)] : [line(row)]));
      const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
      const word = (count) => count.toLocaleString("en");
      at("count").textContent = `${word(state.found.length)} of ${word(total)} rows`;
      at("page").textContent = `Page ${state.page + 1} of ${pages}`;
      at("previous").disabled = state.page === 0;
      at("next").disabled = state.page + 1 >= pages;
    }

    function marks(row) {
      const parts = [];
      if (severalSamples) parts.push(`sample ${data.row.sample[row] + 1}`);
      if (severalTurns) parts.push(`turn ${data.row.turn[row] + 1}`);
      if (data.row.subset[row] >= 0) parts.push(visible(data.subsets[data.row.subset[row]]));
      return parts.join(" · ");
    }

    function line(row) {
      const compared = model(), changed = difference(row), { prompt } = data.asked[data.row.asked[row]];
      const excerpt = prompt.length > 300 ? prompt.slice(0, 300) : prompt;
      const open = make("button", { type: "button", className: "open", dir: "auto", "aria-expanded": String(state.open.has(row)), "data-row": row },
        visible(excerpt).replace(/\s+/g, " ") || "(no prompt)", marks(row) ? make("small", {}, marks(row)) : null);
      open.addEventListener("click", () => toggle(row));
      const made = make("tr", { className: "row" }, make("td", { className: "id" }, visible(data.row.id[row])), make("td", { className: "ask" }, open));
      if (scored) {
        for (const run of shownRuns()) made.append(make("td", { className: "value number" }, number(rewards()[run][row])));
        made.append(make("td", { className: `difference number ${kind(changed)}` }, signed(changed)));
        made.append(make("td", { className: "length number" }, data.lengths[compared][row] ?? "–"));
      } else {
        for (const run of shownRuns()) made.append(make("td", { className: run === compared ? "difference number" : "value number" }, data.lengths[run][row] ?? "–"));
      }
      return made;
    }

    function detail(row) {
      const { prompt, context } = data.asked[data.row.asked[row]];
      const before = context.map(([role, text]) => make("div", {}, make("b", {}, `${visible(role)}: `), textBox(text, "text asked")));
      const sides = shownRuns().map((run) => side(row, run));
      const columns = [...head.rows[0].cells].filter((cell) => cell.offsetWidth > 0).length;  // a phone shows fewer
      const cell = make("td", { colSpan: columns }, ...before, textBox(prompt, "text asked"), make("div", { className: "sides" }, ...sides));
      return make("tr", { className: "detail", id: `row-${row}` }, cell);
    }

    function side(row, run) {
      const text = data.outputs[row][run], changed = run === 0 ? null : difference(row, run), reason = data.finish[run][row];
      const facts = [];
      if (scored) facts.push(make("span", {}, `reward ${number(rewards()[run][row])}`));
      if (changed !== null) facts.push(make("span", { className: kind(changed) }, signed(changed)));
      if (data.lengths[run][row] !== null) facts.push(make("span", {}, `${data.lengths[run][row]} ${data.unit}`));
      if (reason >= 0) facts.push(make("span", {}, visible(data.reasons[reason])));
      const top = make("header", {}, make("b", {}, names[run]), ...facts);
      return make("section", { className: "side", dot: colour(run), "aria-label": names[run] }, top, ...(text ? [textBox(text, "text")] : [nothing(text)]));
    }

    const nothing = (text) => make("p", { className: "text empty" }, text === null || text === undefined ? "no text" : "empty answer");

    // A text, with what was searched for marked; only the start of a long one until more is asked for.
    function textBox(text, className) {
      const box = make("div", { className, dir: "auto", tabIndex: 0, role: "group" });
      fill(box, text.slice(0, FIRST_CHARACTERS));
      if (text.length <= FIRST_CHARACTERS) return box;
      const more = make("button", { type: "button" }, `Show all ${text.length.toLocaleString("en")} characters`);
      more.addEventListener("click", () => { fill(box, text); more.remove(); box.focus(); });
      const both = document.createDocumentFragment();
      both.append(box, make("p", { className: "more" }, more));
      return both;
    }

    function fill(box, text) {
      const shown = visible(text), words = value("q").toLowerCase(), low = shown.toLowerCase(), parts = [];
      let done = 0;
      if (words && low.length === shown.length) {
        for (let found = low.indexOf(words); found >= 0 && parts.length < 2000; found = low.indexOf(words, done)) {
          parts.push(shown.slice(done, found), make("mark", {}, shown.slice(found, found + words.length)));
          done = found + words.length;
        }
      }
      box.replaceChildren(...parts, shown.slice(done));
    }

    // --- what is done with them

    const buttons = () => [...body.querySelectorAll(".open")];
    const buttonOf = (row) => body.querySelector(`.open[data-row="${row}"]`);

    function toggle(row) {
      const there = buttonOf(row).closest("tr");
      if (state.open.delete(row)) there.nextElementSibling.remove();
      else { state.open.add(row); there.after(detail(row)); }
      buttonOf(row).setAttribute("aria-expanded", String(state.open.has(row)));
    }

    function update() { find(); showHead(); showRows(); }

    function reset() { controls.reset(); update(); }

    function turn(by, focus = "first") {
      const last = Math.max(0, Math.ceil(state.found.length / PAGE) - 1);
      const page = Math.min(Math.max(state.page + by, 0), last);
      if (page === state.page) return;
      state.page = page;
      showRows();
      const there = buttons();
      (focus === "first" ? there[0] : there[there.length - 1])?.focus();
    }

    function step(by) {
      const there = buttons(), row = document.activeElement?.closest?.("tr.detail")?.previousElementSibling ?? document.activeElement?.closest?.("tr.row");
      const place = there.indexOf(row?.querySelector(".open"));
      if (place < 0) there[0]?.focus();
      else if (there[place + by]) there[place + by].focus();
      else turn(by, by > 0 ? "first" : "last");
    }

    function openRow(row) {
      if (!(row >= 0 && row < total)) return;
      if (!state.found.includes(row)) reset();
      state.page = Math.floor(state.found.indexOf(row) / PAGE);
      state.open.add(row);
      showRows();
      buttonOf(row).focus({ preventScroll: true });
      buttonOf(row).closest("tr").scrollIntoView({ block: "start" });
    }

    function goToHash() {
      const found = /^#row-(\d+)$/.exec(location.hash);
      if (found) openRow(Number(found[1]));
    }

    controls.addEventListener("submit", (event) => event.preventDefault());
    controls.addEventListener("input", update);
    at("clear").addEventListener("click", reset);
    at("previous").addEventListener("click", () => turn(-1));
    at("next").addEventListener("click", () => turn(1));
    window.addEventListener("hashchange", goToHash);
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const typing = event.target.closest?.("input[type=search], select, textarea");
      if (typing && event.key === "Escape") { typing.blur(); return; }
      if (typing) return;
      const inRows = event.target.closest?.("tr.row");
      const keys = { "/": () => controls.elements.q.focus(), j: () => step(1), k: () => step(-1) };
      if (inRows) Object.assign(keys, { ArrowDown: () => step(1), ArrowUp: () => step(-1) });
      if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
    });

    at("wait").remove();
    at("browser").hidden = false;
    update();
    matchMedia("(max-width: 46rem)").addEventListener("change", showRows);
    goToHash();
  }

  function fail(reason) {
    at("wait").className = "note";
    at("wait").textContent = reason;
  }

  if (typeof DecompressionStream !== "function") {
    fail("This browser cannot unpack the rows: it lacks DecompressionStream, which browsers have since 2023. Everything above is complete without it.");
  } else {
    // After the first picture: the parser has just come to the end of a large page.
    requestAnimationFrame(() => setTimeout(() => unpack().then(start).catch((error) => {
      fail(`The rows cannot be unpacked (${error.message}): the file may be incomplete. Everything above is complete without them.`);
      throw error;
    })));
  }
})();

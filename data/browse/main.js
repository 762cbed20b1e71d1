// State (kept in the address, so that every view is a link), the top bar, and the keys.

import { ask, askLines, el, thousands } from "/dom.js";
import { move, tile } from "/grid.js";
import { sampleView, toggle } from "/sample.js";

const PAGE = 60;
const FILTERS = ["text", "label", "smallest", "largest", "boxes", "bad"];
const $ = (id) => document.getElementById(id);
const view = $("view");
let about;
let state = {};
let results = null; // of a filter: entries so far, and whether there are more
let rendering = new AbortController();

function parse() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const whole = (text, otherwise) => (/^\d{1,15}$/.test(text ?? "") ? Number(text) : otherwise);
  const known = about.splits.some((split) => split.name === given.split);
  return {
    split: known ? given.split : about.trained,
    order: ["file", "training", "step"].includes(given.order) ? given.order : "file",
    at: whole(given.at, 0),
    sample: given.sample === "1",
    step: Math.max(1, whole(given.step, 1)),
    batch: Math.max(0, whole(given.batch, about.globalBatch)),
    ...Object.fromEntries(FILTERS.map((name) => [name, given[name] ?? ""])),
  };
}

function link(changes) {
  const next = { ...state, ...changes };
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(next)) {
    const plain = { split: about.trained, order: "file", at: 0, sample: false, step: 1, batch: about.globalBatch }[name] ?? "";
    if (value !== plain && !(name === "step" && next.order !== "step")) query.set(name, value === true ? "1" : value);
  }
  if (next.order === "step") query.set("step", next.step);
  return `#${query}`;
}

/** The state changes at once, what is shown when the browser tells of the new address. */
function go(changes) {
  const next = link(changes);
  state = { ...state, ...changes };
  location.hash = next;
}

/** Turn pages from where the address is, not from what has been drawn of it so far. */
function turn(by) {
  if (state.order === "step" && state.step + by > 0) go({ step: state.step + by, at: 0 });
  else if (state.order !== "step") turnPage(by);
}

function turnPage(by) {
  const at = state.at - (state.at % PAGE) + by * PAGE;
  if (!filtered() && !state.sample && at >= 0 && at < length()) go({ at });
}

function walk(by) {
  const at = state.at + by;
  if (at >= 0 && (at < length() || results?.running)) go({ at });
}

const filtered = () => state.order !== "step" && FILTERS.some((name) => state[name] !== "");
const size = () => about.splits.find((split) => split.name === state.split).samples;
/** Places in the present list; the order of training has no end. */
const length = () => (filtered() ? results?.entries.length ?? 0 : { file: size(), training: Infinity, step: state.batch }[state.order]);
const origin = () => (state.order === "step" ? (state.step - 1) * state.batch : 0);

async function entries(start, count, signal) {
  const order = state.order === "file" ? "file" : "training";
  const answer = await ask("list", { split: state.split, order, start: origin() + start, count }, signal);
  return answer.entries;
}

async function render() {
  rendering.abort();
  rendering = new AbortController();
  const { signal } = rendering;
  state = parse();
  syncBar();
  if (filtered() && results?.query !== filterQuery()) startScan();
  const shown = state.sample ? showSample(signal) : showGrid(signal);
  await shown.catch((error) => {
    if (error.name !== "AbortError") view.replaceChildren(el("p", { class: "note bad" }, error.message));
  });
  if (!signal.aborted) document.body.dataset.ready = location.hash;
}

function context() {
  return {
    split: state.split,
    version: about.version,
    total: size(),
    fileLink: (number) => link({ order: "file", at: number, sample: true, ...cleared() }),
  };
}

const cleared = () => Object.fromEntries(FILTERS.map((name) => [name, ""]));

async function showGrid(signal) {
  if (filtered()) return showResults();
  const last = length();
  if (state.order === "step" && !state.batch) {
    view.replaceChildren(stepBar(), el("p", { class: "note" }, "How many samples has a step? Enter the global batch above, or start with --global-batch or --run."));
    return undefined;
  }
  const at = Math.min(state.at, Math.max(0, last - 1));
  const begin = at - (at % PAGE);
  const count = Math.min(PAGE, last - begin);
  if (!view.querySelector(".grid")) view.replaceChildren(el("p", { class: "wait" }, "reading…"));
  const found = await entries(begin, count, signal);
  if (signal.aborted) return undefined;
  const tiles = found.map((entry, i) => tile(entry, context(), link({ at: begin + i, sample: true })));
  const grid = el("div", { class: "grid" }, tiles);
  view.replaceChildren(...[state.order === "step" ? stepBar(found) : null, pager(begin, found.length, last), grid].filter(Boolean));
  focusTile(tiles, state.at - begin);
  return undefined;
}

function focusTile(tiles, place) {
  // back from a sample, its tile has the focus
  if (state.at % PAGE && tiles[place]) tiles[place].focus();
  else window.scrollTo(0, 0);
}

function pager(start, count, last) {
  const to = el("input", { type: "number", min: 0, placeholder: state.order === "file" ? "number" : "place", "aria-label": "Go to" });
  const total = Number.isFinite(last) ? `of ${thousands(last)}` : `(epoch ${thousands(Math.floor(start / size()))}, ${thousands(size())} samples each)`;
  const order = state.order === "file" ? "" : about.shuffle ? `, shuffled with seed ${about.seed}` : ", not shuffled";
  return el("nav", { class: "pager" },
    el("button", { class: "icon", disabled: start === 0, title: "Previous page (PgUp)", "data-page": -1, onclick: () => turnPage(-1) }, "‹"),
    el("span", {}, `${count ? `${thousands(start)} – ${thousands(start + count - 1)}` : "none"} ${total}${order}`),
    el("button", { class: "icon", disabled: start + PAGE >= last, title: "Next page (PgDn)", "data-page": 1, onclick: () => turnPage(1) }, "›"),
    el("form", { onsubmit: (event) => { event.preventDefault(); if (to.value !== "") go({ at: Number(to.value), sample: true }); } }, to, el("button", {}, "Go")));
}

function stepBar(found = []) {
  const step = el("input", { type: "number", min: 1, value: state.step, "aria-label": "Step" });
  const batch = el("input", { type: "number", min: 1, value: state.batch || "", placeholder: "samples", "aria-label": "Global batch" });
  const replaced = found.filter((entry) => entry.replaced?.length).length;
  const submit = (event) => { event.preventDefault(); go({ step: Number(step.value), batch: Number(batch.value), at: 0 }); };
  return el("form", { class: "step-bar", onsubmit: submit },
    el("button", { type: "button", class: "icon", disabled: state.step <= 1, title: "Previous step", onclick: () => go({ step: state.step - 1, at: 0 }) }, "‹"),
    el("label", {}, "Step ", step),
    el("button", { type: "button", class: "icon", title: "Next step", onclick: () => go({ step: state.step + 1, at: 0 }) }, "›"),
    el("label", {}, "of ", batch, " samples"),
    el("button", {}, "Show"),
    state.batch ? el("span", {}, `positions ${thousands(origin())} – ${thousands(origin() + state.batch - 1)}`) : null,
    replaced ? el("span", { class: "badge warn" }, `${replaced} replaced on this page`) : null);
}

// --- filters

const filterQuery = () => JSON.stringify([state.split, state.order, ...FILTERS.map((name) => state[name])]);

function startScan() {
  results?.controller.abort();
  results = { query: filterQuery(), entries: [], scanned: 0, next: 0, running: false, error: "", controller: new AbortController() };
  continueScan(results);
}

async function continueScan(scan) {
  const parameters = { split: state.split, order: state.order, start: scan.next, ...Object.fromEntries(FILTERS.map((name) => [name, state[name]])) };
  scan.running = true;
  try {
    for await (const line of askLines("scan", parameters, scan.controller.signal)) {
      if (line.match) scan.entries.push(line.match);
      if (line.scanned) scan.scanned = line.scanned;
      if (line.done) scan.next = line.next;
      if (scan === results) document.dispatchEvent(new Event("scanned"));
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    scan.error = error.message;
  } finally {
    scan.running = false;
  }
  if (scan === results) document.dispatchEvent(new Event("scanned"));
}

function showResults() {
  const scan = results;
  const status = el("nav", { class: "pager", "aria-live": "polite" });
  const bar = el("progress", { max: size() });
  const grid = el("div", { class: "grid" });
  view.replaceChildren(status, grid);
  const update = () => {
    if (scan !== results || !grid.isConnected) {
      document.removeEventListener("scanned", update);
      return;
    }
    for (let i = grid.children.length; i < scan.entries.length; i++) {
      grid.append(tile(scan.entries[i], context(), link({ at: i, sample: true })));
    }
    bar.value = scan.scanned;
    const found = `${thousands(scan.entries.length)} found in ${thousands(scan.scanned)} of ${thousands(size())} samples`;
    const more = scan.running || scan.next === null ? null : el("button", { onclick: () => continueScan(scan) }, "Continue");
    const stop = scan.running ? el("button", { onclick: () => { scan.controller.abort(); scan.controller = new AbortController(); scan.running = false; scan.next = scan.scanned; update(); } }, "Stop") : null;
    status.replaceChildren(...[el("span", {}, found), scan.running ? bar : null, stop, more, scan.error ? el("span", { class: "badge bad" }, scan.error) : null].filter(Boolean));
    status.dataset.running = scan.running;
  };
  document.addEventListener("scanned", update);
  update();
  focusTile([...grid.children], state.at);
  return Promise.resolve();
}

/** Wait until a scan has found entry `at`, or is at its end. */
async function result(at, signal) {
  while (results.entries.length <= at && results.running && !signal.aborted) {
    await new Promise((resolve) => document.addEventListener("scanned", resolve, { once: true }));
  }
  return results.entries[at];
}

// --- one sample

async function showSample(signal) {
  const at = state.order === "training" || filtered() ? state.at : Math.min(state.at, length() - 1);
  const [entry] = filtered() ? [await result(at, signal)] : await entries(at, 1, signal);
  if (signal.aborted) return;
  if (!entry) throw new Error("There is no such sample.");
  const sample = await ask("sample", { split: state.split, number: entry.number }, signal);
  if (signal.aborted) return;
  const last = length();
  const place = state.order === "step" ? `step ${thousands(state.step)}, ${thousands(at + 1)} of ${thousands(last)}` : `${thousands(at)}${Number.isFinite(last) ? ` of ${thousands(last)}` : ""}`;
  const bar = el("nav", { class: "pager" },
    el("a", { class: "button", href: link({ sample: false, at }), "data-back": "" }, "‹ Grid"),
    el("button", { class: "icon", "data-go": -1, disabled: at === 0, title: "Previous (←)", onclick: () => walk(-1) }, "←"),
    el("span", {}, place),
    el("button", { class: "icon", "data-go": 1, disabled: at + 1 >= last && !results?.running, title: "Next (→)", onclick: () => walk(1) }, "→"),
    el("code", { class: "key" }, sample.key));
  view.replaceChildren(bar, sampleView(sample, entry, context()));
  linkCards();
  window.scrollTo(0, 0);
}

function linkCards() {
  for (const element of view.querySelectorAll(".entity")) {
    const mark = (on) => {
      for (const other of view.querySelectorAll(".card")) {
        if (other.dataset.sense === element.dataset.sense) other.classList.toggle("hot", on);
      }
    };
    element.addEventListener("mouseenter", () => mark(true));
    element.addEventListener("mouseleave", () => mark(false));
  }
}

// --- the top bar

function syncBar() {
  document.title = `${about.name} – groundwork`;
  $("split").value = state.split;
  for (const button of $("order").children) button.setAttribute("aria-pressed", button.dataset.order === state.order);
  $("text").value = state.text;
  for (const name of ["smallest", "largest", "boxes"]) $(name).value = state[name];
  $("class").value = state.label === "" ? "" : className(state.label);
  $("bad").checked = state.bad === "1";
  const active = FILTERS.filter((name) => name !== "text" && state[name] !== "").length;
  $("active").textContent = active ? ` ${active}` : "";
  for (const id of ["text", "more"]) $(id).disabled = state.order === "step";
}

const className = (label) => {
  const known = about.classes.find((c) => c.label === label);
  return known ? `${known.name} (${label})` : label;
};

function labelOf(text) {
  const wanted = text.trim().toLowerCase();
  const number = /(?:^|\()(\d+)\)?$/.exec(wanted);
  return number ? number[1] : about.classes.find((c) => c.name.toLowerCase() === wanted)?.label;
}

function applyFilters(event) {
  event?.preventDefault();
  const label = $("class").value.trim() ? labelOf($("class").value) : "";
  $("class").setCustomValidity(label === undefined ? "No class has this name" : "");
  if (!$("filters").reportValidity()) return;
  go({ text: $("text").value.trim(), label, smallest: $("smallest").value, largest: $("largest").value, boxes: $("boxes").value, bad: $("bad").checked ? "1" : "", at: 0, sample: false });
  document.activeElement.blur();
}

function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  localStorage.setItem("groundwork.theme", dark ? "dark" : "light");
}

const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

function bindBar() {
  $("name").textContent = about.name;
  $("split").append(...about.splits.map((split) => el("option", { value: split.name }, `${split.name} (${thousands(split.samples)})`)));
  $("classes").append(...about.classes.map((c) => el("option", { value: `${c.name} (${c.label})` })));
  $("split").addEventListener("change", () => go({ split: $("split").value, at: 0, sample: false }));
  $("order").addEventListener("click", (event) => { if (event.target.dataset.order) go({ order: event.target.dataset.order, at: 0, sample: false, ...(event.target.dataset.order === "step" ? cleared() : {}) }); });
  $("search").addEventListener("submit", applyFilters);
  $("filters").addEventListener("submit", applyFilters);
  $("class").addEventListener("input", () => $("class").setCustomValidity(""));
  $("clear").addEventListener("click", () => go({ ...cleared(), at: 0, sample: false }));
  $("more").addEventListener("click", () => { $("filters").hidden = !$("filters").hidden; $("more").setAttribute("aria-expanded", !$("filters").hidden); });
  $("theme").addEventListener("click", () => theme(!isDark()));
  $("help").addEventListener("click", () => $("keys").showModal());
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  const target = event.target;
  const typing = ["INPUT", "SELECT", "TEXTAREA", "VIDEO"].includes(target.tagName) && target.type !== "checkbox";
  if (event.key === "Escape") {
    if (typing) target.blur();
    else if (state.sample) go({ sample: false });
    else if (filtered()) go({ ...cleared(), at: 0 });
    return;
  }
  if (typing) return;
  const keys = {
    "/": () => $("text").focus(),
    "?": () => $("keys").showModal(),
    t: () => theme(!isDark()),
    b: () => toggle(view, "boxes"),
    m: () => toggle(view, "labels"),
    d: () => toggle(view, "depth"),
  };
  if (view.querySelector("[data-play]") && target.tagName !== "BUTTON") keys[" "] = () => view.querySelector("[data-play]").click();
  if (state.sample) {
    keys.ArrowLeft = () => walk(-1);
    keys.ArrowRight = () => walk(1);
  } else {
    for (const key of ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"]) keys[key] = () => move(view, key);
  }
  keys.PageUp = () => turn(-1);
  keys.PageDown = () => turn(1);
  if (Object.hasOwn(keys, event.key)) {
    event.preventDefault();
    keys[event.key]();
  }
}

async function main() {
  const saved = localStorage.getItem("groundwork.theme");
  if (saved) document.documentElement.dataset.theme = saved;
  about = await ask("about");
  bindBar();
  window.addEventListener("hashchange", render);
  window.addEventListener("keydown", onKey);
  await render();
}

main().catch((error) => view.replaceChildren(el("p", { class: "note bad" }, error.message)));

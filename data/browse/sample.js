// The view of one sample.

import { address, bytes, el, thousands } from "/dom.js";
import { FRAME, colour, stage } from "/stage.js";

/** Further members shown: a clip may be stored as hundreds of pictures. */
const MAX_MEMBERS = 48;

/** The whole view. sample: the answer of /api/sample; entry: its tile. */
export function sampleView(sample, entry, context) {
  const parameters = { split: context.split, number: sample.number, v: context.version };
  const view = el("article", { class: "sample", "data-key": sample.key });
  const link = (element, index) => {
    element.addEventListener("mouseenter", () => highlight(view, index, true));
    element.addEventListener("mouseleave", () => highlight(view, index, false));
    return element;
  };
  view.append(
    el("div", { class: "left" }, stage(sample, parameters, link), others(sample, parameters)),
    el("div", { class: "right" },
      verdict(sample, entry, context),
      texts(sample, link),
      classCard(sample),
      knowledge(sample),
      questions(sample),
      boxList(sample, link),
      details(sample, entry, context),
      rawJson(sample, parameters)),
  );
  return view;
}

/** Switch all boxes, masks or depth maps on, or off where any is on. */
export function toggle(view, kind) {
  const inputs = [...view.querySelectorAll(`input[data-kind="${kind}"]`)];
  const on = !inputs.some((input) => input.checked);
  for (const input of inputs) if (input.checked !== on) input.click();
}

function highlight(view, index, on) {
  view.querySelector(".canvas")?.classList.toggle("has-hot", on);
  for (const element of view.querySelectorAll(`[data-box~="${index}"]`)) element.classList.toggle("hot", on);
}

function section(title, ...children) {
  return el("section", { class: title.toLowerCase() }, el("h3", {}, title), children);
}

function verdict(sample, entry, context) {
  const notes = [];
  if (sample.diagnosis) notes.push(el("p", { class: "note bad" }, el("b", {}, "Bad sample. "), sample.diagnosis));
  if (entry.error && entry.error !== sample.diagnosis) notes.push(el("p", { class: "note bad" }, entry.error));
  if (entry.replaced?.length) {
    notes.push(el("div", { class: "note warn" },
      el("p", {}, el("b", {}, "Stands in for a bad sample. "), `At position ${thousands(entry.position)} the order has, one after the other:`),
      el("ol", {}, entry.replaced.map((bad) => el("li", {}, el("a", { href: context.fileLink(bad.number) }, `${bad.shard}: ${bad.key}`), ` – ${bad.reason}`)))));
  }
  if (sample.problems?.length) {
    notes.push(el("div", { class: "note" }, el("b", {}, "Not as expected"), el("ul", {}, sample.problems.map((p) => el("li", {}, p)))));
  }
  return notes;
}

function texts(sample, link) {
  if (!sample.texts?.length) return null;
  const boxes = new Map([...sample.boxes, ...sample.tracks].map((box) => [box.index, box]));
  const paragraph = (text, place) => {
    const pieces = [];
    let open = null; // the mark that goes on while the pieces are of the same boxes
    for (const part of text.segments) {
      const entity = part.entity === null ? null : text.entities[part.entity];
      const piece = entity ? el("span", { class: "entity", title: `${entity.sense}: ${entity.gloss}`, "data-sense": entity.sense }, part.text) : part.text;
      const numbers = part.boxes.join(" ");
      if (!numbers) {
        open = null;
        pieces.push(piece);
      } else if (open?.dataset.box === numbers) {
        open.append(piece);
      } else {
        open = el("mark", { "data-box": numbers, style: colour(boxes.get(part.boxes[0])) }, piece);
        for (const index of part.boxes) link(open, index);
        pieces.push(open);
      }
    }
    return el("p", { class: place ? "text other" : "text" }, pieces);
  };
  return section("Text", sample.texts.map(paragraph));
}

function card(item, more = null) {
  return el("div", { class: "card", "data-sense": item.sense },
    el("div", {}, el("b", {}, item.term), el("code", {}, item.sense), item.senses > 1 ? el("small", {}, `first of ${item.senses} senses`) : null, more),
    el("p", {}, item.gloss),
    item.path.length > 1 ? el("p", { class: "path" }, item.path.join(" › ")) : null);
}

function classCard(sample) {
  const known = sample.class;
  if (!known) return null;
  return section("Class",
    el("p", {}, el("b", {}, known.name || "no name"), ` class ${known.label}`, known.heldout ? el("span", { class: "badge" }, "held out") : null,
      known.aliases?.length ? el("small", {}, ` also ${known.aliases.join(", ")}`) : null),
    known.knowledge ? card(known.knowledge, known.knowledge.exact ? null : el("small", {}, "by its head word")) : null);
}

function knowledge(sample) {
  const found = new Map((sample.texts || []).flatMap((text) => text.entities).map((item) => [item.sense, item]));
  if (sample.class?.knowledge) found.delete(sample.class.knowledge.sense);
  return found.size ? section("Knowledge", [...found.values()].map((item) => card(item))) : null;
}

function questions(sample) {
  if (!sample.qa?.length) return null;
  return section("Questions", el("dl", {}, sample.qa.map((pair) => [el("dt", {}, pair.question), pair.answers.map((answer) => el("dd", {}, answer))])));
}

function boxList(sample, link) {
  const listed = [...(sample.boxes || []), ...(sample.tracks || [])];
  if (!listed.length) return null;
  return section("Boxes", el("ul", {}, listed.map((box) =>
    link(el("li", { "data-box": box.index, style: colour(box) }, el("i", {}), el("b", {}, box.name || `box ${box.index}`),
      box.note ? el("small", {}, box.note) : null, box.crowd ? el("small", {}, "crowd") : null,
      el("code", {}, box.frames ? `in ${box.frames.filter(Boolean).length} of ${box.frames.length} frames` : box.xyxy.map((n) => Math.round(n * 10) / 10).join(", "))), box.index))));
}

function others(sample, parameters) {
  const rest = (sample.members || []).filter((m) => m.kind === "file" || (m.kind === "image" && !FRAME.test(m.name)) || (m.kind === "video" && sample.image));
  if (!rest.length) return null;
  const shown = rest.slice(0, MAX_MEMBERS);
  return section("Members", rest.length > shown.length ? el("p", {}, `the first ${shown.length} of ${rest.length}`) : null, shown.map((m) => {
    const source = address("member", { ...parameters, name: m.name });
    return el("figure", {},
      m.kind === "image" ? el("img", { src: source, loading: "lazy", alt: "" }) : null,
      m.kind === "video" ? el("video", { src: source, controls: true, loop: true, preload: "metadata" }) : null,
      el("figcaption", {}, el("code", {}, m.name), ` ${bytes(m.bytes)} `, m.kind === "file" ? el("a", { href: source, download: `${sample.key}.${m.name}` }, "save") : null));
  }));
}

function details(sample, entry, context) {
  const hasPosition = entry.position !== null && entry.position !== undefined;
  const rows = [
    ["Key", sample.key],
    ["Shard", sample.shard],
    ["Number", `${thousands(sample.number)} of ${thousands(context.total)} in ${context.split}`],
    hasPosition ? ["Position", `${thousands(entry.position)} (epoch ${thousands(Math.floor(entry.position / context.total))})`] : null,
    sample.size ? ["Size", `${sample.size.join(" × ")} pixels`] : null,
    sample.image ? ["Image", `${sample.format}, ${bytes(sample.image)}`] : null,
  ].filter(Boolean);
  return section("Details", el("dl", { class: "rows" }, rows.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
}

function rawJson(sample, parameters) {
  if (!sample.raw) return null;
  return section("JSON", el("details", {}, el("summary", {}, "as stored"), el("pre", {}, sample.raw), el("a", { href: address("raw", parameters), target: "_blank" }, "the whole of it")));
}

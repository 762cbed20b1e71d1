// The view of one sample.

import { address, bytes, el, hue, svg, thousands } from "/dom.js";

const settings = {
  get: (name, otherwise) => localStorage.getItem(`groundwork.${name}`) ?? otherwise,
  set: (name, value) => localStorage.setItem(`groundwork.${name}`, value),
};

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

/** Switch boxes, masks or depth on or off. */
export function toggle(view, kind) {
  for (const input of view.querySelectorAll(`input[data-kind="${kind}"]`)) input.click();
}

function highlight(view, index, on) {
  view.querySelector(".canvas")?.classList.toggle("has-hot", on);
  for (const element of view.querySelectorAll(`[data-box~="${index}"]`)) element.classList.toggle("hot", on);
}

function stage(sample, parameters, link) {
  const maps = (sample.members || []).filter((m) => m.kind === "labels" || m.kind === "depth");
  const film = (sample.members || []).find((m) => m.kind === "video");
  if (!sample.image && film) {
    return el("div", { class: "stage" }, el("video", { src: address("member", { ...parameters, name: film.name }), controls: true, loop: true }));
  }
  const canvas = el("div", { class: "canvas" });
  const bar = el("div", { class: "bar" });
  const box = el("div", { class: "stage" }, canvas, bar);
  if (!sample.image && !maps.length) {
    canvas.append(el("div", { class: "broken" }, sample.diagnosis || "no image"));
    return box;
  }
  const first = sample.image ? address("image", parameters) : address("overlay", { ...parameters, name: maps[0].name });
  const image = el("img", {
    class: "main",
    src: first,
    alt: "",
    onload: () => shape(canvas, sample.size || [image.naturalWidth, image.naturalHeight], image.naturalWidth),
    onerror: () => canvas.replaceChildren(el("div", { class: "broken" }, sample.diagnosis || "the browser cannot show this image")),
  });
  canvas.append(image);
  if (sample.size) shape(canvas, sample.size, sample.size[0]);
  const layers = [];
  for (const map of sample.image ? maps : maps.slice(1)) {
    const layer = el("img", { class: `layer ${map.kind}`, src: address("overlay", { ...parameters, name: map.name }), alt: "", "data-member": map.name });
    layers.push(layer);
    canvas.append(layer);
    bar.append(chip(map.name.replace(/\.png$/, ""), map.kind, map.kind === "labels", (on) => { layer.hidden = !on; }));
  }
  if (sample.boxes?.length && sample.size) {
    const drawn = drawBoxes(sample, link);
    canvas.append(...drawn);
    bar.prepend(chip(`boxes (${sample.boxes.length})`, "boxes", true, (on) => { for (const d of drawn) d.toggleAttribute("hidden", !on); }));
  }
  if (layers.length) {
    const strength = el("input", { type: "range", min: 0.1, max: 1, step: 0.05, value: settings.get("strength", 0.55), "aria-label": "Strength of the overlays" });
    const apply = () => { for (const l of layers) l.style.opacity = strength.value; };
    strength.addEventListener("input", () => { settings.set("strength", strength.value); apply(); });
    apply();
    bar.append(el("label", { class: "strength" }, "strength", strength));
  }
  return box;
}

/** Fit a picture into the stage; small ones are enlarged, at most eight times. */
function shape(canvas, [width, height], stored) {
  canvas.style.aspectRatio = `${width} / ${height}`;
  canvas.style.width = `min(100%, calc(70vh * ${width / height}), ${Math.max(width, stored) * 8}px)`;
  canvas.classList.toggle("pixels", stored < 200);
}

function chip(name, kind, byDefault, change) {
  const on = settings.get(`show.${kind}`, String(byDefault)) === "true";
  const input = el("input", { type: "checkbox", "data-kind": kind, checked: on });
  input.addEventListener("change", () => { settings.set(`show.${kind}`, input.checked); change(input.checked); });
  change(on);
  return el("label", { class: "chip" }, input, name);
}

const colour = (box) => ({ "--hue": hue(box.name) });

function drawBoxes(sample, link) {
  const [width, height] = sample.size;
  const shapes = svg("svg", { class: "shapes", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" });
  const labels = el("div", { class: "labels" });
  for (const box of sample.boxes) {
    const [left, top, right, bottom] = box.xyxy;
    for (const points of box.polygons) {
      shapes.append(svg("polygon", { points: points.join(" "), "data-box": box.index, style: colour(box) }));
    }
    const rect = { x: left, y: top, width: Math.max(0, right - left), height: Math.max(0, bottom - top) };
    shapes.append(link(svg("rect", { ...rect, class: box.crowd ? "crowd" : "", "data-box": box.index, style: colour(box) }), box.index));
    if (box.name) {
      const low = top / height < 0.06;
      const style = { ...colour(box), left: `${(100 * left) / width}%`, top: `${(100 * top) / height}%` };
      labels.append(el("span", { class: low ? "inside" : "", "data-box": box.index, style }, box.name));
    }
  }
  return [shapes, labels];
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
  const boxes = new Map(sample.boxes.map((box) => [box.index, box]));
  return section("Text", sample.texts.map((text, place) =>
    el("p", { class: place ? "text other" : "text" }, text.segments.map((part) => {
      let piece = part.text;
      const entity = part.entity === null ? null : text.entities[part.entity];
      if (entity) piece = el("span", { class: "entity", title: `${entity.sense}: ${entity.gloss}`, "data-sense": entity.sense }, piece);
      if (!part.boxes.length) return piece;
      const span = el("mark", { "data-box": part.boxes.join(" "), style: colour(boxes.get(part.boxes[0])) }, piece);
      for (const index of part.boxes) link(span, index);
      return span;
    }))));
}

function card(item, more = null) {
  return el("div", { class: "card", "data-sense": item.sense },
    el("div", {}, el("b", {}, item.term), el("code", {}, item.sense), more),
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
  if (!sample.boxes?.length) return null;
  return section("Boxes", el("ul", {}, sample.boxes.map((box) =>
    link(el("li", { "data-box": box.index, style: colour(box) }, el("i", {}), el("b", {}, box.name || `box ${box.index}`),
      box.note ? el("small", {}, box.note) : null, box.crowd ? el("small", {}, "crowd") : null,
      el("code", {}, box.xyxy.map((n) => Math.round(n * 10) / 10).join(", "))), box.index))));
}

function others(sample, parameters) {
  const rest = (sample.members || []).filter((m) => m.kind === "file" || m.kind === "image" || (m.kind === "video" && sample.image));
  if (!rest.length) return null;
  return section("Members", rest.map((m) => {
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

// The picture or clip of a sample, with boxes, masks and depth over it.

import { address, el, hue, svg } from "/dom.js";

const settings = {
  get: (name, otherwise) => localStorage.getItem(`groundwork.${name}`) ?? otherwise,
  set: (name, value) => localStorage.setItem(`groundwork.${name}`, value),
};

/** Names of members that belong to one frame of a clip: depth.0007.png */
export const FRAME = /^(.+)\.(\d+)\.(?:png|jpg|jpeg|webp)$/;

export const colour = (box) => ({ "--hue": hue(box.name) });

/** The stage. link(element, index): makes pointing at an element highlight the box of that number. */
export function stage(sample, parameters, link) {
  const source = (name, kind) => (name === null ? address("segments", parameters) : address(kind === "image" ? "member" : "overlay", { ...parameters, name }));
  const canvas = el("div", { class: "canvas" });
  const bar = el("div", { class: "bar" });
  const box = el("div", { class: "stage" }, canvas, bar);
  const { groups, count } = layersOf(sample);
  const film = sample.image ? null : (sample.members || []).find((m) => m.kind === "video");
  const base = film || sample.image ? null : groups.find((g) => g.kind === "image") || groups[0];
  if (!sample.image && !film && !base) {
    canvas.append(el("div", { class: "broken" }, sample.diagnosis || "no image"));
    return box;
  }
  const fit = (width, height) => shape(canvas, sample.size || [width, height], width);
  const failed = () => canvas.replaceChildren(el("div", { class: "broken" }, sample.diagnosis || "the browser cannot show this"));
  const main = film
    ? el("video", { class: "main", src: address("member", { ...parameters, name: film.name }), preload: "auto", loop: true, onloadedmetadata: () => fit(main.videoWidth, main.videoHeight), onerror: failed })
    : el("img", { class: "main", alt: "", onload: () => fit(main.naturalWidth, main.naturalHeight), onerror: failed });
  main.muted = true;
  if (sample.image) main.src = address("image", parameters);
  canvas.append(main);
  if (sample.size) shape(canvas, sample.size, sample.size[0]);

  const overlays = groups.filter((g) => g !== base && g.kind !== "image");
  if (sample.runLengths) overlays.push({ name: "segments", kind: "labels", members: [null] });
  const layers = overlays.map((group) => el("img", { class: `layer ${group.kind}`, alt: "", "data-member": group.name, onerror: (event) => event.target.remove() }));
  canvas.append(...layers);
  overlays.forEach((group, i) => {
    const byDefault = group.kind === "labels" && (group.name !== "mask" || !overlays.some((g) => g.name === "instances"));
    bar.append(chip(group.name, group.kind, group.name, byDefault, (on) => { layers[i].hidden = !on; }));
  });
  const drawn = el("div", { class: "drawn" });
  const things = [...(sample.boxes || []), ...(sample.tracks || [])];
  if (things.length && sample.size) {
    canvas.append(drawn);
    bar.prepend(chip(`boxes (${things.length})`, "boxes", "boxes", true, (on) => { drawn.hidden = !on; }));
  }
  if (layers.length) bar.append(strength(layers));

  const showFrame = (frame) => {
    if (base) main.src = source(base.members[Math.min(frame, base.members.length - 1)], base.kind);
    layers.forEach((layer, i) => {
      const name = overlays[i].members[Math.min(frame, overlays[i].members.length - 1)];
      layer.src = source(name, overlays[i].kind);
    });
    if (sample.size) drawn.replaceChildren(...drawBoxes(things, sample.size, frame, link));
  };
  showFrame(0);
  const frames = Math.max(count, ...(sample.tracks || []).map((t) => t.frames.length));
  if (film || frames > 1) box.append(player(film ? main : null, frames, sample.fps, showFrame));
  return box;
}

/** The members that can be drawn, those of the frames of a clip together, and how many frames. */
function layersOf(sample) {
  const groups = new Map();
  let count = 0;
  for (const member of sample.members || []) {
    const [, name, number] = FRAME.exec(member.name) || [];
    if (!["labels", "depth"].includes(member.kind) && !(member.kind === "image" && number && !sample.image)) continue;
    const group = name ?? member.name.replace(/\.png$/, "");
    if (!groups.has(group)) groups.set(group, { name: group, kind: member.kind, members: [] });
    groups.get(group).members.push(member.name);
    if (number) count = Math.max(count, groups.get(group).members.length);
  }
  return { groups: [...groups.values()], count };
}

/** Play, pause and seek. film: the video, or null where the frames are pictures. */
function player(film, frames, fps, showFrame) {
  const slider = el("input", { type: "range", min: 0, max: Math.max(0, frames - 1), value: 0, "aria-label": "Frame" });
  const label = el("span", {});
  const button = el("button", { type: "button", class: "icon", title: "Play or pause (space)", "data-play": "" }, "▶");
  const tell = () => { label.textContent = `frame ${slider.value}${frames > 1 ? ` of ${frames}` : ""}`; };
  const show = (frame) => {
    slider.value = frame;
    tell();
    showFrame(Number(slider.value));
  };
  tell();
  let timer = null;
  const onFilmFrame = (_now, frame) => {
    if (!film.isConnected) return;
    if (frames > 1) show(Math.floor(frame.mediaTime * fps + 0.01));
    film.requestVideoFrameCallback(onFilmFrame);
  };
  if (film) {
    film.requestVideoFrameCallback(onFilmFrame);
    film.addEventListener("loadedmetadata", () => { if (frames <= 1) { frames = Math.round(film.duration * fps); slider.max = frames - 1; tell(); } });
  }
  const tick = () => {
    if (slider.isConnected) show((Number(slider.value) + 1) % frames);
    else clearInterval(timer);
  };
  button.addEventListener("click", () => {
    const playing = film ? !film.paused : timer !== null;
    button.textContent = playing ? "▶" : "❚❚";
    if (film) playing ? film.pause() : film.play();
    else if (playing) timer = clearInterval(timer) ?? null;
    else timer = setInterval(tick, 1000 / fps);
  });
  slider.addEventListener("input", () => {
    if (film) film.currentTime = (Number(slider.value) + 0.5) / fps;
    show(Number(slider.value));
  });
  return el("div", { class: "player" }, button, slider, label);
}

/** Fit a picture into the stage; small ones are enlarged, at most eight times. */
function shape(canvas, [width, height], stored) {
  canvas.style.aspectRatio = `${width} / ${height}`;
  canvas.style.width = `min(100%, calc(70vh * ${width / height}), ${Math.max(width, stored) * 8}px)`;
  canvas.classList.toggle("pixels", stored < 200);
}

function strength(layers) {
  const input = el("input", { type: "range", min: 0.1, max: 1, step: 0.05, value: settings.get("strength", 0.55), "aria-label": "Strength of the overlays" });
  const apply = () => { for (const layer of layers) layer.style.opacity = input.value; };
  input.addEventListener("input", () => { settings.set("strength", input.value); apply(); });
  apply();
  return el("label", { class: "strength" }, "strength", input);
}

/** A switch. kind: what its key switches; setting: the name under which it is remembered. */
function chip(name, kind, setting, byDefault, change) {
  const on = settings.get(`show.${setting}`, String(byDefault)) === "true";
  const input = el("input", { type: "checkbox", "data-kind": kind, checked: on });
  input.addEventListener("change", () => { settings.set(`show.${setting}`, input.checked); change(input.checked); });
  change(on);
  return el("label", { class: "chip" }, input, name);
}

function drawBoxes(things, [width, height], frame, link) {
  const shapes = svg("svg", { class: "shapes", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" });
  const labels = el("div", { class: "labels" });
  for (const box of things) {
    const corners = box.frames ? box.frames[frame] : box.xyxy;
    if (!corners) continue;
    const [left, top, right, bottom] = corners;
    for (const points of box.polygons) {
      shapes.append(svg("polygon", { points: points.join(" "), "data-box": box.index, style: colour(box) }));
    }
    const rect = { x: left, y: top, width: Math.max(0, right - left), height: Math.max(0, bottom - top) };
    shapes.append(link(svg("rect", { ...rect, class: box.crowd ? "crowd" : "", "data-box": box.index, style: colour(box) }), box.index));
    if (box.name) {
      const style = { ...colour(box), left: `${(100 * left) / width}%`, top: `${(100 * top) / height}%` };
      labels.append(el("span", { class: top / height < 0.06 ? "inside" : "", "data-box": box.index, style }, box.name));
    }
  }
  return [shapes, labels];
}

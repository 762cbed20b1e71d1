// The grid of thumbnails.

import { address, ask, el, thousands } from "/dom.js";

/** One tile. open: called with nothing when it is chosen. */
export function tile(entry, context, link) {
  const { split, version } = context;
  const picture = el("div", { class: "picture" });
  if (entry.error && !entry.image) picture.append(broken(entry.error));
  else if (entry.image) picture.append(thumb(entry, context, picture));
  else picture.append(stand_in(entry, split, version));
  const badges = [];
  if (entry.replaced?.length) badges.push(el("span", { class: "badge warn", title: reasons(entry) }, `replaces ${entry.replaced.length} bad`));
  if (entry.error) badges.push(el("span", { class: "badge bad" }, "bad"));
  if (entry.boxes) badges.push(el("span", { class: "badge" }, `${entry.boxes} ${entry.boxes === 1 ? "box" : "boxes"}`));
  for (const kind of entry.kinds || []) {
    if (kind !== "file") badges.push(el("span", { class: "badge" }, { labels: "masks", depth: "depth", video: "clip", image: "image" }[kind]));
  }
  return el(
    "a",
    { class: entry.error ? "tile is-bad" : "tile", href: link, title: entry.key, "data-key": entry.key, "data-number": entry.number },
    picture,
    el("div", { class: "badges" }, badges),
    el("div", { class: "caption" },
      entry.class?.name ? el("b", {}, entry.class.name) : null,
      entry.error ? el("span", { class: "reason" }, entry.error) : el("span", {}, entry.class?.name === entry.text ? "" : entry.text)),
    el("div", { class: "place" },
      el("span", {}, entry.position === null || entry.position === undefined ? `#${thousands(entry.number)}` : `${thousands(entry.position)} → #${thousands(entry.number)}`),
      entry.size ? el("span", {}, entry.size.join(" × ")) : null),
  );
}

function thumb(entry, context, picture) {
  const parameters = { split: context.split, number: entry.number, v: context.version };
  return el("img", {
    src: address("thumb", parameters),
    loading: "lazy",
    decoding: "async",
    alt: "",
    onerror: async () => {
      // the grid does not decode; what is wrong is asked for where it shows
      const { diagnosis } = await ask("sample", parameters).catch(() => ({}));
      picture.replaceChildren(broken(diagnosis || "the browser cannot show this image"));
      picture.closest(".tile")?.classList.add("is-bad");
    },
  });
}

function stand_in(entry, split, version) {
  const { name, kind } = entry.standIn || {};
  if (!name) return el("div", { class: "none" }, "no image");
  const parameters = { split, number: entry.number, name, v: version };
  if (kind === "video") return el("video", { src: address("member", parameters), preload: "metadata", muted: true, tabindex: -1 });
  return el("img", { src: address(kind === "image" ? "member" : "overlay", parameters), loading: "lazy", alt: "" });
}

const broken = (reason) => el("div", { class: "broken" }, el("span", {}, "✕"), el("small", {}, reason));

const reasons = (entry) => entry.replaced.map((bad) => `${bad.key}: ${bad.reason}`).join("\n");

/** Move the focus among tiles by an arrow key. Returns whether it was one. */
export function move(grid, key) {
  const tiles = [...grid.querySelectorAll(".tile")];
  if (!tiles.length) return false;
  const at = tiles.indexOf(document.activeElement);
  const row = tiles.findIndex((t) => t.offsetTop > tiles[0].offsetTop);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: row < 0 ? 0 : -row, ArrowDown: row < 0 ? 0 : row }[key];
  if (step === undefined) return false;
  const next = at < 0 ? 0 : Math.min(tiles.length - 1, Math.max(0, at + step));
  tiles[next].focus();
  return true;
}

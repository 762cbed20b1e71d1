// Making elements. Texts of a data set become text nodes, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element. props: attributes; `on...` listeners; `style` an object; null and false are left out. */
export function el(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [k, v] of Object.entries(value)) element.style.setProperty(k, v);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** An address of the server; `v` keeps the browser from showing pictures of another data set. */
export function address(path, parameters) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== null && value !== undefined && value !== "") query.set(name, value);
  }
  return `/api/${path}?${query}`;
}

/** The JSON at an address. Throws an Error with the server's message. */
export async function ask(path, parameters = {}, signal = undefined) {
  const response = await fetch(address(path, parameters), { signal });
  const record = await response.json();
  if (!response.ok) throw new Error(record.error || response.statusText);
  return record;
}

/** The lines of JSON at an address, as they come. */
export async function* askLines(path, parameters, signal) {
  const response = await fetch(address(path, parameters), { signal });
  if (!response.ok) throw new Error((await response.json()).error);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

/** 1234567 -> 1,234,567 */
export const thousands = (number) => number.toLocaleString("en-US");

/** 43210 -> 42.2 KiB */
export function bytes(number) {
  if (number < 1024) return `${number} B`;
  const power = Math.min(3, Math.floor(Math.log2(number) / 10));
  return `${(number / 1024 ** power).toFixed(1)} ${["", "KiB", "MiB", "GiB"][power]}`;
}

/** A hue for a category: the same name gets the same one everywhere. */
export function hue(name) {
  let hash = 2166136261;
  for (const character of String(name)) hash = Math.imul(hash ^ character.codePointAt(0), 16777619);
  // neighbouring hashes are spread by the golden angle
  return Math.round(((hash >>> 0) * 137.508) % 360);
}

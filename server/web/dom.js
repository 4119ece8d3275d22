/** Elements of the document, and numbers as text. */

export const $ = (id) => document.getElementById(id);

/**
 * Makes an element.
 * @param {string} tag
 * @param {Object<string, any>} properties of the element; set as attributes where it has no such property
 * @param {...(Node|string|null)} children
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Makes an SVG element. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Sets the width of a bar to a share in [0, 1]; by script because the page's policy forbids style attributes. */
export function setShare(element, share) {
  element.style.setProperty("--share", `${Math.max(0, Math.min(1, share)) * 100}%`);
  return element;
}

/** Formats milliseconds with their unit. */
export function formatDuration(ms) {
  if (ms >= 10000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  return ms >= 10 ? `${Math.round(ms)} ms` : `${ms.toFixed(1)} ms`;
}

/** Formats an integer with thousands separators. */
export const formatCount = (number) => number.toLocaleString("en");

/** Formats a share in [0, 1] as percent. */
export const formatPercent = (share) => `${(share * 100).toFixed(share < 0.1 ? 2 : 1)} %`;

/** Formats a measurement with about three significant digits. */
export const formatMeasure = (number) => (number >= 100 ? formatCount(Math.round(number)) : String(Number(number.toPrecision(3))));

/** Formats an IoU or Dice in [0, 1]; only an exact 1 is shown as 1. */
export const formatOverlap = (value) => (value === 1 ? "1" : Math.min(value, 0.999).toFixed(3));

/** Names a level: "L2", "auto" or "accurate". */
export const levelName = (level) => (typeof level === "number" ? `L${level}` : level);

/** Elements and numbers. */

export const $ = (id) => document.getElementById(id);

/**
 * An element.
 * @param {string} tag
 * @param {Object<string, any>} properties of the element, or attributes where it has none of that name
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

/** An element of a drawing, with attributes. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Milliseconds for people. */
export function duration(ms) {
  if (ms >= 10000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  return ms >= 10 ? `${Math.round(ms)} ms` : `${ms.toFixed(1)} ms`;
}

/** A count, grouped. */
export const count = (number) => number.toLocaleString("en");

/** A share of one, in percent. */
export const percent = (share) => `${(share * 100).toFixed(share < 0.1 ? 2 : 1)} %`;

/** What is measured, with three figures or so. */
export const measured = (number) => (number >= 100 ? count(Math.round(number)) : String(Number(number.toPrecision(3))));

/** An overlap in [0, 1]; only what is equal is 1. */
export const overlap = (value) => (value === 1 ? "1" : Math.min(value, 0.999).toFixed(3));

/** A share of the width, for bars: styles may not stand in the page's text, but scripts may set them. */
export function wide(element, share) {
  element.style.setProperty("--share", `${Math.max(0, Math.min(1, share)) * 100}%`);
  return element;
}

// Finding, making and filling elements. Text goes in as text, never as HTML.

export const at = (id) => document.getElementById(id);

export function make(tag, { text, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...(text === undefined ? [] : [text]), ...children);
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

export function draw(tag, { text, ...attributes } = {}) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** An element without text is not there. */
export function say(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

/** With four digits. */
export function number(value) {
  return String(Number(value.toPrecision(4)));
}

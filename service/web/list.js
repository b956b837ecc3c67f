// The list of images: a listbox, in which the arrow keys move.

import { at, make, number } from "./dom.js";

let selected = null;

export function addRow(item, choose) {
  const row = make("li", { tabIndex: -1 });
  row.setAttribute("role", "option");
  row.setAttribute("aria-selected", "false");
  row.append(make("span", { className: "thumbnail" }), make("span", { className: "name", text: item.file.name }),
    make("span", { className: "state" }));
  row.addEventListener("click", () => choose(item));
  item.row = row;
  at("list").append(row);
  showRow(item);
}

export function showRow(item) {
  const [picture, , state] = item.row.children;
  if (item.thumbnail && !picture.firstChild) picture.append(item.thumbnail);
  state.replaceChildren(verdict(item));
  if (item.state === "scored") state.append(make("span", { className: "p", text: `p ${number(item.result.p_value)}` }));
}

/** In a symbol, a word and a colour. */
export function verdict(item) {
  const [symbol, word, kind] = {
    waiting: () => ["", "Waiting", "pending"],
    sending: () => ["", item.busy ? `Busy, again in ${item.busy} s` : "Scoring …", "pending"],
    failed: () => ["✕", "Not scored", "failed"],
    scored: () => (item.result.is_anomalous ? ["▲", "Anomalous", "anomalous"] : ["✓", "Normal", "normal"]),
  }[item.state]();
  const mark = make("span", { className: "mark", text: symbol });
  mark.setAttribute("aria-hidden", "true");
  return make("span", { className: `verdict ${kind}` }, mark, word);
}

/** One row takes the focus of the tab key. */
export function markRow(item) {
  for (const each of [selected, item]) {
    if (!each) continue;
    each.row.setAttribute("aria-selected", String(each === item));
    each.row.tabIndex = each === item ? 0 : -1;
  }
  selected = item;
}

export function emptyList() {
  selected = null;
  at("list").replaceChildren();
}

/** Call choose(item) where a key asks for another of the items. */
export function moveByKeys(items, choose) {
  at("list").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1, Home: -items.length, End: items.length }[event.key];
    if (step === undefined || !selected) return;
    event.preventDefault();
    choose(items[Math.min(Math.max(items.indexOf(selected) + step, 0), items.length - 1)]);
    selected.row.focus();
  });
}

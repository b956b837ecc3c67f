// Where an image's anomaly score lies among those of good parts: a histogram, drawn as SVG.

import { draw, number } from "./dom.js";

const HEIGHT = 190, TOP = 44, BASE = HEIGHT - 34, MARGIN = 14;
const CHARACTER = 7; // width of one in a label, about

/** The score that an anomalous image exceeds: p = (1 + number of good scores at or above) / (n + 1) <= alpha. */
export function threshold(good, alpha) {
  const above = Math.floor(alpha * (good.length + 1) + 1e-9) - 1;
  return good[good.length - 1 - above];
}

/** good: ascending. width: of the drawing, in CSS pixels, so that its text has the page's size. */
export function histogram({ good, score, alpha, width }) {
  const limit = threshold(good, alpha);
  const [low, high] = [good[0], good.at(-1)];
  const spread = high - low || 1;
  // Good parts keep more than half of the width: a score far away is drawn at the edge, and says so.
  const from = low - 0.12 * spread, to = high + 0.7 * spread;
  const right = width - MARGIN;
  const x = (value) => MARGIN + ((Math.min(Math.max(value, from), to) - from) / (to - from)) * (right - MARGIN);
  const svg = draw("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img" });
  svg.setAttribute("aria-label",
    `Histogram of the anomaly scores of ${good.length} good parts, from ${number(low)} to ${number(high)}. ` +
    `Scores above ${number(limit)} are anomalous at alpha ${number(alpha)}. This image: ${number(score)}.`);

  svg.append(draw("rect", { class: "beyond", x: x(limit), y: TOP, width: right - x(limit), height: BASE - TOP }));
  const bins = Math.min(30, Math.max(8, Math.ceil(2 * Math.sqrt(good.length))));
  const counts = Array(bins).fill(0);
  for (const value of good) counts[Math.min(bins - 1, Math.floor(((value - low) / spread) * bins))] += 1;
  const tallest = Math.max(...counts);
  counts.forEach((count, bin) => {
    const [begin, end] = [x(low + (bin / bins) * spread), x(low + ((bin + 1) / bins) * spread)];
    const height = (count / tallest) * (BASE - TOP - 14);
    svg.append(draw("rect", { class: "bar", x: begin + 0.5, y: BASE - height, width: end - begin - 1, height }));
  });
  svg.append(draw("line", { class: "axis", x1: MARGIN, x2: right, y1: BASE, y2: BASE }));
  for (const value of ticks(from, to, width / 90)) {
    svg.append(draw("line", { class: "axis", x1: x(value), x2: x(value), y1: BASE, y2: BASE + 5 }));
    svg.append(label(number(value), x(value), BASE + 20, "tick", "middle"));
  }
  svg.append(draw("line", { class: "limit", x1: x(limit), x2: x(limit), y1: TOP - 18, y2: BASE }));
  const rule = `alpha ${number(alpha)}: above ${number(limit)}`;
  const fits = x(limit) + CHARACTER * (rule.length + 2) < right;
  svg.append(label(rule, x(limit) + (fits ? 6 : -6), TOP - 6, "limit-label", fits ? "start" : "end"));

  const words = `${score < from ? "← " : ""}this image: ${number(score)}${score > to ? " →" : ""}`;
  const half = (CHARACTER / 2) * words.length;
  const anchor = x(score) + half > right ? "end" : x(score) < half ? "start" : "middle";
  svg.append(draw("line", { class: "mark", x1: x(score), x2: x(score), y1: 22, y2: BASE }));
  svg.append(draw("path", { class: "mark-head", d: `M${x(score) - 6} ${BASE} h12 l-6 -10 z` }));
  svg.append(label(words, x(score), 15, "mark-label", anchor));
  return svg;
}

/** About so many round numbers. */
function ticks(from, to, wanted) {
  const rough = (to - from) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let index = Math.ceil(from / step); index * step <= to; index++) found.push(index * step);
  return found;
}

function label(text, x, y, style, anchor) {
  return draw("text", { text, x, y, class: style, "text-anchor": anchor });
}

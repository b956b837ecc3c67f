// The one image that is looked at.

import { histogram } from "./chart.js";
import { at, make, number, say } from "./dom.js";
import { verdict } from "./list.js";
import { drawLegend, mapCanvases, regionFrames, shownImage } from "./picture.js";
import { modelOf } from "./service.js";

const SCORES = {
  anomaly_score: ["Anomaly score", "the three below in one, in standard deviations of good parts"],
  reconstruction: ["Reconstruction", "mean squared error per pixel and channel"],
  latent: ["Latent", "negative log-likelihood of the code, nats per dimension"],
  anomaly_map: ["Anomaly map", "the map where it is highest"],
};

let turn = 0; // of two images that are being prepared the later one is shown
let drawChart = () => {};

export function prepareDetail() {
  drawLegend(at("legend"));
  at("opacity").addEventListener("input", showOpacity);
  at("boxes").addEventListener("change", showOpacity);
  new ResizeObserver(() => drawChart()).observe(at("chart"));
}

export function hideDetail() {
  turn += 1;
  at("detail").hidden = true;
}

export async function showDetail(item) {
  const mine = ++turn;
  at("detail").hidden = false;
  at("detail-title").textContent = item.file.name;
  at("detail-verdict").replaceChildren(verdict(item));
  say(at("detail-error"), item.error ? `${item.error.message} (${item.error.code})` : "");
  at("detail-scored").hidden = item.state !== "scored";
  if (item.state !== "scored") return;
  showNumbers(item);
  const [image, map] = await Promise.all([
    shownImage(item.isOverlay ? item.map : item.file, item.file.name),
    item.isOverlay ? null : mapCanvases(item.map),
  ]);
  if (mine !== turn) return;
  showPictures(item, image, map);
  try {
    const { good_scores: good } = await modelOf(item.model);
    if (mine === turn) showChart(item, good);
  } catch (error) {
    if (mine === turn) say(at("chart-note"), error.message);
  }
}

function showNumbers({ result, model }) {
  const n = model.calibration_images, above = Math.round(result.p_value * (n + 1)) - 1;
  at("detail-sentence").textContent =
    `${above || "None"} of ${n} good images scored as high or higher: p = ${above + 1} / ${n + 1} = ${number(result.p_value)}, ` +
    `${result.is_anomalous ? "at most" : "above"} alpha, ${number(model.alpha)}.`;
  const values = { anomaly_score: result.anomaly_score, ...result.scores };
  at("scores").tBodies[0].replaceChildren(...Object.entries(SCORES).map(([name, [label, unit]]) => {
    const head = make("th", { scope: "row", text: label }, make("span", { className: "hint", text: unit }));
    return make("tr", {}, head, make("td", { text: number(values[name]) }));
  }));
  at("no-regions").hidden = result.regions.length > 0;
  at("regions").hidden = !result.regions.length;
  at("regions").tBodies[0].replaceChildren(...result.regions.map((region, index) => {
    const cells = [region.left, region.top, region.width, region.height, number(region.peak)];
    return make("tr", {}, make("th", { scope: "row", text: index + 1 }), ...cells.map((text) => make("td", { text })));
  }));
  at("legend-level").textContent = `level ${number(model.map_level)}`;
  at("legend-top").textContent = `${number(2 * model.map_level)} or more`;
  at("detail-origin").textContent = `${result.width} × ${result.height} pixels. Scored by ${model.name}, ` +
    `version ${model.version}, at alpha ${number(model.alpha)}; weights ${model.sha256.slice(0, 12)}.`;
}

function showPictures({ result, isOverlay, file }, image, map) {
  const both = image && map;
  const frames = isOverlay ? [] : [regionFrames(result.regions, result.width, result.height)];
  if (map) {
    map.over.className = "over";
    map.over.setAttribute("aria-hidden", "true");
    map.alone.setAttribute("role", "img");
    map.alone.setAttribute("aria-label", `Anomaly map of ${file.name}`);
  }
  at("picture").replaceChildren(image ?? map.alone, ...(both ? [map.over] : []), ...frames);
  at("map").replaceChildren(...(both ? [map.alone] : []));
  at("map").closest("figure").hidden = !both;
  for (const frame of [at("picture"), at("map")]) frame.style.setProperty("--ratio", result.width / result.height);
  at("opacity").disabled = !both;
  at("boxes").disabled = isOverlay;
  say(at("picture-note"), isOverlay ? "The browser cannot show this file: the service has drawn it, with its map and boxes." : "");
  showOpacity();
}

function showOpacity() {
  at("opacity-value").textContent = `${at("opacity").value} %`;
  const over = at("picture").querySelector(".over");
  if (over) over.style.opacity = at("opacity").value / 100;
  at("picture").classList.toggle("unframed", !at("boxes").checked);
}

function showChart({ result, model }, good) {
  drawChart = () => {
    const width = Math.max(240, at("chart").clientWidth);
    at("chart").replaceChildren(histogram({ good, score: result.anomaly_score, alpha: model.alpha, width }));
  };
  drawChart();
  say(at("chart-note"), `Bars: how many of the ${good.length} good images of the calibration have such an anomaly score.`);
}

// The page: what was chosen, what became of it, and the one image that is looked at.

import { csvFile } from "./csv.js";
import { hideDetail, prepareDetail, showDetail } from "./detail.js";
import { at, make, say } from "./dom.js";
import { addRow, emptyList, markRow, moveByKeys, showRow } from "./list.js";
import { mapBlob, thumbnail } from "./picture.js";
import { ask } from "./service.js";
import { askForKey, held, noteVersion, prepareSettings, settings } from "./settings.js";

const AT_ONCE = 4; // requests; of one image each, so that a failure is one image's
const THUMBNAIL = 88; // pixels
const items = []; // {file, row, state: waiting | sending | scored | failed, ...}
let running = 0;
let session = new AbortController(); // until "Clear"
let selected = null;

// Images on their way

function add(files) {
  if (!files.length) return;
  for (const file of files) {
    const item = { file, state: "waiting" };
    items.push(item);
    addRow(item, select);
  }
  at("results").hidden = false;
  if (!selected) select(items[0]);
  pump();
}

function pump() {
  while (!held() && running < AT_ONCE) {
    const item = items.find((each) => each.state === "waiting");
    if (!item) break;
    running += 1;
    score(item).finally(() => {
      running -= 1;
      pump();
    });
  }
  showProgress();
}

async function score(item) {
  const { signal } = session;
  const asked = settings();
  change(item, { state: "sending", asked, error: null });
  try {
    if (item.isOverlay === undefined) {
      item.thumbnail = await thumbnail(item.file, THUMBNAIL);
      item.isOverlay = !item.thumbnail; // what the browser cannot show, TIFF for one, the service draws
    }
    const map = item.isOverlay ? "overlay" : "png";
    const query = new URLSearchParams({ ...asked, map });
    const answer = await ask(`score?${query}`, {
      file: item.file,
      signal,
      waits: (seconds) => change(item, { busy: seconds }),
    });
    const { map: picture, ...result } = answer.results[0];
    item.map = mapBlob(picture);
    item.thumbnail ??= await thumbnail(item.map, THUMBNAIL);
    change(item, { state: "scored", result, model: answer.model });
    noteVersion(asked, answer.model);
  } catch (error) {
    if (signal.aborted) return;
    if (error.code === "unauthorized") {
      change(item, { state: "waiting" });
      askForKey(error.message);
    } else {
      change(item, { state: "failed", error });
    }
  }
}

function change(item, what) {
  Object.assign(item, what);
  showRow(item);
  showProgress();
  if (item === selected) showDetail(item);
}

function select(item) {
  selected = item;
  markRow(item);
  showDetail(item);
}

/** Those that "again" would score: with other settings than now, or failed for no fault of the image. */
function outdated() {
  const { model, alpha } = settings();
  const ended = items.filter((item) => item.state === "scored" || item.state === "failed");
  const stale = ended.filter((item) => item.asked.model !== model || item.asked.alpha !== alpha);
  const unlucky = ended.filter((item) => item.error && !item.error.code?.startsWith("image_"));
  return stale.length ? [stale, `Score ${count(stale.length)} again with these settings`]
    : [unlucky, `Try ${count(unlucky.length)} again`];
}

function count(images) {
  return images === 1 ? "1 image" : `${images} images`;
}

function showProgress() {
  const of = (state) => items.filter((item) => item.state === state).length;
  const [scored, failures] = [of("scored"), of("failed")];
  const anomalous = items.filter((item) => item.state === "scored" && item.result.is_anomalous).length;
  const ended = scored + failures;
  const parts = [ended < items.length ? `${ended} of ${count(items.length)} done` : `${count(items.length)} done`];
  if (scored) parts.push(`${anomalous} anomalous, ${scored - anomalous} normal`);
  if (failures) parts.push(`${failures} not scored`);
  if (ended < items.length && held()) parts.push(`waiting: ${held()}`);
  at("progress").textContent = parts.join(" · ");
  at("bar").hidden = ended === items.length;
  at("bar").value = items.length ? ended / items.length : 0;
  at("csv").disabled = !ended;
  const [again, label] = outdated();
  at("again").hidden = !again.length || Boolean(held());
  at("again").textContent = label;
  announce(ended === items.length);
}

let nextAnnouncement;

/** Screen readers hear of the progress every few seconds, not of each image. */
function announce(atOnce) {
  const speak = () => {
    nextAnnouncement = undefined;
    if (items.length && at("announcement").textContent !== at("progress").textContent) {
      at("announcement").textContent = at("progress").textContent;
    }
  };
  if (atOnce) {
    clearTimeout(nextAnnouncement);
    speak();
  } else {
    nextAnnouncement ??= setTimeout(speak, 4000);
  }
}

// Results as a file

function downloadCsv() {
  const link = make("a", { href: URL.createObjectURL(csvFile(items)), download: "hazelnut-results.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function clear() {
  session.abort();
  session = new AbortController();
  items.length = 0;
  selected = null;
  emptyList();
  hideDetail();
  at("results").hidden = true;
  at("announcement").textContent = "";
  at("choose").focus();
}

function again() {
  const [those] = outdated();
  for (const item of those) change(item, { state: "waiting", error: null });
  selected.row.focus(); // the button is gone
  pump();
}

// Events

function drop(event) {
  event.preventDefault();
  at("drop").classList.remove("over");
  const entries = [...event.dataTransfer.items].map((each) => each.webkitGetAsEntry());
  const folders = entries.filter((entry) => entry?.isDirectory).map((entry) => entry.name);
  say(at("folder"), folders.length ? `${folders.join(", ")}: a folder. Drop the images that are in it.` : "");
  add([...event.dataTransfer.files].filter((file) => !folders.includes(file.name)));
}

at("choose").addEventListener("click", () => at("files").click());
at("files").addEventListener("change", () => {
  add(at("files").files);
  at("files").value = ""; // the same file may be chosen again
});
document.addEventListener("dragover", (event) => {
  event.preventDefault(); // without this the browser would leave the page for the image
  at("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) at("drop").classList.remove("over");
});
document.addEventListener("drop", drop);
document.addEventListener("paste", (event) => add(event.clipboardData.files));
at("csv").addEventListener("click", downloadCsv);
at("clear").addEventListener("click", clear);
at("again").addEventListener("click", again);
moveByKeys(items, select);
prepareDetail();
prepareSettings({ onChange: showProgress, onSettled: pump });

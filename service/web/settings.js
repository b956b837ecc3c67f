// What images are scored with: the model, alpha, the API key.

import { at, number, say } from "./dom.js";
import { ask, modelDetails, useKey } from "./service.js";

let chosen = null; // details of the model in the menu
let keyNeeded = false;
let changed, settled;

/** Calls onChange() at every change, and onSettled() where images may be sent with what is set now. */
export function prepareSettings({ onChange, onSettled }) {
  [changed, settled] = [onChange, onSettled];
  at("model").addEventListener("change", chooseModel);
  at("alpha").addEventListener("input", () => {
    at("alpha").dataset.touched = "yes"; // from now on it stays when another model is chosen
    checkAlpha();
  });
  at("alpha").addEventListener("change", settled);
  at("key-form").addEventListener("submit", takeKey);
  at("reload").addEventListener("click", loadModels);
  loadModels();
}

export function settings() {
  return { model: at("model").value, alpha: at("alpha").valueAsNumber };
}

/** Why images have to wait; empty where they need not. */
export function held() {
  if (keyNeeded) return "a key is needed";
  if (!chosen) return "the model is not known yet";
  return alphaProblem() && "alpha has to be put right";
}

/** A newer version may have taken over since the menu was made. */
export function noteVersion({ model }, answered) {
  if (chosen?.name === model && chosen.version !== answered.version) loadModels();
}

export async function loadModels() {
  say(at("trouble"), "");
  at("reload").hidden = true;
  try {
    const { models } = await ask("models", { waits });
    const menu = at("model"), before = menu.value;
    menu.replaceChildren(...models.flatMap(modelOptions));
    menu.disabled = false;
    if ([...menu.options].some((option) => option.value === before)) menu.value = before;
    say(at("model-problem"), models.filter((model) => model.problem).map((model) => `${model.name}: ${model.problem}`).join(" "));
    await chooseModel();
  } catch (error) {
    failed(error);
  }
}

/** The version that answers by its name alone, so that a newer one takes over; older ones by NAME:VERSION. */
function modelOptions({ name, version, versions }) {
  const older = versions.filter((each) => each !== version).reverse();
  return [
    new Option(`${name}, version ${version}${older.length ? " (current)" : ""}`, name),
    ...older.map((each) => new Option(`${name}, version ${each}`, `${name}:${each}`)),
  ];
}

async function chooseModel() {
  chosen = null;
  const wanted = at("model").value, alpha = at("alpha");
  try {
    const found = await modelDetails(wanted, { waits });
    if (at("model").value !== wanted) return; // another one was chosen meanwhile
    chosen = found;
  } catch (error) {
    failed(error);
    return;
  }
  say(at("model-hint"), `Calibrated on ${chosen.calibration_images} good images.`);
  if (!alpha.dataset.touched) alpha.value = chosen.alpha;
  checkAlpha();
  settled();
}

function failed(error) {
  if (error.code === "unauthorized") {
    askForKey(error.message);
  } else {
    say(at("trouble"), error.message);
    at("reload").hidden = false;
  }
}

function waits(seconds) {
  say(at("trouble"), seconds ? `The service is not ready: trying again in ${seconds} s.` : "");
}

/** Why the alpha in its field will not do; empty where it does. */
function alphaProblem() {
  if (!chosen) return "";
  const alpha = at("alpha").valueAsNumber, smallest = Math.ceil(chosen.smallest_alpha * 1e5) / 1e5;
  const images = `${chosen.calibration_images} good images`;
  if (Number.isNaN(alpha)) return `Alpha is a number from ${smallest} up to, but not including, 1.`;
  if (alpha >= 1) return `Alpha is ${alpha}: it is a share of good parts, below 1.`;
  if (alpha >= chosen.smallest_alpha) return "";
  return `Alpha is ${alpha}: the smallest for this model is ${smallest}. Its calibration has ${images}, ` +
    `and the least share that they can tell is 1 in ${chosen.calibration_images + 1}.`;
}

function checkAlpha() {
  const problem = alphaProblem();
  at("alpha").setAttribute("aria-invalid", String(Boolean(problem)));
  at("alpha-problem").textContent = problem;
  const flagged = number(100 * at("alpha").valueAsNumber);
  say(at("alpha-hint"), chosen && !problem ? `Flags about ${flagged} in 100 good parts.` : "");
  changed();
}

export function askForKey(message) {
  if (keyNeeded) return;
  keyNeeded = true;
  at("key-form").hidden = false;
  const refused = at("key").value ? message : "This service answers those who have a key."; // its own words are for programs
  say(at("key-hint"), `${refused} The page keeps the key until it is closed or reloaded.`);
  at("key").focus();
}

function takeKey(event) {
  event.preventDefault();
  const key = at("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    say(at("key-hint"), "A key is letters, digits, dashes and underscores.");
    return;
  }
  useKey(key);
  keyNeeded = false;
  at("key-form").hidden = true;
  loadModels();
}

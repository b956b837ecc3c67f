// Talking with the service. The key stays in this module's memory: a reload forgets it.

const TRIES = 10;
const LONGEST_WAIT = 60; // seconds

let key = "";

export function useKey(value) {
  key = value;
}

const models = new Map(); // details by NAME:VERSION

/** Details of NAME or NAME:VERSION, as they are now. */
export async function modelDetails(name, options) {
  const found = await ask(`models/${encodeURIComponent(name)}`, options);
  models.set(`${found.name}:${found.version}`, found);
  return found;
}

/** Details of the model behind an answer. */
export async function modelOf({ name, version, sha256 }) {
  const key = `${name}:${version}`, known = models.get(key);
  return known?.sha256 === sha256 ? known : modelDetails(key);
}

/** What went wrong, in the service's words where it has said any. */
export class Refusal extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}

/** GET, or POST of a file. A service that is busy is asked again when it says so; `waits(seconds)` tells the caller. */
export async function ask(path, { file, signal, waits = () => {} } = {}) {
  for (let tries = 1; ; tries++) {
    const response = await send(path, file, signal);
    if (response.ok) return readJson(response);
    const seconds = retryAfter(response);
    if (seconds === null || tries === TRIES) throw await refusal(response);
    waits(seconds);
    await pause(seconds, signal);
    waits(0);
  }
}

async function send(path, file, signal) {
  const headers = key ? { "X-API-Key": key } : {};
  // A lone image costs the service less as a body than in a form. Its kind is read from its bytes, whatever this says.
  if (file) headers["Content-Type"] = file.type.startsWith("image/") ? file.type : "image/unknown";
  try {
    return await fetch(path, { method: file ? "POST" : "GET", body: file, headers, signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    const changed = file ? ", or the file has changed since it was chosen" : "";
    throw new Refusal(`The service cannot be reached${changed}.`, "unreachable");
  }
}

async function readJson(response) {
  try {
    return await response.json();
  } catch {
    throw new Refusal("The service's answer broke off.", "unreachable");
  }
}

/** Seconds until the next try; null where the service has named none. */
function retryAfter(response) {
  const value = response.headers.get("Retry-After");
  if (![429, 503].includes(response.status) || value === null) return null;
  const seconds = Number.isNaN(Number(value)) ? (Date.parse(value) - Date.now()) / 1000 : Number(value);
  return Math.min(Math.max(seconds || 1, 0.5), LONGEST_WAIT);
}

async function refusal(response) {
  try {
    const { error } = await response.json();
    return new Refusal(error.message, error.code);
  } catch {
    // Not the service's own shape: something in front of it has answered.
    return new Refusal(`The answer was ${response.status} ${response.statusText}.`, `http_${response.status}`);
  }
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

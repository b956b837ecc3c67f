// The results as a CSV file for spreadsheets.

const NUMBERS = ["anomaly_score", "p_value", "width", "height"];
const SCORES = ["reconstruction", "latent", "anomaly_map"];
const COLUMNS = ["file", "verdict", ...NUMBERS, ...SCORES, "regions", "model", "version", "alpha", "error", "message"];

/** One line for each image that was scored or failed. */
export function csvFile(items) {
  const lines = items.filter((item) => item.state === "scored" || item.state === "failed").map(line);
  // The byte order mark tells Excel that it is UTF-8.
  return new Blob(["\ufeff", [COLUMNS.join(","), ...lines, ""].join("\r\n")], { type: "text/csv" });
}

function line({ file, result, model, error }) {
  const cells = { file: text(file.name), error: text(error?.code), message: text(error?.message) };
  if (result && !error) {
    for (const name of NUMBERS) cells[name] = result[name];
    for (const name of SCORES) cells[name] = result.scores[name];
    cells.verdict = result.is_anomalous ? "anomalous" : "normal";
    cells.regions = result.regions.length;
    Object.assign(cells, { model: text(model.name), version: model.version, alpha: model.alpha });
  }
  return COLUMNS.map((name) => cells[name] ?? "").join(",");
}

/** Quoted; and where a spreadsheet would take it for a formula, with an apostrophe in front: names are anybody's. */
function text(value) {
  if (!value) return "";
  const safe = /^[\s\0]*[=+\-@\t\r\n＝＋－＠]/.test(value) ? `'${value}` : value;
  return `"${safe.replaceAll('"', '""')}"`;
}

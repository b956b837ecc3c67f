// Pictures: the part with its map over it, the map alone, thumbnails.

import { draw } from "./dom.js";

// As in models/overlay.py: dark red to yellow, lighter where the map is higher, so that it reads without colour vision.
const HEAT = [[90, 0, 20], [200, 20, 30], [250, 130, 20], [255, 240, 120]];
const COLD = [[16, 18, 24], ...HEAT];

function colourAt(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const index = Math.min(Math.floor(place), stops.length - 2);
  return stops[index].map((low, channel) => low + (stops[index + 1][channel] - low) * (place - index));
}

/** For each gray level of map=png, where 255 is twice the map's level: red, green, blue, opacity. */
function palette(colour) {
  return Array.from({ length: 256 }, (_, gray) => colour(gray / 255));
}

// Nothing below three quarters of the level, full colour at twice it.
const OVER = palette((share) => {
  const heat = Math.max((2 * share - 0.75) / 1.25, 0);
  return [...colourAt(HEAT, heat), 255 * Math.min(4 * heat, 1)];
});
const ALONE = palette((share) => [...colourAt(COLD, share), 255]);

export function drawLegend(canvas) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(256, 1);
  ALONE.forEach((colour, gray) => image.data.set(colour, 4 * gray));
  context.putImageData(image, 0, 0);
}

/** A gray map as two canvases: one to lie over the picture, one to be seen alone. */
export async function mapCanvases(blob) {
  const gray = await grayPixels(blob);
  return { over: coloured(gray, OVER), alone: coloured(gray, ALONE) };
}

async function grayPixels(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const { width, height } = bitmap;
  const context = sized(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

function coloured(gray, colours) {
  const canvas = sized(gray.width, gray.height);
  const context = canvas.getContext("2d");
  const image = context.createImageData(gray.width, gray.height);
  for (let at = 0; at < image.data.length; at += 4) image.data.set(colours[gray.data[at]], at);
  context.putImageData(image, 0, 0);
  return canvas;
}

function sized(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

/** The map of an answer. A blob, unlike base64, need not stay in the page's own memory. */
export function mapBlob(map) {
  const bytes = Uint8Array.from(atob(map.data), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}

/** An <img> of a blob, loaded; null where the browser cannot show it. */
export async function shownImage(blob, alt) {
  const image = new Image();
  image.alt = alt;
  image.src = URL.createObjectURL(blob);
  try {
    await image.decode();
    return image;
  } catch {
    return null;
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

/** Frames around regions, in pixels of the image, with numbers where there are several. */
export function regionFrames(regions, width, height) {
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }); // the table says the same
  const size = 0.05 * Math.max(width, height);
  regions.forEach(({ left, top, ...extent }, index) => {
    const place = { x: left, y: top, width: extent.width, height: extent.height };
    svg.append(draw("rect", { class: "halo", ...place }), draw("rect", { class: "frame", ...place }));
    if (regions.length === 1) return;
    const y = top > 1.2 * size ? top - 0.25 * size : top + extent.height + size;
    svg.append(draw("text", { text: index + 1, x: Math.min(left, width - size), y, "font-size": size }));
  });
  return svg;
}

/** A small square canvas of an image's middle; null where the browser cannot show the image. */
export async function thumbnail(blob, size) {
  try {
    const bitmap = await createImageBitmap(blob);
    const side = Math.min(bitmap.width, bitmap.height);
    const canvas = sized(size, size);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, size, size);
    bitmap.close();
    return canvas;
  } catch {
    return null;
  }
}

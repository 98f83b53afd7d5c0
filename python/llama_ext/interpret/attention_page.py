"""The page on which patterns of attention are looked at."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np

from llama_ext._arrays import FloatArray
from llama_ext.interpret.pages import as_json, label, page, shown_text

__all__ = ["attention_page"]

_STYLE = """
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; align-items: center; margin-bottom: .75rem; }
select { font: inherit; padding: .15rem .4rem; }
#heads { display: flex; flex-wrap: wrap; gap: .35rem; margin: 0 0 1rem; }
#heads button { padding: 2px; border: 2px solid var(--line); background: none; border-radius: 4px; cursor: pointer; line-height: 0; }
#heads button[aria-pressed=true] { border-color: var(--mark); }
#heads canvas { width: 48px; height: 48px; image-rendering: pixelated; }
#text { margin: 0 0 1rem; line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere; }
#text span { display: inline-block; max-width: 100%; border: 1px solid var(--line); border-radius: 3px; padding: .1rem .15rem; margin-right: 2px; cursor: default; }
#text span.query { border-color: var(--mark); border-width: 2px; }
#said { min-height: 1.5em; font-weight: 600; }
#map { display: block; max-width: 100%; }
"""

_BODY = """<p>{count} tokens. A row is a token that looks back, a column what it looks at; darker (on dark: brighter) is more. Point at the map
or at a token of the text. Arrow keys go through heads and layers. Where a map has fewer pixels than cells, a pixel is the largest of its
cells.<span id="blocks"></span></p>
<div class="controls">
<label>Layer <select id="layer"></select></label>
<label>Head <select id="head"></select></label>
</div>
<div id="heads" aria-label="Heads of this layer"></div>
<div id="text" class="token"></div>
<div id="said" role="status">&nbsp;</div>
<canvas id="map" role="img" aria-label="Attention of one head"></canvas>"""

# Of each head the rows of the triangle, one after the other, as 16-bit shares of one.
_SCRIPT = """
"use strict";
const data = @DATA@;
const tokens = data.tokens, count = tokens.length, triangle = count * (count + 1) / 2;
const weights = (() => {
  const bytes = Uint8Array.from(atob(data.weights), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer), all = new Uint16Array(bytes.length / 2);
  for (let i = 0; i < all.length; i++) all[i] = view.getUint16(2 * i, true);
  return all;
})();
const find = (id) => document.getElementById(id);
const layerBox = find("layer"), headBox = find("head"), map = find("map"), text = find("text"), said = find("said");
const MOST_PIXELS = 4096;  // of a side of a canvas: some browsers draw no larger one
let query = -1, key = -1;

function weightAt(layer, head, row, column) {
  if (column > row) return 0;
  if (head === data.heads) {
    let sum = 0;
    for (let h = 0; h < data.heads; h++) sum += weightAt(layer, h, row, column);
    return sum / data.heads;
  }
  return weights[(layer * data.heads + head) * triangle + row * (row + 1) / 2 + column] / 65535;
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const rgb = (name) => {
    const hex = style.getPropertyValue(name).trim().slice(1);
    const full = hex.length === 3 ? [...hex].map((c) => c + c).join("") : hex;
    return [0, 2, 4].map((at) => parseInt(full.slice(at, at + 2), 16));
  };
  return { ground: rgb("--ground"), accent: rgb("--accent"), ink: style.getPropertyValue("--ink"),
           faint: style.getPropertyValue("--faint"), line: style.getPropertyValue("--line"), mark: style.getPropertyValue("--mark") };
}

// A picture with a pixel for each block of `step` by `step` cells: the largest of them, so that no cell is lost.
function picture(layer, head, step, palette) {
  const side = Math.ceil(count / step), largest = new Float32Array(side * side), image = new ImageData(side, side);
  for (let row = 0; row < count; row++) {
    const begin = Math.floor(row / step) * side;
    for (let column = 0; column <= row; column++) {
      const at = begin + Math.floor(column / step), weight = weightAt(layer, head, row, column);
      if (weight > largest[at]) largest[at] = weight;
    }
  }
  for (let row = 0; row < side; row++)
    for (let column = 0; column <= row; column++) {
      const at = row * side + column, share = Math.sqrt(largest[at]);  // small weights would not be seen otherwise
      for (let i = 0; i < 3; i++) image.data[4 * at + i] = Math.round(palette.ground[i] + (palette.accent[i] - palette.ground[i]) * share);
      image.data[4 * at + 3] = 255;
    }
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

let painted = null, paintedAs = "";
function paintedMap(layer, head, step, palette) {  // once, however often the pointer moves
  const as = [layer, head, step, palette.ground].join();
  if (as !== paintedAs) [painted, paintedAs] = [picture(layer, head, step, palette), as];
  return painted;
}

const layout = { left: 0, top: 0, cell: 0 };
function draw() {
  const palette = colours(), layer = +layerBox.value, head = +headBox.value;
  const wanted = Math.max(4, Math.min(26, Math.floor(900 / count))), named = wanted >= 10;
  const short = (token) => ([...token].length > 14 ? [...token].slice(0, 13).join("") + "\\u2026" : token);
  const longest = named ? Math.max(...tokens.map((token) => short(token).length)) : 0;
  // Whole pixels of the screen for a cell, or, where there are not enough, a pixel for a block of cells.
  const dense = window.devicePixelRatio || 1, margin = Math.ceil((named ? Math.min(130, 14 + 8 * longest) : 4) * dense) / dense;
  const room = MOST_PIXELS - Math.ceil((margin + 4) * dense), step = Math.ceil(count / room);
  const pixels = step > 1 ? 1 : Math.max(1, Math.min(Math.round(wanted * dense), Math.floor(room / count)));
  const cell = pixels / (step * dense), extent = Math.ceil(count / step) * pixels / dense;
  Object.assign(layout, { left: margin, top: margin, cell });
  const size = margin + extent + 4;
  map.width = map.height = Math.floor(size * dense);
  map.style.width = size + "px";
  find("blocks").textContent = step > 1 ? ` Here a pixel of the large map is ${step} by ${step} cells.` : "";
  const context = map.getContext("2d");
  context.scale(dense, dense);
  context.clearRect(0, 0, size, size);
  context.imageSmoothingEnabled = false;
  context.drawImage(paintedMap(layer, head, step, palette), margin, margin, extent, extent);
  context.strokeStyle = palette.line;
  context.strokeRect(margin - .5, margin - .5, extent + 1, extent + 1);
  if (named) {
    context.font = Math.min(13, cell) + "px ui-monospace, monospace";
    context.textBaseline = "middle";
    for (let i = 0; i < count; i++) {
      context.fillStyle = i === query || i === key ? palette.mark : palette.faint;
      context.textAlign = "right";
      context.fillText(short(tokens[i]), margin - 4, margin + (i + .5) * cell);
      context.save();
      context.translate(margin + (i + .5) * cell, margin - 4);
      context.rotate(-Math.PI / 2);
      context.textAlign = "left";
      context.fillText(short(tokens[i]), 0, 0);
      context.restore();
    }
  }
  if (query >= 0 && key >= 0) {
    context.strokeStyle = palette.mark;
    context.lineWidth = 2;
    const frame = Math.max(cell, 3);
    context.strokeRect(margin + key * cell, margin + query * cell, frame, frame);
  }
  [...text.children].forEach((span, i) => {
    const share = query >= 0 ? weightAt(layer, head, query, i) : 0;
    span.style.background = share > 0 ? `color-mix(in srgb, var(--accent) ${(75 * Math.sqrt(share)).toFixed(1)}%, transparent)` : "";
    span.classList.toggle("query", i === query);
  });
  said.textContent = query >= 0 && key >= 0
    ? `"${tokens[query]}" (${query}) looks at "${tokens[key]}" (${key}): ${weightAt(layer, head, query, key).toFixed(4)}`
    : "\\u00a0";
}

function thumbnails() {
  const heads = find("heads"), palette = colours(), layer = +layerBox.value;
  heads.replaceChildren();
  for (let head = 0; head <= data.heads; head++) {
    const button = document.createElement("button");
    button.title = head === data.heads ? "Mean of the heads" : "Head " + head;
    button.setAttribute("aria-label", button.title);
    button.setAttribute("aria-pressed", head === +headBox.value);
    button.onclick = () => { headBox.value = head; choose(); };
    button.append(picture(layer, head, Math.ceil(count / 48), palette));
    heads.append(button);
  }
}

function choose() {
  [...find("heads").children].forEach((button, head) => button.setAttribute("aria-pressed", head === +headBox.value));
  draw();
}

function strongest(row) {
  let best = 0;
  for (let column = 1; column <= row; column++)
    if (weightAt(+layerBox.value, +headBox.value, row, column) > weightAt(+layerBox.value, +headBox.value, row, best)) best = column;
  return best;
}

data.layers.forEach((layer, i) => layerBox.add(new Option(layer, i)));
for (let head = 0; head < data.heads; head++) headBox.add(new Option(head, head));
headBox.add(new Option("mean", data.heads));
tokens.forEach((token, i) => {
  const span = document.createElement("span");
  span.textContent = token;
  span.onpointerenter = () => { query = i; key = strongest(i); draw(); };
  text.append(span);
});
layerBox.onchange = () => { thumbnails(); draw(); };
headBox.onchange = choose;
map.onpointermove = (event) => {
  const scale = map.clientWidth / parseFloat(map.style.width);
  const column = Math.floor((event.offsetX / scale - layout.left) / layout.cell), row = Math.floor((event.offsetY / scale - layout.top) / layout.cell);
  const inside = row >= 0 && column >= 0 && row < count && column <= row;
  const [toQuery, toKey] = inside ? [row, column] : [-1, -1];
  if (toQuery === query && toKey === key) return;
  [query, key] = [toQuery, toKey];
  draw();
};
document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "SELECT") return;
  const step = { ArrowLeft: [headBox, -1], ArrowRight: [headBox, 1], ArrowUp: [layerBox, -1], ArrowDown: [layerBox, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  const [box, by] = step;
  box.selectedIndex = (box.selectedIndex + by + box.length) % box.length;
  box.onchange();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { thumbnails(); draw(); });
thumbnails();
draw();
"""


def attention_page(patterns: FloatArray, layers: Sequence[int], tokens: Sequence[str], text: str = "") -> str:
    """A page of HTML.

    Args:
        patterns: (L, H, T, T), causal.
        layers: The number of each of the L.
        tokens: The T tokens.
        text: What they say together; empty: one after the other.
    """
    rows, columns = np.tril_indices(len(tokens))
    shares = np.rint(np.clip(patterns[:, :, rows, columns], 0, 1) * 65535).astype("<u2")
    data = {
        "tokens": [shown_text(token) for token in tokens],
        "layers": list(layers),
        "heads": patterns.shape[1],
        "weights": base64.b64encode(shares.tobytes()).decode("ascii"),
    }
    script = _SCRIPT.replace("@DATA@", as_json(data))
    return page(f"Attention: {label(text or tokens)}", _BODY.format(count=len(tokens)), _STYLE, script)

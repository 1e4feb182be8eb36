"use strict";
// Letters as in pack.py: T tokens shown, H heads, K reads of a head, D slots with details, R contexts of a slot.
const data = JSON.parse(document.getElementById("data").textContent);
const NONE = 0xffffffff;
const KINDS = {u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i1: Int8Array, i2: Int16Array};
const array = (text, kind) => new KINDS[kind](Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
const $ = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en-US");
const percent = (share) => `${share >= 0.0995 || share === 0 ? (100 * share).toFixed(0) : Number((100 * share).toPrecision(2))} %`;

const tokens = array(data.tokens, "u4"), starts = array(data.starts, "u4");
const memories = data.memories.map((memory) => {
  const {details, reads, other} = memory;
  const slots = array(details.slots, "u4");
  return {
    ...memory,
    readSlots: array(reads.slots, "u4"), readWeights: array(reads.weights, "u2"),
    levels: array(memory.map.levels, "u1"), block: memory.map.block,
    detail: new Map(Array.from(slots, (slot, row) => [slot, row])), detailed: slots,
    counts: array(details.counts, "u4"), words: array(details.words, "u4"), scores: array(details.scores, "i2"),
    contexts: array(details.contexts, "u4"), contextWeights: array(details.contextWeights, "u2"),
    contextHeads: array(details.contextHeads, "u1"),
    types: array(details.types, "u4"), typeReads: array(details.typeReads, "u2"),
    other: other && {
      ...other, counts: array(other.counts, "u4"), cosine: array(other.cosine, "i1"),
      overlap: array(other.overlap, "u1"), levels: array(other.levels, "u1"),
    },
  };
});
const state = {memory: memories[0], head: -1, token: 0, slot: -1, cell: 0};

// Elements, by text alone: nothing of the text is ever read as HTML.
function element(name, content, attributes = {}) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") made.onclick = value; else made.setAttribute(key, value);
  }
  for (const part of [content].flat()) if (part !== null && part !== undefined) made.append(part);
  return made;
}
const visible = (text) => text.replaceAll("\r", "␍").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ +| +$/g, (blank) => "␣".repeat(blank.length));
const word = (place) => element("span", place === NONE ? "?" : visible(data.strings[place]) || "∅", {class: "word"});
const table = (heads, rows) => element("table", [
  element("thead", element("tr", heads.map((head) => element("th", head, {scope: "col", ...(head === "nearest words" || head === "weight" ? {class: "words"} : {})})))),
  element("tbody", rows),
]);
const slotName = (memory, slot) => memory.flat ? number(slot) : `${number(slot)} = (${Math.floor(slot / memory.subkeys)}, ${slot % memory.subkeys})`;
const slotButton = (slot) => element("td", element("button", number(slot), {type: "button", onclick: () => openSlot(slot, true)}), {class: "slot"});
const bar = (weight) => element("i", null, {class: "bar", style: `inline-size:${(5 * weight).toFixed(2)}rem`});
const total = (memory, row) => memory.counts.subarray(row * memory.heads, (row + 1) * memory.heads).reduce((sum, one) => sum + one, 0);
const nearest = (memory, row, most) => {
  const width = memory.detailed.length ? memory.words.length / memory.detailed.length : 0;
  return Array.from(memory.words.subarray(row * width, row * width + Math.min(most, width)), (place, rank) => [place, memory.scores[row * width + rank] / 32767 * memory.details.scale]);
};

// Text.
const spans = [];
function drawText() {
  const box = $("text");
  for (let place = 0; place < data.shown; place += 1) {
    if (starts.includes(place) && place > 0) box.append(element("hr", null, {"aria-hidden": "true"}));
    const text = data.strings[tokens[place]];
    const parts = text.split(/(\n)/).flatMap((part) => part === "\n" ? [element("i", "⏎", {class: "mark"}), "\n"] : part);
    const made = element("span", text === "" ? element("i", "∅", {class: "mark"}) : parts, {role: "option", "aria-selected": "false", tabindex: place ? -1 : 0});
    made.onclick = () => chooseToken(place, true);
    spans.push(made);
    box.append(made);
  }
  box.addEventListener("keydown", (event) => {
    const steps = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: lineStep(-1), ArrowDown: lineStep(1), Home: -state.token, End: spans.length - 1 - state.token, PageUp: -60, PageDown: 60};
    if (event.key in steps && !event.ctrlKey && !event.metaKey && !event.altKey) {
      chooseToken(Math.min(spans.length - 1, Math.max(0, state.token + steps[event.key])), true);
      event.preventDefault();
    } else if (event.key === "Enter" || event.key === " ") {
      $("token-body").querySelector("button")?.focus();
      event.preventDefault();
    }
  });
}
function lineStep(direction) {
  const here = spans[state.token].getBoundingClientRect();
  for (let step = direction, best = null; ; step += direction) {
    const next = spans[state.token + step];
    const there = next?.getBoundingClientRect();
    const distance = next && Math.abs(there.left - here.left);
    const isOther = next && Math.abs(there.top - here.top) > 4;
    if (!next || (best !== null && (distance > best.distance || Math.abs(there.top - best.top) > 4))) return best?.step ?? 0;
    if (isOther) best = {step, distance, top: there.top};
  }
}
function chooseToken(place, focuses) {
  const before = spans[state.token];
  before.setAttribute("aria-selected", "false");
  before.tabIndex = -1;
  state.token = place;
  const now = spans[place];
  now.setAttribute("aria-selected", "true");
  now.tabIndex = 0;
  if (focuses) now.focus();
  drawToken();
}
function readsOf(memory, place) {
  const {heads, shownTopk: topk} = memory, found = [];
  for (let head = 0; head < heads; head += 1) {
    if (state.head >= 0 && state.head !== head) continue;
    for (let rank = 0; rank < topk; rank += 1) {
      const at = (place * heads + head) * topk + rank;
      found.push({head, slot: memory.readSlots[at], weight: memory.readWeights[at] / 65535});
    }
  }
  return found;
}
function drawToken() {
  const memory = state.memory, place = state.token;
  $("token-title").replaceChildren("Token ", word(tokens[place]));
  const notes = [`Token ${number(place + 1)} of the text.`];
  if (memory.shownTopk < memory.topk) notes.push(`The best ${memory.shownTopk} of the ${memory.topk} slots of each head are shown.`);
  if (memory.other) notes.push(`${data.names[1]} reads ${percent(memory.other.overlap[place] / 255)} of these slots, too.`);
  const rows = readsOf(memory, place).map(({head, slot, weight}) => {
    const row = memory.detail.get(slot);
    return element("tr", [
      element("td", number(head + 1)), slotButton(slot),
      element("td", [weight.toFixed(3), bar(weight)], {class: "weight"}),
      element("td", row === undefined ? "–" : number(total(memory, row))),
      element("td", row === undefined ? "" : nearest(memory, row, 3).flatMap(([one]) => [word(one), " "]), {class: "words"}),
    ], slot === state.slot ? {class: "here"} : {});
  });
  $("token-body").replaceChildren(
    element("p", notes.join(" "), {class: "note"}),
    element("div", table(["head", "slot", "weight", "reads", "nearest words"], rows), {class: "scroll"}),
  );
}

// Slot.
function openSlot(slot, focuses) {
  state.slot = slot;
  history.replaceState(null, "", `#${memories.indexOf(state.memory)}:${slot}`);
  drawSlot();
  drawToken();
  markReaders();
  if (focuses) $("slot-title").focus();
}
function markReaders() {
  const memory = state.memory, width = memory.heads * memory.shownTopk;
  spans.forEach((one) => { one.classList.remove("reads"); one.removeAttribute("title"); });
  for (let at = 0; state.slot >= 0 && at < data.shown * width; at += 1) {
    const head = Math.floor(at / memory.shownTopk) % memory.heads;
    if (memory.readSlots[at] !== state.slot || (state.head >= 0 && state.head !== head)) continue;
    const one = spans[Math.floor(at / width)], weight = memory.readWeights[at] / 65535;
    if (one.classList.contains("reads") && Number(one.style.getPropertyValue("--weight")) >= weight) continue;
    one.classList.add("reads");
    one.style.setProperty("--weight", weight.toFixed(3));
    one.title = `reads slot ${number(state.slot)} with weight ${weight.toFixed(3)}`;
  }
}
function context(place) {
  let begin = place - 12, end = place + 7;
  for (const start of starts) {
    if (start <= place) begin = Math.max(begin, start);
    else { end = Math.min(end, start); break; }
  }
  const texts = (from, to) => Array.from(tokens.subarray(Math.max(0, from), to), (one) => visible(data.strings[one]).replaceAll("␣", " ")).join("");
  return [texts(begin, place), element("b", visible(data.strings[tokens[place]]) || "∅"), texts(place + 1, end)];
}
function drawSlot() {
  const memory = state.memory, slot = state.slot, body = $("slot-body");
  if (slot < 0) {
    $("slot-title").textContent = "Slot";
    body.replaceChildren(element("p", "Open one from the token's list, from the map, or by its number.", {class: "note"}));
    return;
  }
  $("slot-title").textContent = `Slot ${slotName(memory, slot)}`;
  const row = memory.detail.get(slot);
  if (row === undefined) {
    const level = memory.levels[cellOf(memory, slot)];
    const what = level === 0 ? "No token of the text read it: it is dead here."
      : memory.block > 1 ? "This page has no details of it." : `Read ${reads(level)}. This page has no details of it: only of ${number(memory.detailed.length)} slots.`;
    body.replaceChildren(element("p", what, {class: "note"}));
    return;
  }
  const all = total(memory, row), heads = Array.from({length: memory.heads}, (_, head) => memory.counts[row * memory.heads + head]);
  const parts = [element("p", `Read ${number(all)} times, ${percent(all / memory.allReads)} of all reads: ${heads.map((one, head) => `head ${head + 1}: ${number(one)}`).join(", ")}.`)];
  if (memory.other) {
    const count = memory.other.counts[row];
    parts.push(element("p", `In ${data.names[1]}: read ${number(count)} times; the cosine of the two values is ${(memory.other.cosine[row] / 127).toFixed(2)}.`));
  }
  const words = nearest(memory, row, 99);
  if (words.length) parts.push(element("h3", "Nearest words"), element("ul", words.map(([place, score]) => element("li", [word(place), " ", element("small", score.toFixed(2))])), {class: "words-list"}));
  const types = Array.from(memory.types.subarray(row * 5, row * 5 + 5), (place, rank) => [place, memory.typeReads[row * 5 + rank]]).filter(([place]) => place !== NONE);
  if (types.length) parts.push(element("h3", "Top tokens"), element("ul", types.map(([place, count]) => element("li", [word(place), " ", element("small", `${number(count)} ×`)])), {class: "words-list"}));
  const width = memory.contexts.length / memory.detailed.length, items = [];
  for (let rank = 0; rank < width; rank += 1) {
    const at = row * width + rank, place = memory.contexts[at];
    if (place === NONE) continue;
    const about = [`weight ${(memory.contextWeights[at] / 65535).toFixed(3)}, head ${memory.contextHeads[at] + 1}, token ${number(place + 1)} `];
    if (place < data.shown) about.push(element("button", "in the text", {type: "button", onclick: () => { chooseToken(place, true); }}));
    items.push(element("li", [...context(place), element("small", about)]));
  }
  parts.push(element("h3", "Strongest reads"), element("ul", items, {class: "contexts"}));
  body.replaceChildren(...parts);
}

// Map.
const side = (memory) => Math.ceil(memory.subkeys / memory.block);
const cellOf = (memory, slot) => Math.floor(Math.floor(slot / memory.subkeys) / memory.block) * side(memory) + Math.floor((slot % memory.subkeys) / memory.block);
const reads = (level) => level === 0 ? "never" : level === 1 ? "once" : `${number(2 ** (level - 1))} to ${number(2 ** level - 1)} times`;
const shade = (share) => {
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  return share === 0 ? (isDark ? [22, 23, 25] : [253, 253, 251]) : isDark
    ? [40 + 190 * share, 62 + 172 * share, 92 + 158 * share] : [205 - 195 * share, 220 - 182 * share, 236 - 156 * share];
};
const diverging = (share) => {
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches, rest = isDark ? 30 : 245, far = share < 0 ? [213, 94, 0] : [0, 114, 178];
  return far.map((one) => rest + (one - rest) * Math.min(1, Math.abs(share) * 1.6));
};
function drawMap() {
  const memory = state.memory, width = side(memory), canvas = $("map"), what = $("map-what")?.value ?? "this";
  canvas.width = canvas.height = width;
  const brush = canvas.getContext("2d"), image = brush.createImageData(width, width);
  const levels = what === "other" ? memory.other.levels : memory.levels;
  const top = Math.max(1, ...[memory.levels, memory.other?.levels].filter(Boolean).map((one) => one.reduce((most, level) => Math.max(most, level), 0)));
  for (let cell = 0; cell < width * width; cell += 1) {
    const colour = what === "difference" ? diverging((memory.levels[cell] - memory.other.levels[cell]) / top) : shade(levels[cell] / top);
    image.data.set([...colour, 255], 4 * cell);
  }
  brush.putImageData(image, 0, 0);
  const swatch = (colour, text) => element("span", [element("i", null, {style: `background:rgb(${colour})`}), text]);
  $("legend").replaceChildren(...(what === "difference"
    ? [swatch(diverging(1), `read more in ${data.names[0]}`), swatch(diverging(0), "alike"), swatch(diverging(-1), `read more in ${data.names[1]}`)]
    : Array.from({length: top + 1}, (_, level) => swatch(shade(level / top), reads(level)))));
  $("map-note").textContent = `${number(memory.slots)} slots of ${memory.name}, ${number(memory.read)} of them read, ${number(memory.slots - memory.read)} dead. `
    + (memory.flat ? "Slots by number, row by row. " : `Row: sub-key of the first codebook; column: of the second (${memory.subkeys} each). `)
    + (memory.block > 1 ? `A cell stands for ${memory.block} × ${memory.block} slots and shows their mean. ` : "A cell is a slot. ")
    + "Click a cell, or move with the arrow keys and open it with Enter.";
  const histogram = new Map();
  memory.levels.forEach((level) => histogram.set(level, (histogram.get(level) ?? 0) + 1));
  const most = Math.max(...histogram.values());
  $("histogram").replaceChildren(table(["read", memory.block > 1 ? "cells" : "slots", ""], [...histogram].sort(([one], [other]) => one - other).map(([level, count]) =>
    element("tr", [element("th", reads(level), {scope: "row"}), element("td", number(count)), element("td", bar(2.5 * count / most), {class: "weight"})]))));
  const order = Array.from(memory.detailed, (slot, row) => [slot, row, total(memory, row)]).sort((one, other) => other[2] - one[2]);
  const line = ([slot, row, count]) => element("tr", [slotButton(slot), element("td", number(count)), ...(memory.other ? [element("td", number(memory.other.counts[row]))] : []),
    element("td", nearest(memory, row, 5).flatMap(([place]) => [word(place), " "]), {class: "words"})]);
  const heads = ["slot", "reads", ...(memory.other ? [`in ${data.names[1]}`] : []), "nearest words"];
  $("most").replaceChildren(table(heads, order.slice(0, 12).map(line)));
  if (memory.other) {
    const apart = ([, row, count]) => -Math.abs(Math.log2(count + 1) - Math.log2(memory.other.counts[row] + 1));
    $("differ").replaceChildren(table(heads, order.filter((one) => apart(one) < 0).sort((one, other) => apart(one) - apart(other)).slice(0, 12).map(line)));
  }
  $("way").textContent = memory.way;
  $("sample").textContent = `Details (words, top tokens, strongest reads) are there for ${number(memory.detailed.length)} of the ${number(memory.read)} slots that were read`
    + `${memory.detailed.length < memory.read ? ": the most used ones, and those that the text shown reads" : ""}; top tokens are those of ${number(memory.details.sampled)} tokens.`;
  sayCell();
}
function sayCell() {
  const memory = state.memory, width = side(memory);
  const first = Math.floor(state.cell / width) * memory.block * memory.subkeys + (state.cell % width) * memory.block;
  const row = memory.block === 1 ? memory.detail.get(first) : undefined;
  const others = memory.other ? `; in ${data.names[1]} ${reads(memory.other.levels[state.cell])}` : "";
  const often = row === undefined ? reads(memory.levels[state.cell]) : `${number(total(memory, row))} times`;
  const cell = 100 / width;
  $("cursor").style.cssText = `left:${(state.cell % width) * cell}%;top:${Math.floor(state.cell / width) * cell}%;width:${cell}%;height:${cell}%`;
  $("map-said").textContent = `${memory.block > 1 ? "Slots from" : "Slot"} ${slotName(memory, first)}: read ${often}${others}.`;
  return first;
}
function pointed(event) {
  const box = $("map").getBoundingClientRect(), width = side(state.memory);
  const at = (value, from, size) => Math.min(width - 1, Math.max(0, Math.floor((value - from) / size * width)));
  state.cell = at(event.clientY, box.top, box.height) * width + at(event.clientX, box.left, box.width);
}
$("map").addEventListener("pointermove", (event) => { pointed(event); sayCell(); });
$("map").addEventListener("click", (event) => { pointed(event); openSlot(sayCell(), false); $("slot-panel").scrollIntoView({block: "nearest"}); });
$("map").addEventListener("keydown", (event) => {
  const width = side(state.memory), row = Math.floor(state.cell / width), column = state.cell % width;
  const moves = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
  if (event.key in moves) {
    const [down, right] = moves[event.key], within = (value) => Math.min(width - 1, Math.max(0, value));
    state.cell = within(row + down) * width + within(column + right);
    sayCell();
  } else if (event.key === "Enter") openSlot(sayCell(), true);
  else return;
  event.preventDefault();
});

// What stands above.
function drawMemory() {
  const memory = state.memory;
  $("head").replaceChildren(element("option", `all ${memory.heads}`, {value: "-1"}), ...Array.from({length: memory.heads}, (_, head) => element("option", String(head + 1), {value: String(head)})));
  $("head").value = String(state.head = -1);
  state.cell = 0;
  drawSlot();
  drawToken();
  drawMap();
  markReaders();
}
$("memory").addEventListener("change", () => { state.memory = memories[$("memory").value]; state.slot = -1; drawMemory(); });
$("head").addEventListener("change", () => { state.head = Number($("head").value); drawToken(); markReaders(); });
$("map-what")?.addEventListener("change", drawMap);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
$("go").addEventListener("submit", (event) => {
  event.preventDefault();
  const slot = Number($("slot").value.replaceAll(",", "").trim());
  const isSlot = $("slot").value.trim() !== "" && Number.isInteger(slot) && slot >= 0 && slot < state.memory.slots;
  $("slot").setCustomValidity(isSlot ? "" : `a number from 0 to ${number(state.memory.slots - 1)}`);
  if (isSlot) openSlot(slot, true); else $("slot").reportValidity();
});
$("slot").addEventListener("input", () => $("slot").setCustomValidity(""));
document.addEventListener("keydown", (event) => { if (event.key === "Escape") spans[state.token].focus(); });

drawText();
const asked = /^#(\d+):(\d+)(?::(\d+))?$/.exec(location.hash);  // memory, slot, token
if (asked && asked[1] in memories && asked[2] < memories[asked[1]].slots) {
  $("memory").value = asked[1];
  state.memory = memories[asked[1]];
  state.slot = Number(asked[2]);
}
chooseToken(Math.min(asked?.[3] ?? 1, data.shown - 1), false);
drawMemory();

"use strict";
// The moving part of inspect.html: maps on canvases, and what depends on the chosen step. Texts enter as text only.

const facts = JSON.parse(document.getElementById("facts").textContent);
const inputs = facts.decoder.slice(0, -1); // what the decoder read, one for each step
const axes = { encoder: [facts.source, facts.source], decoder: [inputs, inputs], cross: [facts.steps.map((step) => step.chosen), facts.source] };
let chosenStep = Math.max(0, facts.steps.findIndex((step) => !step.is_given));

const element = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const percent = (share) => (share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// One byte holds the root of a weight.
const weightsOf = (data) => Float32Array.from(atob(data), (letter) => (letter.charCodeAt(0) / 255) ** 2);
const unpacked = {};
for (const [kind, its] of Object.entries(facts.attention)) {
  unpacked[kind] = { all: weightsOf(its.data), mean: weightsOf(its.mean), rollout: its.rollout && weightsOf(its.rollout) };
}

// The (Q, K) weights that the two selects of a map ask for.
function chosenWeights(kind, layer, head) {
  const its = facts.attention[kind], cells = its.shape[0] * its.shape[1];
  if (layer === "rollout") return unpacked[kind].rollout;
  if (layer === "mean" && head === "mean") return unpacked[kind].mean;
  const sum = new Float32Array(cells);
  const layers = layer === "mean" ? its.layers.keys() : [Number(layer)];
  let count = 0;
  for (const one of layers) {
    const heads = head === "mean" ? [...Array(its.heads).keys()] : [Number(head)];
    for (const other of heads) {
      const start = (one * its.heads + other) * cells;
      for (let cell = 0; cell < cells; cell++) sum[cell] += unpacked[kind].all[start + cell];
      count++;
    }
  }
  return sum.map((value) => value / count);
}

class AttentionMap {
  constructor(figure) {
    this.kind = figure.dataset.map;
    this.canvas = figure.querySelector("canvas");
    this.reading = figure.querySelector(".reading");
    [this.layer, this.head] = figure.querySelectorAll("select");
    figure.querySelector(".controls").hidden = false;
    for (const select of [this.layer, this.head]) select.addEventListener("change", () => this.draw());
    this.canvas.addEventListener("pointermove", (event) => this.read(event));
    this.canvas.addEventListener("pointerleave", () => (this.reading.textContent = ""));
    this.canvas.addEventListener("click", (event) => {
      const place = this.place(event);
      if (place && this.kind !== "encoder") choose(place.row);
    });
  }

  draw() {
    this.head.disabled = this.layer.value === "rollout";
    this.weights = chosenWeights(this.kind, this.layer.value, this.head.value);
    const [rows, columns] = axes[this.kind];
    const room = this.canvas.parentElement.clientWidth || 900;
    const measure = this.canvas.getContext("2d");
    const font = '12px ui-monospace, Menlo, "DejaVu Sans Mono", "Noto Sans Mono CJK KR", monospace';
    measure.font = font;
    const widest = (tokens) => Math.min(120, Math.max(...tokens.map((token) => measure.measureText(token.text).width)));
    this.left = widest(rows) + 10;
    this.top = widest(columns) + 10;
    this.size = Math.max(13, Math.min(30, Math.floor((room - this.left - 4) / columns.length)));
    const width = this.left + this.size * columns.length + 2, height = this.top + this.size * rows.length + 2;
    const scale = window.devicePixelRatio || 1;
    Object.assign(this.canvas, { width: width * scale, height: height * scale });
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.font = font;
    pen.textBaseline = "middle";
    const ink = colour("--ink"), soft = colour("--soft"), faint = colour("--faint");
    const hue = colour(this.kind === "decoder" ? "--target" : "--source");
    const clipped = (text) => (measure.measureText(text).width > 120 ? `${[...text].slice(0, 14).join("")}…` : text);
    rows.forEach((token, row) => {
      const isChosen = this.kind !== "encoder" && row === chosenStep;
      pen.fillStyle = isChosen ? ink : soft;
      pen.textAlign = "right";
      pen.fillText(clipped(token.text), this.left - 6, this.top + this.size * (row + 0.5));
      columns.forEach((_, column) => {
        const weight = this.weights[row * columns.length + column];
        const place = [this.left + this.size * column, this.top + this.size * row, this.size - 1, this.size - 1];
        pen.globalAlpha = 1;
        pen.fillStyle = faint;
        pen.fillRect(...place);
        pen.globalAlpha = Math.sqrt(Math.min(1, weight));
        pen.fillStyle = hue;
        pen.fillRect(...place);
      });
      pen.globalAlpha = 1;
      if (isChosen) {
        pen.strokeStyle = ink;
        pen.strokeRect(this.left - 0.5, this.top + this.size * row - 0.5, this.size * columns.length, this.size);
      }
    });
    pen.fillStyle = soft;
    pen.textAlign = "left";
    columns.forEach((token, column) => {
      pen.save();
      pen.translate(this.left + this.size * (column + 0.5), this.top - 6);
      pen.rotate(-Math.PI / 2);
      pen.fillText(clipped(token.text), 0, 0);
      pen.restore();
    });
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - this.left) / this.size);
    const row = Math.floor((event.clientY - box.top - this.top) / this.size);
    const [rows, columns] = axes[this.kind];
    return row >= 0 && column >= 0 && row < rows.length && column < columns.length ? { row, column } : null;
  }

  read(event) {
    const place = this.place(event);
    if (!place) return;
    const [rows, columns] = axes[this.kind];
    const weight = this.weights[place.row * columns.length + place.column];
    this.reading.textContent = `${rows[place.row].text} → ${columns[place.column].text}: ${percent(weight)}`;
  }
}

const maps = {};
for (const figure of document.querySelectorAll(".map")) maps[figure.dataset.map] = new AttentionMap(figure);

// The source, each token as dark as the chosen step looked at it, by what the cross-attention's map shows.
function lightSource() {
  const weights = maps.cross.weights, width = facts.source.length;
  const row = Array.from(weights.slice(chosenStep * width, (chosenStep + 1) * width));
  const most = Math.max(...row, 1e-9);
  [...document.getElementById("lit").children].forEach((chip, place) => {
    const share = Math.round((100 * row[place]) / most);
    chip.style.background = `color-mix(in srgb, var(--source) ${0.75 * share}%, var(--panel))`;
    chip.style.color = share > 65 ? "var(--paper)" : "";
    chip.title = percent(row[place]);
  });
}

function showDistribution() {
  const step = facts.steps[chosenStep], box = document.getElementById("distribution");
  const line = element("p", "note");
  line.append("After ", element("b", "", step.reads), `: entropy ${step.entropy.toFixed(2)} nats, `);
  line.append("chosen ", element("b", "", step.chosen.text), `, rank ${step.rank.toLocaleString()}, ${percent(step.probability)}`);
  const table = element("table"), head = element("tr");
  for (const [title, side] of [["Token", ""], ["Logit", "r"], ["", ""], ["Probability", "r"]]) head.append(element("th", side, title));
  table.append(element("thead"), element("tbody"));
  table.firstChild.append(head);
  for (const token of step.top) {
    const row = element("tr", token.id === step.chosen.id ? "chosen" : ""), bar = element("span", "bar target"), cell = element("td");
    bar.append(element("span"));
    bar.firstChild.style.width = `${100 * token.probability}%`;
    cell.append(bar);
    row.append(element("th", "code", token.text), element("td", "r n", token.logit.toFixed(2)), cell, element("td", "r n", percent(token.probability)));
    table.lastChild.append(row);
  }
  box.replaceChildren(line, table);
}

function choose(step) {
  chosenStep = Math.max(0, Math.min(facts.steps.length - 1, step));
  document.getElementById("step-number").textContent = chosenStep + 1;
  [...document.getElementById("step-chips").children].forEach((chip, place) => chip.setAttribute("aria-pressed", place === chosenStep));
  document.querySelector('[data-go="-1"]').disabled = chosenStep === 0;
  document.querySelector('[data-go="1"]').disabled = chosenStep === facts.steps.length - 1;
  // Not scrollIntoView, which would move the page as well, away from where it opens.
  const strip = document.getElementById("step-chips"), chip = strip.children[chosenStep];
  strip.scrollLeft = chip.offsetLeft - strip.offsetLeft - (strip.clientWidth - chip.offsetWidth) / 2;
  for (const cell of document.querySelectorAll(".lens td")) cell.classList.toggle("now", Number(cell.dataset.step) === chosenStep);
  maps.decoder.draw();
  maps.cross.draw();
  lightSource();
  showDistribution();
}

facts.steps.forEach((step, place) => {
  const flag = facts.unread.target.includes(place) ? " flag" : "";
  const chip = element("button", `c target${step.chosen.special ? " special" : ""}${flag}`);
  chip.type = "button";
  chip.append(element("b", "", step.chosen.text), element("i", "", percent(step.probability)));
  chip.addEventListener("click", () => choose(place));
  document.getElementById("step-chips").append(chip);
});
for (const button of document.querySelectorAll("[data-go]")) button.addEventListener("click", () => choose(chosenStep + Number(button.dataset.go)));
document.getElementById("strip").addEventListener("keydown", (event) => {
  const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (way) choose(chosenStep + way), event.preventDefault();
});
for (const select of [maps.cross.layer, maps.cross.head]) select.addEventListener("change", lightSource);
document.getElementById("strip").hidden = false;
maps.encoder?.draw();
choose(chosenStep);
const redraw = () => Object.values(maps).forEach((map) => map.draw());
window.addEventListener("resize", redraw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

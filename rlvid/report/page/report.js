// Plays, filters and sorts the videos of a report. Each video is a sprite: its frames in the rows of one image.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let speed = 1;

  class Player {
    constructor(card) {
      this.card = card;
      this.case = Number(card.dataset.case);
      this.canvases = [...card.querySelectorAll("canvas")];
      this.images = [];
      this.button = card.querySelector(".play");
      this.slider = card.querySelector(".scrub");
      this.output = card.querySelector(".frame");
      this.prompt = card.querySelector(".prompt").textContent;
      this.position = 0; // in frames; its whole part is on show
      this.near = false;
      this.play(!still);
      this.button.addEventListener("click", () => { this.play(!this.playing); tellAll(); });
      this.slider.addEventListener("input", () => { this.play(false); this.show(Number(this.slider.value)); tellAll(); });
      card.querySelector(".numbers").addEventListener("toggle", () => this.numbers());
    }
    load() { // the videos on show, each once
      this.images = this.canvases.map((canvas, place) => {
        if (this.images[place] || canvas.parentElement.hidden) return this.images[place];
        const image = new Image();
        image.onload = () => this.draw();
        image.onerror = () => canvas.setAttribute("aria-label", canvas.getAttribute("aria-label") + " (the video is missing)");
        image.src = canvas.dataset.src;
        return image;
      });
    }
    play(on) {
      this.playing = on;
      this.button.textContent = on ? "Pause" : "Play";
      this.button.setAttribute("aria-label", `${on ? "Pause" : "Play"}: ${this.prompt}`);
    }
    show(position) {
      const before = Math.floor(this.position), now = Math.floor(position);
      this.position = position;
      if (now !== before) this.draw();
    }
    draw() {
      const frame = Math.floor(this.position) % data.frames, [width, height] = data.size;
      const x = (frame % data.columns) * width, y = Math.floor(frame / data.columns) * height;
      this.canvases.forEach((canvas, place) => {
        const image = this.images[place];
        if (image && image.complete && image.naturalWidth) {
          canvas.getContext("2d").drawImage(image, x, y, width, height, 0, 0, width, height);
        }
      });
      this.card.dataset.frame = frame;
      this.slider.value = frame;
      this.slider.setAttribute("aria-valuetext", `frame ${frame + 1} of ${data.frames}`);
      this.output.textContent = `${frame + 1} / ${data.frames}`;
    }
    values(metric) { // under each video: its value, and the gain over the base
      this.card.querySelector(".metric").textContent = data.metrics[metric].title;
      for (const each of this.card.querySelectorAll(".value")) {
        const model = Number(each.dataset.model), gain = model ? ` (${text(gainOf(this.case, model, metric), metric, true)})` : "";
        each.textContent = `${text(data.cases[this.case][model][metric], metric)}${gain}`;
      }
    }
    numbers() { // the table of all metrics, made when it is first opened
      const place = this.card.querySelector(".numbers .scroll");
      if (place.firstChild) return;
      const table = document.createElement("table"), head = table.createTHead().insertRow(), body = table.createTBody();
      const cell = (row, words, scope) => {
        const made = document.createElement(scope ? "th" : "td");
        if (scope) made.scope = scope;
        made.textContent = words;
        row.append(made);
      };
      ["Metric", ...data.models].forEach((words) => cell(head, words, "col"));
      data.metrics.forEach((metric, m) => {
        const row = body.insertRow();
        cell(row, metric.title, "row");
        data.models.forEach((_, model) => {
          const gain = model ? ` (${text(gainOf(this.case, model, m), m, true)})` : "";
          cell(row, text(data.cases[this.case][model][m], m) + gain);
        });
      });
      place.append(table);
    }
  }

  function gainOf(number, model, metric) {
    const values = data.cases[number], after = values[model][metric], before = values[0][metric];
    return after === null || before === null ? null : model ? after - before : after;
  }
  function text(value, metric, signed) {
    if (value === null) return "–";
    const { percent, digits } = data.metrics[metric];
    const words = percent ? (100 * value).toFixed(digits) + " %" : value.toFixed(digits);
    const plus = signed && !/^-/.test(words) && /[1-9]/.test(words) ? "+" : "";
    return plus + (/[1-9]/.test(words) ? words : words.replace("-", "")).replace("-", "−");
  }

  const players = [...document.querySelectorAll(".case")].map((card) => new Player(card));
  const listed = players.filter((player) => player.card.parentElement === $("list"));
  const byCard = new Map(players.map((player) => [player.card, player]));
  const watch = new IntersectionObserver((seen) => seen.forEach((each) => {
    const player = byCard.get(each.target);
    player.near = each.isIntersecting;
    if (player.near) player.load();
  }), { rootMargin: "300px" });
  players.forEach((player) => watch.observe(player.card));

  let then = performance.now();
  function tick(now) {
    const passed = Math.min(0.5, (now - then) / 1000) * data.fps * speed;
    then = now;
    for (const player of players) if (player.playing && player.near) player.show(player.position + passed);
    requestAnimationFrame(tick);
  }
  requestAnimationFrame(tick);

  function tellAll() {
    $("all").textContent = players.some((player) => player.playing) ? "Pause all" : "Play all";
  }
  $("all").addEventListener("click", () => {
    const on = !players.some((player) => player.playing);
    players.forEach((player) => { player.play(on); if (on) player.position %= data.frames; });
    tellAll();
  });
  const setSpeed = () => { speed = Number($("speed").value); };
  $("speed").addEventListener("change", setSpeed);
  setSpeed(); // browsers keep a choice over a reload

  const form = $("filter"), chosen = (name) => (form.elements[name] ? form.elements[name].value : "");
  function apply() {
    const metric = Number(chosen("metric")), model = Number(chosen("model") || 0), order = chosen("order");
    const words = chosen("text").toLocaleLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const player of listed) {
      const { set, steps } = player.card.dataset, prompt = player.prompt.toLocaleLowerCase();
      const fits = (!chosen("set") || set === chosen("set")) && (!chosen("steps") || steps === chosen("steps"))
        && words.every((word) => prompt.includes(word));
      player.card.hidden = !fits;
      shown += fits;
    }
    players.forEach((player) => player.values(metric));
    const way = order === "loss" ? 1 : -1; // without a number: last
    const rank = (player) => { const gain = gainOf(player.case, model, metric); return gain === null ? Infinity : way * gain; };
    const ranked = listed.map((player) => [rank(player), player]);
    if (order) ranked.sort(([a], [b]) => (a > b) - (a < b)); // stable: equals stay in the order of their prompts
    const sorted = ranked.map(([, player]) => player);
    $("list").append(...sorted.map((player) => player.card));
    const by = order ? `, largest ${order} in ${data.metrics[metric].title} first` + (model ? ` (${data.models[model]} over ${data.models[0]})` : "") : "";
    $("status").textContent = `${shown} of ${listed.length} cases${by}`;
    $("none").hidden = shown > 0;
  }
  const boxes = $("models") ? [...$("models").querySelectorAll("input")] : [];
  function choose() { // which models' videos are on show
    const shown = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    for (const figure of document.querySelectorAll("figure[data-model]")) figure.hidden = !shown.has(figure.dataset.model);
    for (const player of players) if (player.near) player.load();
  }
  if (boxes.length) {
    $("models").hidden = false;
    $("models").addEventListener("change", choose);
    choose(); // browsers keep a choice over a reload
  }
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  form.hidden = $("bar").hidden = false;
  apply();
  tellAll();
})();

(() => {
  const data = JSON.parse(document.getElementById("states-data").textContent);
  const root = document.querySelector(".explorer"), slider = root.querySelector("#layer");
  const tip = root.querySelector(".tip"), off = new Set();
  const SVG = root.querySelector("svg").namespaceURI;
  const SHAPES = [
    (x, y) => `M${x - 4} ${y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0`, (x, y) => `M${x - 3.6} ${y - 3.6}h7.2v7.2h-7.2z`,
    (x, y) => `M${x} ${y - 4.6}l4.4 8h-8.8z`, (x, y) => `M${x} ${y - 5}l5 5l-5 5l-5 -5z`,
    (x, y) => `M${x} ${y + 4.6}l4.4 -8h-8.8z`, (x, y) => `M${x - 1.5} ${y - 4.5}h3v3h3v3h-3v3h-3v-3h-3v-3h3z`,
    (x, y) => `M${x - 4} ${y - 2}l2 -2l2 2l2 -2l2 2l-2 2l2 2l-2 2l-2 -2l-2 2l-2 -2l2 -2z`,
    (x, y) => `M${x - 5} ${y}l8 -4.4v8.8z`, (x, y) => `M${x + 5} ${y}l-8 -4.4v8.8z`,
    (x, y) => `M${x - 5} ${y - 2.4}h10v4.8h-10z`,
  ];
  const shape = (k, x, y) => SHAPES[k % SHAPES.length](x, y);
  const number = (value) => Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);

  const tick = (value) => String(Number(value.toPrecision(2)));

  function element(parent, tag, attributes = {}, text = "") {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    return parent.appendChild(made);
  }

  function chart(figure, width, height, description) {
    const svg = figure.querySelector("svg");
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", description);
    return svg;
  }

  function say(event, text) {
    tip.textContent = text;
    tip.hidden = false;
    const box = root.getBoundingClientRect();
    tip.style.left = `${Math.max(0, Math.min(event.clientX - box.left + 12, box.width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${event.clientY - box.top + 14}px`;
  }
  root.addEventListener("pointerleave", () => { tip.hidden = true; });

  function hover(mark, text) {
    ["pointermove", "pointerdown"].forEach((kind) => mark.addEventListener(kind, (event) => { say(event, text()); }));
    mark.addEventListener("pointerleave", () => { tip.hidden = true; });
  }

  const range = (values) => {
    const low = Math.min(...values), high = Math.max(...values), more = (high - low || 1) * 0.05;
    return [low >= 0 ? Math.max(0, low - more) : low - more, high + more];
  };
  const shown = (values) => data.names.filter((name) => !off.has(name.key) && values[name.key]);

  function scatter(layer) {
    const figure = root.querySelector(".plane"), known = Object.keys(data.planes).map(Number);
    figure.hidden = !known.length;
    if (!known.length) return;
    const nearest = known.reduce((a, b) => Math.abs(b - layer) < Math.abs(a - layer) ? b : a);
    const plane = data.planes[nearest], every = Object.values(plane.points).flat();
    const [left, right] = range(every.map((point) => point[0])), [low, high] = range(every.map((point) => point[1]));
    const svg = chart(figure, 420, 340, `States at decoder layer ${nearest}, a point for each sample`);
    element(svg, "rect", {x: 1, y: 1, width: 418, height: 338, class: "frame"});
    shown(plane.points).forEach((name) => plane.points[name.key].forEach(([x, y], k) => {
      const place = data.names.indexOf(name);
      const at = [10 + 400 * (x - left) / (right - left), 330 - 320 * (y - low) / (high - low)];
      const mark = element(svg, "path", {d: shape(place, ...at), fill: name.colour, "fill-opacity": 0.75});
      hover(mark, () => `${name.label}: ${data.samples[k] ?? `sample ${k}`}`);
    }));
    const share = 100 * plane.explained.reduce((a, b) => a + b, 0);
    figure.querySelector("figcaption").textContent =
      `States of the last prompt token at decoder layer ${nearest}, ${data.samples.length} samples, first two principal components (${share.toFixed(0)} % of the variance). Point at a state to read its request.`;
  }

  function lines(layer) {
    data.lines.forEach(({title, values}, place) => {
      const figure = root.querySelectorAll(".line")[place], some = shown(values);
      const svg = chart(figure, 420, 240, `${title} by decoder layer`);
      const [low, high] = range(some.length ? some.flatMap((name) => values[name.key]) : [0, 1]);
      const x = (at) => 46 + 364 * at / Math.max(1, data.layers - 1), y = (value) => 208 - 196 * (value - low) / (high - low);
      [low, (low + high) / 2, high].forEach((value) => {
        element(svg, "line", {x1: 46, x2: 410, y1: y(value), y2: y(value), class: "grid"});
        element(svg, "text", {x: 42, y: y(value) + 4, "text-anchor": "end"}, tick(value));
      });
      element(svg, "text", {x: 46, y: 226}, "0");
      element(svg, "text", {x: 410, y: 226, "text-anchor": "end"}, `layer ${data.layers - 1}`);
      some.forEach((name) => {
        const steps = values[name.key].map((value, at) => `${at ? "L" : "M"}${x(at)} ${y(value)}`).join("");
        const k = data.names.indexOf(name);
        element(svg, "path", {d: steps, fill: "none", stroke: name.colour, "stroke-width": 2});
        element(svg, "path", {d: shape(k, x(layer), y(values[name.key][layer])), fill: name.colour});
      });
      element(svg, "line", {x1: x(layer), x2: x(layer), y1: 12, y2: 208, class: "here"});
      const field = element(svg, "rect", {x: 46, y: 0, width: 364, height: 212, fill: "transparent"});
      const at = (event) => {
        const box = field.getBoundingClientRect();
        return Math.max(0, Math.min(data.layers - 1, Math.round((event.clientX - box.left) / box.width * (data.layers - 1))));
      };
      field.addEventListener("pointermove", (event) => {
        say(event, `layer ${at(event)}\n${some.map((name) => `${name.label} ${number(values[name.key][at(event)])}`).join("\n")}`);
      });
      field.addEventListener("pointerleave", () => { tip.hidden = true; });
      field.addEventListener("click", (event) => { slider.value = at(event); draw(); });
    });
  }

  function gate() {
    const figure = root.querySelector(".gate");
    figure.hidden = !data.gate;
    if (!data.gate) return;
    const groups = Object.entries(data.gate.scores).filter(([, scores]) => scores.length);
    const [low, high] = range([data.gate.threshold, ...groups.flatMap(([, scores]) => scores)]);
    const x = (value) => 70 + 340 * (value - low) / (high - low), height = 50 + 44 * groups.length;
    const svg = chart(figure, 420, height, "Reading of the harm gate for each sample, beside its threshold");
    groups.forEach(([name, scores], row) => {
      element(svg, "text", {x: 62, y: 44 + 44 * row, "text-anchor": "end"}, name);
      const colour = {harmful: "#d1495b", benign: "#2e8b57"}[name] ?? "#8c8c8c";
      scores.forEach((score, k) => {
        const d = shape(row, x(score), 40 + 44 * row + (k % 7 - 3) * 4);
        const mark = element(svg, "path", {d, fill: colour, "fill-opacity": 0.75});
        hover(mark, () => `${name}: ${number(score)}, ${score > data.gate.threshold ? "open" : "closed"}`);
      });
    });
    const edge = x(data.gate.threshold), right = edge > 300;
    element(svg, "line", {x1: edge, x2: edge, y1: 18, y2: height - 22, class: "here"});
    element(svg, "text", {x: edge + (right ? -4 : 4), y: 13, "text-anchor": right ? "end" : "start"}, `opens above ${number(data.gate.threshold)}`);
    figure.querySelector(".opened").textContent = groups.map(([name, scores]) =>
      `${scores.filter((score) => score > data.gate.threshold).length} of ${scores.length} (${name})`).join(", ");
    element(svg, "text", {x: 70, y: height - 6}, tick(low));
    element(svg, "text", {x: 410, y: height - 6, "text-anchor": "end"}, tick(high));
  }

  function heat() {
    const figure = root.querySelector(".heat"), keys = Object.keys(data.positions);
    figure.hidden = !keys.length;
    if (!keys.length) return;
    const {labels, n, values} = data.positions[figure.querySelector("select").value];
    const top = Math.max(...keys.flatMap((key) => data.positions[key].values.flat()));
    const width = 780 / labels.length, height = Math.max(5, Math.min(14, 260 / data.layers));
    const svg = chart(figure, 840, 20 + height * data.layers + 96, "Shift of the last tokens of the prompt, by position and decoder layer");
    element(svg, "text", {x: 44, y: 24, "text-anchor": "end"}, data.layers - 1);
    element(svg, "text", {x: 44, y: 12 + height * data.layers, "text-anchor": "end"}, "layer 0");
    labels.forEach((label, place) => {
      const x = 50 + width * place;
      values[place].forEach((value, layer) => {
        const y = 12 + height * (data.layers - 1 - layer);
        const cell = element(svg, "rect", {x, y, width, height, fill: "var(--good)", "fill-opacity": top ? value / top : 0});
        hover(cell, () => `token ${label}, layer ${layer}: ${number(value)} (${n[place]} samples)`);
        cell.addEventListener("click", () => { slider.value = layer; draw(); });
      });
      const y = 22 + height * data.layers;
      element(svg, "text", {x: x + width / 2, y, "text-anchor": "end", transform: `rotate(-60 ${x + width / 2} ${y})`}, label);
    });
    figure.querySelector(".most").textContent = number(top);
  }

  function row(name, cells, tag = "td") {
    const made = document.createElement("tr"), head = made.appendChild(document.createElement("th"));
    head.scope = tag === "td" ? "row" : "col";
    head.textContent = name;
    cells.forEach((text) => { made.appendChild(document.createElement(tag)).textContent = text; });
    return made;
  }

  function tables(layer) {
    root.querySelector(".values tbody").replaceChildren(...data.names.filter((name) => !off.has(name.key)).map((name) =>
      row(name.label, data.lines.map(({values}) => values[name.key] ? number(values[name.key][layer]) : ""))));
    const shifts = data.names.filter((name) => data.positions[name.key]);
    if (!shifts.length) return;
    const {labels} = data.positions[shifts[0].key];
    root.querySelector(".tokens thead").replaceChildren(row("token", labels, "th"));
    root.querySelector(".tokens tbody").replaceChildren(...shifts.map((name) =>
      row(name.label, data.positions[name.key].values.map((values) => number(values[layer])))));
  }

  function draw() {
    const layer = Number(slider.value);
    root.querySelectorAll(".chosen").forEach((place) => { place.textContent = layer; });
    slider.setAttribute("aria-valuetext", `decoder layer ${layer}`);
    scatter(layer);
    lines(layer);
    tables(layer);
  }

  const keys = root.querySelector(".keys");
  data.names.forEach((name, place) => {
    const button = keys.appendChild(document.createElement("button"));
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    const icon = element(button, "svg", {viewBox: "0 0 12 12", "aria-hidden": "true"});
    element(icon, "path", {d: shape(place, 6, 6), fill: name.colour});
    button.append(name.label);
    button.addEventListener("click", () => {
      if (!off.delete(name.key)) off.add(name.key);
      button.setAttribute("aria-pressed", String(!off.has(name.key)));
      draw();
    });
  });
  slider.max = data.layers - 1;
  slider.value = Math.round(0.6 * (data.layers - 1));
  slider.addEventListener("input", draw);
  root.querySelector("select").addEventListener("change", heat);
  root.hidden = false;
  document.documentElement.classList.add("explored");
  draw();
  gate();
  heat();
})();

// Charts of the report: data from the page, colours from its style sheet, points filtered by run, module and layer.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const LINES = [["#2f6fdb", "#7fb0ff"], ["#d1580b", "#ffa35c"], ["#15803d", "#63d08a"], ["#a32cc4", "#df8cf5"], ["#b8860b", "#f0c54a"],
    ["#0e7c86", "#4fd1d9"], ["#c81e5b", "#ff86ae"], ["#5b6472", "#b4bdc9"]];  // [on light, on dark]
  const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const LIGHTER = [[148, 103, 196], [101, 133, 201], [49, 165, 158], [104, 208, 108], [253, 231, 37]];  // the same on a dark ground
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "star", "x", "hexagon", "cross"];
  const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };

  // plotly reads tags and entities in names and hovers; here they are text
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  const dark = () => getComputedStyle(root).colorScheme === "dark" ||
    (root.dataset.theme === undefined && matchMedia("(prefers-color-scheme: dark)").matches);
  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;
  const colour = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };

  function layout(extra) {
    const axis = { gridcolor: colour("rule"), zerolinecolor: colour("rule"), linecolor: colour("rule"), automargin: true };
    const axes = {};
    for (const key of Object.keys(extra)) if (/axis/.test(key)) axes[key] = { ...axis, ...extra[key] };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("ink"), size: 12, family: "system-ui, sans-serif" },
      margin: { l: 12, r: 14, t: 24, b: 8 }, hoverlabel: { bgcolor: colour("card"), bordercolor: colour("rule"), font: { color: colour("ink") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("quiet"), activecolor: colour("accent") }, ...extra, ...axes,
    };
  }

  // ---- loss and learning rate: one legend entry a run switches all of its lines
  function curves() {
    const traces = [];
    data.runs.forEach((run, number) => {
      const shade = LINES[number % LINES.length][dark() ? 1 : 0];
      const turn = Math.floor(number / LINES.length);
      const dash = ["solid", "dash", "dashdot", "longdash"][turn % 4];
      let named = false;
      const line = (key, title, style, extra) => {
        const rows = run.log.filter((row) => row[key] !== null);
        if (!rows.length) return;
        traces.push({
          x: rows.map((row) => row.step), y: rows.map((row) => row[key]), name: plain(run.name), legendgroup: String(number), showlegend: !named,
          mode: rows.length > 60 ? "lines" : "lines+markers", line: { color: shade, width: 1.8, dash: style },
          marker: { color: shade, size: 5 }, hovertemplate: `${plain(run.name)}<br>step %{x}<br>${title} %{y:.4g}<extra></extra>`, ...extra,
        });
        named = true;
      };
      line("loss", "loss", dash, {});
      line("eval_loss", "eval loss", "dot", { mode: "lines+markers", marker: { color: shade, size: 8, symbol: "diamond-open" } });
      line("instance_loss", "instance loss", "dash", { mode: "lines" });
      line("prior_loss", "prior loss", "dashdot", { mode: "lines" });
      line("learning_rate", "learning rate", dash, { yaxis: "y2", mode: "lines" });
    });
    Plotly.react("curves-chart", traces, layout({
      xaxis: { title: { text: "optimizer step", standoff: 6 }, anchor: "y2", rangemode: "tozero" },
      yaxis: { title: { text: "loss" }, domain: [0.36, 1], ...(byId("logarithmic").checked ? { type: "log", dtick: "D2", tickformat: "~g" } : { rangemode: "tozero" }) },
      yaxis2: { title: { text: "learning rate" }, domain: [0, 0.26], rangemode: "tozero", exponentformat: "e" },
      legend: { orientation: "h", y: -0.16, yanchor: "top", groupclick: "togglegroup" }, showlegend: true, uirevision: "kept",
      annotations: traces.length ? [] : [{ text: "no log in any run", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.6 }],
    }), CONFIG);
  }

  // ---- score by rank or by number of examples: one line a method, bars of the interval over seeds
  function grids() {
    document.querySelectorAll(".chart.grid").forEach((box, number) => {
      const grid = data.grids[number];
      const traces = Object.entries(grid.series).map(([name, points], place) => {
        const shade = LINES[place % LINES.length][dark() ? 1 : 0];
        const whole = points.every((p) => p.low !== null && p.high !== null);
        return {
          x: points.map((p) => p.x), y: points.map((p) => p.mean), name: plain(name), mode: "lines+markers", line: { color: shade, width: 1.8 },
          marker: { color: shade, size: 8, symbol: SYMBOLS[place % SYMBOLS.length] },
          hovertemplate: `${plain(name)}<br>${plain(grid.x)} %{x}<br>${plain(grid.y)} %{y:.4g}<extra></extra>`,
          ...(whole ? { error_y: { type: "data", symmetric: false, array: points.map((p) => p.high - p.mean),
            arrayminus: points.map((p) => p.mean - p.low), color: shade, thickness: 1.2, width: 4 } } : {}),
        };
      });
      const places = [...new Set(traces.flatMap((trace) => trace.x))].sort((a, b) => a - b);
      Plotly.react(box, traces, layout({
        xaxis: { title: { text: plain(grid.x) }, type: "log", tickvals: places, ticktext: places.map(String) },
        yaxis: { title: { text: plain(grid.y) }, ...(/accuracy/.test(grid.y) ? { tickformat: ".1%" } : {}) },
        legend: { orientation: "h", y: -0.2, yanchor: "top" }, showlegend: true,
      }), CONFIG);
    });
  }

  // ---- ΔM against ΔD
  const layers = data.points.map((point) => point.layer);
  const [first, last] = [layers.reduce((a, b) => Math.min(a, b), Infinity), layers.reduce((a, b) => Math.max(a, b), -Infinity)];
  const filters = { runs: new Map(), modules: new Map() };

  function shade(layer) {
    const place = last > first ? (layer - first) / (last - first) : 0.5;
    const LAYERS = dark() ? LIGHTER : VIRIDIS;
    const at = place * (LAYERS.length - 1), low = Math.min(Math.floor(at), LAYERS.length - 2);
    const mixed = LAYERS[low].map((c, i) => Math.round(c + (LAYERS[low + 1][i] - c) * (at - low)));
    return `rgb(${mixed.join(",")})`;
  }

  function checkboxes(kind, values) {
    for (const value of values) {
      const label = document.createElement("label"), box = document.createElement("input");
      Object.assign(box, { type: "checkbox", checked: true, name: kind, value });
      label.append(box, ` ${value}`);
      byId(`filter-${kind}`).append(label);
      filters[kind].set(value, box);
    }
  }

  function selected(rows) {
    const [from, to] = ["layer-from", "layer-to"].map((id) => byId(id).valueAsNumber);
    return rows.filter((row) => filters.runs.get(row.run)?.checked && filters.modules.get(row.module)?.checked &&
      !(row.layer < from) && !(row.layer > to));  // an empty field limits nothing
  }

  // least squares of ΔM on ΔD and Pearson's correlation, as doratune.analysis.points.regression has them
  function regression(points) {
    if (points.length < 3) return null;
    const mean = (key) => points.reduce((sum, point) => sum + point[key], 0) / points.length;
    const [mx, my] = [mean("direction"), mean("magnitude")];
    let xx = 0, xy = 0, yy = 0;
    for (const point of points) {
      const [x, y] = [point.direction - mx, point.magnitude - my];
      xx += x * x; xy += x * y; yy += y * y;
    }
    return xx > 0 && yy > 0 ? { slope: xy / xx, intercept: my - (xy / xx) * mx, correlation: xy / Math.sqrt(xx * yy) } : null;
  }

  const panels = new Map();
  function panel(run) {
    const box = document.createElement("div"), title = document.createElement("h3"), facts = document.createElement("p"), plot = document.createElement("div");
    box.className = "panel"; plot.className = "plot"; facts.className = "note"; title.textContent = run;
    plot.setAttribute("role", "group"); plot.setAttribute("aria-label", `ΔM against ΔD of ${run}`);
    box.append(title, facts, plot);
    byId("panels").append(box);
    panels.set(run, { box, facts, plot });
  }

  function draw(run, points) {
    const { box, facts, plot } = panels.get(run);
    box.hidden = !points.length;
    if (!points.length) { Plotly.purge(plot); return; }
    const steps = [...new Set(data.points.filter((point) => point.run === run).map((point) => point.step))].sort((a, b) => a - b);
    const line = regression(points);
    facts.textContent = line ?
      `correlation ${line.correlation < 0 ? "−" : "+"}${Math.abs(line.correlation).toFixed(2)} · slope ${line.slope.toPrecision(3)} · ${points.length} points` :
      `${points.length} points, too few or too alike for a correlation`;
    box.dataset.correlation = line ? line.correlation : "";
    const traces = steps.map((step, number) => {
      const some = points.filter((point) => point.step === step);
      return {
        x: some.map((point) => point.direction), y: some.map((point) => point.magnitude), mode: "markers", legendgroup: String(step), showlegend: false, hoverinfo: "text",
        text: some.map((p) => `layer ${p.layer}, ${plain(p.module)}<br>step ${step}, ${plain(run)}<br>ΔD ${p.direction.toPrecision(3)}, ΔM ${p.magnitude.toPrecision(3)}`),
        marker: { color: some.map((p) => shade(p.layer)), symbol: SYMBOLS[number % SYMBOLS.length], size: 8, line: { width: 0.6, color: colour("quiet") } },
      };
    }).filter((trace) => trace.x.length);
    steps.forEach((step, number) => traces.push({  // the legend shows symbols alone: colour is the layer
      x: [null], y: [null], mode: "markers", name: `step ${step}`, legendgroup: String(step), hoverinfo: "skip",
      marker: { color: colour("quiet"), symbol: SYMBOLS[number % SYMBOLS.length], size: 8 },
    }));
    if (line) {
      const x = points.map((point) => point.direction), ends = [Math.min(...x), Math.max(...x)];
      traces.push({ x: ends, y: ends.map((end) => line.intercept + line.slope * end), mode: "lines", hoverinfo: "skip", showlegend: false,
        line: { color: colour("ink"), width: 1.5 } });
    }
    Plotly.react(plot, traces, layout({
      xaxis: { title: { text: "ΔD", standoff: 4 }, exponentformat: "e", nticks: 5 }, yaxis: { title: { text: "ΔM" }, exponentformat: "e", nticks: 6 },
      legend: { orientation: "h", y: -0.22, yanchor: "top", font: { size: 11 }, itemsizing: "constant" }, showlegend: true, hovermode: "closest",
    }), CONFIG);
  }

  // ---- along the layers (Fig. 3): the last checkpoints; one line a run and module, or one a weight's singular values
  const QUANTITIES = [
    ["magnitude", "ΔM", "ΔM", "mean change of the vectors' norms"],
    ["direction", "ΔD", "ΔD", "mean of 1 − cos of the vectors' turn"],
    ["relative", "|Δm|/m", "|Δm|/m", "mean relative change of the magnitude"],
    ["effective_rank", "effective rank", "effective rank", "of the update: of an adapter s·B·A, of other models W − W₀; exp of the entropy of its singular values"],
    ["gradient_share", "gradient's share on magnitude", "share", "of the loss's gradient by the weight, at the run's end: how much of it lies along the weight's vectors"],
  ];
  const SPECTRA = ["spectra", "singular values of the update", "σ / |W|", "one line a weight in its layer's colour; of an adapter s·B·A, of other models W − W₀; |W|: Frobenius norm of the base's weight"];
  const ends = new Map();  // run → its last step
  for (const point of data.points) ends.set(point.run, Math.max(point.step, ends.get(point.run) ?? -Infinity));
  const atEnd = data.points.filter((point) => point.step === ends.get(point.run));

  function lines(key, title) {  // the mean over weights of one layer and module: experts
    const traces = [], modules = [...filters.modules.keys()];
    [...filters.runs.keys()].forEach((run, number) => modules.forEach((module, place) => {
      const layers = new Map();
      for (const p of selected(atEnd)) {
        if (p.run === run && p.module === module && p[key] !== null) layers.set(p.layer, [...(layers.get(p.layer) ?? []), p[key]]);
      }
      if (!layers.size) return;
      const x = [...layers.keys()].sort((a, b) => a - b), ink = LINES[number % LINES.length][dark() ? 1 : 0];
      traces.push({
        x, y: x.map((layer) => layers.get(layer).reduce((a, b) => a + b) / layers.get(layer).length), mode: "lines+markers",
        name: `${plain(run)} · ${plain(module)}`, line: { color: ink, width: 1.8, dash: ["solid", "dash", "dot", "dashdot", "longdash"][place % 5] },
        marker: { color: ink, size: 7, symbol: SYMBOLS[place % SYMBOLS.length] },
        hovertemplate: `${plain(run)}, ${plain(module)}<br>layer %{x}<br>${title} %{y:.4g}<extra></extra>`,
      });
    }));
    return traces;
  }

  function spectra() {
    const named = new Set(), runs = [...filters.runs.keys()];
    return selected(data.spectra).map((weight) => {
      const first = !named.has(weight.run), number = runs.indexOf(weight.run);
      named.add(weight.run);
      return {
        x: weight.values.map((_, i) => i + 1), y: weight.values, mode: weight.values.length > 1 ? "lines" : "markers", name: plain(weight.run),
        legendgroup: String(number), showlegend: first, line: { color: shade(weight.layer), width: 1.3, dash: ["solid", "dash", "dot", "dashdot", "longdash"][number % 5] },
        marker: { color: shade(weight.layer), size: 7 },
        hovertemplate: `${plain(weight.run)}, ${plain(weight.module)}<br>layer ${weight.layer}<br>value %{x}: σ / |W| %{y:.4g}<extra></extra>`,
      };
    });
  }

  function alongLayers() {
    const [key, title, short, note] = [...QUANTITIES, SPECTRA].find(([name]) => name === byId("quantity").value);
    const values = key === "spectra";
    byId("quantity-note").textContent = `Last checkpoint of each run: ${note}.`;
    const traces = values ? spectra() : lines(key, title);
    Plotly.react("layers-chart", traces, layout({
      xaxis: { title: { text: values ? "singular value" : "layer", standoff: 6 }, ...(values ? {} : { tickformat: "d" }) },
      yaxis: { title: { text: short }, exponentformat: "e", ...(values ? { type: "log" } : {}), ...(key === "gradient_share" ? { tickformat: ".2~%" } : {}) },
      legend: { orientation: "h", y: -0.16, yanchor: "top" }, showlegend: true, uirevision: key,
      annotations: traces.length ? [] : [{ text: "nothing of the runs, modules and layers chosen", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.6 }],
    }), CONFIG);
  }

  function choices() {
    const known = QUANTITIES.filter(([key]) => atEnd.some((point) => point[key] !== null));
    for (const [value, text] of [...known, ...(data.spectra.length ? [SPECTRA] : [])]) {
      byId("quantity").append(Object.assign(document.createElement("option"), { value, textContent: text }));
    }
    byId("quantity").addEventListener("input", alongLayers);
  }

  function movement() {
    const points = selected(data.points);
    alongLayers();
    byId("scale").children[1].style.background = `linear-gradient(to right, ${(dark() ? LIGHTER : VIRIDIS).map((c) => `rgb(${c})`).join(",")})`;
    byId("count").textContent = `${points.length} of ${data.points.length} points shown`;
    for (const run of panels.keys()) draw(run, points.filter((point) => point.run === run));
  }

  if (data.points.length) {
    checkboxes("runs", new Set(data.points.map((point) => point.run)));
    checkboxes("modules", new Set(data.points.map((point) => point.module)));
    for (const [id, value] of [["layer-from", first], ["layer-to", last]]) Object.assign(byId(id), { min: first, max: last, value });
    const [low, , high] = byId("scale").children;
    [low.textContent, high.textContent] = [`layer ${first}`, last];
    for (const run of filters.runs.keys()) panel(run);
    choices();
    byId("filters").addEventListener("input", movement);
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
  }

  function drawAll() {
    grids();
    curves();
    if (data.points.length) movement();
  }

  const kept = { get: () => { try { return localStorage.getItem("doratune-theme"); } catch { return null; } },
    set: (value) => { try { localStorage.setItem("doratune-theme", value); } catch { /* a page from a file may have no storage */ } } };
  if (["light", "dark"].includes(kept.get())) root.dataset.theme = kept.get();
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    kept.set(root.dataset.theme);
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  byId("logarithmic").addEventListener("change", curves);
  drawAll();
})();

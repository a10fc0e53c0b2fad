"use strict";
// Draws the charts of the report from the JSON in the page, and answers to the pointer.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const host = document.getElementById("charts");
  const several = data.runs.length > 1;
  const state = { x: "tokens", hidden: new Set() };
  const HEIGHT = 250, TOP = 10, RIGHT = 14, BOTTOM = 26, LEFT = 52;
  const DASHES = ["", "7 4", "2 3", "9 3 2 3"];

  const svg = (name, attributes, parent) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (parent) parent.appendChild(node);
    return node;
  };
  const html = (name, className, parent, text) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    if (parent) parent.appendChild(node);
    return node;
  };

  // Numbers for people.
  const short = (value) => {
    const size = Math.abs(value);
    for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
      if (size >= unit) return +(value / unit).toPrecision(4) + letter;
    if (size && size < 1e-3) return value.toExponential(1);
    return String(+value.toPrecision(4));
  };
  const exact = (value) => value === null ? "not finite"
    : Math.abs(value) >= 1e5 ? short(value) : String(+value.toPrecision(5));

  // Position on the horizontal axis of a run's step, by its ruler.
  const place = (run, step) => {
    if (state.x === "steps") return step;
    const ruler = data.runs[run].ruler, steps = ruler.steps, to = ruler[state.x];
    if (!steps.length) return step;
    let low = 0, high = steps.length - 1;
    if (step <= steps[0]) return step === steps[0] || steps[0] < 1 ? to[0] : to[0] * step / steps[0];
    if (step >= steps[high]) return to[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    return to[low] + (to[high] - to[low]) * (step - steps[low]) / (steps[high] - steps[low]);
  };

  const ticks = (low, high, count) => {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= raw * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
      found.push(+(i * step).toPrecision(12));
    return found;
  };
  const logTicks = (low, high) => {
    const found = [], decades = Math.log10(high / low), digits = decades > 4 ? [1] : decades > 1.5 ? [1, 3] : [1, 2, 3, 5, 7];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const digit of digits) {
        const value = digit * 10 ** power;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    const every = Math.ceil(found.length / 7);
    return found.length > 1 ? found.filter((_, i) => i % every === 0) : ticks(low, high, 4);
  };

  const colour = (chart, line, index) =>
    `var(--c${(several && !chart.stacked ? line.run : index) % 8})`;
  const labels = (chart) => [...new Set(chart.lines.map((line) => line.label))];
  // Where colours are runs, a quantity is known by its dashes.
  const dashes = (chart, label) => {
    const drawn = labels(chart).filter((name) => chart.lines.some((line) => line.label === name && line.style !== "faint"));
    return several && !chart.stacked ? DASHES[Math.max(0, drawn.indexOf(label)) % DASHES.length] : "";
  };
  const shown = (chart) => chart.lines.filter((line) => !state.hidden.has(line.run));

  // The lines with their positions and drawn values: sums of those below where they are stacked.
  const layOut = (chart) => {
    const log = chart.scale === "log" && !chart.stacked;
    let below = null;
    return shown(chart).map((line) => {
      const index = labels(chart).indexOf(line.label);
      const xs = line.steps.map((step) => place(line.run, step));
      let ys = line.values.map((value) => value === null || (log && value <= 0) ? null : value);
      const base = below;
      if (chart.stacked) {
        ys = ys.map((value, i) => (value || 0) + (base ? base[i] : 0));
        below = ys;
      }
      return { line, index, xs, ys, base };
    });
  };

  const extent = (rows, pick) => {
    let low = Infinity, high = -Infinity;
    for (const row of rows) for (const value of pick(row)) if (value !== null) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
    return [low, high];
  };

  const scales = (chart, rows, width) => {
    // All charts have the same horizontal axis: that of the runs shown.
    const shownRuns = [...new Set(rows.map((row) => row.line.run))];
    const ends = shownRuns.flatMap((run) => data.runs[run].ruler[state.x]);
    let [left, right] = extent(rows, (row) => row.xs);
    for (const end of ends) [left, right] = [Math.min(left, end), Math.max(right, end)];
    let [low, high] = extent(rows, (row) => row.ys);
    if (left > right) [left, right] = [0, 1];
    if (low > high) [low, high] = [0, 1];
    if (left === right) right = left + 1;
    const log = chart.scale === "log" && low > 0 && !chart.stacked;
    if (log) { low /= 1.1; high *= 1.1; } else {
      if (chart.stacked || (low >= 0 && low < 0.3 * high)) low = 0;
      const room = (high - low || Math.abs(high) || 1) * 0.06;
      high += room;
      if (low !== 0) low -= room;
    }
    const bend = log ? Math.log : (value) => value;
    const tall = HEIGHT - TOP - BOTTOM;
    return {
      left, right, low, high, log,
      x: (value) => LEFT + (width - LEFT - RIGHT) * (value - left) / (right - left),
      y: (value) => TOP + tall * (1 - (bend(value) - bend(low)) / (bend(high) - bend(low))),
    };
  };

  const path = (xs, ys, scale) => {
    let text = "", pen = "M";
    for (let i = 0; i < xs.length; i++) {
      if (ys[i] === null) { pen = "M"; continue; }
      text += `${pen}${scale.x(xs[i]).toFixed(1)} ${scale.y(ys[i]).toFixed(1)}`;
      pen = "L";
    }
    return text;
  };

  const axes = (picture, scale, width) => {
    const across = Math.max(2, Math.floor(width / 90));
    for (const value of scale.log ? logTicks(scale.low, scale.high) : ticks(scale.low, scale.high, 5)) {
      const y = scale.y(value);
      svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }, picture);
      svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, picture).textContent = short(value);
    }
    for (const value of ticks(scale.left, scale.right, across)) {
      const x = scale.x(value);
      const anchor = x > width - RIGHT - 12 ? "end" : "middle";
      svg("text", { x, y: HEIGHT - 8, "text-anchor": anchor }, picture).textContent = short(value);
    }
    svg("text", { x: LEFT - 6, y: HEIGHT - 8, "text-anchor": "end" }, picture).textContent = state.x;
  };

  const drawLine = (picture, chart, row, scale) => {
    const { line, index, xs, ys } = row, stroke = colour(chart, line, index);
    if (chart.stacked) {
      const back = xs.map((x, i) => [x, row.base ? row.base[i] : 0]).reverse();
      const edge = back.map(([x, y]) => `L${scale.x(x).toFixed(1)} ${scale.y(y).toFixed(1)}`).join("");
      svg("path", { d: path(xs, ys, scale) + edge + "Z", style: `fill:${stroke};fill-opacity:.75` }, picture);
      return;
    }
    const style = `stroke:${stroke};stroke-dasharray:${dashes(chart, line.label) || "none"}`;
    svg("path", { class: `curve ${line.style || ""}`, d: path(xs, ys, scale), style }, picture);
    if (line.style === "dots" || xs.length === 1) for (let i = 0; i < xs.length; i++) if (ys[i] !== null)
      svg("circle", { cx: scale.x(xs[i]), cy: scale.y(ys[i]), r: 2.6, style: `fill:${stroke}` }, picture);
  };

  const drawMarks = (picture, scale) => data.runs.forEach((run, number) => {
    if (state.hidden.has(number)) return;
    for (const mark of run.marks) {
      const x = scale.x(place(number, mark.step));
      if (!(x >= LEFT - 1 && x <= scale.x(scale.right) + 1)) continue;
      const line = svg("line", { class: `mark ${mark.kind}`, x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }, picture);
      svg("title", {}, line).textContent = `${several ? run.name + ", " : ""}step ${mark.step}: ${mark.text}`;
    }
  });

  const nearest = (xs, at) => {
    let best = -1, distance = Infinity;
    for (let i = 0; i < xs.length; i++) if (Math.abs(xs[i] - at) < distance) {
      distance = Math.abs(xs[i] - at);
      best = i;
    }
    return best;
  };

  const tell = (tip, chart, rows, at) => {
    tip.textContent = "";
    const at0 = rows.map((row) => nearest(row.xs, at));
    const distance = (n) => at0[n] < 0 ? Infinity : Math.abs(rows[n].xs[at0[n]] - at);
    let first = -1;
    rows.forEach((_, n) => { if (distance(n) < (first < 0 ? Infinity : distance(first))) first = n; });
    if (first < 0) return null;
    const step = rows[first].line.steps[at0[first]], run = rows[first].line.run;
    const ruler = data.runs[run].ruler, saved = state.x, where = [`step ${step}`];
    for (const name of ["tokens", "hours"]) {
      state.x = name;
      if (ruler.steps.length) where.push(`${short(place(run, step))} ${name}`);
    }
    state.x = saved;
    html("b", "", tip, where.join(", "));
    rows.forEach((row, n) => {
      const i = at0[n], marked = data.runs[row.line.run].marks.filter((mark) => mark.step === row.line.steps[i]);
      if (i < 0) return;
      // A line that has nothing near the pointer keeps silent.
      if (n !== first && distance(n) > tip.reach) return;
      const entry = html("div", "", tip), swatch = html("i", "", entry);
      swatch.style.background = colour(chart, row.line, row.index);
      const name = several && !chart.stacked ? `${data.runs[row.line.run].name}, ${row.line.label}` : row.line.label;
      html("span", "", entry, `${name}: `);
      html("b", "", entry, exact(row.line.values[i]));
      for (const mark of n === first ? marked : []) html("div", "", tip, mark.text.slice(0, 60));
    });
    return rows[first].xs[at0[first]];
  };

  const draw = (chart) => {
    const { figure, holder, tip } = chart.parts;
    const width = Math.max(260, holder.clientWidth || 600), rows = layOut(chart);
    const scale = scales(chart, rows, width);
    holder.textContent = "";
    figure.hidden = rows.length === 0;
    const picture = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": chart.title }, holder);
    axes(picture, scale, width);
    for (const row of rows) drawLine(picture, chart, row, scale);
    drawMarks(picture, scale);
    const cross = svg("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" }, picture);
    const leave = () => { tip.hidden = true; cross.setAttribute("visibility", "hidden"); };
    picture.addEventListener("pointerleave", leave);
    const move = (event) => {
      const box = picture.getBoundingClientRect(), inside = (event.clientX - box.left) * width / box.width;
      const at = scale.left + (inside - LEFT) / (width - LEFT - RIGHT) * (scale.right - scale.left);
      tip.reach = 0.04 * (scale.right - scale.left);
      const found = tell(tip, chart, rows, at);
      if (found === null) return leave();
      const x = scale.x(found);
      for (const end of ["x1", "x2"]) cross.setAttribute(end, x);
      cross.setAttribute("visibility", "visible");
      tip.hidden = false;
      const here = x * box.width / width, room = figure.clientWidth - tip.offsetWidth - 8;
      tip.style.left = `${Math.max(4, here + 24 < room ? here + 24 : Math.min(room, here - tip.offsetWidth))}px`;
      tip.style.top = `${holder.offsetTop + 6}px`;
    };
    picture.addEventListener("pointermove", move);
    picture.addEventListener("pointerdown", move);
  };

  const legend = (chart, figure) => {
    const names = labels(chart);
    if (names.length < 2) return;
    const box = html("div", "legend", figure);
    names.forEach((name, index) => {
      const line = chart.lines.find((candidate) => candidate.label === name);
      const entry = html("span", line.style || "", box);
      if (several && !chart.stacked) {
        const sample = svg("svg", { viewBox: "0 0 30 8", class: "sample" }, entry);
        const style = `stroke:currentColor;stroke-dasharray:${dashes(chart, name) || "none"}`;
        svg("line", { class: `curve ${line.style || ""}`, x1: 0, x2: 28, y1: 4, y2: 4, style }, sample);
      } else {
        const swatch = html("i", "", entry);
        swatch.style.background = colour(chart, line, index);
        if (line.style === "faint") swatch.style.opacity = 0.33;
      }
      html("span", "", entry, name);
    });
  };

  const frame = (chart) => {
    const figure = html("figure", chart.wide ? "wide" : "", host);
    const caption = html("figcaption", "", figure, chart.title);
    html("small", "", caption, chart.unit);
    if (!chart.stacked) {
      const button = html("button", "", caption, "log");
      button.type = "button";
      button.setAttribute("aria-pressed", chart.scale === "log");
      button.addEventListener("click", () => {
        chart.scale = chart.scale === "log" ? null : "log";
        button.setAttribute("aria-pressed", chart.scale === "log");
        draw(chart);
      });
    }
    const holder = html("div", "", figure), tip = html("div", "tip", figure);
    tip.hidden = true;
    legend(chart, figure);
    chart.parts = { figure, holder, tip };
  };

  const drawAll = () => data.charts.forEach(draw);
  const controls = () => {
    const bar = document.getElementById("controls");
    const group = html("span", "", bar);
    for (const name of ["tokens", "steps", "hours"]) {
      const button = html("button", "", group, name);
      button.type = "button";
      button.setAttribute("aria-pressed", name === state.x);
      button.addEventListener("click", () => {
        state.x = name;
        for (const other of group.children) other.setAttribute("aria-pressed", other === button);
        drawAll();
      });
    }
    if (several) data.runs.forEach((run, number) => {
      const label = html("label", "", bar), box = html("input", "", label);
      box.type = "checkbox";
      box.checked = true;
      const swatch = html("i", "swatch", label);
      swatch.style.background = `var(--c${number % 8})`;
      html("span", "", label, run.name);
      box.addEventListener("change", () => {
        if (box.checked) state.hidden.delete(number); else state.hidden.add(number);
        drawAll();
      });
    });
  };

  controls();
  data.charts.forEach(frame);
  drawAll();
  let waiting = 0, widest = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === widest) return;  // a phone's address bar comes and goes
    widest = window.innerWidth;
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(drawAll);
  });
  document.body.dataset.drawn = data.charts.length;
})();

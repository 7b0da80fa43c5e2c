// Draws the lanes of a run: one row for each request, time from left to right. Every position is a time that the server measured;
// what is still running is drawn up to the server's clock. Nothing here asks the server or knows the rest of the page.

const SVG = "http://www.w3.org/2000/svg";

export function svg(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes ?? {})) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Microseconds as somebody would say them. */
export function time(us) {
  if (us === null || us === undefined) return "–";
  if (us < 1000) return `${us} µs`;
  if (us < 10_000) return `${(us / 1000).toFixed(1)} ms`;
  if (us < 1_000_000) return `${Math.round(us / 1000)} ms`;
  return `${(us / 1e6).toFixed(2)} s`;
}

/** How high a lane is. Two hundred of them still have a gap between them. */
function pitch(lanes, small) {
  const steps = small ? [[8, 16], [24, 9], [60, 6], [Infinity, 3]] : [[8, 34], [24, 24], [50, 15], [100, 9], [Infinity, 6]];
  return steps.find(([most]) => lanes <= most)[1];
}

/** Where the axis has its marks: whole numbers, at a distance that leaves room for their labels. */
function ticks(most, width) {
  const wish = most / Math.max(3, width / 84);
  const power = 10 ** Math.floor(Math.log10(wish));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((step) => step >= wish);
  const marks = [];
  for (let at = 0; at <= most; at += step) marks.push(at);
  const [unit, by] = most < 2000 ? ["µs", 1] : most < 2e6 ? ["ms", 1e3] : ["s", 1e6];
  return marks.map((at) => ({ at, label: `${Number((at / by).toPrecision(6))} ${unit}` }));
}

/**
 * Draws `run` into `holder`.
 *
 * `most` is what the axis reaches to, so that several drawings can share a scale; `picked` is the request that is looked at.
 */
export function draw(holder, run, { most, picked = 0, small = false } = {}) {
  const lanes = run.lanes;
  const row = pitch(lanes.length, small);
  const roomy = row >= 15;
  const width = Math.max(240, holder.clientWidth);
  const [left, right, top] = [lanes.length > 99 ? 32 : 26, roomy && !small && run.lost > 0 ? (width < 500 ? 30 : 76) : 14, 24];
  const height = top + row * lanes.length + 6;
  const reach = Math.max(most ?? 0, 1000);
  const x = (us) => left + ((width - left - right) * us) / reach;
  const y = (n) => top + row * (n - 1);
  const bar = Math.max(2, Math.round(row * 0.62));
  const slim = Math.max(1.5, Math.round(bar * 0.5));
  const now = run.now_us;

  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
  for (const { at, label } of ticks(reach, width - left - right)) {
    const place = Math.round(x(at)) + 0.5;
    picture.append(svg("line", { class: "grid", x1: place, x2: place, y1: top - 5, y2: height - 4 }));
    const end = place > width - 40;
    picture.append(svg("text", { x: end ? width : place, y: 12, "text-anchor": end ? "end" : at === 0 ? "start" : "middle" }, label));
  }
  if (picked) picture.append(svg("rect", { class: "picked", x: 0, y: y(picked), width, height: row, rx: 3 }));

  // A label for every lane, or for as many as there is room for.
  const every = [1, 2, 5, 10, 20].find((step) => step * row >= 13);
  for (const lane of lanes) {
    const group = svg("g", { class: lane.lost ? "lane gone" : "lane" });
    const middle = y(lane.n) + row / 2;
    if (lane.n === 1 || lane.n % every === 0 || lane.n === picked) {
      const near = picked && lane.n !== picked && Math.abs(lane.n - picked) * row < 13;
      if (!near) {
        const number = svg("text", { class: lane.n === picked ? "n picked-n" : "n", x: left - 8, y: middle + 4, "text-anchor": "end" }, String(lane.n));
        group.append(number);
      }
    }
    // The least that can be seen, so that a hold of microseconds is not left out.
    const rect = (kind, from, to, high, least = 1.5) => {
      const start = x(from);
      const long = Math.max(least, x(to ?? now) - start);
      const crisp = kind === "working" && roomy ? {} : { "shape-rendering": "crispEdges" };
      group.append(svg("rect", { class: kind, x: start, y: middle - high / 2, width: long, height: high, ...crisp }));
    };
    if (lane.queued_us !== null) {
      const end = lane.opened_us ?? lane.done_us ?? now;
      if (x(end) - x(lane.queued_us) > 1) {
        group.append(svg("line", { class: "waiting", x1: x(lane.queued_us), x2: x(end), y1: middle, y2: middle, "stroke-width": row < 8 ? 1 : 2 }));
      }
    }
    if (lane.holds && lane.opened_us !== null) rect("holding", lane.opened_us, lane.held_until_us ?? lane.done_us, bar, 2.5);
    if (lane.work_began_us !== null) rect("working", lane.work_began_us, lane.work_ended_us, row < 8 ? bar - (lane.holds ? 2 : 0) || 1 : slim);
    if (!lane.holds && lane.saving_us !== null) rect("saving", lane.saving_us, lane.released_us ?? lane.done_us, bar, 2.5);
    const end = lane.released_us === null ? null : x(lane.released_us);
    if (end !== null && lane.lost) {
      const [size, place] = [Math.min(4, row / 2 - 0.4), end + Math.min(9, 3 + row / 3)];
      group.append(svg("path", { class: "cross", d: `M${place - size} ${middle - size}l${2 * size} ${2 * size}m0 ${-2 * size}l${-2 * size} ${2 * size}`, ...(row < 8 ? { "stroke-width": 1.25 } : {}) }));
      if (roomy && !small && right > 70 && lane.lost_to) group.append(svg("text", { class: "why", x: place + 9, y: middle + 4 }, `lost to ${lane.lost_to}`));
    } else if (end !== null && lane.outcome === "saved" && roomy && !lane.holds) {
      group.append(svg("circle", { class: "saved", cx: end + 7, cy: middle, r: 2.75 }));
    }
    if (lane.done_us !== null && lane.outcome !== "saved" && lane.outcome !== "read") {
      group.append(svg("circle", { class: "refused", cx: x(lane.done_us) + 7, cy: middle, r: Math.min(4, row / 2 - 0.5) }));
    }
    picture.append(group);
  }

  for (const hand of run.handovers ?? []) {
    const from = lanes[hand.from - 1];
    const [down, above] = [hand.to > hand.from, Math.abs(hand.to - hand.from) === 1];
    const [x1, x2] = [x(Math.min(from.held_until_us, hand.at_us)), x(hand.at_us)];
    const y1 = y(hand.from) + row / 2 + (down ? bar / 2 : -bar / 2);
    const y2 = y(hand.to) + row / 2 + (down ? -bar / 2 : bar / 2);
    if (!roomy && !above) continue;
    picture.append(svg("path", { class: "hand", d: `M${x1} ${y1}V${(y1 + y2) / 2}H${x2}V${y2}`, ...(roomy ? {} : { "stroke-width": 0.75 }) }));
    if (roomy) {
      const tip = down ? -4 : 4;
      picture.append(svg("path", { class: "hand-tip", d: `M${x2 - 3} ${y2 + tip}h6L${x2} ${y2 + (down ? 1 : -1)}z` }));
    }
  }

  const lane = lanes[picked - 1];
  if (lane?.lost && lane.lost_to) {
    // From the update that was lost to the write that wiped it out.
    const over = lanes[lane.lost_to - 1];
    const way = over.n > lane.n ? 1 : -1;
    const [x1, y1] = [x(lane.released_us), y(lane.n) + row / 2 + (way * bar) / 2];
    const [x2, y2] = [x(over.released_us), y(over.n) + row / 2 - (way * bar) / 2];
    const half = (y1 + y2) / 2;
    picture.append(svg("path", { class: "over", d: `M${x1} ${y1}C${x1} ${half} ${x2} ${half} ${x2} ${y2}` }));
    picture.append(svg("path", { class: "over-tip", d: `M${x2 - 4} ${y2 - 6 * way}h8L${x2} ${y2 + way}z` }));
  }
  holder.replaceChildren(picture);
  return { at: (offset) => Math.min(lanes.length, Math.max(1, Math.floor((offset - top) / row) + 1)) };
}

/** What the marks mean that this run can have, as pieces of a legend. */
export function legend(strategy, lost) {
  const sample = (text, ...marks) => {
    const span = document.createElement("span");
    span.append(svg("svg", { width: 30, height: 16, viewBox: "0 0 30 16", "aria-hidden": "true" }, ...marks), text);
    return span;
  };
  const locks = ["exclusive", "early_release", "read_only"].includes(strategy);
  const pieces = [];
  if (locks) pieces.push(sample("waits", svg("line", { class: "waiting", x1: 0, x2: 30, y1: 8, y2: 8, "stroke-width": 2 })));
  if (locks) pieces.push(sample("holds the lock", svg("rect", { class: "holding", y: 2, width: 30, height: 12 })));
  pieces.push(sample("works", svg("rect", { class: "working", x: 0.5, y: 5, width: 29, height: 6 })));
  if (strategy === "no_lock" || strategy === "merge") {
    pieces.push(sample("saves", svg("rect", { class: "saving", x: 8, y: 2, width: 5, height: 12 }), svg("circle", { class: "saved", cx: 20, cy: 8, r: 2.75 })));
  }
  if (strategy === "exclusive" || strategy === "early_release") {
    pieces.push(sample("hands over", svg("path", { class: "hand", d: "M15 0V11" }), svg("path", { class: "hand-tip", d: "M12 10h6l-3 5z" })));
  }
  if (lost) {
    const hatched = svg("g", { class: "gone" }, svg("rect", { class: "working", x: 0.5, y: 5, width: 16, height: 6 }));
    pieces.push(sample("was lost", hatched, svg("path", { class: "cross", d: "M20 4l8 8m0 -8l-8 8" })));
  }
  return pieces;
}

// What a test asks of the page as it is drawn. Everything is measured, nothing is taken from the style sheet.
const seen = (element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && element.getClientRects().length > 0;
const colour = (text) => {
  const numbers = text.match(/[\d.]+/g)?.map(Number) ?? [0, 0, 0, 0];
  return { rgb: numbers.slice(0, 3), alpha: text.startsWith("rgb") ? numbers[3] ?? 1 : 0 };
};
const ground = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const { rgb, alpha } = colour(getComputedStyle(at).backgroundColor);
    if (alpha === 1) return rgb;
  }
  return colour(getComputedStyle(document.documentElement).colorScheme === "dark" ? "rgb(0,0,0)" : "rgb(255,255,255)").rgb;
};
const light = (rgb) => {
  const [r, g, b] = rgb.map((value) => value / 255).map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (one, other) => {
  const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};

function pale() {
  const faults = [];
  const judge = (element, ink, least, what) => {
    const ratio = contrast(colour(ink).rgb, ground(element));
    if (ratio < least) faults.push(`${ratio.toFixed(2)} < ${least}: ${what}`);
  };
  for (const element of document.body.querySelectorAll("*")) {
    if (!seen(element)) continue;
    const style = getComputedStyle(element);
    const written = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim() !== "");
    if (written || /^(INPUT|SELECT)$/.test(element.tagName)) {
      const size = parseFloat(style.fontSize);
      const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
      const ink = element instanceof SVGElement ? style.fill : style.color;
      judge(element, ink, large ? 3 : 4.5, `${element.tagName} ${element.className?.baseVal ?? element.className} "${element.textContent.trim().slice(0, 40)}"`);
    }
    const kind = element.className?.baseVal;
    if (kind === "holding" || kind === "saving" || kind === "saved" || kind === "hand-tip") judge(element, style.fill, 3, kind);
    if (kind === "working" || kind === "waiting" || kind === "cross" || kind === "hand" || kind === "over") judge(element, style.stroke, 3, kind);
  }
  return faults;
}

/** Where each lane is drawn, back in microseconds by the marks of its axis. */
function drawn(holder) {
  const marks = [...holder.querySelectorAll("line.grid")].map((line) => Number(line.getAttribute("x1")));
  const labels = [...holder.querySelectorAll("svg > text")].map((text) => {
    const [number, unit] = text.textContent.split(" ");
    return Number(number) * { "µs": 1, ms: 1000, s: 1e6 }[unit];
  });
  // Marks stand on whole pixels, so the farthest ones tell the scale best.
  const scale = (labels.at(-1) - labels[0]) / (marks.at(-1) - marks[0]);
  const time = (x) => (x - marks[0]) * scale;
  const bars = (group, kind) => [...group.querySelectorAll(`rect.${kind}`)].map((rect) => {
    const [x, width] = [Number(rect.getAttribute("x")), Number(rect.getAttribute("width"))];
    return [time(x), time(x + width)];
  });
  return {
    pixel: scale,
    marks,
    lanes: [...holder.querySelectorAll("g.lane")].map((group) => ({
      working: bars(group, "working"), holding: bars(group, "holding"), gone: group.classList.contains("gone"), crosses: group.querySelectorAll(".cross").length,
    })),
  };
}

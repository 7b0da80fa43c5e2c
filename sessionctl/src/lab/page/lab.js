// The page of the lab: what is chosen, what is asked of the server, and where its answers go. Every number comes from the server,
// from the very address that the page is at; every text is put in as text.

import { draw, legend, time } from "/lanes.js";

const $ = (id) => document.getElementById(id);
const JSON_TYPE = "application/json";

/** What the server offers: stores, strategies, presets, limits, and the token for what changes something. */
let lab;
/** The run that is shown, the comparison that is shown, and the request that is looked at. */
let shown = null;
let compared = null;
let picked = 0;
let view = "run";
/** Where the run and the comparison are that were asked for last; what is not over is followed again when it is looked at. */
const latest = { run: null, compare: null };
/** Counts what is followed, so that whatever is no longer looked at is no longer asked for. */
let watch = 0;

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

async function ask(address, body) {
  const headers = { accept: JSON_TYPE };
  const options = { headers, cache: "no-store", credentials: "omit" };
  if (body) {
    Object.assign(headers, { "content-type": JSON_TYPE, "x-lab-token": lab.token });
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(address, options);
  } catch {
    throw new Error("The lab does not answer. Is it still running in its terminal?");
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error.message);
  return answer;
}

// Views

const HEADLINES = {
  run: ["Many requests, one session", "Each request reads a counter from the session, works for a while, and writes the counter plus one. At the end the counter should have counted every request."],
  compare: ["The same requests, five ways", "Every strategy runs the same requests on the same store, one strategy after the other, and is drawn on the same scale."],
  sessions: ["Who holds what", "The live sessions of a store and the locks on them, by handles that are good for nothing but this page."],
};

function place() {
  const [, name, id] = location.pathname.split("/");
  return { view: name === "compare" || name === "sessions" ? name : "run", id: id ?? null };
}

function go(address) {
  if (address !== location.pathname) history.pushState(null, "", address);
}

function show(next) {
  view = next;
  watch += 1;
  for (const name of ["run", "compare", "sessions"]) {
    const [tab, chosen] = [$(`tab-${name}`), name === view];
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    $(`panel-${name}`).hidden = !chosen;
  }
  $("bench").hidden = view === "sessions";
  $("strategies").hidden = view === "compare";
  [$("headline").textContent, $("lead").textContent] = HEADLINES[view];
  $("go").textContent = view === "compare" ? "Run all five" : "Run";
  document.title = `${$(`tab-${view}`).textContent} – sessionkit lab`;
  if (view === "run") drawRun();
  if (view === "compare") drawCompare();
  if (view === "sessions") listen(watch);
  const report = view === "compare" ? compared : shown;
  if (latest[view] && (!report || report.state === "running")) follow(latest[view], view);
}

function choose(next) {
  const address = { run: latest.run ?? "/", compare: latest.compare ?? "/compare", sessions: "/sessions" };
  go(address[next]);
  show(next);
}

async function arrive() {
  const { view: next, id } = place();
  if (id !== null && next !== "sessions" && location.pathname !== latest[next]) {
    latest[next] = location.pathname;
    if (next === "compare") compared = null;
    else [shown, picked] = [null, 0];
  }
  show(next);
}

// Settings

function plan() {
  const whole = (text, most, what, least) => {
    const number = /^\d{1,6}$/.test(text.trim()) ? Number(text) : NaN;
    if (!(number >= least && number <= most)) throw new Error(`${what}: a whole number from ${least} to ${most}.`);
    return number;
  };
  const { limits } = lab;
  const wish = { backend: $("backend").value, apart_ms: whole($("apart").value, limits.apart_ms, "Arrive apart", 0) };
  const list = works();
  const work = (text) => whole(text, limits.work_ms, "Each works for", 1);
  if (list.length > 1) {
    wish.works_ms = list.map(work);
  } else {
    Object.assign(wish, { requests: whole($("requests").value, limits.requests, "Requests", 1), work_ms: work($("works").value) });
  }
  return wish;
}

function works() {
  return $("works").value.split(",").map((text) => text.trim()).filter((text) => text !== "");
}

/** A list says itself how many requests there are. */
function match() {
  const list = works();
  $("requests").disabled = list.length > 1;
  if (list.length > 1) $("requests").value = String(list.length);
}

function strategy() {
  return document.querySelector('input[name="strategy"]:checked').value;
}

async function submit() {
  if ($("go").getAttribute("aria-disabled") === "true") return;
  const error = $("plan-error");
  error.textContent = "";
  try {
    const wanted = view;
    const wish = plan();
    if (wanted === "run") wish.strategy = strategy();
    busy(true);
    const { url } = await ask(wanted === "compare" ? "/compare" : "/runs", wish);
    latest[wanted] = url;
    if (wanted === "compare") compared = null;
    else [shown, picked] = [null, 0];
    // Whoever has gone on to another tab finds it when he comes back.
    if (wanted !== view) return;
    go(url);
    // On a phone the lanes are below all that can be chosen.
    if (matchMedia("(max-width: 860px)").matches) $("result").scrollIntoView({ block: "start" });
    await follow(url, wanted);
  } catch (problem) {
    error.textContent = problem.message;
  } finally {
    busy(false);
  }
}

function busy(running) {
  // Not disabled: that would take the focus away from whoever pressed it by key.
  $("go").setAttribute("aria-disabled", String(running));
}

/** Shows a run while it goes on, and what became of it. */
async function follow(address, name) {
  const mine = ++watch;
  for (;;) {
    let report;
    try {
      report = await ask(address);
    } catch (problem) {
      const sentence = $(name === "compare" ? "compare-sentence" : "sentence");
      sentence.classList.add("failed");
      sentence.textContent = problem.message;
      return;
    }
    if (mine !== watch) return;
    if (name === "compare") {
      compared = report;
      drawCompare();
    } else {
      shown = report;
      drawRun();
    }
    $("result").dataset.shows = `${address} ${report.state}`;
    if (report.state !== "running") return;
    await new Promise((done) => setTimeout(done, 90));
  }
}

// One run

function drawRun() {
  const run = shown?.runs[0];
  const holder = $("lanes");
  $("run-json").href = shown ? `/runs/${shown.id}?format=json` : "/?format=json";
  if (!run) {
    const first = make("p", {}, "Press Run. Twenty requests of one visitor will change one session at the same time, and each gets a lane here: what it waited, what it worked, and what became of its change.");
    holder.className = "lanes empty";
    holder.replaceChildren(first);
    $("all").hidden = true;
    $("legend").replaceChildren();
    $("readout").hidden = true;
    return;
  }
  const done = run.state === "done";
  holder.className = "lanes";
  $("all").hidden = !done;
  $("readout").hidden = false;
  numbers(run, done);
  const sentence = $("sentence");
  sentence.classList.toggle("failed", run.state === "failed");
  // Said once, when it is known: it is read out.
  const said = done ? run.sentence : run.state === "failed" ? `The store did not go along. The terminal of the lab says more, under ${run.correlation}.` : "";
  if (sentence.textContent !== said) sentence.textContent = said;
  $("legend").replaceChildren(...legend(run.strategy, done && run.lost > 0));
  const drawing = draw(holder, run, { most: done ? run.total_us : Math.max(run.now_us, guess(run)), picked });
  holder.onpointermove = (event) => pick(drawing.at(event.clientY - holder.getBoundingClientRect().top));
  inspector(run);
  if (done) table(run);
}

/** Room on the axis while nobody knows yet how long it takes. */
function guess({ strategy: name }) {
  const { works_ms: each, apart_ms: apart } = shown.plan;
  const longest = Math.max(...each) + apart * (each.length - 1);
  return 1000 * (name === "exclusive" ? each.reduce((sum, work) => sum + work, 0) : longest);
}

function numbers(run, done) {
  const write = (id, text) => { $(id).textContent = text; };
  write("n-expected", done ? run.expected : "–");
  write("n-found", done ? run.found : "–");
  write("n-lost", done ? run.lost : "–");
  write("n-total", time(done ? run.total_us : run.now_us));
  write("n-wait", done ? time(run.wait_max_us) : "–");
  write("n-last", done ? time(run.wait_last_us) : "–");
  write("t-last", `Request ${run.lanes.length} waited`);
  $("lost-tile").className = !done ? "" : run.lost > 0 ? "bad" : "good";
}

function pick(n) {
  const run = shown?.runs[0];
  if (!run || n === picked) return;
  picked = Math.min(run.lanes.length, Math.max(1, n));
  drawRun();
}

function inspector(run) {
  const holder = $("lanes");
  const lane = run.lanes[picked - 1];
  holder.tabIndex = 0;
  const told = lane ? tell(lane) : "Point at a lane, or move through them with the arrow keys.";
  for (const [name, value] of Object.entries({
    role: "slider", "aria-label": "Request to look at", "aria-orientation": "vertical",
    "aria-valuemin": 1, "aria-valuemax": run.lanes.length, "aria-valuenow": picked || 1, "aria-valuetext": told,
  })) holder.setAttribute(name, value);
  const out = $("readout");
  if (!lane) {
    out.textContent = told;
    return;
  }
  const name = `Request ${lane.n}`;
  const lost = lane.lost ? make("span", { className: "lost" }, ` Its change is gone: request ${lane.lost_to} wrote over it.`) : null;
  out.replaceChildren(make("strong", {}, name), told.slice(name.length).replace(lost?.textContent ?? "", ""));
  if (lost) out.append(lost);
}

function tell(lane) {
  const span = (from, to) => (from === null || to === null ? null : to - from);
  const parts = [
    ["waited", span(lane.queued_us, lane.opened_us)],
    ["worked", span(lane.work_began_us, lane.work_ended_us)],
    ["saved in", span(lane.saving_us, lane.released_us)],
    ["held the lock for", lane.holds ? span(lane.opened_us, lane.held_until_us) : null],
  ].filter(([, us]) => us !== null).map(([what, us]) => `${what} ${time(us)}`);
  const counted = lane.saw === null ? "" : lane.outcome === "saved" ? ` It read ${lane.saw} and added one.` : ` It read ${lane.saw}.`;
  const refused = lane.outcome && !["saved", "read"].includes(lane.outcome) ? ` It was refused: ${lane.outcome.replace("_", " ")}.` : "";
  const lost = lane.lost ? ` Its change is gone: request ${lane.lost_to} wrote over it.` : "";
  return `Request ${lane.n} ${parts.join(", ") || "has not asked yet"}.${counted}${refused}${lost}`;
}

function table(run) {
  if (!$("all").open) return;
  const heads = ["Request", "Arrived", "Waited", "Worked", "Saved in", "Done at", "Read", "Outcome"];
  const gap = (to, from) => (to === null || from === null ? "–" : time(to - from));
  const rows = run.lanes.map((lane) => make("tr", {},
    make("th", { scope: "row" }, String(lane.n)),
    ...[time(lane.arrived_us), gap(lane.opened_us, lane.queued_us), gap(lane.work_ended_us, lane.work_began_us), gap(lane.released_us, lane.saving_us), time(lane.done_us), lane.saw ?? "–"]
      .map((text) => make("td", { className: "num" }, String(text))),
    make("td", { className: lane.lost ? "bad" : "" }, lane.lost ? `✕ lost to ${lane.lost_to}` : (lane.outcome ?? "–").replace("_", " ")),
  ));
  $("lane-table").replaceChildren(head(heads, 7), make("tbody", {}, ...rows));
}

/** A row of headings; those of numbers stand over them, on the right. */
function head(names, numbers) {
  return make("thead", {}, make("tr", {}, ...names.map((name, at) =>
    make("th", { scope: "col", className: at > 0 && at < numbers ? "num" : "" }, name))));
}

/** Names each field after its column, for where there is no room for columns. */
function label(table) {
  const names = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent);
  for (const row of table.tBodies[0].rows) {
    for (const [at, cell] of [...row.cells].entries()) if (cell.colSpan === 1 && names[at]) cell.dataset.label = names[at];
  }
}

// All strategies

function drawCompare() {
  $("compare-json").href = compared ? `/compare/${compared.id}?format=json` : "/compare?format=json";
  const sentence = $("compare-sentence");
  const [rows, drawings] = [$("compare-table"), $("compare-lanes")];
  if (!compared) {
    sentence.textContent = "Press Run all five, or take the article's case: three requests that work 20, 30 and 25 ms, and a fourth that has to wait for all of them, unless it need not.";
    rows.replaceChildren(make("tbody", {}, make("tr", {}, make("td", { className: "none" }, "Nothing has been compared yet."))));
    drawings.replaceChildren();
    return;
  }
  const last = compared.plan.works_ms.length;
  const runs = compared.runs;
  sentence.classList.toggle("failed", compared.state === "failed");
  const said = {
    running: () => `Running: ${runs.length} of ${lab.strategies.length} …`,
    done: () => verdict(runs, last),
    failed: () => `The store did not go along. The terminal of the lab says more, under ${runs.at(-1)?.correlation}.`,
  }[compared.state]();
  if (sentence.textContent !== said) sentence.textContent = said;
  const cells = (run) => run.state !== "done" ? Array(5).fill(make("td", { className: "num" }, "…")) : [
    make("td", { className: "num" }, milliseconds(run.total_us)),
    make("td", { className: "num" }, milliseconds(run.wait_last_us)),
    make("td", { className: "num" }, milliseconds(run.wait_max_us)),
    make("td", { className: "num" }, `${run.found} of ${run.expected}`),
    make("td", { className: run.lost ? "num bad" : "num good" }, run.lost ? `✕ ${run.lost}` : "✓ 0"),
  ];
  rows.replaceChildren(
    head(["Strategy", "Total", `Request ${last} waited`, "Longest wait", "Counted", "Lost"], 6),
    make("tbody", {}, ...runs.map((run) => make("tr", {}, make("th", { scope: "row" }, run.title), ...cells(run)))),
  );
  label(rows);
  const most = Math.max(...runs.map((run) => run.total_us ?? run.now_us), 1000);
  drawings.replaceChildren();
  for (const run of runs) {
    const holder = make("div", { className: "lanes" });
    const facts = run.state === "done" ? `${milliseconds(run.total_us)} in all, request ${last} waited ${milliseconds(run.wait_last_us)}` : "";
    const lost = run.lost ? make("span", { className: "bad" }, `✕ ${run.lost} lost`) : null;
    drawings.append(make("section", { className: "card" }, make("h3", {}, run.title, make("span", {}, facts), lost), holder));
    draw(holder, run, { most, small: true });
  }
}

function milliseconds(us) {
  return `${(us / 1000).toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 })} ms`;
}

function verdict(runs, last) {
  const by = Object.fromEntries(runs.map((run) => [run.strategy, run]));
  const [none, lock, early] = [by.no_lock, by.exclusive, by.early_release];
  const loss = none.lost > 0 ? `Without a lock, ${none.lost} of ${none.expected} updates were lost` : "Even without a lock nothing was lost this time";
  return `${loss}. With the lock held for the whole request none were, but it took ${time(lock.total_us)}, and request ${last} waited ${time(lock.wait_last_us)}. Giving the lock back early kept every update, in ${time(early.total_us)}: request ${last} waited ${time(early.wait_last_us)}.`;
}

// Sessions and locks

async function listen(mine) {
  while (mine === watch) {
    if ($("auto").checked && !document.hidden) await list(mine);
    await new Promise((done) => setTimeout(done, 1000));
  }
}

async function list(mine = watch) {
  const backend = $("listed").value;
  const address = `/sessions?backend=${encodeURIComponent(backend)}`;
  $("sessions-json").href = `${address}&format=json`;
  let listing;
  try {
    listing = await ask(address);
  } catch (problem) {
    if (mine === watch) say(problem.message, true);
    return;
  }
  if (mine !== watch || backend !== $("listed").value) return;
  const lock = listing.locks.map((lock) => [lock.handle, [
    lock.holder ?? "not known to this store", age(lock.held_ms, "not known"), age(lock.lease_left_ms, "no limit"),
    String(lock.waiting ?? "not known"),
  ], (row) => {
    const button = make("button", { type: "button", className: "secondary" }, "Release");
    button.dataset.handle = lock.handle;
    button.setAttribute("aria-label", `Release the lock of ${lock.handle}`);
    button.onclick = () => release(backend, lock.handle);
    row.append(make("td", {}, button));
    if (lock.ours) row.cells[1].append(make("span", { className: "small-note" }, " – this lab, for show"));
  }]);
  rows($("locks"), [["Session"], ["Holder"], ["Held for", "num"], ["Lease left", "num"], ["Queue", "num"], ["Release"]], lock, "Nobody holds a lock. Hold a session, or start a run, to see one.");
  const session = listing.sessions.map((session) => [session.handle, [
    `${session.bytes.toLocaleString("en")} bytes`, age(session.left_ms, "–"), session.locked ? "held" : "free",
  ], () => {}]);
  rows($("sessions"), [["Session"], ["Size", "num"], ["Left of its life", "num"], ["Lock"]], session, "There are no sessions in this store.");
  $("more").hidden = !listing.more;
}

/**
 * Shows one row for each handle. Rows that are there already stay, with other numbers in them: a button must not be put anew under a
 * finger, a mouse or the focus.
 */
function rows(table, columns, wanted, none) {
  if (!table.tHead) {
    table.append(make("thead", {}, make("tr", {}, ...columns.map(([name, kind]) => make("th", { scope: "col", className: kind ?? "" }, name)))), make("tbody"));
  }
  const body = table.tBodies[0];
  const before = new Map([...body.rows].map((row) => [row.dataset.handle, row]));
  const after = wanted.map(([handle, texts, finish]) => {
    const row = before.get(handle) ?? make("tr");
    if (!row.dataset.handle) {
      row.dataset.handle = handle;
      row.append(make("th", { scope: "row", className: "handle" }, handle));
      for (const [at] of texts.entries()) row.append(make("td", { className: columns[at + 1][1] ?? "" }, make("span")));
      finish(row);
      for (const [at, cell] of [...row.cells].entries()) if (!cell.querySelector("button")) cell.dataset.label = columns[at][0];
    }
    for (const [at, text] of texts.entries()) row.cells[at + 1].firstChild.textContent = text;
    return row;
  });
  if (after.length === 0) {
    const row = before.get("none") ?? make("tr", {}, make("td", { className: "none", colSpan: columns.length }, none));
    row.dataset.handle = "none";
    after.push(row);
  }
  for (const row of [...body.rows]) if (!after.includes(row)) row.remove();
  for (const [at, row] of after.entries()) if (body.rows[at] !== row) body.insertBefore(row, body.rows[at] ?? null);
}

function age(ms, unknown) {
  if (ms === null) return unknown;
  const seconds = Math.floor(ms / 1000);
  return seconds < 60 ? `${(ms / 1000).toFixed(1)} s` : `${Math.floor(seconds / 60)} m ${String(seconds % 60).padStart(2, "0")} s`;
}

async function release(backend, handle) {
  try {
    const { reason, released } = await ask("/sessions/release", { backend, handle });
    say(reason, !released);
  } catch (problem) {
    say(problem.message, true);
  }
  await list();
}

async function hold() {
  try {
    const { handle } = await ask("/sessions/hold", { backend: $("listed").value });
    say(`The lab holds ${handle}; two requests wait for it. Release it, and the first of them gets it.`, false);
  } catch (problem) {
    say(problem.message, true);
  }
  await list();
}

function say(text, failed) {
  $("locks-status").classList.toggle("failed", failed);
  $("locks-status").textContent = text;
}

// The beginning

function fill() {
  for (const { name, title, what, call } of lab.strategies) {
    const input = make("input", { type: "radio", name: "strategy", value: name, checked: name === "no_lock" });
    input.setAttribute("aria-labelledby", `name-${name}`);
    input.setAttribute("aria-describedby", `what-${name}`);
    $("strategies").append(make("label", { className: "strategy" }, input,
      make("span", { className: "name", id: `name-${name}` }, title), make("code", {}, call), make("span", { className: "what", id: `what-${name}` }, what)));
  }
  for (const select of [$("backend"), $("listed")]) {
    select.replaceChildren(...lab.backends.map(({ name, label, answers }) =>
      make("option", { value: name, disabled: !answers }, answers ? label : `${label} – does not answer`)));
    select.value = lab.backends.find(({ answers }) => answers)?.name ?? "";
  }
  for (const preset of lab.presets) {
    const button = make("button", { type: "button" }, preset.title);
    button.dataset.preset = preset.name;
    button.onclick = () => {
      const [first] = preset.works_ms;
      const even = preset.works_ms.every((work) => work === first);
      $("works").value = even ? String(first) : preset.works_ms.join(", ");
      $("requests").value = String(preset.works_ms.length);
      $("apart").value = String(preset.apart_ms);
      match();
      submit();
    };
    $("presets").append(button);
  }
  $("guard").textContent = `Listening at ${lab.address}. The lab answers its own page and nobody else's: requests of other origins and sites, and those sent to another name, are refused, and what changes something needs a token that only this page has. Ids and payloads never leave it, and nothing here is loaded from anywhere else.`;
}

function theme(next) {
  document.documentElement.style.colorScheme = next === "auto" ? "" : next;
  $("theme").textContent = `Theme: ${next}`;
  localStorage.setItem("lab-theme", next);
}

function keys() {
  const tabs = ["run", "compare", "sessions"];
  for (const name of tabs) $(`tab-${name}`).onclick = () => choose(name);
  document.querySelector('[role="tablist"]').onkeydown = (event) => {
    const at = tabs.indexOf(view);
    const next = { ArrowRight: at + 1, ArrowLeft: at + tabs.length - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    choose(tabs[next % tabs.length]);
    $(`tab-${view}`).focus();
  };
  $("lanes").onkeydown = (event) => {
    const run = shown?.runs[0];
    const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (!run || step === undefined) return;
    event.preventDefault();
    pick(Math.min(run.lanes.length, Math.max(1, picked + step)));
  };
  $("plan").onsubmit = (event) => { event.preventDefault(); submit(); };
  $("works").oninput = match;
  $("hold").onclick = hold;
  $("refresh").onclick = () => list();
  $("listed").onchange = () => { say("", false); list(); };
  $("all").ontoggle = () => { if (shown?.runs[0]?.state === "done") table(shown.runs[0]); };
  $("theme").onclick = () => {
    const order = ["auto", "light", "dark"];
    theme(order[(order.indexOf(localStorage.getItem("lab-theme") ?? "auto") + 1) % order.length]);
  };
  let width = 0;
  new ResizeObserver(() => {
    // Height follows from what is drawn, so only the width counts.
    if ($("result").clientWidth === width) return;
    width = $("result").clientWidth;
    if (view === "run") drawRun();
    if (view === "compare") drawCompare();
  }).observe($("result"));
  addEventListener("popstate", arrive);
}

theme(localStorage.getItem("lab-theme") ?? "auto");
try {
  lab = await ask("/");
  fill();
  keys();
  await arrive();
} catch (problem) {
  $("sentence").classList.add("failed");
  $("sentence").textContent = problem.message;
}
document.body.dataset.ready = "true";

// The live page. Whatever agents send goes into text nodes and Maps only: never into markup, attributes that run, or
// property names. Only rows in sight have elements, so thousands of agents cost no more than a screenful.

const MOST_KEY_COLUMNS = 12; // further keys are in an agent's details
const SPARE_ROWS = 6; // drawn above and below what is in sight
const SILENCE_MS = 15_000; // the server sends something every 5 s
const FIRST_RETRY_MS = 500;
const LONGEST_RETRY_MS = 5_000;

const byId = (id) => document.getElementById(id);
const grid = byId("grid");
const body = byId("body");

const agents = new Map(); // id -> {id, label, rows: Map(key -> row), at, text}; the label is the name, if there is one
const keyCounts = new Map(); // key -> number of agents that have it
let keys = []; // those with a column
let shown = []; // the agents that pass the search, in order
let sort = { by: "agent", isDescending: false };
let query = "";
let active = null; // id of the agent with the keyboard focus
let opened = null; // id of the agent in the details
let clockAheadMs = 0; // how far the server's clock is ahead of ours
let pausedAt = null;
let leftOutPairs = 0; // that the server does not hold, and so does not send
let lastEventId = "";
let controller = null;
let generation = 0; // of the stream: a pause ends the current one
let token = sessionStorage.getItem("token") ?? "";
let needsOrder = true;
let isOrderOld = false; // because values changed: rows move once a second, not under the pointer
let isDrawing = false;

// ---- the stream ----

async function follow() {
  const mine = ++generation;
  let retryMs = FIRST_RETRY_MS;
  while (mine === generation) {
    controller = new AbortController();
    const { signal } = controller;
    const stop = controller.abort.bind(controller);
    let silence = setTimeout(stop, SILENCE_MS);
    try {
      const headers = { ...(lastEventId && { "Last-Event-ID": lastEventId }), ...(token && { Authorization: `Bearer ${token}` }) };
      const response = await fetch("metadata/watch", { headers, signal, cache: "no-store" });
      if (response.status === 401) return askForToken();
      if (!response.ok) throw new Error((await response.json()).detail);
      for await (const event of events(response.body)) {
        if (mine !== generation) return;
        clearTimeout(silence);
        silence = setTimeout(stop, SILENCE_MS);
        take(event);
        retryMs = FIRST_RETRY_MS;
        say("live", "live");
      }
      if (mine === generation) say("cut", "reconnecting");
    } catch (error) {
      if (mine === generation) say("cut", error instanceof TypeError || signal.aborted ? "reconnecting" : error.message);
    } finally {
      clearTimeout(silence);
    }
    await new Promise((resolve) => setTimeout(resolve, retryMs));
    retryMs = Math.min(retryMs * 2, LONGEST_RETRY_MS);
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const from = Math.max(0, text.length - 1);
    text += value;
    let start = 0;
    for (let end = text.indexOf("\n\n", from); end >= 0; end = text.indexOf("\n\n", start)) {
      const event = {};
      for (const line of text.slice(start, end).split("\n")) {
        const colon = line.indexOf(": ");
        event[line.slice(0, colon)] = line.slice(colon + 2);
      }
      start = end + 2;
      yield event;
    }
    text = text.slice(start);
  }
}

function take(event) {
  const { now, agents: changed, left_out_pairs } = JSON.parse(event.data);
  leftOutPairs = left_out_pairs;
  clockAheadMs = Date.parse(now) - Date.now();
  lastEventId = event.id;
  if (event.event === "snapshot") {
    agents.clear();
    keyCounts.clear();
    needsOrder = true;
  }
  if (!agents.size) needsSummary = true; // the first rows are counted at once, later ones every second
  for (const { agent_id: id, name, metadata } of changed) {
    let agent = agents.get(id);
    if (!agent) {
      agents.set(id, (agent = { id, label: id, rows: new Map(), at: 0, text: null }));
      needsOrder = true;
    }
    if (name && name !== agent.label) {
      agent.label = name;
      needsOrder = true;
    }
    for (const row of metadata) {
      if (!agent.rows.has(row.key)) {
        keyCounts.set(row.key, (keyCounts.get(row.key) ?? 0) + 1);
        agent.rows = new Map([...agent.rows, [row.key, null]].sort(([a], [b]) => compare(a, b)));
      }
      const at = Date.parse(row.collected_at);
      agent.rows.set(row.key, { value: row.value, error: row.error, at, staleMs: row.stale_after_seconds * 1000 });
      agent.at = Math.max(agent.at, at);
    }
    agent.text = null;
  }
  if (changed.length && (sort.by !== "agent" || query)) isOrderOld = true;
  draw();
}

function say(state, text) {
  byId("status").dataset.state = state;
  if (byId("status").textContent !== text) byId("status").textContent = text;
}

function askForToken() {
  say("cut", "token required");
  byId("login-error").textContent = token ? "This token is wrong." : "";
  byId("token").value = "";
  if (!byId("login").open) byId("login").showModal();
}

byId("login").addEventListener("close", () => {
  token = byId("token").value;
  sessionStorage.setItem("token", token);
  follow();
});

// ---- order ----

const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
const byLabel = (one, two) => compare(one.label, two.label) || compare(one.id, two.id);
const nowMs = () => pausedAt ?? Date.now() + clockAheadMs;
const isStale = (row, now) => now - row.at > row.staleMs;

function tally(agent, now) {
  let errors = 0;
  let stale = 0;
  for (const row of agent.rows.values()) {
    if (row.error) errors += 1;
    if (isStale(row, now)) stale += 1;
  }
  return { errors, stale };
}

function searched(agent) {
  agent.text ??= [agent.id, agent.label, ...[...agent.rows].flatMap(([key, row]) => [key, row.value, row.error])].join("\n").toLowerCase();
  return agent.text.includes(query);
}

function sortKey(agent, now) {
  if (sort.by === "age") return -agent.at;
  if (sort.by === "state") {
    const { errors, stale } = tally(agent, now);
    return -(errors + stale);
  }
  const row = agent.rows.get(sort.by.slice(4));
  if (!row || row.error) return "\uffff";
  const number = Number.parseFloat(row.value);
  return Number.isNaN(number) ? row.value : number;
}

function order() {
  needsOrder = false;
  const common = [...keyCounts].sort(([a, n], [b, m]) => m - n || compare(a, b)).slice(0, MOST_KEY_COLUMNS);
  const wanted = common.map(([key]) => key).sort();
  if (wanted.length !== keys.length || wanted.some((key, index) => key !== keys[index])) {
    keys = wanted;
    drawHead();
  }
  shown = [...agents.values()];
  if (query) shown = shown.filter(searched);
  const sign = sort.isDescending ? -1 : 1;
  if (sort.by === "agent") {
    shown.sort((a, b) => sign * byLabel(a, b));
    return;
  }
  const now = nowMs();
  const sorted = shown.map((agent) => [sortKey(agent, now), agent]);
  sorted.sort(([a, one], [b, two]) => {
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1; // numbers first, whatever the direction
    return sign * compare(a, b) || byLabel(one, two);
  });
  shown = sorted.map(([, agent]) => agent);
}

function sortBy(by, isDescending = sort.by === by && !sort.isDescending) {
  sort = { by, isDescending };
  needsOrder = true;
  drawHead();
  grid.scrollTop = 0;
  draw();
}

// ---- drawing ----

function element(name, className = "", role = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (role) made.setAttribute("role", role);
  return made;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const fullName = ({ id, label }) => (label === id ? id : `${label}\n${id}`);

function age(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  if (seconds < 120) return `${seconds} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172_800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86_400)} d`;
}

function drawHead() {
  const columns = [["agent", "agent"], ["age", "age"], ["state", "state"], ...keys.map((key) => [`key:${key}`, key])];
  byId("head").replaceChildren(
    ...columns.map(([by, label]) => {
      const header = element("div", "", "columnheader");
      if (sort.by === by) header.setAttribute("aria-sort", sort.isDescending ? "descending" : "ascending");
      const button = element("button");
      button.type = "button";
      button.tabIndex = -1; // the keyboard has "Sort by"
      button.title = label;
      const text = element("span");
      text.textContent = label;
      button.append(text);
      button.addEventListener("click", () => sortBy(by));
      header.append(button);
      return header;
    }),
  );
  byId("sort").replaceChildren(
    ...columns.map(([by, label]) => {
      const option = element("option");
      option.value = by;
      option.textContent = label;
      option.selected = by === sort.by;
      return option;
    }),
  );
  byId("direction").textContent = sort.isDescending ? "↓" : "↑";
  grid.style.setProperty("--keys", keys.length);
  body.replaceChildren();
}

function makeRow() {
  const row = element("div", "agent", "row");
  row.append(element("div", "id text", "rowheader"), element("div", "age", "gridcell"), element("div", "state", "gridcell"));
  for (const key of keys) {
    const cell = element("div", "cell", "gridcell");
    const label = element("span", "key text");
    label.textContent = key;
    cell.append(label, " ", element("span", "text"));
    row.append(cell);
  }
  row.addEventListener("click", () => {
    active = row.dataset.agent;
    grid.focus({ preventScroll: true });
    open(active);
  });
  return row;
}

function drawRow(element, agent, index, now) {
  element.dataset.agent = agent.id;
  element.id = `row-${index}`;
  element.style.top = `${index * rowHeight}px`;
  element.setAttribute("aria-rowindex", index + 2);
  element.setAttribute("aria-selected", agent.id === active);
  const { errors, stale } = tally(agent, now);
  element.classList.toggle("stale", stale > 0 && stale === agent.rows.size);
  const [id, when, state, ...cells] = element.children;
  setText(id, agent.label);
  id.title = fullName(agent);
  setText(when, age(now - agent.at));
  const hidden = agent.rows.size - keys.filter((key) => agent.rows.has(key)).length;
  setText(state, [errors && `${errors} error${errors > 1 ? "s" : ""}`, stale && `${stale} stale`, hidden && `+${hidden} keys`].filter(Boolean).join(" · "));
  cells.forEach((cell, column) => {
    const row = agent.rows.get(keys[column]);
    cell.classList.toggle("error", Boolean(row?.error));
    cell.classList.toggle("stale", Boolean(row) && isStale(row, now));
    const text = row ? row.error || row.value : "";
    setText(cell.lastChild, text);
    cell.firstChild.hidden = !row;
    cell.title = row ? `${text}\n${age(now - row.at)} old${isStale(row, now) ? ", stale" : ""}` : "";
  });
}

let rowHeight = 34;
let needsSummary = true; // it walks all pairs, so scrolling alone skips it

function drawNow() {
  isDrawing = false;
  if (needsOrder) order();
  const now = nowMs();
  body.style.height = `${shown.length * rowHeight}px`;
  const first = Math.max(0, Math.floor(grid.scrollTop / rowHeight) - SPARE_ROWS);
  const last = Math.min(shown.length, Math.ceil((grid.scrollTop + grid.clientHeight) / rowHeight) + SPARE_ROWS);
  while (body.children.length > last - first) body.lastChild.remove();
  while (body.children.length < last - first) body.append(makeRow());
  for (let index = first; index < last; index += 1) drawRow(body.children[index - first], shown[index], index, now);
  grid.setAttribute("aria-rowcount", shown.length + 1);
  const at = active === null ? -1 : shown.findIndex((agent) => agent.id === active);
  if (at >= first && at < last) grid.setAttribute("aria-activedescendant", `row-${at}`);
  else grid.removeAttribute("aria-activedescendant");
  if (needsSummary) drawSummary(now);
  drawDetails(now);
}

function draw() {
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(drawNow);
}

function drawSummary(now) {
  needsSummary = false;
  let pairs = 0;
  let errors = 0;
  let stale = 0;
  for (const agent of agents.values()) {
    const tallied = tally(agent, now);
    pairs += agent.rows.size;
    errors += tallied.errors;
    stale += tallied.stale;
  }
  const number = (count) => count.toLocaleString("en");
  const found = query ? `${number(shown.length)} of ` : "";
  const leftOut = leftOutPairs ? ` · about ${number(leftOutPairs)} more pairs left out` : "";
  setText(byId("summary"), `${found}${number(agents.size)} agents · ${number(pairs)} pairs · ${number(errors)} errors · ${number(stale)} stale${leftOut}`);
  byId("empty").hidden = shown.length > 0;
  setText(byId("empty"), query ? "No agent matches the search." : "No agent has reported yet.");
}

function open(id) {
  opened = id;
  drawDetails(nowMs());
  byId("details").showModal();
}

function drawDetails(now) {
  if (opened === null) return;
  const { label, rows } = agents.get(opened) ?? { label: opened, rows: new Map() };
  setText(byId("details-agent"), label);
  setText(byId("details-id"), label === opened ? "" : opened);
  const list = byId("details-rows");
  while (list.children.length > rows.size * 3) list.lastChild.remove();
  while (list.children.length < rows.size * 3) list.append(element("dt"), element("dd"), element("dd", "when"));
  let place = 0;
  for (const [key, row] of rows) {
    const stale = isStale(row, now);
    setText(list.children[place], key);
    const value = list.children[place + 1];
    value.className = row.error ? "error" : stale ? "stale" : "";
    setText(value, row.error ? [row.value, `⚠ ${row.error}`].filter(Boolean).join("\n") : row.value);
    setText(list.children[place + 2], age(now - row.at) + (stale ? " · stale" : ""));
    place += 3;
  }
}

// ---- controls ----

byId("search").addEventListener("input", (event) => {
  query = event.target.value.trim().toLowerCase();
  needsOrder = needsSummary = true;
  grid.scrollTop = 0;
  draw();
});
byId("sort").addEventListener("change", (event) => sortBy(event.target.value, false));
byId("direction").addEventListener("click", () => sortBy(sort.by, !sort.isDescending));
byId("pause").addEventListener("click", togglePause);
byId("details-close").addEventListener("click", () => byId("details").close());
byId("details").addEventListener("close", () => {
  opened = null;
});
grid.addEventListener("scroll", draw, { passive: true });
new ResizeObserver(() => {
  rowHeight = Number.parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));
  draw();
}).observe(grid);

// A pause closes the stream; resuming asks for what changed meanwhile.
function togglePause() {
  const isPaused = pausedAt === null;
  pausedAt = isPaused ? Date.now() + clockAheadMs : null;
  byId("pause").setAttribute("aria-pressed", isPaused);
  byId("pause").textContent = isPaused ? "Resume" : "Pause";
  if (isPaused) {
    generation += 1;
    controller?.abort();
    say("paused", "paused");
  } else {
    say("connecting", "connecting");
    follow();
  }
  draw();
}

const moves = {
  ArrowDown: (at) => at + 1,
  ArrowUp: (at) => at - 1,
  PageDown: (at) => at + Math.floor(grid.clientHeight / rowHeight) - 1,
  PageUp: (at) => at - Math.floor(grid.clientHeight / rowHeight) + 1,
  Home: () => 0,
  End: () => shown.length - 1,
};

grid.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && active !== null && agents.has(active)) {
    event.preventDefault();
    open(active);
  } else if (event.key in moves && shown.length && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    const at = shown.findIndex((agent) => agent.id === active);
    const to = Math.max(0, Math.min(shown.length - 1, moves[event.key](at)));
    active = shown[to].id;
    const top = to * rowHeight;
    const headHeight = byId("head").offsetHeight;
    if (top < grid.scrollTop) grid.scrollTop = top;
    else if (top + rowHeight + headHeight > grid.scrollTop + grid.clientHeight) grid.scrollTop = top + rowHeight + headHeight - grid.clientHeight;
    draw();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, dialog *")) return;
  if (event.key === "/") {
    event.preventDefault();
    byId("search").focus();
  } else if (event.key === "p") togglePause();
});

setInterval(() => {
  if (pausedAt !== null) return;
  if (isOrderOld || sort.by === "state") needsOrder = true;
  isOrderOld = false;
  needsSummary = true;
  draw();
}, 1000);

drawHead();
draw();
follow();

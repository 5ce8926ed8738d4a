// Elements from values. Text is only ever set as text, so that no name can become part of the page's structure.

const STATES = ["running", "leased", "arriving", "cached", "free"];
const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

function fill(id, ...children) {
  document.getElementById(id).replaceChildren(...children);
}

function number(value, unit = "") {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  return `${value.toLocaleString("en", { maximumFractionDigits: digits })}${unit}`;
}

function seconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 1 ? number(value * 1000, " ms") : number(value, " s");
}

function percent(value) {
  return value === null || value === undefined ? "–" : number(value * 100, " %");
}

function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (value >= 1000 && power < units.length - 1) [value, power] = [value / 1000, power + 1];
  return number(value, ` ${units[power]}`);
}

// Widths are attributes of drawings: the page's policy allows no styles of elements.
function strip(parts) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", "0 0 100 1");
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("aria-hidden", "true");
  let left = 0;
  for (const [share, kind] of parts) {
    const rect = document.createElementNS(SVG, "rect");
    rect.setAttribute("x", String(left));
    rect.setAttribute("width", String(100 * share));
    rect.setAttribute("height", "1");
    if (kind) rect.setAttribute("class", kind);
    drawing.append(rect);
    left += 100 * share;
  }
  return drawing;
}

function badge(level, text) {
  return element("span", { class: `badge ${level}` }, text);
}

function head(...titles) {
  const cells = titles.map(([text, kind]) => element("th", kind ? { scope: "col", class: kind } : { scope: "col" }, text));
  return element("thead", {}, element("tr", {}, ...cells));
}

function blocksOf(replica) {
  const counts = (replica.status || {}).blocks_by_state || {};
  const total = STATES.reduce((sum, state) => sum + (counts[state] || 0), 0);
  if (!total) return "–";
  const text = STATES.map((state) => `${counts[state] || 0} ${state}`).join(", ");
  const stack = element("div", { class: "stack", role: "img", "aria-label": text, title: text });
  stack.append(strip(STATES.map((state) => [(counts[state] || 0) / total, state])));
  return stack;
}

function replicaRow(replica, level, word) {
  const status = replica.status || {};
  const count = (value) => element("td", { class: "number" }, value ?? "–");
  return element(
    "tr",
    { "data-replica": replica.id },
    element("td", {}, badge(level, word)),
    element("td", {}, replica.role ?? "–"),
    element("td", { class: "name" }, replica.id ?? "–"),
    element("td", { class: "node" }, replica.node ?? "–"),
    count(replica.pid),
    count(status.num_running),
    count(status.num_waiting),
    count(status.num_tickets),
    element("td", {}, blocksOf(replica)),
  );
}

function showReplicas(view) {
  const rows = view.gone.map((replica) => replicaRow({ ...replica, status: null }, "bad", "gone"));
  for (const replica of view.replicas) {
    const draining = replica.is_draining;
    rows.push(replicaRow(replica, draining ? "warn" : "good", draining ? "draining" : "serving"));
  }
  if (!rows.length) rows.push(element("tr", {}, element("td", { colspan: "9" }, "No replica has joined yet.")));
  const titles = [["State"], ["Role"], ["Replica"], ["Node"], ["Process", "number"], ["Running", "number"]];
  titles.push(["Waiting", "number"], ["Tickets", "number"], ["KV blocks"]);
  fill("replicas", head(...titles), element("tbody", {}, ...rows));
  const keys = STATES.flatMap((state) => [element("i", { class: state }), state]);
  fill("legend", "Blocks:", ...keys);
}

function showBars(id, totals) {
  const entries = [...totals].filter(([, value]) => value > 0).sort((a, b) => b[1] - a[1]);
  const whole = entries.reduce((sum, [, value]) => sum + value, 0);
  if (!whole) return fill(id, element("span", { class: "quiet" }, "none yet"));
  const cells = entries.flatMap(([name, value]) => {
    const bar = element("div", { class: "bar" });
    bar.append(strip([[value / whole]]));
    const text = `${number(value)} (${percent(value / whole)})`;
    return [element("span", {}, name), bar, element("span", { class: "number" }, text)];
  });
  return fill(id, ...cells);
}

function showErrors(cluster) {
  const rows = lastErrors(cluster).map((note) =>
    element(
      "tr",
      {},
      element("td", {}, new Date((note.at_s || 0) * 1000).toLocaleTimeString()),
      element("td", { class: "name" }, note.who),
      element("td", {}, note.kind ?? ""),
      element("td", { class: "message" }, note.message ?? ""),
      element("td", { class: "number" }, note.count ?? 1),
    ),
  );
  if (!rows.length) rows.push(element("tr", {}, element("td", { class: "quiet" }, "None since the processes started.")));
  const titles = [["Time"], ["Where"], ["Kind"], ["What"], ["Times", "number"]];
  fill("errors", ...(rows[0].children.length > 1 ? [head(...titles)] : []), element("tbody", {}, ...rows));
}

function pairs(values) {
  const cells = Object.entries(values || {}).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
  return element("dl", { class: "pairs" }, ...cells);
}

function showChoices(cluster) {
  const box = document.getElementById("choices");
  const open = new Set([...box.querySelectorAll("details[open]")].map((found) => found.dataset.of));
  const groups = [["the cluster", cluster.reasons], ...(cluster.replicas || []).map((one) => [one.id, one.choices])];
  const made = groups.map(([name, values]) => {
    const details = element("details", { "data-of": name });
    details.open = open.has(name);
    details.append(element("summary", {}, `Of ${name}`), pairs(values));
    return details;
  });
  box.replaceChildren(...made);
}

function facts(id, entries) {
  const cells = entries.flatMap(([name, value, level]) => [
    element("dt", {}, name),
    element("dd", level ? { class: level } : {}, value),
  ]);
  fill(id, ...cells);
}

function showNow(rates) {
  const samples = rates.after.samples;
  const tiles = [
    ["Requests", number(rates.perSecond("atom_http_requests_total", { route: /^\/v1\/(chat|comp|resp|mess)/ }), "/s")],
    ["Tokens out", number(rates.perSecond("atom_generation_tokens_total"), "/s")],
    ["Prompt tokens", number(rates.perSecond("atom_http_prompt_tokens_sum"), "/s")],
    ["First token", seconds(rates.mean("atom_http_time_to_first_token_seconds"))],
    ["Per token", seconds(rates.mean("atom_http_time_per_output_token_seconds"))],
    ["Open requests", number(sumOf(samples, "atom_http_requests_open"))],
    ["Running", number(sumOf(samples, "atom_requests_running"))],
    ["Waiting", number(sumOf(samples, "atom_requests_waiting"))],
    ["Answers of 5xx", percent(rates.ratio("atom_http_requests_total", "atom_http_requests_total", { status: /^5/ }))],
  ];
  fill("tiles", ...tiles.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

function showTransfer(rates) {
  const samples = rates.after.samples;
  const total = (name, wanted) => sumOf(samples, name, wanted) || 0;
  const alarm = (value) => (value ? "bad" : "");
  const queried = total("atom_prefix_cache_queried_tokens_total");
  const transports = [...sumBy(samples, "atom_kv_transfer_bytes_total", "transport")].filter(([, moved]) => moved);
  const bad = total("atom_kv_bad_blocks_total");
  const failed = total("atom_kv_transfer_failures_total");
  facts("transfer", [
    ["Prompt tokens found in caches", queried ? percent(total("atom_prefix_cache_hit_tokens_total") / queried) : "–"],
    ["Blocks that can be found", number(total("atom_prefix_cache_blocks"))],
    ["Preemptions", number(total("atom_preemptions_total"))],
    ["Read from prefill, now", `${bytes(rates.perSecond("atom_kv_transfer_bytes_total"))}/s`],
    ...transports.map(([name, moved]) => [`Read through ${name}`, bytes(moved)]),
    ["Reads", number(total("atom_kv_reads_total"))],
    ["Reading that nothing hid, now", seconds(rates.mean("atom_kv_exposed_seconds"))],
    ["Tickets open", number(total("atom_tickets_open"))],
    ["Handoffs that failed", number(failed), alarm(failed)],
    ["Bad blocks", number(bad), alarm(bad)],
    ["Leases that ran out", number(total("atom_kv_lease_expiries_total"))],
  ]);
}

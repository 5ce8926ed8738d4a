// Asks, shows, waits. Asks less often while nobody answers, and not at all while nobody looks.

const PERIOD_MS = 2000;
const METRICS_EVERY = 2;
const LONGEST_PAUSE_MS = 30000;
const TIMEOUT_MS = 10000;
// Processes hand their counts on every ten seconds or so: rates of less time than a few of these would jump.
const WINDOW_MS = 30000;
const KEY = "atom_cluster.api_key";

const watch = new Watch();
let failures = 0;
let round = 0;
let looks = [];
let timer = 0;

class NeedsKey extends Error {}

async function ask(path) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
  if (answer.status === 401 || answer.status === 403) throw new NeedsKey(key ? "That key may not look here." : "");
  if (!answer.ok) throw new Error(`${path} answers with ${answer.status}`);
  return answer;
}

function showKeyDialog(why) {
  const dialog = document.getElementById("ask");
  if (why) document.getElementById("ask-why").textContent = why;
  if (!dialog.open) dialog.showModal();
}

function showHealth(level, word) {
  const health = document.getElementById("health");
  health.className = `badge ${level}`;
  if (health.textContent !== word) health.textContent = word;
}

function showProblems(problems) {
  fill("problems", ...problems.map((problem) => element("li", { class: problem.level }, problem.text)));
}

function showCluster(cluster) {
  const view = watch.look(cluster);
  showHealth(view.level, view.word);
  showProblems(view.problems);
  document.getElementById("model").textContent = cluster.served_name || cluster.model || "";
  const fronts = (cluster.ingresses || []).length;
  const router = cluster.router ? `${cluster.router.peer_id} at ${cluster.router.endpoint}` : "none known";
  document.getElementById("router").textContent = `${router}; ${fronts} ingress${fronts === 1 ? "" : "es"}`;
  showReplicas(view);
  showErrors(cluster);
  showChoices(cluster);
}

function showMetrics(text) {
  const now = { at: performance.now(), samples: parseMetrics(text) };
  looks = [...looks.filter((look) => now.at - look.at <= WINDOW_MS), now];
  const rates = new Rates(looks.length > 1 ? looks[0] : null, now);
  showNow(rates);
  showTransfer(rates);
  showBars("decisions", sumBy(now.samples, "atom_router_decisions_total", "reason"));
  showBars("places", sumBy(now.samples, "atom_router_prompt_places_total", "place"));
}

async function look() {
  const cluster = await (await ask("v1/cluster")).json();
  showCluster(cluster);
  if (round++ % METRICS_EVERY === 0) showMetrics(await (await ask("metrics")).text());
  document.getElementById("updated").textContent = `As of ${new Date().toLocaleTimeString()}`;
}

async function turn() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    await look();
    failures = 0;
  } catch (error) {
    if (error instanceof NeedsKey) {
      showHealth("warn", "No access");
      showKeyDialog(error.message);
      return;
    }
    failures += 1;
    showHealth("bad", "No answer");
    showProblems([{ level: "bad", text: `The cluster does not answer: ${error.message}` }]);
  }
  timer = setTimeout(turn, Math.min(PERIOD_MS * 2 ** failures, LONGEST_PAUSE_MS));
}

document.getElementById("ask").addEventListener("close", () => {
  const input = document.getElementById("key");
  if (input.value.trim()) sessionStorage.setItem(KEY, input.value.trim());
  input.value = "";
  turn();
});
document.getElementById("ask").addEventListener("cancel", (event) => event.preventDefault());
document.addEventListener("visibilitychange", turn);
turn();

"use strict";
// What the cluster's two answers mean: no elements, no requests. Every value may be missing or of another kind.

// Prometheus text -> [{name, labels, value}], as far as it is ours.
function parseMetrics(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const match = /^(atom_[a-z0-9_]+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const labels = new Map();
    for (const [, name, value] of (match[2] || "").matchAll(/([A-Za-z_]+)="((?:[^"\\]|\\.)*)"/g)) {
      labels.set(name, value.replace(/\\(.)/g, (_, char) => (char === "n" ? "\n" : char)));
    }
    samples.push({ name: match[1], labels, value: Number(match[3]) });
  }
  return samples;
}

function sumOf(samples, name, wanted = {}) {
  let total = null;
  for (const sample of samples) {
    if (sample.name !== name) continue;
    if (!Object.entries(wanted).every(([label, want]) => want.test(sample.labels.get(label) || ""))) continue;
    total = (total || 0) + sample.value;
  }
  return total;
}

function sumBy(samples, name, label) {
  const totals = new Map();
  for (const sample of samples) {
    if (sample.name !== name) continue;
    const key = sample.labels.get(label) || "";
    totals.set(key, (totals.get(key) || 0) + sample.value);
  }
  return totals;
}

// Counters of two looks, some time apart, as rates. Nothing is known before the second one, nor when a process that
// counted has gone in between.
class Rates {
  constructor(before, after) {
    this.before = before;
    this.after = after;
    this.seconds = before ? (after.at - before.at) / 1000 : 0;
  }
  change(name, wanted) {
    if (!this.before) return null;
    const now = sumOf(this.after.samples, name, wanted);
    if (now === null) return null;
    const change = now - (sumOf(this.before.samples, name, wanted) || 0);
    return change >= 0 ? change : null;
  }
  perSecond(name, wanted) {
    const change = this.change(name, wanted);
    return change === null || this.seconds <= 0 ? null : change / this.seconds;
  }
  mean(name, wanted) {
    const count = this.change(`${name}_count`, wanted);
    const sum = this.change(`${name}_sum`, wanted);
    return count && sum !== null ? sum / count : null;
  }
  ratio(name, of, wanted) {
    const part = this.change(name, wanted);
    const whole = this.change(of);
    return whole ? (part || 0) / whole : null;
  }
}

const ROLES = ["prefill", "decode", "unified"];

function expectedReplicas(cluster, role) {
  const group = (cluster.configuration || {})[role];
  if (!group) return 0;
  return group.autoscaling ? group.autoscaling.min_replicas || 0 : group.replicas || 0;
}

// Replicas that are there, and those that were and are missed: gone, and nobody came in their place.
class Watch {
  constructor() {
    this.gone = new Map();
    this.seen = new Map();
  }
  look(cluster) {
    const replicas = Array.isArray(cluster.replicas) ? cluster.replicas : [];
    const ids = new Set(replicas.map((replica) => replica.id));
    for (const [id, replica] of this.seen) {
      if (!ids.has(id) && !replica.is_draining) this.gone.set(id, replica);
    }
    this.seen = new Map(replicas.map((replica) => [replica.id, replica]));
    const problems = [];
    for (const role of ROLES) {
      const num = replicas.filter((replica) => replica.role === role && !replica.is_draining).length;
      const expected = expectedReplicas(cluster, role);
      if (num >= expected) {
        for (const [id, replica] of this.gone) if (replica.role === role || ids.has(id)) this.gone.delete(id);
      } else {
        problems.push({ level: "bad", text: `${num} of ${expected} ${role} replicas are there.` });
      }
    }
    if (!cluster.router) problems.push({ level: "warn", text: "No router is known: requests are placed by load alone." });
    const decodes = replicas.some((replica) => replica.role !== "prefill" && !replica.is_draining);
    const level = problems.some((problem) => problem.level === "bad") ? "bad" : problems.length ? "warn" : "good";
    const word = level === "good" ? "All well" : decodes ? "Degraded" : "No replica decodes";
    return { replicas, gone: [...this.gone.values()], problems, level, word };
  }
}

// Errors of this ingress and of all engines, the newest first.
function lastErrors(cluster) {
  const found = [];
  const add = (who, notes) => {
    for (const note of Array.isArray(notes) ? notes : []) found.push({ who, ...note });
  };
  add("this ingress", cluster.recent_errors);
  for (const replica of cluster.replicas || []) add(replica.id, (replica.status || {}).recent_errors);
  return found.sort((a, b) => (b.at_s || 0) - (a.at_s || 0)).slice(0, 20);
}

// Asks for the facts every few seconds and draws them; curve.js has the curves.
const PERIOD = 5000;
const PATIENCE = 8000;
const { url, retry } = document.body.dataset;
const $ = (id) => document.getElementById(id);
let heard = null;
let trouble = "";

// An element: `el("p.quiet", "text", child)`; what is given as text is never read as HTML.
function el(kind, ...children) {
  const [tag, ...classes] = kind.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  made.append(...children.filter((child) => child !== null && child !== ""));
  return made;
}

function span(seconds) {
  if (seconds === null) return "–";
  if (seconds < 1) return `${Math.max(1, Math.round(seconds * 1000))} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

const many = (count, one, more = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : more}`;
const number = (count, capped) => count.toLocaleString("en") + (capped ? "+" : "");

// Colour is never alone: each level has a sign, and words stand beside it.
const SIGNS = { good: "✓", slow: "◐", bad: "▲" };
const sign = (level) => {
  const made = el(`span.sign.${level}`, SIGNS[level]);
  made.ariaHidden = "true";
  return made;
};

// Replace what a place shows, only when it has changed: focus and clicks survive a refresh.
function show(id, facts, draw) {
  const place = $(id);
  if (place.closest("section")) place.closest("section").hidden = facts === null;
  const known = JSON.stringify(facts);
  if (facts === null || place.known === known) return;
  place.known = known;
  const focused = place.contains(document.activeElement) ? document.activeElement.id : "";
  place.replaceChildren(...draw(facts));
  if (focused) $(focused)?.focus({ preventScroll: true });
}

const level = (queue) => (queue.state === "ok" ? "good" : queue.fine ? "slow" : "bad");

function headline({ queues }) {
  const late = queues.filter((queue) => !queue.fine);
  const text = late.length === 0
    ? ["No queue is probed", `${queues[0]?.queue} moves`][queues.length] ?? `All ${queues.length} queues move`
    : late.length === 1 ? `${late[0].queue} does not move: ${late[0].words}`
      : `${late.length} of ${queues.length} queues do not move`;
  document.title = late.length ? `▲ ${late.length} late – Status` : "Status";
  return [sign(late.length ? "bad" : "good"), " ", text];
}

function facts({ beat, loop, workers, release }) {
  const fact = (level, name, text) => el(`li.${level}`, sign(level), el("b", name), ` ${text}`);
  const looked = beat.age === null ? "has never looked" : `looked ${span(beat.age)} ago`;
  const releases = [...new Set(workers.filter((w) => w.fine).map((w) => w.release || "unnamed"))];
  const working = workers.filter((worker) => worker.fine);
  // As the alert WorkerSilent: after an hour it is history.
  const silent = workers.filter((worker) => !worker.fine && worker.silent < 3600).length;
  const slots = working.reduce((sum, worker) => sum + worker.slots, 0);
  const active = working.reduce((sum, worker) => sum + worker.active, 0);
  const found = [fact(beat.fine ? "good" : "bad", "Beat", looked)];
  if (beat.failure) found.push(fact("bad", "Broker", `fails: ${beat.failure}`));
  else if (beat.fine) found.push(fact("good", "Broker", "answers beat"));
  const passed = loop?.age === null ? "has never passed" : `passed ${span(loop?.age ?? 0)} ago`;
  if (loop) found.push(fact(loop.fine ? "good" : "bad", "Loop", passed));
  found.push(working.length
    ? fact(silent ? "bad" : "good", "Workers",
      `${working.length}, ${active} of ${slots} slots busy${silent ? `; ${silent} silent` : ""}`)
    : fact("bad", "Workers", silent ? `none; ${silent} silent` : "none"));
  if (releases.length > 1) found.push(fact("slow", "Releases", `workers differ: ${releases.join(", ")}`));
  else if (releases[0] && releases[0] !== "unnamed") found.push(fact("good", "Release", releases[0]));
  if (release && working.length && !releases.includes(release)) {
    found.push(fact("slow", "This page", `is served by ${release}`));
  }
  return found;
}

function details(pairs) {
  const list = el("dl");
  for (const [name, value] of pairs) {
    if (value !== "" && value !== null) list.append(el("div", el("dt", name), el("dd", value)));
  }
  return list;
}

function queueCard(queue, { minutes, interval }) {
  const label = `Latency of ${queue.queue}`;
  const scale = { log: true, limit: queue.threshold, format: span, bridge: Math.ceil(interval / 60) };
  const waits = queue.outstanding > queue.threshold;
  const card = el(
    `article.${level(queue)}`,
    el("h3", queue.queue, el("strong", waits ? `> ${span(queue.outstanding)}` : span(queue.latency))),
    el("p.state", sign(level(queue)), el("b", queue.words)),
    curve(queue.curve, { ...scale, label, minutes }),
    details([
      ["Waiting", queue.depth === null ? "–" : queue.depth.toLocaleString("en")],
      ["Last answer", queue.age === null ? "never" : `${span(queue.age)} ago`],
      ["Release", queue.release],
      ["By", queue.worker],
    ]),
  );
  Object.assign(card.dataset, { queue: queue.queue, state: queue.state });
  return card;
}

function stateCard({ state, count, capped, curve: counts }, { minutes }) {
  const label = `Number of ${state} jobs`;
  const worry = state === "dead" && count > 0;
  const card = el(
    `article.${worry ? "bad" : "plain"}`,
    el("h3", state, el("strong", number(count, capped))),
    curve(counts, { label, minutes, bridge: 2, format: (value) => value.toLocaleString("en") }),
  );
  card.dataset.count = state;
  return card;
}

function jobLink({ id, url }, text) {
  if (!url) return el("span", text);
  const link = el("a", text);
  link.href = url;
  link.id = `job-${id}`;
  return link;
}

function runningRow(job) {
  const bar = el("progress");
  Object.assign(bar, { max: 100, value: job.progress, ariaLabel: "Progress" });
  return el(
    "li",
    el("p.what", jobLink(job, job.task), el("strong", span(job.seconds))),
    job.progress ? el("div.bar", bar, el("span", `${job.progress} %`)) : "",
    el("p.quiet", [job.message, `${job.queue} on ${job.worker || "?"}`,
      job.attempts > 1 ? `attempt ${job.attempts}` : ""].filter(Boolean).join(" · ")),
  );
}

function failingRow(job) {
  const next = job.seconds > 0 ? `in ${span(job.seconds)}` : "due now";
  return el(
    "li",
    el("p.what", jobLink(job, job.error), el("strong", job.state === "queued" ? "waits for a worker" : next)),
    el("p.quiet", `${job.task} · ${job.queue} · ${many(job.attempts, "attempt")}`),
  );
}

function button(text, id, body, label) {
  const made = el("button", text);
  Object.assign(made, { type: "button", id, ariaLabel: label });
  made.addEventListener("click", () => again(made, body));
  return made;
}

function deadGroup({ task, count, jobs }, { capped }, may) {
  const total = number(count, capped);
  const rows = jobs.map((job) => el(
    "li",
    el("p.what", jobLink(job, job.error || "no error was kept"),
      may ? button("Retry", `retry-${job.id}`, { job: job.id }, `Retry ${task} ${job.id}`) : ""),
    el("p.quiet", `${new Date(job.finished_at).toLocaleString()} · ${job.queue} · ${many(job.attempts, "attempt")}`),
  ));
  const older = count - jobs.length;
  return el(
    "article.bad",
    el("h3", task, el("strong", total),
      may && count > 1 ? button(`Retry all ${total}`, `retry-all-${task}`, { task }, `Retry all of ${task}`) : ""),
    el("ul.rows", ...rows),
    older > 0 ? el("p.quiet", `and ${number(older, capped)} older`) : "",
  );
}

function workerRow(node, releases) {
  const level = node.fine ? "good" : "bad";
  return el(
    "li",
    el("p.what", el("span", sign(level), node.name),
      el("strong", node.fine ? `${node.active} of ${node.slots} busy` : `silent for ${span(node.silent)}`)),
    el("p.quiet", [node.queues.join(", "), node.oldest === null ? "" : `oldest task runs for ${span(node.oldest)}`]
      .filter(Boolean).join(" · "), node.release ? " · release " : "",
    el(releases.size > 1 ? "mark" : "span", node.release)),
  );
}

const list = (rows, none) => (rows.length ? [el("ul.rows", ...rows)] : [el("p.quiet", none)]);

function draw(news) {
  const { queues, workers, jobs } = news;
  const releases = new Set(workers.filter((w) => w.fine).map((w) => w.release));
  $("headline").replaceChildren(...headline(news));
  $("facts").replaceChildren(...facts(news));
  const order = [...queues].sort((a, b) => a.fine - b.fine);
  show("queues", order, (all) => all.map((queue) => queueCard(queue, news)));
  show("states", jobs && jobs.states, (all) => all.map((state) => stateCard(state, news)));
  show("dead", jobs && jobs.dead && { ...jobs.dead, may: jobs.retry }, ({ groups, may, capped }) => (
    groups.length ? groups.map((group) => deadGroup(group, { capped }, may)) : [el("p.quiet", "None.")]));
  show("failing", jobs && jobs.failing, (all) => list(all.map(failingRow), "None."));
  show("running", jobs && jobs.running, (all) => list(all.map(runningRow), "No job runs now."));
  show("workers", workers, (all) => list(all.map((node) => workerRow(node, releases)), "No worker has reported."));
}

async function load() {
  const answer = await fetch(url, { headers: { Accept: "application/json" }, signal: AbortSignal.timeout(PATIENCE) });
  if (answer.status === 403) throw new Error("You are no longer logged in: load the page again.");
  if (!answer.ok) throw new Error(`The server answers ${answer.status}.`);
  heard = Date.now();
  return answer.json();
}

async function refresh() {
  let news = null;
  try {
    if (!document.hidden || heard === null) news = await load();
    trouble = "";
  } catch (error) {
    trouble = error.name === "Error" ? error.message : "The server does not answer.";
  }
  if (news) draw(news);
  tick();
}

async function again(pressed, body) {
  pressed.disabled = true;
  const token = document.querySelector("[name=csrfmiddlewaretoken]").value;
  try {
    const answer = await fetch(retry, {
      method: "POST", body: new URLSearchParams(body), headers: { "X-CSRFToken": token },
    });
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    const { chosen, retried, seconds } = await answer.json();
    const spread = seconds ? ` over the next ${span(seconds)}` : "";
    const rest = chosen > retried ? ` ${chosen - retried} stay: another job with the same key does it.` : "";
    $("said").textContent = `${many(retried, "job")} will run again${spread}.${rest}`;
  } catch (error) {
    $("said").textContent = `Nothing was retried: ${error.message}.`;
  }
  pressed.disabled = false;
  await refresh();
}

function tick() {
  const age = heard === null ? null : Math.round((Date.now() - heard) / 1000);
  const stale = trouble !== "" || (age !== null && age * 1000 > 2 * PERIOD + PATIENCE);
  document.body.classList.toggle("stale", stale);
  const when = age === null ? "No news yet." : `Last news ${age} s ago.`;
  const text = stale ? `${trouble || "The server does not answer."} ${when}` : age === null ? "Asking …" : "Live, every 5 s";
  if ($("news").textContent !== text) $("news").textContent = text;
}

function forever() {
  refresh().finally(() => setTimeout(forever, PERIOD));
}

document.addEventListener("visibilitychange", () => document.hidden || refresh());
setInterval(tick, 1000);
forever();

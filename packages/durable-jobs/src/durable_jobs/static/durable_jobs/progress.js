// Keeps each `<span class="durable-job" data-url="...">` up to date until its job has finished.
(() => {
  const label = (job) => {
    const note = job.message ? `: ${job.message}` : "";
    if (job.state === "running") return `Running ${job.progress} %${note}`;
    if (job.state === "scheduled" && job.attempts) {
      const at = new Date(job.due_at).toLocaleTimeString();
      return `Failed, tried again at ${at} (${job.attempts} of ${job.max_attempts})`;
    }
    return job.state[0].toUpperCase() + job.state.slice(1) + note;
  };
  const watch = async (span, seconds = 1) => {
    try {
      const answer = await fetch(span.dataset.url, { credentials: "same-origin" });
      if (answer.status === 404) return;
      if (answer.ok) {
        const job = await answer.json();
        if (span.textContent !== label(job)) seconds = 1;
        span.textContent = label(job);
        if (!job.due_at) {
          span.dispatchEvent(new CustomEvent("durable-job-finished", { bubbles: true, detail: job }));
          return;
        }
      }
    } catch { /* Offline: the next round tries again. */ }
    setTimeout(watch, seconds * 1000, span, Math.min(seconds * 1.5, 15));
  };
  // The script may be on the page once for each job; each is watched once.
  for (const span of document.querySelectorAll(".durable-job[data-url]:not([data-watched])")) {
    span.dataset.watched = "";
    watch(span);
  }
})();

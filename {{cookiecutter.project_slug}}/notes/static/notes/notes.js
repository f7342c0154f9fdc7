// Asks every second which copies exist and how their jobs are, and shows it.
const articles = document.querySelectorAll("[data-note]");

function show(article, { wanted, made, job, failed }) {
  const existing = new Set(made);
  article.querySelector("progress").value = made.length;
  article.querySelector("output").textContent = `${made.length} of ${wanted} copies`;
  const copies = article.querySelector(".copies");
  while (copies.children.length < wanted) copies.append(document.createElement("i"));
  [...copies.children].forEach((chip, index) => {
    chip.classList.toggle("made", existing.has(index + 1));
  });
  const said = article.querySelector(".job");
  if (said.textContent !== job) said.textContent = job;
  said.classList.toggle("failed", failed);
  article.querySelector(".retry").hidden = !failed;
}

async function refresh() {
  try {
    const response = await fetch(document.body.dataset.stateUrl);
    if (response.ok) {
      const state = await response.json();
      for (const article of articles) {
        if (article.dataset.note in state) show(article, state[article.dataset.note]);
      }
    }
  } catch {
    // the server is being restarted; the next round asks again
  }
  setTimeout(refresh, 1000);
}

refresh();

// Asks every second which copies exist, and shows them as they appear.
const articles = document.querySelectorAll("[data-note]");

function show(article, { wanted, made }) {
  const existing = new Set(made);
  article.querySelector("progress").value = made.length;
  article.querySelector("output").textContent = `${made.length} of ${wanted} copies`;
  const copies = article.querySelector(".copies");
  while (copies.children.length < wanted) copies.append(document.createElement("i"));
  [...copies.children].forEach((chip, index) => {
    chip.classList.toggle("made", existing.has(index + 1));
  });
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

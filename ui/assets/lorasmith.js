// Tables of pictures by keyboard, full size, and two pictures behind one slider. Everything else is plain HTML.
(() => {
  const cellsOf = (table) => [...table.querySelectorAll("tr")].map((row) => [...row.querySelectorAll("a.cell")]);

  // arrows move between the pictures of a table
  const neighbour = (cell, key) => {
    const rows = cellsOf(cell.closest("table")).filter((row) => row.length);
    const row = rows.findIndex((cells) => cells.includes(cell));
    const column = rows[row].indexOf(cell);
    const [down, across] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[key];
    const next = rows[row + down];
    return next && next[Math.min(Math.max(column + across, 0), next.length - 1)];
  };

  const dialog = () => {
    let shown = document.getElementById("full-size");
    if (shown) return shown;
    shown = document.createElement("dialog");
    shown.id = "full-size";
    shown.innerHTML = '<figure><img alt=""><figcaption></figcaption></figure><button type="button">Close</button>';
    shown.querySelector("button").onclick = () => shown.close();
    shown.addEventListener("close", () => shown.opener?.focus());
    shown.addEventListener("click", (event) => event.target === shown && shown.close());
    document.body.append(shown);
    return shown;
  };

  const show = (cell) => {
    const shown = dialog();
    const [picture, from] = [shown.querySelector("img"), cell.querySelector("img")];
    picture.src = cell.href;
    picture.alt = from.alt;
    shown.querySelector("figcaption").textContent = from.alt;
    shown.setAttribute("aria-label", from.alt);
    shown.opener = cell;
    if (!shown.open) shown.showModal();
  };

  document.addEventListener("click", (event) => {
    const cell = event.target.closest?.("a.cell");
    if (!cell || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    show(cell);
  });

  document.addEventListener("keydown", (event) => {
    if (!event.key.startsWith("Arrow")) return;
    const shown = document.getElementById("full-size");
    const cell = shown?.open ? shown.opener : document.activeElement?.closest?.("table.grid a.cell");
    if (!cell?.closest("table.grid")) return;
    const next = neighbour(cell, event.key);
    if (!next) return;
    event.preventDefault();
    shown?.open ? show(next) : next.focus();
  });

  // two pictures, one over the other, as far as the slider says
  document.addEventListener("input", (event) => {
    const pair = event.target.closest?.(".pair");
    if (pair && event.target.type === "range") pair.style.setProperty("--at", `${event.target.value}%`);
  });
})();

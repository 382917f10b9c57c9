// The cards of the Images page, the body of a function. `props.value` lists them: {folder, name, key, html}. A card that
// is there already stays, with what is being written in it; a caption is saved when it is left, by a request that says
// which image it is of, so that it reaches its own file whatever the page has turned to meanwhile.
const grid = element.querySelector(".cards");
const boxOf = (card) => card.querySelector("textarea");
const idOf = ({ folder, name }) => `${folder}\n${name}`;
const isUnsaved = (box) => !box.readOnly && box.value !== box.defaultValue;

const made = (html) => {
  const holder = document.createElement("template");
  holder.innerHTML = html;
  return holder.content.firstElementChild;
};

const show = () => {
  const there = new Map([...grid.children].map((card) => [idOf(card.dataset), card]));
  const wanted = (props.value || []).map((one) => {
    const card = there.get(idOf(one));
    const stays = card && (card.dataset.key === one.key || isUnsaved(boxOf(card)));
    return stays ? card : made(one.html);
  });
  [...grid.children].filter((card) => !wanted.includes(card)).forEach((card) => card.remove());
  wanted.forEach((card, place) => grid.children[place] !== card && grid.insertBefore(card, grid.children[place] ?? null));
};

const answered = async (box, more) => {
  const { folder, name } = box.closest(".card").dataset;
  const body = JSON.stringify({ folder, name, text: box.value, shown: box.defaultValue });
  const response = await fetch("/captions", { method: "POST", headers: { "Content-Type": "application/json" }, body, ...more });
  if (!response.ok) throw new Error(await response.text());
  return response.json();
};

const save = async (box) => {
  const said = box.closest(".card").querySelector(".said");
  const written = box.value;
  try {
    const answer = await answered(box);
    box.defaultValue = answer.shown;
    if (answer.text !== null && box.value === written) box.value = answer.text;
    said.innerHTML = answer.said;
  } catch (error) {
    said.textContent = `It was not saved: ${error.message}. Click into the box and leave it to try again.`;
  }
};

grid.addEventListener("focusout", ({ target }) => target.matches("textarea") && isUnsaved(target) && save(target));
grid.addEventListener("click", ({ target }) => {
  const card = target.closest("button.remove")?.closest(".card");
  if (card) trigger("discard", { name: card.dataset.name });
});
window.addEventListener("pagehide", () => {
  const unsaved = [...grid.querySelectorAll("textarea")].filter(isUnsaved);
  unsaved.forEach((box) => answered(box, { keepalive: true }).catch(() => {}));
});
watch("value", show);
show();

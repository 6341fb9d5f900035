// The history strip: images that somebody paused at, with the settings that made them.

const MOST = 24;

export class Shelf extends EventTarget {
  #list;
  #hint;

  constructor(list, hint) {
    super();
    this.#list = list;
    this.#hint = hint;
  }

  // Put an image first: `fields` are its request's.
  add(blob, fields) {
    const address = URL.createObjectURL(blob);
    const image = Object.assign(document.createElement("img"), {src: address, alt: ""});
    const button = Object.assign(document.createElement("button"), {type: "button", title: fields.prompt});
    button.setAttribute("aria-label", `Bring back: ${fields.prompt || "no prompt"}, seed ${fields.seed}`);
    button.append(image);
    button.addEventListener("click", () => this.dispatchEvent(new CustomEvent("chosen", {detail: {blob, fields}})));
    const entry = document.createElement("li");
    entry.append(button);
    this.#list.prepend(entry);
    while (this.#list.children.length > MOST) {
      URL.revokeObjectURL(this.#list.lastElementChild.querySelector("img").src);
      this.#list.lastElementChild.remove();
    }
    this.#hint.hidden = true;
  }
}

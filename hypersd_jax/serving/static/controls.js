// Settings: sliders made from what the server offers, the seed with its lock, and the modes.

const $ = (id) => document.getElementById(id);
const MODE_NAMES = {text: "Text", image: "Sketch", inpaint: "Inpaint", control: "Control"};
const MOST_GUIDANCE = 10;
const MOST_SEED = 2 ** 32;

// A labelled slider; `shown` says for which modes it means anything.
function slider(parent, {id, label, min, max, step, value, modes}) {
  const row = parent.id.endsWith("-row") ? parent : Object.assign(document.createElement("div"), {className: "row"});
  const name = Object.assign(document.createElement("label"), {htmlFor: id, textContent: label});
  const input = Object.assign(document.createElement("input"), {type: "range", id, min, max, step});
  input.value = value;
  const output = Object.assign(document.createElement("output"), {htmlFor: id});
  const show = () => { output.textContent = Number(input.value).toFixed(step < 0.1 ? 2 : step < 1 ? 1 : 0); };
  input.addEventListener("input", show);
  show();
  row.replaceChildren(name, output, input);
  if (row !== parent) parent.append(row);
  return {row, input, modes, show};
}

export class Controls extends EventTarget {
  mode = "text";
  #offer = null;
  #sliders = {};
  #loras = {};

  constructor() {
    super();
    const changed = () => this.dispatchEvent(new Event("change"));
    $("controls").addEventListener("input", changed);
    $("controls").addEventListener("submit", (event) => event.preventDefault());
    $("prompt").addEventListener("input", changed);
    $("size").addEventListener("change", () => this.#aspect());
    $("lock").addEventListener("click", () => this.#lock($("lock").getAttribute("aria-pressed") !== "true"));
    $("another").addEventListener("click", () => { this.#draw(); changed(); });
    $("compare").addEventListener("click", () => {
      const on = $("compare").getAttribute("aria-pressed") !== "true";
      $("compare").setAttribute("aria-pressed", on);
      this.dispatchEvent(new CustomEvent("compare", {detail: on}));
      changed();
    });
  }

  // Build what the server offers; after a lost connection the settings stay as they are.
  build(offer) {
    if (this.#offer !== null) return;
    this.#offer = offer;
    const {limits} = offer;
    $("prompt").maxLength = $("negative").maxLength = limits.prompt_characters;
    this.#sliders.steps = slider($("steps-row"), {id: "steps", label: "Steps", min: 1, max: limits.steps, step: 1, value: offer.steps});
    const all = $("sliders");
    for (const [name, scale] of Object.entries(offer.loras)) {
      const id = `lora-${Object.keys(this.#loras).length}`;
      const least = Math.min(0, scale);
      this.#loras[name] = slider(all, {id, label: `LoRA ${name}`, min: least, max: Math.max(1.5, scale), step: 0.05, value: scale});
    }
    const about = [
      ["strength", "Strength", 0.05, 1, 0.05, 0.6, ["image", "inpaint"]],
      ["control_scale", "Control scale", 0, limits.control_scale, 0.05, 1, ["control"]],
      ["guidance", "Guidance", 0, Math.min(limits.guidance, Math.max(MOST_GUIDANCE, offer.guidance)), 0.5, offer.guidance],
    ];
    for (const [id, label, min, max, step, value, modes] of about) {
      this.#sliders[id] = slider(all, {id, label, min, max, step, value, modes});
    }
    $("size").replaceChildren(...Object.entries(offer.sizes).map(([name, {width, height}]) => new Option(`${width} × ${height}`, name)));
    $("size").disabled = Object.keys(offer.sizes).length < 2;
    this.#tabs(Object.keys(offer.modes));
    this.#aspect();
  }

  get ready() {
    return this.#offer !== null;
  }

  get modes() {
    return Object.keys(this.#offer.modes);
  }

  get size() {
    return this.#offer.sizes[$("size").value];
  }

  get comparing() {
    return $("compare").getAttribute("aria-pressed") === "true";
  }

  // The fields of a request.
  fields() {
    if ($("lock").getAttribute("aria-pressed") !== "true") this.#draw();
    const number = (id) => Number(this.#sliders[id].input.value);
    const seed = Math.trunc(Number($("seed").value));
    return {
      mode: this.mode,
      prompt: $("prompt").value,
      negative: $("negative").value,
      seed: seed >= 0 && seed < MOST_SEED ? seed : 0,
      steps: number("steps"),
      guidance: number("guidance"),
      // At least one step must be walked.
      strength: Math.max(number("strength"), 1 / number("steps")),
      control_scale: number("control_scale"),
      size: $("size").value,
      loras: Object.fromEntries(Object.entries(this.#loras).map(([name, {input}]) => [name, Number(input.value)])),
      compare: this.comparing,
    };
  }

  // Put the fields of an earlier request back, but for its mode, whose pictures may have changed.
  restore(fields) {
    $("prompt").value = fields.prompt;
    $("negative").value = fields.negative;
    $("seed").value = fields.seed;
    $("size").value = fields.size;
    this.#lock(true);
    const set = ({input, show}, value) => { input.value = value; show(); };
    for (const id of Object.keys(this.#sliders)) set(this.#sliders[id], fields[id]);
    for (const name of Object.keys(this.#loras)) set(this.#loras[name], fields.loras[name]);
    this.#aspect();
  }

  #lock(on) {
    $("lock").setAttribute("aria-pressed", on);
    $("lock").textContent = on ? "Locked" : "Unlocked";
    $("lock").title = on ? "Every image has this seed" : "Every image has another seed";
  }

  #draw() {
    $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  }

  #aspect() {
    document.documentElement.style.setProperty("--aspect", `${this.size.width} / ${this.size.height}`);
  }

  #tabs(modes) {
    const tabs = modes.map((mode) => Object.assign(document.createElement("button"), {
      type: "button", id: `mode-${mode}`, textContent: MODE_NAMES[mode], role: "tab",
    }));
    const choose = (index) => {
      this.mode = modes[index];
      tabs.forEach((tab, each) => {
        tab.setAttribute("aria-selected", each === index);
        tab.setAttribute("aria-controls", "stage");
        tab.tabIndex = each === index ? 0 : -1;
      });
      for (const {row, modes: only} of Object.values(this.#sliders)) row.hidden = Boolean(only) && !only.includes(this.mode);
      this.dispatchEvent(new Event("mode"));
    };
    tabs.forEach((tab, index) => {
      tab.addEventListener("click", () => choose(index));
      tab.addEventListener("keydown", (event) => {
        const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
        if (!step) return;
        const next = (index + step + tabs.length) % tabs.length;
        tabs[next].focus();
        choose(next);
        event.preventDefault();
      });
    });
    $("modes").replaceChildren(...tabs);
    $("modes").hidden = tabs.length < 2;
    choose(0);
  }
}

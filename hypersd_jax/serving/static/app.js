// Ties the parts together: whatever changes asks for an image, and the newest image is shown.

import {Board} from "./board.js";
import {Camera} from "./camera.js";
import {Connection} from "./connection.js";
import {Controls} from "./controls.js";
import {Shelf} from "./shelf.js";

const $ = (id) => document.getElementById(id);
const GAP = 40;           // least milliseconds between two requests, for the server reads 30 a second
const PICTURE_GAP = 80;   // and between two with pictures
const PAUSE = 900;        // after which an image goes to the history

const connection = new Connection();
const controls = new Controls();
const board = new Board($("canvas"));
const camera = new Camera($("video"));
const shelf = new Shelf($("shelf"), $("shelf-empty"));

let asked = {};           // fields of the requests whose images may still come, by version
let shown = null;         // {blob, fields, header}
let asking = false;
let again = false;
let answered = 0;         // the newest version that was drawn or refused
let pause = 0;

// MARK: asking

// Ask for an image of what the page holds now. While one request is being put together a later one waits.
async function ask() {
  if (asking) {
    again = true;
    return;
  }
  asking = true;
  showBusy();
  try {
    do {
      again = false;
      await askOnce();
    } while (again);
  } finally {
    asking = false;
    showBusy();
  }
}

async function askOnce() {
  if (!connection.ready || !controls.ready) return;
  const fields = controls.fields();
  const pictures = {};
  const mode = controls.mode;
  if (mode !== "text") {
    const missing = lacking(mode);
    say(missing);
    if (missing && mode !== "image") return;
    if (missing) {
      fields.mode = controls.modes.includes("text") ? "text" : mode;  // an empty canvas is no picture
    } else {
      pictures.image = await board.image(controls.size);
      if (mode === "inpaint") pictures.mask = await board.mask(controls.size);
    }
  }
  if (!connection.ready || controls.mode !== mode) {
    again = true;
    return;
  }
  const version = await connection.send(fields, pictures);
  asked[version] = fields;
  await new Promise((done) => setTimeout(done, mode === "text" ? GAP : PICTURE_GAP));
}

// What a mode still needs before it can draw from a picture; null where nothing is missing.
function lacking(mode) {
  if (mode === "inpaint") {
    if (board.picture === null) return "Open a picture, or use the result; then paint over what is to change.";
    return board.painted ? null : "Paint over what is to change.";
  }
  if (board.painted || board.picture !== null) return null;
  return mode === "image" ? "Sketch something: until then the prompt alone is drawn." : "Sketch something.";
}

function say(text) {
  $("hint").hidden = !text;
  $("hint").textContent = text ?? "";
}

// MARK: showing

function showBusy() {
  $("stage").setAttribute("aria-busy", asking || answered < connection.version);
}

function status(text, state) {
  if ($("status").textContent !== text) $("status").textContent = text;
  $("status").dataset.state = state;
}

function put(image, blob, alt) {
  const before = image.src;
  image.src = URL.createObjectURL(blob);
  image.alt = alt;
  image.hidden = false;
  if (before) URL.revokeObjectURL(before);
}

function describe(element, name, {steps, calls, milliseconds}, more = "") {
  const strong = Object.assign(document.createElement("strong"), {textContent: `${Math.round(milliseconds)} ms`});
  const model = calls === steps ? "" : ` (${calls} calls)`;
  element.replaceChildren(`${name}, ${steps} ${steps === 1 ? "step" : "steps"}${model}, `, strong, more);
}

connection.addEventListener("image", ({detail: header}) => {
  const fields = asked[header.version];
  if (header.role === "teacher") {
    if (!controls.comparing) return;
    put($("teacher-image"), header.blob, `By the teacher: ${fields.prompt}`);
    const ratio = shown ? header.milliseconds / shown.header.milliseconds : 0;
    describe($("teacher-caption"), "Teacher", header, ratio > 1 ? `, ${ratio.toFixed(1)} times the student's` : "");
    return;
  }
  asked = Object.fromEntries(Object.entries(asked).filter(([version]) => version >= header.version));
  show({blob: header.blob, fields, header});
  status(header.notes.length ? header.notes[0] : "Ready", "ready");
  document.body.dataset.version = header.version;
  answered = header.version;
  showBusy();
  clearTimeout(pause);
  pause = setTimeout(() => shelf.add(header.blob, fields), PAUSE);
});

function show(drawn) {
  shown = drawn;
  put($("image"), drawn.blob, drawn.fields.prompt);
  describe($("caption"), "Student", drawn.header, `, seed ${drawn.fields.seed}`);
  const link = $("download");
  if (link.href) URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(drawn.blob);
  const words = drawn.fields.prompt.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 40);
  link.download = `${words || "image"}-${drawn.fields.seed}.png`;
  link.removeAttribute("aria-disabled");
}

connection.addEventListener("hello", ({detail: offer}) => {
  const parts = [offer.vae && `autoencoder ${offer.vae}`, offer.controlnet && `ControlNet ${offer.controlnet}`];
  $("model").textContent = [offer.model, ...Object.keys(offer.loras).map((name) => `+ ${name}`), ...parts.filter(Boolean)].join(" ");
  const {steps, guidance} = offer.teacher;
  $("compare").title = `The base model alone, ${steps} steps, guidance ${guidance}`;
  status("Ready", "ready");
  controls.build(offer);
  ask();
});
connection.addEventListener("lost", () => status("No connection; trying again", "error"));
connection.addEventListener("full", ({detail}) => status(`The server is full: ${detail.message}`, "error"));
connection.addEventListener("error", ({detail}) => {
  answered = detail.version ?? connection.version;
  showBusy();
  status(detail.message, "error");
});
connection.addEventListener("place", ({detail: {place}}) => {
  if (place > 1) status(`Waiting: ${place - 1} before you`, "waiting");
  else if ($("status").dataset.state === "waiting") status("Ready", "ready");
});

// MARK: the page

controls.addEventListener("change", ask);
controls.addEventListener("compare", ({detail: on}) => {
  $("teacher").hidden = !on;
  $("teacher-image").hidden = true;
  $("teacher-caption").textContent = "The teacher draws when you pause";
});
controls.addEventListener("mode", async () => {
  const drawsFromPicture = controls.mode !== "text";
  if (camera.on) await stopCamera();
  connection.forget();
  say(null);
  $("board").hidden = !drawsFromPicture;
  $("colour-label").hidden = controls.mode === "inpaint";
  if (drawsFromPicture) {
    board.use(controls.mode);
    if (controls.mode === "inpaint" && board.picture === null && shown) await useResult();
  }
  ask();
});
board.addEventListener("change", ask);
shelf.addEventListener("chosen", ({detail: {fields}}) => {
  controls.restore(fields);
  ask();
});

const tools = ["brush", "eraser"];
for (const name of tools) {
  $(name).addEventListener("click", () => {
    board.tool = name;
    for (const each of tools) $(each).setAttribute("aria-pressed", each === name);
  });
}
$("colour").addEventListener("input", () => { board.colour = $("colour").value; });
$("width").addEventListener("input", () => { board.width = Number($("width").value) / 100; });
$("undo").addEventListener("click", () => board.undo());
$("clear").addEventListener("click", () => board.clear());
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("textarea, input[type=text], input[type=number]");
  if (!typing && !$("board").hidden && event.key === "z" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    board.undo();
  }
});

async function open(file) {
  try {
    board.picture = await createImageBitmap(file);
  } catch {
    status("This file cannot be read as a picture", "error");
  }
}
async function useResult() {
  if (shown) board.picture = await createImageBitmap(shown.blob);
}
async function stopCamera() {
  const last = await camera.stop();
  $("camera").setAttribute("aria-pressed", "false");
  board.picture = last;
}

$("open").addEventListener("change", () => {
  if ($("open").files.length) open($("open").files[0]);
  $("open").value = "";
});
$("canvas").addEventListener("dragover", (event) => event.preventDefault());
$("canvas").addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
});
$("take").addEventListener("click", useResult);
$("no-picture").addEventListener("click", async () => {
  if (camera.on) await stopCamera();
  board.picture = null;
});
$("camera").hidden = !Camera.offered;
$("camera").addEventListener("click", async () => {
  if (camera.on) return stopCamera();
  try {
    await camera.start();
    board.picture = $("video");
    $("camera").setAttribute("aria-pressed", "true");
  } catch {
    status("The camera cannot be used: it is not there, or not allowed", "error");
  }
});
camera.addEventListener("frame", () => {
  board.draw();
  ask();
});

connection.open();

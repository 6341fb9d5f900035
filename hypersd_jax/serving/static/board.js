// The canvas: strokes over a picture. Each use of it (a sketch, a mask) keeps its own strokes and picture for good.
//
// Strokes are lists of points in shares of the canvas's sides, so that another size draws them anew, whole.

const MASK_COLOUR = "#0fa596";
const KEY_STEP = 0.02;

export class Board extends EventTarget {
  tool = "brush";
  colour = "#d43d2a";
  width = 0.09;      // of a stroke, a share of the canvas's width
  #canvas;
  #uses = {};
  #use;
  #stroke = null;
  #cursor = null;    // of the keyboard

  constructor(canvas) {
    super();
    this.#canvas = canvas;
    this.use("image");
    new ResizeObserver(() => this.draw()).observe(canvas);
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
      canvas.addEventListener(name, () => this.#lift());
    }
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => { this.#cursor = null; this.#lift(); this.draw(); });
  }

  // Turn to another use, by its name; the strokes of the one before stay.
  use(name) {
    this.#lift();
    this.#use = this.#uses[name] ??= {strokes: [], picture: null};
    this.masks = name === "inpaint";
    this.#canvas.setAttribute("aria-label", this.masks ? "Mask: paint what is to change" : "Sketch");
    this.draw();
  }

  get strokes() {
    return this.#use.strokes.length;
  }

  get picture() {
    return this.#use.picture;
  }

  // An image, a video or null, to lie under the strokes.
  set picture(picture) {
    this.#use.picture = picture;
    this.#changed();
  }

  // Whether anything is left to see: strokes that were cleared, or erased before there were any, are nothing.
  get painted() {
    const since = this.#use.strokes.findLastIndex(({tool}) => tool === "clear") + 1;
    return this.#use.strokes.slice(since).some(({tool}) => tool === "brush");
  }

  undo() {
    this.#lift();
    this.#use.strokes.pop();
    this.#changed();
  }

  // Clearing is a stroke too, which can be undone.
  clear() {
    if (this.painted) {
      this.#use.strokes.push({tool: "clear", points: []});
      this.#changed();
    }
  }

  // What the model is to start from, as a PNG of that size.
  image({width, height}) {
    return blob(width, height, (context) => {
      this.#underneath(context, width, height);
      if (!this.masks) context.drawImage(this.#layer(width, height), 0, 0);
    });
  }

  // White where it is to paint.
  mask({width, height}) {
    return blob(width, height, (context) => {
      context.fillRect(0, 0, width, height);
      context.drawImage(this.#layer(width, height, "#ffffff"), 0, 0);
    });
  }

  draw() {
    const canvas = this.#canvas;
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(canvas.clientWidth * scale), Math.round(canvas.clientHeight * scale)];
    if (!width || !height) return;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, {width, height});
    const context = canvas.getContext("2d");
    this.#underneath(context, width, height);
    context.globalAlpha = this.masks ? 0.6 : 1;
    context.drawImage(this.#layer(width, height), 0, 0);
    context.globalAlpha = 1;
    if (this.#cursor !== null) {
      context.strokeStyle = "#000000";
      context.lineWidth = 2 * scale;
      context.beginPath();
      context.arc(this.#cursor[0] * width, this.#cursor[1] * height, Math.max(this.width * width / 2, 4), 0, 7);
      context.stroke();
    }
  }

  #underneath(context, width, height) {
    context.fillStyle = "#ffffff";
    context.fillRect(0, 0, width, height);
    context.fillStyle = "#000000";
    const picture = this.#use.picture;
    const [w, h] = picture === null ? [0, 0] : [picture.videoWidth || picture.width, picture.videoHeight || picture.height];
    if (!w || !h) return;
    const scale = Math.max(width / w, height / h);
    context.drawImage(picture, (width - w * scale) / 2, (height - h * scale) / 2, w * scale, h * scale);
  }

  // The strokes alone, so that the eraser takes away strokes and never the picture.
  #layer(width, height, colour = this.masks ? MASK_COLOUR : null) {
    const layer = new OffscreenCanvas(width, height);
    const context = layer.getContext("2d");
    context.lineCap = context.lineJoin = "round";
    for (const stroke of this.#use.strokes) {
      if (stroke.tool === "clear") {
        context.clearRect(0, 0, width, height);
        continue;
      }
      context.globalCompositeOperation = stroke.tool === "eraser" ? "destination-out" : "source-over";
      context.strokeStyle = colour ?? stroke.colour;
      context.lineWidth = stroke.width * width;
      context.beginPath();
      const [first, ...rest] = stroke.points;
      context.moveTo(first[0] * width, first[1] * height);
      context.lineTo(first[0] * width + 0.01, first[1] * height);  // a dot, where there is but one point
      for (const [x, y] of rest) context.lineTo(x * width, y * height);
      context.stroke();
      context.globalCompositeOperation = "source-over";
    }
    return layer;
  }

  #changed() {
    this.draw();
    this.dispatchEvent(new Event("change"));
  }

  #point({clientX, clientY}) {
    const box = this.#canvas.getBoundingClientRect();
    return [(clientX - box.left) / box.width, (clientY - box.top) / box.height];
  }

  #begin(point) {
    this.#stroke = {tool: this.tool, colour: this.colour, width: this.width, points: [point]};
    this.#use.strokes.push(this.#stroke);
    this.#changed();
  }

  #lift() {
    this.#stroke = null;
  }

  #down(event) {
    if (event.button !== 0 || this.#stroke !== null) return;
    this.#canvas.setPointerCapture(event.pointerId);
    this.#begin(this.#point(event));
  }

  #move(event) {
    if (this.#stroke === null || !(event.buttons & 1)) return;
    const each = event.getCoalescedEvents?.() ?? [];
    this.#stroke.points.push(...(each.length ? each : [event]).map((one) => this.#point(one)));
    this.#changed();
  }

  #key(event) {
    const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (event.key === " ") {
      this.#cursor ??= [0.5, 0.5];
      if (this.#stroke === null) this.#begin([...this.#cursor]);
      else this.#lift();
    } else if (step) {
      const [x, y] = this.#cursor ?? [0.5, 0.5];
      this.#cursor = [Math.min(Math.max(x + step[0] * KEY_STEP, 0), 1), Math.min(Math.max(y + step[1] * KEY_STEP, 0), 1)];
      if (this.#stroke !== null) {
        this.#stroke.points.push([...this.#cursor]);
        this.#changed();
      }
    } else {
      return;
    }
    event.preventDefault();
    this.draw();
  }
}

function blob(width, height, paint) {
  const canvas = new OffscreenCanvas(width, height);
  paint(canvas.getContext("2d"));
  return canvas.convertToBlob({type: "image/png"});
}

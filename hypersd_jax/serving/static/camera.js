// The camera, where the browser has one and lets this page use it.

const INTERVAL = 150;  // milliseconds between two frames that are drawn from

export class Camera extends EventTarget {
  #video;
  #stream = null;
  #timer = 0;

  constructor(video) {
    super();
    this.#video = video;
  }

  // Browsers offer cameras to pages of this machine and to those behind TLS alone.
  static get offered() {
    return Boolean(navigator.mediaDevices?.getUserMedia);
  }

  get on() {
    return this.#stream !== null;
  }

  async start() {
    this.#stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: "user"}, audio: false});
    this.#video.srcObject = this.#stream;
    await this.#video.play();
    this.#timer = setInterval(() => this.dispatchEvent(new Event("frame")), INTERVAL);
  }

  // Turn it off; returns the last frame.
  async stop() {
    clearInterval(this.#timer);
    const last = this.#video.videoWidth ? await createImageBitmap(this.#video) : null;
    for (const track of this.#stream?.getTracks() ?? []) track.stop();
    this.#video.srcObject = this.#stream = null;
    return last;
  }
}

// The websocket: requests with versions out, images in, and a new connection where one was lost.

const LONGEST_WAIT = 8000;

export class Connection extends EventTarget {
  #socket = null;
  #version = 0;
  #oldest = 1;      // images below this version are of a page that has changed since
  #shown = 0;
  #wait = 500;

  open() {
    const address = new URL("/live", location.href);
    address.protocol = address.protocol.replace("http", "ws");
    const socket = new WebSocket(address);
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({data}) => this.#read(data);
    socket.onclose = () => {
      this.#tell("lost", {});
      setTimeout(() => this.open(), this.#wait);
      this.#wait = Math.min(2 * this.#wait, LONGEST_WAIT);
    };
    this.#socket = socket;
  }

  get ready() {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  // The version of the request last sent.
  get version() {
    return this.#version;
  }

  // Show no image of what was asked for before.
  forget() {
    this.#oldest = this.#version + 1;
  }

  // Ask for an image; `pictures` are blobs by name. Returns its version.
  async send(fields, pictures = {}) {
    const version = ++this.#version;
    const names = Object.keys(pictures);
    const header = {...fields, version};
    if (!names.length) {
      this.#socket.send(JSON.stringify(header));
      return version;
    }
    header.pictures = Object.fromEntries(names.map((name) => [name, pictures[name].size]));
    const text = new TextEncoder().encode(JSON.stringify(header));
    const length = new DataView(new ArrayBuffer(4));
    length.setUint32(0, text.length);
    const message = await new Blob([length, text, ...names.map((name) => pictures[name])]).arrayBuffer();
    this.#socket.send(message);
    return version;
  }

  #read(data) {
    if (typeof data === "string") {
      const message = JSON.parse(data);
      if (message.type === "hello") this.#wait = 500;
      this.#tell(message.type, message);
      return;
    }
    const length = new DataView(data).getUint32(0);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
    if (header.version < this.#oldest || header.version < this.#shown) return;
    this.#shown = header.version;
    this.#tell("image", {...header, blob: new Blob([new Uint8Array(data, 4 + length)], {type: "image/png"})});
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, {detail}));
  }
}

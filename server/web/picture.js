/** A picture with a mask over it, on a canvas: zoom by wheel, keys or two fingers, pan by dragging. */

const MAX_SCALE = 40, ZOOM_STEP = 1.25;

/** Makes a canvas that holds an ImageData. */
export function layer(data) {
  const canvas = new OffscreenCanvas(data.width, data.height);
  canvas.getContext("2d").putImageData(data, 0, 0);
  return canvas;
}

export class PictureView {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {(pixel: [number, number]|null) => void} onPoint is called with the pixel under the pointer
   */
  constructor(canvas, onPoint) {
    Object.assign(this, { canvas, onPoint, picture: null, area: null, edge: null, opacity: 0.45, outline: true });
    // x and y: corner of the picture in CSS pixels; scale: CSS pixels per pixel; fitted: whether it follows the size of the canvas.
    Object.assign(this, { x: 0, y: 0, scale: 1, fitted: true, pointers: new Map() });
    new ResizeObserver(() => this.draw()).observe(canvas);
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => this.onPoint(null));
    canvas.addEventListener("dblclick", () => this.fit());
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Sets another input; without a picture the mask is shown on black. */
  setPicture(picture, [width, height]) {
    Object.assign(this, { picture, width, height, area: null, edge: null, fitted: true });
    this.draw();
  }

  /** Sets the result of `paintMask`; null for none. */
  setMask(mask) {
    this.area = mask && layer(mask.area);
    this.edge = mask && (mask.edge === mask.area ? this.area : layer(mask.edge));
    this.draw();
  }

  fit() {
    this.fitted = true;
    this.draw();
  }

  /** Zooms about a point of the canvas, by default its middle. */
  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const scale = Math.min(MAX_SCALE, Math.max(this.#fittedScale() / 2, this.scale * factor));
    this.x = x - ((x - this.x) * scale) / this.scale;
    this.y = y - ((y - this.y) * scale) / this.scale;
    Object.assign(this, { scale, fitted: false });
    this.draw();
  }

  pan(dx, dy) {
    Object.assign(this, { x: this.x + dx, y: this.y + dy, fitted: false });
    this.draw();
  }

  /** Draws at the next frame, once however often it is called. */
  draw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.#paint();
    });
  }

  #fittedScale() {
    return 0.96 * Math.min(this.canvas.clientWidth / this.width, this.canvas.clientHeight / this.height);
  }

  #paint() {
    const { canvas } = this, { clientWidth, clientHeight } = canvas, density = devicePixelRatio;
    if (!this.width || !clientWidth) return;
    canvas.width = clientWidth * density;
    canvas.height = clientHeight * density;
    if (this.fitted) {
      this.scale = this.#fittedScale();
      this.x = (clientWidth - this.width * this.scale) / 2;
      this.y = (clientHeight - this.height * this.scale) / 2;
    }
    const context = canvas.getContext("2d");
    context.setTransform(density * this.scale, 0, 0, density * this.scale, density * this.x, density * this.y);
    context.imageSmoothingEnabled = this.scale < 1;
    context.fillStyle = "#000";
    context.fillRect(0, 0, this.width, this.height);
    if (this.picture) context.drawImage(this.picture, 0, 0, this.width, this.height);
    // Differences are small and thin, so they are nearly opaque.
    context.globalAlpha = this.edge === this.area ? 0.85 : this.opacity;
    if (this.area) context.drawImage(this.area, 0, 0);
    context.globalAlpha = 1;
    if (this.edge && this.outline && this.edge !== this.area) context.drawImage(this.edge, 0, 0);
  }

  #wheel(event) {
    if (!this.width) return;
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), event.offsetX, event.offsetY);
  }

  #down(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
  }

  #move(event) {
    const here = [event.offsetX, event.offsetY], previous = this.pointers.get(event.pointerId);
    this.onPoint(this.#pixel(here));
    if (!previous) return;
    const other = [...this.pointers].find(([id]) => id !== event.pointerId)?.[1];
    if (other) {
      const distance = ([x, y]) => Math.hypot(x - other[0], y - other[1]);
      this.zoom(distance(here) / Math.max(1, distance(previous)), (here[0] + other[0]) / 2, (here[1] + other[1]) / 2);
    } else {
      this.pan(here[0] - previous[0], here[1] - previous[1]);
    }
    this.pointers.set(event.pointerId, here);
  }

  #pixel([x, y]) {
    const at = [Math.floor((x - this.x) / this.scale), Math.floor((y - this.y) / this.scale)];
    return at[0] >= 0 && at[1] >= 0 && at[0] < this.width && at[1] < this.height ? at : null;
  }

  #key(event) {
    const moves = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };
    if (moves[event.key]) this.pan(...moves[event.key]);
    else if (event.key === "+" || event.key === "=") this.zoom(ZOOM_STEP);
    else if (event.key === "-") this.zoom(1 / ZOOM_STEP);
    else if (event.key === "0") this.fit();
    else return;
    event.preventDefault();
  }
}

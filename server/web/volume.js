/** A volume with a mask over it: three planes and a rendering, by NiiVue, which is loaded when the first volume comes. */
import { rgb } from "./masks.js";

let loading = null;

function niivue() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL("./vendor/niivue.umd.js", import.meta.url);
    script.onload = () => resolve(window.niivue);
    script.onerror = () => {
      loading = null;
      reject(new Error("The viewer of volumes could not be loaded; reload the page."));
    };
    document.head.append(script);
  });
  return loading;
}

/** Colours of classes for NiiVue; those that are hidden are clear. */
function table(classes, hidden) {
  const values = [0, ...classes.map(({ value }) => value)];
  const parts = [[0, 0, 0], ...classes.map(({ color }) => rgb(color))];
  const part = (index) => parts.map((color) => color[index]);
  const A = values.map((value) => (value && !hidden.has(value) ? 255 : 0));
  return { R: part(0), G: part(1), B: part(2), A, I: values, labels: ["background", ...classes.map(({ name }) => name)] };
}

export class VolumeView {
  #viewer = null;
  // What is to be seen, as files come at different times: the last that was asked for wins.
  #latest = null;
  #mask = null;
  #opacity = 0.45;

  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    this.canvas = canvas;
  }

  /**
   * Shows a volume.
   * @param {File} file
   * @param {string} name tells NiiVue the format
   */
  async setInput(file, name) {
    const { Niivue, NVImage, SHOW_RENDER, MULTIPLANAR_TYPE } = await niivue();
    if (!this.#viewer) {
      this.#viewer = new Niivue({
        dragAndDropEnabled: false, loadingText: "", logLevel: "silent", multiplanarLayout: MULTIPLANAR_TYPE.GRID,
        multiplanarShowRender: SHOW_RENDER.ALWAYS, multiplanarPadPixels: 4, backColor: [0, 0, 0, 1], crosshairColor: [1, 1, 1, 0.45],
        crosshairWidth: 0.25, show3Dcrosshair: true,
      });
      await this.#viewer.attachToCanvas(this.canvas);
      this.#viewer.setSliceType(this.#viewer.sliceTypeMultiplanar);
    }
    [this.#latest, this.#mask] = [file, null];
    const volume = await NVImage.loadFromFile({ file: new File([file], name), name });
    if (this.#latest !== file) return;
    for (const before of [...this.#viewer.volumes]) this.#viewer.removeVolume(before);
    this.#viewer.addVolume(volume);
    // Else its flat inside would hide the mask from the rendering.
    await this.#viewer.setGradientOpacity(0.7);
  }

  /**
   * Another mask, as the bytes of a .nii.gz.
   * @param {Uint8Array} bytes
   * @param {{value: number, name: string, color: string}[]} classes
   * @param {Set<number>} hidden
   */
  async setMask(bytes, classes, hidden) {
    this.#mask = bytes;
    const { NVImage } = await niivue();
    const mask = await NVImage.loadFromFile({ file: new File([bytes], "mask.nii.gz"), name: "mask.nii.gz", opacity: this.#opacity });
    if (this.#mask !== bytes) return;
    mask.setColormapLabel(table(classes, hidden));
    const viewer = this.#viewer;
    if (viewer.volumes[1]) viewer.removeVolume(viewer.volumes[1]);
    viewer.addVolume(mask);
    viewer.updateGLVolume();
  }

  /** Moves the crosshair into the largest of some objects, each with `voxels` and `centroid_mm`. */
  lookAt(objects) {
    if (!objects.length) return;
    const largest = objects.reduce((best, one) => (one.voxels > best.voxels ? one : best));
    this.#viewer.scene.crosshairPos = this.#viewer.mm2frac(Object.values(largest.centroid_mm));
    this.#viewer.drawScene();
  }

  /** Shows and hides classes. */
  setHidden(classes, hidden) {
    this.#viewer.volumes[1]?.setColormapLabel(table(classes, hidden));
    this.#viewer.updateGLVolume();
  }

  setOpacity(opacity) {
    this.#opacity = opacity;
    if (this.#viewer?.volumes[1]) this.#viewer.setOpacity(1, opacity);
  }

  /** The slice of the volume along z that a mask fills most, grey, for small pictures. */
  slice(z) {
    const volume = this.#viewer.volumes[0], { img, dims } = volume;
    // The window is in scaled values, and the voxels are as stored.
    const [low, high] = [volume.cal_min, volume.cal_max].map((value) => volume.intensityScaled2Raw(value));
    const [width, height] = [dims[1], dims[2]];
    const data = new ImageData(width, height), first = z * width * height;
    for (let at = 0; at < width * height; at += 1) {
      data.data.fill(Math.round((255 * (img[first + at] - low)) / (high - low || 1)), 4 * at, 4 * at + 3);
      data.data[4 * at + 3] = 255;
    }
    return data;
  }
}

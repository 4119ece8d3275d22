/** A volume with a mask over it: three planes and a rendering, by NiiVue, which is loaded with the first volume. */
import { rgb } from "./masks.js";

let library = null;

function loadNiivue() {
  library ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL("./vendor/niivue.umd.js", import.meta.url);
    script.onload = () => resolve(window.niivue);
    script.onerror = () => {
      library = null;
      reject(new Error("The volume viewer could not be loaded. Reload the page."));
    };
    document.head.append(script);
  });
  return library;
}

/** Makes NiiVue's colour map of the classes; hidden ones are transparent. */
function colormap(classes, hidden) {
  const values = [0, ...classes.map(({ value }) => value)];
  const colors = [[0, 0, 0], ...classes.map(({ color }) => rgb(color))];
  const channel = (index) => colors.map((color) => color[index]);
  const A = values.map((value) => (value && !hidden.has(value) ? 255 : 0));
  return { R: channel(0), G: channel(1), B: channel(2), A, I: values, labels: ["background", ...classes.map(({ name }) => name)] };
}

export class VolumeView {
  #viewer = null;
  // The latest file and mask, because files may finish loading in another order than they were set.
  #file = null;
  #mask = null;
  #opacity = 0.45;

  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    this.canvas = canvas;
  }

  /**
   * Shows a volume.
   * @param {File} file
   * @param {string} name file name by which NiiVue knows the format
   */
  async setInput(file, name) {
    const { Niivue, NVImage, SHOW_RENDER, MULTIPLANAR_TYPE } = await loadNiivue();
    if (!this.#viewer) {
      this.#viewer = new Niivue({
        dragAndDropEnabled: false, loadingText: "", logLevel: "silent", multiplanarLayout: MULTIPLANAR_TYPE.GRID,
        multiplanarShowRender: SHOW_RENDER.ALWAYS, multiplanarPadPixels: 4, backColor: [0, 0, 0, 1], crosshairColor: [1, 1, 1, 0.45],
        crosshairWidth: 0.25, show3Dcrosshair: true,
      });
      await this.#viewer.attachToCanvas(this.canvas);
      this.#viewer.setSliceType(this.#viewer.sliceTypeMultiplanar);
    }
    [this.#file, this.#mask] = [file, null];
    const volume = await NVImage.loadFromFile({ file: new File([file], name), name });
    if (this.#file !== file) return;
    for (const previous of [...this.#viewer.volumes]) this.#viewer.removeVolume(previous);
    this.#viewer.addVolume(volume);
    // Transparent inside, because it would hide the mask from the rendering.
    await this.#viewer.setGradientOpacity(0.7);
  }

  /**
   * Shows a mask.
   * @param {Uint8Array} bytes a .nii.gz
   * @param {{value: number, name: string, color: string}[]} classes
   * @param {Set<number>} hidden
   */
  async setMask(bytes, classes, hidden) {
    this.#mask = bytes;
    const { NVImage } = await loadNiivue();
    const mask = await NVImage.loadFromFile({ file: new File([bytes], "mask.nii.gz"), name: "mask.nii.gz", opacity: this.#opacity });
    if (this.#mask !== bytes) return;
    mask.setColormapLabel(colormap(classes, hidden));
    const viewer = this.#viewer;
    if (viewer.volumes[1]) viewer.removeVolume(viewer.volumes[1]);
    viewer.addVolume(mask);
    viewer.updateGLVolume();
  }

  /** Moves the crosshair to the largest object; each has `voxels` and `centroid_mm`. */
  centerOn(objects) {
    if (!objects.length) return;
    const largest = objects.reduce((best, object) => (object.voxels > best.voxels ? object : best));
    this.#viewer.scene.crosshairPos = this.#viewer.mm2frac(Object.values(largest.centroid_mm));
    this.#viewer.drawScene();
  }

  /** Hides classes, and shows the others. */
  setHidden(classes, hidden) {
    this.#viewer.volumes[1]?.setColormapLabel(colormap(classes, hidden));
    this.#viewer.updateGLVolume();
  }

  setOpacity(opacity) {
    this.#opacity = opacity;
    if (this.#viewer?.volumes[1]) this.#viewer.setOpacity(1, opacity);
  }

  /** Draws a slice of the volume along z in grey. */
  slice(z) {
    const volume = this.#viewer.volumes[0], { img, dims } = volume;
    // The window is in scaled values, but the voxels are as stored.
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

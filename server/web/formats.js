/** What can be downloaded, and how a request may be changed. */
import { h } from "./dom.js";

const ALL = ["image", "stack", "volume"], IMAGE = ["image"], STACKS = ["image", "stack"], VOLUME = ["volume"];

/** Every output format of the server: label, kinds of input, name of the file, and whether it needs mode=accurate. A test compares it with the server's table. */
export const FORMATS = {
  png: ["mask, indexed PNG", IMAGE, "mask.png"],
  png1: ["mask, 1-bit PNG", IMAGE, "mask_1bit.png"],
  tiff: ["mask, TIFF", STACKS, "mask.tif"],
  nifti: ["mask, NIfTI", VOLUME, "mask.nii.gz"],
  nrrd: ["mask, .seg.nrrd (3D Slicer)", VOLUME, "mask.seg.nrrd"],
  labels_png: ["objects, 16-bit PNG", IMAGE, "labels.png"],
  labels_tiff: ["objects, TIFF", STACKS, "labels.tif"],
  labels_nifti: ["objects, NIfTI", VOLUME, "labels.nii.gz"],
  geojson: ["objects, GeoJSON (QuPath)", IMAGE, "objects.geojson"],
  geojson_gz: ["objects, GeoJSON, compressed", IMAGE, "objects.geojson.gz"],
  coco: ["objects, COCO", IMAGE, "coco.json"],
  csv: ["objects, CSV", ALL, "objects.csv"],
  json: ["statistics, JSON", ALL, "statistics.json"],
  overlay: ["overlay, PNG", ALL, "overlay.png"],
  overlay_jpeg: ["overlay, JPEG", ALL, "overlay.jpg"],
  picture: ["input as shown, PNG", IMAGE, "picture.png"],
  npz: ["scores, NumPy float16", ALL, "scores.npz"],
  npz8: ["scores, NumPy uint8", ALL, "scores_8bit.npz"],
  png16: ["scores, 16-bit PNG", IMAGE, "score.png"],
  scores_tiff: ["scores, TIFF", STACKS, "scores.tif"],
  scores_nifti: ["scores, NIfTI", VOLUME, "scores.nii.gz"],
  uncertainty_png: ["uncertainty, PNG", IMAGE, "uncertainty.png", true],
  uncertainty_tiff: ["uncertainty, TIFF", STACKS, "uncertainty.tif", true],
  uncertainty_nifti: ["uncertainty, NIfTI", VOLUME, "uncertainty.nii.gz", true],
};

const DEFAULT = { image: "png", stack: "tiff", volume: "nifti" };

/** Boxes to tick and a button. */
export function formatBoxes(kind) {
  const boxes = Object.entries(FORMATS).filter(([, [, kinds]]) => kinds.includes(kind)).map(([name, [label, , , accurate]]) => h(
    "label", accurate ? { title: "from mode accurate alone" } : {},
    h("input", { type: "checkbox", name: "format", value: name, checked: name === DEFAULT[kind], "data-accurate": String(Boolean(accurate)) }),
    ` ${label}`,
  ));
  return [h("div", { className: "boxes" }, ...boxes), h("button", {}, "Download"), h("small", {}, " several come as one zip")];
}

/** The names that are ticked and can be had at a level; at least one. */
export function formatsIn(form, level, kind) {
  const ticked = [...form.querySelectorAll("[name=format]")];
  for (const box of ticked) box.disabled = box.dataset.accurate === "true" && level !== "accurate";
  const names = ticked.filter((box) => box.checked && !box.disabled).map((box) => box.value);
  return names.length ? names : [DEFAULT[kind]];
}

/** Of the fields those by which a file is read, so that it looks another way. */
export const READING = ["axes", "channel", "nonfinite"];

/**
 * The fields that change a request, each by the name of its parameter.
 * @param {{kind: "image"|"stack"|"volume", tiff: boolean}} input
 */
export function optionFields({ kind, tiff }, card) {
  const field = (label, name, properties) => h("label", {}, `${label} `, h("input", { name, ...properties }));
  const number = (label, name, step, most) => field(label, name, { type: "number", min: "0", step, ...(most ? { max: most } : {}), placeholder: "–" });
  const box = (label, name) => h("label", {}, h("input", { type: "checkbox", name, value: "true" }), ` ${label}`);
  const choice = (label, name, values) => h("label", {}, `${label} `, h("select", { name }, ...values.map(([value, text]) => new Option(text, value))));
  const smallest = kind === "image" ? [["min_size_px", "pixels"], ["min_size_mm2", "mm²"]]
    : [["min_size_px", "voxels"], ["min_size_mm3", "mm³"]];
  return [
    number("threshold", "threshold", "0.05", "1"),
    h("label", {}, "smallest object ", h("input", { name: "min_size", type: "number", min: "0", step: "any", placeholder: "–" }),
      h("select", { name: "unit", ariaLabel: "unit" }, ...smallest.map(([value, text]) => new Option(text, value)))),
    box("fill holes", "fill_holes"), box("only the largest object of a class", "keep_largest"), box("split touching objects", "instances"),
    kind === "volume" ? null : field("pixel size, µm", "pixel_size_um", { placeholder: kind === "image" ? "0.5 or 0.5x0.25" : "0.5 or 0.5x0.5x1", title: "of height and width, where they differ" + (kind === "image" ? "" : ", and of the step from page to page") }),
    kind !== "image" && card.dims === 2 ? choice("slices along", "axis", [["", "coarsest axis"], ["0", "axis 0"], ["1", "axis 1"], ["2", "axis 2"]]) : null,
    tiff ? field("axes of the TIFF", "axes", { placeholder: "as the file says", title: "slowest first, as ZYX, TCYX, YXS" }) : null,
    number("channel alone", "channel", "1"), choice("NaN and infinite values", "nonfinite", [["", "are refused"], ["zero", "are 0"]]),
    choice("precision", "precision", [["", "automatic"], ...card.precisions.map((name) => [name, name])]),
  ].filter(Boolean);
}

/** What is filled in, as parameters of a query. */
export function optionsIn(form) {
  const data = Object.fromEntries(new FormData(form));
  const { min_size: least, unit, ...options } = data;
  if (least) options[unit] = least;
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== ""));
}

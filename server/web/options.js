/** The form of request parameters, made from the server's description of them, which the page carries as JSON. */
import { $, h } from "./dom.js";

const { parameters, formats } = JSON.parse($("request-options").content.textContent);

/**
 * Output formats of the server.
 * @type {{name: string, filename: string, kinds: string[], accurate_only: boolean}[]}
 */
export const FORMATS = formats;

/** Parameters that have a control of their own elsewhere on the page. */
const OWN_CONTROL = ["mode", "level", "model", "format"];

/** Parameters that decide how a file is decoded, and so how the server draws it; they belong to one file. */
export const DECODE_OPTIONS = ["axes", "channel", "nonfinite", "series"];

const form = $("options-form");

function control({ name, type, default: initial, minimum, maximum, enum: values }) {
  const shared = { name, id: `option-${name}` };
  if (type === "boolean") return h("input", { ...shared, type: "checkbox", defaultChecked: initial === true });
  if (values) {
    const choices = initial === null ? ["", ...values] : values;
    return h("select", shared, ...choices.map((value) => new Option(value, value, value === (initial ?? ""))));
  }
  const defaultValue = initial ?? "";
  if (type === "string") return h("input", { ...shared, defaultValue });
  return h("input", { ...shared, type: "number", min: minimum ?? "", max: maximum ?? "", step: type === "integer" ? "1" : "any", defaultValue });
}

/** Makes a field for every parameter without a control of its own. */
export function renderOptions() {
  form.replaceChildren(...parameters.filter(({ name }) => !OWN_CONTROL.includes(name)).map((parameter) => {
    const field = control(parameter), help = h("small", { id: `${field.id}-help` }, parameter.description);
    field.setAttribute("aria-describedby", help.id);
    return h("div", { className: "option" }, h("label", { htmlFor: field.id }, parameter.name.replaceAll("_", " ")), field, help);
  }));
}

function isChanged(field) {
  if (field.type === "checkbox") return field.checked !== field.defaultChecked;
  if (field.options) return !field.selectedOptions[0].defaultSelected;
  return field.value !== "" && field.value !== field.defaultValue;
}

/** The parameters whose values differ from their defaults, as a query has them. */
export function changedOptions() {
  const value = (field) => (field.type === "checkbox" ? String(field.checked) : field.value);
  return Object.fromEntries([...form.elements].filter(isChanged).map((field) => [field.name, value(field)]));
}

/** Sets the decode options back to their defaults. */
export function resetDecodeOptions() {
  for (const name of DECODE_OPTIONS) {
    const field = form.elements[name];
    if (field.options) field.selectedIndex = [...field.options].findIndex((option) => option.defaultSelected);
    else field.value = field.defaultValue;
  }
}

/** Shows how many parameters are changed. */
export function renderOptionCount() {
  const count = Object.keys(changedOptions()).length;
  $("options-count").textContent = count ? `· ${count} set` : "";
}

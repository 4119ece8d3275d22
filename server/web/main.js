/** The page: controls become requests, and answers are shown; a new request replaces the one before. */
import { Answers } from "./answers.js";
import { key } from "./api.js";
import { $, levelName } from "./dom.js";
import * as downloads from "./download.js";
import { addPicture, loadSample, readInput } from "./inputs.js";
import { allLevels, renderSelection, renderTicks, selectedLevel, selectLevel, setLevels } from "./levels.js";
import * as models from "./models.js";
import { drawNetwork, highlightNetwork } from "./network.js";
import { changedOptions, DECODE_OPTIONS, renderOptionCount, renderOptions, resetDecodeOptions } from "./options.js";
import { showResult, summary } from "./result.js";
import * as viewer from "./viewer.js";

const BUSY_AFTER_MS = 200;

const answers = new Answers();
let input = null, comparing = false, controller = new AbortController(), busyTimer = 0;
// Signal of the task that opens another input; until it is done, levels are only selected because opening ends with a request.
let opening = null;

const requestFor = (level = selectedLevel()) => ({ model: models.card().name, level, options: optionsFor(level) });
const cached = (level) => answers.cached(requestFor(level));
const accurate = () => cached("accurate");
const depth = () => Math.max(...models.card().levels);

/** The options of a request; max_loss is for auto alone. */
function optionsFor(level) {
  const { max_loss: maxLoss, ...others } = changedOptions();
  return level === "auto" && maxLoss !== undefined ? { max_loss: maxLoss, ...others } : others;
}

/** Cancels the current task; gives the signal of the next one. */
function restart() {
  controller.abort();
  controller = new AbortController();
  hideBusy();
  $("error").hidden = true;
  return controller.signal;
}

function hideBusy() {
  clearTimeout(busyTimer);
  viewer.hideBusy();
}

/** Runs a task in place of the current one, and shows its error. */
async function run(task) {
  const signal = restart();
  // Delayed because fast answers would make it flicker.
  busyTimer = setTimeout(() => viewer.showBusy(input && models.card() ? levelName(selectedLevel()) : ""), BUSY_AFTER_MS);
  try {
    await task(signal);
  } catch (error) {
    if (!signal.aborted) showError(error);
  } finally {
    if (!signal.aborted) hideBusy();
  }
}

function showError(error) {
  $("error").firstElementChild.textContent = error.message;
  $("error").hidden = false;
  $("key-form").hidden = error.status !== 401;
  if (error.status === 401) $("key").focus();
}

/** The answer of a level, cached or new. */
async function fetchAnswer(level, signal) {
  // Showing the input decides whether the server has to draw.
  await viewer.inputShown();
  signal.throwIfAborted();
  return answers.get(requestFor(level), signal, {
    previewLevel: allLevels()[0],
    onProgress: (job) => !signal.aborted && viewer.showBusy(levelName(level), job),
    onPreview: (answer) => (comparing ? redraw() : showAnswer(answer, `preview at ${levelName(answer.level)}; ${levelName(level)} is being computed`)),
  });
}

/** Shows the selected level, and requests `accurate` for the agreement with it. */
function segment() {
  comparing = false;
  $("compare-all").setAttribute("aria-pressed", "false");
  highlightNetwork(selectedLevel(), depth());
  if (!input || opening) return null;
  return run(async (signal) => {
    const answer = await fetchAnswer(selectedLevel(), signal);
    await showAnswer(answer);
    signal.throwIfAborted();
    hideBusy();
    // Only for images because volumes take long.
    if (input.kind === "image" && !accurate()) {
      await fetchAnswer("accurate", signal);
      await showAnswer(answer);
    }
  });
}

async function showAnswer(answer, remark = "") {
  if (await viewer.setAnswer(answer, accurate())) showNumbers(answer, remark);
}

function showNumbers(answer, remark = "") {
  const agreement = viewer.agreementWith(answer, accurate());
  showResult(answer, agreement, models.card().classes, viewer.hiddenClasses(), (value, visible) => {
    viewer.setClassVisible(value, visible);
    redraw();
  });
  updateTicks();
  if (answer.level === "auto" && selectedLevel() === "auto") highlightNetwork(Number(answer.facts.level), depth());
  $("status").textContent = [summary(answer, agreement), remark].filter(Boolean).join(" · ");
  downloads.renderCommand(input, requestFor(answer.level));
}

function updateTicks() {
  renderTicks((level) => {
    const answer = cached(level);
    if (!answer) return null;
    const agreement = () => (level === "accurate" ? null : viewer.agreementWith(answer, accurate())?.mean ?? null);
    return { ms: answer.facts.server_ms, iou: input.reference ? answer.facts.iou : agreement() };
  });
  $("ticks-caption").textContent = `time on the server, ${input.reference ? "IoU with the reference" : "agreement with accurate"}`;
}

function redraw() {
  if (comparing) viewer.showComparison(allLevels(), cached, showLevel);
  else if (cached()) showAnswer(cached());
}

function showLevel(level) {
  selectLevel(level);
  segment();
}

function compareAll() {
  if (comparing || opening) return segment();
  comparing = true;
  $("compare-all").setAttribute("aria-pressed", "true");
  return run(async (signal) => {
    redraw();
    for (const level of ["accurate", ...allLevels().slice(0, -1)]) {
      await fetchAnswer(level, signal);
      redraw();
      updateTicks();
    }
    showNumbers(cached());
  });
}

/** Reads another input, or the current one with another reference or other decode options. */
async function readNext(file, reference, signal) {
  await requireModels(signal);
  const isSame = file === input?.file;
  const next = await readInput(file, reference);
  signal.throwIfAborted();
  const dims = next.kind === "volume" ? 3 : 2;
  const model = isSame || models.card().dims === dims ? models.card().name : models.defaultModel(dims);
  const options = Object.entries(changedOptions()).filter(([name]) => isSame && DECODE_OPTIONS.includes(name));
  await addPicture(next, { model, level: models.cardOf(model).levels[0], options: Object.fromEntries(options) }, signal);
  signal.throwIfAborted();
  return { next, model, isSame };
}

/** Opens an input; the page changes only after it was read without an error. */
function openInput(file, reference = null) {
  return run(async (signal) => {
    opening = signal;
    const { next, model, isSame } = await readNext(file, reference, signal).finally(() => {
      if (opening === signal) opening = null;
    });
    const previousKind = input?.kind;
    [input, comparing] = [next, false];
    answers.setInput(input);
    if (previousKind !== input.kind) {
      models.renderModelList(input.kind === "volume" ? 3 : 2);
      downloads.renderFormats(input.kind);
    }
    if (model === models.card().name) $("model").value = model;
    else setModel(model);
    if (!isSame) resetDecodeOptions();
    renderOptionCount();
    $("file").textContent = [file.name, reference && `reference ${reference.name}`].filter(Boolean).join(" · ");
    $("reference").disabled = $("compare-all").disabled = false;
    $("result").classList.add("stale");
    $("status").textContent = "";
    updateTicks();
    await viewer.setInput(input);
    // A slider moved in the meantime has started a request of its own.
    signal.throwIfAborted();
    queueMicrotask(segment);
  });
}

function setModel(name) {
  models.setModel(name);
  const { classes, recommended_level: recommended } = models.card();
  viewer.setClasses(classes);
  setLevels(models.card(), recommended, segment);
  drawNetwork(depth());
  highlightNetwork(selectedLevel(), depth());
}

/** Loads the models once; a task that needs them may come before they are there. */
async function requireModels(signal) {
  if (models.card()) return;
  await models.loadModels();
  signal.throwIfAborted();
  $("key-form").hidden = true;
  const dims = models.initialDims();
  models.renderModelList(dims);
  setModel(models.defaultModel(dims));
}

function retry() {
  if (!models.card()) return run(requireModels);
  if (!comparing) return segment();
  comparing = false;
  return compareAll();
}

function connectFiles() {
  const connectChooser = (button, chooser, open) => {
    $(button).addEventListener("click", () => $(chooser).click());
    $(chooser).addEventListener("change", () => {
      if ($(chooser).files[0]) open($(chooser).files[0]);
      $(chooser).value = "";
    });
  };
  connectChooser("open", "chooser", (file) => openInput(file));
  connectChooser("reference", "reference-chooser", (file) => openInput(input.file, file));
  for (const button of document.querySelectorAll("[data-sample]")) {
    button.addEventListener("click", () => run(async () => {
      const file = await loadSample(button.dataset.sample);
      queueMicrotask(() => openInput(file));
    }));
  }
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) openInput(...event.dataTransfer.files);
  });
  addEventListener("paste", ({ clipboardData }) => clipboardData.files.length && openInput(...clipboardData.files));
}

function connectControls() {
  $("slider").addEventListener("input", () => { renderSelection(); segment(); });
  $("compare-all").addEventListener("click", compareAll);
  $("cancel").addEventListener("click", () => { restart(); $("status").textContent = "cancelled"; });
  $("retry").addEventListener("click", retry);
  $("model").addEventListener("change", () => { setModel($("model").value); segment(); });
  $("options-form").addEventListener("submit", (event) => event.preventDefault());
  $("options-form").addEventListener("change", ({ target }) => {
    renderOptionCount();
    // The picture of an image or stack may change with them; NiiVue reads volumes without the server.
    const readsAgain = DECODE_OPTIONS.includes(target.name) && (input?.tiff || input?.kind !== "volume");
    if (input && !opening && readsAgain) openInput(input.file, input.reference);
    else segment();
  });
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set($("key").value.trim());
    $("key").value = "";
    $("key-form").hidden = true;
    if (models.card()) segment();
    else run(requireModels);
  });
}

renderOptions();
connectFiles();
connectControls();
viewer.connectDisplay(redraw);
downloads.connectDownloads(() => ({ input, request: requestFor() }), run);
run(requireModels);

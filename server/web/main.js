/** The page: what is chosen becomes a request, and its answer is shown; the last request wins. */
import { Answers } from "./answers.js";
import { card as cardOf, key, models as listed } from "./api.js";
import { cardNodes } from "./card.js";
import { $ } from "./dom.js";
import { optionFields, optionsIn, READING } from "./formats.js";
import { completed, looked, sample } from "./inputs.js";
import { level, levels, named, setLevel, setLevels, renderTicks } from "./levels.js";
import { drawNetwork, lightNetwork } from "./network.js";
import { levelName, sentence, showResult } from "./result.js";
import * as stage from "./stage.js";
import * as download from "./download.js";

const answers = new Answers();
let models = [], cards = new Map(), card = null, input = null, comparing = false, asking = new AbortController(), slow = 0;
// While another input is looked at: it is segmented then, with what is chosen by that time.
let giving = null;

const ask = (wanted = level()) => ({ model: card.name, level: wanted, options: optionsIn($("asked")) });
const known = (wanted) => answers.kept(ask(wanted));
const accurate = () => known("accurate");

/** Gives up what was asked before. */
function restart() {
  asking.abort();
  asking = new AbortController();
  hideBusy();
  $("error").hidden = true;
  return asking.signal;
}

/** Nobody waits any more. */
function hideBusy() {
  clearTimeout(slow);
  stage.busy(null);
}

/** Runs a step; of what goes wrong the server's words are shown, unless nobody waits for it any more. */
async function step(work) {
  const signal = restart();
  // What is quick shall not flicker.
  slow = setTimeout(() => stage.busy({ level_name: input && card ? levelName(level()) : "" }), 200);
  try {
    await work(signal);
  } catch (error) {
    if (signal.aborted) return;
    $("error").firstElementChild.textContent = error.message;
    $("error").hidden = false;
    $("door").hidden = error.status !== 401;
    if (error.status === 401) $("key").focus();
  } finally {
    if (!signal.aborted) hideBusy();
  }
}

/** The answer of a level, kept or new. */
async function got(wanted, signal) {
  // Only then it is known whether the browser can show it, or the server has to draw.
  await stage.ready();
  signal.throwIfAborted();
  return answers.get(ask(wanted), signal, {
    first: levels()[0],
    progress: (job) => !signal.aborted && stage.busy({ ...job, level_name: levelName(wanted) }),
    // Of what is compared, each level shows itself when it is there.
    preview: (answer) => (comparing ? draw() : reveal(answer, `preview at ${levelName(answer.level)}; ${levelName(wanted)} is being computed`)),
  });
}

/** Shows what the slider says; and then, to know how far it agrees, asks for `accurate`. */
function segment() {
  comparing = false;
  $("all").setAttribute("aria-pressed", "false");
  lightNetwork(level(), levels().length - 1);
  if (!input || giving) return null;
  return step(async (signal) => {
    const answer = await got(level(), signal);
    await reveal(answer);
    signal.throwIfAborted();
    hideBusy();
    // A volume takes long; it is compared when somebody asks for it.
    if (input.kind === "image" && !accurate()) {
      await got("accurate", signal);
      await reveal(answer);
    }
  });
}

/** Shows an answer as the result. */
async function reveal(answer, remark = "") {
  if (await stage.setAnswer(answer, accurate())) figures(answer, remark);
}

function figures(answer, remark = "") {
  const agreed = stage.agreed(answer, accurate());
  showResult(answer, agreed, card.classes, stage.hidden(), (value, visible) => {
    stage.toggle(value, visible);
    draw();
  });
  told();
  $("status").textContent = [sentence(answer, agreed), remark].filter(Boolean).join(" · ");
  download.show(input, ask(answer.level));
}

function told() {
  renderTicks((wanted) => {
    const answer = known(wanted);
    if (!answer) return null;
    const agreed = () => (wanted === "accurate" ? null : stage.agreed(answer, accurate())?.mean ?? null);
    return { ms: answer.facts.server_ms, iou: input.reference ? answer.facts.iou : agreed() };
  });
  $("means").textContent = `time on the server, ${input.reference ? "IoU with the reference" : "agreement with accurate"}`;
}

/** Draws again what is shown. */
function draw() {
  if (comparing) stage.setCompare(levels(), known, chosen);
  else if (known(level())) reveal(known(level()));
}

function chosen(wanted) {
  setLevel(wanted);
  segment();
}

function compareAll() {
  if (comparing || giving) return segment();
  comparing = true;
  $("all").setAttribute("aria-pressed", "true");
  return step(async (signal) => {
    draw();
    for (const wanted of ["accurate", ...levels().slice(0, -1)]) {
      await got(wanted, signal);
      draw();
      told();
    }
    figures(known(level()));
  });
}

/** Another input; or the same with another reference, or read in another way. */
function given(file, reference = null) {
  const again = file === input?.file;
  return step(async (signal) => {
    giving = signal;
    let next, name;
    try {
      next = await looked(file, reference);
      signal.throwIfAborted();
      const dims = next.kind === "volume" ? 3 : 2;
      name = again || card.dims === dims ? card.name : best(dims);
      const read = again ? Object.entries(optionsIn($("asked"))).filter(([option]) => READING.includes(option)) : [];
      await completed(next, { model: name, level: cards.get(name).levels[0], options: Object.fromEntries(read) }, signal);
      signal.throwIfAborted();
    } finally {
      if (giving === signal) giving = null;
    }
    const before = input;
    [input, comparing] = [next, false];
    answers.begin(input);
    // Nothing has changed until here, as the file could have been a broken one.
    if (before?.kind !== next.kind) offer(next.kind === "volume" ? 3 : 2);
    if (name === card.name) $("model").value = name;
    else chooseModel(name);
    if (!again) for (const option of READING) if ($("asked").elements[option]) $("asked").elements[option].value = "";
    if (before?.kind !== next.kind || before.tiff !== next.tiff) fields(again);
    if (before?.kind !== next.kind) download.begin(input);
    counted();
    $("file").textContent = [file.name, reference && `reference ${reference.name}`].filter(Boolean).join(" · ");
    $("reference").disabled = $("all").disabled = false;
    // What is still to be read is of the one before.
    $("result").classList.add("stale");
    $("status").textContent = "";
    told();
    await stage.setInput(input);
    // Who has moved the slider meanwhile has asked already.
    signal.throwIfAborted();
    queueMicrotask(segment);
  });
}

/** The fields of the options; what was filled in may stay. */
function fields(keep) {
  const before = keep ? [...new FormData($("asked"))] : [];
  $("asked").replaceChildren(...optionFields(input ?? { kind: card.dims === 3 ? "volume" : "image", tiff: false }, card));
  for (const [name, value] of before) {
    const field = $("asked").elements[name];
    if (field?.type === "checkbox") field.checked = true;
    else if (field && (!field.options || [...field.options].some((option) => option.value === value))) field.value = value;
  }
  counted();
}

function counted() {
  const number = Object.keys(optionsIn($("asked"))).length;
  $("chosen").textContent = number ? `· ${number} set` : "";
}

/** The models for images (2) or volumes (3), the fitting ones first; a volume can also be segmented slice by slice. */
const fitting = (dims) => models.filter((one) => one.dims === dims || dims === 3).sort((a, b) => b.dims - a.dims);

/** The name of the model to begin with. */
function best(dims) {
  const all = fitting(dims), found = all.find((one) => one.default && one.dims === dims) ?? all[0];
  if (!found) throw new Error("No model that is open here takes this kind of input.");
  return found.name;
}

/** Lists them. */
function offer(dims) {
  const label = (one) => (one.dims < dims ? `${one.name} (slice by slice)` : one.name);
  $("model").replaceChildren(...fitting(dims).map((one) => new Option(label(one), one.name)));
}

function chooseModel(name) {
  card = cards.get(name);
  $("model").value = name;
  $("about").textContent = card.title;
  $("card").querySelector("div").replaceChildren(...cardNodes(card));
  stage.setClasses(card.classes);
  setLevels(card.levels, card.recommended_level, segment);
  drawNetwork(Math.max(...card.levels));
  lightNetwork(level(), Math.max(...card.levels));
  fields(true);
}

function begin() {
  return step(async (signal) => {
    models = await listed();
    cards = new Map(await Promise.all(models.map(async ({ name }) => [name, await cardOf(name)])));
    signal.throwIfAborted();
    $("door").hidden = true;
    const dims = models.some((one) => one.dims === 2) ? 2 : 3;
    offer(dims);
    chooseModel(best(dims));
  });
}

function wire() {
  const pick = (button, chooser, use) => {
    $(button).addEventListener("click", () => $(chooser).click());
    $(chooser).addEventListener("change", () => {
      if ($(chooser).files[0]) use($(chooser).files[0]);
      $(chooser).value = "";
    });
  };
  pick("open", "chooser", (file) => given(file));
  pick("reference", "reference-chooser", (file) => given(input.file, file));
  for (const button of document.querySelectorAll("[data-sample]")) {
    button.addEventListener("click", () => step(async () => {
      const file = await sample(button.dataset.sample);
      queueMicrotask(() => given(file));
    }));
  }
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) given(...event.dataTransfer.files);
  });
  addEventListener("paste", ({ clipboardData }) => clipboardData.files.length && given(...clipboardData.files));
  $("slider").addEventListener("input", () => { named(); segment(); });
  $("all").addEventListener("click", compareAll);
  $("cancel").addEventListener("click", () => { restart(); $("status").textContent = "cancelled"; });
  $("again").addEventListener("click", () => (card ? (comparing ? ((comparing = false), compareAll()) : segment()) : begin()));
  $("model").addEventListener("change", () => {
    chooseModel($("model").value);
    segment();
  });
  $("asked").addEventListener("submit", (event) => event.preventDefault());
  $("asked").addEventListener("change", ({ target }) => {
    counted();
    // Of what the browser reads itself it shows what it can.
    if (input && !giving && READING.includes(target.name) && (input.tiff || input.kind !== "volume")) given(input.file, input.reference);
    else segment();
  });
  $("door").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set($("key").value.trim());
    $("key").value = "";
    $("door").hidden = true;
    if (card) segment();
    else begin();
  });
  stage.start(draw);
  download.start(() => ({ input, ask: ask() }), step);
}

wire();
begin();

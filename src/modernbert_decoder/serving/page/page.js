// The page: prompt, settings, models and keys put together. Nothing here, or in the modules it uses, ever
// turns a prompt or an answer into HTML: all text goes in as text.

import { Api, ApiError } from "./api.js";
import { Column } from "./column.js";
import { LEVELS, levelClass } from "./probability.js";
import { Tooltip } from "./tooltip.js";

const TYPING_PAUSE_MS = 250;
const LOADING_PAUSE_MS = 1000;
const MAX_COUNTED = 100_000; // characters of a prompt whose tokens are counted while it is typed
const KEY = "api-key"; // its name in sessionStorage

const byId = (id) => document.getElementById(id);
const [form, prompt, compare, keyField, notice] = ["form", "prompt", "compare", "key", "notice"].map(byId);
const settingFields = [...byId("settings").querySelectorAll("[name]")];

const api = new Api(() => keyField.value.trim());
const tooltip = new Tooltip(byId("tooltip"));
const columns = ["Model", "Second model"].map(
  (name) => new Column(byId("columns"), byId("column"), { api, tooltip, name }),
);

let loading = 0; // the timer of the next try while the server is still loading models

/** Asks which models there are; says why not where that fails. Returns whether there is one. */
async function loadModels() {
  let models = [];
  clearTimeout(loading);
  notice.textContent = "";
  try {
    const all = await api.models();
    models = all.filter(({ task }) => task === "generate" || task === "classify");
    const isLoading = all.some(({ ready }) => ready === false);
    if (isLoading) {
      notice.textContent = "The server is still loading models.";
      loading = setTimeout(loadModels, LOADING_PAUSE_MS);
    } else if (!models.length) {
      notice.textContent = "The server has no model that generates or classifies.";
    }
  } catch (error) {
    report(error);
    notice.textContent = error.message;
  }
  columns.forEach((column, index) => column.setModels(models, index));
  modelChanged();
  return models.length > 0;
}

/** What the chosen models can do decides what the form offers. */
function modelChanged() {
  const used = columns.filter((column) => !column.isHidden && column.model);
  const generates = used.length === 0 || used.some(({ model }) => model.task !== "classify");
  byId("run").textContent = generates ? "Generate" : "Classify";
  byId("settings").hidden = byId("fields").disabled = !generates; // disabled fields are not checked either
  countTokens();
}

/** What is filled in, by the names of the interface; empty fields are left to the server. */
function settings() {
  const values = {};
  for (const { name, value } of settingFields) {
    if (value.trim() === "") continue;
    values[name] = name === "stop" ? stopStrings(value) : Number(value);
  }
  return values;
}

function stopStrings(value) {
  return value.split("\n").filter((text) => text !== "").map((text) => text.replaceAll("\\n", "\n"));
}

async function run() {
  for (const field of settingFields) field.removeAttribute("aria-invalid");
  if (!columns[0].model && !(await loadModels())) return;
  const used = columns.filter((column) => !column.isHidden);
  const runs = used.map((column) => column.run(prompt.value, settings()));
  showRunning();
  for (const error of await Promise.all(runs)) report(error);
  showRunning();
}

function stop() {
  for (const column of columns) column.stop();
}

function showRunning() {
  byId("stop").disabled = !columns.some((column) => column.isRunning);
}

/** Leads to the field that an error is about; a defect of this page goes to the console. */
function report(error) {
  if (!error) return;
  if (!(error instanceof ApiError)) console.error(error);
  if (error.status === 401) {
    byId("key-panel").open = true;
    keyField.focus();
  }
  settingFields.find(({ name }) => name === error.param)?.setAttribute("aria-invalid", "true");
}

let counting = null; // the AbortController of the count that is waited for

/** How long the prompt is, in tokens of the first model, once the typing pauses. */
async function countTokens() {
  counting?.abort();
  const output = byId("prompt-tokens");
  const { model } = columns[0];
  output.textContent = "";
  if (!model || prompt.value === "" || prompt.value.length > MAX_COUNTED) return;
  const { signal } = (counting = new AbortController());
  await new Promise((resolve) => setTimeout(resolve, TYPING_PAUSE_MS));
  if (signal.aborted) return;
  try {
    const { count } = await api.tokenize({ model: model.id, prompt: prompt.value }, signal);
    const limit = model.max_model_len ? ` of ${model.max_model_len}` : "";
    if (!signal.aborted) output.textContent = `${count}${limit} tokens.`;
  } catch {
    // Only a convenience: what keeps it from working is said as soon as something is generated.
  }
}

/** The session's storage: what is in it outlives a reload, but not the tab. Null where it is switched off. */
function storage() {
  try {
    return sessionStorage;
  } catch {
    return null;
  }
}

function fillLegend() {
  LEVELS.forEach((least, level) => {
    const item = document.createElement("li");
    const most = LEVELS[level - 1];
    item.className = levelClass(least);
    item.textContent = least > 0 ? `${100 * least} % or more` : `less than ${100 * most} %`;
    byId("legend").append(item);
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
form.addEventListener("invalid", () => (byId("settings").open = true), { capture: true }); // to show it
byId("stop").addEventListener("click", stop);
prompt.addEventListener("input", countTokens);
compare.addEventListener("change", () => {
  columns[1].isHidden = !compare.checked;
  if (!compare.checked) columns[1].stop();
  modelChanged();
});
keyField.addEventListener("change", () => {
  storage()?.setItem(KEY, keyField.value);
  loadModels();
});
for (const column of columns) column.onModelChange(modelChanged);

addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    form.requestSubmit();
  } else if (event.key === "Escape") {
    stop();
    tooltip.hide();
  }
});

columns[1].isHidden = !compare.checked; // browsers restore check boxes on reload
fillLegend();
keyField.value = storage()?.getItem(KEY) ?? "";
loadModels();

// One model's side of the page: its choice, its answer as it comes, and how fast that was.

import { showLabels } from "./labels.js";
import { TokenView } from "./tokens.js";

const NUM_ALTERNATIVES = 5; // the most that OpenAI's interface allows
const ENDINGS = {
  stop: "Finished.",
  length: "Finished: the most tokens allowed.",
  timeout: "Ended by the server: the time was up.",
  aborted: "Ended by the server.",
};

export class Column {
  #api;
  #models = [];
  #abort = null; // of the run in progress
  #frame = 0;
  #follows = true; // the end of the output is kept in view until the reader scrolls up
  #top = 0; // where the output was scrolled to
  #clock = null;
  #parts;
  #view;

  /** Fills a copy of `template` and adds it to `parent`. */
  constructor(parent, template, { api, tooltip, name }) {
    this.#api = api;
    const article = template.content.firstElementChild.cloneNode(true);
    const part = (selector) => article.querySelector(selector);
    this.#parts = {
      article,
      select: part("select"),
      output: part(".output"),
      status: part(".status"),
      error: part(".error"),
      stats: part("dl"),
      first: part('[data-stat="first"]'),
      tokens: part('[data-stat="tokens"]'),
      speed: part('[data-stat="speed"]'),
    };
    part(".model span").textContent = name;
    article.setAttribute("aria-label", name);
    const { output } = this.#parts;
    output.setAttribute("aria-label", `Answer of ${name}`);
    output.addEventListener("scroll", () => this.#noteScroll());
    this.#view = new TokenView(output, tooltip);
    parent.append(article);
  }

  get isRunning() {
    return this.#abort !== null;
  }

  get isHidden() {
    return this.#parts.article.hidden;
  }

  set isHidden(value) {
    this.#parts.article.hidden = value;
  }

  /** The chosen entry of /v1/models; undefined where there is none. */
  get model() {
    return this.#models[this.#parts.select.selectedIndex];
  }

  /** Keeps the choice where the model is still there; else takes number `index`, or the first. */
  setModels(models, index) {
    const { select } = this.#parts;
    const chosen = this.model?.id;
    this.#models = models;
    select.replaceChildren(...models.map(({ id }) => new Option(id, id)));
    const kept = models.findIndex(({ id }) => id === chosen);
    select.selectedIndex = kept >= 0 ? kept : Math.min(index, models.length - 1);
  }

  onModelChange(listener) {
    this.#parts.select.addEventListener("change", listener);
  }

  stop() {
    this.#abort?.abort();
  }

  /** Generates or classifies, as the model can; a run in progress is given up. Throws nothing, shows it. */
  async run(prompt, settings) {
    this.stop();
    const { model } = this;
    const abort = (this.#abort = new AbortController());
    const classifies = model.task === "classify";
    this.#reset(classifies ? "Classifying…" : "Generating…");
    this.#parts.stats.hidden = classifies;
    let status = "";
    try {
      if (classifies) {
        showLabels(this.#parts.output, await this.#api.classify({ model: model.id, input: prompt }, abort.signal));
        status = "Finished.";
      } else {
        const body = { model: model.id, prompt, logprobs: NUM_ALTERNATIVES, ...settings };
        status = await this.#generate(body, abort.signal);
      }
    } catch (error) {
      if (this.#abort !== abort) return null; // another run has taken its place
      if (abort.signal.aborted) status = "Stopped.";
      else return this.#end(error);
    }
    return this.#abort === abort ? this.#end(null, status) : null;
  }

  async #generate(body, signal) {
    let ending = "Finished.";
    for await (const { choices, usage } of this.#api.complete(body, signal)) {
      if (signal.aborted) break;
      const choice = choices?.[0];
      if (choice) {
        this.#take(choice);
        if (choice.finish_reason) ending = ENDINGS[choice.finish_reason] ?? choice.finish_reason;
      }
      if (usage) this.#clock.count = usage.completion_tokens;
    }
    signal.throwIfAborted();
    return ending;
  }

  #take(choice) {
    const { tokens = [], token_logprobs: logprobs = [], top_logprobs: top = [] } = choice.logprobs ?? {};
    const records = tokens.map((text, i) => ({ text, logprob: logprobs[i], top: top?.[i] }));
    const clock = this.#clock;
    if (records.length || choice.text) {
      clock.last = performance.now();
      clock.count += records.length;
      if (!clock.first) {
        clock.first = clock.last;
        clock.firstCount = clock.count;
      }
    }
    this.#view.push(choice.text ?? "", records);
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  /** What is read from the layout is read once a frame, not once a token. */
  #draw() {
    this.#frame = 0;
    const { output, first, tokens, speed } = this.#parts;
    const { start, first: firstAt, firstCount, last, count } = this.#clock;
    if (firstAt) {
      first.textContent = `${Math.round(firstAt - start)} ms`;
      tokens.textContent = count;
      const rate = (1000 * (count - firstCount)) / (last - firstAt);
      if (rate > 0 && last > firstAt) speed.textContent = `${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`;
    }
    if (this.#follows && output.scrollHeight > output.clientHeight) output.scrollTop = output.scrollHeight;
  }

  /** Text may have been added since the scrolling, so that its end alone does not tell who scrolled. */
  #noteScroll() {
    const { scrollTop, clientHeight, scrollHeight } = this.#parts.output;
    if (scrollTop < this.#top) this.#follows = false;
    else if (scrollTop + clientHeight >= scrollHeight - 4) this.#follows = true;
    this.#top = scrollTop;
  }

  #reset(status) {
    const { output, error, first, tokens, speed } = this.#parts;
    this.#view.clear();
    this.#follows = true;
    this.#top = 0;
    this.#clock = { start: performance.now(), first: 0, firstCount: 0, last: 0, count: 0 };
    for (const stat of [first, tokens, speed]) stat.textContent = "–";
    error.textContent = "";
    this.#parts.status.textContent = status;
    output.setAttribute("aria-busy", "true");
  }

  /** @returns the error, for the page to act on */
  #end(error, status = "") {
    const parts = this.#parts;
    this.#view.finish();
    this.#abort = null;
    this.#draw();
    parts.output.setAttribute("aria-busy", "false");
    parts.status.textContent = status;
    parts.error.textContent = error?.message ?? "";
    return error;
  }
}

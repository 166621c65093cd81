// The one tooltip of the page: what a token is, how likely it was, and what else it might have been.

import { percent, probability } from "./probability.js";

const MAX_ALTERNATIVES = 10;

export class Tooltip {
  #element;
  #anchor = null;

  constructor(element) {
    this.#element = element;
    // It may be pointed at itself, to read it or to copy from it.
    element.addEventListener("pointerleave", (event) => {
      if (event.relatedTarget !== this.#anchor) this.hide();
    });
    addEventListener("scroll", () => this.#place(), { capture: true, passive: true });
    addEventListener("resize", () => this.#place());
  }

  get isOpen() {
    return this.#anchor !== null;
  }

  contains(node) {
    return this.#element.contains(node);
  }

  /**
   * @param {HTMLElement} anchor beside which it stands
   * @param {{text: string, logprob: number, top: Record<string, number>}[]} tokens what the anchor shows
   */
  show(anchor, tokens) {
    if (anchor === this.#anchor) return;
    this.hide();
    this.#anchor = anchor;
    const rows = tokens.flatMap(tokenRows);
    if (tokens.length > 1) rows.unshift(textElement("div", "note", `${tokens.length} tokens make up this piece`));
    this.#element.replaceChildren(...rows);
    this.#element.hidden = false;
    anchor.setAttribute("aria-describedby", this.#element.id);
    this.#place();
  }

  hide() {
    this.#anchor?.removeAttribute("aria-describedby");
    this.#anchor = null;
    this.#element.hidden = true;
  }

  /** Below the anchor, or above where there is no room; never outside the window. */
  #place() {
    if (!this.#anchor) return;
    const around = this.#anchor.getClientRects()[0] ?? this.#anchor.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height, style } = this.#element;
    const { clientWidth, clientHeight } = document.documentElement;
    const above = around.bottom + height > clientHeight && around.top >= height;
    style.left = `${Math.max(0, Math.min(around.left, clientWidth - width))}px`;
    style.top = `${above ? around.top - height : around.bottom}px`;
  }
}

function tokenRows(token) {
  const others = Object.entries(token.top ?? {})
    .filter(([text]) => text !== token.text)
    .sort((a, b) => b[1] - a[1])
    .slice(0, MAX_ALTERNATIVES);
  return [row(token.text, token.logprob, "chosen"), ...others.map(([text, logprob]) => row(text, logprob, ""))];
}

function row(text, logprob, kind) {
  const element = textElement("div", `alternative ${kind}`, "");
  const bar = textElement("span", "bar", "");
  bar.style.setProperty("--share", probability(logprob));
  element.append(textElement("span", "", visible(text)), bar, textElement("span", "", percent(logprob)));
  return element;
}

function textElement(name, className, text) {
  const element = document.createElement(name);
  element.className = className;
  element.textContent = text;
  return element;
}

/** A token with its white space shown. */
function visible(text) {
  return text.replace(/\r?\n/g, "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "(nothing)";
}

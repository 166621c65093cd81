// Streamed text as one element per token, coloured by probability and reachable by keyboard.
//
// Text and tokens do not arrive together: the text of a token is held back while a character or a stop string
// is open, and one character may take several tokens. `TokenView` lays the two along each other. It only ever
// appends, so that a long output costs no more per token than a short one.

import { levelClass, probability } from "./probability.js";

const graphemes = new Intl.Segmenter(undefined, { granularity: "grapheme" });

export class TokenView {
  #element;
  #tooltip;
  #pieces = []; // {element, tokens}, in their order
  #indices = new Map(); // element -> its place among them
  #line = null; // the block that is being filled
  #waiting = []; // tokens not shown yet
  #text = ""; // text not shown yet
  #current = 0; // the place of the one that Tab reaches

  /**
   * @param {HTMLElement} element whose content this is
   * @param {Tooltip} tooltip shared with others
   */
  constructor(element, tooltip) {
    this.#element = element;
    this.#tooltip = tooltip;
    element.addEventListener("pointerover", (event) => this.#show(event.target));
    element.addEventListener("pointerleave", (event) => {
      if (!tooltip.contains(event.relatedTarget)) tooltip.hide();
    });
    element.addEventListener("focusin", (event) => {
      this.#makeCurrent(event.target);
      this.#show(event.target);
    });
    element.addEventListener("focusout", () => tooltip.hide());
    element.addEventListener("keydown", (event) => this.#onKey(event));
    element.addEventListener("copy", copyText);
  }

  clear() {
    this.#tooltip.hide();
    this.#element.replaceChildren();
    this.#pieces = [];
    this.#indices.clear();
    this.#waiting = [];
    this.#line = null;
    this.#text = "";
    this.#current = 0;
  }

  /**
   * @param {string} text what may be shown now
   * @param {{text: string, logprob: number, top: Record<string, number>}[]} tokens what was generated; `text`
   *     is the token alone, or its bytes, as in `bytes:\xf0\x9f`, where they are only a part of a character
   */
  push(text, tokens) {
    this.#text += text;
    this.#waiting.push(...tokens);
    this.#release(false);
  }

  /** Nothing more will come: shows what is left. */
  finish() {
    this.#release(true);
  }

  #release(isLast) {
    while (this.#waiting.length) {
      const piece = nextPiece(this.#text, this.#waiting, isLast);
      if (!piece) return;
      this.#append(this.#text.slice(0, piece.length), this.#waiting.splice(0, piece.count));
      this.#text = this.#text.slice(piece.length);
    }
    if (this.#text) this.#append(this.#text, []); // a server that does not tell its tokens
    this.#text = "";
  }

  #append(text, tokens) {
    const last = this.#pieces.at(-1);
    if (last && continuesCharacter(last.element.textContent, text)) {
      last.element.firstChild.appendData(text);
      last.tokens.push(...tokens);
      last.element.className = className(last);
      return;
    }
    const element = document.createElement("span");
    element.textContent = text;
    element.tabIndex = this.#pieces.length ? -1 : 0;
    element.className = className({ element, tokens });
    this.#indices.set(element, this.#pieces.length);
    this.#pieces.push({ element, tokens });
    // A block for each line: browsers lay out again only the one that changed.
    if (!this.#line) this.#element.append((this.#line = document.createElement("div")));
    this.#line.append(element);
    if (text.endsWith("\n")) this.#line = null;
  }

  #show(target) {
    const piece = this.#pieces[this.#indices.get(target)];
    if (piece?.tokens.length) this.#tooltip.show(target, piece.tokens);
  }

  #makeCurrent(element) {
    const index = this.#indices.get(element);
    if (index === undefined) return;
    this.#pieces[this.#current].element.tabIndex = -1;
    this.#current = index;
    element.tabIndex = 0;
  }

  #onKey(event) {
    const from = this.#indices.get(event.target);
    if (from === undefined || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
    const to = {
      ArrowRight: () => from + 1,
      ArrowLeft: () => from - 1,
      ArrowDown: () => this.#onNextLine(from, 1),
      ArrowUp: () => this.#onNextLine(from, -1),
      Home: () => 0,
      End: () => this.#pieces.length - 1,
    }[event.key]?.();
    if (to === undefined) return;
    event.preventDefault();
    this.#pieces[to]?.element.focus();
  }

  /** The place of the piece on the next line, in the direction of `step`, that is closest to piece `from`. */
  #onNextLine(from, step) {
    const place = (index) => this.#pieces[index].element.getClientRects()[0];
    const start = place(from);
    let best = -1;
    let distance = Infinity;
    let line = null;
    for (let index = from + step; this.#pieces[index]; index += step) {
      const { top, left, height } = place(index);
      if (Math.abs(top - (line ?? start.top)) > height / 2) {
        if (line !== null) break;
        line = top;
      }
      if (line !== null && Math.abs(left - start.left) < distance) {
        best = index;
        distance = Math.abs(left - start.left);
      }
    }
    return best;
  }
}

function className({ element, tokens }) {
  const text = element.textContent;
  const kind = text === "" ? "end" : /^\s*\n\s*$/.test(text) ? "break" : "";
  if (!tokens.length) return kind;
  const joint = tokens.reduce((product, token) => product * probability(token.logprob), 1);
  return `${levelClass(joint)} ${kind}`.trim();
}

/** Copies the text itself; a browser would add a line break of its own for every block. */
function copyText(event) {
  const selection = getSelection();
  if (!selection.rangeCount) return;
  event.clipboardData.setData("text/plain", selection.getRangeAt(0).cloneContents().textContent);
  event.preventDefault();
}

/**
 * How many characters of `text`, and how many of `tokens`, make up the next piece to show; null: wait for more.
 *
 * Usually the text starts with the first token. Where it does not, the token is part of a character, was cut
 * by a stop string or has no text: then the piece reaches up to the next token of whole characters.
 */
export function nextPiece(text, tokens, isLast) {
  const first = tokens[0].text;
  if (first !== "" && text.startsWith(first)) return { length: first.length, count: 1 };
  if (!isLast && (text === "" || first.startsWith(text))) return null; // all of it or its end is held back
  if (text === "") return { length: 0, count: tokens.length };
  const count = tokens.findIndex((token, i) => i > 0 && token.text !== "" && !isPart(token));
  if (count < 0) return { length: text.length, count: tokens.length };
  const at = text.indexOf(tokens[count].text, isPart(tokens[0]) ? 1 : 0);
  return { length: at < 0 ? text.length : at, count };
}

/** Whether a token holds only a part of a character, which is spelled in either of two ways. */
function isPart({ text }) {
  return text.includes("\ufffd") || /^bytes:\\x/.test(text);
}

/** Whether the two would be drawn as one character: an accent, a flag, a family of emoji, a surrogate pair. */
export function continuesCharacter(before, text) {
  if (before === "" || text === "") return false;
  if (text.charCodeAt(0) < 0x300 && !before.endsWith("\u200d")) return false; // nearly always; costs nothing
  const tail = before.slice(-32);
  return graphemes.segment(tail + text).containing(tail.length).index < tail.length;
}

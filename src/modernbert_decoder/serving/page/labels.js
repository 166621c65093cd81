// A classifier's answer as bars, the most likely label first.

const MAX_LABELS = 50;

/**
 * @param {HTMLElement} element emptied
 * @param {{labels: string[], probs: number[]}} answer of one text; `probs` of a regression are no probabilities
 */
export function showLabels(element, { labels, probs }) {
  const order = labels.map((_, i) => i).sort((a, b) => probs[b] - probs[a]);
  const table = document.createElement("table");
  table.createCaption().textContent = "Probability of each label";
  for (const i of order.slice(0, MAX_LABELS)) table.append(row(labels[i], probs[i]));
  element.replaceChildren(table);
  if (labels.length > MAX_LABELS) {
    const rest = document.createElement("p");
    rest.className = "note";
    rest.textContent = `${labels.length - MAX_LABELS} less likely labels are not shown.`;
    element.append(rest);
  }
}

function row(label, value) {
  const element = document.createElement("tr");
  const name = document.createElement("th");
  name.scope = "row";
  name.textContent = label;
  element.append(name);
  const bar = document.createElement("span");
  bar.className = "bar";
  const isProbability = value >= 0 && value <= 1;
  bar.style.setProperty("--share", isProbability ? value : 0);
  element.insertCell().append(bar);
  element.insertCell().textContent = isProbability ? `${(100 * value).toFixed(1)} %` : value.toPrecision(4);
  return element;
}

// Log-probabilities as what people read: percentages, and one of a few colours.

/** The least probability of each level; page.css gives level i the class `.p<i>`. */
export const LEVELS = [0.8, 0.5, 0.25, 0.1, 0.03, 0.01, 0];

/** @param {number | null} logprob natural logarithm; null, as JSON writes minus infinity, is 0 */
export function probability(logprob) {
  return logprob === null || logprob === undefined ? 0 : Math.exp(logprob);
}

export function percent(logprob) {
  const value = 100 * probability(logprob);
  if (value > 0 && value < 0.01) return "< 0.01 %";
  return `${value.toFixed(value < 10 ? 2 : 1)} %`;
}

/** The class of a token that has this probability. */
export function levelClass(value) {
  return `p${LEVELS.findIndex((least) => value >= least)}`;
}

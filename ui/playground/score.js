// Reward totals and ranking in the browser. The totals are those of RewardFunction.total in Python.

/** Weighted mean of the scores, ignoring missing ones; null if no weighted reward has a score. Both map names to numbers. */
function total(weights, scores) {
  let sum = 0, weight = 0;
  for (const name of Object.keys(weights)) {
    const score = scores[name];
    if (weights[name] > 0 && score !== null && score !== undefined) {
      sum += weights[name] * score;
      weight += weights[name];
    }
  }
  return weight > 0 ? sum / weight : null;
}

/** Mean of the values, ignoring missing ones; null if there are none. */
function mean(values) {
  const known = values.filter(value => value !== null && value !== undefined);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

/** Indices of the totals, best first. Equal totals keep their order; missing totals come last. */
function ranking(totals) {
  const sortKey = total => total === null ? -1 : total;
  return totals.map((_, index) => index).sort((a, b) => sortKey(totals[b]) - sortKey(totals[a]) || a - b);
}

// The arithmetic of a reward function in the browser: the same sums, in the same order, as rewards.RewardFunction.total.

// scores and weights: {name: number or null}. The weighted mean over what has a weight and a score; null if nothing has.
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

// The mean of the values that are there; null if none is.
function mean(values) {
  const known = values.filter(value => value !== null && value !== undefined);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

// Positions in the order best first; equal and missing totals keep the order in which they were drawn.
function ranking(totals) {
  const worth = total => total === null ? -1 : total;
  return totals.map((_, place) => place).sort((a, b) => worth(totals[b]) - worth(totals[a]) || a - b);
}

"use strict";
// The next-token distribution, as inference/sampling.py computes it.

// The logits (V,) in descending order, and their token ids.
function sortedLogits(logits) {
  const ids = Uint32Array.from(logits, (_, id) => id).sort((a, b) => logits[b] - logits[a]);
  return { ids, logits: Float64Array.from(ids, (id) => logits[id]) };
}

// Probabilities of logits in descending order, those left out at the end: [p of the likeliest, ...].
// A temperature of 0 keeps the likeliest token; topK = 0 and topP = 1 leave nothing out.
function distribution(logits, { temperature, topK, topP }) {
  if (temperature === 0) return [1];
  let kept = logits;
  if (topK > 0 && topK < logits.length) kept = logits.filter((logit) => logit >= logits[topK - 1]);
  let p = softmax(kept, temperature);
  if (topP < 1) {
    let before = 0;
    const size = p.findIndex((value) => before >= topP || ((before += value), false));
    if (size >= 0) p = softmax(kept.subarray(0, size), temperature);
  }
  return p;
}

function softmax(logits, temperature) {
  const powers = logits.map((logit) => Math.exp((logit - logits[0]) / temperature));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

// The data of the page. Heads are decoded on first use; pack.py describes the encoding.

import { bisectLeft } from "d3-array";

export const data = JSON.parse(document.getElementById("data").textContent);

// Decode base64 varints.
function decodeVarints(text) {
  const bytes = atob(text);
  const out = new Uint32Array(bytes.length);
  let count = 0;
  for (let at = 0; at < bytes.length; ) {
    let number = 0;
    let shift = 0;
    let byte;
    do {
      byte = bytes.charCodeAt(at++);
      number |= (byte & 127) << shift;
      shift += 7;
    } while (byte > 127);
    out[count++] = number;
  }
  return out.subarray(0, count);
}

const decoded = new Map();

// One head: row i holds the entries start[i] .. start[i + 1] of `key` (ascending) and `weight`. Where complete[i] is 0, rest[i] is
// the total weight of the keys that are not in the row, and bound[i] is an upper bound on the weight of each of them.
export function headOf(layerIndex, headIndex) {
  const id = layerIndex * 4096 + headIndex;
  if (decoded.has(id)) return decoded.get(id);
  const layer = data.layers[layerIndex];
  const packed = layer.heads[headIndex];
  const head = packed.rows === null ? overviewOf(packed) : detailOf(layer, packed);
  decoded.set(id, head);
  return head;
}

// Fetch a head that a served page holds in overview only, and replace its overview.
export async function fetchHead(layerIndex, headIndex) {
  const response = await fetch(`head/${layerIndex}/${headIndex}`);
  if (!response.ok) return false;
  Object.assign(data.layers[layerIndex].heads[headIndex], await response.json());
  decoded.delete(layerIndex * 4096 + headIndex);
  return true;
}

const thousandths = (text) => (text === null ? null : Float32Array.from(decodeVarints(text), (n) => n / data.thousand));

// A head that the page holds in overview only: `cells` as in data.py, entropy and received pooled.
function overviewOf(packed) {
  const cells = Uint8Array.from(atob(packed.cells), (c) => c.charCodeAt(0));
  return { cells, entropy: thousandths(packed.entropy), received: thousandths(packed.received) };
}

function detailOf(layer, packed) {
  const stream = decodeVarints(packed.rows);
  const start = new Uint32Array(layer.queries + 1);
  const complete = new Uint8Array(layer.queries);
  const key = new Uint32Array(stream.length);
  const weight = new Float32Array(stream.length);
  const bound = new Float32Array(layer.queries);
  const rest = Float32Array.from(decodeVarints(packed.rest), (n) => n / data.one);
  let at = 0;
  let count = 0;
  for (let i = 0; i < layer.queries; i++) {
    const head = stream[at++];
    const dense = head & 2;
    complete[i] = head & 1;
    bound[i] = 1;
    let last = -1;
    for (let n = head >>> 2; n > 0; n--) {
      last += dense ? 1 : stream[at++] + 1;
      key[count] = last;
      weight[count] = stream[at++] / data.one;
      if (weight[count] < bound[i]) bound[i] = weight[count];
      count++;
    }
    bound[i] = Math.min(bound[i], rest[i]);
    start[i + 1] = count;
  }
  return {
    cells: null,
    start,
    complete,
    rest,
    bound,
    key: key.slice(0, count),
    weight: weight.slice(0, count),
    entropy: thousandths(packed.entropy),
    received: thousandths(packed.received),
  };
}

// The number of keys that query i may attend according to the causal mask.
export function allowed(layer, i) {
  return layer.causal ? Math.max(0, Math.min(layer.keys, i + layer.offset + 1)) : layer.keys;
}

// The number of keys that query i may attend, as far as the page knows: padding is not recorded, so a complete row is counted.
export function reach(layer, head, i) {
  if (head.cells) return allowed(layer, i);
  return head.complete[i] ? head.start[i + 1] - head.start[i] : allowed(layer, i);
}

export const KNOWN = 0;
export const UNKNOWN = 1; // attended, but the weight was not recorded
export const MASKED = 2;

// The weight between query i and key j: {kind, weight}. For an unknown weight, `weight` is its upper bound.
export function cell(layer, head, i, j) {
  if (head.cells) return { kind: j < allowed(layer, i) ? UNKNOWN : MASKED, weight: 1 };
  const end = head.start[i + 1];
  const at = bisectLeft(head.key, j, head.start[i], end);
  if (at < end && head.key[at] === j) return { kind: KNOWN, weight: head.weight[at] };
  if (head.complete[i] || j >= allowed(layer, i)) return { kind: MASKED, weight: 0 };
  return { kind: UNKNOWN, weight: head.bound[i] };
}

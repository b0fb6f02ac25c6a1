// The text as it is read, shaded by the chosen head, and the sentence at the foot of the page that says the same in numbers.

const flows = data.texts.map((text, index) => {
  const box = make("p", { class: `flow${text.length > 60 ? " long" : ""}${text.length > 160 ? " endless" : ""}` });
  const words = text.map((token, n) => {
    const word = make("span", { class: `word${token[2] ? " marker" : ""}${token[1] ? " joined" : ""}`, title: `${rawOf(token)}  (token ${n})`, tabindex: "-1" }, token[0]);
    word.dataset.token = n;
    if (n && !token[1]) box.append(" ");
    box.append(word);
    return word;
  });
  const note = make("span", { class: "flow-note soft" });
  const name = data.texts.length > 1 ? make("span", { class: "flow-name" }, index ? "Source" : "Text") : null;
  byId("texts").append(make("div", { class: "text" }, name, box, note));
  const side = () => {
    const layer = chosenLayer();
    return layer.queryText === index ? "query" : layer.keyText === index ? "key" : null;
  };
  const target = (event) => {
    const word = event.target.closest(".word");
    if (!word || !side()) return null;
    const n = Number(word.dataset.token);
    if (side() === "key") return [null, n];
    const query = n - chosenLayer().offset;
    return query < 0 ? [null, n] : [query, null];
  };
  box.addEventListener("pointerover", (event) => {
    const found = event.pointerType === "mouse" && target(event);
    if (found) point(...found);
  });
  box.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null, null));
  box.addEventListener("click", (event) => {
    const found = target(event);
    if (found) pin(...found);
  });
  return { box, words, note, index };
});

const dressed = new WeakMap(); // what each word wears, so that only words that change are touched

function dress(word, classes, t) {
  const now = `${classes.join(" ")} ${t === null ? "" : t.toFixed(3)} ${theme()}`;
  if (dressed.get(word) === now) return;
  dressed.set(word, now);
  for (const name of ["asking", "answering", "unknown", "barred"]) word.classList.toggle(name, classes.includes(name));
  word.style.backgroundColor = t === null ? "" : shade(t);
  word.style.color = t === null ? "" : inkOn(t);
}

// The part of the scale for attention received: the words' own greatest is full, since markers often take ten times as much.
function receivedScale(layer, head) {
  const tokens = keyTokens(layer);
  let most = 0;
  head.received.forEach((amount, j) => {
    if (!tokens[j][2] && amount > most) most = amount;
  });
  if (!most) most = Math.max(1e-9, ...head.received);
  return (j) => Math.min(1, head.received[j] / most);
}

function drawTexts() {
  const layer = chosenLayer();
  const head = chosenHead();
  const { query, key } = state.focus || { query: null, key: null };
  for (const { words, note, index } of flows) {
    const asks = layer.queryText === index;
    const answers = layer.keyText === index;
    const scale = answers && query === null && key === null ? receivedScale(layer, head) : null;
    words.forEach((word, n) => {
      const classes = [];
      if (asks && query !== null && n - layer.offset === query) classes.push("asking");
      if (answers && key !== null && n === key) classes.push("answering");
      let t = scale ? 0.8 * scale(n) : null;
      let found = null;
      if (answers && query !== null) found = cell(layer, head, query, n);
      else if (asks && key !== null && query === null && n >= layer.offset) found = cell(layer, head, n - layer.offset, key);
      if (found && found.kind === KNOWN) t = height(found.weight);
      else if (found) classes.push(found.kind === UNKNOWN ? "unknown" : "barred");
      dress(word, classes, t !== null && t < 0.02 ? null : t);
    });
    const title = `${layer.label}, head ${state.head}`;
    if (scale) note.textContent = `Shaded by the attention each token receives in ${title}.`;
    else if (answers && query !== null) note.textContent = `Shaded by where “${queryTokens(layer)[query][0]}” looks in ${title}.`;
    else if (asks && key !== null) note.textContent = `Shaded by who looks at “${keyTokens(layer)[key][0]}” in ${title}.`;
    else note.textContent = asks || answers ? "" : `Not part of ${title}.`;
  }
}

// What a row leaves out, as a sentence; null where it leaves out nothing.
function restOf(layer, head, i) {
  const listed = head.start[i + 1] - head.start[i];
  if (!head.complete[i]) {
    const others = many(allowed(layer, i) - listed, "other key");
    const rest = head.rest[i] < 0.0005 ? "less than 0.001" : three(head.rest[i]);
    return `${rest} in ${others}, not recorded`;
  }
  if (!listed) return "it may attend to nothing";
  return head.rest[i] > 0.02 ? `${three(head.rest[i])} held by no key` : null;
}

function ranked(found, most) {
  return found.filter((item) => item.weight >= 0.0005).sort((a, b) => b.weight - a.weight).slice(0, most);
}

function sentence() {
  const layer = chosenLayer();
  const head = chosenHead();
  const asks = queryTokens(layer);
  const answers = keyTokens(layer);
  const { query, key } = state.focus || { query: null, key: null };
  const quote = (token, kind) => make("b", { class: kind }, token[0]);
  const parts = [];
  if (query !== null && key !== null) {
    const found = cell(layer, head, query, key);
    const told = {
      [KNOWN]: three(found.weight),
      [UNKNOWN]: `not recorded, ${atMost(found.weight)}`,
      [BARRED]: "may not attend",
    }[found.kind];
    parts.push(quote(asks[query], "ask"), " → ", quote(answers[key], "answer"), " ", make("span", { class: "figure" }, told));
  } else if (query !== null) {
    const found = [];
    for (let n = head.start[query]; n < head.start[query + 1]; n++) found.push({ at: head.key[n], weight: head.weight[n] });
    parts.push(quote(asks[query], "ask"), " looks at ");
    ranked(found, 5).forEach((item, n) => {
      parts.push(n ? " · " : "", quote(answers[item.at], "answer"), " ", make("span", { class: "figure" }, three(item.weight)));
    });
    const most = Math.log(Math.max(1, reach(layer, head, query))).toFixed(2);
    if (head.entropy) parts.push(make("span", { class: "soft" }, ` · entropy ${head.entropy[query].toFixed(2)} of ${most} nats`));
    const rest = restOf(layer, head, query);
    if (rest) parts.push(make("span", { class: "rest" }, ` · ${rest}`));
  } else if (key !== null) {
    const found = [];
    let unknown = 0;
    for (let i = 0; i < layer.queries; i++) {
      const seen = cell(layer, head, i, key);
      if (seen.kind === KNOWN) found.push({ at: i, weight: seen.weight });
      if (seen.kind === UNKNOWN) unknown++;
    }
    const top = ranked(found, 5);
    parts.push(quote(answers[key], "answer"), top.length ? " is looked at by " : " is looked at by no recorded query");
    top.forEach((item, n) => {
      parts.push(n ? " · " : "", quote(asks[item.at], "ask"), " ", make("span", { class: "figure" }, three(item.weight)));
    });
    const sign = layer.receivedExact ? "" : "at least ";
    parts.push(make("span", { class: "soft" }, ` · received ${sign}${three(head.received[key])} in all`));
    if (unknown) parts.push(make("span", { class: "rest" }, ` · not recorded for ${many(unknown, "query").replace("querys", "queries")}`));
  } else {
    parts.push(make("span", { class: "soft" }, "Point at a token, tap it, or reach it by the arrow keys, to see where it looks. Enter keeps it, Escape lets go."));
  }
  byId("reading").replaceChildren(make("p", {}, ...parts));
}

on("head focus theme", drawTexts);
on("head focus", sentence);
